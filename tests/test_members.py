"""Members with a closed form of their own: Gram determinant, orthogonality, resultant, sliced Wasserstein, projections."""

import math
from itertools import pairwise

import pytest
import torch

from lightning_hsu import UniformityRegularizer
from lightning_hsu.measures import (
    Covering,
    GaussianPotential,
    GramDeterminant,
    KoLeo,
    Orthogonality,
    Polarization,
    ResultantLength,
    RieszEnergy,
    Sampled,
    Separation,
    SlicedWasserstein,
    SphereMeasure,
)
from lightning_hsu.projections import (
    Adversarial,
    AnglePreserving,
    GroupProjection,
    Projected,
    RandomProjection,
)
from lightning_hsu.reference import (
    lower_bound,
    random_expectation,
    uniformity_ratio,
    uniformity_score,
)
from tests import configurations as c

# Log-determinants of exp(-chord**2) without jitter: of the simplex of d + 1, a basis, the cross-polytope
DETERMINANTS = {
    3: (-0.026707415342, -0.051282149516, -0.192644392954),
    64: (-6.758831561591, -6.907010047798, -16.610880120199),
}


CLOSED = [
    ResultantLength(),
    ResultantLength(softening=0),
    Orthogonality("so"),
    Orthogonality("dso"),
    GramDeterminant(),
    GramDeterminant(bandwidth=0.5, half_space=True),
]


@pytest.mark.parametrize("d", DETERMINANTS)
def test_published_determinants(d):
    sets = (c.simplex(d + 1, d), c.orthonormal(d, d), c.cross_polytope(d))
    for points, value in zip(sets, DETERMINANTS[d], strict=True):
        assert float(GramDeterminant(jitter=0)(c.rotated(points))) == pytest.approx(
            value, abs=1e-11
        )
        assert float(GramDeterminant()(c.rotated(points).float())) == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("bandwidth", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("n", "d"), [(3, 4), (6, 5), (17, 16)])
def test_determinant_of_the_simplex(n, d, bandwidth):
    k = math.exp(-2 * n / (n - 1) / bandwidth**2)
    expected = (n - 1) * math.log(1 - k) + math.log(1 + (n - 1) * k)
    assert float(GramDeterminant(bandwidth, jitter=0)(c.simplex(n, d))) == pytest.approx(
        expected, abs=1e-11
    )
    assert GramDeterminant(bandwidth, jitter=0).bound(n, d) == pytest.approx(expected, abs=1e-9)


def test_half_space_determinant_is_that_of_the_2n_points():
    x = torch.nn.functional.normalize(torch.randn(2, 9, 4, dtype=torch.float64), dim=-1)
    both = torch.cat([x, -x], 1)
    gram = (-torch.cdist(both, both).square()).exp() + 1e-6 * torch.eye(18, dtype=torch.float64)
    torch.testing.assert_close(
        GramDeterminant(half_space=True)(x), torch.logdet(gram), rtol=1e-9, atol=1e-9
    )


def test_the_determinant_never_makes_a_larger_matrix_than_n_by_n():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(one, torch.Tensor):
                    largest = max(largest, one.numel())
            return out

    x = torch.randn(200, 8)
    with Watch():
        GramDeterminant(half_space=True).value_and_grad(x)
    assert largest == 200 * 200


@pytest.mark.parametrize("jitter", [0.0, 1e-12, 1e-6, 1e-3])
def test_duplicates_have_a_finite_determinant_and_part(jitter):
    x = torch.randn(12, 5)
    x[1:4] = x[0]
    value, grad = GramDeterminant(jitter=jitter).value_and_grad(x)
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()
    moved = torch.nn.functional.normalize(x, dim=1) - 1e-4 * grad / grad.norm()
    assert float(Separation()(moved)) > 1e-6


