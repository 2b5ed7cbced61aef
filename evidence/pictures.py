"""What the penalty gains: against the ratio without it, and against what controls gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evidence.comparisons import TITLES, Comparison, Result, hypothesis, ratio_and_gain
from evidence.methods import METHODS
from evidence.statistics import Paired
from evidence.uniformity import Beyond, beyond_controls

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEAST = 1e-3  # of a ratio less 1, on a logarithmic axis
SHOWN = ("half_mhe_2", "orthogonality")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_CONTROLS = {"random": "a random direction of equal length", "length": "growth alone"}


def ratio_and_gain_figure(comparisons: Sequence[Comparison]) -> Figure:
    """A panel a method, a point a setting, a colour a data set; bars are two standard errors."""
    from matplotlib.figure import Figure

    methods = [name for name in SHOWN if any(one.method == name for one in comparisons)]
    figure = Figure(figsize=(5 * len(methods), 4), layout="constrained")
    panels = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    for axes, method in zip(panels, methods, strict=True):
        _draw(axes, comparisons, method)
    panels[0].set_ylabel("points gained over weight decay ± 2 standard errors")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _draw(axes: Axes, comparisons: Sequence[Comparison], method: str) -> None:
    """The panel of one method."""
    groups: dict[str, list[Comparison]] = {}
    for one in comparisons:
        group = groups.setdefault(one.result["asked"]["setting"]["data"], [])
        if one.method == method:
            group.append(one)
    for i, (data, own) in enumerate(groups.items()):
        ratios, gains = ratio_and_gain(own, method, "ratio_after", relative=False)
        axes.errorbar(
            [max(ratio - 1.0, _LEAST) for ratio in ratios],
            gains,
            [2 * one.paired.error for one in own],
            fmt="o",
            color=COLOURS[i % len(COLOURS)],
            markersize=4,
            linewidth=0.8,
            label=TITLES.get(data, data),
        )
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel(f"ratio - 1 of the tuned network without a penalty (at least {_LEAST})")
    axes.set_yscale("symlog", linthresh=1)
    found = hypothesis(comparisons, method)
    rho = f"rho = {found.rho:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
    axes.set_title(f"{METHODS[method].title}: {rho}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def controls_figure(results: Sequence[Result]) -> Figure:
    """A panel a control without an aim: its gain against half-space MHE's, a dot a setting.

    Where the control is worse than weight decay, that counts in its place. Above the diagonal
    half-space MHE gains more. Bars are two standard errors of the difference.
    """
    from matplotlib.figure import Figure

    found = beyond_controls(results, ["half_mhe_2"])
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, control in zip(panels, ("random", "length"), strict=True):
        _draw_control(axes, found, control)
    panels[0].set_ylabel("points that half-space MHE gains over weight decay,\n± 2 standard errors")
    panels[0].legend(frameon=False, fontsize=8, loc="upper left", title="initial weights")
    return figure


def _from_the_better(one: Beyond, control: str) -> Paired:
    """The difference from the control, or from weight decay where that is lower."""
    return max(one.changes[control], one.changes["decay"], key=lambda change: change.mean)


def _draw_control(axes: Axes, found: Sequence[Beyond], control: str) -> None:
    """The panel of one control."""
    drawn: list[float] = []
    groups: dict[str, list[Beyond]] = {"PyTorch's": [], "× 0.3": [], "× 0.1": [], "× 0.03": []}
    for one in found:
        scale = one.result["asked"]["setting"]["scale"]
        groups["PyTorch's" if scale == 1.0 else f"× {scale:g}"].append(one)
    for i, (title, own) in enumerate(groups.items()):
        gains = [-one.changes["decay"].mean for one in own]
        beyond = [_from_the_better(one, control) for one in own]
        controlled = [gain + change.mean for gain, change in zip(gains, beyond, strict=True)]
        drawn += [*gains, *controlled]
        axes.errorbar(
            controlled,
            gains,
            [2 * change.error for change in beyond],
            fmt="o",
            color=COLOURS[i],
            markersize=4,
            linewidth=0.8,
            label=title,
        )
    ends = [min(-0.5, 1.5 * min(drawn)), max(1.0, 1.5 * max(drawn))]
    axes.plot(ends, ends, color="0.6", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.05, ends[1])  # no gain is 0
    axes.set_ylim(*ends)
    axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel(f"points that {_CONTROLS[control]} gains, if any")
    axes.set_title("above the line half-space MHE gains more than this control", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
