"""Orthogonality penalties on unit neurons: SO, DSO, mutual coherence and SRIP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_hsu._checks import check_neurons
from lightning_hsu._core import exact_arithmetic, tangent, to_weights
from lightning_hsu.measures.base import SphereMeasure, State
from lightning_hsu.measures.nearest import NearestMeasure


@dataclass(frozen=True)
class _Coherence(NearestMeasure):
    """The largest absolute cosine between two neurons: that of the two nearest lines."""

    half_space: bool = True

    def kernel(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - q / 2.0, torch.full_like(q, -0.5)


@dataclass(frozen=True)
class Orthogonality(SphereMeasure):
    r"""How far the unit neurons, the rows of X, are from orthogonal: the rival to compare uniformity with.

    Args:
        kind: ``"so"``, soft orthogonality, ``|X X^T - I|_F**2``: the sum of squared cosines over ordered pairs;
            ``"dso"``, double soft orthogonality, ``|X X^T - I|_F**2 + |X^T X - I|_F**2``;
            ``"mc"``, mutual coherence, ``max |X X^T - I|``: the largest absolute cosine, ties as in
            :class:`Separation`; ``"srip"``, the spectral norm of ``X X^T - I``, or of ``X^T X - I`` where n > d.

    The first two take the cheaper of the n x n and the d x d Gram matrix, mutual coherence runs over panels of rows, and
    srip finds the eigenvalues of the smaller Gram matrix, in float64 and O(min(n, d)**3).

    The published penalties take the weights as they are, and so pull their norms to 1 as well. Here, as in every
    measure, rows are normalised first. Exactly equal neurons feel no force
    that parts them, but for mc.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...) >= 0.

    Raises:
        ValueError: for an unknown kind.

    Reference:
        Bansal, Chen & Wang, "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?", NeurIPS 2018,
        arXiv 1810.09102.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import Orthogonality
        >>> float(Orthogonality("so")(torch.eye(3))), float(Orthogonality("so")(torch.ones(3, 4)))
        (0.0, 6.0)
    """

    kind: Literal["so", "dso", "mc", "srip"] = "so"

    def __post_init__(self) -> None:
        if self.kind not in ("so", "dso", "mc", "srip"):
            raise ValueError(f"kind must be 'so', 'dso', 'mc' or 'srip'; got {self.kind!r}")

    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Penalty (b,) of unit rows x (b, n, d)."""
        if self.kind == "mc":
            return _Coherence().on_sphere(x, state)
        off = self._off(x)
        if self.kind == "srip":
            return _spectral_norm(off.double(), 64 * torch.finfo(x.dtype).eps).to(x.dtype)
        return self._frobenius(off, *x.shape[-2:]).to(x.dtype)

    def value_and_grad(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Penalty (...) and its gradient (..., n, d) without an autograd graph; of so and dso in 4 n d min(n, d) FLOP."""
        check_neurons(x)
        self._prepared(x, state)
        if self.kind == "mc":
            return _Coherence().value_and_grad(x)
        with torch.no_grad(), exact_arithmetic(x):
            unit, inverse_norm = self._unit(x.detach())
            other = self.kind == "srip" or type(self).on_sphere is not Orthogonality.on_sphere
            if other or x.shape[-2] < 2 or not bool((inverse_norm > 0).all()):
                return super().value_and_grad(x, state)
            off = self._off(unit)
            value, times = self._frobenius(off, *x.shape[-2:]), 4.0 if self.kind == "so" else 8.0
            grad = tangent(off @ unit if x.shape[-2] <= x.shape[-1] else unit @ off, unit).mul_(
                times
            )
            return self._shaped(value, x), to_weights(grad, inverse_norm, x.dtype).reshape(
                x.shape
            ).to(x.device)

    @staticmethod
    def _off(x: Tensor) -> Tensor:
        """The smaller Gram matrix of unit rows x (b, n, d), minus I."""
        n, d = x.shape[-2:]
        return (x @ x.mT if n <= d else x.mT @ x) - torch.eye(
            min(n, d), dtype=x.dtype, device=x.device
        )

    def _frobenius(self, off: Tensor, n: int, d: int) -> Tensor:
        """Penalty (b,) in float64 of what :meth:`_off` returns, for so and dso."""
        square = off.square().sum((-2, -1), dtype=torch.float64)
        # |X X^T|_F = |X^T X|_F, and both traces are n: the larger Gram matrix minus I has |n - d| more.
        return square + max(n - d, 0) if self.kind == "so" else 2.0 * square + abs(n - d)

    def work(self, n: int, d: int) -> float:
        """The Gram matrix, and for srip its eigenvalues."""
        least = min(n, d)
        return super().work(n, d) * 2 + (20.0 * least**3 if self.kind == "srip" else 0.0)

    def flop(self, n: int, d: int) -> float:
        """The smaller Gram matrix and its product with the neurons; for srip its eigenvalues, by autograd."""
        least = min(n, d)
        gram = 4.0 * n * d * least
        return {"mc": 1.0 * n * n * d, "srip": 1.5 * gram + 20.0 * least**3}.get(self.kind, gram)

    def expectation(self, n: int, d: int) -> float | None:
        """Exact for so and dso: a squared cosine has mean 1 / d."""
        pairs = n * (n - 1) / d
        return {"so": pairs, "dso": 2.0 * pairs - n + d}.get(self.kind)

    def best(self, n: int, d: int) -> float:
        """Orthonormal neurons, and beyond n = d a tight frame; for mc the Welch bound."""
        tight = max(0.0, n * n / d - n)
        if self.kind == "so":
            return tight
        if self.kind == "dso":
            return 2.0 * tight - n + d if n > d else float(d - n)
        if self.kind == "srip":
            return max(0.0, n / d - 1.0)
        return math.sqrt((n - d) / (d * (n - 1))) if n > d else 0.0


def _spectral_norm(symmetric: Tensor, tie: float) -> Tensor:
    """Largest absolute eigenvalue (b,) of symmetric matrices, the mean of those that tie up to rounding."""
    size = torch.linalg.eigvalsh(symmetric).abs()
    largest = size.detach().amax(-1, keepdim=True)
    tied = size.detach() >= largest * (1.0 - tie)
    norm: Tensor = (size * tied).sum(-1) / tied.sum(-1)
    return norm
