"""What one layer gets from a pass over many."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class GradientUpdate:
    """What one layer gets: ``out += grad_scale * shortened(scale * gradient)``.

    Args:
        w: Neurons, shape (b, n, d), any strides, without a graph.
        out: Where to add, shape (b, n, d), any strides; of the dtype of ``w``.
        scale: What the gradient of the groups' summed energies is multiplied by.
        limit: Largest length of a row of ``scale * gradient`` over that of its neuron; None is no limit.
        grad_scale: What the rest of ``out`` still carries.
    """

    w: Tensor
    out: Tensor
    scale: float
    limit: float | None = None
    grad_scale: float = 1.0

    def overlaps(self, other: GradientUpdate) -> bool:
        """Whether another one may add to the same entries, by the first and the last of each in memory."""
        if (
            other is self
            or self.out.untyped_storage().data_ptr() != other.out.untyped_storage().data_ptr()
        ):
            return False
        (start, stop), (begin, end) = (_extent(one.out) for one in (self, other))
        return start < end and begin < stop


def _extent(x: Tensor) -> tuple[int, int]:
    """Where a tensor begins and ends within its storage, in entries."""
    start = int(x.storage_offset())
    return start, start + 1 + sum(
        (size - 1) * int(stride) for size, stride in zip(x.shape, x.stride(), strict=True)
    )
