"""Means over pairs of neurons of a kernel of their distance."""

# No postponed annotations here: see measures/base.py.

import math
from abc import abstractmethod
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu._checks import check_hashable, check_kernel, check_neurons
from lightning_hsu._core import (
    PairEnergy,
    PairTerm,
    in_one_pass,
    or_one,
    pair_bound,
    pair_energy,
    pair_expectation,
    pair_rows,
    to_weights,
    with_float64,
    working_dtype,
)
from lightning_hsu.measures.base import Measure, check_rows
from lightning_hsu.measures.facts import Fact
from lightning_hsu.measures.state import State


class PairwiseMeasure(Measure):
    """A mean over unordered pairs of a kernel of the squared chord.

    A new member needs one method, :meth:`kernel`.

    Attributes:
        softening: Chord below which the kernel continues as its tangent line in the squared chord.
        logarithm: Whether training minimises the logarithm of the mean; the natural value is the
            mean itself.
        in_float64: Whether to compute in float64.
        absolutely_monotone: Whether the kernel, as a function of the cosine, and all its
            derivatives are >= 0, apart from a constant: then the universal lower bound holds.
        compiled_as: The name of the compiled version of the kernel, and its one parameter; None for
            a kernel of your own.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from lightning_hsu.measures import PairwiseMeasure
        >>> @dataclass(frozen=True)
        ... class InverseFourth(PairwiseMeasure):
        ...     def kernel(self, q, p):
        ...         return q**-2, -2 * q**-3
        >>> float(InverseFourth()(torch.eye(3)))
        0.25
    """

    facts: ClassVar[dict[str, Fact]] = {
        **Measure.facts,
        "compiled_as": Fact(("kernel",), needs_function=True),
        "absolutely_monotone": Fact(("kernel",)),
        "_pair_expectation": Fact(("kernel",)),
    }
    half_space: bool = False
    softening: float = 1e-2
    logarithm: ClassVar[bool] = False
    in_float64: bool = False
    absolutely_monotone: bool = False
    compiled_as: tuple[str, float] | None = None

    @abstractmethod
    def kernel(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kernel and its slope at squared chords.

        Args:
            q: Squared chords ``|x_i - x_j|**2 = 2 - 2 cos``, any shape, in (0, 4].
            p: Squared chords ``|x_i + x_j|**2 = 4 - q`` to the mirror image, as exact near 0 as q
                is; most kernels need only q.

        Returns:
            The value and its derivative with respect to q, elementwise, out of place. For second
            derivatives the value must be differentiable by autograd.
        """

    def natural(self, penalty: Tensor) -> Tensor:
        """Return the mean that belongs to a penalty."""
        if self.logarithm:
            return penalty.exp()
        return super().natural(penalty)

    def penalty(self, x: Tensor, state: State | None = None) -> Tensor:
        """Mean energy over unordered pairs, (...), or its logarithm; twice differentiable.

        Args:
            x: Neurons, shape (..., n, d), floating; rows of any positive norm. Zero rows take no
                part; fewer than two neurons have penalty 0.
            state: Not used; a kernel needs no state.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has fewer than two dimensions.
        """
        check_neurons(x)
        if not torch.is_grad_enabled():
            x = x.detach()  # otherwise the gradient would be computed in vain
        energy: Tensor = PairEnergy.apply(self._in_working_dtype(x), self._term())
        return self._penalty_of(energy, x)

    def value_and_grad(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Return the penalty and its gradient in one pass of about 3 n n d FLOP."""
        check_neurons(x)
        energy, grad = pair_energy(self._in_working_dtype(x), self._term())
        assert grad is not None
        if self.logarithm and grad.numel():
            scale = 1.0 / or_one(energy)
            grad = to_weights(grad, scale[..., None, None], x.dtype)
        return self._penalty_of(energy, x), grad.to(x.device, x.dtype)

    def gradient_on_gpu(
        self, x: Tensor, state: State | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Return the gradient and whether it is exact; see :class:`Measure`."""
        check_neurons(x)
        term = self.pair_term()
        found = None if term is None else in_one_pass(self._in_working_dtype(x), term)
        if found is None:
            return None
        grad = found.grad
        if self.logarithm:
            scale = 1.0 / or_one(found.energy)
            grad = to_weights(grad, scale[..., None, None], x.dtype)
        return grad.to(x.device, x.dtype), found.is_exact

    def gradient_rows(self, x: Tensor, rows: Tensor, state: State | None = None) -> Tensor:
        """Return the gradient in k rows of a group for about 4 k n d FLOP; see :class:`Measure`.

        Example:
            >>> from lightning_hsu.measures import RieszEnergy
            >>> x, rows = torch.randn(8, 64, 32), torch.arange(64).expand(8, 64) < 16
            >>> grad = RieszEnergy(s=1).gradient_rows(x, rows)
            >>> torch.allclose(grad[rows], RieszEnergy(s=1).value_and_grad(x)[1][rows], atol=1e-6)
            True
        """
        if self.logarithm:  # that needs the mean over all pairs
            return super().gradient_rows(x, rows, state)
        check_rows(x, rows)
        return pair_rows(self._in_working_dtype(x), self._term(), rows).to(x.device, x.dtype)

    def pair_term(self) -> PairTerm | None:
        """Return the kernel, the same object each time; None if it needs float64."""
        return None if self.in_float64 else self._term()

    def grad_flops(self, n: int, d: int) -> float:
        """Return the FLOP of the upper triangle of cosines, plus twice that for the gradient."""
        return 3.0 * n * n * d

    def expectation(self, n: int, d: int) -> float | None:
        """Return the expected value by quadrature, exact except for softening.

        In half space each neuron also meets its own mirror image.
        """
        check_kernel(self)
        pair = self._pair_expectation(d)
        if not self.half_space:
            return pair
        return (2 * (n - 1) * pair + _mirror(self)) / (2 * n - 1)

    def deviation(self, n: int, d: int) -> float | None:
        """Return the standard deviation by quadrature, exact except for softening.

        Two pairs of random neurons are independent, even if they share a neuron.
        """
        check_kernel(self)
        pairs = n * (n - 1) / 2
        share: float = pairs**-0.5
        if self.half_space:
            share = 2.0 * math.sqrt(pairs) / (n * (2 * n - 1))
        return _deviation(self, d) * share

    def bound(self, n: int, d: int) -> float | None:
        """Return the better of two bounds.

        One comes from the kernel's convex envelope. The other is the universal bound, which holds
        if the kernel is absolutely monotone.
        """
        return _bound(self, n, d)

    def _pair_expectation(self, d: int) -> float:
        """Expected kernel of one random pair."""
        return _quadrature(self, d)

    def _term(self) -> PairTerm:
        check_hashable(self)
        return _term_of(self)

    def _in_working_dtype(self, x: Tensor) -> Tensor:
        """Neurons (..., n, d) as they go into the pair sums."""
        if self.in_float64:
            return with_float64(x).double()
        if self.logarithm:  # divide the gradient by the mean before it is rounded to half
            return x.to(working_dtype(x.dtype))
        return x

    def _penalty_of(self, energy: Tensor, x: Tensor) -> Tensor:
        """The penalty (...) of neurons x from their mean energy (...)."""
        if self.logarithm:
            energy = or_one(energy).log()
        return energy.to(x.device, working_dtype(x.dtype))


@lru_cache(maxsize=1024)
def _term_of(measure: PairwiseMeasure) -> PairTerm:
    check_kernel(measure)
    return PairTerm(
        measure.kernel,
        measure.half_space,
        measure.softening,
        measure.compiled_as,
        measure.logarithm,
    )


@lru_cache(maxsize=4096)
def _quadrature(measure: PairwiseMeasure, d: int) -> float:
    return pair_expectation(measure.kernel, d)


@lru_cache(maxsize=4096)
def _deviation(measure: PairwiseMeasure, d: int) -> float:
    """Standard deviation of the energy of one random pair.

    In half space that is the sum of the kernels at both chords.
    """

    def value(q: Tensor, p: Tensor) -> Tensor:
        energy = measure.kernel(q, p)[0]
        if measure.half_space:
            energy = energy + measure.kernel(p, q)[0]
        return energy

    mean = pair_expectation(lambda q, p: (value(q, p), q), d)
    square = pair_expectation(lambda q, p: (value(q, p).square(), q), d)
    if math.isinf(square):
        return math.inf
    return math.sqrt(max(square - mean * mean, 0.0))


@lru_cache(maxsize=1024)
def _mirror(measure: PairwiseMeasure) -> float:
    """The energy of a neuron with its own mirror image."""
    return float(measure.kernel(*torch.tensor([4.0, 0.0], dtype=torch.float64))[0])


@lru_cache(maxsize=16384)
def _bound(measure: PairwiseMeasure, n: int, d: int) -> float:
    return pair_bound(_term_of(measure), n, d, absolutely_monotone=measure.absolutely_monotone)
