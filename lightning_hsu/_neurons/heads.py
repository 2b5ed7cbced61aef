"""Which layers give a model's output: declared, last before the loss, or guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from lightning_hsu._neurons.candidates import NeuronSet
from lightning_hsu._neurons.head_names import depth_of_head_name
from lightning_hsu._neurons.names import dictionaries

DECLARED = "declared"
TRACED = "last before the loss"
NAMED = "named"
GUESSED = "guessed"

_DECLARING = ("get_output_embeddings", "get_classifier")
"""Methods by which models of transformers and of timm say what their output layers are."""

_COPIES = ("AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3")
"""Classes that hold a copy of a model whose weights are averages of the trained ones."""

_COPY_WORDS = ("ema", "teacher", "momentum", "target", "swa", "averaged", "average", "shadow")
"""Words in the names of copies of a model, of which another one is trained."""


def declared_heads(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The modules that a model, or parts of it, declare to be output layers, by who declares."""
    found: dict[nn.Module, list[nn.Module]] = {}
    inside: set[nn.Module] = set()  # parts of models that have declared theirs
    for module in model.modules():
        if is_copy(module):
            inside.update(module.modules())
        if module in inside:
            continue
        heads = _declared_by(module)
        if heads and _is_frozen(module) and not _is_frozen(model):
            heads = []  # a teacher
            inside.update(module.modules())
        if heads:
            found[module] = heads
            inside.update(module.modules())
    return found


def _is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of a module trains."""
    return not any(p.requires_grad for p in module.parameters())


def _declared_by(module: nn.Module) -> list[nn.Module]:
    """The output layers that one module declares; none if it declares none."""
    for name in _DECLARING:
        method = getattr(type(module), name, None)
        if method is None:
            continue
        try:
            answer = method(module)
        except Exception:  # somebody else's code: then it declares nothing
            continue
        heads = []
        for one in answer if isinstance(answer, (tuple, list)) else (answer,):
            if isinstance(one, nn.Module) and not isinstance(one, nn.Identity):
                heads.append(one)
        if heads:
            return heads
    return []


def is_copy(module: nn.Module) -> bool:
    """Whether a module is a copy of a model whose weights are averages of the trained ones."""
    return any(kind.__name__ in _COPIES for kind in type(module).__mro__)


def guessed_heads(sets: Sequence[NeuronSet]) -> dict[str, str]:
    """The output layer as names and order suggest, with the reason; {} if there is none.

    Args:
        sets: All sets of a model, in its order.
    """
    no_heads = dictionaries(sets)
    layered = []
    for one in sets:
        if one.kind in ("linear", "convolution") and one.name not in no_heads:
            layered.append(one)
    eligible = []
    for one in layered:
        if one.trains and not _is_named_copy(one.name):
            eligible.append(one)
    if not eligible:  # a frozen model
        eligible = layered
    linear = [one for one in eligible if one.kind == "linear"]
    best = _named_like_heads(eligible)
    reason = f"{GUESSED}: its name"
    pointwise = [one for one in eligible[-1:] if one.kind == "convolution" and one.kernel == 1]
    if best is None and pointwise:
        best = pointwise[0]
        reason = f"{GUESSED}: last 1 x 1 convolution"
    elif best is None and linear:
        best = linear[-1]
    if best is None:
        return {}
    if linear and best is linear[-1]:
        reason = f"{GUESSED}: last Linear"
    # A layer may have several sets, and a head for distillation stands beside another one.
    layers = (best.layer, best.layer.replace("head_dist", "head"))
    return {one.name: reason for one in eligible if one.layer in layers}


def _named_like_heads(sets: Sequence[NeuronSet]) -> NeuronSet | None:
    """The last set with the name of an output layer nearest to the top; None if none has one."""
    best = None
    best_depth = 0
    for one in sets:
        depth = depth_of_head_name(one.name)
        if depth is not None and (best is None or depth <= best_depth):
            best = one
            best_depth = depth
    return best


def _is_named_copy(name: str) -> bool:
    """Whether a path leads into what is named like a copy of a model."""
    words = re.split(r"[._]|(?<=[a-z])\d+", name.lower())
    return any(word in _COPY_WORDS for word in words) or "encoder_k" in name
