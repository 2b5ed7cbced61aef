"""Two reports on the same network at different times: what moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hsu._core import unit_rows, with_float64
from lightning_hsu._neurons.candidates import NeuronSet
from lightning_hsu._neurons.select import Patterns
from lightning_hsu.measures import Measure
from lightning_hsu.report.build import Found, Progress, Report, Source, find_targets, look_at_all
from lightning_hsu.report.data import ComparisonData, LayerComparison
from lightning_hsu.report.tables import comparison_table, plain


@dataclass(frozen=True, eq=False)
class Comparison(ComparisonData):
    """What moved between two networks; print it, or write it as JSON.

    Args:
        before: The report on the first.
        after: The report on the second.
        layers: The layers that both have, in the order of the second.
        only_before: Names of layers that only the first has.
        only_after: Names of layers that only the second has.
    """

    before: Report
    after: Report

    def __str__(self) -> str:
        """The table, in plain text."""
        return plain(comparison_table(self))


def compare(
    before: Source,
    after: Source,
    measure: Measure | None = None,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    head: str | None = "auto",
    similar_above: float = 0.95,
    key: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Look at two networks, or one at two times, layer by layer; arguments as of :func:`~lightning_hsu.report.report`.

    Layers are matched by name, and neurons by index; both are measured in the same space. A layer that both have is the class
    head only if it is so in both: the last layer of a network without its head is none.

    Raises:
        ValueError: if the two have no layer of the same name.

    Example:
        >>> from torch import nn
        >>> before, after = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))
        >>> _ = after.load_state_dict(before.state_dict())
        >>> round(compare(before, after).layers[0].moved, 3)
        0.0
    """
    both = _alike([find_targets(source, include, exclude, head, key) for source in (before, after)])
    reports = [
        look_at_all(
            found,
            measure,
            similar_above,
            progress=None
            if progress is None
            else lambda name, part, i=i: progress(name, (i + part) / 2),  # type: ignore[misc]
        )
        for i, found in enumerate(both)
    ]
    targets = [{one.name: one for one in found.targets} for found in both]
    earlier = {one.name: one for one in reports[0].layers}
    layers = tuple(
        LayerComparison(
            earlier[one.name], one, _moved(*(found[one.name].neurons() for found in targets))
        )
        for one in reports[1].layers
        if one.name in earlier
    )
    if not layers:
        first, second = (", ".join(list(found)[:5]) for found in targets)
        raise ValueError(f"no layer has the same name in both: {first}, ... and {second}, ...")
    names = [{one.name for one in found.layers} for found in reports]
    only = [
        tuple(one.name for one in reports[i].layers if one.name not in names[1 - i]) for i in (0, 1)
    ]
    return Comparison(reports[0], reports[1], layers, only[0], only[1])


def _alike(both: Sequence[Found]) -> list[Found]:
    """The same, with each layer that both have in the same space: full space for heads of both, and for two neurons in one."""
    layers = [{one.name: one for one in found.targets} for found in both]

    def in_full_space(one: NeuronSet, other: NeuronSet | None) -> bool:
        return (
            one.head
            if other is None
            else (one.head and other.head) or 2 in (one.shape[1], other.shape[1])
        )

    return [
        found._replace(
            targets=[
                replace(one, head=in_full_space(one, others.get(one.name))) for one in found.targets
            ]
        )
        for found, others in zip(both, reversed(layers), strict=True)
    ]


@torch.no_grad()
def _moved(before: Tensor, after: Tensor) -> float:
    """Median angle in degrees between the neurons of two sets (groups, n, d), index by index."""
    if before.shape != after.shape:
        return math.nan
    (x, x_inverse), (y, y_inverse) = (
        unit_rows(with_float64(one.cpu()).double()) for one in (before, after)
    )
    live = ((x_inverse > 0) & (y_inverse > 0)).squeeze(-1)
    apart, together = (torch.linalg.vector_norm(x + sign * y, dim=-1)[live] for sign in (-1.0, 1.0))
    return (
        float((2.0 * torch.atan2(apart, together)).rad2deg().median())
        if bool(live.any())
        else math.nan
    )
