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

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.batches import Batch, by_layer, by_row_of, layer_parts, rows_of
from lightning_hsu._core.fused import Fused
from lightning_hsu._core.group_numbers import GatheredNumbers, at_right_angles
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.layout import Layout
from lightning_hsu._core.limits import TaskLimit, share_factors, task_norms
from lightning_hsu._core.near import COINCIDENT
from lightning_hsu._core.pair_sums import PairSums, UnitRows
from lightning_hsu._core.precision import working_dtype
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
    sums = PairSums(batch, rows, grad, numbers, fused, with_energy=energy)
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
    sums = PairSums(batch, rows, None, numbers, fused, with_energy=True)
    for piece in batch.layout.pieces:
        sums.add(piece)
    return BatchNumbers(numbers, sums.pairs)


def _unit_rows_of(batch: Batch, *, with_finite: bool) -> UnitRows:
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
    return UnitRows(w, x, divisor, last - before)


def _numbers_of(batch: Batch, rows: UnitRows) -> GatheredNumbers:
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
    limits = [update.task for update in batch.updates if update.task is not None]
    room = _limited_lengths(batch, found.norm, limits)
    room.div_(found.length)
    if limits and limits[0].allows.counts_in_task:
        room.nan_to_num_(0.0)  # no room for no length
    torch.minimum(factor, room, out=factor)
    share = limits[0].allows.share if limits else None
    if share is not None:
        torch.mul(factor, found.length, out=room)
        totals = torch.stack(torch._foreach_norm(by_layer(batch, room)))
        tasks = torch.stack([one.norm for one in limits])
        held = share_factors(totals, tasks, share)
        factor.mul_(held[batch.layout.layer_of])
    # Multiplied and added in one operation it would be rounded once, where buffers round twice.
    for width in batch.layout.widths:
        rows_of(found.grad, width).mul_(by_row_of(factor, width)[:, None])
    added = layer_parts(batch, found.grad)
    torch._foreach_sub_([update.out_entries for update in batch.updates], added)


def _limited_lengths(batch: Batch, norm: Tensor, limits: Sequence[TaskLimit]) -> Tensor:
    """The largest lengths (rows,) that rows of what is added may have.

    Args:
        batch: The layers.
        norm: Norms of the neurons (rows,); overwritten.
        limits: What the task's gradients of the layers allow, if these limit them.
    """
    first = batch.updates[0]
    grad_scale = first.grad_scale
    counts_in_task = bool(limits) and limits[0].allows.counts_in_task
    if counts_in_task:  # before a limit that may be as large as numbers are
        norm.clamp_max_(torch.finfo(norm.dtype).max)  # of dead neurons: infinite
        norm.mul_(task_norms(limits)[batch.layout.layer_of])
    if isinstance(first.limit, Tensor):  # common to all
        norm.mul_(first.limit * grad_scale)
    factors = []
    for update in batch.updates:
        limit = 1.0
        if not isinstance(update.limit, Tensor):
            limit = torch.inf if update.limit is None else float(update.limit) * grad_scale
        if counts_in_task:
            limit /= math.sqrt(update.size.numel()) * grad_scale
        factors.append(limit)
    if len(set(factors)) > 1:
        torch._foreach_mul_(by_layer(batch, norm), factors)
    elif factors[0] != 1.0:
        norm.mul_(factors[0])
    return norm.clamp_max_(torch.finfo(first.entries.dtype).max / 2 * grad_scale)


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
