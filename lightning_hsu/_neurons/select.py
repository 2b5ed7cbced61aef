"""Which sets of neurons are measured, and why the others are not."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import overload

from torch import nn

from lightning_hsu._neurons.candidates import AnySet, Candidates, NeuronSet, Skip
from lightning_hsu._neurons.heads import DECLARED, NAMED, TRACED, guessed_heads
from lightning_hsu._neurons.how import Neurons
from lightning_hsu._neurons.model import neurons_of_model
from lightning_hsu._neurons.patterns import (
    Patterns,
    as_list,
    check_patterns,
    known_names,
    matches,
)
from lightning_hsu._neurons.placement import Placement
from lightning_hsu._neurons.target import Target

NOT_INCLUDED = "not in include"
EXCLUDED = "excluded by pattern"
TIED = "tied to "
_BY_PATTERN = (NOT_INCLUDED, EXCLUDED)

Head = str | Sequence[str] | None
"""The head: "auto", a name, several names, or None for none."""


@overload
def select(
    source: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    head: Head = "auto",
    *,
    neurons: Neurons = None,
    everything: bool = False,
    placement: Placement | None = None,
) -> tuple[list[Target], list[Skip]]: ...


@overload
def select(
    source: Candidates[AnySet],
    include: Patterns = None,
    exclude: Patterns = None,
    head: Head = "auto",
    *,
    everything: bool = False,
    traced: Sequence[str] = (),
    may_be_empty: bool = False,
    strict: bool = True,
) -> tuple[list[AnySet], list[Skip]]: ...


def select(
    source: nn.Module | Candidates[AnySet],
    include: Patterns = None,
    exclude: Patterns = None,
    head: Head = "auto",
    *,
    neurons: Neurons = None,
    everything: bool = False,
    placement: Placement | None = None,
    traced: Sequence[str] = (),
    may_be_empty: bool = False,
    strict: bool = True,
) -> tuple[list[Target], list[Skip]] | tuple[list[AnySet], list[Skip]]:
    """Choose the sets of neurons that are measured.

    Args:
        source: A model, or the candidates of a model or a state dict. Lazy layers that have seen
            no batch are skipped.
        include: Patterns of layer names to take (shell style; a pattern also takes what lies below
            the name it matches). None takes everything except embeddings, which must be asked for.
        exclude: Patterns of layer names to leave out.
        head: The head: "auto" finds the layers that give the model's output, a name or several are
            these layers, None is no head.
        neurons: Patterns of weights' names of a model, each with how such weights hold neurons.
        everything: For reports, not for training: also take embeddings, and depthwise convolutions
            as one set of neurons over all their channels.
        placement: How the weights of a model are placed over ranks; None looks at the model.
        traced: Names of the layers that came last before the loss, if that is known.
        may_be_empty: Whether no set may be left.
        strict: Whether every pattern and every name of a head has to be met, and every set that is
            wanted has to be readable; else these are left out.

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
        candidates = neurons_of_model(source, placement, neurons)
        return _choose(candidates, include, exclude, head, everything=everything)
    return _choose(
        source,
        include,
        exclude,
        head,
        everything=everything,
        traced=traced,
        may_be_empty=may_be_empty,
        strict=strict,
    )


def _choose(
    candidates: Candidates[AnySet],
    include: Patterns,
    exclude: Patterns,
    head: Head,
    *,
    everything: bool,
    traced: Sequence[str] = (),
    may_be_empty: bool = False,
    strict: bool = True,
) -> tuple[list[AnySet], list[Skip]]:
    """Choose among candidates; arguments as of :func:`select`."""
    sets = candidates.sets
    if everything:
        sets = [_merged(one) for one in sets]
    names = [one.name for one in sets]
    unread = [one.name for one in candidates.broken] + [one.name for one in candidates.skips]
    heads = find_heads(candidates, head, traced, strict=strict)
    included = as_list("include", include)
    excluded = as_list("exclude", exclude)
    if strict:
        check_patterns("include", included or [], names + unread)
        check_patterns("exclude", excluded or [], names + unread)
    for name, why in heads.items():
        if strict and why == NAMED and excluded is not None and matches(name, excluded):
            raise ValueError(f"head {name!r} is excluded by a pattern; name another head, or None")
    skips = list(candidates.skips)
    for broken in candidates.broken:
        why_not = EXCLUDED
        if _is_wanted(broken.name, included, excluded):
            if strict:
                raise broken.error
            why_not = str(broken.error)
        skips.append(Skip(broken.name, (), why_not))

    reasons: dict[str, str] = {}
    taken: dict[Hashable, str] = {}
    # Heads come first, so that they are the ones measured if their weights are tied to others'.
    for one in sorted(sets, key=lambda one: one.name not in heads):
        reason = _not_asked_for(one, included, excluded, everything=everything)
        head_reason = heads.get(one.name)
        if head_reason == NAMED and reason == NOT_INCLUDED:
            reason = None  # naming the head asks for it
        if head_reason is not None and one.kind == "embedding" and reason not in _BY_PATTERN:
            reason = None
        if reason is None:
            reason = _too_small(one)
        if reason is None:
            first = taken.setdefault(one.identity, one.name)
            reason = None if first == one.name else f"{TIED}{first}"
        if reason is not None:
            reasons[one.name] = reason
    for one in sets:  # an embedding that is measured under another name
        first_name = taken.get(one.identity)
        if one.name in reasons and first_name is not None and first_name != one.name:
            reasons[one.name] = f"{TIED}{first_name}"

    chosen: list[AnySet] = []
    for one in sets:
        if one.name in reasons:
            skips.append(Skip(one.name, one.shape, reasons[one.name]))
        else:
            head_reason = heads.get(one.name, "")
            chosen.append(replace(one, head=one.name in heads, head_reason=head_reason))
    if not chosen and not may_be_empty:
        raise ValueError(nothing_left(candidates.source, skips))
    return chosen, skips


