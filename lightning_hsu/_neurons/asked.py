"""What the user says in ``neurons=``: which pattern a weight meets, and the rule that follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_hsu._neurons.candidates import full_name
from lightning_hsu._neurons.how import How, Rearranged, rule_for
from lightning_hsu._neurons.patterns import hidden_pattern, matches, unknown_pattern
from lightning_hsu._neurons.rules import Rule, class_rule
from lightning_hsu._neurons.weights import CONVOLUTIONS, EMBEDDINGS, key_of

_READ_BY_ROWS = (*EMBEDDINGS, *CONVOLUTIONS, nn.Bilinear)  # "rows" is how they are read anyway


class Asked:
    """The user's patterns, and which of them have met a weight.

    Args:
        patterns: Patterns of weights' names, each with how such weights hold neurons.
    """

    def __init__(self, patterns: Mapping[str, How]) -> None:
        self._patterns = patterns
        self._used: set[str] = set()  # patterns that matched a weight
        self._deciding: set[str] = set()  # those that did so first
        self._weights: dict[str, None] = {}  # names of all weights, for errors

    def of_weight(self, layer: str, attribute: str, *, only_exact: bool = False) -> How | None:
        """What the user says of a weight; the first pattern that matches counts.

        Args:
            layer: Name of the layer.
            attribute: Name of the weight in it; a weight of two or more axes.
            only_exact: Whether only its whole name asks for it, no pattern: an adapter's factor.
        """
        name = full_name(layer, key_of(attribute))
        exact = full_name(layer, attribute)
        self._weights[name] = None
        found: How | None = None
        for pattern, how in self._patterns.items():
            is_named = any(matches(one, [pattern], below=False) for one in (name, exact))
            is_below = matches(name, [pattern]) and "bias" not in attribute
            if only_exact:
                is_named = pattern in (name, exact)
                is_below = False
            if is_named or is_below:
                self._used.add(pattern)
                if found is None:
                    found = how
                    self._deciding.add(pattern)
        return found

    def of_buffer(self, name: str) -> How | None:
        """What the user says of a buffer, which only its whole name asks for, no pattern."""
        if name not in self._patterns:
            return None
        self._used.add(name)
        self._deciding.add(name)
        return self._patterns[name]

    def unmet(self) -> list[str]:
        """Patterns that no weight has met."""
        return [pattern for pattern in self._patterns if pattern not in self._used]

    def check(self) -> None:
        """Refuse patterns that no weight has met, or none as the first.

        Raises:
            ValueError: if there is such a pattern.
        """
        for pattern in self._patterns:
            if pattern not in self._used:
                known = list(self._weights)
                raise ValueError(unknown_pattern("neurons", pattern, known, "weight"))
            if pattern not in self._deciding:
                raise ValueError(hidden_pattern("neurons", pattern))


def askable_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of a module that may hold neurons: matrices, except masks of pruning."""
    for attribute, x in module.named_buffers(recurse=False):
        is_mask = attribute.endswith("_mask") and f"{attribute[:-5]}_orig" in module._parameters
        if x.ndim >= 2 and x.is_floating_point() and not is_mask:
            yield attribute, x


def is_read_so_anyway(how: How, module: nn.Module, attribute: str) -> bool:
    """Whether the user asks for what one of torch's layers does without being asked."""
    return attribute == "weight" and how == "rows" and isinstance(module, _READ_BY_ROWS)


def asked_rule(
    how: How, module: nn.Module, attribute: str, shape: tuple[int, ...], name: str
) -> Rule:
    """The rule that reads a weight as the user says.

    Args:
        how: What the user says.
        module: The module that holds the weight.
        attribute: Name of the weight in its module.
        shape: Shape of the weight.
        name: Name of the layer, for errors.

    Raises:
        ValueError: if the weight has one axis, or the parts do not divide the rows.
    """
    is_weight = attribute == "weight"
    kernels = is_weight and isinstance(module, CONVOLUTIONS)
    groups = 1
    if kernels:
        assert isinstance(module.groups, int)
        groups = module.groups
    padded = is_weight and getattr(module, "padding_idx", None) is not None
    if padded:
        shape = (shape[0] - 1, *shape[1:])
    rule = rule_for(
        how,
        attribute,
        torch.empty(shape, device="meta"),
        name,
        kernels=kernels,
        groups=groups,
        transposed=kernels and isinstance(module, nn.modules.conv._ConvTransposeNd),
    )
    if padded and isinstance(module, EMBEDDINGS):
        return Rearranged(class_rule, rule)
    return rule
