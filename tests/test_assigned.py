"""Settings that are assigned later: they count from the next step on, or are refused; none is ignored."""

import copy
import math
import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_hsu import HypersphericalUniformity, LinearSchedule, Share, UniformityRegularizer
from lightning_hsu.measures import Covering, KoLeo, RieszEnergy
from tests.models import (
    Automatic,
    batches,
    loader,
    mean_square,
    network,
    trainer,
    uniformity,
    weight_normed_network,
)
from tests.test_exactness import max_difference

AT = 3  # the batch before which a setting is assigned
DATA = batches(7)
MODES = ("gradient", "decoupled", "loss")
BY_LAYER = {"*0": 0.5, "*5": 2.0}


class Assigns(pl.Callback):
    """Assigns a setting of the first callback before a batch."""

    def __init__(self, name, value, at=AT):
        self.name, self.value, self.at = name, value, at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.at:
            setattr(trainer.callbacks[0], self.name, self.value)


def fitted(callback, *more):
    """A module after the fit."""
    torch.manual_seed(0)
    module = Automatic(net=weight_normed_network())
    fit = trainer(callback, *more, max_epochs=1)
    fit.fit(module, loader(DATA))
    return module


def until(before, after):
    """A schedule that is one number before ``AT`` and another one from then on."""

    def schedule(step):
        return before if step < AT else after

    return schedule


def by_layer(strengths, before, *, first):
    """The schedules of layers whose coefficients become ``strengths``, or were it first."""
    found = {}
    for name, strength in strengths.items():
        found[name] = until(strength, before) if first else until(before, strength)
    return found | {"*": until(0.0, before) if first else until(before, 0.0)}


CHANGES = [
    pytest.param(0.2, 3.0, until(0.2, 3.0), id="larger"),
    pytest.param(0.7, 0, until(0.7, 0.0), id="off"),
    pytest.param(0, 0.7, until(0.0, 0.7), id="on"),
    pytest.param(0.7, until(9.0, 0.3), until(0.7, 0.3), id="a schedule"),
    pytest.param(0.7, BY_LAYER, by_layer(BY_LAYER, 0.7, first=False), id="by layer"),
    pytest.param(BY_LAYER, 0.7, by_layer(BY_LAYER, 0.7, first=True), id="by layer before"),
]


@pytest.mark.parametrize("apply", MODES)
@pytest.mark.parametrize(("before", "after", "schedule"), CHANGES)
def test_another_coefficient_counts_from_the_next_step_on(before, after, schedule, apply):
    """As a schedule that says the same from the beginning."""
    callback = uniformity(coefficient=before, apply=apply)
    module = fitted(callback, Assigns("coefficient", after))
    assert callback.coefficient == after
    twin = fitted(uniformity(coefficient=schedule, apply=apply))
    unchanged = fitted(uniformity(coefficient=before, apply=apply))
    assert max_difference(twin, module) < 1e-6
    assert max_difference(unchanged, module) > 1e-4


def loop(regularizer, steps=7, **assigned):
    """A loop of one's own that assigns settings in the middle; returns the network and the last stats."""
    torch.manual_seed(0)
    net = network()
    regularizer.attach(net)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    stats = {}
    for step, (x, y) in enumerate(DATA[:steps]):
        if step == AT:
            for name, value in assigned.items():
                setattr(regularizer, name, value)
        optimizer.zero_grad()
        mean_square(net(x), y).backward()
        stats = regularizer.add_gradients(optimizer, stats=True)
        optimizer.step()
    return net, stats


@pytest.mark.parametrize("settings", [{}, {"tolerance": 0.05}], ids=str)
def test_a_loop_of_ones_own_goes_on_with_another_coefficient(settings):
    net, _ = loop(UniformityRegularizer(coefficient=0.2, **settings), coefficient=3.0)
    twin, _ = loop(UniformityRegularizer(coefficient=until(0.2, 3.0), **settings))
    assert max_difference(twin, net) < 1e-6


