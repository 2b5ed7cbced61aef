"""Lower bounds on the sphere: met by sharp configurations, never undercut; exact as a quadrature; caps in closed form."""

import math
from dataclasses import replace
from functools import partial
from itertools import combinations, product

import pytest
import torch

from lightning_hsu._core.levenshtein import (
    cap_angle,
    cap_fraction,
    largest_cosine,
    universal_quadrature,
)
from lightning_hsu.measures import GaussianPotential, RieszEnergy, Separation
from lightning_hsu.reference import lower_bound, random_expectation
from tests import configurations as c

# kernels of the cosine, and what random points have on average
KERNELS = {
    "log": lambda t: -(2 - 2 * t).log() / 2,
    "s = 1": lambda t: (2 - 2 * t) ** -0.5,
    "s = 2": lambda t: 1 / (2 - 2 * t),
    "Gaussian": lambda t: (4 * t - 4).exp(),
}
RANDOM = {
    name: partial(random_expectation, RieszEnergy(s=s))
    for s, name in enumerate(("log", "s = 1", "s = 2"))
}
BIG = [
    (50257, 768),
    (4096, 4096),
    (8192, 2048),
    (200000, 4096),
    (200000, 50),
    (4096, 9),
    (10000, 3),
    (200000, 3),
    (5000, 2),
]


def e8_roots():
    """The 240 roots, squared norm 2: two entries of +-1, or all +-1/2 with an even number of minus signs."""
    signs = list(product((1, -1), repeat=2))
    pairs = [
        [(i == a) * x + (i == b) * y for i in range(8)]
        for a, b in combinations(range(8), 2)
        for x, y in signs
    ]
    halves = [
        [sign / 2 for sign in row] for row in product((1, -1), repeat=8) if math.prod(row) == 1
    ]
    return torch.tensor(pairs + halves, dtype=torch.float64)


def neighbours(x, cosine):
    """The points at this cosine from the first one, projected on its complement: one dimension less."""
    x = torch.nn.functional.normalize(x, dim=-1)
    near = x[((x @ x[0]) - cosine).abs() < 1e-9]
    complement = torch.linalg.qr(torch.cat([x[:1], torch.eye(x.shape[1], dtype=x.dtype)]).T).Q[
        :, 1:
    ]
    return torch.nn.functional.normalize(near @ complement, dim=-1)


def upper(x):
    """One of each two opposite points."""
    signs = x @ torch.arange(1, x.shape[1] + 1, dtype=x.dtype).sqrt()
    return x[signs > 0]


def half_cube():
    points = [signs for signs in product((1.0, -1.0), repeat=5) if math.prod(signs) == 1]
    return torch.tensor(points, dtype=torch.float64) / math.sqrt(5)


SHARP = {
    **{
        f"simplex of {n} in d = {d}": (c.simplex(n, d), n, d)
        for n, d in [(2, 2), (2, 9), (3, 2), (4, 3), (4, 9), (33, 32)]
    },
    **{f"cross-polytope in d = {d}": (c.cross_polytope(d), 2 * d, d) for d in (2, 3, 5, 24)},
    **{f"polygon of {n}": (c.polygon(n), n, 2) for n in (4, 5, 6, 7, 8, 31, 100)},
    "icosahedron": (c.icosahedron(), 12, 3),
    "E8": (e8_roots(), 240, 8),
    "56 in d = 7": (neighbours(e8_roots(), 1 / 2), 56, 7),
    "27 in d = 6": (neighbours(neighbours(e8_roots(), 1 / 2), 1 / 3), 27, 6),
    "16 in d = 5": (half_cube(), 16, 5),
    "16 in d = 5, from the 27": (
        neighbours(neighbours(neighbours(e8_roots(), 1 / 2), 1 / 3), 1 / 4),
        16,
        5,
    ),
}

