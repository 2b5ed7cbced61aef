"""Pair sums with bfloat16 products: the same sums to about 1e-3, for about half the time and less.

Cosines and pulls are multiplied in bfloat16 and all else is done in float32, on two conditions that keep the error small. Where
neurons come so near (or so near to opposite) that a rounded cosine would tell their distance badly, these pairs are redone in
float64, and a panel with many of them is computed in float32. And of the slopes only what differs from their value at right
angles is rounded: the rest, the same for all pairs, pulls along the sum of all neurons, which is known in float32.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.precision import products_are_lowered
from lightning_hsu._core.sums import PairSums, product

_FAR = 0.5
"""Cosine up to which products of what is rounded to 2**-9 leave a gradient right to 2e-3 (full space, s up to 2)."""

_FEW = 1 / 32
"""Part of a panel that is redone in float64, else all of it in float32."""

_SMALLEST = 128
"""Neurons and dimensions below which conversions cost what the products save."""


def pair_sums(w: Tensor, term: PairTerm, index: Tensor | None = None) -> PairSums:
    """Sums over the pairs of neurons w (b, n, d) in the precision that products have here."""
    n, d = w.shape[-2:]
    worth = w.dtype == torch.float32 and min(n, d) >= _SMALLEST
    return (LoweredPairSums if worth and products_are_lowered() else PairSums)(w, term, index)


class LoweredPairSums(PairSums):
    """The same with bfloat16 products, for a gradient; see :class:`PairSums`."""

    def __init__(self, w: Tensor, term: PairTerm, index: Tensor | None = None) -> None:
        super().__init__(w, term, index)
        self.low, self.low_rows = self.x.bfloat16(), self.rows.bfloat16()
        self.centre = _slope_at_right_angles(term)
        self.before = torch.zeros_like(self.x[:, :1])  # sum of the rows before the panel
        self.sum = self.x.sum(1, keepdim=True)
        self.onward: dict[int, Tensor] = {}  # what all rows from one on still get, by that row

    def add(self, first: int, last: int, height: int, *, with_grad: bool = True) -> None:
        """Add the pairs of the rows from ``first`` to before ``last``, in panels of so many rows."""
        if self.index is None:
            self.before = self.x[:, :first].sum(1, keepdim=True)
        super().add(first, last, height, with_grad=with_grad)
        pull = torch.zeros_like(self.before)
        for row, following in pairwise([*self.onward, self.grad.shape[1]]):
            pull += self.onward[row]
            self.grad[:, row:following] += pull

    def _add_panel(self, start: int, stop: int, with_grad: bool) -> None:
        left = start if self.index is None else 0
        rows = self.low_rows[:, start:stop]
        cosine = product(rows, self.low[:, left:].mT).float()
        self._fill_own(cosine, start, 0.0)
        low, high = cosine.aminmax()
        redo = None if bool((low >= -_FAR) & (high <= _FAR)) else cosine.abs() > _FAR
        if redo is not None and _extent(redo) > _FEW * redo.numel():
            super()._add_panel(start, stop, with_grad)
            self._pass(start, stop)
            return
        seam = stop - left if self.index is None else cosine.shape[2]
        if redo is not None:
            self._redo(redo, start, stop, left, seam, with_grad)
            cosine.clamp_(-_FAR, _FAR)
        value, slope = self.term.folded(cosine.mul_(-2.0).add_(2.0), 2.0 - 2.0 * _FAR)
        self._fill_own(value, start, 0.0)
        for part in (value, slope):
            if redo is not None:
                part.masked_fill_(redo, 0.0)
        if self.alive is not None:
            value *= (self.inverse_norm[:, start:stop] > 0) & self.alive[:, left:].mT
        self._total(value, seam)
        pull = slope.sub_(self.centre).bfloat16()
        mine = self.grad[:, start:stop]
        fresh = start == 0 or self.index is not None
        mine.copy_(product(pull, self.low[:, left:])) if fresh else mine.add_(
            product(pull, self.low[:, left:])
        )
        mine += self.centre * (self.sum - self.before)
        if seam < pull.shape[2]:
            rest = self.grad[:, stop:]
            rest.copy_(product(pull[..., seam:].mT, rows)) if fresh else rest.add_(
                product(pull[..., seam:].mT, rows)
            )
        self._pass(start, stop, self.centre)

    def _pass(self, start: int, stop: int, centre: float = 0.0) -> None:
        """Go on behind a panel, whose rows pull those that follow by ``centre`` each."""
        if self.index is None:
            own = self.x[:, start:stop].sum(1, keepdim=True)
            self.before = self.before + own
            self.onward[stop] = centre * own

    def _tangent(self) -> Tensor:
        """What is tangent of the gathered pulls: by the products themselves, which agree with the cosines to rounding only."""
        self.radial = (self.grad * self.rows).sum(-1)
        return super()._tangent()


def _extent(mask: Tensor) -> int:
    """Entries (of all groups) in the rows and columns that have one of a mask (b, k, m)."""
    return int((mask.any(2).sum(1) * mask.any(1).sum(1)).sum())


@lru_cache(maxsize=256)
def _slope_at_right_angles(term: PairTerm) -> float:
    return float(term.folded(torch.tensor([2.0]), 1.0)[1])
