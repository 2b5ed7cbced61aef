"""Mean pair energy and its gradient in closed form, over symmetric row panels of the Gram matrix.

With unit rows x_i, squared chords q_ij = 2 - 2 x_i.x_j and a kernel F, the gradient of the pair sum is

    d/dw_i = -2 / |w_i| (I - x_i x_i^T) sum_j F'(q_ij) x_j

so one Gram matrix gives both. Only its upper triangle is formed, a panel of rows at a time:
n*n*d FLOP for the cosines and 2*n*n*d for the gradient, and never more than panel * n entries in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hsu.core.kernel import PairTerm, softened_at
from lightning_hsu.core.near import NEAR, NearPairs
from lightning_hsu.core.precision import exact_arithmetic, with_float64, working_dtype
from lightning_hsu.core.sphere import tangent, to_weights, unit_rows

PANEL = 256
_ENTRIES = 2**22  # Gram entries held at once when several small groups go together


def pair_energy(w: Tensor, term: PairTerm, *, with_grad: bool = True) -> tuple[Tensor, Tensor | None]:
    """Mean energy over unordered pairs of neurons, and its gradient.

    Args:
        w: Neurons, shape (..., n, d), any floating dtype; rows of any positive norm. Zero and non-finite
            rows take no part.
        term: The kernel.
        with_grad: Also return the gradient.

    Returns:
        The value (...) in float32 or wider, and the gradient with the shape and dtype of ``w`` (None
        without ``with_grad``). Both are finite, and the same weights give the same bits.
    """
    n, d = w.shape[-2:]
    if w.numel() == 0:
        return w.new_zeros(w.shape[:-2], dtype=working_dtype(w.dtype)), torch.zeros_like(w) if with_grad else None
    stack = with_float64(w.detach()).reshape(-1, n, d)
    dtype = _wide_enough(term, working_dtype(w.dtype))
    together = max(1, _ENTRIES // max(1, min(PANEL, n) * n))
    with torch.no_grad(), exact_arithmetic(stack):
        parts = [_panels(part.to(dtype), term, with_grad, w.dtype) for part in torch.split(stack, together)]
    value = torch.cat([part[0] for part in parts]).reshape(w.shape[:-2])
    bound = torch.finfo(working_dtype(w.dtype)).max
    value = value.clamp(-bound, bound).to(working_dtype(w.dtype)).to(w.device)
    if not with_grad:
        return value, None
    return value, torch.cat([part[1] for part in parts]).reshape(w.shape).to(w.device)


def _wide_enough(term: PairTerm, dtype: torch.dtype) -> torch.dtype:
    """Return float64 for a kernel so steep (a Riesz kernel with s above 25 or below -100) that float32 would overflow."""
    extremes = (*softened_at(term, NEAR), *softened_at(term, 4.0))
    return torch.float64 if max(abs(part) for part in extremes) > 1e18 else dtype


def _panels(w: Tensor, term: PairTerm, with_grad: bool, out: torch.dtype) -> tuple[Tensor, Tensor]:
    """Value (b,) in float64 and gradient (b, n, d) in ``out`` for a stack w (b, n, d) of float32 or float64."""
    b, n, _ = w.shape
    x, inverse_norm = unit_rows(w)
    near: dict[int, NearPairs] = {}
    total = torch.zeros(b, dtype=torch.float64, device=w.device)
    grad = torch.zeros_like(x)
    alive = inverse_norm > 0  # (b, n, 1)
    live: list[int] = alive.sum((-2, -1)).tolist()
    for start in range(0, n, PANEL):
        rows = x[:, start : start + PANEL]  # (b, k, d)
        q = _squared_chords(rows, x[:, start:])
        redo = _near(q)
        if redo is not None:
            for i in redo.any(2).any(1).nonzero().flatten().tolist():
                if i not in near:
                    near[i] = NearPairs(w[i], term)
                near[i].add_panel(redo[i], start, with_grad)
        value, slope = _terms(q, term, redo)
        if min(live) < n:  # a zero row has cosine 0 with all: no pull on the others, but a value
            value *= alive[:, start : start + PANEL] & alive[:, start:].mT
        k = rows.shape[1]
        # The block on the diagonal holds each pair twice.
        total += value.sum((-2, -1), dtype=torch.float64) - value[..., :k].sum((-2, -1), dtype=torch.float64) / 2
        if with_grad:
            _add_product(grad[:, start : start + k], slope, x[:, start:])
            _add_product(grad[:, start + k :], slope[..., k:].mT, rows)
    for i, pairs in near.items():
        total[i] += pairs.energy
    offset = torch.tensor([term.constant(m) for m in live], dtype=torch.float64, device=w.device)
    scale = torch.tensor([term.scale(m) for m in live], dtype=torch.float64, device=w.device)
    value = (total + offset) * scale
    if with_grad:
        grad = to_weights(_sphere_gradient(grad, x, near, scale), inverse_norm, out)
    return value, grad


def _squared_chords(rows: Tensor, cols: Tensor) -> Tensor:
    """Squared chords (b, k, m) of unit rows (b, k, d) to the columns (b, m, d) that begin with them; itself: 2."""
    q = (rows @ cols.mT).mul_(-2.0).add_(2.0)
    q[..., : rows.shape[1]].diagonal(dim1=-2, dim2=-1).fill_(2.0)
    return q


def _near(q: Tensor) -> Tensor | None:
    """The pairs too near, or too near to opposite, for their squared chord in float32; None if there are none."""
    low, high = q.aminmax()
    if bool((low >= NEAR) & (high <= 4.0 - NEAR)):
        return None
    return (q < NEAR) | (q > 4.0 - NEAR)


def _terms(q: Tensor, term: PairTerm, redo: Tensor | None) -> tuple[Tensor, Tensor]:
    """Energy and slope (b, k, m) at squared chords q, which is overwritten; 0 for a neuron itself and where redone."""
    value, slope = term.folded(q if redo is None else q.clamp_(NEAR, 4.0 - NEAR), NEAR)
    for part in (value, slope):
        part[..., : q.shape[1]].diagonal(dim1=-2, dim2=-1).zero_()
        if redo is not None:
            part.masked_fill_(redo, 0.0)
    return value, slope


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to ``out`` in place; stacks of one go through the plain matrix product, which is faster."""
    if out.shape[0] == 1:
        out[0].addmm_(a[0], b[0])
    else:
        out.baddbmm_(a, b)


def _sphere_gradient(grad: Tensor, x: Tensor, near: dict[int, NearPairs], scale: Tensor) -> Tensor:
    """From sum_j F'(q_ij) x_j (b, n, d) to the gradient on the sphere: tangent part, near pairs, mean over pairs."""
    grad = tangent(grad, x) * (-2.0 * scale[:, None, None]).to(grad.dtype)
    bound = torch.finfo(grad.dtype).max / 4
    for i, pairs in near.items():
        grad[i] += (pairs.gradient() * scale[i]).clamp(-bound, bound).to(grad.dtype)
    return grad
