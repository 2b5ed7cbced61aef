"""What training carries from step to step: counts, the measures' states, the means of shares, what has been reached."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hsu._core import exact_arithmetic
from lightning_hsu._engine.layer import Layer, widened
from lightning_hsu.coefficients import Share, strength_at
from lightning_hsu.measures import Measure, State


class Memory:
    """The states of a model's layers, by name.

    They are the same on all ranks, for the same weights and seeds made them. Another model begins without.
    """

    def __init__(self) -> None:
        self.states: dict[str, State] = {}
        self._model: weakref.ref[nn.Module] | None = None

    def attach(self, model: nn.Module) -> bool:
        """Forget another model's states, and tell so; those just loaded belong to the first model that comes."""
        another = self._model is not None and self._model() is not model
        if another:
            self.states = {}
        self._model = weakref.ref(model)
        return another

    def next(self, layer: Layer, x: Tensor) -> State | None:
        """Prepare the layer's measure for neurons x (groups, n, d), and keep what it will carry on from."""
        state = self.peek(layer, x)
        if state is not None:
            self.states[layer.target.name] = state
        return state

    def peek(self, layer: Layer, x: Tensor) -> State | None:
        """The same without keeping it."""
        if type(layer.measure).prepare is Measure.prepare:
            return None  # as of most measures
        known = self.states.get(layer.target.name)
        if known is not None:
            known = {
                name: part.to(x.device) if part.is_floating_point() else part
                for name, part in known.items()
            }
        with exact_arithmetic(x):  # whatever autocast a hook runs in
            return layer.measure.prepare(x.detach(), known)

    def state_dict(self) -> dict[str, State]:
        """The states by layer."""
        return {name: dict(state) for name, state in self.states.items()}

    def load_state_dict(self, states: Mapping[str, State]) -> None:
        """Go on from states by layer."""
        self.states, self._model = {name: dict(state) for name, state in states.items()}, None

    def __getstate__(self) -> dict[str, object]:
        """Pickle and copy the states, never the model."""
        return {"states": self.states, "_model": None}


class ShareMeans:
    """The running means of the gradients' norms by layer, (task's, penalty's); the same on all ranks."""

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}

    def update(self, name: str, share: Share, task: Tensor, penalty: Tensor) -> None:
        """Take the norms of one step into a layer's means, unless they are not finite."""
        norms = torch.stack([task, penalty])
        known = self.means.get(name)
        known = torch.zeros_like(norms) if known is None else known.to(norms)
        mixed = share.smoothing * known + (1.0 - share.smoothing) * norms
        self.means[name] = torch.where(torch.isfinite(norms).all(), mixed, known)

    def coefficient(self, name: str, share: Share) -> Tensor | float:
        """Return the coefficient of a layer, as a tensor that nobody has waited for; 0 before the first step."""
        if name not in self.means:
            return 0.0
        task, penalty = self.means[name]
        value: Tensor = share.fraction * task / penalty.clamp_min(torch.finfo(penalty.dtype).tiny)
        return value.clamp_max(share.maximum)

    def state_dict(self) -> dict[str, Tensor]:
        """The means by layer."""
        return dict(self.means)

    def load_state_dict(self, means: Mapping[str, Tensor]) -> None:
        """Go on from means by layer."""
        self.means = dict(means)


