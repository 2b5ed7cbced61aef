"""Candidates for the nearest neighbour of each neuron: their pairs, squared chords and ties."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._core.pairwise import PANEL
from lightning_hsu._core.parts import Done
from lightning_hsu._core.sphere import squared_chords, unit_rows
from lightning_hsu._core.topk import NONE, largest_two

_CACHED = 2**17  # entries of neurons that are read together, few enough for a cache
_FAR = 0.5  # squared chord above which float32 loses less than a digit of a difference
_FEW = 8  # a row with more tied neighbours than this is not listed


def tie_tolerance(dtype: torch.dtype) -> float:
    """Relative difference below which squared chords tie: 64 rounding errors; in float64 1e-9."""
    if dtype == torch.float64:
        return 1e-9
    return 64.0 * torch.finfo(dtype).eps


def nearer(q: Tensor, p: Tensor, half_space: bool, tie: float) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the nearer of a neuron and its mirror image.

    Args:
        q: Squared chords to the neurons.
        p: Squared chords to their mirror images, of the shape of q.
        half_space: Whether mirror images count; if not, the neuron itself is taken as nearer.
        tie: Difference between q and p below which they tie.

    Returns:
        Squared chords to the nearer and to the farther one, and the sign of the nearer: 1 for the
        neuron, -1 for its mirror image, 0 where the two tie.
    """
    if not half_space:
        return q, p, torch.ones_like(q)
    tied = (q - p).detach().abs() <= tie
    sign = torch.where(tied, 0.0, torch.sign((p - q).detach()))
    middle = (q + p) / 2.0  # constant: a tie has no slope
    near = torch.where(tied, middle, torch.minimum(q, p))
    far = torch.where(tied, middle, torch.maximum(q, p))
    return near, far, sign


@dataclass
class CandidatePairs:
    """Listed pairs, each under the row whose nearest it may be; tensors of m entries.

    Args:
        total: Number of rows, b * n, of the flat stack.
        rows: Index of the first neuron in the flat stack.
        cols: Index of the second neuron.
        close: Indices (k,) of the pairs for which float32 is not precise enough.
        step: For the close pairs, the first unit row minus side times the second, (k, d).
        square: Squared length of the step.
        side: -1.0 for close pairs whose mirror image is nearer, else 1.0.
        near: Squared chord to the nearer of neuron and mirror image; see :func:`nearer`.
        far: Squared chord to the farther one.
        sign: Sign of the nearer one.
    """

    total: int
    rows: Tensor
    cols: Tensor
    close: Tensor
    step: Tensor
    square: Tensor
    side: Tensor
    near: Tensor
    far: Tensor
    sign: Tensor

    def least(self) -> Tensor:
        """The smallest squared chord of the row of each pair, (m,)."""
        least = self.near.new_full((self.total,), float("inf"))
        return least.scatter_reduce_(0, self.rows, self.near, "amin")[self.rows]

    def count(self, tied: Tensor) -> Tensor:
        """For each pair, how many pairs of its row are tied, (m,)."""
        count = self.near.new_zeros(self.total)
        return count.index_put_((self.rows,), tied.double(), accumulate=True)[self.rows]

    def spread(self, out: Tensor, weight: Tensor, points: Tensor) -> None:
        """Subtract from both rows of a pair, in ``out``, weight (m,) times the other's point."""
        # index_put_ adds in a fixed order, unlike index_add_.
        out.index_put_((self.rows,), -weight[:, None] * points[self.cols], accumulate=True)
        out.index_put_((self.cols,), -weight[:, None] * points[self.rows], accumulate=True)


@dataclass
class CrowdedRows:
    """Rows with many candidates, each compared with all columns of its group; (k, n) tensors.

    Args:
        rows: Indices (k,) in the flat stack (b * n, d).
        cols: The columns in the flat stack, those of one group.
        near: Squared chord to the nearer of neuron and mirror image, infinite where no pair counts.
        far: Squared chord to the farther one.
        sign: Sign of the nearer one.
    """

    rows: Tensor
    cols: slice
    near: Tensor
    far: Tensor
    sign: Tensor

    def least(self) -> Tensor:
        """The smallest squared chord of each row, (k, 1)."""
        return self.near.amin(1, keepdim=True)

    def count(self, tied: Tensor) -> Tensor:
        """How many pairs are tied in each row, (k, 1)."""
        return tied.sum(1, keepdim=True)

    def spread(self, out: Tensor, weight: Tensor, points: Tensor) -> None:
        """Subtract from both rows of a pair, in ``out``, weight (k, n) times the other's point."""
        out[self.rows] -= weight @ points[self.cols]
        out[self.cols] -= weight.mT @ points[self.rows]


