"""Pair sums with bfloat16 products: the same sums to about 1e-3, for half the time or less.

The products for cosines and pulls are taken in bfloat16, all else in float32. Two measures keep
the error small. Pairs so near (or so near to opposite) that a rounded cosine would give a poor
distance are redone in float64, and a panel with many of them is computed in float32. And only the
difference of the slopes to the slope at right angles is rounded: the rest, the same for all pairs,
pulls along the sum of all neurons, which is known in float32.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.parts import Done
from lightning_hsu._core.precision import bf16_allowed
from lightning_hsu._core.sums import GramPanel, PairSums, outside, product

_NEAREST = 1.0
"""Squared chord above which rounding to 2**-9 leaves an error of 2e-3 (full space, s <= 2)."""

_FEW = 1 / 32
"""Largest part of a panel to redo in float64; above it the whole panel is computed in float32."""

SMALLEST = 128
"""Number of neurons or dimensions below which conversions cost what the products save."""


class BF16PairSums(PairSums):
    """The sums with bfloat16 products, for a gradient; see :class:`PairSums`."""

    def __init__(
        self, w: Tensor, term: PairTerm, index: Tensor | None = None, **settings: Any
    ) -> None:
        super().__init__(w, term, index, **settings)
        self.bf16 = self.x.bfloat16()
        self.bf16_rows = self.rows.bfloat16()
        self.centre = slope_at_right_angles(term)
        # The sum of all rows, that of the rows before the panel, and, by row number, the pull to
        # add to all rows from that one on.
        self.sum = self.x.sum(1, keepdim=True)
        self.before = torch.zeros_like(self.sum)
        self.onward: dict[int, Tensor] = {}

    def add(self, height: int, *, with_grad: bool = True, done: Done | None = None) -> None:
        """Add the pairs of all rows, in panels of ``height`` rows."""
        super().add(height, with_grad=with_grad, done=done)
        pull = torch.zeros_like(self.before)
        for row, following in pairwise([*self.onward, self.grad.shape[1]]):
            pull += self.onward[row]
            self.grad[:, row:following] += pull

    def keeps_slopes(self) -> bool:
        """Pulls are rounded and multiplied panel by panel."""
        return False

    def _add_panel(self, panel: GramPanel, with_grad: bool) -> None:
        rows = self.bf16_rows[:, panel.start : panel.stop]
        cols = self.bf16[:, panel.left :]
        q = self._squared_chords(product(rows, cols.mT).float(), panel)
        redo = outside(q, _NEAREST)
        if redo is not None and _entries_redone(redo) > _FEW * redo.numel():
            super()._add_panel(panel, with_grad)
            self._leave(panel, 0.0)
            return
        slope = self._add_energies(panel, q, redo, _NEAREST, with_grad)
        pull = slope.sub_(self.centre).bfloat16()
        own_grad = self.grad[:, panel.start : panel.stop]
        _add_to(own_grad, product(pull, cols), panel.fresh)
        own_grad += self.centre * (self.sum - self.before)
        if panel.seam < pull.shape[2]:
            below = product(pull[..., panel.seam :].mT, rows)
            _add_to(self.grad[:, panel.stop :], below, panel.fresh)
        self._leave(panel, self.centre)

    def _leave(self, panel: GramPanel, centre: float) -> None:
        """Leave a panel behind; each of its rows pulls all later rows by ``centre``."""
        if self.index is None:
            own_sum = self.x[:, panel.start : panel.stop].sum(1, keepdim=True)
            self.before = self.before + own_sum
            self.onward[panel.stop] = centre * own_sum

    def _tangent(self) -> Tensor:
        """The tangent part of the gathered pulls.

        Their products with the rows are taken anew, since pulls and cosines agree only to rounding.
        """
        self.radial = (self.grad * self.rows).sum(-1)
        return super()._tangent()


def kind_of_sums(w: Tensor) -> type[PairSums]:
    """The class of sums that computes the gradient of neurons w (b, n, d) here."""
    if w.is_cuda or not bf16_allowed():  # a GPU has faster float32 products: gradient_arithmetic
        return PairSums
    if w.dtype == torch.float32 and min(w.shape[1:]) >= SMALLEST:
        return BF16PairSums
    return PairSums


def _add_to(out: Tensor, part: Tensor, fresh: bool) -> None:
    """Add a part to ``out``, or overwrite ``out`` if it is ``fresh``."""
    if fresh:
        out.copy_(part)
    else:
        out.add_(part)


def _entries_redone(mask: Tensor) -> int:
    """Entries (of all groups) in the rows and columns where a mask (b, k, m) is true somewhere."""
    rows = mask.any(2).sum(1)
    cols = mask.any(1).sum(1)
    return int((rows * cols).sum())


@lru_cache(maxsize=256)
def slope_at_right_angles(term: PairTerm) -> float:
    """The folded slope of a kernel at q = 2; 0 in half space."""
    return float(term.folded(torch.tensor([2.0], dtype=torch.float64), 1.0)[1])
