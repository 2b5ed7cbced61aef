"""What is measured of a model: the layers, the weights left out and why, as data and as a table."""

from __future__ import annotations

import math
import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from html import escape
from itertools import chain, pairwise

from lightning_hsu._engine.layer import Layer
from lightning_hsu._monitor.text import column_widths, counted, shape_of, table_lines
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu.coefficients import Varying
from lightning_hsu.measures import Measure, Sampled

_WIDTH = 80  # columns of the text
_MOST_ROWS = 40  # a table with more rows after folding shows the first _FIRST_ROWS
_FIRST_ROWS = 30
_MOST_WORDS = 8  # alternatives such as {q,k,v}
_MOST_NUMBERS = 6  # pieces of a set of numbers, such as {0..3,5,7}
_MOST_PATTERNS = 8  # of names for each reason
_MOST_SHAPES = 4  # of patterns that each show their shape
_MOST_REASONS = 20
_LONGEST_COEFFICIENT = 16  # in its column; a longer one is a remark
_NARROWEST_REMARKS = 14  # columns; where there is less room, remarks stand below their row
_NARROWEST_NAMES = 40  # columns, if few rows have remarks
_NARROWEST_NAMES_IF_MANY = 20
_FEW_REMARKS = 5
_MOST_LINES = 2  # of a remark in its column, if few rows have remarks
_MOST_LINES_IF_MANY = 4

_NUMBER = re.compile("(?<![0-9])([0-9]{1,9})(?![0-9])")
_QUOTED = re.compile("'([^']*)'")
_OWN_NAME = "\0"  # stands for the name of a layer in a text about it
_WIDE = "\0"  # follows a character that is two columns wide, so that len() counts columns
_NO_BREAK = "\u00a0"  # a space at which no line is broken


@dataclass(frozen=True)
class LayerSummary:
    """One set of neurons that is measured.

    Args:
        name: Name of the layer.
        shape: (groups, neurons, dimension).
        is_head: Whether it is a class head.
        trainable: Whether gradients reach its neurons; False if it is frozen.
        measure: How it is measured.
        head_reason: Why it is taken for a head, such as "declared"; "" if it is none.
        coefficient: The coefficient in words; "" if it is not known.
        giga_flops: Arithmetic of its penalty in each step, in 1e9 FLOP; 0 if it has none.
        note: What else a user may want to know; "" if nothing.
    """

    name: str
    shape: tuple[int, int, int]
    is_head: bool
    trainable: bool
    measure: Measure
    head_reason: str = ""
    coefficient: str = ""
    giga_flops: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """What is measured of a model, and what is not; ``print`` shows it as a table.

    Args:
        model: Name of the model's class.
        layers: The sets of neurons that are measured, in the model's order.
        skipped: Weights that are not measured.
        coverage: Measured entries as a part, 0 to 1, of those of all weight matrices; NaN if there
            are none.
        every_n_steps: The penalty is applied on every n-th step of each optimizer.

    Example:
        >>> from lightning_hsu.measures import RieszEnergy
        >>> measure = RieszEnergy(s=2.0, half_space=True)
        >>> blocks = [
        ...     LayerSummary(f"blocks.{i}.{name}", (1, 64, 64), False, True, measure)
        ...     for i in range(12)
        ...     for name in ("q", "k", "v")
        ... ]
        >>> head = LayerSummary("head", (1, 10, 64), True, True, measure.for_head(), "declared")
        >>> print(Summary("Net", (*blocks, head), (), 1.0))
        Net: 37 layers measured
        measure: RieszEnergy(s=2.0, half_space=True)
        head: RieszEnergy(s=2.0)
        <BLANKLINE>
        layer                        neurons x dimension  remarks
        ---------------------------  -------------------  ---------------
        blocks.{0..11}.{q,k,v} (36)  64 x 64
        head                         10 x 64              head (declared)
        <BLANKLINE>
        measured: 100 % of the entries of all weight matrices
    """

    model: str
    layers: tuple[LayerSummary, ...]
    skipped: tuple[Skip, ...]
    coverage: float
    every_n_steps: int = 1

    def __str__(self) -> str:
        """The table, at most 80 columns wide."""
        return _text(_view(self))

    def __repr__(self) -> str:
        """The table, too: a prompt shows it."""
        return str(self)

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        return _html(_view(self))


# Measures, coefficients and arithmetic in words.