@pytest.mark.parametrize(("n", "d"), [(4, 7), (7, 7), (12, 3), (6, 3)])
def test_orthogonality_is_what_the_matrices_say(n, d):
    x = torch.randn(n, d, dtype=torch.float64)
    u = torch.nn.functional.normalize(x, dim=1)
    off = u @ u.T - torch.eye(n, dtype=torch.float64)
    columns = u.T @ u - torch.eye(d, dtype=torch.float64)
    expected = {
        "so": off.square().sum(),
        "dso": off.square().sum() + columns.square().sum(),
        "mc": off.abs().max(),
        "srip": torch.linalg.matrix_norm(off if n <= d else columns, ord=2),
    }
    for kind, value in expected.items():
        assert float(Orthogonality(kind)(x)) == pytest.approx(float(value), rel=1e-10)


def test_tight_frames_are_as_orthogonal_as_can_be():
    """The least sum of squared cosines is n**2 / d - n, the largest singular value sqrt(n / d)."""
    for points in (c.polygon(7), c.icosahedron(), c.cross_polytope(5), c.simplex(6, 5)):
        n, d = points.shape
        assert float(Orthogonality("so")(points)) == pytest.approx(n * n / d - n, abs=1e-9)
        assert float(Orthogonality("srip")(points)) == pytest.approx(n / d - 1, abs=1e-9)
        for kind in ("so", "dso", "srip"):
            assert Orthogonality(kind).bound(n, d) == pytest.approx(
                float(Orthogonality(kind)(points)), abs=1e-9
            )
    lines = c.icosahedron()[:6]
    assert float(Orthogonality("mc")(lines)) == pytest.approx(1 / math.sqrt(5), abs=1e-12)
    assert Orthogonality("mc").bound(6, 3) == pytest.approx(1 / math.sqrt(5), abs=1e-12)


def test_a_balanced_set_has_no_resultant_and_copies_add_up():
    for points in (
        c.simplex(5, 4),
        c.cross_polytope(3),
        c.icosahedron(),
        torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]]),
    ):
        assert float(ResultantLength()(points)) == pytest.approx(0, abs=1e-12)
    x = torch.randn(7, 5, dtype=torch.float64)
    unit = torch.nn.functional.normalize(x, dim=1)
    assert float(ResultantLength()(x)) == pytest.approx(float(unit.sum(0).norm()), rel=1e-12)
    assert float(ResultantLength(softening=0)(x)) == pytest.approx(
        float(unit.sum(0).norm()), rel=1e-12
    )


def by_autograd(measure, x):
    """Value and gradient of the readable twin in float64."""
    x = x.detach().double().requires_grad_()
    value = measure.recorded(x, None)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "trouble", ["none", "zero row", "duplicates", "balanced", "small", "huge", "tiny"]
)
@pytest.mark.parametrize("measure", CLOSED, ids=str)
def test_closed_gradients_equal_those_of_autograd(measure, trouble, dtype):
    for shape in ((2, 3, 12, 5), (1, 6, 9), (1, 300, 11), (2, 7, 7)):
        x = torch.randn(shape, dtype=torch.float64)
        match trouble:
            case "zero row":
                x[0, ..., 1, :] = 0.0
            case "duplicates":
                x[..., 1, :] = x[..., 0, :]
            case "balanced" if measure != ResultantLength(
                softening=0
            ):  # whose slope there is that of rounding
                x[..., 1::2, :] = -x[..., : shape[-2] - shape[-2] % 2 : 2, :]
            case "small":  # a short sum
                x[..., -1, :] -= torch.nn.functional.normalize(x, dim=-1).sum(-2)
            case "huge" | "tiny" if dtype != torch.float16:
                x[..., 0, :] *= 1e18 if trouble == "huge" else 1e-18
        x = x.to(dtype)
        value, gradient = measure.value_and_grad(x)
        expected, its_gradient = by_autograd(measure, x)
        exact = {torch.float64: 1e-10, torch.float32: 6e-6}.get(dtype, 1e-2)
        torch.testing.assert_close(
            value.double(), expected, rtol=min(exact, 2e-6), atol=min(exact, 2e-6) * shape[-2]
        )
        rows = its_gradient * x.double().norm(dim=-1, keepdim=True)  # on the sphere
        assert gradient.dtype == dtype
        error = (gradient.double() * x.double().norm(dim=-1, keepdim=True) - rows).norm()
        allowed = exact * float(rows.norm()) + 10 * exact * 1e-3
        # Of a sum that should be 0 another order of its terms may leave something, which pulls each row.
        if trouble == "balanced" and dtype != torch.float64:
            allowed += 1e-5 * shape[-2]
        assert float(error) <= allowed


