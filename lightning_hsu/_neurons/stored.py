"""Computes the weights that a layer's forward pass uses from the tensors that it stores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_hsu._core import working_dtype

_UNKNOWN = "computed by a parametrization that is not stored with it: report the model itself"


def effective_weights(leaves: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a layer as its forward pass uses them.

    Weight norm and pruning are computed from their parts. The weight of a spectral norm is known
    up to a factor.

    Args:
        leaves: What the layer stores, by name.

    Returns:
        Effective tensors by name, and the reason for each stored tensor whose use is not known.
    """
    effective: dict[str, Tensor] = {}
    unknown: dict[str, str] = {}
    for leaf in leaves:
        if leaf.startswith("parametrizations."):
            name, x = _parametrized(leaf, leaves)
        else:
            name, x = _hooked(leaf, leaves)
        if x is not None:
            effective[name] = x
        elif name:
            unknown[leaf] = _UNKNOWN
    return effective, unknown


def _parametrized(leaf: str, leaves: Mapping[str, Tensor]) -> tuple[str, Tensor | None]:
    """The weight that a stored parametrization computes.

    Returns:
        Its name and the weight. The name is "" for a tensor that is only a part of a weight, and
        the weight is None if it is not known.
    """
    above, _, part = leaf.rpartition(".")  # parametrizations.weight, original1
    name = above.partition(".")[2]
    prefix = f"{above}."
    beside = set()
    for other in leaves:
        if other.startswith(prefix) and other != leaf:
            beside.add(other.removeprefix(prefix))

    norms = leaves.get(f"{above}.original0")
    directions = leaves.get(f"{above}.original1")
    is_half = part in ("original0", "original1") and len(beside) == 1
    if is_half and norms is not None and directions is not None and _are_norms(norms, directions):
        if part == "original0":
            return "", None
        return name, _with_norms(directions, norms)
    if part == "original" and beside == {"0._u", "0._v"}:  # spectral norm
        return name or leaf, leaves[leaf]
    return name or leaf, None


def _hooked(leaf: str, leaves: Mapping[str, Tensor]) -> tuple[str, Tensor | None]:
    """The weight that an older hook computes, by pruning or weight norm; any other tensor itself.

    Returns:
        As :func:`_parametrized`.
    """
    name, _, mark = leaf.rpartition("_")
    x = leaves[leaf]
    if name in leaves:
        return leaf, x
    unpruned = leaves.get(f"{name}_orig")
    mask = leaves.get(f"{name}_mask")
    directions = leaves.get(f"{name}_v")
    norms = leaves.get(f"{name}_g")

    if mark == "orig" and mask is None:
        return name, x
    if mark == "orig" and mask is not None and mask.shape == x.shape:
        return name, x * mask
    if mark == "mask" and unpruned is not None and unpruned.shape == x.shape:
        return "", None
    if mark == "v" and norms is not None and _are_norms(norms, x):
        return name, _with_norms(x, norms)
    if mark == "g" and directions is not None and _are_norms(x, directions):
        return "", None
    return leaf, x


def _are_norms(norms: Tensor, x: Tensor) -> bool:
    """Whether a tensor may hold the norms of weight norm: one for all of x, or one axis of them."""
    if not x.is_floating_point() or x.ndim < 2:
        return False
    if len(_long_axes(x)) < 2:
        return False  # a vector
    if norms.numel() == 1:
        return True
    if norms.ndim != x.ndim:
        return False
    along = _long_axes(norms)
    return len(along) == 1 and norms.shape[along[0]] == x.shape[along[0]]


def _long_axes(x: Tensor) -> list[int]:
    """The axes of x that are not of length 1."""
    return [i for i, size in enumerate(x.shape) if size != 1]


def _with_norms(x: Tensor, norms: Tensor) -> Tensor:
    """Weight norm: x with the norms (.., 1, ..) over the axes where these have length 1."""
    axes = [i for i, size in enumerate(norms.shape) if size == 1]
    x = x.to(working_dtype(x.dtype))
    length = torch.linalg.vector_norm(x, dim=axes or None, keepdim=True)  # a single norm: all axes
    tiny = torch.finfo(length.dtype).tiny
    weight: Tensor = x * (norms.to(x.dtype) / length.clamp_min(tiny))
    return weight