def measure_text(measure: Measure) -> str:
    """A measure with its first setting and those that differ from their defaults.

    That of a sampled one is the measure that is sampled.

    Example:
        >>> from lightning_hsu.measures import RieszEnergy
        >>> measure_text(Sampled(RieszEnergy(s=1.0, half_space=True)))
        'RieszEnergy(s=1.0, half_space=True)'
    """
    if isinstance(measure, Sampled):
        measure = measure.measure
    return _settings_text(measure)


def sampled_text(measure: Measure, neurons: int) -> str:
    """How the pairs of this many neurons are sampled; "" if all are counted.

    Example:
        >>> sampled_text(Sampled(), 20000)
        'sampled in 19 blocks of 1052'
    """
    if not isinstance(measure, Sampled):
        return ""
    blocks = measure.blocks(neurons)
    if blocks == 1:
        return ""
    return f"sampled in {blocks} blocks of {neurons // blocks}"


def coefficient_text(layer: Layer) -> str:
    """The coefficient, and why it has no effect on trainable neurons if it has none."""
    strength = layer.strength
    if isinstance(strength, Varying):
        text = strength.label()
    elif callable(strength):
        text = "schedule"
    else:
        text = f"{strength:g}"
    if strength == 0:
        text += " (monitor only)"
    reason = layer.idle_reason()
    if reason:
        text += f", {reason}"
    return text


def giga_flops(layer: Layer) -> float:
    """Arithmetic of one penalty gradient, in 1e9 FLOP; 0 if there is no penalty."""
    if layer.strength == 0 or layer.frozen:
        return 0.0
    groups, n, d = layer.target.shape
    return groups * layer.measure.grad_flops(n, d) / 1e9


def giga_text(x: float) -> str:
    """A number of 1e9 FLOP for a table cell.

    Example:
        >>> [giga_text(x) for x in (0.0, 1e-5, 0.0123, 99.7, 12345.0)]
        ['0', '<0.001', '0.012', '100', '12,345']
    """
    if 0 < x < 1e-3:
        return "<0.001"
    if x < 99.5:
        return f"{x:.2g}"
    return f"{x:,.0f}"


def coverage_text(coverage: float) -> str:
    """A part of all entries in percent; never 100 % or 0 % if it is only close to it.

    Example:
        >>> [coverage_text(x) for x in (1.0, 0.99999, 0.9731, 1e-6)]
        ['100 %', '99.9 %', '97.3 %', 'less than 0.1 %']
    """
    if coverage >= 1.0:
        return "100 %"
    percent = min(round(100.0 * coverage, 1), 99.9)
    if percent == 0.0:
        return "less than 0.1 %"
    return f"{percent:.1f} %"


def _settings_text(value: object) -> str:
    if not is_dataclass(value):
        return repr(value)
    settings = []
    for i, field in enumerate(fields(value)):
        setting = getattr(value, field.name)
        if i == 0 or setting != field.default:
            settings.append(f"{field.name}={_settings_text(setting)}")
    return f"{type(value).__name__}({', '.join(settings)})"


# Names of repeated blocks as patterns.


@dataclass(frozen=True)
class _Pattern:
    """Names that differ only in some of their pieces.

    Args:
        pieces: The alternatives of each piece. Every combination of them is one of the names.
        members: Indices of the names.
    """

    pieces: tuple[tuple[str, ...], ...]
    members: tuple[int, ...]

    def __str__(self) -> str:
        return "".join(_alternatives(piece) for piece in self.pieces)

    def shorter(self) -> list[str]:
        """The pattern, and shorter ones: a "*" for the first numbers, then for the next, too.

        The last part of the names stays as it is.
        """
        words = [_alternatives(piece) for piece in self.pieces]
        found = ["".join(words)]
        path, _ = _split_last(self)
        for place, piece in enumerate(path):
            if len(piece) > 1 and all(map(_is_number, piece)):
                words[place] = "*"
                found.append("".join(words))
        return found

    def count(self) -> str:
        """The number of names in brackets; "" for a single one."""
        if len(self.members) == 1:
            return ""
        return f" ({len(self.members):,})"

    def with_count(self, shape: str = "") -> str:
        """The pattern, the number of its names if there are several, and the shape of each."""
        facts = []
        if len(self.members) > 1:
            facts.append(f"{len(self.members):,}")
        if shape:
            facts.append(f"each {shape}" if facts else shape)
        if not facts:
            return str(self)
        return f"{self} ({', '.join(facts)})".replace(" ", _NO_BREAK)


