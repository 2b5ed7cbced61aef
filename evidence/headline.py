"""What the main README says of the evidence: five lines, written from the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from evidence.comparisons import Result, compare
from evidence.plan import SETTINGS
from evidence.statistics import signed_rank
from evidence.tables import CONDITIONS, UNTRAINED, of_method
from evidence.uniformity import PENALTIES, Beyond, beyond_controls, early_and_gain

NAMES = {"half_mhe_2": "half-space MHE", "mgd": "MGD", "orthogonality": "orthogonality"}


def five_lines(results: Sequence[Result]) -> str:
    """Gains, what is left of them beyond the controls, where, where not, and what logs tell."""
    found = beyond_controls(results)
    settings = len({one.setting for one in found})
    done = "all 48 settings" if settings == len(SETTINGS) else f"{settings} of 48 settings so far"
    lines = [
        f"**Against weight decay** ({done}, all methods tuned alike): {_over_decay(results)}.",
        "**Beyond controls**: without any uniformity, noise of the same length gains over weight "
        f"decay in {_gains(results, 'random')} settings, and growth of the norms alone in "
        f"{_gains(results, 'length')}. Beyond weight decay and both of them gain {_beyond(found)}.",
        f"**Initial weights**: {_by_scale(found)}.",
        f"**Where half-space MHE gains beyond all of them**: {_where(found)}.",
        _early(results),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _over_decay(results: Sequence[Result]) -> str:
    """Gains and losses against weight decay."""
    comparisons = compare(results)
    parts = []
    for name in PENALTIES:
        own = of_method(comparisons, name)
        verdicts = Counter(one.verdict for one in own)
        parts.append(
            f"{NAMES[name]} gains in {verdicts['gain']} and is worse in {verdicts['worse']}"
        )
    return ", ".join(parts)


def _gains(results: Sequence[Result], name: str) -> int:
    return sum(one.verdict == "gain" for one in of_method(compare(results), name))


def _beyond(found: Sequence[Beyond]) -> str:
    """In how many settings each penalty gains beyond all controls, and the median difference."""
    parts = []
    for name in PENALTIES:
        own = [one for one in found if one.method == name]
        verdicts = Counter(one.verdict for one in own)
        parts.append(f"{NAMES[name]} in {verdicts['gain']} (worse than all in {verdicts['cost']})")
    own = [one for one in found if one.method == "half_mhe_2"]
    told = []
    for control, title in (("random", "noise"), ("length", "growth")):
        differences = [one.changes[control].mean for one in own]
        told.append(f"{median(differences):+.2f} from {title} (p {signed_rank(differences):.1g})")
    return f"{', '.join(parts)}; MHE's median difference is {' and '.join(told)} points"


def _by_scale(found: Sequence[Beyond]) -> str:
    """Half-space MHE at small initial scales and at PyTorch's own."""
    parts = []
    for title, holds in (
        ("at 0.03 and 0.1 of PyTorch's scale", lambda one: one["scale"] <= 0.1),
        ("at PyTorch's own", lambda one: one["scale"] == 1.0),
    ):
        own = _of(found, holds)
        if own:
            gains = sum(one.verdict == "gain" for one in own)
            over = median(one.changes["decay"].mean for one in own)
            rest = median(_rest(one) for one in own)
            parts.append(
                f"{title} the median difference of half-space MHE from weight decay is {over:+.2f} "
                f"points, from the better control {rest:+.2f} (a gain over all in {gains} of "
                f"{len(own)})"
            )
    return "; ".join(parts)


def _where(found: Sequence[Beyond]) -> str:
    """The conditions, with how many settings gain beyond all controls."""
    parts = []
    for title in (
        "AdamW",
        "20 % wrong labels",
        "long-tailed classes",
        "5000 images",
        "long training",
        "convolutions with batch norm",
    ):
        own = _of(found, CONDITIONS[title])
        if own:
            gains = sum(one.verdict == "gain" for one in own)
            parts.append(f"{title} {gains} of {len(own)}")
    return ", ".join(parts)


def _of(found: Sequence[Beyond], holds: Callable[[Mapping[str, Any]], bool]) -> list[Beyond]:
    """Half-space MHE in the settings of a kind in which weight decay alone trains."""
    chosen = []
    for one in found:
        error = mean(one.result["test_error"]) - one.changes["decay"].mean
        trains = one.method == "half_mhe_2" and error < UNTRAINED
        if trains and holds(one.result["asked"]["setting"]):
            chosen.append(one)
    return chosen


def _rest(one: Beyond) -> float:
    """What is left beyond the better of the two controls."""
    return max(one.changes["random"].mean, one.changes["length"].mean)


def _early(results: Sequence[Result]) -> str:
    """The pre-registered test of what logs show early."""
    found = early_and_gain(results)
    told = f"rank correlation {found.rho:+.2f}, 95 % interval {found.low:+.2f} to {found.high:+.2f}"
    if found.low > 0:
        return f"**What you see early tells**: (ratio − 1) × gradient share has a {told}."
    return (
        "**What you see early does not tell whether it will help**: (ratio − 1) × gradient share has "
        f"a {told} with the gain. Compare with `coefficient=0`, over a few seeds."
    )
