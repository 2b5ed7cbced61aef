"""The part of a report's page on one layer."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from lightning_hsu._monitor.text import counted, number
from lightning_hsu.report.analysis import LayerReport, SimilarPair
from lightning_hsu.report.charts import angle_chart, singular_chart
from lightning_hsu.report.heatmap import data_address, heat_map_png
from lightning_hsu.report.tables import shape_of

if TYPE_CHECKING:
    from lightning_hsu.report.build import Report

_LISTED = 20  # pairs, and dead neurons


def layer_section(i: int, layer: LayerReport, found: Report, *, unfolded: bool) -> str:
    """All of layer i, folded unless said otherwise."""
    one = layer.uniformity
    other = f" Measured by {layer.measure!r}." if repr(layer.measure) != repr(found.measure) else ""
    facts = (
        f"{shape_of(one)}, energy {number(one.energy, 4)}, ratio {number(one.ratio, 3)}, score {number(one.score, 2)}, "
        f"smallest angle {_degrees(one.min_angle)}.{other}"
    )
    figures = "".join(
        _figure(*each) for each in (_angles(layer), _singular_values(layer), _heat_map(layer))
    )
    return (
        f'<details class="layer"{" open" if unfolded else ""}>'
        f"<summary><b>{breakable(layer.name)}</b> <span class=soft>{escape(layer.finding)}</span></summary>"
        f'<div class="inside" id="layer-{i}"><p class="soft">{escape(facts)}</p><div class="charts">{figures}</div>'
        f"{_similar(layer, found.similar_above)}{_dead(layer)}</div></details>\n"
    )


def breakable(name: str) -> str:
    """A name, escaped, that may go to the next line after a dot or an underscore."""
    return escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _degrees(angle: float) -> str:
    words = number(angle, 1)
    return words if words == "-" else words + "°"


def _figure(title: str, picture: str, caption: str) -> str:
    return f"<figure><h3>{title}</h3>{picture}<figcaption>{caption}</figcaption></figure>"


def _angles(layer: LayerReport) -> tuple[str, str, str]:
    title, pairs = "Angles between neurons", sum(layer.angles)
    if not pairs:
        return title, "", "No pairs: no group has two live neurons."
    within = " within the groups" if layer.uniformity.groups > 1 else ""
    caption = f"{counted(pairs, 'pair')}{within}, in parts of {180 / len(layer.angles):g}°; the axis of counts is logarithmic."
    return title, angle_chart(layer), caption


def _singular_values(layer: LayerReport) -> tuple[str, str, str]:
    title, values = "Singular values", layer.singular_values
    if not values:
        reason = "the layer is too large" if layer.live else "no neuron is live"
        return title, "", f"Not computed: {reason}."
    above = sum(value > layer.edges[1] for value in values)
    groups = " of all groups together" if layer.uniformity.groups > 1 else ""
    caption = (
        f"Of the neurons at length 1{groups}: {above:,} of {len(values):,} {'is' if above == 1 else 'are'} above the "
        f"upper edge {layer.edges[1]:.2f} of random vectors; the largest is {values[0]:.2f}."
    )
    return title, singular_chart(layer), caption


def _heat_map(layer: LayerReport) -> tuple[str, str, str]:
    title, shown = "Cosines", len(layer.shown)
    if shown < 2:
        return title, "", "Fewer than two live neurons to compare."
    others = layer.cosines[~layer.cosines.new_ones(shown, shown).tril().bool()]
    label = f"Cosines between {shown} neurons, from {float(others.min()):.2f} to {float(others.max()):.2f} beside the diagonal"
    address = data_address(heat_map_png(layer.cosines))
    picture = f'<img class="heat" width="{shown}" height="{shown}" alt="{label}" src="{address}">'
    order = ", ".join(str(i) for i in layer.shown)
    caption = (
        f"{_which(layer)}, each followed by the most similar one left. Orange: positive, blue: negative; the stronger, the "
        f"larger. Beside the diagonal they go from {float(others.min()):.2f} to {float(others.max()):.2f}."
        f"<details><summary>Their indices in this order</summary>{order}</details>"
    )
    return title, picture, caption


def _which(layer: LayerReport) -> str:
    """Which neurons a heat map shows."""
    shown, one = len(layer.shown), layer.uniformity
    whose = " of the group with the most near-duplicate pairs" if one.groups > 1 else ""
    every = one.neurons if one.groups > 1 else round(layer.live)
    if shown < 128 or shown == every:
        return f"All {shown} neurons{whose} that are not zero"
    return f"The {shown} neurons{whose} that are nearest to another, of {every:,}"


def _similar(layer: LayerReport, similar_above: float) -> str:
    """The nearest pairs by index."""
    cosine = (
        f"cosine{'' if layer.full_space else ', whatever its sign,'} of {similar_above:g} or more"
    )
    if not layer.similar:
        return f'<p class="soft">No near-duplicate pairs ({cosine}).</p>'
    shown = layer.pairs[:_LISTED]
    items = "".join(f"<li>{_pair(pair, layer.uniformity.groups)}</li>" for pair in shown)
    opposite = f"; {layer.opposite:,} of them point opposite ways" if layer.opposite else ""
    more = layer.similar - len(shown)
    rest = f'<p class="soft">and {more:,} more</p>' if more else ""
    title = f"{counted(layer.similar, 'near-duplicate pair')} ({cosine}){opposite}"
    return f"<h3>{title}</h3><ul class=pairs>{items}</ul>{rest}"


def _pair(pair: SimilarPair, groups: int) -> str:
    group = f"group {pair.group}: " if groups > 1 else ""
    opposite = " opposite" if pair.angle > 90.0 else ""
    return f"<span>{group}{pair.first} and {pair.second}</span><span>{pair.angle:.2f}°{opposite}</span>"


def _dead(layer: LayerReport) -> str:
    """The dead neurons by index."""
    if not layer.dead:
        return ""
    rows, one = layer.dead_rows[:_LISTED], layer.uniformity
    names = [
        str(row) if one.groups == 1 else f"{row % one.neurons} of group {row // one.neurons}"
        for row in rows
    ]
    more = layer.dead - len(rows)
    rest = f" and {more:,} more" if more else ""
    return f'<p class="soft">{counted(layer.dead, "dead neuron")}, zero or next to nothing: {", ".join(names)}{rest}.</p>'
