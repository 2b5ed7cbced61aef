"""What of a stored training state can be used, and in words what cannot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_hsu._checks import listed
from lightning_hsu._core import exact_arithmetic
from lightning_hsu._engine.layer import Layer, to_compute_dtype
from lightning_hsu._engine.reuse import Reuse, stored_reuse
from lightning_hsu._engine.work import Work, stored_work
from lightning_hsu.coefficients import Share
from lightning_hsu.measures import Measure, State

VERSION = 1
"""The version of the states that are written; those without a number came before."""

_KNOWN = ("version", "steps", "states", "measures", "shares", "heads", "reuse", "work")
_MEANINGS = {
    "state": "schedules, shares and what measures carry begin anew, as at a first step",
    "version": "what this version of lightning_hsu knows is loaded",
    "steps": "schedules and every_n_steps count from step 0 there",
    "states": "what these layers' measures search, learn or draw begins anew",
    "measures": "a state of another measure cannot be told by that",
    "shares": "the means of these layers' gradients begin anew",
    "heads": "without them the heads are those that the model declares, or its last Linear; "
    "head='...' names another",
    "reuse": "it is measured anew how long the gradients of these layers can be used",
    "work": "hsu/recomputed counts from here on",
    "unknown": "these parts are left out",
}
_MOST_STEPS = 2**53  # float64 holds every count up to this, and schedules divide them
_MOST_NAMES = 2**16  # of optimizers and of heads
_LARGEST_NORM = 1e38  # of a gradient: float32 holds it
_SHOWN = 8
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Dropped:
    """What of a stored state cannot be used, by part, in words."""

    def __init__(self) -> None:
        self._reasons: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self._reasons)

    def add(self, part: str, reason: str) -> None:
        """Note that a part, or something in it, cannot be used."""
        self._reasons.setdefault(part, []).append(reason)

    def __str__(self) -> str:
        """One message: each part, what is wrong with it, and what that means."""
        parts = []
        for part, reasons in self._reasons.items():
            parts.append(f"{part}: {listed(reasons, _SHOWN)}; {_MEANINGS[part]}")
        return f"the penalty's stored state is used only in part. {'. '.join(parts)}."


@dataclass
class Stored:
    """A stored state, checked and copied.

    Attributes:
        steps: Steps done by each optimizer.
        states: States of measures by layer.
        measures: Whose states these are, by layer, where that is known.
        shares: Means of gradient norms by layer.
        heads: Names of layers.
        reuse: For how long gradients may be used, by layer.
        work: The arithmetic of the steps since the last row of a log.
        dropped: What was left out.
    """

    steps: list[int] = field(default_factory=list)
    states: dict[str, State] = field(default_factory=dict)
    measures: dict[str, str] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    reuse: dict[str, Reuse] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    dropped: Dropped = field(default_factory=Dropped)


def checked(state: object) -> Stored:
    """Take from a stored state what can be used, whatever it holds."""
    found = Stored()
    if not isinstance(state, Mapping):
        found.dropped.add("state", f"it is {_what(state)}, and not a mapping")
        return found
    _check_version(state, found.dropped)
    unknown = [_what(key) for key in state if not isinstance(key, str) or key not in _KNOWN]
    if unknown:
        found.dropped.add("unknown", listed(unknown, _SHOWN))
    found.steps = _steps(state, found.dropped)
    for name, part in _by_layer(state, "states", found.dropped):
        measure_state = _state_of_layer(name, part, found.dropped)
        if measure_state is not None:
            found.states[name] = measure_state
    for name, part in _by_layer(state, "measures", found.dropped):
        if isinstance(part, str):
            found.measures[name] = part
    for name, part in _by_layer(state, "shares", found.dropped):
        why = _why_no_means(part)
        if why is None and isinstance(part, Tensor):
            found.shares[name] = _copied(part)
        else:
            found.dropped.add("shares", f"layer {_what(name)} ({why})")
    found.heads = _heads(state, found.dropped)
    for name, part in _by_layer(state, "reuse", found.dropped):
        reuse = stored_reuse(part)
        if reuse is None:
            found.dropped.add("reuse", f"layer {_what(name)} ({_what(part)} is no interval)")
        else:
            found.reuse[name] = reuse
    if "work" in state:
        work = stored_work(state["work"])
        if work is None:
            found.dropped.add("work", f"it is {_what(state['work'])}")
        else:
            found.work = work
    return found


def kind_of(measure: Measure) -> str:
    """The classes that a measure is made of, without their settings.

    Example:
        >>> from lightning_hsu.measures import Covering
        >>> from lightning_hsu.projections import Projected
        >>> kind_of(Covering()), kind_of(Projected())
        ('Covering', 'Projected RieszEnergy RandomProjection')
    """
    return " ".join(re.findall(r"\b\w+(?=\()", repr(measure)))


def drop_unfit(
    states: dict[str, State],
    measures: Mapping[str, str],
    layers: Sequence[Layer],
    dropped: Dropped,
) -> None:
    """Drop states that the layers' measures cannot go on from, or that are of other measures.

    Where ranks share the weights, all must call it, while these are whole.
    """
    for layer in layers:
        if not layer.measure.has_state or not states.get(layer.name):
            continue
        why = _why_unfit(layer, states[layer.name])
        kind = measures.get(layer.name)
        if why is None and kind is not None and kind != kind_of(layer.measure):
            why = f"it is of another measure, {_what(kind)}"
        if why is not None:
            del states[layer.name]
            dropped.add("states", f"layer {_what(layer.name)} {layer.target.shape} ({why})")


def note_renamed(
    part: str,
    stored: Iterable[str],
    wanted: Iterable[str],
    layers: Sequence[Layer],
    dropped: Dropped,
) -> None:
    """Note layers that have nothing stored, if something is stored for a layer that is not here.

    Args:
        part: The part of the state.
        stored: The names in it.
        wanted: Names of layers that need something stored.
        layers: All layers.
        dropped: Where to note them.
    """
    names = {layer.name for layer in layers}
    strangers = [_what(name) for name in stored if name not in names]
    kept = set(stored)
    missing = [_what(name) for name in wanted if name not in kept]
    if missing and strangers:
        dropped.add(
            part,
            f"there is nothing for layer {listed(missing, _SHOWN)}, but something for "
            f"{listed(strangers, _SHOWN)}, which is not measured",
        )


def what_counts(layers: Sequence[Layer], every_n_steps: int) -> list[str]:
    """What depends on the steps before, in words; [] if a training without them is the same."""
    scheduled, shared, carrying = [], [], []
    active = [layer for layer in layers if layer.strength != 0]
    for layer in active:
        if layer.has_share:
            shared.append(_what(layer.name))
        elif not isinstance(layer.strength, float):
            scheduled.append(_what(layer.name))
        if layer.measure.has_state:
            carrying.append(_what(layer.name))
    found = []
    if scheduled:
        found.append(f"the schedule of layer {listed(scheduled, _SHOWN)}, at step 0")
    if active and every_n_steps > 1:
        found.append(f"the count of every_n_steps={every_n_steps}")
    if shared:
        found.append(f"the means of gradients for the Share of layer {listed(shared, _SHOWN)}")
    if carrying:
        found.append(
            f"what the measure of layer {listed(carrying, _SHOWN)} searches, learns or draws"
        )
    return found


def needing_state(layers: Sequence[Layer]) -> list[str]:
    """Names of the layers whose measures carry something from step to step."""
    return [one.name for one in layers if one.strength != 0 and one.measure.has_state]


def needing_means(layers: Sequence[Layer]) -> list[str]:
    """Names of the layers whose coefficient is a share of the task's gradient."""
    return [layer.name for layer in layers if isinstance(layer.strength, Share)]


