"""Optimizers of any make: without ``Optimizer.__init__``, late, with odd learning rates, stepping in backward."""

import copy
import pickle
import warnings
from collections import defaultdict
from dataclasses import replace
from functools import partial
from types import MethodType

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from lightning_hsu import Share, UniformityRegularizer, regularizer
from lightning_hsu._core.updates import GradientUpdate, StackGradient, add_to_layers
from lightning_hsu._engine.plan import learning_rates, limit_of_gradient
from lightning_hsu._engine.rates import Rates, largest
from tests import models, plain
from tests.models import (
    Automatic,
    Manual,
    StepsThroughItsParent,
    batches,
    loader,
    mean_square,
    network,
    trainer,
    uniformity,
)
from tests.plain import RESCALING
from tests.rounding import assert_near
from tests.test_exactness import (
    Situation,
    fit_plainly,
    fit_with_lightning,
    in_closure,
    max_difference,
    steady,
)

MODES = ["gradient", "loss", "decoupled"]
SGD([nn.Parameter(torch.zeros(1))])  # torch wraps the step of a class at its first instance
TOLERANCE = 1e-6  # measured: at most 3e-7


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another that never calls ``Optimizer.__init__``, as many are written."""

    def __init__(self, inner):
        self.inner = inner

    @property
    def param_groups(self):
        return self.inner.param_groups

    @property
    def defaults(self):
        return self.inner.defaults

    @property
    def state(self):
        return self.inner.state

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.inner.step(closure)


class Lookahead(Wrapper):
    """Every second step the weights go half the way back to where they were after the last."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(SGD(parameters, lr=lr, momentum=0.9))
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class SharpnessAwareWrapper(Wrapper):
    """Steps with the gradient of a place uphill: the closure runs twice, the weights move in between."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(SGD(parameters, lr=lr))

    @torch.no_grad()
    def step(self, closure):
        loss = torch.enable_grad()(closure)()
        parameters = self.param_groups[0]["params"]
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(p.grad, alpha=0.05)
        torch.enable_grad()(closure)()
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
        self.inner.step()
        return loss


class Descent:
    """No torch optimizer at all, but all that Lightning asks of one."""

    def __init__(self, parameters, lr=0.1):
        self.param_groups = [{"params": list(parameters), "lr": lr}]
        self.defaults = {"lr": lr}
        self.state = defaultdict(dict)

    def step(self, closure=None):
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.add_(p.grad, alpha=-group["lr"])
        return loss

    def zero_grad(self, set_to_none=True):
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Slotted(Descent):
    """One whose ``step`` cannot be replaced on the instance."""

    __slots__ = ()

    def __setattr__(self, name, value):
        if name == "step":
            raise AttributeError(name)
        super().__setattr__(name, value)


class ManualClosure(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer = optimizer[0] if isinstance(optimizer, list) else optimizer

        def closure():
            optimizer.zero_grad()
            loss = mean_square(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class ManualList(Manual):
    """Lightning gives a list if the only optimizer is none of torch's."""

    def optimizers(self, use_pl_optimizer=True):
        found = super().optimizers(use_pl_optimizer)
        if isinstance(found, list) and len(found) == 1:
            return found[0]
        return found


def situations():
    """Each kind in automatic and manual optimisation, with and without a GradScaler."""
    for make in (Lookahead, Descent, StepsThroughItsParent):
        optimizer = partial(make, lr=0.1)
        for module in (Automatic, ManualList):
            for scaled in (False, True):
                name = f"{make.__name__}-{module.__name__}-{'scaler' if scaled else 'fp32'}"
                settings = steady if scaled else {}
                yield Situation(None, name, module=module, optimizer=optimizer, **settings)
    for module in (Automatic, ManualClosure):
        name = f"SAM-{module.__name__}"
        yield Situation(None, name, module=module, optimizer=SharpnessAwareWrapper, **in_closure)


def cases():
    for row in situations():
        for mode in MODES:
            if mode != "loss" or row.module is Automatic:
                yield pytest.param(row, mode, id=f"{row.name}-{mode}")


@pytest.mark.parametrize(("row", "mode"), [*cases()])
def test_any_optimizer_trains_as_in_a_plain_loop(row, mode):
    module = row.module(make_optimizer=row.optimizer)
    twin, without = copy.deepcopy(module), copy.deepcopy(module)
    data = batches(3)
    fit_with_lightning(row, mode, module, data)
    fit_plainly(row, mode, twin, data)
    fit_plainly(row, "none", without, data)
    assert max_difference(twin, module) < row.tolerance
    assert max_difference(without, twin) > 10 * row.tolerance


