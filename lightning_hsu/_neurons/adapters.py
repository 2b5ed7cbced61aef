"""Fine-tuning adapters: the effective weight of an adapted layer, known by what the layer holds.

No adapter library is imported: LoRA and its relatives of peft, loralib, litgpt and torchtune are
recognised by their attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_hsu._neurons.quantised import plain_values, qualified, why_unreadable
from lightning_hsu._neurons.rules import Rule, effective_weight, rule_of

_WAY_OUT = "merge it into its layer (merge_and_unload), or see register_neurons"

# Adapters of peft by the beginning of their factors' names.
_ADDED = (  # get_delta_weight gives what is added to the weight
    "lora_",
    "hada_",
    "lokr_",
    "vera_",
    "pvera_",
    "randlora_",
    "fourierft_",
    "c3a_",
    "vblora_",
    "unilora_",
    "shira_",
    "supertuning_",
    "tinylora_",
    "waveft_",
    "gralora_",
    "adamss_",
    "delora_",
    "deft_",
    "osf_",
    "peanut_",
    "psoft_",
    "frod_",
)
_TURNED = {"oft_": "OFT", "boft_": "BOFT", "hra_": "HRA"}
_ALONE = ("c3a_", "osf_")  # the changes of several such adapters do not add up
_STORED_AS_BASE = ("lora_", "vera_", "vblora_", "hira_")  # also if that has columns
_PLAIN_VARIANTS = ("DoraLinear", "DoraEmbedding", "DoraConv", "MiCA")  # of LoRA
_PROMPTS = ("BasePromptEncoder", "PromptEmbedding", "PrefixEncoder", "PromptEncoder")


@dataclass(frozen=True)
class Adapter:
    """A layer with a fine-tuning adapter around or inside it.

    Args:
        rule: Reads the effective neurons of the wrapped layer, differentiably to the factors and to
            the base weight; None if they are not known.
        reason: Why it is not measured, for the user; "" if there is a rule.
        inside: Submodules that are not layers of their own: factors, dropouts, the base layer.
        hidden: Names, from the wrapper on, of its own parameters that are factors.
        base: The layer that is adapted, which tells of what kind it is; None if there is none.
    """

    rule: Rule | None
    reason: str
    inside: tuple[nn.Module, ...]
    hidden: tuple[str, ...]
    base: nn.Module | None = None


class _UnreadableError(Exception):
    """The effective weight cannot be read, for the reason that is the message."""


def adapter_of(module: nn.Module) -> Adapter | None:
    """What is known of a module that is an adapter, or has one in it; None if it is neither.

    Ask before the module's class is looked at: some adapters derive from Linear without a weight of
    their own.

    Example:
        >>> adapter_of(nn.Linear(2, 2)) is None
        True
    """
    if _is_tuner(module):
        if "ln_tuning_layers" in module._modules:
            return None  # whole copies: see unused_of
        return _tuner(module)
    if any(kind.__name__ in _PROMPTS for kind in type(module).__mro__):
        reason = f"{qualified(module)}: learned prompts are no neurons of a layer"
        return Adapter(None, reason, _inside(module), _names(module))
    if "adaption_prompt" in module._parameters:
        reason = f"{qualified(module)}: learned prompts are no neurons of a layer"
        return Adapter(None, reason, (), ("adaption_prompt", "adaption_gate"))
    if _is_loralib(module):
        layer = _loralib_layer(module)
        hidden = _names(module, besides=layer)
        return _tried(module, _loralib_neurons, _inside(module), hidden, layer)
    if _is_torchtune(module):
        hidden = _names(module, besides=module)
        return _tried(module, _torchtune_neurons, _inside(module), hidden, module)
    return None


def unused_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """The modules inside a wrapper of copies that its forward pass does not use now.

    Such wrappers are peft's ``modules_to_save`` and its tuned normalisation layers. Unused are the
    original if a copy is active, and copies that are not active.
    """
    original, copies, active = _copies(module)
    unused = []
    for one in [original, *copies]:
        used = original if active is None else active
        if one is not None and one is not used:
            unused.append(one)
    return tuple(unused)


def _copies(module: nn.Module) -> tuple[nn.Module | None, list[nn.Module], nn.Module | None]:
    """The original in a wrapper, its trained copies, and the copy that is active, if any is."""
    parts = module._modules
    copies = parts.get("modules_to_save")
    original = parts.get("original_module")
    if copies is None:
        copies = parts.get("ln_tuning_layers")
        original = parts.get("base_layer")
    if not isinstance(copies, nn.ModuleDict) or original is None:
        return None, [], None
    active: Any = module.__dict__.get("_active_adapter", [])
    if isinstance(active, str):
        active = [active]
    merged = module.__dict__.get("merged_adapters")
    if module.__dict__.get("_disable_adapters", False) or merged:
        active = []
    found = [copies[name] for name in active if name in copies]
    return original, list(copies.values()), found[0] if found else None


# What an adapter consists of.


def _inside(module: nn.Module, apart: nn.Module | None = None) -> tuple[nn.Module, ...]:
    """All submodules except those of one part, which is walked on its own."""
    kept = set() if apart is None else set(apart.modules())
    inside = []
    for one in module.modules():
        if one is not module and one not in kept:
            inside.append(one)
    return tuple(inside)


def _names(module: nn.Module, besides: nn.Module | None = None) -> tuple[str, ...]:
    """Names of a module's parameters, except those of one of its parts.

    If this part is the module itself, its weight and bias are left out.
    """
    left_out = set()
    if besides is module:
        left_out = {id(module._parameters.get(name)) for name in ("weight", "bias")}
    elif besides is not None:
        left_out = {id(p) for p in besides.parameters()}
    names = []
    for name, p in module.named_parameters(remove_duplicate=False):
        if id(p) not in left_out:
            names.append(name)
    return tuple(names)


def _tried(
    module: nn.Module,
    rule: Rule,
    inside: tuple[nn.Module, ...],
    hidden: tuple[str, ...],
    base: nn.Module,
) -> Adapter:
    """An adapter with this rule, or without one and with the reason if the rule fails."""
    reason = ""
    if not any(hasattr(p, "full_tensor") for p in module.parameters()):
        try:
            with torch.no_grad():
                rule(module)
        except _UnreadableError as error:
            reason = str(error)
        except Exception as error:
            cause = str(error).rstrip(".")
            reason = f"{qualified(module)}: its weight cannot be read ({cause}); {_WAY_OUT}"
    return Adapter(None if reason else rule, reason, inside, hidden, base)


# How the neurons of a layer lie in a weight that stands for its own.


def _as_neurons(base: nn.Module, name: str, weight: Tensor) -> Any:
    """The neurons of a layer, as its own rule reads them, with this weight in place of its own."""
    if _has_columns(base):
        return weight.transpose(0, 1)
    kind: type[nn.Module] = type_before_parametrizations(base)
    stand_in = kind.__new__(kind)
    stand_in.__dict__.update(base.__dict__)
    stand_in.__dict__["_forward_pre_hooks"] = {}  # of pruning and older weight norms
    stand_in.__dict__[name] = weight
    rule = rule_of(stand_in)
    if rule is None:
        raise _UnreadableError(
            f"no rule for its base layer {qualified(base)}: see register_neurons"
        )
    return rule(stand_in)


def _has_columns(base: nn.Module) -> bool:
    """Whether a layer is the Conv1D of transformers, whose neurons are columns."""
    return type(base).__name__ == "Conv1D" and hasattr(base, "nf")


def _readable(base: nn.Module, name: str) -> Tensor:
    """The weight of a base layer; its values, detached, if it is stored in another form."""
    try:
        weight: object = effective_weight(base, name)
    except AttributeError:
        weight = None
    if not isinstance(weight, Tensor):
        raise _UnreadableError(
            f"its base layer {qualified(base)} has no tensor {name}: {_WAY_OUT}"
        ) from None
    reason = why_unreadable(base, name, weight)
    if reason is None:
        return weight
    values = plain_values(base, name, weight)
    if values is None:
        raise _UnreadableError(f"its base layer: {reason}")
    return values


# peft


def _is_tuner(module: nn.Module) -> bool:
    """Whether a module is a layer in a wrapper of peft's kind.

    The class is asked, for other wrappers hand attributes of what they hold on.
    """
    kind = type(module)
    has_base = isinstance(module._modules.get("base_layer"), nn.Module)
    return has_base and hasattr(kind, "get_base_layer") and hasattr(kind, "active_adapters")


def _tuner(module: Any) -> Adapter:
    """The adapter of a layer in a wrapper of peft's kind."""
    base = _innermost(module)
    apart = None
    if isinstance(base, nn.MultiheadAttention) and _is_tuner(base.out_proj):
        apart = base.out_proj
    elif _is_one_parameter(module) and _is_tuner(module.base_layer):
        apart = module.base_layer  # the same layer, with an adapter of another parameter
    inside = _inside(module, apart)
    hidden = _names(module, besides=module.base_layer)
    reason = _why_unknown(module)
    if reason:
        return Adapter(None, reason, inside, hidden, base)
    adapter = _tried(module, _tuned_neurons, inside, hidden, base)
    is_known = _is_known(module)
    if _has_columns(base) and not _begins(module, _STORED_AS_BASE):
        is_known = False
    if adapter.rule is not None and not is_known and not _agrees(module, base):
        reason = f"{qualified(module)}: an adapter of an unknown kind; {_WAY_OUT}"
        return Adapter(None, reason, inside, hidden, base)
    return adapter


