"""The closed form as a differentiable function: one pass forward, nothing but a product backward, twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.oracle import hessian_vector
from lightning_hsu._core.pairwise import pair_energy


class PairEnergy(torch.autograd.Function):
    """``PairEnergy.apply(w, term)``: the mean pair energy (...) of neurons w (..., n, d)."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, term: PairTerm) -> Tensor:
        """Compute the value and, in the same pass, the gradient that backward will use."""
        value, grad = pair_energy(w, term, with_grad=ctx.needs_input_grad[0])
        ctx.term = term
        ctx.save_for_backward(w, grad)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """Scale the stored gradient; under ``create_graph`` as a function of w."""
        w, grad = ctx.saved_tensors
        outer = grad_outputs[0][..., None, None].to(grad.dtype)
        if torch.is_grad_enabled():
            grad = _PairGradient.apply(w, grad, ctx.term)  # type: ignore[no-untyped-call]
        return grad * outer, None


class _PairGradient(torch.autograd.Function):
    """The known gradient as a function of w, so that a second derivative can be taken."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, grad: Tensor, term: PairTerm) -> Tensor:
        ctx.term = term
        ctx.save_for_backward(w)
        return grad.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        stack = w.reshape(-1, *w.shape[-2:])
        return (
            hessian_vector(stack, grad_outputs[0].reshape_as(stack), ctx.term).reshape_as(w),
            None,
            None,
        )
