"""Pictures while training, in every logger, and the table of before and after at the end of fit."""

import copy
import io
import logging
import os
import pickle
import subprocess
import sys
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import pytest
import pytorch_lightning as other
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from PIL import Image
from torch import nn

from lightning_hsu import HypersphericalUniformity, Share
from lightning_hsu._core import expected_angles
from lightning_hsu._figures import recorder
from lightning_hsu._figures.draw import angle_panels, over_time, pixels
from lightning_hsu._figures.history import BINS, Angles, History, Record, angles_of
from lightning_hsu._figures.loggers import sender_for
from lightning_hsu._monitor import tables
from lightning_hsu._monitor.text import RULE, SCORE, score_text
from tests import sharding, test_callback
from tests.models import Automatic, Manual, batches, loader, network, trainer, uniformity
from tests.processes import world
from tests.ranks import fit, make_module
from tests.sharding import FSDPOnTheCPU

NAMES = ["ratio", "angles", "gradient_share"]


def fitted(logger=False, module=None, callback=None, **settings):
    """Seven steps with figures after the fifth and at the end."""
    callback = callback or uniformity(coefficient=0.1, figures_every_n_steps=5)
    fit = trainer(callback, logger=logger, **{"log_every_n_steps": 2, "max_epochs": 1, **settings})
    fit.fit(module or Automatic(), loader(batches()))
    return fit


def check_picture(file):
    """A picture that can be decoded, is no stamp and has more than a background."""
    with Image.open(file) as image:
        assert image.width > 500
        assert image.height > 200
        assert len(image.convert("RGB").getcolors(2**24)) > 20


def names_at(*steps):
    return {f"hsu_{name}-{step}.png" for name in NAMES for step in steps}


# Loggers


def test_tensorboard_gets_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit = fitted(TensorBoardLogger(tmp_path))
    events = EventAccumulator(fit.logger.log_dir).Reload()
    assert set(events.Tags()["images"]) == {f"hsu/{name}" for name in NAMES}
    for name in NAMES:
        found = events.Images(f"hsu/{name}")
        assert [one.step for one in found] == [5, 7]
        check_picture(io.BytesIO(found[-1].encoded_image_string))


def test_files_beside_the_metrics_of_a_csv_logger(tmp_path):
    fit = fitted(CSVLogger(tmp_path))
    files = list(Path(fit.logger.log_dir, "figures").iterdir())
    assert {file.name for file in files} == names_at(5, 7)
    for file in files:
        check_picture(file)
    assert not Path("hsu_figures").exists()


def test_files_without_a_logger(tmp_path):
    fitted(default_root_dir=tmp_path)
    assert {file.name for file in (tmp_path / "hsu_figures").iterdir()} == names_at(5, 7)


class Quiet(Logger):
    """A logger that only has what Lightning asks of all."""

    def __init__(self):
        super().__init__()
        self.calls, self.run_id = [], "run"

    name = version = "quiet"
    experiment = property(lambda self: self)

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class WandbLogger(Quiet):
    def log_image(self, key, images, step=None, **kwargs):
        assert images[0].shape[2] == 4
        self.calls.append((key, step))


class MLFlowLogger(Quiet):
    def log_figure(self, run_id, figure, artifact_file, *, save_kwargs=None):
        assert run_id == "run"
        figure.savefig(io.BytesIO(), **(save_kwargs or {}))
        self.calls.append(artifact_file)


class CometLogger(Quiet):
    def log_figure(
        self,
        figure_name=None,
        figure=None,
        overwrite=False,
        step=None,
        metadata=None,
        format="auto",
    ):
        figure.savefig(io.BytesIO(), format="svg", bbox_inches="tight")
        self.calls.append((figure_name, step))


@pytest.mark.parametrize("kind", [WandbLogger, MLFlowLogger, CometLogger])
def test_other_loggers_by_their_own_way(kind):
    class Derived(kind):
        """A user's own, known by its parent."""

    fit = fitted(Derived())
    pairs = [(f"hsu/{name}", step) for step in (5, 7) for name in NAMES]
    files = [f"figures/hsu_{name}-{step}.png" for step in (5, 7) for name in NAMES]
    assert fit.logger.calls == (files if kind is MLFlowLogger else pairs)
    assert not Path("hsu_figures").exists()


