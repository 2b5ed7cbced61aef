"""Which layers act last before a loss, as autograd's graph shows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

_MULTIPLICATIONS = ("Addbmm", "Addmm", "Addmv", "Baddbmm", "Bmm", "Dot", "Mm", "Mv")
"""How the names of autograd's nodes begin that multiply two matrices, which may both be weights."""

_PRODUCTS = (
    *_MULTIPLICATIONS,
    "Cdist",
    "CompiledFunction",
    "Convolution",
    "CudnnConvolution",
    "CudnnRnn",
    "Embedding",
    "Euclidean",
    "GroupedMm",
    "Linear",
    "MkldnnRnn",
    "ScaledGroupedMm",
    "SlowConv",
    "Sparse",
    "Thnn",
    "Trilinear",
)
"""How the names of autograd's nodes begin in which weights meet what they act on."""

_SUMS = (
    "AddBackward0",
    "DivBackward0",
    "MulBackward0",
    "NegBackward0",
    "SubBackward0",
    "ToCopyBackward0",
)
"""Names of autograd's nodes that put the terms of a loss together."""

_VIEWS = (
    "Alias",
    "Clamp",
    "Clone",
    "Div",
    "Expand",
    "LinalgVectorNorm",
    "Maximum",
    "Norm",
    "Permute",
    "Reshape",
    "Squeeze",
    "TBackward",
    "ToCopy",
    "Transpose",
    "Unsqueeze",
    "UnsafeView",
    "View",
)
"""How the names of nodes begin through which a table is used as it is, or with rows of length 1."""

_DIVISIONS = ("Chunk", "Index", "Narrow", "Select", "Slice", "Split", "Unbind")
"""How the names of nodes begin that take a part of an output, another part of which goes on."""

_MOST_TERMS = 32
_MOST_NODES = 200  # that compute a weight


def last_before(
    outputs: object,
    layers: Mapping[int, Sequence[str]],
    tables: Mapping[int, Sequence[str]],
    computed: Collection[str] = (),
) -> list[str]:
    """Names of the layers that act last on the way to a loss or to a model's outputs.

    Autograd's graph is followed backwards from each term of the loss, along each path as far as the
    first product in which a layer's weight takes part. A layer that another term passes through on
    its way to other layers is left out: an encoder with a penalty of its own, or a router.

    Args:
        outputs: A loss, or a model's outputs: tensors in tuples, lists, mappings or dataclasses.
        layers: Names of layers by the ids of their parameters.
        tables: The same of embeddings and other matrices, which may be added to inputs or act as
            inputs themselves: they count only where an input is multiplied by them.
        computed: Names of layers whose weights are computed from parameters.

    Returns:
        The names, each once, in the order in which they are met; [] if no graph is recorded, or if
        one node holds all layers, as after torch.compile and for a checkpoint that is reentrant.
    """
    graph = _Graph(layers, tables, computed)
    names: list[dict[str, None]] = []  # of the ends of each term
    passed: list[set[str]] = []  # names of what each term passes through before its ends
    for roots in _terms(outputs):
        ends = graph.ends(roots)
        if ends is None:
            return []
        last, before, of_gradients = graph.last_of(roots, ends)
        if of_gradients:  # a penalty on gradients comes after all layers
            continue
        names.append(last)
        passed.append(before)
    kept: dict[str, None] = {}
    for i, mine in enumerate(names):
        for name in mine:
            is_passed = False
            for j, others in enumerate(names):
                if j != i and name in passed[j] and name not in others:
                    is_passed = True
            if not is_passed:
                kept[name] = None
    if not kept:  # each passes through the others, as in a cycle
        for mine in names:
            kept |= mine
    return list(kept)


def parameters_behind(outputs: object) -> list[Tensor]:
    """The parameters that a loss, or a model's outputs, depend on, as autograd's graph shows."""
    nodes = [x.grad_fn for x in _tensors(outputs) if x.grad_fn is not None]
    seen = set(nodes)
    found = []
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.append(variable)
        nodes += _new_parents(node, seen)
    return found


