"""Tables, picture and the main README's block of the cells that are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from evidence import control_tables, tables
from evidence.cells import save
from evidence.comparisons import FAILS, Comparison, Result, compare
from evidence.files import read, write_whole
from evidence.pictures import controls_figure, ratio_and_gain_figure
from evidence.plan import cells
from evidence.uniformity import beyond_controls

MARKS = ("<!-- evidence: written by `python -m evidence --commit` -->", "<!-- end of evidence -->")
"""What stands before and after the tables in the main README."""


def write(
    results: Sequence[Result], planned: int, folder: Path, remark: str = ""
) -> tuple[Path, ...]:
    """Write cells.json, tables.md and, with five settings or more, ratio.png and controls.png.

    Args:
        results: Of the cells that are there.
        planned: How many cells there would be.
        folder: Where to.
        remark: What is said before the tables.

    Returns:
        The pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_all(results, folder / "cells.json")
    comparisons = compare(results)
    sections = _sections(results, comparisons, planned)
    if remark:
        sections.insert(1, f"**{remark}**")
    (folder / "tables.md").write_text("\n\n".join(sections) + "\n")
    if len({one.setting for one in comparisons}) < 5:
        return ()
    ratio, controls = folder / "ratio.png", folder / "controls.png"
    ratio_and_gain_figure(comparisons).savefig(ratio, dpi=130)
    if not beyond_controls(results):
        return (ratio,)
    controls_figure(results).savefig(controls, dpi=130)
    return ratio, controls


def page(results: Sequence[Result]) -> str:
    """What docs/evidence.md quotes: controls, methods, conditions and, folded, every setting."""
    comparisons = compare(results)
    seeds = len(results[0]["test_error"])
    count = len({one.setting for one in comparisons})
    hours = sum(one["seconds"] for one in results) / 3600
    beyond = control_tables.controls_by_setting(results)
    settings = tables.settings_table(comparisons)
    parts = [
        f"{len(results)} of {len(cells())} cells, in {count} settings, {seeds} test seeds each, "
        f"{hours:.1f} core hours, by {_codes(results)}.",
        "**Clear gains:**",
        control_tables.clear_gains_table(results),
        "**Beyond controls that are tuned as the penalties are:**",
        control_tables.uniformity_table(results),
        "**Beyond controls of its own gradient, at its own trial:**",
        control_tables.matched_table(results),
        "**Where:**",
        control_tables.controls_by_condition(results),
        "**Against weight decay:**",
        tables.summary(comparisons),
        "**Against each other** (p below 0.05 after Holm's correction for the settings):",
        tables.rivals_table(comparisons),
        "**Wider grids:**",
        control_tables.widening_table(results),
        "**What is seen early, and the gain:**",
        control_tables.early_table(results),
        _folded("All methods, in three settings", tables.family_table(comparisons)),
        _folded("Beyond the controls, setting by setting", beyond),
        _folded(f"All {count} settings", f"{legend(comparisons)}\n\n{settings}"),
    ]
    return "\n\n".join(parts)


def _folded(summary: str, text: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def save_all(results: Sequence[Result], path: Path) -> None:
    """Write results as one JSON list, a line each."""
    lines = ",\n".join(json.dumps(one, allow_nan=False) for one in results)
    write_whole(path, f"[\n{lines}\n]\n")


def unpack(committed: Path, folder: Path) -> None:
    """Lay committed results where a run looks for its own; those that are there stay."""
    for result in read(committed):
        if not (folder / f"{result['name']}.json").exists():
            save(result, folder)


def quoted(text: str, block: str, marks: tuple[str, str] = MARKS) -> str:
    """A README's text with the block between two marks renewed."""
    first, last = marks
    before, rest = text.split(first)
    return before + first + "\n\n" + block + "\n\n" + last + rest.split(last)[1]


def _sections(
    results: Sequence[Result], comparisons: Sequence[Comparison], planned: int
) -> list[str]:
    hours = sum(one["seconds"] for one in results) / 3600
    seeds = sorted({len(one["test_error"]) for one in results})
    intro = (
        f"{len(results)} of {planned} cells, {len(comparisons)} comparisons with weight decay, "
        f"{'/'.join(map(str, seeds))} test seeds, {hours:.1f} core hours, by {_codes(results)}. "
        f"{legend(comparisons)}"
    )
    sections = [
        "# Does the penalty help, and where",
        "Made by `make evidence`; the protocol is in [README.md](../README.md).",
        intro,
    ]
    if beyond_controls(results):
        sections += _control_sections(results)
    sections += [
        "## By method\n\n" + tables.summary(comparisons),
        "## Where\n\n" + tables.conditions_table(comparisons),
        "## Against each other\n\n" + tables.rivals_table(comparisons),
        "## By setting\n\n" + tables.settings_table(comparisons),
        "## Ways of applying\n\n"
        + tables.settings_table(comparisons, ["half_mhe_2", "loss"], needed="loss"),
        "## The whole family\n\n" + tables.family_table(comparisons),
        "## Does the ratio after training predict the gain? (the first run's test)\n\n"
        + tables.hypothesis_table(comparisons),
        "## Choices on an edge of their grid\n\n" + tables.edges_table(results),
    ]
    return sections


def _codes(results: Sequence[Result]) -> str:
    """How many versions of the code made the results; what is older has none."""
    found = {one["versions"].get("code") for one in results if "versions" in one} - {None}
    return f"{len(found)} version{'s' * (len(found) != 1)} of the code"


def _control_sections(results: Sequence[Result]) -> list[str]:
    """What the controls say, and what only cells with all of their trials can tell."""
    return [
        "## Clear gains\n\n" + control_tables.clear_gains_table(results),
        "## Is it uniformity?\n\n" + control_tables.uniformity_table(results),
        "## Against controls of the same gradient\n\n" + control_tables.matched_table(results),
        "## Beyond the controls, and where\n\n" + control_tables.controls_by_condition(results),
        "## Beyond the controls, by setting\n\n" + control_tables.controls_by_setting(results),
        "## Wider grids\n\n" + control_tables.widening_table(results),
        "## Does what is seen early predict the gain?\n\n" + control_tables.early_table(results),
    ]


def legend(comparisons: Sequence[Comparison]) -> str:
    """What the tables of settings show."""
    return (
        "Test error in %, mean (standard error); for a method its difference from weight decay "
        "only in points (standard error), seeds on which it is lower, \\*\\* where p < 0.05 after "
        f"Holm's correction for all {len(comparisons)} comparisons, \\* where only the uncorrected "
        "p is. ↑ and ↓: the best learning rate (r), weight decay (d) or strength (s) is the largest "
        f"or the smallest that was tried. Fail: seeds with {FAILS}. Ratio: energy of the hidden "
        "layers over that of random neurons, of the tuned network without a penalty, after training."
    )
