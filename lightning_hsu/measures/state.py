"""What a measure carries from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]
"""Tensors by name; the first dimension of each counts the groups."""

_MOST = 2**53  # calls: more than any training has, and every seed made from it is one


def next_draw(x: Tensor, state: State | None) -> State:
    """Count the draws of a random measure of neurons x (..., n, d), one number for each group."""
    if state is not None and counts_draws(x, state):
        return {"draw": state["draw"] + 1}
    return {"draw": torch.zeros(x.shape[:-2].numel(), dtype=torch.int64)}


def counts_draws(x: Tensor, state: State) -> bool:
    """Tell whether a state counts draws for the groups of neurons x (..., n, d)."""
    return holds_draws(x, state) and counts_calls(x, state["draw"])


def holds_draws(x: Tensor, state: State) -> bool:
    """Tell the same by the sizes alone, whatever the counts are."""
    return set(state) == {"draw"} and _is_for_groups(x, state["draw"])


def counts_calls(x: Tensor, part: Tensor) -> bool:
    """Tell whether a part of a state counts calls for the groups of neurons x (..., n, d)."""
    return _is_for_groups(x, part) and bool(((part >= 0) & (part < _MOST)).all())


def _is_for_groups(x: Tensor, part: Tensor) -> bool:
    return part.dtype == torch.int64 and part.shape == (x.shape[:-2].numel(),)


def draw_of(state: State | None) -> int:
    """Return the number of the draw that a state stands for."""
    return int(state["draw"][0]) if state else 0


def is_random(state: State | None) -> bool:
    """Tell whether a gradient under this state comes from a random draw, of which there are more."""
    return state is not None and "draw" in state


def state_of_group(state: State | None, group: int) -> State | None:
    """Return the part of a state that belongs to one group."""
    if state is None:
        return None
    return {name: part[group : group + 1] for name, part in state.items()}
