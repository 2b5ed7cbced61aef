"""Polarization (MHP) and covering (MHC): how the neurons look from the loneliest point of the sphere."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu.core import exact_arithmetic
from lightning_hsu.core.holes import SHARED, certain, deepest_holes, height, multipliers, settle, sink
from lightning_hsu.core.levenshtein import cap_angle
from lightning_hsu.core.witness import descend, first_witnesses, lowest_on_circle, orthogonal_to, random_witnesses, shares
from lightning_hsu.measures.base import SphereMeasure, State
from lightning_hsu.measures.checks import check_count, check_flag, check_neurons, check_number
from lightning_hsu.measures.riesz import RieszEnergy

_AFRESH = 20  # times as many steps without a state
_NEAREST = 1e-12  # squared chord below which the kernel stays constant: a witness flees from neurons
_LARGEST = 1e150  # kernels and slopes stay below, so that no product is inf * 0

Solution = tuple[Tensor, Tensor, bool]
"""Witnesses (k, d), the weight (k, m) of each pair of witness and point in the penalty, and whether it is exact."""


class _WitnessMeasure(SphereMeasure):
    """A weighted sum of a kernel between a few witnesses and the points; the state holds the witnesses and the weights."""

    wide: ClassVar[bool] = True
    half_space: bool
    witnesses: int
    steps: int

    @abstractmethod
    def _kernel(self, cosine: Tensor) -> Tensor:
        """What a witness and a point at this cosine add to the penalty; differentiable."""

    @abstractmethod
    def _solve(self, x: Tensor, start: Tensor, steps: int) -> Solution:
        """Find the witnesses of points x (m, d), from those in start (k, d) unless there is an exact way."""

    def prepare(self, x: Tensor, state: State | None = None) -> State:
        """Solve the inner problem at x (..., n, d): find the witnesses.

        Args:
            x: Neurons.
            state: What the last step's call returned: its witnesses go on from where they are, the worst one from a
                new place. One that does not fit is replaced by a fresh start, with 20 times as many steps.

        Returns:
            ``points`` (b, k, d), the witnesses of the b groups; ``weights`` (b, k, m), the part of each witness and
            point in the penalty; ``exact`` (b,), whether the value is proven to be that of the definition; ``step``
            (b,), how many calls came before. The value at x is that of x with these witnesses held fixed.
        """
        check_neurons(x)
        with torch.no_grad():
            unit, inverse_norm = self._unit(x)
            alive = inverse_norm.squeeze(-1) > 0
            known = state if state is not None and self._goes_on(state, unit) else None
            with exact_arithmetic(unit):
                found = [self._of_group(rows[alive[i]], i, known) for i, rows in enumerate(unit)]
            step = torch.zeros(len(unit), dtype=torch.int64) if known is None else known["step"].cpu() + 1
            most = max([self.witnesses, *(len(points) for points, _, _ in found)])
            points = unit.new_zeros(len(unit), most, unit.shape[2])  # zero rows where a group has fewer
            weights = unit.new_zeros(len(unit), most, self._mirrored(unit).shape[1])
            for i, (own, its, _) in enumerate(found):
                points[i, : len(own)] = own
                weights[i, : len(own), : its.shape[1]] = its
        return {"points": points, "weights": weights, "exact": torch.tensor([e for _, _, e in found]), "step": step}

    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Penalty (b,) of unit rows x (b, n, d): a sum over witnesses and points, the witnesses held fixed."""
        assert state is not None
        points, weights = state["points"].to(x.device), state["weights"].to(x.device)
        used = (weights != 0).any(2).any(0)
        cosine = points[:, used] @ self._mirrored(x).mT  # (b, k, m)
        return (weights[:, used, : cosine.shape[2]] * self._kernel(cosine)).sum((1, 2))

    def fits(self, x: Tensor, state: State) -> bool:
        """Whether the state has witnesses and weights for all neurons of x (..., n, d)."""
        if set(state) != {"points", "weights", "exact", "step"} or not super().fits(x, state):
            return False
        b, n, d = x.shape[:-2].numel(), *x.shape[-2:]
        k, m = state["points"].shape[1], 2 * n if self.half_space else n
        return state["points"].shape == (b, k, d) and state["weights"].shape == (b, k, m)

    def work(self, n: int, d: int) -> float:
        """A fresh search, and the systems that exact solutions take."""
        return 4.0 * _AFRESH * self.steps * self.witnesses * n * d + 20.0 * n * n * max(min(n, 3 * d), d)

    def _goes_on(self, state: State, x: Tensor) -> bool:
        """Whether the search can start from the witnesses of a state, even of other neurons or another number of them."""
        points, step = (state.get(name, torch.empty(0)) for name in ("points", "step"))
        same = points.ndim == 3 and points.shape[::2] == x.shape[::2] and points.shape[1] >= self.witnesses
        return same and step.shape == x.shape[:1] and bool(points.isfinite().all())

    def _of_group(self, x: Tensor, group: int, known: State | None) -> Solution:
        """The solution for live unit rows x (n, d) of one group."""
        if len(x) == 0:
            return x.new_zeros(1, x.shape[1]), x.new_zeros(1, 0), False
        x = self._mirrored(x)
        start = x.new_zeros(1, 1) if known is None else known["points"][group, : self.witnesses].to(x, copy=True)
        if known is None or not bool(start.any(1).all()):
            return self._solve(x, first_witnesses(x, self.witnesses), _AFRESH * self.steps)
        worst = int(self._heights(x, start).argmax())
        start[worst] = random_witnesses(1, x, 1 + int(known["step"][group]))[0]
        return self._solve(x, start, self.steps)

    @abstractmethod
    def _heights(self, x: Tensor, v: Tensor) -> Tensor:
        """What the witnesses v (k, d) make small among points x (m, d): (k,)."""

    def _mirrored(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], -2) if self.half_space else x


