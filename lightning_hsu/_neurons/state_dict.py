"""State dicts without their model: where the neurons are, by the names, shapes and biases of what is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightning_hsu._core import working_dtype
from lightning_hsu._neurons.rules import register_neurons
from lightning_hsu._neurons.select import Skip, matches

_NAMES = ("weight", "kernel", "embedding")  # what the last part of a neuron's name has in it
_TABLES = ("embed", "wte", "wpe")  # what the name of a look-up table has in it
_WRAPPERS = ("module.", "_orig_mod.")  # what every name begins with where a wrapped model was saved
_GATES = {3: "rzn", 4: "ifgo"}


class Stored(nn.Module):
    """One layer of a state dict: sets of neurons (n, d) or (groups, n, d) by name, each with the parameter it views."""

    def __init__(self, sets: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._sets = list(sets)
        for i, x in enumerate(sets.values()):
            self.register_parameter(f"stored{i}", _frozen(x))

    def neurons(self) -> dict[str, Tensor]:
        """The sets by name."""
        return dict(
            zip(self._sets, self.parameters(), strict=False)
        )  # children, of which the root may have some, come last


class StateDict(nn.Module):
    """The layers of a state dict."""


register_neurons(Stored, lambda module: cast(Stored, module).neurons())


def stand_in(
    state: Mapping[str, Tensor], asked: Sequence[str] = ()
) -> tuple[nn.Module, list[Skip]]:
    """A module whose layers hold the weights of a state dict, so that ``select`` can read it.

    A matrix named ``weight`` is a Linear, or an Embedding where its name says so; other weights are flattened to one neuron
    an output channel. Weights of attention and recurrent layers are parted; of weight norm, spectral norm and pruning the
    effective weights are taken, of spectral norm up to a factor. A weight whose bias has the length of its second axis
    holds its neurons there (transposed convolutions, the Conv1D of GPT-2); without a bias, or where both axes are as long,
    the first is taken.

    Args:
        state: Tensors by name.
        asked: Patterns of names to take although they are named like no weight.

    Returns:
        The module, and the tensors of two and more dimensions that are not taken.

    Raises:
        TypeError: if the mapping holds no tensors by name.

    Example:
        >>> from lightning_hsu._neurons.select import select
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Linear(16, 10))
        >>> [(target.name, target.shape, target.head) for target in select(stand_in(model.state_dict())[0])[0]]
        [('0', (1, 16, 27), False), ('1', (1, 16, 9), False), ('2', (1, 10, 16), True)]
    """
    items = state.items() if isinstance(state, Mapping) else ()
    tensors = {name: x for name, x in items if isinstance(name, str) and isinstance(x, Tensor)}
    if not tensors:
        raise TypeError(f"a state dict maps names to tensors; got {_described(state)}")
    layers: dict[str, dict[str, Tensor]] = {}
    for name, x in _unwrapped(tensors).items():
        path, leaf = _parted(name)
        layers.setdefault(path, {})[leaf] = x
    skips, seen = [], dict[tuple[object, ...], nn.Parameter]()
    found = {}
    for path, leaves in layers.items():
        sets, left_out = _neurons(path, leaves, asked)
        skips += left_out
        if sets:
            matrices = all(x.ndim <= 2 for x in leaves.values())
            found[path] = _layer(path, sets, seen) if matrices else Stored(sets)
    root = found.pop("", StateDict())
    for path, layer in found.items():
        _place(root, path.split("."), layer)
    return root, skips


def _described(state: object) -> str:
    return (
        f"{len(state)} entries, none a tensor"
        if isinstance(state, Mapping)
        else type(state).__name__
    )


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what a wrapper put before all of them."""
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): x for name, x in tensors.items()})
    return tensors


def _parted(name: str) -> tuple[str, str]:
    """The path of a layer and the name within it; of ``a.parametrizations.weight.original1`` these are a and the rest."""
    path, mark, rest = name.rpartition("parametrizations.")
    if mark:
        return path.rstrip("."), mark + rest
    path, _, leaf = name.rpartition(".")
    return path, leaf


