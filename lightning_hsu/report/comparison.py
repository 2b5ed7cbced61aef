"""Two reports on the same network at different times: what moved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lightning_hsu._monitor.render import shorten
from lightning_hsu._monitor.text import counted
from lightning_hsu._neurons.candidates import NeuronSet
from lightning_hsu._neurons.how import Neurons
from lightning_hsu._neurons.names import dictionaries
from lightning_hsu._neurons.patterns import Patterns
from lightning_hsu._neurons.select import Head
from lightning_hsu.measures import Measure
from lightning_hsu.reference import random_level
from lightning_hsu.report.build import (
    FoundTargets,
    Report,
    Source,
    find_targets,
    look_at_all,
)
from lightning_hsu.report.comparison_data import ComparisonData, LayerComparison
from lightning_hsu.report.comparison_page import comparison_page
from lightning_hsu.report.comparison_table import comparison_table
from lightning_hsu.report.data import LayerReport
from lightning_hsu.report.drift import LayerMove, drift_of
from lightning_hsu.report.looks import SAMPLE_ABOVE, Progress
from lightning_hsu.report.matching import Followed, Match, Matcher
from lightning_hsu.report.tables import plain, short, table_html

_NAMED = 5  # names of each network in an error
_LONGEST_NAME = 40
_DEEPEST = 6  # parts of a name, of which the first ones may be a prefix


@dataclass(frozen=True, eq=False)
class Comparison(ComparisonData):
    """What moved between two networks; print it, or write it as JSON.

    Args:
        before: The report on the first.
        after: The report on the second.
        layers: The layers that both have, in the order of the second.
        only_before: Names of layers that only the first has.
        only_after: Names of layers that only the second has.
        prefixes: What most names of the first and of the second begin with and were matched without.
        drift: How far the network has drifted, over all layers.
        notes: Names of layers with what one should know of how their neurons are matched.
    """

    before: Report
    after: Report

    def __str__(self) -> str:
        """The table, in plain text."""
        return plain(comparison_table(self))

    def __repr__(self) -> str:
        """What was compared, in one line."""
        names = f"{short(self.before.source)} and {short(self.after.source)}"
        return f"<Comparison of {names}: {counted(len(self.layers), 'layer')} in both>"

    def _repr_html_(self) -> str:
        """The table, for a notebook."""
        title = f"{self.before.source} -> {self.after.source}"
        return table_html(comparison_table(self), title)

    def to_html(self) -> str:
        """The comparison as one page: no script, nothing to load."""
        return comparison_page(self)

    def write_html(self, path: str | Path) -> None:
        """Write :meth:`to_html` to a file."""
        Path(path).write_text(self.to_html(), encoding="utf-8")


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
    key: str | tuple[str | None, str | None] | None = None,
    base: str | Path | None = None,
    sample_above: int | None = SAMPLE_ABOVE,
    match: Match = "auto",
    progress: Progress | None = None,
) -> Comparison:
    """Compare two networks, or one network at two times, layer by layer.

    Layers are matched by name, and neurons by index, but those of dictionaries and codebooks one to
    one so that the sum of their cosines is largest: the order of a dictionary's features means
    nothing. That takes scipy (``pip install lightning-hsu[hull]``). Of more than 8,192 neurons
    those are matched that are each other's nearest. Where most names of one network begin with the
    same parts, such as "model.", names are matched without them if more layers match so. Both are
    measured in the same space: a layer that both networks have counts as the class head only if it
    is the head of both. So the last layer of a network stored without its head, for example, does
    not count as one.

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
        key: Where in a file the state dict is; None finds it. Two of them are for the first network
            and for the second, such as ``("model", "ema")`` for the two sets of one file.
        base: Of an adapter of peft: the file or folder of its base. None is the one that the
            adapter names, else the other network, if that is a file or folder of whole weights.
        sample_above: As for :func:`~lightning_hsu.report.report`.
        match: How neurons are matched: "index", "assignment" (every layer as dictionaries are), or
            "auto", which is "index" for all layers but dictionaries and codebooks.
        progress: Called with the layer's name and the fraction of the work that is done.

    Raises:
        ValueError: if the two have no layer of the same name, or as for
            :func:`~lightning_hsu.report.report`.
        TypeError: if ``key`` is neither a name nor two.
        ModuleNotFoundError: for ``match="assignment"`` without scipy.

    Example:
        >>> from torch import nn
        >>> before, after = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))
        >>> _ = after.load_state_dict(before.state_dict())
        >>> round(compare(before, after).layers[0].moved, 3)
        0.0
        >>> shuffled = {"0.weight": -before[0].weight.detach()[[2, 0, 3, 1]]}
        >>> one = compare(before, shuffled, head=None, match="assignment").layers[0]
        >>> one.matched, one.matching.agreement
        ((1, 3, 0, 2), 1.0)
    """
    matcher = Matcher(match, similar_above)
    first_key, second_key = _keys(key)
    first = find_targets(before, include, exclude, head, first_key, neurons, base, after)
    second = find_targets(after, include, exclude, head, second_key, neurons, base, before)
    if first_key != second_key:
        first = _named_with(first, first_key)
        second = _named_with(second, second_key)
    prefixes = _prefixes(_names(first), _names(second))
    ours, theirs = _by_key(first, prefixes[0]), _by_key(second, prefixes[1])
    first, second = _in_one_space(first, second, ours, theirs)
    reports = []
    for i, targets in enumerate((first, second)):
        one = look_at_all(
            targets,
            measure,
            similar_above,
            progress=_half(progress, i),
            sample_above=sample_above,
        )
        reports.append(one)
    earlier, later = reports
    unordered = dictionaries(first.targets), dictionaries(second.targets)
    layers = []
    notes = []
    for name, j in theirs.items():
        if name in ours:
            i = ours[name]
            half_space = later.layers[j].measure.half_space
            earlier_set, later_set = first.targets[i], second.targets[j]
            is_dictionary = earlier_set.name in unordered[0] and later_set.name in unordered[1]
            followed = matcher.follow(
                earlier_set, later_set, half_space=half_space, is_dictionary=is_dictionary
            )
            layers.append(_compared(earlier.layers[i], later.layers[j], followed))
            if followed.note:
                notes.append((later_set.name, followed.note))
    if not layers:
        raise ValueError(
            f"no layer has the same name in both: {_few(_names(first))}, ... and "
            f"{_few(_names(second))}, ..."
        )
    moves = []
    for layer in layers:
        ratios = layer.before.ratio, layer.after.ratio
        move = LayerMove(
            layer.after.name, *ratios, layer.moved, layer.ratio_error, layer.moved_most
        )
        moves.append(move)
    return Comparison(
        before=earlier,
        after=later,
        layers=tuple(layers),
        only_before=_only_in(first, ours, theirs),
        only_after=_only_in(second, theirs, ours),
        prefixes=prefixes,
        drift=drift_of(moves),
        notes=tuple(notes),
    )


def _keys(key: str | tuple[str | None, str | None] | None) -> tuple[str | None, str | None]:
    """The keys of the first file and of the second."""
    if key is None or isinstance(key, str):
        return key, key
    if len(key) != 2 or not all(one is None or isinstance(one, str) for one in key):
        raise TypeError(
            f"key is a name in both files, or two: one in each, such as ('model', 'ema'); got {key!r}"
        )
    first, second = key
    return first, second


def _named_with(found: FoundTargets, key: str | None) -> FoundTargets:
    """What was found under a key of a file, named with it."""
    if key is None:
        return found
    return found._replace(source=f"{found.source}, {key}")


def _compared(before: LayerReport, after: LayerReport, one: Followed) -> LayerComparison:
    """A layer before and after, with what its neurons have become."""
    errors = _ratio_error(before), _ratio_error(after)
    return LayerComparison(
        before, after, one.moved, one.matched, one.matching, errors, one.farthest
    )


def _ratio_error(layer: LayerReport) -> float:
    """Standard error of a layer's ratio; 0 if it is exact, infinite or unknown."""
    numbers = layer.uniformity
    error = numbers.standard_error
    if not error > 0.0 or not math.isfinite(layer.ratio):
        return 0.0
    level = random_level(layer.measure, round(layer.live), numbers.dimension)
    ends = torch.tensor([numbers.energy - error, numbers.energy + error], dtype=torch.float64)
    ratios = layer.measure.ratio(ends, level)
    return float((ratios[1] - ratios[0]).abs()) / 2.0