def _innermost(module: Any) -> nn.Module:
    """The layer inside one wrapper or several."""
    layer = module
    while _is_tuner(layer):
        layer = layer.base_layer
    return cast(nn.Module, layer)


def _is_one_parameter(module: nn.Module) -> bool:
    """Whether a wrapper adapts one parameter of a module of any kind."""
    return isinstance(getattr(module, "parameter_name", None), str)


def _begins(module: Any, beginnings: tuple[str, ...]) -> bool:
    """Whether the names of an adapter's factors begin like this."""
    names = tuple(getattr(module, "adapter_layer_names", ()))
    return bool(names) and names[0].startswith(beginnings)


def _why_unknown(module: Any) -> str:
    """Why the effective weight of a wrapped layer is not known; "" if it may be."""
    name = qualified(module)
    for beginning, kind in _TURNED.items():
        if _begins(module, (beginning,)):
            return (
                f"{name}: {kind} turns all neurons of a layer alike: the penalty has nothing to "
                "change; after merge_and_unload the layer is measured"
            )
    if _begins(module, ("ia3_",)):
        return f"{name}: IA3 only scales the inputs or outputs of a frozen layer; {_WAY_OUT}"
    replaced = getattr(module.__dict__.get("forward"), "__self__", None)
    if type(replaced).__name__.startswith("XLora"):
        return f"{name}: X-LoRA mixes its adapters by the input; there is no single weight"
    known = _reads_without_delta(module) or hasattr(type(module), "get_delta_weight")
    if not known:
        return f"{name}: an adapter of an unknown kind; {_WAY_OUT}"
    if len(_active(module)) > 1 and _begins(module, _ALONE):
        return f"{name}: several active adapters of this kind do not add up; {_WAY_OUT}"
    return ""


