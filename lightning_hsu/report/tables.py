"""Tables for a terminal: in colours where rich is there, else plain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu._monitor.text import counted, number
from lightning_hsu._neurons.select import EXCLUDED, NOT_INCLUDED
from lightning_hsu.report.data import ComparisonData, LayerComparison, LayerReport, ReportData

if TYPE_CHECKING:
    from rich.console import Console

_STARRED = "* in full space, where opposite neurons are far apart"


@dataclass(frozen=True)
class Table:
    """Rows for a terminal.

    Args:
        columns: Their names; those of numbers begin with ">", those that a narrow terminal leaves out with "?".
        rows: Cells.
        below: Lines under the table.
    """

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    below: tuple[str, ...]

    @property
    def heads(self) -> list[str]:
        """The names as they are shown."""
        return [name.lstrip("?>") for name in self.columns]

    @property
    def widths(self) -> list[int]:
        """The width of each column."""
        return [
            max(len(row[i]) for row in [self.heads, *self.rows]) for i in range(len(self.columns))
        ]

    def narrow(self) -> Table:
        """Without the columns that can be spared, which a line below names."""
        kept = [i for i, name in enumerate(self.columns) if not name.startswith("?")]
        left_out = [name for i, name in enumerate(self.heads) if i not in kept]
        rows = [tuple(row[i] for i in kept) for row in self.rows]
        note = (f"left out of this narrow table: {', '.join(left_out)}",) if left_out else ()
        return replace(
            self,
            columns=tuple(self.columns[i] for i in kept),
            rows=rows,
            below=(*self.below, *note),
        )


def report_table(found: ReportData) -> Table:
    """The table of a report."""
    columns = (
        "layer",
        ">neurons x dim",
        "?>energy",
        ">ratio",
        "?>score",
        ">angle",
        "?>pairs",
        "?>dead",
        "finding",
    )
    return Table(
        columns, [_report_row(layer, _mixed(found)) for layer in found.layers], tuple(_below(found))
    )


def _mixed(found: ReportData) -> bool:
    """Whether some layers are measured in full space and some not."""
    return len({one.full_space for one in found.layers}) > 1


def _report_row(layer: LayerReport, mixed: bool) -> tuple[str, ...]:
    one = layer.uniformity
    numbers = (
        number(one.energy, 4),
        number(one.ratio, 3),
        number(one.score, 2),
        number(one.min_angle, 1),
    )
    return (
        _named(layer, mixed),
        shape_of(one),
        *numbers,
        f"{layer.similar:,}",
        f"{layer.dead:,}",
        layer.finding,
    )


def _named(layer: LayerReport, mixed: bool) -> str:
    return layer.name + (" *" if mixed and layer.full_space else "")


def _below(found: ReportData) -> list[str]:
    above, pairs = (
        [one for one in found.layers if one.above],
        sum(one.similar for one in found.layers),
    )
    chance = sum(one.as_random for one in above)
    lines = [
        f"{len(above)} of {counted(len(found.layers), 'layer')} more than 2 % above random"
        f"{f', {chance} of them as random layers may be' if chance else ''}; {counted(pairs, 'near-duplicate pair')} "
        f"(cosine from {found.similar_above:g}); {counted(sum(one.dead for one in found.layers), 'dead neuron')}",
        "ratio: energy over that of random neurons; angle: the smallest between two neurons, in degrees",
    ]
    return [*lines, *([_STARRED] if _mixed(found) else []), *skipped_lines(found)]


def skipped_lines(found: ReportData) -> list[str]:
    """What was left out, and why; what the caller's patterns leave out is only counted."""
    own = {
        reason: sum(skip.reason == reason for skip in found.skips)
        for reason in (NOT_INCLUDED, EXCLUDED)
    }
    counts = [f"  {count} {reason}" for reason, count in own.items() if count]
    lines = [
        f"  {skip.name} {'x'.join(map(str, skip.shape))}: {skip.reason}"
        for skip in found.skips
        if skip.reason not in own
    ]
    return [f"not measured ({len(found.skips)}):", *lines, *counts] if found.skips else []


