"""What the monitor measures for each layer, and the numbers that are logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_hsu._core import or_one, pair_energy, smallest_angle, unit_rows, with_float64
from lightning_hsu._core.group_numbers import GroupStats
from lightning_hsu._core.parts import Done, part_of
from lightning_hsu._engine.layer import Layer, to_compute_dtype
from lightning_hsu.measures import Measure, Sampled, State
from lightning_hsu.reference import random_level, score

_OF_ENERGY = 0.6  # the share of the energy in the time to measure a layer; the rest is the angle


@dataclass(frozen=True)
class LayerUniformity:
    """How uniform one layer is.

    Args:
        name: Name of the layer.
        groups: Groups measured separately (a grouped convolution), else 1; values are means over
            them.
        neurons: Neurons in a group.
        dimension: Dimension of a neuron.
        energy: Natural value of the measure.
        penalty: What training minimises, before the coefficient.
        ratio: Energy over that of random neurons: 1 is random, above 1 is more redundant. NaN with
            fewer than two live neurons.
        score: Where the energy lies between that of random neurons, 0, and a bound that none can
            beat, 1; below 0 it is worse than random. NaN where no bound is known.
        min_angle: Smallest angle between two neurons, in degrees; between two lines in half space.
            For a sampled energy, the smallest within its blocks.
        dead: Neurons whose weights are all zero; they are left out.
        nonfinite: Neurons with a NaN or infinite weight; they are left out.
        exact: Whether the energy is exact. That of a sampled measure is an estimate; that of a
            measure with an inner search is the best value found.
        standard_error: Standard error of an estimated energy; else 0.
        gradient_error: Standard error of a sampled gradient over its norm, NaN in a report, which
            computes no gradient; else 0.
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

    def unless_broken(self) -> LayerUniformity:
        """The same layer, with NaN for what says how good it is if it has NaN or infinite weights.

        One NaN neuron is enough for a network that gives NaN, however well the others are spread.
        """
        if self.nonfinite == 0:
            return self
        nan = math.nan
        return replace(self, energy=nan, penalty=nan, ratio=nan, score=nan, min_angle=nan)


@torch.no_grad()
def measure_layers(
    layers: Sequence[Layer], prepared: Callable[[Layer, Tensor], State | None]
) -> list[LayerUniformity]:
    """Measure layers as they are now; one pass of about n * n * d FLOP each.

    A layer with NaN or infinite weights has NaN for its numbers.

    Args:
        layers: The layers.
        prepared: Returns the state of a layer's measure for its neurons (groups, n, d).
    """
    measured = []
    for layer in layers:
        x = with_float64(to_compute_dtype(layer.target.neurons().detach()))  # (groups, n, d)
        state = prepared(layer, x)
        found = measure_neurons(layer.target.name, x, layer.measure, state)
        measured.append(found.unless_broken())
    return measured


def layers_at_zero(layers: Sequence[Layer]) -> list[Layer]:
    """Those of some layers whose neurons are all zero; one wait for the device, or two.

    Tensors without values, as those by which a program is looked at before it runs, are none.
    """
    found = []
    for layer in layers:
        if not any(isinstance(p, FakeTensor) for p in layer.parameters):
            found.append(layer)
    for rows in (1, None):  # of most layers the first neuron tells
        entries = []
        for layer in found:
            x = layer.target.neurons().detach()[:, :rows]
            is_there = torch.linalg.vector_norm(x, torch.inf) != 0  # as NaN is
            entries.append(is_there.to(layers[0].parameters[0].device))
        answers = torch.stack(entries).tolist() if entries else []
        found = [layer for layer, is_there in zip(found, answers, strict=True) if not is_there]
    return found


