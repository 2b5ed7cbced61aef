"""The structure of the package: no import circle, arrows point down only, third parties each in their own room."""

import ast
import subprocess
import sys
from pathlib import Path

import lightning_hsu

ROOT = Path(lightning_hsu.__file__).parent
# Floors from the ground up; the rooms of one floor do not know each other.
FLOORS = [
    {"_checks", "_core", "_optimizers", "_settings"},
    {"measures"},
    {"projections", "reference", "_neurons"},
    {"coefficients"},
    {"_engine", "_meant"},
    {"_monitor"},
    {"regularizer", "report", "_figures"},
    {"metrics", "summary", "_trainer"},
    {"callback"},
    {"presets"},
    {"__init__"},
]
THIRD_PARTIES = {
    "lightning": {"_figures", "_trainer", "callback"},
    "lightning_utilities": {"_trainer"},
    "scipy": {"_core"},
    "triton": {"_core"},
    "torchmetrics": {"metrics"},
    "matplotlib": {"_figures"},
    "rich": {"report"},
    "safetensors": {"report"},
}


def modules():
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name):
    """The dotted names that a module imports, those for type checking and within functions included."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (one if one in MODULES else node.module for one in below)


def room(name):
    """The top-level module or folder that a module is in."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def floor(name):
    return next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)


ARROWS = {
    name: {one for one in imports(name) if one in MODULES and one != name} for name in MODULES
}


def circle(arrows):
    """The modules of one import circle in order; none where there is no circle."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        path.append(name)
        for other in sorted(arrows[name]):
            if found := visit(other):
                return found
        path.pop()
        done.add(name)
        return []

    for name in sorted(arrows):
        if found := visit(name):
            return found
    return []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_each_other_in_a_circle():
    # A package that re-exports what is inside it is no circle for those who import from within.
    assert circle(ARROWS) == []


def test_imports_point_down():
    wrong = [
        f"{name} imports {other}"
        for name, others in ARROWS.items()
        for other in sorted(others)
        if room(other) != room(name) and floor(other) >= floor(name)
    ]
    assert wrong == []


def test_third_parties_appear_in_their_own_rooms():
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imports(name)
        if not other.startswith("lightning_hsu")
        and other.partition(".")[0] not in {"torch"} | sys.stdlib_module_names
        and room(name) not in THIRD_PARTIES.get(other.partition(".")[0], set())
    ]
    assert wrong == []


def test_triton_is_imported_in_its_own_folder_only():
    users = {
        name for name in MODULES for other in imports(name) if other.partition(".")[0] == "triton"
    }
    assert users
    assert all(name.startswith("lightning_hsu._core.triton.") for name in users)


def test_public_names_are_all_that_dir_shows():
    assert set(dir(lightning_hsu)) == {*lightning_hsu.__all__, "__version__"}


def test_public_names_are_imported_when_they_are_asked_for():
    code = """
import sys
import lightning_hsu
import lightning_hsu.report.cli
slow = {"lightning", "torchmetrics", "torch._dynamo", "scipy", "matplotlib", "rich"}
assert not slow & set(sys.modules), slow & set(sys.modules)
for name in lightning_hsu.__all__:
    assert getattr(lightning_hsu, name) is not None
assert lightning_hsu.callback.HypersphericalUniformity is lightning_hsu.HypersphericalUniformity
assert not hasattr(lightning_hsu, "HypersphericalUniformty")
assert not hasattr(lightning_hsu, "_nothing")
assert not hasattr(lightning_hsu, "nothing.inside")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_types_and_imports_name_the_same_public_names():
    own = set()
    for node in ast.walk(ast.parse(Path(lightning_hsu.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lightning_hsu"):
            own.update(alias.name for alias in node.names)
    assert own == set(lightning_hsu.__all__)
