"""How much of a penalty's gradient a step may add to a layer, as the task's gradient has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.precision import working_dtype

SAFE_SHARE = 0.1
"""Largest share limit with which zero-initialised adapters learn as fast; with 0.3 their loss ends 20 % higher."""

ANY_SHARE = torch.finfo(torch.float32).max
"""A share that holds nothing, but where there is no task's gradient at all."""


class Allowance(NamedTuple):
    """What the task's gradient of a layer may limit.

    Args:
        share: The largest norm of the penalty's gradient over it; None for no limit.
        counts_in_task: Whether a limit of rows is a multiple of the root mean square of the task's
            gradient, as with an optimizer that divides gradients by their size. Without a share a
            gradient of 0 counts as one of ones (:func:`with_ones`).
    """

    share: float | None
    counts_in_task: bool = False


class TaskLimit(NamedTuple):
    """The task's gradient of a layer, or what the optimizer makes of it, and what that limits.

    Args:
        norm: Its norm, a 0-d tensor on its device, as scaled as the gradient is; that of ones where
            it counts as such.
        allows: What it limits.
    """

    norm: Tensor
    allows: Allowance


def norms_of(tensors: Sequence[Tensor], order: float = 2.0) -> list[Tensor]:
    """The norm of each tensor, in float32 or wider."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_dtype.setdefault(tensor.dtype, []).append(place)
    found: dict[int, Tensor] = {}
    for dtype, places in by_dtype.items():
        chosen = [tensors[place] for place in places]
        if dtype == working_dtype(dtype):
            norms = torch._foreach_norm(chosen, order)
        else:
            norms = torch._foreach_norm(chosen, order, working_dtype(dtype))
        found.update(zip(places, norms, strict=True))
    return [found[place] for place in range(len(tensors))]


def with_ones(norms: Sequence[Tensor], of_ones: Sequence[float]) -> list[Tensor]:
    """Norms of the task's gradients of layers, those of ones where they are 0 or not finite.

    With ones a limit of rows, which counts in the norm, is that of the learning rate alone.

    Args:
        norms: The norms, 0-d tensors.
        of_ones: The norms of gradients of ones, of as many entries and as scaled.
    """
    by_kind: dict[object, tuple[list[int], list[Tensor], list[float]]] = {}
    for place, (norm, size) in enumerate(zip(norms, of_ones, strict=True)):
        places, own, sizes = by_kind.setdefault((norm.device, norm.dtype), ([], [], []))
        places.append(place)
        own.append(norm)
        sizes.append(size)
    found: dict[int, Tensor] = {}
    for places, own, sizes in by_kind.values():
        together = torch.stack(own)
        ones = torch._foreach_mul(list(torch.ones_like(together).unbind()), sizes)
        is_known = (together > 0) & together.isfinite()
        chosen = torch.where(is_known, together, torch.stack(ones))
        found.update(zip(places, chosen.unbind(), strict=True))
    return [found[place] for place in range(len(norms))]


def task_norms(limits: Sequence[TaskLimit]) -> Tensor:
    """The norms (k,) of the task's gradients of k layers; 0 where one is not finite."""
    return torch.stack([one.norm for one in limits]).nan_to_num_(0.0, 0.0, 0.0)


def held_factors(totals: Tensor, tasks: Tensor, share: float) -> Tensor:
    """The same as :func:`share_factors`, but 1 where there is nothing to shorten, so as to count it."""
    return torch.where(totals > 0, share_factors(totals, tasks, share), 1.0)


def share_factors(totals: Tensor, tasks: Tensor, share: float) -> Tensor:
    """Factors (k,) in [0, 1] that keep gradients within a share of the task's.

    Args:
        totals: Norms (k,) of the penalty's gradients of k layers.
        tasks: Norms (k,) of the task's; where one is 0 or not finite the factor is 0.
        share: Largest ratio of the two.
    """
    ratios = (tasks / totals).nan_to_num_(0.0, 0.0, 0.0)
    return ratios.mul_(min(share, ANY_SHARE)).clamp_max_(1.0)
