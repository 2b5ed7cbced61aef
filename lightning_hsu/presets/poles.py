"""The published formulas of polarization, covering and relaxed polarization."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu._checks import check_count, check_flag, check_number
from lightning_hsu._core import seeded_noise
from lightning_hsu.measures.state import State
from lightning_hsu.presets.base import (
    MOMENTUM,
    WEIGHT_DECAY,
    OfficialMeasure,
    has_shapes,
    kept,
    normalised,
    wide,
)


@dataclass(frozen=True)
class PoledMeasure(OfficialMeasure):
    """A measure at one pole (d,) for each group.

    The pole starts as N(0, 1) and follows the neurons by SGD with momentum.

    Attributes:
        coefficients: The coefficients of hidden layers and of the head; they also scale the steps
            of the pole.
    """

    coefficients: ClassVar[tuple[float, float]]
    half_space: bool = True
    inner_lr: float = 0.1
    inner_steps: int = 10

    def __post_init__(self) -> None:
        check_flag("half_space", self.half_space)
        check_number("inner_lr", self.inner_lr, "a learning rate > 0", lambda rate: rate > 0)
        check_count("inner_steps", self.inner_steps)

    @abstractmethod
    def at_pole(self, unit: Tensor, pole: Tensor) -> Tensor:
        """Return the penalty (b,) of twice normalised rows (b, n, d) at poles (b, d)."""

    def prepare(self, x: Tensor, state: State | None = None) -> State:
        """Train the poles (b, d), which raise what the neurons lower; keep their velocities."""
        unit = normalised(normalised(wide(x.detach())))
        shape = (unit.shape[0], unit.shape[2])
        if state is not None and self.goes_on(x, state):
            pole = state["pole"].to(unit)
            velocity = state["velocity"].to(unit)
        else:
            pole = seeded_noise(shape[1], like=unit).expand(shape)
            velocity = unit.new_zeros(shape)
        hidden, head = self.coefficients
        coefficient = hidden if self.half_space else head

        def loss(pole: Tensor) -> Tensor:
            decay = WEIGHT_DECAY / 2 * pole.square().sum()
            return decay - coefficient * self.at_pole(unit, pole).sum()

        for _ in range(self.inner_steps):
            velocity = MOMENTUM * velocity + torch.func.grad(loss)(pole)
            pole = pole - self.inner_lr * velocity
        return kept(x, pole=pole, velocity=velocity)

    def goes_on(self, x: Tensor, state: State) -> bool:
        """Tell whether the state has finite poles and velocities of the right shape."""
        shape = (x.shape[:-2].numel(), x.shape[-1])
        return has_shapes(state, pole=shape, velocity=shape)

    def formula(self, w: Tensor, state: State) -> Tensor:
        """The penalty at the present pole, which is held fixed."""
        return self.at_pole(normalised(normalised(w)), state["pole"].to(w))

    def _squared_chords(self, unit: Tensor, pole: Tensor) -> Tensor:
        """Squared chords (b, n or 2n) from the neurons, in half space also the negated ones."""
        cosine = (unit @ normalised(pole)[..., None]).squeeze(-1)
        if self.half_space:
            cosine = torch.cat([cosine, -cosine], -1)
        return 2.0 - 2.0 * cosine


@dataclass(frozen=True)
class OfficialMHP(PoledMeasure):
    """Polarization as ``wy1iu/Sphere-Uniformity`` computes it (mhp/architecture.py, mhp/train.py).

    Training maximises the mean of ``1 / D``, where D is the squared chord from a neuron to the
    pole. Before each step of the network, the pole takes ten steps of SGD with momentum 0.9 down
    the same mean, times the coefficient and with weight decay 5e-4. Rows are normalised twice.

    ``Polarization`` of :mod:`lightning_hsu.measures` looks for the pole where the potential is
    lowest, from several starts; a single pole that is carried along stays in one basin. With fewer
    neurons than dimensions the pole ends up orthogonal to all of them, where the half-space penalty
    no longer has a gradient.

    Args:
        half_space: Measure the 2n neurons ``w`` and ``-w``.
        inner_lr: Learning rate of the pole; as published, that of the network.
        inner_steps: Steps of the pole before each step of the network.

    Raises:
        ValueError: for a setting out of range.

    Example:
        >>> import torch
        >>> measure, x = OfficialMHP(), torch.randn(32, 16)
        >>> state = measure.prepare(x)  # and at the next step measure.prepare(x, state)
        >>> measure.penalty(x, state).shape, state["pole"].shape
        (torch.Size([]), torch.Size([1, 16]))
    """

    higher_is_better: ClassVar[bool] = True
    coefficients: ClassVar[tuple[float, float]] = (1.0, 10.0)

    def at_pole(self, unit: Tensor, pole: Tensor) -> Tensor:
        """Minus the mean inverse squared chord."""
        return -self._squared_chords(unit, pole).reciprocal().mean(-1)


@dataclass(frozen=True)
class OfficialMHC(PoledMeasure):
    """Covering as ``wy1iu/Sphere-Uniformity`` computes it (mhc/architecture.py, mhc/train.py).

    Training minimises the soft minimum ``-log(mean(exp(-10 D))) / 10``, where D is the squared
    chord from a neuron to the pole. Before each step of the network, the pole takes ten steps of
    SGD with momentum 0.9 up the same soft minimum, times the coefficient and with weight decay
    5e-4. Rows are normalised twice.

    ``Covering`` of :mod:`lightning_hsu.measures` is the angle from the deepest hole that it finds,
    from several starts, to the nearest neuron; a single pole that is carried along stays in one
    basin. With fewer neurons than dimensions the pole ends up orthogonal to all of them, where the
    half-space penalty no longer has a gradient.

    Args:
        half_space: Measure the 2n neurons ``w`` and ``-w``.
        inner_lr: Learning rate of the pole; as published, that of the network.
        inner_steps: Steps of the pole before each step of the network.

    Raises:
        ValueError: for a setting out of range.

    Example:
        >>> import torch
        >>> bool(0 < OfficialMHC()(torch.randn(32, 16)) < 4)
        True
    """

    coefficients: ClassVar[tuple[float, float]] = (0.01, 0.1)

    def at_pole(self, unit: Tensor, pole: Tensor) -> Tensor:
        """The soft minimum of the squared chords."""
        squared = self._squared_chords(unit, pole)
        return (math.log(squared.shape[-1]) - torch.logsumexp(-10.0 * squared, -1)) / 10.0


@dataclass(frozen=True)
class OfficialRMHP(OfficialMeasure):
    """Relaxed polarization as ``wy1iu/Sphere-Uniformity`` computes it (r_mhp/architecture.py).

    It is the length of the sum of the neurons, not normalised and never in half space, so that
    making the neurons shorter also lowers it. ``ResultantLength`` of :mod:`lightning_hsu.measures`
    is that of the unit neurons.

    Example:
        >>> import torch
        >>> float(OfficialRMHP()(2 * torch.ones(5, 1)))
        10.0
    """

    def formula(self, w: Tensor, state: State) -> Tensor:
        """Length of the sum."""
        length: Tensor = torch.linalg.vector_norm(w.sum(1), dim=-1)
        return length

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """NaN: the value depends on the norms, so random neurons are no reference."""
        return torch.full_like(value, math.nan)
