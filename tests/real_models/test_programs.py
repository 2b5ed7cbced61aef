"""Programs that others wrote, each trained for a few steps as its users write it, with the callback.

The training must be what it was without the callback, plus the penalty: as many optimizer steps, no
layer left out that has a gradient, and numbers that a double loop over the neurons gives.
"""

from __future__ import annotations

import copy
import csv
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_hsu import HypersphericalUniformity
from lightning_hsu._trainer import EveryCallback
from tests.plain import HALF_SPACE
from tests.real_models.base import Read

# Only what these libraries and Lightning say of themselves: a warning of the callback is an error.
pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings(
        "ignore:Skipping 'callbacks' parameter because it is not possible to safely dump",
        "ignore:Total length of `list` across ranks is zero",
        "ignore:'pin_memory' argument is set as true",
        "ignore:You defined a `validation_step` but have no `val_dataloader`",
        "ignore:Using `json`-module for json-handling",
        "ignore:Using a non-tuple sequence for multidimensional indexing",
    ),
]

STEPS = 4  # optimizer steps of a run
MODES = ("gradient", "decoupled")
VARIANTS = {
    "plain": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "accumulated": {"accumulate_grad_batches": 2},
}
TOLERANCE = 1e-4  # of the penalty's part of a step, relative to its largest entry
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Measured:
    """A layer that the callback measures: its parameters by name, and whether it is the head."""

    parameters: tuple[str, ...]
    head: bool


