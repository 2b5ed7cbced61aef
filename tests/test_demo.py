"""The demo as `make demo` runs it, shortened: two seeds, two epochs, its table, its picture and its message."""

import gzip
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

PROGRESS = r"^ \d/8 +\d+ s  (no|with) penalty .* test error +\d+\.\d\d %"
ROW = r"{} +{} x {} +1\.\d\d +\d+\.\d\d +\d+\.\d\d +\d+\.\d° +\d+\.\d°"

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
    assert len(re.findall(PROGRESS, printed, re.MULTILINE)) == 8
    assert "\r" not in printed  # a log file is as readable as a terminal
    for name, n, d in (("hidden1", 64, 64), ("hidden2", 64, 64), ("head", 10, 64)):
        assert len(re.findall(ROW.format(name, n, d), printed)) == 2  # at both scales
    assert len(re.findall(r"test error with, +2 seeds +\d+\.\d\d % ± \d", printed)) == 2
    assert len(re.findall(r"lower on \d of 2 seeds: (null|gain|worse)", printed)) == 2
    assert Path("out/demo/demo.png").stat().st_size > 50_000
    assert len(list(Path("out/demo/digits/csv").rglob("metrics.csv"))) == 8
    assert len(list(Path("out/demo/digits/tensorboard").rglob("events*"))) == 8


def idx(values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(
        size.to_bytes(4, "big") for size in values.shape
    )
    return header + bytes(values.flatten().tolist())


def test_a_folder_of_ones_own(demo, monkeypatch, capsys, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for part, count in (("train", 1200), ("t10k", 100)):
        images, labels = torch.randint(256, (count, 4, 4)), torch.arange(count) % 10
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    assert run(demo, monkeypatch, "--data", str(folder)) == 0
    assert (
        "mine: a ReLU network 16-64-64-10, 1000 training images, 100 test images"
        in capsys.readouterr().out
    )


def test_missing_data_are_told_with_the_ways_out(demo, monkeypatch, capsys):
    assert run(demo, monkeypatch, "--data", "nowhere") == 2
    message = capsys.readouterr().err
    assert "No data in nowhere: missing train-images-idx3-ubyte" in message
    assert "apt-get install dataset-fashion-mnist" in message
    assert "make demo DATA=/your/folder" in message
