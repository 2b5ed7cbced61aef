"""What the pictures of a training need: the numbers of all measured steps, and the angles of a layer's neurons."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_hsu._core.histogram import survey_pairs
from lightning_hsu._engine.layer import Layer
from lightning_hsu._monitor.measure import LayerUniformity

Curve = Sequence[tuple[int, float]]
"""Pairs of optimizer step and value."""

BINS = 720
"""Parts of [0, 180] degrees in which pairs are counted."""

_MOST = 2000  # records: more than a picture has points; of old ones every other goes
_NEURONS = 4096  # of one layer, whose pairs are counted


@dataclass(frozen=True)
class Record:
    """The layers at one step, in plain numbers.

    Args:
        step: Optimizer steps done.
        ratios: Ratios to random neurons, by layer.
        shares: Norms of the added gradients over those of the task's, by layer, where they are known and finite.
    """

    step: int
    ratios: Mapping[str, float]
    shares: Mapping[str, float]


@dataclass
class History:
    """All records of one fit; a very long one is thinned out.

    Example:
        >>> history = History([Record(0, {"a": 1.0, "b": 2.0}, {}), Record(9, {"a": 3.0, "b": 2.0}, {})])
        >>> history.ratios()["a"], history.worst(1)
        ([(0, 1.0), (9, 3.0)], ['a'])
    """

    records: list[Record] = field(default_factory=list)

    def note(
        self, step: int, measured: Sequence[LayerUniformity], shares: Mapping[str, float]
    ) -> None:
        """Keep what was measured after a step; again at the same step it takes the place of what was there."""
        if self.records and self.records[-1].step == step:
            shares = {**self.records.pop().shares, **shares}
        self.records.append(Record(step, {one.name: one.ratio for one in measured}, dict(shares)))
        if len(self.records) > _MOST:
            del self.records[1:-1:2]

    def ratios(self) -> dict[str, Curve]:
        """Curves of the ratios, by layer."""
        return self._curves(lambda record: record.ratios)

    def shares(self) -> dict[str, Curve]:
        """Curves of the gradient shares, by layer."""
        return self._curves(lambda record: record.shares)

    def worst(self, count: int) -> list[str]:
        """The layers with the highest ratios now, highest first."""
        now = self.records[-1].ratios if self.records else {}
        finite = [name for name, ratio in now.items() if math.isfinite(ratio)]
        return sorted(finite, key=lambda name: -now[name])[:count]

    def _curves(self, values: Callable[[Record], Mapping[str, float]]) -> dict[str, Curve]:
        found = dict[str, list[tuple[int, float]]]()
        for record in self.records:
            for name, value in values(record).items():
                found.setdefault(name, []).append((record.step, value))
        return dict(found)


@dataclass(frozen=True)
class Angles:
    """The pairs of a layer by angle.

    Args:
        name: The layer.
        counts: How many pairs have an angle in each of ``BINS`` equal parts of [0, 180] degrees.
        dimension: Of its neurons.
        note: What else to say of it.
    """

    name: str
    counts: tuple[int, ...]
    dimension: int
    note: str


def angles_of(layer: Layer, x: Tensor, ratio: float) -> Angles:
    """Count the pairs of a layer's neurons x (groups, n, d) by angle; of many neurons those of a sample."""
    groups, n, d = x.shape
    seen = _sampled(x)
    counts = torch.stack([survey_pairs(group, keep=1, bins=BINS).angles for group in seen]).sum(0)
    times = f"{ratio:.2f}× random" if ratio < 100 else f"{ratio:,.0f}× random"
    size = f"{n:,} × {d:,}" if groups == 1 else f"{groups:,} groups of {n:,} × {d:,}"
    if seen.shape != x.shape:
        size = f"{seen.shape[0] * seen.shape[1]:,} of {groups * n:,} × {d:,}"
    return Angles(layer.target.name, tuple(counts.tolist()), d, f"{times}, {size}")


def _sampled(x: Tensor) -> Tensor:
    """At most so many neurons of x (groups, n, d), the same at each call; a generator of its own leaves training alone."""
    groups, n, _ = x.shape
    if groups * n <= _NEURONS:
        return x
    generator = torch.Generator().manual_seed(0)
    kept = min(groups, max(1, _NEURONS // n))
    chosen = torch.randperm(groups, generator=generator)[:kept].sort().values
    rows = torch.randperm(n, generator=generator)[:_NEURONS].sort().values
    return x[chosen.to(x.device)][:, rows.to(x.device)]
