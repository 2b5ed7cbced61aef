"""The same energies, written plainly from their formulas; the measures are timed against them.

Each function maps neurons (n, d) that require a gradient to the mean energy; autograd does the
rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def wo(w: Tensor) -> Tensor:
    """Riesz energy, s = 2: one matrix product, reciprocals with an epsilon, the diagonal masked."""
    x = w / w.norm(dim=1, keepdim=True)
    pairs = 1.0 / (2.0 * (1.0 - x @ x.T) + 1e-8) * (1.0 - torch.eye(len(w), device=w.device))
    return pairs.sum() / (len(w) * (len(w) - 1))


def half_mhe(w: Tensor) -> Tensor:
    """Riesz energy, s = 2, in half space: neurons and mirror images, the strict lower triangle."""
    both = torch.cat([w, -w])  # (2n, d)
    x = both / (both.norm(dim=1, keepdim=True) + 1e-4)
    inner = x @ x.T
    q = 2.0 - 2.0 * inner + torch.eye(len(both), device=w.device)
    pairs = torch.tril(q.pow(-1.0), diagonal=-1)
    return pairs.sum() / (len(both) * (len(both) - 1) / 2)


def gradient(peer: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """The gradient of a peer's energy."""
    leaf = w.detach().requires_grad_()
    return torch.autograd.grad(peer(leaf), leaf)[0]
