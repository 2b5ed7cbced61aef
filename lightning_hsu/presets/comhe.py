"""The published formulas of compressive energy: half-space energy of projected neurons."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._checks import check_count, check_number
from lightning_hsu._core import seeded_noise
from lightning_hsu.measures import Measure
from lightning_hsu.measures.state import State, counts_draws, draw_of, next_draw
from lightning_hsu.presets.base import (
    WEIGHT_DECAY,
    OfficialMeasure,
    has_shapes,
    kept,
    normalised,
    pair_cosines,
    wide,
)
from lightning_hsu.presets.pairs import OfficialMHE

_PLAIN = OfficialMHE("2", half_space=True)


class _CoMHE(OfficialMeasure):
    """Energy of projected neurons, in half space.

    The head, and layers of ``dim`` dimensions or less, are not projected.
    """

    dim: int

    half_space = True

    def formula(self, w: Tensor, state: State) -> Tensor:
        """Mean over the projections (b, count, dim, d) of the half-space energy."""
        if self.as_it_is(w):
            return _PLAIN.formula(w, {})
        return _PLAIN.formula(w[:, None] @ self.projections(w, state).mT, {}).mean(-1)

    @abstractmethod
    def projections(self, w: Tensor, state: State) -> Tensor:
        """Return the projections (b or 1, count, dim, d)."""

    def for_head(self) -> Measure:
        """Return the plain energy in full space."""
        return OfficialMHE("2", half_space=False)

    def as_it_is(self, x: Tensor) -> bool:
        """Whether the neurons (..., n, d) are not projected."""
        return x.shape[-1] <= self.dim


@dataclass(frozen=True)
class OfficialRandomCoMHE(_CoMHE):
    """Energy of randomly projected neurons as ``rmlin/CoMHE`` computes it.

    The official file is random_projection/architecture.py. The value is the mean over 20
    projections to 40 dimensions, drawn anew from N(0, 1) at each step: the seeds in the official
    code fix the sequence of draws, not a single draw. The draws here are also seeded, but are
    different numbers. The official code does not project the first layer, which has 27 dimensions;
    here layers of ``dim`` dimensions or less are not projected. It takes ``count`` n x n matrices.

    ``Projected`` with a ``RandomProjection`` of :mod:`lightning_hsu.projections` normalises the
    neurons first and has no 1e-4 inside the norms.

    Args:
        dim: Dimension to project to.
        count: Number of projections.

    Raises:
        ValueError: for a dim or a count below 1.

    Example:
        >>> import torch
        >>> measure, x = OfficialRandomCoMHE(), torch.randn(32, 64)
        >>> state = measure.prepare(x)  # draw 0; the next call with this state counts on
        >>> bool(0.5 < measure.penalty(x, state) < 0.6)
        True
    """

    dim: int = 40
    count: int = 20

    def __post_init__(self) -> None:
        check_count("dim", self.dim)
        check_count("count", self.count)

    def prepare(self, x: Tensor, state: State | None = None) -> State:
        """Number the draw."""
        return next_draw(x, state)

    def goes_on(self, x: Tensor, state: State) -> bool:
        """Tell whether the state counts draws."""
        return counts_draws(x, state)

    def projections(self, w: Tensor, state: State) -> Tensor:
        """The same ones for all groups."""
        return seeded_noise(
            1, self.count, self.dim, w.shape[-1], like=w.detach(), draw=draw_of(state)
        )


@dataclass(frozen=True)
class TrainedCoMHE(_CoMHE):
    """One projection for each group, trained by plain SGD.

    The penalty is taken one more SGD step ahead, and is differentiated through this step.
    """

    dim: int = 30
    inner_lr: float = 0.1
    inner_steps: int = 1

    def __post_init__(self) -> None:
        check_count("dim", self.dim)
        check_number("inner_lr", self.inner_lr, "a learning rate > 0", lambda rate: rate > 0)
        check_count("inner_steps", self.inner_steps)

    @abstractmethod
    def loss(self, w: Tensor, projection: Tensor) -> Tensor:
        """Return what the projections (b, dim, d) minimise for neurons w (b, n, d): (b,)."""

    def prepare(self, x: Tensor, state: State | None = None) -> State | None:
        """Train the projections (b, dim, d), with a thousandth of the weight decay."""
        w = wide(x.detach())
        if self.as_it_is(w):
            return None
        if state is not None and self.goes_on(w, state):
            projection = state["projection"].to(w)
        else:
            shape = (w.shape[0], self.dim, w.shape[2])
            projection = seeded_noise(*shape[1:], like=w).expand(shape)
        for _ in range(self.inner_steps):
            slope = self._slope(w, projection) + 1e-3 * WEIGHT_DECAY * projection
            projection = projection - self.inner_lr * slope
        return kept(x, projection=projection)

    def goes_on(self, x: Tensor, state: State) -> bool:
        """Tell whether the state has finite projections of the right shape."""
        shape = (x.shape[:-2].numel(), self.dim, x.shape[-1])
        return has_shapes(state, projection=shape)

    def projections(self, w: Tensor, state: State) -> Tensor:
        """One step further than the state; the neurons' gradient goes through this step."""
        projection = state["projection"].to(w)
        return (projection - self.inner_lr * self._slope(w, projection))[:, None]

    def _slope(self, w: Tensor, projection: Tensor) -> Tensor:
        slope: Tensor = torch.func.grad(lambda p: self.loss(w, p).sum())(projection)
        return slope


