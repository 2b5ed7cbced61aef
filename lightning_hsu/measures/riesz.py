"""Riesz energy: minimum hyperspherical energy (MHE), with half-space and angular variants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_hsu._checks import (
    check_choice,
    check_flag,
    check_number,
    check_softening,
    keep_as_numbers,
)
from lightning_hsu.measures.pairwise import PairwiseMeasure


@dataclass(frozen=True)
class RieszEnergy(PairwiseMeasure):
    r"""Mean Riesz s-energy over unordered pairs of neurons; small when they are spread out.

    With ``rho`` the distance of two neurons on the unit sphere, the kernel is ``rho**-s`` for s >
    0, ``log(1 / rho)`` for s = 0 and ``-rho**-s`` for s < 0.

    Args:
        s: Any finite real number. Larger s gives near pairs more weight; s = 0, 1, 2 are the
            published choices.
        half_space: Measure the 2n points ``x`` and ``-x`` instead: neurons also repel each other's
            mirror images. Computed from one n x n Gram matrix.
        distance: ``"chordal"``, ``rho = |x - y|`` in (0, 2], or ``"geodesic"``, the angle in (0,
            pi].
        softening: Chord in [0, 2) below which the kernel continues as its tangent line in the
            squared chord, so that value and slope stay finite and the slope does not vanish.
            Exactly equal neurons feel the force at that chord along a seeded direction. 0 switches
            it off for chords above 1e-6.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...).

    Raises:
        ValueError: for an s that is not a finite number, an unknown distance or a softening outside
            [0, 2).

    Reference:
        Liu et al., "Learning towards Minimum Hyperspherical Energy", NeurIPS 2018, arXiv
        1805.09298; Liu et al., "Learning with Hyperspherical Uniformity", AISTATS 2021, arXiv
        2103.01649.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import RieszEnergy
        >>> float(RieszEnergy(s=2)(torch.eye(4)))  # orthogonal neurons: squared chord 2
        0.5
        >>> value, grad = RieszEnergy(s=1, half_space=True).value_and_grad(torch.randn(8, 64, 32))
        >>> value.shape, grad.shape
        (torch.Size([8]), torch.Size([8, 64, 32]))
    """

    s: float = 2.0
    half_space: bool = False
    distance: Literal["chordal", "geodesic"] = "chordal"
    softening: float = 1e-2

    def __post_init__(self) -> None:
        check_number(
            "s",
            self.s,
            "a finite real number such as 0, 1 or 2 (0 is the logarithmic energy)",
            lambda s: True,
        )
        check_choice("distance", self.distance, "chordal", "geodesic")
        check_flag("half_space", self.half_space)
        check_softening(self.softening)
        keep_as_numbers(self, "s", "softening")

    def kernel(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope in the squared chord q; finite at the antipode, p = 0."""
        if self.distance == "chordal" and self.s == 2:
            return q.reciprocal(), q.pow(-2).neg_()  # as PairTerm.folded_slope, bit for bit
        if self.distance == "chordal":
            return _powers(q.rsqrt(), self.s)
        guarded = p.clamp_min(1e-12)
        root = torch.where(p < 1e-12, p.detach().sqrt(), guarded.sqrt())
        angle = 2.0 * torch.atan2(q.sqrt(), root)
        value, slope = _powers(angle.reciprocal(), self.s)
        # d angle / d q = 1 / (2 sin angle); _powers gives the slope in the squared angle.
        return value, slope * 2.0 * angle * (q * guarded).rsqrt()

    @property
    def compiled_as(self) -> tuple[str, float]:  # type: ignore[override]
        """The distance and the exponent."""
        return self.distance, float(self.s)

    @property
    def absolutely_monotone(self) -> bool:  # type: ignore[override]
        """Chordal kernels are if s >= -2; powers of the angle are not."""
        return self.distance == "chordal" and self.s >= -2

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """Energy over that of random points; the inverse for s < 0.

        For s = 0 it is the exponential of the difference, the limit of the other cases: the
        geometric mean distance of random points over that of these neurons.
        """
        if self.s == 0:
            return (value - reference).exp()
        if self.s < 0:
            return reference / value
        return value / reference

    def _pair_expectation(self, d: int) -> float:
        if self.s >= d - 1:
            return math.inf
        if self.distance == "chordal":
            return _random_pair(self.s, d)
        return super()._pair_expectation(d)


def _powers(inverse: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Riesz kernel and its slope in the squared distance, from the inverse distance."""
    square = inverse * inverse
    if s == 0:
        return inverse.log(), -0.5 * square
    power = _power(inverse, square, s)
    slope = (power * square).mul_(-0.5 * abs(s))
    if s < 0:
        power = -power
    return power, slope


def _power(inverse: Tensor, square: Tensor, s: float) -> Tensor:
    """The inverse distance to the power s.

    ``pow`` takes as long as the matrix product; roots and products do not.
    """
    if s == 0.5:
        return inverse.sqrt()
    if s == 1:
        return inverse
    if s == 1.5:
        return inverse * inverse.sqrt()
    if s == 2.5:
        return square * inverse.sqrt()
    if s == 3:
        return inverse * square
    if s == 4:
        return square * square
    power: Tensor = inverse.pow(s)
    return power


def _random_pair(s: float, d: int) -> float:
    """Expected chordal kernel of two random points, for s < d - 1."""
    if s == 0:
        psi = torch.digamma(torch.tensor([d - 1.0, (d - 1.0) / 2.0], dtype=torch.float64))
        return -math.log(2.0) + float(psi[0] - psi[1]) / 2.0
    log = (d - 2 - s) * math.log(2.0) + math.lgamma(d / 2) + math.lgamma((d - 1 - s) / 2)
    try:
        size = math.exp(log - math.lgamma(d - 1 - s / 2) - math.log(math.pi) / 2)
    except OverflowError:
        size = math.inf
    return math.copysign(size, s)
