"""Pair sums that ask the device nothing: layers of one shape go together, and a CUDA graph can replay all of it.

Each question to a GPU ("is any pair near?") would wait for it. Here the answers are gathered beside the results; whoever uses
these reads all of them at once and computes again, exactly, the groups that had near pairs or rows of unusual norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_hsu._core.backend import replays
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.near import NEAR
from lightning_hsu._core.precision import exact_arithmetic, working_dtype

_ENTRIES = 2**26
"""Gram entries held at once: 256 MiB in float32."""

_KEPT = 4
"""CUDA graphs kept, with their results: one for each measure of a model, or its optimizers in turn."""

Found = tuple[Tensor, Tensor, Tensor]
"""What :func:`unasked_gradients` returns."""

_graphs: dict[object, tuple[torch.cuda.CUDAGraph, list[Found]]] = {}


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Neurons of layers of one shape (b, n, d) as one stack, in float32 or wider."""
    return (torch.cat(list(parts)) if len(parts) > 1 else parts[0]).to(
        working_dtype(parts[0].dtype)
    )


def unasked(stacks: Sequence[Sequence[Tensor]], term: PairTerm) -> Iterator[Found]:
    """:func:`unasked_gradients` of stacks of layers of one shape each, one after the other, or replayed all at once."""
    devices = {parts[0].device for parts in stacks}
    if len(devices) == 1 and replays():  # a graph is one of one device
        yield from _replayed(stacks, term)
    else:
        for parts in stacks:
            with exact_arithmetic(parts[0]):
                found = unasked_gradients(stacked(parts), term)
            yield found


def _replayed(stacks: Sequence[Sequence[Tensor]], term: PairTerm) -> list[Found]:
    """The same from one CUDA graph, captured when these weights first come and kept for the next steps.

    What it returns is overwritten by the next replay.
    """
    key = (
        term,
        tuple((w.data_ptr(), w.shape, w.stride(), w.dtype) for parts in stacks for w in parts),
    )
    if key not in _graphs:
        while len(_graphs) >= _KEPT:
            del _graphs[next(iter(_graphs))]
        with exact_arithmetic(stacks[0][0]), torch.cuda.device(stacks[0][0].device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(
                aside
            ):  # what libraries set up at their first call is not to be captured
                for parts in stacks:
                    unasked_gradients(stacked(parts), term)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = [unasked_gradients(stacked(parts), term) for parts in stacks]
        _graphs[key] = graph, found
    graph, found = _graphs[key]
    graph.replay()
    return found


def unasked_gradients(w: Tensor, term: PairTerm) -> tuple[Tensor, Tensor, Tensor]:
    """Mean energy over pairs and its gradient, where nothing is special about the neurons; see :func:`pair_energy`.

    Args:
        w: Neurons, shape (b, n, d), float32 or float64, n >= 2.
        term: The kernel.

    Returns:
        The values (b,), the gradients (b, n, d), and whether they hold, bool (b,). They do not where a group has near (or
        nearly opposite) pairs, or rows whose norm is not between 1e-15 and 1e15; there they may be anything.
    """
    b, n, _ = w.shape
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    holds = ((norm > 1e-15) & (norm < 1e15)).flatten(1).all(1)
    x = w / norm
    grad, radial, total = (
        torch.zeros_like(x),
        torch.zeros_like(norm),
        torch.zeros(b, dtype=torch.float64, device=w.device),
    )
    height = max(1, min(n, _ENTRIES // (b * n)))
    for start in range(0, n, height):
        rows, cols = x[:, start : start + height], x[:, start:]
        stop, seam = start + rows.shape[1], rows.shape[1]
        cosine = torch.bmm(rows, cols.mT)
        q = 2.0 - 2.0 * cosine
        q.diagonal(dim1=1, dim2=2).fill_(2.0)
        holds &= ((q >= NEAR) & (q <= 4.0 - NEAR)).flatten(1).all(1)
        value, slope = term.folded(q.clamp_(NEAR, 4.0 - NEAR), NEAR)
        for part in (value, slope):
            part.diagonal(dim1=1, dim2=2).fill_(0.0)
        total += value[..., :seam].sum((1, 2), dtype=torch.float64) / 2.0 + value[..., seam:].sum(
            (1, 2), dtype=torch.float64
        )
        pulled = cosine.mul_(slope)
        radial[:, start:stop] += pulled.sum(2, keepdim=True)
        radial[:, stop:] += pulled[..., seam:].sum(1).unsqueeze(2)
        grad[:, start:stop].baddbmm_(slope, cols)
        grad[:, stop:].baddbmm_(slope[..., seam:].mT, rows)
    grad = grad.addcmul_(x, radial, value=-1.0).mul_(-2.0 * term.scale(n) / norm)
    return (
        (total + term.constant(n)) * term.scale(n),
        grad,
        holds & grad.isfinite().flatten(1).all(1),
    )
