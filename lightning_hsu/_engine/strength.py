"""Whether the penalty is far too strong, or does nothing: what shows on the few steps that are looked at.

A look needs the stats of a step, which takes arithmetic. On a GPU their copy to the host begins at
the step and is read at the next one, so that nobody waits. The first step of each optimizer is
looked at, the hundredth, the thousandth and so on, and steps whose stats are asked for anyway, at
most every twentieth. Where one of them is suspicious, up to ten steps in a row are looked at: one step proves little. With
``apply="loss"`` nothing is seen: the two gradients come as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer

from lightning_hsu._checks import listed
from lightning_hsu._core.limits import SAFE_SHARE
from lightning_hsu._engine.buffered import STRONG, GradientStats, LateStats
from lightning_hsu._engine.layer import Layer
from lightning_hsu._neurons.placement import Placement
from lightning_hsu.measures.defaults import SHARE_LIMIT

STRONG_IN_A_ROW = 10
LIMITED_IN_A_ROW = 5  # with SGD of momentum 0.9 a training is over after ten
LOOKED_AT = (100, 1_000, 10_000, 100_000, 1_000_000)  # a schedule may have grown
WARMED_UP = 100
"""Steps after which what lasts is no matter of the start: a small initial scale, or a warm-up."""

_EVERY = 20  # steps between looks at stats that were asked for
_VANISHED = 0.1  # of the largest gradient seen: below it the task, or the penalty, has converged
_GROWN = 5.0  # the task's gradient over that of the run's first step: it is on its way up from 0
_LARGER = 1.001  # share from which the penalty's gradient is the larger one: more than a rounding
_WEAK = 1e-4  # share below which a penalty does next to nothing
_NAMED = 3  # layers that are named where the share limit holds some of them


def looked_at(every_n_steps: int) -> frozenset[int]:
    """The steps that are looked at in any case, if the penalty is applied on every n-th step.

    Example:
        >>> sorted(looked_at(3))[:3]
        [102, 1002, 10002]
    """
    return frozenset(-(-step // every_n_steps) * every_n_steps for step in LOOKED_AT)


class Finding(NamedTuple):
    """What the looks have shown, and is to be told once.

    Args:
        kind: "strong": the penalty is too strong. "held": it is held to a share of the task, as
            ``share_limit`` says; "loose": as it says, too, but that share is large. "weak": it does
            next to nothing. "unknown": nothing tells what the optimizer makes of a gradient, or how
            long its steps are, with which the limits compare.
        text: What to say.
    """

    kind: Literal["strong", "held", "loose", "weak", "unknown"]
    text: str

    @property
    def is_alarm(self) -> bool:
        """Whether the penalty may keep the task from being learnt."""
        return self.kind in ("strong", "loose")


@dataclass(frozen=True)
class Seen:
    """One layer at one step, in plain numbers.

    Args:
        name: The layer.
        coefficient: Its coefficient.
        shape: Its groups, neurons and dimension.
        limited: How many neurons' penalty gradients the step limit shortened.
        strong: In how many of them the penalty's gradient is far above the task's.
        share: Norm of the penalty's gradient over that of the task's.
        task: Norm of the task's gradient.
        held: Whether the share limit shortened the penalty's gradient.
        head: Whether it is a head.
    """

    name: str
    coefficient: float
    shape: tuple[int, int, int]
    limited: int
    strong: int
    share: float
    task: float
    held: bool = False
    head: bool = False

    @property
    def neurons(self) -> int:
        """How many neurons it has."""
        groups, n, _ = self.shape
        return groups * n


@dataclass
class _Run:
    """Steps in a row on which a layer's penalty was too strong beside its task.

    Attributes:
        steps: How many there were so far.
        task: Norm of the task's gradient at the first of them.
        largest: The largest norm of the task's gradient on any step that was looked at.
    """

    steps: int = 0
    task: float = 0.0
    largest: float = 0.0

    def note(self, seen: Seen, *, is_strong: bool) -> None:
        """Count a step, or begin again.

        A share says nothing while the task's gradient has vanished, since the penalty moves what
        the task leaves free, or while it grows from 0, as behind a layer that starts with zeros.
        """
        if math.isfinite(seen.task):
            self.largest = max(self.largest, seen.task)
        if not is_strong or seen.task < _VANISHED * self.largest:
            self.steps = 0
            return
        if self.steps == 0 or seen.task > _GROWN * self.task:
            self.steps = 0
            self.task = seen.task
        self.steps += 1


class Looks:
    """Watches the steps of one optimizer.

    Args:
        told: Kinds of findings that were told, each once: common to all optimizers.

    Attributes:
        looks: Whether the next step is to be looked at, asked for or not.
    """

    def __init__(self, told: set[str]) -> None:
        self.looks = True  # at the first step
        self._told = told
        self._left = 0  # looks until a row of them ends
        self._last = 0  # the step of the last look
        self._limited = 0  # looks in a row at which most neurons were limited
        self._weak_looks = 0  # and at which the penalty did next to nothing
        self._held: dict[str, int] = {}  # and at which the share limit held a layer, by layer
        self._strong: dict[str, _Run] = {}  # far above the task, by layer
        self._larger: dict[str, _Run] = {}  # above the task, after the first steps
        self._penalties: dict[str, float] = {}  # the largest norms of the penalty's gradients

    def is_due(self, step: int) -> bool:
        """Whether to look at a step whose stats are known, after so many others."""
        return self.looks or step - self._last >= _EVERY

    def see(
        self,
        step: int,
        layers: Sequence[Seen],
        share_limit: float | None,
        *,
        compares: bool,
        is_fixed: bool,
    ) -> list[Finding]:
        """Look at a step; return what to tell, each kind once.

        Args:
            step: Steps that the optimizer has done before.
            layers: The layers that the step changed, but for those with a share.
            share_limit: The share limit.
            compares: Whether shares count. They do not where the penalty moves the weights past the
                optimizer, which may scale the task's gradient, and not the penalty's.
            is_fixed: Whether all coefficients are numbers, so that a small one is not meant for the
                moment.
        """
        is_late = step >= WARMED_UP
        neurons = limited = 0
        held = []
        for one in layers:
            neurons += one.neurons
            limited += one.limited
            looks = _in_a_row(self._held.get(one.name, 0), is_late and _is_held(one))
            self._held[one.name] = looks
            if looks >= STRONG_IN_A_ROW:
                held.append(one)
        weak = self._weak(layers)
        self._limited = _in_a_row(self._limited, 2 * limited > neurons)
        self._weak_looks = _in_a_row(
            self._weak_looks, bool(weak) and is_late and compares and is_fixed
        )
        found = []
        text = self._too_strong(layers, share_limit, compares=compares, is_late=is_late)
        if text is not None:
            found.append(Finding("strong", text))
        if held and share_limit is not None:
            text = _held_text(held, len(layers), share_limit, compares=compares)
            found.append(Finding("held" if share_limit <= SAFE_SHARE else "loose", text))
        if self._weak_looks >= STRONG_IN_A_ROW:
            is_any_held = any(one.held for one in layers)
            found.append(Finding("weak", _weak_warning(weak, is_any_held=is_any_held)))
        new = [one for one in found if one.kind not in self._told]
        for finding in new:
            self._told.add(finding.kind)
        self._last = step
        self._plan_next()
        return new

    def _too_strong(
        self,
        layers: Sequence[Seen],
        share_limit: float | None,
        *,
        compares: bool,
        is_late: bool,
    ) -> str | None:
        """Say that the penalty is too strong, if that has lasted."""
        # At a small initial scale it is strong for a few steps, and may well help.
        strong = _lasting(self._strong, layers, _is_strong if compares else _never)
        larger = _lasting(self._larger, layers, _is_larger if compares and is_late else _never)
        if strong:
            text = _strong_warning(strong)
        elif self._limited >= LIMITED_IN_A_ROW:
            text = _limited_warning(layers)
        elif larger:
            text = _larger_warning(larger)
        else:
            return None
        return f"{text}. {_way_out(share_limit)}"

    def _weak(self, layers: Sequence[Seen]) -> list[Seen]:
        """The layers that count, if the penalty does next to nothing in all, and did no more before.

        Its gradient vanishes as well where it has done its work. Layers that are held do not count,
        since their coefficient would allow more, nor do those without a task's gradient.
        """
        counting = [one for one in layers if not one.held and math.isfinite(one.share)]
        is_weak = True
        largest_share = 0.0
        for one in counting:
            penalty = one.share * one.task
            largest = max(penalty, self._penalties.get(one.name, 0.0))
            self._penalties[one.name] = largest
            is_weak &= one.share < _WEAK and penalty >= _VANISHED * largest
            largest_share = max(largest_share, one.share)
        return counting if is_weak and largest_share > 0 else []

    def _plan_next(self) -> None:
        """Decide whether to look at the next step, for at most ten steps in a row."""
        runs = [*self._strong.values(), *self._larger.values()]
        is_suspicious = self._limited > 0
        for run in runs:
            is_suspicious |= run.steps > 0
        is_suspicious &= "strong" not in self._told
        is_suspicious |= any(self._held.values()) and self._told.isdisjoint(("held", "loose"))
        is_suspicious |= self._weak_looks > 0 and "weak" not in self._told
        self._left = self._left - 1 if self._left else STRONG_IN_A_ROW - 1
        self.looks = is_suspicious and self._left > 0
        if not self.looks:
            self._left = 0
            self._limited = self._weak_looks = 0
            self._held.clear()
            for run in runs:
                run.steps = 0


def _in_a_row(looks: int, is_so: bool) -> int:
    """How many looks in a row something was so, with one more at which it is or is not."""
    return looks + 1 if is_so else 0


def _is_strong(seen: Seen) -> bool:
    """Whether the penalty's gradient is far above the task's, in most of the neurons.

    A few near-duplicates may well feel a force that large. Where the task's gradient is 0 the two
    cannot be compared.
    """
    return math.isfinite(seen.share) and seen.share > STRONG and 2 * seen.strong > seen.neurons


def _is_larger(seen: Seen) -> bool:
    """Whether the penalty's gradient is larger than the task's."""
    return math.isfinite(seen.share) and seen.share > _LARGER


def _is_held(seen: Seen) -> bool:
    """Whether the share limit held a layer; where the task's gradient is 0 nothing is told of it."""
    return seen.held and math.isfinite(seen.share)


