"""Mean pair energy and its gradient in closed form, over row panels of the Gram matrix.

With unit rows x_i, squared chords q_ij = 2 - 2 x_i.x_j and a kernel F, the gradient of the pair sum
is

    d/dw_i = -2 / |w_i| (I - x_i x_i^T) sum_j F'(q_ij) x_j

so one Gram matrix gives both. Only its upper triangle is formed, a panel of rows at a time: n*n*d
FLOP for the cosines and 2*n*n*d for the gradient, and never more than panel * n entries in memory.

The gradient of k rows alone, each against all others, takes 4*k*n*d FLOP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.batches import batches_of, groups_that_fit
from lightning_hsu._core.bf16 import kind_of_sums
from lightning_hsu._core.kernel import PairTerm, softened_at
from lightning_hsu._core.near import NEAR
from lightning_hsu._core.parts import Done, part_of
from lightning_hsu._core.precision import (
    exact_arithmetic,
    gradient_arithmetic,
    with_float64,
    working_dtype,
)
from lightning_hsu._core.sphere import LONGEST, SHORTEST
from lightning_hsu._core.sums import WHOLE, PairSums
from lightning_hsu._core.updates import GradientUpdate, Scratch, StackGradient
from lightning_hsu._core.without_sync import (
    add_batch,
    gradients_without_sync,
    is_complete,
)

PANEL = 256
"""Rows in a panel."""

_GRAM_ENTRIES = 2**22
"""Gram entries of the groups computed together."""

_SEVERAL_PAGES = 2**15
"""Entries from which memory that is used again is worth asking for; less of it is at hand anyway."""


def pair_energy(
    w: Tensor,
    term: PairTerm,
    *,
    with_grad: bool = True,
    done: Done | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mean energy over unordered pairs of neurons, and its gradient.

    Args:
        w: Neurons, shape (..., n, d), any floating dtype; rows of any positive norm. Zero and
            non-finite rows take no part.
        term: The kernel.
        with_grad: Also return the gradient.
        done: Called with the fraction of the work that is done.

    Returns:
        The value (...) in float32 or wider, and the gradient with the shape and dtype of ``w``
        (None without ``with_grad``). Both are finite, and bitwise the same for the same weights.
    """
    dtype = working_dtype(w.dtype)
    if w.numel() == 0:
        value = w.new_zeros(w.shape[:-2], dtype=dtype)
        if not with_grad:
            return value, None
        return value, torch.zeros_like(w)
    if with_grad:
        found = in_one_pass(w, term)
        if found is not None and bool(found.is_exact):  # the host waits only now
            return found.energy.to(dtype), found.grad
    stack = _stack(w, term)
    values = []
    grads = []
    arithmetic = gradient_arithmetic if with_grad else exact_arithmetic
    with torch.no_grad(), arithmetic(stack):
        for sums in _gathered(stack, term, with_grad, done=done):
            values.append(sums.value())
            if with_grad:
                grads.append(sums.gradient(w.dtype))
    bound = torch.finfo(dtype).max
    value = _concatenated(values).reshape(w.shape[:-2]).clamp(-bound, bound).to(w.device, dtype)
    if not with_grad:
        return value, None
    return value, _concatenated(grads).reshape(w.shape).to(w.device)


def stack_pair_gradient(w: Tensor, term: PairTerm, scratch: Scratch | None = None) -> StackGradient:
    """The gradient of :func:`pair_energy` for a stack (b, n, d), in fewer passes over the pairs.

    Its factors are kept apart, and there is no value.

    Args:
        w: The neurons, float32 or float64.
        term: The kernel.
        scratch: Memory for the gradient, which the next one overwrites; None for new memory.
    """
    if w.numel() == 0:
        return StackGradient(torch.zeros_like(w), None, w.new_zeros(*w.shape[:-1], 1))
    stack = _stack(w, term)
    pulls = []
    factors = []
    norms = []
    with torch.no_grad(), gradient_arithmetic(stack):
        for sums in _gathered(stack, term, True, with_value=False, scratch=scratch):
            pull, factor = sums.pull_and_factor(w.dtype)
            pulls.append(pull)
            factors.append(torch.ones_like(sums.inverse_norm) if factor is None else factor)
            norms.append(sums.norm().to(w.dtype))
    pull, factor, norm = (_concatenated(one).to(w.device) for one in (pulls, factors, norms))
    return StackGradient(pull, factor, norm, may_overflow=True)


