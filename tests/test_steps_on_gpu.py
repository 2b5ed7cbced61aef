"""What steps that compute ahead ask of a GPU, counted with tensors that only pretend to be on one."""

import pytest

from benchmarks.launches import (
    SHAPES,
    Steps,
    launches_of,
    pretending,
    quiet_logging_step,
    quiet_step,
    steps_ahead,
    told,
    waits_of,
)
from benchmarks.shapes import llama_7b
from tests.plain import HALF_SPACE

pytestmark = [
    pytest.mark.any_cpu,  # shapes without data
    pytest.mark.usefixtures("shipped_defaults"),
]

PLAIN = {"ResNet-50": 450, "GPT-2 small": 125, "ViT-B/16": 125}  # measured 251, 122 and 121
"""Ten of them compare the penalty's gradients with the task's."""


@pytest.mark.parametrize("name", PLAIN)
def test_the_steps_of_a_model(name):
    """A logging step is 1.40, 1.48 and 1.48 times a plain one."""
    plain, logging, quiet = steps_ahead(name, measure=HALF_SPACE)
    assert launches_of(plain) <= PLAIN[name], [one.calls for one in plain]
    assert waits_of(plain) == 0, [one.calls for one in plain]
    assert plain[0].flop == 0  # all arithmetic is done right after the step before
    assert launches_of(logging) <= 1.5 * launches_of(plain), [one.calls for one in logging]
    assert waits_of(logging) == 1, [one.calls for one in logging]
    # One a layer: the device alone knows by what factor each gradient is added.
    layers = len(SHAPES[name]())
    assert 0 < launches_of(quiet) <= 26 + layers, [one.calls for one in quiet]
    assert waits_of(quiet) == 0, [one.calls for one in quiet]
    # Where no layer is due a log takes no gradient: the first of its three products.
    quiet_logging = quiet_logging_step(name, measure=HALF_SPACE)
    most = 1.5 * launches_of(plain) + 2 * layers
    assert launches_of(quiet_logging) <= most, [one.calls for one in quiet_logging]
    assert waits_of(quiet_logging) == 1, [one.calls for one in quiet_logging]
    assert 0 < sum(one.flop for one in quiet_logging) <= 0.5 * plain[1].flop


@pytest.mark.parametrize("name", ["GPT-2 small", "ViT-B/16"])
def test_a_quiet_step_of_adamw_takes_layers_of_one_shape_together(name):
    """Its limit of rows is known on the device alone, so each is compared; one by one it is 1,740 and 2,676."""
    quiet = quiet_step(name, adaptive=True, measure=HALF_SPACE)
    assert 0 < launches_of(quiet) <= 175, [one.calls for one in quiet]  # measured 160 and 159
    assert waits_of(quiet) == 0, [one.calls for one in quiet]


@pytest.mark.parametrize(
    ("name", "quiet", "adaptive"),
    [("ResNet-50", 288, None), ("GPT-2 small", 258, 348), ("ViT-B/16", 388, 451)],
)
def test_by_default_four_launches_a_layer_follow_the_sum_of_its_neurons(name, quiet, adaptive):
    """In full space the pull along it changes even where no gradient is due."""
    plain, logging, found = steps_ahead(name)
    assert launches_of(plain) <= PLAIN[name], [one.calls for one in plain]
    assert launches_of(logging) <= 1.5 * launches_of(plain), [one.calls for one in logging]
    assert 0 < launches_of(found) <= quiet + 4, [one.calls for one in found]
    assert (waits_of(plain), waits_of(logging), waits_of(found)) == (0, 1, 0)
    if adaptive is not None:
        found = quiet_step(name, adaptive=True)
        assert 0 < launches_of(found) <= adaptive + 4, [one.calls for one in found]
        assert waits_of(found) == 0


@pytest.mark.slow
def test_the_steps_of_a_large_model(monkeypatch):
    """Half of its blocks, whose layers go in many batches, some of them several in one.

    A logging step is 1.4 times a plain one.
    """
    monkeypatch.setitem(SHAPES, "Llama-7B", lambda: llama_7b()[: 16 * 7])
    with told(), pretending():
        steps = Steps("Llama-7B")
        steps.step()  # the first one is looked at
        plain = steps.step()
        steps.step(logs=True)  # learns what is kept from then on
        logging = steps.step(logs=True)
    assert launches_of(plain) <= 2300  # 2260; the whole model, in larger batches, takes fewer
    assert waits_of(plain) == 0
    assert launches_of(logging) <= 1.5 * launches_of(plain), [one.calls for one in logging]
    assert waits_of(logging) == 1, [one.calls for one in logging]


def test_a_step_that_computes_all_layers_costs_few_launches_more_than_an_exact_one():
    """They keep the gradients, and learn of them: six a layer and some."""
    with told(), pretending():
        steps = Steps("GPT-2 small", tolerance=0.05, measure=HALF_SPACE)
        _, begun = steps.step()
        added, again = steps.step()
        assert len(steps.regularizer.state.deltas.computed) == 48
        _, following = steps.step()
    # Right after the step before. What a gradient tells of its age comes too late for the next one.
    assert (begun.flop > 0, added.flop, again.flop > 0, following.flop) == (True, 0, True, 0)
    assert begun.launches + added.launches <= 120 + 6 * 48 + 80, (begun.calls, added.calls)
