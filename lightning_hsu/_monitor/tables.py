"""The tables of a fit: its layers at the start, and their uniformity before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass

from lightning_hsu._engine.layer import Layer
from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu._monitor.text import finding, number, shape_of, skip_line, table_lines
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu._neurons.select import NOT_INCLUDED
from lightning_hsu.coefficients import Varying
from lightning_hsu.measures import Sampled

_START_COLUMNS = ("layer", "neurons x dimension", "measure", "GFLOP/step", "coefficient")
_COLUMNS = ("layer", "neurons x dim", "ratio", "score after", "smallest angle", "dead", "finding")
_NUMBERS = range(2, 6)  # columns of _COLUMNS that are aligned on the right


class BeforeAfter:
    """Keeps the first measurement of a fit and compares the last one with it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_hsu.regularizer import UniformityRegularizer
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
        >>> regularizer = UniformityRegularizer().attach(model)
        >>> before_after = BeforeAfter()
        >>> before_after.note(0, regularizer.measure_layers())
        >>> table = before_after.table(10, regularizer.layers, regularizer.measure_layers())
        >>> table.splitlines()[0]
        'Hyperspherical uniformity before and after, optimizer steps 0 to 10:'
    """

    def __init__(self) -> None:
        self._step = 0
        self._before: dict[str, LayerUniformity] = {}

    def note(self, step: int, measured: Sequence[LayerUniformity]) -> None:
        """Keep a measurement if it is the first.

        Args:
            step: Optimizer steps done.
            measured: The layers.
        """
        if not self._before:
            self._step = step
            self._before = {layer.name: layer for layer in measured}

    def table(self, step: int, layers: Sequence[Layer], measured: Sequence[LayerUniformity]) -> str:
        """The last measurement beside the first, one row for each layer.

        Args:
            step: Optimizer steps done.
            layers: The layers.
            measured: The same layers, measured at this step.
        """
        rows: list[tuple[str, ...]] = [_COLUMNS]
        for layer, after in zip(layers, measured, strict=True):
            rows.append(self._row(layer, after))
        steps = f"{self._step:,} to {step:,}"
        title = f"Hyperspherical uniformity before and after, optimizer steps {steps}:"
        return "\n".join([title, *table_lines(rows, right=_NUMBERS)])

    def _row(self, layer: Layer, after: LayerUniformity) -> tuple[str, ...]:
        before = self._before[after.name]
        return (
            after.name,
            shape_of(after.groups, after.neurons, after.dimension),
            f"{_ratio(before.ratio)} -> {_ratio(after.ratio)}",
            number(after.score, 2),
            f"{number(before.min_angle, 1)} -> {number(after.min_angle, 1)}",
            f"{after.dead:,}",
            finding(after, layer.measure),
        )


def _ratio(x: float) -> str:
    return number(x, 3 if x < 10 else 1)


def describe(layers: Sequence[Layer], skips: Sequence[Skip], every_n_steps: int = 1) -> str:
    """The table at the start of a fit: the layers, their measures and coefficients, and the skips.

    Args:
        layers: The layers.
        skips: Weights that are not measured.
        every_n_steps: The penalty is applied on every n-th step of each optimizer.
    """
    rows = [_START_COLUMNS]
    total = 0.0
    for layer in layers:
        giga_flops = _giga_flops(layer) / every_n_steps
        total += giga_flops
        rows.append(
            (
                layer.target.name,
                shape_of(*layer.target.shape),
                _measure_text(layer),
                _giga_text(giga_flops),
                _coefficient_text(layer),
            )
        )
    lines = table_lines(rows)
    lines.append(f"{_giga_text(total)} GFLOP/step in total")
    if skips:
        lines += _skip_lines(skips)
    if every_n_steps > 1:
        lines.append(f"applied every {every_n_steps} steps of each optimizer")
    return "\n".join(lines)


def _skip_lines(skips: Sequence[Skip]) -> list[str]:
    """List the weights that are not measured; those outside ``include`` share a line."""
    lines = [f"not measured ({len(skips)}):"]
    not_included = []
    for skip in skips:
        if skip.reason == NOT_INCLUDED:
            not_included.append(skip.name)
        else:
            lines.append(skip_line(skip))
    if not_included:
        lines.append(f"  {NOT_INCLUDED}: {', '.join(not_included)}")
    return lines


def _giga_flops(layer: Layer) -> float:
    """Arithmetic of one penalty gradient, in 1e9 FLOP; 0 for a layer that is only monitored."""
    if layer.strength == 0:
        return 0.0
    groups, n, d = layer.target.shape
    return groups * layer.measure.grad_flops(n, d) / 1e9


def _giga_text(x: float) -> str:
    if 0 < x < 1e-3:
        return "<0.001"
    if x < 100:
        return f"{x:.2g}"
    return f"{x:,.0f}"


def _measure_text(layer: Layer) -> str:
    measure = layer.measure
    head = " head" if layer.target.head else ""
    n = layer.target.shape[1]
    if isinstance(measure, Sampled) and measure.blocks(n) > 1:
        blocks = measure.blocks(n)
        sampled = f", sampled in {blocks} blocks of {n // blocks}"
        return f"{_settings_text(measure.measure)}{head}{sampled}"
    return f"{_settings_text(measure)}{head}"


def _settings_text(value: object) -> str:
    """A measure with its first setting and those that differ from their defaults."""
    if not is_dataclass(value):
        return repr(value)
    settings = []
    for i, field in enumerate(fields(value)):
        setting = getattr(value, field.name)
        if i == 0 or setting != field.default:
            settings.append(f"{field.name}={_settings_text(setting)}")
    return f"{type(value).__name__}({', '.join(settings)})"


def _coefficient_text(layer: Layer) -> str:
    """The coefficient, and why it has no effect if it has none."""
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
    if layer.frozen:
        text += ", no effect while frozen"
    return text