class Spy(EveryCallback):
    """Keeps what a run did; it goes after the callback that is tested."""

    def __init__(self):
        self.before: dict[str, Tensor] = {}  # weights before the first step
        self.gradients: dict[str, Tensor] = {}  # for the first step, before clipping
        self.first: dict[str, Tensor] = {}  # weights after the first step
        self.after: dict[str, Tensor] = {}
        self.rate = 0.0  # of the first step
        self.trains: set[str] = set()  # parameters that had a gradient at some step
        self.steps = 0
        self.batches = 0
        self.layers: dict[str, Measured] = {}
        self.skips: dict[str, str] = {}
        self.unreached: list[str] = []
        self.rows: list[dict[str, str]] = []  # of the log

    def __deepcopy__(self, memo):
        """Stay the one that the test holds: neuralforecast copies a model with its callbacks."""
        return self

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = {}
        for name, p in pl_module.named_parameters():
            if p.grad is not None:
                found[name] = p.grad.detach().clone()
        self.trains.update(found)
        if not self.gradients:
            self.before = weights(pl_module)
            self.gradients = found
            self.rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        if trainer.global_step == 1 and not self.first:
            self.first = weights(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        for callback in trainer.callbacks:
            if isinstance(callback, HypersphericalUniformity):
                regularizer = callback.regularizer
                names = {id(p): name for name, p in pl_module.named_parameters()}
                for layer in regularizer.layers:
                    keys = tuple(names[id(p)] for p in layer.parameters)
                    self.layers[layer.name] = Measured(keys, layer.target.head)
                self.skips = {skip.name: skip.reason for skip in regularizer.skips}
                self.unreached = sorted(callback._fit.missing)  # the epoch is over

    def on_train_end(self, trainer, pl_module):
        self.after = weights(pl_module)
        self.steps = trainer.global_step


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@dataclass(frozen=True)
class Program:
    """A program and what an expert knows of its model.

    Args:
        name: Library and model.
        lightning: The package whose Trainer it uses.
        run: Trains, given settings of the Trainer and the optimizer's class, None for its own.
        reads: Layers whose first step is computed here, by name: the parameter, and its neurons.
        heads: The layers that are measured in full space, the last before the loss.
        skips: Layers that are not measured, by a word that the reason contains.
        frozen: Layers that do not train, as patterns.
        unreached: Layers that could train but get no gradient.
        optimizer: What its users choose to have plain steps; None if they cannot.
    """

    name: str
    lightning: str
    run: Callable[..., None]
    reads: Mapping[str, Read] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    skips: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    optimizer: type[torch.optim.Optimizer] | None = torch.optim.SGD

    @property
    def library(self) -> str:
        return self.name.partition(":")[0]


def linear(name: str) -> tuple[str, Read]:
    """A Linear, or a convolution in one group: a neuron is a row."""
    return name, (f"{name}.weight", lambda weight: weight.flatten(1))


def gate(name: str, i: int) -> tuple[str, Read]:
    """Of an LSTM: the i-th quarter of the rows."""
    return f"{name}.{'ifgo'[i]}", (name, lambda weight: weight.chunk(4)[i])


def neuralforecast_model(kind, **settings):
    def run(trainer, optimizer):
        from neuralforecast import NeuralForecast, models
        from neuralforecast.utils import AirPassengersPanel

        model = getattr(models, kind)(
            h=6,
            input_size=12,
            max_steps=STEPS,
            val_check_steps=STEPS,
            learning_rate=0.01,
            batch_size=1,
            windows_batch_size=16,
            random_seed=1,
            optimizer=optimizer,
            **settings,
            **trainer,
        )
        forecast = NeuralForecast(models=[model], freq="ME")
        forecast.fit(AirPassengersPanel)
        assert forecast.predict()[kind].notna().all()

    return run


def darts_model(kind, **settings):
    def run(trainer, optimizer):
        import numpy as np
        from darts import TimeSeries, models

        chosen = {}
        if optimizer is not None:
            chosen["optimizer_cls"] = optimizer
        values = np.sin(np.arange(60) / 5).astype(np.float32)
        model = getattr(models, kind)(
            input_chunk_length=12,
            output_chunk_length=6,
            batch_size=8,
            random_state=1,
            optimizer_kwargs={"lr": 0.01},
            pl_trainer_kwargs={"max_steps": STEPS, **trainer},
            **chosen,
            **settings,
        )
        series = TimeSeries.from_values(values)
        model.fit(series)
        assert len(model.predict(6)) == 6

    return run


def gluonts_model(kind, **settings):
    def run(trainer, optimizer):
        import lightning.pytorch as pl
        import numpy as np
        from gluonts.dataset.common import ListDataset
        from gluonts.torch import DeepAREstimator, SimpleFeedForwardEstimator

        estimators = {"DeepAR": DeepAREstimator, "SimpleFeedForward": SimpleFeedForwardEstimator}
        pl.seed_everything(1)
        series = []
        for i in range(4):
            series.append({"start": "2020-01-01", "target": np.sin(np.arange(80) / 5 + i) + 2})
        data = ListDataset(series, freq="D")
        windows = STEPS * trainer.get("accumulate_grad_batches", 1)
        estimator = estimators[kind](
            prediction_length=4,
            context_length=8,
            batch_size=4,
            num_batches_per_epoch=windows,
            trainer_kwargs={"max_epochs": 1, **trainer},
            **settings,
        )
        predictor = estimator.train(data)
        assert len(next(iter(predictor.predict(data))).mean) == 4

    return run


def chemprop_model(trainer, optimizer):
    import lightning.pytorch as pl
    from chemprop import data, models
    from chemprop.nn import BondMessagePassing, MeanAggregation, RegressionFFN

    pl.seed_everything(1)
    smiles = ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCl", "CCOC", "C1CCCCC1", "CC#N"]
    points = []
    for i, smi in enumerate(smiles):
        points.append(data.MoleculeDatapoint.from_smi(smi, [float(i)]))
    dataset = data.MoleculeDataset(points)
    dataset.normalize_targets()
    loader = data.build_dataloader(dataset, batch_size=4, shuffle=True, num_workers=0, seed=1)
    model = models.MPNN(
        BondMessagePassing(d_h=16), MeanAggregation(), RegressionFFN(input_dim=16, hidden_dim=12)
    )
    epochs = STEPS * trainer.get("accumulate_grad_batches", 1) // len(loader)
    fit = pl.Trainer(max_epochs=max(epochs, 3), max_steps=STEPS, **trainer)
    fit.fit(model, loader)
    later = data.build_dataloader(dataset, batch_size=4, shuffle=False, num_workers=0)
    assert len(fit.predict(model, later)) == 2


def lightly_model(kind):
    def run(trainer, optimizer):
        import lightning.pytorch as pl
        from lightly.transforms import SimCLRTransform, SwaVTransform
        from torchvision.datasets import FakeData

        pl.seed_everything(1)
        if kind == "SwaV":
            transform = SwaVTransform(crop_sizes=(32, 16), crop_counts=(2, 2))
        else:
            transform = SimCLRTransform(input_size=32)
        model = lightly_modules()[kind](optimizer)
        batches = STEPS * trainer.get("accumulate_grad_batches", 1)
        images = FakeData(4 * batches, image_size=(3, 40, 40), transform=transform)
        loader = torch.utils.data.DataLoader(images, batch_size=4, shuffle=True, drop_last=True)
        pl.Trainer(max_epochs=1, **trainer).fit(model, loader)

    return run


@cache
def lightly_modules():
    """The modules of lightly's examples, with a small backbone."""
    import lightning.pytorch as pl
    from lightly.loss import NTXentLoss, SwaVLoss
    from lightly.models import ResNetGenerator
    from lightly.models.modules import (
        MoCoProjectionHead,
        SimCLRProjectionHead,
        SwaVProjectionHead,
        SwaVPrototypes,
    )
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class Base(pl.LightningModule):
        def __init__(self, optimizer):
            super().__init__()
            resnet = ResNetGenerator("resnet-9", width=0.125)
            self.backbone = nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1))
            self.optimizer = optimizer or torch.optim.SGD

        def configure_optimizers(self):
            return self.optimizer(self.parameters(), lr=0.06)

    class SimCLR(Base):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            self.projection_head = SimCLRProjectionHead(64, 32, 16)
            self.criterion = NTXentLoss()

        def forward(self, x):
            return self.projection_head(self.backbone(x).flatten(start_dim=1))

        def training_step(self, batch, batch_idx):
            (x0, x1), _ = batch
            loss = self.criterion(self(x0), self(x1))
            self.log("train_loss_ssl", loss)
            return loss

    class MoCo(Base):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            self.projection_head = MoCoProjectionHead(64, 32, 16)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NTXentLoss(memory_bank_size=(64, 16))

        def training_step(self, batch, batch_idx):
            update_momentum(self.backbone, self.backbone_momentum, m=0.99)
            update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
            (x_query, x_key), _ = batch
            query = self.projection_head(self.backbone(x_query).flatten(start_dim=1))
            with torch.no_grad():
                key = self.backbone_momentum(x_key).flatten(start_dim=1)
                key = self.projection_head_momentum(key)
            return self.criterion(query, key)

    class SwaV(Base):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            self.projection_head = SwaVProjectionHead(64, 32, 16)
            self.prototypes = SwaVPrototypes(16, n_prototypes=12)
            self.criterion = SwaVLoss()

        def forward(self, x):
            x = self.projection_head(self.backbone(x).flatten(start_dim=1))
            return self.prototypes(nn.functional.normalize(x, dim=1, p=2))

        def training_step(self, batch, batch_idx):
            self.prototypes.normalize()
            crops = [self(x) for x in batch[0]]
            return self.criterion(crops[:2], crops[2:])

    return {"SimCLR": SimCLR, "MoCo": MoCo, "SwaV": SwaV}


