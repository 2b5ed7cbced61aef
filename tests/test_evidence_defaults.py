"""How defaults are chosen: adapters and fine-tuning as said, and who is out of the candidates."""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from evidence import cells as running
from evidence import defaults, training
from evidence.comparisons import LEVEL
from evidence.data import load
from evidence.defaults import (
    CHOOSING,
    candidates,
    controls_of,
    direction_of,
    eliminate,
    in_order,
)
from evidence.documents import unpack
from evidence.files import read
from evidence.grid import Trial
from evidence.methods import METHODS
from evidence.networks import Architecture, Networks
from evidence.plan import SETTINGS, Setting, cells
from evidence.statistics import holm, paired
from evidence.training import train
from lightning_hsu.measures.defaults import COEFFICIENT, DEFAULT_MEASURE, SHARE_LIMIT
from tests.pages import in_one_line
from tests.test_evidence import wait_for

ROOT = Path(__file__).parents[1]
TINY = Setting("digits", 200, 2, held_out=200)
OTHER = replace(TINY, scale=0.1)
TRIAL = Trial(0.16, 0.01)
LIMITED = next(one for one in candidates() if one.name == "half-1-0.1")
RANDOM, GROWTH = controls_of(LIMITED)
TURNS = direction_of(LIMITED)

# For float64, as in test_evidence.py.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def digits():
    data = load("digits")
    dtype = torch.get_default_dtype()
    pool = data.pool[0].to(dtype), data.pool[1]
    return replace(data, pool=pool, test=(data.test[0].to(dtype), data.test[1]))


