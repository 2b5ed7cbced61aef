"""What the callback asks of a Trainer: its strategy, optimizers, scaler and logging steps; and what it warns of."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core import rank_zero
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_hsu._engine.layer import Layer
from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu._neurons.sharding import Replicas, leaves_of

_KNOWN = {"SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy"}


def _bases() -> tuple[type, ...]:
    """Callback, of lightning and, where it can be imported too, of pytorch_lightning: the same code under two names."""
    log, category = rank_zero.log, rank_zero.rank_zero_deprecation_category
    try:
        return pl.Callback, import_module("pytorch_lightning").Callback
    except Exception:  # not installed, or broken: then nobody has a Trainer of it
        return (pl.Callback,)
    finally:  # either package, imported, makes its own logger that of all messages; the user may have silenced the other
        rank_zero.log, rank_zero.rank_zero_deprecation_category = log, category


if TYPE_CHECKING:
    EveryCallback = pl.Callback
else:
    EveryCallback = type(
        "EveryCallback", _bases(), {"__doc__": "A callback for Trainers of either package."}
    )


class AfterStep:
    """Calls ``act(optimizer)`` after each real step, once: an optimizer whose step calls its parent's runs its hooks twice."""

    def __init__(self, optimizer: Optimizer, act: Callable[[Optimizer], None]) -> None:
        self._act = act
        self._outermost: FrameType | None = None
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _before(self, *_: Any) -> None:
        step = sys._getframe(1)  # torch's, around this call of step
        if not _is_within(
            step, self._outermost
        ):  # else it is a parent's; a step that raised an error is not around this one
            self._outermost = step

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if sys._getframe(1) is self._outermost:
            self._outermost = None
            self._act(optimizer)


def _is_within(frame: FrameType | None, outer: FrameType | None) -> bool:
    """Whether a frame was called, however indirectly, by another."""
    while outer is not None and frame is not None:
        if frame is outer:
            return True
        frame = frame.f_back
    return False


class StepUnderWay:
    """The state from before an optimizer step that is not complete: interrupted, it will be done again."""

    def __init__(self) -> None:
        self._trainer: weakref.ref[pl.Trainer] | None = None
        self._step, self._before = -1, dict[str, Any]()

    def begin(self, trainer: pl.Trainer, state: Callable[[], dict[str, Any]]) -> None:
        """Keep the state, unless it is that of the same step."""
        if self._trainer is None or self._step != trainer.global_step:
            self._trainer, self._step, self._before = (
                weakref.ref(trainer),
                trainer.global_step,
                state(),
            )

    def end(self) -> None:
        """The step is complete, whether or not Lightning counts it."""
        self._trainer = None

    def state(self) -> dict[str, Any] | None:
        """The state from before; None if no step is under way."""
        trainer = None if self._trainer is None else self._trainer()
        return self._before if trainer is not None and self._step == trainer.global_step else None


def check_settings(prefix: object, split_above: object) -> None:
    """Refuse a prefix that is no name, and a limit that is no number of neurons."""
    if not isinstance(prefix, str) or not prefix or prefix.endswith("/"):
        raise ValueError(
            f"prefix must be a name such as 'hsu', without a slash at its end; got {prefix!r}"
        )
    if split_above is not None and (not isinstance(split_above, int) or split_above < 0):
        raise ValueError(f"split_above must be a number of neurons, or None; got {split_above!r}")


def check_training(trainer: pl.Trainer, pl_module: pl.LightningModule, apply: str) -> None:
    """Refuse what cannot be right: strategies that are not known, and a term in losses that are not ours to change."""
    # By name: pytorch_lightning has classes of its own under the same names.
    kinds, strategy = type(trainer.strategy).__mro__, type(trainer.strategy).__name__
    known = next(
        (
            kind.__name__
            for kind in kinds
            if kind.__module__.startswith(("lightning.", "pytorch_lightning."))
        ),
        "",
    )
    if known not in _KNOWN:
        raise NotImplementedError(
            f"HypersphericalUniformity does not support {strategy}: it may keep weights or gradients where the penalty cannot "
            "see them. Use 'ddp', 'fsdp', ModelParallelStrategy or a single device, or take the callback out."
        )
    if apply != "loss":
        return
    if not pl_module.automatic_optimization:
        raise NotImplementedError(
            "apply='loss' adds the penalty at each backward, and manual optimisation may call any number of them: use "
            "apply='gradient' or 'decoupled', which count optimizer steps, or add UniformityRegularizer.penalty() to your loss"
        )
    if known == "FSDPStrategy":
        raise NotImplementedError(
            f"apply='loss' does not reach the flat pieces in which {strategy} keeps the weights: use apply='gradient' or "
            "'decoupled', or ModelParallelStrategy"
        )