def _check_version(state: Mapping[object, object], dropped: Dropped) -> None:
    """Note a version that this one does not know."""
    version = state.get("version", 0)
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        dropped.add("version", f"{_what(version)} is none")
    elif version > VERSION:
        dropped.add(
            "version", f"the state has version {_what(version)}, and the newest known is {VERSION}"
        )


def _steps(state: Mapping[object, object], dropped: Dropped) -> list[int]:
    """The counts of the optimizers; 0 in the place of one that is none."""
    if "steps" not in state:
        dropped.add("steps", "there are none")
        return []
    steps = state["steps"]
    if not isinstance(steps, list | tuple):
        dropped.add("steps", f"{_what(steps)} is no list of counts")
        return []
    if len(steps) > _MOST_NAMES:
        dropped.add("steps", f"{len(steps)} counts are more than there are optimizers")
        return []
    found = []
    for i, count in enumerate(steps):
        is_count = isinstance(count, int) and not isinstance(count, bool)
        if is_count and 0 <= count <= _MOST_STEPS:
            found.append(int(count))
        else:
            found.append(0)
            dropped.add("steps", f"{_what(count)} of optimizer {i} is no count")
    return found


def _by_layer(
    state: Mapping[object, object], part: str, dropped: Dropped
) -> list[tuple[str, object]]:
    """Pairs of a layer's name and what is stored for it."""
    stored = state.get(part, {})
    if not isinstance(stored, Mapping):
        dropped.add(part, f"{_what(stored)} is no mapping of layers")
        return []
    found = []
    for name, one in stored.items():
        if isinstance(name, str):
            found.append((name, one))
        else:
            dropped.add(part, f"{_what(name)} is no name of a layer")
    return found


