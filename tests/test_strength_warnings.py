"""A penalty that is too strong, does nothing or is held for long is told once, with the numbers."""

import logging
import math
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_hsu import Share, UniformityRegularizer
from lightning_hsu._core.limits import SAFE_SHARE
from lightning_hsu._engine import warn
from lightning_hsu._monitor.as_random import AsRandom
from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu._monitor.text import finding
from lightning_hsu.measures import RieszEnergy
from lightning_hsu.measures.defaults import SHARE_LIMIT
from lightning_hsu.reference import random_level, random_range
from tests.models import Automatic, batches, loader, trainer, uniformity
from tests.plain import HALF_SPACE

LATER = 112  # steps, of which those from the hundredth to the tenth after it are looked at


def network():
    """Two layers; the first, '0', has 8 neurons in 6 dimensions."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def sgd(parameters, **settings):
    return torch.optim.SGD(parameters, **{"lr": 1e-3, **settings})


class Loop:
    """One's own loop whose weights, data and gradients are the same at every step.

    Args:
        make_optimizer: Makes the optimizer of the parameters.
        moves: Whether neurons are moved after the step.
        factor: What the task's loss is multiplied by at each step.
        net: The network.
    """

    def __init__(self, make_optimizer=sgd, *, moves=False, factor=lambda step: 1.0, net=None):
        self.net = network() if net is None else net
        self.optimizer = make_optimizer(self.net.parameters())
        self.moves = moves
        self.factor = factor
        torch.manual_seed(1)
        self.x = torch.randn(16, 6)

    def step(self, regularizer, number, **settings):
        self.optimizer.zero_grad()
        before = [p.detach().clone() for p in self.net.parameters()]
        (self.net(self.x).square().mean() * self.factor(number)).backward()
        if self.moves:
            self.optimizer.step()
            found = regularizer.move(self.optimizer, **settings)
        else:
            found = regularizer.add_gradients(self.optimizer, **settings)
            self.optimizer.step()
        with torch.no_grad():
            for p, former in zip(self.net.parameters(), before, strict=True):
                p.copy_(former)
        return found

    def share(self, layer="0"):
        """The share of the penalty in a layer with a coefficient of 1."""
        regularizer = of_first(1.0, include=None).attach(self.net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(self.step(regularizer, 0, stats=True)[layer].share)

    def run(self, caplog, regularizer, steps=LATER, asks=False):
        """The warnings, and what is logged, of that many steps; each that asks is looked at by and by."""
        regularizer.attach(self.net)
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with caplog.at_level(logging.INFO, logger="lightning_hsu"):
                for number in range(steps):
                    self.step(regularizer, number, stats=asks)
        return [str(one.message) for one in caught], [one.getMessage() for one in caplog.records]


def of_first(coefficient, **settings):
    """A regularizer of the first layer alone."""
    settings = {"head": None, "include": "0", "step_limit": None, **settings}
    return UniformityRegularizer(coefficient=coefficient, **settings)


# The penalty's gradient is larger than the task's.


@pytest.mark.parametrize("limit", [None, 5.0])
def test_a_penalty_above_the_task_is_told_once_after_the_first_steps(caplog, limit):
    loop = Loop()
    coefficient = 3.0 / loop.share()
    (text,), logged = loop.run(caplog, of_first(coefficient, share_limit=limit), 160, asks=True)
    assert text.startswith(
        f"the penalty is stronger than the task with coefficient {coefficient:g}"
    )
    assert "on 10 steps in a row" in text
    assert "in layer '0' (3.0 times)" in text
    held_to = f"which holds the penalty's gradient to {SHARE_LIMIT:.0%} of the task's"
    assert f"Set share_limit={SHARE_LIMIT:g}, {held_to}" in text
    assert "a smaller coefficient may not be enough" in text
    assert logged == []


def test_a_penalty_above_the_task_at_the_start_is_no_matter(caplog):
    """As at a small initial scale: what lasts counts."""
    loop = Loop()
    coefficient = 3.0 / loop.share()
    assert loop.run(caplog, of_first(coefficient), 109) == ([], [])


@pytest.mark.parametrize(
    ("times", "settings"),
    [
        (0.9, {}),
        (3.0, {"moves": True}),  # the optimizer may scale the task's gradient
        (3.0, {"factor": lambda step: 1.0 if step < 50 else 0.5 * 0.1}),  # the task has converged
    ],
)
def test_a_penalty_below_the_task_or_not_to_be_compared_is_no_matter(caplog, times, settings):
    coefficient = times / Loop().share()
    if "factor" in settings:
        coefficient *= 0.05
    assert Loop(**settings).run(caplog, of_first(coefficient)) == ([], [])


def test_a_share_of_all_the_task_is_no_matter_but_a_limit_of_it_is(caplog):
    loop = Loop()
    assert loop.run(caplog, of_first(Share(1.0))) == ([], [])
    regularizer = of_first(3.0 / loop.share(), share_limit=1.0)
    texts, logged = loop.run(caplog, regularizer)
    assert logged == []
    (text,) = texts  # a limit that large may keep a task from being learnt
    assert "in 1 of 1 layers (1 of the task's gradient). That may be too much" in text
    assert f"set share_limit={SHARE_LIMIT:g}" in text


# The step limit.


def grown(coefficient):
    """A schedule that grows between the first look and the later ones."""
    return lambda step: coefficient if step >= 50 else 1e-3 * coefficient


def row_coefficient(loop, times):
    """The coefficient at which SGD's learning rate alone moves the median neuron by so much of its norm."""
    w = loop.net[0].weight.detach()
    regularizer = of_first(1.0).attach(loop.net)
    loop.net.zero_grad()
    loop.net[0].weight.grad = torch.zeros_like(w)
    regularizer.add_gradients(torch.optim.SGD([loop.net[0].weight], lr=1e-30))
    lengths = loop.net[0].weight.grad.norm(dim=1) / w.norm(dim=1)
    return times / (1e-3 * float(lengths.median()))


