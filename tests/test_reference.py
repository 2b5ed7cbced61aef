"""Random expectations: known values, quadrature against closed form, formula against simulation; and the ratio."""

import math
import pickle
from dataclasses import dataclass

import pytest
import torch

from lightning_hsu._core import pair_expectation
from lightning_hsu.measures import (
    Covering,
    GaussianPotential,
    GramDeterminant,
    Orthogonality,
    PairwiseMeasure,
    Polarization,
    ResultantLength,
    RieszEnergy,
    Separation,
    SlicedWasserstein,
    SphereMeasure,
)
from lightning_hsu.reference import (
    lower_bound,
    random_expectation,
    random_level,
    uniformity_ratio,
    uniformity_score,
)
from tests import configurations as c
from tests.members import InverseFourth

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


# d -> expectations of exp(-rho**2) and exp(-2 rho**2)
GAUSSIAN = {
    2: (0.3085083226, 0.2070019212),
    3: (0.2454210903, 0.1249580672),
    4: (0.2152692892, 0.0893754198),
    5: (0.1978025469, 0.0703518120),
    8: (0.1727473358, 0.0458432535),
    16: (0.1532240736, 0.0298062720),
    64: (0.1396292228, 0.0207494489),
    256: (0.1363966988, 0.0188969682),
    1024: (0.1355998678, 0.0184592891),
}


@pytest.mark.parametrize("d", GAUSSIAN)
def test_known_gaussian_potentials(d):
    for t, value in zip((1, 2), GAUSSIAN[d], strict=True):
        assert random_expectation(GaussianPotential(t=t), n=5, d=d) == pytest.approx(
            value, abs=1e-10
        )


