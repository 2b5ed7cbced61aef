"""Weights of MLX: integers in words along the inputs, with a scale and a shift for each group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_hsu._neurons import codes
from lightning_hsu._neurons.formats.base import (
    Computed,
    Leaves,
    Reading,
    Settings,
    dtype_named,
    present,
    reading,
    stated,
)


def mlx(leaves: Leaves, settings: Settings) -> Iterator[Reading]:
    """``weight`` in words without a sign, with ``scales`` and ``biases``."""
    packed = leaves.get("weight")
    scales = leaves.get("scales")
    if packed is None or scales is None or packed.dtype != dtype_named("uint32"):
        return
    parts = present(leaves, ("scales", "biases"))
    shifts = leaves.get("biases")

    def compute() -> Computed:
        if shifts is None or shifts.shape != scales.shape:
            raise ValueError("only its mode affine is known, with scales and biases of one shape")
        bits = _bits(packed, scales, settings)
        values = codes.integers(packed.view(torch.int32), bits)
        lengths = codes.block_lengths(values.shape, scales.shape)
        factors = codes.spread(scales.to(values.device).float(), values.shape, lengths)
        added = codes.spread(shifts.to(values.device).float(), values.shape, lengths)
        return values.float() * factors + added, f"{bits} bits, groups of {lengths[-1]}"

    yield reading("weight", "weight", parts, "MLX", compute)


def _bits(packed: Tensor, scales: Tensor, settings: Settings) -> int:
    """How many bits a code has, which the shapes tell only together with the size of a group."""
    bits = stated(settings, "bits")
    length = stated(settings, "group_size")
    if not isinstance(bits, int) or not isinstance(length, int):
        raise ValueError("its config.json, which tells how many bits a code has, is not there")
    if packed.shape[-1] * 32 != scales.shape[-1] * length * bits:
        raise ValueError(f"its shapes are not those of {bits} bits in groups of {length}")
    return bits
