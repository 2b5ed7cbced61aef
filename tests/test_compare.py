"""Comparisons of two networks: dictionaries matched one to one, and the drift of a fine-tune."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_hsu._core import assignment
from lightning_hsu._core.assignment import best_assignment, mutual_nearest, nearest_of_random
from lightning_hsu._neurons.names import dictionaries
from lightning_hsu.report import build, compare, matching
from lightning_hsu.report.cli import main
from lightning_hsu.report.comparison_table import comparison_table
from lightning_hsu.report.drift import drift_line
from lightning_hsu.report.tables import plain

WIDTH = 12
needs_scipy = pytest.mark.skipif(
    not assignment.can_assign(), reason="needs scipy: pip install lightning-hsu[hull]"
)


def directions(n, seed=0, d=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator)


def sae(decoder):
    """A state dict of a sparse autoencoder with these directions (n, d)."""
    return {"W_dec": decoder, "b_enc": torch.zeros(len(decoder)), "b_dec": torch.zeros(WIDTH)}


def shuffled(x, seed=1):
    """The rows in another order, some of them negated, and where each went."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    signs = torch.where(torch.rand(len(x), 1, generator=generator) < 0.5, -1.0, 1.0)
    return (signs * x)[order], order.argsort().tolist()


def only(found):
    """The only layer of a comparison."""
    (one,) = found.layers
    return one


@pytest.fixture
def no_scipy(monkeypatch):
    monkeypatch.setattr(matching, "can_assign", lambda: False)


# Matching.


@needs_scipy
@pytest.mark.parametrize("match", ["auto", "assignment"])
def test_a_shuffled_dictionary_is_the_same(match):
    x = directions(40)
    y, places = shuffled(x)
    found = compare(sae(x), sae(y), match=match)
    one = only(found)
    assert one.moved == pytest.approx(0.0, abs=1e-6)  # degrees, of float64 unit rows
    assert one.matched == tuple(places)
    assert (one.matching.how, one.matching.agreement) == ("assignment", 1.0)
    assert one.matching.mean == pytest.approx(1.0)
    assert one.matching.random_cosine < 0.8
    assert "agreement 100 %: 40 of 40 neurons have a counterpart" in str(found)
    assert only(compare(sae(x), sae(y), match="index")).moved > 30.0


@needs_scipy
def test_opposite_neurons_differ_in_full_space():
    x = directions(40)
    head = {"fc.weight": x}
    assert only(compare(head, {"fc.weight": -x}, head="fc", match="assignment")).moved > 20.0
    found = compare(head, {"fc.weight": x.flip(0)}, head="fc", match="assignment")
    assert only(found).matched == tuple(reversed(range(40)))
    assert only(found).moved == pytest.approx(0.0, abs=1e-6)


@needs_scipy
def test_noise_moves_neurons_by_its_angle():
    x = directions(60)
    x = x / x.norm(dim=1, keepdim=True)
    noise = directions(60, seed=5)
    noise = noise - (noise * x).sum(1, keepdim=True) * x
    angle = 4.0  # degrees
    y = x + math.tan(math.radians(angle)) * noise / noise.norm(dim=1, keepdim=True)
    y, places = shuffled(y)
    one = only(compare(sae(x), sae(y)))
    assert one.moved == pytest.approx(angle, abs=1e-3)
    assert one.matched == tuple(places)
    assert one.matching.median == pytest.approx(math.cos(math.radians(angle)), abs=1e-5)
    for similar_above, agreeing in ((0.99, 60), (0.999, 0)):  # beside a cosine of 0.9976
        found = only(compare(sae(x), sae(y), similar_above=similar_above)).matching
        assert found.agreeing == agreeing


@needs_scipy
@pytest.mark.parametrize(("n", "m"), [(20, 33), (33, 20)])
def test_dictionaries_of_different_sizes(n, m):
    x = directions(33)
    y, places = shuffled(x)
    x, y = x[:n], y[:m]
    found = compare(sae(x), sae(y))
    one = only(found)
    expected = []
    for i in range(n):
        expected.append(places[i] if places[i] < m else -1)
    inside = [i for i in range(n) if expected[i] >= 0]
    assert [one.matched[i] for i in inside] == [expected[i] for i in inside]
    assert one.matching.matched == min(n, m) == sum(i >= 0 for i in one.matched)
    assert (one.matching.before, one.matching.after) == (n, m)
    assert one.matching.agreeing == len(inside)
    when = "after" if m > n else "before"
    assert f"without a match: 13 of 33 {when}" in " ".join(str(found).split())


