"""Pair sums that ask the device nothing: layers of one shape go together, and a CUDA graph can replay all of it.

Each question to a GPU ("is any pair near?") would wait for it. Here the answers are gathered beside the results; whoever uses
these reads all of them at once and computes again, exactly, the groups that had near pairs or rows of unusual norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hsu.core.kernel import PairTerm
from lightning_hsu.core.near import NEAR

_ENTRIES = 2**26
"""Gram entries held at once: 256 MiB in float32."""


def unasked_gradients(w: Tensor, term: PairTerm) -> tuple[Tensor, Tensor, Tensor]:
    """Mean energy over pairs and its gradient, where nothing is special about the neurons; see :func:`pair_energy`.

    Args:
        w: Neurons, shape (b, n, d), float32 or float64, n >= 2.
        term: The kernel.

    Returns:
        The values (b,), the gradients (b, n, d), and whether they hold, bool (b,). They do not where a group has near (or
        nearly opposite) pairs, or rows whose norm is not between 1e-15 and 1e15; there they may be anything.
    """
    b, n, _ = w.shape
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    holds = ((norm > 1e-15) & (norm < 1e15)).flatten(1).all(1)
    x = w / norm
    grad, radial, total = torch.zeros_like(x), torch.zeros_like(norm), torch.zeros(b, dtype=torch.float64, device=w.device)
    height = max(1, min(n, _ENTRIES // (b * n)))
    for start in range(0, n, height):
        rows, cols = x[:, start : start + height], x[:, start:]
        stop, seam = start + rows.shape[1], rows.shape[1]
        cosine = torch.bmm(rows, cols.mT)
        q = 2.0 - 2.0 * cosine
        q.diagonal(dim1=1, dim2=2).fill_(2.0)
        holds &= ((q >= NEAR) & (q <= 4.0 - NEAR)).flatten(1).all(1)
        value, slope = term.folded(q.clamp_(NEAR, 4.0 - NEAR), NEAR)
        for part in (value, slope):
            part.diagonal(dim1=1, dim2=2).fill_(0.0)
        total += value[..., :seam].sum((1, 2), dtype=torch.float64) / 2.0 + value[..., seam:].sum((1, 2), dtype=torch.float64)
        pulled = cosine.mul_(slope)
        radial[:, start:stop] += pulled.sum(2, keepdim=True)
        radial[:, stop:] += pulled[..., seam:].sum(1).unsqueeze(2)
        grad[:, start:stop].baddbmm_(slope, cols)
        grad[:, stop:].baddbmm_(slope[..., seam:].mT, rows)
    grad = grad.addcmul_(x, radial, value=-1.0).mul_(-2.0 * term.scale(n) / norm)
    return (total + term.constant(n)) * term.scale(n), grad, holds & grad.isfinite().flatten(1).all(1)
