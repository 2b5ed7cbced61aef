"""Energies against closed forms: the cosines of each configuration are known, so the energy is a short sum."""

import math

import pytest
import torch

from lightning_hsu._core import smallest_angle
from lightning_hsu.measures import Covering, MinimalAngle, RieszEnergy, Separation
from tests import configurations as c

# Points, and the cosine of a pair with the number of unordered pairs that have it.
CASES = {
    "simplex of 5 in d = 4": (c.simplex(5, 4), {-1 / 4: 10}),
    "simplex of 4 in d = 9": (c.simplex(4, 9), {-1 / 3: 6}),
    "antipodal pair": (c.simplex(2, 3), {-1.0: 1}),
    "orthonormal basis": (c.orthonormal(6, 6), {0.0: 15}),
    "cross-polytope": (c.cross_polytope(5), {0.0: 40, -1.0: 5}),
    "pentagon": (c.polygon(5), {math.cos(2 * math.pi / 5): 5, math.cos(4 * math.pi / 5): 5}),
    "octagon": (c.polygon(8), {math.cos(k * math.pi / 4): 8 if k < 4 else 4 for k in (1, 2, 3, 4)}),
    "icosahedron": (c.icosahedron(), {1 / math.sqrt(5): 30, -1 / math.sqrt(5): 30, -1.0: 6}),
}


def kernel(s, distance, cosine):
    rho = math.acos(cosine) if distance == "geodesic" else math.sqrt(2 - 2 * cosine)
    return -math.log(rho) if s == 0 else math.copysign(rho**-s, s)


def full_space(s, distance, cosines):
    return sum(count * kernel(s, distance, cosine) for cosine, count in cosines.items()) / sum(
        cosines.values()
    )


def half_space(s, distance, cosines, n):
    """Mean over the pairs of the 2n points +-x, written out; None where opposite points coincide."""
    if -1.0 in cosines:
        return None
    both = sum(
        2 * m * (kernel(s, distance, t) + kernel(s, distance, -t)) for t, m in cosines.items()
    )
    return (both + n * kernel(s, distance, -1.0)) / (n * (2 * n - 1))


@pytest.mark.parametrize("distance", ["chordal", "geodesic"])
@pytest.mark.parametrize("s", [0, 1, 2, 0.5, 3, -1, 1.5, 2.5, 4, 2.7])
@pytest.mark.parametrize("name", CASES)
def test_closed_forms(name, s, distance):
    points, cosines = CASES[name]
    points = c.rotated(points)
    expected = {
        False: full_space(s, distance, cosines),
        True: half_space(s, distance, cosines, len(points)),
    }
    for half, value in expected.items():
        if value is not None:
            measure = RieszEnergy(s=s, half_space=half, distance=distance)
            assert float(measure(points)) == pytest.approx(
                value, rel=1e-12, abs=1e-12
            )  # measured: 3e-15
            assert float(measure(points.float())) == pytest.approx(
                value, rel=1e-6, abs=1e-6
            )  # measured: 2e-7


def test_half_space_is_the_energy_of_the_points_and_their_mirror_images():
    x = torch.randn(3, 20, 6, dtype=torch.float64)
    for distance in ("chordal", "geodesic"):
        for s in (0, 1, 2, 3):
            doubled = RieszEnergy(s=s, distance=distance)(torch.cat([x, -x], -2))
            torch.testing.assert_close(
                RieszEnergy(s=s, distance=distance, half_space=True)(x), doubled, rtol=1e-12, atol=0
            )


@pytest.mark.parametrize(
    ("s", "value"),
    [(1, 0.744928076631), (0, -0.327365836825), (2, 39 / 66)],
)
def test_published_energies_of_the_icosahedron(s, value):
    assert float(RieszEnergy(s=s)(c.icosahedron())) == pytest.approx(value, abs=1e-12)


def test_smallest_angles():
    for points, degrees in (
        (c.simplex(5, 4), math.degrees(math.acos(-1 / 4))),
        (c.cross_polytope(5), 90.0),
        (c.polygon(7), 360 / 7),
        (c.icosahedron(), 63.434948823),
    ):
        found = smallest_angle(c.rotated(points)).rad2deg()
        assert float(found) == pytest.approx(degrees, abs=1e-8)
    assert float(smallest_angle(c.polygon(7), half_space=True).rad2deg()) == pytest.approx(
        180 / 7, abs=1e-8
    )
    assert float(smallest_angle(c.cross_polytope(5), half_space=True)) == 0.0


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("chord", [1e-3, 1e-5])
def test_a_tiny_angle_is_right_in_float32(chord, half_space):
    x = torch.randn(300, 64)
    x[299] = x[3] + chord * torch.randn(64)
    a, b = x[3].double(), x[299].double()
    expected = 2 * torch.atan2(
        (a / a.norm() - b / b.norm()).norm(), (a / a.norm() + b / b.norm()).norm()
    )
    x[3] *= -1 if half_space else 1
    assert float(smallest_angle(x, half_space=half_space)) == pytest.approx(
        float(expected), rel=1e-9
    )


@pytest.mark.parametrize("n", [2, 3, 5, 8, 31])
def test_regular_polygons(n):
    """Sums over pairs of the optimal set on the circle; its angles and its covering radius."""
    x, pairs = c.polygon(n), n * (n - 1) / 2
    assert float(RieszEnergy(s=0)(x)) * pairs == pytest.approx(-n / 2 * math.log(n), rel=1e-12)
    assert float(RieszEnergy(s=1)(x)) * pairs == pytest.approx(
        n / 4 * sum(1 / math.sin(math.pi * k / n) for k in range(1, n))
    )
    assert float(RieszEnergy(s=2)(x)) * pairs == pytest.approx(n * (n * n - 1) / 24, rel=1e-12)
    for measure in (Separation(), MinimalAngle()):
        assert float(measure(x)) == pytest.approx(2 * math.pi / n, rel=1e-9)
        assert measure.bound(n, 2) >= 2 * math.pi / n - 1e-9
    assert float(Covering()(x)) == pytest.approx(math.pi / n, rel=1e-9)
    assert Covering().bound(n, 2) == pytest.approx(math.pi / n, rel=1e-9)


@pytest.mark.parametrize(
    "points", [c.simplex(4, 3), c.cross_polytope(3), c.icosahedron(), c.simplex(3, 3)], ids=len
)
def test_fejes_toths_bounds_are_met_by_the_regular_ones(points):
    """Packing and covering on the sphere in three dimensions, with equality for 3, 4, 6 and 12 points."""
    omega = len(points) * math.pi / (6 * (len(points) - 2))
    packing = math.acos((1 / math.tan(omega) ** 2 - 1) / 2)
    assert float(Separation()(points)) == pytest.approx(packing, abs=1e-9)
    covering = math.acos(1 / (math.tan(omega) * math.sqrt(3)))
    assert float(Covering()(points)) == pytest.approx(covering, abs=1e-9)
    for _ in range(20):
        x = torch.randn(len(points), 3, dtype=torch.float64)
        assert float(Separation()(x)) <= packing + 1e-9
        assert float(Covering()(x)) >= covering - 1e-9
