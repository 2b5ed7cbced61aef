"""The data of a comparison, separate from how it is found and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from lightning_hsu.report.data import (
    JsonData,
    LayerReport,
    ReportData,
    notes_list,
    plain_dict,
    reworded_notes,
    without_nan,
)
from lightning_hsu.report.drift import Change, Drift, change_of

Kind = TypeVar("Kind", bound="ComparisonData")


@dataclass(frozen=True, eq=False)
class Matching:
    """How well the neurons of a layer that are not matched by index have found each other.

    Dead neurons take no part. In half space opposite neurons are the same.

    Args:
        how: "assignment" is one to one with the largest sum of cosines; "mutual" matches neurons
            that are each other's nearest.
        before: How many neurons there are before.
        after: How many there are after.
        matched: How many have a match.
        agreeing: How many matches have a cosine of ``similar_above`` or more.
        mean: Mean cosine of the matches.
        median: Median cosine of the matches.
        random_cosine: What random directions would have for their mean: with "mutual" expected so,
            with "assignment" at most so (it is that of the nearest one). NaN in one dimension.
        random_angle: The same for the mean angle in degrees: expected so, or at least so.
    """

    how: Literal["assignment", "mutual"]
    before: int
    after: int
    matched: int
    agreeing: int
    mean: float
    median: float
    random_cosine: float
    random_angle: float

    @property
    def agreement(self) -> float:
        """Agreeing matches over the neurons of the smaller of the two, in [0, 1]."""
        return self.agreeing / min(self.before, self.after)


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """One layer before and after.

    Args:
        before: The earlier report on it.
        after: The later report on it.
        moved: Median angle between a neuron before and after, in degrees; NaN if the shapes differ.
            Of matched neurons it is that between the lines in half space.
        matched: For each neuron before, by index group * n + row, the index of its match after; -1
            for one without a match. None if neurons are matched by index.
        matching: How well they match; None if neurons are matched by index.
        ratio_errors: Standard errors of the ratios before and after; 0 for an exact one.
        moved_most: The largest angle between a neuron before and after, in degrees; NaN as for
            ``moved``.
    """

    before: LayerReport
    after: LayerReport
    moved: float
    matched: tuple[int, ...] | None = None
    matching: Matching | None = None
    ratio_errors: tuple[float, float] = (0.0, 0.0)
    moved_most: float = math.nan

    @property
    def ratio_error(self) -> float:
        """Standard error of the ratio's change; 0 if both are exact.

        It is that of two samples that know nothing of each other. Those of one layer have the same
        neurons, so the error may well be smaller.
        """
        return math.hypot(*self.ratio_errors)

    @property
    def ratio_change(self) -> Change:
        """Whether the ratio "rose", "fell", is the "same", or "unknown" without both ratios.

        Of samples it is the same if it has changed by at most three standard errors.
        """
        return change_of(self.before.ratio, self.after.ratio, self.ratio_error)


@dataclass(frozen=True, eq=False)
class ComparisonData(JsonData):
    """The fields of a comparison; :class:`Comparison` describes them."""

    before: ReportData
    after: ReportData
    layers: tuple[LayerComparison, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    prefixes: tuple[str, str] = ("", "")
    drift: Drift | None = None
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def matched(self) -> str:
        """How names were matched, in words; "" if they are the same."""
        of_which = []
        for prefix, which in zip(self.prefixes, ("first", "second"), strict=True):
            if prefix:
                of_which.append(f"'{prefix}' of the {which}")
        if not of_which:
            return ""
        return f"names matched without the prefix {' and '.join(of_which)}"

    def reworded(self: Kind, change: Callable[[str], str]) -> Kind:
        """The comparison with other words in all notes and reasons, as of :class:`ReportData`."""
        return replace(
            self,
            before=self.before.reworded(change),
            after=self.after.reworded(change),
            notes=reworded_notes(self.notes, change),
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as lists, numbers, strings and None (for NaN)."""
        drift = None
        if self.drift is not None:
            drift = plain_dict(asdict(self.drift))
        matching = {}
        near_duplicates = {}
        changes = {}
        for one in self.layers:
            near_duplicates[one.after.name] = {
                "before": _groups_dict(one.before),
                "after": _groups_dict(one.after),
            }
            changes[one.after.name] = {
                "change": one.ratio_change,
                "standard_error": without_nan(one.ratio_error),
            }
            if one.matching is not None and one.matched is not None:
                numbers = plain_dict(asdict(one.matching)) | {"agreement": one.matching.agreement}
                matching[one.after.name] = numbers | {"indices": list(one.matched)}
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "near_duplicates": near_duplicates,
            "ratio_changes": changes,
            "moved": {one.after.name: without_nan(one.moved) for one in self.layers},
            "moved_most": {one.after.name: without_nan(one.moved_most) for one in self.layers},
            "only_before": list(self.only_before),
            "only_after": list(self.only_after),
            "prefixes": list(self.prefixes),
            "drift": drift,
            "matching": matching,
            "notes": notes_list(self.notes),
        }


def _groups_dict(layer: LayerReport) -> dict[str, int]:
    """How many near-duplicate neurons a layer has, and in how many groups, in JSON's own types."""
    return {"neurons": layer.grouped, "groups": layer.group_count}
