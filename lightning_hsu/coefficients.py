"""How strong the penalty is: a number, a schedule over optimizer steps, a share of the task's gradient, or these by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from lightning_hsu.measures.checks import plain_number
from lightning_hsu.schedules import Varying
from lightning_hsu.selection import check_patterns, matches
from lightning_hsu.share import Share

Strength = float | Varying | Callable[[int], float]
"""A number, a share, or a schedule: optimizer steps done so far to a number."""

# In this order a LightningCLI writes it into a config and reads it again: classes, the mapping, any function.
Strengths = float | Varying | dict[str, Strength] | Callable[[int], float]
"""One for all layers, or by layer pattern."""


@dataclass(frozen=True)
class Coefficient:
    """A checked coefficient.

    Args:
        given: A number >= 0, a schedule, a share, or a mapping of layer patterns to these, of which the first match
            counts; layers without a match get 0 and are only monitored.
        what: What to call it in errors.

    Raises:
        ValueError: for a negative, infinite or NaN number, or an empty mapping.
        TypeError: for anything else that is no number, schedule, share or mapping.
    """

    given: Strength | Mapping[str, Strength]
    what: str = "coefficient"

    def __post_init__(self) -> None:
        if isinstance(self.given, Mapping):
            if not self.given:
                raise ValueError(f"{self.what} is an empty mapping; map layer patterns to numbers, e.g. {{'*': 1.0}}")
            for pattern, strength in self.given.items():
                _check(strength, f"{self.what}[{pattern!r}]")
        else:
            _check(self.given, self.what)

    @classmethod
    def of_head(cls, given: Strength) -> Coefficient:
        """That of the head alone, which is no mapping."""
        if isinstance(given, Mapping):
            raise TypeError(f"head_coefficient is a number or a schedule, not a mapping; got {given!r}")
        return cls(given, "head_coefficient")

    @property
    def has_share(self) -> bool:
        """Whether it is, or holds, a share of the task's gradient."""
        parts = self.given.values() if isinstance(self.given, Mapping) else [self.given]
        return any(isinstance(part, Share) for part in parts)

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse a pattern that matches no layer."""
        if isinstance(self.given, Mapping):
            check_patterns(self.what, list(self.given), names)

    def of(self, name: str) -> Strength:
        """The number, schedule or share of one layer."""
        strength = self.given
        if isinstance(strength, Mapping):
            strength = next((one for pattern, one in strength.items() if matches(name, [pattern])), 0.0)
        return float(strength) if isinstance(strength, Real) else strength  # one of numpy, too


def strength_at(strength: Strength, step: int, name: str) -> float:
    """Evaluate a number or schedule after ``step`` optimizer steps; ``name`` is the layer, for the error."""
    given: Any = strength(step) if callable(strength) else strength
    try:
        value = float(given)  # a one-element tensor will do
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ValueError(
            f"the coefficient schedule gave {given!r} for layer '{name}' at optimizer step {step}; "
            "it must return a finite number >= 0"
        )
    return value


def _check(strength: object, what: str) -> None:
    """Refuse what is neither a number >= 0 nor a schedule nor a share."""
    if isinstance(strength, type):
        raise TypeError(f"{what} must be an instance: write {strength.__name__}(...), with its settings in the brackets")
    if callable(strength) or isinstance(strength, Share):
        return
    if isinstance(strength, Real) and not isinstance(strength, bool):
        if not plain_number(strength) or strength < 0:
            raise ValueError(f"{what} must be a finite number >= 0 (0 only monitors); got {strength!r}")
        return
    raise TypeError(
        f"{what} must be a number, a schedule step -> number, a Share or a mapping of patterns to these; got {strength!r}"
    )