def check_used(trainer: pl.Trainer, loss: Tensor, layers: list[Layer]) -> None:
    """Refuse a term for parameters that DDP's find_unused_parameters has settled without a gradient."""
    model = trainer.strategy.model
    if not (isinstance(model, DistributedDataParallel) and model.find_unused_parameters):
        return
    used = leaves_of(loss)
    for layer in layers:
        own = {id(p) for p in layer.parameters if p.requires_grad}
        if layer.strength != 0 and own and not own & used:
            name = layer.target.name
            raise RuntimeError(
                f"layer '{name}' {layer.target.shape} took no part in this batch's loss, and DDP with "
                "find_unused_parameters=True has closed its gradient before apply='loss' could add the penalty: use "
                f"apply='gradient', or exclude='{name}'"
            )


def replicas_of(trainer: pl.Trainer, split_above: int | None) -> Replicas | None:
    """The ranks that train the same weights by DDP, where large layers are to be split over them."""
    if (
        split_above is None
        or trainer.world_size == 1
        or not isinstance(trainer.strategy.model, DistributedDataParallel)
    ):
        return None
    if getattr(trainer.strategy, "_model_averager", None) is not None:
        return None  # local SGD: between averages each rank has weights of its own
    return Replicas(trainer.strategy.model.process_group, split_above)


def is_logging_step(trainer: pl.Trainer) -> bool:
    """Whether Lightning logs at this batch."""
    # The same private property that Lightning's own LearningRateMonitor asks; it knows log_every_n_steps=0.
    return bool(trainer._logger_connector.should_update_logs)


def position(trainer: pl.Trainer, optimizer: Optimizer) -> int | None:
    """Position of the optimizer among the trainer's, so that a resumed schedule finds its count."""
    return next((i for i, other in enumerate(trainer.optimizers) if other is optimizer), None)


def remaining_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """The GradScaler's factor where Lightning leaves it in the gradients: fused optimizers unscale in their own step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    # Its step asks the same: in manual optimisation you may have unscaled the gradients, to clip them.
    state = scaler._per_optimizer_states.get(id(optimizer))
    return (
        1.0
        if state is not None and state["stage"] is not OptState.READY
        else float(scaler.get_scale())
    )


def loss_factor(trainer: pl.Trainer, loss: Tensor) -> Tensor | float:
    """What the loss before backward is multiplied by: the GradScaler's factor over the number of accumulated batches."""
    scaler, share = (
        getattr(trainer.precision_plugin, "scaler", None),
        1.0 / trainer.accumulate_grad_batches,
    )
    if scaler is None:
        return share
    scaled: Tensor = scaler.scale(torch.full((), share, device=loss.device))
    return scaled


class Warnings:
    """Warnings of one fit, and which of them were given."""

    def __init__(self) -> None:
        self._nonfinite, self._unreached, self._searched = set[str](), set[str](), False

    def line_search(self, optimizer: Optimizer) -> None:
        """A search along the gradient compares losses, and these are the task's alone."""
        if getattr(optimizer, "defaults", {}).get("line_search_fn") and not self._searched:
            self._searched = True
            rank_zero_warn(
                f"{type(optimizer).__name__} with a line search: the gradient has the penalty, the loss that the search "
                "compares has not. Use line_search_fn=None."
            )

    def nonfinite(self, measured: Sequence[LayerUniformity]) -> None:
        """Layers whose weights broke: training is lost, and the user should know where it began."""
        broken = [
            layer for layer in measured if layer.nonfinite and layer.name not in self._nonfinite
        ]
        if broken:
            self._nonfinite |= {layer.name for layer in broken}
            named = "; ".join(
                f"'{x.name}' ({x.neurons} x {x.dimension}): {x.nonfinite} neurons" for x in broken
            )
            rank_zero_warn(
                f"NaN or infinite weights in layer {named}. Such neurons are left out of the penalty. Lower the learning "
                "rate, or find the first bad step with Trainer(detect_anomaly=True)."
            )

    def unreached(self, names: Sequence[str]) -> None:
        """Layers where the penalty does not arrive: nothing is worse than one that is silently absent."""
        names = [name for name in names if name not in self._unreached]
        if names:
            self._unreached |= set(names)
            rank_zero_warn(
                f"the penalty has not reached layer {', '.join(map(repr, names))} so far: these weights are in no optimizer "
                "that steps through Lightning, or got no gradient. With manual optimisation use self.optimizers(), not "
                "use_pl_optimizer=False; leave out a layer that is not trained with exclude=."
            )

    def idle(self, reasons: dict[str, str]) -> None:
        """Layers whose penalty has no force."""
        if reasons:
            named = "; ".join(f"'{name}': {reason}" for name, reason in reasons.items())
            rank_zero_warn(f"the penalty does nothing in layer {named}")
