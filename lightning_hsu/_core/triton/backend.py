"""The back end "triton": pair gradients of many layers in six launches, neighbours in one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lightning_hsu._core.backend import Backend, LargestTwo
from lightning_hsu._core.foreach import add_exactly
from lightning_hsu._core.kernel import FORMULAS, PairTerm
from lightning_hsu._core.near import NEAR
from lightning_hsu._core.pairwise import too_steep
from lightning_hsu._core.triton import machine
from lightning_hsu._core.triton.self_check import SelfCheck
from lightning_hsu._core.updates import GradientUpdate

if TYPE_CHECKING:
    from lightning_hsu._core.triton.launch import Coincident

_KEPT = 32
"""Answers kept, of as many optimizers and kernels."""


class TritonBackend(Backend):
    """Compiled kernels. Triton is imported when the first layer goes through them."""

    name: ClassVar[str] = "triton"

    def __init__(self) -> None:
        self._check = SelfCheck()
        self._coincident: dict[object, list[Coincident]] = {}

    def check_machine(self) -> None:
        """Require a Triton that is new enough, and a GPU or Triton's interpreter."""
        machine.check_machine()

    def takes_update(self, update: GradientUpdate, term: PairTerm) -> bool:
        """Layers in float32 or narrower, on a device that has passed the check for this kernel."""
        w = update.entries
        if not machine.takes(w) or not _is_compiled(term):
            return False
        out = update.out_entries
        if out.dtype not in machine.DTYPES or out.device != w.device:
            return False
        limit = update.limit
        if isinstance(limit, Tensor) and limit.device != w.device:
            return False
        return self._check.gradients_are_right(w.device, term)

    def add_pair_gradients(self, updates: Sequence[GradientUpdate], term: PairTerm) -> None:
        """Launch the kernels for all layers of a dtype and device at once, and wait for nothing.

        Coincident neurons have no direction between them, and the kernels leave them where they
        are. Layers that had some the last time are computed by torch, which parts them.
        """
        from lightning_hsu._core.triton import launch

        key = (term, tuple(update.entries.data_ptr() for update in updates))
        apart: set[int] = set()
        for answer in self._coincident.pop(key, ()):
            apart |= answer.found()
        taken = [update for i, update in enumerate(updates) if i not in apart]
        for i in sorted(apart):
            add_exactly([updates[i]], term)
        answers = launch.add_pair_gradients(taken, term)
        if not apart:  # the next step's positions are those of this one
            self._remember(key, answers)

    def _remember(self, key: object, answers: list[Coincident]) -> None:
        """Keep what the device will have answered by the next step; drop the oldest above a limit."""
        while len(self._coincident) >= _KEPT:
            del self._coincident[next(iter(self._coincident))]
        self._coincident[key] = answers

    def takes_rows(self, x: Tensor) -> bool:
        """Unit rows in float32 or narrower, on a device that has passed the check."""
        return machine.takes(x) and self._check.neighbours_are_right(x.device)

    def largest_two(self, x: Tensor, alive: Tensor, *, half_space: bool, every: bool) -> LargestTwo:
        """Scan all rows in one launch."""
        from lightning_hsu._core.triton import topk

        return topk.scan(x, alive, half_space=half_space, every=every)


@lru_cache
def _is_compiled(term: PairTerm) -> bool:
    """Whether a kernel is compiled, and float32 is enough for its far pairs."""
    if term.formula is None or term.formula[0] not in FORMULAS:
        return False
    return term.knee**2 <= NEAR and not too_steep(term)
