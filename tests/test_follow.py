"""What changes in a model under way is followed by the callback, told, and measured; it never stops a training."""

import copy
import gc
import weakref

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hsu import Share, UniformityRegularizer
from lightning_hsu._monitor.text import RULE, SCORE
from lightning_hsu.measures import Covering
from tests.compatibility import MODES
from tests.models import Automatic, batches, loader, mean_square, trainer, uniformity
from tests.plain import HALF_SPACE
from tests.ranks import Keep


class Once(pl.Callback):
    """Does something at the start of the third batch, or in another hook from then on, once."""

    def __init__(self, act, hook="on_train_batch_start"):
        self.act = act
        setattr(self, hook, self.once)

    def once(self, trainer, pl_module, *_):
        if trainer.global_step >= 2 and self.act is not None:
            self.act(trainer, pl_module)
            self.act = None


class Free(Automatic):
    """Its output may be of any size."""

    def training_step(self, batch, batch_idx):
        return mean_square(self.net(batch[0]), 1.0)


def into_the_optimizer(trainer, *modules):
    for module in modules:
        trainer.optimizers[0].add_param_group({"params": list(module.parameters())})


def new_last_layer(trainer, module):
    module.net.append(nn.Linear(3, 4))
    into_the_optimizer(trainer, module.net[8])


def other_head(trainer, module):
    module.net[7] = nn.Linear(12, 5)
    into_the_optimizer(trainer, module.net[7])


def wrapped_layer(trainer, module):
    module.net[5] = nn.Sequential(module.net[5], nn.Tanh())


def layer_less(trainer, module):
    module.net[5] = nn.Flatten()
    module.net[7] = nn.Linear(32, 3)
    into_the_optimizer(trainer, module.net[7])


class Unknown(nn.Module):
    """Holds a weight in a way that nobody knows."""

    def __init__(self):
        super().__init__()
        self.tensor = nn.Parameter(torch.randn(2, 6, 16))

    def forward(self, x):
        return x @ self.tensor.flatten(0, 1)[:12].T[:, :12].repeat(2, 1)


TOLD = {
    new_last_layer: ["now measured: net.8 (4 x 3)"],
    other_head: ["with other weights: net.7 (5 x 12)"],
    wrapped_layer: ["renamed: net.5 -> net.5.0"],
    layer_less: ["with other weights: net.7 (3 x 32)", "no longer there: net.5 (12 x 32)"],
}


def fit(act, hook="on_train_batch_start", make=Free, **settings):
    callback = uniformity(**{"coefficient": 0.1, "verbose": True, **settings})
    module = make()
    trainer(callback, Once(act, hook), logger=False).fit(module, loader(batches()))
    return module


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("act", TOLD, ids=lambda act: act.__name__)
def test_a_change_is_told_once_and_the_end_table_is_of_the_model_now(act, mode, caplog):
    module = fit(act, apply=mode)
    told = [text for text in caplog.messages if "the model has changed" in text]
    first = "Hyperspherical uniformity: the model has changed:"
    assert told == ["\n  ".join([first, *TOLD[act]])]
    table = next(text for text in caplog.messages if "before and after" in text)
    names = []
    for line in table.splitlines()[3:]:
        if not line.startswith((SCORE, RULE)):
            names.append(line.split()[0])
    layers = [name for name, one in module.named_modules() if hasattr(one, "weight")]
    assert names == layers


def test_the_head_is_found_again(caplog):
    fit(new_last_layer)
    assert "Hyperspherical uniformity: more heads: net.8" in caplog.messages


def test_the_head_is_found_again_in_an_own_loop():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    regularizer = UniformityRegularizer(HALF_SPACE).attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def heads():
        optimizer.zero_grad()
        net(torch.randn(4, 6)).sum().backward()
        regularizer.add_gradients(optimizer)
        optimizer.step()
        return [layer.name for layer in regularizer.layers if layer.target.head]

    assert heads() == ["2"]
    net.append(nn.Linear(5, 4))
    net.append(nn.Linear(4, 3))
    optimizer.add_param_group({"params": [*net[3].parameters(), *net[4].parameters()]})
    heads()  # here the layers are seen
    assert heads() == ["4"]
    assert not net._forward_hooks
    kinds = {layer.name: layer.measure.half_space for layer in regularizer.layers}
    assert kinds == {"0": True, "2": True, "3": True, "4": False}


