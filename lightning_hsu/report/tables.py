"""Tables for a terminal: in colour if rich is installed, otherwise plain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

from lightning_hsu._monitor.text import (
    AS_RANDOM,
    column_widths,
    counted,
    number,
    skip_line,
    table_lines,
)
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu._neurons.select import EXCLUDED, NOT_INCLUDED
from lightning_hsu.report.data import (
    ComparisonData,
    LayerComparison,
    LayerReport,
    ReportData,
    folded_notes,
)

if TYPE_CHECKING:
    from rich.console import Console

_FULL_SPACE = "* in full space, where opposite neurons are far apart"


class Column(NamedTuple):
    """A column of a table.

    Args:
        heading: Its name.
        right: Whether cells are aligned on the right, as numbers are.
        wide_only: Whether a narrow terminal leaves the column out.
    """

    heading: str
    right: bool = False
    wide_only: bool = False


_REPORT_COLUMNS = (
    Column("layer"),
    Column("neurons x dim", right=True),
    Column("energy", right=True, wide_only=True),
    Column("ratio", right=True),
    Column("score", right=True, wide_only=True),
    Column("angle", right=True),
    Column("pairs", right=True, wide_only=True),
    Column("dead", right=True, wide_only=True),
    Column("finding"),
)
_COMPARISON_COLUMNS = (
    Column("layer"),
    Column("neurons x dim", right=True),
    Column("moved", right=True),
    Column("ratio", right=True),
    Column("angle", right=True, wide_only=True),
    Column("pairs", right=True, wide_only=True),
    Column("dead", right=True, wide_only=True),
    Column("finding after"),
)


@dataclass(frozen=True)
class Table:
    """Rows for a terminal.

    Args:
        columns: Their columns.
        rows: Cells.
        below: Lines under the table.
    """

    columns: tuple[Column, ...]
    rows: list[tuple[str, ...]]
    below: list[str]

    def with_heading(self) -> list[tuple[str, ...]]:
        """The rows with the heading above them."""
        return [tuple(column.heading for column in self.columns), *self.rows]

    def width(self) -> int:
        """The width of the table, with two spaces for each column."""
        return sum(column_widths(self.with_heading())) + 2 * len(self.columns)

    def narrow(self) -> Table:
        """The table for a narrow terminal; a line below names the columns it leaves out."""
        shown = []
        left_out = []
        for column in self.columns:
            shown.append(not column.wide_only)
            if column.wide_only:
                left_out.append(column.heading)
        note = f"left out of this narrow table: {', '.join(left_out)}"
        return Table(
            columns=tuple(compress(self.columns, shown)),
            rows=[tuple(compress(row, shown)) for row in self.rows],
            below=[*self.below, note],
        )


def report_table(found: ReportData) -> Table:
    """The table of a report."""
    mixed = _mixed(found.layers)
    rows = [_report_row(layer, mixed) for layer in found.layers]
    below = [
        _summary(found),
        "ratio: energy over that of random neurons; "
        "angle: the smallest between two neurons, in degrees",
    ]
    if mixed:
        below.append(_FULL_SPACE)
    below += [f"note: {name}: {note}" for name, note in folded_notes(found.notes)]
    below += skipped_lines(found.skips)
    return Table(_REPORT_COLUMNS, rows, below)


def _summary(found: ReportData) -> str:
    """How many layers are above random, and how many pairs and dead neurons they have."""
    above = 0
    by_chance = 0
    pairs = 0
    dead = 0
    for layer in found.layers:
        pairs += layer.similar
        dead += layer.dead
        if layer.above:
            above += 1
            by_chance += layer.as_random
    summary = f"{above} of {counted(len(found.layers), 'layer')} more than 2 % above random"
    if by_chance > 0:
        summary += f", {by_chance} of them within the range of random layers"
    return (
        f"{summary}; {counted(pairs, 'near-duplicate pair')} "
        f"(cosine from {found.similar_above:g}); {counted(dead, 'dead neuron')}"
    )


def _mixed(layers: Sequence[LayerReport]) -> bool:
    """Whether some layers are measured in full space and some are not."""
    return len({layer.full_space for layer in layers}) > 1


def _report_row(layer: LayerReport, mixed: bool) -> tuple[str, ...]:
    numbers = layer.uniformity
    return (
        _name(layer, mixed),
        layer.shape,
        number(numbers.energy, 4),
        number(numbers.ratio, 3),
        number(numbers.score, 2),
        number(numbers.min_angle, 1),
        f"{layer.similar:,}",
        f"{layer.dead:,}",
        layer.finding,
    )


def _name(layer: LayerReport, mixed: bool) -> str:
    """The name of a layer, with a star if it is measured in full space, unlike others."""
    if mixed and layer.full_space:
        return f"{layer.name} *"
    return layer.name


def skipped_lines(skips: Sequence[Skip]) -> list[str]:
    """What was left out, and why; what the caller's patterns left out is only counted."""
    if not skips:
        return []
    lines = [f"not measured ({len(skips)}):"]
    counts = {NOT_INCLUDED: 0, EXCLUDED: 0}
    for skip in skips:
        if skip.reason in counts:
            counts[skip.reason] += 1
        else:
            lines.append(skip_line(skip))
    for reason, count in counts.items():
        if count > 0:
            lines.append(f"  {count} {reason}")
    return lines


