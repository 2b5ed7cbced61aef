"""Sliced Wasserstein distance to the uniform distribution on the sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu._checks import check_count
from lightning_hsu._core import seeded_noise, tangent, unit_rows
from lightning_hsu.measures.sphere import SphereMeasure
from lightning_hsu.measures.state import State, counts_draws, draw_of, holds_draws, next_draw


@dataclass(frozen=True)
class SlicedWasserstein(SphereMeasure):
    r"""Squared spherical sliced Wasserstein distance from the neurons to the uniform distribution.

    The neurons are projected onto random great circles. On each, the squared 2-Wasserstein distance
    to the uniform distribution has a closed form in the sorted angles, measured in turns. It takes
    O(circles (n d + n log n)).

    The circles are drawn anew at each training step, from a seed that all ranks share; a call
    without a state uses the first draw. The value belongs to these circles, so a common rotation of
    the neurons changes it as another draw would (but not in two dimensions, where there is only one
    circle). Exactly equal neurons are separated, since each takes its own place on the circle.

    Args:
        circles: Great circles to average over, at least 1.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...) in [1 / (12 n**2), 1 / 12]:
        from equidistant on each circle to all equal. Random neurons have 1 / (12 n) on average.

    Raises:
        ValueError: for circles below 1.

    Reference:
        Bonet et al., "Spherical Sliced-Wasserstein", ICLR 2023, arXiv 2206.08780, proposition 1.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import SlicedWasserstein
        >>> square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        >>> print(f"{12 * 16 * SlicedWasserstein()(square):.5f}")
        1.00000
    """

    circles: int = 64

    def __post_init__(self) -> None:
        check_count("circles", self.circles)

    def prepare(self, x: Tensor, state: State | None = None) -> State:
        """The number of the draw: 0, then one more each step."""
        return next_draw(x, state)

    def fits(self, x: Tensor, state: State) -> bool:
        """Whether the state counts draws."""
        return holds_draws(x, state)

    def goes_on(self, x: Tensor, state: State) -> bool:
        """Tell whether the state counts draws, and not beyond all steps."""
        return counts_draws(x, state)

    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Squared distance (b,) of unit rows x (b, n, d), mean over the circles."""
        n = x.shape[-2]
        on_circle = (x @ self._planes(x, state)).reshape(*x.shape[:-1], 2, -1).double()
        across, along = on_circle.unbind(-2)  # (b, n, circles)
        # At right angles to the circle any place will do, and atan2 has no slope there.
        lost = across.square() + along.square() < 1e-30
        angle = torch.atan2(torch.where(lost, 0.0, across), torch.where(lost, 1.0, along))
        turn = angle / (2.0 * math.pi)
        turn = turn.sort(dim=-2, stable=True).values  # in [-1/2, 1/2]
        rank = torch.arange(1, n + 1, dtype=turn.dtype, device=x.device)[:, None]
        shift = ((n + 1 - 2 * rank) * turn).sum(-2) / n**2
        spread = turn.var(-2, correction=0) + shift + 1.0 / 12.0
        return spread.mean(-1).to(x.dtype)

    def expectation(self, n: int, d: int) -> float | None:
        """Exact: projections of uniform neurons are uniform on the circle."""
        return 1.0 / (12.0 * n)

    def bound(self, n: int, d: int) -> float | None:
        """The value of neurons equidistant on every circle, possible only in two dimensions."""
        return 1.0 / (12.0 * n * n)

    def _planes(self, x: Tensor, state: State | None) -> Tensor:
        """An orthonormal pair of directions for each circle, (d, 2 * circles)."""
        pair = seeded_noise(2, self.circles, x.shape[-1], like=x.detach(), draw=draw_of(state))
        first = unit_rows(pair[0])[0]
        second = unit_rows(tangent(pair[1], first))[0]
        return torch.cat([first, second]).mT
