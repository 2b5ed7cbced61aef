"""What the monitor knows of a layer, in numbers that have a reference, and the table of what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._core import smallest_angle, unit_rows, with_float64
from lightning_hsu._engine.layer import Layer, widened
from lightning_hsu.measures import Measure, Sampled, State
from lightning_hsu.reference import random_level, score


@dataclass(frozen=True)
class LayerUniformity:
    """What the monitor knows of one layer.

    Args:
        name: Name of the layer.
        groups: Groups measured apart (a grouped convolution), else 1; the values are means over them.
        neurons: Neurons a group.
        dimension: Dimension of a neuron.
        energy: Natural value of the measure.
        penalty: What training minimises, before the coefficient.
        ratio: Energy over that of random neurons: 1 as random, above 1 more redundant. NaN with fewer than
            two live neurons.
        score: Where the energy stands between that of random neurons, 0, and a bound that none can beat, 1; below 0 it is
            worse than random. NaN where no bound is known.
        min_angle: Smallest angle between two neurons, in degrees; between two lines in half space, and within the blocks of a
            sampled energy.
        dead: Neurons whose weights are all zero; they are left out.
        nonfinite: Neurons with a NaN or infinite weight; they are left out.
        exact: Whether the energy is exact; of a measure with an inner problem it may be a bound, the best that was found, of a
            sampled one it is an estimate.
        standard_error: Of the energy, if it is an estimate; else 0.
        gradient_error: Standard error of a sampled gradient over its norm; else 0.
    """

    name: str
    groups: int
    neurons: int
    dimension: int
    energy: float
    penalty: float
    ratio: float
    score: float
    min_angle: float
    dead: int
    nonfinite: int
    exact: bool
    standard_error: float = 0.0
    gradient_error: float = 0.0


@torch.no_grad()
def measure_layers(
    layers: Sequence[Layer], prepared: Callable[[Layer, Tensor], State | None]
) -> list[LayerUniformity]:
    """Measure layers as they are now; one pass of about n * n * d FLOP each.

    Args:
        layers: The layers.
        prepared: Gives the state of a layer's measure for its neurons (groups, n, d).
    """
    return [_measure(layer, prepared) for layer in layers]


def aggregates(
    measured: Sequence[LayerUniformity], penalty: float, limited: int | None
) -> dict[str, float]:
    """Numbers of the whole model, worth watching, by name.

    Args:
        measured: The layers.
        penalty: Coefficient times penalty, summed over them.
        limited: Neurons whose penalty gradient was shortened; None where that is not known.
    """
    ratios = [layer.ratio for layer in measured if math.isfinite(layer.ratio)]
    angles = [layer.min_angle for layer in measured if math.isfinite(layer.min_angle)]
    values = {
        "penalty": penalty,
        "ratio_mean": sum(ratios) / len(ratios) if ratios else math.nan,
        "ratio_max": max(ratios, default=math.nan),
        "angle_min": min(angles, default=math.nan),
        "dead": float(sum(layer.dead for layer in measured)),
    }
    return values if limited is None else values | {"limited": float(limited)}


def by_layer(
    measured: Sequence[LayerUniformity],
    coefficients: Mapping[str, float],
    shares: Mapping[str, float],
) -> dict[str, float]:
    """Numbers of each layer, by kind and layer.

    Args:
        measured: The layers.
        coefficients: Those that change over time, by layer.
        shares: Norms of the added gradients over those of the task's, by layer.
    """
    values = {}
    for layer in measured:
        values[f"ratio/{layer.name}"] = layer.ratio
        if not math.isnan(layer.score):
            values[f"score/{layer.name}"] = layer.score
        values[f"energy/{layer.name}"] = layer.energy
        if layer.standard_error > 0:
            values[f"standard_error/{layer.name}"] = layer.standard_error
            values[f"gradient_error/{layer.name}"] = layer.gradient_error
        values[f"min_angle/{layer.name}"] = layer.min_angle
    values |= {f"coefficient/{name}": value for name, value in coefficients.items()}
    return values | {f"gradient_share/{name}": value for name, value in shares.items()}


def measure_neurons(
    name: str, x: Tensor, measure: Measure, state: State | None = None
) -> LayerUniformity:
    """Measure one set of neurons.

    Args:
        name: What to call it.
        x: Neurons, shape (groups, n, d), any floating dtype.
        measure: How.
        state: What the measure carries on, from its ``prepare``.
    """
    x = with_float64(widened(x.detach()))
    groups, n, d = x.shape
    finite = torch.isfinite(x).all(-1)  # (groups, n)
    live = (unit_rows(x)[1] > 0).squeeze(-1)
    penalties = measure.penalty(x, state).double()
    penalty, energy = penalties.mean(), measure.natural(penalties).mean()
    sampled = measure if isinstance(measure, Sampled) and not measure.is_exact(state) else None
    seen = sampled.sample(x, state) if sampled else [x]
    half_space = in_half_space(measure)
    angle = (
        torch.stack([smallest_angle(part, half_space=half_space).amin() for part in seen])
        .amin()
        .rad2deg()
    )
    errors = sampled.error(x, state) if sampled else torch.zeros(2, groups)
    counts = torch.stack([live.sum(-1).amin(), live.sum(), (finite & ~live).sum(), (~finite).sum()])
    numbers = torch.cat([torch.stack([penalty, energy, angle]), counts.double()]).tolist()
    fewest, alive, dead, nonfinite = (int(count) for count in numbers[3:])
    ratio = standing = float("nan")
    if fewest > 1:
        each = round(alive / groups)
        ratio = float(measure.ratio(energy, random_level(measure, each, d)))
        standing = float(score(measure, energy, each, d))
    return LayerUniformity(
        name=name,
        groups=groups,
        neurons=n,
        dimension=d,
        energy=numbers[1],
        penalty=numbers[0],
        ratio=ratio,
        score=standing,
        min_angle=numbers[2],
        dead=dead,
        nonfinite=nonfinite,
        exact=measure.is_exact(state),
        standard_error=float(torch.linalg.vector_norm(errors[0])) / groups,
        gradient_error=float(errors[1].square().mean().sqrt()),
    )


def in_half_space(measure: Measure) -> bool:
    """Whether a measure sees lines: opposite neurons coincide."""
    return bool(getattr(measure, "half_space", False))


def _measure(layer: Layer, prepared: Callable[[Layer, Tensor], State | None]) -> LayerUniformity:
    x = with_float64(widened(layer.target.neurons().detach()))  # (groups, n, d)
    return measure_neurons(layer.target.name, x, layer.measure, prepared(layer, x))
