"""The plan of a step: worked out at attach, and after a change, and replayed at every step.

Most layers are *plain*: their neurons are entries of one parameter that this process holds whole,
their measure is a mean over pairs and their coefficient is a number or a schedule. A step computes
all of them at once, and reads nothing anew but numbers. The others are read anew at each step
(step.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hsu._core import PairTerm
from lightning_hsu._core.foreach import SMALL, add_all_pair_gradients, goes_in_batches
from lightning_hsu._core.limits import Allowance, TaskLimit, norms_of, with_ones
from lightning_hsu._core.updates import GradientUpdate, Item
from lightning_hsu._engine.ahead import Ahead
from lightning_hsu._engine.buffered import BufferedUpdates
from lightning_hsu._engine.layer import Layer
from lightning_hsu._engine.optimizer_steps import OptimizerSteps, Part
from lightning_hsu._engine.rates import (
    Rate,
    Rates,
    as_number,
    gain_of,
    rates_on_devices,
    rescales,
)
from lightning_hsu._engine.sharing import PlainUpdate, begin_plain, is_shared
from lightning_hsu._engine.state import TrainingState
from lightning_hsu._neurons.how import WeightRule
from lightning_hsu._neurons.placement import Placement
from lightning_hsu._neurons.placement.base import viewed_parameter
from lightning_hsu._neurons.rules import (
    class_rule,
    has_built_in_rule,
    strided,
)
from lightning_hsu._neurons.target import Target

_ROOM = 2**21
"""Entries of layers on a CPU whose buffers are there at once: 8 MiB in float32."""

_ROOM_ON_GPU = 2**29
_LOTS_ON_GPU = 6
"""The same on a GPU, where each lot takes some 20 launches: as many lots, or few more, of large models."""


@dataclass(frozen=True)
class StepContext:
    """One use of the penalty.

    Args:
        step: Steps that the optimizer has done before.
        learning_rates: Those of its parameters, by id; empty if none is known.
        factor: What the task's gradients, or its loss, are multiplied by.
        same_step: Whether this is another evaluation within the same step.
        step_limit: The largest fraction of its norm by which a step may move a neuron; None is no
            limit.
        share_limit: The largest norm of a layer's penalty gradient over that of its task gradient;
            None is no limit.
        stats: Whether to return statistics of what was done.
        moves: Whether the gradients are not added to the task's but move the neurons.
        steps: What the optimizer has made of the task's gradients, if the neurons move and there is
            a share limit, or a layer with a share; else None.
    """

    step: int
    learning_rates: Rates
    factor: Tensor | float
    same_step: bool
    step_limit: float | None
    share_limit: float | None = None
    stats: bool = False
    moves: bool = False
    steps: OptimizerSteps | None = None


class PlainLayer:
    """A layer whose neurons are entries of one whole parameter.

    Args:
        layer: The layer.
        term: The kernel of its measure.
        parameter: The parameter.
        view: Its neurons (groups, n, d), a view of the parameter; or (groups, n, ...) where their
            entries lie at several strides.
    """

    __slots__ = (
        "_dtype",
        "_is_whole",
        "_offset",
        "_shape",
        "_signature",
        "_size",
        "_strides",
        "layer",
        "parameter",
        "term",
        "view_shape",
        "view_strides",
    )

    def __init__(self, layer: Layer, term: PairTerm, parameter: nn.Parameter, view: Tensor) -> None:
        self.layer = layer
        self.term = term
        self.parameter = parameter
        self.view_shape = view.shape
        self.view_strides = view.stride()
        self._offset = int(view.storage_offset()) - int(parameter.storage_offset())
        self._shape = parameter.shape
        self._strides = parameter.stride()
        self._dtype = parameter.dtype
        self._signature = _signature(layer.target.module)
        self._size: torch.Size | None = None
        if view.ndim > 3:
            self._size = torch.Size(layer.target.shape)
        in_order = parameter.is_contiguous() and view.is_contiguous()
        self._is_whole = in_order and view.numel() == parameter.numel()

    def is_current(self) -> bool:
        """Whether the parameter's layout and the module's way to read it have not changed."""
        p = self.parameter
        if p.shape != self._shape or p.dtype != self._dtype:
            return False
        if p.stride() != self._strides and not self._lies_as_before(p):
            return False
        return _signature(self.layer.target.module) == self._signature

    def update(
        self, coefficient: float, limit: Tensor | float | None, grad_scale: float
    ) -> GradientUpdate | None:
        """What to add to the parameter's gradient; None if the two have different layouts."""
        p = self.parameter
        grad = p.grad
        if grad is None or grad.is_sparse or grad.dtype != self._dtype:
            return None
        if grad.stride() != self._strides and not self._lies_as_before(grad):
            return None
        shape, strides, offset = self.view_shape, self.view_strides, self._offset
        scale = coefficient / shape[0]  # the penalty is a mean over groups
        if self._is_whole:
            return GradientUpdate(p, grad, scale, limit, grad_scale, shape)
        w = p.as_strided(shape, strides, offset + int(p.storage_offset()))
        out = grad.as_strided(shape, strides, offset + int(grad.storage_offset()))
        return GradientUpdate(w, out, scale, limit, grad_scale, self._size)

    def part(self, update: GradientUpdate) -> Part:
        """What the layer owns of its parameter."""
        return Part(self.parameter, update.out_entries, update.size.numel(), self._entries_of)

    def _entries_of(self, x: Tensor) -> Tensor | None:
        """The neurons' entries of a tensor that is like the parameter; None if it is not."""
        if x.shape != self._shape:
            return None
        if self._is_whole:
            return x
        if x.stride() != self._strides and not self._lies_as_before(x):
            return None
        offset = self._offset + int(x.storage_offset())
        return x.as_strided(self.view_shape, self.view_strides, offset)

    def _lies_as_before(self, x: Tensor) -> bool:
        """Whether a tensor of the parameter's shape has its strides; of axes of size 1 any will do."""
        for size, stride, known in zip(self._shape, x.stride(), self._strides, strict=True):
            if size > 1 and stride != known:
                return False
        return True

    def reading(self) -> GradientUpdate:
        """An update that only tells the neurons."""
        p = self.parameter
        if self._is_whole:
            return GradientUpdate(p, p, 1.0, shape=self.view_shape)
        offset = self._offset + int(p.storage_offset())
        w = p.as_strided(self.view_shape, self.view_strides, offset)
        return GradientUpdate(w, w, 1.0, shape=self._size)

    def overlaps(self, other: PlainLayer) -> bool:
        """Whether the stretches of both within the same parameter overlap."""
        if self.parameter is not other.parameter:
            return False
        begin, end = self._stretch()
        other_begin, other_end = other._stretch()
        return begin < other_end and other_begin < end

    def _stretch(self) -> tuple[int, int]:
        """The places where the neurons begin and end within the parameter; the end is excluded."""
        steps = 0
        for size, stride in zip(self.view_shape, self.view_strides, strict=True):
            steps += (size - 1) * int(stride)
        return self._offset, self._offset + 1 + steps


