"""The sets of neurons of a state dict without its model, by names, shapes and biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hsu._neurons import names
from lightning_hsu._neurons.asked import Asked
from lightning_hsu._neurons.candidates import (
    Broken,
    Candidates,
    Kind,
    NeuronSet,
    Skip,
    full_name,
    shape_by_group,
)
from lightning_hsu._neurons.encoders import Encoders
from lightning_hsu._neurons.hints import Hint, Hints, Layers
from lightning_hsu._neurons.how import (
    How,
    Neurons,
    WeightRule,
    apply_function,
    check_neurons,
    rule_for,
)
from lightning_hsu._neurons.known_model import KnownModel, Stacks, known_model
from lightning_hsu._neurons.model_types import unknown_type
from lightning_hsu._neurons.neighbours import Neighbours
from lightning_hsu._neurons.packed import (
    Unpacked,
    quantization_settings,
    split_packed,
    unpacked,
    with_quantised_linears,
)
from lightning_hsu._neurons.patterns import (
    Patterns,
    as_list,
    matches,
)
from lightning_hsu._neurons.rules import GRU_GATES, LSTM_GATES, PROJECTIONS
from lightning_hsu._neurons.stored import effective_weights
from lightning_hsu._neurons.weights import key_of
from lightning_hsu._neurons.wrappers import plain_name, without_prefixes

_WEIGHT_NAMES = ("weight", "kernel", "embedding")  # one is in the last part of a weight's name
_TABLE_NAMES = ("embed", "wte", "wpe")  # one is in the name of a look-up table
_GATES = {len(LSTM_GATES): LSTM_GATES, len(GRU_GATES): GRU_GATES}  # by their number


Load = Callable[[str], Tensor]
"""Returns the numbers of one tensor of a state dict by its name."""


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredNeurons(NeuronSet):
    """One set of neurons of a state dict.

    Args:
        read: Returns the neurons, (n, d) or (groups, n, d). Where numbers stay in a file until
            they are needed, it reads them.
    """

    read: Callable[[], Tensor] = field(repr=False)

    def neurons(self) -> Tensor:
        """The neurons (groups, n, d)."""
        return self.by_group(self.read())


@dataclass(frozen=True)
class _Read:
    """The neurons of one set, as they are read from a layer's tensors.

    Args:
        x: The neurons, (n, d) or (groups, n, d), of any number of axes above 2 if they are not
            asked for.
        kind: The kind of layer.
        asked: Whether the user has named their weight in ``neurons=``.
        note: What a user should know of how they are read.
        whole: The table of which they are all rows but that of the padding.
    """

    x: Tensor
    kind: Kind
    asked: bool = False
    note: str = ""
    whole: Tensor | None = None

    def flat(self) -> Tensor:
        """The neurons, (n, d) or (groups, n, d)."""
        x = self.x.detach()
        return x.flatten(1) if x.ndim > 3 else x


def neurons_of_state_dict(
    state: Mapping[str, Tensor],
    asked: Patterns = None,
    neurons: Neurons = None,
    *,
    load: Load | None = None,
    config: Mapping[str, Any] | None = None,
) -> Candidates[StoredNeurons]:
    """Find every set of neurons of a state dict.

    A matrix named ``weight`` is a Linear, or an Embedding if its name says so. Other weights are
    flattened to one neuron for each output channel. Weights of attention and recurrent layers are
    split into their parts. For weight norm, spectral norm and pruning the effective weights are
    taken, for spectral norm up to a factor. Quantised weights are dequantised where what is stored
    suffices, and left out with the reason where it does not. If a weight's bias has the length of its second axis,
    that axis holds the neurons (transposed convolutions, the Conv1D of GPT-2). Without a bias, or
    if both axes have the same length, what stands beside the weight tells, as it does of groups,
    stacks of matrices, fused projections, dictionaries and codebooks: see
    :class:`~lightning_hsu._neurons.neighbours.Neighbours`. Where nothing tells, the first axis
    holds the neurons, and a note says so if there is reason to doubt it.

    Args:
        state: Tensors by name.
        asked: Patterns of names to take even if they are not named like a weight.
        neurons: Patterns of weights' names, each with how such weights hold neurons: "rows",
            "columns", a number of equal parts along the rows, or a function of the weight, as the
            layer uses it, to its neurons (..., n, d). They take what lies below a name too, except
            biases. A weight of three or more axes is a stack of matrices (..., n, d), but if it is
            named ``weight`` it is a convolution's, (out, in, *kernel): its rows are its outputs,
            flattened, and its columns its inputs.
        load: Returns the numbers of a tensor by its name in ``state``, which then holds stand-ins
            on device meta for those that stay in a file until they are needed. None if ``state``
            holds the numbers.
        config: What is stored beside the weights of the model that they belong to, as in a
            config.json: ``model_type`` tells how its weights hold neurons and which are heads,
            ``quantization_config`` how they are quantised.

    Returns:
        The sets; those that ``neurons`` names are marked as asked for. Parts are named after their
        layer and their number. A weight that does not have the parts or the shape that ``neurons``
        says is broken: :func:`~lightning_hsu._neurons.select.select` raises its error unless it is
        excluded.

    Raises:
        TypeError: if the mapping holds no tensors by name, ``asked`` is not made of patterns, or
            ``neurons`` not of patterns and ways of holding neurons.
        ValueError: for an unknown way of holding neurons, or a pattern of ``neurons`` that matches
            no weight.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Linear(16, 10))
        >>> found = neurons_of_state_dict(model.state_dict())
        >>> [(one.name, one.shape, one.kind) for one in found.sets]
        [('0', (1, 16, 9), 'convolution'), ('1', (1, 10, 16), 'linear')]
        >>> found = neurons_of_state_dict({"W_dec": torch.randn(8, 64)}, neurons={"W_dec": "columns"})
        >>> [(one.name, one.shape) for one in found.sets]
        [('W_dec', (1, 64, 8))]
    """
    patterns = as_list("include", asked) or []
    wanted = Asked(check_neurons(neurons))
    stored = _Stored(state, load, quantization_settings(config))
    known = known_model(config, stored.layers, stored.by_rows)
    if known is not None:
        stored.join(known.stacks)
    reader = _Reader(stored, patterns, wanted, _hints_of(stored.layers, known))
    found = Candidates[StoredNeurons]("StateDict", [], [])
    not_known = unknown_type(config)
    if not_known:
        found.notes.append(not_known)
    sets: dict[str, dict[str, _Read]] = {}
    for path in stored.layers:
        sets_of_layer = reader.sets(path, stored.stand_ins(path), found)
        if sets_of_layer:
            sets[path] = sets_of_layer
    wanted.check()
    paths = list(sets)
    if known is not None:
        paths = known.in_order(paths)
    for path in _in_tree_order(paths):
        reader.add(path, sets[path], found)
    if known is not None:
        _add_heads(known, reader, found)
    elif not _are_rows_shown(stored.layers):
        undecided = [one.name for one in found.sets if _is_undecided(one)]
        if undecided:
            count = len(undecided)
            matrices = "a square matrix" if count == 1 else f"{count:,} square matrices"
            found.notes.append(
                f"{matrices} read by rows, as torch's Linear is, for nothing beside tells; by "
                f"columns: neurons={{'{undecided[0]}': 'columns'}}"
            )
    return found


def _are_rows_shown(layers: Layers) -> bool:
    """Whether a bias of one layer, at least, shows that its matrix has a row for each output."""
    for leaves in layers.values():
        weight, bias = leaves.get("weight"), leaves.get("bias")
        if weight is None or bias is None or weight.ndim != 2:
            continue
        rows, columns = weight.shape
        if rows != columns and bias.shape == (rows,):
            return True
    return False


def _is_undecided(one: NeuronSet) -> bool:
    """Whether a set may as well be read by its other axis, and nothing is said of that yet."""
    is_matrix = one.kind == "linear" and one.name == one.layer  # no part of one
    groups, n, d = one.shape
    is_told = one.asked or bool(one.note)
    return is_matrix and groups == 1 and n == d and not is_told


def _hints_of(layers: Layers, known: KnownModel | None) -> list[Hints]:
    """What tells how weights are read, the surest first.

    Args:
        layers: All tensors by layer.
        known: What the config of their model tells; None if it names no known type.
    """
    hints: list[Hints] = []
    if known is not None:
        hints.append(known)
    hints.append(Neighbours(layers))
    return hints


def _add_heads(known: KnownModel, reader: _Reader, found: Candidates[StoredNeurons]) -> None:
    """Note which layers are heads, add one that is tied, and name tables that are not stored."""
    for path in known.not_stored():
        found.not_weights.append(Skip(path, (), "computed by the model, not stored in its file"))
    tied = known.tied()
    if tied is not None:
        reader.add_tied(*tied, found)
    layers = [one.layer for one in found.sets]
    heads = known.heads(layers)
    for one in found.sets:
        if one.layer in heads:
            found.declared.append(one.name)
    if heads:
        found.declaring.append("")


class _Stored:
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
    """The tensors of a state dict by name."""
    tensors = {}
    if isinstance(state, Mapping):
        for name, x in with_quantised_linears(state).items():
            if isinstance(name, str) and isinstance(x, Tensor):
                tensors[name] = x
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


def _in_tree_order(paths: Iterable[str]) -> list[str]:
    """Paths in a model's order: a layer before those inside it, otherwise as first seen."""
    first_seen: dict[tuple[str, ...], int] = {}
    positions: dict[str, list[int]] = {}
    for path in paths:
        parts = tuple(path.split(".")) if path else ()
        position = []
        for depth in range(1, len(parts) + 1):
            position.append(first_seen.setdefault(parts[:depth], len(first_seen)))
        positions[path] = position
    return sorted(positions, key=positions.__getitem__)


