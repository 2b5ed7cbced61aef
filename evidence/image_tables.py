"""Tables of ``python -m evidence.images``: methods beside their controls, and learning rates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from evidence.comparisons import LEVEL
from evidence.image_data import BATCH
from evidence.image_methods import CHOICES, OWN, parts_of
from evidence.image_training import RECIPES
from evidence.statistics import Paired, holm, interval, paired
from evidence.tables import error_cell, markdown
from evidence.uniformity import MATCHED, of_all

RIVALS = ("none", *MATCHED)
"""What a penalty has to be beyond, for its gain to be uniformity's."""
TITLES = {
    "cnn9": "CNN-9",
    "resnet18": "ResNet-18",
    "resnet18-plain": "ResNet-18 without batch norm",
    "vit": "ViT",
    "vit-bn": "ViT with batch norm",
}

Run = dict[str, Any]
"""What JSON holds of a run."""


def method_of(run: Run) -> str:
    """The method of a run; at first it was called its preset."""
    return str(run.get("method") or run["preset"])


def has_rivals(runs: Sequence[Run]) -> bool:
    """Whether none and both controls are among the methods of runs."""
    return set(RIVALS) <= {method_of(run) for run in runs}


def section(runs: Sequence[Run]) -> str:
    """The table of the runs of one setting under what they share."""
    asked = runs[0]["asked"]
    seeds = seeds_of(runs)
    told = f"one seed ({seeds})"
    if len({run["seed"] for run in runs}) > 1:
        told = f"seeds {seeds}"
    hours = sum(run["seconds"] for run in runs) / 3600
    judged = "test images"
    if asked["validate"]:
        judged = f"{asked['validate']} held-out images"
    head = (
        f"**{asked['data']}, {TITLES[asked['network']]}**, {_size(asked)}, "
        f"learning rate {_rate(asked)}, {told}, judged on {judged}; "
        f"{hours:.2f} core hours{_versions(runs)}."
    )
    return f"{head}\n\n{table(runs)}"


def seeds_of(runs: Sequence[Run]) -> str:
    """The seeds of runs in words: first and last, or each where some between them are missing."""
    found = sorted({run["seed"] for run in runs})
    if len(found) > 1 and found[-1] - found[0] == len(found) - 1:
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found))


def _size(asked: Mapping[str, Any]) -> str:
    return (
        f"width {asked['width']}, {asked['images']} training images, "
        f"{asked['steps']} steps of {BATCH} images"
    )


def _rate(asked: Mapping[str, Any]) -> str:
    """The learning rate, and the weight decay where it is not the recipe's."""
    found = f"{asked['rate']:g}"
    return f"{found}, weight decay {asked['decay']:g}" if "decay" in asked else found


def _versions(runs: Sequence[Run]) -> str:
    """How many versions of the code made the runs, if more than one; runs without one are of one."""
    found = set()
    for one in runs:
        found.update(one.get("code", ["unknown"]))
    return f", made by {len(found)} versions of the code" if len(found) > 1 else ""


def rates_table(tried: Sequence[Sequence[Run]]) -> str:
    """A row a learning rate and weight decay: the mean last error on held-out images.

    The best of a network on the same seeds is bold.

    Args:
        tried: The runs of each rate and decay, without a penalty.
    """
    found: dict[tuple[str, int, str], dict[tuple[float, float], float]] = {}
    for runs in tried:
        asked = runs[0]["asked"]
        network = f"{asked['data']}, {TITLES[asked['network']]}, {_size(asked)}"
        errors = found.setdefault((network, asked["validate"], seeds_of(runs)), {})
        decay = asked.get("decay", RECIPES[asked["network"]].decay)
        errors[asked["rate"], decay] = mean(run["errors"][-1] for run in runs)
    rows = []
    for (network, held_out, seeds), errors in sorted(found.items()):
        best = min(errors, key=lambda numbers: errors[numbers])
        for numbers, error in sorted(errors.items()):
            mark = "**" if numbers == best else ""
            told = [f"{mark}{number:g}{mark}" for number in numbers]
            rows.append([network, held_out, seeds, *told, f"{mark}{error:.2f}{mark}"])
    head = ["network", "held-out images", "seeds", "learning rate", "weight decay"]
    return markdown([*head, "held-out error"], rows)


