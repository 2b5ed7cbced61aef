"""`make demo`: small networks with the callback, without, and with a control; tables, pictures."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch

from evidence.data import Data, MissingDataError, load
from evidence.statistics import paired, standard_error
from notebooks.demo_picture import draw_picture
from notebooks.demo_train import ARMS, Arm, Grid, Outcome, Plan, Settings, fit
from notebooks.demo_tune import tune

OUT = Path("out/demo")
SEEDS = range(216, 224)  # first used after the settings below were fixed
SHOWN = ("mnist1d", "digits")
PLANS = {
    "mnist1d": Plan(
        images=5000,
        epochs=10,
        depth=4,
        grids=(Grid(0.0, (0.04, 0.08, 0.16, 0.32), (1e-5, 3e-5, 1e-4)),),
    ),
    "digits": Plan(
        images=500,
        epochs=40,
        depth=2,
        grids=(Grid(0.2, (0.05, 0.1, 0.2, 0.4), (1e-2, 3e-2, 1e-1)),),
    ),
    "fashion-mnist": Plan(
        images=1000,
        epochs=30,
        depth=2,
        grids=(
            Grid(0.2, (0.003125, 0.00625, 0.0125, 0.025), (3e-3, 1e-2, 3e-2)),
            Grid(0.0, (0.0125, 0.025, 0.05, 0.1), (3e-3, 1e-2, 3e-2)),
        ),
    ),
}
# Chosen with --tune: the best of 12 trials without the penalty, by validation error on other seeds.
# None lies on an edge of its grid, which was moved until that was so. With the penalty and in the
# control they stay.
CHOSEN = {
    "mnist1d": [Settings(0.0, rate=0.16, decay=3e-5)],
    "digits": [Settings(0.2, rate=0.2, decay=3e-2)],
    "fashion-mnist": [
        Settings(0.2, rate=0.00625, decay=1e-2),
        Settings(0.0, rate=0.05, decay=1e-2),
    ],
}


@dataclass(frozen=True)
class Comparison:
    """Runs of each arm in one setting; runs at the same position share a seed."""

    settings: Settings
    runs: dict[Arm, list[Outcome]]


def main() -> int:
    args = _arguments()
    torch.set_num_threads(1)  # faster for so small a network
    start = time.perf_counter()
    try:
        datasets = []
        for source in args.data:
            known = source if source in PLANS else "fashion-mnist"
            data = load(source)
            _check(data, PLANS[known])
            datasets.append((data, known))
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    for data, known in datasets:
        if args.tune:
            tune(data, PLANS[known])
        else:
            _show(data, known)
    if not args.tune:
        _print_legend()
    print(f"{time.perf_counter() - start:.0f} seconds")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=SHOWN,
        help="mnist1d, digits, fashion-mnist, cifar10, or a folder with four idx files or one .npz",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="redo the choice of settings instead, and print every trial",
    )
    return parser.parse_args()


def _check(data: Data, plan: Plan) -> None:
    """Refuse data with too few images to train on, and others to tune on."""
    count, needed = len(data.pool[1]), plan.images
    if count <= needed:
        raise MissingDataError(
            f"{data.title} has {count} training images; the demo takes more than {needed}. "
            "python -m evidence --data takes fewer."
        )


def _show(data: Data, known: str) -> None:
    """Train on the data, with the settings of those of this name; print a table, draw a picture."""
    folder = OUT / data.name
    comparisons = _train(data, known, folder)
    _print_table(data, known, comparisons)
    first = comparisons[0]
    picture = OUT / f"{data.name}.png"
    title = data.title
    if first.settings.noise:
        title += f", {_labels(first.settings)}"
    draw_picture(picture, title, first.runs)
    print(f"\nPicture: {picture}")
    print(f"Logs:    {folder}/csv; tensorboard --logdir {folder}/tensorboard\n", flush=True)


def _train(data: Data, known: str, folder: Path) -> list[Comparison]:
    """Run everything, seed by seed; print one line per run, readable in a terminal and a log file."""
    shutil.rmtree(folder, ignore_errors=True)  # loggers would append to an earlier demo's files
    start = time.perf_counter()
    total = len(CHOSEN[known]) * len(SEEDS) * len(ARMS)
    done = 0
    print(
        f"{total} short runs on {data.title}: without the penalty, with it, control\n", flush=True
    )
    comparisons = []
    for settings in CHOSEN[known]:
        comparison = Comparison(settings, {arm: [] for arm in ARMS})
        for seed in SEEDS:
            for arm in ARMS:
                outcome = fit(data, PLANS[known], settings, seed, folder, arm=arm)
                comparison.runs[arm].append(outcome)
                done += 1
                seconds = time.perf_counter() - start
                line = _progress(settings, seed, outcome, arm)
                print(f"{done:2}/{total} {seconds:4.0f} s  {line}", flush=True)
        comparisons.append(comparison)
    return comparisons


def _labels(settings: Settings) -> str:
    """Whether labels are wrong."""
    return f"{100 * settings.noise:.0f} % wrong labels" if settings.noise else "clean labels"


def _progress(settings: Settings, seed: int, outcome: Outcome, arm: Arm) -> str:
    """The result of one run in one line."""
    worst = max(layer.ratio for layer in outcome.after)
    return (
        f"{_labels(settings):<17} seed {seed} {arm:<7} "
        f"error {outcome.error:5.2f} % largest ratio {worst:5.2f}"
    )


def _print_table(data: Data, known: str, comparisons: list[Comparison]) -> None:
    """Print one table of all settings."""
    plan = PLANS[known]
    where = "" if data.name == known else f" of {known}"
    layers = comparisons[0].runs["without"][0].before
    sizes = [layers[0].dimension, *(layer.neurons for layer in layers)]
    print(f"\n{data.title}: a ReLU network {'-'.join(map(str, sizes))},")
    images = f"{plan.images} training images, {len(data.test[1])} test images"
    print(f"{images}, {plan.epochs} epochs, {len(SEEDS)} seeds;")
    print("the three runs of a seed see the same images in the same order from the same")
    print("initial weights, PyTorch's own. Learning rate and weight decay are the best of 12")
    print(f"without the penalty, by validation error on other seeds{where} (--tune).\n")
    print(f"{'ratio to random':>43}{'smallest angle':>26}")
    print(f"{'before':>28}{'after':>10}{'after':>25}")
    print(_row("layer", "neurons x dim", "", [*ARMS], [*ARMS]))
    for comparison in comparisons:
        print(f"-- {_labels(comparison.settings)} ".ljust(80, "-"))
        for row in (*_layer_rows(comparison), *_error_rows(comparison)):
            print(row)


def _print_legend() -> None:
    """Say what the columns mean."""
    print(
        """
