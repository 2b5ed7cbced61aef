"""The tensors of a file or a folder by name, some of which stay in the file until they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_hsu.report._files.naming import check_name, short

KEPT_IN_FILE = 256 * 2**20  # bytes of a set of weights from which on its numbers stay in the file
ALWAYS_READ = 2**20  # bytes of a tensor up to which its numbers are read at once
_MAY_BE_EXPANDED = 64 * 2**20  # bytes of a tensor up to which it may share its numbers with itself
_MAX_AXES = 64


@dataclass
class Found:
    """The weights of a file or a folder.

    Args:
        tensors: By name, real or on device meta.
        loaders: By name, what reads the numbers of a tensor on device meta.
        config: What the file or the folder says of the model.
        notes: Pairs of a name, or "", and a text.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    loaders: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    notes: list[tuple[str, str]] = field(default_factory=list)

    def load(self, name: str) -> Tensor:
        """The numbers of one tensor; one that has no numbers anywhere stays on device meta."""
        if name in self.loaders:
            return self.loaders[name]()
        return self.tensors[name]

    def take(self, name: str, other: Found, other_name: str) -> None:
        """Add a tensor of another set under a name of its own."""
        self.tensors[name] = other.tensors[other_name]
        if other_name in other.loaders:
            self.loaders[name] = other.loaders[other_name]

    def add(self, other: Found, prefix: str = "") -> None:
        """Add all tensors and notes of another set."""
        for name in other.tensors:
            self.take(prefix + name, other, name)
        self.notes += other.notes

    def under(self, names: list[str]) -> Found:
        """The same tensors in the order of these names, which are all names or some."""
        chosen = Found(config=self.config, notes=list(self.notes))
        for name in names:
            chosen.take(name, self, name)
        return chosen


def size_in_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The bytes of a tensor that shares no numbers with itself."""
    return math.prod(shape) * dtype.itemsize


def check_tensor(path: Path, name: str, x: Tensor) -> None:
    """Refuse a tensor that would ask for far more memory than its file takes.

    Raises:
        ValueError: if a tensor of more than 64 MiB is larger than the storage below it, because
            its numbers are repeated (strides of 0, or places that overlap); for a name that no
            model has.
    """
    check_name(path, name)
    if x.ndim > _MAX_AXES:
        raise ValueError(f"{path}: {short(name)} has {x.ndim} axes, more than any weight")
    if x.layout != torch.strided or x.is_meta:
        return
    check_expanded(f"{path}: {short(name)}", tuple(x.shape), x.dtype, x.untyped_storage().nbytes())


def check_expanded(name: str, shape: tuple[int, ...], dtype: torch.dtype, stored: int) -> None:
    """Refuse a tensor of more than 64 MiB that is larger than what is stored of it.

    Args:
        name: What to call it in the error.
        shape: Its shape.
        dtype: Its dtype.
        stored: Bytes of the storage that holds its numbers.
    """
    asked = size_in_bytes(shape, dtype)
    if asked > max(stored, _MAY_BE_EXPANDED):
        raise ValueError(
            f"{name} {shape} asks for {asked:,} bytes of which the file holds {stored:,}: its "
            "numbers are repeated; if that is meant, load the file yourself and pass the tensors "
            "by name to lightning_hsu.report.report"
        )
