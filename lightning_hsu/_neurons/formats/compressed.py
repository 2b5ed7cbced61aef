"""Integers of compressed-tensors, packed along the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_hsu._neurons import codes
from lightning_hsu._neurons.formats.base import (
    Computed,
    Leaves,
    Reading,
    Settings,
    not_known,
    present,
    reading,
    stated,
    stated_blocks,
)
from lightning_hsu._neurons.formats.floats import floats


def compressed(leaves: Leaves, settings: Settings) -> Iterator[Reading]:
    """``weight_packed`` and the like: integers in int32, or pairs of floats in bytes."""
    for leaf, packed in leaves.items():
        name = leaf.removesuffix("_packed")
        scale = leaves.get(f"{name}_scale")
        if name == leaf or packed.ndim < 2:
            continue
        endings = ("scale", "zero_point", "shape", "g_idx", "global_scale")
        parts = present(leaves, [f"{name}_{ending}" for ending in endings])
        if scale is None:
            yield Reading(leaf, name, reason=not_known(packed), parts=frozenset(parts))
        elif packed.dtype == torch.uint8:
            whole = leaves.get(f"{name}_global_scale")
            yield floats(leaf, name, parts, packed, scale, whole, divides=True)
        else:
            yield reading(
                leaf,
                name,
                parts,
                "compressed-tensors",
                _packed_integers(packed, scale, name, leaves, settings),
            )


def _packed_integers(
    packed: Tensor, scale: Tensor, name: str, leaves: Leaves, settings: Settings
) -> Callable[[], Computed]:
    """Compute a weight (.., out, in) of packed integers, whose zero is the middle of the codes."""

    def compute() -> Computed:
        shape_stored = leaves.get(f"{name}_shape")
        if shape_stored is None or shape_stored.is_meta:
            raise ValueError(f"{name}_shape is not stored")
        inputs = int(shape_stored.flatten()[-1].item())
        bits = _packed_bits(packed, inputs, stated(settings, "num_bits"))
        values = codes.integers(packed, bits)[..., :inputs].to(torch.int16) - 2 ** (bits - 1)
        zero = leaves.get(f"{name}_zero_point")
        if zero is not None and zero.dtype == torch.int32:
            rows = packed.shape[-2]
            points = codes.integers(zero.transpose(-1, -2), bits)[..., :rows]
            zero = points.transpose(-1, -2).to(torch.int16) - 2 ** (bits - 1)
        order = leaves.get(f"{name}_g_idx")
        if order is not None and order.numel() == inputs and not _is_unset(order):
            order = order.to(packed.device, torch.int32)
            factor = codes.as_float(scale).to(packed.device).index_select(-1, order)
            if zero is not None:
                values = values - zero.to(packed.device).index_select(-1, order)
            return values.float() * factor, f"{bits} bits, {scale.shape[-1]} groups of inputs"
        weight, detail = codes.scaled(values, scale, zero, stated_blocks(settings))
        return weight, f"{bits} bits, {detail}"

    return compute


def _is_unset(order: Tensor) -> bool:
    """Whether the groups of inputs are in their usual order, which is stored as -1."""
    return order.is_meta or bool((order < 0).any())


def _packed_bits(packed: Tensor, inputs: int, said: object) -> int:
    """How many bits the integers have that are packed along a row."""
    possible = []
    for bits in range(1, 9):
        if packed.shape[-1] == math.ceil(inputs * bits / (8 * packed.element_size())):
            possible.append(bits)
    if isinstance(said, int) and said in possible:
        return said
    if len(possible) != 1:
        raise ValueError("its shapes do not tell how many bits a code has")
    return possible[0]
