"""Exactness, callback and command line with each minor of Lightning that is supported, each in a process of its own.

The callback leans on when Lightning calls its hooks, which no release promises to the next. `.ci/lowest.txt` runs the oldest
release with the oldest torch; here every release meets the torch that is installed, as with a user who upgrades only that.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The oldest, the last of 2.5, the last of 2.6 before the two that were malware (2.6.2 and 2.6.3: never to be named here), and
# the pinned one: where it fails too, the version is not to blame.
RELEASES = ["2.4.0", "2.5.6", "2.6.1", "2.6.6"]
SECONDS = 600  # for the tests with one release; measured: 50 of a core

# Run by the child. It looks afterwards, at the very modules that were tested: imported before, they would have warned before
# pytest makes warnings errors.
CHILD = """
import sys
from pathlib import Path

import pytest

release, packages, root, *arguments = sys.argv[1:]
code = pytest.main(arguments)

import lightning
import lightning_hsu
import pytorch_lightning

for package in (lightning, pytorch_lightning):
    assert package.__version__ == release, (package.__name__, package.__version__)
    assert Path(package.__file__).is_relative_to(packages), package.__file__
assert Path(lightning_hsu.__file__).is_relative_to(root), lightning_hsu.__file__
sys.exit(code)
"""


def install(release, folder):
    """Put both packages into ``folder`` without their dependencies, which are installed; skip where there is no index."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--retries",
        "1",
        "--timeout",
        "20",
    ]
    wanted = [f"{package}=={release}" for package in ("lightning", "pytorch-lightning")]
    done = subprocess.run(
        [*pip, "--target", folder, *wanted], capture_output=True, text=True, timeout=300
    )
    if done.returncode and re.search(
        "connection broken by|Max retries exceeded|from versions: none", done.stderr
    ):
        pytest.skip(
            f"lightning {release} has to be installed for this, and pip reaches no package index"
        )
    if done.returncode:
        pytest.fail(
            f"pip did not install lightning {release}:\n{done.stdout}{done.stderr}", pytrace=False
        )


def environment(packages):
    """The parent's environment, with ``packages`` before all else and without what coverage, pytest and Lightning set."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COV", "PYTEST", "PL_"))
    }
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(packages), *filter(None, [kept.get("PYTHONPATH")])]),
    }


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("release", RELEASES)
def test_exactness_and_callback_with_lightning(release, tmp_path):
    packages = tmp_path / "packages"
    install(release, packages)
    # A basetemp of its own: else the child's runs would push out those of which pytest keeps the last three for the user.
    options = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        f"--basetemp={tmp_path / 'runs'}",
    ]
    tests = ["tests/test_exactness.py", "tests/test_callback.py", "tests/test_cli.py"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, release, packages, ROOT, *options, *tests],
            cwd=ROOT,  # each test starts in its tmp_path; from here pyproject.toml and the checkout's lightning_hsu are found
            env=environment(packages),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as late:
        failure = f"not done after {SECONDS} s\n{(late.stdout or b'').decode()}"
    else:
        failure = f"exit status {done.returncode}\n{done.stdout}" if done.returncode else None
    if failure:
        pytest.fail(f"with lightning {release}: {failure}", pytrace=False)
