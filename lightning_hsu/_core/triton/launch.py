"""Pair gradients of many layers through compiled kernels: tables, workspace and launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm, softened_at
from lightning_hsu._core.near import NEAR
from lightning_hsu._core.precision import exact_arithmetic
from lightning_hsu._core.triton import nearby, pairs
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
STRIP = 4  # tiles of rows in a round, or more
NEAR_WARPS = 8
CHUNK = 16  # entries of a row at once in float64
SUMMED = 1024  # numbers added up at once

TL_DTYPES = {dtype: getattr(tl, name) for dtype, name in DTYPES.items()}


@dataclass(eq=False)
class Group:
    """The neurons of one group of a layer, the one at this position among those asked for."""

    update: GradientUpdate
    position: int
    index: int
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


class Coincident(NamedTuple):
    """Which layers had coincident neurons, which do not push each other in the kernels.

    Args:
        flags: Waits for the flags of some tiles of rows.
        positions: The positions of these tiles' layers among those asked for.
    """

    flags: Callable[[], Tensor]
    positions: list[int]

    def found(self) -> set[int]:
        """The positions of layers that had some; waits until the device has come so far."""
        flagged = self.flags().nonzero().flatten().tolist()
        return {self.positions[tile] for tile in flagged}


def add_pair_gradients(updates: Sequence[GradientUpdate], term: PairTerm) -> list[Coincident]:
    """Add the gradients of mean pair energies of layers that the back end takes.

    The host waits for nothing. What is returned must be read later, not in the same step.
    """
    buckets: dict[object, list[int]] = {}
    for position, update in enumerate(updates):
        entries, out = update.entries, update.out_entries
        buckets.setdefault((entries.dtype, out.dtype, entries.device), []).append(position)
    found = []
    for positions in buckets.values():
        groups = []
        for position in positions:
            update = updates[position]
            b, n, d = update.w.shape
            if n > 1 and d > 0:
                groups += [Group(update, position, i) for i in range(b)]
        first = updates[positions[0]].w
        with torch.no_grad(), exact_arithmetic(first), torch.cuda.device_of(first):
            for batch in _batches(groups):
                found.append(_Pass(batch, term).run())
    return found


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


class _Round(NamedTuple):
    """Some rows of each group, and tables of the tiles of their pairs.

    Args:
        rows: The rows of each group.
        tiles: Every tile of pairs on or above the diagonal: group, row, column.
        counts: How many of them each group has.
        product_tiles: Every tile of pulls that the round adds to: group, row, column.
        row_tiles: Every tile of rows that has pairs in the round: group, row.
        row_counts: How many of them each group has.
    """

    rows: list[TileRows]
    tiles: Tensor
    counts: list[int]
    product_tiles: Tensor
    row_tiles: Tensor
    row_counts: list[int]


class _Pass:
    """Six launches for a batch of groups, and three more for each further round of a large group.

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
        marks = 0
        blocks = []
        for group in groups:
            entries += group.entries
            rows += group.rows
            marks += group.tiles**2
            blocks.append(group.rows // ROWS)
        self.x, self.pulls = torch.empty(2, entries, device=self.device)
        self.inverse_norm = torch.empty(rows, device=self.device)
        self.marks = torch.empty(marks, dtype=torch.int32, device=self.device)
        self.blocks = _row_blocks(tuple(blocks), self.device)
        self.alive = torch.empty(len(self.blocks), dtype=torch.int32, device=self.device)
        self.rounds = [self._round(rows) for rows in self._rows_of_rounds()]
        tiles = 0
        row_tiles = 0
        for one in self.rounds:
            tiles += len(one.tiles)
            row_tiles += len(one.row_tiles)
        self.energies = torch.empty(tiles if term.logarithm else 1, device=self.device)
        self.near_energies = torch.empty(row_tiles, dtype=torch.float64, device=self.device)
        self.coincident = torch.empty(row_tiles, dtype=torch.int32, device=self.device)

    def run(self) -> Coincident:
        """Launch everything."""
        slopes = torch.empty(self._most_slopes(), device=self.device)
        numbers = _upload(torch.tensor(self._numbers(), dtype=torch.float64), self.device)
        groups = self._groups(self.rounds[0])
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
        tiles = 0
        row_tiles = 0
        for number, one in enumerate(self.rounds):
            if number > 0:
                groups = self._groups(one)
            self._add_pairs(one, groups, slopes, tiles if self.term.logarithm else 0)
            self._add_near_pairs(one, groups, numbers, slopes, row_tiles)
            tiles += len(one.tiles)
            row_tiles += len(one.row_tiles)
        nearby.factors[(len(self.groups),)](
            groups,
            numbers,
            self.alive,
            self.energies,
            self.near_energies,
            HALF_SPACE=self.term.half_space,
            ENERGY=self.term.logarithm,
            CHUNK=SUMMED,
        )
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
        positions = []
        for one in self.rounds:
            for group, count in zip(self.groups, one.row_counts, strict=True):
                positions += [group.position] * count
        return Coincident(_download(self.coincident), positions)

    def _rows_of_rounds(self) -> list[list[TileRows]]:
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

    def _round(self, rows: list[TileRows]) -> _Round:
        """A round of these rows, with its tables."""
        spans = []
        wide_spans = []
        row_counts = []
        for group, some in zip(self.groups, rows, strict=True):
            spans.append((group.tiles, some.first, some.last))
            wide_spans.append((group.tiles, some.first, group.width // TILE))
            row_counts.append(group.tiles - some.first)
        tiles, counts = _pair_tiles(tuple(spans), self.device)
        product_tiles = _product_tiles(tuple(wide_spans), self.device)
        row_tiles = _row_tiles(tuple(spans), self.device)
        return _Round(rows, tiles, counts, product_tiles, row_tiles, row_counts)

    def _most_slopes(self) -> int:
        """Number of slopes in the largest round."""
        most = 0
        for one in self.rounds:
            size = 0
            for group, rows in zip(self.groups, one.rows, strict=True):
                size += rows.slopes(group) + rows.mirrored_slopes(group)
            most = max(most, size)
        return most

    def _groups(self, one: _Round) -> Tensor:
        """One row for each group, in the order of the columns in ``pairs``."""
        table = []
        row = 0
        x = 0
        slope = 0
        mark = 0
        energy = 0
        near = 0
        for i, (group, rows) in enumerate(zip(self.groups, one.rows, strict=True)):
            below = slope + rows.slopes(group)
            shape = [group.n, group.rows, group.d, group.width]
            panel = [rows.first * TILE, rows.last * TILE, slope, below]
            limit_at = 0
            if group.limit is not None:
                limit_at = group.limit.data_ptr()
            energies = 0
            nears = 0
            for other in self.rounds:
                energies += other.counts[i]
                nears += other.row_counts[i]
            counted = [row // ROWS, group.rows // ROWS, energy, energies, near, nears]
            table.append([*group.addresses(), *shape, row, x, *panel, limit_at, mark, *counted])
            row += group.rows
            x += group.entries
            slope = below + rows.mirrored_slopes(group)
            mark += group.tiles**2
            energy += energies
            near += nears
        return _upload(torch.tensor(table, dtype=torch.int64), self.device)

    def _numbers(self) -> list[list[float]]:
        """One row for each group, in the order of the columns in ``pairs``."""
        assert self.term.formula is not None
        constant = 0.0
        if self.term.half_space:
            constant = softened_at(self.term, 4.0)[0] / 2
        table = []
        for group in self.groups:
            update = group.update
            limit = update.limit
            if limit is None or isinstance(limit, Tensor):
                limit = float("inf")
            bound = torch.finfo(update.entries.dtype).max / 2
            kernel = [self.term.knee**2, self.term.formula[1], constant]
            table.append([0.0, update.scale, limit, update.grad_scale, bound, *kernel])
        return table

    def _add_pairs(self, one: _Round, groups: Tensor, slopes: Tensor, first_energy: int) -> None:
        """Add the pairs of a round; near ones are held back."""
        assert self.term.formula is not None
        sizes = {"TILE": TILE, "DEPTH": DEPTH, "num_warps": WARPS, "num_stages": STAGES}
        pairs.pair_slopes[(len(one.tiles),)](
            groups,
            one.tiles,
            self.x,
            self.inverse_norm,
            slopes,
            self.marks,
            self.energies[first_energy:],
            self.term.formula[1],
            KERNEL=scalar_of(self.term),
            HALF_SPACE=self.term.half_space,
            ENERGY=self.term.logarithm,
            NEAR=NEAR,
            PRECISION=self.precision,
            **sizes,
        )
        pairs.products[(len(one.product_tiles),)](
            groups,
            one.product_tiles,
            self.x,
            slopes,
            self.pulls,
            PRECISION=self.precision,
            WIDTH=TILE,
            **sizes,
        )

    def _add_near_pairs(
        self, one: _Round, groups: Tensor, numbers: Tensor, slopes: Tensor, first: int
    ) -> None:
        """Add the pairs of a round that were held back, from differences in float64."""
        nearby.near_pulls[(len(one.row_tiles),)](
            groups,
            numbers,
            one.row_tiles,
            slopes,
            self.marks,
            self.pulls,
            self.near_energies[first:],
            self.coincident[first:],
            KERNEL=scalar_of(self.term),
            HALF_SPACE=self.term.half_space,
            DTYPE=TL_DTYPES[self.groups[0].update.w.dtype],
            TILE=TILE,
            CHUNK=CHUNK,
            num_warps=NEAR_WARPS,
        )


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
    parts = []
    for count in counts:
        parts.append(torch.arange(count)[:, None])
    return _numbered(parts).to(device)


@lru_cache(maxsize=64)
def _pair_tiles(
    spans: tuple[tuple[int, int, int], ...], device: torch.device
) -> tuple[Tensor, list[int]]:
    """Every tile on or above the diagonal.

    Args:
        spans: For each group its tiles of rows, and the first and the last of the round.
        device: Where to put the table.

    Returns:
        Group, row and column of each tile, (tiles, 3), and how many tiles each group has.
    """
    parts = []
    counts = []
    for tiles, first, last in spans:
        part = torch.triu_indices(last - first, tiles - first).T + first
        parts.append(part)
        counts.append(len(part))
    return _numbered(parts).to(device), counts


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


@lru_cache(maxsize=64)
def _row_tiles(spans: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """Group and row of every tile of rows that has pairs in a round, (tiles, 2).

    Args:
        spans: For each group its tiles of rows, and the first and the last of the round.
        device: Where to put the table.
    """
    parts = []
    for tiles, first, _ in spans:
        parts.append(torch.arange(first, tiles)[:, None])
    return _numbered(parts).to(device)


def forget_tables() -> None:
    """Forget the tables of tiles, which are of the sizes above."""
    for tables in (_row_blocks, _pair_tiles, _product_tiles, _row_tiles):
        tables.cache_clear()


def _numbered(parts: list[Tensor]) -> Tensor:
    """The tables (k, m) of all groups, stacked, with the group's number before each row."""
    tables = []
    for i, part in enumerate(parts):
        number = torch.full_like(part[:, :1], i)
        tables.append(torch.cat([number, part], dim=1))
    return torch.cat(tables).to(torch.int32)
