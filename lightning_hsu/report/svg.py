"""Axes of charts, and the few marks of SVG that charts are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Axis:
    """From values to places.

    Args:
        low: The value at ``start``.
        high: The value at ``stop``.
        start: Place of the lowest value.
        stop: Place of the highest.
        kind: "linear", "log", or "log1p", which is close to log and has a place for 0.
    """

    low: float
    high: float
    start: float
    stop: float
    kind: str = "linear"

    def __call__(self, value: float) -> float:
        """The place of a value, within the axis."""
        low, at, high = (self._bent(x) for x in (self.low, value, self.high))
        part = (at - low) / (high - low)
        return self.start + (self.stop - self.start) * min(max(part, 0.0), 1.0)

    def _bent(self, value: float) -> float:
        if self.kind == "linear":
            return value
        return math.log1p(max(value, 0.0)) if self.kind == "log1p" else math.log(max(value, 1e-300))

    def ticks(self, most: int = 6) -> list[float]:
        """Round values on the axis, not many."""
        if self.kind == "log1p":
            return [0.0, *_thinned(_decades(1.0, self.high, (1.0,)), most - 1)]
        if self.kind == "log":
            for steps in ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0)):
                if len(found := _decades(self.low, self.high, steps)) <= most:
                    return found
            return _thinned(_decades(self.low, self.high, (1.0,)), most)
        return _round_steps(self.low, self.high, most)


def _decades(low: float, high: float, steps: tuple[float, ...]) -> list[float]:
    """The steps times powers of ten in [low, high]."""
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [value for e in exponents for step in steps if low <= (value := step * 10.0**e) <= high]


def _thinned(values: list[float], most: int) -> list[float]:
    return values[:: -(-len(values) // most)] if values else []


def _round_steps(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(
        step * power
        for step in (1.0, 2.0, 5.0, 10.0, 20.0)
        if (high - low) / (step * power) <= most - 1
    )
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def short(value: float) -> str:
    """A number as a label of an axis."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.4g}M"
    return f"{value / 1e3:.4g}k" if abs(value) >= 1e4 else f"{value:.4g}"


def place(value: float) -> str:
    """A place, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def text(x: float | str, y: float, content: str, *, end: str = "start", kind: str = "") -> str:
    """Text that starts at, ends at or has its "middle" at (x, y)."""
    at = x if isinstance(x, str) else place(x)
    css = f' class="{kind}"' if kind else ""
    return f'<text x="{at}" y="{place(y)}" text-anchor="{end}"{css}>{escape(content)}</text>'


def line(x1: float | str, y1: float, x2: float | str, y2: float, kind: str) -> str:
    """A line of a kind."""
    start, stop = (x if isinstance(x, str) else place(x) for x in (x1, x2))
    return f'<line x1="{start}" y1="{place(y1)}" x2="{stop}" y2="{place(y2)}" class="{kind}"/>'


def circle(x: str, y: float, radius: float, kind: str) -> str:
    """A disc of a kind."""
    return f'<circle cx="{x}" cy="{place(y)}" r="{radius}" class="{kind}"/>'


def path(points: list[tuple[float, float]], kind: str) -> str:
    """A line through points."""
    steps = " ".join(f"{place(x)},{place(y)}" for x, y in points)
    return f'<polyline points="{steps}" class="{kind}"/>'


def figure(name: str, size: tuple[int, int], marks: list[str]) -> str:
    """A chart that grows with its box, with its name for those who cannot see it."""
    label = escape(name)
    body = "".join(marks)
    return f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{label}"><title>{label}</title>{body}</svg>'
