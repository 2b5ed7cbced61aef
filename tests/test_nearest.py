"""Measures of nearest neighbours: known values, the fast path against plain loops, ties, near pairs, where ascent leads."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_hsu._core import smallest_angle
from lightning_hsu._core.topk import largest_two
from lightning_hsu.measures.nearest import KoLeo, MinimalAngle, NearestMeasure, Separation
from tests import configurations as c
from tests.rounding import assert_near

EVERY = [Separation(), Separation(half_space=True), MinimalAngle(), KoLeo(), KoLeo(softening=0.0)]
ICOSAHEDRON = c.icosahedron()[
    (c.icosahedron() @ torch.tensor([1, 2, 3.5]).double()).argsort(descending=True)
]
TAMMES = {4: 109.471220634, 5: 90.0, 6: 90.0, 7: 77.869542155, 8: 74.858492186}  # degrees, on S^2


@dataclass(frozen=True)
class MeanCosine(NearestMeasure):
    """The mean largest absolute cosine: a member of one's own."""

    every_neuron = True
    half_space: bool = True

    def kernel(self, q, p):
        return 1 - q / 2, torch.full_like(q, -0.5)


def loops(x, measure):
    """The natural value of one group (n, d), by differences, pair by pair."""
    rows = [row.double() / row.double().norm() for row in x if row.norm() > 0]
    sides = (1, -1) if measure.half_space else (1,)
    nearest = [
        min(
            2 * math.asin(min(1.0, float((a - s * b).norm()) / 2))
            for j, b in enumerate(rows)
            for s in sides
            if j != i
        )
        for i, a in enumerate(rows)
    ]
    if isinstance(measure, KoLeo):
        return sum(-math.log(2 * math.sin(angle / 2)) for angle in nearest) / len(nearest)
    return min(nearest) if isinstance(measure, Separation) else sum(nearest) / len(nearest)