def fold_names(names: Sequence[str]) -> str:
    """Write names as few patterns, in their order, each with the number of its names.

    Names belong together if they are equal but for numbers, or but for their last part.

    Args:
        names: Dotted names.

    Example:
        >>> fold_names(["stem", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"])
        'stem, layer1.0.conv{1,2} (2), layer1.1.conv1'
        >>> fold_names([f"h.{i}.attn.{part}_proj" for i in range(12) for part in "qkv"])
        'h.{0..11}.attn.{q,k,v}_proj (36)'
        >>> fold_names(["rnn.weight_hh_l0.r", "rnn.weight_hh_l0.z", "rnn.weight_hh_l0.n"])
        'rnn.weight_hh_l0.{r,z,n} (3)'
    """
    patterns = _fold(names, [None] * len(names))
    return ", ".join(f"{pattern}{pattern.count()}" for pattern in patterns)


def _fold(
    names: Sequence[str], kinds: Sequence[Hashable], *, loosely: bool = False
) -> list[_Pattern]:
    """Fold names of equal kinds into patterns, in the order of the first name of each.

    Args:
        names: The names.
        kinds: What must be equal in one pattern.
        loosely: Take a "*" for all numbers at one place: fewer patterns, that say less.
    """
    alike: dict[tuple[Hashable, ...], list[_Pattern]] = {}
    for i, name in enumerate(names):
        pieces = _NUMBER.split(name)
        pattern = _Pattern(tuple((piece,) for piece in pieces), (i,))
        alike.setdefault((kinds[i], *pieces[::2]), []).append(pattern)
    by_last: dict[Hashable, list[_Pattern]] = {}
    for key, patterns in alike.items():
        fold_numbers = _any_number if loosely else _fold_numbers
        for pattern in fold_numbers(patterns):
            path, last = _split_last(pattern)
            same: Hashable = (key[0], path)
            if not path or last is None:
                same = pattern.members  # it stays alone
            by_last.setdefault(same, []).append(pattern)
    folded: list[_Pattern] = []
    for patterns in by_last.values():
        folded += _fold_last(patterns)
    return sorted(folded, key=lambda pattern: pattern.members[0])


def _fold_numbers(patterns: list[_Pattern]) -> list[_Pattern]:
    """Fold patterns that differ only in numbers, from the last number on or from the first."""
    if len(patterns) == 1:
        return patterns
    places = _places_that_differ(patterns)
    outward = inward = patterns
    for place in reversed(places):
        outward = _merge(outward, place)
    for place in places:
        inward = _merge(inward, place)
    return min(outward, inward, key=len)


def _any_number(patterns: list[_Pattern]) -> list[_Pattern]:
    """Make one pattern of those that differ only in numbers."""
    pieces = list(patterns[0].pieces)
    for place in _places_that_differ(patterns):
        pieces[place] = ("*",)
    return [_Pattern(tuple(pieces), _members(patterns))]


def _places_that_differ(patterns: Sequence[_Pattern]) -> list[int]:
    places = []
    for place, piece in enumerate(zip(*(pattern.pieces for pattern in patterns), strict=True)):
        if len(set(piece)) > 1:
            places.append(place)
    return places


def _merge(patterns: Sequence[_Pattern], place: int) -> list[_Pattern]:
    """Merge patterns that differ only in the number at one place."""
    alike: dict[Hashable, list[_Pattern]] = {}
    for pattern in patterns:
        rest = pattern.pieces[:place] + pattern.pieces[place + 1 :]
        alike.setdefault(rest, []).append(pattern)
    merged = []
    for same in alike.values():
        pieces = list(same[0].pieces)
        if len(same) > 1:
            numbers = set(chain.from_iterable(pattern.pieces[place] for pattern in same))
            pieces[place] = tuple(sorted(numbers, key=lambda number: (int(number), number)))
        merged.append(_Pattern(tuple(pieces), _members(same)))
    return merged


def _members(patterns: Sequence[_Pattern]) -> tuple[int, ...]:
    return tuple(sorted(chain.from_iterable(pattern.members for pattern in patterns)))


def _split_last(pattern: _Pattern) -> tuple[tuple[tuple[str, ...], ...], str | None]:
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


def _fold_last(patterns: list[_Pattern]) -> list[_Pattern]:
    """Make one pattern of those that differ only in their last part, if they are not many."""
    if not 1 < len(patterns) <= _MOST_WORDS:
        return patterns
    path = _split_last(patterns[0])[0]
    words = []
    for pattern in patterns:
        last = _split_last(pattern)[1]
        assert last is not None
        words.append(last)
    return [_Pattern((*path, tuple(words)), _members(patterns))]


def _alternatives(piece: Sequence[str]) -> str:
    """A piece of a name, or its alternatives in braces."""
    if len(piece) == 1:
        return piece[0]
    if all(map(_is_number, piece)):
        return _numbers_text([int(one) for one in piece])
    ending = _common_end(piece)
    begins = [one[: len(one) - len(ending)] for one in piece]
    start = _common_start(begins)
    words = [one[len(start) :] for one in begins]
    return f"{start}{{{','.join(words)}}}{ending}"


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


