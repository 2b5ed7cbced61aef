"""The back end "cudagraph": torch on a GPU, captured once and replayed as one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_hsu._core.backend import VARIABLE, Backend
from lightning_hsu._core.batches import Batch, batches_of
from lightning_hsu._core.foreach import note_crowded, without_crowded
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.pairwise import avoids_sync
from lightning_hsu._core.precision import bf16_allowed, gradient_arithmetic
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu._core.without_sync import (
    BatchGradient,
    add_batch,
    gradients_without_sync,
)

_KEPT = 32
"""CUDA graphs kept with their results: one for each measure and optimizer of each model."""


@dataclass(frozen=True)
class _Captured:
    """A graph, the tensors that it writes its results to, and the memory that it reads."""

    graph: torch.cuda.CUDAGraph
    found: list[BatchGradient]
    weights: list[StorageWeakRef]

    @property
    def is_dead(self) -> bool:
        """Whether some of its weights are gone: then no step can need it again."""
        return any(one.expired() for one in self.weights)  # type: ignore[no-untyped-call]


class CudaGraphBackend(Backend):
    """Replays the gradients of all layers as one CUDA graph; weights must stay in place."""

    name: ClassVar[str] = "cudagraph"

    def __init__(self) -> None:
        self._graphs: dict[object, _Captured] = {}  # the least recently used comes first

    def check_machine(self) -> None:
        """Require a CUDA device."""
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"{VARIABLE} is 'cudagraph', but torch sees no CUDA device; unset it"
            )

    def takes_update(self, update: GradientUpdate, term: PairTerm) -> bool:
        """Layers on a GPU whose gradient needs no synchronisation."""
        return avoids_sync(update, term)

    def add_pair_gradients(self, updates: Sequence[GradientUpdate], term: PairTerm) -> None:
        """Replay one graph for each device; known crowded layers go the exact way."""
        by_device: dict[torch.device, list[tuple[GradientUpdate, PairTerm]]] = {}
        for one in without_crowded([(update, term) for update in updates]):
            by_device.setdefault(one[0].entries.device, []).append(one)
        for members in by_device.values():
            batches = batches_of(members)
            for batch, found in zip(batches, self._replay(batches, term), strict=True):
                add_batch(batch, found)
                note_crowded(batch, found)

    def _replay(self, batches: Sequence[Batch], term: PairTerm) -> list[BatchGradient]:
        """Gradients of all batches, from a graph captured when these weights first appeared.

        The next replay overwrites what this one returns.
        """
        weights = []
        for batch in batches:
            for update in batch.updates:
                w = update.entries
                weights.append((w.data_ptr(), w.shape, w.stride(), w.dtype))
        key = (term, bf16_allowed(), tuple(weights))
        captured = self._graphs.pop(key, None)
        if captured is None or captured.is_dead:
            self._make_room()
            captured = _captured(batches)
        self._graphs[key] = captured
        captured.graph.replay()
        return captured.found

    def _make_room(self) -> None:
        """Drop the graphs of weights that are gone, and the least recently used above the limit."""
        self._graphs = {key: one for key, one in self._graphs.items() if not one.is_dead}
        while len(self._graphs) >= _KEPT:
            del self._graphs[next(iter(self._graphs))]


def _captured(batches: Sequence[Batch]) -> _Captured:
    """Capture a graph that computes the gradients of all batches."""
    first = batches[0].updates[0].entries
    graph = torch.cuda.CUDAGraph()
    with gradient_arithmetic(first), torch.cuda.device(first.device):
        # Run once before the capture, which must not contain what libraries set up at first use.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for batch in batches:
                gradients_without_sync(batch)
        torch.cuda.current_stream().wait_stream(side)
        # Other threads may go on: one that pins memory would break a capture of the whole process.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = [gradients_without_sync(batch) for batch in batches]
    weights = []
    for batch in batches:
        for update in batch.updates:
            storage = update.entries.untyped_storage()
            weights.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]
    return _Captured(graph, found, weights)
