"""Weights from files, without running what is in them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a file by name."""
    found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return found