def at_better_numbers(results: Sequence[Sequence[Run]]) -> list[str]:
    """Tables of each method at the better of its learning rates and weight decays.

    Args:
        results: The runs of each setting. A table is made of settings on the same seeds that differ
            in these numbers alone.
    """
    alike: dict[str, list[Sequence[Run]]] = {}
    for runs in results:
        shared = {**runs[0]["asked"], "rate": None, "decay": None, "method": None, "seed": None}
        alike.setdefault(f"{json.dumps(shared, sort_keys=True)} {seeds_of(runs)}", []).append(runs)
    return [_at_better(settings) for settings in alike.values() if len(settings) > 1]


def _at_better(settings: Sequence[Sequence[Run]]) -> str:
    """The table of each method in the setting in which its mean error is lowest."""
    chosen: list[Run] = []
    names: dict[str, list[str]] = {}
    found = [(_rate(runs[0]["asked"]), _by_method(runs)) for runs in settings]
    for name in CHOICES:
        own = [(rate, by_method[name]) for rate, by_method in found if name in by_method]
        if own:
            rate, runs = min(own, key=lambda one: mean(run["errors"][-1] for run in one[1]))
            chosen += runs
            names.setdefault(rate, []).append(name)
    asked = chosen[0]["asked"]
    told = "; ".join(f"{', '.join(methods)} at {rate}" for rate, methods in names.items())
    head = (
        f"**{asked['data']}, {TITLES[asked['network']]}, each method at its better learning rate and "
        f"weight decay** by the mean of these errors, seeds {seeds_of(chosen)}: {told}."
    )
    return f"{head}\n\n{table(chosen)}"


def overview(results: Sequence[Sequence[Run]]) -> str:
    """A row a network: the error without a penalty, and each method's change of it.

    Args:
        results: The runs of each setting, all with none, random and length.
    """
    names: list[str] = []
    for name in CHOICES:
        found = any(run["method"] == name for runs in results for run in runs)
        if found and name not in ("none", *OWN):
            names.append(name)
    rows, own = [], []
    for runs in results:
        by_method = _by_method(runs)
        last = _last(by_method)
        changes = {other: _changes(last, other) for other in RIVALS}
        gains = _gains(_beyond_all(changes), changes["none"])
        beyond_own = _from_own(last)[1]
        own.append((beyond_own, _gains(beyond_own, changes["none"])))
        asked = runs[0]["asked"]
        none = error_cell({"test_error": last["none"]})
        row = [f"{asked['data']}, {TITLES[asked['network']]}", _rate(asked)]
        row += [seeds_of(by_method["none"]), none]
        row += [_change(changes["none"].get(name)) for name in names]
        rows.append([*row, ", ".join(gains) or "–"])
    head = ["network", "learning rate", "seeds", "no penalty", *names, "beyond all"]
    if any(beyond_own for beyond_own, _ in own):
        head.append("beyond all of its own")
        for row, (beyond_own, gains) in zip(rows, own, strict=True):
            row.append((", ".join(gains) or "–") if beyond_own else "")
    return markdown(head, rows)


def _gains(beyond: Mapping[str, float], changes: Mapping[str, Paired]) -> list[str]:
    """The penalties that are lower than all they are compared with, after correction."""
    return [name for name, p in beyond.items() if p < LEVEL and changes[name].mean < 0]


def _last(by_method: Mapping[str, Sequence[Run]]) -> dict[str, list[float]]:
    """Each method's last errors, seed by seed."""
    return {name: [run["errors"][-1] for run in own] for name, own in by_method.items()}


def _changes(last: Mapping[str, Sequence[float]], other: str) -> dict[str, Paired]:
    """Paired differences of all methods but none from another."""
    rivals = [name for name in last if name not in ("none", other)]
    return {name: paired(last[name], last[other]) for name in rivals}


