"""Pair energies of very many neurons, at each step over a new random partition into blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._checks import check_count, check_neurons
from lightning_hsu._core import (
    PairEnergy,
    PairTerm,
    exact_arithmetic,
    in_one_pass,
    live_rows,
    pair_energy,
    with_float64,
    working_dtype,
)
from lightning_hsu._core.sampling import block_spread, of_all_pairs, random_blocks
from lightning_hsu._core.sphere import LONGEST, SHORTEST
from lightning_hsu.measures.autograd import Evaluation
from lightning_hsu.measures.base import Measure, check_measure, check_state
from lightning_hsu.measures.defaults import DEFAULT_MEASURE
from lightning_hsu.measures.state import State, counts_draws, draw_of, holds_draws, next_draw
from lightning_hsu.measures.wrapper import MeasureWrapper

_ENTRIES = 2**24
"""Entries of blocks that are computed together."""


class SamplingError(NamedTuple):
    """Standard errors of a sampled energy.

    Args:
        value: Standard error of its natural value, shape (...).
        gradient: Standard error of its gradient, over the norm of the gradient, shape (...).
    """

    value: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Sampled(MeasureWrapper):
    r"""A pair energy estimated from blocks of neurons: n * block * d FLOP instead of n * n * d.

    At each step the neurons are divided at random into blocks of ``block`` or a few more, from a
    seed that all ranks share, and only pairs within a block are counted. Value and gradient are
    unbiased (the logarithm of :class:`GaussianPotential` nearly so). All neurons get their gradient
    except a few left over, fewer than there are blocks. :meth:`error` returns the standard errors.
    Fewer than twice ``block`` neurons are computed exactly. Without a state the value is that of
    the first draw.

    Args:
        measure: A mean over pairs: :class:`RieszEnergy` (by default with s = 2),
            :class:`GaussianPotential` or your own :class:`PairwiseMeasure`.
        block: Neurons in a block, 4 or more.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...).

    Raises:
        TypeError: for a measure that is not a mean over pairs.
        ValueError: for a block that is not an int of at least 4.

    Reference:
        Hoeffding, "A class of statistics with asymptotically normal distribution", 1948, for the
        errors.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import RieszEnergy, Sampled
        >>> x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
        >>> measure = Sampled(RieszEnergy(s=2), block=100)
        >>> exact, (error, _) = RieszEnergy(s=2)(x), measure.error(x)
        >>> bool((measure(x) - exact).abs() < 4 * error), bool(error < 1e-3 * exact)
        (True, True)
    """

    measure: Measure = DEFAULT_MEASURE
    block: int = 1024

    # The estimate is unbiased: what is known of the values of the inner measure holds for it, too.
    expectation = MeasureWrapper.expectation
    deviation = MeasureWrapper.deviation
    bound = MeasureWrapper.bound
    idle = MeasureWrapper.idle

    def __post_init__(self) -> None:
        check_measure(self.measure)
        check_count("block", self.block, 4)
        if self.measure.pair_term() is None:
            raise TypeError(
                "only a mean over pairs, such as RieszEnergy(s=2), can be sampled; "
                f"got {self.measure!r}"
            )

    def prepare(self, x: Tensor, state: State | None = None) -> State | None:
        """Number the draw: 0, then one more each step; None where all pairs are counted."""
        if self.blocks(x.shape[-2]) == 1:
            return None
        return next_draw(x, state)

    def fits(self, x: Tensor, state: State) -> bool:
        """Tell whether the state counts draws."""
        return holds_draws(x, state)

    def goes_on(self, x: Tensor, state: State) -> bool:
        """Tell whether the state counts draws, and not beyond all steps."""
        return counts_draws(x, state)

    def is_exact(self, state: State | None) -> bool:
        """Only where all pairs are counted."""
        return state is None

    def blocks(self, n: int) -> int:
        """Return how many blocks n neurons are divided into; 1 where all pairs are counted."""
        return max(1, n // self.block)

    def penalty(self, x: Tensor, state: State | None = None) -> Tensor:
        """Penalty (...), twice differentiable; see :meth:`Measure.penalty`.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has fewer than two dimensions.
        """
        self._check(x, state)
        if self._takes_all(x):
            return self.measure.penalty(x)
        return Evaluation(partial(Sampled.value_and_grad, self), self.recorded)(x, state)

    def value_and_grad(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Return the penalty (...) and its gradient (..., n, d), some blocks at a time."""
        self._check(x, state)
        if self._takes_all(x):
            return self.measure.value_and_grad(x)
        grads = _groups(torch.zeros_like(x))
        values = []
        for group, grad in zip(_groups(x.detach()), grads, strict=True):
            blocks, live = self._drawn(group, state)
            values.append(self._add_gradient(group, grad, blocks, live))
        value = torch.stack(values).reshape(x.shape[:-2])
        return value.to(working_dtype(x.dtype)), grads.reshape(x.shape)

    def gradient_on_gpu(
        self, x: Tensor, state: State | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Return the gradient and whether it is exact; see :class:`Measure`.

        Neurons that take no part are in blocks, too: with any of them it is not exact.
        """
        self._check(x, state)
        if self._takes_all(x):
            return self.measure.gradient_on_gpu(x)
        n = x.shape[-2]
        grads = _groups(torch.zeros_like(x))
        exact = []
        for group, grad in zip(_groups(x.detach()), grads, strict=True):
            blocks = random_blocks(torch.arange(n, device=x.device), self.block, draw_of(state))
            factor = of_all_pairs(self._term, n, blocks.shape[1])[0] / len(blocks)
            energies = []
            for some in self._parts(blocks, x):
                found = in_one_pass(group[some], self._term)
                if found is None:
                    return None
                energies.append(found.energy)
                exact.append(found.is_exact)
                grad[some] = found.grad.mul_(factor)
            if self._term.logarithm:
                grad /= self._of_all(torch.cat(energies).mean(), n, blocks.shape[1]).exp()
            norm = torch.linalg.vector_norm(group, dim=-1)
            exact.append(((norm > SHORTEST) & (norm < LONGEST)).all())
        return grads.reshape(x.shape), torch.stack(exact).all()

    def recorded(self, x: Tensor, state: State | None = None) -> Tensor:
        """Penalty (...) of x (..., n, d) by autograd alone, twice differentiable."""
        self._check(x, state)
        values = []
        for group in _groups(x):
            blocks, live = self._drawn(group, state)
            energies = [PairEnergy.apply(group[block], self._term) for block in blocks]
            values.append(self._of_all(torch.stack(energies).mean(), live, blocks.shape[1]))
        return torch.stack(values).reshape(x.shape[:-2]).to(working_dtype(x.dtype))

    @torch.no_grad()
    def error(self, x: Tensor, state: State | None = None) -> SamplingError:
        """Return standard errors of the estimate under a state, from the same blocks, in float64.

        They are 0 where all pairs are counted.

        Args:
            x: Neurons, shape (..., n, d), floating.
            state: From :meth:`prepare`.

        Returns:
            The error of the natural value (...), and that of the gradient over the norm of the
            gradient (...), NaN where this norm is 0.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has fewer than two dimensions.
        """
        self._check(x, state)
        errors = torch.zeros(x.shape[:-2].numel(), 2, dtype=torch.float64)
        with exact_arithmetic(x):
            for group, error in zip(_groups(with_float64(x)), errors, strict=True):
                blocks, live = self._drawn(group, state)
                if len(blocks) > 1:
                    error[:] = self._error_of_group(group, blocks, live)
        value, gradient = errors.reshape(*x.shape[:-2], 2).unbind(-1)
        return SamplingError(value, gradient)

    def sample(self, x: Tensor, state: State | None = None) -> list[Tensor]:
        """Return the blocks (k, m, d) of each group of neurons x (..., n, d) under a state."""
        return [group[self._drawn(group, state)[0]] for group in _groups(x)]

    def for_head(self) -> Measure:
        """Return the measure for a class head, sampled."""
        return replace(self, measure=self.measure.for_head())

    def grad_flops(self, n: int, d: int) -> float:
        """Return the FLOP of all blocks."""
        blocks = self.blocks(n)
        return blocks * self.measure.grad_flops(n // blocks, d)

    @property
    def _term(self) -> PairTerm:
        term = self.measure.pair_term()
        assert term is not None
        return term

    def _check(self, x: Tensor, state: State | None) -> None:
        check_neurons(x)
        if state is not None:
            check_state(self, x, state)

    def _takes_all(self, x: Tensor) -> bool:
        """Whether all pairs of the neurons x (..., n, d) are counted."""
        return self.blocks(x.shape[-2]) == 1 or not x.numel()

    def _drawn(self, x: Tensor, state: State | None) -> tuple[Tensor, int]:
        """Blocks (k, m) of the live neurons among x (n, d), and how many neurons are live."""
        live = live_rows(x.detach().to(working_dtype(x.dtype)))
        return random_blocks(live, self.block, draw_of(state)), len(live)

    def _parts(self, blocks: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Blocks (k, m) of neurons x (..., n, d) that are computed together."""
        return torch.split(blocks, max(1, _ENTRIES // (blocks.shape[1] * x.shape[-1])))

    def _add_gradient(self, x: Tensor, grad: Tensor, blocks: Tensor, live: int) -> Tensor:
        """Put the gradient of neurons x (n, d) into ``grad``, which is zero; return the penalty."""
        factor = of_all_pairs(self._term, live, blocks.shape[1])[0] / len(blocks)
        energies = []
        for some in self._parts(blocks, x):
            energy, part = pair_energy(x[some], self._term)
            assert part is not None
            energies.append(energy)
            grad[some] = part.mul_(factor)
        penalty = self._of_all(torch.cat(energies).mean(), live, blocks.shape[1])
        if self._term.logarithm:
            grad /= penalty.exp()
        return penalty

    def _of_all(self, mean: Tensor, n: int, m: int) -> Tensor:
        """The mean energy of n neurons from that of blocks of m, or its logarithm."""
        factor, summand = of_all_pairs(self._term, n, m)
        energy = factor * mean + summand
        if self._term.logarithm:
            return torch.where(energy > 0, energy, 1.0).log()
        return energy

    def _error_of_group(self, x: Tensor, blocks: Tensor, live: int) -> Tensor:
        """Standard errors (2,) of value and gradient of x (n, d), with ``live`` live neurons."""
        grad = torch.zeros_like(x)
        penalty = self._add_gradient(x, grad, blocks, live)
        value, distance = block_spread(x, blocks, self._term, live)
        if self._term.logarithm:
            distance /= float(self.natural(penalty))
        length = torch.linalg.vector_norm(grad.double()).cpu()
        return torch.stack([torch.tensor(value, dtype=torch.float64), distance / length])


def _groups(x: Tensor) -> Tensor:
    """Neurons (..., n, d) as groups (b, n, d)."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def measure_of_layer(
    measure: Measure, *, is_head: bool, neurons: int, sample_above: int | None
) -> Measure:
    """The measure of one layer: a head's is in full space, that of very many neurons is sampled."""
    if is_head:
        measure = measure.for_head()
    return sampled_above(measure, neurons, sample_above)


def sampled_above(measure: Measure, n: int, limit: int | None) -> Measure:
    """Return the measure, sampled if it is a mean over pairs and n is above ``limit``."""
    if limit is None or n <= limit or measure.pair_term() is None:
        return measure
    return Sampled(measure)
