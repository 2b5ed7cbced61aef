"""``python -m evidence``: run the plan, or what is left of it, and write the tables."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from evidence import cells as running
from evidence.data import MissingDataError
from evidence.documents import page, quoted, unpack, write
from evidence.errors import unusable
from evidence.files import read, write_whole
from evidence.headline import five_lines
from evidence.methods import CORE, METHODS, PENALTIES
from evidence.plan import SCALES, TEST_SEEDS, TUNING_SEEDS, Cell, Setting, cells
from evidence.training import BATCH

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
MINIATURE = "In miniature, to see that all of it works: it says nothing of any method."
GOES_ON = "Cells that are done are kept: the same command, without --tables, goes on."


def main() -> int:
    """Run what is left of the plan and write the tables of all that is there."""
    args = _arguments()
    try:
        return _done(args)
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(unusable(args.out, error), file=sys.stderr)
        return 2
    except BrokenExecutor as error:
        print(f"{error}\nWhere memory ran out, fewer --jobs take less. {GOES_ON}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print(f"\n{GOES_ON}", file=sys.stderr)
        return 130


def _done(args: argparse.Namespace) -> int:
    """Do what was asked for; 0 if nothing is left.

    Raises:
        MissingDataError: if the data is not there, or no cell is asked for.
    """
    plan, tuning, testing = _plan(args)
    by_data = sorted(plan, key=lambda cell: cell.setting.data)  # each is read once
    wanted = {cell: running.asked(cell, tuning, testing) for cell in by_data}
    if args.list:
        print("\n".join(cell.name for cell in plan))
        print(f"{len({cell.setting for cell in plan})} settings, {len(plan)} cells")
        return 0
    folder = Path(args.out) / "cells"
    if args.resume_committed:
        unpack(RESULTS / "cells.json", folder)
    left = _not_kept(plan, folder, wanted)
    print(f"{len(plan)} cells, {len(plan) - len(left)} done before; results in {folder}")
    others = [cell for cell in left if (folder / f"{cell.name}.json").exists()]
    if others:
        print(
            f"Not taken: {len(others)} files there of other data, seeds or trials, or not whole. A run "
            "writes over them; another --out keeps them.",
            file=sys.stderr,
        )
    if not args.tables:
        _run(left, tuning, testing, folder, args.jobs, args.minutes)
    still_left = set(_not_kept(plan, folder, wanted))
    if still_left:
        print(f"{len(still_left)} cells are left. {GOES_ON}", file=sys.stderr)
    if args.commit and still_left and not args.so_far:
        print(f"{len(still_left)} cells are missing: --so-far commits the others", file=sys.stderr)
        return 3
    done = [read(folder / f"{cell.name}.json") for cell in plan if cell not in still_left]
    target = RESULTS if args.commit else Path(args.out)
    if done:
        remark = MINIATURE if args.quick else ""
        pictures = write(done, len(plan), target, remark)
        if args.commit:
            write_whole(README, quoted(README.read_text(), five_lines(done)))
            write_whole(PAGE, quoted(PAGE.read_text(), page(done)))
        print(f"\n{len(done)} of {len(plan)} cells; tables: {target / 'tables.md'}")
        if pictures:
            print(f"Pictures: {', '.join(map(str, pictures))}")
        if remark:
            print(remark)
    return 0 if len(done) == len(plan) else 3


def _not_kept(
    plan: Sequence[Cell], folder: Path, wanted: Mapping[Cell, running.Result]
) -> list[Cell]:
    """The cells that a folder has no result of, as they are asked now."""
    return [cell for cell in plan if not running.kept(folder, cell, wanted[cell])]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evidence", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few tiny cells, to see that all of it works"
    )
    parser.add_argument(
        "--data",
        help="compare the core methods on other data: cifar10 (fetched once, 139 MB), digits, "
        "fashion-mnist, mnist1d, or a folder with idx files, one .npz or CIFAR's python version",
    )
    parser.add_argument(
        "--tables",
        action="store_true",
        help="run nothing, write the tables of what is there; with --resume-committed the committed ones",
    )
    parser.add_argument("--only", help="cells whose names contain this")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="processes, one core each (default: all cores)",
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no cell after so long"
    )
    parser.add_argument(
        "--commit",
        action="store_true",
        help="write into evidence/results, docs/evidence.md and README",
    )
    parser.add_argument(
        "--so-far", action="store_true", help="with --commit: though cells are missing"
    )
    parser.add_argument(
        "--resume-committed",
        action="store_true",
        help="take cells from evidence/results/cells.json, too",
    )
    parser.add_argument(
        "--out",
        help="folder for results (out/evidence; out/evidence-quick, out/evidence-own with --data); the "
        "same folder goes on where a run was ended",
    )
    args = parser.parse_args()
    if args.data == "":
        parser.error("--data is empty: name data or a folder, or leave it out for the whole plan")
    if args.quick and args.data:
        parser.error("--quick has data of its own: leave out --data")
    if args.commit and (args.quick or args.data or args.only):
        parser.error("--commit takes the whole plan: leave out --quick, --data and --only")
    if args.jobs < 1:
        parser.error("--jobs is 1 or more")
    if args.out is None:
        args.out = "out/evidence"
        if args.quick:
            args.out = "out/evidence-quick"
        elif args.data:
            args.out = "out/evidence-own"
    return args


def _plan(args: argparse.Namespace) -> tuple[list[Cell], Sequence[int], Sequence[int]]:
    """The cells, the seeds to tune on and the seeds to test on."""
    if args.quick:
        base = Setting("digits", 200, 4, held_out=200)
        settings = [base, replace(base, scale=0.3), replace(base, depth=4)]
        settings.append(replace(base, imbalance=20.0))
        found = _crossed(settings, ("decay", *PENALTIES, "random", "length"))
        return _chosen(found, args.only), TUNING_SEEDS[:2], TEST_SEEDS[:3]
    if args.data:
        data = running.data_of(Cell(Setting(args.data, 0, 0), METHODS["decay"]))
        pool = len(data.pool[1])
        if pool < 2 * BATCH:
            raise MissingDataError(
                f"{data.title} has {pool} training images; "
                f"{2 * BATCH} are the least that can be compared on."
            )
        base = Setting(args.data, min(1000, pool // 2), 30, held_out=min(2000, pool // 4))
        found = _crossed([replace(base, scale=scale) for scale in SCALES], CORE)
    else:
        found = cells()
    return _chosen(found, args.only), TUNING_SEEDS, TEST_SEEDS


def _crossed(settings: Sequence[Setting], methods: Sequence[str]) -> list[Cell]:
    """Every setting with every method."""
    return [Cell(setting, METHODS[name]) for setting in settings for name in methods]


def _chosen(cells: Sequence[Cell], only: str | None) -> list[Cell]:
    """The cells whose names contain what is asked for."""
    found = [cell for cell in cells if only is None or only in cell.name]
    if not found:
        raise MissingDataError(f"no cell's name contains {only!r}: --list prints them")
    return found


def _run(
    left: Sequence[Cell],
    tuning: Sequence[int],
    testing: Sequence[int],
    folder: Path,
    jobs: int,
    minutes: float,
) -> None:
    """Run cells, each on one core, and save each; one that fails does not end the others."""
    start = time.monotonic()
    waiting = list(left)
    running.keep_freed_memory()
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, context, running.end_with, (os.getpid(),)) as pool,
        tqdm(total=len(left), unit="cell", smoothing=0.05) as bar,
    ):
        pending: dict[Future[running.Result], Cell] = {}
        while pending or waiting:
            while waiting and len(pending) < jobs and time.monotonic() - start < 60 * minutes:
                cell = waiting.pop(0)
                pending[pool.submit(running.run, cell, tuning, testing)] = cell
            if not pending:
                break
            future = next(as_completed(pending))
            cell = pending.pop(future)
            bar.set_postfix_str(cell.name)
            bar.update()
            error = future.exception()
            if error is None:
                running.save(future.result(), folder)
            elif isinstance(error, BrokenExecutor):
                raise error
            else:
                bar.write(f"{cell.name} failed: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
