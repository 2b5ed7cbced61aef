"""Tables of the cells that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from evidence.comparisons import (
    FAILS,
    LEVEL,
    TITLES,
    UNTRAINED,
    Comparison,
    Result,
    failing,
    hypothesis,
    mean_ratio,
)
from evidence.methods import METHODS
from evidence.statistics import Paired, holm, paired, standard_error

CONDITIONS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "initial scale 0.03": lambda one: one["scale"] == 0.03,
    "initial scale 0.1": lambda one: one["scale"] == 0.1,
    "initial scale 0.3": lambda one: one["scale"] == 0.3,
    "PyTorch's initial scale": lambda one: one["scale"] == 1.0,
    "four hidden layers": lambda one: one["network"] == "plain" and one["depth"] == 4,
    "convolutions": lambda one: one["network"] == "convolutions",
    "convolutions with batch norm": lambda one: one["network"] == "batch norm",
    "AdamW": lambda one: one["optimizer"] == "adamw",
    "20 % wrong labels": lambda one: one["noise"] > 0,
    "long-tailed classes": lambda one: one["imbalance"] > 1,
    "5000 images": lambda one: one["images"] == 5000,
    "long training": lambda one: (
        (one["data"], one["epochs"]) in (("fashion-mnist", 100), ("mnist1d", 30))
    ),
}
"""Settings that have something in common; one setting may be in several."""

RIVALS = (
    ("half_mhe_2", "orthogonality"),
    ("mgd", "orthogonality"),
    ("mgd", "half_mhe_2"),
    ("half_mhe_2", "random"),
    ("half_mhe_2", "length"),
    ("half_mhe_2", "direction"),
    ("half_mhe_2", "decoupled"),
    ("decoupled", "random"),
)
"""Compared with each other, too, and not only with weight decay."""


def everywhere(comparisons: Sequence[Comparison]) -> list[str]:
    """Methods that are compared with weight decay in most settings."""
    count = Counter(one.method for one in comparisons)
    most = max(count.values(), default=0)
    return [name for name in METHODS if count[name] > most / 2]


def summary(comparisons: Sequence[Comparison]) -> str:
    """In how many settings each method helps."""
    head = ["method", "settings", "gain", "null", "worse", "median", "best", "worst", "failures"]
    rows: list[list[object]] = []
    for name in METHODS:
        own = of_method(comparisons, name)
        if not own:
            continue
        verdicts = [one.verdict for one in own]
        change = [one.paired.mean for one in own]
        row: list[object] = [METHODS[name].title, len(own)]
        row += [verdicts.count("gain"), verdicts.count("null"), verdicts.count("worse")]
        row += [f"{median(change):+.2f}", f"{min(change):+.2f}", f"{max(change):+.2f}"]
        row.append(sum(one.failed for one in own))
        rows.append(row)
    failures = (
        f"Failures: a seed with {FAILS}; or worse than weight decay by two standard errors "
        "(uncorrected)."
    )
    return f"{markdown(head, rows)}\n\n{failures}"


def of_method(comparisons: Sequence[Comparison], name: str) -> list[Comparison]:
    """The comparisons of one method."""
    return [one for one in comparisons if one.method == name]


def conditions_table(comparisons: Sequence[Comparison]) -> str:
    """Gains, nulls, losses and median change of each method under each condition."""
    methods = everywhere(comparisons)
    rows: list[list[object]] = []
    for name, group in _groups(comparisons).items():
        if group:
            settings = {one.setting for one in group}
            tallies = [_tally(of_method(group, method)) for method in methods]
            rows.append([name, len(settings), *tallies])
    head = ["where", "settings", *titles_of(methods)]
    told = (
        "Gains–nulls–losses, and the median change of the test error in points. Of settings in "
        f"which weight decay alone trains (test error below {UNTRAINED:g} %), but the last row."
    )
    return f"{markdown(head, rows)}\n\n{told}"


def _groups(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """The comparisons under each condition: those that train, parts of these, and the others."""
    trained = _trained(comparisons)
    groups = {"weight decay alone trains": trained}
    for name, holds in CONDITIONS.items():
        groups[name] = [one for one in trained if holds(one.result["asked"]["setting"])]
    groups["weight decay alone hardly trains"] = [one for one in comparisons if one not in trained]
    return groups


def titles_of(methods: Sequence[str]) -> list[str]:
    """What tables call some methods."""
    return [METHODS[name].title for name in methods]


def _tally(own: Sequence[Comparison]) -> str:
    if not own:
        return ""
    verdicts = [one.verdict for one in own]
    counts = "–".join(str(verdicts.count(kind)) for kind in ("gain", "null", "worse"))
    return f"{counts}, {median(one.paired.mean for one in own):+.2f}"


def rivals_table(comparisons: Sequence[Comparison]) -> str:
    """Methods against each other, each tuned by itself; p corrected for the settings."""
    head = ["method", "against", "settings", "better", "worse", "median difference"]
    methods = everywhere(comparisons)
    rows: list[list[object]] = []
    for name, rival in RIVALS:
        changes = [change for _, _, change in against(comparisons, name, rival)]
        if name not in methods or rival not in methods:
            continue
        better = worse = 0
        for change, p in zip(changes, holm([one.p for one in changes]), strict=True):
            if p < LEVEL:
                better += change.mean < 0
                worse += change.mean > 0
        middle = f"{median(one.mean for one in changes):+.2f}"
        rows.append([*titles_of([name, rival]), len(changes), better, worse, middle])
    return markdown(head, rows)


def against(
    comparisons: Sequence[Comparison], name: str, rival: str
) -> list[tuple[Comparison, Comparison, Paired]]:
    """Two methods in the settings that have both, with the paired difference of the first."""
    rivals = {one.setting: one for one in of_method(comparisons, rival)}
    found = []
    for one in of_method(comparisons, name):
        if one.setting in rivals:
            other = rivals[one.setting]
            change = paired(one.result["test_error"], other.result["test_error"])
            found.append((one, other, change))
    return found


def settings_table(
    comparisons: Sequence[Comparison],
    methods: Sequence[str] | None = None,
    needed: str | None = None,
) -> str:
    """Weight decay's error and each method's difference, in settings that have ``needed``.

    Without ``methods`` those that are compared everywhere.
    """
    if methods is None:
        methods = everywhere(comparisons)
    head = ["setting", "ratio", "weight decay only", *titles_of(methods)]
    shown = comparisons if needed is None else of_method(comparisons, needed)
    rows = []
    for setting in dict.fromkeys(one.setting for one in shown):
        own = {one.method: one for one in comparisons if one.setting == setting}
        base = next(iter(own.values())).baseline
        row = [setting, f"{mean_ratio(base):.2f}", error_cell(base) + edge_marks(base)]
        row += [change_cell(own.get(name)) for name in methods]
        rows.append(row)
    return markdown(head, rows)


def family_table(comparisons: Sequence[Comparison]) -> str:
    """A row a method, a column a setting in which all methods were compared."""
    places = list(dict.fromkeys(one.setting for one in of_method(comparisons, "mhs")))
    bases = {one.setting: one.baseline for one in comparisons}
    rows = []
    if places:
        rows.append(["weight decay only", *(error_cell(bases[place]) for place in places)])
    for name in METHODS:
        own = {one.setting: one for one in of_method(comparisons, name)}
        if not own.keys().isdisjoint(places):
            rows.append([METHODS[name].title, *(change_cell(own.get(place)) for place in places)])
    return markdown(["method", *places], rows)


def hypothesis_table(comparisons: Sequence[Comparison]) -> str:
    """Rank correlations; the first row is the one that the protocol of the first run names."""
    head = ["method", "ratio of weight decay alone", "gain", "settings", "Spearman's rho"]
    head.append("95 % bootstrap interval")
    trained = _trained(comparisons)
    asked = [
        ("half_mhe_2", "ratio_after", False, "", comparisons),
        ("half_mhe_2", "ratio_after", True, "", comparisons),
        ("half_mhe_2", "ratio_before", False, "", comparisons),
        ("mgd", "ratio_after", False, "", comparisons),
        ("orthogonality", "ratio_after", False, "", comparisons),
    ]
    for data, title in TITLES.items():
        own = [one for one in comparisons if one.result["asked"]["setting"]["data"] == data]
        asked.append(("half_mhe_2", "ratio_after", False, f", {title} only", own))
    for relative in (False, True):
        asked.append(("half_mhe_2", "ratio_after", relative, ", where that trains", trained))
    rows: list[list[object]] = []
    for method, ratio, relative, where, group in asked:
        if len(of_method(group, method)) < 5:
            continue
        found = hypothesis(group, method, ratio=ratio, relative=relative)
        when = "after training" if ratio == "ratio_after" else "before training"
        gain = "gain over weight decay's error" if relative else "gain in points"
        row: list[object] = [METHODS[method].title + where, f"ratio {when}", gain, found.count]
        row += [f"{found.rho:+.2f}", f"{found.low:+.2f} to {found.high:+.2f}"]
        rows.append(row)
    return markdown(head, rows)


def _trained(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Those of settings in which weight decay alone trains."""
    return [one for one in comparisons if mean(one.baseline["test_error"]) < UNTRAINED]