class Plan:
    """What a step does, worked out once.

    Args:
        layers: The layers, in the model's order.
        placement: How their weights are placed over the ranks.

    Attributes:
        plain: Layers of which a step needs only the numbers.
        rest: Buckets of the other layers.
        buckets: All layers, in buckets.
        penalised: The layers that have a coefficient other than the number 0.
        is_active: Whether any layer has a coefficient other than the number 0.
    """

    def __init__(self, layers: Sequence[Layer], placement: Placement) -> None:
        layers = [layer for layer in layers if layer.parameters]  # others have no gradient
        self.penalised = [layer for layer in layers if layer.strength != 0]
        self.is_active = bool(self.penalised)
        self.plain = _plain_layers(layers)
        self.buckets = buckets(layers, placement)
        plain = {one.layer for one in self.plain}
        without_plain = ([layer for layer in some if layer not in plain] for some in self.buckets)
        self.rest = [some for some in without_plain if some]

    def is_current(self) -> bool:
        """Whether the parameters of the plain layers are still laid out in the same way."""
        for plain in self.plain:
            is_current = plain.is_current()
            if not is_current:
                return False
        return True

    def plain_of(self, held: Collection[int]) -> list[PlainUpdate]:
        """The plain layers that an optimizer will step, with updates that only tell the neurons.

        Args:
            held: Ids of the optimizer's parameters.
        """
        found = []
        for plain in self.plain:
            if _is_penalised(plain.layer, held):
                found.append((plain.layer, plain.term, plain.reading()))
        return found

    def layers_of(self, held: Collection[int]) -> list[Layer]:
        """The layers with a coefficient that an optimizer may step.

        Args:
            held: Ids of the optimizer's parameters.
        """
        return [layer for layer in self.penalised if _is_penalised(layer, held)]

    def rest_of(self, held: Collection[int]) -> list[Layer]:
        """The other layers that an optimizer will step and that this process holds whole.

        Args:
            held: Ids of the optimizer's parameters.
        """
        found = []
        for bucket in self.rest:
            for layer in bucket:
                if _is_penalised(layer, held) and not layer.sharded:
                    found.append(layer)
        return found

    def plain_updates(
        self, state: TrainingState, context: StepContext
    ) -> tuple[PlainUpdates, list[Layer]]:
        """The updates of the plain layers at this step, and those layers that need another way."""
        updates = PlainUpdates(need_buffers=context.moves or context.stats, has_stats=context.stats)
        left = []
        limits: dict[tuple[int, float], Tensor | float | None] = {}  # by learning rate and gain
        ascending = context.learning_rates.ascending
        gains = context.learning_rates.gains
        rescaled = context.learning_rates.rescaled
        allowances: dict[bool, Allowance | None] = {}
        limited = []
        grad_scale = float(context.factor)
        for plain in self.plain:
            p = plain.parameter
            rate = context.learning_rates.get(id(p))
            if rate is None or p.grad is None or not p.requires_grad:
                continue
            layer = plain.layer
            state.now.reached.add(layer.target.name)
            coefficient = layer.strength
            if not isinstance(coefficient, float):
                coefficient = float(state.coefficient(layer, context.step))
            if coefficient == 0:
                continue
            gain = gains.get(id(p), 1.0)
            key = id(rate), gain
            if key not in limits:
                own = 1.0 if context.moves else gain
                limits[key] = limit_of_gradient(context.step_limit, rate, own)
            update = None
            if context.moves or id(p) not in ascending:
                update = plain.update(coefficient, limits[key], grad_scale)
            if update is None:
                left.append(layer)
                continue
            updates.found.append((layer, plain.term, update))
            updates.rates[layer] = rate
            is_rescaled = id(p) in rescaled
            if is_rescaled not in allowances:
                allowances[is_rescaled] = allowance_of(is_rescaled, context)
            allowance = allowances[is_rescaled]
            if allowance is not None:
                limited.append((plain, update, allowance))
        _note_tasks(limited, context.steps)
        return updates, left


