"""Maximum hyperspherical polarization (MHP): the potential at the loneliest point of the sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from lightning_hsu._checks import check_number
from lightning_hsu._core.holes import SHARED
from lightning_hsu._core.witness import Objective, descend, lowest_on_circle, orthogonal_to, shares
from lightning_hsu.measures.riesz import RieszEnergy
from lightning_hsu.measures.witness import Solution, WitnessMeasure

# Squared chord below which the kernel stays constant. Witnesses move away from neurons.
_NEAREST = 1e-12
# Kernels and slopes stay below this, so that no product is inf * 0.
_LARGEST = 1e150


@dataclass(frozen=True)
class Polarization(WitnessMeasure):
    r"""Mean kernel between the neurons and the point of the sphere where it is smallest (MHP).

    The value is the minimum over unit vectors v of the mean over neurons of K(x_i, v), with ``rho``
    the chord from x_i to v and ``K = rho**-s`` for s > 0, ``log(1 / rho)`` for s = 0. Higher is
    better; the penalty is minus the value.

    :meth:`prepare` looks for the minimum with several witnesses at once. The gradient is that of
    the mean kernel at the best witness, which is held fixed; witnesses that tie share it. The value
    is exact, to about 1e-6, where that can be proven: in two dimensions, where each arc between
    neighbours holds one minimum; where the kernel, which is convex in the cosine, shows that no v
    is lower, as for most layers with n <= d; in half space with n < d, where some v is orthogonal
    to all neurons and the gradient is zero. Otherwise it is an upper bound of the minimum, tight if
    a witness has found the right hole::

        state = measure.prepare(x)
        value, exact = measure(x, state), state["exact"]

    Evaluate with the state prepared at the same x. Second derivatives hold the witnesses fixed.

    Args:
        s: A number in [0, 100]. Larger s gives near neurons more weight; s = 0, 1, 2 are the
            published choices.
        half_space: Measure the 2n points ``x`` and ``-x`` instead.
        witnesses: How many witnesses look for the minimum, >= 1.
        steps: Steps of each witness in each training step, >= 1; a fresh start takes 20 times as
            many.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...). Zero rows take no part;
        fewer than two neurons have the value 0.

    Raises:
        ValueError: for an s out of range, a half_space that is not a bool, or witnesses or steps
            that are not ints >= 1.

    Reference:
        Liu et al., "Learning with Hyperspherical Uniformity", AISTATS 2021, arXiv 2103.01649.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import Polarization
        >>> # the witness is opposite the mean: 1 / (2 + 2 / sqrt(4))
        >>> round(float(Polarization(s=2)(torch.eye(4))), 6)
        0.333333
    """

    higher_is_better: ClassVar[bool] = True
    weights_name: ClassVar[str] = "shares"

    s: float = 2.0
    half_space: bool = False
    witnesses: int = 8
    steps: int = 10

    def __post_init__(self) -> None:
        check_number(
            "s",
            self.s,
            "a number in [0, 100] such as 0, 1 or 2 (0 is the logarithm)",
            lambda s: 0 <= s <= 100,
        )
        super().__post_init__()

    def bound(self, n: int, d: int) -> float | None:
        """Return the mean kernel of two random points; None if that is infinite.

        The minimum over v is at most the mean over v.
        """
        mean = RieszEnergy(s=self.s).expectation(2, d)
        if mean is None or math.isinf(mean):
            return None
        return mean

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """Value of random points over this value; for s = 0 the exponential of the difference."""
        if self.s == 0:
            return (reference - value).exp()
        return super().ratio(value, reference)

    def _kernel(self, cosine: Tensor) -> Tensor:
        q = (2.0 - 2.0 * cosine).clamp_min(_NEAREST)
        if self.s == 0:
            return 0.5 * q.log()
        return -q.pow(-0.5 * self.s).clamp_max(_LARGEST)

    def _mean(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean kernel (k,) of points x (m, d) at witnesses v (k, d), and its slope in v (k, d)."""
        cosine = v @ x.T
        value = -self._kernel(cosine)
        q = (2.0 - 2.0 * cosine).clamp_min(_NEAREST)
        slope = 1.0 / q if self.s == 0 else self.s * value / q
        return value.mean(1), slope.clamp_max(_LARGEST) @ x / len(x)

    def _solve(self, x: Tensor, start: Tensor, steps: int) -> Solution:
        mean = partial(self._mean, x)
        points = self._proven(x, mean)
        exact = points is not None
        if points is None:
            points = descend(mean, start, steps)
        value, pull = mean(points)
        scale = 1.0 if self.s == 0 else float(value.min())
        share = shares(points, value, SHARED * scale)
        # The kernel is convex in the cosine: no other v lies below the value by more than this.
        lowest = int(value.argmin())
        gap = float(pull[lowest].norm() + pull[lowest] @ points[lowest])
        weights = share[:, None].expand(-1, len(x)) / len(x)
        return points, weights, exact or gap <= 1e-9 * scale

    def _proven(self, x: Tensor, mean: Objective) -> Tensor | None:
        """Witnesses (k, d) that are certain to hold the smallest mean, or None.

        On the circle these are the lowest points of all arcs. In half space a direction orthogonal
        to all neurons has the smallest mean of all.
        """
        if x.shape[1] == 2:
            return lowest_on_circle(x, mean)
        if not self.half_space:
            return None
        v = orthogonal_to(x[: len(x) // 2])
        return None if v is None else v[None]

    def _heights(self, x: Tensor, v: Tensor) -> Tensor:
        return -self._kernel(v @ x.T).mean(1)