def test_a_share_that_is_assigned_holds_from_the_next_step_on():
    _, stats = loop(
        UniformityRegularizer(coefficient=3.0, step_limit=None),
        steps=AT + 1,
        coefficient=Share(0.05, smoothing=0.0),
    )
    assert stats
    for one in stats.values():
        assert float(one.share) == pytest.approx(0.05, rel=1e-4)


def test_the_heads_coefficient_may_be_assigned():
    net, _ = loop(UniformityRegularizer(coefficient=0.2), head_coefficient=3.0)
    given = {"7": until(0.2, 3.0), "*": 0.2}
    twin, _ = loop(UniformityRegularizer(coefficient=given))
    assert max_difference(twin, net) < 1e-6
    back, _ = loop(
        UniformityRegularizer(coefficient=0.2, head_coefficient=3.0),
        head_coefficient=None,
    )
    given = {"7": until(3.0, 0.2), "*": 0.2}
    twin, _ = loop(UniformityRegularizer(coefficient=given))
    assert max_difference(twin, back) < 1e-6


def test_a_heads_coefficient_needs_a_head():
    regularizer = UniformityRegularizer(head=None).attach(network())
    with pytest.raises(ValueError, match="head_coefficient is given, but no head is measured"):
        regularizer.head_coefficient = 0.1
    assert regularizer.head_coefficient is None


@pytest.mark.parametrize("apply", MODES)
def test_another_interval_counts_from_the_next_step_on(apply):
    asked = set()

    def noted(step):
        asked.add(step)
        return 0.7

    callback = uniformity(coefficient=noted, apply=apply)
    fitted(callback, Assigns("every_n_steps", 2))
    assert callback.every_n_steps == 2
    assert asked == {0, 1, 2, 4, 6}


def test_what_is_logged_is_of_the_coefficient_that_was_assigned():
    callback = uniformity(coefficient=LinearSchedule(0.2))
    module = Automatic()
    fit = trainer(callback, Assigns("coefficient", 3.0), max_epochs=1, log_every_n_steps=1)
    fit.fit(module, loader(DATA))
    regularizer = UniformityRegularizer().attach(module)
    measured = sum(one.penalty for one in regularizer.measure_layers())
    told = fit.callback_metrics["hsu/penalty"]
    assert float(told) == pytest.approx(3.0 * measured, rel=1e-5)


def test_before_a_fit_and_between_fits_an_assignment_counts():
    callback = uniformity(coefficient=5.0)
    callback.coefficient = 0.7
    callback.every_n_steps = 2
    callback.measure = RieszEnergy(s=1.0)
    callback.apply = "decoupled"
    callback.exclude = "net.0"
    callback.head = None
    callback.prefix = "other"
    settings = {
        "coefficient": 0.7,
        "every_n_steps": 2,
        "measure": RieszEnergy(s=1.0),
        "apply": "decoupled",
        "exclude": "net.0",
        "head": None,
        "prefix": "other",
    }
    assert {name: getattr(callback, name) for name in settings} == settings
    expected = fitted(uniformity(**settings))
    assert max_difference(expected, fitted(callback)) == 0
    callback.apply = "gradient"
    callback.measure = KoLeo()
    again = fitted(callback)
    expected = fitted(uniformity(**settings | {"apply": "gradient", "measure": KoLeo()}))
    assert max_difference(expected, again) == 0


def test_a_measure_begins_without_what_the_former_one_carried():
    """A search's witness is of no use for another measure, nor is a gradient that was kept."""
    nets = []
    for first in (Covering(), RieszEnergy(s=1.0)):
        torch.manual_seed(0)
        net = network()
        regularizer = UniformityRegularizer(first, tolerance=0.05).attach(net)
        optimizer = SGD(net.parameters(), lr=0.0)
        for x, y in DATA[:4]:
            optimizer.zero_grad()
            mean_square(net(x), y).backward()
            regularizer.add_gradients(optimizer)
        regularizer.detach()
        regularizer.measure = RieszEnergy(s=1.0)
        regularizer.attach(net)
        assert regularizer.state.measure_states.by_layer == {}
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.zero_grad()
        mean_square(net(DATA[0][0]), DATA[0][1]).backward()
        regularizer.add_gradients(optimizer)
        optimizer.step()
        nets.append(net)
    assert max_difference(*nets) == 0


