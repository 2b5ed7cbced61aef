"""Compile every kernel for its chips, without a GPU; print resources, and fail if one spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
KINDS = {
    "groups": "*i64",
    "tiles": "*i32",
    "blocks": "*i32",
    "alive": "*i32",
    "near_tiles": "*i32",
    "columns": "*i32",
    "numbers": "*fp64",
    "living": "*i1",
    "number": "fp32",
    "n": "i32",
    "d": "i32",
}
"""Types of the kernels' arguments; the others are pointers to float32."""
TILE = {"TILE": launch.TILE, "DEPTH": launch.DEPTH}


class Case(NamedTuple):
    """One way to launch a kernel."""

    label: str
    kernel: Any
    constants: dict[str, Any]
    warps: int


def cases() -> Iterator[Case]:
    """All kernels in all the ways that they are launched."""
    for kernel in (pairs.unit_rows, pairs.additions):
        for dtype in launch.TL_DTYPES.values():
            constants = {"DTYPE": dtype, "ROWS": launch.ROWS, "COLS": launch.COLS}
            yield Case(f"{kernel.__name__} {dtype}", kernel, constants, launch.WARPS)
    for precision in ("tf32x3", "tf32"):
        constants = {"PRECISION": precision, "WIDTH": launch.TILE, **TILE}
        yield Case(f"products {precision}", pairs.products, constants, launch.WARPS)
    for scalar in FORMULAS:
        yield from slope_cases("tf32x3", scalar)
    yield from slope_cases("tf32", scalars.chordal_two)
    for every in (False, True):
        constants = {"HALF_SPACE": True, "EVERY": every, "PRECISION": "tf32x3", **topk.TILES}
        label = "largest_two, every" if every else "largest_two"
        yield Case(label, topk.largest_two, constants, topk.WARPS)


def slope_cases(precision: str, scalar: Any) -> Iterator[Case]:
    """The slopes of one formula in both spaces."""
    for half_space in (False, True):
        constants = {
            "KERNEL": scalar,
            "HALF_SPACE": half_space,
            "ENERGY": "gaussian" in scalar.__name__,
            "NEAR": NEAR,
            "PRECISION": precision,
            **TILE,
        }
        label = f"pair_slopes {precision} {scalar.__name__}"
        if half_space:
            label += ", half space"
        yield Case(label, pairs.pair_slopes, constants, launch.WARPS)


class Resources(NamedTuple):
    """What a program uses: registers and spilled bytes of a thread, KiB of shared memory."""

    registers: int
    spilled: int
    shared: float


def resources(case: Case, chip: int) -> Resources:
    """Compile a kernel for a chip, and read what it uses; spilled registers are on the stack."""
    signature = {}
    aligned = {}
    for i, name in enumerate(case.kernel.arg_names):
        kind = "constexpr" if name in case.constants else KINDS.get(name, "*fp32")
        signature[name] = kind
        if kind.startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=case.kernel, signature=signature, constexprs=case.constants, attrs=aligned
    )
    target = GPUTarget("cuda", chip, 32)
    done = triton.compile(source, target=target, options={"num_warps": case.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(done.asm["cubin"])
        binary.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "--dump-resource-usage", binary.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for name in ("REG", "STACK", "LOCAL"):
        found[name] = int(re.findall(rf"{name}:(\d+)", report)[0])
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], done.metadata.shared / 1024)


def main() -> int:
    """Print the table; return 1 if a kernel spills or asks for more shared memory than there is."""
    warnings.filterwarnings("ignore")
    bad = False
    print(f"Triton {triton.__version__}")
    print(f"{'kernel':46s} chip  warps  registers  spilled  shared KiB")
    for case in cases():
        for chip, most in CHIPS.items():
            registers, spilled, shared = resources(case, chip)
            fits = spilled == 0 and shared <= most
            bad |= not fits
            verdict = "" if fits else "TOO MUCH"
            numbers = f"{case.warps:5d} {registers:10d} {spilled:8d} {shared:11.1f}"
            print(f"{case.label:46s} sm_{chip} {numbers} {verdict}", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
