"""How much of the penalty's arithmetic the steps do, where gradients are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from lightning_hsu._checks import plain_number
from lightning_hsu._engine.delta import Use


@dataclass
class Work:
    """The arithmetic of the steps, in FLOP.

    Args:
        done: What was computed.
        whole: What computing every layer at each step would have been.
    """

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

    def state(self) -> dict[str, float]:
        """What :func:`stored_work` takes."""
        return {"done": self.done, "whole": self.whole}


def stored_work(stored: object) -> Work | None:
    """What :meth:`Work.state` returned; None if it is anything else."""
    if not isinstance(stored, Mapping):
        return None
    numbers = [stored.get("done"), stored.get("whole")]
    if not all(map(plain_number, numbers)):
        return None
    done, whole = map(float, cast(list[float], numbers))
    return Work(done, whole) if 0 <= done <= whole else None
