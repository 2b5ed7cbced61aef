"""Resultant length: relaxed maximum hyperspherical polarization (R-MHP)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._checks import check_number
from lightning_hsu._core import FLOOR, to_weights, with_float64, working_dtype
from lightning_hsu._core.sphere import LONGEST, SHORTEST
from lightning_hsu.measures.sphere import SphereMeasure
from lightning_hsu.measures.state import State


@dataclass(frozen=True)
class ResultantLength(SphereMeasure):
    r"""Length of the sum of the unit neurons (relaxed MHP, Rayleigh's statistic).

    Polarization with the kernel ``-|x - v|**2`` has a closed form: maximising it means minimising
    this length. It takes O(n d). Any balanced set has length 0, even n / 2 copies of one neuron and
    of its opposite, so duplicates go unnoticed. There is no half-space form: with the mirror images
    the sum is always 0.

    Args:
        softening: Length in [0, 1) below which the length is bent to a smooth minimum, so that the
            gradient fades out there instead of jumping from side to side; 0 switches it off.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...) in [0, n].

    Raises:
        ValueError: for a softening out of range.

    Reference:
        Liu et al., "Learning with Hyperspherical Uniformity", AISTATS 2021, arXiv 2103.01649;
        Mardia & Jupp, "Directional Statistics", 2000, section 10.4.1.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import ResultantLength
        >>> float(ResultantLength()(torch.ones(5, 4)))  # five copies of one direction
        5.0
    """

    softening: float = 0.1

    def __post_init__(self) -> None:
        check_number(
            "softening",
            self.softening,
            "a length in [0, 1), 0 switches it off",
            lambda length: 0 <= length < 1,
        )

    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Length (b,) of the sum of unit rows x (b, n, d)."""
        square = x.sum(-2).square().sum(-1)
        knee = max(self.softening, FLOOR)
        # 2 r**2 - r**3 meets r at 1 with slope 1 and has slope 0 at 0. Written in r**2, without a
        # root at 0, it has finite derivatives.
        bent = square.clamp_max(knee**2)
        length = torch.where(square < knee**2, 1.0, square).sqrt()
        bend = 2.0 * bent / knee - (bent * torch.where(square > 0, bent, 1.0).sqrt()) / knee**2
        return torch.where(square < knee**2, bend, length)

    def closed_form(self, x: Tensor, state: State | None) -> tuple[Tensor, Tensor] | None:
        """Take one direction for all neurons and make it tangent, in six passes.

        None if there are zero rows, or norms whose squares leave the range of float32.
        """
        w = with_float64(x.detach()).reshape(-1, *x.shape[-2:]).to(working_dtype(x.dtype))
        if w.shape[1] < 2:
            return None
        length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        shortest, longest = length.aminmax()
        if not (float(shortest) > SHORTEST and float(longest) < LONGEST):
            return None
        inverse_norm = length.reciprocal()
        blocks = zip(torch.split(w, 1024, 1), torch.split(inverse_norm, 1024, 1), strict=True)
        sums = torch.stack([scale.mT @ rows for rows, scale in blocks])
        total = sums.sum(0, dtype=torch.float64)  # (b, 1, d)
        value = torch.linalg.vector_norm(total, dim=(-2, -1), keepdim=True)
        knee = max(self.softening, FLOOR)
        bent = value < knee
        slope = value.reciprocal()
        if bool(bent.any()):  # as in on_sphere
            slope = torch.where(bent, (4.0 - 3.0 * value / knee) / knee, slope)
            value = torch.where(bent, value * value * (2.0 - value / knee) / knee, value)
        pull = total.mul_(slope).to(w.dtype)
        along = (w @ pull.mT).mul_(inverse_norm.square())  # (b, n, 1)
        grad = torch.addcmul(pull, w, along, value=-1.0).mul_(inverse_norm)
        if torch.finfo(x.dtype).max < 1e30:
            grad = to_weights(grad, torch.ones_like(inverse_norm), x.dtype)
        return self._shaped(value, x), grad.reshape(x.shape).to(x.device, x.dtype)

    def value_flops(self, n: int, d: int) -> float:
        """A sum."""
        return 8.0 * n * d

    def grad_flops(self, n: int, d: int) -> float:
        """A sum, and the part of it that is tangent to each neuron."""
        return self.value_flops(n, d)

    def bound(self, n: int, d: int) -> float | None:
        """A balanced set has length 0."""
        return 0.0
