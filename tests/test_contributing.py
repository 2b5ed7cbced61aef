"""CONTRIBUTING names the rooms that there are, files that are there, and walks that a program takes."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from lightning_hsu import measures
from lightning_hsu.report.cli import main
from tests.models import Automatic, batches, loader, network, trainer
from tests.tracing import PACKAGE, Traced, files_called

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`([\w./-]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
PATHS = sorted({name for name in NAMED if "/" in name or name.endswith((".py", ".md"))})


@pytest.mark.parametrize("name", PATHS)
def test_what_it_names_is_there(name):
    assert (ROOT / name).exists() or (PACKAGE / name).exists()


@pytest.mark.parametrize("text", ["README.md", "evidence/README.md", "CHANGELOG.md"])
def test_the_tests_that_a_text_tells_of_are_there(text):
    named = re.findall(r"tests/\w+\.py", (ROOT / text).read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme_has_a_row_for_every_measure():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    members = [name for name, kind in vars(measures).items() if is_member(kind)]
    assert len(members) > 9
    assert [name for name in members if f"| `{name}(" not in readme] == []


def is_member(kind):
    """Whether this is a measure's class that can be used as it is."""
    if not isinstance(kind, type) or not issubclass(kind, measures.Measure):
        return False
    return not inspect.isabstract(kind) and kind is not measures.Sampled


def test_it_names_every_room():
    rooms = {path.name for path in PACKAGE.glob("*.py")}
    rooms |= {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert rooms - {"__init__.py"} <= set(NAMED)


def walk(number):
    """The files that a walk names."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(rf"^{number}\. (.*?)(?=^\d\. |\Z)", text, re.DOTALL | re.MULTILINE)
    return set(re.findall(r"`([\w./-]+\.py)`", found[1]))


def test_the_walks_of_a_step_and_a_logged_number_are_those_of_the_program(shipped_defaults):
    traced = Traced()
    fit = trainer(traced, logger=False, log_every_n_steps=3, max_steps=5)
    fit.fit(Automatic(), loader(batches()))
    named, entered = walk(1), set(traced.before_step[3])
    assert entered <= named, entered - named
    elsewhere = {"_engine/step.py", "_engine/apply.py", "_engine/optimizer_steps.py"}
    assert named - entered == elsewhere
    named, entered = walk(2), set(traced.after_batch[2])
    assert entered <= named, entered - named
    assert named <= entered, named - entered


def test_the_walk_of_a_checkpoint_is_that_of_the_program(tmp_path, capsys):
    torch.save(network().state_dict(), tmp_path / "net.pt")
    page = str(tmp_path / "page.html")
    arguments = ["report", str(tmp_path / "net.pt"), "--html", page]
    entered = set(files_called(lambda: main(arguments)))
    named = walk(2) | walk(3)
    assert entered <= named, entered - named
    reports = {name for name in walk(3) if name.startswith("report/")}
    assert reports <= entered, reports - entered
    assert capsys.readouterr().out