def _common_end(words: Sequence[str]) -> str:
    """What all words end with, from an underscore on."""
    end = _same_start([word[::-1] for word in words])[::-1]
    if "_" not in end or end in words:
        return ""
    return end[end.index("_") :]


def _common_start(words: Sequence[str]) -> str:
    """What all words begin with, up to an underscore."""
    start = _same_start(words)
    if start in words:
        return ""
    return start[: start.rfind("_") + 1]


def _same_start(words: Sequence[str]) -> str:
    first, last = min(words), max(words)
    for i, character in enumerate(first):
        if last[i : i + 1] != character:
            return first[:i]
    return first


# What is shown, before it is laid out.


@dataclass(frozen=True)
class _Row:
    """A row of the table.

    Args:
        names: The layer, or a pattern of several; then the same in less room.
        count: How many they are, in brackets; "" for one.
        values: The cells between the name and the remarks.
        remarks: What is special about them.
    """

    names: list[str]
    count: str
    values: tuple[str, ...]
    remarks: str


@dataclass(frozen=True)
class _Line:
    """A line of text, which may need to be wrapped."""

    text: str
    indent: int = 0
    hanging: int = 4  # the indent of all lines but the first


@dataclass(frozen=True)
class _View:
    """What is shown of a summary.

    Args:
        above: Lines above the table.
        columns: Titles of the columns between the names and the remarks.
        rows: The rows.
        hidden: A line about layers without a row; "" if all have one.
        hidden_at: The number of rows above that line.
        below: Lines below the table.
    """

    above: list[_Line]
    columns: tuple[str, ...]
    rows: list[_Row]
    hidden: str
    hidden_at: int
    below: list[_Line]


_SHAPE = "neurons x dimension"
_SHAPE_IF_NARROW = "neurons x dim"
_GIGA = "GFLOP/step"
_COEFFICIENT = "coefficient"


def _view(summary: Summary) -> _View:
    layers = summary.layers
    texts = {id(layer.measure): layer.measure for layer in layers}
    words = {key: measure_text(measure) for key, measure in texts.items()}
    measures = [words[id(layer.measure)] for layer in layers]
    of_heads = Counter[str]()
    of_others = Counter[str]()
    for layer, measure in zip(layers, measures, strict=True):
        if layer.is_head:
            of_heads[measure] += 1
        else:
            of_others[measure] += 1
    of_head = _most_frequent(of_heads)
    common = _most_frequent(of_others) or of_head
    coefficients = {layer.coefficient for layer in layers}

    above = [_Line(_title(summary))]
    if common:
        above.append(_Line(f"measure: {common}"))
    if of_head and of_head != common:
        above.append(_Line(f"head: {of_head}"))
    columns = [_SHAPE]
    if any(layer.giga_flops > 0 for layer in layers):
        columns.append(_GIGA)
    if len(coefficients) > 1:
        columns.append(_COEFFICIENT)
    elif coefficients != {""} and layers:
        above.append(_Line(f"coefficient: {layers[0].coefficient}"))

    # Alike are layers with the same cells.
    kinds: list[tuple[tuple[int, int, int], str, str]] = []
    for layer, measure in zip(layers, measures, strict=True):
        expected = of_head if layer.is_head else common
        other = "" if measure == expected else measure
        coefficient, reason = layer.coefficient, ""
        if _COEFFICIENT in columns:
            coefficient, reason = _short_coefficient(_printable(coefficient))
        kinds.append((layer.shape, coefficient, _remarks(layer, other, reason)))
    patterns = _fold([_printable(layer.name) for layer in layers], kinds)
    shown, hidden = _shown(patterns, layers)
    rows = [_row(pattern, layers, columns, *kinds[pattern.members[0]]) for pattern in shown]
    return _View(
        above=[_Line(_printable(line.text)) for line in above],
        columns=tuple(columns),
        rows=rows,
        hidden=_hidden_text([layers[i] for i in _members(hidden)]),
        hidden_at=_FIRST_ROWS,
        below=[*_about_layers(summary), *_about_skips(summary), *_at_the_end(summary)],
    )


def _title(summary: Summary) -> str:
    """The first line: the model, and how many of its weights are measured."""
    left_out = len(summary.skipped)
    if summary.layers:
        text = f"{summary.model}: {counted(len(summary.layers), 'layer')} measured"
        if left_out:
            text += f", {counted(left_out, 'weight')} not"
        return text
    if left_out:
        return f"{summary.model}: nothing is measured, {counted(left_out, 'weight')} left out"
    return f"{summary.model}: nothing is measured, since it has no weight matrix"