@needs_scipy
def test_the_sum_of_cosines_is_the_largest():
    # At 10 and -30 degrees, and at 0 and 40: the nearest pair leaves one of 70 degrees.
    x = at_degrees(10.0, -30.0)
    y = at_degrees(0.0, 40.0)
    rows, columns = best_assignment(x, y, half_space=True)
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])


def at_degrees(*angles):
    """Unit vectors of the plane (n, 2)."""
    turns = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([turns.cos(), turns.sin()], 1)


@needs_scipy
def test_dead_neurons_have_no_match():
    x, y = directions(10), directions(10).flip(0)
    x[3] = 0.0
    y[0] = math.nan  # was neuron 9
    one = only(compare(sae(x), sae(y)))
    assert one.matched[3] == -1
    assert (one.matching.before, one.matching.after, one.matching.matched) == (9, 9, 9)
    assert 0 not in one.matched
    assert one.matching.agreeing == 8
    dead = compare(sae(torch.zeros(10, WIDTH)), sae(y))
    assert math.isnan(only(dead).moved)
    assert only(dead).matching is None
    assert "no neuron is matched" in str(dead)


@needs_scipy
def test_groups_are_matched_within():
    torch.manual_seed(0)
    model, other = nn.Conv2d(8, 12, 2, groups=4), nn.Conv2d(8, 12, 2, groups=4)
    with torch.no_grad():
        by_group = model.weight.view(4, 3, 2, 2, 2)
        other.weight.copy_(-by_group.roll(1, 1).reshape(12, 2, 2, 2))
    one = only(compare(model, other, match="assignment", head=None))
    expected = []
    for group in range(4):
        expected += [3 * group + 1, 3 * group + 2, 3 * group]
    assert one.matched == tuple(expected)
    assert one.moved == pytest.approx(0.0, abs=1e-6)


@needs_scipy
def test_only_dictionaries_are_matched_unasked():
    x = directions(40)
    y, _ = shuffled(x)
    layers = {"fc.weight": x, "out.weight": directions(5)}
    found = compare(layers, {"fc.weight": y, "out.weight": directions(5)})
    assert [one.matched for one in found.layers] == [None, None]
    assert found.notes == ()
    codes = "quantizer.codebook"
    one = only(compare({codes: x}, {codes: y}))
    assert one.moved == pytest.approx(0.0, abs=1e-6)
    model = nn.ParameterDict({"W_dec": x})
    assert only(compare(model, nn.ParameterDict({"W_dec": y}))).matched is not None


def test_the_encoder_belongs_to_its_dictionary():
    state = {
        "encoder.weight": directions(40),
        "encoder.bias": torch.zeros(40),
        "decoder.weight": directions(40).T.contiguous(),
        "decoder.bias": torch.zeros(WIDTH),
        "other.weight": directions(40),
    }
    targets = build.find_targets(state, None, None, None, None).targets
    assert dictionaries(targets) == {"encoder", "decoder"}


def test_prototypes_of_classes_have_an_order():
    model = nn.ModuleDict({"codebook": nn.Embedding(9, 4), "proxies": nn.Embedding(9, 4)})
    targets = build.find_targets(model, None, None, None, None).targets
    assert [target.kind for target in targets] == ["codebook", "codebook"]
    assert dictionaries(targets) == {"codebook"}


@needs_scipy
def test_other_dimensions_and_groups_are_said():
    found = compare(
        {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(6, 4)},
        {"a.weight": torch.randn(6, 5), "b.weight": torch.randn(6, 4)},
        match="assignment",
    )
    first, second = found.layers
    assert math.isnan(first.moved)
    assert second.matched is not None
    assert "note: a: not matched: neurons of dimension 4 and 5" in " ".join(str(found).split())
    assert found.drift.not_followed == ("a",)
    assert "how far is not known of a" in " ".join(str(found).split())