def allowance_of(is_rescaled: bool, context: StepContext) -> Allowance | None:
    """What the task's gradient limits at a step; None for nothing.

    What is added to a gradient goes through the optimizer as the task's does, so that their ratio
    stays. What moves the neurons past the optimizer is compared with what this has made of the task's
    (:class:`OptimizerSteps`).

    Args:
        is_rescaled: Whether the optimizer divides gradients by their size.
        context: The step.
    """
    share = context.share_limit
    if context.moves:
        return None if share is None else Allowance(share)
    counts_in_task = is_rescaled and context.step_limit is not None
    if share is None and not counts_in_task:
        return None
    return Allowance(share, counts_in_task)


def _note_tasks(
    limited: Sequence[tuple[PlainLayer, GradientUpdate, Allowance]], steps: OptimizerSteps | None
) -> None:
    """Let updates know what the task's gradients allow, which are read in few calls.

    Args:
        limited: Layers, with their updates and what is limited.
        steps: What the optimizer has made of the gradients, if that counts.
    """
    if not limited:
        return
    if steps is None:
        norms = norms_of([update.out_entries for _, update, _ in limited])
    else:
        norms = steps.lengths([plain.part(update) for plain, update, _ in limited])
    without_share = []
    for norm, (_, update, allowance) in zip(norms, limited, strict=True):
        if allowance.counts_in_task and update.limit is None:
            allowance = allowance._replace(counts_in_task=False)
        update.task = TaskLimit(norm, allowance)
        if allowance.share is None:
            without_share.append(update)
    if without_share:
        _count_in_ones(without_share)


