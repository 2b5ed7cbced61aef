"""A whole report on a file as large as Llama-7B: ``python -m benchmarks.large_file FOLDER``.

The file is written to the folder first (13.5 GB), unless it is there: Llama-7B's shapes in bfloat16,
random numbers, and in each matrix two rows alike. Then ``lightning-hsu report FOLDER`` runs. Seconds
are those of the whole command, of the processor with two threads; MiB are its largest resident
memory. It took 86 minutes of processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import machine, resident_mib, save
from lightning_hsu.report.cli import main as command_line

BLOCKS = 32
WIDTH = 4096
INNER = 11008
WORDS = 32_000
ROWS = 1024
"""Rows that are drawn at once."""


def shapes_of(
    blocks: int = BLOCKS, width: int = WIDTH, inner: int = INNER, words: int = WORDS
) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, by name, as transformers stores a Llama."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
    for i in range(blocks):
        block = f"model.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{block}.self_attn.{part}.weight"] = (width, width)
        shapes[f"{block}.mlp.gate_proj.weight"] = (inner, width)
        shapes[f"{block}.mlp.up_proj.weight"] = (inner, width)
        shapes[f"{block}.mlp.down_proj.weight"] = (width, inner)
        shapes[f"{block}.input_layernorm.weight"] = (width,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (words, width)
    return shapes


def write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write model.safetensors and config.json, one tensor in memory at a time."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin = end
        end += 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "model.safetensors.part"
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(head)))
        file.write(head)
        for shape in shapes.values():
            file.write(_drawn(shape, generator).view(torch.int16).numpy())
    part.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers in bfloat16; of a matrix the rows 3 and 7 are alike."""
    drawn = torch.empty(shape, dtype=torch.bfloat16)
    for rows in drawn.split(ROWS):
        rows.copy_(torch.randn(rows.shape, generator=generator))
    if len(shape) > 1:
        drawn[7] = drawn[3]
    return drawn


def measured(folder: Path) -> dict[str, object]:
    """Report on a folder in this process, and look at what the report says."""
    numbers = folder / "report.json"
    start = time.perf_counter()
    code = command_line(["report", str(folder), "--json", str(numbers)])
    layers = json.loads(numbers.read_text())["layers"]
    return {
        "exit code": code,
        "layers": len(layers),
        "with the two rows": sum(layer["similar"] == 1 for layer in layers),
        "seconds": round(time.perf_counter() - start, 1),
        "processor seconds": round(time.process_time(), 1),
        "MiB": round(resident_mib()),
    }


def main() -> None:
    """Write the file if it is not there, report on it in a process of its own, save the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the file lies, or is to lie")
    parser.add_argument("--here", action="store_true", help="report on it in this process")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measured(arguments.folder)))
        return
    shapes = shapes_of()
    if not (arguments.folder / "model.safetensors").exists():
        write(arguments.folder, shapes)
    command = [
        sys.executable,
        "-m",
        "benchmarks.large_file",
        "--here",
        str(arguments.folder.resolve()),
    ]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, object] = {"machine": machine()}
    result["GB"] = round(sum(2 * math.prod(shape) for shape in shapes.values()) / 1e9, 1)
    result |= json.loads(done.stdout.splitlines()[-1])
    save("large_file", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