def _most_frequent(counter: Counter[str]) -> str:
    """The most frequent text, the first of several; "" if there is none."""
    for text, _ in counter.most_common(1):
        return text
    return ""


def _short_coefficient(text: str) -> tuple[str, str]:
    """A coefficient for its column, and what of it is a remark."""
    value, _, reason = text.partition(", ")
    if len(_by_column(value)) > _LONGEST_COEFFICIENT:
        return "", f"coefficient: {text}"
    return value, reason


def _remarks(layer: LayerSummary, measure: str, reason: str) -> str:
    """What is special about a layer; its measure if that is not the common one."""
    remarks = []
    if layer.is_head:
        why = f" ({layer.head_reason})" if layer.head_reason else ""
        remarks.append(f"head{why}")
    if not layer.trainable:
        remarks.append("frozen")
    if measure:
        remarks.append(f"measure: {measure}")
    sampled = sampled_text(layer.measure, layer.shape[1])
    if sampled:
        remarks.append(sampled)
    if reason:
        remarks.append(reason)
    return _printable("; ".join(remarks))


def _shown(
    patterns: list[_Pattern], layers: Sequence[LayerSummary]
) -> tuple[list[_Pattern], list[_Pattern]]:
    """The patterns that have a row, and those that do not because there are too many."""
    if len(patterns) <= _MOST_ROWS:
        return patterns, []
    shown = patterns[:_FIRST_ROWS]
    hidden = []
    for pattern in patterns[_FIRST_ROWS:]:
        if layers[pattern.members[0]].is_head:
            shown.append(pattern)
        else:
            hidden.append(pattern)
    return shown, hidden


def _row(
    pattern: _Pattern,
    layers: Sequence[LayerSummary],
    columns: Sequence[str],
    shape: tuple[int, int, int],
    coefficient: str,
    remarks: str,
) -> _Row:
    values = [shape_of(*shape)]
    if _GIGA in columns:
        values.append(giga_text(sum(layers[i].giga_flops for i in pattern.members)))
    if _COEFFICIENT in columns:
        values.append(coefficient)
    return _Row(pattern.shorter(), pattern.count(), tuple(values), remarks)


def _hidden_text(layers: Sequence[LayerSummary]) -> str:
    """What is to be known of layers without a row."""
    if not layers:
        return ""
    neurons = [layer.shape[0] * layer.shape[1] for layer in layers]
    least, most = min(neurons), max(neurons)
    range_text = f"{least:,} to {most:,} neurons"
    if least == most:
        range_text = f"{counted(most, 'neuron')} each"
    words = [f"... and {len(layers):,} more layers", range_text]
    if len(layers) == 1:
        words = ["... and 1 more layer", counted(most, "neuron")]
    frozen = sum(not layer.trainable for layer in layers)
    if frozen:
        words.append(f"{frozen:,} of them frozen")
    giga = sum(layer.giga_flops for layer in layers)
    if giga > 0:
        words.append(f"{giga_text(giga)} {_GIGA}")
    return ", ".join(words)


def _about_layers(summary: Summary) -> list[_Line]:
    """Below the table: what the penalty costs, frozen layers and notes."""
    layers = summary.layers
    lines = []
    total = sum(layer.giga_flops for layer in layers)
    if total > 0:
        lines.append(_Line(f"penalty: {giga_text(total)} {_GIGA} in total"))
    if summary.every_n_steps > 1:
        lines.append(_Line(f"applied every {summary.every_n_steps} steps of each optimizer"))
    frozen = sum(not layer.trainable for layer in layers)
    if frozen:
        count = counted(frozen, "layer")
        until = "until it trains" if frozen == 1 else "until they train"
        if frozen == len(layers) > 1:
            count = f"all {count}"
        lines.append(_Line(f"{count} frozen: measured once, no penalty {until}"))
    noted = [layer for layer in layers if layer.note]
    names = [_printable(layer.name) for layer in noted]
    groups = _group_texts(names, [_printable(layer.note) for layer in noted])
    for text, members in groups[:_MOST_REASONS]:
        patterns = _patterns_text([names[i] for i in members])
        lines.append(_Line(f"note: {patterns}: {_unbroken(text)}"))
    rest = sum(len(members) for _, members in groups[_MOST_REASONS:])
    if rest:
        lines.append(_Line(f"note: {counted(rest, 'layer')} more with other notes"))
    return lines


