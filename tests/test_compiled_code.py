"""What the compiler makes of the kernels for a GPU that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_cpu

ROOT = Path(__file__).parents[1]


KERNELS = ("products tf32x3", "pair_slopes tf32x3 chordal_two")


@pytest.fixture(scope="module")
def compiled():
    """What the compiler prints of the kernels, in a process of its own: one start for all of them."""
    pytest.importorskip(
        "triton", minversion="3.2", reason="triton >= 3.2, an optional extra, is not installed"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, ".ci/compile_kernels.py"]
    for kernel in KERNELS:
        command += ["--only", kernel]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kernel", KERNELS)
def test_loads_ahead_of_a_product_are_16_bytes_wide(kernel, compiled):
    rows = re.findall(rf"{kernel}.* sm_(\d+) .* (\d+) *$", compiled, re.MULTILINE)
    chips = {chip: int(bytes_a_load) for chip, bytes_a_load in rows}
    assert chips == {"80": 16, "90": 16}
