"""Wrappers around a model, and what they add to the names of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

_COMPILED = "_orig_mod."  # by torch.compile
_INSIDE_NAMES = (_COMPILED, "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_AROUND_ALL_NAMES = ("module.", "_forward_module.", _COMPILED)  # of DDP, or of a part; of Fabric

Value = TypeVar("Value")


def peeled(model: nn.Module) -> Iterator[nn.Module]:
    """The model as given, then without its outermost wrapper of Fabric or DDP, and so on."""
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


def plain_name(path: str) -> str:
    """A module's path without the parts that wrappers of modules inside the model add."""
    path += "."
    for part in _INSIDE_NAMES:
        path = path.replace(part, "")
    return path.rstrip(".")


def without_prefixes(state: Mapping[str, Value]) -> dict[str, Value]:
    """A state dict without the prefix that a wrapper around the whole model adds to every name."""
    state = dict(state)
    for prefix in _AROUND_ALL_NAMES:
        if state and all(name.startswith(prefix) for name in state):
            shorter = {name.removeprefix(prefix): x for name, x in state.items()}
            return without_prefixes(shorter)
    return state
