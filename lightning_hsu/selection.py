"""From a model to named targets: which weights are measured, which are not, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from lightning_hsu.neurons import neurons_of

Patterns = str | Sequence[str] | None

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True, eq=False)
class Target:
    """One set of neurons of one module: (groups, n, d), addressed by module and key, never by parameter name.

    Args:
        name: Name of the layer in the model, with the key behind a dot where a module has several sets.
        module: The module.
        key: Which of the module's sets; "" where there is one.
        shape: (groups, n, d).
        head: Whether this is the class head.
    """

    name: str
    module: nn.Module
    key: str
    shape: tuple[int, int, int]
    head: bool = False

    def neurons(self) -> Tensor:
        """The effective neurons (groups, n, d) as they are now; differentiable where gradients are recorded."""
        with _without_side_effects(self.module):
            found = neurons_of(self.module)
        assert found is not None
        x = found[self.key]
        return x.unsqueeze(0) if x.ndim == 2 else x

    @property
    def frozen(self) -> bool:
        """Whether no gradient reaches these neurons."""
        with torch.enable_grad():
            return not self.neurons().requires_grad

    def places(self, x: Tensor, grad: Tensor, own: Mapping[int, float]) -> Iterator[tuple[Tensor, Tensor]]:
        """Where the gradient of the neurons goes: pairs (part of some ``.grad``, what to add to it).

        Args:
            x: ``self.neurons()``, taken while gradients were recorded.
            grad: Gradient in the neurons, (groups, n, d).
            own: ids of the parameters that may be touched. One without a gradient is left without.
        """
        parameter = _parameter_behind(x)
        if parameter is not None and parameter.grad is not None and parameter.grad.stride() == parameter.stride():
            if id(parameter) in own:
                offset = x.storage_offset() - parameter.storage_offset() + parameter.grad.storage_offset()
                yield parameter.grad.as_strided(x.shape, x.stride(), offset), grad
            return
        leaves = [p for p in self.module.parameters() if p.requires_grad and p.grad is not None and id(p) in own]
        if leaves and x.requires_grad:
            pulled = torch.autograd.grad(x, leaves, grad.to(x.dtype), allow_unused=True)
            yield from ((p.grad, g) for p, g in zip(leaves, pulled, strict=True) if p.grad is not None and g is not None)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the neurons may depend on."""
        parameter = _parameter_behind(self.neurons())
        return list(self.module.parameters()) if parameter is None else [parameter]


@dataclass(frozen=True)
class Skip:
    """A weight that is not measured: its name, its shape and the reason, in a user's words."""

    name: str
    shape: tuple[int, ...]
    reason: str


def select(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None, head: str | None = "auto"
) -> tuple[list[Target], list[Skip]]:
    """Find the neurons of a model.

    Args:
        model: Any module; uninitialised lazy layers are refused.
        include: Patterns of layer names to take (shell style; a pattern also takes what lies below the
            name it matches). None takes everything except embeddings, which must be asked for by name.
        exclude: Patterns of layer names to leave out.
        head: The class head: "auto" is the last Linear of the model, a name is that layer, None is no head.

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
    candidates, skips = _candidates(model)
    names = [target.name for target in candidates]
    head_name = _find_head(candidates, head)
    include, exclude = _patterns("include", include, names), _patterns("exclude", exclude, names)
    chosen: list[Target] = []
    seen: dict[tuple[object, ...], str] = {}
    for target in candidates:
        is_head = target.name == head_name
        asked = None if include is None else matches(target.name, include)
        reason = None
        if exclude is not None and matches(target.name, exclude):
            reason = "excluded by pattern"
        elif asked is False and not (is_head and head != "auto"):
            reason = "not in include"
        elif asked is None and isinstance(target.module, (nn.Embedding, nn.EmbeddingBag)):
            reason = f"an embedding, measured only when asked for: include='{target.name}'"
        else:
            reason = _too_small(target) or _tied(target, seen)
        if reason is None:
            chosen.append(Target(target.name, target.module, target.key, target.shape, is_head))
        else:
            skips.append(Skip(target.name, target.shape, reason))
    if not chosen:
        raise ValueError(_nothing_matched(model, skips))
    return chosen, skips


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a layer's name, or a module above it, matches one of the shell-style patterns."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def check_patterns(what: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a pattern that matches no layer."""
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"{what} pattern {pattern!r} matches no layer; the layers are: {', '.join(names) or 'none'}")


