"""What no penalty may break: degenerate neurons give finite, useful gradients, and finite training stays finite."""

import copy
import math

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_hsu import UniformityRegularizer
from lightning_hsu._core import smallest_angle
from lightning_hsu.measures import GramDeterminant, Orthogonality, RieszEnergy
from tests.models import Automatic, batches, loader, trainer, uniformity
from tests.rounding import assert_near


def degenerate(kind):
    """Rows (8, 16) with one kind of trouble among ordinary ones."""
    w = torch.randn(8, 16)
    match kind:
        case "duplicates":
            w[1] = w[0]
            w[2] = 3 * w[0]
        case "near-duplicates":
            w[1] = w[0] + 1e-6 * torch.randn(16)
        case "antipodal":
            w[1] = -w[0]
        case "zero rows":
            w[:3] = 0
        case "all zero":
            w.zero_()
        case "all equal":
            w[:] = w[0].clone()
        case "one huge":
            w[0] *= 1e18
        case "one tiny":
            w[0] *= 1e-18
        case "all huge":
            w *= 1e18
        case "all tiny":
            w *= 1e-18
        case "subnormal":
            w[0] *= 1e-40
    return w


KINDS = [
    "duplicates",
    "near-duplicates",
    "antipodal",
    "zero rows",
    "all zero",
    "all equal",
    "one huge",
    "one tiny",
    "all huge",
    "all tiny",
    "subnormal",
]
MEASURES = [
    RieszEnergy(s=s, half_space=half, distance=distance, softening=softening)
    for s in (0, 1, 2, 20)
    for half in (False, True)
    for distance in ("chordal", "geodesic")
    for softening in (1e-2, 0.0)
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_finite(kind, dtype):
    w = (
        degenerate(kind).clamp(-60000, 60000).to(dtype)
        if dtype == torch.float16
        else degenerate(kind).to(dtype)
    )
    for measure in MEASURES:
        value, gradient = measure.value_and_grad(w)
        assert torch.isfinite(value).all(), measure
        assert torch.isfinite(gradient).all(), measure
        assert gradient.dtype == dtype
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("shape", [(1, 5), (0, 5), (3, 1), (1, 1), (4, 0, 5)])
def test_too_few_neurons_have_energy_zero_and_no_gradient(shape):
    value, gradient = RieszEnergy(half_space=True).value_and_grad(torch.randn(shape))
    assert value.shape == shape[:-2]
    if shape[-2] < 2:
        assert (value == 0).all()
    assert (gradient == 0).all() or shape == (3, 1)
    assert torch.isfinite(gradient).all()
    assert gradient.shape == shape


# in float32 s = 20 multiplies the rounding of a cosine; measured: 8e-5
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_zero_rows_take_no_part(dtype, tolerance):
    x = torch.randn(9, 6, dtype=dtype)
    with_zeros = torch.cat([x[:4], torch.zeros(1000, 6, dtype=dtype), x[4:]])
    for measure in MEASURES:
        value, gradient = measure.value_and_grad(x)
        same, its = measure.value_and_grad(with_zeros)
        torch.testing.assert_close(same, value, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            torch.cat([its[:4], its[1004:]]), gradient, rtol=tolerance, atol=tolerance
        )
        assert (its[4:1004] == 0).all()


def test_an_antipodal_pair_feels_no_force_in_full_space():
    """It is where two neurons should be, and the chordal force vanishes there; only half space pushes them apart."""
    x = torch.randn(2, 5)
    x[1] = -3 * x[0]
    for distance in ("chordal", "geodesic"):
        full, half = (
            RieszEnergy(s=2, half_space=half, distance=distance).value_and_grad(x)[1]
            for half in (False, True)
        )
        assert float(full.abs().max()) < 1e-3
        assert float(half.norm(dim=1).min()) > 1e4


@pytest.mark.parametrize("softening", [1e-2, 0.1])
def test_coincident_neurons_feel_the_force_of_a_pair_at_the_softening_chord(softening):
    x = torch.randn(1, 6, dtype=torch.float64).repeat(2, 1)
    x /= x.norm(dim=1, keepdim=True)
    force = RieszEnergy(s=2, softening=softening).value_and_grad(x)[1]
    assert float(force[0].norm()) == pytest.approx(2 / softening**3, rel=1e-9)
    torch.testing.assert_close(force[0], -force[1])


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("softening", [0.22, 0.23, 0.5, 1.5])
def test_a_wide_softening_in_float32_too(softening, half_space):
    """Wider than the chord below which pairs are redone in float64: the knee is then in the float32 panels."""
    x = torch.randn(40, 5)
    measure = RieszEnergy(s=2, half_space=half_space, softening=softening)
    value, gradient = measure.value_and_grad(x)
    expected, reference = measure.value_and_grad(x.double())
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(
        gradient.double(), reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max())
    )


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("s", [-60, -130, -200])
def test_large_negative_exponents_stay_finite_in_float32(s, half_space):
    value, gradient = RieszEnergy(s=s, half_space=half_space).value_and_grad(
        degenerate("antipodal")
    )
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("s", [30, 60, 300])
def test_steep_kernels_do_not_overflow_in_float32(s):
    x = torch.randn(40, 30)
    x[1] = x[0] + 0.3 * torch.randn(30)
    value, gradient = RieszEnergy(s=s).value_and_grad(x)
    expected, reference = RieszEnergy(s=s).value_and_grad(x.double())
    assert float(value) == pytest.approx(float(expected), rel=1e-3) or float(expected) > 3e38
    assert torch.isfinite(gradient).all()
    if s == 30:
        torch.testing.assert_close(
            gradient.double(), reference, rtol=1e-3, atol=float(reference.abs().max()) * 1e-4
        )


