"""``python -m evidence.probe``: does a short probe predict the strength that tuning chooses?

Each setting of the plan is trained for fifty steps without a penalty, at the learning rate and
weight decay that weight decay alone chose. The prediction is the coefficient at which the penalty's
gradient would be 5 % of the task's. It is compared with what half-space MHE's sixteen trials found.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from evidence import cells as running
from evidence.comparisons import UNTRAINED
from evidence.data import Data, MissingDataError
from evidence.documents import quoted, save_all
from evidence.files import read, write_whole
from evidence.grid import Trial
from evidence.methods import HALF_MHE, METHODS
from evidence.networks import Networks, Piece
from evidence.options import whole_or_quick
from evidence.plan import SETTINGS, STRENGTHS, Cell, Setting
from evidence.statistics import Correlation, interval, rank_correlation
from evidence.tables import markdown
from evidence.training import batches, drawn, loss_of, optimizer_of

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "probe.json"
README = FOLDER / "README.md"
MARKS = (
    "<!-- probe: written by `python -m evidence.probe --commit` -->",
    "<!-- end of probe -->",
)
SEEDS = (3000, 3001, 3002)
STEPS = 50
FRACTION = 0.05
SMOOTHING = 0.9
"""Of the running means, as a Share has it."""

HINDSIGHT = tuple(10.0 ** (i / 8) for i in range(-40, 25))
"""Factors 1e-5 ... 1e3, of which the best is reported beside the one that was fixed."""


@dataclass(frozen=True)
class Found:
    """What the probe and the tuning found in one setting.

    Args:
        name: Of the setting.
        ratio: Task's gradient over the penalty's at coefficient 1: median over layers, then seeds.
        coefficients: Those that were tried, from weak to strong.
        errors: The lowest validation error at each, over four pairs of learning rate and decay.
        chosen: The tuned coefficient.
        trained: Whether weight decay alone does better than :data:`~evidence.tables.UNTRAINED`.
        plain: Whether the network has no convolutions, whose coefficients are some fifteen times smaller.
    """

    name: str
    ratio: float
    coefficients: tuple[float, ...]
    errors: tuple[float, ...]
    chosen: float
    trained: bool
    plain: bool

    def predicted(self, fraction: float = FRACTION) -> float:
        """The coefficient that the probe predicts."""
        return fraction * self.ratio

    def nearest(self, fraction: float = FRACTION) -> int:
        """Which of the coefficients is nearest to the prediction, by their ratio."""
        at = math.log(self.predicted(fraction))
        apart = [abs(math.log(one) - at) for one in self.coefficients]
        return apart.index(min(apart))

    @property
    def regrets(self) -> list[float]:
        """Points that each coefficient's error lies above the lowest."""
        return [error - min(self.errors) for error in self.errors]


def main() -> int:
    """Probe every setting, print the table, and write it if asked to."""
    args = _arguments()
    settings: Sequence[Setting] = SETTINGS
    if args.quick:
        settings = [one for one in SETTINGS if one.data == "digits"]
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        probed = [_probed(setting) for setting in settings]
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(probed))
    print(f"\n{time.perf_counter() - start:.0f} s")
    if args.commit:
        save_all(probed, RESULTS)
        write_whole(README, quoted(README.read_text(), table(probed), MARKS))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evidence.probe", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the settings of the digits only")
    parser.add_argument("--commit", action="store_true", help="write evidence/results and README")
    return whole_or_quick(parser)


def _probed(setting: Setting) -> running.Result:
    """A setting's ratios (layers, seeds), for JSON."""
    chosen = _tunings()[f"{setting.name}--decay"]["chosen"]
    found = probe(running.data_of(Cell(setting, METHODS["decay"])), setting, Trial(**chosen), SEEDS)
    ratios = [[float(f"{ratio:.4g}") for ratio in layer] for layer in found.tolist()]
    return {
        "name": setting.name,
        "network": setting.network,
        "rate": chosen["rate"],
        "decay": chosen["decay"],
        "seeds": list(SEEDS),
        "steps": STEPS,
        "ratios": ratios,
    }


