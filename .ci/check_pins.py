"""Check that facts stated in two files agree: pins of tools, and the version; exit 1 if not."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    """The text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def first(pattern: str, name: str) -> str:
    """The first group of the first match in a file."""
    found = re.search(pattern, text(name), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{name} has no line like {pattern}")
    return found[1]


def hook_pins() -> dict[str, str]:
    """The versions that pre-commit installs, by package."""
    config = ".pre-commit-config.yaml"
    pins = dict(re.findall(r"^ +- ([\w-]+)==(\S+)$", text(config), re.MULTILINE))
    pins["ruff"] = first(r"ruff-pre-commit\n +rev: v(\S+)$", config)
    return pins


def main() -> int:
    """Print what disagrees; return 1 if anything does."""
    pins = dict(re.findall(r"^([\w-]+)==([^\s;]+)", text("constraints.txt"), re.MULTILINE))
    wrong = []
    for package, version in hook_pins().items():
        if pins.get(package) != version:
            wrong.append(
                f".pre-commit-config.yaml has {package} {version}, "
                f"constraints.txt {pins.get(package)}"
            )
    version = first(r'^version = "(.+)"$', "pyproject.toml")
    cited = first(r"^version: (.+)$", "CITATION.cff")
    if version != cited:
        wrong.append(f"pyproject.toml has version {version}, CITATION.cff {cited}")
    if wrong:
        print("\n".join(wrong))
        return 1
    print("pins and versions agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
