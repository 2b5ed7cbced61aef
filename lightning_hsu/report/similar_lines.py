"""Near-duplicates and dead neurons by index, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hsu._monitor.render import WIDTH, Line, wrapped
from lightning_hsu._monitor.text import counted, layer_named
from lightning_hsu.report.data import LayerReport, ReportData, SimilarGroup
from lightning_hsu.report.report_table import shown_and_hidden

_MEMBERS = 40  # neurons of a group, or dead ones, that are listed


def pair_lines(
    found: ReportData, most: int, width: int = WIDTH, top: int | None = None
) -> list[str]:
    """The nearest pairs of each layer by index, in lines of so many columns.

    Args:
        found: The report.
        most: How many pairs of a layer to list.
        width: Columns of the text.
        top: How many layers the table shows, the worst first; None is all.
    """
    lines = []
    layers, hidden = shown_and_hidden(found.layers, top)
    for layer in layers:
        name = layer_named(layer.name)
        listed = layer.pairs[:most]
        for pair in listed:
            names = f"{pair.first} and {pair.second}"
            if layer.uniformity.groups > 1:
                names = f"group {pair.group}: {names}"
            line = f"{name}: {names}, {pair.angle:.2f} degrees"
            if pair.angle > 90.0 and layer.measure.half_space:
                line += " (opposite)"
            lines += wrapped(Line(line), width)
        more = layer.similar - len(listed)
        if layer.pairs and more > 0:
            lines += wrapped(Line(f"{name}: and {more:,} more"), width)
    if not lines:
        return [f"no near-duplicate pairs{_where(hidden)}"]
    return lines


def group_lines(
    found: ReportData, most: int, width: int = WIDTH, top: int | None = None
) -> list[str]:
    """The largest groups of near-duplicates of each layer, and its dead neurons, by index.

    Arguments as for :func:`pair_lines`.
    """
    lines = []
    groups = 0
    layers, hidden = shown_and_hidden(found.layers, top)
    for layer in layers:
        name = layer_named(layer.name)
        listed = layer.groups[:most]
        for group in listed:
            where = f"group {group.group}: " if layer.uniformity.groups > 1 else ""
            chain = ""
            if group.cosine < found.similar_above:
                chain = " in a chain, each near another one but not all"
            line = (
                f"{name}: {where}{len(group.neurons):,} near-duplicates{chain}: "
                f"{members(group)}; cosine to the first from {group.cosine:.4f}"
            )
            lines += wrapped(Line(line), width)
        more = layer.group_count - len(listed)
        if layer.groups and more > 0:
            lines += wrapped(Line(f"{name}: and {counted(more, 'more group')}"), width)
        groups += layer.group_count
        if layer.dead > 0:
            lines += wrapped(Line(f"{name}: {layer.dead:,} dead: {dead_members(layer)}"), width)
    if groups == 0:
        lines.insert(0, f"no near-duplicate neurons{_where(hidden)}")
    return lines


def _where(hidden: Sequence[LayerReport]) -> str:
    """Where something was looked for, if some layers are not shown."""
    return " in the layers that are shown" if hidden else ""


def dead_members(layer: LayerReport, most: int = _MEMBERS) -> str:
    """The dead neurons of a layer by index, such as "11, 140 and 7 more"."""
    groups = layer.uniformity.groups
    n = layer.uniformity.neurons
    words = []
    for row in layer.dead_rows[:most]:
        words.append(str(row) if groups == 1 else f"{row % n} of group {row // n}")
    text = ", ".join(words)
    more = layer.dead - len(words)
    if more > 0:
        text += f" and {more:,} more"
    return text


def members(group: SimilarGroup) -> str:
    """The neurons of a group by index, those that point the opposite way named so.

    Example:
        >>> members(SimilarGroup(0, (3, 7, 9), (1, 1, -1), 0.99))
        '3, 7, 9 (opposite)'
    """
    words = []
    for neuron, sign in zip(group.neurons[:_MEMBERS], group.signs, strict=False):
        words.append(f"{neuron} (opposite)" if sign < 0 else str(neuron))
    text = ", ".join(words)
    more = len(group.neurons) - len(words)
    if more > 0:
        text += f" and {more:,} more"
    return text
