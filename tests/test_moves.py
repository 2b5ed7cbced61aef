"""Changes of few neurons of a large layer, and changes of weights that torch does not count."""

import warnings
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lightning_hsu import UniformityRegularizer
from lightning_hsu._engine import deltas, moves
from lightning_hsu._engine.delta import use_of
from lightning_hsu._neurons.placement import Placement
from lightning_hsu.measures import RieszEnergy
from tests.models import batches, mean_square
from tests.rounding import assert_near

TOLERANCE = 0.2  # a new neuron of 512 changes some entries by 6 %, within the tolerance
STEPS = 40


def weight_norm(layer):
    return nn.utils.parametrizations.weight_norm(layer)


class Run:
    """A training with one large layer, whose gradient can be used for many steps.

    Args:
        mode: "gradient", "loss" or "decoupled".
        wrap: What is done to the large layer.
        optimizer: Takes the parameters.
        looks: Whether to look ahead after each step.
    """

    def __init__(self, mode="gradient", wrap=nn.Identity, optimizer=None, looks=False, steps=STEPS):
        torch.manual_seed(0)
        self.mode = mode
        self.looks = looks
        large = nn.Linear(36, 512)
        if wrap is weight_norm:
            large = weight_norm(large)
        self.net = nn.Sequential(nn.Flatten(), large, nn.Tanh(), nn.Linear(512, 3))
        self.optimizer = (optimizer or partial(SGD, lr=1e-3))(self.net.parameters())
        self.regularizer = UniformityRegularizer(
            RieszEnergy(half_space=True), 0.05, tolerance=TOLERANCE
        ).attach(self.net)
        self.data = batches(8)
        self.steps = 0
        for _ in range(steps):
            self.step()

    def step(self, before=None):
        """A step; return whether it computes the large layer."""
        x, y = self.data[self.steps % 8]
        self.optimizer.zero_grad()
        loss = mean_square(self.net(x), y)
        if before is not None:
            before()
        if self.mode == "loss":
            self.regularizer.add_to_loss(loss, self.optimizer)
        loss.backward()
        if self.mode == "loss":
            self.regularizer.count_step(self.optimizer)
        if self.mode == "gradient":
            self.regularizer.add_gradients(self.optimizer)
        self.optimizer.step()
        if self.mode == "decoupled":
            self.regularizer.move(self.optimizer)
        self.steps += 1
        computed = "1" in self.regularizer.state.deltas.computed
        if self.looks:
            self.regularizer.look_ahead(self.optimizer)
        return computed

    @property
    def weight(self):
        """The parameter that holds the rows of the large layer."""
        layer = self.net[1]
        if hasattr(layer, "parametrizations"):
            return layer.parametrizations.weight.original1
        return layer.weight

    @property
    def age(self):
        return self.regularizer.state.deltas._deltas["1"].age


def anew(weight):
    weight[-1] = 0.1 * torch.randn(36)


def pruned(weight):
    weight[7] = 0.0


def swapped(weight):
    weight[[3, 200]] = weight[[200, 3]]


def doubled(weight):
    weight[5] = weight[6] * 1.001


CHANGES = [anew, pruned, swapped, doubled]


def calm(run):
    """Go to a step at which the large layer would not be computed, nor at the next one."""
    for _ in range(60):
        interval = run.regularizer.state.deltas.reuse["1"].interval
        if run.age in (5, 9, 17) and interval > run.age + 2:
            return
        run.step()
    raise AssertionError("the gradient is never used for long")