def hidden_layer(trainer, module, told=True):
    """A layer in a place that held no layer before, where nobody looks."""
    module.net[6].inner = nn.ModuleDict({"layer": nn.Linear(12, 12)})
    if told:
        into_the_optimizer(trainer, module.net[6].inner)


class Behind(nn.Module):
    def forward(self, x):
        inner = getattr(self, "inner", None)
        return x if inner is None else inner["layer"](x)


class WithPlace(Free):
    def __init__(self):
        super().__init__()
        self.net[6] = Behind()


def in_a_place_unwatched(trainer, module):
    hidden_layer(trainer, module)


def in_no_optimizer(trainer, module):
    hidden_layer(trainer, module, told=False)


def test_a_new_layer_is_seen_by_its_optimizer_wherever_it_is(caplog):
    fit(in_a_place_unwatched, make=WithPlace)
    assert any("now measured: net.6.inner.layer (12 x 12)" in text for text in caplog.messages)


def test_a_new_layer_that_no_optimizer_has_is_warned_of_by_name():
    with pytest.warns(UserWarning, match="has not reached layer 'net.6.inner.layer'"):
        fit(in_no_optimizer, make=WithPlace)


def replaced_weight(trainer, module):
    module.net[5].weight = nn.Parameter(torch.randn(12, 32))


@pytest.mark.parametrize("mode", MODES)
def test_a_replaced_weight_that_no_optimizer_has_is_warned_of_by_name(mode):
    with pytest.warns(UserWarning, match="has not reached layer 'net.5'"):
        fit(replaced_weight, apply=mode)


def unknown_layer(trainer, module):
    module.net[5] = Unknown()
    into_the_optimizer(trainer, module.net[5])


def test_a_layer_that_is_replaced_by_one_that_nobody_knows_is_warned_of():
    with pytest.warns(UserWarning, match="nor penalised: 'net.5.tensor': no rule for .*Unknown"):
        fit(unknown_layer)


@pytest.mark.parametrize("coefficient", [0.1, 0.0])
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_can_no_longer_be_measured_is_warned_of(mode, coefficient):
    def unreadable(trainer, module):
        del module.net[5].weight
        module.net[5].forward = lambda x: x[:, :12]

    with pytest.warns(UserWarning, match="no longer measured, nor penalised: 'net.5'"):
        module = fit(unreadable, apply=mode, coefficient=coefficient)
    assert module.trainer.global_step == 14


@pytest.mark.parametrize(
    "settings",
    [{"exclude": "net.5"}, {"include": ["net.5", "net.7"]}, {"coefficient": {"net.5": 0.1}}],
    ids=str,
)
def test_what_was_said_of_a_layer_that_is_gone_stops_nothing(settings):
    assert fit(layer_less, **settings).trainer.global_step == 14


@pytest.mark.parametrize("mode", MODES)
def test_a_model_without_any_layer_left_trains_on(mode):
    def nothing_left(trainer, module):
        module.net = nn.Sequential(nn.Flatten(), Scale())
        into_the_optimizer(trainer, module.net)

    with pytest.warns(UserWarning, match="no layer left to measure, so there is no penalty"):
        module = fit(nothing_left, apply=mode)
    assert module.trainer.global_step == 14


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(36))

    def forward(self, x):
        return x * self.scale


def test_what_was_replaced_is_not_kept():
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    regularizer = UniformityRegularizer().attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    old = weakref.ref(net[0])
    for _ in range(3):
        net[0] = nn.Linear(6, 8)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(torch.randn(4, 6)).sum().backward()
        regularizer.add_gradients(optimizer)
    del optimizer
    gc.collect()
    assert old() is None


