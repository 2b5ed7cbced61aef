"""Measures of projected neurons, as in compressive hyperspherical energy (CoMHE)."""

from lightning_hsu.projections.kinds import GroupProjection, Projection, RandomProjection
from lightning_hsu.projections.learned import Adversarial, AnglePreserving
from lightning_hsu.projections.projected import Projected

__all__ = [
    "Adversarial",
    "AnglePreserving",
    "GroupProjection",
    "Projected",
    "Projection",
    "RandomProjection",
]
