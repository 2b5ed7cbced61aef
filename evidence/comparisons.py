"""Every method against weight decay, setting by setting."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from evidence.statistics import Correlation, Paired, holm, paired, rank_correlation

Result = Mapping[str, Any]
"""What JSON holds of a cell."""

TITLES = {
    "fashion-mnist": "Fashion-MNIST",
    "mnist1d": "MNIST1D",
    "digits": "digits",
    "cifar10": "CIFAR-10",
}
LEVEL = 0.05
"""Of p, for a gain or a loss."""

UNTRAINED = 85.0
"""From this test error on, in percent, a network has hardly trained."""

FAILS = (
    "weights that are not finite, an error above twice weight decay's largest, or one from "
    f"{UNTRAINED:g} % where weight decay's are all lower"
)
"""What a test seed has that fails, in the words of the tables."""


@dataclass(frozen=True)
class Comparison:
    """One method against weight decay in one setting."""

    result: Result
    baseline: Result
    paired: Paired
    corrected: float  # p, for the number of all comparisons

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.result["asked"]["method"]["name"])

    @property
    def setting(self) -> str:
        """The setting, in words."""
        return setting_title(self.result)

    @property
    def verdict(self) -> str:
        """Gain or worse, where the corrected p says so; else null."""
        if self.corrected >= LEVEL:
            return "null"
        return "gain" if self.paired.mean < 0 else "worse"

    @property
    def failed(self) -> bool:
        """Whether a seed fails, or it is worse than weight decay by two standard errors."""
        return failing(self.result, self.baseline) > 0 or self.paired.worse


def setting_title(result: Result) -> str:
    """The setting of a cell in words."""
    one = result["asked"]["setting"]
    network = f"{one['depth']} x 64"
    if one["network"] == "convolutions":
        network = "2 conv"
    elif one["network"] == "batch norm":
        network = "2 conv + BN"
    parts = [TITLES.get(one["data"], one["data"]), network]
    parts += [f"n = {one['images']}", f"{one['epochs']} epochs", f"scale {one['scale']:g}"]
    if one["optimizer"] == "adamw":
        parts.append("AdamW")
    if one["noise"] == 0.2:
        parts.append("20 % noise")
    if one["imbalance"] != 1:
        parts.append(f"tail {one['imbalance']:g}:1")
    if one.get("start") == "trained":
        parts.append("fine-tuned")
    elif one.get("start") == "adapters":
        parts.append("adapters from 0")
    if not one.get("penalises_head", True):
        parts.append("head left out")
    return ", ".join(parts)


def failing(result: Result, decay: Result) -> int:
    """Test seeds whose weights are not finite, or whose error is above twice weight decay's largest.

    Where weight decay trains on all seeds, one that hardly trains fails, too. Results say of how many
    seeds weights are not finite, not of which: where others fail as well, there may be more.
    """
    largest = max(decay["test_error"])
    count = 0
    for error in result["test_error"]:
        stuck = largest < UNTRAINED <= error
        count += stuck or error > 2.0 * largest
    return max(result["nonfinite"], count)


def compare(results: Iterable[Result]) -> list[Comparison]:
    """Every method against weight decay where both are there; p corrected for all comparisons."""
    baselines, rest = {}, []
    for result in results:
        if result["asked"]["method"]["name"] == "decay":
            baselines[key_of(result)] = result
        else:
            rest.append(result)
    rest = [one for one in rest if key_of(one) in baselines]
    changes = [paired(one["test_error"], baselines[key_of(one)]["test_error"]) for one in rest]
    corrected = holm([change.p for change in changes])
    found = []
    for result, change, p in zip(rest, changes, corrected, strict=True):
        found.append(Comparison(result, baselines[key_of(result)], change, p))
    return found


def hypothesis(
    comparisons: Sequence[Comparison],
    method: str,
    *,
    ratio: str = "ratio_after",
    relative: bool = False,
) -> Correlation:
    """Rank correlation, over settings, of the ratio without a penalty and the penalty's gain."""
    x, y = ratio_and_gain(comparisons, method, ratio, relative)
    return rank_correlation(x, y)


def ratio_and_gain(
    comparisons: Sequence[Comparison], method: str, ratio: str, relative: bool
) -> tuple[list[float], list[float]]:
    """Each setting's ratio without a penalty, and what the method gains there.

    Args:
        comparisons: All of them.
        method: Its name.
        ratio: ``ratio_before`` training or ``ratio_after``.
        relative: Whether the gain is a part of weight decay's error, or in points; settings in which
            that makes none are left out of the former.
    """
    ratios, gains = [], []
    for one in comparisons:
        scale = mean(one.baseline["test_error"]) if relative else 1.0
        if one.method == method and scale > 0.0:
            ratios.append(mean_ratio(one.baseline, ratio))
            gains.append(-one.paired.mean / scale)
    return ratios, gains


def mean_ratio(result: Result, ratio: str = "ratio_after") -> float:
    """Over the test seeds whose weights are finite; NaN without one."""
    known = [value for value in result[ratio] if value is not None]
    return mean(known) if known else math.nan


def key_of(result: Result) -> str:
    """What tells a cell's setting from all others."""
    return json.dumps(result["asked"]["setting"], sort_keys=True)
