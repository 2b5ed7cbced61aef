"""How strong the penalty is: a number, a schedule, a share of the task's gradient, or by layer."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any

from lightning_hsu._checks import check_number, plain_number, shown
from lightning_hsu._neurons.patterns import check_patterns, matches
from lightning_hsu.measures import Measure

LARGEST = 1e30
"""The largest coefficient: its product with a gradient, and with a GradScaler's factor, is a float32."""

_ROUNDING = 1e-9
"""By how much a schedule may be below zero where it means 0."""


class Varying(ABC):
    """A coefficient that changes during training; the config of a LightningCLI can name the class.

    It is abstract and not a dataclass, so that a CLI reads a mapping of patterns as a mapping.
    """

    @abstractmethod
    def label(self) -> str:
        """Describe it in a word or two, for the table of layers."""


class Schedule(Varying):
    """A coefficient over optimizer steps.

    In Python any function of the steps will do, as ``lambda step: 0.3``; derive from this class to
    name yours in a config. A value that rounding leaves below zero, by up to 1e-9, counts as 0.
    """

    def label(self) -> str:
        """The word "schedule"."""
        return "schedule"

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the coefficient, from 0 to 1e30, after ``step`` steps of the optimizer."""


@dataclass(frozen=True)
class _WarmedUp(Schedule):
    value: float
    warmup: int = 0
    end: int | None = None
    final: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        for what, number in (("value", self.value), ("final", self.final)):
            check_number(
                f"{name}'s {what}", number, "a finite number >= 0", lambda number: number >= 0
            )
            _check_size(f"{name}'s {what}", number)
        self._check_steps("warmup", self.warmup)
        if self.end is None:
            return
        self._check_steps("end", self.end)
        if self.end < self.warmup:
            raise ValueError(
                f"{name} must not end before its warm-up does; got warmup={self.warmup}, "
                f"end={self.end}"
            )

    def __call__(self, step: int) -> float:
        """Return the coefficient after ``step`` steps of the optimizer."""
        if step < self.warmup:
            return self.value * (step + 1) / (self.warmup + 1)
        if self.end is None:
            return self.value
        if step >= self.end:
            return self.final
        progress = (step - self.warmup) / (self.end - self.warmup)
        return self.final + (self.value - self.final) * self._remaining(progress)

    @abstractmethod
    def _remaining(self, progress: float) -> float:
        """The part of the way from ``value`` to ``final`` that remains: 1 at progress 0, 0 at 1."""

    def _check_steps(self, what: str, steps: object) -> None:
        """Refuse anything that is not a number of optimizer steps."""
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(
                f"{type(self).__name__}'s {what} counts optimizer steps, an int >= 0; got {steps!r}"
            )


@dataclass(frozen=True)
class LinearSchedule(_WarmedUp):
    """A coefficient that warms up linearly, then goes linearly to its final value.

    Args:
        value: The coefficient after the warm-up, >= 0.
        warmup: Steps over which it rises linearly: after k < warmup steps it is
            ``value * (k + 1) / (warmup + 1)``.
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

    def _remaining(self, progress: float) -> float:
        return 1.0 - progress


