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
    return set(state) == {"draw"} and counts_calls(x, state["draw"])


def counts_calls(x: Tensor, part: Tensor) -> bool:
    """Tell whether a part of a state counts calls for the groups of neurons x (..., n, d)."""
    if part.dtype != torch.int64 or part.shape != (x.shape[:-2].numel(),):
        return False
    return bool(((part >= 0) & (part < _MOST)).all())


def draw_of(state: State | None) -> int:
    """Return the number of the draw that a state stands for."""
    return int(state["draw"][0]) if state else 0


def state_of_group(state: State | None, group: int) -> State | None:
    """Return the part of a state that belongs to one group."""
    if state is None:
        return None
    return {name: part[group : group + 1] for name, part in state.items()}
