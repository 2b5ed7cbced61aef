"""Which neurons may be nearest to which: their pairs, squared chords and ties."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._core.pairwise import PANEL
from lightning_hsu._core.sphere import squared_chords, unit_rows
from lightning_hsu._core.topk import NONE, largest_two

_CACHED = 2**17  # entries of neurons that go together, few enough for a cache
_FAR = 0.5  # squared chord from which float32 loses less than a digit of a difference
_FEW = 8  # tied neighbours of a row up to which they are listed


def tie_tolerance(dtype: torch.dtype) -> float:
    """Relative difference between squared chords that is none: 64 roundings; in float64 1e-9, that of the nearest."""
    return 64.0 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-9


def nearer(q: Tensor, p: Tensor, half_space: bool, tie: float) -> tuple[Tensor, Tensor, Tensor]:
    """Squared chords to the nearer and the farther of a neuron (q) and its mirror image (p), and the nearer one's sign.

    In full space the neuron itself counts as nearer. In half space the sign is 0 where the two are tied.
    """
    if not half_space:
        return q, p, torch.ones_like(q)
    tied = (q - p).detach().abs() <= tie
    sign = torch.where(tied, 0.0, torch.sign((p - q).detach()))
    middle = (q + p) / 2.0  # constant: a tie has no slope
    return (
        torch.where(tied, middle, torch.minimum(q, p)),
        torch.where(tied, middle, torch.maximum(q, p)),
        sign,
    )


@dataclass
class Pairs:
    """Pairs of rows of a flat stack (b * n, d), each under the row that it may be nearest to; m entries each."""

    total: int  # b * n
    rows: Tensor
    cols: Tensor
    close: Tensor  # indices (k,) of those for which float32 would not do
    step: Tensor  # (k, d), from their second unit row, times their side, to the first
    square: Tensor  # of the step's length
    side: Tensor  # -1.0 for close pairs whose mirror image is nearer, else 1.0
    near: Tensor  # squared chords, and signs
    far: Tensor
    sign: Tensor

    def least(self) -> Tensor:
        """The smallest squared chord of the row of each pair, (m,)."""
        least = self.near.new_full((self.total,), float("inf"))
        return least.scatter_reduce_(0, self.rows, self.near, "amin")[self.rows]

    def count(self, tied: Tensor) -> Tensor:
        """How many pairs of its row are tied, for each pair, (m,)."""
        count = self.near.new_zeros(self.total)
        return count.index_put_((self.rows,), tied.double(), accumulate=True)[self.rows]

    def spread(self, out: Tensor, weight: Tensor, points: Tensor) -> None:
        """Take from both neurons of each pair, in ``out``, its weight (m,) times the other's point."""
        out.index_put_(
            (self.rows,), -weight[:, None] * points[self.cols], accumulate=True
        )  # in a fixed order, unlike index_add_
        out.index_put_((self.cols,), -weight[:, None] * points[self.rows], accumulate=True)


@dataclass
class Panel:
    """Rows of a flat stack (b * n, d), each with all columns of its group, their squared chords and signs (k, n)."""

    rows: Tensor
    cols: slice
    near: Tensor
    far: Tensor
    sign: Tensor

    def least(self) -> Tensor:
        """The smallest squared chord of each row, (k, 1)."""
        return self.near.amin(1, keepdim=True)

    def count(self, tied: Tensor) -> Tensor:
        """How many are tied in each row, (k, 1)."""
        return tied.sum(1, keepdim=True)

    def spread(self, out: Tensor, weight: Tensor, points: Tensor) -> None:
        """Take from both neurons of each pair, in ``out``, its weight (k, n) times the other's point."""
        out[self.rows] -= weight @ points[self.cols]
        out[self.cols] -= weight.mT @ points[self.rows]


