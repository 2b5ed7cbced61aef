"""What measures carry from one step to the next: witnesses, learned projections, the number of a random draw."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor, nn

from lightning_hsu.core import exact_arithmetic
from lightning_hsu.measures import Measure, State
from lightning_hsu.monitor import Layer


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
            known = {name: part.to(x.device) if part.is_floating_point() else part for name, part in known.items()}
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
