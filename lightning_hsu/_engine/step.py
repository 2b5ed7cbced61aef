"""One step of the layers that are not plain, and the penalty terms of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hsu._core import exact_arithmetic, working_dtype
from lightning_hsu._core.foreach import SMALL, shortening
from lightning_hsu._engine.apply import LayerUpdate, Weighted, penalty_gradients
from lightning_hsu._engine.buffered import GradientStats
from lightning_hsu._engine.delta import Use, use_of
from lightning_hsu._engine.deltas import Deltas
from lightning_hsu._engine.known_gradient import KnownGradient
from lightning_hsu._engine.layer import Layer, to_compute_dtype
from lightning_hsu._engine.misuse import in_transform
from lightning_hsu._engine.one_pass import (
    goes_together,
    inexact,
    penalties_together,
    values_and_gradients,
)
from lightning_hsu._engine.plan import StepContext, limit_of_gradient
from lightning_hsu._engine.rates import (
    Rate,
    UnknownRateError,
    is_unknown,
    largest,
    largest_gain,
    sign_in_loss,
)
from lightning_hsu._engine.state import TrainingState
from lightning_hsu._engine.weighted import (
    add_together,
    in_lots,
    update_shares,
    weighted_together,
)
from lightning_hsu._neurons.placement import Gathered, Placement
from lightning_hsu.coefficients import Share
from lightning_hsu.measures import State
from lightning_hsu.measures.state import is_random


def act_on_buckets(
    buckets: Sequence[Sequence[Layer]],
    state: TrainingState,
    context: StepContext,
    placement: Placement,
) -> dict[str, GradientStats]:
    """Add the weighted penalty gradients of the layers, or move these, one lot after the other."""
    for bucket in buckets:
        for layer in bucket:  # before any of them acts: a refused step changes nothing
            _refuse_sparse(layer, state, context)
    stats: dict[str, GradientStats] = {}
    first = next(layer for bucket in buckets for layer in bucket)
    with exact_arithmetic(first.parameters[0]):  # a hook may run within autocast
        for bucket, together in in_lots(buckets, placement):
            updates = _updates(bucket, state, context)
            if state.deltas:
                grads = _kept_gradients(updates, state, context, placement)
            else:
                updates = [_prepared(update, state, context) for update in updates]
                grads = penalty_gradients(updates, placement)
            # Take all norms before adding any gradient: layers may share a parameter.
            weigh = _weighted_together if together else _weighted
            weighted = weigh(updates, grads, state, context)
            if context.stats:
                for update, one in zip(updates, weighted, strict=True):
                    layer_stats = update.stats(one)
                    if layer_stats is not None:
                        stats[update.layer.name] = layer_stats
            if together and not context.moves:
                add_together(updates, [one.grad for one in weighted])
                continue
            for update, one in zip(updates, weighted, strict=True):
                if context.moves:
                    update.move(one.grad)
                else:
                    update.add(one.grad)
    return stats


def loss_terms(layers: Sequence[Layer], state: TrainingState, context: StepContext) -> Tensor:
    """Coefficient times penalty, summed over layers; its gradients obey the step limit."""
    state.now.loss_step = context.step
    if not layers:
        return torch.zeros(())
    terms: dict[object, list[_LossTerm]] = {}
    together = []
    for layer in layers:
        term = _loss_term(layer, state, context)
        if term is None:
            continue
        if term.goes_together():
            together.append(term)
        else:
            terms.setdefault(term.key(keeps=bool(state.deltas)), []).append(term)
    if not terms and not together:
        return torch.zeros((), device=layers[0].parameters[0].device)
    totals = [_weighted_penalty(members, state, context) for members in terms.values()]
    totals += _weighted_together_in_loss(together, state, context)
    total = torch.stack([one.to(totals[0]) for one in totals]).sum()
    acting = [layer for layer in layers if state.now.coefficients[layer.name] != 0]
    return state.now.penalties.checked(total, acting) if acting else total


def _updates(
    bucket: Sequence[Layer], state: TrainingState, context: StepContext
) -> list[LayerUpdate]:
    """The updates of a bucket's layers to which something can be added."""
    gathered: Gathered = {}
    updates = []
    for layer in bucket:
        rates = layer.rates(context.learning_rates)
        if not rates:
            continue
        state.now.reached.add(layer.name)
        if not layer.has_share and state.coefficient(layer, context.step) == 0:
            continue
        with torch.enable_grad():
            view = layer.target.read(gathered)
        scale = float(context.factor)
        update = LayerUpdate(layer, context.learning_rates, largest(rates), view, None, scale)
        updates.append(update)
    return updates


