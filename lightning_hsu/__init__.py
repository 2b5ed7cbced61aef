"""Hyperspherical uniformity for PyTorch Lightning: see how redundant a network's neurons are, and spread them out."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "CosineSchedule": "coefficients",
    "HypersphericalUniformity": "callback",
    "LayerUniformity": "_monitor.measure",
    "LinearSchedule": "coefficients",
    "Schedule": "coefficients",
    "Share": "coefficients",
    "Summary": "summary",
    "UniformityRegularizer": "regularizer",
    "register_neurons": "_neurons.rules",
    "summarize": "summary",
}
"""Where names are from, which is imported when they are asked for: a report needs no Lightning."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = found
        return found
    if not name.isidentifier() or name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
