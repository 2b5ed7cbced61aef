"""How far neurons have moved since their gradients were computed, by some of their entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core import working_dtype
from lightning_hsu._engine.delta import Delta, Use
from lightning_hsu._engine.late import LateNumbers

Known = tuple[Use, Delta]
"""A layer at a step, and its kept gradient."""


class Moves:
    """How far layers have moved: numbers that may be on their way to the host."""

    def __init__(self) -> None:
        self._begun: dict[str, _Move] = {}

    def begin(self, known: Sequence[Known]) -> None:
        """Begin to look how far layers have moved, for a step to come."""
        for members in _alike(known):
            changes = LateNumbers(_changes(members))
            for place, (use, _) in enumerate(members):
                self._begun[use.layer.name] = _Move(use.token, changes, place)

    def see(self, known: Sequence[Known]) -> None:
        """Note in the uses of layers how far these have moved."""
        unseen = []
        for use, delta in known:
            begun = self._begun.pop(use.layer.name, None)
            if begun is not None and begun.token is not None and begun.token == use.token:
                use.moved = delta.relative(begun.numbers.read()[begun.place])
            else:
                unseen.append((use, delta))
        for members in _alike(unseen):
            changes = _changes(members).tolist()
            for (use, delta), change in zip(members, changes, strict=True):
                use.moved = delta.relative(change)

    def drop(self, name: str | None = None) -> None:
        """Drop what was begun of a layer, or of all."""
        if name is None:
            self._begun = {}
        else:
            self._begun.pop(name, None)


class _Move(NamedTuple):
    """How far a layer has moved, on its way to the host.

    Args:
        token: The state of its weights.
        numbers: The changes of several samples.
        place: Which of them is this layer's.
    """

    token: object
    numbers: LateNumbers
    place: int


def _alike(known: Sequence[Known]) -> list[list[Known]]:
    """Layers grouped by device and dtype."""
    found: dict[object, list[Known]] = {}
    for one in known:
        sample = one[0].sample
        found.setdefault((sample.dtype, sample.device), []).append(one)
    return list(found.values())


def _changes(members: Sequence[Known]) -> Tensor:
    """Norms (k,) of the changes of the samples of layers since their gradients were computed."""
    sizes, now, then = [], [], []
    for use, delta in members:
        sizes.append(use.sample.numel())
        now.append(use.sample)
        then.append(delta.sample)
    dtype = working_dtype(now[0].dtype)
    change = torch.cat(now).to(dtype) - torch.cat(then).to(dtype)
    return torch.stack(torch._foreach_norm(list(torch.split(change, sizes))))
