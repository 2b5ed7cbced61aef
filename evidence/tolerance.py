"""``python -m evidence.tolerance``: does a network train the same when gradients are kept?

Six settings of the plan, each at the learning rate, weight decay and coefficient that the plan's
tuning chose for half-space MHE: nothing is tuned anew. The gradient of every layer is computed at
every step, or kept within a tolerance of 0.05 or of 0.1. Twenty seeds that the plan has not used;
a seed's three networks begin with the same weights and see the same images in the same order.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from evidence import cells as running
from evidence.comparisons import setting_title
from evidence.data import MissingDataError
from evidence.documents import quoted, save_all
from evidence.files import read, write_whole
from evidence.grid import Trial
from evidence.methods import METHODS, Method
from evidence.options import with_folder
from evidence.plan import SETTINGS, Cell, Setting
from evidence.statistics import interval, paired
from evidence.tables import error_cell, markdown
from evidence.training import train

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "tolerance"
README = FOLDER / "README.md"
MARKS = (
    "<!-- tolerance: written by `python -m evidence.tolerance --commit` -->",
    "<!-- end of tolerance -->",
)
SEEDS = tuple(range(40, 60))
TOLERANCES = (None, 0.05, 0.1)
CHOSEN = (
    "digits-n500-e40-depth2-scale1",
    "digits-n500-e40-depth2-scale0.1-noise0.2",
    "digits-n500-e40-depth2-scale1-adamw",
    "mnist1d-n1000-e40-depth2-scale0.1",
    "fashion-mnist-n1000-e20-batchnorm-scale0.1",
    "fashion-mnist-n1000-e20-convolutions-scale0.1",
)
"""Where the plan has a setting at two initial scales, as a rule that with the larger coefficient."""


def main() -> int:
    """Run what is left, print the table, and write it if asked to."""
    args = _arguments()
    settings = [one for one in SETTINGS if one.name in CHOSEN]
    seeds: Sequence[int] = SEEDS
    if args.quick:
        settings = [Setting("digits", 200, 2, held_out=200)]
        seeds = SEEDS[:3]
    folder = Path(args.out) / "cells"
    tuned = running.tuned_in_plan("half_mhe_2")
    found = []
    torch.set_num_threads(1)
    try:
        for setting in settings:
            trial = tuned[setting.name] if not args.quick else Trial(0.16, 0.01, 0.05, 3.5)
            for tolerance in TOLERANCES:
                cell = Cell(setting, _method(tolerance))
                found.append(_result(cell, trial, seeds, folder))
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(found))
    if args.commit:
        RESULTS.mkdir(parents=True, exist_ok=True)
        save_all(found, RESULTS / "cells.json")
        write_whole(README, quoted(README.read_text(), table(found), MARKS))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evidence.tolerance", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one tiny setting, to see it work")
    parser.add_argument("--commit", action="store_true", help="write evidence/results and README")
    return with_folder(parser, "out/evidence-tolerance")


def _method(tolerance: float | None) -> Method:
    """Half-space MHE with a tolerance; each network's layers keep gradients of their own."""
    name = "exact" if tolerance is None else f"tolerance{tolerance:g}"
    return replace(METHODS["half_mhe_2"], name=name, tolerance=tolerance, apart=True)


def _result(cell: Cell, trial: Trial, seeds: Sequence[int], folder: Path) -> running.Result:
    """A cell's result: that which a folder has, or a new one, which is saved there."""
    asked = _asked(cell.setting, cell.method, trial, seeds)
    if not running.kept(folder, cell, asked):
        print(cell.name, flush=True)
        start = time.process_time()
        data = running.data_of(cell)
        trained = train(data, cell.setting, cell.method, [trial], seeds, test=True)
        result = {
            "name": cell.name,
            "asked": asked,
            **running.told(trained),
            "recomputed": round(trained.recomputed, 4),
            **running.ran(start),
        }
        running.save(result, folder)
    found: running.Result = read(folder / f"{cell.name}.json")
    return found


def _asked(setting: Setting, method: Method, trial: Trial, seeds: Sequence[int]) -> running.Result:
    """What decides the numbers of a cell."""
    return {
        "setting": asdict(setting),
        "method": {
            "name": method.name,
            "measure": repr(method.measure),
            "tolerance": method.tolerance,
        },
        "trial": asdict(trial),
        "testing": list(seeds),
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Test error at every step, and the paired differences of both tolerances with intervals."""
    head = ["setting", "every step"]
    for tolerance in TOLERANCES[1:]:
        head += [f"tolerance {tolerance:g}", "recomputed"]
    by_setting: dict[str, dict[float | None, Mapping[str, Any]]] = {}
    for result in results:
        tolerance = result["asked"]["method"]["tolerance"]
        by_setting.setdefault(setting_title(result), {})[tolerance] = result
    rows = []
    for setting, own in by_setting.items():
        row = [setting, error_cell(own[None])]
        for tolerance in TOLERANCES[1:]:
            kept = own[tolerance]
            low, high = interval(kept["test_error"], own[None]["test_error"])
            change = paired(kept["test_error"], own[None]["test_error"])
            row.append(f"{change.mean:+.2f} ({low:+.2f} to {high:+.2f})")
            row.append(f"{100 * kept['recomputed']:.0f} %")
        rows.append(row)
    hours = sum(one["seconds"] for one in results) / 3600
    seeds = len(results[0]["test_error"])
    broken = sum(one["nonfinite"] for one in results)
    legend = (
        f"Test error in % over {seeds} seeds, mean (standard error); for a tolerance the difference "
        "from computing at every step in points, with its 95 % interval (paired t), and the part "
        f"of the penalty's arithmetic that was done in hidden layers. {broken} runs with weights "
        f"that are not finite. {hours:.2f} hours of one process on a shared machine."
    )
    widest = _widest(by_setting)
    return f"{markdown(head, rows)}\n\n{legend} {widest}"


def _widest(by_setting: Mapping[str, Mapping[float | None, Mapping[str, Any]]]) -> str:
    """The mean difference over settings, and how many intervals leave 0 out."""
    parts = []
    for tolerance in TOLERANCES[1:]:
        changes, apart = [], 0
        for own in by_setting.values():
            errors = own[tolerance]["test_error"], own[None]["test_error"]
            low, high = interval(*errors)
            apart += low > 0 or high < 0
            changes.append(paired(*errors).mean)
        parts.append(
            f"Tolerance {tolerance:g}: {mean(changes):+.2f} points in the mean of settings; 0 lies "
            f"outside the interval in {apart} of {len(changes)}."
        )
    return " ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
