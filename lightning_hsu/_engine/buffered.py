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
        limited: Number of neurons whose penalty gradient the step limit or the share limit
            shortened.
        strong: Number of neurons whose penalty gradient is more than ``STRONG`` times as long as
            the task's gradient of a neuron, in the root mean square over the layer.
        task: Norm of the task's gradient, without a GradScaler's factor.
        held: 1 if the task's gradient shortened the penalty's (``share_limit``), else 0.
    """

    share: Tensor
    limited: Tensor
    strong: Tensor
    task: Tensor
    held: Tensor


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
            for value in (one.share, one.limited, one.strong, one.task, one.held):
                numbers.append(value.detach().to(device, torch.float32))
        self._numbers = LateNumbers(torch.stack(numbers))

    def read(self) -> dict[str, StatsNumbers]:
        """The numbers by layer."""
        values = iter(self._numbers.read())
        found = {}
        for name in self._names:
            share, limited, strong, task, held = islice(values, 5)
            found[name] = StatsNumbers(share, int(limited), int(strong), task, held > 0)
        return found


class StatsNumbers(NamedTuple):
    """What :class:`GradientStats` holds, in plain numbers."""

    share: float
    limited: int
    strong: int
    task: float
    held: bool


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
    """Members of one dimension, dtype and device, and their buffers as one tensor (rows, d).

    Args:
        members: The updates.
        buffer: Their buffers.
        norms: Norms of their neurons (rows,), if stats are asked for.
    """

    members: list[_Member] = field(default_factory=list)
    buffer: Tensor = field(default_factory=lambda: torch.empty(0))
    norms: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def rows(self) -> list[int]:
        """How many rows each member has."""
        return [member.update.size[:-1].numel() for member in self.members]

    @property
    def dimension(self) -> int:
        """The dimension of the neurons."""
        return self.members[0].update.size[-1]


class BufferedUpdates:
    """Updates whose gradients stay apart from the task's.

    A buffer gets what ``.grad`` would get, by the same arithmetic: a step changes the weights
    bitwise the same with statistics and without, where layers are computed in the same batches. Layers
    are looked at together.

    Args:
        has_stats: Whether :meth:`stats` will be called.
    """

    def __init__(self, *, has_stats: bool) -> None:
        self._has_stats = has_stats
        self._stacks: dict[object, _Stack] = {}
        self._kept: dict[str, tuple[Tensor, float]] = {}
        self._held: dict[str, tuple[Tensor, Tensor | float]] = {}

    def take(self, name: str, update: GradientUpdate, rate: Rate) -> None:
        """Let an update of a layer go through a buffer, once :meth:`begin` is called."""
        w = update.entries
        member = _Member(name, update, update.out_entries, rate)
        key = (update.size[-1], w.dtype, w.device)
        self._stacks.setdefault(key, _Stack()).members.append(member)

    def begin(self) -> None:
        """Make the buffers; what the updates add goes into them from now on."""
        for stacks in self._alike():
            w = stacks[0].members[0].update.entries
            sizes = [sum(stack.rows) * stack.dimension for stack in stacks]
            flat = torch.empty(sum(sizes), dtype=working_dtype(w.dtype), device=w.device)
            for stack, own in zip(stacks, torch.split(flat, sizes), strict=True):
                stack.buffer = own.view(-1, stack.dimension)
                parts = torch.split(stack.buffer, stack.rows)
                for member, part in zip(stack.members, parts, strict=True):
                    member.update.out_entries = part.view(member.update.entries.shape)
            if self._has_stats:
                _note_norms(stacks, flat)
            flat.zero_()

    def note_kept(self, name: str, grad: Tensor, scale: float) -> None:
        """Note that a layer's buffer is a scale times a kept gradient (groups, n, d).

        It is added as on any step, in one rounding.
        """
        self._kept[name] = grad, scale

    def note_held(self, name: str, grad: Tensor, factor: Tensor | float) -> None:
        """The same of a layer with a factor of its own, on a GPU a 0-d tensor."""
        self._held[name] = grad, factor

    def add(self) -> None:
        """Add the buffers to the task's gradients."""
        together: dict[tuple[torch.device, float], tuple[list[Tensor], list[Tensor]]] = {}
        for member in self._members():
            if member.name in self._held:
                add_scaled(member.grad, *self._held[member.name])
                continue
            part, scale = self._kept.get(member.name, (member.update.out_entries, 1.0))
            grads, parts = together.setdefault((member.grad.device, scale), ([], []))
            grads.append(member.grad)
            parts.append(part.view(member.grad.shape))
        for (_, scale), (grads, parts) in together.items():
            torch._foreach_add_(grads, parts, alpha=scale)
        self._release()

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
        self._release()

    def stats(self) -> dict[str, GradientStats]:
        """Describe what the buffers hold, by layer."""
        found: dict[str, GradientStats] = {}
        for stacks in self._alike():
            found |= _stats(stacks)
        return found

    def _release(self) -> None:
        """Let the buffers go."""
        for member in self._members():
            member.update.out_entries = member.grad
        self._stacks = {}

    def _alike(self) -> list[list[_Stack]]:
        """The stacks, by device and dtype."""
        found: dict[object, list[_Stack]] = {}
        for stack in self._stacks.values():
            w = stack.members[0].update.entries
            found.setdefault((w.device, w.dtype), []).append(stack)
        return list(found.values())

    def _members(self) -> Iterator[_Member]:
        """All of them."""
        for stack in self._stacks.values():
            yield from stack.members