def _count_in_ones(updates: Sequence[GradientUpdate]) -> None:
    """Let task gradients of 0, or not finite ones, count as ones: no share limit keeps all away."""
    tasks = []
    norms = []
    of_ones = []
    for update in updates:
        assert update.task is not None
        tasks.append(update.task)
        norms.append(update.task.norm)
        of_ones.append(math.sqrt(update.size.numel()) * update.grad_scale)
    for update, task, norm in zip(updates, tasks, with_ones(norms, of_ones), strict=True):
        update.task = task._replace(norm=norm)


def _is_penalised(layer: Layer, held: Collection[int]) -> bool:
    """Whether an optimizer steps a layer that has a coefficient.

    Args:
        layer: The layer.
        held: Ids of the optimizer's parameters.
    """
    if layer.strength == 0:
        return False
    return any(id(p) in held and p.requires_grad for p in layer.parameters)


class PlainUpdates:
    """The updates of the plain layers at one step.

    Args:
        need_buffers: Whether the updates go through buffers, for stats or to move the neurons.
        has_stats: Whether stats are asked for.

    Attributes:
        found: The layers, with the kernels of their measures and their updates.
        rates: The learning rates with which their neurons will move.
        alone: Layers that each rank computes by itself.
        buffered: The buffers, after :meth:`begin_buffers`; None without.
    """

    def __init__(self, *, need_buffers: bool, has_stats: bool) -> None:
        self.need_buffers = need_buffers
        self.found: list[PlainUpdate] = []
        self.rates: dict[Layer, Rate] = {}
        self.alone: Collection[Layer] = ()
        self.buffered: BufferedUpdates | None = None
        self._has_stats = has_stats

    def lots(self, ahead: Ahead, placement: Placement) -> list[PlainUpdates]:
        """The updates in parts whose buffers take little memory.

        What is computed in one stack stays together: it is as fast, and has the same bits. On a GPU
        layers of any shapes are, so that there the parts are large.

        Args:
            ahead: Gradients that were computed after the last step.
            placement: How the weights are placed over the ranks. Where these share the work they
                do it for all layers at once.
        """
        if placement.shares_work or not self.found:
            return [self]
        sizes = [update.entries.numel() for _, _, update in self.found]
        room = _ROOM
        _, term, first = self.found[0]
        if goes_in_batches(first, term):
            room = room_on_gpu(sizes)
        begun = ahead.stacks()
        stacks: dict[object, list[int]] = {}
        for i, (layer, _, _) in enumerate(self.found):
            alone = layer if sizes[i] > SMALL else None
            stacks.setdefault(begun.get(layer, alone), []).append(i)
        members = list(stacks.values())
        filled = [sum(sizes[i] for i in own) for own in members]
        lots: list[PlainUpdates] = []
        for run in runs_that_fit(members, filled, room):
            lot = PlainUpdates(need_buffers=True, has_stats=self._has_stats)
            lot.rates = self.rates
            for own in run:
                lot.found += [self.found[i] for i in own]
            lots.append(lot)
        return lots

    def begin_buffers(self) -> BufferedUpdates:
        """Make the buffers, through which the updates go from now on."""
        buffered = BufferedUpdates(has_stats=self._has_stats)
        for layer, _, update in self.found:
            buffered.take(layer.target.name, update, self.rates[layer])
        buffered.begin()
        self.buffered = buffered
        return buffered

    def add(self, placement: Placement) -> None:
        """Add the gradients, all at once; ranks compute large layers for one another."""
        own, shared = self.found, []
        if placement.shares_work:
            own = []
            for one in self.found:
                layer, _, _ = one
                if layer not in self.alone and is_shared(layer, placement):
                    shared.append(one)
                else:
                    own.append(one)
        by_term: dict[PairTerm, list[GradientUpdate]] = {}
        for _, term, update in own:
            by_term.setdefault(term, []).append(update)
        if not shared:
            add_all_pair_gradients(by_term)
            return
        with begin_plain(shared, placement) as from_ranks:
            add_all_pair_gradients(by_term)
            outs, grads = [], []
            for (_, _, update), grad in zip(shared, from_ranks.wait(), strict=True):
                outs.append(update.out_entries)
                grads.append(grad.view(update.out_entries.shape))
            torch._foreach_add_(outs, grads)


