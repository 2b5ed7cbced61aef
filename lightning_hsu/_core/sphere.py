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
    length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)  # (..., n, 1)
    if _ordinary(length.detach()):
        return w / length, length.reciprocal()
    largest = largest_entries(w.detach())  # (..., n, 1)
    usable = torch.isfinite(largest) & (largest >= torch.finfo(w.dtype).tiny)
    largest = torch.where(usable, largest, 1.0)
    x = torch.where(
        usable, w / largest, 0.0
    )  # entries in [-1, 1]: squares neither overflow nor vanish
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return x / length, torch.where(usable, 1.0 / length / largest, 0.0)


def takes_part(w: Tensor) -> Tensor:
    """Which rows of w (n, d) are neither zero nor subnormal nor non-finite, bool (n,)."""
    length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    return (
        torch.ones_like(w[:, 0], dtype=torch.bool)
        if _ordinary(length)
        else unit_rows(w)[1].squeeze(-1) > 0
    )


def _ordinary(length: Tensor) -> bool:
    """Whether norms are such that no square of an entry overflowed, nor vanished where it counts; not so if one is NaN."""
    if not length.numel():
        return False
    low, high = length.aminmax()
    return bool((low > 1e-15) & (high < 1e15))


def largest_entries(x: Tensor) -> Tensor:
    """The largest absolute entry of each row, (..., n, 1)."""
    return torch.maximum(
        x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)
    )  # vector_norm(ord=inf) is far slower on a CPU


def to_weights(grad: Tensor, inverse_norm: Tensor, out: torch.dtype) -> Tensor:
    """From a tangent gradient at unit rows (..., n, d), which is overwritten, to that in the weights, over their norm.

    A row that would overflow ``out`` is shortened, its direction kept.
    """
    room = torch.finfo(out).max / 2 / largest_entries(grad).clamp_min(torch.finfo(grad.dtype).tiny)
    return grad.mul_(torch.minimum(inverse_norm, room)).to(out)


def tangent(v: Tensor, x: Tensor) -> Tensor:
    """Remove from each row of ``v`` its component along the unit row of ``x``; both (..., n, d)."""
    return v - (v * x).sum(-1, keepdim=True) * x


def squared_chords(x: Tensor, y: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Squared chords from the float64 unit rows of x (k, d) to those of y and of -y (m, d): two (k, m).

    Where ``wanted`` (k, m) they are good to 1e-9. In float64 ``2 - 2 * cos`` is off by 4e-16 or so: enough down
    to a chord of 1e-3. Nearer pairs are redone by differences, which keep what the cosine cancels away.
    """
    cosine = x @ y.mT
    q, p = (2.0 - 2.0 * cosine).clamp_min_(0.0), (2.0 + 2.0 * cosine).clamp_min_(0.0)
    _redo_by_differences(q, x, y, wanted)
    _redo_by_differences(p, x, -y, wanted)
    return q, p


def _redo_by_differences(q: Tensor, x: Tensor, y: Tensor, wanted: Tensor) -> None:
    """Replace the squared chords q (k, m) of the rows and columns that hold a wanted pair nearer than 1e-3."""
    tight = (q < 1e-6) & wanted
    rows, cols = tight.any(1).nonzero().squeeze(1), tight.any(0).nonzero().squeeze(1)
    if len(rows):
        chord = torch.cdist(x[rows], y[cols], compute_mode="donot_use_mm_for_euclid_dist")
        q[rows[:, None], cols] = chord.square()


def seeded(draw: int = 0) -> torch.Generator:
    """A generator that gives the same on every rank, another one for each other number."""
    return torch.Generator("cpu").manual_seed(20210415 + draw)


def seeded_noise(*shape: int, like: Tensor, draw: int = 0) -> Tensor:
    """Gaussian numbers that are the same on every rank and device; the global generator is not touched.

    Args:
        shape: Shape of the result.
        like: A tensor of the wanted device and dtype.
        draw: Another draw for each other number.
    """
    return torch.randn(*shape, generator=seeded(draw), dtype=torch.float64).to(
        like.device, like.dtype
    )


def coincident(cosine: Tensor, *, half_space: bool = False) -> Tensor:
    """Tell which rows coincide with another, (b, n, 1), from float64 cosines (b, n, n)."""
    same = (cosine.abs() if half_space else cosine) > 1.0 - 1e-14
    same.diagonal(dim1=-2, dim2=-1).zero_()
    return same.any(-1, keepdim=True)


def parted(x: Tensor, chord: float, *, half_space: bool = False) -> Tensor:
    """Move exactly coincident rows apart by about a chord, each along its own seeded direction; others stay.

    Args:
        x: Unit rows, shape (b, n, d), float64; gradients pass through.
        chord: How far a row is moved.
        half_space: Rows that are each other's mirror image coincide, too.
    """
    with torch.no_grad():
        which = coincident(x @ x.mT, half_space=half_space)
    if not bool(which.any()):
        return x
    noise = tangent(seeded_noise(*x.shape[-2:], like=x.detach()).expand_as(x), x)
    moved = x + chord * unit_rows(noise)[0].detach()
    return torch.where(which, unit_rows(moved)[0], x)
