"""Means over pairs of neurons of a kernel of their distance."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from lightning_hsu._checks import check_kernel, check_neurons
from lightning_hsu._core import (
    PairEnergy,
    PairTerm,
    pair_bound,
    pair_energy,
    pair_expectation,
    pair_part,
    pair_rows,
)
from lightning_hsu.measures.base import Measure, State, check_rows


class PairwiseMeasure(Measure):
    """A mean over unordered pairs of a kernel of the squared chord.

    A new member needs one method, :meth:`kernel`:

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

    half_space: bool = False
    softening: float = 1e-2
    absolutely_monotone: bool = False
    """Whether the kernel, as a function of the cosine, and all its derivatives are >= 0, apart from a constant: then the
    universal lower bound holds."""

    @property
    def formula(self) -> tuple[str, float] | None:
        """The kernel by a name that compiled kernels know, and its one number; None for your own."""
        return None

    @abstractmethod
    def kernel(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kernel and its slope at squared chords.

        Args:
            q: Squared chords ``|x_i - x_j|**2 = 2 - 2 cos``, any shape, in (0, 4].
            p: Squared chords ``|x_i + x_j|**2 = 4 - q`` to the mirror image, as exact near 0 as q is; most
                kernels need only q.

        Returns:
            The value and its derivative with respect to q, elementwise, out of place. For second
            derivatives the value must be differentiable by autograd.
        """

    def penalty(self, x: Tensor, state: State | None = None) -> Tensor:
        """Mean energy over unordered pairs, (...); differentiable, twice too.

        Args:
            x: Neurons, shape (..., n, d), floating; rows of any positive norm. Zero rows take no part;
                fewer than two neurons have energy 0.
            state: Not used; a kernel needs no memory.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has fewer than two dimensions.
        """
        check_neurons(x)
        x = (
            x if torch.is_grad_enabled() else x.detach()
        )  # else the gradient would be computed for nothing
        value: Tensor = PairEnergy.apply(x, self._term())  # type: ignore[no-untyped-call]
        return value

    def value_and_grad(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Penalty (...) and its gradient (..., n, d) in one pass of about 3 n n d FLOP; see :meth:`penalty`."""
        check_neurons(x)
        value, grad = pair_energy(x, self._term())
        assert grad is not None
        return value, grad

    def gradient_rows(self, x: Tensor, rows: Tensor, state: State | None = None) -> Tensor:
        """The gradient in the k wanted rows of a group for about 4 k n d FLOP, each against all; see :class:`Measure`.

        Example:
            >>> from lightning_hsu.measures import RieszEnergy
            >>> x, rows = torch.randn(8, 64, 32), torch.arange(64).expand(8, 64) < 16
            >>> grad = RieszEnergy(s=1).gradient_rows(x, rows)
            >>> torch.allclose(grad[rows], RieszEnergy(s=1).value_and_grad(x)[1][rows], atol=1e-6)
            True
        """
        if not self._is_mean():
            return super().gradient_rows(x, rows, state)
        check_rows(x, rows)
        return pair_rows(x, self._term(), rows)

    def gradient_part(self, x: Tensor, part: int, parts: int) -> tuple[Tensor, Tensor] | None:
        """A summand of the gradient for about 3 n n d / ``parts`` FLOP; see :class:`Measure`.

        Coincident neurons part along one common direction, which is no sum over pairs: where a part meets them it says
        so, and so it does where it has shortened a row that the dtype of x might not hold.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has fewer than two dimensions, or there is no such part.

        Example:
            >>> from lightning_hsu.measures import RieszEnergy
            >>> x = torch.randn(1, 64, 32)
            >>> grads, apart = zip(*(RieszEnergy(s=1).gradient_part(x, part, 3) for part in range(3)))
            >>> torch.allclose(sum(grads), RieszEnergy(s=1).value_and_grad(x)[1], atol=1e-6), float(sum(apart))
            (True, 0.0)
        """
        check_neurons(x)
        return pair_part(x, self._term(), part, parts) if self._is_mean() else None

    def flop(self, n: int, d: int) -> float:
        """The upper triangle of the cosines, and twice that for the gradient."""
        return 3.0 * n * n * d

    def expectation(self, n: int, d: int) -> float:
        """Exact but for softening, by quadrature; in half space each neuron also meets its own mirror image."""
        check_kernel(self)
        pair = self._pair_expectation(d)
        if not self.half_space:
            return pair
        mirror = float(self.kernel(*torch.tensor([4.0, 0.0], dtype=torch.float64))[0])
        return (2 * (n - 1) * pair + mirror) / (2 * n - 1)

    def deviation(self, n: int, d: int) -> float:
        """Exact but for softening, by quadrature: the pairs of random neurons are independent two by two."""
        check_kernel(self)
        pairs = n * (n - 1) / 2
        return _deviation(self, d) * (
            2.0 * math.sqrt(pairs) / (n * (2 * n - 1)) if self.half_space else pairs**-0.5
        )

    def best(self, n: int, d: int) -> float:
        """By the kernel's convex envelope, and where it is absolutely monotone the universal bound."""
        return _bound(self, n, d)

    def _pair_expectation(self, d: int) -> float:
        """Expected kernel of one random pair."""
        return _quadrature(self, d)

    def pair_term(self) -> PairTerm | None:
        """The kernel, where the penalty is the mean itself."""
        return self._term() if self._is_mean() else None

    def _is_mean(self) -> bool:
        """Whether the penalty is the mean itself, not a function of it with a gradient of its own."""
        return type(self).value_and_grad is PairwiseMeasure.value_and_grad

    def _term(self) -> PairTerm:
        check_kernel(self)
        kinds = type(self).__mro__
        named, own = (
            next(i for i, kind in enumerate(kinds) if name in vars(kind))
            for name in ("formula", "kernel")
        )
        formula = (
            self.formula if named <= own else None
        )  # else a subclass has another kernel than the name says
        return PairTerm(self.kernel, self.half_space, self.softening, formula)


@lru_cache(maxsize=4096)
def _quadrature(measure: PairwiseMeasure, d: int) -> float:
    return pair_expectation(measure.kernel, d)


@lru_cache(maxsize=4096)
def _deviation(measure: PairwiseMeasure, d: int) -> float:
    """Standard deviation of the kernel of one random pair; in half space of the kernels at both chords together."""

    def value(q: Tensor, p: Tensor) -> Tensor:
        own = measure.kernel(q, p)[0]
        return own + measure.kernel(p, q)[0] if measure.half_space else own

    mean = pair_expectation(lambda q, p: (value(q, p), q), d)
    square = pair_expectation(lambda q, p: (value(q, p).square(), q), d)
    return math.inf if math.isinf(square) else math.sqrt(max(square - mean * mean, 0.0))


@lru_cache(maxsize=4096)
def _bound(measure: PairwiseMeasure, n: int, d: int) -> float:
    return pair_bound(measure._term(), n, d, absolutely_monotone=measure.absolutely_monotone)
