"""The command line: ``lightning-hsu report`` and ``lightning-hsu compare``."""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from lightning_hsu import measures
from lightning_hsu._monitor.render import shorten
from lightning_hsu._monitor.text import counted, number
from lightning_hsu._neurons.how import How
from lightning_hsu._neurons.select import Head
from lightning_hsu.measures import Measure
from lightning_hsu.report.build import Report, report
from lightning_hsu.report.checkpoints import printable
from lightning_hsu.report.comparison import Comparison, compare
from lightning_hsu.report.data import layer_named
from lightning_hsu.report.looks import SAMPLE_ABOVE, Progress
from lightning_hsu.report.tables import (
    Table,
    comparison_table,
    group_lines,
    pair_lines,
    report_table,
    show,
    unjudged,
)

# Exit codes.
_FAILED = 1
_BROKEN = 2
_INTERRUPTED = 128 + 2  # by SIGINT
_PIPE_CLOSED = 128 + 13  # SIGPIPE

_LONGEST_WORD = 200  # characters of what a user or a file says, in an error
_LONGEST_LINE = 1000
_LONGEST_MEASURE = 300
_SHOWN_MEASURE = 80
_MOST_PAIRS = 1_000_000
_MERGES = 20  # that are listed by default
_NAMED = 5  # layers above the limit of --fail-above
_LONGEST_NAMED = 60  # characters of their names
_LONGEST_LAYER = 24  # columns of a layer's name beside the progress bar