@pytest.mark.parametrize(
    "measure",
    [
        RieszEnergy(s=0),
        RieszEnergy(s=1),
        RieszEnergy(s=2),
        RieszEnergy(s=-1, distance="geodesic"),  # minus the angle: -pi / 2
        GaussianPotential(t=1),
        GaussianPotential(t=2, half_space=True),
        Orthogonality("so"),
        Orthogonality("dso"),
        SlicedWasserstein(circles=4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("d", [4, 5, 8, 16, 64, 256, 1024])
def test_formulas_against_simulation_from_4_to_1024_dimensions(measure, d):
    values = measure(torch.randn(1500, 10, d, dtype=torch.float64))
    error = float(values.std()) / math.sqrt(1500)
    level = random_expectation(measure, 10, d)
    assert (level.source, level.standard_error) == ("exact", 0.0)
    assert float(values.mean()) == pytest.approx(level, abs=4 * error)


@pytest.mark.parametrize("d", [4, 64, 1024])
def test_the_squared_resultant_of_n_random_neurons_is_n_in_the_mean(d):
    squares = ResultantLength()(torch.randn(1500, 12, d)).square()
    assert float(squares.mean()) == pytest.approx(
        12, abs=4 * float(squares.std()) / math.sqrt(1500)
    )


@pytest.mark.parametrize(
    "measure", [Separation(), GramDeterminant(), ResultantLength(), Orthogonality("srip")], ids=repr
)
def test_a_simulated_mean_is_as_good_as_it_says(measure):
    level = random_expectation(measure, 16, 6)
    values = measure(torch.randn(600, 16, 6)).double()
    assert level.source == "simulated mean"
    assert level.standard_error == pytest.approx(float(values.std()) / math.sqrt(101), rel=0.35)
    assert level == pytest.approx(float(values.mean()), abs=4 * level.standard_error)
    assert random_expectation(measure, 16, 6) == level
    assert pickle.loads(pickle.dumps(level)).source == "simulated mean"


def test_the_score_is_0_as_random_and_1_at_the_bound():
    for measure in (
        RieszEnergy(s=0),
        RieszEnergy(s=2),
        GaussianPotential(),
        Separation(),
        GramDeterminant(jitter=0),
    ):
        assert float(uniformity_score(measure, c.simplex(9, 8))) == pytest.approx(1, abs=1e-6)
        assert abs(float(uniformity_score(measure, torch.randn(200, 9, 8)).mean())) < 0.1
    for measure in (RieszEnergy(s=2, half_space=True), Orthogonality("so"), Orthogonality("srip")):
        assert float(uniformity_score(measure, c.orthonormal(8, 8))) == pytest.approx(1, abs=1e-6)
    assert math.isnan(uniformity_score(InverseOfNothing(), torch.randn(5, 4)))


@dataclass(frozen=True)
class InverseOfNothing(SphereMeasure):
    """A measure that knows no bound."""

    def on_sphere(self, x, state):
        return x.square().sum((-2, -1)) + x[..., 0].sum(-1)


@dataclass(frozen=True)
class FromTheMirror(PairwiseMeasure):
    def kernel(self, q, p):
        return 1 / p, 1 / p**2


def test_an_infinite_expectation_of_a_kernel_of_ones_own_is_told():
    """chord**-4 has a finite mean from six dimensions on, 1 / (chord to the mirror image)**2 from four."""
    for d in (2, 3, 4, 5):
        assert random_expectation(InverseFourth(), 8, d) == math.inf
    assert random_expectation(InverseFourth(), 8, 6) == pytest.approx(
        random_expectation(RieszEnergy(s=4), 8, 6), rel=1e-9
    )
    assert random_expectation(FromTheMirror(), 8, 3) == math.inf
    assert random_expectation(FromTheMirror(), 8, 4) == pytest.approx(1, rel=1e-9)
    assert random_level(InverseFourth(), 8, 4).source == "simulated median"


@dataclass(frozen=True)
class Negative(PairwiseMeasure):
    def kernel(self, q, p):
        return -q, -torch.ones_like(q)


def test_the_ratio_grows_with_redundancy_where_values_are_negative_too():
    for measure in (
        Negative(),
        RieszEnergy(s=-1),
        RieszEnergy(s=0),
        GramDeterminant(),
        Polarization(s=0),
    ):
        even, crowded = c.simplex(5, 4), torch.ones(5, 4) + 0.3 * torch.eye(5, 4)
        assert (
            float(uniformity_ratio(measure, even)) < 1 < float(uniformity_ratio(measure, crowded))
        ), measure


def test_there_is_no_score_where_nothing_can_be_better_than_random():
    assert math.isnan(uniformity_score(RieszEnergy(s=-2, half_space=True), torch.randn(4, 8)))
    assert math.isnan(uniformity_score(Covering(half_space=True), torch.randn(4, 8)))


def test_a_wide_softening_does_not_break_the_bound():
    """There the kernel is a line, and the polynomial of the universal bound may lie above it."""
    x = torch.randn(6, 6, 4, dtype=torch.float64)
    measure = RieszEnergy(s=2, half_space=True, softening=1.2)
    for _ in range(300):
        x = torch.nn.functional.normalize(x - 3 * measure.value_and_grad(x)[1], dim=-1)
    assert lower_bound(measure, 6, 4) <= float(measure(x).min())
    assert lower_bound(RieszEnergy(s=2, half_space=True), 6, 4) > lower_bound(measure, 6, 4)


def test_a_kernel_of_any_shape_has_a_bound_that_holds():
    """One that is neither convex nor monotone, from outside the package: the bound is below all that is tried."""

    @dataclass(frozen=True)
    class Wavy(PairwiseMeasure):
        half_space: bool = False

        def kernel(self, q, p):
            return (3 * q).cos() + q, 1 - 3 * (3 * q).sin()

    for half_space in (False, True):
        for n, d in ((2, 2), (3, 2), (5, 3), (9, 4)):
            measure = Wavy(half_space)
            bound = lower_bound(measure, n, d)
            x = torch.randn(30, n, d, dtype=torch.float64)
            for _ in range(60):
                x = torch.nn.functional.normalize(
                    x - 0.05 * n * measure.value_and_grad(x)[1], dim=-1
                )
            lowest = float(measure(x).min())
            assert bound <= lowest + 1e-9
            assert bound > lowest - 1.5


def test_geodesic_s1_in_three_dimensions_is_half_the_sine_integral():
    assert random_expectation(RieszEnergy(s=1, distance="geodesic"), 5, 3) == pytest.approx(
        0.925969, abs=1e-6
    )


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
    error = 4 * float(energies.std()) / math.sqrt(4000)
    error += 1e-6  # an angle and its mirror image's add up to the same always, up to rounding
    assert float(energies.mean()) == pytest.approx(random_expectation(measure, 8, d), abs=error)


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


def test_a_pairwise_measure_from_outside_has_an_expectation():
    assert random_expectation(InverseFourth(), 5, 16) == pytest.approx(
        random_expectation(RieszEnergy(s=4), 5, 16), rel=1e-10
    )


def test_bad_input():
    with pytest.raises(ValueError, match=r"at least 2 neurons of dimension 2; got n=1, d=4"):
        random_expectation(RieszEnergy(), 1, 4)
