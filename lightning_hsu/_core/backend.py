"""Back ends, which compute the gradients of many layers and the nearest neighbours of neurons.

Plain torch is the default. The environment variable ``LIGHTNING_HSU_BACKEND`` chooses another:
"compiled" is plain torch with torch.compile between the products, "triton" has kernels of its own,
"cudagraph" replays plain torch's launches. None of them has been measured on a GPU yet, so none is
on by default, and what is compiled is taken on a device only after it has computed a small layer
there as float64 does (``trial.py``). ``python -m benchmarks.gpu --all`` measures them.

A new back end is one module with a subclass of :class:`Backend` and one line in the registry.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import ClassVar

from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.updates import GradientUpdate

VARIABLE = "LIGHTNING_HSU_BACKEND"
"""The environment variable that names the back end."""

_REGISTRY = {
    "torch": "lightning_hsu._core.foreach:TorchBackend",
    "compiled": "lightning_hsu._core.compiled:CompiledBackend",
    "cudagraph": "lightning_hsu._core.cudagraph:CudaGraphBackend",
    "triton": "lightning_hsu._core.triton.backend:TritonBackend",
}
"""Module and class of each back end. A module is imported when its back end is first asked for."""

LargestTwo = tuple[Tensor, Tensor, Tensor]
"""Largest entry of every row, its column, and the second largest entry; (b, n) each."""


class Backend(ABC):
    """A way to compute. Plain torch computes whatever a back end does not take."""

    name: ClassVar[str]

    @abstractmethod
    def check_machine(self) -> None:
        """Raise a RuntimeError that says what to do if this machine cannot run the back end.

        It is asked until it does not raise, then no more.
        """

    @abstractmethod
    def takes_update(self, update: GradientUpdate, term: PairTerm) -> bool:
        """Whether :meth:`add_pair_gradients` can compute such a layer's gradient."""

    @abstractmethod
    def add_pair_gradients(self, updates: Sequence[GradientUpdate], term: PairTerm) -> None:
        """Add the gradients of mean pair energies.

        Args:
            updates: Layers that :meth:`takes_update` has accepted, at least one.
            term: The kernel.
        """

    def takes_rows(self, x: Tensor) -> bool:
        """Whether :meth:`largest_two` can compute such unit rows (b, n, d)."""
        return False

    def largest_two(self, x: Tensor, alive: Tensor, *, half_space: bool, every: bool) -> LargestTwo:
        """Find the largest two cosines of every row, like the function of the same name.

        Args:
            x: Unit rows, shape (b, n, d), that :meth:`takes_rows` has accepted.
            alive: Rows that take part, bool, shape (b, n).
            half_space: Compare absolute cosines.
            every: Compare every row with all others; otherwise only with those after it.
        """
        raise NotImplementedError(f"the back end {self.name!r} has no search for neighbours")


def active() -> Backend:
    """Return the back end that the environment variable names; plain torch if it is not set.

    Raises:
        ValueError: if the variable names no back end.
        RuntimeError: if this machine cannot run it.
    """
    name = os.environ.get(VARIABLE, "torch")
    if name not in _REGISTRY:
        raise ValueError(
            f"the environment variable {VARIABLE} must be one of {', '.join(_REGISTRY)}; "
            f"got {name!r}"
        )
    return _load(name)


@lru_cache
def _load(name: str) -> Backend:
    """The back end, made and checked once; it is kept, and an error is not."""
    module, _, kind = _REGISTRY[name].partition(":")
    backend: Backend = getattr(import_module(module), kind)()
    backend.check_machine()
    return backend
