"""The demo's picture: redundancy over training, and angles between neurons beside random ones."""

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

from notebooks.demo_train import Arm, Outcome

COLORS: dict[Arm, str] = {  # apart even for colour-blind readers
    "without": "#D55E00",
    "with": "#0072B2",
    "control": "#8A8A8A",
}
INK = "#222222"
QUIET = "#6B6B6B"
FAINT = "#C9C9C9"
HALO = [withStroke(linewidth=2.5, foreground="white")]
CORNER: dict[str, Any] = {"size": 7.5, "va": "top", "linespacing": 1.3}


def draw_picture(path: Path, title: str, runs: dict[Arm, list[Outcome]]) -> None:
    """Write one PNG: the ratio of every layer, and angles in the most redundant hidden layer.

    Args:
        path: The PNG to write.
        title: Data and labels.
        runs: Runs of each arm.
    """
    figure = Figure(figsize=(6.6, 5.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    detail = f"{title}: a layer's energy over that of random neurons (dashed) during training"
    _heading(figure, 0.968, "How far neurons crowd", detail)
    _key(figure, 0.968)
    _curves(_row(figure, 0.855, 0.575), runs)
    without = runs["without"]
    hidden = range(len(without[0].after) - 1)  # the last layer is the head
    worst = max(hidden, key=lambda i: _end(without, i))
    name = without[0].after[worst].name
    detail = f"Angles between the neurons of {name}: pairs per 3 degrees, all seeds together"
    _heading(figure, 0.455, "How close they come to each other", detail)
    _histograms(_row(figure, 0.342, 0.085), name, runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _key(figure: Figure, y: float) -> None:
    """Name the arms in their colours, at the right."""
    names: dict[Arm, str] = {
        "control": "control: random directions",
        "with": "with the penalty",
        "without": "without",
    }
    right = 0.975
    for arm, text in names.items():
        found = figure.text(
            right, y, text, color=COLORS[arm], size=8, weight="bold", va="center", ha="right"
        )
        right -= found.get_window_extent().width / figure.bbox.width + 0.02


def _end(runs: list[Outcome], i: int) -> float:
    """The ratio of layer i after training, the median of the runs."""
    return median(run.after[i].ratio for run in runs)


def _heading(figure: Figure, y: float, text: str, detail: str) -> None:
    figure.text(0.015, y, text, size=10.5, weight="bold", color=INK, va="center")
    figure.text(0.015, y - 0.042, detail, size=8, color=QUIET, va="center")


def _row(figure: Figure, top: float, bottom: float) -> list[Axes]:
    """Add three panels side by side on one logarithmic scale."""
    grid = {"left": 0.09, "right": 0.975, "top": top, "bottom": bottom, "wspace": 0.13}
    axes = list(figure.subplots(1, 3, sharey=True, gridspec_kw=grid))
    for ax in axes:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(FAINT)
        ax.tick_params(colors=QUIET, labelsize=7, length=2.5, color=FAINT)
    return axes


def _curves(axes: list[Axes], runs: dict[Arm, list[Outcome]]) -> None:
    """Draw one panel for each layer: its ratio over steps in every run, of the control in the median."""
    drawn = []
    for i, (ax, layer) in enumerate(zip(axes, runs["without"][0].after, strict=True)):
        ax.axhline(1, color=INK, lw=0.8, ls=(0, (4, 3)))
        for arm, outcomes in runs.items():
            drawn += _lines(ax, [_curve(run, i) for run in outcomes], arm)
        title = f"{layer.name}, {layer.neurons} × {layer.dimension}"
        ax.set_title(title, size=8, color=INK, loc="left", pad=4)
        _ends(ax, {arm: _end(outcomes, i) for arm, outcomes in runs.items()})
    axes[1].set_xlabel("optimizer step", size=8, color=QUIET, labelpad=3)
    axes[0].set_ylabel("ratio", size=8, color=QUIET, labelpad=1)
    top = 1.25 * max(drawn)
    marks = [1, 1.5, 2, 3, 5, 10, 20]
    if top < 1.6:
        marks = [0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5]
    elif top > 30:
        marks = [1, 10, 100, 1000, 10000]
    axes[0].set_ylim(min(drawn) * top**-0.16, top)
    axes[0].yaxis.set_major_locator(FixedLocator(marks))
    axes[0].yaxis.set_major_formatter("{x:g}×")


def _lines(ax: Axes, curves: list[tuple[list[int], list[float]]], arm: Arm) -> list[float]:
    """Draw their median bold and, but for the control, each seed thin; return all values drawn."""
    color = COLORS[arm]
    drawn = []
    by_seed = []
    for steps, ratios in curves:
        by_seed.append(ratios)
        if arm != "control":
            ax.plot(steps, ratios, color=color, lw=0.6, alpha=0.35)
            drawn += ratios
    middle = [median(values) for values in zip(*by_seed, strict=True)]
    steps = curves[0][0]
    ax.plot(steps, middle, color=color, lw=2, solid_capstyle="round")
    ax.set_xlim(0, steps[-1])
    ax.xaxis.set_major_locator(MaxNLocator(4))
    return drawn + middle


def _ends(ax: Axes, ends: dict[Arm, float]) -> None:
    """Write the ratios after training in the upper left corner."""
    y = 0.97
    ax.text(0.03, y, "after training", color=QUIET, transform=ax.transAxes, **CORNER)
    for arm, ratio in ends.items():
        y -= 0.105
        text = f"{arm} {ratio:.2f}"
        label = ax.text(0.03, y, text, color=COLORS[arm], transform=ax.transAxes, **CORNER)
        label.set_path_effects(HALO)


def _curve(run: Outcome, i: int) -> tuple[list[int], list[float]]:
    """Steps and ratios of layer i: at the start, then as the callback logged them."""
    steps = [0]
    ratios = [run.before[i].ratio]
    logged = f"hsu/ratio/{run.before[i].name}"
    with run.metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            if row.get(logged):
                steps.append(int(row["step"]) + 1)
                ratios.append(float(row[logged]))
    return steps, ratios


def _histograms(axes: list[Axes], name: str, runs: dict[Arm, list[Outcome]]) -> None:
    """Draw the angles in a layer at the start, after training without and with the penalty."""
    start = [run.weights[name][0] for run in runs["without"]]
    end_without = [run.weights[name][1] for run in runs["without"]]
    end_with = [run.weights[name][1] for run in runs["with"]]
    first, second, third = axes
    most = max(
        _histogram(first, "at the start", QUIET, start),
        _histogram(second, "after training without", COLORS["without"], end_without),
        _histogram(third, "after training with the penalty", COLORS["with"], end_with),
    )
    first.set_ylim(0.7, 4 * most)
    first.yaxis.set_major_locator(LogLocator(10))
    first.yaxis.set_major_formatter("{x:g}")
    first.set_ylabel("pairs", size=8, color=QUIET, labelpad=1)
    second.set_xlabel("angle between two neurons", size=8, color=QUIET, labelpad=3)
    power = start[0].shape[1] - 2
    formula = f"curve: random,\nsin(angle)$^{{{power}}}$"
    first.text(0.98, 0.94, formula, color=INK, ha="right", transform=first.transAxes, **CORNER)


def _histogram(ax: Axes, title: str, color: str, weights: list[Tensor]) -> float:
    """Draw pairs in bins of 3 degrees, and those of random vectors; return the highest bin."""
    angles = torch.cat([_angles(weight) for weight in weights])
    counts, *_ = ax.hist(angles.numpy(), bins=60, range=(0, 180), color=color, alpha=0.5, lw=0)
    degrees, density = _random_density(weights[0].shape[1])
    ax.plot(degrees, [3 * len(angles) * value for value in density], color=INK, lw=1)
    ax.set_title(title, size=8, color=color, loc="left", pad=4)
    closest = f"closest pair\n{float(angles.min()):.1f}°"
    ax.text(0.03, 0.94, closest, color=color, transform=ax.transAxes, **CORNER)
    ax.set_xlim(0, 180)
    ax.xaxis.set_major_locator(FixedLocator([30, 60, 90, 120, 150]))
    ax.xaxis.set_major_formatter("{x:g}°")
    return float(counts.max())


def _angles(weight: Tensor) -> Tensor:
    """Angles in degrees between all pairs of non-zero neurons (n, d)."""
    x = weight.double()
    x = x[x.norm(dim=1) > 0]
    unit = x / x.norm(dim=1, keepdim=True)
    i, j = torch.triu_indices(len(x), len(x), offset=1)
    chord = (unit[i] - unit[j]).norm(dim=1)
    chord_to_mirror = (unit[i] + unit[j]).norm(dim=1)
    return 2 * torch.atan2(chord, chord_to_mirror).rad2deg()


def _random_density(dimension: int) -> tuple[list[float], list[float]]:
    """Angles, and the density per degree of the angle between two random vectors, sin^(d-2)."""
    log_constant = math.lgamma(dimension / 2) - math.lgamma((dimension - 1) / 2)
    constant = math.exp(log_constant) / math.sqrt(math.pi)
    angles = []
    densities = []
    for i in range(1, 360):
        angle = i / 2
        density = constant * math.sin(math.radians(angle)) ** (dimension - 2)
        angles.append(angle)
        densities.append(density * math.pi / 180)
    return angles, densities
