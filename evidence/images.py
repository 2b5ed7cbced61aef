"""``python -m evidence.images``: CNN-9, ResNet-18 and a small ViT with a penalty, without, and with controls.

    python -m evidence.images --data cifar10 --network resnet18 --methods none half_mhe_2 random length

No number is tuned for a penalty. Pixels are bytes, 0 to 255, scaled to -1 to 1; batches have 128
images over all devices, moved by up to 4 pixels with mirrored edges and flipped.

CNN-9 has the recipe of the official code (github.com/wy1iu/Sphere-Uniformity): three times three
3 x 3 convolutions of 64, 128 and 256 channels with batch norm and ReLU, a pooling after each three,
a convolution over all that is left to 256, the head; no biases. Cross entropy of smoothed labels
(0.01) and of probabilities + 1e-4, which bounds it. SGD with momentum 0.9, weight decay 5e-4,
learning rate 0.1, a tenth of it after 0.4, 2/3 and 13/15 of 75000 steps. Running means of batch norm
are PyTorch's (0.1 a step; 0.001 there). From its initial weights a learning rate of 0.1 throws the
head so far that its probabilities saturate and the loss has no slope; weight decay then takes some
2000 steps to bring it back. So it is in the published logs, too (github.com/wy1iu/MHE: the training
loss leaves 9 after 1300 to 3000 of 42500 steps and is below that of a guess, ln 100, after 1600 to
3100, without a penalty after 2100 and 2200). ``--rate 0.02`` learns at once.

ResNet-18 is that of CIFAR: SGD with momentum 0.9, weight decay 5e-4, a learning rate of 0.1 that
follows half a cosine. ``resnet18-plain`` has no batch norm, but biases and SkipInit. The ViT has
patches of 4, six blocks and four heads: AdamW, weight decay 0.05, a learning rate of 1e-3 that rises
for a twentieth of all steps and then follows half a cosine, gradients clipped to norm 1. ``vit-bn``
has batch norm in place of layer norm. Both take plain cross entropy; decay is on all parameters.

Methods: presets by name; ``orthogonality`` (soft orthogonality, for which no preset is published, at
the coefficients of hidden layers and head at which its gradients are as long as those of half_mhe_2
at the initial weights); ``default``, the callback as it comes; and three controls of half_mhe_2:
``random`` (a random tangent direction at each step, row by row as long as its gradient),
``direction`` (its steps, with the norms that neurons would have without it) and ``length`` (steps
without it, with the norms that neurons would have with it). ``mgd_random``, ``mgd_direction`` and so
on are those of mgd, orthogonality and the default.

Ended and called again it goes on from the last checkpoints, on the same batches and crops; what was
made with other settings is refused. On several devices a few test images may count twice.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import pickle
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import cast, get_args

import torch
from lightning.pytorch.utilities import rank_zero_only

from evidence import cells as running
from evidence.controls import Part
from evidence.data import MissingDataError
from evidence.documents import quoted, save_all
from evidence.errors import unusable
from evidence.files import read, write_whole
from evidence.image_methods import CHOICES, METHODS, parts_of
from evidence.image_networks import WIDTHS
from evidence.image_tables import (
    RIVALS,
    TITLES,
    Run,
    at_better_numbers,
    has_rivals,
    method_of,
    overview,
    rates_table,
    section,
    seeds_of,
    table,
)
from evidence.image_training import (
    LAST,
    RECIPES,
    Settings,
    check,
    first_step,
    refuse_others,
    train,
)
from evidence.options import whole_from

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "images"
README = FOLDER / "README.md"
PAGE = FOLDER.parent / "docs" / "evidence.md"
MARKS = (
    "<!-- images: written by `python -m evidence.images --commit` -->",
    "<!-- end of images -->",
)

LARGEST_SEED = 2**32 - 1
"""That NumPy takes."""

Job = tuple[Settings, str, int, Path]
"""Settings, method, seed, and the file of its result."""


def main() -> int:
    """Run what is left, print the table, and write it if asked to."""
    args = _arguments()
    if args.table is not None:
        print(_printed(Path(args.table)))
        return 0
    settings = _settings(args)
    try:
        check(settings)
        folder = Path(args.out) / settings.name
        jobs = []
        for seed in args.seeds:
            for method in args.methods:
                jobs.append((settings, method, seed, folder / f"{method}-{seed}.json"))
        missing = [job for job in jobs if not is_done(job)]
        if args.jobs > 1 and len(missing) > 1:
            _run_beside(missing, args.jobs)
        else:
            for job in missing:
                run(job)
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(unusable(args.out, error), file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the first the second
        print("\nThe same command goes on from the last checkpoints.", file=sys.stderr)
        return 130
    if rank_zero_only.rank:
        return 0
    runs = [read(path) for *_, path in jobs]
    print(f"\n{section(runs)}\n\nResults: {folder}")
    if args.commit:
        folder = RESULTS / "rates" if settings.validate else RESULTS
        keep(runs, folder, settings.name, replace=not settings.validate)
        write_whole(README, quoted(README.read_text(), block(), MARKS))
        write_whole(PAGE, quoted(PAGE.read_text(), summary(), MARKS))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evidence.images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        help="cifar10 (fetched once, 139 MB), fashion-mnist, digits, CIFAR-100's folder, or any folder "
        "that the harness reads",
    )
    parser.add_argument("--network", choices=[*WIDTHS], default="cnn9", help="default: cnn9")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[*METHODS],
        choices=CHOICES,
        metavar="METHOD",
        help=f"of {', '.join(CHOICES)} (default: {', '.join(METHODS)})",
    )
    from_0, from_1 = whole_from(0), whole_from(1)
    parser.add_argument(
        "--seeds", nargs="+", type=from_0, default=[0, 1, 2, 3, 4], help="default: 0 to 4"
    )
    parser.add_argument("--steps", type=from_1, default=75_000, help="default: 75000")
    parser.add_argument("--rate", type=float, help="learning rate at first; else the recipe's")
    parser.add_argument("--decay", type=float, help="weight decay; else the recipe's")
    parser.add_argument(
        "--width",
        type=from_1,
        help="channels of the first block (published: 64), or dimensions of a ViT's token (256)",
    )
    parser.add_argument("--images", type=from_0, default=0, help="training images; 0 takes all")
    parser.add_argument(
        "--validate",
        type=from_0,
        default=0,
        metavar="N",
        help="judge on so many held-out training images, not on the test images",
    )
    parser.add_argument(
        "--test-every", type=from_1, default=500, help="steps between tests and checkpoints (500)"
    )
    parser.add_argument("--accelerator", default="auto", help="default: auto")
    parser.add_argument("--devices", default="1", help="default: 1")
    parser.add_argument("--precision", default="32-true", help="default: 32-true")
    parser.add_argument("--jobs", type=from_1, default=1, help="processes of one thread (1)")
    parser.add_argument(
        "--commit",
        action="store_true",
        help="write evidence/results and README: methods with their controls, or, with --validate, "
        "how good a learning rate is without a penalty",
    )
    parser.add_argument(
        "--out", default="out/images", help="folder for results, one in it a setting (out/images)"
    )
    parser.add_argument(
        "--table",
        metavar="PATH",
        help="only print the table of the runs in a folder, or in a file of evidence/results/images",
    )
    args = parser.parse_args()
    if (args.data is None) == (args.table is None):
        parser.error("say either --data, to train, or --table, to print what is there")
    if args.rate is not None and not 0 < args.rate < math.inf:
        parser.error("--rate is above 0 and finite")
    if args.decay is not None and not 0 <= args.decay < math.inf:
        parser.error("--decay is 0 or more and finite")
    if max(args.seeds) > LARGEST_SEED:
        parser.error(f"--seeds are up to {LARGEST_SEED}")
    controls = {name: parts_of(name)[1] for name in args.methods}
    drawing = [name for name, control in controls.items() if control == "random"]
    if args.devices != "1" and (args.jobs > 1 or drawing):
        parser.error(f"--devices 1 is what {' and '.join(drawing or ['--jobs'])} can take")
    args.seeds = list(dict.fromkeys(args.seeds))
    args.methods = list(dict.fromkeys(args.methods))
    halves = [name for name, control in controls.items() if control in get_args(Part)]
    if halves and args.precision in ("16", "16-mixed"):
        parser.error(
            f"--precision {args.precision} leaves out steps in which something overflows, which the "
            f"twin behind {' and '.join(halves)} would take: take bf16-mixed or 32-true"
        )
    if args.commit and args.validate:
        if args.methods != ["none"]:
            parser.error("--commit --validate keeps learning rates: take --methods none")
    elif args.commit:
        lacking = [name for name in RIVALS if name not in args.methods]
        if lacking and args.methods != ["none"]:
            parser.error(
                f"--commit takes {', '.join(RIVALS)} beside others: add {' '.join(lacking)}"
            )
        if len(args.seeds) < 2:
            parser.error("--commit takes two seeds or more; one with --validate")
    return args


def _settings(args: argparse.Namespace) -> Settings:
    """What all runs share; the network's own width, rate and decay where none is asked for."""
    recipe = RECIPES[args.network]
    return Settings(
        data=args.data,
        network=args.network,
        width=args.width or WIDTHS[args.network],
        rate=args.rate or recipe.rate,
        decay=None if args.decay == recipe.decay else args.decay,
        steps=args.steps,
        images=args.images,
        validate=args.validate,
        test_every=min(args.test_every, args.steps),
        accelerator=args.accelerator,
        devices=args.devices,
        precision=args.precision,
    )


