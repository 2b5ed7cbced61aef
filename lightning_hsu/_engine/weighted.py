"""The arithmetic around the gradients of layers that are not plain, on a GPU for many of them at once.

A layer by itself takes some thirty launches for its norms, its coefficient and its step limit.
Everything here has the formulas of :class:`LayerUpdate`, over the rows of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from lightning_hsu._core.limits import Allowance, held_factors, norms_of, with_ones
from lightning_hsu._engine.apply import GradView, LayerUpdate, Weighted
from lightning_hsu._engine.layer import Layer
from lightning_hsu._engine.one_pass import goes_together
from lightning_hsu._engine.optimizer_steps import OptimizerSteps
from lightning_hsu._engine.plan import StepContext, room_on_gpu, runs_that_fit
from lightning_hsu._engine.state import ShareMeans
from lightning_hsu._neurons.placement import Placement
from lightning_hsu.coefficients import Share


def in_lots(
    buckets: Sequence[Sequence[Layer]], placement: Placement
) -> list[tuple[list[Layer], bool]]:
    """Layers whose gradients are in memory at once, and whether they go together.

    On a GPU buckets are joined up to 2**29 entries, which are 2 GiB in float32, or a sixth of all
    layers.

    Args:
        buckets: The layers, in buckets.
        placement: How their weights are placed over the ranks.
    """
    joined = []
    sizes = []
    lots: list[tuple[list[Layer], bool]] = []
    for bucket in buckets:
        if placement.keeps_whole and all(map(goes_together, bucket)):
            joined.append(list(bucket))
            sizes.append(sum(map(_entries, bucket)))
        else:
            lots.append((list(bucket), False))
    for run in runs_that_fit(joined, sizes, room_on_gpu(sizes)):
        lots.append((list(chain.from_iterable(run)), True))
    return lots


def weighted_together(
    updates: Sequence[LayerUpdate],
    grads: Sequence[Tensor],
    coefficients: Sequence[Tensor | float],
    context: StepContext,
) -> list[Weighted]:
    """The same as :meth:`LayerUpdate.weighted` for each of several layers.

    Args:
        updates: The layers.
        grads: Their gradients (groups, n, d), which are overwritten.
        coefficients: Their coefficients.
        context: The step.
    """
    alike: dict[object, list[int]] = {}
    allowances = [update.allowance(context) for update in updates]
    for i, (update, grad) in enumerate(zip(updates, grads, strict=True)):
        rate = update.rate
        rate_key = id(rate) if isinstance(rate, Tensor) else rate
        has_tensor = isinstance(coefficients[i], Tensor)
        gain = update.gain(context)
        dtypes = grad.dtype, update.view.x.dtype
        limited_by = rate_key, gain, allowances[i]
        key = (grad.device, dtypes, limited_by, has_tensor, update.grad_scale)
        alike.setdefault(key, []).append(i)
    found: dict[int, Weighted] = {}
    for members in alike.values():
        own = []
        scales = []
        for i in members:
            own.append(grads[i])
            scales.append(coefficients[i])
        some = [updates[i] for i in members]
        limit = some[0].limit(context)
        weighted = _weigh_rows(some, own, scales, limit, allowances[members[0]], context.steps)
        found.update(zip(members, weighted, strict=True))
    return [found[i] for i in range(len(updates))]


def update_shares(
    updates: Sequence[LayerUpdate], grads: Sequence[Tensor], means: ShareMeans
) -> None:
    """The same as :meth:`LayerUpdate.update_share` for each of the layers with a share.

    Args:
        updates: Layers, with a share or without.
        grads: Their gradients (groups, n, d).
        means: The means.
    """
    members: dict[object, list[int]] = {}
    views: dict[int, list[GradView]] = {}
    for i, (update, grad) in enumerate(zip(updates, grads, strict=True)):
        if not isinstance(update.layer.strength, Share):
            continue
        groups = grad.shape[0]
        found = update.grad_views(grad if groups == 1 else grad / groups)
        if found:
            views[i] = found
            dtypes = tuple(sorted({str(part.dtype) for _, _, part in found}))
            key = (update.layer.strength, update.grad_scale, grad.device, grad.dtype, dtypes)
            members.setdefault(key, []).append(i)
    for some in members.values():
        names = []
        tasks = []
        penalties = []
        for i in some:
            names.append(updates[i].layer.name)
            tasks.append([task for _, task, _ in views[i]])
            penalties.append([part for _, _, part in views[i]])
        first = updates[some[0]]
        share = first.layer.strength
        assert isinstance(share, Share)
        norms = [_norms(tasks) / first.grad_scale, _norms(penalties)]
        means.update_several(names, share, torch.stack(norms, dim=1))


def add_together(updates: Sequence[LayerUpdate], grads: Sequence[Tensor]) -> None:
    """The same as :meth:`LayerUpdate.add` for each of several layers.

    Args:
        updates: The layers.
        grads: Their weighted gradients (groups, n, d).
    """
    rounds: list[tuple[list[Tensor], list[Tensor], list[float]]] = []
    times: dict[int, int] = {}  # how often each parameter has been met
    for update, grad in zip(updates, grads, strict=True):
        for p, task, part in update.grad_views(grad):
            turn = times.get(id(p), 0)  # additions to one tensor must not run at once
            times[id(p)] = turn + 1
            if turn == len(rounds):
                rounds.append(([], [], []))
            tasks, parts, factors = rounds[turn]
            tasks.append(task)
            parts.append(part)
            factors.append(update.factor_of(p))
    for tasks, parts, factors in rounds:
        if any(factor != 1.0 for factor in factors):
            parts = list(torch._foreach_mul(parts, factors))
        torch._foreach_add_(tasks, parts)


def _entries(layer: Layer) -> int:
    """The entries of a layer's neurons."""
    return math.prod(layer.target.shape)


