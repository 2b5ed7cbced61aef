"""Charts of a report in SVG: ratios by layer, angles between pairs, singular values; each beside random vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lightning_hsu._core import expected_angles
from lightning_hsu._monitor.text import number
from lightning_hsu.report.analysis import LayerReport
from lightning_hsu.report.curves import random_singular_values
from lightning_hsu.report.svg import Axis, figure, line, path, place, short, text

_WIDTH, _HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 352.0, 28.0, 204.0
_POINTS = 200  # singular values that are drawn
_TALL = 210  # of the chart of ratios, in pixels
_NAMED = 3  # of the highest ratios
_WORDS = 0.25  # of a wide page's width: no name is longer


def ratio_chart(layers: Sequence[LayerReport]) -> str:
    """Ratios by layer, in the model's order, each a link to its layer; across the page whatever its width.

    Places along the layers are in percent, so that text keeps its size on a phone.
    """
    ratios = [
        (i, one.uniformity.ratio)
        for i, one in enumerate(layers)
        if not math.isnan(one.uniformity.ratio)
    ]
    axis = ratio_axis(layers)
    marks = [line("0", axis(tick), "100%", axis(tick), "grid") for tick in axis.ticks()]
    marks += [text(-8, axis(tick) + 4, short(tick), end="end") for tick in axis.ticks()]
    marks.append(line("0", axis(1.0), "100%", axis(1.0), "random"))
    places = {i: f"{100 * (i + 0.5) / len(layers):.2f}%" for i, _ in ratios}
    size = 4.5 if len(layers) <= 60 else 3.0
    marks += [_dot(i, layers[i], places[i], axis, size) for i, _ in ratios]
    marks.append(text("100%", axis(1.0) + 17, "as random", end="end", kind="halo"))
    marks += _names_of_highest(layers, ratios, axis)
    label = escape(f"Ratio of {len(ratios)} layers in the model's order; 1 is as random")
    body = "".join(marks)
    return f'<svg class="wide" height="{_TALL}" role="group" aria-label="{label}"><title>{label}</title>{body}</svg>'


def ratio_axis(layers: Sequence[LayerReport]) -> Axis:
    """An axis with 1 on it, by logarithms where the largest ratio is above 3; what is infinite goes to its end."""
    finite = [one.uniformity.ratio for one in layers if math.isfinite(one.uniformity.ratio)]
    low, high = min([0.95, *finite]), max([1.05, *finite])
    if high > 3.0 and low > 0.0:
        return Axis(low / 1.1, high * 1.15, _TALL - 24, 24, "log")
    room = 0.08 * (high - low)
    return Axis(low - room, high + room, _TALL - 24, 24)


def _dot(i: int, layer: LayerReport, at: str, axis: Axis, size: float) -> str:
    ratio = layer.uniformity.ratio
    kind = (
        "even"
        if layer.as_random
        else "above"
        if layer.above
        else "below"
        if ratio < 0.98
        else "even"
    )
    label = escape(f"{layer.name}: {number(ratio, 3)}")
    stem = line(at, axis(1.0), at, axis(ratio), f"stem {kind}")
    dot = f'<circle cx="{at}" cy="{place(axis(ratio))}" r="{size}" class="{kind}"/>'
    return f'<a href="#layer-{i}" tabindex="-1" aria-label="{label}"><title>{label}</title>{stem}{dot}</a>'


def _names_of_highest(
    layers: Sequence[LayerReport], ratios: list[tuple[int, float]], axis: Axis
) -> list[str]:
    """Names at the highest ratios, where they do not cover each other."""
    marks: list[str] = []
    taken: list[tuple[float, float]] = []
    for i, ratio in sorted(ratios, key=lambda one: -one[1])[:_NAMED]:
        height, part = axis(ratio) - 9, (i + 0.5) / len(layers)
        level = [place for place, other in taken if abs(height - other) < 15]
        if not layers[i].above or any(abs(part - place) < _WORDS for place in level):
            continue
        taken.append((part, height))
        end = "start" if part < 0.3 else "middle" if part < 0.7 else "end"  # within a phone
        words = f"{shortened(layers[i].name, 24)} {number(ratio, 2)}"
        kind = "halo minor" if level else "halo"  # on a phone there is no room for two
        marks.append(text(f"{100 * part:.2f}%", height, words, end=end, kind=kind))
    return marks


def shortened(name: str, most: int) -> str:
    """A name without its middle where it is longer than so many characters."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - half]}…{name[-half:]}"