def _about_skips(summary: Summary) -> list[_Line]:
    """The weights that are not measured, by reason."""
    skips = summary.skipped
    if not skips:
        return []
    lines = [_Line(f"not measured ({len(skips):,}):")]
    names = [_printable(skip.name) for skip in skips]
    groups = _group_texts(names, [_printable(skip.reason) for skip in skips])
    for text, members in groups[:_MOST_REASONS]:
        lines += _reason_lines(text, [names[i] for i in members], [skips[i] for i in members])
    rest = sum(len(members) for _, members in groups[_MOST_REASONS:])
    if rest:
        lines.append(_Line(f"{rest:,} for other reasons", indent=2))
    said = any("neurons=" in skip.reason or "include=" in skip.reason for skip in skips)
    if not summary.layers and not said:
        name = names[0] if len(names[0]) <= _NARROWEST_NAMES else "NAME"
        lines.append(
            _Line(
                f"to measure one, ask for it by name: include='{name}', or say where its neurons "
                f"are: neurons={{'{name}': 'rows'}} or 'columns'"
            )
        )
    return lines


def _reason_lines(text: str, names: Sequence[str], skips: Sequence[Skip]) -> list[_Line]:
    """A reason, and below it the weights; all in one line if that is short."""
    shapes = [_weight_shape(skip) for skip in skips]
    begin = f"{len(skips):,} {_unbroken(text)}"
    if len(names) > 1 and len(set(shapes)) == 1:
        if shapes[0]:
            begin += f" (each {shapes[0]})"
        patterns = _patterns_text(names)
    else:
        patterns = _patterns_text(names, shapes)
    line = f"{begin}: {patterns}"
    if len(line) + 2 <= _WIDTH:
        return [_Line(line, indent=2)]
    return [_Line(f"{begin}:", indent=2), _Line(patterns, indent=6, hanging=6)]


def _weight_shape(skip: Skip) -> str:
    """The shape of a weight, such as "1000 x 64"; no single group or batch before it."""
    shape = skip.shape
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return " x ".join(map(str, shape))


def _patterns_text(names: Sequence[str], shapes: Sequence[str] | None = None) -> str:
    """Names as at most a few patterns, with their shapes if these are not many."""
    if shapes is not None and len(set(shapes)) <= _MOST_SHAPES:
        patterns = _fold(names, shapes)
        if len(patterns) <= _MOST_SHAPES:
            with_shapes = []
            for pattern in patterns:
                with_shapes.append(pattern.with_count(shapes[pattern.members[0]]))
            return ", ".join(with_shapes)
    kinds = [None] * len(names)
    patterns = _fold(names, kinds)
    if len(patterns) > _MOST_PATTERNS:
        patterns = _fold(names, kinds, loosely=True)
    words = []
    for pattern in patterns[:_MOST_PATTERNS]:
        # One pattern of all the names needs no number.
        words.append(str(pattern) if len(patterns) == 1 else pattern.with_count())
    rest = sum(len(pattern.members) for pattern in patterns[_MOST_PATTERNS:])
    if rest:
        words.append(f"and {rest:,} more")
    return ", ".join(words)


