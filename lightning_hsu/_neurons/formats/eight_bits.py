"""One code in a byte: FP8 and int8 with scales beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_hsu._neurons import codes
from lightning_hsu._neurons.formats.base import (
    OUT,
    Computed,
    Leaves,
    Reading,
    Settings,
    dtype_named,
    first_present,
    present,
    reading,
    stated,
    stated_blocks,
)
from lightning_hsu._neurons.formats.scales import (
    is_scale_name,
    names_around,
    without_scale,
)

_SCALE_ENDING = re.compile(r"scale(_inv|s)?$")


def bytes_with_scales(leaves: Leaves, settings: Settings) -> Iterator[Reading]:
    """FP8 and int8 with scales beside them, under the names of several libraries."""
    for leaf, x in leaves.items():
        is_float = x.is_floating_point() and x.dtype.itemsize == 1
        if x.ndim < 2 or is_scale_name(leaf) or not (is_float or x.dtype == torch.int8):
            continue
        if x.dtype == dtype_named("float4_e2m1fn_x2"):
            continue
        name, scale_names = names_around(leaf)
        what = str(x.dtype).removeprefix("torch.")
        scale_name = first_present(leaves, scale_names)
        if scale_name is None:
            if is_float:
                yield without_scale(leaf, name, leaves, x.float(), x)
            elif "weight_scales" in leaves and leaf == "weight":
                reason = f"quantised ({what}), and rearranged for the kernels of EETQ; {OUT}"
                yield Reading(leaf, name, reason=reason, parts=frozenset({"weight_scales"}))
            continue
        zero_names = []
        for ending in ("zero_point", "zeropoint", "zero_points"):
            if _SCALE_ENDING.search(scale_name):
                zero_names.append(_SCALE_ENDING.sub(ending, scale_name))
        zero_name = first_present(leaves, zero_names)
        parts = present(leaves, (scale_name, zero_name or "", f"{leaf}_shape"))
        scale = leaves[scale_name]
        zero = leaves[zero_name] if zero_name else None

        def compute(x: Tensor = x, scale: Tensor = scale, zero: Tensor | None = zero) -> Computed:
            bits = stated(settings, "num_bits", "bits")
            if x.dtype == torch.int8 and bits not in (None, 8):
                raise ValueError(f"its codes of {bits} bits may be packed")
            if x.dtype == torch.int8 and scale.dtype.itemsize < 2:
                raise ValueError(f"with scales of {scale.dtype} its bytes may be pairs of codes")
            if not scale.is_floating_point() and scale.dtype != torch.uint8:
                raise ValueError(f"its scales are {scale.dtype}")
            return codes.scaled(x, scale, zero, stated_blocks(settings))

        yield reading(leaf, name, parts, what, compute, by_rows=False)
