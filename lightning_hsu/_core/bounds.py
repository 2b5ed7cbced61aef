"""Mean pair energies that no neurons can go below."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

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
        welch = max(0.0, (n - d) / (d * (n - 1)))
        opposite = float(_value(term, torch.tensor([-1.0], dtype=torch.float64)))
        bound = ((n - 1) * _envelope(term, 0.0, welch) + opposite) / (2 * n - 1)
        points = 2 * n
    else:
        bound = _envelope(term, -1.0, -1.0 / (n - 1))
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


def _even(term: PairTerm, u: Tensor) -> Tensor:
    """The softened kernel at squared cosines u, of both neurons of a line together."""
    root = u.sqrt()
    return _value(term, root) + _value(term, -root)


@dataclass(frozen=True, eq=False)
class _Sampled:
    """A kernel at numbers ``t`` from the least possible one to 1, and what they tell of its shape.

    Args:
        t: The numbers, ascending, float64, shape (k,).
        value: The kernel there.
        convex: Whether the samples are convex.
        corners: The numbers at the corners of the convex envelope of the samples, each lowered by
            as much as the kernel may fall between two of them, judging by its slopes there.
        envelope: The envelope at its corners.
        least: The least value of the envelope from each corner on.
    """

    t: Tensor
    value: Tensor
    convex: bool
    corners: Tensor
    envelope: Tensor
    least: Tensor


@lru_cache(maxsize=256)
def _sampled(term: PairTerm, low: float) -> _Sampled:
    """A kernel on [low, 1], as a function of the cosine, in half space of its square.

    Even steps in the angle resolve the steep end.
    """
    turns = torch.linspace(0.0, math.pi / 2, _GRID, dtype=torch.float64)
    t = low + (1.0 - low) * torch.sin(turns).square()
    value = _even(term, t) if term.half_space else _value(term, t)
    step = t.diff()
    slope = value.diff() / step
    bend = slope.diff()
    convex = bool((bend >= -1e-9 * slope.abs().max()).all())
    lowered = value.clone()
    lowered[1:-1] -= bend.clamp_min(0.0) * torch.maximum(step[1:], step[:-1])
    corners = _lower_hull(t, lowered)
    envelope = lowered[corners]
    least = envelope.flip(0).cummin(0).values.flip(0)
    return _Sampled(t, value, convex, t[corners], envelope, least)


def _envelope(term: PairTerm, low: float, least: float) -> float:
    """Least value, at means >= ``least``, of the convex envelope of a kernel on [low, 1].

    The kernel is a function of the cosine, in half space of its square. Over numbers with such a
    mean, the mean of the function is never lower. It is exact for convex functions that rise from
    ``least`` on. Other functions are sampled.
    """
    samples = _sampled(term, low)
    own = torch.tensor([least], dtype=torch.float64)
    if samples.convex:
        after = int(torch.searchsorted(samples.t, own, right=True))  # the first beyond ``least``
        value = float(_even(term, own) if term.half_space else _value(term, own))
        if after == len(samples.t) or float(samples.value[after]) >= value:
            return value
    t = samples.corners
    f = samples.envelope
    right = int(torch.searchsorted(t, own))  # the first corner that is not before ``least``
    best = float(samples.least[right])
    if float(t[right]) > least:
        part = (least - t[right - 1]) / (t[right] - t[right - 1])
        best = min(best, float(f[right - 1] + (f[right] - f[right - 1]) * part))
    return best


def _lower_hull(grid: Tensor, values: Tensor) -> Tensor:
    """The corners of the convex envelope of samples, as indices from left to right.

    Runs of samples that are convex by themselves are taken at once.
    """
    step = grid.diff()
    rise = values.diff()
    is_bent = rise[1:] * step[:-1] <= rise[:-1] * step[1:]
    ends = (is_bent.nonzero().flatten() + 1).tolist()  # of convex runs
    ends.append(len(grid) - 1)
    points = list(zip(grid.tolist(), values.tolist(), strict=True))
    hull: list[int] = []
    i = 0
    for end in ends:
        while i <= end:
            while len(hull) > 1 and _is_above(points[hull[-1]], points[hull[-2]], points[i]):
                hull.pop()
            hull.append(i)
            i += 1
            if hull[-2:] == [i - 2, i - 1]:  # up to the end of the run each is a corner
                hull += range(i, end + 1)
                i = end + 1
    return torch.tensor(hull)


def _is_above(middle: Point, left: Point, right: Point) -> bool:
    """Whether the middle point lies on or above the line from left to right."""
    rise = (right[1] - left[1]) * (middle[0] - left[0])
    return (middle[1] - left[1]) * (right[0] - left[0]) >= rise
