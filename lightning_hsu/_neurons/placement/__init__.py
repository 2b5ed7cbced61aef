"""How the weights of a model are placed over ranks: one file for each way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lightning_hsu._neurons.placement.base import Gathered, NeuronView, PenalisedLayer, Placement
from lightning_hsu._neurons.placement.dtensor import DTensorPlacement
from lightning_hsu._neurons.placement.flat import FlatPlacement
from lightning_hsu._neurons.placement.replicated import ReplicatedPlacement
from lightning_hsu._neurons.wrappers import unwrapped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PLACEMENTS: tuple[type[Placement], ...] = (
    FlatPlacement,  # before DTensorPlacement: FSDP1 may shard what is tensor parallel
    DTensorPlacement,
    ReplicatedPlacement,
    Placement,
)
"""Every kind. A model gets the first placement that recognises it, or else the last."""

__all__ = [
    "PLACEMENTS",
    "DTensorPlacement",
    "FlatPlacement",
    "Gathered",
    "NeuronView",
    "PenalisedLayer",
    "Placement",
    "ReplicatedPlacement",
    "known_strategies",
    "placement_for_strategy",
    "placement_of",
]


def placement_of(
    model: nn.Module,
    wrapped: nn.Module | None = None,
    *,
    group: ProcessGroup | None = None,
    share_work: bool = True,
) -> Placement:
    """Find how the weights of a model are placed.

    Args:
        model: The model, possibly wrapped by DDP, FSDP or Fabric.
        wrapped: The same model within FSDP1 or DDP, if these wrap it from outside.
        group: The ranks that train the same weights; None takes those of a DDP wrapper.
        share_work: Whether ranks with the same weights may compute layers for one another.

    Raises:
        NotImplementedError: if FSDP1 does not keep the original parameters.

    Example:
        >>> type(placement_of(nn.Linear(2, 2))).__name__
        'Placement'
    """
    outside = model if wrapped is None else wrapped
    inside = unwrapped(model)
    for kind in PLACEMENTS:
        placement = kind.recognise(inside, outside, group, share_work)
        if placement is not None:
            return placement
    return Placement()


def known_strategies() -> frozenset[str]:
    """Names of all Lightning strategies whose placement of the weights is known."""
    names: frozenset[str] = frozenset()
    for kind in PLACEMENTS:
        names |= kind.strategies
    return names


def placement_for_strategy(name: str) -> type[Placement] | None:
    """The kind of placement that a Lightning strategy of this name makes; None if it is unknown."""
    for kind in PLACEMENTS:
        if name in kind.strategies:
            return kind
    return None