def test_too_many_for_an_assignment(monkeypatch, no_scipy):
    monkeypatch.setattr(matching, "MOST_ASSIGNED", 30)
    x = directions(2000, d=6)
    y, places = shuffled(x)
    y = torch.cat([y, directions(100, seed=9, d=6)])
    state, other = {"codebook": x}, {"codebook": y}
    found = compare(state, other)
    one = only(found)
    assert one.matched == tuple(places)
    assert one.matching.how == "mutual"
    said = " ".join(str(found).split())
    assert "more than 30 neurons are too many for an exact assignment" in said
    assert "without a match: 100 of 2,100 after" in said
    monkeypatch.setattr(matching, "MOST_PRODUCTS", 1e3)
    found = compare(state, other)
    assert only(found).matched is None
    assert "too many to search for the nearest" in " ".join(str(found).split())


def test_mutual_nearest_neighbours_of_several_blocks():
    x = directions(1500, d=5).double()
    y = directions(1300, seed=3, d=5).double()
    x, y = nn.functional.normalize(x, dim=1), nn.functional.normalize(y, dim=1)
    for half_space in (True, False):
        cosine = x @ y.T
        if half_space:
            cosine = cosine.abs()
        nearest, back = cosine.argmax(1).tolist(), cosine.argmax(0).tolist()
        expected = [(i, j) for i, j in enumerate(nearest) if back[j] == i]
        rows, columns = mutual_nearest(x, y, half_space=half_space)
        assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected


@pytest.mark.parametrize("half_space", [True, False])
@pytest.mark.parametrize(("count", "d"), [(1, 3), (40, 3), (200, 16)])
def test_the_nearest_of_random_directions(count, d, half_space):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4000, count, d, generator=generator, dtype=torch.float64)
    cosine = nn.functional.normalize(x, dim=-1)[..., 0]  # with the first axis
    if half_space:
        cosine = cosine.abs()
    nearest = cosine.amax(1)
    mean, angle = nearest_of_random(count, d, half_space=half_space)
    # Four standard errors of 4,000 draws.
    assert mean == pytest.approx(float(nearest.mean()), abs=4 * float(nearest.std()) / 4000**0.5)
    angles = nearest.arccos().rad2deg()
    assert angle == pytest.approx(float(angles.mean()), abs=4 * float(angles.std()) / 4000**0.5)


@pytest.mark.parametrize("how", ["assignment", "mutual"])
def test_random_dictionaries_are_as_random(monkeypatch, how):
    if how == "assignment" and not assignment.can_assign():
        pytest.skip("needs scipy: pip install lightning-hsu[hull]")
    if how == "mutual":
        monkeypatch.setattr(matching, "MOST_ASSIGNED", 10)
    found = only(compare(sae(directions(500)), sae(directions(700, seed=1)))).matching
    assert found.how == how
    if how == "assignment":
        assert 0.9 * found.random_cosine < found.mean <= found.random_cosine
    else:  # a standard error of 0.005
        assert found.mean == pytest.approx(found.random_cosine, abs=0.02)


