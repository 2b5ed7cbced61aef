"""Numbers, shapes, findings and tables as text."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal

from lightning_hsu._monitor.measure import LayerUniformity, is_out_of_range
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu.measures import Measure
from lightning_hsu.reference import (
    is_soon_simulated,
    is_surely_random,
    random_level,
    random_range,
)

AS_RANDOM = "as random"
"""What a finding begins with where a layer is no more uniform or crowded than random neurons."""

RULE = "as random: within 1 % of random, or where 998 of 1,000 such random layers are"
"""A line under each table with such findings."""

SCORE = "score: 0 as random, 1 the best that there can be; - where it is below 0"
"""A line under each table with scores."""

ERRORS = 3.0
"""Standard errors by which an estimate may be wrong."""

Verdict = Literal["above", "random", "below", "unknown"]

_CLOSE = 0.01  # a ratio this close to 1 counts as random, however many neurons there are
_SPREAD = 0.5
"""Score at which neurons are called more even than random although their ratio is close to 1.

In many dimensions the ratio is always close to 1.
"""
_ROUNDING = 1e-6  # of a score at the bound


def finding(
    layer: LayerUniformity,
    measure: Measure,
    *,
    dead: int | None = None,
    grouped: int = 0,
    groups: int = 0,
    all_counted: bool = True,
    one_of_many: bool = False,
) -> str:
    """Compare a layer with random neurons, in words: facts, not advice.

    Args:
        layer: Its numbers.
        measure: The measure they come from.
        dead: Neurons that do nothing; None takes those that are all zero.
        grouped: Neurons in groups of near-duplicates, where they were counted.
        groups: How many such groups there are.
        all_counted: Whether no pair was missed, which might join groups.
        one_of_many: As for :func:`verdict`.

    Returns:
        A text such as "1.42x random, 12 neurons in 4 near-duplicate groups, 3 dead"; it begins with
        "as random" where that is the verdict. Where neurons are NaN or infinite there is none.
    """
    words = []
    if not layer.nonfinite:
        words.append(_beside_random(layer, measure, one_of_many))
    if groups:
        words.append(in_groups(grouped, groups, all_counted=all_counted))
    if dead is None:
        dead = layer.dead
    if dead:
        words.append(f"{dead:,} dead")
    if layer.nonfinite:
        words.append(f"{layer.nonfinite:,} NaN or infinite")
    return ", ".join(words)


def verdict(layer: LayerUniformity, measure: Measure, *, one_of_many: bool = False) -> Verdict:
    """Compare a layer with random neurons.

    Args:
        layer: Its numbers.
        measure: The measure they come from.
        one_of_many: Whether there are layers of so many shapes that few random ones of each are
            drawn where few tell.

    Returns:
        "random" if the ratio is within 1 % of 1, or the energy (give or take three standard errors
        if it is an estimate) within the range that all but 1 in 1,000 random layers of this shape
        at either end have. Else "above" if the layer is more redundant, "below" if it is more even.
        A score of 0.5 is more even however close the ratio is. "unknown" without a ratio, or if
        neurons are NaN or infinite.
    """
    if math.isnan(layer.ratio) or layer.nonfinite:
        return "unknown"
    is_spread = layer.score >= _SPREAD  # False for a score of NaN
    is_close = abs(layer.ratio - 1.0) <= _CLOSE
    if (is_close and not is_spread) or _within_random(layer, measure, one_of_many):
        return "random"
    if layer.ratio > 1.0:
        return "above"
    return "below"


def _beside_random(layer: LayerUniformity, measure: Measure, one_of_many: bool) -> str:
    """Say how the ratio compares with random neurons, or why there is no ratio."""
    found = verdict(layer, measure, one_of_many=one_of_many)
    if found == "unknown":
        return _no_ratio(layer, measure)
    if found == "random":
        return AS_RANDOM
    if math.isinf(layer.ratio):
        return "infinitely above random"
    if found == "above":
        digits = 2 if layer.ratio < 100 else 0
        return f"{number(layer.ratio, digits)}x random"
    if layer.ratio >= 1.0 - _CLOSE:
        return f"more even than random (score {layer.score:.2f})"
    return f"more even than random ({layer.ratio:.2f}x)"


def _no_ratio(layer: LayerUniformity, measure: Measure) -> str:
    """Say why a layer has no ratio."""
    alive = layer.groups * layer.neurons - layer.dead - layer.nonfinite
    if alive <= layer.groups:
        return "fewer than two live neurons"
    each = round(alive / layer.groups)
    if each > 1 and layer.dimension > 1:
        level = layer.energy  # of a sample, where it is too much work to simulate a random layer
        if layer.exact or is_soon_simulated(measure, each, layer.dimension):
            level = random_level(measure, each, layer.dimension)
        if is_out_of_range(measure, layer.energy, level):
            return "not measurable, energy out of range"
    if layer.groups == 1:
        return "no random reference"
    return "a group with fewer than two live neurons"


def _within_random(layer: LayerUniformity, measure: Measure, one_of_many: bool) -> bool:
    """Return whether the energy is one that random layers of this shape have."""
    alive = round(layer.neurons - (layer.dead + layer.nonfinite) / layer.groups)
    few_tell = one_of_many and layer.groups == 1
    if few_tell and is_surely_random(measure, alive, layer.dimension, layer.energy):
        return True
    low, high = random_range(measure, alive, layer.dimension, layer.groups)
    error = ERRORS * layer.standard_error
    return low - error <= layer.energy <= high + error


def score_text(score: float) -> str:
    """A score for a table: only between 0 and 1, since below 0 it has no bound and says nothing.

    Example:
        >>> score_text(0.284), score_text(-8179.0), score_text(1.0 + 1e-9)
        ('0.28', '-', '1.00')
    """
    if 0.0 <= score <= 1.0 + _ROUNDING:
        return number(score, 2)
    return "-"


def counted(count: int, noun: str) -> str:
    """A count with its noun, such as "1 pair" or "2 pairs"."""
    plural = "" if count == 1 else "s"
    return f"{count:,} {noun}{plural}"


def in_groups(neurons: int, groups: int, *, all_counted: bool = True) -> str:
    """How many near-duplicate neurons there are, in how many groups if all pairs are counted.

    Example:
        >>> in_groups(12, 4), in_groups(2, 1)
        ('12 neurons in 4 near-duplicate groups', '2 neurons in 1 near-duplicate group')
    """
    if not all_counted:  # pairs that were missed may join groups
        return f"at least {counted(neurons, 'neuron')} in near-duplicate groups"
    return f"{counted(neurons, 'neuron')} in {counted(groups, 'near-duplicate group')}"


def layer_named(name: str) -> str:
    """The name of a layer in a sentence, where a number alone would be taken for one.

    Example:
        >>> layer_named("2"), layer_named("net.2")
        ('layer 2', 'net.2')
    """
    return f"layer {name}" if name.isdecimal() else name


def number(x: float, digits: int) -> str:
    """A number for a table cell, short even if huge; "-" for NaN.

    Args:
        x: The number.
        digits: Digits after the point, below 1000.

    Example:
        >>> number(1.2345, 2), number(12345.0, 2), number(1e30, 2), number(float("nan"), 2)
        ('1.23', '12,345', '1.0e+30', '-')
    """
    if math.isnan(x):
        return "-"
    if math.isinf(x):
        return f"{x:g}"
    rounded = round(x, digits) or 0.0  # 0.0 instead of -0.0
    if abs(rounded) < 1000:
        return f"{rounded:.{digits}f}"
    if abs(round(x)) < 1e6:
        return f"{x:,.0f}"
    return f"{x:.1e}"


def shape_of(groups: int, neurons: int, dimension: int, *, sampled: int | None = None) -> str:
    """The shape of a layer's neurons, as a user writes it, or how many of them were ``sampled``.

    Example:
        >>> shape_of(1, 256, 512), shape_of(4, 64, 576), shape_of(1, 9000, 64, sampled=4096)
        ('256 x 512', '4 groups of 64 x 576', '4,096 of 9,000 x 64')
    """
    if sampled is not None:
        return f"{sampled:,} of {groups * neurons:,} x {dimension}"
    shape = f"{neurons} x {dimension}"
    if groups == 1:
        return shape
    return f"{groups} groups of {shape}"


def weight_shape(skip: Skip) -> str:
    """The shape of a weight that is left out, without a single group or batch before it.

    Example:
        >>> weight_shape(Skip("table", (1, 1000, 64), "")), weight_shape(Skip("row", (1, 64), ""))
        ('1000 x 64', '1 x 64')
    """
    shape = skip.shape
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return " x ".join(map(str, shape))


def without_empty(rows: Sequence[tuple[str, ...]], heading: str) -> list[tuple[str, ...]]:
    """Rows of a table, the first being the headings, without a column that has "-" everywhere.

    Example:
        >>> without_empty([("layer", "score"), ("fc", "-")], "score")
        [('layer',), ('fc',)]
    """
    place = rows[0].index(heading)
    if any(row[place] != "-" for row in rows[1:]):
        return list(rows)
    return [row[:place] + row[place + 1 :] for row in rows]


def column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The width of each column: that of its widest cell."""
    columns = zip(*rows, strict=True)
    return [max(map(len, column)) for column in columns]


def table_lines(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Lay out rows as the lines of a plain table.

    Args:
        rows: Cells; the first row is the heading, with a rule of dashes under it.
        right: Indices of the columns that are aligned on the right.

    Example:
        >>> for line in table_lines([["layer", "ratio"], ["net.0", "1.5"]], right=[1]):
        ...     print(line)
        layer  ratio
        -----  -----
        net.0    1.5
    """
    widths = column_widths(rows)
    lines = []
    for row in rows:
        cells = []
        for i, width in enumerate(widths):
            if i in right:
                cells.append(row[i].rjust(width))
            else:
                cells.append(row[i].ljust(width))
        lines.append("  ".join(cells).rstrip())
    rule = "  ".join("-" * width for width in widths)
    lines.insert(1, rule)
    return lines