@pytest.mark.parametrize("mode", ["gradient", "loss", "decoupled"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_one_neuron_is_seen_at_the_next_step(change, mode):
    run = Run(mode)
    calm(run)
    assert not run.step()
    with torch.no_grad():
        change(run.weight)
    assert run.step()


@pytest.mark.parametrize("length", [0.05, 0.2])
def test_so_is_a_change_of_a_short_neuron(length):
    """Whose gradient goes as one over its norm."""
    run = Run(steps=0)
    with torch.no_grad():
        run.weight[7] *= length
    for _ in range(STEPS):
        run.step()
    calm(run)
    assert not run.step()
    with torch.no_grad():
        run.weight[7] = run.weight[7].roll(5)
    assert run.step()


def test_a_layer_in_another_memory_format_is_computed_anew():
    """Its neurons have their entries in another order, and so has a gradient that was kept."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    optimizer = SGD(net.parameters(), lr=1e-5)
    x = torch.randn(4, 3, 3, 3)

    def step(regularizer):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        regularizer.add_gradients(optimizer)
        return "0" in regularizer.state.deltas.computed

    measure = RieszEnergy(half_space=True)
    kept = UniformityRegularizer(measure, 0.05, tolerance=0.9).attach(net)
    for _ in range(9):
        is_computed = step(kept)
        optimizer.step()
    assert not is_computed
    kept.state.deltas.reuse["0"].gain = 0.1  # as of large steps, after which no move looks far
    net.to(memory_format=torch.channels_last)
    assert step(kept)
    found = net[0].weight.grad.clone()
    step(UniformityRegularizer(measure, 0.05).attach(net))
    assert_near(found, net[0].weight.grad)


@pytest.mark.parametrize("wrap", [weight_norm])
def test_so_is_one_of_a_layer_that_is_computed_from_parameters(wrap):
    run = Run(wrap=wrap)
    calm(run)
    assert not run.step()
    with torch.no_grad():
        anew(run.weight)
    assert run.step()


def written(run):
    with torch.no_grad():
        run.weight.add_(0.0)


def swapped_and_back(run):
    """As for an evaluation with averaged weights."""
    kept = run.weight.detach().clone()
    with torch.no_grad():
        run.weight.copy_(kept * 0.9)
        run.weight.copy_(kept)


def elsewhere(run):
    run.weight.data = run.weight.data.clone()


@pytest.mark.parametrize("write", [written, swapped_and_back, elsewhere])
def test_a_write_that_changes_nothing_costs_one_look(write, monkeypatch):
    run = Run()
    calm(run)
    looks = []
    inner = moves.Rows.look

    def noted(self, known):
        looks.extend(use for use, _ in known if use.layer.name == "1")
        return inner(self, known)

    monkeypatch.setattr(moves.Rows, "look", noted)
    assert not run.step()
    assert looks == []
    write(run)
    assert not run.step()
    assert len(looks) == 1


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_torch_does_not_count_is_seen_when_its_turn_comes(change):
    """That is at 8, 16, 32 and so on, or a few steps later, for other layers have turns, too."""
    run = Run()
    calm(run)
    age = run.age
    change(run.weight.data)
    assert not run.step()
    steps = 1
    while not run.step():
        steps += 1
    assert has_turn(age, age + steps)


def has_turn(age, later):
    """Whether a gradient of this age has its next turn at the later one, if a few others have turns."""
    first = 8
    while first <= age:
        first *= 2
    return first <= later <= first + 4


class Renewing(SGD):
    """Makes a neuron anew within a step."""

    due = False

    def step(self, closure=None):
        super().step(closure)
        if self.due:
            self.due = False
            anew(self.param_groups[0]["params"][0].data)


def test_so_is_what_an_optimizer_does_within_its_step():
    run = Run(optimizer=partial(Renewing, lr=1e-3))
    calm(run)
    run.optimizer.due = True
    assert not run.step()
    age, steps = run.age, 0
    while not run.step():
        steps += 1
    assert has_turn(age, age + steps)


def test_neurons_that_move_with_the_others_are_left_alone():
    """In a training of some speed, looks make nothing due that was not."""

    def due(sees):
        run = Run(optimizer=partial(AdamW, lr=3e-3), steps=0)
        blind = mock.patch.object(deltas, "is_another", return_value=False)
        with nullcontext() if sees else blind:
            return [run.step() for _ in range(150)]

    seeing = due(True)
    assert seeing == due(False)
    assert 3 < sum(seeing) < 75


# Changes after the look ahead


def copied(run):
    run.weight.data.copy_(0.1 * torch.randn(512, 36))


def test_on_a_cpu_a_change_after_the_look_ahead_is_seen_at_the_step():
    run = Run(looks=True)
    calm(run)
    copied(run)
    assert run.step()


def settled_on_gpu(monkeypatch):
    monkeypatch.setattr(moves, "reads_late", lambda x: True)
    run = Run(looks=True)
    calm(run)
    return run


def test_on_a_gpu_it_is_seen_a_step_later_and_told_once(monkeypatch):
    run = settled_on_gpu(monkeypatch)
    assert not run.step(partial(copied, run))
    with pytest.warns(UserWarning, match=r"layer '1' \(1, 512, 36\) change .* p\.data") as told:
        assert run.step()
    assert len(told) == 1
    for _ in range(8):
        assert run.step(partial(copied, run))  # from now on at once, and nothing more is told


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_gradient_that_was_computed_ahead_of_such_a_change_is_not_kept(on_gpu, monkeypatch):
    """It would last as long as any, for the weights did not move since."""
    if on_gpu:
        monkeypatch.setattr(moves, "reads_late", lambda x: True)
    run = Run(looks=True)
    calm(run)
    kept = run.regularizer.state.deltas
    while not kept.will_be_due(use_of(run.regularizer.layers[0], run.weight.detach()[None])):
        run.step()
    run.regularizer.look_ahead(run.optimizer)
    assert run.step(partial(copied, run))  # takes what was begun
    with pytest.warns(UserWarning, match=r"layer '1' \(1, 512, 36\) change .* p\.data") as told:
        assert run.step()
    assert len(told) == 1


def test_a_change_that_torch_counts_is_seen_on_a_gpu(monkeypatch):
    run = settled_on_gpu(monkeypatch)
    with torch.no_grad():
        anew(run.weight)
    assert run.step()


def test_weights_that_stay_are_not_told_of(monkeypatch):
    run = settled_on_gpu(monkeypatch)
    with torch.no_grad():
        run.net[3].weight[0, 0] = float("nan")  # it is not equal to itself
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*p.data")
        run.regularizer.look_ahead(run.optimizer)
        run.step()


def test_looking_ahead_computes_the_same_layers(monkeypatch):
    def due(looks):
        run = Run(looks=looks, steps=0)
        return [run.step() for _ in range(80)]

    direct = due(False)
    monkeypatch.setattr(moves, "reads_late", lambda x: True)
    assert due(True) == direct
    assert sum(direct) < 40


def test_ranks_that_train_together_look_at_the_same_steps(monkeypatch):
    """One of them may write alone, as for an evaluation: then only turns count."""
    run = Run()
    calm(run)
    monkeypatch.setattr(Placement, "is_alone", False)
    age = run.age
    with torch.no_grad():
        anew(run.weight)
    steps = 0
    while not run.step():
        steps += 1
    assert has_turn(age, age + steps)
