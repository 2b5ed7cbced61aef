"""The sums behind mean pair energies and their gradients, over row panels of the Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.near import NEAR, NearPairs
from lightning_hsu._core.parts import Done
from lightning_hsu._core.sphere import SHORTEST, to_weights, unit_rows
from lightning_hsu._core.updates import Scratch

WHOLE = 1024
"""Up to so many neurons the slopes of all pairs are kept at a time."""


@dataclass(slots=True)
class GramPanel:
    """Some rows of the Gram matrix, and the columns that they are paired with.

    Args:
        start: The first row.
        stop: The row after the last.
        left: The first column.
        seam: The first column, counted from ``left``, whose pairs the panel holds once: they also
            count for their transposed pairs. Pairs in the columns before it are held twice.
        fresh: Whether the panel is the first to write the gradients that it adds to.
    """

    start: int
    stop: int
    left: int
    seam: int
    fresh: bool


class PairSums:
    """Sums over the pairs of a stack of neurons, gathered a panel of rows at a time.

    Args:
        w: Neurons, shape (b, n, d), float32 or float64.
        term: The kernel.
        index: Rows (b, k) that are paired with all rows; only they gather a gradient. None for the
            triangle: each row is paired with itself and the rows after it, which also gather their
            share of the gradient.
        with_value: Also gather the energies.
        scratch: Memory to use, which the next sums overwrite; None for new memory.
    """

    def __init__(
        self,
        w: Tensor,
        term: PairTerm,
        index: Tensor | None = None,
        *,
        with_value: bool = True,
        scratch: Scratch | None = None,
    ) -> None:
        self.w = w
        self.scratch = scratch
        self.term = term
        self.with_value = with_value
        self.index = index
        self.x, inverse_norm = unit_rows(w, self._empty("unit rows", w.shape))
        low, high = inverse_norm.aminmax()
        self.alive: Tensor | None = None  # rows that take part (b, n, 1); None if all do
        self.live = [w.shape[1]] * len(w)  # how many take part in each group
        if not bool(low > 0):
            self.alive = inverse_norm > 0
            self.live = self.alive.sum((-2, -1)).tolist()
        # If in range, no gradient over a norm overflows, unless it comes from near pairs.
        self.in_range = bool(high < 1.0 / SHORTEST)  # all norms are above SHORTEST
        self.rows = self.x  # rows that gather a gradient, (b, k, d)
        self.inverse_norm = inverse_norm
        if index is not None:
            self.rows = torch.take_along_dim(self.x, index[..., None], 1)
            self.inverse_norm = torch.take_along_dim(inverse_norm, index[..., None], 1)
        self.near: dict[int, NearPairs] = {}  # by group
        self.total = torch.zeros(len(w), dtype=torch.float64, device=w.device)
        # The sums of F'(q_ij) x_j over all j but near ones, (b, k, d), and their products with x_i.
        self.grad = w.new_empty(0)
        self.slopes: Tensor | None = None  # all slopes F'(q_ij) (b, n, n), of few neurons
        self.radial = torch.zeros(self.rows.shape[:2], dtype=w.dtype, device=w.device)

    def add(self, height: int, *, with_grad: bool = True, done: Done | None = None) -> None:
        """Add the pairs of all rows, in panels of ``height`` rows.

        After each panel ``done`` is called with the fraction of the triangle that is done.
        """
        n = self.x.shape[1]
        if with_grad and self.keeps_slopes():
            self.slopes = self._empty("slopes", (len(self.x), n, n))
        elif with_grad:
            # The first panel writes every row.
            self.grad = self._empty("pull", self.rows.shape)
        count = self.rows.shape[1]
        for start in range(0, count, height):
            stop = min(start + height, count)
            if self.index is None:
                panel = GramPanel(start, stop, start, stop - start, start == 0)
            else:
                panel = GramPanel(start, stop, 0, n, True)
            self._add_panel(panel, with_grad)
            if done is not None:
                done(1.0 - ((count - stop) / count) ** 2)
        if self.slopes is not None:
            self.grad = self._empty("pull", self.x.shape)
            _add_product(self.grad, self.slopes, self.x, True)
            self.slopes = None

    def _empty(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor of any content."""
        if self.scratch is None:
            return self.w.new_empty(shape)
        return self.scratch.empty(name, shape, self.w)

    def keeps_slopes(self) -> bool:
        """Whether all slopes are kept until one product makes the gradient of them.

        Panel by panel there are two products, which read and write the gradient each time.
        """
        return self.index is None and self.x.shape[1] <= WHOLE

    def height(self) -> int:
        """Rows of a panel of the whole triangle.

        The block on the diagonal is formed whole, which costs relatively more if there are few rows.
        """
        n = self.x.shape[1]
        if n <= 256:
            return 64
        return 256 if WHOLE < n <= 16384 else 128

    def _add_panel(self, panel: GramPanel, with_grad: bool) -> None:
        rows = self.rows[:, panel.start : panel.stop]  # (b, k, d)
        cols = self.x[:, panel.left :]  # (b, m, d)
        cosine = product(rows, cols.mT)
        q = self._squared_chords(cosine, panel)
        slope = self._add_energies(panel, q, outside(q, NEAR), NEAR, with_grad)
        if not with_grad:
            return
        self._fill_diagonal(slope, panel, 0.0)
        radial = cosine.mul_(slope)
        self.radial[:, panel.start : panel.stop] += radial.sum(-1)
        if panel.seam < cols.shape[1]:
            self.radial[:, panel.stop :] += radial[..., panel.seam :].sum(-2)
        self._add_pulls(slope, panel)

    def _add_pulls(self, slope: Tensor, panel: GramPanel) -> None:
        """Add the sums of a panel's slopes (b, k, m) times the neurons that they belong to."""
        own = slice(panel.start, panel.stop)
        below = slope[..., panel.seam :].mT
        if self.slopes is not None:
            self.slopes[:, own, panel.left :] = slope
            self.slopes[:, panel.stop :, own] = below
            return
        _add_product(self.grad[:, own], slope, self.x[:, panel.left :], panel.fresh)
        if panel.seam < slope.shape[2]:
            _add_product(self.grad[:, panel.stop :], below, self.rows[:, own], panel.fresh)

    def _squared_chords(self, cosine: Tensor, panel: GramPanel) -> Tensor:
        """Squared chords at a panel's cosines (b, k, m); 2 where a row meets itself."""
        q = torch.rsub(cosine, 2.0, alpha=2.0)
        self._fill_diagonal(q, panel, 2.0)
        return q

    def _add_energies(
        self, panel: GramPanel, q: Tensor, redo: Tensor | None, nearest: float, with_grad: bool
    ) -> Tensor:
        """Add the energies of a panel, if they are wanted; for near pairs add the gradients, too.

        Args:
            panel: The panel.
            q: Squared chords, shape (b, k, m); overwritten.
            redo: Pairs with q outside [nearest, 4 - nearest], which are redone in float64; None if
                there are none.
            nearest: q is precise enough from this squared chord up to 4 minus it.
            with_grad: Also add the gradients of near pairs.

        Returns:
            The slopes (b, k, m) of the other pairs, 0 for near ones.
        """
        if redo is not None:
            self._redo(redo, panel, with_grad)
            q.clamp_(nearest, 4.0 - nearest)
        if not self.with_value:
            slope = self.term.folded_slope(q, nearest)
            if redo is not None:
                slope.masked_fill_(redo, 0.0)
            return slope
        value, slope = self.term.folded(q, nearest)
        self._fill_diagonal(value, panel, 0.0)
        if redo is not None:
            value.masked_fill_(redo, 0.0)
            slope.masked_fill_(redo, 0.0)
        if self.alive is not None:
            # A zero row has cosine 0 with every row: it pulls on none, but would add a value.
            alive_rows = self.inverse_norm[:, panel.start : panel.stop] > 0
            value *= alive_rows & self.alive[:, panel.left :].mT
        self.total += value[..., : panel.seam].sum((-2, -1), dtype=torch.float64) * 0.5
        if panel.seam < value.shape[2]:
            self.total += value[..., panel.seam :].sum((-2, -1), dtype=torch.float64)
        return slope

    def _fill_diagonal(self, part: Tensor, panel: GramPanel, value: float) -> None:
        """Set the entries where the rows of a panel (b, k, m) meet themselves."""
        if self.index is None:
            part.diagonal(dim1=1, dim2=2).fill_(value)
        else:
            part.scatter_(2, self.index[:, panel.start : panel.stop, None], value)

    def _redo(self, mask: Tensor, panel: GramPanel, with_grad: bool) -> None:
        """Add the pairs of ``mask`` (b, k, m) in float64."""
        cols = torch.arange(panel.left, self.x.shape[1], device=mask.device)
        for i in mask.any(2).any(1).nonzero().flatten().tolist():
            if i not in self.near:
                self.near[i] = NearPairs(self.w[i], self.term)
            rows = cols[: panel.stop - panel.start]
            if self.index is not None:
                rows = self.index[i, panel.start : panel.stop]
            self.near[i].add_panel(mask[i], rows, cols, panel.seam, with_grad=with_grad)

    def value(self) -> Tensor:
        """Mean energy (b,) in float64."""
        total = self.total.clone()
        for i, pairs in self.near.items():
            total[i] += pairs.energy
        return (total + self._by_group(self.term.constant)) * self._by_group(self.term.scale)

    def gradient(self, out: torch.dtype) -> Tensor:
        """Gradient of the mean energy in the rows, (b, k, d) in dtype ``out``; call it once."""
        pull, factor = self.pull_and_factor(out)
        return pull if factor is None else pull.mul_(factor)

    def pull_and_factor(self, out: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The same but for a factor (b, k, 1) of each row; None if it is 1."""
        if self.in_range and not self.near and out == self.grad.dtype:
            return self._tangent(), self.inverse_norm * self._mean()
        return to_weights(self._on_sphere(), self.inverse_norm, out), None

    def norm(self) -> Tensor:
        """The norms (b, k, 1) of the rows; inf for those that take no part."""
        return self.inverse_norm.reciprocal()

    def _on_sphere(self) -> Tensor:
        """The gradient (b, k, d) of the mean energy on the sphere, near pairs included."""
        grad = self._tangent().mul_(self._mean())
        bound = torch.finfo(grad.dtype).max / 4
        for i, pairs in self.near.items():
            rows, near = pairs.gradient()
            near *= self.term.scale(self.live[i])
            near = near.clamp_(-bound, bound).to(grad.dtype)
            if self.index is not None:
                # Map rows of the group to their places in the index, if they are in it.
                k = len(grad[i])
                place = torch.full((self.x.shape[1],), k, device=rows.device)
                place[self.index[i]] = torch.arange(k, device=rows.device)
                wanted = place[rows] < k
                rows, near = place[rows][wanted], near[wanted]
            grad[i].index_add_(0, rows, near)
        return grad

    def _tangent(self) -> Tensor:
        """The tangent part of the sums of F'(q_ij) x_j, (b, k, d)."""
        return self.grad.addcmul_(self.rows, self.radial[..., None], value=-1.0)

    def _mean(self) -> Tensor | float:
        """The factor, a number or (b, 1, 1), that turns the sums into the gradient of the mean."""
        scale = self._by_group(self.term.scale)
        if isinstance(scale, Tensor):
            scale = scale[:, None, None].to(self.grad.dtype)
        return -2.0 * scale

    def _by_group(self, function: Callable[[float], float]) -> Tensor | float:
        """A function of how many rows take part: a number, or (b,) if groups may differ."""
        if self.alive is None:
            return function(self.w.shape[1])
        numbers = [function(live) for live in self.live]
        return torch.tensor(numbers, dtype=torch.float64, device=self.w.device)


def outside(q: Tensor, nearest: float) -> Tensor | None:
    """Which squared chords are below ``nearest`` or above 4 minus it; None if there are none."""
    low, high = q.aminmax()
    if bool((low >= nearest) & (high <= 4.0 - nearest)):
        return None
    return (q < nearest) | (q > 4.0 - nearest)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; a stack of one goes through the plain matrix product, which is faster."""
    return torch.mm(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b)


def _add_product(out: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """Add ``a @ b`` to ``out`` in place, or overwrite ``out`` if it is ``fresh``."""
    beta = 0.0 if fresh else 1.0
    if len(a) == 1:
        out[0].addmm_(a[0], b[0], beta=beta)
    else:
        out.baddbmm_(a, b, beta=beta)
