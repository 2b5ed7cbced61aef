"""What is measured of a model: the layers, the weights left out and why, as data and as a table."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from lightning_hsu._engine.layer import Layer
from lightning_hsu._monitor.fold import NO_BREAK, Pattern, fold, fold_names, fold_texts, place_of
from lightning_hsu._monitor.render import GIGA, SHAPE, WIDTH, Line, Row, View, printable
from lightning_hsu._monitor.text import counted, shape_of, weight_shape
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu.coefficients import Varying
from lightning_hsu.measures import Measure, Sampled

_MOST_ROWS = 40  # a table with more rows has one for all shapes of a pattern
_FIRST_ROWS = 30  # of a table that still has more than _MOST_ROWS
_MOST_SHAPES = 4  # of weights left out for one reason
_LONGEST_COEFFICIENT = 16  # in its column; a longer one is a remark
_COEFFICIENT = "coefficient"


@dataclass(frozen=True)
class LayerSummary:
    """One set of neurons that is measured.

    Args:
        name: Name of the layer.
        shape: (groups, neurons, dimension).
        is_head: Whether it is a class head.
        trainable: Whether gradients can reach its neurons.
        measure: How it is measured.
        head_reason: Why it is taken for a head, such as "declared"; "" if it is none.
        coefficient: The coefficient in words; "" if it is not known.
        giga_flops: Arithmetic of its penalty in each step, in 1e9 FLOP; 0 if it has none.
        note: What else a user may want to know; "" if nothing.
        in_buffer: Whether it is in a buffer, which something else than gradients moves.
    """

    name: str
    shape: tuple[int, int, int]
    is_head: bool
    trainable: bool
    measure: Measure
    head_reason: str = ""
    coefficient: str = ""
    giga_flops: float = 0.0
    note: str = ""
    in_buffer: bool = False

    @property
    def frozen(self) -> bool:
        """Whether its neurons stay as they are."""
        return not self.trainable and not self.in_buffer


@dataclass(frozen=True)
class Summary:
    """What is measured of a model, and what is not; ``print`` shows it as a table.

    Args:
        model: Name of the model's class.
        layers: The sets of neurons that are measured, in the model's order.
        skipped: Weights that are not measured.
        coverage: Measured entries as a part, 0 to 1, of those of all weight matrices; NaN if there
            are none.
        every_n_steps: The penalty is applied on every n-th step of each optimizer.
        tolerance: The relative error of gradients that are kept for several steps; None keeps none.
        limit: What limits the penalty beside the task, in words; "" for nothing.

    Example:
        >>> from lightning_hsu.measures import RieszEnergy
        >>> measure = RieszEnergy(s=2.0, half_space=True)
        >>> blocks = [
        ...     LayerSummary(f"blocks.{i}.{name}", (1, 64, 64), False, True, measure)
        ...     for i in range(12)
        ...     for name in ("q", "k", "v")
        ... ]
        >>> head = LayerSummary("head", (1, 10, 64), True, True, measure.for_head(), "declared")
        >>> print(Summary("Net", (*blocks, head), (), 1.0))
        Net: 37 layers measured
        measure: RieszEnergy(s=2.0, half_space=True)
        head: RieszEnergy(s=2.0)
        <BLANKLINE>
        layer                        neurons x dimension  remarks
        ---------------------------  -------------------  ---------------
        blocks.{0..11}.{q,k,v} (36)  64 x 64
        head                         10 x 64              head (declared)
        <BLANKLINE>
        measured: 100 % of the entries of all weight matrices
    """

    model: str
    layers: tuple[LayerSummary, ...]
    skipped: tuple[Skip, ...]
    coverage: float
    every_n_steps: int = 1
    tolerance: float | None = None
    limit: str = ""

    def __str__(self) -> str:
        """The table, at most 80 columns wide."""
        return _view(self).text()

    def __repr__(self) -> str:
        """The table, too: a prompt shows it."""
        return str(self)

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        return _view(self).html()


# Measures, coefficients and arithmetic in words.


def measure_text(measure: object) -> str:
    """A measure with its first setting and those that differ from their defaults.

    That of a sampled one is the measure that is sampled.

    Example:
        >>> from lightning_hsu.measures import RieszEnergy
        >>> measure_text(Sampled(RieszEnergy(s=1.0, half_space=True)))
        'RieszEnergy(s=1.0, half_space=True)'
    """
    if isinstance(measure, Sampled):
        measure = measure.measure
    if not is_dataclass(measure):
        return repr(measure)
    settings = []
    for i, field in enumerate(fields(measure)):
        setting = getattr(measure, field.name)
        if i == 0 or setting != field.default:
            settings.append(f"{field.name}={measure_text(setting)}")
    return f"{type(measure).__name__}({', '.join(settings)})"


def sampled_text(measure: Measure, neurons: int) -> str:
    """How the pairs of this many neurons are sampled; "" if all are counted.

    Example:
        >>> sampled_text(Sampled(), 20000)
        'sampled in 19 blocks of 1052'
    """
    if not isinstance(measure, Sampled):
        return ""
    blocks = measure.blocks(neurons)
    if blocks == 1:
        return ""
    return f"sampled in {blocks} blocks of {neurons // blocks}"


def coefficient_text(layer: Layer) -> str:
    """The coefficient, and why it has no effect on trainable neurons if it has none."""
    strength = layer.strength
    if isinstance(strength, Varying):
        text = strength.label()
    elif callable(strength):
        text = "schedule"
    else:
        text = f"{strength:g}"
    if strength == 0:
        text += " (monitor only)"
    reason = layer.idle_reason()
    if reason:
        text += f", {reason}"
    return text


def giga_flops(layer: Layer) -> float:
    """Arithmetic of one penalty gradient, in 1e9 FLOP; 0 if there is no penalty."""
    if layer.strength == 0 or layer.frozen:
        return 0.0
    return layer.grad_flops / 1e9


def giga_text(x: float) -> str:
    """A number of 1e9 FLOP for a table cell.

    Example:
        >>> [giga_text(x) for x in (0.0, 1e-5, 0.0123, 99.7, 12345.0)]
        ['0', '<0.001', '0.012', '100', '12,345']
    """
    if 0 < x < 1e-3:
        return "<0.001"
    if x < 99.5:
        return f"{x:.2g}"
    return f"{x:,.0f}"


# What is shown.


_Item = TypeVar("_Item", Summary, LayerSummary, Skip)


@dataclass(frozen=True)
class _Cells:
    """What a row says of a layer beside its name. Layers that are folded have the same."""

    shape: str
    coefficient: str
    remarks: str


def _view(summary: Summary) -> View:
    summary = replace(
        _printable(summary),
        layers=tuple(map(_printable, summary.layers)),
        skipped=tuple(map(_printable, summary.skipped)),
    )
    layers = summary.layers
    columns = [SHAPE]
    if any(layer.giga_flops > 0 for layer in layers):
        columns.append(GIGA)
    if len({layer.coefficient for layer in layers}) > 1:
        columns.append(_COEFFICIENT)
    of_head = _usual_measure(layers, heads=True)
    common = _usual_measure(layers, heads=False) or of_head

    above = [Line(_title(summary))]
    if common:
        above.append(Line(f"measure: {common}"))
    if of_head and of_head != common:
        above.append(Line(f"head: {of_head}"))
    if _COEFFICIENT not in columns and layers and layers[0].coefficient:
        above.append(Line(f"coefficient: {layers[0].coefficient}"))
    cells = []
    for layer in layers:
        usual = of_head if layer.is_head else common
        cells.append(_cells(layer, usual, with_coefficient=_COEFFICIENT in columns))
    rows, hidden = _rows(layers, cells, columns)
    below = [*_about_layers(summary), *lines_about_skips(summary.skipped), _coverage_line(summary)]
    return View(above, columns, rows, hidden, _FIRST_ROWS, below)


def _printable(item: _Item) -> _Item:
    """The same with texts that can be printed in columns."""
    texts: dict[str, Any] = {}
    for field in fields(item):
        value = getattr(item, field.name)
        if isinstance(value, str):
            texts[field.name] = printable(value)
    return replace(item, **texts)


def _measure(layer: LayerSummary) -> str:
    return printable(measure_text(layer.measure))


def _usual_measure(layers: Sequence[LayerSummary], *, heads: bool) -> str:
    """The measure of most heads or other layers, the first of several; "" if there is none."""
    counter = Counter(_measure(layer) for layer in layers if layer.is_head == heads)
    for measure, _ in counter.most_common(1):
        return measure
    return ""


def _title(summary: Summary) -> str:
    """The first line: the model, and how many of its weights are measured."""
    left_out = counted(len(summary.skipped), "weight")
    if not summary.layers and not summary.skipped:
        return f"{summary.model}: nothing is measured, since it has no weight matrix"
    if not summary.layers:
        return f"{summary.model}: nothing is measured, {left_out} left out"
    text = f"{summary.model}: {counted(len(summary.layers), 'layer')} measured"
    if summary.skipped:
        text += f", {left_out} not"
    return text


# Rows.


def _rows(
    layers: Sequence[LayerSummary], cells: list[_Cells], columns: Sequence[str]
) -> tuple[list[Row], str]:
    """The rows of the table, and a line about the layers that have none; "" if all have one."""
    names = [layer.name for layer in layers]
    patterns = fold(names, cells)
    if len(patterns) > _MOST_ROWS:
        cells = _with_ranges(layers, cells)
        patterns = fold(names, cells, loosely=True)
    rows = []
    hidden: list[LayerSummary] = []
    for i, pattern in enumerate(patterns):
        members = [layers[k] for k in pattern.members]
        if len(patterns) <= _MOST_ROWS or i < _FIRST_ROWS or members[0].is_head:
            rows.append(_row(pattern, members, cells[pattern.members[0]], columns))
        else:
            hidden += members
    return rows, _hidden_text(hidden)


def _cells(layer: LayerSummary, usual: str, *, with_coefficient: bool) -> _Cells:
    """The cells of a layer, with its measure among the remarks if that is not the usual one."""
    remarks = []
    if layer.is_head:
        remarks.append(f"head ({layer.head_reason})" if layer.head_reason else "head")
    if layer.frozen:
        remarks.append("frozen")
    measure = _measure(layer)
    if measure != usual:
        remarks.append(f"measure: {measure}")
    coefficient = reason = ""
    if with_coefficient:
        coefficient, _, reason = layer.coefficient.partition(", ")
    if len(coefficient) > _LONGEST_COEFFICIENT:
        coefficient, reason = "", f"coefficient: {layer.coefficient}"
    for remark in (sampled_text(layer.measure, layer.shape[1]), reason):
        if remark:
            remarks.append(remark)
    return _Cells(shape_of(*layer.shape), coefficient, "; ".join(remarks))


def _with_ranges(layers: Sequence[LayerSummary], cells: Sequence[_Cells]) -> list[_Cells]:
    """The cells with one shape, such as "16..96 x 32", for all layers at one place of blocks."""
    alike: dict[Hashable, list[int]] = {}
    for i, layer in enumerate(layers):
        key = (place_of(layer.name), layer.shape[0], cells[i].coefficient, cells[i].remarks)
        alike.setdefault(key, []).append(i)
    found = list(cells)
    for members in alike.values():
        groups, neurons, dimensions = zip(*(layers[i].shape for i in members), strict=True)
        shape = f"{_range(neurons)} x {_range(dimensions)}"
        if groups[0] > 1:
            shape = f"{groups[0]} groups of {shape}"
        for i in members:
            found[i] = replace(cells[i], shape=shape)
    return found


def _range(sizes: Sequence[int]) -> str:
    least, most = min(sizes), max(sizes)
    return str(most) if least == most else f"{least}..{most}"


def _row(
    pattern: Pattern, members: Sequence[LayerSummary], cells: _Cells, columns: Sequence[str]
) -> Row:
    values = [cells.shape]
    if GIGA in columns:
        values.append(giga_text(sum(layer.giga_flops for layer in members)))
    if _COEFFICIENT in columns:
        values.append(cells.coefficient)
    return Row(pattern.forms(), pattern.count(), values, cells.remarks)


def _hidden_text(layers: Sequence[LayerSummary]) -> str:
    """What is to be known of layers without a row; "" if there are none."""
    if not layers:
        return ""
    neurons = [layer.shape[0] * layer.shape[1] for layer in layers]
    words = [f"... and {counted(len(layers), 'more layer')}"]
    words.append(f"{min(neurons):,} to {max(neurons):,} neurons")
    frozen = sum(layer.frozen for layer in layers)
    if frozen:
        words.append(f"{frozen:,} of them frozen")
    giga = sum(layer.giga_flops for layer in layers)
    if giga > 0:
        words.append(f"{giga_text(giga)} {GIGA}")
    return ", ".join(words)


# Lines below the table.


def _about_layers(summary: Summary) -> list[Line]:
    """What the penalty costs, frozen layers and notes."""
    layers = summary.layers
    lines = []
    total = sum(layer.giga_flops for layer in layers)
    if total > 0:
        lines.append(Line(f"penalty: {giga_text(total)} {GIGA} in total"))
    if summary.every_n_steps > 1:
        lines.append(Line(f"applied every {summary.every_n_steps} steps of each optimizer"))
    if summary.tolerance is not None and total > 0:
        less = f"less, with gradients kept for several steps: tolerance {summary.tolerance:g}"
        lines.append(Line(less, indent=2))
    if summary.limit and total > 0:
        lines.append(Line(summary.limit))
    frozen = sum(layer.frozen for layer in layers)
    if frozen:
        count = counted(frozen, "layer")
        until = "until it trains" if frozen == 1 else "until they train"
        if frozen == len(layers) > 1:
            count = f"all {count}"
        lines.append(Line(f"{count} frozen: measured once, no penalty {until}"))
    return lines + lines_about_notes([(layer.name, layer.note) for layer in layers if layer.note])


def lines_about_notes(notes: Sequence[tuple[str, str]]) -> list[Line]:
    """What one should know of layers: pairs of a name and a note, folded where notes are alike.

    What is not of one layer has no name, and comes first.
    """
    lines = [Line(f"note: {note}") for name, note in notes if not name]
    of_layers = [(name, note) for name, note in notes if name]
    names = [name for name, _ in of_layers]
    for text, members in fold_texts(names, [note for _, note in of_layers]):
        patterns = _unbroken(fold_names([names[i] for i in members]))
        lines.append(Line(f"note: {patterns}: {text}"))
    return lines


def lines_about_skips(skips: Sequence[Skip]) -> list[Line]:
    """The weights that are not measured, by reason."""
    if not skips:
        return []
    lines = [Line(f"not measured ({len(skips):,}):")]
    names = [skip.name for skip in skips]
    reasons = [skip.reason for skip in skips]
    for text, members in fold_texts(names, reasons):
        lines += _reason_lines(text, [skips[i] for i in members])
    return lines


def _reason_lines(text: str, skips: Sequence[Skip]) -> list[Line]:
    """A reason, and below it the weights; all in one line if that is short."""
    names = [skip.name for skip in skips]
    shapes = [weight_shape(skip) for skip in skips]
    begin = f"{len(skips):,} {text}"
    # One pattern of all the names needs no number, since the line begins with it.
    patterns = _unbroken(fold_names(names).removesuffix(f" ({len(names):,})"))
    if len(skips) > 1 and len(set(shapes)) == 1 and shapes[0]:
        begin += f" (each {shapes[0]})"
    elif len(skips) <= _MOST_SHAPES and all(shapes):
        words = zip(names, shapes, strict=True)
        patterns = _unbroken(", ".join(f"{name} ({shape})" for name, shape in words))
    line = Line(f"{begin}: {patterns}", indent=2)
    if line.indent + len(line.text) <= WIDTH:
        return [line]
    return [Line(f"{begin}:", indent=2), Line(patterns, indent=6, hanging=6)]


def _unbroken(names: str) -> str:
    """Names and patterns that each stay in one line with what is in brackets behind them."""
    return re.sub("(?<!,) ", NO_BREAK, names)


def _coverage_line(summary: Summary) -> Line:
    """The last line: how much of the model is measured."""
    if not summary.layers:
        return Line("measured: none")
    percent = 100.0 * summary.coverage
    part = f"{min(percent, 99.9):.1f} %"
    if math.isnan(percent):
        part = "an unknown part"
    elif percent >= 100.0:
        part = "100 %"
    elif percent < 0.05:
        part = "less than 0.1 %"
    return Line(f"measured: {part} of the entries of all weight matrices")