ratio: energy of a layer's neurons over that of random ones; 1 is random, above
1 is more redundant. angle: smallest between two neurons. Medians over seeds.
without: the callback only measures (coefficient 0); training stays as it is.
with: HypersphericalUniformity() as it comes; nothing is tuned for it.
control: random directions as long as its gradient: what noise and growth do.
±: standard error. gain, worse: p is below 0.05 (paired t test)."""
    )


def _layer_rows(comparison: Comparison) -> list[str]:
    """One row per layer: shape, ratio before and after, smallest angle after; medians over seeds."""
    rows = []
    for i, layer in enumerate(comparison.runs["without"][0].before):
        before = median(run.before[i].ratio for run in comparison.runs["without"])
        ratios = []
        angles = []
        for runs in comparison.runs.values():
            ratios.append(f"{median(run.after[i].ratio for run in runs):.2f}")
            angles.append(f"{median(run.after[i].min_angle for run in runs):.1f}°")
        shape = f"{layer.neurons} x {layer.dimension}"
        rows.append(_row(layer.name, shape, f"{before:.2f}", ratios, angles))
    return rows


def _row(name: str, shape: str, before: str, ratios: list[str], angles: list[str]) -> str:
    """Cells of a layer in columns; ratios and angles by arm."""
    row = f"{name:<8}{shape:<14}{before:>6}"
    for cells in (ratios, angles):
        row += f"{cells[0]:>10}{cells[1]:>7}{cells[2]:>8}"
    return row


def _error_rows(comparison: Comparison) -> list[str]:
    """Test errors of all arms with their settings, and the paired differences."""
    settings = comparison.settings
    errors = {arm: [run.error for run in runs] for arm, runs in comparison.runs.items()}
    rows = []
    for arm in ARMS:
        chosen = "the same"
        if arm == "without":
            chosen = f"learning rate {settings.rate:g}, weight decay {settings.decay:g}"
        rows.append(_error_row(arm, errors[arm], chosen))
    others: tuple[Arm, ...] = ("without", "control")
    for other in others:
        rows.append(_difference_row(f"with - {other}", errors["with"], errors[other]))
    return rows


def _error_row(arm: Arm, errors: list[float], settings: str) -> str:
    return (
        f"test error {arm:<11}{mean(errors):6.2f} % ± {standard_error(errors):.2f}   ({settings})"
    )


def _difference_row(name: str, errors: list[float], others: list[float]) -> str:
    """The paired difference in words, too."""
    change = paired(errors, others)
    verdict = "null"
    if change.p < 0.05:
        verdict = "gain" if change.mean < 0 else "worse"
    return (
        f"{name:<22}{change.mean:+6.2f}   ± {change.error:.2f}   "
        f"lower on {change.wins} of {change.seeds} seeds, p {_chance(change.p)}: {verdict}"
    )


def _chance(p: float) -> str:
    """A value of p in two digits, or three where it is small."""
    if p < 0.001:
        return "< .001"
    return f"{p:.3f}".removeprefix("0") if p < 0.1 else f"{p:.2f}".removeprefix("0")


if __name__ == "__main__":
    sys.exit(main())
