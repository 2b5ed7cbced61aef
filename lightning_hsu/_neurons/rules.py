"""Which rows of a module's weight are its neurons: one rule for each kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

Rule = Callable[[nn.Module], "Tensor | Mapping[str, Tensor]"]
"""Maps a module to its neurons (n, d) or (groups, n, d), or to several such sets by key.

They are views of the module's parameters where possible.
"""

LSTM_GATES = "ifgo"  # in the order in which torch stores their rows
GRU_GATES = "rzn"
PROJECTIONS = "qkv"  # of attention, in the order in which torch packs their rows

_RULES: dict[type[nn.Module], Rule] = {}
REGISTERED: list[type[nn.Module]] = []
"""The classes with a rule, one entry for each registration: its length reveals a new one."""


def register_neurons(kind: type[nn.Module], rule: Rule) -> None:
    """Teach the library where the neurons of your own layer are.

    Args:
        kind: The layer's class; subclasses inherit the rule. A later registration replaces an
            earlier one.
        rule: Takes the module and returns its neurons, a tensor (n, d) or (groups, n, d) computed
            differentiably from the module's parameters, or a mapping of names to such tensors.

    Raises:
        TypeError: if ``kind`` is not a class of modules.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_hsu import summarize
        >>> class Dictionary(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.atoms = nn.Parameter(torch.randn(16, 64))  # 64 atoms, one a column
        >>> register_neurons(Dictionary, lambda module: module.atoms.T)
        >>> summarize(Dictionary()).layers[0].shape
        (1, 64, 16)
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise TypeError(
            f"register_neurons takes the class of a layer, not {kind!r}; use type(layer)"
        )
    _RULES[kind] = rule
    REGISTERED.append(kind)


def class_rule(module: nn.Module) -> Tensor | Mapping[str, Tensor]:
    """The neurons of a module by the rule that its class has at the time."""
    rule = rule_of(module)
    assert rule is not None
    return rule(module)


def has_built_in_rule(module: nn.Module) -> bool:
    """Whether the rule of this module's class is one of the library's, not a registered one."""
    return rule_of(module) in _BUILT_IN.values()


def neurons_by(rule: Rule, module: nn.Module) -> dict[str, Tensor]:
    """The neurons of a module as a rule reads them, by key; "" if there is a single set."""
    neurons = rule(module)
    if isinstance(neurons, Mapping):
        return dict(neurons)
    return {"": neurons}


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a module's class, or of the nearest class that it inherits from."""
    for kind in type(module).__mro__:
        if kind in _RULES:
            return _RULES[kind]
    return None


def effective_weight(module: nn.Module, name: str) -> Tensor:
    """The weight as the forward pass uses it, even if a hook computes it.

    Pruning and the older weight and spectral norms are such hooks.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return hook.apply_mask(module)  # type: ignore[no-any-return, no-untyped-call]
        if getattr(hook, "name", None) == name and hasattr(hook, "compute_weight"):
            settings = {}
            if hasattr(hook, "n_power_iterations"):
                settings["do_power_iteration"] = False
            return hook.compute_weight(module, **settings)  # type: ignore[no-any-return]
    weight: Tensor = getattr(module, name)
    return weight


def _linear(module: nn.Module) -> Tensor:
    return effective_weight(module, "weight")


def _embedding(module: nn.Module) -> Tensor:
    """Every row except that of the padding, which does not train."""
    weight = effective_weight(module, "weight")
    padding = module.padding_idx
    if padding is None:
        return weight
    assert isinstance(padding, int)
    before = weight[:padding]
    after = weight[padding + 1 :]
    # A view of the weight if possible.
    if len(after) == 0:
        return before
    if len(before) == 0:
        return after
    return torch.cat([before, after])


def _bilinear(module: nn.Module) -> Tensor:
    return effective_weight(module, "weight").flatten(1)


def _convolution(module: nn.Module) -> Tensor:
    """Kernels (out, in / groups, *k) as neurons (groups, out / groups, in / groups * k)."""
    return _by_group(module).flatten(2)


def strided(rule: Rule, module: nn.Module) -> Tensor | None:
    """The neurons of a convolution as a view of its weight, where the rule makes a copy.

    Of channels-last kernels the entries are in memory order: to a function of inner products their
    order does not matter. Those of a transposed convolution, (groups, n, in / groups, k), lie at
    two strides. None for other modules, and for kernels that lie in memory otherwise.
    """
    if rule is not class_rule:
        return None
    found = None
    if rule_of(module) is _convolution:
        kernels = _by_group(module).movedim(2, -1)
        if kernels.is_contiguous():
            found = kernels.flatten(2)
    elif rule_of(module) is _transposed_convolution:
        kernels = _by_group(module).transpose(1, 2)
        found = kernels.flatten(3)
    return found


def _transposed_convolution(module: nn.Module) -> Tensor:
    """Kernels (in, out / groups, *k) as neurons (groups, out / groups, in / groups * k)."""
    return _by_group(module).transpose(1, 2).flatten(2)


def _by_group(module: nn.Module) -> Tensor:
    """Kernels with their first axis split into (groups, channels / groups)."""
    weight = effective_weight(module, "weight")
    assert isinstance(module.groups, int)
    return weight.view(module.groups, -1, *weight.shape[1:])


def _attention(module: nn.Module) -> dict[str, Tensor]:
    """Queries, keys and values separately; the output projection is a Linear of its own."""
    if module.in_proj_weight is not None:
        packed = effective_weight(module, "in_proj_weight")
        return dict(zip(PROJECTIONS, packed.chunk(3), strict=True))
    return {part: effective_weight(module, f"{part}_proj_weight") for part in PROJECTIONS}


def _recurrent(module: nn.Module) -> dict[str, Tensor]:
    """The rows of each gate separately; a plain RNN and the projection of an LSTM have no gates."""
    gates = ""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        gates = LSTM_GATES
    elif isinstance(module, (nn.GRU, nn.GRUCell)):
        gates = GRU_GATES
    neurons = {}
    for name in _weight_names(module):
        weight = effective_weight(module, name)
        if gates and not name.startswith("weight_hr"):
            for gate, rows in zip(gates, weight.chunk(len(gates)), strict=True):
                neurons[f"{name}.{gate}"] = rows
        else:
            neurons[name] = weight
    return neurons


def _weight_names(module: nn.Module) -> list[str]:
    """Names of a recurrent module's weight matrices, parametrized or not."""
    if not isinstance(module, nn.RNNBase):
        return ["weight_ih", "weight_hh"]
    names = []
    for name in chain.from_iterable(module._all_weights):
        if name.startswith("weight"):
            names.append(name)
    return names


_BUILT_IN: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding,
    nn.Bilinear: _bilinear,
    nn.modules.conv._ConvNd: _convolution,
    nn.modules.conv._ConvTransposeNd: _transposed_convolution,
    nn.MultiheadAttention: _attention,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent,
}
for _kind, _rule in _BUILT_IN.items():
    register_neurons(_kind, _rule)