NHITS = neuralforecast_model("NHITS", mlp_units=3 * [[16, 16]])
PATCH_TST = neuralforecast_model(
    "PatchTST", hidden_size=16, n_heads=2, linear_hidden_size=24, patch_len=4, stride=2
)
TIDE = darts_model(
    "TiDEModel", hidden_size=16, decoder_output_dim=8, temporal_decoder_hidden=8, dropout=0.1
)
NBEATS = darts_model("NBEATSModel", num_stacks=2, num_blocks=1, num_layers=2, layer_widths=16)
DEEPAR = gluonts_model("DeepAR", freq="D", hidden_size=12)
FEED_FORWARD = gluonts_model("SimpleFeedForward", hidden_dimensions=[16, 12])

SINGLE = "a single neuron"
PROGRAMS = [
    Program(
        "neuralforecast: NHITS",
        "pytorch_lightning",
        NHITS,
        dict(
            [linear("blocks.0.layers.0"), linear("blocks.1.layers.7"), linear("blocks.2.layers.7")]
        ),
        heads=("blocks.0.layers.7", "blocks.1.layers.7", "blocks.2.layers.7"),
    ),
    Program(
        "neuralforecast: PatchTST",
        "pytorch_lightning",
        PATCH_TST,
        dict(
            [
                linear("model.backbone.W_P"),
                linear("model.backbone.encoder.layers.1.self_attn.W_K"),
                linear("model.head.linear"),
            ]
        ),
        heads=("model.head.linear",),
        skips={"model.backbone.W_pos": ""},
    ),
    Program(
        "darts: TiDE",
        "pytorch_lightning",
        TIDE,
        dict([linear("encoders.0.dense.2"), linear("lookback_skip")]),
        heads=("lookback_skip",),
        skips={"temporal_decoder.dense.2": SINGLE, "temporal_decoder.skip": SINGLE},
    ),
    Program(
        "darts: N-BEATS",
        "pytorch_lightning",
        NBEATS,
        dict(
            [
                linear("stacks.0.blocks.0.fc_stack.1"),
                linear("stacks.0.blocks.0.backcast_g"),
                linear("stacks.1.blocks.0.forecast_g"),
            ]
        ),
        heads=("stacks.0.blocks.0.forecast_g", "stacks.1.blocks.0.forecast_g"),
        frozen=("stacks.1.blocks.0.backcast_*",),
    ),
    Program(
        "gluonts: DeepAR",
        "lightning.pytorch",
        DEEPAR,
        dict([gate("model.rnn.weight_ih_l0", 1), gate("model.rnn.weight_hh_l1", 2)]),
        skips={
            "model.param_proj.proj.0": SINGLE,
            "model.param_proj.proj.1": SINGLE,
            "model.param_proj.proj.2": SINGLE,
            "model.embedder._embedders.0": "embedding",
        },
        optimizer=None,
    ),
    Program(
        "gluonts: SimpleFeedForward",
        "lightning.pytorch",
        FEED_FORWARD,
        dict([linear("model.nn.0")]),
        skips={
            "model.args_proj.proj.0": SINGLE,
            "model.args_proj.proj.1": SINGLE,
            "model.args_proj.proj.2": SINGLE,
        },
        optimizer=None,
    ),
    Program(
        "chemprop: MPNN",
        "lightning.pytorch",
        chemprop_model,
        dict([linear("message_passing.W_h"), linear("predictor.ffn.0.0")]),
        skips={"predictor.ffn.1.2": SINGLE},
        optimizer=None,
    ),
    Program(
        "lightly: SimCLR",
        "lightning.pytorch",
        lightly_model("SimCLR"),
        dict([linear("backbone.3.0.conv1"), linear("projection_head.layers.3")]),
        heads=("projection_head.layers.3",),
    ),
    Program(
        "lightly: MoCo",
        "lightning.pytorch",
        lightly_model("MoCo"),
        dict([linear("backbone.0"), linear("projection_head.layers.2")]),
        heads=("projection_head.layers.2",),
        frozen=("backbone_momentum.*", "projection_head_momentum.*"),
    ),
    Program(
        "lightly: SwaV",
        "lightning.pytorch",
        lightly_model("SwaV"),
        dict([linear("projection_head.layers.3"), linear("prototypes.heads.0")]),
        heads=("prototypes.heads.0",),
    ),
]

