"""Whether the penalty is absurdly strong: what shows on the few steps that are looked at.

A look needs the stats of a step, which takes arithmetic. On a GPU their copy to the host begins at
the step and is read at the next one, so that nobody waits. The first step of each optimizer is
looked at, the hundredth, the thousandth and so on, and steps whose stats are asked for anyway, at
most every twentieth. Where one of them is suspicious, up to ten steps in a row are looked at: one step proves little. With
``apply="loss"`` nothing is seen: the two gradients come as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer

from lightning_hsu._checks import listed
from lightning_hsu._engine.buffered import STRONG, GradientStats, LateStats
from lightning_hsu._engine.layer import Layer
from lightning_hsu._neurons.placement import Placement

STRONG_IN_A_ROW = 10
LIMITED_IN_A_ROW = 5  # with SGD of momentum 0.9 a training is over after ten
LOOKED_AT = frozenset({100, 1_000, 10_000, 100_000, 1_000_000})  # a schedule may have grown
_EVERY = 20  # steps between looks at stats that were asked for
_VANISHED = 0.1  # of the largest task gradient seen: below it the task has converged
_GROWN = 5.0  # the task's gradient over that of the run's first step: it is on its way up from 0

_WAY_OUT = (
    "Take a smaller coefficient, or coefficient=Share(0.05), which keeps the penalty's gradient at "
    "5 % of the task's."
)


@dataclass(frozen=True)
class Seen:
    """One layer at one step, in plain numbers.

    Args:
        name: The layer.
        coefficient: Its coefficient.
        neurons: How many it has.
        limited: How many of their penalty gradients the step limit shortened.
        strong: In how many of them the penalty's gradient is far above the task's.
        share: Norm of the penalty's gradient over that of the task's.
        task: Norm of the task's gradient.
    """

    name: str
    coefficient: float
    neurons: int
    limited: int
    strong: int
    share: float
    task: float

    @property
    def is_limited(self) -> bool:
        """Whether the step limit shortened most of the layer."""
        return 2 * self.limited > self.neurons

    @property
    def is_strong(self) -> bool:
        """Whether the penalty's gradient is far above the task's, in most of the neurons.

        A few near-duplicates may well feel a force that large. Where the task's gradient is 0 the
        two cannot be compared.
        """
        return math.isfinite(self.share) and self.share > STRONG and 2 * self.strong > self.neurons


@dataclass
class _Run:
    """Steps in a row on which a layer's penalty was far above its task.

    Attributes:
        steps: How many there were so far.
        task: Norm of the task's gradient at the first of them.
        largest: The largest norm of the task's gradient on any step that was looked at.
    """

    steps: int = 0
    task: float = 0.0
    largest: float = 0.0

    def note(self, seen: Seen) -> None:
        """Count a step, or begin again.

        A share says nothing while the task's gradient has vanished, since the penalty moves what
        the task leaves free, or while it grows from 0, as behind a layer that starts with zeros.
        """
        if math.isfinite(seen.task):
            self.largest = max(self.largest, seen.task)
        if not seen.is_strong or seen.task < _VANISHED * self.largest:
            self.steps = 0
            return
        if self.steps == 0 or seen.task > _GROWN * self.task:
            self.steps = 0
            self.task = seen.task
        self.steps += 1


class Looks:
    """Watches the steps of one optimizer and warns once.

    Attributes:
        looks: Whether the next step is to be looked at, asked for or not.
    """

    def __init__(self) -> None:
        self.looks = True  # at the first step
        self._is_done = False
        self._left = 0  # looks until a row of them ends
        self._last = 0  # the step of the last look
        self._limited = 0  # looks in a row at which most neurons were limited
        self._runs: dict[str, _Run] = {}

    def is_due(self, step: int) -> bool:
        """Whether to look at a step whose stats are known, after so many others."""
        return not self._is_done and (self.looks or step - self._last >= _EVERY)

    def see(self, step: int, layers: Sequence[Seen], *, compares: bool) -> str | None:
        """Look at a step; return what to warn of, once.

        Args:
            step: Steps that the optimizer has done before.
            layers: The layers that the step changed, but for those with a share.
            compares: Whether shares count. They do not where the penalty moves the weights past the
                optimizer, which may scale the task's gradient, and not the penalty's.
        """
        neurons = sum(one.neurons for one in layers)
        is_limited = 2 * sum(one.limited for one in layers) > neurons
        self._limited = self._limited + 1 if is_limited else 0
        strong = self._strong(layers) if compares else []
        message = None
        if strong:
            message = _strong_warning(strong)
        elif self._limited >= LIMITED_IN_A_ROW:
            message = _limited_warning([one for one in layers if one.is_limited])
        self._is_done = message is not None
        self._last = step
        self._plan_next()
        return message

    def _strong(self, layers: Sequence[Seen]) -> list[Seen]:
        """The layers with a far too strong penalty, if that has lasted."""
        lasts = False
        for one in layers:
            run = self._runs.setdefault(one.name, _Run())
            run.note(one)
            lasts |= run.steps >= STRONG_IN_A_ROW
        if not lasts:  # at a small initial scale it is strong for a few steps, and may well help
            return []
        return [one for one in layers if one.is_strong]

    def _plan_next(self) -> None:
        """Decide whether to look at the next step, for at most ten steps in a row."""
        is_suspicious = self._limited > 0 or any(run.steps > 0 for run in self._runs.values())
        self._left = self._left - 1 if self._left else STRONG_IN_A_ROW - 1
        self.looks = is_suspicious and self._left > 0 and not self._is_done
        if not self.looks:
            self._left = 0
            self._limited = 0
            for run in self._runs.values():
                run.steps = 0


class _Look(NamedTuple):
    """A step that is looked at.

    Args:
        optimizer: The id of its optimizer.
        watch: The watch of this optimizer.
        step: Steps that it has done before.
        numbers: What the step did; None if no layer counts.
        layers: The layers that count.
        coefficients: Their coefficients.
        compares: Whether shares count.
    """

    optimizer: int
    watch: Looks
    step: int
    numbers: LateStats | None
    layers: list[Layer]
    coefficients: dict[str, float]
    compares: bool


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

    def see(
        self,
        optimizer: Optimizer,
        step: int,
        stats: Mapping[str, GradientStats],
        layers: Sequence[Layer],
        coefficients: Mapping[str, Tensor | float],
        *,
        compares: bool,
    ) -> str | None:
        """Look at a step if it is due; return what to warn of, once.

        Args:
            optimizer: The optimizer.
            step: Steps that it has done before.
            stats: What the step did, by layer.
            layers: All layers.
            coefficients: Coefficients that change over time, by layer.
            compares: Whether shares count.
        """
        watch = self._watch_of(optimizer)
        chosen = [layer for layer in layers if layer.name in stats and not layer.has_share]
        if not stats or not watch.is_due(step):
            return None
        numbers = LateStats({layer.name: stats[layer.name] for layer in chosen}) if chosen else None
        known = {layer.name: _number(layer, coefficients) for layer in chosen}
        self.look = _Look(id(optimizer), watch, step, numbers, chosen, known, compares)
        if numbers is None or numbers.is_there:
            return self.settle()
        return None

    def settle(self) -> str | None:
        """Read the numbers of the last look; return what to warn of, once."""
        look = self.look
        self.look = None
        if look is None:
            return None
        numbers = {} if look.numbers is None else look.numbers.read()
        seen = []
        for layer in look.layers:
            groups, n, _ = layer.target.shape
            one = numbers[layer.name]
            limited = 0 if one.held else one.limited  # a layer within its share is no alarm
            counts = groups * n, limited, one.strong
            coefficient = look.coefficients[layer.name]
            seen.append(Seen(layer.name, coefficient, *counts, one.share, one.task))
        message = look.watch.see(look.step, seen, compares=look.compares)
        if any(layer.sharded for layer in look.layers):
            # Stats are collective calls then, and two ranks may differ by a rounding.
            look.watch.looks = bool(self._placement.agree(["looks"] if look.watch.looks else []))
        if look.watch.looks:
            self.quiet.discard(look.optimizer)
        else:
            self.quiet.add(look.optimizer)
        return message

    def _watch_of(self, optimizer: Optimizer) -> Looks:
        """The watch of an optimizer, which need not be hashable."""
        known = self._watches.get(id(optimizer))
        if known is not None and known[0]() is optimizer:
            return known[1]
        watch = Looks()
        self._watches[id(optimizer)] = ref(optimizer), watch
        return watch


def _number(layer: Layer, coefficients: Mapping[str, Tensor | float]) -> float:
    """The coefficient of a layer without a share."""
    strength = layer.strength
    return float(strength if isinstance(strength, float) else coefficients[layer.name])


def _limited_warning(layers: Sequence[Seen]) -> str:
    """Say that the step limit shortens most of the penalty."""
    most_first = sorted(layers, key=lambda one: -one.limited)
    named = [f"'{one.name}' ({one.limited:,} of {one.neurons:,} neurons)" for one in most_first]
    return (
        f"the penalty is too strong with {_coefficients(layers)}: on {LIMITED_IN_A_ROW} steps in a "
        f"row the step limit shortened most of it, in layer {listed(named)}. {_WAY_OUT}"
    )


def _strong_warning(layers: Sequence[Seen]) -> str:
    """Say that the penalty's gradient drowns the task's."""
    most_first = sorted(layers, key=lambda one: -one.share)
    named = [f"'{one.name}' ({one.share:,.0f} times)" for one in most_first]
    return (
        f"the penalty is too strong with {_coefficients(layers)}: on {STRONG_IN_A_ROW} steps in a row its "
        f"gradient was more than {STRONG:g} times the task's, in layer {listed(named)}. {_WAY_OUT}"
    )


def _coefficients(layers: Sequence[Seen]) -> str:
    """The coefficients of the layers, in words."""
    smallest = min(one.coefficient for one in layers)
    largest = max(one.coefficient for one in layers)
    if smallest == largest:
        return f"coefficient {largest:g}"
    return f"coefficients of {smallest:g} to {largest:g}"
