"""The sums behind mean pair energies and their gradients, gathered over row panels of the Gram matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.near import NEAR, NearPairs
from lightning_hsu._core.sphere import largest_entries, to_weights, unit_rows


class PairSums:
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
        self.live: list[int] = (
            [w.shape[1]] * len(w) if self.alive is None else self.alive.sum((-2, -1)).tolist()
        )
        self.in_range = bool(
            high < 1e15
        )  # then no gradient over a norm overflows, if it is not one of near pairs
        self.rows, self.inverse_norm = self.x, inverse_norm
        if index is not None:
            self.rows, self.inverse_norm = (
                torch.take_along_dim(a, index[..., None], 1) for a in (self.x, inverse_norm)
            )
        self.near: dict[int, NearPairs] = {}
        self.total = torch.zeros(len(w), dtype=torch.float64, device=w.device)
        self.grad = w.new_empty(
            0
        )  # (b, k, d), that of the pairs that are not near, before anything is multiplied or projected
        self.radial = torch.zeros(
            self.rows.shape[:2], dtype=w.dtype, device=w.device
        )  # its products with the unit rows
        self.two = torch.tensor(2.0, dtype=w.dtype)
        self.additive = True  # whether the gradient, once taken, is a sum over pairs

    def _by_group(self, function: Callable[[float], float]) -> Tensor | float:
        """A number (b,) for each group; one where they are equal."""
        if self.alive is None:
            return function(self.w.shape[1])
        return torch.tensor(
            [function(m) for m in self.live], dtype=torch.float64, device=self.w.device
        )

    def add(self, first: int, last: int, height: int, *, with_grad: bool = True) -> None:
        """Add the pairs of the rows from ``first`` to before ``last``, in panels of so many rows."""
        if with_grad:
            self.grad = (torch.empty_like if first == 0 < last else torch.zeros_like)(self.rows)
        for start in range(first, last, height):
            self._add_panel(start, min(start + height, last), with_grad)

    def _add_panel(self, start: int, stop: int, with_grad: bool) -> None:
        left = start if self.index is None else 0
        rows, cols = self.rows[:, start:stop], self.x[:, left:]  # (b, k, d), (b, m, d)
        seam = (
            stop - left if self.index is None else cols.shape[1]
        )  # columns before it hold each pair twice
        cosine = product(rows, cols.mT)
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
        if (
            self.alive is not None
        ):  # a zero row has cosine 0 with all: no pull on the others, but a value
            value *= (self.inverse_norm[:, start:stop] > 0) & self.alive[:, left:].mT
        self._total(value, seam)
        if with_grad:
            fresh = start == 0 or self.index is not None  # then nothing was there before
            radial = cosine.mul_(slope)
            self.radial[:, start:stop] += radial.sum(-1)
            _add_product(self.grad[:, start:stop], slope, cols, fresh)
        if with_grad and seam < cols.shape[1]:
            self.radial[:, stop:] += radial[..., seam:].sum(-2)
            _add_product(self.grad[:, stop:], slope[..., seam:].mT, rows, fresh)

    def _total(self, value: Tensor, seam: int) -> None:
        """Add the energies of a panel (b, k, m), which holds the pairs of its columns before ``seam`` twice."""
        self.total += value[..., :seam].sum((-2, -1), dtype=torch.float64) * 0.5
        if seam < value.shape[2]:
            self.total += value[..., seam:].sum((-2, -1), dtype=torch.float64)

    def _fill_own(self, part: Tensor, start: int, value: float) -> None:
        """Fill in where the rows from ``start`` on of a panel (b, k, m) meet themselves."""
        if self.index is None:
            part.diagonal(dim1=1, dim2=2).fill_(value)
        else:
            part.scatter_(2, self.index[:, start : start + part.shape[1], None], value)

    def _redo(
        self, mask: Tensor, start: int, stop: int, left: int, seam: int, with_grad: bool
    ) -> None:
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
        room = (
            torch.finfo(out).max
            / 2
            / parts
            / largest_entries(grad).clamp_min(torch.finfo(grad.dtype).tiny)
        )
        self.additive &= not bool((self.inverse_norm > room).any())
        return (grad * torch.minimum(self.inverse_norm, room)).to(out)

    def _on_sphere(self) -> Tensor:
        """From sum_j F'(q_ij) x_j (b, k, d) to the gradient on the sphere: tangent part, near pairs, mean over pairs."""
        grad = self._tangent().mul_(self._mean())
        bound = torch.finfo(grad.dtype).max / 4
        for i, pairs in self.near.items():
            rows, near = pairs.gradient()
            near *= self.term.scale(self.live[i])
            self.additive &= pairs.duplicates is None and not bool((near.abs() > bound).any())
            near = near.clamp_(-bound, bound).to(grad.dtype)
            if (
                self.index is not None
            ):  # from rows of all to places in the index; rows that are not in it go beyond its end
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
        return -2.0 * (
            scale[:, None, None].to(self.grad.dtype) if isinstance(scale, Tensor) else scale
        )


def _near(q: Tensor) -> Tensor | None:
    """The pairs too near, or too near to opposite, for their squared chord in float32; None if there are none."""
    low, high = q.aminmax()
    if bool((low >= NEAR) & (high <= 4.0 - NEAR)):
        return None
    return (q < NEAR) | (q > 4.0 - NEAR)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; stacks of one go through the plain matrix product, which is faster."""
    return torch.mm(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b)


def _add_product(out: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """Add a @ b to ``out`` in place, or put it there where that is ``fresh``."""
    beta = 0.0 if fresh else 1.0
    if len(a) == 1:
        out[0].addmm_(a[0], b[0], beta=beta)
    else:
        out.baddbmm_(a, b, beta=beta)
