"""From rules to named sets of neurons: read, checked, and noted with what cannot be read."""

from __future__ import annotations

from collections.abc import Hashable, Set

import torch
from torch import Tensor, nn

from lightning_hsu._neurons.candidates import (
    Broken,
    Candidates,
    Kind,
    Skip,
    full_name,
    shape_by_group,
)
from lightning_hsu._neurons.how import StoredValues
from lightning_hsu._neurons.placement import NeuronView, Placement
from lightning_hsu._neurons.quantised import qualified, why_unreadable
from lightning_hsu._neurons.rules import Rule, class_rule, has_built_in_rule, rule_of
from lightning_hsu._neurons.target import Target, without_side_effects
from lightning_hsu._neurons.weights import (
    EMBEDDINGS,
    kernel_places,
    key_of,
    memory_of,
    parameters_of,
)


class Found:
    """The sets of neurons found so far, and the weights that are left out.

    Args:
        source: The class of the model.
        placement: How its weights are placed over ranks.
        copies: Modules inside copies of the model.
    """

    def __init__(self, source: str, placement: Placement, copies: Set[nn.Module]) -> None:
        self._placement = placement
        self._copies = copies
        self.candidates = Candidates[Target](source, [], [])

    def skip(self, name: str, shape: tuple[int, ...], reason: str) -> None:
        """Note a weight that is left out, and why."""
        self.candidates.skips.append(Skip(name, shape, reason))

    def refuse(self, name: str, error: Exception) -> None:
        """Note a layer that cannot be read because of what the user said."""
        self.candidates.broken.append(Broken(name, error))

    def is_unreadable_weight(
        self, layer: str, module: nn.Module, attribute: str, shape: tuple[int, ...]
    ) -> bool:
        """Whether one weight of a module cannot be read; then say why, or take its values."""
        name = full_name(layer, key_of(attribute))
        stored = module._parameters.get(attribute)
        if stored is None:
            return False
        reason = why_unreadable(module, attribute, stored)
        if reason is None:
            return False
        if not self._add_values(layer, module, attribute):
            self.skip(name, shape, reason)
        return True

    def _add_values(self, layer: str, module: nn.Module, attribute: str) -> bool:
        """Add a quantised weight whose values can be computed; return whether they can."""
        rule = StoredValues(attribute)
        if rule.values(module) is None:
            return False
        note = "quantised: monitored, not penalised"
        kind: Kind = "linear" if isinstance(module, nn.Linear) else "other"
        self.add(layer, module, rule, kind=kind, prefix=key_of(attribute), note=note)
        return True

    def add(
        self,
        layer: str,
        module: nn.Module,
        rule: Rule,
        *,
        kind: Kind = "other",
        prefix: str = "",
        without: set[str] | None = None,
        asked: bool = False,
        note: str = "",
        in_buffer: bool = False,
    ) -> None:
        """Add the sets of neurons that a rule finds in a module.

        Args:
            layer: Name of the module.
            module: The module.
            rule: The rule.
            kind: Its kind.
            prefix: What the names of its sets have between the layer's name and their keys.
            without: Weights of the module that the user has named: sets of them are left out.
            asked: Whether the user has named it.
            note: What a user should know of how it is read.
            in_buffer: Whether they are in a buffer, which something else than gradients moves.
        """
        is_users = rule is class_rule and not has_built_in_rule(module)
        try:
            views = self.read(module, rule)
            for key, view in views.items():
                name = full_name(layer, f"{prefix}.{key}".strip("."))
                _check_rule(module, name, view, is_own=not is_users)
        except Exception as error:
            name = full_name(layer, prefix)
            if is_users or asked:
                self.refuse(name, error)
            else:
                shape = tuple(next((p.shape for p in module.parameters()), ()))
                self.skip(name, shape, _unread(module, error))
            return
        frozen_by_kind = isinstance(rule, StoredValues)
        for key, view in views.items():
            if without and self._depends_on(module, rule, key, view, without):
                continue
            name = full_name(layer, f"{prefix}.{key}".strip("."))
            if not view.x.is_floating_point():
                reason = f"its weights are {view.x.dtype}, not floating-point"
                self.skip(name, tuple(view.x.shape), reason)
                continue
            in_copy = module in self._copies
            trains = not frozen_by_kind and not in_copy and _may_train(view)
            target = Target(
                name=name,
                layer=layer,
                shape=shape_by_group(view.x),
                kind=kind,
                identity=_identity(module, rule, name, view),
                module=module,
                rule=rule,
                key=key,
                placement=self._placement,
                asked=asked,
                trains=trains,
                in_copy=in_copy,
                in_buffer=in_buffer,
                kernel=kernel_places(module),
                note=note,
            )
            self.candidates.sets.append(target)

    def read(self, module: nn.Module, rule: Rule) -> dict[str, NeuronView]:
        """The neurons of a module; a view knows its parameter only if autograd records it."""
        with torch.inference_mode(False), torch.enable_grad(), without_side_effects(module):
            return self._placement.read(module, rule)

    def _depends_on(
        self, module: nn.Module, rule: Rule, key: str, view: NeuronView, attributes: set[str]
    ) -> bool:
        """Whether neurons depend on one of these weights of their module."""
        named = set()
        for attribute in attributes:
            for p in parameters_of(module, attribute):
                named.add(id(p))
        if view.parameter is not None:
            return id(view.parameter) in named
        behind = self._placement.parameters_behind(module, rule, key)
        return any(id(p) in named for p in behind)


def _check_rule(module: nn.Module, name: str, view: NeuronView, *, is_own: bool) -> None:
    """Refuse what a rule must not return; only a user's own may be wrong about gradients."""
    x: object = view.x
    rule = f"the rule for {type(module).__name__} gave"
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{rule} {type(x).__name__} for layer '{name}'; it must give a tensor, or a mapping of "
            "names to tensors"
        )
    if x.ndim not in (2, 3):
        raise ValueError(
            f"{rule} neurons of shape {tuple(x.shape)} for layer '{name}'; it must give (n, d) or "
            "(groups, n, d)"
        )
    if is_own or rule_of(module) is None:
        return
    trains = all(p.requires_grad for p in module.parameters())
    detached = view.parameter is None and not x.requires_grad
    if trains and detached and x.is_floating_point():
        raise ValueError(
            f"{rule} detached neurons for layer '{name}': no gradient would reach its parameters; "
            "drop .detach() or .data"
        )


def _unread(module: nn.Module, error: Exception) -> str:
    """Why a layer could not be read: an error in somebody else's code."""
    text = str(error).split("\n")[0][:100]
    return (
        f"{qualified(module)} could not be read ({type(error).__name__}: {text}); see "
        "register_neurons"
    )


def _may_train(view: NeuronView) -> bool:
    """Whether a gradient could reach neurons."""
    if view.parameter is not None:
        return view.parameter.requires_grad
    return view.x.requires_grad


def _identity(module: nn.Module, rule: Rule, name: str, view: NeuronView) -> Hashable:
    """Equal for two sets of neurons that are the same entries of one parameter."""
    x: Tensor | None = view.x
    parameter = view.parameter
    if isinstance(module, EMBEDDINGS) and rule is class_rule:
        # The whole table: a tied head has a neuron for the padding, too.
        weight = module._parameters.get("weight")
        x = weight
        parameter = weight
    if x is None or parameter is None:
        return id(module), name
    if x.ndim == 2:
        x = x.unsqueeze(0)
    return memory_of(parameter), x.storage_offset(), x.stride(), x.shape
