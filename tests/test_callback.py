"""What a user of the callback sees: metrics, the table, warnings, errors, state; and what Lightning demands."""

import copy
import csv
import logging
import math
import pickle
from contextlib import nullcontext

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning as other
import torch
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_hsu import HypersphericalUniformity, Share, UniformityRegularizer
from lightning_hsu._core import smallest_angle
from lightning_hsu.measures import Covering, RieszEnergy
from lightning_hsu.measures.defaults import DEFAULT_MEASURE
from lightning_hsu.reference import uniformity_ratio
from tests.models import Adversarial, Automatic, Manual, batches, loader, trainer, uniformity

AGGREGATES = {
    "hsu/penalty",
    "hsu/ratio_mean",
    "hsu/ratio_max",
    "hsu/angle_min",
    "hsu/dead",
    "hsu/limited",
}


def rows_of(logger):
    """Logged rows by step, empty cells left out."""
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    merged = {}
    for row in rows:
        merged.setdefault(int(row["step"]), {}).update(row)
    return merged


def test_logged_numbers_are_those_of_the_weights(tmp_path):
    module, logger = Automatic(), CSVLogger(tmp_path)
    callback = uniformity(coefficient=0.3)
    trainer(callback, logger=logger, log_every_n_steps=7, max_epochs=1).fit(
        module, loader(batches())
    )
    rows = rows_of(logger)
    assert list(rows) == [6]
    row = rows[6]
    layers = {"net.0": (0, 1), "net.2": (2, 2), "net.5": (5, 1), "net.7": (7, 1)}
    penalty = 0.0
    ratios = []
    angles = []
    for name, (index, groups) in layers.items():
        measure = DEFAULT_MEASURE
        neurons = (
            module.net[index]
            .weight.detach()
            .reshape(groups, -1, module.net[index].weight[0].numel())
        )
        ratio = float(uniformity_ratio(measure, neurons).mean())
        angle = float(smallest_angle(neurons, half_space=measure.half_space).min().rad2deg())
        assert row[f"hsu/energy/{name}"] == pytest.approx(float(measure(neurons).mean()), rel=1e-6)
        assert row[f"hsu/ratio/{name}"] == pytest.approx(ratio, rel=1e-6)
        assert row[f"hsu/min_angle/{name}"] == pytest.approx(angle, rel=1e-5)
        assert row[f"hsu/gradient_share/{name}"] > 0
        penalty += 0.3 * float(measure(neurons).mean())
        ratios.append(ratio)
        angles.append(angle)
    assert row["hsu/penalty"] == pytest.approx(penalty, rel=1e-6)
    assert row["hsu/ratio_mean"] == pytest.approx(sum(ratios) / 4, rel=1e-6)
    assert row["hsu/ratio_max"] == pytest.approx(max(ratios), rel=1e-6)
    assert row["hsu/angle_min"] == pytest.approx(min(angles), rel=1e-5)
    assert row["hsu/dead"] == row["hsu/limited"] == 0


