"""Moves past the optimizer are held to a share of its steps: both are measured, as changes of the weights.

A small network is trained on noisy targets with a penalty so strong that ``share_limit`` decides.
"""

import copy
import logging
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.parametrizations import weight_norm

from lightning_hsu import HypersphericalUniformity, Share, UniformityRegularizer
from lightning_hsu._engine import optimizer_steps
from lightning_hsu._engine.optimizer_steps import OptimizerSteps, Part
from lightning_hsu._engine.plan import learning_rates
from lightning_hsu.measures.defaults import SHARE_LIMIT
from tests import models
from tests.models import Automatic, batches, loader, trainer
from tests.waits import waits_of

STEPS = 60
SETTLED = 20
"""Steps after which running means have forgotten how they began."""


class Lion(optim.Optimizer):
    """Steps by the sign of a mean, as published; its state does not tell that."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.descend()
        return loss

    @torch.no_grad()
    def descend(self):
        for group in self.param_groups:
            beta, other = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                mean = state.setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(mean.lerp(p.grad, 1 - beta).sign_(), alpha=group["lr"])
                mean.lerp_(p.grad, 1 - other)


class RootMeans(optim.Optimizer):
    """Adam as others write it: steps are numbers, betas three, and the state has more than it needs."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99, 0.5), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta, other = group["betas"][:2]
            for p in group["params"]:
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq", "more"):
                    state.setdefault(name, torch.zeros_like(p))
                state["step"] = state.get("step", 0) + 1
                mean = state["exp_avg"].lerp_(p.grad, 1 - beta) / (1 - beta ** state["step"])
                squares = state["exp_avg_sq"].lerp_(p.grad.square(), 1 - other)
                squares = squares / (1 - other ** state["step"])
                p.addcdiv_(mean, squares.sqrt() + group["eps"], value=-group["lr"])


OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.05),
    "momentum": partial(optim.SGD, lr=0.01, momentum=0.9),
    "Nesterov": partial(optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
    "dampening": partial(optim.SGD, lr=0.05, momentum=0.9, dampening=0.9),
    "ASGD": partial(optim.ASGD, lr=0.05),
    "Adam": partial(optim.Adam, lr=1e-3),
    "Adam, large eps": partial(optim.Adam, lr=1e-3, eps=1e-2),
    "AMSGrad": partial(optim.Adam, lr=1e-3, amsgrad=True),
    "AdamW, fused": partial(optim.AdamW, lr=1e-3, fused=True),
    "NAdam": partial(optim.NAdam, lr=1e-3),
    "RAdam": partial(optim.RAdam, lr=1e-3),
    "Adamax": partial(optim.Adamax, lr=1e-3),
    "Adagrad": partial(optim.Adagrad, lr=1e-2, lr_decay=0.01),
    "Adadelta": partial(optim.Adadelta, lr=1.0),
    "RMSprop": partial(optim.RMSprop, lr=1e-3),
    "RMSprop, momentum": partial(optim.RMSprop, lr=1e-4, momentum=0.9),
    "RMSprop, centered": partial(optim.RMSprop, lr=1e-3, centered=True),
    "Rprop": partial(optim.Rprop, lr=1e-3),
    "Lion": partial(Lion, lr=1e-3),
    "Adam of others": partial(RootMeans, lr=1e-3),
}
if hasattr(optim, "Adafactor"):  # from torch 2.5 on
    OPTIMIZERS["Adafactor"] = partial(optim.Adafactor, lr=0.1)
if hasattr(optim, "Muon"):  # 2.9
    OPTIMIZERS["Muon"] = partial(optim.Muon, lr=1e-2)
    as_adamw = {"adjust_lr_fn": "match_rms_adamw"}
    OPTIMIZERS["Muon, as long as AdamW"] = partial(optim.Muon, lr=1e-2, **as_adamw)
PRESENT = {type(make([nn.Parameter(torch.ones(2, 2))])) for make in OPTIMIZERS.values()}
LEFT_OUT = {
    optim.SparseAdam,  # takes no dense gradients
    optim.LBFGS,  # one step is many, of any length
    optim.Optimizer,
}


def present(*names):
    return [name for name in names if name in OPTIMIZERS]