def _prepared(update: LayerUpdate, state: TrainingState, context: StepContext) -> LayerUpdate:
    """An update with the state of its measure, which goes one step further."""
    x = update.view.x
    measure_state = state.measure_state(update.layer, x, same_step=context.same_step)
    if measure_state is None:
        return update
    return replace(update, state=measure_state)


def _kept_gradients(
    updates: Sequence[LayerUpdate],
    state: TrainingState,
    context: StepContext,
    placement: Placement,
) -> list[Tensor]:
    """The gradients of layers, of which those that are due are computed; the caller may change them."""
    uses = [update.use() for update in updates]
    same_step = context.same_step
    if not same_step:
        _drop_inexact(state.deltas, uses)
    state.deltas.find_due(uses, same_step=same_step)
    due, draws = [], []
    for update, use in zip(updates, uses, strict=True):
        if use.is_due:
            update = _prepared(update, state, context)
            due.append(update)
            if is_random(update.state):
                draws.append(update.layer.name)
    fresh = penalty_gradients(due, placement)
    chosen = [use for use in uses if use.is_due]
    parts = [use.part_of(grad) for use, grad in zip(chosen, fresh, strict=True)]
    state.deltas.keep(chosen, parts, draws=draws, learns=not same_step)
    grads = []
    for use in uses:
        delta = state.deltas.refreshed(use, same_step=same_step)
        grads.append(use.whole_of(delta.grad.to(working_dtype(use.x.dtype))))
    if not same_step:
        state.deltas.grow_older(uses)
    return grads


def _drop_inexact(deltas: Deltas, uses: Sequence[Use]) -> None:
    """Drop gradients of the last use that were not exact, as of coincident neurons on a GPU."""
    kept = set(deltas.just_kept([use.layer for use in uses]))
    members = [(use.layer, use.x) for use in uses if use.layer in kept]
    if members:
        deltas.drop(inexact(members))


def _weighted(
    updates: Sequence[LayerUpdate],
    grads: Sequence[Tensor],
    state: TrainingState,
    context: StepContext,
) -> list[Weighted]:
    """The weighted gradients of layers; shares first update their means with this step's."""
    found = []
    for update, grad in zip(updates, grads, strict=True):
        strength = update.layer.strength
        if isinstance(strength, Share) and not context.same_step:
            update.update_share(strength, grad, state.share_means)
        coefficient = _coefficient(update.layer, state, context)
        found.append(update.weighted(grad, coefficient, context))
    return found


def _weighted_together(
    updates: Sequence[LayerUpdate],
    grads: Sequence[Tensor],
    state: TrainingState,
    context: StepContext,
) -> list[Weighted]:
    """The same in few operations for layers that go together."""
    if not context.same_step:
        update_shares(updates, grads, state.share_means)
    coefficients = [_coefficient(update.layer, state, context) for update in updates]
    return weighted_together(updates, grads, coefficients, context)


def _coefficient(layer: Layer, state: TrainingState, context: StepContext) -> Tensor | float:
    """The coefficient of a layer at a step."""
    if layer.has_share:
        return state.coefficient(layer, context.step)
    return state.now.coefficients[layer.name]  # as _updates noted it


