"""The back end "cudagraph": torch on a GPU, captured once and replayed as one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_hsu._core.backend import VARIABLE, Backend
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.pairwise import avoids_sync
from lightning_hsu._core.precision import exact_arithmetic
from lightning_hsu._core.updates import GradientUpdate, stack_neurons
from lightning_hsu._core.without_sync import (
    StackGradient,
    add_where_valid,
    gradients_without_sync,
    stacks_of,
)

_KEPT = 32
"""CUDA graphs kept with their results: one for each measure and optimizer of each model."""

Stacks = Sequence[Sequence[GradientUpdate]]


@dataclass(frozen=True)
class _Captured:
    """A graph, the tensors that it writes its results to, and the memory that it reads."""

    graph: torch.cuda.CUDAGraph
    found: list[StackGradient]
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
        return avoids_sync(update.w, term)

    def add_pair_gradients(self, updates: Sequence[GradientUpdate], term: PairTerm) -> None:
        """Replay one graph for each device; recompute groups with near pairs by the exact way."""
        by_device: dict[torch.device, list[GradientUpdate]] = {}
        for update in updates:
            by_device.setdefault(update.w.device, []).append(update)
        for members in by_device.values():
            stacks = stacks_of(members)
            add_where_valid(stacks, self._replay(stacks, term), term)

    def _replay(self, stacks: Stacks, term: PairTerm) -> list[StackGradient]:
        """Gradients of all stacks, from a graph captured when these weights first appeared.

        The next replay overwrites what this one returns.
        """
        weights = []
        for updates in stacks:
            for update in updates:
                w = update.w
                weights.append((w.data_ptr(), w.shape, w.stride(), w.dtype))
        key = (term, tuple(weights))
        captured = self._graphs.pop(key, None)
        if captured is None or captured.is_dead:
            self._make_room()
            captured = _captured(stacks, term)
        self._graphs[key] = captured
        captured.graph.replay()
        return captured.found

    def _make_room(self) -> None:
        """Drop the graphs of weights that are gone, and the least recently used above the limit."""
        self._graphs = {key: one for key, one in self._graphs.items() if not one.is_dead}
        while len(self._graphs) >= _KEPT:
            del self._graphs[next(iter(self._graphs))]


def _captured(stacks: Stacks, term: PairTerm) -> _Captured:
    """Capture a graph that computes the gradients of all stacks."""
    first = stacks[0][0].w
    graph = torch.cuda.CUDAGraph()
    with exact_arithmetic(first), torch.cuda.device(first.device):
        # Run once before the capture, which must not contain what libraries set up at first use.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for updates in stacks:
                gradients_without_sync(stack_neurons(updates), term)
        torch.cuda.current_stream().wait_stream(side)
        # Other threads may go on: one that pins memory would break a capture of the whole process.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = [gradients_without_sync(stack_neurons(updates), term) for updates in stacks]
    weights = []
    for updates in stacks:
        for update in updates:
            storage = update.entries.untyped_storage()
            weights.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]
    return _Captured(graph, found, weights)