# What is written for Python, and the same for the command line.
_OPTIONS = (
    (r"neurons=\{'([^']*)': '?(rows|columns|[0-9]+)'?\}", r"--neurons '\1=\2'"),
    (r"\b(include|exclude|head)=('[^']*')", r"--\1 \2"),
    (r"\bhead=None\b", "--head none"),
    (r"\bkey=('[^']*')", r"--key \1"),
    (r"\bmatch='([^']*)'", r"--match \1"),
    (r" with --key or key=", " with --key"),
    (r"\b(include|exclude|head|neurons|measure|key)=", r"--\1 "),
    (r"\bsimilar_above must\b", "--similar-above must"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 1 if a layer fails ``--fail-above``, 2 if something cannot be read or
        understood.
    """
    given = _parser().parse_args(arguments)
    try:
        code = int(given.run(given))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        _complain(in_options(str(error)))
        return _BROKEN
    except OverflowError as error:
        _complain(f"a number is too large: {error}")
        return _BROKEN
    except (MemoryError, RecursionError):
        _complain("what is asked for is too large for this machine")
        return _BROKEN
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception:  # a bug in this program must not look like a failed --fail-above
        traceback.print_exc()
        return _BROKEN


def in_options(text: str) -> str:
    """A text about arguments in Python as one about options of the command line.

    Example:
        >>> in_options("'a' is no layer; head=None switches it off; or neurons={'W': 'columns'}")
        "'a' is no layer; --head none switches it off; or --neurons 'W=columns'"
    """
    for pattern, options in _OPTIONS:
        text = re.sub(pattern, options, text)
    return text


def _complain(message: str) -> None:
    """Print an error, without control characters and not too long, since it may quote a file."""
    print("lightning-hsu: " + bounded(message), file=sys.stderr)


def bounded(message: str) -> str:
    """A message whose words and lines are not too long, without control characters.

    Example:
        >>> len(bounded("no layer " + 5000 * "a"))
        209
    """
    lines = []
    for line in message.split("\n"):
        words = [shorten(printable(word), _LONGEST_WORD) for word in line.split(" ")]
        lines.append(shorten(" ".join(words), _LONGEST_LINE))
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are not too long."""

    def error(self, message: str) -> NoReturn:
        super().error(bounded(message))


def parse_measure(text: str) -> Measure:
    """Make a measure from its name and settings, written as in Python.

    Args:
        text: Such as ``KoLeo`` or ``RieszEnergy(s=1, half_space=True)``.

    Raises:
        ValueError: for anything other than a measure of this library with plain numbers, strings
            and flags.

    Example:
        >>> parse_measure("KoLeo"), parse_measure("GaussianPotential(t=3)")
        (KoLeo(softening=0.01), GaussianPotential(t=3, half_space=False))
    """
    shown = shorten(repr(text), _SHOWN_MEASURE)
    if len(text) > _LONGEST_MEASURE:
        raise ValueError(f"cannot make a measure of so many characters ({len(text):,}): {shown}")
    try:
        return _measure_of(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"cannot make a measure of {shown}, such as 'RieszEnergy(s=1, half_space=True)': "
            f"{shorten(str(error), _LONGEST_MEASURE)}"
        ) from error


def _measure_of(expression: ast.expr) -> Measure:
    """The measure that an expression names, with the settings that it gives by keyword."""
    settings = {}
    name = expression
    if isinstance(expression, ast.Call) and not expression.args:
        name = expression.func
        for keyword in expression.keywords:
            settings[str(keyword.arg)] = ast.literal_eval(keyword.value)
    kinds = _measures()
    if not isinstance(name, ast.Name) or name.id not in kinds:
        raise ValueError(f"it is not a measure with settings by name; there are {', '.join(kinds)}")
    return kinds[name.id](**settings)


def _measures() -> dict[str, Callable[..., Measure]]:
    """The measures that can be made from plain settings, by name."""
    found = {}
    for name in measures.__all__:
        if name == "State":  # not a class, but the type of a measure's state
            continue
        kind = getattr(measures, name)
        if issubclass(kind, Measure) and not inspect.isabstract(kind):
            found[name] = kind
    return found


def _version() -> str:
    """The version of the package."""
    return str(sys.modules["lightning_hsu"].__version__)  # it is above this room


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lightning-hsu", description="See which layers of a network are redundant."
    )
    parser.add_argument("--version", action="version", version=f"lightning-hsu {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser(
        "report", help="compare each layer of a checkpoint with random neurons"
    )
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
        "--groups",
        metavar="N",
        type=_count,
        default=0,
        help="list the N largest groups of near-duplicates of each layer",
    )
    one.add_argument(
        "--merge",
        metavar="N",
        nargs="?",
        type=_merge,
        const=_MERGES,
        help="list at most N near-duplicates that could be merged into one, with the bound on what "
        f"the next layer notices; by default {_MERGES}; give it after the file",
    )
    one.add_argument(
        "--top",
        metavar="N",
        type=_top,
        help="show only the N worst layers in the table: the broken ones, then by ratio",
    )
    one.add_argument(
        "--fail-above",
        metavar="RATIO",
        type=_limit,
        help="exit with 1 if a layer's ratio is above this, or if a layer has no ratio",
    )
    one.set_defaults(run=_report)
    two = commands.add_parser("compare", help="show what moved between two checkpoints")
    two.add_argument("before")
    two.add_argument("after")
    two.add_argument("--html", metavar="FILE", help="write a page with a chart and the table")
    two.add_argument(
        "--match",
        choices=("auto", "index", "assignment"),
        default="auto",
        help="how neurons are matched: by index, or one to one by their cosines; by default only "
        "dictionaries and codebooks are matched by cosines",
    )
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
        "--base", metavar="PATH", help="of an adapter (LoRA): the file or folder of its base"
    )
    command.add_argument(
        "--include",
        metavar="PATTERN",
        nargs="+",
        help="layers to take, shell style; give them after the files",
    )
    command.add_argument("--exclude", metavar="PATTERN", nargs="+", help="layers to leave out")
    command.add_argument(
        "--head",
        metavar="NAME",
        action="append",
        help="the class head, or 'none'; may be given several times; by default it is guessed",
    )
    command.add_argument(
        "--neurons",
        metavar="NAME=HOW",
        action="append",
        type=_way,
        help="where a weight's neurons are: rows, columns, or a number of parts; may be repeated",
    )
    command.add_argument(
        "--similar-above",
        metavar="COSINE",
        type=float,
        default=0.95,
        help="cosine at or above which two neurons are near-duplicates; by default 0.95",
    )
    command.add_argument(
        "--sample-above",
        metavar="N",
        type=_sample_above,
        default=SAMPLE_ABOVE,
        help="measure a sample of layers with more neurons than this, or 'none'; by default "
        f"{SAMPLE_ABOVE}",
    )


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """The arguments that reports and comparisons have in common."""
    measure = None
    if given.measure is not None:
        measure = parse_measure(given.measure)
    return {
        "measure": measure,
        "include": given.include,
        "exclude": given.exclude,
        "head": _head(given.head),
        "neurons": _neurons(given.neurons),
        "similar_above": given.similar_above,
        "sample_above": given.sample_above,
        "key": given.key,
        "base": given.base,
    }


def _head(names: list[str] | None) -> Head:
    """The head that one or more ``--head`` name; "auto" without any."""
    if names is None:
        return "auto"
    if len(names) > 1:
        for name in names:
            if name.lower() in ("none", "auto"):
                raise ValueError(f"--head {name} cannot be given together with another --head")
        return names
    return None if names[0].lower() == "none" else names[0]


def _neurons(ways: list[tuple[str, How]] | None) -> dict[str, How] | None:
    """The names that ``--neurons`` gives, each with where the neurons are; None without any."""
    if ways is None:
        return None
    neurons: dict[str, How] = {}
    for name, how in ways:
        if neurons.setdefault(name, how) != how:
            raise ValueError(f"--neurons says both {name}={neurons[name]} and {name}={how}")
    return neurons


