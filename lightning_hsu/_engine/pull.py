"""The pull of a layer's neurons along their sum, and what of a gradient is tangent.

In full space that pull is the part of the penalty's gradient that ages fastest: all neurons
together move their sum within a few steps, and left old the pull makes the sum swing. It takes one
pass over the weights to follow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hsu._core import exact_arithmetic, working_dtype
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
        w: The neurons (groups, n, d).
    """

    __slots__ = ("inverse", "slope", "total")

    def __init__(self, slope: float, w: Tensor) -> None:
        self.slope = slope
        self.inverse, self.total = _sum_of_units(w)

    def follow(self, grad: Tensor, w: Tensor) -> None:
        """Change a gradient by what the sum and the norms have changed.

        A gradient is inversely proportional to the norm of its row.
        """
        inverse, total = _sum_of_units(w)
        grad.mul_(inverse / self.inverse)
        grad.baddbmm_(inverse, total - self.total, alpha=self.slope)
        self.inverse = inverse
        self.total = total


def pull_of(layer: Layer, x: Tensor) -> Pull | None:
    """The pull along the sum of a layer's neurons x (groups, n, d).

    None if there is none, or if other ranks have some of the neurons.
    """
    term = layer.measure.pair_term()
    if term is None or term.logarithm or layer.rows is not None:
        return None
    slope = slope_at_right_angles(term)
    if slope == 0:
        return None
    with exact_arithmetic(x):
        return Pull(-2.0 * term.scale(x.shape[1]) * slope, x.to(working_dtype(x.dtype)))


def project(grad: Tensor, w: Tensor) -> None:
    """Leave of each row of ``grad`` the part that is tangent at the row of w; both (groups, n, d).

    Rows that are 0, not finite or beyond the range of squares stay as they are.
    """
    along = torch.linalg.vecdot(grad, w).unsqueeze(-1)
    along /= torch.linalg.vector_norm(w, dim=-1, keepdim=True).square_()
    usable = torch.isfinite(along)  # a row of w that is not finite has no finite quotient
    if w.device.type != "cpu" or not bool(usable.all()):
        along = torch.where(usable, along, 0.0)
        w = torch.where(usable, w, 0.0)
    grad.addcmul_(w, along, value=-1.0)


def _sum_of_units(w: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse norms (groups, n, 1) of rows w (groups, n, d), and the sum (groups, 1, d) of units.

    Rows of unusual norm take no part: theirs is a number so small that it makes no difference.
    """
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    if w.device.type == "cpu":
        shortest, longest = norm.aminmax()
        if shortest.item() > SHORTEST and longest.item() < LONGEST:
            inverse = norm.reciprocal()
            return inverse, inverse.mT @ w
    usual = (norm > SHORTEST) & (norm < LONGEST)
    inverse = torch.where(usual, norm.reciprocal(), 1.0 / LONGEST)
    return inverse, inverse.mT @ torch.where(usual, w, 0.0)
