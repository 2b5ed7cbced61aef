"""The data of a report, separate from how it is found and how it is shown."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu._monitor.text import AS_RANDOM, Verdict, number, shape_of
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu.measures import Measure

Kind = TypeVar("Kind", bound="ReportData")

HEAT_MAP_SIZE = 128
"""The most neurons that a heat map shows."""


class SimilarPair(NamedTuple):
    """Two neurons that are nearly the same.

    Args:
        group: Their group; 0 if the layer has only one.
        first: Index of the first neuron within the group.
        second: Index of the second.
        angle: Angle between them in degrees; near 180 if only their lines are the same.
    """

    group: int
    first: int
    second: int
    angle: float


class SimilarGroup(NamedTuple):
    """Neurons that near-duplicate pairs connect: each is one of another, not of all (single linkage).

    Args:
        group: Their group of a convolution; 0 if the layer has only one.
        neurons: Their indices within that group, in ascending order.
        signs: 1 for each that points the same way as the first, -1 for each that points the
            opposite way, which only counts where opposite neurons count as the same.
        cosine: The smallest cosine to the first one, with these signs.
    """

    group: int
    neurons: tuple[int, ...]
    signs: tuple[int, ...]
    cosine: float


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What a report says about one layer.

    Args:
        uniformity: Its numbers.
        measure: How they were measured; in full space for a class head and for two neurons.
        similar: Number of near-duplicate pairs.
        opposite: How many of these pairs point opposite ways.
        pairs: The most similar of them, nearest first.
        dead: Number of neurons that do nothing: all zero, or shorter than 1e-4 of the layer's
            median length.
        dead_rows: Indices group * n + row of the first hundred dead neurons.
        angles: Number of pairs by angle, in 90 equal bins of [0, 180] degrees.
        singular_values: Singular values of the unit neurons (n, d), of all groups together, in
            descending order; empty if n and d are both above 4096.
        live: Live neurons per group, on average.
        shown: Neurons in the heat map, by index within their group: those closest to another one,
            each followed by the most similar neuron that is left.
        cosines: Cosines between the shown neurons, float32 (m, m).
        finding: The result in words.
        sampled: How many neurons of all groups the energy is estimated from; None if it is exact.
            Then the angles are those of at most 4,096 sampled neurons of each group.
        all_counted: Whether all near-duplicate pairs are counted; otherwise there may be more.
        groups: The largest groups of near-duplicates, the largest first.
        group_count: How many groups there are.
        grouped: How many neurons are in them.
        effective_rank: How many directions the neurons take, from 1 to the smaller of n and d:
            e to the entropy of their squared singular values, divided by the sum of these. The
            mean over groups; NaN without singular values. Roy and Vetterli (2007) take singular
            values that are not squared, which gives more.
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
    sampled: int | None = None
    all_counted: bool = True
    groups: tuple[SimilarGroup, ...] = ()
    group_count: int = 0
    grouped: int = 0
    effective_rank: float = math.nan

    @property
    def redundant(self) -> int:
        """How many neurons groups of near-duplicates have beside the first of each.

        In a group that is a chain not each of them is near the first.
        """
        return self.grouped - self.group_count

    @property
    def full_rank(self) -> int:
        """The largest effective rank that there can be: the smaller of n and d."""
        return min(self.uniformity.neurons, self.uniformity.dimension)

    @property
    def rank(self) -> str:
        """The effective rank and the largest there can be, such as "27.3 of 32"; "-" without."""
        if math.isnan(self.effective_rank):
            return "-"
        return f"{number(self.effective_rank, 1)} of {self.full_rank:,}"

    @property
    def in_groups(self) -> str:
        """Near-duplicate neurons and their groups, such as "12 in 4", with "+" if there may be more."""
        if not self.group_count:
            return "0" if self.all_counted else "0+"
        if not self.all_counted:
            return f"{self.grouped:,}+"
        return f"{self.grouped:,} in {self.group_count:,}"

    @property
    def random_rank(self) -> float:
        """The effective rank of as many random vectors: m e^(-m / 2M), the limit for large n and d.

        m is the smaller and M the larger of the live neurons of a group and the dimension.
        """
        smaller = min(self.live, self.uniformity.dimension)
        larger = max(self.live, self.uniformity.dimension)
        return smaller * math.exp(-0.5 * smaller / larger)

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.uniformity.name

    @property
    def shape(self) -> str:
        """Shape of its neurons in words, such as "4 groups of 64 x 576"."""
        numbers = self.uniformity
        return shape_of(numbers.groups, numbers.neurons, numbers.dimension, sampled=self.sampled)

    @property
    def sampling(self) -> str:
        """What is estimated, and how well; "" if nothing is."""
        if self.sampled is None:
            return ""
        searched = "all pairs were searched for near-duplicates"
        if not self.all_counted:
            searched = (
                "near-duplicates were searched by random hashes, so there may be more, "
                "and a smaller angle"
            )
        return f"{self.shape} sampled, energy +- {self.uniformity.standard_error:.1e}; {searched}"

    @property
    def ratio(self) -> float:
        """Energy over that of random neurons; NaN if it is not defined."""
        return self.uniformity.ratio

    @property
    def verdict(self) -> Verdict:
        """How the layer compares with random neurons: "above", "random", "below" or "unknown".

        It is what the finding says: "random" within 1 % of random, or within the range of all but
        1 in 1,000 random layers at either end.
        """
        if math.isnan(self.ratio):
            return "unknown"
        if self.finding.startswith(AS_RANDOM):
            return "random"
        return "above" if self.ratio > 1.0 else "below"

    @property
    def above(self) -> bool:
        """Whether the layer is more redundant than random neurons may well be."""
        return self.verdict == "above"

    @property
    def below(self) -> bool:
        """Whether the layer is more even than random neurons may well be."""
        return self.verdict == "below"

    @property
    def as_random(self) -> bool:
        """Whether random neurons may well have such a ratio, in however few dimensions."""
        return self.verdict == "random"

    @property
    def judged(self) -> bool:
        """Whether the layer can be judged: it has a ratio, and all its weights are finite."""
        return not math.isnan(self.ratio) and self.uniformity.nonfinite == 0

    def or_nan(self, cell: str) -> str:
        """A cell with a number about the neurons; "NaN" where some of them are NaN or infinite."""
        return "NaN" if self.uniformity.nonfinite > 0 else cell

    @property
    def full_space(self) -> bool:
        """Whether opposite neurons count as far apart, not as the same line."""
        return not self.measure.half_space

    @property
    def edges(self) -> tuple[float, float]:
        """Smallest and largest singular value of as many random unit vectors.

        These are the limits for large n and d, by Marchenko and Pastur.
        """
        root = math.sqrt(self.live / self.uniformity.dimension)
        return abs(1.0 - root), 1.0 + root


class JsonData(ABC):
    """Data that can be written as JSON."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All of it as lists, numbers, strings and None (for NaN)."""

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def write_json(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class ReportData(JsonData):
    """The fields of a report; :class:`Report` describes them."""

    source: str
    measure: Measure
    similar_above: float
    layers: tuple[LayerReport, ...]
    skips: tuple[Skip, ...]
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def worst_ratio(self) -> float:
        """The highest ratio of a layer, which may be infinite; NaN if no layer has a ratio."""
        return max(known_ratios(self.layers), default=math.nan)

    def reworded(self: Kind, change: Callable[[str], str]) -> Kind:
        """The report with other words in its notes and in the reasons why weights are left out.

        Args:
            change: Makes another text of one.
        """
        skips = []
        for skip in self.skips:
            skips.append(replace(skip, reason=change(skip.reason)))
        return replace(self, notes=reworded_notes(self.notes, change), skips=tuple(skips))

    def to_dict(self) -> dict[str, Any]:
        """All of it except the heat maps, as lists, numbers, strings and None (for NaN).

        A layer's ``score`` is 0 for random neurons and 1 at the bound that none can beat. Below 0 it
        has no bound, and tables do not show it.
        """
        return {
            "source": self.source,
            "measure": repr(self.measure),
            "similar_above": self.similar_above,
            "layers": [_layer_dict(layer) for layer in self.layers],
            "skipped": [_skip_dict(skip) for skip in self.skips],
            "notes": notes_list(self.notes),
        }


def known_ratios(layers: Sequence[LayerReport]) -> list[float]:
    """Ratios of the layers that have one."""
    return [layer.ratio for layer in layers if not math.isnan(layer.ratio)]


def _layer_dict(layer: LayerReport) -> dict[str, Any]:
    """A layer in JSON's own types."""
    numbers: dict[str, Any] = {}
    for name, value in asdict(layer.uniformity).items():
        numbers[name] = without_nan(value)
    return numbers | {
        "measure": repr(layer.measure),
        "similar": layer.similar,
        "opposite": layer.opposite,
        "pairs": [pair._asdict() for pair in layer.pairs],
        "groups_of_similar": [group._asdict() for group in layer.groups],
        "group_count": layer.group_count,
        "grouped": layer.grouped,
        "redundant": layer.redundant,
        "dead": layer.dead,
        "dead_rows": list(layer.dead_rows),
        "angles": list(layer.angles),
        "singular_values": [round(value, 6) for value in layer.singular_values],
        "edges": list(layer.edges),
        "effective_rank": without_nan(layer.effective_rank),
        "random_rank": layer.random_rank,
        "verdict": layer.verdict,
        "finding": layer.finding,
        "sampled": layer.sampled,
        "all_counted": layer.all_counted,
    }


def _skip_dict(skip: Skip) -> dict[str, Any]:
    """A weight that was left out, in JSON's own types."""
    return {"name": skip.name, "shape": list(skip.shape), "reason": skip.reason}


def reworded_notes(
    notes: Sequence[tuple[str, str]], change: Callable[[str], str]
) -> tuple[tuple[str, str], ...]:
    """Notes, each with the name of its layer, in other words."""
    found = []
    for name, note in notes:
        found.append((name, change(note)))
    return tuple(found)


def notes_list(notes: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Notes in JSON's own types."""
    return [{"name": name, "note": note} for name, note in notes]


def plain_dict(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass in JSON's own types."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, tuple):
            value = list(value)
        found[name] = without_nan(value)
    return found


def without_nan(value: Any) -> Any:
    """A value, or None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