def test_non_finite_rows_do_not_poison_the_others():
    x = torch.randn(9, 6)
    broken = torch.cat([x, torch.full((1, 6), math.nan), torch.full((1, 6), math.inf)])
    value, gradient = RieszEnergy().value_and_grad(broken)
    assert float(value) == pytest.approx(float(RieszEnergy()(x)), rel=1e-6)
    assert_near(gradient[:9], RieszEnergy().value_and_grad(x)[1])


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_huge_and_tiny_norms_change_nothing_but_the_gradients_scale(scale):
    x = torch.randn(9, 600)
    value, gradient = RieszEnergy().value_and_grad(x)
    again, scaled = RieszEnergy().value_and_grad(x * scale)
    assert float(again) == pytest.approx(float(value), rel=1e-6)
    assert_near(scaled * scale, gradient)


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("copies", [2, 5, 300])
def test_exact_duplicates_part(copies, half_space):
    """Equal rows feel different forces (along a seeded direction), and descent separates them."""
    w = torch.randn(1, 8).repeat(copies, 1)
    if half_space:
        w[::2] *= -1
    measure = RieszEnergy(s=1, half_space=half_space)
    _, gradient = measure.value_and_grad(w)
    assert torch.equal(gradient, measure.value_and_grad(w)[1])
    assert (gradient.norm(dim=1) > 0).all()
    for _ in range(3):
        gradient = measure.value_and_grad(w)[1]
        w = w - 0.3 * gradient / gradient.norm(dim=1, keepdim=True)
    assert float(smallest_angle(w, half_space=half_space)) > 1e-3


def test_duplicates_on_different_panels_part_from_each_other():
    w = torch.randn(600, 8, dtype=torch.float64)
    w[500] = w[3]
    _, gradient = RieszEnergy().value_and_grad(w)
    pull = gradient[3] - gradient[500]
    assert float(pull.norm()) > 100 * float(gradient.norm(dim=1).median())
    torch.testing.assert_close(
        gradient[3], -gradient[500], rtol=1e-2, atol=float(pull.norm()) * 1e-2
    )


def test_softening_is_the_tangent_line_in_the_squared_chord():
    def pair(chord):
        angle = 2 * math.asin(chord / 2)
        return torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)

    measure = RieszEnergy(s=2, softening=0.1)
    for chord in (0.099, 0.05, 0.001):
        line = 1 / 0.01 - (chord**2 - 0.01) / 0.01**2
        assert float(measure(pair(chord))) == pytest.approx(line, rel=1e-9)
        tangential = measure.value_and_grad(pair(chord))[1][1, 1]
        assert float(tangential) == pytest.approx(-2 * chord / 0.01**2, rel=chord)
    assert float(measure(pair(0.11))) == pytest.approx(1 / 0.11**2, rel=1e-9)


class Planted(Automatic):
    """A network whose layers begin in a degenerate state."""

    def __init__(self, kind, **kwargs):
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
        )
        net[3].weight.data = degenerate(kind)
        super().__init__(net=net, **kwargs)


