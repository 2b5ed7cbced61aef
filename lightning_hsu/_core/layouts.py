"""Layouts of batches: they are made on the host, copied to the device at once, and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_hsu._core.layout import (
    Block,
    Layout,
    Panel,
    Piece,
    Shape,
    Span,
    Stretch,
    Width,
    panels_of,
)
from lightning_hsu._core.tables import Tables

_CAPACITY = 2**21
"""Entries of the rows of all near pairs of a piece."""

_BYTES = 2**26
"""Memory of the layouts that are kept for another use."""

_FEW, _MANY = 32, 512
"""So many of them are kept whatever their memory is, and no more than so many: a model in batches
uses all of its layouts in turn."""


class _Layouts:
    """The layouts that were used last.

    With a tolerance other layers are due at each step: there are many layouts, most of them small.
    """

    def __init__(self) -> None:
        self._known: dict[object, Layout] = {}  # the least recently used comes first
        self._bytes = 0

    def cache_clear(self) -> None:
        """Forget them."""
        self._known.clear()
        self._bytes = 0

    def __call__(
        self, shapes: tuple[Shape, ...], halves: tuple[bool, ...], gram: int, device: torch.device
    ) -> Layout:
        """Lay out layers, of which those of one dimension follow each other, as do those of one shape.

        Args:
            shapes: The layers.
            halves: For each kernel, whether it is of half space.
            gram: Entries of panels that are computed together.
            device: Where the tables go, in one copy for which nobody waits.
        """
        key = shapes, halves, gram, device
        found = self._known.pop(key, None)
        if found is None:
            found = _on_device(_laid_out(shapes, halves, gram), device)
            self._bytes += _bytes_of(found)
        self._known[key] = found
        while len(self._known) > _FEW and (self._bytes > _BYTES or len(self._known) > _MANY):
            self._bytes -= _bytes_of(self._known.pop(next(iter(self._known))))
        return found


layout_of = _Layouts()


def _bytes_of(layout: Layout) -> int:
    return 0 if layout.tables is None else layout.tables.nbytes


def _on_device(layout: Layout, device: torch.device) -> Layout:
    """The same layout with its tables on a device."""
    tensors: list[Tensor] = []

    def noted(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _with_tensors(layout, noted)
    tables = Tables(tensors, device)
    moved = iter(tables.tensors)
    found: Layout = _with_tensors(layout, lambda _: next(moved))
    return replace(found, tables=tables)


def _with_tensors(one: Any, act: Callable[[Tensor], Tensor]) -> Any:
    """The same layout or piece with other tensors, which are asked for in a fixed order."""
    if isinstance(one, Tensor):
        return act(one)
    if isinstance(one, list) and isinstance(one[0], Tensor | Piece):
        return [_with_tensors(member, act) for member in one]
    if not isinstance(one, Layout | Piece):
        return one
    changed = {}
    for name, value in vars(one).items():
        changed[name] = _with_tensors(value, act)
    return replace(one, **changed)


def _laid_out(shapes: Sequence[Shape], halves: Sequence[bool], gram: int) -> Layout:
    """Lay out layers, with the tables on the host.

    Tables are made in few calls for all groups: with a tolerance a layout may be new at each step.
    """
    blocks, widths = _blocks(shapes)
    rows = widths[-1].row + widths[-1].rows
    entries = widths[-1].entry + widths[-1].rows * widths[-1].d
    longest = max(width.d for width in widths)
    most = max(block.n for block in blocks)
    of_groups = _of_groups(blocks)
    groups = of_groups.shape[1]
    first, size, kind, block_of_group = of_groups
    spans = _spans(shapes)
    by_row = _by_row(blocks, widths, of_groups)
    number = torch.arange(rows)
    bounds = by_row[:2]
    reach = torch.stack([by_row[4] + number * by_row[5], by_row[5]], 1)
    return Layout(
        spans=spans,
        blocks=blocks,
        widths=widths,
        pieces=[_piece(panels, blocks) for panels in _pieces(blocks, gram)],
        rows=rows,
        entries=entries,
        capacity=min(max(_CAPACITY // longest, 128), 4096),
        groups=groups,
        columns=torch.arange(longest),
        reach=reach,
        places=_places(widths, rows),
        bounds=bounds,
        group_of=by_row[2],
        block_of=by_row[3],
        layer_of=_layer_of(spans, rows),
        scales=_scales(blocks, halves, most),
        without=_without(blocks, most),
        firsts=first,
        group_blocks=block_of_group,
        sizes=size.double(),
        kinds=kind,
        weights=torch.cat([torch.full((most,), 0.5), torch.ones(most)]),
        signs=torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64),
        signs_back=torch.tensor([[-1.0, -1.0], [1.0, -1.0]], dtype=torch.float64),
        apart=_apart(halves),
    )


def _apart(halves: Sequence[bool]) -> list[Tensor]:
    """For each kernel the matrix that makes pulls of slopes, and energies of values (3, 4)."""
    tables = []
    for half in map(float, halves):
        pulls = [1.0, -half, 0.0, 0.0], [-1.0, half, 0.0, 0.0]
        tables.append(torch.tensor([*pulls, [0.0, 0.0, 1.0, half]], dtype=torch.float64))
    return tables


def _of_groups(blocks: Sequence[Block]) -> Tensor:
    """For each group (4, groups) its first row, its size, its kernel and its block."""
    numbers = []
    for place, block in enumerate(blocks):
        for group in range(block.groups):
            numbers.append((block.row + group * block.n, block.n, block.kind, place))
    return torch.tensor(numbers).T.contiguous()


def _by_row(blocks: Sequence[Block], widths: Sequence[Width], of_groups: Tensor) -> Tensor:
    """For each row (6, rows), spare ones included, numbers of its group.

    They are the last row of the group and the row before its first, its number and its block, then
    where row 0 would begin if all rows had its dimension, and this dimension.
    """
    groups = of_groups.shape[1]
    numbers = []
    sizes = []
    group = 0
    of_width = iter(blocks)
    for width in widths:
        begin = width.entry - width.row * width.d
        numbers.append((0, 0, groups, 0, begin, width.d))
        sizes.append(1)
        row = width.row
        while row < width.row + width.rows:
            block = next(of_width)
            place = blocks.index(block)
            for _ in range(block.groups):
                last = row + block.n - 1
                numbers.append((last, row - 1, group, place, begin, width.d))
                sizes.append(block.n)
                row += block.n
                group += 1
    by_group = torch.tensor(numbers).T.contiguous()
    return _repeated(by_group, sizes)


def _layer_of(spans: Sequence[Span], rows: int) -> Tensor:
    """For each row (rows,) its layer; 0 for spare rows."""
    layers = torch.zeros(rows, dtype=torch.int64)
    for place, span in enumerate(spans):
        layers[span.row : span.row + span.rows] = place
    return layers


def _places(widths: Sequence[Width], rows: int) -> Tensor:
    """For each dimension (widths, rows) the rows' numbers among those of this dimension."""
    places = torch.zeros(len(widths), rows, dtype=torch.int64)
    for width, place in zip(widths, places, strict=True):
        torch.arange(width.rows + 1, out=place.narrow(0, width.row - 1, width.rows + 1))
    return places


