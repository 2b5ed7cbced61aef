"""The gradients of many layers at once, weighted and added where they belong: one branch chooses who computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_hsu._core.backend import DTYPES, compiled
from lightning_hsu._core.batched import stacked, unasked
from lightning_hsu._core.kernel import FORMULAS, PairTerm
from lightning_hsu._core.near import NEAR
from lightning_hsu._core.pairwise import pair_energy, too_steep
from lightning_hsu._core.precision import products_are_lowered
from lightning_hsu._core.updates import GradientUpdate

SMALL = 2**16
"""Entries of a layer up to which equal shapes are stacked: their cost is the number of operations."""

_LARGE = 2**26
"""Entries of layers of one shape that go together on a GPU."""


def add_pair_gradients(additions: Sequence[GradientUpdate], term: PairTerm) -> None:
    """Add the gradients of mean pair energies, many layers at once.

    Args:
        additions: The layers; no two of them add to the same entries.
        term: The kernel.
    """
    quick = [_compiled(one, term) for one in additions]
    if any(quick):
        from lightning_hsu._core.triton import launch

        launch.add_pair_gradients(
            [one for one, fits in zip(additions, quick, strict=True) if fits], term
        )
    stacks: dict[object, list[GradientUpdate]] = {}
    for i, one in enumerate(additions):
        if not quick[i]:
            alike = (one.w.shape, one.w.dtype, one.w.device, one.scale, one.limit, one.grad_scale)
            stacks.setdefault(alike if one.w.numel() <= SMALL or _waits(one.w) else i, []).append(
                one
            )
    waiting = []
    for members in stacks.values():
        if _waits(members[0].w):
            count = max(1, _LARGE // members[0].w.numel())
            waiting += [members[start : start + count] for start in range(0, len(members), count)]
        else:
            w = _joined(members)
            _add(members, term, w, *pair_energy(w, term))
    _add_unasked(waiting, term)


def _add_unasked(stacks: Sequence[Sequence[GradientUpdate]], term: PairTerm) -> None:
    """Add to stacks on devices that every question would keep waiting: they are asked at the end."""
    answers = []
    for members, (value, grad, holds) in zip(
        stacks, unasked([[one.w for one in members] for members in stacks], term), strict=True
    ):
        _add(members, term, _joined(members), value, torch.where(holds[:, None, None], grad, 0.0))
        answers.append(holds)
    for members, holds in zip(stacks, answers, strict=True):
        groups = [
            replace(one, w=one.w[i, None], out=one.out[i, None])
            for one in members
            for i in range(len(one.w))
        ]
        for group, well in zip(groups, holds.tolist(), strict=True):
            if not well:
                w = _joined([group])
                _add([group], term, w, *pair_energy(w, term))


def _waits(w: Tensor) -> bool:
    """Whether the host would wait for the device at every question; bfloat16 products cannot do without any."""
    return w.is_cuda and w.shape[1] > 1 and not products_are_lowered()


def _compiled(one: GradientUpdate, term: PairTerm) -> bool:
    """Whether compiled kernels are asked for, and take such a layer and kernel."""
    if not compiled(one.w) or one.out.dtype not in DTYPES or one.out.device != one.w.device:
        return False
    smooth = term.knee**2 <= NEAR and not too_steep(term)
    return smooth and term.formula is not None and term.formula[0] in FORMULAS


def _joined(members: Sequence[GradientUpdate]) -> Tensor:
    """The neurons of layers of one shape as one stack, in float32 or wider."""
    return stacked([one.w for one in members])


def _add(
    members: Sequence[GradientUpdate], term: PairTerm, w: Tensor, value: Tensor, grad: Tensor | None
) -> None:
    """Add to layers of one shape and weight what their stack w (b, n, d) has: values (b,) and gradients (b, n, d)."""
    assert grad is not None
    first = members[0]
    if term.logarithm:
        grad = grad / torch.where(value > 0, value, 1.0)[:, None, None].to(grad.dtype)
    bound = torch.finfo(first.w.dtype).max / 2
    weight = shortening(grad, w, first.scale, first.limit, bound).mul_(
        first.scale * first.grad_scale
    )
    parts = torch.split(grad.mul_(weight), first.w.shape[0])
    torch._foreach_add_([one.out for one in members], list(parts))


def shortening(
    grad: Tensor, w: Tensor, scale: Tensor | float, limit: float | None, bound: float
) -> Tensor:
    """Factors (..., n, 1) in (0, 1] that keep the rows of ``scale * grad`` within a limit.

    Args:
        grad: Gradient, shape (..., n, d).
        w: Neurons, shape (..., n, d).
        scale: What the gradient is multiplied by.
        limit: Largest length of a row over that of its neuron; None is no limit.
        bound: Largest length of a row in any case.
    """
    length = torch.linalg.vector_norm(grad, dim=-1, keepdim=True) * scale
    room = torch.full_like(length, bound)
    if limit is not None:
        room = room.minimum(torch.linalg.vector_norm(w, dim=-1, keepdim=True) * limit)
    return torch.where(length > room, room / length, 1.0)
