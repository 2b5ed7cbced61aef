"""What a step with a tolerance asks of a GPU, counted with tensors that only pretend to be on one."""

import sys

import pytest
import torch

from benchmarks.launches import SHAPES, Layers, count, look_at, pretending
from lightning_hsu import UniformityRegularizer
from lightning_hsu._engine.late import LateNumbers


class Told(LateNumbers):
    """Numbers of weights that hardly move: what a device would have told."""

    def __init__(self, numbers):
        count = numbers.numel()
        self.values = [0.0] * count  # changes
        caller = sys._getframe(1)
        if caller.f_code.co_name == "keep":  # errors, steepest and longest rows, norms of samples
            own = len(caller.f_locals["members"])
            self.values = [1e-9] * (count - own) + [1.0] * own

    def read(self):
        return self.values


def steps(name, dtype=torch.float32, number=12):
    """What each step asks for before and after the optimizer's, and how many layers it computes."""
    head = "head" if name in ("ResNet-50", "ViT-B/16") else None
    regularizer = UniformityRegularizer(coefficient=1e-3, head=head, tolerance=0.05)
    for measure in (regularizer.measure, regularizer.measure.for_head()):
        look_at(measure)
    found = []
    with pretending():
        model = Layers(SHAPES[name](), dtype, with_head=head is not None)
        regularizer.attach(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(number):
            added = count(lambda: regularizer.add_gradients(optimizer))
            begun = count(lambda: regularizer.look_ahead(optimizer))
            found.append((len(regularizer.state.deltas.computed), added, begun))
    return found


@pytest.fixture(autouse=True)
def told(monkeypatch):
    monkeypatch.setattr("lightning_hsu._engine.delta.LateNumbers", Told)
    monkeypatch.setattr("lightning_hsu._engine.ahead.LateNumbers", Told)
    monkeypatch.setattr("lightning_hsu._engine.buffered.LateNumbers", Told)


@pytest.mark.parametrize("name", ["ResNet-50", "GPT-2 small", "ViT-B/16", "Llama-7B"])
def test_a_step_at_which_nothing_is_due_is_few_launches_and_no_wait(name, monkeypatch):
    shapes = SHAPES[name]()
    if name == "Llama-7B":  # the number of launches does not depend on the number of layers
        shapes = shapes[: len(shapes) // 8]
        monkeypatch.setitem(SHAPES, name, lambda: shapes)
    found = steps(name)
    quiet = [(added, begun) for computed, added, begun in found if computed == 0]
    assert quiet
    # At ages that are powers of two kept gradients are projected as well.
    added, begun = min(quiet, key=lambda one: one[0].launches)
    assert added.launches + begun.launches <= 12, (added.calls, begun.calls)
    for _, added, begun in found[1:]:  # the first step of an optimizer is looked at
        assert (added.waits, begun.waits) == (0, 0), (added.calls, begun.calls)


def test_a_step_that_computes_all_layers_costs_few_launches_more_than_an_exact_one():
    """They keep the gradients, and learn of them: six a layer and some."""
    (_, _, begun), (computed, added, following) = steps("GPT-2 small", number=2)
    assert computed == 48
    assert begun.flop > 0  # right after the step before
    assert (added.flop, following.flop) == (0, 0)
    assert begun.launches + added.launches <= 120 + 6 * 48 + 80, (begun.calls, added.calls)
