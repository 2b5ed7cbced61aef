"""Measures of nearest neighbours: separation (MHS), mean minimal angle (MMA) and KoLeo."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu._checks import check_flag, check_hashable, check_kernel, check_softening
from lightning_hsu._core import FLOOR, PairTerm, working_dtype
from lightning_hsu._core.levenshtein import cap_angle, largest_cosine
from lightning_hsu._core.near import COINCIDENT, NEAR
from lightning_hsu._core.nearest import NearestTerm, nearest_energy
from lightning_hsu._core.neighbours import nearer, tie_tolerance
from lightning_hsu._core.sphere import seeded_noise, separating_tangents
from lightning_hsu.measures.sphere import SphereMeasure
from lightning_hsu.measures.state import State


class NearestMeasure(SphereMeasure):
    """A kernel at the nearest pair, or its mean over neurons, each with its nearest neighbour.

    A new member needs one method, :meth:`kernel`. Neighbours whose squared chords agree to 64
    rounding errors of float32, or to 1e-9 for float64 neurons, are tied: value and gradient are the
    means over them, so that a regular simplex stays where it is. Exactly coincident neurons are
    pushed apart along a seeded direction, with the force that the kernel has at a chord of
    ``softening``, or of 1e-6 if that is larger.

    Attributes:
        half_space: Whether to take the nearer of a neuron and its mirror image, as between lines.
        every_neuron: Whether to take the mean over neurons; otherwise only the nearest pair counts.
        softening: The chord below which the kernel softens itself, if it does.
    """

    in_float64: ClassVar[bool] = True
    every_neuron: ClassVar[bool] = False
    half_space: bool = False
    softening: float = 0.0

    @abstractmethod
    def kernel(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the penalty of a neuron and its nearest neighbour, and its slope.

        Both are finite, for coincident and opposite neurons too.

        Args:
            q: Squared chords ``|x_i - x_j|**2 = 2 - 2 cos``, any shape, in [0, 4]; in half space in
                [0, 2].
            p: Squared chords ``|x_i + x_j|**2 = 4 - q``, as exact near 0 as q is.

        Returns:
            The value and its derivative with respect to q, elementwise, out of place. For second
            derivatives the value must be differentiable by autograd.
        """

    def closed_form(self, x: Tensor, state: State | None) -> tuple[Tensor, Tensor] | None:
        """One pass of about n n d FLOP."""
        return nearest_energy(x, self._term())

    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Penalty (b,) of unit rows x (b, n, d); the state may hold a tolerance for ties (b,)."""
        tie = tie_tolerance(x.dtype)
        if state is not None and "tie" in state:
            tie = float(state["tie"].amax())
        x = x.double()
        near, far, sign = nearer(_chords(x, x), _chords(x, -x), self.half_space, tie)
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        distance = near.detach().masked_fill(itself, float("inf"))
        over = -1 if self.every_neuron else (-2, -1)
        tied = distance <= distance.amin(over, keepdim=True) * (1.0 + tie)
        weight = tied / tied.sum(over, keepdim=True, dtype=torch.float64)
        if self.every_neuron:
            weight = weight / x.shape[1]
        value, _ = self.kernel(torch.where(tied, near, 2.0), torch.where(tied, far, 2.0))
        coincident = distance < COINCIDENT
        return (weight * value).sum((-2, -1)) + self._push(x, weight * sign * coincident)

    def _prepared(self, x: Tensor, state: State | None) -> State | None:
        """The state, and the tolerance for ties in the precision of x, not of its unit rows."""
        tie = tie_tolerance(working_dtype(x.dtype))
        ties = torch.full((x.shape[:-2].numel(),), tie, dtype=torch.float64)
        return {**(super()._prepared(x, state) or {}), "tie": ties}

    def _push(self, x: Tensor, weight: Tensor) -> Tensor:
        """Zero (b,), with the gradient that separates coincident neurons.

        Args:
            x: Unit rows, shape (b, n, d).
            weight: Signed weights of the coincident pairs, shape (b, n, n).
        """
        weight = weight + weight.mT
        noise = seeded_noise(*x.shape[1:], like=x.detach())
        tangents = separating_tangents(
            x.detach(), -weight @ noise, weight.abs().sum(-1, keepdim=True), noise
        )
        return self._term().force() * (tangents * (x - x.detach())).sum((-2, -1))

    def grad_flops(self, n: int, d: int) -> float:
        """The upper triangle of the cosines."""
        return 1.0 * n * n * d

    def _term(self) -> NearestTerm:
        check_hashable(self)
        return _term_of(self)


@lru_cache(maxsize=1024)
def _term_of(measure: NearestMeasure) -> NearestTerm:
    check_kernel(measure)
    knee = max(measure.softening, FLOOR)
    return NearestTerm(measure.kernel, measure.half_space, measure.every_neuron, knee)


@dataclass(frozen=True)
class Separation(NearestMeasure):
    r"""Smallest angle between two neurons, in radians (MHS); large when no two are alike.

    Its gradient moves only the nearest two neurons. If several pairs are tied, it moves all of
    them, each by its share.

    Args:
        half_space: Measure the angle between lines, in [0, pi / 2]: opposite neurons coincide.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...) in [0, pi]. Zero rows take
        no part; fewer than two neurons have the value 0.

    Raises:
        ValueError: for a half_space that is neither True nor False.

    Reference:
        Liu et al., "Learning with Hyperspherical Uniformity", AISTATS 2021, arXiv 2103.01649.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import Separation
        >>> round(float(Separation()(torch.eye(4)).rad2deg()), 4)
        90.0
    """

    higher_is_better: ClassVar[bool] = True

    half_space: bool = False

    def __post_init__(self) -> None:
        check_flag("half_space", self.half_space)

    def kernel(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the angle, and its slope."""
        return _minus_angle(q, p)

    def bound(self, n: int, d: int) -> float | None:
        """Levenshtein's bound; for lines also Welch's. None below 2 neurons or dimensions."""
        if n < 2 or d < 2:
            return None
        if not self.half_space:
            return math.acos(largest_cosine(n, d))
        if n <= d:
            return math.pi / 2
        return math.acos(max(math.sqrt((n - d) / (d * (n - 1))), largest_cosine(2 * n, d)))


