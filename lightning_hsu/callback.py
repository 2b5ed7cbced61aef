"""The Lightning callback: thin hooks over the engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_hsu.applying import GradientNote
from lightning_hsu.measures import Measure
from lightning_hsu.monitor import LayerUniformity
from lightning_hsu.regularizer import UniformityRegularizer
from lightning_hsu.selection import uninitialized


class HypersphericalUniformity(pl.Callback):
    """Spread the neurons of a LightningModule over the sphere while it trains, and log how spread out they are.

    The objective becomes the task's loss plus ``coefficient`` times the penalty, once per optimizer step,
    whatever the precision, accumulation or optimisation mode; only where one step would move a neuron by more
    than its own norm the penalty's gradient is shortened (``step_limit``). The gradient is added in
    ``on_before_optimizer_step``: before Lightning's clipping in automatic optimisation, after your own in manual
    optimisation. The logged training loss is unchanged.

    On logging steps ``hsu/penalty``, ``hsu/ratio_mean``, ``hsu/ratio_max``, ``hsu/min_angle`` (degrees),
    ``hsu/dead`` and ``hsu/limited`` go through Lightning's log, where EarlyStopping and ModelCheckpoint can watch
    them; they are also refreshed on the first step and at the end of each epoch. Per layer ``hsu/ratio/<layer>``,
    ``hsu/score/<layer>`` (0 as random, 1 the best there can be), ``hsu/energy/<layer>``, ``hsu/min_angle/<layer>`` and
    ``hsu/gradient_share/<layer>`` go to every logger.

    Args:
        measure: What to minimise. None is the half-space Riesz energy with s = 2; the class head is measured
            in full space.
        coefficient: A number >= 0, a schedule (optimizer steps done -> number), or a mapping of layer
            patterns to either, of which the first match counts. 0 only monitors and leaves training as it is.
        apply: How the penalty enters; this release has "gradient".
        include: Patterns of layer names to take, shell style; None takes all but embeddings, which must be asked for.
        exclude: Patterns of layer names to leave out.
        head: The class head: "auto" is the last Linear, a name is that layer, None is no head.
        head_coefficient: A number or schedule for the head; None uses ``coefficient``.
        every_n_steps: Apply on every n-th step of each optimizer, at the coefficient's full strength.
        step_limit: A neuron's penalty gradient times the learning rate is at most this fraction of the neuron's norm, so
            that no near-duplicate or tiny neuron is thrown away by one step (``hsu/limited`` counts them). None is no limit.
        prefix: What the logged names begin with, and what tells several callbacks apart: each needs its own.
        verbose: Print the table of layers at the start of fit.

    Raises:
        ValueError: for a negative or NaN coefficient, an unknown ``apply``, or at the start of fit a pattern that
            matches nothing or a model without neurons.
        TypeError: for a measure or a coefficient of the wrong kind.
        NotImplementedError: at the start of fit, for a strategy that shards the weights.

    Reference:
        Liu et al., "Learning with Hyperspherical Uniformity", AISTATS 2021, arXiv 2103.01649.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_hsu import HypersphericalUniformity
        >>> trainer = Trainer(callbacks=[HypersphericalUniformity(coefficient=0.1)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        measure: Measure | None = None,
        # the mapping before the schedule: in this order a LightningCLI can write it into a config and read it again
        coefficient: float | dict[str, float | Callable[[int], float]] | Callable[[int], float] = 1.0,
        *,
        apply: Literal["gradient"] = "gradient",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        head: str | None = "auto",
        head_coefficient: float | Callable[[int], float] | None = None,
        every_n_steps: int = 1,
        step_limit: float | None = 1.0,
        prefix: str = "hsu",
        verbose: bool = True,
    ) -> None:
        if apply != "gradient":
            raise ValueError(f"apply={apply!r} is not in this release; use apply='gradient'")
        self.regularizer = UniformityRegularizer(
            measure,
            coefficient,
            include=include,
            exclude=exclude,
            head=head,
            head_coefficient=head_coefficient,
            every_n_steps=every_n_steps,
            step_limit=step_limit,
        )
        if not isinstance(prefix, str) or not prefix or prefix.endswith("/"):
            raise ValueError(f"prefix must be a name such as 'hsu', without a slash at its end; got {prefix!r}")
        self.prefix, self.verbose = prefix, verbose
        self._notes: dict[str, GradientNote] = {}
        self._fresh = True  # nothing measured yet in this fit
        self._seen_step = 0  # global step at the last batch's end
        self._warned: set[str] = set()
        self._unreached: set[str] = set()
        self._counted: tuple[int | None, int] = (None, -1)  # optimizer and global step of the last application

    @property
    def state_key(self) -> str:
        """Tells several instances apart; all else stays out, so that a changed setting still finds its state."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedules stand."""
        return self.regularizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken."""
        self.regularizer.load_state_dict(state_dict)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start counting anew with a new trainer; a checkpoint's counts are loaded after this."""
        if stage == "fit":
            if trainer.global_step == 0:
                self.regularizer.load_state_dict({"steps": []})
            self._notes, self._fresh, self._warned, self._unreached = {}, True, set(), set()
            self._counted = None, -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the neurons; lazy layers have none before their first batch."""
        _check_strategy(trainer)
        if not uninitialized(pl_module):
            self._attach(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where a resumed fit stands."""
        self._seen_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient: here it is reduced over ranks, unscaled, complete over accumulated batches and not yet clipped."""
        self._attach(pl_module)
        if not self.regularizer.active:
            return
        index = _index(trainer, optimizer)
        self._notes |= self.regularizer.add_gradients(
            optimizer,
            index=index,
            grad_scale=_remaining_scale(trainer, optimizer),
            note=self._will_measure(trainer),
            again=self._counted == (index, trainer.global_step),
        )
        self._counted = index, trainer.global_step
        self._warn_of_line_search(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log after the step, on logging steps only."""
        if trainer.global_step == self._seen_step or not self.regularizer.layers:
            return  # still accumulating
        self._seen_step = trainer.global_step
        if self._will_measure(trainer):
            self._log(trainer, pl_module)
            self._fresh = False
        self._notes = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so, once, where the penalty does not arrive: nothing is worse than one that is silently absent."""
        self._attach(pl_module)  # lazy layers, and no optimizer step that Lightning saw
        names = [name for name in self.regularizer.unreached() if name not in self._unreached]
        if names:
            self._unreached |= set(names)
            rank_zero_warn(
                f"the penalty has not reached layer {', '.join(map(repr, names))} so far: its weights are in no optimizer that "
                "steps through Lightning, or got no gradient. With manual optimisation use self.optimizers(), not "
                "use_pl_optimizer=False; leave out a layer that is not trained with exclude=."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the model."""
        self.regularizer.detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the model."""
        self.regularizer.detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the model."""
        self.regularizer.detach()

    def _attach(self, pl_module: pl.LightningModule) -> None:
        if self.regularizer.layers:
            return
        self.regularizer.attach(pl_module)
        if idle := self.regularizer.idle():
            reasons = "; ".join(f"'{name}': {reason}" for name, reason in idle.items())
            rank_zero_warn(f"the penalty does nothing in layer {reasons}")
        if self.verbose:
            rank_zero_info(f"Hyperspherical uniformity:\n{self.regularizer.table()}")

    def _will_measure(self, trainer: pl.Trainer) -> bool:
        """Whether this batch ends with a measurement: a logging step, the first of a fit, the last of an epoch."""
        return self._fresh or trainer.is_last_batch or _is_logging_step(trainer)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Aggregates through Lightning's log; layers to every logger, on logging steps."""
        measured = self.regularizer.measure_layers()
        if not trainer.barebones:
            values = self._aggregates(measured)
            pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        if _is_logging_step(trainer):
            self._report_nonfinite(measured)
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step under which Lightning logs its own
            for logger in trainer.loggers:
                logger.log_metrics(self._per_layer(measured), step=step)

    def _aggregates(self, measured: list[LayerUniformity]) -> dict[str, float]:
        """Numbers of the whole model, worth watching."""
        ratios = [layer.ratio for layer in measured if math.isfinite(layer.ratio)]
        angles = [layer.min_angle for layer in measured if math.isfinite(layer.min_angle)]
        values = {
            "penalty": self.regularizer.current_penalty(measured),
            "ratio_mean": sum(ratios) / len(ratios) if ratios else math.nan,
            "ratio_max": max(ratios, default=math.nan),
            "min_angle": min(angles, default=math.nan),
            "dead": float(sum(layer.dead for layer in measured)),
        }
        if self._notes:
            values["limited"] = float(sum(int(note.limited) for note in self._notes.values()))
        return {f"{self.prefix}/{key}": value for key, value in values.items()}

    def _per_layer(self, measured: list[LayerUniformity]) -> dict[str, float]:
        values = {}
        for layer in measured:
            values[f"{self.prefix}/ratio/{layer.name}"] = layer.ratio
            if not math.isnan(layer.score):
                values[f"{self.prefix}/score/{layer.name}"] = layer.score
            values[f"{self.prefix}/energy/{layer.name}"] = layer.energy
            values[f"{self.prefix}/min_angle/{layer.name}"] = layer.min_angle
        return values | {f"{self.prefix}/gradient_share/{name}": float(note.share) for name, note in self._notes.items()}

    def _warn_of_line_search(self, optimizer: Optimizer) -> None:
        if getattr(optimizer, "defaults", {}).get("line_search_fn") and "line search" not in self._warned:
            self._warned.add("line search")
            rank_zero_warn(
                f"{type(optimizer).__name__} with a line search: the gradient has the penalty, the loss that the search "
                "compares has not. Use line_search_fn=None."
            )

    def _report_nonfinite(self, measured: list[LayerUniformity]) -> None:
        """Warn once of each layer whose weights broke; training is lost, and the user should know where it began."""
        broken = [layer for layer in measured if layer.nonfinite and layer.name not in self._warned]
        if broken:
            self._warned |= {layer.name for layer in broken}
            named = "; ".join(f"'{x.name}' ({x.neurons} x {x.dimension}): {x.nonfinite} neurons" for x in broken)
            rank_zero_warn(
                f"NaN or infinite weights in layer {named}. Such neurons are left out of the penalty. Lower the learning "
                "rate, or find the first bad step with Trainer(detect_anomaly=True)."
            )


def _check_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies that shard weights: a rank that sees some of the neurons would add a wrong gradient."""
    # By name: pytorch_lightning has classes of its own under the same names.
    names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if names & {"SingleDeviceStrategy", "DDPStrategy"} and "DeepSpeedStrategy" not in names:
        return
    raise NotImplementedError(
        f"HypersphericalUniformity does not support {type(trainer.strategy).__name__} in this release: it may shard weights. "
        "Use Trainer(strategy='ddp') or a single device, or take the callback out."
    )


def _is_logging_step(trainer: pl.Trainer) -> bool:
    # The same private property that Lightning's own LearningRateMonitor asks; it knows log_every_n_steps=0.
    return bool(trainer._logger_connector.should_update_logs)


def _index(trainer: pl.Trainer, optimizer: Optimizer) -> int | None:
    """Position of the optimizer among the trainer's, so that a resumed schedule finds its count."""
    return next((i for i, other in enumerate(trainer.optimizers) if other is optimizer), None)


def _remaining_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """The GradScaler's factor where Lightning leaves it in the gradients: fused optimizers unscale in their own step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