def _way(text: str) -> tuple[str, How]:
    """A weight's name and where its neurons are, of ``NAME=HOW``."""
    name, _, how = text.rpartition("=")
    if name and how == "rows":
        return name, "rows"
    if name and how == "columns":
        return name, "columns"
    if name and how.isascii() and how.isdigit() and int(how) > 0:
        return name, int(how)
    raise argparse.ArgumentTypeError(
        "it must be NAME=HOW, where HOW is rows, columns or a number of equal parts, such as "
        f"'decoder=columns' or 'attn.qkv=3'; got {text!r}"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) > _MOST_PAIRS:
        raise argparse.ArgumentTypeError(
            f"the number must be 0 or more, and at most {_MOST_PAIRS:,}; got {text}"
        )
    return int(text)


def _merge(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"the number of merges must be 1 or more, and --merge stand after the file; got {text}"
        )
    return int(text)


def _top(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"the number of layers must be 1 or more; got {text}")
    return int(text)


def _sample_above(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdecimal() or int(text) < 4:
        raise argparse.ArgumentTypeError(
            f"the number of neurons must be 4 or more, or 'none'; got {text}"
        )
    return int(text)


def _limit(text: str) -> float:
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise argparse.ArgumentTypeError(f"the ratio must be a number above 0; got {text}")
    return limit


def _report(given: argparse.Namespace) -> int:
    _check_writable(given.html, given.json, keep=[given.checkpoint])
    keep = max(100, given.pairs, given.groups)
    with _progress() as progress:
        found = report(
            given.checkpoint,
            **_settings(given),
            keep=keep,
            merge=given.merge,
            progress=progress,
        )
    code = 0
    if given.fail_above is not None:
        code = _judge(found, given.fail_above)
    if given.html:
        found.write_html(given.html)
    _write_json(found, given.json)
    if given.json != "-":
        _show(report_table(found, given.top))
        if given.pairs > 0:
            print("\n".join(pair_lines(found, given.pairs)))
        if given.groups > 0:
            print("\n".join(group_lines(found, given.groups)))
        if found.merges is not None:
            print(found.merges)
    return code


def _judge(found: Report, limit: float) -> int:
    """The exit code for a limit on ratios, after a line on each reason to fail.

    A layer without a ratio, or with weights that are NaN or infinite, fails too.
    """
    lines = unjudged(found.layers)
    above = []
    for layer in found.layers:
        if layer.ratio > limit:  # never true for NaN
            above.append(layer)
    above.sort(key=lambda layer: -layer.ratio)
    names = []
    for layer in above[:_NAMED]:
        name = layer_named(shorten(layer.name, _LONGEST_NAMED))
        names.append(f"{name} ({number(layer.ratio, 3)})")
    if len(above) > _NAMED:
        names.append(f"{len(above) - _NAMED:,} more")
    if above:
        have = "has" if len(above) == 1 else "have"
        count = counted(len(above), "layer")
        lines.append(f"{count} {have} a ratio above {limit:g}: {', '.join(names)}")
    for line in lines:
        _complain(f"--fail-above: {line}")
    return _FAILED if lines else 0


def _compare(given: argparse.Namespace) -> int:
    _check_writable(given.html, given.json, keep=[given.before, given.after])
    with _progress() as progress:
        found = compare(
            given.before,
            given.after,
            **_settings(given),
            match=given.match,
            progress=progress,
        )
    if given.html:
        found.write_html(given.html)
    _write_json(found, given.json)
    if given.json != "-":
        _show(comparison_table(found))
    return 0


def _show(table: Table) -> None:
    """Print a table whose notes speak of options."""
    show(replace(table, below=[in_options(line) for line in table.below]))


def _check_writable(html: str | None, json: str | None, *, keep: Sequence[str]) -> None:
    """Refuse, before the work, output files that cannot be written or are also read."""
    for option, name in (("--html", html), ("--json", json)):
        if name == "":
            raise ValueError(f"{option} needs the name of a file; got an empty one")
    if html == "-":
        raise ValueError("--html needs the name of a file; only --json takes -")
    names = [html, None if json == "-" else json]
    if html and json and Path(html).resolve() == Path(json).resolve():
        raise ValueError(f"--html and --json name the same file: {html}")
    for name in names:
        if not name:
            continue
        path = Path(name)
        if path.exists() and any(Path(one).exists() and path.samefile(one) for one in keep):
            raise ValueError(f"cannot write {path}: it is one of the files to read")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
        to_change = path if path.exists() else path.parent
        if path.is_dir() or not os.access(to_change, os.W_OK):
            raise PermissionError(f"cannot write {path}")


def _write_json(found: Report | Comparison, path: str | None) -> None:
    if path == "-":
        print(found.to_json())
    elif path:
        found.write_json(path)


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A progress bar of rich in a terminal, removed when the work is done.

    It shows the time that has passed and the time that is left, both of all layers.
    """
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import (
            BarColumn,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars
    except ModuleNotFoundError:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=14),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True, speed_estimate_period=600) as bars:
        task = bars.add_task("reading", total=1.0)

        def show_progress(name: str, part: float) -> None:
            shown = escape(shorten(name, _LONGEST_LAYER))
            bars.update(task, description=shown, completed=part)

        yield show_progress


if __name__ == "__main__":
    sys.exit(main())