def edges_table(results: Sequence[Result]) -> str:
    """How often the best trial takes the smallest or largest value that was tried."""
    head = ["method", "cells"]
    kinds = []
    for what in ("rate", "decay", "strength"):
        head += [f"{what}: smallest", "largest"]
        kinds += [f"smallest {what}", f"largest {what}"]
    rows: list[list[object]] = []
    for name, method in METHODS.items():
        own = [one["edges"] for one in results if one["asked"]["method"]["name"] == name]
        if own:
            row: list[object] = [method.title, len(own)]
            for kind in kinds:
                row.append(sum(kind in edges for edges in own) or "")
            rows.append(row)
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table, or a word where there is nothing to tell."""
    if not rows:
        return "Not run."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def difference_cell(change: Paired) -> str:
    """A paired difference and its standard error."""
    return f"{change.mean:+.2f} ({change.error:.2f})"


def error_cell(result: Result) -> str:
    """Mean test error and its standard error."""
    errors = result["test_error"]
    return f"{mean(errors):.2f} ({standard_error(errors):.2f})"


def change_cell(one: Comparison | None) -> str:
    """Difference, its standard error, wins, stars; nothing where the method was not run."""
    if one is None:
        return ""
    text = f"{one.paired.mean:+.2f} ({one.paired.error:.2f}), {one.paired.wins}/{one.paired.seeds}"
    if one.corrected < LEVEL:
        text += " **"
    elif one.paired.p < LEVEL:
        text += " *"
    count = failing(one.result, one.baseline)
    if count:
        text += f", {count} fail{'s' * (count == 1)}"
    return (text + edge_marks(one.result)).replace("*", "\\*")


def edge_marks(result: Result) -> str:
    """Which of learning rate, decay and strength lie on an edge of their grid, and on which."""
    arrows = {"largest": "↑", "smallest": "↓"}
    text = ""
    for edge in result["edges"]:
        end, what = edge.split()
        text += f" {what[0]}{arrows[end]}"
    return text