@pytest.mark.parametrize("n", [2, 3, 8, 101])
def test_sliced_wasserstein_of_known_sets(n):
    turned = c.polygon(n) @ torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    assert float(SlicedWasserstein()(turned)) == pytest.approx(1 / (12 * n * n), abs=1e-12)
    assert float(SlicedWasserstein()(torch.ones(n, 6, dtype=torch.float64))) == pytest.approx(
        1 / 12, abs=1e-9
    )


def test_sliced_wasserstein_is_the_distance_to_many_even_points():
    """On the circle, against the least mean squared arc over all rotations of the matching with even points."""
    x = torch.randn(6, 2, dtype=torch.float64)
    angle = (torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi) % 1).sort().values
    fine = 3000
    target = (torch.arange(fine, dtype=torch.float64) + 0.5) / fine
    mine = angle.repeat_interleave(fine // 6)
    costs = []
    for shift in range(fine):
        gap = (mine - target.roll(shift)).abs()
        costs.append(float(torch.minimum(gap, 1 - gap).square().mean()))
    assert float(SlicedWasserstein()(x)) == pytest.approx(min(costs), abs=1e-6)


def test_wang_and_isolas_loss_is_the_penalty():
    x = torch.nn.functional.normalize(torch.randn(40, 7, dtype=torch.float64), dim=1)
    expected = torch.pdist(x).pow(2).mul(-2).exp().mean().log()
    assert float(GaussianPotential(t=2).penalty(x)) == pytest.approx(float(expected), rel=1e-12)
    assert float(GaussianPotential(t=2)(x)) == pytest.approx(math.exp(expected), rel=1e-12)


def test_a_random_projection_is_the_measure_of_the_projected_neurons():
    """The mean over Gaussian matrices that do not depend on the neurons, one draw a step, the global generator at rest."""
    x, measure = torch.randn(2, 9, 20, dtype=torch.float64), RieszEnergy(s=1)
    projected = Projected(measure, RandomProjection(dim=5, count=3))
    before = torch.get_rng_state()
    state = projected.prepare(x)
    unit = torch.nn.functional.normalize(x, dim=-1)
    y = projected.projection.project(unit, state)
    assert y.shape == (2, 3, 9, 5)
    torch.testing.assert_close(projected(x, state), measure(y).mean(-1))
    again = projected.prepare(2 * x, state)
    assert not torch.allclose(projected(x, state), projected(x, again))
    assert torch.equal(torch.get_rng_state(), before)
    matrices = projected.projection.project(torch.eye(20, dtype=torch.float64)[None], state).mT
    assert float(matrices.mean()) == pytest.approx(0, abs=4 / math.sqrt(300))
    assert float(matrices.std()) == pytest.approx(1, abs=0.2)


def test_a_group_projection_takes_each_coordinate_at_most_once():
    projected = Projected(RieszEnergy(s=2), GroupProjection(dim=3))
    state = projected.prepare(torch.randn(4, 11))
    seen = projected.projection.project(torch.arange(11.0).expand(1, 4, 11), state)
    assert seen.shape == (1, 3, 4, 3)
    assert len(seen[0, :, 0].unique()) == 9


def test_neurons_of_few_dimensions_are_not_projected():
    x = torch.randn(12, 6)
    for projection in (RandomProjection(), GroupProjection(6), AnglePreserving(8), Adversarial(6)):
        measure = Projected(RieszEnergy(s=1), projection)
        value = measure.value_and_grad(x)[0]
        assert float(value) == pytest.approx(float(RieszEnergy(s=1)(x)), rel=1e-6)
        assert measure.prepare(x) == {}


def cosine_change(x, y):
    a, b = (torch.nn.functional.normalize(part, dim=-1) for part in (x, y))
    return float((a @ a.mT - b @ b.mT).square().mean())


def test_angles_are_kept_better_than_by_chance_and_better_with_time():
    x = torch.randn(1, 40, 60, dtype=torch.float64)
    projection = AnglePreserving(dim=8)
    state, changes = None, []
    for _ in range(30):
        state = projection.prepare(torch.nn.functional.normalize(x, dim=-1), RieszEnergy(), state)
        changes.append(cosine_change(x[0], projection.project(x, state)[0, 0]))
    by_chance = cosine_change(x[0], x[0] @ torch.randn(60, 8, dtype=torch.float64))
    assert changes[-1] < changes[0] < 0.6 * by_chance
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(changes))


