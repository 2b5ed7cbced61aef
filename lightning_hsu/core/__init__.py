"""Numerics: pair sums over the sphere in closed form. Knows tensors only."""

from lightning_hsu.core.autograd import PairEnergy
from lightning_hsu.core.kernel import FLOOR, Kernel, PairTerm
from lightning_hsu.core.nearest import smallest_angle
from lightning_hsu.core.oracle import oracle_energy
from lightning_hsu.core.pairwise import pair_energy
from lightning_hsu.core.precision import with_float64, working_dtype
from lightning_hsu.core.sphere import unit_rows

__all__ = [
    "FLOOR",
    "Kernel",
    "PairEnergy",
    "PairTerm",
    "oracle_energy",
    "pair_energy",
    "smallest_angle",
    "unit_rows",
    "with_float64",
    "working_dtype",
]