class _Reader:
    """Reads the sets of neurons of layers.

    Args:
        stored: The state dict.
        patterns: Patterns of names to take even if they are not named like a weight.
        wanted: What the user says of how weights hold neurons.
        hints: What else tells it, the surest first.
    """

    def __init__(
        self, stored: _Stored, patterns: Sequence[str], wanted: Asked, hints: Sequence[Hints]
    ) -> None:
        self._stored = stored
        self._patterns = patterns
        self._wanted = wanted
        self._hints = hints
        self._encoders = Encoders(stored.layers)

    def sets(
        self, path: str, leaves: Mapping[str, Tensor], found: Candidates[StoredNeurons]
    ) -> dict[str, _Read]:
        """The sets of neurons of a layer by key.

        Args:
            path: Path of the layer.
            leaves: Its tensors by name.
            found: Takes what is left out or broken.
        """
        layer = self._stored.layer_name(path)
        if self._is_for_a_function(path, layer, leaves):
            leaves = self._stored.load(path)
        readable = {}
        reasons = {}
        for leaf, x in leaves.items():
            if x.is_meta and not self._stored.is_lazy(path, leaf):
                reasons[leaf] = "it holds no numbers (device meta)"
            elif x.layout != torch.strided:
                reasons[leaf] = f"it is sparse ({x.layout}): store its to_dense()"
            else:
                readable[leaf] = x
        effective, unknown = effective_weights(readable)
        reasons |= unknown
        left = [(leaf, x, reasons[leaf]) for leaf, x in leaves.items() if leaf in reasons]
        for leaf, x, reason in left + self._stored.unreadable(path):
            if x.ndim > 1:
                self._wanted.of_weight(layer, _attribute_of(leaf))  # it is known, if not readable
                skip = Skip(_stored_name(path, leaf), tuple(x.shape), reason)
                found.not_weights.append(skip)

        named: dict[str, _Read] = {}
        others: dict[str, _Read] = {}
        unhinted: dict[str, Tensor] = {}  # read as their names and shapes say
        hints: dict[str, Hint] = {}
        for leaf, x in effective.items():
            if x.ndim < 2:
                continue
            how = self._wanted.of_weight(layer, leaf)
            name = _stored_name(path, leaf)
            hint = self._hint(path, leaf, x)
            if hint is not None:
                hints[key_of(leaf)] = hint
            rule = names.rule_by_name(nn.Module(), leaf, x)
            if how is not None:
                named |= self._sets_as_asked(path, leaf, how, effective, found)
            elif hint is not None and hint.why_not:
                found.not_weights.append(Skip(name, tuple(x.shape), hint.why_not))
            elif hint is not None and hint.rule is not None:
                others |= _sets_as_hinted(leaf, x, hint)
            elif _has_one_of(leaf, _WEIGHT_NAMES) or matches(name, self._patterns):
                unhinted |= _sets_of_weight(leaf, x, effective)
            elif rule is not None:
                unhinted[leaf] = rule.arrange(x)
            else:
                reason = f"not named like a weight, measured only when asked for: include='{name}'"
                found.not_weights.append(Skip(name, tuple(x.shape), reason))
        kind = _kind_of(path, unhinted, leaves)
        note = ""
        if kind == "linear" and names.sounds_like_dictionary(path):
            outputs, inputs = effective["weight"].shape
            mirrored = self._encoders.are_mirrored_by(path, outputs, inputs)
            note = names.dictionary_note(layer, mirrored=mirrored)
            if mirrored:
                unhinted[""] = unhinted[""].T
        for key, x in unhinted.items():
            hint = hints.get(key)
            if hint is None:
                others[key] = _Read(x, kind, note=note)
            else:
                others[key] = _Read(x, hint.kind or kind, note=hint.note or note)
        return named | others

    def _is_for_a_function(self, path: str, layer: str, leaves: Mapping[str, Tensor]) -> bool:
        """Whether a user's function takes a tensor whose numbers are not there yet."""
        for leaf, x in leaves.items():
            if x.is_meta and callable(self._wanted.of_weight(layer, _attribute_of(leaf))):
                return self._stored.is_lazy(path, leaf)
        return False

    def _hint(self, path: str, leaf: str, x: Tensor) -> Hint | None:
        """What the surest source that knows of a weight says of it."""
        for source in self._hints:
            hint = source.of_weight(path, leaf, tuple(x.shape))
            if hint is not None:
                return hint
        return None

    def _sets_as_asked(
        self,
        path: str,
        attribute: str,
        how: How,
        leaves: Mapping[str, Tensor],
        found: Candidates[StoredNeurons],
    ) -> dict[str, _Read]:
        """The sets of neurons of one effective weight by key, as the user says.

        Args:
            path: Path of the layer.
            attribute: Name of the weight within it.
            how: What the user says.
            leaves: The effective tensors of the layer by name.
            found: Takes the layer if it is broken or left out; then there are no sets.
        """
        key = key_of(attribute)
        name = full_name(self._stored.layer_name(path), key)
        weight = leaves[attribute].detach()
        if not weight.is_floating_point():
            found.skips.append(_no_floats(name, weight))
            return {}
        try:
            neurons = _as_asked(attribute, weight, how, name, _outputs(leaves))
        except (ValueError, TypeError) as error:
            found.broken.append(Broken(name, error))
            return {}
        kind: Kind = "other"
        if attribute == "weight":
            kind = _kind_of(path, {"": weight}, {attribute: weight})
        sets = {}
        for part, x in neurons.items():
            sets[f"{key}.{part}".strip(".")] = _Read(x, kind, asked=True)
        return sets

    def add(self, path: str, sets: Mapping[str, _Read], found: Candidates[StoredNeurons]) -> None:
        """Add the sets of neurons of one layer to those found."""
        layer = self._stored.layer_name(path)
        leaves = self._stored.layers[path]
        is_lazy = any(x.is_meta for x in leaves.values())
        for key, one in sets.items():
            x = one.flat()
            name = full_name(layer, key)
            notes = [part for part in (self._stored.note(path, key), one.note) if part]
            if not x.is_floating_point():
                found.skips.append(_no_floats(name, x))
                continue
            identity: Hashable = (path, key)
            if one.asked or one.kind != "other":  # tied weights are stored as one
                table = x if one.whole is None else one.whole
                identity = (table.data_ptr(), table.shape, table.stride())
                if is_lazy:
                    identity = (self._stored.names(path), key)
            stored = StoredNeurons(
                name=name,
                layer=layer,
                shape=shape_by_group(x),
                kind=one.kind,
                identity=identity,
                asked=one.asked,
                note="; ".join(notes),
                kernel=_kernel_places(leaves) if one.kind == "convolution" else 1,
                read=partial(self._loaded, path, key) if is_lazy else one.flat,
            )
            found.sets.append(stored)

    def add_tied(self, head: str, path: str, found: Candidates[StoredNeurons]) -> None:
        """Add a head that no tensor is stored for, since it is the table of an embedding.

        Args:
            head: Path of the head.
            path: Path of the embedding.
            found: Takes the head.
        """
        for place, table in enumerate(found.sets):
            if (
                table.layer != self._stored.layer_name(path)
                or table.name != table.layer
                or table.asked
            ):
                continue
            identity = ("tied", path)
            found.sets[place] = replace(table, identity=identity)
            tied = StoredNeurons(
                name=self._stored.layer_name(head),
                layer=self._stored.layer_name(head),
                shape=shape_by_group(self._stored.layers[path]["weight"]),
                kind="linear",
                identity=identity,
                note=self._stored.note(path, ""),
                read=partial(self._table, path),
            )
            found.sets.append(tied)
            return

    def _table(self, path: str) -> Tensor:
        """The whole weight of an embedding."""
        return self._stored.load(path)["weight"].detach()

    def _loaded(self, path: str, key: str) -> Tensor:
        """One set of neurons of a layer whose numbers are in a file."""
        leaves = self._stored.load(path, key)
        return self.sets(path, leaves, Candidates("StateDict", [], []))[key].flat()