def _never(seen: Seen) -> bool:
    """Whether the two gradients can be compared where they cannot."""
    return False


def _lasting(
    runs: dict[str, _Run], layers: Sequence[Seen], is_strong: Callable[[Seen], bool]
) -> list[Seen]:
    """The layers that are too strong, if any of them has been for ten looks in a row."""
    strong = []
    lasts = False
    for one in layers:
        run = runs.setdefault(one.name, _Run())
        run.note(one, is_strong=is_strong(one))
        lasts |= run.steps >= STRONG_IN_A_ROW
        if is_strong(one):
            strong.append(one)
    return strong if lasts else []


class _Look(NamedTuple):
    """A step that is looked at.

    Args:
        optimizer: The id of its optimizer.
        watch: The watch of this optimizer.
        step: Steps that it has done before.
        numbers: What the step did; None if no layer counts.
        layers: The layers that count.
        coefficients: Their coefficients.
        share_limit: The share limit.
        compares: Whether shares count.
        is_fixed: Whether all coefficients are numbers.
    """

    optimizer: int
    watch: Looks
    step: int
    numbers: LateStats | None
    layers: list[Layer]
    coefficients: dict[str, float]
    share_limit: float | None
    compares: bool
    is_fixed: bool


class StrengthWatch:
    """Watches how strong the penalty is, for each optimizer by itself.

    Args:
        placement: How the weights are placed over ranks, which have to look at the same steps.

    Attributes:
        quiet: Ids of optimizers whose next step is looked at only if its stats are asked for.
        look: A look whose numbers are still to be read; on a GPU that is done at the next step.
    """

    def __init__(self, placement: Placement) -> None:
        self.quiet: set[int] = set()
        self._placement = placement
        self.look: _Look | None = None
        self._watches: dict[int, tuple[ref[Optimizer], Looks]] = {}
        self._told: set[str] = set()

    def see(
        self,
        optimizer: Optimizer,
        step: int,
        stats: Mapping[str, GradientStats],
        layers: Sequence[Layer],
        coefficients: Mapping[str, Tensor | float],
        share_limit: float | None,
        *,
        compares: bool,
    ) -> list[Finding]:
        """Look at a step if it is due; return what to tell, each kind once.

        Args:
            optimizer: The optimizer.
            step: Steps that it has done before.
            stats: What the step did, by layer.
            layers: All layers.
            coefficients: Coefficients that change over time, by layer.
            share_limit: The share limit.
            compares: Whether shares count.
        """
        watch = self._watch_of(optimizer)
        changed = [layer for layer in layers if layer.name in stats]
        chosen = [layer for layer in changed if not layer.has_share]
        if not stats or not watch.is_due(step):
            return []
        numbers = LateStats({layer.name: stats[layer.name] for layer in chosen}) if chosen else None
        known = {layer.name: _number(layer, coefficients) for layer in chosen}
        is_fixed = all(isinstance(layer.strength, float) for layer in changed)
        limits = share_limit, compares, is_fixed
        self.look = _Look(id(optimizer), watch, step, numbers, chosen, known, *limits)
        if numbers is None or numbers.is_there:
            return self.settle()
        return []

    def settle(self) -> list[Finding]:
        """Read the numbers of the last look; return what to tell, each kind once."""
        look = self.look
        self.look = None
        if look is None:
            return []
        numbers = {} if look.numbers is None else look.numbers.read()
        seen = []
        for layer in look.layers:
            one = numbers[layer.name]
            limited = 0 if one.held else one.limited  # a layer within its share is no alarm
            found = Seen(
                layer.name,
                look.coefficients[layer.name],
                layer.target.shape,
                limited,
                one.strong,
                one.share,
                one.task,
                one.held,
                layer.target.head,
            )
            seen.append(found)
        findings = look.watch.see(
            look.step, seen, look.share_limit, compares=look.compares, is_fixed=look.is_fixed
        )
        if any(layer.sharded for layer in look.layers):
            # Stats are collective calls then, and two ranks may differ by a rounding.
            look.watch.looks = bool(self._placement.agree(["looks"] if look.watch.looks else []))
        if look.watch.looks:
            self.quiet.discard(look.optimizer)
        else:
            self.quiet.add(look.optimizer)
        return findings

    def _watch_of(self, optimizer: Optimizer) -> Looks:
        """The watch of an optimizer, which need not be hashable."""
        known = self._watches.get(id(optimizer))
        if known is not None and known[0]() is optimizer:
            return known[1]
        watch = Looks(self._told)
        self._watches[id(optimizer)] = ref(optimizer), watch
        return watch


