"""Two reports on the same network at different times: what moved."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hsu._core import unit_rows, with_float64
from lightning_hsu._neurons.candidates import NeuronSet
from lightning_hsu._neurons.how import Neurons
from lightning_hsu._neurons.patterns import Patterns
from lightning_hsu._neurons.select import Head
from lightning_hsu.measures import Measure
from lightning_hsu.report.build import (
    FoundTargets,
    Progress,
    Report,
    Source,
    find_targets,
    look_at_all,
)
from lightning_hsu.report.data import ComparisonData, LayerComparison
from lightning_hsu.report.tables import comparison_table, plain


@dataclass(frozen=True, eq=False)
class Comparison(ComparisonData):
    """What moved between two networks; print it, or write it as JSON.

    Args:
        before: The report on the first.
        after: The report on the second.
        layers: The layers that both have, in the order of the second.
        only_before: Names of layers that only the first has.
        only_after: Names of layers that only the second has.
    """

    before: Report
    after: Report

    def __str__(self) -> str:
        """The table, in plain text."""
        return plain(comparison_table(self))


def compare(
    before: Source,
    after: Source,
    measure: Measure | None = None,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    head: Head = "auto",
    neurons: Neurons = None,
    similar_above: float = 0.95,
    key: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two networks, or one network at two times, layer by layer.

    Layers are matched by name, and neurons by index. Both are measured in the same space: a layer
    that both networks have counts as the class head only if it is the head of both. So the last
    layer of a network stored without its head, for example, does not count as one.

    Args:
        before: The first network: a model, a state dict or a file.
        after: The second.
        measure: How to measure; None is the half-space Riesz energy with s = 2.
        include: Patterns of layer names to take, shell style; None takes all.
        exclude: Patterns of layer names to leave out.
        head: The class head: "auto" is what a model declares, else a guess by names and order; a
            name or a list of names are these layers; None is no head.
        neurons: How weights of both hold neurons, as for :func:`~lightning_hsu.report.report`.
        similar_above: Cosine at or above which two neurons are near-duplicates, in (0, 1).
        key: Where in a file the state dict is; None finds it.
        progress: Called with the layer's name and the fraction of the work that is done.

    Raises:
        ValueError: if the two have no layer of the same name, or as for
            :func:`~lightning_hsu.report.report`.

    Example:
        >>> from torch import nn
        >>> before, after = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))
        >>> _ = after.load_state_dict(before.state_dict())
        >>> round(compare(before, after).layers[0].moved, 3)
        0.0
    """
    first = find_targets(before, include, exclude, head, key, neurons)
    second = find_targets(after, include, exclude, head, key, neurons)
    first, second = _in_space_of(first, second), _in_space_of(second, first)
    earlier = look_at_all(first, measure, similar_above, progress=_half(progress, 0))
    later = look_at_all(second, measure, similar_above, progress=_half(progress, 1))
    layers = _matched(earlier, later, first, second)
    if not layers:
        names_before = ", ".join(_names(earlier)[:5])
        names_after = ", ".join(_names(later)[:5])
        raise ValueError(
            f"no layer has the same name in both: {names_before}, ... and {names_after}, ..."
        )
    only_before = _only_in(earlier, later)
    only_after = _only_in(later, earlier)
    return Comparison(earlier, later, tuple(layers), only_before, only_after)


def _half(progress: Progress | None, i: int) -> Progress | None:
    """The progress function of the i-th of two reports, which together go from 0 to 1."""
    if progress is None:
        return None

    def half(name: str, part: float) -> None:
        progress(name, (i + part) / 2)

    return half


def _in_space_of(found: FoundTargets, other: FoundTargets) -> FoundTargets:
    """The neurons of a network, in the same space as layers of the same name in another network."""
    others = {target.name: target for target in other.targets}
    targets = []
    for target in found.targets:
        if target.name in others:
            target = replace(target, head=_full_space(target, others[target.name]))
        targets.append(target)
    return found._replace(targets=targets)


def _full_space(one: NeuronSet, other: NeuronSet) -> bool:
    """Whether to measure a layer in full space: if it is the head of both, or has two neurons."""
    return (one.head and other.head) or 2 in (one.shape[1], other.shape[1])


def _matched(
    earlier: Report, later: Report, first: FoundTargets, second: FoundTargets
) -> list[LayerComparison]:
    """The layers that both networks have, in the order of the second."""
    before = {}
    for layer, target in zip(earlier.layers, first.targets, strict=True):
        before[layer.name] = (layer, target)
    matched = []
    for layer, target in zip(later.layers, second.targets, strict=True):
        if layer.name in before:
            layer_before, target_before = before[layer.name]
            moved = _moved(target_before.neurons(), target.neurons())
            matched.append(LayerComparison(layer_before, layer, moved))
    return matched


def _only_in(found: Report, other: Report) -> tuple[str, ...]:
    """Names of the layers that the other report does not have."""
    others = set(_names(other))
    return tuple(name for name in _names(found) if name not in others)


def _names(found: Report) -> list[str]:
    return [layer.name for layer in found.layers]


@torch.no_grad()
def _moved(before: Tensor, after: Tensor) -> float:
    """Median angle in degrees between neurons of the same index, both sets (groups, n, d)."""
    if before.shape != after.shape:
        return math.nan
    x, x_inverse = unit_rows(with_float64(before.cpu()).double())
    y, y_inverse = unit_rows(with_float64(after.cpu()).double())
    live = ((x_inverse > 0) & (y_inverse > 0)).squeeze(-1)  # (groups, n)
    if not bool(live.any()):
        return math.nan
    difference = torch.linalg.vector_norm(x - y, dim=-1)[live]
    total = torch.linalg.vector_norm(x + y, dim=-1)[live]
    angles = 2.0 * torch.atan2(difference, total)
    return float(angles.rad2deg().median())
