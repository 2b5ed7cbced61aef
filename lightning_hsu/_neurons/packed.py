"""The weights of a checkpoint that stores them quantised, in few bits, with their scales apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hsu._neurons import codes
from lightning_hsu._neurons.formats import READERS
from lightning_hsu._neurons.formats.base import Reading, not_known
from lightning_hsu._neurons.quantised import plain_values, qualified

_DOTTED = re.compile(
    r"(?:^|\.)("
    r"[^.]+\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[^.]+)"  # bitsandbytes
    r"|weight\.(?:_data|_data\._data|_scale|_shift)"  # quanto
    r"|weight\.(?:compressed|bitmask|row_offsets|shape)"  # compressed-tensors, sparse
    r")$"
)
_PARTS_OF_LAYERS = (  # of activations, or of the cache of keys and values
    "input_scale",
    "output_scale",
    "scale_input",
    "comfy_quant",
    "act_scale",
    "activation_scale",
    "input_scale_ub",
    "input_zero_point",
    "output_zero_point",
    "input_global_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "kv_scale",
    "prob_scale",
    "pre_quant_scale",
)
_NEVER_WEIGHTS = (  # endings of names that say what a tensor is, even if it lies alone in a file
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_scales",
    "weight_zero_point",
    "weight_global_scale",
    "weight_shape",
    "weight_g_idx",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
)
_PACKED_NAMES = (  # integers of one of these names are a packed weight
    "qweight",
    "weight_packed",
    "W_q",
    "weight_qdata",
    "weight:qdata",
    "weight:_data",
    "weight._data",
    "weight._data._data",
    "weight.compressed",
    "weight.bitmask",
    "compressed",
    "bitmask",
    "q_weight",  # EXL2
    "trellis",  # EXL3
    "Qidxs",  # QuIP#
)
_PACKED_ENDINGS = ("_packed", "_blocks", "_qweight")
_OF_INPUTS = (  # endings of the names of factors that smoothing has moved to a layer's inputs
    "pre_quant_scale",
    "act_pre_scale",
    "smooth_factor",
    "smooth_scale",
    "smoothing_scale",
)
_PAIR = "_packed_params._packed_params"
_FEW_BITS = re.compile(r"torch\.(?:u?int[1-7]|bits\d.*|float\d_e\d.*)$")


@dataclass(frozen=True)
class Unpacked:
    """The tensors of a layer after quantised weights have been computed from what is stored.

    Args:
        tensors: The tensors by name: those computed, in float32, in the place of the stored ones,
            and all that have nothing to do with quantisation. Where a format fixes it, a weight
            is (outputs, inputs) or (experts, outputs, inputs), whatever the layer's class holds.
        reasons: Why a stored tensor cannot be read, by its name in the file.
        parts: Names of stored tensors that are only parts of weights, such as scales.
        by_rows: Names among ``tensors`` whose format fixes that their outputs are rows.
        note: How the weights were computed, for the user; "" if none was.
    """

    tensors: dict[str, Tensor]
    reasons: dict[str, str] = field(default_factory=dict)
    parts: frozenset[str] = frozenset()
    by_rows: frozenset[str] = frozenset()
    note: str = ""


def unpacked(leaves: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None) -> Unpacked:
    """The tensors of a layer with its quantised weights dequantised.

    A weight is computed only where what is stored leaves no doubt of it. Otherwise there is a
    reason. Scales, zero points, groups and maxima beside a quantised weight are only its parts.
    On device meta the weights have the right shapes.

    ============================  =================================================================
    format                        what is read of it
    ============================  =================================================================
    FP8, MXFP8, int8              one scale, or one for each expert, row, group or block; zero points
    FP4, NVFP4, MXFP4             of ModelOpt, compressed-tensors, GPT-OSS (experts, outputs, inputs)
    GPTQ                          2, 3, 4 and 8 bits, both versions of zero points, any order
    AWQ                           4 bits, version "gemm"
    bitsandbytes                  4 bits (NF4, FP4, nested or not), 8 bits by rows
    compressed-tensors            packed integers of 1 to 8 bits, with or without zero points
    HQQ                           1, 2, 4 and 8 bits, if the file stores its settings
    quanto                        8 bits; 2 and 4 bits of a layer with a bias
    torchao                       8 bits, with scales for rows, groups or the whole
    MLX                           2 to 8 bits, if the model's settings tell how many
    ============================  =================================================================

    Args:
        leaves: What the layer stores, by its name within the layer.
        settings: ``quantization_config`` of the model's config.json; None if there is none.

    Returns:
        The tensors, and what has become of the stored ones.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(torch.float8_e4m3fn)
        >>> found = unpacked({"weight": weight, "weight_scale": torch.tensor([1.0, 10.0])})
        >>> found.tensors
        {'weight': tensor([[ 1.,  2.],
                [30., 40.]])}
        >>> found.note
        'dequantised from float8_e4m3fn, a scale for each row'
    """
    left = _usable(leaves)
    readings: dict[str, Reading] = {}  # by the stored tensor in whose place they are
    parts: set[str] = set()
    reasons: dict[str, str] = {}
    with torch.no_grad():
        for reader in READERS:
            for reading in list(reader(left, settings or {})):
                readings[reading.source] = reading
                parts |= reading.parts
                for leaf in (reading.source, *reading.parts):
                    left.pop(leaf, None)
        for leaf, x in list(left.items()):
            own = _of_own_kind(leaf, x)
            if own is not None:
                readings[leaf] = own
                del left[leaf]
    if readings:
        parts.update(leaf for leaf in left if leaf.endswith(_PARTS_OF_LAYERS))
    for leaf, x in left.items():
        ending = next((name for name in _NEVER_WEIGHTS if leaf.endswith(name)), None)
        if ending is None or leaf in parts or x.ndim < 2:
            continue
        weight = left.get(f"{leaf.removesuffix(ending)}weight")
        if weight is None:
            reasons[leaf] = "scales of quantised weights, which are not stored beside them"
        elif codes.may_scale(x, weight):
            reasons[leaf] = "scales of a weight that is not stored quantised"
    return _collected(leaves, readings, frozenset(parts), reasons)


def quantization_settings(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What the config.json of a model says of how its weights are quantised; None if nothing.

    Args:
        config: Its contents; None if there is none.

    Example:
        >>> quantization_settings({"model_type": "llama", "quantization_config": {"bits": 4}})
        {'bits': 4}
    """
    if not isinstance(config, Mapping):
        return None
    for source in (config, config.get("text_config")):
        if not isinstance(source, Mapping):
            continue
        for name in ("quantization_config", "compression_config", "quantization"):
            settings = source.get(name)
            if isinstance(settings, Mapping):
                return settings
    return None


