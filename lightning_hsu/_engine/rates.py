"""What an optimizer makes of a gradient: the learning rates of its parameters, and their sign."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Rate = float | Tensor
"""A learning rate >= 0: a number, or a 0-d tensor on the device of its parameters."""

UNKNOWN = math.nan
"""The rate of a group without a learning rate that is a number, as relative steps have."""


KEPT_ELSEWHERE = frozenset({"z", "x0", "x_k", "mov_avg_param", "master_param", "master_weight"})
"""Names of an optimizer's state from which it computes its parameters, in whole or in part.

Schedule-free ones, MADGRAD, D-adaptation by dual averaging, FTRL, A2Grad, SRMM, and master weights.
"""


RESCALING_SETTINGS = frozenset(
    {
        "betas",
        "centered",
        "initial_accumulator_value",
        "beta2_decay",
        "decay_rate",
        "ns_steps",
        "etas",
    }
)
"""Settings of optimizers that divide gradients by their own size, or take their sign.

Adam and its relatives, RMSprop, Adagrad, Adafactor, Muon, Rprop.
"""

PLAIN_SETTINGS = frozenset({"dampening", "lambd", "d"})
"""Settings of optimizers whose steps are the learning rate times gradients, or their momentum.

SGD, ASGD, D-adaptation.
"""

SECOND_MOMENTS = frozenset({"exp_avg_sq", "exp_avg_sq_row", "exp_inf", "square_avg", "state2"})
"""Names under which other such optimizers keep the squares of gradients."""


class UnknownRateError(NotImplementedError):
    """An optimizer that is to move neurons tells no learning rate."""


class Rates(dict[int, Rate]):
    """Learning rates of an optimizer's parameters, by id; ``UNKNOWN`` where there is no number.

    Attributes:
        gains: What the optimizer makes of a steady gradient, by parameter id, where that is not 1:
            momentum of 0.9 makes it ten times as long.
        rescaled: Ids of the parameters whose gradients are divided by their own size, so that a step
            is about the learning rate in each entry, as Adam's is.
        ascending: Ids of the parameters that move along their gradient instead of against it.
        unknown_in: The class of the optimizer if some rates are not known; else None.
    """

    gains: Mapping[int, float] = MappingProxyType({})
    rescaled: Collection[int] = ()
    ascending: Collection[int] = ()
    unknown_in: str | None = None


def held_by(optimizer: Optimizer) -> set[int]:
    """Ids of an optimizer's parameters.

    Raises:
        TypeError: if it is none.
    """
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"this takes the optimizer that steps; got a {type(optimizer).__name__}")
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def as_number(lr: Any) -> float:
    """A learning rate that is on the host; ``UNKNOWN`` if it is no number."""
    if type(lr) is float:
        return lr
    if isinstance(lr, Tensor):
        lr = lr.detach()
    try:
        return float(lr)
    except (TypeError, ValueError, RuntimeError):  # None, a word, several numbers
        return UNKNOWN


def rates_on_devices(lr: Tensor, params: Sequence[nn.Parameter]) -> dict[int, Rate]:
    """A learning rate on a device, for each parameter on the parameter's own, by id.

    Nothing asks the device: what it holds is taken to be no less than 0.
    """
    if lr.numel() != 1:
        return dict.fromkeys(map(id, params), UNKNOWN)
    lr = lr.detach().reshape(())
    if lr.device.type != "mps":
        lr = lr.double()  # as a number on the host would be
    found: dict[int, Rate] = {}
    by_device: dict[torch.device, Rate] = {lr.device: lr}
    for p in params:
        if p.device not in by_device:
            there = lr.to(p.device)
            by_device[p.device] = as_number(there) if p.device.type == "cpu" else there
        found[id(p)] = by_device[p.device]
    return found


def gain_of(group: Mapping[str, Any]) -> float:
    """What the optimizer of a group makes of a steady gradient: a multiple of it, by momentum."""
    gain = 1.0
    momentum = group.get("momentum")
    if "ns_steps" in group:  # Muon makes what momentum gives it of one size
        momentum = None
    if isinstance(momentum, float) and 0.0 < momentum < 1.0:
        gain = 1.0 / (1.0 - momentum)
        dampening = group.get("dampening")
        if isinstance(dampening, float | int):
            gain *= 1.0 - dampening
    return gain * distance_of(group)


def distance_of(group: Mapping[str, Any]) -> float:
    """The distance by which D-adaptation and Prodigy multiply the learning rate, as they estimate it."""
    distance = group.get("d")
    return distance if isinstance(distance, float) else 1.0


def largest_gain(parameters: Sequence[nn.Parameter], rates: Rates) -> float:
    """What an optimizer makes of a steady gradient, in that of the parameters where it is most."""
    if not rates.gains:
        return 1.0
    return max(rates.gains.get(id(p), 1.0) for p in parameters)


def rescales(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether the optimizer of a group divides gradients by their own size.

    Settings tell of Adam and its relatives before their first step, the state of others after it.
    """
    if not RESCALING_SETTINGS.isdisjoint(group):
        return True
    if "rho" in group and "eps" in group:  # Adadelta; sharpness-aware ones have a rho, too
        return True
    states = getattr(optimizer, "state", None)
    params = group["params"]
    if not states or not params:
        return False
    try:
        return not SECOND_MOMENTS.isdisjoint(states.get(params[0], ()))
    except TypeError:
        return False


def tells_gain(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether settings or state of a group tell what the optimizer makes of a gradient."""
    return not PLAIN_SETTINGS.isdisjoint(group) or rescales(optimizer, group)


def is_unknown(rate: Rate) -> bool:
    """Whether a learning rate is not known."""
    return not isinstance(rate, Tensor) and math.isnan(rate)


def largest(rates: Sequence[Rate]) -> Rate:
    """The largest of several learning rates; not known if one of them is not."""
    numbers = [rate for rate in rates if not isinstance(rate, Tensor)]
    tensors = [rate for rate in rates if isinstance(rate, Tensor)]
    if any(map(math.isnan, numbers)):
        return UNKNOWN
    if not tensors:
        return max(numbers)
    most = tensors[0]
    for other in tensors[1:]:
        most = torch.maximum(most, other.to(most.device))
    return most.clamp_min(max(numbers)) if numbers else most


def sign_in_loss(
    name: str, parameters: Sequence[nn.Parameter], learning_rates: Mapping[int, Rate]
) -> float:
    """The sign of a layer's term in a loss: -1 if the optimizer makes that loss as large as it can.

    Raises:
        NotImplementedError: if some of the layer's parameters ascend and others descend.
    """
    ascending = getattr(learning_rates, "ascending", ())
    if not ascending:
        return 1.0
    ways = {id(p) in ascending for p in parameters if id(p) in learning_rates}
    if len(ways) > 1:
        raise NotImplementedError(
            f"some parameters of layer '{name}' are in a group with maximize=True and others are "
            "not, so no term of a loss can spread its neurons: use apply='gradient' or "
            f"'decoupled', or exclude='{name}'"
        )
    return -1.0 if True in ways else 1.0


def keeps_elsewhere(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the optimizer computes these parameters from other tensors, which no move reaches."""
    states = getattr(optimizer, "state", None)
    for p in parameters:
        try:
            names = set(states[p]) if states is not None and p in states else set()
        except TypeError:
            continue
        if names & KEPT_ELSEWHERE:
            return True
    return False