def is_done(job: Job) -> bool:
    """Whether there is a result.

    Raises:
        MissingDataError: if it, or its checkpoint, is not whole or was made with other settings than
            are asked for.
    """
    settings, method, seed, path = job
    if path.exists():
        refuse_others(path, result_in(path)["asked"], settings.asked(method, seed))
        return True
    folder = path.with_suffix("")
    try:
        first_step(settings, method, seed, folder)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise MissingDataError(
            f"{folder / LAST} cannot be read: {error}\nPut a whole checkpoint in its place, if one "
            "lies beside it, or remove it, and the run begins anew."
        ) from None
    return False


def result_in(path: Path) -> Run:
    """The result of a run that a file holds.

    Raises:
        MissingDataError: if it holds none.
    """
    try:
        found = read(path)
    except ValueError:
        found = None
    if are_runs(found):
        raise MissingDataError(f"{path} holds all runs of a table: --table {path} prints it")
    if not is_run(found):
        raise MissingDataError(f"{path} holds no whole result of a run: remove it")
    return cast(Run, found)


def is_run(found: object) -> bool:
    """Whether something that was read is the result of a run."""
    return isinstance(found, dict) and {"asked", "seed", "errors"} <= found.keys()


def are_runs(found: object) -> bool:
    """Whether something that was read is what --commit keeps of a setting."""
    return isinstance(found, list) and bool(found) and all(map(is_run, found))


