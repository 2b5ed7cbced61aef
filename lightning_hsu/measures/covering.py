"""Minimum hyperspherical covering (MHC): the largest hole between the neurons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu._core.holes import (
    SHARED,
    certain,
    deepest_holes,
    height,
    multipliers,
    settle,
    sink,
)
from lightning_hsu._core.levenshtein import cap_angle
from lightning_hsu._core.witness import shares
from lightning_hsu.measures.witness import Solution, WitnessMeasure

# Sharpness of the smooth maxima of the cosine, which the witnesses minimise one after the other.
_GAMMAS = (300.0, 3000.0)
_GAMMAS_AFRESH = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


@dataclass(frozen=True)
class Covering(WitnessMeasure):
    r"""Covering radius (MHC): the angle from the sphere's loneliest point to its nearest neuron.

    The value is the maximum over unit vectors v of the minimum over neurons of the angle between
    x_i and v, in radians. Lower is better; the penalty is the value. Its gradient is that of the
    angles of the neurons that touch the empty cap around v, weighted so that their pulls on v
    cancel: the derivative of the radius itself. Caps of equal size share it.

    :meth:`prepare` finds v. The value is exact, to about 1e-6, where this can be proven: in two
    dimensions; where all neurons lie in a hemisphere, as n <= d neurons do; where the neurons are
    so few (at most 20000 subsets of d) that every facet of their hull can be tried; for d <= 4 if
    scipy is installed. Otherwise it is a lower bound from several witnesses::

        state = measure.prepare(x)
        radius, exact = measure(x, state), state["exact"]

    Evaluate with the state prepared at the same x. Second derivatives hold the witnesses and
    weights fixed.

    Args:
        half_space: Measure the 2n points ``x`` and ``-x`` instead. With n < d neurons some v is
            orthogonal to all of them: the radius is pi / 2 and the gradient zero, whatever the
            neurons.
        witnesses: How many witnesses look for the deepest hole if it cannot be found exactly, >= 1.
        steps: Steps of each witness in each training step, >= 1; a fresh start takes 20 times as
            many.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...). Zero rows take no part;
        fewer than two neurons have the value 0.

    Raises:
        ValueError: for a half_space that is not a bool, or witnesses or steps that are not ints >= 1.

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

    weights_name: ClassVar[str] = "multipliers"

    half_space: bool = False
    witnesses: int = 8
    steps: int = 10

    def bound(self, n: int, d: int) -> float | None:
        """Return the largest of the known bounds.

        n caps must cover the sphere; n <= d neurons lie in a hemisphere; the simplex is best for
        n = d + 1; Fejes Toth's bound holds for d = 3.
        """
        points = 2 * n if self.half_space else n
        bounds = [cap_angle(1.0 / points, d)]
        if points <= d or (self.half_space and n < d):
            bounds.append(math.pi / 2)
        if points == 1:
            bounds.append(math.pi)
        if points == d + 1:
            bounds.append(math.acos(1.0 / d))
        if d == 3 and points >= 3:
            omega = points * math.pi / (6 * (points - 2))
            bounds.append(math.acos(1.0 / (math.tan(omega) * math.sqrt(3.0))))
        return max(bounds)

    def _kernel(self, cosine: Tensor) -> Tensor:
        """The angle; its slope is set to 0 where it is undefined, at equal and opposite points."""
        smooth = cosine.abs() < 1.0 - 1e-14
        angle = torch.where(smooth, cosine, 0.0).acos()
        end = cosine.detach().clamp(-1.0, 1.0).acos()
        return torch.where(smooth, angle, end)

    def _solve(self, x: Tensor, start: Tensor, steps: int) -> Solution:
        found = deepest_holes(x, mirrored=self.half_space)
        if found is not None:
            return *found, True
        gammas = _GAMMAS_AFRESH if steps > self.steps else _GAMMAS
        points = sink(x, start, gammas, steps)
        deepest = int(height(x, points).argmin())
        points[deepest] = settle(x, points[deepest], steps)
        share = shares(points, height(x, points), SHARED)
        weights = x.new_zeros(len(points), len(x))
        for i in share.nonzero().squeeze(1).tolist():
            weights[i] = share[i] * multipliers(x, points[i], SHARED)
        best = int(share.argmax())
        return points, weights, certain(x, points[best], weights[best] / share[best])

    def _heights(self, x: Tensor, v: Tensor) -> Tensor:
        return height(x, v)
