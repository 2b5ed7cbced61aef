"""The ratio without a penalty against what the penalty gains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evidence.comparisons import TITLES, Comparison, hypothesis, ratio_and_gain
from evidence.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST = 1e-3  # of a ratio less 1, on a logarithmic axis
SHOWN = ("half_mhe_2", "orthogonality")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def ratio_and_gain_figure(comparisons: Sequence[Comparison]) -> Figure:
    """A panel a method, a point a setting, a colour a data set; bars are two standard errors."""
    from matplotlib.figure import Figure

    methods = [name for name in SHOWN if any(one.method == name for one in comparisons)]
    figure = Figure(figsize=(5 * len(methods), 4), layout="constrained")
    sets = list(dict.fromkeys(one.result["asked"]["setting"]["data"] for one in comparisons))
    for axes, method in zip(
        figure.subplots(1, len(methods), squeeze=False, sharey=True)[0], methods, strict=True
    ):
        for i, data in enumerate(sets):
            own = [
                one
                for one in comparisons
                if one.method == method and one.result["asked"]["setting"]["data"] == data
            ]
            ratios, y = ratio_and_gain(own, method, "ratio_after", relative=False)
            x = [max(one - 1.0, _LEAST) for one in ratios]
            errors, colour = [2 * one.paired.error for one in own], COLOURS[i % len(COLOURS)]
            axes.errorbar(
                x,
                y,
                errors,
                fmt="o",
                color=colour,
                markersize=4,
                linewidth=0.8,
                label=TITLES.get(data, data),
            )
        found = hypothesis(comparisons, method)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set(
            xscale="log",
            xlabel=f"ratio - 1 of the tuned network without a penalty (at least {_LEAST})",
        )
        axes.set_yscale("symlog", linthresh=1)
        axes.set_title(
            f"{METHODS[method].title}: rho = {found.rho:+.2f} ({found.low:+.2f} to {found.high:+.2f})",
            fontsize=10,
        )
        axes.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("points gained over weight decay ± 2 standard errors")
    first.legend(frameon=False, fontsize=8)
    return figure
