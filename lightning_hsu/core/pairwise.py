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
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hsu.core.kernel import PairTerm, softened_at
from lightning_hsu.core.near import NEAR, NearPairs
from lightning_hsu.core.precision import exact_arithmetic, with_float64, working_dtype
from lightning_hsu.core.sphere import largest_entries, to_weights, unit_rows

PANEL = 256
_PART_PANEL = PANEL // 2  # the block on the diagonal is formed whole: smaller ones keep the parts equal
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
    n = w.shape[-2]
    if w.numel() == 0:
        return w.new_zeros(w.shape[:-2], dtype=working_dtype(w.dtype)), torch.zeros_like(w) if with_grad else None
    stack, dtype = _stack(w, term)
    values, grads = [], []
    with torch.no_grad(), exact_arithmetic(stack):
        for some in torch.split(stack, _together(n, n)):
            sums = _PairSums(some.to(dtype), term)
            sums.add(0, n, _height(n), with_grad=with_grad)
            values.append(sums.value())
            grads += [sums.gradient(w.dtype)] if with_grad else []
    bound = torch.finfo(working_dtype(w.dtype)).max
    value = _joined(values).reshape(w.shape[:-2]).clamp(-bound, bound).to(w.device, working_dtype(w.dtype))
    return value, _joined(grads).reshape(w.shape).to(w.device) if with_grad else None


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
                sums = _PairSums(stack[some].to(dtype), term, index)
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
            sums = _PairSums(some.to(dtype), term)
            sums.add(first, last, _PART_PANEL)
            grads.append(sums.share(w.dtype, parts))
            additive &= sums.additive
    return _joined(grads).reshape(w.shape).to(w.device), torch.tensor(float(not additive), device=w.device)


def _stack(w: Tensor, term: PairTerm) -> tuple[Tensor, torch.dtype]:
    """The neurons w as one stack of groups (b, n, d), and the dtype to compute in."""
    return with_float64(w.detach()).reshape(-1, *w.shape[-2:]), torch.float64 if too_steep(term) else working_dtype(w.dtype)


def too_steep(term: PairTerm) -> bool:
    """Whether a kernel is so steep (a Riesz kernel with s above 25 or below -100) that float32 would overflow."""
    return max(abs(part) for part in (*softened_at(term, NEAR), *softened_at(term, 4.0))) > 1e18


