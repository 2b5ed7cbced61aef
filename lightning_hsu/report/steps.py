"""A layer, the next one and what lies between: what :mod:`merging` is given of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_hsu.report.activations import Activation

USUAL_EPS = 1e-5
"""What batch norms add to a variance unless told otherwise; a file does not say it."""


@dataclass(frozen=True)
class Norm:
    """A batch norm in eval mode.

    Args:
        mean: Running mean (n,).
        scale: What x - mean is multiplied by, (n,).
        bias: What is added after that, (n,).
        affine: How many parameters each neuron has here.
    """

    mean: Tensor
    scale: Tensor
    bias: Tensor
    affine: int


@dataclass(frozen=True)
class Stored:
    """A weight by its name.

    Args:
        name: Name of the tensor.
        transposed: Whether it is a matrix (inputs, outputs) instead of (outputs, inputs).
    """

    name: str
    transposed: bool = False

    def shape(self, shapes: Mapping[str, torch.Size]) -> torch.Size:
        """Its shape, the outputs first."""
        shape = shapes[self.name]
        return torch.Size(reversed(shape)) if self.transposed else shape

    def read(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """Its numbers, the outputs first, on the CPU."""
        weight = tensor(self.name).detach().cpu()
        return weight.mT if self.transposed else weight


@dataclass(frozen=True)
class Step:
    """A layer, the next one, and what lies between.

    Args:
        layer: Name of the layer.
        following: Name of the layer that takes what it gives.
        activation: What lies between.
        condition: What must hold for that, where it is read from names; else "".
        norm: Name of a batch norm right after the layer; None without one.
        keeps_sign: Whether all else between, such as a maximum, gives -y for -x.
        weight: How the layer's weight is stored; None is ``layer.weight`` with neurons as rows.
        following_weight: How the next one's is; None is likewise, so that a neuron has a column.
        bias: Name of the tensor with the layer's biases; None is ``layer.bias``.
        prelu: Name of the slopes of a PReLU between that has one for each neuron; None without one.
    """

    layer: str
    following: str
    activation: Activation
    condition: str = ""
    norm: str | None = None
    keeps_sign: bool = True
    weight: Stored | None = None
    following_weight: Stored | None = None
    bias: str | None = None
    prelu: str | None = None

    def stored(self) -> Stored:
        """How the layer's weight is stored."""
        return self.weight or Stored(f"{self.layer}.weight")

    def stored_following(self) -> Stored:
        """How the weight of the next layer is stored."""
        return self.following_weight or Stored(f"{self.following}.weight")

    def name_of_bias(self) -> str:
        """Name of the tensor with the layer's biases, which need not exist."""
        return self.bias or f"{self.layer}.bias"


@dataclass(frozen=True)
class Steps:
    """The pairs of layers of a network that are known to follow each other.

    Args:
        steps: The pairs.
        how: How they were found, in words.
        tensor: Returns a tensor of the network by its name.
        shapes: The shapes of all its tensors, by name.
        eps: What batch norms add to a variance, by their names.
        way_out: What to do where no following layer is known, in words; "" if there is nothing.
        reasons: Why no following layer is known of a layer, by its name.
        otherwise: Why of all others.
    """

    steps: list[Step]
    how: str
    tensor: Callable[[str], Tensor]
    shapes: Mapping[str, torch.Size]
    eps: Mapping[str, float]
    way_out: str = ""
    reasons: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = ""

    def reason(self, layer: str) -> str:
        """Why no following layer is known of a layer."""
        name = layer
        while name:
            if name in self.reasons:
                return self.reasons[name]
            name = name.rpartition(".")[0]
        return self.otherwise

    def bias(self, name: str, n: int) -> Tensor:
        """The bias of this name of a layer of n neurons, zeros without one."""
        if name not in self.shapes:
            return torch.zeros(n, dtype=torch.float64)
        return self.tensor(name).detach().double().flatten()

    def norm(self, name: str) -> Norm:
        """A batch norm by its name."""
        mean = self.tensor(f"{name}.running_mean").detach().double()
        variance = self.tensor(f"{name}.running_var").detach().double()
        scale = (variance + self.eps.get(name, USUAL_EPS)).rsqrt()
        affine = 0
        if f"{name}.weight" in self.shapes:
            scale = scale * self.tensor(f"{name}.weight").detach().double().to(scale.device)
            affine += 1
        bias = torch.zeros_like(mean)
        if f"{name}.bias" in self.shapes:
            bias = self.tensor(f"{name}.bias").detach().double().to(scale.device)
            affine += 1
        return Norm(mean, scale, bias, affine)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of tensors by name."""
    return {name: x.shape for name, x in tensors.items()}


def dictionary_of(name: str, shapes: Mapping[str, torch.Size]) -> tuple[str, int] | None:
    """The encoder of an autoencoder whose decoder this is, and how many neurons it has.

    Args:
        name: Name of a layer.
        shapes: The shapes of all tensors, by name.

    Returns:
        The encoder's name and its neurons; None if this is no such decoder.

    Example:
        >>> shapes = {"sae.W_enc": torch.Size([8, 30]), "sae.W_dec": torch.Size([30, 8])}
        >>> dictionary_of("sae.W_dec", shapes), dictionary_of("sae.W_enc", shapes)
        (('sae.W_enc', 30), None)
    """
    above, dot, own = name.rpartition(".")
    if own not in ("W_dec", "decoder"):
        return None
    shape = shapes.get(name if own == "W_dec" else f"{name}.weight", torch.Size())
    if len(shape) != 2:
        return None
    n, d = shape if own == "W_dec" else reversed(shape)
    for encoder in ("W_enc", "encoder"):
        tensor = f"{above}{dot}{encoder}" + (".weight" if encoder == "encoder" else "")
        if sorted(shapes.get(tensor, ())) == sorted((n, d)):
            return f"{above}{dot}{encoder}", n
    return None
