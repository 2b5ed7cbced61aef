"""What a measure is: neurons (..., n, d) in, a value (...) out."""

# No postponed annotations here: jsonargparse 4.45 to 4.50 evaluates a base class's where its subclass stands.

from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_hsu._checks import check_hashable, check_neurons
from lightning_hsu._core import (
    PairTerm,
    exact_arithmetic,
    tangent,
    to_weights,
    unit_rows,
    with_float64,
    working_dtype,
)

State = dict[str, Tensor]
"""What a measure carries from step to step: tensors by name, the first dimension of each counts the groups."""


class Measure(ABC):
    """A notion of hyperspherical uniformity; subclasses are frozen dataclasses.

    A measure knows tensors only: nothing of modules, trainers or ranks. It does not depend on the norms of
    the neurons, their order or a common rotation. It has no memory either: one with an inner problem or with
    random draws gets what it needs from :meth:`prepare`, and whoever trains keeps that from step to step.
    """

    higher_is_better: ClassVar[bool] = False

    def __call__(self, x: Tensor, state: State | None = None) -> Tensor:
        """Return the natural value (...) of the neurons x (..., n, d)."""
        return self.natural(self.penalty(x, state))

    def natural(self, penalty: Tensor) -> Tensor:
        """Return the natural value that belongs to a penalty."""
        return 0.0 - penalty if self.higher_is_better else penalty

    def prepare(self, x: Tensor, state: State | None = None) -> State | None:
        """Return what an evaluation at x (..., n, d) needs besides x, carried on from the last step's ``state``.

        None for most measures. A state that does not fit x, one of another model, is replaced by a fresh one. The
        same x and state give the same bits, on every rank.
        """
        return None

    def fits(self, x: Tensor, state: State) -> bool:
        """Tell whether a state is one of this measure for neurons of the shape of x (..., n, d)."""
        return all(part.shape[:1] == (x.shape[:-2].numel(),) for part in state.values())

    @abstractmethod
    def penalty(self, x: Tensor, state: State | None = None) -> Tensor:
        """Return what training minimises, (...), differentiable (twice, too); ``state`` comes from :meth:`prepare`."""

    @abstractmethod
    def value_and_grad(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Return the penalty (...) and its gradient (..., n, d), which the caller may overwrite, without an autograd graph."""

    def gradient_rows(self, x: Tensor, rows: Tensor, state: State | None = None) -> Tensor:
        """Return the gradient that :meth:`value_and_grad` gives in some rows, and 0 in the others.

        Args:
            x: Neurons, shape (..., n, d), floating; all of them, whichever rows are wanted.
            rows: The wanted rows, bool, shape (..., n).
            state: From :meth:`prepare`.

        Returns:
            The gradient of the penalty, summed over the groups, with the shape and dtype of x. A measure without a
            cheaper way computes the whole.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has fewer than two dimensions, or rows is no bool tensor of the shape (..., n).

        Example:
            >>> from lightning_hsu.measures import Separation
            >>> grad = Separation().gradient_rows(torch.eye(3, 4), torch.tensor([False, True, False]))
            >>> grad.any(-1)
            tensor([False,  True, False])
        """
        check_rows(x, rows)
        grad = self.value_and_grad(x, state)[1]
        return grad.masked_fill(~rows.to(grad.device)[..., None], 0.0)

    def gradient_part(self, x: Tensor, part: int, parts: int) -> tuple[Tensor, Tensor] | None:
        """Return one of several summands of the gradient that :meth:`value_and_grad` gives, each about as much work.

        Args:
            x: Neurons, shape (..., n, d), floating.
            part: Which summand, from 0 to ``parts`` - 1.
            parts: How many there are, 1 or more.

        Returns:
            None where the gradient cannot be split, whatever x is. Otherwise the summand with the shape and dtype of x,
            and a number, shape () in float32, that is 0 in every part if they add up to the gradient. Where one is
            positive they may not, and the whole is to be computed instead. The sum is finite in either case.
        """
        return None

    def pair_term(self) -> PairTerm | None:
        """The kernel whose mean over pairs, or whose logarithm, the penalty is; None where it is something else."""
        return None

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """Compare natural values with that of random points: 1 as random, above 1 less uniform.

        Their quotient, or the exponential of their difference where the value of random points is not positive.
        """
        if reference <= 0:
            return ((reference - value) if self.higher_is_better else (value - reference)).exp()
        return (
            reference / value.clamp_min(1e-9 * reference)
            if self.higher_is_better
            else value / reference
        )

    def is_exact(self, state: State | None) -> bool:
        """Tell whether values under this state are exact, not merely the best that an inner search has found."""
        return all(
            bool(part.all()) for name, part in (state or {}).items() if name.endswith("exact")
        )

    def for_head(self) -> "Measure":
        """Return the measure for a class head: in full space, where two antipodal classes are right."""
        measure: Measure = self
        if not is_dataclass(measure) or "half_space" not in [
            field.name for field in fields(measure)
        ]:
            return measure
        return replace(measure, half_space=False)

    def idle(self, n: int, d: int) -> str | None:
        """Say why n neurons in d dimensions would feel no force whatever they are, and the way out; None if they do."""
        return None

    def work(self, n: int, d: int) -> float:
        """FLOP or so of one value from scratch; more work means fewer random layers for a reference value."""
        return 2.0 * n * n * max(d, 64)

    def flop(self, n: int, d: int) -> float:
        """FLOP or so of one gradient of n neurons in d dimensions: a value and twice that for autograd."""
        return 3.0 * self.work(n, d)

    def expectation(self, n: int, d: int) -> float | None:
        """Exact expected value of n independent uniform neurons in d dimensions, ``inf`` included; None if not known."""
        return None

    def deviation(self, n: int, d: int) -> float | None:
        """Standard deviation of the value of n independent uniform neurons, ``inf`` included; None if not known."""
        return None

    def best(self, n: int, d: int) -> float | None:
        """A natural value that no n neurons in d dimensions can beat; None if none is known."""
        return None


class SphereMeasure(Measure):
    """A measure written as a plain differentiable function of unit rows, :meth:`on_sphere`.

    Normalising, zero rows, precision and the step from the sphere to the weights are done here. A member with a
    faster way to its gradient overrides :meth:`value_and_grad`; :meth:`on_sphere` then stays as its readable twin
    and gives the second derivative.
    """

    wide: ClassVar[bool] = False  # compute in float64
    sees_zero_rows: ClassVar[bool] = False  # on_sphere leaves out zero rows itself

    @abstractmethod
    def on_sphere(self, x: Tensor, state: State | None) -> Tensor:
        """Return the penalty (b,) of unit rows x (b, n, d), n >= 2, float32 or wider; plain differentiable torch."""

    def penalty(self, x: Tensor, state: State | None = None) -> Tensor:
        """Penalty (...); differentiable, twice too.

        Args:
            x: Neurons, shape (..., n, d), floating; rows of any positive norm. Zero rows take no part; fewer than
                two neurons have penalty 0.
            state: From :meth:`prepare`; None prepares afresh.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has fewer than two dimensions, or the state is one of another measure or shape.
        """
        check_neurons(x)
        value: Tensor = _Evaluation.apply(x, self, self._prepared(x, state))  # type: ignore[no-untyped-call]
        return value

    def value_and_grad(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Penalty (...) and its gradient (..., n, d) without an autograd graph; see :meth:`penalty`."""
        check_neurons(x)
        with exact_arithmetic(x):
            state = self._prepared(x, state)
            unit, inverse_norm = self._unit(x.detach())
            with torch.enable_grad():
                leaf = unit.requires_grad_()
                value = self._by_group(leaf, inverse_norm, state)
                grad = (
                    torch.autograd.grad(value.sum(), leaf)[0]
                    if value.requires_grad
                    else torch.zeros_like(leaf)
                )
            with torch.no_grad():
                grad = to_weights(tangent(grad, unit), inverse_norm, x.dtype)
        return self._shaped(value.detach(), x), grad.reshape(x.shape).to(x.device)

    def recorded(self, x: Tensor, state: State | None) -> Tensor:
        """The penalty (...) of x (..., n, d) by autograd alone: any derivative, with a graph as large as it gets."""
        unit, inverse_norm = self._unit(x)
        return self._shaped(self._by_group(unit, inverse_norm, state), x)

    def _prepared(self, x: Tensor, state: State | None) -> State | None:
        if state is None or not x.numel():
            return self.prepare(x, None) if x.numel() else None
        check_state(self, x, state)
        return state

    def _unit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit rows (b, n, d) and inverse norms (b, n, 1) in the precision of this measure."""
        stack = with_float64(x).reshape(x.shape[:-2].numel(), *x.shape[-2:])
        return unit_rows(stack.double() if self.wide else stack.to(working_dtype(x.dtype)))

    @staticmethod
    def _shaped(value: Tensor, x: Tensor) -> Tensor:
        return value.reshape(x.shape[:-2]).to(x.device, working_dtype(x.dtype))

    def _by_group(self, unit: Tensor, inverse_norm: Tensor, state: State | None) -> Tensor:
        """Penalty (b,); groups with zero rows, which are left out, one at a time."""
        alive = inverse_norm.squeeze(-1) > 0  # (b, n)
        with exact_arithmetic(unit):
            if alive.shape[-1] > 1 and unit.numel() and (self.sees_zero_rows or bool(alive.all())):
                return self._checked(self.on_sphere(unit, state), unit)
            zero = unit.sum() * 0.0
            parts = [zero] * len(unit)
            for i, rows in enumerate(alive):
                if int(rows.sum()) > 1:
                    own = (
                        None
                        if state is None
                        else {name: part[i : i + 1] for name, part in state.items()}
                    )
                    parts[i] = self._checked(
                        self.on_sphere(unit[i : i + 1, rows], own), unit[:1]
                    ).squeeze(0)
            return torch.stack(parts) if parts else unit.new_zeros(0)

    def _checked(self, value: Tensor, unit: Tensor) -> Tensor:
        if value.shape != unit.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}.on_sphere must return one value a group, shape ({len(unit)},), for unit rows of shape "
                f"{tuple(unit.shape)}; got shape {tuple(value.shape)}: sum over the last two dimensions only"
            )
        return value


class _Evaluation(torch.autograd.Function):
    """A penalty whose gradient is computed at once; backward is a product, and under ``create_graph`` recorded anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, measure: SphereMeasure, state: State | None) -> Tensor:
        value, grad = measure.value_and_grad(x, state)
        ctx.measure, ctx.state = measure, state
        ctx.save_for_backward(x, grad)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        x, grad = ctx.saved_tensors
        if torch.is_grad_enabled():
            value = ctx.measure.recorded(x, ctx.state)
            return torch.autograd.grad(value, x, grad_outputs[0], create_graph=True)[0], None, None
        return grad * grad_outputs[0][..., None, None].to(grad.dtype), None, None


