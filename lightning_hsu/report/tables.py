"""Tables for a terminal: in colour if rich is installed, otherwise plain."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

from lightning_hsu._monitor.fold import fold_names
from lightning_hsu._monitor.render import Line, shorten, wrapped
from lightning_hsu._monitor.summary import lines_about_notes, lines_about_skips
from lightning_hsu._monitor.text import (
    AS_RANDOM,
    RULE,
    SCORE,
    column_widths,
    counted,
    in_groups,
    number,
    score_text,
    table_lines,
    without_empty,
)
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu._neurons.select import EXCLUDED, NOT_INCLUDED
from lightning_hsu.report.comparison_data import ComparisonData, LayerComparison
from lightning_hsu.report.data import (
    LayerReport,
    ReportData,
    SimilarGroup,
    known_ratios,
    layer_named,
)
from lightning_hsu.report.drift import drift_line, error_text

if TYPE_CHECKING:
    from rich.console import Console

_FULL_SPACE = "* in full space, where opposite neurons are far apart"
_ANGLE = "angle: the smallest between two neurons, in degrees"
_RATIO = "ratio: energy over that of random neurons"
_RANK = (
    "rank: effective rank of the neurons at length 1, e to the entropy of their squared singular "
    "values"
)
_SIMILAR = "similar: near-duplicate neurons, in so many groups"
_MOVED = "moved: median angle between a neuron before and after, in degrees"
SAMPLES = (
    "+-: standard error of a ratio's change, where it is of samples; ~: a change of at most three of "
    "these, which is none that the samples tell"
)
"""A line under a comparison with ratios of samples."""

_LONGEST_NAME = 60  # of a layer in a table that is not fitted to a terminal
_SHORTEST_NAME = 16
_SHORTEST_FINDING = 24  # that a name makes room for
_SHORT_FINDING = 36  # that a column makes room for
_SHAPED_FINDING = 14  # that a shape makes room for: "near-duplicate"
_NARROWEST = 10  # columns of a finding
_MEMBERS = 40  # neurons of a group that are listed


class Column(NamedTuple):
    """A column of a table.

    Args:
        heading: Its name.
        right: Whether cells are aligned on the right, as numbers are.
        spare: How important it is where not all columns fit, from 1 for the least; 0 if it always
            stays.
    """

    heading: str
    right: bool = False
    spare: int = 0


class Legend(NamedTuple):
    """What a column shows, below the table.

    Args:
        heading: The column.
        text: What it shows, beginning with the heading.
    """

    heading: str
    text: str


def _headings(columns: Sequence[Column]) -> tuple[str, ...]:
    return tuple(column.heading for column in columns)


_REPORT_COLUMNS = (
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
_REPORT_LEGENDS = (
    Legend("ratio", f"{_RATIO}; {_ANGLE}"),
    Legend("rank", _RANK),
    Legend("similar", _SIMILAR),
    Legend("score", SCORE),
)
_COMPARISON_COLUMNS = (
    Column("layer"),
    Column("neurons x dim", right=True),
    Column("moved", right=True),
    Column("ratio", right=True),
    Column("angle", right=True, spare=2),
    Column("similar", right=True, spare=3),
    Column("dead", right=True, spare=1),
    Column("finding after"),
)
_COMPARISON_LEGENDS = (
    Legend("moved", _MOVED),
    Legend("ratio", _RATIO),
    Legend("angle", _ANGLE),
    Legend("similar", _SIMILAR),
)


@dataclass(frozen=True)
class Table:
    """Rows for a terminal.

    Args:
        columns: Their columns, the name of the layer first and the finding last.
        rows: Cells.
        first: Lines under the table, above the legends.
        legends: What columns show; those of columns that are left out are not shown.
        below: Lines below these.
        left_out: Headings of the columns that are left out, in their order.
    """

    columns: tuple[Column, ...]
    rows: list[tuple[str, ...]]
    first: list[str]
    legends: tuple[Legend, ...]
    below: list[str]
    left_out: tuple[str, ...] = ()

    def under(self) -> list[str]:
        """All lines under the table."""
        headings = _headings(self.columns)
        lines = list(self.first)
        for legend in self.legends:
            if legend.heading in headings:
                lines += wrapped(Line(legend.text))
        lines += self.below
        if self.left_out:
            names = ", ".join(self.left_out)
            lines += wrapped(Line(f"left out of this narrow table: {names}"))
        return lines

    def reworded(self, change: Callable[[str], str]) -> Table:
        """The table with other words in the lines under it.

        Args:
            change: Makes another line of a line.
        """
        first = [change(line) for line in self.first]
        return replace(self, first=first, below=[change(line) for line in self.below])

    def with_heading(self) -> list[tuple[str, ...]]:
        """The rows with the heading above them."""
        return [_headings(self.columns), *self.rows]

    def width(self) -> int:
        """The width of the table, with two spaces between columns."""
        widths = column_widths(self.with_heading())
        return sum(widths) + 2 * (len(widths) - 1)

    def without(self, places: Collection[int]) -> Table:
        """The table without some of its columns; a line under it names them."""
        shown = []
        left_out = []
        for i, column in enumerate(self.columns):
            shown.append(i not in places)
            if i in places:
                left_out.append(column.heading)
        return replace(
            self,
            columns=tuple(compress(self.columns, shown)),
            rows=[tuple(compress(row, shown)) for row in self.rows],
            left_out=tuple(left_out),
        )

    def with_names(self, width: int) -> Table:
        """The table with names of so many characters at most, cut in the middle."""
        rows = []
        for name, *others in self.rows:
            bare = name.removesuffix(_STAR)
            star = name[len(bare) :]
            rows.append((abbreviated(bare, width - len(star)) + star, *others))
        return replace(self, rows=rows)

    def fitted(self, width: int) -> Table:
        """The table for a terminal of so many columns; its findings may need several lines.

        As many columns are left out as it takes, the least important first. If that is not enough,
        names are cut, and at last the shapes are left out.
        """
        if self.width() <= width:
            return self
        spare = [i for i, column in enumerate(self.columns) if column.spare > 0]
        spare.sort(key=lambda i: -self.columns[i].spare)  # the most important first
        left_out = set(spare)
        table = self.without(left_out)
        for i in spare:
            wider = self.without(left_out - {i})
            if wider.fits(width, _SHORT_FINDING):
                left_out.remove(i)
                table = wider
        if table.fits(width, _SHORT_FINDING):
            return table
        cut = table.with_names(max(table.room_for_names(width), _SHORTEST_NAME))
        if cut.fits(width, _SHAPED_FINDING):
            return cut
        table = self.without(left_out | {1})
        return table.with_names(max(table.room_for_names(width), _SHORTEST_NAME))

    def fits(self, width: int, finding: int) -> bool:
        """Whether so many columns are enough if findings may be folded to ``finding`` columns."""
        widths = column_widths(self.with_heading())
        needed = sum(widths[:-1]) + min(widths[-1], finding) + 2 * (len(widths) - 1)
        return needed <= width

    def room_for_names(self, width: int) -> int:
        """Columns of so many that are left for names if findings are folded."""
        widths = column_widths(self.with_heading())
        finding = min(widths[-1], _SHORTEST_FINDING)
        return width - sum(widths[1:-1]) - finding - 2 * (len(widths) - 1)


def abbreviated(name: str, width: int) -> str:
    """A dotted name in so many characters: longer parts become shorter, numbers and the end stay.

    Example:
        >>> abbreviated("transformer.encoder.blocks.7.attention.proj", 30)
        'tra.encoder.blocks.7.att.proj'
        >>> abbreviated("transformer.encoder.blocks.7.attention.proj", 16)
        't.e.b.7.att.proj'
    """
    parts = name.split(".")
    for letters in (3, 1):
        places = list(range(len(parts) - 1))
        places.sort(key=lambda place: -len(parts[place]))  # the longest first
        for place in places:
            if len(".".join(parts)) > width and not parts[place].isdecimal():
                parts[place] = parts[place][:letters]
    return shorten(".".join(parts), width)


_STAR = " *"  # of a layer that is measured in full space, unlike others


def report_table(found: ReportData, top: int | None = None) -> Table:
    """The table of a report.

    Args:
        found: The report.
        top: How many layers to show, the worst first: those with NaN or infinite weights, then by
            ratio; None shows all in the model's order.
    """
    layers = list(found.layers)
    mixed = _mixed(layers)
    hidden: list[LayerReport] = []
    if top is not None:
        layers.sort(key=_badness, reverse=True)
        layers, hidden = layers[:top], layers[top:]
    first = []
    if hidden:
        first += wrapped(Line(_hidden(hidden, len(found.layers))))
    for text in (_summary(found), *unjudged(found.layers)):
        first += wrapped(Line(text))
    headings = _headings(_REPORT_COLUMNS)
    rows = [headings]
    for layer in layers:
        rows.append(_report_row(layer, mixed))
    rows = without_empty(rows, "score")
    columns = []
    for column in _REPORT_COLUMNS:
        if column.heading in rows[0]:
            columns.append(column)
    below = []
    if any(layer.as_random for layer in layers):
        below.append(RULE)
    if any(row[0].endswith(_STAR) for row in rows):
        below.append(_FULL_SPACE)
    for layer in found.layers:
        if layer.sampling:
            below += wrapped(Line(f"note: {layer.name}: {layer.sampling}"))
    for line in (*lines_about_notes(found.notes), *_skip_lines(found.skips)):
        below += wrapped(line)
    return Table(tuple(columns), rows[1:], first, _REPORT_LEGENDS, below)


def short(source: str) -> str:
    """The name of a source with at most 60 characters."""
    return shorten(source, _LONGEST_NAME)


def _skip_lines(skips: Sequence[Skip]) -> list[Line]:
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
            folded = fold_names(names).removesuffix(f" ({len(names):,})")
            lines.append(f"{counted(len(names), 'layer')} {has} {what}: {folded}")
    return lines


def _mixed(layers: Sequence[LayerReport]) -> bool:
    """Whether some layers are measured in full space and some are not."""
    return len({layer.full_space for layer in layers}) > 1


def _report_row(layer: LayerReport, mixed: bool) -> tuple[str, ...]:
    numbers = layer.uniformity
    energy = "-"
    if not math.isnan(numbers.ratio):
        energy = number(numbers.energy, 4)
    ratio = number(numbers.ratio, 3)
    angle = number(numbers.min_angle, 1)
    if numbers.nonfinite > 0:
        energy = ratio = angle = "NaN"
    return (
        _name(layer, mixed),
        layer.shape,
        energy,
        ratio,
        score_text(numbers.score),
        angle,
        layer.rank,
        layer.in_groups,
        f"{layer.dead:,}",
        layer.finding,
    )


def _name(layer: LayerReport, mixed: bool) -> str:
    """The name of a layer, with a star if it is measured in full space, unlike others."""
    if mixed and layer.full_space:
        return layer.name + _STAR
    return layer.name


def pair_lines(found: ReportData, most: int) -> list[str]:
    """The nearest pairs of each layer by index; no line is longer than 80 columns."""
    lines = []
    for layer in found.layers:
        name = layer_named(layer.name)
        listed = layer.pairs[:most]
        for pair in listed:
            names = f"{pair.first} and {pair.second}"
            if layer.uniformity.groups > 1:
                names = f"group {pair.group}: {names}"
            line = f"{name}: {names}, {pair.angle:.2f} degrees"
            if pair.angle > 90.0 and layer.measure.half_space:
                line += " (opposite)"
            lines += wrapped(Line(line))
        more = layer.similar - len(listed)
        if layer.pairs and more > 0:
            lines += wrapped(Line(f"{name}: and {more:,} more"))
    if not lines:
        return ["no near-duplicate pairs"]
    return lines


def group_lines(found: ReportData, most: int) -> list[str]:
    """The largest groups of near-duplicates of each layer by index, in 80 columns."""
    lines = []
    for layer in found.layers:
        name = layer_named(layer.name)
        listed = layer.groups[:most]
        for group in listed:
            where = f"group {group.group}: " if layer.uniformity.groups > 1 else ""
            line = (
                f"{name}: {where}{len(group.neurons):,} near-duplicates: "
                f"{members(group)}; cosine to the first from {group.cosine:.4f}"
            )
            lines += wrapped(Line(line))
        more = layer.group_count - len(listed)
        if layer.groups and more > 0:
            lines += wrapped(Line(f"{name}: and {counted(more, 'more group')}"))
    if not lines:
        return ["no near-duplicate neurons"]
    return lines


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


def comparison_table(found: ComparisonData) -> Table:
    """The table of a comparison."""
    mixed = _mixed([one.after for one in found.layers])
    rows = [_comparison_row(one, mixed) for one in found.layers]
    first = []
    if found.matched:
        first += wrapped(Line(found.matched))
    if found.drift is not None:
        first += wrapped(Line(drift_line(found.drift)))
    below = []
    if any(one.ratio_error > 0.0 for one in found.layers):
        below += wrapped(Line(SAMPLES))
    for name, note in found.notes:  # with the numbers of each layer, so that none are folded
        below += wrapped(Line(f"note: {name}: {note}"))
    if any(one.after.as_random for one in found.layers):
        below.append(RULE)
    if mixed:
        below.append(_FULL_SPACE)
    only_before, only_after = only_names(found)
    lines = _only_line("before", only_before, found.before)
    lines += _only_line("after", only_after, found.after)
    for line in (*lines, *notes_of_both(found), *_skips_of_both(found)):
        below += wrapped(line)
    return Table(_COMPARISON_COLUMNS, rows, first, _COMPARISON_LEGENDS, below)


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
    lines = _skip_lines(one.skips)
    if lines:
        lines[0] = _when(when, lines[0])
    return lines


def _when(when: str, line: Line) -> Line:
    """A line of a network with when it holds."""
    return replace(line, text=f"{when}, {line.text}")


def _comparison_row(one: LayerComparison, mixed: bool) -> tuple[str, ...]:
    before = one.before.uniformity
    after = one.after.uniformity
    return (
        _name(one.after, mixed),
        change(one.before.shape, one.after.shape),
        number(one.moved, 1),
        ratio_change(one),
        change(number(before.min_angle, 1), number(after.min_angle, 1)),
        change(one.before.in_groups, one.after.in_groups),
        change(f"{one.before.dead:,}", f"{one.after.dead:,}"),
        one.after.finding,
    )


def ratio_change(one: LayerComparison) -> str:
    """The ratio before and after; of samples with "~" where they do not tell a change."""
    text = change(number(one.before.ratio, 3), number(one.after.ratio, 3))
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


def plain(table: Table, width: int | None = None) -> str:
    """The table in plain text, at its full width, or with findings folded to fit another.

    Args:
        table: The table.
        width: Columns of the terminal; None is as wide as it needs, but cuts very long names.
    """
    if width is None:
        table = table.with_names(_LONGEST_NAME)
    else:
        table = table.fitted(width)
    rows = table.with_heading()
    if width is not None:
        widths = column_widths(rows)
        rows = _folded(rows, width - sum(widths[:-1]) - 2 * (len(widths) - 1))
    right = [i for i, column in enumerate(table.columns) if column.right]
    return "\n".join([*table_lines(rows, right=right), *table.under()])


def _folded(rows: Sequence[tuple[str, ...]], width: int) -> list[tuple[str, ...]]:
    """Rows whose last cell takes as many lines as it needs in so many characters."""
    found: list[tuple[str, ...]] = []
    for *cells, last in rows:
        first, *others = textwrap.wrap(last, max(width, _NARROWEST), break_on_hyphens=False) or [""]
        found.append((*cells, first))
        for other in others:
            found.append((*[""] * len(cells), other))
    return found


def show(table: Table) -> None:
    """Print a table: in a terminal fitted to its width, in colour with rich; else plain."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(plain(table, width))
        return
    console = Console()
    if not console.is_terminal:
        print(plain(table))
        return
    _show_rich(table.fitted(console.width), console)


