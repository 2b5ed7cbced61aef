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
from lightning_hsu._neurons.how import Neurons, check_neurons
from lightning_hsu._neurons.patterns import Patterns
from lightning_hsu._neurons.select import Head, select
from lightning_hsu._neurons.set_reader import StoredNeurons
from lightning_hsu._neurons.state_dict import neurons_of_state_dict
from lightning_hsu.measures import Measure
from lightning_hsu.measures.defaults import DEFAULT_MEASURE
from lightning_hsu.measures.sampled import measure_of_layer
from lightning_hsu.metrics.base import (
    Quantity,
    UniformityMetric,
    decoded,
    encoded,
    nonempty,
    parts_of,
)
from lightning_hsu.regularizer import UniformityRegularizer


class WeightUniformity(UniformityMetric):
    r"""Uniformity of the neurons of a model's layers, as the callback's monitor measures them.

    It takes the mean over updates of one quantity of each layer, then the mean or the largest over
    layers. With the defaults this is the callback's ``hsu/ratio_mean``::

        mean over layers of  energy(neurons) / energy(random neurons of the same n and d)

    Layers where the quantity is not defined, such as the ratio with fewer than two live neurons,
    are left out; the result is NaN if all are, or if a layer has NaN or infinite weights. If one is
    infinite, such as the energy of duplicates with a large s, the result is infinite. Ranks that
    hold the same weights get the same result as one process; if the weights are sharded over ranks,
    all must call ``update``.

    Args:
        measure: How to measure; None is the Riesz energy with s = 2. The head is
            measured in full space.
        quantity: "ratio" (1 as random, above 1 more redundant), "score" (0 as random, 1 the best
            possible), "energy" (the measure's natural value), "min_angle" (the smallest angle, in
            degrees) or "penalty" (what training minimises).
        reduction: "mean" or "max" over layers, or "none": a dict of scalars by layer, for
            ``self.log_dict``.
        include: Patterns of layers to take, shell style; None takes all but embeddings.
        exclude: Patterns of layers to leave out.
        head: "auto" (what the model declares, else a guess by names and order), the head's name, a
            list of names, or None for no head.
        neurons: How weights hold neurons: a mapping from patterns of their names to "rows",
            "columns", a number of equal parts along the rows (3 for a fused qkv), or a function of
            the weight to its neurons (..., n, d). What it names is measured, embeddings and bare
            parameters too. Metrics whose functions are not the same objects do not merge.
        kwargs: Those of every torchmetrics metric.

    Shape:
        A scalar, float32; with ``reduction="none"`` one for each layer.

    Raises:
        TypeError: if ``measure`` is not a measure, or ``neurons`` not made of patterns and ways of
            holding neurons; for an update with neither a module nor a mapping of names to tensors.
        ValueError: for an unknown quantity, reduction or way of holding neurons; in an update for a
            pattern that matches nothing, a weight without the parts or the shape that ``neurons``
            says, a model without a layer to measure, or other layers than before.

    Reference:
        Liu et al., "Learning towards Minimum Hyperspherical Energy", NeurIPS 2018,
        arXiv 1805.09298.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> metric = WeightUniformity()
        >>> metric.update(model)
        >>> 0.9 < float(metric.compute()) < 1.1  # as initialised: random
        True
        >>> list(WeightUniformity(reduction="none")(model.state_dict()))
        ['0', '2']
    """

    full_state_update: bool | None = False  # forward measures a model once, see _reduce_states
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
        head: Head = "auto",
        neurons: Neurons = None,
        **kwargs: Any,
    ) -> None:
        if measure is None:
            measure = DEFAULT_MEASURE
        super().__init__(measure, quantity, **kwargs)
        self.reduction = check_choice("reduction", reduction, "mean", "max", "none")
        self.include = include
        self.exclude = exclude
        self.head = head
        self.neurons = check_neurons(neurons)
        choice: tuple[object, ...] = (include, exclude, head)
        if self.neurons:
            choice = (*choice, self.neurons)
        self._add_settings(repr(self.measure), quantity, repr(choice))
        self.add_state("layers", [], _agreed)
        self.add_state("means", [], _pooled)

    def update(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Measure the layers as they are now.

        Args:
            model: A module, possibly wrapped by DDP, FSDP or Fabric, or a state dict, whose layers
                are guessed from names and shapes: groups of convolutions are not known there, and
                embeddings are recognised by name. ``neurons`` says more.
        """
        found = self._measured(model)
        names = []
        numbers = []
        broken = []
        for layer in found:
            names.append(layer.name)
            numbers.append(getattr(layer, self.quantity))
            broken.append(layer.nonfinite > 0)
        values = torch.tensor(numbers, dtype=torch.float32, device=self.device)
        defined = ~values.isnan() | torch.tensor(broken, dtype=torch.bool, device=self.device)
        means = torch.where(defined, values, 0.0)
        counts = defined.to(values.dtype)
        self._pool(
            [*parts_of(self.layers), encoded(names).to(self.device)],
            [*parts_of(self.means), torch.stack([means, counts])],
        )

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The mean over updates, reduced over layers as ``reduction`` says.

        NaN, or an empty dict, before any update.
        """
        mean, count = _pooled(parts_of(self.means)).to(self.device)
        values = torch.where(count > 0, mean, torch.nan)
        if self.reduction == "none":
            names = decoded(_agreed(parts_of(self.layers))) or []
            return dict(zip(names, values.unbind(), strict=True))
        defined = values[count > 0]
        if len(defined) == 0:
            return torch.tensor(torch.nan, dtype=torch.float32, device=self.device)
        if self.reduction == "mean":
            return defined.mean()
        return defined.amax()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the updates that another metric with the same settings has seen.

        Args:
            incoming_state: The other metric, or its ``metric_state``.

        Raises:
            ValueError: if it is another metric, or its settings or layers differ.
        """
        state = self._state_of(incoming_state)
        mine = decoded(self.settings)
        theirs = decoded(state["settings"])
        if theirs != mine:
            raise ValueError(
                "only metrics of the same settings can be merged: "
                f"this one has {mine}, the other {theirs}"
            )
        self._reduce_states(state)
        self._update_count += 1

    def _measured(self, model: nn.Module | Mapping[str, Tensor]) -> list[LayerUniformity]:
        if not isinstance(model, (nn.Module, Mapping)):
            raise TypeError(f"update takes a model or its state dict; got {type(model).__name__}")
        regularizer = UniformityRegularizer(
            self.measure,
            0.0,
            include=self.include,
            exclude=self.exclude,
            head=self.head,
            neurons=self.neurons,
        )
        if isinstance(model, nn.Module):
            return regularizer.attach(model, watch=False).measure_layers()
        candidates = neurons_of_state_dict(model, self.include, self.neurons)
        stored, _ = select(candidates, self.include, self.exclude, self.head)
        return [_measure_stored(one, self.measure, regularizer.sample_above) for one in stored]

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        """Join the updates of all ranks.

        A rank without an update must also pass a tensor of the right type to each gathering. No
        public hook of torchmetrics runs between saving the rank's own state and gathering it.
        """
        self.layers = [_agreed(parts_of(self.layers)).to(self.device)]
        self.means = [_pooled(parts_of(self.means)).to(self.device)]
        super()._sync_dist(dist_sync_fn, process_group)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Pool with the states of earlier updates, for ``forward`` and ``merge_state``."""
        self._pool(
            [*parts_of(incoming_state["layers"]), *parts_of(self.layers)],
            [*parts_of(incoming_state["means"]), *parts_of(self.means)],
        )
        self._computed = None

    def _pool(self, layers: list[Tensor], means: list[Tensor]) -> None:
        """Merge the states of several updates into one."""
        self.layers = [_agreed(layers)]
        self.means = [_pooled(means)]


@torch.no_grad()
def _measure_stored(
    stored: StoredNeurons, measure: Measure, sample_above: int | None
) -> LayerUniformity:
    """Measure one set of neurons of a state dict as the regularizer measures a layer."""
    measure = measure_of_layer(
        measure, is_head=stored.head, neurons=stored.shape[1], sample_above=sample_above
    )
    x = with_float64(to_compute_dtype(stored.neurons()))
    with exact_arithmetic(x):
        state = measure.prepare(x)
    return measure_neurons(stored.name, x, measure, state).unless_broken()


def _agreed(parts: list[Tensor]) -> Tensor:
    """The encoded names (bytes,) that all updates have in common."""
    known = nonempty(parts)
    if not known:
        return torch.zeros(0, dtype=torch.uint8)
    names = decoded(known[0])
    for part in known[1:]:
        others = decoded(part)
        if others != names:
            raise ValueError(
                f"updates must be of the same layers: got {others} after {names}; "
                "reset() before another model"
            )
    return known[0]


def _pooled(parts: list[Tensor]) -> Tensor:
    """Means and counts (2, layers) of several updates together, float32."""
    known = nonempty(parts)
    if not known:
        return torch.zeros(2, 0, dtype=torch.float32)
    if len(known) == 1:
        return known[0].float()
    stacked = torch.stack(known)  # (parts, 2, layers)
    means, counts = with_float64(stacked).double().unbind(1)
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count.clamp_min(1.0)
    return torch.stack([mean, count]).float().to(stacked.device)
