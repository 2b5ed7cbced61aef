"""What both metrics share: measure and quantity, which direction is better, plots, checkpoints."""

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
"""What a metric computes; each is a field of :class:`~lightning_hsu.LayerUniformity`."""

Values = Tensor | Mapping[str, Tensor] | Sequence[Tensor] | Sequence[Mapping[str, Tensor]]
"""What can be plotted: a value of ``compute`` or ``forward``, or several."""


class UniformityMetric(Metric):
    """A metric of one quantity by one measure; see its subclasses.

    Args:
        measure: How to measure.
        quantity: Which number to compute.
        kwargs: The keyword arguments of every torchmetrics metric.

    Raises:
        TypeError: if ``measure`` is not a measure.
        ValueError: for an unknown quantity.
    """

    is_differentiable: bool | None = False
    settings: Tensor

    def __init__(self, measure: Measure, quantity: Quantity, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_measure(measure)
        check_choice("quantity", quantity, "ratio", "score", "energy", "min_angle", "penalty")
        self.measure = measure
        self.quantity = quantity

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether a larger value means more uniform."""
        if self.quantity == "energy":
            return self.measure.higher_is_better
        return self.quantity in ("score", "min_angle")

    @property
    def plot_lower_bound(self) -> float | None:  # type: ignore[override]
        """0 for angles, the worst value; None for other quantities, which depend on n and d."""
        if self.quantity == "min_angle":
            return 0.0
        return None

    @property
    def plot_upper_bound(self) -> float | None:  # type: ignore[override]
        """1 for a score, the best possible value."""
        if self.quantity == "score":
            return 1.0
        return None

    def plot(self, val: Values | None = None, ax: Any = None) -> Any:
        """Plot a value, several values over steps, or the values of layers.

        Ratios are plotted with a dotted line at 1, the ratio of random vectors.

        Args:
            val: What ``compute`` or ``forward`` returned, or a list of such; None computes it now.
            ax: Matplotlib axes to draw on; None makes a figure.

        Returns:
            The figure (None if ``ax`` is given) and the axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        figure, axes = self._plot(val, ax)  # type: ignore[arg-type]
        if self.quantity == "ratio":
            axes.axhline(1.0, linestyle="dotted", color="k")  # type: ignore[union-attr]
        return figure, axes

    def set_dtype(self, dst_type: str | torch.dtype) -> UniformityMetric:
        """Do nothing: the states hold counts and hashes that do not fit a narrower type."""
        return self

    def _state_of(self, other: object) -> dict[str, Any]:
        """The states of another metric of this kind, or a dict of them."""
        state = other.metric_state if isinstance(other, Metric) else other
        if not isinstance(state, dict) or not set(self.metric_state) <= set(state):
            name = type(self).__name__
            raise ValueError(
                f"only a {name} can be merged into a {name}, or its metric_state; "
                f"got {type(other).__name__}"
            )
        return state

    def _add_settings(self, *settings: object) -> None:
        """Add a state that keeps MetricCollection from sharing states across settings."""
        self.add_state("settings", encoded(settings), "max")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load states, and report those that were saved with other settings as an error."""
        stored = state_dict.get(prefix + "settings")
        current = decoded(self.settings)
        if isinstance(stored, Tensor) and decoded(stored) != current:
            errors = rest[-1]
            errors.append(
                f"{type(self).__name__} was saved with the settings {decoded(stored)}, "
                f"this one has {current}"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def encoded(value: object) -> Tensor:
    """A value as bytes of JSON, uint8, since ranks and checkpoints only exchange tensors."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def decoded(stored: Tensor) -> Any:
    """The value that was :func:`encoded`; None if there are no bytes."""
    if stored.numel() == 0:
        return None
    return json.loads(bytes(stored.tolist()))


def parts_of(state: Tensor | list[Tensor]) -> list[Tensor]:
    """A list state as a list, even after joining ranks has made it one tensor."""
    if isinstance(state, Tensor):
        return [state]
    return state


def nonempty(parts: list[Tensor]) -> list[Tensor]:
    """The parts that are not empty, all on the device of the first."""
    found: list[Tensor] = []
    for part in parts:
        if part.numel() > 0:
            device = found[0].device if found else part.device
            found.append(part.to(device))
    return found
