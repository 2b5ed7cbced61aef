"""The smallest angle between neurons, a panel of rows at a time, exact for near pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hsu.core.near import NEAR
from lightning_hsu.core.pairwise import PANEL
from lightning_hsu.core.precision import exact_arithmetic, with_float64, working_dtype
from lightning_hsu.core.sphere import squared_chords, unit_rows


def smallest_angle(w: Tensor, *, half_space: bool = False) -> Tensor:
    """Smallest angle between two neurons, in radians.

    Args:
        w: Neurons, shape (..., n, d). Zero and non-finite rows take no part.
        half_space: Measure angles between lines, so that opposite neurons coincide.

    Returns:
        Angles (...) in [0, pi] (half space: [0, pi / 2]), float64; NaN where fewer than two neurons are left.
    """
    stack = with_float64(w.detach()).reshape(-1, *w.shape[-2:])
    with torch.no_grad(), exact_arithmetic(stack):
        angles = [_of_group(group.to(working_dtype(w.dtype)), half_space) for group in stack]
    return torch.stack(angles).reshape(w.shape[:-2])


def _of_group(w: Tensor, half_space: bool) -> Tensor:
    """Smallest angle () of one group w (n, d)."""
    x, inverse_norm = unit_rows(w)
    alive = inverse_norm.squeeze(-1) > 0
    w, x = w[alive], x[alive]
    smallest = torch.full((), float("inf"), dtype=torch.float64, device=w.device)  # squared chord
    if x.shape[0] < 2:
        return smallest.fill_(float("nan"))
    for start in range(0, x.shape[0], PANEL):
        rows, cols = x[start : start + PANEL], x[start:]
        cosine = rows @ cols.T
        cosine.diagonal().fill_(0.0 if half_space else -1.0)
        if half_space:
            cosine.abs_()
        near = cosine > 1.0 - NEAR / 2
        if bool(near.any()):
            r, c = near.any(1).nonzero().squeeze(1), near.any(0).nonzero().squeeze(1)
            wanted = near[r][:, c]
            rows64, cols64 = (unit_rows(w[start + index].double())[0] for index in (r, c))
            q, p = squared_chords(rows64, cols64, wanted)
            q = torch.minimum(q, p) if half_space else q
            smallest = torch.minimum(smallest, q[wanted].amin())
        else:
            smallest = torch.minimum(smallest, 2.0 - 2.0 * cosine.amax().double())
    return 2.0 * torch.atan2(smallest.sqrt(), (4.0 - smallest).clamp_min(0.0).sqrt())
