"""Tables of the cells that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from evidence.comparisons import LEVEL, TITLES, Comparison, Result, hypothesis, mean_ratio
from evidence.methods import CORE, METHODS
from evidence.statistics import Paired, holm, paired

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

UNTRAINED = 85.0
"""From this test error on, in percent, a network has hardly trained."""

RIVALS = (
    ("half_mhe_2", "orthogonality"),
    ("mgd", "orthogonality"),
    ("mgd", "half_mhe_2"),
    ("share", "half_mhe_2"),
)
"""Compared with each other, too, and not only with weight decay."""


def beside_decay(methods: Sequence[str]) -> list[str]:
    """Methods that are compared with weight decay."""
    return [name for name in methods if name != "decay"]


def summary(comparisons: Sequence[Comparison], least: int = 1) -> str:
    """A row a method, of those compared in so many settings at least: in how many of them it helps."""
    rows = []
    for name in METHODS:
        own = [one for one in comparisons if one.method == name]
        if len(own) >= least:
            verdicts = [one.verdict for one in own]
            change = [one.paired.mean for one in own]
            rows.append(
                [
                    METHODS[name].title,
                    len(own),
                    *(verdicts.count(kind) for kind in ("gain", "null", "worse")),
                    f"{median(change):+.2f}",
                    f"{min(change):+.2f}",
                    f"{max(change):+.2f}",
                    sum(one.failed for one in own),
                ]
            )
    head = ["method", "settings", "gain", "null", "worse", "median", "best", "worst", "failures"]
    return (
        markdown(head, rows)
        + "\n\nFailures: weights that are not finite, or worse by two standard errors (uncorrected)."
    )


def conditions_table(comparisons: Sequence[Comparison]) -> str:
    """A row a condition: gains, nulls and losses of each method over its settings, and the median change."""
    methods = [
        name for name in beside_decay(CORE) if any(one.method == name for one in comparisons)
    ]
    trained = _trained(comparisons)
    groups = {"weight decay alone trains": trained} | {
        name: [one for one in trained if holds(one.result["asked"]["setting"])]
        for name, holds in CONDITIONS.items()
    }
    groups["weight decay alone hardly trains"] = [one for one in comparisons if one not in trained]
    rows = [
        [
            name,
            len({one.setting for one in group}),
            *(_tally([one for one in group if one.method == m]) for m in methods),
        ]
        for name, group in groups.items()
        if group
    ]
    told = "Gains–nulls–losses, and the median change of the test error in points. Of settings in which weight decay alone "
    told += f"trains (test error below {UNTRAINED:g} %), but the last row."
    return (
        markdown(["where", "settings", *(METHODS[name].title for name in methods)], rows)
        + f"\n\n{told}"
    )


def _tally(own: Sequence[Comparison]) -> str:
    verdicts = [one.verdict for one in own]
    counts = "–".join(str(verdicts.count(kind)) for kind in ("gain", "null", "worse"))
    return f"{counts}, {median(one.paired.mean for one in own):+.2f}" if own else ""


def rivals_table(comparisons: Sequence[Comparison]) -> str:
    """Methods against each other, setting by setting, each tuned by itself; p corrected for the settings."""
    rows = []
    for name, rival in RIVALS:
        changes = [change for _, _, change in against(comparisons, name, rival)]
        if changes:
            corrected = holm([one.p for one in changes])
            better, worse = (
                sum(
                    p < LEVEL and sign * one.mean < 0
                    for one, p in zip(changes, corrected, strict=True)
                )
                for sign in (1, -1)
            )
            titles = (METHODS[name].title, METHODS[rival].title)
            rows.append(
                [
                    *titles,
                    len(changes),
                    better,
                    worse,
                    f"{median(one.mean for one in changes):+.2f}",
                ]
            )
    return markdown(["method", "against", "settings", "better", "worse", "median difference"], rows)


def against(
    comparisons: Sequence[Comparison], name: str, rival: str
) -> list[tuple[Comparison, Comparison, Paired]]:
    """Two methods in the settings that have both, and the first's paired difference from the second."""
    own = {(one.method, one.setting): one for one in comparisons}
    pairs = [
        (one, own[rival, one.setting])
        for one in comparisons
        if one.method == name and (rival, one.setting) in own
    ]
    return [(a, b, paired(a.result["test_error"], b.result["test_error"])) for a, b in pairs]


def settings_table(
    comparisons: Sequence[Comparison], methods: Sequence[str], needed: str | None = None
) -> str:
    """A row a setting: weight decay's error and each method's difference."""
    rows = []
    for setting in dict.fromkeys(
        one.setting for one in comparisons if needed in (None, one.method)
    ):
        own = {one.method: one for one in comparisons if one.setting == setting}
        base = next(iter(own.values())).baseline
        rows.append(
            [setting, f"{mean_ratio(base):.2f}", error_cell(base) + edge_marks(base)]
            + [change_cell(own[name]) if name in own else "" for name in methods]
        )
    return markdown(
        ["setting", "ratio", "weight decay only", *(METHODS[name].title for name in methods)], rows
    )


