"""``python -m evidence.retuned``: the default again where wider grids chose another rate or decay.

The report of ``python -m evidence.defaults`` takes the learning rates and decays that the plan's first
run chose for weight decay only. Where the second run, whose grids are widened, chose others, the report
is made again with these; in all other settings it stays. The protocol is in evidence/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Final

from evidence.data import MissingDataError
from evidence.defaults import (
    FRESH,
    README,
    OutOfTimeError,
    Reported,
    Study,
    Versus,
    candidates,
    controlled,
    controls_of,
    counts,
    direction_of,
    in_order,
    legend,
    report,
)
from evidence.documents import quoted, save_all, unpack
from evidence.files import read, write_whole
from evidence.grid import Trial
from evidence.methods import METHODS, Method
from evidence.options import add_options
from evidence.plan import SETTINGS, Setting
from evidence.tables import difference_cell, error_cell, markdown

FOLDER = Path(__file__).parent
COMMITTED = FOLDER / "results" / "defaults" / "cells.json"
RESULTS = FOLDER / "results" / "defaults" / "retuned.json"
PLAN = FOLDER / "results" / "cells.json"
MARKS = (
    "<!-- retuned: written by `python -m evidence.retuned --commit` -->",
    "<!-- end of retuned -->",
)
DEFAULT: Final = "full-1-0.02"


def main() -> int:
    """Run what is left, print the table, and write it if asked to."""
    args = _arguments()
    settings = [setting for setting in in_order() if args.only in setting.name]
    if not settings:
        print(
            f"no setting's name contains {args.only!r}; one is {SETTINGS[0].name}", file=sys.stderr
        )
        return 2
    wider = chosen()
    missing = [one.name for one in settings if one in SETTINGS and one not in wider]
    if missing:
        print(f"{PLAN} has no cell of weight decay only in {', '.join(missing)}", file=sys.stderr)
        return 2
    folder = Path(args.out) / "cells"
    if args.resume_committed and RESULTS.exists():
        unpack(RESULTS, folder)
    unpack(COMMITTED, folder)
    study = Study(folder, args.jobs, time.monotonic() + 60 * args.minutes)
    try:
        former = {setting: study.tuned(setting, quick=False) for setting in settings}
        tuned = {**former, **{one: wider[one] for one in settings if one in wider}}
        changed = [setting for setting in settings if tuned[setting] != former[setting]]
        if not changed:
            print("wider grids chose the same rate and decay here: nothing is reported anew")
            return 0
        again = report(study, changed, tuned, methods(), FRESH)
        kept = [setting for setting in settings if setting not in changed]
        others = report(study, kept, tuned, methods(), FRESH)
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    except OutOfTimeError:
        print("out of time; the same command goes on", file=sys.stderr)
        return 3
    text = table(again, others)
    print(text)
    if args.commit:
        save_all(list(chain.from_iterable(results for _, results in again)), RESULTS)
        write_whole(README, quoted(README.read_text(), text, MARKS))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evidence.retuned", description=__doc__)
    parser.add_argument("--only", default="", help="settings whose names contain this")
    add_options(parser)
    parser.add_argument("--out", default="out/evidence-retuned", help="folder for results")
    args = parser.parse_args()
    if args.commit and args.only:
        parser.error("--commit takes all settings: leave out --only")
    return args


def methods() -> list[Method]:
    """No penalty, the default, noise as long as its gradient, its growth alone and its turns alone."""
    default = next(method for method in candidates() if method.name == DEFAULT)
    return [METHODS["decay"], default, *controls_of(default), direction_of(default)]


def chosen() -> Mapping[Setting, Trial]:
    """What the plan's second run chose for weight decay only, in the settings that it has."""
    by_name = {setting.name: setting for setting in SETTINGS}
    found = {}
    for result in read(PLAN):
        name, _, method = result["name"].partition("--")
        if method == "decay":
            found[by_name[name]] = Trial(**result["chosen"])
    return found


def table(again: Reported, others: Reported) -> str:
    """Errors, changes from no penalty, and the default's from its controls; then counts.

    Args:
        again: The settings with another learning rate or decay, a row each.
        others: Those that stay as they were reported; they are counted, too.
    """
    none, default, *controls, direction = [method.name for method in methods()]
    titles = {method.name: method.title for method in methods()}
    titles[default] = "default"
    names = (default, *controls, direction)
    from_none = [Versus.of(again, name, none) for name in names]
    from_controls = [Versus.of(again, default, name) for name in controls]
    head = ["setting", "learning rate, decay", "none"]
    head += [titles[versus.name] for versus in from_none]
    head += [f"default minus {titles[name]}" for name in controls]
    rows = []
    for i, (title, results) in enumerate(again):
        trial = results[0]["asked"]["trial"]
        row: list[object] = [title, f"{trial['rate']:g}, {trial['decay']:g}"]
        row.append(error_cell(results[0]))
        for versus in (*from_none, *from_controls):
            row.append(difference_cell(versus.changes[i]))
        rows.append(row)
    every = [*again, *others]
    from_none = [Versus.of(every, name, none) for name in names]
    from_controls = [Versus.of(every, default, name) for name in controls]
    counted = counts(every, from_none, titles)
    counted = f"All {len(every)} settings, these in place of the former: {counted}"
    beyond = controlled(from_none[0], from_controls, titles, "The default")
    return "\n\n".join([markdown(head, rows), legend(again), counted, beyond])


if __name__ == "__main__":
    sys.exit(main())
