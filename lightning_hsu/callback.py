"""The Lightning callback: thin hooks over the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, Literal, TypeVar, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hsu import _trainer
from lightning_hsu._checks import check_choice
from lightning_hsu._engine.buffered import GradientStats, LateStats, StatsNumbers
from lightning_hsu._engine.layer import Layer
from lightning_hsu._engine.rates import UnknownRateError
from lightning_hsu._engine.state import TrainingState
from lightning_hsu._engine.stored import what_counts
from lightning_hsu._figures.recorder import FigureRecorder
from lightning_hsu._meant import Maker, check_places
from lightning_hsu._monitor.as_random import AsRandom
from lightning_hsu._monitor.measure import LayerUniformity, aggregates, by_layer
from lightning_hsu._monitor.summary import Summary
from lightning_hsu._monitor.tables import (
    BeforeAfter,
    broken_by_penalty,
    change_text,
    limit_text,
    zeros_text,
)
from lightning_hsu._neurons.how import How
from lightning_hsu._neurons.placement import placement_of
from lightning_hsu._neurons.select import uninitialized
from lightning_hsu._optimizers import AfterStep
from lightning_hsu._settings import OfRegularizer, refuse_attached
from lightning_hsu.coefficients import Coefficient, Strength, Strengths
from lightning_hsu.measures import Measure
from lightning_hsu.measures.defaults import COEFFICIENT, SAMPLE_ABOVE, SHARE_LIMIT
from lightning_hsu.regularizer import UniformityRegularizer

Hook = TypeVar("Hook", bound=Callable[..., None])

_MOST_CHANGES = 10  # of a model, that are told in a fit

_LOGGING = ("log", "log_dict")  # bound methods of the model, which Lightning sets on callbacks


@dataclass
class _Fit:
    """What belongs to one fit; each fit gets a new one.

    Attributes:
        hooks: Hooks on the optimizers.
        hooked: Ids of the trainer's optimizers when these were hooked.
        stats: Stats of the updates since the last batch ended, by layer.
        open_step: The optimizer step under way.
        loss_scale: The factor of a GradScaler.
        warnings: The warnings, with those already given.
        before_after: The first measurement.
        as_random: Whether the layers of an epoch are as random.
        frozen: The first measurement of the layers that are frozen, by name.
        fingerprints: Numbers that show whether the weights of these have changed since.
        logged: Names of the layers that were logged.
        trained: The parameters that were not frozen when the training began.
        has_loss: Whether there was a loss so far.
        is_fresh: Whether the first forward pass is still to come, or under way.
        is_told: Whether the table of layers has been printed.
        is_off: Whether nothing is measured: it was given up, or there is no layer; with a warning.
        told: Changes of the model that were told.
        has_measured: Whether anything has been logged so far.
        has_run: Whether a batch has been done so far.
        seen_step: Global step when the last batch ended.
        waiting: Layers that the penalty had not reached after the last step of an epoch; None if
            that is not known.
        stepped: Ids of the optimizers that have stepped in this epoch.
        missing: Layers that the penalty did not reach in the last epoch.
        reached: Layers that it reached in some epoch.
        about_to_move: Parameters of layers that had gradients before a step which is looked at.
        freed: Layers whose gradients were taken away in the last step that was looked at.
        is_mute: Whether logging was given up, with a warning.
        is_loaded: Whether a checkpoint gave this callback its state.
        strangers: Keys of states in the checkpoint that no callback of the trainer has.
    """

    hooks: list[AfterStep] = field(default_factory=list)
    hooked: list[int] = field(default_factory=list)
    stats: dict[str, GradientStats] = field(default_factory=dict)
    open_step: _trainer.OpenStep = field(default_factory=_trainer.OpenStep)
    loss_scale: _trainer.LossScale = field(default_factory=_trainer.LossScale)
    warnings: _trainer.Warnings = field(default_factory=_trainer.Warnings)
    before_after: BeforeAfter = field(default_factory=BeforeAfter)
    as_random: AsRandom = field(default_factory=AsRandom)
    frozen: dict[str, LayerUniformity] = field(default_factory=dict)
    fingerprints: dict[str, float] = field(default_factory=dict)
    logged: set[str] = field(default_factory=set)
    trained: list[nn.Parameter] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    has_loss: bool = False
    is_fresh: bool = True
    is_told: bool = False
    is_off: bool = False
    has_measured: bool = False
    has_run: bool = False
    seen_step: int = 0
    waiting: list[str] | None = None
    is_mute: bool = False
    stepped: set[int] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    freed: set[str] = field(default_factory=set)
    about_to_move: dict[str, tuple[nn.Parameter, ...]] = field(default_factory=dict)
    is_loaded: bool = False
    strangers: list[str] = field(default_factory=list)


def _harmless(hook: Hook) -> Hook:
    """In a callback that only monitors, make an error in a hook a warning: it never stops a fit."""

    @wraps(hook)
    def guarded(callback: HypersphericalUniformity, *args: Any, **kwargs: Any) -> None:
        try:
            hook(callback, *args, **kwargs)
        except Exception as error:
            callback._give_up(error)

    return cast(Hook, guarded)


class HypersphericalUniformity(_trainer.EveryCallback):
    """Spread a LightningModule's neurons over the sphere while it trains, and log how far they are.

    The objective becomes the task's loss plus ``coefficient`` times the penalty, once per optimizer
    step, whatever the precision, accumulation, strategy or optimisation mode. The penalty's gradient
    is shortened only if it is above a fraction of the task's (``share_limit``), or if one step would
    move a neuron by more than its own norm (``step_limit``). The logged training loss is unchanged.

    On logging steps ``hsu/penalty``, ``hsu/ratio_mean``, ``hsu/ratio_max``, ``hsu/angle_min``
    (degrees), ``hsu/dead`` and ``hsu/limited`` go through Lightning's log, where EarlyStopping and
    ModelCheckpoint can watch them; they are also refreshed on the first step and at the end of each
    epoch. Per layer ``hsu/ratio/<layer>``, ``hsu/score/<layer>`` (0 as random, 1 the best there can
    be), ``hsu/energy/<layer>``, ``hsu/min_angle/<layer>`` and ``hsu/gradient_share/<layer>`` go to
    every logger, ``hsu/coefficient/<layer>`` for a schedule or a share, and with a ``tolerance``
    ``hsu/stale_error/<layer>``: the error that the layer's last gradient had when it was replaced.
    ``hsu/recomputed`` is the fraction of the arithmetic that was done since the last logging step.

    Args:
        measure: What to minimise. None is the Riesz energy with s = 2; the class head is
            measured in full space.
        coefficient: A number >= 0, a schedule (optimizer steps done -> number), a share of the
            task's gradient (``Share``), or a mapping of layer patterns to these, of which the first
            match counts. 0 only monitors and leaves training as it is. It is at most 1e30. Another
            one may be assigned at any time: ``callback.coefficient = 0`` switches the penalty off.
            With the default ``share_limit`` a larger one changes little: raise the limit for more.
        apply: How the penalty enters. "gradient": its gradient is added before each optimizer step,
            before Lightning's clipping, but after your own in manual optimisation. "loss": it is
            added to the loss before each backward, divided by ``accumulate_grad_batches``;
            automatic optimisation only, and without the warning of a penalty that is far too strong.
            "decoupled": after each step the neurons move along the
            sphere by learning rate times coefficient times gradient and keep their norms; neither
            the optimizer nor clipping sees this.
        include: Patterns of layer names to take, shell style; None takes all but embeddings, which
            must be asked for.
        exclude: Patterns of layer names to leave out.
        head: The head: "auto" finds the layers that give the model's output: what the model declares,
            else what acts last before the loss at the first forward pass, else the last Linear. Or
            a name, a list of names, or None for no head.
        neurons: How weights hold neurons: a mapping from patterns of their names to "rows",
            "columns", a number of equal parts along the rows (3 for a fused qkv), or a function of
            the weight to its neurons (..., n, d). What it names is measured, embeddings, bare
            parameters and stacks of matrices too.
        head_coefficient: A number, schedule or share for the head; None uses ``coefficient``. It may
            be assigned at any time, too.
        every_n_steps: Apply on every n-th step of each optimizer, at the coefficient's full
            strength. It may be assigned at any time.
        step_limit: The penalty's part of a step is at most this fraction of a neuron's norm, so that
            no near-duplicate or tiny neuron is thrown away (``hsu/limited`` counts them). Of SGD it
            knows learning rate and momentum, of Adam and its relatives that a step is about the
            learning rate in each entry, of others the learning rate alone, which a line says.
            None is no limit.
        share_limit: In each layer the norm of the penalty's gradient is at most this fraction of that of
            the task's, and 0 where that is 0 (``hsu/limited`` counts the neurons of such layers,
            too). At 0.02 no coefficient that was tried, up to 1000, cost a task of our tests more
            than 2 %; at 0.3 the loss of adapters ended 20 % higher. With ``apply="decoupled"`` a
            move is compared with the optimizer's step, whose length its state tells; where it does
            not, a line says what stands for it (see :class:`~lightning_hsu.UniformityRegularizer`).
            ``apply="loss"`` knows no task gradient and has no such limit; a ``Share`` is a limit by
            itself. None is no limit.
        matmul_precision: "medium" multiplies pair energies in bfloat16: the relative error of a
            gradient is 2e-3 in full space for s <= 2, 6e-3 in half space, and 2e-2 at most.
        sample_above: Energies of more neurons are estimated
            (:class:`~lightning_hsu.measures.Sampled`); None computes them.
        tolerance: The relative error, in (0, 1), that a layer's gradient may have on average: it is
            kept and used for as many steps as that allows (``hsu/stale_error/<layer>``,
            ``hsu/recomputed``). None computes every layer at every step. It may be assigned at any
            time. See :class:`~lightning_hsu.UniformityRegularizer` for the memory that it takes, and
            for how changes of weights are noticed. On a GPU ``apply="decoupled"`` waits for the
            device once a step to know how far neurons have moved.
        share_work: Whether the ranks of DDP divide the large layers: each layer's gradient is computed
            by one rank and sent to all, for about 1 / ranks of the arithmetic and memory for one
            gradient of each. False computes every layer on every rank, which may be better over a slow
            network. ``apply="loss"`` does not share: each rank's loss has the whole penalty.
        figures_every_n_steps: Optimizer steps between figures for every logger: ratios over time,
            the worst layers' angles, gradient shares; they are also drawn at the end of fit.
            Without a logger that takes figures they become PNG files. None draws nothing.
        prefix: What the logged names begin with; each of several callbacks needs its own.
        verbose: Print the table of layers at the start of fit, and the layers before and after at
            its end.

    Raises:
        ImportError: for figures without matplotlib.
        ValueError: for a coefficient that is negative, above 1e30 or NaN, an unknown ``apply``, a
            ``tolerance`` outside (0, 1), or at the start of fit a pattern that matches nothing or a
            model without neurons.
        TypeError: for a measure or a coefficient of the wrong kind.
        AttributeError: for another ``measure``, ``apply``, ``include``, ``exclude``, ``head``,
            ``neurons``, ``sample_above``, ``share_work``, ``figures_every_n_steps`` or ``prefix`` that
            is assigned during a fit.
        NotImplementedError: at the start of fit, where the penalty could not be right: with
            DeepSpeed and unknown strategies, or ``apply="loss"`` with manual optimisation or FSDP.

    Reference:
        Liu et al., "Learning with Hyperspherical Uniformity", AISTATS 2021, arXiv 2103.01649.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_hsu import HypersphericalUniformity
        >>> trainer = Trainer(callbacks=[HypersphericalUniformity()], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        measure: Measure | None = None,
        coefficient: Strengths = COEFFICIENT,
        *,
        apply: Literal["gradient", "loss", "decoupled"] = "gradient",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        head: str | list[str] | None = "auto",
        neurons: dict[str, How] | None = None,
        head_coefficient: Strength | None = None,
        every_n_steps: int = 1,
        step_limit: float | None = 1.0,
        share_limit: float | None = SHARE_LIMIT,
        matmul_precision: Literal["highest", "medium"] = "highest",
        sample_above: int | None = SAMPLE_ABOVE,
        tolerance: float | None = None,
        share_work: bool = True,
        figures_every_n_steps: int | None = None,
        prefix: str = "hsu",
        verbose: bool = True,
    ) -> None:
        check_places(Maker(type(self).__name__), measure, coefficient)
        _check_apply(apply)
        self.regularizer = UniformityRegularizer(
            measure,
            coefficient,
            include=include,
            exclude=exclude,
            head=head,
            neurons=neurons,
            head_coefficient=head_coefficient,
            every_n_steps=every_n_steps,
            step_limit=step_limit,
            share_limit=share_limit,
            matmul_precision=matmul_precision,
            sample_above=sample_above,
            tolerance=tolerance,
            share_work=share_work,
        )
        self.regularizer.checks_order = False  # the Trainer calls, and `unreached` tells
        _trainer.check_prefix(prefix)
        _check_share(apply, has_share=self.regularizer.has_share)
        self._apply = apply
        self._prefix = prefix
        self.verbose = verbose
        self._figures = FigureRecorder(prefix, figures_every_n_steps)
        self._fit = _Fit()
        self._is_used = False  # in a fit, or told that nothing happens without one

    @property
    def summary(self) -> Summary | None:
        """What is measured of the model in this fit, and what is not; None outside a fit."""
        found = self.regularizer.summary
        if found is None:
            return None
        regularizer = self.regularizer
        limit = limit_text(regularizer.layers, regularizer.share_limit, apply=self.apply)
        return replace(found, limit=limit)

    measure = OfRegularizer("What is minimised; it may be changed between fits.")
    include = OfRegularizer("Patterns of layers to take; they may be changed between fits.")
    exclude = OfRegularizer("Patterns of layers to leave out; they may be changed between fits.")
    head = OfRegularizer("How the head is found, or which it is; it may be changed between fits.")
    neurons = OfRegularizer("How weights hold neurons; it may be changed between fits.")
    every_n_steps = OfRegularizer(
        "The penalty is applied on every n-th step of each optimizer; it may be changed at any time."
    )
    step_limit = OfRegularizer(
        "The largest part of a neuron's norm by which a step moves it; it may be changed at any time."
    )
    share_limit = OfRegularizer(
        "The largest share of the task's gradient in each layer; it may be changed at any time."
    )
    matmul_precision = OfRegularizer(
        "The precision of matrix products in a step; it may be changed at any time."
    )
    sample_above = OfRegularizer(
        "Neurons above which energies are estimated; it may be changed between fits."
    )
    tolerance = OfRegularizer(
        "The relative error of kept gradients on average; it may be changed at any time."
    )
    share_work = OfRegularizer(
        "Whether ranks divide the large layers; it may be changed between fits."
    )

    @property
    def coefficient(self) -> Strengths:
        """The coefficient as it was given; it may be changed at any time.

        Another one counts from the next step on. Where ranks train together, all must assign it. Steps
        at which every coefficient is 0 are not counted for schedules and ``every_n_steps``.
        """
        return cast(Strengths, self.regularizer.coefficient)

    @coefficient.setter
    def coefficient(self, coefficient: Strengths) -> None:
        self._check_strength(Coefficient(coefficient))
        self.regularizer.coefficient = coefficient

    @property
    def head_coefficient(self) -> Strength | None:
        """The head's coefficient, None for that of all layers; it may be changed at any time."""
        return self.regularizer.head_coefficient

    @head_coefficient.setter
    def head_coefficient(self, coefficient: Strength | None) -> None:
        if coefficient is not None:
            self._check_strength(Coefficient.of_head(coefficient))
        self.regularizer.head_coefficient = coefficient

    def _check_strength(self, strength: Coefficient) -> None:
        """Refuse a coefficient that could have no effect."""
        _check_share(self.apply, has_share=strength.has_share)
        if self._fit.is_off and not strength.is_zero:
            raise AttributeError(
                "nothing is measured in this fit, as a warning has said, so that another coefficient "
                "would have no effect: assign it before trainer.fit"
            )

    @property
    def apply(self) -> Literal["gradient", "loss", "decoupled"]:
        """How the penalty enters; it may be changed between fits."""
        return self._apply

    @apply.setter
    def apply(self, apply: Literal["gradient", "loss", "decoupled"]) -> None:
        refuse_attached("apply", is_attached=self.regularizer.is_attached)
        _check_apply(apply)
        _check_share(apply, has_share=self.regularizer.has_share)
        self._apply = apply

    @property
    def figures_every_n_steps(self) -> int | None:
        """Optimizer steps between figures, None for no figure; it may be changed between fits."""
        return self._figures.every_n_steps

    @figures_every_n_steps.setter
    def figures_every_n_steps(self, every_n_steps: int | None) -> None:
        refuse_attached("figures_every_n_steps", is_attached=self.regularizer.is_attached)
        self._figures = FigureRecorder(self.prefix, every_n_steps)

    @property
    def prefix(self) -> str:
        """What the logged names begin with; it may be changed between fits."""
        return self._prefix

    @prefix.setter
    def prefix(self, prefix: str) -> None:
        refuse_attached("prefix", is_attached=self.regularizer.is_attached)
        _trainer.check_prefix(prefix)
        self._prefix = prefix
        self._figures = FigureRecorder(prefix, self.figures_every_n_steps)

    @property
    def state_key(self) -> str:
        """Tells several instances apart; a changed setting still finds its state."""
        _trainer.check_prefix_for_trainer(self)
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """The training state after the last complete step; an interrupted step is done again."""
        found = self.regularizer.state_dict()
        before = self._fit.open_step.state_before()
        return found if before is None else before

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let the next step compute every gradient, on all ranks: Lightning calls this on each."""
        self.regularizer.state.deltas.make_due()

    @_harmless
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what a checkpoint holds, as far as it can be used; warn of what is left out."""
        self._fit.is_loaded = True
        _trainer.warn_dropped(self.regularizer.restore(state_dict))

    @_harmless
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Begin anew, and look whose states there are; this callback's is loaded after this."""
        if trainer.state.fn == "fit":
            _trainer.keep_from_breaking(checkpoint, self.state_key)
            self.regularizer.restore(TrainingState().state_dict())
            self._fit.strangers = _trainer.strangers(trainer, checkpoint)

    @_harmless
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restart the counts with a new trainer; a checkpoint's counts are loaded after this."""
        if stage != "fit":
            if not self._is_used:
                _trainer.warn_idle(stage)
            self._is_used = True
            return
        self._is_used = True
        _trainer.check_prefixes(self, trainer)
        self._release()  # from a fit that never called its end hooks: another callback failed
        if trainer.global_step == 0:
            self.regularizer.reset()
        else:
            before = self._fit.open_step.state_before()
            if before is not None:  # interrupted within a step, which is done again
                self.regularizer.restore(before)
        self._fit = _Fit()
        self._figures.begin()

    @_harmless
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the neurons; lazy layers have none before their first batch."""
        if not uninitialized(pl_module):
            self._attach(trainer, pl_module)

    @_harmless
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook the optimizers, and measure before the first step."""
        self._fit.seen_step = trainer.global_step
        self._fit.is_fresh = not self.regularizer.has_stepped
        self._fit.trained = [p for p in pl_module.parameters() if p.requires_grad]
        self._hook_optimizers(trainer)
        if self.regularizer.head_is_settled:
            self._begin(trainer)

    @_harmless
    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Find the head. Add the penalty to the loss, which is already divided and scaled here."""
        self._attach(trainer, pl_module)
        self._hook_optimizers(trainer)
        if not self.regularizer.only_monitors:
            self._follow(trainer.optimizers)
        self._find_head(trainer, loss)
        if self._apply != "loss":
            return
        if not self.regularizer.active:
            return
        open_step = self._fit.open_step
        open_step.begin(trainer, self.regularizer.state.state_dict)
        self.regularizer.add_to_loss(
            loss,
            trainer.optimizers[0],
            index=0,
            factor=_trainer.loss_factor(trainer, loss),
            same_step=open_step.is_counted(0),
        )

    @_harmless
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradient.

        Here the task's gradient is reduced over ranks, unscaled and complete over accumulated
        batches, but not yet clipped.
        """
        self._attach(trainer, pl_module)
        self._begin(trainer)
        if not self.regularizer.active:
            return
        index = self._hook(trainer, optimizer).position
        self._fit.about_to_move = {}
        if self._apply == "decoupled":  # not a step yet: a GradScaler may skip it
            self.regularizer.note_reached(optimizer)
            if self._will_measure(trainer):
                self._fit.about_to_move = self.regularizer.with_gradients(optimizer)
            return
        fit = self._fit
        fit.open_step.begin(trainer, self.regularizer.state.state_dict)
        same_step = fit.open_step.is_counted(index)
        fit.open_step.count(index)
        fit.warnings.line_search(optimizer)
        will_measure = self._will_measure(trainer)
        self.regularizer.measures_next = will_measure
        if self._apply == "loss":
            self.regularizer.count_step(optimizer, index=index, same_step=same_step)
            return
        every = self.regularizer.every_n_steps
        fit.stats |= self.regularizer.add_gradients(
            optimizer,
            index=index,
            grad_scale=_trainer.remaining_scale(trainer, optimizer, fit.loss_scale),
            # Those of the last step that acts before Lightning logs are logged.
            stats=will_measure or (every > 1 and _trainer.logs_within(trainer, every)),
            same_step=same_step,
        )

    def _hook_optimizers(self, trainer: pl.Trainer) -> None:
        """Hook the trainer's optimizers if they are others than before."""
        fit = self._fit
        present = [*map(id, trainer.optimizers)]
        if present == fit.hooked or self.regularizer.only_monitors:
            return
        fit.hooks = _trainer.hook_optimizers(trainer, fit.hooks, self._after_step)
        fit.hooked = present
        fit.warnings.shared(self.regularizer.layers, fit.hooks[: len(present)])

    def _drop_hooks(self) -> None:
        """Take the hooks off optimizers that are gone; they may have stepped once more."""
        fit = self._fit
        present = len(fit.hooked)
        for hook in fit.hooks[present:]:
            hook.remove()
        del fit.hooks[present:]

    def _hook(self, trainer: pl.Trainer, optimizer: Optimizer) -> AfterStep:
        """The hook on an optimizer that is about to step, wherever it has come from."""
        self._hook_optimizers(trainer)
        hooks = self._fit.hooks
        for hook in hooks:
            if hook.optimizer is optimizer:
                break
        else:
            hook = _trainer.after_step(trainer, optimizer, len(hooks), self._after_step)
            hooks.append(hook)
        if hook.replaces_step and not hook.is_stepping:
            _trainer.catch_late_step(trainer, hook)
        return hook

    def _after_step(self, trainer: pl.Trainer, hook: AfterStep) -> None:
        """Move the neurons, or look ahead, as ``apply`` says; not called for a skipped step."""
        fit = self._fit
        is_counted = fit.open_step.is_counted(hook.position)
        fit.open_step.end()
        fit.stepped.add(id(hook.optimizer))
        self._attach(trainer, trainer.lightning_module)
        if not self.regularizer.active:
            return
        if self._apply == "loss" and not is_counted:  # it stepped behind Lightning's back
            self.regularizer.count_step(hook.optimizer, index=hook.position)
        if self._apply == "loss":
            self.regularizer.look_for_moves()
        if self._apply == "gradient" and self.regularizer.looks_ahead:
            self.regularizer.look_ahead(hook.optimizer, index=hook.position)
        if self._apply == "decoupled":
            every = self.regularizer.every_n_steps
            stats = self._will_measure(trainer) or _trainer.logs_within(trainer, every)
            try:
                moved = self.regularizer.move(hook.optimizer, index=hook.position, stats=stats)
            except UnknownRateError as error:
                if not self.regularizer.has_stepped:
                    raise
                fit.warnings.once(f"{error}. Until then the penalty does nothing there.")
                return
            fit.stats |= moved
            if fit.about_to_move:
                freed = set(self.regularizer.without_gradients(fit.about_to_move))
                fit.warnings.freed(freed & fit.freed)  # once may be a user's own doing
                fit.freed = freed
            fit.about_to_move = {}

    @_harmless
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure and log after the step, only on logging steps."""
        fit = self._fit
        fit.loss_scale.ask(trainer)
        has_stepped = trainer.global_step != fit.seen_step
        if batch_idx == 0 or has_stepped:
            fit.has_run = True
        if fit.has_loss and (has_stepped or self.regularizer.state.heads):
            fit.is_fresh = False  # what follows is no first forward pass
        self._tell_change()
        if self.regularizer.state.now.findings:
            self._tell_findings()
        if _trainer.is_last_step(trainer):  # before others unfreeze layers, or add some
            fit.waiting = self.regularizer.unreached()
        self._hook_optimizers(trainer)  # one may step next without any hook of Lightning
        if len(fit.hooks) != len(fit.hooked):
            self._drop_hooks()
        accumulates = pl_module.automatic_optimization and not has_stepped
        if accumulates or not self.regularizer.layers:
            return
        self._begin(trainer)
        logs = self._will_measure(trainer)
        draws = self._figures.due(trainer, fit.seen_step)
        fit.seen_step = trainer.global_step
        if logs or draws:
            present = {layer.name for layer in self.regularizer.layers}
            stats = {name: one for name, one in fit.stats.items() if name in present}
            late = LateStats(stats) if stats else None
            measured = self._measure()  # which waits for a GPU
            done = {} if late is None else late.read()
            shares = _finite_shares(done)
            penalised = {}
            for layer in self.regularizer.trained_layers:
                if layer.strength != 0:
                    penalised[layer.name] = layer.measure
            fit.as_random.note(measured, penalised)
            self._keep(trainer, measured, shares)
            if logs:
                self._publish(partial(self._log, trainer, pl_module, measured, done))
                fit.has_measured = True
            if draws:
                self._publish(partial(self._draw, trainer))
            self.regularizer.state.settle(self.regularizer.layers)
        if logs or self.regularizer.every_n_steps == 1:
            fit.stats = {}

    @_harmless
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn, once, of layers that the penalty does not reach."""
        if not self._fit.has_run:
            return  # resumed so late in an epoch that it had no step left
        self._attach(trainer, pl_module)  # for lazy layers if Lightning saw no optimizer step
        self._follow(scan=True)
        fit = self._fit
        unreached = self._unreached()
        due = []
        for layer in unreached:
            if not _trainer.waits_for_a_step(trainer, layer, fit.stepped):
                due.append(layer)
        fit.warnings.unreached(due, trainer)
        fit.missing = {layer.name for layer in unreached}
        fit.reached.update(layer.name for layer in self.regularizer.layers)
        fit.reached -= fit.missing
        fit.stepped = set()
        self._inform(fit.as_random.end_epoch())
        self.regularizer.state.begin_epoch()

    @_harmless
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of layers whose optimizers have never stepped."""
        fit = self._fit
        if fit.has_run:
            never = fit.missing - fit.reached
            layers = [layer for layer in self.regularizer.layers if layer.name in never]
            fit.warnings.unreached(layers, trainer)

    def _publish(self, act: Callable[[], None]) -> None:
        """Log or draw; an error of one rank's logger must not part it from ranks that share weights."""
        if self._fit.is_mute:
            return
        try:
            act()
        except Exception as error:
            if not self.regularizer.only_monitors:
                raise
            self._fit.is_mute = True
            _trainer.warn_off(error)

    def _unreached(self) -> list[Layer]:
        """The layers that the penalty has not reached, as after the last step of an epoch."""
        names = set(self.regularizer.unreached())
        if self._fit.waiting is not None:
            names &= set(self._fit.waiting)
        return [layer for layer in self.regularizer.layers if layer.name in names]

    @_harmless
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print each layer before and after; release the model and the optimizers."""
        try:
            if self._fit.has_run:
                self._conclude(trainer)
        finally:
            self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Release the model and the optimizers."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the model and the optimizers."""
        self._release()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the settings and the training state, never the model or a hook."""
        kept = {name: value for name, value in self.__dict__.items() if name not in _LOGGING}
        kept["_fit"] = replace(
            self._fit,
            hooks=[],
            hooked=[],
            stats={},
            trained=[],
            about_to_move={},
            open_step=_trainer.OpenStep(),
        )
        return kept

    def _release(self) -> None:
        """Release the model and the optimizers."""
        for hook in self._fit.hooks:
            hook.remove()
        self._fit.hooks = []
        self._fit.hooked = []
        self._fit.stats = {}
        self._fit.trained = []
        self._fit.about_to_move = {}
        self._fit.is_off = False
        for name in _LOGGING:
            self.__dict__.pop(name, None)
        self.regularizer.detach()

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the neurons, unless that is already done."""
        if self.regularizer.is_attached or self._fit.is_off:
            return
        _trainer.check_training(trainer, pl_module, self.apply)
        share_work = self.regularizer.share_work and _trainer.trains_alike(trainer)
        placement = placement_of(pl_module, trainer.strategy.model, share_work=share_work)
        self.regularizer.attach(pl_module, placement=placement, watch=False)
        self._fit.is_off = not self.regularizer.layers  # of which there was a warning
        self._fit.warnings.idle(self.regularizer.idle())
        _trainer.warn_added_up(self, trainer)

    def _follow(self, optimizers: Sequence[Optimizer] = (), *, scan: bool = False) -> None:
        """Look whether the model has changed, and tell what has become of its layers."""
        if not self._fit.is_off:
            self.regularizer.follow(optimizers, scan=scan)
            self._tell_change()

    def _tell_change(self) -> None:
        """Tell what has become of the layers since this was last told."""
        change = self.regularizer.state.take_change()
        if change is None:
            return
        fit = self._fit
        fit.is_fresh = True  # the head may be another one, which a loss will show
        fit.has_loss = False
        for name in (*change.added, *change.renewed):
            fit.frozen.pop(name, None)
        text = change_text(change)
        if self.verbose and text not in fit.told and len(fit.told) <= _MOST_CHANGES:
            fit.told.add(text)
            rank_zero_info(f"Hyperspherical uniformity: {text}")
            if len(fit.told) > _MOST_CHANGES:
                rank_zero_info("Hyperspherical uniformity: further changes are not told")

    def _give_up(self, error: Exception) -> None:
        """Raise an error, or stop monitoring with a warning if that is all that is done."""
        if not self.regularizer.only_monitors:
            raise error
        if not self._fit.is_off:
            _trainer.warn_off(error)
        self._fit.is_off = True
        self.regularizer.detach()

    def _find_head(self, trainer: pl.Trainer, loss: Tensor) -> None:
        """Take the layers that act last before the losses of the first batch for heads."""
        fit = self._fit
        if not fit.is_fresh or not self.regularizer.layers:
            return
        before = self._heads()
        fit.has_loss = self.regularizer.find_head(loss) or fit.has_loss
        if not fit.is_told:
            self._begin(trainer)
        elif self._heads() != before:  # of another optimizer, which has not stepped yet
            self._begin_anew(trainer, before)

    def _heads(self) -> set[str]:
        """Names of the heads."""
        return {layer.name for layer in self.regularizer.layers if layer.target.head}

    def _begin_anew(self, trainer: pl.Trainer, known: set[str]) -> None:
        """Tell of more heads, and measure the layers again in the spaces that they now have."""
        more = sorted(self._heads() - known)
        if self.verbose and more:
            rank_zero_info(f"Hyperspherical uniformity: more heads: {', '.join(more)}")
        fit = self._fit
        fit.frozen = {}
        if fit.has_run:  # in a model that has changed: those layers are in another space now
            fit.before_after.forget(self._heads() ^ known)
        elif self._prints_or_draws(trainer):
            fit.before_after.forget()
            self._keep(trainer, self._measure(), {})

    def _begin(self, trainer: pl.Trainer) -> None:
        """Print the layers and measure them before the first step, once the head is known."""
        fit = self._fit
        if fit.is_told or not self.regularizer.layers:
            return
        fit.is_told = True
        fit.warnings.shared(self.regularizer.layers, fit.hooks[: len(fit.hooked)])
        if not fit.is_loaded:
            counts = what_counts(self.regularizer.layers, self.regularizer.every_n_steps)
            _trainer.warn_without_state(trainer, self.state_key, fit.strangers, counts)
        with _trainer.trainable(fit.trained):  # toggled off at this moment, perhaps
            if self.verbose:
                rank_zero_info(f"Hyperspherical uniformity:\n{self.summary}")
            self._tell_zeros(self.regularizer.layers_at_zero())
            if self._prints_or_draws(trainer):
                self._keep(trainer, self._measure(), {})
        self.regularizer.state.settle(self.regularizer.layers)

    def _tell_zeros(self, layers: Sequence[Layer]) -> None:
        """Tell of layers that start at zero: a warning where no limit keeps their directions."""
        if not layers:
            return
        is_limited = self.apply != "loss" and self.regularizer.limits_shares(layers)
        text = zeros_text(layers, is_limited=is_limited)
        if is_limited:
            self._inform(text)
        else:
            self._fit.warnings.once(text)

    def _tell_findings(self) -> None:
        """Tell what the looks at the penalty's strength have shown."""
        findings = self.regularizer.state.now.findings
        for one in findings:
            if one.kind != "weak":
                self._inform(one.text)
            elif self._fit.as_random.is_crowded:  # else there is nothing to be done
                self._fit.warnings.once(one.text)
        findings.clear()

    def _inform(self, text: str | None) -> None:
        """Print what is no matter for a warning."""
        if self.verbose and text is not None:
            rank_zero_info(f"Hyperspherical uniformity: {text}")

    def _measure(self, *, changed: bool = False) -> list[LayerUniformity]:
        """Measure the layers as they are now, and warn of NaN weights.

        Args:
            changed: Whether frozen layers are measured again whose weights have changed.
        """
        self._follow()
        if changed:
            self._forget_changed()
        measured = self._measured()
        if any(one.nonfinite for one in measured):
            way_out = "" if self._is_bounded() else broken_by_penalty(self.apply)
            self._fit.warnings.nonfinite(measured, way_out)
        return measured

    def _is_bounded(self) -> bool:
        """Whether the penalty has not acted so far, or its gradient is not above the task's."""
        regularizer = self.regularizer
        if not regularizer.active or not regularizer.has_stepped:
            return True
        if self.apply == "loss":
            return False
        penalised = [layer for layer in regularizer.layers if layer.strength != 0]
        return regularizer.limits_shares(penalised, 1.0)

    def _measured(self) -> list[LayerUniformity]:
        """Measure the layers as they are now; frozen ones only once."""
        fit = self._fit
        frozen = {layer.name for layer in self.regularizer.layers}
        frozen -= {layer.name for layer in self.regularizer.trained_layers}
        if not frozen:
            fit.frozen = {}
            return self.regularizer.measure_layers()
        known = {name: one for name, one in fit.frozen.items() if name in frozen}
        measured = {one.name: one for one in self.regularizer.measure_layers(but=known)}
        new = frozen - set(known)
        fit.frozen = known | {name: measured[name] for name in new}
        fit.fingerprints |= self.regularizer.fingerprints(new)
        measured |= known
        return [measured[layer.name] for layer in self.regularizer.layers]

    def _forget_changed(self) -> None:
        """Forget the measurements of frozen layers whose weights were changed, as in a teacher."""
        fit = self._fit
        now = self.regularizer.fingerprints(fit.fingerprints)
        for name, fingerprint in fit.fingerprints.items():
            if now.get(name) != fingerprint:
                fit.frozen.pop(name, None)

    def _will_measure(self, trainer: pl.Trainer) -> bool:
        """Whether this batch ends with a measurement.

        It does on logging steps, on the first step of a fit and on the last of an epoch.
        """
        if not self._fit.has_measured or trainer.is_last_batch:
            return True
        return _trainer.is_logging_step(trainer)

    def _prints_or_draws(self, trainer: pl.Trainer) -> bool:
        """Whether the fit has a table or figures besides its metrics."""
        return self.verbose or self._figures.wanted(trainer)

    def _keep(
        self, trainer: pl.Trainer, measured: list[LayerUniformity], shares: dict[str, float]
    ) -> None:
        """Keep a measurement and its step's gradient shares for the table and the figures."""
        self._fit.before_after.note(trainer.global_step, measured)
        if self._figures.wanted(trainer):
            self._figures.history.note(trainer.global_step, measured, shares)

    def _draw(self, trainer: pl.Trainer) -> None:
        """Draw the figures."""
        self._figures.show(trainer, self.regularizer.layers, self.regularizer.gathered)

    def _conclude(self, trainer: pl.Trainer) -> None:
        """Draw once more, and print each layer before and after."""
        if not self.regularizer.layers or not self._prints_or_draws(trainer):
            return
        # Measure again, since another callback may have changed the weights, as averaging does.
        measured = self._measure(changed=True)
        self._keep(trainer, measured, {})
        if self._figures.wanted(trainer):
            self._draw(trainer)
        if self.verbose and trainer.is_global_zero:
            layers = self.regularizer.layers
            rank_zero_info(self._fit.before_after.table(trainer.global_step, layers, measured))

    def _log(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        measured: list[LayerUniformity],
        done: dict[str, StatsNumbers],
    ) -> None:
        """Log aggregates through Lightning, and on logging steps the layers to every logger."""
        if not trainer.barebones:
            limited = None
            trained = {layer.name for layer in self.regularizer.trained_layers}
            together = [one for one in measured if one.name in trained] or measured
            if done:
                limited = sum(one.limited for one in done.values())
            values = aggregates(together, self.regularizer.current_penalty(measured), limited)
            if self.regularizer.tolerance is not None:
                is_row = _trainer.is_logging_step(trainer)
                recomputed = self.regularizer.recomputed(reset=is_row)
                if math.isfinite(recomputed):
                    values["recomputed"] = recomputed
            pl_module.log_dict(self._prefixed(values), on_step=True, on_epoch=False, batch_size=1)
        if _trainer.is_logging_step(trainer):
            step = _trainer.logged_step(trainer)
            varying = self.regularizer.varying_coefficients()
            values = by_layer(self._new(measured), varying, _finite_shares(done))
            if self.regularizer.tolerance is not None:
                for name, error in self.regularizer.stale_errors().items():
                    values[f"stale_error/{name}"] = error
            values = self._prefixed(values)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    def _new(self, measured: list[LayerUniformity]) -> list[LayerUniformity]:
        """Of measured layers those that were measured just now, or not yet logged."""
        fit = self._fit
        new = []
        for one in measured:
            if one.name not in fit.logged or fit.frozen.get(one.name) is not one:
                new.append(one)
        fit.logged.update(one.name for one in new)
        return new

    def _prefixed(self, values: dict[str, float]) -> dict[str, float]:
        """Values under the names that are logged."""
        return {f"{self.prefix}/{name}": value for name, value in values.items()}


def _check_apply(apply: str) -> None:
    """Refuse an unknown way for the penalty to enter."""
    check_choice("apply", apply, "gradient", "loss", "decoupled")


def _check_share(apply: str, *, has_share: bool) -> None:
    """Refuse a share of the task's gradient where that is not known."""
    if apply == "loss" and has_share:
        raise ValueError(
            "a Share needs the task's gradient apart from the loss: use apply='gradient' or "
            "'decoupled'"
        )


def _finite_shares(done: dict[str, StatsNumbers]) -> dict[str, float]:
    """Finite norms of the added gradients over those of the task's, by layer."""
    return {name: one.share for name, one in done.items() if math.isfinite(one.share)}