def _weigh_rows(
    updates: Sequence[LayerUpdate],
    grads: Sequence[Tensor],
    coefficients: Sequence[Tensor | float],
    limit: Tensor | float | None,
    allowance: Allowance | None,
    steps: OptimizerSteps | None,
) -> list[Weighted]:
    """Weigh the gradients of layers with limits of one kind."""
    tasks = None
    entries: list[int] = []
    if allowance is not None:
        if steps is None:
            tasks, entries = _tasks(updates, grads)
        else:
            tasks, entries = _steps(updates, grads, steps)
    sizes = []
    shapes = []
    for grad in grads:
        sizes.append(grad.shape[:-1].numel())
        shapes.append((*grad.shape[:-1], 1))
    scale = _scales(grads, coefficients, sizes)
    lengths = torch.cat(list(map(_row_lengths, grads))).mul_(scale)
    room: Tensor | float = torch.finfo(updates[0].view.x.dtype).max / 2
    if limit is not None:
        norms = torch.cat([_row_lengths(update.view.x.detach()) for update in updates]) * limit
        if tasks is not None and allowance is not None and allowance.counts_in_task:
            of_ones = list(map(math.sqrt, entries))
            counted = list(tasks.double().unbind())
            if allowance.share is None:
                counted = with_ones(counted, of_ones)
            norms.mul_(_by_row(torch._foreach_div(counted, of_ones), sizes))
        room = norms.clamp_max(room)
    factor = torch.where(lengths > room, room / lengths, 1.0)
    weights = torch.split((factor * scale).to(grads[0].dtype), sizes)
    factors = torch.split(factor.to(grads[0].dtype), sizes)
    torch._foreach_mul_(list(grads), list(map(torch.reshape, weights, shapes)))
    held: list[Tensor | None] = [None] * len(grads)
    if tasks is not None and allowance is not None and allowance.share is not None:
        held = list(torch.split(_hold(updates, grads, tasks, allowance.share), 1))
    return list(map(Weighted, grads, map(torch.reshape, factors, shapes), held))


def _tasks(updates: Sequence[LayerUpdate], grads: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Norms (k,) of the task's gradients, unscaled, 0 where not finite; and how many entries each has."""
    tasks = []
    entries = []
    for update, grad in zip(updates, grads, strict=True):
        own = [task for _, task, _ in update.grad_views(grad)]
        tasks.append(own or [grad.new_zeros(1)])
        entries.append(sum(task.numel() for task in tasks[-1]))
    norms = _norms(tasks) / updates[0].grad_scale
    return norms.nan_to_num_(0.0, 0.0, 0.0), entries


def _steps(
    updates: Sequence[LayerUpdate], grads: Sequence[Tensor], steps: OptimizerSteps
) -> tuple[Tensor, list[int]]:
    """The same of what the optimizer has made of these gradients."""
    parts = list(map(LayerUpdate.parts, updates, grads))
    lengths = iter(steps.lengths(list(chain.from_iterable(parts))))
    norms = []
    entries = []
    for own, grad in zip(parts, grads, strict=True):
        together = [next(lengths) for _ in own] or [grad.new_zeros(())]
        norms.append(torch.linalg.vector_norm(torch.stack(together)))
        entries.append(sum(part.entries for part in own))
    return torch.stack(norms).nan_to_num_(0.0, 0.0, 0.0), entries


def _hold(
    updates: Sequence[LayerUpdate], grads: Sequence[Tensor], tasks: Tensor, share: float
) -> Tensor:
    """Shorten weighted gradients to a share of the task's; return by what factors (k,)."""
    penalties = []
    for update, grad in zip(updates, grads, strict=True):
        own = [part for _, _, part in update.grad_views(grad)]
        penalties.append(own or [grad.new_zeros(1)])
    held = held_factors(_norms(penalties), tasks, share)
    factors = list(held.to(grads[0].dtype).unbind())
    torch._foreach_mul_(list(grads), factors)
    return held


def _by_row(numbers: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The numbers of layers for each of their rows (rows,)."""
    return torch.cat([number.expand(size) for number, size in zip(numbers, sizes, strict=True)])


def _scales(
    grads: Sequence[Tensor], coefficients: Sequence[Tensor | float], sizes: list[int]
) -> Tensor:
    """Coefficient / groups of each row (rows,), in float64; coefficients are all tensors or none."""
    rows = grads[0].new_ones(sum(sizes), dtype=torch.float64)
    numbers = []
    on_device = []
    for grad, coefficient, size in zip(grads, coefficients, sizes, strict=True):
        number = 1.0 / grad.shape[0]
        if isinstance(coefficient, Tensor):
            on_device.append(coefficient.expand(size))
        else:
            number *= coefficient
        numbers.append(number)
    torch._foreach_mul_(list(torch.split(rows, sizes)), numbers)
    if on_device:
        rows.mul_(torch.cat(on_device))
    return rows


def _row_lengths(x: Tensor) -> Tensor:
    """The norms (rows,) of the rows of x (groups, n, d), in float64."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return lengths.flatten()


def _norms(layers: Sequence[Sequence[Tensor]]) -> Tensor:
    """The norms (k,) of the tensors of each of k layers together."""
    norms = norms_of(list(chain.from_iterable(layers)))
    if len(norms) == len(layers):
        return torch.stack(norms)
    found = []
    start = 0
    for parts in layers:
        found.append(torch.linalg.vector_norm(torch.stack(norms[start : start + len(parts)])))
        start += len(parts)
    return torch.stack(found)
