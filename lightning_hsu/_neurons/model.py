"""The sets of neurons of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_hsu._neurons import names, sizes
from lightning_hsu._neurons.adapters import Adapter
from lightning_hsu._neurons.asked import Asked, askable_buffers, asked_rule, is_read_so_anyway
from lightning_hsu._neurons.candidates import Candidates, Kind, full_name
from lightning_hsu._neurons.found import Found
from lightning_hsu._neurons.heads import declared_heads
from lightning_hsu._neurons.how import How, Neurons, PartedRule, Rearranged, check_neurons, rule_for
from lightning_hsu._neurons.placement import Placement, placement_of
from lightning_hsu._neurons.quantised import qualified
from lightning_hsu._neurons.roles import roles_of
from lightning_hsu._neurons.rules import Rule, class_rule, has_built_in_rule, rule_of
from lightning_hsu._neurons.surroundings import Surroundings, kind_of_base
from lightning_hsu._neurons.table_names import is_table_of_tokens, why_tokens_are_left_out
from lightning_hsu._neurons.target import Target
from lightning_hsu._neurons.weights import key_of, shape_of_weight, weights_of, why_computed
from lightning_hsu._neurons.wrappers import plain_name

UNUSED = "a copy that the forward pass does not use: another one has its place"
_LAZY = "a lazy layer that has seen no batch: it has no shape yet"
_NO_NUMBERS = "it holds no numbers yet (device meta): load them"
_SCRIPTED = (
    "TorchScript: its layers' kinds are not known; measure the model before torch.jit.script, or "
    "lightning_hsu.report.report on its state_dict()"
)


def neurons_of_model(
    model: nn.Module,
    placement: Placement | None = None,
    neurons: Neurons = None,
    *,
    strict: bool = True,
) -> Candidates[Target]:
    """Find every set of neurons of a model. A collective call if its weights are sharded.

    Args:
        model: Any module.
        placement: How its weights are placed over ranks; None looks at the model.
        neurons: Patterns of weights' names, each with how such weights hold neurons.
        strict: Whether every pattern has to match a weight.

    Raises:
        TypeError: if ``neurons`` is not made of patterns and ways of holding neurons.
        ValueError: if a pattern of ``neurons`` matches no weight.

    Example:
        >>> found = neurons_of_model(nn.Sequential(nn.Conv2d(3, 16, 3), nn.LazyLinear(10)))
        >>> [(one.name, one.shape) for one in found.sets]
        [('0', (1, 16, 27))]
        >>> found.skips[0].reason
        'a lazy layer that has seen no batch: it has no shape yet'
    """
    if placement is None:
        placement = placement_of(model)
    return _Finder(model, placement, check_neurons(neurons)).find(strict=strict)


class _Finder:
    """Goes through a model once.

    Args:
        model: The model.
        placement: How its weights are placed over ranks.
        asked: The user's patterns of weights' names.
    """

    def __init__(self, model: nn.Module, placement: Placement, asked: Mapping[str, How]) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self._asked = Asked(asked)
        self._around = Surroundings(self._modules)
        self._roles = roles_of(self._modules.values())
        self._found = Found(type(model).__name__, placement, self._roles.copies)

    def find(self, *, strict: bool) -> Candidates[Target]:
        """The candidates.

        Args:
            strict: Whether every pattern has to match a weight.
        """
        for path, module in self._modules.items():
            self._add_module(path, module)
        if strict:
            self._asked.check()
        self._found.candidates.unmet.extend(self._asked.unmet())
        for module, heads in declared_heads(self._model).items():
            self._add_declared(module, heads)
        return self._found.candidates

    def _add_declared(self, module: nn.Module, heads: Sequence[nn.Module]) -> None:
        """Note the sets of the layers that a module declares to be heads, and its name."""
        candidates = self._found.candidates
        for head in heads:
            inside = set(head.modules())
            names_inside = [one.layer for one in candidates.sets if one.module in inside]
            for target in candidates.sets:
                # Of several layers, as in a head of two, the last one.
                if names_inside and target.layer == names_inside[-1]:
                    candidates.declared.append(target.name)
        for path, other in self._modules.items():
            if other is module:
                candidates.declaring.append(plain_name(path))

    def _add_module(self, path: str, module: nn.Module) -> None:
        """Add the sets of neurons of one module, and its weights that are left out."""
        layer = plain_name(path)
        if module in self._roles.computing:
            return
        if isinstance(module, torch.jit.ScriptModule):
            self._skip_all(layer, module, _SCRIPTED, recurse=False)
            return
        taken = self._add_asked(path, layer, module)
        taken |= self._add_asked_buffers(layer, module)
        if module in self._roles.unused:
            self._skip_all(layer, module, UNUSED)
        if module in self._roles.left_out:
            return
        if module in self._roles.adapters:
            self._add_adapted(path, layer, module, self._roles.adapters[module], taken)
            return
        if rule_of(module) is None:
            self._add_foreign(path, layer, module, taken)
            return
        if self._is_unreadable(layer, module, taken):
            return
        rule: Rule = class_rule
        if has_built_in_rule(module):
            rule = self._around.rule_of_layer(path, module)
            reason = why_computed(module)
            if reason is not None:
                shape = shape_of_weight(module.__dict__.get("weight", torch.empty(0)))
                self._found.skip(full_name(layer, ""), shape, reason)
                return
        kind = self._around.kind_of(path, module)
        note = self._around.note_of(path, module)
        self._found.add(layer, module, rule, kind=kind, without=taken, note=note)

    def _skip_all(
        self, layer: str, module: nn.Module, reason: str, *, recurse: bool = True
    ) -> None:
        """Leave out the weights of a module, for one reason."""
        for name, p in module.named_parameters(recurse=recurse):
            if p.ndim >= 2:
                self._found.skip(full_name(layer, name), shape_of_weight(p), reason)

    # What the user asked for.

    def _add_asked(self, path: str, layer: str, module: nn.Module) -> set[str]:
        """Add the weights of a module that the user has named; return their attributes."""
        taken = set()
        for attribute, p in module._parameters.items():
            if p is not None and nn.parameter.is_lazy(p):  # read when it has a shape
                self._asked.of_weight(layer, attribute)
        for attribute, shape in weights_of(module):
            key = key_of(attribute)
            name = full_name(layer, key)
            is_part = module in self._roles.left_out
            how = self._asked.of_weight(layer, attribute, only_exact=is_part)
            if how is None:
                continue
            taken.add(attribute)
            if self._found.is_unreadable_weight(layer, module, attribute, shape):
                continue
            try:
                if is_read_so_anyway(how, module, attribute):
                    rule = self._around.rule_of_layer(path, module)
                else:
                    rule = asked_rule(how, module, attribute, shape, name)
            except (ValueError, TypeError) as error:
                self._found.refuse(name, error)
                continue
            kind = self._around.kind_of(path, module)
            self._found.add(layer, module, rule, kind=kind, prefix=key, asked=True)
        return taken

    def _add_asked_buffers(self, layer: str, module: nn.Module) -> set[str]:
        """Add the buffers of a module that the user has named; return their attributes."""
        taken = set()
        for attribute, x in askable_buffers(module):
            name = full_name(layer, attribute)
            how = self._asked.of_buffer(name)
            if how is None:
                continue
            taken.add(attribute)
            try:
                rule = rule_for(how, attribute, x, name)
            except ValueError as error:
                self._found.refuse(name, error)
                continue
            self._found.add(layer, module, rule, prefix=attribute, asked=True, in_buffer=True)
        return taken

    # Layers of torch, and those with adapters.

    def _is_unreadable(self, layer: str, module: nn.Module, taken: set[str]) -> bool:
        """Whether the weights of a module with a rule cannot be read; then say why."""
        is_torch_layer = has_built_in_rule(module)
        for key, p in module._parameters.items():
            if p is None or key in taken:
                continue
            if nn.parameter.is_lazy(p):
                self._found.skip(full_name(layer, key_of(key)), (), _LAZY)
                return True
        for key, p in module._parameters.items():
            if p is None or key in taken or "bias" in key or not is_torch_layer:
                continue
            if self._found.is_unreadable_weight(layer, module, key, shape_of_weight(p)):
                return True
        if any(p.is_meta for p in module.parameters()):
            self._found.skip(full_name(layer, ""), (), _NO_NUMBERS)
            return True
        return False

    def _add_adapted(
        self, path: str, layer: str, module: nn.Module, adapter: Adapter, taken: set[str]
    ) -> None:
        """Add the effective weight of a layer with an adapter, or say why it is left out."""
        if adapter.rule is None:
            shape = tuple(next((p.shape for p in module.parameters() if p.ndim >= 2), ()))
            self._found.skip(full_name(layer, ""), shape, adapter.reason)
            return
        rule: Rule = adapter.rule
        kind = kind_of_base(adapter.base)
        name = full_name(layer, "")
        how = self._asked.of_weight(layer, "weight")
        if how is not None and not taken:
            try:
                shape = shape_of_weight(self._found.read(module, rule)[""].x)
                asked = rule_for(how, "weight", torch.empty(shape, device="meta"), name)
            except (ValueError, KeyError) as error:
                self._found.refuse(name, error)
                return
            self._found.add(layer, module, Rearranged(rule, asked), kind=kind, asked=True)
            return
        if adapter.base is not None:
            try:
                outputs = self._found.read(module, rule)[""].x.shape[-2]
            except Exception:  # it is told below
                outputs = 0
            parts = self._around.fused_parts(path, outputs)
            if parts:
                rule = PartedRule(rule, parts)
        self._found.add(layer, module, rule, kind=kind, without=taken)

    # Layers of other libraries.

    def _add_foreign(self, path: str, layer: str, module: nn.Module, taken: set[str]) -> None:
        """Add what a module without a rule holds, as its sizes and names say."""
        for attribute, shape in weights_of(module):
            if attribute in taken:
                continue
            self._add_weight(path, layer, module, attribute, shape)
        for attribute, x in module.named_buffers(recurse=False):
            if attribute in taken or x.ndim < 2 or not x.is_floating_point():
                continue
            rule = names.rule_by_name(module, attribute, x)
            if rule is not None and names.may_be_a_buffer(module, attribute):
                note = "a buffer: monitored, not penalised"
                kind: Kind = "codebook"
                self._found.add(
                    layer, module, rule, kind=kind, prefix=attribute, note=note, in_buffer=True
                )

    def _add_weight(
        self, path: str, layer: str, module: nn.Module, attribute: str, shape: tuple[int, ...]
    ) -> None:
        """Add one weight of a module without a rule, or say why it is left out."""
        key = key_of(attribute)
        name = full_name(layer, key)
        if self._found.is_unreadable_weight(layer, module, attribute, shape):
            return
        weight = torch.empty(shape, device="meta")
        reason = names.why_no_neurons(module, attribute, weight)
        if reason is not None:
            self._found.skip(name, shape, reason)
            return
        if sizes.is_factor(attribute):
            self._found.skip(name, shape, names.NO_DIRECTIONS)
            return
        rule = sizes.rule_by_sizes(module, attribute, weight)
        if rule is None:
            rule = names.rule_by_name(module, attribute, weight)
        if rule is None:
            self._found.skip(name, shape, _advice(module, attribute, name, weight))
            return
        rule = self._around.parted(path, module, attribute, rule, weight)
        note = ""
        if names.sounds_like_dictionary(attribute):
            note = names.dictionary_note(name, mirrored=rule.columns)
        kind: Kind = "other"
        if attribute == "weight" and weight.ndim == 2:
            kind = "linear"
        if names.is_table_of_codes(module, attribute):
            kind = "codebook"
        self._found.add(layer, module, rule, kind=kind, prefix=key, note=note)


def _advice(module: nn.Module, attribute: str, name: str, weight: Tensor) -> str:
    """Why a weight without a rule is left out, and the line that takes it in."""
    if is_table_of_tokens(attribute, weight):
        return why_tokens_are_left_out(name)
    kind = qualified(module)
    if weight.ndim == 2:
        ways = f"neurons={{'{name}': 'rows'}} or 'columns'"
    else:
        ways = f"neurons={{'{name}': lambda w: ...}}, a function to (..., n, d)"
    return f"no rule for {kind}: {ways}, or see register_neurons"
