"""Geometry of the unit sphere: unit rows, tangent vectors, squared chords, coincident points."""

from __future__ import annotations

import torch
from torch import Tensor

SHORTEST = 1e-15
LONGEST = 1e15
"""Between these norms no square of an entry that matters vanishes or overflows in float32."""

_SEED = 20210415


def unit_rows(w: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Normalise rows of any finite positive norm without overflow or underflow.

    Args:
        w: Rows, shape (..., n, d), float32 or float64.
        out: Memory for the unit rows, of this shape; it may stay unused.

    Returns:
        Unit rows (..., n, d) and the inverse norms (..., n, 1). A zero, subnormal or non-finite row
        becomes the zero vector with inverse norm 0: it takes no part.
    """
    length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)  # (..., n, 1)
    if _squares_are_safe(length.detach()):
        return torch.div(w, length, out=out), length.reciprocal()
    tiny = torch.finfo(w.dtype).tiny
    largest = largest_entries(w.detach())  # (..., n, 1)
    usable = torch.isfinite(largest) & (largest >= tiny)
    largest = torch.where(usable, largest, 1.0)
    # With entries in [-1, 1] squares neither overflow nor vanish.
    x = torch.where(usable, w / largest, 0.0)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(tiny)
    return x / length, torch.where(usable, 1.0 / length / largest, 0.0)


def live_rows(w: Tensor) -> Tensor:
    """Indices of the rows of w (n, d) that are neither zero nor subnormal nor non-finite."""
    length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    if _squares_are_safe(length):
        return torch.arange(len(w), device=w.device)
    return (unit_rows(w)[1].squeeze(-1) > 0).nonzero().squeeze(1)


def _squares_are_safe(length: Tensor) -> bool:
    """Whether no square of an entry overflowed or vanished; False if a length is NaN."""
    if not length.numel():
        return False
    low, high = length.aminmax()
    return bool((low > SHORTEST) & (high < LONGEST))


def largest_entries(x: Tensor) -> Tensor:
    """The largest absolute entry of each row, (..., n, 1)."""
    # On a CPU vector_norm with ord=inf is far slower.
    return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))


def row_lengths(x: Tensor) -> Tensor:
    """Norms (..., n, 1) of finite rows x (..., n, d), even where squares of entries overflow.

    Only a CPU is asked whether one did: on a GPU the host would wait for the answer.
    """
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    is_known_finite = x.device.type == "cpu" and bool(torch.isfinite(length).all())
    if is_known_finite or x.numel() == 0:
        return length
    largest = largest_entries(x).clamp_min(torch.finfo(x.dtype).tiny)
    length = torch.linalg.vector_norm(x / largest, dim=-1, keepdim=True)
    return length * largest


def to_weights(grad: Tensor, inverse_norm: Tensor, out: torch.dtype) -> Tensor:
    """Turn a tangent gradient at unit rows into the gradient at the rows themselves.

    Args:
        grad: Tangent gradient, shape (..., n, d); overwritten.
        inverse_norm: Inverse norms of the rows, shape (..., n, 1).
        out: Dtype of the result. A row that would overflow it is shortened, its direction kept.
    """
    tiny = torch.finfo(grad.dtype).tiny
    room = torch.finfo(out).max / 2 / largest_entries(grad).clamp_min(tiny)
    return grad.mul_(torch.minimum(inverse_norm, room)).to(out)


def tangent(v: Tensor, x: Tensor) -> Tensor:
    """Remove from each row of ``v`` its component along the unit row of ``x``; both (..., n, d)."""
    return v - (v * x).sum(-1, keepdim=True) * x


def squared_chords(x: Tensor, y: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Squared chords from unit rows x to unit rows y, and to their mirror images -y.

    In float64 ``2 - 2 * cos`` is off by about 4e-16, precise enough down to a chord of 1e-3. Nearer
    pairs are redone from differences, which keep the digits that the cosine loses.

    Args:
        x: Unit rows, shape (k, d), float64.
        y: Unit rows, shape (m, d), float64.
        wanted: The pairs whose chords must be accurate to 1e-9, bool, shape (k, m).

    Returns:
        Two tensors of shape (k, m).
    """
    cosine = x @ y.mT
    q = (2.0 - 2.0 * cosine).clamp_min_(0.0)
    p = (2.0 + 2.0 * cosine).clamp_min_(0.0)
    _redo_by_differences(q, x, y, wanted)
    _redo_by_differences(p, x, -y, wanted)
    return q, p


def _redo_by_differences(q: Tensor, x: Tensor, y: Tensor, wanted: Tensor) -> None:
    """Replace squared chords q (k, m) in the rows and columns of wanted pairs nearer than 1e-3."""
    tight = (q < 1e-6) & wanted
    rows = tight.any(1).nonzero().squeeze(1)
    cols = tight.any(0).nonzero().squeeze(1)
    if len(rows):
        chord = torch.cdist(x[rows], y[cols], compute_mode="donot_use_mm_for_euclid_dist")
        q[rows[:, None], cols] = chord.square()


def seeded(draw: int = 0) -> torch.Generator:
    """A generator with the same numbers on every rank, and different ones for each ``draw``."""
    return torch.Generator("cpu").manual_seed(_SEED + draw)


def seeded_noise(*shape: int, like: Tensor, draw: int = 0) -> Tensor:
    """Gaussian numbers, the same on every rank and device; the global generator is not touched.

    Args:
        shape: Shape of the result.
        like: A tensor of the wanted device and dtype.
        draw: Each number gives another draw.
    """
    noise = torch.randn(*shape, generator=seeded(draw), dtype=torch.float64)
    return noise.to(like.device, like.dtype)


def coincident(cosine: Tensor, *, half_space: bool = False) -> Tensor:
    """Which rows coincide with another, bool (b, n, 1), from their float64 cosines (b, n, n)."""
    if half_space:
        cosine = cosine.abs()
    same = cosine > 1.0 - 1e-14
    same.diagonal(dim1=-2, dim2=-1).zero_()
    return same.any(-1, keepdim=True)


def separating_tangents(
    x: Tensor, away: Tensor | float, degree: Tensor | float, noise: Tensor
) -> Tensor:
    """Tangents along which coincident rows separate, as long as the weight of their partners.

    Coincident rows have no direction between them. So each row is thought to be shifted by an
    infinitesimal, seeded step, its noise. Then its partners push it along the difference of both
    steps.

    Args:
        x: Unit rows, shape (..., n, d).
        away: Minus the sum of the partners' noise, mirrored for mirrored partners, times their
            weights; shape (..., n, d).
        degree: Sum of the partners' weights, shape (..., n, 1).
        noise: Gaussian noise from :func:`seeded_noise`, shape (..., n, d).
    """
    return degree * unit_rows(tangent(degree * noise + away, x))[0]


def separate_duplicates(x: Tensor, chord: float, *, half_space: bool = False) -> Tensor:
    """Move exactly coincident rows apart, each along its own seeded tangent; others stay.

    Args:
        x: Unit rows, shape (b, n, d), float64; gradients pass through.
        chord: How far a row is moved.
        half_space: Rows that are each other's mirror images also coincide.
    """
    with torch.no_grad():
        moves = coincident(x @ x.mT, half_space=half_space)
    if not bool(moves.any()):
        return x
    noise = seeded_noise(*x.shape[-2:], like=x.detach()).expand_as(x)
    step = separating_tangents(x, 0.0, 1.0, noise).detach()
    return torch.where(moves, unit_rows(x + chord * step)[0], x)