@dataclass(frozen=True)
class MinimalAngle(NearestMeasure):
    r"""Mean over neurons of the angle to the nearest other neuron, in radians (MMA).

    It is large when all neurons keep their distance. Where several neighbours are equally near, the
    gradient is the mean of theirs.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...) in [0, pi]. Zero rows take
        no part; fewer than two neurons have the value 0.

    Reference:
        Wang et al., "MMA Regularization: Decorrelating Weights of Neural Networks by Maximizing the
        Minimal Angles", NeurIPS 2020, arXiv 2006.06527.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import MinimalAngle
        >>> neurons = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [-3.0, 0.0]])
        >>> round(float(MinimalAngle()(neurons).rad2deg()), 4)  # of 90, 90, 0 and 0 degrees
        45.0
    """

    higher_is_better: ClassVar[bool] = True
    every_neuron: ClassVar[bool] = True

    def kernel(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the angle, and its slope."""
        return _minus_angle(q, p)

    def bound(self, n: int, d: int) -> float | None:
        """Return the smaller of two bounds, which only two neurons attain.

        Caps of half the nearest angle around each neuron do not overlap. And the mean cosine of the
        nearest angles is at least -1 / (n - 1), so the mean angle lies below the concave envelope
        of arccos there.
        """
        if n < 2 or d < 2:
            return None
        # The envelope begins with the line from (-1, pi) that touches arccos; its slope is rounded
        # towards 0.
        slope = 1.3800
        return min(2.0 * cap_angle(1.0 / n, d), math.pi - slope * (1.0 - 1.0 / (n - 1)))


@dataclass(frozen=True)
class KoLeo(NearestMeasure):
    r"""Mean over neurons of ``-log`` of the chord to the nearest other neuron (KoLeo).

    It is small when all neurons keep their distance. It is the Kozachenko-Leonenko estimate of the
    entropy, up to sign and constants, and without the original's factor n in the logarithm, as in
    DINOv2. Where several neighbours are equally near, the gradient is the mean of theirs.

    Args:
        softening: Chord in [0, 2) below which the logarithm continues as its tangent line in the
            squared chord. Exactly equal neurons feel the force at that chord along a seeded
            direction. 0 switches it off for chords above 1e-6.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...) >= -log(2). Zero rows take
        no part; fewer than two neurons have the value 0.

    Raises:
        ValueError: for a softening outside [0, 2).

    Reference:
        Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019, arXiv 1806.03198;
        Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024,
        arXiv 2304.07193.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import KoLeo
        >>> round(float(KoLeo()(torch.eye(4))), 4)  # chord sqrt(2)
        -0.3466
    """

    every_neuron: ClassVar[bool] = True

    softening: float = 1e-2

    def __post_init__(self) -> None:
        check_softening(self.softening)

    def kernel(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the logarithm of the chord, softened, and its slope."""
        return PairTerm(_minus_log, softening=self.softening).softened(q, p)

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """Geometric mean chord of random neurons over that of these."""
        return (value - reference).exp()

    def bound(self, n: int, d: int) -> float | None:
        """Return the larger of two bounds.

        One follows from the mean squared chord, which is at most 2 + 2 / (n - 1), the other from
        the mean angle.
        """
        if n < 2 or d < 2:
            return None
        chord = 2.0 * math.sin(cap_angle(1.0 / n, d))
        by_square = -0.5 * math.log(2.0 + 2.0 / (n - 1))
        # Below the softening the kernel is not convex in the angle. The second bound holds if the
        # kernel's tangent at this angle stays below it there.
        if chord < math.e * self.softening:
            return by_square
        return max(by_square, -math.log(chord))


def _chords(x: Tensor, y: Tensor) -> Tensor:
    """Squared chords (b, n, n) from unit rows x to unit rows y, both (b, n, d) float64.

    Twice differentiable. Chords come from cosines, in O(n n) memory; near ones, for which cosines
    lose digits, from differences.
    """
    q = 2.0 - 2.0 * x @ y.mT
    group, i, j = (q.detach() < NEAR).nonzero(as_tuple=True)
    return q.index_put((group, i, j), (x[group, i] - y[group, j]).square().sum(-1))


def _minus_angle(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the angle, and its slope, which is finite at 0 and at pi."""
    angle = 2.0 * torch.atan2(_root(q), _root(p))
    slope = (q.clamp_min(COINCIDENT) * p.clamp_min(COINCIDENT)).rsqrt()
    return -angle, -slope


def _root(q: Tensor) -> Tensor:
    """Square root, constant for autograd where its slope would be unbounded."""
    return torch.where(q < COINCIDENT, q.detach().sqrt(), q.clamp_min(COINCIDENT).sqrt())


def _minus_log(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    return -0.5 * q.log(), -0.5 / q
