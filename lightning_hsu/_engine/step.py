"""One optimizer step over the layers: which of them act, on which gradients, or with which terms in the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_hsu._core.foreach import SMALL
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu._engine.apply import GradientStats, LayerUpdate, add_together, penalty_gradients
from lightning_hsu._engine.layer import Layer, widened
from lightning_hsu._engine.state import Progress
from lightning_hsu._neurons.sharding import Gathered, Replicas
from lightning_hsu.coefficients import Share


@dataclass(frozen=True)
class Use:
    """One use of the penalty.

    Args:
        step: Steps that the optimizer has done before.
        own: Learning rates of its parameters, by id; empty where they are not known.
        factor: What the task's gradients, or its loss, are multiplied by.
        again: Another evaluation within the same step.
        step_limit: The fraction of its norm by which a step moves a neuron at most; None is no limit.
        note: Tell what is done.
    """

    step: int
    own: Mapping[int, float]
    factor: Tensor | float
    again: bool
    step_limit: float | None
    note: bool = False


def lots(layers: Sequence[Layer], split_above: int | None) -> list[list[Layer]]:
    """Layers that go together, and no more of them than must, for a lot's gradients are in memory at once.

    They share a parameter or a sharded module, are small and of one shape, or are split over ranks.
    """
    found: list[tuple[set[object], list[Layer]]] = []
    for layer in layers:
        labels, members = _labels(layer, split_above), [layer]
        for known in [one for one in found if one[0] & labels]:
            found.remove(known)
            labels, members = labels | known[0], known[1] + members
        found.append((labels, members))
    return [members for _, members in found]


Act = Callable[[LayerUpdate, Tensor], None]
"""What is done with a layer's weighted gradient: :meth:`LayerUpdate.add` or :meth:`LayerUpdate.move`."""


def act_on_all(
    lots: Sequence[Sequence[Layer]],
    act: Act,
    progress: Progress,
    use: Use,
    replicas: Replicas | None,
) -> dict[str, GradientStats]:
    """Let lots of layers act on the weighted gradients of their penalties; notes by layer, where asked for.

    Lots of which nothing but numbers need to be known come last, all at once.
    """
    notes, later = dict[str, GradientStats](), dict[LayerUpdate, GradientUpdate]()
    for together in lots:
        notes |= _act_on(together, act, progress, use, replicas, later)
    add_together(later)
    return notes


def _act_on(
    together: Sequence[Layer],
    act: Act,
    progress: Progress,
    use: Use,
    replicas: Replicas | None,
    later: dict[LayerUpdate, GradientUpdate],
) -> dict[str, GradientStats]:
    """Let a lot of layers act, or leave all of it for ``later``; notes by layer, where asked for."""
    gathered: Gathered = {}
    found = (_application(layer, progress, use, gathered) for layer in together)
    ready = [one for one in found if one is not None]
    plain = (
        _plain(ready, progress, use, replicas) if act is LayerUpdate.add and not use.note else {}
    )
    if len(plain) == len(ready):
        later.update(plain)
        return {}
    ready = [one for one in ready if one not in plain]
    grads, notes = penalty_gradients(ready, replicas), dict[str, GradientStats]()
    for i, one in enumerate(
        ready
    ):  # all norms before any gradient is added: layers may be computed from one parameter
        grads[i], note = _weighted(one, grads[i], progress, use)
        notes |= {one.layer.target.name: note} if note else {}
    add_together(plain)
    for one, grad in zip(ready, grads, strict=True):
        act(one, grad)
    return notes


def loss_terms(layers: Sequence[Layer], progress: Progress, use: Use) -> Tensor:
    """Coefficient times penalty, summed over layers, differentiable; the gradients that come back obey the step limit."""
    terms = [_loss_term(layer, progress, use) for layer in layers]
    progress.loss_step = use.step
    return torch.stack([term.to(terms[0]) for term in terms]).sum()


def learning_rates(optimizer: Optimizer) -> dict[int, float]:
    """Learning rates of the optimizer's parameters, by id."""
    rates = [(group["params"], float(group.get("lr", 1.0))) for group in optimizer.param_groups]
    return {id(p): rate for parameters, rate in rates for p in parameters}


