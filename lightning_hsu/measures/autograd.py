"""Values that come with their gradients, differentiable twice and under ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_hsu._core import exact_arithmetic
from lightning_hsu._core.autograd import batch_first, saved_tensors
from lightning_hsu.measures.state import State


@dataclass(frozen=True)
class Evaluation:
    """Two ways to compute a penalty, with the same result.

    Args:
        value_and_grad: Maps neurons (..., n, d) and a state to the penalty (...) and its gradient
            (..., n, d).
        recorded: Maps the same to the penalty by plain differentiable torch, for the second
            derivative.
    """

    value_and_grad: Callable[[Tensor, State | None], tuple[Tensor, Tensor]]
    recorded: Callable[[Tensor, State | None], Tensor]

    def __call__(self, x: Tensor, state: State | None) -> Tensor:
        """Return the penalty (...) of neurons x (..., n, d), differentiable twice."""
        names = None
        parts = list[Tensor]()
        if state is not None:
            names = tuple(state)
            parts = list(state.values())
        found = _ValueAndGrad.apply(x, self, names, *parts)  # type: ignore[no-untyped-call]
        value: Tensor = found[0]
        return value


class _ValueAndGrad(torch.autograd.Function):
    """Value and gradient. The derivative of the gradient is a product with the Hessian."""

    @staticmethod
    def forward(
        x: Tensor, how: Evaluation, names: tuple[str, ...] | None, *parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        return how.value_and_grad(x, _state(names, parts))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.how, ctx.names, *parts = inputs
        ctx.save_for_backward(x, output[1], *parts)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, grad, *parts = saved_tensors(ctx)
        by_value, by_grad = grad_outputs
        total = None
        if by_value is not None:
            total = grad * by_value[..., None, None].to(grad.dtype)
        if by_grad is not None:
            inputs = (x, by_grad, ctx.how, ctx.names, *parts)
            product = _HessianProduct.apply(*inputs)  # type: ignore[no-untyped-call]
            total = product if total is None else total + product
        return total, None, None, *[None] * len(parts)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        how: Evaluation,
        names: tuple[str, ...] | None,
        *parts: Tensor,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        x = batch_first(x, in_dims[0], info.batch_size)
        parts = _per_group(parts, in_dims[3:], info.batch_size)
        return _ValueAndGrad.apply(x, how, names, *parts), (0, 0)  # type: ignore[no-untyped-call]


class _HessianProduct(torch.autograd.Function):
    """The second derivative at x (..., n, d) times a direction (..., n, d)."""

    @staticmethod
    def forward(
        x: Tensor,
        direction: Tensor,
        how: Evaluation,
        names: tuple[str, ...] | None,
        *parts: Tensor,
    ) -> Tensor:
        with torch.enable_grad(), exact_arithmetic(x):
            leaf = x.detach().requires_grad_()
            value = how.recorded(leaf, _state(names, parts))
            if not value.requires_grad:
                return torch.zeros_like(x)
            (grad,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
            if not grad.requires_grad:
                return torch.zeros_like(x)
            return torch.autograd.grad(grad, leaf, direction.to(grad.dtype))[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing: the third derivative is not implemented."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(
            "a penalty can be differentiated twice; for a third derivative differentiate "
            "measure.recorded(x, state)"
        )

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        direction: Tensor,
        how: Evaluation,
        names: tuple[str, ...] | None,
        *parts: Tensor,
    ) -> tuple[Tensor, int]:
        x = batch_first(x, in_dims[0], info.batch_size)
        direction = batch_first(direction, in_dims[1], info.batch_size)
        inputs = (x, direction, how, names, *_per_group(parts, in_dims[4:], info.batch_size))
        return _HessianProduct.apply(*inputs), 0  # type: ignore[no-untyped-call]


def _state(names: tuple[str, ...] | None, parts: tuple[Tensor, ...]) -> State | None:
    if names is None:
        return None
    return dict(zip(names, parts, strict=True))


def _per_group(
    parts: tuple[Tensor, ...], dims: tuple[int | None, ...], size: int
) -> tuple[Tensor, ...]:
    """The parts of a state, with the mapped dimension merged into that of the groups."""
    found = []
    for part, dim in zip(parts, dims, strict=True):
        found.append(batch_first(part, dim, size).flatten(0, 1))
    return tuple(found)
