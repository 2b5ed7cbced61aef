"""Gradients of mean pair energies by themselves, to be weighted and added at another time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._core.backend import active
from lightning_hsu._core.foreach import (
    TorchBackend,
    add_pair_gradients,
    how_many_together,
    stack_gradient,
)
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.pairwise import avoids_sync
from lightning_hsu._core.updates import GradientUpdate, add_to_layers, chunks, stack_neurons


@dataclass(eq=False)
class RawGradients:
    """The gradients of layers of one shape, not yet weighted.

    Args:
        places: Which of the layers these are.
        grad: Gradients of their groups' energies, shape (k * b, n, d) for k layers of b groups.
        norm: Norms of their neurons, shape (k * b, n, 1).
        may_overflow: Whether squares of the gradients' entries may leave the range of the dtype.
    """

    places: list[int]
    grad: Tensor
    norm: Tensor
    may_overflow: bool = False

    def parts(self) -> tuple[Tensor, ...]:
        """The gradients (b, n, d) of the layers, one by one: views."""
        return self.grad.view(len(self.places), -1, *self.grad.shape[1:]).unbind()

    def only(self, places: Sequence[int]) -> RawGradients:
        """The same of some of the layers, by their places in the stack."""
        if len(places) == len(self.places):
            return self
        parts, norms = self.parts(), self.norm.view(len(self.places), -1, *self.norm.shape[1:])
        return RawGradients(
            [self.places[place] for place in places],
            torch.cat([parts[place] for place in places]),
            torch.cat([norms[place] for place in places]),
            self.may_overflow,
        )

    def add_to(self, updates: Sequence[GradientUpdate]) -> None:
        """Add the gradients to their layers, weighted as the updates say; they are overwritten.

        The updates may have other limits and scales than those at the time of the computation, and
        must stand in the order of ``places``.
        """
        groups = len(self.grad) // len(self.places)
        start = 0
        while start < len(updates):
            stop = start + 1
            while stop < len(updates) and _alike(updates[start], updates[stop]):
                stop += 1
            part = slice(start * groups, stop * groups)
            grad, norm = self.grad[part], self.norm[part]
            add_to_layers(updates[start:stop], grad, norm, may_overflow=self.may_overflow)
            start = stop


def raw_gradients(updates: Sequence[GradientUpdate], term: PairTerm) -> list[RawGradients]:
    """The gradients of layers; what the updates say of scales, limits and targets is not used.

    Args:
        updates: The layers.
        term: The kernel.
    """
    backend = active()
    with torch.no_grad():
        if isinstance(backend, TorchBackend):
            return _by_torch(updates, term)
        return _through_buffers(updates, term)


def _by_torch(updates: Sequence[GradientUpdate], term: PairTerm) -> list[RawGradients]:
    """The gradients by plain torch, in the same stacks as when they are added at once."""
    found = []
    left = []
    for members in _of_one_shape(updates):
        first = updates[members[0]].w
        if avoids_sync(first, term):
            left += members
            continue
        for some in chunks(members, how_many_together(first)):
            w = stack_neurons([updates[place] for place in some])
            grad, norm, value, may_overflow = stack_gradient(w, term)
            if value is not None:
                grad.div_(torch.where(value > 0, value, 1.0)[:, None, None].to(grad.dtype))
            found.append(RawGradients(list(some), grad, norm, may_overflow))
    if left:
        others = _through_buffers([updates[place] for place in left], term)
        for one in others:
            one.places = [left[place] for place in one.places]
        found += others
    return found


def _through_buffers(updates: Sequence[GradientUpdate], term: PairTerm) -> list[RawGradients]:
    """The gradients by whichever back end takes the layers, added to zeros."""
    found = []
    alone = []
    for members in _of_one_shape(updates):
        w = stack_neurons([updates[place] for place in members])
        grad = torch.zeros_like(w)
        norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        raw = RawGradients(members, grad, norm, may_overflow=True)
        for place, out in zip(members, raw.parts(), strict=True):
            update = updates[place]
            alone.append(GradientUpdate(update.w, out, 1.0))
        found.append(raw)
    add_pair_gradients(alone, term)
    return found


def _of_one_shape(updates: Sequence[GradientUpdate]) -> list[list[int]]:
    """The places of the updates, grouped by what can be stacked."""
    found: dict[object, list[int]] = {}
    for place, update in enumerate(updates):
        w = update.entries
        found.setdefault((update.shape, w.shape, w.dtype, w.device), []).append(place)
    return list(found.values())


def _alike(one: GradientUpdate, other: GradientUpdate) -> bool:
    """Whether two updates weight their gradients in the same way."""
    if one.scale != other.scale or one.grad_scale != other.grad_scale:
        return False
    if isinstance(one.limit, Tensor) or isinstance(other.limit, Tensor):
        return one.limit is other.limit
    return one.limit == other.limit
