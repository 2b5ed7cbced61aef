"""Absurd settings: one warning or error each, once, with the way out."""

import copy
import math
import warnings
from unittest import mock

import lightning.pytorch as pl
import pytest
import pytorch_lightning as other
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_hsu import HypersphericalUniformity, Share, UniformityRegularizer
from lightning_hsu._engine import strength
from lightning_hsu._engine.buffered import LateStats, StatsNumbers
from lightning_hsu.measures.defaults import SHARE_LIMIT
from lightning_hsu.metrics import WeightUniformity
from tests import sharding
from tests.models import Adversarial, Automatic, batches, loader, network, trainer, uniformity
from tests.processes import world
from tests.test_callback import rows_of

OURS = ("penal", "Uniformity", "NaN or infinite")


def said(act):
    """Our warnings while something is done."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    texts = [str(one.message) for one in caught]
    return [text for text in texts if any(word in text for word in OURS)]


def fitted(*callbacks, module=None, **settings):
    """Our warnings in a fit."""
    module = Automatic() if module is None else module
    settings = {"max_epochs": 2, **settings}
    return said(lambda: trainer(*callbacks, **settings).fit(module, loader(batches())))


@pytest.mark.parametrize(
    ("fraction", "percent", "meant"), [(5, 500, "For 5 % write Share(0.05)"), (1.5, 150, "0.015")]
)
def test_a_share_in_percent_is_refused(fraction, percent, meant):
    with pytest.raises(ValueError, match=f"{percent} % of the task's gradient") as error:
        Share(fraction)
    assert meant in str(error.value)
    assert "give a number as the coefficient" in str(error.value)


def test_a_share_of_all_is_a_share():
    assert Share(1.0).label() == "share 1"
    with pytest.raises(ValueError, match=r"write Share\(0\.05\)"):
        Share(1000.0)


@pytest.mark.parametrize("apply", ["gradient", "decoupled"])
@pytest.mark.parametrize("settings", [{}, {"log_every_n_steps": 1, "logger": True}])
def test_a_huge_coefficient_is_told_once_a_fit(apply, settings, tmp_path):
    if settings:
        settings = {**settings, "logger": CSVLogger(tmp_path)}
    torch.manual_seed(0)
    callback = uniformity(coefficient=1e6, apply=apply)
    for _ in range(2):
        (text,) = fitted(callback, module=Automatic(), **settings)
        assert text.startswith("the penalty is too strong with coefficient 1e+06: on ")
        assert all(name in text for name in ("'net.0'", "'net.2'", "'net.5'", "'net.7'"))
        assert (
            f"or coefficient=Share({SHARE_LIMIT:g}), which keeps it at {SHARE_LIMIT:.0%};" in text
        )
        assert "12 of 12 neurons" in text


@pytest.mark.parametrize("coefficient", [0.01, 0.3, 1.0, Share(1.0), 0])
@pytest.mark.parametrize("apply", ["gradient", "decoupled"])
def test_an_ordinary_coefficient_is_no_matter(apply, coefficient):
    torch.manual_seed(0)
    assert fitted(uniformity(coefficient=coefficient, apply=apply)) == []


def steps_of(net, regularizer, count, rate=0.1, vanishes=None, ask=False):
    """The steps of one's own loop that were looked at, and our warnings."""
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    looked = []

    def train():
        for step in range(count):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = net(torch.randn(4, 1, 6, 6)).square().mean()
            if vanishes is not None and step >= vanishes:
                loss = loss * 1e-6
            loss.backward()
            stats = regularizer.add_gradients(optimizer, stats=ask)
            assert bool(stats) == ask  # only what was asked for
            optimizer.step()

    watch = regularizer._attached.strength
    see = watch.see

    def spied(optimizer, step, *args, **kwargs):
        looked.append(step)
        return see(optimizer, step, *args, **kwargs)

    watch.see = spied
    texts = said(train)
    return looked, texts


def test_ones_own_loop_is_looked_at_in_its_first_step_and_no_longer():
    net = network()
    looked, texts = steps_of(net, UniformityRegularizer(coefficient=0.01).attach(net), 30)
    assert looked == [0]
    assert texts == []


def test_ones_own_loop_is_told_of_a_huge_coefficient():
    net = network()
    regularizer = UniformityRegularizer(coefficient=1e5).attach(net)
    looked, texts = steps_of(net, regularizer, 15, rate=1e-7)
    assert looked == list(range(10))
    assert len(texts) == 1
    assert "on 10 steps in a row its gradient was more than 10 times the task's" in texts[0]


