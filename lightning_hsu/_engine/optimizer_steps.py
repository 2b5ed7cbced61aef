"""How long an optimizer's last step was, as its state and settings tell, over the learning rate.

What moves neurons past the optimizer is compared with that. All is in root mean squares over the
entries of a layer, which are read in few calls, and nothing waits for a device. Where the formula
has a ratio of entries, the ratio of their root mean squares stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, RAdam

from lightning_hsu._core.limits import norms_of
from lightning_hsu._engine.rates import Rate, Rates, distance_of

TASK = "task"
"""The name under which a rule finds the root mean square of the task's gradient."""

WEIGHT = "weight"
"""The same of the parameter."""

_HOLD_SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"})
"""Names of state that holds squares: the root of the mean of its entries is taken."""

_DIVIDED = frozenset({"ZeroRedundancyOptimizer", "OSS"})
"""Optimizers each rank of which knows the state of its own part of the parameters only."""


class Part(NamedTuple):
    """The entries of one parameter that belong to a layer.

    Args:
        parameter: The parameter.
        task: Those of its ``.grad`` that this rank holds.
        entries: How many there are, on all ranks.
        of: Takes a tensor that is like the parameter to those of its entries that this rank holds;
            to None if it is of another shape or layout.
        total: Sums numbers over the ranks that hold the other entries; None if this one holds all.
    """

    parameter: nn.Parameter
    task: Tensor
    entries: int
    of: Callable[[Tensor], Tensor | None]
    total: Callable[[Tensor], Tensor] | None = None


