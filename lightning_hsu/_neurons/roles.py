"""Which modules of a model are parts of others: an adapter's factors, parametrizations, copies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_hsu._neurons.adapters import Adapter, adapter_of, unused_of
from lightning_hsu._neurons.heads import is_copy
from lightning_hsu._neurons.rules import has_built_in_rule, rule_of


@dataclass(frozen=True)
class Roles:
    """The modules of a model that are not plain layers.

    Args:
        adapters: Layers with adapters.
        left_out: Parts of layers, such as the factors of adapters.
        unused: Copies of which others are in use.
        computing: Parametrizations, which compute the weights of layers.
        copies: Modules inside copies of a model whose weights are averages.
    """

    adapters: dict[nn.Module, Adapter] = field(default_factory=dict)
    left_out: set[nn.Module] = field(default_factory=set)
    unused: set[nn.Module] = field(default_factory=set)
    computing: set[nn.Module] = field(default_factory=set)
    copies: set[nn.Module] = field(default_factory=set)


def roles_of(modules: Iterable[nn.Module]) -> Roles:
    """The roles of all modules of a model, in its order."""
    roles = Roles()
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if is_copy(module):
            roles.copies.update(module.modules())
        if isinstance(module, ParametrizationList):
            roles.computing.update(module.modules())
        for unused in unused_of(module):
            roles.left_out.update(unused.modules())
            roles.unused.add(unused)
        is_part = module in roles.left_out or module in roles.computing
        if is_part or _has_users_rule(module):
            continue
        adapter = adapter_of(module)
        if adapter is not None:  # some share factors, which may come first
            roles.adapters[module] = adapter
            roles.left_out.update(adapter.inside)
    return roles


def _has_users_rule(module: nn.Module) -> bool:
    """Whether a user has registered a rule for a module's class."""
    return rule_of(module) is not None and not has_built_in_rule(module)
