"""Gradients computed right after a step, for the next one: the same training, bit for bit."""

import copy
import gc
import warnings
import weakref

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_hsu import HypersphericalUniformity, Share, UniformityRegularizer
from lightning_hsu import regularizer as regularizer_module
from lightning_hsu._core import foreach, raw
from lightning_hsu._core.pairwise import too_steep
from lightning_hsu.measures import Covering, GaussianPotential, RieszEnergy
from tests.rounding import assert_near

STEPS = 9


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 300),
        nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Linear(300, 16)),
        nn.Linear(16, 7),
    )


def pictures():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(20, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1, groups=2),
        nn.ConvTranspose2d(16, 24, 1),
        nn.Flatten(),
        nn.Linear(24, 7),
    )
    return nn.Sequential(nn.Unflatten(1, (20, 1, 1)), *layers).to(memory_format=torch.channels_last)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)


def groups(net):
    """Two groups of layers of one shape, with learning rates and limits of their own."""
    parameters = list(net.parameters())
    return torch.optim.AdamW(
        [{"params": parameters[::2], "lr": 0.01}, {"params": parameters[1::2], "lr": 2.0}]
    )


def tensor_rate(net):
    return torch.optim.AdamW(net.parameters(), torch.tensor(0.01))


def nothing(net, step):
    pass


def clipped(net, step):
    with torch.no_grad():
        for p in net.parameters():
            p.clamp_(-0.1, 0.1)


def replaced_storage(net, step):
    if step % 3 == 0:
        for p in net.parameters():
            p.data = p.data.clone().mul_(0.9)


def frozen_in_turns(net, step):
    net[2].weight.requires_grad_(step % 2 == 0)


def replaced(net, step):
    if step == 5:
        net[2].weight = nn.Parameter(net[2].weight.detach() * 0.5)


def train(ahead, make=network, optimizer=sgd, between=nothing, moment="after", **settings):
    """A training; `between` changes the model after a step, before or after looking ahead."""
    net = make()
    steps = optimizer(net)
    settings = {"coefficient": 1e-3} | settings
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(steps, STEPS)
    regularizer = UniformityRegularizer(**settings).attach(net)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        steps.zero_grad()
        net(torch.randn(16, 20, generator=generator)).square().mean().backward()
        regularizer.add_gradients(steps, stats=step == 3)
        steps.step()
        schedule.step()
        if moment == "before":
            between(net, step)
        if ahead:
            regularizer.look_ahead(steps)
        if moment == "after":
            between(net, step)
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.fixture(scope="module")
def trained():
    """Trainings that do not look ahead, by their settings."""
    return {}


@pytest.fixture
def directly(way, trained):
    """A training that does not look ahead, done once: of what moment the model changes is all one to it."""

    def train_directly(**settings):
        settings.pop("moment", None)
        key = (way, *settings.items())
        if key not in trained:
            trained[key] = train(False, **settings)
        return trained[key]

    return train_directly


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


SETTINGS = {
    "default": {},
    "gaussian": {"measure": GaussianPotential()},
    "schedule": {"coefficient": lambda step: 0.1 * step},
    "by layer": {"coefficient": {"0": 0.0, "2": 0.5, "*": 1.0}},
    "share": {"coefficient": {"2": Share(0.1), "*": 1.0}},
    "state": {"measure": Covering()},
    "every second step": {"every_n_steps": 2},
    "step limit": {"coefficient": 1e4, "step_limit": 0.01},
    "tolerance": {"tolerance": 0.05},
    "tolerance and step limit": {"tolerance": 0.05, "coefficient": 1e4, "step_limit": 0.01},
    "medium": {"matmul_precision": "medium"},
}


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def way(request, monkeypatch):
    """How gradients are computed: also as on a GPU, all layers in one pass without waiting."""
    if request.param == "as on a GPU":
        for module in (raw, foreach):
            monkeypatch.setattr(module, "avoids_sync", lambda one, term: not too_steep(term))
    return request.param


@pytest.mark.filterwarnings("ignore:the penalty is too strong")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_that_looks_ahead_is_the_same(name, way):
    ahead, direct = train(True, **SETTINGS[name]), train(False, **SETTINGS[name])
    # There each coefficient is a stack of its own, which may round otherwise.
    if name == "by layer" and way == "as on a CPU":
        for key, weight in direct.items():
            assert_near(ahead[key], weight)
    else:
        assert_same(ahead, direct)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("optimizer", [groups, tensor_rate])
