"""Mean pair energies that no neurons can go below."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lightning_hsu.core.kernel import PairTerm
from lightning_hsu.core.levenshtein import universal_quadrature

_GRID = 4096  # cosines at which a kernel of unknown shape is looked at


def pair_bound(term: PairTerm, n: int, d: int, *, absolutely_monotone: bool) -> float:
    """Lower bound on the mean pair energy of n points on the sphere in d dimensions.

    From the convex envelope of the kernel: the mean cosine of n points is at least -1 / (n - 1), and of n lines the mean
    squared cosine at least (n - d) / (d (n - 1)) (Welch). The regular simplex, orthonormal bases and equiangular tight
    frames attain it. With an absolutely monotone kernel also the universal bound, in half space for the 2n points x, -x.

    Args:
        term: The kernel.
        n: Points, at least 2.
        d: Dimension, at least 2.
        absolutely_monotone: Whether the kernel, as a function of the cosine on [-1, 1), and all its derivatives are >= 0,
            apart from a constant.
    """
    if term.half_space:
        even = _envelope(lambda u: _value(term, u.sqrt()) + _value(term, -u.sqrt()), 0.0, max(0.0, (n - d) / (d * (n - 1))))
        opposite = float(_value(term, torch.tensor([-1.0], dtype=torch.float64)))
        bound = ((n - 1) * even + opposite) / (2 * n - 1)
    else:
        bound = _envelope(lambda t: _value(term, t), -1.0, -1.0 / (n - 1))
    if absolutely_monotone:
        nodes, weights = universal_quadrature(2 * n if term.half_space else n, d)
        if 2.0 - 2.0 * float(nodes.max()) > term.knee**2:  # nearer, softening makes the kernel a line
            bound = max(bound, float((weights * _value(term, nodes)).sum()))
    return bound


def _value(term: PairTerm, t: Tensor) -> Tensor:
    """The softened kernel at cosines t."""
    return term.softened(2.0 - 2.0 * t, 2.0 + 2.0 * t)[0]


def _envelope(function: Callable[[Tensor], Tensor], low: float, least: float) -> float:
    """Least value, over means >= ``least``, of the convex envelope on [low, 1]: no sample of numbers has a lower mean."""
    # Even steps in the angle, so that the steep end is resolved.
    grid = low + (1.0 - low) * torch.sin(torch.linspace(0.0, math.pi / 2, _GRID, dtype=torch.float64)).square()
    grid = torch.cat([grid, torch.tensor([least], dtype=torch.float64)]).sort().values
    hull: list[tuple[float, float]] = []
    for point in zip(grid.tolist(), function(grid).tolist(), strict=True):
        while len(hull) > 1 and _above(hull[-1], hull[-2], point):
            hull.pop()
        hull.append(point)
    for (a, fa), (b, fb) in pairwise(hull):
        if a <= least <= b:
            at_least = fa + (fb - fa) * (least - a) / (b - a) if b > a else min(fa, fb)
            return min([at_least, *(f for t, f in hull if t >= least)])
    return min(f for _, f in hull)


def _above(middle: tuple[float, float], left: tuple[float, float], right: tuple[float, float]) -> bool:
    """Whether the middle point lies on or above the line from left to right."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])
