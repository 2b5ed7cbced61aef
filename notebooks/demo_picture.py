"""The demo's picture: redundancy over training, and the angles between neurons against those of random ones."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from notebooks.demo_train import Outcome

WITHOUT, WITH = "#D55E00", "#0072B2"  # told apart by colour-blind readers too
INK, QUIET, FAINT = "#222222", "#6B6B6B", "#C9C9C9"
HALO = [withStroke(linewidth=2.5, foreground="white")]
CORNER: dict[str, Any] = {"size": 7.5, "color": INK, "va": "top", "linespacing": 1.3}


def draw_picture(path: Path, title: str, without: list[Outcome], penalised: list[Outcome]) -> None:
    """One PNG: on top the ratio to random of every layer, below the angles of the most redundant hidden layer."""
    figure = Figure(figsize=(6.6, 5.2), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    detail = f"{title}: a layer's energy over that of random neurons, by step"
    _heading(figure, 0.965, "The penalty keeps neurons from crowding", detail)
    for x, text, color in (
        (0.79, "without the penalty", WITHOUT),
        (0.975, "with the penalty", WITH),
    ):
        figure.text(x, 0.965, text, size=8, weight="bold", color=color, va="center", ha="right")
    _curves(_row(figure, 0.845, 0.53), without, penalised)
    layers = without[0].after
    name = max(layers[:-1], key=lambda layer: _end(without, layers.index(layer))).name
    detail = f"Angles between the neurons of {name}: pairs per 3 degrees, all seeds together"
    _heading(figure, 0.435, "Without it, some become near-copies of others", detail)
    _histograms(_row(figure, 0.315, 0.06), name, without, penalised)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _end(runs: list[Outcome], i: int) -> float:
    return median(run.after[i].ratio for run in runs)


def _heading(figure: Figure, y: float, text: str, detail: str) -> None:
    figure.text(0.015, y, text, size=10.5, weight="bold", color=INK, va="center")
    figure.text(0.015, y - 0.042, detail, size=8, color=QUIET, va="center")


def _row(figure: Figure, top: float, bottom: float) -> list[Axes]:
    """Three panels side by side on one scale."""
    edges = {"left": 0.075, "right": 0.975, "top": top, "bottom": bottom, "wspace": 0.13}
    axes = list(figure.subplots(1, 3, sharey=True, gridspec_kw=edges))
    for ax in axes:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(FAINT)
        ax.tick_params(colors=QUIET, labelsize=7, length=2.5, color=FAINT)
    return axes


def _curves(axes: list[Axes], without: list[Outcome], penalised: list[Outcome]) -> None:
    drawn = []
    for i, (ax, layer) in enumerate(zip(axes, without[0].after, strict=True)):
        ax.axhline(1, color=INK, lw=0.8, ls=(0, (4, 3)))
        drawn += _lines(ax, [_curve(run, i) for run in without], WITHOUT)
        drawn += _lines(ax, [_curve(run, i) for run in penalised], WITH)
        ax.set_title(
            f"{layer.name}, {layer.neurons} × {layer.dimension}",
            size=8,
            color=INK,
            loc="left",
            pad=4,
        )
        _label(ax, _end(without, i), _end(penalised, i))
    _note(axes[0], "random", (0.02, 1), -4, INK, "left")
    top = 1.25 * max(drawn)
    axes[0].set_ylim(min(drawn) * top**-0.16, top)
    axes[0].yaxis.set_major_locator(
        FixedLocator([1, 10, 100, 1000, 10000] if top > 30 else [1, 1.5, 2, 3, 5, 10, 20])
    )
    axes[0].yaxis.set_major_formatter("{x:g}×")


def _lines(ax: Axes, curves: list[tuple[list[int], list[float]]], color: str) -> list[float]:
    """Every seed thin, the median bold; returns what was drawn."""
    for steps, ratios in curves:
        ax.plot(steps, ratios, color=color, lw=0.6, alpha=0.35)
    middle = [median(values) for values in zip(*(ratios for _, ratios in curves), strict=True)]
    ax.plot(curves[0][0], middle, color=color, lw=2, solid_capstyle="round")
    ax.set_xlim(0, curves[0][0][-1])
    ax.xaxis.set_major_locator(MaxNLocator(4))
    return [ratio for _, ratios in curves for ratio in ratios]


def _label(ax: Axes, without: float, penalised: float) -> None:
    """Name both runs, with their last values, where their lines end."""
    _note(ax, f"without {without:.2f}", (1, max(without, penalised, 1)), 4, WITHOUT, "right")
    _note(ax, f"with {penalised:.2f}", (1, min(without, penalised, 1)), -4, WITH, "right")


def _note(
    ax: Axes, text: str, xy: tuple[float, float], shift: float, color: str, side: str
) -> None:
    """Text some points above or below a height in data units, at a fraction of the width."""
    place = {
        "xycoords": ax.get_yaxis_transform(),
        "xytext": (0, shift),
        "textcoords": "offset points",
    }
    ax.annotate(
        text,
        xy,
        **place,
        size=7.5,
        color=color,
        ha=side,
        va="bottom" if shift > 0 else "top",
        path_effects=HALO,
    )


def _curve(run: Outcome, i: int) -> tuple[list[int], list[float]]:
    """A layer's ratio by step: at the start, then what the callback logged."""
    with run.metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(f"hsu/ratio/{run.before[i].name}")]
    steps = [0, *(int(row["step"]) + 1 for row in rows)]
    return steps, [
        run.before[i].ratio,
        *(float(row[f"hsu/ratio/{run.before[i].name}"]) for row in rows),
    ]


