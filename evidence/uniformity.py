"""What a penalty gains beyond controls that spread nothing: what uniformity itself gains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from evidence.comparisons import LEVEL, Result, key_of, setting_title
from evidence.methods import PENALTIES
from evidence.statistics import Correlation, Paired, clustered_rank_correlation, holm, paired

CONTROLS = ("decay", "random", "length")
"""Weight decay only, noise of equal length, and growth alone: none of them spreads neurons."""

CLEAR = 3.0
"""Standard errors of a clear gain."""


@dataclass(frozen=True)
class Beyond:
    """A penalty in one setting, against each of its rivals.

    Args:
        setting: In words.
        result: The penalty's.
        changes: Its paired differences from every other method there, by the rival's name.
        corrected: The largest p of the controls, corrected for all penalties and settings.
    """

    setting: str
    result: Result
    changes: Mapping[str, Paired]
    corrected: float

    @property
    def method(self) -> str:
        """The penalty's name."""
        return str(self.result["asked"]["method"]["name"])

    @property
    def verdict(self) -> str:
        """Gain or cost if it differs from all controls in one direction; else null."""
        if self.corrected >= LEVEL:
            return "null"
        return "gain" if self.changes["decay"].mean < 0 else "cost"

    @property
    def is_clear(self) -> bool:
        """Whether it is lower than the controls and than orthogonality by three standard errors."""
        rivals = [*CONTROLS]
        if self.method != "orthogonality":
            rivals.append("orthogonality")
        changes = [self.changes[rival] for rival in rivals if rival in self.changes]
        return len(changes) == len(rivals) and all(_is_clear(change) for change in changes)


def _is_clear(change: Paired) -> bool:
    return change.mean < -CLEAR * change.error


def beyond_controls(results: Iterable[Result], methods: Sequence[str] = PENALTIES) -> list[Beyond]:
    """Each of some methods in every setting that has it and all controls."""
    found, p = [], []
    for own in by_setting(results):
        if not set(CONTROLS) <= own.keys():
            continue
        for name in methods:
            if name in own:
                changes = _changes(own, name)
                found.append(Beyond(setting_title(own[name]), own[name], changes, 1.0))
                p.append(_of_all([changes[control] for control in CONTROLS]))
    corrected = holm(p)
    return [
        Beyond(one.setting, one.result, one.changes, value)
        for one, value in zip(found, corrected, strict=True)
    ]


def by_setting(results: Iterable[Result]) -> list[dict[str, Result]]:
    """Results by the names of their methods, setting by setting."""
    found: dict[str, dict[str, Result]] = {}
    for one in results:
        found.setdefault(key_of(one), {})[one["asked"]["method"]["name"]] = one
    return list(found.values())


def _changes(own: Mapping[str, Result], name: str) -> dict[str, Paired]:
    errors = own[name]["test_error"]
    return {
        rival: paired(errors, other["test_error"]) for rival, other in own.items() if rival != name
    }


def _of_all(changes: Sequence[Paired]) -> float:
    """The p of a difference from all of them in one direction: the largest; 1 if they disagree."""
    signs = {change.mean < 0 for change in changes}
    return max(change.p for change in changes) if len(signs) == 1 else 1.0


def early_and_gain(
    results: Iterable[Result],
    x: str = "product",
    rival: str = "decay",
    methods: Sequence[str] = PENALTIES,
    below: float = 100.0,
) -> Correlation:
    """Rank correlation of what a run shows early, and the part of the error that it takes away.

    Args:
        results: Of all cells.
        x: "product" of ratio - 1 and gradient share, "ratio", "share", or "without", the ratio of
            weight decay alone; each a mean over hidden layers.
        rival: Whose error the gain is a part of.
        methods: Whose cells are taken.
        below: Leave out settings in which weight decay alone has a larger error, in percent.

    Settings that lack one of the cells are left out.
    """
    clusters = []
    for own in by_setting(results):
        if not {"decay", rival, *methods} <= own.keys():
            continue
        if mean(own["decay"]["test_error"]) >= below:
            continue
        pairs = []
        for name in methods:
            if x == "without":
                seen = _seen(own["decay"], "ratio")
            else:
                seen = _seen(own[name], x)
            gain = 1.0 - mean(own[name]["test_error"]) / mean(own[rival]["test_error"])
            pairs.append((seen, gain))
        if np.isfinite(pairs).all():
            clusters.append(pairs)
    return clustered_rank_correlation(clusters)


def _seen(cell: Result, x: str) -> float:
    """The mean over hidden layers of what is seen early in a cell."""
    ratio = np.array(cell["early_ratio"], dtype=float)
    share = np.array(cell["early_share"], dtype=float)
    each = {"product": (ratio - 1.0) * share, "ratio": ratio, "share": share}[x]
    return float(each.mean())


def before_widening(results: Iterable[Result]) -> list[Result]:
    """The same cells as they would be with the best of the first sixteen trials."""
    return [{**one, **one["first"]} if "first" in one else one for one in results]
