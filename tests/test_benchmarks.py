"""What can be told of the GPU benchmark without a GPU, and that of trainings in miniature."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks import large_file, trainings
from benchmarks.gpu import stand_in
from benchmarks.gpu.table import page, verdict

ROOT = Path(__file__).parents[1]


def run(*arguments):
    """Run Python in a process of its own, from the root."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_the_benchmark_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stand_in.run(1, quick=True) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "giga"), [("ResNet-18", 1.81), ("ResNet-50", 4.1)])
def test_the_stand_in_for_a_step_has_the_model_s_flop(name, giga):
    """Published for one image: 1.81 and 4.1 billion multiplications and additions."""
    shapes = stand_in.MODELS[name]()
    found = sum(stand_in.rows_of(name, n, d) / 256 * n * d for n, d in shapes)
    assert found == pytest.approx(giga * 1e9, rel=0.06)


PARTS = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.parts import parts as _  # imports here what forks would import
from benchmarks.gpu.machine import suit_interpreter
from benchmarks.gpu.runner import LacksError, NeedsCardError, Part, Settings, run

suit_interpreter()

def raises(report):
    report.row(case="first", right=True)
    raise ValueError("this one fails")

def dies(report):
    report.row(case="second", right=True)
    os._exit(7)

def hangs(report):
    report.row(case="third", right=True)
    time.sleep(60)

def lacks(report):
    raise LacksError("torchvision not installed")

def needs(report):
    raise NeedsCardError("it is fast only there")

def goes(report):
    report.row(case="last", right=True, seconds_left=report.seconds_left > 1)

