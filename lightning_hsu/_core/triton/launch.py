"""Gradients of pair energies of many layers through compiled kernels: tables, workspace, launches, near pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.near import NEAR, NearPairs
from lightning_hsu._core.precision import exact_arithmetic
from lightning_hsu._core.triton import pairs
from lightning_hsu._core.triton.machine import precision
from lightning_hsu._core.triton.scalars import scalar_of
from lightning_hsu._core.updates import GradientUpdate

WORKSPACE = 2**30
"""Bytes in use at once: unit rows, their pulls, and slopes of pairs. Layers go in several rounds where they need more."""

TILE, DEPTH = 64, 16  # of what is measured by `make kernels`, the deepest that spills on no chip
ROWS, COLS = 4, 512
WARPS = 4
HEIGHT = 4  # tiles of rows whose near pairs are redone together

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(eq=False)
class Group:
    """The neurons of one group of a layer, and what the float64 pass found out about them."""

    to: GradientUpdate
    index: int
    near: NearPairs | None = None
    total: float = 0.0
    n: int = field(init=False)
    d: int = field(init=False)

    def __post_init__(self) -> None:
        self.n, self.d = self.to.w.shape[1:]

    @property
    def tiles(self) -> int:
        """Tiles of rows."""
        return -(-self.n // TILE)

    @property
    def width(self) -> int:
        """Padded dimension."""
        return -(-self.d // TILE) * TILE

    @property
    def entries(self) -> int:
        """Entries of the unit rows."""
        return self.tiles * TILE * self.width

    def places(self) -> list[int]:
        """Addresses and strides of the weights and of where to add."""
        found = []
        for t in (self.to.w, self.to.out):
            b, row, col = t.stride()
            found += [t.data_ptr() + self.index * b * t.element_size(), row, col]
        return found


@dataclass(frozen=True)
class Panel:
    """Tiles of rows of a group from ``first`` to before ``last``, against all columns from the first on."""

    first: int
    last: int


def add_pair_gradients(additions: Sequence[GradientUpdate], term: PairTerm) -> None:
    """The twin of :func:`lightning_hsu._core.foreach.add_pair_gradients`, for what :func:`takes` says yes to."""
    lots: dict[object, list[GradientUpdate]] = {}
    for one in additions:
        lots.setdefault((one.w.dtype, one.out.dtype, one.w.device), []).append(one)
    for lot in lots.values():
        first = lot[0].w
        groups = [
            Group(one, i)
            for one in lot
            for i in range(len(one.w))
            if one.w.shape[1] > 1 and one.w.shape[2] > 0
        ]
        with torch.no_grad(), exact_arithmetic(first), torch.cuda.device_of(first):
            for some in _together(groups):
                _Pass(some, term).run()


def _together(groups: list[Group]) -> Iterator[list[Group]]:
    """Groups in lots that fit the workspace; one that does not fit alone is a lot, too."""
    some: list[Group] = []
    used = 0
    for group in groups:
        need = 8 * group.entries + 4 * (group.tiles * TILE) ** 2
        if some and used + need > WORKSPACE:
            yield some
            some, used = [], 0
        some.append(group)
        used += need
    if some:
        yield some


class _Pass:
    """Four launches for a lot of groups, or two more for every further panel of one that is too large.

    Args:
        groups: Groups of layers of one dtype and device.
        term: The kernel.
    """

    def __init__(self, groups: list[Group], term: PairTerm) -> None:
        self.groups, self.term = groups, term
        self.device, self.precision = groups[0].to.w.device, precision()
        rows, entries = (
            sum(sizes) for sizes in zip(*((g.tiles * TILE, g.entries) for g in groups), strict=True)
        )
        self.x, self.pulls = torch.empty(2, entries, device=self.device)
        self.inverse_norm = torch.empty(rows, device=self.device)
        self.blocks = _row_blocks(tuple(g.tiles for g in groups), self.device)
        self.alive = torch.empty(len(self.blocks), dtype=torch.int32, device=self.device)

    def run(self) -> None:
        """Do all of it."""
        rounds = self._rounds()
        size = max(
            sum(_sizes(g, panel)[0] for g, panel in zip(self.groups, panels, strict=True))
            for panels in rounds
        )
        slopes = torch.empty(size, device=self.device)
        for i, panels in enumerate(rounds):
            table = self._table(panels)
            groups = _upload(torch.tensor(table, dtype=torch.int64), self.device)
            if i == 0:
                dtype = DTYPES[self.groups[0].to.w.dtype]
                pairs.unit_rows[(len(self.blocks),)](
                    groups,
                    self.blocks,
                    self.x,
                    self.inverse_norm,
                    self.alive,
                    dtype,
                    ROWS,
                    COLS,
                    num_warps=WARPS,
                )
                live = _download(self.alive)
            self._add(panels, table, groups, slopes)
        numbers = _upload(self._numbers(live()), self.device)
        self._repair()
        dtype = DTYPES[self.groups[0].to.out.dtype]
        pairs.additions[(len(self.blocks),)](
            groups,
            numbers,
            self.blocks,
            self.x,
            self.inverse_norm,
            self.pulls,
            dtype,
            ROWS,
            COLS,
            num_warps=WARPS,
        )

    def _rounds(self) -> list[list[Panel]]:
        """Panels that fit the workspace: whole triangles, or those of one large group one after the other."""
        first = self.groups[0]
        whole, room = 4 * (first.tiles * TILE) ** 2, WORKSPACE - 8 * first.entries
        if len(self.groups) > 1 or whole <= room:
            return [[Panel(0, g.tiles) for g in self.groups]]
        height = max(HEIGHT, room // (8 * first.tiles * TILE**2))
        return [
            [Panel(start, min(start + height, first.tiles))]
            for start in range(0, first.tiles, height)
        ]

    def _table(self, panels: list[Panel]) -> list[list[int]]:
        """One row for each group, as ``pairs`` reads it."""
        table, row, x, slope = [], 0, 0, 0
        for group, panel in zip(self.groups, panels, strict=True):
            every, upper = _sizes(group, panel)
            padded = group.tiles * TILE
            shape = [group.n, padded, group.d, group.width]
            table.append(
                [
                    *group.places(),
                    *shape,
                    row,
                    x,
                    panel.first * TILE,
                    panel.last * TILE,
                    slope,
                    slope + upper,
                ]
            )
            row, x, slope = row + padded, x + group.entries, slope + every
        return table

    def _add(
        self, panels: list[Panel], table: list[list[int]], groups: Tensor, slopes: Tensor
    ) -> None:
        """Add the pairs of some panels; near ones wait for :meth:`_repair`."""
        tall = tuple(
            (g.tiles, panel.first, panel.last) for g, panel in zip(self.groups, panels, strict=True)
        )
        tiles, on_host, bounds = _pair_tiles(tall, self.device)
        near = torch.empty(len(tiles), dtype=torch.int32, device=self.device)
        energies = torch.empty(len(tiles) if self.term.logarithm else 1, device=self.device)
        scalar, number = scalar_of(self.term), self.term.formula[1] if self.term.formula else 0.0
        kernel = {"PRECISION": self.precision, "TILE": TILE, "DEPTH": DEPTH, "num_warps": WARPS}
        pairs.pair_slopes[(len(tiles),)](
            groups, tiles, self.x, self.inverse_norm, slopes, near, energies, number,
            KERNEL=scalar, HALF_SPACE=self.term.half_space, ENERGY=self.term.logarithm, NEAR=NEAR, **kernel,
        )  # fmt: skip
        found, sums = _download(near), _download(energies)
        wide = _product_tiles(
            tuple((*one, g.width // TILE) for one, g in zip(tall, self.groups, strict=True)),
            self.device,
        )
        pairs.products[(len(wide),)](groups, wide, self.x, slopes, self.pulls, WIDTH=TILE, **kernel)
        if self.term.logarithm:
            for group, part in zip(self.groups, torch.split(sums().double(), bounds), strict=True):
                group.total += float(part.sum())
        noted = on_host[found() != 0]
        for i in noted[:, 0].unique().tolist():
            rows = noted[noted[:, 0] == i, 1] - panels[i].first
            self._find_near(self.groups[i], table[i], slopes, (rows // HEIGHT).unique().tolist())

    def _find_near(self, group: Group, row: list[int], slopes: Tensor, strips: list[int]) -> None:
        """Add the pairs that were held back in strips of a group's panel, in float64 and by differences."""
        first, last, at = (row[field.value] for field in (pairs.FIRST, pairs.LAST, pairs.PANEL))
        long, last = group.tiles * TILE - first, min(last, group.n)
        panel = slopes[at : at + (row[pairs.LAST.value] - first) * long].view(-1, long)
        if group.near is None:
            group.near = NearPairs(group.to.w[group.index].float(), self.term)
        cols = torch.arange(first, group.n, device=self.device)
        for strip in strips:
            start = strip * HEIGHT * TILE
            stop = min(start + HEIGHT * TILE, last - first)
            held = panel[start:stop, start : group.n - first] == pairs.HELD.value
            group.near.add_panel(held, cols[start:stop], cols[start:], stop - start, with_grad=True)

    def _repair(self) -> None:
        """Add the pulls of near pairs; they are tangent already, and what the kernels do to pulls leaves them so."""
        start, bound = 0, torch.finfo(torch.float32).max / 4
        for group in self.groups:
            if group.near is not None:
                rows, near = group.near.gradient()
                pulls = self.pulls[start : start + group.entries].view(-1, group.width)
                pulls[rows, : group.d] += (near / -2.0).clamp_(-bound, bound).float()
            start += group.entries

    def _numbers(self, live: Tensor) -> Tensor:
        """One row for each group, as ``pairs`` reads it; ``live`` are the neurons that take part, by block."""
        table, start = [], 0
        for group in self.groups:
            blocks = group.tiles * TILE // ROWS
            count = int(live[start : start + blocks].sum())
            factor = self.term.scale(count)
            if self.term.logarithm:
                total = group.total + (0.0 if group.near is None else float(group.near.energy))
                mean = (total + self.term.constant(count)) * factor
                factor /= mean if mean > 0 else 1.0
            limit = float("inf") if group.to.limit is None else group.to.limit
            bound = torch.finfo(group.to.w.dtype).max / 2
            table.append([-2.0 * factor, group.to.scale, limit, group.to.grad_scale, bound])
            start += blocks
        return torch.tensor(table, dtype=torch.float64)


