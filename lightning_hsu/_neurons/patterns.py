"""Shell-style patterns of layers' names."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from lightning_hsu._checks import listed

Patterns = str | Sequence[str] | None

_SHOWN = 20  # names in an error


def matches(name: str, patterns: Sequence[str], *, below: bool = True) -> bool:
    """Whether a layer's name matches one of the patterns.

    Args:
        name: The name.
        patterns: Shell-style patterns.
        below: Whether a pattern also takes what lies below the name that it matches.
    """
    if any(fnmatchcase(name, pattern) for pattern in patterns):
        return True
    return below and any(fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def check_patterns(what: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a pattern that matches no layer."""
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(unknown_pattern(what, pattern, names))


def unknown_pattern(what: str, pattern: str, names: Sequence[str], noun: str = "layer") -> str:
    """The message about a pattern that matches nothing."""
    return f"{what} pattern {pattern!r} matches no {noun}; {known_names(pattern, names, noun)}"


def hidden_pattern(what: str, pattern: str) -> str:
    """The message about a pattern that matches only what earlier ones match, too."""
    return (
        f"{what} pattern {pattern!r} never counts: earlier patterns match all that it matches, and "
        "the first match counts; put it before them"
    )


def known_names(wrong: str, names: Sequence[str], noun: str = "layer") -> str:
    """The names that there are, those like the wrong one first.

    Example:
        >>> known_names("encodr.1", ["encoder.0", "encoder.1", "head"])
        "did you mean 'encoder.1'? The layers are: encoder.0, encoder.1, head"
    """
    close = get_close_matches(wrong.strip("*."), names, n=1)
    guess = f"did you mean '{close[0]}'? The" if close else "the"
    shown = listed(names, _SHOWN) or "none"
    return f"{guess} {noun}s are: {shown}"


def as_list(what: str, patterns: Patterns) -> list[str] | None:
    """Patterns as a list; None stays None."""
    if patterns is None:
        return None
    if isinstance(patterns, str):
        return [patterns]
    if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
        raise TypeError(
            f"{what} takes a pattern or a list of patterns such as 'encoder.*'; got {patterns!r}"
        )
    return list(patterns)
