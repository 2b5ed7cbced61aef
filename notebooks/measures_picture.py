"""Draw the step that descent on each measure's penalty takes, for eight points on a circle."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from lightning_hsu.measures import (
    Covering,
    GaussianPotential,
    GramDeterminant,
    KoLeo,
    Measure,
    MinimalAngle,
    Orthogonality,
    Polarization,
    ResultantLength,
    RieszEnergy,
    Separation,
    SlicedWasserstein,
)

STEP = "#0072B2"
HOLE = "#D55E00"  # differs from STEP even for colour-blind readers
INK = "#222222"
QUIET = "#6B6B6B"
FAINT = "#C9C9C9"
LONGEST = 0.58  # arrow, in radii
NO_FORCE = 1e-6  # of the largest step in the panel; less is rounding
COLUMNS = 5
ARROW: dict[str, Any] = {
    "angles": "xy",
    "scale_units": "xy",
    "scale": 1,
    "minlength": 0,
    "width": 0.018,
    "headwidth": 3.4,
    "headlength": 4.2,
    "headaxislength": 3.8,
    "color": STEP,
    "edgecolor": "white",
    "linewidth": 0.4,
}

NEAR_DUPLICATES = (138.0, 144.0)
THREE = (52.0, 68.0, 86.0)
LONE = (298.0,)
ALMOST_OPPOSITE = (15.0, 190.0)
DEGREES = (*NEAR_DUPLICATES, *THREE, *LONE, *ALMOST_OPPOSITE)


@dataclass(frozen=True)
class Panel:
    """A measure, the code that makes it and what it does in words."""

    title: str
    measure: Measure
    text: str


PANELS = (
    Panel("RieszEnergy(s=0)", RieszEnergy(s=0), "every pair repels,\nnear and far"),
    Panel("RieszEnergy(s=2)", RieszEnergy(s=2), "every pair repels,\nnear ones far harder"),
    Panel(
        "RieszEnergy(s=2,\nhalf_space=True)",
        RieszEnergy(s=2, half_space=True),
        "mirror images\nrepel as well",
    ),
    Panel(
        "GaussianPotential()", GaussianPotential(), "repels at middle range,\nhardly when very near"
    ),
    Panel("Separation()", Separation(), "parts the nearest pair,\nnothing else"),
    Panel(
        "Separation(\nhalf_space=True)", Separation(half_space=True), "parts the two\nnearest lines"
    ),
    Panel("MinimalAngle()", MinimalAngle(), "each from its nearest,\nnear or far alike"),
    Panel("KoLeo()", KoLeo(), "each from its nearest,\nharder when near"),
    Panel("GramDeterminant()", GramDeterminant(), "grows the volume\nthat they span"),
    Panel("Polarization()", Polarization(), "towards the\nloneliest place"),
    Panel("Covering()", Covering(), "the edges close\nthe largest gap"),
    Panel("ResultantLength()", ResultantLength(), "all away from their mean,\nduplicates together"),
    Panel("SlicedWasserstein()", SlicedWasserstein(), "each to its place\nin an even spacing"),
    Panel('Orthogonality("so")', Orthogonality("so"), "all away from\nthe main axis"),
)
CAPTION = """\
Arrows: the step of gradient descent on the penalty. Their directions are exact, their lengths square roots, each panel
scaled to its longest. Hollow: no force. Filled without an arrow: hardly any. Small rings: mirror images. Star: the
loneliest place. Dashed: the direction of the mean; the main axis, along which most lie."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_name("measures.png"),
        help="the PNG to write",
    )
    draw_picture(parser.parse_args(arguments).out)


