"""Options that commands of the harness share."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of a command that makes a report."""
    parser.add_argument("--jobs", type=whole_from(1), default=1, help="processes of one thread")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no cell after so long"
    )
    parser.add_argument("--commit", action="store_true", help="write evidence/results and README")
    parser.add_argument(
        "--resume-committed", action="store_true", help="take cells from evidence/results, too"
    )


def whole_or_quick(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Arguments of a command with --quick and --commit, of which only the whole is committed."""
    args = parser.parse_args()
    if args.quick and args.commit:
        parser.error("--commit takes the whole plan: leave out --quick")
    return args


def with_folder(parser: argparse.ArgumentParser, usual: str) -> argparse.Namespace:
    """The same of a command that goes on in a folder, --out; --quick has one of its own."""
    parser.add_argument("--out", help="folder for results; the same folder goes on where it ended")
    args = whole_or_quick(parser)
    if args.out is None:
        args.out = f"{usual}-quick" if args.quick else usual
    return args


def whole_from(least: int) -> Callable[[str], int]:
    """What reads an argument that is a whole number, this or more."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least}")
        return int(text)

    return whole
