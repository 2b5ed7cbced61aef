"""Reports on networks that others trained, from packages that ship their weights; needs a package index."""

import io
import json
import re
from pathlib import Path
from statistics import median

import pytest
import torch
from rich.console import Console

from lightning_hsu.measures import RieszEnergy
from lightning_hsu.report import report
from lightning_hsu.report.checkpoints import read_weights
from lightning_hsu.report.cli import main
from lightning_hsu.report.messages import in_options
from lightning_hsu.report.report_table import report_table
from lightning_hsu.report.tables import show
from tests.pretrained_picture import kind, picture
from tests.pretrained_table import (
    BEGIN,
    COLUMNS,
    END,
    NETWORKS,
    cells,
    install,
    report_on,
    row,
)

pytestmark = pytest.mark.pretrained

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "trained-networks.md").read_text(encoding="utf-8")
NAMED = {network.name: network for network in NETWORKS}
NUMBER = re.compile(r"\d[\d,]*\.?\d*")

# A head's neurons, and two neurons, are measured in full space.
FULL_SPACE = {
    "MiniLM-L6": ["embeddings.token_type_embeddings", "pooler.dense"],
    "EfficientNet-Lite0": ["_fc"],
    "MTCNN's O-Net": ["dense6_1", "dense6_3"],
    "Silero VAD": [],
    "Resemblyzer": ["linear"],
    "CREPE": ["classifier"],
    "FCPE": ["output_proj"],
    "PESTO": [],
    "LigandMPNN": ["W_out"],
    "ANARCII": ["decoder.fc_out"],
    "CHGNet": [],
}
SKIPPED = {
    "MiniLM-L6": ["embeddings.position_ids", "embeddings.word_embeddings"],
    "Silero VAD": [  # Fourier's basis is stored with the weights, and nothing has trained it
        "_model.decoder.decoder.2",
        "_model.stft.forward_basis_buffer",
        "_model_8k.decoder.decoder.2",
        "_model_8k.stft.forward_basis_buffer",
    ],
    "PESTO": [
        "confidence.conv",
        "confidence.linear",
        "encoder.fc",
        "encoder.layernorm",
        "encoder.layernorm.bias",
    ],
    "CHGNet": ["composition_model.fc", "mlp.layers.7", "site_wise"],
}


class Installed:
    """The networks in a folder, and a report on each that is made once.

    Args:
        folder: Where to install them.
    """

    def __init__(self, folder):
        self.folder = folder
        self.there = {network.name for network in install(folder)}
        self.reports = {}

    def path(self, name):
        """The file of a network; skips the test where its package is not there."""
        if name not in self.there:
            pytest.skip(f"{NAMED[name].package} has no wheel for this machine")
        return self.folder / NAMED[name].file

    def report(self, name):
        """The report on a network."""
        self.path(name)
        if name not in self.reports:
            self.reports[name] = report_on(NAMED[name], self.folder)
        return self.reports[name]

    def layers(self, name):
        """The layers of the report on a network, by name."""
        return {layer.name: layer for layer in self.report(name).layers}

    def ratios(self, name):
        """The ratios of a network's layers, by name."""
        return {layer.name: layer.ratio for layer in self.report(name).layers}

    def unit(self, name, weight):
        """A weight's neurons (n, d), as unit vectors in float64."""
        x = read_weights(self.path(name))[weight].flatten(1).double()
        return torch.nn.functional.normalize(x)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("packages"))


def page_lines():
    """The lines of the page's table and commands."""
    return PAGE.split(BEGIN)[1].split(END)[0].strip().splitlines()


def page_cells(name):
    """The row of a network on the page: a text for each of the columns."""
    (line,) = [line for line in page_lines() if line.startswith(f"| **{name}**")]
    return line.removeprefix("| ").removesuffix(" |").split(" | ")


def numbers(text):
    """The numbers in a text."""
    return [float(found.replace(",", "")) for found in NUMBER.findall(text)]


