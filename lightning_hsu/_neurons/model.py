"""The sets of neurons of a model."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_hsu._neurons import names, sizes
from lightning_hsu._neurons.adapters import Adapter, adapter_of, unused_of
from lightning_hsu._neurons.candidates import (
    Broken,
    Candidates,
    Kind,
    Skip,
    full_name,
    shape_by_group,
)
from lightning_hsu._neurons.fused import Part, parts_of
from lightning_hsu._neurons.heads import declared_heads, is_copy
from lightning_hsu._neurons.how import (
    CentredRule,
    How,
    Neurons,
    PartedRule,
    Rearranged,
    StoredValues,
    WeightRule,
    check_neurons,
    rule_for,
)
from lightning_hsu._neurons.patterns import hidden_pattern, matches, unknown_pattern
from lightning_hsu._neurons.placement import NeuronView, Placement, placement_of
from lightning_hsu._neurons.quantised import qualified, why_unreadable
from lightning_hsu._neurons.rules import (
    Rule,
    class_rule,
    effective_weight,
    has_built_in_rule,
    rule_of,
)
from lightning_hsu._neurons.target import Target, without_side_effects
from lightning_hsu._neurons.wrappers import plain_name

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_PARTS = ("orig", "g", "v")  # of a weight that an older hook of torch's computes
_UNUSED = "a copy that the forward pass does not use: another one has its place"
_SCRIPTED = (
    "TorchScript: its layers' kinds are not known; measure the model before torch.jit.script, or "
    "lightning_hsu.report.report on its state_dict()"
)
_LEVELS = 4  # from a fused projection up to the module that knows its sizes
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_READ_BY_ROWS = (*_EMBEDDINGS, *_CONVOLUTIONS, nn.Bilinear)  # "rows" is how they are read anyway


def neurons_of_model(
    model: nn.Module, placement: Placement | None = None, neurons: Neurons = None
) -> Candidates[Target]:
    """Find every set of neurons of a model. A collective call if its weights are sharded.

    Args:
        model: Any module.
        placement: How its weights are placed over ranks; None looks at the model.
        neurons: Patterns of weights' names, each with how such weights hold neurons.

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
    return _Finder(model, placement, check_neurons(neurons)).find()


