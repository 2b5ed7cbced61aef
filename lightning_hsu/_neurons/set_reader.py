"""Reads the sets of neurons of a state dict's layers, by what the user, hints and names say."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

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
from lightning_hsu._neurons.hints import Hint, Hints
from lightning_hsu._neurons.how import How
from lightning_hsu._neurons.patterns import matches
from lightning_hsu._neurons.plain_sets import (
    is_named_like_a_weight,
    kernel_places,
    kind_of_layer,
    neurons_as_asked,
    outputs_of,
    sets_of_weight,
)
from lightning_hsu._neurons.stored import effective_weights
from lightning_hsu._neurons.stored_tensors import StoredTensors, stored_name
from lightning_hsu._neurons.weights import key_of


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
class ReadSet:
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


class SetReader:
    """Reads the sets of neurons of layers.

    Args:
        stored: The state dict.
        patterns: Patterns of names to take even if they are not named like a weight.
        wanted: What the user says of how weights hold neurons.
        hints: What else tells it, the surest first.
    """

    def __init__(
        self, stored: StoredTensors, patterns: Sequence[str], wanted: Asked, hints: Sequence[Hints]
    ) -> None:
        self._stored = stored
        self._patterns = patterns
        self._wanted = wanted
        self._hints = hints
        self._encoders = Encoders(stored.layers)

    def sets(
        self, path: str, leaves: Mapping[str, Tensor], found: Candidates[StoredNeurons]
    ) -> dict[str, ReadSet]:
        """The sets of neurons of a layer by key.

        Args:
            path: Path of the layer.
            leaves: Its tensors by name.
            found: Takes what is left out or broken.
        """
        layer = self._stored.layer_name(path)
        if self._is_for_a_function(path, layer, leaves):
            leaves = self._stored.load(path)
        effective = self._effective(path, layer, leaves, found)
        named: dict[str, ReadSet] = {}
        others: dict[str, ReadSet] = {}
        unhinted: dict[str, Tensor] = {}  # read as their names and shapes say
        hints: dict[str, Hint] = {}
        for leaf, x in effective.items():
            if x.ndim < 2:
                continue
            how = self._wanted.of_weight(layer, leaf)
            name = stored_name(path, leaf)
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
            elif is_named_like_a_weight(leaf) or matches(name, self._patterns):
                unhinted |= sets_of_weight(leaf, x, effective)
            elif rule is not None:
                unhinted[leaf] = rule.arrange(x)
            else:
                reason = f"not named like a weight, measured only when asked for: include='{name}'"
                found.not_weights.append(Skip(name, tuple(x.shape), reason))
        kind = kind_of_layer(path, unhinted, leaves)
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
                others[key] = ReadSet(x, kind, note=note)
            else:
                others[key] = ReadSet(x, hint.kind or kind, note=hint.note or note)
        return named | others

    def _effective(
        self,
        path: str,
        layer: str,
        leaves: Mapping[str, Tensor],
        found: Candidates[StoredNeurons],
    ) -> dict[str, Tensor]:
        """The tensors of a layer as its forward pass uses them; says which cannot be read."""
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
                skip = Skip(stored_name(path, leaf), tuple(x.shape), reason)
                found.not_weights.append(skip)
        return effective

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
    ) -> dict[str, ReadSet]:
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
            neurons = neurons_as_asked(attribute, weight, how, name, outputs_of(leaves))
        except (ValueError, TypeError) as error:
            found.broken.append(Broken(name, error))
            return {}
        kind: Kind = "other"
        if attribute == "weight":
            kind = kind_of_layer(path, {"": weight}, {attribute: weight})
        sets = {}
        for part, x in neurons.items():
            sets[f"{key}.{part}".strip(".")] = ReadSet(x, kind, asked=True)
        return sets

    def add(self, path: str, sets: Mapping[str, ReadSet], found: Candidates[StoredNeurons]) -> None:
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
                kernel=kernel_places(leaves) if one.kind == "convolution" else 1,
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
            is_whole = table.layer == self._stored.layer_name(path) == table.name
            if not is_whole or table.asked:
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


def _sets_as_hinted(leaf: str, x: Tensor, hint: Hint) -> dict[str, ReadSet]:
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
        sets[key] = ReadSet(one, kind, note=hint.note, whole=whole)
    return sets


def _attribute_of(leaf: str) -> str:
    """Name of the weight that a stored tensor belongs to."""
    return leaf.removeprefix("parametrizations.").partition(".")[0]


def _no_floats(name: str, x: Tensor) -> Skip:
    """That a weight does not hold floating-point numbers, and of codes in bytes what to do."""
    reason = f"its weights are {x.dtype}, not floating-point"
    if x.dtype in (torch.int8, torch.uint8):
        reason += (
            ", and no scale that fits lies beside them: report the model itself, or pass "
            "dequantised tensors"
        )
    return Skip(name, tuple(x.shape), reason)
