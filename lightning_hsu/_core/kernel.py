"""A kernel as the pair sums need it: value and slope in the squared chord, softened and folded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps squared chords q in (0, 4] to another neuron, and p = 4 - q to its mirror image, to the
value and its derivative with respect to q."""

FLOOR = 1e-6
"""The smallest softening, a chord: with softening 0, too, coincident neurons have finite energy."""

_INVERSE_SQUARE = ("chordal", 2.0)
"""The formula of the default kernel, 1 / q."""

FORMULAS = ("chordal", "geodesic", "gaussian")
"""Names of the kernels that have a compiled version; others go through torch."""

# Softened kernel values and slopes stay below this, so that no later product is inf * 0.
_BOUND = {torch.float64: 1e150, torch.float32: 1e18}


@dataclass(frozen=True)
class PairTerm:
    """A kernel as the pair sums use it.

    Args:
        kernel: Value and slope at squared chords.
        half_space: Count each neuron together with its mirror image.
        softening: Chord below which the kernel continues as its tangent line in the squared chord.
        formula: The name of the kernel's compiled version and its one parameter, such as
            ("chordal", 2.0); None if there is none.
        logarithm: Training minimises the logarithm of the mean, not the mean itself.
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
        """Value and slope at squared chords q, p = 4 - q; the tangent line's below the knee."""
        square = self.knee**2
        bound = _BOUND[q.dtype]
        curved = q.clamp_min(square)
        value, slope = self.kernel(curved, p.clamp_max(4.0 - square))
        value = value.clamp(-bound, bound)
        slope = slope.clamp(-bound, bound)
        return value + slope * (q - curved), slope

    def split(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Energies of pairs, and their slopes in each squared chord.

        Args:
            q: Squared chords to the other neurons.
            p: Squared chords to their mirror images.

        Returns:
            Energies, slopes in q, and slopes in p: 0 in full space.
        """
        value, slope = self.softened(q, p)
        if not self.half_space:
            return value, slope, torch.zeros_like(slope)
        mirrored, mirrored_slope = self.softened(p, q)
        return value + mirrored, slope, mirrored_slope

    def values(self, q: Tensor, p: Tensor, nearest: float) -> Tensor:
        """The energies alone of :meth:`split`, at squared chords that are at least ``nearest``."""
        if self.formula != _INVERSE_SQUARE or nearest < self.knee**2:
            return self.split(q, p)[0]
        if not self.half_space:
            return q.reciprocal()
        return torch.mul(q, p).reciprocal_().mul_(4.0)  # 1 / q + 1 / p, since p is 4 - q

    def softened_slope(self, q: Tensor, p: Tensor) -> Tensor:
        """The slope alone of :meth:`softened`."""
        square = self.knee**2
        bound = _BOUND[q.dtype]
        slope = self._slope(q.clamp_min(square), p.clamp_max(4.0 - square))
        return slope.clamp(-bound, bound)

    def softened_both(self, q: Tensor, p: Tensor) -> Tensor:
        """Slope and value of :meth:`softened` as one tensor (2, ...), the slope first."""
        square = self.knee**2
        bound = _BOUND[q.dtype]
        curved = q.clamp_min(square)
        value, slope = self.kernel(curved, p.clamp_max(4.0 - square))
        both = torch.stack([slope, value]).clamp_(-bound, bound)
        both[1].addcmul_(both[0], q - curved)
        return both

    def folded(
        self, q: Tensor, nearest: float = 0.0, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Energies of pairs and their slopes, at squared chords q in [nearest, 4 - nearest].

        They are written to ``out`` if that is given.
        """
        if out is not None:
            return self._folded_to(out, q, nearest)
        p = 4.0 - q
        if not self._is_smooth(q, nearest):
            value, slope, mirrored_slope = self.split(q, p)
            return value, slope - mirrored_slope
        value, slope = self.kernel(q, p)
        if self.half_space:
            mirrored, mirrored_slope = self.kernel(p, q)
            value = value + mirrored
            slope = slope - mirrored_slope
        return value, slope

    def _folded_to(
        self, out: tuple[Tensor, Tensor], q: Tensor, nearest: float
    ) -> tuple[Tensor, Tensor]:
        if not self.half_space or not self._is_smooth(q, nearest):
            for whole, part in zip(out, self.folded(q, nearest), strict=True):
                whole.copy_(part)
            return out
        p = 4.0 - q
        value, slope = self.kernel(q, p)
        mirrored, mirrored_slope = self.kernel(p, q)
        return torch.add(value, mirrored, out=out[0]), torch.sub(slope, mirrored_slope, out=out[1])

    def folded_slope(self, q: Tensor, nearest: float = 0.0, out: Tensor | None = None) -> Tensor:
        """The slopes alone of :meth:`folded`, written to ``out`` if that is given."""
        slopes_at = self.softened_slope
        if self._is_smooth(q, nearest):
            if self.formula == _INVERSE_SQUARE:  # in fewer passes
                slope = q.pow(-2)
                if self.half_space:
                    return torch.sub((4.0 - q).pow_(-2), slope, out=out)
                return torch.neg(slope, out=slope if out is None else out)
            slopes_at = self._slope
        p = 4.0 - q
        slope = slopes_at(q, p)
        if self.half_space:
            mirrored = slopes_at(p, q)
            return torch.sub(slope, mirrored, out=out)
        return slope if out is None else out.copy_(slope)

    def folded_value(self, q: Tensor, nearest: float = 0.0, out: Tensor | None = None) -> Tensor:
        """The energies alone of :meth:`folded`, written to ``out`` if that is given."""
        values_at = self._value if self._is_smooth(q, nearest) else self._softened_value
        p = 4.0 - q
        value = values_at(q, p)
        if self.half_space:
            return torch.add(value, values_at(p, q), out=out)
        return value if out is None else out.copy_(value)

    def has_kernel_of(self, other: PairTerm) -> bool:
        """Whether two terms are sums of the same kernel, in full or in half space."""
        if self.formula is None:
            return self.kernel == other.kernel and self.softening == other.softening
        return (self.formula, self.softening) == (other.formula, other.softening)

    def _is_smooth(self, q: Tensor, nearest: float) -> bool:
        """Whether the kernel has no knee and no overflow at squared chords in this range."""
        return q.dtype != torch.float64 and self.knee**2 <= nearest

    def _slope(self, q: Tensor, p: Tensor) -> Tensor:
        if self.formula == _INVERSE_SQUARE:
            return q.pow(-2).neg_()
        return self.kernel(q, p)[1]

    def _value(self, q: Tensor, p: Tensor) -> Tensor:
        return q.reciprocal() if self.formula == _INVERSE_SQUARE else self.kernel(q, p)[0]

    def _softened_value(self, q: Tensor, p: Tensor) -> Tensor:
        return self.softened(q, p)[0]

    def scale(self, live: float) -> float:
        """The factor from the sum over pairs of ``live`` neurons to the mean; 0 below two."""
        if live <= 1:
            return 0.0
        if self.half_space:
            return 2.0 / (live * (2 * live - 1))
        return 2.0 / (live * (live - 1))

    def constant(self, live: float) -> float:
        """The part of the pair sum that does not depend on the neurons.

        In half space it is the energy of each neuron with its own mirror image.
        """
        return live * softened_at(self, 4.0)[0] / 2 if self.half_space else 0.0


@lru_cache(maxsize=256)
def softened_at(term: PairTerm, q: float) -> tuple[float, float]:
    """Value and slope of the softened kernel at one squared chord, in float64."""
    value, slope = term.softened(*torch.tensor([q, 4.0 - q], dtype=torch.float64))
    return float(value), float(slope)


Part = tuple[PairTerm, int, int]
"""A term and the stretch of entries that it has; the second number is excluded."""


def folded_slopes(parts: Sequence[Part], q: Tensor, nearest: float) -> Tensor:
    """What :meth:`PairTerm.folded_slope` is for terms of one kernel, each on its stretch of q (k,).

    The kernel is evaluated once for all of them, and once more where they are of half space.
    """
    first = parts[0][0]
    slopes_at = first._slope if first._is_smooth(q, nearest) else first.softened_slope
    p = 4.0 - q
    slope = slopes_at(q, p)
    for term, start, stop in parts:
        if term.half_space:
            some = slice(start, stop)
            slope[some].sub_(slopes_at(p[some], q[some]))
    return slope


def folded_values(parts: Sequence[Part], q: Tensor, nearest: float) -> tuple[Tensor, Tensor]:
    """Energies, and the slopes that :func:`folded_slopes` gives, in the same way."""
    first = parts[0][0]
    both_at = first.kernel if first._is_smooth(q, nearest) else first.softened
    p = 4.0 - q
    value, slope = both_at(q, p)
    for term, start, stop in parts:
        if term.half_space:
            some = slice(start, stop)
            mirrored, mirrored_slope = both_at(p[some], q[some])
            value[some].add_(mirrored)
            slope[some].sub_(mirrored_slope)
    return value, slope


def or_one(energy: Tensor) -> Tensor:
    """A mean energy to divide by: 1 where it is 0 because there are no pairs."""
    return torch.where(energy > 0, energy, 1.0)
