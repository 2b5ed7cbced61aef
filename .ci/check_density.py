"""Check that the package reads one thought per line: `python .ci/check_density.py [--files]`; exits 1 over a limit."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1] / "lightning_hsu"
PER_THOUSAND = {"conditional expressions": 15.0, "comprehensions": 25.0}  # of code lines
LONG, LONG_PERCENT = 100, 7.0  # columns, and how many of all lines may have more
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that belong to docstrings, including those of attributes."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def code_lines(source: str, tree: ast.Module) -> int:
    """Lines with code: no docstrings, comments or blanks."""
    quiet = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in quiet:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(tree))


def is_nested(node: ast.IfExp) -> bool:
    """Whether this conditional expression contains another one."""
    return any(isinstance(part, ast.IfExp) for part in ast.walk(node) if part is not node)


def counts(path: Path) -> dict[str, int]:
    """The counts of one file."""
    source = path.read_text()
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    conditionals = [node for node in nodes if isinstance(node, ast.IfExp)]
    lines = source.splitlines()
    return {
        "code lines": code_lines(source, tree),
        "conditional expressions": len(conditionals),
        "comprehensions": sum(isinstance(node, COMPREHENSIONS) for node in nodes),
        "nested": sum(is_nested(node) for node in conditionals),
        "lines": len(lines),
        "long": sum(len(line) > LONG for line in lines),
    }


def main() -> int:
    """Print the figures; return 1 if one is over its limit."""
    found = {path: counts(path) for path in sorted(ROOT.rglob("*.py"))}
    total = {name: sum(one[name] for one in found.values()) for name in next(iter(found.values()))}
    if "--files" in sys.argv[1:]:
        for path, one in found.items():
            print(path.relative_to(ROOT), *(f"{name} {count}," for name, count in one.items()))
    bad = total["nested"] > 0
    print(f"nested conditional expressions: {total['nested']} (at most 0)")
    for name, limit in PER_THOUSAND.items():
        rate = 1000.0 * total[name] / total["code lines"]
        bad |= rate > limit
        print(
            f"{name} per 1,000 of {total['code lines']:,} code lines: {rate:.1f} (at most {limit:g})"
        )
    percent = 100.0 * total["long"] / total["lines"]
    bad |= percent > LONG_PERCENT
    print(f"lines over {LONG} characters: {percent:.1f} % (at most {LONG_PERCENT:g} %)")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
