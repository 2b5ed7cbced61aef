"""The parts of the benchmark for a GPU that train other libraries' models, in miniature."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.models

ROOT = Path(__file__).parents[2]
# The package of these tests declares what torchvision's import needs; parts are forks of the process.
START = """
import sys
import tests.real_models
from benchmarks.gpu.__main__ import main
sys.exit(main())
"""
RIVALS = ["no penalty", "exact", "exact", "tolerance 0.05"]


def test_real_models_are_trained_by_every_rival(tmp_path):
    arguments = "--all", "--device", "cpu", "--quick", "--only", "steps", "--out", str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", START, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    models = ["ResNet-50", "GPT-2 small", "ViT-B/16"]
    assert set(parts) == {
        *(f"real steps: {name}" for name in models),
        "a Trainer's steps: ResNet-50",
    }
    for part in parts.values():
        assert part["status"] == "done", part
        assert part["rows"]
    for name in models:
        rows = parts[f"real steps: {name}"]["rows"]
        assert [row["step"] for row in rows] == RIVALS
        assert not any("error" in row for row in rows)
