"""A target: one set of neurons in a module, how to read it and where its gradient goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_hsu.neurons import neurons_of


@dataclass(frozen=True, eq=False)
class Target:
    """One set of neurons of one module: (groups, n, d), addressed by module and key, never by parameter name.

    Args:
        name: Name of the layer in the model, with the key behind a dot where a module has several sets.
        module: The module.
        key: Which of the module's sets; "" where there is one.
        shape: (groups, n, d).
        head: Whether this is the class head.
    """

    name: str
    module: nn.Module
    key: str
    shape: tuple[int, int, int]
    head: bool = False

    def neurons(self) -> Tensor:
        """The effective neurons (groups, n, d) as they are now; differentiable where gradients are recorded."""
        with without_side_effects(self.module):
            x = neurons_of(self.module)[self.key]
        return x.unsqueeze(0) if x.ndim == 2 else x

    @property
    def frozen(self) -> bool:
        """Whether no gradient reaches these neurons."""
        with torch.enable_grad():
            return not self.neurons().requires_grad

    def places(self, x: Tensor, grad: Tensor, own: Mapping[int, float]) -> Iterator[tuple[Tensor, Tensor]]:
        """Where the gradient of the neurons goes: pairs (part of some ``.grad``, what to add to it).

        Args:
            x: ``self.neurons()``, taken while gradients were recorded.
            grad: Gradient in the neurons, (groups, n, d).
            own: ids of the parameters that may be touched. One without a gradient is left without.
        """
        parameter = parameter_behind(x)
        if parameter is not None and parameter.grad is not None and parameter.grad.stride() == parameter.stride():
            offset = x.storage_offset() - parameter.storage_offset() + parameter.grad.storage_offset()
            yield parameter.grad.as_strided(x.shape, x.stride(), offset), grad
            return
        leaves = [p for p in self.module.parameters() if p.requires_grad and p.grad is not None and id(p) in own]
        if leaves and x.requires_grad:
            pulled = torch.autograd.grad(x, leaves, grad.to(x.dtype), allow_unused=True)
            yield from ((p.grad, g) for p, g in zip(leaves, pulled, strict=True) if p.grad is not None and g is not None)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the neurons may depend on."""
        parameter = parameter_behind(self.neurons())
        return list(self.module.parameters()) if parameter is None else [parameter]


def parameter_behind(x: Tensor) -> nn.Parameter | None:
    """The parameter that x is, or is a view of; None if it was computed."""
    base = x._base if x._is_view() else x
    return base if isinstance(base, nn.Parameter) else None


@contextmanager
def without_side_effects(module: nn.Module) -> Iterator[None]:
    """Read weights without changing state (a spectral norm iterates at each access in training) and without autocast."""
    lists = [m for m in module.modules() if isinstance(m, ParametrizationList)]
    switched = [part for one in lists for part in one.modules() if part.training]
    device = next((p.device.type for p in module.parameters()), "cpu")
    for part in switched:
        part.training = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for part in switched:
            part.training = True
