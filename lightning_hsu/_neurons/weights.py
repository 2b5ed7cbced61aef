"""The weights of a module: their names, shapes, parameters and memory, and what computes them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_hsu._neurons.quantised import qualified
from lightning_hsu._neurons.rules import effective_weight
from lightning_hsu._neurons.target import without_side_effects

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_PARTS = ("orig", "g", "v")  # of a weight that an older hook of torch's computes


def key_of(attribute: str) -> str:
    """What a set's name says of the weight that holds it: nothing of one named "weight"."""
    return "" if attribute == "weight" else attribute


def weights_of(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The weights of a module with two or more axes: names as its forward pass uses them, shapes.

    Parametrized weights and those of older norms and pruning count under their own name.
    """
    computed: set[str] = set()  # names of parameters from which a weight is computed
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        if isinstance(name, str) and isinstance(getattr(module, name, None), Tensor):
            computed.update(f"{name}_{part}" for part in _PARTS)
            x = getattr(module, name)
            if x.ndim >= 2:
                yield name, tuple(x.shape)
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict):
        with torch.no_grad(), without_side_effects(module):
            for name in parametrizations:
                x = getattr(module, name)
                if x.ndim >= 2:
                    yield name, tuple(x.shape)
    for name, p in module._parameters.items():
        if p is None or name in computed or nn.parameter.is_lazy(p):
            continue
        if p.ndim >= 2:
            yield name, shape_of_weight(p)


def parameters_of(module: nn.Module, attribute: str) -> list[nn.Parameter]:
    """The parameters that are, or make up, a weight of a module."""
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict) and attribute in parametrizations:
        return list(parametrizations[attribute].parameters())
    found = []
    for name, p in module._parameters.items():
        if p is not None and name in (attribute, *(f"{attribute}_{part}" for part in _PARTS)):
            found.append(p)
    return found


def shape_of_weight(x: Tensor) -> tuple[int, ...]:
    """The shape of a weight; () if it has none, as a nested tensor."""
    try:
        return tuple(x.shape)
    except RuntimeError:
        return ()


def kernel_places(module: nn.Module) -> int:
    """How many places the kernel of a convolution has; 1 for other layers."""
    if isinstance(module, CONVOLUTIONS):
        return math.prod(module.kernel_size)
    return 1


def memory_of(parameter: nn.Parameter) -> int:
    """The same for two parameters that share their memory, as weights tied by transposing do."""
    if type(parameter) is nn.Parameter and parameter.device.type in ("cpu", "cuda"):
        return parameter.untyped_storage().data_ptr() or id(parameter)
    return id(parameter)


def why_computed(module: nn.Module) -> str | None:
    """Why the weight of one of torch's layers is not known: it is set anew in each forward pass."""
    if hasattr(module, "parametrizations"):
        return None
    if not hasattr(module, "weight"):
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *EMBEDDINGS)):
            return f"{qualified(module)} has lost its weight: it is set in the forward pass"
        return None
    weight = module.__dict__.get("weight")
    if not isinstance(weight, Tensor):
        return None
    if effective_weight(module, "weight") is not weight:
        return None  # a hook of torch's computes it
    others = [name for name, p in module._parameters.items() if p is not None and p.ndim >= 2]
    source = f", from {', '.join(others)}" if others else ""
    return (
        f"its weight is computed in the forward pass{source}: no gradient would reach it from "
        "here; compute it by torch.nn.utils.parametrize, or see register_neurons"
    )
