"""How far a network has drifted from another one, over all layers, in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from lightning_hsu._monitor.fold import fold_names
from lightning_hsu._monitor.text import counted, number
from lightning_hsu.report.data import Drift, LayerComparison


def drift_of(layers: Sequence[LayerComparison]) -> Drift:
    """How far the layers of a comparison have drifted.

    Args:
        layers: Each before and after.
    """
    known = []
    left_out = []
    for one in layers:
        if math.isfinite(one.before.ratio) and math.isfinite(one.after.ratio):
            known.append(one)
        else:
            left_out.append(one.after.name)
    before = after = math.nan
    if known:
        before = fmean([one.before.ratio for one in known])
        after = fmean([one.after.ratio for one in known])
    rose = max(known, key=_rise, default=None)
    if rose is not None and _rise(rose) <= 0.0:
        rose = None
    followed = []
    not_followed = []
    for one in layers:
        if math.isnan(one.moved):
            not_followed.append(one.after.name)
        else:
            followed.append(one)
    moved = [one for one in followed if one.moved > 0.0]
    farthest = max(moved, key=_moved, default=None)
    middle = most = math.nan
    if followed:
        middle = most = 0.0
    if moved:
        middle = median([one.moved for one in moved])
        most = max(one.moved for one in moved)
    return Drift(
        layers=len(known),
        left_out=tuple(left_out),
        ratio_before=before,
        ratio_after=after,
        rose="" if rose is None else rose.after.name,
        rose_from=math.nan if rose is None else rose.before.ratio,
        rose_to=math.nan if rose is None else rose.after.ratio,
        followed=len(followed),
        moved=middle,
        moved_most=most,
        moved_layer="" if farthest is None else farthest.after.name,
        moved_layers=tuple(one.after.name for one in moved),
        not_followed=tuple(not_followed),
    )


def _rise(one: LayerComparison) -> float:
    return one.after.ratio - one.before.ratio


def _moved(one: LayerComparison) -> float:
    return one.moved


def drift_line(drift: Drift) -> str:
    """The drift as one line.

    Example:
        >>> drift_line(drift_of([]))
        'drift: no layer has a ratio before and after; how far neurons moved is not known'
    """
    parts = [_ratios(drift), _moves(drift)]
    if drift.followed > 0 and drift.not_followed:
        parts.append(f"how far is not known of {fold_names(drift.not_followed)}")
    return f"drift: {'; '.join(parts)}"


def _ratios(drift: Drift) -> str:
    """How the ratios have changed."""
    text = "no layer has a ratio before and after"
    if drift.layers > 0:
        text = (
            f"energy ratio {_change(drift.ratio_before, drift.ratio_after)}, the plain mean of "
            f"{counted(drift.layers, 'layer')}"
        )
    if drift.rose and number(drift.rose_from, 4) != number(drift.rose_to, 4):
        text += f", rose most in {drift.rose} ({_change(drift.rose_from, drift.rose_to)})"
    if drift.layers > 0 and drift.left_out:
        text += f"; without a finite ratio, left out: {fold_names(drift.left_out)}"
    return text


def _change(before: float, after: float) -> str:
    """Two ratios, and from the first to the second in percent if they differ.

    Example:
        >>> _change(1.0, 1.25), _change(1.0, 1.000001)
        ('1.0000 -> 1.2500, +25.00 %', '1.0000 as before')
    """
    first, second = number(before, 4), number(after, 4)
    if first == second:
        return f"{first} as before"
    text = f"{first} -> {second}"
    if before > 0.0:
        text += f", {100.0 * (after - before) / before:+.2f} %"
    return text


def _moves(drift: Drift) -> str:
    """How far the layers have moved."""
    if drift.followed == 0:
        return "how far neurons moved is not known"
    count = len(drift.moved_layers)
    layers = counted(drift.followed, "layer")
    if count == 0:
        return f"none of {layers} moved"
    names = fold_names(drift.moved_layers).removesuffix(f" ({count:,})")
    who = f"{count:,} of {layers} moved"
    where = f": {names}"
    if count == 1:
        return f"{who} by {degrees(drift.moved)} degrees{where}"
    if count == drift.followed:
        who = f"all {layers} moved"
        where = ""
    return (
        f"{who} by {degrees(drift.moved)} degrees (median), most in {drift.moved_layer} "
        f"({degrees(drift.moved_most)}){where}"
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
