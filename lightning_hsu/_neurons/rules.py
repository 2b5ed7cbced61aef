"""Which rows of a module's weight are its neurons: one rule a kind of layer, yours by one registration."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

Rule = Callable[[nn.Module], "Tensor | Mapping[str, Tensor]"]
"""Maps a module to its neurons (n, d) or (groups, n, d), or to several sets of them by name, as views where it can."""

_RULES: dict[type[nn.Module], Rule] = {}


def register_neurons(kind: type[nn.Module], rule: Rule) -> None:
    """Teach the library where the neurons of your own layer are.

    Args:
        kind: The layer's class; subclasses inherit the rule. A later registration replaces an earlier one.
        rule: Takes the module and returns its neurons, a tensor (n, d) or (groups, n, d) computed
            differentiably from the module's parameters, or a mapping of names to such tensors.

    Raises:
        TypeError: if ``kind`` is not a class of modules.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Dictionary(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.atoms = nn.Parameter(torch.randn(16, 64))  # 64 atoms, one a column
        >>> register_neurons(Dictionary, lambda module: module.atoms.T)
        >>> neurons_of(Dictionary())[""].shape
        torch.Size([64, 16])
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise TypeError(
            f"register_neurons takes the class of a layer, not {kind!r}; use type(layer)"
        )
    _RULES[kind] = rule


def has_rule(module: nn.Module) -> bool:
    """Whether a rule knows the class of this module, or one it inherits from."""
    return any(kind in _RULES for kind in type(module).__mro__)


def neurons_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the neurons of a module that has a rule, by name; "" where there is a single set."""
    found = next(_RULES[kind] for kind in type(module).__mro__ if kind in _RULES)(module)
    return dict(found) if isinstance(found, Mapping) else {"": found}


def effective_weight(module: nn.Module, name: str) -> Tensor:
    """Return the weight as the forward pass uses it, also where a hook computes it: pruning, the older norms."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return hook.apply_mask(module)  # type: ignore[no-any-return, no-untyped-call]
        if getattr(hook, "name", None) == name and hasattr(hook, "compute_weight"):
            if hasattr(hook, "n_power_iterations"):
                return hook.compute_weight(module, do_power_iteration=False)  # type: ignore[no-any-return]
            return hook.compute_weight(module)  # type: ignore[no-any-return]
    weight: Tensor = getattr(module, name)
    return weight


def _linear(module: nn.Module) -> Tensor:
    return effective_weight(module, "weight")


def _embedding(module: nn.Module) -> Tensor:
    """Every row but that of the padding, which does not train."""
    weight, padding = effective_weight(module, "weight"), module.padding_idx
    if padding is None:
        return weight
    assert isinstance(padding, int)
    rest = [part for part in (weight[:padding], weight[padding + 1 :]) if len(part)]
    return torch.cat(rest) if len(rest) == 2 else rest[0] if rest else weight[:0]


def _bilinear(module: nn.Module) -> Tensor:
    return effective_weight(module, "weight").flatten(1)


def _convolution(module: nn.Module) -> Tensor:
    """Kernels (out, in / groups, *k): a neuron is an output channel, (groups, out / groups, in / groups * k)."""
    return _by_group(module).flatten(2)


def _transposed_convolution(module: nn.Module) -> Tensor:
    """Kernels (in, out / groups, *k): a neuron is an output channel, (groups, out / groups, in / groups * k)."""
    return _by_group(module).transpose(1, 2).flatten(2)


def _by_group(module: nn.Module) -> Tensor:
    """Kernels with their first axis split into (groups, channels / groups)."""
    weight = effective_weight(module, "weight")
    assert isinstance(module.groups, int)
    return weight.view(module.groups, -1, *weight.shape[1:])


def _attention(module: nn.Module) -> dict[str, Tensor]:
    """Queries, keys and values apart; the output projection is a Linear of its own."""
    packed = module.in_proj_weight
    if packed is not None:
        return dict(zip("qkv", effective_weight(module, "in_proj_weight").chunk(3), strict=True))
    return {part: effective_weight(module, f"{part}_proj_weight") for part in "qkv"}


def _recurrent(module: nn.Module) -> dict[str, Tensor]:
    """Each gate's rows apart, in torch's order: LSTM i, f, g, o; GRU r, z, n; a plain RNN has none."""
    lstm, gru = isinstance(module, (nn.LSTM, nn.LSTMCell)), isinstance(module, (nn.GRU, nn.GRUCell))
    gates = "ifgo" if lstm else "rzn" if gru else ""
    found = {}
    for name in _weight_names(module):
        weight = effective_weight(module, name)
        if not gates or name.startswith("weight_hr"):  # the projection of an LSTM has no gates
            found[name] = weight
        else:
            found |= {
                f"{name}.{gate}": rows
                for gate, rows in zip(gates, weight.chunk(len(gates)), strict=True)
            }
    return found


def _weight_names(module: nn.Module) -> list[str]:
    """Names of a recurrent module's weight matrices, parametrized or not."""
    if isinstance(module, nn.RNNBase):
        return [
            name for layer in module._all_weights for name in layer if name.startswith("weight")
        ]
    return ["weight_ih", "weight_hh"]


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
