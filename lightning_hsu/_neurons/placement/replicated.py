"""DDP: every rank holds the whole model, so that ranks can share the work on large layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lightning_hsu._neurons.placement.base import Placement
from lightning_hsu._neurons.wrappers import peeled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ReplicatedPlacement(Placement):
    """Every rank holds the same whole weights and trains them alike.

    Args:
        group: The process group of these ranks.
        split_above: Layers of at least this many neurons are computed by all ranks together; None
            if every rank computes every layer.
    """

    strategies: ClassVar[frozenset[str]] = frozenset({"DDPStrategy"})

    def __init__(self, group: ProcessGroup, split_above: int | None = None) -> None:
        self.group = group
        self.split_above = split_above

    @classmethod
    def recognise(
        cls,
        model: nn.Module,
        wrapped: nn.Module,
        group: ProcessGroup | None,
        split_above: int | None,
    ) -> Placement | None:
        """A model wrapped in DDP, which knows its group, or any model if a group is given."""
        if group is None:
            for inner in peeled(wrapped):
                if isinstance(inner, nn.parallel.DistributedDataParallel):
                    group = inner.process_group
        if group is None:
            return None
        return cls(group, split_above)

    @property
    def rank(self) -> int:
        """Number of this rank in the group."""
        return torch.distributed.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return torch.distributed.get_world_size(self.group)

    def splits(self, neurons: int) -> bool:
        """Whether a layer of this many neurons is computed by all ranks together."""
        return self.split_above is not None and neurons >= self.split_above and self.size > 1

    def sum_over_ranks(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sum tensors over ranks, in one reduction for each device and dtype."""
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, part in enumerate(parts):
            alike.setdefault((part.device, part.dtype), []).append(i)
        sums = list(parts)
        for members in alike.values():
            flat = torch.cat([parts[i].flatten() for i in members])
            torch.distributed.all_reduce(flat, group=self.group)
            start = 0
            for i in members:
                end = start + parts[i].numel()
                sums[i] = flat[start:end].view(parts[i].shape)
                start = end
        return sums
