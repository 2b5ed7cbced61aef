"""Witnesses, points that search the sphere for its emptiest place: starts, descent and ties."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hsu._core.sphere import tangent, unit_rows

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps witnesses v (k, d) to values (k,) and Euclidean gradients (k, d)."""

_SEED = 2103_01649
_SAME = 1e-6  # two witnesses this near, as 1 - cos, count as one: they settled in the same hole
_SMALL = 64  # up to this dimension a direction orthogonal to n >= d points is looked for
_ARCS = 1024  # up to this many points the circle is searched arc by arc
_HALVINGS = 54  # of an arc


def random_witnesses(count: int, like: Tensor, draw: int) -> Tensor:
    """Random unit rows, the same on every rank; the global generator is not touched.

    Args:
        count: How many.
        like: A tensor of the wanted dimension (last) and device.
        draw: Each number gives another draw.

    Returns:
        Unit rows (count, d) in float64.
    """
    generator = torch.Generator("cpu").manual_seed(_SEED + draw)
    rows = torch.randn(count, like.shape[-1], generator=generator, dtype=torch.float64)
    return unit_rows(rows)[0].to(like.device)


def first_witnesses(x: Tensor, count: int) -> Tensor:
    """Starts of a search: opposite the mean of x (n, d), opposite some rows, and at random.

    Returns:
        Witnesses (count, d).
    """
    witnesses = random_witnesses(count, x, 0)
    mean = x.mean(0)
    if float(mean.norm()) > 1e-6:
        witnesses[0] = -mean / mean.norm()
    opposite = min((count - 1) // 2, len(x))
    rows = torch.arange(opposite, device=x.device) * len(x) // max(opposite, 1)
    witnesses[1 : 1 + opposite] = -x[rows]
    return witnesses


def orthogonal_to(x: Tensor) -> Tensor | None:
    """A unit vector (d,) orthogonal to all rows of x (n, d).

    Returns:
        The vector; None if there is none, or if n >= d and d is too large to look for one.
    """
    n, d = x.shape
    if n < d:
        basis = torch.linalg.qr(x.T).Q
        v = random_witnesses(1, x, 0)[0]
        for _ in range(2):  # twice, for full precision
            v = v - basis @ (basis.T @ v)
            v = v / v.norm()
    elif d <= _SMALL:
        v = torch.linalg.svd(x, full_matrices=False).Vh[-1]
    else:
        return None
    if float((x @ v).abs().max()) <= 1e-11:
        return v
    return None


def descend(objective: Objective, v: Tensor, steps: int) -> Tensor:
    """Minimise the objective from each witness, by Barzilai-Borwein steps kept only if they help.

    Args:
        objective: What to minimise.
        v: Witnesses, shape (k, d).
        steps: Steps at most.
    """
    value, slope = objective(v)
    grad = tangent(slope, v)
    step = 0.1 / _lengths(grad)  # the first step is a tenth of a radian
    for _ in range(steps):
        length = _lengths(grad)
        if bool((step * length <= 1e-12).all()):
            break
        trial = unit_rows(v - step * grad)[0]
        new_value, slope = objective(trial)
        new_grad = tangent(slope, trial)
        wanted = value - 1e-4 * (step * length * length).squeeze(1)
        better = new_value <= wanted + 1e-14 * value.abs()
        moved = trial - v
        turned = new_grad - grad
        curved = (moved * turned).sum(1, keepdim=True).abs().clamp_min(1e-300)
        barzilai = (moved * moved).sum(1, keepdim=True) / curved
        longest = 0.5 / _lengths(new_grad)
        row_better = better.unsqueeze(1)
        step = torch.where(row_better, torch.minimum(barzilai, longest), step / 4)
        value = torch.where(better, new_value, value)
        v = torch.where(row_better, trial, v)
        grad = torch.where(row_better, new_grad, grad)
    return v


def shares(v: Tensor, value: Tensor, tolerance: float) -> Tensor:
    """Weights of witnesses: equal for the distinct ones whose value ties with the smallest, else 0.

    Args:
        v: Witnesses, shape (k, d).
        value: Their values, shape (k,).
        tolerance: Values that differ by at most this are tied.

    Returns:
        Weights (k,) of sum 1.
    """
    tied = value <= value.min() + tolerance
    tied[tied.clone()] = distinct(v[tied])
    return tied.to(v.dtype) / tied.sum()


def distinct(v: Tensor) -> Tensor:
    """Which of the witnesses v (k, d) are not near an earlier one, bool (k,)."""
    same: Tensor = (v @ v.T) > 1.0 - _SAME
    return ~same.tril(-1).any(1)


def arcs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and lengths (n,) of the arcs between neighbouring points x (n, 2) of the circle."""
    begin = torch.atan2(x[:, 1], x[:, 0]).sort().values
    return begin, torch.cat([begin[1:], begin[:1] + 2.0 * math.pi]) - begin


def on_circle(angle: Tensor) -> Tensor:
    """Points (n, 2) of the circle at angles (n,)."""
    return torch.stack([angle.cos(), angle.sin()], 1)


def lowest_on_circle(x: Tensor, objective: Objective) -> Tensor | None:
    """The lowest point of each arc between neighbouring points of the circle, by bisection.

    Args:
        x: Points, shape (n, 2).
        objective: What to minimise; convex along every arc and growing towards its ends.

    Returns:
        Points (m, 2); None if x has very many points.
    """
    if len(x) > _ARCS:
        return None
    low, length = arcs(x)
    wide = length > 1e-9
    low = low[wide]
    length = length[wide]
    for _ in range(_HALVINGS):
        length = length / 2
        v = on_circle(low + length)
        ahead = torch.stack([-v[:, 1], v[:, 0]], 1)
        falls = (objective(v)[1] * ahead).sum(1) < 0
        low = torch.where(falls, low + length, low)
    return on_circle(low + length / 2)


def _lengths(rows: Tensor) -> Tensor:
    """Lengths (k, 1) of rows (k, d), never 0."""
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return length.clamp_min(1e-300)
