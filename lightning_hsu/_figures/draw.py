"""The figures of a training run: plain data in, matplotlib figures out, without pyplot's state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from lightning_hsu._core import expected_angles
from lightning_hsu._figures.history import Angles, Curve

__all__ = ["Figure", "angle_panels", "over_time", "pixels"]

INK = "#222222"
QUIET = "#6B6B6B"
FAINT = "#C9C9C9"
OTHERS = "#B4B4B4"
NEURONS = "#0072B2"
RANDOM = "#D55E00"  # differs from NEURONS even for colour-blind readers
COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#B5508A",
    "#8C6D00",
    "#2F9BD8",
    "#7A3E9D",
    "#8B4513",
    "#B2182B",
    "#4D4D4D",
)
HIGHLIGHTED = 5  # layers with a colour, if there are more layers than colours

_WIDTH = 7.4  # inches
_HEIGHT = 4.2
_TOP = 0.84  # of the axes, as fractions of the figure's height
_BOTTOM = 0.12
_GAP = 0.054  # between labels, a fraction of the axes' height
_FEWEST = 0.5  # pairs, where an axis of pairs begins
_BARS = (8, 60)  # in a panel of angles, with few pairs and with many


@dataclass(frozen=True)
class _Label:
    """A label right of the axes: the value it belongs to, its text and colour."""

    value: float
    text: str
    color: str


def over_time(
    curves: Mapping[str, Curve],
    *,
    title: str,
    detail: str,
    reference: tuple[float, str] | None = None,
) -> Figure:
    """Draw one line for each layer over optimizer steps, with the layer's name at its end.

    With more than ten layers, those that end highest get colours and names; the others are grey.

    Args:
        curves: Pairs of step and value, by layer; non-finite values are left out.
        title: What is shown.
        detail: What the values mean.
        reference: The value of a dashed line, and its label.

    Example:
        >>> figure = over_time({"net.0": [(0, 1.0), (50, 1.4)]}, title="Ratio", detail="by layer")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['net.0']
    """
    curves = _finite(curves)
    steps = []
    values = []
    for curve in curves.values():
        for step, value in curve:
            steps.append(step)
            values.append(value)
    if reference is not None:
        values.append(reference[0])

    figure = _canvas(_HEIGHT, title, detail)
    ax = figure.add_axes((0.085, _BOTTOM, 0.64, _TOP - _BOTTOM))
    _style_axes(ax)
    _scale_values(ax, values)
    labels = _draw_lines(ax, curves)
    if reference is not None:
        level, text = reference
        ax.axhline(level, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
        labels.append(_Label(level, text, INK))
    _draw_labels(ax, labels)

    first = min(steps, default=0)
    ax.set_xlabel("optimizer steps", size=8, color=QUIET)
    ax.set_xlim(first, max([*steps, first + 1]))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return figure


def angle_panels(layers: Sequence[Angles]) -> Figure:
    """Draw histograms of pairs of neurons by angle, beside as many pairs of random neurons.

    Args:
        layers: The layers, one panel for each.
    """
    columns = 3 if len(layers) in (3, 5, 6) else 2
    rows = math.ceil(len(layers) / columns)
    height = 0.85 + 2.25 * rows
    figure = _canvas(
        height,
        "Angles between neurons",
        "pairs by angle, on a logarithmic scale; layers furthest above random first",
    )
    for x, text, color in ((0.85, "these neurons", NEURONS), (0.975, "random ones", RANDOM)):
        y = 1 - 0.2 / height
        figure.text(x, y, text, size=8, weight="bold", color=color, va="center", ha="right")
    grid = {
        "left": 0.075,
        "right": 0.975,
        "top": 1 - 0.95 / height,
        "bottom": 0.32 / height,
        "wspace": 0.24,
        "hspace": 0.5,
    }
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid).flatten()
    for ax, layer in zip(panels, layers, strict=False):
        _draw_panel(ax, layer)
    for ax in panels[len(layers) :]:
        ax.remove()
    return figure


def pixels(figure: Figure) -> Tensor:
    """Render a figure as an image, uint8 (height, width, 4)."""
    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    canvas.draw()
    width, height = canvas.get_width_height()
    image = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    return image.reshape(height, width, 4)


def _canvas(height: float, title: str, detail: str) -> Figure:
    """An empty figure with its two titles."""
    figure = Figure(figsize=(_WIDTH, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.015, 1 - 0.2 / height, title, size=10.5, weight="bold", color=INK, va="center")
    figure.text(0.015, 1 - 0.41 / height, detail, size=8, color=QUIET, va="center")
    return figure


def _style_axes(ax: Axes) -> None:
    ax.set_facecolor("white")
    ax.grid(False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(which="both", labelcolor=QUIET, labelsize=7.5, length=2.5, color=FAINT)


# Curves over time


def _finite(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """The curves without non-finite values; curves without finite values are dropped."""
    kept: dict[str, Curve] = {}
    for name, curve in curves.items():
        points = [point for point in curve if math.isfinite(point[1])]
        if points:
            kept[name] = points
    return kept


def _scale_values(ax: Axes, values: Sequence[float]) -> None:
    """Set limits around all values; logarithmic if they differ by more than a factor of 20."""
    positive = [value for value in values if value > 0]
    if positive and min(values) >= 0 and max(positive) > 20 * min(positive):
        low = min(positive)
        high = max(positive)
        margin = (high / low) ** 0.05
        marks = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
        ax.set_yscale("log")
        ax.set_ylim(low / margin, high * margin)
        ax.yaxis.set_major_locator(LogLocator(subs=marks, numticks=10))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        low = min(values, default=0.0)
        high = max(values, default=1.0)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
        ax.set_ylim(low - margin, high + margin)
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _draw_lines(ax: Axes, curves: Mapping[str, Curve]) -> list[_Label]:
    """Draw the lines; return the labels of their ends."""
    ends = {name: curve[-1][1] for name, curve in curves.items()}
    named = sorted(ends, key=lambda name: -ends[name])
    if len(named) > len(COLORS):
        named = named[:HIGHLIGHTED]

    labels: list[_Label] = []
    others: list[float] = []
    for name, curve in curves.items():
        if name in named:
            color = COLORS[len(labels)]
            labels.append(_Label(ends[name], _shorten(name), color))
            style: dict[str, Any] = {"color": color, "lw": 1.6, "zorder": 3}
        else:
            others.append(ends[name])
            style = {"color": OTHERS, "lw": 0.8, "zorder": 2}
        marker = "o" if len(curve) == 1 else None
        steps, values = zip(*curve, strict=True)
        ax.plot(steps, values, marker=marker, ms=3.5, clip_on=False, **style)
    if others:
        labels.append(_Label(median(others), f"{len(others)} other layers", QUIET))
    return labels


def _draw_labels(ax: Axes, labels: Sequence[_Label]) -> None:
    """Write labels to the right of the axes, each as close to its value as space allows."""
    to_axes = ax.transScale + ax.transLimits
    left = ax.get_xlim()[0]
    heights = [float(to_axes.transform((left, label.value))[1]) for label in labels]
    for label, height, place in zip(labels, heights, _spread(heights), strict=True):
        line = [height, place]
        inside: dict[str, Any] = {"color": label.color, "transform": ax.transAxes}
        ax.plot([1.005, 1.03], line, lw=0.7, clip_on=False, **inside)
        ax.text(1.04, place, label.text, size=8, va="center", parse_math=False, **inside)


def _spread(heights: Sequence[float]) -> list[float]:
    """Move heights at least a gap apart, as little as possible, keeping their order.

    With the gaps subtracted, only the order has to hold: neighbours that break it are pooled into
    blocks, and the members of a block share its mean.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[list[float]] = []
    for rank, i in enumerate(order):
        blocks.append([heights[i] - rank * _GAP])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last

    highest = 1.0 - (len(order) - 1) * _GAP
    places = [0.0] * len(heights)
    rank = 0
    for block in blocks:
        start = max(0.0, min(_mean(block), highest))
        for _ in block:
            places[order[rank]] = start + rank * _GAP
            rank += 1
    return places


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# Panels of angles


