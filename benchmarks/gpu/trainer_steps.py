"""A Trainer's steps with the callback and without, one fit after the other, twice."""

from __future__ import annotations

import copy
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from benchmarks.gpu.machine import require_backend, synchronize
from benchmarks.gpu.models import Task, task
from benchmarks.gpu.runner import Report
from benchmarks.gpu.trainer import quiet_trainer
from benchmarks.timing import spread
from lightning_hsu import HypersphericalUniformity

WARM_UP = 5
STEPS = 15
FITS = 2


class Module(pl.LightningModule):
    """A task as Lightning trains it; the loader's batches only count."""

    def __init__(self, what: Task) -> None:
        super().__init__()
        self.task = what
        self.model = copy.deepcopy(what.model)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of the task's batch."""
        return self.task.loss(self.model)

    def configure_optimizers(self) -> Optimizer:
        """The task's optimizer."""
        return self.task.optimizer(self.model)


class Timer(pl.Callback):
    """Milliseconds of a step after the first few, from an idle device to an idle device.

    It comes last, so that what other callbacks do in the last step is within.
    """

    def __init__(self, device: str, skip: int, last: int) -> None:
        self.device = device
        self.skip = skip
        self.last = last
        self.ms = float("nan")
        self._begin = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Begin after the warm-up."""
        if batch_idx == self.skip:
            synchronize(self.device)
            self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End with the last step."""
        if batch_idx == self.last:
            synchronize(self.device)
            taken = time.perf_counter() - self._begin
            self.ms = 1000 * taken / (self.last + 1 - self.skip)


def measure(report: Report) -> None:
    """A row for each way."""
    settings = report.settings
    require_backend("torch", settings.device)
    what = task("ResNet-50", settings.device, quick=settings.quick)
    times: dict[str, list[float]] = {"no callback": [], "callback, defaults": []}
    for _ in range(FITS):
        for name, found in times.items():
            callbacks = [] if name == "no callback" else [HypersphericalUniformity()]
            found.append(fit(what, callbacks, report))
        if report.seconds_left < 10:
            report.note("time for one fit each")
            break
    for name, found in times.items():
        report.row(step=name, ms=spread(found))
    report.note(f"{what.about}; one fit after the other: what runs later runs on a warmer card")


def fit(what: Task, callbacks: list[pl.Callback], report: Report) -> float:
    """Train for some steps; return the milliseconds of one."""
    settings = report.settings
    skip, steps = (1, 3) if settings.quick else (WARM_UP, STEPS)
    timer = Timer(settings.device, skip, skip + steps - 1)
    loader: DataLoader[Tensor] = DataLoader(torch.zeros(skip + steps), batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(
            settings.device,
            precision="bf16-mixed",
            max_epochs=1,
            callbacks=[*callbacks, timer],
        )
        trainer.fit(Module(what), loader)
    return timer.ms
