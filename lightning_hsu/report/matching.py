"""Which neuron before is which after: by index, by assignment, or by mutual nearest neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_hsu._core import unit_rows, with_float64
from lightning_hsu._core.assignment import (
    best_assignment,
    can_assign,
    mutual_nearest,
    nearest_of_random,
)
from lightning_hsu._monitor.text import counted
from lightning_hsu._neurons.candidates import NeuronSet
from lightning_hsu.report.comparison_data import Matching

Match = Literal["auto", "index", "assignment"]
"""How the neurons of two networks are matched."""

MOST_ASSIGNED = 8192
"""Neurons of a group above which the assignment takes too long (8,192 take half a minute)."""
MOST_PRODUCTS = 1e13
"""Multiplications above which even the nearest neurons take too long (minutes on two cores)."""

_INSTALL = "pip install lightning-hsu[hull]"


class Followed(NamedTuple):
    """What the neurons of a layer have become.

    Args:
        moved: Median angle between a neuron before and after, in degrees; NaN if not known.
        farthest: The largest of these angles; NaN if not known.
        matched: The index after of each neuron before; None if they are matched by index.
        matching: How well they match; None if they are matched by index.
        note: What one should know of it; "" for nothing.
    """

    moved: float
    farthest: float
    matched: tuple[int, ...] | None = None
    matching: Matching | None = None
    note: str = ""


@dataclass(frozen=True)
class Matcher:
    """Follows the neurons of layers from one network to another.

    Args:
        match: How they are matched.
        similar_above: Cosine at or above which two neurons count as the same.

    Raises:
        ValueError: for an unknown way of matching.
        ModuleNotFoundError: if assignment is asked for without scipy.
    """

    match: Match
    similar_above: float

    def __post_init__(self) -> None:
        if self.match not in get_args(Match):
            ways = ", ".join(map(repr, get_args(Match)))
            raise ValueError(f"match must be one of {ways}; got {self.match!r}")
        if self.match == "assignment" and not can_assign():
            raise ModuleNotFoundError(f"matching neurons by assignment needs scipy: {_INSTALL}")

    def follow(
        self, before: NeuronSet, after: NeuronSet, *, half_space: bool, is_dictionary: bool
    ) -> Followed:
        """Follow the neurons of one layer.

        Args:
            before: The neurons of the earlier network.
            after: Those of the later one.
            half_space: Whether opposite neurons are the same, if they are not matched by index.
            is_dictionary: Whether both are dictionaries, whose order means nothing.
        """
        x, y = before.neurons(), after.neurons()
        is_asked = self.match == "assignment"
        is_wanted = self.match == "auto" and is_dictionary
        if not is_asked and not is_wanted:
            return Followed(*moved_by_index(x, y))
        why_not = _why_by_index(x, y)
        if why_not:
            how = "matched by index" if x.shape == y.shape else "not matched"
            return Followed(*moved_by_index(x, y), note=f"{how}: {why_not}")
        return _matched(x, y, half_space, self.similar_above, is_wanted)


def _why_by_index(x: Tensor, y: Tensor) -> str:
    """Why two sets (groups, n, d) can only be matched by index; "" if they need not."""
    groups, n, d = x.shape
    other_groups, m, other_d = y.shape
    if d != other_d:
        return f"neurons of dimension {d:,} and {other_d:,} have no angle between them"
    if groups != other_groups:
        return f"{counted(groups, 'group')} of neurons before, {other_groups:,} after"
    if groups * n * m * d > MOST_PRODUCTS:
        return f"{n:,} and {m:,} neurons are too many to search for the nearest"
    if max(n, m) <= MOST_ASSIGNED and not can_assign():
        return f"to match a dictionary, whose order means nothing, needs scipy: {_INSTALL}"
    return ""


@torch.no_grad()
def moved_by_index(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Median and largest angle in degrees between neurons of one index, both sets (groups, n, d)."""
    if before.shape != after.shape:
        return math.nan, math.nan
    x, is_live = _unit(before)
    y, is_live_after = _unit(after)
    live = is_live & is_live_after  # (groups, n)
    if not bool(live.any()):
        return math.nan, math.nan
    is_same = (_in_float64(before) == _in_float64(after)).all(-1)[live]  # unit ones may differ
    angles = _angles(x[live], y[live]).masked_fill(is_same, 0.0)
    return float(angles.median()), float(angles.max())


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit neurons (groups, n, d) in float64, and which of them (groups, n) are live."""
    unit, inverse = unit_rows(_in_float64(x))
    return unit, (inverse > 0).squeeze(-1)


def _in_float64(x: Tensor) -> Tensor:
    """Neurons in float64 on the CPU."""
    return with_float64(x.cpu()).double()


def _angles(x: Tensor, y: Tensor) -> Tensor:
    """Angles in degrees between the unit rows of two sets (n, d), exact for small ones, too."""
    difference = torch.linalg.vector_norm(x - y, dim=-1)
    total = torch.linalg.vector_norm(x + y, dim=-1)
    return (2.0 * torch.atan2(difference, total)).rad2deg()


@torch.no_grad()
def _matched(
    before: Tensor, after: Tensor, half_space: bool, similar_above: float, says_how: bool
) -> Followed:
    """Match two sets of neurons (groups, n, d) and (groups, m, d) within each group.

    Args:
        before: The first.
        after: The second.
        half_space: Whether opposite neurons are the same.
        similar_above: Cosine at or above which two neurons count as the same.
        says_how: Whether to say how to match them by index instead.
    """
    x, is_live = _unit(before)
    y, is_live_after = _unit(after)
    n, m = x.shape[1], y.shape[1]
    how: Literal["assignment", "mutual"] = "assignment"
    if max(n, m) > MOST_ASSIGNED:
        how = "mutual"
    matched = torch.full((len(x), n), -1, dtype=torch.long)
    all_angles = []
    expected = []  # by group: the number of matches, and what random ones would have
    for group in range(len(x)):
        own = is_live[group].nonzero().squeeze(1)
        others = is_live_after[group].nonzero().squeeze(1)
        if len(own) == 0 or len(others) == 0:
            continue
        pairs = _pairs(x[group, own], y[group, others], how, half_space)
        rows, columns = own[pairs[0]], others[pairs[1]]
        matched[group, rows] = columns + group * m
        angles = _angles(x[group, rows], y[group, columns])
        if half_space:
            angles = torch.minimum(angles, 180.0 - angles)
        all_angles.append(angles)
        expected.append(
            (len(rows), *_by_chance(len(own), len(others), x.shape[2], how, half_space))
        )
    if not all_angles:
        return Followed(
            math.nan, math.nan, note="no neuron is matched: all are dead in one of the two"
        )
    angles = torch.cat(all_angles)
    cosines = angles.deg2rad().cos()
    count = len(angles)
    matching = Matching(
        how=how,
        before=int(is_live.sum()),
        after=int(is_live_after.sum()),
        matched=count,
        agreeing=int((cosines >= similar_above).sum()),
        mean=float(cosines.mean()),
        median=float(cosines.median()),
        random_cosine=sum(pairs * cosine for pairs, cosine, _ in expected) / count,
        random_angle=sum(pairs * angle for pairs, _, angle in expected) / count,
    )
    note = _sentence(matching, similar_above)
    if says_how:
        note += "; match='index' matches by index"
    indices = tuple(matched.flatten().tolist())
    return Followed(float(angles.median()), float(angles.max()), indices, matching, note)


def _pairs(x: Tensor, y: Tensor, how: str, half_space: bool) -> tuple[Tensor, Tensor]:
    """Indices of matching unit vectors of x (n, d) and y (m, d)."""
    if how == "assignment":
        return best_assignment(x, y, half_space=half_space)
    return mutual_nearest(x.float(), y.float(), half_space=half_space)


def _by_chance(n: int, m: int, d: int, how: str, half_space: bool) -> tuple[float, float]:
    """Mean cosine and angle of matches among random directions: a bound for an assignment.

    An assigned neuron of the smaller set is no nearer than the nearest of the larger one. Two
    neurons are each other's nearest if no other of the n + m - 2 is nearer to either, so that they
    are as near as the nearest of n + m - 1.
    """
    if d < 2:
        return math.nan, math.nan
    count = max(n, m)
    if how == "mutual":
        count = n + m - 1
    return nearest_of_random(count, d, half_space=half_space)


def _percent(part: float) -> str:
    """A part of 1 in whole percent: 0 and 100 only for none and all.

    Example:
        >>> _percent(0.999), _percent(1.0), _percent(0.001)
        ('99', '100', '1')
    """
    percent = round(100 * part)
    if 0.0 < part < 1.0:
        percent = min(max(percent, 1), 99)
    return str(percent)


def _sentence(found: Matching, similar_above: float) -> str:
    """How well the neurons of a layer match, in words."""
    fewer = min(found.before, found.after)
    how = "matched by assignment"
    bound, least = " at most", " or more"
    if found.how == "mutual":
        how = (
            f"more than {MOST_ASSIGNED:,} neurons are too many for an exact assignment, so those are "
            "matched that are each other's nearest"
        )
        bound, least = "", ""
    text = (
        f"agreement {_percent(found.agreement)} %: {found.agreeing:,} of {fewer:,} neurons have a "
        f"counterpart (cosine from {similar_above:g}); {how}: cosine {found.mean:.3f} on average, "
        f"median {found.median:.3f}"
    )
    if not math.isnan(found.random_cosine):
        text += (
            f", random directions {found.random_cosine:.3f}{bound} "
            f"({found.random_angle:.1f} degrees{least})"
        )
        if found.mean <= found.random_cosine:
            text += ": no better than chance"
    without = []
    for count, when in ((found.before, "before"), (found.after, "after")):
        if count > found.matched:
            without.append(f"{count - found.matched:,} of {count:,} {when}")
    if without:
        text += f"; without a match: {' and '.join(without)}"
    return text
