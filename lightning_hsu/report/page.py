"""A report as one HTML page."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from lightning_hsu._monitor.measure import in_half_space
from lightning_hsu._monitor.text import counted, number
from lightning_hsu.report.analysis import LayerReport
from lightning_hsu.report.charts import ratio_axis, ratio_chart
from lightning_hsu.report.sections import breakable, layer_section
from lightning_hsu.report.style import STYLE
from lightning_hsu.report.tables import shape_of

if TYPE_CHECKING:
    from lightning_hsu.report.build import Report

_COLUMNS = (  # name, classes; what is minor is left out on a phone
    ("layer", ""),
    ("neurons x dimension", "number minor"),
    ("ratio", "number"),
    ("score", "number minor"),
    ("smallest angle", "number minor"),
    ("near-duplicate pairs", "number"),
    ("dead", "number"),
    ("finding", "minor"),
)


def report_page(found: Report) -> str:
    """The page of a report: one file, no script, nothing to load."""
    title = escape(f"Neurons of {found.source}")
    parts = [_header(found), _overview(found), _sections(found), _skipped(found)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{''.join(parts)}</body>\n</html>\n"
    )


def _header(found: Report) -> str:
    neurons = sum(one.uniformity.groups * one.uniformity.neurons for one in found.layers)
    lines = "; opposite neurons count as the same" if in_half_space(found.measure) else ""
    start = max(found.source.rfind(slash) for slash in "/\\") + 1  # of the name of a file
    where = f'<p class="soft">{escape(found.source)}</p>\n' if start else ""
    return (
        f"<header><h1>{escape(found.source[start:])}</h1>\n{where}"
        f'<p class="soft">{counted(len(found.layers), "layer")}, {counted(neurons, "neuron")}, measured by '
        f"{escape(repr(found.measure))}{lines}.</p>\n"
        f'<p class="lead">{_standing(found)}</p>\n'
        "<p>The ratio is a layer's energy over that of as many random vectors: 1 is as random, above 1 more redundant. "
        "The score is 0 at random and 1 at the bound that no arrangement can beat; below 0 is worse than random.</p>\n"
        '<p class="soft">A ratio is a fact, not advice: measured, it said little about what regularising gains.</p></header>\n'
    )


def _standing(found: Report) -> str:
    """How many layers are above random, and how many cannot be compared."""
    ratios = [one.uniformity.ratio for one in found.layers]
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    if not known:
        return "No layer has a ratio."
    above = sum(one.above for one in found.layers)
    words = f"{above or 'None'} of {counted(len(known), 'layer')} {'is' if above < 2 else 'are'} above random by more than 2 %."
    within = sum(one.above and one.as_random for one in found.layers)
    if within:
        words += f" Of these, {within} {'is' if within == 1 else 'are'} within what random layers of the shape have."
    if missing := len(ratios) - len(known):
        words += f" {missing} more {'has' if missing == 1 else 'have'} no ratio."
    return words


def _overview(found: Report) -> str:
    if not found.layers:
        return ""
    ratios = [one.uniformity.ratio for one in found.layers]
    chart = "" if all(map(math.isnan, ratios)) else _chart(found)
    heads = "".join(f'<th scope="col" class="{css}">{name}</th>' for name, css in _COLUMNS)
    rows = "".join(_row(i, layer) for i, layer in enumerate(found.layers))
    starred = in_half_space(found.measure) and any(one.full_space for one in found.layers)
    note = (
        '<p class="soft">* measured in full space, where opposite neurons are far apart.</p>\n'
        if starred
        else ""
    )
    return (
        f'<h2>All layers</h2>\n{chart}<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>\n{note}"
    )


def _chart(found: Report) -> str:
    axis = ", on a logarithmic axis" if ratio_axis(found.layers).kind == "log" else ""
    return (
        f'<p class="soft">Ratio by layer, first layer at the left{axis}. A dot leads to its layer.</p>\n'
        f'<div class="ratios">{ratio_chart(found.layers)}</div>\n'
    )


def _row(i: int, layer: LayerReport) -> str:
    one = layer.uniformity
    angle = number(one.min_angle, 1)
    cells = (
        f'<a href="#layer-{i}">{breakable(layer.name)}</a>' + (" *" if layer.full_space else ""),
        shape_of(one),
        number(one.ratio, 3),
        number(one.score, 2),
        angle if angle == "-" else angle + "°",
        f"{layer.similar:,}",
        f"{layer.dead:,}",
        escape(layer.finding),
    )
    marked = "".join(
        f'<td class="{css}">{cell}</td>' for cell, (_, css) in zip(cells, _COLUMNS, strict=True)
    )
    return f"<tr>{marked}</tr>\n"


def _sections(found: Report) -> str:
    """Each layer, the one of the highest ratio unfolded."""
    if not found.layers:
        return ""
    ratios = [one.uniformity.ratio for one in found.layers]
    worst = max(range(len(ratios)), key=lambda i: -math.inf if math.isnan(ratios[i]) else ratios[i])
    return "<h2>Layer by layer</h2>\n" + "".join(
        layer_section(i, layer, found, unfolded=i == worst) for i, layer in enumerate(found.layers)
    )


def _skipped(found: Report) -> str:
    """What was not measured, and why."""
    if not found.skips:
        return ""
    rows = "".join(
        f"<tr><td>{breakable(skip.name)}</td><td>{' x '.join(map(str, skip.shape))}</td><td>{escape(skip.reason)}</td></tr>\n"
        for skip in found.skips
    )
    return (
        '<h2>Left out</h2>\n<div class="scroll"><table><thead><tr><th scope="col">weight</th><th scope="col">shape</th>'
        f'<th scope="col">reason</th></tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'
    )
