"""A comparison as one HTML page, in the style of a report's: no script, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lightning_hsu._monitor.fold import fold_names
from lightning_hsu._monitor.text import counted
from lightning_hsu.report.charts import change_axis, change_chart
from lightning_hsu.report.comparison_data import ComparisonData, LayerComparison
from lightning_hsu.report.comparison_table import (
    SAMPLES,
    change,
    notes_of_both,
    only_names,
    ratio_change,
)
from lightning_hsu.report.drift import drift_line
from lightning_hsu.report.page import (
    RULE_PART,
    breakable,
    breakable_words,
    degrees,
    narrow_note,
    notes_part,
    skipped_part,
    source_part,
    table_head,
    table_row,
    whole_page,
)
from lightning_hsu.report.report_table import verdicts

_COLUMNS = (  # heading and classes; minor ones are left out on a phone
    ("layer", ""),
    ("neurons x dimension", "number minor"),
    ("moved", "number"),
    ("ratio", "number"),
    ("smallest angle", "number minor"),
    ("near-duplicates", "number minor"),
    ("dead", "number minor"),
    ("finding after", "minor"),
)


def comparison_page(found: ComparisonData) -> str:
    """The page of a comparison, one file."""
    before, after = found.before.source, found.after.source
    body = _header(found) + _overview(found) + _only(found)
    body += notes_part(notes_of_both(found)) + _skipped(found)
    return whole_page(f"Neurons of {before} and {after}", body)


def _header(found: ComparisonData) -> str:
    """What was compared, the main finding, and what the numbers mean."""
    before, where_before = source_part(found.before.source)
    after, where_after = source_part(found.after.source)
    earlier = [one.before for one in found.layers]
    later = [one.after for one in found.layers]
    most = -1.0
    for one in found.layers:
        if one.moved_most > most:  # never true for NaN
            most = one.moved_most
    how_far = ""
    if most >= 0.0:
        how_far = f" The neuron that moved most moved by {degrees(most)}."
    matched = ""
    if found.matched:
        matched = f'<p class="soft">{escape(found.matched[0].upper() + found.matched[1:])}.</p>\n'
    return (
        f"<header><h1>{before} to {after}</h1>\n{where_before}{where_after}"
        f'<p class="soft">{counted(len(found.layers), "layer")} in both, measured by '
        f"{escape(repr(found.after.measure))}.</p>\n{matched}"
        f'<p class="lead">Before, {verdicts(earlier)}; after, {verdicts(later)}.{how_far}</p>\n'
        f"{_drift(found)}"
        "<p>The ratio is a layer's energy over that of as many random vectors: 1 is as random, "
        f"above 1 more redundant. {RULE_PART} Moved is the median angle between a neuron before "
        "and after, with the largest one. Near-duplicates are neurons "
        "that have one, in groups that such pairs connect.</p></header>\n"
    )


def _drift(found: ComparisonData) -> str:
    """The drift over all layers in a sentence."""
    if found.drift is None:
        return ""
    line = drift_line(found.drift)
    return f"<p>{_with_signs(breakable_words(line[0].upper() + line[1:]))}.</p>\n"


def _matching(found: ComparisonData) -> str:
    """How the neurons of layers are matched that are not matched by index."""
    text = ""
    for name, note in found.notes:
        text += f'<p class="soft">{breakable(name)}: {breakable_words(note)}.</p>\n'
    return text


def _overview(found: ComparisonData) -> str:
    """The chart of ratios before and after, and the table of all layers in both."""
    chart = ""
    if any(not math.isnan(one.after.ratio) for one in found.layers):
        scale = ""
        if change_axis(found.layers).kind == "log":
            scale = ", on a logarithmic axis"
        chart = (
            f'<p class="soft">Ratio by layer, first layer at the left{scale}: a ring before, '
            "a dot after. A dot leads to its row.</p>\n"
            f'<div class="ratios">{change_chart(found.layers)}</div>\n'
        )
    rows = ""
    for i, one in enumerate(found.layers):
        rows += table_row(_cells(i, one), _COLUMNS)
    note = ""
    if any(one.ratio_error > 0.0 for one in found.layers):
        note = f'<p class="soft">{_html(SAMPLES)}.</p>\n'
    if found.after.measure.half_space and any(one.after.full_space for one in found.layers):
        note += (
            '<p class="soft">* measured in full space, where opposite neurons are far apart.</p>\n'
        )
    return (
        f'<h2>Layers of both</h2>\n{chart}<div class="scroll"><table>'
        f"{table_head(_COLUMNS)}<tbody>\n{rows}</tbody></table></div>\n{narrow_note(_COLUMNS)}{note}"
        f"{_matching(found)}"
    )


def _cells(i: int, one: LayerComparison) -> dict[str, str]:
    """The cells of a row, by heading."""
    angles = []
    for layer in (one.before, one.after):
        angles.append(layer.or_nan(degrees(layer.uniformity.min_angle)))
    name = f'<span id="layer-{i}">{breakable(one.after.name)}</span>'
    if one.after.full_space:
        name += " *"
    return {
        "layer": name,
        "neurons x dimension": _change(one.before.shape, one.after.shape),
        "moved": _moved(one),
        "ratio": _html(ratio_change(one)),
        "smallest angle": _change(*angles),
        "near-duplicates": _change(one.before.in_groups, one.after.in_groups),
        "dead": _change(f"{one.before.dead:,}", f"{one.after.dead:,}"),
        "finding after": escape(one.after.finding),
    }


def _moved(one: LayerComparison) -> str:
    """How far the median neuron moved, and the one that moved most."""
    if math.isnan(one.moved):
        return "-"
    return f"{degrees(one.moved)} ({degrees(one.moved_most)})"


def _change(before: str, after: str) -> str:
    """Two cells as HTML; a single one if they are the same."""
    return _html(change(before, after))


def _html(change: str) -> str:
    """A change in words as HTML."""
    return _with_signs(escape(change))


def _with_signs(text: str) -> str:
    """HTML with an arrow and a plus-minus sign."""
    return text.replace("-&gt;", "&rarr;").replace("+-", "&plusmn;")


def _only(found: ComparisonData) -> str:
    """The layers that only one of the two has."""
    only_before, only_after = only_names(found)
    return _only_list("before", only_before) + _only_list("after", only_after)


def _only_list(when: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    return (
        f"<h2>Only {when}</h2>\n"
        f"<p>{counted(len(names), 'layer')}: {breakable_words(fold_names(names))}</p>\n"
    )


def _skipped(found: ComparisonData) -> str:
    """What was not measured, once if it is the same in both."""
    before, after = found.before.skips, found.after.skips
    if before == after:
        return skipped_part(before, "Left out")
    return skipped_part(before, "Left out before") + skipped_part(after, "Left out after")
