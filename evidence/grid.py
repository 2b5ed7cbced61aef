"""What is tuned, on which values, and how far these are widened when the best lies on an edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

AXES = ("rate", "decay", "strength")
BEYOND = 4
"""How many values an axis may get beyond each of its ends."""


@dataclass(frozen=True)
class Trial:
    """What is tuned."""

    rate: float
    decay: float
    strength: float = 0.0
    coefficient: float = 0.0  # what the strength comes to


@dataclass(frozen=True)
class Grid:
    """Four values an axis, and more of them where the best trial takes the first or the last.

    Args:
        rates: Four learning rates, rising geometrically.
        decays: Four weight decays.
        strengths: Four strengths; none where there is nothing more to tune.
        unit: The coefficient of strength 1.
    """

    rates: tuple[float, ...]
    decays: tuple[float, ...]
    strengths: tuple[float, ...] = ()
    unit: float = 0.0

    def first(self) -> list[Trial]:
        """Sixteen: every learning rate with every decay, and strengths on them as a Latin square.

        Each strength meets every learning rate once and every decay once.
        """
        found = []
        for i, rate in enumerate(self.rates):
            for j, decay in enumerate(self.decays):
                trial = Trial(rate, decay)
                if self.strengths:
                    trial = self._with(trial, "strength", self.strengths[(i + j) % 4])
                found.append(trial)
        return found

    def wider(self, tried: Sequence[Trial], best: Trial) -> list[Trial]:
        """More trials where the best one lies on the edge of an axis or beyond; none if it lies inside.

        An edge is that of the first four values. The next value outwards, at the distance of these,
        is tried beside the best one's other values; and where it is new, with the four values around
        the best one's on the other axes, paired as in a Latin square in which the best one's meet.
        On several edges one more trial has all their next values. An axis ends :data:`BEYOND`
        values after its fourth and before its first.
        """
        found: list[Trial] = []
        corner = best
        edges = 0
        for axis in self._axes():
            value = self._outwards(axis, getattr(best, axis))
            if value is None:
                continue
            corner = self._with(corner, axis, value)
            edges += 1
            if value in values_of(tried, axis):
                found.append(self._with(best, axis, value))
            else:
                found += self._at(axis, value, tried, best)
        if edges > 1:
            found.append(corner)
        return [trial for trial in dict.fromkeys(found) if trial not in tried]

    def _axes(self) -> tuple[str, ...]:
        return AXES if self.strengths else AXES[:2]

    def _outwards(self, axis: str, value: float) -> float | None:
        """The next value further out; None inside the first four and at the axis' end."""
        begun: tuple[float, ...] = getattr(self, f"{axis}s")
        factor = (begun[-1] / begun[0]) ** (1 / 3)
        above = [float(f"{begun[-1] * factor**count:.3g}") for count in range(1, BEYOND + 1)]
        below = [float(f"{begun[0] / factor**count:.3g}") for count in range(1, BEYOND + 1)]
        for side in ([begun[-1], *above], [begun[0], *below]):
            if value in side[:-1]:
                return side[side.index(value) + 1]
        return None

    def _at(self, axis: str, value: float, tried: Sequence[Trial], best: Trial) -> list[Trial]:
        """Four trials with one value of an axis, around the best one in the others."""
        others = [other for other in self._axes() if other != axis]
        windows = [_around(values_of(tried, other), getattr(best, other)) for other in others]
        shifts = [
            window.index(getattr(best, other))
            for window, other in zip(windows, others, strict=True)
        ]
        found = []
        for m in range(4):
            trial = self._with(best, axis, value)
            for window, shift, other in zip(windows, shifts, others, strict=True):
                trial = self._with(trial, other, window[(m + shift) % 4])
            found.append(trial)
        return found

    def _with(self, trial: Trial, axis: str, value: float) -> Trial:
        changed = replace(trial, **{axis: value})
        if self.strengths:
            changed = replace(changed, coefficient=changed.strength * self.unit)
        return changed


def values_of(tried: Sequence[Trial], axis: str) -> list[float]:
    """The values of an axis that were tried, rising."""
    return sorted({getattr(trial, axis) for trial in tried})


def edges(trials: Sequence[Trial], chosen: Trial) -> list[str]:
    """Of what the chosen trial takes the smallest or largest value that was tried."""
    found = []
    for axis in AXES:
        values = values_of(trials, axis)
        value = getattr(chosen, axis)
        if len(values) == 1:
            continue
        if value == values[0]:
            found.append(f"smallest {axis}")
        elif value == values[-1]:
            found.append(f"largest {axis}")
    return found


def _around(values: Sequence[float], value: float) -> list[float]:
    """Four neighbouring values, this one among them, in the middle where it can be."""
    start = min(max(values.index(value) - 1, 0), len(values) - 4)
    return list(values[start : start + 4])
