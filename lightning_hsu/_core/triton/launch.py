"""Pair gradients of many layers through compiled kernels: tables, workspace and launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.near import NEAR, NearPairs
from lightning_hsu._core.precision import exact_arithmetic
from lightning_hsu._core.triton import pairs
from lightning_hsu._core.triton.machine import DTYPES, precision
from lightning_hsu._core.triton.scalars import scalar_of
from lightning_hsu._core.updates import GradientUpdate

WORKSPACE = 2**30
"""Bytes in use at once: unit rows, their pulls, and slopes of pairs.

Layers that need more go one batch after the other.
"""

# The deepest tiles that spill on no chip, among those that `make kernels` measures.
TILE = 64
DEPTH = 16
ROWS = 4
COLS = 512
WARPS = 4
STAGES = 3  # loads under way at once
STRIP = 4  # tiles of rows whose near pairs are redone together

TL_DTYPES = {dtype: getattr(tl, name) for dtype, name in DTYPES.items()}


@dataclass(eq=False)
class Group:
    """The neurons of one group of a layer, and what the float64 pass has found."""

    update: GradientUpdate
    index: int
    near: NearPairs | None = None
    energy: float = 0.0
    n: int = field(init=False)
    d: int = field(init=False)
    limit: Tensor | None = field(init=False)
    """The limit if it is on the device, as float64."""

    def __post_init__(self) -> None:
        self.n, self.d = self.update.w.shape[1:]
        limit = self.update.limit
        self.limit = limit.double() if isinstance(limit, Tensor) else None

    @property
    def tiles(self) -> int:
        """Number of tiles of rows."""
        return -(-self.n // TILE)

    @property
    def rows(self) -> int:
        """Number of rows, padded to whole tiles."""
        return self.tiles * TILE

    @property
    def width(self) -> int:
        """Dimension, padded to whole tiles."""
        return -(-self.d // TILE) * TILE

    @property
    def entries(self) -> int:
        """Number of entries of the padded unit rows."""
        return self.rows * self.width

    @property
    def workspace(self) -> int:
        """Bytes of unit rows, pulls and all slopes."""
        return 8 * self.entries + 4 * self.rows**2

    def addresses(self) -> list[int]:
        """Addresses and strides of the weights and of the tensor to add to."""
        found = []
        for tensor in (self.update.w, self.update.out):
            group, row, col = tensor.stride()
            address = tensor.data_ptr() + self.index * group * tensor.element_size()
            found += [address, row, col]
        return found


@dataclass(frozen=True)
class TileRows:
    """Tiles of rows ``first`` to ``last`` - 1, paired with all columns from ``first`` on."""

    first: int
    last: int

    def slopes(self, group: Group) -> int:
        """Number of slopes of these rows."""
        return TILE**2 * (self.last - self.first) * (group.tiles - self.first)

    def mirrored_slopes(self, group: Group) -> int:
        """Number of slopes in their mirror image below the last row."""
        return TILE**2 * (self.last - self.first) * (group.tiles - self.last)


def add_pair_gradients(updates: Sequence[GradientUpdate], term: PairTerm) -> None:
    """Add the gradients of mean pair energies of layers that the back end takes."""
    buckets: dict[object, list[GradientUpdate]] = {}
    for update in updates:
        key = (update.w.dtype, update.out.dtype, update.w.device)
        buckets.setdefault(key, []).append(update)
    for bucket in buckets.values():
        groups = []
        for update in bucket:
            b, n, d = update.w.shape
            if n > 1 and d > 0:
                groups += [Group(update, i) for i in range(b)]
        first = bucket[0].w
        with torch.no_grad(), exact_arithmetic(first), torch.cuda.device_of(first):
            for batch in _batches(groups):
                _Pass(batch, term).run()


def _batches(groups: list[Group]) -> list[list[Group]]:
    """Split groups into batches that fit the workspace; a group too large for it is one batch."""
    batches: list[list[Group]] = []
    used = 0
    for group in groups:
        if not batches or used + group.workspace > WORKSPACE:
            batches.append([])
            used = 0
        batches[-1].append(group)
        used += group.workspace
    return batches


class _Pass:
    """Four launches for a batch of groups, and two more for each further round of a large group.

    Args:
        groups: Groups of layers of one dtype and device.
        term: The kernel.
    """

    def __init__(self, groups: list[Group], term: PairTerm) -> None:
        self.groups = groups
        self.term = term
        self.device = groups[0].update.w.device
        self.precision = precision()
        entries = 0
        rows = 0
        for group in groups:
            entries += group.entries
            rows += group.rows
        self.x, self.pulls = torch.empty(2, entries, device=self.device)
        self.inverse_norm = torch.empty(rows, device=self.device)
        self.blocks = _row_blocks(tuple(group.rows // ROWS for group in groups), self.device)
        self.alive = torch.empty(len(self.blocks), dtype=torch.int32, device=self.device)

    def run(self) -> None:
        """Launch everything."""
        rounds = self._rounds()
        slopes = torch.empty(self._most_slopes(rounds), device=self.device)
        table = self._table(rounds[0])
        groups = _upload(torch.tensor(table, dtype=torch.int64), self.device)
        pairs.unit_rows[(len(self.blocks),)](
            groups,
            self.blocks,
            self.x,
            self.inverse_norm,
            self.alive,
            TL_DTYPES[self.groups[0].update.w.dtype],
            ROWS,
            COLS,
            num_warps=WARPS,
        )
        live = _download(self.alive)
        self._add_pairs(rounds[0], table, groups, slopes)
        for tile_rows in rounds[1:]:
            table = self._table(tile_rows)
            groups = _upload(torch.tensor(table, dtype=torch.int64), self.device)
            self._add_pairs(tile_rows, table, groups, slopes)
        numbers = _upload(self._numbers(live()), self.device)
        self._add_near_pulls()
        pairs.additions[(len(self.blocks),)](
            groups,
            numbers,
            self.blocks,
            self.x,
            self.inverse_norm,
            self.pulls,
            TL_DTYPES[self.groups[0].update.out.dtype],
            ROWS,
            COLS,
            num_warps=WARPS,
        )

    def _rounds(self) -> list[list[TileRows]]:
        """The rows of each group in each round: all in one round, or a large group's in several."""
        first = self.groups[0]
        if len(self.groups) > 1 or first.workspace <= WORKSPACE:
            return [[TileRows(0, group.tiles) for group in self.groups]]
        room = WORKSPACE - 8 * first.entries
        height = max(STRIP, room // (8 * first.tiles * TILE**2))
        rounds = []
        for start in range(0, first.tiles, height):
            rounds.append([TileRows(start, min(start + height, first.tiles))])
        return rounds

    def _most_slopes(self, rounds: list[list[TileRows]]) -> int:
        """Number of slopes in the largest round."""
        most = 0
        for tile_rows in rounds:
            size = 0
            for group, rows in zip(self.groups, tile_rows, strict=True):
                size += rows.slopes(group) + rows.mirrored_slopes(group)
            most = max(most, size)
        return most

    def _table(self, tile_rows: list[TileRows]) -> list[list[int]]:
        """One row for each group, in the order of the columns in ``pairs``."""
        table = []
        row = 0
        x = 0
        slope = 0
        for group, rows in zip(self.groups, tile_rows, strict=True):
            below = slope + rows.slopes(group)
            shape = [group.n, group.rows, group.d, group.width]
            panel = [rows.first * TILE, rows.last * TILE, slope, below]
            limit_at = 0
            if group.limit is not None:
                limit_at = group.limit.data_ptr()
            table.append([*group.addresses(), *shape, row, x, *panel, limit_at])
            row += group.rows
            x += group.entries
            slope = below + rows.mirrored_slopes(group)
        return table

    def _add_pairs(
        self, tile_rows: list[TileRows], table: list[list[int]], groups: Tensor, slopes: Tensor
    ) -> None:
        """Add the pairs of some rows; near ones are collected for :meth:`_add_near_pulls`."""
        spans = []
        wide_spans = []
        for group, rows in zip(self.groups, tile_rows, strict=True):
            spans.append((group.tiles, rows.first, rows.last))
            wide_spans.append((group.tiles, rows.first, group.width // TILE))
        tiles, host_tiles, counts = _pair_tiles(tuple(spans), self.device)
        near = torch.empty(len(tiles), dtype=torch.int32, device=self.device)
        energies = torch.empty(len(tiles) if self.term.logarithm else 1, device=self.device)
        assert self.term.formula is not None
        sizes = {"TILE": TILE, "DEPTH": DEPTH, "num_warps": WARPS, "num_stages": STAGES}
        pairs.pair_slopes[(len(tiles),)](
            groups,
            tiles,
            self.x,
            self.inverse_norm,
            slopes,
            near,
            energies,
            self.term.formula[1],
            KERNEL=scalar_of(self.term),
            HALF_SPACE=self.term.half_space,
            ENERGY=self.term.logarithm,
            NEAR=NEAR,
            PRECISION=self.precision,
            **sizes,
        )
        near_on_host = _download(near)
        energies_on_host = _download(energies)
        product_tiles = _product_tiles(tuple(wide_spans), self.device)
        pairs.products[(len(product_tiles),)](
            groups,
            product_tiles,
            self.x,
            slopes,
            self.pulls,
            PRECISION=self.precision,
            WIDTH=TILE,
            **sizes,
        )
        if self.term.logarithm:
            parts = torch.split(energies_on_host().double(), counts)
            for group, part in zip(self.groups, parts, strict=True):
                group.energy += float(part.sum())
        near_tiles = host_tiles[near_on_host() != 0]
        for i in near_tiles[:, 0].unique().tolist():
            rows_of_tiles = near_tiles[near_tiles[:, 0] == i, 1] - tile_rows[i].first
            strips = (rows_of_tiles // STRIP).unique().tolist()
            self._collect_near(self.groups[i], table[i], slopes, strips)

    def _collect_near(
        self, group: Group, row: list[int], slopes: Tensor, strips: list[int]
    ) -> None:
        """Redo in float64 the pairs that were held back in some strips of rows.

        Args:
            group: The group.
            row: Its row of the table.
            slopes: The slopes of the round.
            strips: Which strips of STRIP tiles, counted from the first row of the round.
        """
        first = row[pairs.FIRST.value]
        last = row[pairs.LAST.value]
        begin = row[pairs.PANEL_START.value]
        width = group.rows - first
        panel = slopes[begin : begin + (last - first) * width].view(-1, width)
        if group.near is None:
            group.near = NearPairs(group.update.w[group.index].float(), self.term)
        cols = torch.arange(first, group.n, device=self.device)
        end = min(last, group.n) - first
        for strip in strips:
            start = strip * STRIP * TILE
            stop = min(start + STRIP * TILE, end)
            held = panel[start:stop, start : group.n - first] == pairs.HELD.value
            group.near.add_panel(held, cols[start:stop], cols[start:], stop - start, with_grad=True)

    def _add_near_pulls(self) -> None:
        """Add the pulls of near pairs, which are already tangent; the kernels keep them so."""
        start = 0
        bound = torch.finfo(torch.float32).max / 4
        for group in self.groups:
            if group.near is not None:
                rows, near = group.near.gradient()
                pulls = self.pulls[start : start + group.entries].view(-1, group.width)
                pulls[rows, : group.d] += (near / -2.0).clamp_(-bound, bound).float()
            start += group.entries

    def _numbers(self, live: Tensor) -> Tensor:
        """One row for each group, in the order of the columns in ``pairs``.

        Args:
            live: How many neurons of each block of rows take part.
        """
        table = []
        start = 0
        for group in self.groups:
            blocks = group.rows // ROWS
            count = int(live[start : start + blocks].sum())
            factor = self.term.scale(count)
            if self.term.logarithm:
                energy = group.energy
                if group.near is not None:
                    energy += float(group.near.energy)
                mean = (energy + self.term.constant(count)) * factor
                if mean > 0:
                    factor /= mean
            update = group.update
            limit = update.limit
            if limit is None or isinstance(limit, Tensor):
                limit = float("inf")
            bound = torch.finfo(update.w.dtype).max / 2
            table.append([-2.0 * factor, update.scale, limit, update.grad_scale, bound])
            start += blocks
        return torch.tensor(table, dtype=torch.float64)


def _upload(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; from pinned memory, so that the host need not wait for launches."""
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


def _download(part: Tensor) -> Callable[[], Tensor]:
    """Begin a copy to the host; the result waits for it, and for nothing launched later."""
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
def _row_blocks(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Group and index of every block of rows, (blocks, 2), from the number of each group's."""
    parts = [torch.arange(count)[:, None] for count in counts]
    return _numbered(parts).to(device)


@lru_cache(maxsize=64)
def _pair_tiles(
    spans: tuple[tuple[int, int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor, list[int]]:
    """Every tile on or above the diagonal.

    Args:
        spans: For each group its tiles of rows, and the first and the last of the round.
        device: Where to put the table.

    Returns:
        Group, row and column of each tile, (tiles, 3), on the device and on the host; and how many
        tiles each group has.
    """
    parts = []
    for tiles, first, last in spans:
        parts.append(torch.triu_indices(last - first, tiles - first).T + first)
    table = _numbered(parts)
    return table.to(device), table, [len(part) for part in parts]


@lru_cache(maxsize=64)
def _product_tiles(spans: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """Group, row and column of every tile of the pulls that a round adds to, (tiles, 3).

    Args:
        spans: For each group its tiles of rows, the first of the round, and its tiles of columns.
        device: Where to put the table.
    """
    parts = []
    for tiles, first, wide in spans:
        parts.append(torch.cartesian_prod(torch.arange(first, tiles), torch.arange(wide)))
    return _numbered(parts).to(device)


def forget_tables() -> None:
    """Forget the tables of tiles, which are of the sizes above."""
    for tables in (_row_blocks, _pair_tiles, _product_tiles):
        tables.cache_clear()


def _numbered(parts: list[Tensor]) -> Tensor:
    """The tables (k, m) of all groups, stacked, with the group's number before each row."""
    tables = []
    for i, part in enumerate(parts):
        number = torch.full_like(part[:, :1], i)
        tables.append(torch.cat([number, part], dim=1))
    return torch.cat(tables).to(torch.int32)