@pytest.mark.parametrize(("momentum", "is_told"), [(0.0, False), (0.9, True)])
def test_the_step_limit_is_told_at_a_later_look_with_momentum(caplog, momentum, is_told):
    """A step of 0.3 of the norm is one of 3 with a momentum of 0.9."""
    huge = {"factor": lambda step: 1e6}  # so that the penalty is small beside the task
    loop = Loop(lambda p: sgd(p, momentum=momentum), **huge)
    schedule = grown(row_coefficient(loop, 0.3))
    limits = {"step_limit": 1.0, "share_limit": SHARE_LIMIT}
    texts, _ = loop.run(caplog, of_first(schedule, **limits))
    assert len(texts) == is_told
    for text in texts:
        assert text.endswith(". Take a smaller coefficient or share_limit")
        assert "on 5 steps in a row the step limit shortened most of it, in layer '0' (" in text
        assert re.search(r"\((5|6|7|8) of 8 neurons\)", text)


@pytest.mark.parametrize(("share", "is_told"), [(0.3, False), (3.0, True)])
def test_the_step_limit_is_told_at_a_later_look_with_adam(caplog, share, is_told):
    """Adam's step has entries of its rate, 0.2: weights of about 0.2 move by their norm at a share of 1."""
    loop = Loop(lambda p: torch.optim.Adam(p, lr=0.2))
    schedule = grown(share / loop.share())
    texts, _ = loop.run(caplog, of_first(schedule, step_limit=1.0))
    assert len(texts) == is_told
    for text in texts:
        assert "the step limit shortened most of it, in layer '0' (" in text


# The share limit binds for long.


def test_a_share_limit_that_decides_is_told_once_and_is_no_alarm(caplog):
    loop = Loop()
    coefficient = 3.0 / loop.share()
    texts, (text,) = loop.run(
        caplog, of_first(coefficient, share_limit=SHARE_LIMIT), 160, asks=True
    )
    assert texts == []
    assert text == (
        "the share limit has decided how strong the penalty is for 10 steps in a row in 1 of 1 layers "
        f"({SHARE_LIMIT:g} of the task's gradient); a larger coefficient changes nothing there"
    )


def test_above_the_default_a_limit_that_decides_may_be_too_much_where_rows_must_be_alike(caplog):
    loop = Loop()
    texts, (text,) = loop.run(caplog, of_first(3.0 / loop.share(), share_limit=SAFE_SHARE))
    assert texts == []
    assert text.endswith(
        f"Where rows must be alike take share_limit={SHARE_LIMIT:g} or exclude='0'"
    )


