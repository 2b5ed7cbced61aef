"""How the weights of a state dict are read, as the names and shapes of all its tensors show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_hsu._neurons.hints import Hint, Layers
from lightning_hsu._neurons.how import WeightRule
from lightning_hsu._neurons.kernels import Kernels
from lightning_hsu._neurons.orientation import Orientation
from lightning_hsu._neurons.shapes import Shape, Shapes
from lightning_hsu._neurons.stacks import Stacks
from lightning_hsu._neurons.stored_names import StoredNames
from lightning_hsu._neurons.stored_parts import StoredParts


class Neighbours:
    """Tells how a weight is read by its name, its shape and what stands beside it.

    Args:
        layers: All tensors of the state dict by layer. Their numbers are not looked at.

    Example:
        >>> import torch
        >>> layers = {
        ...     "h.0.attn.c_attn": {"weight": torch.empty(8, 24), "bias": torch.empty(24)},
        ...     "h.0.attn.c_proj": {"weight": torch.empty(8, 8), "bias": torch.empty(8)},
        ... }
        >>> hint = Neighbours(layers).of_weight("h.0.attn.c_proj", "weight", (8, 8))
        >>> hint.rule.columns
        True
        >>> hint.note.partition(";")[0]
        'read by columns, as its neighbours show'
    """

    def __init__(self, layers: Layers) -> None:
        shapes = Shapes(layers)
        self._shapes = shapes
        self._names = StoredNames(shapes)
        self._orientation = Orientation(shapes)
        self._parts = StoredParts(shapes)
        self._stacks = Stacks(shapes)
        self._kernels = Kernels(shapes)

    def of_weight(self, path: str, leaf: str, shape: Sequence[int]) -> Hint | None:
        """What is known of one weight; see :class:`~lightning_hsu._neurons.hints.Hints`."""
        sizes = tuple(shape)
        if len(sizes) < 2 or 0 in sizes:
            return None
        named = self._names.hint(path, leaf, sizes)
        if named is not None and (named.why_not or named.rule is not None or named.kind):
            return named
        if len(sizes) > 2:
            found = self._of_many_axes(path, leaf, sizes)
        else:
            found = self._stacks.packed(path, leaf, sizes) or self._of_matrix(path, leaf, sizes)
        if named is None or found is None:
            return found or named
        notes = "; ".join(one for one in (named.note, found.note) if one)
        return replace(found, note=notes)

    def _of_many_axes(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """Stacks of matrices, with the parts of their rows, or kernels."""
        stack = self._stacks.hint(path, leaf, shape)
        if stack is None:
            return self._kernels.hint(path, leaf, shape)
        if stack.rule is None:
            return stack
        divided = self._parts.divided(path, leaf, shape, stack.rule, "other", stack.note)
        return divided or stack

    def _of_matrix(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """Matrices, with the parts of their rows."""
        hint = self._orientation.hint(path, leaf, shape)
        if leaf not in ("weight", "kernel"):
            return hint
        rule = WeightRule(leaf, columns=self._has_columns(path, leaf, shape))
        note = ""
        if hint is not None and hint.rule is not None:
            rule = hint.rule
            note = hint.note
        return self._parts.divided(path, leaf, shape, rule, "linear", note) or hint

    def _has_columns(self, path: str, leaf: str, shape: Shape) -> bool:
        """Whether a matrix's own bias shows that its neurons are its columns."""
        bias = self._shapes.vector(path)
        return bias is not None and bias != shape[0] and bias == shape[1]