def table(runs: Sequence[Run]) -> str:
    """A row a method: errors, changes of the last one from none and from the controls, ratios.

    Only seeds that all methods have count, and what that leaves out is said; with one seed there is
    no change to tell.
    """
    by_method = _by_method(runs)
    seeds = len(next(iter(by_method.values())))
    last = _last(by_method)
    changes = {}
    if seeds > 1:
        changes = {other: _changes(last, other) for other in RIVALS if other in last}
    from_none = changes.get("none", {})
    corrected = holm([one.p for one in from_none.values()])
    p = dict(zip(from_none, corrected, strict=True))
    beyond = _beyond_all(changes)
    own_changes, beyond_own = _from_own(last)
    head = ["method", "last error", "best error", "change of the last", "± 95 %", "p (Holm)"]
    controls = [other for other in MATCHED if other in changes]
    head += [f"from {other}" for other in controls]
    if beyond:
        head.append("p beyond all (Holm)")
    if beyond_own:
        head += [*(f"from its own {control}" for control in MATCHED), "p beyond its own (Holm)"]
    head += ["largest ratio", "not finite"]
    rows = []
    for name, own in by_method.items():
        row: list[object] = [name, f"{last[name][0]:.2f}"]
        if seeds > 1:
            row[1] = error_cell({"test_error": last[name]})
        row.append(f"{mean(run['best'] for run in own):.2f}")
        row.append(_change(from_none.get(name)))
        row.append(_half_width(last[name], last["none"]) if name in from_none else "")
        row.append(_p(p.get(name)))
        row += [_change(changes[other].get(name)) for other in controls]
        if beyond:
            row.append(_p(beyond.get(name)))
        if beyond_own:
            row += [_change(one) for one in own_changes.get(name, [None] * len(MATCHED))]
            row.append(_p(beyond_own.get(name)))
        row.append(f"{_largest(own, 'ratio_before')} → {_largest(own, 'ratio_after')}")
        row.append(sum(not run["finite"] for run in own))
        rows.append(row)
    left_out = len(runs) - seeds * len(by_method)
    told = f"\n\nOnly seeds that all methods have count, {seeds}; runs left out: {left_out}."
    return markdown(head, rows) + (told if left_out else "")


def _beyond_all(changes: Mapping[str, Mapping[str, Paired]]) -> dict[str, float]:
    """Of each penalty the p of its difference from all rivals in one direction, corrected.

    Args:
        changes: By rivals, of each method. Where one of them was not run nothing is found.
    """
    if not set(RIVALS) <= changes.keys():
        return {}
    found = {}
    for name in changes["none"]:
        if parts_of(name)[1] is None:
            found[name] = of_all([changes[rival][name] for rival in RIVALS])
    return dict(zip(found, holm([*found.values()]), strict=True))


def _from_own(
    last: Mapping[str, Sequence[float]],
) -> tuple[dict[str, list[Paired]], dict[str, float]]:
    """Of each penalty with controls of its own: its differences from them, and the p beyond all.

    All are none and its own controls, as in :func:`_beyond_all`.
    """
    changes, found = {}, {}
    for name, errors in last.items():
        controls = [f"{name}_{control}" for control in MATCHED]
        if len(errors) > 1 and {"none", *controls} <= last.keys():
            changes[name] = [paired(errors, last[control]) for control in controls]
            found[name] = of_all([paired(errors, last["none"]), *changes[name]])
    return changes, dict(zip(found, holm([*found.values()]), strict=True))


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _half_width(method: Sequence[float], baseline: Sequence[float]) -> str:
    """Of the 95 % interval of their mean difference."""
    low, high = interval(method, baseline)
    return f"{(high - low) / 2:.2f}"


def _by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method, on the seeds that all of them have, in the order of the tables."""
    found: dict[str, dict[int, Run]] = {}
    for one in runs:
        found.setdefault(method_of(one), {})[one["seed"]] = one
    common = sorted(set.intersection(*[set(own) for own in found.values()]))
    if not common:
        raise SystemExit("there is no seed that all methods have")
    names = [name for name in CHOICES if name in found]
    return {name: [found[name][seed] for seed in common] for name in names}


def _change(one: Paired | None) -> str:
    """A difference, its standard error and wins; nothing where there is none."""
    if one is None:
        return ""
    return f"{one.mean:+.2f} ({one.error:.2f}), {one.wins}/{one.seeds}"


def _largest(runs: Sequence[Mapping[str, Any]], when: str) -> str:
    """The largest ratio of a layer, mean over the runs that have it."""
    found = list(_largest_of_each(runs, when))
    return f"{mean(found):.2f}" if found else "–"


def _largest_of_each(runs: Sequence[Mapping[str, Any]], when: str) -> Iterator[float]:
    for one in runs:
        ratios = [ratio for ratio in one[when].values() if ratio is not None]
        if ratios:
            yield max(ratios)
