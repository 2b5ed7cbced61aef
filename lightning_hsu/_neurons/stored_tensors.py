"""What a state dict stores, layer by layer: names, stand-ins, dequantised weights and stacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_hsu._neurons.known_model import Stacks
from lightning_hsu._neurons.packed import Unpacked, split_packed, unpacked, with_quantised_linears
from lightning_hsu._neurons.wrappers import plain_name, without_prefixes

Load = Callable[[str], Tensor]
"""Returns the numbers of one tensor of a state dict by its name."""


class StoredTensors:
    """The tensors of a state dict by layer.

    Args:
        state: Tensors by name.
        load: Returns the numbers of one by its name; None if they are there.
        settings: How its model says that weights are quantised; None if it does not.

    Attributes:
        layers: The tensors by the path of their layer, then by their name within it. Quantised
            weights are dequantised.
        by_rows: Paths and names of the weights whose format fixes that their outputs are rows.
        doubled: Paths that name a layer of another path, too, without what wrappers add to them.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        load: Load | None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._state_load = load
        self._settings = settings
        self._names: dict[tuple[str, str], str] = {}  # in the state dict, by path and leaf
        self._leaves: dict[str, dict[str, Tensor]] = {}  # by path, as they are stored
        self._unpacked: dict[str, Unpacked] = {}
        self._joined: dict[tuple[str, str], list[str]] = {}  # paths of what makes up one stack
        self.by_rows: set[tuple[str, str]] = set()
        self.layers: dict[str, dict[str, Tensor]] = {}
        tensors = _tensors(state)
        for name, short in zip(tensors, without_prefixes(tensors), strict=True):
            path, leaf = _split_name(short)
            if (path, leaf) in self._names:
                raise ValueError(
                    f"{self._names[path, leaf]!r} and {name!r} name the same weight: rename one of them"
                )
            self._leaves.setdefault(path, {})[leaf] = tensors[name]
            self._names[path, leaf] = name
        for path, leaves in self._leaves.items():
            self._unpacked[path] = unpacked(leaves, settings)
            self.layers[path] = self._unpacked[path].tensors
            for leaf in self._unpacked[path].by_rows:
                self.by_rows.add((path, leaf))
        self.doubled = _doubled(self.layers)

    def layer_name(self, path: str) -> str:
        """Name of the layer at a path: without what wrappers add, unless another one has it."""
        return path.lstrip(".") if path in self.doubled else _plain_layer(path)

    def join(self, stacks: Stacks) -> None:
        """Make one stack of layers of one weight each, whose numbers are read when needed."""
        stack_of: dict[str, str] = {}
        joined: dict[str, dict[str, Tensor]] = {}
        for stack, by_leaf in stacks.items():
            joined[stack] = {}
            for leaf, paths in by_leaf.items():
                one = self.layers[paths[0]]["weight"]
                shape = (len(paths), *one.shape)
                joined[stack][leaf] = torch.empty(shape, dtype=one.dtype, device="meta")
                self._joined[stack, leaf] = paths
                stack_of |= dict.fromkeys(paths, stack)
        layers: dict[str, dict[str, Tensor]] = {}
        for path, leaves in self.layers.items():
            if path in stack_of:
                layers[stack_of[path]] = joined[stack_of[path]]
            else:
                layers[path] = leaves
        self.layers.clear()
        self.layers.update(layers)

    def is_lazy(self, path: str, leaf: str) -> bool:
        """Whether a tensor on device meta is a stand-in, whose numbers are read when needed."""
        if self._state_load is not None:
            return True
        paths = self._joined.get((path, leaf), [])
        return bool(paths) and not any(
            self._unpacked[one].tensors["weight"].is_meta for one in paths
        )

    def stand_ins(self, path: str) -> dict[str, Tensor]:
        """The tensors of a layer: all on device meta if the numbers of some stay in a file."""
        leaves = self.layers[path]
        if self._state_load is None or not any(x.is_meta for x in leaves.values()):
            return leaves
        return {leaf: x.to("meta") for leaf, x in leaves.items()}

    def load(self, path: str, key: str = "") -> dict[str, Tensor]:
        """The tensors of a layer, with their numbers.

        Args:
            path: Path of the layer.
            key: The set that is needed of it; other stacks than this set's stay in the file.
        """
        if path not in self._leaves:
            return self._load_stacks(path, key)
        if self._state_load is None:
            return self._unpacked[path].tensors
        loaded = {}
        for leaf, x in self._leaves[path].items():
            loaded[leaf] = self._state_load(self._names[path, leaf]) if x.is_meta else x
        return unpacked(loaded, self._settings).tensors

    def _load_stacks(self, path: str, key: str) -> dict[str, Tensor]:
        """The stacks of a layer, of which a set needs one; all if none is named."""
        loaded = dict(self.layers[path])
        for leaf in self.layers[path]:
            if key and not f"{key}.".startswith(f"{leaf}."):
                continue
            weights = [self.load(one)["weight"] for one in self._joined[path, leaf]]
            loaded[leaf] = torch.stack(weights)
        return loaded

    def _stored_at(self, path: str) -> list[str]:
        """Paths of what is stored of a layer: its own, or those of what makes up its stacks."""
        if path in self._leaves:
            return [path]
        found: list[str] = []
        for leaf in self.layers[path]:
            found += self._joined[path, leaf]
        return found

    def note(self, path: str, key: str) -> str:
        """How one set of a layer was dequantised; "" if it is not quantised."""
        if path in self._unpacked:
            return self._unpacked[path].note
        for leaf in self.layers[path]:
            if f"{key}.".startswith(f"{leaf}."):
                return self._unpacked[self._joined[path, leaf][0]].note
        return ""

    def unreadable(self, path: str) -> list[tuple[str, Tensor, str]]:
        """The quantised weights of a layer that cannot be read: name, tensor and reason."""
        leaves = self._leaves.get(path)
        if leaves is None:  # a stack, which is made of weights that can be read
            return []
        return [(leaf, leaves[leaf], why) for leaf, why in self._unpacked[path].reasons.items()]

    def names(self, path: str) -> tuple[str, ...]:
        """The names that the tensors of a layer have in the state dict."""
        names = []
        for one in self._stored_at(path):
            for leaf in self._leaves[one]:
                names.append(self._names[one, leaf])
        return tuple(names)


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict by name, counts of steps last.

    A file of safetensors has them first, so that norms would come before all that they follow.
    """
    tensors = {}
    counts = {}
    if isinstance(state, Mapping):
        for name, x in with_quantised_linears(state).items():
            if not isinstance(name, str) or not isinstance(x, Tensor):
                continue
            if x.ndim == 0 and not x.is_floating_point():
                counts[name] = x
            else:
                tensors[name] = x
    tensors |= counts
    if not tensors:
        given = type(state).__name__
        if isinstance(state, Mapping):
            given = f"{len(state)} entries, none a tensor"
        raise TypeError(f"a state dict maps names to tensors; got {given}")
    return tensors


def _split_name(name: str) -> tuple[str, str]:
    """The path of a layer and the name within it.

    ``a.parametrizations.weight.original1`` is in the layer ``a``, as is ``a.weight.absmax``.
    """
    packed = split_packed(name)
    if packed is not None:
        return packed
    path, mark, rest = name.rpartition("parametrizations.")
    if mark:
        return path.rstrip("."), mark + rest
    path, _, leaf = name.rpartition(".")
    return path, leaf


def stored_name(path: str, leaf: str) -> str:
    """The name that a tensor has in a state dict, by the path of its layer and its own."""
    return f"{path}.{leaf}".strip(".")


def _plain_layer(path: str) -> str:
    """Name of the layer at a path, without what wrappers add."""
    return plain_name(path.lstrip("."))


def _doubled(paths: Iterable[str]) -> set[str]:
    """The paths from which wrappers' parts cannot be taken: another path is left without them."""
    as_stored = set(paths)
    doubled = set()
    for path in as_stored:
        plain = _plain_layer(path)
        if plain != path and plain in as_stored:
            doubled.add(path)
    return doubled