def find_heads(
    candidates: Candidates[AnySet],
    head: Head,
    traced: Sequence[str] = (),
    *,
    strict: bool = True,
) -> dict[str, str]:
    """Names of the sets that are heads, each with the reason.

    Args:
        candidates: All sets of a model.
        head: What the user says.
        traced: Names of the layers that came last before the loss, if that is known.
        strict: Whether every name that the user gives has to be a layer.

    Raises:
        ValueError: if a name is no layer of the model.
        TypeError: if ``head`` is not made of names.
    """
    if head is None:
        return {}
    if head == "auto":
        return _automatic_heads(candidates, traced)
    wanted = [head] if isinstance(head, str) else head
    if not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
        raise TypeError(f"head takes 'auto', a layer's name, a list of names or None; got {head!r}")
    names = [one.name for one in candidates.sets]
    reasons = {skip.name: skip.reason for skip in candidates.skips}
    heads: dict[str, str] = {}
    for name in map(str, wanted):
        parts = [one.name for one in candidates.sets if name in (one.name, one.layer)]
        if not parts and not strict:  # it may have been wrapped since
            parts = [one.name for one in candidates.sets if one.name.startswith(f"{name}.")][-1:]
        heads |= dict.fromkeys(parts, NAMED)
        if parts or not strict or "lazy" in reasons.get(name, ""):
            continue
        message = f"head {name!r} is no layer of the model; {known_names(name, names)}"
        if name in reasons:
            message = f"head {name!r} is not measured: {reasons[name]}"
        raise ValueError(f"{message}; head=None switches it off")
    return heads


def unmet(
    candidates: Candidates[AnySet], head: Head, patterns: Mapping[str, Sequence[str]]
) -> list[str]:
    """What a user has said that meets no layer, in words.

    Args:
        candidates: All sets of a model.
        head: What is said of the head.
        patterns: Patterns of layers, by the arguments that they were given for.
    """
    sets = [one.name for one in candidates.sets]
    names = [
        *sets,
        *(one.name for one in candidates.broken),
        *(one.name for one in candidates.skips),
    ]
    found = []
    for what, given in patterns.items():
        for pattern in given:
            if not any(matches(name, [pattern]) for name in names):
                found.append(f"{what} {pattern!r}")
    for name in [head] if isinstance(head, str) else head or []:
        if name != "auto" and not find_heads(candidates, name, strict=False):
            found.append(f"head {name!r}")
    return found + [f"neurons {pattern!r}" for pattern in candidates.unmet]


def _automatic_heads(candidates: Candidates[AnySet], traced: Sequence[str]) -> dict[str, str]:
    """The heads that a model declares, that came last before the loss, or that are guessed."""
    declared = []
    frozen = []  # which leave no trace
    for one in candidates.sets:
        if one.name in candidates.declared and not one.in_copy:
            declared.append(one.name)
            if not one.trains:
                frozen.append(one.name)
    outside = [name for name in traced if not _is_inside(name, candidates.declaring)]
    if traced and (outside or not frozen):
        # What a model declares may be unused in a larger one, or not the only head.
        both = [name for name in declared if name in traced]
        if not both:
            return dict.fromkeys(traced, TRACED)
        return dict.fromkeys(outside, TRACED) | dict.fromkeys(both, DECLARED)
    guessed = guessed_heads(candidates.sets)
    after = [name for name in guessed if not _is_inside(name, candidates.declaring)]
    if declared and not (after and not traced):
        return dict.fromkeys(declared, DECLARED)
    return guessed


def _is_inside(name: str, paths: Sequence[str]) -> bool:
    """Whether a layer is in one of the modules at these paths."""
    return any(not path or name == path or name.startswith(f"{path}.") for path in paths)


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


def _merged(one: AnySet) -> AnySet:
    """Groups of one neuron each as one group; any other set as it is."""
    groups, n, d = one.shape
    if groups == 1 or n != 1:
        return one
    return replace(one, shape=(1, groups, d), merged=True)


def _is_wanted(name: str, include: list[str] | None, exclude: list[str] | None) -> bool:
    """Whether the user's patterns leave a layer in."""
    if exclude is not None and matches(name, exclude):
        return False
    return include is None or matches(name, include)


def _not_asked_for(
    one: NeuronSet, include: list[str] | None, exclude: list[str] | None, *, everything: bool
) -> str | None:
    """Why the user does not want a set to be measured; None if it is wanted."""
    if exclude is not None and matches(one.name, exclude):
        return EXCLUDED
    if one.asked:
        return None
    if include is not None:
        return None if matches(one.name, include) else NOT_INCLUDED
    if one.kind == "embedding" and not everything:
        return f"an embedding, measured only when asked for: neurons={{'{one.name}': 'rows'}}"
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


def nothing_left(source: str, skips: Sequence[Skip]) -> str:
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
