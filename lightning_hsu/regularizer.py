"""The engine: targets, coefficients, schedule and state. It has no idea of a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hsu._checks import check_choice, check_count, check_number
from lightning_hsu._core import exact_arithmetic, lowered_products
from lightning_hsu._engine.apply import GradientStats, LayerUpdate
from lightning_hsu._engine.layer import Layer, idle_reason
from lightning_hsu._engine.state import Progress
from lightning_hsu._engine.step import Act, Use, act_on_all, learning_rates, loss_terms, lots
from lightning_hsu._monitor.measure import LayerUniformity, measure_layers
from lightning_hsu._monitor.tables import describe
from lightning_hsu._neurons.select import Patterns, Skip, check_head, select
from lightning_hsu._neurons.sharding import (
    Replicas,
    flat_sharded,
    is_sharded,
    reshard,
    unwrapped,
    whole_parameters,
)
from lightning_hsu._neurons.target import Target
from lightning_hsu.coefficients import Coefficient, Strength
from lightning_hsu.measures import Measure, RieszEnergy
from lightning_hsu.measures.base import check_measure
from lightning_hsu.measures.sampled import sampled_above


class UniformityRegularizer:
    """Spread a model's neurons over the sphere in any training loop, with or without Lightning.

    After ``loss.backward()`` and before ``optimizer.step()`` call :meth:`add_gradients`: it adds the gradient of
    coefficient times penalty, summed over the layers, to the parameters' ``.grad``. Or after each ``optimizer.step()``
    call :meth:`move`: it moves the neurons along the sphere, past the optimizer. Or add :meth:`penalty` to the loss.

    Args:
        measure: What to minimise. None is the half-space Riesz energy with s = 2. The class head is measured in full space.
        coefficient: A number >= 0 (0 only monitors), a schedule (optimizer steps done -> number), a
            :class:`~lightning_hsu.Share`, or a mapping of layer patterns to these; the first matching pattern counts.
        include: Patterns of layers to take, shell style; None takes all but embeddings.
        exclude: Patterns of layers to leave out.
        head: "auto" (the last Linear), the head's name, or None for no head.
        head_coefficient: A number, schedule or share for the head; None uses ``coefficient``.
        every_n_steps: Apply on every n-th step of each optimizer, at the coefficient's full strength.
        step_limit: The penalty's part of a step moves a neuron by at most this fraction of its norm. None is no limit.
        matmul_precision: "medium" multiplies in bfloat16 (see the callback); the monitor's numbers stay exact.
        sample_above: Energies of more neurons are estimated (:class:`~lightning_hsu.measures.Sampled`); None computes them.

    Raises:
        ValueError: for a negative or NaN coefficient, ``every_n_steps`` or ``sample_above`` below 1 or a ``step_limit`` <= 0.
        TypeError: for a measure or a coefficient of the wrong kind.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_hsu import UniformityRegularizer
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> regularizer = UniformityRegularizer(coefficient=0.1).attach(model)
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
        coefficient: Strength | Mapping[str, Strength] = 1.0,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        head: str | None = "auto",
        head_coefficient: Strength | None = None,
        every_n_steps: int = 1,
        step_limit: float | None = 1.0,
        matmul_precision: Literal["highest", "medium"] = "highest",
        sample_above: int | None = 16384,
    ) -> None:
        check_count("every_n_steps", every_n_steps)
        check_count("sample_above", 1 if sample_above is None else sample_above)
        if step_limit is not None:
            check_number(
                "step_limit", step_limit, "> 0, or None for no limit", lambda limit: limit > 0
            )
        self.measure = RieszEnergy(s=2.0, half_space=True) if measure is None else measure
        check_measure(self.measure)
        self.coefficient = Coefficient(coefficient)
        self.head_coefficient = (
            None if head_coefficient is None else Coefficient.of_head(head_coefficient)
        )
        self.include, self.exclude, self.head = include, exclude, head
        self.matmul_precision = check_choice(
            "matmul_precision", matmul_precision, "highest", "medium"
        )
        self.every_n_steps, self.step_limit, self.sample_above = (
            every_n_steps,
            step_limit,
            sample_above,
        )
        self.layers: list[Layer] = []
        self.skips: list[Skip] = []
        self.active = False  # whether any layer has a coefficient other than the number 0: else there is nothing to add
        self.replicas: Replicas | None = None
        self.progress = Progress(every_n_steps)
        self._lots: list[list[Layer]] = []
        self._model: nn.Module | None = None
        self._root: nn.Module | None = None  # the model as FSDP1 wraps it

    def attach(
        self,
        model: nn.Module,
        *,
        wrapped: nn.Module | None = None,
        replicas: Replicas | None = None,
    ) -> UniformityRegularizer:
        """Find the model's neurons; returns self. Where ranks share the weights, all must call it.

        Args:
            model: The model, also as DDP, FSDP or Fabric wrap it.
            wrapped: The same model within FSDP1, where that wraps it from outside.
            replicas: The ranks that train this model by DDP, to compute large layers together; None computes all on each.

        Raises:
            ValueError: if a pattern matches nothing, no layer is left to measure, or ``head_coefficient`` has no head.
            NotImplementedError: if FSDP1 does not keep the original parameters.
        """
        model, outside = unwrapped(model), unwrapped(model if wrapped is None else wrapped)
        self._model, self._root, self.replicas = (
            model,
            outside if flat_sharded(outside) else None,
            replicas,
        )
        with whole_parameters(self._root, with_grads=False):
            targets, self.skips = select(model, self.include, self.exclude, self.head)
            self.coefficient.check_names([target.name for target in targets])
            if self.head_coefficient is not None:
                check_head(targets)
            self.layers = [self._layer(target) for target in targets]
        self._lots = lots(self.layers, None if replicas is None else replicas.split_above)
        self.progress.attach(model)
        self.active = any(
            not isinstance(layer.strength, (int, float)) or layer.strength > 0
            for layer in self.layers
        )
        return self

    def detach(self) -> None:
        """Let go of the model; the step counts, the measures' states and the means of shares stay."""
        self.progress.forget_model()
        self.__dict__ |= self.__getstate__()

    def penalty(self, step: int = 0) -> Tensor:
        """Coefficient times penalty, summed over the layers: a differentiable scalar for a loss of your own.

        Measures that carry a state, such as :class:`~lightning_hsu.measures.Covering`, take it one step on.

        Args:
            step: Optimizer steps done, for schedules.

        Raises:
            ValueError: for a :class:`~lightning_hsu.Share`, which needs the task's gradient apart.
        """
        self._check_attached()
        self.progress.loss_step = None
        return self._penalty(step, {}, 1.0)

    def add_to_loss(
        self,
        loss: Tensor,
        optimizer: Optimizer,
        *,
        index: int | None = None,
        factor: Tensor | float = 1.0,
        again: bool = False,
    ) -> None:
        """Add coefficient times penalty to a loss in place, before its backward; :meth:`count_step` once a step.

        Args:
            loss: A scalar that its own graph does not need.
            optimizer: The optimizer that will step; its learning rates set the step limit.
            index: Its position where there are several; by default the order in which they first step.
            factor: Of the loss: a GradScaler's, over the number of accumulated batches.
            again: The step is counted already: the optimizer evaluates its closure again (LBFGS).
        """
        self._check_attached()
        if is_sharded(loss):
            raise NotImplementedError(
                "the loss is a DTensor: add the penalty to its gradients, or return loss.full_tensor()"
            )
        step = self.progress.counter.before(optimizer, index) - (1 if again else 0)
        if step % self.every_n_steps == 0:
            with torch.enable_grad():
                loss.add_(
                    (self._penalty(step, learning_rates(optimizer), factor) * factor).to(loss)
                )

    def count_step(
        self, optimizer: Optimizer, *, index: int | None = None, again: bool = False
    ) -> None:
        """Count a step of an optimizer whose loss has the penalty."""
        self.progress.counter.count(optimizer, index, again=again)
        self.note_reached(optimizer)

    def note_reached(self, optimizer: Optimizer) -> None:
        """Note the layers that an optimizer reaches at a step without an application; :meth:`unreached` has the others."""
        if len(self.progress.reached) == len(self.layers):
            return
        # Under FSDP1 all ranks gather the model for this, so only until some layer is reached; then all ranks know one.
        with whole_parameters(None if self.progress.reached else self._root, with_grads=True):
            self.progress.note_reached(self.layers, learning_rates(optimizer))

    @torch.no_grad()
    def add_gradients(
        self,
        optimizer: Optimizer,
        *,
        index: int | None = None,
        grad_scale: float = 1.0,
        note: bool = False,
        again: bool = False,
    ) -> dict[str, GradientStats]:
        """Add the penalty's gradient to ``.grad`` of the optimizer's own parameters; call it once per optimizer step.

        Parameters that are frozen or have no gradient are left alone.

        Args:
            optimizer: The optimizer about to step; its learning rates set the step limit.
            index: Its position where there are several; by default the order in which they first step.
            grad_scale: Factor that the gradients still carry (a GradScaler's, for optimizers that unscale themselves).
            note: Also return what was done, by layer.
            again: The optimizer evaluates its closure again within the same step (LBFGS): do not count it.

        Returns:
            Notes by layer name; empty without ``note``, or on a step that ``every_n_steps`` leaves out.
        """
        return self._apply(LayerUpdate.add, optimizer, index, grad_scale, note, again)

    @torch.no_grad()
    def move(
        self, optimizer: Optimizer, *, index: int | None = None, note: bool = False
    ) -> dict[str, GradientStats]:
        """Move the neurons along the sphere by learning rate times coefficient times gradient; call it after each step.

        Their norms stay. Parameters that are frozen or have no gradient are left alone. Neurons that are computed from
        parameters (weight_norm, pruning) follow these.

        Args:
            optimizer: The optimizer that has stepped; each parameter moves with its own group's learning rate.
            index: Its position where there are several; by default the order in which they first step.
            note: Also return what was done, by layer.

        Returns:
            Notes by layer name; empty without ``note``, or on a step that ``every_n_steps`` leaves out.
        """
        if (found_inf := getattr(optimizer, "found_inf", None)) is not None and bool(found_inf):
            return {}  # a fused optimizer under a GradScaler that has skipped this step in its kernel
        return self._apply(LayerUpdate.move, optimizer, index, 1.0, note, False)

    def measure_layers(self) -> list[LayerUniformity]:
        """Measure every layer as it is now, in the model's order; where ranks share the weights, all must call it."""
        self._check_attached()
        with self.gathered():
            return measure_layers(self.layers, self.progress.look)

    def gathered(self) -> AbstractContextManager[None]:
        """While the neurons of ``layers`` are read: under FSDP1 ranks hold them whole; all that share weights must call it."""
        return whole_parameters(self._root, with_grads=False)

    def current_penalty(self, measured: list[LayerUniformity]) -> float:
        """Coefficient times penalty, summed over measured layers, at the coefficients last used."""
        pairs = zip(self.layers, measured, strict=True)
        return sum(self.progress.last_coefficient(layer) * one.penalty for layer, one in pairs)

    def unreached(self) -> list[str]:
        """Names of layers that have a coefficient but got no gradient so far; frozen ones are left out."""
        missing = [
            layer
            for layer in self.layers
            if layer.strength != 0 and layer.target.name not in self.progress.reached
        ]
        with self.gathered():
            return [layer.target.name for layer in missing if not layer.frozen]

    def idle(self) -> dict[str, str]:
        """Layers that have a coefficient but feel no force, whatever their weights, with the reason and the way out."""
        return {
            layer.target.name: reason for layer in self.layers if (reason := idle_reason(layer))
        }

    def state_dict(self) -> dict[str, Any]:
        """The steps done by each optimizer, where the schedules stand, and what the measures and shares carry on, by layer."""
        return self.progress.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.progress.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the settings and where training stands, never the model."""
        gone = {
            "layers": [],
            "skips": [],
            "_lots": [],
            "active": False,
            "replicas": None,
            "_model": None,
            "_root": None,
        }
        return self.__dict__ | gone

    def _layer(self, target: Target) -> Layer:
        measure = sampled_above(
            self.measure.for_head() if target.head else self.measure,
            target.shape[1],
            self.sample_above,
        )
        own = (
            self.head_coefficient
            if target.head and self.head_coefficient is not None
            else self.coefficient
        )
        return Layer(
            target, measure, own.of(target.name), tuple(target.parameters()), target.own_rows()
        )

    def _apply(
        self,
        act: Act,
        optimizer: Optimizer,
        index: int | None,
        grad_scale: float,
        note: bool,
        again: bool,
    ) -> dict[str, GradientStats]:
        """Let every layer of the optimizer's parameters act on its penalty's gradient; notes by layer."""
        self._check_attached()
        step = self.progress.counter.count(optimizer, index, again=again)
        if step % self.every_n_steps:
            self.note_reached(optimizer)
            return {}
        use = Use(step, learning_rates(optimizer), grad_scale, again, self.step_limit, note)
        lowered, first = (
            lowered_products(self.matmul_precision == "medium"),
            self.layers[0].parameters[0],
        )
        with whole_parameters(self._root, with_grads=True), lowered, exact_arithmetic(first):
            self.progress.note_reached(self.layers, use.own)
            return act_on_all(self._lots, act, self.progress, use, self.replicas)

    def _penalty(self, step: int, own: Mapping[int, float], factor: Tensor | float) -> Tensor:
        """Coefficient times penalty, summed over the layers; ``own`` are learning rates, for the step limit."""
        if self._model is not None and any(layer.lowered for layer in self.layers):
            reshard(self._model)
        use = Use(step, own, factor, self.progress.loss_step == step, self.step_limit)
        with lowered_products(self.matmul_precision == "medium"):
            return loss_terms(self.layers, self.progress, use)

    def table(self) -> str:
        """Every layer with its shape, measure and coefficient, and every weight left out with the reason."""
        self._check_attached()
        with self.gathered():
            return describe(self.layers, self.skips, self.every_n_steps)

    def _check_attached(self) -> None:
        if not self.layers:
            raise RuntimeError("the regularizer has no model yet: call attach(model) first")
