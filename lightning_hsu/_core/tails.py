"""What random layers reach by chance: angles, layers, and the ends of a law at 1 in 1,000."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TAIL = 1e-3
"""The part of random layers that lies beyond each end."""

NORMAL_TAIL = 3.0902
"""How many standard deviations that is for a normal law."""

_RESAMPLED = 2**22  # layers that make up means over groups
_MOST_MEANS = 4096
_FEWEST_MEANS = 1024
_ENOUGH_ROOM = 30  # dimensions above neurons from which lengths of normal vectors are easy


def angles_at(part: Tensor, d: int) -> Tensor:
    """Angles below which a part of all pairs of random neurons lies.

    Args:
        part: Parts in (0, 1), float64, any shape.
        d: Dimension, at least 2.

    Returns:
        Angles in radians, of the same shape; their error is about 1e-5 of the angle.

    Example:
        >>> angles_at(torch.tensor([0.25, 0.5]).double(), d=3).rad2deg()  # a sphere: sin(t / 2)**2
        tensor([60.0000, 90.0000], dtype=torch.float64)
    """
    step = min(2.0**-10, 0.02 / math.sqrt(d))
    grid = torch.arange(-4.5, 0.0, step, dtype=torch.float64)
    # Below a right angle, as in pair_expectation; above it the law is the mirror image.
    log_odds = math.pi * torch.sinh(torch.cat([grid, grid.new_zeros(1)]))
    angle = math.pi * torch.sigmoid(log_odds)
    log_density = (d - 2) * angle.sin().log()
    density = (log_density - log_density.max()).exp()
    areas = (density[1:] + density[:-1]) / 2.0 * angle.diff()
    below = areas.cumsum(0)
    below = (0.5 * below / below[-1]).clamp_min(1e-300).log()
    kept = torch.cat([below.new_ones(1, dtype=torch.bool), below.diff() > 0])
    below = below[kept]
    log_angle = angle[1:][kept].log()
    wanted = torch.minimum(part, 1.0 - part).clamp_min(1e-300).log()
    after = torch.searchsorted(below, wanted).clamp(1, len(below) - 1)
    rise = (wanted - below[after - 1]) / (below[after] - below[after - 1])
    found = log_angle[after - 1] + rise * (log_angle[after] - log_angle[after - 1])
    small = found.exp()
    return torch.where(part > 0.5, math.pi - small, small)


def random_layers(count: int, n: int, d: int, generator: torch.Generator) -> Tensor:
    """Layers with the angles of random neurons (n, d), in fewer dimensions if n is below d.

    Args:
        count: How many.
        n: Neurons, at least 2.
        d: Dimension, at least 2.
        generator: Where randomness comes from.

    Returns:
        Neurons, float32, shape (count, n, d) or (count, n, n).
    """
    if d < n + _ENOUGH_ROOM:
        return torch.randn(count, n, d, generator=generator, dtype=torch.float32)
    # Rotated so that neuron i has i + 1 entries: normal ones, and the length of the others. The
    # square of that is chi-squared with d - i degrees of freedom, by Wilson and Hilferty.
    rows = torch.randn(count, n, n, generator=generator, dtype=torch.float32)
    freedom = d - torch.arange(n, dtype=torch.float32)
    part = 2.0 / (9.0 * freedom)
    normal = rows.diagonal(dim1=-2, dim2=-1)
    length = (freedom * (1.0 - part + part.sqrt() * normal) ** 3).clamp_min(0.0).sqrt()
    return rows.tril(-1) + torch.diag_embed(length)


def ends_of_means(values: Tensor, groups: int) -> tuple[float, float]:
    """The ends of the law of a mean of independent values, from a sample of them.

    Args:
        values: The sample, float64, shape (draws,).
        groups: How many values make a mean.
    """
    if groups > 1:
        draws = max(_FEWEST_MEANS, min(_MOST_MEANS, _RESAMPLED // groups))
        generator = torch.Generator().manual_seed(groups)
        total = torch.zeros(draws, dtype=torch.float64)
        for _ in range(groups):
            total += values[torch.randint(len(values), (draws,), generator=generator)]
        values = total / groups
    if len(values) * TAIL >= 1.0:
        ends = torch.tensor([TAIL, 1.0 - TAIL], dtype=values.dtype)
        low, high = values.quantile(ends).tolist()
        return low, high
    # The extremes of few values are not as far out; how far, as in a normal law.
    reached = torch.special.ndtri(torch.tensor(1.0 - 1.0 / (len(values) + 1.0)))
    further = NORMAL_TAIL / float(reached)
    middle = float(values.median())
    low, high = values.aminmax()
    return middle + further * (float(low) - middle), middle + further * (float(high) - middle)


def ends_by_moments(
    values: Tensor, groups: int, *, mean: float, deviation: float
) -> tuple[float, float]:
    """The ends of the law of a mean, taken for a shifted gamma law with the same three moments.

    Args:
        values: A sample that tells the skewness, float64, shape (draws,).
        groups: How many values make a mean.
        mean: Their expectation.
        deviation: Their standard deviation.
    """
    standard = (values - values.mean()) / values.std()
    skewness = float(standard.pow(3).mean()) / math.sqrt(groups)
    scale = deviation / math.sqrt(groups)
    ends = []
    for normal in (-NORMAL_TAIL, NORMAL_TAIL):
        end = normal
        if abs(skewness) > 1e-3:  # by Wilson and Hilferty
            cube = max(1.0 + skewness * normal / 6.0 - skewness**2 / 36.0, 0.0) ** 3
            end = 2.0 / skewness * (cube - 1.0)
        ends.append(mean + scale * end)
    return ends[0], ends[1]