def run(job: Job) -> None:
    """Train on one core, or one device, and write the result."""
    settings, method, seed, path = job
    torch.set_num_threads(1)
    found = train(settings, method, seed, path.with_suffix(""))
    if rank_zero_only.rank:
        return
    write_whole(path, json.dumps(found, allow_nan=False))
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)  # its checkpoints, up to 180 MB
    print(f"{path.stem}: {found['errors'][-1]:.2f} % after {found['seconds']} s", flush=True)


def _run_beside(jobs: Sequence[Job], count: int) -> None:
    """Run them in so many processes; after a failure or Ctrl-C no other job is handed out."""
    running.keep_freed_memory()
    context = multiprocessing.get_context("spawn")
    workers = min(count, len(jobs))
    with ProcessPoolExecutor(workers, context, running.end_with, (os.getpid(),)) as pool:
        try:
            for future in as_completed([pool.submit(run, job) for job in jobs]):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _printed(path: Path) -> str:
    """The table of the runs in a folder, or of those that --commit has put in one file."""
    if not path.is_file():
        return table(read_folder(path))
    try:
        found = read(path)
    except ValueError:
        found = None
    if not are_runs(found):
        raise SystemExit(f"{path} holds no runs that --commit has kept")
    return section(cast(list[Run], found))