def on_circle(degrees: tuple[float, ...]) -> Tensor:
    """Unit rows (n, 2) at these angles."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def steps(measure: Measure, x: Tensor) -> Tensor:
    """The step (n, 2) of gradient descent on the penalty."""
    return -measure.value_and_grad(x)[1]


def arrows(step: Tensor) -> Tensor:
    """Arrows (n, 2) for steps: lengths are square roots, the longest LONGEST, 0 without a force."""
    length = step.norm(dim=1, keepdim=True)
    share = length / length.max()
    return torch.where(share > NO_FORCE, LONGEST * share.sqrt() * step / length, 0.0)


def loneliest(measure: Measure, x: Tensor) -> Tensor:
    """The witnesses (k, 2) that count in the penalty; most measures have none."""
    state = measure.prepare(x) or {}
    if "points" not in state:
        return x[:0]
    weights = state.get("shares", state.get("multipliers"))
    return state["points"][0, (weights[0] != 0).any(1)]


def guide(measure: Measure, x: Tensor) -> Tensor:
    """Ends (2, 2) of a line along the mean or the main axis; (0, 2) for most measures."""
    if isinstance(measure, ResultantLength):
        mean = x.mean(0)
        return torch.stack([torch.zeros_like(mean), mean / mean.norm()])
    if isinstance(measure, Orthogonality):
        axis = torch.linalg.eigh(x.mT @ x).eigenvectors[:, -1]
        return torch.stack([-axis, axis])
    return x[:0]


def draw_picture(path: Path) -> None:
    """Write one PNG: a panel that names the points, then a panel for each measure."""
    figure = Figure(figsize=(9, 8.5), dpi=200, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    edges = {
        "left": 0.005,
        "right": 0.995,
        "top": 0.95,
        "bottom": 0.125,
        "wspace": 0.02,
        "hspace": 0.42,
    }
    key, *axes = figure.subplots(3, COLUMNS, gridspec_kw=edges).flat
    x = on_circle(DEGREES)
    _draw_key(key, x)
    for ax, panel in zip(axes, PANELS, strict=True):
        _draw_panel(ax, panel, x)
    figure.text(0.5, 0.012, CAPTION, size=8.5, color=INK, ha="center", va="bottom", linespacing=1.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    palette = drawn.quantize(128, Image.Quantize.MAXCOVERAGE)  # a third of the size
    palette.save(path, optimize=True)


def _draw_key(ax: Axes, points: Tensor) -> None:
    _circle(ax, "Eight points", "the same\nin every panel")
    _dots(ax, points, torch.ones(len(points), dtype=torch.bool))
    _dashed(ax, on_circle(ALMOST_OPPOSITE))
    notes = (
        (0.8, 140, f"{NEAR_DUPLICATES[1] - NEAR_DUPLICATES[0]:g}° apart", "left", 0),
        (0.78, THREE[1], "three", "center", 0),
        (0.14, 283, "almost opposite", "center", 12),
        (0.84, LONE[0], "lone", "right", 0),
        (0.84, 232, "gap", "center", 0),
    )
    for radius, degrees, text, side, rotation in notes:
        x, y = (radius * on_circle((degrees,))[0]).tolist()
        ax.text(x, y, text, size=7.5, color=QUIET, ha=side, va="center", rotation=rotation)


def _draw_panel(ax: Axes, panel: Panel, x: Tensor) -> None:
    _circle(ax, panel.title, panel.text)
    arrow = arrows(steps(panel.measure, x))
    _dashed(ax, guide(panel.measure, x))
    _witness(ax, panel.measure, x)
    if panel.measure.half_space:
        ax.scatter(*(-x).T.tolist(), s=9, facecolor="white", edgecolor=QUIET, lw=0.7, zorder=2)
    ax.quiver(*x.T.tolist(), *arrow.T.tolist(), **ARROW, zorder=4)
    _dots(ax, x, arrow.norm(dim=1) > 0)


def _circle(ax: Axes, title: str, text: str) -> None:
    ax.set_axis_off()
    ax.set_aspect("equal")
    ax.set_xlim(-1.35, 1.35)
    ax.set_ylim(-1.25, 1.25)
    ax.plot(*on_circle(tuple(range(361))).T.tolist(), color=FAINT, lw=1, zorder=1)
    centered: dict[str, Any] = {"transform": ax.transAxes, "ha": "center"}
    ax.text(0.5, 1.02, title, size=9, weight="bold", color=INK, va="bottom", **centered)
    for i, line in enumerate(text.split("\n")):
        ax.text(0.5, -0.09 - 0.09 * i, line, size=8.5, color=QUIET, **centered)


def _dashed(ax: Axes, ends: Tensor) -> None:
    ax.plot(*ends.T.tolist(), color=QUIET, lw=0.8, ls=(0, (4, 3)), zorder=1)


def _dots(ax: Axes, x: Tensor, pushed: Tensor) -> None:
    colors = [INK if force else "white" for force in pushed.tolist()]
    ax.scatter(*x.T.tolist(), s=15, facecolor=colors, edgecolor=INK, lw=0.9, zorder=5)


def _witness(ax: Axes, measure: Measure, x: Tensor) -> None:
    """Mark the loneliest place with a star, and for a covering the arc to its nearest points."""
    for point in loneliest(measure, x):
        ax.scatter(*point.tolist(), marker="*", s=90, color=HOLE, lw=0, zorder=3)
        if isinstance(measure, Covering):
            middle = math.degrees(math.atan2(point[1], point[0]))
            radius = math.degrees(measure(x))
            degrees = torch.linspace(middle - radius, middle + radius, 61)
            arc = on_circle(tuple(degrees.tolist()))
            ax.plot(*arc.T.tolist(), color=HOLE, lw=5, alpha=0.3, solid_capstyle="butt", zorder=1)


if __name__ == "__main__":
    main()