def without_factors(leaf: str) -> str:
    """The note on a weight whose inputs have factors of their own.

    Args:
        leaf: Name of the stored factors.

    Example:
        >>> without_factors("pre_quant_scale")
        'read without the factors of its inputs (pre_quant_scale), which smoothing took out of it'
    """
    return f"read without the factors of its inputs ({leaf}), which smoothing took out of it"


def split_packed(name: str) -> tuple[str, str] | None:
    """The path of a layer and the name within it, for a part of a weight with dots in its name.

    Args:
        name: Name of a stored tensor.

    Returns:
        None if the name is not that of such a part.

    Example:
        >>> split_packed("a.fc.weight.quant_state.bitsandbytes__nf4")
        ('a.fc', 'weight.quant_state.bitsandbytes__nf4')
        >>> split_packed("a.fc.weight") is None
        True
    """
    found = _DOTTED.search(name)
    if found is None:
        return None
    return name[: found.start()], found[1]


def is_packed_pair(name: str, x: Any) -> bool:
    """Whether a value of a state dict is the weight and bias of one of torch's quantised Linears."""
    return name.endswith(_PAIR) and isinstance(x, tuple) and len(x) == 2


def with_quantised_linears(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with the weights and biases that torch's quantised Linears store as pairs.

    Args:
        state: What is stored, by name; pairs are under ``<layer>._packed_params._packed_params``.

    Returns:
        The same with ``<layer>.weight`` and ``<layer>.bias`` in the place of each pair.

    Example:
        >>> pair = (torch.eye(2), None)
        >>> list(with_quantised_linears({"fc._packed_params._packed_params": pair, "a": 1}))
        ['fc.weight', 'a']
    """
    found: dict[str, Any] = {}
    for name, x in state.items():
        if not is_packed_pair(str(name), x):
            found[name] = x
            continue
        path = str(name).removesuffix(_PAIR)
        for leaf, part in zip(("weight", "bias"), x, strict=True):
            if isinstance(part, Tensor):
                found[f"{path}{leaf}"] = part
    return found


def _usable(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a format may be made of: no parametrizations, and nothing sparse."""
    found = {}
    for leaf, x in leaves.items():
        if x.layout == torch.strided and not x.is_nested:
            found[leaf] = x
    return found


def _collected(
    leaves: Mapping[str, Tensor],
    readings: Mapping[str, Reading],
    parts: frozenset[str],
    reasons: dict[str, str],
) -> Unpacked:
    """What has become of the tensors of a layer, in their order."""
    tensors: dict[str, Tensor] = {}
    by_rows = set()
    notes = []
    for leaf, x in leaves.items():
        reading = readings.get(leaf)
        if reading is None:
            if leaf not in parts and leaf not in reasons:
                tensors.setdefault(leaf, x)
            continue
        if reading.weight is None:
            reasons[leaf] = reading.reason
            continue
        tensors[reading.name] = reading.weight
        if reading.by_rows:
            by_rows.add(reading.name)
        if reading.note and reading.note not in notes:
            notes.append(reading.note)
    for leaf in leaves:
        if leaf.endswith(_OF_INPUTS):
            notes.append(without_factors(leaf))
    return Unpacked(tensors, reasons, parts, frozenset(by_rows), "; ".join(notes))


def _of_own_kind(leaf: str, x: Tensor) -> Reading | None:
    """A tensor that knows its own values, or that only looks like a packed weight."""
    if x.is_quantized or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        if hasattr(x, "full_tensor"):  # shards
            return None
        kind = qualified(x)
        values = plain_values(nn.Module(), leaf, x)
        if values is None:
            return Reading(leaf, leaf, reason=f"{kind}: its values cannot be computed")
        if not x.is_quantized:
            return Reading(leaf, leaf, weight=values, note=f"dequantised from {kind}")
        return Reading(leaf, leaf, weight=values.float(), note=f"dequantised from {x.dtype}")
    if x.ndim < 2:
        return None
    if _FEW_BITS.match(str(x.dtype)):
        return Reading(leaf, leaf, reason=not_known(x))
    is_integer = not x.is_floating_point() and not x.is_complex()
    if is_integer and (leaf in _PACKED_NAMES or leaf.endswith(_PACKED_ENDINGS)):
        return Reading(leaf, leaf, reason=not_known(x))
    return None
