"""The demo as `make demo` runs it, shortened: two seeds, two epochs, its arms, table, picture and message."""

import gzip
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

PROGRESS = (
    r"^ ?\d+/6 +\d+ s  (?:20 % wrong|clean) labels +seed \d (?:without|with|control) "
    r"+error +\d+\.\d\d % .*"
)
ROW = r"{} +{} x {} +\d\.\d\d( +\d+\.\d\d){{3}}( +\d+\.\d°){{3}}"

pytestmark = [
    pytest.mark.usefixtures("shipped_defaults"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning"),
]


@pytest.fixture
def demo(monkeypatch):
    from notebooks import demo

    monkeypatch.setattr(demo, "SEEDS", range(2))
    monkeypatch.setattr(
        demo, "PLANS", {name: replace(plan, epochs=2) for name, plan in demo.PLANS.items()}
    )
    chatter = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = chatter.level
    yield demo
    chatter.setLevel(level)


def run(demo, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    return demo.main()


def test_table_picture_and_logs(demo, monkeypatch, capsys):
    assert run(demo, monkeypatch) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(PROGRESS, printed, re.MULTILINE)) == 12
    assert "\r" not in printed  # a log file is as readable as a terminal
    for name, n, d in (("hidden1", 64, 40), ("hidden4", 64, 64), ("hidden1", 64, 64)):
        assert len(re.findall(ROW.format(name, n, d), printed)) == 1  # of one of the data
    for name, n, d in (("hidden2", 64, 64), ("head", 10, 64)):
        assert len(re.findall(ROW.format(name, n, d), printed)) == 2  # of both
    table = "".join(re.findall(r"ratio to random.*?Picture", printed, re.DOTALL))
    for arm in ("without", "with", "control"):
        assert len(re.findall(rf"test error {arm} +\d+\.\d\d % ± \d", table)) == 2
    for other in ("without", "control"):
        verdict = rf"with - {other} .* of 2 seeds, p (< )?\.\d\d+: (null|gain|worse)"
        assert len(re.findall(verdict, table)) == 2
    lines = [*table.splitlines(), *re.findall(PROGRESS, printed, re.MULTILINE)]
    assert max(len(line) for line in lines) <= 80
    for name in ("mnist1d", "digits"):
        folder = Path("out/demo") / name
        assert folder.with_suffix(".png").stat().st_size > 50_000
        assert len(list((folder / "csv").rglob("metrics.csv"))) == 6
        assert len(list((folder / "tensorboard").rglob("events*"))) == 6


@pytest.fixture
def batches(monkeypatch):
    """The batches that networks train on, in order."""
    from notebooks.demo_train import Network

    seen = []
    step = Network.training_step

    def training_step(network, batch, number):
        seen.append(batch)
        return step(network, batch, number)

    monkeypatch.setattr(Network, "training_step", training_step)
    return seen


def test_arms_share_weights_batches_and_wrong_labels_and_the_control_repeats(
    demo, batches, tmp_path
):
    from evidence.data import draw, load
    from notebooks.demo_train import fit

    data = load("digits")
    plan = demo.PLANS["digits"]
    settings = demo.CHOSEN["digits"][0]
    outcomes = []
    for run, arm in enumerate(("without", "with", "control", "control")):
        outcomes.append(fit(data, plan, settings, 3, tmp_path / str(run), arm=arm))
    without, penalised, control, again = outcomes
    steps = len(batches) // 4
    assert steps == plan.epochs * plan.images // 50
    for start in range(steps, 4 * steps, steps):
        torch.testing.assert_close(batches[start : start + steps], batches[:steps], rtol=0, atol=0)
    clean = draw(data, 3, plan.images, 400).labels
    labels = torch.cat([labels for _, labels in batches[: steps // plan.epochs]])
    assert (labels.bincount() != clean.bincount()).any()
    for name, (before, after) in without.weights.items():
        for other in (penalised, control):
            assert torch.equal(other.weights[name][0], before)
            assert not torch.equal(other.weights[name][1], after)
        assert not torch.equal(penalised.weights[name][1], control.weights[name][1])
        assert torch.equal(control.weights[name][1], again.weights[name][1])


def idx(values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(
        size.to_bytes(4, "big") for size in values.shape
    )
    return header + bytes(values.flatten().tolist())


def own(folder, count):
    """A folder with so many training images, and 100 test images."""
    folder.mkdir()
    for part, size in (("train", count), ("t10k", 100)):
        images, labels = torch.randint(256, (size, 4, 4)), torch.arange(size) % 10
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def test_too_few_images_of_ones_own_are_told(demo, monkeypatch, capsys, tmp_path):
    folder = own(tmp_path / "few", 900)
    assert run(demo, monkeypatch, "--data", str(folder)) == 2
    told = capsys.readouterr().err
    assert "few has 900 training images; the demo takes more than 1000" in told


def test_a_folder_of_ones_own(demo, monkeypatch, capsys, tmp_path):
    folder = own(tmp_path / "mine", 1200)
    assert run(demo, monkeypatch, "--data", str(folder)) == 0
    printed = capsys.readouterr().out
    assert "mine: a ReLU network 16-64-64-10" in printed
    assert "1000 training images, 100 test images" in printed
    assert "on other seeds of fashion-mnist (--tune)" in printed


def test_missing_data_are_told_with_the_ways_out(demo, monkeypatch, capsys):
    assert run(demo, monkeypatch, "--data", "nowhere") == 2
    message = capsys.readouterr().err
    assert "No data in nowhere: missing train-images-idx3-ubyte" in message
    assert "apt-get install dataset-fashion-mnist" in message
    assert "make demo DATA=/your/folder" in message