def measure_neurons(
    name: str, x: Tensor, measure: Measure, state: State | None = None, done: Done | None = None
) -> LayerUniformity:
    """Measure one set of neurons.

    Args:
        name: What to call it.
        x: Neurons, shape (groups, n, d), any floating dtype.
        measure: How to measure them.
        state: The state of the measure, from its ``prepare``.
        done: Called with the fraction of the work that is done.
    """
    x = with_float64(to_compute_dtype(x.detach()))
    groups, n, d = x.shape
    penalties = _penalties(x, measure, state, part_of(done, 0.0, _OF_ENERGY)).double()  # (groups,)
    penalty = penalties.mean()
    energy = measure.natural(penalties).mean()

    parts = [x]  # neurons (..., n, d) between which angles are measured
    errors = torch.zeros(2, groups)  # of the energy, and of the gradient over its norm
    if isinstance(measure, Sampled) and not measure.is_exact(state):
        parts = measure.sample(x, state)
        errors = torch.stack(measure.error(x, state))
    within = part_of(done, _OF_ENERGY, 1.0 - _OF_ENERGY)
    angle = _min_angle(parts, measure.half_space, within).rad2deg()

    # One synchronisation with the device for all numbers.
    values = torch.stack([penalty, energy, angle])
    numbers = torch.cat([values, _count(x).double()]).tolist()
    fewest, alive, dead, nonfinite = map(int, numbers[3:])
    each = round(alive / groups)
    ratio, energy_score = beside_random(measure, energy, fewest, each, d, x.dtype)
    return LayerUniformity(
        name=name,
        groups=groups,
        neurons=n,
        dimension=d,
        energy=numbers[1],
        penalty=numbers[0],
        ratio=ratio,
        score=energy_score,
        min_angle=numbers[2],
        dead=dead,
        nonfinite=nonfinite,
        exact=measure.is_exact(state),
        standard_error=float(torch.linalg.vector_norm(errors[0])) / groups,
        gradient_error=float(errors[1].square().mean().sqrt()),
    )


def uniformity_of_groups(layer: Layer, groups: Sequence[GroupStats]) -> LayerUniformity:
    """One layer from the numbers of its groups.

    Args:
        layer: The layer, whose measure is a mean over pairs.
        groups: The numbers.
    """
    measure = layer.measure
    _, n, d = layer.target.shape
    term = measure.pair_term()
    assert term is not None
    energies = torch.tensor([group.energy for group in groups], dtype=torch.float64)
    penalties = energies
    if term.logarithm:
        penalties = torch.where(energies > 0, energies, 1.0).log()
    penalty = penalties.mean()
    energy = measure.natural(penalties).mean()
    live = [group.live for group in groups]
    finite = [group.finite for group in groups]
    cosine = min(max(group.cosine for group in groups), 1.0)
    alive = sum(live)
    ratio, energy_score = beside_random(measure, energy, min(live), round(alive / len(groups)), d)
    found = LayerUniformity(
        name=layer.target.name,
        groups=len(groups),
        neurons=n,
        dimension=d,
        energy=float(energy),
        penalty=float(penalty),
        ratio=ratio,
        score=energy_score,
        min_angle=math.degrees(math.acos(max(cosine, -1.0))),
        dead=sum(finite) - alive,
        nonfinite=n * len(groups) - sum(finite),
        exact=True,
    )
    return found.unless_broken()


