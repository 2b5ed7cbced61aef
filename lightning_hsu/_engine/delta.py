"""The kept gradient of one layer, and the layer at a step that uses it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core import exact_arithmetic, working_dtype
from lightning_hsu._engine.layer import Layer, Token, token_of
from lightning_hsu._engine.pull import Pull, project
from lightning_hsu.measures import Measure

SAMPLE = 1024
"""Entries of a layer by which it is seen how far its neurons have moved."""

LOOK, PROJECT = "look", "project"
"""What is done for one kept gradient a step, in turn: see :mod:`lightning_hsu._engine.turns`."""

_FIRST_TURN = 8
"""The age from which a gradient has turns."""


@dataclass(eq=False, slots=True)
class Use:
    """One layer at a step that uses its gradient.

    Args:
        layer: The layer.
        x: Its neurons (groups, n, d) as they are now, without a graph.
        sample: Some entries of them.
        token: Equal as long as its weights are the same, as far as torch knows; None if that is not
            known.
        moved: Relative change of these entries since the gradient was computed; inf without one.
        changed: Change of the neuron that has changed most, over its norm; 0 if nobody has looked.
        is_written: Whether the weights were written to more or less often than between other steps.
        looks_at_rows: Whether the neurons are looked at one by one.
        is_projected: Whether its kept gradient is projected on their tangent, if it is used.
        is_due: Whether its gradient is computed at this step.
        needs_value: Whether it needs the penalty beside its gradient.
    """

    layer: Layer
    x: Tensor
    sample: Tensor
    token: Token | None = None
    needs_value: bool = False
    moved: float = math.inf
    changed: float = 0.0
    is_written: bool = False
    looks_at_rows: bool = False
    is_projected: bool = False
    is_due: bool = True

    @property
    def held(self) -> Tensor:
        """The neurons of which this rank keeps the gradient: x, or (1, k, d) of a sharded layer."""
        return self.part_of(self.x)

    def part_of(self, whole: Tensor) -> Tensor:
        """Of a tensor (groups, n, d) what this rank keeps."""
        places = self._places
        return whole if places is None else whole.flatten(0, 1)[places].unsqueeze(0)

    def whole_of(self, part: Tensor) -> Tensor:
        """A new tensor (groups, n, d) of what this rank keeps, with zeros elsewhere."""
        places = self._places
        if places is None:
            return part.clone()
        whole = part.new_zeros(self.x.shape)
        whole.flatten(0, 1).index_copy_(0, places, part.squeeze(0))
        return whole

    @property
    def _places(self) -> Tensor | None:
        """Places of the neurons that this rank keeps; a penalty in a loss needs all of them."""
        return None if self.needs_value else self.layer.held_places


class Sketch(NamedTuple):
    """What tells of each neuron of a layer whether it is another one than before.

    Args:
        products: The products of its parts with random signs over its norm (rows, parts), bfloat16.
        inverse: Its inverse norm (rows, 1), bfloat16.
    """

    products: Tensor
    inverse: Tensor


@dataclass(eq=False, slots=True)
class Delta:
    """The kept gradient of a layer.

    Args:
        measure: The measure whose penalty it is the gradient of.
        grad: The gradient (groups, n, d), summed over the groups: of the neurons' dtype, or float32
            for float16, whose range is too small. Of a sharded layer (1, k, d), of those k neurons
            alone of which this rank holds a part.
        sample: Entries of the neurons of which it was computed.
        squares: Squared norms (groups, n, 1) of these neurons, above 0; (1, k, 1) of a sharded layer.
        strides: Those of the layer's parameters: in another memory format neurons have their
            entries in another order.
        sketch: What tells of each of these neurons whether it is another one; None if nothing does.
        value: The penalty (groups,) if it is needed.
        steepest: The largest length of its rows over the norm of a row's neuron; inf if not known.
        longest: The largest length of its rows; inf if not known.
        size: The norm of the sample.
        interval: Steps for which it may be used, as known before it was computed: what it tells of
            that itself is on its way to the host when the next step is prepared, on a GPU.
        age: Steps that have used it.
        moved: Relative change of the sample when it was last used.
        pull: The pull along the sum of the neurons that is part of it; None if it has none.
        turns: The ages from which it has its next turns, by what is done then.
    """

    measure: Measure
    grad: Tensor
    sample: Tensor
    squares: Tensor
    strides: tuple[tuple[int, ...], ...] = ()
    sketch: Sketch | None = None
    value: Tensor | None = None
    steepest: float = math.inf
    longest: float = math.inf
    size: float = math.nan
    interval: int = 1
    age: int = 0
    moved: float = 0.0
    pull: Pull | None = None
    turns: dict[str, int] = field(default_factory=lambda: {LOOK: _FIRST_TURN, PROJECT: _FIRST_TURN})

    def bytes(self) -> int:
        """Its memory."""
        kept = [self.grad, self.sample, self.squares]
        if self.sketch is not None:
            kept += self.sketch
        if self.pull is not None:
            kept += [self.pull.inverse, self.pull.total]
        return sum(tensor.nbytes for tensor in kept)

    @property
    def is_followed(self) -> bool:
        """Whether its next use follows the pull along the sum of the neurons.

        That is at each step, from age 4 at each second one, from 16 at each fourth. (At powers of two
        only, errors reach 25 % at the 99th percentile instead of 11 %.)
        """
        if self.pull is None or self.age == 0:
            return False
        every = 1
        if self.age >= 4:
            every = 2 if self.age < 16 else 4
        return self.age % every == 0

    def refresh(self, x: Tensor, *, projects: bool) -> None:
        """Bring it nearer to the gradient of its neurons as they are now.

        Args:
            x: The neurons as they are now, of the gradient's shape.
            projects: Whether to project it on their tangent.
        """
        pull = self.pull if self.is_followed else None
        if pull is None and not projects:
            return
        dtype = working_dtype(x.dtype)
        grad, w = self.grad.to(dtype), x.to(dtype)
        with exact_arithmetic(x):  # a hook may run within autocast
            if pull is not None:
                pull.follow(grad, w)
            if projects:
                project(grad, self.squares, w)
        if grad is not self.grad:
            self.grad.copy_(grad)

    def relative(self, change: float) -> float:
        """A change of the sample, as a part of its norm."""
        if change == 0 or self.size == 0:
            return 0.0 if change == 0 else math.inf
        return change / self.size

    def fits(self, use: Use) -> bool:
        """Whether it is a gradient of this layer, as far as the outside tells."""
        x = use.held
        if self.grad.shape != x.shape or self.grad.device != x.device:
            return False
        if use.needs_value and self.value is None:
            return False
        if self.strides != strides_of(use.layer):
            return False
        return self.measure == use.layer.measure and self.sample.dtype == use.sample.dtype


Known = tuple[Use, Delta]
"""A layer at a step, and its kept gradient."""


def use_of(layer: Layer, x: Tensor) -> Use:
    """A layer with neurons x (groups, n, d) at a step."""
    return Use(layer, x, sample_of(x), token_of(layer))


def norms_of(use: Use) -> Tensor:
    """Norms (groups, n, 1) of the neurons of which this rank keeps the gradient, float32 or wider."""
    x = use.held
    found: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=working_dtype(x.dtype))
    return found


def strides_of(layer: Layer) -> tuple[tuple[int, ...], ...]:
    """The strides of a layer's parameters."""
    return tuple(p.stride() for p in layer.parameters)


def sample_of(x: Tensor) -> Tensor:
    """Up to about 1024 entries of x (groups, n, d), spread over all its rows and columns."""
    entries = x.numel()
    step = max(1, math.ceil(entries / SAMPLE))
    while math.gcd(step, x.shape[-1]) > 1:
        step += 1  # else all of them could be of one column
    if not x.is_contiguous():
        return x.reshape(-1)[::step]
    return x.as_strided((math.ceil(entries / step),), (step,), x.storage_offset())


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient of neurons of a dtype is kept."""
    return torch.float32 if dtype == torch.float16 else dtype
