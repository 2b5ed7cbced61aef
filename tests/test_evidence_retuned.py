"""The default at rates and decays from wider grids: `python -m evidence.retuned`."""

import json
import re
import sys
from unittest.mock import Mock

import pytest
import torch

from evidence import defaults, retuned
from evidence.documents import quoted
from evidence.files import read
from evidence.plan import SETTINGS
from lightning_hsu import HypersphericalUniformity
from tests.pages import in_one_line

CHANGED = "digits-n500-e40-depth4-scale0.3"


@pytest.fixture
def called(monkeypatch):
    """Call it with arguments, as a command."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of all tests after this

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evidence.retuned", *arguments])
        return retuned.main()

    return call


@pytest.mark.usefixtures("shipped_defaults")
def test_the_default_is_the_callbacks_own():
    none, default, random, growth, turns = retuned.methods()
    callback = HypersphericalUniformity()
    assert none.measure is None
    for method in (default, random, growth, turns):
        assert method.coefficient == callback.coefficient
        assert method.share_limit == callback.share_limit
        assert method.share is None
    for method in (default, growth, turns):
        assert repr(method.measure) == repr(callback.measure)
    assert [growth.keep, turns.keep] == ["length", "direction"]
    assert repr(callback.measure) in repr(random.measure)


@pytest.mark.slow
def test_only_what_was_chosen_otherwise_is_trained_anew(called, tmp_path, capsys, monkeypatch):
    """Of two settings one has another trial now; the other stays as it was reported."""
    run = Mock(wraps=defaults.run)
    monkeypatch.setattr(defaults, "run", run)
    arguments = ["--only", "digits-n500-e40-depth4", "--out", str(tmp_path)]
    assert called(*arguments) == 0
    printed = capsys.readouterr().out
    plan = json.loads(retuned.PLAN.read_text())
    (chosen,) = [one["chosen"] for one in plan if one["name"] == f"{CHANGED}--decay"]
    assert run.call_count == 5
    for call in run.call_args_list:
        setting, _, trial, seeds, test = call.args[0]
        assert setting.name == CHANGED
        assert (trial.rate, trial.decay) == (chosen["rate"], chosen["decay"])
        assert (seeds, test) == (tuple(range(80, 100)), True)
    table = printed[printed.index("| setting") :]
    rows = [line for line in table.splitlines() if line.startswith("| digits")]
    assert len(rows) == 1
    row = rf"\| {chosen['rate']:g}, {chosen['decay']:g} \| \d+\.\d\d \(\d\.\d\d\)"
    assert re.search(row + r"( \| [+-]\d+\.\d\d \(\d+\.\d\d\)){6} \|", rows[0])
    assert "All 2 settings, these in place of the former: default: worse by two" in table
    assert "Better than none and than both controls" in table
    assert called(*arguments) == 0
    assert run.call_count == 5
    assert capsys.readouterr().out.endswith(table)


def test_it_waits_for_the_plan(called, tmp_path, monkeypatch, capsys):
    path = tmp_path / "cells.json"
    path.write_text("[]")
    monkeypatch.setattr(retuned, "PLAN", path)
    assert called("--only", CHANGED, "--out", str(tmp_path)) == 2
    assert f"no cell of weight decay only in {CHANGED}" in capsys.readouterr().err


def test_a_setting_that_is_not_there_is_told(called, capsys):
    assert called("--only", "no-such") == 2
    told = capsys.readouterr().err
    assert f"no setting's name contains 'no-such'; one is {SETTINGS[0].name}" in told


def test_a_setting_that_stays_as_it_was_is_told(called, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "run", lambda job: pytest.fail("nothing is to be trained"))
    stays = "digits-n500-e40-depth2-scale1-adamw"
    assert called("--only", stays, "--out", str(tmp_path)) == 0
    assert "wider grids chose the same rate and decay here" in capsys.readouterr().out


def test_a_part_is_not_committed(called, capsys):
    with pytest.raises(SystemExit):
        called("--commit", "--only", CHANGED)
    assert "--commit takes all settings" in capsys.readouterr().err


def test_out_of_time_says_how_to_go_on(called, tmp_path, capsys):
    assert called("--only", CHANGED, "--minutes", "0", "--out", str(tmp_path)) == 3
    assert "the same command goes on" in capsys.readouterr().err


def test_readme_says_what_the_committed_cells_give(called, tmp_path, monkeypatch):
    """From the committed cells, at the second run's choices, with nothing trained."""
    monkeypatch.setattr(defaults, "run", lambda job: pytest.fail("a cell is missing"))
    readme = retuned.README.read_text()
    written = tmp_path / "README.md"
    written.write_text(quoted(readme, "Nothing.", retuned.MARKS))
    monkeypatch.setattr(retuned, "README", written)
    monkeypatch.setattr(retuned, "save_all", lambda results, path: None)
    assert called("--commit", "--resume-committed", "--out", str(tmp_path / "out")) == 0
    assert written.read_text() == readme
    table = readme[readme.index(retuned.MARKS[0]) : readme.index(retuned.MARKS[1])]
    counted = r"default: worse .*? in 0 of 56 .*? better in (\d+) \((\d+)\)"
    gains, corrected = re.search(counted, table).groups()
    beyond = r"both controls: (\d+) of 56\*\* \((\d+) after"
    stand, left = re.search(beyond, table).groups()
    changed = table.count("\n| ") - 2
    for page in ("README.md", "docs/evidence.md"):
        told = in_one_line(page)
        assert (
            f"without a penalty ({changed} settings) the report was made again with these"
        ) in told
        assert (
            f"worse in none of the 56, better in {gains} ({corrected} after Holm's correction), of "
            f"which {stand} ({left}) are gains over both controls"
        ) in told
    assert len(read(retuned.RESULTS)) == 5 * changed < 5 * len(SETTINGS)
