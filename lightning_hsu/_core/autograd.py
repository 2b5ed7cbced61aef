"""The closed form as a twice differentiable function: one pass forward, a product backward.

The functions below work under autograd and under ``torch.func``: ``grad``, ``vjp``, ``jacrev``,
``vmap`` and their compositions. A dimension that ``vmap`` adds is one more dimension of groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.oracle import hessian_vector
from lightning_hsu._core.pairwise import pair_energy


class PairEnergy:
    """``PairEnergy.apply(w, term)``: the mean pair energy (...) of neurons w (..., n, d)."""

    @staticmethod
    def apply(w: Tensor, term: PairTerm) -> Tensor:
        """Compute the value, and in the same pass the gradient where w requires one."""
        with_grad = w.requires_grad and torch.is_grad_enabled()
        value: Tensor = _Energy.apply(w, term, with_grad)[0]  # type: ignore[no-untyped-call]
        return value

    @staticmethod
    def known(w: Tensor, term: PairTerm, value: Tensor, grad: Tensor) -> Tensor:
        """The same value and gradient, which the caller has computed; not under ``torch.func``."""
        energy: Tensor = _Known.apply(w, term, value, grad)  # type: ignore[no-untyped-call]
        return energy


class _Known(torch.autograd.Function):
    """A value whose gradient is there already."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, term: PairTerm, value: Tensor, grad: Tensor) -> Tensor:
        ctx.term = term
        ctx.save_for_backward(w, grad)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        """Scale the gradient as that of :class:`_Energy` is."""
        return _scaled(ctx, grad_outputs[0]), None, None, None


class _Energy(torch.autograd.Function):
    """Value and gradient; the gradient is an output only so that backward can find it."""

    @staticmethod
    def forward(w: Tensor, term: PairTerm, with_grad: bool) -> tuple[Tensor, Tensor]:
        value, grad = pair_energy(w, term, with_grad=with_grad)
        return value, w.new_empty(0) if grad is None else grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        w, ctx.term, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(w, output[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """Scale the stored gradient; under ``create_graph`` it is a function of w."""
        return _scaled(ctx, grad_outputs[0]), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], w: Tensor, term: PairTerm, with_grad: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
        w = batch_first(w, in_dims[0], info.batch_size)
        with_grad = with_grad or w.requires_grad  # known only once the batch is unwrapped
        found = _Energy.apply(w, term, with_grad)  # type: ignore[no-untyped-call]
        return found, (0, 0 if with_grad else None)


def _scaled(ctx: Any, by_value: Tensor) -> Tensor:
    """The known gradient times that of a value; under ``create_graph`` it is a function of w."""
    w, grad = saved_tensors(ctx)
    if torch.is_grad_enabled():
        grad = _Gradient.apply(w, grad, ctx.term)  # type: ignore[no-untyped-call]
    found: Tensor = grad * by_value[..., None, None].to(grad.dtype)
    return found


class _Gradient(torch.autograd.Function):
    """The known gradient as a function of w, so that a second derivative can be taken."""

    @staticmethod
    def forward(w: Tensor, grad: Tensor, term: PairTerm) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        w, _, ctx.term = inputs
        ctx.save_for_backward(w)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (w,) = saved_tensors(ctx)
        (vector,) = grad_outputs
        product = _HessianVector.apply(w, vector, ctx.term)  # type: ignore[no-untyped-call]
        return product, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], w: Tensor, grad: Tensor, term: PairTerm
    ) -> tuple[Tensor, int]:
        w = batch_first(w, in_dims[0], info.batch_size)
        grad = batch_first(grad, in_dims[1], info.batch_size)
        return _Gradient.apply(w, grad, term), 0  # type: ignore[no-untyped-call]


class _HessianVector(torch.autograd.Function):
    """The second derivative at w times a vector; it cannot be differentiated further."""

    @staticmethod
    def forward(w: Tensor, vector: Tensor, term: PairTerm) -> Tensor:
        stack = w.reshape(-1, *w.shape[-2:])
        return hessian_vector(stack, vector.reshape(stack.shape), term).reshape(w.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        raise NotImplementedError("the third derivative of a pair energy is not implemented")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], w: Tensor, vector: Tensor, term: PairTerm
    ) -> tuple[Tensor, int]:
        w = batch_first(w, in_dims[0], info.batch_size)
        vector = batch_first(vector, in_dims[1], info.batch_size)
        return _HessianVector.apply(w, vector, term), 0  # type: ignore[no-untyped-call]


def saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    """What a forward pass saved for its backward pass.

    Raises:
        RuntimeError: if a backward pass has used it up, or a weight has changed since.
    """
    try:
        found: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            "a penalty is a value at the weights of one step, and backward() was called on this one "
            "already, or its weights have changed since: call penalty() anew in each step, before that "
            "step's backward()"
        ) from error
    return found


def batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Move the dimension that ``vmap`` hides to the front; an x without one is expanded."""
    if dim is None:
        return x.expand(size, *x.shape)
    return x.movedim(dim, 0)
