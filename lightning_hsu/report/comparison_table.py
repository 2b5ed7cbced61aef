"""The table of a comparison of two networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_hsu._monitor.fold import fold_names
from lightning_hsu._monitor.render import Line
from lightning_hsu._monitor.summary import lines_about_notes
from lightning_hsu._monitor.text import RULE, number
from lightning_hsu.report.comparison_data import ComparisonData, LayerComparison
from lightning_hsu.report.data import ReportData
from lightning_hsu.report.drift import drift_line, error_text
from lightning_hsu.report.report_table import (
    ANGLE,
    FULL_SPACE,
    RATIO,
    SIMILAR,
    is_mixed,
    name_of,
    skip_lines,
)
from lightning_hsu.report.tables import Column, Legend, Table, short

_MOVED = "moved: median (largest) angle between neurons before and after, in degrees"

SAMPLES = (
    "+-: standard error of a ratio's change, where it is of samples; ~: a change of at most three of "
    "these, which is none that the samples tell"
)
"""A line under a comparison with ratios of samples."""

_COLUMNS = (
    Column("layer"),
    Column("neurons x dim", right=True),
    Column("moved", right=True),
    Column("ratio", right=True),
    Column("angle", right=True, spare=2),
    Column("similar", right=True, spare=3),
    Column("dead", right=True, spare=1),
    Column("finding after"),
)
_LEGENDS = (
    Legend("moved", _MOVED),
    Legend("ratio", RATIO),
    Legend("angle", ANGLE),
    Legend("similar", SIMILAR),
)


def comparison_table(found: ComparisonData) -> Table:
    """The table of a comparison."""
    mixed = is_mixed([one.after for one in found.layers])
    rows = [_row(one, mixed) for one in found.layers]
    first = []
    if found.matched:
        first.append(Line(found.matched))
    if found.drift is not None:
        first.append(Line(drift_line(found.drift)))
    below = []
    if any(one.ratio_error > 0.0 for one in found.layers):
        below.append(Line(SAMPLES))
    for name, note in found.notes:  # with the numbers of each layer, so that none are folded
        below.append(Line(f"note: {name}: {note}"))
    if any(one.after.as_random for one in found.layers):
        below.append(Line(RULE))
    if mixed:
        below.append(Line(FULL_SPACE))
    only_before, only_after = only_names(found)
    below += _only_line("before", only_before, found.before)
    below += _only_line("after", only_after, found.after)
    below += [*notes_of_both(found), *_skips_of_both(found)]
    return Table(_COLUMNS, rows, first, _LEGENDS, below)


def only_names(found: ComparisonData) -> tuple[list[str], list[str]]:
    """Names that only one network has; not those that the other has, but does not measure."""
    first, second = found.prefixes
    before = _without(found.only_before, first, found.after, second)
    after = _without(found.only_after, second, found.before, first)
    return before, after


def _without(names: Sequence[str], prefix: str, other: ReportData, other_prefix: str) -> list[str]:
    """Those of some names that another network does not have even among what it skips."""
    skipped = {skip.name.removeprefix(other_prefix) for skip in other.skips}
    found = []
    for name in names:
        if name.removeprefix(prefix) not in skipped:
            found.append(name)
    return found


def _only_line(when: str, names: Sequence[str], one: ReportData) -> list[Line]:
    """A line about the layers that only one of two networks has."""
    if not names:
        return []
    return [Line(f"only {when} ({short(one.source)}): {fold_names(names)}")]


def notes_of_both(found: ComparisonData) -> list[Line]:
    """The notes on the two networks: what holds before and after once, else with when it holds."""
    before = lines_about_notes(found.before.notes)
    after = lines_about_notes(found.after.notes)
    lines = [line for line in before if line in after]
    lines += [_when("before", line) for line in before if line not in after]
    return lines + [_when("after", line) for line in after if line not in before]


def _skips_of_both(found: ComparisonData) -> list[Line]:
    """What is not measured of the two networks, once if it is the same."""
    if found.before.skips == found.after.skips:
        return _skips_of("before and after", found.before)
    return _skips_of("before", found.before) + _skips_of("after", found.after)


def _skips_of(when: str, one: ReportData) -> list[Line]:
    lines = skip_lines(one.skips)
    if lines:
        lines[0] = _when(when, lines[0])
    return lines


def _when(when: str, line: Line) -> Line:
    """A line of a network with when it holds."""
    return replace(line, text=f"{when}, {line.text}")


def _row(one: LayerComparison, mixed: bool) -> tuple[str, ...]:
    angles = []
    for layer in (one.before, one.after):
        angles.append(layer.or_nan(number(layer.uniformity.min_angle, 1)))
    return (
        name_of(one.after, mixed),
        change(one.before.shape, one.after.shape),
        _moved(one),
        ratio_change(one),
        change(*angles),
        change(one.before.in_groups, one.after.in_groups),
        change(f"{one.before.dead:,}", f"{one.after.dead:,}"),
        one.after.finding,
    )


def _moved(one: LayerComparison) -> str:
    """How far the median neuron moved, and the one that moved most."""
    if math.isnan(one.moved):
        return "-"
    return f"{number(one.moved, 1)} ({number(one.moved_most, 1)})"


def ratio_change(one: LayerComparison) -> str:
    """The ratio before and after; of samples with "~" where they do not tell a change."""
    before = one.before.or_nan(number(one.before.ratio, 3))
    after = one.after.or_nan(number(one.after.ratio, 3))
    text = change(before, after)
    if one.ratio_error > 0.0:
        if one.ratio_change == "same":
            text = text.replace("->", "~")
        text += f" +-{error_text(one.ratio_error)}"
    return text


def change(before: str, after: str) -> str:
    """Two cells as one text; a single one if they are the same."""
    if before == after:
        return before
    return f"{before} -> {after}"