def test_every_optimizer_of_torch_is_tried():
    classes = {one for one in vars(optim).values() if isinstance(one, type)}
    assert {one for one in classes if issubclass(one, optim.Optimizer)} - LEFT_OUT <= PRESENT


def network():
    torch.manual_seed(0)
    net = [nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8)]
    return nn.Sequential(*net)


def normed():
    """The same with weights that are computed."""
    net = network()
    weight_norm(net[2])
    return net


def matrices(net):
    return [p for p in net.parameters() if p.ndim > 1]


def by_layer(net):
    """The matrices of each layer: two where its weights are computed."""
    return [own for own in map(matrices, net) if own]


def values(net):
    return [parameters_to_vector(own).detach() for own in by_layer(net)]


def changes(after, before):
    differences = torch._foreach_sub(after, before)
    return torch.stack(torch._foreach_norm(differences))


class Training:
    """A training on noisy targets, of which each step is done by hand.

    Args:
        make: Makes the optimizer of some parameters.
        net: The network.
        scale: A factor of the loss.
        settings: Of the regularizer.
    """

    def __init__(self, make, net, scale=1.0, **settings):
        self.net = net
        self.scale = scale
        self.teacher = copy.deepcopy(net)
        self.optimizer = make(matrices(net))
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0  # that is no step of the task
        settings = {"coefficient": 1e6, "share_limit": SHARE_LIMIT, "step_limit": None} | settings
        self.regularizer = UniformityRegularizer(**settings).attach(net)
        self.generator = torch.Generator().manual_seed(1)

    def backward(self):
        x = torch.randn(16, 16, generator=self.generator)
        with torch.no_grad():
            y = self.teacher(x)
        noise = torch.randn(y.shape, generator=self.generator)
        self.optimizer.zero_grad()
        (self.scale * (self.net(x) - y - noise).square().mean()).backward()

    def step(self):
        """The length of the move over that of the optimizer's step, by layer."""
        self.backward()
        before = values(self.net)
        self.optimizer.step()
        between = values(self.net)
        self.regularizer.move(self.optimizer)
        return changes(values(self.net), between) / changes(between, before)

    def steps(self, count=STEPS):
        return torch.stack([self.step() for _ in range(count)])


def assert_share(found):
    settled = found[SETTLED:]
    medians = settled.median(0).values
    assert float(medians.min()) > 0.3 * SHARE_LIMIT
    assert float(medians.max()) < 1.3 * SHARE_LIMIT
    assert float(found.max()) < 4 * SHARE_LIMIT


quiet = pytest.mark.filterwarnings("ignore:the penalty", "ignore:the step limit")


@quiet
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moves_are_a_share_of_the_steps_that_the_optimizer_makes(name):
    """In limits: medians of .36 (NAdam) to 1.15 of layers; at most 3.1, at single steps of Rprop."""
    training = Training(OPTIMIZERS[name], network(), neurons={"2": 3})
    assert_share(training.steps())


@quiet
@pytest.mark.parametrize("name", present("momentum", "Adam", "Adagrad", "Adafactor"))
@pytest.mark.parametrize("together", [False, True])
def test_computed_weights_move_by_a_share_as_well(name, together):
    with waits_of() if together else nullcontext():
        assert_share(Training(OPTIMIZERS[name], normed()).steps(40))


@quiet
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["momentum", "Adam", "RMSprop"])
def test_moves_are_a_share_in_any_precision(name, dtype):
    """The length of a step is read from the state; what is rounded is the sum of weight and move."""
    torch.manual_seed(0)
    training = Training(OPTIMIZERS[name], network())
    training.steps(3)
    training.backward()
    training.optimizer.step()
    twin = copy.deepcopy(training.net).to(dtype)
    state = training.optimizer.state_dict()
    for p, own in zip(twin.parameters(), training.net.parameters(), strict=True):
        p.grad = None if own.grad is None else own.grad.to(dtype)
    of_twin = OPTIMIZERS[name](matrices(twin))
    of_twin.load_state_dict(state)
    lengths = lengths_of(training.optimizer, matrices(training.net))
    for length, other in zip(lengths, lengths_of(of_twin, matrices(twin)), strict=True):
        assert float(other) == pytest.approx(float(length), rel=4 * torch.finfo(dtype).eps + 1e-6)


