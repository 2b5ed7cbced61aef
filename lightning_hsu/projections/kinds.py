"""Linear maps of neurons to fewer dimensions: what they have in common, and random ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_hsu._checks import check_count
from lightning_hsu._core import seeded_noise
from lightning_hsu.measures import Measure, State
from lightning_hsu.measures.state import counts_draws, draw_of, holds_draws, next_draw


class Projection(ABC):
    """Linear maps to ``dim`` dimensions; subclasses are frozen dataclasses.

    Attributes:
        dim: The dimension to project to.
        comparable: Whether the value of random neurons is a reference for the value in training.
    """

    comparable: ClassVar[bool] = True
    dim: int

    @abstractmethod
    def prepare(self, x: Tensor, measure: Measure, state: State | None) -> State:
        """Return the state of the projections of unit rows x (b, n, d).

        Args:
            x: Unit rows.
            measure: The measure of the projected neurons.
            state: The last step's state, to continue from; None starts afresh.
        """

    def copies(self, d: int) -> int:
        """Return how many projections of neurons in d dimensions are made together."""
        return 1

    def prepare_flops(self, n: int, d: int) -> float:
        """Return about how many FLOP a fresh :meth:`prepare` of (n, d) neurons takes."""
        return 0.0

    @abstractmethod
    def fits(self, x: Tensor, state: State) -> bool:
        """Tell whether a state is one of this projection for the shape of x (b, n, d)."""

    def goes_on(self, x: Tensor, state: State) -> bool:
        """Tell whether :meth:`prepare` can go on from a state, which may hold any tensors."""
        return self.fits(x, state)

    @abstractmethod
    def project(self, x: Tensor, state: State) -> Tensor:
        """Project unit rows x (b, n, d) to (b, count, n, dim), differentiably."""


@dataclass(frozen=True)
class RandomProjection(Projection):
    """Gaussian projections, drawn anew each step from a seed that all ranks share.

    Args:
        dim: Dimension to project to, at least 2; 30 to 40 as published.
        count: Projections to average over, at least 1.

    Raises:
        ValueError: for a dim or a count that is too small.
    """

    dim: int = 30
    count: int = 1

    def __post_init__(self) -> None:
        check_count("dim", self.dim, 2)
        check_count("count", self.count)

    def copies(self, d: int) -> int:
        """The count."""
        return self.count

    def prepare(self, x: Tensor, measure: Measure, state: State | None) -> State:
        """Number the draw."""
        return next_draw(x, state)

    def fits(self, x: Tensor, state: State) -> bool:
        """Tell whether the state counts draws."""
        return holds_draws(x, state)

    def goes_on(self, x: Tensor, state: State) -> bool:
        """Tell whether the state counts draws, and not beyond all steps."""
        return counts_draws(x, state)

    def project(self, x: Tensor, state: State) -> Tensor:
        """Project with each matrix of the draw."""
        matrices = seeded_noise(
            self.count, self.dim, x.shape[-1], like=x.detach(), draw=draw_of(state)
        )
        return x[:, None] @ matrices.mT


@dataclass(frozen=True)
class GroupProjection(Projection):
    """Coordinates in groups of ``dim``, shuffled anew each step.

    Coordinates left over take no part until the next shuffle.

    Args:
        dim: Coordinates in a group, at least 2.

    Raises:
        ValueError: for a dim below 2.
    """

    dim: int = 30

    def __post_init__(self) -> None:
        check_count("dim", self.dim, 2)

    def copies(self, d: int) -> int:
        """The groups."""
        return d // self.dim

    def prepare(self, x: Tensor, measure: Measure, state: State | None) -> State:
        """Number the draw."""
        return next_draw(x, state)

    def fits(self, x: Tensor, state: State) -> bool:
        """Tell whether the state counts draws."""
        return holds_draws(x, state)

    def goes_on(self, x: Tensor, state: State) -> bool:
        """Tell whether the state counts draws, and not beyond all steps."""
        return counts_draws(x, state)

    def project(self, x: Tensor, state: State) -> Tensor:
        """Take the coordinates group by group."""
        d = x.shape[-1]
        order = seeded_noise(d, like=x.detach(), draw=draw_of(state)).argsort()
        shuffled = order[: d - d % self.dim]
        return x[..., shuffled].reshape(*x.shape[:-1], -1, self.dim).movedim(-2, 1)
