"""The arithmetic of quantised weights: codes of few bits, and the scales of rows and blocks.

Nothing here asks a tensor for its values, so that all of it works on device meta, too, also if only
the codes are there and their scales, which are smaller, are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Floats of four bits without a sign, by their code; eight more codes have the sign."""

_USUAL_BLOCK = 128  # of FP8 weights, along both axes
_POWERS = (16, 32, 64, 128, 256, 512, 1024)  # blocks that need not divide an axis


def integers(words: Tensor, bits: int) -> Tensor:
    """Integers that lie one after the other in the bits of words, the lowest bits first.

    A value may begin in one word and end in the next one.

    Args:
        words: Integers of 8, 16, 32 or 64 bits, (..., w).
        bits: The bits of each value, 1 to 8.

    Returns:
        The values (..., w * bits in a word // bits) as uint8.

    Example:
        >>> integers(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4)
        tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    """
    width = 8 * words.element_size()
    whole = width * words.shape[-1] // bits
    period = bits // math.gcd(bits, width)  # words after which the pattern repeats
    missing = -words.shape[-1] % period
    if missing:
        words = torch.nn.functional.pad(words, (0, missing))
    grouped = words.reshape(*words.shape[:-1], -1, period)
    values = []
    for i in range(period * width // bits):
        word, offset = divmod(i * bits, width)
        first = min(bits, width - offset)  # how many of the bits are in this word
        value = (grouped[..., word] >> offset) & (2**first - 1)
        if first < bits:
            rest = grouped[..., word + 1] & (2 ** (bits - first) - 1)
            value = value | (rest << first)
        values.append(value.to(torch.uint8))
    return torch.stack(values, dim=-1).flatten(-2).narrow(-1, 0, whole)


def nibbles(x: Tensor, *, high_first: bool = False) -> Tensor:
    """The two values of four bits in each byte, (..., n) as (..., 2n), the lower bits first."""
    halves = [x & 15, x >> 4]
    if high_first:
        halves.reverse()
    return torch.stack(halves, dim=-1).flatten(-2)


def looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """The entries of a table (k,) that codes of any shape stand for."""
    table = table.to(codes.device)
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def floats_of_4_bits(x: Tensor) -> Tensor:
    """Values of E2M1 from bytes of two, (..., n) as (..., 2n), the lower bits first."""
    table = torch.tensor((*E2M1, *(-value for value in E2M1)), device=x.device)
    return looked_up(table, nibbles(x))


def powers(x: Tensor) -> Tensor:
    """Scales that are stored as exponents of 2 in bytes: 2 ** (x - 127)."""
    return torch.exp2(x.float() - 127)


def as_float(scale: Tensor) -> Tensor:
    """Scales as float32: exponents in bytes are powers of two, other scales are what they say."""
    if scale.dtype == torch.uint8:
        return powers(scale)
    return scale.float()


def block_lengths(
    shape: Sequence[int], counts: Sequence[int], stated: Sequence[int] | None = None
) -> tuple[int, ...]:
    """How long the blocks of a weight are along each axis.

    The last block of an axis may be shorter than the others. If no lengths are stated, blocks of
    128 x 128 are taken where they fit, then those that divide the weight, then the power of two
    that fits.

    Args:
        shape: Shape of the weight.
        counts: How many scales there are along each axis.
        stated: What the file says of the last axes; it is not used if it does not fit.

    Raises:
        ValueError: if no lengths fit, or more than one and none of them is usual.

    Example:
        >>> block_lengths((200, 300), (2, 3))
        (128, 128)
        >>> block_lengths((64, 96), (64, 3))
        (1, 32)
    """
    if len(shape) != len(counts):
        raise ValueError(f"scales of shape {tuple(counts)} beside a weight {tuple(shape)}")
    lengths = {}
    open_axes = []  # those along which there are several blocks
    for axis, (size, count) in enumerate(zip(shape, counts, strict=True)):
        if count == 1:
            lengths[axis] = size
        elif count == size:
            lengths[axis] = 1
        else:
            open_axes.append(axis)
    tried = []
    if stated is not None and len(stated) <= len(shape):
        from_start = [0] * (len(shape) - len(stated)) + list(stated)
        tried.append(from_start)
    in_rows = len(shape) > 1 and counts[-2] == shape[-2]  # groups of a row, which divide it
    if not in_rows:
        tried.append([_USUAL_BLOCK] * len(shape))
    tried.append([size // max(count, 1) for size, count in zip(shape, counts, strict=True)])
    for candidate in tried:
        if all(_is_cut(shape[i], counts[i], candidate[i]) for i in open_axes):
            break
    else:
        power = _power_of_two(shape, counts, open_axes)
        candidate = [power] * len(shape)
    for axis in open_axes:
        lengths[axis] = int(candidate[axis])
    return tuple(lengths[axis] for axis in range(len(shape)))


def _is_cut(size: int, count: int, length: int) -> bool:
    """Whether blocks of a length cut an axis into so many."""
    return length > 0 and math.ceil(size / length) == count


def _power_of_two(shape: Sequence[int], counts: Sequence[int], axes: Sequence[int]) -> int:
    """The one power of two that is the length of the blocks along some axes."""
    fitting = []
    for power in _POWERS:
        if all(_is_cut(shape[i], counts[i], power) for i in axes):
            fitting.append(power)
    if len(fitting) != 1:
        raise ValueError(
            f"the size of its blocks is not stored, and scales of shape {tuple(counts)} do not "
            "tell it"
        )
    return fitting[0]


def aligned(part: Tensor, shape: Sequence[int]) -> Tensor:
    """Scales or zero points with as many axes as their weight.

    One for each row may lack the axis of the inputs, one for each expert both.

    Raises:
        ValueError: if they do not belong to a weight of that shape.
    """
    if part.numel() == 1:
        return part.reshape([1] * len(shape))
    given = tuple(part.shape)
    if len(given) < len(shape) and given == tuple(shape[: len(given)]):
        return part.reshape(given + (1,) * (len(shape) - len(given)))
    if len(given) == len(shape):
        return part
    raise ValueError(f"scales of shape {given} beside a weight {tuple(shape)}")


def may_scale(part: Tensor, weight: Tensor) -> bool:
    """Whether a tensor has the shape of scales of a weight, one for several of its entries."""
    if part.shape == weight.shape:
        return False
    try:
        block_lengths(weight.shape, aligned(part, weight.shape).shape)
    except ValueError:
        return False
    return True


def spread(part: Tensor, shape: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Repeat what blocks have so that each entry has it, unless an axis has length 1.

    Args:
        part: One number for each block, with as many axes as ``shape``.
        shape: Shape of the weight.
        lengths: How long the blocks are along each axis.
    """
    for axis, (size, length) in enumerate(zip(shape, lengths, strict=True)):
        count = part.shape[axis]
        if count in (1, size):
            continue
        if length * count < size:
            raise ValueError("the scales do not cover the weight")
        part = part.repeat_interleave(length, dim=axis).narrow(axis, 0, size)
    return part


def scaled(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, blocks: Sequence[int] | None = None
) -> tuple[Tensor, str]:
    """Codes times their scales, after their zero points have been subtracted.

    Args:
        x: The codes, (..., out, in).
        scale: One scale, or one for each expert, row, group of a row, or block.
        zero: Zero points of the same shape; None for 0.
        blocks: The length of the blocks along the last axes, if it is stored.

    Returns:
        The values in float32, and in words which scales they have.

    Raises:
        ValueError: if it is not clear which scale belongs to which entry.
    """
    scale = aligned(as_float(scale), x.shape).to(x.device)
    lengths = block_lengths(x.shape, scale.shape, blocks)
    values = x.float()
    if zero is not None:
        zero = aligned(zero.float(), x.shape).to(x.device)
        if zero.numel() != 1 and zero.shape != scale.shape:
            raise ValueError("its zero points have another shape than its scales")
        values = values - spread(zero, x.shape, lengths)
    return values * spread(scale, x.shape, lengths), _in_words(x.shape, scale.shape, lengths)


def _in_words(shape: Sequence[int], counts: Sequence[int], lengths: Sequence[int]) -> str:
    """Which scales a weight has."""
    if all(count == 1 for count in counts):
        return "one scale"
    if counts[-1] == 1 and tuple(counts[:-1]) == tuple(shape[:-1]):
        return "a scale for each row"
    if len(shape) < 2 or (counts[-2] == 1 and counts[-1] == 1):
        return "a scale for each matrix"
    if lengths[-2] == 1:
        return f"groups of {lengths[-1]}"
    return f"blocks of {lengths[-2]} x {lengths[-1]}"