@dataclass(frozen=True)
class OfficialAngleCoMHE(TrainedCoMHE):
    """Energy of neurons projected with their angles kept, as ``rmlin/CoMHE`` computes it.

    The official folder is angle_projection. Before each step of the network the projection takes
    one step of SGD down the Frobenius norm of the change in cosines. The penalty is taken one such
    step further, without weight decay, and the neurons' gradients go through that step. The start
    is N(0, 1). Layers of ``dim`` dimensions or less are not projected.

    ``Projected`` with ``AnglePreserving`` of :mod:`lightning_hsu.projections` holds the projection
    fixed in the penalty, normalises the neurons first and chooses the length of the projection's
    steps itself.

    Args:
        dim: Dimension to project to.
        inner_lr: Learning rate of the projection; as published, that of the network.
        inner_steps: Steps of the projection before each step of the network.

    Raises:
        ValueError: for a setting out of range.

    Example:
        >>> import torch
        >>> OfficialAngleCoMHE().prepare(torch.randn(32, 64))["projection"].shape
        torch.Size([1, 30, 64])
    """

    def loss(self, w: Tensor, projection: Tensor) -> Tensor:
        """Norm of the change in cosines."""
        before, after = normalised(w), normalised(w @ projection.mT)
        change: Tensor = torch.linalg.matrix_norm(after @ after.mT - before @ before.mT)
        return change


@dataclass(frozen=True)
class OfficialAdversarialCoMHE(TrainedCoMHE):
    """Energy of adversarially projected neurons as ``rmlin/CoMHE`` computes it.

    The official folder is adversarial_projection. Before each step of the network the projection
    takes ten steps of SGD up the full-space energy with s = 2 of the projected neurons. The
    penalty, in half space, is taken one such step further, without weight decay, and the neurons'
    gradients go through that step. The start is N(0, 1). Layers of ``dim`` dimensions or less are
    not projected.

    ``Projected`` with ``Adversarial`` of :mod:`lightning_hsu.projections` maximises the measure
    that is penalised, holds the projection fixed in the penalty and its rows orthonormal, and
    chooses the length of its steps itself.

    Args:
        dim: Dimension to project to.
        inner_lr: Learning rate of the projection; as published, that of the network.
        inner_steps: Steps of the projection before each step of the network.

    Raises:
        ValueError: for a setting out of range.

    Example:
        >>> import torch
        >>> OfficialAdversarialCoMHE().for_head()
        OfficialMHE(power='2', half_space=False)
    """

    inner_steps: int = 10

    def loss(self, w: Tensor, projection: Tensor) -> Tensor:
        """Minus the full-space energy."""
        cosine = pair_cosines(normalised(w @ projection.mT), half_space=False)
        return -(2.0 - 2.0 * cosine).reciprocal().mean(-1)
