"""Weights that are not plain floating tensors: quantised, packed, sparse, complex, without data."""

from __future__ import annotations

import sys
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hsu._neurons import codes

_OUT = "measure the model before it is quantised, or leave this layer out with exclude"
_DENSE = "measured only when dense; use to_dense()"
_LAYOUTS = {torch._mkldnn: "packed"}  # type: ignore[attr-defined]
_SCALES = ("_scale_inv", "_scale")  # beside a weight of eight bits; both multiply it
_STATED = (("out_features", "in_features"), ("num_embeddings", "embedding_dim"))  # shapes
_INNER = ("original_weight_tensor",)  # of torchao, around a quantised tensor


def qualified(x: object) -> str:
    """The class of a tensor or module, with its module."""
    kind = type(x)
    return f"{kind.__module__}.{kind.__qualname__}"


def why_unreadable(module: nn.Module, name: str, x: Tensor) -> str | None:
    """Why a stored tensor cannot be read as plain neurons.

    Sharded and lazy parameters are handled elsewhere, and give no reason.

    Args:
        module: The module that holds it.
        name: Its name there.
        x: The tensor.

    Returns:
        The reason, for the user; None for an ordinary floating tensor that holds numbers.

    Example:
        >>> layer = nn.Linear(2, 2, dtype=torch.complex64)
        >>> why_unreadable(layer, "weight", layer.weight)
        'complex (torch.complex64): angles are measured between real neurons only'
    """
    try:
        return _why_unreadable(module, x)
    except Exception as error:
        return f"{qualified(x)}: it cannot be read ({error}); {_OUT}"


def plain_values(module: nn.Module, name: str, x: Tensor) -> Tensor | None:
    """The floating values, detached, that the forward pass uses for a stored tensor.

    Args:
        module: The module that holds it.
        name: Its name there.
        x: The tensor.

    Returns:
        The values; None if the tensor and its module do not hold all that is needed.

    Example:
        >>> layer = nn.Module()
        >>> layer.weight = torch.ones(2, 2).to(torch.float8_e4m3fn)
        >>> layer.weight_scale = torch.tensor([2.0, 3.0])
        >>> plain_values(layer, "weight", layer.weight)
        tensor([[2., 2.],
                [3., 3.]])
    """
    try:
        with torch.no_grad():
            values: object = _values(module, name, x)
            if isinstance(values, Tensor) and _is_plain(values) and _fits(module, name, values, x):
                return values.detach()
    except Exception:
        return None
    return None


def _why_unreadable(module: nn.Module, x: Any) -> str | None:
    if not isinstance(x, Tensor):
        return f"{qualified(x)} is no tensor"
    if nn.parameter.is_lazy(x) or hasattr(x, "full_tensor"):
        return None
    kind = qualified(x)
    if x.is_meta:
        return "it holds no numbers yet (device meta): load the weights first"
    if x.is_nested:
        return f"nested ({kind}): measured only as an ordinary tensor"
    if _is_wrapper(x):
        return f"{kind}: a tensor whose numbers lie in other tensors; {_OUT}"
    if x.layout != torch.strided:
        return f"{_LAYOUTS.get(x.layout, 'sparse')} ({x.layout}): {_DENSE}"
    if x.is_complex():
        return f"complex ({x.dtype}): angles are measured between real neurons only"
    if x.is_quantized or not x.is_floating_point():
        owner = kind
        if type(x) in (Tensor, nn.Parameter):
            owner = qualified(module)
        return f"{owner}: its weights are {x.dtype}, not floating-point; {_OUT}"
    if x.dtype.itemsize < 2:
        return f"{qualified(module)}: its weights are {x.dtype}, with scales beside them; {_OUT}"
    return None


def _is_plain(x: Tensor) -> bool:
    """Whether x is an ordinary floating tensor that holds numbers."""
    if x.is_meta or x.is_nested or _is_wrapper(x) or hasattr(x, "full_tensor"):
        return False
    if x.layout != torch.strided or x.is_quantized or not x.is_floating_point():
        return False
    return x.dtype.itemsize >= 2


