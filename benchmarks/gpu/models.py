"""Models as they are trained, with optimizers and batches: torchvision's and transformers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.gpu.machine import require

CLASSES = 1000


@dataclass(frozen=True)
class Task:
    """A model and what trains it.

    Args:
        model: The model, on its device.
        optimizer: Returns a new optimizer of a model's parameters.
        loss: Maps a model to the loss of one batch, which stays the same.
        accumulate: Batches of one step.
        about: What the step is, in words.
    """

    model: nn.Module
    optimizer: Callable[[nn.Module], Optimizer]
    loss: Callable[[nn.Module], Tensor]
    accumulate: int
    about: str


def task(name: str, device: str, *, quick: bool) -> Task:
    """The task of a name in ``TASKS``."""
    return TASKS[name](device, quick)


def resnet50(device: str, quick: bool) -> Task:
    """A convolutional network with channels last and SGD."""
    require("torchvision")
    from torchvision.models import ResNet, resnet50
    from torchvision.models.resnet import BasicBlock

    batch, side = (2, 32) if quick else (256, 224)
    model = ResNet(BasicBlock, [1, 1, 1, 1]) if quick else resnet50()
    model = model.to(device, memory_format=torch.channels_last)
    images, labels = batch_of_images(batch, side, device)
    images = images.contiguous(memory_format=torch.channels_last)
    about = f"batch {batch} of {side} x {side}, channels_last, bf16 autocast, fused SGD"
    return Task(model, sgd, classification(images, labels), 1, about)


def vit_b_16(device: str, quick: bool) -> Task:
    """A vision transformer with AdamW."""
    require("torchvision")
    from torchvision.models import VisionTransformer, vit_b_16

    batch, side = (2, 32) if quick else (256, 224)
    if quick:
        model = VisionTransformer(side, 16, 2, 2, 32, 64)
    else:
        model = vit_b_16()
    images, labels = batch_of_images(batch, side, device)
    about = f"batch {batch} of {side} x {side}, bf16 autocast, fused AdamW"
    return Task(model.to(device), adamw, classification(images, labels), 1, about)


def gpt2_small(device: str, quick: bool) -> Task:
    """A language model with AdamW, over accumulated batches, as 65536 tokens' logits are large."""
    require("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config()
    batch, length, accumulate = 16, 1024, 4
    if quick:
        config = GPT2Config(vocab_size=97, n_positions=16, n_embd=32, n_layer=2, n_head=2)
        batch, length, accumulate = 2, 16, 2
    model = GPT2LMHeadModel(config).to(device).train()
    tokens = torch.randint(config.vocab_size, (batch, length), device=device)

    def loss(model: nn.Module) -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    size = batch * length * accumulate
    about = (
        f"{size} tokens in {accumulate} batches of {batch} x {length}, bf16 autocast, fused AdamW"
    )
    return Task(model, adamw, loss, accumulate, about)


TASKS = {"ResNet-50": resnet50, "ViT-B/16": vit_b_16, "GPT-2 small": gpt2_small}


def sgd(model: nn.Module) -> Optimizer:
    """SGD with momentum, in one kernel."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)


def adamw(model: nn.Module) -> Optimizer:
    """AdamW, in one kernel."""
    return torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)


def batch_of_images(count: int, side: int, device: str) -> tuple[Tensor, Tensor]:
    """Images of noise, and labels."""
    images = torch.randn(count, 3, side, side, device=device)
    return images, torch.randint(CLASSES, (count,), device=device)


def classification(images: Tensor, labels: Tensor) -> Callable[[nn.Module], Tensor]:
    """The loss of a classifier on these images."""

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    return loss