@dataclass(frozen=True)
class CosineSchedule(_WarmedUp):
    """A coefficient that warms up linearly, then follows half a cosine to its final value.

    Args:
        value: The coefficient after the warm-up, >= 0.
        warmup: Steps over which it rises linearly: after k < warmup steps it is
            ``value * (k + 1) / (warmup + 1)``.
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

    def _remaining(self, progress: float) -> float:
        return 0.5 + 0.5 * math.cos(math.pi * progress)


@dataclass(frozen=True)
class Share(Varying):
    r"""A coefficient that keeps the penalty's gradient at a fraction of the task's, layer by layer.

    With running means of the two gradients' norms over the steps,
    ``mean <- smoothing * mean + (1 - smoothing) * norm``,

        coefficient = fraction * mean |task's gradient| / mean |penalty's gradient|,

    at most ``maximum``. With ``apply="decoupled"`` a layer moves by no more than ``fraction`` of the
    optimizer's own step, however large the loss is. The norms are reduced over ranks, without a
    GradScaler's factor and before the step limit. They are taken before Lightning's clipping with
    ``apply="gradient"``, and after it with ``"decoupled"``. Steps whose gradients are not finite
    leave the means as they are. The means are saved in checkpoints; if you resume with another
    measure, the old ones fade.

    Begin with ``Share(0.02)``: in full space it was worse than no penalty in none of 56 settings,
    where 0.05, the default here, and 0.1 were in some (evidence/README.md, "The default").

    Args:
        fraction: Norm of the penalty's gradient over that of the task's, in (0, 1]: 0.02 is 2 %.
        smoothing: Weight of the past in [0, 1); 0 takes each step by itself.
        maximum: The largest coefficient, > 0, used where the penalty's gradient vanishes.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> from lightning_hsu import HypersphericalUniformity, Share
        >>> callback = HypersphericalUniformity(coefficient=Share(0.02))
    """

    fraction: float = 0.05
    smoothing: float = 0.9
    maximum: float = 1e4

    def __post_init__(self) -> None:
        for name, value in (("fraction", self.fraction), ("maximum", self.maximum)):
            check_number(f"Share's {name}", value, "a finite number > 0", lambda number: number > 0)
        _check_size("Share's maximum", self.maximum)
        check_number(
            "Share's smoothing", self.smoothing, "in [0, 1)", lambda smoothing: 0 <= smoothing < 1
        )
        if self.fraction > 1:
            raise ValueError(_percent_meant(self.fraction))

    def label(self) -> str:
        """The fraction."""
        return f"share {self.fraction:g}"


Strength = float | Varying | Callable[[int], float]
"""A number, a share, or a schedule, which maps the optimizer steps done so far to a number."""

# A LightningCLI tries these in order, both to write a config and to read it back.
Strengths = float | Varying | dict[str, Strength] | Callable[[int], float]
"""One for all layers, or by layer pattern."""


@dataclass(frozen=True)
class Coefficient:
    """A checked coefficient.

    Args:
        given: A number >= 0, a schedule, a share, or a mapping of layer patterns to these, of which
            the first match counts; layers without a match get 0 and are only monitored. A mapping
            is copied.
        what: What to call it in errors.

    Raises:
        ValueError: for a number that is negative, above 1e30 or NaN, or an empty mapping.
        TypeError: for anything else that is not a number, schedule, share or mapping of patterns.
    """

    given: Strength | Mapping[str, Strength]
    what: str = "coefficient"

    def __post_init__(self) -> None:
        if isinstance(self.given, Mapping):
            if not self.given:
                raise ValueError(
                    f"{self.what} is an empty mapping; map layer patterns to numbers, e.g. "
                    "{'*': 1.0}"
                )
            for pattern, strength in self.given.items():
                if not isinstance(pattern, str):
                    raise TypeError(
                        f"the keys of {self.what} are names of layers or patterns of them, as in "
                        f"{{'encoder.*': 0.3}}; got the key {pattern!r}"
                    )
                _check(strength, f"{self.what}[{pattern!r}]")
            object.__setattr__(self, "given", dict(self.given))
        else:
            _check(self.given, self.what)

    @classmethod
    def of_head(cls, given: Strength) -> Coefficient:
        """The coefficient of the head alone, which is not a mapping."""
        if isinstance(given, Mapping):
            raise TypeError(
                f"head_coefficient is a number or a schedule, not a mapping; got {given!r}"
            )
        return cls(given, "head_coefficient")

    @property
    def readable(self) -> Strength | Mapping[str, Strength]:
        """What was given; a mapping cannot be changed, since that would have no effect."""
        if isinstance(self.given, Mapping):
            return MappingProxyType(self.given)
        return self.given

    @property
    def has_share(self) -> bool:
        """Whether it is, or holds, a share of the task's gradient."""
        if isinstance(self.given, Mapping):
            return any(isinstance(strength, Share) for strength in self.given.values())
        return isinstance(self.given, Share)

    @property
    def is_zero(self) -> bool:
        """Whether it is 0, for all layers, with which they are only monitored."""
        values = list(self.given.values()) if isinstance(self.given, Mapping) else [self.given]
        return all(isinstance(value, Real) and float(value) == 0 for value in values)

    @property
    def patterns(self) -> list[str]:
        """The patterns of layers that it distinguishes."""
        return list(self.given) if isinstance(self.given, Mapping) else []

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse a pattern that matches no layer."""
        if isinstance(self.given, Mapping):
            check_patterns(self.what, list(self.given), names)

    def of(self, name: str) -> Strength:
        """The number, schedule or share of one layer."""
        strength = (
            self._matching(self.given, name) if isinstance(self.given, Mapping) else self.given
        )
        if isinstance(strength, Real):
            return float(strength)  # a number of numpy, too
        return strength

    @staticmethod
    def _matching(given: Mapping[str, Strength], name: str) -> Strength:
        """What the first pattern that matches a layer maps to."""
        for pattern, strength in given.items():
            if matches(name, [pattern]):
                return strength
        return 0.0


def strength_at(strength: Strength, step: int, name: str) -> float:
    """Evaluate a number or schedule after ``step`` optimizer steps.

    Raises:
        ValueError: if the value is not a number from 0 to 1e30; the error names the layer.
    """
    given: Any = strength(step) if callable(strength) else strength
    try:
        value = float(given)  # a one-element tensor will do
    except (OverflowError, TypeError, ValueError):
        value = math.nan
    if -_ROUNDING <= value < 0:
        return 0.0
    if not 0 <= value <= LARGEST:  # or NaN
        raise ValueError(
            f"the coefficient schedule gave {shown(given)} for layer '{name}' at optimizer step "
            f"{step}; it must return a finite number >= 0, at most {LARGEST:g}"
        )
    return value


def _percent_meant(fraction: float) -> str:
    """Say what a fraction above 1 comes to, and what was probably meant."""
    percent = fraction if fraction <= 100 else 5.0
    return (
        f"Share's fraction must be at most 1; {fraction:g} is {100 * fraction:g} % of the task's "
        f"gradient. For {percent:g} % write Share({percent / 100:g}). For a penalty stronger than "
        "the task give a number as the coefficient and no limit, e.g. coefficient=1.0 and "
        "share_limit=None"
    )


def _check(strength: object, what: str) -> None:
    """Refuse anything that is not a number >= 0, a schedule or a share."""
    if isinstance(strength, type):
        raise TypeError(
            f"{what} must be an instance: write {strength.__name__}(...), with its settings in the "
            "brackets"
        )
    if isinstance(strength, Share):
        return
    if callable(strength) and not isinstance(strength, Measure):
        if not _takes_a_step(strength):
            raise TypeError(
                f"{what} is a function that cannot be called with the optimizer steps done: write "
                f"lambda step: 0.3, or the number itself; got {strength!r}"
            )
        return
    if isinstance(strength, Real) and not isinstance(strength, bool):
        if not plain_number(strength) or strength < 0:
            raise ValueError(
                f"{what} must be a finite number >= 0 (0 only monitors); got {shown(strength)}"
            )
        _check_size(what, float(strength))
        return
    raise TypeError(
        f"{what} must be a number, a schedule step -> number, a Share or a mapping of patterns to "
        f"these; got {strength!r}"
    )


def _check_size(what: str, number: float) -> None:
    """Refuse a coefficient whose products float32 cannot hold."""
    if number > LARGEST:
        raise ValueError(
            f"{what} must be at most {LARGEST:g}, beyond which float32 cannot hold its product with a "
            f"gradient; got {shown(number)}"
        )


def _takes_a_step(schedule: Callable[..., object]) -> bool:
    """Whether a function can be called with one number."""
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):  # of one that is not written in Python it may not be known
        return True
    try:
        signature.bind(0)
    except TypeError:
        return False
    return True
