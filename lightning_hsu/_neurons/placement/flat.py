"""FSDP1: weights are cut into flat pieces without rows, and made whole while they are read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from lightning_hsu._neurons.placement.base import Placement
from lightning_hsu._neurons.placement.dtensor import DTensorPlacement
from lightning_hsu._neurons.wrappers import unwrapped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FlatPlacement(DTensorPlacement):
    """FSDP1 holds the weights in flat pieces; modules inside may be tensor parallel as well.

    Args:
        root: The model as FSDP1 wraps it.
    """

    strategies: ClassVar[frozenset[str]] = frozenset({"FSDPStrategy"})
    loss_refusal: ClassVar[str | None] = (
        "apply='loss' does not reach the flat pieces in which {strategy} keeps the weights: use "
        "apply='gradient' or 'decoupled', or ModelParallelStrategy"
    )

    keeps_whole: ClassVar[bool] = False

    def __init__(self, root: nn.Module) -> None:
        self._root = root

    @classmethod
    def recognise(
        cls,
        model: nn.Module,
        wrapped: nn.Module,
        group: ProcessGroup | None,
        share_work: bool,
    ) -> Placement | None:
        """A model with a module wrapped in FSDP1.

        Raises:
            NotImplementedError: if FSDP1 was not told to keep the original parameters.
        """
        if "torch.distributed.fsdp" not in sys.modules:
            return None  # not imported, so nothing is wrapped in it; importing it is slow
        from torch.distributed.fsdp import FullyShardedDataParallel

        root = unwrapped(wrapped)
        if not any(isinstance(module, FullyShardedDataParallel) for module in root.modules()):
            return None
        for p in root.parameters():
            if getattr(p, "_is_flat_param", False):  # as isinstance(p, FlatParameter) asks
                raise NotImplementedError(
                    "FSDP has flattened the weights of this model into pieces without rows, where "
                    "no neuron can be found: use FSDPStrategy(use_orig_params=True), or "
                    "ModelParallelStrategy"
                )
        return cls(root)

    @contextmanager
    def whole_parameters(self, *, with_grads: bool) -> Iterator[None]:
        """Let every rank hold all parameters, and gradients if asked for.

        If gradients were asked for, every rank then writes its own part back.
        """
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(
            self._root, with_grads=with_grads, writeback=with_grads
        ):
            yield