def test_gradient_share_is_the_norm_of_what_was_added_over_the_tasks(tmp_path):
    module = Automatic()
    logger = CSVLogger(tmp_path)
    seen = {}

    class Before(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen["before"] = pl_module.net[5].weight.grad.clone()

    class After(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen["after"] = pl_module.net[5].weight.grad.clone()

    chain = (Before(), uniformity(coefficient=0.3), After())
    trainer(*chain, logger=logger, log_every_n_steps=1, max_steps=1).fit(module, loader(batches()))
    share = (seen["after"] - seen["before"]).norm() / seen["before"].norm()
    assert rows_of(logger)[0]["hsu/gradient_share/net.5"] == pytest.approx(float(share), rel=1e-4)


@pytest.mark.parametrize("mode", ["gradient", "decoupled"])
def test_what_the_last_step_with_a_penalty_did_is_logged(mode, tmp_path):
    """Also where logging steps have none."""
    logger = CSVLogger(tmp_path)
    ours = uniformity(coefficient=0.3, every_n_steps=2, apply=mode)
    trainer(ours, logger=logger, log_every_n_steps=4, max_epochs=1).fit(
        Automatic(), loader(batches(12))
    )
    rows = rows_of(logger)
    assert sorted(rows) == [3, 7, 11]  # the penalty acts on steps 0, 2, 4 and so on
    for row in rows.values():
        assert row["hsu/gradient_share/net.5"] > 0
        assert row["hsu/limited"] == 0


def test_only_the_last_step_with_a_penalty_before_a_measurement_is_looked_at(monkeypatch):
    found = []
    add = UniformityRegularizer.add_gradients

    def noted(self, *args, **kwargs):
        found.append(kwargs["stats"])
        return add(self, *args, **kwargs)

    monkeypatch.setattr(UniformityRegularizer, "add_gradients", noted)
    trainer(uniformity(coefficient=0.3, every_n_steps=3), log_every_n_steps=8, max_epochs=1).fit(
        Automatic(), loader(batches(20))
    )
    # Logging steps are the 8th and the 16th; the first and the last are measured, too.
    assert [step for step, stats in enumerate(found) if stats] == [0, 5, 6, 7, 13, 14, 15, 19]


def test_the_share_is_that_of_unscaled_gradients_and_absent_where_nothing_was_added(tmp_path):
    shares = []
    for plugins in (
        [],
        [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))],
    ):
        logger = CSVLogger(tmp_path, version=len(shares))
        torch.manual_seed(0)
        module = Automatic(make_optimizer=lambda p: torch.optim.Adam(p, fused=True))
        settings = {"logger": logger, "log_every_n_steps": 1, "max_steps": 2, "plugins": plugins}
        trainer(uniformity(coefficient=0.3, every_n_steps=2), **settings).fit(
            module, loader(batches())
        )
        rows = rows_of(logger)
        assert "hsu/gradient_share/net.5" not in rows[1]
        shares.append(rows[0]["hsu/gradient_share/net.5"])
    assert shares[0] == pytest.approx(shares[1], rel=1e-2)  # float16 forward


def test_off_logging_steps_nothing_is_noted(monkeypatch):
    callback, asked = uniformity(coefficient=0.1), []
    add = callback.regularizer.add_gradients
    monkeypatch.setattr(
        callback.regularizer,
        "add_gradients",
        lambda *a, **k: asked.append(k["stats"]) or add(*a, **k),
    )
    trainer(callback, log_every_n_steps=4, max_epochs=1).fit(Automatic(), loader(batches()))
    assert asked == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_layers_are_logged_on_logging_steps_only(tmp_path, accumulate, monkeypatch):
    callback = uniformity(coefficient=0.1)
    logger = CSVLogger(tmp_path)
    measured = []
    measure = callback.regularizer.measure_layers
    monkeypatch.setattr(
        callback.regularizer, "measure_layers", lambda: measured.append(1) or measure()
    )
    settings = {
        "logger": logger,
        "log_every_n_steps": 5,
        "accumulate_grad_batches": accumulate,
        "max_epochs": 1,
    }
    fit = trainer(callback, **settings)
    fit.fit(Automatic(), loader(batches(count=24)))
    steps = {step for step, row in rows_of(logger).items() if "hsu/ratio/net.5" in row}
    assert steps == set(range(4, fit.global_step, 5))
    assert set(rows_of(logger)[4]) >= AGGREGATES
    # the first step, the logging steps and the end of the epoch; nothing in between
    assert len(measured) == len({1, *(step + 1 for step in steps), fit.global_step})


def test_no_logged_name_is_a_folder_of_another(tmp_path):
    """MLflow's file store keeps a metric a file, and a name with a slash in a folder."""
    logger = CSVLogger(tmp_path)
    trainer(uniformity(), logger=logger, log_every_n_steps=1, max_epochs=1).fit(
        Automatic(), loader(batches())
    )
    names = set().union(*rows_of(logger).values())
    assert len(names) > len(AGGREGATES)
    assert not [(one, two) for one in names for two in names if two.startswith(f"{one}/")]


