"""``python -m evidence.defaults``: which strength does no harm untuned, and gains most?

Candidates for the defaults are compared with no penalty in the plan's settings and in others where a
penalty is dangerous, at the learning rate and weight decay that were tuned without one. A candidate
that is worse is out. The protocol is in evidence/README.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, median

import torch

from evidence import cells as running
from evidence.comparisons import LEVEL, setting_title
from evidence.controls import RandomDirection
from evidence.data import MissingDataError
from evidence.documents import quoted, save_all, unpack
from evidence.files import read, write_whole
from evidence.grid import Trial
from evidence.methods import HALF_MHE, METHODS, Method
from evidence.options import add_options, with_folder
from evidence.plan import SETTINGS, TUNING_SEEDS, Cell, Setting
from evidence.statistics import Paired, beyond_two_errors, holm, paired
from evidence.tables import difference_cell, error_cell, markdown
from evidence.training import train
from lightning_hsu import Share
from lightning_hsu._core.limits import SAFE_SHARE
from lightning_hsu.measures import RieszEnergy

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "defaults"
README = FOLDER / "README.md"
MARKS = (
    "<!-- defaults: written by `python -m evidence.defaults --commit` -->",
    "<!-- end of defaults -->",
)
CHOOSING = tuple(range(1000, 1010))
AGAIN = tuple(range(1010, 1030))
FRESH = tuple(range(80, 100))
COEFFICIENTS = (1.0, 0.3, 0.1)
SHARE_LIMITS = (None, 1.0, 0.3, 0.1)
SHARES = (0.02, 0.05, 0.1)
LOWER_LIMITS = ((1.0, 0.05), (1.0, 0.02), (0.3, 0.05), (0.3, 0.02))
"""Coefficients and share limits that were added in full space after the second look."""

DIGITS = Setting("digits", 500, 40, held_out=400)
FASHION = Setting("fashion-mnist", 1000, 30)
EXTRA = (
    replace(DIGITS, start="adapters", optimizer="adamw"),
    replace(FASHION, start="adapters", optimizer="adamw"),
    replace(DIGITS, start="adapters"),
    replace(DIGITS, scale=0.03, penalises_head=False),
    replace(DIGITS, start="trained", optimizer="adamw"),
    replace(FASHION, start="trained"),
    replace(FASHION, epochs=20, network="batch norm", optimizer="adamw"),
    Setting("mnist1d", 1000, 120, optimizer="adamw"),
)
"""Where a penalty is dangerous, or said to have nothing to do."""


def candidates() -> list[Method]:
    """All of them; none is tuned."""
    found = []
    for space, measure in (("half", HALF_MHE), ("full", RieszEnergy(s=2.0))):
        base = Method("", "", measure, apart=True)
        strengths = list(product(COEFFICIENTS, SHARE_LIMITS))
        if space == "full":
            strengths += LOWER_LIMITS
        for coefficient, limit in strengths:
            name = f"{space}-{coefficient:g}-{'none' if limit is None else f'{limit:g}'}"
            title = f"{space} space, coefficient {coefficient:g}, share limit {limit}"
            one = replace(base, name=name, title=title, share_limit=limit)
            found.append(replace(one, coefficient=coefficient))
        for fraction in SHARES:
            title = f"{space} space, Share({fraction:g})"
            one = replace(base, name=f"{space}-share{fraction:g}", title=title)
            found.append(replace(one, share=Share(fraction)))
    return found


def controls_of(method: Method) -> list[Method]:
    """A candidate's own numbers with noise in place of uniformity, and with its growth alone.

    evidence/controls.py says what each has of its step.
    """
    assert method.measure is not None
    return [
        replace(
            method,
            name=f"{method.name}-random",
            title="random direction",
            measure=RandomDirection(method.measure),
        ),
        replace(method, name=f"{method.name}-length", title="growth alone", keep="length"),
    ]


def direction_of(method: Method) -> Method:
    """A candidate's own numbers with its turns, and without its growth: it spreads, and is no rival."""
    return replace(
        method, name=f"{method.name}-direction", title="direction alone", keep="direction"
    )


