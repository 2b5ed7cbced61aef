"""The largest empty cap between points of the sphere: its centre v has the smallest ``max_i cos(x_i, v)``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_hsu._core.sphere import tangent, unit_rows
from lightning_hsu._core.witness import arcs, descend, distinct, on_circle, orthogonal_to

TIED = 1e-9
"""Cosines this near the largest one count as equal to it."""
SHARED = 1e-6
"""Holes whose depths, as cosines, differ by less share the gradient: rounding to float32 does not choose among them."""

_SUBSETS, _SUBSET_FLOP = 20000, 1e8  # up to here every subset of d points is tried
_HULL = 4  # up to this dimension the convex hull is asked, where scipy is there
_DENSE = 2048  # up to this many points the n x n system of the hemisphere is solved
_PIVOTS = 40  # rounds after which a guess of the positive weights is left as it is: the certificate will tell
_KEPT = 512  # holes of equal depth that are kept


def height(x: Tensor, v: Tensor) -> Tensor:
    """Largest cosine of each witness v (k, d) with the points x (n, d): (k,), the cosine of its empty cap."""
    return (v @ x.T).amax(1)


def deepest_holes(x: Tensor, *, mirrored: bool) -> tuple[Tensor, Tensor] | None:
    """The largest empty caps between points, where it is certain which they are; else None.

    Args:
        x: Points (n, d).
        mirrored: Whether the second half of x is the first half with the sign changed.

    Returns:
        Their centres (k, d), and weights (k, n) of sum 1: for each centre its :func:`multipliers`, over k.
    """
    candidates = _candidates(x)
    if candidates is not None:
        heights = height(x, candidates)
        # With the origin outside the hull no facet need face the hole.
        if x.shape[1] == 2 or float(heights.min()) >= -TIED:
            v = candidates[heights <= heights.min() + SHARED][: 8 * _KEPT]
            v = v[distinct(v)][:_KEPT]
            return v, torch.stack([multipliers(x, each, SHARED) for each in v]) / len(v)
    return _orthogonal_hole(x) if mirrored else _in_hemisphere(x)


def certain(x: Tensor, v: Tensor, weights: Tensor) -> bool:
    """Tell whether no empty cap is larger than the one around v (d,): duality, for caps of a hemisphere or more.

    For any weights (n,) of sum 1 every witness has a cosine of at least ``-|sum_i weights_i x_i|`` with some point.
    """
    return float(height(x, v[None]) + (weights @ x).norm()) <= TIED


def multipliers(x: Tensor, v: Tensor, within: float = TIED) -> Tensor:
    """Weights (n,) >= 0 of sum 1 of the points that touch the cap around v (d,) ``within`` so much, so that their pulls cancel.

    The radius of the cap is then stationary in v, and its gradient is the weighted sum of those of the angles.
    """
    cosine = x @ v
    touching = (cosine >= cosine.max() - within).nonzero().squeeze(1)
    weights = torch.zeros_like(cosine)
    weights[touching] = 1.0 / len(touching)
    if float(tangent(weights @ x, v).norm()) > within:
        weights[touching] = _nearest_to_origin(tangent(x[touching], v))
    return weights


def sink(x: Tensor, v: Tensor, gammas: tuple[float, ...], steps: int) -> Tensor:
    """Lower ``max_i cos(x_i, v)`` from every witness v (k, d): smooth maxima, one after the other sharper."""
    for gamma in gammas:

        def smooth(v: Tensor, gamma: float = gamma) -> tuple[Tensor, Tensor]:
            scaled = gamma * (v @ x.T)
            return scaled.logsumexp(1) / gamma, scaled.softmax(1) @ x

        v = descend(smooth, v, max(1, steps // len(gammas)))
    return v


def settle(x: Tensor, v: Tensor, rounds: int) -> Tensor:
    """Follow the steepest descent of ``max_i cos(x_i, v)`` from v (d,) exactly, from one touching point to the next."""
    for _ in range(rounds):
        pull = tangent(multipliers(x, v) @ x, v)
        strength = float(pull.norm())
        if strength <= 1e-11:
            break
        ahead = -pull / strength
        cosine, rate = x @ v, x @ ahead
        top = float(cosine.max())
        later = (cosine < top - TIED) & (rate > -strength)
        # Where the great circle meets the next point, or, in a hemisphere, where its lowest point is.
        meets = torch.atan2(top - cosine[later], rate[later] + strength)
        lowest = math.atan2(strength, -top) if top < 0 else math.pi / 4
        angle = min(lowest, float(meets.min())) if len(meets) else lowest
        moved = unit_rows(math.cos(angle) * v + math.sin(angle) * ahead)[0]
        if float((x @ moved).max()) >= top:
            break
        v = moved
    return v


def _in_hemisphere(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The deepest hole and its multipliers where all points x (n, d) lie in a closed hemisphere; else None."""
    n, d = x.shape
    if n > min(3 * d + 20, _DENSE):
        return None
    weights = _nearest_to_origin(x)
    nearest = weights @ x
    if float(nearest.norm()) > TIED:
        v = -nearest / nearest.norm()
        return (v[None], weights[None]) if certain(x, v, weights) else None
    v = orthogonal_to(x)
    return (
        (torch.stack([v, -v]), weights.expand(2, -1) / 2)
        if v is not None and certain(x, v, weights)
        else None
    )