def _reads_without_delta(module: Any) -> bool:
    """Whether an adapter's effective weight is known though it gives no change of the weight."""
    return _begins(module, ("beft_", "trainable_tokens_"))


def _is_known(module: Any) -> bool:
    """Whether an adapter is of a kind whose change is known to be what the forward pass uses."""
    for variant in getattr(module, "lora_variant", {}).values():
        kind = variant if isinstance(variant, type) else type(variant)
        if not kind.__name__.startswith(_PLAIN_VARIANTS):
            return False
    known = (*_ADDED, "beft_", "trainable_tokens_", "hira_", "miss_")
    return _begins(module, known)


def _active(module: Any) -> list[str]:
    """Names of the active adapters that this layer has."""
    return [name for name in module.active_adapters if _has_adapter(module, name)]


def _has_adapter(module: Any, adapter: str) -> bool:
    """Whether a wrapped layer has factors of this adapter."""
    for name in module.adapter_layer_names:
        container: Any = getattr(module, name, None)
        if hasattr(container, "keys") and adapter in container:
            return True
    return False


def _tuned_neurons(module: nn.Module) -> Any:
    """The effective neurons of a wrapped layer."""
    base = _innermost(module)
    name = _weight_name(module, base)
    weight = _tuned_weight(module, name)
    if _is_one_parameter(module) and (weight.ndim == 3 or rule_of(base) is None):
        is_stored_by_rows = weight.ndim == 2 or getattr(module, "_did_swap_in_out_features", True)
        return weight if is_stored_by_rows else weight.transpose(-2, -1)
    return _as_neurons(base, name, weight)


