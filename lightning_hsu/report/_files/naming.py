"""Names of tensors: how they are printed, checked and ordered."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_hsu._neurons.head_names import LAST_IN_FILES

_SHOWN = 80  # characters of a foreign text in an error
_LONGEST, _DEEPEST = 1000, 100  # characters and dots of a name


def printable(text: str) -> str:
    r"""A text with its control characters spelled out.

    Example:
        >>> print(printable("a" + chr(27) + "[2J"))
        a\x1b[2J
    """
    characters = []
    for character in text:
        if not character.isprintable():
            character = ascii(character)[1:-1]
        characters.append(character)
    return "".join(characters)


def short(text: str) -> str:
    """The beginning of a text from a file, to be quoted in an error.

    Example:
        >>> short("w" * 1000)[-8:]
        'wwwww...'
    """
    if len(text) <= _SHOWN:
        return printable(text)
    return printable(text[: _SHOWN - 3]) + "..."


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names for an error, each in quotes and no more than ``most``.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    every = [repr(short(name)) for name in names]
    text = ", ".join(every[:most])
    if len(every) > most:
        text += f" and {len(every) - most:,} more"
    return text


def check_name(path: Path, name: str) -> None:
    """Refuse a name that no model has.

    Raises:
        ValueError: for a name of more than 1,000 characters or 100 dots.
    """
    if len(name) > _LONGEST or name.count(".") > _DEEPEST:
        raise ValueError(
            f"{path} holds a name of {len(name):,} characters with {name.count('.'):,} dots, "
            f"which no model has: {short(name)}; give its tensors other names"
        )


def in_order(names: Iterable[str]) -> list[str]:
    """Sort numbers by value and heads last; a .safetensors file is in alphabetical order."""
    return sorted(names, key=_position)


def _position(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """The sorting key of a name: whether it is in a head, then its texts and numbers in turn."""
    outer_modules = name.split(".")[:-1][:2]
    in_head = not set(LAST_IN_FILES).isdisjoint(outer_modules)
    parts = []
    for part in re.split(r"(\d+)", name, flags=re.ASCII):
        if part.isascii() and part.isdigit() and len(part) < 19:
            parts.append((int(part), ""))
        else:
            parts.append((-1, part))
    return in_head, parts


def starts_with_one_of(name: str, beginnings: Sequence[str]) -> bool:
    """Whether a name starts with one of several beginnings, in small letters or capitals."""
    return name.lower().startswith(tuple(beginnings))
