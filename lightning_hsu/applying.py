"""From a layer's neurons to its parameters' ``.grad``: compute, shorten where a step would be too long, add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu.measures import State
from lightning_hsu.monitor import Layer, widened

_SMALL = 2**16  # entries of a layer up to which equal shapes are stacked: their cost is the number of operations


@dataclass(frozen=True)
class GradientNote:
    """What one application did to one layer, on request: tensors, nothing is synchronised.

    Args:
        share: Norm of the added gradient over the norm of the task's.
        limited: Neurons whose penalty gradient was shortened by the step limit.
    """

    share: Tensor
    limited: Tensor


@dataclass(frozen=True, eq=False)
class Application:
    """One layer about to get its gradient.

    Args:
        layer: The layer.
        strength: Its coefficient at this step.
        rate: The learning rate that its neurons will move with.
        x: Its neurons (groups, n, d), taken while gradients were recorded.
        state: What its measure carries from step to step, prepared for x.
    """

    layer: Layer
    strength: float
    rate: float
    x: Tensor
    state: State | None = None

    @property
    def neurons(self) -> Tensor:
        """The neurons without a graph, in float32 or wider."""
        return widened(self.x.detach())

    def add(
        self, grad: Tensor, own: Mapping[int, float], *, step_limit: float | None, grad_scale: float, note: bool
    ) -> GradientNote | None:
        """Add coefficient times the gradient (groups, n, d) to ``.grad``; a note where asked for."""
        grad = grad * (self.strength / grad.shape[0])
        factor = self._shortening(grad, step_limit)
        places = list(self.layer.target.places(self.x, grad * factor, own))
        found = None
        if note and places:
            share = _norm([g for _, g in places]) * grad_scale / _norm([task for task, _ in places])
            found = GradientNote(share, (factor < 1).sum())
        for task, g in places:
            task.add_(g if grad_scale == 1.0 else g * grad_scale)
        return found

    def _shortening(self, grad: Tensor, step_limit: float | None) -> Tensor:
        """Factors (groups, n, 1) in (0, 1] that keep a step within the limit and the gradient within its dtype."""
        length = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
        room = torch.full_like(length, torch.finfo(self.x.dtype).max / 2)
        if step_limit is not None and self.rate > 0:
            room = room.minimum(torch.linalg.vector_norm(self.neurons, dim=-1, keepdim=True) * (step_limit / self.rate))
        return torch.where(length > room, room / length, 1.0)


def penalty_gradients(applications: Sequence[Application]) -> list[Tensor]:
    """Gradient (groups, n, d) of each layer's penalty, summed over its groups; small layers of equal shape together."""
    stacks: dict[object, list[int]] = {}
    for i, one in enumerate(applications):
        x = one.x
        alike = (one.layer.measure, x.shape, x.dtype, x.device) if one.state is None and x.numel() <= _SMALL else i
        stacks.setdefault(alike, []).append(i)
    found: dict[int, Tensor] = {}
    for members in stacks.values():
        stack = [applications[i].neurons for i in members]
        first = applications[members[0]]
        grad = first.layer.measure.value_and_grad(torch.cat(stack) if len(stack) > 1 else stack[0], first.state)[1]
        found |= dict(zip(members, torch.split(grad, stack[0].shape[0]), strict=True))
    return [found[i] for i in range(len(applications))]


def refuse_sparse(layer: Layer) -> None:
    """A sparse gradient has no room for the rows that the batch did not touch."""
    if any(p.grad is not None and p.grad.is_sparse for p in layer.parameters):
        raise NotImplementedError(
            f"layer '{layer.target.name}' {layer.target.shape} has sparse gradients, which cannot hold the penalty's; use "
            f"sparse=False, a coefficient of 0 for it, or exclude='{layer.target.name}'"
        )


def _norm(parts: list[Tensor]) -> Tensor:
    """Euclidean norm of several tensors together."""
    norms = torch.stack([torch.linalg.vector_norm(widened(part)) for part in parts])
    total: Tensor = torch.linalg.vector_norm(norms)
    return total
