"""``share_limit``: a layer's penalty is held to a part of its task's gradient, as a plain loop holds it.

The plain loop is tests/plain.py's, which knows nothing of the engine.
"""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.optim import SGD, AdamW

from lightning_hsu import HypersphericalUniformity, Share, UniformityRegularizer
from lightning_hsu._engine import strength
from lightning_hsu.measures import Covering, Orthogonality, SlicedWasserstein
from lightning_hsu.measures.defaults import SHARE_LIMIT
from tests import models, plain, ranks, sharding
from tests.models import Automatic, batches, loader, mean_square, trainer, uniformity
from tests.processes import world
from tests.ranks import make_module
from tests.test_distributed import ddp
from tests.test_exactness import (
    HERE,
    fit_keeping,
    fit_plainly,
    fit_plainly_keeping,
    fit_with_lightning,
    half,
    max_difference,
    rising,
    uses_of,
)
from tests.test_sharded import Case as ShardedCase
from tests.test_sharded import Flat, as_read_by_ranks, fsdp2, pieces
from tests.test_triton import BACKENDS, choose
from tests.waits import counting, waits_of

MODES = ("gradient", "decoupled")  # a loss knows no task gradient

# The callback, in rows of tests/test_exactness.py


def twice(step, layer=None):
    return 2.0


def steep(step, layer=None):
    return 2.0 * step


BY_NAME = {row.name: row for row in HERE}
ROWS = [
    "fp32",
    "fused Adam",
    "AdamW",
    "bf16-mixed",
    "64-true",
    "scaler",
    "scaler, fused",
    "scaler, overflow, schedule",
    "scaler, overflow, schedule, fused",
    "accumulate 3 of 5",
    "scaler, accumulate 3 of 4",
    "clip by norm",
    "three parts",
    "manual accumulation",
    "manual, scaler, fused, unscaled by hand",
    "manual, clipped",
    "GAN, toggled",
    "LBFGS",
    "SAM",
    "two groups",
    "neurons that are copies",
    "frozen",
    "ModelPruning",
    "weight_norm",
    "LSTM, attention",
    "StochasticWeightAveraging",
    "a compiled part",
    "all compiled",
    "every second step",
    "the head apart",
    "Share for a layer, clipped, every second step",
    "log_every_n_steps=2",
    "copied",
    "used before",
    "resumed",
]
KEEPING = [
    "fp32",
    "AdamW",
    "scaler, fused",
    "accumulate 3 of 5",
    "weight_norm",
    "LSTM, attention",
    "every second step",
    "Share for a layer, clipped, every second step",
    "log_every_n_steps=2",
]


def strong(row):
    """The row with a coefficient that the limit holds, if it has the usual one or the usual schedule."""
    strength = {half: twice, rising: steep}.get(row.strength)
    if strength is None:
        return row
    return replace(row, callback=row.callback | {"coefficient": strength}, strength=strength)


def cases(names):
    return [
        pytest.param(strong(BY_NAME[name]), mode, id=f"{name}-{mode}")
        for name in names
        for mode in MODES
    ]


@pytest.mark.usefixtures("shipped_defaults")
@pytest.mark.parametrize(("row", "mode"), cases(ROWS))
def test_trains_as_a_plain_loop_that_holds_each_layer(row, mode):
    module = row.module(make_optimizer=row.optimizer)
    twin, unlimited = (copy.deepcopy(module).to(row.dtype) for _ in range(2))
    data = batches(row.count, dtype=row.dtype)
    fit_with_lightning(row, mode, module, data)
    penalty = fit_plainly(row, mode, twin, data, share_limit=SHARE_LIMIT)
    fit_plainly(row, mode, unlimited, data)
    assert penalty.held > 0
    assert max_difference(twin, module) < row.tolerance
    assert max_difference(unlimited, twin) > 10 * row.tolerance


