"""Schedules and shares: what they come to, step by step, and what they refuse."""

import copy
import math
import pickle

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_hsu import CosineSchedule, LinearSchedule, Share, UniformityRegularizer
from lightning_hsu._engine.state import ShareMeans
from lightning_hsu.coefficients import LARGEST, strength_at
from lightning_hsu.measures import PairwiseMeasure, RieszEnergy
from tests.models import Automatic, batches, loader, network, trainer, uniformity
from tests.test_callback import rows_of

SCHEDULES = [LinearSchedule, CosineSchedule]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    ("value", "warmup", "end", "final"),
    [(2.0, 10, 50, 0.5), (0.3, 0, 7, 0.0), (1.0, 5, 5, 0.1), (0.0, 3, 9, 2.0)],
)
def test_schedules_warm_up_and_go_to_their_end(kind, value, warmup, end, final):
    schedule = kind(value, warmup=warmup, end=end, final=final)
    given = [schedule(step) for step in range(end + 20)]
    rise = [value * (step + 1) / (warmup + 1) for step in range(warmup)]
    assert given[:warmup] == pytest.approx(rise)
    assert given[end:] == [final] * 20
    if end > warmup:
        assert given[warmup] == pytest.approx(value)
        middle = given[warmup:end]
        assert middle == sorted(middle, reverse=value > final)
        assert schedule((warmup + end) // 2) == pytest.approx(
            (value + final) / 2, abs=abs(value - final) / (end - warmup)
        )


