"""The arguments of the command line, and what they say in Python."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lightning_hsu._neurons.how import How
from lightning_hsu._neurons.select import Head
from lightning_hsu.report.looks import SAMPLE_ABOVE
from lightning_hsu.report.measure_names import parse_measure
from lightning_hsu.report.messages import bounded

_MOST_PAIRS = 1_000_000
_MERGES = 20  # that are listed by default

Command = Callable[[argparse.Namespace], int]
"""What runs a command and returns its exit code."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are not too long."""

    def error(self, message: str) -> NoReturn:
        super().error(bounded(message))


def _version() -> str:
    """The version of the package."""
    return str(sys.modules["lightning_hsu"].__version__)  # it is above this room


_FILES = """a file (.ckpt, .pt, .pth, .bin, .safetensors, TorchScript) or a folder (of Hugging Face,
of an adapter); no code in it is run, and nothing is downloaded"""
_CODES_OF_REPORT = """exit codes: 0 if all went well; 1 if --fail-above is given and a layer's ratio
is above it, or a layer has none, or NaN or infinite weights; 2 if something cannot be read, written
or understood"""
_CODES_OF_COMPARE = """exit codes: 0 if all went well, whatever has moved; 2 if something cannot be
read, written or understood"""


def parser(report: Command, compare: Command) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        report: Runs ``lightning-hsu report``.
        compare: Runs ``lightning-hsu compare``.
    """
    whole = _Parser(
        prog="lightning-hsu", description="See which layers of a network are redundant."
    )
    whole.add_argument("--version", action="version", version=f"lightning-hsu {_version()}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser(
        "report",
        help="compare each layer of a checkpoint with random neurons",
        description="Compare the neurons of each layer of a checkpoint with random ones. A layer's "
        "ratio is its energy over that of random neurons: the further above 1, the more redundant "
        "it is.",
        epilog=_CODES_OF_REPORT,
    )
    one.add_argument("checkpoint", help=_FILES)
    one.add_argument(
        "--html", metavar="FILE", help="write a page with the figures of each layer to this file"
    )
    one.add_argument(
        "--pairs",
        metavar="N",
        type=_count,
        default=0,
        help="below the table, list the N nearest pairs of near-duplicate neurons of each layer, by "
        "index",
    )
    one.add_argument(
        "--groups",
        metavar="N",
        type=_count,
        default=0,
        help="below the table, list the N largest groups of near-duplicates of each layer, and its "
        "dead neurons, by index",
    )
    one.add_argument(
        "--merge",
        metavar="N",
        nargs="?",
        type=_merge,
        const=_MERGES,
        help="below the table, list near-duplicates that could be merged into one neuron, each with "
        "a bound on how much the next layer's outputs change; at most N of them, by default "
        f"{_MERGES}; give it after the file",
    )
    one.add_argument(
        "--top",
        metavar="N",
        type=_top,
        help="show only the N worst layers, in the table and in lists of pairs and groups: first "
        "those with NaN or infinite weights, then those with the highest ratio",
    )
    one.add_argument(
        "--fail-above",
        metavar="RATIO",
        type=_limit,
        help="exit with 1 if a layer's ratio is above this, or if a layer has no ratio, or NaN or "
        "infinite weights; a message names the layers",
    )
    one.set_defaults(run=report)
    two = commands.add_parser(
        "compare",
        help="show what moved between two checkpoints",
        description="Compare two checkpoints layer by layer, such as before and after a training, "
        "or a base and its adapter.",
        epilog=_CODES_OF_COMPARE,
    )
    two.add_argument("before", help=f"the earlier one: {_FILES}")
    two.add_argument("after", help="the later one: a file or a folder likewise")
    two.add_argument(
        "--html", metavar="FILE", help="write a page with a chart and the table to this file"
    )
    two.add_argument(
        "--match",
        choices=("auto", "index", "assignment"),
        default="auto",
        help="which neuron before is which after: of the same index, or one to one by their cosines "
        "(assignment); by default (auto) the latter for dictionaries and codebooks only",
    )
    two.set_defaults(run=compare)
    for command in (one, two):
        _add_common(command)
    return whole


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json",
        metavar="FILE",
        help="write all numbers to this file; - prints them instead of the table",
    )
    command.add_argument(
        "--measure",
        metavar="MEASURE",
        help="how to measure: a measure of the library with its settings, such as 'KoLeo' or "
        "'RieszEnergy(s=1, half_space=True)'; by default 'RieszEnergy(s=2, half_space=True)'",
    )
    command.add_argument(
        "--key",
        action="append",
        help="where in a file with several sets of weights the one to read is, such as 'ema' or "
        "'model.inner'; by default (auto) it is found, and a note names it; in a comparison it may be "
        "given twice: for the first file and for the second",
    )
    command.add_argument(
        "--base",
        metavar="PATH",
        help="if what is read is an adapter (LoRA): the file or folder of the model it was trained "
        "for; by default the local folder that the adapter names, else, in a comparison, the other one",
    )
    command.add_argument(
        "--include",
        metavar="PATTERN",
        nargs="+",
        help="take only layers whose names match one of these, with * and ? as in a shell; give "
        "them after the files",
    )
    command.add_argument(
        "--exclude",
        metavar="PATTERN",
        nargs="+",
        help="leave out layers whose names match one of these",
    )
    command.add_argument(
        "--head",
        metavar="NAME",
        action="append",
        help="the layer that gives the classes, which is measured in full space, where opposite "
        "neurons count as far apart; 'none' if there is none; may be given several times; by "
        "default it is guessed, and a note says so",
    )
    command.add_argument(
        "--neurons",
        metavar="NAME=HOW",
        action="append",
        type=_way,
        help="where the neurons of a weight are: its rows, its columns, or a number of equal parts "
        "along its rows, such as 'decoder=columns' or 'attn.qkv=3'; may be given several times",
    )
    command.add_argument(
        "--similar-above",
        metavar="COSINE",
        type=_cosine,
        default=0.95,
        help="two neurons are near-duplicates if their cosine is at least this, a number between 0 "
        "and 1; by default 0.95",
    )
    command.add_argument(
        "--sample-above",
        metavar="N",
        type=_sample_above,
        default=SAMPLE_ABOVE,
        help="of a layer with more neurons than this measure a sample of so many; 'none' measures "
        f"all; by default {SAMPLE_ABOVE}",
    )


def settings(given: argparse.Namespace) -> dict[str, Any]:
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
        "key": _key(given.key, files=2 if "after" in given else 1),
        "base": given.base,
    }


def _key(keys: list[str] | None, files: int) -> str | tuple[str | None, ...] | None:
    """The key for all files, or one for each of them; None finds it."""
    if keys is None:
        return None
    if len(keys) not in (1, files):
        most = "once" if files == 1 else "once or twice"
        raise ValueError(f"--key was given {len(keys)} times; give it {most}")
    found = tuple(None if key == "auto" else key for key in keys)
    return found if len(found) > 1 else found[0]


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


def _cosine(text: str) -> float:
    try:
        cosine = float(text)
    except ValueError:
        cosine = math.nan
    if not 0.0 < cosine < 1.0:
        raise argparse.ArgumentTypeError(
            f"the cosine must be a number above 0 and below 1; got {text}"
        )
    return cosine


def _limit(text: str) -> float:
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise argparse.ArgumentTypeError(f"the ratio must be a number above 0; got {text}")
    return limit
