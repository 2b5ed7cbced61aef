"""The sets of neurons of a state dict without its model, by names, shapes and biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_hsu._neurons.asked import Asked
from lightning_hsu._neurons.candidates import Candidates, NeuronSet, Skip
from lightning_hsu._neurons.hints import Hints, Layers
from lightning_hsu._neurons.how import Neurons, check_neurons
from lightning_hsu._neurons.known_model import KnownModel, known_model
from lightning_hsu._neurons.model_types import unknown_type
from lightning_hsu._neurons.neighbours import Neighbours
from lightning_hsu._neurons.packed import quantization_settings
from lightning_hsu._neurons.patterns import Patterns, as_list
from lightning_hsu._neurons.set_reader import ReadSet, SetReader, StoredNeurons
from lightning_hsu._neurons.stored_tensors import Load, StoredTensors


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
        >>> import torch
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
    stored = StoredTensors(state, load, quantization_settings(config))
    known = known_model(config, stored.layers, stored.by_rows)
    if known is not None:
        stored.join(known.stacks)
    reader = SetReader(stored, patterns, wanted, _hints_of(stored.layers, known))
    found = Candidates[StoredNeurons]("StateDict", [], [])
    not_known = unknown_type(config)
    if not_known:
        found.notes.append(not_known)
    sets: dict[str, dict[str, ReadSet]] = {}
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


def _add_heads(known: KnownModel, reader: SetReader, found: Candidates[StoredNeurons]) -> None:
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
