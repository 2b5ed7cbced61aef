"""Measures of hyperspherical uniformity: neurons (..., n, d) to a value (...)."""

from lightning_hsu.measures.base import Measure
from lightning_hsu.measures.covering import Covering
from lightning_hsu.measures.determinant import GramDeterminant
from lightning_hsu.measures.gaussian import GaussianPotential
from lightning_hsu.measures.nearest import KoLeo, MinimalAngle, NearestMeasure, Separation
from lightning_hsu.measures.orthogonality import Orthogonality
from lightning_hsu.measures.pairwise import PairwiseMeasure
from lightning_hsu.measures.polarization import Polarization
from lightning_hsu.measures.resultant import ResultantLength
from lightning_hsu.measures.riesz import RieszEnergy
from lightning_hsu.measures.sampled import Sampled
from lightning_hsu.measures.sliced import SlicedWasserstein
from lightning_hsu.measures.sphere import SphereMeasure
from lightning_hsu.measures.state import State

__all__ = [
    "Covering",
    "GaussianPotential",
    "GramDeterminant",
    "KoLeo",
    "Measure",
    "MinimalAngle",
    "NearestMeasure",
    "Orthogonality",
    "PairwiseMeasure",
    "Polarization",
    "ResultantLength",
    "RieszEnergy",
    "Sampled",
    "Separation",
    "SlicedWasserstein",
    "SphereMeasure",
    "State",
]