parts = [
    Part("raises", raises, 0, 9), Part("dies", dies, 0, 9), Part("hangs", hangs, 0, 2),
    Part("lacks", lacks, 0, 9), Part("needs", needs, 0, 9), Part("long", goes, 1000, 2000),
    Part("goes", goes, 0, 9),
]
sys.exit(run(parts, Settings("cpu", True, Path(sys.argv[1]), 60.0)))
"""


@pytest.mark.any_cpu
def test_a_part_that_fails_crashes_or_hangs_leaves_the_others_alone(tmp_path):
    done = run("-W", "ignore", "-c", PARTS, tmp_path)
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "raises": "failed",
        "dies": "failed",
        "hangs": "stopped",
        "lacks": "missing",
        "needs": "needs a card",
        "long": "skipped",
        "goes": "done",
    }
    assert "ValueError: this one fails" in found["raises"]["traceback"]
    assert "exit code 7" in found["dies"]["traceback"]
    for name, case in (("raises", "first"), ("dies", "second"), ("hangs", "third")):
        assert found[name]["rows"] == [{"case": case, "right": True}]  # what it had found by then
    assert "it needs 1000" in found["long"]["notes"][0]
    table = (tmp_path / "results.md").read_text()
    assert "| last | True | True |" in table
    assert "torchvision not installed" in table


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"status": "done", "rows": [{"case": "near", "right": False}]}, "1 wrong of 1: near"),
        ({"status": "failed", "rows": []}, "'check' is failed"),
        ({"status": "stopped", "rows": [{"case": "near", "right": True}]}, "'check' is stopped"),
    ],
)
def test_timings_of_a_back_end_that_is_wrong_are_void(found, reason):
    timed = {"status": "done", "rows": [{"back end": "triton", "ms": 1.0}], "notes": []}
    results = {"check": found | {"notes": []}, "times": timed}
    void = verdict(results, {"check": "triton", "times": None})
    assert void == {"triton": reason}
    settings = {"device": "cuda", "quick": False}
    text = page({"settings": settings, "void": void, "parts": results})
    assert "timings of the back end triton are VOID" in text
    assert "| triton (VOID) | 1 |" in text


def test_a_back_end_that_is_right_keeps_its_timings():
    right = {"status": "done", "rows": [{"case": "near", "right": True}], "notes": []}
    assert verdict({"check": right}, {"check": "triton"}) == {}


@pytest.mark.any_cpu
def test_without_a_card_it_says_so_and_ends(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run("-m", "benchmarks.gpu", "--all", "--out", tmp_path)
    assert done.returncode == 2, done.stderr
    assert "torch sees no CUDA device here" in done.stdout
    assert len(json.loads((tmp_path / "results.json").read_text())["parts"]) == 1


@pytest.mark.slow
def test_parts_run_in_miniature_on_a_cpu(tmp_path):
    """All of them do in ``make bench QUICK=--quick``, which CI runs."""
    chosen = ["machine", "correctness: torch", "correctness: cudagraph", "Trainer against"]
    only = [text for name in chosen for text in ("--only", name)]
    done = run(
        "-m", "benchmarks.gpu", "--all", "--device", "cpu", "--quick", "--out", tmp_path, *only
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads((tmp_path / "results.json").read_text())
    assert whole["void"] == {}
    parts = whole["parts"]
    for name in ("machine", "correctness: torch", "Trainer against a plain loop"):
        assert parts[name]["status"] == "done"
        assert parts[name]["rows"]
    cases = {(row["case"], row["space"]) for row in parts["correctness: torch"]["rows"]}
    assert len(cases) == 22
    assert parts["correctness: cudagraph"]["status"] == "needs a card"
    (compared,) = parts["Trainer against a plain loop"]["rows"]
    assert compared["moved by the penalty"] > 100 * compared["off from float64"] > 0


@pytest.mark.parametrize("name", ["transformer", "ResNet-18"])
def test_the_rivals_of_a_training_add_the_same(name):
    """At a first step no gradient is old; queries, keys and values are three layers for each."""
    training = next(one for one in trainings.trainings(quick=True) if name in one.name)
    torch.manual_seed(0)
    model = training.model()
    optimizer = training.optimizer(model)
    inputs, targets = training.batches()(0)
    penalties = trainings.Penalties(model, optimizer)
    torch.nn.functional.cross_entropy(model(inputs), targets).backward()
    before = [p.grad.clone() for p in penalties.layers]
    assert penalties.seconds(0).keys() == set(trainings.RIVALS)
    assert len(penalties.errors()) == len(penalties.exact.layers)
    assert max(penalties.errors()) < 1e-6
    for exact, peer in zip(penalties.grads["exact"], penalties.grads["wo"], strict=True):
        assert (peer - exact).norm() < 1e-4 * exact.norm()  # measured: 2e-6
    penalties.add()
    for p, task, exact in zip(penalties.layers, before, penalties.grads["exact"], strict=True):
        torch.testing.assert_close(p.grad, task + exact)


def test_the_rows_of_a_training_tell_whether_its_goals_are_met():
    training = trainings.Training("one", None, None, None, 150)
    found = trainings.Found(errors=[[0.01, 0.04]] * 147 + [[0.2, 0.2]] * 3, recomputed=[0.5, 0.1])
    found.weights, found.kept, found.task = 100, 102, [1.0] * 150
    for step in range(150):
        found.seconds["tolerance"][step] = 0.4 if step < 100 else 0.11
        found.seconds["exact"][step] = 0.5
    for step in range(0, 150, 10):
        found.seconds["wo"][step] = 1.0
    rows = {row["what"]: row for row in trainings.rows_of(training, found)}
    assert rows["wo over tolerance, first 100 steps"]["median"] == pytest.approx(2.5)
    assert rows["exact over tolerance, after them"]["max"] == pytest.approx(4.545)
    verdicts = {what: row["verdict"] for what, row in rows.items() if row["goal"]}
    assert verdicts == {
        "wo over tolerance, first 100 steps": "missed",
        "wo over tolerance, after them": "missed",
        "stale error, median": "met",
        "stale error, 99th percentile": "missed",
    }


def test_a_file_as_a_llama_s_is_reported_whole(tmp_path, capsys):
    shapes = large_file.shapes_of(blocks=2, width=16, inner=24, words=40)
    large_file.write(tmp_path, shapes)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == set(shapes)
    found = large_file.measured(tmp_path)
    assert (found["exit code"], found["layers"], found["with the two rows"]) == (0, 16, 16)
