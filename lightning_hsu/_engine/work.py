"""How much of the penalty's arithmetic the steps do, where gradients are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lightning_hsu._engine.delta import Use
from lightning_hsu.measures import Measure


@dataclass
class Work:
    """The arithmetic of the steps, in FLOP."""

    done: float = 0.0
    whole: float = 0.0
    _flops: dict[tuple[Measure, int, int], float] = field(default_factory=dict)

    def add(self, use: Use) -> None:
        """Count a layer at a step."""
        groups, n, d = use.layer.target.shape
        key = (use.layer.measure, n, d)
        if key not in self._flops:
            self._flops[key] = use.layer.measure.grad_flops(n, d)
        flops = groups * self._flops[key]
        self.whole += flops
        if use.is_due:
            self.done += flops

    def take_share(self) -> float:
        """The part that was done, since this was last asked."""
        share = self.done / self.whole if self.whole > 0 else math.nan
        self.done = self.whole = 0.0
        return share
