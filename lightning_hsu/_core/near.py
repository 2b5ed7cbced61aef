"""Pairs too near (or too near to opposite) for float32 cosines, redone in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm, softened_at
from lightning_hsu._core.sphere import (
    seeded_noise,
    separating_tangents,
    squared_chords,
    tangent,
    unit_rows,
)

NEAR = 0.05
"""Squared chord below which a pair is redone: there 2 - 2 * cos has lost half of its digits."""

COINCIDENT = 1e-7**2
"""Squared chord below which float32 cannot tell two neurons apart."""


class NearPairs:
    """The correction for the near pairs of one group of neurons, gathered panel by panel.

    Args:
        w: Rows of the group, shape (n, d), any positive scale.
        term: The kernel.
    """

    def __init__(self, w: Tensor, term: PairTerm) -> None:
        self.w = w
        self.term = term
        self.energy = torch.zeros((), dtype=torch.float64, device=w.device)
        # Rows that have a near neighbour, and their gradient; the other rows of grad are not set.
        self.met = torch.zeros(len(w), dtype=torch.bool, device=w.device)
        self.grad = torch.empty_like(w, dtype=torch.float64)
        self.duplicates: _Duplicates | None = None

    def add_panel(
        self, mask: Tensor, rows: Tensor, cols: Tensor, seam: int, *, with_grad: bool
    ) -> None:
        """Add the near pairs of a panel.

        Args:
            mask: The pairs to add, bool, shape (k, m).
            rows: Indices of the panel's rows in the group, shape (k,).
            cols: Indices of its columns, shape (m,).
            seam: The first column, in [0, m], whose pairs the panel holds once: these also count
                for their transposed pairs, and the column gathers a gradient as the row does. Pairs
                before it are held twice.
            with_grad: Gather the gradient as well as the energy.
        """
        near_rows = mask.any(1).nonzero().squeeze(1)
        near_cols = mask.any(0).nonzero().squeeze(1)
        keep = mask[near_rows][:, near_cols]
        once = near_cols >= seam
        rows = rows[near_rows]
        cols = cols[near_cols]
        x = unit_rows(self.w[rows].double())[0]
        y = unit_rows(self.w[cols].double())[0]
        q, p = squared_chords(x, y, keep)  # (k, m)
        value, slope, mirrored_slope = self.term.split(q, p)
        self.energy += (value * keep * torch.where(once, 1.0, 0.5)).sum()
        if not with_grad:
            return
        pull = slope * keep
        push = mirrored_slope * keep
        self._add_gradient(rows, x, y, pull, push)
        self._add_gradient(cols[once], y[once], x, pull[:, once].mT, push[:, once].mT)
        same = (q < COINCIDENT) & keep
        mirrored = (p < COINCIDENT) & keep & self.term.half_space
        if bool((same | mirrored).any()):
            if self.duplicates is None:
                self.duplicates = _Duplicates(self.grad)
            weight = same.double() - mirrored.double()
            self.duplicates.add(rows, cols, weight)
            self.duplicates.add(cols[once], rows, weight[:, once].mT)

    def _add_gradient(
        self, index: Tensor, x: Tensor, y: Tensor, pull: Tensor, push: Tensor
    ) -> None:
        """Add the tangent part of ``2 sum_j [pull (x_i - y_j) + push (x_i + y_j)]`` to some rows.

        Args:
            index: The rows, shape (k,).
            x: Their unit rows, shape (k, d).
            y: The unit rows of their partners, shape (m, d).
            pull: Slopes at the squared chords, shape (k, m).
            push: Slopes at the mirrored squared chords, shape (k, m).
        """
        total = (pull + push).sum(1, keepdim=True) * x - (pull - push) @ y
        self.grad[index[~self.met[index]]] = 0.0
        self.met[index] = True
        self.grad.index_add_(0, index, tangent(2.0 * total, x))

    def gradient(self) -> tuple[Tensor, Tensor]:
        """The gradient, on the sphere, of the sum over near pairs.

        Returns:
            The rows (m,) that have a near neighbour, and their gradient (m, d) in float64.
        """
        rows = self.met.nonzero().squeeze(1)
        grad = self.grad[rows]
        if self.duplicates is not None:
            knee = self.term.knee
            slope = softened_at(self.term, knee**2)[1]
            x = unit_rows(self.w[rows].double())[0]
            grad += 2.0 * slope * knee * self.duplicates.tangents(rows, x)
        return rows, grad


class _Duplicates:
    """The coincident pairs of one group of neurons, of the shape (n, d) and dtype of ``like``."""

    def __init__(self, like: Tensor) -> None:
        self.noise = seeded_noise(*like.shape, like=like)
        self.away = torch.zeros_like(like)  # minus the noise of all partners
        self.degree = torch.zeros_like(like[:, :1])  # how many partners a row has

    def add(self, rows: Tensor, partners: Tensor, weight: Tensor) -> None:
        """Add pairs, of weight (k, m) 1 where a partner coincides with a row, -1 where mirrored."""
        self.away.index_add_(0, rows, -weight @ self.noise[partners])
        self.degree.index_add_(0, rows, weight.abs().sum(1, keepdim=True))

    def tangents(self, rows: Tensor, x: Tensor) -> Tensor:
        """Tangents (m, d) along which rows (m,), at points x (m, d), move off their partners."""
        return separating_tangents(x, self.away[rows], self.degree[rows], self.noise[rows])