def test_nothing_happens_off_logging_steps_when_only_monitoring(monkeypatch):
    """No pass over the weights and no synchronisation: the engine is not even asked for neurons."""
    callback, calls = uniformity(coefficient=0), []
    fit = trainer(callback, log_every_n_steps=100, max_epochs=1)

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                for layer in callback.regularizer.layers:
                    monkeypatch.setattr(
                        type(layer.target), "neurons", lambda self: calls.append(self.name)
                    )
            if batch_idx == 6:
                monkeypatch.undo()

    fit.callbacks.append(Spy())
    fit.fit(Automatic(), loader(batches()))
    assert calls == []


@pytest.mark.parametrize("module", [Automatic, Manual])
def test_early_stopping_and_checkpoints_can_watch_the_aggregates(tmp_path, module):
    """Also in epochs shorter than log_every_n_steps, Lightning's default of 50."""

    class Validated(module):
        def validation_step(self, batch, batch_idx):
            return None

    stop = EarlyStopping("hsu/ratio_mean", patience=100, mode="min", strict=True)
    save = ModelCheckpoint(tmp_path, monitor="hsu/angle_min", mode="max", filename="{epoch}")
    limited = EarlyStopping("hsu/limited", patience=100, strict=True)
    data = loader(batches())
    trainer(
        uniformity(coefficient=0.1),
        stop,
        limited,
        save,
        max_epochs=3,
        enable_checkpointing=True,
        logger=False,
    ).fit(Validated(), data, data)
    assert float(stop.best_score) > 0
    assert float(save.best_model_score) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"barebones": True, "logger": None},
        {"fast_dev_run": True},
        {"logger": False, "log_every_n_steps": 0},
        {"overfit_batches": 1},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*barebones.*", "ignore:.*overfit.*", "ignore:.*predict.*")
def test_unusual_trainers(settings):
    settings = {"enable_checkpointing": False, **settings}
    if "barebones" in settings:
        settings |= {
            "enable_checkpointing": None,
            "enable_progress_bar": None,
            "enable_model_summary": None,
        }
    module = Automatic()
    before = module.net[5].weight.detach().clone()
    trainer(uniformity(coefficient=0.1), **settings).fit(module, loader(batches()))
    assert not torch.equal(before, module.net[5].weight)


def test_the_table_at_the_start_of_fit(caplog):
    with caplog.at_level(logging.INFO):
        trainer(uniformity(coefficient={"net.5": 0.2}, verbose=True), fast_dev_run=True).fit(
            Automatic(), loader(batches())
        )
    table = next(
        record.message for record in caplog.records if "Hyperspherical uniformity" in record.message
    )
    assert "head (last before the loss)" in " ".join(table.split())
    assert table.splitlines()[2:4] == [
        "measure: RieszEnergy(s=2.0)",
        "",
    ]
    rows = {}
    for line in table.splitlines():
        if line.startswith("net."):
            name, *words = line.split()
            rows[name] = " ".join(words)
    assert rows["net.0"] == "6 x 9 0 0 (monitor only)"
    assert rows["net.2"].startswith("2 groups of 4 x 27")
    assert rows["net.5"].endswith("0.2")
    assert rows["net.7"].startswith("3 x 12 0 0 (monitor only) head")
    assert table.splitlines()[-1] == "measured: 100 % of the entries of all weight matrices"


class Lazy(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))

    training_step = Automatic.training_step
    silent = ()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Configured(Automatic):
    def __init__(self):
        super().__init__(net=nn.Identity())

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("make", [Lazy, Configured])
@pytest.mark.filterwarnings("ignore:.*[Ll]azy modules.*", "ignore:.*UninitializedParameter.*")
def test_models_built_late(make):
    """Lazy layers have no shape before the first batch, configure_model runs after setup: the penalty is there all the same."""
    seen = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append([layer.target.name for layer in trainer.callbacks[0].regularizer.layers])

    trainer(uniformity(coefficient=0.1), Spy(), max_epochs=1).fit(make(), loader(batches()))
    assert seen[0] == ["net.1", "net.3"]


