"""What a logging step needs of a pass over layers on a GPU: one tensor, from which the host reckons.

The pass only gathers sums, counts and largest numbers; means and angles are made of them by the
host, once it has read the tensor: on the device each of these small steps would be a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.layout import Layout
from lightning_hsu._core.near import COINCIDENT, NEAR

NEAREST_COSINE = 1.0 - NEAR / 2.0
"""The largest cosine, up to its sign, of pairs that are not near."""


class GroupStats(NamedTuple):
    """What a logging step needs to know of a group of neurons.

    Args:
        energy: Their mean energy.
        cosine: Their largest cosine, in half space the largest absolute one; that of a neuron that
            takes no part is 0.
        live: How many take part.
        finite: How many are finite.
        is_exact: Whether the energy and the cosine are exact.
    """

    energy: float
    cosine: float
    live: int
    finite: int
    is_exact: bool


class GatheredNumbers:
    """The numbers of a batch, gathered on the device in one tensor.

    Args:
        layout: Where the layers of the batch lie.
        terms: Their kernels.
        device: Where the tensor is.

    Attributes:
        values: All that follows as one tensor, (k,) in float64.
        energy: Sums of energies (groups + 1,), in which rows that take no part lie at right angles
            to all others; the last is spare.
        near: For each piece (pieces, groups + 1) the largest 1 - q / 2 of the groups' near pairs; 0
            where there is none. The last is 0 if more pairs are near than the piece has room for.
        counts: How many rows take no part, and how many are finite, (2, groups).
        far: Largest numbers of the pairs that are not near, by piece and the groups of its panels:
            of the absolute cosine in half space, of 1 plus the cosine in full space.
    """

    def __init__(self, layout: Layout, terms: tuple[PairTerm, ...], device: torch.device) -> None:
        self._layout = layout
        self._terms = terms
        pieces, groups = len(layout.pieces), layout.groups
        each = [len(piece.groups_at) for piece in layout.pieces]
        self._sizes = [groups + 1, pieces * (groups + 1), 2 * groups, *each]
        self.values = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        self.energy, near, counts, *self.far = torch.split(self.values, self._sizes)
        self.near = near.view(pieces, groups + 1)
        self.counts = counts.view(2, groups)

    def of_groups(self, values: Sequence[float]) -> list[GroupStats]:
        """What the numbers say of each group.

        Args:
            values: The entries of :attr:`values`.
        """
        groups = self._layout.groups
        entries = iter(values)
        energies, near, counts, *far = (list(islice(entries, size)) for size in self._sizes)
        has_room = 0 not in near[groups :: groups + 1]
        largest = self._largest(far)
        found = []
        group = 0
        for block in self._layout.blocks:
            term = self._terms[block.kind]
            for _ in range(block.groups):
                missing, finite = map(int, counts[group::groups])
                nearest = max(near[group :: groups + 1])
                cosine = largest[group] if term.half_space else largest[group] - 1.0
                # The cosine of two opposite neurons is cut off in full space.
                is_known = term.half_space or cosine > -NEAREST_COSINE
                is_exact = has_room and is_known and nearest <= 1.0 - COINCIDENT / 2.0
                if nearest > 0:
                    cosine = max(cosine, nearest)
                live = block.n - missing
                energy = mean_energy(term, energies[group], block.n, live)
                found.append(GroupStats(energy, cosine, live, finite, is_exact))
                group += 1
        return found

    def _largest(self, far: Sequence[Sequence[float]]) -> list[float]:
        """Of each group the largest of the numbers ``far``."""
        largest = [0.0] * self._layout.groups
        for piece, numbers in zip(self._layout.pieces, far, strict=True):
            for (_, group), number in zip(piece.groups_at, numbers, strict=True):
                largest[group] = max(largest[group], number)
        return largest


def mean_energy(term: PairTerm, total: float, n: int, live: int) -> float:
    """The mean energy of ``live`` neurons.

    Args:
        term: The kernel.
        total: The sum of energies of n neurons, of which those that take no part lie at right angles
            to all others.
        n: The number of neurons.
        live: How many of them take part.
    """
    without = (n * (n - 1) - live * (live - 1)) / 2  # pairs
    total -= without * at_right_angles(term)
    return (total + term.constant(live)) * term.scale(live)


@lru_cache(maxsize=256)
def at_right_angles(term: PairTerm) -> float:
    """The energy of a pair at right angles, as float32 has it."""
    return float(term.folded(torch.tensor([2.0]), NEAR)[0])
