"""Times that can be compared: rivals take turns, and what is reported is the quotient within each round."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def rounds_of(rivals: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each rival in each round, by name; all run once before."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        run()
    for _ in range(rounds):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def quotient(
    times: Mapping[str, list[float]], over: str, under: str, factor: float = 1.0
) -> dict[str, float]:
    """Smallest, median and largest of ``times[over] / (factor * times[under])`` over the rounds."""
    return spread([a / (factor * b) for a, b in zip(times[over], times[under], strict=True)])


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {
        "min": round(min(values), 4),
        "median": round(statistics.median(values), 4),
        "max": round(max(values), 4),
    }


def machine() -> str:
    """Where this runs."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    )
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    return f"{name}, {torch.get_num_threads()} thread, Python {platform.python_version()}, torch {torch.__version__}"


def save(name: str, result: Mapping[str, object]) -> None:
    """Keep a table as JSON beside the others."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def peak_mib(module: str, *arguments: str) -> float:
    """What ``python -m module arguments`` prints last: MiB, measured in a process of its own."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=root,
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def resident_mib() -> float:
    """The most memory that this process has had so far."""
    status = Path(
        "/proc/self/status"
    ).read_text()  # ru_maxrss would be that of the parent, if it had more
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
