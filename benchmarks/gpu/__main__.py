"""The penalty on a GPU: is it right there, and what does it cost.

`--all` runs every part (`parts.py`), each in a process of its own: a part that fails, crashes or
hangs is recorded, and the others go on. It needs torch, Lightning and what the parts name: Triton,
torchvision, transformers. It needs no package index, no pytest and no data. Results are written to
--out after each part: results.json, and results.md to read. Without `--all` it times the stand-in
for a training step (`stand_in.py`).
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path


def main() -> int:
    """Run what the arguments ask for; 0 if all of it ran and was right."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every part, not the stand-in")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="where results go")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds for all parts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="in miniature, to see that it runs")
    parser.add_argument(
        "--only", action="append", help="the parts with this text in their names; may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=11, help="of the stand-in")
    arguments = parser.parse_args()
    prepare(arguments.device)
    if not arguments.all:
        from benchmarks.gpu import stand_in

        return stand_in.run(arguments.rounds, quick=arguments.quick)
    try:
        from benchmarks.gpu.parts import parts
        from benchmarks.gpu.runner import Settings, run
    except ImportError:  # without torch or Lightning there is nothing to run
        arguments.out.mkdir(parents=True, exist_ok=True)
        text = f"# The penalty on a GPU\n\nNothing could run.\n\n```\n{traceback.format_exc()}```\n"
        (arguments.out / "results.md").write_text(text)
        raise
    settings = Settings(arguments.device, arguments.quick, arguments.out, arguments.budget)
    wanted = arguments.only or [""]
    chosen = [part for part in parts() if any(text in part.name for text in wanted)]
    return run(chosen, settings)


def prepare(device: str) -> None:
    """Set what must be set before torch and Triton are imported."""
    # Ask the driver's library for devices: CUDA must not start in a process that is yet to fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


if __name__ == "__main__":
    sys.exit(main())
