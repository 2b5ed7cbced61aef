"""Reports on models, state dicts and files; their words, their tables, the command line."""

import datetime
import functools
import io
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

import lightning_hsu
from lightning_hsu import UniformityRegularizer, reference
from lightning_hsu._core.tails import angles_at, random_layers
from lightning_hsu._monitor.measure import LayerUniformity, measure_neurons
from lightning_hsu._monitor.text import RULE, SCORE, finding, number, verdict
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu.measures import GaussianPotential, KoLeo, RieszEnergy, Separation
from lightning_hsu.reference import random_expectation, random_level, random_range
from lightning_hsu.report import compare, report
from lightning_hsu.report.cli import main
from lightning_hsu.report.measure_names import parse_measure
from lightning_hsu.report.messages import in_options
from lightning_hsu.report.report_table import report_table
from lightning_hsu.report.tables import abbreviated, plain, show

ENERGY = RieszEnergy(s=2.0, half_space=True)


def network():
    """Two hidden layers with what a report is to find, a depthwise convolution, a head."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3),
        nn.Conv2d(24, 24, 3, groups=24),
        nn.Flatten(),
        nn.Linear(40, 64),
        nn.Linear(64, 10),
    )
    with torch.no_grad():
        model[0].weight[5] = 2.0 * model[0].weight[3]
        model[3].weight[7] = -3.0 * model[3].weight[11]
        model[3].weight[20] = 0.0
        model[3].weight[21] *= 1e-6
    return model


def test_numbers_are_those_of_the_monitor():
    model = network()
    found = report(model)
    monitor = UniformityRegularizer(ENERGY, coefficient=0.0).attach(model)
    wanted = {one.name: one for one in monitor.measure_layers()}
    assert [one.name for one in found.layers] == ["0", "1", "3", "4"]  # the depthwise one, too
    for one in found.layers:
        if one.name != "1":
            assert one.uniformity == wanted[one.name]


def test_what_it_finds():
    first, depthwise, second, head = report(network()).layers
    assert [(pair.first, pair.second) for pair in first.pairs] == [(3, 5)]
    assert first.finding.endswith("2 neurons in 1 near-duplicate group")
    assert (
        depthwise.uniformity.groups,
        depthwise.uniformity.neurons,
        depthwise.uniformity.dimension,
    ) == (1, 24, 9)
    assert (second.similar, second.opposite) == (1, 1)
    assert second.pairs[0][:3] == (0, 7, 11)
    assert second.pairs[0].angle == pytest.approx(180.0)
    assert (second.dead, second.dead_rows, second.uniformity.dead) == (2, (20, 21), 1)
    assert second.finding.endswith("2 neurons in 1 near-duplicate group, 2 dead")
    assert head.finding == "as random"
    assert head.full_space


def test_a_model_its_state_dict_and_its_files_agree(tmp_path):
    model = network()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "a.safetensors")
    wanted = report(model).layers
    files = (tmp_path / "a.pt", str(tmp_path / "a.safetensors"), tmp_path)
    for source in (model.state_dict(), *files):
        for found, layer in zip(report(source).layers, wanted, strict=True):
            assert (found.name, found.finding) == (layer.name, layer.finding)
            assert found.uniformity.energy == pytest.approx(layer.uniformity.energy, rel=1e-6)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch traces up to Python 3.13")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of TorchScript
def test_a_model_and_its_torchscript_agree(tmp_path):
    model = network()
    with torch.jit.optimized_execution(True):
        traced = torch.jit.trace(model[3:], torch.randn(1, 40))
    traced.save(str(tmp_path / "b.pt"))
    wanted = [layer.finding for layer in report(model).layers[2:]]
    assert [layer.finding for layer in report(tmp_path / "b.pt").layers] == wanted


READS_EVERYTHING = hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint")


def lightning_checkpoint(folder):
    """A model and its checkpoint, which holds objects that no reader without code knows."""

    class Model(BoringModel):
        def __init__(self, width, settings):
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Sequential(nn.Linear(32, width), nn.Linear(width, 2))

    model = Model(
        48,
        settings={
            "when": datetime.date(2020, 1, 1),
            "path": Path("x"),
            "call": functools.partial(print, 1),
        },
    )
    trainer = Trainer(
        max_steps=1,
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model)
    trainer.save_checkpoint(folder / "last.ckpt")
    return model, folder / "last.ckpt"


@pytest.mark.skipif(READS_EVERYTHING, reason="torch 2.6 leaves objects in a file empty")
def test_a_checkpoint_with_objects_is_refused_where_torch_cannot_leave_them_empty(tmp_path):
    _, path = lightning_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read without running code from it.*report"):
        report(path)


@pytest.mark.skipif(not READS_EVERYTHING, reason="before torch 2.6 objects cannot be left empty")
def test_a_checkpoint_of_lightning(tmp_path):
    model, path = lightning_checkpoint(tmp_path)
    found = report(path)
    assert [one.name for one in found.layers] == ["layer.0", "layer.1"]
    wanted = report(model).layers[0].uniformity.energy
    assert found.layers[0].uniformity.energy == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("neurons", "words"),
    [
        (torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), "as random"),
        (
            torch.randn(4, 256, generator=torch.Generator().manual_seed(0)),
            "as random",
        ),  # 4 % above, as random ones may be
        (torch.eye(32), "more even than random"),
        (
            torch.eye(256, 2304),
            "more even than random (score 1.00)",
        ),  # the optimum, 0.4 % below random
        (torch.ones(8, 16) + 0.3 * torch.eye(8, 16), "x random"),
        (torch.zeros(4, 8), "fewer than two live neurons, 4 dead"),
        (torch.cat([torch.zeros(3, 8), torch.ones(1, 8)]), "fewer than two live neurons, 3 dead"),
        (torch.cat([torch.full((1, 32), math.nan), torch.eye(32)]), "1 NaN or infinite"),
    ],
)
def test_words(neurons, words):
    assert words in finding(measure_neurons("a", neurons[None], ENERGY), ENERGY)


@pytest.mark.parametrize(
    ("ratio", "score", "words"),
    [
        (1.009, -3.0, "as random"),
        (1.011, -3.0, "1.01x random"),
        (0.995, 0.49, "as random"),
        (0.995, 0.51, "more even"),
    ],
)
def test_where_words_begin(ratio, score, words):
    layer = measure_neurons("a", torch.randn(1, 64, 32), ENERGY)
    layer = replace(layer, ratio=ratio, score=score, energy=10.0)  # beyond what is random
    assert finding(layer, ENERGY).startswith(words)


def test_the_range_is_that_of_the_mean_over_groups():
    layer = measure_neurons("a", torch.randn(16, 8, 27), ENERGY)
    high = random_range(ENERGY, 8, 27, 16)[1]
    assert finding(replace(layer, ratio=1.05, energy=0.999 * high), ENERGY) == "as random"
    assert finding(replace(layer, ratio=1.05, energy=1.001 * high), ENERGY) == "1.05x random"
    one, many = (random_range(ENERGY, 8, 3, groups) for groups in (1, 64))
    assert one[0] < many[0] < many[1] < one[1]  # even where the expectation is infinite


@pytest.mark.parametrize(
    ("x", "digits", "words"),
    [
        (999.9995, 3, "1,000"),
        (999.9994, 3, "999.999"),
        (999_999.6, 0, "1.0e+06"),
        (999_999.4, 0, "999,999"),
        (-0.0001, 2, "0.00"),
        (-12.345, 2, "-12.35"),
        (math.inf, 2, "inf"),
    ],
)
def test_numbers_for_cells(x, digits, words):
    assert number(x, digits) in (words, words.replace("-12.35", "-12.34"))


def test_dead_neurons_are_not_of_the_shape_that_is_random():
    x = torch.cat(
        [torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(60, 8)]
    )
    layer = measure_neurons("a", x[None], ENERGY)
    high = random_range(ENERGY, 4, 8)[1]
    assert finding(replace(layer, ratio=1.3, energy=0.999 * high), ENERGY) == "as random, 60 dead"
    assert (
        finding(replace(layer, ratio=1.3, energy=1.001 * high), ENERGY) == "1.30x random, 60 dead"
    )


SHAPES = [
    (2, 2, 1),
    (2, 64, 1),
    (2, 16, 8),
    (3, 3, 1),
    (4, 256, 1),
    (8, 4, 16),
    (10, 8, 1),
    (10, 512, 1),
    (16, 27, 1),
    (40, 3, 1),
    (64, 9, 1),
    (96, 16, 1),
]


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize(("n", "d", "groups"), SHAPES)
def test_random_layers_are_seldom_called_anything_else(n, d, groups, half_space):
    """1 in 1,000 lies beyond each end: of 400 layers 0.8 in the mean, and 5 or more once in 700."""
    measure = RieszEnergy(s=2, half_space=half_space)
    generator = torch.Generator().manual_seed(1)
    level = random_level(measure, n, d)
    found = Counter()
    for x in torch.randn(8, 50, groups, n, d, generator=generator):
        for energy in measure(x).double().mean(1).tolist():
            ratio = energy / level
            layer = LayerUniformity(
                "a", groups, n, d, energy, energy, ratio, math.nan, 90.0, 0, 0, True
            )
            found[verdict(layer, measure)] += 1
    assert found["above"] <= 3
    assert found["below"] <= 3


def test_each_end_of_chance_is_where_1_in_1000_random_layers_are():
    """Of 20,000 layers 20 lie beyond each end; the ends themselves are known from 2,048 layers."""
    for n, d, half_space in ((2, 8, True), (3, 8, False), (6, 5, True), (40, 8, False)):
        measure = RieszEnergy(s=1, half_space=half_space)
        low, high = random_range(measure, n, d)
        generator = torch.Generator().manual_seed(3)
        values = measure(torch.randn(20_000, n, d, generator=generator))
        assert 4 <= int((values < low).sum()) <= 60
        assert 4 <= int((values > high).sum()) <= 60


def test_two_neurons_may_be_more_even_than_random():
    """In 64 dimensions cosines of random pairs deviate by 1/8: 120 degrees are four deviations."""
    full = RieszEnergy(s=2)
    for degrees, d, words in (
        (120.0, 64, "more even than random (0.66x)"),
        (180.0, 64, "more even than random (0.49x)"),
        (105.0, 64, "as random"),  # two deviations
        (60.0, 64, "1.97x random"),
        (170.0, 2, "as random"),  # 1 pair in 18 is so far apart on a circle
        (179.99, 2, "more even than random"),  # 1 in 18,000
    ):
        x = torch.zeros(1, 2, d, dtype=torch.float64)
        x[0, :, 0] = torch.tensor([1.0, math.cos(math.radians(degrees))])
        x[0, 1, 1] = math.sin(math.radians(degrees))
        assert finding(measure_neurons("a", x, full), full).startswith(words), (degrees, d)


def test_angles_of_random_pairs():
    part = torch.tensor([1e-9, 1e-3, 0.25, 0.5, 0.75, 0.999]).double()
    torch.testing.assert_close(angles_at(part, 2), math.pi * part, rtol=1e-4, atol=0)
    exact = 2 * part.sqrt().asin()  # on a sphere
    torch.testing.assert_close(angles_at(part, 3), exact, rtol=1e-4, atol=0)
    normal = torch.special.ndtri(part[1:]) / math.sqrt(20_000)  # of the cosine, nearly
    found = angles_at(part[1:], 20_000).cos()
    torch.testing.assert_close(found, -normal, rtol=1e-2, atol=1e-6)


def test_few_neurons_are_drawn_in_as_few_dimensions():
    """The cosines have the law of random neurons: mean 0, variance 1 / d, fourth moment 3 / d (d + 2)."""
    layers = random_layers(20_000, 4, 50, torch.Generator().manual_seed(0))
    assert layers.shape == (20_000, 4, 4)
    unit = nn.functional.normalize(layers.double(), dim=-1)
    first, second = torch.triu_indices(4, 4, 1)
    cosines = (unit @ unit.mT)[:, first, second]
    assert float(cosines.mean()) == pytest.approx(0.0, abs=2e-3)
    assert float(cosines.square().mean()) == pytest.approx(1 / 50, rel=0.02)
    assert float(cosines.pow(4).mean()) == pytest.approx(3 / (50 * 52), rel=0.05)


def test_an_estimated_energy_is_given_its_error():
    high = random_range(ENERGY, 64, 9)[1]
    layer = measure_neurons("a", torch.randn(1, 64, 9), ENERGY)
    layer = replace(layer, ratio=1.05, energy=high + 0.01)
    assert verdict(layer, ENERGY) == "above"
    assert verdict(replace(layer, standard_error=0.004), ENERGY) == "random"


def test_a_score_stands_in_tables_between_0_and_1_only():
    even = torch.cat([torch.eye(8), -torch.eye(8)])
    torch.manual_seed(0)
    layers = {"a.weight": even, "b.weight": torch.randn(64, 16) + 1.0}
    found = report(layers, RieszEnergy(s=2), head=None)
    rows = {row[0]: row[4] for row in report_table(found).rows}
    assert rows == {"a": "1.00", "b": "-"}
    assert SCORE in str(found)
    assert found.layers[1].uniformity.score < -1.0
    assert json.loads(found.to_json())["layers"][1]["score"] < -1.0
    found = report({"b.weight": layers["b.weight"]}, head=None)
    assert "score" not in str(found)
    assert "score" not in re.sub("<style>.*</style>", "", found.to_html(), flags=re.DOTALL)


@pytest.mark.parametrize("measure", [ENERGY, RieszEnergy(s=1), GaussianPotential(t=2), KoLeo()])
@pytest.mark.parametrize(("n", "d"), [(4, 64), (10, 16), (40, 9)])
def test_random_layers_are_as_random(measure, n, d):
    generator = torch.Generator().manual_seed(7)
    draws = [
        measure_neurons("a", torch.randn(1, n, d, generator=generator), measure) for _ in range(100)
    ]
    as_random = sum(finding(one, measure) == "as random" for one in draws)
    assert (
        as_random >= 95
    )  # 1 in 500 lies outside; of KoLeo, known by the extremes of a hundred, 1 to 2 %


def test_random_deviations_are_what_they_say():
    for measure in (ENERGY, RieszEnergy(s=1), RieszEnergy(s=0), GaussianPotential(t=2)):
        values = measure(torch.randn(4000, 8, 16, generator=torch.Generator().manual_seed(0)))
        assert float(values.std()) == pytest.approx(measure.deviation(8, 16), rel=0.05)


def test_more_than_one_group_and_one_that_is_empty():
    model = nn.Conv2d(8, 12, 3, groups=2)
    with torch.no_grad():
        model.weight[6:] = 0.0
        model.weight[2] = model.weight[1]
    (one,) = report(model).layers
    assert one.uniformity.groups == 2
    assert one.pairs[0][:3] == (0, 1, 2)
    assert one.dead == 6
    assert len(one.shown) == 6
    assert one.finding.startswith(
        "a group with fewer than two live neurons, 2 neurons in 1 near-duplicate group"
    )


def test_singular_values_and_heat_map():
    x = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    x[10] = x[150]
    (one,) = report({"a.weight": x}).layers
    wanted = torch.linalg.svdvals(nn.functional.normalize(x.double(), dim=1))
    assert one.singular_values == pytest.approx(wanted.tolist(), rel=1e-9)
    low, high = one.edges
    assert (low, high) == (1.0, 3.0)
    assert one.singular_values[-1] == pytest.approx(low, abs=0.2)
    assert one.singular_values[0] == pytest.approx(high, abs=0.2)
    assert {10, 150} <= set(one.shown)
    assert abs(one.shown.index(10) - one.shown.index(150)) == 1
    unit = nn.functional.normalize(x[list(one.shown)], dim=1)
    torch.testing.assert_close(one.cosines, unit @ unit.T, rtol=0, atol=1e-5)


def test_groups_are_judged_as_the_mean_that_they_are():
    one, many = (random_range(ENERGY, 4, 36, groups) for groups in (1, 100))
    middle = random_expectation(ENERGY, 4, 36)
    assert one[1] - middle > 2.0 * (middle - one[0])  # skewed
    spread = 3.09 * ENERGY.deviation(4, 36) / 10  # and the mean of many nearly normal
    assert [end - middle for end in many] == pytest.approx([-spread, spread], rel=0.1)
    for measure in (ENERGY, KoLeo()):
        energies = [float(measure(torch.randn(32, 4, 36)).mean()) for _ in range(200)]
        low, high = random_range(measure, 4, 36, 32)
        assert (
            sum(low < energy < high for energy in energies) >= 197
        )  # 3 in 1000 are beyond three deviations
        assert max(energies) - min(energies) > (high - low) / 3


def test_a_reference_does_not_depend_on_the_default_dtype():
    wanted = random_expectation(Separation(), 31, 17)
    reference._simulated.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert random_expectation(Separation(), 31, 17) == wanted
    finally:
        torch.set_default_dtype(torch.float32)


def test_pairs_that_are_not_kept_are_counted():
    (layer,) = report({"weight": torch.ones(30, 8)}, head=None, keep=0).layers
    assert (layer.similar, layer.pairs) == (435, ())
    with pytest.raises(ValueError, match="keep"):
        report({"weight": torch.ones(30, 8)}, keep=-1)


def test_two_neurons_are_measured_in_full_space():
    found = report(
        {"a.weight": torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), "b.weight": torch.randn(5, 2)},
        head=None,
    )
    assert [one.full_space for one in found.layers] == [True, False]
    assert found.layers[0].uniformity.ratio < 1


def test_the_worst_ratio_is_that_of_the_layer_furthest_above():
    found = report(
        {
            "a.weight": torch.randn(6, 8),
            "b.weight": torch.ones(6, 8),
            "c.weight": torch.zeros(6, 8),
        },
        head=None,
    )
    assert found.worst_ratio == found.layers[1].uniformity.ratio > 100
    assert math.isnan(report({"c.weight": torch.zeros(6, 8)}, head=None).worst_ratio)


def test_dead_is_next_to_the_median():
    weight = torch.randn(9, 16)
    weight = weight / weight.norm(dim=1, keepdim=True)
    weight[0] = weight[0] * 0.9e-4
    weight[1] = weight[1] * 1.1e-4
    weight[2] = weight[2] * 1e6
    (layer,) = report({"weight": weight}, head=None).layers
    assert layer.dead_rows == (0,)


def test_json_has_no_nan(tmp_path):
    found = report(
        {"a.weight": torch.zeros(4, 8), "b.weight": torch.randn(4, 8), "table": torch.randn(4, 4)}
    )
    found.write_json(tmp_path / "a.json")
    read = json.loads((tmp_path / "a.json").read_text())
    assert read["layers"][0]["ratio"] is None
    assert read["layers"][1]["ratio"] == found.layers[1].uniformity.ratio
    assert sum(read["layers"][1]["angles"]) == 6
    assert read["skipped"][0]["name"] == "table"


def test_the_printed_table():
    lines = str(report(network())).splitlines()
    assert lines[0].split() == [
        "layer",
        "neurons",
        "x",
        "dim",
        "energy",
        "ratio",
        "angle",
        "rank",
        "similar",
        "dead",
        "finding",
    ]
    assert lines[2].split()[:4] == ["0", "24", "x", "27"]
    assert lines[4].endswith("2 neurons in 1 near-duplicate group, 2 dead")
    assert lines[5].startswith("4 *")
    assert lines[6].endswith("4 neurons in 2 near-duplicate groups (cosine from")
    assert lines[7] == "    0.95); 2 dead neurons"


def test_progress_is_told_by_layer():
    told = []
    report(network(), progress=lambda name, part: told.append((name, part)))
    assert [part for _, part in told] == sorted(part for _, part in told)
    assert [name for name, part in told if part == 1.0][-1] == "4"


def test_a_convolution_is_no_head():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3))
    with torch.no_grad():
        model[1].weight[1] = -model[1].weight[0]
    for source in (model, model.state_dict()):
        found = report(source)
        assert [one.full_space for one in found.layers] == [False, False]
        assert found.layers[1].similar == 1


def test_what_is_by_chance_is_not_counted_as_above():
    torch.manual_seed(0)
    made = (report({"weight": torch.randn(10, 8)}, head=None) for _ in range(200))
    small = next(found for found in made if 1.1 < found.layers[0].ratio < 1.2)
    layer = small.layers[0]
    assert (layer.verdict, layer.above, layer.below, layer.as_random) == (
        "random",
        *[False] * 2,
        True,
    )
    assert "0 of 1 layer above random; 0 near" in str(small)
    assert f"\n{RULE}\n" in f"{small}\n"
    (layer,) = report({"weight": torch.randn(10, 8) + 1.0}, head=None).layers
    assert (layer.verdict, layer.above) == ("above", True)


def test_in_a_narrow_terminal(monkeypatch):
    from rich.console import Console

    table = report_table(report(network()))
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr("rich.console.Console", lambda *args, **kwargs: console)
    show(table)
    lines = console.export_text().splitlines()
    assert all(len(line) <= 80 for line in lines)
    headings = ["layer", "neurons", "x", "dim", "ratio", "angle", "dead", "finding"]
    assert lines[0].split() == headings
    assert "2 neurons in 1 near-duplicate group, 2 dead" in " ".join("\n".join(lines).split())
    assert "left out of this narrow table: energy, rank, similar" in lines
    console = Console(width=200, record=True, file=io.StringIO(), force_terminal=True)
    show(table)
    text = console.export_text()
    assert "left out" not in text
    assert "energy" in text


def whole(lines):
    """Lines that were wrapped, as they were before."""
    found = []
    for line in lines:
        if line.startswith("    "):
            found[-1] += f" {line.strip()}"
        else:
            found.append(line)
    return found


def shown_in(table, width):
    """The headings that a table has in so many columns, and those that it names as left out."""
    fitted = table.fitted(width)
    assert fitted.without(()).rows == fitted.rows
    (said,) = [line for line in whole(fitted.under()) if "left out" in line] or [": "]
    return [column.heading for column in fitted.columns], said.split(": ")[1].split(", ")


def test_columns_are_left_out_one_by_one():
    torch.manual_seed(0)
    state = {f"encoder.block.{i}.query.weight": torch.randn(64, 32) for i in range(3)}
    state["encoder.block.1.query.weight"][:4] = state["encoder.block.1.query.weight"][4:8]
    table = report_table(report(state, head=None))
    everything = [column.heading for column in table.columns]
    assert shown_in(table, table.width()) == (everything, [""])
    counts = []
    together = []
    for width in range(40, table.width() + 1):
        shown, left_out = shown_in(table, width)
        lines = plain(table, width).splitlines()
        rows = lines[: [line[:1].isdigit() for line in lines].index(True)]
        assert width < 50 or all(len(line) <= width for line in rows)
        assert [one for one in everything if one in {*shown, *left_out}] == everything
        assert left_out == [one for one in everything if one not in shown] or left_out == [""]
        told = [line.split(":")[0] for line in whole(table.fitted(width).under())]
        for legend in table.legends:
            assert (legend.heading in told) == (legend.heading in shown)
        counts.append(len(shown))
        together.append(left_out)
    assert set(counts) == {4, 5, 6, 7, 8, 9, 10}  # one at a time
    assert ["energy"] in together


def test_huge_numbers_are_short():
    with torch.no_grad():
        model = nn.Sequential(nn.Linear(8, 6))
        model[0].weight[1] = model[0].weight[0]
    assert all(
        len(cell) < 9
        for cell in report_table(report(model, RieszEnergy(s=200), head=None)).rows[0][1:-1]
    )


def test_compare_measures_both_alike():
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
    with torch.no_grad():
        before[2].weight[1] = -before[2].weight[0]
    after = nn.Sequential(*before, nn.Linear(64, 10))
    one = compare(before, after).layers[1]
    assert (one.moved, one.before.uniformity.ratio) == (0.0, one.after.uniformity.ratio)
    assert (one.before.similar, one.after.similar) == (1, 1)
    assert [layer.full_space for layer in compare(after, after).after.layers] == [
        False,
        False,
        True,
    ]


def test_compare_measures_two_neurons_and_more_in_one_space():
    state = {"a.weight": torch.randn(6, 8), "fc.weight": torch.randn(5, 8)}
    found = compare(state, state | {"fc.weight": torch.randn(2, 8)}, head=None)
    assert [(one.before.full_space, one.after.full_space) for one in found.layers] == [
        (False, False),
        (True, True),
    ]
    found = compare(state, state)
    assert [(one.before.full_space, one.after.full_space) for one in found.layers] == [
        (False, False),
        (True, True),
    ]
    headed = state | {"head.weight": torch.randn(4, 5)}
    found = compare(state, headed)
    assert not any(one.before.full_space or one.after.full_space for one in found.layers)
    assert found.after.layers[-1].full_space
    assert "*" not in str(found)  # none of those that are compared


def test_compare_tells_what_only_one_has_and_what_is_left_out():
    state = {
        "a.weight": torch.randn(6, 8),
        "b.weight": torch.randn(6, 8),
        "fc.weight": torch.randn(5, 8),
    }
    said = str(
        compare(
            state | {"b.weight": torch.ones(6, 8, dtype=torch.int8)},
            state | {"new.weight": torch.randn(4, 4)},
        )
    )
    assert "only after (state dict): new" in said.splitlines()
    assert (
        "before, not measured (1): 1 its weights are torch.int8, not floating-point, and no scale "
        "that fits lies beside them: report the model itself, or pass dequantised tensors: b (6 x 8)"
    ) in " ".join(said.split())


def test_compare_tells_what_is_broken_and_what_is_left_out(tmp_path, capsys):
    before, after = network(), network()
    with torch.no_grad():
        after[3].weight[5] = math.nan
    torch.save({"g": before.state_dict(), "d": before.state_dict()}, tmp_path / "a.pt")
    torch.save(
        {"g": after.state_dict() | {"h.weight": torch.ones(3, 3, dtype=torch.int8)}, "d": {}},
        tmp_path / "b.pt",
    )
    said = str(compare(tmp_path / "a.pt", tmp_path / "b.pt", key="g"))
    assert "1 NaN or infinite" in said
    assert "4 *" in said
    assert "not floating-point" in said
    assert main(["compare", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--key", "g"]) == 0
    assert main(["compare", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 2


def test_compare_takes_a_key_for_each_file(tmp_path, capsys):
    model, ema = network(), network()
    with torch.no_grad():
        ema[3].weight.copy_(model[3].weight.roll(1, 1))
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, tmp_path / "both.pt")
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    both, alone = str(tmp_path / "both.pt"), str(tmp_path / "ema.pt")
    found = compare(both, both, key=("model", "ema"))
    assert [one.moved for one in found.layers] == [
        pytest.approx(one.moved) for one in compare(model, ema.state_dict()).layers
    ]
    assert (found.before.source, found.after.source) == (f"{both}, model", f"{both}, ema")
    assert main(["compare", both, both, "--key", "model", "--key", "ema", "--json", "-"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["before"]["source"] == f"{both}, model"
    same = compare(both, alone, key=("ema", None))
    assert max(one.moved for one in same.layers) == pytest.approx(0.0, abs=1e-3)
    assert main(["compare", both, alone, "--key", "ema", "--key", "auto"]) == 0
    assert main(["compare", both, both, "--key", "model", "--key", "ema", "--key", "x"]) == 2
    assert "--key was given 3 times; give it once or twice" in capsys.readouterr().err
    assert main(["report", both, "--key", "model", "--key", "ema"]) == 2
    assert "--key was given 2 times; give it once" in capsys.readouterr().err
    with pytest.raises(TypeError, match="key is a name in both files, or two"):
        compare(both, both, key=("model", 3))


def test_compare_sees_what_moved(tmp_path):
    before, after = network(), network()
    with torch.no_grad():
        after[3].weight.copy_(before[3].weight.roll(1, 1) * 5.0)
        after[4].weight *= 3.0
    found = compare(before, {**after.state_dict(), "new.weight": torch.eye(4)})
    moved = {one.after.name: one.moved for one in found.layers}
    assert (moved["0"], moved["4"]) == pytest.approx((0.0, 0.0), abs=1e-5)
    assert 60 < moved["3"] < 120
    assert (found.only_before, found.only_after) == ((), ("new",))
    assert "only after (state dict): new" in str(found)
    found.write_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["moved"]["3"] == moved["3"]
    zeroed = before.state_dict() | {
        "3.weight": before[3].weight.detach() * (torch.arange(64) > 40).float()[:, None]
    }
    assert compare(before, zeroed).layers[2].moved == pytest.approx(
        0.0, abs=1e-5
    )  # zero neurons do not move
    found = compare(before, after, similar_above=0.5)
    assert found.before.similar_above == found.after.similar_above == 0.5
    with pytest.raises(ValueError, match="no layer has the same name in both: 0, 1, 3, 4, "):
        compare(before, {"other.weight": torch.randn(4, 4)})


def dictionary():
    """A Linear whose columns 2 and 9 are the same, a Linear of three parts, and two heads."""
    torch.manual_seed(5)
    model = nn.ModuleDict({"decoder": nn.Linear(40, 8), "packed": nn.Linear(8, 24)})
    model["class"] = nn.Linear(8, 5)
    model["box"] = nn.Linear(8, 4)
    with torch.no_grad():
        model["decoder"].weight[:, 9] = 2.0 * model["decoder"].weight[:, 2]
    return model


def sources_of(model, folder):
    """A model as it is, its state dict and its file."""
    path = folder / "model.pt"
    torch.save(model.state_dict(), path)
    return model, model.state_dict(), path


def test_the_user_says_how_weights_hold_neurons(tmp_path):
    neurons = {"decoder": "columns", "packed": 3, "box": lambda weight: weight[:, :6]}
    for source in sources_of(dictionary(), tmp_path):
        found = report(source, neurons=neurons)
        assert {layer.name: layer.shape for layer in found.layers} == {
            "decoder": "40 x 8",
            "packed.0": "8 x 8",
            "packed.1": "8 x 8",
            "packed.2": "8 x 8",
            "class": "5 x 8",
            "box": "4 x 6",
        }
        assert [pair[:3] for pair in found.layers[0].pairs] == [(0, 2, 9)]


def test_several_heads_are_in_full_space(tmp_path):
    for source in sources_of(dictionary(), tmp_path):
        found = report(source, head=["class", "box"])
        assert [layer.name for layer in found.layers if layer.full_space] == ["class", "box"]
        moved = compare(source, source, head=["class", "box"])
        assert [one.after.full_space for one in moved.layers] == [False, False, True, True]


def test_wrong_neurons_are_told_with_the_file(tmp_path):
    model, state, path = sources_of(dictionary(), tmp_path)
    for source, words in ((model, "neurons"), (state, "state dict: "), (path, "model.pt: ")):
        with pytest.raises(ValueError, match=f"{words}.*matches no weight; did you mean 'decoder'"):
            report(source, neurons={"decodr": "columns"})
        with pytest.raises(
            ValueError, match=r"layer 'packed' \(24, 8\) do not divide into 5 equal"
        ):
            report(source, neurons={"packed": 5})
        with pytest.raises(ValueError, match="must be 'rows', 'columns'"):
            report(source, neurons={"packed": "diagonal"})
        with pytest.raises(TypeError, match="neurons maps patterns"):
            report(source, neurons=["packed"])


def test_compare_reads_both_as_the_user_says():
    before, after = dictionary(), dictionary()
    with torch.no_grad():
        after["decoder"].weight *= torch.rand(40) + 0.5  # which turns no column
    found = compare(before, after.state_dict(), neurons={"decoder": "columns"})
    moved = {one.after.name: one.moved for one in found.layers}
    assert moved["decoder"] == pytest.approx(0.0, abs=1e-4)
    assert compare(before, after).layers[0].moved > 1.0


def test_neurons_and_heads_on_the_command_line(tmp_path, capsys):
    model, _, path = sources_of(dictionary(), tmp_path)
    options = ["--neurons", "decoder=columns", "--neurons", "packed=3", "--head", "class"]
    options += ["--head", "box", "--json", "-"]
    assert main(["report", str(path), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = report(model, neurons={"decoder": "columns", "packed": 3}, head=["class", "box"])
    for layer, one in zip(found["layers"], wanted.layers, strict=True):
        assert (layer["name"], layer["finding"]) == (one.name, one.finding)
        assert layer["measure"] == repr(one.measure)
    assert main(["compare", str(path), str(path), *options]) == 0
    moved = json.loads(capsys.readouterr().out)["moved"]
    assert list(moved) == ["decoder", "packed.0", "packed.1", "packed.2", "class", "box"]
    assert main(["report", str(path), "--head", "None", "--json", "-"]) == 0
    measures = [layer["measure"] for layer in json.loads(capsys.readouterr().out)["layers"]]
    assert set(measures) == {repr(ENERGY)}


@pytest.mark.parametrize(
    "wrong", ["decoder", "decoder=diagonal", "decoder=0", "decoder=-1", "decoder=1.5", "=rows", ""]
)
@pytest.mark.parametrize("command", ["report", "compare"])
def test_neurons_that_the_command_line_does_not_know(capsys, command, wrong):
    files = ["a.pt"] if command == "report" else ["a.pt", "b.pt"]
    with pytest.raises(SystemExit) as error:
        main([command, *files, "--neurons", wrong])
    assert error.value.code == 2
    told = capsys.readouterr().err
    assert "argument --neurons: it must be NAME=HOW" in told
    assert f"got {wrong!r}" in told


@pytest.mark.parametrize("command", ["report", "compare"])
def test_the_help_explains_neurons_and_heads(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "140")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--neurons NAME=HOW where the neurons of a weight are: its rows, its columns" in said
    assert "--head NAME the layer that gives the classes" in said
    assert "'none' if there is none; may be given several times" in said


def test_command_line(tmp_path, capsys):
    path = tmp_path / "a.pt"
    torch.save(network().state_dict(), path)
    page, numbers = tmp_path / "a.html", tmp_path / "a.json"
    assert (
        main(["report", str(path), "--html", str(page), "--json", str(numbers), "--pairs", "1"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "2 neurons in 1 near-duplicate group, 2 dead" in shown
    assert "layer 3: 7 and 11, 180.00 degrees (opposite)" in shown
    assert page.read_text().startswith("<!")
    assert len(json.loads(numbers.read_text())["layers"]) == 4
    assert main(["report", str(path), "--include", "3", "--fail-above", "1.0"]) == 1
    assert "--fail-above: 1 layer has a ratio above 1: layer 3 (" in capsys.readouterr().err
    assert (
        main(
            [
                "report",
                str(path),
                "--exclude",
                "0",
                "3",
                "--measure",
                "RieszEnergy(s=1)",
                "--fail-above",
                "2",
            ]
        )
        == 0
    )
    assert "  2 excluded by pattern" in capsys.readouterr().out
    torch.save({"weight": torch.ones(30, 8)}, tmp_path / "b.pt")
    assert main(["report", str(tmp_path / "b.pt"), "--pairs", "150"]) == 0
    assert capsys.readouterr().out.count("weight: ") == 151
    assert main(["compare", str(path), str(path), "--json", str(numbers)]) == 0
    assert "moved" in capsys.readouterr().out
    for command in (["report", str(path)], ["compare", str(path), str(path)]):
        assert main([*command, "--json", "-"]) == 0
        assert (
            len(
                json.loads(capsys.readouterr().out)["layers" if command[0] == "report" else "moved"]
            )
            == 4
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pt"], "no such file"),
        (["FILE", "--measure", "Foo"], "there are Covering, "),
        (["FILE", "--measure", "RieszEnergy(t=1)"], "cannot make a measure"),
        (["FILE", "--measure", "__import__('os').system('true')"], "cannot make a measure"),
        (["FILE", "--include", "nothing"], "matches no layer"),
        (["FILE", "--head", "nothing"], "is no layer of the model"),
        (["FILE", "--head", "nothing"], "--head none switches it off"),
        (["FILE", "--head", "0", "--head", "nothing"], "'nothing' is no layer of the model"),
        (["FILE", "--head", "0", "--head", "none"], "together with another --head"),
        (["FILE", "--neurons", "nothing=rows"], "matches no weight; the weights are: 0, 1, 3, 4"),
        (["FILE", "--neurons", "0=5"], "the 24 rows of layer '0' (24, 3, 3, 3) do not divide"),
        (["FILE", "--neurons", "0=2", "--neurons", "0=rows"], "says both 0=2 and 0=rows"),
    ],
)
def test_command_line_errors(tmp_path, capsys, arguments, message):
    torch.save(network().state_dict(), tmp_path / "a.pt")
    assert (
        main(
            ["report", *(str(tmp_path / "a.pt") if word == "FILE" else word for word in arguments)]
        )
        == 2
    )
    assert message in capsys.readouterr().err


def test_what_cannot_be_judged_fails(tmp_path, capsys):
    state = network().state_dict()
    for name, value, why in (
        ("nan.pt", math.nan, "4 layers have NaN or infinite weights: {0,1,3,4}"),
        ("zero.pt", 0.0, "4 layers have no ratio: {0,1,3,4}"),
    ):
        torch.save({key: torch.full_like(x, value) for key, x in state.items()}, tmp_path / name)
        assert main(["report", str(tmp_path / name), "--fail-above", "1e9"]) == 1
        told = capsys.readouterr()
        assert told.err == f"lightning-hsu: --fail-above: {why}\n"
        assert "no layer can be judged" in told.out
    state["3.weight"][5, 0] = math.nan
    torch.save(state, tmp_path / "row.pt")
    assert main(["report", str(tmp_path / "row.pt"), "--include", "3", "--fail-above", "1e9"]) == 1
    assert main(["report", str(tmp_path / "row.pt"), "--include", "0", "--fail-above", "1e9"]) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        ["--fail-above", "nan"],
        ["--fail-above", "-1"],
        ["--fail-above", "x"],
        ["--similar-above", "2"],
        ["--similar-above", "0"],
        ["--similar-above", "1"],
        ["--similar-above", "nan"],
        ["--similar-above", "x"],
        ["--pairs", "-1"],
        ["--pairs", "x"],
    ],
)
def test_limits_that_are_none(tmp_path, wrong):
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path / "a.pt"), *wrong])


def test_files_that_cannot_be_written_are_told_before_the_work(tmp_path, capsys):
    torch.save(network().state_dict(), tmp_path / "a.pt")
    for option in ("--html", "--json"):
        for path in (tmp_path / "none" / "a", tmp_path, tmp_path / "a.pt", tmp_path / "a.pt" / "a"):
            assert main(["report", str(tmp_path / "a.pt"), option, str(path)]) == 2
            found = capsys.readouterr()
            assert "cannot write" in found.err
            assert not found.out


def test_a_fault_of_our_own_is_no_verdict(monkeypatch, capsys):
    monkeypatch.setattr("lightning_hsu.report.cli.report", lambda *args, **kwargs: 1 / 0)
    assert main(["report", "a.pt"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.any_cpu
def test_a_reader_that_has_had_enough(tmp_path):
    torch.save(network().state_dict(), tmp_path / "a.pt")
    command = f"{sys.executable} -m lightning_hsu.report.cli report {tmp_path / 'a.pt'} --html {tmp_path / 'a.html'}"
    command += ' --json - | true; echo "${PIPESTATUS[0]}"'
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    found = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, env=buffered
    )
    assert (found.stdout, found.stderr) == ("141\n", f"wrote {tmp_path / 'a.html'}\n")
    assert (tmp_path / "a.html").stat().st_size > 1000


def test_measures_by_their_name():
    assert parse_measure("RieszEnergy(s=-1, half_space=True)") == RieszEnergy(s=-1, half_space=True)
    assert parse_measure("KoLeo") == KoLeo()
    for text in ("RieszEnergy(s=nan)", "RieszEnergy(s=10**9)"):
        with pytest.raises(ValueError, match="the setting s must be a plain number"):
            parse_measure(text)


def test_wrong_kinds():
    with pytest.raises(TypeError, match="a model, a state dict or a file; got int"):
        report(3)
    with pytest.raises(TypeError, match="measure must be"):
        report(network(), "mhe")


def test_what_is_not_finite_is_named(tmp_path, capsys):
    torch.manual_seed(0)
    state = {f"{i}.weight": torch.randn(20, 16) for i in range(4)}
    state["1.weight"][3, 2] = math.nan
    state["2.weight"] *= math.nan
    state["3.weight"] *= 0.0
    found = report(state, head=None)
    said = str(found)
    assert "0 of 1 layer above random, 2 layers with NaN or infinite numbers; " in said
    assert "\n2 layers have NaN or infinite weights: {1,2}\n" in said
    assert "\n1 layer has no ratio: layer 3\n" in said
    assert found.layers[2].finding == "20 NaN or infinite"
    assert [layer.judged for layer in found.layers] == [True, False, False, False]
    page = re.sub("<wbr>", "", found.to_html())
    assert "None of 1 layer is above random. 2 layers have NaN or infinite weights: {1,2}." in page
    everything = report({"a.weight": torch.full((4, 8), math.nan)})
    told = "no layer can be judged, 1 layer with NaN or infinite numbers"
    assert f"\n{told}; " in str(everything)
    assert repr(everything) == f"<Report on state dict: {told}>"


def test_the_worst_layers_come_first(tmp_path, capsys):
    torch.manual_seed(0)
    state = {f"{i}.weight": torch.randn(20, 16) + 0.3 * i for i in range(6)}
    state["2.weight"][0, 0] = math.nan
    state["5.weight"] *= 0.0
    found = report(state, head=None)
    lines = found.table(top=3).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["2", "4", "3"]
    hidden = max(found.layers[i].ratio for i in (0, 1))
    told = f"not shown: 3 of 6 layers, with ratios up to {hidden:.3f}; 1 of them with dead neurons"
    assert lines[5] == told
    above = sum(found.layers[i].above for i in (0, 1, 3, 4))
    assert lines[6].startswith(f"{above} of 4 layers above random")
    assert above >= 2
    assert "not shown" not in found.table(top=6)
    with pytest.raises(ValueError, match="top must be an int >= 1"):
        found.table(top=0)
    torch.save(state, tmp_path / "a.pt")
    assert main(["report", str(tmp_path / "a.pt"), "--head", "none", "--top", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_notes_and_reasons_are_folded():
    found = report(network())
    notes = tuple((f"blocks.{i}.attn.qkv", f"its {8 * i} rows are three") for i in range(1, 25))
    skips = tuple(Skip(f"blocks.{i}.mask", (9, 9), "its weights are torch.int8") for i in range(24))
    said = str(replace(found, notes=notes, skips=skips))
    assert "\nnote: blocks.{1..24}.attn.qkv (24): its 8 to 192 rows are three\n" in said
    assert said.endswith("  24 its weights are torch.int8 (each 9 x 9): blocks.{0..23}.mask")
    assert all(len(line) <= 80 for line in said.splitlines()[7:])
    assert "(24): its 8 to 192" in re.sub("<wbr>", "", replace(found, notes=notes).to_html())


def test_long_names_are_short_in_tables_and_whole_in_json():
    name = ".".join(["transformer", "h", "12", *["a_very_long_part"] * 20, "proj"])
    found = report({f"{name}.weight": torch.randn(8, 4)}, head=None)
    (row,) = str(found).splitlines()[2:3]
    assert len(row.split()[0]) <= 60
    assert row.split()[0].startswith("t.h.12.a.")
    assert str(found).splitlines()[-1] == "some names are shortened; to_json() has them whole"
    assert json.loads(found.to_json())["layers"][0]["name"] == name
    assert abbreviated("blocks.12.attn.proj", 19) == "blocks.12.attn.proj"
    assert abbreviated("blocks.12.attn.proj", 18) == "blo.12.attn.proj"
    assert len(abbreviated("x" * 500, 30)) == 30


def test_a_plain_table_fits_a_terminal():
    torch.manual_seed(0)
    state = {f"encoder.blocks.{i}.attention.output.weight": torch.randn(16, 8) for i in range(3)}
    state["encoder.blocks.1.attention.output.weight"][:4] = 1.0
    state["encoder.blocks.1.attention.output.weight"][9] = math.nan
    table = report_table(report(state, head=None))
    lines = plain(table, 60).splitlines()
    rows = lines[: lines.index(next(line for line in lines if "above random" in line))]
    assert max(map(len, lines)) <= 60
    assert len(rows) > 5  # the finding of the second takes more than one
    assert any(row.split()[0].endswith(".blo.0.att.output") for row in rows)
    *_, shortened, left_out = whole(lines)
    assert shortened == "some names are shortened; a wider terminal or to_json() has them whole"
    assert left_out.startswith("left out of this narrow table: neurons x dim, energy,")
    assert not any("shortened" in line for line in plain(table, 200).splitlines())
    assert not any("shortened" in line for line in plain(table).splitlines())


def test_notebooks_show_a_table():
    found = report(network())
    for one, rows in ((found, 5), (compare(network(), network()), 5)):
        page = one._repr_html_()
        assert page.count("<tr>") == rows
        assert len(page) < 10_000
        assert "<style" not in page
        assert not re.search("color:|background:", page)  # those of the notebook, light or dark
        assert "\n" not in repr(one)
    assert repr(found).startswith("<Report on Sequential: ")
    hostile = replace(found, source="<script>")
    assert "<script>" not in hostile._repr_html_()
    assert repr(compare(network(), network())) == (
        "<Comparison of Sequential and Sequential: 4 layers in both>"
    )


def prefixed(state, prefix):
    return {prefix + name: x for name, x in state.items()}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("", "", ""),
        ("model.", "", "names matched without the prefix 'model.' of the first"),
        ("", "student.", "names matched without the prefix 'student.' of the second"),
        (
            "a.b.",
            "a.c.",
            "names matched without the prefix 'a.b.' of the first and 'a.c.' of the second",
        ),
        ("a.", "a.", ""),
    ],
)
def test_names_are_matched_without_a_common_prefix(first, second, said):
    torch.manual_seed(0)
    state = {f"{name}.weight": torch.randn(6, 8) for name in ("stem", "mid.0", "fc")}
    mixed = prefixed(state, first) | {f"{first}more.weight": torch.randn(3, 8)}
    found = compare(mixed, prefixed(state, second))
    assert len(found.layers) == 3
    assert all(one.moved == 0.0 for one in found.layers)
    assert all(one.before.full_space == one.after.full_space for one in found.layers)
    assert found.only_before == (f"{first}more",)
    assert found.only_after == ()
    assert found.matched == said
    assert json.loads(found.to_json())["prefixes"] == list(found.prefixes)
    for text in (str(found), found.to_html()):
        assert ("without the prefix" in text) == bool(said)


def test_a_prefix_that_most_have_is_enough():
    """As a model with a head and the same without one."""
    state = {f"layers.{i}.weight": torch.randn(6, 8) for i in range(3)}
    with_head = prefixed(state, "bert.") | {"classifier.weight": torch.randn(3, 8)}
    found = compare(state, with_head)
    assert [one.after.name for one in found.layers] == [f"bert.layers.{i}" for i in range(3)]
    assert all(one.moved == 0.0 for one in found.layers)
    assert (found.prefixes, found.only_after) == (("", "bert."), ("classifier",))
    assert "without the prefix 'bert.' of the second" in str(found)


def test_a_prefix_without_which_two_names_are_the_same_is_kept():
    state = {f"{name}.weight": torch.randn(6, 8) for name in ("ema.fc", "ema.mid", "fc")}
    found = compare(state, {name: x for name, x in state.items() if name == "fc.weight"})
    assert [one.before.name for one in found.layers] == ["fc"]
    assert (found.prefixes, found.only_before) == (("", ""), ("ema.fc", "ema.mid"))
    with pytest.raises(ValueError, match="no layer has the same name"):
        compare(state, {"mid.weight": torch.randn(6, 8)})


def test_a_prefix_that_helps_nothing_is_kept():
    state = {"net.0.weight": torch.randn(6, 8), "net.1.weight": torch.randn(5, 6)}
    other = {"net.0.weight": torch.randn(6, 8), "fc.weight": torch.randn(5, 6)}
    found = compare(state, other)
    assert [one.after.name for one in found.layers] == ["net.0"]
    assert (found.prefixes, found.only_before, found.only_after) == (("", ""), ("net.1",), ("fc",))


def test_the_version(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    assert error.value.code == 0
    assert capsys.readouterr().out == f"lightning-hsu {lightning_hsu.__version__}\n"


def test_compare_writes_a_page(tmp_path, capsys):
    paths = []
    for i in range(2):
        state = network().state_dict()
        state["3.weight"] += 0.1 * i
        paths.append(str(tmp_path / f"{i}.pt"))
        torch.save(state, paths[i])
    page = tmp_path / "a.html"
    assert main(["compare", *paths, "--html", str(page)]) == 0
    in_python = compare(*paths).to_html()
    in_python = in_python.replace(
        "head=&quot;NAME&quot; or head=None", "--head NAME or --head none"
    )
    assert page.read_text() == in_python
    for wrong in ("-", paths[1], str(tmp_path)):
        assert main(["compare", *paths, "--html", wrong]) == 2
    assert main(["compare", *paths, "--html", str(page), "--json", str(page)]) == 2
    assert "name the same file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--measure", "(" * 5000],
        ["--measure", "(" * 250],
        ["--measure", "-" * 250],
        ["--measure", "RieszEnergy(s=" + "9" * 250 + ")"],
        ["--measure", "RieszEnergy(s=1e999)"],
        ["--head", "x" * 5000],
        ["--include", "x" * 5000],
        ["--exclude", "x" * 5000],
        ["--key", "x" * 5000],
        ["--neurons", "x" * 5000 + "=rows"],
        ["--neurons", "x" * 5000],
        ["--neurons", "3=" + "9" * 5000],
        ["--pairs", "9" * 5000],
        ["--top", "0"],
        ["--top", "9" * 5000],
        ["--fail-above", "x" * 5000],
        ["--similar-above", "x" * 5000],
        ["--similar-above", "nan"],
        ["--" + "x" * 5000],
        ["--html", "x" * 5000],
    ],
    ids=lambda wrong: " ".join(wrong)[:24],
)
def test_wrong_options_are_told_in_few_characters(tmp_path, capsys, wrong):
    torch.save(network().state_dict(), tmp_path / "a.pt")
    try:
        code = main(["report", str(tmp_path / "a.pt"), *wrong])
    except SystemExit as error:
        code = error.code
    assert code == 2
    told = capsys.readouterr().err
    last = told.strip().splitlines()[-1]
    assert last.startswith("lightning-hsu")
    assert "Traceback" not in told
    assert max(map(len, told.split())) <= 200
    assert len(last) < 1000
    if wrong[0] == "--measure":
        assert not re.search(r"\({81}|9{81}|-{81}", told)


def test_errors_speak_in_options():
    for python, options in {
        "read by rows: neurons={'W_dec': 'columns'}": "read by rows: --neurons 'W_dec=columns'",
        "neurons={'qkv': 5}: the 24 rows": "--neurons 'qkv=5': the 24 rows",
        "when asked for: include='wte'": "when asked for: --include 'wte'",
        "name one, or head=None": "name one, or --head none",
        "choose one with --key or key=": "choose one with --key",
    }.items():
        assert in_options(python) == options


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinite_neurons_are_not_dead_nor_make_others_dead(value):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    x[3:] = value
    layer = report({"fc.weight": x}).layers[0]
    assert layer.dead == 0
    assert layer.uniformity.nonfinite == 5
    x[0] = 0.0
    assert report({"fc.weight": x}).layers[0].dead_rows == (0,)


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_dead_neurons_of_any_scale(scale):
    x = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[5] *= 1e-6
    assert report({"fc.weight": x * scale}).layers[0].dead_rows == (5,)