def _sets_as_hinted(leaf: str, x: Tensor, hint: Hint) -> dict[str, _Read]:
    """The sets of neurons of one effective weight by key, as a hint says."""
    assert hint.rule is not None
    neurons = hint.rule.parted(hint.rule.arrange(x))
    if isinstance(neurons, Tensor):
        neurons = {"": neurons}
    kind: Kind = hint.kind or "other"
    sets = {}
    for part, one in neurons.items():
        whole = None if part else x
        key = f"{key_of(leaf)}.{part}".strip(".")
        sets[key] = _Read(one, kind, note=hint.note, whole=whole)
    return sets


def _as_asked(
    attribute: str, weight: Tensor, how: How, name: str, outputs: int | None
) -> dict[str, Tensor]:
    """The neurons (n, d) or (groups, n, d) of each part of a weight; "" if it is not parted.

    Args:
        attribute: Name of the weight in its layer.
        weight: The weight.
        how: What the user says.
        name: Name of the layer, for errors.
        outputs: How many outputs the layer has; None if that is not known.
    """
    if callable(how):
        return {"": apply_function(how, weight, name)}
    is_kernels = attribute == "weight" and weight.ndim > 2
    if is_kernels and how == "rows":
        return {"": _by_output(weight, outputs)}
    rule = rule_for(how, attribute, weight, name, kernels=is_kernels)
    assert isinstance(rule, WeightRule)
    x = rule.arrange(weight)
    if not rule.parts:
        return {"": x}
    return {part.key: part.take(x) for part in rule.parts}


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