def test_a_head_that_is_held_may_be_left_out_by_its_coefficient(caplog):
    regularizer = UniformityRegularizer(coefficient=1e4, share_limit=SAFE_SHARE, step_limit=None)
    texts, (text,) = Loop().run(caplog, regularizer)
    assert texts == []
    assert text.endswith(
        f"Where rows must be alike take share_limit={SHARE_LIMIT:g} or head_coefficient=0"
    )
    assert len(text) < 250
    left_out = UniformityRegularizer(coefficient=1e4, share_limit=SHARE_LIMIT, head_coefficient=0)
    found = Loop().step(left_out.attach(network()), 0, stats=True)
    assert "2" not in found


@pytest.mark.parametrize(
    ("coefficient", "steps"),
    [
        ({"0": 0.9 * SHARE_LIMIT}, LATER),  # within the limit
        ({"0": 3.0, "2": 0.9 * SHARE_LIMIT}, 109),  # not for long
    ],
)
def test_a_share_limit_that_does_not_decide_is_not_told(caplog, coefficient, steps):
    given = {name: share / Loop().share(name) for name, share in coefficient.items()}
    regularizer = of_first(given, include=None, share_limit=SHARE_LIMIT)
    assert Loop().run(caplog, regularizer, steps) == ([], [])


@pytest.mark.parametrize("moves", [False, True])
def test_a_limit_that_decides_in_one_small_layer_names_it(caplog, moves):
    given = {"0": 0.01 / Loop().share("0"), "2": 3.0 / Loop().share("2")}
    regularizer = of_first(given, include=None, share_limit=SAFE_SHARE)
    texts, (text,) = Loop(moves=moves).run(caplog, regularizer)
    assert texts == []
    of = "optimizer's step" if moves else "task's gradient"
    assert f"in 1 of 2 layers, '2' ({SAFE_SHARE:g} of the {of}); a larger coefficient" in text
    assert text.endswith("exclude='2'")


@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_limit_that_decides_is_told_of_however_often_the_penalty_is_applied(caplog, every):
    loop = Loop()
    regularizer = of_first(3.0 / loop.share(), share_limit=SHARE_LIMIT, every_n_steps=every)
    texts, (_,) = loop.run(caplog, regularizer, 100 + 12 * every)
    assert texts == []


@pytest.mark.parametrize("factor", [0.0, math.nan])
def test_where_the_task_has_no_gradient_no_limit_is_told_to_decide(caplog, factor):
    regularizer = of_first(1e-3, share_limit=SHARE_LIMIT)
    assert Loop(factor=lambda step: factor).run(caplog, regularizer, 160, asks=True) == ([], [])


def test_only_the_first_rank_logs(caplog, monkeypatch):
    monkeypatch.setattr(warn, "is_first_rank", lambda: False)
    loop = Loop()
    regularizer = of_first(3.0 / loop.share(), share_limit=SHARE_LIMIT)
    assert loop.run(caplog, regularizer) == ([], [])


# The penalty does nothing.


def test_a_penalty_that_does_nothing_is_told_once(caplog):
    loop = Loop()
    coefficient = 5e-5 / loop.share()
    (text,), logged = loop.run(caplog, of_first(coefficient), 160, asks=True)
    assert text.startswith(f"the penalty does next to nothing with coefficient {coefficient:g}")
    assert "at most 5.0e-05 in layer '0' (1, 8, 6)" in text
    better = SHARE_LIMIT / 5e-5 * coefficient
    assert f"a coefficient of about {better:.1g} would make it {SHARE_LIMIT:.0%}" in text
    assert logged == []


def test_a_layer_that_is_held_does_not_hide_that_the_penalty_does_nothing_elsewhere(caplog):
    loop = Loop()
    given = {"0": 5e-5 / loop.share("0"), "2": 3.0 / loop.share("2")}
    regularizer = of_first(given, include=None, share_limit=SHARE_LIMIT)
    (text,), logged = loop.run(caplog, regularizer, 160, asks=True)
    assert text.startswith(
        "the penalty does next to nothing in the layers that the share limit does not hold with"
    )
    assert "in each of 1 layers, at most 5.0e-05 in layer '0' (1, 8, 6)" in text
    assert len(logged) == 1


def test_the_layer_with_the_largest_share_is_named(caplog):
    loop = Loop()
    given = {"0": 2e-5 / loop.share("0"), "2": 4e-5 / loop.share("2")}
    (text,), _ = loop.run(caplog, of_first(given, include=None))
    assert "in each of 2 layers, at most 4.0e-05 in layer '2' (1, 3, 8)" in text


