"""What a report prints beside its table: pairs, groups, what is not shown, heads, what is broken."""

import html
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_hsu.measures import Orthogonality, RieszEnergy
from lightning_hsu.reference import random_expectation
from lightning_hsu.report import compare, report
from lightning_hsu.report.arguments import parser
from lightning_hsu.report.cli import main
from lightning_hsu.report.similar_lines import group_lines, pair_lines


def test_layers_that_are_not_shown_are_told_with_what_they_have():
    torch.manual_seed(0)
    state = {f"{i}.weight": torch.randn(20, 16) + 0.3 * i for i in range(5)}
    for name in ("0.weight", "1.weight"):
        state[name][3] = state[name][2]
    state["4.weight"][:10] = state["4.weight"][10]  # the worst, which is shown
    state["2.weight"][7] = 0.0
    found = report(state, head=None, similar_above=0.999).table(top=1)
    said = " ".join(found.split())
    assert "; 2 of them with near-duplicates; 1 of them with dead neurons " in said
    lines = found[found.index("not shown") :].splitlines()
    assert max(map(len, lines)) <= 80


def test_pairs_say_which_are_opposite_where_that_is_the_same():
    torch.manual_seed(0)
    x = torch.randn(20, 16)
    x[4] = -x[3]
    x[6] = x[5]
    found = report({"fc.weight": x}, head=None)
    lines = pair_lines(found, 9)
    assert "fc: 3 and 4, 180.00 degrees (opposite)" in lines
    assert "fc: 5 and 6, 0.00 degrees" in lines
    full = pair_lines(report({"fc.weight": x}, RieszEnergy(s=2), head=None), 9)
    assert full == ["fc: 5 and 6, 0.00 degrees"]


def test_lines_of_groups_are_80_columns_wide():
    torch.manual_seed(0)
    state = {f"{'a.long.name.' * 4}fc.weight": torch.randn(1, 16).repeat(60, 1)}
    state["7.weight"] = torch.randn(1, 16).repeat(40, 1)
    found = report(state, head=None)
    lines = group_lines(found, 3) + pair_lines(found, 3)
    assert max(map(len, lines)) <= 80
    said = " ".join(" ".join(lines).split())
    assert "fc: 60 near-duplicates: 0, 1, 2, " in said
    assert "layer 7: 40 near-duplicates: 0, 1, 2, " in said
    assert "39; cosine to the first from 1.0000" in said


def test_dead_neurons_are_listed_by_index():
    torch.manual_seed(0)
    state = {"conv1.weight": torch.randn(200, 16), "fc.weight": torch.randn(200, 16)}
    state["conv1.weight"][[11, 140]] = 0.0
    state["conv1.weight"][7] *= 1e-6
    state["fc.weight"][:60] = 0.0
    lines = group_lines(report(state, head=None, similar_above=0.999), 3)
    assert lines[:2] == ["no near-duplicate neurons", "conv1: 3 dead: 7, 11, 140"]
    assert max(map(len, lines)) <= 80
    said = " ".join(" ".join(lines).split())
    assert "fc: 60 dead: 0, 1, 2, " in said
    assert said.endswith(" 38, 39 and 20 more")
    state["fc.weight"][71] = state["fc.weight"][70]
    lines = group_lines(report(state, head=None, similar_above=0.999), 3)
    assert lines[0] == "conv1: 3 dead: 7, 11, 140"
    assert lines[1] == "fc: 2 near-duplicates: 70, 71; cosine to the first from 1.0000"
    grouped = torch.randn(3, 8, 16)
    grouped[2, 5] = 0.0
    found = report({"experts.w": grouped}, neurons={"experts.w": lambda x: x}, head=None)
    assert "experts.w: 1 dead: 5 of group 2" in group_lines(found, 3)


