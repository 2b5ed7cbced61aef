"""A look at a layer of very many neurons: its energy from a sample of them.

The sample is a uniform one from a fixed seed, so a report says the same each time. Dead neurons and
singular values are those of all neurons. Near-duplicates are searched among all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._core import exact_arithmetic, or_one, with_float64, working_dtype
from lightning_hsu._core.duplicates import SimilarPairs, distinct, similar_pairs
from lightning_hsu._core.histogram import pair_histogram
from lightning_hsu._core.nearest import smallest_angle
from lightning_hsu._core.parts import Done, part_of
from lightning_hsu._core.sampled_energy import sampled_energy
from lightning_hsu._core.sphere import live_rows, seeded
from lightning_hsu._monitor.measure import LayerUniformity, beside_random
from lightning_hsu.measures import Measure
from lightning_hsu.reference import is_soon_simulated
from lightning_hsu.report.analysis import (
    BINS,
    dead_neurons,
    heat_map,
    layer_report,
    rows_at_once,
    spectrum_of,
)
from lightning_hsu.report.data import LayerReport
from lightning_hsu.report.groups import similar_groups
from lightning_hsu.report.work import PICTURED, Parts, work_of_sample

BLOCK = 1024
"""Neurons in a block, all pairs of which are measured."""

_KNOWN = 8192  # nearest pairs whose energies are not estimated
_UNSURE = 0.1  # a score whose standard error is larger is not told


@dataclass(frozen=True)
class _Sample:
    """Sampled neurons of one group.

    Args:
        rows: Their indices, in random order.
        live: How many neurons of the group are live.
    """

    rows: Tensor
    live: int

    def blocks(self) -> Tensor:
        """The sample in blocks (k, m)."""
        count = max(1, len(self.rows) // BLOCK)
        return self.rows[: len(self.rows) // count * count].view(count, -1)


def is_sampled(shape: tuple[int, int, int], measure: Measure, sample_above: int | None) -> bool:
    """Whether a layer of this shape (groups, n, d) is sampled.

    A measure that is no mean over pairs cannot be.
    """
    if sample_above is None or measure.pair_term() is None:
        return False
    return shape[1] > sample_above


@torch.no_grad()
def look_at_sample(
    name: str,
    x: Tensor,
    measure: Measure,
    *,
    sampled: int,
    similar_above: float,
    keep: int,
    done: Done,
) -> LayerReport:
    """Look at one layer of very many neurons.

    Args:
        name: Its name.
        x: Its neurons (groups, n, d).
        measure: How to measure them, a mean over pairs.
        sampled: How many neurons of each group to measure.
        similar_above: Cosine at or above which two neurons are near-duplicates, in (0, 1).
        keep: How many near-duplicate pairs to list.
        done: Called with the fraction of the work that is done.
    """
    x = with_float64(x.detach().to(working_dtype(x.dtype)))
    parts = Parts(work_of_sample(x.shape, sampled, BLOCK), done)
    samples = _samples(x, sampled)
    searches = _searches(x, measure, similar_above, max(keep, _KNOWN), parts.begin("search"))
    penalties, errors = _energies(x, samples, searches, measure, parts.begin("measure"))
    live = _live(x)
    smallest = _smallest_angle(x, samples, searches, measure.half_space)
    uniformity = _uniformity(name, x, live, measure, penalties, errors, smallest)
    dead = dead_neurons(x).flatten().nonzero().flatten()
    group = max(range(len(x)), key=lambda i: searches[i].similar)
    near = searches[group].pairs[: PICTURED // 4].flatten()
    chosen = distinct(torch.cat([near, samples[group].rows[:PICTURED]]))[0]
    angles = _angles(x, samples, parts.begin("histogram"))
    spectrum = spectrum_of(x, live, parts.begin("singular values"))
    shown, cosines = heat_map(x[group], chosen, parts.begin("heat map"))
    labels = [search.label for search in searches]
    groups = similar_groups(x, labels, measure.half_space, keep)
    return layer_report(
        uniformity,
        measure,
        searches,
        keep=keep,
        dead=dead,
        angles=angles,
        spectrum=spectrum,
        live=live,
        picture=(shown, cosines),
        groups=groups,
        sampled=sum(len(sample.rows) for sample in samples),
        all_counted=all(search.all_counted for search in searches),
    )


def _samples(x: Tensor, sampled: int) -> list[_Sample]:
    """Random live neurons of each group of x (groups, n, d)."""
    samples = []
    for i, group in enumerate(x):
        live = live_rows(group)
        order = torch.randperm(len(live), generator=seeded(i))[:sampled]
        samples.append(_Sample(live[order.to(live.device)], len(live)))
    return samples


def _energies(
    x: Tensor,
    samples: list[_Sample],
    searches: list[SimilarPairs],
    measure: Measure,
    done: Done,
) -> tuple[Tensor, Tensor]:
    """Estimated penalties (groups,) of x (groups, n, d), and the errors of their values."""
    term = measure.pair_term()
    assert term is not None
    energies = []
    errors = []
    with exact_arithmetic(x):
        for i, (group, sample) in enumerate(zip(x, samples, strict=True)):
            estimate = sampled_energy(
                group,
                sample.blocks(),
                term,
                live=sample.live,
                known=searches[i].pairs,
                done=part_of(done, i / len(x), 1.0 / len(x)),
            )
            energies.append(estimate.value)
            errors.append(estimate.error)
    penalties = torch.tensor(energies, dtype=torch.float64)
    if term.logarithm:
        penalties = or_one(penalties).log()
    return penalties, torch.tensor(errors, dtype=torch.float64)


def _smallest_angle(
    x: Tensor, samples: list[_Sample], searches: list[SimilarPairs], half_space: bool
) -> float:
    """The smallest angle that was seen, in degrees; infinite if none was."""
    smallest = min(search.nearest for search in searches)
    if math.isfinite(smallest):
        return smallest
    for group, sample in zip(x, samples, strict=True):
        rows = group[sample.rows[:PICTURED]]
        angle = float(smallest_angle(rows, half_space=half_space).rad2deg())
        if angle < smallest:  # never true for NaN
            smallest = angle
    return smallest


def _searches(
    x: Tensor, measure: Measure, similar_above: float, keep: int, done: Done
) -> list[SimilarPairs]:
    """The near-duplicates of each group."""
    found = []
    for i, group in enumerate(x):
        search = similar_pairs(
            group,
            above=similar_above,
            half_space=measure.half_space,
            keep=keep,
            done=part_of(done, i / len(x), 1.0 / len(x)),
        )
        found.append(search)
    return found


def _live(x: Tensor) -> Tensor:
    """Which neurons of x (groups, n, d) take part, (groups, n)."""
    live = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    for group, own in zip(x, live, strict=True):
        own[live_rows(group)] = True
    return live


def _uniformity(
    name: str,
    x: Tensor,
    live: Tensor,
    measure: Measure,
    penalties: Tensor,
    errors: Tensor,
    smallest: float,
) -> LayerUniformity:
    """The numbers of a sampled layer.

    Args:
        name: Its name.
        x: Its neurons (groups, n, d).
        live: Which take part, (groups, n).
        measure: The measure.
        penalties: Estimates (groups,).
        errors: Standard errors of their natural values.
        smallest: The smallest angle that was seen, in degrees; infinite if none was.
    """
    groups, n, d = x.shape
    energy = measure.natural(penalties).mean()
    error = float(torch.linalg.vector_norm(errors)) / groups
    alive = int(live.sum())
    each = round(alive / groups)
    fewest = int(live.sum(1).min())
    nonfinite = 0
    for rows in torch.split(x, rows_at_once(x), 1):
        nonfinite += int((~torch.isfinite(rows).all(-1)).sum())
    ratio = score = math.nan
    if fewest > 1 and is_soon_simulated(measure, each, d):
        ratio, score = beside_random(measure, energy, fewest, each, d)
        further = beside_random(measure, energy + error, fewest, each, d)[1]
        if not abs(further - score) <= _UNSURE:
            score = math.nan
    return LayerUniformity(
        name=name,
        groups=groups,
        neurons=n,
        dimension=d,
        energy=float(energy),
        penalty=float(penalties.mean()),
        ratio=ratio,
        score=score,
        min_angle=smallest if math.isfinite(smallest) else math.nan,
        dead=groups * n - alive - nonfinite,
        nonfinite=nonfinite,
        exact=False,
        standard_error=error,
        gradient_error=math.nan,
    )


def _angles(x: Tensor, samples: list[_Sample], done: Done) -> Tensor:
    """Pairs by angle of some sampled neurons of each group."""
    angles = torch.zeros(BINS, dtype=torch.int64)
    for i, (group, sample) in enumerate(zip(x, samples, strict=True)):
        within = part_of(done, i / len(x), 1.0 / len(x))
        rows = sample.rows[:PICTURED]
        angles += pair_histogram(group[rows], keep=0, bins=BINS, done=within).angles.cpu()
    return angles
