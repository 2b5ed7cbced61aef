"""The mean pair energy of very many neurons from a sample, and its standard error.

A few nearest pairs may have much of the energy, and a sample hardly ever holds them. So pairs that
are known are counted as they are, and the sample stands for the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.parts import Done
from lightning_hsu._core.sphere import squared_chords, unit_rows

_GATHERED = 2**20  # entries of neurons that are compared by differences at a time


class Estimate(NamedTuple):
    """An estimated mean energy.

    Args:
        value: The estimate.
        error: Its standard error; 0 if all pairs are counted.
    """

    value: float
    error: float


@torch.no_grad()
def sampled_energy(
    w: Tensor,
    blocks: Tensor,
    term: PairTerm,
    *,
    live: int,
    known: Tensor,
    done: Done | None = None,
) -> Estimate:
    """Estimate the mean energy over all pairs from those within some blocks.

    The error is that of a U-statistic of degree two: a pair's energy is the sum of a constant, a
    part for each of its neurons and a rest.

    Args:
        w: Neurons, shape (n, d), float32 or float64.
        blocks: Indices (k, m) of random neurons, which take part, none of them twice.
        term: The kernel.
        live: How many neurons take part; more than the blocks have, or as many in one block.
        known: Pairs (p, 2) whose energies are computed, none of them twice.
        done: Called with the fraction of the work that is done.

    Reference:
        Hoeffding, "A class of statistics with asymptotically normal distribution", 1948.

    Example:
        >>> from lightning_hsu.measures import RieszEnergy
        >>> x = torch.eye(6)
        >>> blocks = torch.arange(4)[None]
        >>> known = torch.zeros(0, 2, dtype=torch.int64)
        >>> sampled_energy(x, blocks, RieszEnergy(s=2).pair_term(), live=6, known=known)
        Estimate(value=0.5, error=0.0)
    """
    count, m = blocks.shape
    if live < 2:
        return Estimate(0.0, 0.0)
    moments = torch.zeros(3, dtype=torch.float64, device=w.device)
    for i, block in enumerate(blocks):
        moments += _moments(w, block, term, known)
        if done is not None:
            done((i + 1) / count)
    mean, rest, own = (moments / count).tolist()
    unseen = 1.0 - (m - 1) / (live - 1)
    variance = 0.0
    if m > 3:
        own = max(own - rest / (m - 2), 0.0)
        variance = max(rest, 0.0) * 2.0 / (count * m * (m - 1)) * unseen
        variance += 4.0 * own * (1.0 - count * m / live) / (count * m)
    pairs = live * (live - 1) / 2
    total = pairs * mean + float(_energies(w, known, term).sum())
    value = (total + term.constant(live)) * term.scale(live)
    return Estimate(value, math.sqrt(variance) * pairs * term.scale(live))


def _moments(w: Tensor, block: Tensor, term: PairTerm, known: Tensor) -> Tensor:
    """Moments of the energies of the pairs of one block (m,), where known pairs count 0.

    Returns:
        Three numbers: the mean, the variance of the rest of an energy without its neurons' parts,
        and the variance of these parts.
    """
    m = len(block)
    x = unit_rows(w[block].double())[0]
    diagonal = torch.eye(m, dtype=torch.bool, device=w.device)
    q, p = squared_chords(x, x, ~diagonal)
    value = term.split(q.masked_fill_(diagonal, 2.0), p.masked_fill_(diagonal, 2.0))[0]
    value.masked_fill_(diagonal, 0.0)
    place = torch.full((len(w),), -1, dtype=torch.int64, device=w.device)
    place[block] = torch.arange(m, device=w.device)
    first, second = place[known].unbind(1)
    inside = (first >= 0) & (second >= 0)
    first = first[inside]
    second = second[inside]
    value[first, second] = 0.0
    value[second, first] = 0.0
    mean = value.sum() / max(m * (m - 1), 1)
    if m <= 3:
        return torch.stack([mean, torch.zeros_like(mean), torch.zeros_like(mean)])
    value -= mean
    value.masked_fill_(diagonal, 0.0)
    parts = value.sum(1) / (m - 2)  # of each neuron
    rest = (value.square().sum() / 2 - (m - 2) * parts.square().sum()) / (m * (m - 3) / 2)
    return torch.stack([mean, rest, parts.square().sum() / (m - 1)])


def _energies(w: Tensor, pairs: Tensor, term: PairTerm) -> Tensor:
    """Energies (k,) of pairs (k, 2) of rows of w (n, d), from differences."""
    energies = [w.new_zeros(0, dtype=torch.float64)]
    for some in torch.split(pairs, max(1, _GATHERED // w.shape[1])):
        x = unit_rows(w[some[:, 0]].double())[0]
        y = unit_rows(w[some[:, 1]].double())[0]
        q = (x - y).square_().sum(1)
        p = (x + y).square_().sum(1)
        energies.append(term.split(q, p)[0])
    return torch.cat(energies)