def at_edge(found):
    """How many layers lie where rounding decides whether they are as random: within 1 % of it.

    Energies in float32 differ by 1e-6 or so from one processor to another. One layer of Silero's
    has a ratio of 1.0099998.
    """
    return sum(abs(layer.ratio - 1.01) < 1e-5 for layer in found.layers)


@pytest.mark.parametrize("name", NAMED)
def test_a_row_of_the_page_is_what_is_measured(installed, name):
    """Printed by ``python -m tests.pretrained_table``."""
    found = installed.report(name)
    shown = page_cells(name)
    measured = cells(NAMED[name], found)
    assert len(shown) == len(measured)
    for column, text, wanted in zip(COLUMNS, measured, shown, strict=True):
        if column in ("above random", "as random"):
            assert int(text) == pytest.approx(int(wanted), abs=at_edge(found)), column
            continue
        assert NUMBER.sub("#", text) == NUMBER.sub("#", wanted), column
        # A last digit may be rounded the other way. Of 577,004 pairs a few are at the cosine itself.
        assert numbers(text) == pytest.approx(numbers(wanted), rel=1e-3, abs=0.011), column


def test_the_page_has_a_row_and_a_command_for_each_network():
    lines = page_lines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows[:2] == [row(COLUMNS), row(("---",) * len(COLUMNS))]
    assert [re.match(r"\| \*\*(.*?)\*\*", line)[1] for line in rows[2:]] == list(NAMED)
    commands = ["```bash"]
    for network in NETWORKS:
        commands += network.command.splitlines()
    assert lines[len(rows) :] == ["", *commands, "```"]