def _weight_name(module: Any, base: nn.Module) -> str:
    """The name of the adapted weight in the base layer."""
    if _is_one_parameter(module):
        return cast(str, module.parameter_name)
    if isinstance(base, nn.MultiheadAttention):
        return "in_proj_weight"
    return "weight"


def _tuned_weight(module: Any, name: str) -> Tensor:
    """The effective weight of a wrapped layer, as its base layer stores it."""
    inner = module.base_layer
    while _is_tuner(inner) and _is_one_parameter(inner) and inner.parameter_name != name:
        inner = inner.base_layer
    weight = _tuned_weight(inner, name) if _is_tuner(inner) else _readable(inner, name)
    merged = list(getattr(module, "merged_adapters", ()))
    disabled = bool(getattr(module, "disable_adapters", False))
    if merged and disabled:
        for adapter in reversed(merged):  # the next forward pass takes them out of the weight
            if _has_adapter(module, adapter):
                weight = _without_adapter(module, adapter, weight)
    if merged or disabled:
        return weight
    base = weight
    for adapter in _active(module):
        weight = _with_adapter(module, adapter, weight, base)
    return weight


def _with_adapter(module: Any, adapter: str, weight: Tensor, base: Tensor) -> Tensor:
    """A weight with one more adapter.

    Args:
        module: The wrapped layer.
        adapter: Name of the adapter.
        weight: The weight with the adapters before it.
        base: The weight without adapters.
    """
    if _begins(module, ("beft_",)):
        return weight  # it trains the bias
    if _begins(module, ("trainable_tokens_",)):
        index = torch.tensor(module.token_indices[adapter], device=weight.device)
        rows = module.trainable_tokens_delta[adapter].to(weight)
        return weight.index_copy(0, index, rows)
    if _begins(module, ("miss_",)):
        if module.miss_fn == "bat":
            change: Tensor = module.get_delta_weight(adapter, weight)
        else:
            change = module.get_delta_weight_miss(adapter, torch.zeros_like(base))
        return weight + change
    delta = _delta(module, adapter, base)
    if _begins(module, ("hira_",)):
        return weight + base * delta
    if _is_dora(module, adapter):
        return _dora_scale(module, adapter, base + delta) * (weight + delta)
    return weight + delta


def _without_adapter(module: Any, adapter: str, weight: Tensor) -> Tensor:
    """A weight without one of the adapters that are merged into it."""
    if _begins(module, ("beft_",)):
        return weight
    if _begins(module, _ADDED) and not _is_dora(module, adapter):
        return weight - _delta(module, adapter, weight)
    raise _UnreadableError(
        f"{qualified(module)}: adapter {adapter!r} is merged and disabled at once; call unmerge"
    )


def _delta(module: Any, adapter: str, weight: Tensor) -> Tensor:
    """The change of the weight by one adapter."""
    if isinstance(_innermost(module), nn.MultiheadAttention):
        # get_delta_weight replaces the data of half-precision factors.
        product = module.lora_B[adapter].weight @ module.lora_A[adapter].weight
        delta = product * module.scaling[adapter]
    else:
        delta = module.get_delta_weight(adapter)
    if delta.is_sparse:
        delta = delta.to_dense()
    if delta.shape != weight.shape:
        raise _UnreadableError(
            f"{qualified(module)}: its change {tuple(delta.shape)} does not fit the weight "
            f"{tuple(weight.shape)}"
        )
    return cast(Tensor, delta)


def _is_dora(module: Any, adapter: str) -> bool:
    """Whether an adapter has magnitudes of its own for the neurons."""
    magnitudes = getattr(module, "lora_magnitude_vector", None)
    return magnitudes is not None and adapter in magnitudes


def _dora_scale(module: Any, adapter: str, weight: Tensor) -> Tensor:
    """The magnitudes over the norms, which get no gradient; it multiplies the weight."""
    magnitude = module.lora_magnitude_vector[adapter]
    if isinstance(magnitude, nn.Module):
        magnitude = magnitude.weight
    columns = isinstance(_innermost(module), nn.Embedding)
    axis = 0
    if columns or getattr(module, "fan_in_fan_out", False):
        axis = 1
    others = [i for i in range(weight.ndim) if i != axis]
    norms = torch.linalg.vector_norm(weight.detach(), dim=others, keepdim=True)
    return cast(Tensor, magnitude.reshape(norms.shape) / norms)


