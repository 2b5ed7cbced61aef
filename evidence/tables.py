"""Tables and picture of the cells that are there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median, stdev

from evidence.comparisons import LEVEL, TITLES, Comparison, Result, compare, hypothesis
from evidence.methods import CORE, METHODS
from evidence.pictures import ratio_and_gain_figure
from evidence.statistics import holm, paired

MARKS = ("<!-- evidence: written by `python -m evidence --commit` -->", "<!-- end of evidence -->")
"""What stands before and after the tables in the main README."""


def write(results: Sequence[Result], planned: int, folder: Path) -> None:
    """Write cells.json, tables.md and, where there are settings enough, ratio.png."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(one) for one in sorted(results, key=lambda one: one["name"]))
    (folder / "cells.json").write_text(f"[\n{lines}\n]\n")
    comparisons = compare(results)
    (folder / "tables.md").write_text("\n\n".join(_sections(results, comparisons, planned)) + "\n")
    if len({one.setting for one in comparisons}) >= 5:
        ratio_and_gain_figure(comparisons).savefig(folder / "ratio.png", dpi=130)


def readme(results: Sequence[Result]) -> str:
    """What the main README quotes: the methods, the hypothesis and, folded, every setting."""
    comparisons = compare(results)
    settings = settings_table(comparisons, [name for name in CORE if name != "decay"])
    seeds, count = len(results[0]["test_error"]), len({one.setting for one in comparisons})
    legend = (
        "Test error in %, mean (standard error); for a method its difference in points (standard error), the seeds on which it "
        f"is lower, \\*\\* where p < 0.05 after correction for all {len(comparisons)} comparisons, \\* where only "
        "the uncorrected p is."
    )
    return "\n\n".join(
        [
            summary(comparisons),
            hypothesis_table(comparisons),
            f"<details>\n<summary>All {count} settings, {seeds} seeds each</summary>\n\n{legend}\n\n{settings}\n\n</details>",
        ]
    )


def quoted(text: str, block: str) -> str:
    """A README's text with the block between its two marks renewed."""
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + "\n\n" + block + "\n\n" + MARKS[1] + rest.split(MARKS[1])[1]


def _sections(results: Sequence[Result], comparisons: Sequence[Comparison], planned: int) -> list[str]:
    hours = sum(one["seconds"] for one in results) / 3600
    seeds = sorted({len(one["test_error"]) for one in results})
    intro = (
        f"{len(results)} of {planned} cells, {len(comparisons)} comparisons, {'/'.join(map(str, seeds))} test seeds, "
        f"{hours:.1f} core hours. Test error in %, mean (standard error); for a method its difference from weight decay "
        "only in points (standard error), seeds on which it is lower, and ** where p < 0.05 after Holm's correction for all "
        f"{len(comparisons)} comparisons, * where only the uncorrected p is. Ratio: energy of the hidden layers over that of "
        "random neurons, of the tuned network without a penalty, after training."
    )
    return [
        "# Does the penalty help, and where",
        "Made by `make evidence`; the protocol is in [README.md](../README.md).",
        intro,
        "## By method\n\n" + summary(comparisons),
        "## By setting\n\n" + settings_table(comparisons, [name for name in CORE if name != "decay"]),
        "## Ways of applying\n\n" + settings_table(comparisons, ["half_mhe_2", "loss", "decoupled"], needed="loss"),
        "## The whole family\n\n" + family_table(comparisons),
        "## One share for all, against the best coefficient of each setting\n\n" + share_table(comparisons),
        "## Does the ratio predict the gain?\n\n" + hypothesis_table(comparisons),
        "## Choices on an edge of their grid\n\n" + edges_table(results),
    ]


def summary(comparisons: Sequence[Comparison]) -> str:
    """A row a method: in how many settings it helps."""
    rows = []
    for name in METHODS:
        own = [one for one in comparisons if one.method == name]
        if own:
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
    return markdown(head, rows) + "\n\nFailures: weights that are not finite, or worse by two standard errors (uncorrected)."


def settings_table(comparisons: Sequence[Comparison], methods: Sequence[str], needed: str | None = None) -> str:
    """A row a setting: weight decay's error and each method's difference."""
    rows = []
    for setting in dict.fromkeys(one.setting for one in comparisons if needed in (None, one.method)):
        own = {one.method: one for one in comparisons if one.setting == setting}
        base = next(iter(own.values())).baseline
        rows.append(
            [setting, f"{mean(base['ratio_after']):.2f}", error_cell(base)]
            + [change_cell(own[name]) if name in own else "" for name in methods]
        )
    return markdown(["setting", "ratio", "weight decay only", *(METHODS[name].title for name in methods)], rows)


