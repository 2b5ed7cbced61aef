"""Where the gradients lead: from random starts to the best configurations known, which nobody here chose."""

import math

import pytest
import torch
from scipy.optimize import linprog

from lightning_hsu.measures import (
    Covering,
    GaussianPotential,
    GramDeterminant,
    KoLeo,
    Measure,
    MinimalAngle,
    Orthogonality,
    Polarization,
    ResultantLength,
    RieszEnergy,
    Separation,
)
from tests import configurations as c

# Best-known energies of N points on the sphere in three dimensions, sums over unordered pairs: of 1 / r (the Thomson
# problem), log(1 / r) and 1 / r**2. For 13 and 17 points the latter two are the best of 60 starts of this library.
ENERGIES = {
    4: (3.674234614, -2.942487759, 2.25),
    5: (6.474691495, -4.420507155, 4.25),
    6: (9.985281374, -6.238324625, 6.75),
    7: (14.452977414, -8.182477864, 10.25),
    8: (19.675287861, -10.428017781, 14.336791084),
    9: (25.759986531, -12.887752726, 19.252868784),
    10: (32.716949460, -15.563123389, 25.041359722),
    11: (40.5964505082, -18.420479721, 31.834721637),
    12: (49.165253058, -21.606145230, 39.0),
    13: (58.853230612, -24.866721876, 47.773308981),
    14: (69.306363297, -28.407813009, 57.121208598),
    15: (80.670244114, -32.147876284, 67.486184735),
    16: (92.9116553025, -36.106152162, 78.772649031),
    17: (106.050404829, -40.273066961, 91.047319314),
    18: (120.084467447, -44.650287259, 104.314685285),
    19: (135.089467557, -49.199891566, 118.825563649),
    20: (150.881568334, -54.011129975, 133.936978568),
}
# Largest smallest angles, degrees: of N points (Tammes; proved for these N), and of N lines, in three dimensions.
TAMMES = {
    4: 109.471220634,
    5: 90.0,
    6: 90.0,
    7: 77.869542155,
    8: 74.858492186,
    9: 70.528779366,
    10: 66.146821988,
    11: 63.434948823,
    12: 63.434948823,
}
LINES = {3: 90.0, 4: 70.52877937, 5: 63.43494882, 6: 63.43494882, 7: 54.73561032, 8: 49.63993311}