def pair_lines(found: ReportData, most: int) -> list[str]:
    """The nearest pairs of each layer by index."""
    lines = []
    for layer in found.layers:
        listed = layer.pairs[:most]
        for pair in listed:
            names = f"{pair.first} and {pair.second}"
            if layer.uniformity.groups > 1:
                names = f"group {pair.group}: {names}"
            lines.append(f"{layer.name}: {names}, {pair.angle:.2f} degrees")
        more = layer.similar - len(listed)
        if layer.pairs and more > 0:
            lines.append(f"{layer.name}: and {more:,} more")
    if not lines:
        return ["no near-duplicate pairs"]
    return lines


def comparison_table(found: ComparisonData) -> Table:
    """The table of a comparison."""
    mixed = _mixed([one.after for one in found.layers])
    rows = [_comparison_row(one, mixed) for one in found.layers]
    below = [
        "moved: median angle between a neuron before and after, in degrees; "
        "angle: smallest between two neurons"
    ]
    if mixed:
        below.append(_FULL_SPACE)
    below += _only_one_has("before", found.only_before, found.before, found.after)
    below += _only_one_has("after", found.only_after, found.after, found.before)
    return Table(_COMPARISON_COLUMNS, rows, below)


def _only_one_has(when: str, only: Sequence[str], one: ReportData, other: ReportData) -> list[str]:
    """Lines about the layers that only one of two networks has, and its skipped weights."""
    skipped_there = {skip.name for skip in other.skips}  # the other has these, but not measured
    names = [name for name in only if name not in skipped_there]
    lines = []
    if names:
        lines.append(f"only {when} ({one.source}): {', '.join(names)}")
    skipped = skipped_lines(one.skips)
    if skipped:
        skipped[0] = f"{when}, {skipped[0]}"
    return lines + skipped


def _comparison_row(one: LayerComparison, mixed: bool) -> tuple[str, ...]:
    before = one.before.uniformity
    after = one.after.uniformity
    return (
        _name(one.after, mixed),
        change(one.before.shape, one.after.shape),
        number(one.moved, 1),
        change(number(before.ratio, 3), number(after.ratio, 3)),
        change(number(before.min_angle, 1), number(after.min_angle, 1)),
        change(f"{one.before.similar:,}", f"{one.after.similar:,}"),
        change(f"{one.before.dead:,}", f"{one.after.dead:,}"),
        one.after.finding,
    )


def change(before: str, after: str) -> str:
    """Two cells as one text; a single one if they are the same."""
    if before == after:
        return before
    return f"{before} -> {after}"


def plain(table: Table) -> str:
    """The table in plain text, at its full width."""
    right = [i for i, column in enumerate(table.columns) if column.right]
    lines = table_lines(table.with_heading(), right=right)
    return "\n".join([*lines, *table.below])


def show(table: Table) -> None:
    """Print a table: in a terminal with rich, in colour and fitted to its width; else plain."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print(plain(table))
        return
    console = Console()
    if not console.is_terminal:
        print(plain(table))
        return
    if table.width() > console.width:
        table = table.narrow()
    _show_rich(table, console)


def _show_rich(table: Table, console: Console) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in table.columns:
        grid.add_column(
            column.heading,
            justify="right" if column.right else "left",
            overflow="fold",
            no_wrap=column.right,
        )
    for row in table.rows:
        cells = []
        for cell in row:
            cells.append(Text(cell, style=_style(cell)))
        grid.add_row(*cells)
    console.print(grid)
    for line in table.below:
        console.print(Text(line, style="dim"))


def _style(cell: str) -> str:
    """The colour of a finding: dim if as random, yellow if pairs, dead or infinite neurons."""
    if cell.startswith(AS_RANDOM) and "," not in cell:
        return "dim"
    if "near-duplicate" in cell or cell.endswith((" dead", "infinite")):
        return "yellow"
    return ""
