"""Pair sums over random blocks of neurons instead of all pairs, and their standard errors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.sphere import seeded, unit_rows
from lightning_hsu._core.tables import upload


class Spread(NamedTuple):
    """Standard errors of the mean over blocks.

    Args:
        value: Standard error of the mean pair energy.
        gradient: Standard error of its gradient, a length: the root of the expected squared
            distance to the gradient over all pairs.
    """

    value: float
    gradient: float


def random_blocks(live: Tensor, size: int, draw: int) -> Tensor:
    """A random partition of neurons into blocks, from a seed that all ranks share.

    Args:
        live: Indices of the neurons that take part, at least ``size``.
        size: Neurons in a block, or a few more, so that few are left over.
        draw: Each number gives another partition.

    Returns:
        Indices (k, m). The neurons left over, fewer than k, differ from draw to draw.
    """
    count = max(1, len(live) // size)
    used = len(live) // count * count
    order = torch.randperm(len(live), generator=seeded(draw))[:used]
    return live[upload(order, live.device)].view(count, -1)


def of_all_pairs(term: PairTerm, n: int, m: int) -> tuple[float, float]:
    """A factor and a summand from the expected mean energy of m of n neurons to that of all n.

    The two means differ in half space, since each neuron also meets its own mirror image.
    """
    factor = 1.0
    if m > 1:
        factor = _weight(term, n) / _weight(term, m)
    summand = term.constant(n) * term.scale(n) - factor * term.constant(m) * term.scale(m)
    return factor, summand


def block_spread(w: Tensor, blocks: Tensor, term: PairTerm, n: int) -> Spread:
    """Estimate, from the blocks themselves, how far their mean is from that over all pairs.

    A pair's energy is the sum of a constant, a part for each of its neurons and a rest. The
    neurons' parts cause no error as long as the blocks hold every neuron. The error comes from the
    rest, over the share of all pairs that the blocks leave out, and from the parts of the few
    neurons left over.

    Args:
        w: Neurons, shape (n, d).
        blocks: From :func:`random_blocks`, of at least 4 neurons each.
        term: The kernel.
        n: How many neurons are alive.
    """
    count, m = blocks.shape
    found = torch.zeros(4, dtype=torch.float64, device=w.device)
    for block in blocks:
        found += _block_moments(w[block], term)
    rest, own, square, length = found.unbind()
    own = (own - rest / (m - 2)).clamp_min(0.0) / count
    rest = rest / count
    left_over = n - count * m
    unseen = 1.0 - (m - 1) / (n - 1)
    variance = rest * 2.0 / (count * m * (m - 1)) * unseen
    variance += 4.0 * own * left_over * (1.0 - left_over / n) / (count * m) ** 2
    distance = square * unseen + length * left_over / n
    weight = _weight(term, n)
    value_error = float(variance.clamp_min(0.0).sqrt()) * weight
    # The mean is over n neurons, each with its mean over the others; a pair counts for both.
    gradient_error = float(distance.clamp_min(0.0).sqrt()) * weight * 4.0 / n
    return Spread(value_error, gradient_error)


def _block_moments(w: Tensor, term: PairTerm) -> Tensor:
    """Moments of the pairs of one block of neurons (m, d).

    Returns:
        Four numbers: the variance of the rest of a pair's energy, without the neurons' parts; the
        variance of these parts; and, summed over the neurons, the squared error of the mean pull of
        the other m - 1 neurons and the squared length of that mean.
    """
    m = len(w)
    x, inverse_norm = unit_rows(w.double())
    cosine = x @ x.mT
    diagonal = torch.eye(m, dtype=torch.bool, device=w.device)
    q = (2.0 - 2.0 * cosine).clamp_(0.0, 4.0).masked_fill_(diagonal, 2.0)
    p = (2.0 + 2.0 * cosine).clamp_(0.0, 4.0).masked_fill_(diagonal, 2.0)
    value, slope, mirrored_slope = term.split(q, p)
    value = value.masked_fill(diagonal, 0.0)
    slope = (slope - mirrored_slope).masked_fill(diagonal, 0.0)
    value -= (value.sum() / (m * (m - 1))) * ~diagonal
    parts = value.sum(1) / (m - 2)  # of each neuron
    rest = (value.square().sum() / 2 - (m - 2) * parts.square().sum()) / (m * (m - 3) / 2)
    own = parts.square().sum() / (m - 1)
    pull = slope @ x
    pull -= (slope * cosine).sum(1, keepdim=True) * x  # the tangent part
    pulled = pull.square().sum(1)
    each = (slope.square() * (1.0 - cosine.square())).sum(1)
    spread = (each - pulled / (m - 1)) / (m - 2)
    scale = inverse_norm.squeeze(1).square()
    square = (scale * spread).sum() / (m - 1)
    length = (scale * pulled).sum() / (m - 1) ** 2
    return torch.stack([rest, own, square, length])


def _weight(term: PairTerm, n: int) -> float:
    """The total weight of pairs of different neurons in the mean energy: 1 in full space."""
    return n * (n - 1) / 2 * term.scale(n)