def _is_wrapper(x: Tensor) -> bool:
    """Whether operations on x are done by its class, on tensors that it holds."""
    return type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _fits(module: nn.Module, name: str, values: Tensor, x: Tensor) -> bool:
    """Whether values have the shape of the tensor, or that which its module states if it is packed."""
    if values.shape == x.shape:
        return True
    if name != "weight" or type(x).__name__ != "Params4bit":
        return False
    for rows, columns in _STATED:
        stated = getattr(module, rows, None), getattr(module, columns, None)
        if tuple(values.shape) == stated:
            return True
    return False


def _values(module: nn.Module, name: str, x: Any) -> object:
    """The values of a stored tensor, if it is known how to compute them."""
    if not isinstance(x, Tensor) or nn.parameter.is_lazy(x) or hasattr(x, "full_tensor"):
        return None
    state: Any = getattr(x, "quant_state", None)
    if type(x).__name__ == "Params4bit" and state is not None:
        return _of_4_bits(x.data, state)
    if type(x).__name__ == "Int8Params" and not x.is_floating_point():
        return _of_8_bits(module, x)
    if x.is_meta or x.is_nested:
        return None
    if _is_wrapper(x):
        return _of_wrapper(module, name, x)
    if x.is_quantized:
        return x.dequantize()
    if x.layout != torch.strided or not x.is_floating_point():
        return None
    if x.dtype.itemsize < 2:
        return _scaled(module, name, x)
    return x


def _of_wrapper(module: nn.Module, name: str, x: Any) -> object:
    """The values of a tensor whose class computes them."""
    for inner in _INNER:
        part = getattr(x, inner, None)
        if isinstance(part, Tensor):
            return _values(module, name, part)
    if type(x).dequantize is not Tensor.dequantize:
        return x.dequantize()
    if hasattr(x, "get_original_weight"):
        return x.get_original_weight()
    return None


def _of_4_bits(codes: Tensor, state: Any) -> object:
    """The values of bitsandbytes' weights of four bits, by its own function.

    A forward pass on a CPU in evaluation mode may have rearranged them, and their scales.
    """
    functional: Any = sys.modules.get("bitsandbytes.functional")
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax
        state = copy(state)
        state.original_nested = False  # or the scales would be quantised again
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = scales.T.reshape(-1).float()
    return functional.dequantize_4bit(codes, state)


def _of_8_bits(module: Any, x: Any) -> Tensor | None:
    """The values of bitsandbytes' weights of eight bits: each row has the scale of its maximum."""
    codes = getattr(x, "CB", None)
    scales = getattr(x, "SCB", None)
    state = getattr(module, "state", None)
    if codes is None:
        codes = getattr(state, "CB", None)
    if codes is None:
        codes = x.data
    if scales is None:
        scales = getattr(state, "SCB", None)
    if scales is None or codes.ndim != 2:
        return None
    values: Tensor = codes.float() * scales.float().view(-1, 1) / 127
    return values


def _scaled(module: Any, name: str, x: Tensor) -> Tensor | None:
    """The values of a tensor of eight bits: times one scale, or one for each row or block."""
    scale = None
    for ending in _SCALES:
        if isinstance(getattr(module, name + ending, None), Tensor):
            scale = getattr(module, name + ending)
            break
    if scale is None and name == "weight":
        scale = getattr(module, "scale", None)
    if scale is None:
        return None if _has_other_scales(module) else x.float()
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        return None
    blocks = getattr(module, "block_size", None)
    if not isinstance(blocks, (tuple, list)):
        blocks = None
    values, _ = codes.scaled(x, scale.detach(), blocks=blocks)
    return values


def _has_other_scales(module: nn.Module) -> bool:
    """Whether a module holds scales under a name that is not known."""
    return any("scale" in name for name in (*module._parameters, *module._buffers))
