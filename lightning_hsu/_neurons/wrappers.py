"""What others wrap around a model, and what that does to the names of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def peeled(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was given, then without its outermost wrapper of Fabric or DDP, and so on."""
    current: Any = model
    inner: Any = model
    while inner is not None:
        current = inner
        yield current
        inner = None
        if type(current).__name__ == "_FabricModule":
            inner = current._forward_module
        elif isinstance(current, nn.parallel.DistributedDataParallel):
            inner = current.module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of Fabric and DDP."""
    for inner in peeled(model):
        model = inner
    return model
