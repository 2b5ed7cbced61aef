"""Comparable times: rivals take turns, and quotients are taken within each round."""

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
    """Seconds of each rival in each round, by name, after one warm-up run each."""
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
    quotients = []
    for above, below in zip(times[over], times[under], strict=True):
        quotients.append(above / (factor * below))
    return spread(quotients)


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and largest value."""
    return {
        "min": round(min(values), 4),
        "median": round(statistics.median(values), 4),
        "max": round(max(values), 4),
    }


def machine() -> str:
    """The processor and the versions that a benchmark runs with."""
    threads = torch.get_num_threads()
    python = platform.python_version()
    return f"{_processor()}, {threads} thread, Python {python}, torch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def save(name: str, result: Mapping[str, object]) -> None:
    """Write a result to ``results/name.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def peak_mib(module: str, *arguments: str) -> float:
    """Run ``python -m module arguments`` in a new process; return the MiB that it prints last."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def resident_mib() -> float:
    """The largest resident memory of this process so far, MiB."""
    # Not ru_maxrss: it is the parent's if the parent had more.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