def test_a_logger_that_is_not_known_is_told_of_once_and_files_serve_it(tmp_path):
    with pytest.warns(
        UserWarning,
        match=r"Quiet is not known to take figures: they are saved as PNG files in .*hsu_figures",
    ) as caught:
        fitted([Quiet(), CSVLogger(tmp_path / "csv")], default_root_dir=tmp_path)
    assert sum("not known" in str(one.message) for one in caught) == 1
    assert {file.name for file in (tmp_path / "hsu_figures").iterdir()} == names_at(5, 7)
    assert len(list((tmp_path / "csv").rglob("figures/*.png"))) == 6


class Failing(Quiet):
    def log_image(self, key, images, step=None, **kwargs):
        raise ConnectionError("no route to host")


Failing.__name__ = "WandbLogger"


def test_a_logger_that_fails_warns_once_and_the_others_get_theirs(tmp_path):
    with pytest.warns(
        UserWarning, match=r"logger 0, WandbLogger, failed with ConnectionError: no route to host"
    ) as caught:
        fit = fitted([Failing(), CSVLogger(tmp_path)])
    assert sum("no route" in str(one.message) for one in caught) == 1
    assert fit.global_step == 7
    assert len(list(tmp_path.rglob("figures/*.png"))) == 6


def test_an_error_in_drawing_warns_once_and_training_goes_on(monkeypatch):
    monkeypatch.setattr("lightning_hsu._figures.draw.angle_panels", lambda layers: 1 / 0)
    with pytest.warns(UserWarning, match="drawing angles failed with ZeroDivisionError") as caught:
        fit = fitted()
    assert sum("ZeroDivision" in str(one.message) for one in caught) == 1
    assert fit.global_step == 7


def test_loggers_of_both_packages_are_known():
    for package in (pl, other):
        for kind in (
            "TensorBoardLogger",
            "CSVLogger",
            "WandbLogger",
            "MLFlowLogger",
            "CometLogger",
        ):
            assert (
                sender_for(getattr(package.loggers, kind).__new__(getattr(package.loggers, kind)))
                is not None
            )
    assert sender_for(DummyLogger()) is not None
    assert sender_for(object()) is None


@pytest.mark.parametrize(
    "settings", [{"fast_dev_run": True}, {"barebones": True, "logger": None}], ids=str
)
@pytest.mark.filterwarnings("ignore:.*barebones.*")
def test_trial_runs_leave_nothing(settings):
    if "barebones" in settings:
        settings = settings | dict.fromkeys(
            ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        )
        settings["log_every_n_steps"] = None
    fitted(**settings)
    assert list(Path.cwd().iterdir()) == []


# When and what


def test_figures_leave_training_and_metrics_as_they_are(tmp_path):
    ends = []
    for every in (None, 6):
        torch.manual_seed(0)
        module, logger = Automatic(), CSVLogger(tmp_path, name=str(every))
        callback = uniformity(coefficient=Share(0.1), figures_every_n_steps=every)
        fit = trainer(
            callback, logger=logger, log_every_n_steps=3, max_epochs=2, enable_checkpointing=True
        )
        fit.fit(module, loader(batches()))
        ends.append(
            (
                module.state_dict(),
                torch.get_rng_state(),
                callback.state_dict(),
                test_callback.rows_of(logger),
            )
        )
    for name, value in ends[0][0].items():
        assert torch.equal(value, ends[1][0][name])
    assert torch.equal(ends[0][1], ends[1][1])
    assert str(ends[0][2]) == str(ends[1][2])
    assert ends[0][3] == ends[1][3]


def test_a_step_that_is_due_and_not_logged_is_measured_and_not_logged(tmp_path):
    callback = uniformity(coefficient=0.1, figures_every_n_steps=3)
    fit = fitted(CSVLogger(tmp_path), callback=callback, log_every_n_steps=5)
    assert [record.step for record in callback._figures.history.records] == [
        0,
        1,
        3,
        5,
        6,
        7,
    ]
    assert {
        step for step, row in test_callback.rows_of(fit.logger).items() if "hsu/ratio/net.5" in row
    } == {4}


def test_several_optimizer_steps_a_batch_do_not_jump_over_the_interval(tmp_path):
    class Twice(Manual):
        def training_step(self, batch, batch_idx):
            for _ in range(2):
                super().training_step(batch, batch_idx)

    callback = uniformity(coefficient=0.1, figures_every_n_steps=5)
    fitted(CSVLogger(tmp_path), module=Twice(), callback=callback)
    steps = {int(file.stem.rpartition("-")[2]) for file in tmp_path.rglob("figures/*.png")}
    assert steps == {6, 10, 14}


