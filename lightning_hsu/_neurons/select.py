"""From a model to named targets: which weights are measured, which are not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_hsu._neurons.placement import NeuronView, Placement, placement_of
from lightning_hsu._neurons.rules import has_rule
from lightning_hsu._neurons.target import Target, without_side_effects

Patterns = str | Sequence[str] | None

NOT_INCLUDED, EXCLUDED = "not in include", "excluded by pattern"

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Skip:
    """A weight that is not measured: its name, its shape and the reason, in a user's words."""

    name: str
    shape: tuple[int, ...]
    reason: str


def select(
    model: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    head: str | None = "auto",
    *,
    everything: bool = False,
    placement: Placement | None = None,
) -> tuple[list[Target], list[Skip]]:
    """Find the neurons of a model.

    Args:
        model: Any module; lazy layers that have seen no batch are skipped.
        include: Patterns of layer names to take (shell style; a pattern also takes what lies below the
            name it matches). None takes everything except embeddings, which must be asked for by name.
        exclude: Patterns of layer names to leave out.
        head: The class head: "auto" is the last Linear of the model, a name is that layer, None is no head.
        everything: For looking, not for training: take embeddings unasked, and depthwise convolutions as one set of
            neurons over all their channels.
        placement: How the weights are placed over ranks; None finds out.

    Returns:
        Targets in the model's order, and every weight that was skipped, with the reason.

    Raises:
        ValueError: if a pattern or the head's name matches nothing, or nothing at all is left.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Linear(16, 10))
        >>> targets, skips = select(model)
        >>> [(t.name, t.shape, t.head) for t in targets]
        [('0', (1, 16, 27), False), ('2', (1, 10, 16), True)]
        >>> skips[0].reason
        'depthwise: each of its 16 groups has one neuron'
    """
    candidates, skips = _candidates(model, placement or placement_of(model))
    if everything:
        candidates = [_merged(target) for target in candidates]
    names = [target.name for target in candidates]
    head_name = _find_head(candidates, head)
    include, exclude = _patterns("include", include, names), _patterns("exclude", exclude, names)
    reasons: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for target in sorted(
        candidates, key=lambda target: target.name != head_name
    ):  # of tied weights the head counts
        is_head = target.name == head_name
        asked = None if include is None else matches(target.name, include)
        reason = None
        if exclude is not None and matches(target.name, exclude):
            reason = EXCLUDED
        elif asked is False and not (is_head and head != "auto"):
            reason = NOT_INCLUDED
        elif (
            asked is None
            and not everything
            and isinstance(target.module, (nn.Embedding, nn.EmbeddingBag))
        ):
            reason = f"an embedding, measured only when asked for: include='{target.name}'"
        else:
            reason = _too_small(target) or _tied(target, seen)
        if reason is not None:
            reasons[target.name] = reason
    skips += [
        Skip(target.name, target.shape, reasons[target.name])
        for target in candidates
        if target.name in reasons
    ]
    chosen = [
        replace(target, head=target.name == head_name)
        for target in candidates
        if target.name not in reasons
    ]
    if not chosen:
        raise ValueError(_nothing_matched(model, skips))
    return chosen, skips


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a layer's name, or a module above it, matches one of the shell-style patterns."""
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns
    )


