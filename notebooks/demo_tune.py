"""The search that chose the demo's settings, by validation error, on seeds that the demo does not train on."""

from __future__ import annotations

import statistics
from itertools import product

from torch import nn

from evidence.data import Data
from lightning_hsu import UniformityRegularizer
from notebooks.demo_train import Plan, Settings, prepare

SEEDS = range(100, 108)
DECAYS = (3e-4, 1e-3, 3e-3)
COEFFICIENTS = (0.03, 0.1, 0.3)


def tune(data: Data, plan: Plan) -> None:
    """Twelve trials without the penalty, then twelve with it around the best of those, at both scales."""
    for scale in (plan.small_scale, 1.0):
        without = [Settings(scale, rate, decay) for rate, decay in product(plan.rates, DECAYS)]
        best = _best(data, plan, without)
        rates = _with_neighbour(plan.rates, best.rate)
        decays = _with_neighbour(DECAYS, best.decay)
        near = product(rates, decays, COEFFICIENTS)
        _best(data, plan, [Settings(scale, *values) for values in near])


def _with_neighbour(values: tuple[float, ...], chosen: float) -> tuple[float, float]:
    """The chosen value and the next smaller one (or larger, where there is none)."""
    i = values.index(chosen)
    return chosen, values[i - 1 if i else 1]


def _best(data: Data, plan: Plan, trials: list[Settings]) -> Settings:
    """The settings with the smallest validation error."""
    errors = {settings: _trial(data, plan, settings) for settings in trials}
    best = min(errors, key=lambda settings: errors[settings])
    print(f"chosen: {best}, validation error {errors[best]:.2f} %\n", flush=True)
    return best


def _trial(data: Data, plan: Plan, settings: Settings) -> float:
    errors = [_validation_error(data, plan, settings, seed) for seed in SEEDS]
    mean = statistics.mean(errors)
    sem = statistics.stdev(errors) / len(errors) ** 0.5
    print(
        f"scale {settings.scale:<5g} rate {settings.rate:<6g} decay {settings.decay:<7g} "
        f"coefficient {settings.coefficient:<5g} validation error {mean:6.2f} % (standard error {sem:.2f})",
        flush=True,
    )
    return mean


def _validation_error(data: Data, plan: Plan, settings: Settings, seed: int) -> float:
    """A run as in the demo, in a plain loop: nothing to log, and three times as fast."""
    network, loader, images = prepare(data, plan, settings, seed)
    regularizer = UniformityRegularizer(coefficient=settings.coefficient).attach(network)
    made = network.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for _ in range(plan.epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), labels).backward()
            regularizer.add_gradients(optimizer)
            optimizer.step()
            schedule.step()
    return network.error(*images.held_out)
