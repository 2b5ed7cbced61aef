"""Which layers give a model's output: declared, last before the loss, or guessed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from lightning_hsu._neurons.candidates import NeuronSet

DECLARED = "declared"
TRACED = "last before the loss"
NAMED = "named"

_DECLARING = ("get_output_embeddings", "get_classifier")
"""Methods by which models of transformers and of timm say what their output layers are."""

_COPIES = ("AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3", "EMA", "EMAModel")
"""Classes that hold a copy of a model whose weights are averages of the trained ones."""

_COPY_NAMES = ("ema", "ema_model", "model_ema", "swa_model", "averaged_model", "average_model")

_HEAD_NAMES = (
    "head",
    "heads",
    "head_dist",
    "lm_head",
    "classifier",
    "classification_head",
    "segmentation_head",
    "class_head",
    "cls_head",
    "cls_score",
    "class_embed",
    "logits",
    "to_logits",
    "last_linear",
    "fc",
    "fc_out",
    "conv_out",
    "proj_out",
    "out_conv",
    "final_conv",
    "final_layer",
    "output_layer",
    "readout",
)
"""Parts of names that output layers have."""

_PRODUCTS = (
    "Addmm",
    "Addbmm",
    "Addmv",
    "Baddbmm",
    "Bmm",
    "Cdist",
    "CompiledFunction",
    "Convolution",
    "CudnnConvolution",
    "CudnnRnn",
    "Dot",
    "EmbeddingBag",
    "EmbeddingBackward",
    "Euclidean",
    "GroupedMm",
    "Linear",
    "MkldnnRnn",
    "Mm",
    "Mv",
    "ScaledGroupedMm",
    "SlowConv",
    "Sparse",
    "Thnn",
    "Trilinear",
)
"""How the names of autograd's nodes begin in which weights meet what they act on."""


_SUMS = (
    "AddBackward0",
    "DivBackward0",
    "MulBackward0",
    "NegBackward0",
    "SubBackward0",
    "ToCopyBackward0",
)
"""Names of autograd's nodes that put the terms of a loss together."""


_MOST_TERMS = 32


def declared_heads(model: nn.Module) -> list[nn.Module]:
    """The modules that a model, or a part of it, declares to be its output layers."""
    found: list[nn.Module] = []
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
            found.extend(heads)
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
    layered = [one for one in sets if one.kind in ("linear", "convolution")]
    eligible = []
    for one in layered:
        if one.shape[1] > 1 and one.trains and not _is_named_copy(one.name):
            eligible.append(one)
    if not eligible:  # a frozen model
        eligible = layered
    linear = [one for one in eligible if one.kind == "linear"]
    best = _named_like_heads(eligible)
    reason = "guessed: its name"
    if (
        best is None
        and eligible
        and eligible[-1].kind == "convolution"
        and eligible[-1].kernel == 1
    ):
        best = eligible[-1]
        reason = "guessed: last 1 x 1 convolution"
    if best is None and linear:
        best = linear[-1]
    if best is None:
        return {}
    if linear and best is linear[-1]:
        reason = "guessed: last Linear"
    # A layer may have several sets.
    return {one.name: reason for one in eligible if one.layer == best.layer}


def _named_like_heads(sets: Sequence[NeuronSet]) -> NeuronSet | None:
    """The last set with the name of an output layer nearest to the top; None if none has one."""
    best = None
    best_depth = 0
    for one in sets:
        depth = _depth_of_head_name(one.name)
        if depth is not None and (best is None or depth <= best_depth):
            best = one
            best_depth = depth
    return best


def _depth_of_head_name(name: str) -> int | None:
    """Where in a path the name of an output layer stands, if it is outside all blocks."""
    for depth, part in enumerate(name.split(".")):
        if part in _HEAD_NAMES:
            return depth
        if part.isdigit():  # within a block that is repeated
            return None
    return None


def _is_named_copy(name: str) -> bool:
    """Whether a path leads into what is named like an average of a model."""
    return any(part in _COPY_NAMES for part in name.split("."))