class StepCounter:
    """Steps done by each optimizer, by its position or by the order in which they first step."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self._seen: list[int] = []  # ids of the optimizers that came without a position

    def before(self, optimizer: Optimizer, index: int | None = None) -> int:
        """Return the steps that an optimizer has done."""
        return self.done[self._position(optimizer, index)]

    def count(self, optimizer: Optimizer, index: int | None = None, *, again: bool = False) -> int:
        """Count a step, unless it is the present one ``again``; returns the steps done before it."""
        position = self._position(optimizer, index)
        self.done[position] += 0 if again else 1
        return max(self.done[position] - 1, 0)

    def forget_optimizers(self) -> None:
        """Let go of the optimizers; the counts stay."""
        self._seen = []

    def _position(self, optimizer: Optimizer, index: int | None) -> int:
        if index is None:
            if id(optimizer) not in self._seen:
                self._seen.append(id(optimizer))
            index = self._seen.index(id(optimizer))
        self.done += [0] * (index + 1 - len(self.done))
        return index


class Progress:
    """Where training stands; the same on all ranks.

    Args:
        every_n_steps: The penalty is applied on every so many steps of each optimizer.

    Attributes:
        counter: Steps done by each optimizer: schedules and ``every_n_steps`` count in them.
        memory: States of the measures.
        shares: Means of the gradients' norms.
        coefficients: The coefficient of each layer at its last step.
        reached: Layers whose weights some optimizer stepped, or was about to, with a gradient.
        loss_step: The step of the last penalty in a loss; None if it has no number.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        self._every = every_n_steps
        self.counter, self.memory, self.shares = StepCounter(), Memory(), ShareMeans()
        self._looking = Memory()
        self.forget_model()

    def attach(self, model: nn.Module) -> None:
        """Forget another model's states and means; those just loaded belong to the first model that comes."""
        self._looking.attach(model)
        if self.memory.attach(model):
            self.shares = ShareMeans()

    def forget_model(self) -> None:
        """Let go of the model and its optimizers; counts, states and means stay."""
        self.counter.forget_optimizers()
        self.coefficients: dict[str, Tensor | float] = {}
        self.reached: set[str] = set()
        self.loss_step: int | None = None

    def coefficient(self, layer: Layer, step: int) -> Tensor | float:
        """Note and return the coefficient of a layer after so many steps."""
        name, strength = layer.target.name, layer.strength
        if isinstance(strength, Share):
            self.coefficients[name] = self.shares.coefficient(name, strength)
        else:
            self.coefficients[name] = strength_at(strength, step, name)
        return self.coefficients[name]

    def last_coefficient(self, layer: Layer) -> float:
        """Return the coefficient of a layer at its last step, also after a resume; before any what it begins with."""
        if layer.target.name not in self.coefficients:
            before = max([0, *(done - 1 for done in self.counter.done)])
            self.coefficient(layer, before - before % self._every)
        return float(self.coefficients[layer.target.name])

    def varying(self, layers: Sequence[Layer]) -> dict[str, float]:
        """Return the last coefficients of the layers where they change over time."""
        changing = [layer for layer in layers if not isinstance(layer.strength, (int, float))]
        return {layer.target.name: self.last_coefficient(layer) for layer in changing}

    def note_reached(self, layers: Sequence[Layer], own: Mapping[int, float]) -> None:
        """Note the layers that an optimizer reaches, of whose parameters ``own`` has the learning rates by id."""
        self.reached |= {layer.target.name for layer in layers if layer.rates(own)}

    def state(self, layer: Layer, x: Tensor, *, keep: bool) -> State | None:
        """Return the measure's state for neurons x (groups, n, d); ``keep`` that of the step under way: no new draw."""
        known = self.memory.states.get(layer.target.name) if keep else None
        return self.memory.next(layer, widened(x)) if known is None else known

    def look(self, layer: Layer, x: Tensor) -> State | None:
        """A state for looking at x: from where training stands, else from the last look; training does not see it."""
        return (
            self.memory.peek(layer, x)
            if layer.target.name in self.memory.states
            else self._looking.next(layer, x)
        )

    def state_dict(self) -> dict[str, Any]:
        """Counts, and where there are some states and means, by layer."""
        parts = {"states": self.memory.state_dict(), "shares": self.shares.state_dict()}
        return {"steps": list(self.counter.done)} | {
            name: part for name, part in parts.items() if part
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.counter.done, self.loss_step = list(state["steps"]), None
        self.memory.load_state_dict(state.get("states", {}))
        self.shares.load_state_dict(state.get("shares", {}))