def _histograms(
    axes: list[Axes], name: str, without: list[Outcome], penalised: list[Outcome]
) -> None:
    panels = (
        ("at the start", QUIET, [run.weights[name][0] for run in without]),
        ("after training without", WITHOUT, [run.weights[name][1] for run in without]),
        ("after training with", WITH, [run.weights[name][1] for run in penalised]),
    )
    most = max(_histogram(ax, *panel) for ax, panel in zip(axes, panels, strict=True))
    axes[0].set_ylim(0.7, 4 * most)
    axes[0].yaxis.set_major_locator(LogLocator(10))
    axes[0].yaxis.set_major_formatter("{x:g}")
    power = panels[0][2][0].shape[1] - 2
    axes[0].text(
        0.98,
        0.94,
        f"curve: random,\nsin(angle)$^{{{power}}}$",
        transform=axes[0].transAxes,
        **CORNER,
        ha="right",
    )


def _histogram(ax: Axes, title: str, color: str, weights: list[Tensor]) -> float:
    """Pairs in bins of 3 degrees, and how many random vectors would have; returns the highest bin."""
    angles = torch.cat([_angles(weight) for weight in weights])
    counts, *_ = ax.hist(angles.numpy(), bins=60, range=(0, 180), color=color, alpha=0.5, lw=0)
    degrees, density = _random_density(weights[0].shape[1])
    ax.plot(degrees, [3 * len(angles) * value for value in density], color=INK, lw=1)
    ax.set_title(title, size=8, color=color, loc="left", pad=4)
    ax.text(
        0.03,
        0.94,
        f"closest pair\n{float(angles.min()):.1f}°",
        transform=ax.transAxes,
        **CORNER | {"color": color},
    )
    ax.set_xlim(0, 180)
    ax.xaxis.set_major_locator(FixedLocator([30, 60, 90, 120, 150]))
    ax.xaxis.set_major_formatter("{x:g}°")
    return float(counts.max())


def _angles(weight: Tensor) -> Tensor:
    """Of all pairs of live neurons, in degrees."""
    x = weight.double()
    x = x[x.norm(dim=1) > 0]
    unit = x / x.norm(dim=1, keepdim=True)
    i, j = torch.triu_indices(len(x), len(x), offset=1)
    chord, other = (unit[i] - unit[j]).norm(dim=1), (unit[i] + unit[j]).norm(dim=1)
    return 2 * torch.atan2(chord, other).rad2deg()


def _random_density(dimension: int) -> tuple[list[float], list[float]]:
    """The density of the angle between two random vectors, sin^(d-2), per degree."""
    constant = math.exp(math.lgamma(dimension / 2) - math.lgamma((dimension - 1) / 2)) / math.sqrt(
        math.pi
    )
    degrees = [i / 2 for i in range(1, 360)]
    return degrees, [
        constant * math.sin(math.radians(t)) ** (dimension - 2) * math.pi / 180 for t in degrees
    ]