def check_patterns(what: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a pattern that matches no layer."""
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(
                f"{what} pattern {pattern!r} matches no layer; the layers are: {', '.join(names) or 'none'}"
            )


def uninitialized(model: nn.Module) -> list[str]:
    """Names of lazy parameters that have no shape yet."""
    return [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]


def _patterns(what: str, patterns: Patterns, names: list[str]) -> Sequence[str] | None:
    """Normalise patterns to a sequence and refuse one that matches no layer."""
    if patterns is None:
        return None
    patterns = (
        [patterns]
        if isinstance(patterns, str)
        else list(patterns)
        if isinstance(patterns, Sequence)
        else [patterns]
    )
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"{what} takes a pattern or a list of patterns such as 'encoder.*'; got {patterns!r}"
        )
    check_patterns(what, patterns, names)
    return patterns


def _candidates(model: nn.Module, placement: Placement) -> tuple[list[Target], list[Skip]]:
    """Every set of neurons in the model, and the weight matrices for which there is no rule."""
    targets, skips, inside = [], [], set[nn.Module]()
    for path, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            inside.update(module.modules())
        if module in inside:
            continue
        name = _clean(path)
        if not has_rule(module):
            skips += [
                Skip(
                    _join(name, key),
                    tuple(p.shape),
                    f"no rule for {type(module).__name__}: see register_neurons",
                )
                for key, p in module.named_parameters(recurse=False)
                if p.ndim >= 2
            ]
            continue
        if lazy := [
            key for key, p in module.named_parameters(recurse=False) if nn.parameter.is_lazy(p)
        ]:
            skips.append(
                Skip(
                    _join(name, lazy[0]),
                    (),
                    "a lazy layer that has seen no batch: it has no shape yet",
                )
            )
            continue
        if any(p.is_meta for p in module.parameters()):
            skips.append(
                Skip(
                    name or "weight",
                    (),
                    "it holds no numbers yet (device meta): load the weights first",
                )
            )
            continue
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            without_side_effects(module),
        ):  # views are told by it
            found = placement.read(module)
        for key, reading in found.items():
            full, x = _join(name, key) or "weight", reading.x
            _check_rule(module, full, reading)
            if not x.is_floating_point():
                skips.append(
                    Skip(full, tuple(x.shape), f"its weights are {x.dtype}, not floating-point")
                )
                continue
            groups, n, d = (1, *x.shape) if x.ndim == 2 else tuple(x.shape)
            targets.append(Target(full, module, key, (groups, n, d), placement=placement))
    return targets, skips


def _check_rule(module: nn.Module, name: str, reading: NeuronView) -> None:
    """Refuse what a user's rule must not give."""
    x: object = reading.x
    rule = f"the rule for {type(module).__name__} gave"
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{rule} {type(x).__name__} for layer '{name}'; it must give a tensor, or a mapping of names to tensors"
        )
    if x.ndim not in (2, 3):
        raise ValueError(
            f"{rule} neurons of shape {tuple(x.shape)} for layer '{name}'; it must give (n, d) or (groups, n, d)"
        )
    trains = all(p.requires_grad for p in module.parameters())
    if trains and x.is_floating_point() and reading.parameter is None and not x.requires_grad:
        raise ValueError(
            f"{rule} detached neurons for layer '{name}': no gradient would reach its parameters; drop .detach() or .data"
        )


def _clean(path: str) -> str:
    """Drop what wrappers put into a module's path."""
    path += "."
    for wrapper in _WRAPPERS:
        path = path.replace(wrapper, "")
    return path.rstrip(".")


def _join(name: str, key: str) -> str:
    return f"{name}.{key}".strip(".")


def _find_head(candidates: list[Target], head: str | None) -> str | None:
    """Name of the class head among the candidates."""
    if head is None:
        return None
    if head == "auto":
        linear = [target.name for target in candidates if isinstance(target.module, nn.Linear)]
        return linear[-1] if linear else None
    if head not in [target.name for target in candidates]:
        known = ", ".join(target.name for target in candidates)
        raise ValueError(
            f"head {head!r} is no layer of the model; the layers are: {known or 'none'}; head=None switches it off"
        )
    return head


def _merged(target: Target) -> Target:
    """Several groups of one neuron each as one group of several neurons; other targets as they are."""
    groups, n, d = target.shape
    return replace(target, shape=(1, groups, d), merged=True) if n == 1 < groups else target


def _too_small(target: Target) -> str | None:
    """Why a target is too small to have two neurons on a sphere."""
    groups, n, d = target.shape
    if n < 2:
        return (
            "a single neuron"
            if groups == 1
            else f"depthwise: each of its {groups} groups has one neuron"
        )
    if d < 2:
        return f"its neurons have dimension {d}: on a line there is nothing to spread"
    return None


def _tied(target: Target, seen: dict[tuple[object, ...], str]) -> str | None:
    """Why a target is a second name of one already taken."""
    reading = target.read()
    if isinstance(target.module, (nn.Embedding, nn.EmbeddingBag)):
        weight = target.module.weight  # whole, the padding's row too: a tied head has it
        reading = NeuronView(
            weight.unsqueeze(0), weight if isinstance(weight, nn.Parameter) else None
        )
    x = reading.x
    key: tuple[object, ...] = (id(target.module), target.key)
    if reading.parameter is not None:
        key = (id(reading.parameter), x.storage_offset(), x.stride(), x.shape)
    first = seen.setdefault(key, target.name)
    return None if first == target.name else f"tied to {first}"


def _nothing_matched(model: nn.Module, skips: list[Skip]) -> str:
    """The error when no target is left, with everything there was."""
    if not skips:
        return (
            f"no neurons found in {type(model).__name__}: it has no weight matrix. If it is built later, attach "
            "then; if a layer of your own holds neurons, say where with register_neurons"
        )
    lines = "\n".join(f"  {skip.name} {tuple(skip.shape)}: {skip.reason}" for skip in skips)
    return f"no layer of {type(model).__name__} is left to measure; change include, exclude or the model:\n{lines}"


def check_head(targets: list[Target]) -> None:
    """Refuse a head's coefficient where no head is among the targets."""
    if not any(target.head for target in targets):
        names = ", ".join(target.name for target in targets)
        raise ValueError(
            f"head_coefficient is given, but no head is measured: name one of {names} with head='...'"
        )
