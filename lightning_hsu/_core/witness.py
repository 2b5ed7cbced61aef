"""Points of the sphere that bear witness to how uneven others are: starts, descent, and how ties are shared."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hsu._core.sphere import tangent, unit_rows

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps witnesses v (k, d) to values (k,) and Euclidean gradients (k, d)."""

# Two witnesses this near, as 1 - cos, are one: they settled in the same hole.
_SAME = 1e-6
_SMALL = 64  # up to this dimension a direction that n >= d points leave out is looked for
_ARCS = 1024  # up to this many points the circle is searched arc by arc


def random_witnesses(count: int, like: Tensor, draw: int) -> Tensor:
    """Random unit rows (count, d) that depend on the number ``draw`` alone; the global generator is not touched."""
    generator = torch.Generator("cpu").manual_seed(2103_01649 + draw)
    rows = torch.randn(count, like.shape[-1], generator=generator, dtype=torch.float64)
    return unit_rows(rows)[0].to(like.device)


def first_witnesses(x: Tensor, count: int) -> Tensor:
    """Where to begin in the dark: opposite the mean of x (n, d), opposite some of its rows, and anywhere; (count, d)."""
    witnesses = random_witnesses(count, x, 0)
    mean = x.mean(0)
    if float(mean.norm()) > 1e-6:
        witnesses[0] = -mean / mean.norm()
    opposite = min((count - 1) // 2, len(x))
    witnesses[1 : 1 + opposite] = -x[
        torch.arange(opposite, device=x.device) * len(x) // max(opposite, 1)
    ]
    return witnesses


def orthogonal_to(x: Tensor) -> Tensor | None:
    """A unit vector (d,) orthogonal to all rows of x (n, d); None if there is none, or if n >= d and d is large."""
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
    return v if float((x @ v).abs().max()) <= 1e-11 else None


def descend(objective: Objective, v: Tensor, steps: int) -> Tensor:
    """Lower the objective from every witness v (k, d) by Barzilai-Borwein steps that are kept only where they help."""
    value, slope = objective(v)
    grad = tangent(slope, v)
    step = 0.1 / _length(grad)  # the first step is a tenth of a radian
    for _ in range(steps):
        if bool((step * _length(grad) <= 1e-12).all()):
            break
        trial = unit_rows(v - step * grad)[0]
        new_value, slope = objective(trial)
        new_grad = tangent(slope, trial)
        wanted = value - 1e-4 * (step * _length(grad) * _length(grad)).squeeze(1)
        better = (new_value <= wanted + 1e-14 * value.abs()).unsqueeze(1)
        moved, turned = trial - v, new_grad - grad
        curved = (moved * turned).sum(1, keepdim=True).abs()
        longest = 0.5 / _length(new_grad)
        barzilai = torch.minimum(
            (moved * moved).sum(1, keepdim=True) / curved.clamp_min(1e-300), longest
        )
        step = torch.where(better, barzilai, step / 4)
        value = torch.where(better.squeeze(1), new_value, value)
        v, grad = torch.where(better, trial, v), torch.where(better, new_grad, grad)
    return v


def shares(v: Tensor, value: Tensor, tolerance: float) -> Tensor:
    """Weights (k,) of witnesses v (k, d), sum 1: equal for the distinct ones whose value ties with the smallest."""
    tied = value <= value.min() + tolerance
    tied[tied.clone()] = distinct(v[tied])
    return tied.to(v.dtype) / tied.sum()


def distinct(v: Tensor) -> Tensor:
    """Which of the witnesses v (k, d) are not near an earlier one: (k,) bool."""
    same: Tensor = (v @ v.T) > 1.0 - _SAME
    return ~same.tril(-1).any(1)


def arcs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The arcs between neighbouring points x (n, 2) of the circle: their beginnings and lengths, (n,) each."""
    begin = torch.atan2(x[:, 1], x[:, 0]).sort().values
    return begin, torch.cat([begin[1:], begin[:1] + 2.0 * math.pi]) - begin


def on_circle(angle: Tensor) -> Tensor:
    """Points (n, 2) at angles (n,)."""
    return torch.stack([angle.cos(), angle.sin()], 1)


def lowest_on_circle(x: Tensor, objective: Objective) -> Tensor | None:
    """The lowest point of each arc between neighbours x (n, 2), by bisection; None for very many points.

    The objective must be convex along every arc and grow towards its ends.
    """
    if len(x) > _ARCS:
        return None
    low, length = arcs(x)
    low, length = low[length > 1e-9], length[length > 1e-9]
    for _ in range(54):
        length = length / 2
        v = on_circle(low + length)
        ahead = torch.stack([-v[:, 1], v[:, 0]], 1)
        falls = (objective(v)[1] * ahead).sum(1) < 0
        low = torch.where(falls, low + length, low)
    return on_circle(low + length / 2)


def _length(rows: Tensor) -> Tensor:
    """Lengths (k, 1), never 0."""
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return length.clamp_min(1e-300)
