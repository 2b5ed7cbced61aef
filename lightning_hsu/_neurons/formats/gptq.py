"""GPTQ and AWQ: codes of few bits in words, with scales and zero points for groups of inputs."""

from __future__ import annotations

import math
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
    present,
    reading,
    stated,
)

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the eight columns lie


def gptq_or_awq(leaves: Leaves, settings: Settings) -> Iterator[Reading]:
    """``qweight`` with ``scales`` and ``qzeros``: which of the two it is, their shapes tell."""
    packed = leaves.get("qweight")
    if packed is None:
        return
    scales = leaves.get("scales")
    zeros = leaves.get("qzeros")
    parts = present(leaves, ("qzeros", "scales", "g_idx", "perm", "workspace"))
    if scales is None or scales.ndim != 2 or packed.ndim != 2:
        yield Reading("qweight", "weight", reason=not_known(packed), parts=frozenset(parts))
        return
    if zeros is not None and zeros.shape == (scales.shape[0], packed.shape[1]) != scales.shape:
        yield reading("qweight", "weight", parts, "AWQ", lambda: _awq(packed, zeros, scales))
        return
    order = leaves.get("g_idx")
    what = "GPTQ"
    if packed.shape[1] != scales.shape[1]:
        what = "GPTQ, AWQ or Marlin"
    yield reading(
        "qweight",
        "weight",
        parts,
        what,
        lambda: _gptq(packed, zeros, scales, order, settings),
    )


def _gptq(
    packed: Tensor, zeros: Tensor | None, scales: Tensor, order: Tensor | None, settings: Settings
) -> Computed:
    """The weight (out, in) of GPTQ: scale * (code - zero point), by groups of inputs.

    Args:
        packed: Codes along the inputs, (in * bits / 32, out).
        zeros: Zero points along the outputs, (groups, out * bits / 32).
        scales: Scales (groups, out).
        order: The group of each input, (in,).
        settings: The model's.
    """
    groups, outputs = scales.shape
    if "marlin" in str(settings.get("checkpoint_format")) or settings.get("is_marlin_format"):
        raise ValueError("it is rearranged for Marlin's kernels")
    if packed.shape[1] != outputs:
        raise ValueError(
            f"qweight {tuple(packed.shape)} beside scales {tuple(scales.shape)} is a layout that is "
            "not known, such as AWQ's for gemv, or Marlin's"
        )
    if order is not None and order.numel() == 0:
        order = None
    bits = _gptq_bits(packed, zeros, scales, order, settings)
    width = 8 * packed.element_size()
    inputs = packed.shape[0] * width // bits
    values = codes.integers(packed.T, bits)  # (out, in)
    if order is None:
        if inputs % groups:
            raise ValueError(f"{groups} groups of {inputs} inputs, without g_idx")
        length = inputs // groups
        order = torch.arange(inputs, device=packed.device) // length
        detail = f"{bits} bits, groups of {length}"
    else:
        values = values[:, : len(order)]
        order = order.to(packed.device)
        detail = f"{bits} bits, {groups} groups of inputs"
        if len(order) % groups == 0:
            detail = f"{bits} bits, groups of {len(order) // groups}"
    zero: Tensor | float = float(2 ** (bits - 1))
    if zeros is not None:
        first, version = _first_zero(zeros, bits, settings)
        points = codes.integers(zeros.to(packed.device), bits)[:, :outputs].to(torch.int16)
        points = (points + first) & (2**bits - 1)
        zero = points.float().index_select(0, order).T
        detail += version
    elif not stated(settings, "sym", "symmetric"):
        raise ValueError("its zero points (qzeros) are not stored")
    factors = scales.to(packed.device).float().index_select(0, order).T
    return (values.float() - zero) * factors, detail


def _gptq_bits(
    packed: Tensor, zeros: Tensor | None, scales: Tensor, order: Tensor | None, settings: Settings
) -> int:
    """How many bits a code has, as the shapes say, or else the settings."""
    width = 8 * packed.element_size()
    outputs = scales.shape[1]
    possible = []
    for bits in (2, 3, 4, 8):
        inputs = packed.shape[0] * width // bits
        fits = packed.shape[0] * width % bits == 0
        if order is not None:
            fits &= packed.shape[0] * width == len(order) * bits
        if zeros is not None:
            fits &= zeros.shape == (len(scales), math.ceil(outputs * bits / width))
        if order is None:
            fits &= inputs % len(scales) == 0
        if fits:
            possible.append(bits)
    said = stated(settings, "bits", "w_bit", "num_bits")
    if said in possible:
        return int(said)
    if len(possible) != 1:
        raise ValueError("its shapes do not tell how many bits a code has")
    return possible[0]


def _first_zero(zeros: Tensor, bits: int, settings: Settings) -> tuple[int, str]:
    """What is added to stored zero points, and what of that a user should know.

    The first version of the format stores them less one, the second one as they are. Symmetric
    weights have the middle of the codes as zero point, which tells the version.
    """
    version = str(settings.get("checkpoint_format") or "")
    if version:
        return int("v2" not in version), ""
    if not zeros.is_meta:
        points = codes.integers(zeros, bits)
        middle = 2 ** (bits - 1)
        if bool((points == middle - 1).all()):
            return 1, ""
        if bool((points == middle).all()):
            return 0, ""
    if settings:
        return 1, ""  # of those days when there was one version
    return 1, ", zero points as in the first version of the format"


def _awq(packed: Tensor, zeros: Tensor, scales: Tensor) -> Computed:
    """The weight (out, in) of AWQ's version gemm: codes and zero points lie along the outputs.

    Args:
        packed: Codes (in, out / 8).
        zeros: Zero points (groups, out / 8).
        scales: Scales (groups, out).
    """
    inputs = packed.shape[0]
    groups, outputs = scales.shape
    if packed.dtype != torch.int32 or packed.shape[1] * 8 != outputs:
        raise ValueError("only four bits in int32 are known")
    if inputs % groups:
        raise ValueError(f"{groups} groups of {inputs} inputs")
    length = inputs // groups
    points = _in_awq_order(zeros.to(packed.device)).repeat_interleave(length, dim=0)
    factors = scales.to(packed.device).float().repeat_interleave(length, dim=0)
    weight = (_in_awq_order(packed).float() - points) * factors
    return weight.T, f"4 bits, groups of {length}"


def _in_awq_order(packed: Tensor) -> Tensor:
    """The codes (n, out) of AWQ's words (n, out / 8)."""
    values = codes.integers(packed, 4).reshape(len(packed), -1, 8)
    places = torch.tensor(_AWQ_PLACES, device=packed.device)
    return values.index_select(-1, places).flatten(-2)