def family_table(comparisons: Sequence[Comparison]) -> str:
    """A row a method, a column a setting in which all methods were compared."""
    places = list(dict.fromkeys(one.setting for one in comparisons if one.method == "mhs"))
    own = {(one.method, one.setting): one for one in comparisons}
    rows = [
        [METHODS[name].title, *(change_cell(own[name, place]) if (name, place) in own else "" for place in places)]
        for name in METHODS
        if any((name, place) in own for place in places)
    ]
    bases = {one.setting: one.baseline for one in comparisons}
    rows = [["weight decay only", *(error_cell(bases[place]) for place in places)], *rows] if places else rows
    return markdown(["method", *places], rows)


def share_table(comparisons: Sequence[Comparison]) -> str:
    """One value of Share for all settings, against the fixed coefficient tuned for each."""
    own = {(one.method, one.setting): one for one in comparisons}
    pairs = [
        (one, own["half_mhe_2", one.setting])
        for one in comparisons
        if ("half_mhe_2", one.setting) in own and one.method == "share"
    ]
    if not pairs:
        return markdown([], [])
    against = [paired(share.result["test_error"], fixed.result["test_error"]) for share, fixed in pairs]
    corrected = holm([one.p for one in against])
    better, worse = (
        sum(p < LEVEL and sign * one.mean < 0 for one, p in zip(against, corrected, strict=True)) for sign in (1, -1)
    )
    rows = [
        [
            title,
            len(pairs),
            sum(one.verdict == "gain" for one in side),
            sum(one.failed for one in side),
            sum(bool(one.result["nonfinite"]) for one in side),
            f"{median(one.paired.mean for one in side):+.2f}",
        ]
        for title, side in (("Share(0.05)", [a for a, _ in pairs]), ("best coefficient of the setting", [b for _, b in pairs]))
    ]
    head = ["coefficient", "settings", "gain", "failures", "of them not finite", "median change"]
    told = f"Share against the best fixed coefficient, in {len(pairs)} settings (Holm): better in {better}, worse in {worse}; "
    return markdown(head, rows) + f"\n\n{told}median difference {median(one.mean for one in against):+.2f} points."


def hypothesis_table(comparisons: Sequence[Comparison]) -> str:
    """Rank correlations; the first row is the one that the protocol names."""
    rows = []
    for method, ratio, relative in (
        ("half_mhe_2", "ratio_after", False),
        ("half_mhe_2", "ratio_after", True),
        ("half_mhe_2", "ratio_before", False),
        ("mgd", "ratio_after", False),
        ("orthogonality", "ratio_after", False),
    ):
        own = [one for one in comparisons if one.method == method]
        if len(own) >= 5:
            found = hypothesis(comparisons, method, ratio=ratio, relative=relative)
            gain = "gain over weight decay's error" if relative else "gain in points"
            when = "after training" if ratio == "ratio_after" else "before training"
            interval = f"{found.low:+.2f} to {found.high:+.2f}"
            rows.append([METHODS[method].title, f"ratio {when}", gain, found.count, f"{found.rho:+.2f}", interval])
    for data in TITLES:
        own = [one for one in comparisons if one.result["asked"]["setting"]["data"] == data]
        if len([one for one in own if one.method == "half_mhe_2"]) >= 5:
            found = hypothesis(own, "half_mhe_2")
            interval = f"{found.low:+.2f} to {found.high:+.2f}"
            rows.append([f"the first row, {TITLES[data]} only", "", "", found.count, f"{found.rho:+.2f}", interval])
    return markdown(["method", "ratio", "gain", "settings", "Spearman's rho", "95 % bootstrap interval"], rows)


def edges_table(results: Sequence[Result]) -> str:
    """How often the best trial takes the smallest or largest value that was tried."""
    rows = []
    for name, method in METHODS.items():
        own = [one["edges"] for one in results if one["asked"]["method"]["name"] == name]
        kinds = [f"{end} {what}" for what in ("rate", "decay", "strength") for end in ("smallest", "largest")]
        if own:
            rows.append([method.title, len(own), *(sum(kind in one for one in own) or "" for kind in kinds)])
    head = ["method", "cells", "rate: smallest", "largest", "decay: smallest", "largest", "strength: smallest", "largest"]
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table, or a word where there is nothing to tell."""
    rows = list(rows)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) if rows else "Not run."


def error_cell(result: Result) -> str:
    """Mean test error and its standard error."""
    errors = result["test_error"]
    return f"{mean(errors):.2f} ({stdev(errors) / len(errors) ** 0.5:.2f})"


def change_cell(one: Comparison) -> str:
    """Difference, its standard error, wins, stars."""
    star = " **" if one.corrected < LEVEL else " *" if one.paired.p < LEVEL else ""
    bad = f", {one.result['nonfinite']} not finite" if one.result["nonfinite"] else ""
    return f"{one.paired.mean:+.2f} ({one.paired.error:.2f}), {one.paired.wins}/{one.paired.seeds}{star}{bad}".replace(
        "*", "\\*"
    )