TIME_MIXER = neuralforecast_model("TimeMixer", n_series=2, d_model=8, d_ff=8, e_layers=1)
STEM_GNN = neuralforecast_model("StemGNN", n_series=2, multi_layer=2)
INCOMPLETE = [
    Program(
        "neuralforecast: TimeMixer",
        "pytorch_lightning",
        TIME_MIXER,
        unreached=("pdm_blocks.0.out_cross_layer.0", "pdm_blocks.0.out_cross_layer.2"),
    ),
    Program(
        "neuralforecast: StemGNN",
        "pytorch_lightning",
        STEM_GNN,
        unreached=("stock_block.1.backcast_short_cut",),
    ),
]

each_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
each_mode = pytest.mark.parametrize("mode", MODES)


def need(program):
    reason = f"needs {program.library}: make models"
    pytest.importorskip(program.library, reason=reason)


def run(program, callback, optimizer=None, **settings):
    """Train once; the spy, and the rows of the program's log."""
    folder = tempfile.mkdtemp(dir=".")
    callbacks = [Spy()]
    if callback is not None:
        callbacks.insert(0, callback)
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "callbacks": callbacks,
        "logger": import_module(program.lightning + ".loggers").CSVLogger(folder),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **settings,
    }
    spy = callbacks[-1]
    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        if settings.get("precision") == "bf16-mixed":
            # Without AVX-512 oneDNN has no LSTM in bfloat16, and PyTorch asks it for one all the same.
            patch.setattr(torch.backends.mkldnn, "enabled", False)
        program.run(trainer, optimizer)
    for path in sorted(Path(folder).rglob("metrics.csv")):
        with path.open() as file:
            spy.rows.extend(csv.DictReader(file))
    return spy


