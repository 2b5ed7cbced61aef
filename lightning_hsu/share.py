"""A coefficient that follows the task: the penalty's gradient as a fraction of the task's, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu.measures.checks import check_number
from lightning_hsu.schedules import Varying


@dataclass(frozen=True)
class Share(Varying):
    r"""A coefficient that keeps the penalty's gradient at a fraction of the task's, layer by layer.

    With running means of the two gradients' norms over the steps, ``mean <- smoothing * mean + (1 - smoothing) * norm``,

        coefficient = fraction * mean |task's gradient| / mean |penalty's gradient|, at most ``maximum``.

    The norms are reduced over ranks, without a GradScaler's factor and before the step limit; with ``apply="gradient"`` before
    Lightning's clipping, with ``"decoupled"``, after the step, behind it.
    Steps whose gradients are not finite leave the means as they are. The means are saved in checkpoints; those of another
    measure, where you change it on resuming, fade as all do.

    Args:
        fraction: Norm of the penalty's gradient over that of the task's, > 0.
        smoothing: Weight of the past in [0, 1); 0 takes each step by itself.
        maximum: The largest coefficient, > 0, where the penalty's gradient vanishes.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> from lightning_hsu import HypersphericalUniformity, Share
        >>> callback = HypersphericalUniformity(coefficient=Share(0.05))
    """

    fraction: float = 0.05
    smoothing: float = 0.9
    maximum: float = 1e4

    def __post_init__(self) -> None:
        for name, value in (("fraction", self.fraction), ("maximum", self.maximum)):
            check_number(f"Share's {name}", value, "a finite number > 0", lambda number: number > 0)
        check_number("Share's smoothing", self.smoothing, "in [0, 1)", lambda smoothing: 0 <= smoothing < 1)

    def label(self) -> str:
        """The fraction."""
        return f"share {self.fraction:g}"


class ShareMeans:
    """The running means of the gradients' norms by layer, (task's, penalty's); the same on all ranks."""

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}

    def update(self, name: str, share: Share, task: Tensor, penalty: Tensor) -> None:
        """Take the norms of one step into a layer's means, unless they are not finite."""
        norms = torch.stack([task, penalty])
        known = self.means.get(name)
        known = torch.zeros_like(norms) if known is None else known.to(norms)
        mixed = share.smoothing * known + (1.0 - share.smoothing) * norms
        self.means[name] = torch.where(torch.isfinite(norms).all(), mixed, known)

    def coefficient(self, name: str, share: Share) -> Tensor | float:
        """Return the coefficient of a layer, as a tensor that nobody has waited for; 0 before the first step."""
        if name not in self.means:
            return 0.0
        task, penalty = self.means[name]
        value: Tensor = share.fraction * task / penalty.clamp_min(torch.finfo(penalty.dtype).tiny)
        return value.clamp_max(share.maximum)

    def state_dict(self) -> dict[str, Tensor]:
        """The means by layer."""
        return dict(self.means)

    def load_state_dict(self, means: Mapping[str, Tensor]) -> None:
        """Go on from means by layer."""
        self.means = dict(means)
