"""Measures written as a plain function of unit rows."""

# No postponed annotations here, as in base.py.

from abc import abstractmethod
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hsu._checks import check_neurons
from lightning_hsu._core import (
    exact_arithmetic,
    tangent,
    to_weights,
    unit_rows,
    with_float64,
    working_dtype,
)
from lightning_hsu.measures.autograd import Evaluation
from lightning_hsu.measures.base import Measure, check_state
from lightning_hsu.measures.facts import Fact
from lightning_hsu.measures.state import State, state_of_group


class SphereMeasure(Measure):
    """A measure written as a plain differentiable function of unit rows, :meth:`on_sphere`.

    This class handles normalisation, zero rows, precision and the step from the sphere to the
    weights. A member with a faster way to its gradient overrides :meth:`closed_form`;
    :meth:`on_sphere` then stays as its readable version and gives the second derivative.

    Attributes:
        in_float64: Whether to compute in float64.
        takes_zero_rows: Whether :meth:`on_sphere` leaves out zero rows itself.
    """

    facts: ClassVar[dict[str, Fact]] = {
        **Measure.facts,
        "closed_form": Fact(("on_sphere", "kernel"), needs_function=True),
    }
    in_float64: ClassVar[bool] = False
    takes_zero_rows: ClassVar[bool] = False

    @abstractmethod
    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Return the penalty in plain differentiable torch.

        Args:
            x: Unit rows, shape (b, n, d), n >= 2, float32 or float64.
            state: From :meth:`prepare`, for these groups.

        Returns:
            One value for each group, shape (b,).
        """

    def closed_form(self, x: Tensor, state: State | None) -> tuple[Tensor, Tensor] | None:
        """Return the penalty (...) and its gradient (..., n, d) by a faster way than autograd.

        None if there is no such way for these neurons x (..., n, d).
        """
        return None

    def penalty(self, x: Tensor, state: State | None = None) -> Tensor:
        """Penalty (...); twice differentiable, also under ``torch.func``.

        Args:
            x: Neurons, shape (..., n, d), floating; rows of any positive norm. Zero rows take no
                part; fewer than two neurons have penalty 0.
            state: From :meth:`prepare`; None prepares afresh.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has fewer than two dimensions, or the state is one of another measure
                or shape.
        """
        check_neurons(x)
        # The gradient of on_sphere, even if a subclass overrides the penalty.
        gradient = partial(SphereMeasure.value_and_grad, self)
        return Evaluation(gradient, self.recorded)(x, state)

    def value_and_grad(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Return the penalty (...) and its gradient (..., n, d); see :meth:`penalty`."""
        check_neurons(x)
        if not x.numel():
            return x.new_zeros(x.shape[:-2], dtype=working_dtype(x.dtype)), torch.zeros_like(x)
        with torch.no_grad(), exact_arithmetic(x):
            state = self._prepared(x, state)
            found = self.closed_form(x, state)
            has_closed_form = type(self).closed_form is not SphereMeasure.closed_form
            if found is None and has_closed_form and state is None:
                found = self._in_two_parts(x)
            if found is not None:
                return found
            unit, inverse_norm = self._unit(x.detach())
            with torch.enable_grad():
                leaf = unit.requires_grad_()
                value = self._by_group(leaf, inverse_norm, state)
                grad = torch.zeros_like(unit, requires_grad=False)
                if value.requires_grad:
                    (grad,) = torch.autograd.grad(value.sum(), leaf)
            return self._shaped(value.detach(), x), self._to_weights(grad, unit, inverse_norm, x)

    def _in_two_parts(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Both in closed form for groups without zero rows, and by themselves for the others.

        None if all groups are of one kind, or have no closed form.
        """
        groups = x.reshape(-1, *x.shape[-2:])
        whole = (self._unit(groups)[1] > 0).flatten(1).all(1)
        if len(groups) < 2 or bool(whole.all()) or not bool(whole.any()):
            return None
        closed = self.closed_form(groups[whole], None)
        if closed is None:
            return None
        value = closed[0].new_empty(len(groups))
        grad = torch.empty_like(groups)
        value[whole], grad[whole] = closed
        value[~whole], grad[~whole] = SphereMeasure.value_and_grad(self, groups[~whole])
        return value.reshape(x.shape[:-2]), grad.reshape(x.shape)

    def recorded(self, x: Tensor, state: State | None = None) -> Tensor:
        """Return the penalty (...) of x (..., n, d) with the whole graph, for any derivative."""
        state = self._prepared(x, state)
        unit, inverse_norm = self._unit(x)
        return self._shaped(self._by_group(unit, inverse_norm, state), x)

    def _prepared(self, x: Tensor, state: State | None) -> State | None:
        """The state for neurons x (..., n, d), checked, or a fresh one."""
        if not x.numel():
            return None
        if state is None:
            return self.prepare(x, None)
        check_state(self, x, state)
        return state

    def _unit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit rows (b, n, d) and inverse norms (b, n, 1) in the precision of this measure."""
        stack = with_float64(x).reshape(x.shape[:-2].numel(), *x.shape[-2:])
        dtype = torch.float64 if self.in_float64 else working_dtype(x.dtype)
        if not stack.shape[-1]:
            return stack.to(dtype), stack.new_zeros(*stack.shape[:-1], 1, dtype=dtype)
        return unit_rows(stack.to(dtype))

    @staticmethod
    def _shaped(value: Tensor, x: Tensor) -> Tensor:
        """Values (b,) in the shape (...), device and dtype that neurons x (..., n, d) call for."""
        return value.reshape(x.shape[:-2]).to(x.device, working_dtype(x.dtype))

    @staticmethod
    def _to_weights(grad: Tensor, unit: Tensor, inverse_norm: Tensor, x: Tensor) -> Tensor:
        """The gradient (..., n, d) in the neurons x from that in their unit rows, (b, n, d)."""
        return to_weights(tangent(grad, unit), inverse_norm, x.dtype).reshape(x.shape).to(x.device)

    def _by_group(self, unit: Tensor, inverse_norm: Tensor, state: State | None) -> Tensor:
        """Penalty (b,) of unit rows (b, n, d), leaving out the zero rows among them."""
        alive = inverse_norm.squeeze(-1) > 0  # (b, n)
        enough = alive.shape[-1] > 1 and unit.numel() > 0
        with exact_arithmetic(unit):
            if enough and (self.takes_zero_rows or bool(alive.all())):
                return self._checked(self.on_sphere(unit, state), unit)
            values = [unit.sum() * 0.0] * len(unit)
            for i, rows in enumerate(alive):
                if int(rows.sum()) > 1:
                    group = unit[i : i + 1, rows]
                    value = self.on_sphere(group, state_of_group(state, i))
                    values[i] = self._checked(value, group).squeeze(0)
        return torch.stack(values) if values else unit.new_zeros(0)

    def _checked(self, value: Tensor, unit: Tensor) -> Tensor:
        """The value (b,) that :meth:`on_sphere` returned, or an error if it has another shape."""
        if value.shape != unit.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}.on_sphere must return one value for each group, "
                f"shape ({len(unit)},), for unit rows of shape {tuple(unit.shape)}; "
                f"got shape {tuple(value.shape)}: sum over the last two dimensions only"
            )
        return value
