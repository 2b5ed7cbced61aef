"""The table of a report, and what is said of several layers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_hsu._monitor.fold import fold_names
from lightning_hsu._monitor.render import Line
from lightning_hsu._monitor.summary import lines_about_notes, lines_about_skips
from lightning_hsu._monitor.text import (
    RULE,
    SCORE,
    counted,
    in_groups,
    layer_named,
    number,
    score_text,
    without_empty,
)
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu._neurons.select import EXCLUDED, NOT_INCLUDED
from lightning_hsu.report.data import LayerReport, ReportData, known_ratios
from lightning_hsu.report.tables import STAR, Column, Legend, Table, headings_of

# Lines that a comparison has, too.
FULL_SPACE = "* in full space, where opposite neurons are far apart"
ANGLE = "angle: the smallest between two neurons, in degrees"
RATIO = "ratio: energy over that of random neurons"
SIMILAR = "similar: neurons with a near-duplicate, in groups that such pairs connect"

_RANK = (
    "rank: effective rank of the neurons at length 1, e to the entropy of their squared singular "
    "values"
)
_COLUMNS = (
    Column("layer"),
    Column("neurons x dim", right=True),
    Column("energy", right=True, spare=1),
    Column("ratio", right=True),
    Column("score", right=True, spare=4),
    Column("angle", right=True),
    Column("rank", right=True, spare=5),
    Column("similar", right=True, spare=3),  # as is "dead", it is in the finding, too
    Column("dead", right=True, spare=2),
    Column("finding"),
)
_LEGENDS = (
    Legend("ratio", f"{RATIO}; {ANGLE}"),
    Legend("rank", _RANK),
    Legend("similar", SIMILAR),
    Legend("score", SCORE),
)


def report_table(found: ReportData, top: int | None = None) -> Table:
    """The table of a report.

    Args:
        found: The report.
        top: How many layers to show, the worst first: those with NaN or infinite weights, then by
            ratio; None shows all in the model's order.
    """
    mixed = is_mixed(found.layers)
    layers, hidden = shown_and_hidden(found.layers, top)
    first = []
    if hidden:
        first.append(Line(_hidden(hidden, len(found.layers))))
    for text in (_summary(found), *unjudged(found.layers)):
        first.append(Line(text))
    headings = headings_of(_COLUMNS)
    rows = [headings]
    for layer in layers:
        rows.append(_row(layer, mixed))
    rows = without_empty(rows, "score")
    columns = []
    for column in _COLUMNS:
        if column.heading in rows[0]:
            columns.append(column)
    below = []
    if any(layer.as_random for layer in layers):
        below.append(Line(RULE))
    if any(row[0].endswith(STAR) for row in rows):
        below.append(Line(FULL_SPACE))
    for layer in found.layers:
        if layer.sampling:
            below.append(Line(f"note: {layer.name}: {layer.sampling}"))
    below += [*lines_about_notes(found.notes), *skip_lines(found.skips)]
    return Table(tuple(columns), rows[1:], first, _LEGENDS, below)


def shown_and_hidden(
    layers: Sequence[LayerReport], top: int | None
) -> tuple[list[LayerReport], list[LayerReport]]:
    """The layers that a report shows, and those that it does not.

    Args:
        layers: All layers, in the model's order.
        top: How many to show, the worst first; None shows all in their order.
    """
    if top is None:
        return list(layers), []
    ordered = sorted(layers, key=_badness, reverse=True)
    return ordered[:top], ordered[top:]


def skip_lines(skips: Sequence[Skip]) -> list[Line]:
    """What was left out, and why; what the caller's patterns left out is only counted."""
    others = []
    counts = {NOT_INCLUDED: 0, EXCLUDED: 0}
    for skip in skips:
        if skip.reason in counts:
            counts[skip.reason] += 1
        else:
            others.append(skip)
    if not skips:
        return []
    lines = [Line(f"not measured ({len(skips):,}):"), *lines_about_skips(others)[1:]]
    for reason, count in counts.items():
        if count > 0:
            lines.append(Line(f"{count:,} {reason}", indent=2))
    return lines


