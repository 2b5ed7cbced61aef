"""Measures with an inner problem: a few witnesses look for the point of the sphere that the value is about."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu._checks import check_count, check_flag, check_neurons
from lightning_hsu._core import exact_arithmetic
from lightning_hsu._core.witness import first_witnesses, random_witnesses
from lightning_hsu.measures.base import SphereMeasure, State

AFRESH = 20  # times as many steps without a state

Solution = tuple[Tensor, Tensor, bool]
"""Witnesses (k, d), the weight (k, m) of each pair of witness and point in the penalty, and whether it is exact."""


class WitnessMeasure(SphereMeasure):
    """A weighted sum of a kernel between a few witnesses and the points; the state holds the witnesses and the weights."""

    wide: ClassVar[bool] = True
    weights_name: ClassVar[str]  # in the state, so that one member's is not taken for another's
    half_space: bool
    witnesses: int
    steps: int

    def __post_init__(self) -> None:
        check_flag("half_space", self.half_space)
        check_count("witnesses", self.witnesses)
        check_count("steps", self.steps)

    @abstractmethod
    def _kernel(self, cosine: Tensor) -> Tensor:
        """What a witness and a point at this cosine add to the penalty; differentiable."""

    @abstractmethod
    def _solve(self, x: Tensor, start: Tensor, steps: int) -> Solution:
        """Find the witnesses of points x (m, d), from those in start (k, d) unless there is an exact way."""

    def prepare(self, x: Tensor, state: State | None = None) -> State:
        """Solve the inner problem at x (..., n, d): find the witnesses.

        Args:
            x: Neurons.
            state: What the last step's call returned: its witnesses go on from where they are, the worst one from a
                new place. One that does not fit is replaced by a fresh start, with 20 times as many steps.

        Returns:
            ``points`` (b, k, d), the witnesses of the b groups; ``shares`` (polarization) or ``multipliers``
            (covering) (b, k, m), the part of each witness and point in the penalty; ``exact`` (b,), whether the value is
            proven to be that of the definition; ``step`` (b,), how many calls came before. The value at x is that of
            x with these witnesses held fixed.
        """
        check_neurons(x)
        with torch.no_grad():
            unit, inverse_norm = self._unit(x)
            alive = inverse_norm.squeeze(-1) > 0
            known = state if state is not None and self._goes_on(state, unit) else None
            with exact_arithmetic(unit):
                found = [self._of_group(rows[alive[i]], i, known) for i, rows in enumerate(unit)]
            step = (
                torch.zeros(len(unit), dtype=torch.int64)
                if known is None
                else known["step"].cpu() + 1
            )
            most = max([self.witnesses, *(len(points) for points, _, _ in found)])
            points = unit.new_zeros(
                len(unit), most, unit.shape[2]
            )  # zero rows where a group has fewer
            weights = unit.new_zeros(len(unit), most, self._mirrored(unit).shape[1])
            for i, (own, its, _) in enumerate(found):
                points[i, : len(own)] = own
                weights[i, : len(own), : its.shape[1]] = its
        return {
            "points": points,
            self.weights_name: weights,
            "exact": torch.tensor([e for _, _, e in found]),
            "step": step,
        }

    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Penalty (b,) of unit rows x (b, n, d): a sum over witnesses and points, the witnesses held fixed."""
        assert state is not None
        points, weights = state["points"].to(x.device), state[self.weights_name].to(x.device)
        used = (weights != 0).any(2).any(0)
        cosine = points[:, used] @ self._mirrored(x).mT  # (b, k, m)
        return (weights[:, used, : cosine.shape[2]] * self._kernel(cosine)).sum((1, 2))

    def fits(self, x: Tensor, state: State) -> bool:
        """Whether the state has witnesses and weights for all neurons of x (..., n, d)."""
        if set(state) != {"points", self.weights_name, "exact", "step"} or not super().fits(
            x, state
        ):
            return False
        b, n, d = x.shape[:-2].numel(), *x.shape[-2:]
        k, m = state["points"].shape[1], 2 * n if self.half_space else n
        return state["points"].shape == (b, k, d) and state[self.weights_name].shape == (b, k, m)

    def idle(self, n: int, d: int) -> str | None:
        """In half space fewer neurons than dimensions leave out a direction, whatever they are."""
        return (
            "no force in half space with fewer neurons than dimensions: use half_space=False"
            if self.half_space and n < d
            else None
        )

    def work(self, n: int, d: int) -> float:
        """A fresh search, and the systems that exact solutions take."""
        return 4.0 * AFRESH * self.steps * self.witnesses * n * d + 20.0 * n * n * max(
            min(n, 3 * d), d
        )

    def _goes_on(self, state: State, x: Tensor) -> bool:
        """Whether the search can start from the witnesses of a state, even of other neurons or another number of them."""
        points, step = (state.get(name, torch.empty(0)) for name in ("points", "step"))
        same = (
            points.ndim == 3
            and points.shape[::2] == x.shape[::2]
            and points.shape[1] >= self.witnesses
        )
        return same and step.shape == x.shape[:1] and bool(points.isfinite().all())

    def _of_group(self, x: Tensor, group: int, known: State | None) -> Solution:
        """The solution for live unit rows x (n, d) of one group."""
        if len(x) == 0:
            return x.new_zeros(1, x.shape[1]), x.new_zeros(1, 0), False
        x = self._mirrored(x)
        start = (
            x.new_zeros(1, 1)
            if known is None
            else known["points"][group, : self.witnesses].to(x, copy=True)
        )
        if known is None or not bool(start.any(1).all()):
            return self._solve(x, first_witnesses(x, self.witnesses), AFRESH * self.steps)
        worst = int(self._heights(x, start).argmax())
        start[worst] = random_witnesses(1, x, 1 + int(known["step"][group]))[0]
        return self._solve(x, start, self.steps)

    @abstractmethod
    def _heights(self, x: Tensor, v: Tensor) -> Tensor:
        """What the witnesses v (k, d) make small among points x (m, d): (k,)."""

    def _mirrored(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], -2) if self.half_space else x
