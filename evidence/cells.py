"""Run one cell: sixteen trials on the tuning seeds, wider ones while the best is on an edge, then test.

The best trial is trained on the test seeds; so are controls of the penalty's own gradient.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

import lightning_hsu
from evidence.comparisons import UNTRAINED
from evidence.data import NAMED, Data, load
from evidence.files import read, write_whole
from evidence.grid import BEYOND, Trial, edges
from evidence.methods import matched
from evidence.plan import Cell, Setting
from evidence.training import Trained, train

Result = dict[str, Any]
"""What JSON holds of a cell: what was asked, and what was found."""

FIRST = Path(__file__).parent / "results" / "first"
"""The plan's first run: without controls, and on grids that were not widened."""

BROKEN = 100.0
"""The validation error, in percent, of a network whose weights are not finite: no trial is worse.

Its answers are all class 0, which would pass for a class at random.
"""

DECIDING = ("cells", "controls", "data", "early", "grid", "methods", "networks", "plan", "training")
"""The modules beside the library that decide the numbers of a cell."""

_load = lru_cache(maxsize=1)(load)


def asked(cell: Cell, tuning: Sequence[int], testing: Sequence[int]) -> Result:
    """What decides the numbers of a cell; a result that was asked otherwise is not its result."""
    trials = [asdict(trial) for trial in cell.trials(_load(cell.setting.data))]
    setting = described(cell.setting)
    setting["data"] = Path(cell.setting.data).resolve().name
    if cell.setting.data not in NAMED:  # a folder, whose content may change under its name
        setting["content"] = _load(cell.setting.data).digest
    measure = repr(cell.method.measure) if cell.method.measure else None
    method = {
        "name": cell.method.name,
        "measure": measure,
        "apply": cell.method.apply,
        "share": repr(cell.method.share),
        "keep": cell.method.keep,
    }
    return {
        "setting": setting,
        "method": method,
        "trials": trials,
        "beyond": f"{BEYOND} values outwards",
        "not finite": BROKEN,
        "of equal ones": "the first, or where none trains the strongest",
        "matched": [*matched(cell.method)],
        "tuning": list(tuning),
        "testing": list(testing),
    }


def described(setting: Setting) -> Result:
    """A setting for JSON; what came after the plan's results stands there only where it is used."""
    found = asdict(setting)
    if setting.start == "fresh":
        del found["start"]
    if setting.penalises_head:
        del found["penalises_head"]
    return found


def run(cell: Cell, tuning: Sequence[int], testing: Sequence[int]) -> Result:
    """Tune and test one cell on one core."""
    torch.set_num_threads(1)
    # What is tried goes up to strengths that break training: which do, the errors show.
    warnings.filterwarnings("ignore", "the penalty is too strong")
    start = time.process_time()
    tuned = tune(_load(cell.setting.data), cell, tuning)
    found = {
        "name": cell.name,
        "asked": asked(cell, tuning, testing),
        **_of_tuning(tuned),
        **_of_tests(cell, tuned, testing),
    }
    return found | ran(start)


def _of_tuning(tuned: Tuned) -> Result:
    """Every trial, and the one that was chosen."""
    return {
        "trials": [asdict(trial) for trial in tuned.trials],
        "validation_error": _rounded(tuned.error),
        "tuning_nonfinite": int((~tuned.finite).sum()),
        "chosen": asdict(tuned.best),
        "edges": edges(tuned.trials, tuned.best),
        "tuning_early_ratio": tuned.early_ratio,
        "tuning_early_share": tuned.early_share,
    }


def _of_tests(cell: Cell, tuned: Tuned, testing: Sequence[int]) -> Result:
    """The best trial, its matched controls, and the best of the first trials if that is another."""
    data = _load(cell.setting.data)
    trials = [tuned.best]
    if tuned.first_best != tuned.best:
        trials.append(tuned.first_best)
    tested = train(data, cell.setting, cell.method, trials, testing, test=True)
    found = told(tested)
    for name, control in matched(cell.method).items():
        beside = train(data, cell.setting, control, [tuned.best], testing, test=True)
        found.setdefault("matched", {})[name] = told(beside)
    if tuned.first_best != tuned.best:
        found["first"] = {
            "chosen": asdict(tuned.first_best),
            "edges": edges(tuned.first, tuned.first_best),
            **told(tested, trial=1),
        }
    return found


@dataclass(frozen=True)
class Tuned:
    """Every trial of a cell.

    Args:
        trials: All of them.
        first: Those before the grid was widened.
        error: On held-out images, (trials, tuning seeds); :data:`BROKEN` where weights are not finite.
        finite: Whether weights are, of the same shape.
        early_ratio: Of each trial the mean over hidden layers and seeds.
        early_share: The same.
    """

    trials: list[Trial]
    first: list[Trial]
    error: torch.Tensor
    finite: torch.Tensor
    early_ratio: list[float | None]
    early_share: list[float | None]

    @property
    def best(self) -> Trial:
        """The trial with the lowest mean error."""
        return lowest(self.trials, self.error)

    @property
    def first_best(self) -> Trial:
        """The best of the first."""
        return lowest(self.first, self.error[: len(self.first)])


