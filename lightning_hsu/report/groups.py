"""Near-duplicate neurons as groups: those that similar pairs connect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._core.components import largest_groups
from lightning_hsu._core.sphere import unit_rows
from lightning_hsu.report.data import SimilarGroup


@dataclass(frozen=True)
class FoundGroups:
    """The groups of near-duplicates of a layer.

    Args:
        listed: The largest, the largest first.
        count: How many there are.
        neurons: How many neurons are in them.
    """

    listed: tuple[SimilarGroup, ...]
    count: int
    neurons: int


def similar_groups(x: Tensor, labels: Sequence[Tensor], half_space: bool, keep: int) -> FoundGroups:
    """The groups of near-duplicates among neurons.

    Args:
        x: The neurons (groups, n, d).
        labels: The first neuron of each one's group, (n,), for each group of x.
        half_space: Whether opposite neurons count as similar.
        keep: How many groups to list.
    """
    listed = []
    count = 0
    neurons = 0
    for place, (rows, label) in enumerate(zip(x, labels, strict=True)):
        found = largest_groups(label, keep)
        count += found.count
        neurons += found.nodes
        for members in found.largest:
            cosines = _cosines_to_first(rows, members)
            listed.append(group_of(place, members.tolist(), cosines, half_space))
    return FoundGroups(largest_first(listed, keep), count, neurons)


def group_of(
    place: int, members: Sequence[int], cosines: Sequence[float], half_space: bool
) -> SimilarGroup:
    """A group of near-duplicates.

    Args:
        place: Index of the group of a convolution.
        members: Its neurons by index.
        cosines: Cosine of each to the first of them.
        half_space: Whether opposite neurons count as similar.
    """
    signs = []
    smallest = math.inf
    for cosine in cosines:
        sign = 1
        if half_space and cosine < 0:
            sign = -1
        signs.append(sign)
        smallest = min(smallest, sign * cosine)
    return SimilarGroup(place, tuple(members), tuple(signs), smallest)


def largest_first(groups: list[SimilarGroup], keep: int) -> tuple[SimilarGroup, ...]:
    """So many of the largest groups, the largest first."""
    groups.sort(key=lambda group: -len(group.neurons))
    return tuple(groups[:keep])


def _cosines_to_first(x: Tensor, members: Tensor) -> list[float]:
    """Cosines of some rows of x (n, d) to the first of them, in float64."""
    first = unit_rows(x[members[:1]].double())[0][0]
    parts = []
    for some in torch.split(members, max(1, 2**22 // x.shape[1])):
        parts.append(unit_rows(x[some].double())[0] @ first)
    cosines: list[float] = torch.cat(parts).clamp_(-1.0, 1.0).tolist()
    return cosines
