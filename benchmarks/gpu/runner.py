"""Parts in processes of their own, within a budget of time; results are written after each."""

from __future__ import annotations

import json
import multiprocessing
import re
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.table import page, verdict

NO_FORK = ("initialization error", "re-initialize CUDA in forked")
"""What CUDA says in a fork of a process in which it has started already."""


class NeedsCardError(Exception):
    """A part, or a row of one, that has no meaning without a GPU."""


class LacksError(Exception):
    """A library that a part needs is not installed."""


@dataclass(frozen=True)
class Settings:
    """How to run.

    Args:
        device: "cuda" or "cpu".
        quick: In miniature.
        out: The folder of the results.
        budget: Seconds for all parts.
    """

    device: str
    quick: bool
    out: Path
    budget: float


@dataclass(frozen=True)
class Part:
    """One part.

    Args:
        name: Its name.
        act: What it does: a function of a report, which can be pickled.
        least: Seconds below which it is not started.
        most: Seconds after which it is ended.
        checks: The back end that it proves right; timings of one that is not are void.
    """

    name: str
    act: Callable[[Report], None]
    least: float
    most: float
    checks: str | None = None

    @property
    def file(self) -> str:
        """The name of the file with its results."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + ".json"


@dataclass
class Report:
    """What a part has found so far; each row and note is written at once.

    Args:
        settings: How to run.
        path: Where to write.
        deadline: When the part will be ended, in seconds of :func:`time.time`.
    """

    settings: Settings
    path: Path
    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        """Seconds until the part will be ended."""
        return self.deadline - time.time()

    def row(self, **values: Any) -> None:
        """Add a row to the part's table; underscores in the names become spaces."""
        self.rows.append({name.replace("_", " "): value for name, value in values.items()})
        self.write("running")

    def note(self, text: str) -> None:
        """Add a line below the table, once."""
        if text not in self.notes:
            self.notes.append(text)
            self.write("running")

    def write(self, status: str, **more: str) -> None:
        """Write everything."""
        found = {"status": status, "rows": self.rows, "notes": self.notes, **more}
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(found, indent=1, default=str))
        draft.replace(self.path)  # at once: the process may be ended at any time


def run(parts: Sequence[Part], settings: Settings) -> int:
    """Run the parts one after the other.

    A part is a fork of this process, which has imported everything; or a fresh process, if CUDA
    says that it cannot start in a fork.

    Returns:
        0 if none failed and all checks were right, 2 if there is no card to run on, else 1.
    """
    folder = settings.out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    end = time.time() + settings.budget
    results: dict[str, dict[str, Any]] = {}
    is_right = True
    start = "spawn"
    if "fork" in multiprocessing.get_all_start_methods():
        start = "fork"
    for part in parts:
        left = end - time.time()
        if left < part.least:
            reason = f"{max(0.0, left):.0f} s were left, and it needs {part.least:g}"
            found: dict[str, Any] = {"status": "skipped", "rows": [], "notes": [reason]}
        else:
            found = result_of(part, settings, start, left)
            if start == "fork" and any(text in found.get("traceback", "") for text in NO_FORK):
                start = "spawn"
                found = result_of(part, settings, start, end - time.time())
        results[part.name] = found
        is_right = write(results, parts, settings)
        print(f"{part.name:32s} {found['status']:14s} {found.get('seconds', 0):6.1f} s", flush=True)
        if settings.device == "cuda" and part is parts[0] and found["status"] == "needs a card":
            print(found["notes"][-1])
            return 2
    print((settings.out / "results.md").resolve())
    return int(not is_right)


def write(results: dict[str, dict[str, Any]], parts: Sequence[Part], settings: Settings) -> bool:
    """Write all results so far; return whether none failed and all checks were right."""
    void = verdict(results, {part.name: part.checks for part in parts})
    about = {"device": settings.device, "quick": settings.quick, "budget": settings.budget}
    whole = {"settings": about, "void": void, "parts": results}
    (settings.out / "results.json").write_text(json.dumps(whole, indent=1, default=str) + "\n")
    (settings.out / "results.md").write_text(page(whole))
    failed = [name for name, one in results.items() if one["status"] in ("failed", "stopped")]
    return not void and not failed


def result_of(part: Part, settings: Settings, start: str, left: float) -> dict[str, Any]:
    """Run one part; return what it has written, also if it crashed or had to be ended."""
    path = settings.out / "parts" / part.file
    path.unlink(missing_ok=True)
    began = time.time()
    seconds = min(part.most, left)
    report = Report(settings, path, began + seconds)
    context: Any = multiprocessing.get_context(start)
    process: BaseProcess = context.Process(target=do, args=(part, report))
    process.start()
    process.join(seconds)
    is_late = process.is_alive()
    if is_late:
        process.kill()
        process.join()
    found: dict[str, Any] = {"status": "running", "rows": [], "notes": []}
    if path.exists():
        found = json.loads(path.read_text())
    found["seconds"] = round(time.time() - began, 1)
    if is_late:
        found["status"] = "stopped"
        found["notes"].append(
            f"ended after {seconds:.0f} s; the rows are what it had found by then"
        )
    elif found["status"] == "running":
        found["status"] = "failed"
        found["traceback"] = f"the process died with exit code {process.exitcode}"
    return found


def do(part: Part, report: Report) -> None:
    """What the process of a part does."""
    from benchmarks.gpu.machine import suit_interpreter

    torch.manual_seed(0)
    if report.settings.device == "cpu":
        torch.set_num_threads(1)
        suit_interpreter()
    try:
        part.act(report)
    except NeedsCardError as error:
        report.notes.append(f"needs a card: {error}")
        report.write("needs a card")
    except LacksError as error:
        report.notes.append(str(error))
        report.write("missing")
    except Exception:
        report.write("failed", traceback=traceback.format_exc())
    else:
        report.write("done")
