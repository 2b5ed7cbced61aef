"""The pictures of a training: plain data in, matplotlib figures out, without pyplot and its global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

INK, QUIET, FAINT, OTHERS = "#222222", "#6B6B6B", "#C9C9C9", "#B4B4B4"
NEURONS, RANDOM = "#0072B2", "#D55E00"  # told apart by colour-blind readers too
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
HIGHLIGHTED = 5  # of more layers than there are colours
_WIDTH, _HEIGHT, _TOP, _BOTTOM = 7.4, 4.2, 0.84, 0.12  # inches, and fractions of the height
_GAP = 0.054  # between labels, a fraction of the axes' height
_FEWEST = 0.5  # pairs in a part, where an axis of pairs begins
_PARTS = (8, 60)  # of a panel of angles, with few pairs and with many


def over_time(
    curves: Mapping[str, Curve],
    *,
    title: str,
    detail: str,
    reference: tuple[float, str] | None = None,
) -> Figure:
    """A line per layer over optimizer steps, with its name at its end.

    With more layers than ten the highest at the end have colours and names, the others are grey.

    Args:
        curves: Pairs of step and value, by layer; what is not finite is left out.
        title: What is shown.
        detail: What its numbers mean.
        reference: A value to draw a dashed line at, and what to call it.

    Example:
        >>> figure = over_time({"net.0": [(0, 1.0), (50, 1.4)]}, title="Ratio", detail="above 1: more redundant")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['net.0']
    """
    finite = {
        name: [point for point in curve if math.isfinite(point[1])]
        for name, curve in curves.items()
    }
    finite = {name: curve for name, curve in finite.items() if curve}
    figure = _canvas(_HEIGHT, title, detail)
    ax = figure.add_axes((0.085, _BOTTOM, 0.64, _TOP - _BOTTOM))
    _plain_axes(ax)
    _scale(ax, [value for curve in finite.values() for _, value in curve], reference)
    labels = _draw_lines(ax, finite)
    if reference is not None:
        ax.axhline(reference[0], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
        labels.append((reference[0], reference[1], INK))
    _label_ends(ax, labels)
    ax.set_xlabel("optimizer steps", size=8, color=QUIET)
    steps = [step for curve in finite.values() for step, _ in curve]
    ax.set_xlim(min(steps, default=0), max([*steps, min(steps, default=0) + 1]))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return figure


def angle_panels(layers: Sequence[Angles]) -> Figure:
    """How many pairs of neurons have which angle, by layer, against as many pairs of random neurons.

    Args:
        layers: One panel each.
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
        figure.text(
            x, 1 - 0.2 / height, text, size=8, weight="bold", color=color, va="center", ha="right"
        )
    edges = {
        "left": 0.075,
        "right": 0.975,
        "top": 1 - 0.95 / height,
        "bottom": 0.32 / height,
        "wspace": 0.24,
        "hspace": 0.5,
    }
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw=edges).flatten()
    for ax, layer in zip(panels, layers, strict=False):
        _draw_angles(ax, layer)
    for ax in panels[len(layers) :]:
        ax.remove()
    return figure


def pixels(figure: Figure) -> Tensor:
    """The figure as a picture, uint8 (height, width, 4)."""
    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    canvas.draw()
    width, height = canvas.get_width_height()
    return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).reshape(
        height, width, 4
    )


def _canvas(height: float, title: str, detail: str) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.015, 1 - 0.2 / height, title, size=10.5, weight="bold", color=INK, va="center")
    figure.text(0.015, 1 - 0.41 / height, detail, size=8, color=QUIET, va="center")
    return figure


def _plain_axes(ax: Axes) -> None:
    ax.set_facecolor("white")
    ax.grid(False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(which="both", labelcolor=QUIET, labelsize=7.5, length=2.5, color=FAINT)


def _scale(ax: Axes, values: list[float], reference: tuple[float, str] | None) -> None:
    """Limits around all values and the reference; logarithmic where values differ by more than a factor of 20."""
    shown = values + ([reference[0]] if reference else [])
    positive = [value for value in shown if value > 0]
    if positive and min(shown) >= 0 and max(positive) > 20 * min(positive):
        room = (max(positive) / min(positive)) ** 0.05
        ax.set_yscale("log")
        ax.set_ylim(min(positive) / room, max(positive) * room)
        narrow = max(positive) < 300 * min(positive)
        ax.yaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=10)
        )
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        low, high = min(shown, default=0.0), max(shown, default=1.0)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
        ax.set_ylim(low - room, high + room)
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _draw_lines(ax: Axes, curves: Mapping[str, Curve]) -> list[tuple[float, str, str]]:
    """Draw the lines; labels of their ends: value, text and color."""
    ranked = sorted(curves, key=lambda name: -curves[name][-1][1])
    named = set(ranked if len(ranked) <= len(COLORS) else ranked[:HIGHLIGHTED])
    colors = dict(zip([name for name in curves if name in named], COLORS, strict=False))
    for name, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        color, front = colors.get(name, OTHERS), name in named
        marker = "o" if len(curve) == 1 else None
        ax.plot(
            steps,
            values,
            color=color,
            lw=1.6 if front else 0.8,
            marker=marker,
            ms=3.5,
            zorder=3 if front else 2,
            clip_on=False,
        )
    labels = [(curves[name][-1][1], _short(name), color) for name, color in colors.items()]
    if others := [curves[name][-1][1] for name in curves if name not in named]:
        labels.append((median(others), f"{len(others)} other layers", QUIET))
    return labels