def _orthogonal_hole(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The hole and its multipliers where points and their mirror images leave out a direction; else None."""
    v = orthogonal_to(x[: len(x) // 2])
    return None if v is None else (v[None], torch.full_like(x[:, 0], 1.0 / len(x))[None])


def _nearest_to_origin(x: Tensor) -> Tensor:
    """Weights (n,) >= 0 of sum 1 of the point of the convex hull of x (n, d) nearest to the origin.

    Least squares with weights >= 0 of ``sum_i weights_i (x_i, 1) = (0, 1)``. A ridge makes the solution unique, first
    a large one, for a good guess of which weights are positive, at last one at the level of rounding.
    """
    gram = x @ x.T + 1.0
    positive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for ridge in (1e-3, 1e-6, 1e-9, 1e-12):
        ridged = gram + ridge * torch.diag(gram.diagonal())
        positive = _pivoted(ridged, positive)
    weights = _solved(ridged, positive)
    for _ in range(2):
        weights = weights + _solved(ridged, positive, 1.0 - gram @ weights)
    weights = weights.clamp_min(0.0)
    return weights / weights.sum()


def _pivoted(gram: Tensor, positive: Tensor) -> Tensor:
    """Which weights (n,) are positive where ``gram @ weights = 1``, and where not, ``gram @ weights >= 1``.

    Block principal pivoting (Kim & Park, 2011): solve for a guess, exchange all that came out with the wrong sign, and
    one at a time where that does not help.
    """
    fewest, patience = len(gram) + 1, 3
    for _ in range(min(len(gram) + 20, _PIVOTS)):
        weights = _solved(gram, positive)
        wrong = torch.where(positive, weights < 0, gram @ weights < 1.0 - 1e-11)
        count = int(wrong.sum())
        if count == 0:
            break
        if count < fewest:
            fewest, patience = count, 3
        elif patience > 0:
            patience -= 1
        else:
            wrong[: int(wrong.nonzero().max())] = False
        positive = positive ^ wrong
    return positive


def _solved(gram: Tensor, positive: Tensor, right: Tensor | None = None) -> Tensor:
    """Weights (n,), zero outside ``positive``, with ``gram @ weights`` = right (n,), or 1, there."""
    index = positive.nonzero().squeeze(1)
    factor = torch.linalg.cholesky_ex(gram[index[:, None], index])[0]
    side = gram.new_ones(len(index)) if right is None else right[index]
    weights = gram.new_zeros(len(gram))
    weights[index] = torch.cholesky_solve(side[:, None], factor).squeeze(1)
    return weights


def _candidates(x: Tensor) -> Tensor | None:
    """Unit vectors (m, d) with the outward normals of all facets of the hull of x (n, d) among them; None if unknown."""
    n, d = x.shape
    if d == 2:
        begin, length = arcs(x)
        return on_circle(begin + length / 2)
    few = d < n and math.comb(n, d) <= _SUBSETS and math.comb(n, d) * d**3 <= _SUBSET_FLOP
    if not few and (d > _HULL or n <= d):
        return None
    centred = x - x.mean(0)  # the mean is inside the hull, wherever the origin is
    if float(torch.linalg.svdvals(centred)[-1]) < 1e-6:  # flat
        return None
    return _by_subsets(centred) if few else _by_hull(x)


def _by_subsets(centred: Tensor) -> Tensor:
    """Normals of the hyperplanes through all subsets of d points, away from the mean at the origin."""
    n, d = centred.shape
    corners = centred[_subsets(n, d, centred.device)]  # (m, d, d)
    normals = torch.linalg.solve_ex(corners, torch.ones_like(corners[..., :1]))[0].squeeze(-1)
    normals = unit_rows(normals)[0]
    return normals[normals.norm(dim=1) > 0.5]


def _subsets(n: int, d: int, device: torch.device) -> Tensor:
    """All subsets of d out of n as rising indices, (m, d)."""
    every = torch.arange(n, device=device)
    rows = every[: n - d + 1, None]
    for size in range(1, d):
        row, following = ((every > rows[:, -1:]) & (every <= n - d + size)).nonzero(as_tuple=True)
        rows = torch.cat([rows[row], following[:, None]], 1)
    return rows


def _by_hull(x: Tensor) -> Tensor | None:
    """Normals of the facets from scipy's hull; None where scipy is not there or finds no hull."""
    try:
        from scipy.spatial import ConvexHull, QhullError
    except ImportError:
        return None
    try:
        normals = ConvexHull(x.cpu().numpy()).equations[:, :-1]
    except QhullError:
        return None
    return torch.as_tensor(normals, dtype=x.dtype, device=x.device)
