"""Resultant length: relaxed maximum hyperspherical polarization (R-MHP)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu.core import FLOOR
from lightning_hsu.measures.base import SphereMeasure, State
from lightning_hsu.measures.checks import check_number


@dataclass(frozen=True)
class ResultantLength(SphereMeasure):
    r"""Length of the sum of the unit neurons, Rayleigh's statistic; small when they are balanced (relaxed MHP).

    Polarization with the kernel ``-|x - v|**2`` has a closed form, and maximising it is minimising this length. O(n d).
    Any balanced set has length 0, even n / 2 copies of one neuron and of its opposite: duplicates go unseen. There is no
    half-space form: with the mirror images the sum is always 0.

    Args:
        softening: Length in [0, 1) below which the length is bent to a smooth minimum, so that the gradient fades there
            instead of jumping from side to side; 0 switches it off.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...) in [0, n].

    Raises:
        ValueError: for a softening out of range.

    Reference:
        Liu et al., "Learning with Hyperspherical Uniformity", AISTATS 2021, arXiv 2103.01649; Mardia & Jupp, "Directional
        Statistics", 2000, section 10.4.1.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import ResultantLength
        >>> float(ResultantLength()(torch.ones(5, 4)))  # five copies of one direction
        5.0
    """

    softening: float = 0.1

    def __post_init__(self) -> None:
        check_number("softening", self.softening, "a length in [0, 1), 0 switches it off", lambda length: 0 <= length < 1)

    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Length (b,) of the sum of unit rows x (b, n, d)."""
        total = x.sum(-2)
        square = total.square().sum(-1)
        knee = max(self.softening, FLOOR)
        # 2 r**2 - r**3 meets r at 1 with slope 1, and has slope 0 at 0; r**2 and no root keeps every derivative finite.
        bent = square.clamp_max(knee**2)
        length = torch.where(square < knee**2, 1.0, square).sqrt()
        bend = 2.0 * bent / knee - (bent * torch.where(square > 0, bent, 1.0).sqrt()) / knee**2
        return torch.where(square < knee**2, bend, length)

    def work(self, n: int, d: int) -> float:
        """A sum."""
        return 8.0 * n * d

    def best(self, n: int, d: int) -> float:
        """A balanced set has length 0."""
        return 0.0
