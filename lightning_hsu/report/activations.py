"""What is known of activations: how steep they are, and what of a neuron they leave as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    """What is known of an activation.

    Args:
        name: Its name.
        slope: The largest absolute value of its derivative.
        homogeneous: Whether f(c x) = c f(x) for each c >= 0.
        odd: Whether f(-x) = -f(x).
    """

    name: str
    slope: float = 1.0
    homogeneous: bool = False
    odd: bool = False


NONE = Activation("no activation", homogeneous=True, odd=True)
RELU = Activation("ReLU", homogeneous=True)
_GELU = Activation("GELU", 1.13)
_TANH = Activation("tanh", odd=True)
_SIGMOID = Activation("sigmoid", 0.25)
_SILU = Activation("SiLU", 1.1)
_RELU6 = Activation("ReLU6")
_HARDSWISH = Activation("hardswish", 1.5)
_BY_CLASS = {
    nn.ReLU: RELU,
    nn.GELU: _GELU,  # 1.1290, and 1.1289 if approximated by tanh
    nn.Tanh: _TANH,
    nn.Sigmoid: _SIGMOID,
    nn.SiLU: _SILU,  # 1.0998
    nn.Mish: Activation("Mish", 1.09),  # 1.0885
    nn.ReLU6: _RELU6,
    nn.Hardswish: _HARDSWISH,
    nn.Softsign: Activation("softsign", odd=True),
    nn.SELU: Activation("SELU", 1.7581),
}
BY_FUNCTION: dict[Any, Activation] = {
    F.relu: RELU,
    torch.relu: RELU,
    "relu": RELU,
    F.gelu: _GELU,
    F.tanh: _TANH,
    torch.tanh: _TANH,
    "tanh": _TANH,
    F.sigmoid: _SIGMOID,
    torch.sigmoid: _SIGMOID,
    "sigmoid": _SIGMOID,
    F.silu: _SILU,
    F.relu6: _RELU6,
    F.hardswish: _HARDSWISH,
}


def activation_of(module: nn.Module) -> Activation | None:
    """What is known of a module as an activation; None if nothing is."""
    found = _BY_CLASS.get(type(module))
    if found is not None:
        return found
    if type(module) is nn.LeakyReLU:
        slope = abs(module.negative_slope)
        return Activation("leaky ReLU", max(1.0, slope), homogeneous=True)
    if type(module) is nn.PReLU and module.weight.numel() == 1:
        slope = abs(float(module.weight.detach()))
        return Activation("PReLU", max(1.0, slope), homogeneous=True)
    if type(module) is nn.ELU:
        return Activation("ELU", max(1.0, abs(module.alpha)))
    if type(module) is nn.Softplus:
        return Activation("softplus")
    return None