def start(n, d, seed):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def descend(measure, x, steps=600, least=1e-14):
    """Quasi-Newton steps along the measure's own gradient, until one gains or moves less than the least."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=steps,
        tolerance_grad=1e-13,
        tolerance_change=least,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = measure.penalty(x)
        value.backward()
        return value

    optimizer.step(closure)
    return torch.nn.functional.normalize(x.detach(), dim=-1)


@pytest.mark.parametrize(("s", "column"), [(1, 0), (0, 1), (2, 2)])
@pytest.mark.parametrize("n", ENERGIES)
def test_thomson_logarithmic_and_inverse_square_energies(n, s, column):
    measure, best = RieszEnergy(s=s), ENERGIES[n][column]
    for seed in range(12):
        found = float(measure(descend(measure, start(n, 3, seed)))) * n * (n - 1) / 2
        assert found > best - 1e-8 * abs(best)
        if found == pytest.approx(best, rel=1e-8):
            break
    assert found == pytest.approx(best, rel=1e-8)


def spread(x, half_space, rounds=40):
    """Raise the smallest angle by linear programs in the angles of all pairs and their gradients."""
    measure = Separation(half_space=half_space)
    n, d = x.shape
    i, j = torch.triu_indices(n, n, 1)
    radius, best = 0.1, float(measure(x))
    for _ in range(rounds):
        penalty, grad = measure.value_and_grad(torch.stack([x[i], x[j]], 1))  # a batch of pairs
        rows = torch.zeros(len(i), n, d, dtype=torch.float64)
        rows[torch.arange(len(i)), i], rows[torch.arange(len(i)), j] = grad.unbind(1)
        # maximise t with t <= angle - grad . step for every pair, the step in a box
        rows = torch.cat([rows.flatten(1), torch.ones(len(i), 1, dtype=torch.float64)], 1)
        step = linprog(
            [0] * (n * d) + [-1],
            rows.numpy(),
            -penalty.numpy(),
            bounds=[(-radius, radius)] * (n * d) + [(None, None)],
        ).x
        tried = torch.nn.functional.normalize(x + torch.tensor(step[:-1]).view(n, d), dim=-1)
        if float(measure(tried)) > best:
            x, best = tried, float(measure(tried))
        else:
            radius /= 4
        if radius < 1e-10:
            break
    return best


@pytest.mark.parametrize(
    ("half_space", "n"), [*((False, n) for n in TAMMES), *((True, n) for n in LINES)]
)
def test_tammes_angles_and_line_packings(n, half_space):
    target = math.radians((LINES if half_space else TAMMES)[n])
    best = 0.0
    for seed in range(10):
        smooth = RieszEnergy(s=8, half_space=half_space)
        x = descend(smooth, start(n, 3, seed), steps=100, least=0.0)
        best = max(best, spread(x, half_space))
        if best > target - 1e-8:
            break
    assert best == pytest.approx(target, abs=1e-8)


SMOOTH = [
    RieszEnergy(s=0),
    RieszEnergy(s=1),
    RieszEnergy(s=2),
    RieszEnergy(s=-1),
    GaussianPotential(),
    GramDeterminant(),
]
LINE_MEASURES = [
    RieszEnergy(s=0, half_space=True),
    RieszEnergy(s=2, half_space=True),
    GaussianPotential(half_space=True),
    GramDeterminant(half_space=True),
    Orthogonality("so"),
    Orthogonality("dso"),
]


@pytest.mark.parametrize("measure", SMOOTH, ids=repr)
@pytest.mark.parametrize(("n", "d"), [(3, 2), (4, 4), (5, 4), (9, 8), (12, 16), (17, 16)])
def test_the_simplex_is_reached(measure, n, d):
    found = measure.penalty(descend(measure, start(n, d, 1)))
    assert float(found) == pytest.approx(
        float(measure.penalty(c.simplex(n, d))), rel=1e-9, abs=1e-9
    )


@pytest.mark.parametrize("measure", SMOOTH, ids=repr)
@pytest.mark.parametrize("d", [2, 3, 4, 8, 16])
def test_the_cross_polytope_is_reached(measure, d):
    best = float(measure.penalty(c.cross_polytope(d)))
    for seed in range(1 if d < 8 else 4):
        found = float(measure.penalty(descend(measure, start(2 * d, d, seed))))
        if found == pytest.approx(best, rel=1e-9):
            break
    assert found == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("measure", LINE_MEASURES, ids=repr)
@pytest.mark.parametrize(("n", "d"), [(2, 2), (3, 3), (4, 7), (16, 16)])
def test_orthonormal_lines_are_reached(measure, n, d):
    found = measure.penalty(descend(measure, start(n, d, 2)))
    assert float(found) == pytest.approx(
        float(measure.penalty(c.orthonormal(n, d))), rel=1e-9, abs=1e-9
    )


def follow(measure, x, target, steps=4000, tolerance=1e-4):
    """Subgradient steps of Polyak's length, deflected from zigzags: for measures with a kink at the optimum."""
    best, way = math.inf, torch.zeros_like(x)
    for _ in range(steps):
        penalty, grad = measure.value_and_grad(x)
        best = min(best, float(penalty))
        if best < target + tolerance:
            break
        way = (
            grad
            - min(0.0, 1.5 * float((way * grad).sum() / way.square().sum().clamp_min(1e-30))) * way
        )
        x = torch.nn.functional.normalize(
            x - (float(penalty) - target) / way.square().sum() * way, dim=-1
        )
    return best


@pytest.mark.parametrize(("n", "d"), [(3, 2), (4, 4), (5, 4), (9, 8), (13, 12)])
def test_nearest_neighbour_members_reach_the_simplex(n, d):
    for measure in (MinimalAngle(), KoLeo()):
        target = float(measure.penalty(c.simplex(n, d)))
        assert follow(measure, start(n, d, 3), target) == pytest.approx(target, abs=1e-4)
    assert spread(start(n, d, 3), half_space=False) == pytest.approx(
        math.acos(-1 / (n - 1)), abs=1e-6
    )


def simplex_in(d):
    return c.simplex(d + 1, d)


def basis_of(d):
    return c.orthonormal(d, d)


KINKED = [
    (Covering(), simplex_in),
    (Polarization(s=2), simplex_in),
    (Separation(), c.cross_polytope),
    (Separation(half_space=True), basis_of),
    (ResultantLength(), simplex_in),
    (ResultantLength(), c.cross_polytope),
    (Orthogonality("mc"), basis_of),
    (Orthogonality("srip"), simplex_in),
    (Orthogonality("srip"), c.cross_polytope),
    (Orthogonality("srip"), basis_of),
]
SMOOTH_RELATIVES = {Separation(): RieszEnergy(s=8), Orthogonality("srip"): Orthogonality("so")}


@pytest.mark.parametrize(
    ("measure", "points_in", "d"),
    [
        *((measure, points_in, d) for measure, points_in in KINKED for d in (2, 3, 4, 8)),
        *((measure, points_in, 16) for measure, points_in in KINKED[2:]),  # searches take seconds
    ],
    ids=lambda one: "" if callable(one) and not isinstance(one, Measure) else repr(one),
)
def test_kinked_optima_are_reached(measure, points_in, d):
    points = points_in(d)
    x, target = start(*points.shape, 4), float(measure.penalty(points))
    if d == 16 and measure in SMOOTH_RELATIVES:
        # A single nearest pair or eigenvector at a time takes too long from afar.
        x = descend(SMOOTH_RELATIVES[measure], x, steps=60)
    assert follow(measure, x, target, tolerance=1e-3) == pytest.approx(target, abs=1e-3)
