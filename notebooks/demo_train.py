"""The demo's network, and one fit of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from evidence.controls import RandomDirection
from evidence.data import Data, Draw, draw
from lightning_hsu import HypersphericalUniformity, LayerUniformity, UniformityRegularizer

BATCH = 50
LOG_EVERY = 10  # steps
Arm = Literal["without", "with", "control"]
ARMS: tuple[Arm, ...] = get_args(Arm)
CHATTER = logging.getLogger("lightning.pytorch.utilities.rank_zero")


@dataclass(frozen=True)
class Grid:
    """What the search tries at one fraction of wrong labels."""

    noise: float
    rates: tuple[float, ...]
    decays: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """What all runs on the same data share."""

    images: int  # a multiple of the batch
    epochs: int
    depth: int  # hidden layers
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Settings:
    """What the three arms of a comparison share."""

    noise: float  # fraction of wrong training labels
    rate: float  # learning rate
    decay: float  # weight decay


@dataclass(frozen=True)
class Outcome:
    """The results of a run."""

    error: float  # test error, %
    before: list[LayerUniformity]
    after: list[LayerUniformity]
    weights: dict[str, tuple[Tensor, Tensor]]  # before and after, by layer
    metrics: Path  # the CSV logger's file


class Network(pl.LightningModule):
    """A plain ReLU network, d-64-...-64-classes."""

    def __init__(
        self, inputs: int, classes: int, depth: int, settings: Settings, steps: int
    ) -> None:
        super().__init__()
        sizes = [inputs, *depth * [64]]
        for i in range(depth):
            self.add_module(f"hidden{i + 1}", nn.Linear(sizes[i], sizes[i + 1]))
        self.head = nn.Linear(64, classes)
        self.settings = settings
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        *hidden, head = self.children()
        for layer in hidden:
            x = layer(x).relu()
        return head(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.settings.rate,
            momentum=0.9,
            weight_decay=self.settings.decay,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def error(self, images: Tensor, labels: Tensor) -> float:
        """Share of wrong answers, in percent."""
        return 100 * float((self(images).argmax(1) != labels).float().mean())


class Batches:
    """Batches in an order of its own each epoch; it takes no numbers from torch's generator."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images = images
        self.labels = labels
        self.chance = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.labels) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=self.chance)
        for rows in order.split(BATCH):
            yield self.images[rows], self.labels[rows]


def prepare(data: Data, plan: Plan, settings: Settings, seed: int) -> tuple[Network, Batches, Draw]:
    """Make a network, its batches and its data; the seed alone fixes images, weights and order."""
    held_out = max(0, min(2000, len(data.pool[1]) - plan.images))
    images = draw(data, seed, plan.images, held_out=held_out, noise=settings.noise)
    pl.seed_everything(seed, verbose=False)
    inputs = data.pool[0].shape[1]
    steps = plan.epochs * (plan.images // BATCH)
    network = Network(inputs, data.classes, plan.depth, settings, steps)
    return network, Batches(*images.train, seed), images


def measure(network: nn.Module) -> tuple[list[LayerUniformity], dict[str, Tensor]]:
    """Measure the layers' uniformity and copy their weights."""
    weights = {name: layer.weight.detach().clone() for name, layer in network.named_children()}
    return UniformityRegularizer().attach(network).measure_layers(), weights


def penalty(arm: Arm, *, verbose: bool) -> HypersphericalUniformity:
    """The callback of an arm. All of them measure; "without" adds nothing.

    "control" adds random tangent directions, as long as the penalty's gradient would be.
    """
    if arm == "without":
        return HypersphericalUniformity(coefficient=0.0, verbose=verbose)
    callback = HypersphericalUniformity(verbose=verbose)
    if arm == "control":
        callback.measure = RandomDirection(callback.measure)
    return callback


def fit(
    data: Data, plan: Plan, settings: Settings, seed: int, folder: Path, *, arm: Arm
) -> Outcome:
    """Train once. The first fit prints its layers."""
    network, batches, images = prepare(data, plan, settings, seed)
    first = not folder.exists()
    before, old = measure(network)
    run = f"wrong-{settings.noise:g}-{arm}-seed-{seed}"
    csv = CSVLogger(folder / "csv", name=run, version="")
    board = TensorBoardLogger(folder / "tensorboard", name=run, version="", default_hp_metric=False)
    CHATTER.setLevel(logging.WARNING)
    trainer = pl.Trainer(
        max_epochs=plan.epochs,
        accelerator="cpu",
        devices=1,
        logger=[csv, board],
        callbacks=[penalty(arm, verbose=first)],
        log_every_n_steps=LOG_EVERY,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,  # thousands of lines in a log file; the demo prints one per run
    )
    CHATTER.setLevel(logging.INFO if first else logging.WARNING)  # the table of layers, once
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec")  # Lightning's own, with recent PyTorch
        trainer.fit(network, batches)
    after, new = measure(network)
    weights = {name: (old[name], new[name]) for name in old}
    metrics = Path(csv.log_dir) / "metrics.csv"
    return Outcome(network.error(*images.test), before, after, weights, metrics)