def last_before(outputs: object, owners: Mapping[int, Sequence[str]]) -> list[str]:
    """Names of the layers that act last on the way to a loss or to a model's outputs.

    Autograd's graph is followed backwards from each term of the loss, along each path as far as the
    first product in which a layer's weight takes part. What comes before the last layers of another
    term is left out: an encoder with a penalty of its own, or a router.

    Args:
        outputs: A loss, or a model's outputs: tensors in tuples, lists, mappings or dataclasses.
        owners: Names of layers by the ids of their parameters.

    Returns:
        The names, each once, in the order in which they are met; [] if no graph is recorded, or if
        one node holds all layers, as after torch.compile.
    """
    terms = _terms(outputs)
    ends = [_ends(term, owners) for term in terms]
    found: dict[str, None] = {}
    for i, last in enumerate(ends):
        if last is None:
            return []
        before: set[Any] = set()
        for j, other in enumerate(ends):
            if j != i and other:
                before |= _before(other)
        for node, names in last.items():
            if node not in before:
                found |= dict.fromkeys(names)
    return list(found)


def _terms(outputs: object) -> list[Any]:
    """The nodes of autograd's graph at which the terms of a loss, or a model's outputs, begin."""
    terms: list[Any] = []
    numbers: list[Any] = []  # nodes that compute one number
    for x in _tensors(outputs):
        if x.grad_fn is not None:
            (numbers if x.numel() == 1 else terms).append(x.grad_fn)
    roots = [*terms, *numbers]
    seen = set(roots)
    while numbers:
        node = numbers.pop()
        stacked = _stacked_by(node)
        if node.name() in _SUMS:  # by entry: what it sums are numbers, too
            numbers += _new_parents(node, seen)
        elif stacked is not None:
            numbers += _new_parents(stacked, seen)
        else:
            terms.append(node)
    if len(terms) > _MOST_TERMS:  # such as one for each step of a sequence
        return roots[:_MOST_TERMS]
    return terms


def _stacked_by(node: Any) -> Any:
    """The node that stacks the numbers that a node sums, or takes the mean of; None if none does."""
    if node.name() not in ("SumBackward0", "MeanBackward0"):
        return None
    parents = [parent for parent, _ in node.next_functions if parent is not None]
    if len(parents) != 1 or parents[0].name() != "StackBackward0":
        return None
    for parent, _ in parents[0].next_functions:
        shapes = getattr(parent, "_input_metadata", ())  # torch 2.5 has it
        if any(math.prod(one.shape) != 1 for one in shapes):
            return None
    return parents[0]


def _ends(term: Any, owners: Mapping[int, Sequence[str]]) -> dict[Any, list[str]] | None:
    """The products at which paths back from a term meet their first layer, with its names.

    None if one node holds several layers, as after torch.compile.
    """
    last: dict[Any, list[str]] = {}
    waiting = [term]
    seen = {term}
    while waiting:
        node = waiting.pop()
        names = _owners_at(node, owners) if _is_product(node) else []
        if len(names) > 1 and "Compiled" in node.name():
            return None
        if names:
            last[node] = names
        else:
            waiting += _new_parents(node, seen)
    return last


def _before(nodes: Iterable[Any]) -> set[Any]:
    """All nodes of autograd's graph on which some node depends."""
    seen: set[Any] = set()
    waiting = []
    for node in nodes:
        waiting += _new_parents(node, seen)
    while waiting:
        waiting += _new_parents(waiting.pop(), seen)
    return seen


def _new_parents(node: Any, seen: set[Any]) -> list[Any]:
    """The nodes on which a node depends and that were not seen before; now they are."""
    new = []
    for parent, _ in node.next_functions:
        if parent is not None and parent not in seen:
            seen.add(parent)
            new.append(parent)
    return new


def _tensors(value: object) -> Iterable[Tensor]:
    """All tensors within tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name, None))


def _is_product(node: Any) -> bool:
    """Whether a node of autograd's graph may be where a layer's weight meets its inputs."""
    name: str = node.name()
    if name.startswith(_PRODUCTS):
        return True
    if "::" in name or name.endswith(tuple("0123456789")):  # one of autograd's own
        return False
    # A custom function, such as the product with a quantised weight.
    parents = [parent for parent, _ in node.next_functions if parent is not None]
    return len(parents) > 1


def _owners_at(node: Any, owners: Mapping[int, Sequence[str]]) -> list[str]:
    """Names of the layers whose weights reach a product without another product between."""
    found: dict[str, None] = {}
    seen: set[Any] = set()
    waiting = _new_parents(node, seen)
    while waiting:
        inner = waiting.pop()
        if _is_product(inner):
            continue
        variable = getattr(inner, "variable", None)
        if variable is not None:
            found |= dict.fromkeys(owners.get(id(variable), ()))
        waiting += _new_parents(inner, seen)
    return list(found)
