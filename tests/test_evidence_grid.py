"""The grid that every method is tuned on, and the one rule by which it is widened."""

import itertools
import math

import pytest
import torch

from evidence.cells import lowest
from evidence.data import load
from evidence.grid import AXES, BEYOND, Grid, Trial, edges, values_of
from evidence.methods import METHODS
from evidence.plan import Cell, Setting

TINY = Setting("digits", 200, 2, held_out=200)
GRID = Grid((1.0, 2.0, 4.0, 8.0), (0.1, 1.0, 10.0, 100.0), (3.0, 9.0, 27.0, 81.0), 0.5)
PLAIN = Grid(GRID.rates, GRID.decays)


def trial(rate, decay, strength=0.0):
    return Trial(rate, decay, strength, strength * GRID.unit)


def test_the_first_sixteen_are_a_latin_square():
    first = GRID.first()
    assert len(first) == len(set(first)) == 16
    for one, other in itertools.combinations(AXES, 2):
        assert len({(getattr(trial, one), getattr(trial, other)) for trial in first}) == 16
    assert all(trial.coefficient == 0.5 * trial.strength for trial in first)
    assert {trial.strength for trial in PLAIN.first()} == {0.0}


def test_nothing_is_added_around_a_choice_inside():
    assert GRID.wider(GRID.first(), trial(2.0, 10.0, 27.0)) == []
    assert PLAIN.wider(PLAIN.first(), trial(4.0, 1.0)) == []


@pytest.mark.parametrize(
    ("axis", "value", "beyond"),
    [
        ("rate", 8.0, 16.0),
        ("rate", 1.0, 0.5),
        ("decay", 100.0, 1000.0),
        ("decay", 0.1, 0.01),
        ("strength", 81.0, 243.0),
        ("strength", 3.0, 1.0),
    ],
)
def test_the_next_value_meets_what_is_best_on_the_other_axes(axis, value, beyond):
    inside = {"rate": 2.0, "decay": 10.0, "strength": 9.0} | {axis: value}
    more = GRID.wider(GRID.first(), trial(**inside))
    assert len(more) == 4
    assert {getattr(one, axis) for one in more} == {beyond}
    assert trial(**inside | {axis: beyond}) in more
    for other in AXES:  # a Latin square again
        if other != axis:
            assert len({getattr(one, other) for one in more}) == 4


def test_two_edges_are_widened_at_once_and_alike_without_a_strength():
    more = GRID.wider(GRID.first(), trial(8.0, 100.0, 9.0))
    assert len(more) == 9
    assert more[-1] == trial(16.0, 1000.0, 9.0)
    more = PLAIN.wider(PLAIN.first(), trial(8.0, 0.1))
    assert [one.rate for one in more[:4]] == [16.0] * 4
    assert sorted(one.decay for one in more[:4]) == [0.1, 1.0, 10.0, 100.0]
    assert [one.decay for one in more[4:]] == [0.01] * 5
    assert more[-1] == trial(16.0, 0.01)
    tried = [*GRID.first(), trial(16.0, 1.0, 9.0)]
    more = GRID.wider(tried, trial(8.0, 100.0, 81.0))
    assert len(more) == len(set(more))


@pytest.mark.parametrize("up", [True, False])
def test_an_axis_ends_four_values_beyond(up):
    tried = PLAIN.first()
    for count in range(BEYOND + 1):
        rate = max(values_of(tried, "rate")) if up else min(values_of(tried, "rate"))
        expected = 8.0 * 2.0**count if up else 1.0 / 2.0**count
        assert math.isclose(rate, expected, rel_tol=1e-2)
        best = trial(rate, 1.0)
        more = PLAIN.wider(tried, best)
        assert len(more) == (4 if count < BEYOND else 0)
        tried += more
    assert edges(tried, best) == ["largest rate" if up else "smallest rate"]


def test_a_value_that_was_tried_elsewhere_is_tried_beside_the_best_one():
    tried = [*GRID.first(), trial(16.0, 1.0, 27.0)]
    best = trial(8.0, 10.0, 9.0)
    assert GRID.wider(tried, best) == [trial(16.0, 10.0, 9.0)]
    assert GRID.wider([*tried, trial(16.0, 10.0, 9.0)], best) == []


def test_windows_follow_the_best_along_a_long_axis():
    tried = [*GRID.first(), trial(16.0, 1.0, 9.0), trial(32.0, 1.0, 9.0)]
    more = GRID.wider(tried, trial(16.0, 100.0, 9.0))
    assert sorted({one.rate for one in more}) == [4.0, 8.0, 16.0, 32.0]


def test_of_equal_trials_the_strongest_is_taken_only_where_none_trains():
    trials = [
        trial(1.0, 0.1, 3.0),
        trial(2.0, 1.0, 9.0),
        trial(1.0, 1.0, 9.0),
        trial(2.0, 0.1, 9.0),
    ]
    assert lowest(trials, torch.full((4, 3), 90.0)) == trials[3]
    assert lowest(trials, torch.tensor([[90.0], [90.0], [89.0], [90.0]])) == trials[2]
    assert lowest(trials, torch.tensor([[4.0], [3.0], [3.0], [3.0]])) == trials[1]


def test_edges_are_flagged():
    trials = Cell(TINY, METHODS["half_mhe_2"]).trials(load("digits"))
    assert edges(trials, trials[0]) == [
        "smallest rate",
        "smallest decay",
        "smallest strength",
    ]
    assert edges(trials, trials[5]) == []
    assert edges(trials, trials[7]) == ["largest decay", "smallest strength"]
