"""Charts of a report: ratios by layer, angles, singular values, cosines; beside random vectors."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from lightning_hsu._core import expected_angles
from lightning_hsu._monitor.text import number
from lightning_hsu.report.comparison_data import LayerComparison
from lightning_hsu.report.data import LayerReport, known_ratios
from lightning_hsu.report.svg import Axis, circle, figure, line, path, place, short, text
from lightning_hsu.report.tables import abbreviated

_WIDTH, _HEIGHT = 360, 240  # of a figure of one layer, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 352.0, 28.0, 204.0  # of its axes
_POINTS = 200  # the most singular values that are drawn
_LAW_STEPS = 2000  # points at which the law of singular values is summed
_RATIO_HEIGHT = 210  # of the chart of ratios, in pixels
_NAMED = 3  # number of highest ratios that get a name
_NAME_LETTERS = 24
_NAME_WIDTH = 0.25  # of the chart's width: no name is longer on a wide page

COSINE_STEPS = 16
"""Steps of the absolute cosine that a heat map shows."""

# Colours that can be told apart without telling red from green, on white and on black.
_POSITIVE = bytes((214, 96, 20))
_NEGATIVE = bytes((38, 118, 214))


def ratio_chart(layers: Sequence[LayerReport]) -> str:
    """Ratios by layer, in the model's order, each a link to its layer.

    The chart is as wide as the page. Horizontal positions are in percent, so that text keeps its
    size on a phone.
    """
    axis = ratio_axis(layers)
    marks = []
    radius = _radius(len(layers))
    for i, layer in enumerate(layers):
        if not math.isnan(layer.ratio):
            part = (i + 0.5) / len(layers)
            marks.append(_dot(i, layer, part, axis, radius))
    names = _names_of_highest(layers, axis)
    count = len(known_ratios(layers))
    label = f"Ratio of {count} layers in the model's order; 1 is as random"
    return _ratio_figure(label, axis, marks, names)


def change_chart(layers: Sequence[LayerComparison]) -> str:
    """Ratios before, as rings, and after, as dots, by layer; each a link to its layer."""
    axis = change_axis(layers)
    radius = _radius(len(layers))
    marks = []
    count = 0
    for i, one in enumerate(layers):
        if not math.isnan(one.after.ratio):
            count += 1
            marks.append(_change_mark(i, one, (i + 0.5) / len(layers), axis, radius))
    names = _names_of_highest([one.after for one in layers], axis)
    label = f"Ratio of {count} layers before and after, in the model's order; 1 is as random"
    return _ratio_figure(label, axis, marks, names)


def change_axis(layers: Sequence[LayerComparison]) -> Axis:
    """The axis of :func:`change_chart`."""
    return ratio_axis([*(one.before for one in layers), *(one.after for one in layers)])


def _ratio_figure(label: str, axis: Axis, marks: Sequence[str], names: Sequence[str]) -> str:
    """A chart of ratios as wide as the page: a grid, the line of random neurons, marks, names."""
    parts = []
    for tick in axis.ticks():
        parts.append(line("0", axis(tick), "100%", axis(tick), "grid"))
    for tick in axis.ticks():
        parts.append(text(-8, axis(tick) + 4, short(tick), end="end"))
    parts.append(line("0", axis(1.0), "100%", axis(1.0), "random"))
    parts += marks
    parts.append(text("100%", axis(1.0) + 17, "as random", end="end", kind="halo"))
    parts += names
    label = escape(label)
    return (
        f'<svg class="wide" height="{_RATIO_HEIGHT}" role="group" aria-label="{label}">'
        f"<title>{label}</title>{''.join(parts)}</svg>"
    )


def _radius(count: int) -> float:
    """The radius of the dots of so many layers."""
    return 4.5 if count <= 60 else 3.0


def ratio_axis(layers: Sequence[LayerReport]) -> Axis:
    """An axis that includes 1, logarithmic if the largest ratio is above 3.

    An infinite ratio is drawn at the end of the axis.
    """
    finite = [ratio for ratio in known_ratios(layers) if math.isfinite(ratio)]
    low = min([0.95, *finite])
    high = max([1.05, *finite])
    start = _RATIO_HEIGHT - 24
    stop = 24
    if high > 3.0 and low > 0.0:
        return Axis(low / 1.1, high * 1.15, start, stop, "log")
    room = 0.08 * (high - low)
    return Axis(low - room, high + room, start, stop)


def _dot(i: int, layer: LayerReport, part: float, axis: Axis, radius: float) -> str:
    """The mark of one layer at a part of the chart's width, a link to the layer's section."""
    at = f"{100 * part:.2f}%"
    height = axis(layer.ratio)
    kind = _kind(layer)
    label = escape(f"{layer.name}: {number(layer.ratio, 3)}")
    stem = line(at, axis(1.0), at, height, f"stem {kind}")
    dot = circle(at, height, radius, kind)
    return (
        f'<a href="#layer-{i}" tabindex="-1" aria-label="{label}">'
        f"<title>{label}</title>{stem}{dot}</a>"
    )


def _change_mark(i: int, one: LayerComparison, part: float, axis: Axis, radius: float) -> str:
    """The ring and the dot of one layer at a part of the chart's width, joined by a line."""
    at = f"{100 * part:.2f}%"
    height = axis(one.after.ratio)
    kind = _kind(one.after)
    before = number(one.before.ratio, 3)
    label = escape(f"{one.after.name}: {before} to {number(one.after.ratio, 3)}")
    ring = ""
    if not math.isnan(one.before.ratio):
        start = axis(one.before.ratio)
        ring = line(at, start, at, height, f"stem {kind}")
        ring += circle(at, start, radius, f"{_kind(one.before)} ring")
    return (
        f'<a href="#layer-{i}" tabindex="-1" aria-label="{label}">'
        f"<title>{label}</title>{ring}{circle(at, height, radius, kind)}</a>"
    )


