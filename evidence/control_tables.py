"""Tables of the controls: what uniformity gains, where, and what wider grids and early logs say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean, median

from evidence.comparisons import Comparison, Result, compare, setting_title
from evidence.methods import METHODS
from evidence.statistics import Correlation, signed_rank
from evidence.tables import (
    CONDITIONS,
    UNTRAINED,
    change_cell,
    edge_marks,
    error_cell,
    markdown,
    of_method,
    titles_of,
)
from evidence.uniformity import (
    CLEAR,
    PENALTIES,
    Beyond,
    before_widening,
    beyond_controls,
    by_setting,
    early_and_gain,
)

SPREADING = ("direction", "decoupled")
"""Controls that spread neurons and make none longer."""


def uniformity_table(results: Sequence[Result]) -> str:
    """A row a penalty: in how many settings it gains, beyond what, and by how much."""
    comparisons = compare(results)
    found = beyond_controls(results)
    head = ["method", "settings", "gain over weight decay", "worse", "gain over all controls"]
    head += ["cost", "beyond the random direction", "p", "beyond growth alone", "p"]
    rows: list[list[object]] = []
    for name in (*PENALTIES, *SPREADING):
        own = [one for one in found if one.method == name]
        if name in SPREADING:
            own = beyond_controls(results, [name])
        if not own:
            continue
        verdicts = Counter(one.verdict for one in of_method(comparisons, name))
        beyond = Counter(one.verdict for one in own)
        row: list[object] = [METHODS[name].title, len(own), verdicts["gain"], verdicts["worse"]]
        row += ["", ""] if name in SPREADING else [beyond["gain"], beyond["cost"]]
        for rival in ("random", "length"):
            differences = [one.changes[rival].mean for one in own]
            row += [f"{median(differences):+.2f}", f"{signed_rank(differences):.1g}"]
        rows.append(row)
    told = (
        "Beyond: median over settings of the paired difference in points, and p of a signed-rank "
        "test (Wilcoxon, two-sided, uncorrected)."
    )
    return f"{markdown(head, rows)}\n\n{told}"


def controls_by_condition(results: Sequence[Result]) -> str:
    """What each penalty gains beyond the controls, in settings that have something in common."""
    found = [one for one in beyond_controls(results) if _trains(one)]
    head = ["where", "settings", *titles_of(PENALTIES), "random direction", "growth alone"]
    groups = {"weight decay alone trains": found}
    for title, holds in CONDITIONS.items():
        groups[title] = [one for one in found if holds(one.result["asked"]["setting"])]
    rows: list[list[object]] = []
    comparisons = compare(results)
    for title, group in groups.items():
        settings = {one.setting for one in group}
        if not settings:
            continue
        row: list[object] = [title, len(settings)]
        for name in PENALTIES:
            row.append(_beyond_cell([one for one in group if one.method == name]))
        for name in ("random", "length"):
            own = [one for one in of_method(comparisons, name) if one.setting in settings]
            row.append(f"{median(one.paired.mean for one in own):+.2f}")
        rows.append(row)
    told = (
        "Of a penalty: settings in which it gains over weight decay, the random direction and growth "
        "alone; median difference from the better of the two controls. Of a control: median "
        f"difference from weight decay. Settings in which weight decay alone trains (error below "
        f"{UNTRAINED:g} %)."
    )
    return f"{markdown(head, rows)}\n\n{told}"


def _trains(one: Beyond) -> bool:
    return mean(one.result["test_error"]) - one.changes["decay"].mean < UNTRAINED


def _beyond_cell(own: Sequence[Beyond]) -> str:
    gains = sum(one.verdict == "gain" for one in own)
    rest = [max(one.changes["random"].mean, one.changes["length"].mean) for one in own]
    return f"{gains}, {median(rest):+.2f}" if own else ""


def controls_by_setting(results: Sequence[Result]) -> str:
    """Weight decay's error; differences from it; and what half-space MHE has beyond controls."""
    names = ("half_mhe_2", "random", "length", *SPREADING)
    head = ["setting", "weight decay only", *titles_of(names), "MHE beyond random"]
    head += ["MHE beyond growth", "uniformity gains with"]
    comparisons = {(one.setting, one.method): one for one in compare(results)}
    beyond: dict[str, list[Beyond]] = {}
    for one in beyond_controls(results):
        beyond.setdefault(one.setting, []).append(one)
    rows = []
    for own in by_setting(results):
        base = own.get("decay")
        if base is None:
            continue
        setting = setting_title(base)
        row = [setting, error_cell(base) + edge_marks(base)]
        row += [change_cell(comparisons.get((setting, name))) for name in names]
        row += _beyond_cells(beyond.get(setting, []))
        rows.append(row)
    return markdown(head, rows)


