"""One layer's update: from the gradient of its penalty to its parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_hsu._core.foreach import SMALL, shortening
from lightning_hsu._core.limits import ANY_SHARE, Allowance, held_factors, with_ones
from lightning_hsu._core.updates import along_the_sphere
from lightning_hsu._engine.buffered import GradientStats, less_rounding, strong_neurons
from lightning_hsu._engine.delta import Use, use_of
from lightning_hsu._engine.layer import Layer, to_compute_dtype
from lightning_hsu._engine.one_pass import goes_together, gradient_of, gradients_of
from lightning_hsu._engine.optimizer_steps import OptimizerSteps, Part
from lightning_hsu._engine.plan import StepContext, allowance_of, limit_of_gradient
from lightning_hsu._engine.rates import Rate, Rates, largest_gain
from lightning_hsu._engine.sharing import Gradients, Job, begin, is_shared, may_be_sent
from lightning_hsu._engine.state import ShareMeans
from lightning_hsu._neurons.placement import NeuronView, Placement
from lightning_hsu.coefficients import Share
from lightning_hsu.measures import State

GradView = tuple[nn.Parameter, Tensor, Tensor]
"""A parameter, the part of its ``.grad`` that a layer's neurons own, and what to add there."""


class Weighted(NamedTuple):
    """What is added to a layer's gradient, or moves its neurons.

    Args:
        grad: The weighted gradient (groups, n, d).
        factor: By what the step limit shortened its rows (groups, n, 1).
        held: By what the task's gradient shortened all of it (1,), in [0, 1]; None without such a
            limit.
    """

    grad: Tensor
    factor: Tensor
    held: Tensor | None


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """One layer about to get its gradient, or about to move.

    Args:
        layer: The layer.
        learning_rates: Those of the parameters that may be changed, by id.
        rate: The learning rate with which its neurons will move.
        view: Its neurons, read while gradients were recorded.
        state: What its measure carries from step to step, prepared for these neurons.
        grad_scale: Factor by which the task's gradients are still scaled.
    """

    layer: Layer
    learning_rates: Rates
    rate: Rate
    view: NeuronView
    state: State | None = None
    grad_scale: float = 1.0

    @property
    def neurons(self) -> Tensor:
        """The neurons (groups, n, d) without a graph, in float32 or wider."""
        return to_compute_dtype(self.view.x.detach())

    def update_share(self, share: Share, grad: Tensor, means: ShareMeans) -> None:
        """Update the means of a share with this step's penalty gradient (groups, n, d)."""
        views = self.grad_views(grad / grad.shape[0])
        if views:
            task, penalty = self._norms(views)
            means.update(self.layer.name, share, task / self.grad_scale, penalty)

    def use(self) -> Use:
        """This update's layer, for a kept gradient."""
        return use_of(self.layer, self.view.x.detach())

    def allowance(self, context: StepContext) -> Allowance | None:
        """What the task's gradient limits here; None if nothing.

        A share is a limit of its own. What is added to a gradient is a share by its coefficient
        alone, but where the task has no gradient a share limit keeps it away, too. What moves the
        neurons is held to a share of the optimizer's step.
        """
        strength = self.layer.strength
        if context.moves and isinstance(strength, Share):
            return Allowance(strength.fraction)
        rescaled = self.learning_rates.rescaled
        is_rescaled = any(id(p) in rescaled for p in self.layer.parameters)
        found = allowance_of(is_rescaled, context)
        if found is None or not self.layer.has_share:
            return found
        if found.share is not None:
            return found._replace(share=ANY_SHARE)
        return found

    def gain(self, context: StepContext) -> float:
        """What the optimizer makes of a steady gradient, unless the neurons move past it."""
        if context.moves:
            return 1.0
        return largest_gain(self.layer.parameters, self.learning_rates)

    def limit(self, context: StepContext) -> Tensor | float | None:
        """The largest length of a neuron's gradient over the neuron's norm, but for the task's."""
        return limit_of_gradient(context.step_limit, self.rate, self.gain(context))

    def weighted(self, grad: Tensor, coefficient: Tensor | float, context: StepContext) -> Weighted:
        """Multiply a gradient (groups, n, d) by coefficient / groups, within both limits.

        Args:
            grad: The gradient, which is overwritten.
            coefficient: The coefficient.
            context: The step.
        """
        scale = coefficient / grad.shape[0]
        allowance = self.allowance(context)
        limit = self.limit(context)
        task = None
        if allowance is not None:
            if context.steps is None:
                task, entries = self._task(grad)
            else:
                task, entries = self._step(grad, context.steps)
            if allowance.counts_in_task and limit is not None:
                of_ones = math.sqrt(entries)
                counted = task
                if allowance.share is None:
                    (counted,) = with_ones([task], [of_ones])
                limit = limit * counted / of_ones
        largest = torch.finfo(self.view.x.dtype).max / 2
        factor = shortening(grad, self.neurons, scale, limit, largest)
        grad.mul_(factor * scale)
        if task is None or allowance is None or allowance.share is None:
            return Weighted(grad, factor, None)
        parts = [part for _, _, part in self.grad_views(grad)]
        if not parts:
            return Weighted(grad, factor, None)
        total = self.layer.target.placement.norm(parts)
        held = held_factors(total.reshape(1), task.reshape(1), allowance.share)
        return Weighted(grad.mul_(held.to(grad.dtype)), factor, held)

    def stats(self, weighted: Weighted) -> GradientStats | None:
        """Describe what is added; None if nothing can be."""
        grad, factor, held = weighted
        views = self.grad_views(grad)
        if not views:
            return None
        task, penalty = self._norms(views)
        first_parameter = views[0][0]
        is_held = penalty.new_zeros(())
        shortened = factor < 1
        if held is not None:
            is_shorter = held < less_rounding(penalty.dtype)  # a share may be met to a rounding
            is_held = is_shorter.to(penalty.dtype).reshape(())
            is_live = (self.neurons != 0).any(-1, keepdim=True)
            shortened = shortened | (is_shorter & is_live)
        limited = self.layer.target.placement.any_holder(shortened, first_parameter)
        unscaled = task / self.grad_scale
        share = penalty / unscaled
        # Of a sharded layer this rank has some rows only, whose norm is not that of all.
        total = penalty if self.layer.rows is not None else torch.linalg.vector_norm(grad)
        strong = strong_neurons(grad, total.to(grad), share.to(grad))
        strong = self.layer.target.placement.any_holder(strong, first_parameter)
        return GradientStats(share, limited.sum(), strong.sum(), unscaled, is_held)

    def add(self, grad: Tensor) -> None:
        """Add a weighted gradient (groups, n, d) to ``.grad``."""
        for p, task, part in self.grad_views(grad):
            factor = self.factor_of(p)
            task.add_(part if factor == 1.0 else part * factor)

    def factor_of(self, p: nn.Parameter) -> float:
        """What a weighted gradient is multiplied by before it is added to the parameter's."""
        if id(p) in self.learning_rates.ascending:  # maximize=True: the step adds what is here
            return -self.grad_scale
        return self.grad_scale

    def grad_views(self, grad: Tensor) -> list[GradView]:
        """The tensors that a gradient (groups, n, d) of the neurons is added to."""
        return list(self.layer.target.grad_views(self.view, grad, self.learning_rates))

    def move(self, grad: Tensor) -> None:
        """Move by learning rate times a weighted gradient (groups, n, d), along the sphere.

        Neurons that are entries of a parameter keep their norms. If neurons are computed from
        parameters, the parameters move along the gradient pulled back to them.
        """
        target = self.layer.target
        are_entries = target.rearranges(self.view)
        change = -grad
        if are_entries:
            change = along_the_sphere(self.neurons, grad, self.rate)
        views = target.grad_views(self.view, change, self.learning_rates, values=True)
        for p, value, part in list(views):
            value.add_(part if are_entries else part * self.learning_rates[id(p)])

    def _task(self, grad: Tensor) -> tuple[Tensor, int]:
        """Norm of the task's gradient, unscaled, 0 if it is not finite; and how many entries it has."""
        tasks = []
        entries = 0
        for p, task, _ in self.grad_views(grad):
            tasks.append(self.layer.target.own_part(self.view, p, task))
            entries += task.numel()
        if not tasks:
            return grad.new_zeros(()), 1
        if self.view.parameter is not None:  # which may be sharded, and hold other neurons as well
            entries = self.view.x.numel()
        norm = self.layer.target.placement.norm(tasks) / self.grad_scale
        return norm.nan_to_num(0.0, 0.0, 0.0), entries

    def parts(self, grad: Tensor) -> list[Part]:
        """What the layer owns of its parameters.

        Args:
            grad: Its gradient (groups, n, d), of any content.
        """
        placement = self.layer.target.placement
        found = []
        for p, task, _ in self.grad_views(grad):
            if not placement.is_sharded(p):
                found.append(Part(p, task, task.numel(), partial(_entries_of, p, task)))
                continue
            ones = torch.ones_like(task)
            belongs = placement.local(self.layer.target.own_part(self.view, p, ones)) != 0
            of = partial(self._held_entries_of, p, belongs)
            own = torch.where(belongs, placement.local(task), 0.0)
            entries = task.numel()
            if self.view.parameter is not None:
                entries = self.view.x.numel()
            found.append(Part(p, own, entries, of, partial(placement.total, p=p)))
        return found

    def _held_entries_of(self, p: nn.Parameter, belongs: Tensor, x: Tensor) -> Tensor | None:
        """What this rank holds of a tensor that is sharded as a parameter is; None if it is not.

        Args:
            p: The parameter.
            belongs: Which of its entries are the layer's, as this rank holds them.
            x: The tensor.
        """
        placement = self.layer.target.placement
        if x.shape != p.shape or not placement.is_sharded(x):
            return None
        return torch.where(belongs, placement.local(x), 0.0)

    def _step(self, grad: Tensor, steps: OptimizerSteps) -> tuple[Tensor, int]:
        """Norm of what the optimizer has made of the task's gradient, 0 if that is not finite.

        And how many entries it has. If the parameters are sharded this is a collective call.
        """
        parts = self.parts(grad)
        if not parts:
            return grad.new_zeros(()), 1
        norm = torch.linalg.vector_norm(torch.stack(steps.lengths(parts)))
        return norm.nan_to_num(0.0, 0.0, 0.0), sum(part.entries for part in parts)

    def _norms(self, views: list[GradView]) -> tuple[Tensor, Tensor]:
        """Norms of the task's gradient, as it is in ``.grad``, and of the penalty's."""
        target = self.layer.target
        tasks = [target.own_part(self.view, p, task) for p, task, _ in views]
        penalties = [part for _, _, part in views]
        return target.placement.norm(tasks), target.placement.norm(penalties)


