"""The data of figures: the numbers of all measured steps, and the angles between neurons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_hsu._core.histogram import pair_histogram
from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu._monitor.text import shape_of

Curve = Sequence[tuple[int, float]]
"""Pairs of optimizer step and value."""

BINS = 720
"""Equal parts of [0, 180] degrees in which pairs are counted."""

_MOST_RECORDS = 2000  # more than a figure has points; beyond that every other one is dropped
_MOST_NEURONS = 4096  # of one layer; pairs of more neurons are counted in a sample


@dataclass(frozen=True)
class Record:
    """The layers at one step, in plain numbers.

    Args:
        step: Optimizer steps done.
        ratios: Ratios to random neurons, by layer.
        shares: Norms of the added gradients over those of the task's, by layer; only those that
            are known and finite.
    """

    step: int
    ratios: Mapping[str, float]
    shares: Mapping[str, float]


@dataclass
class History:
    """All records of one fit; a very long one is thinned out.

    Example:
        >>> first = Record(0, {"a": 1.0, "b": 2.0}, {})
        >>> history = History([first, Record(9, {"a": 3.0, "b": 2.0}, {})])
        >>> history.ratios()["a"], history.worst(1)
        ([(0, 1.0), (9, 3.0)], ['a'])
    """

    records: list[Record] = field(default_factory=list)

    def note(
        self, step: int, measured: Sequence[LayerUniformity], shares: Mapping[str, float]
    ) -> None:
        """Keep what was measured after a step; a second record of a step replaces the first.

        Args:
            step: Optimizer steps done.
            measured: The layers.
            shares: Gradient shares, by layer; those that the replaced record has are kept.
        """
        shares = dict(shares)
        if self.records and self.records[-1].step == step:
            replaced = self.records.pop()
            shares = {**replaced.shares, **shares}
        ratios = {layer.name: layer.ratio for layer in measured}
        self.records.append(Record(step, ratios, shares))
        if len(self.records) > _MOST_RECORDS:
            del self.records[1:-1:2]

    def ratios(self) -> dict[str, Curve]:
        """Curves of the ratios, by layer."""
        return _curves((record.step, record.ratios) for record in self.records)

    def shares(self) -> dict[str, Curve]:
        """Curves of the gradient shares, by layer."""
        return _curves((record.step, record.shares) for record in self.records)

    def worst(self, count: int) -> list[str]:
        """The layers with the highest ratios in the last record, highest first."""
        if not self.records:
            return []
        ratios = self.records[-1].ratios
        finite = [name for name, ratio in ratios.items() if math.isfinite(ratio)]
        return sorted(finite, key=lambda name: -ratios[name])[:count]


def _curves(values: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, Curve]:
    """Turn values by layer at each step into a curve for each layer."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, by_layer in values:
        for name, value in by_layer.items():
            curves.setdefault(name, []).append((step, value))
    return dict(curves)


@dataclass(frozen=True)
class Angles:
    """The pairs of a layer's neurons by angle.

    Args:
        name: The layer.
        counts: Pairs with an angle in each of ``BINS`` equal parts of [0, 180] degrees.
        dimension: Dimension of a neuron.
        note: A second title.
    """

    name: str
    counts: tuple[int, ...]
    dimension: int
    note: str


def angles_of(name: str, x: Tensor, ratio: float) -> Angles:
    """Count the pairs of a layer's neurons by angle; for a large layer, those of a sample.

    Args:
        name: The layer.
        x: Its neurons, shape (groups, n, d).
        ratio: Its ratio to random neurons.
    """
    groups, n, d = x.shape
    sample = _sample(x)
    counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    for group in sample:
        counts += pair_histogram(group, keep=1, bins=BINS).angles
    sampled = None
    if sample.shape != x.shape:
        sampled = sample.shape[0] * sample.shape[1]
    shape = shape_of(groups, n, d, sampled=sampled)
    digits = 2 if ratio < 100 else 0
    note = f"{ratio:,.{digits}f}x random, {shape}".replace("x ", "× ")
    return Angles(name, tuple(counts.tolist()), d, note)


def _sample(x: Tensor) -> Tensor:
    """Choose at most ``_MOST_NEURONS`` of the neurons x (groups, n, d), the same at each call."""
    groups, n, _ = x.shape
    if groups * n <= _MOST_NEURONS:
        return x
    generator = torch.Generator().manual_seed(0)  # not the global one, which training uses
    kept = min(groups, max(1, _MOST_NEURONS // n))
    chosen = torch.randperm(groups, generator=generator)[:kept].sort().values
    rows = torch.randperm(n, generator=generator)[:_MOST_NEURONS].sort().values
    return x[chosen.to(x.device)][:, rows.to(x.device)]