def add_scaled(out: Tensor, grad: Tensor, factor: Tensor | float) -> None:
    """Add a multiple of a gradient to a tensor of as many entries, in one rounding."""
    if isinstance(factor, Tensor):
        out.addcmul_(grad.view(out.shape), factor)
    else:
        out.add_(grad.view(out.shape), alpha=factor)


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
    """Describe buffers of one device and dtype in few calls, whose number does not grow with them."""
    members: list[_Member] = []
    sizes: list[int] = []
    for stack in stacks:
        members += stack.members
        sizes += stack.rows
    dtype = stacks[0].buffer.dtype
    lengths = stacks[0].buffer.new_empty(sum(sizes))
    for stack, own in zip(stacks, _split(lengths, stacks), strict=True):
        torch.linalg.vector_norm(stack.buffer, dim=-1, out=own)
    norms = [norm for stack in stacks for norm in torch.split(stack.norms, stack.rows)]
    buffers = [member.update.out_entries for member in members]
    grads = [member.grad.to(dtype) for member in members]  # norms are sums of wide squares
    totals_and_tasks = torch._foreach_norm([*buffers, *grads])
    tasks = totals_and_tasks[len(members) :]
    bounds = _bounds(members, norms, tasks).view(3, -1)
    # Zero rows are neither limited nor strong.
    info = torch.finfo(dtype)
    grad_scale = members[0].update.grad_scale  # of all members
    largest = (
        torch.finfo(members[0].update.entries.dtype).max / 2 * grad_scale * less_rounding(dtype)
    )
    bounds.clamp_(info.tiny, min(largest, info.max))
    masks = torch.empty_like(bounds)
    torch.ge(lengths, bounds[:2], out=masks[:2])
    torch.gt(bounds[2], info.tiny, out=masks[2])  # the live neurons
    parts = [part for mask in masks for part in torch.split(mask, sizes)]
    limited, strong, live = torch.stack(torch._foreach_norm(parts, 1)).view(3, -1)
    total, task = torch.stack(totals_and_tasks).view(2, -1)
    share = total / task
    is_held = total >= _held_from(members, tasks)
    limited = torch.where(is_held, live, limited)
    held = is_held.to(dtype)
    if grad_scale != 1:
        task = task / grad_scale
    found = {}
    for member, *numbers in zip(members, share, limited, strong, task, held, strict=True):
        found[member.name] = GradientStats(*numbers)
    return found


def _note_norms(stacks: Sequence[_Stack], flat: Tensor) -> None:
    """Note the norms of the neurons, which the buffers hold meanwhile: there is nothing in them yet.

    Args:
        stacks: Those of one device and dtype.
        flat: Their buffers.
    """
    copies, entries = [], []
    for stack in stacks:
        for member in stack.members:
            copies.append(member.update.out_entries)
            entries.append(member.update.entries.detach())
    torch._foreach_copy_(copies, entries)
    found = flat.new_empty(sum(len(stack.buffer) for stack in stacks))
    for stack, own in zip(stacks, _split(found, stacks), strict=True):
        stack.norms = own
        torch.linalg.vector_norm(stack.buffer, dim=-1, out=own)


def _split(by_row: Tensor, stacks: Sequence[_Stack]) -> tuple[Tensor, ...]:
    """What a tensor (rows,) holds for each stack."""
    return torch.split(by_row, [len(stack.buffer) for stack in stacks])


def _bounds(members: Sequence[_Member], norms: Sequence[Tensor], tasks: Sequence[Tensor]) -> Tensor:
    """What the length of each row is compared with, all in one tensor.

    First come the largest lengths that the step limit allows, less a rounding, then those from which
    the penalty is strong, then the norms of the neurons.
    """
    rounding = less_rounding(tasks[0].dtype)
    factors = []
    rooms = list(norms)
    strong = []
    for place, member in enumerate(members):
        update = member.update
        strong.append(STRONG / math.sqrt(len(norms[place])))
        if update.limit is None:
            factors.append(math.inf)  # of a zero row it makes NaN, which is above no length
        elif isinstance(update.limit, Tensor):
            rooms[place] = rooms[place] * update.limit
            factors.append(update.grad_scale * rounding)
        else:
            factors.append(update.limit * update.grad_scale * rounding)
        if update.task is not None and update.task.allows.counts_in_task:
            rooms[place] = rooms[place] * update.task.norm
            factors[-1] /= math.sqrt(update.size.numel()) * update.grad_scale
    scaled = torch._foreach_mul([*rooms, *tasks], [*factors, *strong])
    allowed, thresholds = scaled[: len(members)], scaled[len(members) :]
    spread = []
    for threshold, room in zip(thresholds, rooms, strict=True):
        spread.append(threshold.expand_as(room))
    return torch.cat([*allowed, *spread, *norms])


def _held_from(members: Sequence[_Member], tasks: Sequence[Tensor]) -> Tensor:
    """The norms (k,) from which the penalty's gradients are those that the share limit allows."""
    norms = []
    shares = []
    for member, task in zip(members, tasks, strict=True):
        limit = member.update.task
        share = None if limit is None else limit.allows.share
        if limit is None or share is None:
            norms.append(task)
            shares.append(math.inf)  # of a zero it makes NaN, which nothing reaches
        else:
            norms.append(limit.norm)
            shares.append(share * less_rounding(task.dtype))
    return torch.stack(torch._foreach_mul(norms, shares))


def less_rounding(dtype: torch.dtype) -> float:
    """A factor that leaves room for the rounding of lengths."""
    return 1.0 - 16 * torch.finfo(dtype).eps
