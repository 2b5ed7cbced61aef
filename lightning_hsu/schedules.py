"""Ready schedules for the coefficient, counted in steps of each optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from lightning_hsu.measures.checks import check_number


class Varying(ABC):
    """A coefficient that changes while training: the classes that the config of a LightningCLI may name.

    It is abstract, and no dataclass, so that a CLI takes a mapping of layer patterns for what it is.
    """

    @abstractmethod
    def label(self) -> str:
        """Say in a word or two what it is, for the table of layers."""


class Schedule(Varying):
    """A coefficient over optimizer steps. In Python any function will do; one that a config names derives from this."""

    def label(self) -> str:
        """The word schedule."""
        return "schedule"

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the coefficient, >= 0, after ``step`` steps of the optimizer."""


@dataclass(frozen=True)
class _WarmedUp(Schedule):
    value: float
    warmup: int = 0
    end: int | None = None
    final: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        for what, number in (("value", self.value), ("final", self.final)):
            check_number(f"{name}'s {what}", number, "a finite number >= 0", lambda number: number >= 0)
        for what, step in (("warmup", self.warmup), ("end", 0 if self.end is None else self.end)):
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                raise ValueError(f"{name}'s {what} counts optimizer steps, an int >= 0; got {step!r}")
        if self.end is not None and self.end < self.warmup:
            raise ValueError(f"{name} must not end before its warm-up does; got warmup={self.warmup}, end={self.end}")

    def __call__(self, step: int) -> float:
        """Return the coefficient after ``step`` steps of the optimizer."""
        if step < self.warmup:
            return self.value * (step + 1) / (self.warmup + 1)
        if self.end is None:
            return self.value
        if step >= self.end:
            return self.final
        return self.final + (self.value - self.final) * self._left((step - self.warmup) / (self.end - self.warmup))

    @abstractmethod
    def _left(self, progress: float) -> float:
        """What is left of the way from ``value`` to ``final``, 1 at progress 0 and 0 at progress 1."""


@dataclass(frozen=True)
class LinearSchedule(_WarmedUp):
    """A coefficient that warms up, and then goes along a line to its final value.

    Args:
        value: The coefficient after the warm-up, >= 0.
        warmup: Steps over which it rises along a line: after k < warmup steps it is ``value * (k + 1) / (warmup + 1)``.
        end: Steps after which it is ``final``; None keeps it at ``value``.
        final: The coefficient from ``end`` on, >= 0.

    Raises:
        ValueError: for a number out of its range, or an end before that of the warm-up.

    Example:
        >>> from lightning_hsu import LinearSchedule
        >>> schedule = LinearSchedule(1.0, warmup=3, end=7)
        >>> [schedule(step) for step in range(9)]
        [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    def _left(self, progress: float) -> float:
        return 1.0 - progress


@dataclass(frozen=True)
class CosineSchedule(_WarmedUp):
    """A coefficient that warms up along a line, and then follows half a cosine to its final value.

    Args:
        value: The coefficient after the warm-up, >= 0.
        warmup: Steps over which it rises along a line: after k < warmup steps it is ``value * (k + 1) / (warmup + 1)``.
        end: Steps after which it is ``final``; None keeps it at ``value``.
        final: The coefficient from ``end`` on, >= 0.

    Raises:
        ValueError: for a number out of its range, or an end before that of the warm-up.

    Example:
        >>> from lightning_hsu import CosineSchedule
        >>> schedule = CosineSchedule(1.0, warmup=1, end=5)
        >>> [round(schedule(step), 3) for step in range(6)]
        [0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    def _left(self, progress: float) -> float:
        return 0.5 + 0.5 * math.cos(math.pi * progress)
