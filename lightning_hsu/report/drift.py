"""How far a network has drifted from another one, over all layers, as numbers and in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal, NamedTuple

from lightning_hsu._monitor.fold import fold_names
from lightning_hsu._monitor.text import ERRORS, counted, layer_named, number

Change = Literal["rose", "fell", "same", "unknown"]
"""What a number has done."""

_ROUNDING = 1e-6  # part of a ratio, by which two that are the same may differ


@dataclass(frozen=True, eq=False)
class Drift:
    """How far a network has drifted, such as an adapted one from its base, over all its layers.

    ``print`` shows it as one line.

    Args:
        layers: How many layers have a finite ratio both before and after.
        left_out: Names of the layers that do not.
        ratio_before: Mean of their ratios before, each layer counted once; NaN without layers.
        ratio_after: The same after.
        rose: Name of the layer whose ratio rose most; "" if none did.
        rose_from: Its ratio before; NaN if none rose.
        rose_to: Its ratio after.
        followed: How many layers have neurons that are followed, so that their move is known.
        moved: Median over those that moved of how far they did, in degrees; 0 if none did, NaN if
            none is followed.
        moved_most: How far the layer that moved most did.
        moved_layer: Its name; "" if none moved.
        moved_layers: Names of the layers that moved.
        not_followed: Names of the other layers, such as those of another shape after than before.
        fell: Name of the layer whose ratio fell most; "" if none did.
        fell_from: Its ratio before; NaN if none fell.
        fell_to: Its ratio after.
        ratio_error: Standard error of the change of the mean ratio; 0 if all ratios are exact.
        farthest: How far the neuron of all layers that moved most did; NaN if none is followed.
        farthest_layer: Its layer; "" if none moved.

    Example:
        >>> drift = drift_of([LayerMove("fc", 1.0, 1.5, 9.0), LayerMove("head", 2.0, 1.9, 0.0)])
        >>> drift.rose, drift.fell, drift.moved_layers
        ('fc', 'head', ('fc',))
        >>> print(drift_of([LayerMove("fc", 1.0, 1.5, 9.0)]))
        drift: energy ratio 1.0000 -> 1.5000 (+50.00 %); the median neuron moved by 9.0 degrees
    """

    layers: int
    left_out: tuple[str, ...]
    ratio_before: float
    ratio_after: float
    rose: str
    rose_from: float
    rose_to: float
    followed: int
    moved: float
    moved_most: float
    moved_layer: str
    moved_layers: tuple[str, ...]
    not_followed: tuple[str, ...]
    fell: str = ""
    fell_from: float = math.nan
    fell_to: float = math.nan
    ratio_error: float = 0.0
    farthest: float = math.nan
    farthest_layer: str = ""

    def __str__(self) -> str:
        """The drift as one line."""
        return drift_line(self)

    def __repr__(self) -> str:
        """The same line."""
        return f"<{drift_line(self)}>"


class LayerMove(NamedTuple):
    """What the drift takes of one layer.

    Args:
        name: Its name.
        before: Its ratio before; NaN if it has none.
        after: Its ratio after.
        moved: Median angle between a neuron before and after, in degrees; NaN if not known.
        error: Standard error of the ratio's change; 0 if both ratios are exact.
        farthest: Largest angle between a neuron before and after, in degrees; NaN if not known.
    """

    name: str
    before: float
    after: float
    moved: float
    error: float = 0.0
    farthest: float = math.nan


def change_of(before: float, after: float, error: float) -> Change:
    """Whether a ratio has changed by more than rounding and three standard errors.

    Args:
        before: The ratio before; NaN if there is none.
        after: The ratio after.
        error: Standard error of the change; 0 if both are exact.

    Example:
        >>> change_of(1.0, 1.2, 0.0), change_of(1.0, 1.2, 0.1), change_of(2.0, math.nan, 0.0)
        ('rose', 'same', 'unknown')
    """
    if math.isnan(before) or math.isnan(after):
        return "unknown"
    if before == after:  # two that are infinite, too
        return "same"
    if abs(after - before) <= max(ERRORS * error, _ROUNDING * abs(before)):
        return "same"
    return "rose" if after > before else "fell"


def drift_of(layers: Sequence[LayerMove]) -> Drift:
    """How far the layers of a comparison have drifted.

    Args:
        layers: What each has become.
    """
    known = []
    left_out = []
    for one in layers:
        if math.isfinite(one.before) and math.isfinite(one.after):
            known.append(one)
        else:
            left_out.append(one.name)
    before = after = math.nan
    if known:
        before = fmean([one.before for one in known])
        after = fmean([one.after for one in known])
    error = 0.0
    if known:
        error = math.hypot(*[one.error for one in known]) / len(known)
    nothing = LayerMove("", math.nan, math.nan, math.nan)
    rose = fell = nothing
    highest = lowest = 0.0
    for one in known:
        rise = one.after - one.before
        what = change_of(one.before, one.after, one.error)
        if what == "rose" and rise > highest:
            rose, highest = one, rise
        if what == "fell" and rise < lowest:
            fell, lowest = one, rise
    followed = []
    not_followed = []
    for one in layers:
        if math.isnan(one.moved):
            not_followed.append(one.name)
        else:
            followed.append(one)
    moved = [one for one in followed if one.moved > 0.0]
    farthest = nothing
    of_all = nothing
    for one in followed:
        if one.farthest > 0.0 and not one.farthest <= of_all.farthest:
            of_all = one
    middle = most = reach = math.nan
    if followed:
        middle = most = reach = 0.0
    if of_all.name:
        reach = of_all.farthest
    if moved:
        farthest = max(moved, key=_moved)
        middle = median([one.moved for one in moved])
        most = farthest.moved
    return Drift(
        layers=len(known),
        left_out=tuple(left_out),
        ratio_before=before,
        ratio_after=after,
        rose=rose.name,
        rose_from=rose.before,
        rose_to=rose.after,
        followed=len(followed),
        moved=middle,
        moved_most=most,
        moved_layer=farthest.name,
        moved_layers=tuple(one.name for one in moved),
        not_followed=tuple(not_followed),
        fell=fell.name,
        fell_from=fell.before,
        fell_to=fell.after,
        ratio_error=error,
        farthest=reach,
        farthest_layer=of_all.name,
    )


def _moved(one: LayerMove) -> float:
    return one.moved


def drift_line(drift: Drift) -> str:
    """The drift as one line.

    Example:
        >>> drift_line(drift_of([]))
        'drift: no layer has a ratio before and after; how far neurons moved is not known'
    """
    parts = [_ratios(drift), _moves(drift)]
    if drift.farthest > drift.moved_most and drift.farthest_layer:
        where = f", in {layer_named(drift.farthest_layer)}" if drift.followed > 1 else ""
        parts.append(f"the one that moved most by {degrees(drift.farthest)} degrees{where}")
    if drift.followed > 0 and drift.not_followed:
        parts.append(f"how far is not known of {fold_names(drift.not_followed)}")
    return f"drift: {'; '.join(parts)}"


def _ratios(drift: Drift) -> str:
    """How the ratios have changed."""
    if drift.layers == 0:
        return "no layer has a ratio before and after"
    change = _change(drift.ratio_before, drift.ratio_after, drift.ratio_error)
    text = f"energy ratio {change}"
    if drift.layers > 1:
        text = f"mean energy ratio of {drift.layers:,} layers {change}"
        text += _extreme("rose", drift.rose, drift.rose_from, drift.rose_to)
        text += _extreme("fell", drift.fell, drift.fell_from, drift.fell_to)
    if drift.left_out:
        text += f"; without a finite ratio, left out: {fold_names(drift.left_out)}"
    return text


def _extreme(what: str, name: str, before: float, after: float) -> str:
    """Which layer's ratio rose or fell most; "" if none did so that four digits tell."""
    if not name or number(before, 4) == number(after, 4):
        return ""
    change = _change(before, after).replace(" (", ", ").removesuffix(")")
    return f", {what} most in {layer_named(name)} ({change})"