def test_monitoring_has_no_gradient_share(tmp_path):
    fitted(CSVLogger(tmp_path), callback=uniformity(coefficient=0, figures_every_n_steps=100))
    assert {file.name for file in tmp_path.rglob("*.png")} == {
        "hsu_ratio-7.png",
        "hsu_angles-7.png",
    }


def test_the_history_is_of_one_fit_and_travels_with_copies_but_not_with_checkpoints():
    callback = uniformity(coefficient=0.1, figures_every_n_steps=3)
    fitted(callback=callback)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin._figures.history == callback._figures.history
    assert set(callback.state_dict()) == {"version", "steps"}
    fitted(callback=callback, max_epochs=None, max_steps=2)
    assert [record.step for record in callback._figures.history.records] == [0, 1, 2]


def test_a_long_history_is_thinned_out_and_keeps_its_ends():
    history, (one,) = History(), ([],)
    for step in range(10_000):
        history.note(step, one, {"a": 1.0})
    steps = [record.step for record in history.records]
    assert len(steps) <= 2000
    assert (steps[0], steps[-1]) == (0, 9999)
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_an_interval_that_is_none_is_refused(every):
    with pytest.raises(ValueError, match="figures_every_n_steps must be an int >= 1"):
        HypersphericalUniformity(figures_every_n_steps=every)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_hsu._figures.draw")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-hsu\[figures\]"'):
        HypersphericalUniformity(figures_every_n_steps=1)
    HypersphericalUniformity()


ALONE = """
import sys
import lightning_hsu
assert "lightning_hsu._figures.draw" not in sys.modules
import matplotlib
before = dict(matplotlib.rcParams)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tests.test_figures import Quiet, WandbLogger, fitted
sys.modules.pop("matplotlib.pyplot", None)  # torchmetrics imports it
fitted([CSVLogger("csv"), TensorBoardLogger("tb"), WandbLogger()])
assert "matplotlib.pyplot" not in sys.modules
assert dict(matplotlib.rcParams) == before
"""


@pytest.mark.any_cpu
def test_pyplot_and_its_settings_are_not_touched():
    command = [sys.executable, "-c", ALONE]
    root = Path(__file__).parents[1]
    found = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr


# Pictures


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_of_many_layers_the_worst_have_names():
    few = {f"net.{i}": [(0, 1.0), (9, 1.0 + i)] for i in range(10)}
    assert texts(over_time(few, title="", detail="", reference=(1.0, "as random"))) == [
        *few,
        "as random",
    ]
    many = {f"net.{i}": [(0, 1.0), (9, 1.0 + i)] for i in range(30)}
    assert texts(over_time(many, title="", detail="")) == [f"net.{i}" for i in range(25, 30)] + [
        "25 other layers"
    ]


@pytest.mark.parametrize(
    "curves",
    [
        {},
        {"a": [(0, float("nan"))]},
        {"a": [(3, 0.0)]},
        {"a": [(0, -2.0), (1, 5e4)], "b_$x$": [(0, 1e-9), (1, float("inf"))]},
    ],
    ids=["nothing", "NaN", "one zero", "negative and infinite"],
)
def test_odd_numbers_can_be_drawn(curves):
    picture = pixels(over_time(curves, title="t", detail="d"))
    assert picture.shape[2] == 4
    assert int(picture.float().std()) > 0


def test_labels_stand_apart_and_in_order():
    curves = {f"net.{i}": [(0, 1.0), (9, 1.0 + 1e-6 * i)] for i in range(10)}
    figure = over_time(curves, title="", detail="", reference=(1.0, "as random"))
    heights = [text.get_position()[1] for text in figure.axes[0].texts][:10]
    assert heights == sorted(heights)
    assert min(b - a for a, b in pairwise(heights)) > 0.05
    assert 0 <= min(heights) < max(heights) <= 1


@pytest.mark.parametrize("dimension", [2, 3, 50, 5000])
def test_expected_pairs_are_those_of_random_neurons(dimension):
    expected = expected_angles(1000, dimension, BINS)
    assert float(expected.sum()) == pytest.approx(1000)
    middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) * torch.pi / BINS
    # the cosine of random unit vectors has mean 0 and variance 1 / d
    assert float((expected * middles.cos()).sum()) == pytest.approx(0, abs=1e-8)
    assert float((expected * middles.cos() ** 2).sum()) / 1000 == pytest.approx(
        1 / dimension, rel=0.02
    )


