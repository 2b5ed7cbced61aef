"""Measures of hyperspherical uniformity: neurons (..., n, d) to a value (...)."""

from lightning_hsu.measures.base import Measure, SphereMeasure
from lightning_hsu.measures.pairwise import PairwiseMeasure
from lightning_hsu.measures.riesz import RieszEnergy

__all__ = ["Measure", "PairwiseMeasure", "RieszEnergy", "SphereMeasure"]