def probe(
    data: Data, setting: Setting, trial: Trial, seeds: Sequence[int], steps: int = STEPS
) -> Tensor:
    """Running means of the task's gradient norms over those of the penalty, (hidden layers, seeds)."""
    networks = Networks(setting.architecture(data), 1, seeds)
    optimizer = optimizer_of(networks, setting, [trial])
    draws = [drawn(data, setting, seed) for seed in seeds]
    pieces = [side[0] for side in networks.hidden]  # the only trial's
    means = torch.zeros(0)
    for images, labels in itertools.islice(batches(optimizer, setting, draws, seeds), steps):
        optimizer.zero_grad()
        loss_of(networks(images), labels).backward()
        norms = torch.stack([_norms(piece) for piece in pieces])  # (layers, 2, seeds)
        if means.numel() == 0:
            means = norms
        means = SMOOTHING * means + (1.0 - SMOOTHING) * norms
        optimizer.step()
    return means[:, 0] / means[:, 1]


def _norms(piece: Piece) -> Tensor:
    """Norms of the task's and of the penalty's gradient for each seed, (2, seeds)."""
    assert piece.weight.grad is not None
    task = piece.weight.grad.flatten(1).norm(dim=1)
    x = piece.weight.detach().flatten(2)
    penalty = HALF_MHE.value_and_grad(x, HALF_MHE.prepare(x, None))[1]
    return torch.stack([task, penalty.flatten(1).norm(dim=1)])


@cache
def _tunings() -> dict[str, running.Result]:
    """The plan's results by name."""
    return {one["name"]: one for one in read(running.FIRST / "cells.json")}


def found_in(probed: Mapping[str, Any]) -> Found:
    """What a setting's probe says, beside what its tuning found."""
    tuned = _tunings()[f"{probed['name']}--half_mhe_2"]
    alone = _tunings()[f"{probed['name']}--decay"]
    trials = tuned["asked"]["trials"]
    coefficients, errors = [], []
    for strength in STRENGTHS:
        own = [i for i, trial in enumerate(trials) if trial["strength"] == strength]
        coefficients.append(trials[own[0]]["coefficient"])
        errors.append(min(mean(tuned["validation_error"][i]) for i in own))
    by_seed = [median(layers) for layers in zip(*probed["ratios"], strict=True)]
    return Found(
        name=probed["name"],
        ratio=median(by_seed),
        coefficients=tuple(coefficients),
        errors=tuple(errors),
        chosen=tuned["chosen"]["coefficient"],
        trained=mean(alone["test_error"]) < UNTRAINED,
        plain=probed["network"] == "plain",
    )


def table(probed: Sequence[Mapping[str, Any]]) -> str:
    """Correlations, regrets and the verdict."""
    found = [found_in(one) for one in probed]
    return f"{_correlations(found)}\n\n{_regrets(found)}\n\n{verdict(found)}"


def _correlations(found: Sequence[Found]) -> str:
    """Rank correlations; the first row is the one that decides."""
    head = ["settings", "count", "Spearman's rho", "95 % bootstrap interval"]
    rows: list[list[object]] = []
    for title, group in (
        ("all", found),
        ("where weight decay alone trains", _trained(found)),
        ("without convolutions", [one for one in found if one.plain]),
    ):
        rho = correlation(group)
        between = f"{rho.low:+.2f} to {rho.high:+.2f}"
        rows.append([title, rho.count, f"{rho.rho:+.2f}", between])
    return markdown(head, rows)


def _trained(found: Sequence[Found]) -> list[Found]:
    """The settings in which weight decay alone trains."""
    return [one for one in found if one.trained]


def correlation(found: Sequence[Found]) -> Correlation:
    """Rank correlation of predicted and tuned coefficients."""
    predicted, chosen = [], []
    for one in found:
        predicted.append(one.predicted())
        chosen.append(one.chosen)
    return rank_correlation(predicted, chosen)


