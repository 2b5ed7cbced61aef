"""Compile every kernel for its chips, without a GPU; print resources, and fail if one spills.

They are those in Triton, and what torch.compile makes of the pass between the products. It also
fails if a matrix product's loads are narrower than 16 bytes. `--only TEXT` compiles the kernels with
this text in their names; it may be given several times. Run it from the root of the repository, with
that in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # it would leave nothing to compile
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import epilogue
from lightning_hsu._core.near import NEAR
from lightning_hsu._core.triton import launch, nearby, pairs, scalars, topk
from lightning_hsu.measures import GaussianPotential, RieszEnergy

CHIPS = {80: 163, 90: 227}  # KiB of shared memory that a program may have
FORMULAS = sorted(
    {*scalars.SPECIAL.values(), *scalars.GENERAL.values()}, key=lambda scalar: scalar.__name__
)
KINDS = {
    "groups": "*i64",
    "tiles": "*i32",
    "blocks": "*i32",
    "alive": "*i32",
    "marks": "*i32",
    "coincident": "*i32",
    "near_energies": "*fp64",
    "columns": "*i32",
    "numbers": "*fp64",
    "living": "*i1",
    "number": "fp32",
    "n": "i32",
    "d": "i32",
}
"""Types of the kernels' arguments; the others are pointers to float32."""
GENERATED = {
    "chordal": RieszEnergy(),
    "chordal, half space": RieszEnergy(half_space=True),
    "logarithm": RieszEnergy(s=0),
    "gaussian": GaussianPotential(),
}
"""Measures for which torch.compile generates kernels."""
TILE = {"TILE": launch.TILE, "DEPTH": launch.DEPTH}
WIDE = ("pair_slopes tf32x3", "products tf32x3")
"""Kernels whose loads are 16 bytes wide.

Their tables hold multiples of 16. One product in TF32 on sm_90 wants an operand the other way round.
"""


class Case(NamedTuple):
    """One way to launch a kernel."""

    label: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    kinds: dict[str, str] = KINDS


def cases(wanted: Sequence[str]) -> Iterator[Case]:
    """The kernels with one of these texts in their names, in all the ways that they are launched."""
    for case in written_cases():
        if is_wanted(case.label, wanted):
            yield case
    yield from generated_cases(wanted)


def is_wanted(label: str, wanted: Sequence[str]) -> bool:
    """Whether one of these texts is in the name."""
    return any(text in label for text in wanted)


def written_cases() -> Iterator[Case]:
    """All kernels in Triton."""
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
    for scalar in FORMULAS:
        yield from near_cases(scalar)
    for energy in (False, True):
        constants = {"HALF_SPACE": True, "ENERGY": energy, "CHUNK": launch.SUMMED}
        label = "factors, logarithm" if energy else "factors"
        yield Case(label, nearby.factors, constants, launch.WARPS)
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


def near_cases(scalar: Any) -> Iterator[Case]:
    """The near pairs of one formula in both spaces."""
    for half_space in (False, True):
        constants = {
            "KERNEL": scalar,
            "HALF_SPACE": half_space,
            "DTYPE": launch.TL_DTYPES[torch.float32],
            "TILE": launch.TILE,
            "CHUNK": launch.CHUNK,
        }
        label = f"near_pulls {scalar.__name__}"
        if half_space:
            label += ", half space"
        yield Case(label, nearby.near_pulls, constants, launch.NEAR_WARPS)


def generated_cases(wanted: Sequence[str]) -> Iterator[Case]:
    """The kernels of torch.compile, with a size of blocks that it tries first.

    Those with other names are not generated.
    """
    for name, measure in GENERATED.items():
        term = measure.pair_term()
        assert term is not None
        for form in epilogue.SIZES:
            label = f"compiled {form} {name}"
            if not is_wanted(label, wanted):
                continue
            (source,) = epilogue.generated(term, form).sources
            kernel = generated_kernel(source, label)
            blocks = {"XBLOCK": 1024}
            if "R0_BLOCK" in kernel.arg_names:
                blocks = {"XBLOCK": 1, "R0_BLOCK": 1024}
            yield Case(label, kernel, blocks, 4, generated_kinds(source))


def generated_kernel(source: str, label: str) -> Any:
    """The kernel of a generated source, without what inductor puts around it to launch it."""
    lines = []
    is_kept = True
    for line in source.splitlines():
        if line.startswith("@triton_heuristics"):
            is_kept = False
        if line.startswith("@triton.jit"):
            is_kept = True
        if is_kept and not line.startswith("triton_helpers.set_driver_to_gpu"):
            lines.append(line)
    folder = tempfile.mkdtemp()  # Triton reads the source from a file
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "kernel.py"
    path.write_text("\n".join(lines))
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", label), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (name,) = re.findall(r"^def (\w+)", source, re.MULTILINE)
    return getattr(module, name)


def generated_kinds(source: str) -> dict[str, str]:
    """Types of the arguments of the kernel of a generated source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "triton_meta":
            assert isinstance(node.value, ast.Dict)
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "signature":
                    return dict(ast.literal_eval(value))
    raise ValueError(f"no signature in {source}")


class Resources(NamedTuple):
    """What a program uses: registers and spilled bytes of a thread, KiB of shared memory.

    And how many bytes the narrowest of its loads ahead of a matrix product moves; 0 without any.
    """

    registers: int
    spilled: int
    shared: float
    loaded: int


def resources(case: Case, chip: int) -> Resources:
    """Compile a kernel for a chip, and read what it uses; spilled registers are on the stack."""
    signature = {}
    aligned = {}
    for i, name in enumerate(case.kernel.arg_names):
        kind = "constexpr" if name in case.constants else case.kinds.get(name, "*fp32")
        signature[name] = kind
        if kind.startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=case.kernel, signature=signature, constexprs=case.constants, attrs=aligned
    )
    target = GPUTarget("cuda", chip, 32)
    options = {"num_warps": case.warps, "num_stages": 3}
    done = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(done.asm["cubin"])
        binary.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "--dump-resource-usage", binary.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for name in ("REG", "STACK", "LOCAL"):
        found[name] = int(re.findall(rf"{name}:(\d+)", report)[0])
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+)", done.asm["ptx"])
    loaded = min((int(copy, 16) for copy in copies), default=0)
    spilled = found["STACK"] + found["LOCAL"]
    return Resources(found["REG"], spilled, done.metadata.shared / 1024, loaded)


def main() -> int:
    """Print the table; return 1 if a kernel spills, loads little at once, or needs too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="a part of the kernels' names")
    wanted = parser.parse_args().only or [""]
    warnings.filterwarnings("ignore")
    bad = False
    print(f"Triton {triton.__version__}")
    print(f"{'kernel':46s} chip  warps  registers  spilled  shared KiB  bytes a load")
    for case in cases(wanted):
        for chip, most in CHIPS.items():
            registers, spilled, shared, loaded = resources(case, chip)
            fits = spilled == 0 and shared <= most
            is_wide = loaded >= 16 or not case.label.startswith(WIDE)
            bad |= not (fits and is_wide)
            verdict = "" if fits else "TOO MUCH"
            if not is_wide:
                verdict += "NARROW"
            numbers = f"{case.warps:5d} {registers:10d} {spilled:8d} {shared:11.1f} {loaded:13d}"
            print(f"{case.label:46s} sm_{chip} {numbers} {verdict}", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
