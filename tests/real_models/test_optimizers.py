"""Optimizers of torch and of libraries: a Trainer with the callback trains as a plain loop with the same optimizer."""

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from tests import plain
from tests.models import Automatic, batches, loader, mean_square, trainer, uniformity
from tests.real_models.libraries import library
from tests.test_exactness import max_difference

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore"),  # their own; those that count here are caught
]

# In float64 a sign, or the division by a tiny second moment, does not turn a rounding error into a
# step. Measured: 1.0e-12 in the weights with Kate, else at most 1.4e-16.
TOLERANCE = 1e-11
STRENGTH = 0.3
DATA = batches(4, dtype=torch.float64)

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Seeded(pl.Callback):
    """Some optimizers draw at random; the DataLoader does, too."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        seed(batch_idx)


def seed(number):
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def module_of(make: Make) -> Automatic:
    torch.manual_seed(0)
    dense = (nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))
    net = nn.Sequential(nn.Flatten(), *dense).double()
    return Automatic(lambda parameters: make(list(parameters)), net=net)


def fit(module, *callbacks):
    """A copy of the module after a fit."""
    twin = copy.deepcopy(module)
    trainer(Seeded(), *callbacks, max_epochs=1, precision="64-true").fit(twin, loader(DATA))
    return twin


def fit_plainly(module, mode):
    """A copy of the module after a plain loop with closures, as Lightning's are."""
    twin = copy.deepcopy(module)
    net = twin.net
    optimizer = twin.configure_optimizers()
    layers = [
        plain.Layer("net.1", net[1]),
        plain.Layer("net.3", net[3]),
        plain.Layer("net.5", net[5], plain.DEFAULT_MEASURE),
    ]
    penalty = plain.Penalty(layers, mode, lambda *_: STRENGTH, step_limit=None)

    def closure(x, y):
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = mean_square(net(x), y)
            loss.backward()
            upwards = optimizer.param_groups[0].get("maximize", False)
            add(penalty, optimizer, -1.0 if upwards else 1.0)
        return loss

    for i, (x, y) in enumerate(DATA):
        seed(i)
        optimizer.step(closure=partial(closure, x, y))
        penalty.after_step(optimizer)
    return twin


def add(penalty, optimizer, sign):
    """Where the optimizer goes up, the penalty's gradient is taken away."""
    penalty.before_step(optimizer, scale=sign)


def problems_of(make: Make) -> Iterator[str]:
    """What is not as it should be with one optimizer; raises what it raises without us."""
    module = module_of(make)
    without = fit(module)
    if max_difference(fit(module, uniformity(coefficient=0)), without) != 0:
        yield "a monitor changes the training"
    if max_difference(fit(module, uniformity(coefficient=0, apply="decoupled")), without) != 0:
        yield "a monitor in decoupled mode changes the training"
    for mode in ("gradient", "decoupled"):
        callback = uniformity(coefficient=STRENGTH, apply=mode, step_limit=None)
        ours, expected = fit(module, callback), fit_plainly(module, mode)
        difference = max_difference(ours, expected)
        if not difference < TOLERANCE:
            yield f"{mode}: {difference:.1e} from the plain loop"
        if mode == "decoupled" and not max_difference(ours, without) > 1e-7:
            yield "decoupled: nothing has moved"
        if callback.state_dict()["steps"] != [len(DATA)]:
            yield f"{mode}: {callback.state_dict()}"