def room_on_gpu(sizes: Sequence[int]) -> int:
    """Entries of layers on a GPU that are in memory at once, if these are the sizes of all."""
    return max(_ROOM_ON_GPU, sum(sizes) // _LOTS_ON_GPU)


def runs_that_fit(items: Sequence[Item], sizes: Sequence[int], room: int) -> list[list[Item]]:
    """Divide items into runs of up to ``room`` entries; a larger item is a run of its own."""
    runs: list[list[Item]] = []
    filled = 0
    for item, size in zip(items, sizes, strict=True):
        if not runs or filled + size > room:
            runs.append([])
            filled = 0
        runs[-1].append(item)
        filled += size
    return runs


@dataclass(frozen=True)
class _Bucket:
    """Layers that must be computed together, and what they have in common with others."""

    labels: set[object]
    layers: list[Layer]


def buckets(layers: Sequence[Layer], placement: Placement) -> list[list[Layer]]:
    """Buckets of layers that must be computed together.

    Such layers share a parameter or a sharded module, are small and of one shape, or are divided
    over ranks. A bucket has no others, since all its gradients are in memory at once; on a GPU
    buckets are joined as far as there is room (together.py).
    """
    found: list[_Bucket] = []
    for layer in layers:
        bucket = _Bucket(_labels(layer, placement), [layer])
        others = []
        for known in found:
            if known.labels & bucket.labels:
                bucket = _Bucket(known.labels | bucket.labels, known.layers + bucket.layers)
            else:
                others.append(known)
        found = [*others, bucket]
    return [bucket.layers for bucket in found]


def learning_rates(optimizer: Optimizer) -> Rates:
    """Learning rates of the optimizer's parameters, by id, without host-device synchronisation."""
    rates = Rates()
    ascending: set[int] = set()
    rescaled: set[int] = set()
    gains: dict[int, float] = {}
    maximizes = getattr(optimizer, "maximize", False) is True  # as some keep it
    for group in optimizer.param_groups:
        params = group["params"]
        rate = group.get("lr")
        is_negative = False
        if isinstance(rate, Tensor) and rate.device.type != "cpu":
            rates.update(rates_on_devices(rate, params))
        else:
            if type(rate) is not float:
                rate = as_number(rate)
            is_negative = rate < 0
            if rate != rate:
                rates.unknown_in = type(optimizer).__name__
            rates.update(dict.fromkeys(map(id, params), abs(rate)))
        if bool(group.get("maximize", maximizes)) != is_negative:
            ascending.update(map(id, params))
        gain = gain_of(group)
        if gain != 1.0:
            gains.update(dict.fromkeys(map(id, params), gain))
        if rescales(optimizer, group):
            rescaled.update(map(id, params))
    if ascending:
        rates.ascending = ascending
    if gains:
        rates.gains = gains
    if rescaled:
        rates.rescaled = rescaled
    return rates


def limit_of_gradient(
    step_limit: float | None, rate: Rate, gain: float = 1.0
) -> Tensor | float | None:
    """Largest length of a neuron's gradient over the neuron's norm; None is no limit.

    Args:
        step_limit: The largest fraction of its norm by which a step may move a neuron.
        rate: The learning rate.
        gain: What the optimizer makes of a steady gradient.
    """
    if step_limit is None or not gain > 0:
        return None
    step_limit = step_limit / gain
    if isinstance(rate, Tensor):
        return step_limit / rate.clamp_min(torch.finfo(torch.float32).tiny)
    if not rate > 0:  # 0, or not known
        return None
    return step_limit / rate


def _labels(layer: Layer, placement: Placement) -> set[object]:
    """What a layer may have in common with others of its bucket."""
    if layer.sharded:
        return {id(layer.target.module)}
    shape = layer.target.shape
    labels: set[object] = {id(p) for p in layer.parameters}
    if math.prod(shape) <= SMALL:
        labels.add((layer.measure, shape))
    if is_shared(layer, placement):
        labels.add("shared")
    return labels


def _plain_layers(layers: Sequence[Layer]) -> list[PlainLayer]:
    """The plain layers, without those that share or overlap in a parameter with another layer."""
    found = []
    others: set[int] = set()  # ids of the parameters of layers that are not plain
    for layer in layers:
        plain = _as_plain(layer)
        if plain is None:
            others.update(id(p) for p in layer.parameters)
        else:
            found.append(plain)
    by_parameter: dict[int, list[PlainLayer]] = {}
    for one in found:
        by_parameter.setdefault(id(one.parameter), []).append(one)
    kept = []
    for one in found:
        sharing = by_parameter[id(one.parameter)]
        if id(one.parameter) not in others and not _overlaps_any(one, sharing):
            kept.append(one)
    return kept


def _overlaps_any(one: PlainLayer, others: Sequence[PlainLayer]) -> bool:
    return any(one.overlaps(other) for other in others if other is not one)


def _as_plain(layer: Layer) -> PlainLayer | None:
    """A layer as a plain one; None if a step needs more than its numbers."""
    term = layer.measure.pair_term()
    if term is None or layer.measure.has_state or layer.has_share or layer.rows is not None:
        return None
    if layer.sharded:
        return None
    module, rule = layer.target.module, layer.target.rule
    is_torch_layer = rule is class_rule and has_built_in_rule(module)
    if not is_torch_layer and not isinstance(rule, WeightRule):
        return None  # a user's rule may return other neurons at another time
    view = layer.target.read()
    x, parameter = view.x, view.parameter
    if parameter is None:  # a rule copies what lies at several strides
        in_place = strided(rule, module)
        if in_place is None:
            return None
        x, parameter = in_place, viewed_parameter(in_place, {})
    if parameter is None or not _is_read_directly(layer.target, parameter):
        return None
    return PlainLayer(layer, term, parameter, x)


def _signature(module: nn.Module) -> tuple[object, ...]:
    """What decides, besides its parameters, how a module with a built-in rule is read."""
    settings = module.__dict__
    hooks = tuple(module._forward_pre_hooks)
    return type(module), settings.get("groups"), settings.get("padding_idx"), hooks


def _is_read_directly(target: Target, parameter: nn.Parameter) -> bool:
    """Whether the module's weight is this parameter itself, and nothing computes or replaces it."""
    module = target.module
    if hasattr(module, "parametrizations"):
        return False
    for name, p in module._parameters.items():
        if p is not parameter:
            continue
        if "weight" in name or name == getattr(target.rule, "attribute", None):
            is_computed_by_hook = name in module.__dict__  # as the older weight_norm leaves it
            is_property = hasattr(type(module), name)
            return not is_computed_by_hook and not is_property
    return False
