"""The networks of ``python -m evidence.images``: CNN-9, ResNet-18, a small ViT, and what they are without.

All of them take images (batch, channels, height, width) of bytes and give scores (batch, classes);
their head is called ``score``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

PATCH = 4
"""Side of a ViT's patches, in pixels."""
DEPTH = 6
HEADS = 4
WIDTHS = {"cnn9": 64, "resnet18": 64, "resnet18-plain": 64, "vit": 256, "vit-bn": 256}
"""Channels of the first block as published; of a ViT the dimensions of a token."""


def build(name: str, shape: Sequence[int], classes: int, width: int) -> nn.Module:
    """A network of :data:`WIDTHS` with fresh weights.

    Args:
        name: Which.
        shape: Channels, height, width of an image.
        classes: How many.
        width: Channels of the first block, or dimensions of a token.

    Raises:
        ValueError: for images too small for the network, or a width that it cannot have.
    """
    if name == "cnn9":
        return CNN9(shape, classes, width)
    if name.startswith("resnet18"):
        return ResNet18(shape, classes, width, norm=name == "resnet18")
    return ViT(shape, classes, width, batch_norm=name == "vit-bn")


def scaled(images: Tensor) -> Tensor:
    """Bytes as floats from -1 to 1, as the official code scales them."""
    return (images.to(torch.get_default_dtype()) - 127.5) / 128.0


class CNN9(nn.Module):
    """The network of the papers: three times three convolutions, one over all that is left, the head.

    No biases. It takes images of any size from 8 x 8.
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        channels, height, breadth = shape
        if min(height, breadth) < 8:
            raise ValueError(f"CNN-9 takes images from 8 x 8; these have {height} x {breadth}")
        layers: list[nn.Module] = []
        for block in (width, 2 * width, 4 * width):
            for _ in range(3):
                layers += [
                    nn.Conv2d(channels, block, 3, padding=1, bias=False),
                    nn.BatchNorm2d(block, eps=1e-3),
                    nn.ReLU(),
                ]
                channels = block
            layers.append(nn.MaxPool2d(2))
            height, breadth = height // 2, breadth // 2
        self.features = nn.Sequential(*layers)
        self.fc6 = nn.Conv2d(channels, 4 * width, (height, breadth), bias=False)
        self.score = nn.Linear(4 * width, classes, bias=False)
        _begin(self)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (batch, classes)."""
        return self.score(self.fc6(self.features(scaled(images))).flatten(1))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut.

    Without batch norm the two begin with a factor of 0, which is trained (SkipInit: De & Smith,
    "Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks",
    NeurIPS 2020, arXiv 2002.10444), and convolutions have biases.

    Args:
        channels: Of the input.
        wide: Channels of the output.
        stride: Of the first convolution.
        norm: Whether there is batch norm.
    """

    def __init__(self, channels: int, wide: int, stride: int, *, norm: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *_convolution(channels, wide, 3, stride, norm=norm),
            nn.ReLU(),
            *_convolution(wide, wide, 3, 1, norm=norm),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != wide:
            self.shortcut.extend(_convolution(channels, wide, 1, stride, norm=norm))
        self.skip = None if norm else nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Features (batch, wide, height / stride, width / stride)."""
        found = self.branch(x)
        if self.skip is not None:
            found = self.skip * found
        return functional.relu(found + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 as it is used on CIFAR: a 3 x 3 stem without pooling, four stages of two blocks."""

    def __init__(self, shape: Sequence[int], classes: int, width: int, *, norm: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(shape[0], width, 3, 1, norm=norm), nn.ReLU())
        blocks = []
        channels = width
        for stage in range(4):
            wide = width * 2**stage
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(BasicBlock(channels, wide, stride, norm=norm))
                channels = wide
        self.blocks = nn.Sequential(*blocks)
        self.score = nn.Linear(channels, classes)
        _begin(self)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (batch, classes)."""
        return self.score(self.blocks(self.stem(scaled(images))).mean((2, 3)))


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over all tokens of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (batch, tokens, dim)."""
        return super().forward(x.flatten(0, 1)).view_as(x)


class Attention(nn.Module):
    """Self-attention; queries, keys and values have layers of their own, so neurons are rows."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (batch, tokens, dim)."""
        parts = []
        for layer in (self.query, self.key, self.value):
            parts.append(layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2))
        found = functional.scaled_dot_product_attention(*parts)
        return self.out(found.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Attention and two layers with GELU between, each behind a norm and beside a shortcut."""

    def __init__(self, dim: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attention = Attention(dim)
        self.norm2 = norm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (batch, tokens, dim)."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """A small vision transformer: patches of 4 x 4, six blocks, four heads, the mean of all tokens.

    Weights begin as Glorot's uniform ones, biases at 0, positions with a deviation of 0.02.

    Args:
        shape: Channels, height, width of an image.
        classes: How many.
        width: Dimensions of a token.
        batch_norm: Batch norm in place of layer norm.
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int, *, batch_norm: bool) -> None:
        super().__init__()
        channels, height, breadth = shape
        if height % PATCH or breadth % PATCH:
            raise ValueError(
                f"a ViT takes images whose sides are multiples of {PATCH}; these have "
                f"{height} x {breadth}"
            )
        if width % HEADS:
            raise ValueError(f"a ViT's width is a multiple of its {HEADS} heads; got {width}")
        norm: type[nn.Module] = TokenBatchNorm if batch_norm else nn.LayerNorm
        tokens = (height // PATCH) * (breadth // PATCH)
        self.patches = nn.Conv2d(channels, width, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*[EncoderBlock(width, norm) for _ in range(DEPTH)])
        self.norm = norm(width)
        self.score = nn.Linear(width, classes)
        for layer in neuron_layers(self):
            nn.init.xavier_uniform_(layer.weight.flatten(1))  # a view: patches as a matrix
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (batch, classes)."""
        x = self.patches(scaled(images)).flatten(2).transpose(1, 2) + self.positions
        return self.score(self.norm(self.blocks(x)).mean(1))


def neuron_layers(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """The layers whose rows are neurons, all that a penalty acts on, in their order."""
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def _convolution(
    channels: int, wide: int, size: int, stride: int, *, norm: bool
) -> list[nn.Module]:
    """A convolution with batch norm, or with a bias."""
    layer = nn.Conv2d(channels, wide, size, stride, padding=size // 2, bias=not norm)
    return [layer, nn.BatchNorm2d(wide)] if norm else [layer]


def _begin(network: nn.Module) -> None:
    """He's initial weights, normal ones; biases of 0."""
    for layer in neuron_layers(network):
        nn.init.normal_(layer.weight, std=(2.0 / layer.weight[0].numel()) ** 0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
