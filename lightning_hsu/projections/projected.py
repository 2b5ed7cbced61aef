"""A measure of projected neurons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu.measures import Measure, RieszEnergy, SphereMeasure, State
from lightning_hsu.measures.base import check_measure
from lightning_hsu.projections.kinds import Projection, RandomProjection

_MHE, _RANDOM = RieszEnergy(s=2.0, half_space=True), RandomProjection()


@dataclass(frozen=True)
class Projected(SphereMeasure):
    r"""A measure of projected neurons, mean over the projections (CoMHE: the measure is a Riesz energy).

    In fewer dimensions the energy has a steeper way down. Neurons of ``projection.dim`` dimensions or less are measured
    as they are, and so is a class head. Fresh random projections come from a seed that all ranks share, learned ones are
    kept from step to step and in checkpoints. A value without a state belongs to the first draw.

    Args:
        measure: What to measure after the projection; by default the half-space Riesz energy with s = 2, as published.
        projection: :class:`RandomProjection`, :class:`AnglePreserving`, :class:`Adversarial` or :class:`GroupProjection`.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...).

    Raises:
        TypeError: for a measure or a projection of the wrong kind.

    Reference:
        Lin et al., "Regularizing Neural Networks via Minimizing Hyperspherical Energy", CVPR 2020, arXiv 1906.04892.

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

    sees_zero_rows: ClassVar[bool] = True  # they stay zero, and the measure leaves them out
    measure: Measure = _MHE
    projection: Projection = _RANDOM

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """As the measure has it."""
        return self.measure.higher_is_better

    def __post_init__(self) -> None:
        check_measure(self.measure)
        if not isinstance(self.projection, Projection):
            raise TypeError(
                f"projection must be a projection such as RandomProjection(dim=30); got {self.projection!r}"
            )

    def prepare(self, x: Tensor, state: State | None = None) -> State:
        """The projections, and under names that begin with "inner." what the measure needs in the projections."""
        with torch.no_grad():
            unit = self._unit(x.detach())[0]
            if self._as_it_is(unit):
                return _inner(self.measure.prepare(unit, _of_inner(state)), len(unit))
            own = _of_projection(state)
            new = self.projection.prepare(
                unit, self.measure, own if own and self.projection.fits(unit, own) else None
            )
            inner = self.measure.prepare(self.projection.project(unit, new), _of_inner(state))
        return new | _inner(inner, len(unit))

    def fits(self, x: Tensor, state: State) -> bool:
        """Whether the state is one of the projection, and if there is one of the measure, too."""
        (groups, n, d), inner = (x.shape[:-2].numel(), *x.shape[-2:]), _of_inner(state)
        if self._as_it_is(x):
            return self.measure.fits(x, inner or {})
        if not self.projection.fits(
            torch.empty(groups, n, d, device="meta"), _of_projection(state)
        ):
            return False
        projected = torch.empty(
            groups * self.projection.copies(d), n, self.projection.dim, device="meta"
        )
        return inner is None or self.measure.fits(projected, inner)

    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Mean penalty (b,) of the projections of unit rows x (b, n, d)."""
        state = state or {}
        if self._as_it_is(x):
            return self.measure.penalty(x, _of_inner(state))
        return self.measure.penalty(self.projection.project(x, state), _of_inner(state)).mean(-1)

    @property
    def half_space(self) -> bool:
        """Whether the measure is one of lines."""
        return bool(getattr(self.measure, "half_space", False))

    def natural(self, penalty: Tensor) -> Tensor:
        """As the measure has it."""
        return self.measure.natural(penalty)

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """As the measure has it."""
        return self.measure.ratio(value, reference)

    def expectation(self, n: int, d: int) -> float | None:
        """The measure's own where nothing is projected; NaN for a search that random neurons would have to last as long."""
        if d <= self.projection.dim:
            return self.measure.expectation(n, d)
        return None if self.projection.comparable else math.nan

    def best(self, n: int, d: int) -> float | None:
        """The measure's bound in the dimension projected to."""
        return self.measure.best(n, min(d, self.projection.dim))

    def idle(self, n: int, d: int) -> str | None:
        """As the measure has it in the dimension projected to."""
        return self.measure.idle(n, min(d, self.projection.dim))

    def work(self, n: int, d: int) -> float:
        """Learning a projection, projecting, and the measure of what comes out."""
        if d <= self.projection.dim:
            return self.measure.work(n, d)
        once = 2.0 * n * d * self.projection.dim + self.measure.work(n, self.projection.dim)
        return self.projection.work(n, d) + self.projection.copies(d) * once

    def flop(self, n: int, d: int) -> float:
        """Learning a projection; projecting, the measure's gradient of what comes out, and that back."""
        if d <= self.projection.dim:
            return self.measure.flop(n, d)
        once = 6.0 * n * d * self.projection.dim + self.measure.flop(n, self.projection.dim)
        return self.projection.work(n, d) + self.projection.copies(d) * once

    def for_head(self) -> Measure:
        """The head is not projected, as published."""
        return self.measure.for_head()

    def _as_it_is(self, x: Tensor) -> bool:
        return x.shape[-1] <= self.projection.dim


def _of_projection(state: State | None) -> State:
    """The projection's part of a state."""
    return {name: part for name, part in (state or {}).items() if not name.startswith("inner.")}


def _of_inner(state: State | None) -> State | None:
    """The measure's part of a state: first dimension (group, projection) as one."""
    found = {
        name[6:]: part.flatten(0, 1)
        for name, part in (state or {}).items()
        if name.startswith("inner.")
    }
    return found or None


def _inner(state: State | None, groups: int) -> State:
    """The measure's state as part of a larger one: first dimension groups again."""
    return {
        f"inner.{name}": part.reshape(groups, -1, *part.shape[1:])
        for name, part in (state or {}).items()
    }
