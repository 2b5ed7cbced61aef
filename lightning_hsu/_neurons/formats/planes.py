"""HQQ and quanto, which keep the codes of far apart rows in one byte."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lightning_hsu._neurons.formats.base import (
    Computed,
    Leaves,
    Reading,
    Settings,
    number,
    present,
    reading,
)

_HQQ_PARTS = (
    "nbits",
    "group_size",
    "shape",
    "scale",
    "zero",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
    "zero_scale",
    "meta",
)


def hqq(leaves: Leaves, settings: Settings) -> Iterator[Reading]:
    if "W_q" in leaves:
        parts = present(leaves, _HQQ_PARTS)
        yield reading("W_q", "weight", parts, "HQQ", lambda: _of_hqq(leaves))


def _of_hqq(leaves: Leaves) -> Computed:
    """The weight of HQQ: (code - zero) * scale by groups, whose codes lie in planes of a word."""
    bits = number(leaves.get("nbits"))
    shape_stored = leaves.get("shape")
    scale = leaves.get("scale")
    zero = leaves.get("zero")
    if bits is None or shape_stored is None or shape_stored.is_meta:
        raise ValueError("its settings (nbits, shape) are not stored as tensors")
    if scale is None or zero is None or not scale.is_floating_point():
        raise ValueError("its scales and zeros are not stored as they are")
    if not zero.is_floating_point():
        raise ValueError("its zeros are quantised")
    packed = leaves["W_q"]
    if packed.is_floating_point():  # view_as_float
        packed = packed.contiguous().view(torch.int32 if bits == 3 else torch.uint8)
    shape = [int(size) for size in shape_stored.tolist()]
    top = 30 if packed.dtype == torch.int32 else 8
    planes = []
    for shift in range(top - bits, -1, -bits):
        planes.append((packed >> shift) & (2**bits - 1))
    values = torch.cat(planes)  # (groups, group size) or its transpose
    rows = math.prod(shape) // values.shape[1]
    values = values[:rows].float()
    if scale.ndim != 2 or scale.shape != zero.shape:
        raise ValueError(f"its scales are {tuple(scale.shape)}")
    values = (values - zero.to(values.device).float()) * scale.to(values.device).float()
    return values.reshape(shape), f"{bits} bits"


def quanto(leaves: Leaves, settings: Settings) -> Iterator[Reading]:
    """Two or four bits of quanto; its eight bits are read as those of others."""
    packed = leaves.get("weight._data._data")
    scale = leaves.get("weight._scale")
    if packed is None:
        return
    parts = present(leaves, ("weight._scale", "weight._shift"))
    shift = leaves.get("weight._shift")
    bias = leaves.get("bias")

    def compute() -> Computed:
        if scale is None or shift is None or scale.shape != shift.shape:
            raise ValueError("its scales and shifts are not both stored")
        if scale.ndim != 2 or scale.shape[1] != 1 or packed.ndim != 2:
            raise ValueError("only groups along the rows are known")
        if bias is None:
            raise ValueError("its shape is not stored, and it has no bias that tells its outputs")
        groups = len(scale)
        possible = [bits for bits in (2, 4) if len(packed) == math.ceil(groups * bits / 8)]
        if len(possible) != 1 or groups % len(bias):
            raise ValueError("its shapes do not tell how many bits a code has")
        bits = possible[0]
        planes = []
        for offset in range(0, 8, bits):
            planes.append((packed >> offset) & (2**bits - 1))
        values = torch.cat(planes)[:groups].float()
        factors = scale.to(values.device).float()
        shifts = shift.to(values.device).float()
        if shift.is_floating_point():
            values = values * factors - shifts
        else:
            values = (values - shifts) * factors
        return values.reshape(len(bias), -1), f"{bits} bits, groups of {packed.shape[1]}"

    yield reading("weight._data._data", "weight", parts, "quanto", compute)