@pytest.mark.usefixtures("shipped_defaults")
@pytest.mark.parametrize(("row", "mode"), cases(KEEPING))
def test_kept_gradients_are_held_at_each_step(row, mode):
    module, (twin, fresh), data, schedule = fit_keeping(row, mode)
    assert not all(uses_of(schedule))
    penalty = fit_plainly_keeping(row, mode, twin, data, schedule, share_limit=SHARE_LIMIT)
    assert penalty.held > 0
    difference = max_difference(twin, module)
    assert difference < row.tolerance
    fit_plainly(row, mode, fresh, data, share_limit=SHARE_LIMIT)
    assert max_difference(fresh, module) > 2 * difference


def test_a_loss_has_no_such_limit():
    module, data = Automatic(), batches()
    ends = []
    for share_limit in (SHARE_LIMIT, None):
        ends.append(copy.deepcopy(module))
        ours = uniformity(coefficient=2.0, apply="loss", share_limit=share_limit)
        trainer(ours).fit(ends[-1], loader(data))
    assert same_bits(*ends)


def same_bits(net, other):
    return all(map(torch.equal, net.parameters(), other.parameters()))


# The regularizer, in a loop of one's own


class Mixed(nn.Module):
    """Plain layers of several shapes, grouped neurons, computed weights, a tied one and the gates of an LSTM."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.normed = weight_norm(nn.Linear(32, 12))
        self.turned = orthogonal(nn.Linear(12, 12))
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.tied = nn.Linear(12, 12)
        self.again = nn.Linear(12, 12)
        self.again.weight = self.tied.weight
        self.lstm = nn.LSTM(12, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.grouped(self.conv(x).tanh()).tanh().flatten(1)
        x = self.turned(self.normed(x).tanh()).tanh()
        x = self.second(self.first(x).tanh()).tanh()
        x = self.again(self.tied(x).tanh()).tanh()
        return self.head(self.lstm(x[:, None].expand(-1, 3, -1))[0][:, -1])


def mixed_layers(net, measure=plain.DEFAULT_MEASURE):
    found = [
        plain.Layer("conv", net.conv, measure),
        plain.Layer("grouped", net.grouped, measure, plain.in_groups),
    ]
    for name in ("normed", "turned", "first", "second", "tied"):
        found.append(plain.Layer(name, getattr(net, name), measure))
    for key in ("weight_ih_l0", "weight_hh_l0"):
        for i, gate in enumerate("ifgo"):
            rows = partial(plain.chunk, i=i, of=4)
            found.append(plain.Layer(f"lstm.{key}.{gate}", net.lstm, measure, rows, key))
    return [*found, plain.Layer("head", net.head, measure.for_head())]


OPTIMIZERS = {
    "SGD": partial(SGD, lr=0.05),
    "momentum": partial(SGD, lr=0.02, momentum=0.9, dampening=0.3),
    "AdamW": partial(AdamW, lr=0.003, weight_decay=0.1),
    "fused AdamW": partial(AdamW, lr=0.003, weight_decay=0.1, fused=True),
}


WATCH = "strength.py"  # it reads its looks at once where the device is a CPU


@dataclass(frozen=True)
class Loop:
    """A loop with the regularizer.

    Args:
        optimizer: Its name.
        settings: Of the regularizer.
        mode: "gradient" or "decoupled".
        stats: Whether it asks for statistics.
        dtype: That of parameters and data.
        grad_scale: A factor that the gradients carry while the penalty is added.
        steps: How many.
    """

    optimizer: str = "SGD"
    settings: dict[str, Any] = field(default_factory=dict)
    mode: str = "gradient"
    stats: bool = False
    dtype: torch.dtype = torch.float64
    grad_scale: float = 1.0
    steps: int = 3

    def backward(self, net, optimizer, step):
        x, y = batches(self.steps, dtype=self.dtype)[step]
        optimizer.zero_grad()
        (mean_square(net(x), y) * self.grad_scale).backward()

    def unscale(self, net):
        """What an optimizer that does so itself does within its step."""
        if self.grad_scale != 1.0:
            for p in net.parameters():
                if p.grad is not None:
                    p.grad /= self.grad_scale

    def regularizer(self, net):
        settings = {"coefficient": 0.3, "share_limit": SHARE_LIMIT} | self.settings
        return UniformityRegularizer(**settings).attach(net)

    def run(self, net, waits=None):
        """Train; returns the statistics of each step, by layer, and what waited."""
        optimizer = OPTIMIZERS[self.optimizer](net.parameters())
        regularizer = self.regularizer(net)
        found, waited = [], []
        for step in range(self.steps):
            self.backward(net, optimizer, step)
            if self.mode == "decoupled":
                optimizer.step()
            if waits is not None:
                waits.put_model_there(net)
            with nullcontext() if waits is None else counting(waits, step):
                found.append(self.act(regularizer, optimizer))
            if self.mode == "gradient":
                self.unscale(net)
                optimizer.step()
                with nullcontext() if waits is None else counting_too(waits):
                    regularizer.look_ahead(optimizer)
            if waits is not None and step:  # the first one is looked at
                waited += waits.found
        return found, [name for name in waited if WATCH not in name]

    def act(self, regularizer, optimizer):
        if self.mode == "decoupled":
            return regularizer.move(optimizer, stats=self.stats)
        scale = {"grad_scale": self.grad_scale}
        return regularizer.add_gradients(optimizer, stats=self.stats, **scale)

    def run_on_gpu(self, net):
        """The same with tensors that pretend to be on a GPU."""
        with waits_of() as waits:
            return self.run(net, waits)

    def run_plainly(self, net, layers, **limits):
        """The same in a plain loop; returns its penalty and how many neurons each step shortened."""
        optimizer = OPTIMIZERS[self.optimizer](net.parameters())
        settings = {"share_limit": SHARE_LIMIT} | self.settings
        for name in ("share_limit", "step_limit"):
            if name in settings:
                limits.setdefault(name, settings[name])
        coefficient = settings.get("coefficient", 0.3)
        penalty = plain.Penalty(layers, self.mode, lambda *_: coefficient, **limits)
        counts = []
        for step in range(self.steps):
            self.backward(net, optimizer, step)
            penalty.before_step(optimizer, self.grad_scale)
            self.unscale(net)
            optimizer.step()
            penalty.after_step(optimizer)
            counts.append(dict(penalty.limited))
        return penalty, counts


def counting_too(waits):
    """Within the block waits are counted with those of the step."""
    found = dict(waits.found)
    block = counting(waits, waits.step)

    class Both:
        def __enter__(self):
            block.__enter__()
            waits.found.update(found)

        def __exit__(self, *error):
            return block.__exit__(*error)

    return Both()


LOOPS = [
    *(Loop(name, {"coefficient": 3.0}, mode, stats=True) for name in OPTIMIZERS for mode in MODES),
    *(Loop(name, {"share_limit": 0.01}, mode) for name in ("SGD", "AdamW") for mode in MODES),
    *(Loop("momentum", {"share_limit": 1.0, "coefficient": 3.0}, mode) for mode in MODES),
    *(Loop("AdamW", {"share_limit": 1.0, "coefficient": 30.0}, mode) for mode in MODES),
    Loop("momentum", {"step_limit": 0.001}, stats=True),
    Loop("AdamW", {"step_limit": 0.001}, stats=True),
    Loop("AdamW", {"step_limit": 0.01, "share_limit": None}),
    Loop("momentum", {"step_limit": 0.001}, "decoupled", stats=True),
    Loop("AdamW", {"step_limit": None}, stats=True),
    Loop("SGD", grad_scale=1024.0, stats=True),
    Loop("AdamW", grad_scale=1024.0, stats=True),
    Loop("AdamW", {"step_limit": 0.001}, grad_scale=1024.0),
]


def mixed(dtype=torch.float64):
    torch.manual_seed(0)
    return Mixed().to(dtype)


def loop_name(loop):
    parts = [loop.optimizer, loop.mode, *(f"{name}={x}" for name, x in loop.settings.items())]
    parts += ["stats"] * loop.stats + ["scaled"] * (loop.grad_scale != 1.0)
    return ", ".join(parts)


def assert_trains_as_a_plain_loop(loop):
    """On a CPU and as on a GPU; return the statistics, and the plain loop's penalty and counts."""
    net = mixed()
    twin, on_gpu = copy.deepcopy(net), copy.deepcopy(net)
    stats, _ = loop.run(net)
    penalty, counts = loop.run_plainly(twin, mixed_layers(twin))
    assert max_difference(twin, net) < 1e-9
    if loop.stats:
        for found, expected in zip(stats, counts, strict=True):
            assert {name: int(one.limited) for name, one in found.items()} == expected
    of_gpu, waited = loop.run_on_gpu(on_gpu)
    assert max_difference(on_gpu, net) < 1e-9
    assert waited == []
    for found, expected in zip(of_gpu, stats, strict=True):
        for name, one in expected.items():
            assert int(found[name].limited) == int(one.limited)
    return stats, penalty, counts


