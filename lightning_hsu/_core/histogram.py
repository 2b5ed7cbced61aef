"""All pairs of a set of neurons in one pass: a histogram of their angles, and the most similar."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._core.components import Components
from lightning_hsu._core.parts import Done
from lightning_hsu._core.precision import exact_arithmetic, with_float64, working_dtype
from lightning_hsu._core.sphere import unit_rows

_ENTRIES = 2**20  # cosines held at once


@dataclass(frozen=True)
class PairHistogram:
    """Summary of the pairs of n neurons.

    Args:
        angles: Number of pairs by angle, in equal bins of [0, 180] degrees, int64, shape (bins,).
        similar: How many pairs are similar.
        opposite: How many of these are similar only as lines: they point opposite ways.
        pairs: Indices of the most similar of them, nearest first, int64, shape (k, 2). They are
            chosen by float32 cosines: if more than k pairs are below about 0.05 degrees, rounding
            decides which are kept.
        pair_angles: Their angles in degrees, float64, shape (k,).
        label: The first neuron of each one's group, int64, shape (n,): similar pairs, all of them,
            connect the neurons of a group.
    """

    angles: Tensor
    similar: int
    opposite: int
    pairs: Tensor
    pair_angles: Tensor
    label: Tensor


@torch.no_grad()
def pair_histogram(
    w: Tensor,
    *,
    above: float = 0.95,
    half_space: bool = False,
    keep: int = 100,
    bins: int = 90,
    done: Done | None = None,
) -> PairHistogram:
    """Count the pairs of neurons by angle and list the similar ones, without n * n memory.

    Args:
        w: Neurons, shape (n, d), rows of any positive norm. Zero and non-finite rows take no part.
        above: Cosine at or above which a pair is similar, in (0, 1).
        half_space: Compare absolute cosines: opposite neurons are similar.
        keep: How many similar pairs to list.
        bins: Bins of the histogram over [0, 180] degrees.
        done: Called after each panel of rows with the fraction of the work that is done.

    Example:
        >>> found = pair_histogram(torch.tensor([[1.0, 0.0], [2.0, 0.01], [0.0, 3.0]]))
        >>> found.similar, found.pairs.tolist(), [round(a, 3) for a in found.pair_angles.tolist()]
        (1, [[0, 1]], [0.286])
    """
    w = with_float64(w.detach().to(working_dtype(w.dtype)))
    x, inverse_norm = unit_rows(w)
    live = (inverse_norm.squeeze(-1) > 0).nonzero().squeeze(1)
    x = x[live]
    n = len(live)
    angles = torch.zeros(bins, dtype=torch.int64, device=w.device)
    opposite = 0
    kept = MostSimilar(keep, w.device)
    groups = Components(n, w.device)
    height = max(1, _ENTRIES // max(n, 1))
    with exact_arithmetic(w):
        for start in range(0, n - 1, height):
            stop = min(start + height, n)
            cosine = (x[start:stop] @ x[start:].mT).clamp_(-1.0, 1.0)  # (k, n - start)
            rows = torch.arange(stop - start, device=w.device)
            cols = torch.arange(n - start, device=w.device)
            cosine.masked_fill_(cols <= rows[:, None], math.nan)
            similar = cosine >= above
            if half_space:
                similar |= cosine <= -above
            if bool(similar.any()):
                opposite += int((similar & (cosine < 0)).sum())
                row, col = similar.nonzero(as_tuple=True)
                kept.add(cosine[row, col].abs(), live[row + start], live[col + start])
                groups.add_block(similar, start, start)
            angles += _counts(cosine.acos_().mul_(bins / math.pi), bins)
            if done is not None:
                done(1.0 - ((n - stop) / n) ** 2)
        angles_of_pairs = pair_angles(w, kept.pairs)
    between = angles_of_pairs
    if half_space:  # between lines
        between = torch.minimum(angles_of_pairs, 180.0 - angles_of_pairs)
    order = between.argsort(stable=True)
    pairs = kept.pairs[order]
    nearest = angles_of_pairs[order]
    label = groups.labels_among(live, len(w))
    return PairHistogram(angles, kept.count, opposite, pairs, nearest, label)


class MostSimilar:
    """The pairs with the largest cosines among all that were added, in bounded memory."""

    def __init__(self, keep: int, device: torch.device) -> None:
        self.keep = keep
        self.count = 0  # of all that were added
        self.cosines = torch.zeros(0, device=device)
        self.pairs = torch.zeros(0, 2, dtype=torch.int64, device=device)

    def add(self, cosines: Tensor, first: Tensor, second: Tensor) -> None:
        """Add pairs (first, second) with their cosines, (m,) each."""
        self.count += len(cosines)
        if not self.keep:
            return
        if len(self.cosines) == self.keep:
            larger = cosines > self.cosines[-1:]  # often none
            cosines = cosines[larger]
            first = first[larger]
            second = second[larger]
        cosines = torch.cat([self.cosines.to(cosines), cosines])
        pairs = torch.cat([self.pairs, torch.stack([first, second], 1)])
        order = cosines.sort(descending=True, stable=True).indices[: self.keep]
        self.cosines = cosines[order]
        self.pairs = pairs[order]


def _counts(positions: Tensor, bins: int) -> Tensor:
    """How many positions lie in each bin [i, i + 1), the last one closed; NaN is left out."""
    missing = positions.isnan()
    if bool(missing.any()):
        positions = positions[~missing]
    return torch.bincount(positions.flatten().long().clamp_(0, bins - 1), minlength=bins)


def pair_angles(w: Tensor, pairs: Tensor) -> Tensor:
    """Angles in degrees (k,) of pairs (k, 2) of rows, from differences in float64."""
    x = unit_rows(w[pairs[:, 0]].double())[0]
    y = unit_rows(w[pairs[:, 1]].double())[0]
    apart = torch.linalg.vector_norm(x - y, dim=1)
    together = torch.linalg.vector_norm(x + y, dim=1)
    return (2.0 * torch.atan2(apart, together)).rad2deg()
