"""A close look at one layer: its energy, its pairs, its angles, its singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core import exact_arithmetic, unit_rows, with_float64, working_dtype
from lightning_hsu._core.duplicates import SimilarPairs
from lightning_hsu._core.histogram import PairHistogram, pair_histogram
from lightning_hsu._core.parts import Done, part_of
from lightning_hsu._monitor.measure import LayerUniformity, measure_neurons
from lightning_hsu._monitor.text import finding
from lightning_hsu.measures import Measure
from lightning_hsu.report.data import HEAT_MAP_SIZE, LayerReport, SimilarPair
from lightning_hsu.report.groups import FoundGroups, similar_groups
from lightning_hsu.report.work import LARGEST_GRAM, Parts, work_of

BINS = 90
"""Bins of [0, 180] degrees in a histogram of angles."""

_DEAD_BELOW = 1e-4  # of the median length: a neuron this short counts as dead
DEAD_LISTED = 100  # dead neurons that are listed by index
_IN_FLOAT64 = 2**23  # entries of neurons that are turned into float64 together


@torch.no_grad()
def look_at(
    name: str,
    x: Tensor,
    measure: Measure,
    *,
    similar_above: float,
    keep: int,
    done: Done,
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
    parts = Parts(work_of(x.shape), done)
    uniformity = measure_neurons(name, x, measure, measure.prepare(x), parts.begin("measure"))
    histograms = _histograms(x, measure, similar_above, keep, parts.begin("histogram"))
    angles = torch.stack([histogram.angles for histogram in histograms]).sum(0)
    live = unit_rows(x)[1].squeeze(-1) > 0  # (groups, n)
    dead = dead_neurons(x).flatten().nonzero().flatten()
    spectrum = spectrum_of(x, live, parts.begin("singular values"))
    labels = [histogram.label for histogram in histograms]
    groups = similar_groups(x, labels, measure.half_space, keep)
    group = max(range(len(histograms)), key=lambda i: histograms[i].similar)
    index = live[group].nonzero().flatten()
    shown, cosines = heat_map(x[group], index, parts.begin("heat map"))
    return layer_report(
        uniformity,
        measure,
        histograms,
        keep=keep,
        dead=dead,
        angles=angles,
        spectrum=spectrum,
        live=live,
        picture=(shown, cosines),
        groups=groups,
    )


def layer_report(
    uniformity: LayerUniformity,
    measure: Measure,
    searches: Sequence[PairHistogram | SimilarPairs],
    *,
    keep: int,
    dead: Tensor,
    angles: Tensor,
    spectrum: Spectrum,
    live: Tensor,
    picture: tuple[tuple[int, ...], Tensor],
    groups: FoundGroups,
    sampled: int | None = None,
    all_counted: bool = True,
) -> LayerReport:
    """What is found about one layer, in one.

    Args:
        uniformity: Its numbers.
        measure: How they were measured.
        searches: The near-duplicates of each group.
        keep: How many near-duplicate pairs to list.
        dead: Indices group * n + row of its dead neurons.
        angles: Number of pairs by angle.
        spectrum: Its singular values.
        live: Which neurons take part, (groups, n).
        picture: The neurons of the heat map, in order, and their cosines.
        groups: Its groups of near-duplicates.
        sampled: How many neurons its energy is estimated from; None if it is exact.
        all_counted: Whether all near-duplicate pairs are counted.
    """
    shown, cosines = picture
    return LayerReport(
        uniformity=uniformity,
        measure=measure,
        similar=sum(search.similar for search in searches),
        opposite=sum(search.opposite for search in searches),
        pairs=nearest_pairs(searches, measure.half_space, keep),
        dead=len(dead),
        dead_rows=tuple(dead[:DEAD_LISTED].tolist()),
        angles=tuple(angles.tolist()),
        singular_values=spectrum.values,
        live=float(live.sum(1).double().mean()),
        shown=shown,
        cosines=cosines,
        finding=finding(
            uniformity,
            measure,
            dead=len(dead),
            grouped=groups.neurons,
            groups=groups.count,
            all_counted=all_counted,
        ),
        sampled=sampled,
        all_counted=all_counted,
        groups=groups.listed,
        group_count=groups.count,
        grouped=groups.neurons,
        effective_rank=spectrum.effective_rank,
    )


def _histograms(
    x: Tensor, measure: Measure, similar_above: float, keep: int, done: Done
) -> list[PairHistogram]:
    """Angles and near-duplicates of each group of x (groups, n, d)."""
    histograms = []
    for i, group in enumerate(x):
        histogram = pair_histogram(
            group,
            above=similar_above,
            half_space=measure.half_space,
            keep=keep,
            bins=BINS,
            done=part_of(done, i / len(x), 1.0 / len(x)),
        )
        histograms.append(histogram)
    return histograms


def dead_neurons(x: Tensor) -> Tensor:
    """Which neurons of x (groups, n, d) are negligibly short beside the others, (groups, n).

    Neurons with NaN or infinite numbers are not, and count for nothing beside the others.
    """
    lengths = []
    for rows in torch.split(x, rows_at_once(x), 1):
        lengths.append(lengths_of(rows))
    length = torch.cat(lengths, 1)
    return negligible(length.view(1, -1)).view_as(length)


def negligible(length: Tensor) -> Tensor:
    """Which lengths (layers, n) are negligible beside the others of their layer.

    A length that is NaN or infinite is not, and does not count as one of the others.
    """
    finite = torch.where(torch.isfinite(length), length, math.nan)
    dead: Tensor = finite <= _DEAD_BELOW * finite.nanmedian(1, keepdim=True).values
    return dead


def lengths_of(rows: Tensor) -> Tensor:
    """Lengths of rows (..., n, d) in float64, (..., n); NaN where they are not finite."""
    rows = rows.double()
    largest = torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)  # so that no square overflows
    length = torch.linalg.vector_norm(rows / scale, dim=-1) * scale.squeeze(-1)
    return torch.where(largest.squeeze(-1).isfinite(), length, math.nan)


def rows_at_once(x: Tensor) -> int:
    """How many rows of neurons x (groups, n, d) are turned into float64 together."""
    return max(1, _IN_FLOAT64 // max(1, x.shape[0] * x.shape[2]))


def nearest_pairs(
    histograms: Sequence[PairHistogram | SimilarPairs], half_space: bool, keep: int
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


class Spectrum(NamedTuple):
    """Singular values of a layer's unit neurons.

    Args:
        values: Those of all groups together, in descending order.
        effective_rank: The mean effective rank of the groups; NaN without values.
    """

    values: tuple[float, ...]
    effective_rank: float


def effective_ranks(values: Tensor) -> Tensor:
    """Effective ranks (...,) of singular values (..., m): e to the entropy of their squares.

    NaN where all are zero. Negative values are left out.

    Example:
        >>> effective_ranks(torch.tensor([[2.0, 2.0, 0.0], [1.0, 0.0, -1.0]])).tolist()
        [2.0, 1.0]
    """
    square = values.double().clamp_min(0.0).square()
    share = square / square.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy.exp()


def spectrum_of(x: Tensor, live: Tensor, done: Done) -> Spectrum:
    """Singular values of the live unit rows of each group of x (groups, n, d), and their rank.

    They come from a Gram matrix in float64; none if that is too large.
    """
    if min(x.shape[1:]) > LARGEST_GRAM:
        return Spectrum((), math.nan)
    found = []
    ranks = []
    for i, alive in enumerate(live):
        index = alive.nonzero().flatten()
        if len(index) < x.shape[2]:
            unit = unit_rows(x[i, index].double())[0]
            gram = unit @ unit.mT
        else:
            gram = _gram_of_columns(x[i], index, part_of(done, i / len(x), 0.5 / len(x)))
        values = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
        found.append(values)
        if len(index) > 0:
            ranks.append(float(effective_ranks(values)))
        done((i + 1) / len(x))
    mean = sum(ranks) / len(ranks) if ranks else math.nan
    return Spectrum(tuple(torch.cat(found).sort(descending=True).values.tolist()), mean)


def _gram_of_columns(x: Tensor, index: Tensor, done: Done | None) -> Tensor:
    """Products (d, d) of the columns of x (n, d), of the unit rows at some indices, in float64."""
    gram = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    before = 0
    for some in torch.split(index, rows_at_once(x[None])):
        unit = unit_rows(x[some].double())[0]
        gram.addmm_(unit.mT, unit)
        before += len(some)
        if done is not None:
            done(before / len(index))
    return gram


def heat_map(x: Tensor, index: Tensor, done: Done) -> tuple[tuple[int, ...], Tensor]:
    """Neurons to show of x (n, d), in order, and their cosines (m, m).

    Args:
        x: The neurons of one group.
        index: Those to choose from, which are live: the nearest to another one of these are shown.
        done: Called with the fraction of the work that is done.
    """
    unit = unit_rows(x[index])[0].float()  # (n, d)
    with exact_arithmetic(unit):
        if len(unit) > HEAT_MAP_SIZE:
            largest = _largest_cosines(unit, done)
            chosen = largest.topk(HEAT_MAP_SIZE).indices.sort().values
            index = index[chosen]
            unit = unit[chosen]
        cosines = (unit @ unit.mT).clamp_(-1.0, 1.0)
    order = _chain(cosines.abs())
    return tuple(index[order].tolist()), cosines[order][:, order].cpu()


def _largest_cosines(unit: Tensor, done: Done) -> Tensor:
    """The largest absolute cosine of each unit row (n, d) to another, (n,)."""
    found = []
    for start, rows in zip(range(0, len(unit), 256), torch.split(unit, 256), strict=True):
        cosine = (rows @ unit.mT).abs_()
        cosine[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = -1.0
        found.append(cosine.amax(1))
        done((start + len(rows)) / len(unit))
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
