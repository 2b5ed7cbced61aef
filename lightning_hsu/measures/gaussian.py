"""Gaussian potential: the uniformity loss of Wang and Isola."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hsu._checks import check_flag, check_neurons, check_number
from lightning_hsu._core import PairTerm, to_weights, with_float64, working_dtype
from lightning_hsu.measures.base import State
from lightning_hsu.measures.pairwise import PairwiseMeasure

_NARROW = 15.0  # above this t the mean potential may be below what float32 can divide by


@dataclass(frozen=True)
class GaussianPotential(PairwiseMeasure):
    r"""Mean over unordered pairs of ``exp(-t |x - y|**2)``; what training minimises is its logarithm.

    The logarithm is the published uniformity loss. It keeps the gradient's size where the mean is tiny: ``exp(-2 t)``
    or so in high dimension.

    Args:
        t: Inverse squared width in (0, 150]; 2 as published. Larger t looks at near neurons only.
        half_space: Measure the 2n points ``x`` and ``-x`` instead.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...) in (0, 1].

    Raises:
        ValueError: for a t outside (0, 150] or a half_space that is no bool.

    Reference:
        Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", ICML 2020, arXiv 2005.10242; Cohn & Kumar, "Universally optimal distribution of points on
        spheres", 2007.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import GaussianPotential
        >>> measure = GaussianPotential(t=2)
        >>> print(f"{measure(torch.eye(3)):.6f} {measure.penalty(torch.eye(3)):.6f}")  # squared chord 2: exp(-4)
        0.018316 -4.000000
    """

    t: float = 2.0
    half_space: bool = False
    absolutely_monotone = True

    def __post_init__(self) -> None:
        check_number("t", self.t, "in (0, 150]", lambda t: 0 < t <= 150)
        check_flag("half_space", self.half_space)

    def kernel(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """``exp(-t q)`` and its slope."""
        value = (-self.t * q).exp()
        return value, -self.t * value

    @property
    def formula(self) -> tuple[str, float]:
        """The Gaussian and its inverse squared width."""
        return "gaussian", float(self.t)

    def pair_term(self) -> PairTerm | None:
        """The kernel, to be minimised by its logarithm; None where that takes float64."""
        own = type(self).value_and_grad is GaussianPotential.value_and_grad
        return replace(self._term(), logarithm=True) if own and self.t <= _NARROW else None

    def natural(self, penalty: Tensor) -> Tensor:
        """The mean potential that belongs to its logarithm."""
        return penalty.exp()

    def penalty(self, x: Tensor, state: State | None = None) -> Tensor:
        """Logarithm of the mean potential, (...); 0 with fewer than two neurons."""
        mean = super().penalty(self._widened(x))
        return torch.where(mean > 0, mean, 1.0).log().to(working_dtype(x.dtype))

    def value_and_grad(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """The penalty (...) and its gradient (..., n, d) in one pass."""
        mean, grad = super().value_and_grad(self._widened(x))
        mean = torch.where(mean > 0, mean, 1.0)
        grad = to_weights(grad, 1.0 / mean[..., None, None], x.dtype)
        return mean.log().to(x.device, working_dtype(x.dtype)), grad.to(x.device)

    def _widened(self, x: Tensor) -> Tensor:
        """In float64 where exp(-4 t) is below what float32 can divide by."""
        check_neurons(x)
        return with_float64(x).double() if self.t > _NARROW else x.to(working_dtype(x.dtype))
