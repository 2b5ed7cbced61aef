"""Hyperspherical uniformity for PyTorch Lightning: see how redundant a network's neurons are, and spread them out."""

from lightning_hsu import measures, metrics, presets, projections, reference
from lightning_hsu.callback import HypersphericalUniformity
from lightning_hsu.monitor import LayerUniformity
from lightning_hsu.neurons import register_neurons
from lightning_hsu.regularizer import UniformityRegularizer
from lightning_hsu.schedules import CosineSchedule, LinearSchedule, Schedule
from lightning_hsu.share import Share

__version__ = "0.1.0"

__all__ = [
    "CosineSchedule",
    "HypersphericalUniformity",
    "LayerUniformity",
    "LinearSchedule",
    "Schedule",
    "Share",
    "UniformityRegularizer",
    "measures",
    "metrics",
    "presets",
    "projections",
    "reference",
    "register_neurons",
]
