"""Tables for a terminal: in colours where rich is there, else plain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_hsu.monitor import LayerUniformity

if TYPE_CHECKING:
    from lightning_hsu.report.analysis import LayerReport
    from lightning_hsu.report.reports import Report


@dataclass(frozen=True)
class Rows:
    """A table.

    Args:
        columns: Names; those of numbers begin with ">".
        rows: Cells.
        below: Lines under it.
    """

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    below: list[str]


def report_rows(found: Report) -> Rows:
    """The table of a report."""
    columns = ("layer", ">neurons x dim", ">energy", ">ratio", ">score", ">angle", ">pairs", ">dead", "finding")
    return Rows(columns, [_row(layer) for layer in found.layers], _below(found))


def _row(layer: LayerReport) -> tuple[str, ...]:
    one = layer.uniformity
    return (
        one.name + (" *" if layer.full_space else ""),
        shape_of(one),
        number(one.energy, 4),
        number(one.ratio, 3),
        number(one.score, 2),
        number(one.min_angle, 1),
        f"{layer.similar:,}",
        f"{layer.dead:,}",
        layer.finding,
    )


def _below(found: Report) -> list[str]:
    lines: list[str] = []
    return lines


def shape_of(one: LayerUniformity) -> str:
    """Shape of a layer, as a user writes it."""
    size = f"{one.neurons} x {one.dimension}"
    return size if one.groups == 1 else f"{one.groups} of {size}"


def number(x: float, digits: int) -> str:
    """A number for a cell; a dash for NaN."""
    return "-" if math.isnan(x) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.{digits}f}"


def plain_table(table: Rows) -> str:
    """The table in plain text."""
    heads = [name.lstrip(">") for name in table.columns]
    widths = [max(len(row[i]) for row in [heads, *table.rows]) for i in range(len(heads))]
    lines = [_line(heads, table.columns, widths), "  ".join("-" * width for width in widths)]
    lines += [_line(row, table.columns, widths) for row in table.rows]
    return "\n".join(lines + table.below)


def _line(cells: Sequence[str], columns: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if name.startswith(">") else cell.ljust(width)
        for cell, name, width in zip(cells, columns, widths, strict=True)
    ]
    return "  ".join(padded).rstrip()
