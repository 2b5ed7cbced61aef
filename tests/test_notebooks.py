"""Notebooks and the scripts that they are paired with are the same; `make notebooks` runs them."""

from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize("name", ["quickstart", "measures", "diagnose", "evidence", "strength"])
def test_the_pair_is_in_step(name):
    cells = [
        [
            (cell.cell_type, cell.source)
            for cell in jupytext.read(NOTEBOOKS / f"{name}.{kind}").cells
        ]
        for kind in ("ipynb", "py")
    ]
    assert cells[0] == cells[1]
    assert len(cells[0]) > 5


def test_every_notebook_has_a_pair():
    assert all(path.with_suffix(".py").is_file() for path in NOTEBOOKS.glob("*.ipynb"))