def uniformity(**settings):
    return HypersphericalUniformity(**{"measure": HALF_SPACE, "verbose": False, **settings})


def penalty(neurons: Tensor, *, half_space: bool) -> Tensor:
    """Mean of 1 / distance ** 2 over all pairs, in float64, pair by pair."""
    points = nn.functional.normalize(neurons.double(), dim=1)
    if half_space:
        points = torch.cat([points, -points])
    total = torch.zeros((), dtype=torch.float64)
    pairs = 0
    for i in range(len(points)):
        for j in range(i):
            square = (points[i] - points[j]).square().sum()
            assert square > 1e-4  # farther apart than the default softening
            total = total + 1 / square
            pairs += 1
    return total / pairs


def penalty_gradient(program, name, weight):
    """The neurons of a layer and their penalty's gradient, in float64."""
    neurons = program.reads[name][1](weight).double().requires_grad_()
    value = penalty(neurons, half_space=name not in program.heads)
    return neurons.detach(), torch.autograd.grad(value, neurons)[0]


def assert_near(found, expected, scale):
    """Equal up to a share of the largest entry and the rounding of numbers of that scale."""
    largest = float(expected.abs().max())
    allowed = TOLERANCE * largest + 4 * EPSILON * scale
    assert largest > 10 * allowed  # else it would say nothing
    assert float((found - expected).abs().max()) < allowed


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, p in one.items():
        assert torch.equal(p, other[name]), name


def is_frozen(program, name):
    return any(fnmatchcase(name, pattern) for pattern in program.frozen)


