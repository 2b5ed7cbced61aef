"""Former names of what is in ``placement`` now."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_hsu._neurons.placement import (
    DTensorPlacement,
    FlatPlacement,
    Gathered,
    NeuronView,
    Placement,
    ReplicatedPlacement,
    is_dtensor,
)
from lightning_hsu._neurons.wrappers import unwrapped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Gathered", "Reading", "Replicas", "any_holder", "is_sharded", "norm_of", "unwrapped"]

Reading = NeuronView
is_sharded = is_dtensor
any_holder = DTensorPlacement().any_holder
norm_of = DTensorPlacement().norm
reshard = DTensorPlacement().reshard


class Replicas(ReplicatedPlacement):
    """See ``ReplicatedPlacement``."""

    split_above: int


def whole_parameters(root: nn.Module | None, *, with_grads: bool) -> AbstractContextManager[None]:
    """See ``Placement.whole_parameters``."""
    placement = Placement() if root is None else FlatPlacement(root)
    return placement.whole_parameters(with_grads=with_grads)


def flat_sharded(model: nn.Module) -> bool:
    """See ``FlatPlacement.recognise``."""
    return FlatPlacement.recognise(model, model, None, None) is not None


def sum_over_ranks(parts: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """See ``Placement.sum_over_ranks``."""
    return ReplicatedPlacement(group).sum_over_ranks(parts)


def leaves_of(loss: Tensor) -> set[int]:
    """Ids of the parameters on which a loss depends."""
    reached, waiting = set[Any](), [loss.grad_fn]
    leaves = set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or node in reached:
            continue
        reached.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.add(id(variable))
        waiting += [parent for parent, _ in node.next_functions]
    return leaves
