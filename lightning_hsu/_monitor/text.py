"""What the numbers of a layer say, in words: facts beside random neurons, no advice."""

from __future__ import annotations

import math

from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu.measures import Measure
from lightning_hsu.reference import random_range

_CLOSE = 0.01  # difference of a ratio from 1 that is none, however many neurons there are
_SPREAD = 0.5
"""Score from which neurons are more even than random, however close to 1 the ratio is.

In many dimensions the ratio always is.
"""


def finding(
    layer: LayerUniformity, measure: Measure, *, dead: int | None = None, similar: int = 0
) -> str:
    """Say in words how a layer stands beside random neurons.

    Args:
        layer: Its numbers.
        measure: How it was measured.
        dead: Its neurons that do nothing; None takes those that are all zero.
        similar: Its near-duplicate pairs, where they were counted.

    Returns:
        Such as "1.42x random, 11 near-duplicate pairs, 3 dead"; "as random" where the ratio is within 1 % of 1 or what random
        layers of this shape have themselves.
    """
    words = [_standing(layer, measure)]
    if similar:
        words.append(counted(similar, "near-duplicate pair"))
    if dead := layer.dead if dead is None else dead:
        words.append(f"{dead:,} dead")
    if layer.nonfinite:
        words.append(f"{layer.nonfinite:,} NaN or infinite")
    return ", ".join(words)


def _standing(layer: LayerUniformity, measure: Measure) -> str:
    if not math.isfinite(layer.ratio):
        alive = layer.groups * layer.neurons - layer.dead - layer.nonfinite
        few = "fewer than two live neurons"
        return (
            few
            if alive <= layer.groups
            else "no random reference"
            if layer.groups == 1
            else f"a group with {few}"
        )
    close = abs(layer.ratio - 1.0) <= _CLOSE
    if (close and not layer.score >= _SPREAD) or _within_random(layer, measure):
        return "as random"
    if layer.ratio > 1.0:
        return f"{number(layer.ratio, 2 if layer.ratio < 100 else 0)}x random"
    return (
        f"more even than random ({f'score {layer.score:.2f}' if close else f'{layer.ratio:.2f}x'})"
    )


def _within_random(layer: LayerUniformity, measure: Measure) -> bool:
    """Whether random layers of this shape have such energies themselves."""
    alive = round(layer.neurons - (layer.dead + layer.nonfinite) / layer.groups)
    low, high = random_range(measure, alive, layer.dimension, layer.groups)
    return low <= layer.energy <= high


def counted(number: int, what: str) -> str:
    """A number of things, such as "2 pairs"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def number(x: float, digits: int) -> str:
    """A number for a cell, short also where it is huge; a dash for NaN.

    Example:
        >>> number(1.2345, 2), number(12345.0, 2), number(1e30, 2), number(float("nan"), 2)
        ('1.23', '12,345', '1.0e+30', '-')
    """
    if not math.isfinite(x):
        return "-" if math.isnan(x) else f"{x:g}"
    rounded = round(x, digits) or 0.0  # no minus before 0
    if abs(rounded) < 1000:
        return f"{rounded:.{digits}f}"
    return f"{x:,.0f}" if abs(round(x)) < 1e6 else f"{x:.1e}"