class _Finder:
    """Goes through a model once.

    Args:
        model: The model.
        placement: How its weights are placed over ranks.
        asked: The user's patterns of weights' names.
    """

    def __init__(self, model: nn.Module, placement: Placement, asked: Mapping[str, How]) -> None:
        self._model = model
        self._placement = placement
        self._asked = asked
        self._used: set[str] = set()  # patterns that matched a weight
        self._deciding: set[str] = set()  # those that did so first
        self._found = Candidates[Target](type(model).__name__, [], [])
        self._modules = dict(model.named_modules())
        self._left_out: set[nn.Module] = set()  # parts of layers, such as the factors of adapters
        self._unused: set[nn.Module] = set()  # copies of which others are in use
        self._computing: set[nn.Module] = set()  # parametrizations
        self._copies: set[nn.Module] = set()
        self._adapters: dict[nn.Module, Adapter] = {}
        self._counts: dict[nn.Module, int] = {}  # children with weights
        self._weights: list[str] = []  # names of all weights, for errors

    def find(self) -> Candidates[Target]:
        """The candidates."""
        for module in self._modules.values():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if is_copy(module):
                self._copies.update(module.modules())
            if isinstance(module, ParametrizationList):
                self._computing.update(module.modules())
            for unused in unused_of(module):
                self._left_out.update(unused.modules())
                self._unused.add(unused)
            is_part = module in self._left_out or module in self._computing
            if is_part or _has_users_rule(module):
                continue
            adapter = adapter_of(module)
            if adapter is not None:  # some share factors, which may come first
                self._adapters[module] = adapter
                self._left_out.update(adapter.inside)
        for path, module in self._modules.items():
            self._add_module(path, module)
        for pattern in self._asked:
            if pattern not in self._used:
                raise ValueError(unknown_pattern("neurons", pattern, self._weights, "weight"))
            if pattern not in self._deciding:
                raise ValueError(hidden_pattern("neurons", pattern))
        for module, heads in declared_heads(self._model).items():
            self._add_declared(module, heads)
        return self._found

    def _add_declared(self, module: nn.Module, heads: Sequence[nn.Module]) -> None:
        """Note the sets of the layers that a module declares to be heads, and its name."""
        for head in heads:
            inside = set(head.modules())
            names_inside = [one.layer for one in self._found.sets if one.module in inside]
            for target in self._found.sets:
                # Of several layers, as in a head of two, the last one.
                if names_inside and target.layer == names_inside[-1]:
                    self._found.declared.append(target.name)
        for path, other in self._modules.items():
            if other is module:
                self._found.declaring.append(plain_name(path))

    def _add_module(self, path: str, module: nn.Module) -> None:
        """Add the sets of neurons of one module, and its weights that are left out."""
        layer = plain_name(path)
        if module in self._computing:
            return
        if isinstance(module, torch.jit.ScriptModule):
            for name, p in module.named_parameters(recurse=False):
                if p.ndim >= 2:
                    self._skip(full_name(layer, name), shape_of_weight(p), _SCRIPTED)
            return
        taken = self._add_asked(path, layer, module)
        if module in self._unused:
            for name, p in module.named_parameters():
                if p.ndim >= 2:
                    self._skip(full_name(layer, name), shape_of_weight(p), _UNUSED)
        if module in self._left_out:
            return
        if module in self._adapters:
            self._add_adapted(path, layer, module, self._adapters[module], taken)
            return
        if rule_of(module) is None:
            self._add_foreign(path, layer, module, taken)
            return
        if self._is_unreadable(layer, module, taken):
            return
        rule: Rule = class_rule
        if has_built_in_rule(module):
            rule = self._refined(path, module)
            reason = _why_computed(module)
            if reason is not None:
                shape = shape_of_weight(module.__dict__.get("weight", torch.empty(0)))
                self._skip(full_name(layer, ""), shape, reason)
                return
        kind = self._kind_of(path, module)
        note = self._note(path, module)
        self._add_sets(layer, module, rule, kind=kind, without=taken, note=note)

    # What the user asked for.

    def _add_asked(self, path: str, layer: str, module: nn.Module) -> set[str]:
        """Add the weights of a module that the user has named; return their attributes."""
        taken = set()
        for attribute, p in module._parameters.items():
            if p is not None and nn.parameter.is_lazy(p):  # read when it has a shape
                name = full_name(layer, "" if attribute == "weight" else attribute)
                self._weights.append(name)
                self._asked_how(name, full_name(layer, attribute), attribute, 2)
        for attribute, shape in _weights_of(module):
            key = "" if attribute == "weight" else attribute
            name = full_name(layer, key)
            exact = full_name(layer, attribute)
            self._weights.append(name)
            is_part = module in self._left_out
            how = self._asked_how(name, exact, attribute, len(shape), only_exact=is_part)
            if how is None:
                continue
            taken.add(attribute)
            if self._is_unreadable_weight(layer, module, attribute, shape):
                continue
            try:
                rule = self._asked_rule(how, path, module, attribute, shape, name)
            except (ValueError, TypeError) as error:
                self._found.broken.append(Broken(name, error))
                continue
            kind = self._kind_of(path, module)
            self._add_sets(layer, module, rule, kind=kind, prefix=key, asked=True)
        for attribute, x in module.named_buffers(recurse=False):
            name = full_name(layer, attribute)
            how = None
            is_mask = attribute.endswith("_mask") and f"{attribute[:-5]}_orig" in module._parameters
            if x.ndim >= 2 and x.is_floating_point() and not is_mask:
                how = self._asked_how(name, name, attribute, x.ndim, only_exact=True)
            if how is not None:
                taken.add(attribute)
                try:
                    rule = rule_for(how, attribute, x, name)
                except ValueError as error:
                    self._found.broken.append(Broken(name, error))
                    continue
                self._add_sets(layer, module, rule, prefix=attribute, asked=True, in_buffer=True)
        return taken

    def _asked_how(
        self, name: str, exact: str, attribute: str, ndim: int, *, only_exact: bool = False
    ) -> How | None:
        """What the user says of a weight; the first pattern that matches counts.

        Args:
            name: Name of the layer, with that of the weight unless this is "weight".
            exact: The same with the name of the weight.
            attribute: Name of the weight in its module.
            ndim: How many axes it has.
            only_exact: Whether only its whole name asks for it, no pattern: an adapter's factor, or
                a buffer.
        """
        found: How | None = None
        for pattern, how in self._asked.items():
            is_named = any(matches(one, [pattern], below=False) for one in (name, exact))
            is_below = matches(name, [pattern]) and ndim >= 2 and "bias" not in attribute
            if only_exact:
                is_named = pattern in (name, exact)
                is_below = False
            if is_named or is_below:
                self._used.add(pattern)
                if found is None:
                    found = how
                    self._deciding.add(pattern)
        return found

    def _asked_rule(
        self,
        how: How,
        path: str,
        module: nn.Module,
        attribute: str,
        shape: tuple[int, ...],
        name: str,
    ) -> Rule:
        """The rule that reads a weight as the user says."""
        is_weight = attribute == "weight"
        if is_weight and how == "rows" and isinstance(module, _READ_BY_ROWS):
            return self._refined(path, module)
        kernels = is_weight and isinstance(module, _CONVOLUTIONS)
        groups = 1
        if kernels:
            assert isinstance(module.groups, int)
            groups = module.groups
        padded = is_weight and getattr(module, "padding_idx", None) is not None
        if padded:
            shape = (shape[0] - 1, *shape[1:])
        rule = rule_for(
            how,
            attribute,
            torch.empty(shape, device="meta"),
            name,
            kernels=kernels,
            groups=groups,
            transposed=kernels and isinstance(module, nn.modules.conv._ConvTransposeNd),
        )
        if padded and isinstance(module, _EMBEDDINGS):
            return Rearranged(class_rule, rule)
        return rule

    # Layers of torch.

    def _refined(self, path: str, module: nn.Module) -> Rule:
        """The rule of one of torch's layers, with what the module around it says."""
        if isinstance(module, _CONVOLUTIONS) and names.is_standardised(module):
            return CentredRule(class_rule)
        if not isinstance(module, nn.Linear):
            return class_rule
        parts = self._fused_parts(path, module.out_features)
        if parts:
            return WeightRule("weight", parts=parts)
        if self._is_mirrored(path, module):
            return WeightRule("weight", columns=True)
        return class_rule

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

    def _note(self, path: str, module: nn.Module) -> str:
        """What a user should know of how a Linear is read."""
        if not isinstance(module, nn.Linear) or not names.sounds_like_dictionary(path):
            return ""
        mirrored = self._is_mirrored(path, module)
        return names.dictionary_note(full_name(plain_name(path), ""), mirrored=mirrored)

    def _kind_of(self, path: str, module: nn.Module) -> Kind:
        if isinstance(module, nn.Linear):
            return "linear"
        if isinstance(module, _CONVOLUTIONS):
            return "convolution"
        if isinstance(module, _EMBEDDINGS):
            parent, name = self._parent(path)
            is_table = parent is not None and names.is_codebook(parent, name)
            if is_table or names.means_codebook(path) or names.means_prototypes(path):
                return "codebook"
            return "embedding"
        return "other"

    def _parent(self, path: str) -> tuple[nn.Module | None, str]:
        """The module that holds the one at a path, and the name under which it does."""
        above, _, name = path.rpartition(".")
        if not path:
            return None, ""
        return self._modules.get(above), name

    def _is_unreadable(self, layer: str, module: nn.Module, taken: set[str]) -> bool:
        """Whether the weights of a module with a rule cannot be read; then say why."""
        is_torch_layer = has_built_in_rule(module)
        for key, p in module._parameters.items():
            if p is None or key in taken:
                continue
            if nn.parameter.is_lazy(p):
                reason = "a lazy layer that has seen no batch: it has no shape yet"
                self._skip(full_name(layer, "" if key == "weight" else key), (), reason)
                return True
        for key, p in module._parameters.items():
            if p is None or key in taken or "bias" in key or not is_torch_layer:
                continue
            if self._is_unreadable_weight(layer, module, key, shape_of_weight(p)):
                return True
        if any(p.is_meta for p in module.parameters()):
            self._skip(full_name(layer, ""), (), "it holds no numbers yet (device meta): load them")
            return True
        return False

    def _add_adapted(
        self, path: str, layer: str, module: nn.Module, adapter: Adapter, taken: set[str]
    ) -> None:
        """Add the effective weight of a layer with an adapter, or say why it is left out."""
        if adapter.rule is None:
            shape = tuple(next((p.shape for p in module.parameters() if p.ndim >= 2), ()))
            self._skip(full_name(layer, ""), shape, adapter.reason)
            return
        rule: Rule = adapter.rule
        kind = _kind_of_base(adapter.base)
        name = full_name(layer, "")
        self._weights.append(name)
        how = self._asked_how(name, f"{layer}.weight", "weight", 2)
        if how is not None and not taken:
            try:
                shape = shape_of_weight(self._read(module, rule)[""].x)
                asked = rule_for(how, "weight", torch.empty(shape, device="meta"), name)
            except (ValueError, KeyError) as error:
                self._found.broken.append(Broken(name, error))
                return
            self._add_sets(layer, module, Rearranged(rule, asked), kind=kind, asked=True)
            return
        if adapter.base is not None:
            try:
                outputs = self._read(module, rule)[""].x.shape[-2]
            except Exception:  # it is told below
                outputs = 0
            parts = self._fused_parts(path, outputs)
            if parts:
                rule = PartedRule(rule, parts)
        self._add_sets(layer, module, rule, kind=kind, without=taken)

    def _is_unreadable_weight(
        self, layer: str, module: nn.Module, attribute: str, shape: tuple[int, ...]
    ) -> bool:
        """Whether one weight of a module cannot be read; then say why, or take its values."""
        name = full_name(layer, "" if attribute == "weight" else attribute)
        stored = module._parameters.get(attribute)
        if stored is None:
            return False
        reason = why_unreadable(module, attribute, stored)
        if reason is None:
            return False
        if not self._add_values(layer, module, attribute):
            self._skip(name, shape, reason)
        return True

    # Layers of other libraries.

    def _add_foreign(self, path: str, layer: str, module: nn.Module, taken: set[str]) -> None:
        """Add what a module without a rule holds, as its sizes and names say."""
        for attribute, shape in _weights_of(module):
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
                self._add_sets(
                    layer, module, rule, kind=kind, prefix=attribute, note=note, in_buffer=True
                )

    def _add_weight(
        self, path: str, layer: str, module: nn.Module, attribute: str, shape: tuple[int, ...]
    ) -> None:
        """Add one weight of a module without a rule, or say why it is left out."""
        key = "" if attribute == "weight" else attribute
        name = full_name(layer, key)
        if self._is_unreadable_weight(layer, module, attribute, shape):
            return
        weight = torch.empty(shape, device="meta")
        reason = names.why_no_neurons(module, attribute, weight)
        if reason is not None:
            self._skip(name, shape, reason)
            return
        if sizes.is_factor(attribute):
            self._skip(name, shape, "a factor or shift by entry: it has no directions")
            return
        rule = sizes.rule_by_sizes(module, attribute, weight)
        if rule is None:
            rule = names.rule_by_name(module, attribute, weight)
        if rule is None:
            self._skip(name, shape, _advice(module, attribute, name, weight))
            return
        parts = self._parts(path, module, attribute, rule, weight)
        if parts is not None:
            rule = parts
        note = ""
        if names.sounds_like_dictionary(attribute):
            note = names.dictionary_note(name, mirrored=rule.columns)
        kind: Kind = "other"
        if attribute == "weight" and weight.ndim == 2:
            kind = "linear"
        if names.is_table_of_codes(module, attribute):
            kind = "codebook"
        self._add_sets(layer, module, rule, kind=kind, prefix=key, note=note)

    def _fused_parts(self, path: str, outputs: int) -> tuple[Part, ...]:
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

    def _children_with_weights(self, module: nn.Module) -> int:
        """How many children of a module have weights of two or more axes."""
        if module not in self._counts:
            count = 0
            for child in module.children():
                count += any(p.ndim >= 2 for p in child.parameters())
            self._counts[module] = count
        return self._counts[module]

    def _parts(
        self, path: str, module: nn.Module, attribute: str, rule: WeightRule, weight: Tensor
    ) -> WeightRule | None:
        """The rule with the parts of a fused projection; None if it is not fused."""
        outputs = rule.arrange(weight).shape[-2]
        parts = parts_of(module, attribute, outputs)
        if not parts and attribute == "weight":
            parts = self._fused_parts(path, outputs)
        if not parts:
            return None
        return WeightRule(attribute, columns=rule.columns, kernels=rule.kernels, parts=parts)

    # Sets.

    def _add_values(self, layer: str, module: nn.Module, attribute: str) -> bool:
        """Add a quantised weight whose values can be computed; return whether they can."""
        rule = StoredValues(attribute)
        if rule.values(module) is None:
            return False
        key = "" if attribute == "weight" else attribute
        note = "quantised: monitored, not penalised"
        kind: Kind = "linear" if isinstance(module, nn.Linear) else "other"
        self._add_sets(layer, module, rule, kind=kind, prefix=key, note=note)
        return True

    def _add_sets(
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
            views = self._read(module, rule)
            for key, view in views.items():
                name = full_name(layer, f"{prefix}.{key}".strip("."))
                _check_rule(module, name, view, is_own=not is_users)
        except Exception as error:
            name = full_name(layer, prefix)
            if is_users or asked:
                self._found.broken.append(Broken(name, error))
            else:
                shape = tuple(next((p.shape for p in module.parameters()), ()))
                self._skip(name, shape, _unread(module, error))
            return
        frozen_by_kind = isinstance(rule, StoredValues)
        for key, view in views.items():
            if without and self._depends_on(module, rule, key, view, without):
                continue
            name = full_name(layer, f"{prefix}.{key}".strip("."))
            if not view.x.is_floating_point():
                reason = f"its weights are {view.x.dtype}, not floating-point"
                self._skip(name, tuple(view.x.shape), reason)
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
                kernel=_kernel_places(module),
                note=note,
            )
            self._found.sets.append(target)

    def _depends_on(
        self, module: nn.Module, rule: Rule, key: str, view: NeuronView, attributes: set[str]
    ) -> bool:
        """Whether neurons depend on one of these weights of their module."""
        named = set()
        for attribute in attributes:
            for p in _parameters_of(module, attribute):
                named.add(id(p))
        if view.parameter is not None:
            return id(view.parameter) in named
        behind = self._placement.parameters_behind(module, rule, key)
        return any(id(p) in named for p in behind)

    def _read(self, module: nn.Module, rule: Rule) -> dict[str, NeuronView]:
        """The neurons of a module; a view knows its parameter only if autograd records it."""
        with torch.inference_mode(False), torch.enable_grad(), without_side_effects(module):
            return self._placement.read(module, rule)

    def _skip(self, name: str, shape: tuple[int, ...], reason: str) -> None:
        self._found.skips.append(Skip(name, shape, reason))


