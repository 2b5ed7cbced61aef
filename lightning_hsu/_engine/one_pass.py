"""Gradients of layers that are not plain, on a GPU in one pass for which the host does not wait.

Whether such a gradient was exact is read when the layer is computed next: if it was not, as with
coincident neurons, the layer goes the exact way for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from lightning_hsu._engine.late import LateNumbers
from lightning_hsu._engine.layer import Layer
from lightning_hsu.measures import State

_EXACT = 16
"""How many gradients are computed the exact way after one that was not."""

_ANSWERS: WeakKeyDictionary[Layer, LateNumbers] = WeakKeyDictionary()
_LEFT: WeakKeyDictionary[Layer, int] = WeakKeyDictionary()


def gradient_of(layers: Sequence[Layer], x: Tensor, state: State | None) -> Tensor:
    """The gradient at neurons x (groups, n, d) of layers of one measure, which the caller may change.

    Args:
        layers: The layers, whose groups stand one after the other.
        x: Their neurons.
        state: What the measure carries.
    """
    measure = layers[0].measure
    if not _goes_exactly(layers):
        found = measure.gradient_on_gpu(x, state)
        if found is not None:
            grad, is_exact = found
            answer = LateNumbers(is_exact.view(1))
            for layer in layers:
                _ANSWERS[layer] = answer
            return grad
    return measure.value_and_grad(x, state)[1]


def _goes_exactly(layers: Sequence[Layer]) -> bool:
    """Whether one of the layers is to be computed the exact way now."""
    found = False
    for layer in layers:
        answer = _ANSWERS.pop(layer, None)
        if answer is not None and not answer.read()[0]:
            _LEFT[layer] = _EXACT
        left = _LEFT.pop(layer, 0)
        if left > 0:
            _LEFT[layer] = left - 1
            found = True
    return found
