"""What the modules around a layer say of it: its kind, what is fused in it, what it mirrors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lightning_hsu._neurons import names
from lightning_hsu._neurons.candidates import Kind, full_name
from lightning_hsu._neurons.fused import Part, parts_of
from lightning_hsu._neurons.how import CentredRule, WeightRule
from lightning_hsu._neurons.rules import Rule, class_rule
from lightning_hsu._neurons.weights import CONVOLUTIONS, EMBEDDINGS
from lightning_hsu._neurons.wrappers import plain_name

_LEVELS = 4  # from a fused projection up to the module that knows its sizes


class Surroundings:
    """The modules of a model, asked for what they say of a layer inside them.

    Args:
        modules: The modules by their paths.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._counts: dict[nn.Module, int] = {}  # children with weights

    def rule_of_layer(self, path: str, module: nn.Module) -> Rule:
        """The rule of one of torch's layers, with what the module around it says."""
        if isinstance(module, CONVOLUTIONS) and names.is_standardised(module):
            return CentredRule(class_rule)
        if not isinstance(module, nn.Linear):
            return class_rule
        parts = self.fused_parts(path, module.out_features)
        if parts:
            return WeightRule("weight", parts=parts)
        if self._is_mirrored(path, module):
            return WeightRule("weight", columns=True)
        return class_rule

    def note_of(self, path: str, module: nn.Module) -> str:
        """What a user should know of how a Linear is read."""
        if not isinstance(module, nn.Linear) or not names.sounds_like_dictionary(path):
            return ""
        mirrored = self._is_mirrored(path, module)
        return names.dictionary_note(full_name(plain_name(path), ""), mirrored=mirrored)

    def kind_of(self, path: str, module: nn.Module) -> Kind:
        """The kind of a layer; a codebook is an embedding that what is around it names so."""
        kind = kind_by_class(module)
        if kind == "embedding":
            parent, name = self._parent(path)
            is_table = parent is not None and names.is_codebook(parent, name)
            if is_table or names.means_codebook(path) or names.means_prototypes(path):
                return "codebook"
        return kind

    def fused_parts(self, path: str, outputs: int) -> tuple[Part, ...]:
        """The parts of the weight of a module, which an owner some levels above may tell.

        Between them are only containers, and modules around a single layer.
        """
        for _ in range(_LEVELS):
            parent, name = self._parent(path)
            if parent is None:
                return ()
            parts = parts_of(parent, name, outputs)
            if parts:
                return parts
            is_container = isinstance(parent, (nn.ModuleDict, nn.ModuleList))
            if not is_container and self._children_with_weights(parent) > 1:
                return ()
            path = path.rpartition(".")[0]
        return ()

    def parted(
        self, path: str, module: nn.Module, attribute: str, rule: WeightRule, weight: Tensor
    ) -> WeightRule:
        """The rule with the parts of a fused projection; as it is if the weight is not fused."""
        outputs = rule.arrange(weight).shape[-2]
        parts = parts_of(module, attribute, outputs)
        if not parts and attribute == "weight":
            parts = self.fused_parts(path, outputs)
        if not parts:
            return rule
        return replace(rule, parts=parts)

    def _is_mirrored(self, path: str, module: nn.Linear) -> bool:
        """Whether a Linear, alone in the modules up to its encoder's, is mirrored by that."""
        for _ in range(_LEVELS):
            parent, name = self._parent(path)
            if parent is None:
                return False
            if names.mirrored_encoder(parent, name, module):
                return True
            if self._children_with_weights(parent) > 1:
                return False
            path = path.rpartition(".")[0]
        return False

    def _parent(self, path: str) -> tuple[nn.Module | None, str]:
        """The module that holds the one at a path, and the name under which it does."""
        above, _, name = path.rpartition(".")
        if not path:
            return None, ""
        return self._modules.get(above), name

    def _children_with_weights(self, module: nn.Module) -> int:
        """How many children of a module have weights of two or more axes."""
        if module not in self._counts:
            count = 0
            for child in module.children():
                count += any(p.ndim >= 2 for p in child.parameters())
            self._counts[module] = count
        return self._counts[module]


def kind_by_class(module: object) -> Kind:
    """The kind of a layer as its class alone tells."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, CONVOLUTIONS):
        return "convolution"
    if isinstance(module, EMBEDDINGS):
        return "embedding"
    return "other"


def kind_of_base(base: object) -> Kind:
    """The kind of layer that an adapter wraps."""
    if type(base).__name__ == "Conv1D":
        return "linear"
    return kind_by_class(base)
