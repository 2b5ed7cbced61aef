"""The engine: targets, coefficients, schedule and state. It has no idea of a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hsu.applying import Application, GradientNote, penalty_gradients, refuse_sparse
from lightning_hsu.coefficients import Coefficient, Strength, strength_at
from lightning_hsu.measures import Measure, RieszEnergy, State
from lightning_hsu.measures.base import check_measure
from lightning_hsu.memory import Memory
from lightning_hsu.monitor import Layer, LayerUniformity, describe, idle_reason, measure_layers, widened
from lightning_hsu.selection import Patterns, Skip, select
from lightning_hsu.targets import Target


class UniformityRegularizer:
    """Spread a model's neurons over the sphere in any training loop, with or without Lightning.

    After ``loss.backward()`` and before ``optimizer.step()`` call :meth:`add_gradients`: it adds the gradient of
    coefficient times penalty, summed over the layers, to the parameters' ``.grad``.

    Args:
        measure: What to minimise. None is the half-space Riesz energy with s = 2. The class head is
            measured in full space.
        coefficient: A number >= 0 (0 only monitors), a schedule (optimizer steps done -> number), or a
            mapping of layer patterns to either; the first matching pattern counts.
        include: Patterns of layers to take, shell style; None takes all but embeddings.
        exclude: Patterns of layers to leave out.
        head: "auto" (the last Linear), the head's name, or None for no head.
        head_coefficient: A number or schedule for the head; None uses ``coefficient``.
        every_n_steps: Apply on every n-th step of each optimizer, at the coefficient's full strength.
        step_limit: A neuron's penalty gradient, times the learning rate, is at most this fraction of the neuron's
            norm, so that no near-duplicate or tiny neuron is thrown away by one step. None is no limit.

    Raises:
        ValueError: for a negative or NaN coefficient, ``every_n_steps`` below 1 or a ``step_limit`` <= 0.
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
    ) -> None:
        if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 1:
            raise ValueError(f"every_n_steps must be an int >= 1; got {every_n_steps!r}")
        if step_limit is not None and not step_limit > 0:
            raise ValueError(f"step_limit must be > 0, or None for no limit; got {step_limit!r}")
        if measure is not None:
            check_measure(measure)
        self.measure = RieszEnergy(s=2.0, half_space=True) if measure is None else measure
        self.coefficient = Coefficient(coefficient)
        if isinstance(head_coefficient, Mapping):
            raise TypeError(f"head_coefficient is a number or a schedule, not a mapping; got {head_coefficient!r}")
        self.head_coefficient = None if head_coefficient is None else Coefficient(head_coefficient, "head_coefficient")
        self.include, self.exclude, self.head = include, exclude, head
        self.every_n_steps, self.step_limit = every_n_steps, step_limit
        self.layers: list[Layer] = []
        self.skips: list[Skip] = []
        self.active = False  # whether any layer has a coefficient other than the number 0: else there is nothing to add
        self.steps: list[int] = []  # steps done by each optimizer
        self.memory, self._looking = Memory(), Memory()
        self._seen: list[int] = []  # ids of the optimizers, in the order in which they first stepped
        self._last: dict[str, float] = {}  # coefficient of each layer at its last step
        self._reached: set[str] = set()  # layers whose weights some optimizer was about to step with a gradient

    def attach(self, model: nn.Module) -> UniformityRegularizer:
        """Find the model's neurons; returns self.

        Raises:
            ValueError: if a pattern matches nothing, no layer is left to measure, or ``head_coefficient`` has no head.
            NotImplementedError: if a weight is sharded (DTensor).
        """
        targets, self.skips = select(model, self.include, self.exclude, self.head)
        self.memory.attach(model)
        self._looking.attach(model)
        self.coefficient.check_names([target.name for target in targets])
        if self.head_coefficient is not None and not any(target.head for target in targets):
            raise ValueError(
                "head_coefficient is given, but no head is measured: name it with head='...', or drop head_coefficient; the "
                f"layers are: {', '.join(target.name for target in targets)}"
            )
        self.layers = [self._layer(target) for target in targets]
        for layer in self.layers:
            _refuse_sharded(layer)
        self.active = any(callable(layer.strength) or layer.strength > 0 for layer in self.layers)
        return self

    def detach(self) -> None:
        """Let go of the model; the step counts and the measures' states stay."""
        self.__dict__ |= self._without_model()

    def penalty(self, step: int = 0) -> Tensor:
        """Coefficient times penalty, summed over the layers: a differentiable scalar for a loss of your own.

        Measures that carry a state, such as :class:`~lightning_hsu.measures.Covering`, take it one step on.
        """
        self._check_attached()
        terms = []
        for layer in self.layers:
            x = widened(layer.target.neurons())
            penalty = layer.measure.penalty(x, self.memory.next(layer, x)).mean()
            terms.append(strength_at(layer.strength, step, layer.target.name) * penalty)
        return torch.stack([term.to(terms[0]) for term in terms]).sum()

    @torch.no_grad()
    def add_gradients(
        self,
        optimizer: Optimizer,
        *,
        index: int | None = None,
        grad_scale: float = 1.0,
        note: bool = False,
        again: bool = False,
    ) -> dict[str, GradientNote]:
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
        self._check_attached()
        step = self._count(optimizer, index, again)
        notes: dict[str, GradientNote] = {}
        if step % self.every_n_steps:
            if len(self._reached) < len(self.layers):
                own = _learning_rates(optimizer)
                self._reached |= {layer.target.name for layer in self.layers if _rates(layer, own)}
            return notes
        own = _learning_rates(optimizer)
        ready = [one for layer in self.layers if (one := self._application(layer, step, own, again)) is not None]
        for one, grad in zip(ready, penalty_gradients(ready), strict=True):
            found = one.add(grad, own, step_limit=self.step_limit, grad_scale=grad_scale, note=note)
            notes |= {one.layer.target.name: found} if found else {}
        return notes

    def measure_layers(self) -> list[LayerUniformity]:
        """Measure every layer as it is now, in the model's order."""
        self._check_attached()
        return measure_layers(self.layers, self._remembered)

    def current_penalty(self, measured: list[LayerUniformity]) -> float:
        """Coefficient times penalty, summed over measured layers, at the coefficients last used."""
        return sum(self._last_strength(layer) * one.penalty for layer, one in zip(self.layers, measured, strict=True))

    def unreached(self) -> list[str]:
        """Names of layers that have a coefficient but got no gradient so far; frozen ones are left out."""
        missing = [layer for layer in self.layers if layer.strength != 0 and layer.target.name not in self._reached]
        return [layer.target.name for layer in missing if not layer.target.frozen]

    def idle(self) -> dict[str, str]:
        """Layers that have a coefficient but feel no force, whatever their weights, with the reason and the way out."""
        return {layer.target.name: reason for layer in self.layers if (reason := idle_reason(layer))}

    def state_dict(self) -> dict[str, Any]:
        """The steps done by each optimizer, where the schedules stand, and what the measures carry on, by layer."""
        states = self.memory.state_dict()
        return {"steps": list(self.steps)} | ({"states": states} if states else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.steps = list(state["steps"])
        self.memory.load_state_dict(state.get("states", {}))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the settings, the step counts and the measures' states, never the model."""
        return self.__dict__ | self._without_model()

    @staticmethod
    def _without_model() -> dict[str, Any]:
        return {"layers": [], "skips": [], "active": False, "_seen": [], "_last": {}, "_reached": set()}

    def _layer(self, target: Target) -> Layer:
        measure = self.measure.for_head() if target.head else self.measure
        return Layer(target, measure, self._strength_of(target), tuple(target.parameters()))

    def _remembered(self, layer: Layer, x: Tensor) -> State | None:
        """A measure's state for looking at x: from where training stands, else from the last look; training does not see it."""
        return self.memory.peek(layer, x) if layer.target.name in self.memory.states else self._looking.next(layer, x)

    def _strength_of(self, target: Target) -> Strength:
        own = self.head_coefficient if target.head and self.head_coefficient is not None else self.coefficient
        return own.of(target.name)

    def _last_strength(self, layer: Layer) -> float:
        """Coefficient of a layer at its last step; before that what it begins with."""
        name = layer.target.name
        return self._last[name] if name in self._last else strength_at(layer.strength, 0, name)

    def _count(self, optimizer: Optimizer, index: int | None, again: bool) -> int:
        """Steps done by this optimizer before the present one, and one more from now on."""
        if index is None:
            if id(optimizer) not in self._seen:
                self._seen.append(id(optimizer))
            index = self._seen.index(id(optimizer))
        self.steps += [0] * (index + 1 - len(self.steps))
        self.steps[index] += 0 if again else 1
        return max(self.steps[index] - 1, 0)

    def _application(self, layer: Layer, step: int, own: Mapping[int, float], again: bool) -> Application | None:
        """What to add to one layer at this step; None where nothing is to be added."""
        rates = _rates(layer, own)
        if not rates:
            return None
        self._reached.add(layer.target.name)
        strength = self._last[layer.target.name] = strength_at(layer.strength, step, layer.target.name)
        if strength == 0:
            return None
        refuse_sparse(layer)
        with torch.enable_grad():
            x = layer.target.neurons()
        # Within one step all evaluations are of one function: no new draw.
        known = self.memory.states.get(layer.target.name) if again else None
        state = self.memory.next(layer, widened(x)) if known is None else known
        return Application(layer, strength, max(rates), x, state)

    def table(self) -> str:
        """Every layer with its shape, measure and coefficient, and every weight left out with the reason."""
        self._check_attached()
        every = "" if self.every_n_steps == 1 else f"\napplied on every {self.every_n_steps}th step of each optimizer"
        return describe(self.layers, self.skips) + every

    def _check_attached(self) -> None:
        if not self.layers:
            raise RuntimeError("the regularizer has no model yet: call attach(model) first")


def _learning_rates(optimizer: Optimizer) -> dict[int, float]:
    """Learning rates of the optimizer's parameters, by id."""
    return {id(p): float(group.get("lr", 1.0)) for group in optimizer.param_groups for p in group["params"]}


def _rates(layer: Layer, own: Mapping[int, float]) -> list[float]:
    """Learning rates of the layer's parameters that are about to move; none where there is nothing to add to."""
    return [own[id(p)] for p in layer.parameters if id(p) in own and p.grad is not None and p.requires_grad]


def _refuse_sharded(layer: Layer) -> None:
    """A rank that sees a part of the neurons would compute a wrong gradient without a word."""
    if any(hasattr(p, "device_mesh") for p in layer.parameters):
        raise NotImplementedError(
            f"layer '{layer.target.name}' {layer.target.shape} is sharded over ranks (a DTensor), where the penalty would "
            f"not see all neurons; use DDP or a single device, or exclude='{layer.target.name}'"
        )
