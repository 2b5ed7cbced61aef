"""Real training steps with and without the penalty, in turns of a few steps each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.gpu.launches import waits_of
from benchmarks.gpu.machine import (
    backends,
    brief,
    milliseconds,
    require_backend,
    synchronize,
    using,
)
from benchmarks.gpu.models import Task, task
from benchmarks.gpu.runner import Report
from benchmarks.timing import spread
from lightning_hsu import UniformityRegularizer

TURN = 5  # steps of a rival before the next one's turn
TURNS = 6
WARM_UP = 4
TOLERANCE = 0.05


@dataclass(frozen=True)
class Kind:
    """A way to train."""

    name: str
    backend: str = "torch"
    penalised: bool = True
    tolerance: float | None = None


@dataclass
class Rival:
    """A way to train, with a model of its own.

    A model of its own, since what the penalty does may outlast a step: gradients that are kept, or
    computed at the side of the next forward pass.
    """

    kind: Kind
    task: Task
    model: nn.Module
    optimizer: Optimizer
    regularizer: UniformityRegularizer | None
    times: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def loss_and_gradients(self) -> None:
        """Forward and backward."""
        device = next(self.model.parameters()).device.type
        for _ in range(self.task.accumulate):
            with torch.autocast(device, torch.bfloat16):
                loss = self.task.loss(self.model)
            (loss / self.task.accumulate).backward()

    def step(self) -> None:
        """A training step."""
        self.loss_and_gradients()
        if self.regularizer is not None:
            self.regularizer.add_gradients(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def logging_step(self) -> None:
        """A training step with what the callback does when it logs."""
        self.loss_and_gradients()
        if self.regularizer is not None:
            self.regularizer.add_gradients(self.optimizer, stats=True)
        self.optimizer.step()
        if self.regularizer is not None:
            self.regularizer.measure_layers()
        self.optimizer.zero_grad()


def kinds(device: str) -> list[Kind]:
    """Without the penalty, with it by each back end, and with kept gradients."""
    found = [Kind("no penalty", penalised=False)]
    for backend in backends(device):
        if backend == "triton" and device == "cpu":
            continue  # the interpreter would take all the time
        found.append(Kind("exact", backend))
    found.append(Kind(f"tolerance {TOLERANCE}", tolerance=TOLERANCE))
    return found


def rival(kind: Kind, task: Task) -> Rival:
    """A rival that begins with the task's weights."""
    model = copy.deepcopy(task.model)
    optimizer = task.optimizer(model)
    regularizer = None
    if kind.penalised:
        regularizer = UniformityRegularizer(tolerance=kind.tolerance).attach(model)
    return Rival(kind, task, model, optimizer, regularizer)


def measure(report: Report, name: str) -> None:
    """One row for each rival."""
    settings = report.settings
    require_backend("torch", settings.device)
    what = task(name, settings.device, quick=settings.quick)
    report.note(f"{what.about}; an own loop with UniformityRegularizer, its defaults")
    if settings.device == "cpu":
        report.note("triton on a CPU is an interpreter: left out; waits and memory need a card")
    rivals = started(report, what)
    take_turns(report, rivals)
    for one in rivals:
        show(report, one, rivals)


def started(report: Report, what: Task) -> list[Rival]:
    """The rivals that have done their first steps; one that fails is noted."""
    found = []
    for kind in kinds(report.settings.device):
        try:
            one = rival(kind, what)
            with using(kind.backend):
                for _ in range(2 if report.settings.quick else WARM_UP):
                    one.step()
                synchronize(report.settings.device)
        except Exception as error:  # one rival says nothing about the others
            report.row(step=kind.name, **{"back end": kind.backend}, error=brief(error))
            continue
        found.append(one)
    return found


def take_turns(report: Report, rivals: Sequence[Rival]) -> None:
    """Time the rivals, a few steps each, until all is done or time is short."""
    quick = report.settings.quick
    turns = 2 if quick else TURNS
    steps = 2 if quick else TURN
    for turn in range(turns):
        round_of_turns = 0.0
        for one in rivals:
            with using(one.kind.backend):
                seconds = time_steps(report, one, steps)
            round_of_turns += seconds
        if report.seconds_left < 2 * round_of_turns + 5:
            report.note(f"time for {steps * (turn + 1)} of {steps * turns} steps each")
            return


def time_steps(report: Report, one: Rival, steps: int) -> float:
    """Time some steps of a rival from an idle device to an idle device; return the seconds."""
    device = report.settings.device
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()

    def run() -> None:
        for _ in range(steps):
            one.step()

    taken = milliseconds(run, device)
    one.times.append(taken / steps)
    if device == "cuda":
        one.peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
    return taken / 1000


def show(report: Report, one: Rival, rivals: Sequence[Rival]) -> None:
    """Write a rival's row: its time, what it adds to a step, its peak memory and its waits."""
    device = report.settings.device
    values: dict[str, object] = {"step": one.kind.name}
    if one.regularizer is not None:
        values["back end"] = one.kind.backend
    values["ms"] = spread(one.times)
    bare = rivals[0]
    if one.regularizer is not None and bare.regularizer is None:
        values["added %"] = spread(quotients(one.times, bare.times))
    with using(one.kind.backend):
        logging = [milliseconds(one.logging_step, device) for _ in range(2)]
        values["logging step ms"] = round(min(logging), 3)
        if device == "cuda":
            values["peak MiB"] = round(max(one.peaks))
            values |= waits_in_penalty(one)
    report.row(**values)


def quotients(times: Sequence[float], bare: Sequence[float]) -> list[float]:
    """What the times add to those of the same turns, in percent."""
    found = []
    for with_penalty, without in zip(times, bare, strict=False):
        found.append(100.0 * (with_penalty / without - 1.0))
    return found


def waits_in_penalty(one: Rival) -> dict[str, object]:
    """Blocking waits of what the penalty does in a step."""
    regularizer = one.regularizer
    if regularizer is None:
        return {}
    one.loss_and_gradients()

    def act() -> None:
        regularizer.add_gradients(one.optimizer)

    return waits_of(act)