@pytest.mark.parametrize("kind", ["larger", "one is larger", "schedule", "share", "early", "moves"])
def test_a_penalty_that_does_something_or_is_meant_to_be_small_is_no_matter(caplog, kind):
    loop = Loop(moves=kind == "moves")
    weak = 5e-5 / Loop().share()
    given = {
        "larger": 4.0 * weak,
        "one is larger": {"0": weak, "2": 0.01 / loop.share("2")},
        "schedule": lambda step: weak,
        "share": {"0": weak, "2": Share(0.01)},
        "early": weak,
        "moves": weak,
    }[kind]
    regularizer = of_first(given, include=None if isinstance(given, dict) else "0")
    assert loop.run(caplog, regularizer, 109 if kind == "early" else LATER) == ([], [])


class Converges(Loop):
    """Its first layer's neurons become orthogonal, where the penalty's gradient vanishes."""

    def step(self, regularizer, number, **settings):
        if number == 50:
            nn.init.orthogonal_(self.net[0].weight)
        return super().step(regularizer, number, **settings)


def test_a_penalty_that_has_done_its_work_is_no_matter(caplog):
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    loop = Converges(net=net)
    coefficient = 0.01 / loop.share()
    in_half_space = partial(of_first, coefficient, measure=HALF_SPACE)  # where it is soon done
    assert loop.run(caplog, in_half_space()) == ([], [])
    shares = [float(loop.step(in_half_space().attach(net), 0, stats=True)["0"].share)]
    assert max(shares) < 1e-5


# Layers that start at zero.


def zeroed(net, rows=slice(None)):
    with torch.no_grad():
        net[2].weight[rows] = 0.0
    return net


def test_a_layer_that_starts_at_zero_is_told_once(caplog):
    loop = Loop(net=zeroed(network()))
    limited = UniformityRegularizer(coefficient=1e-3, share_limit=SHARE_LIMIT)
    texts, (text,) = loop.run(caplog, limited, 3)
    assert texts == []
    assert text.startswith("layer '2' (3 x 8) starts at zero and has no directions until the task")
    assert "the limit by the task's gradient keeps the penalty from deciding them" in text
    assert text.endswith("There is nothing to do about it")
    (text,), logged = loop.run(caplog, UniformityRegularizer(coefficient=1e-3), 3)
    assert f"which then learns nothing. Set share_limit={SHARE_LIMIT:g}" in text
    assert logged == []
    (text,), logged = loop.run(caplog, UniformityRegularizer(coefficient=1e-3, share_limit=1.0), 3)
    assert f"which then learns nothing. Set share_limit={SHARE_LIMIT:g}" in text
    assert logged == []
    assert loop.run(caplog, UniformityRegularizer(coefficient=Share(0.05)), 3)[0] == []


@pytest.mark.parametrize("share_limit", [None, SHARE_LIMIT])
def test_a_share_that_is_no_safe_limit_is_told_of_a_layer_at_zero(caplog, share_limit):
    """No share limit holds a Share."""
    loop = Loop(net=zeroed(network()))
    large = UniformityRegularizer(coefficient=Share(1.0), share_limit=share_limit)
    (text,), logged = loop.run(caplog, large, 3)
    assert text.startswith("layer '2' (3 x 8) starts at zero")
    assert f"Take Share({SHARE_LIMIT:g}), or a number and share_limit=" in text
    assert logged == []
    mixed = {"2": Share(SAFE_SHARE), "*": 1e-3}
    safe = UniformityRegularizer(coefficient=mixed, share_limit=share_limit)
    assert loop.run(caplog, safe, 3)[0] == []


def test_a_loss_with_a_layer_at_zero_is_told_even_with_a_limit(caplog):
    regularizer = UniformityRegularizer(coefficient=1e-3, share_limit=SHARE_LIMIT)
    regularizer.attach(zeroed(network()))
    with pytest.warns(UserWarning, match="layer '2' .* starts at zero"):
        regularizer.penalty()
    regularizer.penalty()  # a second warning would be an error


@pytest.mark.parametrize("kind", ["none", "one neuron", "frozen", "monitored", "left out"])
def test_a_layer_that_is_not_penalised_or_not_all_zero_is_no_matter(caplog, kind):
    net = network()
    if kind == "one neuron":
        zeroed(net, slice(0, 2))
    elif kind != "none":
        zeroed(net)
    net[2].weight.requires_grad_(kind != "frozen")
    given = {"coefficient": {"0": 1e-3} if kind == "monitored" else 1e-3}
    given["exclude"] = "2" if kind == "left out" else None
    loop = Loop(net=net)
    assert loop.run(caplog, UniformityRegularizer(**given, share_limit=SHARE_LIMIT), 3) == ([], [])