@pytest.mark.parametrize("make", [Lookahead, Descent, Slotted, SharpnessAwareWrapper, SGD])
@pytest.mark.parametrize("apply", ["gradient", "decoupled"])
def test_a_monitor_leaves_any_optimizer_alone(make, apply):
    module = Automatic(partial(make, lr=0.1))
    twin, seen = copy.deepcopy(module), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.extend(map(is_hooked, trainer.optimizers))

    trainer(uniformity(coefficient=0, apply=apply), Look(), max_epochs=1).fit(
        module, loader(batches())
    )
    trainer(max_epochs=1).fit(twin, loader(batches()))
    assert max_difference(module, twin) == 0
    assert set(seen) == {False}


def test_a_step_that_cannot_be_replaced_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="Slotted runs none of torch's hooks"):
        trainer(uniformity()).fit(Automatic(Slotted), loader(batches()))


def is_hooked(optimizer):
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    return "step" in vars(optimizer) or bool(hooks)


class Keep(pl.Callback):
    """Keep the trainer's optimizers of the first batch, and do something with them."""

    def __init__(self, act=lambda optimizer: None):
        self.act = act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            (self.optimizer,) = trainer.optimizers
            self.made = self.act(self.optimizer)


def test_a_replaced_step_goes_without_a_trace():
    """A copy that is made in the middle of the fit steps its own weights, which is no step of ours."""

    def check(copied, optimizer):
        p, ours = (one.param_groups[0]["params"][0] for one in (copied, optimizer))
        before, kept = p.detach().clone(), ours.detach().clone()
        p.grad = torch.ones_like(p)
        copied.step()
        assert not torch.equal(p, before)
        assert torch.equal(ours, kept)

    keep = Keep(lambda one: check(copy.deepcopy(one), one))
    pickled = Keep(lambda one: check(pickle.loads(pickle.dumps(one)), one))
    callback = uniformity(apply="decoupled")
    trainer(callback, keep, pickled, max_epochs=1).fit(Automatic(Descent), loader(batches()))
    assert callback.state_dict()["steps"] == [7]
    assert "step" not in vars(keep.optimizer)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_what_others_wrapped_further_stays_and_ours_is_inert():
    keep = Keep(lambda optimizer: StepLR(optimizer, 1))
    module = Automatic(Lookahead)
    callback = uniformity(apply="decoupled")
    trainer(callback, keep, max_epochs=1).fit(module, loader(batches()))
    assert callback.state_dict()["steps"] == [7]
    assert keep.optimizer.step._wrapped_by_lr_sched
    count = keep.optimizer.count
    keep.optimizer.step()
    assert keep.optimizer.count == count + 1
    assert callback.state_dict()["steps"] == [7]


class FailingEnd(pl.Callback):
    def on_exception(self, trainer, pl_module, exception):
        raise StopIteration


class Failing(Automatic):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            raise ValueError
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("make", [SGD, StepsThroughItsParent, Lookahead, Descent])
def test_hooks_that_no_end_took_off_are_inert_and_go_at_the_next_step(make):
    """Another callback fails in its own on_exception, and Lightning calls no further."""
    keep, module, callback = Keep(), Failing(partial(make, lr=0.1)), uniformity(apply="decoupled")
    with pytest.raises(StopIteration):
        trainer(keep, FailingEnd(), callback).fit(module, loader(batches()))
    steps = callback.regularizer.state_dict()
    keep.optimizer.zero_grad()
    before = copy.deepcopy(module.state_dict())
    keep.optimizer.step()
    if make is not Lookahead:
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])
    assert callback.regularizer.state_dict() == steps
    assert not is_hooked(keep.optimizer)


class Replace(pl.Callback):
    """At one hook of the third batch, all optimizers are replaced."""

    def __init__(self, hook, by_setup):
        self.by_setup = by_setup
        self.old, self.batch = [], 0
        setattr(self, hook, self.replace)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pass

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.batch += 1
        if self.batch == 5:
            assert not any(map(is_hooked, self.old))

    def replace(self, trainer, pl_module, *_):
        if self.batch != 2 or self.old:
            return
        self.old = list(trainer.optimizers)
        if self.by_setup:
            trainer.strategy.setup_optimizers(trainer)
        else:
            trainer.strategy.optimizers = [pl_module.configure_optimizers()]