def _sizes(group: Group, panel: Panel) -> tuple[int, int]:
    """Entries of a panel with its mirror image, and without."""
    high = panel.last - panel.first
    return TILE**2 * high * (2 * group.tiles - panel.first - panel.last), TILE**2 * high * (
        group.tiles - panel.first
    )


def _upload(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; from pinned memory, or the host would wait for all that was launched before."""
    return (
        table.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else table.to(device)
    )


def _download(part: Tensor) -> Callable[[], Tensor]:
    """Begin a copy to the host; the result waits for it, and for nothing that is launched after."""
    if part.device.type != "cuda":
        return lambda: part
    host = torch.empty_like(part, device="cpu", pin_memory=True)
    host.copy_(part, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return host

    return wait


@lru_cache(maxsize=64)
def _row_blocks(tiles: tuple[int, ...], device: torch.device) -> Tensor:
    """Group and index of every block of rows, (blocks, 2)."""
    return _flat([torch.arange(count * TILE // ROWS)[:, None] for count in tiles]).to(device)


@lru_cache(maxsize=64)
def _pair_tiles(
    panels: tuple[tuple[int, int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor, list[int]]:
    """Group, row and column of every tile on or above the diagonal, (tiles, 3), here and there; how many of each group."""
    parts = [
        torch.triu_indices(last - first, tiles - first).T + first for tiles, first, last in panels
    ]
    table = _flat(parts)
    return table.to(device), table, [len(part) for part in parts]


@lru_cache(maxsize=64)
def _product_tiles(panels: tuple[tuple[int, int, int, int], ...], device: torch.device) -> Tensor:
    """Group, row and column of every tile of the pulls that a panel adds to, (tiles, 3)."""
    parts = [
        torch.cartesian_prod(torch.arange(first, tiles), torch.arange(wide))
        for tiles, first, _, wide in panels
    ]
    return _flat(parts).to(device)


def _flat(parts: list[Tensor]) -> Tensor:
    """Tables (k, m) of the groups under one another, each row after the number of its group; int32."""
    rows = [
        torch.cat([torch.full_like(part[:, :1], i), part], dim=1) for i, part in enumerate(parts)
    ]
    return torch.cat(rows).to(torch.int32)