@dataclass(eq=False)
class _LossTerm:
    """One layer's part of a loss.

    Args:
        layer: The layer.
        x: Its neurons (groups, n, d), with a graph, in float32 or wider.
        dtype: The dtype of the neurons themselves.
        coefficient: Its coefficient, negative where the optimizer makes the loss as large as it can.
        rate: The learning rate with which the neurons will move; None if no optimizer is known.
        gain: What the optimizer makes of a steady gradient.
    """

    layer: Layer
    x: Tensor
    dtype: torch.dtype
    coefficient: Tensor | float
    rate: Rate | None
    gain: float

    def key(self, *, keeps: bool) -> object:
        """Equal for small layers that are computed together.

        Args:
            keeps: Whether gradients are kept, of each layer by itself.
        """
        x = self.x
        if keeps or self.layer.measure.has_state or x.numel() > SMALL:
            return self.layer
        rate = id(self.rate) if isinstance(self.rate, Tensor) else self.rate
        return self.layer.measure, x.shape, self.dtype, x.device, rate, self.gain

    def goes_together(self) -> bool:
        """Whether value and gradient are computed in one pass with those of layers of any shapes."""
        has_graph = self.x.requires_grad and torch.is_grad_enabled()
        return has_graph and goes_together(self.layer) and not in_transform()


def _loss_term(layer: Layer, state: TrainingState, context: StepContext) -> _LossTerm | None:
    """A layer's part of a loss; None if its coefficient is 0."""
    if layer.has_share:
        raise ValueError(
            f"the coefficient of layer '{layer.name}' is a Share, which needs the task's gradient by "
            "itself: use add_gradients or move (apply='gradient' or 'decoupled')"
        )
    coefficient = state.coefficient(layer, context.step)
    if coefficient == 0:
        return None
    view = layer.target.read()
    known = context.learning_rates
    rates = [known[id(p)] for p in layer.parameters if id(p) in known]
    rate = largest(rates) if rates else None
    sign = sign_in_loss(layer.name, layer.parameters, known)
    gain = largest_gain(layer.parameters, known)
    x = to_compute_dtype(view.x)
    return _LossTerm(layer, x, view.x.dtype, sign * coefficient, rate, gain)


def _weighted_penalty(
    members: Sequence[_LossTerm], state: TrainingState, context: StepContext
) -> Tensor:
    """Coefficient times penalty of layers that are computed together."""
    first = members[0]
    x = torch.cat([one.x for one in members]) if len(members) > 1 else first.x
    x = _limited(x, first, context)
    if state.deltas and context.learning_rates:
        (kept,) = _kept_penalties([(first.layer, x)], state, context)
        return first.coefficient * kept
    measure_state = _loss_state(first.layer, x, state, context)
    penalties = first.layer.measure.penalty(x, measure_state).view(len(members), -1).mean(1)
    weighted = [
        one.coefficient * penalty for one, penalty in zip(members, penalties.unbind(), strict=True)
    ]
    return torch.stack(weighted).sum()


def _weighted_together_in_loss(
    members: Sequence[_LossTerm], state: TrainingState, context: StepContext
) -> list[Tensor]:
    """The same of each of the layers that are computed in one pass, whatever their shapes."""
    if not members:
        return []
    neurons = [(one.layer, _limited(one.x, one, context)) for one in members]
    if state.deltas and context.learning_rates:
        penalties = _kept_penalties(neurons, state, context)
    else:
        penalties = list(map(torch.mean, penalties_together(neurons)))
    return [one.coefficient * found for one, found in zip(members, penalties, strict=True)]


def _limited(x: Tensor, term: _LossTerm, context: StepContext) -> Tensor:
    """Neurons x whose gradient obeys the step limit on its way back, if an optimizer is known."""
    if term.rate is None or not x.requires_grad:
        return x
    x = x.view_as(x)  # not the parameter itself, which would keep the hook
    neurons = x.detach()
    limit = limit_of_gradient(context.step_limit, term.rate, term.gain)
    bound = torch.finfo(term.dtype).max / 2

    def shorten(grad: Tensor) -> Tensor:
        return grad * shortening(grad / context.factor, neurons, 1.0, limit, bound)

    x.register_hook(shorten)  # type: ignore[no-untyped-call]
    return x


