"""Weights of bitsandbytes: four bits by a table, and eight bits by rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_hsu._neurons import codes
from lightning_hsu._neurons.formats.base import (
    Computed,
    Leaves,
    Reading,
    Settings,
    not_known,
    number,
    present,
    reading,
)

_BNB_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)$")


def bitsandbytes(leaves: Leaves, settings: Settings) -> Iterator[Reading]:
    for leaf, state in leaves.items():
        found = _BNB_STATE.match(leaf)
        if found is None or found[1] not in leaves:
            continue
        name = found[1]
        parts = [other for other in leaves if other.startswith(f"{name}.")]
        yield reading(
            name,
            name,
            parts,
            f"{found[2].upper()} of bitsandbytes",
            lambda name=name, state=state: _of_4_bits(name, state, leaves),  # type: ignore[misc]
        )
    for leaf, x in leaves.items():
        if f"{leaf}.absmax" in leaves and not any(_BNB_STATE.match(one) for one in leaves):
            parts = [other for other in leaves if other.startswith(f"{leaf}.")]
            yield Reading(leaf, leaf, reason=not_known(x), parts=frozenset(parts))
    weight = leaves.get("weight")
    scales = leaves.get("SCB")
    if weight is not None and scales is not None and weight.dtype == torch.int8:
        parts = present(leaves, ("SCB", "weight_format"))
        format_number = number(leaves.get("weight_format"))

        def compute() -> Computed:
            if format_number not in (None, 0):
                raise ValueError("it is rearranged for the GPU that it was on")
            weight_of_rows, _ = codes.scaled(weight, scales.float() / 127)
            return weight_of_rows, ""

        yield reading("weight", "weight", parts, "int8 of bitsandbytes", compute)


def _of_4_bits(name: str, state: Tensor, leaves: Leaves) -> Computed:
    """The values of bitsandbytes' weights of four bits: entries of a table, times a block's maximum.

    The maxima may be stored as entries of another table, times maxima of their own, plus a mean.
    """
    said = json.loads(bytes(state.flatten().tolist()))
    shape = [int(size) for size in said["shape"]]
    count = math.prod(shape)
    stored = leaves[name].contiguous().flatten().view(torch.uint8)
    values = codes.looked_up(leaves[f"{name}.quant_map"], codes.nibbles(stored, high_first=True))
    largest = leaves[f"{name}.absmax"].flatten()
    nested = leaves.get(f"{name}.nested_absmax")
    if nested is not None:
        table = leaves[f"{name}.nested_quant_map"]
        above = nested.float().repeat_interleave(int(said["nested_blocksize"]))
        largest = codes.looked_up(table, largest).float() * above[: len(largest)]
        largest = largest + float(said["nested_offset"])
    elif not largest.is_floating_point():
        raise ValueError("the maxima of its maxima are not stored")
    length = int(said["blocksize"])
    factors = largest.to(values.device).float().repeat_interleave(length)
    values = values[:count].float() * factors[:count]
    return values.view(shape), f"blocks of {length} values"
