"""About how much work a report on a layer is, part by part, so that progress can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_hsu._core.duplicates import compares_all
from lightning_hsu._core.parts import Done, part_of
from lightning_hsu.report.data import HEAT_MAP_SIZE

PICTURED = 4096
"""The most sampled neurons whose angles are counted and whose cosines are shown."""

LARGEST_GRAM = 4096
"""Rows of the largest Gram matrix whose eigenvalues are computed."""

# What a pair costs beside its cosine, in multiplications of a matrix product.
_ENERGY = 150.0
_SAMPLED = 800.0
_ANGLE = 60.0
_HISTOGRAM = 500.0
_SEARCH = 60.0
_SHOWN = 40.0
_HASHED = 2e4  # of a neuron, not of a pair


def work_of(shape: Sequence[int]) -> dict[str, float]:
    """The work of each part of a close look at neurons (groups, n, d)."""
    groups, n, d = shape
    pairs = groups * n * n / 2
    shown = 0.0
    if n > HEAT_MAP_SIZE:
        shown = n * n * (d + _SHOWN)
    return {
        "measure": pairs * (2 * d + _ENERGY + _ANGLE),
        "histogram": pairs * (d + _HISTOGRAM),
        "singular values": groups * _singular(n, d),
        "heat map": shown + 1e3 * min(n, HEAT_MAP_SIZE),
    }


def work_of_sample(shape: Sequence[int], sampled: int, block: int) -> dict[str, float]:
    """The work of each part if the energy of ``sampled`` neurons is measured in blocks.

    Args:
        shape: That of the neurons, (groups, n, d).
        sampled: How many are measured in each group.
        block: Neurons in a block.
    """
    groups, n, d = shape
    pairs = n * n / 2
    search = n * _HASHED
    if d == 2:
        search = n * 100.0
    elif compares_all(n, d):
        search = pairs * (d + _SEARCH)
    pictured = min(sampled, PICTURED)
    return {
        "search": groups * search,
        "measure": groups * sampled * block * (2 * d + _SAMPLED),
        "histogram": groups * pictured**2 / 2 * (d + _HISTOGRAM),
        "singular values": groups * _singular(n, d),
        "heat map": pictured**2 * (d + _SHOWN),
    }


def _singular(n: int, d: int) -> float:
    """The work of the singular values of n neurons in d dimensions."""
    smaller = min(n, d)
    if smaller > LARGEST_GRAM:
        return 0.0
    return 2.0 * n * d * smaller + 20.0 * smaller**3


class Parts:
    """Tells the progress of work that is done part by part.

    Args:
        work: The work of each part, in their order.
        done: Called with the fraction of all the work that is done.

    Example:
        >>> parts = Parts({"first": 1.0, "second": 3.0}, print)
        >>> within = parts.begin("second")
        0.25
        >>> within(0.5)
        0.625
    """

    def __init__(self, work: Mapping[str, float], done: Done) -> None:
        self.work = work
        self.done = done

    def begin(self, name: str) -> Done:
        """What a part calls with its own fraction."""
        before = 0.0
        for other, work in self.work.items():
            if other == name:
                break
            before += work
        total = sum(self.work.values())
        within = part_of(self.done, before / total, self.work[name] / total)
        assert within is not None
        within(0.0)
        return within
