"""The picture of docs/trained-networks.md: ``python -m tests.pretrained_picture`` draws it anew.

It installs the packages into a folder that is removed afterwards, which needs a package index.
"""

import tempfile
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_hsu.report import Report
from lightning_hsu.report.data import LayerReport
from tests.pretrained_table import NETWORKS, install, report_on

PICTURE = Path(__file__).parents[1] / "docs" / "trained-networks.png"
INK = "#222222"
GRID = "#DDDDDD"
COLOURS = {"depthwise": "#D55E00", "heads, and two neurons": "#8A8A8A", "other layers": "#0072B2"}
TICKS = (0.5, 1, 2, 5, 10, 20, 50)


def kind(layer: LayerReport) -> str:
    """Which of the colours a layer has."""
    if layer.full_space:
        return "heads, and two neurons"
    if "depthwise" in layer.name or layer.name.endswith("conformer.net.4.conv"):
        return "depthwise"
    return "other layers"


def picture(reports: dict[str, Report]) -> Figure:
    """One line a network, and on it a dot at each layer's ratio, on a logarithmic axis."""
    figure = Figure(figsize=(8.6, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.axvline(1, color=INK, linewidth=0.9, linestyle="--", zorder=1)
    for group, colour in COLOURS.items():
        ratios = []
        lines = []
        for line, found in enumerate(reports.values()):
            for layer in found.layers:
                if kind(layer) == group:
                    ratios.append(layer.ratio)
                    lines.append(line)
        ax.scatter(
            ratios, lines, s=34, color=colour, alpha=0.6, linewidths=0, label=group, zorder=2
        )
    ax.set_xscale("log")
    ax.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    ax.xaxis.minorticks_off()
    ax.set_yticks(range(len(reports)), list(reports))
    ax.invert_yaxis()
    ax.grid(axis="x", color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, colors=INK)
    ax.spines[["top", "right", "left", "bottom"]].set_visible(False)
    ax.set_xlabel("energy over that of random neurons (1: as random)", color=INK)
    ax.legend(frameon=False, loc="center right", labelcolor=INK)
    return figure


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if install(folder) != NETWORKS:
            raise SystemExit(
                "not all packages are there for this machine: the picture is not drawn"
            )
        found = {network.name: report_on(network, folder) for network in NETWORKS}
    picture(found).savefig(PICTURE)