def test_the_adversary_raises_the_energy_and_stays_orthonormal():
    x = torch.nn.functional.normalize(torch.randn(1, 60, 30, dtype=torch.float64), dim=-1)
    measure, projection = RieszEnergy(s=1), Adversarial(dim=8)
    state, energies = None, []
    for _ in range(5):
        state = projection.prepare(x, measure, state)
        energies.append(float(measure(projection.project(x, state))))
        eye = state["matrix"] @ state["matrix"].mT
        torch.testing.assert_close(eye[0], torch.eye(8, dtype=torch.float64))
    assert sorted(energies) == energies
    assert energies[-1] > 1.05 * float(measure(RandomProjection(8).project(x, {})))


def test_a_large_layer_learns_its_projection_from_some_of_its_neurons():
    seen = []

    class Watching(AnglePreserving):
        def objective(self, x, measure):
            seen.append(x.shape[1])
            return super().objective(x, measure)

    Projected(RieszEnergy(), Watching(dim=4)).prepare(torch.randn(1300, 9))
    assert set(seen) == {434}  # every third


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianPotential(t=0), r"t must be in \(0, 150\]; got 0"),
        (
            lambda: GramDeterminant(bandwidth=-1),
            r"bandwidth must be a chord in \[0.01, 10\]; got -1",
        ),
        (lambda: GramDeterminant(jitter=2), r"jitter must be in \[0, 1\]; got 2"),
        (lambda: Separation(half_space="yes"), "half_space must be True or False; got 'yes'"),
        (lambda: Orthogonality("hard"), "kind must be 'so', 'dso', 'mc' or 'srip'; got 'hard'"),
        (lambda: SlicedWasserstein(0), "circles must be an int >= 1; got 0"),
        (lambda: ResultantLength(softening=1), r"softening must be a length in \[0, 1\)"),
        (lambda: RandomProjection(dim=1), "dim must be an int >= 2; got 1"),
        (lambda: RandomProjection(count=0), "count must be an int >= 1"),
        (lambda: Adversarial(steps=0), "steps must be an int >= 1"),
        (lambda: Covering(witnesses=0), "witnesses must be an int >= 1"),
    ],
)
def test_bad_settings_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_parts_of_a_projected_measure_are_told():
    with pytest.raises(TypeError, match="measure must be a measure such as"):
        Projected("mhe")
    with pytest.raises(
        TypeError, match=r"projection must be a projection such as RandomProjection\(dim=30\)"
    ):
        Projected(RieszEnergy(), 30)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: random_expectation(RieszEnergy, 4, 4),
            TypeError,
            r"measure must be an instance: write RieszEnergy\(\)",
        ),
        (lambda: lower_bound("mhe", 4, 4), TypeError, "measure must be a measure such as"),
        (lambda: lower_bound(RieszEnergy(), 4, 4.5), TypeError, "n and d must be ints"),
        (
            lambda: uniformity_ratio(torch.eye(3), RieszEnergy()),
            TypeError,
            "measure must be a measure such as",
        ),
        (
            lambda: uniformity_score(RieszEnergy(), torch.eye(3).numpy()),
            TypeError,
            "got ndarray; make one with torch.as_tensor",
        ),
        (
            lambda: GaussianPotential()(torch.eye(3).int()),
            TypeError,
            r"got torch.int32; cast with x.float\(\)",
        ),
        (
            lambda: Total()(torch.eye(3)),
            ValueError,
            r"Total.on_sphere must return one value for each group, shape \(1,\)",
        ),
        (
            lambda: Covering()(torch.eye(3), Polarization().prepare(torch.eye(3))),
            ValueError,
            "the state is not one of Covering",
        ),
    ],
)
def test_mistakes_are_told_with_the_way_out(call, error, message):
    with pytest.raises(error, match=message):
        call()