@pytest.mark.parametrize("name", NAMED)
def test_the_command_of_a_row_repeats_it(installed, name, tmp_path, monkeypatch, capsys):
    installed.path(name)
    (tmp_path / "nets").symlink_to(installed.folder)
    monkeypatch.chdir(tmp_path)
    line = NAMED[name].command.splitlines()[-1]
    program, *arguments = line.split()
    assert program == "lightning-hsu"
    assert main([*arguments, "--json", "found.json"]) == 0
    assert f"of {len(installed.report(name).layers)} layers" in capsys.readouterr().out
    layers = json.loads(Path("found.json").read_text())["layers"]
    again = {layer["name"]: layer["ratio"] for layer in layers}
    assert again == pytest.approx(installed.ratios(name), rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_the_picture_has_a_dot_for_each_layer(installed):
    found = {name: installed.report(name) for name in NAMED if name in installed.there}
    (ax,) = picture(found).axes
    drawn = torch.cat([torch.from_numpy(dots.get_offsets().data) for dots in ax.collections])
    wanted = []
    for line, name in enumerate(found):
        wanted += [[ratio, line] for ratio in installed.ratios(name).values()]
    torch.testing.assert_close(torch.tensor(sorted(drawn.tolist())), torch.tensor(sorted(wanted)))
    depthwise = [one for one in found["FCPE"].layers if kind(one) == "depthwise"]
    assert len(depthwise) == 6


@pytest.mark.parametrize("name", NAMED)
def test_heads_are_found_and_what_is_left_out_is_listed(installed, name):
    found = installed.report(name)
    assert [layer.name for layer in found.layers if layer.full_space] == FULL_SPACE[name]
    assert sorted(skip.name for skip in found.skips) == SKIPPED.get(name, [])
    assert all(layer.verdict != "unknown" for layer in found.layers)
    assert all(layer.sampled is None for layer in found.layers)


def test_linear_layers_of_minilm_are_within_one_percent_of_random(installed):
    found = installed.ratios("MiniLM-L6")
    linear = [ratio for name, ratio in found.items() if not name.startswith("embeddings.")]
    assert len(linear) == 37
    assert median(linear) == pytest.approx(1.0025, abs=5e-4)
    assert max(abs(ratio - 1.0) for ratio in linear) < 0.01  # 0.0073
    assert found["embeddings.position_embeddings"] == pytest.approx(1.12, abs=0.01)


def test_linear_layers_of_proteins_and_antibodies_are_nearly_as_random(installed):
    proteins = installed.ratios("LigandMPNN").values()
    assert max(proteins) == pytest.approx(1.034, abs=1e-3)
    antibodies = installed.ratios("ANARCII")
    heads = ("decoder.fc_out", "decoder.pos_embedding")
    assert max(r for name, r in antibodies.items() if name not in heads) < 1.11  # 1.101
    labels = installed.unit("ANARCII", "decoder.fc_out.weight")
    # 0.361; of 136 random ones it is 0.086.
    assert float(labels.mean(0).norm()) > 0.3


def test_convolutions_of_crepe_are_as_random(installed):
    found = installed.ratios("CREPE")
    head = found.pop("classifier")
    assert len(found) == 6
    assert max(found.values()) == found["conv1"] == pytest.approx(1.0064, abs=2e-4)
    assert head == pytest.approx(1.756, abs=1e-3)


@pytest.mark.parametrize("weight", ["encoder.pos_embedding", "decoder.pos_embedding"])
def test_position_embeddings_follow_a_curve(installed, weight):
    u = installed.unit("ANARCII", f"{weight}.weight")
    cosines = u @ u.T
    others = (cosines.sum() - len(u)) / len(u) / (len(u) - 1)
    assert float(cosines.diagonal(1).mean()) > 10 * float(others)  # .53 and .24; .019 and .010


def test_depthwise_filters_of_efficientnet_are_duplicates_and_some_are_dead(installed):
    found = installed.report("EfficientNet-Lite0")
    assert len(found.layers) == 50
    assert sum(one.uniformity.ratio > 1.02 for one in found.layers) == 21
    assert sum(one.similar for one in found.layers) == pytest.approx(577_000, abs=500)
    worst = max(found.layers, key=lambda one: one.uniformity.ratio)
    assert worst.name == "_blocks.15._depthwise_conv"
    assert worst.uniformity.ratio == pytest.approx(55.9, abs=0.1)
    assert all("_depthwise_conv" in one.name for one in found.layers if one.uniformity.ratio > 1.3)
    assert sum(one.uniformity.dead for one in found.layers) == 5  # all zero
    # Shorter than 1e-4 of the median: the next is at 1.7e-2.
    assert sum(one.dead for one in found.layers) == 130
    weights = read_weights(installed.path("EfficientNet-Lite0")).values()
    lengths = torch.cat([x.flatten(1).norm(dim=1) for x in weights if x.ndim > 1])
    assert int((lengths < 1e-8).sum()) == 24


def test_a_dead_channel_of_efficientnet_is_dead_in_two_layers(installed):
    dead = {}
    for layer in installed.report("EfficientNet-Lite0").layers:
        if layer.dead:
            dead[layer.name] = layer.dead_rows
    makers = [name for name in dead if "_depthwise_conv" not in name]
    filters = [name for name in dead if "_depthwise_conv" in name]
    assert makers[0] == "_conv_stem"  # before the first block, which expands nothing
    assert [name.replace("depthwise", "expand") for name in filters[1:]] == makers[1:]
    assert [dead[name] for name in makers] == [dead[name] for name in filters]
    assert sum(len(dead[name]) for name in makers) == 65


def test_depthwise_filters_are_close_to_one_blur(installed):
    u = installed.unit("EfficientNet-Lite0", "_blocks.15._depthwise_conv.weight")
    _, singular_values, directions = torch.linalg.svd(u, full_matrices=False)
    squares = singular_values.square()
    assert float(squares[0] / squares.sum()) == pytest.approx(0.903, abs=1e-3)
    assert bool((directions[0] > 0).all()) or bool((directions[0] < 0).all())


def test_depthwise_filters_of_fcpe_crowd_and_the_layers_between_them_do_not(installed):
    found = installed.ratios("FCPE")
    head = found.pop("output_proj")
    depthwise = [ratio for name, ratio in found.items() if name.endswith(".conv")]
    others = [ratio for name, ratio in found.items() if not name.endswith(".conv")]
    assert len(depthwise) == 6
    assert min(depthwise) == pytest.approx(1.444, abs=2e-3)
    assert max(depthwise) == pytest.approx(8.767, abs=0.01)
    assert max(others) == pytest.approx(1.025, abs=1e-3)
    assert head == pytest.approx(1.897, abs=2e-3)


@pytest.mark.parametrize(("name", "head"), [("CREPE", "classifier"), ("FCPE", "output_proj")])
def test_near_duplicates_of_a_head_for_pitch_are_neighbouring_pitches(installed, name, head):
    found = installed.layers(name)[head]
    assert "360 x" in found.shape
    assert len(found.pairs) >= 33
    assert max(pair.second - pair.first for pair in found.pairs) <= 4


def test_crowded_layers_need_no_duplicates(installed):
    found = installed.layers("PESTO")["encoder.prefilt_layers.1.0"]
    assert found.ratio == pytest.approx(1.514, abs=2e-3)
    assert found.similar == 0
    assert found.uniformity.min_angle == pytest.approx(34.0, abs=0.1)


def test_three_neurons_may_be_crowded_by_chance(installed):
    found = max(installed.report("PESTO").layers, key=lambda layer: layer.ratio)
    assert found.shape == "3 x 10"
    assert found.ratio == pytest.approx(1.554, abs=2e-3)
    assert found.verdict == "random"


def test_what_crowds_in_chgnet(installed):
    found = installed.ratios("CHGNet")
    first = [ratio for name, ratio in found.items() if "_conv_" in name and "s.0" in name[-3:]]
    last = [ratio for name, ratio in found.items() if "mlp_core.layers.3" in name]
    assert len(first) == 14
    assert max(first) < 1.021  # 1.0202
    assert len(last) == 7
    assert sum(ratio > 1.2 for ratio in last) == 6
    assert max(found.values()) == max(last) == pytest.approx(3.158, abs=5e-3)
    assert max(layer.similar for layer in installed.report("CHGNet").layers) == 107


def test_recurrent_layers_are_a_few_percent_above_random(installed):
    voices = installed.ratios("Resemblyzer")
    assert max(voices.values()) == pytest.approx(1.123, abs=1e-3)
    speech = installed.ratios("Silero VAD")
    assert median(speech.values()) == pytest.approx(1.02, abs=0.015)
    assert max(r for name, r in speech.items() if ".rnn." in name) < 1.03  # 1.028


def test_heads_of_two_classes_are_antipodal_and_right_in_full_space(installed):
    folder = installed.path("MTCNN's O-Net").parent
    found = {path.name: report(path) for path in sorted(folder.glob("*net.pt"))}
    first = []
    for each in found.values():
        first.append(next(one.ratio for one in each.layers if one.name == "conv1"))
    assert list(found) == ["onet.pt", "pnet.pt", "rnet.pt"]
    assert first == pytest.approx([1.659, 1.005, 1.266], abs=2e-3)
    for file, layer, energy in (("rnet.pt", "dense5_1", 66856.9), ("onet.pt", "dense6_1", 14023.7)):
        head = next(one for one in found[file].layers if one.name == layer)
        assert head.full_space
        assert head.uniformity.min_angle > 179.5
        # The least that two neurons can have.
        assert head.uniformity.energy == pytest.approx(0.25, abs=1e-4)
        x = read_weights(folder / file)[f"{layer}.weight"]
        half = RieszEnergy(s=2, half_space=True, softening=0)(x.double())
        assert float(half) == pytest.approx(energy, abs=0.1)  # their lines coincide


def test_the_readme_shows_what_is_printed(installed, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"\$ lightning-hsu report onet.pt.*?\n(.*?)```", readme, re.DOTALL).group(1)
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr("rich.console.Console", lambda *args, **kwargs: console)
    show(report_table(installed.report("MTCNN's O-Net")).reworded(in_options))
    printed = [line.rstrip() for line in console.export_text().splitlines()]
    assert [*printed, "wrote onet.html"] == shown.strip().splitlines()