def _draw_panel(ax: Axes, layer: Angles) -> None:
    """Draw one layer's pairs by angle, and those of as many random neurons."""
    counts = torch.tensor(layer.counts, dtype=torch.float64)  # (bins,)
    expected = expected_angles(float(counts.sum()), layer.dimension, len(counts))
    reach, width = _window(counts, expected)
    middle = len(counts) // 2
    shown = slice(middle - reach, middle + reach)
    bars = counts[shown].reshape(-1, width).sum(1)
    curve = expected[shown].reshape(-1, width).sum(1)
    edges = 90.0 + torch.arange(-reach, reach + 1, width) * (180.0 / len(counts))
    centers = (edges[1:] + edges[:-1]) / 2

    filled: dict[str, Any] = {"fill": True, "color": NEURONS, "alpha": 0.75, "lw": 0}
    ax.stairs(bars.tolist(), edges.tolist(), baseline=_FEWEST, **filled)
    line = ax.plot(centers.tolist(), curve.tolist(), color=RANDOM, lw=1.3)
    line[0].set_path_effects([withStroke(linewidth=2.4, foreground="white")])
    _style_axes(ax)
    _scale_pairs(ax, max(float(bars.max()), float(curve.max())))
    ax.set_xlim(float(edges[0]), float(edges[-1]))
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 1.5, 3, 4.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}°"))
    _write_above(ax, 18, _shorten(layer.name), size=8.5, color=INK)
    _write_above(ax, 7, layer.note, size=7, color=QUIET)