@pytest.mark.parametrize("tolerance", [None, 0.05])
@pytest.mark.filterwarnings("ignore:the penalty is too strong")
def test_rates_of_the_step_itself_count(optimizer, tolerance):
    settings = {"optimizer": optimizer, "tolerance": tolerance, "coefficient": 10.0}
    assert_same(train(True, **settings), train(False, **settings))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_convolutions(tolerance):
    settings = {"make": pictures, "tolerance": tolerance}
    assert_same(train(True, **settings), train(False, **settings))


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("between", [clipped, replaced_storage, frozen_in_turns, replaced])
@pytest.mark.parametrize("tolerance", [None, 0.05])
@pytest.mark.filterwarnings("ignore:.*has new weights", "ignore:the penalty is too strong")
def test_weights_that_change_meanwhile_are_computed_again(between, moment, tolerance, directly):
    settings = {"between": between, "moment": moment, "tolerance": tolerance}
    ahead, direct = train(True, **settings), directly(**settings)
    if between is frozen_in_turns:  # a part of what was computed together is used
        for name, weight in direct.items():
            assert_near(ahead[name], weight, 1e-5)
    else:
        assert_same(ahead, direct)


def count_gradients(monkeypatch):
    """Count the layers of which a gradient is computed."""
    counted = []
    inner = raw.stack_gradient

    def counting(w, term, *scratch):
        counted.append(len(w))
        return inner(w, term, *scratch)

    monkeypatch.setattr(raw, "stack_gradient", counting)
    monkeypatch.setattr("lightning_hsu._core.foreach.stack_gradient", counting)
    return counted


def test_nothing_is_computed_twice(monkeypatch):
    counted = count_gradients(monkeypatch)
    train(True)
    # The first step is computed when it comes, and what follows the last is not used.
    assert sum(counted) == (STEPS + 1) * 5


def test_what_is_ahead_is_ready_before_the_step(monkeypatch):
    net = network()
    steps = sgd(net)
    regularizer = UniformityRegularizer().attach(net)
    net(torch.randn(4, 20)).square().mean().backward()
    regularizer.add_gradients(steps)
    steps.step()
    regularizer.look_ahead(steps)
    counted = count_gradients(monkeypatch)
    regularizer.add_gradients(steps)
    assert counted == []


def test_weights_changed_unseen_are_told_of_and_left_out():
    def unseen(net, step):
        for p in net.parameters():
            p.data.clamp_(-0.1, 0.1)

    with pytest.warns(UserWarning, match=r"layer '\d' \(1, \d+, \d+\), .* p\.data") as told:
        ahead = train(True, between=unseen)
    assert len(told) == 1
    direct = train(False, between=unseen)
    for name in ahead:  # one step had the gradient of the weights before
        torch.testing.assert_close(ahead[name], direct[name], rtol=0.0, atol=1e-3)


def test_unseen_changes_are_told_of_beside_a_layer_without_a_gradient(monkeypatch):
    """On a GPU both are in one stack."""
    for module in (raw, foreach):
        monkeypatch.setattr(module, "avoids_sync", lambda one, term: not too_steep(term))
    net = nn.ModuleDict({"used": nn.Linear(20, 32), "spare": nn.Linear(20, 32)})
    steps = sgd(net)
    regularizer = UniformityRegularizer(head=None).attach(net)

    def run(count):
        for _ in range(count):
            steps.zero_grad()
            net["used"](torch.randn(4, 20)).square().mean().backward()
            regularizer.add_gradients(steps)
            steps.step()
            regularizer.look_ahead(steps)
            net["used"].weight.data.mul_(0.5)

    run(2)
    with pytest.warns(UserWarning, match=r"layer 'used' \(1, 32, 20\) change .* p\.data") as told:
        run(1)
    assert len(told) == 1
    assert regularizer._attached.ahead.outdated == {regularizer.layers[0]}


def test_unseen_changes_of_one_step_matter_in_one_step_only():
    """From the second look on the layer is computed just before the step."""
    net = network()
    steps = sgd(net)
    regularizer = UniformityRegularizer(coefficient=1.0).attach(net)

    def run():
        for _ in range(4):
            steps.zero_grad()
            net(torch.randn(4, 20)).square().mean().backward()
            before = net[2].weight.grad.clone()
            regularizer.add_gradients(steps)
            added = net[2].weight.grad - before
            expected = RieszEnergy().value_and_grad(net[2].weight.detach())[1]
            steps.step()
            regularizer.look_ahead(steps)
            net[2].weight.data.mul_(0.5)
        return added, expected

    with pytest.warns(UserWarning, match=r"p\.data"):
        added, expected = run()
    assert_near(added, expected, 1e-4)


def test_an_optimizer_that_was_met_looks_ahead_by_itself_after_its_steps():
    net = network()
    steps = sgd(net)
    regularizer = UniformityRegularizer().attach(net)
    net(torch.randn(4, 20)).square().mean().backward()
    regularizer.add_gradients(steps)
    regularizer._hook(steps, None)  # as on a GPU
    steps.step()
    begun = regularizer._attached.ahead.begun
    assert sorted(layer.name for one in begun for layer in one.layers) == ["0", "2", "4", "6", "9"]
    regularizer.detach()
    steps.step()
    assert not regularizer.is_attached