def _entries_of(p: nn.Parameter, own: Tensor, x: Tensor) -> Tensor | None:
    """The entries of a tensor that is like a parameter; None if it is not.

    Args:
        p: The parameter.
        own: Those of its ``.grad``.
        x: The tensor.
    """
    assert p.grad is not None
    if x.shape != p.shape:
        return None
    if own.numel() == p.numel():
        return x
    if x.stride() != p.grad.stride():
        return None
    offset = int(own.storage_offset()) - int(p.grad.storage_offset()) + int(x.storage_offset())
    return x.as_strided(own.shape, own.stride(), offset)


def penalty_gradients(updates: Sequence[LayerUpdate], placement: Placement) -> list[Tensor]:
    """Gradient (groups, n, d) of each layer's penalty, summed over its groups.

    Small layers of equal shape are computed together, on a GPU layers of any shapes. Each large layer
    is computed by one of the ranks that train the same weights. For a sharded layer only the rows
    that this rank holds are computed, against all rows; the others are zero.
    """
    shared = []
    joined = []
    stacks: dict[object, list[int]] = {}
    for i, update in enumerate(updates):
        if is_shared(update.layer, placement) and may_be_sent(update.state):
            shared.append(i)
        elif goes_together(update.layer):
            joined.append(i)
        else:
            stacks.setdefault(_stack_key(i, update), []).append(i)
    found: dict[int, Tensor] = {}
    with _begin_shared([updates[i] for i in shared], placement) as from_ranks:
        members = [(updates[i].layer, updates[i].view.x.detach()) for i in joined]
        found |= dict(zip(joined, gradients_of(members), strict=True))
        for stack in stacks.values():
            neurons = [updates[i].neurons for i in stack]
            first = updates[stack[0]]
            x = torch.cat(neurons) if len(neurons) > 1 else neurons[0]
            if first.layer.rows is None:
                grad = gradient_of([updates[i].layer for i in stack], x, first.state)
            else:
                grad = first.layer.measure.gradient_rows(x, first.layer.rows, first.state)
            parts = torch.split(grad, neurons[0].shape[0])
            found |= dict(zip(stack, parts, strict=True))
        found |= dict(zip(shared, from_ranks.wait(), strict=True))
    return [found[i] for i in range(len(updates))]


def _stack_key(i: int, update: LayerUpdate) -> object:
    """What layers that are computed together have in common; ``i`` for a layer on its own."""
    x = update.view.x
    if update.state is not None or update.layer.rows is not None or x.numel() > SMALL:
        return i
    return update.layer.measure, x.shape, x.dtype, x.device


def _begin_shared(updates: Sequence[LayerUpdate], placement: Placement) -> Gradients:
    """Begin to compute the gradients of layers that the ranks divide among themselves."""

    def compute(chosen: Sequence[int], outs: Sequence[Tensor]) -> None:
        for i, out in zip(chosen, outs, strict=True):
            update = updates[i]
            out.copy_(gradient_of([update.layer], update.neurons, update.state))

    return begin([Job(one.layer, one.view.x) for one in updates], compute, placement)