@quiet
@pytest.mark.parametrize("share_limit", [SHARE_LIMIT, None])
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize("together", [False, True])
def test_a_share_moves_by_at_most_its_fraction_of_the_steps(together, name, scale, share_limit):
    """However large the loss is: a share of the gradient grows with it, the steps of Adam do not."""
    fraction = 0.05
    make = OPTIMIZERS[name] if name != "SGD" else partial(optim.SGD, lr=0.05 / scale)
    settings = {"coefficient": Share(fraction, maximum=1e8), "share_limit": share_limit}
    with waits_of() if together else nullcontext():
        found = Training(make, normed(), scale, **settings).steps(30)[10:]
    assert float(found.max()) < 2 * fraction
    assert float(found.median(0).values.max()) < 1.3 * fraction
    if name == "SGD" or scale == 1e4:  # else a share of the gradient is less than one of the steps
        assert float(found.median(0).values.min()) > 0.5 * fraction


def lengths_of(optimizer, parameters):
    steps = OptimizerSteps(optimizer, learning_rates(optimizer), is_whole=True)
    parts = [Part(p, p.grad, p.numel(), lambda x: x) for p in parameters]
    return steps.lengths(parts)


def on_a_device(group, state):
    """The count of steps as a tensor, as a fused or capturable optimizer keeps it on a GPU."""
    return state["step"].reshape(())


@pytest.mark.parametrize(
    "name", present("Adam", "AMSGrad", "RAdam", "Adamax", "Adagrad", "Adafactor")
)
def test_counts_of_steps_may_be_on_a_device(name, monkeypatch):
    training = Training(OPTIMIZERS[name], network())
    parameters = matrices(training.net)
    for _ in range(8):  # RAdam rescales from the sixth on
        training.backward()
        training.optimizer.step()
        expected = lengths_of(training.optimizer, parameters)
        with monkeypatch.context() as patch:
            patch.setattr(optimizer_steps, "_step_of", on_a_device)
            found = lengths_of(training.optimizer, parameters)
        for one, other in zip(found, expected, strict=True):
            # Measured: 6e-3 of RAdam, in a difference of large float32 numbers; 1e-5 of others.
            torch.testing.assert_close(one, other, rtol=2e-2 if name == "RAdam" else 1e-4, atol=0.0)


def test_nothing_on_a_device_is_asked_for():
    """On the device "meta" every question is an error."""
    layer = nn.Linear(6, 5, device="meta")
    optimizer = optim.AdamW(layer.parameters(), capturable=True)
    layer.weight.grad = torch.empty_like(layer.weight)
    names = ("exp_avg", "exp_avg_sq")
    optimizer.state[layer.weight] = {name: torch.empty_like(layer.weight) for name in names}
    optimizer.state[layer.weight]["step"] = torch.empty((), device="meta")
    (length,) = lengths_of(optimizer, [layer.weight])
    assert length.shape == ()
    with pytest.raises(Exception, match="meta"):
        float(length)


@quiet
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_where_the_task_has_no_finite_gradient_nothing_moves(name, bad):
    """Though the optimizer's step may go on, by its momentum."""
    training = Training(OPTIMIZERS[name], network())
    training.steps(2)
    training.backward()
    training.optimizer.step()
    training.net[2].weight.grad.fill_(bad)
    before = values(training.net)
    training.regularizer.move(training.optimizer)
    moved = changes(values(training.net), before)
    assert moved[1] == 0
    assert moved[0] > 0
    assert moved[2] > 0


def told(caplog):
    return [one.message for one in caplog.records if "nothing tells how long" in one.message]


@quiet
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_which_nothing_is_known_is_told_of_once(name, caplog):
    caplog.set_level(logging.INFO, "lightning_hsu")
    Training(OPTIMIZERS[name], network()).steps(3)
    texts = told(caplog)
    assert len(texts) == (name == "Lion")
    if texts:
        assert "a step of Lion is" in texts[0]
        assert "'0', '2', '4'" in texts[0]
        assert "one of the learning rate in each entry" in texts[0]


