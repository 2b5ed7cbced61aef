"""The gradients of many layers at once, weighted and added to their targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu._core.backend import Backend, active
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.pairwise import avoids_sync, pair_energy, small_pair_gradient
from lightning_hsu._core.precision import exact_arithmetic
from lightning_hsu._core.updates import (
    GradientUpdate,
    add_to_layers,
    alike,
    chunks,
    shortening,
    stack_neurons,
)
from lightning_hsu._core.without_sync import (
    StackGradient,
    add_where_valid,
    gradients_without_sync,
    stacks_of,
)

__all__ = ["SMALL", "TorchBackend", "add_pair_gradients", "shortening"]

SMALL = 2**16
"""Layers with up to this many entries are stacked by shape: there calls dominate the cost."""

_GRAM_ENTRIES = 2**22
"""Gram entries of the layers in a stack, few enough to stay in a cache."""


def add_pair_gradients(updates: Sequence[GradientUpdate], term: PairTerm) -> None:
    """Add the gradients of mean pair energies, many layers at once.

    The active back end computes the layers that it takes, and plain torch the others.

    Args:
        updates: The layers; no two of them add to the same entries.
        term: The kernel.
    """
    backend = active()
    with torch.no_grad():
        if isinstance(backend, TorchBackend):
            backend.add_pair_gradients(updates, term)
            return
        taken, others = [], []
        for update in updates:
            if backend.takes_update(update, term):
                taken.append(update)
            else:
                others.append(update)
        if taken:
            backend.add_pair_gradients(taken, term)
        TorchBackend().add_pair_gradients(others, term)


class TorchBackend(Backend):
    """The default: plain torch, on any device and for any kernel."""

    name: ClassVar[str] = "torch"

    def check_machine(self) -> None:
        """Runs everywhere."""

    def takes_update(self, update: GradientUpdate, term: PairTerm) -> bool:
        """Every layer."""
        return True

    def add_pair_gradients(self, updates: Sequence[GradientUpdate], term: PairTerm) -> None:
        """Add small layers of one shape together, and layers on a GPU without synchronisation."""
        without_sync: list[GradientUpdate] = []
        for members in alike(updates):
            w = members[0].w
            if avoids_sync(w, term):
                without_sync += members
                continue
            for some in chunks(members, how_many_together(w)):
                grad, norm, value, may_overflow = stack_gradient(stack_neurons(some), term)
                add_to_layers(some, grad, norm, value, may_overflow=may_overflow)
        if without_sync:
            stacks = stacks_of(without_sync)
            add_where_valid(stacks, _gradients(stacks, term), term)


def how_many_together(w: Tensor) -> int:
    """How many layers of the shape (b, n, d) of w go together."""
    b, n, d = w.shape
    if b * n * d > SMALL:
        return 1
    return max(1, _GRAM_ENTRIES // max(1, b * n * n))


def stack_gradient(w: Tensor, term: PairTerm) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """The gradient of a stack of neurons, by the shortest way that is exact.

    Args:
        w: Neurons, shape (b, n, d), float32 or float64, without a graph.
        term: The kernel.

    Returns:
        The gradient (b, n, d), the norms of the neurons (b, n, 1), the mean energies (b,) by which
        the gradient is still to be divided if their logarithm is minimised, and whether squares of
        the gradient's entries may leave the range of the dtype.
    """
    with exact_arithmetic(w):
        found = small_pair_gradient(w, term)
    if found is not None:
        return *found, False
    value, grad = pair_energy(w, term)
    assert grad is not None
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    return grad, norm, value if term.logarithm else None, True


def _gradients(
    stacks: Sequence[Sequence[GradientUpdate]], term: PairTerm
) -> Iterator[StackGradient]:
    """The gradients of stacks, one stack at a time."""
    for updates in stacks:
        with exact_arithmetic(updates[0].w):
            found = gradients_without_sync(stack_neurons(updates), term)
        yield found
