"""Near pairs and what depends on counts, on the device: the host asks nothing and waits for nothing.

Tiles in which :func:`~lightning_hsu._core.triton.pairs.pair_slopes` has held pairs back are marked.
Their pairs are redone from differences in float64. A tile of rows belongs to one program, which
takes its partners in a fixed order: there are no atomic additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_hsu._core.triton.pairs import (
    BELOW,
    BLOCK,
    BLOCKS,
    CONSTANT,
    D_PAD,
    ENERGIES,
    FACTOR,
    FIELDS,
    FIRST,
    FIRST_ENERGY,
    FIRST_NEAR,
    HELD,
    LAST,
    MARKS,
    N_PAD,
    NEARS,
    NUMBER,
    NUMBERS,
    PANEL_START,
    SQUARE,
    W_COL,
    W_ROW,
    D,
    N,
    W,
    X,
)

COINCIDENT = tl.constexpr(1e-14)
"""Squared chord below which float32 cannot tell two neurons apart."""

MOST = tl.constexpr(1e150)  # of a value or slope in float64
ROOM = tl.constexpr(8.5e37)  # a quarter of the largest number in float32


@triton.jit
def softened(q, p, number, KERNEL: tl.constexpr):
    """Value and slope at squared chords q and p = 4 - q; below the knee the tangent line's."""
    square = tl.load(number + SQUARE)
    curved = tl.maximum(q, square)
    value, slope = KERNEL(curved, tl.minimum(p, 4.0 - square), tl.load(number + NUMBER))
    value = tl.minimum(tl.maximum(value, -MOST), MOST)
    slope = tl.minimum(tl.maximum(slope, -MOST), MOST)
    return value + slope * (q - curved), slope