def is_safe(method: Method) -> bool:
    """Whether a candidate may be the default: whether little is added where the task says little.

    Otherwise tasks are lost that are not among the settings (tests/test_safe_default.py).
    """
    if method.share is not None:
        return True
    return method.share_limit is not None and method.share_limit <= SAFE_SHARE


def in_order() -> list[Setting]:
    """The dangerous settings, then the quick ones: what is worse is out and need not be run further."""

    def work(setting: Setting) -> tuple[float, ...]:
        return (setting.network != "plain", setting.images * setting.epochs * setting.depth)

    return [*EXTRA, *sorted(SETTINGS, key=work)]


def main() -> int:
    """Run what is left, print who is out and who is chosen, and write the tables if asked to."""
    args = _arguments()
    settings = in_order()
    alive = candidates()
    seeds = (CHOOSING, AGAIN, FRESH)
    if args.quick:
        settings = [Setting("digits", 200, 2, held_out=200, start="adapters")]
        alive = [one for one in alive if one.name in ("half-1-none", "half-1-0.1")]
        seeds = (CHOOSING[:3], AGAIN[:3], FRESH[:3])
    if args.list:
        print(listed(settings, alive))
        return 0
    folder = Path(args.out) / "cells"
    if args.resume_committed:
        unpack(RESULTS / "cells.json", folder)
    study = Study(folder, args.jobs, time.monotonic() + 60 * args.minutes)
    try:
        tuned = {setting: study.tuned(setting, quick=args.quick) for setting in settings}
        story = eliminate(study, settings, tuned, alive, seeds[0], seeds[1])
        methods = [*reported_methods(story), *controls(story), *direction(story)]
        reported = report(study, settings, tuned, methods, seeds[2])
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    except OutOfTimeError:
        print("out of time; the same command goes on", file=sys.stderr)
        return 3
    text = f"{elimination_table(story)}\n\n{report_table(story, reported)}"
    print(text)
    if args.commit:
        RESULTS.mkdir(parents=True, exist_ok=True)
        save_all(study.used(), RESULTS / "cells.json")
        write_whole(README, quoted(README.read_text(), text, MARKS))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evidence.defaults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one tiny setting, to see it work")
    parser.add_argument("--list", action="store_true", help="print the settings and candidates")
    add_options(parser)
    return with_folder(parser, "out/evidence-defaults")


def listed(settings: Sequence[Setting], methods: Sequence[Method]) -> str:
    """The settings and the candidates, and how many cells they make if none is out."""
    lines = [setting.name for setting in settings]
    lines += [method.title for method in methods]
    count = len(settings) * (len(methods) + 1)
    lines.append(
        f"{len(settings)} settings x ({len(methods)} candidates and none): {count} cells, "
        "with suspects again on other seeds, and then the report"
    )
    return "\n".join(lines)


class OutOfTimeError(Exception):
    """There is no time for a further cell."""


Job = tuple[Setting, Method, Trial, tuple[int, ...], bool]
"""A cell: a setting, a method, what to train with, the seeds, and whether test images judge."""


