"""Projections that are learned during training, one matrix for each group of neurons."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu._checks import check_count
from lightning_hsu._core import seeded_noise, unit_rows
from lightning_hsu.measures import Measure, State
from lightning_hsu.projections.kinds import Projection

_SAMPLE = 512  # neurons that a projection is learned from


class _Learned(Projection):
    """One matrix (dim, d) for each group, refined by some steps of descent at each training step.

    Attributes:
        steps: Steps at each training step.
        fresh: Steps of a fresh start, if this is more.
    """

    steps: int
    fresh: ClassVar[int]

    def __post_init__(self) -> None:
        check_count("dim", self.dim, 2)
        check_count("steps", self.steps)

    def prepare(self, x: Tensor, measure: Measure, state: State | None) -> State:
        """The matrices, and the current step lengths."""
        x = x[:, :: math.ceil(x.shape[1] / _SAMPLE)]
        shape = (len(x), self.dim, x.shape[-1])
        steps = self.steps
        if state is not None:
            matrix = state["matrix"].to(x)
            length = state["length"].to(x)
        else:
            matrix = seeded_noise(*shape[1:], like=x).expand(shape)
            length = x.new_full(shape[:1], 0.1)
            steps = max(self.fresh, self.steps)
        loss = self.objective(x, measure)
        matrix, length = _descend(loss, self.retract(matrix), length, steps, self.retract)
        return {"matrix": matrix, "length": length}

    def fits(self, x: Tensor, state: State) -> bool:
        """Tell whether the state has finite matrices of the right shape."""
        if set(state) != {"matrix", "length"} or state["length"].shape != x.shape[:1]:
            return False
        if state["matrix"].shape != (len(x), self.dim, x.shape[-1]):
            return False
        return bool(state["matrix"].isfinite().all())

    def goes_on(self, x: Tensor, state: State) -> bool:
        """Tell whether the state has matrices of the fixed scale, and step lengths."""
        if not self.fits(x, state):
            return False
        matrix, length = state["matrix"], state["length"]
        if not matrix.is_floating_point() or not length.is_floating_point():
            return False
        if not bool(((length > 0) & (length <= 1)).all()):
            return False
        with torch.no_grad():
            matrix = matrix.double()
            return torch.allclose(self.retract(matrix), matrix, rtol=0.0, atol=1e-3)

    def project(self, x: Tensor, state: State) -> Tensor:
        """Project with the learned matrix."""
        return (x @ state["matrix"].to(x).mT)[:, None]

    def prepare_flops(self, n: int, d: int) -> float:
        """Return the FLOP of a fresh start: two products and two measures a step."""
        steps, sample = max(self.fresh, self.steps), min(n, _SAMPLE)
        return 8.0 * steps * sample * self.dim * (d + sample)

    @abstractmethod
    def objective(self, x: Tensor, measure: Measure) -> Callable[[Tensor], Tensor]:
        """Return what the matrices minimise for unit rows x (b, n, d).

        It is a function of matrices (b, dim, d) to values (b,).
        """

    @abstractmethod
    def retract(self, matrix: Tensor) -> Tensor:
        """Return matrices with the same loss and a fixed scale, which the loss ignores."""


@dataclass(frozen=True)
class AnglePreserving(_Learned):
    """The projection that keeps the cosines best, in the mean square, learned in training.

    Args:
        dim: Dimension to project to, at least 2; 30 as published.
        steps: Steps of descent at each training step, at least 1; 1 as published.

    Raises:
        ValueError: for a dim or steps that are too small.
    """

    fresh: ClassVar[int] = 50
    dim: int = 30
    steps: int = 1

    def objective(self, x: Tensor, measure: Measure) -> Callable[[Tensor], Tensor]:
        """Mean squared change of the cosines."""
        cosine = x @ x.mT

        def change(matrix: Tensor) -> Tensor:
            y = unit_rows(x @ matrix.mT)[0]
            return (y @ y.mT - cosine).square().mean((-2, -1))

        return change

    def retract(self, matrix: Tensor) -> Tensor:
        """Cosines do not depend on the scale."""
        scaled: Tensor = matrix / torch.linalg.matrix_norm(matrix, keepdim=True)
        return scaled


@dataclass(frozen=True)
class Adversarial(_Learned):
    """A subspace in which the neurons are least uniform, learned in training, which spreads them.

    Its rows are orthonormal: otherwise the projection would shrink to one direction, in which all
    neurons coincide. Take few steps: an exhaustive search would only find a subspace in which two
    neurons coincide. The longer the search, the worse its subspace, so there is no random
    reference, and ratio and score are NaN. Each step evaluates the measure twice from scratch, so
    do not use it with Polarization and Covering, which run searches of their own. Start with a
    coefficient of about 0.01.

    Args:
        dim: Dimension to project to, at least 2; 30 as published.
        steps: Steps of ascent at each training step, at least 1; 10 as published.

    Raises:
        ValueError: for a dim or steps that are too small.
    """

    comparable: ClassVar[bool] = False
    fresh: ClassVar[int] = 1
    dim: int = 30
    steps: int = 10

    def objective(self, x: Tensor, measure: Measure) -> Callable[[Tensor], Tensor]:
        """The negative penalty of the projected neurons."""
        return lambda matrix: -measure.penalty(x @ matrix.mT)

    def retract(self, matrix: Tensor) -> Tensor:
        """The nearest rows in the same order that are orthonormal."""
        basis, triangle = torch.linalg.qr(matrix.mT)
        nearest: Tensor = (basis * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT
        return nearest


def _descend(
    loss: Callable[[Tensor], Tensor],
    matrix: Tensor,
    length: Tensor,
    steps: int,
    retract: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Descend along the normalised gradient of each matrix, with a step length that adapts.

    Args:
        loss: Maps matrices to values (b,).
        matrix: The matrices to start with, (b, dim, d).
        length: The step lengths to start with, (b,), relative to the norm of the matrix. If the
            loss falls, the step is taken and the next one is longer; otherwise it is not taken and
            the next one is half as long.
        steps: How many steps to try.
        retract: Fixes the scale after each step.

    Returns:
        The matrices and the step lengths.
    """
    for _ in range(steps):
        with torch.enable_grad():
            leaf = matrix.detach().requires_grad_()
            before = loss(leaf)
            (grad,) = torch.autograd.grad(before.sum(), leaf)
        slope = torch.linalg.matrix_norm(grad).clamp_min(torch.finfo(grad.dtype).tiny)
        scale = torch.linalg.matrix_norm(matrix) / slope
        tried = retract(matrix - (length * scale)[:, None, None] * grad)
        better = loss(tried) < before.detach()
        matrix = torch.where(better[:, None, None], tried, matrix)
        length = torch.where(better, length * 1.5, length * 0.5).clamp(1e-6, 1.0)
    return matrix.detach(), length
