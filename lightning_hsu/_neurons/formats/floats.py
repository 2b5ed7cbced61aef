"""Floats of four bits, two in a byte: NVFP4 and MXFP4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_hsu._neurons import codes
from lightning_hsu._neurons.formats.base import (
    Computed,
    Leaves,
    Reading,
    Settings,
    dtype_named,
    first_present,
    present,
    reading,
)
from lightning_hsu._neurons.formats.scales import (
    is_scale_name,
    scale_names,
    without_scale,
)


def bytes_of_floats(leaves: Leaves, settings: Settings) -> Iterator[Reading]:
    """NVFP4 of ModelOpt: a weight in bytes, its scales, and one scale of these."""
    for leaf, x in leaves.items():
        if x.ndim < 2 or is_scale_name(leaf):
            continue
        if x.dtype != torch.uint8 and x.dtype != dtype_named("float4_e2m1fn_x2"):
            continue
        scale_name = first_present(leaves, scale_names(leaf))
        if scale_name is None:
            if x.dtype != torch.uint8:
                yield without_scale(leaf, leaf, leaves, codes.floats_of_4_bits(_bytes(x)), x)
            continue
        whole = leaves.get(f"{scale_name}_2")
        parts = present(leaves, (scale_name, f"{scale_name}_2", f"{leaf}_zero_point"))
        scale = leaves[scale_name]
        yield floats(leaf, leaf, parts, x, scale, whole, divides=False)


def floats(
    source: str,
    name: str,
    parts: Sequence[str],
    packed: Tensor,
    scale: Tensor,
    whole: Tensor | None,
    *,
    divides: bool,
) -> Reading:
    """A weight of floats of four bits, two in a byte, with scales for groups of inputs.

    Args:
        source: Name of the stored tensor.
        name: Name of the weight.
        parts: Names of its parts.
        packed: The bytes, (.., out, in / 2).
        scale: The scales (.., out, groups): FP8 for groups of 16, exponents for groups of 32.
        whole: The scale of the scales.
        divides: Whether that one divides them.
    """
    is_exponent = scale.dtype in (torch.uint8, dtype_named("float8_e8m0fnu"))
    is_stated = packed.dtype != torch.uint8  # that its bytes hold such floats
    what = "MXFP4" if is_exponent else "NVFP4"

    def compute() -> Computed:
        groups_of = 32 if is_exponent else 16
        is_known = (*scale.shape, groups_of) == (*packed.shape[:-1], scale.shape[-1], groups_of)
        is_known &= scale.shape[-1] * groups_of == 2 * packed.shape[-1]
        is_known &= is_exponent or scale.dtype == torch.float8_e4m3fn
        if not is_known and not is_stated:
            raise ValueError(
                f"bytes {tuple(packed.shape)} with scales {tuple(scale.shape)} of {scale.dtype} "
                "are of no known format"
            )
        if is_known and not is_exponent and whole is None:
            raise ValueError("the scale of its scales is not stored")
        weight, detail = codes.scaled(codes.floats_of_4_bits(_bytes(packed)), scale)
        if whole is not None:
            factor = codes.aligned(whole.float(), weight.shape).to(weight.device)
            weight = weight / factor if divides else weight * factor
        return weight, detail

    return reading(source, name, parts, what, compute)


def _bytes(x: Tensor) -> Tensor:
    """The bytes of a tensor whose elements are bytes."""
    return x.view(torch.uint8)


def blocks_of_floats(leaves: Leaves, settings: Settings) -> Iterator[Reading]:
    """MXFP4 of GPT-OSS: ``gate_up_proj_blocks`` (experts, out, groups, 16) in bytes.

    Its scales (experts, out, groups) are exponents. The outputs are the second axis, as they are
    before transformers transposes the experts.
    """
    for leaf, x in leaves.items():
        name = leaf.removesuffix("_blocks")
        scale = leaves.get(f"{name}_scales")
        if name == leaf or scale is None or x.dtype != torch.uint8 or x.ndim < 3:
            continue

        def compute(x: Tensor = x, scale: Tensor = scale) -> Computed:
            if scale.shape != x.shape[:-1] or scale.dtype != torch.uint8:
                raise ValueError(
                    f"blocks {tuple(x.shape)} beside scales {tuple(scale.shape)} of {scale.dtype}"
                )
            values = codes.floats_of_4_bits(x) * codes.powers(scale).to(x.device).unsqueeze(-1)
            return values.flatten(-2), f"groups of {2 * x.shape[-1]}"

        yield reading(leaf, name, [f"{name}_scales"], "MXFP4", compute)
