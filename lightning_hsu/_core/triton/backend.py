"""The back end "triton": pair gradients of many layers in four launches, neighbours in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_hsu._core.backend import Backend, LargestTwo
from lightning_hsu._core.kernel import FORMULAS, PairTerm
from lightning_hsu._core.near import NEAR
from lightning_hsu._core.pairwise import too_steep
from lightning_hsu._core.triton import machine
from lightning_hsu._core.updates import GradientUpdate


class TritonBackend(Backend):
    """Compiled kernels. Triton is imported when the first layer goes through them."""

    name: ClassVar[str] = "triton"

    def check_machine(self) -> None:
        """Require a Triton that is new enough, and a GPU or Triton's interpreter."""
        machine.check_machine()

    def takes_update(self, update: GradientUpdate, term: PairTerm) -> bool:
        """Layers in float32 or narrower, with limits on the host, and kernels that are compiled."""
        if isinstance(update.limit, Tensor):
            return False
        if not machine.takes(update.w):
            return False
        if update.out.dtype not in machine.DTYPES or update.out.device != update.w.device:
            return False
        if term.formula is None or term.formula[0] not in FORMULAS:
            return False
        return term.knee**2 <= NEAR and not too_steep(term)

    def add_pair_gradients(self, updates: Sequence[GradientUpdate], term: PairTerm) -> None:
        """Launch the kernels for all layers of a dtype and device at once."""
        from lightning_hsu._core.triton import launch

        launch.add_pair_gradients(updates, term)

    def takes_rows(self, x: Tensor) -> bool:
        """Unit rows in float32 or narrower."""
        return machine.takes(x)

    def largest_two(self, x: Tensor, alive: Tensor, *, half_space: bool, every: bool) -> LargestTwo:
        """Scan all rows in one launch."""
        from lightning_hsu._core.triton import topk

        return topk.scan(x, alive, half_space=half_space, every=every)
