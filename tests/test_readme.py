"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("shipped_defaults")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {})


def test_the_printed_table_is_what_the_quickstart_prints(caplog):
    table = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1)
    with caplog.at_level("INFO"):
        exec(compile(BLOCKS[0], "README.md", "exec"), {})
    assert table.strip() in "\n".join(record.message for record in caplog.records)


def test_pictures_and_files_named_are_there():
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / name).is_file(), name