def test_angles_of_a_large_layer_are_those_of_a_sample():
    x = torch.randn(1, 5000, 4)
    state = torch.get_rng_state()
    found = angles_of("net.0", x, 1.5)
    assert torch.equal(state, torch.get_rng_state())
    assert found == angles_of("net.0", x, 1.5)
    assert sum(found.counts) == 4096 * 4095 // 2
    assert found.note == "1.50× random, 4,096 of 5,000 × 4"
    grouped = angles_of("net.0", torch.randn(300, 40, 4), 1.5)
    assert sum(grouped.counts) == 102 * 40 * 39 // 2


@pytest.mark.parametrize("number", [1, 2, 4, 6])
def test_a_panel_for_each_layer(number):
    narrow = torch.randn(1, 60, 3000)
    shapes = [
        torch.randn(1, 2, 1),
        torch.randn(3, 5, 2),
        narrow,
        torch.randn(1, 2, 9),
        torch.ones(1, 6, 5),
        -narrow,
    ]
    layers = [angles_of(f"net.{i}", x, 1e6) for i, x in enumerate(shapes[:number])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = angle_panels(layers)
        pixels(figure)
    assert [ax.texts[0].get_text() for ax in figure.axes] == [layer.name for layer in layers]


def test_a_panel_has_every_pair():
    layer = Angles("net.0", tuple([3] + [0] * (BINS - 2) + [2]), 4, "")
    (ax,) = angle_panels([layer]).axes
    assert sum(ax.patches[0].get_data().values) == 5


@pytest.mark.parametrize("n", range(3, 34))
def test_a_panel_shows_near_duplicates(n):
    x = torch.randn(1, n, 16)
    x[0, 1] = x[0, 0] + 1e-4
    (ax,) = angle_panels([angles_of("net.0", x, 1.0)]).axes
    found = ax.patches[0].get_data()
    assert sum(found.values) == n * (n - 1) // 2
    assert (found.values[0], found.edges[0], found.edges[-1]) == (1, 0.0, 180.0)


def test_the_worst_come_first_and_what_has_no_ratio_not_at_all():
    history = History([Record(4, {"a": 1.0, "b": float("nan"), "c": 7.0, "d": 2.0}, {})])
    assert history.worst(recorder.PANELS) == ["c", "d", "a"]


# Before and after


def table_of(caplog):
    tables = [record.message for record in caplog.records if "before and after" in record.message]
    assert len(tables) <= 1
    return tables[0].splitlines() if tables else None


def test_the_table_of_before_and_after(caplog):
    module = Automatic()
    with torch.no_grad():
        module.net[5].weight[1] = (
            module.net[5].weight[0] * 1.001
        )  # a near-copy, which training pulls apart
    probe = uniformity().regularizer.attach(module)
    before = {layer.name: layer for layer in probe.measure_layers()}
    with caplog.at_level(logging.INFO):
        fitted(module=module, callback=uniformity(coefficient=1.0, verbose=True))
    after = {layer.name: layer for layer in probe.measure_layers()}
    title, heads, _, *rows = table_of(caplog)
    assert title == "Hyperspherical uniformity before and after, optimizer steps 0 to 7:"
    assert heads.split() == [word for name in tables._COLUMNS for word in name.split()]
    assert [row.split()[0] for row in rows[:4]] == ["net.0", "net.2", "net.5", "net.7"]
    said = [after[name].score >= 0 for name in after]
    assert (SCORE in rows[4:], "score after" in heads) == (any(said), any(said))
    assert (RULE in rows[4:]) == any("as random" in row for row in rows[:4])
    first, last = before["net.5"], after["net.5"]
    ratios = f"{first.ratio:.1f} -> {last.ratio:.3f}"
    angles = f"{first.min_angle:.1f} -> {last.min_angle:.1f}"
    cells = f"{ratios} {score_text(last.score)} {angles} 0"
    assert cells in " ".join(rows[2].split())
    assert rows[1].split()[1:5] == ["2", "groups", "of", "4"]


class Stops(Automatic):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({}, 7),
        ({"module": Stops}, 4),
        ({"fast_dev_run": True}, 1),
        ({"barebones": True, "logger": None}, 7),
        ({"accumulate_grad_batches": 3}, 3),
        ({"limit_train_batches": 0}, None),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*barebones.*", "ignore:.*limit_train_batches.*")
def test_the_table_comes_however_a_fit_ends_well(settings, last, caplog):
    if "barebones" in settings:
        settings = settings | dict.fromkeys(
            ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        )
        settings["log_every_n_steps"] = None
    module = settings.pop("module", Automatic)()
    with caplog.at_level(logging.INFO):
        fitted(module=module, callback=uniformity(coefficient=0, verbose=True), **settings)
    table = table_of(caplog)
    assert (table is None) == (last is None)
    assert table is None or table[0].endswith(f"steps 0 to {last}:")


def test_no_table_after_an_error_and_none_that_is_not_wanted(caplog):
    class Fails(Automatic):
        def training_step(self, batch, batch_idx):
            return None if batch_idx < 3 else 1 / 0

    with caplog.at_level(logging.INFO):
        with pytest.raises(ZeroDivisionError):
            fitted(module=Fails(), callback=uniformity(verbose=True))
        fitted(callback=uniformity())
    assert table_of(caplog) is None


@pytest.mark.filterwarnings("ignore:.*[Ll]azy modules.*", "ignore:.*UninitializedParameter.*")
def test_lazy_layers_are_first_measured_before_the_first_step(caplog):
    with caplog.at_level(logging.INFO):
        fitted(module=test_callback.Lazy(), callback=uniformity(verbose=True))
    assert table_of(caplog)[0].endswith("steps 0 to 7:")


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_before_is_where_a_resumed_fit_begins(tmp_path, caplog):
    data = loader(batches())
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer(uniformity(), save, max_epochs=1, enable_checkpointing=True).fit(Automatic(), data)
    with caplog.at_level(logging.INFO):
        trainer(uniformity(verbose=True), max_epochs=2).fit(
            Automatic(), data, ckpt_path=tmp_path / "last.ckpt"
        )
    assert table_of(caplog)[0].endswith("steps 7 to 14:")


def test_after_is_what_other_callbacks_leave(caplog):
    class Zero(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            nn.init.zeros_(pl_module.net[5].weight)

    stop = EarlyStopping("hsu/ratio_mean", patience=100)
    with caplog.at_level(logging.INFO):
        trainer(uniformity(verbose=True), stop, Zero(), max_epochs=1).fit(
            Automatic(), loader(batches())
        )
    row = table_of(caplog)[5].split()
    assert row[-8:] == ["12", "fewer", "than", "two", "live", "neurons,", "12", "dead"]


# Ranks

CASES = {
    "DDP": (
        partial(make_module, Automatic, network),
        partial(DDPStrategy, process_group_backend="gloo"),
    ),
    "FSDP1": (partial(make_module, Automatic, network), FSDPOnTheCPU),
    "FSDP2": (
        partial(make_module, sharding.Parallel, network, cut=sharding.layer_by_layer),
        partial(
            ModelParallelStrategy,
            process_group_backend="gloo",
            data_parallel_size=2,
            tensor_parallel_size=1,
        ),
    ),
    "tensor parallel": (
        partial(make_module, sharding.Parallel, network, cut=sharding.columns_and_rows),
        partial(
            ModelParallelStrategy,
            process_group_backend="gloo",
            data_parallel_size=1,
            tensor_parallel_size=2,
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
@pytest.mark.parametrize(
    "case",
    [
        "DDP",
        "FSDP1",
        pytest.param("FSDP2", marks=sharding.needs_fsdp2),
        "tensor parallel",
    ],
)
def test_ranks_measure_together_and_one_draws(case, tmp_path):
    make, strategy = CASES[case]
    trainer_settings = {"logger": False, "default_root_dir": str(tmp_path)}
    ends = []
    for callback in ({}, {"figures_every_n_steps": 2, "verbose": True}):
        ends.append(
            world(2).run(fit, make, {"coefficient": 0.1} | callback, strategy, trainer_settings)
        )
    for plain, drawn in zip(*ends, strict=True):
        for name, p in plain.parameters.items():
            assert torch.equal(p, drawn.parameters[name])
    found = {file.name for file in (tmp_path / "hsu_figures").iterdir()}
    assert {f"hsu_{name}-{step}.png" for name in ("ratio", "angles") for step in (2, 4, 6)} <= found
