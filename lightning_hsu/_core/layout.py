"""Where the layers of a batch lie in flat buffers, so that few operations reach all of them.

A batch holds layers of any shapes. All their neurons are the rows of one flat buffer, sorted by
their dimension, with a spare row before those of each dimension. All panels of all Gram matrices
lie behind one another in a second flat buffer, so that a kernel is evaluated once for all layers.
If that buffer would be too large the panels are divided into *pieces*, which use it in turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lightning_hsu._core.tables import Tables


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
        group_of_row: For each row of each panel, in their order, its group of the batch.
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
        layer_of: For each row, its layer; 0 for spare rows.
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
        tables: All these tensors.
        constants: By kernels, numbers of each group that depend on these.
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
    layer_of: Tensor
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
    tables: Tables | None = None
    constants: dict[object, Tables] = field(default_factory=dict)

    def read_here(self) -> None:
        """Let the current stream read the tensors."""
        if self.tables is not None:
            self.tables.read_here()


Shape = tuple[int, int, int, int]
"""Kernel, groups, neurons of a group, their dimension."""


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