class _Graph:
    """Autograd's graph, with the names of layers at the products where their weights take part.

    Args:
        layers: See :func:`last_before`.
        tables: See :func:`last_before`.
        computed: See :func:`last_before`.
    """

    def __init__(
        self,
        layers: Mapping[int, Sequence[str]],
        tables: Mapping[int, Sequence[str]],
        computed: Collection[str],
    ) -> None:
        self._layers = layers
        self._tables = tables
        self._computed = set(computed)
        self._known: dict[Any, tuple[list[str], bool]] = {}

    def ends(self, roots: Sequence[Any]) -> dict[Any, list[str]] | None:
        """The products at which paths back from a term meet their first layer, with its names.

        None if one node holds several layers, as after torch.compile.
        """
        last: dict[Any, list[str]] = {}
        waiting = list(roots)
        seen = set(roots)
        while waiting:
            node = waiting.pop()
            names = self._names_at(node)
            if len(names) > 1 and "Compiled" in node.name():
                return None
            if node.name().startswith("CheckpointFunction"):  # what is inside leaves no trace
                return None
            if names:
                last[node] = names
            else:
                waiting += _new_parents(node, seen)
        return last

    def last_of(
        self, roots: Sequence[Any], ends: Mapping[Any, list[str]]
    ) -> tuple[dict[str, None], set[str], bool]:
        """Names of a term's last layers, and of those that it passes through before its ends.

        An end is not last if all paths to it lead through what other ends depend on: all layers
        that add to a residual stream are ends, and only the newest is last. An end whose output is
        divided, into a part of the result and a part that goes on, is last.

        The third value is whether the term depends on gradients.
        """
        of_gradients = False
        before: set[Any] = set()
        divided: set[Any] = set()  # each output of those before: a node with its number
        passed: set[str] = set()
        waiting = list(ends)
        while waiting:
            node = waiting.pop()
            if node in before:
                passed.update(self._names_at(node))
                of_gradients = of_gradients or _is_of_gradients(node)
            divided.update(node.next_functions)
            waiting += _new_parents(node, before)
        last: dict[str, None] = {}
        edges: list[tuple[Any, int]] = [(root, 0) for root in roots]
        seen = set(edges)
        while edges:
            edge = edges.pop()
            node = edge[0]
            if node in ends:
                last |= dict.fromkeys(ends[node])
                continue
            of_gradients = of_gradients or _is_of_gradients(node)
            divides = node.name().startswith(_DIVISIONS)
            for one in node.next_functions:
                if one[0] is None or one in seen or (one in divided and not divides):
                    continue
                seen.add(one)
                edges.append(one)
        return last, passed, of_gradients

    def _names_at(self, node: Any) -> list[str]:
        """Names of the layers whose weights act at a node; [] if it is no product."""
        names, is_of_weights = self._weights_at(node)
        return [] if is_of_weights else names

    def _weights_at(self, node: Any) -> tuple[list[str], bool]:
        """The layers whose weights reach a product, and whether it multiplies weights alone."""
        if not _is_product(node):
            return [], False
        if node not in self._known:
            self._known[node] = [], False  # a graph has no circles, but is deep
            names: dict[str, None] = {}
            weights = 0
            operands = [parent for parent, _ in node.next_functions]
            for i, operand in enumerate(operands):
                found, is_weight = self._weights_of(operand)
                if not found and i == len(operands) - 1 and _multiplies(node):
                    found = self._table_of(operand)
                weights += is_weight and len(found) > 0
                names |= dict.fromkeys(found)
            if not names and self._computed and operands and _multiplies(node):
                names = dict.fromkeys(self._computed_of(operands[-1]))
            self._known[node] = list(names), weights > 1 and _multiplies(node)
        return self._known[node]

    def _weights_of(self, operand: Any) -> tuple[list[str], bool]:
        """The layers whose weights reach an operand without another product between.

        Products of weights alone, such as those of an adapter's factors, do not count as such.

        Returns:
            Their names, and whether no product is behind the operand: then it may be a weight.
        """
        found: dict[str, None] = {}
        if operand is None:
            return [], False
        is_weight = True
        waiting = [operand]
        seen = {operand}
        while waiting:
            inner = waiting.pop()
            if _is_product(inner) and not self._weights_at(inner)[1]:
                is_weight = False
                continue
            variable = getattr(inner, "variable", None)
            if variable is not None:
                found |= dict.fromkeys(self._layers.get(id(variable), ()))
            waiting += _new_parents(inner, seen)
        return list(found), is_weight

    def _computed_of(self, operand: Any) -> list[str]:
        """The layer whose computed weight an operand is, however it is computed; [] if none is."""
        found: set[str] = set()
        if operand is None:
            return []
        waiting = [operand]
        seen = {operand}
        while waiting and len(seen) < _MOST_NODES:
            inner = waiting.pop()
            variable = getattr(inner, "variable", None)
            if variable is not None:
                names = self._layers.get(id(variable), ())
                if len(names) == 0 or not self._computed.issuperset(names):
                    return []
                found.update(names)
            waiting += _new_parents(inner, seen)
        return list(found) if len(found) == 1 and not waiting else []

    def _table_of(self, operand: Any) -> list[str]:
        """The table that an operand is, seen in another shape or with rows of length 1."""
        found: dict[str, None] = {}
        if operand is None:
            return []
        waiting = [operand]
        seen = {operand}
        while waiting:
            inner = waiting.pop()
            variable = getattr(inner, "variable", None)
            if variable is not None:
                found |= dict.fromkeys(self._tables.get(id(variable), ()))
            elif not inner.name().startswith(_VIEWS):
                return []
            waiting += _new_parents(inner, seen)
        return list(found)