def test_the_hook_keeps_neither_the_regularizer_nor_the_model():
    net = network()
    steps = sgd(net)
    regularizer = UniformityRegularizer().attach(net)
    regularizer._hook(steps, None)
    known = weakref.ref(regularizer)
    del regularizer
    gc.collect()
    assert known() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(4, 20)).square().mean().backward()
        steps.step()


def test_copies_have_nothing_begun():
    net = network()
    steps = sgd(net)
    regularizer = UniformityRegularizer(tolerance=0.05).attach(net)
    net(torch.randn(4, 20)).square().mean().backward()
    regularizer.add_gradients(steps)
    regularizer.look_ahead(steps)
    twin = copy.deepcopy(regularizer)
    assert not twin.is_attached
    assert twin.attach(network()).layers


def test_two_optimizers_have_each_their_own_layers(monkeypatch):
    def run(ahead):
        net = network()
        first = torch.optim.SGD(net[:4].parameters(), 0.1)
        second = torch.optim.AdamW(net[4:].parameters(), 0.01)
        regularizer = UniformityRegularizer(coefficient=1e-3).attach(net)
        generator = torch.Generator().manual_seed(1)
        for _ in range(8):
            for steps in (first, second):
                net.zero_grad()
                net(torch.randn(16, 20, generator=generator)).square().mean().backward()
                regularizer.add_gradients(steps)
                steps.step()
                if ahead:
                    regularizer.look_ahead(steps)
        return {name: p.detach().clone() for name, p in net.named_parameters()}

    direct = run(False)
    counted = count_gradients(monkeypatch)
    assert_same(run(True), direct)
    assert sum(counted) == (8 + 1) * 5


def fit(*callbacks, steps=6):
    """Train for some steps, as on a GPU as far as the moments go."""
    torch.manual_seed(0)
    data = torch.utils.data.DataLoader(torch.randn(8 * steps, 20), batch_size=8)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(Lit(), data)


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return sgd(self)


@pytest.fixture
def looks_ahead(monkeypatch):
    monkeypatch.setattr(UniformityRegularizer, "looks_ahead", property(lambda self: True))


def ours(apply, prefix="hsu"):
    return HypersphericalUniformity(coefficient=1e-3, apply=apply, prefix=prefix, verbose=False)


@pytest.mark.usefixtures("looks_ahead")
def test_the_callback_looks_ahead_after_each_step_and_computes_nothing_twice(monkeypatch):
    counted = count_gradients(monkeypatch)
    fit(ours("gradient"))
    assert sum(counted) == (6 + 1) * 5


@pytest.mark.usefixtures("looks_ahead")
def test_moves_are_computed_when_they_come(monkeypatch):
    """Nothing can be known of them before the optimizer's step."""
    counted = count_gradients(monkeypatch)
    fit(ours("decoupled"))
    assert sum(counted) == 6 * 5


@pytest.mark.usefixtures("looks_ahead")
@pytest.mark.filterwarnings("ignore:.*add up")
def test_no_hook_is_made_while_the_hooks_of_a_step_run():
    """Python refuses that, for a hook that others follow."""
    fit(ours("decoupled", "first"), ours("decoupled", "second"))


@pytest.mark.usefixtures("looks_ahead")
def test_an_optimizer_that_is_replaced_in_an_own_loop_is_let_go():
    net = network()
    regularizer = UniformityRegularizer().attach(net)
    known = []
    for _ in range(3):
        steps = sgd(net)
        known.append(weakref.ref(steps))
        net(torch.randn(4, 20)).square().mean().backward()
        regularizer.add_gradients(steps)
        steps.step()
    del steps
    gc.collect()
    assert [one() for one in known] == [None] * 3


@pytest.mark.usefixtures("looks_ahead")
@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_a_new_optimizer_takes_the_count_of_one_that_is_gone(tolerance):
    """At once, without a garbage collection."""
    net = network()
    seen = []

    def schedule(step):
        seen.append(step)
        return 0.1

    regularizer = UniformityRegularizer(
        coefficient={"0": schedule, "*": 0.0}, tolerance=tolerance
    ).attach(net)
    gc.disable()
    try:
        for _ in range(3):
            steps = sgd(net)
            for _ in range(2):
                steps.zero_grad()
                net(torch.randn(4, 20)).square().mean().backward()
                regularizer.add_gradients(steps)
                steps.step()
    finally:
        gc.enable()
    assert seen == [0, 1, 2, 3, 4, 5]
    assert regularizer.state.counter.done == [6]


@pytest.mark.parametrize("captures", [True, False])
def test_nothing_is_begun_while_a_cuda_graph_is_captured(captures, monkeypatch):
    net = network()
    regularizer = UniformityRegularizer(tolerance=0.05).attach(net)
    looked = []
    monkeypatch.setattr(regularizer_module, "look_for_moves", lambda *args: looked.append(args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    regularizer.look_ahead(sgd(net))
    regularizer.look_for_moves()
    assert bool(regularizer._attached.ahead.begun) != captures
    assert bool(looked) != captures
