"""The Lightning callback: thin hooks over the engine."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_hsu import _trainer
from lightning_hsu._checks import check_choice
from lightning_hsu._engine.apply import GradientStats
from lightning_hsu._figures.recorder import FigureRecorder
from lightning_hsu._monitor.measure import LayerUniformity, aggregates, by_layer
from lightning_hsu._neurons.select import uninitialized
from lightning_hsu.chronicle import Chronicle
from lightning_hsu.coefficients import Strength, Strengths
from lightning_hsu.measures import Measure
from lightning_hsu.regularizer import UniformityRegularizer

_LOGGING = ("log", "log_dict")  # bound methods of the model, which Lightning hangs onto callbacks


class HypersphericalUniformity(_trainer.EveryCallback):
    """Spread the neurons of a LightningModule over the sphere while it trains, and log how spread out they are.

    The objective becomes the task's loss plus ``coefficient`` times the penalty, once per optimizer step,
    whatever the precision, accumulation, strategy or optimisation mode; only where one step would move a neuron by more
    than its own norm the penalty's gradient is shortened (``step_limit``). The logged training loss is unchanged.

    On logging steps ``hsu/penalty``, ``hsu/ratio_mean``, ``hsu/ratio_max``, ``hsu/angle_min`` (degrees),
    ``hsu/dead`` and ``hsu/limited`` go through Lightning's log, where EarlyStopping and ModelCheckpoint can watch
    them; they are also refreshed on the first step and at the end of each epoch. Per layer ``hsu/ratio/<layer>``,
    ``hsu/score/<layer>`` (0 as random, 1 the best there can be), ``hsu/energy/<layer>``, ``hsu/min_angle/<layer>`` and
    ``hsu/gradient_share/<layer>`` go to every logger, and of a schedule or a share ``hsu/coefficient/<layer>``.

    Args:
        measure: What to minimise. None is the half-space Riesz energy with s = 2; the class head is measured
            in full space.
        coefficient: A number >= 0, a schedule (optimizer steps done -> number), a share of the task's gradient
            (``Share``), or a mapping of layer patterns to these, of which the first match counts. 0 only
            monitors and leaves training as it is.
        apply: How the penalty enters. "gradient": its gradient is added before each optimizer step, before Lightning's
            clipping, after your own in manual optimisation. "loss": it is added to the loss before each backward, divided by
            ``accumulate_grad_batches``; automatic optimisation only. "decoupled": after each step the neurons move along the
            sphere by learning rate times coefficient times gradient and keep their norms, past the optimizer and clipping.
        include: Patterns of layer names to take, shell style; None takes all but embeddings, which must be asked for.
        exclude: Patterns of layer names to leave out.
        head: The class head: "auto" is the last Linear, a name is that layer, None is no head.
        head_coefficient: A number, schedule or share for the head; None uses ``coefficient``.
        every_n_steps: Apply on every n-th step of each optimizer, at the coefficient's full strength.
        step_limit: A neuron's penalty gradient times the learning rate is at most this fraction of the neuron's norm, so
            that no near-duplicate or tiny neuron is thrown away by one step (``hsu/limited`` counts them). None is no limit.
        matmul_precision: "medium" multiplies pair energies in bfloat16: gradients to 2e-3 for s <= 2, 2e-2 at most.
        sample_above: Energies of more neurons are estimated (:class:`~lightning_hsu.measures.Sampled`); None computes them.
        split_above: Under DDP, layers of at least so many neurons are computed by all ranks together, each its part of the
            pairs; None computes every layer on every rank.
        figures_every_n_steps: Optimizer steps between figures for every logger: ratios over time, the worst layers' angles,
            gradient shares; also at the end of fit. Without a logger that takes figures, PNG files. None draws nothing.
        prefix: What the logged names begin with; several callbacks need one each.
        verbose: Print the table of layers at the start of fit, and at its end how each stood before and stands after.

    Raises:
        ImportError: for figures without matplotlib.
        ValueError: for a negative or NaN coefficient, an unknown ``apply``, or at the start of fit a pattern that
            matches nothing or a model without neurons.
        TypeError: for a measure or a coefficient of the wrong kind.
        NotImplementedError: at the start of fit, where the penalty could not be right: DeepSpeed and strategies that are not
            known, ``apply="loss"`` with manual optimisation or FSDP.

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
        coefficient: Strengths = 1.0,
        *,
        apply: Literal["gradient", "loss", "decoupled"] = "gradient",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        head: str | None = "auto",
        head_coefficient: Strength | None = None,
        every_n_steps: int = 1,
        step_limit: float | None = 1.0,
        matmul_precision: Literal["highest", "medium"] = "highest",
        sample_above: int | None = 16384,
        split_above: int | None = 2048,
        figures_every_n_steps: int | None = None,
        prefix: str = "hsu",
        verbose: bool = True,
    ) -> None:
        check_choice("apply", apply, "gradient", "loss", "decoupled")
        self.regularizer = UniformityRegularizer(
            measure,
            coefficient,
            include=include,
            exclude=exclude,
            head=head,
            head_coefficient=head_coefficient,
            every_n_steps=every_n_steps,
            step_limit=step_limit,
            matmul_precision=matmul_precision,
            sample_above=sample_above,
        )
        _trainer.check_settings(prefix, split_above)
        coefficients = [self.regularizer.coefficient, self.regularizer.head_coefficient]
        if apply == "loss" and any(one is not None and one.has_share for one in coefficients):
            raise ValueError(
                "a Share needs the task's gradient apart from the loss: use apply='gradient' or 'decoupled'"
            )
        self.apply, self.split_above, self.prefix, self.verbose = (
            apply,
            split_above,
            prefix,
            verbose,
        )
        self._hooks: list[_trainer.AfterStep] = []
        self._notes: dict[str, GradientStats] = {}
        self._under_way = _trainer.StepUnderWay()
        self._fresh, self._ran = True, False  # nothing measured, no batch done yet in this fit
        self._seen_step = 0  # global step at the last batch's end
        self._warnings, self._chronicle = (
            _trainer.Warnings(),
            Chronicle(FigureRecorder(prefix, figures_every_n_steps)),
        )
        self._counted: tuple[int | None, int] = (
            None,
            -1,
        )  # optimizer and global step of the last application

    @property
    def state_key(self) -> str:
        """Tells several instances apart; all else stays out, so that a changed setting still finds its state."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: after the last complete step, for one that is interrupted will be done again."""
        before = self._under_way.state()
        return self.regularizer.state_dict() if before is None else before

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken."""
        self.regularizer.load_state_dict(state_dict)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start counting anew with a new trainer; a checkpoint's counts are loaded after this."""
        if stage == "fit":
            self._release()  # from a fit whose end Lightning could not tell, since another callback failed at that
            before = {"steps": []} if trainer.global_step == 0 else self._under_way.state()
            if (
                before is not None
            ):  # a new training, or one that was broken off within a step, which is done again
                self.regularizer.load_state_dict(before)
            self._notes, self._fresh, self._warnings = {}, True, _trainer.Warnings()
            self._chronicle.begin()
            self._counted, self._ran, self._under_way = (None, -1), False, _trainer.StepUnderWay()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the neurons; lazy layers have none before their first batch."""
        _trainer.check_training(trainer, pl_module, self.apply)
        if not uninitialized(pl_module):
            self._attach(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where a resumed fit stands, and whenever an optimizer has stepped."""
        self._seen_step = trainer.global_step
        self._hooks = [
            _trainer.AfterStep(one, partial(self._after_step, trainer, pl_module))
            for one in trainer.optimizers
        ]
        self._chronicle.start(trainer, self.regularizer, self.verbose)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Add the term to the loss: here it is divided by the accumulated batches and scaled."""
        if self.apply != "loss":
            return
        self._attach(trainer, pl_module)
        if self.regularizer.active:
            _trainer.check_used(trainer, loss, self.regularizer.layers)
            again = self._counted == (0, trainer.global_step)
            self._under_way.begin(trainer, self.regularizer.state_dict)
            optimizer, factor = trainer.optimizers[0], _trainer.loss_factor(trainer, loss)
            self.regularizer.add_to_loss(loss, optimizer, index=0, factor=factor, again=again)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradient: here it is reduced over ranks, unscaled, complete over accumulated batches and not yet clipped."""
        self._attach(trainer, pl_module)
        if not self.regularizer.active:
            return
        if (
            self.apply == "decoupled"
        ):  # a GradScaler may skip the step, and that is no reason for a warning
            self.regularizer.note_reached(optimizer)
            return
        index = _trainer.position(trainer, optimizer)
        again = self._counted == (index, trainer.global_step)
        self._under_way.begin(trainer, self.regularizer.state_dict)
        self._counted = index, trainer.global_step
        self._warnings.line_search(optimizer)
        if self.apply == "loss":
            self.regularizer.count_step(optimizer, index=index, again=again)
            return
        scale, note = _trainer.remaining_scale(trainer, optimizer), self._will_measure(trainer)
        self._notes |= self.regularizer.add_gradients(
            optimizer, index=index, grad_scale=scale, note=note, again=again
        )

    def _after_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """The step is complete, and may be the time to move the neurons; one that a GradScaler skips does not come here."""
        self._counted = None, -1
        self._under_way.end()
        if self.apply != "decoupled":
            return
        self._attach(trainer, pl_module)
        if self.regularizer.active:
            index, note = _trainer.position(trainer, optimizer), self._will_measure(trainer)
            self._notes |= self.regularizer.move(optimizer, index=index, note=note)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure and log after the step, on logging steps only."""
        self._ran |= batch_idx == 0 or trainer.global_step != self._seen_step
        accumulating = trainer.global_step == self._seen_step and pl_module.automatic_optimization
        if accumulating or not self.regularizer.layers:
            return
        logs, draws = (
            self._will_measure(trainer),
            self._chronicle.gallery.due(trainer, self._seen_step),
        )
        self._seen_step = trainer.global_step
        if logs or draws:
            measured = self.regularizer.measure_layers()
            self._chronicle.note(trainer, measured, self._shares())
            if logs:
                self._log(trainer, pl_module, measured)
                self._fresh = False
            if draws:
                self._chronicle.gallery.show(
                    trainer, self.regularizer.layers, self.regularizer.gathered
                )
        self._notes = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so, once, where the penalty does not arrive: nothing is worse than one that is silently absent."""
        if not self._ran:
            return  # resumed so late in an epoch that there was no step in it
        self._attach(trainer, pl_module)  # lazy layers, and no optimizer step that Lightning saw
        self._warnings.unreached(self.regularizer.unreached())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look back at the fit, and let go of the model and the optimizers."""
        try:
            if self._ran:
                self._chronicle.conclude(trainer, self.regularizer, self.verbose)
        finally:
            self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let go of the model and the optimizers."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the model and the optimizers."""
        self._release()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the settings and where training stands, never the model nor a hook."""
        kept = {name: value for name, value in self.__dict__.items() if name not in _LOGGING}
        return kept | {"_hooks": [], "_notes": {}, "_under_way": _trainer.StepUnderWay()}

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.__dict__ = self.__getstate__() | {"_under_way": self._under_way}
        self.regularizer.detach()

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.regularizer.layers:
            return
        replicas = _trainer.replicas_of(trainer, self.split_above)
        self.regularizer.attach(pl_module, wrapped=trainer.strategy.model, replicas=replicas)
        self._warnings.idle(self.regularizer.idle())
        if self.verbose:
            rank_zero_info(f"Hyperspherical uniformity:\n{self.regularizer.table()}")

    def _will_measure(self, trainer: pl.Trainer) -> bool:
        """Whether this batch ends with a measurement: a logging step, the first of a fit, the last of an epoch."""
        return self._fresh or trainer.is_last_batch or _trainer.is_logging_step(trainer)

    def _shares(self) -> dict[str, float]:
        return {
            name: float(note.share) for name, note in self._notes.items() if note.share.isfinite()
        }

    def _log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, measured: list[LayerUniformity]
    ) -> None:
        """Aggregates through Lightning's log; layers to every logger, on logging steps."""
        if not trainer.barebones:
            limited = (
                sum(int(note.limited) for note in self._notes.values()) if self._notes else None
            )
            values = aggregates(measured, self.regularizer.current_penalty(measured), limited)
            pl_module.log_dict(self._prefixed(values), on_step=True, on_epoch=False, batch_size=1)
        if _trainer.is_logging_step(trainer):
            self._warnings.nonfinite(measured)
            step = (
                trainer.fit_loop.epoch_loop._batches_that_stepped
            )  # the step under which Lightning logs its own
            varying = self.regularizer.progress.varying(self.regularizer.layers)
            for logger in trainer.loggers:
                logger.log_metrics(
                    self._prefixed(by_layer(measured, varying, self._shares())), step=step
                )

    def _prefixed(self, values: dict[str, float]) -> dict[str, float]:
        return {f"{self.prefix}/{name}": value for name, value in values.items()}