def _kind(layer: LayerReport) -> str:
    """How a layer compares with random neurons."""
    if layer.as_random:
        return "even"
    if layer.above:
        return "above"
    if layer.below:
        return "below"
    return "even"


def _names_of_highest(layers: Sequence[LayerReport], axis: Axis) -> list[str]:
    """Names at the highest ratios, unless they would cover each other."""
    known = [i for i, layer in enumerate(layers) if not math.isnan(layer.ratio)]
    known.sort(key=lambda i: -layers[i].ratio)
    marks = []
    taken: list[tuple[float, float]] = []  # parts of the width, heights
    for i in known[:_NAMED]:
        part = (i + 0.5) / len(layers)
        height = axis(layers[i].ratio) - 9
        beside = False
        covered = False
        for other_part, other_height in taken:
            if abs(height - other_height) < 15:
                beside = True
                covered |= abs(part - other_part) < _NAME_WIDTH
        if covered or not layers[i].above:
            continue
        taken.append((part, height))
        words = f"{abbreviated(layers[i].name, _NAME_LETTERS)} {number(layers[i].ratio, 2)}"
        kind = "halo"
        if beside:
            kind = "halo minor"  # on a phone there is no room for two names side by side
        marks.append(text(f"{100 * part:.2f}%", height, words, end=_anchor(part), kind=kind))
    return marks


def _anchor(part: float) -> str:
    """Where a name starts, so that it stays within a phone's width."""
    if part < 0.3:
        return "start"
    if part < 0.7:
        return "middle"
    return "end"


def angle_chart(layer: LayerReport) -> str:
    """A histogram of pairs by angle, beside as many pairs of uniform vectors."""
    bins = len(layer.angles)
    pairs = sum(layer.angles)
    width = 180.0 / bins
    expected = expected_angles(pairs, layer.uniformity.dimension, bins).tolist()
    highest = max(1.0, *layer.angles, *expected)
    x = Axis(0.0, 180.0, _LEFT, _RIGHT)
    y = Axis(0.0, highest * 1.1, _BOTTOM, _TOP, "log1p")
    curve = []
    for i, count in enumerate(expected):
        curve.append((x(width * (i + 0.5)), y(count)))
    marks = _grid(y, "pairs")
    for angle in range(0, 181, 30):
        marks.append(text(x(angle), _BOTTOM + 15, f"{angle}°", end="middle"))
    marks.append(_axis_name("angle between two neurons"))
    marks.append(_bars(layer.angles, x, y, width))
    marks.append(path(curve, "curve"))
    marks += _key('<rect x="150" y="3" width="14" height="10" class="bars"/>')
    name = f"Angles between the {pairs:,} pairs of neurons, beside uniform random vectors"
    return figure(name, (_WIDTH, _HEIGHT), marks)


def _bars(counts: Sequence[int], x: Axis, y: Axis, width: float) -> str:
    """Bars side by side, as one outline."""
    steps = ""
    for i, count in enumerate(counts):
        steps += f"V{place(y(count))}H{place(x((i + 1) * width))}"
    return f'<path d="M{place(_LEFT)},{place(_BOTTOM)}{steps}V{place(_BOTTOM)}" class="bars"/>'


