"""What a pass over layers on a GPU leaves to the host, read when the next pass begins.

A pass has room for so many near pairs, and none for coincident neurons. Which pairs it met is
copied to the host without waiting, and read at the next step, in which the layers that had too many
go the exact way. Every process reads at the same step, however fast its device is: ranks agree. The
host then waits only if it is more than a whole step ahead of the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.layout import Piece
from lightning_hsu._core.near import COINCIDENT, NEAR
from lightning_hsu._core.sphere import unit_rows
from lightning_hsu._core.updates import GradientUpdate

Key = tuple[object, ...]
"""What stands for one layer: its place in memory or a key of its own, and its kernel."""

Layer = tuple[GradientUpdate, PairTerm]
"""A layer with its kernel."""

_KEPT = 4096
"""How many layers are remembered: nobody may ask for the oldest again."""

_FEW = 1 / 4
"""Part of the room for near pairs beyond which a layer is crowded, where there is no room left."""

_ROWS = 256
"""Rows of the Gram matrix formed at once."""


class _Answer(NamedTuple):
    """What a pass met in one of its pieces.

    Args:
        layers: The keys of the layers, and whether their kernels are of half space.
        groups: The layer of each group of the batch.
        piece: The piece.
        at: Places of near pairs, on the host.
        squares: Their squared chords, on the host.
        ready: What the host has to wait for before it reads them; None if they are there.
    """

    layers: list[tuple[Key, bool]]
    groups: list[int]
    piece: Piece
    at: Tensor
    squares: Tensor
    ready: torch.cuda.Event | None


class CrowdedLayers:
    """Knows which layers have more near pairs than a pass has room for, or coincident neurons."""

    def __init__(self) -> None:
        # By layer; those of a batch have one list, which is empty once it is read.
        self._answers: dict[Key, list[_Answer]] = {}
        self._crowded: dict[Key, int] = {}  # how often each was computed the exact way

    def read(self, layers: Sequence[Layer]) -> None:
        """Read what earlier passes over these layers met."""
        if not self._answers:
            return
        for update, term in layers:
            answers = self._answers.pop(key_of(update, term), [])
            while answers:
                self._crowded.update(dict.fromkeys(_crowded(answers.pop()), 0))
        _keep_latest(self._crowded)

    def divided(self, layers: Sequence[Layer]) -> tuple[list[Layer], list[Layer]]:
        """The layers without, and those with too many near pairs, as far as that is known."""
        self.read(layers)
        calm = []
        crowded = []
        for one in layers:
            if self.is_crowded(*one):
                crowded.append(one)
            else:
                calm.append(one)
        return calm, crowded

    def not_exact(self, layers: Sequence[Layer]) -> list[int]:
        """Places of the layers that their last pass has not computed exactly."""
        self.read(layers)
        if not self._crowded:
            return []
        places = []
        for place, (update, term) in enumerate(layers):
            if self._crowded.get(key_of(update, term)) == 0:
                places.append(place)
        return places

    def is_crowded(self, update: GradientUpdate, term: PairTerm) -> bool:
        """Whether to compute a layer the exact way now; on some steps this looks at it and waits."""
        if not self._crowded:
            return False
        key = key_of(update, term)
        count = self._crowded.get(key)
        if count is None:
            return False
        looks = count % 16 == 0 or count & (count - 1) == 0
        if count and looks and not _has_near_pairs(update.w, term):
            del self._crowded[key]
            return False
        self._crowded[key] = count + 1
        return True

    def note(
        self,
        layers: Sequence[Layer],
        pieces: Sequence[Piece],
        pairs: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """Have what a pass met copied to the host.

        Args:
            layers: The layers of the batch, in its order.
            pieces: Its pieces.
            pairs: The near pairs of each: their places, and squared chords.
        """
        keys = []
        groups = []
        for i, (update, term) in enumerate(layers):
            keys.append((key_of(update, term), term.half_space))
            groups += [i] * update.size[0]
        answers = []
        for piece, (at, squares) in zip(pieces, pairs, strict=True):
            if at.device.type == "cpu":
                answers.append(_Answer(keys, groups, piece, at, squares, None))
                continue
            there = at.to("cpu", non_blocking=True), squares.to("cpu", non_blocking=True)
            if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # only thought of
                continue
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(at.device))
            answers.append(_Answer(keys, groups, piece, *there, ready))
        for key, _ in keys:
            self._answers[key] = answers
        _keep_latest(self._answers)


def key_of(update: GradientUpdate, term: PairTerm) -> Key:
    """What stands for a layer."""
    if update.key is not None:
        return update.key, term
    entries = update.entries
    storage = entries.untyped_storage()._cdata
    return storage, entries.storage_offset(), entries.shape, term


def _keep_latest(known: dict[Key, Any]) -> None:
    """Forget the layers that came first, of too many."""
    while len(known) > _KEPT:
        del known[next(iter(known))]


def _crowded(answer: _Answer) -> list[Key]:
    """The layers that a pass has not computed exactly."""
    if answer.ready is not None:
        answer.ready.synchronize()
    places = answer.at.tolist()
    spare = answer.piece.size
    if places[0] == spare:
        return []
    listed = [place for place in places if place != spare]
    q, p = answer.squares.tolist()
    found: dict[int, int] = {}  # pairs of each layer
    crowded = set()
    groups = iter([*answer.piece.groups_at[1:], (spare, 0)])
    _, group = answer.piece.groups_at[0]
    following = next(groups)
    for i, place in enumerate(listed):
        while place >= following[0]:
            _, group = following
            following = next(groups)
        layer = answer.groups[group]
        found[layer] = found.get(layer, 0) + 1
        nearest = min(q[i], p[i]) if answer.layers[layer][1] else q[i]
        if nearest < COINCIDENT:
            crowded.add(layer)
    if len(listed) == len(places):
        most = max(found.values())
        limit = min(most, _FEW * len(places))
        crowded |= {layer for layer, count in found.items() if count >= limit}
    return [answer.layers[layer][0] for layer in crowded]


def _has_near_pairs(w: Tensor, term: PairTerm) -> bool:
    """Whether many of the pairs of neurons w (b, n, d) are near, or any nearly coincide."""
    x = unit_rows(w.float())[0]
    count = 0
    for start in range(0, x.shape[1], _ROWS):
        cosine = x[:, start : start + _ROWS] @ x[:, start:].mT
        cosine.diagonal(dim1=1, dim2=2).zero_()
        near = cosine.abs() > 1.0 - NEAR / 2.0
        same = cosine > 1.0 - 1e-6
        if term.half_space:
            same |= cosine < -1.0 + 1e-6
        if bool(same.any()):
            return True
        count += int(near.sum())
    return count > 64