# (n, d) of sharp configurations -> cosine to the other points: how many have it
SPECTRA = {
    (100, 22): {-4 / 11: 22, 1 / 11: 77},
    (112, 21): {-1 / 3: 30, 1 / 9: 81},
    (162, 21): {-2 / 7: 56, 1 / 7: 105},
    (275, 22): {-1 / 4: 112, 1 / 6: 162},
    (552, 23): {-1: 1, -1 / 5: 275, 1 / 5: 275},
    (891, 22): {-1 / 2: 42, -1 / 8: 512, 1 / 4: 336},
    (4600, 23): {-1: 1, -1 / 3: 891, 0: 2816, 1 / 3: 891},
    (196560, 24): {-1: 1, -1 / 2: 4600, -1 / 4: 47104, 0: 93150, 1 / 4: 47104, 1 / 2: 4600},
}


def bound(kernel, n, d):
    nodes, weights = universal_quadrature(n, d)
    return float((weights * kernel(nodes)).sum())


def energy(kernel, x):
    x = torch.nn.functional.normalize(x, dim=-1)
    i, j = torch.triu_indices(len(x), len(x), 1)
    return kernel((x @ x.mT)[i, j].clamp(-1, 1)).mean()


def gaussian_mean(d):
    """Over random points, by the trapezoidal rule in the angle."""
    angles = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    density = angles.sin() ** (d - 2)
    return float(
        torch.trapezoid(density * KERNELS["Gaussian"](angles.cos()), angles)
        / torch.trapezoid(density, angles)
    )


def largest(x):
    x = torch.nn.functional.normalize(x, dim=-1)
    return float((x @ x.mT - 3 * torch.eye(len(x))).max())


def optimised(kernel, n, d):
    x = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [x],
        max_iter=300,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        search.zero_grad()
        value = energy(kernel, x)
        value.backward()
        return value

    search.step(closure)
    return x.detach()