@pytest.mark.filterwarnings("ignore:the penalty is too strong", "ignore:the step limit")
@pytest.mark.parametrize("loop", LOOPS, ids=loop_name)
def test_every_kind_of_layer_is_held_as_in_a_plain_loop(loop):
    _, penalty, counts = assert_trains_as_a_plain_loop(loop)
    assert penalty.held > 0 or any(sum(one.values()) for one in counts)


# What is added, step by step


def dense(dtype=torch.float64):
    """Plain layers, two of one shape, of which one has a dead neuron, and one that is computed."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 12)]
    net = nn.Sequential(*layers, weight_norm(nn.Linear(12, 9)), nn.Linear(9, 20)).to(dtype)
    with torch.no_grad():
        net[1].weight[3] = 0.0
    return net


def give_gradients(net, scale=1e-3):
    """The same ones at each call."""
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (scale * noise).to(p.dtype)


def weights_of(net, name):
    return list(net.get_submodule(name).parameters())


@dataclass(frozen=True)
class Act:
    """One way in which the regularizer acts on gradients that are given.

    Args:
        mode: "gradient" or "decoupled".
        optimizer: Its name.
        on_gpu: Whether tensors pretend to be on a GPU.
        settings: Of the regularizer.
    """

    mode: str = "gradient"
    optimizer: str = "SGD"
    on_gpu: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.1

    def __str__(self):
        words = [self.mode, self.optimizer, *map(str, self.settings)]
        return " ".join([*words, "as on a GPU"] if self.on_gpu else words)

    def changes(self, net, spoil=lambda net: None, calls=2):
        """What each of some calls adds to gradients or weights, by the name of the parameter."""
        optimizer = OPTIMIZERS[self.optimizer](net.parameters())
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        settings = {"coefficient": 1.0, "share_limit": SHARE_LIMIT, "head": None} | self.settings
        found = []
        with waits_of() if self.on_gpu else nullcontext():
            regularizer = UniformityRegularizer(**settings).attach(net, watch=False)
            for _ in range(calls):
                give_gradients(net)
                spoil(net)
                torch._foreach_mul_([p.detach() for p in net.parameters()], 1.0)  # a step
                before = copy.deepcopy(net)
                for p, old in zip(net.parameters(), before.parameters(), strict=True):
                    old.grad = None if p.grad is None else p.grad.clone()
                act = regularizer.move if self.mode == "decoupled" else regularizer.add_gradients
                act(optimizer)
                found.append(self.differences(net, before))
                net.load_state_dict(before.state_dict())
        return found

    def differences(self, net, before):
        found = {}
        for (name, p), old in zip(net.named_parameters(), before.parameters(), strict=True):
            if self.mode == "decoupled":
                found[name] = p.detach() - old.detach()
            elif p.grad is not None:
                same = torch.equal(p.grad.nan_to_num(7.0), old.grad.nan_to_num(7.0))
                found[name] = torch.zeros_like(p) if same else p.grad - old.grad
        return found


ACTS = [
    Act(mode, optimizer, on_gpu, settings)
    for mode in MODES
    for optimizer in ("SGD", "AdamW")
    for on_gpu in (False, True)
    for settings in ({}, {"tolerance": 0.5})
]
ACTS += [Act(optimizer="AdamW", on_gpu=on_gpu, lr=0.0) for on_gpu in (False, True)]
BAD = {"zero": 0.0, "nan": float("nan"), "inf": float("inf")}


@pytest.mark.filterwarnings("ignore:the penalty", "ignore:the step limit")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_where_the_task_has_no_finite_gradient_nothing_is_added(act, bad):
    names = ("1", "3")

    def spoil(net):
        for name in names:
            for p in weights_of(net, name):
                if bad == "zero":
                    p.grad.zero_()
                else:
                    p.grad.view(-1)[::3] = BAD[bad]

    found, usual = act.changes(dense(), spoil), act.changes(dense())
    for call, expected in zip(found, usual, strict=True):
        for name, change in expected.items():
            if name.startswith(names):
                assert not call[name].any(), name
            else:
                torch.testing.assert_close(call[name], change, rtol=1e-9, atol=1e-12)
        for name in ("0.weight", "2.weight"):
            assert call[name].any()


@pytest.mark.filterwarnings("ignore:the penalty", "ignore:the step limit")
@pytest.mark.parametrize("act", ACTS[:4], ids=str)
def test_a_layer_without_a_gradient_is_left_alone(act):
    def spoil(net):
        for p in weights_of(net, "1"):
            p.grad = None

    for call, usual in zip(act.changes(dense(), spoil), act.changes(dense()), strict=True):
        assert not call.pop("1.weight", torch.zeros(1)).any()
        for name in call:
            torch.testing.assert_close(call[name], usual[name], rtol=1e-9, atol=1e-12)


@dataclass(frozen=True)
class Stuck(Loop):
    """A loop in which the task's gradient is 0 in some layers."""

    def backward(self, net, optimizer, step):
        super().backward(net, optimizer, step)
        for name in STUCK:
            for p in weights_of(net, name):
                p.grad.zero_()


