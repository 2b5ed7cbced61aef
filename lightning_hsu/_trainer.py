"""What the callback needs to know about a Trainer, and its warnings."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities.core import rank_zero
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from lightning_hsu._checks import listed
from lightning_hsu._engine.late import LateNumbers
from lightning_hsu._engine.layer import Layer
from lightning_hsu._engine.moves import reads_late
from lightning_hsu._engine.rates import held_by
from lightning_hsu._engine.stored import Dropped
from lightning_hsu._engine.warn import warn_at
from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu._monitor.text import counted, shape_of
from lightning_hsu._neurons.placement import known_strategies, placement_for_strategy
from lightning_hsu._optimizers import AfterStep
from lightning_hsu.regularizer import UniformityRegularizer


def _bases() -> tuple[type, ...]:
    """The class Callback of lightning and, if it is installed, that of pytorch_lightning."""
    log = rank_zero.log
    category = rank_zero.rank_zero_deprecation_category
    try:
        return pl.Callback, import_module("pytorch_lightning").Callback
    except Exception:  # not installed, or broken: then nobody has a Trainer from it
        return (pl.Callback,)
    finally:
        # Each package, once imported, sends all messages through its own logger. The user may have
        # silenced the other one.
        rank_zero.log = log
        rank_zero.rank_zero_deprecation_category = category


@rank_zero_only
def _warn(message: str) -> None:
    """Warn at the line that calls this, on the first rank."""
    warn_at(sys._getframe(2), message)  # the first is of the decorator


if TYPE_CHECKING:
    EveryCallback = pl.Callback
else:
    EveryCallback = type(
        "EveryCallback", _bases(), {"__doc__": "A callback for Trainers of either package."}
    )


class OpenStep:
    """The optimizer step under way, and the state from before it.

    A step that is interrupted will be done again, from that state.
    """

    def __init__(self) -> None:
        self._trainer: weakref.ref[pl.Trainer] | None = None
        self._step = -1
        self._state: dict[str, Any] = {}
        self._counted: list[int | None] = []  # the optimizer whose step is already counted

    def begin(self, trainer: pl.Trainer, state: Callable[[], dict[str, Any]]) -> None:
        """Keep the state, unless this step has already begun."""
        if self._trainer is None or self._step != trainer.global_step:
            self._trainer = weakref.ref(trainer)
            self._step = trainer.global_step
            self._state = state()
            self._counted = []

    def is_counted(self, index: int | None) -> bool:
        """Whether the step of the optimizer at this position is counted; a closure then reruns."""
        return index in self._counted

    def count(self, index: int | None) -> None:
        """Note that the step of the optimizer at this position is counted."""
        self._counted = [index]

    def end(self) -> None:
        """Note that the step is complete, whether or not Lightning counts it."""
        self._trainer = None
        self._counted = []

    def state_before(self) -> dict[str, Any] | None:
        """The state from before the step; None if no step is under way."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None or self._step != trainer.global_step:
            return None
        return self._state


def check_prefix(prefix: object) -> None:
    """Refuse a prefix that is not a name."""
    if not isinstance(prefix, str) or not prefix or prefix.endswith("/"):
        raise ValueError(
            f"prefix must be a name such as 'hsu', without a slash at its end; got {prefix!r}"
        )


def check_prefix_for_trainer(callback: pl.Callback) -> None:
    """Refuse another callback of the same prefix before Lightning does.

    A Trainer that is made asks each callback for its ``state_key`` and refuses two alike, in words
    that do not say what to change. No hook comes before that, but the property can see who asks:
    Lightning's check, which has the list of callbacks. For every other caller nothing happens.

    Raises:
        ValueError: if the list has another callback with this one's prefix.
    """
    asking = sys._getframe(2)  # whoever reads the property
    if asking.f_code.co_name == "_validate_callbacks_list":
        _refuse_equal_prefixes([callback, *asking.f_locals.get("callbacks", [])])


def check_prefixes(callback: pl.Callback, trainer: pl.Trainer) -> None:
    """Refuse callbacks of one prefix that came later, by ``configure_callbacks`` or ``append``.

    If all of them only monitor there is a warning, from the first.

    Raises:
        ValueError: if two have the same prefix.
    """
    callbacks = _callbacks_of(trainer)
    try:
        _refuse_equal_prefixes(callbacks)
    except ValueError as error:
        for one in _ours(callbacks):
            regularizer = _regularizer(one)
            if regularizer is not None and not regularizer.only_monitors:
                raise
        if callback is _ours(callbacks)[0]:
            _warn(str(error))


