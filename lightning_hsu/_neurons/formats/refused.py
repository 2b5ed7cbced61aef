"""Formats that are known, and known not to be readable."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_hsu._neurons.formats.base import (
    OUT,
    Leaves,
    Reading,
    Settings,
    present,
)

_REFUSED = {  # a tensor and one beside it: the format, its other parts, and why
    ("codes", "codebooks"): ("AQLM", ("codebooks", "scales"), "it is a sum of entries of tables"),
    ("q_weight", "q_groups"): (
        "EXL2",
        ("q_scale", "q_scale_max", "q_groups", "q_perm", "q_invperm", "q_group_map"),
        "its rows have different numbers of bits",
    ),
    ("trellis", "suh"): ("EXL3", ("suh", "svh", "mcg", "mul1"), "it is coded along a trellis"),
    ("Qidxs", "SU"): ("QuIP#", ("SU", "SV", "Wscale", "codebook_id"), "it is in rotated bases"),
    ("compressed", "bitmask"): (
        "compressed-tensors, sparse",
        ("bitmask", "row_offsets", "shape"),
        "only its values other than zero are stored, with a mask of their places",
    ),
    ("weight.compressed", "weight.bitmask"): (
        "compressed-tensors, sparse",
        ("weight.bitmask", "weight.row_offsets", "weight.shape", "weight_scale"),
        "only its values other than zero are stored, with a mask of their places",
    ),
}


def refused(leaves: Leaves, settings: Settings) -> Iterator[Reading]:
    for (leaf, beside), (what, parts, why) in _REFUSED.items():
        if leaf in leaves and beside in leaves:
            reason = f"quantised ({what}), and not read: {why}; {OUT}"
            kept = frozenset(present(leaves, parts))
            yield Reading(leaf, "weight", reason=reason, parts=kept)
