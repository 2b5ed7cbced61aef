"""Tables for a terminal: in colour if rich is installed, otherwise plain."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

from lightning_hsu._monitor.render import WIDTH, Line, shorten, wrapped
from lightning_hsu._monitor.text import AS_RANDOM, column_widths, table_lines

if TYPE_CHECKING:
    from rich.console import Console

_LONGEST_NAME = 60  # of a layer in a table that is not fitted to a terminal
_SHORTEST_NAME = 16
_SHORTEST_FINDING = 24  # that a name makes room for
_SHORT_FINDING = 36  # that a column makes room for
_SHAPED_FINDING = 14  # that a shape makes room for: "near-duplicate"
_NARROWEST = 10  # columns of a finding
_NARROWEST_TEXT = 20  # columns of the lines under a table

STAR = " *"
"""What follows the name of a layer that is measured in full space, unlike others."""


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


def headings_of(columns: Sequence[Column]) -> tuple[str, ...]:
    """The names of columns."""
    return tuple(column.heading for column in columns)


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
        names_cut: Whether any name is not whole.
        room: Columns of the terminal that it is fitted to; None if it is not.
        change: Makes another text of one of a line under it.
    """

    columns: tuple[Column, ...]
    rows: list[tuple[str, ...]]
    first: list[Line]
    legends: tuple[Legend, ...]
    below: list[Line]
    left_out: tuple[str, ...] = ()
    names_cut: bool = False
    room: int | None = None
    change: Callable[[str], str] = str

    def under(self) -> list[str]:
        """All lines under the table, at most as wide as the terminal and as 80 columns."""
        headings = headings_of(self.columns)
        lines = list(self.first)
        for legend in self.legends:
            if legend.heading in headings:
                lines.append(Line(legend.text))
        lines += self.below
        if self.names_cut:
            wider = "" if self.room is None else "a wider terminal or "
            lines.append(Line(f"some names are shortened; {wider}to_json() has them whole"))
        if self.left_out:
            names = ", ".join(self.left_out)
            lines.append(Line(f"left out of this narrow table: {names}"))
        found = []
        width = text_width(self.room)
        for line in lines:
            found += wrapped(replace(line, text=self.change(line.text)), width)
        return found

    def reworded(self, change: Callable[[str], str]) -> Table:
        """The table with other words in the lines under it.

        Args:
            change: Makes another text of that of a line.
        """
        return replace(self, change=change)

    def with_heading(self) -> list[tuple[str, ...]]:
        """The rows with the heading above them."""
        return [headings_of(self.columns), *self.rows]

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
        names_cut = self.names_cut
        for name, *others in self.rows:
            bare = name.removesuffix(STAR)
            star = name[len(bare) :]
            shown = abbreviated(bare, width - len(star))
            names_cut = names_cut or shown != bare
            rows.append((shown + star, *others))
        return replace(self, rows=rows, names_cut=names_cut)

    def fitted(self, width: int) -> Table:
        """The table for a terminal of so many columns; its findings may need several lines.

        As many columns are left out as it takes, the least important first. If that is not enough,
        names are cut, and at last the shapes are left out.
        """
        return replace(self._fitted(width), room=width)

    def _fitted(self, width: int) -> Table:
        """The columns and names that a terminal of so many columns has room for."""
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


def short(source: str) -> str:
    """The name of a source with at most 60 characters."""
    return shorten(source, _LONGEST_NAME)


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


def output_width() -> int | None:
    """Columns of the output: those that ``COLUMNS`` says, else those of a terminal; else None."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and len(columns) < 10 and int(columns) > 0:
        return int(columns)
    if sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return None


def text_width(columns: int | None) -> int:
    """Columns of lines of text: 80, or fewer in a narrower output.

    Example:
        >>> text_width(60), text_width(200), text_width(None)
        (60, 80, 80)
    """
    if columns is None:
        return WIDTH
    return max(min(WIDTH, columns), _NARROWEST_TEXT)


def show(table: Table) -> None:
    """Print a table, fitted to a terminal's width or ``COLUMNS``; in a terminal with rich in colour."""
    width = output_width()
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print(plain(table, width))
        return
    console = Console(width=width)
    if not console.is_terminal:
        print(plain(table, width))
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
        _row_html("th", table.columns, headings_of(table.columns)),
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