def singular_chart(layer: LayerReport) -> str:
    """Singular values in descending order, beside the law and its ends for random unit vectors."""
    values = layer.singular_values
    low, high = layer.edges
    x = Axis(0.0, float(len(values)), _LEFT, _RIGHT)
    y = Axis(0.0, max(high, values[0]) * 1.08, _BOTTOM, _TOP)
    drawn = sampled(len(values), _POINTS)
    quantiles = [1.0 - (i + 0.5) / len(values) for i in drawn]
    law = random_singular_values(layer.live, layer.uniformity.dimension, quantiles)
    curve = []
    points = []
    for i, expected in zip(drawn, law, strict=True):
        curve.append((x(i + 0.5), y(expected)))
        points.append((x(i + 0.5), y(values[i])))
    low_label = y(low) + 12  # no value is near here: the first values are the largest
    if low_label >= _BOTTOM:
        low_label = y(low) - 4
    marks = _grid(y, "singular value")
    marks.append(line(_LEFT, y(low), _RIGHT, y(low), "edge"))
    marks.append(line(_LEFT, y(high), _RIGHT, y(high), "edge"))
    marks.append(path(curve, "curve"))
    marks.append(_values(points))
    marks.append(text(_RIGHT, y(high) - 4, f"upper edge {high:.2f}", end="end", kind="halo"))
    marks.append(text(_LEFT + 4, low_label, f"lower edge {low:.2f}", kind="halo"))
    for rank in {1, len(values)}:
        marks.append(text(x(rank - 0.5), _BOTTOM + 15, f"{rank:,}", end="middle"))
    marks.append(_axis_name("rank"))
    marks += _key(line(148, 8, 166, 8, "values"))
    name = f"{len(values):,} singular values, beside those of as many random vectors"
    return figure(name, (_WIDTH, _HEIGHT), marks)


def sampled(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices below ``count``, evenly spread, including both ends."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def random_singular_values(
    vectors: float, dimension: int, quantiles: Sequence[float]
) -> list[float]:
    """Quantiles of the nonzero singular values of random unit vectors.

    They follow the law for many vectors of large dimension, by Marchenko and Pastur.

    Args:
        vectors: How many; a mean over groups, so not always a whole number.
        dimension: Their dimension.
        quantiles: Which quantiles, in (0, 1).
    """
    ratio = vectors / dimension
    # Squares are 1 + ratio + 2 sqrt(ratio) cos(t). In t their density sin(t)^2 / square has no pole
    # at the edges. From t = pi down to 0 the squares rise.
    middles = (torch.arange(_LAW_STEPS, dtype=torch.float64) + 0.5) / _LAW_STEPS
    t = math.pi * (1.0 - middles)
    squares = 1.0 + ratio + 2.0 * math.sqrt(ratio) * t.cos()
    mass = (t.sin().square() / squares).cumsum(0)
    wanted = mass[-1] * torch.tensor(quantiles, dtype=torch.float64)
    at = torch.searchsorted(mass, wanted).clamp_max_(_LAW_STEPS - 1)
    values: list[float] = squares[at].sqrt().tolist()
    return values


def _values(points: list[tuple[float, float]]) -> str:
    """A line through the singular values, with a dot at each if they are few."""
    dots = ""
    if len(points) <= 40:
        for x, y in points:
            dots += f'<circle cx="{place(x)}" cy="{place(y)}" r="2.5"/>'
    return path(points, "values") + f'<g class="dots">{dots}</g>'


def _grid(y: Axis, name: str) -> list[str]:
    """Lines and labels of the vertical axis, and its name."""
    lines = []
    labels = []
    for tick in y.ticks():
        lines.append(line(_LEFT, y(tick), _RIGHT, y(tick), "grid"))
        labels.append(text(_LEFT - 6, y(tick) + 4, short(tick), end="end"))
    return [*lines, *labels, text(2, 12, name)]


def _axis_name(name: str) -> str:
    """The name of the horizontal axis."""
    return text((_LEFT + _RIGHT) / 2, _HEIGHT - 4, name, end="middle")


def _key(layer_mark: str) -> list[str]:
    """The legend above the chart: its marks differ in shape, not only in colour."""
    return [
        layer_mark,
        text(170, 12, "this layer"),
        line(240, 8, 260, 8, "curve"),
        text(265, 12, "random vectors"),
    ]


def heat_map_png(cosines: Tensor) -> bytes:
    """Cosines (m, m) as a PNG of m by m pixels: orange positive, blue negative.

    The larger a cosine, the more opaque the pixel; near 0 the page's background shines through. The
    index of a pixel in the palette is ``COSINE_STEPS`` plus the cosine in steps.
    """
    height, width = cosines.shape
    index = ((cosines * COSINE_STEPS).round() + COSINE_STEPS).to(torch.uint8)
    no_filter = torch.zeros(height, 1, dtype=torch.uint8)  # the byte that each row begins with
    pixels = bytes(torch.cat([no_filter, index], 1).flatten().tolist())
    colours = _NEGATIVE * COSINE_STEPS + _POSITIVE * (COSINE_STEPS + 1)
    alphas = bytearray()
    for step in range(-COSINE_STEPS, COSINE_STEPS + 1):
        alphas.append(round(255 * abs(step) / COSINE_STEPS))
    # Cosines rarely repeat, and this strategy expects few repetitions.
    compressor = zlib.compressobj(9, strategy=zlib.Z_FILTERED)
    data = compressor.compress(pixels) + compressor.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
        + _chunk(b"PLTE", colours)
        + _chunk(b"tRNS", bytes(alphas))
        + _chunk(b"IDAT", data)
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG: its length, its kind, what it holds, and a checksum."""
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
