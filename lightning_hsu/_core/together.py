"""Gradients of layers of any shapes on a GPU as tensors of their own, computed in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.batches import batches_of
from lightning_hsu._core.foreach import begin_batch, calm_and_crowded
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.precision import working_dtype
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu._core.without_sync import unweighted


class Neurons(NamedTuple):
    """The neurons of a layer, for :func:`gradients_together`.

    Args:
        x: The neurons (b, n, d), without a graph.
        term: The kernel.
        key: What stands for the layer from step to step, since its neurons may be new tensors.
    """

    x: Tensor
    term: PairTerm
    key: object


class Gradient(NamedTuple):
    """What one pass gives of a layer.

    Args:
        grad: The gradient (b, n, d) in float32 or wider, which the caller may change.
        energy: Mean energies (b,) in float32 or wider; None if nobody has asked for them.
    """

    grad: Tensor
    energy: Tensor | None


@torch.no_grad()
def gradients_together(layers: Sequence[Neurons], *, energy: bool = False) -> dict[int, Gradient]:
    """The gradients of layers that :func:`avoids_sync` takes, by their places; nothing waits.

    Layers that are known to have more near pairs than a pass has room for, or coincident neurons, are
    left out: they go the exact way. Batches are divided by memory (batches.py).

    Args:
        layers: The layers.
        energy: Also return the mean energies.
    """
    place_of = {}
    work = []
    for place, (x, term, key) in enumerate(layers):
        update = GradientUpdate(x, x, 1.0, key=key)
        place_of[id(update)] = place
        work.append((update, term))
    calm, _ = calm_and_crowded(work)
    found: dict[int, Gradient] = {}
    for batch in batches_of(calm):
        result = begin_batch(batch, energy=energy)
        energies: list[Tensor | None] = [None] * len(batch.updates)
        if energy:
            assert result.energy is not None
            dtype = working_dtype(batch.updates[0].entries.dtype)
            bound = torch.finfo(dtype).max
            groups = [update.size[0] for update in batch.updates]
            mean = result.energy.clamp(-bound, bound).to(dtype)
            energies = list(torch.split(mean, groups))
        grads = unweighted(batch, result)
        for update, grad, own in zip(batch.updates, grads, energies, strict=True):
            found[place_of[id(update)]] = Gradient(grad, own)
    return found