STUCK = ("conv", "grouped", "normed", "first", "second")
FREE = {"share_limit": None, "coefficient": 3.0}
STUCK_LOOPS = [
    Stuck(optimizer, FREE | settings, mode, stats=True)
    for optimizer in ("SGD", "AdamW", "fused AdamW")
    for mode in MODES
    for settings in ({}, {"step_limit": 0.01}, {"coefficient": Share(0.3)})
]
STUCK_LOOPS.append(Stuck("AdamW", FREE | {"step_limit": 0.01}, stats=True, grad_scale=1024.0))


@pytest.mark.filterwarnings("ignore:the penalty", "ignore:the step limit")
@pytest.mark.parametrize("loop", STUCK_LOOPS, ids=loop_name)
def test_without_a_share_limit_a_layer_without_a_task_has_the_plain_step_limit(loop):
    assert loop.stats
    stats, _, _ = assert_trains_as_a_plain_loop(loop)
    if not isinstance(loop.settings["coefficient"], Share):  # a share of nothing
        for found in stats:
            assert {float(found[name].share) for name in STUCK} == {math.inf}  # of a task of 0


@pytest.mark.filterwarnings("ignore:the penalty", "ignore:the step limit")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("tolerance", [None, 0.5])
def test_without_a_share_limit_adam_adds_there_what_plain_descent_does(tolerance, on_gpu, bad):
    """The entries that are not finite stay so."""
    names = ("1", "3")

    def spoil(net):
        for name in names:
            for p in weights_of(net, name):
                p.grad.view(-1)[:: 1 if bad == "zero" else 3] = BAD[bad]

    settings = {"share_limit": None, "step_limit": 0.01, "tolerance": tolerance}
    found = Act("gradient", "AdamW", on_gpu, settings).changes(dense(), spoil)
    plainly = Act("gradient", "SGD", on_gpu, settings).changes(dense(), spoil)
    for call, expected in zip(found, plainly, strict=True):
        for name in ("1.weight", *(name for name in expected if name.startswith("3.para"))):
            assert call[name].nan_to_num(0.0, 0.0, 0.0).any(), name
            torch.testing.assert_close(call[name], expected[name], equal_nan=True)
        assert not torch.allclose(call["0.weight"], expected["0.weight"])  # there the task counts


