"""What every format of quantised weights needs: a reading, and what files and settings say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Leaves = Mapping[str, Tensor]
Settings = Mapping[str, Any]

OUT = "report the weights before they are quantised"


@dataclass(frozen=True, kw_only=True)
class _Defaults:
    weight: Tensor | None = None
    reason: str = ""
    note: str = ""
    parts: frozenset[str] = frozenset()
    by_rows: bool = False


@dataclass(frozen=True)
class Reading(_Defaults):
    """What has been read of one quantised weight.

    Args:
        source: Name of the stored tensor that holds its codes.
        name: Name of the weight.
        weight: The weight in float32, (outputs, inputs) or (experts, outputs, inputs) if
            ``by_rows``; None if it cannot be computed.
        reason: Why not.
        note: How it was computed.
        parts: The stored tensors that are only parts of it.
        by_rows: Whether the format fixes that its outputs are rows.
    """

    source: str
    name: str


Computed = tuple[Tensor, str]  # a weight, and what a user should know of it
Reader = Callable[[Leaves, Settings], Iterator[Reading]]


def not_known(x: Tensor) -> str:
    """The reason for a packed weight of no known format."""
    return f"packed or integer weights ({x.dtype}) whose scales are not known: {OUT}"


def reading(
    source: str,
    name: str,
    parts: Sequence[str],
    what: str,
    compute: Callable[[], Computed],
    *,
    by_rows: bool = True,
) -> Reading:
    """Compute a weight, or tell why that is not possible."""
    kept = frozenset(parts)
    try:
        weight, detail = compute()
    except Exception as error:
        reason = f"quantised ({what}), and cannot be read: {error or type(error).__name__}; {OUT}"
        return Reading(source, name, reason=reason, parts=kept)
    note = f"dequantised from {what}"
    if detail:
        note += f", {detail}"
    return Reading(source, name, weight=weight, note=note, parts=kept, by_rows=by_rows)


def present(leaves: Leaves, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in leaves]


def stated(settings: Settings, *names: str) -> Any:
    """The first of some settings that is there, of all layers or of compressed-tensors' groups.

    None if there is none, or groups of layers differ.
    """
    for name in names:
        if settings.get(name) is not None:
            return settings[name]
    found = []
    groups = settings.get("config_groups")
    if isinstance(groups, Mapping):
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            for name in names:
                if isinstance(weights, Mapping) and weights.get(name) is not None:
                    found.append(weights[name])
    if found and all(value == found[0] for value in found):
        return found[0]
    return None


def stated_blocks(settings: Settings) -> Sequence[int] | None:
    """The length of blocks along the two axes of a weight, if settings tell it."""
    blocks = stated(settings, "weight_block_size", "block_structure")
    if isinstance(blocks, str):
        blocks = [int(part) for part in blocks.split("x")]
    if isinstance(blocks, (list, tuple)) and len(blocks) == 2:
        return list(blocks)
    return None


def number(x: Tensor | None) -> int | None:
    """A number that is stored as a tensor."""
    if x is None or x.numel() != 1 or x.is_meta:
        return None
    return int(x.item())


def dtype_named(name: str) -> torch.dtype | None:
    """A data type that not every torch has."""
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def first_present(leaves: Leaves, names: Sequence[str]) -> str | None:
    for name in names:
        if name in leaves:
            return name
    return None
