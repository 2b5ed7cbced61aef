"""Orthogonality penalties on unit neurons: SO, DSO, mutual coherence and SRIP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_hsu._checks import check_choice
from lightning_hsu.measures.nearest import NearestMeasure
from lightning_hsu.measures.sphere import SphereMeasure
from lightning_hsu.measures.state import State


@dataclass(frozen=True)
class _Coherence(NearestMeasure):
    """The largest absolute cosine between two neurons: that of the two nearest lines."""

    half_space: bool = True

    def kernel(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - q / 2.0, torch.full_like(q, -0.5)


@dataclass(frozen=True)
class Orthogonality(SphereMeasure):
    r"""How far the unit neurons, the rows of X, are from orthogonal: a baseline for uniformity.

    Args:
        kind: One of

            - ``"so"``, soft orthogonality: ``|X X^T - I|_F**2``, the sum of squared cosines over
              ordered pairs;
            - ``"dso"``, double soft orthogonality: ``|X X^T - I|_F**2 + |X^T X - I|_F**2``;
            - ``"mc"``, mutual coherence: ``max |X X^T - I|``, the largest absolute cosine, with
              ties as in :class:`Separation`;
            - ``"srip"``: the spectral norm of ``X X^T - I``, or of ``X^T X - I`` where n > d.

    The first two take the cheaper of the n x n and the d x d Gram matrix, mutual coherence goes
    over panels of rows, and srip finds the eigenvalues of the smaller Gram matrix, in float64 and
    O(min(n, d)**3).

    The published penalties take the weights as they are, and so pull their norms to 1 as well.
    Here, as in every measure, rows are normalised first. Only mc pushes exactly equal neurons
    apart.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...) >= 0.

    Raises:
        ValueError: for an unknown kind.

    Reference:
        Bansal, Chen & Wang, "Can We Gain More from Orthogonality Regularizations in Training Deep
        CNNs?", NeurIPS 2018, arXiv 1810.09102.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import Orthogonality
        >>> float(Orthogonality("so")(torch.eye(3))), float(Orthogonality("so")(torch.ones(3, 4)))
        (0.0, 6.0)
    """

    kind: Literal["so", "dso", "mc", "srip"] = "so"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, "so", "dso", "mc", "srip")

    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Penalty (b,) of unit rows x (b, n, d)."""
        if self.kind == "mc":
            return _Coherence().on_sphere(x, state)
        off = self._off(x)
        if self.kind == "srip":
            return _spectral_norm(off.double(), 64 * torch.finfo(x.dtype).eps).to(x.dtype)
        return self._frobenius(off, *x.shape[-2:]).to(x.dtype)

    def closed_form(self, x: Tensor, state: State | None) -> tuple[Tensor, Tensor] | None:
        """Compute so and dso in 4 n d min(n, d) FLOP, and mc from the two nearest lines.

        None for srip, and if there are zero rows.
        """
        n, d = x.shape[-2:]
        if self.kind == "mc":
            return _Coherence().value_and_grad(x)
        if self.kind == "srip" or n < 2:
            return None
        unit, inverse_norm = self._unit(x)
        if not bool((inverse_norm > 0).all()):
            return None
        off = self._off(unit)
        value = self._frobenius(off, n, d)
        grad = off @ unit if n <= d else unit @ off
        grad.mul_(4.0)
        if self.kind == "dso":
            grad.mul_(2.0)
        return self._shaped(value, x), self._to_weights(grad, unit, inverse_norm, x)

    @staticmethod
    def _off(x: Tensor) -> Tensor:
        """The smaller Gram matrix of unit rows x (b, n, d), minus I."""
        n, d = x.shape[-2:]
        gram = x @ x.mT if n <= d else x.mT @ x
        return gram - torch.eye(min(n, d), dtype=x.dtype, device=x.device)

    def _frobenius(self, off: Tensor, n: int, d: int) -> Tensor:
        """Penalty (b,) in float64 of what :meth:`_off` returns, for so and dso."""
        square = off.square().sum((-2, -1), dtype=torch.float64)
        # |X X^T|_F = |X^T X|_F and both traces are n, so the larger Gram matrix minus I has |n - d|
        # more.
        if self.kind == "so":
            return square + max(n - d, 0)
        return 2.0 * square + abs(n - d)

    def value_flops(self, n: int, d: int) -> float:
        """The Gram matrix, and for srip its eigenvalues."""
        gram = super().value_flops(n, d) * 2
        if self.kind == "srip":
            return gram + 20.0 * min(n, d) ** 3
        return gram

    def grad_flops(self, n: int, d: int) -> float:
        """The smaller Gram matrix and its product with the neurons; for srip its eigenvalues."""
        least = min(n, d)
        gram = 4.0 * n * d * least
        if self.kind == "mc":
            return 1.0 * n * n * d
        if self.kind == "srip":
            return 1.5 * gram + 20.0 * least**3
        return gram

    def expectation(self, n: int, d: int) -> float | None:
        """Return the expected value of so and dso: a squared cosine has mean 1 / d."""
        pairs = n * (n - 1) / d
        return {"so": pairs, "dso": 2.0 * pairs - n + d}.get(self.kind)

    def bound(self, n: int, d: int) -> float | None:
        """The value of orthonormal neurons, for n > d of a tight frame; for mc the Welch bound."""
        if n <= d:
            return float(d - n) if self.kind == "dso" else 0.0
        tight = n * n / d - n
        if self.kind == "so":
            return tight
        if self.kind == "dso":
            return 2.0 * tight - n + d
        if self.kind == "srip":
            return n / d - 1.0
        return math.sqrt((n - d) / (d * (n - 1)))


def _spectral_norm(symmetric: Tensor, tie: float) -> Tensor:
    """Largest absolute eigenvalue (b,) of symmetric matrices: the mean of those that tie."""
    size = torch.linalg.eigvalsh(symmetric).abs()
    largest = size.detach().amax(-1, keepdim=True)
    tied = size.detach() >= largest * (1.0 - tie)
    norm: Tensor = (size * tied).sum(-1) / tied.sum(-1)
    return norm