def _prefixes(first: Sequence[str], second: Sequence[str]) -> tuple[str, str]:
    """What most names of one network and of the other begin with, so that most match without.

    Example:
        >>> _prefixes(["model.fc", "model.stem"], ["fc", "stem", "head"])
        ('model.', '')
        >>> _prefixes(["0", "1"], ["bert.0", "bert.1", "classifier"])
        ('', 'bert.')
        >>> _prefixes(["fc", "stem"], ["fc", "head"])
        ('', '')
    """
    best = ("", "")
    most = -1
    for start in _common_starts(first):
        bare = {name.removeprefix(start) for name in first}
        for other_start in _common_starts(second):
            matches = sum(name.removeprefix(other_start) in bare for name in second)
            if matches > most:
                best = (start, other_start)
                most = matches
    return best


def _common_starts(names: Sequence[str]) -> list[str]:
    """Dotted parts that most names begin with, the shortest first: none, "a.", "a.b." and so on.

    Not those without which two names would be the same.
    """
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")[:_DEEPEST]
        for depth in range(1, len(parts)):
            counts[".".join(parts[:depth]) + "."] += 1
    starts = [""]
    for start in sorted(counts, key=len):
        bare = {name.removeprefix(start) for name in names}
        if 2 * counts[start] > len(names) and len(bare) == len(names):
            starts.append(start)
    return starts