@pytest.mark.filterwarnings("ignore:layer 'net.* starts at zero")  # and has no share limit here
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "huge" not in kind])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize(
    "measure",
    [RieszEnergy(s=2), RieszEnergy(s=2, half_space=True), RieszEnergy(s=2, softening=0.0)],
)
def test_finite_training_stays_finite(kind, optimizer, measure):
    rate = {"SGD": 0.1, "Adam": 0.01}[optimizer]
    module = Planted(kind, make_optimizer=lambda p: getattr(torch.optim, optimizer)(p, lr=rate))
    trainer(uniformity(measure=measure, coefficient=1.0)).fit(module, loader(batches()))
    assert all(torch.isfinite(p).all() and p.abs().max() < 100 for p in module.parameters())


@pytest.mark.filterwarnings("ignore:the penalty is too strong")  # of a task close to 0
@pytest.mark.parametrize("kind", ["one huge", "all huge"])
def test_finite_training_stays_finite_at_huge_norms(kind):
    module = Planted(kind)
    module.net[5].weight.data.mul_(1e-18)  # so that the task itself is finite
    module.net[3].weight.data.mul_(1e-3)
    trainer(uniformity(coefficient=1.0)).fit(module, loader(batches()))
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize("apply", ["gradient", "loss", "decoupled"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_weights_train_and_stay_finite(precision, apply):
    module = Planted("duplicates", make_optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    data = batches(dtype=torch.bfloat16 if precision == "bf16-true" else torch.float16)
    trainer(uniformity(coefficient=1.0, apply=apply), precision=precision).fit(module, loader(data))
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert float(smallest_angle(module.net[3].weight)) > 0.01


@pytest.mark.parametrize("apply", ["loss", "decoupled"])
def test_the_step_limit_holds_in_every_mode(apply):
    """A near-duplicate pair goes at most its own norm in a step, and in the loss the scaler's factor is seen through."""
    module = Automatic(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    with torch.no_grad():
        module.net[5].weight[1] = module.net[5].weight[0] + 1e-4
    before = module.net[5].weight.detach().clone()
    plain = copy.deepcopy(module)
    data, settings = loader(batches(count=1)), {"max_epochs": 1}
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))]
    settings |= {"plugins": plugins} if apply == "loss" else {}
    trainer(**settings).fit(plain, data)
    trainer(uniformity(coefficient=1.0, apply=apply), **settings).fit(module, data)
    moved = (module.net[5].weight - plain.net[5].weight).detach().norm(dim=1) / before.norm(dim=1)
    if apply == "loss":
        torch.testing.assert_close(moved[:2], torch.ones(2), rtol=1e-3, atol=0)  # float16 forward
    else:
        assert (moved[:2] > 0.5).all()  # one norm along the tangent, and back onto the sphere
        assert (moved[:2] < 1.01).all()


def test_the_step_limit_bounds_a_step_and_touches_nothing_else():
    layer = nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        layer.weight[1] = layer.weight[0] + 1e-4
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    moved = {}
    for limit in (None, 1.0):
        layer.weight.grad = torch.zeros_like(layer.weight)
        regularizer = UniformityRegularizer(RieszEnergy(s=2), head=None, step_limit=limit).attach(
            layer
        )
        stats = regularizer.add_gradients(optimizer, stats=True)
        moved[limit] = 0.5 * layer.weight.grad.norm(dim=1) / layer.weight.detach().norm(dim=1)
        assert int(stats["weight"].limited) == (0 if limit is None else 2)
    assert (moved[None][:2] > 100).all()
    torch.testing.assert_close(moved[1.0][:2], torch.ones(2))
    torch.testing.assert_close(moved[1.0][2:], moved[None][2:])


@pytest.mark.parametrize(
    "measure",
    [GramDeterminant(), GramDeterminant(half_space=True), Orthogonality(), Orthogonality("dso")],
    ids=repr,
)
def test_a_zero_row_in_one_group_does_not_slow_down_the_others(measure, monkeypatch):
    """Groups without one keep their closed form; all are as they are by themselves."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 5, 7, generator=chance, dtype=torch.float64)
    x[1, 2, 3] = 0.0
    x[0, 3, :4] = 0.0  # a single row is left
    seen = []
    original = type(measure).on_sphere

    def watched(self, unit, state):
        seen.append(tuple(unit.shape))
        return original(self, unit, state)

    monkeypatch.setattr(type(measure), "on_sphere", watched)
    value, grad = measure.value_and_grad(x)
    assert seen == [(1, 4, 7)]
    for i in range(2):
        for j in range(4):
            alone, slope = measure.value_and_grad(x[i, j])
            assert_near(value[i, j], alone)
            assert_near(grad[i, j], slope)
    assert not grad[1, 2, 3].any()
    assert not grad[0, 3].any()
