"""Random expectations: known values, quadrature against closed form, formula against simulation; and the ratio."""

import math
from dataclasses import dataclass

import pytest
import torch

from lightning_hsu.core import pair_expectation
from lightning_hsu.measures import PairwiseMeasure, RieszEnergy
from lightning_hsu.reference import random_expectation, random_level, uniformity_ratio

# d -> expectations of log(1 / rho), 1 / rho and 1 / rho**2 for two random points, to the digits published
KNOWN = {
    2: (0, math.inf, math.inf),
    3: (-0.1931471806, 1, math.inf),
    4: (-0.25, 0.8488263632, 1),
    5: (-0.2764805139, 0.8, 0.75),
    8: (-0.3083333333, 0.7525525505, 0.6),
    16: (-0.3293525919, 0.7262907485, 0.5384615385),
    64: (-0.3425738462, 0.7113964570, 0.5081967213),
    256: (-0.3455912758, 0.7081515070, 0.5019762846),
    1024: (-0.3463290916, 0.7073662858, 0.5004897160),
}


@pytest.mark.parametrize("d", KNOWN)
def test_known_values(d):
    for s, value in zip((0, 1, 2), KNOWN[d], strict=True):
        assert random_expectation(RieszEnergy(s=s), n=5, d=d) == pytest.approx(value, abs=1e-10)


def test_geodesic_s1_in_three_dimensions_is_half_the_sine_integral():
    assert random_expectation(RieszEnergy(s=1, distance="geodesic"), 5, 3) == pytest.approx(0.925969, abs=1e-6)


@pytest.mark.parametrize("d", [2, 3, 4, 7, 64, 1024])
@pytest.mark.parametrize("s", [-2, -1, 0, 0.5, 1, 2, 3])
def test_quadrature_equals_the_closed_form(d, s):
    if s < d - 1:
        assert pair_expectation(RieszEnergy(s=s).kernel, d) == pytest.approx(
            random_expectation(RieszEnergy(s=s), 5, d), abs=1e-9
        )


@pytest.mark.parametrize("distance", ["chordal", "geodesic"])
@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize(("s", "d"), [(0, 2), (0, 4), (1, 5), (2, 8), (2, 64), (-1, 3)])
def test_formula_against_simulation(s, d, half_space, distance):
    measure = RieszEnergy(s=s, half_space=half_space, distance=distance)
    energies = measure(torch.randn(4000, 8, d))
    error = float(energies.std()) / math.sqrt(4000)
    assert float(energies.mean()) == pytest.approx(random_expectation(measure, 8, d), abs=4 * error)


def test_where_the_expectation_is_infinite_the_median_stands_in():
    measure = RieszEnergy(s=2)
    assert random_expectation(measure, 32, 3) == math.inf
    level = random_level(measure, 32, 3)
    draws = measure(torch.randn(2000, 32, 3))
    assert float(draws.quantile(0.35)) < level < float(draws.quantile(0.65))
    assert random_level(measure, 32, 3) == level


@pytest.mark.parametrize("s", [-1, 0, 1, 2, 3])
def test_the_ratio_is_one_for_random_neurons_and_grows_with_redundancy(s):
    measure = RieszEnergy(s=s, half_space=True)
    spread, x = torch.linalg.qr(torch.randn(64, 64)).Q, torch.randn(64, 64)
    bunched = x + 2 * torch.randn(64)
    assert float(uniformity_ratio(measure, x)) == pytest.approx(1, abs=0.02)
    assert (
        float(uniformity_ratio(measure, spread))
        < float(uniformity_ratio(measure, x))
        < 0.99 * float(uniformity_ratio(measure, bunched))
    )


@dataclass(frozen=True)
class InverseFourth(PairwiseMeasure):
    def kernel(self, q, p):
        return q**-2, -2 * q**-3


def test_a_pairwise_measure_from_outside_has_an_expectation():
    assert random_expectation(InverseFourth(), 5, 16) == pytest.approx(random_expectation(RieszEnergy(s=4), 5, 16), rel=1e-10)


def test_bad_input():
    with pytest.raises(ValueError, match=r"at least 2 neurons of dimension 2; got n=1, d=4"):
        random_expectation(RieszEnergy(), 1, 4)
