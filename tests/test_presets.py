"""The presets against the official formulas, written down here once more, with neurons as columns as in the official code."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_hsu import HypersphericalUniformity, presets
from lightning_hsu.presets import PRESETS, OfficialMHE, OfficialMHS, sphere_uniformity
from tests.models import Automatic, batches, loader, mean_square, trainer

POWERS = ["0", "1", "2", "a0", "a1", "a2"]
NAMES = [name for name in PRESETS if name not in ("mhe", "half_mhe")]
SHAPES = [(64, 27), (32, 100), (40, 5), (6, 50)]
SCALES = [0.03, 1.0, 30.0]


def norm(F):
    return F / torch.sqrt((F * F).sum(0, keepdim=True) + 1e-4)


def cal(F):
    length = torch.sqrt((F * F).sum(0, keepdim=True) + 1e-4)
    return (F.T @ F) / (length.T @ length)


def double(F):
    return torch.cat([F, -F], 1)


def upper(M):
    return M[torch.ones_like(M, dtype=torch.bool).triu(1)]


def mhe(F, power):
    G = upper(cal(F))
    D, A = 2 - 2 * G, torch.acos(G) / math.pi + 1e-4
    return {"0": -D.log(), "1": D**-0.5, "2": D**-1, "a0": -A.log(), "a1": A**-1, "a2": A**-2}[
        power
    ].mean()


def mhs(F):
    D = upper(2 - 2 * cal(norm(F)))
    return -D[D - D.min() < 1e-13].sum()  # products in another order differ in the last bits


def mgd(F):
    K = torch.exp(-(2 - 2 * cal(norm(F)))) + 1e-6 * torch.eye(F.shape[1], dtype=F.dtype)
    return -torch.logdet(K)


def to_pole(F, v):
    F = norm(F)
    lengths = torch.sqrt((v * v).sum() + 1e-4) * torch.sqrt((F * F).sum(0) + 1e-4)
    return 2 - 2 * (v @ F) / lengths


def mhp(F, v):  # what the pole minimises; the network maximises it
    return (to_pole(F, v) ** -1).mean()


def mhc(F, v):  # what the pole maximises; the network minimises it
    return -torch.log(torch.exp(-10 * to_pole(F, v)).mean()) / 10


def angle_loss(F, P):
    return torch.sqrt(((cal(P @ F) - cal(F)) ** 2).sum())


def adversarial_loss(F, P):
    return -mhe(P @ F, "2")


PROJECTION_LOSSES = {"comhe_ap": angle_loss, "comhe_adv": adversarial_loss}


def projections(name, F, state):
    """The drawn projections, or the trained one a step ahead; layers of few dimensions have none."""
    if F.shape[0] <= (40 if name == "comhe_rp" else 30):
        return []
    if name == "comhe_rp":
        generator = torch.Generator().manual_seed(20210415 + int(state["draw"][0]))
        return torch.randn(20, 40, F.shape[0], generator=generator, dtype=torch.float64)
    P = state["projection"][0].double().clone().requires_grad_()
    return [P - 0.1 * torch.autograd.grad(PROJECTION_LOSSES[name](F, P), P, create_graph=True)[0]]


def official(name, F, state, head=False):
    """The term that the official code adds to the loss; state is that of one group."""
    points = F if head else double(F)
    if name.startswith("comhe"):
        if head:
            return 10 * mhe(F, "2")
        energies = [mhe(double(P @ F), "2") for P in projections(name, F, state)] or [
            mhe(points, "2")
        ]
        return sum(energies) / len(energies)
    if "mhe" in name:
        power = name.split("_")[-1]
        points = points if name.startswith("half") else F
        return (10 if head else 1) * (0.1 if power in ("a1", "a2") else 1) * mhe(points, power)
    if name == "mhp":
        return (10 if head else 1) * -mhp(points, state["pole"][0].double())
    if name == "mhc":
        return (0.1 if head else 0.01) * mhc(points, state["pole"][0].double())
    if name == "mhs":
        return (1 if head else 0.1) * mhs(points)
    if name == "mgd":
        return (0.1 if head else 0.01) * mgd(points)
    return (0.1 if head else 0.01) * torch.norm(F.sum(1))


def terms(name, head):
    """Measure and coefficient as the callback uses them."""
    regularizer = sphere_uniformity(name).regularizer
    if head:
        return regularizer.measure.for_head(), regularizer.head_coefficient
    return regularizer.measure, regularizer.coefficient


def weights(shape, scale, dtype=torch.float64):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype).double()


def value_and_gradient(function, w):
    w = w.clone().requires_grad_()
    value = function(w)
    return value.detach(), torch.autograd.grad(value, w)[0]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_the_official_ones(name, head):
    measure, coefficient = terms(name, head)
    for shape in SHAPES:
        for scale in SCALES:
            for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
                x = weights(shape, scale, dtype)
                state = measure.prepare(x)
                expected, slope = value_and_gradient(
                    lambda w, state=state: official(name, w.T, state, head), x
                )
                for value, grad in (
                    value_and_gradient(
                        lambda w, state=state: measure.penalty(w, state), x.to(dtype)
                    ),
                    measure.value_and_grad(x.to(dtype), state),
                ):
                    assert value.dtype == grad.dtype == dtype
                    torch.testing.assert_close(
                        coefficient * value.double(), expected, rtol=tolerance, atol=0
                    )
                    error = torch.linalg.norm(
                        coefficient * grad.double() - slope
                    ) / torch.linalg.norm(slope)
                    assert error < 10 * tolerance, (shape, scale)


def plain_poles(name, F, v, velocity, head, steps=10, lr=0.1):
    sign, term = (1, mhp) if name == "mhp" else (-1, mhc)
    coefficient = {"mhp": 1, "mhc": 0.01}[name] * (10 if head else 1)
    for _ in range(steps):
        v = v.detach().requires_grad_()
        loss = sign * coefficient * term(F if head else double(F), v) + 5e-4 * (v * v).sum() / 2
        velocity = 0.9 * velocity + torch.autograd.grad(loss, v)[0]
        v = v - lr * velocity
    return v.detach(), velocity


def plain_projection(name, F, P, lr=0.1):
    for _ in range({"comhe_ap": 1, "comhe_adv": 10}[name]):
        P = P.detach().requires_grad_()
        P = (
            P
            - lr
            * torch.autograd.grad(
                PROJECTION_LOSSES[name](F, P) + 1e-3 * 5e-4 * (P * P).sum() / 2, P
            )[0]
        )
    return P.detach()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", ["mhp", "mhc"])
def test_poles_take_the_official_steps(name, head):
    measure, _ = terms(name, head)
    x = torch.stack([weights((32, 20), 1.0), weights((32, 20), 0.1)])
    start = torch.randn(20, generator=torch.Generator().manual_seed(20210415), dtype=torch.float64)
    expected = [(start, torch.zeros_like(start))] * 2
    state = None
    for _ in range(3):
        state = measure.prepare(x, state)
        expected = [plain_poles(name, w.T, *one, head) for w, one in zip(x, expected, strict=True)]
        for key, tensors in zip(("pole", "velocity"), zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(state[key], torch.stack(tensors), rtol=1e-9, atol=1e-12)
        x = x + 0.01 * torch.randn_like(x)


@pytest.mark.parametrize("name", ["comhe_ap", "comhe_adv"])
def test_projections_take_the_official_steps(name):
    measure, _ = terms(name, head=False)
    x = torch.stack([weights((16, 50), 1.0), weights((16, 50), 0.1)])
    start = torch.randn(
        30, 50, generator=torch.Generator().manual_seed(20210415), dtype=torch.float64
    )
    expected, state = [start, start], None
    for _ in range(3):
        state = measure.prepare(x, state)
        expected = [plain_projection(name, w.T, P) for w, P in zip(x, expected, strict=True)]
        torch.testing.assert_close(
            state["projection"], torch.stack(expected), rtol=1e-9, atol=1e-12
        )
        x = x + 0.01 * torch.randn_like(x)


def test_random_projections_are_drawn_anew_at_each_step():
    measure, _ = terms("comhe_rp", head=False)
    x = weights((16, 50), 1.0)
    first = measure.prepare(x)
    second = measure.prepare(x, first)
    values = [
        float(measure.penalty(x, state))
        for state in (None, first, second, measure.prepare(x, first))
    ]
    assert values[0] == values[1] != values[2] == values[3]


@pytest.mark.parametrize("name", ["mhp", "mhc", "comhe_rp", "comhe_ap", "comhe_adv"])
def test_states_count_groups_go_on_and_start_afresh_where_they_do_not_fit(name):
    measure, _ = terms(name, head=False)
    x = torch.randn(3, 8, 50)
    before = torch.get_rng_state()
    state = measure.prepare(x)
    again = measure.prepare(x, state)
    assert torch.equal(before, torch.get_rng_state())
    for key, tensor in state.items():
        assert again[key].shape == tensor.shape
        assert tensor.shape[0] == 3
        assert not torch.equal(again[key], tensor)
        assert not tensor.requires_grad
    other = measure.prepare(x[:2], again)
    for key, part in other.items():
        assert part.shape[0] == 2
        if key != "draw":
            torch.testing.assert_close(part, state[key][:2])


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_apart_zero_rows_do_no_harm_and_autocast_changes_nothing(name):
    measure, _ = terms(name, head=False)
    x = torch.randn(2, 3, 8, 50)
    x[0, 0, :2] = 0.0
    value, grad = measure.value_and_grad(x)
    assert value.shape == (2, 3)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    alone = measure.value_and_grad(x[1, 2])
    torch.testing.assert_close((value[1, 2], grad[1, 2]), alone)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        inside = measure.penalty(x)
    assert torch.equal(inside, measure.penalty(x))
    torch.testing.assert_close(inside, value)
    assert measure.penalty(x[..., :1, :]).eq(0).all()
    assert isinstance(float(measure.ratio(measure(x[1, 2]), 1.0)), float)


def test_half_space_doubles_the_smallest_chord_and_ties_are_summed():
    simplex = torch.eye(3, dtype=torch.float64) * 1e3
    assert float(OfficialMHS(half_space=False)(simplex)) == pytest.approx(3 * 2.0)
    assert float(OfficialMHS()(simplex)) == pytest.approx(12 * 2.0)
    x = torch.tensor([[30.0, 0.0, 0.0], [-40.0, 30.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert float(OfficialMHS()(x)) == pytest.approx(2 * 0.4, rel=1e-3)


def test_ratio_is_above_1_for_neurons_that_crowd():
    spread, crowded = torch.randn(32, 16), torch.randn(32, 16) + 2.0
    for name in NAMES:
        measure, _ = terms(name, head=False)
        ratio = float(measure.ratio(measure(crowded), float(measure(spread))))
        assert math.isnan(ratio) if name == "r_mhp" else ratio > 1, name


def small_network():
    """Dimensions 9, 54 and 32: below and above those that are projected to."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3),
        nn.Flatten(),
        nn.Linear(32, 12),
        nn.Linear(12, 3),
    )


