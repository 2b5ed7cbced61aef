"""Measures of hyperspherical uniformity: neurons (..., n, d) to a value (...)."""

from lightning_hsu.measures.base import Measure, PairwiseMeasure
from lightning_hsu.measures.riesz import RieszEnergy

__all__ = ["Measure", "PairwiseMeasure", "RieszEnergy"]
