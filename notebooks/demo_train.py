"""The demo's network, and one fit of it."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from evidence.data import Data, Draw, draw
from lightning_hsu import HypersphericalUniformity, LayerUniformity, UniformityRegularizer

BATCH = 50
LOG_EVERY = 10  # steps
CHATTER = logging.getLogger("lightning.pytorch.utilities.rank_zero")


@dataclass(frozen=True)
class Plan:
    """What all runs on the same data share."""

    images: int
    epochs: int
    small_scale: float
    rates: tuple[float, ...]  # learning rates that the search tries


@dataclass(frozen=True)
class Settings:
    """The settings of a run, with and without the penalty."""

    scale: float  # factor of the initial weights
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
    """A plain ReLU network, d-64-64-classes."""

    def __init__(self, inputs: int, classes: int, settings: Settings, steps: int) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(inputs, 64)
        self.hidden2 = nn.Linear(64, 64)
        self.head = nn.Linear(64, classes)
        self.settings = settings
        self.steps = steps
        with torch.no_grad():
            for layer in self.children():
                layer.weight *= settings.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden2(self.hidden1(x).relu()).relu())

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


def prepare(
    data: Data, plan: Plan, settings: Settings, seed: int
) -> tuple[Network, DataLoader[Any], Draw]:
    """Make a network, its batches and its data; the seed alone fixes images, weights and order."""
    held_out = max(0, min(2000, len(data.pool[1]) - plan.images))
    images = draw(data, seed, plan.images, held_out=held_out)
    pl.seed_everything(seed, verbose=False)
    inputs = data.pool[0].shape[1]
    classes = int(data.pool[1].max()) + 1
    network = Network(inputs, classes, settings, steps=plan.epochs * (plan.images // BATCH))
    rows = TensorDataset(*images.train)
    order = RandomSampler(rows, generator=torch.Generator().manual_seed(seed))
    batches = BatchSampler(order, BATCH, drop_last=True)
    return network, DataLoader(rows, sampler=batches, batch_size=None), images


def measure(network: nn.Module) -> tuple[list[LayerUniformity], dict[str, Tensor]]:
    """Measure the layers' uniformity and copy their weights."""
    weights = {name: layer.weight.detach().clone() for name, layer in network.named_children()}
    return UniformityRegularizer().attach(network).measure_layers(), weights


def fit(
    data: Data, plan: Plan, settings: Settings, seed: int, folder: Path, *, penalised: bool
) -> Outcome:
    """Train once; without the penalty the callback only monitors. The first fit prints its layers."""
    network, loader, images = prepare(data, plan, settings, seed)
    first = not folder.exists()
    before, old = measure(network)
    penalty = "with" if penalised else "without"
    strength = {} if penalised else {"coefficient": 0.0}
    run = f"scale-{settings.scale:g}-{penalty}-seed-{seed}"
    csv = CSVLogger(folder / "csv", name=run, version="")
    board = TensorBoardLogger(folder / "tensorboard", name=run, version="", default_hp_metric=False)
    CHATTER.setLevel(logging.WARNING)
    trainer = pl.Trainer(
        max_epochs=plan.epochs,
        accelerator="cpu",
        devices=1,
        logger=[csv, board],
        callbacks=[HypersphericalUniformity(verbose=first, **strength)],
        log_every_n_steps=LOG_EVERY,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,  # thousands of lines in a log file; the demo prints one per run
    )
    CHATTER.setLevel(logging.INFO if first else logging.WARNING)  # the table of layers, once
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")  # the data are in memory
        warnings.filterwarnings("ignore", ".*LeafSpec")  # Lightning's own, with recent PyTorch
        trainer.fit(network, loader)
    after, new = measure(network)
    weights = {name: (old[name], new[name]) for name in old}
    metrics = Path(csv.log_dir) / "metrics.csv"
    return Outcome(network.error(*images.test), before, after, weights, metrics)
