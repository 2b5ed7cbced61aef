"""Reports on very many layers and on very large ones."""

import json
import math
import re
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_hsu import reference
from lightning_hsu._core import duplicates, histogram, oracle_energy
from lightning_hsu._core.bounds import _lower_hull
from lightning_hsu._core.duplicates import similar_pairs
from lightning_hsu._core.histogram import pair_histogram
from lightning_hsu._core.small_groups import SmallGroups
from lightning_hsu.measures import (
    GaussianPotential,
    KoLeo,
    RieszEnergy,
    Sampled,
    Separation,
)
from lightning_hsu.reference import is_surely_random, random_level, random_range
from lightning_hsu.report import compare, report
from lightning_hsu.report import looks as looks_module
from lightning_hsu.report import sample as sample_module
from lightning_hsu.report.analysis import look_at
from lightning_hsu.report.cli import main
from lightning_hsu.report.comparison_table import comparison_table
from lightning_hsu.report.together import SmallLayer, is_small, look_at_together, padded

HALF = RieszEnergy(s=2.0, half_space=True)
FULL = RieszEnergy(s=2.0)
MEASURES = [
    HALF,
    FULL,
    RieszEnergy(s=0.0),
    RieszEnergy(s=-1.0, half_space=True),
    RieszEnergy(s=3.0, distance="geodesic", softening=0.0),
    GaussianPotential(t=2.0),
    KoLeo(),
    Separation(),
]


def random(seed):
    """A generator with this seed."""
    return torch.Generator().manual_seed(seed)


def spoiled(x, seed):
    """Neurons (groups, n, d) with some that are dead, broken, tiny, the same or opposite."""
    generator = random(seed)

    def some():
        return int(torch.randint(x.shape[1], (), generator=generator))

    kind = seed % 8
    if kind in (1, 7):
        x[0, some()] = 0.0
    if kind in (2, 7):
        x[-1, some()] = math.nan
    if kind == 3:
        x[:, some()] = 3.0 * x[:, some()]
    if kind in (4, 7):
        x[0, some()] = -0.5 * x[0, some()]
    if kind == 5:
        x[:, some()] *= 1e-6
    if kind == 6:
        x[0, some(), 0] = math.inf
    if seed % 31 == 0:
        x[0] = 0.0
    if seed % 37 == 0:
        x[:] = x[:, :1] + 1e-4 * x
    return x


def small_layers(count, measure, dtype=torch.float32):
    """Layers of random shapes and kinds."""
    generator = random(count)
    layers = []
    for i in range(count):
        groups = 1 + 2 * (i % 5 == 0)
        n, d = torch.randint(2, 40, (2,), generator=generator).tolist()
        if i % 7 == 0:
            n = 2
        if i % 11 == 0:
            d = 2
        x = spoiled(torch.randn(groups, n, d, generator=generator), i).to(dtype)
        layers.append(SmallLayer(f"layer {i}", x, measure))
    return layers