def uninitialized(model: nn.Module) -> list[str]:
    """Names of lazy parameters that have no shape yet."""
    return [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]


def _patterns(what: str, patterns: Patterns, names: list[str]) -> Sequence[str] | None:
    """Normalise patterns to a sequence and refuse one that matches no layer."""
    if patterns is None:
        return None
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    check_patterns(what, patterns, names)
    return patterns


def _candidates(model: nn.Module) -> tuple[list[Target], list[Skip]]:
    """Every set of neurons in the model, and the weight matrices for which there is no rule."""
    targets, skips, inside = [], [], set[nn.Module]()
    for path, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            inside.update(module.modules())
        if module in inside:
            continue
        name = _clean(path)
        with torch.no_grad(), _without_side_effects(module):
            found = neurons_of(module)
        if found is None:
            skips += [
                Skip(_join(name, key), tuple(p.shape), f"no rule for {type(module).__name__}: see register_neurons")
                for key, p in module.named_parameters(recurse=False)
                if p.ndim >= 2
            ]
            continue
        for key, x in found.items():
            full = _join(name, key) or "weight"
            if not x.is_floating_point():
                skips.append(Skip(full, tuple(x.shape), f"its weights are {x.dtype}, not floating-point"))
                continue
            if x.ndim not in (2, 3):
                raise ValueError(
                    f"the rule for {type(module).__name__} gave neurons of shape {tuple(x.shape)} for layer '{full}'; "
                    "it must give (n, d) or (groups, n, d)"
                )
            groups, n, d = (1, *x.shape) if x.ndim == 2 else tuple(x.shape)
            targets.append(Target(full, module, key, (groups, n, d)))
    return targets, skips


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


def _too_small(target: Target) -> str | None:
    """Why a target is too small to have two neurons on a sphere."""
    groups, n, d = target.shape
    if n < 2:
        return "a single neuron" if groups == 1 else f"depthwise: each of its {groups} groups has one neuron"
    if d < 2:
        return f"its neurons have dimension {d}: on a line there is nothing to spread"
    return None


def _tied(target: Target, seen: dict[tuple[object, ...], str]) -> str | None:
    """Why a target is a second name of one already taken."""
    x = target.neurons()
    parameter = _parameter_behind(x)
    key: tuple[object, ...] = (id(target.module), target.key)
    if parameter is not None:
        key = (id(parameter), x.storage_offset(), x.stride(), x.shape)
    first = seen.setdefault(key, target.name)
    return None if first == target.name else f"tied to {first}"


def _nothing_matched(model: nn.Module, skips: list[Skip]) -> str:
    """The error when no target is left, with everything there was."""
    if not skips:
        return f"no neurons found in {type(model).__name__}: it has no weight matrix; was it built yet?"
    lines = "\n".join(f"  {skip.name} {tuple(skip.shape)}: {skip.reason}" for skip in skips)
    return f"no layer of {type(model).__name__} is left to measure; change include, exclude or the model:\n{lines}"


def _parameter_behind(x: Tensor) -> nn.Parameter | None:
    """The parameter that x is, or is a view of; None if it was computed."""
    base = x._base if x._is_view() else x
    return base if isinstance(base, nn.Parameter) else None


@contextmanager
def _without_side_effects(module: nn.Module) -> Iterator[None]:
    """Read parametrized weights without changing state: a spectral norm in training mode iterates at each access."""
    lists: list[nn.Module] = []
    if is_parametrized(module):
        lists = [m for m in module.parametrizations.modules() if m.training]  # type: ignore[union-attr]
    for part in lists:
        part.training = False
    try:
        yield
    finally:
        for part in lists:
            part.training = True
