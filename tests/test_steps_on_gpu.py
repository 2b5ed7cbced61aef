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

pytestmark = [
    pytest.mark.any_cpu,  # shapes without data
    pytest.mark.usefixtures("shipped_defaults"),
]

PLAIN = {"ResNet-50": 450, "GPT-2 small": 125, "ViT-B/16": 125}  # measured 246, 122 and 116
"""Ten of them compare the penalty's gradients with the task's."""


@pytest.mark.parametrize("name", PLAIN)
def test_the_steps_of_a_model(name):
    """A logging step is 1.40, 1.48 and 1.48 times a plain one."""
    plain, logging, quiet = steps_ahead(name)
    assert launches_of(plain) <= PLAIN[name], [one.calls for one in plain]
    assert waits_of(plain) == 0, [one.calls for one in plain]
    assert plain[0].flop == 0  # all arithmetic is done right after the step before
    assert launches_of(logging) <= 1.5 * launches_of(plain), [one.calls for one in logging]
    assert waits_of(logging) == 1, [one.calls for one in logging]
    # One a layer: the device alone knows by what factor each gradient is added. Four follow its sum.
    layers = len(SHAPES[name]())
    assert 0 < launches_of(quiet) <= 26 + 5 * layers, [one.calls for one in quiet]
    assert waits_of(quiet) == 0, [one.calls for one in quiet]
    # Where no layer is due a log takes no gradient: the first of its three products.
    quiet_logging = quiet_logging_step(name)
    most = 1.5 * launches_of(plain) + 6 * layers
    assert launches_of(quiet_logging) <= most, [one.calls for one in quiet_logging]
    assert waits_of(quiet_logging) == 1, [one.calls for one in quiet_logging]
    assert 0 < sum(one.flop for one in quiet_logging) <= 0.5 * plain[1].flop


@pytest.mark.parametrize(("name", "most"), [("GPT-2 small", 350), ("ViT-B/16", 455)])
def test_a_quiet_step_of_adamw_takes_layers_of_one_shape_together(name, most):
    """Its limit of rows is known on the device alone, so each is compared; one by one it is 1,740 and 2,676, in half space."""
    quiet = quiet_step(name, adaptive=True)
    assert 0 < launches_of(quiet) <= most, [one.calls for one in quiet]  # measured 348 and 451
    assert waits_of(quiet) == 0, [one.calls for one in quiet]


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
    """They keep the gradients, and learn of them: eighteen a layer and some."""
    with told(), pretending():
        steps = Steps("GPT-2 small", tolerance=0.05)
        _, begun = steps.step()
        added, again = steps.step()
        assert len(steps.regularizer.state.deltas.computed) == 48
        _, following = steps.step()
    # Right after the step before. What a gradient tells of its age comes too late for the next one.
    assert min(begun.flop, again.flop) > 0
    # But for products with the sum of a layer's neurons, which full space follows.
    assert max(added.flop, following.flop) <= 0.01 * begun.flop
    assert begun.launches + added.launches <= 120 + 18 * 48 + 80, (begun.calls, added.calls)
