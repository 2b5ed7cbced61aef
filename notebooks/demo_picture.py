"""The demo's picture: redundancy over training, angles between neurons, and test errors."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
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
CORNER: dict[str, Any] = {"size": 7.5, "va": "top", "linespacing": 1.3}


def draw_picture(path: Path, title: str, runs: dict[Arm, list[Outcome]]) -> None:
    """Write one PNG: ratios of three layers, angles in the most redundant hidden one, test errors.

    Args:
        path: The PNG to write.
        title: Data and labels.
        runs: Runs of each arm; those at the same position share a seed.
    """
    figure = Figure(figsize=(6.6, 5.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    detail = f"{title}: a layer's energy over that of random neurons (dashed) during training"
    _heading(figure, 0.968, "How far neurons crowd", detail)
    _key(figure, 0.968)
    without = runs["without"]
    layers = range(len(without[0].after))
    crowded = sorted(layers, key=lambda i: _end(without, i))[-3:]
    _curves(_row(figure, 0.835, 0.575, 0.975, 3), sorted(crowded), runs)
    worst = max(layers[:-1], key=lambda i: _end(without, i))  # the last one is the head
    name = without[0].after[worst].name
    detail = f"Angles in {name}: pairs per 3 degrees, all seeds"
    _heading(figure, 0.455, "How close they come to each other", detail)
    _histograms(_row(figure, 0.342, 0.085, 0.655, 2), name, runs)
    _heading(figure, 0.455, "What it is worth", "Test error, a line a seed", x=0.7)
    _errors(_row(figure, 0.342, 0.085, 0.975, 1, left=0.76)[0], runs)
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


def _heading(figure: Figure, y: float, text: str, detail: str, x: float = 0.015) -> None:
    figure.text(x, y, text, size=10.5, weight="bold", color=INK, va="center")
    figure.text(x, y - 0.042, detail, size=8, color=QUIET, va="center")


def _row(
    figure: Figure, top: float, bottom: float, right: float, count: int, left: float = 0.09
) -> list[Axes]:
    """Add so many panels side by side on one scale."""
    grid = figure.add_gridspec(
        1, count, left=left, right=right, top=top, bottom=bottom, wspace=0.13
    )
    axes = list(grid.subplots(sharey=True, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(FAINT)
        ax.tick_params(colors=QUIET, labelsize=7, length=2.5, color=FAINT)
    return axes


def _curves(axes: list[Axes], shown: list[int], runs: dict[Arm, list[Outcome]]) -> None:
    """Draw a layer in each panel: its ratio over steps in every run, of the control in the median."""
    drawn = []
    _logarithmic(axes[0])
    for ax, i in zip(axes, shown, strict=True):
        layer = runs["without"][0].after[i]
        ax.axhline(1, color=INK, lw=0.8, ls=(0, (4, 3)))
        for arm, outcomes in runs.items():
            drawn += _lines(ax, [_curve(run, i) for run in outcomes], arm)
        title = f"{layer.name}, {layer.neurons} × {layer.dimension}"
        ax.set_title(title, size=8, color=INK, loc="left", pad=15)
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


def _logarithmic(ax: Axes) -> None:
    """Make the scale of a row logarithmic, without marks between those that are set."""
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())


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
    """Write the ratios after training above the panel, in the colours of the arms."""
    style: dict[str, Any] = {"size": 7.5, "va": "bottom", "transform": ax.transAxes}
    ax.text(0, 1.03, "after training:", color=QUIET, **style)
    for place, (arm, ratio) in enumerate(ends.items()):
        ax.text(
            0.44 + 0.19 * place, 1.03, f"{ratio:.2f}", color=COLORS[arm], weight="bold", **style
        )


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
    """Draw the angles in a layer after training without and with the penalty."""
    end_without = [run.weights[name][1] for run in runs["without"]]
    end_with = [run.weights[name][1] for run in runs["with"]]
    first, second = axes
    _logarithmic(first)
    most = max(
        _histogram(first, "after training without", COLORS["without"], end_without),
        _histogram(second, "with the penalty", COLORS["with"], end_with),
    )
    first.set_ylim(0.7, 4 * most)
    first.yaxis.set_major_locator(LogLocator(10))
    first.yaxis.set_major_formatter("{x:g}")
    first.set_ylabel("pairs", size=8, color=QUIET, labelpad=1)
    first.set_xlabel("angle between two neurons", size=8, color=QUIET, labelpad=3, x=1.06)
    power = end_with[0].shape[1] - 2
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


def _errors(ax: Axes, runs: dict[Arm, list[Outcome]]) -> None:
    """Draw the test errors of all arms, joined seed by seed, and their means."""
    names: list[Arm] = ["without", "control", "with"]
    columns = [[run.error for run in runs[arm]] for arm in names]
    for seed in zip(*columns, strict=True):
        ax.plot(seed, color=FAINT, lw=0.7, zorder=1)
    highest = max(max(column) for column in columns)
    lowest = min(min(column) for column in columns)
    room = 0.3 * (highest - lowest) or 1.0
    for i, (arm, column) in enumerate(zip(names, columns, strict=True)):
        color = COLORS[arm]
        ax.scatter(len(column) * [i], column, s=9, color=color, alpha=0.6, lw=0, zorder=2)
        ax.plot([i - 0.22, i + 0.22], 2 * [mean(column)], color=color, lw=2, zorder=3)
        label = {"size": 7.5, "ha": "center", "color": color}
        ax.text(i, highest + 0.45 * room, f"{mean(column):.1f} %", weight="bold", **label)
    ax.set_xlim(-0.5, 2.5)
    ax.set_ylim(lowest - 0.2 * room, highest + room)
    ax.set_xticks(range(3), names)
    for text, arm in zip(ax.get_xticklabels(), names, strict=True):
        text.set_color(COLORS[arm])
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter("{x:g} %")


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