class Study:
    """Runs cells, each once, and keeps them in a folder.

    Args:
        folder: The folder.
        jobs: How many processes.
        end: When to start no further cell, by the monotonic clock.
    """

    def __init__(self, folder: Path, jobs: int, end: float) -> None:
        self._folder = folder
        self._jobs = jobs
        self._end = end
        self._used: dict[str, running.Result] = {}

    def tuned(self, setting: Setting, *, quick: bool) -> Trial:
        """The learning rate and weight decay that were tuned without a penalty."""
        if quick:
            return Trial(0.16, 0.01)
        plan = running.tuned_in_plan("decay")
        if setting.name in plan:
            return plan[setting.name]
        cell = Cell(setting, METHODS["decay"])
        if not running.kept(self._folder, cell, _tuning_asked(cell)):
            self._check_time()
            print(f"tuning {setting.name}", flush=True)
            running.save(tune(cell), self._folder)
        found = read(self._folder / f"{cell.name}.json")
        self._used[cell.name] = found
        return Trial(**found["chosen"])

    def results(self, jobs: Sequence[Job]) -> list[running.Result]:
        """The results of cells, which are run unless the folder has them."""
        missing = [job for job in jobs if self._known(job) is None]
        if missing:
            self._check_time()
        if self._jobs > 1 and len(missing) > 1:
            self._run_beside(missing)
        else:
            for job in missing:
                self._check_time()
                running.save(run(job), self._folder)
        found = []
        for job in jobs:
            result = self._known(job)
            assert result is not None
            self._used[result["name"]] = result
            found.append(result)
        return found

    def _run_beside(self, missing: Sequence[Job]) -> None:
        """Run cells in several processes, and save each when it is done; out of time, begin no other."""
        context = multiprocessing.get_context("spawn")
        workers = min(self._jobs, len(missing))
        with ProcessPoolExecutor(workers, context, running.end_with, (os.getpid(),)) as pool:
            futures = [pool.submit(run, job) for job in missing]
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                running.save(future.result(), self._folder)
                if time.monotonic() > self._end:
                    for other in futures:
                        other.cancel()
        if any(future.cancelled() for future in futures):
            raise OutOfTimeError

    def used(self) -> list[running.Result]:
        """All results that were asked for."""
        return list(self._used.values())

    def _known(self, job: Job) -> running.Result | None:
        """A result that the folder has, if it was asked alike."""
        return running.known(self._folder, _name(job), _asked(job))

    def _check_time(self) -> None:
        if time.monotonic() > self._end:
            raise OutOfTimeError


def tune(cell: Cell) -> running.Result:
    """Choose the best of the first sixteen trials, as the plan's first run did, on one core."""
    torch.set_num_threads(1)
    start = time.process_time()
    data = running.data_of(cell)
    trials = cell.trials(data)
    tuned = train(data, cell.setting, cell.method, trials, TUNING_SEEDS, test=False)
    best = trials[int(tuned.error.mean(1).argmin())]
    tested = train(data, cell.setting, cell.method, [best], FRESH[:2], test=True)
    return {
        "name": cell.name,
        "asked": _tuning_asked(cell),
        "chosen": asdict(best),
        **running.told(tested),
        **running.ran(start),
    }


def _tuning_asked(cell: Cell) -> running.Result:
    """What the first run would have asked: sixteen trials, whatever they came to."""
    found = running.asked(cell, TUNING_SEEDS, FRESH[:2])
    for later in ("beyond", "not finite", "of equal ones", "matched"):
        del found[later]
    del found["method"]["keep"]
    return found


def run(job: Job) -> running.Result:
    """Train the networks of a cell on one core."""
    setting, method, trial, seeds, test = job
    torch.set_num_threads(1)
    start = time.process_time()
    data = running.data_of(Cell(setting, method))
    trained = train(data, setting, method, [trial], seeds, test=test)
    return {
        "name": _name(job),
        "asked": _asked(job),
        **running.told(trained),
        **running.ran(start),
    }


def _name(job: Job) -> str:
    setting, method, _, seeds, _ = job
    return f"{setting.name}--{method.name}--{seeds[0]}-{seeds[-1]}"


def _asked(job: Job) -> running.Result:
    """What decides the numbers of a cell."""
    setting, method, trial, seeds, test = job
    applied = {
        "name": method.name,
        "measure": repr(method.measure),
        "coefficient": method.coefficient,
        "share": repr(method.share),
        "share_limit": method.share_limit,
    }
    if method.keep is not None:  # came after most results
        applied["keep"] = method.keep
    return {
        "setting": running.described(setting),
        "method": applied,
        "trial": asdict(trial),
        "seeds": list(seeds),
        "test": test,
    }


def failures(errors: Sequence[float], without: Sequence[float]) -> int:
    """How many errors are above twice the largest without a penalty: these seeds have not trained."""
    return sum(error > 2 * max(without) for error in errors)