def test_a_non_finite_weight_is_reported_with_its_layer():
    module = Automatic()

    class Break(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 4:
                with torch.no_grad():
                    pl_module.net[5].weight[2, 1] = float("nan")

    with pytest.warns(
        UserWarning, match=r"NaN or infinite weights in layer 'net.5' \(12 x 32\): 1 neuron"
    ):
        trainer(Break(), uniformity(coefficient=0.1), log_every_n_steps=2, max_steps=4).fit(
            module, loader(batches())
        )


class Raw(Manual):
    """Steps an optimizer behind Lightning's back."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.net(batch[0]).square().mean())
        optimizer.step()


def test_a_penalty_that_does_not_arrive_is_said_once():
    module = Automatic(make_optimizer=lambda p: torch.optim.SGD(list(p)[2:], lr=0.1))
    with pytest.warns(
        UserWarning,
        match=r"the penalty has not reached layer 'net.0' in this epoch: .*in no optimizer",
    ) as caught:
        trainer(uniformity(coefficient=0.1)).fit(module, loader(batches()))
    assert sum("has not reached" in str(one.message) for one in caught) == 1
    with pytest.warns(
        UserWarning,
        match=r"layer 'net.0', 'net.2', 'net.5', 'net.7' in this epoch: .*use_pl_optimizer=False",
    ):
        trainer(uniformity(coefficient=0.1), max_epochs=1).fit(Raw(), loader(batches()))


def test_numbers_of_numpy_are_numbers():
    for given in (np.float32(0.5), np.int64(2)):
        regularizer = UniformityRegularizer(
            RieszEnergy(s=given), {"net.0": given}, step_limit=given
        ).attach(Automatic())
        assert regularizer.layers[0].strength == float(given)
        assert regularizer.measure_layers()[0].ratio > 0


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"coefficient": -1},
            ValueError,
            r"coefficient must be a finite number >= 0 \(0 only monitors\); got -1",
        ),
        ({"coefficient": float("nan")}, ValueError, "coefficient must be a finite number"),
        (
            {"coefficient": {"a": 1.0, "b": -2.0}},
            ValueError,
            r"coefficient\['b'\] must be a finite number >= 0",
        ),
        ({"coefficient": {}}, ValueError, "empty mapping"),
        (
            {"coefficient": "strong"},
            TypeError,
            "a number, a schedule step -> number, a Share or a mapping",
        ),
        ({"head_coefficient": -1}, ValueError, "head_coefficient must be"),
        (
            {"head_coefficient": {"a": 1.0}},
            TypeError,
            "head_coefficient is a number or a schedule, not a mapping",
        ),
        (
            {"apply": "later"},
            ValueError,
            "apply must be 'gradient', 'loss' or 'decoupled'; got 'later'",
        ),
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be an int >= 1; got 0"),
        ({"step_limit": 0}, ValueError, "step_limit must be a finite number > 0"),
        (
            {"step_limit": "a"},
            ValueError,
            "step_limit must be a finite number > 0, or None for no limit; got 'a'",
        ),
        ({"share_limit": math.inf}, ValueError, "share_limit must be a finite number > 0.*got inf"),
        ({"share_limit": 10**400}, ValueError, r"got about 10\*\*400$"),
        ({"share_limit": torch.tensor(0.1)}, ValueError, r"got tensor\(0.1000\)$"),
        ({"share_limit": "0.1"}, ValueError, "share_limit must be a finite number > 0.*got '0.1'"),
        ({"share_limit": True}, ValueError, "share_limit must be a finite number > 0.*got True"),
        (
            {"share_limit": Share(0.1)},
            TypeError,
            r"None for no limit; got a Share: did you mean coefficient=Share\(0.1\)\?",
        ),
        ({"prefix": ""}, ValueError, "prefix must be a name such as 'hsu'"),
        ({"prefix": "a/"}, ValueError, "without a slash at its end; got 'a/'"),
        ({"measure": "strong"}, TypeError, "measure must be a measure such as"),
    ],
)
def test_bad_settings_fail_at_once(kwargs, error, message):
    with pytest.raises(error, match=message):
        HypersphericalUniformity(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"s": float("nan")}, "s must be a finite real number"),
        ({"s": "2"}, "s must be a finite real number"),
        ({"distance": "cosine"}, "distance must be 'chordal' or 'geodesic'"),
        ({"half_space": "yes"}, "half_space must be True or False; got 'yes'"),
        ({"softening": 3}, r"softening must be a chord in \[0, 2\)"),
    ],
)
def test_bad_measures(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RieszEnergy(**kwargs)


def test_bad_neurons():
    with pytest.raises(ValueError, match=r"shape \(\.\.\., n, d\).*got shape \(4,\)"):
        RieszEnergy()(torch.randn(4))
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        RieszEnergy()(torch.ones(4, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"include": "conv"}, "include pattern 'conv' matches no layer; the layers are: net.0"),
        ({"coefficient": {"nets.0": 1.0}}, "coefficient pattern 'nets.0' matches no layer"),
        ({"coefficient": lambda step: -1.0}, r"gave -1.0 for layer 'net.0' at optimizer step 0"),
    ],
)
def test_bad_settings_for_this_model(kwargs, message):
    callback = uniformity(**kwargs)
    with pytest.raises(ValueError, match=message):
        trainer(callback).fit(Automatic(), loader(batches()))
    assert callback.regularizer.layers == []  # cleaned up although fit never ended


class OwnXLA(strategies.XLAStrategy):
    """Derived, as its parent is from that of DDP, from one that is not known."""


@pytest.mark.parametrize("apply", ["gradient", "loss", "decoupled"])
@pytest.mark.parametrize("kind", [strategies.DeepSpeedStrategy, strategies.XLAStrategy, OwnXLA])
def test_a_strategy_that_hides_weights_is_refused_by_name(kind, apply):
    fit = trainer()
    fit.strategy.__class__ = kind  # they do not start on a CPU
    with pytest.raises(
        NotImplementedError, match=rf"does not support {kind.__name__}: .*Use 'ddp', 'fsdp'"
    ):
        uniformity(apply=apply).on_fit_start(fit, Automatic())


@pytest.mark.parametrize("apply", ["gradient", "loss", "decoupled"])
def test_the_logged_loss_is_that_of_the_task(apply, tmp_path):
    class Logged(Automatic):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            return loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.returned = outputs["loss"].clone()

    module = Logged()
    twin, kept = copy.deepcopy(module), []
    for one, ours in ((module, [uniformity(coefficient=10.0, apply=apply)]), (twin, [])):
        fit = trainer(*ours, max_steps=1, log_every_n_steps=1, logger=CSVLogger(tmp_path))
        fit.fit(one, loader(batches()))
        kept.append((fit.logged_metrics["train_loss"], one.returned))
    assert kept[0] == kept[1]
    assert not torch.equal(module.net[5].weight, twin.net[5].weight)


@pytest.mark.filterwarnings("ignore:the penalty is too strong")  # of a task close to 0
@pytest.mark.parametrize("apply", ["gradient", "decoupled"])
def test_steps_that_lightning_does_not_count_are_counted(apply):
    """A recipe for two optimizers silences what counts the steps of one, so that ``global_step`` counts batches."""

    class Silenced(Adversarial):
        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            second._on_before_step = second._on_after_step = lambda: None
            self.zero_grad()
            self.manual_backward(self.losses(batch)[0])
            first.step()
            for _ in range(3):
                self.zero_grad()
                self.manual_backward(self.losses(batch)[1])
                second.step()

    states = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            states.append(list(callback.state_dict()["steps"]))

    callback = uniformity(apply=apply)
    trainer(callback, Look(), max_epochs=1).fit(Silenced(), loader(batches(4)))
    assert states == [[k, 3 * k] for k in range(1, 5)]


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(1, 4, 3), weight_norm(nn.Conv2d(1, 4, 3))]
)
def test_an_optimizer_of_biases_does_not_reach_the_neurons(layer):
    regularizer = UniformityRegularizer(head=None).attach(layer)
    layer(torch.ones(1, 1, 6, 6)).sum().backward()
    regularizer.add_gradients(torch.optim.SGD([layer.bias], lr=0.1))
    assert len(regularizer.unreached()) == 1
    regularizer.add_gradients(torch.optim.SGD(layer.parameters(), lr=0.1))
    assert regularizer.unreached() == []


def test_a_share_needs_the_tasks_gradient_apart():
    for kwargs in (
        {"coefficient": Share()},
        {"coefficient": {"*": Share()}},
        {"head_coefficient": Share(0.1)},
    ):
        with pytest.raises(
            ValueError,
            match="Share needs the task's gradient apart from the loss: use apply='gradient'",
        ):
            HypersphericalUniformity(apply="loss", **kwargs)


def test_a_resumed_schedule_finds_its_optimizer_whichever_steps_first():
    callback = uniformity(coefficient=0.1)
    callback.load_state_dict({"steps": [5, 9]})
    module, fit = Automatic(), trainer()
    parts = module.net[:5].parameters(), module.net[5:].parameters()
    one, two = (torch.optim.SGD(part, lr=0.1) for part in parts)
    fit.strategy.optimizers = [one, two]
    callback.regularizer.attach(module)
    callback.on_before_optimizer_step(fit, module, two)
    assert callback.regularizer.state_dict() == {"version": 1, "steps": [5, 10]}


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_schedules_go_on_from_a_checkpoint(tmp_path):
    used = []

    def schedule(step):
        used.append(step)
        return 0.1

    data = loader(batches())
    save = ModelCheckpoint(tmp_path, save_last=True)
    settings = {"enable_checkpointing": True, "logger": False}
    trainer(uniformity(coefficient=schedule, include="net.5"), save, max_epochs=1, **settings).fit(
        Automatic(), data
    )
    assert sorted(set(used)) == list(range(7))
    used.clear()
    again = trainer(uniformity(coefficient=schedule, include="net.5"), max_epochs=2)
    again.fit(Automatic(), data, ckpt_path=tmp_path / "last.ckpt")
    assert sorted(set(used)) == list(range(7, 14))


def test_two_instances_have_their_own_keys_and_state():
    first = uniformity(coefficient=0.1, include="net.0")
    second = uniformity(coefficient=0.2, include="net.5", prefix="dense")
    assert first.state_key != second.state_key
    assert uniformity(coefficient=0.9, include=["net.*"]).state_key == first.state_key
    with pytest.raises(ValueError, match="prefix='hsu_2'"):
        trainer(first, uniformity(include="net.5"))
    fit = trainer(first, second, max_epochs=1)
    fit.fit(Automatic(), loader(batches()))
    assert {"hsu/penalty", "dense/penalty"} <= set(fit.callback_metrics)


def test_one_instance_serves_two_fits_and_keeps_no_model():
    callback = uniformity(coefficient=0.1)
    for module in (
        Automatic(),
        Automatic(net=nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 3))),
    ):
        trainer(callback, max_epochs=1).fit(module, loader(batches()))
        assert callback.regularizer.layers == []
    assert callback.state_dict() == {"version": 1, "steps": [7]}


def test_a_second_fit_of_the_same_trainer_goes_on_counting():
    callback = uniformity(coefficient=0.1)
    data = loader(batches())
    module = Automatic()
    fit = trainer(callback, max_epochs=1)
    fit.fit(module, data)
    fit.fit_loop.max_epochs = 2
    fit.fit(module, data)
    assert callback.state_dict() == {"version": 1, "steps": [14]}
    assert fit.global_step == 14


def test_a_new_trainer_counts_from_zero_after_a_fit_of_one_step():
    seen = []
    callback = uniformity(coefficient=lambda step: seen.append(step) or 0.1, include="net.5")
    data = loader(batches())
    trainer(callback, fast_dev_run=True).fit(Automatic(), data)
    seen.clear()
    trainer(callback, max_epochs=1).fit(Automatic(), data)
    assert sorted(set(seen)) == list(range(7))
    assert callback.state_dict() == {"version": 1, "steps": [7]}


@pytest.mark.parametrize("kwargs", [{"coefficient": lambda step: 0.0}, {"every_n_steps": 5}])
def test_no_false_alarm_where_the_penalty_only_waits(kwargs):
    """Warnings are errors here: a warm-up at 0, and a resumed epoch that every_n_steps leaves out."""
    callback = uniformity(**kwargs)
    fit = trainer(callback, max_steps=2, max_epochs=-1)
    callback.setup = lambda *_, **__: callback.regularizer.load_state_dict({"steps": [1]})
    fit.fit(Automatic(), loader(batches(count=2)))


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_closures_evaluated_again_count_once(search):
    """LBFGS asks for the gradient several times a step; a schedule counts steps, and a line search is warned of."""
    seen = []
    callback = uniformity(coefficient=lambda step: seen.append(step) or 0.1, include="net.5")
    module = Automatic(
        make_optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4, line_search_fn=search)
    )
    fit = trainer(callback, max_epochs=1)
    with pytest.warns(UserWarning, match="LBFGS with a line search") if search else nullcontext():
        fit.fit(module, loader(batches()))
    assert callback.state_dict() == {"version": 1, "steps": [fit.global_step]}
    assert len(seen) > 2 * fit.global_step
    assert sorted(set(seen)) == list(range(fit.global_step))


@pytest.mark.parametrize("apply", ["gradient", "loss", "decoupled"])
def test_a_trainer_of_pytorch_lightning(apply):
    class Module(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 3))
            self.silent = ()

        training_step = Automatic.training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = uniformity(coefficient=0.1, apply=apply)
    assert isinstance(callback, pl.Callback)
    assert isinstance(callback, other.Callback)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    other.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], **quiet).fit(
        Module(), loader(batches())
    )
    assert callback.state_dict() == {"version": 1, "steps": [7]}


def test_copies_and_pickles_leave_the_model_behind():
    callback = uniformity(coefficient=0.1)
    callback.regularizer.attach(Automatic())
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin.regularizer.layers == []
        assert twin.regularizer.coefficient == callback.regularizer.coefficient
        trainer(twin, max_epochs=1).fit(Automatic(), loader(batches()))


def test_a_penalty_without_a_force_is_told_at_the_start():
    """In half space a search finds a point orthogonal to fewer neurons than dimensions: nothing to push."""
    callback = uniformity(measure=Covering(half_space=True))
    with pytest.warns(
        UserWarning,
        match=r"does nothing in layer 'net.0': .*use half_space=False; .*'net.5': no force",
    ) as caught:
        trainer(callback, fast_dev_run=True).fit(Automatic(), loader(batches()))
    assert not any("'net.7'" in str(one.message) for one in caught)  # the head is in full space
    trainer(uniformity(measure=Covering(half_space=True), coefficient=0), fast_dev_run=True).fit(
        Automatic(), loader(batches())
    )
    regularizer = UniformityRegularizer(Covering(half_space=True)).attach(Automatic().net)
    words = " ".join(regularizer.table().split())
    told = "no force in half space with fewer neurons than dimensions: use half_space=False"
    assert words.count(told) == 3
    assert set(regularizer.idle()) == {"0", "2", "5"}
