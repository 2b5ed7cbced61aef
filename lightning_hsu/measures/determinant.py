"""Gram determinant: maximum Gram determinant (MGD)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_hsu._checks import check_flag, check_number
from lightning_hsu._core import FLOOR, coincident, separate_duplicates
from lightning_hsu._core.pairwise import PANEL
from lightning_hsu.measures.gaussian import GaussianPotential
from lightning_hsu.measures.sphere import SphereMeasure
from lightning_hsu.measures.state import State


@dataclass(frozen=True)
class GramDeterminant(SphereMeasure):
    r"""Log-determinant of the neurons' Gaussian Gram matrix; large when they are spread out (MGD).

    ``log det(K + jitter I)`` with ``K_ij = exp(-|x_i - x_j|**2 / bandwidth**2)``, at most about 0.
    Training minimises its negative. It grows with the number of neurons, as published. In float64,
    O(n**3) time and O(n**2) memory.

    Args:
        bandwidth: Width of the kernel, a chord in [0.01, 10]; 1 as published.
        half_space: Measure the 2n points ``x`` and ``-x`` instead, by two n x n determinants.
        jitter: Added to the diagonal, in [0, 1]; 1e-6 as published. It bounds what coincident
            neurons cost, about ``log(2 jitter)`` for each pair, and the force between near ones,
            which is largest at a chord of ``bandwidth * sqrt(jitter)``. That force separates
            coincident neurons along a seeded direction. If the factorisation still fails, which
            takes a jitter below 1e-12, a larger one is used.

    Shape:
        Neurons (..., n, d), rows of any positive norm, to a value (...).

    Raises:
        ValueError: for a bandwidth or a jitter out of range or a half_space that is not a bool.

    Reference:
        Liu et al., "Learning with Hyperspherical Uniformity", AISTATS 2021, arXiv 2103.01649.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import GramDeterminant
        >>> measure = GramDeterminant(jitter=0)
        >>> print(f"{measure(torch.eye(3)):.6f}")  # 2 log(1 - k) + log(1 + 2 k), k = exp(-2)
        -0.051282
    """

    higher_is_better: ClassVar[bool] = True
    in_float64: ClassVar[bool] = True
    bandwidth: float = 1.0
    half_space: bool = False
    jitter: float = 1e-6

    def __post_init__(self) -> None:
        check_number(
            "bandwidth", self.bandwidth, "a chord in [0.01, 10]", lambda chord: 0.01 <= chord <= 10
        )
        check_number("jitter", self.jitter, "in [0, 1]", lambda jitter: 0 <= jitter <= 1)
        check_flag("half_space", self.half_space)

    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Negative log-determinant (b,) of unit rows x (b, n, d)."""
        chord = max(FLOOR, self.bandwidth * math.sqrt(self.jitter))
        x = separate_duplicates(x, chord, half_space=self.half_space)
        cosine = x @ x.mT
        itself = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
        near = self._kernel((2.0 - 2.0 * cosine).clamp_min(0.0) * ~itself)
        if not self.half_space:
            return -self._log_det(near)
        # The 2n points split into an even and an odd block: det K = det(A + B) det(A - B).
        mirrored = self._kernel(torch.where(itself, 4.0, (2.0 + 2.0 * cosine).clamp_min(0.0)))
        return -self._log_det(near + mirrored) - self._log_det(near - mirrored)

    def closed_form(self, x: Tensor, state: State | None) -> tuple[Tensor, Tensor] | None:
        """Compute both from one Cholesky factor and its inverse.

        None if there are zero rows, or coincident neurons, which :meth:`on_sphere` separates first.
        """
        unit, inverse_norm = self._unit(x)
        if x.shape[-2] < 2 or not bool((inverse_norm > 0).all()):
            return None
        cosine = _cosines(unit)
        if bool(coincident(cosine, half_space=self.half_space).any()):
            return None
        blocks = self._blocks(cosine)
        factors = [_factor(block, self.jitter)[0] for block in blocks]
        value = -torch.stack([_log_det_of(factor) for factor in factors]).sum(0)
        slope = torch.cholesky_inverse(factors[0]).mul_(blocks[-1])
        if self.half_space:
            slope.addcmul_(torch.cholesky_inverse(factors[1]), blocks[0])
        slope.diagonal(dim1=-2, dim2=-1).zero_()
        grad = (slope @ unit).mul_(-4.0 / self.bandwidth**2)
        return self._shaped(value, x), self._to_weights(grad, unit, inverse_norm, x)

    def _blocks(self, cosine: Tensor) -> list[Tensor]:
        """The kernel matrix (b, n, n) of cosines, which are overwritten; in half space two blocks.

        The slope of the log-determinant in the cosines is 2 / bandwidth**2 times the inverse of one
        block times the other block, elementwise, summed over both blocks.
        """
        if not self.half_space:
            return [self._kernel_of(cosine, 1.0)]
        mirrored = self._kernel_of(-cosine, -1.0)
        near = self._kernel_of(cosine, 1.0)
        return [near + mirrored, near - mirrored]

    def _kernel_of(self, cosine: Tensor, itself: float) -> Tensor:
        """The kernel at cosines (b, n, n), in place; ``itself`` is the cosine on the diagonal."""
        cosine.diagonal(dim1=-2, dim2=-1).fill_(itself)
        return cosine.clamp_(-1.0, 1.0).sub_(1.0).mul_(2.0 / self.bandwidth**2).exp_()

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """Value over that of random points; both are negative, the less uniform further from 0.

        Both are shifted down by 0.01, so that neurons so far apart that only the jitter is left
        compare as equal.
        """
        return (value - 0.01) / (reference - 0.01)

    def bound(self, n: int, d: int) -> float | None:
        """Return the bound that follows from that of the mean kernel.

        Among Gram matrices with the same mean kernel, the determinant is largest if all entries off
        the diagonal are equal.
        """
        t = self.bandwidth**-2
        mean: float | None = 0.0
        if t <= 150:
            mean = GaussianPotential(t, self.half_space).bound(n, d)
        if mean is None:
            return None
        points = 2 * n if self.half_space else n
        diagonal = 1.0 + self.jitter
        return math.log(diagonal + (points - 1) * mean) + (points - 1) * math.log(diagonal - mean)

    def value_flops(self, n: int, d: int) -> float:
        """Gram matrix, factor and, since values come with their gradients, inverse."""
        return super().value_flops(n, d) * 4 + 4.0 * n**3

    def grad_flops(self, n: int, d: int) -> float:
        """Gram matrix, factor, inverse and its product with the neurons."""
        return 4.0 * n * n * d + 1.0 * n**3

    def _kernel(self, q: Tensor) -> Tensor:
        return (-q / self.bandwidth**2).exp()

    def _log_det(self, gram: Tensor) -> Tensor:
        value: Tensor = _LogDet.apply(gram, self.jitter)[0]  # type: ignore[no-untyped-call]
        return value