def test_a_guessed_head_is_told_with_the_way_out(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 10))
    in_python = 'note: head: 2 (guessed: last Linear); head="NAME" or head=None otherwise'
    assert in_python in str(report(model)).splitlines()
    assert in_python in str(report(model.state_dict())).splitlines()
    assert in_python in " ".join(str(compare(model, model)).replace("before, ", "").split())
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert main(["report", str(tmp_path / "a.pt")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "note: head: 2 (guessed: last Linear); --head NAME or --head none otherwise" in shown
    for head in ("2", None):
        assert "guessed" not in str(report(model, head=head))


@pytest.mark.parametrize("option", ["--groups", "--pairs"])
def test_lists_are_of_the_layers_in_the_table(tmp_path, capsys, option):
    torch.manual_seed(0)
    state = {}
    for i, copies in enumerate((3, 0, 9, 6)):
        state[f"l{i}.weight"] = torch.randn(20, 16)
        state[f"l{i}.weight"][: copies + 1] = state[f"l{i}.weight"][0]
    path = str(tmp_path / "a.pt")
    torch.save(state, path)
    orders = {}
    for top in (None, 1, 2, 3, 4):
        arguments = ["report", path, "--head", "none", option, "1"]
        if top is not None:
            arguments += ["--top", str(top)]
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("l") and ": " in line)
        rows = [line.split()[0] for line in lines[2:start] if re.match(r"l\d ", line)]
        listed = dict.fromkeys(line.split(":")[0] for line in lines[start:] if line[0] == "l")
        assert list(listed) == [name for name in rows if name != "l1"]
        orders[top] = rows
    assert orders == {
        None: ["l0", "l1", "l2", "l3"],
        1: ["l2"],
        2: ["l2", "l3"],
        3: ["l2", "l3", "l0"],
        4: ["l2", "l3", "l0", "l1"],
    }


def test_no_duplicates_in_the_layers_that_are_shown_is_said_so():
    torch.manual_seed(0)
    state = {"a.weight": torch.randn(20, 16), "b.weight": torch.randn(20, 16)}
    state["a.weight"][3] = state["a.weight"][2]
    state["b.weight"][3] = math.nan  # the worst
    found = report(state, head=None)
    where = " in the layers that are shown"
    for lines_of, what in ((pair_lines, "pairs"), (group_lines, "neurons")):
        assert lines_of(found, 3, top=1) == [f"no near-duplicate {what}{where}"]
        assert lines_of(found, 3, top=2) == lines_of(found, 3)
        assert len(lines_of(found, 3)) == 1
        plain = report({"c.weight": torch.randn(20, 16)}, head=None)
        assert lines_of(plain, 3, top=1) == [f"no near-duplicate {what}"]


def long_names_in_a_file(folder):
    """A checkpoint whose table is wider than 80 columns."""
    torch.manual_seed(0)
    state = {}
    for i in range(3):
        name = f"encoder.blocks.{i}._attention_output_of_the_block._depthwise_conv.weight"
        state[name] = torch.randn(20, 16)
        state[name][3] = state[name][2]
    torch.save(state, folder / "long.pt")
    return str(folder / "long.pt")


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("columns", [60, 80, 100])
def test_columns_in_the_environment_are_used_in_a_pipe(
    tmp_path, capsys, monkeypatch, columns, rich
):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    path = long_names_in_a_file(tmp_path)
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["report", path, "--groups", "2", "--pairs", "2", "--merge"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    text = lines[next(i for i, line in enumerate(lines) if "above random" in line) :]
    assert min(60, columns) - 20 < max(map(len, text)) <= min(80, columns)
    said = " ".join(" ".join(lines).split())
    told = "some names are shortened; a wider terminal or --json has them whole"
    assert said.count(told) == 1


@pytest.mark.parametrize("columns", [None, "", "0", "-5", "wide", "1e3"])
def test_without_columns_a_pipe_has_the_full_width(tmp_path, capsys, monkeypatch, columns):
    path = long_names_in_a_file(tmp_path)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert main(["report", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-2:] == ["dead", "finding"]
    assert len(lines[0]) > 100
    start = next(i for i, line in enumerate(lines) if "above random" in line)
    assert 60 < max(map(len, lines[start:])) <= 80
    assert "some names are shortened; --json has them whole" in lines


def test_a_wide_pipe_has_whole_names(tmp_path, capsys, monkeypatch):
    path = long_names_in_a_file(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["report", path]) == 0
    said = capsys.readouterr().out
    assert "encoder.blocks.2._attention_output_of_the_block._depthwise_conv " in said
    assert "shortened" not in said


def test_a_file_in_python_is_told_in_the_words_of_python(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 10))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    path = str(tmp_path / "a.pt")
    in_python = 'head="NAME" or head=None otherwise'
    for found in (report(path), compare(path, path)):
        for said in (str(found), found.to_html(), found._repr_html_().replace("&quot;", '"')):
            assert in_python in " ".join(said.replace("&quot;", '"').split())
            assert "--head" not in said


def test_the_pages_of_the_command_line_speak_of_options(tmp_path, capsys):
    torch.manual_seed(0)
    state = {"decoder.weight": torch.randn(16, 16), "encoder.weight": torch.randn(16, 16)}
    path = str(tmp_path / "a.pt")
    torch.save(state, path)
    page = tmp_path / "page.html"
    options = [
        "by columns: --neurons 'encoder=columns'",
        "directions: --neurons 'decoder=columns'",
        "--head NAME or --head none otherwise",
    ]
    python = ["neurons={'encoder': 'columns'}", "neurons={'decoder': 'columns'}", 'head="NAME"']
    for arguments, found in ((["report", path], report(path)), (["compare"] + 2 * [path], None)):
        assert main([*arguments, "--html", str(page), "--json", "all.json"]) == 0
        table = " ".join(capsys.readouterr().out.split())
        found = found or compare(path, path)
        written = " ".join(html.unescape(page.read_text(encoding="utf-8")).split())
        in_python = " ".join(html.unescape(found.to_html()).split())
        for option, argument in zip(options, python, strict=True):
            assert option in table
            assert option in written
            assert argument not in written
            assert argument in in_python
            assert option not in in_python
        assert json.loads(Path("all.json").read_text()) == json.loads(found.to_json())


def test_reworded_data_changes_notes_and_reasons_only():
    torch.manual_seed(0)
    state = {"a.weight": torch.randn(9, 4), "b.weight": torch.zeros(9, 4, dtype=torch.int8)}
    both = compare(state, state)
    changed = both.reworded(str.upper)
    for one, other in ((both.before, changed.before), (both.after, changed.after)):
        assert [note for _, note in other.notes] == [note.upper() for _, note in one.notes]
        assert [name for name, _ in other.notes] == [name for name, _ in one.notes]
        assert [skip.reason for skip in other.skips] == [skip.reason.upper() for skip in one.skips]
        assert len(other.skips) == len(other.notes) == 1
        assert other.layers is one.layers
    assert changed.layers is both.layers


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("count", [3, 20])  # one by one, and all at once
def test_a_broken_layer_is_neither_above_nor_as_random(tmp_path, capsys, value, count):
    torch.manual_seed(0)
    state = {f"{i}.weight": torch.randn(20, 16) + 2.0 * (i < 2) for i in range(count)}
    state["1.weight"][3, 4] = value
    found = report(state, head=None)
    layer = found.layers[1]
    assert (layer.verdict, layer.above, layer.as_random) == ("unknown", False, False)
    assert layer.finding.endswith("1 NaN or infinite")
    assert "random" not in layer.finding
    row = str(found).splitlines()[3]
    assert row.split()[4:6] == ["NaN", "NaN"]
    assert f"1 of {count - 1} layers above random, 1 layer with NaN or infinite" in str(found)
    assert found.worst_ratio == found.layers[0].ratio
    torch.save(state, tmp_path / "a.pt")
    arguments = ["report", str(tmp_path / "a.pt"), "--head", "none", "--json", "-"]
    assert main([*arguments, "--fail-above", "1e9"]) == 1
    told = capsys.readouterr()
    assert told.err == "lightning-hsu: --fail-above: 1 layer has NaN or infinite weights: layer 1\n"
    read = json.loads(told.out)["layers"][1]
    assert (read["ratio"], read["nonfinite"], read["verdict"]) == (None, 1, "unknown")


def test_a_limit_names_the_layers_above_it(tmp_path, capsys):
    torch.manual_seed(0)
    state = {f"{i}.weight": torch.randn(20, 16) + 0.5 * i for i in range(9)}
    torch.save(state, tmp_path / "a.pt")
    arguments = ["report", str(tmp_path / "a.pt"), "--head", "none", "--fail-above"]
    assert main([*arguments, "1.5"]) == 1
    told = capsys.readouterr().err
    layers = report(state, head=None).layers
    above = sum(layer.ratio > 1.5 for layer in layers)
    worst = f"layer 8 ({layers[8].ratio:.3f}), layer 7 ("
    assert told.startswith(
        f"lightning-hsu: --fail-above: {above} layers have a ratio above 1.5: {worst}"
    )
    assert told.endswith(f", {above - 5} more\n")
    limit = (layers[8].ratio + layers[7].ratio) / 2
    assert main([*arguments, str(limit)]) == 1
    assert "1 layer has a ratio above" in capsys.readouterr().err


STEEP = [RieszEnergy(s=1000), RieszEnergy(s=3000), RieszEnergy(s=-3000)]


@pytest.mark.parametrize("measure", STEEP, ids=str)
@pytest.mark.parametrize("count", [2, 20])  # one by one, and all at once
def test_an_energy_out_of_range_is_not_called_random(measure, count):
    torch.manual_seed(0)
    state = {f"{i}.weight": torch.randn(12, 200) for i in range(count)}
    found = report(state, measure, head=None)
    for layer in found.layers:
        assert layer.finding == "not measurable, energy out of range"
        assert (layer.verdict, math.isnan(layer.ratio)) == ("unknown", True)
    assert "no layer can be judged" in str(found)
    assert f"{count} layers have no ratio" in str(found)


def test_an_energy_in_range_is_judged():
    torch.manual_seed(0)
    x = torch.randn(12, 200)
    same = x.clone()
    same[1] = same[0]
    steep = RieszEnergy(s=100)
    layers = report({"a.weight": x, "b.weight": same}, steep, head=None).layers
    assert [layer.verdict for layer in layers] == ["random", "above"]
    double = report({"a.weight": x.double()}, RieszEnergy(s=900), head=None).layers[0]
    assert 0.0 < double.uniformity.energy < 1e-90
    assert double.verdict == "random"
    even = {"a.weight": torch.eye(12, 200)}
    assert report(even, Orthogonality(), head=None).layers[0].verdict == "below"
    assert math.isinf(random_expectation(RieszEnergy(s=-3000), 4, 8))


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_neurons_whose_squares_vanish_are_not_dead(count, scale):
    torch.manual_seed(0)
    state = {f"{i}.weight": torch.randn(8, 16, dtype=torch.float64) for i in range(count)}
    wanted = report(state, head=None).layers
    found = report({name: scale * x for name, x in state.items()}, head=None).layers
    for one, other in zip(found, wanted, strict=True):
        assert (one.dead, one.uniformity.dead) == (0, 0)
        assert one.ratio == pytest.approx(other.ratio, rel=1e-9)
        assert one.finding == other.finding


def layers_in_a_file(folder):
    torch.manual_seed(0)
    path = folder / "a.pt"
    torch.save({f"{i}.weight": torch.randn(20, 16) for i in range(2)}, path)
    return str(path)


@pytest.mark.parametrize("command", ["report", "compare"])
def test_what_was_written_is_said(tmp_path, capsys, command):
    path = layers_in_a_file(tmp_path)
    files = [path] if command == "report" else [path, path]
    page, numbers = str(tmp_path / "a.html"), str(tmp_path / "a.json")
    assert main([command, *files, "--html", page, "--json", numbers]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-2:] == [f"wrote {page}", f"wrote {numbers}"]
    assert told.err == ""
    assert main([command, *files, "--html", page, "--json", "-"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == json.loads((tmp_path / "a.json").read_text())
    assert told.err == f"wrote {page}\n"
    assert main([command, *files]) == 0
    assert "wrote" not in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.any_cpu
def test_a_full_disk_is_told_with_the_file(tmp_path, capsys):
    path = layers_in_a_file(tmp_path)
    for option in ("--html", "--json"):
        for files in (["report", path], ["compare", path, path]):
            assert main([*files, option, "/dev/full"]) == 2
            assert "lightning-hsu: cannot write /dev/full: No space" in capsys.readouterr().err
    program = [sys.executable, "-m", "lightning_hsu.report.cli", "report", path]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    told = "lightning-hsu: cannot write to the standard output: No space left on device\n"
    assert done.stderr == told


def test_a_cosine_that_is_none_is_refused_before_a_file_is_read(capsys):
    for wrong in ("2", "nan", "x", "1"):
        with pytest.raises(SystemExit, match="2"):
            main(["report", "there-is-no-such-file.pt", "--similar-above", wrong])
        assert f"above 0 and below 1; got {wrong}" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["80", "140"])
@pytest.mark.parametrize("command", ["report", "compare"])
def test_the_help_has_words_for_each_argument(capsys, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= int(columns)
    said = " ".join(said.split())
    assert "exit codes: 0 if all went well" in said
    assert "2 if something cannot be read" in said
    assert "or a folder (of Hugging Face" in said
    if command == "report":
        assert "1 if --fail-above is given" in said
    else:
        assert "before the earlier one: a file" in said
        assert "after the later one: a file or a folder" in said


def test_every_option_has_a_help():
    commands = next(iter(parser(int, int)._subparsers._group_actions)).choices
    assert set(commands) == {"report", "compare"}
    for command in commands.values():
        for action in command._actions:
            assert action.help
            assert len(action.help) > 20


def test_a_base_that_is_not_used_is_said(tmp_path, capsys):
    path = layers_in_a_file(tmp_path)
    assert main(["report", path, "--base", "elsewhere"]) == 0
    assert "note: the base elsewhere was not used: these are no adapter" in capsys.readouterr().out
    model = nn.Sequential(nn.Linear(16, 20), nn.Linear(20, 10))
    for source in (model, model.state_dict()):
        said = " ".join(str(report(source, base="elsewhere")).split())
        assert "note: the base elsewhere was not used: it belongs to an adapter, this is" in said
        assert "elsewhere" not in str(report(source))


def test_a_chain_of_near_duplicates_is_called_one():
    turns = torch.tensor([0.0, 15.0, 30.0, 90.0]).deg2rad()
    plane = torch.stack([turns.cos(), turns.sin(), torch.zeros(4)], 1)
    found = report({"fc.weight": plane, "out.weight": torch.randn(2, 4)}, head="out")
    (line,) = [line for line in " ".join(group_lines(found, 3)).split("; ") if "chain" in line]
    assert line.startswith("fc: 3 near-duplicates in a chain, each near another one but not all: 0")
    near = report({"fc.weight": plane[[0, 1, 3]], "out.weight": torch.randn(2, 3)}, head="out")
    assert "chain" not in " ".join(group_lines(near, 3))


def test_a_name_that_the_output_cannot_show_is_escaped(tmp_path):
    path = tmp_path / "names.pt"
    torch.save({"\u5c64.weight": torch.randn(6, 4)}, path)
    program = [sys.executable, "-m", "lightning_hsu.report.cli", "report", str(path)]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert "\\u5c64" in done.stdout


def test_a_closed_output_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.pt"
    torch.save({"fc.weight": torch.randn(6, 4)}, path)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["report", str(path)]) == 2
    monkeypatch.undo()
    assert "cannot write to the standard output: it is closed" in capsys.readouterr().err
