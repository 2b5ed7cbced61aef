"""The gradients of many layers at once, weighted and added to their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu._core.backend import Backend, active
from lightning_hsu._core.batches import Batch, batches_of
from lightning_hsu._core.crowded import CrowdedLayers
from lightning_hsu._core.group_numbers import GatheredNumbers
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.pairwise import (
    avoids_sync,
    pair_energy,
    small_pair_gradient,
    stack_pair_gradient,
)
from lightning_hsu._core.precision import (
    exact_arithmetic,
    gradient_arithmetic,
    working_dtype,
)
from lightning_hsu._core.updates import (
    GradientUpdate,
    Scratch,
    StackGradient,
    add_to_layers,
    alike,
    chunks,
    shortening,
    stack_neurons,
    whole_gradient,
)
from lightning_hsu._core.without_sync import (
    BatchGradient,
    BatchNumbers,
    add_batch,
    gradients_without_sync,
    numbers_without_sync,
)

__all__ = [
    "SMALL",
    "TorchBackend",
    "add_all_pair_gradients",
    "add_pair_gradients",
    "shortening",
]

SMALL = 2**16
"""Layers with up to this many entries are stacked by shape: there calls dominate the cost."""

_GRAM_ENTRIES = 2**22
"""Gram entries of the layers in a stack, few enough to stay in a cache."""


_CROWDED = CrowdedLayers()
_CROWDED_MEASURED = CrowdedLayers()  # which gradients do not ask: they are the same without a log

Work = list[tuple[GradientUpdate, PairTerm]]
"""Layers with their kernels."""


def add_all_pair_gradients(by_term: Mapping[PairTerm, Sequence[GradientUpdate]]) -> None:
    """Add the gradients of mean pair energies of several kernels.

    Plain torch computes all layers on a GPU together.
    """
    backend = active()
    if not isinstance(backend, TorchBackend):
        for term, updates in by_term.items():
            add_pair_gradients(updates, term)
        return
    with torch.no_grad():
        work: Work = []
        for term, updates in by_term.items():
            work += backend.add_on_cpu(updates, term)
        if work:
            add_without_sync(work)


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
            if update.is_view and backend.takes_update(update, term):
                taken.append(update)
            else:
                others.append(update)
        limited = [update for update in taken if update.task is not None]
        if limited:
            _add_limited(backend, limited, term)
            taken = [update for update in taken if update.task is None]
        if taken:
            backend.add_pair_gradients(taken, term)
        TorchBackend().add_pair_gradients(others, term)


def _add_limited(backend: Backend, updates: Sequence[GradientUpdate], term: PairTerm) -> None:
    """Add gradients that the task's gradient limits, by way of memory for one gradient of each layer.

    A kernel that adds a row knows nothing of the length of the others.
    """
    alone = []
    for update in updates:
        w = update.w.detach()
        if w.dtype == torch.float16:  # whose range would limit what is added
            w = w.float()
        alone.append(GradientUpdate(w, torch.zeros_like(w, dtype=working_dtype(w.dtype)), 1.0))
    backend.add_pair_gradients(alone, term)
    for update, one in zip(updates, alone, strict=True):
        w = stack_neurons([update])
        add_to_layers([update], whole_gradient(one.out, w))


class TorchBackend(Backend):
    """The default: plain torch, on any device and for any kernel."""

    name: ClassVar[str] = "torch"
    compiles: ClassVar[bool] = False

    def check_machine(self) -> None:
        """Runs everywhere."""

    def takes_update(self, update: GradientUpdate, term: PairTerm) -> bool:
        """Every layer."""
        return True

    def add_pair_gradients(self, updates: Sequence[GradientUpdate], term: PairTerm) -> None:
        """Add small layers of one shape together, and layers on a GPU without synchronisation."""
        work = self.add_on_cpu(updates, term)
        if work:
            add_without_sync(work)

    def takes_on_cpu(self, update: GradientUpdate, term: PairTerm) -> bool:
        """Whether a layer on a CPU is computed in one pass with all others, as on a GPU.

        It is asked if :attr:`compiles` is set.
        """
        return False

    def takes_in_batches(self, update: GradientUpdate, term: PairTerm) -> bool:
        """Whether a layer is computed in one pass with others of any shapes."""
        return avoids_sync(update, term) or (self.compiles and self.takes_on_cpu(update, term))

    def gradients(self, batch: Batch, *, stats: bool = False) -> BatchGradient:
        """The gradients of a batch of such layers."""
        return gradients_without_sync(batch, stats=stats)

    def numbers(self, batch: Batch) -> BatchNumbers:
        """What a logging step needs of a batch of such layers, without their gradients."""
        return numbers_without_sync(batch)

    def add_on_cpu(self, updates: Sequence[GradientUpdate], term: PairTerm) -> Work:
        """Add the layers on a CPU, and those of very steep kernels; return the others."""
        work: Work = []
        scratch = Scratch()
        for members in alike(updates):
            first = members[0]
            if self.takes_in_batches(first, term):
                work += [(update, term) for update in members]
                continue
            for some in chunks(members, how_many_together(first.size)):
                add_to_layers(some, stack_gradient(stack_neurons(some), term, scratch))
        return work


def goes_in_batches(update: GradientUpdate, term: PairTerm) -> bool:
    """Whether a layer is computed together with others of any shapes, as on a GPU."""
    backend = active()
    if isinstance(backend, TorchBackend):
        return backend.takes_in_batches(update, term)
    return backend.takes_update(update, term)


def goes_without_sync(x: Tensor, size: torch.Size, term: PairTerm | None) -> bool:
    """Whether a layer on the device of x goes through torch's pass that waits for nothing.

    Args:
        x: The neurons, or a parameter that they are computed from.
        size: The shape (b, n, d) of the neurons.
        term: The kernel; None for a measure without one.
    """
    return term is not None and avoids_sync(GradientUpdate(x, x, 1.0, shape=size), term)


def add_without_sync(work: Work) -> None:
    """Add the gradients of layers on a GPU."""
    for batch in batches_of(without_crowded(work)):
        add_batch(batch, begin_batch(batch))


def begin_batch(batch: Batch, *, energy: bool = False, stats: bool = False) -> BatchGradient:
    """Compute the gradients of a batch, and note for the next step which layers are crowded.

    Args:
        batch: The layers.
        energy: Also compute the mean energies.
        stats: Also compute what a logging step needs.
    """
    backend = active()
    with gradient_arithmetic(batch.updates[0].entries):
        if isinstance(backend, TorchBackend) and backend.compiles and not energy:
            found = backend.gradients(batch, stats=stats)
        else:
            found = gradients_without_sync(batch, energy=energy, stats=stats)
    note_crowded(batch, found)
    return found


def batch_numbers(work: Work) -> list[tuple[Batch, GatheredNumbers]]:
    """What a logging step needs of layers on a GPU, without their gradients.

    Layers that are known to have too many near pairs are left out.
    """
    backend = active()
    calm, _ = _CROWDED_MEASURED.divided(work)
    numbers = []
    for batch in batches_of(calm):
        with gradient_arithmetic(batch.updates[0].entries):
            if isinstance(backend, TorchBackend):
                found = backend.numbers(batch)
            else:
                found = numbers_without_sync(batch)
        _CROWDED_MEASURED.note(batch.work, batch.layout.pieces, found.pairs)
        numbers.append((batch, found.numbers))
    return numbers


def note_crowded(batch: Batch, found: BatchGradient) -> None:
    """Note for the next step which layers of a batch have too many near pairs."""
    _CROWDED.note(batch.work, batch.layout.pieces, found.pairs)


def without_crowded(work: Work) -> Work:
    """Add layers that are known to have too many near pairs the exact way; return the others."""
    calm, crowded = calm_and_crowded(work)
    for update, term in crowded:
        add_exactly([update], term)
    return calm


def calm_and_crowded(work: Work) -> tuple[Work, Work]:
    """The layers without, and those with too many near pairs, as far as that is known."""
    return _CROWDED.divided(work)


def not_exact(work: Work) -> list[int]:
    """Places of the layers that their last pass has not computed exactly; ask a step later."""
    return _CROWDED.not_exact(work)


def how_many_together(shape: torch.Size) -> int:
    """How many layers of a shape (b, n, d) go together."""
    b, n, d = shape
    if b * n * d > SMALL:
        return 1
    return max(1, _GRAM_ENTRIES // max(1, b * n * n))


def stack_gradient(w: Tensor, term: PairTerm, scratch: Scratch | None = None) -> StackGradient:
    """The gradient of a stack of neurons, by the shortest way that is exact.

    Args:
        w: Neurons, shape (b, n, d), float32 or float64, without a graph.
        term: The kernel.
        scratch: Memory for the gradient, which the next one overwrites; None for new memory.
    """
    with exact_arithmetic(w):
        found = small_pair_gradient(w, term, scratch)
    if found is not None:
        return found
    if not term.logarithm:
        return stack_pair_gradient(w, term, scratch)
    return exact_gradient(w, term)


def exact_gradient(w: Tensor, term: PairTerm) -> StackGradient:
    """The gradient of neurons (b, n, d) with everything special, and of a logarithm."""
    value, grad = pair_energy(w, term)
    assert grad is not None
    found = whole_gradient(grad, w)
    if term.logarithm:
        found.divide_by(value)
    return found


def add_exactly(updates: Sequence[GradientUpdate], term: PairTerm) -> None:
    """Add the gradients of layers that differ in ``w`` and ``out`` only, near pairs included."""
    add_to_layers(updates, exact_gradient(stack_neurons(updates), term))
