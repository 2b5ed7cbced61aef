"""Gradients of many layers in a few launches: unit rows, slopes of pairs, products, additions.

What is done about near pairs between products and additions is in ``nearby``.

A program looks up its layer and tile in tables, so that one launch serves layers of any shapes.
Rows and columns are padded with zeros to whole tiles, so that no load or product needs a mask.
There are no atomic additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the table of groups, one int64 row for each; ``launch`` fills them in this order.
W = tl.constexpr(0)  # address of the weights, and strides
W_ROW = tl.constexpr(1)
W_COL = tl.constexpr(2)
OUT = tl.constexpr(3)  # address of the tensor to add to, and strides
OUT_ROW = tl.constexpr(4)
OUT_COL = tl.constexpr(5)
N = tl.constexpr(6)  # neurons, and padded
N_PAD = tl.constexpr(7)
D = tl.constexpr(8)  # dimension, and padded
D_PAD = tl.constexpr(9)
ROW = tl.constexpr(10)  # first row among those of all groups
X = tl.constexpr(11)  # first entry among the unit rows of all groups
FIRST = tl.constexpr(12)  # the panel of rows: [first, last), columns from first on
LAST = tl.constexpr(13)
PANEL_START = tl.constexpr(
    14
)  # first entry of the panel among the slopes; rows are N_PAD - first long
BELOW = tl.constexpr(15)  # first entry of its mirror image from row last on; rows last - first long
LIMIT_AT = tl.constexpr(16)  # address of a limit on the device, float64; 0 if it is in the numbers
MARKS = tl.constexpr(17)  # first of the marks of its pairs of tiles, one after the other by rows
BLOCK = tl.constexpr(18)  # first of its blocks of rows, and how many
BLOCKS = tl.constexpr(19)
FIRST_ENERGY = tl.constexpr(20)  # first of its tiles' energies in all rounds, and how many
ENERGIES = tl.constexpr(21)
FIRST_NEAR = tl.constexpr(22)  # first of the energies of its near pairs, and how many
NEARS = tl.constexpr(23)
FIELDS = tl.constexpr(24)

STEP = tl.constexpr(16)
"""What divides N_PAD, D_PAD and the columns from X to BELOW, as all of them count whole tiles.

The compiler is told so: then it loads 16 bytes at once.
"""

# Columns of the table of numbers, one float64 row for each group; ``launch`` fills them likewise.
FACTOR = tl.constexpr(0)  # from sums of pulls to the gradient of the mean: ``factors`` fills it
SCALE = tl.constexpr(1)
LIMIT = tl.constexpr(2)
GRAD_SCALE = tl.constexpr(3)
BOUND = tl.constexpr(4)
SQUARE = tl.constexpr(5)  # the kernel's knee, squared
NUMBER = tl.constexpr(6)  # and its parameter
CONSTANT = tl.constexpr(7)  # the energy of a neuron with its own mirror image
NUMBERS = tl.constexpr(8)

LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
TINY = tl.constexpr(1.1754943508222875e-38)
HELD = tl.constexpr(2.0**-125)
"""Marks a pair among the slopes that is held back because it is too near.

As a number it is so small that adding it changes nothing.
"""


@triton.jit
def unit_rows(
    groups,
    blocks,
    x,
    inverse_norm,
    alive,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Unit rows, inverse norms, and how many rows of a block take part.

    Rows may have any finite positive norm. Those that are zero, subnormal or not finite become 0
    with inverse norm 0.
    """
    block = tl.program_id(0)
    group = groups + tl.load(blocks + 2 * block) * FIELDS
    row = tl.load(blocks + 2 * block + 1) * ROWS + tl.arange(0, ROWS)
    d = tl.load(group + D).to(tl.int32)
    width = tl.multiple_of(tl.load(group + D_PAD).to(tl.int32), STEP)
    inside = row < tl.load(group + N)
    source = tl.load(group + W).to(tl.pointer_type(DTYPE)) + (row * tl.load(group + W_ROW))[:, None]
    stride = tl.load(group + W_COL)
    start_of_rows = tl.multiple_of(tl.load(group + X), STEP)
    target = x + start_of_rows + (row.to(tl.int64) * width)[:, None]

    most = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        w = tl.load(
            source + (col * stride)[None, :], mask=inside[:, None] & (col < d)[None, :], other=0.0
        ).to(tl.float32)
        most = tl.maximum(most, tl.where(tl.abs(w) <= LARGEST, tl.abs(w), float("inf")))
    largest = tl.max(most, 1)
    usable = (largest >= TINY) & (largest <= LARGEST)
    largest = tl.where(usable, largest, 1.0)

    square = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        w = tl.load(
            source + (col * stride)[None, :], mask=usable[:, None] & (col < d)[None, :], other=0.0
        ).to(tl.float32)
        entry = tl.div_rn(w, tl.broadcast_to(largest[:, None], w.shape))
        square += entry * entry
    length = tl.where(usable, tl.sqrt_rn(tl.sum(square, 1)), 1.0)

    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        w = tl.load(
            source + (col * stride)[None, :], mask=usable[:, None] & (col < d)[None, :], other=0.0
        ).to(tl.float32)
        entry = tl.div_rn(w, tl.broadcast_to(largest[:, None], w.shape))
        tl.store(
            target + col[None, :],
            tl.div_rn(entry, tl.broadcast_to(length[:, None], w.shape)),
            mask=(col < width)[None, :],
        )
    # A subnormal might be flushed to 0, which would mean a dead row.
    inverse = tl.maximum(tl.div_rn(tl.div_rn(1.0 + tl.zeros_like(length), length), largest), TINY)
    tl.store(inverse_norm + tl.load(group + ROW) + row, tl.where(usable, inverse, 0.0))
    tl.store(alive + block, tl.sum(usable.to(tl.int32), 0))


