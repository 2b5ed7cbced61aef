"""What is done to each entry of a Gram matrix between its two products, compiled to one pass.

Plain torch reads and writes each entry many times: it clamps the cosine, looks whether the pair is
near, forms squared chords, powers of them and of those to the mirror image. Here torch.compile
makes one kernel of all of it, which reads a cosine (4 bytes), writes a slope (4) and whether the
pair is near (1). Where energies are needed, in a logging step and for kernels whose logarithm is
minimised, sums and largest cosines of the rows come from the same pass.

Sizes are dynamic: a kernel is compiled once for all layers, and once more for parts of a buffer
that do not begin where it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.group_numbers import NEAREST_COSINE
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.layout import Panel, Piece
from lightning_hsu._core.near import NEAR
from lightning_hsu._core.repair import ListedPairs

NO_PAIR = 2.0
"""What stands in place of a cosine where there is no pair, as where a row meets itself."""

_LEAD = 1
"""Entries before the first panel where rows are summed. So the trial layer, too, begins at a place
where no wide load can, and torch makes code for any place: else it would copy what begins at one."""

_WIDE = 16
"""Parts of a buffer begin at multiples of this, for the same reason."""

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Compiles a function."""


class Evaluated(NamedTuple):
    """What the pass over a piece found.

    Args:
        slope: Slopes at squared chords (size + 1,); those of near pairs are to be replaced.
        near: Which pairs are near, bool (size + 1,).
        energy: Summed energies of the rows of all panels, (rows,); None if they are not needed.
        far: For each group of each panel the largest cosine, as
            :class:`~lightning_hsu._core.group_numbers.GatheredNumbers` has it; None alike.
    """

    slope: Tensor
    near: Tensor
    energy: Tensor | None
    far: Tensor | None


def slopes_of(term: PairTerm) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function from cosines to slopes, 0 where there is no pair, and which pairs are near."""

    def slopes(cosine: Tensor) -> tuple[Tensor, Tensor]:
        is_pair = cosine < NO_PAIR
        near = (cosine.abs() > NEAREST_COSINE) & is_pair
        q = 2.0 - 2.0 * cosine.clamp(-NEAREST_COSINE, NEAREST_COSINE)
        slope = term.folded_slope(q, NEAR)
        return torch.where(is_pair, slope, 0.0), near

    return slopes


def sums_of(term: PairTerm) -> Callable[[Tensor, int], tuple[Tensor, ...]]:
    """The same from cosines (k, m) of rows, with their summed energies and largest cosines (k,).

    The largest absolute cosine in half space, 1 plus the largest cosine in full space.

    The pairs of the first columns, beside the diagonal, are there twice: their energies count half.
    A near pair counts as if it was just not near.
    """

    def sums(cosine: Tensor, beside: int) -> tuple[Tensor, ...]:
        is_pair = cosine < NO_PAIR
        near = (cosine.abs() > NEAREST_COSINE) & is_pair
        clamped = cosine.clamp(-NEAREST_COSINE, NEAREST_COSINE)
        energy, slope = term.folded(2.0 - 2.0 * clamped, NEAR)
        column = torch.arange(cosine.shape[1], device=cosine.device)
        energy = torch.where(is_pair, energy, 0.0) * torch.where(column < beside, 0.5, 1.0)
        height = clamped.abs() if term.half_space else clamped + 1.0
        largest = torch.where(is_pair, height, 0.0).amax(1)
        return torch.where(is_pair, slope, 0.0), near, energy.sum(1), largest

    return sums


class FusedTerm:
    """The pass for one kernel, compiled when it is first called.

    Args:
        term: The kernel.
        compiler: Compiles a function.
    """

    def __init__(self, term: PairTerm, compiler: Compiler) -> None:
        self.term = term
        evaluate = slopes_of(term)
        evaluate_sums = sums_of(term)

        def write_slopes(cosine: Tensor, slope: Tensor, near: Tensor) -> None:
            for out, value in zip((slope, near), evaluate(cosine), strict=True):
                out.copy_(value)

        def write_sums(
            cosine: Tensor, beside: int, slope: Tensor, near: Tensor
        ) -> tuple[Tensor, Tensor]:
            found, is_near, energy, largest = evaluate_sums(cosine, beside)
            slope.copy_(found)
            near.copy_(is_near)
            return energy, largest

        self.slopes = compiler(_with_own_code(write_slopes))
        self.sums = compiler(_with_own_code(write_sums))


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function: of one code object torch compiles a few versions only, then no more."""
    code, closure = function.__code__.replace(), function.__closure__
    return FunctionType(code, function.__globals__, function.__name__, None, closure)


