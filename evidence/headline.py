"""What the main README says of the evidence: five lines, written from the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from evidence.comparisons import Comparison, Result
from evidence.control_tables import failing_seeds, with_controls
from evidence.methods import METHODS, PENALTIES
from evidence.plan import SETTINGS
from evidence.statistics import Correlation
from evidence.tables import CONDITIONS, of_method
from evidence.uniformity import Beyond, beyond_controls, clear_gains, early_and_gain

NAMES = {"half_mhe_2": "half-space MHE", "mgd": "MGD", "orthogonality": "orthogonality"}
RIVAL = "orthogonality"
"""What MHE and MGD are to be better than, beside the controls."""

KINDS = (
    "AdamW",
    "20 % wrong labels",
    "long-tailed classes",
    "5000 images",
    "long training",
    "convolutions with batch norm",
)


def five_lines(results: Sequence[Result]) -> str:
    """Clear gains, gains over weight decay, what is left beyond controls, where, and what logs tell."""
    found = beyond_controls(results)
    comparisons = with_controls(results)
    lines = [
        _clear(clear_gains(found)),
        _over_decay(comparisons, len({one.setting for one in found})),
        _beyond(found, comparisons),
        _where(found),
        _early(results),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _clear(found: Sequence[Beyond]) -> str:
    """How many there are of MHE and MGD, which from PyTorch's scale, and how many of their rival."""
    own = [one for one in found if one.method != RIVAL]
    rivals = [one for one in found if one.method == RIVAL]
    rule = "lower by three standard errors than weight decay, both controls and orthogonality"
    rival = (
        f"{METHODS[RIVAL].title.capitalize()} is so beyond the other three in {_settings(rivals)} "
        f"({_corrected(rivals)} after correction)."
    )
    if not own:
        return f"**In no setting** is MHE or MGD {rule}. {rival}"
    usual = [one for one in own if one.result["asked"]["setting"]["scale"] == 1.0]
    listed = []
    for one in usual:
        change = one.changes["decay"]
        title = METHODS[one.method].title
        listed.append(f"{title} in {one.setting}, {change.mean:+.2f} points ({change.error:.2f})")
    told = f": {'; '.join(listed)}" if listed else ""
    return (
        f"**Clear gains of MHE or MGD in {_settings(own)} settings** ({_corrected(own)} after Holm's "
        f"correction): {rule}. {_settings(usual)} of them ({_corrected(usual)} after correction) are from "
        f"PyTorch's own initial scale{told}. {rival}"
    )


def _settings(found: Sequence[Beyond]) -> int:
    return len({one.setting for one in found})


def _corrected(found: Sequence[Beyond]) -> int:
    """The settings in which it is a gain over all controls after correction, too."""
    return _settings([one for one in found if one.verdict == "gain"])


def _over_decay(comparisons: Sequence[Comparison], settings: int) -> str:
    """Gains and losses against weight decay, and failing seeds."""
    done = f"all {settings} settings"
    if settings < len(SETTINGS):
        done = f"{settings} of {len(SETTINGS)} so far"
    parts = []
    for name in PENALTIES:
        verdicts = Counter(one.verdict for one in of_method(comparisons, name))
        parts.append(
            f"{NAMES[name]} gains in {verdicts['gain']}, is worse in {verdicts['worse']}, and fails on "
            f"{failing_seeds(comparisons, name)} seeds"
        )
    return f"**Against weight decay** ({done}, tuned by one rule): {'; '.join(parts)}."


def _beyond(found: Sequence[Beyond], comparisons: Sequence[Comparison]) -> str:
    """What controls gain, and which penalties are lower than those that have no aim."""
    alone = []
    for name in ("random", "length", "direction", "decoupled"):
        alone.append(sum(one.verdict == "gain" for one in of_method(comparisons, name)))
    parts, matched = [], []
    for name in PENALTIES:
        own = [one for one in found if one.method == name]
        verdicts = Counter(one.verdict for one in own)
        parts.append(f"{NAMES[name]} in {verdicts['gain']} (higher than all in {verdicts['cost']})")
        matched.append(sum(one.matched_verdict == "gain" for one in own))
    return (
        "**Is it uniformity?** Noise of the same length gains over weight decay in "
        f"{alone[0]} settings, growth of the norms alone in {alone[1]}, MHE's turns without growth in "
        f"{alone[2]} (decoupled: {alone[3]}). Lower than weight decay, noise and growth are "
        f"{', '.join(parts)}; lower than weight decay, and than noise and growth of their own "
        f"gradients with nothing tuned for these, in {', '.join(map(str, matched))} (a test with a "
        "correction of its own)."
    )


def _where(found: Sequence[Beyond]) -> str:
    """Half-space MHE beyond all controls, by initial scale and by kind of setting."""
    parts = []
    for title, holds in (
        ("small initial weights (0.03 and 0.1)", lambda one: one["scale"] <= 0.1),
        ("PyTorch's own", lambda one: one["scale"] == 1.0),
        *[(title, CONDITIONS[title]) for title in KINDS],
    ):
        own = _of(found, holds)
        if own:
            gains = sum(one.verdict == "gain" for one in own)
            rest = median(one.rest for one in own)
            parts.append(f"{title} {gains} of {len(own)} ({rest:+.2f})")
    return (
        "**Where half-space MHE gains beyond all controls** (median difference in points from the best "
        f"of them; settings in which weight decay alone trains): {', '.join(parts)}."
    )


def _of(found: Sequence[Beyond], holds: Callable[[Mapping[str, Any]], bool]) -> list[Beyond]:
    """Half-space MHE in the settings of a kind in which weight decay alone trains."""
    chosen = []
    for one in found:
        is_there = one.method == "half_mhe_2" and one.trains
        if is_there and holds(one.result["asked"]["setting"]):
            chosen.append(one)
    return chosen


def _early(results: Sequence[Result]) -> str:
    """The pre-registered test of what logs show early."""
    found = early_and_gain(results)
    beyond = early_and_gain(results, rival="random")
    if found.low > 0:
        title = f"What you see early tells {_how_much(found.rho)}"
        meaning = ": where much is left to spread, and the penalty strong, it gains more"
    elif found.high < 0:
        title = f"What you see early tells {_how_much(found.rho)}, the other way round"
        meaning = ": where a tuned penalty has spread the neurons early, it gains more"
    else:
        title = "What you see early does not tell whether it will help"
        meaning = ""
    return (
        f"**{title}**: the rank correlation of (ratio − 1) × gradient share with the gain over weight "
        f"decay is {_told(found)}{meaning}; with the gain over noise {_told(beyond)}. Compare "
        "with `coefficient=0`, over a few seeds."
    )


def _how_much(rho: float) -> str:
    """How much a rank correlation tells: below 0.3 a tenth of the variance of ranks at most."""
    if abs(rho) < 0.3:
        return "a little"
    return "something" if abs(rho) < 0.7 else "much"


def _told(found: Correlation) -> str:
    return f"{found.rho:+.2f} (95 % interval {found.low:+.2f} to {found.high:+.2f})"
