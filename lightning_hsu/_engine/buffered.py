"""Updates of plain layers that go through buffers: for statistics, and to move the neurons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core import working_dtype
from lightning_hsu._core.foreach import SMALL
from lightning_hsu._core.updates import GradientUpdate, along_the_sphere, chunks, stack_neurons
from lightning_hsu._engine.late import LateNumbers
from lightning_hsu._engine.rates import Rate

STRONG = 10.0
"""How many times the task's gradient the penalty's is where it is too strong."""


@dataclass(frozen=True)
class GradientStats:
    """What one update did to one layer: tensors, without host-device synchronisation.

    Args:
        share: Norm of the added gradient over the norm of the task's; not finite if the task's is 0
            or not finite.
        limited: Number of neurons whose penalty gradient the step limit shortened.
        strong: Number of neurons whose penalty gradient is more than ``STRONG`` times as long as
            the task's gradient of a neuron, in the root mean square over the layer.
        task: Norm of the task's gradient, without a GradScaler's factor.
    """

    share: Tensor
    limited: Tensor
    strong: Tensor
    task: Tensor


class LateStats:
    """Stats on their way to the host.

    Args:
        stats: By layer.
    """

    def __init__(self, stats: Mapping[str, GradientStats]) -> None:
        self._names = list(stats)
        device = stats[self._names[0]].share.device
        self.is_there = device.type == "cpu"
        numbers = []
        for one in stats.values():
            for value in (one.share, one.limited, one.strong, one.task):
                numbers.append(value.detach().to(device, torch.float32))
        self._numbers = LateNumbers(torch.stack(numbers))

    def read(self) -> dict[str, StatsNumbers]:
        """The numbers by layer."""
        values = iter(self._numbers.read())
        found = {}
        for name in self._names:
            share, limited, strong, task = islice(values, 4)
            found[name] = StatsNumbers(share, int(limited), int(strong), task)
        return found


class StatsNumbers(NamedTuple):
    """What :class:`GradientStats` holds, in plain numbers."""

    share: float
    limited: int
    strong: int
    task: float


@dataclass(eq=False)
class _Member:
    """One update that goes through a buffer.

    Args:
        name: The layer.
        update: Its update.
        grad: What the update would add to without a buffer.
        rate: The learning rate with which its neurons will move.
    """

    name: str
    update: GradientUpdate
    grad: Tensor
    rate: Rate


@dataclass(eq=False)
class _Stack:
    """Members of one dimension, dtype and device, and their buffers as one tensor (rows, d)."""

    members: list[_Member] = field(default_factory=list)
    buffer: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def rows(self) -> list[int]:
        """How many rows each member has."""
        return [member.update.size[:-1].numel() for member in self.members]


class BufferedUpdates:
    """Updates whose gradients stay apart from the task's.

    A buffer gets what ``.grad`` would get, by the same arithmetic: a step changes the weights
    bitwise the same with statistics and without. Layers are looked at together.
    """

    def __init__(self) -> None:
        self._stacks: dict[object, _Stack] = {}
        self._kept: dict[str, tuple[Tensor, float]] = {}

    def take(self, name: str, update: GradientUpdate, rate: Rate) -> None:
        """Let an update of a layer go through a buffer, once :meth:`begin` is called."""
        w = update.entries
        member = _Member(name, update, update.out_entries, rate)
        key = (update.size[-1], w.dtype, w.device)
        self._stacks.setdefault(key, _Stack()).members.append(member)

    def begin(self) -> None:
        """Make the buffers; what the updates add goes into them from now on."""
        for stack in self._stacks.values():
            w = stack.members[0].update.entries
            size = (sum(stack.rows), stack.members[0].update.size[-1])
            stack.buffer = torch.zeros(size, dtype=working_dtype(w.dtype), device=w.device)
            parts = torch.split(stack.buffer, stack.rows)
            for member, part in zip(stack.members, parts, strict=True):
                member.update.out_entries = part.view(member.update.entries.shape)

    def note_kept(self, name: str, grad: Tensor, scale: float) -> None:
        """Note that a layer's buffer is a scale times a kept gradient (groups, n, d).

        It is added as on any step, in one rounding.
        """
        self._kept[name] = grad, scale

    def add(self) -> None:
        """Add the buffers to the task's gradients."""
        outs: dict[torch.device, list[Tensor]] = {}
        parts: dict[torch.device, list[Tensor]] = {}
        for member in self._members():
            if member.name in self._kept:
                grad, scale = self._kept[member.name]
                torch._foreach_add_([member.grad], [grad.view(member.grad.shape)], alpha=scale)
                continue
            device = member.grad.device
            outs.setdefault(device, []).append(member.grad)
            parts.setdefault(device, []).append(member.update.out_entries)
        for device, grads in outs.items():
            torch._foreach_add_(grads, parts[device])

    def move(self) -> None:
        """Move the neurons against the buffers along the sphere, keeping their norms."""
        alike: dict[object, list[_Member]] = {}
        for member in self._members():
            w = member.update.entries
            rate = id(member.rate) if isinstance(member.rate, Tensor) else member.rate
            key = (member.update.shape, w.shape, w.dtype, w.device, rate)
            alike.setdefault(key, []).append(member)
        for members in alike.values():
            count = max(1, SMALL // max(1, members[0].update.entries.numel()))
            for some in chunks(members, count):
                _move(some)

    def stats(self) -> dict[str, GradientStats]:
        """Describe what the buffers hold, by layer."""
        by_device: dict[torch.device, list[_Stack]] = {}
        for stack in self._stacks.values():
            by_device.setdefault(stack.buffer.device, []).append(stack)
        found: dict[str, GradientStats] = {}
        for stacks in by_device.values():
            found |= _stats(stacks)
        return found

    def _members(self) -> Iterator[_Member]:
        """All of them."""
        for stack in self._stacks.values():
            yield from stack.members


def strong_neurons(grad: Tensor, total: Tensor, share: Tensor) -> Tensor:
    """Mask (groups, n) of the neurons in which the penalty is far above the task.

    Args:
        grad: The penalty's gradient (groups, n, d).
        total: Its norm.
        share: That over the norm of the task's.
    """
    length = torch.linalg.vector_norm(grad, dim=-1)
    typical = total / math.sqrt(length.numel())  # of a neuron
    strong: Tensor = length * share > STRONG * typical
    return strong


def _move(members: Sequence[_Member]) -> None:
    """Move layers of one shape and learning rate."""
    updates, outs, entries = [], [], []
    for member in members:
        updates.append(member.update)
        outs.append(member.update.out)
        entries.append(member.update.entries.detach())
    change = along_the_sphere(stack_neurons(updates), torch.cat(outs), members[0].rate)
    parts = change.view(len(members), *entries[0].shape).unbind()
    torch._foreach_add_(entries, list(parts))


def _stats(stacks: Sequence[_Stack]) -> dict[str, GradientStats]:
    """Describe the buffers of one device in few calls, whose number does not grow with the layers."""
    members: list[_Member] = []
    lengths: list[Tensor] = []  # of the rows, layer by layer
    norms: list[Tensor] = []  # of their neurons
    grads: dict[torch.dtype, list[Tensor]] = {}
    for stack in stacks:
        members += stack.members
        w = torch.empty_like(stack.buffer)
        entries, parts = [], []
        for member, part in zip(stack.members, torch.split(w, stack.rows), strict=True):
            entries.append(member.update.entries.detach())
            parts.append(part.view(entries[-1].shape))
            grads.setdefault(w.dtype, []).append(member.grad)
        torch._foreach_copy_(parts, entries)
        lengths += torch.split(torch.linalg.vector_norm(stack.buffer, dim=-1), stack.rows)
        norms += torch.split(torch.linalg.vector_norm(w, dim=-1), stack.rows)
    norms_of = {dtype: iter(_norms(some, dtype)) for dtype, some in grads.items()}
    tasks, sizes, factors, unscaling = [], [], [], []
    for member, length in zip(members, lengths, strict=True):
        tasks.append(next(norms_of[length.dtype]))
        sizes.append(len(length))
        factors.append(STRONG / math.sqrt(len(length)))
        unscaling.append(1.0 / member.update.grad_scale)
    totals = torch._foreach_norm(lengths)
    thresholds = torch._foreach_mul(tasks, factors)
    limited = _count(_limited(members, lengths, norms), sizes)
    above = [threshold.expand(size) for threshold, size in zip(thresholds, sizes, strict=True)]
    strong = _count(torch.cat(lengths) > torch.cat(above), sizes)
    task = torch.stack(tasks)
    share = (torch.stack(totals) / task).unbind()
    unscaled = torch._foreach_mul(tasks, unscaling)
    found = {}
    for place, member in enumerate(members):
        numbers = share[place], limited[place], strong[place], unscaled[place]
        found[member.name] = GradientStats(*numbers)
    return found


def _limited(
    members: Sequence[_Member], lengths: Sequence[Tensor], norms: Sequence[Tensor]
) -> Tensor:
    """Which rows have the largest length that the step limit, or the dtype, allows; all in one."""
    rounding = 1.0 - 16 * torch.finfo(lengths[0].dtype).eps
    factors = []
    bounds = []
    rooms = list(norms)
    for place, member in enumerate(members):
        update = member.update
        scale = update.grad_scale * rounding
        largest = torch.finfo(update.entries.dtype).max / 2
        bounds.append(min(largest * scale, torch.finfo(lengths[place].dtype).max))
        if update.limit is None:
            factors.append(math.inf)  # of a zero row it makes NaN, which is not counted
        elif isinstance(update.limit, Tensor):
            rooms[place] = rooms[place] * update.limit
            factors.append(scale)
        else:
            factors.append(update.limit * scale)
    allowed = torch._foreach_clamp_max(torch._foreach_mul(rooms, factors), bounds)
    return (torch.cat(list(norms)) > 0) & (torch.cat(list(lengths)) >= torch.cat(list(allowed)))


def _count(mask: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """How often a mask is true in each of its parts of these sizes."""
    parts = torch.split(mask.float(), list(sizes))
    return torch.stack(torch._foreach_norm(list(parts), 1)).long().unbind()


def _norms(grads: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Norms of gradients, accumulated in a wider dtype."""
    wide = [grad.to(dtype) for grad in grads]
    return list(torch._foreach_norm(wide))