def _show_rich(table: Table, console: Console) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in table.columns:
        grid.add_column(
            column.heading,
            justify="right" if column.right else "left",
            overflow="fold",
            no_wrap=column.right or column is table.columns[0],
        )
    for row in table.rows:
        cells = []
        for cell in row:
            cells.append(Text(cell, style=_style(cell)))
        grid.add_row(*cells)
    console.print(grid)
    for line in table.under():
        console.print(Text(line, style="dim"))


def _style(cell: str) -> str:
    """The colour of a finding: dim if as random, yellow if pairs, dead or infinite neurons."""
    if cell.startswith(AS_RANDOM) and "," not in cell:
        return "dim"
    if "near-duplicate" in cell or cell.endswith((" dead", "infinite")):
        return "yellow"
    return ""


def table_html(table: Table, title: str) -> str:
    """The table for a notebook, in the colors of the page, so that it can be light or dark."""
    parts = [
        f'<div style="overflow-x:auto"><div><b>{escape(title)}</b></div>',
        '<table style="border-collapse:collapse;margin:0.5em 0"><thead>',
        _row_html("th", table.columns, _headings(table.columns)),
        "</thead><tbody>",
    ]
    for row in table.rows:
        parts.append(_row_html("td", table.columns, row))
    parts.append("</tbody></table>")
    for line in table.under():
        indent = len(line) - len(line.lstrip(" "))
        style = f"padding-left:{indent}ch;opacity:0.75;overflow-wrap:anywhere"
        parts.append(f'<div style="{style}">{escape(line.strip())}</div>')
    parts.append("</div>")
    return "\n".join(parts)


def _row_html(tag: str, columns: Sequence[Column], cells: Sequence[str]) -> str:
    parts = []
    for column, cell in zip(columns, cells, strict=True):
        align = "right" if column.right else "left"
        style = f"text-align:{align};padding:0.2em 0.6em"
        parts.append(f'<{tag} style="{style}">{escape(cell)}</{tag}>')
    return f"<tr>{''.join(parts)}</tr>"
