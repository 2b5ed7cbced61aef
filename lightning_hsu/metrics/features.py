"""Uniformity of embeddings, batch by batch in bounded memory, as a metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
from lightning_hsu.measures import GaussianPotential, Measure, Sampled
from lightning_hsu.measures.defaults import SAMPLE_ABOVE
from lightning_hsu.measures.sampled import sampled_above
from lightning_hsu.metrics.base import Quantity, UniformityMetric, decoded, nonempty, parts_of
from lightning_hsu.metrics.hashing import hashed
from lightning_hsu.reference import random_level, score

_DEFAULT_MEASURE = GaussianPotential(t=2.0)


class FeatureUniformity(UniformityMetric):
    r"""Uniformity of embeddings on the sphere, over all batches and ranks.

    It is the quantity of all rows together, not a mean over batches. With the default measure and
    ``quantity="penalty"`` it is the uniformity of Wang & Isola, over the pairs of rows x, y of
    length 1::

        log mean exp(-2 |x - y|**2)

    A uniform sample of ``capacity`` rows stands for all: row i gets a pseudo-random priority, a
    hash of (seed, i), and the rows with the smallest priorities are kept. On rank r of R ranks, row
    i is the rank's own row number ``(i - r) / R``, the order of a DistributedSampler without
    shuffling. So all ranks together keep, and compute, exactly what one process would. Rows that
    the sampler repeats to give all ranks the same number count as duplicates. Memory is about
    ``2 * capacity * d`` floats plus a batch.

    Rows of any length are normalised and kept in float32, even float64 ones. Zero and non-finite
    rows fill places of the sample but take no part. With fewer than two other rows the ratio, the
    score and the smallest angle are NaN, the penalty is 0 and the energy is that of penalty 0: 0,
    or 1 for a GaussianPotential. Duplicates count as often as they occur. Energies of more than
    16384 rows are estimated (:class:`~lightning_hsu.measures.Sampled`). For measures whose random
    level is simulated, ratio and score take several times the work of the energy, once for each
    number of rows.

    Args:
        measure: How to measure; None is ``GaussianPotential(t=2)``.
        quantity: "ratio" (1 as random, above 1 more redundant), "score" (0 as random, 1 the best
            possible), "energy" (the measure's natural value), "min_angle" (the smallest angle, in
            degrees) or "penalty" (what training minimises).
        capacity: Rows to keep, 2 or more; None keeps all.
        seed: Seed of the sample, in [0, 2**63).
        kwargs: Those of every torchmetrics metric.

    Shape:
        Embeddings (..., d) of any floating dtype, d >= 2, flattened to rows (N, d), to a scalar,
        float32.

    Raises:
        TypeError: if ``measure`` is not a measure, or embeddings are not a floating-point tensor.
        ValueError: for an unknown quantity, or a capacity or seed out of range; in an update for
            embeddings of fewer than two dimensions, d < 2, or another d than before.

    Reference:
        Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and
        Uniformity on the Hypersphere", ICML 2020, arXiv 2005.10242.

    Example:
        >>> metric = FeatureUniformity(quantity="penalty")
        >>> for batch in torch.eye(6).split(2):  # squared distances 2
        ...     metric.update(batch)
        >>> round(float(metric.compute()), 5)
        -4.0
    """

    full_state_update: bool | None = True  # forward continues counting rows where update stopped
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
        if measure is None:
            measure = _DEFAULT_MEASURE
        super().__init__(measure, quantity, **kwargs)
        if capacity is not None:
            check_count("capacity", capacity, 2)
        check_count("seed", seed, 0)
        if seed >= 2**63:
            raise ValueError(f"seed must be an int in [0, 2**63); got {seed}")
        self.capacity = capacity
        self.seed = seed
        self._add_settings(capacity, seed)
        self.add_state("rows", [], _concatenated)
        self.add_state("priorities", [], _concatenated)
        self.add_state("seen", torch.tensor(0), "sum")

    def update(self, embeddings: Tensor) -> None:
        """Add rows.

        Args:
            embeddings: Shape (..., d), of any floating dtype and length.
        """
        self._check(embeddings)
        x = embeddings.detach().reshape(-1, embeddings.shape[-1])  # (N, d)
        with exact_arithmetic(x):
            unit = unit_rows(x.to(working_dtype(x.dtype)))[0]  # 0 where a row takes no part
        self._add(unit.float())

    def compute(self) -> Tensor:
        """The quantity of the rows that all ranks together keep."""
        rows, _ = self._kept()
        live = rows.any(-1)
        return quantity_of(self.measure, self.quantity, rows[live]).to(self.device)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the rows that another metric of the same capacity has seen.

        Args:
            incoming_state: The other metric, or its ``metric_state``.

        Raises:
            ValueError: if it is another metric, capacities differ, or both have dropped rows by the
                same priorities: give each its own seed.
        """
        state = self._state_of(incoming_state)
        capacity = decoded(state["settings"])[0]
        if capacity != self.capacity:
            raise ValueError(
                "only samples of the same capacity can be merged: "
                f"this one has {self.capacity}, the other {capacity}"
            )
        mine = _Sample.of(self.metric_state, self.device)
        theirs = _Sample.of(state, self.device)
        if not bool(torch.isin(theirs.priorities, mine.priorities).any()):
            self.rows = [mine.rows, theirs.rows]
            self.priorities = [mine.priorities, theirs.priorities]
            self.seen = mine.seen + theirs.seen
            self._shrink()
        elif theirs.is_whole():
            self._add(theirs.rows)
        elif mine.is_whole():
            self.rows = [theirs.rows]
            self.priorities = [theirs.priorities]
            self.seen = theirs.seen
            self._add(mine.rows)
        else:
            raise ValueError(
                "both samples have dropped rows by the same priorities: "
                "give each metric its own seed"
            )
        self._computed = None
        self._update_count += 1

    def _check(self, x: Tensor) -> None:
        """Refuse what cannot be embeddings, or embeddings of another dimension than before."""
        if not isinstance(x, Tensor):
            raise TypeError(
                "embeddings must be a floating-point tensor of shape (..., d); "
                f"got {type(x).__name__}"
            )
        shape = tuple(x.shape)
        if not x.is_floating_point():
            raise TypeError(
                "embeddings must be a floating-point tensor of shape (..., d); "
                f"got {x.dtype} of shape {shape}; cast with x.float()"
            )
        if x.ndim < 2 or x.shape[-1] < 2:
            raise ValueError(
                "embeddings must have shape (..., d) with at least two dimensions and d >= 2, one "
                f"embedding a row; got shape {shape}: a single embedding is x[None]"
            )
        known = parts_of(self.rows)
        if known and known[0].shape[1] not in (0, x.shape[-1]):
            raise ValueError(
                f"embeddings must keep their dimension d = {known[0].shape[1]}; "
                f"got shape {shape}: reset() before others, or use a metric for each"
            )

    def _add(self, rows: Tensor) -> None:
        """Count unit rows (N, d) and keep those that belong to the sample."""
        rank, ranks = self._rank()
        index = rank + ranks * (self.seen + torch.arange(len(rows), device=rows.device))
        priorities = index  # without a limit: rows of all ranks end in the order of one process
        if self.capacity is not None:
            priorities = hashed(index, self.seed)
        # New lists: the members of a MetricCollection's compute group share the old ones.
        self.rows = [*self.rows, rows]
        self.priorities = [*self.priorities, priorities]
        self.seen = self.seen + len(rows)
        self._shrink()

    def _shrink(self) -> None:
        """Drop rows once there are more than twice as many as the sample keeps."""
        if self.capacity is not None and sum(map(len, self.rows)) > 2 * self.capacity:
            rows, priorities = self._kept()
            self.rows = [rows]
            self.priorities = [priorities]

    def _kept(self) -> tuple[Tensor, Tensor]:
        """The sample (n, d) and its priorities (n,), smallest priority first."""
        rows = _concatenated(parts_of(self.rows))
        priorities = _concatenated(parts_of(self.priorities)).flatten().long()
        order = priorities.argsort()[: self.capacity]
        return rows[order], priorities[order]

    def _rank(self) -> tuple[int, int]:
        """This process's rank among those that share the metric, and how many there are."""
        available = distributed.is_available() and distributed.is_initialized()
        if not available or not self.distributed_available_fn():
            return 0, 1
        rank = distributed.get_rank(self.process_group)
        return rank, distributed.get_world_size(self.process_group)

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        """Join the samples of all ranks.

        A rank without rows must also pass a tensor of the right type to each gathering. No public
        hook of torchmetrics runs between saving the rank's own state and gathering it.
        """
        rows, priorities = self._kept()
        self.rows = [rows.to(self.device, torch.float32)]
        self.priorities = [priorities.to(self.device)]
        super()._sync_dist(dist_sync_fn, process_group)


