"""What the metrics have in common: the measure, the quantity, what is better, the plot, what checkpoints may hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_hsu._checks import check_choice
from lightning_hsu.measures import Measure
from lightning_hsu.measures.base import check_measure

Quantity = Literal["ratio", "score", "energy", "min_angle", "penalty"]
"""What a metric tells; each is a field of :class:`~lightning_hsu.LayerUniformity`."""

Values = Tensor | Mapping[str, Tensor] | Sequence[Tensor] | Sequence[Mapping[str, Tensor]]
"""What can be plotted: a value of ``compute`` or ``forward``, or several."""


class UniformityMetric(Metric):
    """A metric of one quantity by one measure; see its subclasses.

    Args:
        measure: How to measure.
        quantity: Which number of it to tell.
        kwargs: Those of every torchmetrics metric.

    Raises:
        TypeError: for a measure that is none.
        ValueError: for an unknown quantity.
    """

    is_differentiable: bool | None = False
    settings: Tensor

    def __init__(self, measure: Measure, quantity: Quantity, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_measure(measure)
        check_choice("quantity", quantity, "ratio", "score", "energy", "min_angle", "penalty")
        self.measure, self.quantity = measure, quantity

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether a larger value is a more uniform one."""
        return (
            self.measure.higher_is_better
            if self.quantity == "energy"
            else self.quantity in ("score", "min_angle")
        )

    @property
    def plot_lower_bound(self) -> float | None:  # type: ignore[override]
        """0 for angles, the worst; None for the others: a bound that is the better the lower depends on n and d."""
        return 0.0 if self.quantity == "min_angle" else None

    @property
    def plot_upper_bound(self) -> float | None:  # type: ignore[override]
        """1 for a score, the best there can be."""
        return 1.0 if self.quantity == "score" else None

    def plot(self, val: Values | None = None, ax: Any = None) -> Any:
        """Plot a value, several of them over steps, or those of layers; for ratios with a dotted line at random, 1.

        Args:
            val: What ``compute`` or ``forward`` gave, or a list of that; None computes it now.
            ax: Matplotlib axes to draw on; None makes a figure.

        Returns:
            The figure, None where ``ax`` is given, and the axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        figure, axes = self._plot(val, ax)  # type: ignore[arg-type]
        if self.quantity == "ratio":
            axes.axhline(1.0, linestyle="dotted", color="k")  # type: ignore[union-attr]
        return figure, axes

    def set_dtype(self, dst_type: str | torch.dtype) -> UniformityMetric:
        """Do nothing: the states hold counts and hashes that no narrower type can."""
        return self

    def _state_of(self, other: object) -> dict[str, Any]:
        """The states of another metric of this kind, or a dict of them."""
        state = other.metric_state if isinstance(other, Metric) else other
        if not isinstance(state, dict) or not set(self.metric_state) <= set(state):
            name = type(self).__name__
            raise ValueError(
                f"only a {name} can be merged into a {name}, or its metric_state; got {type(other).__name__}"
            )
        return state

    def _add_settings(self, *settings: object) -> None:
        """A state by which MetricCollection sees that two metrics must not share their others."""
        self.add_state("settings", encoded(settings), "max")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored, own = state_dict.get(prefix + "settings"), decoded(self.settings)
        if isinstance(stored, Tensor) and decoded(stored) != own:
            rest[-1].append(
                f"{type(self).__name__} was saved with the settings {decoded(stored)}, this one has {own}"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def encoded(what: object) -> Tensor:
    """JSON as bytes, uint8: ranks and checkpoints exchange tensors only."""
    return torch.tensor(list(json.dumps(what).encode()), dtype=torch.uint8)


def decoded(stored: Tensor) -> Any:
    """What was :func:`encoded`; None from no bytes."""
    return json.loads(bytes(stored.tolist())) if stored.numel() else None


def parts_of(state: Tensor | list[Tensor]) -> list[Tensor]:
    """A list state as a list, which is one tensor after ranks were joined."""
    return [state] if isinstance(state, Tensor) else state
