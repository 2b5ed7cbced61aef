"""Calls in one's own loop that cannot do what they are for, each told once by a warning.

What is known about a loop is read from autograd: which parameters have a gradient, and how often a
tensor was changed in place (its version). Nothing here waits for a device, except where a warning
is about to be given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hsu._core.autograd import saved_tensors
from lightning_hsu._engine.discarded import AddedGradient
from lightning_hsu._engine.layer import Layer, version_of
from lightning_hsu._engine.rates import held_by
from lightning_hsu._engine.warn import warn

ADD = "add_gradients"
MOVE = "move"

_ORDER = {
    ADD: (
        "optimizer.zero_grad(), the forward pass, loss.backward(), "
        "regularizer.add_gradients(optimizer), optimizer.step()"
    ),
    MOVE: (
        "optimizer.zero_grad(), the forward pass, loss.backward(), optimizer.step(), "
        "regularizer.move(optimizer)"
    ),
}
_STEPS_OF_OTHERS = 50  # a critic may step several times before the model that is attached
_ROUNDS_OF_OTHERS = 2  # each parameter may have an optimizer: the biases' may come first
_STEPS_WITHOUT = 10  # a layer may be dropped in its first steps
_MOST_GRAPHS = 20
_MOST_NAMES = 3
_NO_GRAPH = (
    "penalty() has no graph, so a loss that it is added to gets no gradient from it: gradients are "
    "switched off (torch.no_grad, torch.inference_mode), or the weights were made in inference mode. "
    "For a log call model.eval() first, or use measure_layers()"
)
_NO_STEP = (
    "penalty() is called without a step, so that scheduled coefficients stay those of step 0: call "
    "penalty(step) with the optimizer steps done"
)
_EVERY_STEP = (
    "penalty() computes every layer at each call, whatever tolerance and every_n_steps say: use "
    "add_to_loss(loss, optimizer), add_gradients(optimizer) or move(optimizer), which follow them"
)
_LATE = (
    "the weights have changed since penalty() was computed, so backward() adds the gradient at former "
    "weights: call penalty() anew in each step"
)
_CONSTANT = (
    "penalty() is a constant here: it reads the model's own parameters, not those that torch.func "
    "differentiates or maps. Call it in the forward of a module that torch.func.functional_call runs"
)


class CallOrder:
    """Whether the calls of a loop are in an order in which the penalty can act.

    Only the first steps of each optimizer are looked at, and of ``add_gradients`` whether it is
    called again without a step. Parameters are kept themselves: ``torch.utils.swap_tensors``
    refuses those with weak references.
    """

    def __init__(self) -> None:
        self._versions: dict[int, tuple[nn.Parameter, int]] = {}
        self._seen: list[_SeenOptimizer] = []
        self._waiting: list[_WaitingOptimizer] = []
        self._steps_of_others = 0
        self._told: set[str] = set()

    def begin(self, layers: Sequence[Layer]) -> None:
        """Note the versions of the parameters of layers that were just attached.

        With a gradient a parameter may be between a step and what follows it.
        """
        for layer in layers:
            if layer.sharded:
                continue
            for p in layer.parameters:
                version = version_of(p)
                if version is not None and p.grad is None:
                    self._versions[id(p)] = (p, version)

    def follow(self, layers: Sequence[Layer]) -> None:
        """Drop what is known of parameters that are no longer those of a layer."""
        current = {id(p) for layer in layers for p in layer.parameters}
        gone = self._versions.keys() - current
        for key in gone:
            del self._versions[key]
        for one in self._seen:
            one.follow(current)

    def check(self, call: str, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Warn if this call, which is about to act, comes at the wrong place.

        Args:
            call: ``ADD`` or ``MOVE``.
            optimizer: The optimizer that it is called with.
            layers: The layers of the attached model.
        """
        seen = self._find(optimizer)
        if seen is not None:
            if call == ADD:
                if "again" not in self._told and seen.adds_again():
                    self._told.add("again")
                    warn(_added_again(seen.named))
                seen.begin()
            return
        trained = [layer for layer in layers if layer.strength != 0 and layer.trainable]
        if not trained or "order" in self._told:
            return
        held = held_by(optimizer)
        mine = [layer for layer in trained if not held.isdisjoint(map(id, layer.parameters))]
        reached = [layer for layer in mine if layer.rates(dict.fromkeys(held, 1.0))]
        if reached:
            self._meet(call, optimizer, reached)
        elif mine:
            waits = self._count(optimizer) < _STEPS_WITHOUT
            if waits and any(map(_has_gradient, trained)):
                return
            self._told.add("order")
            warn(_no_gradient(call, mine))
        elif not self._seen:
            self._check_other(call, optimizer, trained)

    def added(self, optimizer: Optimizer) -> None:
        """Note that gradients have just been added."""
        seen = self._find(optimizer)
        if seen is not None:
            seen.note_added()

    def _meet(self, call: str, optimizer: Optimizer, reached: Sequence[Layer]) -> None:
        """Look at the first call with an optimizer that has a gradient for layers."""
        self._seen = [one for one in self._seen if one.optimizer() is not None]
        self._waiting = [one for one in self._waiting if one.is_another(optimizer)]
        seen = _SeenOptimizer(optimizer, reached)
        self._seen.append(seen)
        if call == ADD and "discarded" not in self._told:
            message = _discarded(seen.named)
            seen.look_at_steps(partial(_tell_once, self._told, "discarded", message))
        if call == MOVE and self._has_not_stepped(optimizer, reached):
            self._told.add("order")
            warn(_moved_before_step(reached))
        for key in held_by(optimizer):
            self._versions.pop(key, None)

    def _check_other(self, call: str, optimizer: Optimizer, trained: Sequence[Layer]) -> None:
        """Warn if an optimizer that holds no layer's parameter seems to be that of the model."""
        self._steps_of_others += 1
        rounds = self._count(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        is_idle = all(p.grad is None for p in parameters)
        is_often = rounds >= _ROUNDS_OF_OTHERS and self._steps_of_others >= _STEPS_OF_OTHERS
        trains_nothing = is_idle and not any(map(_has_gradient, trained))
        if is_often or trains_nothing:
            self._told.add("order")
            warn(_holds_none(call, optimizer, trained, is_idle=is_idle))

    def _count(self, optimizer: Optimizer) -> int:
        """Count a call with an optimizer that has had no gradient for a layer so far."""
        for one in self._waiting:
            if one.optimizer() is optimizer:
                one.calls += 1
                return one.calls
        self._waiting = [one for one in self._waiting if one.optimizer() is not None]
        self._waiting.append(_WaitingOptimizer(optimizer))
        return 1

    def _find(self, optimizer: Optimizer) -> _SeenOptimizer | None:
        for one in self._seen:
            if one.optimizer() is optimizer:
                return one
        return None

    def _has_not_stepped(self, optimizer: Optimizer, layers: Sequence[Layer]) -> bool:
        """Whether no layer's parameter has changed since attach, although it could have."""
        if not _counts_versions(optimizer) or len(optimizer.state) > 0:
            return False
        held = held_by(optimizer)
        grads = []
        for layer in layers:
            for p in layer.parameters:
                if p.grad is None or id(p) not in held:
                    continue
                known = self._versions.get(id(p))
                if known is None or known[1] != version_of(p):
                    return False
                grads.append(p.grad)
        has_gradient = any(bool(grad.any()) for grad in grads)
        return has_gradient and not _may_be_skipped(optimizer)

    def __reduce__(self) -> tuple[type[CallOrder], tuple[()]]:
        """Copies and pickles begin anew: they have other optimizers."""
        return CallOrder, ()


class _WaitingOptimizer:
    """An optimizer that has had no gradient for a layer so far; it is not kept alive."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.calls = 1

    def is_another(self, optimizer: Optimizer) -> bool:
        """Whether it is alive and not this one."""
        known = self.optimizer()
        return known is not None and known is not optimizer


class _SeenOptimizer:
    """An optimizer that has had a gradient for a layer, and how its last addition left things.

    Args:
        optimizer: The optimizer; it is not kept alive.
        layers: The layers for which it had a gradient. One of their parameters is looked at.
    """

    def __init__(self, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.named = _named(layers[:1])
        self._parameter: nn.Parameter | None = None
        if not layers[0].sharded:
            held = held_by(optimizer)
            mine = [p for p in layers[0].parameters if id(p) in held and p.grad is not None]
            self._parameter = min(mine, key=nn.Parameter.numel)
        self._counts_versions = _counts_versions(optimizer)
        self._added: AddedGradient | None = None
        self._grad: int | None = None  # the id: it may be freed
        self._versions: tuple[int | None, int | None] = (None, None)

    def look_at_steps(self, tell: Callable[[], None]) -> None:
        """Look whether the gradients that are added to are there at the next steps."""
        optimizer = self.optimizer()
        if optimizer is not None and self._parameter is not None:
            self._added = AddedGradient(optimizer, self._parameter, tell)

    def follow(self, current: Collection[int]) -> None:
        """Drop a parameter that is not among the current ones, by id."""
        if self._parameter is not None and id(self._parameter) not in current:
            self._parameter = self._added = self._grad = None

    def begin(self) -> None:
        """Look at the gradient that is about to be added to."""
        if self._added is None:
            return
        self._added.begin()
        if self._added.is_settled:
            self._added = None  # and its hook is off

    def note_added(self) -> None:
        """Note the gradient that was just added to, and the versions."""
        p = self._parameter
        self._grad = None
        if p is None or p.grad is None:
            return
        if self._added is not None:
            self._added.note()
        if self._counts_versions:
            self._grad = id(p.grad)
            self._versions = version_of(p), version_of(p.grad)

    def adds_again(self) -> bool:
        """Whether nothing has happened since the last addition but one more backward pass.

        Then the parameter is the same, and its gradient has changed in place once. A step that a
        GradScaler skipped leaves a new gradient, which has changed less often, or one that was also
        set to zero.
        """
        p = self._parameter
        if p is None or p.grad is None or id(p.grad) != self._grad:
            return False
        version, grad_version = self._versions
        if version is None or grad_version is None:
            return False
        once_more = version_of(p) == version and version_of(p.grad) == grad_version + 1
        return once_more and bool(p.grad.any())  # else it was only set to zero


class PenaltyChecks:
    """Whether a penalty that is computed for a loss can act, and whether the last ones are gone."""

    def __init__(self) -> None:
        self._alive: list[tuple[weakref.ref[_Token], int]] = []
        self._told: set[str] = set()

    def checked(self, penalty: Tensor, layers: Sequence[Layer]) -> Tensor:
        """Return the penalty, whose backward pass says if it comes too late.

        Warn of a penalty without a graph, and of many graphs of former steps.

        Args:
            penalty: The penalty, summed over the layers.
            layers: The layers that have a coefficient at this step, one or more.
        """
        if in_transform():
            if not any(_is_in_transform(layer) for layer in layers):
                self._tell("transform", _CONSTANT)
            return penalty
        if not penalty.requires_grad:
            if any(layer.target.module.training for layer in layers):
                self._tell("graph", _NO_GRAPH)
            return penalty
        versions: dict[nn.Parameter, int | None] = {}
        for layer in layers:
            if not layer.sharded:
                versions |= {p: version_of(p) for p in layer.parameters}
        token = _Token()
        found: Tensor = _Once.apply(penalty, self, token, versions)  # type: ignore[no-untyped-call]
        self._note_graph(token, next(iter(versions.values()), None))
        return found

    def check_call(self, *, is_scheduled: bool, skips_steps: bool) -> None:
        """Warn of a call that some settings of the regularizer cannot reach.

        Args:
            is_scheduled: Whether it has coefficients from a schedule, but no step.
            skips_steps: Whether not every layer is to be computed at each step.
        """
        if is_scheduled:
            self._tell("step", _NO_STEP)
        if skips_steps and torch.is_grad_enabled():
            self._tell("every step", _EVERY_STEP)

    def warn_of_late(self, versions: Mapping[nn.Parameter, int | None]) -> None:
        """Warn if a backward pass reaches a penalty at weights that have changed since.

        Most measures refuse this themselves: they need the weights in their backward pass.
        """
        if any(version_of(p) != version for p, version in versions.items()):
            self._tell("late", _LATE)

    def _note_graph(self, token: _Token, version: int | None) -> None:
        """Note a graph that lives as long as its token, and the version of one of its weights."""
        if "alive" in self._told or version is None:
            return
        alive = [one for one in self._alive if one[0]() is not None]
        self._alive = [*alive, (weakref.ref(token), version)]
        former = len({before for _, before in alive} - {version})
        if former >= _MOST_GRAPHS:
            self._alive = []
            self._tell(
                "alive",
                f"the graphs of penalties of {former} former steps are still in memory. To keep a "
                "penalty for a log or a running total, take penalty.detach() or penalty.item()",
            )

    def _tell(self, what: str, message: str) -> None:
        _tell_once(self._told, what, message)

    def __reduce__(self) -> tuple[type[PenaltyChecks], tuple[()]]:
        """Copies and pickles begin anew."""
        return PenaltyChecks, ()


def in_transform() -> bool:
    """Whether a transform of torch.func, such as ``grad`` or ``vmap``, is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _is_in_transform(layer: Layer) -> bool:
    """Whether a parameter is what a transform differentiates or maps, put there for a call."""
    parameters = layer.target.module.parameters()
    return any(torch._C._functorch.is_functorch_wrapped_tensor(p) for p in parameters)


class _Once(torch.autograd.Function):
    """The penalty itself. Its backward pass comes before those of all that it was computed by."""

    @staticmethod
    def forward(
        ctx: Any,
        penalty: Tensor,
        checks: PenaltyChecks,
        token: _Token,
        versions: dict[nn.Parameter, int | None],
    ) -> Tensor:
        ctx.save_for_backward(penalty.new_empty(0))
        ctx.checks, ctx.token, ctx.versions = checks, token, versions
        return penalty.view_as(penalty)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        saved_tensors(ctx)
        ctx.checks.warn_of_late(ctx.versions)
        return grad_outputs[0], None, None, None


class _Token:
    """An object that shows by its life whether a graph is still there."""

    __slots__ = ("__weakref__",)


def _tell_once(told: set[str], what: str, message: str) -> None:
    if what not in told:
        told.add(what)
        warn(message)


def _no_gradient(call: str, layers: Sequence[Layer]) -> str:
    return (
        f"{call} found no gradient in {_named(layers)}, so there the penalty does nothing. Call in "
        f"each step: {_ORDER[call]}"
    )


def _holds_none(call: str, optimizer: Optimizer, layers: Sequence[Layer], *, is_idle: bool) -> str:
    told = (
        f"{call}: {type(optimizer).__name__} holds no parameter of {_named(layers)}, so the penalty "
        "does nothing. Attach the model whose parameters() the optimizer was built with"
    )
    if is_idle:
        told += f"; and its parameters have no gradients: call in each step {_ORDER[call]}"
    return told


def _moved_before_step(layers: Sequence[Layer]) -> str:
    return (
        f"move: {_named(layers)} has gradients, but no step has changed its weights since attach, so "
        f"move is called before optimizer.step(). Call in each step: {_ORDER[MOVE]}"
    )


def _added_again(named: str) -> str:
    return (
        f"add_gradients is called again before optimizer.step(): the gradient of {named} "
        "now includes the penalty more than once. With accumulated batches call it once a step, "
        "after the last loss.backward()"
    )


def _discarded(named: str) -> str:
    return (
        f"the gradients that add_gradients changed, in {named} for one, were discarded before "
        "optimizer.step(), so the penalty does nothing: call it after loss.backward() and before "
        f"step(), in this order: {_ORDER[ADD]}"
    )


def _named(layers: Sequence[Layer]) -> str:
    """The first few layers, with their shapes."""
    named = [f"'{layer.name}' {layer.target.shape}" for layer in layers[:_MOST_NAMES]]
    if len(layers) > _MOST_NAMES:
        named.append(f"{len(layers) - _MOST_NAMES} more")
    return f"layer {', '.join(named)}"


def _has_gradient(layer: Layer) -> bool:
    """Whether a parameter of a layer has a gradient."""
    return any(p.grad is not None for p in layer.parameters)


def _may_be_skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler may have skipped a step, as it does where any gradient is not finite."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if type(grad) is not Tensor or grad.layout != torch.strided:
                return True  # sparse, or of several ranks, of which one alone must not ask
            if not bool(torch.isfinite(grad).all()):
                return True
    return False


def _counts_versions(optimizer: Optimizer) -> bool:
    """Whether each step of an optimizer shows in the versions of its parameters.

    Torch's own do, but for the fused ones. Others may write to ``p.data``.
    """
    if any(group.get("fused") for group in optimizer.param_groups):
        return False
    for kind in type(optimizer).__mro__:
        if "step" in vars(kind) and not kind.__module__.startswith("lightning."):
            return kind.__module__.startswith("torch.optim")
    return False