def _badness(layer: LayerReport) -> tuple[bool, float]:
    """What layers are sorted by, the worst with the most."""
    ratio = -math.inf if math.isnan(layer.ratio) else layer.ratio
    return layer.uniformity.nonfinite > 0, ratio


def _hidden(hidden: Sequence[LayerReport], count: int) -> str:
    """A line about the layers that are not shown."""
    line = f"not shown: {len(hidden):,} of {counted(count, 'layer')}"
    ratios = known_ratios(hidden)
    if ratios:
        line += f", with ratios up to {number(max(ratios), 3)}"
    similar = 0
    dead = 0
    for layer in hidden:
        similar += layer.similar > 0
        dead += layer.dead > 0
    for number_of, what in ((similar, "near-duplicates"), (dead, "dead neurons")):
        if number_of:
            line += f"; {number_of:,} of them with {what}"
    return line


def verdicts(layers: Sequence[LayerReport]) -> str:
    """How many of the layers that can be judged are above random, and how many are broken.

    Example:
        >>> verdicts([])
        'no layer can be judged'
    """
    judged, above = judged_and_above(layers)
    told = f"{above} of {counted(judged, 'layer')} above random"
    if judged == 0:
        told = "no layer can be judged"
    broken = 0
    for layer in layers:
        broken += layer.uniformity.nonfinite > 0
    if broken:
        told += f", {counted(broken, 'layer')} with NaN or infinite numbers"
    return told


def judged_and_above(layers: Sequence[LayerReport]) -> tuple[int, int]:
    """How many layers can be judged, and how many of these are above random."""
    judged = 0
    above = 0
    for layer in layers:
        if layer.judged:
            judged += 1
            above += layer.above
    return judged, above


def _summary(found: ReportData) -> str:
    """How many layers are above random, their near-duplicates, and their dead neurons."""
    groups = 0
    grouped = 0
    dead = 0
    for layer in found.layers:
        groups += layer.group_count
        grouped += layer.grouped
        dead += layer.dead
    similar = "0 near-duplicates"
    if groups:
        similar = in_groups(grouped, groups)
    if not all(layer.all_counted for layer in found.layers):
        similar = f"at least {counted(grouped, 'near-duplicate neuron')}"
    return (
        f"{verdicts(found.layers)}; {similar} "
        f"(cosine from {found.similar_above:g}); {counted(dead, 'dead neuron')}"
    )


def unjudged(layers: Sequence[LayerReport]) -> list[str]:
    """Why layers cannot be judged, each reason with their names."""
    broken = []
    without_ratio = []
    for layer in layers:
        if layer.uniformity.nonfinite > 0:
            broken.append(layer.name)
        elif not layer.judged:
            without_ratio.append(layer.name)
    lines = []
    for names, what in ((broken, "NaN or infinite weights"), (without_ratio, "no ratio")):
        if names:
            has = "has" if len(names) == 1 else "have"
            folded = layer_named(names[0])
            if len(names) > 1:
                folded = fold_names(names).removesuffix(f" ({len(names):,})")
            lines.append(f"{counted(len(names), 'layer')} {has} {what}: {folded}")
    return lines


def is_mixed(layers: Sequence[LayerReport]) -> bool:
    """Whether some layers are measured in full space and some are not."""
    return len({layer.full_space for layer in layers}) > 1


def _row(layer: LayerReport, mixed: bool) -> tuple[str, ...]:
    numbers = layer.uniformity
    energy = "-"
    if not math.isnan(numbers.ratio):
        energy = number(numbers.energy, 4)
    return (
        name_of(layer, mixed),
        layer.shape,
        layer.or_nan(energy),
        layer.or_nan(number(numbers.ratio, 3)),
        score_text(numbers.score),
        layer.or_nan(number(numbers.min_angle, 1)),
        layer.rank,
        layer.in_groups,
        f"{layer.dead:,}",
        layer.finding,
    )


def name_of(layer: LayerReport, mixed: bool) -> str:
    """The name of a layer, with a star if it is measured in full space, unlike others."""
    if mixed and layer.full_space:
        return layer.name + STAR
    return layer.name
