"""What the pair sums ask of a kernel: its value and slope in the squared chord, softened and folded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps squared chords q in (0, 4] to another neuron, and p = 4 - q to its mirror image, to (value, d value / d q)."""

FLOOR = 1e-6
"""The smallest softening (a chord): it keeps the energy of coincident neurons finite when softening is off."""

FORMULAS = ("chordal", "geodesic", "gaussian")
"""Names of kernels that compiled loops know; others go through torch."""

# Softened kernel values and slopes stay below this, so that no later product is inf * 0.
_BOUND = {torch.float64: 1e150, torch.float32: 1e18}


@dataclass(frozen=True)
class PairTerm:
    """A kernel as the pair sums use it.

    Args:
        kernel: Value and slope at squared chords.
        half_space: Count each neuron together with its mirror image.
        softening: Chord below which the kernel continues as its tangent line in the squared chord.
        formula: The kernel by a name that compiled kernels know and its one number, such as ("chordal", 2.0); None for others.
        logarithm: What training minimises is the logarithm of the mean.
    """

    kernel: Kernel
    half_space: bool = False
    softening: float = 0.0
    formula: tuple[str, float] | None = None
    logarithm: bool = False

    @property
    def knee(self) -> float:
        """The chord below which the kernel is a line, in (0, 2)."""
        return max(self.softening, FLOOR)

    def softened(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope at the squared chords q, p = 4 - q; below the knee the tangent line at the knee."""
        curved = q.clamp_min(self.knee**2)
        bound = _BOUND[q.dtype]
        bounded = (
            part.clamp(-bound, bound)
            for part in self.kernel(curved, p.clamp_max(4.0 - self.knee**2))
        )
        value, slope = bounded
        return value + slope * (q - curved), slope

    def split(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Energy of pairs at squared chords q, mirrored chords p; slopes in q and (half space, else 0) in p."""
        value, slope = self.softened(q, p)
        if not self.half_space:
            return value, slope, torch.zeros_like(slope)
        mirrored, mirrored_slope = self.softened(p, q)
        return value + mirrored, slope, mirrored_slope

    def folded(self, q: Tensor, nearest: float = 0.0) -> tuple[Tensor, Tensor]:
        """Energy of pairs and its slope at squared chords q in [nearest, 4 - nearest]."""
        p = 4.0 - q
        smooth = (
            q.dtype != torch.float64 and self.knee**2 <= nearest
        )  # no knee, no overflow: skip both guards
        if not smooth:
            value, slope, mirrored_slope = self.split(q, p)
            return value, slope - mirrored_slope
        value, slope = self.kernel(q, p)
        if self.half_space:
            mirrored, mirrored_slope = self.kernel(p, q)
            value, slope = value + mirrored, slope - mirrored_slope
        return value, slope

    def scale(self, live: float) -> float:
        """What turns a sum over unordered pairs of ``live`` neurons into the mean; 0 when there is no pair."""
        pairs = live * (2 * live - 1) / 2 if self.half_space else live * (live - 1) / 2
        return 1.0 / pairs if live > 1 else 0.0

    def constant(self, live: float) -> float:
        """The part of the pair sum that no neuron can change: in half space each neuron against its own mirror."""
        return live * softened_at(self, 4.0)[0] / 2 if self.half_space else 0.0


@lru_cache(maxsize=256)
def softened_at(term: PairTerm, q: float) -> tuple[float, float]:
    """Value and slope of the softened kernel at one squared chord, in float64."""
    value, slope = term.softened(*torch.tensor([q, 4.0 - q], dtype=torch.float64))
    return float(value), float(slope)
