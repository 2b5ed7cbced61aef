"""One set of neurons as the engine holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_hsu._core import working_dtype
from lightning_hsu._neurons.sharding import is_sharded
from lightning_hsu._neurons.target import Target
from lightning_hsu.coefficients import Strength
from lightning_hsu.measures import Measure


@dataclass(frozen=True)
class Layer:
    """One set of neurons as the engine holds it: where it is, how it is measured and how strongly.

    Args:
        target: Where it is.
        measure: How it is measured.
        strength: Its coefficient.
        parameters: What it may depend on.
        rows: Neurons (groups, n) of which this rank holds some part; None where it needs the gradient of all.
    """

    target: Target
    measure: Measure
    strength: Strength
    parameters: tuple[nn.Parameter, ...]
    rows: Tensor | None = None

    def rates(self, own: Mapping[int, float]) -> list[float]:
        """Of learning rates by parameter id, those of its parameters with a gradient; none where there is nothing to add to."""
        return [
            own[id(p)]
            for p in self.parameters
            if id(p) in own and p.grad is not None and p.requires_grad
        ]

    @property
    def sharded(self) -> bool:
        """Whether ranks hold parts of its parameters."""
        return any(is_sharded(p) for p in self.parameters)

    @property
    def lowered(self) -> bool:
        """Whether FSDP2 shows its parameters whole, in the lower precision of the forward pass."""
        return (
            self.sharded and next(self.target.module.parameters()).dtype != self.parameters[0].dtype
        )

    @property
    def frozen(self) -> bool:
        """Whether no gradient reaches its neurons."""
        if self.sharded:
            return not any(p.requires_grad for p in self.parameters)  # without a collective call
        with torch.enable_grad():
            return not self.target.neurons().requires_grad


def widened(x: Tensor) -> Tensor:
    """Half-precision neurons in float32, so that small gradients do not underflow; others as they are."""
    return x.to(working_dtype(x.dtype))


def idle_reason(layer: Layer) -> str | None:
    """Why a layer with a coefficient would feel nothing of its penalty; None where all is well."""
    return layer.measure.idle(*layer.target.shape[1:]) if layer.strength != 0 else None
