"""The back end "triton": pair gradients of many layers in four launches, neighbours in one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from lightning_hsu._core.backend import Backend, LargestTwo
from lightning_hsu._core.kernel import FORMULAS, PairTerm
from lightning_hsu._core.near import NEAR
from lightning_hsu._core.pairwise import too_steep
from lightning_hsu._core.triton import machine
from lightning_hsu._core.triton.self_check import SelfCheck
from lightning_hsu._core.updates import GradientUpdate


class TritonBackend(Backend):
    """Compiled kernels. Triton is imported when the first layer goes through them."""

    name: ClassVar[str] = "triton"

    def __init__(self) -> None:
        self._check = SelfCheck()

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
        """Launch the kernels for all layers of a dtype and device at once."""
        from lightning_hsu._core.triton import launch

        launch.add_pair_gradients(updates, term)

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