def _change(before: float, after: float, error: float = 0.0) -> str:
    """Two ratios, and from the first to the second in percent if they differ.

    Args:
        before: The first.
        after: The second.
        error: Standard error of the change; 0 if both are exact.

    Example:
        >>> _change(1.0, 1.25), _change(1.0, 1.000001)
        ('1.0000 -> 1.2500 (+25.00 %)', '1.0000, as before')
        >>> _change(1.0, 1.25, 0.02)
        '1.0000 -> 1.2500 (+25.00 +- 2 %)'
        >>> _change(1.0, 1.01, 0.02)
        '1.0000 ~ 1.0100 (within three standard errors of 0.02)'
    """
    first, second = number(before, 4), number(after, 4)
    if first == second:
        return f"{first}, as before"
    if error > 0.0 and change_of(before, after, error) == "same":
        return f"{first} ~ {second} (within three standard errors of {error_text(error)})"
    text = f"{first} -> {second}"
    if before > 0.0:
        percent = f"{100.0 * (after - before) / before:+.2f}"
        if error > 0.0:
            percent += f" +- {100.0 * error / before:.2g}"
        text += f" ({percent} %)"
    return text


def error_text(error: float) -> str:
    """A standard error with two digits that tell.

    Example:
        >>> error_text(0.00414), error_text(12.34)
        ('0.0041', '12')
    """
    if error >= 10.0:
        return number(error, 0)
    return f"{error:.2g}"


def _moves(drift: Drift) -> str:
    """How far the layers have moved."""
    if drift.followed == 0:
        return "how far neurons moved is not known"
    count = len(drift.moved_layers)
    layers = counted(drift.followed, "layer")
    most = f"by {degrees(drift.moved_most)} degrees"
    if drift.followed == 1:
        return f"the median neuron moved {most}"
    if count == 0:
        return f"the median neuron moved in none of {layers}"
    if count == 1:
        where = layer_named(drift.moved_layer)
        return f"the median neuron moved in 1 of {layers}: {most} in {where}"
    where = f"all {layers}"
    names = ""
    if count < drift.followed:
        where = f"{count:,} of {layers}"
        folded = fold_names(drift.moved_layers).removesuffix(f" ({count:,})")
        names = f"; these {count:,} are {folded}"
    return (
        f"the median neuron moved in {where}: by {degrees(drift.moved)} degrees in the middle one "
        f"of these, most in {layer_named(drift.moved_layer)}, {most}{names}"
    )


def degrees(angle: float) -> str:
    """An angle with one digit after the point, more of a small one.

    Example:
        >>> degrees(1.234), degrees(0.01234), degrees(0.0)
        ('1.2', '0.012', '0.0')
    """
    if 0.0 < angle < 0.1:
        return f"{angle:.2g}"
    return number(angle, 1)