@each_program
@each_mode
@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_as_without_the_callback_but_for_the_penalty(program, mode, variant):
    need(program)
    settings = VARIANTS[variant]
    without = run(program, None, **settings)
    zero = run(program, uniformity(coefficient=0, apply=mode), **settings)
    spread = run(program, uniformity(coefficient=0.3, apply=mode), **settings)

    assert without.steps == zero.steps == spread.steps == STEPS
    assert without.batches == zero.batches == spread.batches
    assert without.batches == STEPS * settings.get("accumulate_grad_batches", 1)
    assert_equal(without.before, spread.before)
    assert_equal(without.after, zero.after)

    assert spread.layers
    for name, layer in spread.layers.items():
        for p in layer.parameters:
            if is_frozen(program, name):
                assert p not in spread.trains
                assert torch.equal(spread.first[p], zero.first[p]), name
            else:
                assert p in spread.trains
                assert not torch.equal(spread.after[p], zero.after[p]), name
    # A warning of a layer that is not reached would be an error.
    assert spread.unreached == []

    wanted = ["hsu/penalty", "hsu/ratio_mean", "hsu/ratio_max", "hsu/angle_min"]
    wanted += [f"hsu/ratio/{name}" for name in spread.layers]
    for metric in wanted:
        values = [float(row[metric]) for row in spread.rows if row.get(metric)]
        if is_frozen(program, metric.removeprefix("hsu/ratio/")):
            assert values, metric  # once is enough
        else:
            assert len(values) == STEPS, metric
        assert all(map(math.isfinite, values)), metric


@pytest.mark.parametrize("program", INCOMPLETE, ids=lambda program: program.name)
@each_mode
def test_names_exactly_the_layers_that_the_program_leaves_without_a_gradient(program, mode):
    need(program)
    zero = run(program, uniformity(coefficient=0, apply=mode))
    named = ", ".join(map(repr, program.unreached))
    with pytest.warns(UserWarning, match=re.escape(f"has not reached layer {named} in this epoch")):
        spread = run(program, uniformity(coefficient=0.3, apply=mode))
    assert spread.steps == zero.steps == STEPS
    assert spread.unreached == list(program.unreached)
    for name, layer in spread.layers.items():
        for p in layer.parameters:
            assert (p in spread.trains) == (name not in program.unreached), name
            assert torch.equal(spread.after[p], zero.after[p]) == (name in program.unreached), name


@each_program
def test_measures_what_an_expert_would(program):
    need(program)
    spread = run(program, uniformity())
    heads = {name for name, layer in spread.layers.items() if layer.head}
    assert heads == set(program.heads)
    left_out = {name for name in spread.skips if not is_frozen(program, name)}
    assert left_out == program.skips.keys()
    for name, word in program.skips.items():
        assert word in spread.skips[name]


@each_program
def test_the_first_gradient_is_the_tasks_and_the_penaltys(program):
    """Also the first step, where it is plain gradient descent."""
    need(program)
    zero = run(program, uniformity(coefficient=0), program.optimizer)
    coefficient = 0.1 / zero.rate
    ours = uniformity(coefficient=coefficient, step_limit=None)
    spread = run(program, ours, program.optimizer)
    for name, (key, read) in program.reads.items():
        gradient = coefficient * penalty_gradient(program, name, zero.before[key])[1]
        added = read(spread.gradients[key]).double() - read(zero.gradients[key]).double()
        assert_near(added, gradient, float(spread.gradients[key].abs().max()))
        if program.optimizer is not None:
            change = read(spread.first[key]).double() - read(zero.first[key]).double()
            assert_near(change, -zero.rate * gradient, float(zero.first[key].abs().max()))


@each_program
def test_the_first_decoupled_move_follows_the_optimizers_step(program):
    """Whatever the optimizer: learning rate times gradient where it arrived, at the same norms."""
    need(program)
    zero = run(program, uniformity(coefficient=0))
    coefficient = 0.1 / zero.rate
    ours = uniformity(coefficient=coefficient, apply="decoupled", step_limit=None)
    spread = run(program, ours)
    for name, (key, read) in program.reads.items():
        neurons, gradient = penalty_gradient(program, name, zero.first[key])
        moved = neurons - 0.1 * gradient
        moved = moved * neurons.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)
        change = read(spread.first[key]).double() - neurons
        assert_near(change, moved - neurons, float(neurons.abs().max()))