def _attribute_of(leaf: str) -> str:
    """Name of the weight that a stored tensor belongs to."""
    return leaf.removeprefix("parametrizations.").partition(".")[0]


def _no_floats(name: str, x: Tensor) -> Skip:
    """That a weight does not hold floating-point numbers."""
    return Skip(name, tuple(x.shape), f"its weights are {x.dtype}, not floating-point")


def _stored_name(path: str, leaf: str) -> str:
    return f"{path}.{leaf}".strip(".")


def _has_one_of(name: str, parts: Sequence[str]) -> bool:
    return any(part in name.lower() for part in parts)


def _kind_of(path: str, sets: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> Kind:
    """A layer of one matrix named ``weight`` is a Linear, or an Embedding if its name says so.

    With more than two axes it is a convolution.
    """
    x = sets.get("")
    if x is None or len(sets) > 1 or x.numel() == 0:
        return "other"
    if any(leaf.ndim > 2 for leaf in leaves.values()):
        return "convolution"
    if x.ndim != 2:
        return "other"
    if _has_one_of(path.rpartition(".")[2], _TABLE_NAMES):
        return "embedding"
    return "linear"


def _kernel_places(leaves: Mapping[str, Tensor]) -> int:
    """How many places the kernel of a convolution has; 1 for other layers."""
    largest = max(leaves.values(), key=lambda x: x.ndim)
    return math.prod(largest.shape[2:])


def _sets_of_weight(leaf: str, x: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sets of neurons in one effective weight, by key."""
    if leaf == "in_proj_weight" and len(x) % 3 == 0:
        return dict(zip(PROJECTIONS, x.chunk(3), strict=True))
    if leaf in [f"{part}_proj_weight" for part in PROJECTIONS]:
        return {leaf[0]: x}
    if leaf.startswith(("weight_ih", "weight_hh")):
        return _gates(leaf, x, leaves)
    if leaf.startswith("weight_hr"):
        return {leaf: x}
    return {key_of(leaf): _by_output(x, _outputs(leaves))}


def _outputs(leaves: Mapping[str, Tensor]) -> int | None:
    """How many outputs a layer has, as its bias tells; None if it has none."""
    bias = leaves.get("bias")
    if bias is not None and bias.ndim == 1:
        return len(bias)
    return None


def _gates(leaf: str, x: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gates of a recurrent weight; the length of the hidden state tells how many there are."""
    hidden = leaves.get(leaf.replace("weight_ih", "weight_hh"))
    projected = leaves.get(leaf.replace("weight_ih", "weight_hr").replace("weight_hh", "weight_hr"))
    if projected is not None:
        hidden = projected
    count = 1
    if hidden is not None and hidden.numel() > 0:
        count = len(x) // hidden.shape[1]
    if count not in _GATES:
        return {leaf: x}
    gates = {}
    for gate, rows in zip(_GATES[count], x.chunk(count), strict=True):
        gates[f"{leaf}.{gate}"] = rows
    return gates


def _by_output(x: Tensor, outputs: int | None) -> Tensor:
    """The neurons of a weight, one for each output channel.

    Args:
        x: The weight, (outputs, inputs / groups, *kernel) or, if it is transposed,
            (inputs, outputs / groups, *kernel).
        outputs: How many outputs the layer has; None if that is not known.

    Returns:
        Neurons (n, d) or (groups, n, d).
    """
    if not outputs or outputs == len(x) or x.numel() == 0 or outputs % x.shape[1]:
        return x.flatten(1)
    groups = outputs // x.shape[1]
    if len(x) % groups:
        return x.flatten(1)
    return x.view(groups, -1, *x.shape[1:]).transpose(1, 2).flatten(2).squeeze(0)
