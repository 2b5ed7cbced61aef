"""Many small networks as one: those of several trials and seeds, side by side in every product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_hsu import register_neurons

WIDTH = 64
RANK = 8
"""Of the adapters."""

CHANNELS = (8, 16)
"""Of the two convolutions, 3 x 3 with stride 2."""


@dataclass(frozen=True)
class Architecture:
    """A plain ReLU network: hidden layers of 64, or two convolutions, and the class head."""

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
    """One layer of one trial's networks, one a seed.

    Args:
        weight: Shape (seeds, n, ...).
        bias: Shape (seeds, n).
        gain: Whether there are gains of that shape, too, for batch norm.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, gain: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.gain = nn.Parameter(torch.ones_like(bias)) if gain else None


register_neurons(Piece, lambda piece: piece.weight.flatten(2))


class Factor(nn.Module):
    """One factor of a low-rank adapter, of one trial's networks.

    Args:
        weight: Shape (seeds, n, d).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


register_neurons(Factor, lambda factor: factor.weight)


class Side(nn.ModuleList):
    """A layer of all networks: a piece a trial, or, ``apart``, one a trial and seed."""

    def __init__(self, pieces: Sequence[Piece | Factor], trials: int) -> None:
        super().__init__(pieces)
        self.trials = trials

    def joined(self, name: str) -> Tensor:
        """Weights or biases of all networks, (seeds, trials, n, ...)."""
        return self._joined([getattr(piece, name) for piece in self])

    def gradients(self) -> Tensor:
        """Gradients of the weights of all networks, (seeds, trials, n, ...)."""
        return self._joined([piece.weight.grad for piece in self])

    def _joined(self, parts: list[Tensor]) -> Tensor:
        each = len(parts) // self.trials
        if each > 1:
            parts = [torch.cat(parts[i : i + each]) for i in range(0, len(parts), each)]
        return torch.stack(parts, dim=1)


class Networks(nn.Module):
    """``trials`` times ``len(seeds)`` networks; those of a seed begin with the same weights.

    Args:
        architecture: What each of them is.
        trials: How many trials.
        seeds: Each decides the initial weights of its networks.
        apart: A layer of each network is a module of its own, for coefficients that follow it.
    """

    def __init__(
        self, architecture: Architecture, trials: int, seeds: Sequence[int], *, apart: bool = False
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.trials = trials
        self.seeds = len(seeds)
        shapes = architecture.weights()
        initial = [_initial(architecture, seed) for seed in seeds]
        sides = []
        for i in range(len(shapes)):
            weight = torch.stack([one[i][0] for one in initial])
            bias = torch.stack([one[i][1] for one in initial])
            gain = architecture.norm and i < len(shapes) - 1
            parts = [(weight, bias)]
            if apart:
                parts = list(zip(weight.split(1), bias.split(1), strict=True))
            pieces = []
            for _ in range(trials):
                pieces += [Piece(w.clone(), b.clone(), gain=gain) for w, b in parts]
            sides.append(Side(pieces, trials))
        self.hidden = nn.ModuleList(sides[:-1])
        self.head = sides[-1]
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        self.norms = nn.ModuleList()
        for shape in shapes[:-1]:
            if architecture.norm:
                self.norms.append(nn.BatchNorm2d(trials * len(seeds) * shape[0], affine=False))
            else:
                self.norms.append(nn.Identity())

    @torch.no_grad()
    def begin_head(self, seeds: Sequence[int]) -> None:
        """Give the heads fresh weights.

        Args:
            seeds: Each decides those of its networks.
        """
        weights, biases = [], []
        for seed in seeds:
            weight, bias = _initial(self.architecture, seed)[-1]
            weights.append(weight)
            biases.append(bias)
        each = len(self.head) // self.trials
        for i, piece in enumerate(self.head):
            own = slice(i % each, i % each + 1) if each > 1 else slice(None)
            piece.weight.copy_(torch.stack(weights)[own])
            piece.bias.copy_(torch.stack(biases)[own])

    def add_adapters(self, seeds: Sequence[int], *, apart: bool) -> None:
        """Freeze the hidden layers, and add to each the product of two factors, the second of zeros.

        Args:
            seeds: Each decides the first factors of its networks, as torch begins a Linear.
            apart: As for the networks.
        """
        self.hidden.requires_grad_(False)
        chances = [torch.Generator().manual_seed(seed) for seed in seeds]
        for n, d in self.architecture.weights()[:-1]:
            bound = d**-0.5
            first = []
            for chance in chances:
                first.append(torch.empty(RANK, d).uniform_(-bound, bound, generator=chance))
            for sides, weight in (
                (self.down, torch.stack(first)),
                (self.up, torch.zeros(len(seeds), n, RANK)),
            ):
                parts = weight.split(1) if apart else [weight]
                factors = [Factor(part.clone()) for _ in range(self.trials) for part in parts]
                sides.append(Side(factors, self.trials))

    def trial_parameters(self, trial: int) -> list[nn.Parameter]:
        """The parameters of one trial's networks that are trained."""
        found: list[nn.Parameter] = []
        for side in (*self.hidden, *self.down, *self.up, self.head):
            each = len(side) // self.trials
            for piece in list(side)[trial * each : (trial + 1) * each]:
                found += [p for p in piece.parameters() if p.requires_grad]
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Map each seed's images (seeds, batch, d) to scores (seeds, trials, batch, classes)."""
        seeds, batch, _ = x.shape
        if self.architecture.convolutions:
            x = self._convolved(x)
        else:
            for i, side in enumerate(self.hidden):
                weight = side.joined("weight")
                if self.down:
                    weight = weight + self.up[i].joined("weight") @ self.down[i].joined("weight")
                x = _linear(x, weight, side.joined("bias")).relu()
        scores = _linear(x, self.head.joined("weight"), self.head.joined("bias"))
        return scores.view(seeds, self.trials, batch, -1)

    def _convolved(self, x: Tensor) -> Tensor:
        """Features (seeds, trials, batch, d) of images, by convolutions with a group a network."""
        seeds, batch, _ = x.shape
        x = x.view(seeds, batch, *self.architecture.shape).transpose(0, 1).flatten(1, 2)
        groups = seeds
        for side, norm in zip(self.hidden, self.norms, strict=True):
            weight = side.joined("weight").flatten(0, 2)
            bias = side.joined("bias").flatten()
            if self.architecture.norm:
                x = norm(functional.conv2d(x, weight, None, stride=2, padding=1, groups=groups))
                x = x * side.joined("gain").flatten()[:, None, None] + bias[:, None, None]
            else:
                x = functional.conv2d(x, weight, bias, stride=2, padding=1, groups=groups)
            x = x.relu()
            groups = seeds * self.trials
        return x.view(batch, seeds, self.trials, -1).permute(1, 2, 0, 3)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A layer of all networks, (seeds, trials, batch, n).

    Args:
        x: Shape (seeds, batch, d), the same for all trials, or (seeds, trials, batch, d).
        weight: Shape (seeds, trials, n, d).
        bias: Shape (seeds, trials, n).
    """
    seeds, trials, n, _ = weight.shape
    if x.ndim == 3:  # one wide product a seed
        found = _Affine.apply(x, weight.flatten(1, 2), bias.flatten(1, 2))
        return found.view(seeds, -1, trials, n).transpose(1, 2)
    found = _Affine.apply(x.flatten(0, 1), weight.flatten(0, 1), bias.flatten(0, 1))
    return found.view(seeds, trials, -1, n)


class _Affine(torch.autograd.Function):
    """Products of matrices, (many, batch, n), whose weights' gradients lie in memory as weights do.

    PyTorch's own lie transposed, and to copy each into a weight's ``.grad`` takes a fifth of a step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Shapes (many, batch, d), (many, n, d) and (many, n)."""
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of all three; of x where one is asked for."""
        x, weight = ctx.saved_tensors
        above = torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None
        return above, torch.bmm(grad.mT, x), grad.sum(1)


def _initial(architecture: Architecture, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Weights, scaled, and biases of one network, uniform within 1 / sqrt(inputs) as in torch."""
    chance = torch.Generator().manual_seed(seed)
    found = []
    for shape in architecture.weights():
        bound = torch.Size(shape[1:]).numel() ** -0.5
        weight = torch.empty(shape).uniform_(-bound, bound, generator=chance)
        bias = torch.empty(shape[:1]).uniform_(-bound, bound, generator=chance)
        found.append((weight * architecture.scale, bias))
    return found
