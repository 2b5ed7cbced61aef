"""Many small networks as one: those of several trials, each with several seeds, side by side in every product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_hsu import register_neurons

WIDTH = 64
CHANNELS = (8, 16)
"""Of the two convolutions, 3 x 3 with stride 2."""


@dataclass(frozen=True)
class Architecture:
    """A plain ReLU network: hidden layers of 64, or two convolutions, with batch norm or without; and the class head."""

    shape: tuple[int, ...]  # of an image: channels, height, width
    classes: int
    depth: int = 2
    convolutions: bool = False
    norm: bool = False
    scale: float = 1.0  # PyTorch's initial weights are multiplied by it

    def weights(self) -> list[tuple[int, ...]]:
        """Shapes of one network's weights, as torch has them; the last is the head's."""
        channels, height, width = self.shape
        if not self.convolutions:
            sizes = [channels * height * width, *[WIDTH] * self.depth, self.classes]
            return [(n, d) for d, n in itertools.pairwise(sizes)]
        left = -(-height // 4) * -(-width // 4)
        first, second = CHANNELS
        return [(first, channels, 3, 3), (second, first, 3, 3), (self.classes, second * left)]


class Piece(nn.Module):
    """One layer of one trial's networks, one a seed: weights (seeds, n, ...), biases and, with batch norm, gains (seeds, n)."""

    def __init__(self, weight: Tensor, bias: Tensor, *, gain: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.gain = nn.Parameter(torch.ones_like(bias)) if gain else None


register_neurons(Piece, lambda piece: piece.weight.flatten(2))


class Side(nn.ModuleList):
    """A layer of all networks: a piece a trial, or, ``apart``, one a trial and seed."""

    def __init__(self, pieces: Sequence[Piece], trials: int) -> None:
        super().__init__(pieces)
        self.trials = trials

    def joined(self, name: str) -> Tensor:
        """Weights or biases of all networks, (seeds, trials, n, ...)."""
        parts = [getattr(piece, name) for piece in self]
        each = len(parts) // self.trials
        rows = [
            torch.cat(parts[i : i + each]) if each > 1 else parts[i]
            for i in range(0, len(parts), each)
        ]
        return torch.stack(rows, dim=1)


class Networks(nn.Module):
    """``trials`` times ``len(seeds)`` networks; those of a seed begin with the same weights.

    Args:
        architecture: What each of them is.
        trials: How many trials.
        seeds: Each decides the initial weights of its networks.
        apart: A layer of each network is a module of its own, for coefficients that follow the network.
    """

    def __init__(
        self, architecture: Architecture, trials: int, seeds: Sequence[int], *, apart: bool = False
    ) -> None:
        super().__init__()
        self.architecture, self.trials, self.seeds = architecture, trials, len(seeds)
        first = [_initial(architecture, seed) for seed in seeds]
        sides = []
        for i in range(len(first[0])):
            weight, bias = (torch.stack([one[i][part] for one in first]) for part in (0, 1))
            gain = architecture.norm and i < len(first[0]) - 1
            parts = (
                [(weight[j : j + 1], bias[j : j + 1]) for j in range(len(seeds))]
                if apart
                else [(weight, bias)]
            )
            pieces = [
                Piece(w.clone(), b.clone(), gain=gain) for _ in range(trials) for w, b in parts
            ]
            sides.append(Side(pieces, trials))
        self.hidden, self.head = nn.ModuleList(sides[:-1]), sides[-1]
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(trials * len(seeds) * shape[0], affine=False)
            if architecture.norm
            else nn.Identity()
            for shape in architecture.weights()[:-1]
        )

    def trial_parameters(self, trial: int) -> list[nn.Parameter]:
        """The parameters of one trial's networks."""
        return [
            p
            for side in (*self.hidden, self.head)
            for i, piece in enumerate(side)
            if i // (len(side) // self.trials) == trial
            for p in piece.parameters()
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Map each seed's images (seeds, batch, d) to scores (seeds, trials, batch, classes)."""
        seeds, batch, _ = x.shape
        if self.architecture.convolutions:
            x = self._convolved(x)
        else:
            for side in self.hidden:
                x = _linear(x, side).relu()
        return _linear(x, self.head).view(seeds, self.trials, batch, -1)

    def _convolved(self, x: Tensor) -> Tensor:
        """Features (seeds, trials, batch, d) of images, by convolutions in groups, a network each."""
        seeds, batch, _ = x.shape
        x = x.view(seeds, batch, *self.architecture.shape).transpose(0, 1).flatten(1, 2)
        groups = seeds
        for side, norm in zip(self.hidden, self.norms, strict=True):
            weight, bias = side.joined("weight").flatten(0, 2), side.joined("bias").flatten()
            if self.architecture.norm:
                x = norm(functional.conv2d(x, weight, None, stride=2, padding=1, groups=groups))
                x = x * side.joined("gain").flatten()[:, None, None] + bias[:, None, None]
            else:
                x = functional.conv2d(x, weight, bias, stride=2, padding=1, groups=groups)
            x, groups = x.relu(), seeds * self.trials
        return x.view(batch, seeds, self.trials, -1).permute(1, 2, 0, 3)


def _linear(x: Tensor, side: Side) -> Tensor:
    """A layer of all networks on (seeds, batch, d), shared by the trials, or (seeds, trials, batch, d): the latter's shape."""
    weight, bias = side.joined("weight"), side.joined("bias")
    seeds, trials, n, _ = weight.shape
    if x.ndim == 3:  # one wide product a seed
        found = torch.baddbmm(bias.view(seeds, 1, -1), x, weight.flatten(1, 2).mT)
        return found.view(seeds, -1, trials, n).transpose(1, 2)
    found = torch.baddbmm(bias.view(-1, 1, n), x.flatten(0, 1), weight.flatten(0, 1).mT)
    return found.view(seeds, trials, -1, n)


def _initial(architecture: Architecture, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of one network, uniform within 1 over the root of the inputs, as torch has it; weights scaled."""
    chance, found = torch.Generator().manual_seed(seed), []
    for shape in architecture.weights():
        bound = torch.Size(shape[1:]).numel() ** -0.5
        weight, bias = (
            torch.empty(size).uniform_(-bound, bound, generator=chance)
            for size in (shape, shape[:1])
        )
        found.append((weight * architecture.scale, bias))
    return found