class Story:
    """Who is out, who is left, and in how many settings each candidate gained.

    Args:
        names: The candidates.
        safe: Those that may be chosen.

    Attributes:
        alive: The candidates that are left, in their order.
        out: Of each other one the setting in which it was worse, and by how much, twice.
        gains: In how many settings each was better by two standard errors.
        reduction: The sum over settings of the part of the error that each took away.
        settings: How many settings were looked at.
        ran: In how many of them each candidate was run.
    """

    def __init__(self, names: Sequence[str], safe: Collection[str]) -> None:
        self.alive = list(names)
        self.safe = safe
        self.out: dict[str, tuple[str, str]] = {}
        self.gains = dict.fromkeys(names, 0)
        self.reduction = dict.fromkeys(names, 0.0)
        self.settings = 0
        self.ran = dict.fromkeys(names, 0)

    def look(
        self,
        without: Sequence[float],
        errors: Mapping[str, Sequence[float]],
        broken: Mapping[str, int],
    ) -> tuple[list[str], list[str]]:
        """Note the errors of a setting; return who is worse, or fails on some seed, and who is in doubt.

        In doubt are safe candidates that are worse by one standard error.

        Args:
            without: Errors without a penalty.
            errors: Errors of the candidates.
            broken: How many of a candidate's seeds have weights that are not finite.
        """
        suspects, doubted = [], []
        self.settings += 1
        for name in self.alive:
            own = errors[name]
            change = paired(own, without)
            if change.worse or broken[name] or failures(own, without):
                suspects.append(name)
            elif name in self.safe and change.mean > change.error:
                doubted.append(name)
            if change.mean < -2 * change.error and change.error > 0:
                self.gains[name] += 1
            self.ran[name] += 1
            if any(without):  # else nothing is left to reduce
                self.reduction[name] -= change.mean / mean(without)
        return suspects, doubted

    def drop(self, name: str, setting: str, words: str) -> None:
        """Note that a candidate is out."""
        self.alive.remove(name)
        self.out[name] = setting, words

    def chosen(self) -> str | None:
        """The safe candidate of those left with the most gains, then the largest reduction; None if all are out."""
        safe = [name for name in self.alive if name in self.safe]
        if not safe:
            return None
        return max(safe, key=lambda name: (self.gains[name], self.reduction[name]))


def eliminate(
    study: Study,
    settings: Sequence[Setting],
    tuned: Mapping[Setting, Trial],
    methods: Sequence[Method],
    choosing: tuple[int, ...],
    again: tuple[int, ...],
) -> Story:
    """Go through the settings; a candidate that is worse on both sets of seeds is out.

    Of the safe ones that are left, those that were worse by one standard error are looked at again.
    """
    by_name = {method.name: method for method in methods}
    story = Story(list(by_name), {method.name for method in methods if is_safe(method)})
    decay = METHODS["decay"]
    doubts: list[tuple[Setting, str, list[str]]] = []
    start = time.monotonic()
    for number, setting in enumerate(settings, 1):
        trial = tuned[setting]
        names = list(story.alive)
        jobs: list[Job] = [(setting, decay, trial, choosing, False)]
        for name in names:
            jobs.append((setting, by_name[name], trial, choosing, False))
        without, *others = study.results(jobs)
        errors, broken = {}, {}
        for name, result in zip(names, others, strict=True):
            errors[name] = result["test_error"]
            broken[name] = result["nonfinite"]
        title = setting_title(without)
        suspects, doubted = story.look(without["test_error"], errors, broken)
        for name, words in bad_again(study, setting, trial, again, methods, suspects).items():
            story.drop(name, title, words)
        doubts.append((setting, title, doubted))
        gone = {name: story.out[name][1] for name in names if name not in story.alive}
        minutes = (time.monotonic() - start) / 60
        print(
            f"{number}/{len(settings)} {title}: {len(story.alive)} left, out {gone}, "
            f"{minutes:.1f} min",
            flush=True,
        )
    for setting, title, doubted in doubts:
        names = [name for name in doubted if name in story.alive]
        bad = bad_again(study, setting, tuned[setting], again, methods, names)
        for name, words in bad.items():
            story.drop(name, title, words)
        if names:
            print(f"again {title}: {names}, out {bad}", flush=True)
    return story


