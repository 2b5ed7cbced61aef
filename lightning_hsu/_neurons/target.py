"""One set of neurons of a module: how to read it, and where its gradient goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_hsu._neurons.candidates import NeuronSet
from lightning_hsu._neurons.how import StoredValues
from lightning_hsu._neurons.placement import Gathered, NeuronView, Placement
from lightning_hsu._neurons.rules import Rule


@dataclass(frozen=True, eq=False, kw_only=True)
class Target(NeuronSet):
    """One set of neurons of a module, addressed by module and key, never by parameter name.

    Args:
        module: The module.
        rule: How its neurons are read.
        key: Which of the module's sets; "" if there is one.
        placement: How the module's weights are placed over ranks.
    """

    module: nn.Module
    rule: Rule
    key: str
    placement: Placement = field(default_factory=Placement, repr=False)
    _rearranged: dict[tuple[str, ...], bool] = field(default_factory=dict, repr=False)

    def read(self, gathered: Gathered | None = None) -> NeuronView:
        """The effective neurons (groups, n, d) as they are now, whole on every rank.

        A collective call if the weights are sharded.

        Args:
            gathered: Whole parameters that this step has gathered already; more are added.
        """
        with without_side_effects(self.module):
            view = self.placement.read(self.module, self.rule, gathered)[self.key]
        return NeuronView(self.by_group(view.x), view.parameter)

    def neurons(self) -> Tensor:
        """The effective neurons (groups, n, d); differentiable where gradients are recorded."""
        return self.read().x

    def held_rows(self) -> Tensor | None:
        """Mask (groups, n) of the neurons of which this rank holds a part.

        None if this rank needs the gradient of every neuron.
        """
        with without_side_effects(self.module), torch.no_grad():
            rows = self.placement.held_rows(self.module, self.rule, self.key)
        if rows is not None and rows.ndim == 1:
            return rows.unsqueeze(0)
        return rows

    def grad_views(
        self,
        view: NeuronView,
        change: Tensor,  # (groups, n, d)
        learning_rates: Mapping[int, object],
        *,
        values: bool = False,
    ) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        """Find the tensors that a change of the neurons is added to.

        Args:
            view: ``self.read()``, taken while gradients were recorded.
            change: The change of the neurons, (groups, n, d).
            learning_rates: Those of the parameters that may be touched, by id. A parameter
                without a gradient is left without one.
            values: Whether to change the parameters themselves instead of their gradients.

        Yields:
            Triples (parameter, view of its ``.grad`` or of itself, what to add to that view).
        """
        x, parameter = view.x, view.parameter
        if parameter is not None:
            if id(parameter) not in learning_rates:
                return
            if parameter.grad is not None and not self.placement.is_sharded(parameter):
                whole = parameter.detach() if values else parameter.grad
                if whole.stride() == parameter.stride():
                    offset = x.storage_offset() - parameter.storage_offset()
                    offset += whole.storage_offset()
                    yield parameter, whole.as_strided(x.shape, x.stride(), offset), change
                    return
        leaves = []
        for p in self.module.parameters():
            if p.requires_grad and p.grad is not None and id(p) in learning_rates:
                leaves.append(p)
        if not leaves or not x.requires_grad:
            return
        change = change.to(x.dtype)
        pulled = torch.autograd.grad(x, leaves, change, allow_unused=True, retain_graph=True)
        for p, part in zip(leaves, pulled, strict=True):
            if p.grad is not None and part is not None:
                yield p, p.detach() if values else p.grad, part

    def own_part(self, view: NeuronView, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """A part from :meth:`grad_views`, with zeros for entries of other neurons.

        Only a sharded parameter that holds several sets of neurons has such entries.
        """
        if view.parameter is None or not self.placement.is_sharded(parameter):
            return part
        ones = torch.ones_like(view.x)
        (belongs,) = torch.autograd.grad(view.x, parameter, ones, retain_graph=True)
        return torch.where(belongs != 0, part, torch.zeros_like(part))  # others may not be finite

    def rearranges(self, view: NeuronView) -> bool:
        """Whether the neurons are entries of one parameter, in any order.

        Then a change of the neurons is a change of these entries.
        """
        if view.parameter is not None:
            return True
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not named or not view.x.requires_grad:
            return False
        # Pruning and parametrizing change the names, even in the middle of training.
        key = tuple(named)
        if key not in self._rearranged:
            leaves = list(named.values())
            self._rearranged[key] = _is_rearranged(view.x, leaves, self.placement)
        return self._rearranged[key]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the neurons depend on; [] for those of a buffer or quantised ones."""
        if isinstance(self.rule, StoredValues):
            return []
        parameter = self.read().parameter
        if parameter is not None:
            return [parameter]
        with without_side_effects(self.module):
            return self.placement.parameters_behind(self.module, self.rule, self.key)


def _is_rearranged(x: Tensor, leaves: Sequence[nn.Parameter], placement: Placement) -> bool:
    """Whether x consists of entries of one of its leaves, each at most once.

    Pulled back to the leaf, ones count how often x contains each entry, and x itself equals the
    leaf where the count is 1.
    """
    ones = torch.ones_like(x)
    counts = torch.autograd.grad(x, leaves, ones, allow_unused=True, retain_graph=True)
    values = torch.autograd.grad(x, leaves, x.detach(), allow_unused=True, retain_graph=True)
    used = [i for i, count in enumerate(counts) if count is not None]
    if len(used) != 1:
        return False
    i = used[0]
    if int(placement.whole(counts[i].sum())) != x.numel():
        return False
    leaf = placement.local(leaves[i].detach()).nan_to_num()
    count = placement.local(counts[i]).nan_to_num()
    value = placement.local(values[i]).nan_to_num()
    at_most_once = bool(((count == 0) | (count == 1)).all())
    return at_most_once and torch.equal(value, leaf * count)


@contextmanager
def without_side_effects(module: nn.Module) -> Iterator[None]:
    """Read weights without autocast and without changing state.

    In training mode a spectral norm iterates at each access.
    """
    switched = []
    if module._modules:
        for part in module.modules():
            if isinstance(part, ParametrizationList):
                switched += _switched_off(part)
    try:
        with _without_autocast(module):
            yield
    finally:
        for inner in switched:
            inner.training = True


def _switched_off(parametrizations: ParametrizationList) -> list[nn.Module]:
    """Take parametrizations out of training mode; return the modules that were in it."""
    switched = []
    for inner in parametrizations.modules():
        if inner.training:
            inner.training = False
            switched.append(inner)
    return switched


def _without_autocast(module: nn.Module) -> AbstractContextManager[object]:
    """Switch autocast off on the device of a module's parameters, if it is on."""
    device = "cpu"
    # Most modules have parameters of their own; walking the modules inside takes longer.
    for p in chain(module._parameters.values(), module.parameters()):
        if p is not None:
            device = p.device.type
            break
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
