"""The back end "cudagraph": torch on a GPU, captured once and replayed as one graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

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

_KEPT = 4
"""CUDA graphs kept with their results, such as for the measures and optimizers of a model."""

Stacks = Sequence[Sequence[GradientUpdate]]


class CudaGraphBackend(Backend):
    """Replays the gradients of all layers as one CUDA graph; weights must stay in place."""

    name: ClassVar[str] = "cudagraph"

    def __init__(self) -> None:
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, list[StackGradient]]] = {}

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
        if key not in self._graphs:
            while len(self._graphs) >= _KEPT:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = _captured(stacks, term)
        graph, found = self._graphs[key]
        graph.replay()
        return found


def _captured(stacks: Stacks, term: PairTerm) -> tuple[torch.cuda.CUDAGraph, list[StackGradient]]:
    """A graph that computes the gradients of all stacks, and the tensors that it writes them to."""
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
        with torch.cuda.graph(graph):
            found = [gradients_without_sync(stack_neurons(updates), term) for updates in stacks]
    return graph, found
