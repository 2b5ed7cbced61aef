"""FSDP2, tensor parallel or both: parameters are DTensors, of which each rank holds parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_hsu._neurons.placement.base import (
    Gathered,
    NeuronView,
    Placement,
    names_of_first,
    neurons_with,
    view_base,
    viewed_parameter,
)
from lightning_hsu._neurons.rules import Rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor: each rank holds a part, or a copy, of it."""
    return hasattr(x, "full_tensor")


class DTensorPlacement(Placement):
    """Parameters are DTensors: all of them, or those of some modules."""

    strategies: ClassVar[frozenset[str]] = frozenset({"ModelParallelStrategy"})
    is_alone: ClassVar[bool] = False

    @classmethod
    def recognise(
        cls,
        model: nn.Module,
        wrapped: nn.Module,
        group: ProcessGroup | None,
        share_work: bool,
    ) -> Placement | None:
        """A model with a DTensor among its parameters, or one that FSDP2 has left whole for now."""
        for module in model.modules():
            is_fsdp2 = hasattr(type(module), "reshard")
            if is_fsdp2 or any(is_dtensor(p) for p in module.parameters(recurse=False)):
                return cls()
        return None

    def read(
        self, module: nn.Module, rule: Rule, gathered: Gathered | None = None
    ) -> dict[str, NeuronView]:
        """Read the neurons of a module, by key, from its parameters gathered to whole tensors."""
        sharded = _dtensors(module)
        if not sharded:
            return super().read(module, rule)
        if gathered is None:
            gathered = {}
        whole = {}
        origins = {}
        for name, p in sharded.items():
            if id(p) not in gathered:
                gathered[id(p)] = self.whole(p)
            whole[name] = gathered[id(p)]
            origins[id(view_base(whole[name]))] = p
        views = {}
        for key, x in neurons_with(module, rule, whole).items():
            views[key] = NeuronView(x, viewed_parameter(x, origins))
        return views

    def held_rows(self, module: nn.Module, rule: Rule, key: str) -> Tensor | None:
        """Mask of the neurons of which this rank holds a part; None if it needs all gradients.

        Every rank fills its parts with its own number. The module's rule, applied to the gathered
        numbers, shows which neurons they belong to.
        """
        sharded = _dtensors(module)
        if not sharded or self.read(module, rule)[key].parameter is None:
            return None
        rank = torch.distributed.get_rank()
        numbers: Gathered = {}
        for p in sharded.values():
            numbers[id(p)] = _holders(p, rank)
        rows = (self.read(module, rule, numbers)[key].x == rank).any(-1)
        if bool(rows.all()):
            return None
        return rows

    def take_back_forward_weights(
        self, model: nn.Module, held: Sequence[tuple[nn.Module, nn.Parameter]]
    ) -> None:
        """Let FSDP2 take back the weights that it left whole, in the forward pass's precision."""
        left_whole = False
        for module, parameter in held:
            shown = next(module.parameters())
            if self.is_sharded(parameter) and shown.dtype != parameter.dtype:
                left_whole = True
        if left_whole:
            self.take_back_weights(model)

    def take_back_weights(self, model: nn.Module) -> None:
        """Let FSDP2 take back all weights that it left whole."""
        for module in model.modules():
            take_back = getattr(type(module), "reshard", None)
            if take_back is not None:
                take_back(module)

    def is_replaced(self, p: nn.Parameter, now: Any) -> bool:
        """Whether another parameter has taken the place of one; FSDP2 shows others for a while."""
        if is_dtensor(p) and now is not None and now is not p:
            return is_dtensor(now) and now.device_mesh == cast(Any, p).device_mesh
        return super().is_replaced(p, now)

    def stand_ins(self, model: nn.Module) -> dict[int, nn.Parameter]:
        """Sharded parameters by the ids of the whole ones that FSDP2's forward pass uses."""
        found = {}
        for module in model.modules():
            get_state = getattr(type(module), "_get_fsdp_state", None)
            if get_state is None:
                continue
            # A private part of torch: where it has moved, heads are declared or guessed.
            group = getattr(get_state(module), "_fsdp_param_group", None)
            for one in getattr(group, "fsdp_params", ()):
                whole = getattr(one, "_unsharded_param", None)
                if whole is not None:
                    found[id(whole)] = one.sharded_param
        return found

    def agree(self, names: list[str]) -> list[str]:
        """The names that rank 0 has found. A collective call."""
        return names_of_first(names, None)

    def is_sharded(self, x: Tensor) -> bool:
        """Whether a tensor is a DTensor."""
        return is_dtensor(x)

    def whole(self, x: Any) -> Tensor:
        """All of a tensor. A collective call if it is a DTensor."""
        if is_dtensor(x):
            x = x.full_tensor()
        return cast(Tensor, x)

    def local(self, x: Any) -> Tensor:
        """The part of a tensor that this rank holds."""
        if is_dtensor(x):
            x = x.to_local()
        return cast(Tensor, x)

    def any_holder(self, mask: Tensor, p: Any) -> Tensor:
        """Combine a mask with "or", entry by entry, over the ranks that hold parts of p."""
        if not is_dtensor(p):
            return mask
        return self.largest(mask.to(torch.uint8), p).bool()

    def largest(self, number: Tensor, p: Any) -> Tensor:
        """The largest of each number of the ranks that hold parts of p; NaN counts as the largest."""
        if not is_dtensor(p):
            return number
        found = number.nan_to_num(nan=torch.inf)
        for axis in range(p.device_mesh.ndim):
            group = p.device_mesh.get_group(axis)
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
        return found

    def total(self, numbers: Tensor, p: Any) -> Tensor:
        """The sum of each number over the ranks that hold parts of p, not copies."""
        if not is_dtensor(p):
            return numbers
        found = numbers.clone()
        for axis, how in enumerate(p.placements):
            if not how.is_replicate():
                group = p.device_mesh.get_group(axis)
                torch.distributed.all_reduce(found, group=group)
        return found


def _dtensors(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that are DTensors, by name."""
    return {name: p for name, p in module.named_parameters() if is_dtensor(p)}


def _holders(p: Any, rank: int) -> Tensor:
    """A whole tensor of the shape of p; each entry is the number of the rank that holds it."""
    held = torch.full_like(p.to_local(), rank, dtype=torch.float32, requires_grad=False)
    numbers = type(p).from_local(
        held, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return cast(Tensor, numbers.full_tensor())
