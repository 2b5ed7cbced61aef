"""Compile every kernel for its chips, without one: print registers, spills and shared memory, and fail where one spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # it would leave nothing to compile
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_hsu._core.near import NEAR
from lightning_hsu._core.triton import launch, pairs, scalars, topk

CHIPS = {80: 163, 90: 227}  # KiB of shared memory that a program may have
FORMULAS = sorted(
    {*scalars.SPECIAL.values(), *scalars.GENERAL.values()}, key=lambda scalar: scalar.__name__
)
POINTERS = {
    "groups": "*i64", "tiles": "*i32", "blocks": "*i32", "alive": "*i32", "near_tiles": "*i32", "columns": "*i32",
    "numbers": "*fp64", "living": "*i1", "number": "fp32", "n": "i32", "d": "i32",
}  # fmt: skip
Case = tuple[str, Any, dict[str, Any], int]  # label, kernel, its constants, warps


def cases() -> Iterator[Case]:
    """All kernels in all the ways that they are launched."""
    rows = {"ROWS": launch.ROWS, "COLS": launch.COLS}
    for kernel in (pairs.unit_rows, pairs.additions):
        for dtype in launch.DTYPES.values():
            yield f"{kernel.__name__} {dtype}", kernel, {"DTYPE": dtype, **rows}, launch.WARPS
    tile = {"TILE": launch.TILE, "DEPTH": launch.DEPTH}
    for precision in ("tf32x3", "tf32"):
        ways = {"PRECISION": precision, "WIDTH": launch.TILE, **tile}
        yield f"products {precision}", pairs.products, ways, launch.WARPS
        for scalar in FORMULAS if precision == "tf32x3" else [scalars.chordal_two]:
            for half in (False, True):
                ways = {
                    "KERNEL": scalar,
                    "HALF_SPACE": half,
                    "ENERGY": "gaussian" in scalar.__name__,
                    "NEAR": NEAR,
                }
                label = f"pair_slopes {precision} {scalar.__name__}{', half space' if half else ''}"
                yield (
                    label,
                    pairs.pair_slopes,
                    {**ways, "PRECISION": precision, **tile},
                    launch.WARPS,
                )
    for every in (False, True):
        ways = {"HALF_SPACE": True, "EVERY": every, "PRECISION": "tf32x3", **topk.TILES}
        yield f"largest_two{', every' if every else ''}", topk.largest_two, ways, topk.WARPS


def resources(
    kernel: Any, constants: dict[str, Any], warps: int, chip: int
) -> tuple[int, int, float]:
    """Registers of a thread, bytes of its stack (what is spilled lies there), KiB of shared memory."""
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name, "*fp32")
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    done = triton.compile(source, target=GPUTarget("cuda", chip, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(done.asm["cubin"])
        binary.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        report = subprocess.run(
            [tool, "--dump-resource-usage", binary.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.findall(rf"{name}:(\d+)", report)[0]) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local, done.metadata.shared / 1024


def main() -> int:
    """Print the table; 1 where a kernel spills or asks for more shared memory than there is."""
    warnings.filterwarnings("ignore")
    bad = 0
    print(
        f"Triton {triton.__version__}\n{'kernel':46s} chip  warps  registers  spilled  shared KiB"
    )
    for label, kernel, constants, warps in cases():
        for chip, most in CHIPS.items():
            registers, spilled, shared = resources(kernel, constants, warps, chip)
            fits = not spilled and shared <= most
            bad += not fits
            print(
                f"{label:46s} sm_{chip} {warps:5d} {registers:10d} {spilled:8d} {shared:11.1f} {'' if fits else 'TOO MUCH'}",
                flush=True,
            )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
