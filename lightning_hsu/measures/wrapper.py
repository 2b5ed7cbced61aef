"""Measures that evaluate another measure in their own way."""

from __future__ import annotations

from torch import Tensor

from lightning_hsu.measures.base import Measure


class MeasureWrapper(Measure):
    """A measure around another one; its values mean the same as those of the inner measure."""

    measure: Measure

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """The same as for the inner measure."""
        return self.measure.higher_is_better

    @property
    def half_space(self) -> bool:  # type: ignore[override]
        """The same as for the inner measure."""
        return self.measure.half_space

    def natural(self, penalty: Tensor) -> Tensor:
        """The same as for the inner measure."""
        return self.measure.natural(penalty)

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """The same as for the inner measure."""
        return self.measure.ratio(value, reference)

    def expectation(self, n: int, d: int) -> float | None:
        """The same as for the inner measure."""
        return self.measure.expectation(n, d)

    def deviation(self, n: int, d: int) -> float | None:
        """The same as for the inner measure."""
        return self.measure.deviation(n, d)

    def bound(self, n: int, d: int) -> float | None:
        """The same as for the inner measure."""
        return self.measure.bound(n, d)

    def idle(self, n: int, d: int) -> str | None:
        """The same as for the inner measure."""
        return self.measure.idle(n, d)
