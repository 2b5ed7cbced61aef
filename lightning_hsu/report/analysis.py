"""One layer looked at closely: its energy, its pairs, its angles, its singular values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core import exact_arithmetic, unit_rows, with_float64, working_dtype
from lightning_hsu._core.histogram import Survey, survey_pairs
from lightning_hsu._monitor.measure import LayerUniformity, in_half_space, measure_neurons
from lightning_hsu._monitor.text import finding
from lightning_hsu.measures import Measure

BINS = 90
"""Parts of [0, 180] degrees in a histogram of angles."""

_NOTHING = 1e-4  # length over the median from which on a neuron does something
_HEAT = 128  # neurons in a heat map
_MEASURED, _SURVEYED = (
    0.4,
    0.4,
)  # about what of the time goes into these; the rest into singular values and heat map
_WIDEST = 4096  # the smaller side of a weight up to which its singular values are computed


class SimilarPair(NamedTuple):
    """Two neurons that are nearly the same.

    Args:
        group: Their group, 0 where there is one.
        first: Index of the one within its group.
        second: Index of the other.
        angle: Between them, in degrees; near 180 where only their lines are the same.
    """

    group: int
    first: int
    second: int
    angle: float


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What a report knows of one layer.

    Args:
        uniformity: Its numbers.
        measure: How they were measured; in full space for a class head and for two neurons.
        similar: Near-duplicate pairs.
        opposite: Those among them that point opposite ways.
        pairs: The most similar of them, nearest first.
        dead: Neurons that are all zero, or shorter than 1e-4 of the layer's median length: they do nothing.
        dead_rows: Indices group * n + row of the first hundred of them.
        angles: Pairs by angle, in ``BINS`` equal parts of [0, 180] degrees.
        singular_values: Of the unit neurons (n, d) of each group, all together, falling; empty where n and d are above 4096.
        live: Live neurons a group, on average.
        shown: Neurons in the heat map, by index within their group: those with the nearest others, each followed by the most
            similar one that is left.
        cosines: Between them, float32 (m, m).
        finding: All of it in words.
    """

    uniformity: LayerUniformity
    measure: Measure
    similar: int
    opposite: int
    pairs: tuple[SimilarPair, ...]
    dead: int
    dead_rows: tuple[int, ...]
    angles: tuple[int, ...]
    singular_values: tuple[float, ...]
    live: float
    shown: tuple[int, ...]
    cosines: Tensor
    finding: str

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.uniformity.name

    @property
    def above(self) -> bool:
        """Whether the ratio is more than 2 % above that of random neurons."""
        return self.uniformity.ratio > 1.02

    @property
    def as_random(self) -> bool:
        """Whether random neurons may well have such a ratio, in however few dimensions."""
        return self.finding.startswith("as random")

    @property
    def full_space(self) -> bool:
        """Whether opposite neurons are far apart, not the same line."""
        return not in_half_space(self.measure)

    @property
    def edges(self) -> tuple[float, float]:
        """Ends of the singular values of as many random unit vectors, as their number grows (Marchenko and Pastur)."""
        root = math.sqrt(self.live / self.uniformity.dimension)
        return abs(1.0 - root), 1.0 + root


