"""What a measure is: neurons (..., n, d) in, a value (...) out."""

# No postponed annotations here: jsonargparse 4.45 to 4.50 evaluates those of a base class in the
# module of its subclass.

from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_hsu._checks import check_hashable, check_neurons
from lightning_hsu._core import PairTerm
from lightning_hsu.measures.facts import GRADIENT, VALUE, Fact, keep_what_holds
from lightning_hsu.measures.state import State


class Measure(ABC):
    """A notion of hyperspherical uniformity; subclasses are frozen dataclasses.

    A measure works on tensors only and knows nothing of modules, trainers or ranks. It does not
    depend on the norms of the neurons, their order or a common rotation. It has no memory either: a
    measure with an inner problem or with random draws gets what it needs from :meth:`prepare`, and
    the training loop keeps that from step to step.

    A new measure defines its function once, in :meth:`penalty`, or in the method that its base
    class asks for: ``kernel`` of a :class:`PairwiseMeasure` and ``on_sphere`` of a
    :class:`SphereMeasure`. The gradient follows.

    Everything else that a class states about its function (closed forms, compiled kernels, expected
    values, bounds) holds for that function only. In a subclass that overrides the function, at any
    depth or by a mixin, it does not hold unless the subclass states it again. Otherwise
    :meth:`value_and_grad` differentiates the subclass's own :meth:`penalty`, :meth:`gradient_rows`
    computes the whole gradient, and :meth:`pair_term`, :meth:`expectation`,
    :meth:`deviation`, :meth:`bound` and :meth:`idle` return None. Conversely a class that overrides
    the gradient must define the function in the same class; otherwise the class statement raises a
    TypeError.

    Attributes:
        higher_is_better: Whether uniform neurons have a large value.
        half_space: Whether the neurons count as lines, so that opposite ones are the same.
        has_state: Whether :meth:`prepare` may return a state; True in a class that overrides it.
    """

    facts: ClassVar[dict[str, Fact]] = {
        "value_and_grad": GRADIENT,
        "gradient_rows": GRADIENT,
        "pair_term": GRADIENT,
        "expectation": VALUE,
        "deviation": VALUE,
        "bound": VALUE,
        "idle": VALUE,
        "has_state": Fact(("prepare",), otherwise=True),
    }
    higher_is_better: ClassVar[bool] = False
    has_state: ClassVar[bool] = False
    half_space: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        keep_what_holds(cls, cls.facts)

    # The function and its gradient

    def __call__(self, x: Tensor, state: State | None = None) -> Tensor:
        """Return the natural value (...) of the neurons x (..., n, d)."""
        return self.natural(self.penalty(x, state))

    def natural(self, penalty: Tensor) -> Tensor:
        """Return the natural value that belongs to a penalty."""
        if self.higher_is_better:
            return 0.0 - penalty  # avoids -0.0
        return penalty

    @abstractmethod
    def penalty(self, x: Tensor, state: State | None = None) -> Tensor:
        """Return what training minimises, shape (...); twice differentiable.

        Args:
            x: Neurons, shape (..., n, d), floating.
            state: From :meth:`prepare`; None if the measure has none.
        """

    def value_and_grad(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Return the penalty (...) and its gradient (..., n, d), without an autograd graph.

        The caller may overwrite both.
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self.penalty(leaf, state)
        if not value.requires_grad:
            return value, torch.zeros_like(leaf, requires_grad=False)
        (grad,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
        return value.detach(), grad.contiguous()

    def gradient_on_gpu(
        self, x: Tensor, state: State | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Return the gradient of :meth:`value_and_grad` on a GPU, without waiting for anything.

        Args:
            x: Neurons, shape (..., n, d), floating.
            state: From :meth:`prepare`.

        Returns:
            The gradient, and whether it is exact, a 0-d tensor. Where it is not, as with coincident
            neurons, it is finite and nearly right: compute it by :meth:`value_and_grad` next time.
            None if this measure has no such way, or the neurons are not on a GPU.
        """
        return None

    def gradient_rows(self, x: Tensor, rows: Tensor, state: State | None = None) -> Tensor:
        """Return the gradient of :meth:`value_and_grad` in some rows, and 0 in the others.

        Args:
            x: Neurons, shape (..., n, d), floating; all of them, whichever rows are wanted.
            rows: The wanted rows, bool, shape (..., n).
            state: From :meth:`prepare`.

        Returns:
            The gradient of the penalty, summed over the groups, with the shape and dtype of x. A
            measure without a cheaper way computes the whole gradient.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has fewer than two dimensions, or rows is not a bool tensor of the shape
                (..., n).

        Example:
            >>> from lightning_hsu.measures import Separation
            >>> rows = torch.tensor([False, True, False])
            >>> Separation().gradient_rows(torch.eye(3, 4), rows).any(-1)
            tensor([False,  True, False])
        """
        check_rows(x, rows)
        grad = self.value_and_grad(x, state)[1]
        return grad.masked_fill(~rows.to(grad.device)[..., None], 0.0)

    def pair_term(self) -> PairTerm | None:
        """Return the kernel whose mean over pairs, or its logarithm, is the penalty.

        None if the penalty is not such a mean.
        """
        return None

    # The state of a measure with an inner problem or random draws

    def prepare(self, x: Tensor, state: State | None = None) -> State | None:
        """Return what an evaluation at x (..., n, d) needs besides x.

        None for most measures. A state that does not fit x, such as another model's, is replaced by
        a fresh one. The same x and state give bitwise the same result on every rank.
        """
        return None

    def fits(self, x: Tensor, state: State) -> bool:
        """Tell whether a state is one of this measure for neurons of the shape of x (..., n, d)."""
        groups = x.shape[:-2].numel()
        return all(part.shape[:1] == (groups,) for part in state.values())

    def goes_on(self, x: Tensor, state: State) -> bool:
        """Tell whether :meth:`prepare` goes on from a state at x (..., n, d), or begins afresh.

        The state may come from a file and hold any tensors.
        """
        return self.fits(x, state)

    def is_exact(self, state: State | None) -> bool:
        """Tell whether values under this state are exact, not the best that a search found."""
        flags = [part for name, part in (state or {}).items() if name.endswith("exact")]
        return all(bool(flag.all()) for flag in flags)

    # What values mean, and what they cost

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """Compare natural values with that of random points: 1 is as random, above 1 less uniform.

        The result is their quotient, or the exponential of their difference if the value of random
        points is not positive.
        """
        if reference <= 0:
            worse = reference - value if self.higher_is_better else value - reference
            return worse.exp()
        if self.higher_is_better:
            return reference / value.clamp_min(1e-9 * reference)
        return value / reference

    def for_head(self) -> "Measure":
        """Return the measure for a class head: in full space, as classes may be antipodal."""
        if not is_dataclass(self) or "half_space" not in [field.name for field in fields(self)]:
            return self
        return replace(self, half_space=False)

    def expectation(self, n: int, d: int) -> float | None:
        """Return the exact expected value of n independent uniform neurons in d dimensions.

        It may be ``inf``; None if it is not known.
        """
        return None

    def deviation(self, n: int, d: int) -> float | None:
        """Return the standard deviation of the value of n independent uniform neurons.

        It may be ``inf``; None if it is not known.
        """
        return None

    def bound(self, n: int, d: int) -> float | None:
        """Return a value that no n neurons in d dimensions can beat; None if none is known."""
        return None

    def idle(self, n: int, d: int) -> str | None:
        """Return why no n neurons in d dimensions feel a force, and what to do about it.

        None if they can feel a force.
        """
        return None

    def value_flops(self, n: int, d: int) -> float:
        """Return about how many FLOP one value takes, including a fresh :meth:`prepare`.

        The more FLOP it takes, the fewer random layers are simulated for a reference.
        """
        return 2.0 * n * n * max(d, 64)

    def grad_flops(self, n: int, d: int) -> float:
        """Return about how many FLOP one gradient of n neurons in d dimensions takes."""
        return 3.0 * self.value_flops(n, d)  # a value, and twice that for autograd


def check_measure(measure: object) -> None:
    """Refuse anything but a hashable instance of a measure."""
    if isinstance(measure, type) and issubclass(measure, Measure):
        raise TypeError(
            f"measure must be an instance: write {measure.__name__}(), "
            "with its settings in the brackets"
        )
    if not isinstance(measure, Measure):
        raise TypeError(f"measure must be a measure such as RieszEnergy(s=2); got {measure!r}")
    check_hashable(measure)


def check_state(measure: Measure, x: Tensor, state: State) -> None:
    """Refuse a state of another measure, or one for neurons of a shape unlike x (..., n, d)."""
    if not measure.fits(x, state):
        raise ValueError(
            f"the state is not one of {measure!r} for neurons of shape {tuple(x.shape)}: "
            "take it from prepare(x, state), which replaces one that does not fit"
        )


def check_rows(x: Tensor, rows: Tensor) -> None:
    """Refuse an x that is not neurons (..., n, d), and rows that are not a mask (..., n)."""
    check_neurons(x)
    if isinstance(rows, Tensor) and rows.dtype == torch.bool and rows.shape == x.shape[:-1]:
        return
    got = repr(rows)
    if isinstance(rows, Tensor):
        got = f"{rows.dtype} of shape {tuple(rows.shape)}"
    raise ValueError(
        f"rows must be a bool tensor of shape {tuple(x.shape[:-1])}, one entry a neuron; got {got}"
    )
