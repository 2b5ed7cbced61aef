"""What a penalty gains beyond controls that have no aim: what uniformity itself gains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np

from evidence.comparisons import LEVEL, UNTRAINED, Result, key_of, setting_title
from evidence.methods import PENALTIES
from evidence.statistics import Correlation, Paired, clustered_rank_correlation, holm, paired

AIMLESS = ("decay", "random", "length")
"""Weight decay only, noise of equal length, and growth alone: none of them aims at uniformity."""

MATCHED = ("random", "length")
"""Of the controls those that are made of a penalty's own gradient, too, at its own trial."""

CLEAR = 3.0
"""Standard errors of a clear gain."""


@dataclass(frozen=True)
class Beyond:
    """A penalty in one setting, against each of its rivals.

    Args:
        setting: In words.
        result: The penalty's.
        changes: Its paired differences from every other method there, by the rival's name.
        matched: The same from the controls of its own gradient at its own trial, where it has them.
        corrected: The largest p of the controls, corrected for all penalties and settings.
        matched_corrected: The same with the matched controls beside weight decay; 1 without them.
    """

    setting: str
    result: Result
    changes: Mapping[str, Paired]
    matched: Mapping[str, Paired]
    corrected: float = 1.0
    matched_corrected: float = 1.0

    @property
    def method(self) -> str:
        """The penalty's name."""
        return str(self.result["asked"]["method"]["name"])

    @property
    def verdict(self) -> str:
        """Gain or cost if it differs from all controls in one direction; else null."""
        return self._verdict(self.corrected)

    @property
    def matched_verdict(self) -> str:
        """The same against weight decay and the matched controls."""
        return self._verdict(self.matched_corrected)

    def _verdict(self, corrected: float) -> str:
        if corrected >= LEVEL:
            return "null"
        return "gain" if self.changes["decay"].mean < 0 else "cost"

    @property
    def rest(self) -> float:
        """The mean difference from the best of the controls: a badly tuned one proves nothing."""
        return max(self.changes[control].mean for control in AIMLESS)

    @property
    def trains(self) -> bool:
        """Whether weight decay alone does."""
        return mean(self.result["test_error"]) - self.changes["decay"].mean < UNTRAINED

    @property
    def is_clear(self) -> bool:
        """Lower than the controls and orthogonality by three standard errors each; uncorrected."""
        rivals = [*AIMLESS]
        if self.method != "orthogonality":
            rivals.append("orthogonality")
        changes = [self.changes[rival] for rival in rivals if rival in self.changes]
        return len(changes) == len(rivals) and all(_is_clear(change) for change in changes)


def _is_clear(change: Paired) -> bool:
    return change.mean < -CLEAR * change.error


def beyond_controls(results: Iterable[Result], methods: Sequence[str] = PENALTIES) -> list[Beyond]:
    """Each of some methods in every setting that has it and all controls."""
    found, p, matched_p = [], [], []
    for own in by_setting(results):
        if not set(AIMLESS) <= own.keys():
            continue
        for name in methods:
            if name in own:
                changes = _changes(own, name)
                matched = _matched(own[name])
                found.append(Beyond(setting_title(own[name]), own[name], changes, matched))
                p.append(of_all([changes[control] for control in AIMLESS]))
                beside = [changes["decay"], *matched.values()]
                matched_p.append(of_all(beside) if matched else 1.0)
    corrected = []
    for one, value, other in zip(found, holm(p), holm(matched_p), strict=True):
        corrected.append(replace(one, corrected=value, matched_corrected=other))
    return corrected


def clear_gains(found: Iterable[Beyond]) -> list[Beyond]:
    """The clear ones, from PyTorch's own initial scale first, then the largest first."""
    return sorted(
        [one for one in found if one.is_clear],
        key=lambda one: (one.result["asked"]["setting"]["scale"] != 1.0, not one.trains, one.rest),
    )


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


def _matched(result: Result) -> dict[str, Paired]:
    """A penalty's paired differences from the controls of its own gradient."""
    found = {}
    for name, control in result.get("matched", {}).items():
        found[name] = paired(result["test_error"], control["test_error"])
    return found


def of_all(changes: Sequence[Paired]) -> float:
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

    Settings that lack one of the cells, or in which the rival makes no error, are left out.
    """
    clusters = []
    for own in by_setting(results):
        if not {"decay", rival, *methods} <= own.keys():
            continue
        if mean(own["decay"]["test_error"]) >= below:
            continue
        error = mean(own[rival]["test_error"])
        if error == 0.0:  # no part of nothing
            continue
        pairs = []
        for name in methods:
            if x == "without":
                seen = _seen(own["decay"], "ratio")
            else:
                seen = _seen(own[name], x)
            pairs.append((seen, 1.0 - mean(own[name]["test_error"]) / error))
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
