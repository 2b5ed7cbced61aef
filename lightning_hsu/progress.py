"""What training carries from step to step: counts, the measures' states, the means of shares, what has been reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hsu.coefficients import strength_at
from lightning_hsu.measures import State
from lightning_hsu.memory import Memory
from lightning_hsu.monitor import Layer, widened
from lightning_hsu.share import Share, ShareMeans


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
        return self.memory.peek(layer, x) if layer.target.name in self.memory.states else self._looking.next(layer, x)

    def state_dict(self) -> dict[str, Any]:
        """Counts, and where there are some states and means, by layer."""
        parts = {"states": self.memory.state_dict(), "shares": self.shares.state_dict()}
        return {"steps": list(self.counter.done)} | {name: part for name, part in parts.items() if part}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.counter.done, self.loss_step = list(state["steps"]), None
        self.memory.load_state_dict(state.get("states", {}))
        self.shares.load_state_dict(state.get("shares", {}))
