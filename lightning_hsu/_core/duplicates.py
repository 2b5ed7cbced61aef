"""Similar pairs among very many neurons, without a list of all of them.

In the plane all are counted by sorting angles. Up to some hundred thousand neurons all pairs are
compared, panel by panel. Among more, those that fall next to each other under random hashes are
compared: what is found is similar, but some pairs may be missed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._core.components import Components
from lightning_hsu._core.histogram import MostSimilar, pair_angles
from lightning_hsu._core.parts import Done
from lightning_hsu._core.precision import exact_arithmetic, with_float64, working_dtype
from lightning_hsu._core.sphere import seeded, unit_rows

_ENTRIES = 2**21  # cosines held at once
_AFFORDABLE = 3e12  # work that all pairs may take: multiplications and additions, nearly
_PER_PAIR = 100  # further work for each pair, in the same unit
_GATHERED = 2**22  # entries of neurons that are compared one by one at a time
_HASHES = 12
_WINDOW = 3  # neighbours under a hash that a neuron is compared with
_LISTED = 2**21  # pairs after which the search among hashes ends


@dataclass(frozen=True)
class SimilarPairs:
    """Similar pairs of n neurons.

    Args:
        similar: How many there are, or at least how many.
        opposite: How many of these are similar only as lines: they point opposite ways.
        pairs: Indices of the most similar of them, nearest first, int64, shape (k, 2).
        pair_angles: Their angles in degrees, float64, shape (k,).
        nearest: The smallest angle between two neurons that was seen, in half space between two
            lines, in degrees; infinite if none was.
        all_counted: Whether no similar pair is missing in the counts.
        label: The first neuron of each one's group, int64, shape (n,): the similar pairs that were
            found, not only those listed, connect the neurons of a group.
    """

    similar: int
    opposite: int
    pairs: Tensor
    pair_angles: Tensor
    nearest: float
    all_counted: bool
    label: Tensor


@torch.no_grad()
def similar_pairs(
    w: Tensor,
    *,
    above: float = 0.95,
    half_space: bool = False,
    keep: int = 100,
    done: Done | None = None,
) -> SimilarPairs:
    """Count the similar pairs of neurons and list the nearest, in about the memory of the neurons.

    Args:
        w: Neurons, shape (n, d), rows of any positive norm. Zero and non-finite rows take no part.
        above: Cosine at or above which a pair is similar, in (0, 1).
        half_space: Compare absolute cosines: opposite neurons are similar.
        keep: How many similar pairs to list.
        done: Called with the fraction of the work that is done.

    Example:
        >>> found = similar_pairs(torch.tensor([[1.0, 0.0], [2.0, 0.01], [0.0, 3.0]]))
        >>> found.similar, found.pairs.tolist(), round(found.nearest, 3), found.all_counted
        (1, [[0, 1]], 0.286, True)
    """
    w = with_float64(w.detach())
    w = w.to(working_dtype(w.dtype))
    x, inverse_norm = unit_rows(w)
    alive = inverse_norm.squeeze(-1) > 0
    live = alive.nonzero().squeeze(1)
    if len(live) < len(x):
        x = x[live]
    with exact_arithmetic(w):
        if w.shape[1] == 2:
            search: _Search = _InPlane(x, above, half_space, keep)
        elif compares_all(len(x), w.shape[1]):
            search = _AllPairs(x, above, half_space, keep)
        else:
            search = _Hashed(x, above, half_space, keep)
        search.run(done)
    pairs = live[search.pairs()]
    angles = pair_angles(w, pairs)
    between = _between(angles, half_space)
    order = between.argsort(stable=True)
    pairs = pairs[order]
    angles = angles[order]
    nearest = math.inf
    if len(order):
        nearest = float(between[order[0]])
    elif search.best is not None:
        nearest = float(_between(pair_angles(w, live[search.best][None]), half_space))
    similar = search.similar > 0
    return SimilarPairs(
        search.similar,
        search.opposite,
        pairs if similar else pairs[:0],
        angles if similar else angles[:0],
        nearest,
        search.all_counted,
        search.groups.labels_among(live, len(w)),
    )


def compares_all(n: int, d: int) -> bool:
    """Whether all pairs of n neurons in d dimensions are compared."""
    return d == 2 or n * n * (d + _PER_PAIR) <= _AFFORDABLE


def _between(angles: Tensor, half_space: bool) -> Tensor:
    """Angles in degrees, in half space between lines."""
    if half_space:
        return torch.minimum(angles, 180.0 - angles)
    return angles


def distinct(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The different numbers among some (k,), in ascending order, and a place of each."""
    ordered, place = numbers.sort(stable=True)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_new], place[is_new]


