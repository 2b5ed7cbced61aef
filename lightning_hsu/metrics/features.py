"""Uniformity of embeddings, batch by batch in bounded memory, as a metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_hsu._checks import check_count
from lightning_hsu._core import (
    exact_arithmetic,
    smallest_angle,
    unit_rows,
    with_float64,
    working_dtype,
)
from lightning_hsu._monitor.measure import in_half_space
from lightning_hsu.measures import GaussianPotential, Measure, Sampled
from lightning_hsu.measures.sampled import sampled_above
from lightning_hsu.metrics.base import Quantity, UniformityMetric, decoded, parts_of
from lightning_hsu.metrics.hashing import hashed
from lightning_hsu.reference import random_level, score

_SAMPLE_ABOVE = 16384  # as the callback has it


class FeatureUniformity(UniformityMetric):
    r"""Uniformity of embeddings on the sphere, over all batches and ranks.

    The quantity of all rows at once, not a mean over batches. With the default measure and ``quantity="penalty"`` it is
    the uniformity of Wang & Isola, over the pairs of rows x, y of length 1::

        log mean exp(-2 |x - y|**2)

    A uniform sample of ``capacity`` rows stands for all: row i gets a pseudo-random priority, a hash of (seed, i), and those
    with the smallest are kept. On rank r of R row i is its row number ``(i - r) / R``, the order of a DistributedSampler
    without shuffling, so that ranks together keep, and give, exactly what one process would; rows that the sampler repeats to
    give all ranks as many are counted as the duplicates that they are. Memory is about
    ``2 * capacity * d`` floats and a batch.

    Rows are normalised, whatever their length, and kept in float32, float64 ones too. Zero and non-finite rows fill places of
    the sample but take no part. With fewer than two others the ratio, the score and the smallest angle are NaN, the penalty
    is 0 and the energy is what belongs to it: 0, for a GaussianPotential 1. Duplicates count as often as they come.
    Energies of more than 16384 rows are estimated (:class:`~lightning_hsu.measures.Sampled`). Ratio and score of measures
    whose random level is simulated take several times the work of the energy, once for each number of rows.

    Args:
        measure: How to measure; None is ``GaussianPotential(t=2)``.
        quantity: "ratio" (1 as random, above 1 more redundant), "score" (0 as random, 1 the best that is possible), "energy"
            (the measure's natural value), "min_angle" (the smallest, in degrees) or "penalty" (what training minimises).
        capacity: Rows to keep, 2 or more; None keeps all.
        seed: Of the sample, in [0, 2**63).
        kwargs: Those of every torchmetrics metric.

    Shape:
        Embeddings (..., d) of any floating dtype, d >= 2, flattened to rows (N, d), to a scalar, float32.

    Raises:
        TypeError: for a measure that is none, or embeddings that are no floating-point tensor.
        ValueError: for an unknown quantity, a capacity or seed out of range; in an update for embeddings of fewer than two
            dimensions, d < 2, or another d than before.

    Reference:
        Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", ICML 2020, arXiv 2005.10242.

    Example:
        >>> metric = FeatureUniformity(quantity="penalty")
        >>> for batch in torch.eye(6).split(2):  # squared distances 2
        ...     metric.update(batch)
        >>> round(float(metric.compute()), 5)
        -4.0
    """

    full_state_update: bool | None = True  # forward goes on counting rows where update stands
    rows: list[Tensor]
    priorities: list[Tensor]
    seen: Tensor

    def __init__(
        self,
        measure: Measure | None = None,
        *,
        quantity: Quantity = "ratio",
        capacity: int | None = 4096,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            GaussianPotential(t=2.0) if measure is None else measure, quantity, **kwargs
        )
        check_count("capacity", 2 if capacity is None else capacity, 2)
        check_count("seed", seed, 0)
        if seed >= 2**63:
            raise ValueError(f"seed must be an int in [0, 2**63); got {seed}")
        self.capacity, self.seed = capacity, seed
        self._add_settings(capacity, seed)
        self.add_state("rows", [], _joined)
        self.add_state("priorities", [], _joined)
        self.add_state("seen", torch.tensor(0), "sum")

    def update(self, embeddings: Tensor) -> None:
        """Add rows.

        Args:
            embeddings: Shape (..., d), of any floating dtype and length.
        """
        self._add(self._checked(embeddings))

    def compute(self) -> Tensor:
        """The quantity of the rows that are kept, those of all ranks together."""
        rows, _ = self._kept()
        return quantity_of(self.measure, self.quantity, rows[rows.any(-1)]).to(self.device)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the rows that another metric of the same capacity has seen.

        Args:
            incoming_state: The other metric, or its ``metric_state``.

        Raises:
            ValueError: if it is no such metric, capacities differ, or both have dropped rows by the same priorities: give each
                its own seed.
        """
        state = self._state_of(incoming_state)
        if (capacity := decoded(state["settings"])[0]) != self.capacity:
            raise ValueError(
                f"only samples of the same capacity can be merged: this one has {self.capacity}, the other {capacity}"
            )
        mine, theirs = _seen_by(self.metric_state, self.device), _seen_by(state, self.device)
        if not bool(torch.isin(theirs[1], mine[1]).any()):
            self.rows, self.priorities, self.seen = (
                [mine[0], theirs[0]],
                [mine[1], theirs[1]],
                mine[2] + theirs[2],
            )
            self._shrink()
        elif len(theirs[0]) == int(theirs[2]):
            self._add(theirs[0])
        elif len(mine[0]) == int(mine[2]):
            self.rows, self.priorities, self.seen = [theirs[0]], [theirs[1]], theirs[2]
            self._add(mine[0])
        else:
            raise ValueError(
                "both samples have dropped rows by the same priorities: give each metric its own seed"
            )
        self._computed, self._update_count = None, self._update_count + 1

    def _checked(self, x: Tensor) -> Tensor:
        """Unit rows (N, d), float32; 0 where a row takes no part."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = (
                f"{x.dtype} of shape {tuple(x.shape)}; cast with x.float()"
                if isinstance(x, Tensor)
                else type(x).__name__
            )
            raise TypeError(
                f"embeddings must be a floating-point tensor of shape (..., d); got {got}"
            )
        if x.ndim < 2 or x.shape[-1] < 2:
            raise ValueError(
                f"embeddings must have shape (..., d) with at least two dimensions and d >= 2, one embedding a row; got shape "
                f"{tuple(x.shape)}: a single embedding is x[None]"
            )
        known = parts_of(self.rows)
        if known and known[0].shape[1] not in (0, x.shape[1]):
            raise ValueError(
                f"embeddings must keep their dimension d = {known[0].shape[1]}; got shape {tuple(x.shape)}: reset() before "
                "others, or use a metric for each"
            )
        x = x.detach().reshape(-1, x.shape[-1])
        with exact_arithmetic(x):
            return unit_rows(x.to(working_dtype(x.dtype)))[0].float()

    def _add(self, rows: Tensor) -> None:
        """Count unit rows (N, d) and keep those that the sample has a place for."""
        rank, ranks = self._place()
        index = rank + ranks * (self.seen + torch.arange(len(rows), device=rows.device))
        # without a limit the index itself: rows of all ranks are then put in the order of one process
        priorities = index if self.capacity is None else hashed(index, self.seed)
        # new lists: the members of a MetricCollection's compute group share the old ones
        self.rows, self.priorities = [*self.rows, rows], [*self.priorities, priorities]
        self.seen = self.seen + len(rows)
        self._shrink()

    def _shrink(self) -> None:
        """Drop rows when there are twice as many as are to be kept."""
        if self.capacity is not None and sum(map(len, self.rows)) > 2 * self.capacity:
            rows, priorities = self._kept()
            self.rows, self.priorities = [rows], [priorities]

    def _kept(self) -> tuple[Tensor, Tensor]:
        """The sample (n, d) and its priorities (n,), those that go first at the front."""
        rows, priorities = (
            _joined(parts_of(self.rows)),
            _joined(parts_of(self.priorities)).flatten().long(),
        )
        order = priorities.argsort()[: self.capacity]
        return rows[order], priorities[order]

    def _place(self) -> tuple[int, int]:
        """This process's rank among those that share the metric, and their number."""
        if not (
            self.distributed_available_fn()
            and distributed.is_available()
            and distributed.is_initialized()
        ):
            return 0, 1
        return distributed.get_rank(self.process_group), distributed.get_world_size(
            self.process_group
        )

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        # a rank without rows must give each gathering a tensor of the right type, too
        rows, priorities = self._kept()
        self.rows, self.priorities = (
            [rows.to(self.device, torch.float32)],
            [priorities.to(self.device)],
        )
        super()._sync_dist(dist_sync_fn, process_group)


def _seen_by(state: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that a metric holds, in the order they came if none was dropped, their priorities, and how many it has seen."""
    rows, priorities = (
        _joined(parts_of(state["rows"])),
        _joined(parts_of(state["priorities"])).flatten(),
    )
    return rows.to(device), priorities.to(device, torch.int64), state["seen"].to(device)


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows or priorities of batches or ranks, those without any left out."""
    known = [part for part in parts if part.numel()]
    if not known:
        return parts[0] if parts else torch.zeros(0, 0)
    if len({part.shape[1:] for part in known}) > 1:
        raise ValueError(
            f"ranks must have embeddings of one dimension d; got shapes {[tuple(part.shape) for part in known]}"
        )
    return torch.cat([part.to(known[0].device) for part in known])


@torch.no_grad()
def quantity_of(measure: Measure, quantity: Quantity, x: Tensor) -> Tensor:
    """A quantity of live unit rows x (n, d), a scalar in float32; only what it needs is computed."""
    n = len(x)
    measure, x = sampled_above(measure, n, _SAMPLE_ABOVE), with_float64(x)[None]
    if n < 2 and quantity not in ("energy", "penalty"):
        return torch.tensor(torch.nan, dtype=torch.float32)
    state = measure.prepare(x) if n > 1 else None
    if quantity == "min_angle":
        parts = (
            measure.sample(x, state)
            if isinstance(measure, Sampled) and not measure.is_exact(state)
            else [x]
        )
        angles = [smallest_angle(part, half_space=in_half_space(measure)).amin() for part in parts]
        return torch.stack(angles).amin().rad2deg().float()
    penalty = (
        measure.penalty(x, state)[0].double() if n > 1 else torch.zeros((), dtype=torch.float64)
    )
    if quantity == "penalty":
        return penalty.float()
    energy = measure.natural(penalty)
    if quantity == "ratio":
        energy = measure.ratio(energy, random_level(measure, n, x.shape[-1]))
    elif quantity == "score":
        energy = score(measure, energy, n, x.shape[-1])
    return energy.float()