def pair_lines(found: ReportData, most: int) -> list[str]:
    """The nearest pairs of each layer by index."""
    lines = []
    for layer in found.layers:
        for pair in layer.pairs[:most]:
            group = f"group {pair.group}: " if layer.uniformity.groups > 1 else ""
            lines.append(
                f"{layer.name}: {group}{pair.first} and {pair.second}, {pair.angle:.2f} degrees"
            )
        if layer.similar > min(most, len(layer.pairs)) and layer.pairs:
            lines.append(f"{layer.name}: and {layer.similar - min(most, len(layer.pairs)):,} more")
    return lines or ["no near-duplicate pairs"]


def comparison_table(found: ComparisonData) -> Table:
    """The table of a comparison."""
    columns = (
        "layer",
        ">neurons x dim",
        ">moved",
        ">ratio",
        "?>angle",
        "?>pairs",
        "?>dead",
        "finding after",
    )
    below = [
        "moved: median angle between a neuron before and after, in degrees; angle: smallest between two neurons"
    ]
    full = {one.after.full_space for one in found.layers}
    below += [_STARRED] if len(full) > 1 else []
    for when, only, one in (
        ("before", found.only_before, found.before),
        ("after", found.only_after, found.after),
    ):
        left_out = {skip.name for skip in (found.after if when == "before" else found.before).skips}
        names = [name for name in only if name not in left_out]
        below += [f"only {when} ({one.source}): {', '.join(names)}"] if names else []
        below += [
            f"{when}, {line}" if i == 0 else line for i, line in enumerate(skipped_lines(one))
        ]
    return Table(
        columns, [_comparison_row(one, len(full) > 1) for one in found.layers], tuple(below)
    )


def _comparison_row(one: LayerComparison, mixed: bool) -> tuple[str, ...]:
    before, after = one.before.uniformity, one.after.uniformity
    shape = (
        shape_of(after)
        if shape_of(before) == shape_of(after)
        else change(shape_of(before), shape_of(after))
    )
    return (
        _named(one.after, mixed),
        shape,
        number(one.moved, 1),
        change(number(before.ratio, 3), number(after.ratio, 3)),
        change(number(before.min_angle, 1), number(after.min_angle, 1)),
        change(f"{one.before.similar:,}", f"{one.after.similar:,}"),
        change(f"{one.before.dead:,}", f"{one.after.dead:,}"),
        one.after.finding,
    )


def change(before: str, after: str) -> str:
    """One cell of two, or of one where they are the same."""
    return before if before == after else f"{before} -> {after}"


def shape_of(one: LayerUniformity) -> str:
    """Shape of a layer, as a user writes it."""
    size = f"{one.neurons} x {one.dimension}"
    return size if one.groups == 1 else f"{one.groups} of {size}"


def plain(table: Table) -> str:
    """The table in plain text, as wide as it is."""
    widths = table.widths
    lines = [_line(table.heads, table.columns, widths), "  ".join("-" * width for width in widths)]
    lines += [_line(row, table.columns, widths) for row in table.rows]
    return "\n".join([*lines, *table.below])


def _line(cells: Sequence[str], columns: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if ">" in name else cell.ljust(width)
        for cell, name, width in zip(cells, columns, widths, strict=True)
    ]
    return "  ".join(padded).rstrip()


def show(table: Table) -> None:
    """Print the table: fitted to the terminal and in colours by rich, or plain into a pipe and without that package."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print(plain(table))
        return
    console = Console()
    if not console.is_terminal:
        print(plain(table))
        return
    if sum(table.widths) + 2 * len(table.widths) > console.width:
        table = table.narrow()
    _show_rich(table, console)


def _show_rich(table: Table, console: Console) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name, head in zip(table.columns, table.heads, strict=True):
        grid.add_column(
            head, justify="right" if ">" in name else "left", overflow="fold", no_wrap=">" in name
        )
    for row in table.rows:
        grid.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    console.print(grid)
    for line in table.below:
        console.print(Text(line, style="dim"))


def _style(cell: str) -> str:
    """Colours of a finding: quiet as random, plain otherwise, loud where pairs or dead neurons are counted in it."""
    if cell.startswith("as random") and "," not in cell:
        return "dim"
    return "yellow" if "near-duplicate" in cell or cell.endswith((" dead", "infinite")) else ""