def _window(counts: Tensor, expected: Tensor) -> tuple[int, int]:
    """Choose what a panel shows of pairs by angle, counted and expected, (bins,) each.

    Returns:
        How many bins to show on either side of a right angle, enough for the neurons and random
        ones, and how many bins to merge into one bar.
    """
    bins = len(counts)
    middle = bins // 2
    reach = bins // 18  # at least 10 degrees
    reached = ((counts > 0) | (expected >= _FEWEST)).nonzero().flatten()
    if len(reached):
        distances = torch.maximum(middle - reached, reached + 1 - middle)
        reach = max(reach, int(distances.max()))
    few, many = _BARS
    bars = min(max(few, int(counts.sum()) // 8), many)
    width = max(1, math.ceil(2 * reach / bars))
    reach = math.ceil(reach / width) * width
    if reach > middle:  # show all bins, in bars of equal width
        reach = middle
        while bins % width:
            width -= 1
    return reach, width


def _scale_pairs(ax: Axes, most: float) -> None:
    """Set a logarithmic axis for up to ``most`` pairs."""
    ax.set_yscale("log")
    ax.set_ylim(_FEWEST, 2.0 * max(1.0, most))
    if most < 100:
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    else:
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0,), numticks=5))
    ax.yaxis.set_major_formatter(FuncFormatter(_pairs_text))
    ax.yaxis.set_minor_locator(NullLocator())


def _pairs_text(pairs: float, _: int | None) -> str:
    if pairs < 1:
        return ""
    if pairs < 1e6:
        return f"{pairs:,.0f}"
    return f"{pairs / 1e6:,.0f}M"


def _write_above(ax: Axes, points: float, text: str, *, size: float, color: str) -> None:
    """Write text above the axes, at a distance in points."""
    ax.annotate(
        text,
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, points),
        textcoords="offset points",
        size=size,
        color=color,
        parse_math=False,
    )


def _shorten(name: str, longest: int = 26) -> str:
    """Shorten a long name to its end, which tells layers apart."""
    if len(name) <= longest:
        return name
    return f"…{name[1 - longest :]}"