class Fused:
    """Evaluates the kernels of a batch.

    Args:
        terms: The kernels, by their numbers in the batch.
        with_sums: Whether energies and largest cosines are needed.
    """

    def __init__(self, terms: Sequence[FusedTerm], *, with_sums: bool) -> None:
        self._terms = terms
        self._with_sums = with_sums

    @property
    def lead(self) -> int:
        """How many entries the buffer of cosines has before the first panel."""
        return _LEAD if self._with_sums else 0

    def evaluate(self, cosine: Tensor, piece: Piece) -> Evaluated:
        """Evaluate the pairs of a piece.

        Args:
            cosine: Cosines of the pairs (size + 1,), ``NO_PAIR`` where there is none.
            piece: The piece.
        """
        if self._with_sums:
            return self._evaluate_rows(cosine, piece)
        slope = torch.empty_like(cosine)
        near = torch.empty_like(cosine, dtype=torch.bool)
        end = len(cosine)  # the spare entry goes with the last kernel's
        for kind, start, _ in reversed(piece.stretches):
            begin = start // _WIDE * _WIDE  # what is before the start is overwritten next
            parts = [one.narrow(0, begin, end - begin) for one in (cosine, slope, near)]
            self._terms[kind].slopes(*parts)
            end = start
        return Evaluated(slope, near, None, None)

    def _evaluate_rows(self, cosine: Tensor, piece: Piece) -> Evaluated:
        slope = cosine.new_empty(len(cosine) + _LEAD)[_LEAD:]
        near = slope.new_empty(len(cosine) + _LEAD, dtype=torch.bool)[_LEAD:]
        energies = []
        largest = []
        for panel in piece.panels:
            groups, height, _ = panel.shape
            parts = [_rows(one, panel) for one in (cosine, slope, near)]
            found = self._terms[panel.block.kind].sums(parts[0], height, *parts[1:])
            energies.append(found[0])
            largest.append(found[1].view(groups, height).amax(1))
        near.index_fill_(0, piece.own, False)
        return Evaluated(slope, near, torch.cat(energies), torch.cat(largest))

    def counted(self, pairs: ListedPairs) -> Tensor:
        """The energies (k,) with which near pairs have been counted in the sums of the rows."""
        is_near = pairs.squares[0] < pairs.squares[1]
        found = None
        for kind, mask in pairs.kinds:
            near, opposite = _energies_at_bound(self._terms[kind].term)
            own = is_near.double().mul_(near - opposite).add_(opposite)
            found = own if found is None or mask is None else torch.where(mask, own, found)
        assert found is not None
        return found.mul_(pairs.once)


def _rows(flat: Tensor, panel: Panel) -> Tensor:
    """The entries of a panel, row by row."""
    groups, height, columns = panel.shape
    return flat.narrow(0, panel.at, panel.size).view(groups * height, columns)


@lru_cache(maxsize=256)
def _energies_at_bound(term: PairTerm) -> tuple[float, float]:
    """The energies of a pair that is just not near, and of one just not opposite."""
    cosine = torch.tensor([NEAREST_COSINE, -NEAREST_COSINE])
    near, opposite = term.folded(2.0 - 2.0 * cosine, NEAR)[0].tolist()
    return near, opposite