def _beyond_cells(own: Sequence[Beyond]) -> list[str]:
    """Half-space MHE beyond both controls, and the penalties that gain over all."""
    cells = ["", ""]
    for one in own:
        if one.method == "half_mhe_2":
            changes = [one.changes[rival] for rival in ("random", "length")]
            cells = [f"{change.mean:+.2f} ({change.error:.2f})" for change in changes]
    gains = [METHODS[one.method].title for one in own if one.verdict == "gain"]
    return [*cells, ", ".join(gains)]


def clear_gains_table(results: Sequence[Result]) -> str:
    """The settings in which a penalty is clearly lower than all controls and orthogonality."""
    head = ["setting", "method", "error", "weight decay", "random direction", "growth alone"]
    head += ["orthogonality"]
    rows = []
    for one in beyond_controls(results):
        if one.is_clear:
            row = [one.setting, METHODS[one.method].title, error_cell(one.result)]
            for rival in ("decay", "random", "length", "orthogonality"):
                change = one.changes.get(rival)
                row.append("" if change is None else f"{change.mean:+.2f} ({change.error:.2f})")
            rows.append(row)
    if not rows:
        return f"**In no setting** is a penalty lower than all rivals by {CLEAR:g} standard errors."
    told = f"Paired differences in points (standard error), each beyond {CLEAR:g} standard errors."
    return f"{markdown(head, rows)}\n\n{told}"


def widening_table(results: Sequence[Result]) -> str:
    """What wider grids changed: choices on edges, trials, and verdicts against weight decay."""
    before = _verdicts(compare(before_widening(results)))
    after = _verdicts(compare(results))
    head = ["method", "cells", "on an edge of the first sixteen", "at the end of an axis"]
    head += ["trials: median", "most", "another choice", "another verdict"]
    rows: list[list[object]] = []
    for name, method in METHODS.items():
        own = [one for one in results if one["asked"]["method"]["name"] == name]
        if not own:
            continue
        trials = [len(one["trials"]) for one in own]
        first = [one.get("first", one) for one in own]
        row: list[object] = [method.title, len(own)]
        row.append(sum(len(one["trials"]) > 16 for one in own))
        row.append(sum(bool(one["edges"]) for one in own))
        row += [f"{median(trials):g}", max(trials)]
        row.append(sum(one is not other for one, other in zip(own, first, strict=True)))
        row.append(_changed(name, before, after))
        rows.append(row)
    return markdown(head, rows)


Verdicts = Mapping[tuple[str, str], str]


def _verdicts(comparisons: Sequence[Comparison]) -> Verdicts:
    return {(one.method, one.setting): one.verdict for one in comparisons}


def _changed(name: str, before: Verdicts, after: Verdicts) -> str:
    """How many verdicts of a method are others, and which."""
    changes = Counter(
        f"{before[key]} → {after[key]}"
        for key in after
        if key[0] == name and before[key] != after[key]
    )
    if not changes:
        return "0"
    told = ", ".join(f"{count} {change}" for change, count in sorted(changes.items()))
    return f"{changes.total()}: {told}"


def early_table(results: Sequence[Result]) -> str:
    """Rank correlations of what is seen early with the gain; the first row is the test."""
    head = ["seen at a tenth of the training", "gain over", "cells", "Spearman's rho"]
    head.append("95 % bootstrap interval")
    asked: list[tuple[str, str, Correlation]] = []
    for x, title in (
        ("product", "(ratio − 1) × gradient share"),
        ("ratio", "ratio"),
        ("share", "gradient share"),
        ("without", "ratio of weight decay alone"),
    ):
        for rival, over in (("decay", "weight decay only"), ("random", "the random direction")):
            asked.append((title, over, early_and_gain(results, x, rival)))
    trained = early_and_gain(results, below=UNTRAINED)
    asked.append(("the product, where weight decay trains", "weight decay only", trained))
    trained = early_and_gain(results, rival="random", below=UNTRAINED)
    asked.append(("the product, where weight decay trains", "the random direction", trained))
    rows: list[list[object]] = []
    for title, over, found in asked:
        between = f"{found.low:+.2f} to {found.high:+.2f}"
        rows.append([title, over, found.count, f"{found.rho:+.2f}", between])
    return markdown(head, rows)
