"""What the callback adds to a step, off logging steps, when it only monitors and when it penalises.

The model has 60 small Linear layers, the worst case: nothing but overhead. Within one training run
the steps take turns: no callback, one that does nothing (Lightning's own price of a callback), the
monitor, the penalty. A drift of the machine's speed affects all alike. It prints the differences of
the medians over the rounds, and the time inside the monitor's hooks. The goals are below 0.1 ms per
step for the monitor and 0.8 ms for the penalty.

Then it prints the time of a step of the engine without Lightning, and how much of it is
bookkeeping, not pair sums; the goal is 15 us per layer. Of that watching the model for changes is
to stay below 5 us. Last, it prints the time of a 512 x 512
layer whose neurons have condensed onto four directions (a quarter of its pairs is computed again in
float64) over that of a random one, and the time to draw and write a set of figures for ten layers.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from unittest import mock

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.timing import machine, quotient, rounds_of, save, spread
from lightning_hsu import HypersphericalUniformity, UniformityRegularizer
from lightning_hsu._engine import plan
from lightning_hsu.measures import RieszEnergy

GOAL_MS = 0.1  # of the monitor; that of the penalty is 0.8 ms, and 15 us of bookkeeping per layer
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


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


class Turns(pl.Callback):
    """Changes the trainer's callbacks after each step, and times the steps by whose turn it was."""

    def __init__(self, turns: dict[str, list[pl.Callback]]) -> None:
        self.turns = turns
        self.times: dict[str, list[float]] = {name: [] for name in turns}
        self.name = next(iter(turns))
        self.start = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Stop the clock, hand over, start the clock."""
        self.times[self.name].append(1e3 * (time.perf_counter() - self.start))
        names = list(self.turns)
        self.name = names[(names.index(self.name) + 1) % len(names)]
        trainer.callbacks = [*self.turns[self.name], self]
        self.start = time.perf_counter()


class Inside(HypersphericalUniformity):
    """The monitor with a stopwatch around its two hooks of a step."""

    def __init__(self) -> None:
        super().__init__(coefficient=0, verbose=False)
        self.before: list[float] = []
        self.after: list[float] = []

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


def one_training(turns: Turns, steps: int) -> dict[str, float]:
    """Median step time of each turn, ms, without the first tenth of the steps."""
    callbacks = [callback for turn in turns.turns.values() for callback in turn]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*callbacks, turns],
        log_every_n_steps=10**9,
        **QUIET,
    )
    trainer.fit(Deep(), batches_of(torch.randn(16 * steps, 16)))
    medians = {}
    for name, times in turns.times.items():
        medians[name] = statistics.median(times[len(times) // 10 :])
    return medians


def batches_of(x: torch.Tensor) -> DataLoader:
    """The rows of x in batches of 16."""
    return DataLoader(TensorDataset(x), batch_size=16)


def one_round(steps: int) -> dict[str, float]:
    """Time the monitor and the penalty, in separate runs: a longer step changes the caches."""
    monitor = Inside()
    watching = Turns({"without": [], "empty": [pl.Callback()], "monitor": [monitor]})
    monitored = one_training(watching, steps)
    last = steps // 5
    before = monitor.before[-last:]
    after = monitor.after[-last:]
    inside = [a + b for a, b in zip(before, after, strict=True)]

    penalty = HypersphericalUniformity(coefficient=1e-3, verbose=False)
    penalised = one_training(Turns({"without": [], "penalty": [penalty]}), steps)
    return {
        "step_without_ms": monitored["without"],
        "empty_callback_adds_ms": monitored["empty"] - monitored["without"],
        "monitor_adds_ms": monitored["monitor"] - monitored["without"],
        "inside_the_hooks_ms": statistics.median(inside),
        "penalty_adds_ms": penalised["penalty"] - penalised["without"],
        **host_time(),
        "condensed_over_random": condensed_over_random(),
        "figures_ms_a_set": one_set_of_figures(),
    }


def host_time(steps: int = 300) -> dict[str, float]:
    """Time the engine on sixty layers: a whole step, its bookkeeping and its watching per layer.

    Bookkeeping is a step less the pair sums, which are timed within it. Watching is a look whether
    the model has changed; a step of the callback looks twice.
    """
    net = Deep().net
    regularizer = UniformityRegularizer(coefficient=1e-3).attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    inside: list[float] = []
    pair_sums = plan.add_all_pair_gradients

    def timed(*arguments: object) -> None:
        start = time.perf_counter()
        pair_sums(*arguments)
        inside[-1] += time.perf_counter() - start

    whole = []
    with mock.patch.object(plan, "add_all_pair_gradients", timed):
        for _ in range(steps):
            inside.append(0.0)
            start = time.perf_counter()
            regularizer.add_gradients(optimizer)
            whole.append(time.perf_counter() - start)
    bookkeeping = [a - b for a, b in zip(whole, inside, strict=True)]
    looks = []
    for _ in range(steps):
        start = time.perf_counter()
        regularizer.follow([optimizer])
        looks.append(time.perf_counter() - start)
    return {
        "engine_step_ms": 1e3 * statistics.median(whole),
        "host_us_a_layer": 1e6 * statistics.median(bookkeeping) / len(net),
        "watching_us_a_layer": 1e6 * statistics.median(looks) / len(net),
    }


def condensed_over_random() -> float:
    """Time of a condensed layer over that of a random one, the median of five rounds."""
    measure = RieszEnergy(s=2.0, half_space=True)
    random = torch.randn(512, 512)
    condensed = torch.randn(4, 512).repeat(128, 1) + 0.1 * random
    rivals = {
        "condensed": partial(measure.value_and_grad, condensed),
        "random": partial(measure.value_and_grad, random),
    }
    times = rounds_of(rivals, 5)
    return quotient(times, "condensed", "random")["median"]


class Drawing:
    """Ten layers of 256 neurons, and after each step a set of figures, timed: three PNG files."""

    def __init__(self, folder: str) -> None:
        self.drawn = HypersphericalUniformity(
            coefficient=1e-3, figures_every_n_steps=1, verbose=False
        )
        self.folder = folder
        self.times: list[float] = []
        show = self.drawn._figures.show
        self.drawn._figures.show = partial(self.timed, show)

    def timed(self, show: Callable[..., None], *args: object) -> None:
        """Draw with a stopwatch."""
        start = time.perf_counter()
        show(*args)
        self.times.append(1e3 * (time.perf_counter() - start))

    def train(self, steps: int) -> None:
        """Train for a number of steps, with a set of figures after each."""
        model = Deep()
        model.net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(10)))
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[self.drawn],
            default_root_dir=self.folder,
            log_every_n_steps=1,
            **QUIET,
        )
        trainer.fit(model, batches_of(torch.randn(16 * steps, 256)))


def one_set_of_figures(sets: int = 8) -> float:
    """Median time of a set, ms, without the first, which loads fonts."""
    with tempfile.TemporaryDirectory() as folder:
        drawing = Drawing(folder)
        drawing.train(sets)
    drawn = [ms for ms in drawing.times if ms > 1]  # at the end of fit the set is already drawn
    return statistics.median(drawn[1:])


def main() -> None:
    """Run the rounds, print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="in miniature, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps = 100
        arguments.rounds = 1
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rounds = [one_round(arguments.steps) for _ in range(arguments.rounds)]
    result: dict[str, object] = {"machine": machine(), "layers": 60, "goal_ms": GOAL_MS}
    for key in rounds[0]:
        result[key] = spread([one[key] for one in rounds])
    for key, value in result.items():
        print(f"{key:24s} {value}")
    if not arguments.quick:
        save("overhead", result)


if __name__ == "__main__":
    main()