class _Sample(NamedTuple):
    """The rows that a metric holds.

    Args:
        rows: Rows (n, d), in order of arrival if none was dropped.
        priorities: Their priorities (n,), int64.
        seen: How many rows the metric has seen, a scalar.
    """

    rows: Tensor
    priorities: Tensor
    seen: Tensor

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> _Sample:
        """The sample in a metric's state, on a device."""
        rows = _concatenated(parts_of(state["rows"])).to(device)
        priorities = _concatenated(parts_of(state["priorities"])).flatten()
        return cls(rows, priorities.to(device, torch.int64), state["seen"].to(device))

    def is_whole(self) -> bool:
        """Whether no row was dropped."""
        return len(self.rows) == int(self.seen)


def _concatenated(parts: list[Tensor]) -> Tensor:
    """Rows or priorities of batches or ranks, joined; empty ones are left out."""
    known = nonempty(parts)
    if not known:
        return parts[0] if parts else torch.zeros(0, 0)
    shapes = [tuple(part.shape) for part in known]
    if len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(f"ranks must have embeddings of one dimension d; got shapes {shapes}")
    return torch.cat(known)


@torch.no_grad()
def quantity_of(measure: Measure, quantity: Quantity, x: Tensor) -> Tensor:
    """A quantity of live unit rows x (n, d), a float32 scalar, computing only what it needs."""
    n, d = x.shape
    if n < 2:
        return _quantity_of_few(measure, quantity)
    measure = sampled_above(measure, n, SAMPLE_ABOVE)
    x = with_float64(x)[None]
    state = measure.prepare(x)
    if quantity == "min_angle":
        parts = [x]
        if isinstance(measure, Sampled) and not measure.is_exact(state):
            parts = measure.sample(x, state)
        angles = [smallest_angle(part, half_space=measure.half_space).amin() for part in parts]
        return torch.stack(angles).amin().rad2deg().float()
    penalty = measure.penalty(x, state)[0].double()
    if quantity == "penalty":
        return penalty.float()
    energy = measure.natural(penalty)
    if quantity == "ratio":
        return measure.ratio(energy, random_level(measure, n, d)).float()
    if quantity == "score":
        return score(measure, energy, n, d).float()
    return energy.float()


def _quantity_of_few(measure: Measure, quantity: Quantity) -> Tensor:
    """A quantity of fewer than two rows, a float32 scalar."""
    penalty = torch.zeros((), dtype=torch.float64)
    if quantity == "penalty":
        return penalty.float()
    if quantity == "energy":
        return measure.natural(penalty).float()
    return torch.tensor(torch.nan, dtype=torch.float32)
