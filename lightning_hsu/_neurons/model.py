"""The sets of neurons of a model."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_hsu._neurons.candidates import Candidates, Kind, Skip, full_name, shape_by_group
from lightning_hsu._neurons.placement import NeuronView, Placement, placement_of
from lightning_hsu._neurons.rules import has_rule
from lightning_hsu._neurons.target import Target, without_side_effects
from lightning_hsu._neurons.wrappers import plain_name

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def neurons_of_model(model: nn.Module, placement: Placement | None = None) -> Candidates[Target]:
    """Find every set of neurons of a model. A collective call if its weights are sharded.

    Args:
        model: Any module.
        placement: How its weights are placed over ranks; None looks at the model.

    Raises:
        TypeError: if a user's rule does not return tensors.
        ValueError: if a user's rule returns tensors of a wrong shape, or detached ones.

    Example:
        >>> found = neurons_of_model(nn.Sequential(nn.Conv2d(3, 16, 3), nn.LazyLinear(10)))
        >>> [(one.name, one.shape) for one in found.sets]
        [('0', (1, 16, 27))]
        >>> found.skips[0].reason
        'a lazy layer that has seen no batch: it has no shape yet'
    """
    if placement is None:
        placement = placement_of(model)
    found = Candidates[Target](type(model).__name__, [], [])
    parametrizations: set[nn.Module] = set()
    for path, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            parametrizations.update(module.modules())
        if module in parametrizations:
            continue
        layer = plain_name(path)
        skips = _unreadable(layer, module)
        if skips is not None:
            found.skips.extend(skips)
            continue
        _add_sets(found, layer, module, placement)
    return found


def _unreadable(layer: str, module: nn.Module) -> list[Skip] | None:
    """The weights of a module whose neurons cannot be read; None if they can."""
    parameters = dict(module.named_parameters(recurse=False))
    if not has_rule(module):
        reason = f"no rule for {type(module).__name__}: see register_neurons"
        skips = []
        for key, p in parameters.items():
            if p.ndim >= 2:
                skips.append(Skip(full_name(layer, key), tuple(p.shape), reason))
        return skips
    for key, p in parameters.items():
        if nn.parameter.is_lazy(p):
            reason = "a lazy layer that has seen no batch: it has no shape yet"
            return [Skip(full_name(layer, key), (), reason)]
    if any(p.is_meta for p in module.parameters()):
        reason = "it holds no numbers yet (device meta): load the weights first"
        return [Skip(full_name(layer, ""), (), reason)]
    return None


def _add_sets(
    found: Candidates[Target], layer: str, module: nn.Module, placement: Placement
) -> None:
    """Add the sets of neurons of one module that has a rule."""
    # A view knows its parameter only if autograd records it.
    with torch.inference_mode(False), torch.enable_grad(), without_side_effects(module):
        views = placement.read(module)
    for key, view in views.items():
        name = full_name(layer, key)
        _check_rule(module, name, view)
        if not view.x.is_floating_point():
            reason = f"its weights are {view.x.dtype}, not floating-point"
            found.skips.append(Skip(name, tuple(view.x.shape), reason))
            continue
        target = Target(
            name=name,
            shape=shape_by_group(view.x),
            kind=_kind_of(module),
            identity=_identity(module, key, view),
            module=module,
            key=key,
            placement=placement,
        )
        found.sets.append(target)


def _check_rule(module: nn.Module, name: str, view: NeuronView) -> None:
    """Refuse what a user's rule must not return."""
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
    trains = all(p.requires_grad for p in module.parameters())
    detached = view.parameter is None and not x.requires_grad
    if trains and detached and x.is_floating_point():
        raise ValueError(
            f"{rule} detached neurons for layer '{name}': no gradient would reach its parameters; "
            "drop .detach() or .data"
        )


def _kind_of(module: nn.Module) -> Kind:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, _EMBEDDINGS):
        return "embedding"
    return "other"


def _identity(module: nn.Module, key: str, view: NeuronView) -> Hashable:
    """Equal for two sets of neurons that are the same entries of one parameter."""
    x: Tensor | None = view.x
    parameter = view.parameter
    if isinstance(module, _EMBEDDINGS):
        # The whole table: a tied head has a neuron for the padding, too.
        weight = module._parameters.get("weight")
        x = weight
        parameter = weight
    if x is None or parameter is None:
        return id(module), key
    if x.ndim == 2:
        x = x.unsqueeze(0)
    return id(parameter), x.storage_offset(), x.stride(), x.shape