def test_a_row_of_looks_ends_after_ten_and_one_layer_is_enough():
    net = network()
    given = {"5": 1e4, "*": 1e-3}
    regularizer = UniformityRegularizer(coefficient=given).attach(net)
    looked, texts = steps_of(net, regularizer, 30, rate=1e-7)
    assert looked == list(range(10))
    assert len(texts) == 1
    assert "on 10 steps in a row" in texts[0]
    assert "'5' (" in texts[0]
    assert "'0'" not in texts[0]


def test_a_schedule_that_grows_absurd_is_seen_in_ones_own_loop():
    net = network()
    schedule = {"coefficient": lambda step: 1e5 if step > 30 else 1e-3}
    regularizer = UniformityRegularizer(**schedule, head=None).attach(net)
    looked, texts = steps_of(net, regularizer, 115, rate=1e-7)
    assert looked == [0, *range(100, 110)]
    assert len(texts) == 1


def test_a_schedule_that_grows_absurd_is_seen_when_stats_are_asked_for():
    net = network()
    regularizer = UniformityRegularizer(
        coefficient=lambda step: 1e5 if step > 30 else 1e-3, head=None
    ).attach(net)
    texts = steps_of(net, regularizer, 70, rate=1e-7, ask=True)[1]
    assert len(texts) == 1
    assert "coefficient 100000:" in texts[0]


def test_a_few_duplicates_are_no_absurd_coefficient():
    """Their force is huge, and it is meant to be."""
    net = network()
    with torch.no_grad():
        net[5].weight[1] = net[5].weight[0]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-7)
    regularizer = UniformityRegularizer().attach(net)
    torch.manual_seed(0)
    net(torch.randn(4, 1, 6, 6)).square().mean().backward()
    stats = regularizer.add_gradients(optimizer, stats=True)["5"]
    assert float(stats.share) > 10
    assert int(stats.strong) == 2
    looked, texts = steps_of(net, UniformityRegularizer().attach(net), 20, rate=1e-7)
    assert texts == []
    assert looked == [0]


class Late(nn.Module):
    """A layer behind a gate that starts at 0, as in LoRA and zero-initialised residuals."""

    def __init__(self, gate):
        super().__init__()
        self.layer, self.gate, self.head = nn.Linear(36, 8), gate, nn.Linear(36, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x) + self.gate * self.layer(x).sum(1, keepdim=True)


def test_a_task_without_a_gradient_is_no_absurd_coefficient():
    net = Late(0.0)
    looked, texts = steps_of(net, UniformityRegularizer(coefficient=0.01).attach(net), 20)
    assert (looked, texts) == ([0], [])


def test_a_task_that_vanishes_later_is_no_absurd_coefficient():
    """Then the penalty moves what the task leaves free."""
    net = network()
    regularizer = UniformityRegularizer(coefficient=0.01).attach(net)
    looked, texts = steps_of(net, regularizer, 60, rate=1e-7, vanishes=1, ask=True)
    assert len(looked) == 60
    assert texts == []


def seen_at(tasks):
    """What a watch says of a layer beside an ordinary one; the penalty's gradient is 1 in both."""
    watch = strength.Looks(set())
    for step, task in enumerate(tasks):
        ours = strength.Seen("ours", 1.0, (1, 8, 4), 0, 8, 1.0 / task, task)
        usual = strength.Seen("usual", 1.0, (1, 8, 4), 0, 0, 1.0, 1.0)
        if watch.is_due(step):
            yield watch.see(step, [ours, usual], None, compares=True, is_fixed=True)


def test_a_task_on_its_way_up_from_0_is_no_absurd_coefficient():
    """As behind a factor of LoRA that starts with zeros: its gradient grows step by step."""
    assert not any(seen_at([1e-4 * (step + 1) for step in range(19)]))
    looks = list(seen_at([1e-20 * 6**step for step in range(19)]))
    assert looks == [[]] * 10  # and no more, however long it may go on
    ((found,),) = filter(None, seen_at([1e-4] * 60))
    assert "'ours' (10,000 times)" in found.text


def test_each_optimizer_is_watched():
    module = Adversarial()
    callback = uniformity(coefficient={"second": 1e5, "*": 1e-3})
    (text,) = fitted(callback, module=module)
    assert "'second'" in text


