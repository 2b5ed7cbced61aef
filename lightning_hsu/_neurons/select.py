"""Which sets of neurons are measured, and why the others are not."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import overload

from torch import nn

from lightning_hsu._neurons.candidates import AnySet, Candidates, NeuronSet, Skip
from lightning_hsu._neurons.model import neurons_of_model
from lightning_hsu._neurons.placement import Placement
from lightning_hsu._neurons.target import Target

Patterns = str | Sequence[str] | None

NOT_INCLUDED = "not in include"
EXCLUDED = "excluded by pattern"


@overload
def select(
    source: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    head: str | None = "auto",
    *,
    everything: bool = False,
    placement: Placement | None = None,
) -> tuple[list[Target], list[Skip]]: ...


@overload
def select(
    source: Candidates[AnySet],
    include: Patterns = None,
    exclude: Patterns = None,
    head: str | None = "auto",
    *,
    everything: bool = False,
) -> tuple[list[AnySet], list[Skip]]: ...


def select(
    source: nn.Module | Candidates[AnySet],
    include: Patterns = None,
    exclude: Patterns = None,
    head: str | None = "auto",
    *,
    everything: bool = False,
    placement: Placement | None = None,
) -> tuple[list[Target], list[Skip]] | tuple[list[AnySet], list[Skip]]:
    """Choose the sets of neurons that are measured.

    Args:
        source: A model, or the candidates of a model or a state dict. Lazy layers that have seen
            no batch are skipped.
        include: Patterns of layer names to take (shell style; a pattern also takes what lies below
            the name it matches). None takes everything except embeddings, which must be asked for.
        exclude: Patterns of layer names to leave out.
        head: The class head: "auto" is the last Linear, a name is that layer, None is no head.
        everything: For reports, not for training: also take embeddings, and depthwise convolutions
            as one set of neurons over all their channels.
        placement: How the weights of a model are placed over ranks; None looks at the model.

    Returns:
        The sets in their order, and every weight that was skipped, with the reason.

    Raises:
        ValueError: if a pattern or the head's name matches nothing, or no set is left.
        TypeError: if ``include`` or ``exclude`` is not made of patterns.

    Example:
        >>> convolutions = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16)
        >>> targets, skips = select(nn.Sequential(*convolutions, nn.Linear(16, 10)))
        >>> [(target.name, target.shape, target.head) for target in targets]
        [('0', (1, 16, 27), False), ('2', (1, 10, 16), True)]
        >>> skips[0].reason
        'depthwise: each of its 16 groups has one neuron'
    """
    if isinstance(source, nn.Module):
        candidates = neurons_of_model(source, placement)
        return _choose(candidates, include, exclude, head, everything=everything)
    return _choose(source, include, exclude, head, everything=everything)


def _choose(
    candidates: Candidates[AnySet],
    include: Patterns,
    exclude: Patterns,
    head: str | None,
    *,
    everything: bool,
) -> tuple[list[AnySet], list[Skip]]:
    """Choose among candidates; arguments as of :func:`select`."""
    sets = candidates.sets
    if everything:
        sets = [_merged(one) for one in sets]
    names = [one.name for one in sets]
    head_name = _find_head(sets, names, head)
    included = _checked("include", include, names)
    excluded = _checked("exclude", exclude, names)
    named_head = None if head == "auto" else head_name  # naming the head asks for it

    reasons: dict[str, str] = {}
    taken: dict[Hashable, str] = {}
    # The head comes first, so that it is the one measured if its weights are tied to another's.
    for one in sorted(sets, key=lambda one: one.name != head_name):
        reason = _not_asked_for(one, included, excluded, everything=everything)
        if reason == NOT_INCLUDED and one.name == named_head:
            reason = None
        if reason is None:
            reason = _too_small(one)
        if reason is None:
            first = taken.setdefault(one.identity, one.name)
            reason = None if first == one.name else f"tied to {first}"
        if reason is not None:
            reasons[one.name] = reason

    chosen: list[AnySet] = []
    skips = list(candidates.skips)
    for one in sets:
        if one.name in reasons:
            skips.append(Skip(one.name, one.shape, reasons[one.name]))
        else:
            chosen.append(replace(one, head=one.name == head_name))
    if not chosen:
        raise ValueError(_nothing_left(candidates.source, skips))
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
            known = ", ".join(names) or "none"
            raise ValueError(
                f"{what} pattern {pattern!r} matches no layer; the layers are: {known}"
            )


def as_list(what: str, patterns: Patterns) -> list[str] | None:
    """Patterns as a list; None stays None."""
    if patterns is None:
        return None
    if isinstance(patterns, str):
        return [patterns]
    if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
        raise TypeError(
            f"{what} takes a pattern or a list of patterns such as 'encoder.*'; got {patterns!r}"
        )
    return list(patterns)


def uninitialized(model: nn.Module) -> list[str]:
    """Names of lazy parameters that have no shape yet."""
    return [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]


def check_head(targets: Sequence[NeuronSet]) -> None:
    """Refuse a head's coefficient if no head is measured."""
    names = []
    for target in targets:
        if target.head:
            return
        names.append(target.name)
    raise ValueError(
        f"head_coefficient is given, but no head is measured: name one of {', '.join(names)} with "
        "head='...'"
    )


def _checked(what: str, patterns: Patterns, names: Sequence[str]) -> list[str] | None:
    """Patterns as a list, each of which matches a layer."""
    found = as_list(what, patterns)
    if found is not None:
        check_patterns(what, found, names)
    return found


def _find_head(sets: Sequence[NeuronSet], names: Sequence[str], head: str | None) -> str | None:
    """Name of the class head among the sets."""
    if head is None:
        return None
    if head == "auto":
        last = None
        for one in sets:
            if one.kind == "linear":
                last = one.name
        return last
    if head not in names:
        known = ", ".join(names) or "none"
        raise ValueError(
            f"head {head!r} is no layer of the model; the layers are: {known}; head=None switches "
            "it off"
        )
    return head


def _merged(one: AnySet) -> AnySet:
    """Groups of one neuron each as one group; any other set as it is."""
    groups, n, d = one.shape
    if groups == 1 or n != 1:
        return one
    return replace(one, shape=(1, groups, d), merged=True)


def _not_asked_for(
    one: NeuronSet, include: list[str] | None, exclude: list[str] | None, *, everything: bool
) -> str | None:
    """Why the user does not want a set to be measured; None if it is wanted."""
    if exclude is not None and matches(one.name, exclude):
        return EXCLUDED
    if include is not None:
        return None if matches(one.name, include) else NOT_INCLUDED
    if one.kind == "embedding" and not everything:
        return f"an embedding, measured only when asked for: include='{one.name}'"
    return None


def _too_small(one: NeuronSet) -> str | None:
    """Why a set does not have two neurons on a sphere; None if it does."""
    groups, n, d = one.shape
    if n < 2 and groups == 1:
        return "a single neuron"
    if n < 2:
        return f"depthwise: each of its {groups} groups has one neuron"
    if d < 2:
        return f"its neurons have dimension {d}: on a line there is nothing to spread"
    return None


def _nothing_left(source: str, skips: Sequence[Skip]) -> str:
    """The error message if no set is left, with every weight that was skipped."""
    if not skips:
        return (
            f"no neurons found in {source}: it has no weight matrix. If it is built later, attach "
            "then; if a layer of your own holds neurons, say where with register_neurons"
        )
    lines = [f"no layer of {source} is left to measure; change include, exclude or the model:"]
    for skip in skips:
        lines.append(f"  {skip.name} {skip.shape}: {skip.reason}")
    return "\n".join(lines)