Rule = Callable[[Found], float]
"""A setting's regret with the strength that a rule takes there."""


def _by_probe(one: Found, fraction: float = FRACTION) -> float:
    return one.regrets[one.nearest(fraction)]


def _everywhere(one: Found, place: int) -> float:
    return one.regrets[place]


def _at_random(one: Found) -> float:
    return mean(one.regrets)


def single_best(found: Sequence[Found]) -> int:
    """Which strength has the lowest mean regret."""
    return _least([partial(_everywhere, place=i) for i in range(len(STRENGTHS))], found)


def hindsight(found: Sequence[Found]) -> float:
    """The factor with the lowest mean regret, which only the results can tell."""
    rules = [partial(_by_probe, fraction=fraction) for fraction in HINDSIGHT]
    return HINDSIGHT[_least(rules, found)]


def _least(rules: Sequence[Rule], found: Sequence[Found]) -> int:
    """Which rule has the lowest mean regret."""
    means = [mean(map(rule, found)) for rule in rules]
    return means.index(min(means))


def _regrets(found: Sequence[Found]) -> str:
    """Of the probe, of each strength for all settings and of one drawn at random."""
    best = single_best(found)
    factor = hindsight(found)
    rules: list[tuple[str, Rule]] = [
        (f"probe, {FRACTION:g} of the task's gradient", _by_probe),
        (f"probe, best factor in hindsight ({factor:.2g})", partial(_by_probe, fraction=factor)),
    ]
    for i, strength in enumerate(STRENGTHS):
        title = f"{strength:g} everywhere"
        if i == best:
            title = f"{title} (the single best)"
        rules.append((title, partial(_everywhere, place=i)))
    rules.append(("drawn at random", _at_random))
    head = ["strength", "regret, mean", "median", "no regret in", "minus the single best"]
    head.append("mean, where weight decay alone trains")
    beside = [_everywhere(one, best) for one in found]
    rows: list[list[object]] = []
    for title, rule in rules:
        regrets = [rule(one) for one in found]
        row: list[object] = [title, f"{mean(regrets):.2f}", f"{median(regrets):.2f}"]
        exact = f"{regrets.count(0.0)} of {len(regrets)}"
        row.append(exact if rule is not _at_random else f"1 of {len(STRENGTHS)}")
        low, high = interval(regrets, beside)
        change = mean(regrets) - mean(beside)
        row.append(f"{change:+.2f} ({low:+.2f} to {high:+.2f})" if regrets != beside else "")
        row.append(f"{mean(map(rule, _trained(found))):.2f}")
        rows.append(row)
    legend = "Regret in points of validation error; its difference with a 95 % interval (paired t)."
    return f"{markdown(head, rows)}\n\n{legend}"


def worth_shipping(found: Sequence[Found]) -> tuple[bool, bool]:
    """Whether the rank correlation is above 0, and the regret below that of the single best strength."""
    best = single_best(found)
    regrets = [_by_probe(one) for one in found]
    beside = [_everywhere(one, best) for one in found]
    return correlation(found).low > 0, interval(regrets, beside)[1] < 0


def verdict(found: Sequence[Found]) -> str:
    """Both hypotheses in words, and on which side the predictions lie."""
    above, lower = worth_shipping(found)
    told = {True: "holds", False: "does not hold"}
    worth = {True: "worth", False: "not worth"}[above and lower]
    below, weak = 0, 0
    for one in found:
        below += one.predicted() < one.chosen
        weak += one.predicted() < one.coefficients[0]
    return (
        f"(a) {told[above]}, (b) {told[lower]}: the probe is **{worth} shipping**. Its prediction lies "
        f"below the tuned coefficient in {below} of {len(found)} settings, and below the smallest that "
        f"was tried in {weak}; they run from {min(one.predicted() for one in found):.1g} to "
        f"{max(one.predicted() for one in found):.1g}."
    )


if __name__ == "__main__":
    sys.exit(main())
