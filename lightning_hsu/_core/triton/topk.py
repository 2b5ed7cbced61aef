"""The largest two cosines of every neuron, in one launch for a stack of groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_hsu._core.triton.machine import exact_precision

TILES = {"TILE": 64, "DEPTH": 16}
WARPS = 4


@triton.jit
def largest_two(
    x,
    living,
    first,
    columns,
    second,
    n,
    d,
    HALF_SPACE: tl.constexpr,
    EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Largest cosine of a tile of rows, its column, and the second largest.

    Each row is compared with all other columns if EVERY, otherwise only with later ones.
    """
    tiles = tl.cdiv(n, TILE)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    top = tl.program_id(0) % tiles * TILE
    row = top + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    base = x + group * n * d
    living = living + group * n
    left = base + (row.to(tl.int64) * d)[:, None] + depth[None, :]
    lives = tl.load(living + row, mask=row < n, other=0) != 0
    best = tl.full((TILE,), float("-inf"), tl.float32)
    next_best = tl.full((TILE,), float("-inf"), tl.float32)
    place = tl.zeros((TILE,), tl.int32)

    start = 0 if EVERY else top
    for left_col in range(start, n, TILE):
        col = left_col + tl.arange(0, TILE)
        right = base + (col.to(tl.int64) * d)[None, :] + depth[:, None]
        cosine = tl.zeros((TILE, TILE), tl.float32)
        for k in range(0, d, DEPTH):
            a = tl.load(left + k, mask=(row < n)[:, None] & (depth < d - k)[None, :], other=0.0)
            b = tl.load(right + k, mask=(col < n)[None, :] & (depth < d - k)[:, None], other=0.0)
            cosine = tl.dot(a, b, cosine, input_precision=PRECISION)
        if HALF_SPACE:
            cosine = tl.abs(cosine)
        other = col[None, :] > row[:, None]
        if EVERY:
            other = col[None, :] != row[:, None]
        there = tl.load(living + col, mask=col < n, other=0) != 0
        cosine = tl.where(other & lives[:, None] & there[None, :], cosine, float("-inf"))
        largest, at = tl.max(cosine, 1, return_indices=True)
        runner_up = tl.max(
            tl.where(tl.arange(0, TILE)[None, :] == at[:, None], float("-inf"), cosine), 1
        )
        next_best = tl.maximum(tl.minimum(best, largest), tl.maximum(next_best, runner_up))
        place = tl.where(largest > best, left_col + at, place)
        best = tl.maximum(best, largest)

    at = group * n + row
    tl.store(first + at, best, mask=row < n)
    tl.store(second + at, next_best, mask=row < n)
    tl.store(columns + at, place, mask=row < n)


def scan(
    x: Tensor, alive: Tensor, *, half_space: bool, every: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the largest two cosines of every row, in one launch.

    Args:
        x: Unit rows, shape (b, n, d), float32.
        alive: Rows that take part, bool, shape (b, n).
        half_space: Compare absolute cosines.
        every: Compare every row with all others, 2 n n d FLOP; otherwise with later ones, n n d.

    Returns:
        The largest cosine of every row, its column, and the second largest cosine, (b, n) each.
    """
    b, n, d = x.shape
    first, second = x.new_empty(2, b, n)
    columns = torch.empty(b, n, dtype=torch.int32, device=x.device)
    grid = (triton.cdiv(n, TILES["TILE"]) * b,)
    with torch.cuda.device_of(x):
        largest_two[grid](
            x.contiguous(),
            alive.contiguous(),
            first,
            columns,
            second,
            n,
            d,
            HALF_SPACE=half_space,
            EVERY=every,
            PRECISION=exact_precision(),
            num_warps=WARPS,
            **TILES,
        )
    return first, columns.long(), second
