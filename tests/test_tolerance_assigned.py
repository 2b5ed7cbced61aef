"""A tolerance that is assigned later: between steps, between fits, and between a look ahead and a step."""

import copy
import math

import pytest
import torch
from torch.optim import SGD

from lightning_hsu import UniformityRegularizer
from lightning_hsu._engine import moves
from tests.models import Automatic, batches, loader, trainer, uniformity
from tests.test_tolerance import ALL, CASES, Run, difference, penalty_added

DATA = batches(8, dtype=torch.float64)
DATA_32 = batches(8)
CHANGES = [(None, 0.4), (0.4, None), (0.4, 0.1), (0.1, 0.4), (0.4, 0.4), (None, None)]


def go_on(run, steps):
    """The share of layers that these steps compute."""
    computed = 0
    for _ in range(steps):
        run.step(DATA[run.steps % 8])
        computed += len(run.computed)
    return computed / steps / len(run.regularizer.layers)


def twin_of(run, tolerance):
    """The same training with a new regularizer, as from a checkpoint."""
    twin = copy.copy(run)
    twin.net, twin.optimizer = copy.deepcopy((run.net, run.optimizer))
    ours = run.regularizer
    twin.regularizer = UniformityRegularizer(ours.measure, 0.05, tolerance=tolerance)
    state = copy.deepcopy(ours.state_dict())
    twin.regularizer.attach(twin.net).load_state_dict(state)
    return twin


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize(("first", "second"), CHANGES)
def test_a_training_goes_on_as_one_that_is_resumed(first, second, mode):
    """Bit for bit: with None it is the exact training."""
    run = Run(CASES["plain"], mode, first)
    go_on(run, 17)
    run.regularizer.tolerance = second
    assert run.regularizer.tolerance == second
    assert (run.regularizer.state.deltas.bytes() > 0) == (None not in (first, second))
    twin = twin_of(run, second)
    share = go_on(run, 24)
    assert share == go_on(twin, 24)
    assert difference(run.net, twin.net) == 0
    assert (share == 0) == (second is None)
    assert share < 0.6
    assert (run.regularizer.state.deltas.bytes() == 0) == (second is None)
    assert ("reuse" in run.regularizer.state_dict()) == (second is not None)


