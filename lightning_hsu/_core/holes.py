"""The largest empty cap between points: its centre v has the smallest ``max_i cos(x_i, v)``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_hsu._core.sphere import tangent, unit_rows
from lightning_hsu._core.witness import arcs, descend, distinct, on_circle, orthogonal_to

TIED = 1e-9
"""Cosines this near the largest one count as equal to it."""
SHARED = 1e-6
"""Holes whose depths, as cosines, differ by less than this share the gradient.

Rounding to float32 then does not choose among them.
"""

_SUBSETS = 20000  # every subset of d points is tried if there are no more subsets than this
_SUBSET_FLOP = 1e8  # and if that takes no more FLOP than this
_HULL_DIMENSIONS = 4  # up to this dimension scipy's convex hull is used, if it is installed
_DENSE = 2048  # up to this many points the n x n system of the hemisphere is solved
_PIVOTS = 40  # rounds after which the guess of the positive weights stands; the certificate decides
_KEPT = 512  # holes of equal depth that are kept


def height(x: Tensor, v: Tensor) -> Tensor:
    """Largest cosine (k,) of each witness v (k, d) with the points x (n, d)."""
    return (v @ x.T).amax(1)


def deepest_holes(x: Tensor, *, mirrored: bool) -> tuple[Tensor, Tensor] | None:
    """The largest empty caps between points, if it is certain which they are; else None.

    Args:
        x: Points, shape (n, d).
        mirrored: Whether the second half of x is the first half with the sign changed.

    Returns:
        Their centres (k, d), and weights (k, n) of sum 1: the :func:`multipliers` of each centre,
        divided by k.
    """
    candidates = _candidates(x)
    if candidates is not None:
        heights = height(x, candidates)
        # If the origin is outside the hull, no facet need face the hole.
        if x.shape[1] == 2 or float(heights.min()) >= -TIED:
            v = candidates[heights <= heights.min() + SHARED][: 8 * _KEPT]
            v = v[distinct(v)][:_KEPT]
            weights = torch.stack([multipliers(x, centre, SHARED) for centre in v])
            return v, weights / len(v)
    if mirrored:
        return _orthogonal_hole(x)
    return _in_hemisphere(x)


def certain(x: Tensor, v: Tensor, weights: Tensor) -> bool:
    """Whether it is proven that no empty cap is larger than the one around v.

    The proof is duality, for caps of a hemisphere or more: for any weights of sum 1 every witness
    has a cosine of at least ``-|sum_i weights_i x_i|`` with some point.

    Args:
        x: Points, shape (n, d).
        v: The centre of the cap, shape (d,).
        weights: Weights of the points, shape (n,).
    """
    return float(height(x, v[None]) + (weights @ x).norm()) <= TIED


def multipliers(x: Tensor, v: Tensor, within: float = TIED) -> Tensor:
    """Weights of the points that touch the cap around v, such that their pulls cancel.

    The radius of the cap is then stationary in v, and its gradient is the weighted sum of the
    gradients of the angles.

    Args:
        x: Points, shape (n, d).
        v: The centre of the cap, shape (d,).
        within: Points whose cosines differ from the largest by no more than this touch the cap.

    Returns:
        Weights (n,) >= 0 of sum 1.
    """
    cosine = x @ v
    touching = (cosine >= cosine.max() - within).nonzero().squeeze(1)
    weights = torch.zeros_like(cosine)
    weights[touching] = 1.0 / len(touching)
    if float(tangent(weights @ x, v).norm()) > within:
        weights[touching] = _nearest_to_origin(tangent(x[touching], v))
    return weights


def sink(x: Tensor, v: Tensor, gammas: tuple[float, ...], steps: int) -> Tensor:
    """Lower ``max_i cos(x_i, v)`` from every witness with the help of smooth maxima.

    Args:
        x: Points, shape (n, d).
        v: Witnesses, shape (k, d).
        gammas: Sharpness of the maxima, one after the other.
        steps: Steps of descent, shared among them.
    """
    for gamma in gammas:

        def smooth_maximum(v: Tensor, gamma: float = gamma) -> tuple[Tensor, Tensor]:
            scaled = gamma * (v @ x.T)
            return scaled.logsumexp(1) / gamma, scaled.softmax(1) @ x

        v = descend(smooth_maximum, v, max(1, steps // len(gammas)))
    return v


def settle(x: Tensor, v: Tensor, rounds: int) -> Tensor:
    """Follow the steepest descent of ``max_i cos(x_i, v)`` exactly, from point to point.

    Args:
        x: Points, shape (n, d).
        v: Where to begin, shape (d,).
        rounds: The most points to go to.
    """
    for _ in range(rounds):
        pull = tangent(multipliers(x, v) @ x, v)
        strength = float(pull.norm())
        if strength <= 1e-11:
            break
        ahead = -pull / strength
        cosine = x @ v
        rate = x @ ahead
        top = float(cosine.max())
        # Go along the great circle to its lowest point (in a hemisphere), or to where the next
        # point becomes as near.
        angle = math.atan2(strength, -top) if top < 0 else math.pi / 4
        later = (cosine < top - TIED) & (rate > -strength)
        meets = torch.atan2(top - cosine[later], rate[later] + strength)
        if len(meets):
            angle = min(angle, float(meets.min()))
        moved = unit_rows(math.cos(angle) * v + math.sin(angle) * ahead)[0]
        if float((x @ moved).max()) >= top:
            break
        v = moved
    return v


def _in_hemisphere(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The deepest hole of points (n, d) in a closed hemisphere, with its multipliers; else None."""
    n, d = x.shape
    if n > min(3 * d + 20, _DENSE):
        return None
    weights = _nearest_to_origin(x)
    nearest = weights @ x
    if float(nearest.norm()) > TIED:
        v = -nearest / nearest.norm()
        if not certain(x, v, weights):
            return None
        return v[None], weights[None]
    axis = orthogonal_to(x)
    if axis is None or not certain(x, axis, weights):
        return None
    return torch.stack([axis, -axis]), weights.expand(2, -1) / 2


