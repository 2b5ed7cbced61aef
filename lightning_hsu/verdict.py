"""How each layer stood before a fit and stands after it, in a table."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hsu.findings import finding, number
from lightning_hsu.monitor import Layer, LayerUniformity

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
        rows = [_COLUMNS, *(self._row(layer, after) for layer, after in zip(layers, measured, strict=True))]
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
    cells = (cell.rjust(w) if i in _NUMBERS else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
    return "  ".join(cells).rstrip()
