"""Argument checks whose errors say what to do, and a list in such an error."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache
from numbers import Real
from typing import Protocol, cast

import torch
from torch import Tensor


class _HasKernel(Hashable, Protocol):
    """A measure with a kernel of the squared chords q and p = 4 - q."""

    def kernel(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]: ...


def check_kernel(measure: _HasKernel) -> None:
    """Refuse a kernel whose slope is not the derivative of its value.

    Training with such a kernel would go wrong unnoticed. Each measure is checked once.
    """
    check_hashable(measure)
    _check_slope(measure)


def check_hashable(measure: object) -> None:
    """Refuse a measure that cannot be a key of a dict."""
    if type(measure).__hash__ is None:
        raise TypeError(
            "a measure must be hashable: "
            f"decorate {type(measure).__name__} with @dataclass(frozen=True)"
        )


@lru_cache(maxsize=256)
def _check_slope(measure: _HasKernel) -> None:
    name = f"{type(measure).__name__}.kernel"
    q = torch.tensor([0.3, 1.0, 2.0, 3.5], dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        found = measure.kernel(q, 4.0 - q)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(
                f"{name} must return (value, slope), the slope being the derivative with respect "
                f"to q; got {found!r}"
            )
        value, slope = found
        if not value.requires_grad:
            return
        (expected,) = torch.autograd.grad(value.sum(), q)
    if not torch.allclose(slope.detach(), expected, rtol=1e-6, atol=1e-9):
        raise ValueError(
            f"the slope of {name} is not the derivative of its value with respect to q: "
            f"at q = {q.tolist()} the slope is {slope.tolist()}, the derivative {expected.tolist()}"
        )


def check_neurons(x: Tensor) -> None:
    """Refuse anything that cannot be rows of neurons."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"neurons must be a floating-point tensor, got {type(x).__name__}; "
            "make one with torch.as_tensor"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"neurons must be a floating-point tensor, got {x.dtype}; cast with x.float()"
        )
    if x.ndim < 2:
        raise ValueError(
            f"neurons must have shape (..., n, d), one neuron a row, got shape {tuple(x.shape)}; "
            "flatten a convolution's weight with weight.flatten(1)"
        )


def check_softening(softening: float) -> None:
    """Refuse a softening that is not a chord."""
    check_number(
        "softening",
        softening,
        "a chord in [0, 2), 0 switches it off",
        lambda chord: 0.0 <= chord < 2.0,
    )


def check_number(name: str, value: object, what: str, fits: Callable[[float], bool]) -> None:
    """Refuse a setting that is not a real number in its range; ``what`` describes the range."""
    if not plain_number(value) or not fits(cast(float, value)):
        raise ValueError(f"{name} must be {what}; got {shown(value)}")


def keep_as_numbers(owner: object, *names: str) -> None:
    """Replace numbers of other libraries, in fields of a frozen dataclass, by Python's.

    Such as numpy's, which equal them: code that is compiled for one is not for the other.
    """
    for name in names:
        value = getattr(owner, name)
        if type(value) not in (int, float):
            object.__setattr__(owner, name, float(value))


def check_flag(name: str, value: object) -> None:
    """Refuse a setting that is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def check_choice(name: str, value: str, *choices: str) -> str:
    """Return a setting that is one of the choices, and refuse any other."""
    if value not in choices:
        *others, last = [repr(choice) for choice in choices]
        raise ValueError(f"{name} must be {', '.join(others)} or {last}; got {value!r}")
    return value


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse a setting that is not an int or is too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int >= {least}; got {value!r}")


def plain_number(value: object) -> bool:
    """Tell whether value is a finite real number (and not a bool)."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond float64
        return False


def shown(value: object) -> str:
    """A value as it stands in code, but a whole number beyond float64 by its power of ten.

    Example:
        >>> shown(0.5), shown(-(10**400))
        ('0.5', 'about -10**400')
    """
    if isinstance(value, int) and value.bit_length() > sys.float_info.max_exp:
        sign = "-" if value < 0 else ""
        return f"about {sign}10**{int(value.bit_length() * math.log10(2))}"
    return repr(value)


def listed(items: Iterable[str], most: int = 4) -> str:
    """The first of some items, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    items = list(items)
    text = ", ".join(items[:most])
    if len(items) > most:
        text += f" and {len(items) - most:,} more"
    return text
