"""DDP: every rank holds the whole model, so that ranks can compute layers for one another."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, distributed, nn

from lightning_hsu._neurons.placement.base import (
    Message,
    PenalisedLayer,
    Placement,
    names_of_first,
)
from lightning_hsu._neurons.wrappers import peeled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ReplicatedPlacement(Placement):
    """Every rank holds the same whole weights and trains them alike.

    Messages that are under way during a backward pass have a process group of their own where a
    group works in a stream, as with NCCL: DDP's reductions would wait in line for them, and with
    them for what their owners still compute. Gloo's threads do not compute, and take them as they
    come.

    Args:
        group: The process group of these ranks.
        share_work: Whether one rank computes a layer for all; else each rank computes every layer.
        ddp: The model as DDP wraps it, if it does.
    """

    strategies: ClassVar[frozenset[str]] = frozenset({"DDPStrategy"})
    is_alone: ClassVar[bool] = False

    def __init__(
        self,
        group: ProcessGroup,
        *,
        share_work: bool = True,
        ddp: nn.parallel.DistributedDataParallel | None = None,
    ) -> None:
        self.group = group
        self.finds_unused = ddp is not None and ddp.find_unused_parameters
        self._may_share = share_work and self.size > 1
        self._ddp = None if ddp is None else weakref.ref(ddp)
        self._beside: ProcessGroup | None = None

    @classmethod
    def recognise(
        cls,
        model: nn.Module,
        wrapped: nn.Module,
        group: ProcessGroup | None,
        share_work: bool,
    ) -> Placement | None:
        """A model wrapped in DDP, which knows its group, or any model if a group is given."""
        ddp = None
        for inner in peeled(wrapped):
            if isinstance(inner, nn.parallel.DistributedDataParallel):
                ddp = inner
                group = group or inner.process_group
        if group is None:
            return None
        return cls(group, share_work=share_work, ddp=ddp)

    def check_loss(self, loss: Tensor, layers: Sequence[PenalisedLayer]) -> None:
        """Refuse, too, a penalty on parameters that DDP has closed without a gradient."""
        super().check_loss(loss, layers)
        if not self.finds_unused:
            return
        used = _leaves_of(loss)
        for layer in layers:
            trained = {id(p) for p in layer.parameters if p.requires_grad}
            if trained and not trained & used:
                raise RuntimeError(
                    f"layer '{layer.name}' {layer.shape} took no part in this batch's loss, and DDP "
                    "with find_unused_parameters=True has closed its gradient before apply='loss' "
                    f"could add the penalty: use apply='gradient', or exclude='{layer.name}'"
                )

    def agree(self, names: list[str]) -> list[str]:
        """The names that rank 0 has found. A collective call."""
        return names_of_first(names, self.group)

    @property
    def shares_work(self) -> bool:
        """Whether one rank computes a layer for all: not where some have no more batches."""
        return self._may_share and not self.is_uneven

    @property
    def is_uneven(self) -> bool:
        """Whether DDP is within torch's ``Join``, or was: torch does not tell that it has ended.

        There some ranks have no more batches and answer DDP alone. All ranks enter it together.
        """
        ddp = None if self._ddp is None else self._ddp()
        config = getattr(ddp, "_join_config", None)  # a private part of torch
        return bool(getattr(config, "enable", False))

    @property
    def rank(self) -> int:
        """Number of this rank in the group."""
        return distributed.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return distributed.get_world_size(self.group)

    def send(
        self, messages: Sequence[Message], *, beside: bool = False
    ) -> list[Callable[[], object]]:
        """Begin to send messages from their owners to all ranks, each as one broadcast."""
        waits = []
        for message in messages:
            device = message.entries.device
            group = self.group
            if beside and _has_stream(group, device):
                group = self._group_beside(device)
            owner = distributed.get_global_rank(self.group, message.owner)
            work = distributed.broadcast(message.entries, src=owner, group=group, async_op=True)
            waits.append(work.wait)
        return waits

    def release(self) -> None:
        """Give back the group for messages beside the task's; all ranks call this.

        A group that is already gone, with all others, is left.
        """
        group, self._beside = self._beside, None
        if group is None or group is self.group or not distributed.is_initialized():
            return
        with suppress(ValueError):  # the user has destroyed all groups, and made others
            distributed.destroy_process_group(group)

    def _group_beside(self, device: torch.device) -> ProcessGroup:
        """A group for messages of a device that are under way beside the task's, made once.

        Only ranks that are all there are can make one without the help of others.
        """
        if self._beside is None:
            self._beside = self.group
            if self.size == distributed.get_world_size():
                made = distributed.new_group(
                    timeout=_timeout_of(self.group, device),
                    backend=distributed.get_backend(self.group),
                )
                assert made is not None
                self._beside = made
        return self._beside


def _has_stream(group: ProcessGroup, device: torch.device) -> bool:
    """Whether a group works for a device in one stream, after what was queued before: not gloo."""
    backends = str(distributed.get_backend_config(group))
    return device.type != "cpu" and f"{device.type}:gloo" not in backends


def _timeout_of(group: ProcessGroup, device: torch.device) -> timedelta | None:
    """How long a group waits for its ranks; None, torch's default, if it does not tell."""
    try:
        # Private parts of torch; what they are called has not changed since 2.4.
        found = group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(found, timedelta) else None


def _leaves_of(loss: Tensor) -> set[int]:
    """Ids of the parameters on which a loss depends."""
    reached: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    leaves = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in reached:
            continue
        reached.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
        waiting += [parent for parent, _ in node.next_functions]
    return leaves