def train_and_keep(monkeypatch, *args):
    """Train; return the networks, and a copy from before the training proper."""
    begun = []
    penalties = training._penalties

    def recorded(networks, *rest):
        begun.append((networks, deepcopy(networks)))
        return penalties(networks, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_penalties", recorded)
        train(digits(), *args, test=False)
    return begun[0]


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("apart", [False, True])
def test_adapters_begin_as_the_base_network(apart):
    networks = Networks(Architecture((1, 8, 8), 10), 2, (3, 4), apart=apart)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    before = networks(x)
    networks.add_adapters((3, 4), apart=apart)
    assert torch.allclose(networks(x), before, **CLOSE)
    assert all(side.joined("weight").abs().max() > 0 for side in networks.down)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_factors_and_head_move_and_nothing_else(optimizer, monkeypatch):
    setting = replace(TINY, start="adapters", optimizer=optimizer)
    trial = Trial(0.01, 0.1)
    networks, begun = train_and_keep(monkeypatch, setting, LIMITED, [trial], (1, 2))
    before = dict(begun.named_parameters())
    for name, value in networks.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("hidden."), name


@pytest.mark.usefixtures("_double")
@pytest.mark.filterwarnings("ignore:the penalty is too strong")  # so that growth is not missed
@pytest.mark.parametrize("keep", [None, "length"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("network", ["plain", "convolutions"])
def test_a_seed_trains_with_a_share_limit_as_alone(network, optimizer, keep, monkeypatch):
    method = LIMITED
    if keep == "length":
        method = replace(GROWTH, share_limit=100.0)  # a limit of 0.1 leaves hardly any growth
    setting = replace(TINY, network=network, optimizer=optimizer, scale=0.1)
    trial = Trial(0.05 if optimizer == "sgd" else 3e-3, 1e-3)
    many, _ = train_and_keep(monkeypatch, setting, method, [trial], (3, 4))
    alone, _ = train_and_keep(monkeypatch, setting, method, [trial], (4,))
    without, _ = train_and_keep(monkeypatch, setting, METHODS["decay"], [trial], (4,))
    for ours, theirs, plain in zip(
        (*many.hidden, many.head),
        (*alone.hidden, alone.head),
        (*without.hidden, without.head),
        strict=True,
    ):
        own, other = ours.joined("weight")[1], theirs.joined("weight")[0]
        assert torch.allclose(own, other, **CLOSE)
        assert (own - plain.joined("weight")[0]).abs().max() > 1e-5  # the penalty is there


def penalty_gradients(networks, setting, method):
    """What a penalty adds to the gradients of each weight, after a first step's loss."""
    optimizer = training.optimizer_of(networks, setting, [TRIAL])
    images = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
    optimizer.zero_grad()
    training.loss_of(networks(images), torch.arange(50).remainder(10).expand(2, 50)).backward()
    weights = [p for name, p in networks.named_parameters() if p.requires_grad and "weight" in name]
    before = [weight.grad.clone() for weight in weights]
    for penalty in training._penalties(networks, setting, method, [TRIAL]):
        penalty.add_gradients(optimizer)
    return [(weight, weight.grad - task) for weight, task in zip(weights, before, strict=True)]


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize(
    ("network", "start"), [("plain", "fresh"), ("plain", "adapters"), ("convolutions", "fresh")]
)
def test_random_directions_are_limited_as_the_gradient_is(network, start):
    setting = replace(TINY, network=network, start=start)
    networks = Networks(setting.architecture(digits()), 1, (3, 4), apart=True)
    if start == "adapters":
        networks.add_adapters((3, 4), apart=True)
        with torch.no_grad():
            for factor in (piece for side in networks.up for piece in side):
                factor.weight.normal_()
    torch.manual_seed(0)
    real = penalty_gradients(networks, setting, LIMITED)
    random = penalty_gradients(networks, setting, RANDOM)
    for (weight, gradient), (_, noise) in zip(real, random, strict=True):
        neurons, gradient, noise = weight.flatten(2), gradient.flatten(2), noise.flatten(2)
        norms = noise.norm(dim=-1)
        assert torch.allclose(norms, gradient.norm(dim=-1), rtol=1e-6)
        assert norms.max() > 1e-6
        along = (noise * neurons).sum(-1) / (norms * neurons.norm(dim=-1))
        assert along.nan_to_num().abs().max() < 1e-6
        same = (noise * gradient).sum() / (noise.norm() * gradient.norm())
        assert abs(same) < 0.6


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("start", ["trained", "adapters"])
def test_all_methods_begin_with_the_same_trained_networks(start, monkeypatch):
    setting = replace(TINY, start=start)
    fresh = Networks(setting.architecture(digits()), 1, (1, 2))
    _, ones = train_and_keep(monkeypatch, setting, LIMITED, [TRIAL], (1, 2))
    _, others = train_and_keep(monkeypatch, setting, METHODS["decay"], [TRIAL], (1, 2))
    own_sides = (*ones.hidden, *ones.down, *ones.up, ones.head)
    other_sides = (*others.hidden, *others.down, *others.up, others.head)
    for own, other in zip(own_sides, other_sides, strict=True):
        assert torch.allclose(own.joined("weight"), other.joined("weight"), **CLOSE)
    assert torch.allclose(others.head.joined("bias"), fresh.head.joined("bias"), **CLOSE)
    assert torch.allclose(others.head.joined("weight"), fresh.head.joined("weight"), **CLOSE)
    moved = others.hidden[0].joined("weight") - fresh.hidden[0].joined("weight")
    assert moved.abs().max() > 1e-3
    assert len(others.down) == (2 if start == "adapters" else 0)


def test_candidates_and_settings_have_names_of_their_own():
    names = [one.name for one in candidates()]
    assert len(names) == len(set(names)) == 34
    settings = [one.name for one in in_order()]
    assert len(settings) == len(set(settings)) == 48 + len(defaults.EXTRA)
    assert set(in_order()) == {*SETTINGS, *defaults.EXTRA}


def test_committed_results_are_asked_as_ever(monkeypatch):
    shapes = {"digits": (1, 8, 8), "mnist1d": (1, 1, 40), "fashion-mnist": (1, 28, 28)}
    monkeypatch.setattr(
        running, "_load", lambda name: SimpleNamespace(shape=shapes[name], classes=10)
    )
    committed = json.loads((ROOT / "evidence/results/first/cells.json").read_text())
    by_name = {one["name"]: one["asked"] for one in committed}
    planned = {cell.name: cell for cell in cells()}
    # The default, the probe and kept gradients start from the first run's tuning of these two.
    for setting, method in product(SETTINGS, ("decay", "half_mhe_2")):
        name = f"{setting.name}--{method}"
        asked = by_name[name]
        wanted = running.asked(planned[name], asked["tuning"], asked["testing"])
        wanted = json.loads(json.dumps(wanted))
        for later in ("beyond", "not finite", "of equal ones", "matched"):  # of the second
            del wanted[later]
        del wanted["method"]["keep"]
        # A coefficient is computed in float32, whose rounding differs between machines.
        for now, then in zip(wanted.pop("trials"), asked.pop("trials"), strict=True):
            assert now == pytest.approx(then, rel=1e-6), name
        assert wanted == asked, name


@pytest.fixture
def committed(monkeypatch, tmp_path):
    """The story that the committed cells tell, and what they report."""
    shapes = {"digits": (1, 8, 8), "mnist1d": (1, 1, 40), "fashion-mnist": (1, 28, 28)}
    monkeypatch.setattr(
        running, "_load", lambda name: SimpleNamespace(shape=shapes[name], classes=10)
    )
    for one in json.loads((defaults.RESULTS / "cells.json").read_text()):
        running.save(one, tmp_path)
    study = defaults.Study(tmp_path, jobs=1, end=-math.inf)  # what is missing is not run
    settings = in_order()
    tuned = {setting: study.tuned(setting, quick=False) for setting in settings}
    story = eliminate(study, settings, tuned, candidates(), CHOOSING, defaults.AGAIN)
    methods = [*defaults.reported_methods(story), *defaults.controls(story)]
    methods += defaults.direction(story)
    return story, defaults.report(study, settings, tuned, methods, defaults.FRESH)


def test_committed_results_choose_the_default(committed):
    """The evidence's README has what the committed cells give, and the package the candidate that they choose."""
    story, reported = committed
    readme = defaults.README.read_text()
    assert defaults.elimination_table(story) in readme
    assert defaults.report_table(story, reported) in readme
    chosen = next(one for one in candidates() if one.name == story.chosen())
    assert (chosen.measure, chosen.coefficient) == (DEFAULT_MEASURE, COEFFICIENT)
    assert (chosen.share_limit, chosen.share) == (SHARE_LIMIT, None)


def summed_up(reported, place):
    """What is said of a method: counts, the part of the error that it takes away, medians and the worst change.

    Args:
        reported: The settings, with the results of each method.
        place: Place of the method's result.
    """
    changes, parts, at_scale_1 = [], [], []
    for _, results in reported:
        without, own = results[0]["test_error"], results[place]["test_error"]
        change = paired(own, without)
        changes.append(change)
        parts.append(-100 * change.mean / mean(without))
        setting = results[0]["asked"]["setting"]
        if setting["scale"] == 1.0:
            at_scale_1.append(change.mean)
    better = worse = corrected = 0
    for change, p in zip(changes, holm([change.p for change in changes]), strict=True):
        better += change.error > 0 and change.mean < -2 * change.error
        worse += change.worse
        corrected += p < LEVEL and change.mean < 0
    largest = max(changes, key=lambda change: change.mean)
    return SimpleNamespace(
        better=better,
        worse=worse,
        corrected=corrected,
        part=f"{mean(parts):.1f} %",
        median=f"{median(change.mean for change in changes):.1f}".replace("-", "−"),
        at_scale_1=f"{median(at_scale_1):.1f}".replace("-", "−"),
        largest=f"{largest.mean:+.2f} points, standard error {largest.error:.2f}",
    )


def test_the_readmes_say_what_is_left_beyond_the_controls(committed):
    story, reported = committed
    name = story.chosen()
    versus = [defaults.Versus.of(reported, name, "decay")]
    for control in defaults.controls(story):
        versus.append(defaults.Versus.of(reported, name, control.name))
    gains, random, growth = [one.better() for one in versus]
    assert not any(change.worse for one in versus for change in one.changes)
    stand = gains & random & growth
    p = [defaults._ps(one) for one in versus]
    corrected = sum(one < LEVEL for one in holm([max(ps) for ps in zip(*p, strict=True)]))
    at_scale_1 = set()
    for i, (_, results) in enumerate(reported):
        if results[0]["asked"]["setting"]["scale"] == 1.0:
            at_scale_1.add(i)
    page = in_one_line("docs/evidence.md")
    assert (
        f"{len(stand)} of the {len(gains)} gains are also gains over a random direction of the same "
        f"length and over growth alone ({corrected} after Holm's correction)"
    ) in page
    main = in_one_line("README.md")
    assert (
        f"{len(gains & random)} of the {len(gains)} gains are gains over a random direction of the "
        f"same length, too, {len(gains & growth)} over the growth that the penalty brings, without "
        f"its turns, and {len(stand)} ({corrected} after Holm's correction) over both"
    ) in main
    own = in_one_line("evidence/README.md")
    assert f"{len(stand)} of the {len(gains)} gains stand against both controls" in own
    left = len(stand & at_scale_1)
    assert f"initial scale {left} of {len(gains & at_scale_1)} stand" in own
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"{len(gains)} gains {len(stand)} are also gains over a random direction" in changes


def test_readme_and_docs_say_what_the_committed_cells_give(committed):
    story, reported = committed
    default, former = summed_up(reported, 1), summed_up(reported, 2)
    gains = story.gains
    chosen = gains[story.chosen()]
    assert default.worse == 0
    sentences = [
        f"from {len(gains)} candidates in {len(reported)} settings",
        f"in {default.better} of the {len(reported)} (in {default.corrected} after Holm's correction) "
        "and **worse in none**",
        f"is {default.median} points, {default.at_scale_1} at PyTorch's own initial scale",
        f"({gains['full-0.1-0.1']} and {gains['half-0.1-0.1']}, against {chosen} on the seeds",
        f"had {gains['full-1-0.3']} and {gains['full-1-none']} and was left out",
        f"was better in {former.better}, {former.corrected} after Holm, takes away more of the error "
        f"({former.part} in the mean of the settings, the default {default.part}), and was worse in "
        f"{former.worse}.",
    ]
    said = in_one_line("README.md")
    for sentence in sentences:
        assert sentence in said
    page = in_one_line("docs/evidence.md")
    assert (
        f"in none of {len(reported)} settings (worst: {default.largest}) and gained in "
        f"{default.better} of them, {default.corrected} after Holm's correction"
    ) in page
    assert {"full-0.1-0.1", "half-0.1-0.1", "full-1-0.3", "full-share0.02"} <= set(story.alive)
    lower = {"full-1-0.1", "full-1-0.05", "full-0.3-0.1", "full-0.3-0.05", "full-share0.05"}
    assert lower <= story.out.keys()


class MadeUp:
    """A study with made-up errors: 10 to 12 % without a penalty.

    Args:
        changes: By candidate, setting's scale and first seed, what is added to the errors, and how
            many seeds are not finite.
    """

    def __init__(self, changes):
        self.changes = changes
        self.run = []

    def results(self, jobs):
        found = []
        for job in jobs:
            setting, method, _trial, seeds, _test = job
            self.run.append((method.name, setting.scale, seeds[0]))
            added, nonfinite = self.changes.get(self.run[-1], ([0.0, 0.0, 0.0], 0))
            errors = [error + more for error, more in zip((10.0, 11.0, 12.0), added, strict=True)]
            found.append(
                {
                    "name": defaults._name(job),
                    "asked": defaults._asked(job),
                    "test_error": errors,
                    "nonfinite": nonfinite,
                    "seconds": 1.0,
                }
            )
        return found


WORSE = [1.0, 1.1, 1.2], 0
BETTER = [-1.0, -1.1, -1.2], 0
FAILING = [0.0, 0.0, 40.0], 0
BROKEN = [0.0, 0.0, 0.0], 1
FIRST, AGAIN = 1000, 1010
NAMES = ("half-1-none", "half-1-0.1", "full-1-0.1")


def story_of(changes, names=NAMES):
    study = MadeUp(changes)
    methods = [one for one in candidates() if one.name in names]
    settings = [TINY, OTHER]
    tuned = dict.fromkeys(settings, TRIAL)
    again = defaults.AGAIN[:3]
    return study, eliminate(study, settings, tuned, methods, CHOOSING[:3], again)


@pytest.mark.parametrize("bad", [WORSE, FAILING, BROKEN])
def test_bad_once_stays_and_bad_twice_is_out(bad):
    once = {("half-1-none", 1.0, FIRST): bad}
    study, story = story_of(once)
    assert ("half-1-none", 1.0, AGAIN) in study.run
    assert ("half-1-none", 0.1, FIRST) in study.run
    assert not story.out
    study, story = story_of({**once, ("half-1-none", 1.0, AGAIN): bad})
    assert list(story.out) == ["half-1-none"]
    assert "half-1-none" not in story.alive
    assert ("half-1-none", 0.1, FIRST) not in study.run
    assert ("half-1-0.1", 0.1, FIRST) in study.run
    assert (story.ran["half-1-none"], story.ran["half-1-0.1"]) == (1, 2)


def test_gains_choose_then_reductions_then_the_order():
    _, story = story_of({})
    assert story.chosen() == "half-1-0.1"
    _, story = story_of({("full-1-0.1", 0.1, FIRST): BETTER})
    assert (story.chosen(), story.gains["full-1-0.1"]) == ("full-1-0.1", 1)
    more = [-2.0, -2.1, -2.2], 0
    changes = {("full-1-0.1", 0.1, FIRST): BETTER, ("half-1-0.1", 1.0, FIRST): more}
    assert story_of(changes)[1].chosen() == "half-1-0.1"


def test_safe_ones_that_were_a_little_worse_are_looked_at_again():
    doubtful = [-1.0, 1.0, 1.5], 0  # 0.5, with a standard error of 0.76
    little = [0.2, 0.1, 1.0], 0  # 0.43, with one of 0.28
    for added, is_asked in ((doubtful, False), (little, True)):
        changes = {(name, 0.1, FIRST): added for name in NAMES}
        changes |= {(name, 0.1, AGAIN): WORSE for name in NAMES}
        study, story = story_of(changes)
        asked = {name for name, scale, first in study.run if (scale, first) == (0.1, AGAIN)}
        safe = set(NAMES[1:])
        assert asked == (safe | {"decay"} if is_asked else set())
        assert set(story.out) == (safe if is_asked else set())


@pytest.mark.parametrize("name", ["half-1-none", "half-1-0.3"])
def test_what_is_lost_in_other_tasks_is_not_chosen(name):
    _, story = story_of({(name, 1.0, FIRST): BETTER}, names=(name, "half-1-0.1", "half-share0.02"))
    assert (story.chosen(), story.gains[name]) == ("half-1-0.1", 1)
    assert "left, but not safe elsewhere: 1 gains" in defaults.elimination_table(story)
    assert story_of({}, names=(name, "half-share0.02"))[1].chosen() == "half-share0.02"
    assert story_of({}, names=(name,))[1].chosen() is None


@pytest.mark.parametrize("left", [True, False])
def test_tables(left):
    changes = {}
    for name in NAMES[: 2 if left else 3]:
        changes[name, 1.0, FIRST] = changes[name, 1.0, AGAIN] = WORSE
    changes["full-1-0.1", 0.1, FIRST] = BETTER
    changes["full-1-0.1", 0.1, defaults.FRESH[0]] = BETTER
    study, story = story_of(changes)
    assert story.chosen() == ("full-1-0.1" if left else None)
    settings = [TINY, OTHER]
    tuned = dict.fromkeys(settings, TRIAL)
    methods = defaults.reported_methods(story)
    reported = defaults.report(study, settings, tuned, methods, defaults.FRESH[:3])
    reported_names = [one["asked"]["method"]["name"] for one in reported[0][1]]
    assert reported_names == ["decay", *(["full-1-0.1"] if left else []), "half-1-none"]
    table = defaults.elimination_table(story)
    assert ("**chosen**" in table) == left
    assert "+1.10 (0.06); 0 gains, 10.0 % more error in the mean of 1 settings" in table
    said = defaults.report_table(story, reported)
    assert "Test error in % over 3 seeds" in said
    none_worse = "worse by two standard errors in 0 of 2 settings (in 0 after Holm's correction), "
    assert (f"share limit 0.1: {none_worse}better in 1 (1), 0 runs" in said) == left
    assert f"share limit None: {none_worse}better in 0 (0), 0 runs" in said
    chance = 2 * (0.5 - 1 / 6**0.5)  # Student's t with 2 degrees of freedom beyond 2
    assert f"changes nothing {chance:.1f} settings would be worse by chance" in said


GAINS = [-1.0, -1.1, -1.2]


@pytest.mark.parametrize("control", ["random", "length"])
def test_gains_that_a_control_has_too_do_not_stand(control):
    """In one setting nothing else gains; in the other a control gains, or is better, or worse."""
    fresh = defaults.FRESH[0]
    chosen = "full-1-0.1"
    other = {"random": "length", "length": "random"}[control]
    titles = {"random": "random direction", "length": "growth alone"}
    gains = {
        (chosen, 0.1, FIRST): BETTER,
        (chosen, 1.0, fresh): (GAINS, 0),
        (chosen, 0.1, fresh): (GAINS, 0),
    }

    def said(changes):
        study, story = story_of(gains | changes)
        settings = [TINY, OTHER]
        methods = [*defaults.reported_methods(story), *defaults.controls(story)]
        methods += defaults.direction(story)
        tuned = dict.fromkeys(settings, TRIAL)
        reported = defaults.report(study, settings, tuned, methods, defaults.FRESH[:3])
        return defaults.report_table(story, reported)

    def against(name, counts, stand, middle):
        title = titles[name]
        return (
            f"The chosen candidate against {title}: {counts}, median {middle} points; of its 2 "
            f"gains over none {stand} are gains over {title}, too."
        )

    none = "in 0 of 2 settings (in 0 after Holm's correction)"
    all_better = f"worse by two standard errors {none}, better in 2 (2)"
    text = said({})
    assert against(control, all_better, 2, "-1.10") in text
    assert "than both controls: 2 of 2** (2 after Holm's" in text
    assert f"| chosen minus {titles[control]} |" in text
    assert "direction alone: " in text  # against none, and no rival of the chosen one
    assert "minus direction alone" not in text
    assert "against direction alone" not in text

    name = f"{chosen}-{control}"
    half = f"worse by two standard errors {none}, better in 1 (1)"
    text = said({(name, 1.0, fresh): (GAINS, 0)})
    assert against(control, half, 1, "-0.55") in text
    assert against(other, all_better, 2, "-1.10") in text
    assert "than both controls: 1 of 2** (1 after Holm's" in text
    assert f"{titles[control]}: {half}, 0 runs" in text

    text = said({(name, 1.0, fresh): ([-3.0, -3.2, -3.4], 1)})
    mixed = (
        "worse by two standard errors in 1 of 2 settings (in 1 after Holm's correction), "
        "better in 1 (1)"
    )
    assert against(control, mixed, 1, "+0.50") in text
    assert f"{titles[control]}: {half}, 1 runs" in text


def test_a_better_candidate_that_is_worse_than_none_does_not_stand():
    """A control may be so bad that the candidate is better than it and gains nothing."""
    bad = ([1.0, 1.1, 1.2], 0)
    worse = ([3.0, 3.1, 3.2], 0)
    fresh = defaults.FRESH[0]
    changes = {("full-1-0.1", 0.1, FIRST): BETTER}
    for scale in (1.0, 0.1):
        changes["full-1-0.1", scale, fresh] = bad
        for control in ("random", "length"):
            changes[f"full-1-0.1-{control}", scale, fresh] = worse
    study, story = story_of(changes)
    methods = [*defaults.reported_methods(story), *defaults.controls(story)]
    tuned = dict.fromkeys([TINY, OTHER], TRIAL)
    reported = defaults.report(study, [TINY, OTHER], tuned, methods, defaults.FRESH[:3])
    said = defaults.report_table(story, reported)
    assert "of its 0 gains over none 0 are" in said
    assert "than both controls: 0 of 2** (0 after Holm's" in said


def test_committed_cells_are_laid_beside_those_that_are_there(tmp_path):
    committed = json.loads((defaults.RESULTS / "cells.json").read_text())
    own = {**committed[0], "seconds": -1.0}
    running.save(own, tmp_path)
    unpack(defaults.RESULTS / "cells.json", tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == len(committed)
    assert read(tmp_path / f"{own['name']}.json") == own
    last = committed[-1]
    assert read(tmp_path / f"{last['name']}.json") == last


def test_controls_are_asked_as_their_candidate_but_for_what_they_keep():
    asked = [
        defaults._asked((TINY, one, TRIAL, (1, 2), True))["method"]
        for one in (LIMITED, RANDOM, GROWTH, TURNS)
    ]
    whole, random, growth, turns = asked
    assert "keep" not in whole
    measure = f"RandomDirection(measure={whole['measure']})"
    assert random == {**whole, "name": RANDOM.name, "measure": measure}
    assert growth == {**whole, "name": GROWTH.name, "keep": "length"}
    assert turns == {**whole, "name": TURNS.name, "keep": "direction"}


@pytest.mark.filterwarnings("ignore:.*starts at zero")
def test_goes_on_from_its_cells(tmp_path, monkeypatch, capsys):
    run = Mock(wraps=defaults.run)
    monkeypatch.setattr(defaults, "run", run)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of all tests after this
    arguments = ["--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["evidence.defaults", *arguments])
    assert defaults.main() == 0
    first = capsys.readouterr().out
    count = run.call_count
    assert count == len(list((tmp_path / "cells").glob("*.json"))) >= 5
    assert defaults.main() == 0
    assert run.call_count == count
    tables = "| candidate |"
    again = capsys.readouterr().out
    assert again[again.index(tables) :] == first[first.index(tables) :]


def test_cells_beside_each_other_are_saved_as_they_end_and_none_begins_out_of_time(
    tmp_path, monkeypatch
):
    setting = Setting("digits", 200, 1)
    jobs = [(setting, METHODS["decay"], Trial(0.1, 0.01), (seed,), True) for seed in range(4)]
    monkeypatch.setattr(defaults, "_name", lambda job: f"cell-{job[3][0]}")
    monkeypatch.setattr(defaults, "_asked", lambda job: {"seed": job[3][0]})
    study = defaults.Study(tmp_path, jobs=2, end=math.inf)
    futures, begun = [], []

    class Pool(ThreadPoolExecutor):
        def submit(self, *what):
            futures.append(super().submit(*what))
            return futures[-1]

    def run(job):
        (seed,) = job[3]
        begun.append(seed)
        study._end = -math.inf
        if seed == 1:
            wait_for(lambda: len(futures) == 4 and futures[3].cancelled())
        return {"name": f"cell-{seed}", "asked": {"seed": seed}, "test_error": [1.0]}

    monkeypatch.setattr(defaults, "run", run)
    monkeypatch.setattr(defaults, "ProcessPoolExecutor", lambda *_: Pool(1))
    with pytest.raises(defaults.OutOfTimeError):
        study.results(jobs)
    saved = {path.stem for path in tmp_path.glob("*.json")}
    assert saved == {f"cell-{seed}" for seed in begun}
    assert begun in ([0], [0, 1])


def test_the_list_trains_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evidence.defaults", "--list"])
    monkeypatch.setattr(defaults, "run", lambda job: pytest.fail("trained"))
    assert defaults.main() == 0
    said = capsys.readouterr().out
    assert "half space, coefficient 1, share limit 0.1" in said
    assert "56 settings x (34 candidates and none): 1960 cells" in said
