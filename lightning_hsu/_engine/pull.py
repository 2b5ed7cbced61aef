"""The pull of a layer's neurons along their sum, and what of a gradient is tangent.

In full space that pull is the part of the penalty's gradient that ages fastest: all neurons
together move their sum within a few steps, and left old the pull makes the sum swing. It takes one
pass over the weights to follow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hsu._core import exact_arithmetic
from lightning_hsu._core.bf16 import slope_at_right_angles
from lightning_hsu._core.sphere import LONGEST, SHORTEST
from lightning_hsu._engine.layer import Layer


class Pull:
    """The part of a gradient that pulls all neurons along their sum, which ages fastest.

    A neuron's gradient is the sum of F'(q_ij) x_j over its pairs, made tangent and divided by its
    norm. Most pairs are near right angles, q = 2: F'(2) times the sum of all x_j is a large part,
    and all neurons together move that sum within a few steps. It takes one pass over the weights to
    follow it. In half space F'(2) is 0.

    Args:
        slope: The factor of the sum in the gradient.
        norm: Norms (groups, n, 1) of the neurons, which change little meanwhile.
        w: The neurons (groups, n, d). Those of unusual norm take no part.
    """

    __slots__ = ("inverse", "slope", "total")

    def __init__(self, slope: float, norm: Tensor, w: Tensor) -> None:
        self.slope = slope
        usual = (norm > SHORTEST) & (norm < LONGEST)
        self.inverse = torch.where(usual, norm.reciprocal(), 0.0)
        self.total = self.inverse.mT @ torch.where(usual, w, 0.0)

    def follow(self, grad: Tensor, w: Tensor) -> None:
        """Change a gradient (groups, n, d) by what the sum has changed.

        Args:
            grad: The gradient.
            w: The neurons (groups, n, d) now. Where their sum is not finite, nothing changes.
        """
        change = torch.baddbmm(self.total, self.inverse.mT, w, beta=-1.0)
        change.nan_to_num_(0.0, 0.0, 0.0)
        grad.baddbmm_(self.inverse, change, alpha=self.slope)
        self.total.add_(change)


def pull_of(layer: Layer, x: Tensor, norm: Tensor) -> Pull | None:
    """The pull along the sum of a layer's neurons x (groups, n, d), of norms (groups, n, 1).

    None if there is none, or if other ranks have some of the neurons.
    """
    term = layer.measure.pair_term()
    if term is None or term.logarithm or layer.rows is not None:
        return None
    slope = slope_at_right_angles(term)
    if slope == 0:
        return None
    with exact_arithmetic(x):
        return Pull(-2.0 * term.scale(x.shape[1]) * slope, norm, x.to(norm.dtype))


def project(grad: Tensor, squares: Tensor, w: Tensor) -> None:
    """Leave of each row of a gradient the part that is tangent at the neurons.

    Args:
        grad: The gradient (groups, n, d).
        squares: Squared norms (groups, n, 1) of neurons that have changed little in length since.
        w: The neurons (groups, n, d) now. On a CPU a neuron that is not finite changes nothing;
            on a GPU, where it takes launches to see that, its row of the gradient becomes NaN.
    """
    along = torch.linalg.vecdot(grad, w).unsqueeze(-1)
    along.div_(squares)
    if w.device.type == "cpu":
        usable = torch.isfinite(along)
        if not bool(usable.all()):
            along = torch.where(usable, along, 0.0)
            w = torch.where(usable, w, 0.0)
    grad.addcmul_(w, along, value=-1.0)
