"""For how many steps a layer's penalty gradient is used: what is known of how fast it ages.

A gradient of earlier weights is off by an error that grows about in proportion to the steps since,
and to how far the neurons have moved. Both rates are measured whenever a gradient is computed
again, old against fresh. All decisions come from weights and counts of steps: the same on all
ranks, and in each run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

from lightning_hsu._checks import check_number, plain_number

_FIRST_GAIN = 3.0  # measured in trainings of an MLP with SGD and AdamW: 1.7 to 4.0
_LEAST_GAIN, _MOST_GAIN = 1.0, 30.0
_AT_THE_END = 2.0  # errors grow from 0: at the last use they are twice the mean
_GROWTH = 2  # how many times longer than the last one a gradient may be used
_LONGEST = 4096  # steps
_SPREAD = 0.25  # the part of an interval by which layers of one rate may part


@dataclass
class Reuse:
    """For how long the gradient of one layer may be used.

    Attributes:
        interval: Steps for which a gradient is used, the one that computes it included.
        gain: Relative error of a gradient over the relative change of its neurons' entries.
        error: Relative error that the last gradient had when it was replaced; NaN if not measured.
    """

    interval: int = 1
    gain: float = _FIRST_GAIN
    error: float = math.nan

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        state = {"interval": self.interval, "gain": self.gain}
        if math.isfinite(self.error):
            state["error"] = self.error
        return state

    def shorten(self, factor: float) -> None:
        """Use gradients for a shorter time, if a factor below 1 of the error is wanted."""
        self.interval = max(1, int(min(factor, 1.0) * self.interval))

    def is_off(self, moved: float, tolerance: float) -> bool:
        """Whether a gradient is as far off as it may be, if its neurons have moved so far.

        Args:
            moved: Relative change of its neurons' entries since it was computed.
            tolerance: The error wanted, on average over the steps that use a gradient.
        """
        return not self.gain * moved <= _AT_THE_END * tolerance  # NaN is too far

    def learn(
        self, name: str, age: int, moved: float, error: float | None, tolerance: float
    ) -> None:
        """Learn from a gradient that is replaced.

        Args:
            name: The layer's.
            age: Steps since it was computed, 1 or more.
            moved: Relative change of its neurons' entries since.
            error: Its relative error; None if it cannot be measured, as with random draws.
            tolerance: The error wanted, on average over the steps that use a gradient.
        """
        if error is None:
            error = self.gain * moved
        else:
            self.error = error
            if moved > 0 and math.isfinite(error / moved):
                self.gain = min(max(error / moved, _LEAST_GAIN), _MOST_GAIN)
        self.interval = _interval(name, age, error, _AT_THE_END * tolerance)


def check_tolerance(tolerance: float | None) -> None:
    """Refuse a tolerance that is neither None nor a relative error."""
    if tolerance is not None:
        check_number(
            "tolerance",
            tolerance,
            "a relative error above 0 and below 1 (0.05 for 5 %), or None to compute every gradient",
            lambda error: 0 < error < 1,
        )


def stored_reuse(stored: object) -> Reuse | None:
    """What :meth:`Reuse.state` returned; None if it is anything else."""
    if not isinstance(stored, Mapping):
        return None
    interval = stored.get("interval")
    if not isinstance(interval, int) or isinstance(interval, bool):
        return None
    if not 1 <= interval <= _LONGEST:
        return None
    numbers = [stored.get("gain"), stored.get("error", 0.0)]
    if not all(map(plain_number, numbers)):
        return None
    gain, error = map(float, numbers)
    if not _LEAST_GAIN <= gain <= _MOST_GAIN or error < 0:
        return None
    return Reuse(interval, gain, error if "error" in stored else math.nan)


def _interval(name: str, age: int, error: float, largest: float) -> int:
    """Steps for which the next gradient may be used, if the last one had this error at this age.

    At its last use its error is to be ``largest``.

    Layers of one rate get different numbers, so that they fall due on different steps.
    """
    if not math.isfinite(error):
        return 1
    longest = min(_GROWTH * age, _LONGEST)
    steps = longest
    if error * longest > largest * age:
        steps = min(longest, 1 + int(largest * age / error))
    earlier = _SPREAD * crc32(name.encode()) / 2**32  # the same in every process
    return max(1, round(steps * (1.0 - earlier)))