@dataclass(frozen=True)
class Polarization(_WitnessMeasure):
    r"""Mean kernel between the neurons and the point of the sphere where it is smallest (MHP); large when no place is lonely.

    The value is the minimum over unit vectors v of the mean over neurons of K(x_i, v), with ``rho`` the chord from x_i
    to v and ``K = rho**-s`` for s > 0, ``log(1 / rho)`` for s = 0. Higher is better; the penalty is minus the value.

    The minimum is found by :meth:`prepare`, from several witnesses at once, and its gradient is that of the mean
    kernel at the best witness (witnesses that tie share it), held fixed. The value is exact, to 1e-6 or so, where it can
    be proven: in two dimensions, where each arc between neighbours holds one minimum; where the kernel, being
    convex in the cosine, shows that no v is lower, as for most layers with n <= d; in half space with n < d, where some v
    is orthogonal to all neurons and the gradient is zero. Else it is an upper bound of the minimum, tight if one of
    the witnesses found the right hole::

        state = measure.prepare(x)
        value, exact = measure(x, state), state["exact"]

    Evaluate with the state prepared at the same x. A second derivative is that with the witnesses fixed.

    Args:
        s: A number in [0, 100]. Larger s weighs near neurons more; s = 0, 1, 2 are the published choices.
        half_space: Measure the 2n points ``x`` and ``-x`` instead.
        witnesses: How many witnesses look for the minimum, >= 1.
        steps: Steps of each witness in each training step, >= 1; a fresh start takes 20 times as many.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...). Zero rows take no part; fewer than two
        neurons have the value 0.

    Raises:
        ValueError: for an s out of range, a half_space that is no bool, or witnesses or steps
            that are no int >= 1.

    Reference:
        Liu et al., "Learning with Hyperspherical Uniformity", AISTATS 2021, arXiv 2103.01649.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import Polarization
        >>> round(float(Polarization(s=2)(torch.eye(4))), 6)  # the witness is opposite the mean: 1 / (2 + 2 / sqrt(4))
        0.333333
    """

    higher_is_better: ClassVar[bool] = True

    s: float = 2.0
    half_space: bool = False
    witnesses: int = 8
    steps: int = 10

    def __post_init__(self) -> None:
        check_number("s", self.s, "a number in [0, 100] such as 0, 1 or 2 (0 is the logarithm)", lambda s: 0 <= s <= 100)
        _check(self)

    def best(self, n: int, d: int) -> float | None:
        """The mean kernel of two random points, as the minimum over v is below the mean over v; None if that is infinite."""
        mean = RieszEnergy(s=self.s).expectation(2, d)
        return mean if math.isfinite(mean) else None

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """Polarization of random points over this; for s = 0 the exponential of the difference."""
        return (reference - value).exp() if self.s == 0 else super().ratio(value, reference)

    def _kernel(self, cosine: Tensor) -> Tensor:
        q = (2.0 - 2.0 * cosine).clamp_min(_NEAREST)
        return 0.5 * q.log() if self.s == 0 else -q.pow(-0.5 * self.s).clamp_max(_LARGEST)

    def _solve(self, x: Tensor, start: Tensor, steps: int) -> Solution:
        def mean(v: Tensor) -> tuple[Tensor, Tensor]:
            cosine = v @ x.T
            value = -self._kernel(cosine)
            slope = (self.s * value if self.s else 1.0) / (2.0 - 2.0 * cosine).clamp_min(_NEAREST)
            return value.mean(1), slope.clamp_max(_LARGEST) @ x / len(x)

        points = lowest_on_circle(x, mean) if x.shape[1] == 2 else self._left_out(x)
        exact = points is not None
        if points is None:
            points = descend(mean, start, steps)
        value, pull = mean(points)
        scale = 1.0 if self.s == 0 else float(value.min())
        share = shares(points, value, SHARED * scale)
        # The kernel is convex in the cosine: no other v lies below the value by more than this.
        best = int(value.argmin())
        gap = float(pull[best].norm() + pull[best] @ points[best])
        weights = share[:, None].expand(-1, len(x)) / len(x)
        return points, weights, exact or gap <= 1e-9 * scale

    def _left_out(self, x: Tensor) -> Tensor | None:
        """In half space a direction (1, d) orthogonal to all neurons has the smallest mean of all; None if there is none."""
        v = orthogonal_to(x[: len(x) // 2]) if self.half_space else None
        return None if v is None else v[None]

    def _heights(self, x: Tensor, v: Tensor) -> Tensor:
        return -self._kernel(v @ x.T).mean(1)


@dataclass(frozen=True)
class Covering(_WitnessMeasure):
    r"""Covering radius of the neurons (MHC): the angle from the loneliest point of the sphere to its nearest neuron.

    The value is the maximum over unit vectors v of the minimum over neurons of the angle between x_i and v, in
    radians. Lower is better; the penalty is the value. Its gradient is that of the angles of the neurons that touch the
    empty cap around v, weighted so that their pulls on v cancel: the derivative of the radius itself. Caps of equal size
    share it.

    :meth:`prepare` finds v. The value is exact, to 1e-6 or so, where it can be proven: in two dimensions; where all neurons
    lie in a hemisphere, as n <= d neurons do; for few enough neurons (20000 subsets of d at most) that every
    facet of their hull can be tried; for d <= 4 if scipy is installed. Else it is a lower bound from
    several witnesses::

        state = measure.prepare(x)
        radius, exact = measure(x, state), state["exact"]

    Evaluate with the state prepared at the same x. A second derivative is that with the witnesses and weights fixed.

    Args:
        half_space: Measure the 2n points ``x`` and ``-x`` instead. With n < d neurons some v is orthogonal to all
            of them: the radius is pi / 2 and the gradient zero, whatever the neurons.
        witnesses: How many witnesses look for the deepest hole where no exact way is known, >= 1.
        steps: Steps of each witness in each training step, >= 1; a fresh start takes 20 times as many.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...). Zero rows take no part; fewer than two
        neurons have the value 0.

    Raises:
        ValueError: for a half_space that is no bool, or witnesses or steps that are no int >= 1.

    Reference:
        Liu et al., "Learning with Hyperspherical Uniformity", AISTATS 2021, arXiv 2103.01649.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import Covering
        >>> x = torch.eye(4)
        >>> round(float(Covering()(x).rad2deg()), 3)  # opposite the mean: arccos(-1 / sqrt(4))
        120.0
        >>> Covering().prepare(x)["exact"]
        tensor([True])
    """

    half_space: bool = False
    witnesses: int = 8
    steps: int = 10

    def __post_init__(self) -> None:
        _check(self)

    def best(self, n: int, d: int) -> float:
        """The largest of the known bounds: n caps must cover the sphere, hemispheres, the simplex, Fejes Toth's for d = 3."""
        points = 2 * n if self.half_space else n
        bounds = [cap_angle(1.0 / points, d)]
        if points <= d or (self.half_space and n < d):
            bounds.append(math.pi if points == 1 else math.pi / 2)
        if points == d + 1:
            bounds.append(math.acos(1.0 / d))
        if d == 3 and points >= 3:
            omega = points * math.pi / (6 * (points - 2))
            bounds.append(math.acos(1.0 / (math.tan(omega) * math.sqrt(3.0))))
        return max(bounds)

    def _kernel(self, cosine: Tensor) -> Tensor:
        """The angle; its slope is 0 where it has none, at equal and opposite points."""
        smooth = cosine.abs() < 1.0 - 1e-14
        return torch.where(smooth, torch.where(smooth, cosine, 0.0).acos(), cosine.detach().clamp(-1.0, 1.0).acos())

    def _solve(self, x: Tensor, start: Tensor, steps: int) -> Solution:
        found = deepest_holes(x, mirrored=self.half_space)
        if found is not None:
            return *found, True
        gammas = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0) if steps > self.steps else (300.0, 3000.0)
        points = sink(x, start, gammas, steps)
        best = int(height(x, points).argmin())
        points[best] = settle(x, points[best], steps)
        share = shares(points, height(x, points), SHARED)
        weights = x.new_zeros(len(points), len(x))
        for i in share.nonzero().squeeze(1).tolist():
            weights[i] = share[i] * multipliers(x, points[i], SHARED)
        best = int(share.argmax())
        return points, weights, certain(x, points[best], weights[best] / share[best])

    def _heights(self, x: Tensor, v: Tensor) -> Tensor:
        return height(x, v)


def _check(measure: _WitnessMeasure) -> None:
    check_flag("half_space", measure.half_space)
    check_count("witnesses", measure.witnesses)
    check_count("steps", measure.steps)