def assert_alike(one, other):
    """What two ways find about a layer is the same up to rounding."""
    first, second = one.uniformity, other.uniformity
    for name in ("name", "groups", "neurons", "dimension", "dead", "nonfinite", "exact"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("energy", "penalty", "ratio"):
        expected = pytest.approx(getattr(second, name), rel=1e-6, abs=1e-6, nan_ok=True)
        assert getattr(first, name) == expected
    # Room up to the bound may be a small difference of large numbers.
    assert first.score == pytest.approx(second.score, rel=1e-4, abs=1e-4, nan_ok=True)
    assert first.min_angle == pytest.approx(second.min_angle, rel=1e-6, abs=1e-6, nan_ok=True)
    for name in ("similar", "opposite", "dead", "dead_rows", "live", "finding"):
        assert getattr(one, name) == getattr(other, name)
    assert sum(one.angles) == sum(other.angles)
    moved = sum(abs(a - b) for a, b in zip(one.angles, other.angles, strict=True))
    assert moved <= 2  # an angle on an edge may fall to either side
    angles = sorted(pair.angle for pair in one.pairs)  # the order of ties may differ
    wanted = sorted(pair.angle for pair in other.pairs)
    assert angles == pytest.approx(wanted, rel=1e-6, abs=1e-5)
    assert Counter(one.shown) == Counter(other.shown)
    # Singular values are roots: those of 0 come out as 1e-8 or so.
    assert one.singular_values == pytest.approx(other.singular_values, rel=1e-6, abs=1e-6)
    cosines = one.cosines.flatten().sort().values
    torch.testing.assert_close(cosines, other.cosines.flatten().sort().values, rtol=0, atol=1e-6)


def one_by_one(layers):
    """What the readable version finds."""
    found = []
    for layer in layers:
        one = look_at(
            layer.name,
            layer.x,
            layer.measure,
            similar_above=0.95,
            keep=5000,  # all: of more that are the same, rounding decides which are kept
            done=lambda part: None,
        )
        found.append(one)
    return found


@pytest.mark.usefixtures("_few_random_layers")
@pytest.mark.parametrize("measure", MEASURES, ids=repr)
def test_many_at_once_are_as_one_by_one(measure, shipped_defaults):
    # What random layers have is simulated for each shape where the measure is no mean over pairs.
    many = 90 if measure == HALF else 45  # of every kind
    layers = small_layers(many if measure.pair_term() else 15, measure)
    found = look_at_together(layers, similar_above=0.95, keep=5000)
    for one, other in zip(found, one_by_one(layers), strict=True):
        assert_alike(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_as_one_by_one(dtype, shipped_defaults):
    layers = small_layers(40, HALF, dtype)
    found = look_at_together(layers, similar_above=0.95, keep=5000)
    for one, other in zip(found, one_by_one(layers), strict=True):
        assert_alike(one, other)


@pytest.mark.usefixtures("_few_random_layers")
def test_measures_and_shapes_may_be_mixed(shipped_defaults):
    layers = small_layers(20, HALF) + small_layers(20, FULL) + small_layers(5, KoLeo())
    found = look_at_together(layers, similar_above=0.95, keep=5000)
    assert [one.name for one in found] == [layer.name for layer in layers]
    for one, other in zip(found, one_by_one(layers), strict=True):
        assert_alike(one, other)


def test_sizes_are_padded_by_a_quarter_at_most():
    sizes = [padded(size) for size in range(1, 129)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 22
    for size, found in enumerate(sizes, 1):
        assert size <= found <= max(4, 1.25 * size + 1)


def test_the_heat_map_follows_the_most_similar():
    x = torch.randn(1, 30, 12, generator=random(0))
    (one,) = look_at_together([SmallLayer("a", x, HALF)], similar_above=0.95, keep=0)
    (other,) = one_by_one([SmallLayer("a", x, HALF)])
    assert one.shown == other.shown
    torch.testing.assert_close(one.cosines, other.cosines, rtol=0, atol=1e-6)


@pytest.mark.parametrize("measure", [HALF, FULL, GaussianPotential(t=3.0)], ids=repr)
def test_energies_of_small_groups_are_those_of_the_oracle(measure):
    x = torch.randn(3, 9, 4, generator=random(1), dtype=torch.float64)
    x[1, 3] = x[1, 5] + 1e-7 * torch.randn(4, generator=random(2), dtype=torch.float64)
    x[2, 3] = -x[2, 5]
    term = measure.pair_term()
    wanted = oracle_energy(x, term)
    torch.testing.assert_close(SmallGroups(x).energies(term), wanted, rtol=1e-9, atol=0)


def test_many_layers_take_few_operations(monkeypatch):
    state = {f"{i}.weight": torch.randn(6, 9, generator=random(i)) for i in range(200)}
    calls = Counter()
    for name in ("eigvalsh", "vector_norm"):
        original = getattr(torch.linalg, name)

        def counting(*args, name=name, original=original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, counting)
    found = report(state, head=None)
    assert len(found.layers) == 200
    assert 0 < calls["eigvalsh"] <= 2
    assert 0 < calls["vector_norm"] < 20


def test_neurons_are_read_once_and_few_are_held(monkeypatch):
    monkeypatch.setattr(looks_module, "_WAITING", 500)
    state = {f"{i}.weight": torch.randn(6, 9, generator=random(i)) for i in range(60)}
    held = []
    together = look_at_together

    def watched(layers, **settings):
        held.append(sum(layer.x.numel() for layer in layers))
        return together(layers, **settings)

    monkeypatch.setattr(looks_module, "look_at_together", watched)
    found = report(state, head=None)
    assert [layer.name for layer in found.layers] == [str(i) for i in range(60)]
    assert sum(held) == 60 * 54
    assert max(held) <= 500 + 54


def test_a_report_on_many_has_each_layer_once_and_in_order(monkeypatch):
    state = {}
    for i in range(40):
        state[f"{i}.weight"] = torch.randn(5 + i % 3, 8, generator=random(i))
        if i % 10 == 0:
            state[f"large{i}.weight"] = torch.randn(200, 300, generator=random(i))
    told = []
    found = report(state, progress=lambda name, part: told.append(part))
    monkeypatch.setattr(looks_module, "_FEW", 1000)
    other = report(state)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
    for one, wanted in zip(found.layers, other.layers, strict=True):
        assert_alike(one, wanted)


def test_sampled_measures_and_large_layers_go_one_by_one():
    assert is_small((1, 64, 64), HALF)
    assert not is_small((1, 64, 64), Sampled(HALF, block=16))
    assert not is_small((1, 200, 8), HALF)
    assert not is_small((1000, 64, 64), HALF)


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("d", [2, 5])
def test_all_similar_pairs_are_counted(d, half_space, monkeypatch):
    monkeypatch.setattr(duplicates, "_ENTRIES", 3000)  # a few rows at a time
    w = torch.randn(150, d, generator=random(d))
    w[7] = 2.0 * w[9]
    w[20] = -w[11]
    w[13] = 0.0
    w[14] = math.nan
    wanted = pair_histogram(w, above=0.9, half_space=half_space, keep=25)
    found = similar_pairs(w, above=0.9, half_space=half_space, keep=25)
    assert found.all_counted
    assert (found.similar, found.opposite) == (wanted.similar, wanted.opposite)
    assert found.pair_angles.tolist() == pytest.approx(wanted.pair_angles.tolist(), abs=1e-5)
    assert found.nearest == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("d", [2, 40])
def test_the_nearest_is_told_where_none_is_similar(d, half_space):
    w = torch.randn(30, d, generator=random(1))
    if d == 2:
        w = w[:3]
    found = similar_pairs(w, above=0.99999, half_space=half_space)
    layer = one_by_one([SmallLayer("a", w[None], RieszEnergy(half_space=half_space))])[0]
    assert found.similar == 0
    assert len(found.pairs) == 0
    assert found.nearest == pytest.approx(layer.uniformity.min_angle, rel=1e-6)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("d", [2, 3])
def test_fewer_than_two_have_no_pair(n, d):
    found = similar_pairs(torch.ones(n, d))
    assert (found.similar, found.nearest, len(found.pairs)) == (0, math.inf, 0)


@pytest.mark.parametrize("half_space", [False, True])
def test_planted_duplicates_are_found_by_hashes(half_space, monkeypatch):
    monkeypatch.setattr(duplicates, "_AFFORDABLE", 0.0)
    w = torch.randn(6000, 48, generator=random(4))
    planted = set()
    for i in range(0, 400, 2):
        noise = 0.02 * torch.randn(48, generator=random(i))
        w[i + 1] = 3.0 * (w[i] + noise)
        planted.add((i, i + 1))
    for i in range(400, 500, 2):
        w[i + 1] = -0.1 * w[i]
        if half_space:
            planted.add((i, i + 1))
    found = similar_pairs(w, half_space=half_space, keep=1000)
    assert not found.all_counted
    assert {tuple(pair) for pair in found.pairs.tolist()} == planted
    assert found.similar == len(planted)
    assert found.opposite == (50 if half_space else 0)
    again = similar_pairs(w, half_space=half_space, keep=1000)
    assert torch.equal(found.pairs, again.pairs)


def test_a_search_ends_where_nearly_all_are_the_same(monkeypatch):
    monkeypatch.setattr(duplicates, "_AFFORDABLE", 0.0)
    monkeypatch.setattr(duplicates, "_LISTED", 1000)
    found = similar_pairs(torch.ones(5000, 4) + 1e-3 * torch.randn(5000, 4, generator=random(0)))
    assert 1000 < found.similar < 20000
    assert found.pairs.shape == (100, 2)


def large(n=3000, d=24):
    """A layer with duplicates, dead neurons and a common direction."""
    x = torch.randn(n, d, generator=random(0)) + 0.3
    x[100] = 2.0 * x[2000]
    x[101] = -2.0 * x[2001]
    x[5] = 0.0
    x[6] *= 1e-6
    return x


@pytest.mark.parametrize("measure", [HALF, FULL, RieszEnergy(s=0.0), GaussianPotential(t=2.0)])
def test_a_sampled_energy_is_as_near_as_it_says(measure):
    state = {"a.weight": large()}
    exact = report(state, measure, head=None, sample_above=None).layers[0]
    found = report(state, measure, head=None, sample_above=1500).layers[0]
    assert (exact.sampled, found.sampled) == (None, 1500)
    numbers = found.uniformity
    assert not numbers.exact
    assert 0.0 < numbers.standard_error < 0.02 * abs(exact.uniformity.energy)
    assert abs(numbers.energy - exact.uniformity.energy) < 4 * numbers.standard_error
    assert found.ratio == pytest.approx(exact.ratio, rel=0.05)
    for name in ("similar", "opposite", "dead", "dead_rows", "live"):
        assert getattr(found, name) == getattr(exact, name)
    assert numbers.min_angle == pytest.approx(exact.uniformity.min_angle, abs=1e-5)
    assert found.singular_values == pytest.approx(exact.singular_values, rel=1e-6)
    assert [pair[:3] for pair in found.pairs] == [pair[:3] for pair in exact.pairs]
    assert {100, 2000} <= set(found.shown)


def test_errors_are_those_of_repeated_samples():
    x = large(4000)
    whole = float(HALF(x))
    misses = []
    for i in range(20):
        shuffled = x[torch.randperm(4000, generator=random(i))]
        found = report({"a.weight": shuffled}, head=None, sample_above=256).layers[0].uniformity
        misses.append((found.energy - whole) / found.standard_error)
    spread = torch.tensor(misses).square().mean().sqrt()
    assert 0.6 < float(spread) < 1.6  # 20 draws: within 30 % of 1 two times out of three


def test_a_sample_is_the_same_each_time():
    state = {"a.weight": large()}
    first = report(state, head=None, sample_above=500)
    second = report(state, head=None, sample_above=500)
    assert first.to_json() == second.to_json()
    assert first.to_html() == second.to_html()


def test_groups_are_sampled_each():
    model = nn.Conv2d(6, 3000, 3, groups=2, bias=False)
    with torch.no_grad():
        model.weight[1600] = model.weight[1700]
    exact = report(model, sample_above=None).layers[0]
    found = report(model, sample_above=400).layers[0]
    assert found.sampled == 800
    assert abs(found.uniformity.energy - exact.uniformity.energy) < (
        4 * found.uniformity.standard_error
    )
    assert [pair[:3] for pair in found.pairs] == [(1, 100, 200)]


def test_what_is_sampled_is_said(monkeypatch, tmp_path, capsys):
    state = {"a.weight": large(), "b.weight": torch.randn(20, 24, generator=random(9))}
    found = report(state, head=None, sample_above=1000)
    error = f"{found.layers[0].uniformity.standard_error:.1e}"
    words = f"1,000 of 3,000 x 24 sampled, energy +- {error}; all pairs were searched"
    assert f"note: a: {words}" in str(found)
    assert "note: b" not in str(found)
    assert "1,000 of 3,000 x 24 " in str(found).splitlines()[2]
    assert words in found.to_html()
    layer, other = json.loads(found.to_json())["layers"]
    assert (layer["sampled"], layer["all_counted"], layer["exact"]) == (1000, True, False)
    assert layer["standard_error"] == found.layers[0].uniformity.standard_error
    assert layer["gradient_error"] is None
    assert (other["sampled"], other["exact"]) == (None, True)
    monkeypatch.setattr(duplicates, "_AFFORDABLE", 0.0)
    hashed = report(state, head=None, sample_above=1000)
    assert "searched by random hashes, so there may be more" in str(hashed)
    assert "at least 4 neurons in near-duplicate groups" in hashed.layers[0].finding
    torch.save(state, tmp_path / "a.pt")
    arguments = [str(tmp_path / "a.pt"), "--head", "none", "--sample-above"]
    for command in (["report", *arguments], ["compare", str(tmp_path / "a.pt"), *arguments]):
        assert main([*command, "1000"]) == 0
        assert "1,000 of 3,000 x 24" in capsys.readouterr().out
        assert main([*command, "none"]) == 0
        assert "sampled" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["report", *arguments, "few"])
    assert "--sample-above" in capsys.readouterr().err


def test_compare_samples_too():
    state = {"a.weight": large(), "b.weight": torch.randn(20, 24, generator=random(9))}
    found = compare(state, state, head=None, sample_above=1000).layers[0]
    assert (found.before.sampled, found.after.sampled, found.moved) == (1000, 1000, 0.0)
    assert compare(state, state, head=None, sample_above=None).layers[0].after.sampled is None


def shuffled(x):
    return x[torch.randperm(len(x), generator=random(4))]


@pytest.mark.parametrize("measure", [HALF, RieszEnergy(s=0.0), GaussianPotential(t=2.0)])
def test_a_change_within_the_standard_error_is_none(measure):
    before, after = {"a.weight": large()}, {"a.weight": shuffled(large())}
    found = compare(before, after, measure, head=None, sample_above=1000)
    (one,) = found.layers
    first, second = one.before.ratio, one.after.ratio
    assert first != second  # of other neurons
    level = random_level(measure, 2998, 24)
    for layer, error in zip((one.before, one.after), one.ratio_errors, strict=True):
        numbers = layer.uniformity
        further = measure.ratio(torch.tensor(numbers.energy + numbers.standard_error), level)
        assert error == pytest.approx(abs(float(further) - layer.ratio), rel=0.1)
    assert one.ratio_error == pytest.approx(math.hypot(*one.ratio_errors))
    assert abs(second - first) < 3.0 * one.ratio_error
    assert one.ratio_change == "same"
    assert (found.drift.rose, found.drift.fell) == ("", "")
    assert found.drift.ratio_error == one.ratio_error
    assert found.to_dict()["ratio_changes"]["a"] == {
        "change": "same",
        "standard_error": one.ratio_error,
    }
    exact = compare(before, after, measure, head=None, sample_above=None)
    assert exact.layers[0].ratio_errors == (0.0, 0.0)
    assert exact.layers[0].ratio_change == "same"  # but for rounding
    assert "+-" not in str(exact)


def test_a_standard_error_is_shown_with_its_change():
    random_neurons = torch.randn(3000, 24, generator=random(1))
    states = {"a.weight": large(), "b.weight": large()}
    others = {"a.weight": shuffled(large()), "b.weight": random_neurons}
    found = compare(states, others, head=None, sample_above=100)
    a, b = found.layers
    assert (a.ratio_change, b.ratio_change) == ("same", "fell")
    assert (found.drift.rose, found.drift.fell) == ("", "b")
    table = comparison_table(found)
    place = [column.heading for column in table.columns].index("ratio")
    first, second = (row[place] for row in table.rows)
    assert first == (f"{a.before.ratio:.3f} ~ {a.after.ratio:.3f} +-{a.ratio_error:.2g}")
    assert second == f"{b.before.ratio:.3f} -> {b.after.ratio:.3f} +-{b.ratio_error:.2g}"
    said = " ".join(str(found).split())
    assert said.count("+-: standard error of a ratio's change, where it is of samples; ~: a") == 1
    assert re.search(
        r"mean energy ratio of 2 layers [0-9.]+ -> [0-9.]+ \(-[0-9.]+ \+- [0-9.]+ %\)", said
    )
    page = found.to_html()
    assert f"{a.after.ratio:.3f} &plusmn;{a.ratio_error:.2g}" in page
    assert page.count("standard error of a ratio&#x27;s change") == 1
    for state in (states, others):
        del state["b.weight"]
    alike = compare(states, others, head=None, sample_above=100)
    assert re.search(r"energy ratio [0-9.]+ ~ [0-9.]+ \(within three standard errors", str(alike))


@pytest.mark.parametrize("wrong", [3, -1, 2.5, True])
def test_a_sample_of_too_few_is_refused(wrong):
    with pytest.raises((ValueError, TypeError), match="sample_above"):
        report({"a.weight": torch.randn(8, 4)}, sample_above=wrong)


def test_a_measure_that_is_no_mean_over_pairs_is_not_sampled():
    found = report({"a.weight": large()[:600]}, KoLeo(), head=None, sample_above=100).layers[0]
    assert found.sampled is None
    assert found.uniformity.exact


def test_broken_and_dead_neurons_of_a_sampled_layer():
    x = torch.zeros(2000, 8)
    x[:700] = torch.randn(700, 8, generator=random(3))
    x[900:903] = math.inf
    broken = report({"a.weight": x}, head=None, sample_above=800).layers[0]
    assert (broken.uniformity.dead, broken.uniformity.nonfinite) == (1297, 3)
    assert math.isnan(broken.ratio)
    x[900:903] = 0.0
    found = report({"a.weight": x, "b.weight": x}, head=None, sample_above=800).layers[0]
    exact = report({"a.weight": x, "b.weight": x}, head=None, sample_above=None).layers[0]
    assert (found.uniformity.dead, found.uniformity.nonfinite) == (1300, 0)
    assert found.uniformity.energy == pytest.approx(exact.uniformity.energy, rel=1e-6)
    assert (found.dead, found.live, found.similar) == (exact.dead, exact.live, exact.similar)
    nothing = report({"a.weight": torch.zeros(500, 8)}, head=None, sample_above=100).layers[0]
    assert nothing.finding.startswith("fewer than two live neurons")


@pytest.mark.parametrize(
    ("layers", "sample_above"), [(1, None), (1, 8), (20, None)], ids=["one", "sampled", "many"]
)
@pytest.mark.parametrize("broken", [3, 15, 20])
def test_infinite_neurons_are_not_dead_and_kill_no_others(layers, sample_above, broken):
    x = torch.randn(20, 6, generator=random(4))
    x[:broken] = math.inf
    x[19] *= 1e-6
    state = {f"{i}.weight": x for i in range(layers)}
    for layer in report(state, head=None, sample_above=sample_above).layers:
        rows = (19,) if broken < 20 else ()
        assert layer.dead_rows == rows
        assert layer.dead == len(rows)
        assert layer.uniformity.nonfinite == broken
        assert f"{broken} NaN or infinite" in layer.finding


def test_a_steep_sampled_energy_without_reference_has_no_ratio(monkeypatch):
    """And no layer of that many random neurons is simulated, which would be more work than not to sample."""
    simulated = []
    monkeypatch.setattr(reference, "_simulated", lambda *args: simulated.append(args))
    x = torch.randn(6000, 4, generator=random(0))
    measure = RieszEnergy(s=6.0, softening=0.0)
    found = report({"a.weight": x}, measure, head=None, sample_above=512).layers[0]
    assert math.isnan(found.ratio)
    assert found.finding.startswith("no random reference")
    assert not simulated


@pytest.mark.parametrize("shape", [(1, 3000, 64), (1, 2500, 150), (4, 800, 30)])
@pytest.mark.parametrize("sample_above", [None, 700])
def test_progress_moves_within_a_layer(shape, sample_above, monkeypatch):
    # What is a small part of a layer of this size, as it is of one of many thousand neurons.
    monkeypatch.setattr(histogram, "_ENTRIES", 2**16)
    monkeypatch.setattr(duplicates, "_ENTRIES", 2**16)
    monkeypatch.setattr(sample_module, "BLOCK", 64)
    monkeypatch.setattr(looks_module, "BLOCK", 64)
    groups, n, d = shape
    model = nn.Conv1d(groups * d, groups * n, 1, groups=groups, bias=False)
    told = []
    report(model, sample_above=sample_above, progress=lambda name, part: told.append(part))
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(told) > 15
    steps = [after - before for before, after in pairwise(told)]
    assert max([told[0], *steps]) < 0.2


def test_only_the_worst_of_very_many_layers_get_figures(monkeypatch):
    from lightning_hsu.report import page

    monkeypatch.setattr(page, "_FIGURES", 10)
    state = {f"{i}.weight": torch.randn(6, 9, generator=random(i)) for i in range(30)}
    state["30.weight"] = torch.ones(6, 9)
    text = report(state, head=None).to_html()
    assert text.count("<h3>Singular values</h3>") == 10
    assert "Figures are shown for the 10 layers with the highest ratios." in text
    assert text.count("<details class=") == 31
    at = text.index('id="layer-30"')
    assert "<h3>Singular values</h3>" in text[at:]
    few = report({name: state[name] for name in list(state)[:10]}, head=None).to_html()
    assert "Figures are shown" not in few


def plain_hull(points):
    """The corners of the convex envelope of points, by one walk from left to right."""
    hull = []
    for x, y in points:
        while len(hull) > 1:
            (a, fa), (b, fb) = hull[-2:]
            if (fb - fa) * (x - a) < (y - fa) * (b - a):
                break
            hull.pop()
        hull.append((x, y))
    return hull


@pytest.mark.parametrize("bend", [0.0, 1.0, 8.0])
def test_a_convex_envelope_is_that_of_a_plain_walk(bend):
    x = torch.linspace(0.0, 1.0, 400, dtype=torch.float64)
    y = (x - 0.4).square() + 0.01 * bend * torch.sin(20.0 * x)
    y[123] -= 0.02
    corners = _lower_hull(x, y).tolist()
    wanted = plain_hull(zip(x.tolist(), y.tolist(), strict=True))
    assert [(float(x[i]), float(y[i])) for i in corners] == wanted


@pytest.mark.parametrize("measure", [HALF, FULL, GaussianPotential(t=2.0)], ids=repr)
@pytest.mark.parametrize(("n", "d"), [(3, 2), (5, 4), (20, 3), (60, 9)])
def test_what_few_draws_show_is_within_the_range(measure, n, d):
    low, high = random_range(measure, n, d)
    values = measure(torch.randn(300, n, d, generator=random(n))).tolist()
    sure = [value for value in values if is_surely_random(measure, n, d, value)]
    assert len(sure) > 250
    assert low <= min(sure) <= max(sure) <= high
    assert not is_surely_random(measure, n, d, high + 0.01)
