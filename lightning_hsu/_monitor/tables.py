"""The tables of a fit: what is measured at its start, and how each layer stood before and stands after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass

from lightning_hsu._engine.layer import Layer, idle_reason
from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu._monitor.text import finding, number
from lightning_hsu._neurons.select import NOT_INCLUDED, Skip
from lightning_hsu.coefficients import Varying
from lightning_hsu.measures import Sampled

_COLUMNS = ("layer", "neurons x dim", "ratio", "score after", "smallest angle", "dead", "finding")
_NUMBERS = range(2, 6)  # columns whose cells stand on the right


class Verdict:
    """Keeps the first measurement of a fit until its end.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_hsu.regularizer import UniformityRegularizer
        >>> model, verdict = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)), Verdict()
        >>> regularizer = UniformityRegularizer().attach(model)
        >>> verdict.note(0, regularizer.measure_layers())
        >>> table = verdict.table(10, regularizer.layers, regularizer.measure_layers())
        >>> table.splitlines()[0]
        'Hyperspherical uniformity before and after, optimizer steps 0 to 10:'
    """

    def __init__(self) -> None:
        self._step = 0
        self._before: dict[str, LayerUniformity] = {}

    def note(self, step: int, measured: Sequence[LayerUniformity]) -> None:
        """Keep what was measured after so many optimizer steps, if nothing was before."""
        if not self._before:
            self._step, self._before = step, {layer.name: layer for layer in measured}

    def table(self, step: int, layers: Sequence[Layer], measured: Sequence[LayerUniformity]) -> str:
        """The layers as they are after so many optimizer steps, beside the first measurement."""
        rows = [
            _COLUMNS,
            *(self._row(layer, after) for layer, after in zip(layers, measured, strict=True)),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        lines = [_line(row, widths) for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        title = f"Hyperspherical uniformity before and after, optimizer steps {self._step:,} to {step:,}:"
        return "\n".join([title, *lines])

    def _row(self, layer: Layer, after: LayerUniformity) -> tuple[str, ...]:
        before = self._before[after.name]
        size = f"{after.neurons} x {after.dimension}"
        return (
            after.name,
            size if after.groups == 1 else f"{after.groups} of {size}",
            f"{_ratio(before.ratio)} -> {_ratio(after.ratio)}",
            number(after.score, 2),
            f"{number(before.min_angle, 1)} -> {number(after.min_angle, 1)}",
            f"{after.dead:,}",
            finding(after, layer.measure),
        )


def _ratio(x: float) -> str:
    return number(x, 3 if x < 10 else 1)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (
        cell.rjust(w) if i in _NUMBERS else cell.ljust(w)
        for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def describe(layers: Sequence[Layer], skips: Sequence[Skip], every_n_steps: int = 1) -> str:
    """The table at the start of a fit: what is measured, how strongly, and what is not and why."""
    work = [_giga_flop(layer) / every_n_steps for layer in layers]
    rows = [("layer", "neurons x dimension", "measure", "GFLOP/step", "coefficient")]
    for layer, giga in zip(layers, work, strict=True):
        shape = _shape(layer.target.shape)
        rows.append(
            (
                layer.target.name,
                shape,
                _measure_name(layer),
                _short_number(giga),
                _strength_name(layer),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.append(f"{_short_number(sum(work))} GFLOP/step in all")
    if skips:
        lines.append(f"not measured ({len(skips)}):")
        named = [skip for skip in skips if skip.reason != NOT_INCLUDED]
        lines += [
            f"  {skip.name} {'x'.join(map(str, skip.shape))}: {skip.reason}" for skip in named
        ]
    if others := [skip.name for skip in skips if skip.reason == NOT_INCLUDED]:
        lines.append(f"  {NOT_INCLUDED}: {', '.join(others)}")
    if every_n_steps > 1:
        lines.append(f"applied on every {every_n_steps}th step of each optimizer")
    return "\n".join(lines)


def _giga_flop(layer: Layer) -> float:
    """Arithmetic of one penalty gradient in 1e9 FLOP; none where the coefficient is the number 0."""
    groups, n, d = layer.target.shape
    return groups * layer.measure.flop(n, d) / 1e9 if layer.strength != 0 else 0.0


def _short_number(x: float) -> str:
    return "<0.001" if 0 < x < 1e-3 else f"{x:.2g}" if x < 100 else f"{x:,.0f}"


def _shape(shape: tuple[int, int, int]) -> str:
    groups, n, d = shape
    return f"{n} x {d}" if groups == 1 else f"{groups} groups of {n} x {d}"


def _measure_name(layer: Layer) -> str:
    measure, n, note = layer.measure, layer.target.shape[1], ""
    if isinstance(measure, Sampled) and measure.blocks(n) > 1:
        note = f", sampled in {measure.blocks(n)} blocks of {n // measure.blocks(n)}"
        measure = measure.measure
    return f"{_short(measure)}{' head' if layer.target.head else ''}{note}"


def _short(value: object) -> str:
    """A measure with its first setting and those that are not at their default."""
    if not is_dataclass(value):
        return repr(value)
    own = [(field, getattr(value, field.name)) for field in fields(value)]
    shown = [
        f"{field.name}={_short(given)}"
        for i, (field, given) in enumerate(own)
        if i == 0 or given != field.default
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


def _strength_name(layer: Layer) -> str:
    if isinstance(layer.strength, Varying):
        text = layer.strength.label()
    else:
        text = "schedule" if callable(layer.strength) else f"{layer.strength:g}"
    if layer.strength == 0:
        text += " (monitor only)"
    idle = idle_reason(layer)
    text += f", {idle}" if idle else ""
    return f"{text}, frozen until it is unfrozen" if layer.frozen else text