# In a fit.


def fits(monkeypatch, callback, module, count=1, **settings):
    """The warnings, and the lines of information, of each of several fits."""
    told = []
    monkeypatch.setattr("lightning_hsu.callback.rank_zero_info", told.append)
    found = []
    for _ in range(count):
        told.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(callback, **settings).fit(module, loader(batches()))
        ours = [str(one.message) for one in caught if "penalty" in str(one.message)]
        found.append((ours, [text for text in told if "\n" not in text]))
    return found


def still(net=None):
    """A module whose weights stay as they are."""
    return Automatic(lambda p: torch.optim.SGD(p, lr=1e-12), net=net)


def flat(n=8, d=36):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(d, n), nn.Linear(n, 3))


def test_what_is_said_once_a_fit_is_said_in_the_next_one_too():
    """By default Python shows a text once at a line."""
    callback = uniformity(coefficient=1e-3, head=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            trainer(callback).fit(still(zeroed(flat())), loader(batches()))
        for _ in range(2):
            regularizer = UniformityRegularizer(coefficient=1e-3).attach(zeroed(network()))
            regularizer.penalty()
    texts = [str(one.message) for one in caught]
    assert sum("layer '2' (3 x 8) starts at zero" in text for text in texts) == 2
    assert sum("starts at zero" in text for text in texts) == 4
    assert {Path(one.filename).name for one in caught if "starts" in str(one.message)} == {
        "_trainer.py",
        Path(__file__).name,
    }


@pytest.mark.parametrize("apply", ["gradient", "decoupled"])
def test_a_fit_tells_once_that_the_share_limit_decides(monkeypatch, apply):
    callback = uniformity(
        coefficient=1e4, share_limit=SHARE_LIMIT, apply=apply, verbose=True, head=None
    )
    settings = {"max_epochs": 17, "count": 2}
    for texts, told in fits(monkeypatch, callback, still(flat()), **settings):
        assert texts == []
        (text,) = [text for text in told if "the share limit" in text]
        assert text.startswith("Hyperspherical uniformity: the share limit has decided how strong")
        assert "2 of 2 layers" in text
    callback.verbose = False
    assert fits(monkeypatch, callback, still(flat()), max_epochs=17) == [([], [])]


def test_a_fit_by_default_is_told_of_nothing_that_alarms(monkeypatch, shipped_defaults):
    torch.manual_seed(0)
    ((texts, _),) = fits(monkeypatch, uniformity(), Automatic(), max_epochs=18)
    assert texts == []


@pytest.mark.parametrize("is_crowded", [True, False])
def test_a_fit_is_told_of_a_penalty_that_does_nothing_where_there_is_something_to_do(
    monkeypatch, is_crowded
):
    net = flat(6, 36)
    with torch.no_grad():
        for layer in (net[1], net[2]):
            nn.init.orthogonal_(layer.weight)
            if is_crowded:
                layer.weight += 0.3
    callback = uniformity(coefficient=1e-7, head=None)
    ((texts, _),) = fits(monkeypatch, callback, still(net), max_epochs=17)
    assert len(texts) == is_crowded
    if is_crowded:
        assert texts[0].startswith("the penalty does next to nothing with coefficient 1e-07")


@pytest.mark.parametrize(
    ("apply", "limit"), [("gradient", SHARE_LIMIT), ("gradient", None), ("loss", SHARE_LIMIT)]
)
def test_a_fit_tells_once_of_a_layer_that_starts_at_zero(monkeypatch, apply, limit):
    settings = {"apply": apply, "share_limit": limit, "step_limit": None, "include": "net.2"}
    callback = uniformity(coefficient=1e-9, verbose=True, head=None, **settings)
    is_safe = apply == "gradient" and limit is not None
    for _ in range(2):
        ((texts, told),) = fits(monkeypatch, callback, still(zeroed(flat())), max_epochs=2)
        assert (len(texts), len(told)) == ((0, 1) if is_safe else (1, 0))
        assert "layer 'net.2' (3 x 8) starts at zero" in (texts + told)[0]


@pytest.mark.parametrize("is_crowded", [False, True])
def test_a_fit_tells_once_of_layers_that_are_as_random_for_an_epoch(
    monkeypatch, tmp_path, is_crowded
):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 400), nn.Linear(400, 8), nn.Linear(8, 3))
    callback = uniformity(coefficient=0.01, verbose=True, head=None, include="net.2")
    if is_crowded:
        with torch.no_grad():
            net[2].weight[0] = net[2].weight[1]
    logs = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 2}
    ((texts, told),) = fits(monkeypatch, callback, still(net), max_epochs=4, **logs)
    assert texts == []
    assert len(told) == (not is_crowded)
    for text in told:
        assert "in a whole epoch layer 'net.2' was as random (ratios " in text
        assert "at 4 measurements): the penalty has little to do here, or it has done it" in text


