"""Axes of charts, and the few SVG elements that charts are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_LOG_STEPS = ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0))  # finest first


@dataclass(frozen=True)
class Axis:
    """Maps values to places.

    Args:
        low: The value at ``start``.
        high: The value at ``stop``.
        start: Place of the lowest value.
        stop: Place of the highest value.
        kind: "linear", "log", or "log1p", which is nearly logarithmic and has a place for 0.
    """

    low: float
    high: float
    start: float
    stop: float
    kind: str = "linear"

    def __call__(self, value: float) -> float:
        """The place of a value; values beyond the axis go to its ends."""
        low = self._scaled(self.low)
        high = self._scaled(self.high)
        part = (self._scaled(value) - low) / (high - low)
        return self.start + (self.stop - self.start) * min(max(part, 0.0), 1.0)

    def _scaled(self, value: float) -> float:
        if self.kind == "log1p":
            return math.log1p(max(value, 0.0))
        if self.kind == "log":
            return math.log(max(value, 1e-300))
        return value

    def ticks(self, most: int = 6) -> list[float]:
        """Round values on the axis, not many more than ``most``."""
        if self.kind == "log1p":
            return [0.0, *_thinned(_decades(1.0, self.high), most - 1)]
        if self.kind == "log":
            for steps in _LOG_STEPS:
                found = _decades(self.low, self.high, steps)
                if len(found) <= most:
                    return found
            return _thinned(_decades(self.low, self.high), most)
        return _round_steps(self.low, self.high, most)


def _decades(low: float, high: float, steps: Sequence[float] = (1.0,)) -> list[float]:
    """The steps times powers of ten in [low, high]."""
    values = []
    for exponent in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1):
        for step in steps:
            value = step * 10.0**exponent
            if low <= value <= high:
                values.append(value)
    return values


def _thinned(values: list[float], most: int) -> list[float]:
    """At most ``most`` of the values, evenly spread, including the first."""
    if not values:
        return []
    return values[:: math.ceil(len(values) / most)]


def _round_steps(low: float, high: float, most: int) -> list[float]:
    """Multiples in [low, high] of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = 20.0 * power
    for digit in (10.0, 5.0, 2.0, 1.0):
        if (high - low) / (digit * power) <= most - 1:
            step = digit * power
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number as a short label for a tick."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}"


def place(value: float | str) -> str:
    """A place to a tenth of a pixel; text, such as a percentage, stays as it is."""
    if isinstance(value, str):
        return value
    return f"{value:.1f}".removesuffix(".0")


def text(x: float | str, y: float, content: str, *, end: str = "start", kind: str = "") -> str:
    """Text with its "start", "middle" or "end" at (x, y)."""
    css = f' class="{kind}"' if kind else ""
    return f'<text x="{place(x)}" y="{place(y)}" text-anchor="{end}"{css}>{escape(content)}</text>'


def line(x1: float | str, y1: float, x2: float | str, y2: float, kind: str) -> str:
    """A line; ``kind`` is its CSS class."""
    ends = f'x1="{place(x1)}" y1="{place(y1)}" x2="{place(x2)}" y2="{place(y2)}"'
    return f'<line {ends} class="{kind}"/>'


def circle(x: str, y: float, radius: float, kind: str) -> str:
    """A disc; ``kind`` is its CSS class."""
    return f'<circle cx="{x}" cy="{place(y)}" r="{radius}" class="{kind}"/>'


def path(points: list[tuple[float, float]], kind: str) -> str:
    """A line through points."""
    steps = " ".join(f"{place(x)},{place(y)}" for x, y in points)
    return f'<polyline points="{steps}" class="{kind}"/>'


def figure(name: str, size: tuple[int, int], marks: list[str]) -> str:
    """A chart that scales with its box; its name is for those who cannot see it."""
    label = escape(name)
    width, height = size
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f"<title>{label}</title>{''.join(marks)}</svg>"
    )
