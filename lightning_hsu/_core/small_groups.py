"""All pairs of many small groups of neurons at once, in float64.

Groups of different sizes go into one stack if they are padded with zeros: zero rows take no part,
and zero columns change no angle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.precision import exact_arithmetic, with_float64, working_dtype
from lightning_hsu._core.sphere import unit_rows

_CLOSE = 1e-6  # squared chord below which the cosine has lost too many digits
_GATHERED = 2**20  # entries of neurons that are compared by differences at a time


class SmallGroups:
    """The pairs of neurons within each group of a stack.

    Args:
        w: Neurons, shape (b, n, d), any floating dtype. Zero and non-finite rows take no part.

    Attributes:
        alive: Which rows take part, bool, shape (b, n).
        live: How many rows take part in each group, shape (b,).
        unit: Unit rows, zero for rows that take no part, float64, shape (b, n, d).
        cosines: Cosines between all rows, 1 on the diagonal of rows that take part, else 0 for rows
            that do not, float64, shape (b, n, n).
        first: Index of the first neuron of each pair, shape (k,), k = n (n - 1) / 2.
        second: Index of the second neuron, which is larger.
        valid: Which pairs count, bool, shape (b, k).
        cosine: Cosines of the pairs, float64, shape (b, k).
        q: Squared chords of the pairs, float64, shape (b, k).
        p: Squared chords to the second neuron's mirror image, of the same shape.

    Example:
        >>> pairs = SmallGroups(torch.tensor([[[1.0, 0.0], [0.0, 3.0], [0.0, 0.0]]]))
        >>> pairs.live.tolist(), pairs.q.tolist(), pairs.valid.tolist()
        ([2], [[2.0, 2.0, 2.0]], [[True, False, False]])
    """

    @torch.no_grad()
    def __init__(self, w: Tensor) -> None:
        w = with_float64(w.detach())
        w = w.to(working_dtype(w.dtype))
        unit, inverse_norm = unit_rows(w)
        self.alive = inverse_norm.squeeze(-1) > 0
        self.live = self.alive.sum(-1)
        self.unit = unit
        if w.dtype != torch.float64:
            self.unit = _in_float64(w, self.alive)
        with exact_arithmetic(w):
            self.cosines = (self.unit @ self.unit.mT).clamp_(-1.0, 1.0)
        n = w.shape[1]
        self.first, self.second = torch.triu_indices(n, n, 1, device=w.device)
        self.valid = self.alive[:, self.first] & self.alive[:, self.second]
        self.cosine = self.cosines.flatten(1).index_select(1, self.first * n + self.second)
        self.q = torch.rsub(self.cosine, 2.0, alpha=2.0)
        self.p = 4.0 - self.q
        if self.nearest() < _CLOSE:
            self._redo(self.q, 1.0)
            self._redo(self.p, -1.0)

    def nearest(self) -> float:
        """The smallest squared chord to a neuron or a mirror image; 4 where there are no pairs."""
        if not self.q.numel():
            return 4.0
        return min(float(self.q.amin()), float(self.p.amin()))

    def _redo(self, square: Tensor, side: float) -> None:
        """Replace small squared chords (b, k), by differences.

        Args:
            square: The squared chords.
            side: 1.0 for those between neurons, -1.0 for those to mirror images.
        """
        close = (square < _CLOSE) & self.valid
        for some in torch.split(close.nonzero(), max(1, _GATHERED // self.unit.shape[2])):
            group, pair = some.unbind(1)
            x = self.unit[group, self.first[pair]]
            y = self.unit[group, self.second[pair]]
            square[group, pair] = (x - side * y).square_().sum(-1)

    def energies(self, term: PairTerm) -> Tensor:
        """Mean energies over the pairs of each group, float64, shape (b,); 0 below two neurons."""
        value = term.values(self.q, self.p, self.nearest())
        total = value.masked_fill_(~self.valid, 0.0).sum(-1)
        scales = []
        constants = []
        for live in range(self.alive.shape[1] + 1):
            scales.append(term.scale(live))
            constants.append(term.constant(live))
        total += total.new_tensor(constants)[self.live]
        return total * total.new_tensor(scales)[self.live]

    def smallest_angles(self, half_space: bool) -> Tensor:
        """The smallest angle of each group in radians, (b,); NaN with fewer than two neurons."""
        near = torch.where(self.valid, self.near(half_space), math.inf)
        if not near.shape[1]:
            return near.new_full(near.shape[:1], math.nan)
        q = near.amin(-1)
        angle = 2.0 * torch.atan2(q.sqrt(), (4.0 - q).clamp_min(0.0).sqrt())
        return torch.where(q.isfinite(), angle, math.nan)

    def near(self, half_space: bool) -> Tensor:
        """Squared chords (b, k), in half space to the nearer of neuron and mirror image."""
        if half_space:
            return torch.minimum(self.q, self.p)
        return self.q

    def angles(self) -> Tensor:
        """The angles of all pairs in degrees, (b, k)."""
        return (2.0 * torch.atan2(self.q.sqrt(), self.p.sqrt())).rad2deg()

    def histograms(self, bins: int) -> Tensor:
        """Pairs of each group by angle, in equal bins of [0, 180] degrees, int64, (b, bins)."""
        b = len(self.q)
        place = (self.angles() * (bins / 180.0)).long().clamp_(0, bins - 1)
        place.masked_fill_(~self.valid, bins)  # into a bin of its own
        place += torch.arange(b, device=place.device)[:, None] * (bins + 1)
        counts = torch.bincount(place.flatten(), minlength=b * (bins + 1))
        return counts.view(b, bins + 1)[:, :bins]

    def similar(self, above: float, half_space: bool) -> Tensor:
        """Which pairs have a cosine from ``above`` on, in half space of either sign, (b, k)."""
        found = self.cosine >= above
        if half_space:
            found |= self.cosine <= -above
        return found & self.valid


def _in_float64(w: Tensor, alive: Tensor) -> Tensor:
    """Unit rows of float32 neurons w (b, n, d) in float64, zero where ``alive`` (b, n) is not."""
    # In float64 no float32 number is too large or too small to be squared.
    x = torch.where(alive[..., None], w.double(), 0.0)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.div_(torch.where(length > 0, length, 1.0))


@torch.no_grad()
def chains(similarity: Tensor, alive: Tensor) -> Tensor:
    """An order of the rows of each matrix in which each is followed by the most similar one left.

    It begins with one of the most similar pair. Rows that are not alive come last.

    Args:
        similarity: Shape (b, n, n), symmetric, at least 0.
        alive: Shape (b, n).

    Returns:
        Indices (b, n).

    Example:
        >>> similarity = torch.tensor([[[1.0, 0.2, 0.9], [0.2, 1.0, 0.5], [0.9, 0.5, 1.0]]])
        >>> chains(similarity, torch.ones(1, 3, dtype=torch.bool)).tolist()
        [[0, 2, 1]]
    """
    b, n, _ = similarity.shape
    groups = torch.arange(b, device=similarity.device)
    rank = torch.where(alive, 0.0, -2.0).to(similarity.dtype)  # below all that is left
    others = similarity.clone()
    others.diagonal(dim1=1, dim2=2).fill_(-1.0)
    others += rank[:, None, :]
    order = torch.zeros(b, n, dtype=torch.int64, device=similarity.device)
    at = (others.amax(-1) + rank).argmax(-1)
    for step in range(n):
        order[:, step] = at
        rank[groups, at] = -4.0  # below those that are not alive
        at = (similarity[groups, at] + rank).argmax(-1)
    return order
