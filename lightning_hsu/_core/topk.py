"""The largest two cosines of every neuron with the others, from row panels of the upper triangle of the Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hsu._core.backend import active
from lightning_hsu._core.sums import product

NONE = float("-inf")
"""The cosine of no neuron."""

_PANEL = 192
_FOLD = 16  # so many entries are first reduced to their largest, which is ten times as fast as finding its place

_Found = tuple[Tensor, Tensor, Tensor]


def largest_two(x: Tensor, alive: Tensor, *, half_space: bool, every: bool) -> _Found:
    """Find the nearest neuron of every neuron, and how near the second nearest is, in n*n*d FLOP.

    Args:
        x: Unit rows, shape (b, n, d).
        alive: Those that take part, bool, shape (b, n).
        half_space: Compare absolute cosines.
        every: Compare every row with all others; else with those after it.

    Returns:
        The largest cosine of every row, its column, and the second largest cosine, (b, n) each; -inf where there is none.
    """
    backend = active()
    if backend.takes_rows(x):
        return backend.largest_two(x, alive, half_space=half_space, every=every)
    n, whole = x.shape[1], bool(alive.all())
    found = (
        torch.full_like(x[..., 0], NONE),
        torch.zeros_like(x[..., 0], dtype=torch.int64),
        torch.full_like(x[..., 0], NONE),
    )
    itself = torch.eye(_PANEL, dtype=torch.bool, device=x.device)
    past = torch.zeros_like(itself, dtype=x.dtype).masked_fill_(
        itself if every else ~(~itself).triu(), NONE
    )
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        rows, cols = slice(start, stop), slice(stop, n)
        cosine = product(x[:, rows], x[:, start:].mT)  # (b, k, n - start)
        if half_space:
            cosine.abs_()
        if not whole:
            cosine.masked_fill_(~(alive[:, rows, None] & alive[:, None, start:]), NONE)
        cosine[..., : stop - start] += past[: stop - start, : stop - start]
        _take_in(found, rows, _two(cosine, -1), start)
        if every and stop < n:
            _take_in(found, cols, _two(cosine[..., stop - start :], -2), start)
    return found


def _take_in(found: _Found, part: slice, new: _Found, start: int) -> None:
    """Put what a panel says of the rows ``part``, whose places count from ``start``, into what is known of all."""
    first, index, second = (kept[:, part] for kept in found)
    largest, at, runner_up = new
    second.copy_(torch.maximum(torch.minimum(first, largest), torch.maximum(second, runner_up)))
    index.copy_(torch.where(largest > first, at + start, index))
    first.copy_(torch.maximum(first, largest))


def _two(cosine: Tensor, dim: int) -> _Found:
    """The largest entry along a dimension, -1 or -2, its place, and the second largest."""
    if cosine.shape[dim] % _FOLD or cosine.shape[dim] == _FOLD:
        largest, at, second = _plain(cosine.clone(), dim)
        return largest.squeeze(dim), at.squeeze(dim), second.squeeze(dim)
    folded = torch.unflatten(cosine, dim, (_FOLD, -1))
    _, block, others = _plain(folded.amax(dim - 1), dim)
    inside = folded.gather(
        dim, block.unsqueeze(dim - 1).expand_as(folded.narrow(dim, 0, 1))
    ).squeeze(dim)
    largest, place, second = _plain(inside, dim)
    at = place * folded.shape[dim] + block
    return largest.squeeze(dim), at.squeeze(dim), torch.maximum(second, others).squeeze(dim)


def _plain(entries: Tensor, dim: int) -> _Found:
    """The same along a kept dimension; the entries are overwritten."""
    largest, at = entries.max(dim, keepdim=True)
    return largest, at, entries.scatter_(dim, at, NONE).amax(dim, keepdim=True)
