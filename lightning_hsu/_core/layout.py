"""Where the layers of a batch lie in flat buffers, so that few operations reach all of them.

A batch holds layers of any shapes. All their neurons are the rows of one flat buffer, sorted by
their dimension, with a spare row before those of each dimension. All panels of all Gram matrices
lie behind one another in a second flat buffer, so that a kernel is evaluated once for all layers.
If that buffer would be too large the panels are divided into *pieces*, which use it in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

_CAPACITY = 2**21
"""Entries of the rows of all near pairs of a piece."""


class Block(NamedTuple):
    """Layers of one shape and one kernel.

    Args:
        kind: Which kernel.
        groups: The groups of all its layers.
        n: Neurons of a group.
        d: Their dimension.
        row: Its first row in the batch.
        entry: Its first entry in the flat neurons.
    """

    kind: int
    groups: int
    n: int
    d: int
    row: int
    entry: int

    @property
    def size(self) -> int:
        """How many entries its neurons have."""
        return self.groups * self.n * self.d


class Panel(NamedTuple):
    """Some rows of the Gram matrices of some groups of a block, with themselves and later rows.

    Args:
        block: The block.
        first: The first group.
        last: The group after the last.
        start: The first row.
        stop: The row after the last.
        at: Its first entry among the panels of its piece.
    """

    block: Block
    first: int
    last: int
    start: int
    stop: int
    at: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, rows and columns."""
        return self.last - self.first, self.stop - self.start, self.block.n - self.start

    @property
    def size(self) -> int:
        """How many entries it has."""
        groups, height, width = self.shape
        return groups * height * width


class Width(NamedTuple):
    """The rows of one dimension.

    Args:
        d: The dimension.
        row: The first of them; the spare row is before it.
        rows: How many there are.
        entry: Their first entry in the flat neurons.
    """

    d: int
    row: int
    rows: int
    entry: int


class Span(NamedTuple):
    """Where one layer is.

    Args:
        row: Its first row.
        rows: How many it has.
        entry: Its first entry in the flat neurons.
    """

    row: int
    rows: int
    entry: int


