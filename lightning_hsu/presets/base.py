"""What the published formulas have in common: float64, plain autograd, and 1e-4 inside the norm."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_hsu._checks import check_neurons
from lightning_hsu._core import with_float64, working_dtype
from lightning_hsu.measures import Measure
from lightning_hsu.measures.state import State

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4  # of every trained tensor, as 5e-4 / 2 times the sum of its squares


class OfficialMeasure(Measure):
    """A published formula as its official code has it; a subclass writes it down in :meth:`formula`.

    Everything is float64, which autocast leaves alone, with n x n matrices and plain autograd: these are for
    repeating a published experiment, the members of :mod:`lightning_hsu.measures` for everything else. With 1e-4
    inside the norms the values depend on the scale of the weights a little; fewer than two neurons have penalty 0.
    """

    def value_flops(self, n: int, d: int) -> float:
        """Float64, n x n matrices and a graph."""
        return 100.0 * n * n * max(d, 64)

    @abstractmethod
    def formula(self, w: Tensor, state: State) -> Tensor:
        """Return the penalty (b,) of raw rows w (b, n, d), float64; differentiable."""

    def penalty(self, x: Tensor, state: State | None = None) -> Tensor:
        """Penalty (...) of neurons x (..., n, d), differentiable; without a ``state`` one is prepared afresh."""
        check_neurons(x)
        state = self.prepare(x) if state is None else state
        w = wide(x)
        value = self.formula(w, state or {}) if w.shape[1] > 1 else 0.0 * w.sum((1, 2))
        return value.reshape(x.shape[:-2]).to(x.device, working_dtype(x.dtype))


def wide(x: Tensor) -> Tensor:
    """Neurons (..., n, d) as a stack (b, n, d) in float64."""
    return with_float64(x).double().reshape(-1, *x.shape[-2:])


def normalised(w: Tensor) -> Tensor:
    """Rows over their norms with 1e-4 inside the root: never quite unit, zero for zero rows."""
    return w / (w.square().sum(-1, keepdim=True) + 1e-4).sqrt()


def pair_cosines(unit: Tensor, *, half_space: bool) -> Tensor:
    """Cosines (..., pairs) of all unordered pairs of rows (..., n, d); in half space of the 2n rows and negated rows."""
    gram = unit @ unit.mT
    n = gram.shape[-1]
    i, j = torch.triu_indices(n, n, offset=1, device=gram.device)
    cosine = gram[..., i, j]
    if not half_space:
        return cosine
    return torch.cat([cosine, cosine, -cosine, -cosine, -gram.diagonal(dim1=-2, dim2=-1)], -1)


def has_shapes(state: State | None, **shapes: tuple[int, ...]) -> bool:
    """Whether a state has tensors of these shapes: one of another model has not."""
    return state is not None and all(
        name in state and state[name].shape == shape for name, shape in shapes.items()
    )


def kept(x: Tensor, **tensors: Tensor) -> State:
    """A state in the precision of the neurons x and beside them."""
    return {name: part.to(x.device, working_dtype(x.dtype)) for name, part in tensors.items()}
