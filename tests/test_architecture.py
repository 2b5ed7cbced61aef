"""The layers of the package: imports point down only, and third parties appear in their own room."""

import ast
from pathlib import Path

import pytest

import lightning_hsu

ROOT = Path(lightning_hsu.__file__).parent
# From the ground up; a module may import what stands before it, and its own room.
LAYERS = [
    {"core"},
    {"measures"},
    {"neurons", "distributed", "targets", "selection", "stored", "reference", "projections"},
    {
        "share",
        "coefficients",
        "schedules",
        "monitor",
        "findings",
        "memory",
        "progress",
        "applying",
        "stepping",
        "regularizer",
        "verdict",
        "history",
    },
    {"alarms", "chronicle", "figures", "gallery", "senders", "metrics", "report", "trainers", "callback"},
    {"presets"},
    {"__init__"},
]
FACES = {
    "lightning": {"alarms", "chronicle", "gallery", "senders", "trainers", "callback"},
    "lightning_utilities": {"trainers"},
    "scipy": {"core"},
    "triton": {"core"},
    "torchmetrics": {"metrics"},
    "matplotlib": {"figures"},
    "rich": {"report"},
    "safetensors": {"report"},
}
FILES = sorted(ROOT.rglob("*.py"))


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def level(name):
    return next(i for i, rooms in enumerate(LAYERS) if name in rooms)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            own = node.module == "lightning_hsu"  # from lightning_hsu import trainers
            yield from (f"lightning_hsu.{alias.name}" for alias in node.names) if own else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package == "lightning_hsu" and rest:
            assert level(rest.split(".")[0]) <= level(room(path)), f"{path.name} imports {name} from above"
        elif package in FACES:
            assert room(path) in FACES[package], f"{path.name} imports {package}"
        else:
            assert package in {"__future__", "torch", "abc", "math", "typing"} | STANDARD, f"{path.name} imports {name}"


STANDARD = {
    "argparse",
    "ast",
    "base64",
    "collections",
    "contextlib",
    "contextvars",
    "dataclasses",
    "fnmatch",
    "functools",
    "html",
    "importlib",
    "io",
    "itertools",
    "json",
    "numbers",
    "os",
    "pathlib",
    "pickle",
    "posixpath",
    "re",
    "statistics",
    "struct",
    "sys",
    "tarfile",
    "traceback",
    "types",
    "warnings",
    "weakref",
    "zipfile",
    "zlib",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 300


def test_triton_is_imported_in_its_own_room_only():
    for path in FILES:
        if path.parent != ROOT / "core" / "kernels":
            assert "triton" not in {name.partition(".")[0] for name in imported(path)}, path.name


def test_no_stand_in_is_left():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Pass), f"{path.name}:{node.lineno}"