def test_without_scipy(no_scipy, tmp_path, capsys):
    x = directions(40)
    y, _ = shuffled(x)
    found = compare(sae(x), sae(y))
    assert only(found).matched is None
    assert only(found).moved > 30.0
    said = " ".join(str(found).split())
    assert "note: W_dec: matched by index: to match a dictionary, whose order means" in said
    assert "pip install lightning-hsu[hull]" in said
    with pytest.raises(
        ModuleNotFoundError, match=r"needs scipy: pip install lightning-hsu\[hull\]"
    ):
        compare(sae(x), sae(y), match="assignment")
    path = tmp_path / "a.pt"
    torch.save(sae(x), path)
    assert main(["compare", str(path), str(path), "--match", "assignment"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install lightning-hsu[hull]" in line
    assert main(["compare", str(path), str(path), "--match", "index"]) == 0
    assert "scipy" not in capsys.readouterr().out


def test_scipy_that_is_not_there(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(assignment, "find_spec", missing)
    assert not assignment.can_assign()


def test_an_unknown_way_of_matching(tmp_path, capsys):
    with pytest.raises(ValueError, match="match must be one of 'auto', 'index', 'assignment'"):
        compare(sae(directions(4)), sae(directions(4)), match="best")
    with pytest.raises(SystemExit) as error:
        main(["compare", "a", "b", "--match", "best"])
    assert error.value.code == 2
    assert "invalid choice: 'best'" in capsys.readouterr().err.splitlines()[-1]


@needs_scipy
def test_matches_in_json_page_and_command(tmp_path, capsys):
    x = directions(40)
    y, places = shuffled(x)
    paths = [str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    torch.save(sae(x), paths[0])
    torch.save(sae(y), paths[1])
    numbers, page = tmp_path / "a.json", tmp_path / "a.html"
    options = ["--json", str(numbers), "--html", str(page)]
    assert main(["compare", *paths, *options]) == 0
    said = capsys.readouterr().out
    below = said[said.index("drift:") :].splitlines()
    assert below[-2:] == [f"wrote {page}", f"wrote {numbers}"]
    assert all(len(line) <= 80 for line in below[:-2])
    assert "--match index matches by index" in " ".join(said.split())
    found = json.loads(numbers.read_text())
    assert found["matching"]["W_dec"]["indices"] == places
    assert found["matching"]["W_dec"]["agreement"] == 1.0
    assert found["notes"][0]["name"] == "W_dec"
    assert found["drift"]["followed"] == 1
    html = page.read_text()
    assert "agreement 100 %: 40 of 40 neurons have a counterpart" in html
    assert "Drift: energy ratio" in html
    assert main(["compare", *paths, "--match", "assignment"]) == 0
    assert "matches by index" not in capsys.readouterr().out


# Near-duplicates, and what the columns show.


def with_copies(*counts):
    """Directions of which each count is so many neurons that point the same way."""
    x = directions(20)
    start = 0
    for count in counts:
        x[start : start + count] = x[start]
        start += count
    return {"a.weight": x}


def test_near_duplicates_are_counted_in_groups():
    found = compare(with_copies(3, 3), with_copies(4), head=None)
    assert (only(found).before.similar, only(found).after.similar) == (6, 6)  # pairs
    table = comparison_table(found)
    place = [column.heading for column in table.columns].index("similar")
    assert table.rows[0][place] == "6 in 2 -> 4 in 1"
    assert ">6 in 2 &rarr; 4 in 1<" in found.to_html()
    numbers = found.to_dict()
    assert numbers["near_duplicates"] == {
        "a": {"before": {"neurons": 6, "groups": 2}, "after": {"neurons": 4, "groups": 1}}
    }
    assert numbers["before"]["layers"][0]["similar"] == 6
    assert "pairs" not in str(found).splitlines()[0]


def test_the_columns_of_a_comparison_are_explained_if_they_are_shown():
    table = comparison_table(compare(with_copies(3), with_copies(3, 2), head=None))
    texts = {
        "moved": "moved: median (largest) angle between neurons before and after, in degrees",
        "ratio": "ratio: energy over that of random neurons",
        "angle": "angle: the smallest between two neurons, in degrees",
        "similar": "similar: neurons with a near-duplicate, in groups that such pairs connect",
    }
    for width in (200, 90, 80, 60):
        fitted = table.fitted(width)
        headings = [column.heading for column in fitted.columns]
        lines = plain(table, width).replace("\n    ", " ").splitlines()
        for heading, text in texts.items():
            assert lines.count(text) == (heading in headings)
        told = [line for line in lines if line.startswith("left out of this narrow table: ")]
        assert len(told) == (width < 200)
        for column in table.columns:
            assert (column.heading in headings) != (column.heading in "".join(told))


# Drift.


def layers(**weights):
    return {f"{name}.weight": x for name, x in weights.items()}


def test_the_drift_of_a_network():
    torch.manual_seed(0)
    before = layers(a=torch.randn(20, 8), b=torch.randn(20, 8), c=torch.randn(20, 8))
    after = {name: x.clone() for name, x in before.items()}
    after["b.weight"][0] = after["b.weight"][1] + 0.05 * torch.randn(8)  # closer: the ratio rises
    after["c.weight"] += 0.1 * torch.randn(20, 8)
    found = compare(before, after, head=None)
    ratios = [(one.before.ratio, one.after.ratio) for one in found.layers]
    drift = found.drift
    assert drift.layers == drift.followed == 3
    assert drift.ratio_before == pytest.approx(sum(first for first, _ in ratios) / 3)
    assert drift.ratio_after == pytest.approx(sum(second for _, second in ratios) / 3)
    assert (drift.rose, drift.rose_from, drift.rose_to) == ("b", *ratios[1])
    assert drift.moved_layers == ("c",)  # of b the median neuron stays
    assert drift.moved == drift.moved_most == found.layers[2].moved
    said = " ".join(str(found).split())
    mean = f"{drift.ratio_before:.4f} -> {drift.ratio_after:.4f}"
    assert f"drift: mean energy ratio of 3 layers {mean} (+" in said
    assert ", rose most in b (" in said
    assert f"the median neuron moved in 1 of 3 layers: by {drift.moved:.1f} degrees in c" in said


def test_the_drift_of_a_network_that_stays():
    state = layers(a=directions(20), b=directions(20, seed=1))
    found = compare(state, state)
    assert (found.drift.moved, found.drift.rose, found.drift.moved_layer) == (0.0, "", "")
    assert drift_line(found.drift).endswith(
        ", as before; the median neuron moved in none of 2 layers"
    )
    json.loads(found.to_json())


def test_a_drift_tells_falls_and_prints_as_a_line():
    tight = directions(20) + 1.0
    before = layers(a=directions(20), b=tight, c=directions(20, seed=2))
    after = layers(a=tight, b=directions(20), c=directions(20, seed=2))
    found = compare(before, after, head=None)
    a, b, _ = found.layers
    drift = found.drift
    assert (drift.rose, drift.rose_from, drift.rose_to) == ("a", a.before.ratio, a.after.ratio)
    assert (drift.fell, drift.fell_from, drift.fell_to) == ("b", b.before.ratio, b.after.ratio)
    assert str(drift) == drift_line(drift)
    assert repr(drift) == f"<{drift}>"
    line = str(drift)
    assert ", rose most in a (" in line
    assert f", fell most in b ({b.before.ratio:.4f} -> {b.after.ratio:.4f}, -" in line
    moved = sorted([a.moved, b.moved])
    assert "the median neuron moved in 2 of 3 layers: by " in line
    assert f"by {sum(moved) / 2:.1f} degrees in the middle one of these, most in " in line
    assert f", by {moved[1]:.1f} degrees; these 2 are a, b; the one that moved most by " in line
    assert found.to_dict()["drift"]["fell"] == "b"
    assert " ".join(str(found).split()).count(line) == 1
    only_falls = compare(layers(b=tight), layers(b=directions(20)), head=None).drift
    assert (only_falls.rose, only_falls.fell) == ("", "b")
    assert math.isnan(only_falls.rose_from)


def test_what_cannot_drift_is_left_out_and_said():
    broken = torch.full((6, 8), math.nan)
    before = layers(a=directions(6), b=broken, c=directions(6))
    after = layers(a=directions(6), b=broken, c=directions(7))
    found = compare(before, after)
    assert (found.drift.layers, found.drift.left_out) == (2, ("b",))
    assert found.drift.not_followed == ("b", "c")
    said = " ".join(str(found).split())
    assert "without a finite ratio, left out: b;" in said
    assert "the median neuron moved by 0.0 degrees; how far is not known of b, c" in said
    nothing = compare(layers(b=broken), layers(b=broken))
    assert "no layer has a ratio before and after" in str(nothing)
    assert json.loads(nothing.to_json())["drift"]["ratio_before"] is None


WEIGHTS = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("q", "k", "mlp")]


def base_and_adapter(folder, name="organisation/model"):
    """The folders of a base and of a LoRA that changes two of its layers."""
    torch.manual_seed(0)
    (folder / "base").mkdir()
    weights = {name: torch.randn(24, 16) for name in WEIGHTS}
    save_file(weights, folder / "base" / "model.safetensors")
    factors = {}
    for i in (0, 2):
        layer = f"base_model.model.model.layers.{i}.q"
        factors[f"{layer}.lora_A.weight"] = torch.randn(2, 16)
        factors[f"{layer}.lora_B.weight"] = 0.1 * (i + 1) * torch.randn(24, 2)
    (folder / "adapter").mkdir()
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": name}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return str(folder / "base"), str(folder / "adapter")


def test_an_adapter_beside_its_base_in_one_command(tmp_path, capsys):
    base, adapter = base_and_adapter(tmp_path)
    assert main(["compare", base, adapter]) == 0
    said = capsys.readouterr().out
    below = said[said.index("drift:") :].splitlines()
    assert all(len(line) <= 80 for line in below)
    said = " ".join(said.split())
    assert "the median neuron moved in 2 of 9 layers: by" in said
    assert "in the middle one of these, most in model.layers.2.q, by" in said
    assert "; these 2 are model.layers.{0,2}.q" in said
    assert "which it is compared with, since no other is there" in said
    found = compare(base, adapter)
    assert found.drift.moved_layers == ("model.layers.0.q", "model.layers.2.q")
    for one in found.layers:
        assert (one.moved == 0.0) == (one.after.name not in found.drift.moved_layers)
    assert "which it is compared with" in " ".join(found.to_html().split())
    back = compare(adapter, base)
    assert [one.moved for one in back.layers] == pytest.approx([one.moved for one in found.layers])
    file = f"{adapter}/adapter_model.safetensors"
    assert compare(f"{base}/model.safetensors", file).drift.moved_layers == found.drift.moved_layers


def test_the_adapters_own_base_comes_first(tmp_path):
    base, adapter = base_and_adapter(tmp_path, name=str(tmp_path / "base"))
    other = tmp_path / "other"
    other.mkdir()
    weights = {name: torch.randn(24, 16) for name in WEIGHTS}
    save_file(weights, other / "model.safetensors")
    for found in (compare(str(other), adapter), compare(other, adapter, base=base)):
        assert len(found.drift.moved_layers) == 9
        assert "which it is compared with" not in str(found)
    assert len(compare(base, adapter).drift.moved_layers) == 2


def test_two_adapters_need_a_base(tmp_path, capsys):
    base, adapter = base_and_adapter(tmp_path)
    assert main(["compare", adapter, adapter]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "give the base, which is organisation/model" in line
    assert main(["compare", adapter, adapter, "--base", base]) == 0
    assert "moved in none of 9 layers" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="give the base"):
        compare({"a.weight": torch.randn(4, 4)}, adapter)


def test_a_layer_with_nan_says_so_in_table_and_page():
    torch.manual_seed(0)
    before = {"fc.weight": torch.randn(9, 16), "out.weight": torch.randn(4, 9)}
    after = {name: x.clone() for name, x in before.items()}
    after["fc.weight"][2, 3] = math.nan
    found = compare(before, after)
    (layer,) = [one.before for one in found.layers if one.before.name == "fc"]
    (row,) = [line for line in str(found).splitlines() if line.startswith("fc ")]
    assert f"{layer.ratio:.3f} -> NaN" in row
    assert f"{layer.uniformity.min_angle:.1f} -> NaN" in row
    page = found.to_html()
    assert f"{layer.ratio:.3f} &rarr; NaN" in page
    assert f"{layer.uniformity.min_angle:.1f}° &rarr; NaN" in page


def test_a_change_of_few_neurons_shows_though_the_median_one_stays():
    torch.manual_seed(0)
    before = {"fc.weight": torch.randn(40, 16), "out.weight": torch.randn(10, 40)}
    after = {name: x.clone() for name, x in before.items()}
    after["fc.weight"][:5] = torch.randn(5, 16)
    found = compare(before, after)
    (fc,) = [one for one in found.layers if one.after.name == "fc"]
    x, y = before["fc.weight"].double(), after["fc.weight"].double()
    angles = torch.nn.functional.cosine_similarity(x, y).clamp(-1, 1).acos().rad2deg()
    assert fc.moved == 0.0
    assert fc.moved_most == pytest.approx(float(angles.max()), abs=1e-3)
    told = f"the one that moved most by {fc.moved_most:.1f} degrees, in fc"
    assert told in str(found.drift)
    assert f"0.0 ({fc.moved_most:.1f})" in str(found)
    page = found.to_html()
    assert f"The neuron that moved most moved by {fc.moved_most:.1f}°." in page
    assert f"0.0° ({fc.moved_most:.1f}°)" in page
    assert found.to_dict()["moved_most"] == {"fc": fc.moved_most, "out": 0.0}


def test_matches_no_better_than_chance_are_called_so():
    torch.manual_seed(0)
    found = compare(sae(torch.randn(64, 16)), sae(torch.randn(64, 16)), match="assignment")
    assert "no better than chance" in str(found)


def test_neurons_that_stay_beside_a_broken_one_have_not_moved():
    torch.manual_seed(0)
    before = {"fc1.weight": torch.randn(16, 8), "fc2.weight": torch.randn(5, 16)}
    after = {name: x.clone() for name, x in before.items()}
    for broken in (float("nan"), 0.0, 1e30):
        after["fc1.weight"][3] = broken
        assert compare(before, after).drift.moved_layers == ()
