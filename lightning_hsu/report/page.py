"""A report as one HTML page: no script, nothing to load."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from lightning_hsu._monitor.render import Line
from lightning_hsu._monitor.summary import lines_about_notes
from lightning_hsu._monitor.text import counted, number, score_text, weight_shape
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu.report.charts import (
    angle_chart,
    heat_map_png,
    ratio_axis,
    ratio_chart,
    singular_chart,
)
from lightning_hsu.report.data import (
    HEAT_MAP_SIZE,
    LayerReport,
    ReportData,
    SimilarPair,
    known_ratios,
)
from lightning_hsu.report.report_table import judged_and_above, unjudged
from lightning_hsu.report.similar_lines import dead_members, members

_COLUMNS = (  # heading and classes; minor ones are left out on a phone
    ("layer", ""),
    ("neurons x dimension", "number minor"),
    ("ratio", "number"),
    ("score", "number minor"),
    ("smallest angle", "number minor"),
    ("effective rank", "number minor"),
    ("near-duplicates", "number"),
    ("dead", "number"),
    ("finding", "minor"),
)
RULE_PART = (
    "A layer is called as random within 1 % of that, or where 998 of 1,000 random layers of its "
    "shape are."
)
_BREAK = re.compile(r"(?<!\.)([._])(?![.]|\W*$)")  # within a name, not within "0..11"
_NUMBER = re.compile(r"\W*[0-9][0-9.,]*(e[+-]?[0-9]+)?x?\W*")
_FIGURES = 500  # layers with figures, so that the page of very many layers stays readable
_LISTED = 20  # pairs and dead neurons that are listed for a layer


def report_page(found: ReportData, merges: str = "") -> str:
    """The page of a report, one file.

    Args:
        found: The report.
        merges: What could be merged, as HTML; "" if that was not asked for.
    """
    body = _header(found) + _overview(found) + _sections(found)
    if merges:
        body += f"<h2>What could be merged</h2>\n{merges}\n"
    body += notes_part(lines_about_notes(found.notes)) + skipped_part(found.skips, "Left out")
    return whole_page(f"Neurons of {found.source}", body)


def whole_page(title: str, body: str) -> str:
    """A page of one file, without a script.

    Args:
        title: Its title, as text.
        body: What it shows, as HTML.
    """
    title = escape(title)
    style = files("lightning_hsu.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def _header(found: ReportData) -> str:
    """What was read and how it was measured, the main finding, and what the numbers mean."""
    name, where = source_part(found.source)
    neurons = 0
    for layer in found.layers:
        neurons += layer.uniformity.groups * layer.uniformity.neurons
    how = escape(repr(found.measure))
    if found.measure.half_space:
        how += "; opposite neurons count as the same"
    score = ""
    if _has_scores(found):
        score = (
            " The score is 0 at random and 1 at the bound that no arrangement can beat; it is not "
            "shown where it is below 0."
        )
    return (
        f"<header><h1>{name}</h1>\n{where}"
        f'<p class="soft">{counted(len(found.layers), "layer")}, {counted(neurons, "neuron")}, '
        f"measured by {how}.</p>\n"
        f'<p class="lead">{_lead(found)}</p>\n'
        "<p>The ratio is a layer's energy over that of as many random vectors: 1 is as random, "
        f"above 1 more redundant. {RULE_PART}{score}</p>\n"
        '<p class="soft">A ratio is a fact, not advice: in our experiments it said little about '
        "what regularising gains.</p></header>\n"
    )


def source_part(source: str) -> tuple[str, str]:
    """The name of a source without its folder, and a paragraph with both; as HTML."""
    folder_end = max(source.rfind("/"), source.rfind("\\")) + 1
    where = ""
    if folder_end > 0:
        where = f'<p class="soft">{escape(source)}</p>\n'
    return escape(source[folder_end:]), where


def _has_scores(found: ReportData) -> bool:
    """Whether any layer has a score that is shown."""
    return any(score_text(layer.uniformity.score) != "-" for layer in found.layers)


def _lead(found: ReportData) -> str:
    """How many layers are above random, and which cannot be judged."""
    judged, above = judged_and_above(found.layers)
    words = "No layer can be judged."
    if judged > 0:
        verb = "is" if above < 2 else "are"
        words = f"{above or 'None'} of {counted(judged, 'layer')} {verb} above random."
    for text in unjudged(found.layers):
        words += f" {breakable_words(text)}."
    return words


def _is(count: int) -> str:
    """The verb after a number."""
    return "is" if count == 1 else "are"


def _overview(found: ReportData) -> str:
    """The chart of ratios and the table of all layers."""
    if not found.layers:
        return ""
    chart = ""
    if known_ratios(found.layers):
        chart = _ratio_chart(found)
    columns = []
    for column in _COLUMNS:
        if column[0] != "score" or _has_scores(found):
            columns.append(column)
    rows = ""
    for i, layer in enumerate(found.layers):
        rows += table_row(_cells(i, layer), columns)
    note = ""
    if found.measure.half_space and any(layer.full_space for layer in found.layers):
        note = (
            '<p class="soft">* measured in full space, where opposite neurons are far apart.</p>\n'
        )
    return (
        f'<h2>All layers</h2>\n{chart}<div class="scroll"><table>'
        f"{table_head(columns)}<tbody>\n{rows}</tbody></table></div>\n{narrow_note(columns)}{note}"
    )


def table_head(columns: Sequence[tuple[str, str]]) -> str:
    """The headings of a table, each with its classes."""
    headings = ""
    for name, css in columns:
        headings += f'<th scope="col" class="{css}">{name}</th>'
    return f"<thead><tr>{headings}</tr></thead>\n"


def narrow_note(columns: Sequence[tuple[str, str]]) -> str:
    """A paragraph, shown on a narrow screen only, about the columns that are left out there."""
    names = []
    for heading, css in columns:
        if "minor" in css.split():
            names.append(heading)
    return (
        '<p class="soft narrow">Some columns are left out on this narrow screen: '
        f"{', '.join(names)}.</p>\n"
    )


def table_row(cells: Mapping[str, str], columns: Sequence[tuple[str, str]]) -> str:
    """A row of a table: HTML by heading."""
    row = ""
    for heading, css in columns:
        row += f'<td class="{css}">{cells[heading]}</td>'
    return f"<tr>{row}</tr>\n"


def _ratio_chart(found: ReportData) -> str:
    axis = ""
    if ratio_axis(found.layers).kind == "log":
        axis = ", on a logarithmic axis"
    return (
        f'<p class="soft">Ratio by layer, first layer at the left{axis}. '
        "A dot leads to its layer.</p>\n"
        f'<div class="ratios">{ratio_chart(found.layers)}</div>\n'
    )


def _cells(i: int, layer: LayerReport) -> dict[str, str]:
    """The cells of a row of the table of all layers, by heading."""
    numbers = layer.uniformity
    name = f'<a href="#layer-{i}">{breakable(layer.name)}</a>'
    if layer.full_space:
        name += " *"
    return {
        "layer": name,
        "neurons x dimension": layer.shape,
        "ratio": layer.or_nan(number(numbers.ratio, 3)),
        "score": score_text(numbers.score),
        "smallest angle": layer.or_nan(degrees(numbers.min_angle)),
        "effective rank": layer.rank,
        "near-duplicates": near_duplicates(layer),
        "dead": f"{layer.dead:,}",
        "finding": escape(layer.finding),
    }


def notes_part(lines: Sequence[Line]) -> str:
    """What one should know of layers."""
    notes = ""
    for line in lines:
        notes += f"<p>{breakable_words(line.text)}</p>\n"
    return notes


def skipped_part(skips: Sequence[Skip], title: str) -> str:
    """What was not measured, and why."""
    if not skips:
        return ""
    rows = ""
    for skip in skips:
        rows += (
            f"<tr><td>{breakable(skip.name)}</td><td>{weight_shape(skip)}</td>"
            f"<td>{escape(skip.reason)}</td></tr>\n"
        )
    return (
        f'<h2>{title}</h2>\n<div class="scroll"><table><thead><tr><th scope="col">weight</th>'
        '<th scope="col">shape</th><th scope="col">reason</th></tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>\n"
    )


def _sections(found: ReportData) -> str:
    """A section for each layer, the one with the highest ratio unfolded."""
    if not found.layers:
        return ""
    worst = _worst(found)
    drawn = _with_figures(found)
    sections = "<h2>Layer by layer</h2>\n"
    if len(drawn) < len(found.layers):
        sections += (
            f'<p class="soft">Figures are shown for the {len(drawn):,} layers with the highest '
            "ratios.</p>\n"
        )
    for i, layer in enumerate(found.layers):
        sections += _section(i, layer, found, unfolded=i == worst, drawn=i in drawn)
    return sections


def _with_figures(found: ReportData) -> set[int]:
    """Indices of the layers that get figures: those with the highest ratios."""

    def order(i: int) -> float:
        ratio = found.layers[i].ratio
        return math.inf if math.isnan(ratio) else -ratio

    return set(sorted(range(len(found.layers)), key=order)[:_FIGURES])


def _worst(found: ReportData) -> int:
    """Index of the layer with the highest ratio; the first layer if none has a ratio."""
    worst = 0
    highest = -math.inf
    for i, layer in enumerate(found.layers):
        if layer.ratio > highest:  # never true for NaN
            worst = i
            highest = layer.ratio
    return worst


def _section(i: int, layer: LayerReport, found: ReportData, *, unfolded: bool, drawn: bool) -> str:
    """Everything about layer i, with figures if they are ``drawn``."""
    numbers = layer.uniformity
    score = score_text(numbers.score)
    score = "" if score == "-" else f", score {score}"
    facts = (
        f"{layer.shape}, energy {layer.or_nan(number(numbers.energy, 4))}, "
        f"ratio {layer.or_nan(number(numbers.ratio, 3))}{score}, "
        f"smallest angle {layer.or_nan(degrees(numbers.min_angle))}."
    )
    if layer.rank != "-":
        facts += (
            f" Effective rank {layer.rank}, of as many random vectors "
            f"{number(layer.random_rank, 1)}: e to the entropy of the squared singular values."
        )
    if repr(layer.measure) != repr(found.measure):
        facts += f" Measured by {layer.measure!r}."
    if layer.sampling:
        facts += f" {layer.sampling}."
    figures = ""
    if drawn:
        figures = _angles(layer) + _singular_values(layer) + _heat_map(layer)
        figures = f'<div class="charts">{figures}</div>'
    state = " open" if unfolded else ""
    return (
        f'<details class="layer"{state}>'
        f"<summary><b>{breakable(layer.name)}</b> "
        f"<span class=soft>{escape(layer.finding)}</span></summary>"
        f'<div class="inside" id="layer-{i}"><p class="soft">{escape(facts)}</p>'
        f"{figures}"
        f"{_similar(layer, found.similar_above)}{_groups(layer)}{_dead(layer)}</div></details>\n"
    )


def breakable(name: str) -> str:
    """A name, escaped, that may go to the next line after a dot or an underscore.

    Example:
        >>> breakable("blocks.{0..11}.v_proj")
        'blocks.<wbr>{0..11}.<wbr>v_<wbr>proj'
    """
    return _BREAK.sub(r"\1<wbr>", escape(name))


def breakable_words(text: str) -> str:
    """A text, escaped, whose names may be broken as by :func:`breakable`, but not its numbers.

    Example:
        >>> breakable_words("layer.0 rose (0.95 -> 1.02x).")
        'layer.<wbr>0 rose (0.95 -&gt; 1.02x).'
    """
    words = []
    for word in text.split(" "):
        if _NUMBER.fullmatch(word):
            words.append(escape(word))
        else:
            words.append(breakable(word))
    return " ".join(words)


def degrees(angle: float) -> str:
    """An angle in degrees; "-" for NaN."""
    if math.isnan(angle):
        return "-"
    return number(angle, 1) + "°"


def _figure(title: str, picture: str, caption: str) -> str:
    return f"<figure><h3>{title}</h3>{picture}<figcaption>{caption}</figcaption></figure>"


def _angles(layer: LayerReport) -> str:
    """The histogram of angles."""
    title = "Angles between neurons"
    pairs = sum(layer.angles)
    if pairs == 0:
        return _figure(title, "", "No pairs: no group has two live neurons.")
    within = ""
    if layer.uniformity.groups > 1:
        within = " within the groups"
    caption = (
        f"{counted(pairs, 'pair')}{within}, in parts of {180 / len(layer.angles):g}°; "
        "the axis of counts is logarithmic."
    )
    return _figure(title, angle_chart(layer), caption)


def _singular_values(layer: LayerReport) -> str:
    """The chart of singular values."""
    title = "Singular values"
    values = layer.singular_values
    if not values:
        reason = "the layer is too large" if layer.live else "no neuron is live"
        return _figure(title, "", f"Not computed: {reason}.")
    upper = layer.edges[1]
    above = sum(value > upper for value in values)
    groups = ""
    if layer.uniformity.groups > 1:
        groups = " of all groups together"
    caption = (
        f"Of the neurons at length 1{groups}: {above:,} of {len(values):,} {_is(above)} above the "
        f"upper edge {upper:.2f} of random vectors; the largest is {values[0]:.2f}."
    )
    return _figure(title, singular_chart(layer), caption)


def _heat_map(layer: LayerReport) -> str:
    """The picture of cosines."""
    title = "Cosines"
    shown = len(layer.shown)
    if shown < 2:
        return _figure(title, "", "Fewer than two live neurons to compare.")
    beside_diagonal = layer.cosines[~layer.cosines.new_ones(shown, shown).tril().bool()]
    extremes = f"from {float(beside_diagonal.min()):.2f} to {float(beside_diagonal.max()):.2f}"
    label = f"Cosines between {shown} neurons, {extremes} beside the diagonal"
    data = base64.b64encode(heat_map_png(layer.cosines)).decode("ascii")
    picture = (
        f'<img class="heat" width="{shown}" height="{shown}" alt="{label}" '
        f'src="data:image/png;base64,{data}">'
    )
    order = ", ".join(map(str, layer.shown))
    caption = (
        f"{_which(layer)}, each followed by the most similar one left. Orange: positive, blue: "
        f"negative; the stronger, the larger. Beside the diagonal they go {extremes}."
        f"<details><summary>Their indices in this order</summary>{order}</details>"
    )
    return _figure(title, picture, caption)


def _which(layer: LayerReport) -> str:
    """Which neurons a heat map shows."""
    shown = len(layer.shown)
    whose = ""
    all_live = round(layer.live)
    if layer.uniformity.groups > 1:
        whose = " of the group with the most near-duplicate pairs"
        all_live = layer.uniformity.neurons
    if shown < HEAT_MAP_SIZE or shown == all_live:
        return f"All {shown} neurons{whose} that are not zero"
    return f"The {shown} neurons{whose} that are nearest to another, of {all_live:,}"


def _similar(layer: LayerReport, similar_above: float) -> str:
    """The nearest pairs by index."""
    sign = "" if layer.full_space else ", whatever its sign,"
    cosine = f"cosine{sign} of {similar_above:g} or more"
    if layer.similar == 0:
        return f'<p class="soft">No near-duplicate pairs ({cosine}).</p>'
    title = f"{counted(layer.similar, 'near-duplicate pair')} ({cosine})"
    if layer.opposite > 0:
        title += f"; {layer.opposite:,} of them point opposite ways"
    shown = layer.pairs[:_LISTED]
    items = ""
    for pair in shown:
        items += f"<li>{_pair(pair, layer.uniformity.groups)}</li>"
    rest = ""
    more = layer.similar - len(shown)
    if more > 0:
        rest = f'<p class="soft">and {more:,} more</p>'
    return f"<h3>{title}</h3><ul class=pairs>{items}</ul>{rest}"


def _pair(pair: SimilarPair, groups: int) -> str:
    names = f"{pair.first} and {pair.second}"
    if groups > 1:
        names = f"group {pair.group}: {names}"
    angle = f"{pair.angle:.2f}°"
    if pair.angle > 90.0:
        angle += " opposite"
    return f"<span>{names}</span><span>{angle}</span>"


def near_duplicates(layer: LayerReport) -> str:
    """Near-duplicate neurons of a layer and their groups, for a cell."""
    if not layer.group_count or not layer.all_counted:
        return layer.in_groups
    return f"{layer.grouped:,} in {counted(layer.group_count, 'group')}"


def _groups(layer: LayerReport) -> str:
    """The largest groups of near-duplicates by index; a pair alone stands among the pairs."""
    if layer.redundant <= 1:
        return ""
    items = ""
    shown = layer.groups[:_LISTED]
    for group in shown:
        where = f"group {group.group}: " if layer.uniformity.groups > 1 else ""
        items += (
            f"<li><span>{where}{members(group)}</span>"
            f"<span>cosine to the first from {group.cosine:.4f}</span></li>"
        )
    rest = ""
    more = layer.group_count - len(shown)
    if more > 0:
        rest = f'<p class="soft">and {more:,} more</p>'
    title = "Groups that these pairs connect"
    if not layer.all_counted:
        title += ", at least"
    return f"<h3>{title}</h3><ul class=groups>{items}</ul>{rest}"


def _dead(layer: LayerReport) -> str:
    """The dead neurons by index."""
    if layer.dead == 0:
        return ""
    return (
        f'<p class="soft">{counted(layer.dead, "dead neuron")}, '
        f"zero or next to nothing: {dead_members(layer, _LISTED)}.</p>"
    )
