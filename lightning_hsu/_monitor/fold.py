"""Names of repeated blocks as few patterns, such as ``blocks.{0..11}.attn.{q,k,v}_proj``."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

NO_BREAK = "\u00a0"
"""A space at which no line is broken."""

_NUMBER = re.compile("(?<![0-9])([0-9]{1,9})(?![0-9])")
_MOST_WORDS = 8  # alternatives such as {q,k,v}
_MOST_NUMBERS = 6  # pieces of a set of numbers, such as {0..3,5,7}
_MOST_PATTERNS = 10  # of names in one text
_MOST_TEXTS = 20
_QUOTED = re.compile("'([^']*)'")
_OWN_NAME = "\1"  # stands for the name of a layer in a text about it


@dataclass(frozen=True)
class Pattern:
    """Names that differ only in some of their pieces.

    Args:
        pieces: The alternatives of each piece. Every combination of them is one of the names,
            unless a piece is "*".
        members: Indices of the names.
    """

    pieces: tuple[tuple[str, ...], ...]
    members: tuple[int, ...]

    def __str__(self) -> str:
        return "".join(map(_alternatives, self.pieces))

    def forms(self) -> list[str]:
        """The pattern, and shorter ones: a "*" for the first numbers, then for the next, too.

        The last part of the names stays as it is.
        """
        words = list(map(_alternatives, self.pieces))
        found = ["".join(words)]
        path, _ = _split_last(self)
        for place, piece in enumerate(path):
            if len(piece) > 1 and all(map(_is_number, piece)):
                words[place] = "*"
                found.append("".join(words))
        return found

    def count(self) -> str:
        """The number of names in brackets, after a space; "" for a single one."""
        if len(self.members) == 1:
            return ""
        return f" ({len(self.members):,})"


def fold(
    names: Sequence[str], kinds: Sequence[Hashable], *, loosely: bool = False
) -> list[Pattern]:
    """Fold names of equal kinds into patterns, in the order of the first name of each.

    Names belong together if they are equal but for numbers, or but for their last part.

    Args:
        names: Dotted names.
        kinds: What must be equal in one pattern.
        loosely: Fold all names that differ only in numbers, with a "*" for the numbers where the
            names are not all combinations of them.
    """
    alike: dict[Hashable, list[Pattern]] = {}
    for i, name in enumerate(names):
        pieces = _NUMBER.split(name)
        pattern = Pattern(tuple((piece,) for piece in pieces), (i,))
        alike.setdefault((kinds[i], *pieces[::2]), []).append(pattern)
    by_path: dict[Hashable, list[Pattern]] = {}
    for patterns in alike.values():
        folded = _fold_numbers(patterns)
        if loosely and len(folded) > 1:
            folded = [_any_number(patterns)]
        for pattern in folded:
            path, last = _split_last(pattern)
            key: Hashable = (kinds[pattern.members[0]], path)
            if not path or last is None:
                key = pattern.members  # it stays alone
            by_path.setdefault(key, []).append(pattern)
    found: list[Pattern] = []
    for patterns in by_path.values():
        found += _fold_last(patterns)
    return sorted(found, key=lambda pattern: pattern.members[0])


def fold_names(names: Sequence[str]) -> str:
    """Write names as few patterns, each with the number of its names.

    Example:
        >>> fold_names(["stem", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"])
        'stem, layer1.0.conv{1,2} (2), layer1.1.conv1'
        >>> fold_names([f"h.{i}.attn.{part}_proj" for i in range(12) for part in "qkv"])
        'h.{0..11}.attn.{q,k,v}_proj (36)'
        >>> fold_names([f"stage{i}.{j}.conv" for i in range(12) for j in range(i)])
        'stage*.*.conv (66)'
    """
    kinds = [None] * len(names)
    patterns = fold(names, kinds)
    if len(patterns) > _MOST_PATTERNS:
        patterns = fold(names, kinds, loosely=True)
    words = [f"{pattern}{pattern.count()}" for pattern in patterns[:_MOST_PATTERNS]]
    rest = len(_members(patterns[_MOST_PATTERNS:]))
    if rest:
        words.append(f"and {rest:,} more")
    return ", ".join(words)


def place_of(name: str) -> tuple[str, ...]:
    """The place of a layer in repeated blocks: the same if only numbers of the blocks differ.

    Example:
        >>> place_of("blocks.0.conv1") == place_of("blocks.1.conv1")
        True
        >>> place_of("blocks.0.conv1") == place_of("blocks.0.conv2")
        False
    """
    path, _, last = name.rpartition(".")
    if last.isdecimal():
        path, last = name, ""
    return (*_NUMBER.split(path)[::2], last)


def _members(patterns: Sequence[Pattern]) -> tuple[int, ...]:
    """The indices of all names of several patterns, in order."""
    return tuple(sorted(chain.from_iterable(pattern.members for pattern in patterns)))


def _alternatives(piece: Sequence[str]) -> str:
    """A piece of a name, or its alternatives in braces.

    Example:
        >>> _alternatives(["x"]), _alternatives(["q_proj", "k_proj"]), _alternatives(["1", "2"])
        ('x', '{q,k}_proj', '{1,2}')
    """
    if len(piece) == 1:
        return piece[0]
    if all(map(_is_number, piece)):
        return _numbers_text([int(one) for one in piece])
    end = _common_start([one[::-1] for one in piece])[::-1]
    begins = [one[: len(one) - len(end)] for one in piece]
    start = _common_start(begins)
    words = [one[len(start) :] for one in begins]
    return f"{start}{{{','.join(words)}}}{end}"


def _fold_numbers(patterns: list[Pattern]) -> list[Pattern]:
    """Fold patterns that differ only in numbers, from the last number on or from the first."""
    if len(patterns) == 1:
        return patterns
    places = range(1, len(patterns[0].pieces), 2)
    outward = inward = patterns
    for place in reversed(places):
        outward = _merge(outward, place)
    for place in places:
        inward = _merge(inward, place)
    return min(outward, inward, key=len)


def _merge(patterns: Sequence[Pattern], place: int) -> list[Pattern]:
    """Merge patterns that differ only in the number at one place."""
    alike: dict[Hashable, list[Pattern]] = {}
    for pattern in patterns:
        rest = pattern.pieces[:place] + pattern.pieces[place + 1 :]
        alike.setdefault(rest, []).append(pattern)
    merged = []
    for same in alike.values():
        pieces = list(same[0].pieces)
        numbers = set(chain.from_iterable(pattern.pieces[place] for pattern in same))
        pieces[place] = tuple(sorted(numbers, key=_by_number))
        merged.append(Pattern(tuple(pieces), _members(same)))
    return merged


def _by_number(text: str) -> tuple[int, str]:
    """The order of numbers that are texts."""
    return int(text), text


def _any_number(patterns: list[Pattern]) -> Pattern:
    """One pattern for those that differ only in numbers."""
    pieces = []
    for piece in zip(*(pattern.pieces for pattern in patterns), strict=True):
        pieces.append(piece[0] if len(set(piece)) == 1 else ("*",))
    return Pattern(tuple(pieces), _members(patterns))


def _split_last(pattern: Pattern) -> tuple[tuple[tuple[str, ...], ...], str | None]:
    """The path of a pattern with its last dot, and what follows; None if that has alternatives."""
    pieces = pattern.pieces
    for place in reversed(range(0, len(pieces), 2)):
        above, dot, begin = pieces[place][0].rpartition(".")
        if dot:
            last = [(begin,), *pieces[place + 1 :]]
            path = (*pieces[:place], (above + dot,))
            if any(len(piece) > 1 for piece in last):
                return path, None
            return path, "".join(piece[0] for piece in last)
    return (), None


def _fold_last(patterns: list[Pattern]) -> list[Pattern]:
    """Make one pattern of those that differ only in their last part, if they are not many."""
    if not 1 < len(patterns) <= _MOST_WORDS:
        return patterns
    path, _ = _split_last(patterns[0])
    words = []
    for pattern in patterns:
        _, last = _split_last(pattern)
        assert last is not None
        words.append(last)
    return [Pattern((*path, tuple(words)), _members(patterns))]


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None and text == str(int(text))


def _numbers_text(numbers: Sequence[int]) -> str:
    """Increasing numbers as ranges; "*" if there are too many.

    Example:
        >>> _numbers_text([0, 1]), _numbers_text([0, 1, 2, 5]), _numbers_text(range(0, 24, 2))
        ('{0,1}', '{0..2,5}', '{0,2,...,22}')
        >>> _numbers_text([1, 2, 4, 8, 16, 32, 64])
        '*'
    """
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    pieces: list[str] = []
    for one in ranges:
        if len(one) > 2:
            pieces.append(f"{one[0]}..{one[-1]}")
        else:
            pieces += map(str, one)
    if len(pieces) <= _MOST_NUMBERS:
        return f"{{{','.join(pieces)}}}"
    if len({b - a for a, b in pairwise(numbers)}) == 1:
        return f"{{{numbers[0]},{numbers[1]},...,{numbers[-1]}}}"
    return "*"


def _common_start(words: Sequence[str]) -> str:
    """What all words begin with, up to the last underscore in it."""
    start = ""
    for characters in zip(*words, strict=False):
        if len(set(characters)) > 1:
            break
        start += characters[0]
    if start in words:
        return ""
    return start[: start.rfind("_") + 1]


# Texts that are alike.


def fold_texts(names: Sequence[str], texts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Group texts that are equal but for numbers and the name of the layer that they are about.

    Returns:
        Each text, with the name of the first layer and the range of its numbers, and its indices.

    Example:
        >>> fold_texts(["a", "b"], ["each of its 16 groups", "each of its 32 groups"])
        [('each of its 16 to 32 groups', [0, 1])]
    """
    groups: dict[Hashable, list[int]] = {}
    pieces = []
    examples = []
    for i, (name, text) in enumerate(zip(names, texts, strict=True)):
        without, example = _without_name(text, name)
        examples.append(example)
        pieces.append(_NUMBER.split(without))
        groups.setdefault(tuple(pieces[i][::2]), []).append(i)
    found = []
    for members in groups.values():
        first = members[0]
        text = texts[first]
        if len(members) > 1:
            text = _common_text([pieces[i] for i in members])
            text = re.sub(rf"(\S*'{_OWN_NAME}')", rf"e.g.{NO_BREAK}\1", text, count=1)
            text = text.replace(_OWN_NAME, examples[first])
        # Code such as neurons={'decoder': 'columns'} stays in one line.
        found.append((text.replace("': ", f"':{NO_BREAK}"), members))
    rest = [i for _, members in found[_MOST_TEXTS:] for i in members]
    if rest:
        found[_MOST_TEXTS:] = [("for other reasons", rest)]
    return found


def _without_name(text: str, name: str) -> tuple[str, str]:
    """A text with a mark for the name that it is about, or what that begins with; and the name."""
    example = ""
    for quoted in _QUOTED.findall(text):
        if f"{name}.".startswith(f"{quoted}."):
            text = text.replace(f"'{quoted}'", f"'{_OWN_NAME}'")
            example = example or quoted
    return text, example


def _common_text(pieces: Sequence[Sequence[str]]) -> str:
    """A text for several that differ only in numbers, which are every second piece."""
    text = ""
    for place, piece in enumerate(zip(*pieces, strict=True)):
        different = sorted(set(piece), key=_by_number) if place % 2 else piece[:1]
        if len(different) > 1 and text.endswith(" "):
            text += f"{different[0]} to {different[-1]}"
        else:
            text += _alternatives(different)  # in a name
    return text