def _orthogonal_hole(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The hole and its multipliers if some direction is orthogonal to all points, or None."""
    v = orthogonal_to(x[: len(x) // 2])
    if v is None:
        return None
    return v[None], torch.full_like(x[:, 0], 1.0 / len(x))[None]


def _nearest_to_origin(x: Tensor) -> Tensor:
    """Weights (n,) >= 0 of sum 1 of the point of the convex hull of x (n, d) nearest to the origin.

    Solves ``sum_i weights_i (x_i, 1) = (0, 1)`` by least squares with weights >= 0. A ridge makes
    the solution unique: first a large one, for a good guess of which weights are positive, finally
    one at the level of rounding.
    """
    gram = x @ x.T + 1.0
    positive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for ridge in (1e-3, 1e-6, 1e-9, 1e-12):
        ridged = gram + ridge * torch.diag(gram.diagonal())
        positive = _positive_weights(ridged, positive)
    weights = _solve(ridged, positive, torch.ones_like(gram[0]))
    for _ in range(2):  # refine by the residual
        weights = weights + _solve(ridged, positive, 1.0 - gram @ weights)
    weights = weights.clamp_min(0.0)
    return weights / weights.sum()


def _positive_weights(gram: Tensor, positive: Tensor) -> Tensor:
    """Which weights are positive, with ``gram @ weights`` = 1 there and >= 1 elsewhere.

    Block principal pivoting (Kim & Park, 2011): solve for a guess and exchange all weights with the
    wrong sign; if that does not help, exchange one at a time.

    Args:
        gram: Positive definite matrix, shape (n, n).
        positive: A first guess, bool, shape (n,).
    """
    fewest = len(gram) + 1
    patience = 3
    for _ in range(min(len(gram) + 20, _PIVOTS)):
        weights = _solve(gram, positive, torch.ones_like(gram[0]))
        wrong = torch.where(positive, weights < 0, gram @ weights < 1.0 - 1e-11)
        count = int(wrong.sum())
        if count == 0:
            break
        if count < fewest:
            fewest = count
            patience = 3
        elif patience > 0:
            patience -= 1
        else:
            last = int(wrong.nonzero().max())
            wrong[:last] = False
        positive = positive ^ wrong
    return positive


def _solve(gram: Tensor, positive: Tensor, right: Tensor) -> Tensor:
    """Weights (n,), zero outside ``positive`` (n,), with ``gram @ weights`` = right (n,) there."""
    index = positive.nonzero().squeeze(1)
    factor = torch.linalg.cholesky_ex(gram[index[:, None], index])[0]
    weights = gram.new_zeros(len(gram))
    weights[index] = torch.cholesky_solve(right[index][:, None], factor).squeeze(1)
    return weights


def _candidates(x: Tensor) -> Tensor | None:
    """Unit vectors (m, d) that include the outward normals of all facets of the hull, or None.

    Args:
        x: Points, shape (n, d).
    """
    n, d = x.shape
    if d == 2:
        begin, length = arcs(x)
        return on_circle(begin + length / 2)
    if n <= d:
        return None
    subsets = math.comb(n, d)
    few = subsets <= _SUBSETS and subsets * d**3 <= _SUBSET_FLOP
    if not few and d > _HULL_DIMENSIONS:
        return None
    centred = x - x.mean(0)  # the mean is inside the hull, wherever the origin is
    if float(torch.linalg.svdvals(centred)[-1]) < 1e-6:  # flat
        return None
    if few:
        return _normals_by_subsets(centred)
    return _normals_by_hull(x)


def _normals_by_subsets(centred: Tensor) -> Tensor:
    """Normals of the hyperplanes through any d points, away from the mean at the origin."""
    n, d = centred.shape
    corners = centred[_subsets(n, d, centred.device)]  # (m, d, d)
    normals = torch.linalg.solve_ex(corners, torch.ones_like(corners[..., :1]))[0].squeeze(-1)
    normals = unit_rows(normals)[0]
    return normals[normals.norm(dim=1) > 0.5]


def _subsets(n: int, d: int, device: torch.device) -> Tensor:
    """All subsets of d out of n as ascending indices, (m, d)."""
    every = torch.arange(n, device=device)
    rows = every[: n - d + 1, None]
    for size in range(1, d):
        may_follow = (every > rows[:, -1:]) & (every <= n - d + size)
        row, following = may_follow.nonzero(as_tuple=True)
        rows = torch.cat([rows[row], following[:, None]], 1)
    return rows


def _normals_by_hull(x: Tensor) -> Tensor | None:
    """Normals of the facets of scipy's hull; None if scipy is not installed or finds no hull."""
    try:
        from scipy.spatial import ConvexHull, QhullError
    except ImportError:
        return None
    try:
        normals = ConvexHull(x.cpu().numpy()).equations[:, :-1]
    except QhullError:
        return None
    return torch.as_tensor(normals, dtype=x.dtype, device=x.device)
