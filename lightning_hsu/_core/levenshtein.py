"""Bounds that no arrangement on the sphere can beat, on energies and cosines; sizes of caps."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_HALVINGS = 64  # of the angles from 0 to pi / 2


@lru_cache(maxsize=1024)
def universal_quadrature(n: int, d: int) -> tuple[Tensor, Tensor]:
    r"""Cosines and weights whose mean kernel bounds that of any n points on the sphere of R^d.

    For every kernel f of the cosine whose derivatives on [-1, 1) are all at least 0 (chord**-s with
    s > 0, -log(chord), -chord**p with 0 < p <= 2, exp(-t * chord**2)) the mean of f over the pairs
    of any n unit vectors is at least ``(weights * f(nodes)).sum()``. Sharp configurations reach it:
    simplex, cross-polytope, icosahedron, the roots of E8, every regular polygon, ...

    The rule is Levenshtein's: with a further node at 1 of weight 1 / n it integrates polynomials up
    to a degree tau exactly over the sphere, and tau is the largest for which n points could be a
    design. Any n and d work: the polynomials enter through their recurrence and the binomials as
    exact integers; no power of t is formed.

    Args:
        n: Points, at least 2.
        d: Dimension, at least 2.

    Returns:
        Nodes, cosines in [-1, 1) in ascending order, and positive weights that sum to 1; both
        float64 of shape (k,), k = tau // 2 + 1. They are cached: do not change them in place.

    Raises:
        ValueError: if n or d is below 2.

    Reference:
        Boyvalenkov, Dragnev, Hardin, Saff & Stoyanova, "Universal lower bounds for potential energy
        of spherical codes", Constructive Approximation 2016; Levenshtein, "Universal bounds for
        codes and designs", 1998.

    Example:
        >>> nodes, weights = universal_quadrature(n=12, d=3)  # the icosahedron: 1, 5, 5 neighbours
        >>> [round(t, 6) for t in nodes.tolist()], [round(11 * w, 6) for w in weights.tolist()]
        ([-1.0, -0.447214, 0.447214], [1.0, 5.0, 5.0])
        >>> round(float((weights / (2 - 2 * nodes)).sum()), 12)  # mean of chord**-2: 39 / 66
        0.590909090909
    """
    _check(n, d)
    if n <= d + 1:
        nodes = torch.tensor([-1.0 / (n - 1)], dtype=torch.float64)
        return nodes, torch.ones_like(nodes)
    if d == 2:
        return _polygon(n)
    return _levenshtein(n, d)


def largest_cosine(n: int, d: int) -> float:
    """Lower bound on the largest cosine between any two of n unit vectors of R^d.

    It limits how far apart they can be. The bound is attained for n <= 2 d (Rankin), for every n in
    the plane and for the sharp configurations.

    Args:
        n: Points, at least 2.
        d: Dimension, at least 2.

    Returns:
        The bound, in [-1, 1): the largest cosine of two different points is at least this.

    Raises:
        ValueError: if n or d is below 2.

    Reference:
        Levenshtein, "On bounds for packings in n-dimensional Euclidean space", 1979; for
        d + 2 <= n <= 2 d Rankin, "The closest packing of spherical caps in n dimensions", 1955.

    Example:
        >>> largest_cosine(n=3, d=64), largest_cosine(n=100, d=64)
        (-0.5, 0.0)
        >>> round(largest_cosine(n=240, d=8), 12)  # the roots of E8
        0.5
    """
    _check(n, d)
    if d + 2 <= n <= 2 * d:
        return 0.0
    return float(universal_quadrature(n, d)[0][-1])


def cap_fraction(angle: float, d: int) -> float:
    """Share of the sphere of R^d within an angle of a point.

    Args:
        angle: Angular radius of the cap, radians in [0, pi].
        d: Dimension, at least 2.

    Returns:
        The share of the area, in [0, 1], to a relative 1e-11; the inverse of :func:`cap_angle`.

    Raises:
        ValueError: if the angle is outside [0, pi] or d is below 2.

    Example:
        >>> import math
        >>> round(cap_fraction(math.pi / 3, d=3), 12)  # (1 - cos) / 2
        0.25
    """
    if d < 2 or not 0.0 <= angle <= math.pi:
        raise ValueError(
            f"a cap needs an angle from 0 to pi and at least 2 dimensions; got angle={angle}, d={d}"
        )
    if angle == 0.0:
        return 0.0
    if angle > math.pi / 2:
        return 1.0 - cap_fraction(math.pi - angle, d)
    return math.exp(_log_area(angle, d) - _log_area(math.pi / 2, d)) / 2


@lru_cache(maxsize=4096)
def cap_angle(fraction: float, d: int) -> float:
    """Angular radius of the cap that is this share of the sphere of R^d.

    Args:
        fraction: Share of the area, in [0, 1].
        d: Dimension, at least 2.

    Returns:
        The angle in radians, in [0, pi], to 1e-11; the inverse of :func:`cap_fraction`.

    Raises:
        ValueError: if the fraction is outside [0, 1] or d is below 2.

    Example:
        >>> import math
        >>> round(math.degrees(cap_angle(0.25, d=3)), 9)
        60.0
    """
    if d < 2 or not 0.0 <= fraction <= 1.0:
        raise ValueError(
            "a cap needs a fraction from 0 to 1 and at least 2 dimensions; "
            f"got fraction={fraction}, d={d}"
        )
    if fraction == 0.0:
        return 0.0
    if fraction > 0.5:
        return math.pi - cap_angle(1.0 - fraction, d)
    low = 0.0
    high = math.pi / 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if cap_fraction(middle, d) < fraction:
            low = middle
        else:
            high = middle
    return high


def _check(n: int, d: int) -> None:
    if n < 2 or d < 2:
        raise ValueError(f"a bound needs at least 2 points of dimension 2; got n={n}, d={d}")


def _polygon(n: int) -> tuple[Tensor, Tensor]:
    """The rule in the plane: cosines of the regular polygon, and the share of neighbours at each.

    Returns:
        Nodes and weights, both of shape (n // 2,).
    """
    steps = torch.arange(n // 2, 0, -1, dtype=torch.float64)
    # There is one opposite point; any other cosine belongs to two points.
    others = 2.0 - (2 * steps == n).to(steps)
    return torch.cos(steps * (2 * math.pi / n)), others / (n - 1)


def _levenshtein(n: int, d: int) -> tuple[Tensor, Tensor]:
    """The rule for D(tau) < n <= D(tau + 1), where D is the fewest points of a design.

    Without its fixed nodes (1; for even tau also -1) the rule is one of k nodes for the sphere's
    measure times 1 - t (or 1 - t**2), exact to degree 2 k - 2. So its nodes are the zeros of p_k -
    c * p_(k-1), p the measure's orthogonal polynomials: the eigenvalues of their Jacobi matrix with
    the last diagonal entry shifted. The shift follows from the weight 1 / n at 1: with p_k the
    kernel polynomials at 1, p_k(1) proportional to D(tau + 1), it is c = (n - D(tau + 1)) / (n -
    D(tau - 1)), over the ratio (2 k + d - 2) / k of their leading coefficients.

    Returns:
        Nodes and weights, both of shape (tau // 2 + 1,).
    """
    tau = 2  # n > d + 1 = D(2)
    while _fewest(tau + 1, d) < n:
        tau += 1
    below = _fewest(tau - 1, d)
    here = _fewest(tau, d)
    above = _fewest(tau + 1, d)
    k = (tau + 1) // 2
    even = tau % 2 == 0
    diagonal, beside = _recurrence(k, d, even)
    diagonal[-1] += k * (n - above) / ((n - below) * (2 * k + d - 2))
    # eigh reads the lower triangle only.
    nodes, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(beside, -1))
    nodes = nodes.clamp_min(-1.0)
    mass = vectors[0].square() / (1.0 - nodes)
    if even:
        mass *= (d - 1) / d / (1.0 + nodes)
        mass_at_minus_one = (n - here) / (n * here - above * below)
        nodes = torch.cat([nodes.new_full((1,), -1.0), nodes])
        mass = torch.cat([mass.new_full((1,), mass_at_minus_one), mass])
    return nodes, mass * (n / (n - 1))


def _fewest(tau: int, d: int) -> int:
    """Delsarte, Goethals and Seidel's bound on the points of a spherical design of strength tau."""
    return math.comb(d - 1 + tau // 2, d - 1) + math.comb(d - 1 + (tau - 1) // 2, d - 1)


def _recurrence(k: int, d: int, even: bool) -> tuple[Tensor, Tensor]:
    """The Jacobi matrix of (1 - t**2)**((d - 3) / 2) times 1 - t, or if even times 1 - t**2.

    Returns:
        Its diagonal (k,) and side diagonal (k - 1,).
    """
    i = torch.arange(k, dtype=torch.float64)
    j = i[1:]
    if even:
        beside = (j * (j + d - 1) / ((2 * j + d) * (2 * j + d - 2))).sqrt()
        return torch.zeros_like(i), beside
    diagonal = -(d - 2) / ((2 * i + d - 2) * (2 * i + d))
    return diagonal, (j * (j + d - 2)).sqrt() / (2 * j + d - 2)


def _log_area(angle: float, d: int) -> float:
    """Log of the integral of sin(t)**(d-2) from 0 to an angle in (0, pi / 2], by tanh-sinh."""
    grid = torch.arange(-4.5, 4.5, 2.0**-6, dtype=torch.float64)
    log_odds = math.pi * torch.sinh(grid)
    part = torch.sigmoid(log_odds)  # the share of the angle
    weight = torch.cosh(grid) * part * torch.sigmoid(-log_odds)
    ratio = torch.sin(angle * part) / math.sin(angle)
    power = torch.tensor(d - 2.0, dtype=torch.float64)
    value = torch.special.xlogy(power, ratio)
    integral = angle * float((weight * value.exp()).sum())
    return (d - 2) * math.log(math.sin(angle)) + math.log(integral)
