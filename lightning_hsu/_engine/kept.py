"""The plain layers at a step with a tolerance: what is due is computed, and kept gradients are added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.foreach import not_exact
from lightning_hsu._core.limits import TaskLimit, norms_of, share_factors, task_norms
from lightning_hsu._core.raw import RawPart
from lightning_hsu._core.updates import (
    GradientUpdate,
    add_to_layers,
    alike,
    stack_neurons,
    whole_gradient,
)
from lightning_hsu._engine.ahead import Ahead
from lightning_hsu._engine.buffered import BufferedUpdates, add_scaled
from lightning_hsu._engine.delta import Delta, Use, use_of
from lightning_hsu._engine.deltas import Deltas
from lightning_hsu._engine.layer import Layer
from lightning_hsu._engine.moves import reads_late
from lightning_hsu._engine.plan import PlainUpdates, runs_that_fit
from lightning_hsu._engine.sharing import PlainUpdate, begin_raw
from lightning_hsu._neurons.placement import Placement

_FAR = 0.1
"""Below this part of the step limit no row can reach it within the tolerance, and none is looked at."""


_ROOM_ON_GPU = 2**25
"""Entries of kept gradients on a GPU that are copied at once: 128 MiB in float32."""


def _is_far(delta: Delta, update: GradientUpdate) -> bool:
    """Whether no row of a gradient can come near the step limit, or the bound of the dtype."""
    scale = update.scale
    if scale * delta.longest > _FAR * torch.finfo(update.entries.dtype).max / 2:
        return False
    if update.limit is None:
        return True
    if isinstance(update.limit, Tensor):
        return False
    limit = update.limit
    if update.task is not None and update.task.allows.counts_in_task:
        norm = update.task.norm
        if reads_late(norm):
            return False
        limit *= float(norm) / (update.grad_scale * math.sqrt(update.size.numel()))
    return scale * delta.steepest <= _FAR * limit


def add_plain(
    deltas: Deltas,
    plain: PlainUpdates,
    ahead: Ahead,
    placement: Placement,
    *,
    same_step: bool,
) -> None:
    """Add the kept gradients of plain layers, after computing those that are due.

    Args:
        deltas: The kept gradients.
        plain: The layers.
        ahead: Gradients that were computed after the last step.
        placement: How the weights are placed over the ranks.
        same_step: Whether this is another evaluation within a step.
    """
    found = plain.found
    if not same_step:
        _drop_inexact(deltas, found)
    uses = [use_of(layer, update.w) for layer, _, update in found]
    deltas.find_due(uses, same_step=same_step)
    due = {}
    older = []
    for use, one in zip(uses, found, strict=True):
        if use.is_due:
            due[one[0]] = use, one
        else:
            older.append((use, one[2]))
    ready = ahead.take([one for _, one in due.values()])
    for raw, layers in ready:
        _keep_and_add(deltas, raw, [due.pop(layer) for layer in layers], same_step=same_step)
    left = list(due.values())
    fresh = begin_raw([one for _, one in left], placement, alone=ahead.outdated)
    with fresh.from_ranks:
        _add_older(deltas, older, plain.buffered, same_step=same_step)
        for raw in fresh:
            members = [left[place] for place in raw.places]
            _keep_and_add(deltas, raw, members, same_step=same_step)
    if not same_step:
        deltas.grow_older(uses)


def _drop_inexact(deltas: Deltas, found: Sequence[PlainUpdate]) -> None:
    """Drop gradients of the last use that were not exact, as of coincident neurons on a GPU."""
    kept = set(deltas.just_kept([layer for layer, _, _ in found]))
    if not kept:
        return
    layers = []
    work = []
    for layer, term, update in found:
        if layer in kept:
            layers.append(layer)
            work.append((update, term))
    deltas.drop([layers[place] for place in not_exact(work)])


def _keep_and_add(
    deltas: Deltas,
    raw: RawPart,
    members: Sequence[tuple[Use, PlainUpdate]],
    *,
    same_step: bool,
) -> None:
    """Keep gradients that were just computed, and add them as a step without a tolerance does."""
    uses = []
    updates = []
    for use, (_, _, update) in members:
        uses.append(use)
        updates.append(update)
    deltas.keep(uses, raw.copies(), learns=not same_step)
    raw.add_to(updates)


def see_changes(deltas: Deltas, found: Sequence[PlainUpdate], ahead: Ahead) -> None:
    """Before a step, see which layers had other weights at their last one than torch's counts said.

    They are told of, and left out from what is begun ahead.

    Args:
        deltas: The kept gradients; such a layer's is computed anew.
        found: The layers of the step.
        ahead: Gradients that were computed after the last step.
    """
    layers = [layer for layer, _, _ in found]
    changed = [*ahead.changed_unseen(layers), *deltas.changed_unseen(layers)]
    ahead.leave_out(changed)
    deltas.drop(changed)


def look_ahead(
    deltas: Deltas,
    found: Sequence[PlainUpdate],
    ahead: Ahead,
    placement: Placement,
    *,
    rest: Sequence[Layer],
    stats: bool,
) -> None:
    """After a step, begin what the next one needs of these layers.

    That is the gradients which will be due, and how far the neurons have moved.

    Args:
        deltas: The kept gradients, if any are kept.
        found: The layers, with the kernels of their measures and updates of their neurons.
        ahead: Where to begin.
        placement: How the weights are placed over the ranks.
        rest: Layers that are not plain, of which only the moves are looked for.
        stats: Also begin what a logging step needs.
    """
    due = found
    if deltas:
        due = _begin_to_look(deltas, found, ahead)
        look_for_moves(deltas, rest)
    ahead.begin(due, placement, stats=stats)
    if stats:
        ahead.begin_numbers(found)


def _begin_to_look(deltas: Deltas, found: Sequence[PlainUpdate], ahead: Ahead) -> list[PlainUpdate]:
    """Begin to look how far the neurons have moved; return the layers that will be due anyway."""
    due, uses = [], []
    for one in found:
        layer, _, update = one
        use = use_of(layer, update.w)
        if ahead.may_begin(layer, use.token):
            uses.append(use)
        if deltas.will_be_due(use):
            due.append(one)
    deltas.look_for_moves(uses)
    return due


def look_for_moves(deltas: Deltas, layers: Sequence[Layer]) -> None:
    """After a step, begin to look how far the neurons of layers on a GPU have moved."""
    # What computes their weights may differ from time to time, so there is nothing to compare.
    deltas.look_for_moves(_on_gpu(layers), checks=False)


def look_together(deltas: Deltas, found: Sequence[PlainUpdate], rest: Sequence[Layer]) -> None:
    """Within a step, look how far the neurons of all layers on a GPU have moved: one wait for all.

    Args:
        deltas: The kept gradients.
        found: The plain layers.
        rest: Layers that are not plain.
    """
    uses = [use_of(layer, update.w) for layer, _, update in found if reads_late(update.w)]
    deltas.look_for_moves(uses + _on_gpu(rest), checks=False)


def _on_gpu(layers: Sequence[Layer]) -> list[Use]:
    """Those of the layers that are on a GPU, with their neurons as they are now."""
    uses = []
    for layer in layers:
        if reads_late(layer.parameters[0]):
            uses.append(use_of(layer, layer.target.read().x.detach()))
    return uses


def _add_older(
    deltas: Deltas,
    older: Sequence[tuple[Use, GradientUpdate]],
    buffered: BufferedUpdates | None,
    *,
    same_step: bool,
) -> None:
    """Add gradients of earlier steps to their layers: most of them in one call."""
    together: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    held: list[_Held] = []
    near: list[tuple[GradientUpdate, Tensor]] = []
    for use, update in older:
        delta = deltas.refreshed(use, same_step=same_step)
        scale = update.scale * update.grad_scale
        if _is_far(delta, update):
            if update.task is not None and update.task.allows.share is not None:
                held.append(_Held(use.layer.name, update, update.task, delta.grad))
                continue
            outs, grads = together.setdefault(scale, ([], []))
            outs.append(update.out_entries)
            grads.append(delta.grad.view(update.out_entries.shape))
            if buffered is not None:
                buffered.note_kept(use.layer.name, delta.grad, scale)
            continue
        near.append((update, delta.grad))
    _add_near(near)
    _add_held(held, buffered)
    for scale, (outs, grads) in together.items():
        torch._foreach_add_(outs, grads, alpha=scale)


def _add_near(members: Sequence[tuple[GradientUpdate, Tensor]]) -> None:
    """Add kept gradients that a limit of rows may shorten: on a GPU layers of one shape together.

    Args:
        members: The updates, with the kept gradients (groups, n, d).
    """
    grads = {id(update): grad for update, grad in members}
    for some in alike([update for update, _ in members]):
        size = some[0].size.numel()
        room = _ROOM_ON_GPU if reads_late(some[0].entries) else 0
        for together in runs_that_fit(some, [size] * len(some), room):
            w = stack_neurons(together)
            stack = torch.cat([grads[id(update)] for update in together])
            add_to_layers(together, whole_gradient(stack.to(w.dtype), w))


class _Held(NamedTuple):
    """A layer that only the share limit may shorten: its rows are far from the step limit.

    Args:
        name: The layer.
        update: Its update.
        limit: What the task's gradient allows.
        grad: Its kept gradient (groups, n, d).
    """

    name: str
    update: GradientUpdate
    limit: TaskLimit
    grad: Tensor


def _add_held(members: Sequence[_Held], buffered: BufferedUpdates | None) -> None:
    """Add kept gradients with a factor each, which on a GPU is known there alone."""
    alike: dict[object, list[_Held]] = {}
    for one in members:
        alike.setdefault((one.grad.device, one.limit.allows), []).append(one)
    for some in alike.values():
        scales, grads, limits = [], [], []
        for one in some:
            scales.append(one.update.scale * one.update.grad_scale)
            grads.append(one.grad)
            limits.append(one.limit)
        totals = torch._foreach_mul(norms_of(grads), scales)
        tasks = task_norms(limits)
        share = some[0].limit.allows.share
        assert share is not None
        held = share_factors(torch.stack(totals), tasks, share)
        factors: Sequence[Tensor | float] = torch._foreach_mul(list(held.unbind()), scales)
        if not reads_late(held):
            factors = [float(factor) for factor in factors]
        for one, factor in zip(some, factors, strict=True):
            add_scaled(one.update.out_entries, one.grad, factor)
            if buffered is not None:
                buffered.note_held(one.name, one.grad, factor)
