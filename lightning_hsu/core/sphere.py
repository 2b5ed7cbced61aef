"""Geometry of the unit sphere: unit rows of any scale, tangent vectors, squared chords."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise rows of any finite positive norm without overflow or underflow.

    Args:
        w: Rows, shape (..., n, d), float32 or float64.

    Returns:
        Unit rows (..., n, d) and the inverse norms (..., n, 1). A zero, subnormal or non-finite row
        becomes the zero vector with inverse norm 0: it takes no part.
    """
    largest = torch.linalg.vector_norm(w, ord=float("inf"), dim=-1, keepdim=True)  # (..., n, 1)
    usable = torch.isfinite(largest) & (largest >= torch.finfo(w.dtype).tiny)
    largest = torch.where(usable, largest, 1.0)
    x = torch.where(usable, w / largest, 0.0)  # entries in [-1, 1]: squares neither overflow nor vanish
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return x / length, torch.where(usable, 1.0 / length / largest, 0.0)


def tangent(v: Tensor, x: Tensor) -> Tensor:
    """Remove from each row of ``v`` its component along the unit row of ``x``; both (..., n, d)."""
    return v - (v * x).sum(-1, keepdim=True) * x


def squared_chords(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared chords from the rows of x (k, d) to those of y and of -y (m, d), by differences: two (k, m).

    Differences keep what ``2 - 2 * cos`` cancels away: at a chord of 1e-4 the latter has no digit left in float32.
    """
    by_difference = "donot_use_mm_for_euclid_dist"
    chord = torch.cdist(x, y, compute_mode=by_difference)
    opposite = torch.cdist(x, -y, compute_mode=by_difference)
    return chord.square(), opposite.square()


def seeded_noise(n: int, d: int, like: Tensor) -> Tensor:
    """Gaussian rows (n, d) that are the same on every rank, device and call; the global generator is not touched."""
    generator = torch.Generator("cpu").manual_seed(20210415)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(like.device, like.dtype)
