"""Mean pair energy and its gradient in closed form, over row panels of the Gram matrix.

With unit rows x_i, squared chords q_ij = 2 - 2 x_i.x_j and a kernel F, the gradient of the pair sum is

    d/dw_i = -2 / |w_i| (I - x_i x_i^T) sum_j F'(q_ij) x_j

so one Gram matrix gives both. Only its upper triangle is formed, a panel of rows at a time:
n*n*d FLOP for the cosines and 2*n*n*d for the gradient, and never more than panel * n entries in memory.

The gradient can be shared out in two ways: by parts of the triangle that cost the same and add up to it, or by
rows, each against all others, k of them for 4*k*n*d FLOP.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from lightning_hsu._core.bf16 import pair_sums
from lightning_hsu._core.kernel import PairTerm, softened_at
from lightning_hsu._core.near import NEAR
from lightning_hsu._core.precision import exact_arithmetic, with_float64, working_dtype
from lightning_hsu._core.sums import PairSums

PANEL = 256
_PART_PANEL = (
    PANEL // 2
)  # the block on the diagonal is formed whole: smaller ones keep the parts equal
_ENTRIES = 2**22  # Gram entries held at once when several small groups go together


def pair_energy(
    w: Tensor, term: PairTerm, *, with_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
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
    n = w.shape[-2]
    if w.numel() == 0:
        return w.new_zeros(w.shape[:-2], dtype=working_dtype(w.dtype)), torch.zeros_like(
            w
        ) if with_grad else None
    stack, dtype = _stack(w, term)
    values, grads = [], []
    with torch.no_grad(), exact_arithmetic(stack):
        for some in torch.split(stack, _together(n, n)):
            sums = pair_sums(some.to(dtype), term) if with_grad else PairSums(some.to(dtype), term)
            sums.add(0, n, _height(n), with_grad=with_grad)
            values.append(sums.value())
            grads += [sums.gradient(w.dtype)] if with_grad else []
    bound = torch.finfo(working_dtype(w.dtype)).max
    value = (
        _joined(values)
        .reshape(w.shape[:-2])
        .clamp(-bound, bound)
        .to(w.device, working_dtype(w.dtype))
    )
    return value, _joined(grads).reshape(w.shape).to(w.device) if with_grad else None


def small_pair_gradient(w: Tensor, term: PairTerm) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The gradient of :func:`pair_energy` for small groups with nothing special, in few operations.

    Args:
        w: Neurons, shape (b, n, d), float32 or float64, without a graph.
        term: The kernel.

    Returns:
        The gradient (b, n, d), the norms of the neurons (b, n, 1) and, if the logarithm of the mean
        energies is minimised, these (b,) in float64. None where :func:`pair_energy` must be asked:
        for more neurons than a panel has rows, near or nearly opposite pairs, rows of unusual norm
        or a kernel too steep for float32.
    """
    n = w.shape[1]
    if w.numel() == 0 or n >= PANEL // 2 or w.is_mps or too_steep(term):
        return None
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    shortest, longest = norm.aminmax()
    if not (shortest > 1e-15 and longest < 1e15):
        return None
    x = w / norm
    cosine = torch.bmm(x, x.mT)
    q = torch.rsub(cosine, 2.0, alpha=2.0)
    q.diagonal(dim1=1, dim2=2).fill_(2.0)
    nearest, farthest = q.aminmax()
    if not (nearest >= NEAR and farthest <= 4.0 - NEAR):
        return None
    value, slope = term.folded(q, NEAR)
    slope.diagonal(dim1=1, dim2=2).fill_(0.0)
    radial = cosine.mul_(slope).sum(-1, keepdim=True)
    grad = torch.bmm(slope, x).addcmul_(x, radial, value=-1.0)
    grad.mul_(norm.reciprocal().mul_(-2.0 * term.scale(n)))
    if not term.logarithm:
        return grad, norm, None
    value.diagonal(dim1=1, dim2=2).fill_(0.0)
    total = value.sum((1, 2), dtype=torch.float64) * 0.5
    return grad, norm, (total + term.constant(n)) * term.scale(n)