class Total(SphereMeasure):
    def on_sphere(self, x, state):
        return x.sum()


def test_a_layer_without_live_neurons_has_no_ratio_and_no_score():
    for x in (torch.zeros(4, 3), torch.full((4, 3), float("nan")), torch.eye(4, 3)[[0, 3, 3, 3]]):
        for measure in (RieszEnergy(), Separation(), Covering(), GramDeterminant()):
            assert math.isnan(uniformity_ratio(measure, x))
            assert math.isnan(uniformity_score(measure, x))


def test_a_search_that_goes_on_has_no_random_reference():
    x, measure = torch.randn(20, 40), Projected(RieszEnergy(s=1), Adversarial(dim=8))
    assert math.isnan(uniformity_ratio(measure, x))
    assert math.isnan(uniformity_score(measure, x))
    assert not math.isnan(uniformity_ratio(measure, x[:, :8]))  # not projected


def test_the_table_names_nested_measures_shortly():
    net = torch.nn.Sequential(torch.nn.Linear(40, 9), torch.nn.Linear(9, 2))
    table = (
        UniformityRegularizer(
            Projected(Covering(half_space=True), RandomProjection(dim=8, count=2))
        )
        .attach(net)
        .table()
    )
    words = " ".join(table.split())
    assert (
        "measure: Projected(measure=Covering(half_space=True), "
        "projection=RandomProjection(dim=8, count=2))"
    ) in words
    assert "head: Covering(half_space=False)" in words


@pytest.mark.parametrize(
    ("measure", "n", "d", "flops"),
    [
        (RieszEnergy(), 100, 20, 3 * 100 * 100 * 20),
        (KoLeo(), 100, 20, 100 * 100 * 20),
        (Orthogonality("so"), 100, 20, 4 * 100 * 20 * 20),
        (Orthogonality("so"), 20, 100, 4 * 20 * 100 * 20),
        (GramDeterminant(), 100, 20, 4 * 100 * 100 * 20 + 100**3),
        (Sampled(RieszEnergy(), block=10), 100, 20, 10 * 3 * 10 * 10 * 20),
        (Sampled(RieszEnergy(), block=60), 100, 20, 3 * 100 * 100 * 20),
        (
            Projected(RieszEnergy(), RandomProjection(dim=5, count=2)),
            100,
            20,
            2 * (6 * 100 * 20 * 5 + 3 * 100 * 100 * 5),
        ),
        (Projected(RieszEnergy(), RandomProjection(dim=30)), 100, 20, 3 * 100 * 100 * 20),
    ],
    ids=repr,
)
def test_the_arithmetic_that_the_table_states(measure, n, d, flops):
    assert measure.grad_flops(n, d) == flops
