"""What a penalty does beside spreading neurons: controls that have one part of it and not the other.

The gradient of a measure of directions is perpendicular to every neuron, and the longer the shorter
the neuron is. A finite step along it turns the neuron and makes it longer. A gain may be due to
either, or to neither: noise of equal length might do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_hsu.measures import Measure
from lightning_hsu.measures.state import State

Part = Literal["direction", "length"]


@dataclass(frozen=True)
class RandomDirection(Measure):
    """A random tangent direction in place of a measure's gradient, row by row as long as that is.

    A row's direction is uniform among all that are perpendicular to its neuron, and drawn anew at
    each call, from torch's global generator. It makes neurons longer and spreads them no more than
    noise does, which parts those that coincide.

    Args:
        measure: Whose gradient gives the lengths.
    """

    measure: Measure

    def penalty(self, x: Tensor, state: State | None = None) -> Tensor:
        """The measure's own, which nothing minimises here."""
        return self.measure.penalty(x, state)

    def value_and_grad(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """The measure's value (...) and, in place of its gradient, the random one (..., n, d)."""
        value, grad = self.measure.value_and_grad(x, state)
        noise = _noise(grad)
        along = (noise * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True)
        noise = noise - along.nan_to_num() * x
        length = grad.norm(dim=-1, keepdim=True)
        found = noise * (length / noise.norm(dim=-1, keepdim=True).clamp_min(1e-30))
        return value, found

    def prepare(self, x: Tensor, state: State | None = None) -> State | None:
        """What the measure needs."""
        return self.measure.prepare(x, state)

    def for_head(self) -> RandomDirection:
        """Lengths of the measure's own form for heads."""
        return RandomDirection(self.measure.for_head())


def _noise(like: Tensor) -> Tensor:
    """Normal numbers from torch's global generator."""
    return torch.randn_like(like)


class Halves:
    """Steps that have only one half of what a penalty does to a neuron.

    Beside the optimizer, a twin with moments of its own takes every step from the same weights
    without the penalty. Of a neuron's two positions after the step one gives the direction, the
    other the length.

    Args:
        optimizer: Takes the steps with the penalty.
        weights: The penalised weights, each with the number of its leading axes that count neurons.
        keep: What is kept of the penalised step. "direction": norms are put back to those without
            the penalty, so it turns neurons and makes none longer. "length": the directions are
            those without the penalty, so it makes neurons longer and turns none.
    """

    def __init__(
        self, optimizer: Optimizer, weights: Sequence[tuple[Tensor, int]], keep: Part
    ) -> None:
        self.optimizer = optimizer
        self.twin = copy.deepcopy(optimizer)
        self.keep = keep
        self._own = _parameters(optimizer)
        self._twins = _parameters(self.twin)
        twin_of = dict(zip(map(id, self._own), self._twins, strict=True))
        self._pairs = [(weight, twin_of[id(weight)], axes) for weight, axes in weights]

    @torch.no_grad()
    def before_penalty(self) -> None:
        """Give the twin the weights, the learning rates and the task's gradients of this step."""
        for group, other in zip(self.optimizer.param_groups, self.twin.param_groups, strict=True):
            other["lr"] = group["lr"]
        torch._foreach_copy_(self._twins, self._own)
        for parameter, twin in zip(self._own, self._twins, strict=True):
            twin.grad = None if parameter.grad is None else parameter.grad.clone()

    @torch.no_grad()
    def after_step(self) -> None:
        """Let the twin take its step, and put both halves together in the weights."""
        self.twin.step()
        for weight, twin, axes in self._pairs:
            factor = _norms(weight, axes) / _norms(twin, axes)
            # Of a neuron that is zero in one of the two, neither a direction nor a factor is known.
            factor = torch.where(factor.isfinite() & (factor > 0), factor, 1.0)
            if self.keep == "direction":
                weight.div_(factor)
            else:
                torch.mul(twin, factor, out=weight)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        found += group["params"]
    return found


def _norms(weight: Tensor, axes: int) -> Tensor:
    """Norms of neurons, with the shape of the weight but for sizes of 1."""
    rest = tuple(range(axes, weight.ndim))
    return torch.linalg.vector_norm(weight, dim=rest, keepdim=True)