def _refuse_equal_prefixes(callbacks: Sequence[pl.Callback]) -> None:
    """Refuse two of our callbacks that have the same prefix."""
    seen: dict[str, pl.Callback] = {}
    for one in _ours(callbacks):
        prefix = str(getattr(one, "prefix", ""))
        if seen.setdefault(prefix, one) is not one:
            raise ValueError(
                f"two HypersphericalUniformity callbacks have the prefix '{prefix}', so that one's "
                "metrics and state would replace the other's: give each its own, such as "
                f"prefix='{prefix}_2'"
            )


def _callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The callbacks of a Trainer, in its order."""
    callbacks: list[pl.Callback] = vars(trainer)["callbacks"]  # Lightning does not declare them
    return callbacks


def _ours(callbacks: Sequence[pl.Callback]) -> list[pl.Callback]:
    """Those of the callbacks that have a regularizer."""
    return [one for one in callbacks if _regularizer(one) is not None]


def _regularizer(callback: pl.Callback) -> UniformityRegularizer | None:
    """The regularizer of one of our callbacks; None if it is another's."""
    found = callback.__dict__.get("regularizer")
    return found if isinstance(found, UniformityRegularizer) else None


def warn_added_up(callback: pl.Callback, trainer: pl.Trainer) -> None:
    """Warn of layers that an earlier callback penalises, too: the penalties add up."""
    mine: set[tuple[int, str]] = set()
    for weights in _penalised(callback).values():
        mine |= weights
    for other in _ours(_callbacks_of(trainer)):
        if other is callback:
            continue
        common = []
        for name, weights in _penalised(other).items():
            if not weights.isdisjoint(mine):
                common.append(name)
        if common:
            prefixes = f"'{getattr(other, 'prefix', '')}' and '{getattr(callback, 'prefix', '')}'"
            _warn(
                f"the callbacks with the prefixes {prefixes} both penalise layer "
                f"{listed(map(repr, common))}: their penalties add up, each to its own limits, so that "
                "these add up, too. If that is not meant, leave the layer out of one of them with exclude=, "
                "or give it a coefficient of 0 there."
            )


def _penalised(callback: pl.Callback) -> dict[str, set[tuple[int, str]]]:
    """The layers with a coefficient that a callback has found so far.

    Each has the ids of its parameters, with the part of them that it is: tied weights have two names.
    """
    found = {}
    regularizer = _regularizer(callback)
    if regularizer is None:
        return {}
    for layer in regularizer.layers:
        if layer.strength != 0:
            found[layer.name] = {(id(p), layer.target.key) for p in layer.parameters}
    return found


def warn_idle(stage: str) -> None:
    """Warn that the callback has nothing to do without a fit."""
    name = getattr(stage, "value", stage)
    _warn(
        f"HypersphericalUniformity acts and measures only in trainer.fit; in trainer.{name} it does "
        "nothing. To measure a model as it is, use lightning_hsu.report.report(model) or the metric "
        "lightning_hsu.metrics.WeightUniformity; lightning_hsu.summarize(model) lists its layers."
    )


def check_training(trainer: pl.Trainer, pl_module: pl.LightningModule, apply: str) -> None:
    """Refuse unknown strategies, and ``apply="loss"`` where the loss cannot be changed."""
    strategy = type(trainer.strategy).__name__
    known = _lightning_class(trainer.strategy)
    if known not in known_strategies():
        raise NotImplementedError(
            f"HypersphericalUniformity does not support {strategy}: it may keep weights or gradients "
            "where the penalty cannot see them. Use 'ddp', 'fsdp', ModelParallelStrategy or a single "
            "device, or take the callback out."
        )
    if apply != "loss":
        return
    if not pl_module.automatic_optimization:
        raise NotImplementedError(
            "apply='loss' adds the penalty at each backward, and manual optimisation may call any "
            "number of them: use apply='gradient' or 'decoupled', which count optimizer steps, or add "
            "UniformityRegularizer.penalty() to your loss"
        )
    placement = placement_for_strategy(known)
    if placement is not None and placement.loss_refusal is not None:
        raise NotImplementedError(placement.loss_refusal.format(strategy=strategy))


def _lightning_class(strategy: object) -> str:
    """Name of the nearest class of Lightning's own; the names in its two packages are the same."""
    for kind in type(strategy).__mro__:
        if kind.__module__.startswith(("lightning.", "pytorch_lightning.")):
            return kind.__name__
    return ""


