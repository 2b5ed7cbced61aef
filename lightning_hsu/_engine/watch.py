"""What the layers rest on, and whether it is still there: looked at without a scan of the model."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import is_

from torch import nn
from torch.optim import Optimizer

from lightning_hsu._engine.layer import Layer
from lightning_hsu._neurons.placement import Placement
from lightning_hsu._neurons.rules import REGISTERED
from lightning_hsu._neurons.target import Target

Children = Mapping[str, nn.Module | None]
"""The modules that a module holds, by name."""

Holder = Mapping[str, nn.Parameter | None]
"""The parameters that a module holds, by name."""


class Watch:
    """Sees that a module or a parameter has been replaced, added or taken away.

    It compares what stands at known places by identity: modules where others hold them, and
    parameters where layers hold them.

    Args:
        model: The model.
        targets: All sets of neurons in it, measured or not: a weight may leave its tie.
        layers: The layers that are measured.
        placement: How the weights are placed over the ranks.
        before: The watch that this one replaces; what it has seen of optimizers is kept.
        idle: Ids of the parameters of layers that are taken for copies which nothing trains.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        layers: Sequence[Layer],
        placement: Placement,
        before: Watch | None = None,
        idle: Collection[int] = (),
    ) -> None:
        self._placement = placement
        self._rules = len(REGISTERED)
        inside: dict[int, nn.Module] = {}
        for target in targets:
            for module in target.module.modules():
                inside[id(module)] = module
        self._ways: list[tuple[Children, str, nn.Module | None]] = []
        self._sizes: list[tuple[Children, int]] = []
        for module in model.modules():
            if module._modules or id(module) in inside or _is_empty_holder(module):
                self._sizes.append((module._modules, len(module._modules)))
            for name, child in module._modules.items():
                self._ways.append((module._modules, name, child))
        wanted = {id(p) for layer in layers for p in layer.parameters}
        self._places: list[tuple[Holder, str, nn.Parameter]] = []
        for module in inside.values():
            for name, p in module._parameters.items():
                if p is None or nn.parameter.is_lazy(p):
                    continue
                if p.ndim < 2 and id(p) not in wanted:
                    continue
                self._places.append((module._parameters, name, p))
        self._computed = [one for one in map(_Computed, layers) if one.others]
        self._lazy = [p for p in model.parameters() if nn.parameter.is_lazy(p)]
        # The parameters themselves: torch.utils.swap_tensors refuses those with weak references.
        self._in_model = {id(p): p for p in model.parameters()}
        self._idle = idle
        self._groups: list[tuple[weakref.ref[Optimizer], list[list[nn.Parameter]]]] = []
        if before is not None:
            self._groups = before._groups

    def is_current(self, optimizers: Iterable[Optimizer] = ()) -> bool:
        """Whether everything is where it was, and the optimizers have no parameters unseen so far.

        A new layer that trains is in some optimizer, wherever it is in the model.

        Args:
            optimizers: The optimizers.
        """
        is_known = True
        for optimizer in optimizers:  # all of them are noted
            if not self._knows(optimizer):
                is_known = False
        if not is_known or len(REGISTERED) != self._rules:
            return False
        for p in self._lazy:
            if not nn.parameter.is_lazy(p):  # it has a shape now
                return False
        for children, name, child in self._ways:
            if children.get(name) is not child:
                return False
        for children, size in self._sizes:
            if len(children) != size:
                return False
        for holder, name, p in self._places:
            now = holder.get(name)
            if now is not p and self._placement.is_replaced(p, now):
                return False
        if not self._computed:
            return True
        return all(one.is_current() for one in self._computed)

    @property
    def has_optimizers(self) -> bool:
        """Whether any optimizer has been seen so far."""
        return bool(self._groups)

    def optimizes(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether some optimizer seen so far has one of these parameters."""
        wanted = {id(p) for p in parameters}
        for known, lists in self._groups:
            if known() is None:
                continue
            for group in lists:
                if any(id(p) in wanted for p in group):
                    return True
        return False

    def _knows(self, optimizer: Optimizer) -> bool:
        """Whether all of an optimizer's parameters have been seen, here or in the model."""
        groups = optimizer.param_groups
        for known, lists in self._groups:
            if known() is not optimizer:
                continue
            if len(lists) != len(groups):
                break
            for before, group in zip(lists, groups, strict=True):
                now = group["params"]
                if len(before) != len(now) or not all(map(is_, before, now)):
                    return self._meet(optimizer)
            return True
        return self._meet(optimizer)

    def knows_all(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether all of these parameters were in the model."""
        return all(self._in_model.get(id(p)) is p for p in parameters)

    def _meet(self, optimizer: Optimizer) -> bool:
        """Note an optimizer's parameters; return whether those new to it were in the model."""
        others = []
        former: dict[int, nn.Parameter] = {}
        for known, groups in self._groups:
            one = known()
            for group in groups:
                former |= {id(p): p for p in group}
            if one is not None and one is not optimizer:
                others.append((known, groups))
        lists = [list(group["params"]) for group in optimizer.param_groups]
        self._groups = [*others, (weakref.ref(optimizer), lists)]
        for parameters in lists:
            for p in parameters:
                if former.get(id(p)) is p:
                    continue
                if id(p) in self._idle or self._in_model.get(id(p)) is not p:
                    return False
        return True


class _Computed:
    """A layer whose neurons are computed by modules inside it, and may change their parameters.

    As where a library has several adapters in one layer, of which one is active.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        own = {id(p) for p in layer.parameters}
        self.others: list[nn.Parameter] = []
        if own and layer.target.module._modules and not layer.sharded:
            for p in layer.target.module.parameters():
                if p.ndim >= 2 and id(p) not in own:
                    self.others.append(p)
        self._seen = {self._pattern()}

    def is_current(self) -> bool:
        """Whether its neurons still depend on the same parameters.

        That is looked at whenever others of them train, or have a gradient, than before.
        """
        pattern = self._pattern()
        if pattern in self._seen:
            return True
        self._seen.add(pattern)
        now = {id(p) for p in self._layer.target.parameters()}
        return now == {id(p) for p in self._layer.parameters}

    def _pattern(self) -> tuple[tuple[bool, bool], ...]:
        """Which parameters train, and which have a gradient."""
        parameters = (*self._layer.parameters, *self.others)
        return tuple((p.requires_grad, p.grad is not None) for p in parameters)


def _is_empty_holder(module: nn.Module) -> bool:
    """Whether layers may still be put into a module that holds nothing."""
    if module._modules or any(p is not None for p in module._parameters.values()):
        return False
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return True
    return not type(module).__module__.startswith("torch.nn.")
