"""A measure of projected neurons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu.measures import Measure, SphereMeasure, State
from lightning_hsu.measures.base import check_measure
from lightning_hsu.measures.riesz import RieszEnergy
from lightning_hsu.measures.wrapper import MeasureWrapper
from lightning_hsu.projections.kinds import Projection, RandomProjection

_PUBLISHED = RieszEnergy(s=2.0, half_space=True)
_RANDOM = RandomProjection()
_INNER = "inner."


@dataclass(frozen=True)
class Projected(MeasureWrapper, SphereMeasure):
    r"""A measure of projected neurons, mean over the projections (CoMHE with a Riesz energy).

    In fewer dimensions the energy is steeper to descend. Neurons of ``projection.dim`` dimensions
    or less are measured without projection, and so is a class head. Random projections come from a
    seed that all ranks share; learned ones are kept from step to step and in checkpoints. Without a
    state the value is that of the first draw.

    Args:
        measure: What to measure after the projection; by default the half-space Riesz energy with s
            = 2, as published.
        projection: :class:`RandomProjection`, :class:`AnglePreserving`, :class:`Adversarial` or
            :class:`GroupProjection`.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...).

    Raises:
        TypeError: for a measure or a projection of the wrong kind.

    Reference:
        Lin et al., "Regularizing Neural Networks via Minimizing Hyperspherical Energy", CVPR 2020,
        arXiv 1906.04892.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import RieszEnergy
        >>> from lightning_hsu.projections import Projected, RandomProjection
        >>> measure = Projected(RieszEnergy(s=2), RandomProjection(dim=8, count=4))
        >>> x = torch.randn(16, 64, requires_grad=True)
        >>> state = measure.prepare(x)  # draw 0; the next call with this state draws anew
        >>> measure.penalty(x, state).backward()
        >>> x.grad.shape
        torch.Size([16, 64])
    """

    takes_zero_rows: ClassVar[bool] = True  # they stay zero, and the measure leaves them out

    measure: Measure = _PUBLISHED
    projection: Projection = _RANDOM

    def __post_init__(self) -> None:
        check_measure(self.measure)
        if not isinstance(self.projection, Projection):
            raise TypeError(
                "projection must be a projection such as RandomProjection(dim=30); "
                f"got {self.projection!r}"
            )

    def prepare(self, x: Tensor, state: State | None = None) -> State:
        """Return the state of the projections and, under names with "inner.", of the measure."""
        if not x.numel():
            return {}
        with torch.no_grad():
            unit = self._unit(x.detach())[0]
            if self._as_it_is(unit):
                return _inner(self.measure.prepare(unit, _of_inner(state)), len(unit))
            known: State | None = _of_projection(state)
            if not known or not self.projection.goes_on(unit, known):
                known = None
            own = self.projection.prepare(unit, self.measure, known)
            projected = self.projection.project(unit, own)
            inner = self.measure.prepare(projected, _of_inner(state))
        return own | _inner(inner, len(unit))

    def fits(self, x: Tensor, state: State) -> bool:
        """Tell whether the state fits the projection, and its inner part, if any, the measure."""
        inner = _of_inner(state)
        if self._as_it_is(x):
            return self.measure.fits(x, inner or {})
        neurons, projected = self._shapes(x)
        if not self.projection.fits(neurons, _of_projection(state)):
            return False
        return inner is None or self.measure.fits(projected, inner)

    def goes_on(self, x: Tensor, state: State) -> bool:
        """Tell whether the projection can go on from the state, and the measure from its part."""
        inner = _of_inner(state)
        if self._as_it_is(x):
            return self.measure.goes_on(x, inner or {})
        neurons, projected = self._shapes(x)
        if not self.projection.goes_on(neurons, _of_projection(state)):
            return False
        return inner is None or self.measure.goes_on(projected, inner)

    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Mean penalty (b,) of the projections of unit rows x (b, n, d)."""
        state = state or {}
        if self._as_it_is(x):
            return self.measure.penalty(x, _of_inner(state))
        return self.measure.penalty(self.projection.project(x, state), _of_inner(state)).mean(-1)

    def for_head(self) -> Measure:
        """Return the measure for a class head, which is not projected, as published."""
        return self.measure.for_head()

    def expectation(self, n: int, d: int) -> float | None:
        """Return the measure's expected value if nothing is projected, else None.

        NaN if there is no reference: the longer a search, the less uniform the neurons appear.
        """
        if d <= self.projection.dim:
            return self.measure.expectation(n, d)
        if not self.projection.comparable:
            return math.nan
        return None

    def bound(self, n: int, d: int) -> float | None:
        """Return the measure's bound in the dimension projected to."""
        return self.measure.bound(n, min(d, self.projection.dim))

    def idle(self, n: int, d: int) -> str | None:
        """Return the measure's reason in the dimension projected to."""
        return self.measure.idle(n, min(d, self.projection.dim))

    def value_flops(self, n: int, d: int) -> float:
        """Learning a projection, projecting, and the measure of the projected neurons."""
        dim = self.projection.dim
        if d <= dim:
            return self.measure.value_flops(n, d)
        each = 2.0 * n * d * dim + self.measure.value_flops(n, dim)
        return self.projection.prepare_flops(n, d) + self.projection.copies(d) * each

    def grad_flops(self, n: int, d: int) -> float:
        """Learning a projection, projecting, the measure's gradient, and projecting that back."""
        dim = self.projection.dim
        if d <= dim:
            return self.measure.grad_flops(n, d)
        each = 6.0 * n * d * dim + self.measure.grad_flops(n, dim)
        return self.projection.prepare_flops(n, d) + self.projection.copies(d) * each

    def _shapes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Neurons (..., n, d) as groups, and projected, as tensors that are shapes only."""
        n, d = x.shape[-2:]
        groups = x.shape[:-2].numel()
        neurons = torch.empty(groups, n, d, device="meta")
        copies = groups * self.projection.copies(d)
        return neurons, torch.empty(copies, n, self.projection.dim, device="meta")

    def _as_it_is(self, x: Tensor) -> bool:
        """Whether neurons have so few dimensions that they are not projected."""
        return x.shape[-1] <= self.projection.dim


def _of_projection(state: State | None) -> State:
    """The projection's part of a state."""
    return {name: part for name, part in (state or {}).items() if not name.startswith(_INNER)}


def _of_inner(state: State | None) -> State | None:
    """The measure's part of a state, with groups and projections as one first dimension."""
    found: State = {}
    for name, part in (state or {}).items():
        if name.startswith(_INNER):
            if part.ndim > 1:
                part = part.flatten(0, 1)
            found[name.removeprefix(_INNER)] = part
    return found or None


def _inner(state: State | None, groups: int) -> State:
    """The measure's state as part of a larger one, with groups as the first dimension again."""
    found: State = {}
    for name, part in (state or {}).items():
        copies = len(part) // max(groups, 1)
        found[_INNER + name] = part.reshape(groups, copies, *part.shape[1:])
    return found
