"""All pairs of one set of neurons, looked at once: how their angles are spread, and which of them are nearly the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._core.precision import exact_arithmetic, with_float64, working_dtype
from lightning_hsu._core.sphere import unit_rows

_ENTRIES = 2**22  # cosines held at once


@dataclass(frozen=True)
class Survey:
    """What is known of the pairs of n neurons.

    Args:
        angles: How many pairs have an angle in each of as many equal parts of [0, 180] degrees, int64.
        similar: How many pairs are nearly the same.
        opposite: How many of these are so as lines only: they point opposite ways.
        pairs: The most similar of them, nearest first, by index, int64 (k, 2). They are chosen by cosines in float32: which are
            kept of more than k pairs below about 0.05 degrees is up to rounding.
        pair_angles: Their angles in degrees, float64 (k,).
    """

    angles: Tensor
    similar: int
    opposite: int
    pairs: Tensor
    pair_angles: Tensor


@torch.no_grad()
def survey_pairs(
    w: Tensor,
    *,
    above: float = 0.95,
    half_space: bool = False,
    keep: int = 100,
    bins: int = 90,
    done: Callable[[float], None] | None = None,
) -> Survey:
    """Count the pairs of neurons by angle and list those that are nearly the same; n * n * d FLOP, never n * n memory.

    Args:
        w: Neurons, shape (n, d), rows of any positive norm. Zero and non-finite rows take no part.
        above: Cosine from which a pair counts as nearly the same, in (0, 1).
        half_space: Opposite neurons count as the same: the cosine's absolute value.
        keep: How many of these pairs to list.
        bins: Parts of [0, 180] degrees.
        done: Told the fraction of the work that is done, now and then.

    Example:
        >>> survey = survey_pairs(torch.tensor([[1.0, 0.0], [2.0, 0.01], [0.0, 3.0]]))
        >>> survey.similar, survey.pairs.tolist(), [round(angle, 3) for angle in survey.pair_angles.tolist()]
        (1, [[0, 1]], [0.286])
    """
    w = with_float64(w.detach().to(working_dtype(w.dtype)))
    x, inverse_norm = unit_rows(w)
    live = (inverse_norm.squeeze(-1) > 0).nonzero().squeeze(1)
    x, n = x[live], len(live)
    angles = torch.zeros(bins, dtype=torch.int64, device=w.device)
    opposite, kept = 0, _Best(keep, w.device)
    height = max(1, _ENTRIES // max(n, 1))
    with exact_arithmetic(w):
        for start in range(0, n - 1, height):
            stop = min(start + height, n)
            cosine = (x[start:stop] @ x[start:].mT).clamp_(-1.0, 1.0)  # (k, n - start)
            rows, cols = (torch.arange(m, device=w.device) for m in cosine.shape)
            cosine.masked_fill_(cols <= rows[:, None], math.nan)
            close = cosine.abs() >= above if half_space else cosine >= above
            if bool(close.any()):
                opposite += int((close & (cosine < 0)).sum())
                at, to = close.nonzero(as_tuple=True)
                kept.add(cosine[at, to].abs(), live[at + start], live[to + start])
            part = cosine.acos_().mul_(bins / math.pi)
            angles += _counted(part, bins)
            if done is not None:
                done(1.0 - ((n - stop) / n) ** 2)
        exact = _angles(w, kept.pairs)
    near = torch.minimum(exact, 180.0 - exact) if half_space else exact
    order = near.argsort(stable=True)
    return Survey(angles, kept.count, opposite, kept.pairs[order], exact[order])


class _Best:
    """The pairs of the largest cosines among those that were shown, in bounded memory."""

    def __init__(self, keep: int, device: torch.device) -> None:
        self.keep, self.count = keep, 0
        self.cosines = torch.zeros(0, device=device)
        self.pairs = torch.zeros(0, 2, dtype=torch.int64, device=device)

    def add(self, cosines: Tensor, first: Tensor, second: Tensor) -> None:
        """Show pairs with their cosines, (m,) each."""
        self.count += len(cosines)
        if not self.keep:
            return
        if len(self.cosines) == self.keep:
            better = cosines > self.cosines[-1:]  # often none
            cosines, first, second = cosines[better], first[better], second[better]
        cosines, pairs = (
            torch.cat([self.cosines.to(cosines), cosines]),
            torch.cat([self.pairs, torch.stack([first, second], 1)]),
        )
        best = cosines.sort(descending=True, stable=True).indices[: self.keep]
        self.cosines, self.pairs = cosines[best], pairs[best]


def _counted(part: Tensor, bins: int) -> Tensor:
    """How many entries that are no NaN fall between whole numbers, the last of them its upper end, too; int64 (bins,)."""
    finite = part[~part.isnan()] if bool(part.isnan().any()) else part.flatten()
    return torch.bincount(finite.long().clamp_(0, bins - 1), minlength=bins)


def _angles(w: Tensor, pairs: Tensor) -> Tensor:
    """Angles in degrees of pairs (k, 2) of rows, by differences in float64, (k,)."""
    x, y = (unit_rows(w[index].double())[0] for index in pairs.unbind(1))
    apart, together = torch.linalg.vector_norm(x - y, dim=1), torch.linalg.vector_norm(x + y, dim=1)
    return (2.0 * torch.atan2(apart, together)).rad2deg()
