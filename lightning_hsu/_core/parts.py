"""How much of some work is done, told by one part of it."""

from __future__ import annotations

from collections.abc import Callable

Done = Callable[[float], None]
"""Called with the fraction of some work that is done."""


def part_of(done: Done | None, start: float, share: float) -> Done | None:
    """What a part of the work calls with its own fraction; None if nobody is to be told.

    Args:
        done: What is called with the fraction of all the work.
        start: The fraction that is done before the part begins.
        share: The share of the part.

    Example:
        >>> part_of(print, 0.5, 0.25)(1.0)
        0.75
    """
    if done is None:
        return None

    def within(part: float) -> None:
        done(start + share * part)

    return within