def small_pair_gradient(
    w: Tensor, term: PairTerm, scratch: Scratch | None = None
) -> StackGradient | None:
    """The gradient of :func:`pair_energy` for small groups with nothing special, in few operations.

    Args:
        w: Neurons, shape (b, n, d), float32 or float64, without a graph.
        term: The kernel.
        scratch: Memory for the gradient, which the next one overwrites; None for new memory.

    Returns:
        The gradient, of the logarithm if that is minimised. None if only :func:`pair_energy` will
        do: for many neurons, near or nearly opposite pairs, rows of unusual norm or a kernel too
        steep for float32.
    """
    n = w.shape[1]
    if w.numel() == 0 or n >= PANEL // 2 or w.is_mps or too_steep(term):
        return None
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    shortest, longest = norm.aminmax()
    if not (shortest.item() > SHORTEST and longest.item() < LONGEST):
        return None
    for_x = for_pull = None
    if scratch is not None and w.numel() >= _SEVERAL_PAGES:
        for_x = scratch.empty("unit rows", w.shape, w)
        for_pull = scratch.empty("pull", w.shape, w)
    x = torch.div(w, norm, out=for_x)
    cosine = torch.bmm(x, x.mT)
    q = torch.rsub(cosine, 2.0, alpha=2.0)
    q.diagonal(dim1=1, dim2=2).fill_(2.0)
    nearest, farthest = q.aminmax()
    if not (nearest.item() >= NEAR and farthest.item() <= 4.0 - NEAR):
        return None
    value = None
    if term.logarithm:
        value, slope = term.folded(q, NEAR)
    else:
        slope = term.folded_slope(q, NEAR)
    slope.diagonal(dim1=1, dim2=2).fill_(0.0)
    radial = cosine.mul_(slope).sum(-1, keepdim=True)
    pull = torch.bmm(slope, x, out=for_pull).addcmul_(x, radial, value=-1.0)
    found = StackGradient(pull, norm.reciprocal().mul_(-2.0 * term.scale(n)), norm)
    if value is not None:
        value.diagonal(dim1=1, dim2=2).fill_(0.0)
        total = value.sum((1, 2), dtype=torch.float64) * 0.5
        found.divide_by((total + term.constant(n)) * term.scale(n))
    return found


def pair_rows(w: Tensor, term: PairTerm, rows: Tensor) -> Tensor:
    """The gradient of :func:`pair_energy` in some rows, without the work for the others.

    Args:
        w: Neurons, shape (..., n, d), as there.
        term: The kernel.
        rows: The wanted rows, bool, shape (..., n). A group with k of them costs 4 * k * n * d
            FLOP.

    Returns:
        The gradient with the shape and dtype of ``w``, 0 in the other rows; finite, and bitwise the
        same for the same inputs.
    """
    if w.numel() == 0:
        return torch.zeros_like(w)
    stack = _stack(w, term)
    wanted = rows.to(stack.device).reshape(stack.shape[:-1])
    grad = torch.zeros_like(stack, dtype=w.dtype)
    count = wanted.sum(-1)
    with torch.no_grad(), gradient_arithmetic(stack):
        for k in sorted(set(count.tolist()) - {0}):  # groups with equally many rows go together
            alike = (count == k).nonzero().squeeze(1)
            for some in torch.split(alike, _groups_at_once(k, w.shape[-2])):
                index = wanted[some].nonzero()[:, 1].reshape(-1, k)
                groups = stack[some]
                sums = kind_of_sums(groups)(groups, term, index, with_value=False)
                sums.add(PANEL)
                grad[some[:, None], index] = sums.gradient(w.dtype)
    return grad.reshape(w.shape).to(w.device)


@lru_cache(maxsize=256)
def too_steep(term: PairTerm) -> bool:
    """Whether float32 would overflow, as for a Riesz kernel with s above 25 or below -100."""
    ends = torch.tensor([softened_at(term, NEAR), softened_at(term, 4.0)], dtype=torch.float64)
    return float(ends.abs().max()) > 1e18


