"""What fresh gradients tell of those that they replace, read a step later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._engine.delta import Delta, Use
from lightning_hsu._engine.late import LateNumbers
from lightning_hsu._engine.reuse import Reuse


class Lessons:
    """Numbers of fresh gradients, on their way to the host."""

    def __init__(self) -> None:
        self._unread: list[tuple[LateNumbers, list[_Unread]]] = []

    def begin(self, fresh: Sequence[Fresh]) -> None:
        """Begin to compare gradients that were just computed with those that they replace."""
        by_device: dict[torch.device, list[Fresh]] = {}
        for one in fresh:
            by_device.setdefault(one.grad.device, []).append(one)
        for members in by_device.values():
            numbers = LateNumbers(_numbers(members))
            self._unread.append((numbers, [one.released() for one in members]))

    def learn(self, tolerance: float | None) -> set[str]:
        """Read the numbers and learn from them for how long gradients may be used.

        Args:
            tolerance: The error wanted; with None nothing is learnt.

        Returns:
            Names of the layers of which something was learnt.
        """
        learnt = set()
        for numbers, members in self._unread:
            values = iter(numbers.read())
            errors = [next(values) if one.age > 0 else math.nan for one in members]
            for part in ("steepest", "longest", "size"):
                for one in members:
                    setattr(one.delta, part, next(values))
            for one, error in zip(members, errors, strict=True):
                if one.age > 0 and tolerance is not None:
                    known = None if one.is_random else error
                    one.reuse.learn(one.name, one.age, one.moved, known, tolerance)
                    learnt.add(one.name)
        self._unread = []
        return learnt


@dataclass(eq=False)
class Fresh:
    """A gradient that was just computed.

    Args:
        use: The layer.
        grad: Its gradient (groups, n, d).
        norm: Norms of its neurons (groups, n, 1).
        delta: What is kept of it.
        reuse: What is known of how this layer's gradients age.
        is_random: Whether it comes from a random draw.
        before: The gradient that it replaces, if something can be learnt from that.
    """

    use: Use
    grad: Tensor
    norm: Tensor
    delta: Delta
    reuse: Reuse
    is_random: bool = False
    before: Delta | None = None

    def released(self) -> _Unread:
        """The same without the tensors."""
        age = 0 if self.before is None else self.before.age
        name = self.use.layer.name
        return _Unread(name, self.delta, self.reuse, self.use.moved, age, self.is_random)


class _Unread(NamedTuple):
    """A gradient whose numbers are not read yet.

    Args:
        name: The layer's.
        delta: The gradient.
        reuse: What is known of how this layer's gradients age.
        moved: How far the neurons have moved since the gradient that it replaces.
        age: Steps since that one was computed; 0 if nothing can be learnt from it.
        is_random: Whether it comes from a random draw.
    """

    name: str
    delta: Delta
    reuse: Reuse
    moved: float
    age: int
    is_random: bool


def _numbers(members: Sequence[Fresh]) -> Tensor:
    """Numbers of fresh gradients, in few calls.

    They are the errors of the gradients that are replaced, then of each gradient the lengths of its
    steepest and of its longest row, and the norm of the sample.
    """
    dtype = members[0].grad.dtype
    lengths = []
    norms = []
    samples = []
    replaced = []
    off = []  # of those that replace one
    sizes = []
    for fresh in members:
        grad = fresh.grad
        lengths.append(torch.linalg.vector_norm(grad, dim=-1).flatten())
        norms.append(fresh.norm.flatten())
        samples.append(fresh.delta.sample.to(dtype))
        if fresh.before is not None:
            # Row by row: the order of these sums does not depend on the number of threads.
            change = fresh.before.grad.to(grad.dtype) - grad
            off.append(torch.linalg.vector_norm(change, dim=-1).flatten())
            sizes.append(lengths[-1])
            replaced.append(fresh)
    found = []
    if replaced:
        found += _errors(replaced, off, sizes)
    over = torch._foreach_clamp_min(norms, torch.finfo(dtype).tiny)
    found += torch._foreach_norm(torch._foreach_div(lengths, over), math.inf)
    found += torch._foreach_norm(lengths, math.inf)
    found += torch._foreach_norm(samples)
    return torch.stack([number.to(torch.float32) for number in found])


def _errors(
    replaced: Sequence[Fresh], off: Sequence[Tensor], lengths: Sequence[Tensor]
) -> list[Tensor]:
    """Relative errors of gradients that are replaced; 0 where both are 0.

    Args:
        replaced: What replaces them.
        off: Lengths of the rows of the differences.
        lengths: Lengths of the rows of the fresh gradients.
    """
    change = torch.stack(torch._foreach_norm(list(off)))
    relative = change / torch.stack(torch._foreach_norm(list(lengths)))
    errors = list(torch.where(change == 0, 0.0, relative).unbind())
    for place, fresh in enumerate(replaced):
        layer = fresh.use.layer
        if layer.rows is not None:
            errors[place] = layer.target.placement.largest(errors[place], layer.parameters[0])
    return errors
