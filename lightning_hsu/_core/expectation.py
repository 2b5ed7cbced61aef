"""The mean of a kernel over random pairs on the sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_hsu._core.kernel import Kernel

_FINE = 32  # points in each bin at which the density is evaluated


def pair_expectation(kernel: Kernel, d: int) -> float:
    """Mean of a kernel over two independent uniform points of the sphere in d dimensions.

    It is the integral against the density sin(t)**(d-2) of their angle, by the tanh-sinh rule:
    endpoint singularities are harmless, and the error is about 1e-10. If the kernel grows too fast
    towards coincident or opposite points, judging by its power of the squared chord there, the mean
    is infinite.

    Args:
        kernel: Value and slope at squared chords.
        d: Dimension, at least 2.
    """
    if diverging := _diverging(kernel, d):
        return diverging
    step = min(2.0**-7, 0.2 / math.sqrt(d))
    grid = torch.arange(-4.5, 4.5 + step, step, dtype=torch.float64)
    # t = pi / (1 + exp(-pi sinh u)) covers (0, pi); both ends are kept to full relative precision.
    log_odds = math.pi * torch.sinh(grid)
    angle = math.pi * torch.sigmoid(log_odds)
    rest = math.pi * torch.sigmoid(-log_odds)
    sine = torch.sin(torch.minimum(angle, rest))
    weight = sine.log() * (d - 2) + (torch.cosh(grid) * angle * rest).log()
    weight = (weight - weight.max()).exp()
    value = kernel(_squared_chord(angle), _squared_chord(rest))[0]
    kept = weight > 0
    return float((value[kept] * weight[kept]).sum() / weight.sum())


def expected_angles(pairs: float, d: int, bins: int) -> Tensor:
    """Expected histogram of the angles of uniform random vectors.

    Args:
        pairs: How many pairs there are.
        d: Dimension, at least 2.
        bins: Equal bins of [0, 180] degrees.

    Returns:
        The expected number of pairs in each bin, float64, shape (bins,).

    Example:
        >>> expected_angles(20, d=2, bins=4)  # on a circle all angles are equally likely
        tensor([5., 5., 5., 5.], dtype=torch.float64)
    """
    width = math.pi / (bins * _FINE)
    middles = (torch.arange(bins * _FINE, dtype=torch.float64) + 0.5) * width
    # The density is sin(t)**(d - 2); in logarithms, since d may be large.
    density = torch.softmax((d - 2) * middles.sin().log(), 0)
    return density.view(bins, _FINE).sum(1) * pairs


def _squared_chord(angle: Tensor) -> Tensor:
    """Squared chords at angles, never 0."""
    return (2.0 * torch.sin(angle / 2.0)).square().clamp_min(1e-300)


def _diverging(kernel: Kernel, d: int) -> float:
    """Infinity, with the kernel's sign, if its mean diverges towards an end; else 0."""
    near = torch.tensor([1e-20, 1e-19], dtype=torch.float64)
    far = torch.tensor([4.0, 4.0], dtype=torch.float64)
    for q, p in ((near, far), (far, near)):
        value = kernel(q, p)[0]
        power = 0.0
        if float(value[0]) != 0.0:
            power = -math.log10(float((value[1] / value[0]).abs().clamp_min(1e-300)))
        # Near an end the density of the squared chord is proportional to its power (d - 3) / 2.
        if power >= (d - 1) / 2 - 1e-6:
            return math.copysign(math.inf, float(value[0]))
    return 0.0