def avoids_sync(update: GradientUpdate, term: PairTerm) -> bool:
    """Whether a layer is computed without synchronisation (without_sync.py).

    It is on a GPU; very steep kernels need float64 throughout.
    """
    return update.entries.is_cuda and update.size[1] > 1 and not too_steep(term)


def takes_one_pass(w: Tensor, term: PairTerm) -> bool:
    """Whether the gradient at neurons (b, n, d) is computed as those of layers on a GPU are."""
    return avoids_sync(GradientUpdate(w, w, 1.0), term)


class OnePass(NamedTuple):
    """What one pass over neurons (..., n, d) on a GPU gives, without waiting for it.

    Args:
        energy: Mean energies (...), float64.
        grad: Their gradient (..., n, d).
        is_exact: Whether no pair was too near for a pass, a 0-d tensor.
    """

    energy: Tensor
    grad: Tensor
    is_exact: Tensor


def in_one_pass(w: Tensor, term: PairTerm) -> OnePass | None:
    """Mean energies of neurons w (..., n, d) and their gradient; None if only the long way will do.

    The logarithm of a kernel is not taken.
    """
    if not w.numel():
        return None
    stack = _stack(w, term)
    if not takes_one_pass(stack, term):
        return None
    found = _in_one_pass(stack, term)
    energy, grad = found.energy.reshape(w.shape[:-2]), found.grad.reshape(w.shape).to(w.dtype)
    return OnePass(energy, grad, found.is_exact)


def _in_one_pass(w: Tensor, term: PairTerm) -> OnePass:
    """The same of a stack (b, n, d), b > 0."""
    grad = torch.zeros_like(w)
    term = replace(term, logarithm=False)
    energies = []
    complete = None
    count = groups_that_fit(*w.shape[1:])
    with torch.no_grad(), gradient_arithmetic(w):
        for start in range(0, len(w), count):
            some = slice(start, start + count)
            (batch,) = batches_of([(GradientUpdate(w[some], grad[some], 1.0), term)])
            found = gradients_without_sync(batch, energy=True)
            own = is_complete(batch, found)
            complete = own if complete is None else complete & own
            assert found.energy is not None
            energies.append(found.energy)
            add_batch(batch, found)
    assert complete is not None
    bound = torch.finfo(w.dtype).max
    return OnePass(_concatenated(energies).clamp(-bound, bound), grad, complete)


def _gathered(
    stack: Tensor,
    term: PairTerm,
    with_grad: bool,
    *,
    with_value: bool = True,
    scratch: Scratch | None = None,
    done: Done | None = None,
) -> Iterator[PairSums]:
    """The sums over all pairs, some groups at a time.

    Args:
        stack: Neurons, shape (b, n, d).
        term: The kernel.
        with_grad: Also gather the gradient.
        with_value: Also gather the energies.
        scratch: Memory that the next sums may overwrite, if all groups go together.
        done: Called with the fraction of the work that is done.
    """
    n = stack.shape[1]
    at_once = _groups_at_once(n, n)
    if len(stack) > at_once:
        scratch = None
    before = 0
    for groups in torch.split(stack, at_once):
        within = part_of(done, before / len(stack), len(groups) / len(stack))
        before += len(groups)
        kind = kind_of_sums(groups) if with_grad else PairSums
        sums = kind(groups, term, with_value=with_value, scratch=scratch)
        sums.add(sums.height(), with_grad=with_grad, done=within)
        yield sums


def _stack(w: Tensor, term: PairTerm) -> Tensor:
    """The neurons as one stack of groups (b, n, d) without a graph, in the dtype to compute in."""
    dtype = working_dtype(w.dtype)
    if too_steep(term):
        dtype = torch.float64
    return with_float64(w.detach()).reshape(-1, *w.shape[-2:]).to(dtype)


def _groups_at_once(k: int, n: int) -> int:
    """How many groups are computed together if k rows of each are paired with n columns."""
    at_once = k if k == n <= WHOLE else min(PANEL, k)
    return max(1, _GRAM_ENTRIES // max(1, at_once * n))


def _concatenated(parts: list[Tensor]) -> Tensor:
    """The parts as one tensor, without a copy if there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