def _number(layer: Layer, coefficients: Mapping[str, Tensor | float]) -> float:
    """The coefficient of a layer without a share."""
    strength = layer.strength
    return float(strength if isinstance(strength, float) else coefficients[layer.name])


def _limited_warning(layers: Sequence[Seen]) -> str:
    """Say that the step limit shortens most of the penalty."""
    limited = []
    named = []
    for one in sorted(layers, key=lambda one: -one.limited):
        if 2 * one.limited > one.neurons:
            limited.append(one)
            named.append(f"'{one.name}' ({one.limited:,} of {one.neurons:,} neurons)")
    return (
        f"the penalty is too strong with {_coefficients(limited)}: on {LIMITED_IN_A_ROW} steps in a "
        f"row the step limit shortened most of it, in layer {listed(named)}"
    )


def _way_out(share_limit: float | None) -> str:
    """What to do about a penalty that is too strong."""
    if share_limit is None or share_limit > SAFE_SHARE:
        return (
            f"Set share_limit={SHARE_LIMIT:g}, which holds the penalty's gradient to "
            f"{SHARE_LIMIT:.0%} of the task's in each layer, or coefficient=Share({SHARE_LIMIT:g}), "
            f"which keeps it at {SHARE_LIMIT:.0%}; a smaller coefficient may not be enough"
        )
    # The share is below the limit already: a Share might raise it.
    return "Take a smaller coefficient or share_limit"


