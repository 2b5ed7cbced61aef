"""The default at rates and decays from wider grids: `python -m evidence.retuned`."""

import json
import re
import sys

import pytest
import torch

from evidence import cells as running
from evidence import defaults, retuned
from evidence.documents import quoted
from evidence.plan import SETTINGS
from lightning_hsu import HypersphericalUniformity

DIGITS = "digits-n500-e40-depth2-scale1-noise0.2"


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
    none, default, random, growth = retuned.methods()
    callback = HypersphericalUniformity()
    assert none.measure is None
    for method in (default, random, growth):
        assert method.coefficient == callback.coefficient
        assert method.share_limit == callback.share_limit
        assert method.share is None
    assert repr(default.measure) == repr(growth.measure) == repr(callback.measure)
    assert growth.keep == "length"
    assert repr(callback.measure) in repr(random.measure)


def test_it_trains_at_what_the_second_run_chose_and_goes_on(called, tmp_path, capsys, monkeypatch):
    out = str(tmp_path)
    assert called("--quick", "--only", DIGITS, "--out", out) == 0
    printed = capsys.readouterr().out
    made = [running.read(path) for path in (tmp_path / "cells").glob("*.json")]
    assert len(made) == 4
    plan = json.loads(retuned.PLAN.read_text())
    (chosen,) = [one["chosen"] for one in plan if one["name"] == f"{DIGITS}--decay"]
    for result in made:
        assert result["asked"]["trial"] == chosen
        assert result["asked"]["seeds"] == [120, 121, 122]
        assert result["asked"]["test"]
    row = rf"\| digits, .* \| {chosen['rate']:g}, {chosen['decay']:g} \| \d+\.\d\d \(\d\.\d\d\)"
    assert re.search(row + r"( \| [+-]\d+\.\d\d \(\d+\.\d\d\)){5} \|", printed)
    assert "default: worse by two standard errors in" in printed
    assert "Better than none and than both controls" in printed
    monkeypatch.setattr(defaults, "run", lambda job: pytest.fail("run again"))
    assert called("--quick", "--only", DIGITS, "--out", out) == 0
    table = printed[printed.index("| setting") :]
    assert capsys.readouterr().out.endswith(table)


def test_it_waits_for_the_plan(called, tmp_path, monkeypatch, capsys):
    path = tmp_path / "cells.json"
    path.write_text("[]")
    monkeypatch.setattr(retuned, "PLAN", path)
    assert called("--only", DIGITS, "--out", str(tmp_path)) == 2
    assert f"no cell of weight decay only in {DIGITS}" in capsys.readouterr().err


def test_a_part_is_not_committed(called, capsys):
    with pytest.raises(SystemExit):
        called("--commit", "--only", DIGITS)
    assert "--commit takes all settings" in capsys.readouterr().err


def test_out_of_time_says_how_to_go_on(called, tmp_path, capsys):
    assert called("--only", DIGITS, "--minutes", "0", "--out", str(tmp_path)) == 3
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.skipif(not retuned.RESULTS.exists(), reason="it has not been run yet")
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
    assert len(running.read(retuned.RESULTS)) == 4 * len(SETTINGS)
