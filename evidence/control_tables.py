"""Tables of the controls: what uniformity gains, where, and what wider grids and early logs say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

from evidence.comparisons import (
    FAILS,
    LEVEL,
    UNTRAINED,
    Comparison,
    Result,
    compare,
    failing,
    setting_title,
)
from evidence.methods import METHODS, PENALTIES
from evidence.statistics import Correlation, holm
from evidence.tables import (
    CONDITIONS,
    change_cell,
    difference_cell,
    edge_marks,
    error_cell,
    markdown,
    of_method,
    titles_of,
)
from evidence.uniformity import (
    CLEAR,
    MATCHED,
    Beyond,
    before_widening,
    beyond_controls,
    by_setting,
    clear_gains,
    early_and_gain,
)

SPREADING = ("direction", "decoupled")
"""Controls that spread neurons and make none longer."""


def uniformity_table(results: Sequence[Result]) -> str:
    """A row a penalty: in how many settings that have all controls it gains, beyond what, by how much."""
    comparisons = with_controls(results)
    head = ["method", "settings", "gain over weight decay", "worse", "gain over all controls"]
    head += ["worse than all", "median difference from the best of them", "failing seeds"]
    rows: list[list[object]] = []
    for name, own in _beyond_by_method(results).items():
        verdicts = Counter(one.verdict for one in of_method(comparisons, name))
        beyond = Counter(one.verdict for one in own)
        row: list[object] = [METHODS[name].title, len(own), verdicts["gain"], verdicts["worse"]]
        row += [beyond["gain"], beyond["cost"]]
        row.append(f"{median(one.rest for one in own):+.2f}")
        row.append(failing_seeds(comparisons, name))
        rows.append(row)
    told = (
        "Controls: weight decay only, a random direction as long as half-space MHE's gradient, and "
        "that gradient's growth alone. MHE's direction alone, and decoupled, spread neurons and make "
        "none longer. Gains over all controls are corrected for the three penalties together, and for "
        "these two each by itself. "
        f"Failing seeds have {FAILS}."
    )
    return f"{markdown(head, rows)}\n\n{told}"


def _beyond_by_method(results: Sequence[Result]) -> dict[str, list[Beyond]]:
    """The penalties, and the controls that spread neurons, in settings that have all controls."""
    found: dict[str, list[Beyond]] = {}
    for one in beyond_controls(results):
        found.setdefault(one.method, []).append(one)
    for name in SPREADING:
        own = beyond_controls(results, [name])
        if own:
            found[name] = own
    return found


def with_controls(results: Sequence[Result]) -> list[Comparison]:
    """The comparisons with weight decay in settings that have all controls."""
    settings = {one.setting for one in beyond_controls(results)}
    return [one for one in compare(results) if one.setting in settings]


def failing_seeds(comparisons: Sequence[Comparison], name: str) -> int:
    """Failing seeds of a method in all settings together."""
    return sum(failing(one.result, one.baseline) for one in of_method(comparisons, name))


def matched_table(results: Sequence[Result]) -> str:
    """A row a penalty: against controls of its own gradient, at its own trial."""
    head = ["method", "settings", "lower than the random direction", "higher", "median difference"]
    head += ["lower than growth alone", "higher", "median difference"]
    head += ["gain over weight decay and both", "worse than all"]
    rows: list[list[object]] = []
    for name, own in _beyond_by_method(results).items():
        both = [one for one in own if one.matched]
        if not both:
            continue
        row: list[object] = [METHODS[name].title, len(both)]
        for control in MATCHED:
            changes = [one.matched[control] for one in both]
            corrected = holm([change.p for change in changes])
            lower = higher = 0
            for change, p in zip(changes, corrected, strict=True):
                lower += p < LEVEL and change.mean < 0
                higher += p < LEVEL and change.mean > 0
            row += [lower, higher, f"{median(change.mean for change in changes):+.2f}"]
        verdicts = Counter(one.matched_verdict for one in both)
        rows.append([*row, verdicts["gain"], verdicts["cost"]])
    told = (
        "The random direction and the growth are those of the method's own gradient, at the learning "
        "rate, decay and coefficient that were chosen for it; nothing is tuned for them. Lower and "
        "higher: p < 0.05 after Holm's correction for the settings."
    )
    return f"{markdown(head, rows)}\n\n{told}"


def controls_by_condition(results: Sequence[Result]) -> str:
    """What each penalty gains beyond the controls, in settings that have something in common."""
    found = [one for one in beyond_controls(results) if one.trains]
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
            own = [one for one in group if one.method == name]
            gains = sum(one.verdict == "gain" for one in own)
            row.append(f"{gains}, {median(one.rest for one in own):+.2f}" if own else "")
        for name in MATCHED:
            alone = [one for one in of_method(comparisons, name) if one.setting in settings]
            row.append(f"{median(one.paired.mean for one in alone):+.2f}")
        rows.append(row)
    told = (
        "Of a penalty: settings in which it gains over weight decay, the random direction and growth "
        "alone; median difference from the best of the three. Of a control: median difference from "
        f"weight decay. Settings in which weight decay alone trains (error below {UNTRAINED:g} %)."
    )
    return f"{markdown(head, rows)}\n\n{told}"


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
            cells = [difference_cell(change) for change in changes]
    gains = [METHODS[one.method].title for one in own if one.verdict == "gain"]
    return [*cells, ", ".join(gains)]


def clear_gains_table(results: Sequence[Result]) -> str:
    """The settings in which a penalty is clearly lower than all controls and orthogonality."""
    head = ["setting", "method", "error", "weight decay", "random direction", "growth alone"]
    head += ["orthogonality", "its own random direction", "its own growth", "corrected"]
    rows = []
    for one in clear_gains(beyond_controls(results)):
        row = [one.setting, METHODS[one.method].title, error_cell(one.result)]
        changes = [one.changes.get(name) for name in ("decay", "random", "length", "orthogonality")]
        changes += [one.matched.get(control) for control in MATCHED]
        for change in changes:
            row.append("" if change is None else difference_cell(change))
        rows.append([*row, one.verdict])
    if not rows:
        return f"**In no setting** is a penalty lower than all rivals by {CLEAR:g} standard errors."
    told = (
        f"Paired differences in points (standard error), beyond {CLEAR:g} standard errors from weight "
        "decay, both controls and orthogonality. *Its own* controls are those of the method's own gradient, "
        "at its own trial. *Corrected*: whether it is a gain over weight decay and both controls after "
        "Holm's correction for all penalties and settings. PyTorch's own initial scale comes first."
    )
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
    changed = sum(after[key] != before[key] for key in after if key[0] in PENALTIES)
    total = sum(key[0] in PENALTIES for key in after)
    told = (
        f"Of {total} verdicts of MHE, MGD and orthogonality against weight decay {changed} are others "
        "than with the best of the first sixteen trials of both."
    )
    return f"{markdown(head, rows)}\n\n{told}"


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
