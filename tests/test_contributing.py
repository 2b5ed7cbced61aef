"""CONTRIBUTING names the rooms that there are, and files that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_hsu"
NAMED = re.findall(r"`([\w./-]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
PATHS = sorted({name for name in NAMED if "/" in name or name.endswith((".py", ".md"))})


@pytest.mark.parametrize("name", PATHS)
def test_what_it_names_is_there(name):
    assert (ROOT / name).exists() or (PACKAGE / name).exists()


def test_it_names_every_room():
    rooms = {path.name for path in PACKAGE.glob("*.py")}
    rooms |= {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert rooms - {"__init__.py"} <= set(NAMED)
