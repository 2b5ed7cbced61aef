"""Time and memory of a report on very many layers and on very large ones.

Each case runs in a process of its own: ``python -m benchmarks.report`` prints a table, and saves it
if all cases are run; ``python -m benchmarks.report CASE ...`` runs some. The seconds are those of
``report(state_dict)``, of which those of the processor may be more with two threads; then come
those of the table, the JSON and the page together. MiB are the largest resident memory of the
process, with those of torch and of the weights themselves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import machine, resident_mib, save
from lightning_hsu.report import report

CASES = (
    "10000 of 4 x 4",
    "10000 up to 64 x 64",
    "100000 x 2",
    "50257 x 768",
    "1000000 x 64",
)


def weights_of(case: str) -> dict[str, Tensor]:
    """The weights of a case, with a pair of duplicates in each large one."""
    generator = torch.Generator().manual_seed(0)
    if case == "10000 of 4 x 4":
        return {f"{i}.weight": torch.randn(4, 4, generator=generator) for i in range(10_000)}
    if case == "10000 up to 64 x 64":
        weights = {}
        for i in range(10_000):
            n, d = torch.randint(2, 65, (2,), generator=generator).tolist()
            weights[f"{i}.weight"] = torch.randn(n, d, generator=generator)
        return weights
    n, _, d = case.partition(" x ")
    weight = torch.randn(int(n), int(d), generator=generator)
    weight[int(n) - 7] = 3.0 * weight[5]
    return {"embedding.weight": weight}


def measured(case: str) -> dict[str, float]:
    """Run one case in this process."""
    weights = weights_of(case)
    before = resident_mib()
    cpu = time.process_time()
    start = time.perf_counter()
    found = report(weights, head=None)
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
    start = time.perf_counter()
    sizes = [len(str(found)), len(found.to_json()), len(found.to_html())]
    return {
        "seconds": round(seconds, 1),
        "processor seconds": round(cpu, 1),
        "table, JSON and page": round(time.perf_counter() - start, 1),
        "MiB before": round(before),
        "MiB": round(resident_mib()),
        "MB of the page": round(sizes[2] / 1e6, 1),
        "pairs": sum(layer.similar for layer in found.layers),
    }


def main() -> None:
    """Run the cases, print a table and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []])
    parser.add_argument("--here", metavar="CASE", help="run one case here and print it as JSON")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measured(arguments.here)))
        return
    result: dict[str, object] = {"machine": machine()}
    print(result["machine"])
    for case in arguments.cases or CASES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.report", "--here", case],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        numbers = json.loads(done.stdout.splitlines()[-1])
        result[case] = numbers
        print(f"{case:22s}", *(f"{name} {value:g};" for name, value in numbers.items()))
    if not arguments.cases:
        save("report", result)


if __name__ == "__main__":
    main()
