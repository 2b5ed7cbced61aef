"""The readable twin of the pair sums: every difference written out, float64, plain autograd, O(n * n * d) memory.

It is what the fast path is tested against. Second derivatives are taken of the same sums, a block of rows at a time.
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


def oracle_energy(w: Tensor, term: PairTerm) -> Tensor:
    """Mean pair energy (...) in float64 of neurons (..., n, d); differentiable any number of times."""
    x, inverse_norm = unit_rows(w.double())
    offset, scale = _to_mean(inverse_norm, term)
    return (
        _row_sums(x, inverse_norm, slice(0, w.shape[-2]), term, _by_differences) + offset
    ) * scale


def _to_mean(inverse_norm: Tensor, term: PairTerm) -> tuple[Tensor, Tensor]:
    """What to add to the pair sums (...) of the live rows, and what to multiply them by, to get means."""
    live = (inverse_norm > 0).sum((-2, -1))
    parts = [[term.constant(m), term.scale(m)] for m in live.flatten().tolist()]
    offset, scale = (
        torch.tensor(parts, dtype=torch.float64, device=live.device).reshape(-1, 2).unbind(1)
    )
    return offset.reshape(live.shape), scale.reshape(live.shape)


def _by_differences(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared chords (..., k, n) from unit rows x (..., k, d) to y (..., n, d) and to -y, every difference written out."""
    a, b = x[..., :, None, :], y[..., None, :, :]
    return (a - b).square().sum(-1), (a + b).square().sum(-1)


def _by_cosines(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same from cosines, in memory k * n; in float64 good to 1e-8 at a chord of 1e-4."""
    cosine = x @ y.mT
    return (2.0 - 2.0 * cosine).clamp_min(0.0), (2.0 + 2.0 * cosine).clamp_min(0.0)


def _row_sums(
    x: Tensor, inverse_norm: Tensor, rows: slice, term: PairTerm, chords: Chords
) -> Tensor:
    """Half the pair sum of ``rows`` against all rows: over all rows each unordered pair counts once."""
    n = x.shape[-2]
    q, p = chords(x[..., rows, :], x)  # (..., k, n)
    live = (inverse_norm > 0).squeeze(-1)
    other = ~torch.eye(n, dtype=torch.bool, device=x.device)[rows]
    pair = other & live[..., rows, None] & live[..., None, :]
    value, _, _ = term.split(torch.where(pair, q, 2.0), torch.where(pair, p, 2.0))
    return torch.where(pair, value, 0.0).sum((-2, -1)) / 2


def hessian_vector(w: Tensor, v: Tensor, term: PairTerm) -> Tensor:
    """Second derivative of the summed mean energy applied to v; w and v (b, n, d), the result in the dtype of w."""
    wide, direction = (with_float64(part.detach()).double() for part in (w, v))
    product = torch.zeros_like(wide)
    with torch.enable_grad(), exact_arithmetic(wide):
        for start in range(0, w.shape[1], _BLOCK):
            leaf = wide.clone().requires_grad_()
            x, inverse_norm = unit_rows(leaf)
            _, scale = _to_mean(inverse_norm, term)
            part = (
                _row_sums(x, inverse_norm, slice(start, start + _BLOCK), term, _by_cosines) * scale
            ).sum()
            (grad,) = torch.autograd.grad(part, leaf, create_graph=True)
            product += torch.autograd.grad((grad * direction).sum(), leaf)[0]
    return product.to(w.device, w.dtype)
