"""How a weight holds neurons: by rows, by columns, in equal parts, or as a function says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_hsu._neurons.fused import Part
from lightning_hsu._neurons.quantised import plain_values
from lightning_hsu._neurons.rules import Rule, effective_weight

How = Literal["rows", "columns"] | int | Callable[[Tensor], Tensor]
"""Where a weight's neurons are: its rows, its columns, a number of equal parts along the rows, or a
function of the weight to its neurons (..., n, d)."""

Neurons = Mapping[str, How] | None
"""Patterns of weights' names, each with how such weights hold neurons."""

WAYS = "'rows', 'columns', a number of equal parts, or a function of the weight"


@dataclass(frozen=True)
class WeightRule:
    """Reads the neurons of one weight of a module.

    Args:
        attribute: Name of the weight in its module.
        columns: Whether its columns are neurons, not its rows.
        kernels: Whether the weight is (out, in, *kernel), of which a neuron has all but the first
            axis; otherwise the axes before the last two count matrices.
        groups: Groups along the first axis, of a convolution or of matrices one below the other.
        parts: Parts of the rows that are sets of their own; () if it is one set.
        outputs_last: Whether the weight is (*kernel, in, out), of which a neuron has all but the
            last axis.
    """

    attribute: str
    columns: bool = False
    kernels: bool = False
    groups: int = 1
    parts: tuple[Part, ...] = ()
    outputs_last: bool = False

    def __call__(self, module: nn.Module) -> Tensor | dict[str, Tensor]:
        """The neurons (n, d) or (groups, n, d), or those of each part by its key."""
        return self.parted(self.arrange(effective_weight(module, self.attribute)))

    def parted(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """The neurons, or those of each part by its key."""
        if not self.parts:
            return x
        return {part.key: part.take(x) for part in self.parts}

    def arrange(self, weight: Tensor) -> Tensor:
        """The neurons (n, d) or (groups, n, d) of a weight, before it is parted."""
        if self.outputs_last:
            return weight.flatten(0, -2).T
        if not self.kernels:
            x = weight
            if weight.ndim > 3:
                x = weight.flatten(0, -3)
            elif self.groups > 1:
                x = weight.view(self.groups, -1, weight.shape[-1])
            return x.transpose(-2, -1) if self.columns else x
        if self.groups == 1:
            if self.columns:
                return weight.transpose(0, 1).flatten(1)
            return weight.flatten(1)
        x = weight.view(self.groups, -1, *weight.shape[1:])
        if self.columns:
            x = x.transpose(1, 2)
        return x.flatten(2)


@dataclass(frozen=True)
class FunctionRule:
    """Reads the neurons of one weight by a user's function.

    Args:
        attribute: Name of the weight in its module.
        function: Maps the weight to its neurons (..., n, d).
        name: Name of the layer, for errors.
    """

    attribute: str
    function: Callable[[Tensor], Tensor]
    name: str

    def __call__(self, module: nn.Module) -> Tensor:
        """The neurons (n, d) or (groups, n, d)."""
        return apply_function(self.function, effective_weight(module, self.attribute), self.name)


@dataclass(frozen=True)
class PartedRule:
    """Reads the parts of what another rule reads.

    Args:
        whole: The other rule.
        parts: The parts of its rows.
    """

    whole: Rule
    parts: tuple[Part, ...]

    def __call__(self, module: nn.Module) -> dict[str, Tensor]:
        """The neurons of each part by its key."""
        x = self.whole(module)
        assert isinstance(x, Tensor)
        return {part.key: part.take(x) for part in self.parts}


@dataclass(frozen=True)
class Rearranged:
    """Reads what another rule reads in another way.

    Such are an embedding without the row of its padding, which does not train, and the effective
    weight of a layer with an adapter.

    Args:
        whole: The other rule.
        how: The other way.
    """

    whole: Rule
    how: WeightRule | FunctionRule

    def __call__(self, module: nn.Module) -> Tensor | dict[str, Tensor]:
        """The neurons (n, d) or (groups, n, d), or those of each part by its key."""
        weight = self.whole(module)
        assert isinstance(weight, Tensor)
        if isinstance(self.how, FunctionRule):
            return apply_function(self.how.function, weight, self.how.name)
        return self.how.parted(self.how.arrange(weight))


@dataclass(frozen=True)
class CentredRule:
    """Reads what another rule reads, less each neuron's mean, as weight standardisation does.

    Args:
        whole: The other rule.
    """

    whole: Rule

    def __call__(self, module: nn.Module) -> Tensor:
        """The neurons (n, d) or (groups, n, d), up to their lengths."""
        x = self.whole(module)
        assert isinstance(x, Tensor)
        return x - x.mean(-1, keepdim=True)


@dataclass(frozen=True)
class StoredValues:
    """Reads the floating values of a quantised weight, detached.

    Args:
        attribute: Name of the weight in its module.
    """

    attribute: str

    def values(self, module: nn.Module) -> Tensor | None:
        """The values, or None if they cannot be computed."""
        return plain_values(module, self.attribute, getattr(module, self.attribute))

    def __call__(self, module: nn.Module) -> Tensor:
        """The neurons (n, d)."""
        x = self.values(module)
        assert x is not None
        return x.flatten(1)


@dataclass(frozen=True)
class EqualPart:
    """One of several equal parts along the rows of neurons (..., n, d).

    Args:
        index: Its number.
        count: How many parts there are.
    """

    index: int
    count: int

    def __call__(self, x: Tensor) -> Tensor:
        """Its rows (..., n / count, d), a view."""
        size = x.shape[-2] // self.count
        return x.narrow(-2, self.index * size, size)


def equal_parts(count: int) -> tuple[Part, ...]:
    """Equal parts along the rows, whose keys are their numbers."""
    return tuple(Part(str(i), EqualPart(i, count)) for i in range(count))


def check_neurons(neurons: object) -> dict[str, How]:
    """The user's patterns, checked.

    Raises:
        TypeError: if it is no mapping of patterns to ways of holding neurons.
        ValueError: for an unknown word or a number of parts below 1.
    """
    if neurons is None:
        return {}
    if not isinstance(neurons, Mapping):
        raise TypeError(
            f"neurons maps patterns of names to {WAYS}, such as {{'decoder': 'columns'}}; "
            f"got {neurons!r}"
        )
    for pattern, how in neurons.items():
        if not isinstance(pattern, str):
            raise TypeError(f"neurons maps patterns of names to {WAYS}; {pattern!r} is no pattern")
        _check_how(pattern, how)
    return dict(neurons)


def _check_how(pattern: str, how: object) -> None:
    """Refuse what is not a way of holding neurons."""
    if isinstance(how, str) and how not in ("rows", "columns"):
        raise ValueError(f"neurons[{pattern!r}] must be {WAYS}; got {how!r}")
    if isinstance(how, bool) or not (isinstance(how, (str, int)) or callable(how)):
        raise TypeError(f"neurons[{pattern!r}] must be {WAYS}; got {how!r}")
    if isinstance(how, int) and how < 1:
        raise ValueError(f"neurons[{pattern!r}] must be at least 1 part; got {how}")


def rule_for(
    how: How,
    attribute: str,
    weight: Tensor,
    name: str,
    *,
    kernels: bool = False,
    groups: int = 1,
    transposed: bool = False,
) -> WeightRule | FunctionRule:
    """The rule that reads a weight as the user says.

    Args:
        how: What the user says.
        attribute: Name of the weight in its module.
        weight: The weight.
        name: Name of the layer, for errors.
        kernels: See :class:`WeightRule`.
        groups: See :class:`WeightRule`.
        transposed: Whether the weight is (in, out, *kernel), so that its rows are along the second
            axis.

    Raises:
        ValueError: if the weight has one axis, or the parts do not divide the rows.
    """
    shape = tuple(weight.shape)
    if weight.ndim < 2:
        raise ValueError(
            f"neurons={{'{name}': {how!r}}}: layer '{name}' {shape} has one axis; neurons are the "
            "rows or columns of a matrix"
        )
    by_row = WeightRule(attribute, columns=transposed, kernels=kernels, groups=groups)
    if how == "rows":
        return by_row
    if how == "columns":
        return replace(by_row, columns=not transposed)
    if isinstance(how, int):
        rows = by_row.arrange(weight).shape[-2]
        if rows % how or how > max(1, rows):
            raise ValueError(
                f"neurons={{'{name}': {how}}}: the {rows} rows of layer '{name}' {shape} do not "
                f"divide into {how} equal parts"
            )
        return by_row if how == 1 else replace(by_row, parts=equal_parts(how))
    assert callable(how)
    return FunctionRule(attribute, how, name)


def apply_function(function: Callable[[Tensor], Tensor], weight: Tensor, name: str) -> Tensor:
    """The neurons (n, d) or (groups, n, d) that a user's function finds in a weight."""
    shape = tuple(weight.shape)
    try:
        x: object = function(weight)
    except Exception as error:
        raise ValueError(
            f"the function in neurons= for layer '{name}' {shape} failed: {error}"
        ) from error
    if not isinstance(x, Tensor):
        raise TypeError(
            f"the function in neurons= for layer '{name}' {shape} gave {type(x).__name__}; it must "
            "give a tensor (..., n, d)"
        )
    if x.layout != torch.strided or (x.is_meta and not weight.is_meta):
        kind = "no numbers (device meta)" if x.is_meta else f"a tensor of layout {x.layout}"
        raise ValueError(
            f"the function in neurons= for layer '{name}' {shape} gave {kind}; it must give a dense "
            "tensor (..., n, d)"
        )
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(
            f"the function in neurons= for layer '{name}' {shape} gave shape {tuple(x.shape)}; it "
            "must give neurons (..., n, d)"
        )
    if weight.requires_grad and torch.is_grad_enabled() and not x.requires_grad:
        raise ValueError(
            f"the function in neurons= for layer '{name}' {shape} gave detached neurons: no "
            "gradient would reach the weight; drop .detach() or .data"
        )
    return x.flatten(0, -3) if x.ndim > 3 else x
