"""The largest two cosines of every neuron with the others, from row panels of the Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hsu._core.backend import LargestTwo, active
from lightning_hsu._core.parts import Done
from lightning_hsu._core.sums import product

NONE = float("-inf")
"""The cosine of no neuron."""

_PANEL = 192
_FOLD = 16
"""Entries first reduced to their maximum, which is ten times as fast as finding its place."""


def largest_two(
    x: Tensor,
    alive: Tensor,
    *,
    half_space: bool,
    every: bool,
    done: Done | None = None,
) -> LargestTwo:
    """Find the nearest neuron of every neuron, and how near the second nearest is, in n*n*d FLOP.

    Args:
        x: Unit rows, shape (b, n, d).
        alive: Rows that take part, bool, shape (b, n).
        half_space: Compare absolute cosines.
        every: Compare every row with all others; otherwise only with those after it.
        done: Called after each panel of rows with the fraction of the work that is done.

    Returns:
        The largest cosine of every row, its column, and the second largest cosine, (b, n) each;
        -inf if there is none.
    """
    backend = active()
    if backend.takes_rows(x):
        return backend.largest_two(x, alive, half_space=half_space, every=every)
    n = x.shape[1]
    all_alive = bool(alive.all())
    first = torch.full_like(x[..., 0], NONE)
    second = torch.full_like(x[..., 0], NONE)
    index = torch.zeros_like(x[..., 0], dtype=torch.int64)
    diagonal = torch.eye(_PANEL, dtype=torch.bool, device=x.device)
    left_out = diagonal
    if not every:
        left_out = ~(~diagonal).triu()
    blocked = torch.zeros_like(diagonal, dtype=x.dtype).masked_fill_(left_out, NONE)
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        height = stop - start
        cosine = product(x[:, start:stop], x[:, start:].mT)  # (b, k, n - start)
        if half_space:
            cosine.abs_()
        if not all_alive:
            pairs = alive[:, start:stop, None] & alive[:, None, start:]
            cosine.masked_fill_(~pairs, NONE)
        cosine[..., :height] += blocked[:height, :height]
        known = (first[:, start:stop], index[:, start:stop], second[:, start:stop])
        _update(known, _two_largest(cosine, -1), start)
        if every and stop < n:
            known = (first[:, stop:], index[:, stop:], second[:, stop:])
            _update(known, _two_largest(cosine[..., height:], -2), start)
        if done is not None:
            done(1.0 - ((n - stop) / n) ** 2)
    return first, index, second


def _update(known: LargestTwo, new: LargestTwo, start: int) -> None:
    """Update in place what is known about some rows; places in ``new`` count from ``start``."""
    first, index, second = known
    largest, at, runner_up = new
    second.copy_(torch.maximum(torch.minimum(first, largest), torch.maximum(second, runner_up)))
    index.copy_(torch.where(largest > first, at + start, index))
    first.copy_(torch.maximum(first, largest))


def _two_largest(cosine: Tensor, dim: int) -> LargestTwo:
    """The largest entry along a dimension, -1 or -2, its place, and the second largest."""
    if cosine.shape[dim] % _FOLD or cosine.shape[dim] == _FOLD:
        largest, at, second = _two_largest_kept(cosine.clone(), dim)
        return largest.squeeze(dim), at.squeeze(dim), second.squeeze(dim)
    folded = torch.unflatten(cosine, dim, (_FOLD, -1))
    _, block, others = _two_largest_kept(folded.amax(dim - 1), dim)
    places = block.unsqueeze(dim - 1).expand_as(folded.narrow(dim, 0, 1))
    inside = folded.gather(dim, places).squeeze(dim)
    largest, place, second = _two_largest_kept(inside, dim)
    at = place * folded.shape[dim] + block
    return largest.squeeze(dim), at.squeeze(dim), torch.maximum(second, others).squeeze(dim)


def _two_largest_kept(entries: Tensor, dim: int) -> LargestTwo:
    """The same with the dimension kept, without folding; the entries are overwritten."""
    largest, at = entries.max(dim, keepdim=True)
    second = entries.scatter_(dim, at, NONE).amax(dim, keepdim=True)
    return largest, at, second