class Stretch(NamedTuple):
    """The entries of one kernel among the panels of a piece: ``stop`` is excluded."""

    kind: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Piece:
    """Panels that are computed together.

    Args:
        panels: The panels, sorted by kernel.
        stretches: The entries of each kernel.
        size: Entries of all panels; one spare entry follows them.
        own: Places where rows meet themselves, places between panels, and the spare entry.
        own_of: For each kernel, the places where rows meet themselves, counted from the first entry
            of its stretch.
        starts: The first entry of each group of each panel, and the spare entry.
        marks: For each of them (k + 1, 5), after a row that is not used: what to add to a place over
            the number of columns for its row in the batch, and to the rest for its column's row;
            the number of columns, the kernel, and the group of the batch.
        group_of: The group of the batch of each group of each panel.
        group_of_row: The same for each row of each panel, in the order of the panels.
        groups_at: The first entries of the groups of the panels, on the host, each with the group of
            the batch.
    """

    panels: list[Panel]
    stretches: list[Stretch]
    size: int
    own: Tensor
    own_of: list[Tensor]
    starts: Tensor
    marks: Tensor
    group_of: Tensor
    group_of_row: Tensor
    groups_at: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where everything lies.

    Args:
        spans: The layers.
        blocks: The layers, by shape and kernel.
        widths: The rows, by dimension.
        pieces: The panels.
        rows: Rows in all, the spare ones included.
        entries: Entries of all rows.
        capacity: How many near pairs a piece can hold.
        groups: Groups in all.
        columns: 0 to the largest dimension - 1.
        reach: For each row (rows, 2): its first entry and its dimension.
        places: For each dimension (widths, rows): the row's number among those of this dimension,
            counted from the spare one, which stands for all rows of other dimensions.
        bounds: For each row (2, rows): the last row of its group, and the row before its first.
        group_of: For each row, its group; the number of groups for spare rows.
        block_of: For each row, its block; 0 for spare rows.
        scales: For each block, the factor from the sum over pairs to the mean, by the number of
            neurons of a group that take no part.
        without: For each block, how many pairs of a group are without effect, by the same number.
        firsts: The first row of each group.
        group_blocks: For each group, its block.
        sizes: How many neurons each group has, in float64.
        kinds: The kernel of each group.
        weights: Of the columns of a panel in the sum over pairs: a half as often as the longest
            panel has rows, then ones; a panel takes what begins with as many as it has rows.
        signs: The matrix that makes difference and sum of two.
        signs_back: The one that makes of pulls along both what the two lose by them.
        apart: For each kernel the matrix (3, 4) that makes, of slopes in both squared chords and of
            values at both, the pull along the difference and that along the sum, of which either is
            the whole, and the energy.
    """

    spans: list[Span]
    blocks: list[Block]
    widths: list[Width]
    pieces: list[Piece]
    rows: int
    entries: int
    capacity: int
    groups: int
    columns: Tensor
    reach: Tensor
    places: Tensor
    bounds: Tensor
    group_of: Tensor
    block_of: Tensor
    scales: Tensor
    without: Tensor
    firsts: Tensor
    group_blocks: Tensor
    sizes: Tensor
    kinds: Tensor
    weights: Tensor
    signs: Tensor
    signs_back: Tensor
    apart: list[Tensor]


Shape = tuple[int, int, int, int]
"""Kernel, groups, neurons of a group, their dimension."""


@lru_cache(maxsize=64)
def layout_of(
    shapes: tuple[Shape, ...], halves: tuple[bool, ...], gram: int, device: torch.device
) -> Layout:
    """Lay out layers, of which those of one dimension follow each other, as do those of one shape.

    Args:
        shapes: The layers.
        halves: For each kernel, whether it is of half space.
        gram: Entries of panels that are computed together.
        device: Where the tables go. They are copied once; then a step waits for nothing.
    """
    blocks, widths = _blocks(shapes)
    last = widths[-1]
    rows = last.row + last.rows
    entries = last.entry + last.rows * last.d
    longest = max(width.d for width in widths)
    capacity = min(max(_CAPACITY // longest, 128), 4096)
    reach = torch.zeros(rows, 2, dtype=torch.int64)
    places = torch.zeros(len(widths), rows, dtype=torch.int64)
    for width, place in zip(widths, places, strict=True):
        own = slice(width.row - 1, width.row + width.rows)
        number = torch.arange(width.rows + 1)
        reach[own, 0] = width.entry + (number - 1) * width.d
        reach[own, 1] = width.d
        place[own] = number
    groups = sum(block.groups for block in blocks)
    bounds = torch.zeros(2, rows, dtype=torch.int64)
    group_of = torch.full((rows,), groups, dtype=torch.int64)
    block_of = torch.zeros(rows, dtype=torch.int64)
    firsts = []
    sizes = []
    kinds = []
    group = 0
    for i, block in enumerate(blocks):
        own = slice(block.row, block.row + block.groups * block.n)
        number = torch.arange(block.groups).repeat_interleave(block.n)
        bounds[0, own] = block.row + (number + 1) * block.n - 1
        bounds[1, own] = block.row + number * block.n - 1
        group_of[own] = group + number
        block_of[own] = i
        firsts.append(block.row + torch.arange(block.groups) * block.n)
        sizes.append(torch.full((block.groups,), float(block.n)).double())
        kinds.append(torch.full((block.groups,), block.kind))
        group += block.groups
    most = max(block.n for block in blocks)
    first = torch.cat(firsts)
    apart = []
    for half in map(float, halves):
        pulls = [1.0, -half, 0.0, 0.0], [-1.0, half, 0.0, 0.0]
        matrix = torch.tensor([*pulls, [0.0, 0.0, 1.0, half]], dtype=torch.float64)
        apart.append(matrix.to(device, non_blocking=True))
    return Layout(
        _spans(shapes),
        blocks,
        widths,
        [_piece(panels, blocks, device) for panels in _pieces(blocks, gram)],
        rows,
        entries,
        capacity,
        groups,
        torch.arange(longest).to(device, non_blocking=True),
        reach.to(device, non_blocking=True),
        places.to(device, non_blocking=True),
        bounds.to(device, non_blocking=True),
        group_of.to(device, non_blocking=True),
        block_of.to(device, non_blocking=True),
        _scales(blocks, halves, most).to(device, non_blocking=True),
        _without(blocks, most).to(device, non_blocking=True),
        first.to(device, non_blocking=True),
        block_of[first].to(device, non_blocking=True),
        torch.cat(sizes).to(device, non_blocking=True),
        torch.cat(kinds).to(device, non_blocking=True),
        torch.cat([torch.full((most,), 0.5), torch.ones(most)]).to(device, non_blocking=True),
        torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64).to(device, non_blocking=True),
        torch.tensor([[-1.0, -1.0], [1.0, -1.0]], dtype=torch.float64).to(
            device, non_blocking=True
        ),
        apart,
    )


def _scales(blocks: Sequence[Block], halves: Sequence[bool], most: int) -> Tensor:
    """The factors of means over pairs (blocks, most + 1), by how many rows take no part."""
    scales = torch.zeros(len(blocks), most + 1, dtype=torch.float64)
    for block, scale in zip(blocks, scales, strict=True):
        live = torch.arange(block.n, 1, -1, dtype=torch.float64)  # n to 2
        others = 2.0 * live - 1.0 if halves[block.kind] else live - 1.0
        scale[: block.n - 1] = 2.0 / (live * others)
    return scales


def _without(blocks: Sequence[Block], most: int) -> Tensor:
    """How many pairs are without effect (blocks, most + 1), by how many rows take no part."""
    n = torch.tensor([[float(block.n)] for block in blocks], dtype=torch.float64)
    live = n - torch.arange(most + 1)
    return 0.5 * (n * (n - 1.0) - live * (live - 1.0))


def _blocks(shapes: Sequence[Shape]) -> tuple[list[Block], list[Width]]:
    """The blocks, and the rows of each dimension."""
    blocks = []
    widths = []
    row = entry = 0
    for d, of_one_width in groupby(shapes, key=lambda shape: shape[3]):
        row += 1
        entry += d  # the spare row
        first = row, entry
        for (kind, _, n, _), alike in groupby(of_one_width, key=lambda one: (one[0], 0, *one[2:])):
            block = Block(kind, sum(shape[1] for shape in alike), n, d, row, entry)
            blocks.append(block)
            row += block.groups * n
            entry += block.size
        widths.append(Width(d, first[0], row - first[0], first[1]))
    return blocks, widths


def _spans(shapes: Sequence[Shape]) -> list[Span]:
    """Where each layer is."""
    spans = []
    row = entry = 0
    width = 0
    for _, groups, n, d in shapes:
        if d != width:  # the spare row
            width = d
            row += 1
            entry += d
        spans.append(Span(row, groups * n, entry))
        row += groups * n
        entry += groups * n * d
    return spans


def triangle(n: int) -> int:
    """Entries of the panels of the Gram matrix of n neurons, or a few more."""
    count = panels_of(n)
    return n * (n * (count + 1) // (2 * count) + 8)


def panels_of(n: int) -> int:
    """How many panels the Gram matrix of n neurons is formed in.

    k of them take (3 + 1 / k) n n d FLOP and 3 k - 1 operations.
    """
    if n <= 256:
        return 1
    return 2 if n <= 1024 else 4


def _pieces(blocks: Sequence[Block], gram: int) -> list[list[Panel]]:
    """Divide all panels into pieces of about ``gram`` entries or fewer, sorted by kernel in each."""
    panels = []
    for block in blocks:
        count = max(panels_of(block.n), -(-block.n * block.n // gram))
        height = -(-block.n // count)
        height = min(block.n, -(-height // 8) * 8)  # products like rows that begin at even places
        some = max(1, gram // (height * block.n))
        for first in range(0, block.groups, some):
            last = min(first + some, block.groups)
            for start in range(0, block.n, height):
                panels.append(Panel(block, first, last, start, min(start + height, block.n), 0))
    pieces: list[list[Panel]] = []
    size = gram
    for panel in panels:
        if size + panel.size > gram:
            pieces.append([])
            size = 0
        pieces[-1].append(panel)
        size += panel.size
    return pieces


def _piece(unplaced: Sequence[Panel], blocks: Sequence[Block], device: torch.device) -> Piece:
    """Place panels behind each other, by kernel."""
    first_group = {}
    group = 0
    for block in blocks:
        first_group[block] = group
        group += block.groups
    panels = []
    stretches = []
    starts = []
    marks = [torch.zeros(1, 5, dtype=torch.int64)]
    groups_at = []
    at = 0
    by_kind = sorted(unplaced, key=lambda panel: panel.block.kind)
    group_of = []
    group_of_row = []
    own_of = []
    fillers = []
    for kind, alike in groupby(by_kind, key=lambda panel: panel.block.kind):
        begin = at
        own = []
        for moved in alike:
            columns = moved.shape[2]
            gap = -at % columns  # a panel begins where whole rows of it would
            fillers.append(torch.arange(at, at + gap))
            at += gap
            panel = moved._replace(at=at)
            block = panel.block
            groups, height, width = panel.shape
            number = torch.arange(groups)
            at_groups = at + number * (height * width)
            diagonal = torch.arange(height) * (width + 1)
            own.append((at_groups[:, None] + diagonal).flatten())
            starts.append(at_groups)
            row = block.row + (panel.first + number) * block.n + panel.start
            number_of_row = at_groups // width
            others = torch.tensor([width, kind]).expand(groups, 2)
            offsets = torch.stack([row - number_of_row, row], 1)
            group_at = first_group[block] + panel.first + number
            marks.append(torch.cat([offsets, others, group_at[:, None]], 1))
            for i in range(groups):
                groups_at.append((at + i * height * width, first_group[block] + panel.first + i))
            group_of.append(group_at)
            group_of_row.append(group_at.repeat_interleave(height))
            panels.append(panel)
            at += panel.size
        own_of.append(torch.cat(own))
        stretches.append(Stretch(kind, begin, at))
    spare = torch.tensor([at])
    owners = zip(own_of, stretches, strict=True)
    return Piece(
        panels,
        stretches,
        at,
        torch.cat([*own_of, *fillers, spare]).to(device, non_blocking=True),
        [(own - one.start).to(device, non_blocking=True) for own, one in owners],
        torch.cat([*starts, spare]).to(device, non_blocking=True),
        torch.cat([*marks, torch.tensor([[-at, 0, 1, 0, group]])]).to(device, non_blocking=True),
        torch.cat(group_of).to(device, non_blocking=True),
        torch.cat(group_of_row).to(device, non_blocking=True),
        groups_at,
    )
