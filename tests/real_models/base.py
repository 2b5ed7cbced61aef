"""What a test of a real model needs to know: how to build it, and what an expert would measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

Read = tuple[str, Callable[[Tensor], Tensor]]
"""A parameter's name, and its neurons (n, d) or (groups, n, d) as an expert would write them."""


@dataclass(frozen=True)
class RealModel:
    """A model that nobody here wrote, small, with random weights.

    Args:
        name: Library and model, such as "transformers: GPT-2".
        imports: Modules that must be there, such as ("transformers",).
        build: Makes the model, small enough for a test.
        loss: Runs one training forward and returns the scalar loss. It reaches every head.
        heads: Names of the layers that give the model's output, where they are known only after
            ``loss`` has run once.
        shapes: (groups, neurons, dimension) of some layers by name: at least the first of each
            kind that is not a plain Linear or convolution by rows.
        reads: Three layers, by name: which parameter holds their neurons, and where.
        rest: Patterns of parameters that hold no neurons, by a word that their reason contains,
            such as {"embed_tokens.weight": "embedding", "*.relative_position_bias_table": "table"}.
        declared: Whether the model itself says what its head is, so that it is known before.
    """

    name: str
    imports: tuple[str, ...]
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    heads: tuple[str, ...]
    shapes: Mapping[str, tuple[int, int, int]]
    reads: Mapping[str, Read]
    rest: Mapping[str, str] = field(default_factory=dict)
    declared: bool = False
