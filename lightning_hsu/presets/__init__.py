"""The published recipes, formula by formula: see :func:`sphere_uniformity`."""

from lightning_hsu._meant import PRESETS
from lightning_hsu.presets.comhe import (
    OfficialAdversarialCoMHE,
    OfficialAngleCoMHE,
    OfficialRandomCoMHE,
)
from lightning_hsu.presets.pairs import OfficialMGD, OfficialMHE, OfficialMHS
from lightning_hsu.presets.poles import OfficialMHC, OfficialMHP, OfficialRMHP
from lightning_hsu.presets.recipes import sphere_uniformity

__all__ = [
    "PRESETS",
    "OfficialAdversarialCoMHE",
    "OfficialAngleCoMHE",
    "OfficialMGD",
    "OfficialMHC",
    "OfficialMHE",
    "OfficialMHP",
    "OfficialMHS",
    "OfficialRMHP",
    "OfficialRandomCoMHE",
    "sphere_uniformity",
]