@triton.jit
def row_lengths(source, stride, d, inside, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """Lengths in float64 of rows (TILE,) of weights; 1 for those that are not inside."""
    square = tl.zeros((TILE, CHUNK), tl.float64)
    for start in range(0, d, CHUNK):
        k = start + tl.arange(0, CHUNK)
        wanted = inside[:, None] & (k < d)[None, :]
        w = tl.load(source[:, None] + (k * stride)[None, :], mask=wanted, other=0.0).to(tl.float64)
        square += w * w
    total = tl.sum(square, 1)
    return tl.sqrt(tl.where(total > 0.0, total, 1.0))


@triton.jit
def add_column(
    source,
    lengths,
    partner,
    stride,
    d,
    held,
    number,
    target,
    KERNEL: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add the pulls of one neuron on the rows that are held back from it.

    Returns:
        The energies (TILE,) of these pairs, and which of them coincide.
    """
    square = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, d, CHUNK):
        k = start + tl.arange(0, CHUNK)
        w = tl.load(partner + k * stride, mask=k < d, other=0.0).to(tl.float64)
        square += w * w
    length = tl.sqrt(tl.sum(square, 0))

    near = tl.zeros((TILE, CHUNK), tl.float64)
    far = tl.zeros((TILE, CHUNK), tl.float64)
    for start in range(0, d, CHUNK):
        k = start + tl.arange(0, CHUNK)
        wanted = held[:, None] & (k < d)[None, :]
        a = tl.load(source[:, None] + (k * stride)[None, :], mask=wanted, other=0.0)
        a = a.to(tl.float64) / lengths[:, None]
        b = tl.load(partner + k * stride, mask=k < d, other=0.0).to(tl.float64) / length
        near += (a - b[None, :]) * (a - b[None, :])
        far += (a + b[None, :]) * (a + b[None, :])
    q = tl.where(held, tl.sum(near, 1), 2.0)
    p = tl.where(held, tl.sum(far, 1), 2.0)

    value, slope = softened(q, p, number, KERNEL)
    coincide = q < COINCIDENT
    mirrored_slope = tl.zeros_like(slope)
    if HALF_SPACE:
        mirrored, mirrored_slope = softened(p, q, number, KERNEL)
        value += mirrored
        coincide = coincide | (p < COINCIDENT)

    for start in range(0, d, CHUNK):
        k = start + tl.arange(0, CHUNK)
        wanted = held[:, None] & (k < d)[None, :]
        a = tl.load(source[:, None] + (k * stride)[None, :], mask=wanted, other=0.0)
        a = a.to(tl.float64) / lengths[:, None]
        b = tl.load(partner + k * stride, mask=k < d, other=0.0).to(tl.float64) / length
        # Tangent: x - y has the part q / 2 along x, and x + y the part p / 2.
        pull = slope[:, None] * ((a - b[None, :]) - (0.5 * q)[:, None] * a)
        pull += mirrored_slope[:, None] * ((a + b[None, :]) - (0.5 * p)[:, None] * a)
        place = target[:, None] + k[None, :]
        total = tl.load(place, mask=wanted, other=0.0).to(tl.float64) - pull
        total = tl.minimum(tl.maximum(total, -ROOM), ROOM)
        tl.store(place, total.to(tl.float32), mask=wanted)
    tl.debug_barrier()  # the next column reads what this one has written
    return tl.where(held, value, 0.0), coincide.to(tl.int32)


@triton.jit
def near_pulls(
    groups,
    numbers,
    tiles,
    slopes,
    marks,
    pulls,
    near_energies,
    coincident,
    KERNEL: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add the pulls of near pairs to a tile of rows; return at once where no tile is marked."""
    program = tl.program_id(0)
    index = tl.load(tiles + 2 * program)
    group, number = groups + index * FIELDS, numbers + index * NUMBERS
    i = tl.load(tiles + 2 * program + 1)
    row = i * TILE + tl.arange(0, TILE)
    first, last = tl.load(group + FIRST).to(tl.int32), tl.load(group + LAST).to(tl.int32)
    n_pad, d = tl.load(group + N_PAD).to(tl.int32), tl.load(group + D).to(tl.int32)
    below = i * TILE >= last
    stop = tl.where(below, last, n_pad)
    own_marks = marks + tl.load(group + MARKS) + i * (n_pad // TILE)
    is_marked = tl.zeros((TILE,), tl.int32)
    for start in range(first // TILE, stop // TILE, TILE):
        at = start + tl.arange(0, TILE)
        is_marked = tl.maximum(is_marked, tl.load(own_marks + at, mask=at < stop // TILE, other=0))
    energy = tl.zeros((TILE,), tl.float64)
    coincide = tl.zeros((TILE,), tl.int32)
    if tl.max(is_marked, 0) > 0:
        top = tl.where(below, last, first)
        panel = slopes + tl.load(group + tl.where(below, BELOW, PANEL_START))
        left = panel + (row - top).to(tl.int64) * (stop - first)
        weights = tl.load(group + W).to(tl.pointer_type(DTYPE))
        source = weights + row * tl.load(group + W_ROW)
        stride = tl.load(group + W_COL)
        width = tl.load(group + D_PAD)
        target = pulls + tl.load(group + X) + row.to(tl.int64) * width
        lengths = row_lengths(source, stride, d, row < tl.load(group + N), TILE, CHUNK)
        place = tl.arange(0, TILE)
        for j in range(first // TILE, stop // TILE):
            if tl.load(own_marks + j) != 0:
                block = left + (j * TILE - first)
                is_held = tl.load(block[:, None] + place[None, :]) == HELD
                columns = tl.max(is_held.to(tl.int32), 0)
                col = tl.min(tl.where(columns != 0, place, TILE), 0)
                while col < TILE:
                    more, same = add_column(
                        source,
                        lengths,
                        weights + (j * TILE + col) * tl.load(group + W_ROW),
                        stride,
                        d,
                        tl.load(block + col) == HELD,
                        number,
                        target,
                        KERNEL,
                        HALF_SPACE,
                        TILE,
                        CHUNK,
                    )
                    energy += more
                    coincide = tl.maximum(coincide, same)
                    col = tl.min(tl.where((columns != 0) & (place > col), place, TILE), 0)
    tl.store(near_energies + program, 0.5 * tl.sum(energy, 0))  # each pair is met from both sides
    tl.store(coincident + program, tl.max(coincide, 0))


@triton.jit
def total(values, first, count, CHUNK: tl.constexpr):
    """The sum of some values in float64, in a fixed order."""
    found = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, count, CHUNK):
        at = start + tl.arange(0, CHUNK)
        found += tl.load(values + first + at, mask=at < count, other=0.0).to(tl.float64)
    return tl.sum(found, 0)


@triton.jit
def factors(
    groups,
    numbers,
    alive,
    energies,
    near_energies,
    HALF_SPACE: tl.constexpr,
    ENERGY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The factor from a group's sums of pulls to the gradient of the mean, or of its logarithm."""
    index = tl.program_id(0)
    group, number = groups + index * FIELDS, numbers + index * NUMBERS
    live = total(alive, tl.load(group + BLOCK), tl.load(group + BLOCKS).to(tl.int32), CHUNK)
    pairs = live * (live - 1.0)
    if HALF_SPACE:
        pairs = live * (2.0 * live - 1.0)
    factor = tl.where(live > 1.5, 2.0 / tl.where(live > 1.5, pairs, 1.0), 0.0)
    if ENERGY:
        energy = total(
            energies,
            tl.load(group + FIRST_ENERGY),
            tl.load(group + ENERGIES).to(tl.int32),
            CHUNK,
        )
        energy += total(
            near_energies,
            tl.load(group + FIRST_NEAR),
            tl.load(group + NEARS).to(tl.int32),
            CHUNK,
        )
        mean = (energy + live * tl.load(number + CONSTANT)) * factor
        factor = tl.where(mean > 0.0, factor / tl.where(mean > 0.0, mean, 1.0), factor)
    tl.store(number + FACTOR, -2.0 * factor)
