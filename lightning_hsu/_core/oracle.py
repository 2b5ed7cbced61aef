"""The readable version of the pair sums: all differences written out, in float64, with autograd.

The fast path is tested against it; it takes O(n * n * d) memory. Second derivatives come from the
same sums, a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.precision import exact_arithmetic, with_float64
from lightning_hsu._core.sphere import unit_rows

_BLOCK = 256  # rows at a time in the second derivative

Chords = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps unit rows x (..., k, d) and y (..., n, d) to squared chords from x to y and to -y."""


def oracle_energy(w: Tensor, term: PairTerm) -> Tensor:
    """Mean pair energy (...) in float64 of neurons (..., n, d), with derivatives of any order."""
    x, inverse_norm = unit_rows(w.double())
    offset, scale = _to_mean(inverse_norm, term)
    total = _row_sums(x, inverse_norm, slice(0, w.shape[-2]), term, _by_differences)
    return (total + offset) * scale


def hessian_vector(w: Tensor, v: Tensor, term: PairTerm) -> Tensor:
    """Second derivative of the summed mean energy, times a vector.

    Args:
        w: Neurons, shape (b, n, d).
        v: The vector, shape (b, n, d).
        term: The kernel.

    Returns:
        The product, with the shape and dtype of ``w``.
    """
    wide = with_float64(w.detach()).double()
    direction = with_float64(v.detach()).double()
    product = torch.zeros_like(wide)
    with torch.enable_grad(), exact_arithmetic(wide):
        for start in range(0, w.shape[1], _BLOCK):
            leaf = wide.clone().requires_grad_()
            x, inverse_norm = unit_rows(leaf)
            _, scale = _to_mean(inverse_norm, term)
            rows = slice(start, start + _BLOCK)
            energy = (_row_sums(x, inverse_norm, rows, term, _by_cosines) * scale).sum()
            (grad,) = torch.autograd.grad(energy, leaf, create_graph=True)
            product += torch.autograd.grad((grad * direction).sum(), leaf)[0]
    return product.to(w.device, w.dtype)


def _to_mean(inverse_norm: Tensor, term: PairTerm) -> tuple[Tensor, Tensor]:
    """What turns pair sums into means: a summand (...), then a factor (...)."""
    live = (inverse_norm > 0).sum((-2, -1))
    counts = live.flatten().tolist()
    numbers = [[term.constant(count), term.scale(count)] for count in counts]
    both = torch.tensor(numbers, dtype=torch.float64, device=live.device).reshape(-1, 2)
    return both[:, 0].reshape(live.shape), both[:, 1].reshape(live.shape)


def _by_differences(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared chords (..., k, n) with every difference written out."""
    a = x[..., :, None, :]
    b = y[..., None, :, :]
    return (a - b).square().sum(-1), (a + b).square().sum(-1)


def _by_cosines(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same in k * n memory; in float64 accurate to 1e-8 at a chord of 1e-4."""
    cosine = x @ y.mT
    return (2.0 - 2.0 * cosine).clamp_min(0.0), (2.0 + 2.0 * cosine).clamp_min(0.0)


def _row_sums(
    x: Tensor, inverse_norm: Tensor, rows: slice, term: PairTerm, chords: Chords
) -> Tensor:
    """Half the pair sum (...) of some rows against all rows: over all rows each pair counts once.

    Args:
        x: Unit rows, shape (..., n, d).
        inverse_norm: Their inverse norms, shape (..., n, 1); 0 for rows that take no part.
        rows: Which rows.
        term: The kernel.
        chords: How to measure squared chords.
    """
    n = x.shape[-2]
    q, p = chords(x[..., rows, :], x)  # (..., k, n)
    live = (inverse_norm > 0).squeeze(-1)
    other = ~torch.eye(n, dtype=torch.bool, device=x.device)[rows]
    pair = other & live[..., rows, None] & live[..., None, :]
    value, _, _ = term.split(torch.where(pair, q, 2.0), torch.where(pair, p, 2.0))
    return torch.where(pair, value, 0.0).sum((-2, -1)) / 2
