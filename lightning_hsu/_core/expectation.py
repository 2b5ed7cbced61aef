"""The mean of a kernel over random pairs on the sphere."""

from __future__ import annotations

import math

import torch

from lightning_hsu._core.kernel import Kernel


def pair_expectation(kernel: Kernel, d: int) -> float:
    """Mean of a kernel of the squared chord over two independent uniform points of the sphere in d dimensions.

    Against the density sin(t)**(d-2) of their angle, by the tanh-sinh rule: endpoint singularities are harmless, and the
    error is about 1e-10. Infinite where the kernel grows too fast towards coincident or opposite points: from the power
    of the squared chord that it goes with there.
    """
    if diverging := _diverging(kernel, d):
        return diverging
    step = min(2.0**-7, 0.2 / math.sqrt(d))
    grid = torch.arange(-4.5, 4.5 + step, step, dtype=torch.float64)
    # t = pi / (1 + exp(-pi sinh u)) covers (0, pi); both ends are kept to full relative precision.
    log_odds = math.pi * torch.sinh(grid)
    angle, rest = math.pi * torch.sigmoid(log_odds), math.pi * torch.sigmoid(-log_odds)
    sine = torch.sin(torch.minimum(angle, rest))
    weight = sine.log() * (d - 2) + (torch.cosh(grid) * angle * rest).log()
    weight = (weight - weight.max()).exp()
    q, p = ((2.0 * torch.sin(part / 2.0)).square().clamp_min(1e-300) for part in (angle, rest))
    value = kernel(q, p)[0]
    kept = weight > 0
    return float((value[kept] * weight[kept]).sum() / weight.sum())


def expected_angles(pairs: float, d: int, bins: int) -> torch.Tensor:
    """How many of so many pairs of uniform vectors, d >= 2, have an angle in each of as many equal parts of [0, 180] degrees.

    Example:
        >>> expected_angles(20, d=2, bins=4)  # on a circle all angles are as likely
        tensor([5., 5., 5., 5.], dtype=torch.float64)
    """
    fine = 32
    middles = (torch.arange(bins * fine, dtype=torch.float64) + 0.5) * (math.pi / (bins * fine))
    density = torch.softmax(
        (d - 2) * middles.sin().log(), 0
    )  # sin(t)^(d - 2), in logarithms: d may be large
    return density.view(bins, fine).sum(1) * pairs


def _diverging(kernel: Kernel, d: int) -> float:
    """Infinity with the sign of the kernel at an end where its mean has no bound; 0 where there is none."""
    near, far = (
        torch.tensor([1e-20, 1e-19], dtype=torch.float64),
        torch.tensor([4.0, 4.0], dtype=torch.float64),
    )
    for q, p in ((near, far), (far, near)):
        value = kernel(q, p)[0]
        # Near an end the density of the squared chord goes with its (d - 3) / 2-th power.
        power = (
            -math.log10(float((value[1] / value[0]).abs().clamp_min(1e-300)))
            if float(value[0])
            else 0.0
        )
        if power >= (d - 1) / 2 - 1e-6:
            return math.copysign(math.inf, float(value[0]))
    return 0.0