def _group_texts(names: Sequence[str], texts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Group texts that are equal but for numbers and the name of the layer that they are about.

    Returns:
        Each text, with the name of the first layer and the range of its numbers, and its indices.

    Example:
        >>> _group_texts(["a", "b"], ["ask: include='a'", "ask: include='b'"])
        [("ask: e.g. include='a'", [0, 1])]
        >>> _group_texts(["a", "b"], ["each of its 16 groups", "each of its 32 groups"])
        [('each of its 16 to 32 groups', [0, 1])]
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    pieces = []
    for i, (name, text) in enumerate(zip(names, texts, strict=True)):
        pieces.append(_NUMBER.split(_without_name(text, name)))
        groups.setdefault(tuple(pieces[i][::2]), []).append(i)
    found = []
    for members in groups.values():
        first = members[0]
        if len(members) == 1:
            found.append((texts[first], members))
            continue
        text = ""
        for place, piece in enumerate(pieces[first]):
            if place % 2:
                piece = _number_range([pieces[i][place] for i in members], alone=text[-1:] == " ")
            text += piece
        if _OWN_NAME in text:
            example = _own_names(texts[first], names[first])[0]
            text = re.sub(rf"(\S*'{_OWN_NAME}')", r"e.g. \1", text, count=1)
            text = text.replace(_OWN_NAME, example)
        found.append((text, members))
    return found


def _unbroken(text: str) -> str:
    """A text whose code, such as neurons={'decoder': 'columns'}, stays in one line."""
    text = text.replace("e.g. ", f"e.g.{_NO_BREAK}")
    return text.replace("': ", f"':{_NO_BREAK}")


def _own_names(text: str, name: str) -> list[str]:
    """What a text has in quotes of the name that it is about: the name, or what it begins with."""
    found = []
    for quoted in _QUOTED.findall(text):
        if f"{name}.".startswith(f"{quoted}."):
            found.append(quoted)
    return found


def _without_name(text: str, name: str) -> str:
    """A text with a mark for the name that it is about."""
    for quoted in _own_names(text, name):
        text = text.replace(f"'{quoted}'", f"'{_OWN_NAME}'")
    return text


def _number_range(numbers: Sequence[str], *, alone: bool) -> str:
    """The numbers at one place of several texts; ``alone`` if they are no part of a name."""
    different = sorted(set(numbers), key=lambda number: (int(number), number))
    if len(different) > 1 and alone:
        return f"{different[0]} to {different[-1]}"
    return _alternatives(different)


def _at_the_end(summary: Summary) -> list[_Line]:
    """The last line: how much of the model is measured."""
    of_all = "of the entries of all weight matrices"
    if not summary.layers:
        return [_Line("measured: none")]
    if math.isnan(summary.coverage):
        return [_Line(f"measured: an unknown part {of_all}")]
    return [_Line(f"measured: {coverage_text(summary.coverage)} {of_all}")]


def _printable(text: str) -> str:
    """A text without line breaks and control characters."""
    if text.isascii() and text.isprintable():
        return text
    text = unicodedata.normalize("NFC", text)
    characters = []
    for character in text:
        if character.isprintable():
            characters.append(character)
        else:
            characters.append(ascii(character)[1:-1])
    return "".join(characters)


# Plain text.


def _text(view: _View) -> str:
    lines: list[str] = []
    for line in view.above:
        lines += _wrapped(line)
    if view.rows:
        lines += ["", *_table(view), ""]
    for line in view.below:
        lines += _wrapped(line)
    return "\n".join(lines).replace(_WIDE, "").replace(_NO_BREAK, " ")


def _wrapped(line: _Line) -> list[str]:
    """A line as one or several, each at most as wide as the text."""
    indent = " " * line.indent
    return _wrap(line.text, _WIDTH, indent, " " * line.hanging)


def _wrap(text: str, width: int, indent: str = "", hanging: str = "") -> list[str]:
    room = width - len(hanging)
    words = [_shorten(word, room) for word in _by_column(text).split(" ")]
    return textwrap.wrap(
        " ".join(words),
        width,
        initial_indent=indent,
        subsequent_indent=hanging,
        break_on_hyphens=False,
    )


def _by_column(text: str) -> str:
    """A text in which len() counts columns: a mark follows each wide character."""
    if text.isascii():
        return text
    characters = []
    for character in text:
        characters.append(character)
        if unicodedata.east_asian_width(character) in "WF":
            characters.append(_WIDE)
    return "".join(characters)


def _shorten(text: str, width: int) -> str:
    """Cut a text in its middle, so that both ends can be read.

    Example:
        >>> _shorten("encoder.layers.0.attention.query", 20)
        'encoder.l...on.query'
    """
    if len(text) <= width:
        return text
    width = max(width, 5)
    end = (width - 3) // 2
    begin = width - 3 - end
    left, right = text[:begin], text[-end:]
    # No wide character is cut from its mark.
    if text[begin] == _WIDE:
        left = left[:-1]
    return f"{left}...{right.removeprefix(_WIDE)}"


def _table(view: _View) -> list[str]:
    """The lines of the table."""
    remarks = [_by_column(row.remarks) for row in view.rows]
    values = [tuple(map(_by_column, row.values)) for row in view.rows]
    widest_name = shortest = len("layer")
    for row in view.rows:
        widest_name = max(widest_name, len(_by_column(row.names[0]) + row.count))
        shortest = max(shortest, len(_by_column(row.names[-1]) + row.count))
    widest_remark = max(map(len, remarks))
    if widest_remark:
        widest_remark = max(widest_remark, len("remarks"))
    columns = list(view.columns)
    room = _room(columns, values)
    if widest_name + 2 + widest_remark > room:
        columns[0] = _SHAPE_IF_NARROW
        room = _room(columns, values)
    name_width, remark_width = _divide(room, widest_name, shortest, widest_remark, remarks)
    if name_width <= _room(view.columns, values) and not remark_width:
        columns = list(view.columns)

    rows: list[tuple[list[str], list[str]]] = []  # each with the lines of text below it
    for i, row in enumerate(view.rows):
        cells = [_fitting_name(row, name_width), *values[i]]
        if remark_width:
            first, *others = _wrap(remarks[i], remark_width) or [""]
            rows.append(([*cells, first], []))
            for other in others:
                rows.append(([*[""] * len(cells), other], []))
        else:
            rows.append((cells, _wrap(remarks[i], _WIDTH, " " * 4, " " * 4)))
        if view.hidden and i == view.hidden_at - 1:
            rows[-1][1].extend(_wrap(view.hidden, _WIDTH))
    heading = ["layer", *columns]
    if remark_width:
        heading.append("remarks")
    right = [1 + i for i, column in enumerate(columns) if column == _GIGA]
    title, rule, *lines = table_lines([heading, *[cells for cells, _ in rows]], right=right)
    found = [title, rule]
    for line, (_, below) in zip(lines, rows, strict=True):
        found += [line, *below]
    return found


def _fitting_name(row: _Row, width: int) -> str:
    """The name of a row in so many columns, always with its count."""
    room = width - len(row.count)
    name = ""
    for one in row.names:
        name = _by_column(one)
        if len(name) <= room:
            break
    return _shorten(name, room) + row.count


def _room(columns: Sequence[str], values: Sequence[Sequence[str]]) -> int:
    """The columns of the text that are left for the names and the remarks."""
    widths = column_widths([columns, *values])
    return _WIDTH - sum(widths) - 2 * len(widths)


def _divide(
    room: int, name: int, shortest: int, remark: int, remarks: Sequence[str]
) -> tuple[int, int]:
    """Divide the room between names and remarks.

    Args:
        room: The columns of the text that there are.
        name: Columns of the widest name.
        shortest: The same, with each name in its shortest form.
        remark: Columns of the widest remark; 0 if there is none.
        remarks: The remarks.

    Returns:
        The columns of the names, and those of the remarks, 0 if they have to stand below their row.
    """
    if not remark:
        return min(name, room), 0
    if name + 2 + remark <= room:
        return name, remark
    words = chain.from_iterable(text.split(" ") for text in set(remarks))
    least = max(_NARROWEST_REMARKS, *map(len, words))
    width = min(remark, max(least, room - 2 - name))
    left = room - 2 - width
    narrowest, most_lines = _NARROWEST_NAMES, _MOST_LINES
    if sum(map(bool, remarks)) > _FEW_REMARKS:
        narrowest, most_lines = _NARROWEST_NAMES_IF_MANY, _MOST_LINES_IF_MANY
    if left < min(shortest, narrowest):
        return min(name, room), 0
    if any(len(_wrap(text, width)) > most_lines for text in set(remarks)):
        return min(name, room), 0
    return min(name, left), width


# HTML. Colors are those of the page, so that it can be light or dark.


_ALIGN = {_GIGA: "right"}


def _html(view: _View) -> str:
    parts = ['<div style="overflow-x:auto">']
    parts += _html_lines(view.above)
    if view.rows:
        parts += _html_table(view)
    parts += _html_lines(view.below)
    parts.append("</div>")
    return "\n".join(parts)


def _html_lines(lines: Sequence[_Line]) -> list[str]:
    parts = []
    for line in lines:
        style = f"padding-left:{line.indent}ch;overflow-wrap:anywhere"
        parts.append(f'<div style="{style}">{escape(line.text)}</div>')
    return parts


def _html_table(view: _View) -> list[str]:
    titles = ["layer", *view.columns]
    remarks = any(row.remarks for row in view.rows)
    if remarks:
        titles.append("remarks")
    parts = ['<table style="border-collapse:collapse;margin:0.5em 0">', "<thead><tr>"]
    for title in titles:
        parts.append(f'<th style="text-align:{_ALIGN.get(title, "left")}">{escape(title)}</th>')
    parts.append("</tr></thead><tbody>")
    for i, row in enumerate(view.rows):
        cells = [row.names[0] + row.count, *row.values]
        if remarks:
            cells.append(row.remarks)
        parts.append("<tr>")
        for title, cell in zip(titles, cells, strict=True):
            style = f"text-align:{_ALIGN.get(title, 'left')};overflow-wrap:anywhere"
            parts.append(f'<td style="{style}">{escape(cell)}</td>')
        parts.append("</tr>")
        if view.hidden and i == view.hidden_at - 1:
            style = "text-align:left"
            hidden = f'<td colspan="{len(titles)}" style="{style}">{escape(view.hidden)}</td>'
            parts.append(f"<tr>{hidden}</tr>")
    parts.append("</tbody></table>")
    return parts
