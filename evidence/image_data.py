"""What ``python -m evidence.images`` trains on: images as bytes, in batches, moved and flipped."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset

from evidence.data import Data, MissingDataError, load

BATCH = 128


@lru_cache(maxsize=1)
def loaded(source: str) -> Data:
    """The data with images as bytes, read once.

    Raises:
        MissingDataError: if it is not there, or pixels are not bytes.
    """
    data = load(source)
    images = data.pool[0]
    if not (images == images.byte()).all():
        told = f"{data.title} has pixels from {float(images.min()):g} to {float(images.max()):g}"
        raise MissingDataError(f"{told}; these recipes take whole numbers from 0 to 255.")
    test = data.test[0].byte(), data.test[1]
    return replace(data, pool=(images.byte(), data.pool[1]), test=test)


def moved(images: Tensor) -> Tensor:
    """Each image moved by up to 4 pixels each way, its edges mirrored, and flipped or not."""
    batch, _, height, width = images.shape
    down = torch.randint(-4, 5, (batch, 1), device=images.device)
    right = torch.randint(-4, 5, (batch, 1), device=images.device)
    rows = _mirrored(down + torch.arange(height, device=images.device), height)
    cols = _mirrored(right + torch.arange(width, device=images.device), width)
    cols = torch.where(torch.rand(batch, 1, device=images.device) < 0.5, cols.flip(1), cols)
    every = torch.arange(batch, device=images.device)[:, None, None]
    return images[every, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Indices beyond the edges fold back: -1 is 0, -2 is 1."""
    index = torch.where(index < 0, -1 - index, index)
    return torch.where(index >= size, 2 * size - 1 - index, index)


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """The images of all steps one after another, epoch by epoch in a new order.

    Args:
        images: Shape (m, channels, height, width).
        labels: Shape (m,).
        steps: How many.
        seed: Decides the orders.
        first: The step that item 0 begins, as Lightning begins at item 0 when it resumes.
    """

    def __init__(self, images: Tensor, labels: Tensor, steps: int, seed: int, first: int) -> None:
        self._images = images
        self._labels = labels
        self._steps = steps
        chance = torch.Generator().manual_seed(seed)
        whole = len(labels) // BATCH
        orders = []
        for _ in range(0, steps, whole):
            orders.append(torch.randperm(len(labels), generator=chance)[: whole * BATCH])
        self._order = torch.cat(orders)[first * BATCH : steps * BATCH]

    def __len__(self) -> int:
        """Of all steps, those before the first included: Lightning counts them as done."""
        return self._steps * BATCH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image and its label."""
        chosen = self._order[index]
        return self._images[chosen], self._labels[chosen]