def _terms(outputs: object) -> list[list[Any]]:
    """The nodes of autograd's graph at which each term of a loss, or a model's output, begins.

    Very many, such as one for each step of a sequence, are taken as one term.
    """
    terms: list[Any] = []
    numbers: list[Any] = []  # nodes that compute one number
    for x in _tensors(outputs):
        if x.grad_fn is not None:
            (numbers if x.numel() == 1 else terms).append(x.grad_fn)
    seen = {*terms, *numbers}
    while numbers:
        node = numbers.pop()
        stacked = _stacked_by(node)
        if node.name() in _SUMS:  # by entry: what it sums are numbers, too
            numbers += _new_parents(node, seen)
        elif stacked is not None:
            numbers += _new_parents(stacked, seen)
        else:
            terms.append(node)
    if len(terms) > _MOST_TERMS:
        return [terms]
    return [[term] for term in terms]


def _stacked_by(node: Any) -> Any:
    """The node that stacks the numbers that a node sums, or takes the mean of; None if none does."""
    if node.name() not in ("SumBackward0", "MeanBackward0"):
        return None
    parents = [parent for parent, _ in node.next_functions if parent is not None]
    if len(parents) != 1 or parents[0].name() != "StackBackward0":
        return None
    for parent, _ in parents[0].next_functions:
        shapes = getattr(parent, "_input_metadata", ())  # torch 2.5 has it
        if any(math.prod(one.shape) != 1 for one in shapes):
            return None
    return parents[0]


def _new_parents(node: Any, seen: set[Any]) -> list[Any]:
    """The nodes on which a node depends and that were not seen before; now they are."""
    new = []
    for parent, _ in node.next_functions:
        if parent is not None and parent not in seen:
            seen.add(parent)
            new.append(parent)
    return new


def _tensors(value: object) -> Iterable[Tensor]:
    """All tensors within tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name, None))


def _is_product(node: Any) -> bool:
    """Whether a node of autograd's graph may be where a layer's weight meets its inputs."""
    name: str = node.name()
    if name.startswith(_PRODUCTS):
        return True
    if "::" in name or name.endswith(tuple("0123456789")):  # one of autograd's own
        return False
    # A custom function, such as the product with a quantised weight.
    parents = [parent for parent, _ in node.next_functions if parent is not None]
    return len(parents) > 1


def _is_of_gradients(node: Any) -> bool:
    """Whether a node differentiates a derivative."""
    name: str = node.name()
    return name.count("Backward") > 1


def _multiplies(node: Any) -> bool:
    """Whether a node multiplies two matrices."""
    name: str = node.name()
    return name.startswith(_MULTIPLICATIONS)