STAYING = {
    "measure": KoLeo(),
    "include": "*0",
    "exclude": "*0",
    "head": None,
    "neurons": {"*0": "columns"},
    "sample_above": None,
    "share_work": False,
}
OF_THE_CALLBACK = {"apply": "loss", "prefix": "other", "figures_every_n_steps": None}


@pytest.mark.parametrize("name", STAYING)
def test_what_counts_at_attach_is_refused_while_a_model_is_attached(name):
    regularizer = UniformityRegularizer().attach(network())
    before = getattr(regularizer, name)
    way_out = f"{name} cannot be assigned while a model is attached, .* call detach"
    with pytest.raises(AttributeError, match=way_out):
        setattr(regularizer, name, STAYING[name])
    assert getattr(regularizer, name) == before
    regularizer.detach()
    setattr(regularizer, name, STAYING[name])
    assert getattr(regularizer, name) == STAYING[name]
    regularizer.attach(network())


@pytest.mark.parametrize("name", [*STAYING, *OF_THE_CALLBACK])
def test_what_counts_at_the_start_of_a_fit_is_refused_during_one(name):
    callback = uniformity()
    value = (STAYING | OF_THE_CALLBACK)[name]
    with pytest.raises(AttributeError, match=f"{name} cannot be assigned .* before trainer.fit"):
        fitted(callback, Assigns(name, value))
    setattr(callback, name, value)  # the fit is over
    assert getattr(callback, name) == value


WRONG = [
    ("coefficient", -1, ValueError, "coefficient must be a finite number >= 0"),
    ("coefficient", math.nan, ValueError, "coefficient must be a finite number >= 0"),
    ("coefficient", 1e39, ValueError, r"coefficient must be at most 1e\+30"),
    ("coefficient", "strong", TypeError, "coefficient must be a number"),
    ("coefficient", None, TypeError, "coefficient must be a number"),
    ("coefficient", lambda: 0.3, TypeError, "coefficient is a function that .* lambda step: 0.3"),
    ("head_coefficient", {"*": 1.0}, TypeError, "head_coefficient is a number or a schedule"),
    ("head_coefficient", -1, ValueError, "head_coefficient must be a finite number >= 0"),
    ("every_n_steps", 0, ValueError, "every_n_steps must be an int >= 1; got 0"),
    ("every_n_steps", 1.5, ValueError, "every_n_steps must be an int >= 1; got 1.5"),
    ("matmul_precision", "low", ValueError, "matmul_precision must be 'highest' or 'medium'"),
    ("share_limit", math.inf, ValueError, "share_limit must be a finite number > 0, or None"),
]
WRONG_BETWEEN_FITS = [
    ("measure", 0.1, TypeError, "measure must be a measure such as"),
    ("neurons", {"*": "diagonal"}, ValueError, "diagonal"),
    ("sample_above", 0, ValueError, "sample_above must be an int >= 1; got 0"),
]
WRONG_OF_THE_CALLBACK = [
    ("apply", "nonsense", ValueError, "apply must be 'gradient', 'loss' or 'decoupled'"),
    ("prefix", "a/", ValueError, "prefix must be a name such as 'hsu'"),
    ("figures_every_n_steps", 0, ValueError, "figures_every_n_steps must be an int >= 1"),
]


