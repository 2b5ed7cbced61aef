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

TITLES = {"fashion-mnist": "Fashion-MNIST", "mnist1d": "MNIST1D", "digits": "digits"}
LEVEL = 0.05
"""Of p, for a gain or a loss."""


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
        return "null" if self.corrected >= LEVEL else "gain" if self.paired.mean < 0 else "worse"

    @property
    def failed(self) -> bool:
        """Weights that are not finite, or worse than weight decay by two standard errors."""
        return bool(self.result["nonfinite"]) or self.paired.worse


def setting_title(result: Result) -> str:
    """The setting of a cell in words."""
    one = result["asked"]["setting"]
    network = (
        f"{one['depth']} x 64"
        if one["network"] == "plain"
        else f"2 conv{' + BN' * (one['network'] == 'batch norm')}"
    )
    parts = [
        TITLES.get(one["data"], one["data"]),
        network,
        f"n = {one['images']}",
        f"{one['epochs']} epochs",
    ]
    parts += [f"scale {one['scale']:g}"]
    parts += ["AdamW"] * (one["optimizer"] == "adamw") + ["20 % noise"] * (one["noise"] == 0.2)
    parts += [f"tail {one['imbalance']:g}:1"] * (one["imbalance"] != 1)
    return ", ".join(parts)


def compare(results: Iterable[Result]) -> list[Comparison]:
    """Every method against weight decay in its setting, where both are there; p corrected for all of them."""
    results = list(results)
    baselines = {_key(one): one for one in results if one["asked"]["method"]["name"] == "decay"}
    rest = [
        one
        for one in results
        if one["asked"]["method"]["name"] != "decay" and _key(one) in baselines
    ]
    found = [paired(one["test_error"], baselines[_key(one)]["test_error"]) for one in rest]
    corrected = holm([one.p for one in found])
    return [
        Comparison(one, baselines[_key(one)], *both)
        for one, *both in zip(rest, found, corrected, strict=True)
    ]


def hypothesis(
    comparisons: Sequence[Comparison],
    method: str,
    *,
    ratio: str = "ratio_after",
    relative: bool = False,
) -> Correlation:
    """Does the ratio of the tuned network without a penalty go with what the penalty gains? Over settings."""
    x, y = ratio_and_gain(comparisons, method, ratio, relative)
    return rank_correlation(x, y)


def ratio_and_gain(
    comparisons: Sequence[Comparison], method: str, ratio: str, relative: bool
) -> tuple[list[float], list[float]]:
    """Each setting's ratio without a penalty, and what the method gains there: points, or a part of the error."""
    own = [one for one in comparisons if one.method == method]
    x = [mean_ratio(one.baseline, ratio) for one in own]
    scale = [mean(one.baseline["test_error"]) if relative else 1.0 for one in own]
    return x, [-one.paired.mean / size for one, size in zip(own, scale, strict=True)]


def mean_ratio(result: Result, ratio: str = "ratio_after") -> float:
    """Over the test seeds whose weights are finite; NaN without one."""
    known = [value for value in result[ratio] if value is not None]
    return mean(known) if known else math.nan


def _key(result: Result) -> str:
    return json.dumps(result["asked"]["setting"], sort_keys=True)
