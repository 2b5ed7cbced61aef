"""From a layer's neurons to its parameters: compute, shorten where a step would be too long, add or move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_hsu._core.foreach import SMALL, add_pair_gradients, shortening
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu._engine.layer import Layer, widened
from lightning_hsu._engine.state import ShareMeans
from lightning_hsu._neurons.sharding import Reading, Replicas, any_holder, norm_of, sum_over_ranks
from lightning_hsu.coefficients import Share
from lightning_hsu.measures import Measure, State


@dataclass(frozen=True)
class GradientStats:
    """What one application does to one layer, on request: tensors, nothing is synchronised.

    Args:
        share: Norm of the added gradient over the norm of the task's; not finite where the task's is 0 or not finite.
        limited: Neurons whose penalty gradient was shortened by the step limit.
        coefficient: The coefficient.
    """

    share: Tensor
    limited: Tensor
    coefficient: Tensor | float


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """One layer about to get its gradient, or about to move.

    Args:
        layer: The layer.
        own: Learning rates of the parameters that may be touched, by id.
        rate: The learning rate that its neurons will move with.
        reading: Its neurons, taken while gradients were recorded.
        state: What its measure carries from step to step, prepared for them.
        grad_scale: Factor that the task's gradients still carry.
    """

    layer: Layer
    own: Mapping[int, float]
    rate: float
    reading: Reading
    state: State | None = None
    grad_scale: float = 1.0

    @property
    def neurons(self) -> Tensor:
        """The neurons (groups, n, d) without a graph, in float32 or wider."""
        return widened(self.reading.x.detach())

    def follow(self, grad: Tensor, means: ShareMeans) -> None:
        """Let the means of a share take in this step, of which ``grad`` (groups, n, d) is the penalty's gradient."""
        share = self.layer.strength
        if isinstance(share, Share) and (places := self._places(grad / grad.shape[0])):
            task, penalty = self._norms(places)
            means.update(self.layer.target.name, share, task / self.grad_scale, penalty)

    def weighted(
        self, grad: Tensor, coefficient: Tensor | float, step_limit: float | None, *, note: bool
    ) -> tuple[Tensor, GradientStats | None]:
        """Make a gradient (groups, n, d) coefficient times its mean over groups, within the limit; a note where asked for."""
        scale = coefficient / grad.shape[0]
        factor = self.shortening(grad, step_limit, scale)
        grad = grad.mul_(factor * scale)
        if not note or not (places := self._places(grad)):
            return grad, None
        task, penalty = self._norms(places)
        limited = any_holder(factor < 1, places[0][0]).sum()
        return grad, GradientStats(penalty * self.grad_scale / task, limited, coefficient)

    def add(self, grad: Tensor) -> None:
        """Add a weighted gradient (groups, n, d) to ``.grad``."""
        for _, task, part in self._places(grad):
            task.add_(part if self.grad_scale == 1.0 else part * self.grad_scale)

    def move(self, grad: Tensor) -> None:
        """Move by learning rate times a weighted gradient (groups, n, d), along the sphere.

        Neurons that are a parameter's entries keep their norms. Where they are computed from parameters these move by
        the gradient pulled back.
        """
        entries = self.layer.target.rearranges(self.reading)
        change = self._along_the_sphere(grad) if entries else -grad
        for p, value, part in list(
            self.layer.target.places(self.reading, change, self.own, values=True)
        ):
            value.add_(part if entries else part * self.own[id(p)])

    def shortening(
        self, grad: Tensor, step_limit: float | None, scale: Tensor | float = 1.0
    ) -> Tensor:
        """Factors (groups, n, 1) in (0, 1] that keep a step by ``scale * grad`` within the limit and its dtype's range."""
        return shortening(
            grad,
            self.neurons,
            scale,
            self._limit(step_limit),
            torch.finfo(self.reading.x.dtype).max / 2,
        )

    def addition(
        self, coefficient: Tensor | float, step_limit: float | None
    ) -> GradientUpdate | None:
        """What to add to ``.grad``, if all there is to know of it are numbers; None if not."""
        x, parameter = self.reading.x.detach(), self.reading.parameter
        if parameter is None or isinstance(coefficient, Tensor):
            return None
        places = self._places(x)
        if len(places) != 1 or places[0][2] is not x or places[0][1].dtype != x.dtype:
            return None  # it has to be pulled back to the parameters
        return GradientUpdate(
            x, places[0][1], coefficient / x.shape[0], self._limit(step_limit), self.grad_scale
        )

    def _limit(self, step_limit: float | None) -> float | None:
        """Largest length of a neuron's gradient over its norm."""
        return None if step_limit is None or self.rate <= 0 else step_limit / self.rate

    def _along_the_sphere(self, grad: Tensor) -> Tensor:
        """The change (groups, n, d) of a step against a tangent gradient that keeps each neuron's norm."""
        x = self.neurons
        moved = x - self.rate * grad
        before, after = (
            torch.linalg.vector_norm(rows, dim=-1, keepdim=True) for rows in (x, moved)
        )
        return torch.where(before > 0, moved * (before / after) - x, 0.0)

    def _places(self, grad: Tensor) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        """Triples (parameter, part of its ``.grad``, part of the gradient that belongs there)."""
        return list(self.layer.target.places(self.reading, grad, self.own))

    def _norms(self, places: list[tuple[nn.Parameter, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Norms of the task's gradient, as it is in ``.grad``, and of the penalty's."""
        tasks = [self.layer.target.own_part(self.reading, p, task) for p, task, _ in places]
        return norm_of(tasks), norm_of([part for _, _, part in places])


def penalty_gradients(
    applications: Sequence[LayerUpdate], replicas: Replicas | None = None
) -> list[Tensor]:
    """Gradient (groups, n, d) of each layer's penalty, summed over its groups.

    Small layers of equal shape are computed together, large ones each by all replicas together. Of a sharded layer only the
    rows that this rank holds are computed, against all; the others are zero.
    """
    found = {} if replicas is None else _together(applications, replicas)
    stacks: dict[object, list[int]] = {}
    for i, one in enumerate(applications):
        x, plain = one.reading.x, one.state is None and one.layer.rows is None
        alike = (
            (one.layer.measure, x.shape, x.dtype, x.device) if plain and x.numel() <= SMALL else i
        )
        if i not in found:
            stacks.setdefault(alike, []).append(i)
    for members in stacks.values():
        stack = [applications[i].neurons for i in members]
        first = applications[members[0]]
        x, rows, measure = (
            torch.cat(stack) if len(stack) > 1 else stack[0],
            first.layer.rows,
            first.layer.measure,
        )
        grad = (
            measure.value_and_grad(x, first.state)[1]
            if rows is None
            else measure.gradient_rows(x, rows, first.state)
        )
        found |= dict(zip(members, torch.split(grad, stack[0].shape[0]), strict=True))
    return [found[i] for i in range(len(applications))]


def add_together(additions: Mapping[LayerUpdate, GradientUpdate]) -> None:
    """Add to many layers at once, those of one measure together."""
    found: dict[Measure, list[GradientUpdate]] = {}
    for one, addition in additions.items():
        found.setdefault(one.layer.measure, []).append(addition)
    for measure, members in found.items():
        if (term := measure.pair_term()) is not None:
            add_pair_gradients(members, term)


def _together(applications: Sequence[LayerUpdate], replicas: Replicas) -> dict[int, Tensor]:
    """Gradients of the large layers that can be split: each replica computes its part of the pairs."""
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    for i, one in enumerate(applications):
        if (
            one.state is None
            and one.layer.rows is None
            and one.reading.x.shape[1] >= replicas.split_above
        ):
            part = one.layer.measure.gradient_part(one.neurons, replicas.rank, replicas.size)
            parts |= {} if part is None else {i: part}
    if not parts:
        return {}
    summed = sum_over_ranks([part for pair in parts.values() for part in pair], replicas.group)
    found = {}
    for i, grad, apart in zip(parts, summed[::2], summed[1::2], strict=True):
        one = applications[i]
        # Coincident neurons part along a direction that is no sum over pairs.
        found[i] = one.layer.measure.value_and_grad(one.neurons)[1] if float(apart) > 0 else grad
    return found