def examine(makers: dict[str, Make]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Problems by optimizer, and what those raise that do not run here, with us or without."""
    problems, broken = {}, {}
    for name, make in makers.items():
        try:
            fit(module_of(make))
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"
            continue
        try:
            found = list(problems_of(make))
        except Exception as error:
            found = [f"raises {type(error).__name__}: {error}"]
        if found:
            problems[name] = found
    print(broken)  # shown if the test fails
    return problems, broken


def torch_makers() -> dict[str, Make]:
    makers: dict[str, Make] = {}
    for name in (
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "Rprop",
        "SGD",
    ):
        kind = getattr(torch.optim, name)
        for setting in ({}, {"foreach": True}, {"maximize": True}, {"lr": torch.tensor(1e-3)}):
            makers[f"{name} {setting}"] = partial(kind, **{"lr": 1e-3, **setting})
    for name in ("Adagrad", "Adam", "AdamW", "SGD"):
        makers[f"{name} fused"] = partial(getattr(torch.optim, name), lr=1e-3, fused=True)
    makers["ASGD"] = torch.optim.ASGD
    makers["RMSprop"] = torch.optim.RMSprop
    makers["LBFGS"] = partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    if hasattr(torch.optim, "Adafactor"):
        makers["Adafactor"] = torch.optim.Adafactor
    if hasattr(torch.optim, "Muon"):
        makers["Muon"] = lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2], lr=1e-3)
    return makers


def test_torch():
    problems, broken = examine(torch_makers())
    assert problems == {}
    assert broken == {}


def test_timm():
    timm = library("timm.optim")
    makers = {}
    for name in timm.list_optimizers():
        if not name.startswith(("bnb", "fused")):  # these need a GPU
            makers[name] = partial(timm.create_optimizer_v2, opt=name, lr=1e-3)
    problems, broken = examine(makers)
    assert problems == {}
    assert set(broken) == {"adahessian"}  # it needs create_graph=True


def test_pytorch_optimizer():
    optimizers = library("pytorch_optimizer")
    makers = {}
    for name in optimizers.get_supported_optimizers():
        if name not in ("soap", "a2grad", "alig", *NEED_MORE):
            makers[name] = partial(optimizers.load_optimizer(name), lr=1e-3)
    sgd = torch.optim.SGD
    makers["Lookahead"] = lambda ps: optimizers.Lookahead(sgd(ps, lr=1e-2), k=2)
    makers["OrthoGrad"] = lambda ps: optimizers.OrthoGrad(sgd(ps, lr=1e-2))
    makers["SAM"] = lambda ps: optimizers.SAM(ps, sgd, lr=1e-2)
    makers["LookSAM"] = lambda ps: optimizers.LookSAM(ps, sgd, lr=1e-2)
    makers["ScheduleFreeWrapper"] = lambda ps: in_training(
        optimizers.ScheduleFreeWrapper(sgd(ps, lr=1e-2))
    )
    for name in ("Muon", "AdaMuon", "AdaGO"):
        makers[f"{name}, in groups"] = partial(in_muon_groups, getattr(optimizers, name))
    problems, broken = examine(makers)
    assert problems == {}
    assert broken == {}


# soap: a rounding error decides which eigenvectors it takes of equal eigenvalues.
NEED_MORE = {
    *("adahessian", "sophiah"),  # create_graph=True
    *("adalomo", "lomo", "adammini"),  # the model instead of its parameters
    *("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon"),  # groups of their own
    *("bsam", "ranger21"),  # how long the training is
    "demo",  # a process group
    "fadam",  # float32
    "spectralsphere",  # no biases
}


def in_training(optimizer):
    optimizer.train()
    return optimizer


def in_muon_groups(kind, parameters):
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    return kind(
        [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}], lr=1e-3
    )


def test_torch_optimizer():
    optimizers = library("torch_optimizer")
    makers = {}
    for name in TORCH_OPTIMIZER:
        makers[name] = partial(getattr(optimizers, name), lr=1e-3)
    makers["A2GradUni"] = partial(optimizers.A2GradUni, lr=1e-3)
    makers["Lookahead"] = lambda ps: optimizers.Lookahead(optimizers.Yogi(ps, lr=1e-2), k=2)
    problems, broken = examine(makers)
    assert problems == {}
    assert broken == {}


TORCH_OPTIMIZER = (
    *("AccSGD", "AdaBelief", "AdaBound", "AdaMod", "AdamP", "AggMo", "Apollo", "DiffGrad", "Lamb"),
    *("LARS", "MADGRAD", "NovoGrad", "PID", "QHAdam", "QHM", "RAdam", "RangerQH", "SGDP", "SGDW"),
    *("SWATS", "Shampoo", "Yogi"),
)


def test_schedulefree():
    optimizers = library("schedulefree")
    makers = {}
    for name in ("SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"):
        kind = getattr(optimizers, name)
        makers[name] = lambda ps, kind=kind: in_training(kind(ps, lr=1e-2))
        makers[f"{name}Closure"] = partial(getattr(optimizers, f"{name}Closure"), lr=1e-2)
    problems, broken = examine(makers)
    assert problems == {}
    assert broken == {}


def test_bitsandbytes():
    optimizers = library("bitsandbytes").optim
    makers = {}
    for name in ("Adam", "AdamW", "Adagrad", "LAMB", "Lion", "RMSprop", "AdEMAMix"):
        for suffix in ("", "8bit"):
            makers[name + suffix] = partial(getattr(optimizers, name + suffix), lr=1e-3)
    problems, broken = examine(makers)
    if len(broken) == len(makers):
        pytest.skip(f"this bitsandbytes does not run on a CPU: {broken}")
    assert problems == {}


def test_torchao():
    optimizers = library("torchao.optim")
    makers = {}
    for name in ("Adam8bit", "AdamW8bit", "Adam4bit", "AdamWFp8"):
        makers[name] = partial(getattr(optimizers, name), lr=1e-3)
    problems, broken = examine(makers)
    if len(broken) == len(makers):
        pytest.skip(f"this torchao does not compile its steps here: {broken}")
    assert problems == {}


WITHOUT_RATE = {
    "transformers: Adafactor": ("transformers.optimization", "Adafactor", {}),
    "torch_optimizer: Adafactor": ("torch_optimizer", "Adafactor", {}),
    "pytorch_optimizer: A2Grad": ("pytorch_optimizer", "A2Grad", {}),
    "pytorch_optimizer: AliG": ("pytorch_optimizer", "AliG", {}),
}


@pytest.mark.parametrize("name", WITHOUT_RATE)
def test_without_a_learning_rate(name):
    """The gradient is added in full; to move neurons by an unknown rate is refused."""
    where, kind, settings = WITHOUT_RATE[name]
    make = partial(getattr(library(where), kind), **settings)
    module = module_of(make)
    without = fit(module)
    ours = fit(module, uniformity(coefficient=STRENGTH))
    assert max_difference(ours, fit_plainly(module, "gradient")) < TOLERANCE
    assert max_difference(ours, without) > 1e-5
    with pytest.raises(NotImplementedError, match=f"{kind} has no learning rate for layer 'net.1'"):
        fit(module, uniformity(apply="decoupled"))
    assert max_difference(fit(module, uniformity(coefficient=0, apply="decoupled")), without) == 0


UNDONE = {
    "schedulefree": ("SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"),
    "pytorch_optimizer": (
        "ScheduleFreeAdamW",
        "MADGRAD",
        "DAdaptSGD",
        "DAdaptAdaGrad",
        "FTRL",
        "SRMM",
    ),
    "torch_optimizer": ("MADGRAD", "A2GradUni"),
    "timm.optim": ("MADGRAD",),
}
KEPT = {
    "pytorch_optimizer": ("Prodigy", "AdamP", "Lion", "Shampoo", "DAdaptAdam", "Adan", "Grams"),
    "torch_optimizer": ("AccSGD", "Shampoo", "Lamb"),
    "timm.optim": ("Lamb", "Adopt", "Lion"),
}


def weights_after(kind, *, moved):
    """Weights after ten steps whose gradients are given; ``moved`` ones were displaced after the third."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(8, 6))
    gradients, way = torch.randn(10, 8, 6), torch.randn(8, 6)
    optimizer = kind([p], lr=1e-3)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for i, gradient in enumerate(gradients):
        p.grad = gradient.clone()
        optimizer.step()
        if i == 2 and moved:
            p.data += 0.01 * way
    return p.detach(), 0.01 * way


def survival(kind):
    """The part of a displacement that is still there after seven more steps."""
    moved, way = weights_after(kind, moved=True)
    alone, _ = weights_after(kind, moved=False)
    return float(((moved - alone) * way).sum() / way.square().sum())


@pytest.mark.parametrize(
    ("where", "undone"), [*((one, True) for one in UNDONE), *((one, False) for one in KEPT)]
)
def test_where_the_next_steps_undo_a_move_it_is_said(where, undone):
    optimizers = library(where)
    for name in (UNDONE if undone else KEPT)[where]:
        kind = getattr(optimizers, name)
        assert (survival(kind) < 0.6) == undone, name

        def make(parameters, kind=kind):
            optimizer = kind(parameters, lr=1e-3)
            if hasattr(optimizer, "train"):
                optimizer.train()
            return optimizer

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(module_of(make), uniformity(apply="decoupled"))
        told = [str(one.message) for one in caught if "use apply='gradient'" in str(one.message)]
        assert len(told) == undone, name
