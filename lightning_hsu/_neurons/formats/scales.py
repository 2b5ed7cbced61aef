"""The names of the scales beside a weight of few bits."""

from __future__ import annotations

from torch import Tensor

from lightning_hsu._neurons.formats.base import (
    OUT,
    Leaves,
    Reading,
)

_OF_ACTIVATIONS = ("input", "output", "act", "k_", "v_", "q_", "scale_input", "pre_quant")


def names_around(leaf: str) -> tuple[str, list[str]]:
    """The name of a weight, and those that its scales may have."""
    for ending in ("._data", ":_data", ":qdata", "_qdata"):
        name = leaf.removesuffix(ending)
        if name == leaf:
            continue
        mark = ending[0]
        return name.removeprefix("_"), [f"{name}{mark}_scale", f"{name}{mark}scale"]
    return leaf, scale_names(leaf)


def scale_names(leaf: str) -> list[str]:
    """The names that the scales of a weight may have."""
    names = []
    for middle in ("", "_weight"):
        for ending in ("_scale_inv", "_scale", "_scales"):
            names.append(f"{leaf}{middle}{ending}")
    if leaf == "weight":
        names.remove("weight_scales")  # of EETQ, whose weights are rearranged
        names += ["scale", "scale_inv", "scale_weight"]
    return names


def is_scale_name(leaf: str) -> bool:
    return leaf.endswith(("_scale", "_scale_inv", "_scales", "_scale_2", "zero_point"))


def without_scale(leaf: str, name: str, leaves: Leaves, values: Tensor, x: Tensor) -> Reading:
    """A weight of few bits without scales of a known name: as it is, if it has none at all."""
    for other in leaves:
        of_activations = other.startswith(_OF_ACTIVATIONS)
        if "scale" in other and not of_activations and not _belongs(other, leaves):
            reason = f"quantised ({x.dtype}), with scales under an unknown name ({other}); {OUT}"
            return Reading(leaf, name, reason=reason, parts=frozenset({other}))
    note = f"read as it is stored, in {str(x.dtype).removeprefix('torch.')}, without a scale"
    return Reading(leaf, name, weight=values, note=note)


def _belongs(scale_name: str, leaves: Leaves) -> bool:
    """Whether a scale is that of another weight."""
    return any(scale_name in scale_names(leaf) for leaf in leaves)