def refuses(owner, name, value, error, message):
    before = getattr(owner, name)
    with pytest.raises(error, match=message):
        setattr(owner, name, value)
    assert getattr(owner, name) == before


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG)
def test_what_is_wrong_is_refused_at_once_and_changes_nothing(name, value, error, message):
    callback = HypersphericalUniformity()
    refuses(callback, name, value, error, message)
    callback.regularizer.attach(network())
    refuses(callback, name, value, error, message)
    refuses(callback.regularizer, name, value, error, message)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), WRONG_BETWEEN_FITS + WRONG_OF_THE_CALLBACK
)
def test_what_is_wrong_between_fits_is_refused_at_once(name, value, error, message):
    refuses(HypersphericalUniformity(), name, value, error, message)


def test_a_pattern_that_matches_no_layer_is_refused():
    regularizer = UniformityRegularizer().attach(network())
    with pytest.raises(ValueError, match=r"coefficient pattern 'net\.7' matches no layer"):
        regularizer.coefficient = {"net.7": 0.1}
    assert {layer.strength for layer in regularizer.layers} == {1.0}


@pytest.mark.parametrize("name", ["coefficient", "head_coefficient"])
def test_a_share_is_refused_where_the_penalty_is_in_the_loss(name):
    callback = HypersphericalUniformity(apply="loss")
    with pytest.raises(ValueError, match="a Share needs the task's gradient"):
        setattr(callback, name, Share(0.1))
    callback.apply = "gradient"
    setattr(callback, name, Share(0.1))
    with pytest.raises(ValueError, match="a Share needs the task's gradient"):
        callback.apply = "loss"
    assert callback.apply == "gradient"


def test_a_mapping_is_changed_by_assigning_another_one():
    given = {"0": 0.5, "*": 1.0}
    regularizer = UniformityRegularizer(coefficient=given).attach(network())
    given["0"] = 7.0
    assert regularizer.coefficient["0"] == 0.5
    with pytest.raises(TypeError, match="does not support item assignment"):
        regularizer.coefficient["0"] = 7.0
    regularizer.coefficient = {**regularizer.coefficient, "0": 7.0}
    assert regularizer.layers[0].strength == 7.0
    for twin in (copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        assert twin.coefficient == {"0": 7.0, "*": 1.0}


def test_a_coefficient_may_be_multiplied():
    callback = HypersphericalUniformity(coefficient=0.5)
    callback.coefficient *= 0.5
    assert callback.coefficient == callback.regularizer.coefficient == 0.25


class NoNeurons(Automatic):
    def __init__(self):
        super().__init__(net=nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36)))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()


def test_a_coefficient_is_refused_in_a_fit_in_which_nothing_is_measured():
    callback = uniformity(coefficient=0)
    fit = trainer(callback, Assigns("coefficient", 0.3), max_epochs=1)
    with (
        pytest.warns(UserWarning, match="no neurons found"),
        pytest.raises(AttributeError, match="nothing is measured in this fit"),
    ):
        fit.fit(NoNeurons(), loader(DATA))
    callback.coefficient = 0.3
    assert callback.coefficient == 0.3


def test_a_coefficient_is_refused_where_no_layer_is_attached():
    with pytest.warns(UserWarning, match="no neurons found"):
        regularizer = UniformityRegularizer(coefficient=0).attach(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="no neurons found"):
        regularizer.coefficient = 0.3
    assert regularizer.only_monitors


def test_a_coefficient_with_which_nothing_trains_is_told():
    net = network().requires_grad_(False)
    regularizer = UniformityRegularizer(coefficient=0).attach(net)
    with pytest.warns(UserWarning, match="no layer with a coefficient trains"):
        regularizer.coefficient = 0.3


def test_a_layer_at_zero_is_told_with_the_coefficient_that_was_assigned_before_the_first_step():
    net = network()
    nn.init.zeros_(net[5].weight)
    regularizer = UniformityRegularizer(coefficient=0).attach(net)
    regularizer.coefficient = 0.3
    mean_square(net(DATA[0][0]), DATA[0][1]).backward()
    with pytest.warns(UserWarning, match="layer '5' .* starts at zero"):
        regularizer.add_gradients(SGD(net.parameters(), lr=0.1))
