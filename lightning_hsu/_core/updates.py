"""The update of each of many layers, and how the gradients of a stack are added to its layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_hsu._core.limits import TaskLimit, share_factors, task_norms
from lightning_hsu._core.precision import working_dtype
from lightning_hsu._core.sphere import row_lengths

Item = TypeVar("Item")


@dataclass(eq=False, slots=True)
class GradientUpdate:
    """One layer's update: ``out += grad_scale * shortened(scale * gradient)``.

    Args:
        entries: The neurons, shape (b, n, d), any strides. Or their entries in the same order in a
            shape of their own, with ``shape``: a contiguous parameter in its own, or (b, n, ...)
            where entries of a neuron lie at several strides.
        out_entries: What to add to, of the shape of ``entries``: a ``.grad``, or a buffer of a
            wider dtype.
        scale: Factor of the gradient of the groups' summed energies.
        limit: Largest length of a row of ``scale * gradient`` over the norm of its neuron, a number
            or a 0-d tensor on the device of the neurons; None for no limit.
        grad_scale: Factor by which ``out`` is already scaled, as under mixed precision.
        shape: The shape (b, n, d) in which ``entries`` are read; None for their own.
        key: What stands for the layer from step to step; None for its place in memory.
        task: What the task's gradient of the layer allows; None for no limit by it.
    """

    entries: Tensor
    out_entries: Tensor
    scale: float
    limit: Tensor | float | None = None
    grad_scale: float = 1.0
    shape: torch.Size | None = None
    key: object = None
    task: TaskLimit | None = None

    @property
    def size(self) -> torch.Size:
        """The shape (b, n, d) of the neurons."""
        return self.entries.shape if self.shape is None else self.shape

    @property
    def is_view(self) -> bool:
        """Whether :attr:`w` and :attr:`out` are views of the tensors, not copies."""
        if self.shape is None:
            return True
        return self.entries.is_contiguous() and self.out_entries.is_contiguous()

    @property
    def w(self) -> Tensor:
        """The neurons (b, n, d), without a graph."""
        if self.shape is None:
            return self.entries
        return self.entries.detach().reshape(self.shape)

    @property
    def out(self) -> Tensor:
        """The tensor (b, n, d) to add to, if it is a view."""
        if self.shape is None:
            return self.out_entries
        return self.out_entries.reshape(self.shape)


def alike(updates: Sequence[GradientUpdate]) -> list[list[GradientUpdate]]:
    """Group the updates that differ only in the contents of their tensors."""
    found: dict[object, list[GradientUpdate]] = {}
    for update in updates:
        w = update.entries
        limit = update.limit
        if isinstance(limit, Tensor):  # two of them cannot be compared without synchronisation
            limit = id(limit)
        task = None if update.task is None else update.task.allows
        how = (update.scale, limit, update.grad_scale, task)
        key = (update.shape, w.shape, w.dtype, w.device, how)
        found.setdefault(key, []).append(update)
    return list(found.values())


def chunks(items: Sequence[Item], count: int) -> list[Sequence[Item]]:
    """Split a sequence into runs of ``count`` or fewer."""
    return [items[start : start + count] for start in range(0, len(items), count)]


def stack_neurons(updates: Sequence[GradientUpdate]) -> Tensor:
    """The neurons of layers of one shape (b, n, d) as one stack, in float32 or wider."""
    first = updates[0]
    if len(updates) == 1:
        return first.w.to(working_dtype(first.entries.dtype))
    b, n, d = first.size
    entries = torch.cat([update.entries for update in updates])
    return entries.reshape(len(updates) * b, n, d).to(working_dtype(entries.dtype))


class Scratch:
    """Memory on the CPU that layers use one after the other.

    Memory that is new from the system is slow to write to for the first time: for a matrix of a
    megabyte that takes longer than dividing it by its rows' norms.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of any content, which the next one of this name overwrites.

        Args:
            name: What it is for.
            shape: Its shape.
            like: A tensor of its device and dtype. On a GPU it is new, since torch keeps memory
                there by itself.
        """
        if like.device.type != "cpu":
            return like.new_empty(shape)
        key = (name, like.dtype)
        count = math.prod(shape)
        kept = self._kept.pop(key, None)
        if kept is None or kept.numel() < count:
            del kept
            kept = like.new_empty(count)
        self._kept[key] = kept
        return kept[:count].view(shape)


@dataclass(eq=False, slots=True)
class StackGradient:
    """The gradients of a stack of k layers of b groups each.

    Args:
        pull: Their rows but for a factor of each, shape (k * b, n, d).
        factor: The factors, shape (k * b, n, 1); None for 1. They are kept apart, since to multiply
            by them is a pass over memory.
        norm: Norms of the neurons, shape (k * b, n, 1).
        may_overflow: Whether squares of the entries of ``pull`` may leave the range of the dtype.
    """

    pull: Tensor
    factor: Tensor | None
    norm: Tensor
    may_overflow: bool = False

    @property
    def grad(self) -> Tensor:
        """The gradients (k * b, n, d)."""
        return self.pull if self.factor is None else self.pull * self.factor

    def divide_by(self, value: Tensor) -> None:
        """Turn gradients of mean energies (k * b,) into those of their logarithms."""
        by = torch.where(value > 0, value, 1.0)[:, None, None].to(self.pull.dtype)
        if self.factor is None:
            self.factor = by.reciprocal().expand_as(self.norm)
        else:
            self.factor = self.factor / by

    def of_layers(self, chosen: Sequence[int], count: int) -> StackGradient:
        """The same of some of its ``count`` layers."""
        if len(chosen) == count:
            return self

        def part(tensor: Tensor) -> Tensor:
            layers = tensor.view(count, -1, *tensor.shape[1:])
            return torch.cat([layers[i] for i in chosen])

        factor = None if self.factor is None else part(self.factor)
        return StackGradient(part(self.pull), factor, part(self.norm), self.may_overflow)


def whole_gradient(grad: Tensor, w: Tensor) -> StackGradient:
    """The gradients (b, n, d) of neurons w of this shape, with nothing known of their size."""
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True, dtype=grad.dtype)
    return StackGradient(grad, None, norm, may_overflow=True)


def add_to_layers(updates: Sequence[GradientUpdate], found: StackGradient) -> None:
    """Add the gradients of a stack to its layers, which differ only in ``w`` and ``out``.

    Args:
        updates: Layers of shape (b, n, d) each.
        found: Their gradients; their pull may be overwritten.
    """
    first = updates[0]
    limits = [update.task for update in updates if update.task is not None]
    tasks = task_norms(limits) / first.grad_scale if limits else None
    room: Tensor | float = torch.finfo(first.entries.dtype).max / 2
    if first.limit is not None:
        allowed = found.norm
        if tasks is not None and limits[0].allows.counts_in_task:
            allowed = allowed * by_group(tasks / math.sqrt(first.size.numel()), allowed)
        room = (allowed * first.limit).clamp_max(room)
    pull = found.pull
    if found.may_overflow:
        length = row_lengths(pull)
    else:
        length = torch.linalg.vector_norm(pull, dim=-1, keepdim=True)
    length.mul_(first.scale)
    if found.factor is not None:
        length.mul_(found.factor).abs_()
    factor = torch.where(length > room, room / length, 1.0)
    share = limits[0].allows.share if limits else None
    if tasks is not None and share is not None:
        lengths = (length * factor).view(len(updates), -1)
        totals = torch.linalg.vector_norm(lengths, dim=1, dtype=torch.float64)
        factor.mul_(by_group(share_factors(totals, tasks, share), factor))
    factor.mul_(first.scale * first.grad_scale)
    if found.factor is not None:
        factor.mul_(found.factor)
    # Multiplied and added in one operation it would be rounded once, where buffers round twice.
    pull.mul_(factor)
    parts = pull.reshape(len(updates), *first.out_entries.shape).unbind()
    torch._foreach_add_([update.out_entries for update in updates], list(parts))


def by_group(by_layer: Tensor, like: Tensor) -> Tensor:
    """Numbers (k,) of k layers for each of their groups (k * b, 1, 1), in the dtype of a tensor."""
    groups = len(like) // len(by_layer)
    return by_layer.to(like.dtype).repeat_interleave(groups)[:, None, None]


def along_the_sphere(x: Tensor, grad: Tensor, rate: Tensor | float) -> Tensor:
    """The change (..., n, d) of a step against a tangent gradient that keeps the norms of the rows.

    Args:
        x: Neurons, shape (..., n, d).
        grad: Weighted gradient, shape (..., n, d).
        rate: The learning rate.
    """
    moved = x - rate * grad
    before = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    after = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    return torch.where(before > 0, moved * (before / after) - x, 0.0)


def shortening(
    grad: Tensor, w: Tensor, scale: Tensor | float, limit: Tensor | float | None, bound: float
) -> Tensor:
    """Factors (..., n, 1) in (0, 1] that keep the rows of ``scale * grad`` within a limit.

    Args:
        grad: Gradient, shape (..., n, d).
        w: Neurons, shape (..., n, d).
        scale: Factor of the gradient.
        limit: Largest length of a row over the norm of its neuron; None for no limit.
        bound: Largest length of a row in any case.
    """
    room: Tensor | float = bound
    if limit is not None:
        room = (torch.linalg.vector_norm(w, dim=-1, keepdim=True) * limit).clamp_max(bound)
    length = row_lengths(grad) * scale
    return torch.where(length > room, room / length, 1.0)
