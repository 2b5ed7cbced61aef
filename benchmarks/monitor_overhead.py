"""What the callback costs off logging steps when it only monitors: a Trainer with and without it, in one run.

The model has 60 small Linear layers; the two trainings alternate, and the difference of their medians is printed with the
spread. The goal is below 0.1 ms a step.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hsu import HypersphericalUniformity

GOAL_MS = 0.1


class Deep(pl.LightningModule):
    """Sixty Linear layers of 16 neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(60)))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Mean square of the output."""
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Clock(pl.Callback):
    """Notes the time at the end of each batch."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        """Note the time."""
        self.ticks.append(time.perf_counter())


class Inside(HypersphericalUniformity):
    """The callback with a stopwatch around its two hooks of a step."""

    def __init__(self) -> None:
        super().__init__(coefficient=0, verbose=False)
        self.before, self.after = [], []

    def on_before_optimizer_step(self, *args: object) -> None:
        """Time the hook."""
        start = time.perf_counter()
        super().on_before_optimizer_step(*args)
        self.before.append(1e3 * (time.perf_counter() - start))

    def on_train_batch_end(self, *args: object) -> None:
        """Time the hook."""
        start = time.perf_counter()
        super().on_train_batch_end(*args)
        self.after.append(1e3 * (time.perf_counter() - start))


def step_times(callbacks: list[pl.Callback], steps: int) -> list[float]:
    """Milliseconds of each step, the first fifty left out."""
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*callbacks, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**9,
    )
    trainer.fit(Deep(), DataLoader(TensorDataset(torch.randn(16 * steps, 16)), batch_size=16))
    return [1e3 * (b - a) for a, b in zip(clock.ticks[50:], clock.ticks[51:], strict=False)]


def main() -> None:
    """Run both trainings in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    without, beside, inside = [], [], []
    for _ in range(arguments.rounds):
        callback = Inside()
        without.append(statistics.median(step_times([], arguments.steps)))
        beside.append(statistics.median(step_times([callback], arguments.steps)))
        inside.append(statistics.median(map(sum, zip(callback.before, callback.after, strict=True))))
    differences = [b - a for a, b in zip(without, beside, strict=True)]
    result = {
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, 1 thread",
        "layers": 60,
        "goal_ms": GOAL_MS,
        "step_without_ms": spread(without),
        "step_with_ms": spread(beside),
        "difference_ms": spread(differences),
        "inside_the_hooks_ms": spread(inside),
    }
    for key, value in result.items():
        print(f"{key:22s} {value}")
    target = Path(__file__).parent / "results" / "monitor_overhead.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": round(min(values), 4), "median": round(statistics.median(values), 4), "max": round(max(values), 4)}


if __name__ == "__main__":
    main()