def test_a_cosine_is_a_cosine():
    schedule = CosineSchedule(3.0, end=100, final=1.0)
    for step in (0, 1, 33, 99):
        assert schedule(step) == pytest.approx(1 + 2 * (1 + math.cos(math.pi * step / 100)) / 2)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_without_an_end_a_schedule_stays(kind):
    assert kind(0.5, warmup=4)(3) == pytest.approx(0.4)
    assert kind(0.5, warmup=4)(10**9) == 0.5
    assert pickle.loads(pickle.dumps(kind(0.5, end=3))) == kind(0.5, end=3)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"value": -1.0}, "value must be a finite number >= 0; got -1.0"),
        ({"value": float("nan")}, "value must be a finite number >= 0"),
        ({"value": 1e39}, r"value must be at most 1e\+30"),
        ({"value": 1.0, "final": -0.1}, "final must be a finite number >= 0; got -0.1"),
        ({"value": 1.0, "warmup": 0.5}, "warmup counts optimizer steps, an int >= 0; got 0.5"),
        ({"value": 1.0, "end": -1}, "end counts optimizer steps, an int >= 0; got -1"),
        (
            {"value": 1.0, "warmup": 10, "end": 5},
            "must not end before its warm-up does; got warmup=10, end=5",
        ),
    ],
)
def test_bad_schedules(kind, kwargs, message):
    with pytest.raises(ValueError, match=f"{kind.__name__}.*{message}"):
        kind(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fraction": 0.0}, "fraction must be a finite number > 0; got 0.0"),
        ({"fraction": float("inf")}, "fraction must be a finite number > 0"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\); got 1.0"),
        ({"maximum": -1.0}, "maximum must be a finite number > 0"),
        ({"maximum": 1e39}, r"maximum must be at most 1e\+30"),
        (
            {"fraction": 5},
            r"For 5 % write Share\(0.05\)\. .* coefficient=1\.0 and share_limit=None$",
        ),
    ],
)
def test_bad_shares(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Share(**kwargs)
    with pytest.raises(TypeError, match=r"coefficient must be an instance: write Share\(\.\.\.\)"):
        UniformityRegularizer(head_coefficient=Share)


def norms(parameter, change):
    """Norms of a gradient before and of what a change adds to it."""
    before = parameter.grad.clone()
    change()
    return float(before.norm()), float((parameter.grad - before).norm())


def stepped(net, seed=0):
    torch.manual_seed(seed)
    net.zero_grad()
    net(torch.randn(4, 1, 6, 6)).square().sum().backward()
    return net


def test_a_share_without_smoothing_is_that_fraction_of_every_step():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    regularizer = UniformityRegularizer(
        coefficient=Share(0.2, smoothing=0.0), step_limit=None
    ).attach(net)
    for seed in range(3):
        stepped(net, seed)
        before = {name: p.grad.clone() for name, p in net.named_parameters()}
        stats = regularizer.add_gradients(optimizer, stats=True)
        for name, p in net.named_parameters():
            if name.endswith("weight"):
                share = float((p.grad - before[name]).norm() / before[name].norm())
                assert share == pytest.approx(0.2, rel=1e-5)  # measured: 3e-7
                assert float(stats[name.removesuffix(".weight")].share) == pytest.approx(
                    0.2, rel=1e-5
                )
        optimizer.step()


def test_the_means_are_running_means_of_the_norms():
    net, share = network(), Share(0.1, smoothing=0.6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = UniformityRegularizer(
        RieszEnergy(s=1), share, include="5", head=None, step_limit=None
    ).attach(net)
    task = penalty = 0.0
    for seed in range(4):
        stepped(net, seed)
        weight = net[5].weight
        pull = float(RieszEnergy(s=1).value_and_grad(weight.detach())[1].norm())
        of_task, added = norms(weight, lambda: regularizer.add_gradients(optimizer))
        task, penalty = 0.6 * task + 0.4 * of_task, 0.6 * penalty + 0.4 * pull
        assert added == pytest.approx(0.1 * task / penalty * pull, rel=1e-4)
        optimizer.step()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_the_means(broken):
    means, share = ShareMeans(), Share(0.1)
    assert means.coefficient("a", share) == 0.0
    means.update("a", share, torch.tensor(broken), torch.tensor(1.0))
    assert float(means.coefficient("a", share)) == 0.0
    means.update("a", share, torch.tensor(2.0), torch.tensor(4.0))
    means.update("a", share, torch.tensor(2.0), torch.tensor(broken))
    assert float(means.coefficient("a", share)) == pytest.approx(0.05)


def test_a_share_is_of_the_tasks_gradient_where_layers_have_one_parameter():
    """The gates of a weight-normed LSTM are four sets of neurons computed from the same two parameters."""
    net = nn.utils.parametrizations.weight_norm(nn.LSTM(5, 3), "weight_hh_l0")
    regularizer = UniformityRegularizer(
        coefficient=Share(0.5, smoothing=0.0), include="*hh*", head=None
    ).attach(net)
    net(torch.randn(7, 2, 5))[0].square().sum().backward()
    originals = [p for name, p in net.named_parameters() if "original" in name]
    task = float(torch.cat([p.grad.flatten() for p in originals]).norm())
    stats = regularizer.add_gradients(torch.optim.SGD(net.parameters(), lr=1e-3), stats=True)
    means = regularizer.state.share_means.means
    assert len(means) == 4
    assert all(float(of_task) == pytest.approx(task, rel=1e-5) for of_task, _ in means.values())
    assert all(float(one.share) == pytest.approx(0.5, rel=1e-5) for one in stats.values())


def test_another_model_begins_without_means():
    used = UniformityRegularizer(coefficient=Share(0.1))
    fresh = UniformityRegularizer(coefficient=Share(0.1))
    gradients = []
    for regularizer in (used, used, fresh):
        torch.manual_seed(0)
        net = stepped(network())
        regularizer.attach(net).add_gradients(torch.optim.SGD(net.parameters(), lr=0.1))
        gradients.append(net[5].weight.grad)
    assert torch.equal(gradients[1], gradients[2])


def test_a_share_of_nothing_is_not_logged(tmp_path):
    class Still(Automatic):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0.0

    logger = CSVLogger(tmp_path)
    fit = trainer(uniformity(coefficient=0.1), logger=logger, log_every_n_steps=1, max_epochs=1)
    fit.fit(Still(), loader(batches()))
    assert not any("gradient_share" in name for row in rows_of(logger).values() for name in row)


def test_a_share_stays_finite_where_a_gradient_vanishes():
    means, share = ShareMeans(), Share(0.1, maximum=50.0)
    for name, task, penalty, expected in (
        ("a", 1.0, 0.0, 50.0),
        ("b", 0.0, 1.0, 0.0),
        ("c", 0.0, 0.0, 0.0),
        ("d", 1e30, 1e-30, 50.0),
    ):
        means.update(name, share, torch.tensor(task), torch.tensor(penalty))
        assert float(means.coefficient(name, share)) == expected
    net = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(4, 6, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4, 6))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = UniformityRegularizer(
        RieszEnergy(s=2, half_space=True), Share(0.1), head=None
    ).attach(net)
    net(
        torch.zeros(2, 6)
    ).sum().backward()  # no gradient but zeros, and orthogonal neurons without a force
    regularizer.add_gradients(optimizer)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


class Bent(PairwiseMeasure):
    """The kernel of s = 2, a hundred times weaker: the share makes up for it."""

    half_space = False

    def kernel(self, q, p):
        return 1e-2 / q, -1e-2 / q.square()


def test_a_share_does_not_depend_on_the_scale_of_the_measure():
    gradients = []
    for measure in (RieszEnergy(s=2), Bent()):
        torch.manual_seed(0)
        net = stepped(network())
        UniformityRegularizer(measure, Share(0.1)).attach(net).add_gradients(
            torch.optim.SGD(net.parameters(), lr=0.1)
        )
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_shares_and_schedules_by_layer_are_in_the_table_and_in_the_logger(tmp_path):
    given = {
        "net.0": Share(0.03),
        "net.2": LinearSchedule(1.0, warmup=3),
        "net.5": 0.2,
        "*": CosineSchedule(0.4, end=6),
    }
    callback, logger = uniformity(coefficient=given), CSVLogger(tmp_path)
    module = Automatic()
    table = copy.deepcopy(callback.regularizer).attach(module).table()
    assert "share 0.03" in table
    assert table.count("schedule") == 2
    trainer(callback, logger=logger, log_every_n_steps=1, max_epochs=1).fit(
        module, loader(batches())
    )
    rows = rows_of(logger)
    assert [round(rows[step]["hsu/coefficient/net.2"], 6) for step in range(5)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]
    assert rows[6]["hsu/coefficient/net.7"] == 0.0
    assert "hsu/coefficient/net.5" not in rows[0]
    assert 0 < rows[0]["hsu/gradient_share/net.0"] == pytest.approx(0.03, rel=1e-4)
    assert 0 < rows[6]["hsu/coefficient/net.0"] < 1e4


def test_the_means_are_saved_and_go_on():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = UniformityRegularizer(coefficient=Share(0.1)).attach(net)
    for seed in range(3):
        stepped(net, seed)
        regularizer.add_gradients(optimizer)
    saved = pickle.loads(pickle.dumps(regularizer.state_dict()))
    again = UniformityRegularizer(coefficient=Share(0.1)).attach(net)
    again.load_state_dict(saved)
    gradients = []
    for one in (regularizer, again):
        stepped(net, 7)
        one.add_gradients(optimizer)
        gradients.append(net[5].weight.grad.clone())
    assert torch.equal(*gradients)
    fresh = UniformityRegularizer(coefficient=Share(0.1)).attach(net)
    stepped(net, 7)
    fresh.add_gradients(optimizer)
    assert not torch.equal(net[5].weight.grad, gradients[0])


def test_a_share_needs_the_tasks_gradient_by_itself():
    regularizer = UniformityRegularizer(coefficient=Share()).attach(network())
    with pytest.raises(
        ValueError,
        match="the coefficient of layer '0' is a Share, which needs the task's gradient by itself",
    ):
        regularizer.penalty()


def test_the_monitor_knows_a_share_before_the_first_step():
    regularizer = UniformityRegularizer(coefficient=Share()).attach(network())
    assert regularizer.current_penalty(regularizer.measure_layers()) == 0.0


@pytest.mark.parametrize("given", [-5.6e-17, -1e-9, -0.0, 0])
def test_a_schedule_that_rounding_leaves_below_zero_ends_at_zero(given):
    assert strength_at(lambda step: given, 3, "a") == 0.0
    net = network()
    regularizer = UniformityRegularizer(coefficient=lambda step: given, head=None).attach(net)
    stepped(net)
    before = net[5].weight.grad.clone()
    regularizer.add_gradients(torch.optim.SGD(net.parameters(), lr=0.1))
    assert torch.equal(net[5].weight.grad, before)


@pytest.mark.parametrize("given", [-1e-8, math.nan, math.inf, 1e39, 10**400, "x", None])
def test_a_schedule_that_gives_no_coefficient_is_refused_with_its_step(given):
    with pytest.raises(
        ValueError, match=r"gave .* for layer 'a' at optimizer step 3; it must return"
    ):
        strength_at(lambda step: given, 3, "a")


def without_a_step():
    return 0.3


@pytest.mark.parametrize(
    "wrong", [lambda: 0.3, without_a_step, lambda step, epoch: 0.3, lambda *, step: 0.3]
)
def test_a_function_that_takes_no_step_is_refused_at_once(wrong):
    for given, what in ((wrong, "coefficient"), ({"*": wrong}, r"coefficient\['\*'\]")):
        with pytest.raises(TypeError, match=f"^{what} is a function .* lambda step: 0.3"):
            UniformityRegularizer(coefficient=given)
    with pytest.raises(TypeError, match=r"^head_coefficient is a function"):
        UniformityRegularizer(head_coefficient=wrong)


@pytest.mark.parametrize("fine", [lambda *steps: 0.3, lambda step, rate=2.0: 0.3, math.sqrt])
def test_a_function_that_can_be_called_with_a_step_is_none_of_these(fine):
    regularizer = UniformityRegularizer(coefficient=fine).attach(network())
    assert regularizer.layers[0].strength is fine


@pytest.mark.parametrize("key", [1, None, ("a", "b")])
def test_the_keys_of_a_mapping_are_names(key):
    told = "the keys of coefficient are names of layers or patterns of them"
    with pytest.raises(TypeError, match=told):
        UniformityRegularizer(coefficient={"*": 1.0, key: 0.3})


@pytest.mark.parametrize("wrong", [1e31, 1e39, 1e300, 10**40])
def test_a_coefficient_that_float32_cannot_hold_is_refused(wrong):
    for settings in ({"coefficient": wrong}, {"coefficient": {"*": wrong}}):
        with pytest.raises(ValueError, match=r"must be at most 1e\+30, beyond which float32"):
            UniformityRegularizer(**settings)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("way", ["add_gradients", "move"])
@pytest.mark.parametrize(("scale", "within"), [(1.0, 1e-6), (1e-8, 1e-4)])  # measured: 8e-6
def test_the_largest_coefficient_is_held_as_any_other_large_one(scale, within, way, optimizer):
    """Small rows have large gradients, and a GradScaler multiplies them."""
    ends = []
    for coefficient in (1e6, LARGEST):
        torch.manual_seed(0)
        net = network()
        with torch.no_grad():
            net[5].weight *= scale
        nn.utils.parametrizations.weight_norm(net[0])
        stepping = optimizer(net.parameters(), lr=1e-3)
        regularizer = UniformityRegularizer(coefficient=coefficient, share_limit=0.02).attach(net)
        for seed in range(3):
            stepped(net, seed)
            if way == "add_gradients":
                for p in net.parameters():
                    p.grad *= 2.0**16
                regularizer.add_gradients(stepping, grad_scale=2.0**16)
                for p in net.parameters():
                    p.grad /= 2.0**16
            stepping.step()
            if way == "move":
                regularizer.move(stepping)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert ends[1].isfinite().all()
    torch.testing.assert_close(*ends, rtol=1e-3, atol=within)