class _Known(NamedTuple):
    """What a rule knows besides root mean squares.

    Args:
        group: The settings of the optimizer.
        rate: The learning rate.
        step: Steps done: a number, on a device a tensor (k,); None if the state does not tell.
        shape: Shape of the parameter.
    """

    group: Mapping[str, Any]
    rate: Rate
    step: Tensor | float | None
    shape: torch.Size

    @property
    def eps(self) -> float:
        """What is added to a denominator."""
        eps = self.group.get("eps")
        return eps if isinstance(eps, float) else 0.0

    def debiased(self, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Root mean squares (k,) of running means that began at 0, freed from that."""
        if self.step is None:
            return mean, squares
        beta, beta_of_squares = self.group["betas"][:2]
        return mean / (1 - beta**self.step), squares / (1 - beta_of_squares**self.step) ** 0.5


Numbers = Mapping[str, Tensor]
"""Root mean squares (k,) of k layers, by name."""


@dataclass(frozen=True)
class _Rule:
    """How the length of a step follows from an optimizer's state.

    Args:
        length: Takes root mean squares, and what else is known, to that of the step over the
            learning rate (k,).
        names: What must be in the state, of the parameter's shape.
        settings: What must be among the settings.
        has_momentum: Whether the setting ``momentum`` must be other than 0, or 0; None for any.
        kind: The class of the optimizer.
        reads_weight: Whether the parameter itself is looked at.
        needs_step: Whether the state must tell how many steps were done.
        by_shape: Whether the length depends on the parameter's shape.
    """

    length: Callable[[Numbers, _Known], Tensor]
    names: tuple[str, ...] = ()
    settings: Collection[str] = ()
    has_momentum: bool | None = None
    kind: type[Optimizer] = Optimizer
    reads_weight: bool = False
    needs_step: bool = False
    by_shape: bool = False

    def fits(
        self, optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]
    ) -> bool:
        """Whether this is how an optimizer steps."""
        if self.kind is not Optimizer and not isinstance(optimizer, self.kind):
            return False
        if not set(self.settings).issubset(group):
            return False
        if "betas" in self.settings and not _has_several(group["betas"]):
            return False
        if self.has_momentum is not None and bool(group.get("momentum")) != self.has_momentum:
            return False
        return all(isinstance(state.get(name), Tensor) for name in self.names)


def _has_several(setting: object) -> bool:
    """Whether a setting holds two numbers or more."""
    return isinstance(setting, Sequence) and len(setting) > 1


def _as_long_as_the_task(numbers: Numbers, known: _Known) -> Tensor:
    return numbers[TASK]


def _of_ones(numbers: Numbers, known: _Known) -> Tensor:
    return torch.ones_like(numbers[TASK])


def _momentum(numbers: Numbers, known: _Known) -> Tensor:
    return numbers["momentum_buffer"]


def _adam(numbers: Numbers, known: _Known) -> Tensor:
    return _ratio_of_means(numbers["exp_avg"], numbers["exp_avg_sq"], known)


def _amsgrad(numbers: Numbers, known: _Known) -> Tensor:
    return _ratio_of_means(numbers["exp_avg"], numbers["max_exp_avg_sq"], known)


def _ratio_of_means(mean: Tensor, squares: Tensor, known: _Known) -> Tensor:
    """Adam's step: at most 1, which it exceeds only while gradients grow."""
    mean, squares = known.debiased(mean, squares)
    return (mean / (squares + known.eps)).clamp_max(1.0)


def _radam(numbers: Numbers, known: _Known) -> Tensor:
    """Adam's step times a factor; the mean of the gradients itself while their squares are few."""
    step = known.step
    assert step is not None
    beta = known.group["betas"][1]
    most = 2 / (1 - beta) - 1
    length = most - 2 * step * beta**step / (1 - beta**step)
    from_here = length.clamp_min(5.0) if isinstance(length, Tensor) else max(length, 5.0)
    factor = (from_here - 4) * (from_here - 2) * most / ((most - 4) * (most - 2) * from_here)
    rectified: Tensor = _adam(numbers, known) * factor**0.5
    mean, _ = known.debiased(numbers["exp_avg"], numbers["exp_avg_sq"])
    if isinstance(length, Tensor):
        return torch.where(length > 5.0, rectified, mean)
    found: Tensor = rectified if length > 5.0 else mean
    return found


def _adamax(numbers: Numbers, known: _Known) -> Tensor:
    mean, _ = known.debiased(numbers["exp_avg"], numbers["exp_inf"])
    return (mean / numbers["exp_inf"]).clamp_max(1.0)


def _rmsprop(numbers: Numbers, known: _Known) -> Tensor:
    return numbers[TASK] / (numbers["square_avg"] + known.eps)


def _centered(numbers: Numbers, known: _Known) -> Tensor:
    """The same with a variance in place of the squares."""
    squares, mean = numbers["square_avg"], numbers["grad_avg"]
    deviation = (squares - mean).clamp_min(0.0).sqrt() * (squares + mean).sqrt()
    return numbers[TASK] / (deviation + known.eps)


def _adagrad(numbers: Numbers, known: _Known) -> Tensor:
    length = numbers[TASK] / (numbers["sum"] + known.eps)
    if known.step is not None:
        length = length / (1 + (known.step - 1) * known.group["lr_decay"])
    return length


def _adadelta(numbers: Numbers, known: _Known) -> Tensor:
    moved = (numbers["acc_delta"].square() + known.eps).sqrt()
    return numbers[TASK] * moved / (numbers["square_avg"].square() + known.eps).sqrt()


def _rprop(numbers: Numbers, known: _Known) -> Tensor:
    return numbers["step_size"] / known.rate


def _adafactor(numbers: Numbers, known: _Known) -> Tensor:
    """Relative to the weights, at a rate that falls with the root of the steps."""
    step = known.step
    assert step is not None
    falling = 1 / (step**0.5 * known.rate)
    rate = falling.clamp_max(1.0) if isinstance(falling, Tensor) else min(falling, 1.0)
    eps = known.group["eps"]
    least = eps[1] if _has_several(eps) else 0.0
    return numbers[WEIGHT].clamp_min(least) * rate


def _muon(numbers: Numbers, known: _Known) -> Tensor:
    """A matrix with singular values of about 1, times a factor."""
    rows, columns = known.shape[0], math.prod(known.shape[1:])
    way = known.group.get("adjust_lr_fn")
    factor = 1.0
    if way is None or way == "original":
        factor = math.sqrt(max(1.0, rows / columns))
    elif way == "match_rms_adamw":
        factor = 0.2 * math.sqrt(max(rows, columns))
    return torch.full_like(numbers[TASK], factor / math.sqrt(max(rows, columns)))


_AVERAGES = frozenset({"betas"})
_RULES = (
    _Rule(_muon, settings={"ns_steps"}, by_shape=True),
    _Rule(_rprop, ("step_size",), {"etas"}),
    _Rule(_radam, ("exp_avg", "exp_avg_sq"), _AVERAGES, kind=RAdam, needs_step=True),
    _Rule(_amsgrad, ("exp_avg", "max_exp_avg_sq"), _AVERAGES),
    _Rule(_adam, ("exp_avg", "exp_avg_sq"), _AVERAGES),
    _Rule(_adamax, ("exp_avg", "exp_inf"), _AVERAGES),
    _Rule(_adadelta, ("square_avg", "acc_delta"), {"rho"}),
    _Rule(_momentum, ("square_avg", "momentum_buffer"), {"centered"}, has_momentum=True),
    _Rule(_centered, ("square_avg", "grad_avg"), {"centered"}, has_momentum=False),
    _Rule(_rmsprop, ("square_avg",), {"centered"}, has_momentum=False),
    _Rule(_adagrad, ("sum",), {"initial_accumulator_value", "lr_decay"}),
    _Rule(_adafactor, settings={"beta2_decay", "eps"}, reads_weight=True, needs_step=True),
    _Rule(_momentum, ("momentum_buffer",), {"dampening"}, has_momentum=True),
    _Rule(_as_long_as_the_task, settings={"dampening"}, has_momentum=False),
    _Rule(_as_long_as_the_task, settings={"lambd", "t0"}),  # ASGD
)
_OF_ONES = _Rule(_of_ones)
_LIKE_THE_TASK = _Rule(_as_long_as_the_task)


class _Reading(NamedTuple):
    """What is read of the state for one part.

    Args:
        rule: How the length follows from it.
        tensors: What is read, by name.
        known: What else is known.
    """

    rule: _Rule
    tensors: dict[str, Tensor]
    known: _Known

    def key(self, part: Part) -> object:
        """Equal for parts whose numbers are computed together."""
        kinds: list[object] = []
        for name, tensor in self.tensors.items():
            kinds += [name, tensor.dtype]
        group, rate, step, shape = self.known
        step_key = "tensor" if isinstance(step, Tensor) else step
        rate_key = id(rate) if isinstance(rate, Tensor) else rate
        shape_key = shape if self.rule.by_shape else None
        own = self.rule.length, tuple(kinds), id(group), rate_key, step_key, shape_key
        return own, part.task.device


class OptimizerSteps:
    """Tells how long an optimizer's last step was, of what its parameters hold of some layers.

    Args:
        optimizer: The optimizer, right after its step.
        rates: The learning rates of its parameters.
        is_whole: Whether its state is laid out as the parameters are now. With FSDP1 it is not, and
            to gather it would take more calls between ranks.
    """

    def __init__(self, optimizer: Optimizer, rates: Rates, *, is_whole: bool) -> None:
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # within a wrapper
        self._rates = rates
        self._groups: dict[int, Mapping[str, Any]] = {}
        for group in optimizer.param_groups:
            self._groups.update(dict.fromkeys(map(id, group["params"]), group))
        self._states: Mapping[Any, Any] = {}
        states = getattr(optimizer, "state", None)
        is_divided = type(self._optimizer).__name__ in _DIVIDED
        if is_whole and not is_divided and isinstance(states, Mapping):
            self._states = states

    def lengths(self, parts: Sequence[Part]) -> list[Tensor]:
        """The norm of the last step of each part over the learning rate, a 0-d tensor.

        It is 0, or NaN, where the task's gradient is 0 or not finite. Of an optimizer of which
        nothing is known it is that of the task's gradient, or of ones if it rescales gradients.
        """
        readings = []
        alike: dict[object, list[int]] = {}
        for place, part in enumerate(parts):
            reading = self._reading(part)
            readings.append(reading)
            alike.setdefault(reading.key(part), []).append(place)
        numbers = _root_mean_squares(parts, readings)
        found: dict[int, Tensor] = {}
        for places in alike.values():
            first = readings[places[0]]
            together = {}
            for name in first.tensors:
                together[name] = torch.stack([numbers[place][name] for place in places])
            known = first.known
            if isinstance(known.step, Tensor):
                known = known._replace(step=_stacked(readings, places))
            task = together[TASK]
            length = first.rule.length(together, known) * distance_of(known.group)
            # Of a task gradient of 0 that is 0, and of an infinite one, too.
            length = length * task.sign() * task.reciprocal().sign()
            found.update(zip(places, length.to(task.dtype).unbind(), strict=True))
        means = []
        factors = []
        for place, part in enumerate(parts):
            means.append(found[place])
            factors.append(math.sqrt(part.entries))
        return list(torch._foreach_mul(means, factors))

    def stand_in(self, p: nn.Parameter) -> str | None:
        """What stands for the last step of a parameter, in words, if nothing tells how long it was."""
        if id(p) not in self._groups or self._rule_of(p) is not None:
            return None
        if id(p) in self._rates.rescaled:
            return "one of the learning rate in each entry"
        return "the learning rate times the task's gradient"

    def _rule_of(self, p: nn.Parameter) -> _Rule | None:
        """The first rule that fits; None if none does."""
        group, state = self._groups[id(p)], self._state_of(p)
        for rule in _RULES:
            if rule.fits(self._optimizer, group, state):
                is_missing = rule.needs_step and _step_of(group, state) is None
                is_other = any(state[name].shape != p.shape for name in rule.names)
                return None if is_missing or is_other else rule
        return None

    def _state_of(self, p: nn.Parameter) -> Mapping[str, Any]:
        """The state of a parameter; empty if there is none."""
        try:
            state = self._states.get(p)
        except TypeError:
            return {}
        return state if isinstance(state, Mapping) else {}

    def _reading(self, part: Part) -> _Reading:
        """What to read for one part."""
        p = part.parameter
        group, state = self._groups[id(p)], self._state_of(p)
        rate = self._rates[id(p)]
        step = _step_of(group, state)
        known = _Known(group, rate, step, p.shape)
        rule = self._rule_of(p)
        tensors: dict[str, Tensor] = {}
        if rule is not None:
            sources = {name: state[name] for name in rule.names}
            if rule.reads_weight:
                sources[WEIGHT] = p.detach()
            for name, source in sources.items():
                own = part.of(source)
                if own is not None:
                    tensors[name] = own
            is_complete = len(tensors) == len(sources)
            if is_complete and (isinstance(rate, Tensor) or rate > 0):
                return _Reading(rule, {TASK: part.task, **tensors}, known)
        rule = _OF_ONES if id(p) in self._rates.rescaled else _LIKE_THE_TASK
        return _Reading(rule, {TASK: part.task}, known._replace(step=None))


def _step_of(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor | float | None:
    """How many steps an optimizer has done: a number, or a 0-d tensor on a device."""
    step = state.get("step", group.get("step"))
    if isinstance(step, Tensor):
        if step.numel() != 1:
            return None
        if step.device.type != "cpu":
            return step.detach().reshape(())
        step = float(step)
    if isinstance(step, int | float) and step >= 1:
        return float(step)
    return None


def _stacked(readings: Sequence[_Reading], places: Sequence[int]) -> Tensor:
    """The steps (k,) that the parts of k places have done, which a device knows."""
    steps = []
    for place in places:
        step = readings[place].known.step
        assert isinstance(step, Tensor)
        steps.append(step)
    return torch.stack(steps)


def _root_mean_squares(
    parts: Sequence[Part], readings: Sequence[_Reading]
) -> list[dict[str, Tensor]]:
    """Of each part the root mean squares of what is read, 0-d tensors by name."""
    tensors: list[Tensor] = []
    squares: list[Tensor] = []
    for reading in readings:
        for name, tensor in reading.tensors.items():
            kind = squares if name in _HOLD_SQUARES else tensors
            kind.append(tensor)
    norms = iter(norms_of(tensors))
    roots = iter(torch._foreach_sqrt(norms_of(squares, order=1.0)) if squares else ())
    found = []
    for part, reading in zip(parts, readings, strict=True):
        own = {}
        for name in reading.tensors:
            own[name] = next(roots if name in _HOLD_SQUARES else norms)
        if part.total is not None:
            own = _over_ranks(own, part.total)
        scale = 1 / math.sqrt(part.entries)
        means = torch._foreach_mul(list(own.values()), scale)
        found.append(dict(zip(own, means, strict=True)))
    return found


def _over_ranks(norms: dict[str, Tensor], total: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The norms of what several ranks hold. A collective call."""
    together = torch.stack(list(norms.values())).double()
    whole = total(together.square()).sqrt()
    found = {}
    for (name, norm), one in zip(norms.items(), whole.unbind(), strict=True):
        found[name] = one.to(norm.dtype)
    return found
