"""Kernels of the squared chord for compiled loops: value and slope, elementwise, in float32.

Each takes the squared chord q to a neuron, p = 4 - q to its mirror image, and its one parameter.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from lightning_hsu._core.kernel import PairTerm

PI = tl.constexpr(math.pi)


@triton.jit
def chordal_log(q, p, number):
    """``log(1 / rho)``, rho the chord."""
    return -0.5 * tl.log(q), -0.5 / q


@triton.jit
def chordal_one(q, p, number):
    """``1 / rho``."""
    inverse = tl.rsqrt(q)
    return inverse, -0.5 * inverse * inverse * inverse


@triton.jit
def chordal_two(q, p, number):
    """``1 / rho**2``."""
    inverse = 1.0 / q
    return inverse, -inverse * inverse


@triton.jit
def chordal(q, p, number):
    """``rho**-s`` for s > 0, ``-rho**-s`` for s < 0."""
    power = tl.exp2(-0.5 * number * tl.log2(q))
    return tl.where(number > 0.0, power, -power), -0.5 * tl.abs(number) * power / q


@triton.jit
def angle_of(q, p):
    """The angle at squared chords q and p = 4 - q, accurate to 2 units in the last place."""
    # The squared sine of half the angle, or of half its supplement, in [0, 1 / 2].
    z = 0.25 * tl.minimum(q, p)
    # arcsin(sqrt(z)) / sqrt(z), interpolated at Chebyshev nodes: off by 3e-9.
    s = 0.123913488
    s = s * z - 0.135916258
    s = s * z + 0.10740001
    s = s * z - 0.00702057453
    s = s * z + 0.0358142382
    s = s * z + 0.0440916169
    s = s * z + 0.0750275732
    s = s * z + 0.166666142
    s = s * z + 1.0
    half = s * tl.sqrt(z)
    return tl.where(q <= p, 2.0 * half, PI - 2.0 * half)


@triton.jit
def geodesic_log(q, p, number):
    """``log(1 / rho)``, rho the angle."""
    angle = angle_of(q, p)
    return -tl.log(angle), -tl.rsqrt(q * p) / angle


@triton.jit
def geodesic(q, p, number):
    """``rho**-s`` for s > 0, ``-rho**-s`` for s < 0, rho the angle."""
    angle = angle_of(q, p)
    power = tl.exp2(-number * tl.log2(angle))
    return tl.where(number > 0.0, power, -power), -tl.abs(number) * power / angle * tl.rsqrt(q * p)


@triton.jit
def gaussian(q, p, number):
    """``exp(-t q)``."""
    value = tl.exp(-number * q)
    return value, -number * value


SPECIAL = {
    ("chordal", 0.0): chordal_log,
    ("chordal", 1.0): chordal_one,
    ("chordal", 2.0): chordal_two,
    ("geodesic", 0.0): geodesic_log,
}
"""Kernels for one value of a formula's parameter."""

GENERAL = {"chordal": chordal, "geodesic": geodesic, "gaussian": gaussian}
"""Kernels for any other value."""


def scalar_of(term: PairTerm) -> triton.runtime.JITFunction | None:
    """The compiled version of a term's kernel; None if there is none."""
    if term.formula is None:
        return None
    return SPECIAL.get(term.formula) or GENERAL.get(term.formula[0])
