"""Measures by their names and settings, as they are written on the command line."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable

from lightning_hsu import measures
from lightning_hsu._monitor.render import shorten
from lightning_hsu.measures import Measure

_LONGEST_MEASURE = 300
_SHOWN_MEASURE = 80


def parse_measure(text: str) -> Measure:
    """Make a measure from its name and settings, written as in Python.

    Args:
        text: Such as ``KoLeo`` or ``RieszEnergy(s=1, half_space=True)``.

    Raises:
        ValueError: for anything other than a measure of this library with plain numbers, strings
            and flags.

    Example:
        >>> parse_measure("KoLeo"), parse_measure("GaussianPotential(t=3)")
        (KoLeo(softening=0.01), GaussianPotential(t=3, half_space=False))
    """
    shown = shorten(repr(text), _SHOWN_MEASURE)
    if len(text) > _LONGEST_MEASURE:
        raise ValueError(f"cannot make a measure of so many characters ({len(text):,}): {shown}")
    try:
        return _measure_of(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"cannot make a measure of {shown}, such as 'RieszEnergy(s=1, half_space=True)': "
            f"{shorten(str(error), _LONGEST_MEASURE)}"
        ) from error


def _measure_of(expression: ast.expr) -> Measure:
    """The measure that an expression names, with the settings that it gives by keyword."""
    settings = {}
    name = expression
    if isinstance(expression, ast.Call) and not expression.args:
        name = expression.func
        for keyword in expression.keywords:
            settings[str(keyword.arg)] = _plain(keyword)
    kinds = _measures()
    if not isinstance(name, ast.Name) or name.id not in kinds:
        raise ValueError(f"it is not a measure with settings by name; there are {', '.join(kinds)}")
    return kinds[name.id](**settings)


def _plain(setting: ast.keyword) -> object:
    """The value of a setting.

    Raises:
        ValueError: if it is no plain number, string, True, False or None.
    """
    try:
        value = ast.literal_eval(setting.value)
    except ValueError as error:
        raise ValueError(
            f"the setting {setting.arg} must be a plain number, a text in quotes, True, False or None"
        ) from error
    return value


def _measures() -> dict[str, Callable[..., Measure]]:
    """The measures that can be made from plain settings, by name."""
    found = {}
    for name in measures.__all__:
        if name == "State":  # not a class, but the type of a measure's state
            continue
        kind = getattr(measures, name)
        if issubclass(kind, Measure) and not inspect.isabstract(kind):
            found[name] = kind
    return found
