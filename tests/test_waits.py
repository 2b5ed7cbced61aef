"""Layers that are not plain make the host wait for a GPU no more than plain ones, counted with real tensors on a CPU."""

from functools import partial
from unittest import mock

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import SGD
from torch.overrides import TorchFunctionMode

from lightning_hsu import Share, UniformityRegularizer, _trainer
from lightning_hsu._core import pairwise, tables
from lightning_hsu._core.sampling import random_blocks
from lightning_hsu._engine.rows import Rows
from lightning_hsu.measures import Covering, GaussianPotential, RieszEnergy, Sampled
from tests.models import Automatic, batches, loader, trainer, uniformity
from tests.waits import counting, waits_of

STEPS = 12


class Language(nn.Module):
    """A net with a plain layer, a weight-normed one, and a head that is tied to an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(2100, 16)
        self.plain = nn.Linear(16, 40)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(40, 40))
        self.shared = nn.Linear(40, 16)
        self.head = nn.Linear(16, 2100, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = self.plain(self.embedding(tokens)).tanh()
        return self.head(self.shared(self.normed(hidden).tanh()))


SETTINGS = {
    "coefficient": {"shared": Share(0.05), "*": 1e-3},
    "head": "head",
    "sample_above": 2000,
}


def train(between, mode="gradient", **settings):
    """The weights at the end and which layers each step has computed; ``between`` gets each call."""
    net = Language()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    regularizer = UniformityRegularizer(**SETTINGS | settings).attach(net)
    computed = []
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens = torch.arange(24) + step
        loss = nn.functional.cross_entropy(net(tokens), tokens)
        if mode == "loss":
            between(net, step, partial(regularizer.add_to_loss, loss, optimizer))
            loss.backward()
            regularizer.count_step(optimizer)
        else:
            loss.backward()
        if mode == "gradient":
            between(net, step, lambda: regularizer.add_gradients(optimizer))
        optimizer.step()
        if mode == "decoupled":
            between(net, step, lambda: regularizer.move(optimizer))
        elif mode == "loss":
            between(net, step, regularizer.look_for_moves)
        else:
            between(net, step, lambda: regularizer.look_ahead(optimizer))
        computed.append(sorted(regularizer.state.deltas.computed))
    return dict(net.named_parameters()), computed


def as_on_a_gpu(**settings):
    """The same, and what waited at each step but the first, which is looked at."""
    found = []
    with waits_of() as waits:

        def between(net, step, act):
            waits.put_model_there(net)
            with counting(waits, step):
                act()
            if step:
                found.append(dict(waits.found))

        return *train(between, **settings), [one for one in found if one]


@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_no_step_waits_for_shares_computed_weights_or_sampled_heads(tolerance):
    _, schedule = train(lambda net, step, act: act(), tolerance=tolerance)
    weights, computed, waited = as_on_a_gpu(tolerance=tolerance)
    assert waited == []
    assert computed == schedule
    if tolerance is not None:
        assert [] in computed
        assert {"normed", "shared", "head"} <= {name for names in computed[1:] for name in names}
    assert all(bool(p.isfinite().all()) for p in weights.values())


@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_no_loss_waits_for_how_far_neurons_have_moved(tolerance):
    settings = {"mode": "loss", "coefficient": 1e-3, "head": None, "tolerance": tolerance}
    settings["include"] = ["plain", "normed", "shared"]
    _, schedule = train(lambda net, step, act: act(), **settings)
    _, computed, waited = as_on_a_gpu(**settings)
    assert waited == []
    assert computed == schedule
    assert tolerance is None or [] in computed


@pytest.mark.parametrize(("tolerance", "waits"), [(None, 0), (0.05, 1)])
def test_a_move_waits_once_for_how_far_all_layers_have_moved(tolerance, waits):
    """The optimizer has just stepped. Without a tolerance nothing waits."""
    settings = {"mode": "decoupled", "tolerance": tolerance}
    _, schedule = train(lambda net, step, act: act(), **settings)
    _, computed, waited = as_on_a_gpu(**settings)
    assert [sum(one.values()) for one in waited] == [1] * (STEPS - 1) * waits
    assert computed == schedule
    assert tolerance is None or [] in computed


def test_a_search_waits():
    """So the count can be other than 0: Covering looks at the deepest holes in the weights."""
    _, _, waited = as_on_a_gpu(measure=Covering(), include="normed", head=None, coefficient=1e-3)
    assert waited


MEASURES = [
    RieszEnergy(s=2, half_space=True),
    RieszEnergy(s=1),
    GaussianPotential(),
    Sampled(RieszEnergy(s=1), block=20),
    Sampled(GaussianPotential(), block=20),
]


def neurons():
    return torch.randn(2, 70, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def prepared(measure, x):
    return measure.prepare(x) if measure.has_state else None


@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_a_gradient_that_is_not_waited_for_is_that_of_the_measure(measure):
    x = neurons()
    assert measure.gradient_on_gpu(x, prepared(measure, x)) is None  # on a CPU
    with waits_of():
        grad, is_exact = measure.gradient_on_gpu(x, prepared(measure, x))
        assert is_exact
    expected = measure.value_and_grad(x, prepared(measure, x))[1]
    assert torch.allclose(grad, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_it_tells_of_coincident_neurons(measure):
    x = neurons()
    x[1] = x[1, :1]
    with waits_of():
        grad, is_exact = measure.gradient_on_gpu(x, prepared(measure, x))
    assert not is_exact
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("measure", MEASURES[3:], ids=str)
def test_a_sampled_one_tells_of_neurons_that_take_no_part(measure):
    x = neurons()
    x[0, 3] = 0.0
    with waits_of():
        grad, is_exact = measure.gradient_on_gpu(x, prepared(measure, x))
    assert not is_exact
    assert bool(grad.isfinite().all())


def test_a_layer_whose_gradient_was_not_exact_goes_the_exact_way_for_a_while():
    """Coincident neurons of a weight-normed layer part, although one pass gives them no direction."""
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 40)))
    with torch.no_grad():
        net[0].weight = net[0].weight[:1].expand(40, 8).clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = UniformityRegularizer(coefficient=1.0, head=None).attach(net)
    exact, moved = [], []
    with (
        waits_of(),
        mock.patch.object(pairwise, "_gathered", side_effect=pairwise._gathered) as gathered,
    ):
        for _ in range(3):
            before = net[0].weight.detach().clone()
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            regularizer.add_gradients(optimizer)
            optimizer.step()
            exact.append(gathered.call_count > 0)
            moved.append(float((net[0].weight.detach() - before).abs().max()))
    assert exact == [False, True, True]
    assert moved[0] < 1e-6 < 1e-3 < moved[1]


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("stats", [False, True])
def test_coincident_neurons_of_a_plain_layer_part_from_the_next_step_on(stats, looks):
    net = nn.Sequential(nn.Linear(64, 32, dtype=torch.float64))
    with torch.no_grad():
        net[0].weight[-1] = net[0].weight[-2]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def added(count):
        settings = {"coefficient": 1.0, "head": None, "step_limit": None}
        regularizer = UniformityRegularizer(**settings).attach(net)
        found = []
        for _ in range(count):
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            regularizer.add_gradients(optimizer, stats=stats)
            found.append(net[0].weight.grad)
            optimizer.step()
            if looks:
                regularizer.look_ahead(optimizer)
        return found

    (expected,) = added(1)
    with waits_of():
        first, *others = added(4)
    assert first.norm() < 1e-3 * expected.norm()  # one pass gives the two no direction
    for one in others:
        assert torch.allclose(one, expected, rtol=1e-9, atol=1e-9)


class Copies(TorchFunctionMode):
    """Counts copies from the host to a device (meta, for a GPU), and those from ordinary memory."""

    def __init__(self):
        super().__init__()
        self.pinned = []
        self.count = 0
        self.waiting = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.pin_memory:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.to and not args[0].is_meta and result.is_meta:
            self.count += 1
            self.waiting += not any(one is args[0] for one in self.pinned)
        return result


def random_parts(x):
    return random_blocks(torch.arange(len(x[0]), device=x.device), 20, 0)


@pytest.mark.parametrize(
    "act", [random_parts, lambda x: Rows().sketch(x, 10)], ids=["blocks", "rows"]
)
def test_copies_to_a_gpu_come_from_pinned_memory(act, monkeypatch):
    """From ordinary memory they wait for what the GPU has still to do."""
    monkeypatch.setattr(tables, "has_streams", lambda device: device.type == "meta")
    with Copies() as copies:
        act(torch.empty(1, 100, 64, device="meta"))
    assert copies.count == 1
    assert copies.waiting == 0


class Scaler(torch.amp.GradScaler):
    """A GradScaler for a CPU, which asks of a tensor as one for a GPU does."""

    asked = 0

    def get_scale(self):
        self.asked += 1
        return super().get_scale()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_factor_of_a_scaler_is_asked_for_ahead(on_gpu, monkeypatch):
    """Of fused optimizers, which unscale in their own step; only the first factor is waited for."""
    monkeypatch.setattr(_trainer, "reads_late", lambda x: on_gpu)
    scaler = Scaler("cpu", init_scale=2.0**14, growth_interval=2)
    module = Automatic(make_optimizer=partial(SGD, lr=0.1, fused=True))
    fit = trainer(
        uniformity(),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        log_every_n_steps=100,
        max_epochs=1,
    )
    fit.fit(module, loader(batches(6)))
    assert scaler.get_scale() == 2.0**17
    assert scaler.asked == (1 if on_gpu else 6) + 1