AUTOMATIC = [
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
]
MANUAL = ["on_train_batch_start", "on_before_backward", "training_step"]
MAKERS = [StepsThroughItsParent, Wrapper, Descent]


def replaced_cases():
    for module, hooks in ((Automatic, AUTOMATIC), (ManualList, MANUAL)):
        for i, hook in enumerate(hooks):
            for j, make in enumerate(MAKERS):
                for before in (True, False):
                    yield (
                        module,
                        hook,
                        make,
                        ["gradient", "decoupled"][(i + j + before) % 2],
                        before,
                    )


def made_by(make, parameters):
    return Wrapper(SGD(parameters, lr=0.1)) if make is Wrapper else make(parameters, lr=0.1)


@pytest.mark.parametrize(("kind", "hook", "make", "mode", "before"), [*replaced_cases()])
def test_a_replaced_optimizer_goes_on_from_its_first_step(kind, hook, make, mode, before):
    """It steps like the one before and has no state, so that all is as if nothing had happened."""
    module = kind(make_optimizer=partial(made_by, make))
    twin, data = copy.deepcopy(module), batches()
    replace = Replace(hook, by_setup=before)
    callback = uniformity(coefficient=rising, apply=mode)
    if hook == "training_step":
        step = module.training_step
        module.training_step = lambda *args: [replace.replace(module.trainer, module), step(*args)][
            1
        ]
    chain = [replace, callback] if before else [callback, replace]
    trainer(*chain, max_epochs=1).fit(module, loader(data))
    penalty = plain.Penalty(plain.layers(twin.net), mode, lambda step, layer: rising(step))
    plain.train(twin, data, penalty, epochs=1)
    assert max_difference(twin, module) < TOLERANCE
    assert callback.state_dict()["steps"] == [7]
    assert replace.old


def rising(step):
    return 0.1 * (step + 1)


@pytest.mark.parametrize("mode", ["gradient", "decoupled"])
def test_an_optimizer_added_under_way_counts_for_itself(mode):
    class Adding(ManualList):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                more = SGD(self.net[5:].parameters(), lr=0.1)
                self.trainer.strategy.optimizers = [*self.trainer.optimizers, more]
            optimizers = self.trainer.strategy._lightning_optimizers
            self.zero_grad()
            self.manual_backward(mean_square(self.net(batch[0]), batch[1]))
            for optimizer in optimizers:
                optimizer.step()

    module = Adding(make_optimizer=lambda _: SGD(module.net[:5].parameters(), lr=0.1))
    callback = uniformity(coefficient=0.1, apply=mode)
    trainer(callback, max_epochs=1).fit(module, loader(batches()))
    assert callback.state_dict()["steps"] == [7, 5]


def test_the_hook_of_an_optimizer_without_a_place_is_made_at_its_step():
    """One that Lightning has wrapped, and the Trainer's list does not have."""
    from lightning.pytorch.core.optimizer import LightningOptimizer

    class Own(Manual):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                self.own = LightningOptimizer(SGD(self.parameters(), lr=0.1))
                self.own._strategy = self.trainer.strategy
            self.own.zero_grad()
            self.manual_backward(mean_square(self.net(batch[0]), batch[1]))
            self.own.step()

    callback = uniformity(coefficient=0.1, apply="decoupled")
    module = Own()
    trainer(callback, max_epochs=1).fit(module, loader(batches()))
    assert callback.state_dict()["steps"] == [0, 7]  # a count of its own
    assert not module.own.optimizer._optimizer_step_post_hooks


# Learning rates


class Relative(SGD):
    """Its steps have a length of their own, and the groups no learning rate."""

    def __init__(self, parameters, lr=None, how="none"):
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            if how == "missing":
                del group["lr"]
            else:
                group["lr"] = {"none": None, "word": "auto", "many": torch.ones(2)}[how]

    def step(self, closure=None):
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad, alpha=-0.1)
        return loss