@torch.no_grad()
def spoil(layer, rows=slice(None)):
    layer.weight[rows] = math.nan


class Breaks(Automatic):
    """The weights of a layer, or one neuron of it, turn NaN in the second epoch."""

    def __init__(self, rows=slice(None)):
        super().__init__()
        self.rows = rows

    def on_train_batch_start(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 6:
            spoil(self.net[5], self.rows)


@pytest.mark.parametrize(
    ("settings", "way_out"),
    [
        ({"share_limit": 0.1}, None),
        ({"share_limit": 1.0, "apply": "decoupled"}, None),
        ({"coefficient": Share(0.1)}, None),
        ({"coefficient": 0.0}, None),
        ({"share_limit": 1e9}, f"take share_limit={SHARE_LIMIT:g}, or a smaller coefficient"),
        ({"share_limit": None}, f"take share_limit={SHARE_LIMIT:g}, or a smaller coefficient"),
        ({"share_limit": 0.1, "apply": "loss"}, "a smaller coefficient, or apply='gradient' with"),
    ],
)
def test_a_penalty_that_nothing_limits_is_named_as_a_cause_of_nan(settings, way_out):
    callback = uniformity(**{"coefficient": 0.1, **settings})
    (text,) = said(lambda: trainer(callback, max_epochs=2).fit(Breaks(), loader(batches())))
    assert "Lower the learning rate, or find the first bad step" in text
    assert ("The penalty may be the cause" in text) == (way_out is not None)
    assert way_out is None or way_out in text


def test_before_the_first_step_it_is_no_cause():
    module = Breaks()
    spoil(module.net[5], slice(3, 4))
    callback = uniformity(coefficient=0.1, verbose=True)
    texts = said(lambda: trainer(callback, max_epochs=1).fit(module, loader(batches())))
    assert "Lower the learning rate" in texts[0]
    assert "The penalty may be the cause" not in texts[0]


NOTED = ("hsu/penalty", "hsu/ratio_mean", "hsu/ratio_max", "hsu/angle_min")


@pytest.mark.parametrize("rows", [slice(None), slice(3, 4)], ids=["all", "one"])
@pytest.mark.parametrize("apply", ["gradient", "loss", "decoupled"])
def test_nan_weights_never_look_good(rows, apply, tmp_path):
    stop = EarlyStopping("hsu/penalty", patience=100, check_finite=True)
    save = ModelCheckpoint(tmp_path, monitor="hsu/ratio_max", filename="{epoch}", save_top_k=1)
    callback = uniformity(coefficient=0.1, apply=apply)
    fit = trainer(callback, stop, save, max_epochs=4, enable_checkpointing=True)
    texts = said(lambda: fit.fit(Breaks(rows), loader(batches())))
    (text,) = texts  # though no step was a logging step
    assert text.startswith("NaN or infinite weights in layer 'net.")
    assert fit.current_epoch == 2  # stopped by what is not finite
    assert "epoch=0" in save.best_model_path
    for name in NOTED:
        assert math.isnan(float(fit.callback_metrics[name])), name


class SpoilLast(pl.Callback):
    """One neuron turns NaN after the last step, where no forward pass spreads it."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 6:
            spoil(pl_module.net[5], 3)


def test_layers_and_table_of_nan_weights(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("lightning_hsu.callback.rank_zero_info", told.append)
    logger = CSVLogger(tmp_path)
    callback = HypersphericalUniformity(coefficient=0.0)
    settings = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 1}
    (text,) = fitted(SpoilLast(), callback, **settings)
    assert "layer 'net.5' (12 x 32): 1 neuron." in text
    row = rows_of(logger)[6]
    for name in NOTED:
        assert math.isnan(row[name])
    for name in ("ratio", "energy", "min_angle"):
        assert math.isnan(row[f"hsu/{name}/net.5"])
    (line,) = [line for line in told[-1].splitlines() if line.startswith("net.5")]
    assert line.endswith("  1 NaN or infinite")


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_the_metric_of_nan_weights_is_nan(reduction):
    net = network()
    metric = WeightUniformity(reduction=reduction)
    assert math.isfinite(float(metric(net)))
    spoil(net[5], 2)
    for model in (net, net.state_dict()):
        for quantity in ("ratio", "penalty", "energy", "min_angle"):
            metric = WeightUniformity(reduction=reduction, quantity=quantity)
            assert math.isnan(float(metric(model)))
    by_layer = WeightUniformity(reduction="none")(net)
    assert math.isnan(by_layer["5"])
    assert math.isfinite(by_layer["0"])


class Validated(Automatic):
    def validation_step(self, batch, batch_idx):
        return None

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_without_a_fit_the_callback_says_what_to_use(stage):
    fit, data = trainer(uniformity()), loader(batches())
    run = getattr(fit, stage)
    (text,) = said(lambda: run(Validated(), dataloaders=data))
    assert f"acts and measures only in trainer.fit; in trainer.{stage} it does nothing" in text
    assert "lightning_hsu.report.report(model)" in text
    assert said(lambda: run(Validated(), dataloaders=data)) == []


def test_after_a_fit_testing_is_as_it_should_be():
    fit, data = trainer(uniformity(), max_epochs=1), loader(batches())
    assert said(lambda: fit.fit(Validated(), data, data)) == []
    assert said(lambda: fit.test(Validated(), data)) == []


PREFIXES = "two HypersphericalUniformity callbacks have the prefix 'hsu', .*: give each its own"


@pytest.mark.parametrize("package", [pl, other])
def test_two_callbacks_of_one_prefix(package):
    with pytest.raises(ValueError, match=PREFIXES):
        package.Trainer(callbacks=[uniformity(), uniformity(include="x")], logger=False)
    callbacks = [uniformity(), uniformity(prefix="hsu_2")]
    assert callbacks[0].state_key != callbacks[1].state_key
    package.Trainer(callbacks=callbacks, logger=False, accelerator="cpu")


class Own(HypersphericalUniformity):
    """A user's subclass, whose state has another key, and the metrics the same names."""


def test_a_subclass_of_the_same_prefix():
    with pytest.raises(ValueError, match=PREFIXES):
        trainer(uniformity(), Own())


class Configured(Automatic):
    """The module gives the callbacks; Lightning does not compare these."""

    coefficient = 0.1

    def configure_callbacks(self):
        return [uniformity(coefficient=self.coefficient), uniformity(coefficient=0)]


def test_two_callbacks_of_the_module_with_one_prefix():
    module = Configured()
    with pytest.raises(ValueError, match=PREFIXES):
        trainer().fit(module, loader(batches()))
    module.coefficient = 0
    (text,) = fitted(module=module)  # monitoring stops nothing
    assert "prefix='hsu_2'" in text


def test_a_layer_with_two_penalties_is_told_once_a_fit():
    chain = [uniformity(), uniformity(prefix="more", coefficient={"net.5": 0.1})]
    for _ in range(2):
        (text,) = fitted(*chain, max_epochs=1)
        assert text.startswith(
            "the callbacks with the prefixes 'hsu' and 'more' both penalise layer 'net.5': their "
            "penalties add up, each to its own limits, so that these add up, too."
        )
        assert "exclude=" in text


@pytest.mark.parametrize(
    "second", [{"coefficient": 0}, {"include": "net.7"}, {"coefficient": {"net.7": 0.1}}]
)
def test_callbacks_that_share_no_penalty_are_no_matter(second):
    first = uniformity(exclude="net.7")
    assert fitted(first, copy.deepcopy(uniformity(prefix="b", **second)), max_epochs=1) == []


def looks_of_a_rank(disagrees):
    """The steps that this rank looked at, and its warnings; rank 1 may read other numbers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 4))
    for part in (net[1], net[3], net):
        sharding.fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    regularizer = UniformityRegularizer(coefficient=1e5, head=None).attach(net)
    if disagrees and distributed.get_rank() == 1:
        weak = StatsNumbers(share=0.0, limited=0, strong=0, task=1.0, held=False)
        with mock.patch.object(LateStats, "read", return_value={"1": weak, "3": weak}):
            return steps_of(net, regularizer, 14, rate=1e-7)
    return steps_of(net, regularizer, 14, rate=1e-7)


@pytest.mark.slow
@sharding.needs_fsdp2
@pytest.mark.parametrize("disagrees", [False, True])
def test_ranks_look_at_the_same_steps_and_the_first_tells(disagrees):
    """Stats of sharded layers are collective calls: a rank that looks alone would wait for ever."""
    first, second = world(2).run(looks_of_a_rank, disagrees)
    assert first[0] == second[0] == list(range(10))
    assert "'1' (" in first[1][0]
    assert "'3' (" in first[1][0]
    assert (len(first[1]), second[1]) == (1, [])
