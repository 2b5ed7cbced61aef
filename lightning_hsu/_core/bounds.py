"""Mean pair energies that no neurons can go below."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.levenshtein import universal_quadrature

_GRID = 4096  # cosines at which a kernel of unknown shape is sampled

Point = tuple[float, float]


def pair_bound(term: PairTerm, n: int, d: int, *, absolutely_monotone: bool) -> float:
    """Lower bound on the mean pair energy of n points on the sphere in d dimensions.

    It comes from the convex envelope of the kernel: the mean cosine of n points is at least
    -1 / (n - 1), and the mean squared cosine of n lines at least (n - d) / (d (n - 1)) (Welch). The
    regular simplex, orthonormal bases and equiangular tight frames attain it. For an absolutely
    monotone kernel the universal bound holds as well, in half space for the 2n points x, -x.

    Args:
        term: The kernel.
        n: Points, at least 2.
        d: Dimension, at least 2.
        absolutely_monotone: Whether the kernel, as a function of the cosine on [-1, 1), and all its
            derivatives are >= 0, apart from a constant.
    """
    if term.half_space:

        def even(u: Tensor) -> Tensor:
            return _value(term, u.sqrt()) + _value(term, -u.sqrt())

        welch = max(0.0, (n - d) / (d * (n - 1)))
        opposite = float(_value(term, torch.tensor([-1.0], dtype=torch.float64)))
        bound = ((n - 1) * _envelope(even, 0.0, welch) + opposite) / (2 * n - 1)
        points = 2 * n
    else:
        bound = _envelope(lambda t: _value(term, t), -1.0, -1.0 / (n - 1))
        points = n
    if absolutely_monotone:
        nodes, weights = universal_quadrature(points, d)
        # The bound rests on a polynomial below the kernel. If the knee is so far inside, it is also
        # below the softened kernel: 1.6 instead of 2 was enough for every n up to 200, d up to 8
        # and s from 0 to 8 that was tried.
        if 2.0 - 2.0 * float(nodes.max()) >= (2.0 * term.knee) ** 2:
            bound = max(bound, float((weights * _value(term, nodes)).sum()))
    return bound


def _value(term: PairTerm, t: Tensor) -> Tensor:
    """The softened kernel at cosines t."""
    return term.softened(2.0 - 2.0 * t, 2.0 + 2.0 * t)[0]


def _envelope(function: Callable[[Tensor], Tensor], low: float, least: float) -> float:
    """Least value, at means >= ``least``, of the convex envelope of a function on [low, 1].

    Over numbers with such a mean, the mean of the function is never lower. It is exact for convex
    functions that rise from ``least`` on. Other functions are sampled, and the samples lowered by
    as much as the function may fall between two of them, judging by its slopes there.
    """
    # Even steps in the angle resolve the steep end.
    turns = torch.linspace(0.0, math.pi / 2, _GRID, dtype=torch.float64)
    samples = low + (1.0 - low) * torch.sin(turns).square()
    grid = torch.tensor(sorted({*samples.tolist(), least}), dtype=torch.float64)
    value = function(grid)
    step = grid.diff()
    slope = value.diff() / step
    bend = slope.diff()
    at = int((grid == least).nonzero())
    convex = bool((bend >= -1e-9 * slope.abs().max()).all())
    if convex and (at == len(slope) or float(slope[at]) >= 0.0):
        return float(value[at])
    lowered = value.clone()
    lowered[1:-1] -= bend.clamp_min(0.0) * torch.maximum(step[1:], step[:-1])
    hull = _lower_hull(grid.tolist(), lowered.tolist())
    best = min(f for t, f in hull if t >= least)
    for (a, fa), (b, fb) in pairwise(hull):
        if a < least < b:
            best = min(best, fa + (fb - fa) * (least - a) / (b - a))
    return best


def _lower_hull(grid: list[float], values: list[float]) -> list[Point]:
    """The corners of the convex envelope of samples, from left to right."""
    hull: list[Point] = []
    for point in zip(grid, values, strict=True):
        while len(hull) > 1 and _is_above(hull[-1], hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(middle: Point, left: Point, right: Point) -> bool:
    """Whether the middle point lies on or above the line from left to right."""
    rise = (right[1] - left[1]) * (middle[0] - left[0])
    return (middle[1] - left[1]) * (right[0] - left[0]) >= rise
