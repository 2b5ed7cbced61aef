"""A target: one set of neurons in a module, how to read it and where its gradient goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_hsu._neurons.placement import Gathered, NeuronView, Placement


@dataclass(frozen=True, eq=False)
class Target:
    """One set of neurons of one module: (groups, n, d), addressed by module and key, never by parameter name.

    Args:
        name: Name of the layer in the model, with the key behind a dot where a module has several sets.
        module: The module.
        key: Which of the module's sets; "" where there is one.
        shape: (groups, n, d).
        head: Whether this is the class head.
        merged: Whether the groups of the module, one neuron each, are seen as one.
        placement: How the module's weights are placed over ranks.
    """

    name: str
    module: nn.Module
    key: str
    shape: tuple[int, int, int]
    head: bool = False
    merged: bool = False
    placement: Placement = field(default_factory=Placement, repr=False)
    _rearranged: dict[tuple[str, ...], bool] = field(default_factory=dict, repr=False)

    def read(self, gathered: Gathered | None = None) -> NeuronView:
        """The effective neurons as they are now, whole on every rank: a collective call where the weights are sharded.

        Args:
            gathered: Whole parameters that earlier reads of this use have gathered, and where to keep more.
        """
        with without_side_effects(self.module):
            reading = self.placement.read(self.module, gathered)[self.key]
        if self.merged:
            return replace(reading, x=reading.x.transpose(0, 1))
        return replace(reading, x=reading.x.unsqueeze(0)) if reading.x.ndim == 2 else reading

    def neurons(self) -> Tensor:
        """The effective neurons (groups, n, d) as they are now; differentiable where gradients are recorded."""
        return self.read().x

    def held_rows(self) -> Tensor | None:
        """Mask (groups, n) of the neurons of which this rank holds a part; None if it needs all gradients."""
        with without_side_effects(self.module), torch.no_grad():
            rows = self.placement.held_rows(self.module, self.key)
        return rows.unsqueeze(0) if rows is not None and rows.ndim == 1 else rows

    def grad_views(
        self, reading: NeuronView, change: Tensor, own: Mapping[int, float], *, values: bool = False
    ) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        """Where a change of the neurons goes: triples (parameter, part of its ``.grad`` or of itself, what to add to it).

        Args:
            reading: ``self.read()``, taken while gradients were recorded.
            change: In the neurons, (groups, n, d).
            own: ids of the parameters that may be touched. One without a gradient is left without.
            values: The parts are of the parameters, not of their gradients.
        """
        x, parameter = reading.x, reading.parameter
        if parameter is not None and id(parameter) not in own:
            return
        if (
            parameter is not None
            and parameter.grad is not None
            and not self.placement.is_sharded(parameter)
        ):
            full = parameter.detach() if values else parameter.grad
            if full.stride() == parameter.stride():
                offset = x.storage_offset() - parameter.storage_offset() + full.storage_offset()
                yield parameter, full.as_strided(x.shape, x.stride(), offset), change
                return
        leaves = [
            p
            for p in self.module.parameters()
            if p.requires_grad and p.grad is not None and id(p) in own
        ]
        if leaves and x.requires_grad:
            pulled = torch.autograd.grad(
                x, leaves, change.to(x.dtype), allow_unused=True, retain_graph=True
            )
            for p, part in zip(leaves, pulled, strict=True):
                if p.grad is not None and part is not None:
                    yield p, p.detach() if values else p.grad, part

    def own_part(self, reading: NeuronView, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """Of a part that :meth:`grad_views` gives, the entries that belong to these neurons: a packed shard has others, too."""
        if reading.parameter is None or not self.placement.is_sharded(parameter):
            return part
        return (
            part
            * torch.autograd.grad(
                reading.x, parameter, torch.ones_like(reading.x), retain_graph=True
            )[0]
        )

    def rearranges(self, reading: NeuronView) -> bool:
        """Whether the neurons are entries of one parameter, in whatever order: then a change of theirs is one of it."""
        if reading.parameter is not None:
            return True
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not named or not reading.x.requires_grad:
            return False
        key = tuple(
            named
        )  # pruning and parametrizing, also in the midst of training, change the names
        if key not in self._rearranged:
            self._rearranged[key] = _rearranges(self.placement, reading.x, list(named.values()))
        return self._rearranged[key]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the neurons depend on."""
        parameter = self.read().parameter
        if parameter is not None:
            return [parameter]
        with without_side_effects(self.module):
            return self.placement.parameters_behind(self.module, self.key) or list(
                self.module.parameters()
            )

    own_rows = held_rows  # the former names
    places = grad_views


def _rearranges(placement: Placement, x: Tensor, leaves: list[nn.Parameter]) -> bool:
    """Whether x has entries of one of its leaves, each once at most."""
    counts = torch.autograd.grad(
        x, leaves, torch.ones_like(x), allow_unused=True, retain_graph=True
    )
    back = torch.autograd.grad(x, leaves, x.detach(), allow_unused=True, retain_graph=True)
    found = [
        (p, count, part)
        for p, count, part in zip(leaves, counts, back, strict=True)
        if count is not None
    ]
    if len(found) != 1 or int(placement.whole(found[0][1].sum())) != x.numel():
        return False
    p, count, part = (placement.local(one.detach()).nan_to_num() for one in found[0])
    return bool(((count == 0) | (count == 1)).all()) and torch.equal(part, p * count)


@contextmanager
def without_side_effects(module: nn.Module) -> Iterator[None]:
    """Read weights without changing state (a spectral norm iterates at each access in training) and without autocast."""
    lists = (
        [m for m in module.modules() if isinstance(m, ParametrizationList)]
        if module._modules
        else []
    )
    switched = [part for one in lists for part in one.modules() if part.training]
    own = (
        p for p in module._parameters.values() if p is not None
    )  # most layers have some: walking modules takes longer
    device = next((p.device.type for p in chain(own, module.parameters())), "cpu")
    for part in switched:
        part.training = False
    try:
        with (
            torch.autocast(device, enabled=False)
            if torch.is_autocast_enabled(device)
            else nullcontext()
        ):
            yield
    finally:
        for part in switched:
            part.training = True
