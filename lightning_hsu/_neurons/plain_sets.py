"""The sets of neurons in one weight of a layer, as its name, shape and bias or the user say."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lightning_hsu._neurons.candidates import Kind
from lightning_hsu._neurons.how import How, WeightRule, apply_function, rule_for
from lightning_hsu._neurons.rules import GRU_GATES, LSTM_GATES, PROJECTIONS
from lightning_hsu._neurons.table_names import sounds_like_table
from lightning_hsu._neurons.weights import key_of

_WEIGHT_NAMES = ("weight", "kernel", "embedding")  # one is in the last part of a weight's name
_GATES = {len(LSTM_GATES): LSTM_GATES, len(GRU_GATES): GRU_GATES}  # by their number


def neurons_as_asked(
    attribute: str, weight: Tensor, how: How, name: str, outputs: int | None
) -> dict[str, Tensor]:
    """The neurons (n, d) or (groups, n, d) of each part of a weight; "" if it is not parted.

    Args:
        attribute: Name of the weight in its layer.
        weight: The weight.
        how: What the user says.
        name: Name of the layer, for errors.
        outputs: How many outputs the layer has; None if that is not known.
    """
    if callable(how):
        return {"": apply_function(how, weight, name)}
    is_kernels = attribute == "weight" and weight.ndim > 2
    if is_kernels and how == "rows":
        return {"": _by_output(weight, outputs)}
    rule = rule_for(how, attribute, weight, name, kernels=is_kernels)
    assert isinstance(rule, WeightRule)
    x = rule.arrange(weight)
    if not rule.parts:
        return {"": x}
    return {part.key: part.take(x) for part in rule.parts}


def is_named_like_a_weight(leaf: str) -> bool:
    """Whether the name of a tensor within its layer says that it is a weight."""
    return any(part in leaf.lower() for part in _WEIGHT_NAMES)


def kind_of_layer(path: str, sets: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> Kind:
    """A layer of one matrix named ``weight`` is a Linear, or an Embedding if its name says so.

    With more than two axes it is a convolution.
    """
    x = sets.get("")
    if x is None or len(sets) > 1 or x.numel() == 0:
        return "other"
    if any(leaf.ndim > 2 for leaf in leaves.values()):
        return "convolution"
    if x.ndim != 2:
        return "other"
    if sounds_like_table(path):
        return "embedding"
    return "linear"


def kernel_places(leaves: Mapping[str, Tensor]) -> int:
    """How many places the kernel of a convolution has; 1 for other layers."""
    largest = max(leaves.values(), key=lambda x: x.ndim)
    return math.prod(largest.shape[2:])


def sets_of_weight(leaf: str, x: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sets of neurons in one effective weight, by key."""
    if leaf == "in_proj_weight" and len(x) % 3 == 0:
        return dict(zip(PROJECTIONS, x.chunk(3), strict=True))
    if leaf in [f"{part}_proj_weight" for part in PROJECTIONS]:
        return {leaf[0]: x}
    if leaf.startswith(("weight_ih", "weight_hh")):
        return _gates(leaf, x, leaves)
    if leaf.startswith("weight_hr"):
        return {leaf: x}
    return {key_of(leaf): _by_output(x, outputs_of(leaves))}


def outputs_of(leaves: Mapping[str, Tensor]) -> int | None:
    """How many outputs a layer has, as its bias tells; None if it has none."""
    bias = leaves.get("bias")
    if bias is not None and bias.ndim == 1:
        return len(bias)
    return None


def _gates(leaf: str, x: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gates of a recurrent weight; the length of the hidden state tells how many there are."""
    hidden = leaves.get(leaf.replace("weight_ih", "weight_hh"))
    projected = leaves.get(leaf.replace("weight_ih", "weight_hr").replace("weight_hh", "weight_hr"))
    if projected is not None:
        hidden = projected
    count = 1
    if hidden is not None and hidden.numel() > 0:
        count = len(x) // hidden.shape[1]
    if count not in _GATES:
        return {leaf: x}
    gates = {}
    for gate, rows in zip(_GATES[count], x.chunk(count), strict=True):
        gates[f"{leaf}.{gate}"] = rows
    return gates


def _by_output(x: Tensor, outputs: int | None) -> Tensor:
    """The neurons of a weight, one for each output channel.

    Args:
        x: The weight, (outputs, inputs / groups, *kernel) or, if it is transposed,
            (inputs, outputs / groups, *kernel).
        outputs: How many outputs the layer has; None if that is not known.

    Returns:
        Neurons (n, d) or (groups, n, d).
    """
    if not outputs or outputs == len(x) or x.numel() == 0 or outputs % x.shape[1]:
        return x.flatten(1)
    groups = outputs // x.shape[1]
    if len(x) % groups:
        return x.flatten(1)
    return x.view(groups, -1, *x.shape[1:]).transpose(1, 2).flatten(2).squeeze(0)