def _kept_penalties(
    members: Sequence[tuple[Layer, Tensor]], state: TrainingState, context: StepContext
) -> list[Tensor]:
    """The penalties of neurons (groups, n, d), meaned over groups, as they were when last computed."""
    uses = []
    for layer, x in members:
        use = use_of(layer, x.detach())
        use.needs_value = True
        uses.append(use)
    same_step = context.same_step
    if not same_step:
        _drop_inexact(state.deltas, uses)
    state.deltas.find_due(uses, same_step=same_step)
    due = [use for use in uses if use.is_due or state.deltas.of(use).value is None]
    if due:
        _keep_fresh(due, state, context)
    penalties = []
    for (_, x), use in zip(members, uses, strict=True):
        delta = state.deltas.refreshed(use, same_step=same_step)
        grad = delta.grad.to(x.dtype) / x.shape[0]
        penalty: Tensor = KnownGradient.apply(x, delta.value, grad)  # type: ignore[no-untyped-call]
        penalties.append(penalty)
    if not same_step:
        state.deltas.grow_older(uses)
    return penalties


def _keep_fresh(due: Sequence[Use], state: TrainingState, context: StepContext) -> None:
    """Compute penalties and gradients of layers in a loss, and keep them."""
    draws = []
    with exact_arithmetic(due[0].x):
        if all(goes_together(use.layer) for use in due):
            found = values_and_gradients([(use.layer, use.x) for use in due])
        else:
            found = []
            for use in due:
                measure_state = _loss_state(use.layer, use.x, state, context)
                found.append(use.layer.measure.value_and_grad(use.x, measure_state))
                if is_random(measure_state):
                    draws.append(use.layer.name)
    values, grads = zip(*found, strict=True)
    state.deltas.keep(due, grads, draws=draws, learns=not context.same_step)
    for use, value in zip(due, values, strict=True):
        state.deltas.of(use).value = value.mean()


def refuse_unknown_rates(
    layers: Sequence[Layer], state: TrainingState, context: StepContext
) -> None:
    """Refuse to move neurons of which the optimizer does not tell a learning rate."""
    optimizer = context.learning_rates.unknown_in
    if optimizer is None:
        return
    named = []
    for layer in layers:
        rates = layer.rates(context.learning_rates)
        if not rates or not is_unknown(largest(rates)):
            continue
        if layer.has_share or state.coefficient(layer, context.step) != 0:
            named.append(f"'{layer.name}' {layer.target.shape}")
    if named:
        raise UnknownRateError(
            f"{optimizer} has no learning rate for layer {', '.join(named)}, as with relative steps, "
            "so nothing says how far to move the neurons: use apply='gradient' (add_gradients), or "
            "give it a learning rate"
        )


def _loss_state(
    layer: Layer, x: Tensor, state: TrainingState, context: StepContext
) -> State | None:
    """The state of a layer's measure; what a transform of torch.func makes is not kept."""
    if not layer.measure.has_state or not in_transform():
        return state.measure_state(layer, x, same_step=context.same_step)
    try:
        return state.measure_states.peek(layer, x)
    except RuntimeError as error:
        raise RuntimeError(
            f"layer '{layer.name}': {layer.measure!r} looks at the weights to prepare its state, which "
            "torch.func.vmap does not allow; use a measure without a state, such as RieszEnergy(), or "
            "add up the models' penalties in a loop"
        ) from error


def _refuse_sparse(layer: Layer, state: TrainingState, context: StepContext) -> None:
    """Refuse a sparse gradient: it has no room for the rows that the batch did not touch."""
    if not any(p.grad is not None and p.grad.is_sparse for p in layer.parameters):
        return
    if not layer.rates(context.learning_rates):
        return
    if layer.has_share or state.coefficient(layer, context.step) != 0:
        raise NotImplementedError(
            f"layer '{layer.name}' {layer.target.shape} has sparse gradients, which cannot hold the "
            "penalty's; use sparse=False, a coefficient of 0 for it, or "
            f"exclude='{layer.name}'"
        )