def _scales(blocks: Sequence[Block], halves: Sequence[bool], most: int) -> Tensor:
    """The factors of means over pairs (blocks, most + 1), by how many rows take no part."""
    live = _live(blocks, most)
    others = torch.tensor([[2.0 if halves[block.kind] else 1.0] for block in blocks]).double()
    others = others * live - 1.0
    return torch.where(live >= 2, 2.0 / (live * others), 0.0)


def _without(blocks: Sequence[Block], most: int) -> Tensor:
    """How many pairs are without effect (blocks, most + 1), by how many rows take no part."""
    live = _live(blocks, most)
    n = live[:, :1]
    return 0.5 * (n * (n - 1.0) - live * (live - 1.0))


def _live(blocks: Sequence[Block], most: int) -> Tensor:
    """How many rows of a group of each block take part (blocks, most + 1), alike."""
    n = torch.tensor([[block.n] for block in blocks], dtype=torch.float64)
    return n - torch.arange(most + 1)


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


def _piece(unplaced: Sequence[Panel], blocks: Sequence[Block]) -> Piece:
    """Place panels behind each other, with the tables that tell where their rows are."""
    first_group = {}
    group = 0
    for block in blocks:
        first_group[block] = group
        group += block.groups
    panels, stretches, fillers = _placed(unplaced)
    size = stretches[-1].stop
    groups_at = []
    heights = []
    marks = [(0, 0, 0, 0, 0)]
    rows_of_kind = {stretch.kind: 0 for stretch in stretches}
    for panel in panels:
        block = panel.block
        groups, height, width = panel.shape
        rows_of_kind[block.kind] += groups * height
        for number in range(groups):
            place = panel.at + number * height * width
            row = block.row + (panel.first + number) * block.n + panel.start
            own = first_group[block] + panel.first + number
            groups_at.append((place, own))
            heights.append(height)
            marks.append((row - place // width, row, width, block.kind, own))
    marks.append((-size, 0, 1, 0, group))
    table = torch.tensor(marks)
    start, group_of = torch.tensor(groups_at).unbind(1)
    group_of_row = _repeated(group_of[None], heights)[0]
    own_places = _diagonals(start, heights, table[1:-1, 2])
    own_of = []
    by_kind = torch.split(own_places, list(rows_of_kind.values()))
    for places, stretch in zip(by_kind, stretches, strict=True):
        own_of.append(places - stretch.start)
    return Piece(
        panels=panels,
        stretches=stretches,
        size=size,
        own=torch.cat([own_places, torch.tensor([*fillers, size])]),
        own_of=own_of,
        starts=torch.cat([start, torch.tensor([size])]),
        marks=table,
        group_of_row=group_of_row,
        groups_at=groups_at,
    )


def _placed(unplaced: Sequence[Panel]) -> tuple[list[Panel], list[Stretch], list[int]]:
    """Panels behind each other, by kernel, the stretch of each kernel, and places left between."""
    panels = []
    stretches = []
    fillers: list[int] = []
    at = 0
    by_kind = sorted(unplaced, key=lambda panel: panel.block.kind)
    for kind, alike in groupby(by_kind, key=lambda panel: panel.block.kind):
        begin = at
        for panel in alike:
            gap = -at % panel.shape[2]  # a panel begins where whole rows of it would
            fillers += range(at, at + gap)
            at += gap
            panels.append(panel._replace(at=at))
            at += panel.size
        stretches.append(Stretch(kind, begin, at))
    return panels, stretches, fillers


def _diagonals(start: Tensor, heights: Sequence[int], width: Tensor) -> Tensor:
    """The places of diagonals of matrices that begin at ``start``, with so many rows and columns."""
    height = torch.tensor(heights)
    before = height.cumsum(0) - height
    first = start - before * (width + 1)  # where row 0 of all would be
    by_row = _repeated(torch.stack([first, width + 1]), heights)
    return by_row[0] + torch.arange(by_row.shape[1]) * by_row[1]


def _repeated(table: Tensor, counts: Sequence[int]) -> Tensor:
    """A table (k, m) with each of its columns so many times in a row."""
    return table.repeat_interleave(torch.tensor(counts), dim=1, output_size=sum(counts))