def _label_ends(ax: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Names right of the axes, at the height of what they name or as close to that as others leave room."""
    to_axes = ax.transScale + ax.transLimits
    heights = [float(to_axes.transform((ax.get_xlim()[0], value))[1]) for value, _, _ in labels]
    for height, place, (_, text, color) in zip(heights, _apart(heights), labels, strict=True):
        ax.plot(
            [1.005, 1.03],
            [height, place],
            color=color,
            lw=0.7,
            transform=ax.transAxes,
            clip_on=False,
        )
        ax.text(
            1.04,
            place,
            text,
            size=8,
            color=color,
            va="center",
            transform=ax.transAxes,
            parse_math=False,
        )


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights at least a gap apart, in the same order, moved as little as can be: groups that would overlap share a mean."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[list[float]] = []
    for rank, i in enumerate(order):
        blocks.append([heights[i] - rank * _GAP])
        while len(blocks) > 1 and sum(blocks[-2]) / len(blocks[-2]) > sum(blocks[-1]) / len(
            blocks[-1]
        ):
            last = blocks.pop()
            blocks[-1] += last
    means = [sum(block) / len(block) for block in blocks for _ in block]
    top = 1.0 - (len(order) - 1) * _GAP
    places = {
        i: max(0.0, min(mean, top)) + rank * _GAP
        for rank, (i, mean) in enumerate(zip(order, means, strict=True))
    }
    return [places[i] for i in range(len(heights))]


def _draw_angles(ax: Axes, layer: Angles) -> None:
    """One layer's panel: as much around a right angle as either the neurons or random ones reach."""
    counts = torch.tensor(layer.counts, dtype=torch.float64)
    expected = expected_angles(float(counts.sum()), layer.dimension, len(counts))
    reached = ((counts > 0) | (expected >= _FEWEST)).nonzero()
    middle, total = len(counts) // 2, len(counts)
    half = max(
        [total // 18, *(int(max(middle - i, i + 1 - middle)) for i in reached.flatten().tolist())]
    )
    parts = min(max(_PARTS[0], int(counts.sum()) // 8), _PARTS[1])
    merged = max(1, math.ceil(2 * half / parts))
    half = math.ceil(half / merged) * merged
    if half > middle:  # all of it, in equal parts
        half, merged = middle, max(part for part in range(1, merged + 1) if total % part == 0)
    shown = [
        one[middle - half : middle + half].reshape(-1, merged).sum(1) for one in (counts, expected)
    ]
    edges = 90.0 + torch.arange(-half, half + 1, merged) * (180.0 / total)
    ax.stairs(
        shown[0].tolist(),
        edges.tolist(),
        baseline=_FEWEST,
        fill=True,
        color=NEURONS,
        alpha=0.75,
        lw=0,
    )
    line = ax.plot(((edges[1:] + edges[:-1]) / 2).tolist(), shown[1].tolist(), color=RANDOM, lw=1.3)
    line[0].set_path_effects([withStroke(linewidth=2.4, foreground="white")])
    _plain_axes(ax)
    ax.set_yscale("log")
    ax.set_ylim(_FEWEST, 2.0 * max(1.0, *(float(one.max()) for one in shown)))
    few = max(float(one.max()) for one in shown) < 100
    ax.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=8 if few else 5)
    )
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: "" if y < 1 else f"{y:,.0f}" if y < 1e6 else f"{y / 1e6:,.0f}M")
    )
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlim(float(edges[0]), float(edges[-1]))
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 1.5, 3, 4.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}°"))
    for text, size, color, height in (
        (_short(layer.name), 8.5, INK, 18),
        (layer.note, 7, QUIET, 7),
    ):
        above: dict[str, Any] = {
            "xy": (0, 1),
            "xycoords": "axes fraction",
            "xytext": (0, height),
            "textcoords": "offset points",
        }
        ax.annotate(text, **above, size=size, color=color, parse_math=False)


def _short(name: str, longest: int = 26) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= longest else f"…{name[1 - longest :]}"
