"""The sums over the pairs of a batch: pulls, energies, and what a logging step needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.batches import Batch
from lightning_hsu._core.fused import NO_PAIR, Fused
from lightning_hsu._core.group_numbers import NEAREST_COSINE, GatheredNumbers
from lightning_hsu._core.kernel import Part, folded_slopes, folded_values
from lightning_hsu._core.layout import Panel, Piece
from lightning_hsu._core.near import NEAR
from lightning_hsu._core.repair import ListedPairs, add_pushes, listed_pairs, pulls_of


class UnitRows(NamedTuple):
    """The neurons of a batch as unit rows.

    Args:
        w: The neurons as one flat tensor, followed by as many entries as the longest has.
        x: The unit rows alike; 0 for rows that take no part.
        norm: Norms of the neurons, (rows,) in float64; infinite for those that take no part.
        counts: For each row, how many of its group take no part, and how many are finite,
            (2, rows), or (1, rows) without the latter.
    """

    w: Tensor
    x: Tensor
    norm: Tensor
    counts: Tensor


class PairSums:
    """The sums over the pairs of a batch, gathered piece by piece.

    Args:
        batch: The layers.
        rows: Their unit rows.
        grad: Where to write sums of slopes times unit rows, as one flat tensor; None for nowhere.
        numbers: Where to note what a logging step needs; None for nowhere.
        fused: Evaluates the kernels in one compiled pass; None to call torch step by step.
        with_energy: Whether energies are wanted of all groups.

    Attributes:
        energy: Sums of energies (groups + 1,) in float64, one of them spare; None if nothing needs
            them.
        pairs: The near pairs of each piece: their places, and squared chords.
        takes_logarithms: Whether the logarithm of any of the means is minimised.
    """

    def __init__(
        self,
        batch: Batch,
        rows: UnitRows,
        grad: Tensor | None,
        numbers: GatheredNumbers | None,
        fused: Fused | None,
        *,
        with_energy: bool,
    ) -> None:
        self._fused = fused
        self._terms = batch.terms
        self._layout = batch.layout
        self._rows = rows
        self._grad = grad
        self._numbers = numbers
        self.takes_logarithms = any(term.logarithm for term in batch.terms)
        self.energy: Tensor | None = None
        if numbers is not None:
            self.energy = numbers.energy
        elif with_energy or self.takes_logarithms:
            self.energy = rows.norm.new_zeros(batch.layout.groups + 1)
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, piece: Piece) -> None:
        """Add the pairs of a piece."""
        if self._fused is None:
            slope, pairs = self._evaluate(piece)
        else:
            slope, pairs = self._evaluate_fused(self._fused, piece)
        if self._grad is not None and slope is not None:
            for panel in piece.panels:
                self._add_panel(self._grad, panel, _entries(slope, panel))
        self.pairs.append((pairs.at, pairs.squares))
        with_energy = self.energy is not None
        pulls, energies = pulls_of(pairs, self._terms, self._layout, with_energy=with_energy)
        if self.energy is not None and energies is not None:
            if self._fused is not None:
                energies = energies - self._fused.counted(pairs)
            self.energy.index_put_((pairs.groups,), energies, accumulate=True)
        if self._grad is not None:
            add_pushes(self._grad, pairs, pulls, self._layout)

    def _listed(self, near: Tensor, piece: Piece) -> ListedPairs:
        """The near pairs of a piece, from a mask of them."""
        return listed_pairs(near, self._rows.w, self._rows.norm, self._layout, piece)

    def _cosines(self, piece: Piece, no_pair: float, lead: int = 0) -> Tensor:
        """Cosines of the pairs of a piece (size + 1,), and what stands where there is no pair."""
        size = piece.size + 1
        cosine = self._rows.x.new_empty(lead + size).narrow(0, lead, size)
        for panel in piece.panels:
            rows, cols = _unit_rows(self._rows.x, panel)
            _multiply(_entries(cosine, panel), rows, cols.mT)
        return cosine.index_fill_(0, piece.own, no_pair)

    def _evaluate(self, piece: Piece) -> tuple[Tensor | None, ListedPairs]:
        """Slopes of a piece (size + 1,), 0 for near pairs, and these; numbers are noted by the way.

        Without a gradient there are no slopes.
        """
        cosine = self._cosines(piece, 0.0)
        clamped = cosine.clamp(-NEAREST_COSINE, NEAREST_COSINE)
        pairs = self._listed(cosine != clamped, piece)
        del cosine
        if self._numbers is not None:
            self._see_cosines(self._numbers, clamped, piece)
            self._see_near_pairs(self._numbers, pairs)
        q = torch.rsub(clamped, 2.0, alpha=2.0)
        del clamped
        if self._grad is None:
            self._add_energies(self._energies_at(q, piece), pairs, piece)
            return None, pairs
        return self._slopes(q, pairs, piece), pairs

    def _evaluate_fused(self, fused: Fused, piece: Piece) -> tuple[Tensor, ListedPairs]:
        """The same in one pass over the cosines."""
        cosine = self._cosines(piece, NO_PAIR, fused.lead)
        found = fused.evaluate(cosine, piece)
        del cosine
        pairs = self._listed(found.near, piece)
        if self.energy is not None and found.energy is not None:
            by_row = found.energy.double()
            self.energy.index_put_((piece.group_of_row,), by_row, accumulate=True)
        if self._numbers is not None and found.far is not None:
            self._numbers.far[len(self.pairs)].copy_(found.far)
            self._see_near_pairs(self._numbers, pairs)
        return found.slope.index_fill_(0, pairs.at, 0.0), pairs

    def _slopes(self, q: Tensor, pairs: ListedPairs, piece: Piece) -> Tensor:
        """Slopes at squared chords (size + 1,), 0 for near pairs; energies are added by the way."""
        parts = [(self._terms[kind], start, stop) for kind, start, stop in piece.stretches]
        one = parts[0][0]
        energies = None
        if any(not term.has_kernel_of(one) for term, _, _ in parts):
            energies, slope = self._slopes_apart(q, parts)
        elif self.energy is None:
            slope = one.folded_slope(q, NEAR) if len(parts) == 1 else folded_slopes(parts, q, NEAR)
        elif len(parts) == 1:
            energies, slope = one.folded(q, NEAR)
        else:
            energies, slope = folded_values(parts, q, NEAR)
        if energies is not None:
            self._add_energies(energies, pairs, piece)
        return slope.index_fill_(0, pairs.at, 0.0)

    def _slopes_apart(self, q: Tensor, parts: Sequence[Part]) -> tuple[Tensor | None, Tensor]:
        """Energies, if anything needs them, and slopes of different kernels at squared chords."""
        slope = torch.empty_like(q)
        energies = None if self.energy is None else torch.empty_like(q)
        for term, start, stop in parts:
            some = slice(start, stop)
            if energies is None:
                term.folded_slope(q[some], NEAR, slope[some])
            else:
                term.folded(q[some], NEAR, (energies[some], slope[some]))
        return energies, slope

    def _energies_at(self, q: Tensor, piece: Piece) -> Tensor:
        """Energies alone at squared chords (size + 1,)."""
        if len(piece.stretches) == 1:
            return self._terms[piece.stretches[0].kind].folded_value(q, NEAR)
        energies = torch.empty_like(q)
        for kind, start, stop in piece.stretches:
            some = slice(start, stop)
            self._terms[kind].folded_value(q[some], NEAR, energies[some])
        return energies

    def _add_energies(self, energies: Tensor, pairs: ListedPairs, piece: Piece) -> None:
        """Add the energies (size + 1,) of a piece, which holds those beside a diagonal twice."""
        assert self.energy is not None
        energies.index_fill_(0, pairs.at, 0.0).index_fill_(0, piece.own, 0.0)
        most = len(self._layout.weights) // 2
        weights = self._layout.weights.to(energies.dtype)
        by_row = energies.new_empty(len(piece.group_of_row))
        row = 0
        for panel in piece.panels:
            groups, height, columns = panel.shape
            own = energies.narrow(0, panel.at, panel.size).view(groups * height, columns)
            weight = weights.narrow(0, most - height, columns)[:, None]
            torch.mm(own, weight, out=by_row.narrow(0, row, groups * height)[:, None])
            row += groups * height
        self.energy.index_put_((piece.group_of_row,), by_row.double(), accumulate=True)

    def _see_cosines(self, numbers: GatheredNumbers, cosine: Tensor, piece: Piece) -> None:
        """Note the largest cosines of the pairs of a piece that are not near."""
        of_kind = {}
        for (kind, start, stop), own in zip(piece.stretches, piece.own_of, strict=True):
            of_kind[kind] = 0, cosine
            if not self._terms[kind].half_space:
                raised = cosine[start:stop] + 1.0  # the largest of what is not negative is a norm
                of_kind[kind] = start, raised.index_fill_(0, own, 0.0)
        entries: list[Tensor] = []
        for panel in piece.panels:
            start, flat = of_kind[panel.block.kind]
            own = flat.narrow(0, panel.at - start, panel.size)
            entries += own.view(panel.shape[0], -1).unbind()
        number = len(self.pairs)  # pieces that are done
        numbers.far[number].copy_(torch.stack(torch._foreach_norm(entries, torch.inf)))

    def _see_near_pairs(self, numbers: GatheredNumbers, pairs: ListedPairs) -> None:
        """Note the largest cosines of near pairs of a piece, from float64."""
        nearest = pairs.squares[0]
        for kind, mask in pairs.kinds:
            if self._terms[kind].half_space:
                either = pairs.squares.amin(0)
                nearest = either if mask is None else torch.where(mask, either, nearest)
            elif mask is not None:
                nearest = torch.where(mask, pairs.squares[0], nearest)
        near = torch.rsub(nearest, 1.0, alpha=0.5)
        numbers.near[len(self.pairs)].scatter_reduce_(0, pairs.groups, near, "amax")

    def _add_panel(self, grad: Tensor, panel: Panel, slope: Tensor) -> None:
        """Add the slopes (b, k, m) of a panel times the unit rows."""
        rows, cols = _unit_rows(self._rows.x, panel)
        height = panel.stop - panel.start
        is_first = panel.start == 0  # its sums write every row
        sums = _of_block(grad, panel)
        own = sums.narrow(1, panel.start, height)
        _multiply(own, slope, cols, adds=not is_first)
        later = panel.block.n - panel.stop
        if later:
            below = slope.narrow(2, height, later).mT
            _multiply(sums.narrow(1, panel.stop, later), below, rows, adds=not is_first)


def _of_block(flat: Tensor, panel: Panel) -> Tensor:
    """The rows (b, n, d) of the groups of a panel in a flat tensor."""
    block = panel.block
    whole = flat.narrow(0, block.entry, block.size).view(block.groups, block.n, block.d)
    return whole.narrow(0, panel.first, panel.last - panel.first)


def _unit_rows(x: Tensor, panel: Panel) -> tuple[Tensor, Tensor]:
    """The rows (b, k, d) of a panel, and the rows (b, m, d) that are its columns."""
    whole = _of_block(x, panel)
    rows = whole.narrow(1, panel.start, panel.stop - panel.start)
    return rows, whole.narrow(1, panel.start, panel.block.n - panel.start)


def _entries(flat: Tensor, panel: Panel) -> Tensor:
    """The entries (b, k, m) of a panel."""
    return flat.narrow(0, panel.at, panel.size).view(panel.shape)


def _multiply(out: Tensor, a: Tensor, b: Tensor, *, adds: bool = False) -> None:
    """Write ``a @ b`` to ``out``, or add it; a stack of one is multiplied as two matrices."""
    if len(a) == 1:
        out, a, b = out.select(0, 0), a.select(0, 0), b.select(0, 0)
        if adds:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif adds:
        out.baddbmm_(a, b)
    else:
        torch.bmm(a, b, out=out)