class Counted(TorchDispatchMode):
    """Counts what is asked of tensors: each call would be a launch on a GPU, and some a wait."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_looking_asks_nothing_of_a_device():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5))
    nn.utils.parametrizations.weight_norm(net[0])
    regularizer = UniformityRegularizer().attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer.follow([optimizer])
    with Counted() as counted:
        assert not regularizer.follow([optimizer])
        assert not regularizer.follow([optimizer], scan=True)
    assert counted.calls == 0


BROKEN = ["attach", "follow", "find_head", "measure_layers", "current_penalty", "unreached", "idle"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_callback_that_only_monitors_never_stops_a_training(name, monkeypatch):
    """Whatever fails in it, it is told once, and the weights are those without it."""

    def broken(*args, **kwargs):
        raise RuntimeError("broken in the test")

    ends = []
    for coefficient in (0.0, 0.1, None):
        monkeypatch.undo()
        monkeypatch.setattr(UniformityRegularizer, name, broken)
        torch.manual_seed(0)
        module = Automatic()
        fit = trainer(*([] if coefficient is None else [uniformity(coefficient=coefficient)]))
        if coefficient == 0.0:
            with pytest.warns(UserWarning, match="monitors nothing in this fit: broken") as told:
                fit.fit(module, loader(batches()))
            assert sum("monitors nothing" in str(one.message) for one in told) == 1
        elif coefficient is None:
            fit.fit(module, loader(batches()))
        else:
            with pytest.raises(RuntimeError, match="broken in the test"):
                fit.fit(module, loader(batches()))
        ends.append(nn.utils.parameters_to_vector(module.parameters()))
    assert torch.equal(ends[0], ends[2])


class KeepsTheBest(Free):
    """Keeps a copy of its network after each epoch, which nothing trains."""

    def on_train_epoch_end(self):
        self.best = copy.deepcopy(self.net)

    def on_train_end(self):
        self.logged = dict(self.trainer.logged_metrics)


def test_a_copy_that_is_kept_is_no_alarm_and_no_part_of_the_mean(caplog):
    ends = []
    for make in (KeepsTheBest, Free):
        callback = uniformity(coefficient=0.1)
        torch.manual_seed(0)
        fit = trainer(callback, log_every_n_steps=1, max_epochs=3)
        fit.fit(make(), loader(batches()))
        ends.append({name: float(x) for name, x in fit.logged_metrics.items()})
    assert ends[0] == ends[1]


def a_block_grown(trainer, module):
    """A copy of a layer that trains on its own."""
    module.net[6] = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    module.net[6][1].load_state_dict(module.net[6][0].state_dict())
    into_the_optimizer(trainer, module.net[6])


def test_a_copy_that_trains_is_penalised(caplog):
    module = fit(a_block_grown)
    told = next(text for text in caplog.messages if "the model has changed" in text)
    assert "net.6.0 (12 x 12), net.6.1 (12 x 12)" in told
    assert all(p.grad.any() for p in module.net[6].parameters())


def test_a_layer_goes_on_under_another_name():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    regularizer = UniformityRegularizer(Covering(), Share(0.1, smoothing=0.5)).attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        net(torch.randn(4, 6)).square().mean().backward()
        regularizer.add_gradients(optimizer)
        optimizer.step()

    step()
    before = regularizer.state_dict()
    net[0] = nn.Sequential(net[0], nn.Tanh())
    regularizer.follow([optimizer])
    after = regularizer.state_dict()
    for kind in ("states", "shares"):
        assert set(after[kind]) == {"0.0", "2"}
        torch.testing.assert_close(after[kind]["0.0"], before[kind]["0"], rtol=0, atol=0)
    step()
    assert regularizer.unreached() == []


def test_weights_that_no_pattern_takes_any_more_are_warned_of():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    def wrapped(trainer, module):
        module.net = Wrapper(module.net)

    with pytest.warns(UserWarning, match="nor penalised: 'net.inner.5': not in include"):
        fit(wrapped, include=["net.5", "net.7"])


def test_lazy_layers_are_followed_once_they_have_a_shape():
    net = nn.Sequential(nn.Linear(6, 8), nn.LazyLinear(5))
    regularizer = UniformityRegularizer().attach(net)
    assert [layer.name for layer in regularizer.layers] == ["0"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.randn(4, 6)).square().mean().backward()
    before = net[1].weight.grad.clone()
    regularizer.add_gradients(optimizer)
    assert [layer.name for layer in regularizer.layers] == ["0", "1"]
    assert not torch.equal(net[1].weight.grad, before)


def new_lazy_layer(trainer, module):
    module.net.append(nn.LazyLinear(4))
    into_the_optimizer(trainer, module.net[8])


def test_a_new_lazy_layer_is_followed(caplog):
    fit(new_lazy_layer)
    told = [text for text in caplog.messages if "the model has changed" in text]
    assert ["now measured: net.8 (4 x 3)" in text for text in told] == [True]


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_grown_as_a_copy_of_another_is_penalised(mode):
    """At first it has the weights of one that is there, as a copy that is only kept."""

    def grown(trainer, module):
        module.net.insert(6, copy.deepcopy(module.net[5]))
        module.net.insert(6, nn.Linear(12, 32))
        into_the_optimizer(trainer, module.net[6], module.net[7])

    ends = []
    for coefficient in (0.5, 0.0):
        torch.manual_seed(0)
        ends.append(fit(grown, apply=mode, coefficient=coefficient).net[7].weight.detach())
    assert (ends[0] - ends[1]).abs().max() > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_the_optimizer_has_before_the_model_is_followed(mode, caplog):
    class Waiting(Free):
        def __init__(self):
            super().__init__()
            self.pool = [nn.Linear(3, 3)]
            self.extra = nn.ModuleList()

        def training_step(self, batch, batch_idx):
            x = self.net(batch[0])
            for layer in self.extra:
                x = layer(x)
            return mean_square(x, 1.0)

        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), *self.pool[0].parameters()], lr=0.1)

    fit(lambda trainer, module: module.extra.append(module.pool[0]), make=Waiting, apply=mode)
    told = [text for text in caplog.messages if "the model has changed" in text]
    assert ["now measured: extra.0 (3 x 3)" in text for text in told] == [True]


class KeepsAll(Free):
    """Keeps a copy of its network after each epoch in a list that is empty at first."""

    def __init__(self):
        super().__init__()
        self.kept = nn.ModuleList()

    def on_train_epoch_end(self):
        self.kept.append(copy.deepcopy(self.net))


def test_copies_in_a_list_are_no_alarm():
    trainer(uniformity(coefficient=0.1), max_epochs=3).fit(KeepsAll(), loader(batches()))


class Wrapper(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


def test_what_was_said_of_a_layer_that_is_wrapped_holds_or_is_warned_of():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 4))
    settings = {"head": "3", "head_coefficient": 0.7, "neurons": {"0.weight": "columns"}}
    regularizer = UniformityRegularizer(coefficient=0.1, **settings).attach(net)
    net[3] = Wrapper(net[3])
    assert regularizer.follow()
    kinds = {one.name: (one.target.head, one.strength) for one in regularizer.layers}
    assert kinds == {"0": (False, 0.1), "2": (False, 0.1), "3.base": (True, 0.7)}
    net[0] = Wrapper(net[0])
    with pytest.warns(UserWarning, match=r"neurons '0.weight' meets no layer any more"):
        regularizer.follow()
    assert not regularizer.follow()


class InTurns(pl.LightningModule):
    """Each network is frozen while the other has its turn, as many programs of two networks do."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(36, 12), nn.Linear(12, 4)

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        for one, optimizer in zip((self.second, self.first), self.optimizers(), strict=True):
            self.first.requires_grad_(one is self.first)
            self.second.requires_grad_(one is self.second)
            optimizer.zero_grad()
            self.manual_backward(self.second(self.first(x)).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(one.parameters(), lr=0.1) for one in (self.second, self.first)]