def _by_key(found: FoundTargets, prefix: str) -> dict[str, int]:
    """The places of a network's layers by their name without a prefix."""
    places = {}
    for i, target in enumerate(found.targets):
        places[target.name.removeprefix(prefix)] = i
    return places


def _half(progress: Progress | None, i: int) -> Progress | None:
    """The progress function of the i-th of two reports, which together go from 0 to 1."""
    if progress is None:
        return None

    def half(name: str, part: float) -> None:
        progress(name, (i + part) / 2)

    return half


def _in_one_space(
    first: FoundTargets, second: FoundTargets, ours: Mapping[str, int], theirs: Mapping[str, int]
) -> tuple[FoundTargets, FoundTargets]:
    """The neurons of two networks, with each layer that both have in the same space.

    Args:
        first: One network.
        second: The other.
        ours: The places of the layers of the first by their common names.
        theirs: Those of the second.
    """
    earlier = list(first.targets)
    later = list(second.targets)
    for name, j in theirs.items():
        if name in ours:
            i = ours[name]
            is_full = _full_space(earlier[i], later[j])
            earlier[i] = replace(earlier[i], head=is_full)
            later[j] = replace(later[j], head=is_full)
    return first._replace(targets=earlier), second._replace(targets=later)


def _full_space(one: NeuronSet, other: NeuronSet) -> bool:
    """Whether to measure a layer in full space: if it is the head of both, or has two neurons."""
    return (one.head and other.head) or 2 in (one.shape[1], other.shape[1])


def _only_in(
    found: FoundTargets, own: Mapping[str, int], other: Mapping[str, int]
) -> tuple[str, ...]:
    """Names of the layers that the other network does not have."""
    names = []
    for key, i in own.items():
        if key not in other:
            names.append(found.targets[i].name)
    return tuple(names)


def _names(found: FoundTargets) -> list[str]:
    return [target.name for target in found.targets]


def _few(names: Sequence[str]) -> str:
    """The first names, each not too long."""
    return ", ".join(shorten(name, _LONGEST_NAME) for name in names[:_NAMED])