def test_a_fit_of_one_epoch_is_not_told_that_fresh_layers_are_as_random(monkeypatch, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 400), nn.Linear(400, 8), nn.Linear(8, 3))
    callback = uniformity(coefficient=0.01, verbose=True, head=None, include="net.2")
    logs = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 2}
    assert fits(monkeypatch, callback, still(net), max_epochs=1, **logs) == [([], [])]


ENERGY = RieszEnergy(s=2.0, half_space=True)


def later_epoch():
    """At the beginning of the second epoch: of the first one nothing is told."""
    epoch = AsRandom()
    for _ in range(2):
        epoch.note([measured("a", 1.0)], {"a": ENERGY})
    assert epoch.end_epoch() is None
    return epoch


def measured(name, ratio, score=0.0):
    energy = ratio * random_level(ENERGY, 64, 512)
    return LayerUniformity(name, 1, 64, 512, energy, energy, ratio, score, 80.0, 0, 0, True)


@pytest.mark.parametrize(
    ("ratios", "is_told"),
    [
        ([0.993, 1.009], True),
        ([1.004], False),  # one measurement
        ([1.009, 1.012, 1.009], False),
        ([1.004, 0.988], False),
    ],
)
def test_every_measurement_of_an_epoch_counts(ratios, is_told):
    epoch = later_epoch()
    for ratio in ratios:
        epoch.note([measured("a", ratio), measured("monitored", 2.0)], {"a": ENERGY})
    text = epoch.end_epoch()
    assert (text is not None) == is_told
    if text is not None:
        assert "(ratios 0.993 to 1.009 at 2 measurements)" in text
    for _ in range(2):
        layers = [measured("a", 1.0), measured("b", float("nan"))]
        epoch.note(layers, {"a": ENERGY, "b": ENERGY})
    assert (epoch.end_epoch() is not None) != is_told  # an epoch later, and once
    assert epoch.end_epoch() is None


def test_layers_that_are_as_random_are_named_and_all_of_them_are_told_of_again():
    epoch = later_epoch()
    texts = []
    for crowded in (1.2, 1.2, 1.0, 1.0):
        for _ in range(2):
            layers = [measured("a", 1.001), measured("b", crowded), measured("c", 0.999)]
            epoch.note(layers, dict.fromkeys("abc", ENERGY))
        texts.append(epoch.end_epoch())
    some, again, every, last = texts
    assert some == (
        "in a whole epoch 2 of 3 layers with a penalty were as random (ratios 0.999 to 1.001 at 2 "
        "measurements): it has little to do in 'a', 'c', or it has done it: a training with coefficient=0 "
        "tells which"
    )
    assert every.startswith("in a whole epoch all 3 layers with a penalty were as random")
    assert (again, last) == (None, None)


def test_what_is_said_after_an_epoch_is_what_the_table_says():
    """Five ratios around both ends of what is called as random, in a small layer and a large one."""
    for n, d in ((4, 8), (64, 512)):
        low, high = random_range(ENERGY, n, d)
        level = random_level(ENERGY, n, d)
        for energy in (0.99 * low, 1.01 * low, level, 0.99 * high, 1.02 * high):
            ratio = energy / level
            layer = LayerUniformity("a", 1, n, d, energy, 0.0, ratio, 0.0, 80.0, 0, 0, True)
            epoch = later_epoch()
            for _ in range(2):
                epoch.note([layer], {"a": ENERGY})
            words = finding(layer, ENERGY)
            assert (epoch.end_epoch() is not None) == (words == "as random")
            assert epoch.is_crowded == words.endswith("x random")


def test_neurons_that_were_spread_are_not_as_random():
    """In many dimensions the ratio is close to 1 even for the best there can be."""
    epoch = later_epoch()
    for _ in range(2):
        epoch.note([measured("a", 0.991, score=0.9)], {"a": ENERGY})
    assert epoch.end_epoch() is None