@triton.jit
def pair_slopes(
    groups,
    tiles,
    x,
    inverse_norm,
    slopes,
    marks,
    energies,
    number,
    KERNEL: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    ENERGY: tl.constexpr,
    NEAR: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Slopes of the kernel for a tile of pairs on or above the diagonal, and their mirror image.

    Pairs too near (or too near to opposite) for float32 are held back: ``HELD`` stands in their
    place, and the tile and its mirror image are marked.
    """
    program = tl.program_id(0)
    group = groups + tl.load(tiles + 3 * program) * FIELDS
    i, j = tl.load(tiles + 3 * program + 1), tl.load(tiles + 3 * program + 2)
    row, col = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    n = tl.load(group + N).to(tl.int32)
    width = tl.multiple_of(tl.load(group + D_PAD).to(tl.int32), STEP)
    base = x + tl.multiple_of(tl.load(group + X), STEP)
    depth = tl.arange(0, DEPTH)
    left = base + (row.to(tl.int64) * width)[:, None] + depth[None, :]
    right = base + (col.to(tl.int64) * width)[None, :] + depth[:, None]

    cosine = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, width, DEPTH):
        cosine = tl.dot(
            tl.load(left + start), tl.load(right + start), cosine, input_precision=PRECISION
        )

    q = 2.0 - 2.0 * cosine
    pair = (row[:, None] != col[None, :]) & (row < n)[:, None] & (col < n)[None, :]
    near = pair & ((q < NEAR) | (q > 4.0 - NEAR))
    counts = pair & (near == 0)
    q = tl.where(counts, q, 2.0)
    value, slope = KERNEL(q, 4.0 - q, number)
    if HALF_SPACE:
        mirrored, mirrored_slope = KERNEL(4.0 - q, q, number)
        value, slope = value + mirrored, slope - mirrored_slope
    slope = tl.where(near, HELD, tl.where(counts, slope, 0.0))
    is_marked = tl.max(tl.max(near.to(tl.int32), 1), 0)
    own_marks = marks + tl.load(group + MARKS)
    tl.store(own_marks + i * (tl.load(group + N_PAD) // TILE) + j, is_marked)
    tl.store(own_marks + j * (tl.load(group + N_PAD) // TILE) + i, is_marked)
    if ENERGY:  # a zero row has cosine 0 with every row: it pulls on none, but would add a value
        norms = inverse_norm + tl.load(group + ROW)
        counts = (
            counts & (tl.load(norms + row) > 0.0)[:, None] & (tl.load(norms + col) > 0.0)[None, :]
        )
        total = tl.sum(tl.sum(tl.where(counts, value, 0.0), 1), 0)
        tl.store(energies + program, tl.where(i == j, 0.5, 1.0) * total)

    first = tl.multiple_of(tl.load(group + FIRST).to(tl.int32), STEP)
    last = tl.multiple_of(tl.load(group + LAST).to(tl.int32), STEP)
    long = tl.multiple_of(tl.load(group + N_PAD), STEP) - first
    panel = slopes + tl.load(group + PANEL_START)  # not said to be a multiple: wide stores spill
    tl.store(panel + ((row - first) * long)[:, None] + (col - first)[None, :], slope)
    if j > i:
        if j * TILE >= last:
            panel = slopes + tl.load(group + BELOW)
            long = (last - first).to(tl.int64)
        top = tl.where(j * TILE < last, first, last)
        tl.store(panel + ((col - top) * long)[:, None] + (row - first)[None, :], tl.trans(slope))


@triton.jit
def products(
    groups,
    tiles,
    x,
    slopes,
    pulls,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Add a tile of the sums ``sum_j F'(q_ij) x_j`` over the pairs of a panel."""
    program = tl.program_id(0)
    group = groups + tl.load(tiles + 3 * program) * FIELDS
    row = tl.load(tiles + 3 * program + 1) * TILE + tl.arange(0, TILE)
    col = tl.load(tiles + 3 * program + 2) * WIDTH + tl.arange(0, WIDTH)
    width = tl.multiple_of(tl.load(group + D_PAD).to(tl.int32), STEP)
    first = tl.multiple_of(tl.load(group + FIRST).to(tl.int32), STEP)
    last = tl.multiple_of(tl.load(group + LAST).to(tl.int32), STEP)
    depth = tl.arange(0, DEPTH)
    # Rows of the panel pair with all columns from its first on; rows below, with the panel's rows.
    below = tl.load(tiles + 3 * program + 1) * TILE >= last
    n_pad = tl.multiple_of(tl.load(group + N_PAD).to(tl.int32), STEP)
    count = tl.where(below, last, n_pad) - first
    start_of = tl.multiple_of(tl.load(group + tl.where(below, BELOW, PANEL_START)), STEP)
    top = tl.where(below, last, first)
    left = slopes + start_of + ((row - top).to(tl.int64) * count)[:, None] + depth[None, :]
    start_of_rows = tl.multiple_of(tl.load(group + X), STEP)
    base = x + start_of_rows
    right = base + ((first + depth).to(tl.int64) * width)[:, None] + col[None, :]

    total = tl.zeros((TILE, WIDTH), tl.float32)
    for _ in range(0, count, DEPTH):
        total = tl.dot(tl.load(left), tl.load(right), total, input_precision=PRECISION)
        left += DEPTH
        right += DEPTH * width
    target = pulls + start_of_rows + (row.to(tl.int64) * width)[:, None] + col[None, :]
    if first > 0:
        total += tl.load(target)
    tl.store(target, total)


@triton.jit
def additions(
    groups,
    numbers,
    blocks,
    x,
    inverse_norm,
    pulls,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Add the pulls to ``out``: their tangent part over the norm, weighted and within the limit.

    No norm of a row overflows on the way.
    """
    block = tl.program_id(0)
    index = tl.load(blocks + 2 * block)
    group, number = groups + index * FIELDS, numbers + index * NUMBERS
    row = tl.load(blocks + 2 * block + 1) * ROWS + tl.arange(0, ROWS)
    d = tl.load(group + D).to(tl.int32)
    width = tl.multiple_of(tl.load(group + D_PAD).to(tl.int32), STEP)
    offset = tl.multiple_of(tl.load(group + X), STEP) + (row.to(tl.int64) * width)[:, None]
    inverse = tl.load(inverse_norm + tl.load(group + ROW) + row).to(tl.float64)

    most = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        most = tl.maximum(
            most,
            tl.abs(tl.load(pulls + offset + col[None, :], mask=(col < width)[None, :], other=0.0)),
        )
    largest = tl.max(most, 1)
    largest = tl.where(largest > 1e-30, largest, 1.0)
    shrink = (1.0 / largest)[:, None]

    product = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        pull = (
            tl.load(pulls + offset + col[None, :], mask=(col < width)[None, :], other=0.0) * shrink
        )
        product += pull * tl.load(x + offset + col[None, :], mask=(col < width)[None, :], other=0.0)
    radial = tl.sum(product, 1)[:, None]

    square = tl.zeros((ROWS, COLS), tl.float32)
    most = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        pull = (
            tl.load(pulls + offset + col[None, :], mask=(col < width)[None, :], other=0.0) * shrink
        )
        along = pull - radial * tl.load(
            x + offset + col[None, :], mask=(col < width)[None, :], other=0.0
        )
        square += along * along
        most = tl.maximum(most, tl.abs(along))

    # The factor of ``along``: neither float32 nor the dtype of ``out`` may overflow.
    reach = tl.load(number + FACTOR) * largest.to(tl.float64)
    most = tl.maximum(tl.abs(reach) * tl.max(most, 1).to(tl.float64), TINY)
    weight = reach * tl.minimum(inverse, 0.5 * LARGEST / most)
    scale = tl.load(number + SCALE)
    length = tl.sqrt(tl.sum(square, 1).to(tl.float64)) * tl.abs(weight) * scale
    limit = tl.load(number + LIMIT)
    limit_at = tl.load(group + LIMIT_AT)
    if limit_at != 0:
        limit = tl.load(limit_at.to(tl.pointer_type(tl.float64)))
    room = tl.minimum(tl.load(number + BOUND), limit / tl.maximum(inverse, TINY))
    weight *= (
        tl.where(length > room, room / tl.where(length > room, length, 1.0), 1.0)
        * scale
        * tl.load(number + GRAD_SCALE)
    )
    weight = tl.minimum(tl.maximum(weight, -1e38), 1e38).to(tl.float32)

    stride = tl.load(group + OUT_COL)
    out = (
        tl.load(group + OUT).to(tl.pointer_type(DTYPE)) + (row * tl.load(group + OUT_ROW))[:, None]
    )
    inside = (row < tl.load(group + N))[:, None]
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        pull = (
            tl.load(pulls + offset + col[None, :], mask=(col < width)[None, :], other=0.0) * shrink
        )
        unit = tl.load(x + offset + col[None, :], mask=(col < width)[None, :], other=0.0)
        place = out + (col * stride)[None, :]
        wanted = inside & (col < d)[None, :]
        added = (
            tl.load(place, mask=wanted, other=0.0).to(tl.float32)
            + (pull - radial * unit) * weight[:, None]
        )
        tl.store(place, added.to(DTYPE), mask=wanted)