def twin(measure, x):
    """Value and gradient of the readable twin."""
    x = x.detach().clone().requires_grad_()
    value = measure.recorded(x, None)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def relative_error(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("points", "angle", "between_lines"),
    [
        (c.orthonormal(6, 6), math.pi / 2, math.pi / 2),
        (c.orthonormal(3, 9), math.pi / 2, math.pi / 2),
        (c.simplex(5, 4), math.acos(-1 / 4), math.acos(1 / 4)),
        (c.simplex(4, 9), math.acos(-1 / 3), math.acos(1 / 3)),
        (c.simplex(2, 3), math.pi, 0.0),
        (c.cross_polytope(5), math.pi / 2, 0.0),
        (c.icosahedron(), math.radians(63.434948822922), 0.0),
        (ICOSAHEDRON[:6], math.radians(63.434948822922), math.radians(63.434948822922)),
        (c.polygon(7), 2 * math.pi / 7, math.pi / 7),
    ],
)
def test_known_values(points, angle, between_lines, dtype):
    points = c.rotated(points).to(dtype)
    close = {"rel": 1e-12, "abs": 1e-7} if dtype == torch.float64 else {"rel": 1e-6, "abs": 3e-7}
    assert float(Separation()(points)) == pytest.approx(angle, **close)
    assert float(MinimalAngle()(points)) == pytest.approx(angle, **close)
    assert float(KoLeo()(points)) == pytest.approx(-math.log(2 * math.sin(angle / 2)), **close)
    assert float(Separation(half_space=True)(points)) == pytest.approx(between_lines, **close)
    assert float(MeanCosine()(points)) == pytest.approx(math.cos(between_lines), **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_regular_configurations_stay_where_they_are(dtype):
    """The mean over tied neighbours has no slope; in half space neither that over a line's two directions."""
    points = (
        c.simplex(5, 4),
        c.simplex(4, 9),
        c.simplex(300, 299),
        c.cross_polytope(5),
        ICOSAHEDRON,
        c.polygon(7),
    )
    lines = (c.orthonormal(5, 7), c.simplex(5, 4), ICOSAHEDRON[:6], c.polygon(7))
    cases = [(measure, x) for measure in EVERY if not measure.half_space for x in points]
    for measure, x in cases + [(measure, x) for measure in (EVERY[1], MeanCosine()) for x in lines]:
        _, gradient = measure.value_and_grad(c.rotated(x).to(dtype))
        assert float(gradient.norm()) < (1e-12 if dtype == torch.float64 else 1e-6)


@settings(deadline=None, max_examples=100)
@given(
    measure=st.sampled_from(EVERY),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 12), st.integers(2, 9)),
    scale=st.floats(-15, 15),
    spread=st.sampled_from([1.0, 0.3, 0.05]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    zero=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_twin_and_the_loops(measure, shape, scale, spread, dtype, zero, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = (10.0**scale * (x[:, :1] * (1 - spread) + x * spread)).to(dtype)
    if zero and shape[1] > 2:
        x[0, 1] = 0.0
    value, gradient = measure.value_and_grad(x)
    its_value, its_gradient = twin(measure, x)
    exact = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(value, its_value, rtol=exact, atol=exact)
    assert relative_error(gradient, its_gradient.double()) < (
        1e-9 if dtype == torch.float64 else 1e-6
    )
    if measure != KoLeo():  # its softening
        expected = torch.tensor([loops(group, measure) for group in x], dtype=torch.float64)
        torch.testing.assert_close(
            measure(x).double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-7
        )
    assert float((gradient.double() * x.double()).sum(-1).abs().max()) < 1e-5 * float(
        gradient.norm() * x.double().norm()
    )


@pytest.mark.parametrize("n", [255, 256, 257, 700])
@pytest.mark.parametrize("measure", EVERY)
def test_panels_join_without_a_seam(n, measure):
    for x in (torch.randn(n, 5, dtype=torch.float64), torch.randn(n, 5)):
        value, gradient = measure.value_and_grad(x)
        its_value, its_gradient = twin(measure, x)
        torch.testing.assert_close(value, its_value, rtol=1e-6, atol=0)
        assert relative_error(gradient, its_gradient.double()) < 1e-6


@pytest.mark.parametrize("n", [2, 17, 64, 192, 400, 576])
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("half_space", [True, False])
def test_the_largest_two_cosines_are_those_of_the_gram_matrix(n, every, half_space):
    x = nn.functional.normalize(torch.randn(2, n, 7, dtype=torch.float64), dim=-1)
    alive = torch.rand(2, n) > 0.1
    gram = (x @ x.mT).abs() if half_space else x @ x.mT
    other = ~torch.eye(n, dtype=torch.bool) if every else torch.ones(n, n, dtype=torch.bool).triu(1)
    gram = gram.masked_fill(~(other & alive[:, :, None] & alive[:, None]), -math.inf)
    first, index, second = largest_two(x, alive, half_space=half_space, every=every)
    expected, places = gram.topk(2, -1)
    torch.testing.assert_close(torch.stack([first, second], -1), expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(index[first > -1], places[..., 0][first > -1])


@pytest.mark.parametrize("measure", [*EVERY, MeanCosine()])
def test_a_few_ties_among_many_neurons_are_shared(measure):
    """Rows with several nearest neighbours up to rounding, listed one by one, in float32 and in half of a stack."""
    x = nn.functional.normalize(torch.randn(2, 300, 20, dtype=torch.float64), dim=-1)
    for i in range(
        0, 30, 3
    ):  # the first of three neurons is as far from the second as from the third
        step = 1e-2 * nn.functional.normalize(torch.randn(20, dtype=torch.float64), dim=0)
        x[0, i + 1], x[0, i + 2] = x[0, i] + step, x[0, i] - step + 2 * (x[0, i] @ step) * x[0, i]
    x = nn.functional.normalize(x, dim=-1)
    for neurons, exact in ((x, 1e-9), (x.float(), 1e-6)):
        value, gradient = measure.value_and_grad(neurons)
        its_value, its_gradient = twin(measure, neurons)
        torch.testing.assert_close(value, its_value, rtol=exact, atol=0)
        assert relative_error(gradient, its_gradient.double()) < exact


@pytest.mark.parametrize("measure", EVERY)
def test_a_batch_equals_a_loop_also_with_dead_and_tied_neurons(measure):
    x = torch.randn(2, 3, 17, 8)
    x[0, 1, 3] = 0.0
    x[1, 0, 5] = float("nan")
    x[1, 1, 4] = 2 * x[1, 1, 9]
    x[1, 2] = torch.eye(17, 8)
    value, gradient = measure.value_and_grad(x)
    assert bool(value.isfinite().all())
    assert bool(gradient.isfinite().all())
    assert not gradient[0, 1, 3].any()
    assert not gradient[1, 0, 5].any()
    for i in range(2):
        for j in range(3):
            one, its = measure.value_and_grad(x[i, j])
            torch.testing.assert_close(value[i, j], one, rtol=1e-5, atol=1e-6)
            assert_near(gradient[i, j], its)


@pytest.mark.parametrize("measure", [*EVERY, MeanCosine()])
def test_gradcheck_and_gradgradcheck(measure):
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(measure.penalty, (x,))
    assert torch.autograd.gradgradcheck(measure.penalty, (x,))


def test_tied_neighbours_share_the_gradient():
    """One neuron between two others: they pull it neither way; and two pairs share the separation's."""
    angles = torch.tensor([0.0, 0.3, -0.3])
    x = torch.stack([angles.cos(), angles.sin()], 1)
    expected = torch.tensor(
        [[0.0, 0.0], [-math.sin(0.3), math.cos(0.3)], [-math.sin(0.3), -math.cos(0.3)]]
    )
    for measure, size in ((Separation(), 1 / 2), (MinimalAngle(), (1 + 1 / 2) / 3)):
        torch.testing.assert_close(
            measure.value_and_grad(x)[1], -size * expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("chord", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("measure", EVERY)
def test_near_duplicates_in_float32(measure, chord):
    """150 pairs, each other's nearest."""
    x = torch.randn(300, 64)
    step = nn.functional.normalize(torch.randn(150, 64), dim=1) * x[:150].norm(dim=1, keepdim=True)
    x[150:] = (x[:150] + chord * step) * (-1 if measure.half_space else 1)
    value, gradient = measure.value_and_grad(x)
    exact, its_gradient = measure.value_and_grad(x.double())
    assert float(value) == pytest.approx(float(exact), rel=1e-6)
    assert relative_error(gradient, its_gradient) < 1e-6
    assert float(value) == pytest.approx(float(twin(measure, x)[0]), rel=1e-6)


@pytest.mark.parametrize("measure", EVERY)
def test_coincident_neurons_part_with_the_force_at_the_softening(measure):
    x = torch.randn(2, 8)
    x[1] = x[0] * (-2 if measure.half_space else 2)
    value, gradient = measure.value_and_grad(x)
    force = 1.0 if not isinstance(measure, KoLeo) else 1 / max(measure.softening, 1e-6)
    torch.testing.assert_close(
        gradient.norm(dim=1) * x.norm(dim=1), torch.full((2,), force), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(twin(measure, x)[1], gradient, rtol=1e-5, atol=1e-5 * force)
    if not isinstance(measure, KoLeo):
        assert float(value) == 0.0
    assert torch.equal(gradient, measure.value_and_grad(x)[1])
    assert float(measure.penalty(x - 1e-2 * nn.functional.normalize(gradient, dim=1))) < float(
        value
    )


@pytest.mark.parametrize("measure", EVERY)
def test_many_copies_all_part(measure):
    x = torch.randn(1, 16).repeat(300, 1)
    value, gradient = measure.value_and_grad(x)
    assert bool(value.isfinite())
    assert bool((gradient.norm(dim=1) > 0).all())
    moved = x - 0.1 * nn.functional.normalize(gradient, dim=1)
    assert float(smallest_angle(moved)) > 0


@pytest.mark.parametrize("measure", EVERY)
def test_too_few_neurons_and_one_dimension(measure):
    for x in (
        torch.zeros(3, 4),
        torch.randn(1, 4),
        torch.randn(2, 1, 4),
        torch.zeros(0, 4),
        torch.tensor([[1.0, 2], [0, 0]]),
    ):
        value, gradient = measure.value_and_grad(x)
        assert not value.any()
        assert value.shape == x.shape[:-2]
        assert not gradient.any()
    x = torch.tensor([[1.0], [-2.0], [3.0]])
    value, gradient = measure.value_and_grad(x)
    assert bool(value.isfinite())
    assert not gradient.any()
    assert float(Separation()(x[:2])) == pytest.approx(math.pi)
    assert math.isnan(float(smallest_angle(x[:1])))


def test_opposite_neurons_in_full_space_are_at_rest():
    x = torch.randn(1, 5, dtype=torch.float64)
    for measure in (Separation(), MinimalAngle(), KoLeo()):
        value, gradient = measure.value_and_grad(torch.cat([x, -3 * x]))
        assert bool(value.isfinite())
        assert float(gradient.norm()) < 1e-6


def largest_tensor(run):
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            parts = out if isinstance(out, (tuple, list)) else (out,)
            sizes.extend(
                part.untyped_storage().nbytes() for part in parts if isinstance(part, torch.Tensor)
            )
            return out

    with Watch():
        run()
    return max(sizes)


@pytest.mark.parametrize("measure", EVERY)
def test_memory_stays_far_below_the_gram_matrix(measure):
    x = torch.randn(3000, 16)
    assert largest_tensor(lambda: measure.value_and_grad(x)) <= 4 * 256 * 3000


@pytest.mark.parametrize("kind", ["all tied", "near"])
def test_memory_stays_far_below_the_gram_matrix_in_float64_too(kind):
    x = torch.randn(3000, 16)
    points = x[:1].repeat(3000, 1) if kind == "all tied" else x[:1] + 1e-4 * x
    for measure in (EVERY[0], KoLeo()):
        assert largest_tensor(lambda m=measure: m.value_and_grad(points)) <= 8 * 256 * 3000
    assert largest_tensor(lambda: smallest_angle(x)) <= 4 * 256 * 3000


def ascend(measure, n, d, starts):
    """The best of a few random starts that follow their own gradient at unit length, with falling steps."""
    x = nn.functional.normalize(torch.randn(starts, n, d, dtype=torch.float64), dim=-1)
    for step in range(500):
        gradient = measure.value_and_grad(x)[1]
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
        x = nn.functional.normalize(x - 0.3 * 0.985**step * gradient / length, dim=-1)
    values = measure(x)
    return float(values.max() if measure.higher_is_better else values.min())


@pytest.mark.parametrize("n", sorted(TAMMES))
def test_ascent_reaches_the_tammes_angle(n):
    assert ascend(Separation(), n, 3, 6) == pytest.approx(math.radians(TAMMES[n]), abs=1e-2)


@pytest.mark.parametrize(("n", "d"), [(3, 2), (4, 3), (4, 6), (6, 5)])
def test_ascent_reaches_the_simplex(n, d):
    angle = math.acos(-1 / (n - 1))
    assert ascend(MinimalAngle(), n, d, 2) == pytest.approx(angle, abs=1e-2)
    assert ascend(KoLeo(), n, d, 2) == pytest.approx(-math.log(2 * math.sin(angle / 2)), abs=1e-2)


def test_bounds():
    assert Separation().bound(12, 3) == pytest.approx(math.radians(63.434948822922), abs=1e-9)
    assert Separation().bound(240, 8) == pytest.approx(math.pi / 3, abs=1e-9)
    assert Separation(half_space=True).bound(6, 3) == pytest.approx(
        math.radians(63.434948822922), abs=1e-9
    )
    assert Separation(half_space=True).bound(5, 8) == pytest.approx(math.pi / 2)
    for n in (3, 4, 9):
        assert Separation().bound(n, 2) == pytest.approx(2 * math.pi / n, abs=1e-9)
        assert MinimalAngle().bound(n, 2) == pytest.approx(2 * math.pi / n, abs=1e-9)
    assert KoLeo().bound(4, 3) == pytest.approx(float(KoLeo()(c.simplex(4, 3))), abs=1e-12)
    assert MinimalAngle().bound(2, 5) == pytest.approx(math.pi)
    assert all(measure.bound(1, 3) is None and measure.bound(3, 1) is None for measure in EVERY)


@settings(deadline=None, max_examples=100)
@given(
    measure=st.sampled_from(EVERY),
    n=st.integers(2, 30),
    d=st.integers(2, 12),
    seed=st.integers(0, 1000),
)
def test_nothing_beats_the_bounds(measure, n, d, seed):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best, value = measure.bound(n, d), float(measure(x))
    assert value <= best + 1e-9 if measure.higher_is_better else value >= best - 1e-9


def test_ratios_and_mistakes():
    assert float(KoLeo().ratio(torch.tensor(0.2), 0.1)) == pytest.approx(math.exp(0.1))
    with pytest.raises(ValueError, match="softening"):
        KoLeo(softening=2.0)
    with pytest.raises(ValueError, match="half_space"):
        Separation(half_space=1)