def _parameters_of(module: nn.Module, attribute: str) -> list[nn.Parameter]:
    """The parameters that are, or make up, a weight of a module."""
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict) and attribute in parametrizations:
        return list(parametrizations[attribute].parameters())
    found = []
    for name, p in module._parameters.items():
        if p is not None and name in (attribute, *(f"{attribute}_{part}" for part in _PARTS)):
            found.append(p)
    return found


def _weights_of(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The weights of a module with two or more axes: names as its forward pass uses them, shapes.

    Parametrized weights and those of older norms and pruning count under their own name.
    """
    computed: set[str] = set()  # names of parameters from which a weight is computed
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        if isinstance(name, str) and isinstance(getattr(module, name, None), Tensor):
            computed.update(f"{name}_{part}" for part in _PARTS)
            x = getattr(module, name)
            if x.ndim >= 2:
                yield name, tuple(x.shape)
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict):
        with torch.no_grad(), without_side_effects(module):
            for name in parametrizations:
                x = getattr(module, name)
                if x.ndim >= 2:
                    yield name, tuple(x.shape)
    for name, p in module._parameters.items():
        if p is None or name in computed or nn.parameter.is_lazy(p):
            continue
        if p.ndim >= 2:
            yield name, shape_of_weight(p)


def shape_of_weight(x: Tensor) -> tuple[int, ...]:
    """The shape of a weight; () if it has none, as a nested tensor."""
    try:
        return tuple(x.shape)
    except RuntimeError:
        return ()


def _may_train(view: NeuronView) -> bool:
    """Whether a gradient could reach neurons."""
    if view.parameter is not None:
        return view.parameter.requires_grad
    return view.x.requires_grad


def _kernel_places(module: nn.Module) -> int:
    """How many places the kernel of a convolution has; 1 for other layers."""
    if isinstance(module, _CONVOLUTIONS):
        return math.prod(module.kernel_size)
    return 1


def _has_users_rule(module: nn.Module) -> bool:
    """Whether a user has registered a rule for a module's class."""
    return rule_of(module) is not None and not has_built_in_rule(module)


def _kind_of_base(base: object) -> Kind:
    """The kind of layer that an adapter wraps."""
    if isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D":
        return "linear"
    if isinstance(base, _CONVOLUTIONS):
        return "convolution"
    if isinstance(base, _EMBEDDINGS):
        return "embedding"
    return "other"


def _why_computed(module: nn.Module) -> str | None:
    """Why the weight of one of torch's layers is not known: it is set anew in each forward pass."""
    if hasattr(module, "parametrizations"):
        return None
    if not hasattr(module, "weight"):
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_EMBEDDINGS)):
            return f"{qualified(module)} has lost its weight: it is set in the forward pass"
        return None
    weight = module.__dict__.get("weight")
    if not isinstance(weight, Tensor):
        return None
    if effective_weight(module, "weight") is not weight:
        return None  # a hook of torch's computes it
    others = [name for name, p in module._parameters.items() if p is not None and p.ndim >= 2]
    source = f", from {', '.join(others)}" if others else ""
    return (
        f"its weight is computed in the forward pass{source}: no gradient would reach it from "
        "here; compute it by torch.nn.utils.parametrize, or see register_neurons"
    )


