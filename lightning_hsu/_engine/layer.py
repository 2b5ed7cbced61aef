"""One set of neurons as the engine holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_hsu._core import working_dtype
from lightning_hsu._engine.rates import Rate
from lightning_hsu._neurons.target import Target
from lightning_hsu.coefficients import Share, Strength
from lightning_hsu.measures import Measure


@dataclass(frozen=True, eq=False)
class Layer:
    """One set of neurons: where it is, how it is measured and how strongly.

    Args:
        target: Where it is.
        measure: How it is measured.
        strength: Its coefficient.
        parameters: The parameters that its neurons depend on.
        rows: Mask (groups, n) of the neurons of which this rank holds a part; None if this rank
            needs the gradient of every neuron.
    """

    target: Target
    measure: Measure
    strength: Strength
    parameters: tuple[nn.Parameter, ...]
    rows: Tensor | None = None

    @property
    def name(self) -> str:
        """Name of the layer in the model."""
        return self.target.name

    @property
    def has_share(self) -> bool:
        """Whether the coefficient follows the task's gradient."""
        return isinstance(self.strength, Share)

    @property
    def has_schedule(self) -> bool:
        """Whether the coefficient is a function of the steps done."""
        return callable(self.strength)

    @property
    def sharded(self) -> bool:
        """Whether its parameters are sharded over ranks."""
        return any(self.target.placement.is_sharded(p) for p in self.parameters)

    @cached_property
    def held_places(self) -> Tensor | None:
        """Places (k,) among all neurons of those of which this rank holds a part; None for all.

        There is always one, whose gradient may be 0.
        """
        if self.rows is None:
            return None
        places = self.rows.flatten().nonzero().squeeze(1)
        return places if len(places) else places.new_zeros(1)

    @cached_property
    def grad_flops(self) -> float:
        """The FLOP of its penalty's gradient."""
        groups, n, d = self.target.shape
        return groups * self.measure.grad_flops(n, d)

    @property
    def trainable(self) -> bool:
        """Whether a gradient can reach its neurons."""
        return not self.frozen and not self.target.in_buffer

    @property
    def frozen(self) -> bool:
        """Whether its neurons stay as they are: frozen, quantised, or in a copy that averages."""
        if self.target.in_buffer:
            return False
        if self.target.in_copy:
            return True
        return not any(p.requires_grad for p in self.parameters)

    @property
    def steps_in_backward(self) -> bool:
        """Whether an optimizer may step, or take its gradients away, during the backward pass."""
        return any(
            hasattr(p, "_in_backward_optimizers") or p._post_accumulate_grad_hooks
            for p in self.parameters
        )

    @property
    def versions(self) -> tuple[int | None, ...]:
        """How often each of its parameters was changed in place, as far as torch counts it."""
        return tuple(map(version_of, self.parameters))

    def fingerprint(self) -> float:
        """A number that is another one after its weights have changed, however that was done."""
        x = self.target.neurons().detach()
        weights = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=torch.float32)
        return float((to_compute_dtype(x) @ weights.to(to_compute_dtype(x))).abs().sum())

    def rates(self, learning_rates: Mapping[int, Rate]) -> list[Rate]:
        """Learning rates of its parameters that have a gradient; empty if nothing can be added.

        Args:
            learning_rates: Those of one optimizer's parameters, by id.
        """
        found = []
        for p in self.parameters:
            rate = learning_rates.get(id(p))
            if rate is not None and p.grad is not None and p.requires_grad:
                found.append(rate)
        return found

    def why_refused(self) -> str | None:
        """Why it cannot be penalised although it has a coefficient; None if it can."""
        if self.strength != 0 and getattr(self.target.module, "sparse", False) is True:
            return (
                "its gradients are sparse and cannot hold the penalty's: build it with "
                "sparse=False, or give it a coefficient of 0"
            )
        return None

    def idle_reason(self) -> str | None:
        """Why the penalty exerts no force here although it has a coefficient; None if it does."""
        if self.strength == 0:
            return None
        return self.measure.idle(*self.target.shape[1:])


Token = tuple[tuple[int, int, int], ...]
"""Of each parameter of a layer which one it is, where it lies, and how often it was written to."""


def to_compute_dtype(x: Tensor) -> Tensor:
    """Convert half-precision neurons to float32, so that small gradients do not underflow."""
    return x.to(working_dtype(x.dtype))


def version_of(x: Tensor) -> int | None:
    """How often a tensor was changed in place; None for one from inference mode."""
    if x.is_inference():
        return None
    return int(x._version)


def token_of(layer: Layer) -> Token | None:
    """Equal as long as the weights of a layer are the same, as far as torch counts changes.

    None where it does not, as for weights from inference mode.
    """
    found = []
    for p in layer.parameters:
        version = version_of(p)
        if version is None:
            return None
        try:
            memory = int(p.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # a tensor of another library
            return None
        found.append((id(p), memory, version))
    return tuple(found)