def _height(n: int) -> int:
    """Rows of a panel: fewer where the block on the diagonal, which is formed whole, weighs more, or a row is long."""
    return PANEL if 640 < n <= 16384 else PANEL // 2


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _together(k: int, n: int) -> int:
    """How many groups go together where k rows of each meet n columns."""
    return max(1, _ENTRIES // max(1, min(PANEL, k) * n))


class _PairSums:
    """Sums over the pairs of a stack of neurons, gathered a panel of rows at a time.

    Args:
        w: Neurons, shape (b, n, d), float32 or float64.
        term: The kernel.
        index: Rows (b, k) that meet all rows and alone gather a gradient; None for the triangle: row i of all meets
            row i and those after it, which gather their share of the gradient, too.
    """

    def __init__(self, w: Tensor, term: PairTerm, index: Tensor | None = None) -> None:
        self.w, self.term, self.index = w, term, index
        self.x, inverse_norm = unit_rows(w)
        low, high = inverse_norm.aminmax()
        self.alive = None if bool(low > 0) else inverse_norm > 0  # (b, n, 1); None if all are
        self.live: list[int] = [w.shape[1]] * len(w) if self.alive is None else self.alive.sum((-2, -1)).tolist()
        self.in_range = bool(high < 1e15)  # then no gradient over a norm overflows, if it is not one of near pairs
        self.rows, self.inverse_norm = self.x, inverse_norm
        if index is not None:
            self.rows, self.inverse_norm = (torch.take_along_dim(a, index[..., None], 1) for a in (self.x, inverse_norm))
        self.near: dict[int, NearPairs] = {}
        self.total = torch.zeros(len(w), dtype=torch.float64, device=w.device)
        self.grad = w.new_empty(0)  # (b, k, d), that of the pairs that are not near, before anything is multiplied or projected
        self.radial = torch.zeros(self.rows.shape[:2], dtype=w.dtype, device=w.device)  # its products with the unit rows
        self.two = torch.tensor(2.0, dtype=w.dtype)
        self.additive = True  # whether the gradient, once taken, is a sum over pairs

    def _by_group(self, function: Callable[[float], float]) -> Tensor | float:
        """A number (b,) for each group; one where they are equal."""
        if self.alive is None:
            return function(self.w.shape[1])
        return torch.tensor([function(m) for m in self.live], dtype=torch.float64, device=self.w.device)

    def add(self, first: int, last: int, height: int, *, with_grad: bool = True) -> None:
        """Add the pairs of the rows from ``first`` to before ``last``, in panels of so many rows."""
        if with_grad:
            self.grad = (torch.empty_like if first == 0 < last else torch.zeros_like)(self.rows)
        for start in range(first, last, height):
            self._add_panel(start, min(start + height, last), with_grad)

    def _add_panel(self, start: int, stop: int, with_grad: bool) -> None:
        left = start if self.index is None else 0
        rows, cols = self.rows[:, start:stop], self.x[:, left:]  # (b, k, d), (b, m, d)
        seam = stop - left if self.index is None else cols.shape[1]  # columns before it hold each pair twice
        cosine = _product(rows, cols.mT)
        q = torch.add(self.two, cosine, alpha=-2.0)
        self._fill_own(q, start, 2.0)
        redo = _near(q)
        if redo is not None:
            self._redo(redo, start, stop, left, seam, with_grad)
            q.clamp_(NEAR, 4.0 - NEAR)
        value, slope = self.term.folded(q, NEAR)
        for part in (value, slope):
            self._fill_own(part, start, 0.0)
            if redo is not None:
                part.masked_fill_(redo, 0.0)
        if self.alive is not None:  # a zero row has cosine 0 with all: no pull on the others, but a value
            value *= (self.inverse_norm[:, start:stop] > 0) & self.alive[:, left:].mT
        twice = value[..., :seam].sum((-2, -1), dtype=torch.float64)
        self.total += twice * 0.5
        if seam < cols.shape[1]:
            self.total += value[..., seam:].sum((-2, -1), dtype=torch.float64)
        if with_grad:
            fresh = start == 0 or self.index is not None  # then nothing was there before
            radial = cosine.mul_(slope)
            self.radial[:, start:stop] += radial.sum(-1)
            _add_product(self.grad[:, start:stop], slope, cols, fresh)
        if with_grad and seam < cols.shape[1]:
            self.radial[:, stop:] += radial[..., seam:].sum(-2)
            _add_product(self.grad[:, stop:], slope[..., seam:].mT, rows, fresh)

    def _fill_own(self, part: Tensor, start: int, value: float) -> None:
        """Fill in where the rows from ``start`` on of a panel (b, k, m) meet themselves."""
        if self.index is None:
            part.diagonal(dim1=1, dim2=2).fill_(value)
        else:
            part.scatter_(2, self.index[:, start : start + part.shape[1], None], value)

    def _redo(self, mask: Tensor, start: int, stop: int, left: int, seam: int, with_grad: bool) -> None:
        """Add the pairs of ``mask`` (b, k, m): rows from ``start`` to before ``stop``, columns from ``left`` on."""
        cols = torch.arange(left, self.x.shape[1], device=mask.device)
        for i in mask.any(2).any(1).nonzero().flatten().tolist():
            if i not in self.near:
                self.near[i] = NearPairs(self.w[i], self.term)
            rows = cols[: stop - start] if self.index is None else self.index[i, start:stop]
            self.near[i].add_panel(mask[i], rows, cols, seam, with_grad=with_grad)

    def value(self) -> Tensor:
        """Mean energy (b,) in float64."""
        total = self.total.clone()
        for i, pairs in self.near.items():
            total[i] += pairs.energy
        return (total + self._by_group(self.term.constant)) * self._by_group(self.term.scale)

    def gradient(self, out: torch.dtype) -> Tensor:
        """Gradient of the mean energy in the rows, (b, k, d) in ``out``; to be called once."""
        if self.in_range and not self.near and out == self.grad.dtype:
            return self._tangent().mul_(self.inverse_norm * self._mean())
        return to_weights(self._on_sphere(), self.inverse_norm, out)

    def share(self, out: torch.dtype, parts: int) -> Tensor:
        """The same, with rows so short that ``parts`` such tensors have a finite sum."""
        grad = self._on_sphere()
        room = torch.finfo(out).max / 2 / parts / largest_entries(grad).clamp_min(torch.finfo(grad.dtype).tiny)
        self.additive &= not bool((self.inverse_norm > room).any())
        return (grad * torch.minimum(self.inverse_norm, room)).to(out)

    def _on_sphere(self) -> Tensor:
        """From sum_j F'(q_ij) x_j (b, k, d) to the gradient on the sphere: tangent part, near pairs, mean over pairs."""
        grad = self._tangent().mul_(self._mean())
        bound = torch.finfo(grad.dtype).max / 4
        for i, pairs in self.near.items():
            rows, near = pairs.gradient()
            near *= self.term.scale(self.live[i])
            self.additive &= pairs.away is None and not bool((near.abs() > bound).any())
            near = near.clamp_(-bound, bound).to(grad.dtype)
            if self.index is not None:  # from rows of all to places in the index; rows that are not in it go beyond its end
                place = torch.full((self.x.shape[1],), len(grad[i]), device=rows.device)
                place[self.index[i]] = torch.arange(len(grad[i]), device=rows.device)
                wanted = place[rows] < len(grad[i])
                rows, near = place[rows][wanted], near[wanted]
            grad[i].index_add_(0, rows, near)
        return grad

    def _tangent(self) -> Tensor:
        """What is tangent of sum_j F'(q_ij) x_j (b, k, d)."""
        return self.grad.addcmul_(self.rows, self.radial[..., None], value=-1.0)

    def _mean(self) -> Tensor | float:
        """What makes of that the gradient of a mean, a number or (b, 1, 1)."""
        scale = self._by_group(self.term.scale)
        return -2.0 * (scale[:, None, None].to(self.grad.dtype) if isinstance(scale, Tensor) else scale)


def _near(q: Tensor) -> Tensor | None:
    """The pairs too near, or too near to opposite, for their squared chord in float32; None if there are none."""
    low, high = q.aminmax()
    if bool((low >= NEAR) & (high <= 4.0 - NEAR)):
        return None
    return (q < NEAR) | (q > 4.0 - NEAR)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; stacks of one go through the plain matrix product, which is faster."""
    return torch.mm(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b)


def _add_product(out: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """Add a @ b to ``out`` in place, or put it there where that is ``fresh``."""
    beta = 0.0 if fresh else 1.0
    if len(a) == 1:
        out[0].addmm_(a[0], b[0], beta=beta)
    else:
        out.baddbmm_(a, b, beta=beta)
