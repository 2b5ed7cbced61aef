"""Pair sums over random blocks of neurons instead of all pairs, and how far off they are likely to be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.sphere import seeded, unit_rows


class Spread(NamedTuple):
    """Standard errors of the mean over blocks.

    Args:
        value: Of the mean pair energy.
        gradient: Of its gradient, a length: the root of the expected squared distance to the gradient over all pairs.
    """

    value: float
    gradient: float


def random_blocks(live: Tensor, size: int, draw: int) -> Tensor:
    """A random partition of neurons into blocks, from a seed that all ranks share.

    Args:
        live: Which neurons take part, bool, shape (n,), at least ``size`` of them.
        size: Neurons of a block, or a few more, so that few are left over.
        draw: Another partition for each other number.

    Returns:
        Indices (k, m). The n - k * m < k neurons that are left over are others each time.
    """
    index = live.nonzero().squeeze(1)
    count = max(1, len(index) // size)
    order = torch.randperm(len(index), generator=seeded(draw))[: len(index) // count * count]
    return index[order.to(index.device)].view(count, -1)


def of_all_pairs(term: PairTerm, n: int, m: int) -> tuple[float, float]:
    """Factor and summand that make of the expected mean energy of m of n neurons that of all n.

    In half space they differ, since each neuron also meets its own mirror image.
    """
    factor = _weight(term, n) / _weight(term, m) if m > 1 else 1.0
    return factor, term.constant(n) * term.scale(n) - factor * term.constant(m) * term.scale(m)


def block_spread(w: Tensor, blocks: Tensor, term: PairTerm, n: int) -> Spread:
    """Estimate, from the blocks themselves, how far their mean is from all pairs.

    A pair's energy is a constant, a part of either neuron and a rest. The parts of the neurons average out over blocks that
    hold them all; what is left is the rest, in so many of all pairs, and the parts of the few neurons left over.

    Args:
        w: Neurons, shape (n, d).
        blocks: From :func:`random_blocks`, of at least 4 neurons each.
        term: The kernel.
        n: How many neurons are alive.
    """
    count, m = blocks.shape
    own, rest, square, length = torch.zeros(4, dtype=torch.float64, device=w.device)
    for block in blocks:
        x, inverse_norm = unit_rows(w[block].double())
        cosine = x @ x.mT
        itself = torch.eye(m, dtype=torch.bool, device=w.device)
        q, p = (
            (2.0 + sign * 2.0 * cosine).clamp_(0.0, 4.0).masked_fill_(itself, 2.0)
            for sign in (-1.0, 1.0)
        )
        value, slope, mirrored_slope = term.split(q, p)
        value, slope = (part.masked_fill(itself, 0.0) for part in (value, slope - mirrored_slope))
        value -= (value.sum() / (m * (m - 1))) * ~itself
        parts = value.sum(1) / (m - 2)  # of each neuron
        rest += (value.square().sum() / 2 - (m - 2) * parts.square().sum()) / (m * (m - 3) / 2)
        own += parts.square().sum() / (m - 1)
        pull = slope @ x
        pull -= (slope * cosine).sum(1, keepdim=True) * x  # tangent part of the sum over the others
        pulled = pull.square().sum(1)
        spread = ((slope.square() * (1.0 - cosine.square())).sum(1) - pulled / (m - 1)) / (m - 2)
        scale = inverse_norm.squeeze(1).square()
        square += (scale * spread).sum() / (m - 1)
        length += (scale * pulled).sum() / (m - 1) ** 2
    rest, own = rest / count, (own - rest / (m - 2)).clamp_min(0.0) / count
    missed, seen = n - count * m, 1.0 - (m - 1) / (n - 1)
    variance = (
        rest * 2.0 / (count * m * (m - 1)) * seen
        + 4.0 * own * missed * (1.0 - missed / n) / (count * m) ** 2
    )
    distance = square * seen + length * missed / n
    factor = 2.0 * _weight(term, n)  # n neurons, each with its mean over the others
    return Spread(
        float(variance.clamp_min(0.0).sqrt()) * _weight(term, n),
        float(distance.clamp_min(0.0).sqrt()) * factor * 2.0 / n,
    )


def _weight(term: PairTerm, n: int) -> float:
    """What the mean over pairs of neurons counts in the mean energy: 1 in full space."""
    return n * (n - 1) / 2 * term.scale(n)
