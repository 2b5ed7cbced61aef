"""The search that chose the demo's settings: without the penalty, by validation error, on other seeds."""

from __future__ import annotations

import statistics
from itertools import product

from torch import nn

from evidence.data import Data
from evidence.statistics import standard_error
from notebooks.demo_train import Plan, Settings, prepare

SEEDS = range(1000, 1008)


def tune(data: Data, plan: Plan) -> None:
    """Try four learning rates times three weight decays; of some data with wrong labels and with clean ones."""
    for grid in plan.grids:
        errors = {}
        for rate, decay in product(grid.rates, grid.decays):
            settings = Settings(grid.noise, rate, decay)
            errors[settings] = _trial(data, plan, settings)
        best = min(errors, key=errors.__getitem__)
        print(f"chosen: {best}, validation error {errors[best]:.2f} %\n", flush=True)


def _trial(data: Data, plan: Plan, settings: Settings) -> float:
    """Print and return the mean validation error over the seeds."""
    errors = [_validation_error(data, plan, settings, seed) for seed in SEEDS]
    mean = statistics.mean(errors)
    print(
        f"wrong labels {100 * settings.noise:<2.0f} % rate {settings.rate:<8g} decay {settings.decay:<7g} "
        f"validation error {mean:6.2f} % "
        f"(standard error {standard_error(errors):.2f})",
        flush=True,
    )
    return mean


def _validation_error(data: Data, plan: Plan, settings: Settings, seed: int) -> float:
    """Train as the demo does, but in a plain loop without logs, which is much faster."""
    network, batches, images = prepare(data, plan, settings, seed)
    configured = network.configure_optimizers()
    optimizer = configured["optimizer"]
    schedule = configured["lr_scheduler"]["scheduler"]
    for _ in range(plan.epochs):
        for inputs, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), labels).backward()
            optimizer.step()
            schedule.step()
    return network.error(*images.held_out)