def _neurons(
    path: str, leaves: dict[str, Tensor], asked: Sequence[str]
) -> tuple[dict[str, Tensor], list[Skip]]:
    """The sets of neurons of a layer by name, and what is left out."""
    sets: dict[str, Tensor] = {}
    skips = []
    effective, unknown = _effective(
        {leaf: x for leaf, x in leaves.items() if not x.is_meta and x.layout == torch.strided}
    )
    for leaf, x in leaves.items():
        name = f"{path}.{leaf}".strip(".")
        if reason := unknown.get(leaf) or _unread(x):
            skips += [Skip(name, tuple(x.shape), reason)] if x.ndim > 1 else []
    for leaf, x in effective.items():
        name = f"{path}.{leaf}".strip(".")
        if x.ndim < 2:
            continue
        if any(part in leaf.lower() for part in _NAMES) or matches(name, asked):
            sets |= _sets(leaf, x, effective)
        else:
            skips.append(
                Skip(
                    name,
                    tuple(x.shape),
                    f"not named like a weight, measured only when asked for: include='{name}'",
                )
            )
    return sets, skips


def _unread(x: Tensor) -> str | None:
    """Why a tensor cannot be read; None if it can."""
    if x.is_meta:
        return "it holds no numbers (device meta)"
    return None if x.layout == torch.strided else f"it is sparse ({x.layout}): store its to_dense()"