def family_table(comparisons: Sequence[Comparison]) -> str:
    """A row a method, a column a setting in which all methods were compared."""
    places = list(dict.fromkeys(one.setting for one in comparisons if one.method == "mhs"))
    own = {(one.method, one.setting): one for one in comparisons}
    rows = [
        [
            METHODS[name].title,
            *(change_cell(own[name, place]) if (name, place) in own else "" for place in places),
        ]
        for name in METHODS
        if any((name, place) in own for place in places)
    ]
    bases = {one.setting: one.baseline for one in comparisons}
    rows = (
        [["weight decay only", *(error_cell(bases[place]) for place in places)], *rows]
        if places
        else rows
    )
    return markdown(["method", *places], rows)


def share_table(comparisons: Sequence[Comparison]) -> str:
    """One value of Share for all settings, against the fixed coefficient tuned for each."""
    pairs = against(comparisons, "share", "half_mhe_2")
    if not pairs:
        return markdown([], [])
    rows = [
        [
            title,
            len(pairs),
            sum(one.verdict == "gain" for one in side),
            sum(one.failed for one in side),
            sum(bool(one.result["nonfinite"]) for one in side),
            f"{median(one.paired.mean for one in side):+.2f}",
        ]
        for title, side in (
            ("Share(0.05)", [a for a, _, _ in pairs]),
            ("best coefficient of the setting", [b for _, b, _ in pairs]),
        )
    ]
    head = ["coefficient", "settings", "gain", "failures", "of them not finite", "median change"]
    return markdown(head, rows)


def hypothesis_table(comparisons: Sequence[Comparison]) -> str:
    """Rank correlations; the first row is the one that the protocol names."""
    asked = [
        (method, "ratio_after", False, "", comparisons)
        for method in ("half_mhe_2", "mgd", "orthogonality")
    ]
    asked[1:1] = [
        ("half_mhe_2", "ratio_after", True, "", comparisons),
        ("half_mhe_2", "ratio_before", False, "", comparisons),
    ]
    for data, title in TITLES.items():
        own = [one for one in comparisons if one.result["asked"]["setting"]["data"] == data]
        asked.append(("half_mhe_2", "ratio_after", False, f", {title} only", own))
    asked += [
        ("half_mhe_2", "ratio_after", relative, ", where that trains", _trained(comparisons))
        for relative in (False, True)
    ]
    rows = []
    for method, ratio, relative, where, group in asked:
        if sum(one.method == method for one in group) >= 5:
            found = hypothesis(group, method, ratio=ratio, relative=relative)
            when = "after training" if ratio == "ratio_after" else "before training"
            gain = "gain over weight decay's error" if relative else "gain in points"
            interval = f"{found.low:+.2f} to {found.high:+.2f}"
            rows.append(
                [
                    METHODS[method].title + where,
                    f"ratio {when}",
                    gain,
                    found.count,
                    f"{found.rho:+.2f}",
                    interval,
                ]
            )
    head = [
        "method",
        "ratio of weight decay alone",
        "gain",
        "settings",
        "Spearman's rho",
        "95 % bootstrap interval",
    ]
    return markdown(head, rows)


def _trained(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Those of settings in which weight decay alone trains."""
    return [one for one in comparisons if mean(one.baseline["test_error"]) < UNTRAINED]


def edges_table(results: Sequence[Result]) -> str:
    """How often the best trial takes the smallest or largest value that was tried."""
    rows = []
    for name, method in METHODS.items():
        own = [one["edges"] for one in results if one["asked"]["method"]["name"] == name]
        kinds = [
            f"{end} {what}"
            for what in ("rate", "decay", "strength")
            for end in ("smallest", "largest")
        ]
        if own:
            rows.append(
                [method.title, len(own), *(sum(kind in one for one in own) or "" for kind in kinds)]
            )
    head = [
        "method",
        "cells",
        "rate: smallest",
        "largest",
        "decay: smallest",
        "largest",
        "strength: smallest",
        "largest",
    ]
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table, or a word where there is nothing to tell."""
    rows = list(rows)
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
        if rows
        else "Not run."
    )


def error_cell(result: Result) -> str:
    """Mean test error and its standard error."""
    errors = result["test_error"]
    return f"{mean(errors):.2f} ({stdev(errors) / len(errors) ** 0.5:.2f})"


def change_cell(one: Comparison) -> str:
    """Difference, its standard error, wins, stars."""
    star = " **" if one.corrected < LEVEL else " *" if one.paired.p < LEVEL else ""
    bad = f", {one.result['nonfinite']} not finite" if one.result["nonfinite"] else ""
    text = f"{one.paired.mean:+.2f} ({one.paired.error:.2f}), {one.paired.wins}/{one.paired.seeds}{star}{bad}"
    return (text + edge_marks(one.result)).replace("*", "\\*")


def edge_marks(result: Result) -> str:
    """Which of learning rate, decay and strength lie on an edge of their grid, and on which."""
    marks = [
        f"{what[0]}{'↑' if end == 'largest' else '↓'}"
        for end, what in map(str.split, result["edges"])
    ]
    return f" {' '.join(marks)}" if marks else ""
