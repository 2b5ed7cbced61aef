"""Gradients of layers that are not plain, on a GPU in one pass for which the host does not wait.

Layers whose measures are means over pairs go together, whatever their shapes; others, as a sampled
head, each by itself. Whether such a gradient was exact is read when the layer is computed next: if it
was not, as with coincident neurons, the layer goes the exact way for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from lightning_hsu._core import PairEnergy, or_one
from lightning_hsu._core.foreach import goes_without_sync, not_exact
from lightning_hsu._core.together import Neurons, gradients_together
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu._engine.late import LateNumbers
from lightning_hsu._engine.layer import Layer, to_compute_dtype
from lightning_hsu.measures import State

_EXACT = 16
"""How many gradients are computed the exact way after one that was not."""

_ANSWERS: WeakKeyDictionary[Layer, LateNumbers] = WeakKeyDictionary()
_LEFT: WeakKeyDictionary[Layer, int] = WeakKeyDictionary()


def goes_together(layer: Layer) -> bool:
    """Whether a layer is computed in one pass with others of any shapes, as plain ones on a GPU are."""
    measure = layer.measure
    if layer.rows is not None or measure.has_state or layer.sharded or not layer.parameters:
        return False
    size = torch.Size(layer.target.shape)
    return goes_without_sync(layer.parameters[0], size, measure.pair_term())


def gradients_of(members: Sequence[tuple[Layer, Tensor]]) -> list[Tensor]:
    """The gradients (groups, n, d) of layers that go together, which the caller may change.

    Args:
        members: The layers, and their neurons without a graph.
    """
    together = gradients_together(_neurons_of(members))
    found = []
    for place, (layer, x) in enumerate(members):
        one = together.get(place)
        if one is None:
            found.append(layer.measure.value_and_grad(to_compute_dtype(x))[1])
        else:
            found.append(one.grad)
    return found


def values_and_gradients(members: Sequence[tuple[Layer, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The penalties (groups,) of layers that go together, and their gradients (groups, n, d).

    Args:
        members: The layers, and their neurons without a graph.
    """
    together = gradients_together(_neurons_of(members), energy=True)
    found = []
    for place, (layer, x) in enumerate(members):
        one = together.get(place)
        if one is None or one.energy is None:
            found.append(layer.measure.value_and_grad(to_compute_dtype(x)))
        else:
            found.append((_penalty_of(one.energy, layer), one.grad))
    return found


def penalties_together(members: Sequence[tuple[Layer, Tensor]]) -> list[Tensor]:
    """The penalties (groups,) of layers that go together, with a graph; twice differentiable.

    Args:
        members: The layers, and their neurons (groups, n, d) with a graph, in float32 or wider.
    """
    neurons = []
    for each in _neurons_of(members):
        neurons.append(each._replace(term=replace(each.term, logarithm=False)))
    together = gradients_together(neurons, energy=True)
    found = []
    for place, (layer, x) in enumerate(members):
        one = together.get(place)
        if one is None or one.energy is None:
            found.append(layer.measure.penalty(x))
        else:
            energy = PairEnergy.known(x, neurons[place].term, one.energy, one.grad)
            found.append(_penalty_of(energy, layer))
    return found


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


def inexact(members: Sequence[tuple[Layer, Tensor]]) -> list[Layer]:
    """The layers of which the last pass has not computed the exact gradients; ask a step later.

    Args:
        members: The layers, and their neurons without a graph.
    """
    found = []
    joined = []
    work = []
    for layer, x in members:
        if goes_together(layer):
            (own,) = _neurons_of([(layer, x)])
            joined.append(layer)
            work.append((GradientUpdate(x, x, 1.0, key=own.key), own.term))
            continue
        answer = _ANSWERS.get(layer)
        if answer is not None and not answer.read()[0]:
            found.append(layer)
    return found + [joined[place] for place in not_exact(work)]


def _neurons_of(members: Sequence[tuple[Layer, Tensor]]) -> list[Neurons]:
    """The neurons of layers, and what stands for them from step to step."""
    found = []
    for layer, x in members:
        term = layer.measure.pair_term()
        assert term is not None
        found.append(Neurons(x.detach(), term, ref(layer)))
    return found


def _penalty_of(energy: Tensor, layer: Layer) -> Tensor:
    """The penalties (groups,) that belong to mean energies (groups,)."""
    term = layer.measure.pair_term()
    if term is None or not term.logarithm:
        return energy
    return or_one(energy).log()  # 0 where there are no pairs


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