def read_folder(folder: Path) -> list[Run]:
    """The runs of one setting whose results lie in a folder."""
    paths = sorted(folder.glob("*-*.json"))
    try:
        found = [result_in(path) for path in paths]
    except MissingDataError as error:
        raise SystemExit(str(error)) from None
    shared = [{**one["asked"], "method": None, "seed": None} for one in found]
    for path, settings in zip(paths, shared, strict=True):
        if settings != shared[0]:
            raise SystemExit(f"{path} was made with other settings than {paths[0]}: take one away")
    if not found:
        raise SystemExit(f"{folder} holds no result of a run, such as none-0.json")
    return found


def keep(runs: Sequence[Run], folder: Path, name: str, replace: bool = True) -> None:
    """Write the runs of a setting; what was kept of the same seeds, and is not among them, stays.

    Args:
        runs: With all methods on the same seeds.
        folder: Of the committed results.
        name: The setting's.
        replace: Whether files all of whose runs are among these go.
    """
    told = seeds_of(runs).replace(", ", "+").replace(" ", "")
    kept = folder / f"{name}-seeds{told}.json"
    new = {(method_of(one), one["seed"]) for one in runs}
    older = []
    for path in folder.glob(f"{name}-seeds*.json"):
        others = [one for one in read(path) if (method_of(one), one["seed"]) not in new]
        if path == kept:
            older = others
        elif replace and not others:
            path.unlink()
    save_all([*runs, *older], kept)


def summary() -> str:
    """What docs/evidence.md quotes: a row for each committed result."""
    results = [runs for runs in _committed("*.json") if has_rivals(runs)]
    return overview(results) if results else "Not run."


def block() -> str:
    """What the README quotes: the sections of all committed results, and the learning rates."""
    results, tried = _committed("*.json"), _committed("rates/*.json")
    parts = [section(runs) for runs in results] + at_better_numbers(results)
    if tried:
        head = "**Learning rates and weight decays**, chosen without a penalty:"
        parts.append(f"{head}\n\n{rates_table(tried)}")
    if not parts:
        return "Not run."
    hours = sum(run["seconds"] for runs in results + tried for run in runs) / 3600
    legend = (
        "Error in %, mean over seeds (standard error); best: the lowest of a run's tests, chosen by what "
        "it is tested on, so nothing is judged by it; changes of the last error in points (standard "
        "error), and the seeds on which it is lower; ± 95 %: half the width of its 95 % interval, the "
        "smallest change that such seeds could have shown, uncorrected. p: paired t test against "
        "none, corrected for all methods of a table (Holm), not over tables. random (a random "
        "direction), length (growth alone) and direction (turns without growth) are made of "
        "half_mhe_2, whatever the penalty beside them. p beyond all: the largest of those against "
        "none, random and length, 1 if their signs differ, corrected for all penalties of a table "
        "(Holm). Its own: controls of that penalty's own gradient (mgd_random and so on), where they "
        "were run; p beyond its own likewise, corrected for the penalties that have such controls. "
        "Largest ratio: of a layer, half-space energy (the head's in full space) over that of random "
        "neurons, before → after training. Not finite: runs with such weights at the end; they answer "
        f"with one class, and their errors count as they are. {hours:.1f} core hours in all."
    )
    networks = {runs[0]["asked"]["network"] for runs in results}
    lacking = [title for network, title in TITLES.items() if network not in networks]
    if lacking:
        parts.insert(0, f"**No results yet:** {', '.join(lacking)}.")
    return "\n\n".join([legend, *parts])


def _committed(pattern: str) -> list[list[Run]]:
    """The runs of each committed setting whose file matches."""
    return [read(path) for path in sorted(RESULTS.glob(pattern))]


if __name__ == "__main__":
    sys.exit(main())