def angle_chart(layer: LayerReport) -> str:
    """How many pairs have which angle, beside as many pairs of uniform vectors."""
    bins, pairs = len(layer.angles), sum(layer.angles)
    expected = expected_angles(pairs, layer.uniformity.dimension, bins).tolist()
    width = 180.0 / bins
    x, y = (
        Axis(0.0, 180.0, _LEFT, _RIGHT),
        Axis(0.0, max(1.0, *layer.angles, *expected) * 1.1, _BOTTOM, _TOP, "log1p"),
    )
    marks = _grid(y, "pairs")
    marks += [text(x(t), _BOTTOM + 15, f"{t}°", end="middle") for t in range(0, 181, 30)]
    marks.append(text((_LEFT + _RIGHT) / 2, _HEIGHT - 4, "angle between two neurons", end="middle"))
    marks.append(_bars(layer.angles, x, y, width))
    marks.append(
        path([(x(width * (i + 0.5)), y(count)) for i, count in enumerate(expected)], "curve")
    )
    marks += _key(bars=True)
    return figure(
        f"Angles between the {pairs:,} pairs of neurons, beside uniform random vectors",
        (_WIDTH, _HEIGHT),
        marks,
    )


def _bars(counts: Sequence[int], x: Axis, y: Axis, width: float) -> str:
    """Bars side by side, as one outline."""
    steps = "".join(
        f"V{place(y(count))}H{place(x((i + 1) * width))}" for i, count in enumerate(counts)
    )
    return f'<path d="M{place(_LEFT)},{place(_BOTTOM)}{steps}V{place(_BOTTOM)}" class="bars"/>'


def singular_chart(layer: LayerReport) -> str:
    """Singular values, falling, beside the law of as many random unit vectors and its ends."""
    values, (low, high) = layer.singular_values, layer.edges
    chosen = sampled(len(values), _POINTS)
    x = Axis(0.0, float(len(values)), _LEFT, _RIGHT)
    y = Axis(0.0, max(high, values[0]) * 1.08, _BOTTOM, _TOP)
    chances = [1.0 - (i + 0.5) / len(values) for i in chosen]
    law = random_singular_values(layer.live, layer.uniformity.dimension, chances)
    below = y(low) + 12  # where no value is, for the first is large
    marks = _grid(y, "singular value")
    marks += [line(_LEFT, y(edge), _RIGHT, y(edge), "edge") for edge in (low, high)]
    marks.append(
        path([(x(i + 0.5), y(value)) for i, value in zip(chosen, law, strict=True)], "curve")
    )
    marks.append(_values([(x(i + 0.5), y(values[i])) for i in chosen]))
    marks.append(text(_RIGHT, y(high) - 4, f"upper edge {high:.2f}", end="end", kind="halo"))
    marks.append(
        text(
            _LEFT + 4,
            below if below < _BOTTOM else y(low) - 4,
            f"lower edge {low:.2f}",
            kind="halo",
        )
    )
    marks += [
        text(x(rank - 0.5), _BOTTOM + 15, f"{rank:,}", end="middle") for rank in {1, len(values)}
    ]
    marks.append(text((_LEFT + _RIGHT) / 2, _HEIGHT - 4, "rank", end="middle"))
    marks += _key(bars=False)
    return figure(
        f"{len(values):,} singular values, beside those of as many random vectors",
        (_WIDTH, _HEIGHT),
        marks,
    )


def sampled(count: int, most: int) -> list[int]:
    """At most so many of the indices below count, evenly spread, both ends among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _values(points: list[tuple[float, float]]) -> str:
    """A line through the values, with a dot at each where they are few."""
    dots = (
        "".join(f'<circle cx="{place(x)}" cy="{place(y)}" r="2.5"/>' for x, y in points)
        if len(points) <= 40
        else ""
    )
    return path(points, "values") + f'<g class="dots">{dots}</g>'


def _grid(y: Axis, name: str) -> list[str]:
    marks = [line(_LEFT, y(tick), _RIGHT, y(tick), "grid") for tick in y.ticks()]
    marks += [text(_LEFT - 6, y(tick) + 4, short(tick), end="end") for tick in y.ticks()]
    return [*marks, text(2, 12, name)]


def _key(*, bars: bool) -> list[str]:
    """What is what, above the marks: shapes differ, not only colours."""
    own = (
        '<rect x="150" y="3" width="14" height="10" class="bars"/>'
        if bars
        else line(148, 8, 166, 8, "values")
    )
    return [
        own,
        text(170, 12, "this layer"),
        line(240, 8, 260, 8, "curve"),
        text(265, 12, "random vectors"),
    ]
