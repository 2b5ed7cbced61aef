"""What the singular values of uniform random vectors are like."""

from __future__ import annotations

import math

import torch

_STEPS = 2000  # points at which the law of singular values is


def random_singular_values(vectors: float, dimension: int, chances: list[float]) -> list[float]:
    """Quantiles of the singular values other than 0 of random unit vectors, as their number grows (Marchenko and Pastur).

    Args:
        vectors: How many; the mean over groups, so no whole number.
        dimension: Theirs.
        chances: Which quantiles, in (0, 1).
    """
    ratio = vectors / dimension
    # Squares are 1 + ratio + 2 sqrt(ratio) cos(t); in t their density sin(t)^2 / square has no pole at the edges.
    turns = math.pi * (
        1.0 - (torch.arange(_STEPS, dtype=torch.float64) + 0.5) / _STEPS
    )  # squares rise
    squares = 1.0 + ratio + 2.0 * math.sqrt(ratio) * turns.cos()
    mass = (turns.sin().square() / squares).cumsum(0)
    at = torch.searchsorted(mass, mass[-1] * torch.tensor(chances, dtype=torch.float64)).clamp_max_(
        _STEPS - 1
    )
    values: list[float] = squares[at].sqrt().tolist()
    return values
