"""Pseudo-random numbers from a counter: the same on every device and rank, in any order."""

from __future__ import annotations

from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hashed(index: Tensor, seed: int) -> Tensor:
    """Mix (seed, index) to 64 bits by SplitMix64.

    For a fixed seed this is one-to-one, so that no two indices tie.

    Args:
        index: Counters, int64, any shape.
        seed: Each seed >= 0 gives another sequence.

    Returns:
        Numbers uniform over int64, the shape of index.

    Reference:
        Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

    Example:
        >>> import torch
        >>> first = hashed(torch.tensor([0]), 0)
        >>> hex(int(first) % 2**64)  # the first output of the published generator from 0
        '0xe220a8397b1dcdaf'
    """
    z = (index + 1) * _signed(_GOLDEN) + _signed(_mixed(seed))
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right and fill with zeros; ``>>`` alone fills with the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(seed: int) -> int:
    """Mix a seed in the same way: 0 stays 0, and neighbouring seeds end up far apart."""
    z = seed
    z = (z ^ (z >> 30)) * _FIRST % 2**64
    z = (z ^ (z >> 27)) * _SECOND % 2**64
    return z ^ (z >> 31)


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    if x >= 2**63:
        return x - 2**64
    return x
