"""Measures with an inner problem: witnesses search the sphere for the decisive point."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu._checks import check_count, check_flag, check_neurons
from lightning_hsu._core import exact_arithmetic
from lightning_hsu._core.witness import first_witnesses, random_witnesses
from lightning_hsu.measures.sphere import SphereMeasure
from lightning_hsu.measures.state import State, counts_calls

AFRESH = 20  # times as many steps without a state

Solution = tuple[Tensor, Tensor, bool]
"""Witnesses (k, d), the weights (k, m) of witnesses and points, and whether it is exact."""


class WitnessMeasure(SphereMeasure):
    """A weighted sum of a kernel between a few witnesses and the points.

    The state holds the witnesses and the weights.

    Attributes:
        weights_name: Name of the weights in the state, different for each member, so that no
            member takes the state of another.
        half_space: Whether the points are the 2n neurons ``x`` and ``-x``.
        witnesses: How many witnesses search.
        steps: How many steps each witness makes at each training step.
    """

    in_float64: ClassVar[bool] = True
    weights_name: ClassVar[str]
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
        """Find the witnesses of points x (m, d): exactly, or by a search from ``start`` (k, d)."""

    def prepare(self, x: Tensor, state: State | None = None) -> State:
        """Solve the inner problem at x (..., n, d): find the witnesses.

        Args:
            x: Neurons.
            state: What the last step's call returned. Its witnesses continue from where they are,
                but the worst one restarts from a new place. A state that does not fit is replaced
                by a fresh start, with 20 times as many steps.

        Returns:
            ``points`` (b, k, d), the witnesses of the b groups; ``shares`` (polarization) or
            ``multipliers`` (covering) (b, k, m), the part of each witness and point in the penalty;
            ``exact`` (b,), whether the value is proven to be that of the definition; ``step`` (b,),
            how many calls came before. The value at x is computed with these witnesses held fixed.
        """
        check_neurons(x)
        with torch.no_grad():
            unit, inverse_norm = self._unit(x)
            known = None
            if state is not None and self.goes_on(unit, state):
                known = state
            found = self._solutions(unit, inverse_norm, known)
        step = torch.zeros(len(unit), dtype=torch.int64)
        if known is not None:
            step = known["step"].cpu() + 1
        points, weights = self._stacked(found, unit)
        exact = torch.tensor([exact for _, _, exact in found], dtype=torch.bool)
        return {"points": points, self.weights_name: weights, "exact": exact, "step": step}

    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Penalty (b,) of unit rows x (b, n, d), with the witnesses held fixed."""
        assert state is not None
        points, weights = state["points"].to(x.device), state[self.weights_name].to(x.device)
        used = (weights != 0).any(2).any(0)
        cosine = points[:, used] @ self._mirrored(x).mT  # (b, k, m)
        return (weights[:, used, : cosine.shape[2]] * self._kernel(cosine)).sum((1, 2))

    def fits(self, x: Tensor, state: State) -> bool:
        """Tell whether the state has witnesses and weights for all neurons of x (..., n, d)."""
        if set(state) != {"points", self.weights_name, "exact", "step"}:
            return False
        if not super().fits(x, state):
            return False
        n, d = x.shape[-2:]
        groups = x.shape[:-2].numel()
        witnesses = state["points"].shape[1]
        points = 2 * n if self.half_space else n
        return state["points"].shape == (groups, witnesses, d) and state[
            self.weights_name
        ].shape == (groups, witnesses, points)

    def goes_on(self, x: Tensor, state: State) -> bool:
        """Tell whether the search can start from a state, even one for another number of neurons."""
        points, step = state.get("points"), state.get("step")
        if points is None or step is None or not counts_calls(x, step):
            return False
        if points.ndim != 3 or not points.is_floating_point():
            return False
        if points.shape[::2] != (len(step), x.shape[-1]) or points.shape[1] < self.witnesses:
            return False
        length = points.double().norm(dim=2)
        is_unit = (length - 1.0).abs() < 1e-3
        return bool((is_unit | (length == 0)).all())  # rows of 0 only fill up

    def idle(self, n: int, d: int) -> str | None:
        """In half space, fewer neurons than dimensions always leave some direction orthogonal."""
        if self.half_space and n < d:
            return "no force in half space with fewer neurons than dimensions: use half_space=False"
        return None

    def value_flops(self, n: int, d: int) -> float:
        """A fresh search, and the linear systems that exact solutions need."""
        search = 4.0 * AFRESH * self.steps * self.witnesses * n * d
        return search + 20.0 * n * n * max(min(n, 3 * d), d)

    def _solutions(self, x: Tensor, inverse_norm: Tensor, known: State | None) -> list[Solution]:
        """The solution for each group of unit rows x (b, n, d), without rows of inverse norm 0."""
        alive = inverse_norm.squeeze(-1) > 0
        with exact_arithmetic(x):
            return [self._of_group(rows[alive[i]], i, known) for i, rows in enumerate(x)]

    def _of_group(self, x: Tensor, group: int, known: State | None) -> Solution:
        """The solution for live unit rows x (n, d) of one group."""
        if len(x) == 0:
            return x.new_zeros(1, x.shape[1]), x.new_zeros(1, 0), False
        x = self._mirrored(x)
        if known is None:
            return self._afresh(x)
        start = known["points"][group, : self.witnesses].to(x, copy=True)
        if not bool(start.any(1).all()):
            return self._afresh(x)
        worst = int(self._heights(x, start).argmax())
        start[worst] = random_witnesses(1, x, 1 + int(known["step"][group]))[0]
        return self._solve(x, start, self.steps)

    def _afresh(self, x: Tensor) -> Solution:
        """The solution for points x (m, d) from fresh witnesses."""
        return self._solve(x, first_witnesses(x, self.witnesses), AFRESH * self.steps)

    def _stacked(self, found: list[Solution], x: Tensor) -> tuple[Tensor, Tensor]:
        """Witnesses (b, k, d) and weights (b, k, m) of all groups x (b, n, d), padded with 0."""
        most = max([self.witnesses, *(len(points) for points, _, _ in found)])
        points = x.new_zeros(len(x), most, x.shape[2])
        weights = x.new_zeros(len(x), most, self._mirrored(x).shape[1])
        for i, (group_points, group_weights, _) in enumerate(found):
            points[i, : len(group_points)] = group_points
            weights[i, : len(group_weights), : group_weights.shape[1]] = group_weights
        return points, weights

    @abstractmethod
    def _heights(self, x: Tensor, v: Tensor) -> Tensor:
        """What the witnesses v (k, d) minimise among points x (m, d), shape (k,)."""

    def _mirrored(self, x: Tensor) -> Tensor:
        """The neurons (..., n, d), in half space with their mirror images, (..., 2n, d)."""
        if self.half_space:
            return torch.cat([x, -x], -2)
        return x
