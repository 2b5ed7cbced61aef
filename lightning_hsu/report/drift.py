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
        middle = median([one.moved for one in followed])
        most = max(one.moved for one in followed)
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
    if drift.not_followed:
        parts.append(f"how far is not known of {fold_names(drift.not_followed)}")
    return f"drift: {'; '.join(parts)}"


def _ratios(drift: Drift) -> str:
    """How the ratios have changed."""
    if drift.layers == 0:
        return "no layer has a ratio before and after"
    text = (
        f"ratio {number(drift.ratio_before, 4)} -> {number(drift.ratio_after, 4)}"
        f"{_percent(drift)}, the plain mean of {counted(drift.layers, 'layer')}"
    )
    if drift.rose:
        change = f"{number(drift.rose_from, 4)} -> {number(drift.rose_to, 4)}"
        text += f", rose most in {drift.rose} ({change})"
    elif drift.ratio_before != drift.ratio_after:
        text += ", rose in none"
    if drift.left_out:
        text += f"; without a finite ratio, left out: {fold_names(drift.left_out)}"
    return text


def _percent(drift: Drift) -> str:
    """The change of the mean ratio in percent, in brackets; "" from 0."""
    if drift.ratio_before == 0.0:
        return ""
    change = 100.0 * (drift.ratio_after - drift.ratio_before) / abs(drift.ratio_before)
    return f" ({change + 0.0:+.2f} %)"


def _moves(drift: Drift) -> str:
    """How far the layers have moved."""
    if drift.followed == 0:
        return "how far neurons moved is not known"
    count = len(drift.moved_layers)
    layers = counted(drift.followed, "layer")
    if count == 0:
        return f"moved: none of {layers}"
    names = fold_names(drift.moved_layers).removesuffix(f" ({count:,})")
    which = f"{count:,} of {layers} moved: {names}"
    if count == drift.followed:
        which = "all of them moved"
    return (
        f"moved by {degrees(drift.moved)} degrees (median of {layers}), most in "
        f"{drift.moved_layer} ({degrees(drift.moved_most)}); {which}"
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