def lowest(trials: Sequence[Trial], error: torch.Tensor) -> Trial:
    """The trial with the lowest mean error (trials, seeds); of equal ones the first.

    Where none has begun to learn, many are equal: there the strongest of them, since more is wanted.
    """
    means = error[: len(trials)].mean(1)
    if means.min() < UNTRAINED:
        return trials[int(means.argmin())]
    equal = [trial for trial, mean in zip(trials, means, strict=True) if mean == means.min()]
    return max(equal, key=lambda trial: (trial.strength, trial.rate, -trial.decay))


def tune(data: Data, cell: Cell, seeds: Sequence[int]) -> Tuned:
    """Try the grid, and widen it until the best trial lies inside or at the end of an axis."""
    grid = cell.grid(data)
    more = grid.first()
    none = torch.zeros(0, len(seeds))
    found = Tuned([], more, none, none.bool(), [], [])
    while more:
        new = train(data, cell.setting, cell.method, more, seeds, test=False)
        found = replace(
            found,
            trials=found.trials + more,
            error=torch.cat([found.error, new.error.where(new.finite, BROKEN)]),
            finite=torch.cat([found.finite, new.finite]),
            early_ratio=found.early_ratio + _by_trial(new.early_ratio, len(more), 5),
            early_share=found.early_share + _by_trial(new.early_share, len(more), 6),
        )
        more = grid.wider(found.trials, found.best)
    return found


def _by_trial(early: torch.Tensor, trials: int, digits: int) -> list[float | None]:
    """Means over layers and seeds of (layers, trials, seeds); None where nothing was watched."""
    if not len(early):
        return [None] * trials
    return list(_rounded(early.mean((0, 2)), digits))


def ran(start: float) -> Result:
    """How long a cell has run since ``start``, in seconds of a processor, and with what."""
    return {
        "seconds": round(time.process_time() - start, 1),
        "versions": {
            "lightning_hsu": lightning_hsu.__version__,
            "torch": torch.__version__.split("+")[0],
            "code": code(),
        },
        "machine": platform.machine(),
    }


@cache
def code(modules: tuple[str, ...] = DECIDING) -> str:
    """A digest of the sources that decide the numbers: the library's, and these modules."""
    here = Path(__file__).parent
    files = sorted(Path(lightning_hsu.__file__).parent.rglob("*.py"))
    files += [here / f"{name}.py" for name in modules]
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def save(result: Mapping[str, Any], folder: Path) -> None:
    """Write a cell's result."""
    write_whole(folder / f"{result['name']}.json", json.dumps(result, allow_nan=False))


def kept(folder: Path, cell: Cell, wanted: Result) -> bool:
    """Whether a folder has the result of a cell as it is asked now."""
    return known(folder, cell.name, wanted) is not None


def known(folder: Path, name: str, wanted: Result) -> Result | None:
    """The result of this name that a folder has, if it was asked as it is now."""
    try:
        found: Result = read(folder / f"{name}.json")
    except (FileNotFoundError, ValueError):  # not there, or not whole
        return None
    if not isinstance(found, dict):
        return None
    return found if _alike(found.get("asked"), json.loads(json.dumps(wanted))) else None


def _alike(one: Any, other: Any) -> bool:
    """Whether both are the same but for the last digits of numbers, which differ between machines."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


@cache
def tuned_in_plan(method: str) -> Mapping[str, Trial]:
    """What the first run's tuning chose for a method, by the names of its settings."""
    found = {}
    for result in read(FIRST / "cells.json"):
        setting, _, name = result["name"].partition("--")
        if name == method:
            found[setting] = Trial(**result["chosen"])
    return found


def keep_freed_memory() -> None:
    """Let processes that are started later keep what they free, where the C library is glibc.

    Each step frees large tensors; to give them back to the system and get them anew takes up to a
    third of a processor's time, and processes wait for each other meanwhile.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**33))
    os.environ.setdefault("MALLOC_TOP_PAD_", str(2**26))


def end_with(parent: int) -> None:
    """End this process when its parent has ended, also when that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def data_of(cell: Cell) -> Data:
    """The data of a cell, read once."""
    return _load(cell.setting.data)


def told(tested: Trained, trial: int = 0) -> Result:
    """What the test of a trial found; early in training by layers, means over seeds."""
    found = {
        "test_error": _rounded(tested.error[trial]),
        "train_error": _rounded(tested.train_error[trial]),
        "nonfinite": int((~tested.finite[trial]).sum()),
        "ratio_before": _rounded(tested.before[trial], 5),
        "ratio_after": _rounded(tested.after[trial], 5),
    }
    if len(tested.early_ratio):
        found["early_ratio"] = _rounded(tested.early_ratio[:, trial].nanmean(1), 5)
        found["early_share"] = _rounded(tested.early_share[:, trial].nanmean(1), 6)
    return found


def _rounded(values: torch.Tensor, digits: int = 3) -> Any:
    """Numbers for JSON; None where they are not finite."""
    if values.ndim:
        return [_rounded(part, digits) for part in values]
    return round(float(values), digits) if bool(values.isfinite()) else None
