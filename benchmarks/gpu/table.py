"""The results as a page in markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLE = "# The penalty on a GPU"


def verdict(results: Mapping[str, Any], checks: Mapping[str, str | None]) -> dict[str, str]:
    """The back ends whose timings are void, with the reason."""
    void = {}
    for name, found in results.items():
        backend = checks.get(name)
        if backend is None:
            continue
        wrong = [row for row in found["rows"] if row.get("right") is False]
        if wrong:
            cases = ", ".join(sorted({str(row.get("case")) for row in wrong}))
            void[backend] = f"{len(wrong)} wrong of {len(found['rows'])}: {cases}"
        elif found["status"] not in ("done", "needs a card", "missing"):
            void[backend] = f"'{name}' is {found['status']}"
    return void


def page(whole: Mapping[str, Any]) -> str:
    """All results."""
    settings = whole["settings"]
    lines = [TITLE, ""]
    if settings["quick"]:
        lines += ["In miniature (`--quick`): that it runs, not what it costs.", ""]
    if settings["device"] == "cpu":
        lines += ["On a CPU: compiled kernels in Triton's interpreter.", ""]
    for backend, reason in whole["void"].items():
        lines += [f"**The timings of the back end {backend} are VOID**: {reason}.", ""]
    for name, found in whole["parts"].items():
        seconds = found.get("seconds")
        took = f", {seconds} s" if seconds is not None else ""
        lines += [f"## {name}: {found['status']}{took}", ""]
        lines += table(found["rows"], whole["void"])
        for note in found["notes"]:
            lines += [f"- {note}"]
        if found["notes"]:
            lines.append("")
        if "traceback" in found:
            lines += ["```", found["traceback"].rstrip(), "```", ""]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], void: Mapping[str, str]) -> list[str]:
    """A table of rows, whose columns are all the names that occur in them."""
    if not rows:
        return []
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = []
        for column in columns:
            cell = text_of(row.get(column))
            if column == "back end" and row.get(column) in void and "right" not in row:
                cell += " (VOID)"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def text_of(value: Any) -> str:
    """A value as a cell: numbers with few digits, spreads as median and range."""
    if value is None:
        return ""
    if isinstance(value, Mapping) and {"min", "median", "max"} <= set(value):
        return f"{value['median']:.4g} ({value['min']:.4g} to {value['max']:.4g})"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