def _agrees(module: Any, base: nn.Module) -> bool:
    """Whether a forward pass of a wrapped Linear is a product with what the rule gives."""
    if not (isinstance(base, nn.Linear) or _has_columns(base)):
        return False
    try:
        with torch.no_grad(), _evaluating(module):
            neurons = _tuned_neurons(module)
            numbers = torch.randn(4, neurons.shape[1], generator=torch.Generator().manual_seed(0))
            numbers = numbers.to(neurons)
            forward = type(module).forward
            y = forward(module, numbers) - forward(module, torch.zeros_like(numbers))
            expected = numbers @ neurons.T
            tolerance = 10 * torch.finfo(neurons.dtype).eps ** 0.5 * expected.abs().max()
            return bool(((y - expected).abs() <= tolerance).all())
    except Exception:
        return False


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Take a module out of training mode, without the side effects of ``eval``."""
    switched = [one for one in module.modules() if one.training]
    for one in switched:
        one.training = False
    try:
        yield
    finally:
        for one in switched:
            one.training = True


# loralib, and litgpt, which derives from it


def _is_loralib(module: nn.Module) -> bool:
    """Whether a layer holds two factors beside its weight, as loralib's do."""
    if not hasattr(module, "merged") or not hasattr(module, "lora_alpha"):
        return False
    if "lora_A" in module._parameters and "lora_B" in module._parameters:
        return True
    return bool(getattr(module, "fan_in_fan_out", False)) and isinstance(module, nn.Linear)


def _loralib_layer(module: nn.Module) -> nn.Module:
    """The layer that such a module adapts: itself, or one that it holds."""
    for name in ("conv", "linear"):
        part = module._modules.get(name)
        if part is not None:
            return part
    return module


def _loralib_neurons(module: nn.Module) -> Any:
    """The effective neurons of a layer with factors beside its weight."""
    layer = _loralib_layer(module)
    weight = _readable(layer, "weight")
    transposed = bool(getattr(module, "fan_in_fan_out", False))
    if transposed:
        weight = weight.transpose(0, 1)
    if "lora_A" in module._parameters and not module.merged:
        weight = weight + _loralib_delta(module, weight, transposed)
    return _as_neurons(layer, "weight", weight)


def _loralib_delta(module: Any, weight: Tensor, transposed: bool) -> Tensor:
    """The change of the weight (out, in, ...) by the factors."""
    whole: Callable[[], Tensor] | None = getattr(module, "get_lora_AB", None)
    if whole is not None:
        return whole()
    parts: Callable[[], Tensor] | None = getattr(module, "merge_AB", None)
    if parts is not None:  # the factors of some parts of the rows
        delta = parts()
        if transposed:
            delta = delta.transpose(0, 1)
    else:
        delta = module.lora_B @ module.lora_A
        if isinstance(module, nn.Embedding):
            delta = delta.transpose(0, 1)
    return cast(Tensor, delta.reshape(weight.shape) * module.scaling)


# torchtune


def _is_torchtune(module: nn.Module) -> bool:
    """Whether a layer holds its weight and two small Linears, as torchtune's do."""
    parts = module._modules
    has_factors = isinstance(parts.get("lora_a"), nn.Linear)
    has_factors = has_factors and isinstance(parts.get("lora_b"), nn.Linear)
    return has_factors and hasattr(module, "alpha") and hasattr(module, "rank")


def _torchtune_neurons(module: Any) -> Any:
    """The effective neurons of a layer with two Linears for factors."""
    if "_weight_fake_quantizer" in module._modules or hasattr(module, "weight_fake_quantizer"):
        raise _UnreadableError(f"{qualified(module)}: its forward pass rounds the weight")
    weight = _readable(module, "weight")
    if getattr(module, "disabled", False) or getattr(module, "merged", False):
        return weight
    weight = weight + (module.lora_b.weight @ module.lora_a.weight) * (module.alpha / module.rank)
    magnitude = module._parameters.get("magnitude")
    if magnitude is None:
        return weight
    norms = torch.linalg.vector_norm(weight.detach(), dim=1, keepdim=True)
    return magnitude.reshape(norms.shape) / norms * weight