def strength(n, d):
    """The degree tau with D(tau) < n <= D(tau + 1), from the dimensions of the harmonic polynomials; at least 1."""

    def homogeneous(k):
        return math.comb(k + d - 1, d - 1) if k >= 0 else 0

    def polynomials(k):  # on the sphere, up to degree k
        return homogeneous(k) + homogeneous(k - 1)

    def fewest(tau):
        return polynomials(tau // 2) if tau % 2 == 0 else 2 * homogeneous(tau // 2)

    return next(tau for tau in range(1, n + 1) if n <= fewest(tau + 1))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("name", SHARP)
def test_sharp_configurations_meet_the_bound(name, kernel):
    x, n, d = SHARP[name]
    assert x.shape == (n, d)
    assert bound(kernel, n, d) == pytest.approx(float(energy(kernel, x)), rel=1e-9)
    assert largest_cosine(n, d) == pytest.approx(largest(x), abs=1e-12)


@pytest.mark.parametrize(("n", "d"), SPECTRA)
def test_the_rule_of_a_sharp_configuration_is_its_distribution_of_cosines(n, d):
    expected = SPECTRA[n, d]
    nodes, weights = universal_quadrature(n, d)
    assert sum(expected.values()) == n - 1
    assert nodes.tolist() == pytest.approx(list(expected), abs=1e-14)
    assert (weights * (n - 1)).tolist() == pytest.approx(list(expected.values()), rel=1e-12)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(("n", "d"), [(5, 3), (9, 3), (20, 3), (7, 4), (17, 4), (8, 5), (13, 5)])
def test_optimised_configurations_stay_above(n, d, kernel):
    x = optimised(kernel, n, d)
    value, least = float(energy(kernel, x)), bound(kernel, n, d)
    assert least <= value + 1e-12
    gap = 0.2 if kernel is KERNELS["Gaussian"] else 0.02  # measured: 0.18, the steep kernel; 0.015
    assert value <= least + gap * abs(least)
    assert largest_cosine(n, d) <= largest(x)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("d", [2, 3, 4, 8, 50])
def test_random_configurations_stay_above(d, kernel):
    for n in (2, 3, d, d + 1, d + 2, 2 * d, 2 * d + 1, 3 * d, 150):
        x = torch.randn(n, d, dtype=torch.float64)
        assert bound(kernel, n, d) <= float(energy(kernel, x)) + 1e-12
        assert largest_cosine(n, d) <= largest(x) + 1e-12


def test_the_600_cell_stays_above():
    golden = (1 + math.sqrt(5)) / 2
    even = [p for p in product(range(4), repeat=4) if len(set(p)) == 4 and _inversions(p) % 2 == 0]
    values = [
        (0.0, x / 2, y * golden / 2, z / golden / 2) for x, y, z in product((1, -1), repeat=3)
    ]
    points = torch.tensor([[v[i] for i in p] for v in values for p in even], dtype=torch.float64)
    corners = torch.tensor(list(product((0.5, -0.5), repeat=4)), dtype=torch.float64)
    x = torch.cat([c.cross_polytope(4), corners, points])
    assert len(x) == 120
    for kernel in KERNELS.values():
        assert bound(kernel, 120, 4) == pytest.approx(float(energy(kernel, x)), rel=1e-2)
        assert bound(kernel, 120, 4) < float(energy(kernel, x))
    assert largest_cosine(120, 4) < largest(x) == pytest.approx(golden / 2)


def _inversions(p):
    return sum(a > b for a, b in combinations(p, 2))


@pytest.mark.parametrize(
    ("n", "d"),
    [(n, d) for d in (2, 3, 4, 7, 24) for n in (2, 3, 5, 8, 9, 24, 25, 26, 48, 49, 200, 3000)]
    + BIG,
)
def test_the_rule_is_exact(n, d):
    nodes, weights = universal_quadrature(n, d)
    tau = strength(n, d)
    assert nodes.dtype == weights.dtype == torch.float64
    assert nodes.shape == weights.shape == (tau // 2 + 1,)
    assert bool((nodes[1:] > nodes[:-1]).all())
    assert -1 <= float(nodes[0]) <= float(nodes[-1]) < 1
    assert float(weights.min()) > 0
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    # Gegenbauer polynomials, 1 at 1, integrate to 0; with the node 1 of weight 1 / n the rule gives that too
    before, now = torch.ones_like(nodes), nodes
    for i in range(1, tau + 1):
        assert float((weights * now).sum()) * (n - 1) / n == pytest.approx(-1 / n, abs=1e-12), i
        before, now = now, ((2 * i + d - 2) * nodes * now - i * before) / (i + d - 2)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("d", [2, 3, 5, 16])
def test_more_points_raise_the_bound(d, kernel):
    values = torch.tensor([bound(kernel, n, d) for n in range(2, 300)], dtype=torch.float64)
    assert bool((values.diff() > 0).all())
    cosines = torch.tensor([largest_cosine(n, d) for n in range(2, 300)], dtype=torch.float64)
    assert bool((cosines.diff() >= 0).all())


@pytest.mark.parametrize(
    ("n", "d"), [(2, 2), (3, 2), (2, 4096), (4097, 4096), (4098, 4096), (8193, 4096), *BIG]
)
def test_the_bound_is_finite_and_below_random_points(n, d):
    for name, kernel in KERNELS.items():
        mean = RANDOM[name](n, d) if name in RANDOM else gaussian_mean(d)
        assert math.isfinite(bound(kernel, n, d))
        assert bound(kernel, n, d) <= mean + 1e-12
    assert -1 <= largest_cosine(n, d) < 1


def test_largest_cosine_of_few_points():
    assert [largest_cosine(n, 4) for n in range(2, 9)] == [-1, -1 / 2, -1 / 3, -1 / 4, 0, 0, 0]
    assert 0 < largest_cosine(9, 4) < 0.1
    assert largest_cosine(100, 2) == pytest.approx(math.cos(math.pi / 50), abs=1e-15)


@pytest.mark.parametrize(
    "fraction", [0, 1e-12, 1e-4, 0.1, 0.25, 0.4999, 0.5, 0.5001, 0.75, 0.999, 1]
)
def test_caps_in_closed_form(fraction):
    assert cap_angle(fraction, 2) == pytest.approx(math.pi * fraction, abs=1e-14)
    assert cap_angle(fraction, 3) == pytest.approx(2 * math.asin(math.sqrt(fraction)), abs=1e-12)
    angle = cap_angle(fraction, 4)
    assert (angle - math.sin(angle) * math.cos(angle)) / math.pi == pytest.approx(
        fraction, abs=1e-14
    )
    angle = cap_angle(fraction, 5)
    assert (2 - 3 * math.cos(angle) + math.cos(angle) ** 3) / 4 == pytest.approx(
        fraction, abs=1e-14
    )


@pytest.mark.parametrize("d", [2, 3, 4, 5, 10, 64, 1000, 4095, 4096])
def test_cap_fraction_is_the_inverse(d):
    for fraction in (0, 1e-100, 1e-9, 0.01, 0.3, 0.5, 0.6, 0.99, 1):
        assert cap_fraction(cap_angle(fraction, d), d) == pytest.approx(
            fraction, rel=1e-11, abs=1e-18
        )
    assert cap_fraction(0, d) == 0
    assert cap_fraction(math.pi, d) == 1
    assert cap_fraction(math.pi / 2, d) == 0.5


@pytest.mark.parametrize("d", [5, 64, 1001, 4096])
def test_caps_add_up_as_their_rims_do(d):
    """The rim's size is sin**(d-2) G(d/2) / (sqrt(pi) G((d-1)/2)): Simpson's rule between two angles gives the ring."""
    rim = math.exp(math.lgamma(d / 2) - math.lgamma((d - 1) / 2)) / math.sqrt(math.pi)
    low, high = math.pi / 2 - 3 / math.sqrt(d), math.pi / 2 + 1 / math.sqrt(d)
    angles = torch.linspace(low, high, 1001, dtype=torch.float64)
    weights = (
        torch.tensor([1.0] + [4.0, 2.0] * 499 + [4.0, 1.0], dtype=torch.float64)
        * (high - low)
        / 3000
    )
    ring = float((weights * angles.sin() ** (d - 2)).sum()) * rim
    assert cap_fraction(high, d) - cap_fraction(low, d) == pytest.approx(ring, rel=1e-9)


def test_what_makes_no_sense_is_refused():
    for n, d in ((1, 3), (3, 1), (0, 0)):
        for function in (universal_quadrature, largest_cosine):
            with pytest.raises(ValueError, match="at least 2 points"):
                function(n, d)
    for function, value in (
        (cap_angle, -0.1),
        (cap_angle, 1.1),
        (cap_angle, math.nan),
        (cap_fraction, 4),
        (cap_fraction, -1),
    ):
        with pytest.raises(ValueError, match="a cap needs"):
            function(value, 3)
    with pytest.raises(ValueError, match="a cap needs"):
        cap_angle(0.5, 1)


MEASURES = [
    RieszEnergy(s=0),
    RieszEnergy(s=1),
    RieszEnergy(s=2),
    RieszEnergy(s=3.5),
    RieszEnergy(s=-1),
    GaussianPotential(t=2),
]


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
@pytest.mark.parametrize("name", SHARP)
def test_the_lower_bound_of_a_measure_is_attained(name, measure):
    points, n, d = SHARP[name]
    measure = replace(measure, softening=0.0) if isinstance(measure, RieszEnergy) else measure
    assert float(measure(points)) == pytest.approx(lower_bound(measure, n, d), rel=1e-9)
    assert float(Separation()(points)) == pytest.approx(lower_bound(Separation(), n, d), abs=1e-7)


LINES = {
    **{f"{d} axes": (c.orthonormal(d, d), d, d) for d in (2, 3, 8, 24)},
    "3 axes of 7": (c.orthonormal(3, 7), 3, 7),
    "3 lines in the plane": (c.polygon(6)[:3], 3, 2),
    "50 lines in the plane": (c.polygon(100)[:50], 50, 2),
    "icosahedron": (c.icosahedron()[:6], 6, 3),
    "28 lines in d = 7": (upper(neighbours(e8_roots(), 1 / 2)), 28, 7),
    "120 lines in d = 8": (upper(e8_roots()), 120, 8),
}


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
@pytest.mark.parametrize("name", LINES)
def test_the_lower_bound_in_half_space_is_attained_by_sharp_lines(name, measure):
    points, n, d = LINES[name]
    assert points.shape == (n, d)
    measure = replace(measure, half_space=True)
    measure = replace(measure, softening=0.0) if isinstance(measure, RieszEnergy) else measure
    assert float(measure(points)) == pytest.approx(lower_bound(measure, n, d), rel=1e-9)
    lines = Separation(half_space=True)
    assert float(lines(points)) == pytest.approx(lower_bound(lines, n, d), abs=1e-7)
