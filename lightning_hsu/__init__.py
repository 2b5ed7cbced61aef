"""Hyperspherical uniformity for PyTorch Lightning: see how redundant a network's neurons are, and spread them out."""

from lightning_hsu import measures, metrics, presets, projections, reference
from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu._neurons.rules import register_neurons
from lightning_hsu.callback import HypersphericalUniformity
from lightning_hsu.coefficients import CosineSchedule, LinearSchedule, Schedule, Share
from lightning_hsu.regularizer import UniformityRegularizer
from lightning_hsu.summary import Summary, summarize

__version__ = "0.1.0"

__all__ = [
    "CosineSchedule",
    "HypersphericalUniformity",
    "LayerUniformity",
    "LinearSchedule",
    "Schedule",
    "Share",
    "Summary",
    "UniformityRegularizer",
    "measures",
    "metrics",
    "presets",
    "projections",
    "reference",
    "register_neurons",
    "summarize",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
