"""Named sets of neurons, from any source: ``select`` chooses among them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from torch import Tensor

Kind = Literal["linear", "convolution", "embedding", "codebook", "other"]


@dataclass(frozen=True)
class Skip:
    """A weight that is not measured, with the reason.

    Args:
        name: Name of the layer.
        shape: Shape of its neurons, or of the weight if it has none; () if that is not known.
        reason: Why, in words for the user.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, eq=False, kw_only=True)
class NeuronSet(ABC):
    """One named set of neurons.

    Args:
        name: Name of the layer, followed by a dot and the set's key if a layer has several sets.
        layer: Name of the layer.
        shape: (groups, n, d).
        kind: The kind of layer: embeddings are not measured by default.
        identity: Equal for two names of the same weights.
        head: Whether this is a head, a layer that gives the model's output.
        head_reason: Why it is taken for a head; "" if it is none.
        asked: Whether the user has named it in ``neurons=``.
        trains: Whether it trains as the model was found: not in a copy, and not frozen.
        in_copy: Whether it is in a copy of a model whose weights are averages.
        in_buffer: Whether it is in a buffer, which something else than gradients moves.
        kernel: How many places the kernel of a convolution has; 1 for other layers.
        merged: Whether groups of one neuron each are taken as one group.
        note: What a user should know of how it is read; "" if there is nothing.
    """

    name: str
    layer: str
    shape: tuple[int, int, int]
    kind: Kind
    identity: Hashable = field(repr=False)
    head: bool = False
    head_reason: str = ""
    asked: bool = False
    trains: bool = True
    in_copy: bool = False
    in_buffer: bool = False
    kernel: int = 1
    merged: bool = False
    note: str = ""

    @abstractmethod
    def neurons(self) -> Tensor:
        """The effective neurons (groups, n, d) as they are now."""

    def by_group(self, x: Tensor) -> Tensor:
        """Neurons (n, d) or (groups, n, d) as (groups, n, d), in one group if they are merged."""
        if self.merged:
            return x.transpose(0, 1)
        if x.ndim == 2:
            return x.unsqueeze(0)
        return x


AnySet = TypeVar("AnySet", bound=NeuronSet)


@dataclass(frozen=True)
class Broken:
    """A layer that cannot be read because of what the user said about it.

    Args:
        name: Name of the layer.
        error: What is raised if the layer is to be measured.
    """

    name: str
    error: Exception


@dataclass(frozen=True)
class Candidates(Generic[AnySet]):
    """All sets of neurons of a model or a state dict, in its order.

    Args:
        source: Where they come from: the class of the model, or "StateDict".
        sets: The sets.
        skips: Weights whose neurons are not known or cannot be measured.
        not_weights: Tensors of a state dict that are not taken for weights.
        broken: Layers that cannot be read because of what the user said.
        declared: Names of the sets that the model declares to be its heads.
        declaring: Where names within the modules begin that declare them.
        unmet: Patterns of ``neurons=`` that no weight has met.
        notes: What a user should know of how a whole state dict is read.
    """

    source: str
    sets: list[AnySet]
    skips: list[Skip]
    not_weights: list[Skip] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    declaring: list[str] = field(default_factory=list)
    unmet: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def shape_by_group(x: Tensor) -> tuple[int, int, int]:
    """The shape (groups, n, d) of neurons (n, d) or (groups, n, d)."""
    if x.ndim == 2:
        n, d = x.shape
        return 1, n, d
    groups, n, d = x.shape
    return groups, n, d


def full_name(layer: str, key: str) -> str:
    """Name of a set of neurons: "weight" if neither the layer nor the set has one."""
    return f"{layer}.{key}".strip(".") or "weight"