def _strong_warning(layers: Sequence[Seen]) -> str:
    """Say that the penalty's gradient drowns the task's."""
    return (
        f"the penalty is too strong with {_coefficients(layers)}: on {STRONG_IN_A_ROW} steps in a row its "
        f"gradient was more than {STRONG:g} times the task's, in layer {_times(layers, 0)}"
    )


def _larger_warning(layers: Sequence[Seen]) -> str:
    """Say that the penalty's gradient stays larger than the task's."""
    return (
        f"the penalty is stronger than the task with {_coefficients(layers)}: on {STRONG_IN_A_ROW} "
        f"steps in a row, after more than {WARMED_UP}, its gradient was larger than the task's, in "
        f"layer {_times(layers, 1)}"
    )


def _held_text(held: Sequence[Seen], count: int, share_limit: float, *, compares: bool) -> str:
    """Say that the share limit decides how strong the penalty is, and where that may be too much.

    Args:
        held: The layers that it holds.
        count: How many layers there are.
        share_limit: The share limit.
        compares: Whether it is a share of the task's gradient, not of the optimizer's step.
    """
    where = f"{len(held):,} of {count:,} layers"
    if len(held) < count:
        named = listed([f"'{one.name}'" for one in held], _NAMED)
        where = f"{where}, {named}"
    share = f"{share_limit:g} of the task's gradient"
    if not compares:
        share = f"{share_limit:g} of the optimizer's step"
    begin = (
        f"the share limit has decided how strong the penalty is for {STRONG_IN_A_ROW} steps in a row in "
        f"{where} ({share})"
    )
    if share_limit > SAFE_SHARE:
        return (
            f"{begin}. That may be too much for the task to be learnt as well: set "
            f"share_limit={SHARE_LIMIT:g}, or take a smaller coefficient"
        )
    begin = f"{begin}; a larger coefficient changes nothing there"
    if share_limit > SHARE_LIMIT:
        return f"{begin}. Where rows must be alike take share_limit={SHARE_LIMIT:g} or {_left_out(held)}"
    return begin