@pytest.mark.parametrize(
    ("share_limit", "coefficient"),
    [(SHARE_LIMIT, 1.0), (None, 1.0), (SHARE_LIMIT, Share()), (None, Share())],
)
@pytest.mark.parametrize("make", [partial(Lion, lr=1e-3), models.SharpnessAware, optim.AdamW])
def test_a_trainer_tells_of_it_once(make, share_limit, coefficient, caplog):
    caplog.set_level(logging.INFO)
    settings = {"apply": "decoupled", "share_limit": share_limit, "coefficient": coefficient}
    trainer(HypersphericalUniformity(**settings)).fit(Automatic(make), loader(batches()))
    is_limited = share_limit is not None or isinstance(coefficient, Share)
    is_unknown = make is not optim.AdamW and is_limited
    assert len(told(caplog)) == is_unknown
    if make is models.SharpnessAware and is_unknown:
        assert "the learning rate times the task's gradient" in told(caplog)[0]


class SignDescent(optim.Optimizer):
    """One's own, of which neither settings nor a state tell anything."""

    def __init__(self, parameters, lr=1e-3):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])
        return loss


class OwnRMSprop(SignDescent):
    """One whose state tells, after its first step, that it rescales gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        return loss


def test_an_own_optimizer_without_a_state_is_told_of_after_some_moves(caplog):
    """Before that its state may be empty because a GradScaler has skipped its steps."""
    caplog.set_level(logging.INFO, "lightning_hsu")
    training = Training(SignDescent, network())
    training.steps(9)
    assert told(caplog) == []
    training.steps(9)
    (text,) = told(caplog)
    assert "a step of SignDescent is" in text


def told_of_step_limit(caplog):
    return [one.message for one in caplog.records if "step_limit takes a step for" in one.message]


def first_steps(make, **settings):
    training = Training(make, network(), **settings)
    for _ in range(6):
        training.backward()
        training.regularizer.add_gradients(training.optimizer)
        training.optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("step_limit", [1.0, None])
@pytest.mark.parametrize("make", [SignDescent, optim.LBFGS])
def test_an_optimizer_whose_steps_the_step_limit_does_not_know_is_told_of_once(
    make, step_limit, every, caplog
):
    caplog.set_level(logging.INFO, "lightning_hsu")
    first_steps(make, step_limit=step_limit, every_n_steps=every)
    texts = told_of_step_limit(caplog)
    assert len(texts) == (step_limit is not None)
    for text in texts:
        assert text.startswith(
            f"nothing tells what {make.__name__} makes of a gradient, so in layer"
        )
        assert "layer '0', '2', '4' step_limit takes" in text


@quiet
@pytest.mark.parametrize("make", [OwnRMSprop, *OPTIMIZERS.values()])
def test_one_whose_steps_it_knows_by_settings_or_state_is_not_told_of(make, caplog):
    caplog.set_level(logging.INFO, "lightning_hsu")
    first_steps(make, step_limit=1.0)
    assert told_of_step_limit(caplog) == []


@pytest.mark.parametrize("step_limit", [1.0, None])
@pytest.mark.parametrize("make", [SignDescent, optim.SGD, optim.AdamW])
def test_a_trainer_tells_of_it_once_too(make, step_limit, caplog):
    caplog.set_level(logging.INFO)
    callback = HypersphericalUniformity(step_limit=step_limit)
    trainer(callback).fit(Automatic(partial(make, lr=1e-3)), loader(batches()))
    is_unknown = make is SignDescent and step_limit is not None
    assert len(told_of_step_limit(caplog)) == is_unknown


class ZeroRedundancyOptimizer(optim.Adam):
    """One by that name has the state of a part of the parameters on each rank."""


def test_state_that_ranks_do_not_have_alike_is_not_read():
    training = Training(partial(ZeroRedundancyOptimizer, lr=1e-3), network())
    training.backward()
    training.optimizer.step()
    parameters = matrices(training.net)
    expected = [math.sqrt(p.numel()) for p in parameters]
    training.optimizer.state[parameters[0]]["exp_avg"].zero_()
    assert list(map(float, lengths_of(training.optimizer, parameters))) == pytest.approx(expected)
