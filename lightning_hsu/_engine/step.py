"""One step of the layers that are not plain, and the penalty terms of a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hsu._core import exact_arithmetic, working_dtype
from lightning_hsu._core.foreach import SMALL, shortening
from lightning_hsu._engine.apply import LayerUpdate, penalty_gradients
from lightning_hsu._engine.buffered import GradientStats
from lightning_hsu._engine.delta import use_of
from lightning_hsu._engine.known_gradient import KnownGradient
from lightning_hsu._engine.layer import Layer, to_compute_dtype
from lightning_hsu._engine.misuse import in_transform
from lightning_hsu._engine.plan import StepContext, limit_of_gradient
from lightning_hsu._engine.rates import Rate, UnknownRateError, is_unknown, largest, sign_in_loss
from lightning_hsu._engine.state import TrainingState
from lightning_hsu._neurons.placement import Gathered, Placement
from lightning_hsu.coefficients import Share
from lightning_hsu.measures import State
from lightning_hsu.measures.state import is_random

Act = Callable[[LayerUpdate, Tensor], None]
"""What to do with a layer's weighted gradient: :meth:`LayerUpdate.add` or ``move``."""


def act_on_buckets(
    buckets: Sequence[Sequence[Layer]],
    act: Act,
    state: TrainingState,
    context: StepContext,
    placement: Placement,
) -> dict[str, GradientStats]:
    """Act on the weighted penalty gradients of the layers, one bucket after the other."""
    for bucket in buckets:
        for layer in bucket:  # before any of them acts: a refused step changes nothing
            _refuse_sparse(layer, state, context)
    stats: dict[str, GradientStats] = {}
    first = next(layer for bucket in buckets for layer in bucket)
    with exact_arithmetic(first.parameters[0]):  # a hook may run within autocast
        for bucket in buckets:
            updates = _updates(bucket, state, context)
            if state.deltas:
                grads = _kept_gradients(updates, state, context, placement)
            else:
                updates = [_prepared(update, state, context) for update in updates]
                grads = penalty_gradients(updates, placement)
            weighted_grads = []
            # Take all norms before adding any gradient: layers may share a parameter.
            for update, grad in zip(updates, grads, strict=True):
                coefficient = _coefficient(update, grad, state, context)
                weighted, shortened_by = update.weighted(grad, coefficient, context.step_limit)
                weighted_grads.append(weighted)
                layer_stats = update.stats(weighted, shortened_by) if context.stats else None
                if layer_stats is not None:
                    stats[update.layer.name] = layer_stats
            for update, weighted in zip(updates, weighted_grads, strict=True):
                act(update, weighted)
    return stats


def loss_terms(layers: Sequence[Layer], state: TrainingState, context: StepContext) -> Tensor:
    """Coefficient times penalty, summed over layers; its gradients obey the step limit."""
    state.now.loss_step = context.step
    if not layers:
        return torch.zeros(())
    terms: dict[object, list[_LossTerm]] = {}
    for layer in layers:
        term = _loss_term(layer, state, context)
        if term is not None:
            terms.setdefault(term.key(keeps=bool(state.deltas)), []).append(term)
    if not terms:
        return torch.zeros((), device=layers[0].parameters[0].device)
    totals = [_weighted_penalty(members, state, context) for members in terms.values()]
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


def _coefficient(
    update: LayerUpdate, grad: Tensor, state: TrainingState, context: StepContext
) -> Tensor | float:
    """The coefficient of a layer; a share first updates its means with this step's gradients."""
    layer = update.layer
    if isinstance(layer.strength, Share):
        if not context.same_step:
            update.update_share(layer.strength, grad, state.share_means)
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
    """

    layer: Layer
    x: Tensor
    dtype: torch.dtype
    coefficient: Tensor | float
    rate: Rate | None

    def key(self, *, keeps: bool) -> object:
        """Equal for small layers that are computed together.

        Args:
            keeps: Whether gradients are kept, of each layer by itself.
        """
        x = self.x
        if keeps or self.layer.measure.has_state or x.numel() > SMALL:
            return self.layer
        rate = id(self.rate) if isinstance(self.rate, Tensor) else self.rate
        return self.layer.measure, x.shape, self.dtype, x.device, rate


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
    return _LossTerm(layer, to_compute_dtype(view.x), view.x.dtype, sign * coefficient, rate)


def _weighted_penalty(
    members: Sequence[_LossTerm], state: TrainingState, context: StepContext
) -> Tensor:
    """Coefficient times penalty of layers that are computed together."""
    first = members[0]
    x = torch.cat([one.x for one in members]) if len(members) > 1 else first.x
    if first.rate is not None and x.requires_grad:
        x = x.view_as(x)  # not the parameter itself, which would keep the hook
        neurons = x.detach()
        limit = limit_of_gradient(context.step_limit, first.rate)
        bound = torch.finfo(first.dtype).max / 2

        def shorten(grad: Tensor) -> Tensor:
            return grad * shortening(grad / context.factor, neurons, 1.0, limit, bound)

        x.register_hook(shorten)  # type: ignore[no-untyped-call]
    if state.deltas and context.learning_rates:
        return first.coefficient * _kept_penalty(first.layer, x, state, context)
    measure_state = _loss_state(first.layer, x, state, context)
    penalties = first.layer.measure.penalty(x, measure_state).view(len(members), -1).mean(1)
    weighted = [
        one.coefficient * penalty for one, penalty in zip(members, penalties.unbind(), strict=True)
    ]
    return torch.stack(weighted).sum()


def _kept_penalty(layer: Layer, x: Tensor, state: TrainingState, context: StepContext) -> Tensor:
    """The penalty of neurons x (groups, n, d), meaned over groups, as it was when last computed."""
    use = use_of(layer, x.detach())
    use.needs_value = True
    same_step = context.same_step
    state.deltas.find_due([use], same_step=same_step)
    if use.is_due or state.deltas.of(use).value is None:
        measure_state = _loss_state(layer, x, state, context)
        with exact_arithmetic(x):
            value, grad = layer.measure.value_and_grad(use.x, measure_state)
        draws = [layer.name] if is_random(measure_state) else []
        state.deltas.keep([use], [grad], draws=draws, learns=not same_step)
        state.deltas.of(use).value = value.mean()
    delta = state.deltas.refreshed(use, same_step=same_step)
    if not same_step:
        state.deltas.grow_older([use])
    grad = delta.grad.to(x.dtype) / x.shape[0]
    penalty: Tensor = KnownGradient.apply(x, delta.value, grad)  # type: ignore[no-untyped-call]
    return penalty


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
