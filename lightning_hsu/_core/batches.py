"""Layers in batches: which are computed together, and where their parts of flat tensors are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.layout import Layout, Width, triangle
from lightning_hsu._core.layouts import layout_of
from lightning_hsu._core.updates import GradientUpdate

_PANEL_ENTRIES = 2**27
"""Gram entries computed together: 512 MiB in float32, of which a kernel takes a few."""

_STACK_ENTRIES = 2**27
"""Entries of the layers computed together, which are held three times."""

_BATCHES = 16
"""Batches of a model that is large: a part of it takes little memory beside its weights."""


@dataclass(frozen=True)
class Batch:
    """Layers that are computed together: of one device and dtype, of any shapes and kernels.

    Args:
        updates: The layers, sorted by dimension, number of neurons and kernel.
        terms: The kernels.
        kinds: Which of them each layer has.
        gram: Gram entries computed together.
    """

    updates: list[GradientUpdate]
    terms: tuple[PairTerm, ...]
    kinds: list[int]
    gram: int

    @property
    def work(self) -> list[tuple[GradientUpdate, PairTerm]]:
        """The layers with their kernels."""
        terms = [self.terms[kind] for kind in self.kinds]
        return list(zip(self.updates, terms, strict=True))

    @cached_property
    def layout(self) -> Layout:
        """Where the layers lie in flat buffers; the same object for layers of the same shapes."""
        shapes = []
        for kind, update in zip(self.kinds, self.updates, strict=True):
            b, n, d = update.size
            shapes.append((kind, b, n, d))
        halves = tuple(term.half_space for term in self.terms)
        return layout_of(tuple(shapes), halves, self.gram, self.updates[0].entries.device)


def batches_of(work: Iterable[tuple[GradientUpdate, PairTerm]]) -> list[Batch]:
    """Divide layers into batches that fit in memory."""
    alike: dict[object, list[tuple[GradientUpdate, PairTerm]]] = {}
    for update, term in work:
        w = update.entries
        limit = update.limit
        # Numbers may differ from layer to layer, a tensor on the device is common to all.
        task = None if update.task is None else update.task.allows
        limit_key = id(limit) if isinstance(limit, Tensor) else 0
        key = (w.device, w.dtype, update.grad_scale, limit_key, task)
        alike.setdefault(key, []).append((update, term))
    batches = []
    for members in alike.values():
        kinds: dict[PairTerm, int] = {}
        numbered = []
        for update, term in members:
            numbered.append((update, kinds.setdefault(term, len(kinds))))
        numbered.sort(key=_by_shape)
        room = _room(numbered)
        for some in _that_fit(numbered, room):
            batches.append(_batch(some, list(kinds), room[0]))
    return batches


def _batch(
    layers: Sequence[tuple[GradientUpdate, int]], terms: Sequence[PairTerm], gram: int
) -> Batch:
    """A batch of these layers, whose kernels are numbered anew: it need not have all of them."""
    used = sorted({kind for _, kind in layers})
    updates = []
    kinds = []
    for update, kind in layers:
        updates.append(update)
        kinds.append(used.index(kind))
    return Batch(updates, tuple(terms[kind] for kind in used), kinds, gram)


def _by_shape(one: tuple[GradientUpdate, int]) -> tuple[int, int, int]:
    update, kind = one
    _, n, d = update.size
    return d, n, kind


def _room(layers: Sequence[tuple[GradientUpdate, int]]) -> tuple[int, int]:
    """Gram entries, and entries of layers, that are computed together."""
    gram = entries = 0
    for update, _ in layers:
        gram += update.size[0] * triangle(update.size[1])
        entries += update.size.numel()
    return max(_PANEL_ENTRIES, gram // _BATCHES), max(_STACK_ENTRIES, entries // _BATCHES)


def _that_fit(
    layers: Sequence[tuple[GradientUpdate, int]], room: tuple[int, int]
) -> list[list[tuple[GradientUpdate, int]]]:
    """Divide layers into runs that fit in memory."""
    runs: list[list[tuple[GradientUpdate, int]]] = []
    gram = entries = 0
    for one in layers:
        shape = one[0].size
        own = shape[0] * triangle(shape[1])
        gram += own
        entries += shape.numel()
        if not runs or gram > room[0] or entries > room[1]:
            runs.append([])
            gram, entries = own, shape.numel()
        runs[-1].append(one)
    return runs


def groups_that_fit(n: int, d: int) -> int:
    """How many groups of n neurons of dimension d go together, at least one."""
    return max(1, min(_PANEL_ENTRIES // triangle(n), _STACK_ENTRIES // max(1, n * d)))


def layer_parts(batch: Batch, flat: Tensor) -> list[Tensor]:
    """The entries of each layer in a flat tensor, in the shape in which the layer has them."""
    found = []
    for update, span in zip(batch.updates, batch.layout.spans, strict=True):
        shape = update.entries.shape
        found.append(flat.narrow(0, span.entry, shape.numel()).view(shape))
    return found


def rows_of(flat: Tensor, width: Width) -> Tensor:
    """The rows (k, d) of one dimension in a flat tensor."""
    return flat.narrow(0, width.entry, width.rows * width.d).view(width.rows, width.d)


def by_row_of(by_row: Tensor, width: Width) -> Tensor:
    """What a tensor (rows,) holds for the rows of one dimension."""
    return by_row.narrow(0, width.row, width.rows)


def by_layer(batch: Batch, by_row: Tensor) -> list[Tensor]:
    """What a tensor (rows,) holds for the rows of each layer."""
    return [by_row.narrow(0, span.row, span.rows) for span in batch.layout.spans]