class _LogDet(torch.autograd.Function):
    """Log-determinant (b,) of positive definite matrices (b, n, n) with jitter on the diagonal.

    Also returns the factors (b, n, n) and the jitter that each matrix took (b,), for the gradient.
    """

    @staticmethod
    def forward(gram: Tensor, jitter: float) -> tuple[Tensor, Tensor, Tensor]:
        factor, taken = _factor(gram, jitter)
        return _log_det_of(factor), factor, taken

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        _, factor, taken = output
        ctx.mark_non_differentiable(factor, taken)
        ctx.save_for_backward(inputs[0], factor, taken)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        gram, factor, taken = ctx.saved_tensors
        by_value = grad_outputs[0][:, None, None]
        if torch.is_grad_enabled():  # the factor has no graph
            return torch.linalg.inv(_with_diagonal(gram, taken)) * by_value, None
        return torch.cholesky_inverse(factor) * by_value, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None], gram: Tensor, jitter: float
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        gram = gram.movedim(in_dims[0], 0)
        found = _LogDet.apply(gram.flatten(0, 1), jitter)  # type: ignore[no-untyped-call]
        return tuple(part.unflatten(0, gram.shape[:2]) for part in found), (0, 0, 0)


def _cosines(x: Tensor) -> Tensor:
    """Cosines (b, n, n) of unit rows x (b, n, d): one triangle, in panels, and its mirror image."""
    cosine = x.new_empty(*x.shape[:2], x.shape[1])
    for start in range(0, x.shape[1], PANEL):
        rows = slice(start, start + PANEL)
        cosine[:, rows, : start + PANEL] = x[:, rows] @ x[:, : start + PANEL].mT
        cosine[:, :start, rows] = cosine[:, rows, :start].mT
    return cosine


def _factor(gram: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Cholesky factors (b, n, n) of matrices with jitter on the diagonal, and that jitter (b,).

    A matrix that cannot be factorised with the given jitter gets a larger one.
    """
    taken = gram.new_full(gram.shape[:1], jitter)
    factor, info = torch.linalg.cholesky_ex(_with_diagonal(gram, taken))
    while bool(((info != 0) & (taken < 1.0)).any()):
        taken = torch.where(info != 0, (10.0 * taken).clamp_min(1e-14), taken)
        factor, info = torch.linalg.cholesky_ex(_with_diagonal(gram, taken))
    return factor, taken


def _log_det_of(factor: Tensor) -> Tensor:
    """Log-determinant (b,) of matrices with these Cholesky factors."""
    value: Tensor = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return value


def _with_diagonal(gram: Tensor, jitter: Tensor) -> Tensor:
    """Matrices (b, n, n) with jitter (b,) on the diagonal."""
    raised = gram.clone()
    raised.diagonal(dim1=-2, dim2=-1).add_(jitter[:, None])
    return raised