def test_a_smaller_tolerance_counts_at_once():
    run = Run(CASES["plain"], "gradient", 0.4)
    go_on(run, 33)
    run.regularizer.state.deltas.settle()  # what the last step has begun to tell
    reuse = run.regularizer.state.deltas.reuse
    before = {name: one.interval for name, one in reuse.items()}
    assert max(before.values()) > 4
    run.regularizer.tolerance = 0.04
    for name, one in reuse.items():
        assert one.interval == max(1, before[name] // 10)
    run.regularizer.tolerance = 0.4  # a larger one is grown into
    assert max(one.interval for one in reuse.values()) <= max(before.values()) / 10
    assert go_on(run, 40) < 0.5


def test_a_tolerance_that_is_assigned_at_every_step_still_saves_work():
    """As by a schedule."""
    shares = []
    for change in (0.0, 0.001):
        run = Run(CASES["plain"], "gradient", 0.4)
        for step, batch in enumerate(batches(40, dtype=torch.float64)):
            run.regularizer.tolerance = 0.4 + change * step
            run.step(batch)
        shares.append(run.regularizer.recomputed())
    assert max(shares) < 0.5


@pytest.mark.parametrize("wrong", [0, 1, 1.5, -0.1, math.nan, "0.1", True, torch.tensor(0.1)])
def test_what_is_no_tolerance_is_refused_and_changes_nothing(wrong):
    run = Run(CASES["plain"], "gradient", 0.4)
    go_on(run, 17)
    kept = run.regularizer.state.deltas.bytes()
    with pytest.raises(ValueError, match="tolerance must be a relative error above 0 and below 1"):
        run.regularizer.tolerance = wrong
    assert run.regularizer.tolerance == 0.4
    assert run.regularizer.state.deltas.bytes() == kept


def test_nothing_counts_as_recomputed_that_came_before_none():
    run = Run(CASES["plain"], "gradient", 0.4)
    go_on(run, 17)
    assert run.regularizer.recomputed(reset=False) < 0.9
    state = run.regularizer.state_dict()
    run.regularizer.tolerance = None
    other = Run(CASES["plain"], "gradient", None)
    other.regularizer.load_state_dict(state)
    for one in (run, other):
        assert math.isnan(one.regularizer.recomputed(reset=False))
        one.regularizer.tolerance = 0.4
        one.step(DATA[one.steps % 8])
        assert one.regularizer.recomputed(reset=False) == 1.0


def test_nothing_counts_as_recomputed_of_another_model():
    run = Run(CASES["plain"], "gradient", 0.4)
    go_on(run, 17)
    whole = run.regularizer.recomputed(reset=False)
    run.regularizer.attach(run.net)
    assert run.regularizer.recomputed(reset=False) == whole < 0.9
    run.regularizer.attach(copy.deepcopy(run.net))
    assert math.isnan(run.regularizer.recomputed(reset=False))


def test_a_callback_passes_it_on():
    ours = uniformity(tolerance=0.4)
    assert ours.tolerance == 0.4
    ours.tolerance = 0.1
    assert ours.tolerance == ours.regularizer.tolerance == 0.1
    with pytest.raises(ValueError, match="tolerance must be"):
        ours.tolerance = 5
    assert ours.tolerance == 0.1


def test_copies_and_new_trainings_have_it():
    regularizer = UniformityRegularizer(tolerance=0.4)
    regularizer.tolerance = 0.1
    assert copy.deepcopy(regularizer).tolerance == 0.1
    regularizer.reset()
    assert regularizer.tolerance == 0.1
    regularizer.tolerance = None
    regularizer.reset()
    assert regularizer.tolerance is None


def test_what_a_checkpoint_knows_counts_when_a_tolerance_comes_later():
    run = Run(CASES["plain"], "gradient", 0.4)
    go_on(run, 33)
    state = run.regularizer.state_dict()
    other = Run(CASES["plain"], "gradient", None)
    other.regularizer.load_state_dict(state)
    assert "reuse" not in other.regularizer.state_dict()
    other.regularizer.tolerance = 0.4
    assert other.regularizer.state_dict()["reuse"] == state["reuse"]


@pytest.mark.parametrize(("first", "second"), CHANGES)
def test_what_was_begun_before_is_right_after(first, second, monkeypatch):
    """As on a GPU, where a look ahead comes between the assignment and the step."""
    monkeypatch.setattr(moves, "reads_late", lambda x: True)
    runs = [Run(CASES["plain"], "gradient", first) for _ in range(2)]
    for step in range(40):
        for looks, run in enumerate(runs):
            run.step(DATA[step % 8])
            if looks:
                run.regularizer.look_ahead(run.optimizer)
            if step == 17:
                run.regularizer.tolerance = second
    assert difference(*(run.net for run in runs)) < 1e-14


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize(("first", "second"), CHANGES[:3])
def test_through_the_callback_between_fits(first, second, mode, tmp_path):
    ours = uniformity(coefficient=0.05, tolerance=first, apply=mode)
    module = Automatic(lambda parameters: SGD(parameters, lr=0.01, momentum=0.9))
    fit = trainer(ours, max_epochs=3, log_every_n_steps=1)
    fit.fit(module, loader(DATA_32))
    assert ("hsu/recomputed" in fit.callback_metrics) == (first is not None)
    ours.regularizer.tolerance = second
    again = trainer(ours, max_epochs=3, log_every_n_steps=1)
    again.fit(module, loader(DATA_32))
    assert ("hsu/recomputed" in again.callback_metrics) == (second is not None)
    assert ("reuse" in ours.state_dict()) == (second is not None)
    if second is not None:
        assert float(again.callback_metrics["hsu/recomputed"]) < 0.9


def test_the_penalty_is_fresh_once_nothing_is_kept():
    run = Run(CASES["plain"], "gradient", 0.4)
    run.regularizer.checks_order = False
    go_on(run, 17)
    run.regularizer.tolerance = None
    exact = UniformityRegularizer(run.regularizer.measure, 0.05).attach(run.net)
    exact.checks_order = False
    exact.state.heads = list(run.regularizer.state.heads)
    kept = penalty_added(run)
    run.regularizer = exact
    for name, grad in penalty_added(run).items():
        assert torch.equal(kept[name], grad)