def bad_again(
    study: Study,
    setting: Setting,
    trial: Trial,
    again: tuple[int, ...],
    methods: Sequence[Method],
    names: Collection[str],
) -> dict[str, str]:
    """Which of some candidates are worse, or fail, on further seeds, too; by how much, in words."""
    chosen = [method for method in methods if method.name in names]
    if not chosen:
        return {}
    jobs: list[Job] = [(setting, METHODS["decay"], trial, again, False)]
    for method in chosen:
        jobs.append((setting, method, trial, again, False))
    baseline, *others = study.results(jobs)
    bad = {}
    for method, result in zip(chosen, others, strict=True):
        change = paired(result["test_error"], baseline["test_error"])
        failed = failures(result["test_error"], baseline["test_error"])
        if change.worse or result["nonfinite"] or failed:
            words = difference_cell(change)
            if failed:
                words += f", {failed} seeds fail"
            if result["nonfinite"]:
                words += f", {result['nonfinite']} not finite"
            bad[method.name] = words
    return bad


Reported = list[tuple[str, list[running.Result]]]
"""The settings, with the results without a penalty and with each of those that are reported."""


def reported_methods(story: Story) -> list[Method]:
    """No penalty, the chosen candidate, and coefficient 1 alone."""
    by_name = {method.name: method for method in candidates()}
    names = [name for name in (story.chosen(), "half-1-none") if name is not None]
    return [METHODS["decay"], *[by_name[name] for name in dict.fromkeys(names)]]


def controls(story: Story) -> list[Method]:
    """Those of the chosen candidate; none if none is chosen."""
    found = []
    for method in _chosen(story):
        found += controls_of(method)
    return found


def direction(story: Story) -> list[Method]:
    """That of the chosen candidate alone; none if none is chosen."""
    return [direction_of(method) for method in _chosen(story)]


def _chosen(story: Story) -> list[Method]:
    """The chosen candidate; none if all that may be chosen are out."""
    return [method for method in candidates() if method.name == story.chosen()]


def report(
    study: Study,
    settings: Sequence[Setting],
    tuned: Mapping[Setting, Trial],
    methods: Sequence[Method],
    seeds: tuple[int, ...],
) -> Reported:
    """Train on fresh seeds with each method, of which the first has no penalty."""
    found = []
    for number, setting in enumerate(settings, 1):
        jobs: list[Job] = []
        for method in methods:
            jobs.append((setting, method, tuned[setting], seeds, True))
        results = study.results(jobs)
        found.append((setting_title(results[0]), results))
        print(f"report {number}/{len(settings)}", flush=True)
    return found


def elimination_table(story: Story) -> str:
    """Every candidate: where it was out, or in how many settings it gained."""
    titles = {method.name: method.title for method in candidates()}
    rows = []
    for name, gains in story.gains.items():
        ran = story.ran[name]
        mean = 100 * story.reduction[name] / ran
        direction = "less" if mean >= 0 else "more"
        gained = f"{gains} gains, {abs(mean):.1f} % {direction} error in the mean of {ran} settings"
        fate = f"left: {gained}"
        if name not in story.safe:
            fate = f"left, but not safe elsewhere: {gained}"
        if name in story.out:
            setting, words = story.out[name]
            fate = f"out: {setting}, {words}; {gained}"
        if name == story.chosen():
            fate = f"**chosen**, {fate}"
        rows.append([titles[name], fate])
    return markdown(["candidate", f"in {story.settings} settings"], rows)


def report_table(story: Story, reported: Reported) -> str:
    """What came out on fresh seeds."""
    beside = [*controls(story), *direction(story)]
    titles = {method.name: method.title for method in [*candidates(), *beside]}
    names = [one["asked"]["method"]["name"] for one in reported[0][1][1:]]
    from_none = [Versus.of(reported, name, "decay") for name in names]
    from_controls = []
    for control in controls(story):
        if control.name in names:
            from_controls.append(Versus.of(reported, str(story.chosen()), control.name))
    head = ["setting", "none", *[titles[name] for name in names]]
    head += [f"chosen minus {titles[versus.baseline]}" for versus in from_controls]
    rows = []
    for i, (title, results) in enumerate(reported):
        row = [title, error_cell(results[0])]
        for versus in (*from_none, *from_controls):
            row.append(difference_cell(versus.changes[i]))
        rows.append(row)
    parts = [markdown(head, rows), legend(reported), counts(reported, from_none, titles)]
    if from_controls:
        parts.append(controlled(from_none[0], from_controls, titles, "The chosen candidate"))
    return "\n\n".join(parts)


