"""Gradients of mean pair energies by themselves, to be weighted and added at another time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hsu._core.backend import active
from lightning_hsu._core.batches import Batch, batches_of
from lightning_hsu._core.foreach import (
    TorchBackend,
    add_pair_gradients,
    batch_numbers,
    begin_batch,
    calm_and_crowded,
    exact_gradient,
    how_many_together,
    stack_gradient,
)
from lightning_hsu._core.group_numbers import GatheredNumbers
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.pairwise import avoids_sync
from lightning_hsu._core.updates import (
    GradientUpdate,
    StackGradient,
    add_to_layers,
    alike,
    chunks,
    stack_neurons,
    whole_gradient,
)
from lightning_hsu._core.without_sync import (
    BatchGradient,
    add_batch,
    unweighted,
)


@dataclass(eq=False)
class RawGradients:
    """The gradients of layers of one shape, not yet weighted.

    Args:
        places: Which of the layers these are.
        found: Their gradients.
    """

    places: list[int]
    found: StackGradient

    def copies(self) -> list[Tensor]:
        """The gradients (b, n, d) of the layers, one by one, in tensors of their own."""
        found = self.found
        grad = found.pull.clone() if found.factor is None else found.grad
        return list(grad.view(len(self.places), -1, *grad.shape[1:]).unbind())

    def tensors(self) -> list[Tensor]:
        """The tensors that it holds."""
        found = self.found
        if found.factor is None:
            return [found.pull, found.norm]
        return [found.pull, found.norm, found.factor]

    def numbers(self) -> GroupNumbers | None:
        """None: on a CPU a logging step measures by itself."""
        return None

    def only(self, places: Sequence[int]) -> list[RawGradients]:
        """The same of some of the layers, by their places in the stack."""
        if len(places) == len(self.places):
            return [self]
        part = self.found.of_layers(places, len(self.places))
        return [RawGradients([self.places[place] for place in places], part)]

    def add_to(self, updates: Sequence[GradientUpdate]) -> None:
        """Add the gradients to their layers, weighted as the updates say; call it once.

        The updates may have other limits and scales than those at the time of the computation, and
        must stand in the order of ``places``.
        """
        place_of = {id(update): place for place, update in enumerate(updates)}
        for members in alike(updates):
            places = [place_of[id(update)] for update in members]
            add_to_layers(members, self.found.of_layers(places, len(updates)))


class RawBatch:
    """The gradients of layers of any shapes on a GPU, not yet weighted; see :class:`RawGradients`.

    Args:
        places: Which of the layers these are, in the order of the batch.
        batch: The layers.
        found: Their gradients.
    """

    def __init__(self, places: list[int], batch: Batch, found: BatchGradient) -> None:
        self.places = places
        self._batch = batch
        self._found = found

    def tensors(self) -> list[Tensor]:
        """The tensors that it holds."""
        return [self._found.grad, self._found.length, self._found.norm, self._found.scale]

    def numbers(self) -> GroupNumbers | None:
        """What a logging step needs of its layers; None if that was not asked for."""
        numbers = self._found.numbers
        if numbers is None:
            return None
        return _group_numbers(self.places, self._batch, numbers)

    def copies(self) -> list[Tensor]:
        """The gradients (b, n, d) of the layers, in tensors of their own."""
        return unweighted(self._batch, self._found)

    def only(self, places: Sequence[int]) -> list[RawPart]:
        """The same of some of the layers, by their places in the batch."""
        if len(places) == len(self.places):
            return [self]
        parts = self.copies()
        return [_alone(self.places[i], parts[i], self._batch.updates[i]) for i in places]

    def add_to(self, updates: Sequence[GradientUpdate]) -> None:
        """Add the gradients to their layers, weighted as the updates say; call it once."""
        if _go_together(updates):
            add_batch(replace(self._batch, updates=list(updates)), self._found)
            return
        for part, update in zip(self.copies(), updates, strict=True):
            _alone(0, part, update).add_to([update])


RawPart = RawGradients | RawBatch


@dataclass(frozen=True, eq=False)
class GroupNumbers:
    """What a logging step needs to know of layers on a GPU.

    Args:
        places: Which of the layers these are.
        groups: How many groups each of them has.
        numbers: Their numbers, on the device.
    """

    places: list[int]
    groups: list[int]
    numbers: GatheredNumbers


def _group_numbers(places: list[int], batch: Batch, numbers: GatheredNumbers) -> GroupNumbers:
    """The numbers of a batch, with the places of its layers."""
    return GroupNumbers(places, [one.size[0] for one in batch.updates], numbers)


def group_numbers(work: Sequence[tuple[GradientUpdate, PairTerm]]) -> list[GroupNumbers]:
    """What a logging step needs of layers, as far as they are computed as layers on a GPU are.

    Their gradients are not computed.
    """
    on_gpu = []
    for place, (update, term) in enumerate(work):
        if avoids_sync(update, term):
            on_gpu.append(place)
    if not on_gpu:
        return []
    found = []
    with torch.no_grad():
        layers, place_of = _chosen(_neutral(work), on_gpu)
        for batch, numbers in batch_numbers(layers):
            places = [place_of[id(update)] for update in batch.updates]
            found.append(_group_numbers(places, batch, numbers))
    return found


@torch.no_grad()
def raw_gradients(
    work: Sequence[tuple[GradientUpdate, PairTerm]], *, stats: bool = False
) -> Iterator[RawPart]:
    """The gradients of layers; what the updates say of scales, limits and targets is not used.

    A stack is computed when it is asked for, so that they need not be in memory all at once.

    Args:
        work: The layers, with their kernels.
        stats: Also compute, of layers on a GPU, what a logging step needs.
    """
    neutral = _neutral(work)
    backend = active()
    if not isinstance(backend, TorchBackend):
        yield from _through_buffers(neutral)
        return
    on_gpu = []
    for members in _of_one_shape(neutral):
        first, term = neutral[members[0]]
        if backend.takes_in_batches(first, term):
            on_gpu += members
        else:
            yield from _in_stacks(neutral, members)
    if on_gpu:
        yield from _in_batches(neutral, on_gpu, stats=stats)


def _neutral(
    work: Sequence[tuple[GradientUpdate, PairTerm]],
) -> list[tuple[GradientUpdate, PairTerm]]:
    """The same layers with updates that only tell the neurons."""
    found = []
    for update, term in work:
        alone = GradientUpdate(update.entries, update.entries, 1.0, shape=update.shape)
        found.append((alone, term))
    return found


def _in_stacks(
    work: Sequence[tuple[GradientUpdate, PairTerm]], members: Sequence[int]
) -> Iterator[RawGradients]:
    """The gradients of layers of one shape, in the same stacks as when they are added at once."""
    first, term = work[members[0]]
    for some in chunks(members, how_many_together(first.size)):
        w = stack_neurons([work[place][0] for place in some])
        yield RawGradients(list(some), stack_gradient(w, term))


def _in_batches(
    work: Sequence[tuple[GradientUpdate, PairTerm]], chosen: Sequence[int], *, stats: bool
) -> Iterator[RawPart]:
    """The gradients of layers on a GPU, without synchronisation but for crowded layers."""
    layers, place_of = _chosen(work, chosen)
    calm, crowded = calm_and_crowded(layers)
    for update, term in crowded:
        w = stack_neurons([update])
        yield RawGradients([place_of[id(update)]], exact_gradient(w, term))
    for batch in batches_of(calm):
        places = [place_of[id(update)] for update in batch.updates]
        yield RawBatch(places, batch, begin_batch(batch, stats=stats))


def _chosen(
    work: Sequence[tuple[GradientUpdate, PairTerm]], chosen: Sequence[int]
) -> tuple[list[tuple[GradientUpdate, PairTerm]], dict[int, int]]:
    """Some of the layers, and the places of all of these by the ids of their updates."""
    layers = []
    place_of = {}
    for place in chosen:
        layers.append(work[place])
        place_of[id(work[place][0])] = place
    return layers, place_of


def _alone(place: int, grad: Tensor, update: GradientUpdate) -> RawGradients:
    """The gradient (b, n, d) of one layer."""
    return RawGradients([place], whole_gradient(grad, update.w))


def _through_buffers(work: Sequence[tuple[GradientUpdate, PairTerm]]) -> list[RawPart]:
    """The gradients of layers by whichever back end takes them, added to zeros."""
    found: list[RawPart] = []
    alone: dict[PairTerm, list[GradientUpdate]] = {}
    for members in _of_one_shape(work):
        w = stack_neurons([work[place][0] for place in members])
        grad = torch.zeros_like(w)
        outs = grad.view(len(members), -1, *grad.shape[1:]).unbind()
        for place, out in zip(members, outs, strict=True):
            update, term = work[place]
            alone.setdefault(term, []).append(GradientUpdate(update.w, out, 1.0))
        found.append(RawGradients(members, whole_gradient(grad, w)))
    for term, updates in alone.items():
        add_pair_gradients(updates, term)
    return found


def _of_one_shape(work: Sequence[tuple[GradientUpdate, PairTerm]]) -> list[list[int]]:
    """The places of layers with neutral updates, grouped by what can be stacked."""
    place_of = {}
    by_term: dict[PairTerm, list[GradientUpdate]] = {}
    for place, (update, term) in enumerate(work):
        place_of[id(update)] = place
        by_term.setdefault(term, []).append(update)
    found = []
    for updates in by_term.values():
        for members in alike(updates):
            found.append([place_of[id(update)] for update in members])
    return found


def _go_together(updates: Sequence[GradientUpdate]) -> bool:
    """Whether a batch can be added at once: limits may differ if all of them are numbers."""
    first = updates[0]
    kinds = {None if one.task is None else one.task.allows for one in updates}
    if len(kinds) > 1:
        return False
    for one in updates:
        if one.grad_scale != first.grad_scale:
            return False
        on_device = isinstance(one.limit, Tensor) or isinstance(first.limit, Tensor)
        if on_device and one.limit is not first.limit:
            return False
    return True