class Nearest:
    """Nearest neurons of a stack of groups: of every neuron, or where only the nearest pairs count of their earlier one.

    Args:
        w: Neurons (b, n, d), float32 or float64.
        half_space: Mirror images count as well.
        every: Every neuron counts.
        settled: Cosine below which ties in rounding are left as they are.
    """

    def __init__(
        self, w: Tensor, half_space: bool, every: bool = False, settled: float = NONE
    ) -> None:
        self.w, self.half_space, self.every = w, half_space, every
        self.tie = tie_tolerance(w.dtype)
        self.x, self.inverse_norm = unit_rows(w)
        self.alive = self.inverse_norm.squeeze(-1) > 0  # (b, n)
        first, index, second = largest_two(self.x, self.alive, half_space=half_space, every=every)
        best = first if every else first.amax(-1, keepdim=True)
        self.bound = (
            best - self.tie * (1.0 - best) - 64.0 * torch.finfo(w.dtype).eps
        )  # ties, and the rounding of cosines
        counts = (first > NONE) & (first >= self.bound)
        unclear = counts & (second >= self.bound) & (first >= settled)
        pairs, self.crowded = self._candidates(unclear)
        group, row = (counts & ~unclear).nonzero(as_tuple=True)
        pairs.append(
            (group * w.shape[1] + row, group * w.shape[1] + index[group, row], first[group, row])
        )
        self.pairs = self._measured(*(torch.cat(part) for part in zip(*pairs, strict=True)))

    def _candidates(self, unclear: Tensor) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        """Pairs of rows that have a few columns within the bound, with cosines; and a mask (b, n) of those that have more."""
        pairs, crowded, n = [], torch.zeros_like(unclear), unclear.shape[1]
        for i in unclear.any(1).nonzero().flatten().tolist():
            for row in torch.split(unclear[i].nonzero().squeeze(1), PANEL):
                cosine = self.x[i, row] @ self.x[i].mT
                cosine = cosine.abs_() if self.half_space else cosine
                close = cosine >= self.bound[i].expand(n)[row, None]
                close &= self._others(i, row)
                crowded[i, row] = close.sum(1) > _FEW
                at, col = (close & ~crowded[i, row, None]).nonzero(as_tuple=True)
                pairs.append((i * n + row[at], i * n + col, cosine[at, col]))
        return pairs, crowded

    def _others(self, i: int, row: Tensor) -> Tensor:
        """Mask (k, n) of the pairs of some rows that count."""
        column = torch.arange(self.x.shape[1], device=row.device)
        return (column != row[:, None] if self.every else column > row[:, None]) & self.alive[i]

    def _exact(self, index: Tensor) -> Tensor:
        """Unit rows in float64 at indices of the flat stack, of neurons that take part."""
        if self.x.dtype == torch.float64:
            return self.x.flatten(0, 1)[index]
        x = self.w.flatten(0, 1)[
            index
        ].double()  # in which no float32 number is too large or too small
        return x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))

    def _measured(self, rows: Tensor, cols: Tensor, cosine: Tensor) -> Pairs:
        """Pairs with their squared chords, by differences in float64 but for means over neurons that are far apart."""
        square, height = (
            2.0 - 2.0 * cosine.double(),
            max(1, _CACHED // self.w.shape[2]),
        )  # rows that stay in a cache
        side, exact = torch.ones_like(square), self.half_space or not self.every
        close = ((square < _FAR) | (square > 4.0 - _FAR) | exact).nonzero().squeeze(1)
        step = self.x.new_empty(len(close), self.w.shape[2])
        for start in range(0, len(close), height):
            some = close[start : start + height]
            difference = self._exact(rows[some]).sub_(self._exact(cols[some]))
            opposite = difference.square().sum(1) > 2.0
            if bool(opposite.any()):
                side[some] -= 2.0 * opposite
                difference = self._exact(rows[some]).sub_(
                    self._exact(cols[some]).mul_(side[some, None])
                )
            step[start : start + height] = difference
            square[some] = difference.square_().sum(1)
        q, p = (
            torch.where(side > 0, square, 4.0 - square),
            torch.where(side > 0, 4.0 - square, square),
        )
        return Pairs(
            self.alive.numel(),
            rows,
            cols,
            close,
            step,
            square,
            side,
            *nearer(q, p, self.half_space, self.tie),
        )

    def panels(self) -> Iterator[Panel]:
        """The rows that have many columns within the bound."""
        n = self.w.shape[1]
        for i in self.crowded.any(1).nonzero().flatten().tolist():
            y = unit_rows(self.w[i].double())[0]
            for row in torch.split(self.crowded[i].nonzero().squeeze(1), PANEL):
                other = self._others(i, row)
                near, far, sign = nearer(
                    *squared_chords(y[row], y, other), self.half_space, self.tie
                )
                yield Panel(
                    i * n + row,
                    slice(i * n, i * n + n),
                    near.masked_fill(~other, float("inf")),
                    far,
                    sign,
                )

    def smallest(self) -> Tensor:
        """Smallest squared chord (b,), float64; infinite with fewer than two neurons."""
        smallest = torch.full(
            self.w.shape[:1], float("inf"), dtype=torch.float64, device=self.w.device
        )
        smallest.scatter_reduce_(0, self.pairs.rows // self.w.shape[1], self.pairs.near, "amin")
        for panel in self.panels():
            group = panel.cols.start // self.w.shape[1]
            smallest[group] = torch.minimum(smallest[group], panel.near.amin())
        return smallest