@torch.no_grad()
def look_at(
    name: str,
    x: Tensor,
    measure: Measure,
    *,
    similar_above: float,
    keep: int,
    done: Callable[[float], None] = lambda fraction: None,
) -> LayerReport:
    """Look at neurons x (groups, n, d); ``done`` is told the fraction of the work that is done."""
    x = with_float64(x.detach().to(working_dtype(x.dtype)))
    uniformity = measure_neurons(name, x, measure, measure.prepare(x))
    done(_MEASURED)
    surveys = [
        survey_pairs(
            group,
            above=similar_above,
            half_space=in_half_space(measure),
            keep=keep,
            bins=BINS,
            done=lambda part, i=i: done(_MEASURED + _SURVEYED * (i + part) / len(x)),  # type: ignore[misc]
        )
        for i, group in enumerate(x)
    ]
    similar, live = (
        sum(one.similar for one in surveys),
        unit_rows(x)[1].squeeze(-1) > 0,
    )  # (groups, n)
    dead = _dead(x).flatten().nonzero().flatten()
    shown, cosines = _heat_map(x, live, surveys)
    return LayerReport(
        uniformity=uniformity,
        measure=measure,
        similar=similar,
        opposite=sum(one.opposite for one in surveys),
        pairs=_nearest(surveys, in_half_space(measure), keep),
        dead=len(dead),
        dead_rows=tuple(dead[:100].tolist()),
        angles=tuple(torch.stack([one.angles for one in surveys]).sum(0).tolist()),
        singular_values=_singular_values(x, live),
        live=float(live.sum(1).double().mean()),
        shown=shown,
        cosines=cosines,
        finding=finding(uniformity, measure, dead=len(dead), similar=similar),
    )


def _dead(x: Tensor) -> Tensor:
    """Which neurons of x (groups, n, d) are all zero or next to nothing beside the others, (groups, n)."""
    length = torch.linalg.vector_norm(x.double(), dim=-1)
    nothing: Tensor = length <= _NOTHING * length.nanmedian()
    return nothing


def _nearest(surveys: list[Survey], half_space: bool, keep: int) -> tuple[SimilarPair, ...]:
    found = [
        SimilarPair(group, pair[0], pair[1], angle)
        for group, one in enumerate(surveys)
        for pair, angle in zip(one.pairs.tolist(), one.pair_angles.tolist(), strict=True)
    ]
    found.sort(key=lambda pair: min(pair.angle, 180.0 - pair.angle) if half_space else pair.angle)
    return tuple(found[:keep])


def _singular_values(x: Tensor, live: Tensor) -> tuple[float, ...]:
    """Of the unit rows of each group that are live, by the smaller of the two Gram matrices in float64."""
    if min(x.shape[1:]) > _WIDEST:
        return ()
    found = []
    for group, alive in zip(x, live, strict=True):
        unit = unit_rows(group[alive].double())[0]
        gram = unit @ unit.mT if len(unit) < unit.shape[1] else unit.mT @ unit
        found.append(torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt())
    return tuple(torch.cat(found).sort(descending=True).values.tolist())


def _heat_map(x: Tensor, live: Tensor, surveys: list[Survey]) -> tuple[tuple[int, ...], Tensor]:
    """Which neurons to show, in order, and their cosines (m, m): of the group with the most similar pairs."""
    group = max(range(len(surveys)), key=lambda i: surveys[i].similar)
    index = live[group].nonzero().flatten()
    unit = unit_rows(x[group, index])[0].float()  # (n, d)
    with exact_arithmetic(unit):
        if len(unit) > _HEAT:
            chosen = _largest_cosines(unit).topk(_HEAT).indices.sort().values
            index, unit = index[chosen], unit[chosen]
        cosines = (unit @ unit.mT).clamp_(-1.0, 1.0)
    order = _chain(cosines.abs())
    return tuple(index[order].tolist()), cosines[order][:, order].cpu()


def _largest_cosines(unit: Tensor) -> Tensor:
    """The largest absolute cosine of each unit row (n, d) to another, (n,)."""
    found = []
    for start, rows in zip(range(0, len(unit), 256), torch.split(unit, 256), strict=True):
        cosine = (rows @ unit.mT).abs_()
        cosine[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = -1.0
        found.append(cosine.amax(1))
    return torch.cat(found)


def _chain(similarity: Tensor) -> list[int]:
    """An order of the rows of (m, m) in which each is followed by the most similar one that is left."""
    if len(similarity) < 2:
        return list(range(len(similarity)))
    left = similarity.clone().fill_diagonal_(-1.0)
    at = int(left.amax(1).argmax())
    order = [at]
    while len(order) < len(left):
        left[:, at] = -1.0
        at = int(left[at].argmax())
        order.append(at)
    return order