class _Search(ABC):
    """A way to find similar pairs.

    Args:
        x: Unit rows (n, d).
        above: Cosine from which on a pair is similar.
        half_space: Compare absolute cosines.
        keep: How many pairs to list.
    """

    def __init__(self, x: Tensor, above: float, half_space: bool, keep: int) -> None:
        self.x = x
        self.above = above
        self.half_space = half_space
        self.kept = MostSimilar(keep, x.device)
        self.groups = Components(len(x), x.device)
        self.similar = 0
        self.opposite = 0
        self.all_counted = True
        self.best: Tensor | None = None  # the nearest pair (2,), where no pair is similar

    @abstractmethod
    def run(self, done: Done | None) -> None:
        """Look at the pairs."""

    def pairs(self) -> Tensor:
        """The listed pairs (k, 2), in any order."""
        return self.kept.pairs


class _InPlane(_Search):
    """All pairs of neurons in two dimensions, by sorting their directions."""

    def run(self, done: Done | None) -> None:
        """Count the neurons that follow each within the angle."""
        x = self.x.double()
        directions = torch.atan2(x[:, 1], x[:, 0])
        reach = math.acos(self.above)
        self.similar = _pairs_within(directions, reach, 2 * math.pi)
        if self.half_space:
            as_lines = _pairs_within(directions, reach, math.pi)
            self.opposite = as_lines - self.similar
            self.similar = as_lines
        self._group(directions, reach)
        self._list(directions)
        if done is not None:
            done(1.0)

    def _group(self, directions: Tensor, reach: float) -> None:
        """Connect neighbours around the circle that are similar."""
        period = math.pi if self.half_space else 2 * math.pi
        ordered, order = directions.remainder(period).sort(stable=True)
        following = ordered.roll(-1)
        following[-1:] += period
        near = following <= ordered + reach
        self.groups.add(order[near], order.roll(-1)[near])

    def _list(self, directions: Tensor) -> None:
        """Keep the nearest pairs: those of k are less than sqrt(2 k) + 2 places apart."""
        period = math.pi if self.half_space else 2 * math.pi
        order = directions.remainder(period).argsort(stable=True)
        cosines = []
        pairs = []
        most = math.isqrt(2 * self.kept.keep) + 2
        for step in range(1, min(most, len(order) - 1) + 1):
            first = order
            second = order.roll(-step)
            cosine = (directions[first] - directions[second]).cos()
            if self.half_space:
                cosine = cosine.abs()
            nearest = cosine.topk(min(len(cosine), self.kept.keep + 1)).indices
            cosines.append(cosine[nearest])
            pairs.append(torch.stack([first[nearest], second[nearest]], 1).sort(1).values)
        if not cosines:
            return
        pair = torch.cat(pairs)
        cosine = torch.cat(cosines)
        self.best = pair[cosine.argmax()]
        keys, place = distinct(pair[:, 0] * len(self.x) + pair[:, 1])
        value = cosine[place]
        is_similar = value >= self.above
        keys = keys[is_similar]
        self.kept.add(value[is_similar], keys // len(self.x), keys % len(self.x))


def _pairs_within(directions: Tensor, reach: float, period: float) -> int:
    """How many pairs of directions, in radians, are at most ``reach`` apart around the circle."""
    ordered = directions.remainder(period).sort().values
    twice = torch.cat([ordered, ordered + period])
    last = torch.searchsorted(twice, ordered + reach, right=True)
    own = torch.arange(1, len(ordered) + 1, device=last.device)
    return int((last - own).sum())


class _AllPairs(_Search):
    """All pairs, a panel of rows at a time; most panels are passed over twice only."""

    def run(self, done: Done | None) -> None:
        """Compare the rows of each panel with those after them."""
        n = len(self.x)
        height = max(1, _ENTRIES // max(n, 1))
        largest_apart = 0.0 if self.half_space else -1.0
        largest = largest_apart
        for start in range(0, n - 1, height):
            stop = min(start + height, n)
            cosine = self.x[start:stop] @ self.x[start:].mT
            own = cosine[:, : stop - start]
            own.masked_fill_(torch.ones_like(own, dtype=torch.bool).tril_(), largest_apart)
            low, high = (float(end) for end in cosine.aminmax())
            magnitude = max(high, -low) if self.half_space else high
            if magnitude > largest and not self.similar:
                largest = magnitude
                place = int((cosine.abs() if self.half_space else cosine).argmax())
                row, col = divmod(place, cosine.shape[1])
                self.best = torch.tensor([start + row, start + col], device=cosine.device)
            if magnitude >= self.above:
                self._count(cosine, start)
            if done is not None:
                done(1.0 - ((n - stop) / n) ** 2)

    def _count(self, cosine: Tensor, start: int) -> None:
        """Count the similar pairs of a panel (k, m) whose rows and columns begin at ``start``."""
        number = int((cosine >= self.above).count_nonzero())
        if self.half_space:
            opposite = int((cosine <= -self.above).count_nonzero())
            self.opposite += opposite
            number += opposite
            cosine.abs_()
        self.similar += number
        near = cosine >= self.above
        self.groups.add_block(near, start, start)
        if not self.kept.keep:
            return
        if number > self.kept.keep:
            values, places = cosine.flatten().topk(self.kept.keep)
            row = places // cosine.shape[1]
            col = places % cosine.shape[1]
        else:
            row, col = near.nonzero(as_tuple=True)
            values = cosine[row, col]
        self.kept.add(values, row + start, col + start)


class _Hashed(_Search):
    """Pairs that are next to each other under one of some random hashes."""

    def run(self, done: Done | None) -> None:
        """Compare neighbours under each hash; stop when very many pairs are found."""
        n = len(self.x)
        self.all_counted = False
        found = torch.zeros(0, dtype=torch.int64, device=self.x.device)  # first * n + second
        for draw in range(_HASHES):
            order, code = self._hashed(draw)
            keys = [found]
            for step in range(1, _WINDOW + 1):
                same = (code[step:] == code[:-step]).nonzero().squeeze(1)
                keys.append(self._similar(order[same], order[same + step]))
            found = distinct(torch.cat(keys))[0]
            if done is not None:
                done((draw + 1) / _HASHES)
            if len(found) > _LISTED:
                break
        self.similar = len(found)
        first = found // n
        second = found % n
        self.groups.add(first, second)
        for some in torch.split(torch.arange(len(found), device=found.device), self._height()):
            cosine = self._cosines(first[some], second[some])
            self.opposite += int((cosine < 0).sum())
            self.kept.add(cosine.abs(), first[some], second[some])

    def _hashed(self, draw: int) -> tuple[Tensor, Tensor]:
        """An order of the neurons in which those of one hash code follow each other, and the codes.

        The code tells on which sides of random planes a neuron lies; in half space it is the same
        for its mirror image. Neurons of one code are ordered along a random direction.
        """
        n, d = self.x.shape
        bits = max(1, min(48, math.ceil(math.log2(max(n, 2)))))
        planes = torch.randn(d, bits + 1, generator=seeded(draw)).to(self.x)
        sides = self.x @ planes  # (n, bits + 1)
        along = sides[:, bits]
        code = torch.zeros(n, dtype=torch.int64, device=self.x.device)
        flipped = sides[:, 0] < 0
        for bit in range(bits):
            side = sides[:, bit] > 0
            if self.half_space:
                side = side ^ flipped
            code = code * 2 + side
        if self.half_space:
            along = torch.where(flipped, -along, along)
        order = along.argsort(stable=True)
        order = order[code[order].argsort(stable=True)]
        return order, code[order]

    def _similar(self, first: Tensor, second: Tensor) -> Tensor:
        """Which of some pairs are similar, as first * n + second with the smaller index first."""
        keys = []
        height = self._height()
        parts = zip(torch.split(first, height), torch.split(second, height), strict=True)
        for i, j in parts:
            cosine = self._cosines(i, j)
            if self.half_space:
                cosine = cosine.abs()
            near = cosine >= self.above
            i = i[near]
            j = j[near]
            keys.append(torch.minimum(i, j) * len(self.x) + torch.maximum(i, j))
        return torch.cat(keys)

    def _cosines(self, first: Tensor, second: Tensor) -> Tensor:
        """Cosines of pairs (k,)."""
        return (self.x[first] * self.x[second]).sum(1)

    def _height(self) -> int:
        """How many pairs are compared at a time."""
        return max(1, _GATHERED // self.x.shape[1])
