"""A close look at one layer: its energy, its pairs, its angles, its singular values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hsu._core import exact_arithmetic, unit_rows, with_float64, working_dtype
from lightning_hsu._core.histogram import PairHistogram, pair_histogram
from lightning_hsu._monitor.measure import measure_neurons
from lightning_hsu._monitor.text import finding
from lightning_hsu.measures import Measure
from lightning_hsu.report.data import HEAT_MAP_SIZE, LayerReport, SimilarPair

BINS = 90
"""Bins of [0, 180] degrees in a histogram of angles."""

_DEAD_BELOW = 1e-4  # of the median length: a neuron this short counts as dead
_DEAD_LISTED = 100  # dead neurons that are listed by index
_LARGEST_GRAM = 4096  # rows of the largest Gram matrix whose eigenvalues are computed

# Approximate shares of the time for measuring and for the histogram; singular values and the heat
# map take the rest.
_MEASURED = 0.4
_SURVEYED = 0.4


@torch.no_grad()
def look_at(
    name: str,
    x: Tensor,
    measure: Measure,
    *,
    similar_above: float,
    keep: int,
    done: Callable[[float], None],
) -> LayerReport:
    """Look at one layer.

    Args:
        name: Its name.
        x: Its neurons (groups, n, d).
        measure: How to measure them.
        similar_above: Cosine at or above which two neurons are near-duplicates, in (0, 1).
        keep: How many near-duplicate pairs to list.
        done: Called with the fraction of the work that is done.
    """
    x = with_float64(x.detach().to(working_dtype(x.dtype)))
    uniformity = measure_neurons(name, x, measure, measure.prepare(x))
    done(_MEASURED)
    histograms = _histograms(x, measure, similar_above, keep, done)
    similar = sum(histogram.similar for histogram in histograms)
    angles = torch.stack([histogram.angles for histogram in histograms]).sum(0)
    live = unit_rows(x)[1].squeeze(-1) > 0  # (groups, n)
    dead = _dead(x).flatten().nonzero().flatten()
    shown, cosines = _heat_map(x, live, histograms)
    return LayerReport(
        uniformity=uniformity,
        measure=measure,
        similar=similar,
        opposite=sum(histogram.opposite for histogram in histograms),
        pairs=_nearest(histograms, measure.half_space, keep),
        dead=len(dead),
        dead_rows=tuple(dead[:_DEAD_LISTED].tolist()),
        angles=tuple(angles.tolist()),
        singular_values=_singular_values(x, live),
        live=float(live.sum(1).double().mean()),
        shown=shown,
        cosines=cosines,
        finding=finding(uniformity, measure, dead=len(dead), similar=similar),
    )


def _histograms(
    x: Tensor, measure: Measure, similar_above: float, keep: int, done: Callable[[float], None]
) -> list[PairHistogram]:
    """Angles and near-duplicates of each group of x (groups, n, d)."""
    histograms = []
    for i, group in enumerate(x):

        def within_group(part: float, i: int = i) -> None:
            done(_MEASURED + _SURVEYED * (i + part) / len(x))

        histogram = pair_histogram(
            group,
            above=similar_above,
            half_space=measure.half_space,
            keep=keep,
            bins=BINS,
            done=within_group,
        )
        histograms.append(histogram)
    return histograms


def _dead(x: Tensor) -> Tensor:
    """Which neurons of x (groups, n, d) are negligibly short beside the others, (groups, n)."""
    length = torch.linalg.vector_norm(x.double(), dim=-1)
    dead: Tensor = length <= _DEAD_BELOW * length.nanmedian()
    return dead


def _nearest(
    histograms: list[PairHistogram], half_space: bool, keep: int
) -> tuple[SimilarPair, ...]:
    """The nearest pairs of all groups."""
    pairs = []
    for group, histogram in enumerate(histograms):
        angles = histogram.pair_angles.tolist()
        for (first, second), angle in zip(histogram.pairs.tolist(), angles, strict=True):
            pairs.append(SimilarPair(group, first, second, angle))

    def distance(pair: SimilarPair) -> float:
        if half_space:
            return min(pair.angle, 180.0 - pair.angle)
        return pair.angle

    pairs.sort(key=distance)
    return tuple(pairs[:keep])


def _singular_values(x: Tensor, live: Tensor) -> tuple[float, ...]:
    """Singular values of the live unit rows of each group, all together, in descending order.

    They come from a Gram matrix in float64; none if that is too large.
    """
    if min(x.shape[1:]) > _LARGEST_GRAM:
        return ()
    found = []
    for group, alive in zip(x, live, strict=True):
        unit = unit_rows(group[alive].double())[0]
        if len(unit) >= unit.shape[1]:
            unit = unit.mT  # gives the smaller of the two Gram matrices
        found.append(torch.linalg.eigvalsh(unit @ unit.mT).clamp_min(0.0).sqrt())
    return tuple(torch.cat(found).sort(descending=True).values.tolist())


def _heat_map(
    x: Tensor, live: Tensor, histograms: list[PairHistogram]
) -> tuple[tuple[int, ...], Tensor]:
    """Neurons to show, in order, and their cosines (m, m), from the group with the most pairs."""
    group = max(range(len(histograms)), key=lambda i: histograms[i].similar)
    index = live[group].nonzero().flatten()
    unit = unit_rows(x[group, index])[0].float()  # (n, d)
    with exact_arithmetic(unit):
        if len(unit) > HEAT_MAP_SIZE:
            chosen = _largest_cosines(unit).topk(HEAT_MAP_SIZE).indices.sort().values
            index = index[chosen]
            unit = unit[chosen]
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
    """An order of the rows of (m, m) in which each is followed by the most similar one left."""
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
