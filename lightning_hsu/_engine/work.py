"""How much of the penalty's arithmetic the steps do, where gradients are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_hsu._engine.delta import Use


@dataclass
class Work:
    """The arithmetic of the steps, in FLOP."""

    done: float = 0.0
    whole: float = 0.0

    def add(self, use: Use) -> None:
        """Count a layer at a step."""
        flops = use.layer.grad_flops
        self.whole += flops
        if use.is_due:
            self.done += flops

    def share(self, *, reset: bool) -> float:
        """The part that was done, since this was last ``reset``; NaN for no step."""
        share = self.done / self.whole if self.whole > 0 else math.nan
        if reset:
            self.done = self.whole = 0.0
        return share
