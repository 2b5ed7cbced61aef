"""Pair energies of very many neurons: each step over another random partition into blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._checks import check_count, check_neurons
from lightning_hsu._core import (
    PairEnergy,
    PairTerm,
    exact_arithmetic,
    pair_energy,
    takes_part,
    with_float64,
    working_dtype,
)
from lightning_hsu._core.sampling import block_spread, of_all_pairs, random_blocks
from lightning_hsu.measures.base import (
    Measure,
    State,
    check_measure,
    check_state,
    counts_draws,
    draw_of,
    next_draw,
)
from lightning_hsu.measures.riesz import RieszEnergy

_MHE = RieszEnergy(s=2.0, half_space=True)


class SamplingError(NamedTuple):
    """Standard errors of a sampled energy (...): of its natural value, and of its gradient over the gradient's norm."""

    value: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Sampled(Measure):
    r"""A pair energy estimated from blocks of neurons: n * block * d FLOP instead of n * n * d.

    Each step the neurons are parted at random into blocks of ``block`` or a few more, from a seed that all ranks share, and
    only pairs within a block are counted. Value and gradient are unbiased (the logarithm of :class:`GaussianPotential`
    nearly so), every neuron but fewer than one a block gets its gradient, and :meth:`error` states the standard errors.
    Up to twice ``block`` neurons are computed exactly. A value without a state belongs to the first draw.

    Args:
        measure: A mean over pairs: :class:`RieszEnergy` (by default in half space, s = 2), :class:`GaussianPotential` or your
            own :class:`PairwiseMeasure`.
        block: Neurons of a block, 4 or more.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...).

    Raises:
        TypeError: for a measure that is no mean over pairs.
        ValueError: for a block that is no int of at least 4.

    Reference:
        Hoeffding, "A class of statistics with asymptotically normal distribution", 1948, for the errors.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import RieszEnergy, Sampled
        >>> x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
        >>> measure = Sampled(RieszEnergy(s=2), block=100)
        >>> exact, (error, _) = RieszEnergy(s=2)(x), measure.error(x)
        >>> bool((measure(x) - exact).abs() < 4 * error), bool(error < 1e-3 * exact)
        (True, True)
    """

    measure: Measure = _MHE
    block: int = 1024

    def __post_init__(self) -> None:
        check_measure(self.measure)
        check_count("block", self.block, 4)
        if self.measure.pair_term() is None:
            raise TypeError(
                f"only a mean over pairs, such as RieszEnergy(s=2), can be sampled; got {self.measure!r}"
            )

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """As the measure has it."""
        return self.measure.higher_is_better

    @property
    def half_space(self) -> bool:
        """Whether the measure is one of lines."""
        return bool(getattr(self.measure, "half_space", False))

    def prepare(self, x: Tensor, state: State | None = None) -> State | None:
        """The number of the draw: 0, then one more each step; None where all pairs are counted."""
        return next_draw(x, state) if self.blocks(x.shape[-2]) > 1 else None

    def fits(self, x: Tensor, state: State) -> bool:
        """Whether the state counts draws."""
        return counts_draws(x, state)

    def blocks(self, n: int) -> int:
        """How many blocks n neurons are parted into; 1 where all pairs are counted."""
        return max(1, n // self.block)

    def penalty(self, x: Tensor, state: State | None = None) -> Tensor:
        """Penalty (...), differentiable, twice too; see :meth:`Measure.penalty`.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has fewer than two dimensions.
        """
        self._check(x, state)
        if self.blocks(x.shape[-2]) == 1 or not x.numel():
            return self.measure.penalty(x)
        found = []
        for group in x.reshape(-1, *x.shape[-2:]):
            blocks, n = self._drawn(group, state)
            energies = [PairEnergy.apply(group[block], self._term) for block in blocks]  # type: ignore[no-untyped-call]
            found.append(self._whole(torch.stack(energies).mean(), n, blocks.shape[1]))
        return torch.stack(found).reshape(x.shape[:-2]).to(working_dtype(x.dtype))

    def value_and_grad(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Penalty (...) and its gradient (..., n, d), a block at a time, without an autograd graph; see :meth:`penalty`."""
        self._check(x, state)
        if self.blocks(x.shape[-2]) == 1 or not x.numel():
            return self.measure.value_and_grad(x)
        grads = torch.zeros_like(x).reshape(-1, *x.shape[-2:])
        groups = zip(x.detach().reshape(grads.shape), grads, strict=True)
        values = [
            self._add_gradient(group, grad, *self._drawn(group, state)) for group, grad in groups
        ]
        return torch.stack(values).reshape(x.shape[:-2]).to(working_dtype(x.dtype)), grads.reshape(
            x.shape
        )

    def _add_gradient(self, x: Tensor, grad: Tensor, blocks: Tensor, n: int) -> Tensor:
        """Put the gradient of neurons x (n, d) into ``grad``, which holds zeros; returns the penalty."""
        factor = of_all_pairs(self._term, n, blocks.shape[1])[0] / len(blocks)
        energies = []
        for block in blocks:
            energy, part = pair_energy(x[block], self._term)
            assert part is not None
            energies.append(energy)
            grad[block] = part.mul_(factor)
        penalty = self._whole(torch.stack(energies).mean(), n, blocks.shape[1])
        if self._term.logarithm:
            grad /= penalty.exp()
        return penalty

    @torch.no_grad()
    def error(self, x: Tensor, state: State | None = None) -> SamplingError:
        """Standard errors of the estimate under a state, from the same blocks, in float64; 0 where all pairs are counted.

        Args:
            x: Neurons, shape (..., n, d), floating.
            state: From :meth:`prepare`.

        Returns:
            That of the natural value (...), and that of the gradient over the norm of the gradient (...), NaN where that is 0.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has fewer than two dimensions.
        """
        self._check(x, state)
        found = torch.zeros(x.shape[:-2].numel(), 2, dtype=torch.float64)
        with exact_arithmetic(x):
            for group, errors in zip(
                with_float64(x).reshape(len(found), *x.shape[-2:]), found, strict=True
            ):
                blocks, n = self._drawn(group, state)
                if len(blocks) > 1:
                    grad = torch.zeros_like(group)
                    penalty = self._add_gradient(group, grad, blocks, n)
                    value, distance = block_spread(group, blocks, self._term, n)
                    distance /= float(self.natural(penalty)) if self._term.logarithm else 1.0
                    length = torch.linalg.vector_norm(grad.double()).cpu()
                    errors[:] = torch.stack(
                        [torch.tensor(value, dtype=torch.float64), distance / length]
                    )
        return SamplingError(*found.reshape(*x.shape[:-2], 2).unbind(-1))

    def sample(self, x: Tensor, state: State | None = None) -> list[Tensor]:
        """The blocks (k, m, d) of each group of neurons x (..., n, d) under a state."""
        return [
            group[self._drawn(group, state)[0]]
            for group in x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
        ]

    def is_exact(self, state: State | None) -> bool:
        """Only where all pairs are counted."""
        return state is None

    def natural(self, penalty: Tensor) -> Tensor:
        """As the measure has it."""
        return self.measure.natural(penalty)

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """As the measure has it."""
        return self.measure.ratio(value, reference)

    def expectation(self, n: int, d: int) -> float | None:
        """As the measure has it."""
        return self.measure.expectation(n, d)

    def deviation(self, n: int, d: int) -> float | None:
        """As the measure has it; what sampling adds is in :meth:`error`."""
        return self.measure.deviation(n, d)

    def best(self, n: int, d: int) -> float | None:
        """As the measure has it: the bound is one of all pairs."""
        return self.measure.best(n, d)

    def idle(self, n: int, d: int) -> str | None:
        """As the measure has it."""
        return self.measure.idle(n, d)

    def flop(self, n: int, d: int) -> float:
        """That of the blocks."""
        return self.blocks(n) * self.measure.flop(n // self.blocks(n), d)

    def for_head(self) -> Measure:
        """The measure for a class head, sampled."""
        return replace(self, measure=self.measure.for_head())

    @property
    def _term(self) -> PairTerm:
        term = self.measure.pair_term()
        assert term is not None
        return term

    def _check(self, x: Tensor, state: State | None) -> None:
        check_neurons(x)
        if state is not None:
            check_state(self, x, state)

    def _drawn(self, x: Tensor, state: State | None) -> tuple[Tensor, int]:
        """Blocks (k, m) of the live neurons among x (n, d), and how many those are."""
        live = takes_part(x.detach().to(working_dtype(x.dtype)))
        return random_blocks(live, self.block, draw_of(state)), int(live.sum())

    def _whole(self, mean: Tensor, n: int, m: int) -> Tensor:
        """The mean energy of n neurons from that of blocks of m, or its logarithm."""
        factor, summand = of_all_pairs(self._term, n, m)
        energy = factor * mean + summand
        return torch.where(energy > 0, energy, 1.0).log() if self._term.logarithm else energy


def sampled_above(measure: Measure, n: int, limit: int | None) -> Measure:
    """The measure, sampled where there are more than ``limit`` neurons and it is a mean over pairs."""
    return (
        measure if limit is None or n <= limit or measure.pair_term() is None else Sampled(measure)
    )
