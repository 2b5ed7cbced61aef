"""Numerics: pair sums over the sphere in closed form. Works on tensors only."""

from lightning_hsu._core.autograd import PairEnergy
from lightning_hsu._core.bounds import pair_bound
from lightning_hsu._core.expectation import expected_angles, pair_expectation
from lightning_hsu._core.kernel import FLOOR, Kernel, PairTerm, or_one
from lightning_hsu._core.nearest import smallest_angle
from lightning_hsu._core.oracle import oracle_energy
from lightning_hsu._core.pairwise import in_one_pass, pair_energy, pair_rows
from lightning_hsu._core.precision import (
    bf16_products,
    exact_arithmetic,
    with_float64,
    working_dtype,
)
from lightning_hsu._core.sphere import (
    coincident,
    live_rows,
    seeded_noise,
    separate_duplicates,
    tangent,
    to_weights,
    unit_rows,
)

__all__ = [
    "FLOOR",
    "Kernel",
    "PairEnergy",
    "PairTerm",
    "bf16_products",
    "coincident",
    "exact_arithmetic",
    "expected_angles",
    "in_one_pass",
    "live_rows",
    "or_one",
    "oracle_energy",
    "pair_bound",
    "pair_energy",
    "pair_expectation",
    "pair_rows",
    "seeded_noise",
    "separate_duplicates",
    "smallest_angle",
    "tangent",
    "to_weights",
    "unit_rows",
    "with_float64",
    "working_dtype",
]