def beside_random(
    measure: Measure,
    energy: Tensor,
    fewest: int,
    each: int,
    d: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """The ratio and the score of a layer; NaN with fewer than two live neurons in a group.

    NaN, too, where a steep kernel's energies are beyond the numbers of the computation.

    Args:
        measure: The measure.
        energy: Its natural value.
        fewest: The fewest live neurons of a group.
        each: Live neurons of a group on average.
        d: Their dimension.
        dtype: In which the energy was computed.
    """
    if fewest <= 1:
        return math.nan, math.nan
    level = random_level(measure, each, d)
    if is_out_of_range(measure, float(energy), level, dtype):
        return math.nan, math.nan
    ratio = float(measure.ratio(energy, level))
    return ratio, float(score(measure, energy, each, d))


def is_out_of_range(
    measure: Measure, energy: float, level: float, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether a steep kernel's energy, or that of random neurons, is too small or large to compare.

    An energy at the largest number is more than that, which is enough beside a smaller level. Other
    measures may well be 0.

    Args:
        measure: The measure.
        energy: Its natural value.
        level: That of random neurons.
        dtype: In which the energy was computed.

    Example:
        >>> from lightning_hsu.measures import RieszEnergy
        >>> is_out_of_range(RieszEnergy(s=1000), 0.0, 1.9e-49)
        True
        >>> is_out_of_range(RieszEnergy(s=2), 1.5, 0.5)
        False
    """
    if isinstance(measure, Sampled):
        measure = measure.measure
    formula = getattr(measure, "compiled_as", None)  # a power or an exponential is never 0
    if formula is None or formula[1] == 0.0:
        return False
    if getattr(measure, "in_float64", False):
        dtype = torch.float64
    numbers = torch.finfo(dtype)
    is_known = numbers.tiny <= abs(level) <= numbers.max
    return not is_known or abs(energy) < numbers.tiny


def _penalties(x: Tensor, measure: Measure, state: State | None, done: Done | None) -> Tensor:
    """What training minimises, (groups,), of neurons (groups, n, d)."""
    term = measure.pair_term()
    if done is None or term is None:
        return measure.penalty(x, state)
    energies = pair_energy(x, term, with_grad=False, done=done)[0]
    if term.logarithm:
        return or_one(energies).log()
    return energies


def _min_angle(parts: Sequence[Tensor], half_space: bool, done: Done | None = None) -> Tensor:
    """Smallest angle in radians between two neurons of the same part (..., n, d)."""
    angles = []
    for i, part in enumerate(parts):
        within = part_of(done, i / len(parts), 1.0 / len(parts))
        angles.append(smallest_angle(part, half_space=half_space, done=within).amin())
    return torch.stack(angles).amin()


def _count(x: Tensor) -> Tensor:
    """Count neurons of x (groups, n, d): the fewest live in a group, all live, dead, non-finite."""
    finite = torch.isfinite(x).all(-1)  # (groups, n)
    live = (unit_rows(x)[1] > 0).squeeze(-1)  # (groups, n)
    dead = finite & ~live
    return torch.stack([live.sum(-1).amin(), live.sum(), dead.sum(), (~finite).sum()])


def aggregates(
    measured: Sequence[LayerUniformity], penalty: float, limited: int | None
) -> dict[str, float]:
    """Numbers of the whole model, by name.

    With a NaN or infinite weight anywhere all that could be watched for an optimum is NaN, so that
    EarlyStopping stops and ModelCheckpoint keeps what was better.

    Args:
        measured: The layers.
        penalty: Coefficient times penalty, summed over the layers.
        limited: Neurons whose penalty gradient was shortened; None if not known.
    """
    ratios = []
    angles = []
    dead = 0
    for layer in measured:
        if math.isfinite(layer.ratio):
            ratios.append(layer.ratio)
        if math.isfinite(layer.min_angle):
            angles.append(layer.min_angle)
        dead += layer.dead
    values = {
        "penalty": penalty,
        "ratio_mean": math.nan,
        "ratio_max": max(ratios, default=math.nan),
        "angle_min": min(angles, default=math.nan),
        "dead": float(dead),
    }
    if ratios:
        values["ratio_mean"] = sum(ratios) / len(ratios)
    if any(layer.nonfinite for layer in measured):
        for name in ("penalty", "ratio_mean", "ratio_max", "angle_min"):
            values[name] = math.nan
    if limited is not None:
        values["limited"] = float(limited)
    return values


def by_layer(
    measured: Sequence[LayerUniformity],
    coefficients: Mapping[str, float],
    shares: Mapping[str, float],
) -> dict[str, float]:
    """Numbers of each layer, by "quantity/layer".

    Args:
        measured: The layers.
        coefficients: Coefficients that change over time, by layer.
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
    for name, coefficient in coefficients.items():
        values[f"coefficient/{name}"] = coefficient
    for name, share in shares.items():
        values[f"gradient_share/{name}"] = share
    return values