def _advice(module: nn.Module, attribute: str, name: str, weight: Tensor) -> str:
    """Why a weight without a rule is left out, and the line that takes it in."""
    if names.is_table_of_tokens(attribute, weight):
        return (
            "an embedding of tokens or positions, measured only when asked for: "
            f"neurons={{'{name}': 'rows'}}"
        )
    kind = qualified(module)
    if weight.ndim == 2:
        ways = f"neurons={{'{name}': 'rows'}} or 'columns'"
    else:
        ways = f"neurons={{'{name}': lambda w: ...}}, a function to (..., n, d)"
    return f"no rule for {kind}: {ways}, or see register_neurons"


def _unread(module: nn.Module, error: Exception) -> str:
    """Why a layer could not be read: an error in somebody else's code."""
    text = str(error).split("\n")[0][:100]
    return (
        f"{qualified(module)} could not be read ({type(error).__name__}: {text}); see "
        "register_neurons"
    )


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


def _identity(module: nn.Module, rule: Rule, name: str, view: NeuronView) -> Hashable:
    """Equal for two sets of neurons that are the same entries of one parameter."""
    x: Tensor | None = view.x
    parameter = view.parameter
    if isinstance(module, _EMBEDDINGS) and rule is class_rule:
        # The whole table: a tied head has a neuron for the padding, too.
        weight = module._parameters.get("weight")
        x = weight
        parameter = weight
    if x is None or parameter is None:
        return id(module), name
    if x.ndim == 2:
        x = x.unsqueeze(0)
    return _memory_of(parameter), x.storage_offset(), x.stride(), x.shape


def _memory_of(parameter: nn.Parameter) -> int:
    """The same for two parameters that share their memory, as weights tied by transposing do."""
    if type(parameter) is nn.Parameter and parameter.device.type in ("cpu", "cuda"):
        return parameter.untyped_storage().data_ptr() or id(parameter)
    return id(parameter)
