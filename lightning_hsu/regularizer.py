"""The engine: targets, coefficients, schedule and state. It knows nothing about a Trainer."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_hsu._checks import check_choice, check_count, check_number, listed
from lightning_hsu._core import bf16_products
from lightning_hsu._core.backend import active as active_backend
from lightning_hsu._core.limits import SAFE_SHARE
from lightning_hsu._engine.attached import Attached, FirstOutputs
from lightning_hsu._engine.buffered import GradientStats
from lightning_hsu._engine.eager import eager, outside_inference_mode
from lightning_hsu._engine.kept import (
    add_plain,
    look_ahead,
    look_for_moves,
    look_together,
    see_changes,
)
from lightning_hsu._engine.late import is_capturing
from lightning_hsu._engine.layer import Layer
from lightning_hsu._engine.misuse import ADD, MOVE
from lightning_hsu._engine.optimizer_steps import OptimizerSteps
from lightning_hsu._engine.plan import (
    PlainUpdates,
    StepContext,
    buckets,
    learning_rates,
)
from lightning_hsu._engine.rates import (
    Rate,
    Rates,
    held_by,
    is_unknown,
    keeps_elsewhere,
    tells_gain,
)
from lightning_hsu._engine.reuse import check_tolerance
from lightning_hsu._engine.state import TrainingState
from lightning_hsu._engine.step import act_on_buckets, loss_terms, refuse_unknown_rates
from lightning_hsu._engine.stored import Dropped
from lightning_hsu._engine.strength import Finding, looked_at
from lightning_hsu._engine.warn import inform, warn
from lightning_hsu._meant import Maker, check_places
from lightning_hsu._monitor.measure import LayerUniformity, layers_at_zero, measure_layers
from lightning_hsu._monitor.on_gpu import measure_on_gpu
from lightning_hsu._monitor.summary import Summary
from lightning_hsu._monitor.tables import limit_text, summary_of, zeros_text
from lightning_hsu._neurons.candidates import Candidates, Skip
from lightning_hsu._neurons.how import How, Neurons, check_neurons
from lightning_hsu._neurons.model import neurons_of_model
from lightning_hsu._neurons.patterns import Patterns, as_list
from lightning_hsu._neurons.placement import PenalisedLayer, Placement, placement_of
from lightning_hsu._neurons.select import (
    Head,
    check_head,
    find_heads,
    nothing_left,
    select,
    unmet,
)
from lightning_hsu._neurons.target import Target
from lightning_hsu._neurons.wrappers import unwrapped
from lightning_hsu._optimizers import AfterOwnStep, AfterStep
from lightning_hsu._settings import BeforeAttach, refuse_attached
from lightning_hsu.coefficients import Coefficient, Share, Strength
from lightning_hsu.measures import Measure
from lightning_hsu.measures.base import check_measure
from lightning_hsu.measures.defaults import (
    COEFFICIENT,
    DEFAULT_MEASURE,
    SAMPLE_ABOVE,
    SHARE_LIMIT,
)
from lightning_hsu.measures.sampled import measure_of_layer

NOTHING_TRAINS = (
    "no layer with a coefficient trains: all of them are frozen, in copies, or quantised, so the "
    "penalty does nothing until one is unfrozen. summarize(model) says which and why; coefficient=0 "
    "only monitors"
)


_UNTOLD = 20  # steps: an optimizer of several may step rarely
_WITHOUT_STATE = (
    10  # moves after which an optimizer without a state has none: a GradScaler skips few
)


def no_longer_measured(reasons: Mapping[str, str]) -> str:
    """The warning about layers of a changed model that can no longer be measured."""
    named = "; ".join(f"'{name}': {reason}" for name, reason in reasons.items())
    return (
        "the model has changed, and layers are no longer measured, nor penalised: "
        f"{named}. Say with include= or neurons= that they are measured, or leave them out with "
        "exclude="
    )


def _check_sample_above(sample_above: int | None) -> int | None:
    """Refuse what is no number of neurons."""
    if sample_above is not None:
        check_count("sample_above", sample_above)
    return sample_above


class UniformityRegularizer:
    """Spread a model's neurons over the sphere in any training loop, with or without Lightning.

    After ``loss.backward()`` and before ``optimizer.step()`` call :meth:`add_gradients`: it adds
    the gradient of coefficient times penalty, summed over the layers, to the parameters' ``.grad``.
    Or after each ``optimizer.step()`` call :meth:`move`: it moves the neurons along the sphere,
    past the optimizer. Or add :meth:`penalty` to the loss.

    Args:
        measure: What to minimise. None is the Riesz energy with s = 2. The class head is
            measured in full space.
        coefficient: A number >= 0 (0 only monitors), a schedule (optimizer steps done -> number), a
            :class:`~lightning_hsu.Share`, or a mapping of layer patterns to these; the first
            matching pattern counts. At most 1e30. Another one may be assigned at any time. With the
            default ``share_limit`` a larger one changes little: raise the limit for more.
        include: Patterns of layers to take, shell style; None takes all but embeddings.
        exclude: Patterns of layers to leave out.
        head: "auto" finds the layers that give the model's output: what the model declares, else
            what acts last before its outputs at the first training forward, else the last Linear.
            Or a name, a list of names, or None for no head.
        neurons: How weights hold neurons: a mapping from patterns of their names to "rows",
            "columns", a number of equal parts along the rows (3 for a fused qkv), or a function of
            the weight to its neurons (..., n, d). What it names is measured, embeddings, bare
            parameters and stacks of matrices too.
        head_coefficient: A number, schedule or share for the head; None uses ``coefficient``. It may
            be assigned at any time, too.
        every_n_steps: Apply on every n-th step of each optimizer, at the coefficient's full
            strength. It may be assigned at any time.
        step_limit: The penalty's part of a step moves a neuron by at most this fraction of its
            norm. A step is the learning rate times what the optimizer makes of a steady gradient:
            momentum of 0.9 makes it ten times as long, and Adam and its relatives make the task's
            gradient as long as one whose entries are 1; where that is 0 the learning rate alone
            counts. Of others only the learning rate is known, which is told once. None is no limit.
        share_limit: In each layer the norm of the penalty's gradient is at most this fraction of
            that of the task's; where the task's is 0 nothing is added. At 0.02 no coefficient that
            was tried, up to 1000, cost a task of our tests more than 2 %; at 0.3 the loss of
            adapters ended 20 % higher. With :meth:`move` a move is compared with the optimizer's
            step, whose length follows from its state: momentum, the running means of Adam and its
            relatives, what Adagrad, Adadelta, RMSprop, Rprop and Adafactor keep; Muon's from the shape. Of
            NAdam it is taken for shorter than it is. Of other optimizers, and where FSDP1 or
            ZeroRedundancyOptimizer divides the state, the task's gradient stands for it, or entries
            of the learning rate where gradients are rescaled; that is told once. A layer whose
            coefficient is a :class:`~lightning_hsu.Share` has a limit of its own. :meth:`penalty`
            and :meth:`add_to_loss` know no task gradient, and no such limit. None is no limit.
        matmul_precision: "medium" multiplies in bfloat16 (see the callback); the monitor's numbers
            stay exact.
        sample_above: Energies of more neurons are estimated
            (:class:`~lightning_hsu.measures.Sampled`); None computes them.
        tolerance: The relative error, in (0, 1), that a layer's gradient may have on average: it is
            kept, used for as many steps as its measured rate of ageing allows, and computed again
            when the neurons have moved too far; single steps may reach two or three times it. A
            sudden change of much of a layer is seen at the next step. So is a new, pruned or
            swapped neuron (within four steps while gradients last for fewer) if torch counts the
            write, as under ``no_grad``, and no ranks train together; else, as through ``p.data`` or
            within an optimizer's step, when its turn comes (at each step that of one layer, among
            those whose gradients are 8 steps old or older), or its gradient is computed again
            before. (On a GPU a change through ``p.data`` after :meth:`look_ahead` is seen one step
            later, with a warning.) That takes memory for one gradient of each layer
            (half in bfloat16) and a little more. None computes every layer at every step. It may be
            assigned later. On a GPU :meth:`move` and sharded weights wait for the device once a
            step to know how far neurons have moved, and so does an optimizer that steps right after
            another one, with no backward pass between, when that has computed gradients.
        share_work: Whether the ranks of DDP divide the large layers: each layer's gradient is
            computed by one rank and sent to all, for about 1 / ranks of the arithmetic and memory
            for one gradient of each. False computes every layer on every rank, as it must be where
            ranks have weights of their own between averages (local SGD) or take unequal numbers of
            steps, and may be better over a slow network. Within torch's ``Join`` around DDP it is so
            by itself, from then on, and a ``tolerance`` keeps nothing; there ``every_n_steps`` and
            schedules count the steps of each rank, so that ranks part. :meth:`penalty` and
            :meth:`add_to_loss` do not share: each rank's loss has the whole penalty.

    Raises:
        ValueError: for a coefficient that is negative, above 1e30 or NaN, ``every_n_steps`` or
            ``sample_above`` below 1, a ``step_limit`` or ``share_limit`` <= 0 or a ``tolerance``
            outside (0, 1).
        TypeError: for a measure or a coefficient of the wrong kind.
        AttributeError: for another ``measure``, ``include``, ``exclude``, ``head``, ``neurons``,
            ``sample_above`` or ``share_work`` that is assigned while a model is attached.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_hsu import UniformityRegularizer
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> regularizer = UniformityRegularizer().attach(model)
        >>> loss = model(torch.randn(32, 8)).square().mean()
        >>> loss.backward()
        >>> _ = regularizer.add_gradients(optimizer)
        >>> optimizer.step()
        >>> [layer.name for layer in regularizer.measure_layers()]
        ['0', '2']
    """

    def __init__(
        self,
        measure: Measure | None = None,
        coefficient: Strength | Mapping[str, Strength] = COEFFICIENT,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        head: Head = "auto",
        neurons: Neurons = None,
        head_coefficient: Strength | None = None,
        every_n_steps: int = 1,
        step_limit: float | None = 1.0,
        share_limit: float | None = SHARE_LIMIT,
        matmul_precision: Literal["highest", "medium"] = "highest",
        sample_above: int | None = SAMPLE_ABOVE,
        tolerance: float | None = None,
        share_work: bool = True,
    ) -> None:
        maker = Maker(type(self).__name__, of_preset=".regularizer")
        check_places(maker, measure, coefficient)
        check_tolerance(tolerance)
        self._attached: Attached | None = None
        self.state = TrainingState(tolerance)
        self._measure = _checked_measure(measure)
        self._coefficient = Coefficient(coefficient)
        self._head_coefficient = _of_head(head_coefficient)
        self.include = include
        self.exclude = exclude
        self.head = head
        self.neurons = neurons
        self.every_n_steps = every_n_steps
        self.step_limit = step_limit
        self.share_limit = share_limit
        self.matmul_precision = matmul_precision
        self.sample_above = sample_above
        self.share_work = share_work
        self._watch: RemovableHandle | None = None
        self._may_watch = False
        self._watched_since = 0
        self._saw_outputs = False
        self.checks_order = True  # and hooks, in an own loop; Lightning's callback has its own
        self.measures_next = False  # whether the layers are measured after the step under way

    include: BeforeAttach[Patterns] = BeforeAttach("Patterns of layers to take")
    exclude: BeforeAttach[Patterns] = BeforeAttach("Patterns of layers to leave out")
    head: BeforeAttach[Head] = BeforeAttach("How the head is found, or which it is")
    neurons: BeforeAttach[dict[str, How]] = BeforeAttach(
        "How weights hold neurons, by patterns of their names", check_neurons
    )
    sample_above: BeforeAttach[int | None] = BeforeAttach(
        "Neurons above which energies are estimated", _check_sample_above
    )
    share_work: BeforeAttach[bool] = BeforeAttach("Whether ranks divide the large layers")

    @property
    def measure(self) -> Measure:
        """What is minimised; it may be changed while no model is attached.

        What the former one has carried from step to step is forgotten.
        """
        return self._measure

    @measure.setter
    def measure(self, measure: Measure | None) -> None:
        refuse_attached("measure", is_attached=self.is_attached)
        checked = _checked_measure(measure)
        if checked != self._measure:
            self.state.forget_measure()
        self._measure = checked

    @property
    def coefficient(self) -> Strength | Mapping[str, Strength]:
        """The coefficient as it was given; it may be changed at any time.

        Another one counts from the next step on. Where ranks train together, all must assign it.
        """
        return self._coefficient.readable

    @coefficient.setter
    def coefficient(self, coefficient: Strength | Mapping[str, Strength]) -> None:
        self._take_strengths(Coefficient(coefficient), self._head_coefficient)

    @property
    def head_coefficient(self) -> Strength | None:
        """The head's coefficient, None for that of all layers; it may be changed at any time."""
        if self._head_coefficient is None:
            return None
        return cast(Strength, self._head_coefficient.given)

    @head_coefficient.setter
    def head_coefficient(self, coefficient: Strength | None) -> None:
        self._take_strengths(self._coefficient, _of_head(coefficient))

    @property
    def every_n_steps(self) -> int:
        """The penalty is applied on every n-th step of each optimizer; it may be changed at any time."""
        return self._every_n_steps

    @every_n_steps.setter
    def every_n_steps(self, every_n_steps: int) -> None:
        check_count("every_n_steps", every_n_steps)
        self._every_n_steps = every_n_steps
        self._looked_at = looked_at(every_n_steps)

    @property
    def matmul_precision(self) -> Literal["highest", "medium"]:
        """The precision of matrix products in a step; it may be changed at any time."""
        return self._matmul_precision

    @matmul_precision.setter
    def matmul_precision(self, precision: Literal["highest", "medium"]) -> None:
        check_choice("matmul_precision", precision, "highest", "medium")
        self._matmul_precision = precision

    @property
    def step_limit(self) -> float | None:
        """The largest part of a neuron's norm by which a step moves it; it may be changed at any time."""
        return self._step_limit

    @step_limit.setter
    def step_limit(self, step_limit: float | None) -> None:
        self._step_limit = _check_limit("step_limit", step_limit)

    @property
    def share_limit(self) -> float | None:
        """The largest share of the task's gradient in each layer; it may be changed at any time."""
        return self._share_limit

    @share_limit.setter
    def share_limit(self, share_limit: float | None) -> None:
        self._share_limit = _check_limit("share_limit", share_limit)

    @property
    def tolerance(self) -> float | None:
        """The relative error of kept gradients on average; it may be changed at any time.

        None drops them. With a smaller one gradients are used for as much shorter.
        """
        return self.state.deltas.tolerance

    @tolerance.setter
    def tolerance(self, tolerance: float | None) -> None:
        check_tolerance(tolerance)
        self.state.deltas.set_tolerance(tolerance)

    @property
    def layers(self) -> list[Layer]:
        """The layers that are measured, in the model's order; empty without a model."""
        return [] if self._attached is None else self._attached.layers

    @property
    def skips(self) -> list[Skip]:
        """The weights that are not measured, with the reasons."""
        return [] if self._attached is None else self._attached.skips

    @property
    def summary(self) -> Summary | None:
        """What is measured of the attached model, and what is not; None without a model."""
        attached = self._attached
        if attached is None:
            return None
        with self.gathered():
            return summary_of(
                type(attached.model).__name__,
                attached.layers,
                attached.skips,
                attached.coverage,
                self.every_n_steps,
                self.tolerance,
                limit_text(attached.layers, self.share_limit),
            )

    @property
    def active(self) -> bool:
        """Whether any layer has a coefficient other than the number 0."""
        return self._attached is not None and self._attached.plan.is_active

    @property
    def only_monitors(self) -> bool:
        """Whether every coefficient is the number 0."""
        head = self._head_coefficient
        return self._coefficient.is_zero and (head is None or head.is_zero)

    @property
    def head_is_settled(self) -> bool:
        """Whether the first training forward can no longer change what the head is."""
        return self.head != "auto" or bool(self.state.heads) or self.has_stepped

    @property
    def has_stepped(self) -> bool:
        """Whether any optimizer has stepped, in this training or in the one that is resumed."""
        return any(self.state.counter.done)

    @property
    def has_share(self) -> bool:
        """Whether a coefficient is, or holds, a share of the task's gradient."""
        head = self._head_coefficient
        return self._coefficient.has_share or (head is not None and head.has_share)

    def attach(
        self,
        model: nn.Module,
        *,
        placement: Placement | None = None,
        watch: bool = True,
        strict: bool = True,
    ) -> UniformityRegularizer:
        """Find the model's neurons; return self. Where ranks share the weights, all must call it.

        Args:
            model: The model, possibly wrapped by DDP, FSDP or Fabric.
            placement: How its weights are placed over the ranks; None looks at the model.
            watch: Whether ``head="auto"`` takes the layers that act last before the model's outputs
                at its first training forward; else call :meth:`find_head` with the loss.
            strict: Whether to refuse a model without a layer to measure. With a coefficient of 0
                there is only a warning.

        Raises:
            ValueError: if a pattern matches nothing, no layer is left to measure, or there is no
                head for ``head_coefficient``; or ``LIGHTNING_HSU_BACKEND`` names no back end.
            RuntimeError: if this machine cannot run that back end.
            NotImplementedError: if FSDP1 does not keep the original parameters.
            TypeError: if the model is no ``torch.nn.Module``.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"attach(model) takes a torch.nn.Module; got a {type(model).__name__}")
        active_backend()  # before the first step, if it cannot be had
        if placement is None:
            placement = placement_of(model, share_work=self.share_work)
        model = unwrapped(model)
        self.detach()
        self.state.attach(model)
        with placement.whole_parameters(with_grads=False):

            def find(strict: bool) -> Candidates[Target]:
                return neurons_of_model(model, placement, self.neurons, strict=strict)

            attached = Attached(model, placement, find, self._choose, self._layer, self.state.heads)
            candidates = attached.candidates
            if not attached.layers and strict:
                self._refuse(nothing_left(candidates.source, attached.skips))
            names = [layer.name for layer in attached.layers]
            if names:
                self._coefficient.check_names(names)
            heads = find_heads(candidates, self.head, self.state.heads)
            may_be_found = self.head == "auto" and not heads  # at the first forward pass
            if self._head_coefficient is not None and names and not may_be_found:
                check_head([layer.target for layer in attached.layers])
            dropped = Dropped()
            self.state.check(attached.layers, dropped)
        self._attached = attached
        self.state.now.order.begin(attached.layers)
        if dropped:
            warn(str(dropped))
        if strict and self.nothing_trains():
            warn(NOTHING_TRAINS)
        if self.checks_order:
            self.state.now.zeros = self.layers_at_zero()
        self._may_watch = watch
        if not self.head_is_settled:
            self._watch_outputs()
        return self

    def follow(self, optimizers: Iterable[Optimizer] = (), *, scan: bool = False) -> bool:
        """Look whether the model has changed; if so, find its layers anew.

        Every step does this: parameters, modules, ties and parametrizations that come, go or are
        replaced are followed. Counts and states go on by the names of the layers. A layer that
        cannot be measured any more is warned of. Where ranks share the weights, all must call it.

        Args:
            optimizers: Optimizers whose parameters may be those of new layers.
            scan: Whether to look at all parameters of the model: else a new layer is seen by its
                place beside others, or by an optimizer that has it.

        Returns:
            Whether the model has changed.
        """
        if not self._check_attached().placement.keeps_whole:
            return False  # FSDP1: a step looks for itself, while it has the weights whole
        return self._follow(optimizers, scan=scan)

    def _follow(self, optimizers: Iterable[Optimizer] = (), *, scan: bool = False) -> bool:
        """The same where the weights are whole already."""
        attached = self._check_attached()
        is_current = attached.watch.is_current(optimizers)
        is_current = is_current and attached.plan.is_current()
        if is_current and scan:
            is_current = attached.watch.knows_all(attached.model.parameters())
        if is_current:
            return False
        change = attached.follow(self.state.heads)
        self.state.note_change(change, attached.layers)
        self._watch_outputs()  # the head may be another one
        if change.lost:
            warn(no_longer_measured(change.lost))
        if change.added or change.renamed:
            self._tell_unmet(attached)
        if not attached.layers and "nothing left" not in self.state.now.told:
            self.state.now.told.add("nothing left")
            if not self.only_monitors and not change.lost:
                warn(
                    "the model has changed and has no layer left to measure, so there is no penalty "
                    "any more"
                )
        return True

    def _tell_unmet(self, attached: Attached) -> None:
        """Warn, once, of what was said of layers that have other names now."""
        patterns = {
            "include": as_list("include", self.include) or [],
            "exclude": as_list("exclude", self.exclude) or [],
            "coefficient": self._coefficient.patterns,
        }
        told = self.state.now.told
        words = [one for one in unmet(attached.candidates, self.head, patterns) if one not in told]
        told.update(words)
        if words:
            warn(
                f"the model has changed, and {', '.join(words)} meets no layer any more: a pattern such "
                "as '*head*' meets a layer under its new name, too"
            )

    @property
    def is_attached(self) -> bool:
        """Whether there is a model."""
        return self._attached is not None

    def _watch_outputs(self) -> None:
        """Take the head from the model's next outputs, where that was asked for."""
        if self._may_watch and self.head == "auto" and self._watch is None:
            model = self._check_attached().model
            self._watch = model.register_forward_hook(FirstOutputs(self))
            self._watched_since = sum(self.state.counter.done)  # a step may be under way

    def find_head(self, outputs: object) -> bool:
        """With ``head="auto"``, take the layers that act last before a loss for the head.

        Call it before the first step, if at all: :meth:`attach` watches the model's outputs. What
        the model itself declares counts first. Where ranks train together, all must call it.

        Args:
            outputs: A loss, or a model's outputs, with their graph; several losses in a tuple.

        Returns:
            Whether they are of the model as it is now: layers may have been replaced since.
        """
        self._stop_watching()
        if self._saw_outputs:  # what the user says counts more
            self._saw_outputs = False
            self.state.heads = []
        return self._take_heads(outputs)

    def see_outputs(self, outputs: object) -> None:
        """Take heads from the model's outputs at its first training forward."""
        self._stop_watching()
        if sum(self.state.counter.done) > self._watched_since + 1:
            return  # the first forward passes were compiled
        self._take_heads(outputs)
        self._saw_outputs = True

    def _take_heads(self, outputs: object) -> bool:
        """Take the layers that act last before these outputs for heads, beside those known.

        Returns:
            Whether the outputs are of the model as it is now.
        """
        attached = self._check_attached()
        if self.head != "auto" or not attached.placement.keeps_whole:
            return True
        self.follow()
        with self.gathered():
            traced = attached.placement.agree(attached.last_before(outputs))
            former: list[str] = []
            ended = self.state.now.ended
            if ended is not None:
                acting = attached.acting_in(outputs)
                if acting is None:
                    return False
                ended.update(traced)
                former = [name for name in self.state.heads if name in acting - ended]
            heads = [name for name in traced if name not in self.state.heads]
            if not heads and not former:
                return True
            self.state.heads = [name for name in self.state.heads if name not in former] + heads
            self.state.heads_as_expected = attached.expects(attached.known(self.state.heads))
            attached.choose(self.state.heads)
        if self._head_coefficient is not None and not any(one.target.head for one in self.layers):
            warn(
                "head_coefficient has no effect: no measured layer acts last before the loss; name "
                "one with head='...'"
            )
        return True

    def _stop_watching(self) -> None:
        """Take the hook off the model that shows its outputs."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def detach(self) -> None:
        """Release the model; the step counts, the measures' states and the means of shares stay."""
        self.state.detach()
        if self._attached is not None:
            self._attached.release()
        self._attached = None
        self._saw_outputs = False
        self._stop_watching()

    def reset(self) -> None:
        """Release the model and forget all steps: the next one is the first of a new training."""
        self.detach()
        self.state = TrainingState(self.tolerance)

    @eager
    def penalty(self, step: int | None = None) -> Tensor:
        """Coefficient times penalty, summed over the layers: a differentiable scalar for your loss.

        It knows no optimizer: each call computes every layer, whatever ``every_n_steps`` and
        ``tolerance`` say, and there is no step limit. :meth:`add_to_loss` follows all three. Each call
        takes the state of measures such as :class:`~lightning_hsu.measures.Covering` one step further.

        Args:
            step: Optimizer steps done, which schedules need; None is 0.

        Raises:
            ValueError: for a :class:`~lightning_hsu.Share`, which needs the task's gradient alone.
        """
        self.follow()
        self.state.now.loss_step = None
        is_scheduled = step is None and any(layer.has_schedule for layer in self.layers)
        skips_steps = self.tolerance is not None or self.every_n_steps > 1
        if all(layer.strength == 0 for layer in self.layers):
            skips_steps = False  # only monitored
        self.state.now.penalties.check_call(is_scheduled=is_scheduled, skips_steps=skips_steps)
        return self._penalty(step or 0, Rates(), 1.0)

    @eager
    def add_to_loss(
        self,
        loss: Tensor,
        optimizer: Optimizer,
        *,
        index: int | None = None,
        factor: Tensor | float = 1.0,
        same_step: bool = False,
    ) -> None:
        """Add coefficient times penalty to a loss in place, before its backward.

        Call :meth:`count_step` once a step.

        Args:
            loss: A scalar that its own backward pass does not need.
            optimizer: The optimizer that will step; its learning rates set the step limit.
            index: Its position among several; by default the order of their first steps.
            factor: The loss's factor: a GradScaler's, over the number of accumulated batches.
            same_step: The step is already counted: the optimizer evaluates its closure again
                (LBFGS).
        """
        attached = self._check_attached()
        self.follow([optimizer])
        penalised = []
        for layer in self.layers:
            if layer.strength != 0 and not layer.frozen:
                penalised.append(PenalisedLayer(layer.name, layer.target.shape, layer.parameters))
        attached.placement.check_loss(loss, penalised)
        step = self.state.counter.before(optimizer, index, same_step=same_step)
        if step % self.every_n_steps == 0:
            rates = learning_rates(optimizer)
            for layer in self.layers:
                if layer.strength != 0 and layer.steps_in_backward:
                    self._note_backward(layer, rates)
            with torch.enable_grad():
                term = self._penalty(step, rates, factor)
                loss.add_((term * factor).to(loss))

    def _note_backward(self, layer: Layer, rates: Rates) -> None:
        """Note a layer that is stepped during the backward pass, and its rates if it tells them."""
        self.state.now.reached.add(layer.name)
        for p in layer.parameters:
            for optimizer in getattr(p, "_in_backward_optimizers", ()):
                own = learning_rates(optimizer)
                rates.update(own)
                rates.ascending = {*rates.ascending, *own.ascending}

    def count_step(
        self, optimizer: Optimizer, *, index: int | None = None, same_step: bool = False
    ) -> None:
        """Count a step of an optimizer whose loss includes the penalty."""
        self.state.counter.count(optimizer, index, same_step=same_step)
        self.note_reached(optimizer)

    def note_reached(self, optimizer: Optimizer) -> None:
        """Note the layers that an optimizer reaches at a step without a penalty.

        :meth:`unreached` names the others.
        """
        self.follow([optimizer])
        reached = self.state.now.reached
        if len(reached) == len(self.layers):
            return
        whole: AbstractContextManager[None] = nullcontext()
        if not reached:  # FSDP1: all ranks gather the model, until each has seen a layer
            whole = self._whole_with_grads()
        with whole:
            self.state.note_reached(self.layers, learning_rates(optimizer))

    def with_gradients(self, optimizer: Optimizer) -> dict[str, tuple[nn.Parameter, ...]]:
        """Parameters of the layers with a coefficient that an optimizer is about to step, by layer."""
        rates = learning_rates(optimizer)
        found = {}
        with self._whole_with_grads():
            for layer in self.layers:
                if layer.strength != 0 and layer.rates(rates):
                    found[layer.name] = layer.parameters
        return found

    def without_gradients(self, layers: Mapping[str, Sequence[nn.Parameter]]) -> list[str]:
        """Names of layers of which no parameter has a gradient."""
        with self._whole_with_grads():
            return [name for name, own in layers.items() if all(p.grad is None for p in own)]

    @eager
    @torch.no_grad()
    def add_gradients(
        self,
        optimizer: Optimizer,
        *,
        index: int | None = None,
        grad_scale: float = 1.0,
        stats: bool = False,
        same_step: bool = False,
    ) -> dict[str, GradientStats]:
        """Add the penalty's gradient to ``.grad`` of the optimizer's parameters, once a step.

        Parameters that are frozen or have no gradient are left alone. With accumulated batches call
        it after the last backward.

        Args:
            optimizer: The optimizer about to step; its learning rates set the step limit.
            index: Its position among several; by default the order of their first steps.
            grad_scale: Factor by which the gradients are still scaled (a GradScaler's, for
                optimizers that unscale by themselves).
            stats: Also return what was done, by layer.
            same_step: The optimizer evaluates its closure again within one step (LBFGS): do not
                count it.

        Returns:
            Stats by layer name; empty without ``stats``, or on a step that ``every_n_steps`` skips.
        """
        if self.checks_order:
            self.state.now.order.check(ADD, optimizer, self.layers)
        found = self._step(
            optimizer, index, grad_scale=grad_scale, stats=stats, same_step=same_step
        )
        if self.checks_order:
            self.state.now.order.added(optimizer)
            if self.looks_ahead and not same_step:
                self._hook(optimizer, index)
        return found

    @eager
    @torch.no_grad()
    def move(
        self, optimizer: Optimizer, *, index: int | None = None, stats: bool = False
    ) -> dict[str, GradientStats]:
        """Move the neurons along the sphere by learning rate times coefficient times gradient.

        Call it after each step. The norms of the neurons do not change. Parameters that are frozen
        or have no gradient are left alone. Neurons that are computed from parameters (weight_norm,
        pruning) follow these. After a step of a fused optimizer under a GradScaler the host waits for
        the device to tell whether that was skipped, as an unfused one waits by itself.

        Args:
            optimizer: The optimizer that has stepped; each parameter moves with its own group's
                learning rate.
            index: Its position among several; by default the order of their first steps.
            stats: Also return what was done, by layer.

        Returns:
            Stats by layer name; empty without ``stats``, or on a step that ``every_n_steps`` skips.
        """
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return {}  # a fused optimizer under a GradScaler skipped this step in its kernel
        if self.checks_order:
            self.state.now.order.check(MOVE, optimizer, self.layers)
        if id(optimizer) not in self.state.now.movers and self._is_known_to_step(optimizer, index):
            self.state.now.movers.add(id(optimizer))
            self._check_mover(optimizer)
            self._tell_unknown_steps(optimizer)
        return self._step(optimizer, index, stats=stats, moves=True)

    def stale_errors(self) -> dict[str, float]:
        """With a ``tolerance``, the relative error of each layer's last gradient at its replacement.

        That is when it is largest. By layer's name; empty without a ``tolerance``, and without the
        layers whose first gradient is still in use.
        """
        return self.state.deltas.errors()

    def recomputed(self, *, reset: bool = True) -> float:
        """With a ``tolerance``, the fraction of the gradients' arithmetic that was done, in [0, 1].

        It is over the steps since the last call with ``reset``; NaN for no step, or without a
        ``tolerance``.

        Args:
            reset: Whether the next call begins with the step after this. A callback resets it at
                each row of its log: ask ``callback.regularizer.recomputed(reset=False)``.
        """
        return self.state.deltas.share_of_work(reset=reset)

    @eager
    def measure_layers(self, *, but: Collection[str] = ()) -> list[LayerUniformity]:
        """Measure every layer as it is now; where ranks share the weights, all must call it.

        Args:
            but: Names of layers to leave out.
        """
        with self.gathered():
            self._follow()
            layers = [layer for layer in self.layers if layer.name not in but]
            attached = self._attached
            known: dict[Layer, LayerUniformity] = {}
            if attached is not None and attached.plan.plain:
                first = attached.plan.plain[0].parameter
                if first.is_cuda and attached.placement.keeps_whole:
                    known = measure_on_gpu(layers, attached.plan, attached.ahead)
            others = [layer for layer in layers if layer not in known]
            measured = iter(measure_layers(others, self.state.monitor_state))
            return [known[layer] if layer in known else next(measured) for layer in layers]

    @torch.no_grad()
    def layers_at_zero(self) -> list[Layer]:
        """The layers with a coefficient that train and whose neurons are all zero.

        Where ranks share the weights, all must call it. The host waits for the device.
        """
        penalised = [layer for layer in self.layers if layer.strength != 0 and layer.trainable]
        if not penalised:
            return []
        with self.gathered():
            return layers_at_zero(penalised)

    def fingerprints(self, names: Collection[str]) -> dict[str, float]:
        """Numbers that show whether layers' weights have changed, by layer.

        Where ranks share the weights, all must call it.
        """
        if not names:
            return {}
        with self.gathered():
            return {one.name: one.fingerprint() for one in self.layers if one.name in names}

    @property
    def trained_layers(self) -> list[Layer]:
        """The layers whose weights change: of frozen ones, since the last measurement."""
        return [layer for layer in self.layers if self.state.is_trained(layer)]

    def gathered(self) -> AbstractContextManager[None]:
        """A context in which the neurons of ``layers`` are whole and can be read, under FSDP1 too.

        All ranks that share weights must enter it.
        """
        if self._attached is None:
            return nullcontext()
        return self._attached.placement.whole_parameters(with_grads=False)

    def current_penalty(self, measured: Sequence[LayerUniformity]) -> float:
        """Coefficient times penalty, summed over measured layers, with the last coefficients.

        Frozen layers add nothing.
        """
        penalties = {one.name: one.penalty for one in measured}
        total = 0.0
        for layer in self.trained_layers:
            if layer.name in penalties:
                coefficient = self.state.last_coefficient(layer, self.every_n_steps)
                total += coefficient * penalties[layer.name]
        return total

    def varying_coefficients(self) -> dict[str, float]:
        """The last coefficients, by layer, of the layers whose coefficient changes over time."""
        changing = [layer for layer in self.layers if not isinstance(layer.strength, float)]
        return {
            layer.name: self.state.last_coefficient(layer, self.every_n_steps) for layer in changing
        }

    def limits_shares(self, layers: Iterable[Layer], most: float = SAFE_SHARE) -> bool:
        """Whether the task's gradient limits the penalty's in each of some layers, to this share of it.

        A layer with a :class:`~lightning_hsu.Share` has that limit alone.
        """
        for layer in layers:
            limit = self.share_limit
            if isinstance(layer.strength, Share):
                limit = layer.strength.fraction
            if limit is None or limit > most:
                return False
        return True

    def unreached(self) -> list[str]:
        """Names of layers, except frozen ones, that have a coefficient but no gradient so far."""
        reached = self.state.now.reached | self.state.now.reached_before
        missing = []
        for layer in self.layers:
            if layer.strength != 0 and layer.name not in reached:
                missing.append(layer)
        with self.gathered():
            return [layer.name for layer in missing if not layer.frozen]

    def idle(self) -> dict[str, str]:
        """Layers in which the penalty never exerts a force, with the reason and what to do."""
        found = {}
        for layer in self.layers:
            reason = layer.idle_reason()
            if reason is not None:
                found[layer.name] = reason
        return found

    def state_dict(self) -> dict[str, Any]:
        """The steps done by each optimizer, and the state of measures and shares by layer.

        With a ``tolerance`` the next step computes every gradient, as it does after a resume: so a
        resumed training equals one that goes on. Not where ranks train together, of which one alone
        may call this: there it equals it within the tolerance.
        """
        found = self.state.state_dict()
        if self._attached is None or self._attached.placement.is_alone:
            self.state.deltas.make_due()
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, of this version or another.

        What is missing, broken or does not fit the model begins anew, with a warning that says
        what and what that means; the model may also be attached later. The state is copied.
        """
        dropped = self.restore(state)
        if dropped:
            warn(str(dropped))

    def restore(self, state: object) -> Dropped:
        """The same without the warning: return what was left out."""
        dropped = self.state.load_state_dict(state)
        if self._attached is None:
            return dropped
        with self.gathered():
            if self.state.heads:
                self._stop_watching()
                self._attached.choose(self.state.heads)
            self.state.check(self.layers, dropped)
        return dropped

    def table(self) -> str:
        """The :attr:`summary` as a table."""
        self._check_attached()
        return str(self.summary)

    def nothing_trains(self) -> bool:
        """Whether there is a coefficient, and no layer that has one could train."""
        if self.only_monitors or not self.layers:
            return False
        return not any(layer.trainable and layer.strength != 0 for layer in self.layers)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the settings and the training state, never the model."""
        return self.__dict__ | {"_attached": None, "_watch": None}

    def _choose(
        self, candidates: Candidates[Target], traced: Sequence[str], strict: bool
    ) -> tuple[list[Target], list[Skip]]:
        """Choose among the sets of neurons of a model."""
        return select(
            candidates,
            self.include,
            self.exclude,
            self.head,
            traced=traced,
            may_be_empty=True,
            strict=strict,
        )

    def _take_strengths(self, coefficient: Coefficient, head: Coefficient | None) -> None:
        """Let the layers go on with these coefficients, of all layers and of the head.

        Raises:
            ValueError: for a pattern that matches nothing, a head that is not there, or a
                coefficient where the attached model has no layer.
        """
        if (coefficient, head) == (self._coefficient, self._head_coefficient):
            return
        attached = self._attached
        has_monitored = self.only_monitors
        if attached is not None:
            self._check_strengths(attached, coefficient, head)
        self._coefficient = coefficient
        self._head_coefficient = head
        if attached is None:
            return
        with self.gathered():
            attached.choose(self.state.heads)
        self.state.now.coefficients.clear()
        if self.checks_order and not self.has_stepped:
            self.state.now.zeros = self.layers_at_zero()
        if has_monitored and self.nothing_trains():
            warn(NOTHING_TRAINS)

    def _check_strengths(
        self, attached: Attached, coefficient: Coefficient, head: Coefficient | None
    ) -> None:
        """Refuse coefficients that do not fit the layers of the attached model."""
        layers = attached.layers
        if layers:
            coefficient.check_names([layer.name for layer in layers])
        elif not (coefficient.is_zero and (head is None or head.is_zero)):
            raise ValueError(nothing_left(attached.candidates.source, attached.skips))
        if head is not None and layers and self.head_is_settled:
            check_head([layer.target for layer in layers])

    def _refuse(self, message: str) -> None:
        """Raise an error, or only warn if this regularizer only monitors.

        Raises:
            ValueError: with the message, if any coefficient is not the number 0.
        """
        if not self.only_monitors:
            raise ValueError(message)
        warn(message)

    def _layer(self, target: Target, known: Layer | None) -> Layer:
        """A target with its measure and coefficient; its parameters are those that are known."""
        if known is None:
            parameters, rows = tuple(target.parameters()), target.held_rows()
        else:
            parameters, rows = known.parameters, known.rows
            target = replace(target, shape=known.target.shape)
        measure = measure_of_layer(
            self.measure,
            is_head=target.head,
            neurons=target.shape[1],
            sample_above=self.sample_above,
        )
        coefficient = self._coefficient
        if target.head and self._head_coefficient is not None:
            coefficient = self._head_coefficient
        strength: Strength = 0.0  # a buffer, or a quantised weight: no gradient can reach it
        if parameters:
            strength = coefficient.of(target.name)
        return Layer(target, measure, strength, parameters, rows)

    def _step(
        self,
        optimizer: Optimizer,
        index: int | None,
        *,
        grad_scale: float = 1.0,
        stats: bool = False,
        same_step: bool = False,
        moves: bool = False,
    ) -> dict[str, GradientStats]:
        """Act if ``every_n_steps`` does not skip this step, and count it if it was not refused.

        Few steps are looked at even without ``stats``, and so is what follows them if the penalty
        may be too strong: beside the task's gradient, too, unless it ``moves`` the neurons.
        """
        attached = self._check_attached()
        strength = attached.strength
        asked = stats
        counter = self.state.counter
        step = counter.before(optimizer, index, same_step=same_step)
        if strength.look is not None:
            self._tell(strength.settle())
        if self.state.now.zeros:
            self._tell_zeros(self.limits_shares(self.state.now.zeros))
        if not same_step and (id(optimizer) not in strength.quiet or step in self._looked_at):
            stats = True
        found: dict[str, GradientStats] = {}
        if step % self._every_n_steps:
            self.note_reached(optimizer)
        else:
            rates = learning_rates(optimizer)
            limit = self.step_limit
            share = self.share_limit
            steps = None
            if moves and (share is not None or self.has_share):
                steps = self._steps(optimizer, rates)
            context = StepContext(
                step, rates, grad_scale, same_step, limit, share, stats, moves, steps
            )
            recorded: AbstractContextManager[None] = nullcontext()
            if torch.is_inference_mode_enabled():
                recorded = outside_inference_mode()
            with recorded, self._whole_with_grads(), self._products():
                self._follow([optimizer])
                if self.checks_order and self.state.now.untold:
                    self._tell_untold()
                if step == self.every_n_steps and not moves and not same_step:
                    self._tell_unknown_gain(optimizer, rates)  # it has a state now, if any
                if self.state.deltas.tolerance is not None:
                    attached = self._check_attached()
                    self.state.deltas.begin_step(
                        id(optimizer),
                        attached.plan.layers_of(rates),
                        keeps=not attached.placement.is_uneven,
                        same_step=same_step,
                    )
                found = self._act(context)
        counter.count(optimizer, index, same_step=same_step)
        if found and not same_step:
            known = self.state.now.coefficients
            findings = strength.see(
                optimizer, step, found, self.layers, known, self.share_limit, compares=not moves
            )
            self._tell(findings)
        return found if asked else {}

    @property
    def looks_ahead(self) -> bool:
        """Whether gradients are computed right after a step: on a GPU, which hides them."""
        plan = self._check_attached().plan
        if plan.plain:
            return plan.plain[0].parameter.is_cuda
        # Of other layers only those whose gradients are kept are looked at, for how far they move.
        return bool(self.state.deltas) and bool(plan.rest) and plan.rest[0][0].parameters[0].is_cuda

    def _hook(self, optimizer: Optimizer, index: int | None) -> None:
        """Look ahead after each step of an optimizer from now on."""
        hooks = self._check_attached().hooks
        known = hooks.get(id(optimizer))
        hook = None if known is None else known()
        if hook is not None and hook.is_of(optimizer):
            return
        act = partial(_after_step, weakref.ref(self))
        try:
            hook = AfterOwnStep(optimizer, index, act)
        except NotImplementedError:  # nothing tells when it has stepped
            return
        hooks[id(optimizer)] = weakref.ref(hook)  # the optimizer keeps it, and may go with it

    @eager
    @torch.no_grad()
    def look_ahead(self, optimizer: Optimizer, *, index: int | None = None) -> None:
        """Begin to compute what the next :meth:`add_gradients` of this optimizer adds.

        On a GPU this is done by itself after each step of an optimizer that :meth:`add_gradients`
        has met, beside the task's next forward and backward pass. On a CPU there is nothing that
        hides it. A layer whose weights change before the step is computed again.

        Args:
            optimizer: The optimizer that has just stepped.
            index: Its position among several; by default the order of their first steps.
        """
        attached = self._check_attached()
        step = self.state.counter.before(optimizer, index)
        is_idle = step % self._every_n_steps != 0 or not attached.placement.keeps_whole
        if is_idle or torch.is_inference_mode_enabled() or is_capturing():
            return
        held = held_by(optimizer)
        if self.state.deltas.tolerance is not None:
            self.state.deltas.give_turn(id(optimizer), attached.plan.layers_of(held))
        with self._products():
            look_ahead(
                self.state.deltas,
                attached.plan.plain_of(held),
                attached.ahead,
                attached.placement,
                rest=attached.plan.rest_of(held),
                stats=self.measures_next,
            )

    @eager
    @torch.no_grad()
    def look_for_moves(self) -> None:
        """Begin to look how far neurons have moved, for :meth:`add_to_loss` with a ``tolerance``.

        On a GPU, right after an optimizer's step: then the next loss need not wait for the device
        to tell whether a kept gradient will do. Elsewhere it does nothing.
        """
        attached = self._check_attached()
        if self.tolerance is None or not attached.placement.keeps_whole:
            return
        if torch.is_inference_mode_enabled() or is_capturing():
            return
        penalised = []
        for layer in attached.layers:
            if layer.trainable and layer.strength != 0 and not layer.sharded:
                penalised.append(layer)
        self.state.deltas.give_turn(None, attached.plan.penalised)
        look_for_moves(self.state.deltas, penalised)

    def _tell(self, findings: Sequence[Finding]) -> None:
        """Tell what the looks have shown; what is no alarm is left to a Trainer's callback."""
        for one in findings:
            if one.is_alarm or (one.kind == "weak" and self.checks_order):
                warn(one.text)
            elif self.checks_order:
                inform(one.text)
            else:
                self.state.now.findings.append(one)

    def _tell_zeros(self, is_limited: bool) -> None:
        """Tell of layers that start at zero."""
        layers = self.state.now.zeros
        self.state.now.zeros = []
        tell = inform if is_limited else warn
        tell(zeros_text(layers, is_limited=is_limited))

    def _tell_untold(self) -> None:
        """Warn of new weights that no optimizer has had for many steps; Lightning has its own way."""
        attached = self._check_attached()
        untold = self.state.now.untold
        named = []
        for layer in self.layers:
            if layer.name not in untold:
                continue
            untold[layer.name] += 1
            is_told = layer.strength == 0 or not layer.trainable
            if is_told or attached.watch.optimizes(layer.parameters):
                del untold[layer.name]
            elif untold[layer.name] >= _UNTOLD:
                del untold[layer.name]
                named.append(f"'{layer.name}' {layer.target.shape}")
        if named:
            warn(
                f"layer {', '.join(named)} has new weights, which no optimizer that steps has, so "
                "neither the loss nor the penalty trains them. Give them to one: "
                'optimizer.add_param_group({"params": ...})'
            )

    def _act(self, context: StepContext) -> dict[str, GradientStats]:
        """Add gradients, or move neurons."""
        attached = self._check_attached()
        plan, placement = attached.plan, attached.placement
        if context.moves:
            refuse_unknown_rates(self.layers, self.state, context)
        updates, left = plan.plain_updates(self.state, context)
        together = plan.rest + buckets(left, placement)
        if context.moves and self.state.deltas and placement.keeps_whole:
            # The optimizer has just stepped, so nobody could look ahead.
            rest = plan.rest_of(context.learning_rates)
            look_together(self.state.deltas, updates.found, rest)
        stats = {}
        if together:
            # Before the plain layers: a layer that is refused stops the whole step.
            stats = act_on_buckets(together, self.state, context, placement)
        if self.state.deltas.tolerance is not None or attached.ahead.begun:
            see_changes(self.state.deltas, updates.found, attached.ahead)
        if not updates.need_buffers:
            self._add_plain(updates, context)
            return stats
        for lot in updates.lots(attached.ahead, placement):
            stats |= self._act_through_buffers(lot, context)
        return stats

    def _act_through_buffers(
        self, updates: PlainUpdates, context: StepContext
    ) -> dict[str, GradientStats]:
        """The same for plain layers."""
        buffered = updates.begin_buffers()
        self._add_plain(updates, context)
        stats = buffered.stats() if context.stats else {}
        if context.moves:
            buffered.move()
        else:
            buffered.add()
        return stats

    def _add_plain(self, updates: PlainUpdates, context: StepContext) -> None:
        """Add the gradients of the plain layers."""
        attached = self._check_attached()
        ahead, placement = attached.ahead, attached.placement
        if self.state.deltas.tolerance is not None:
            add_plain(self.state.deltas, updates, ahead, placement, same_step=context.same_step)
            return
        if ahead.begun:
            updates.found = ahead.add(updates.found)
            updates.alone = ahead.outdated
        updates.add(placement)

    def _is_known_to_step(self, optimizer: Optimizer, index: int | None) -> bool:
        """Whether an optimizer has its state, or none of which something could be read.

        In an own loop a GradScaler may have skipped its first steps.
        """
        if not self.checks_order or getattr(optimizer, "state", None):
            return True
        return self.state.counter.before(optimizer, index) >= _WITHOUT_STATE

    def _check_mover(self, optimizer: Optimizer) -> None:
        """Warn of an optimizer whose next step undoes a part of each move."""
        undone = []
        for layer in self.layers:
            if layer.strength != 0 and keeps_elsewhere(optimizer, layer.parameters):
                undone.append(layer.name)
        if undone:
            warn(
                f"{type(optimizer).__name__} computes the weights of layer "
                f"{', '.join(map(repr, undone))} from other tensors that it keeps, so its next step "
                "undoes most of what apply='decoupled' (move) does: use apply='gradient' "
                "(add_gradients)"
            )

    def _tell_unknown_gain(self, optimizer: Optimizer, rates: Rates) -> None:
        """Tell, once, of an optimizer of which the step limit knows the learning rate alone."""
        if self.step_limit is None:
            return
        alone: dict[int, Rate] = {}
        for group in optimizer.param_groups:
            if tells_gain(optimizer, group):
                continue
            for p in group["params"]:
                alone[id(p)] = rates[id(p)]
        names = []
        for layer in self.layers:
            own = layer.rates(alone)
            # Without a learning rate that is a number there is no such limit.
            if layer.strength != 0 and own and not any(map(is_unknown, own)):
                names.append(repr(layer.name))
        if names:
            self._tell_unknown(
                f"nothing tells what {type(optimizer).__name__} makes of a gradient, so in layer "
                f"{listed(names)} step_limit takes a step for the learning rate times it, as SGD's"
            )

    def _tell_unknown(self, text: str) -> None:
        """Tell, once, what is not known of an optimizer."""
        if text not in self.state.now.told:
            self.state.now.told.add(text)
            self._tell([Finding("unknown", text)])

    def _tell_unknown_steps(self, optimizer: Optimizer) -> None:
        """Tell, once, with what moves are compared where nothing tells how long a step was."""
        if self.share_limit is None and not self.has_share:
            return
        steps = self._steps(optimizer, learning_rates(optimizer))
        named: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.strength == 0 or (self.share_limit is None and not layer.has_share):
                continue
            for p in layer.parameters:
                stand_in = None if p.grad is None else steps.stand_in(p)
                if stand_in is not None and layer.name not in named.setdefault(stand_in, []):
                    named[stand_in].append(layer.name)
        for stand_in, names in named.items():
            self._tell_unknown(
                f"nothing tells how long a step of {type(optimizer).__name__} is, so the moves "
                f"of layer {listed(list(map(repr, names)))} are held to a share of {stand_in}"
            )

    def _steps(self, optimizer: Optimizer, rates: Rates) -> OptimizerSteps:
        """What an optimizer has made of the task's gradients."""
        is_whole = self._check_attached().placement.keeps_whole
        return OptimizerSteps(optimizer, rates, is_whole=is_whole)

    def _whole_with_grads(self) -> AbstractContextManager[None]:
        """A context in which parameters and gradients are whole."""
        placement = self._check_attached().placement
        if placement.keeps_whole:
            return nullcontext()
        return placement.whole_parameters(with_grads=True)

    def _products(self) -> AbstractContextManager[None]:
        """The precision of matrix products in a step."""
        if self._matmul_precision == "medium":
            return bf16_products(True)
        return nullcontext()

    def _penalty(self, step: int, rates: Rates, factor: Tensor | float) -> Tensor:
        """Coefficient times penalty, summed over the layers; learning rates set the step limit."""
        attached = self._check_attached()
        if self.state.now.zeros:
            self._tell_zeros(False)
        penalised = [layer for layer in attached.layers if layer.trainable]
        held = [(layer.target.module, layer.parameters[0]) for layer in penalised]
        attached.placement.take_back_forward_weights(attached.model, held)
        # Further losses of one step, as of accumulated batches, have the first one's random draw.
        same_step = self.state.now.loss_step == step
        context = StepContext(step, rates, factor, same_step, self.step_limit)
        if not same_step:
            self.state.deltas.begin_step(
                None, attached.plan.penalised, keeps=not attached.placement.is_uneven
            )
        with self._products():
            return loss_terms(penalised, self.state, context)

    def _check_attached(self) -> Attached:
        if self._attached is None:
            raise RuntimeError("the regularizer has no model yet: call attach(model) first")
        return self._attached


def _check_limit(name: str, limit: float | None) -> float | None:
    """Refuse a limit that is no positive number."""
    what = "a finite number > 0, or None for no limit"
    if isinstance(limit, Share):
        raise TypeError(
            f"{name} must be {what}; got a Share: did you mean coefficient=Share({limit.fraction:g})?"
        )
    if limit is not None:
        check_number(name, limit, what, lambda limit: limit > 0)
    return limit


def _checked_measure(measure: Measure | None) -> Measure:
    """A measure, the default for None; anything else is refused."""
    if measure is None:
        return DEFAULT_MEASURE
    check_measure(measure)
    return measure


def _of_head(coefficient: Strength | None) -> Coefficient | None:
    """The checked coefficient of the head."""
    return None if coefficient is None else Coefficient.of_head(coefficient)


def _after_step(owner: weakref.ref[UniformityRegularizer], hook: AfterStep) -> bool:
    """Look ahead after a step; return whether to be called again."""
    regularizer = owner()
    if regularizer is None or not regularizer.is_attached:
        return False
    regularizer.look_ahead(hook.optimizer, index=hook.position)
    return True