class Nearest:
    """The nearest neurons of a stack of groups.

    Args:
        w: Neurons, shape (b, n, d), float32 or float64.
        half_space: Mirror images count as well.
        every: Find the nearest of every neuron; otherwise only the nearest pairs, each listed under
            its earlier neuron.
        settled: Cosine below which ties within rounding are not resolved.
        done: Called with the fraction of the work that is done.
    """

    def __init__(
        self,
        w: Tensor,
        half_space: bool,
        every: bool = False,
        settled: float = NONE,
        done: Done | None = None,
    ) -> None:
        self.w = w
        self.half_space = half_space
        self.every = every
        self.tie = tie_tolerance(w.dtype)
        self.x, self.inverse_norm = unit_rows(w)
        self.alive = self.inverse_norm.squeeze(-1) > 0  # (b, n)
        first, index, second = largest_two(
            self.x, self.alive, half_space=half_space, every=every, done=done
        )
        best = first if every else first.amax(-1, keepdim=True)
        # Cosines above this may be the largest: they tie, or differ only by rounding.
        self.threshold = best - self.tie * (1.0 - best) - 64.0 * torch.finfo(w.dtype).eps
        counts = (first > NONE) & (first >= self.threshold)
        unclear = counts & (second >= self.threshold) & (first >= settled)
        pairs, self.crowded = self._candidates(unclear)
        group, row = (counts & ~unclear).nonzero(as_tuple=True)
        offset = group * w.shape[1]
        pairs.append((offset + row, offset + index[group, row], first[group, row]))
        rows, cols, cosine = zip(*pairs, strict=True)
        self.pairs = self._measured(torch.cat(rows), torch.cat(cols), torch.cat(cosine))

    def _candidates(self, unclear: Tensor) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        """List the candidates of rows whose nearest is not clear, mask (b, n).

        Returns:
            Rows, columns and cosines of the pairs of rows with a few candidates, and a mask (b, n)
            of the rows that have more.
        """
        pairs = []
        crowded = torch.zeros_like(unclear)
        n = unclear.shape[1]
        for i in unclear.any(1).nonzero().flatten().tolist():
            for row in torch.split(unclear[i].nonzero().squeeze(1), PANEL):
                cosine = self.x[i, row] @ self.x[i].mT
                if self.half_space:
                    cosine.abs_()
                close = cosine >= self.threshold[i].expand(n)[row, None]
                close &= self._others(i, row)
                crowded[i, row] = close.sum(1) > _FEW
                at, col = (close & ~crowded[i, row, None]).nonzero(as_tuple=True)
                pairs.append((i * n + row[at], i * n + col, cosine[at, col]))
        return pairs, crowded

    def _others(self, i: int, row: Tensor) -> Tensor:
        """Mask (k, n) of the pairs that count among some rows (k,) and all columns of a group."""
        column = torch.arange(self.x.shape[1], device=row.device)
        if self.every:
            return (column != row[:, None]) & self.alive[i]
        return (column > row[:, None]) & self.alive[i]

    def _exact(self, index: Tensor) -> Tensor:
        """Unit rows in float64 at indices of the flat stack, of neurons that take part."""
        if self.x.dtype == torch.float64:
            return self.x.flatten(0, 1)[index]
        # In float64 no float32 number is too large or too small to be squared.
        x = self.w.flatten(0, 1)[index].double()
        return x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))

    def _measured(self, rows: Tensor, cols: Tensor, cosine: Tensor) -> CandidatePairs:
        """Pairs with their squared chords, from differences in float64 where float32 will not do.

        Float32 will do for a mean over neurons, in full space, where pairs are far apart.
        """
        d = self.w.shape[2]
        square = 2.0 - 2.0 * cosine.double()
        side = torch.ones_like(square)
        needs_difference = (square < _FAR) | (square > 4.0 - _FAR)
        if self.half_space or not self.every:
            needs_difference.fill_(True)
        close = needs_difference.nonzero().squeeze(1)
        step = self.x.new_empty(len(close), d)
        height = max(1, _CACHED // d)
        for start in range(0, len(close), height):
            some = close[start : start + height]
            difference = self._exact(rows[some]).sub_(self._exact(cols[some]))
            opposite = difference.square().sum(1) > 2.0
            if bool(opposite.any()):
                side[some] -= 2.0 * opposite
                mirrored = self._exact(cols[some]).mul_(side[some, None])
                difference = self._exact(rows[some]).sub_(mirrored)
            step[start : start + height] = difference
            square[some] = difference.square_().sum(1)
        q = torch.where(side > 0, square, 4.0 - square)
        p = torch.where(side > 0, 4.0 - square, square)
        near, far, sign = nearer(q, p, self.half_space, self.tie)
        total = self.alive.numel()
        return CandidatePairs(total, rows, cols, close, step, square, side, near, far, sign)

    def crowded_rows(self) -> Iterator[CrowdedRows]:
        """The rows that have many candidates, some rows of a group at a time."""
        n = self.w.shape[1]
        for i in self.crowded.any(1).nonzero().flatten().tolist():
            y = unit_rows(self.w[i].double())[0]
            cols = slice(i * n, i * n + n)
            for row in torch.split(self.crowded[i].nonzero().squeeze(1), PANEL):
                other = self._others(i, row)
                q, p = squared_chords(y[row], y, other)
                near, far, sign = nearer(q, p, self.half_space, self.tie)
                near = near.masked_fill(~other, float("inf"))
                yield CrowdedRows(i * n + row, cols, near, far, sign)

    def smallest(self) -> Tensor:
        """Smallest squared chord (b,), float64; infinite with fewer than two neurons."""
        b, n, _ = self.w.shape
        smallest = torch.full((b,), float("inf"), dtype=torch.float64, device=self.w.device)
        smallest.scatter_reduce_(0, self.pairs.rows // n, self.pairs.near, "amin")
        for crowded in self.crowded_rows():
            group = crowded.cols.start // n
            smallest[group] = torch.minimum(smallest[group], crowded.near.amin())
        return smallest
