"""The command line: ``lightning-hsu report`` and ``lightning-hsu compare``."""

from __future__ import annotations

import argparse
import ast
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_hsu import measures
from lightning_hsu._monitor.text import number
from lightning_hsu.measures import Measure
from lightning_hsu.report.build import Progress, Report, report
from lightning_hsu.report.checkpoints import printable
from lightning_hsu.report.comparison import Comparison, compare
from lightning_hsu.report.tables import comparison_table, pair_lines, report_table, show

_FAILED, _BROKEN = 1, 2  # exit codes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 where ``--fail-above`` says so, 2 for what cannot be read or understood."""
    given = _parser().parse_args(arguments)
    try:
        code = int(given.run(given))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        print(f"lightning-hsu: {_told(error)}", file=sys.stderr)
        return _BROKEN
    except KeyboardInterrupt:
        return 130
    except Exception:  # not 1, which is --fail-above's
        traceback.print_exc()
        return _BROKEN


def _told(error: Exception) -> str:
    """What an error says, which may quote a file."""
    return "\n".join(printable(line) for line in str(error).split("\n"))


def parse_measure(text: str) -> Measure:
    """A measure from what its name and settings look like in Python, such as ``RieszEnergy(s=1, half_space=True)``.

    Raises:
        ValueError: for anything else than a measure of this library with plain numbers, strings and flags.

    Example:
        >>> parse_measure("KoLeo"), parse_measure("GaussianPotential(t=3)")
        (KoLeo(softening=0.01), GaussianPotential(t=3, half_space=False))
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        settings = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
        kind = getattr(measures, name) if name in measures.__all__ else None
        if kind is None or call.args or not issubclass(kind, Measure):
            raise ValueError(
                f"it is no measure with settings by name; there are {', '.join(_names())}"
            )
        found: Measure = kind(**settings)
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(
            f"cannot make a measure of {text!r}, such as 'RieszEnergy(s=1, half_space=True)': {error}"
        ) from error
    return found


def _names() -> list[str]:
    """The measures that can be made as they are."""
    kinds = [getattr(measures, name) for name in measures.__all__ if name != "State"]
    return [kind.__name__ for kind in kinds if not getattr(kind, "__abstractmethods__", None)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-hsu", description="See which layers of a network are redundant."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("report", help="every layer of a checkpoint beside random neurons")
    one.add_argument(
        "checkpoint", help=".ckpt, .pt, .pth, .safetensors or TorchScript; no code in it is run"
    )
    one.add_argument("--html", metavar="FILE", help="write a page with the figures of each layer")
    one.add_argument(
        "--pairs",
        metavar="N",
        type=_count,
        default=0,
        help="list the N nearest near-duplicate pairs of each layer",
    )
    one.add_argument(
        "--fail-above",
        metavar="RATIO",
        type=_limit,
        help="exit with 1 if a layer's ratio is above this, or if one has none",
    )
    one.set_defaults(run=_report)
    two = commands.add_parser("compare", help="what moved between two checkpoints")
    two.add_argument("before")
    two.add_argument("after")
    two.set_defaults(run=_compare)
    for command in (one, two):
        _add_common(command)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", metavar="FILE", help="write all numbers; - prints them instead of the table"
    )
    command.add_argument(
        "--measure",
        metavar="MEASURE",
        help="such as 'KoLeo' or 'RieszEnergy(s=1, half_space=True)'",
    )
    command.add_argument(
        "--key", help="where in the file the state dict is, such as 'ema' or 'model.inner'"
    )
    command.add_argument(
        "--include",
        metavar="PATTERN",
        nargs="+",
        help="layers to take, shell style; after the files",
    )
    command.add_argument("--exclude", metavar="PATTERN", nargs="+", help="layers to leave out")
    command.add_argument(
        "--head",
        default="auto",
        help="the class head: a layer's name, or 'none'; by default the last Linear",
    )
    command.add_argument(
        "--similar-above",
        metavar="COSINE",
        type=float,
        default=0.95,
        help="cosine from which neurons are near-duplicates (0.95)",
    )


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "measure": None if given.measure is None else parse_measure(given.measure),
        "include": given.include,
        "exclude": given.exclude,
        "head": None if given.head.lower() == "none" else given.head,
        "similar_above": given.similar_above,
        "key": given.key,
    }


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number of pairs is 0 or more; got {text}")
    return int(text)


def _limit(text: str) -> float:
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise argparse.ArgumentTypeError(f"a ratio is a number above 0; got {text}")
    return limit


def _report(given: argparse.Namespace) -> int:
    if given.html == "-":
        raise ValueError("--html writes a file; only --json takes -")
    _check_writable(given.html, given.json, keep=[given.checkpoint])
    with _progress() as progress:
        found = report(
            given.checkpoint, **_settings(given), keep=max(100, given.pairs), progress=progress
        )
    verdict = 0 if given.fail_above is None else _judged(found, given.fail_above)
    if given.html:
        found.write_html(given.html)
    _write_json(found, given.json)
    if given.json != "-":
        show(report_table(found))
        if given.pairs > 0:
            print("\n".join(pair_lines(found, given.pairs)))
    return verdict


def _judged(found: Report, limit: float) -> int:
    """The exit code for a limit on ratios: a layer without a ratio, or with weights that are not finite, fails, too."""
    broken = [
        one for one in found.layers if math.isnan(one.uniformity.ratio) or one.uniformity.nonfinite
    ]
    above = [one for one in found.layers if one.uniformity.ratio > limit]
    for one in broken:
        print(f"lightning-hsu: {one.name} cannot be judged: {one.finding}", file=sys.stderr)
    if above:
        worst = max(above, key=lambda one: one.uniformity.ratio)
        print(
            f"lightning-hsu: ratio {number(worst.uniformity.ratio, 3)} of {worst.name} is above {limit:g}",
            file=sys.stderr,
        )
    return _FAILED if broken or above else 0


def _compare(given: argparse.Namespace) -> int:
    _check_writable(given.json, keep=[given.before, given.after])
    with _progress() as progress:
        found = compare(given.before, given.after, **_settings(given), progress=progress)
    _write_json(found, given.json)
    if given.json != "-":
        show(comparison_table(found))
    return 0


def _check_writable(*paths: str | None, keep: Sequence[str]) -> None:
    """Refuse, before the work, files that cannot be written after it, and those that are read."""
    for path in map(Path, filter(None, paths)):
        if path.exists() and any(Path(one).exists() and path.samefile(one) for one in keep):
            raise ValueError(f"cannot write {path}: it is read from")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(f"cannot write {path}")


def _write_json(found: Report | Comparison, path: str | None) -> None:
    if path == "-":
        print(found.to_json())
    elif path:
        found.write_json(path)


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar in a terminal, by rich, with the time it took: within one layer the bar may stand; gone when the work is done."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress as Bars
        from rich.progress import SpinnerColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        yield None
        return
    console, columns = (
        Console(stderr=True),
        (SpinnerColumn(), *Bars.get_default_columns(), TimeElapsedColumn()),
    )
    if not console.is_terminal:
        yield None
        return
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("reading", total=1.0)
        yield lambda name, part: bars.update(task, description=escape(name), completed=part)


if __name__ == "__main__":
    sys.exit(main())
