"""What uniform random vectors look like: how their angles are spread, and their singular values."""

from __future__ import annotations

import math

import torch

_PARTS = 32  # points at which a bin of angles is looked at
_STEPS = 2000  # points at which the law of singular values is


def expected_angles(pairs: float, dimension: int, bins: int) -> list[float]:
    """How many of so many pairs of uniform vectors have an angle in each of as many equal parts of [0, 180] degrees.

    The density is proportional to sin(t)^(d - 2); its logarithm is taken first, for in thousands of dimensions it underflows.
    """
    if dimension < 2:  # the same or opposite, nothing between
        return [pairs / 2.0 if i in (0, bins - 1) else 0.0 for i in range(bins)]
    logs = [(dimension - 2) * math.log(math.sin(math.pi * (i + 0.5) / (bins * _PARTS))) for i in range(bins * _PARTS)]
    highest = max(logs)
    weights = [math.exp(value - highest) for value in logs]
    scale = pairs / math.fsum(weights)
    return [scale * math.fsum(weights[i : i + _PARTS]) for i in range(0, len(weights), _PARTS)]


def random_singular_values(vectors: float, dimension: int, chances: list[float]) -> list[float]:
    """Quantiles of the singular values other than 0 of random unit vectors, as their number grows (Marchenko and Pastur).

    Args:
        vectors: How many; the mean over groups, so no whole number.
        dimension: Theirs.
        chances: Which quantiles, in (0, 1).
    """
    ratio = vectors / dimension
    # Squares are 1 + ratio + 2 sqrt(ratio) cos(t); in t their density sin(t)^2 / square has no pole at the edges.
    turns = math.pi * (1.0 - (torch.arange(_STEPS, dtype=torch.float64) + 0.5) / _STEPS)  # squares rise
    squares = 1.0 + ratio + 2.0 * math.sqrt(ratio) * turns.cos()
    mass = (turns.sin().square() / squares).cumsum(0)
    at = torch.searchsorted(mass, mass[-1] * torch.tensor(chances, dtype=torch.float64)).clamp_max_(_STEPS - 1)
    values: list[float] = squares[at].sqrt().tolist()
    return values
