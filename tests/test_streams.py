"""Work beside the training on a GPU is in order, whichever stream comes first; no GPU is needed."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from benchmarks import launches
from lightning_hsu._core.tables import Tables
from lightning_hsu._engine import ahead
from lightning_hsu._monitor import on_gpu
from lightning_hsu.measures import GaussianPotential
from tests.streams import pretended_streams

pytestmark = pytest.mark.any_cpu  # shapes without data

SETTINGS = {
    "exact": {},
    "tolerance": {"tolerance": 0.05},
    "logarithm": {"measure": GaussianPotential()},
}


@contextmanager
def pretending():
    """Within the block tensors pretend to be on a device with streams; gives the queues."""
    reckoning = mock.patch.object(on_gpu, "uniformity_of_groups")  # which takes real numbers
    with launches.told(), reckoning, launches.pretending(), pretended_streams() as queues:
        with launches.Counting():  # which answers what the host waits for
            yield queues


def steps(monkeypatch, **settings):
    """A network on a device, after a step of its optimizer on the main stream."""
    shapes = [(64, 32), (64, 32), (300, 64), (20, 64)]
    monkeypatch.setitem(launches.SHAPES, "ViT-B/16", lambda: shapes)  # it has a head
    found = launches.Steps("ViT-B/16", **settings)
    optimizer_step(found)
    return found


def optimizer_step(found):
    torch._foreach_add_(found.optimizer.param_groups[0]["params"], 1e-3)


def look_at(settings):
    measure = launches.UniformityRegularizer(**settings).measure
    for one in (measure, measure.for_head()):
        launches.look_at(one)


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_plain_and_logging(name, monkeypatch):
    look_at(SETTINGS[name])
    with pretending() as queues:
        found = steps(monkeypatch, **SETTINGS[name])
        regularizer = found.regularizer
        for number in range(8):
            logs = regularizer.measures_next = number % 2 == 1
            regularizer.add_gradients(found.optimizer, stats=logs)
            optimizer_step(found)
            regularizer.look_ahead(found.optimizer)
            if logs:
                regularizer.measure_layers()
    assert queues.side_calls > 100
    assert not queues.complaints


@pytest.mark.parametrize("name", SETTINGS)
def test_tables_made_beside_the_training_are_read_in_it(name, monkeypatch):
    look_at(SETTINGS[name])
    with pretending() as queues:
        found = steps(monkeypatch, **SETTINGS[name])
        found.regularizer.look_ahead(found.optimizer)
        assert queues.side_calls > 50
        found.regularizer.measure_layers()  # of the same layers, on the main stream
    assert not queues.complaints


def test_disorder_is_seen(monkeypatch):
    """The same without the calls that put it in order."""
    look_at({})
    for owner, name in ((Tables, "read_here"), (ahead, "keep_for_side")):
        with monkeypatch.context() as patch, pretending() as queues:
            patch.setattr(owner, name, lambda *args: None)
            found = steps(monkeypatch)
            found.regularizer.look_ahead(found.optimizer)
            found.regularizer.measure_layers()
        assert queues.complaints