def _labels(layer: Layer, split_above: int | None) -> set[object]:
    if layer.sharded:
        return {id(layer.target.module)}
    shape, found = layer.target.shape, set[object](map(id, layer.parameters))
    found |= {(layer.measure, shape)} if math.prod(shape) <= SMALL else set()
    return found | ({"split"} if split_above is not None and shape[1] >= split_above else set())


def _application(
    layer: Layer, progress: Progress, use: Use, gathered: Gathered
) -> LayerUpdate | None:
    """What to do to one layer at this step; None where nothing is to be done."""
    rates = layer.rates(use.own)
    if not rates or (
        not isinstance(layer.strength, Share) and progress.coefficient(layer, use.step) == 0
    ):
        return None
    _refuse_sparse(layer)
    with torch.enable_grad():
        reading = layer.target.read(gathered)
    state = progress.state(layer, reading.x, keep=use.again)
    return LayerUpdate(layer, use.own, max(rates), reading, state, float(use.factor))


def _plain(
    ready: Sequence[LayerUpdate], progress: Progress, use: Use, replicas: Replicas | None
) -> dict[LayerUpdate, GradientUpdate]:
    """What is a mean pair energy with a number for a coefficient, in a parameter that this rank holds alone."""
    found: dict[LayerUpdate, GradientUpdate] = {}
    for one in ready:
        split = replicas is not None and one.layer.target.shape[1] >= replicas.split_above
        share = isinstance(one.layer.strength, Share)
        if (
            not split
            and not share
            and one.state is None
            and one.layer.rows is None
            and one.layer.measure.pair_term() is not None
        ):
            addition = one.addition(progress.coefficients[one.layer.target.name], use.step_limit)
            found |= {one: addition} if addition else {}
    if len({id(one.reading.parameter) for one in found}) < len(
        found
    ):  # several sets in one parameter
        found = {
            one: addition
            for one, addition in found.items()
            if not any(map(addition.overlaps, found.values()))
        }
    return found


def _weighted(
    one: LayerUpdate, grad: Tensor, progress: Progress, use: Use
) -> tuple[Tensor, GradientStats | None]:
    """The gradient as it will act, with what to tell of it."""
    if isinstance(one.layer.strength, Share):
        if not use.again:
            one.follow(grad, progress.shares)
        progress.coefficient(one.layer, use.step)
    return one.weighted(
        grad, progress.coefficients[one.layer.target.name], use.step_limit, note=use.note
    )


def _loss_term(layer: Layer, progress: Progress, use: Use) -> Tensor:
    name = layer.target.name
    if isinstance(layer.strength, Share):
        raise ValueError(
            f"the coefficient of layer '{name}' is a Share, which needs the task's gradient by itself: use "
            "add_gradients or move (apply='gradient' or 'decoupled')"
        )
    coefficient = progress.coefficient(layer, use.step)
    if coefficient == 0:
        return torch.zeros((), device=layer.parameters[0].device)
    reading = layer.target.read()
    x, rates = widened(reading.x), [use.own[id(p)] for p in layer.parameters if id(p) in use.own]
    if rates and x.requires_grad:
        one = LayerUpdate(layer, use.own, max(rates), reading)
        x = x.view_as(x)  # not the parameter itself, which would keep the hook
        x.register_hook(lambda grad: grad * one.shortening(grad / use.factor, use.step_limit))  # type: ignore[no-untyped-call]
    return coefficient * layer.measure.penalty(x, progress.state(layer, x, keep=use.again)).mean()


def _refuse_sparse(layer: Layer) -> None:
    """A sparse gradient has no room for the rows that the batch did not touch."""
    if any(p.grad is not None and p.grad.is_sparse for p in layer.parameters):
        raise NotImplementedError(
            f"layer '{layer.target.name}' {layer.target.shape} has sparse gradients, which cannot hold the penalty's; use "
            f"sparse=False, a coefficient of 0 for it, or exclude='{layer.target.name}'"
        )