def _effective(leaves: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a layer as its forward pass has them, and of the others why that is not known.

    Weight norm and pruning are computed from their parts; of spectral norm the weight is known up to a factor.
    """
    found, unknown = dict[str, Tensor](), dict[str, str]()
    for leaf in leaves:
        name, x = (
            _parametrized(leaf, leaves)
            if leaf.startswith("parametrizations.")
            else _hooked(leaf, leaves)
        )
        if x is not None:
            found[name] = x
        elif name:
            unknown[leaf] = (
                "computed by a parametrization that is not stored with it: report the model itself"
            )
    return found, unknown


def _parametrized(leaf: str, leaves: Mapping[str, Tensor]) -> tuple[str, Tensor | None]:
    """The weight that a stored parametrization computes, with its name; no name for a part of one, no weight if unknown."""
    above, _, part = leaf.rpartition(".")
    beside = {
        other.removeprefix(f"{above}.")
        for other in leaves
        if other.startswith(f"{above}.") and other != leaf
    }
    first, second = (leaves.get(f"{above}.original{i}") for i in (0, 1))
    name = above.partition(".")[2]
    if (
        part in ("original0", "original1")
        and len(beside) == 1
        and second is not None
        and _are_norms(first, second)
    ):
        return (
            ("", None)
            if part == "original0" or first is None
            else (name, _with_norms(second, first))
        )
    return name or leaf, leaves[leaf] if part == "original" and beside == {"0._u", "0._v"} else None


def _hooked(leaf: str, leaves: Mapping[str, Tensor]) -> tuple[str, Tensor | None]:
    """The same for what older weight norm and pruning leave; any other tensor is itself."""
    name, _, mark = leaf.rpartition("_")
    x, mask = leaves[leaf], leaves.get(f"{name}_mask")
    norms, free = leaves.get(f"{name}_g"), name not in leaves
    if mark == "orig" and free and (mask is None or mask.shape == x.shape):
        return name, x if mask is None else x * mask
    if mark == "v" and free and norms is not None and _are_norms(norms, x):
        return name, _with_norms(x, norms)
    pruned, direction = leaves.get(f"{name}_orig"), leaves.get(f"{name}_v")
    of_pruned = mark == "mask" and pruned is not None and pruned.shape == x.shape
    of_normed = mark == "g" and _are_norms(x, direction)
    return ("", None) if free and (of_pruned or of_normed) else (leaf, x)


def _are_norms(norms: Tensor | None, x: Tensor | None) -> bool:
    """Whether a tensor may hold the norms of weight norm: one for all of x, or along one of its axes."""
    if norms is None or x is None or not x.is_floating_point() or x.ndim < 2:
        return False
    if sum(size != 1 for size in x.shape) < 2:
        return False  # a vector
    along = [i for i, size in enumerate(norms.shape) if size != 1]
    return norms.numel() == 1 or (
        norms.ndim == x.ndim and len(along) == 1 and norms.shape[along[0]] == x.shape[along[0]]
    )


def _with_norms(x: Tensor, norms: Tensor) -> Tensor:
    """Weight norm: x with the norms (.., 1, ..) over the axes where these have length 1."""
    axes = [
        i for i, size in enumerate(norms.shape) if size == 1
    ] or None  # none of a single norm for all
    wide = x.to(working_dtype(x.dtype))
    length = torch.linalg.vector_norm(wide, dim=axes, keepdim=True)
    weight: Tensor = wide * (
        norms.to(wide.dtype) / length.clamp_min(torch.finfo(length.dtype).tiny)
    )
    return weight


def _sets(leaf: str, x: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sets of neurons in one effective weight, by name."""
    if leaf == "in_proj_weight" and len(x) % 3 == 0:
        return dict(zip("qkv", x.chunk(3), strict=True))
    if leaf in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return {leaf[0]: x}
    if leaf.startswith(("weight_ih", "weight_hh")):
        return _gates(leaf, x, leaves)
    if leaf.startswith("weight_hr"):
        return {leaf: x}
    bias = leaves.get("bias")
    return {
        "" if leaf == "weight" else leaf: _by_output(
            x, len(bias) if bias is not None and bias.ndim == 1 else 0
        )
    }


def _gates(leaf: str, x: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gates of a recurrent weight, of which the hidden state's length tells how many there are."""
    hidden = leaves.get(leaf.replace("weight_ih", "weight_hh"))
    projected = leaves.get(leaf.replace("weight_ih", "weight_hr").replace("weight_hh", "weight_hr"))
    length = projected if projected is not None else hidden
    count = len(x) // length.shape[1] if length is not None and length.numel() else 1
    names = _GATES.get(count, "")
    return (
        {f"{leaf}.{gate}": rows for gate, rows in zip(names, x.chunk(count), strict=True)}
        if names
        else {leaf: x}
    )


def _by_output(x: Tensor, outputs: int) -> Tensor:
    """Neurons (n, d) or (groups, n, d) of a weight whose layer has so many outputs; 0 where that is not known."""
    if (
        outputs in (0, len(x))
        or not x.numel()
        or outputs % x.shape[1]
        or len(x) % (outputs // x.shape[1])
    ):
        return x.flatten(1)
    groups = outputs // x.shape[1]
    return x.view(groups, -1, *x.shape[1:]).transpose(1, 2).flatten(2).squeeze(0)


def _layer(
    path: str, sets: dict[str, Tensor], seen: dict[tuple[object, ...], nn.Parameter]
) -> nn.Module:
    x = sets.get("")
    if len(sets) > 1 or x is None or x.ndim != 2 or not x.is_floating_point() or not x.numel():
        return Stored(sets)
    table = any(part in path.rpartition(".")[2].lower() for part in _TABLES)
    with torch.device("meta"):
        layer = nn.Embedding(*x.shape) if table else nn.Linear(x.shape[1], x.shape[0], bias=False)
    layer.weight = seen.setdefault(
        (x.data_ptr(), x.shape, x.stride()), _frozen(x)
    )  # tied weights stay tied
    return layer


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach(), requires_grad=False)


def _place(root: nn.Module, path: list[str], layer: nn.Module) -> None:
    """Put a layer under its path, whose parts may be names that ``add_module`` refuses: ``type``, or none at all."""
    for part in path[:-1]:
        if part not in root._modules:
            root._modules[part] = nn.Module()
        root = cast(nn.Module, root._modules[part])
    before = root._modules.get(path[-1])  # made for the layers below it
    layer._modules.update(before._modules if before is not None else {})
    root._modules[path[-1]] = layer
