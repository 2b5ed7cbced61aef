"""A close look at many small layers at once, in a few operations for all of them.

It gives what :func:`lightning_hsu.report.analysis.look_at` gives for each, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._core import with_float64, working_dtype
from lightning_hsu._core.components import Components
from lightning_hsu._core.small_groups import SmallGroups, chains
from lightning_hsu._monitor.measure import LayerUniformity, beside_random
from lightning_hsu._monitor.text import finding
from lightning_hsu.measures import Measure, Sampled
from lightning_hsu.report.analysis import (
    BINS,
    DEAD_LISTED,
    effective_ranks,
    lengths_of,
    negligible,
)
from lightning_hsu.report.data import HEAT_MAP_SIZE, LayerReport, SimilarGroup, SimilarPair
from lightning_hsu.report.groups import FoundGroups, group_of, largest_first

_SMALL = 2**16  # entries of a layer's neurons and of all pairs' cosines together
_AT_ONCE = 2**21  # cosines of layers that are looked at in one pass
_STEPS = (1.0, 1.25, 1.5, 1.75)  # sizes are padded to these times a power of two


@dataclass(frozen=True)
class SmallLayer:
    """A layer that is to be looked at together with others.

    Args:
        name: Its name.
        x: Its neurons (groups, n, d).
        measure: How to measure them.
    """

    name: str
    x: Tensor
    measure: Measure


def is_small(shape: tuple[int, int, int], measure: Measure) -> bool:
    """Whether a layer of this shape (groups, n, d) may be looked at together with others."""
    groups, n, d = shape
    if isinstance(measure, Sampled) or n > HEAT_MAP_SIZE:
        return False
    return groups * n * (n + d) <= _SMALL


def look_at_together(
    layers: Sequence[SmallLayer], *, similar_above: float, keep: int
) -> list[LayerReport]:
    """Look at small layers; those of about one size go through the same operations.

    Args:
        layers: The layers, for which :func:`is_small` holds.
        similar_above: Cosine at or above which two neurons are near-duplicates, in (0, 1).
        keep: How many near-duplicate pairs of each layer to list.

    Returns:
        What is found, in the order of the layers.
    """
    alike: dict[object, list[int]] = {}
    for i, layer in enumerate(layers):
        groups, n, d = layer.x.shape
        dtype = working_dtype(layer.x.dtype)
        kind = (layer.measure, layer.x.device, dtype, groups, padded(n), padded(d))
        alike.setdefault(kind, []).append(i)
    found: dict[int, LayerReport] = {}
    for places in alike.values():
        groups, n, _ = layers[places[0]].x.shape
        height = max(1, _AT_ONCE // (groups * padded(n) ** 2))
        for start in range(0, len(places), height):
            some = places[start : start + height]
            stack = _Stack([layers[i] for i in some])
            for i, report in zip(some, stack.reports(similar_above, keep), strict=True):
                found[i] = report
    return [found[i] for i in range(len(layers))]


def padded(size: int) -> int:
    """The size that a dimension is padded to, at most a quarter more, so that few sizes occur."""
    if size <= 4:
        return 4
    power = 2.0 ** math.floor(math.log2(size))
    for step in _STEPS:
        if size <= step * power:
            return math.ceil(step * power)
    return int(2 * power)


class _Stack:
    """Layers with equally many groups, padded to one size.

    Args:
        layers: Their number is L below, that of their groups g, and their padded size (n, d).
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[SmallLayer]) -> None:
        self.layers = layers
        self.measure = layers[0].measure
        first = layers[0].x
        self.groups = len(first)
        self.n = padded(first.shape[1])
        dtype = working_dtype(first.dtype)
        shape = (len(layers), self.groups, self.n, padded(first.shape[2]))
        x = with_float64(first.new_zeros(shape, dtype=dtype))
        for place, layer in zip(x, layers, strict=True):
            _, n, d = layer.x.shape
            place[:, :n, :d] = layer.x
        sizes = torch.tensor([layer.x.shape[1] for layer in layers], device=x.device)
        self.x = x
        self.exists = torch.arange(self.n, device=x.device) < sizes[:, None, None]  # (L, 1, n)
        self.pairs = SmallGroups(x.flatten(0, 1))

    def reports(self, similar_above: float, keep: int) -> list[LayerReport]:
        """What is found about each layer."""
        uniformity = self._uniformity()
        half_space = self.measure.half_space
        similar = self.pairs.similar(similar_above, half_space)  # (L g, k)
        counts = similar.sum(-1).view(-1, self.groups).tolist()
        opposite = self._by_layer(similar & (self.pairs.q > 2.0)).sum(1).tolist()
        angles = self._by_layer(self.pairs.histograms(BINS)).view(-1, self.groups, BINS)
        angles_of = angles.sum(1).tolist()
        dead = self._dead()
        values, ranks = self._singular_values()
        labels = self._labels(similar)
        live = self._by_layer(self.pairs.live).double().mean(1).tolist()
        shown, cosines = self._heat_maps([max(range(len(c)), key=c.__getitem__) for c in counts])
        reports = []
        for i, layer in enumerate(self.layers):
            similar_pairs = sum(counts[i])
            listed: tuple[SimilarPair, ...] = ()
            groups = FoundGroups((), 0, 0)
            if similar_pairs:
                listed = self._nearest(i, similar, keep)
                groups = self._groups(i, labels, keep)
            report = LayerReport(
                uniformity=uniformity[i],
                measure=layer.measure,
                similar=similar_pairs,
                opposite=opposite[i],
                pairs=listed,
                dead=len(dead[i]),
                dead_rows=tuple(dead[i][:DEAD_LISTED]),
                angles=tuple(angles_of[i]),
                singular_values=tuple(values[i]),
                live=live[i],
                shown=shown[i],
                cosines=cosines[i],
                finding=finding(
                    uniformity[i],
                    layer.measure,
                    dead=len(dead[i]),
                    grouped=groups.neurons,
                    groups=groups.count,
                    one_of_many=True,
                ),
                groups=groups.listed,
                group_count=groups.count,
                grouped=groups.neurons,
                effective_rank=ranks[i],
            )
            reports.append(report)
        return reports

    def _by_layer(self, numbers: Tensor) -> Tensor:
        """Numbers (L g, ...) of all groups as (L, g ...)."""
        return numbers.reshape(len(self.layers), -1)

    def _uniformity(self) -> list[LayerUniformity]:
        """The numbers of each layer, as :func:`lightning_hsu._monitor.measure.measure_neurons`."""
        penalties, exact = self._penalties()
        energies = self.measure.natural(penalties).mean(1)
        angles = self._by_layer(self.pairs.smallest_angles(self.measure.half_space))
        alive = self._by_layer(self.pairs.live)
        finite = torch.isfinite(self.x).all(-1)  # (L, g, n)
        is_alive = self.pairs.alive.view_as(finite)
        counts = [
            alive.amin(1),
            alive.sum(1),
            (finite & ~is_alive & self.exists).sum((1, 2)),
            (~finite).sum((1, 2)),
        ]
        numbers = torch.stack([penalties.mean(1), angles.amin(1).rad2deg()], 1).tolist()
        rows = torch.stack(counts, 1).tolist()
        found = []
        for i, layer in enumerate(self.layers):
            groups, n, d = layer.x.shape
            penalty, angle = numbers[i]
            fewest, live, dead, nonfinite = rows[i]
            each = round(live / groups)
            ratio, score = beside_random(self.measure, energies[i], fewest, each, d, self.x.dtype)
            numbers_of_layer = LayerUniformity(
                name=layer.name,
                groups=groups,
                neurons=n,
                dimension=d,
                energy=float(energies[i]),
                penalty=penalty,
                ratio=ratio,
                score=score,
                min_angle=angle,
                dead=dead,
                nonfinite=nonfinite,
                exact=exact[i],
            )
            found.append(numbers_of_layer)
        return found

    def _penalties(self) -> tuple[Tensor, list[bool]]:
        """What training minimises, float64 (L, g), and whether that is exact in each layer."""
        term = self.measure.pair_term()
        if term is None:
            return self._one_by_one()
        bound = torch.finfo(self.x.dtype).max
        energies = self._by_layer(self.pairs.energies(term)).clamp(-bound, bound)
        if term.logarithm:
            energies = torch.where(energies > 0, energies, 1.0).log()
        return energies, [self.measure.is_exact(None)] * len(self.layers)

    def _one_by_one(self) -> tuple[Tensor, list[bool]]:
        """The same for a measure that is no mean over pairs, so that zeros may count."""
        penalties = []
        exact = []
        for layer in self.layers:
            x = with_float64(layer.x.detach().to(self.x.dtype))
            state = self.measure.prepare(x)
            penalties.append(self.measure.penalty(x, state).double().to(self.x.device))
            exact.append(self.measure.is_exact(state))
        return torch.stack(penalties), exact

    def _dead(self) -> list[list[int]]:
        """Indices group * n + row of the neurons of each layer that are negligibly short."""
        length = lengths_of(self.x)
        length = torch.where(self.exists, length, math.nan).flatten(1)  # (L, g n)
        found: list[list[int]] = [[] for _ in self.layers]
        for i, place in negligible(length).nonzero().tolist():
            group, row = divmod(place, self.n)
            found[i].append(group * self.layers[i].x.shape[1] + row)
        return found

    def _singular_values(self) -> tuple[list[list[float]], list[float]]:
        """Singular values of the live unit rows of each group, in descending order by layer.

        With the mean effective rank of each layer's groups.
        """
        gram = self.pairs.cosines
        if self.x.shape[3] < self.n:
            unit = self.pairs.unit
            gram = unit.mT @ unit  # the smaller of the two
        values = torch.linalg.eigvalsh(gram).clamp_min_(0.0).sqrt_()  # (L g, m), ascending
        dimensions = torch.tensor([layer.x.shape[2] for layer in self.layers], device=gram.device)
        live = self._by_layer(self.pairs.live)
        count = torch.minimum(live, dimensions[:, None])  # (L, g)
        from_largest = torch.arange(values.shape[1], device=gram.device).flip(0)
        is_padding = from_largest >= count.flatten()[:, None]
        values.masked_fill_(is_padding, -1.0)
        ranks = self._by_layer(effective_ranks(values)).nanmean(1).tolist()
        ordered = self._by_layer(values).sort(1, descending=True).values.tolist()
        found = []
        for own, number in zip(ordered, count.sum(1).tolist(), strict=True):
            found.append(own[:number])
        return found, ranks

    def _labels(self, similar: Tensor) -> Tensor:
        """The first neuron of each one's group of near-duplicates, (L g, n).

        Args:
            similar: Which pairs are similar, (L g, k).
        """
        place, pair = similar.nonzero(as_tuple=True)
        start = place * self.n
        components = Components(len(similar) * self.n, similar.device)
        components.add(start + self.pairs.first[pair], start + self.pairs.second[pair])
        own = components.label.view(-1, self.n)
        return own - torch.arange(len(own), device=own.device)[:, None] * self.n

    def _groups(self, i: int, labels: Tensor, keep: int) -> FoundGroups:
        """The groups of near-duplicates of layer i, by the labels (L g, n) of all layers."""
        half_space = self.measure.half_space
        found: list[SimilarGroup] = []
        neurons = 0
        for group, label in enumerate(labels[i * self.groups : (i + 1) * self.groups].tolist()):
            members: dict[int, list[int]] = {}
            for neuron, first in enumerate(label):
                members.setdefault(first, []).append(neuron)
            cosines = self.pairs.cosines[i * self.groups + group]
            for first, own in members.items():
                if len(own) > 1:
                    neurons += len(own)
                    to_first = cosines[first, own].tolist()
                    found.append(group_of(group, own, to_first, half_space))
        return FoundGroups(largest_first(found, keep), len(found), neurons)

    def _heat_maps(self, chosen: Sequence[int]) -> tuple[list[tuple[int, ...]], list[Tensor]]:
        """Neurons to show, in order, and their cosines (m, m), of the chosen group of each layer."""
        places = torch.arange(len(chosen), device=self.x.device) * self.groups
        places += torch.tensor(chosen, device=self.x.device)
        cosines = self.pairs.cosines[places].float()  # (L, n, n)
        order = chains(cosines.abs(), self.pairs.alive[places])
        cosines = torch.take_along_dim(cosines, order[:, :, None], 1)
        cosines = torch.take_along_dim(cosines, order[:, None, :], 2).cpu()
        shown = []
        kept = []
        orders = order.tolist()
        for i, number in enumerate(self.pairs.live[places].tolist()):
            shown.append(tuple(orders[i][:number]))
            kept.append(cosines[i, :number, :number].clone())
        return shown, kept

    def _nearest(self, i: int, similar: Tensor, keep: int) -> tuple[SimilarPair, ...]:
        """The nearest of layer i's similar pairs, mask (L g, k) of all layers."""
        own = slice(i * self.groups, (i + 1) * self.groups)
        group, pair = similar[own].nonzero(as_tuple=True)
        q = self.pairs.q[own][group, pair]
        p = self.pairs.p[own][group, pair]
        near = torch.minimum(q, p) if self.measure.half_space else q
        order = near.argsort(stable=True)[:keep]
        angles = (2.0 * torch.atan2(q[order].sqrt(), p[order].sqrt())).rad2deg()
        columns = (
            group[order].tolist(),
            self.pairs.first[pair[order]].tolist(),
            self.pairs.second[pair[order]].tolist(),
            angles.tolist(),
        )
        return tuple(SimilarPair(*pair) for pair in zip(*columns, strict=True))
