"""What the callback warns of while it trains, once each."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_hsu.monitor import LayerUniformity


class Alarms:
    """Warnings of one fit, and which of them were given."""

    def __init__(self) -> None:
        self._nonfinite, self._unreached, self._searched = set[str](), set[str](), False

    def line_search(self, optimizer: Optimizer) -> None:
        """A search along the gradient compares losses, and these are the task's alone."""
        if getattr(optimizer, "defaults", {}).get("line_search_fn") and not self._searched:
            self._searched = True
            rank_zero_warn(
                f"{type(optimizer).__name__} with a line search: the gradient has the penalty, the loss that the search "
                "compares has not. Use line_search_fn=None."
            )

    def nonfinite(self, measured: Sequence[LayerUniformity]) -> None:
        """Layers whose weights broke: training is lost, and the user should know where it began."""
        broken = [layer for layer in measured if layer.nonfinite and layer.name not in self._nonfinite]
        if broken:
            self._nonfinite |= {layer.name for layer in broken}
            named = "; ".join(f"'{x.name}' ({x.neurons} x {x.dimension}): {x.nonfinite} neurons" for x in broken)
            rank_zero_warn(
                f"NaN or infinite weights in layer {named}. Such neurons are left out of the penalty. Lower the learning "
                "rate, or find the first bad step with Trainer(detect_anomaly=True)."
            )

    def unreached(self, names: Sequence[str]) -> None:
        """Layers where the penalty does not arrive: nothing is worse than one that is silently absent."""
        names = [name for name in names if name not in self._unreached]
        if names:
            self._unreached |= set(names)
            rank_zero_warn(
                f"the penalty has not reached layer {', '.join(map(repr, names))} so far: these weights are in no optimizer "
                "that steps through Lightning, or got no gradient. With manual optimisation use self.optimizers(), not "
                "use_pl_optimizer=False; leave out a layer that is not trained with exclude=."
            )

    def idle(self, reasons: dict[str, str]) -> None:
        """Layers whose penalty has no force."""
        if reasons:
            named = "; ".join(f"'{name}': {reason}" for name, reason in reasons.items())
            rank_zero_warn(f"the penalty does nothing in layer {named}")
