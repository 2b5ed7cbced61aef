"""A table with lines above and below it, as text of 80 columns and as HTML."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lightning_hsu._monitor.fold import NO_BREAK
from lightning_hsu._monitor.text import column_widths, table_lines

WIDTH = 80
"""Columns of the text."""

SHAPE = "neurons x dimension"
GIGA = "GFLOP/step"

_SHAPE_IF_NARROW = "neurons x dim"
_NARROWEST_NAMES = 40  # columns; remarks that leave less room stand below their row
_NARROWEST_REMARKS = 14  # columns, if one of them is longer
_MOST_LINES = 2  # of a remark in its column
_WIDE = "\0"  # follows a character that is two columns wide, so that len() counts columns


@dataclass(frozen=True)
class Row:
    """A row of the table. Its texts, and those of a line, are made by :func:`printable`.

    Args:
        names: The layer, or a pattern of several; then the same in less room.
        count: How many they are, in brackets; "" for one.
        values: The cells between the name and the remarks.
        remarks: What is special about them.
    """

    names: list[str]
    count: str
    values: list[str]
    remarks: str


@dataclass(frozen=True)
class Line:
    """A line of text, which may need to be wrapped."""

    text: str
    indent: int = 0
    hanging: int = 4  # the indent of all lines but the first


@dataclass(frozen=True)
class View:
    """What is shown.

    Args:
        above: Lines above the table.
        columns: Titles of the columns between the names and the remarks.
        rows: The rows.
        hidden: A line about layers without a row; "" if all have one.
        hidden_at: The number of rows above that line.
        below: Lines below the table.
    """

    above: list[Line]
    columns: list[str]
    rows: list[Row]
    hidden: str
    hidden_at: int
    below: list[Line]

    def text(self, width: int = WIDTH) -> str:
        """The view as text, whose lines above and below the table have at most so many columns."""
        lines: list[str] = []
        for line in self.above:
            lines += wrapped(line, width)
        if self.rows:
            lines += ["", *_table(self), ""]
        for line in self.below:
            lines += wrapped(line, width)
        return "\n".join(lines).replace(_WIDE, "")

    def html(self) -> str:
        """The view for a notebook, in the colors of the page, so that it can be light or dark."""
        parts = ['<div style="overflow-x:auto">', *map(_html_line, self.above)]
        if self.rows:
            parts += _html_table(self)
        parts += [*map(_html_line, self.below), "</div>"]
        return "\n".join(parts).replace(_WIDE, "")


def printable(text: str) -> str:
    """A text without line breaks and control characters, whose length is its width in columns."""
    if text.isascii() and text.isprintable():
        return text
    characters = []
    for character in unicodedata.normalize("NFC", text):
        if not character.isprintable():
            character = ascii(character)[1:-1]
        characters.append(character)
        if unicodedata.east_asian_width(character[0]) in "WF":
            characters.append(_WIDE)
    return "".join(characters)


# Text.


def wrapped(line: Line, width: int = WIDTH) -> list[str]:
    """A line as one or several, each at most as wide as the text; none if it is empty.

    Args:
        line: The line.
        width: Columns of the text.
    """
    words = [shorten(word, width - line.hanging) for word in line.text.split(" ")]
    lines = textwrap.wrap(
        " ".join(words),
        width,
        initial_indent=" " * line.indent,
        subsequent_indent=" " * line.hanging,
        break_on_hyphens=False,
    )
    return [one.replace(NO_BREAK, " ") for one in lines]


def shorten(text: str, width: int) -> str:
    """Cut a text in its middle, so that both ends can be read.

    Example:
        >>> shorten("encoder.layers.0.attention.query", 20)
        'encoder.l...on.query'
    """
    if len(text) <= width:
        return text
    width = max(width, 5)
    end = (width - 3) // 2
    begin = width - 3 - end
    left, right = text[:begin], text[-end:]
    # No wide character is cut from its mark.
    if text[begin] == _WIDE:
        left = left[:-1]
    return f"{left}...{right.removeprefix(_WIDE)}"


def _table(view: View) -> list[str]:
    """The lines of the table."""
    columns, name_width, remark_width = _layout(view)
    heading = ["layer", *columns]
    if remark_width:
        heading.append("remarks")
    cells = [heading]
    below: dict[int, list[str]] = {}  # lines that are no cells, by the number of cells above
    for i, row in enumerate(view.rows, start=1):
        values = [_fitting_name(row, name_width), *row.values]
        if remark_width:
            first, *others = _folded_remark(row.remarks, remark_width) or [""]
            cells.append([*values, first])
            cells += [[*[""] * len(values), other] for other in others]
        else:
            cells.append(values)
            below[len(cells)] = wrapped(Line(row.remarks, indent=4))
        if i == view.hidden_at:
            below.setdefault(len(cells), []).extend(wrapped(Line(view.hidden)))
    right = [i for i, title in enumerate(heading) if title == GIGA]
    title, rule, *rows = table_lines(cells, right=right)
    lines = [title, rule]
    for i, line in enumerate(rows, start=2):
        lines += [line, *below.get(i, [])]
    return lines


def _layout(view: View) -> tuple[list[str], int, int]:
    """Divide the columns of the text.

    Returns:
        The titles of the columns in the middle, the room for names, and that for remarks, 0 if they
        have to stand below their row.
    """
    longest = shortest = len("layer")
    remarks = [row.remarks for row in view.rows if row.remarks]
    for row in view.rows:
        longest = max(longest, len(row.names[0] + row.count))
        shortest = max(shortest, len(row.names[-1] + row.count))
    wide = _room(view, view.columns)
    columns = [_SHAPE_IF_NARROW if title == SHAPE else title for title in view.columns]
    narrow = _room(view, columns)
    if remarks:
        most = max(len("remarks"), *map(len, remarks))
        if longest + 2 + most <= wide:
            return view.columns, longest, most
        for names in (longest, min(shortest, _NARROWEST_NAMES)):
            width = min(most, narrow - 2 - names)
            enough = width >= min(most, _NARROWEST_REMARKS)
            if enough and all(_folded_remark(text, width) for text in remarks):
                return columns, narrow - 2 - width, width
    if longest <= wide:
        return view.columns, longest, 0
    return columns, narrow, 0


def _folded_remark(text: str, width: int) -> list[str]:
    """A remark as lines of its column; none if it would need too many."""
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    if len(lines) > _MOST_LINES or max(map(len, lines), default=0) > width:
        return []
    return lines


def _room(view: View, columns: Sequence[str]) -> int:
    """The columns of the text that are left for the names and the remarks."""
    widths = column_widths([columns, *(row.values for row in view.rows)])
    return WIDTH - sum(widths) - 2 * len(widths)


def _fitting_name(row: Row, width: int) -> str:
    """The name of a row in so many columns, always with its count."""
    room = width - len(row.count)
    for name in row.names:
        if len(name) <= room:
            return name + row.count
    return shorten(row.names[-1], room) + row.count


# HTML.


def _html_line(line: Line) -> str:
    style = f"padding-left:{line.indent}ch;overflow-wrap:anywhere"
    return f'<div style="{style}">{escape(line.text)}</div>'


def _html_table(view: View) -> list[str]:
    titles = ["layer", *view.columns]
    if any(row.remarks for row in view.rows):
        titles.append("remarks")
    parts = ['<table style="border-collapse:collapse;margin:0.5em 0"><thead>']
    parts += [_html_row("th", titles, titles), "</thead><tbody>"]
    for i, row in enumerate(view.rows, start=1):
        cells = [row.names[0] + row.count, *row.values, row.remarks]
        parts.append(_html_row("td", titles, cells[: len(titles)]))
        if view.hidden and i == view.hidden_at:
            parts.append(f'<tr><td colspan="{len(titles)}">{escape(view.hidden)}</td></tr>')
    parts.append("</tbody></table>")
    return parts


def _html_row(tag: str, titles: Sequence[str], cells: Sequence[str]) -> str:
    parts = []
    for title, cell in zip(titles, cells, strict=True):
        align = "right" if title == GIGA else "left"
        style = f"text-align:{align};overflow-wrap:anywhere"
        parts.append(f'<{tag} style="{style}">{escape(cell)}</{tag}>')
    return f"<tr>{''.join(parts)}</tr>"