def _state_of_layer(name: str, stored: object, dropped: Dropped) -> State | None:
    """A copy of a layer's state; None if anything in it cannot be used."""
    if not isinstance(stored, Mapping):
        dropped.add("states", f"layer {_what(name)} ({_what(stored)} is no mapping of tensors)")
        return None
    found: State = {}
    for key, part in stored.items():
        why = None if isinstance(key, str) else "is no name of a tensor"
        if why is None:
            why = _why_no_tensor(part)
        if why is not None or not isinstance(part, Tensor):
            dropped.add("states", f"layer {_what(name)} ({_what(key)} {why})")
            return None
        found[key] = _copied(part)
    return found


def _heads(state: Mapping[object, object], dropped: Dropped) -> list[str]:
    """Names of heads."""
    heads = state.get("heads", [])
    if not isinstance(heads, list | tuple) or len(heads) > _MOST_NAMES:
        dropped.add("heads", f"{_what(heads)} is no list of layers")
        return []
    found = [name for name in heads if isinstance(name, str)]
    others = [_what(name) for name in heads if not isinstance(name, str)]
    if others:
        dropped.add("heads", f"{listed(others, _SHOWN)} is no name of a layer")
    return found


def _why_no_tensor(part: object) -> str | None:
    """Why something is no plain tensor of finite numbers; None if it is one."""
    if not isinstance(part, Tensor):
        return f"is {_what(part)}, and not a tensor"
    if type(part) not in (Tensor, nn.Parameter):
        return f"is a {type(part).__name__}, and not a plain tensor"
    if part.layout is not torch.strided or part.is_meta or part.is_nested:
        return "is sparse, nested, or without numbers"
    if part.dtype not in (*_FLOATING, *_WHOLE):
        return f"is of {part.dtype}"
    if part.numel() * part.element_size() > part.untyped_storage().nbytes():
        return f"of shape {tuple(part.shape)} is larger than what is stored"
    if part.is_floating_point() and not bool(part.detach().isfinite().all()):
        return "holds NaN or infinite numbers"
    return None


def _why_no_means(part: object) -> str | None:
    """Why something is not the means of two norms; None if it is."""
    why = _why_no_tensor(part)
    if why is not None or not isinstance(part, Tensor):
        return f"what is stored {why}"
    if part.shape != (2,) or not part.is_floating_point():
        return f"a tensor of {part.dtype} and shape {tuple(part.shape)} is not two norms"
    norms = part.detach().double()
    if not bool(((norms >= 0) & (norms < _LARGEST_NORM)).all()):
        return f"{norms.tolist()} are not norms"
    return None


def _why_unfit(layer: Layer, state: State) -> str | None:
    """Why a layer's measure cannot go on from a state; None if it can."""
    try:
        x = to_compute_dtype(layer.target.neurons().detach())
        state = {name: on_device(part, x) for name, part in state.items()}
        with torch.no_grad(), exact_arithmetic(x):
            return _why_unfit_at(layer.measure, x, state)
    except Exception as error:  # of somebody's own measure, or of what computes the neurons
        return f"{type(error).__name__}: {str(error)[:200]}"


def _why_unfit_at(measure: Measure, x: Tensor, state: State) -> str | None:
    """Why a measure cannot go on from a state at neurons x (groups, n, d); None if it can."""
    if not measure.goes_on(x, state):
        return f"it is not one of {measure!r}"
    following = measure.prepare(x, state)
    # A search from a strange place may only break down at its next step.
    if _is_finite_at(measure, x, following, measure.prepare(x, following)):
        return None
    fresh = measure.prepare(x)
    if not _is_finite_at(measure, x, fresh, measure.prepare(x, fresh)):
        return None  # because of the weights: those of this layer are not finite
    return "it leads to a gradient that is not finite"


def _is_finite_at(measure: Measure, x: Tensor, *states: State | None) -> bool:
    """Whether states, and the gradients at neurons x (groups, n, d) under them, are finite."""
    found = []
    for state in states:
        found.append(measure.value_and_grad(x, state)[1])
        found += (state or {}).values()
    return all(bool(part.isfinite().all()) for part in found)


def _copied(part: Tensor) -> Tensor:
    """A copy without a graph; whole numbers stay on the host."""
    copy = part.detach().clone()
    return copy if copy.is_floating_point() else copy.cpu()


def on_device(part: Tensor, x: Tensor) -> Tensor:
    """A part of a state on the device of x; whole numbers stay on the host."""
    return part.to(x.device) if part.is_floating_point() else part


def _what(value: object) -> str:
    """Describe a value, however large or strange it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, int) and abs(value) > _MOST_STEPS:
        return "a huge int"
    if value is None or type(value) in (int, float, bool):
        return repr(value)
    if isinstance(value, str):
        short = value if len(value) <= 60 else value[:57] + "..."
        return repr(short)
    return f"a {type(value).__name__}"
