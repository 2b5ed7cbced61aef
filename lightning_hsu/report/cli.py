"""The command line: ``lightning-hsu report`` and ``lightning-hsu compare``."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from lightning_hsu._monitor.render import shorten
from lightning_hsu._monitor.text import counted, layer_named, number
from lightning_hsu.report.arguments import parser, settings
from lightning_hsu.report.build import Report, report
from lightning_hsu.report.comparison import Comparison, compare
from lightning_hsu.report.comparison_table import comparison_table
from lightning_hsu.report.messages import complain, in_options
from lightning_hsu.report.outputs import (
    check_writable,
    drop_output,
    printing,
    progress_bar,
    write_file,
)
from lightning_hsu.report.report_table import report_table, unjudged
from lightning_hsu.report.similar_lines import group_lines, pair_lines
from lightning_hsu.report.tables import Table, output_width, show, text_width

# Exit codes.
_FAILED = 1
_BROKEN = 2
_INTERRUPTED = 128 + 2  # by SIGINT
_PIPE_CLOSED = 128 + 13  # SIGPIPE

_NAMED = 5  # layers above the limit of --fail-above
_LONGEST_NAMED = 60  # characters of their names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0; 1 if a layer fails ``--fail-above``; 2 if something cannot be read, written
        or understood; 130 if it was interrupted; 141 if nobody reads what it prints.
    """
    given = parser(_report, _compare).parse_args(arguments)
    try:
        code = int(given.run(given))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe, such as head, has had enough
        drop_output()
        return _PIPE_CLOSED
    except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        complain(in_options(str(error)))
        return _BROKEN
    except OverflowError as error:
        complain(f"a number is too large: {error}")
        return _BROKEN
    except (MemoryError, RecursionError):
        complain("what is asked for is too large for this machine")
        return _BROKEN
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception:  # a bug in this program must not look like a failed --fail-above
        traceback.print_exc()
        return _BROKEN


def _report(given: argparse.Namespace) -> int:
    check_writable(given.html, given.json, keep=[given.checkpoint])
    keep = max(100, given.pairs, given.groups)
    with progress_bar() as progress:
        found = report(
            given.checkpoint,
            **settings(given),
            keep=keep,
            merge=given.merge,
            progress=progress,
        )
    code = 0
    if given.fail_above is not None:
        code = _judge(found, given.fail_above)
    _write(found, given)
    if given.json != "-":
        with printing():
            _show(report_table(found, given.top))
            width = text_width(output_width())
            if given.pairs > 0:
                print("\n".join(pair_lines(found, given.pairs, width, given.top)))
            if given.groups > 0:
                print("\n".join(group_lines(found, given.groups, width, given.top)))
            if found.merges is not None:
                print(found.merges.text(width))
            _say_what_was_written(given)
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
        complain(f"--fail-above: {line}")
    return _FAILED if lines else 0


def _compare(given: argparse.Namespace) -> int:
    check_writable(given.html, given.json, keep=[given.before, given.after])
    with progress_bar() as progress:
        found = compare(
            given.before,
            given.after,
            **settings(given),
            match=given.match,
            progress=progress,
        )
    _write(found, given)
    if given.json != "-":
        with printing():
            _show(comparison_table(found))
            _say_what_was_written(given)
    return 0


def _show(table: Table) -> None:
    """Print a table whose notes speak of options."""
    show(table.reworded(in_options))


def _write(found: Report | Comparison, given: argparse.Namespace) -> None:
    """Write the files that are asked for, and print JSON if that is."""
    if given.html:
        write_file(given.html, found.reworded(in_options).to_html())
    if given.json == "-":
        if given.html:
            print(f"wrote {given.html}", file=sys.stderr)
        with printing():
            print(found.to_json())
    elif given.json:
        write_file(given.json, found.to_json() + "\n")


def _say_what_was_written(given: argparse.Namespace) -> None:
    for path in (given.html, given.json):
        if path:
            print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