HOW = ["none", "missing", "word", "many"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mode", ["gradient", "loss"])
def test_without_a_learning_rate_there_is_no_step_limit(how, mode):
    module = Automatic(partial(Relative, how=how))
    twin, data = Automatic(partial(SGD, lr=0.1), net=copy.deepcopy(module.net)), batches()
    row = Situation(None, "", callback={"step_limit": 0.01})
    fit_with_lightning(row, mode, module, data)
    fit_plainly(replace(row, callback={"step_limit": None}), mode, twin, data)
    assert max_difference(twin, module) < TOLERANCE


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("strength", [0.1, Share(0.1), {"net.0": 0.1, "*": 0.0}], ids=str)
def test_without_a_learning_rate_decoupled_is_refused(how, strength):
    module = Automatic(partial(Relative, how=how))
    with pytest.raises(
        NotImplementedError, match=r"Relative has no learning rate for layer 'net\.0'"
    ):
        trainer(uniformity(coefficient=strength, apply="decoupled")).fit(module, loader(batches()))
    for coefficient in (0, {"net.0": 0.0, "*": 0.0}):
        callback = uniformity(coefficient=coefficient, apply="decoupled")
        trainer(callback, max_epochs=1).fit(module, loader(batches()))


def with_gradients(net, **kwargs):
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    return SGD(net.parameters(), **kwargs)


def mixed_network():
    """Plain layers of two shapes, one of them crowded, and one that is computed from parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 6), nn.Linear(6, 6), weight_norm(nn.Linear(6, 5)), nn.Linear(5, 3)
    )
    with torch.no_grad():
        net[0].weight[1] = net[0].weight[0] * 1.001
        net[1].weight[2] *= 1e-3
    return net


def in_steps(act, change=lambda rates: rates, **kwargs):
    """Parameters and gradients after one act with these learning rates."""
    net = mixed_network()
    ours = UniformityRegularizer(coefficient=3.0, step_limit=0.5).attach(net)
    optimizer = with_gradients(net, **kwargs)
    if act == "loss":
        loss = torch.zeros((), requires_grad=True) * 1.0
        ours.add_to_loss(loss, optimizer)
        loss.backward()
    else:
        with torch.no_grad():
            torch._foreach_mul_(list(net.parameters()), 1.01)  # a step
        getattr(ours, act)(optimizer)
    values = [p.detach().clone() for p in net.parameters()]
    return values + [p.grad for p in net.parameters()]


@pytest.mark.parametrize("act", ["add_gradients", "move", "loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rates_in_tensors_are_those_numbers(act, dtype, monkeypatch):
    """Read on the CPU; kept as tensors on a device, whose arithmetic is tried here on the CPU, too."""
    rate = float(torch.tensor(0.3, dtype=dtype))
    expected = in_steps(act, lr=rate)
    read = in_steps(act, lr=torch.tensor(rate, dtype=dtype))
    assert all(map(torch.equal, expected, read))

    def tensors(optimizer):
        rates = learning_rates(optimizer)
        for key, value in rates.items():
            rates[key] = torch.tensor(value, dtype=torch.float64)
        return rates

    monkeypatch.setattr(regularizer, "learning_rates", tensors)
    kept = in_steps(act, lr=rate)
    for a, b in zip(expected, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # measured: 0
    unlimited = in_steps(act, lr=1e-9)
    assert act == "move" or not all(
        torch.allclose(a, b) for a, b in zip(expected, unlimited, strict=True)
    )


def test_a_rate_on_a_device_is_not_asked_for():
    """On the device "meta" every question is an error."""
    layers = [nn.Linear(6, 5, device="meta") for _ in range(2)]
    groups = [
        {"params": layers[0].parameters(), "lr": torch.empty((), device="meta")},
        {"params": layers[1].parameters(), "lr": torch.empty(1, device="meta")},
    ]
    rates = learning_rates(SGD(groups))
    w = layers[0].weight
    rate = rates[id(w)]
    assert isinstance(rate, torch.Tensor)
    assert rate.shape == largest([0.1, *rates.values()]).shape == ()
    update = GradientUpdate(w[None], torch.empty_like(w)[None], 0.5, limit_of_gradient(1.0, rate))
    grad = torch.empty(2, 5, 6, device="meta")
    norm = torch.empty(2, 5, 1, device="meta")
    add_to_layers([update, update], StackGradient(grad, norm, norm, may_overflow=True))
    with pytest.raises(Exception, match="meta"):
        float(rate)


def test_a_rate_of_zero_on_a_device_is_no_limit():
    zero = limit_of_gradient(1.0, torch.zeros((), dtype=torch.float64))
    w, out = torch.randn(1, 5, 4), torch.zeros(1, 5, 4)
    w[0, 0] = 0.0
    grad = torch.randn(1, 5, 4)
    grad[0, 0] = 0.0
    found = StackGradient(grad.clone(), None, w.norm(dim=-1, keepdim=True))
    add_to_layers([GradientUpdate(w, out, 0.5, zero)], found)
    torch.testing.assert_close(out, 0.5 * grad)


def test_the_largest_of_several_rates():
    assert largest([0.1, 0.3]) == 0.3
    assert largest([0.1, torch.tensor(0.3), torch.tensor(0.2)]) == torch.tensor(0.3)
    assert largest([0.4, torch.tensor(0.3)]) == torch.tensor(0.4)
    assert torch.tensor(largest([0.4, float("nan"), torch.tensor(0.3)])).isnan()
    assert isinstance(learning_rates(SGD([nn.Parameter(torch.ones(1))], lr=1)), Rates)


# What it makes of a gradient

LEAVE_LENGTHS = {"SGD", "ASGD", "LBFGS"}
OTHERS = {"Optimizer", "SparseAdam"}  # the latter takes sparse gradients alone


def optimizers_of_torch():
    """Names of those that take dense gradients; early releases have not all."""
    found = set()
    for name, one in vars(torch.optim).items():
        if isinstance(one, type) and issubclass(one, torch.optim.Optimizer):
            found.add(name)
    return sorted(found - OTHERS)


@pytest.mark.parametrize("name", optimizers_of_torch())
def test_it_is_known_which_optimizers_rescale_gradients(name):
    assert name in RESCALING | LEAVE_LENGTHS
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = getattr(torch.optim, name)([p], lr=0.1)
    for _ in range(2):
        assert bool(learning_rates(optimizer).rescaled) == (name in RESCALING)
        p.grad = torch.ones_like(p)
        optimizer.step(lambda: p.sum())


def test_momentum_and_the_radius_of_a_search_rescale_nothing():
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = SGD([p], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["rho"] = 0.05  # as sharpness-aware minimisation has it
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert not learning_rates(optimizer).rescaled


# Which way the optimizer goes


class Negated(Automatic):
    def training_step(self, batch, batch_idx):
        return -super().training_step(batch, batch_idx)


class NegatedManual(Manual):
    def manual_backward(self, loss):
        super().manual_backward(-loss)


def upwards(make, parameters, **kwargs):
    return make(parameters, maximize=True, **kwargs)


def backwards(parameters, lr):
    """Descent with a negative learning rate."""
    optimizer = SGD(parameters, lr=lr)
    optimizer.param_groups[0]["lr"] = -lr
    return optimizer


UPWARDS = {
    "SGD": (partial(upwards, SGD, lr=0.1), partial(SGD, lr=0.1)),
    "fused": (
        partial(upwards, Adam, lr=0.01, eps=1e-3, fused=True),
        partial(Adam, lr=0.01, eps=1e-3),
    ),
    "foreach": (partial(upwards, SGD, lr=0.1, foreach=True), partial(SGD, lr=0.1)),
    "negative": (partial(backwards, lr=0.1), partial(SGD, lr=0.1)),
}


def upward_cases():
    for mode in MODES:
        for settings in ({}, steady):
            for kind in (Negated, NegatedManual) if mode != "loss" else (Negated,):
                names = ["SGD"] if kind is NegatedManual else UPWARDS
                for name in names:
                    scaled = "scaler" if settings else "fp32"
                    case = f"{name}-{mode}-{kind.__name__}-{scaled}"
                    yield pytest.param(name, mode, kind, settings, id=case)


@pytest.mark.parametrize(("name", "mode", "kind", "settings"), [*upward_cases()])
def test_neurons_spread_where_the_loss_is_maximized(name, mode, kind, settings):
    """To maximize the negative loss is to minimize the loss, and the penalty with it."""
    up, down = UPWARDS[name]
    row = Situation(None, name, optimizer=down, **settings)
    module = kind(make_optimizer=up)
    twin, without = (Automatic(down, net=copy.deepcopy(module.net)) for _ in range(2))
    data = batches(3)
    fit_with_lightning(row, mode, module, data)
    fit_plainly(row, mode, twin, data)
    fit_plainly(row, "none", without, data)
    assert max_difference(twin, module) < row.tolerance
    assert max_difference(without, twin) > 10 * row.tolerance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [None, 0.02])
def test_each_group_goes_its_own_way(mode, limit):
    def two_ways(net):
        parts = net[:5].parameters(), net[5:].parameters()
        return SGD([{"params": parts[0]}, {"params": parts[1], "maximize": True}], lr=0.1)

    module = Automatic(net=network())
    module.make_optimizer = lambda _: two_ways(module.net)
    twin = copy.deepcopy(module.net)
    data = batches()
    callback = uniformity(coefficient=0.5, apply=mode, step_limit=limit)
    trainer(callback, max_epochs=1).fit(module, loader(data))
    penalty = plain.Penalty(
        plain.layers(twin), "gradient" if mode == "loss" else mode, lambda *_: 0.5
    )
    optimizer = SGD(twin.parameters(), lr=0.1)
    for x, y in data:
        optimizer.zero_grad()
        mean_square(twin(x), y).backward()
        for p in twin[5:].parameters():
            p.grad.neg_()
        if limit is None:
            penalty.before_step(optimizer)
        optimizer.step()
        penalty.after_step(optimizer)
    difference = max_difference(twin, module.net)
    assert difference < TOLERANCE if limit is None else difference > 10 * TOLERANCE


def test_a_term_of_a_loss_cannot_go_two_ways():
    net = nn.Sequential(nn.Linear(6, 5), weight_norm(nn.Linear(5, 4)), nn.Linear(4, 3))
    first, second = net[1].parametrizations.weight.parameters()
    optimizer = SGD([{"params": [first]}, {"params": [second], "maximize": True}], lr=0.1)
    ours = UniformityRegularizer().attach(net)
    with pytest.raises(NotImplementedError, match=r"layer '1' are in a group with maximize=True"):
        ours.add_to_loss(torch.zeros(()), optimizer)


# Several optimizers, and those that step in backward


def test_weights_of_several_optimizers_are_told_once():
    class Two(ManualList):
        def configure_optimizers(self):
            return [SGD(self.parameters(), lr=0.1), Adam(self.net[5:].parameters(), lr=0.01)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(mean_square(self.net(batch[0]), batch[1]))
                optimizer.step()

    for settings in ({}, {"head": "net.7"}):
        with pytest.warns(UserWarning, match="several optimizers") as caught:
            trainer(uniformity(**settings)).fit(Two(), loader(batches()))
        told = [str(one.message) for one in caught if "several optimizers" in str(one.message)]
        assert len(told) == 1
        assert "in layer 'net.5': SGD, Adam; 'net.7': SGD, Adam. If" in told[0]
    trainer(uniformity(coefficient=0)).fit(Two(), loader(batches()))
    trainer(uniformity(exclude=["net.5", "net.7"], head=None)).fit(Two(), loader(batches()))


def torch_in_backward(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its import
        from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(SGD, list(module.parameters()), {"lr": 0.1})


def by_hand_in_backward(module):
    for p in module.parameters():
        optimizer = SGD([p], lr=0.1)

        def step(p, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)


class InBackward(Automatic):
    """With no optimizer for Lightning, or one of a parameter that nothing uses."""

    def __init__(self, apply_in_backward, dummy):
        super().__init__()
        apply_in_backward(self)
        self.dummy = [nn.Parameter(torch.zeros(1))] if dummy else None

    def configure_optimizers(self):
        return SGD(self.dummy, lr=0.1) if self.dummy else None


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.*")
@pytest.mark.parametrize("dummy", [False, True])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("apply_in_backward", [torch_in_backward, by_hand_in_backward])
def test_the_loss_reaches_optimizers_that_step_in_backward(apply_in_backward, settings, dummy):
    module = InBackward(apply_in_backward, dummy)
    twin, data = copy.deepcopy(module.net), batches()
    callback = uniformity(coefficient=0.5, apply="loss")
    trainer(callback, max_epochs=1, **settings).fit(module, loader(data))
    optimizer = SGD(twin.parameters(), lr=0.1)
    share = 1 / settings.get("accumulate_grad_batches", 1)
    for x, y in data:
        energies = []
        for layer in plain.layers(twin):
            energies.append(0.5 * plain.energy(layer.measure, layer.neurons()).mean())
        optimizer.zero_grad()
        (share * (mean_square(twin(x), y) + sum(energies))).backward()
        optimizer.step()
    assert max_difference(twin, module.net) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.*")
@pytest.mark.parametrize("apply", ["gradient", "decoupled"])
@pytest.mark.parametrize("apply_in_backward", [torch_in_backward, by_hand_in_backward])
def test_where_steps_are_in_backward_the_way_out_is_the_loss(apply_in_backward, apply):
    with pytest.warns(
        UserWarning, match=r"layer 'net.0'.* backward pass. Use apply='loss'"
    ) as caught:
        trainer(uniformity(apply=apply)).fit(
            InBackward(apply_in_backward, False), loader(batches())
        )
    assert sum("has not reached" in str(one.message) for one in caught) == 1


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.*")
def test_rates_and_ways_of_optimizers_in_backward_are_known():
    """The step limit, and the sign where they maximize."""
    module = InBackward(lambda one: None, False)
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    p = module.net[7].weight
    p._in_backward_optimizers = [SGD([p], lr=1e6, maximize=True)]
    ours = UniformityRegularizer(coefficient=1.0, head=None, include="7").attach(module.net)
    loss = torch.zeros((), requires_grad=True) * 1.0
    ours.add_to_loss(loss, optimizer)
    loss.backward()
    (expected,) = torch.autograd.grad(ours.penalty(), p)
    assert float((p.grad * expected).sum()) < 0
    moves = p.grad.norm(dim=1) * 1e6
    assert float((moves / p.detach().norm(dim=1)).max()) == pytest.approx(1.0)


# Moves that the next step undoes


class ScheduleFree(SGD):
    """Keeps another iterate, from which it computes the weights."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                z.sub_(p.grad, alpha=group["lr"])
                p.lerp_(z, 0.5)
        return loss


def test_a_move_that_the_next_step_undoes_is_told_once():
    callback = uniformity(apply="decoupled", exclude="net.0")
    with pytest.warns(
        UserWarning, match=r"ScheduleFree .* of layer 'net.2', .*apply='gradient'"
    ) as caught:
        trainer(callback).fit(Automatic(partial(ScheduleFree, lr=0.1)), loader(batches()))
    assert sum("ScheduleFree" in str(one.message) for one in caught) == 1
    trainer(uniformity(), max_epochs=1).fit(
        Automatic(partial(ScheduleFree, lr=0.1)), loader(batches())
    )
    trainer(uniformity(coefficient=0, apply="decoupled"), max_epochs=1).fit(
        Automatic(partial(ScheduleFree, lr=0.1)), loader(batches())
    )


# In one's own loop


@pytest.mark.parametrize("make", [Lookahead, Descent, partial(models.SharpnessAware, lr=0.1)])
@pytest.mark.parametrize("mode", ["gradient", "decoupled"])
def test_in_ones_own_loop(make, mode):
    net = network()
    twin = copy.deepcopy(net)
    optimizer, other = make(net.parameters()), make(twin.parameters())
    ours = UniformityRegularizer(coefficient=0.5).attach(net)
    penalty = plain.Penalty(plain.layers(twin, ""), mode, lambda *_: 0.5)
    for x, y in batches():
        calls = []

        def closure(x=x, y=y, calls=calls):
            optimizer.zero_grad()
            mean_square(net(x), y).backward()
            if mode == "gradient":
                ours.add_gradients(optimizer, same_step=bool(calls))
            calls.append(1)

        def plain_closure(x=x, y=y):
            other.zero_grad()
            mean_square(twin(x), y).backward()
            penalty.before_step(other)

        optimizer.step(closure)
        other.step(plain_closure)
        if mode == "decoupled":
            ours.move(optimizer)
        penalty.after_step(other)
    assert ours.state_dict()["steps"] == [7]
    assert max_difference(twin, net) < TOLERANCE


class FreesGradients(torch.optim.SGD):
    """Keeps no gradient in memory after a step."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.zero_grad()
        return loss


def frees_in_a_hook(parameters):
    optimizer = SGD(parameters, lr=0.1)
    optimizer.register_step_post_hook(lambda stepped, *_: stepped.zero_grad())
    return optimizer


@pytest.mark.parametrize("make", [lambda p: FreesGradients(p, lr=0.1), frees_in_a_hook])
def test_gradients_that_a_step_takes_away_are_missed_in_words(make):
    callback = uniformity(apply="decoupled", coefficient=0.5)
    with pytest.warns(UserWarning, match="'net.0'.* does not move with apply='decoupled'") as told:
        trainer(callback, max_epochs=1).fit(Automatic(make), loader(batches()))
    assert sum("does not move" in str(one.message) for one in told) == 1


def with_a_step_of_its_own(parameters):
    """Its instance has a step that knows nothing of the class's, nor of torch's hooks."""
    optimizer = SGD(parameters, lr=0.1)
    optimizer.step = MethodType(Descent.step, optimizer)
    return optimizer


def ends_of(make, kind=Automatic, **settings):
    torch.manual_seed(0)
    module = kind(make)
    callback = uniformity(**settings)
    trainer(callback, max_epochs=1).fit(module, loader(batches()))
    return nn.utils.parameters_to_vector(module.parameters()), callback.state_dict()["steps"]


@pytest.mark.parametrize("mode", MODES)
def test_a_step_set_on_the_instance_is_seen(mode):
    plain, steps = ends_of(lambda p: SGD(p, lr=0.1), apply=mode, coefficient=0.5)
    own, own_steps = ends_of(with_a_step_of_its_own, apply=mode, coefficient=0.5)
    assert_near(own, plain, 1e-5)
    assert own_steps == steps == [7]


class BehindLightning(Automatic):
    """Its optimizer steps without Lightning's hooks."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.optimizer.step(optimizer_closure)


@pytest.mark.parametrize("mode", ["loss", "decoupled"])
def test_steps_behind_lightning_are_counted(mode):
    _, steps = ends_of(lambda p: SGD(p, lr=0.1), BehindLightning, apply=mode, coefficient=0.5)
    assert steps == [7]


class TakesAway(pl.Callback):
    """Takes another callback away after a batch, perhaps until another one, as a search for a learning rate does."""

    def __init__(self, other, after=3, until=None):
        self.other, self.after, self.until = other, after, until

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.after:
            trainer.callbacks.remove(self.other)
        if batch_idx == self.until:
            trainer.callbacks.append(self.other)


@pytest.mark.parametrize("mode", MODES)
def test_a_callback_that_is_taken_away_acts_no_more(mode):
    callback = uniformity(apply=mode, coefficient=0.5)
    kept = Keep(lambda optimizer: None)
    module = Automatic()
    trainer(callback, TakesAway(callback), kept, max_epochs=1).fit(module, loader(batches()))
    assert callback.state_dict()["steps"] == [4]


class Deepcopied(Manual):
    """Copies Lightning's wrapper around its optimizer at its first batch."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            copy.deepcopy(self.optimizers())
        super().training_step(batch, batch_idx)


@pytest.mark.parametrize("mode", ["gradient", "decoupled"])
def test_a_copied_wrapper_does_not_make_it_act_twice(mode):
    plain, _ = ends_of(lambda p: SGD(p, lr=0.1), in_manual, apply=mode, coefficient=0.5)
    copied, steps = ends_of(
        lambda p: SGD(p, lr=0.1), in_manual_and_copied, apply=mode, coefficient=0.5
    )
    torch.testing.assert_close(copied, plain, rtol=1e-5, atol=1e-6)
    assert steps == [7]


def in_manual(make):
    return Manual(make_optimizer=make)


def in_manual_and_copied(make):
    return Deepcopied(make_optimizer=make)


class StepsRarely(Manual):
    """A step on every twentieth batch of epochs of seven."""

    def training_step(self, batch, batch_idx):
        loss = mean_square(self.net(batch[0]), batch[1])
        self.manual_backward(loss)
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen % 20 == 0:
            self.optimizers().step()


def test_an_optimizer_that_has_yet_to_step_is_no_alarm():
    trainer(uniformity(coefficient=0.5), max_epochs=3).fit(StepsRarely(), loader(batches()))
    with pytest.warns(UserWarning, match="has not reached layer 'net.0'"):
        trainer(uniformity(coefficient=0.5), max_epochs=2).fit(StepsRarely(), loader(batches()))


@pytest.mark.parametrize("mode", MODES)
def test_a_callback_that_comes_back_acts_again(mode):
    callback = uniformity(apply=mode, coefficient=0.5)
    fit = trainer(callback, TakesAway(callback, after=1, until=3), max_epochs=1)
    fit.fit(Automatic(), loader(batches()))
    assert callback.state_dict()["steps"] == [5]


class LosesItsRate(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            trainer.strategy.optimizers = [WithoutRate(pl_module.parameters())]


class WithoutRate(torch.optim.Optimizer):
    """Relative steps: there is no learning rate."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": None})

    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= 0.01 * p.grad
        return loss


def test_an_optimizer_without_a_rate_under_way_does_not_stop_the_training():
    fit = trainer(LosesItsRate(), uniformity(apply="decoupled", coefficient=0.5), max_epochs=1)
    every = "layer 'net.0'.*'net.2'.*'net.5'.*'net.7'"
    with pytest.warns(UserWarning, match=f"WithoutRate has no learning rate for {every}") as told:
        fit.fit(Automatic(), loader(batches()))
    assert sum("no learning rate" in str(one.message) for one in told) == 1
    assert fit.global_step == 7
    fresh = trainer(uniformity(apply="decoupled", coefficient=0.5))
    with pytest.raises(NotImplementedError, match=f"has no learning rate for {every}"):
        fresh.fit(Automatic(WithoutRate), loader(batches()))
