"""What is known of how a stored weight holds its neurons, beyond its own name and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_hsu._neurons.candidates import Kind
from lightning_hsu._neurons.how import WeightRule

Layers = Mapping[str, Mapping[str, Tensor]]
"""The tensors of a state dict by the path of their layer, then by their name within it.

They may be stand-ins on device meta: shapes and dtypes count, numbers do not.
"""


@dataclass(frozen=True)
class Hint:
    """How one weight of a state dict is read.

    Args:
        rule: Where its neurons are; None reads it as its name and shape say.
        kind: The kind of layer; None for what its name and shape say.
        note: What a user should know of this reading, such as which other there is; "" for nothing.
        why_not: Why the weight holds no neurons and is left out; "" if it holds some.
    """

    rule: WeightRule | None = None
    kind: Kind | None = None
    note: str = ""
    why_not: str = ""


class Hints(Protocol):
    """Tells how weights are read, from one source of knowledge."""

    def of_weight(self, path: str, leaf: str, shape: Sequence[int]) -> Hint | None:
        """What is known of one weight; None if nothing is.

        Args:
            path: Path of its layer, without the prefixes of wrappers around the whole model.
            leaf: Name of the effective weight within the layer.
            shape: Its shape.
        """
