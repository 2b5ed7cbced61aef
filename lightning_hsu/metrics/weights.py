"""Uniformity of a model's neurons, as a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_hsu._checks import check_choice
from lightning_hsu._core import exact_arithmetic, with_float64
from lightning_hsu._engine.layer import to_compute_dtype
from lightning_hsu._monitor.measure import LayerUniformity, measure_neurons
from lightning_hsu._neurons.select import Patterns, select
from lightning_hsu._neurons.state_dict import StoredNeurons, neurons_of_state_dict
from lightning_hsu.measures import Measure, RieszEnergy
from lightning_hsu.measures.sampled import sampled_above
from lightning_hsu.metrics.base import Quantity, UniformityMetric, decoded, encoded, parts_of
from lightning_hsu.regularizer import UniformityRegularizer


class WeightUniformity(UniformityMetric):
    r"""Uniformity of the neurons of a model's layers, as the callback's monitor measures them.

    Of each layer the mean over updates of one quantity, then over layers the mean or the largest; with the defaults this
    is the callback's ``hsu/ratio_mean``::

        mean over layers of  energy(neurons) / energy(random neurons of the same n and d)

    Layers where it is not defined, such as the ratio with fewer than two live neurons, are left out; NaN if all are. An
    infinite one, such as the energy of duplicates with a large s, makes the whole infinite. Ranks
    that hold the same weights get what one process gets; where they share the weights, all must call ``update``.

    Args:
        measure: How to measure; None is the half-space Riesz energy with s = 2. The head is measured in full space.
        quantity: "ratio" (1 as random, above 1 more redundant), "score" (0 as random, 1 the best that is possible), "energy"
            (the measure's natural value), "min_angle" (the smallest, in degrees) or "penalty" (what training minimises).
        reduction: "mean" or "max" over layers, or "none": a dict of scalars by layer, for ``self.log_dict``.
        include: Patterns of layers to take, shell style; None takes all but embeddings.
        exclude: Patterns of layers to leave out.
        head: "auto" (the last Linear), the head's name, or None for no head.
        kwargs: Those of every torchmetrics metric.

    Shape:
        A scalar, float32; with ``reduction="none"`` one for each layer.

    Raises:
        TypeError: for a measure that is none, or an update with neither a module nor a mapping of names to tensors.
        ValueError: for an unknown quantity or reduction; in an update for a pattern that matches nothing, a model without a
            layer to measure, or other layers than before.

    Reference:
        Liu et al., "Learning towards Minimum Hyperspherical Energy", NeurIPS 2018, arXiv 1805.09298.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> metric = WeightUniformity()
        >>> metric.update(model)
        >>> 0.9 < float(metric.compute()) < 1.1  # as initialised: random
        True
        >>> list(WeightUniformity(reduction="none")(model.state_dict()))
        ['0', '2']
    """

    full_state_update: bool | None = False  # a model is measured once a forward, see _reduce_states
    layers: list[Tensor]
    means: list[Tensor]

    def __init__(
        self,
        measure: Measure | None = None,
        *,
        quantity: Quantity = "ratio",
        reduction: Literal["mean", "max", "none"] = "mean",
        include: Patterns = None,
        exclude: Patterns = None,
        head: str | None = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            RieszEnergy(s=2.0, half_space=True) if measure is None else measure, quantity, **kwargs
        )
        self.reduction = check_choice("reduction", reduction, "mean", "max", "none")
        self.include, self.exclude, self.head = include, exclude, head
        self._add_settings(repr(self.measure), quantity, repr((include, exclude, head)))
        self.add_state("layers", [], _agreed)
        self.add_state("means", [], _pooled)

    def update(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Measure the layers as they are now.

        Args:
            model: A module, also as DDP, FSDP or Fabric wrap it, or a state dict, whose layers are guessed by names and
                shapes: there groups of convolutions are not known, and embeddings are layers by name.
        """
        found = self._measured(model)
        values = torch.tensor(
            [getattr(layer, self.quantity) for layer in found],
            dtype=torch.float32,
            device=self.device,
        )
        defined = ~values.isnan()
        names = encoded([layer.name for layer in found]).to(self.device)
        new = torch.stack([torch.where(defined, values, 0.0), defined.to(values.dtype)])
        self.layers = [_agreed([*parts_of(self.layers), names])]
        self.means = [_pooled([*parts_of(self.means), new])]

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The mean over updates, over layers as ``reduction`` says; NaN, or an empty dict, before any update."""
        mean, count = _pooled(parts_of(self.means)).to(self.device)
        values = torch.where(count > 0, mean, torch.nan)
        if self.reduction == "none":
            return dict(
                zip(decoded(_agreed(parts_of(self.layers))) or (), values.unbind(), strict=True)
            )
        defined = values[count > 0]
        if not len(defined):
            return torch.tensor(torch.nan, dtype=torch.float32, device=self.device)
        return defined.mean() if self.reduction == "mean" else defined.amax()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the updates that another metric of the same settings has seen.

        Args:
            incoming_state: The other metric, or its ``metric_state``.

        Raises:
            ValueError: if it is no such metric, or its settings or its layers are others.
        """
        state = self._state_of(incoming_state)
        theirs, own = decoded(state["settings"]), decoded(self.settings)
        if theirs != own:
            raise ValueError(
                f"only metrics of the same settings can be merged: this one has {own}, the other {theirs}"
            )
        self._reduce_states(state)
        self._update_count += 1

    def _measured(self, model: nn.Module | Mapping[str, Tensor]) -> list[LayerUniformity]:
        if not isinstance(model, (nn.Module, Mapping)):
            raise TypeError(f"update takes a model or its state dict; got {type(model).__name__}")
        regularizer = UniformityRegularizer(
            self.measure, 0.0, include=self.include, exclude=self.exclude, head=self.head
        )
        if isinstance(model, nn.Module):
            return regularizer.attach(model).measure_layers()
        candidates = neurons_of_state_dict(model, self.include)
        stored, _ = select(candidates, self.include, self.exclude, self.head)
        return [_measure_stored(one, self.measure, regularizer.sample_above) for one in stored]

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        # a rank without an update must give each gathering a tensor of the right type, too
        self.layers = [_agreed(parts_of(self.layers)).to(self.device)]
        self.means = [_pooled(parts_of(self.means)).to(self.device)]
        super()._sync_dist(dist_sync_fn, process_group)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Pool with the states of other updates, for ``forward`` and ``merge_state``."""
        self.layers = [_agreed([*parts_of(incoming_state["layers"]), *parts_of(self.layers)])]
        self.means = [_pooled([*parts_of(incoming_state["means"]), *parts_of(self.means)])]
        self._computed = None


@torch.no_grad()
def _measure_stored(
    stored: StoredNeurons, measure: Measure, sample_above: int | None
) -> LayerUniformity:
    """Measure one set of neurons of a state dict as the regularizer measures a layer."""
    if stored.head:
        measure = measure.for_head()
    measure = sampled_above(measure, stored.shape[1], sample_above)
    x = with_float64(to_compute_dtype(stored.neurons()))
    with exact_arithmetic(x):
        state = measure.prepare(x)
    return measure_neurons(stored.name, x, measure, state)


def _agreed(parts: list[Tensor]) -> Tensor:
    """The encoded names (bytes,) that all have, those without an update left out."""
    known = [part for part in parts if part.numel()]
    if not known:
        return torch.zeros(0, dtype=torch.uint8)
    for other in known[1:]:
        if (names := decoded(known[0])) != (others := decoded(other)):
            raise ValueError(
                f"updates must be of the same layers: got {others} after {names}; reset() before another model"
            )
    return known[0]


def _pooled(parts: list[Tensor]) -> Tensor:
    """Means and counts (2, layers) of updates together, float32; those without one left out."""
    known = [part for part in parts if part.numel()]
    if len(known) < 2:
        return known[0].float() if known else torch.zeros(2, 0, dtype=torch.float32)
    means, counts = (
        with_float64(torch.stack([part.to(known[0].device) for part in known])).double().unbind(1)
    )  # (parts, layers)
    count = counts.sum(0)
    return (
        torch.stack([(means * counts).sum(0) / count.clamp_min(1.0), count])
        .float()
        .to(known[0].device)
    )