MEASURES = [None, Covering(), SlicedWasserstein(), Orthogonality()]


@pytest.mark.parametrize("share_limit", [0.01, SHARE_LIMIT, 1.0])
@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_what_is_added_is_what_would_be_shortened_as_a_whole(measure, share_limit):
    """Of each layer but that with a share, which has a limit of its own."""
    settings = {"measure": measure, "step_limit": None}
    settings["coefficient"] = {"2": Share(0.3), "*": 1.0}
    (free,) = Act(settings=settings | {"share_limit": None}).changes(dense(), calls=1)
    (held,) = Act(settings=settings | {"share_limit": share_limit}).changes(dense(), calls=1)
    net = dense()
    give_gradients(net)
    for layer in map(str, range(5)):
        keys = [name for name in free if name.startswith(layer) and "bias" not in name]
        tasks = [net.get_parameter(name).grad for name in keys]
        allowed = share_limit * plain.norm(tasks) / plain.norm([free[name] for name in keys])
        factor = 1.0 if layer == "2" else min(1.0, allowed)
        for name in keys:
            torch.testing.assert_close(held[name], factor * free[name], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_back_end_holds_layers(name, optimizer, dtype, monkeypatch):
    act = Act(optimizer=optimizer, settings={"step_limit": 0.05})
    (expected,) = act.changes(dense(dtype).double(), calls=1)
    choose(name, monkeypatch)
    (found,) = act.changes(dense(dtype), calls=1)
    eps = torch.finfo(dtype).eps
    for layer, change in found.items():
        error = (change.double() - expected[layer]).norm()
        # The sums that are compared are rounded to the dtype of the gradient.
        assert error <= 2 * eps * 1e-3 * change.numel() ** 0.5 + 1e-4 * expected[layer].norm()


class Quiet:
    """Steps of all optimizers are looked at only if their statistics are asked for."""

    def __get__(self, watch, kind):
        return self

    def __set__(self, watch, value):
        pass

    def __contains__(self, optimizer):
        return True

    def add(self, optimizer):
        pass

    def discard(self, optimizer):
        pass


@pytest.mark.parametrize("optimizer", ["momentum", "AdamW"])
@pytest.mark.parametrize("tolerance", [None, 0.5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_statistics_change_no_bit(optimizer, tolerance, mode, on_gpu, monkeypatch):
    settings = {"coefficient": 3.0, "tolerance": tolerance}
    monkeypatch.setattr("lightning_hsu.regularizer.looked_at", lambda every_n_steps: ())
    monkeypatch.setattr(strength.StrengthWatch, "quiet", Quiet(), raising=False)
    ends = []
    for stats in (False, True):
        loop = Loop(optimizer, settings, mode, stats, torch.float32)
        torch.manual_seed(0)
        ends.append(models.network())
        run = loop.run_on_gpu if on_gpu else loop.run
        run(ends[-1])
    assert same_bits(*ends)


TOLERANT = [
    (dtype, optimizer, mode)
    for dtype in (torch.float32, torch.bfloat16)
    for optimizer in ("momentum", "AdamW")
    for mode in MODES
]


@pytest.mark.filterwarnings("ignore:the penalty is too strong")
@pytest.mark.parametrize(("dtype", "optimizer", "mode"), TOLERANT, ids=str)
def test_kept_gradients_are_held_on_a_gpu_without_waiting(dtype, optimizer, mode):
    settings = {"coefficient": 3.0, "tolerance": 0.9}
    loop = Loop(optimizer, settings, mode, dtype=dtype, steps=6)
    torch.manual_seed(0)
    *body, head = models.network()
    alike = [nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh()]  # on a GPU in one stack
    net = nn.Sequential(*body, *alike, head).to(dtype)
    on_gpu = copy.deepcopy(net)
    loop.run(net)
    _, waited = loop.run_on_gpu(on_gpu)
    assert [name for name in waited if "_hold" in name or "_add_held" in name] == []
    if mode == "gradient":  # a move waits once for how far all layers have moved
        assert waited == []
    assert max_difference(on_gpu, net) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_limits_may_be_changed_in_a_training_and_are_checked_then():
    net = dense()
    optimizer = SGD(net.parameters(), lr=0.1)
    callback = HypersphericalUniformity(coefficient=3.0, head=None, share_limit=0.1)
    engine = callback.regularizer.attach(net, watch=False)
    shares = []
    for limit in (0.1, None, 0.02):
        callback.share_limit = limit
        assert engine.share_limit == limit
        give_gradients(net)
        found = engine.add_gradients(optimizer, stats=True)
        shares.append(float(found["0"].share))
    assert shares[0] == pytest.approx(0.1)
    assert shares[1] > 0.2
    assert shares[2] == pytest.approx(0.02)
    for bad in (0, -1, math.nan, True, "0.1"):
        with pytest.raises(ValueError, match="share_limit must be a finite number > 0, or None"):
            callback.share_limit = bad
        with pytest.raises(ValueError, match="step_limit must be a finite number > 0, or None"):
            engine.step_limit = bad
    assert (callback.share_limit, callback.step_limit) == (0.02, 1.0)


@pytest.mark.parametrize(
    ("apply", "said"),
    [
        ("gradient", "share limit: at most 0.05 of the task's gradient in each layer"),
        ("decoupled", "share limit: at most 0.05 of the optimizer's step in each layer"),
        ("loss", "no share limit: in the loss the task's gradient is not known by itself"),
    ],
)
def test_the_table_says_what_the_penalty_is_compared_with(apply, said):
    callback = HypersphericalUniformity(apply=apply, share_limit=0.05, head=None)
    assert callback.summary is None
    callback.regularizer.attach(dense(), watch=False)
    assert f"\n{said}\n" in str(callback.summary)


@pytest.mark.parametrize("limit", [1e38, 1e300])
def test_a_limit_beyond_all_numbers_of_the_dtype_limits_nothing(limit):
    """Where the task has no gradient nothing is added all the same."""
    net = dense(torch.float32)
    engine = UniformityRegularizer(coefficient=3.0, head=None, share_limit=limit)
    engine.attach(net, watch=False)
    give_gradients(net)
    for p in weights_of(net, "3"):
        p.grad.zero_()
    before = {name: p.grad.clone() for name, p in net.named_parameters()}
    engine.add_gradients(SGD(net.parameters(), lr=0.1))
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all()
        if name.startswith("3"):
            assert torch.equal(p.grad, before[name])
    assert (net[0].weight.grad - before["0.weight"]).any()


# Checkpoints, and ranks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", [ranks.sgd, partial(AdamW, lr=0.01)])
def test_a_resumed_fit_ends_with_the_same_bits(optimizer, mode):
    coefficient = {"net.5": Share(0.3), "*": 2.0}
    module, data = Automatic(optimizer), batches()
    ends = []
    for fit in (lambda fit, module, data: fit.fit(module, loader(data)), models.fit_and_resume):
        ends.append(copy.deepcopy(module))
        ours = uniformity(coefficient=coefficient, share_limit=SHARE_LIMIT, apply=mode)
        fit(trainer(ours), ends[-1], data)
    assert same_bits(*ends)


HELD = {"coefficient": 2.0, "share_limit": SHARE_LIMIT}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", [ranks.fit, ranks.fit_sharing])
@pytest.mark.parametrize("optimizer", [ranks.sgd, ranks.adamw])
def test_ranks_hold_layers_by_the_reduced_gradient(optimizer, run, mode):
    make = partial(make_module, Automatic, models.weight_normed_network, make_optimizer=optimizer)
    callback = {"apply": mode, **HELD}
    ends = world(2).run(run, make, callback, ddp, {})
    assert ranks.same_bits(ends)
    assert_held(make, callback, ends)


def assert_held(make, callback, ends, beside=None, tolerance=1e-6):
    """All end as one process does, which ends elsewhere without limits."""
    alone = ranks.fit_alone_once(make, callback, {}, beside)
    without = callback | {"share_limit": None, "step_limit": None}
    free = ranks.fit_alone_once(make, without, {}, beside)
    for end in ends:
        assert ranks.max_difference(end, alone) < tolerance
    assert ranks.max_difference(alone, free) > 10 * tolerance


def steady(parameters):
    """AdamW that makes no step of a rounding error."""
    return AdamW(parameters, lr=0.01, eps=1e-3)


BOUND = {"step_limit": 0.02}
NAMED = {"include": "net"}
SHARDED = [
    ShardedCase("layer by layer"),
    ShardedCase("tensor parallel", sharding.columns_and_rows, (1, 2)),
    ShardedCase("empty shards", mesh=(3, 1), net=sharding.uneven_network),
    ShardedCase("tokens", net=sharding.Tokens, callback=NAMED),
    ShardedCase("weight_norm", net=models.weight_normed_network),
    ShardedCase("AdamW", optimizer=steady, callback=BOUND),
    ShardedCase("tokens, AdamW", net=sharding.Tokens, callback=NAMED | BOUND, optimizer=steady),
    Flat("flat pieces, AdamW", callback=BOUND, optimizer=steady, **pieces),
]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:FSDP2-wrapped module .* returned a view tensor", "ignore:the penalty is too strong"
)
@pytest.mark.parametrize(
    ("case", "mode"),
    [
        pytest.param(case, mode, marks=fsdp2(case), id=f"{case.name}-{mode}")
        for case in SHARDED
        for mode in MODES
    ],
)
def test_ranks_that_share_a_layer_hold_all_of_it(case, mode):
    callback = {"apply": mode, **HELD, **case.callback}
    size = case.mesh[0] * case.mesh[1]
    ends = world(size).run(ranks.fit, case.module(True), callback, case.strategy, case.trainer)
    is_flat = isinstance(case, Flat)
    with as_read_by_ranks(is_flat=is_flat):
        assert_held(case.module(False), callback, ends, is_flat)


def act_on_an_attention(mode, optimizer, is_sharded):
    """Its weights after a step in which the queries' task gradient has a NaN; whole, by name."""
    torch.manual_seed(0)
    net = nn.Module()
    net.attention = nn.MultiheadAttention(8, 2, bias=False)
    grads = [torch.randn(p.shape) for p in net.parameters()]
    grads[0][1, 2] = math.nan
    if is_sharded:
        mesh = init_device_mesh("cpu", (2,))
        grads = [sharding.by_rows(grad, mesh) for grad in grads]
        for part in (net.attention, net.attention.out_proj):
            for name, p in list(part.named_parameters(recurse=False)):
                part.register_parameter(name, nn.Parameter(sharding.by_rows(p.detach(), mesh)))
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    regularizer = UniformityRegularizer(coefficient=3.0, share_limit=SHARE_LIMIT, head=None)
    regularizer.attach(net, watch=False)
    for p, grad in zip(net.parameters(), grads, strict=True):
        p.grad = grad
    if mode == "gradient":
        regularizer.add_gradients(optimizer)
    optimizer.step()
    if mode == "decoupled":
        regularizer.move(optimizer)
    return ranks.whole_tensors(net)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the penalty is too strong", "ignore:.*not finite")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_one_gate_that_is_not_finite_stops_none_of_its_sisters_on_ranks(optimizer, mode):
    alone = act_on_an_attention(mode, optimizer, False)
    for end in world(2).run(act_on_an_attention, mode, optimizer, True):
        for name, p in alone.items():
            torch.testing.assert_close(end[name], p, rtol=0.0, atol=1e-6, equal_nan=True)
