"""Pairs too near (or too near to opposite) for float32 cosines, redone in float64, the nearest by differences."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm, softened_at
from lightning_hsu._core.sphere import seeded_noise, squared_chords, tangent, unit_rows

NEAR = 0.05
"""Squared chord below which a pair is redone: there 2 - 2 * cos has lost more than half of float32's digits."""

COINCIDENT = 1e-7**2
"""Squared chord below which float32 cannot tell two neurons apart: they part along a seeded direction."""


class NearPairs:
    """The correction for the near pairs of one stack of neurons, gathered panel by panel.

    Args:
        w: Rows of one group, shape (n, d), any positive scale.
        term: The kernel.
    """

    def __init__(self, w: Tensor, term: PairTerm) -> None:
        self.w, self.term = w, term
        self.energy = torch.zeros((), dtype=torch.float64, device=w.device)
        self.met = torch.zeros(
            len(w), dtype=torch.bool, device=w.device
        )  # rows with a near neighbour
        self.grad = torch.empty_like(w, dtype=torch.float64)  # of these, the others hold nothing
        self.noise: Tensor | None = None  # (n, d), drawn when the first coincident neurons are met
        self.away: Tensor | None = None  # (n, d): directions in which coincident neurons part
        self.degree: Tensor | None = None  # (n,): coincident partners

    def add_panel(
        self, mask: Tensor, rows: Tensor, cols: Tensor, seam: int, *, with_grad: bool
    ) -> None:
        """Add the pairs of a panel that are too near.

        Args:
            mask: The pairs to add, bool, shape (k, m).
            rows: Which rows of the stack the panel has, shape (k,).
            cols: Which columns, shape (m,).
            seam: Columns from this one on, in [0, m], stand for their transposed pairs, too: the panel holds their
                pairs once, and they gather a gradient as the rows do. Pairs before it are held twice.
            with_grad: Gather the gradient, not the energy alone.
        """
        at, across = (mask.any(dim).nonzero().squeeze(1) for dim in (1, 0))
        keep, outside = mask[at][:, across], across >= seam
        rows, cols = rows[at], cols[across]
        x, y = unit_rows(self.w[rows].double())[0], unit_rows(self.w[cols].double())[0]
        q, p = squared_chords(x, y, keep)  # (k, m)
        value, slope, mirrored_slope = self.term.split(q, p)
        self.energy += (value * keep * torch.where(outside, 1.0, 0.5)).sum()
        if not with_grad:
            return
        pull, push = slope * keep, mirrored_slope * keep
        self._accumulate(rows, x, y, pull, push)
        self._accumulate(cols[outside], y[outside], x, pull[:, outside].mT, push[:, outside].mT)
        same = (q < COINCIDENT) & keep
        mirror = (p < COINCIDENT) & keep & self.term.half_space
        if bool((same | mirror).any()):
            self._separate(rows, cols, outside, same.double(), mirror.double())

    def _accumulate(self, index: Tensor, x: Tensor, y: Tensor, pull: Tensor, push: Tensor) -> None:
        """Add 2 * sum_j [pull (x_i - y_j) + push (x_i + y_j)], its tangent part, to the rows ``index`` of the gradient."""
        total = (pull + push).sum(1, keepdim=True) * x - (pull - push) @ y
        self.grad[index[~self.met[index]]] = 0.0
        self.met[index] = True
        self.grad.index_add_(0, index, tangent(2.0 * total, x))

    def _separate(
        self, rows: Tensor, cols: Tensor, outside: Tensor, same: Tensor, mirror: Tensor
    ) -> None:
        """Note coincident partners: as if every neuron stood an infinitesimal, seeded step beside itself."""
        if self.away is None or self.degree is None or self.noise is None:
            self.noise = seeded_noise(*self.w.shape, like=self.energy)
            self.away, self.degree = (
                torch.zeros_like(self.noise),
                torch.zeros_like(self.noise[:, 0]),
            )
        noise = self.noise
        for index, partners, a, b in (
            (rows, cols, same, mirror),
            (cols[outside], rows, same[:, outside].mT, mirror[:, outside].mT),
        ):
            degree = (a + b).sum(1)
            self.away.index_add_(
                0, index, degree[:, None] * noise[index] - (a - b) @ noise[partners]
            )
            self.degree.index_add_(0, index, degree)

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Rows (m,) with a near neighbour, and their part of the gradient of the pair sum on the sphere, (m, d) float64."""
        rows = self.met.nonzero().squeeze(1)
        grad = self.grad[rows]
        if self.away is not None and self.degree is not None:
            x = unit_rows(self.w[rows].double())[0]
            direction = unit_rows(tangent(self.away[rows], x))[0]
            knee = self.term.knee
            slope = softened_at(self.term, knee**2)[1]
            grad += 2.0 * slope * knee * self.degree[rows, None] * direction
        return rows, grad
