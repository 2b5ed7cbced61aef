"""Gaussian potential: the uniformity loss of Wang and Isola."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_hsu._checks import check_flag, check_number, keep_as_numbers
from lightning_hsu.measures.pairwise import PairwiseMeasure

_NARROW = 15.0  # above this t the mean potential may be too small for float32 to divide by


@dataclass(frozen=True)
class GaussianPotential(PairwiseMeasure):
    r"""Mean over unordered pairs of ``exp(-t |x - y|**2)``; training minimises its logarithm.

    The logarithm is the published uniformity loss. It keeps the gradient from vanishing where the
    mean is tiny, about ``exp(-2 t)`` in high dimension.

    Args:
        t: Inverse squared width in (0, 150]; 2 as published. With larger t only near neurons count.
        half_space: Measure the 2n points ``x`` and ``-x`` instead.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...) in (0, 1].

    Raises:
        ValueError: for a t outside (0, 150] or a half_space that is not a bool.

    Reference:
        Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and
        Uniformity on the Hypersphere", ICML 2020, arXiv 2005.10242; Cohn & Kumar, "Universally
        optimal distribution of points on spheres", 2007.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import GaussianPotential
        >>> measure = GaussianPotential(t=2)
        >>> x = torch.eye(3)  # squared chord 2: exp(-4)
        >>> print(f"{measure(x):.6f} {measure.penalty(x):.6f}")
        0.018316 -4.000000
    """

    logarithm: ClassVar[bool] = True

    t: float = 2.0
    half_space: bool = False
    absolutely_monotone = True

    def __post_init__(self) -> None:
        check_number("t", self.t, "in (0, 150]", lambda t: 0 < t <= 150)
        keep_as_numbers(self, "t")
        check_flag("half_space", self.half_space)

    def kernel(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """``exp(-t q)`` and its slope."""
        value = (-self.t * q).exp()
        return value, -self.t * value

    @property
    def compiled_as(self) -> tuple[str, float]:  # type: ignore[override]
        """The Gaussian and its inverse squared width."""
        return "gaussian", float(self.t)

    @property
    def in_float64(self) -> bool:  # type: ignore[override]
        """For a narrow Gaussian only, whose ``exp(-4 t)`` is too small for float32."""
        return self.t > _NARROW
