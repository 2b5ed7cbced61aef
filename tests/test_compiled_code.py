"""What the compiler makes of the kernels for a GPU that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kernel", ["products tf32x3", "pair_slopes tf32x3 chordal_two"])
def test_loads_ahead_of_a_product_are_16_bytes_wide(kernel):
    pytest.importorskip(
        "triton", minversion="3.2", reason="triton >= 3.2, an optional extra, is not installed"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, ".ci/compile_kernels.py", "--only", kernel]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(rf"{kernel}.* sm_(\d+) .* (\d+) *$", done.stdout, re.MULTILINE)
    chips = {chip: int(bytes_a_load) for chip, bytes_a_load in rows}
    assert chips == {"80": 16, "90": 16}