def pair_rows(w: Tensor, term: PairTerm, rows: Tensor) -> Tensor:
    """The gradient of :func:`pair_energy` in some rows, without the work for the others.

    Args:
        w: Neurons, shape (..., n, d), as there.
        term: The kernel.
        rows: The wanted rows, bool, shape (..., n). A group with k of them costs 4 * k * n * d FLOP.

    Returns:
        The gradient with the shape and dtype of ``w``, 0 in the other rows; finite, and the same inputs give the
        same bits.
    """
    if w.numel() == 0:
        return torch.zeros_like(w)
    stack, dtype = _stack(w, term)
    wanted = rows.to(stack.device).reshape(stack.shape[:-1])
    grad, count = torch.zeros_like(stack), wanted.sum(-1)
    with torch.no_grad(), exact_arithmetic(stack):
        for k in sorted(set(count.tolist()) - {0}):  # groups with as many rows go together
            for some in torch.split((count == k).nonzero().squeeze(1), _together(k, w.shape[-2])):
                index = wanted[some].nonzero()[:, 1].reshape(-1, k)
                sums = pair_sums(stack[some].to(dtype), term, index)
                sums.add(0, k, PANEL)
                grad[some[:, None], index] = sums.gradient(w.dtype)
    return grad.reshape(w.shape).to(w.device)


def pair_part(w: Tensor, term: PairTerm, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """One of ``parts`` summands of the gradient of :func:`pair_energy`, each about as much work.

    Args:
        w: Neurons, shape (..., n, d), as there.
        term: The kernel.
        part: Which one, from 0 to ``parts`` - 1.
        parts: How many there are, 1 or more.

    Returns:
        The summand with the shape and dtype of ``w``, and a number, shape () in float32: > 0 if this part met
        coincident neurons or pulls beyond its range; then the summands may not add up to the gradient. They and
        their sum are finite, and the same inputs give the same bits.

    Raises:
        ValueError: if there is no such part.
    """
    if not 0 <= part < parts:
        raise ValueError(f"part must be one of 0 to parts - 1; got part {part} of {parts}")
    if w.numel() == 0:
        return torch.zeros_like(w), torch.zeros((), device=w.device)
    n = w.shape[-2]
    first, last = (round(n * (1.0 - math.sqrt(1.0 - r / parts))) for r in (part, part + 1))
    stack, dtype = _stack(w, term)
    grads, additive = [], True
    with torch.no_grad(), exact_arithmetic(stack):
        for some in torch.split(stack, _together(n, n)):
            sums = pair_sums(some.to(dtype), term)
            sums.add(first, last, _PART_PANEL)
            grads.append(sums.share(w.dtype, parts))
            additive &= sums.additive
    return _joined(grads).reshape(w.shape).to(w.device), torch.tensor(
        float(not additive), device=w.device
    )


def _stack(w: Tensor, term: PairTerm) -> tuple[Tensor, torch.dtype]:
    """The neurons w as one stack of groups (b, n, d), and the dtype to compute in."""
    return with_float64(w.detach()).reshape(-1, *w.shape[-2:]), torch.float64 if too_steep(
        term
    ) else working_dtype(w.dtype)


@lru_cache(maxsize=256)
def too_steep(term: PairTerm) -> bool:
    """Whether float32 would overflow, as for a Riesz kernel with s above 25 or below -100."""
    ends = torch.tensor([softened_at(term, NEAR), softened_at(term, 4.0)], dtype=torch.float64)
    return float(ends.abs().max()) > 1e18


def _height(n: int) -> int:
    """Rows of a panel: fewer where the block on the diagonal, which is formed whole, weighs more, or a row is long."""
    return PANEL if 640 < n <= 16384 else PANEL // 2


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _together(k: int, n: int) -> int:
    """How many groups go together where k rows of each meet n columns."""
    return max(1, _ENTRIES // max(1, min(PANEL, k) * n))
