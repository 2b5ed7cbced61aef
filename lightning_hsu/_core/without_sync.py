"""Pair gradients of layers on a GPU without host-device synchronisation.

Each check on the device ("is any pair near?") would make the host wait for the answer. Here the
answers are computed along with the results. The caller reads all answers at once, and computes the
groups that have near pairs or rows of unusual norm again, by the exact way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.near import NEAR
from lightning_hsu._core.pairwise import pair_energy
from lightning_hsu._core.sphere import LONGEST, SHORTEST
from lightning_hsu._core.updates import GradientUpdate, add_to_layers, alike, chunks, stack_neurons

_PANEL_ENTRIES = 2**26
"""Gram entries held at once: 256 MiB in float32."""

_STACK_ENTRIES = 2**26
"""Entries of the layers of one shape that are computed together."""


class StackGradient(NamedTuple):
    """The gradients of a stack of neurons, and for which of its groups they are valid.

    Args:
        grad: Gradients of the mean energies, shape (b, n, d).
        norm: Norms of the neurons, shape (b, n, 1).
        value: Mean energies (b,) in float64 if their logarithm is minimised, else None.
        valid: Groups without near (or nearly opposite) pairs and with norms between
            ``SHORTEST`` and ``LONGEST``, bool, shape (b,). The other groups' results are undefined.
    """

    grad: Tensor
    norm: Tensor
    value: Tensor | None
    valid: Tensor


def stacks_of(updates: Sequence[GradientUpdate]) -> list[Sequence[GradientUpdate]]:
    """Group the updates into stacks of layers of one shape that fit in memory together."""
    stacks: list[Sequence[GradientUpdate]] = []
    for members in alike(updates):
        count = max(1, _STACK_ENTRIES // max(1, members[0].w.numel()))
        stacks += chunks(members, count)
    return stacks


def gradients_without_sync(w: Tensor, term: PairTerm) -> StackGradient:
    """Compute the same as :func:`pair_energy` for neurons without near pairs or unusual norms.

    Args:
        w: Neurons, shape (b, n, d), float32 or float64, n >= 2.
        term: The kernel; not too steep for float32.
    """
    b, n, _ = w.shape
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    valid = ((norm > SHORTEST) & (norm < LONGEST)).flatten(1).all(1)
    x = w / norm
    grad = torch.zeros_like(x)
    radial = torch.zeros_like(norm)
    total = torch.zeros(b, dtype=torch.float64, device=w.device)
    height = max(1, min(n, _PANEL_ENTRIES // (b * n)))
    for start in range(0, n, height):
        stop = min(start + height, n)
        seam = stop - start  # columns before it hold each pair twice
        rows, cols = x[:, start:stop], x[:, start:]
        cosine = torch.bmm(rows, cols.mT)
        q = 2.0 - 2.0 * cosine
        q.diagonal(dim1=1, dim2=2).fill_(2.0)
        valid &= ((q >= NEAR) & (q <= 4.0 - NEAR)).flatten(1).all(1)
        value, slope = term.folded(q.clamp_(NEAR, 4.0 - NEAR), NEAR)
        slope.diagonal(dim1=1, dim2=2).fill_(0.0)
        if term.logarithm:
            value.diagonal(dim1=1, dim2=2).fill_(0.0)
            total += value[..., :seam].sum((1, 2), dtype=torch.float64) / 2.0
            total += value[..., seam:].sum((1, 2), dtype=torch.float64)
        pulled = cosine.mul_(slope)
        radial[:, start:stop] += pulled.sum(2, keepdim=True)
        radial[:, stop:] += pulled[..., seam:].sum(1).unsqueeze(2)
        grad[:, start:stop].baddbmm_(slope, cols)
        grad[:, stop:].baddbmm_(slope[..., seam:].mT, rows)
    grad.addcmul_(x, radial, value=-1.0).mul_(-2.0 * term.scale(n) / norm)
    energy = None
    if term.logarithm:
        energy = (total + term.constant(n)) * term.scale(n)
    return StackGradient(grad, norm, energy, valid)


def add_where_valid(
    stacks: Sequence[Sequence[GradientUpdate]], found: Iterable[StackGradient], term: PairTerm
) -> None:
    """Add the gradients of stacks to their layers; recompute invalid groups by the exact way.

    Args:
        stacks: The layers, a list for each stack.
        found: The gradients of each stack, which are not changed; a generator yields one stack at a
            time.
        term: The kernel.
    """
    answers = []
    for updates, (grad, norm, value, valid) in zip(stacks, found, strict=True):
        add_to_layers(updates, torch.where(valid[:, None, None], grad, 0.0), norm, value)
        answers.append(valid)
    for updates, valid in zip(stacks, answers, strict=True):  # the host waits only now
        groups = len(updates[0].w)
        for place, is_valid in enumerate(valid.tolist()):
            if not is_valid:
                update = updates[place // groups]
                add_exactly([update.group(place % groups)], term)


def add_exactly(updates: Sequence[GradientUpdate], term: PairTerm) -> None:
    """Add the gradients of layers that differ in ``w`` and ``out`` only, near pairs included."""
    w = stack_neurons(updates)
    value, grad = pair_energy(w, term)
    assert grad is not None
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    energy = value if term.logarithm else None
    add_to_layers(updates, grad, norm, energy, may_overflow=True)