@pytest.mark.parametrize("coefficient", [0.1, 0.0])
def test_a_network_that_is_frozen_out_of_its_turn_is_monitored(coefficient):
    logger = Keep()
    callback = uniformity(coefficient=coefficient)
    fit = trainer(callback, logger=logger, log_every_n_steps=1, max_epochs=1)
    fit.fit(InTurns(), loader(batches()))
    ratios = {row["hsu/ratio/second"] for row in logger.rows.values()}
    assert len(ratios) == 7


class Unfreezes(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(False)

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(True)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_unfrozen_after_the_last_step_is_no_alarm(mode):
    callback = uniformity(coefficient=0.1, apply=mode)
    trainer(Unfreezes(), callback, max_epochs=1).fit(Automatic(), loader(batches()))
    trainer(callback, Unfreezes(), max_epochs=2).fit(Automatic(), loader(batches()))


def test_tensors_may_be_swapped():
    """torch.utils.swap_tensors refuses those that somebody holds weakly."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    regularizer = UniformityRegularizer().attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer.follow([optimizer])
    torch.utils.swap_tensors(net[0].weight, nn.Parameter(torch.randn(8, 6)))
    assert not regularizer.follow([optimizer])


def test_a_copy_is_penalised_where_no_optimizer_is_known():
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5))
    regularizer = UniformityRegularizer().attach(net)
    net.insert(1, copy.deepcopy(net[0]))
    regularizer.penalty().backward()
    assert net[1].weight.grad.any()


def test_a_layer_put_beside_others_that_are_none_is_followed():
    net = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh()), nn.Linear(8, 5))
    regularizer = UniformityRegularizer().attach(net)
    net[1].append(nn.Linear(8, 8))
    regularizer.penalty().backward()
    assert net[1][1].weight.grad.any()


def left_out_of_the_optimizer(trainer, module):
    rest = [*module.net[0].parameters(), *module.net[7].parameters()]
    trainer.strategy.optimizers = [torch.optim.SGD(rest, lr=0.1)]


def bypassed(trainer, module):
    module.net[5].forward = lambda x: x[:, :12]


def made_a_buffer(trainer, module):
    weight = module.net[5].weight.detach().clone()
    del module.net[5].weight
    module.net[5].register_buffer("weight", weight)


@pytest.mark.parametrize("mode", ["gradient", "decoupled"])
@pytest.mark.parametrize("act", [left_out_of_the_optimizer, bypassed])
def test_a_layer_that_is_reached_no_longer_is_warned_of(act, mode):
    """It was reached in the epochs before."""
    with pytest.warns(UserWarning, match="has not reached layer .*'net.5'"):
        fit(act, hook="on_train_epoch_end", apply=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_that_becomes_a_buffer_is_warned_of(mode):
    with pytest.warns(UserWarning, match="'net.5': no parameter is behind it any more"):
        fit(made_a_buffer, apply=mode)


def replaced_at_every_step(trainer, module):
    module.net[5].weight = nn.Parameter(module.net[5].weight.detach().clone())
    trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)]


class Every(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, *_):
        replaced_at_every_step(trainer, pl_module)


def test_the_same_change_is_told_once(caplog):
    trainer(Every(), uniformity(coefficient=0.1, verbose=True)).fit(Free(), loader(batches()))
    told = [text for text in caplog.messages if "the model has changed" in text]
    assert len(told) == 1


def test_a_first_forward_pass_within_a_transform_shows_no_head():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    regularizer = UniformityRegularizer(coefficient=0.0).attach(net)
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def loss(weights):
        return torch.func.functional_call(net, weights, (torch.ones(2, 6),)).sum()

    assert torch.func.grad(loss)(weights).keys() == weights.keys()
    net(torch.ones(2, 6)).sum().backward()
    assert [one.name for one in regularizer.layers if one.target.head] == ["2"]


class RefusesOurs(Keep):
    """A logger that fails at the layers' names."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("hsu/ratio/") for name in metrics):
            raise ValueError("names of layers are refused")
        super().log_metrics(metrics, step)


def test_a_logger_that_refuses_is_told_once_and_the_monitor_goes_on():
    """Ranks that share weights measure together: one must not stop alone."""
    callback = uniformity(coefficient=0.0)
    measured = []
    measure = callback.regularizer.measure_layers
    callback.regularizer.measure_layers = lambda **how: measured.append(1) or measure(**how)
    fit = trainer(callback, logger=RefusesOurs(), log_every_n_steps=1, max_epochs=1)
    with pytest.warns(UserWarning, match="monitors nothing in this fit: names of layers") as told:
        fit.fit(Automatic(), loader(batches()))
    assert sum("monitors nothing" in str(one.message) for one in told) == 1
    assert len(measured) == 7