def legend(reported: Reported) -> str:
    """What the numbers of a report are, and how long they took."""
    seeds = len(reported[0][1][0]["test_error"])
    seconds = 0.0
    for _, results in reported:
        seconds += sum(result["seconds"] for result in results)
    return (
        f"Test error in % over {seeds} seeds, mean (standard error); with a penalty the paired "
        f"difference in points (standard error). {seconds / 3600:.1f} core hours for this table."
    )


def counts(reported: Reported, from_none: Sequence[Versus], titles: Mapping[str, str]) -> str:
    """In how many settings each method is worse and better than no penalty, and by chance alone.

    Args:
        reported: The settings; after the result without a penalty come those of the methods.
        from_none: Each method against no penalty, in the same order.
        titles: Of the methods.
    """
    lines = []
    for place, versus in enumerate(from_none, 1):
        broken = sum(results[place]["nonfinite"] for _, results in reported)
        lines.append(f"{titles[versus.name]}: {versus.counted()}, {broken} runs not finite.")
    chance = len(reported) * beyond_two_errors(len(reported[0][1][0]["test_error"]))
    lines.append(
        f"Of a penalty that changes nothing {chance:.1f} settings would be worse by chance alone, "
        "and as many better."
    )
    return " ".join(lines)


@dataclass(frozen=True)
class Versus:
    """A method against another in all settings of a report, seed by seed.

    Args:
        name: Of the method.
        baseline: Name of the other.
        changes: Setting by setting, below 0 where the method is better.
    """

    name: str
    baseline: str
    changes: list[Paired]

    @classmethod
    def of(cls, reported: Reported, name: str, baseline: str) -> Versus:
        """Look both up in a report."""
        changes = []
        for _, results in reported:
            errors = {one["asked"]["method"]["name"]: one["test_error"] for one in results}
            changes.append(paired(errors[name], errors[baseline]))
        return cls(name, baseline, changes)

    def better(self) -> set[int]:
        """The settings, by number, in which the method is better by two standard errors."""
        found = set()
        for i, change in enumerate(self.changes):
            if change.mean < -2 * change.error and change.error > 0:
                found.add(i)
        return found

    def counted(self) -> str:
        """In how many settings the method is worse and better, in words."""
        corrected = holm([change.p for change in self.changes])
        gains = losses = 0
        for p, change in zip(corrected, self.changes, strict=True):
            gains += p < LEVEL and change.mean < 0
            losses += p < LEVEL and change.mean > 0
        worse = sum(change.worse for change in self.changes)
        return (
            f"worse by two standard errors in {worse} of {len(self.changes)} settings (in {losses} "
            f"after Holm's correction), better in {len(self.better())} ({gains})"
        )


def controlled(
    chosen: Versus, others: Sequence[Versus], titles: Mapping[str, str], called: str
) -> str:
    """What a candidate gains beyond its controls.

    Args:
        chosen: The candidate against no penalty.
        others: The candidate against each control.
        titles: Of the controls.
        called: The candidate, in words.
    """
    lines = []
    gains = stand = chosen.better()
    for versus in others:
        title = titles[versus.baseline]
        left = len(gains & versus.better())
        middle = median(change.mean for change in versus.changes)
        lines.append(
            f"{called} against {title}: {versus.counted()}, median {middle:+.2f} "
            f"points; of its {len(gains)} gains over none {left} are gains over {title}, too."
        )
        stand = stand & versus.better()
    p = [max(ps) for ps in zip(*[_ps(versus) for versus in (chosen, *others)], strict=True)]
    corrected = sum(one < LEVEL for one in holm(p))
    lines.append(
        f"**Better than none and than both controls: {len(stand)} of {len(chosen.changes)}** "
        f"({corrected} after Holm's correction of the largest of the three p's)."
    )
    return " ".join(lines)


def _ps(versus: Versus) -> list[float]:
    """By settings the p that the method is not better: 1 where its error is not lower."""
    return [change.p if change.mean < 0 else 1.0 for change in versus.changes]


if __name__ == "__main__":
    sys.exit(main())