def trains_alike(trainer: pl.Trainer) -> bool:
    """Whether all ranks have the same weights; in local SGD they have not, between averages."""
    return getattr(trainer.strategy, "_model_averager", None) is None


def warn_off(error: Exception) -> None:
    """Warn that a callback which only monitors has given up."""
    _warn(f"HypersphericalUniformity monitors nothing in this fit: {error}")


def warn_dropped(dropped: Dropped) -> None:
    """Warn of what was left out of a checkpoint's state."""
    if dropped:
        _warn(str(dropped))


def strangers(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> list[str]:
    """Keys of states of such callbacks in a checkpoint that no callback of the trainer has."""
    stored = checkpoint.get("callbacks")
    if not isinstance(stored, Mapping):
        return []
    ours = [callback.state_key for callback in _ours(_callbacks_of(trainer))]
    begins = {key.partition("{")[0] for key in ours}  # with the names of their classes
    found = []
    for key in map(str, stored):
        if key not in ours and key.partition("{")[0] in begins:
            found.append(key)
    return found


def warn_without_state(
    trainer: pl.Trainer, key: str, others: Sequence[str], counts: Sequence[str]
) -> None:
    """Warn of a training that is resumed from a checkpoint without this callback's state.

    Args:
        trainer: The trainer.
        key: The state's key.
        others: Keys of other states in the checkpoint that belong to no callback.
        counts: What depends on the state, in words; there is no warning if nothing does.
    """
    if not counts or not trainer.ckpt_path or trainer.global_step == 0:
        return
    text = (
        f"the checkpoint has no state under {key!r}, so this callback begins anew at global step "
        f"{trainer.global_step}: {'; '.join(counts)}. "
    )
    if others:
        named = ", ".join(map(repr, others))
        text += f"There is a state under {named}: with the prefix written there it would go on."
    else:
        text += (
            "If the callback was added just now, that is right; shift a schedule by the steps done "
            "if it should be further on."
        )
    _warn(text)


def is_last_step(trainer: pl.Trainer) -> bool:
    """Whether an epoch ends after this batch."""
    is_done = 0 <= trainer.max_steps <= trainer.global_step
    return bool(trainer.is_last_batch or trainer.should_stop or is_done)


def waits_for_a_step(trainer: pl.Trainer, layer: Layer, stepped: Collection[int]) -> bool:
    """Whether an optimizer has a layer's weights and has not stepped yet.

    Args:
        trainer: The trainer.
        layer: The layer.
        stepped: Ids of the optimizers that have.
    """
    own = {id(p) for p in layer.parameters}
    waiting = [one for one in _optimizers_of(trainer) if id(one) not in stepped]
    return any(not own.isdisjoint(held_by(one)) for one in waiting)


def keep_from_breaking(checkpoint: dict[str, Any], key: str) -> None:
    """Replace a callback's stored state that Lightning itself would stumble over."""
    states = checkpoint.get("callbacks")
    if isinstance(states, dict) and isinstance(states.get(key), Tensor):
        states[key] = "a tensor"  # which is left out in words


def is_logging_step(trainer: pl.Trainer) -> bool:
    """Whether Lightning logs at this batch."""
    # The private property that Lightning's own LearningRateMonitor reads; it allows for
    # log_every_n_steps=0.
    return bool(trainer._logger_connector.should_update_logs)


def logs_within(trainer: pl.Trainer, steps: int) -> bool:
    """Whether Lightning logs at this batch or one of the next that step, ``steps`` in all."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and -(logged_step(trainer) + 1) % every < steps


def logged_step(trainer: pl.Trainer) -> int:
    """The step under which Lightning logs its own values."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


@contextmanager
def trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let parameters train for a moment that a toggled optimizer, or a user, has switched off."""
    switched = [p for p in parameters if p.is_leaf and not p.requires_grad]
    for p in switched:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in switched:
            p.requires_grad_(False)


def is_fitting(trainer: pl.Trainer) -> bool:
    """Whether a fit is under way; it is not after an error, even if no callback was told of that."""
    return trainer.state.fn == "fit" and trainer.state.status == "running"


def after_step(
    trainer: pl.Trainer,
    optimizer: Optimizer,
    position: int | None,
    act: Callable[[pl.Trainer, AfterStep], None],
) -> AfterStep:
    """A hook that calls ``act``, a method, after each step of an optimizer in this fit.

    It keeps neither the trainer nor the method's owner alive.
    """
    trainer_ref = weakref.ref(trainer)
    act_ref = weakref.WeakMethod(act)

    def act_in_fit(hook: AfterStep) -> bool:
        trainer, act = trainer_ref(), act_ref()
        if trainer is None or act is None or not is_fitting(trainer):
            return False
        owner = getattr(act, "__self__", None)
        if not any(one is owner for one in _callbacks_of(trainer)):
            return True  # it was taken away, or a search for a learning rate does without it
        act(trainer, hook)
        return True

    return AfterStep(optimizer, position, act_in_fit)


def hook_optimizers(
    trainer: pl.Trainer,
    hooks: Sequence[AfterStep],
    act: Callable[[pl.Trainer, AfterStep], None],
) -> list[AfterStep]:
    """Hooks on the optimizers that the trainer has now, then those on optimizers that are gone.

    Args:
        trainer: The trainer.
        hooks: The hooks so far.
        act: The method to call after each step.
    """
    known = {id(hook.optimizer): hook for hook in hooks}
    found = []
    for i, optimizer in enumerate(_optimizers_of(trainer)):
        hook = known.pop(id(optimizer), None)
        if hook is None:
            hook = after_step(trainer, optimizer, i, act)
        hook.position = i
        found.append(hook)
    return [*found, *known.values()]


def _optimizers_of(trainer: pl.Trainer) -> list[Optimizer]:
    """The optimizers of a Trainer, without Lightning's wrappers."""
    found = []
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        found.append(optimizer)
    return found


def catch_late_step(trainer: pl.Trainer, hook: AfterStep) -> None:
    """Let a hook that has not seen the step under way begin see its end."""
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return  # the step is still to come
    for outer in trainer.strategy._lightning_optimizers:
        if outer._optimizer is hook.optimizer:
            hook.is_late = True
            outer._on_after_step = partial(_end_late_step, outer, outer._on_after_step, hook)


def _end_late_step(outer: LightningOptimizer, before: Callable[[], None], hook: AfterStep) -> None:
    """What Lightning calls once after a step, in place of what it called before."""
    outer._on_after_step = before
    hook.end_late_step()
    before()


class LossScale:
    """A GradScaler's factor: a GPU is asked for it after each batch, long before it is needed."""

    def __init__(self) -> None:
        self._scale: Tensor | None = None
        self._version = 0
        self._number: LateNumbers | None = None

    def ask(self, trainer: pl.Trainer) -> None:
        """Begin to ask for the factor of the next batch."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = getattr(scaler, "_scale", None)
        if scale is None or not reads_late(scale) or self._is_of(scale):
            return
        self._scale = scale
        self._version = scale._version
        self._number = LateNumbers(scale.detach().reshape(1))

    def of(self, scaler: Any) -> float:
        """The factor; the host waits only if it has changed since it was asked for."""
        scale = scaler._scale
        if self._number is not None and self._is_of(scale):
            return self._number.read()[0]
        return float(scaler.get_scale())

    def _is_of(self, scale: Tensor | None) -> bool:
        """Whether this is what was asked for: ``scaler.update`` writes to it."""
        return scale is not None and scale is self._scale and scale._version == self._version


def remaining_scale(trainer: pl.Trainer, optimizer: Optimizer, known: LossScale) -> float:
    """The GradScaler's factor if Lightning leaves it in the gradients, else 1.

    It leaves it there for fused optimizers, which unscale in their own step.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    # The scaler's step checks the same: in manual optimisation users may unscale the gradients.
    state = scaler._per_optimizer_states.get(id(optimizer))
    if state is not None and state["stage"] is not OptState.READY:
        return 1.0
    return known.of(scaler)


def loss_factor(trainer: pl.Trainer, loss: Tensor) -> Tensor | float:
    """The factor of the loss before backward: the scaler's, over the accumulated batches."""
    share = 1.0 / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return share
    scaled: Tensor = scaler.scale(torch.full((), share, device=loss.device))
    return scaled


_IN_BACKWARD = (
    "an optimizer, or another hook on these weights, takes their gradients during the backward pass. "
    "Use apply='loss', which works there; with manual optimisation add "
    "UniformityRegularizer.penalty() to your loss."
)
_IN_NO_OPTIMIZER = (
    "these weights are in no optimizer of the Trainer, so the task does not train them either. Weights "
    "that are new, or replaced, have to be given to it: "
    'trainer.optimizers[0].add_param_group({"params": ...}), or make them before '
    "configure_optimizers; leave out a layer that is not to be trained with exclude=."
)
_NO_GRADIENT = (
    "they got no gradient at a step, or their optimizer steps without Lightning. With manual "
    "optimisation use self.optimizers(), not use_pl_optimizer=False; leave out a layer that is not "
    "used with exclude=."
)


class Warnings:
    """The warnings of one fit, each given once."""

    def __init__(self) -> None:
        self._nonfinite: set[str] = set()  # layers that were already named
        self._unreached: set[str] = set()
        self._freed = False
        self._said: set[str] = set()
        self._shared: set[str] = set()
        self._line_search = False

    def line_search(self, optimizer: Optimizer) -> None:
        """Warn of a line search: it compares losses, which do not include the penalty."""
        if self._line_search or not getattr(optimizer, "defaults", {}).get("line_search_fn"):
            return
        self._line_search = True
        _warn(
            f"{type(optimizer).__name__} with a line search: the gradient includes the penalty, "
            "but the loss that the search compares does not. Use line_search_fn=None."
        )

    def nonfinite(self, measured: Sequence[LayerUniformity], way_out: str = "") -> None:
        """Warn of layers with NaN or infinite weights, so that users see where training broke.

        Args:
            measured: The layers.
            way_out: What to do about a penalty that may have broken them; "" if it cannot have.
        """
        broken = []
        for layer in measured:
            if layer.nonfinite and layer.name not in self._nonfinite:
                self._nonfinite.add(layer.name)
                shape = shape_of(layer.groups, layer.neurons, layer.dimension)
                broken.append(f"'{layer.name}' ({shape}): {counted(layer.nonfinite, 'neuron')}")
        if broken:
            _warn(
                f"NaN or infinite weights in layer {'; '.join(broken)}. Such neurons are left out of "
                "the penalty. Lower the learning rate, or find the first bad step with "
                f"Trainer(detect_anomaly=True).{way_out}"
            )

    def unreached(self, layers: Sequence[Layer], trainer: pl.Trainer) -> None:
        """Warn of layers that the penalty does not reach, so that it is never silently absent."""
        new = [layer for layer in layers if layer.name not in self._unreached]
        self._unreached.update(layer.name for layer in new)
        owned: set[int] = set()
        for optimizer in trainer.optimizers:
            owned |= held_by(optimizer)
        by_reason: dict[str, list[str]] = {}
        for layer in new:
            reason = _NO_GRADIENT
            if layer.steps_in_backward:
                reason = _IN_BACKWARD
            elif owned.isdisjoint(map(id, layer.parameters)):
                reason = _IN_NO_OPTIMIZER
            by_reason.setdefault(reason, []).append(layer.name)
        for reason, names in by_reason.items():
            named = ", ".join(map(repr, names))
            _warn(f"the penalty has not reached layer {named} in this epoch: {reason}")

    def once(self, message: str) -> None:
        """Warn, unless it has been said."""
        if message not in self._said:
            self._said.add(message)
            _warn(message)

    def freed(self, names: Collection[str]) -> None:
        """Warn of layers whose gradients are taken away in a step: then nothing says what moves."""
        if names and not self._freed:
            self._freed = True
            _warn(
                f"layer {listed(map(repr, sorted(names)))} does not move with apply='decoupled': the "
                "optimizer, or a hook on it, takes the gradients away within its step, and only what "
                "has a gradient moves. Use apply='gradient'."
            )

    def shared(self, layers: Sequence[Layer], hooks: Sequence[AfterStep]) -> None:
        """Warn of layers that several optimizers step, since each of them adds the penalty."""
        if len(hooks) < 2:
            return
        owned = []
        for hook in hooks:
            owned.append((type(hook.optimizer).__name__, held_by(hook.optimizer)))
        found = {}
        for layer in layers:
            if layer.strength == 0 or layer.name in self._shared:
                continue
            ids = {id(p) for p in layer.parameters}
            names = [name for name, owns in owned if owns & ids]
            if len(names) > 1:
                found[layer.name] = names
        self._shared.update(found)
        if found:
            named = "; ".join(f"'{name}': {', '.join(names)}" for name, names in found.items())
            _warn(
                "several optimizers have the same weights, and each applies the penalty at its own "
                f"steps, in layer {named}. If that is not meant, give these weights to one optimizer "
                "only, or leave the layer out with exclude=."
            )

    def idle(self, reasons: Mapping[str, str]) -> None:
        """Warn of layers in which the penalty exerts no force."""
        if reasons:
            named = "; ".join(f"'{name}': {reason}" for name, reason in reasons.items())
            _warn(f"the penalty does nothing in layer {named}")
