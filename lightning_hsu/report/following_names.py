"""Which layer of a state dict takes what another gives: what names and shapes tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from lightning_hsu.report.activations import RELU
from lightning_hsu.report.following import Step, Steps, shapes_of

_NUMBERED = re.compile(r"(fc|conv|linear|lin|dense|layer|hidden|l|)[_]?(\d+)")
_FIRST_LINEAR = re.compile(r"(fc|linear|lin|dense|classifier|head|out)[_]?1?")


def steps_of_names(tensors: Mapping[str, Tensor], tensor: Callable[[str], Tensor]) -> Steps:
    """The pairs of layers of a state dict that names and shapes tell.

    They have one parent and numbers that follow each other ("net.0" and "net.2", "fc1" and "fc2",
    "conv1" and "conv2"), or are the last convolution and the first Linear there or of the next
    ``nn.Sequential``. The shapes must fit, and between them in the file there is nothing, or the
    batch norm of the first.

    Args:
        tensors: By name; only their shapes are read.
        tensor: Returns the numbers of one by its name.
    """
    layers = []
    for name, x in tensors.items():
        if name.endswith(".weight") and x.ndim > 1:
            layers.append(name.removesuffix(".weight"))
    order = {name: place for place, name in enumerate(tensors)}
    steps = []
    for layer, following in pairwise(layers):
        first = tensors[f"{layer}.weight"].shape
        second = tensors[f"{following}.weight"].shape
        if not (_names_follow(layer, following, first, second) and _fit(first, second)):
            continue
        between = list(tensors)[order[f"{layer}.weight"] + 1 : order[f"{following}.weight"]]
        owners = {name.rpartition(".")[0] for name in between} - {layer, following}
        norm = None
        if owners:
            norm = owners.pop()
            if owners or not _is_norm(norm, tensors, first[0]):
                continue
        elif _has_other_norms(layer, tensors):
            continue
        condition = "if ReLU or nothing lies between"
        if len(first) > 2:
            condition = "if ReLU, pooling or nothing lies between"
        steps.append(Step(layer, following, RELU, condition, norm, keeps_sign=False))
    how = "names and shapes tell which layer follows; the file does not say how they are connected"
    return Steps(steps, how, tensor, shapes_of(tensors), {})


def _fit(first: torch.Size, second: torch.Size) -> bool:
    """Whether the outputs of one weight are the inputs of another."""
    if len(first) == 2 or len(second) > 2:
        return len(first) == len(second) and second[1] == first[0]
    return second[1] % first[0] == 0


def _names_follow(layer: str, following: str, first: torch.Size, second: torch.Size) -> bool:
    """Whether names say that one layer takes what the other gives."""
    parent, _, own = layer.rpartition(".")
    other_parent, _, other = following.rpartition(".")
    one = _NUMBERED.fullmatch(own)
    two = _NUMBERED.fullmatch(other)
    becomes_linear = len(first) > 2 and len(second) == 2
    if parent != other_parent:
        siblings = parent.rpartition(".")[0] == other_parent.rpartition(".")[0]
        are_sequential = own.isdecimal() and other.isdecimal() and parent and other_parent
        return becomes_linear and siblings and bool(are_sequential)
    if one and two and one[1] == two[1]:
        step = int(two[2]) - int(one[2])
        return step == 1 or (own.isdecimal() and step > 0)
    return becomes_linear and bool(one) and bool(_FIRST_LINEAR.fullmatch(other))


def _is_norm(name: str, tensors: Mapping[str, Tensor], n: int) -> bool:
    """Whether these are the tensors of a batch norm of n neurons."""
    mean = tensors.get(f"{name}.running_mean")
    return mean is not None and f"{name}.running_var" in tensors and mean.shape == (n,)


def _has_other_norms(layer: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether there may be a norm after a layer that its place in the file does not tell of."""
    parent, _, own = layer.rpartition(".")
    if own.isdecimal():
        return False  # its place is its number
    for name, x in tensors.items():
        owner, _, key = name.rpartition(".")
        is_beside = owner.rpartition(".")[0] == parent and x.ndim < 2
        if is_beside and key in ("weight", "running_mean"):
            return True
    return False