@pytest.mark.usefixtures("_few_random_layers")
@pytest.mark.parametrize("name", NAMES)
def test_training_follows_the_official_objective(name):
    model = Automatic(lambda p: torch.optim.SGD(p, lr=0.01), net=small_network())
    net, data = copy.deepcopy(model.net), batches(3)
    trainer(sphere_uniformity(name, verbose=False), fast_dev_run=3).fit(model, loader(data))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    layers = [layer for layer in net if hasattr(layer, "weight")]
    states = [None] * len(layers)
    for x, y in data:
        loss = mean_square(net(x), y)
        for i, layer in enumerate(layers):
            w, head = layer.weight.flatten(1), i == len(layers) - 1
            states[i] = terms(name, head)[0].prepare(w, states[i])
            loss = loss + official(name, w.double().T, states[i], head)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, expected in zip(model.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_names_arguments_and_errors():
    assert {f"{half}mhe_{power}" for half in ("", "half_") for power in POWERS} < set(PRESETS)
    assert sphere_uniformity("mhe").regularizer.measure == OfficialMHE("2", half_space=False)
    assert sphere_uniformity("half_mhe").regularizer.measure == OfficialMHE("2", half_space=True)
    assert sphere_uniformity("mhp", inner_lr=0.01).regularizer.measure.inner_lr == 0.01
    callback = sphere_uniformity("mgd", head=None, include="a", exclude="b", prefix="own")
    assert isinstance(callback, HypersphericalUniformity)
    regularizer = callback.regularizer
    assert (regularizer.head_coefficient, regularizer.step_limit, regularizer.every_n_steps) == (
        None,
        None,
        1,
    )
    assert (regularizer.head, regularizer.include, regularizer.exclude, callback.prefix) == (
        None,
        "a",
        "b",
        "own",
    )
    with pytest.raises(ValueError, match="no preset 'mhe_3'") as error:
        sphere_uniformity("mhe_3")
    assert all(name in str(error.value) for name in PRESETS)
    for wrong in (
        lambda: OfficialMHE("3"),
        lambda: OfficialMHS(half_space=1),
        lambda: sphere_uniformity("mhc", inner_lr=0),
    ):
        with pytest.raises(ValueError, match="must be"):
            wrong()


@pytest.mark.parametrize("name", NAMES)
def test_measures_compare_hash_print_and_pickle(name):
    measure, _ = terms(name, head=False)
    assert isinstance(type(measure)(), type(measure))
    for twin in (pickle.loads(pickle.dumps(measure)), eval(repr(measure), vars(presets))):
        assert twin == measure
        assert hash(twin) == hash(measure)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 5), (0, 5), (5, 0), (2, 1, 4), (0, 3, 4)])
def test_too_few_neurons_have_penalty_zero(name, shape):
    x, measure = torch.randn(shape), sphere_uniformity(name).regularizer.measure
    value, grad = measure.value_and_grad(x)
    assert value.shape == shape[:-2]
    assert grad.shape == shape
    assert not value.any()
    assert not grad.any()


def test_a_preset_takes_a_share_limit():
    assert sphere_uniformity("half_mhe_2").share_limit is None
    limited = sphere_uniformity("half_mhe_2", share_limit=0.02)
    assert limited.regularizer.share_limit == 0.02
    assert limited.step_limit is None
    with pytest.raises(ValueError, match="share_limit must be a finite number > 0"):
        sphere_uniformity("half_mhe_2", share_limit=0)
