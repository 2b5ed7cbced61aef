"""What the published formulas share: float64, plain autograd, and 1e-4 inside the norm."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_hsu._checks import check_neurons
from lightning_hsu._core import with_float64, working_dtype
from lightning_hsu.measures import Measure
from lightning_hsu.measures.state import State

MOMENTUM = 0.9
# For every trained tensor the loss contains half of this times the sum of squares.
WEIGHT_DECAY = 5e-4
_LARGEST = 1e15  # of the numbers in a state, whose squares stay far below the limit of float32


class OfficialMeasure(Measure):
    """A published formula as in its official code; a subclass defines :meth:`formula`.

    Use it to repeat a published experiment; for everything else take the members of
    :mod:`lightning_hsu.measures`. It is computed in float64, which autocast leaves alone, with
    n x n matrices and plain autograd. Because of the 1e-4 inside the norms, values depend a little
    on the scale of the weights. Fewer than two neurons have penalty 0.
    """

    def value_flops(self, n: int, d: int) -> float:
        """Float64, n x n matrices and a graph."""
        return 100.0 * n * n * max(d, 64)

    @abstractmethod
    def formula(self, w: Tensor, state: State) -> Tensor:
        """Return the penalty (b,) of raw rows w (b, n, d), float64; differentiable."""

    def penalty(self, x: Tensor, state: State | None = None) -> Tensor:
        """Penalty (...), differentiable.

        Args:
            x: Neurons, shape (..., n, d), floating.
            state: From :meth:`prepare`; None prepares afresh.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has fewer than two dimensions.
        """
        check_neurons(x)
        w = wide(x)
        if w.shape[1] < 2 or not w.numel():
            value = 0.0 * w.sum((1, 2))
        else:
            if state is None:
                state = self.prepare(x)
            value = self.formula(w, state or {})
        return value.reshape(x.shape[:-2]).to(x.device, working_dtype(x.dtype))


def wide(x: Tensor) -> Tensor:
    """Neurons (..., n, d) as a stack (b, n, d) in float64."""
    return with_float64(x).double().reshape(x.shape[:-2].numel(), *x.shape[-2:])


def normalised(w: Tensor) -> Tensor:
    """Rows over their norms with 1e-4 inside the root: never quite unit, zero for zero rows."""
    return w / (w.square().sum(-1, keepdim=True) + 1e-4).sqrt()


def pair_cosines(unit: Tensor, *, half_space: bool) -> Tensor:
    """Cosines (..., pairs) of all unordered pairs of rows (..., n, d).

    In half space the pairs are those of the 2n rows and negated rows.
    """
    gram = unit @ unit.mT
    n = gram.shape[-1]
    i, j = torch.triu_indices(n, n, offset=1, device=gram.device)
    cosine = gram[..., i, j]
    if not half_space:
        return cosine
    return torch.cat([cosine, cosine, -cosine, -cosine, -gram.diagonal(dim1=-2, dim2=-1)], -1)


def has_shapes(state: State | None, **shapes: tuple[int, ...]) -> bool:
    """Whether a state has tensors of these shapes with sensible numbers."""
    if state is None:
        return False
    for name, shape in shapes.items():
        part = state.get(name)
        if part is None or part.shape != shape or not part.is_floating_point():
            return False
        if not bool((part.abs() < _LARGEST).all()):
            return False  # NaN, too
    return True


def kept(x: Tensor, **tensors: Tensor) -> State:
    """A state in the precision and on the device of the neurons x."""
    return {name: part.to(x.device, working_dtype(x.dtype)) for name, part in tensors.items()}
