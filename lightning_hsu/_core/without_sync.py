"""Pair gradients of layers on a GPU in few operations, without host-device synchronisation.

Each check on the device ("is any pair near?") would make the host wait for the answer. Here
everything is computed whatever the answer is: rows that take no part are masked, and near pairs
are redone in float64 within the pass (repair.py). Layers of all shapes and kernels go together
(layout.py), so that what is done to each entry of a Gram matrix is done once for all layers.

Two things are left to the host, which reads of them one step later (crowded.py), when the answer has
long been there: coincident neurons, which have no direction between them, and more near pairs than
the repair has room for. Layers that have them take the exact way from the next step on. In the step
before, coincident neurons do not push each other, and a near pair without room pulls as one at the
squared chord ``NEAR`` does; the gradient is finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.batches import Batch, by_layer, by_row_of, layer_parts, rows_of
from lightning_hsu._core.fused import NO_PAIR, Fused
from lightning_hsu._core.group_numbers import NEAREST_COSINE, GatheredNumbers, at_right_angles
from lightning_hsu._core.kernel import PairTerm, Part, folded_slopes, folded_values
from lightning_hsu._core.layout import Layout, Panel, Piece
from lightning_hsu._core.near import COINCIDENT, NEAR
from lightning_hsu._core.precision import working_dtype
from lightning_hsu._core.repair import ListedPairs, add_pushes, listed_pairs, pulls_of
from lightning_hsu._core.tables import Tables


class BatchGradient(NamedTuple):
    """The gradients of a batch, as tensors that hold all its rows.

    Args:
        grad: -1/2 the gradients, on the sphere, of the groups' summed energies, one flat tensor.
        length: Their lengths, (rows,) in float64.
        norm: Norms of the neurons, (rows,) in float64; infinite for those that take no part.
        scale: Factor from these sums to what is minimised, (rows,) in float64.
        pairs: The near pairs of each piece: their places among its panels, and squared chords.
        energy: Mean energies (groups,) in float64; None if nothing needs them.
        numbers: What a logging step needs; None if it is not asked for.
    """

    grad: Tensor
    length: Tensor
    norm: Tensor
    scale: Tensor
    pairs: list[tuple[Tensor, Tensor]]
    energy: Tensor | None
    numbers: GatheredNumbers | None


class BatchNumbers(NamedTuple):
    """What a logging step needs of a batch.

    Args:
        numbers: The numbers.
        pairs: The near pairs of each piece: their places among its panels, and squared chords.
    """

    numbers: GatheredNumbers
    pairs: list[tuple[Tensor, Tensor]]


class _UnitRows(NamedTuple):
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


def gradients_without_sync(
    batch: Batch, *, energy: bool = False, stats: bool = False, fused: Fused | None = None
) -> BatchGradient:
    """Compute the same as :func:`pair_energy` for all layers of a batch.

    Args:
        batch: The layers, float32 or float64 or narrower, n >= 2; kernels not too steep for
            float32.
        energy: Also compute the mean energies.
        stats: Also compute what a logging step needs.
        fused: Evaluates the kernels in one compiled pass; None to call torch step by step.
    """
    layout = batch.layout
    rows = _unit_rows_of(batch, with_finite=stats)
    missing = rows.counts[0]  # how many rows take no part
    scale = layout.scales[layout.block_of, missing]
    numbers = _numbers_of(batch, rows) if stats else None
    grad = torch.empty_like(rows.x)
    sums = _Sums(batch, rows, grad, numbers, fused, with_energy=energy)
    for piece in layout.pieces:
        sums.add(piece)
    for width in layout.widths:
        pulled, unit = rows_of(grad, width), rows_of(rows.x, width)
        pulled.addcmul_(unit, (pulled * unit).sum(1, keepdim=True), value=-1.0)
    length = _lengths(layout, grad)
    mean = None
    if sums.energy is not None and (energy or sums.takes_logarithms):
        missing = missing[layout.firsts]
        count = layout.sizes - missing
        without = layout.without[layout.group_blocks, missing]
        total = sums.energy.narrow(0, 0, layout.groups)
        mean = _energies(batch, total, count, without).mul_(scale[layout.firsts])
        scale = _minimised(batch, scale, mean)
    return BatchGradient(grad, length, rows.norm, scale, sums.pairs, mean, numbers)


def numbers_without_sync(batch: Batch, *, fused: Fused | None = None) -> BatchNumbers:
    """Compute what a logging step needs of a batch, as gradients with ``stats`` have it.

    It takes the first of the three products of a gradient.

    Args:
        batch: The layers, as for :func:`gradients_without_sync`.
        fused: Evaluates the kernels in one compiled pass; None to call torch step by step.
    """
    rows = _unit_rows_of(batch, with_finite=True)
    numbers = _numbers_of(batch, rows)
    sums = _Sums(batch, rows, None, numbers, fused, with_energy=True)
    for piece in batch.layout.pieces:
        sums.add(piece)
    return BatchNumbers(numbers, sums.pairs)


def _unit_rows_of(batch: Batch, *, with_finite: bool) -> _UnitRows:
    """The unit rows of a batch; ``with_finite`` those that are finite are counted, too."""
    layout = batch.layout
    layout.read_here()
    first = batch.updates[0].entries
    dtype = working_dtype(first.dtype)
    longest = len(layout.columns)
    w = torch.empty(layout.entries + longest, dtype=dtype, device=first.device)
    torch._foreach_copy_(
        layer_parts(batch, w), [update.entries.detach() for update in batch.updates]
    )
    norm = _lengths(layout, w)
    usual = norm.clamp(torch.finfo(dtype).tiny, torch.finfo(norm.dtype).max)
    masks = torch.empty(2 if with_finite else 1, layout.rows, dtype=torch.bool, device=w.device)
    dead = torch.ne(usual, norm, out=masks[0])  # of NaN: true
    if with_finite:
        torch.lt(norm, torch.inf, out=masks[1])
    divisor = norm.masked_fill(dead, torch.inf)
    x = w.new_empty(layout.entries)
    for width in layout.widths:
        torch.div(rows_of(w, width), by_row_of(divisor, width)[:, None], out=rows_of(x, width))
    x.nan_to_num_(0.0, 0.0, 0.0)  # rows that are not finite
    so_far = masks.view(-1).cumsum(0).view(masks.shape)
    last, before = so_far[:, layout.bounds].unbind(1)
    return _UnitRows(w, x, divisor, last - before)


def _numbers_of(batch: Batch, rows: _UnitRows) -> GatheredNumbers:
    """Where to note what a logging step needs, with the counts."""
    numbers = GatheredNumbers(batch.layout, batch.terms, rows.x.device)
    numbers.counts.copy_(rows.counts[:, batch.layout.firsts])
    return numbers


def _lengths(layout: Layout, flat: Tensor) -> Tensor:
    """The norms (rows,) of the rows of a flat tensor, in float64."""
    found = torch.empty(layout.rows, dtype=torch.float64, device=flat.device)
    for width in layout.widths:
        rows, out = rows_of(flat, width), by_row_of(found, width)
        torch.linalg.vector_norm(rows, dim=1, dtype=found.dtype, out=out)
    return found


def is_complete(batch: Batch, found: BatchGradient) -> Tensor:
    """Whether nothing is left to the exact way, on the device.

    What is left are coincident neurons, and near pairs for which there was no room.
    """
    complete = None
    for piece, (at, squares) in zip(batch.layout.pieces, found.pairs, strict=True):
        nearest = squares.amin(0) if any(one.half_space for one in batch.terms) else squares[0]
        own = ((nearest >= COINCIDENT) | (at == piece.size)).all() & (at[-1] == piece.size)
        complete = own if complete is None else complete & own
    assert complete is not None
    return complete


class _Sums:
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
        rows: _UnitRows,
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


def _energies(batch: Batch, total: Tensor, count: Tensor, without: Tensor) -> Tensor:
    """Sums of energies (groups,), with that of a neuron and its own mirror image.

    Args:
        batch: The layers.
        total: Sums in which rows that take no part lie at right angles to all others.
        count: How many rows take part.
        without: How many pairs have a row that takes no part.
    """
    lost, own = _constants(batch.layout, batch.terms).unbind()
    return torch.addcmul(total, without, lost, value=-1.0).addcmul_(count, own)


def _constants(layout: Layout, terms: tuple[PairTerm, ...]) -> Tensor:
    """For each group (2, groups) the energies of a pair at right angles, and of a neuron alone."""
    tables = layout.constants.get(terms)
    if tables is None:
        found = []
        for block in layout.blocks:
            term = terms[block.kind]
            found += [(at_right_angles(term), term.constant(1.0))] * block.groups
        numbers = torch.tensor(found, dtype=torch.float64).T.contiguous()
        tables = layout.constants.setdefault(terms, Tables([numbers], layout.kinds.device))
    tables.read_here()
    return tables.tensors[0]


def _minimised(batch: Batch, scale: Tensor, energy: Tensor) -> Tensor:
    """The scales (rows,) where the logarithm of a mean is minimised."""
    divisor = None
    for kind, term in enumerate(batch.terms):
        if not term.logarithm:
            continue
        if divisor is None:
            divisor = torch.ones_like(energy)
        is_used = (batch.layout.kinds == kind) & (energy > 0)
        divisor = torch.where(is_used, energy, divisor)
    if divisor is None:
        return scale
    spare = divisor.new_ones(1)
    return scale / torch.cat([divisor, spare])[batch.layout.group_of]


def add_batch(batch: Batch, found: BatchGradient) -> None:
    """Add the gradients of a batch to its layers.

    Args:
        batch: The layers.
        found: Their gradients; overwritten.
    """
    first = batch.updates[0]
    grad_scale = first.grad_scale
    factor = found.scale / found.norm
    # 2 is that of the sums, whose pairs count once.
    scales = [2.0 * update.scale * grad_scale for update in batch.updates]
    torch._foreach_mul_(by_layer(batch, factor), scales)
    room = found.norm
    if isinstance(first.limit, Tensor):  # common to all
        room.mul_(first.limit * grad_scale)
    else:
        limits = []
        for update in batch.updates:
            limit = torch.inf if update.limit is None else float(update.limit)
            limits.append(limit * grad_scale)
        if len(set(limits)) == 1:
            room.mul_(limits[0])
        else:
            torch._foreach_mul_(by_layer(batch, room), limits)
    largest = torch.finfo(first.entries.dtype).max / 2 * grad_scale
    room.clamp_max_(largest).div_(found.length)
    torch.minimum(factor, room, out=factor)
    # Multiplied and added in one operation it would be rounded once, where buffers round twice.
    for width in batch.layout.widths:
        rows_of(found.grad, width).mul_(by_row_of(factor, width)[:, None])
    added = layer_parts(batch, found.grad)
    torch._foreach_sub_([update.out_entries for update in batch.updates], added)


def unweighted(batch: Batch, found: BatchGradient) -> list[Tensor]:
    """The gradients (b, n, d) of the layers of a batch in tensors of their own, without any weight.

    Args:
        batch: The layers.
        found: Their gradients, which are not changed.
    """
    grad = found.grad.clone()
    factor = (found.scale / found.norm).mul_(-2.0)
    for width in batch.layout.widths:
        rows_of(grad, width).mul_(by_row_of(factor, width)[:, None])
    parts = layer_parts(batch, grad)
    copies = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in parts]
    torch._foreach_copy_(copies, parts)
    return [copy.view(one.size) for copy, one in zip(copies, batch.updates, strict=True)]