def check_measure(measure: object) -> None:
    """Refuse what is no measure: a name, a class instead of an instance, a dataclass that is not frozen."""
    if isinstance(measure, type) and issubclass(measure, Measure):
        raise TypeError(
            f"measure must be an instance: write {measure.__name__}(), with its settings in the brackets"
        )
    if not isinstance(measure, Measure):
        raise TypeError(f"measure must be a measure such as RieszEnergy(s=2); got {measure!r}")
    check_hashable(measure)


def check_state(measure: Measure, x: Tensor, state: State) -> None:
    """Refuse a state of another measure, or for neurons of another shape than x (..., n, d)."""
    if not measure.fits(x, state):
        raise ValueError(
            f"the state is not one of {measure!r} for neurons of shape {tuple(x.shape)}: take it from prepare(x, state), "
            "which replaces one that does not fit"
        )


def check_rows(x: Tensor, rows: Tensor) -> None:
    """Refuse neurons x (..., n, d) that are none, and rows that do not mark some of them."""
    check_neurons(x)
    if not isinstance(rows, Tensor) or rows.dtype != torch.bool or rows.shape != x.shape[:-1]:
        got = (
            f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else repr(rows)
        )
        raise ValueError(
            f"rows must be a bool tensor of shape {tuple(x.shape[:-1])}, one entry a neuron; got {got}"
        )


def next_draw(x: Tensor, state: State | None) -> State:
    """Count the draws of a random measure of neurons x (..., n, d), one number for each group."""
    if state is not None and counts_draws(x, state):
        return {"draw": state["draw"] + 1}
    return {"draw": torch.zeros(x.shape[:-2].numel(), dtype=torch.int64)}


def counts_draws(x: Tensor, state: State) -> bool:
    """Tell whether a state counts draws for the groups of neurons x (..., n, d)."""
    return set(state) == {"draw"} and state["draw"].shape == (x.shape[:-2].numel(),)


def draw_of(state: State | None) -> int:
    """The number of the draw that a state stands for."""
    return int(state["draw"][0]) if state else 0