def _left_out(held: Sequence[Seen]) -> str:
    """The setting that leaves out a layer: the head if it is held, else the one with the fewest neurons."""
    if any(one.head for one in held):
        return "head_coefficient=0"
    fewest = min(held, key=lambda one: one.neurons)
    return f"exclude='{fewest.name}'"


def _weak_warning(layers: Sequence[Seen], *, is_any_held: bool) -> str:
    """Say that the penalty does next to nothing.

    Args:
        layers: The layers that are not held.
        is_any_held: Whether the share limit holds others.
    """
    one = max(layers, key=lambda one: one.share)
    where = " in the layers that the share limit does not hold" if is_any_held else ""
    return (
        f"the penalty does next to nothing{where} with {_coefficients(layers)}: on {STRONG_IN_A_ROW} "
        f"steps in a row its gradient was less than {_WEAK:g} of the task's in each of {len(layers):,} "
        f"layers, at most {one.share:.1e} in layer '{one.name}' {one.shape}. There a coefficient of about "
        f"{one.coefficient * SHARE_LIMIT / one.share:.1g} would make it {SHARE_LIMIT:.0%}, as "
        f"coefficient=Share({SHARE_LIMIT:g}) does by itself"
    )


def _times(layers: Sequence[Seen], digits: int) -> str:
    """The layers, and how many times the task's gradient the penalty's is there."""
    named = []
    for one in sorted(layers, key=lambda one: -one.share):
        named.append(f"'{one.name}' ({one.share:,.{digits}f} times)")
    return listed(named)


def _coefficients(layers: Sequence[Seen]) -> str:
    """The coefficients of the layers, in words."""
    smallest = min(one.coefficient for one in layers)
    largest = max(one.coefficient for one in layers)
    if smallest == largest:
        return f"coefficient {largest:g}"
    return f"coefficients of {smallest:g} to {largest:g}"
