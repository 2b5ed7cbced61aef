"""Ranks that train the same weights share layers: one computes a gradient, and all get its bits.

The layers of a step are divided by arithmetic, largest first, each to the rank that has least to do
so far. All ranks divide them alike, from shapes alone. An owner computes its layers into one tensor
for each device and dtype, which it broadcasts; so a step has at most one message from each rank,
however many layers there are.

The messages are under way while each rank computes what it needs by itself, or, where gradients are
computed ahead, while the task's next forward and backward pass run. They are waited for when they
are added, or when it turns out that nobody needs them: what one rank has begun, all have.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lightning_hsu._checks import listed
from lightning_hsu._core import PairTerm, working_dtype
from lightning_hsu._core.foreach import add_all_pair_gradients
from lightning_hsu._core.raw import RawGradients, RawPart
from lightning_hsu._core.raw import raw_gradients as own_gradients
from lightning_hsu._core.updates import GradientUpdate, whole_gradient
from lightning_hsu._engine.layer import Layer
from lightning_hsu._neurons.placement import Placement
from lightning_hsu._neurons.placement.base import Message
from lightning_hsu.measures import State

PlainUpdate = tuple[Layer, PairTerm, GradientUpdate]
"""A plain layer, the kernel of its measure, and its update."""

Compute = Callable[[Sequence[int], Sequence[Tensor]], None]
"""Compute the gradients of the layers of these numbers into tensors (groups, n, d) of zeros."""

_ALIGNED = 32
"""Gradients in a message begin at multiples of this many entries, as vectorised kernels like it."""


def worth_sharing(device: torch.device) -> float:
    """The FLOP of a layer, and of what a rank is spared at a step, from which sharing pays.

    Measured with two gloo processes of one thread, some 40 GFLOP/s each: the messages of a step take
    0.2 ms and 0.25 ms for each MB, and a rank's processor time, shared over whole, is 1.4 for 8
    layers of 64 x 256 (3e6 FLOP each), 1.1 for 8 of 64 x 576 (7e6), 1.3 and 0.7 for 2 and 8 of
    128 x 128 (6e6), 0.5 for 8 of 256 x 256 (5e7) and 0.54 for 4 of 768 x 768 (1.4e9). For GPUs the
    number is not yet measured but estimated: at 50 TFLOP/s a message of 50 us takes the time of
    2.5e9 FLOP, and the entries of 768 neurons take longer to send over PCIe than to compute.
    """
    return 1e7 if device.type == "cpu" else 1e10


def is_shared(layer: Layer, placement: Placement) -> bool:
    """Whether a layer is large enough for one rank to compute it for all."""
    if not placement.shares_work:
        return False
    return layer.grad_flops >= worth_sharing(layer.parameters[0].device)


def may_be_sent(state: State | None) -> bool:
    """Whether a gradient under this state can be computed by one rank alone.

    Each rank prepares the state. Where that only counts draws it costs nothing, but a search is
    most of the work.
    """
    return state is None or set(state) == {"draw"}


@dataclass(frozen=True, eq=False, slots=True)
class Job:
    """A gradient to compute.

    Args:
        layer: The layer.
        x: Its neurons (groups, n, d).
    """

    layer: Layer
    x: Tensor

    def zeros(self) -> Tensor:
        """A tensor (groups, n, d) for the gradient, of the dtype in which it is computed."""
        dtype = working_dtype(self.x.dtype)
        return torch.zeros(self.x.shape, dtype=dtype, device=self.x.device)


class Gradients:
    """Gradients that ranks compute for one another, under way.

    As a context it waits at its end for messages that nobody has waited for, as after an error.

    Args:
        grads: Tensors (groups, n, d), of which others fill some; ``under_way``, as long as nobody
            has waited for the messages.
        parcels: What is sent.
        waits: What waits for the messages.
        error: Why this rank could not compute its part.
    """

    def __init__(
        self,
        grads: list[Tensor],
        parcels: Sequence[_Parcel],
        waits: list[Callable[[], object]],
        error: Exception | None,
    ) -> None:
        self.under_way = grads
        self._parcels = parcels
        self._waits = waits
        self._error = error

    def __enter__(self) -> Gradients:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Wait for messages that nobody needs; what has gone wrong with them does not matter."""
        while self._waits:
            with suppress(RuntimeError):
                self._waits.pop()()

    def wait(self) -> list[Tensor]:
        """The gradients (groups, n, d), of the same bits on every rank; the caller may change them.

        On a GPU the current stream waits, not this process. Another call waits no more.

        Raises:
            RuntimeError: if another rank could not compute its part. On a GPU, where nobody waits to
                see that, its part is 0, and the next collective call fails.
            Exception: the error of this rank, if it could not compute its own.
        """
        waits, self._waits = self._waits, []
        for wait in waits:
            wait()
        if self._error is not None:
            raise self._error
        for parcel in self._parcels:
            if parcel.entries.device.type == "cpu" and bool(parcel.entries[-1] != 0):
                raise RuntimeError(
                    f"rank {parcel.owner} could not compute the penalty's gradient of its share of "
                    f"the layers, {listed(map(repr, parcel.names))}: see its error"
                )
        return self.under_way


def begin(
    jobs: Sequence[Job], compute: Compute, placement: Placement, *, beside: bool = False
) -> Gradients:
    """Begin to compute gradients together with the other ranks. A collective call.

    What others need is computed and sent first, then what each rank computes for itself.

    Args:
        jobs: The gradients, the same on all ranks.
        compute: Computes some of them.
        placement: Of weights that every rank holds alike.
        beside: Whether messages may be under way while the task's gradients are reduced.
    """
    owners = _owners(jobs, placement)
    parcels, grads = _packed(jobs, owners, placement.rank)
    mine = []
    sent = []
    for i, owner in owners.items():
        if owner == placement.rank:
            mine.append(i)
            sent.append(grads[i])
    error = None
    try:
        if mine:
            compute(mine, sent)
    except Exception as raised:  # `wait` raises it again: the other ranks wait for a message
        error = raised
        for parcel in parcels:
            if parcel.owner == placement.rank:
                parcel.entries.zero_()
                parcel.entries[-1] = 1.0
    messages = [Message(parcel.owner, parcel.entries) for parcel in parcels]
    waits = placement.send(messages, beside=beside)
    own = []
    outs = []
    for i, job in enumerate(jobs):
        if i not in owners:
            grads[i] = job.zeros()
            own.append(i)
            outs.append(grads[i])
    found = Gradients([grads[i] for i in range(len(jobs))], parcels, waits, error)
    if own:
        try:
            compute(own, outs)
        except BaseException:
            found.abandon()
            raise
    return found


def begin_plain(
    found: Sequence[PlainUpdate],
    placement: Placement,
    *,
    raw: bool = False,
    beside: bool = False,
) -> Gradients:
    """Begin to compute what is added to plain layers, or their ``raw`` gradients. A collective call.

    Args:
        found: The layers, the same on all ranks.
        placement: How their weights are placed over the ranks.
        raw: Leave out the factors and limits of the updates.
        beside: Whether messages may be under way while the task's gradients are reduced.
    """

    def compute(chosen: Sequence[int], outs: Sequence[Tensor]) -> None:
        by_term: dict[PairTerm, list[GradientUpdate]] = {}
        for i, out in zip(chosen, outs, strict=True):
            _, term, update = found[i]
            by_term.setdefault(term, []).append(_redirected(update, out, raw))
        add_all_pair_gradients(by_term)

    jobs = [Job(layer, update.w) for layer, _, update in found]
    return begin(jobs, compute, placement, beside=beside)


@dataclass(frozen=True, eq=False)
class RawWork:
    """Gradients of plain layers by themselves, of which some are on their way from other ranks.

    Args:
        own: What this rank computes for itself, each when it is asked for.
        shared: What ranks compute for one another; it is there once ``from_ranks`` are.
        from_ranks: The messages.
    """

    own: Iterator[RawPart]
    shared: list[RawPart]
    from_ranks: Gradients

    def __iter__(self) -> Iterator[RawPart]:
        """All of them; those of other ranks are waited for at the end.

        On a GPU the current stream waits, not this process.
        """
        yield from self.own
        self.from_ranks.wait()
        yield from self.shared


def begin_raw(
    found: Sequence[PlainUpdate],
    placement: Placement,
    *,
    alone: Collection[Layer] = (),
    stats: bool = False,
    beside: bool = False,
) -> RawWork:
    """Begin to compute gradients of plain layers by themselves. A collective call.

    Whoever takes those of this rank waits for the messages or abandons them after an error.

    Args:
        found: The layers, which but for those of ``alone`` are the same on all ranks.
        placement: How their weights are placed over the ranks.
        alone: Layers that each rank computes by itself.
        stats: Also compute, of layers on a GPU that ranks do not share, what a logging step needs.
        beside: Whether messages may be under way while the task's gradients are reduced.
    """
    shared = []
    own = []
    work = []
    for i, (layer, term, update) in enumerate(found):
        if layer not in alone and is_shared(layer, placement):
            shared.append(i)
        else:
            own.append(i)
            work.append((update, term))
    from_ranks = begin_plain([found[i] for i in shared], placement, raw=True, beside=beside)
    parts: list[RawPart] = []
    for i, grad in zip(shared, from_ranks.under_way, strict=True):
        parts.append(RawGradients([i], whole_gradient(grad, found[i][2].w)))
    return RawWork(_placed(own_gradients(work, stats=stats), own), parts, from_ranks)


def _placed(grads: Iterator[RawPart], places: Sequence[int]) -> Iterator[RawPart]:
    """Gradients of some of the layers, with their places among all of them."""
    for raw in grads:
        raw.places = [places[place] for place in raw.places]
        yield raw


def _redirected(update: GradientUpdate, out: Tensor, raw: bool) -> GradientUpdate:
    """The same update of another tensor (groups, n, d)."""
    entries = update.entries
    into = out if update.shape is None else out.view(entries.shape)
    if not raw:
        return replace(update, out_entries=into)
    if entries.dtype == torch.float16:  # whose range would limit what is added
        entries = entries.float()
    return GradientUpdate(entries, into, 1.0, None, 1.0, update.shape)


@lru_cache(maxsize=256)
def divided(flops: tuple[float, ...], ranks: int, worth: float) -> tuple[int, ...]:
    """Divide layers over ranks: the owner of each; () if every rank had better compute them all.

    Args:
        flops: The arithmetic of each layer.
        ranks: The number of ranks.
        worth: The FLOP that the busiest rank must be spared.
    """
    loads = [0.0] * ranks
    owners = [0] * len(flops)
    for i in sorted(range(len(flops)), key=lambda i: -flops[i]):
        owner = loads.index(min(loads))
        owners[i] = owner
        loads[owner] += flops[i]
    if sum(flops) - max(loads) < worth:
        return ()
    return tuple(owners)


@dataclass(frozen=True, eq=False, slots=True)
class _Parcel:
    """The gradients that one rank computes for all, of one device and dtype.

    Args:
        owner: The rank.
        entries: The gradients one after the other, and a last entry that is 0 if all went well.
        names: Names of the layers.
    """

    owner: int
    entries: Tensor
    names: list[str]


def _owners(jobs: Sequence[Job], placement: Placement) -> dict[int, int]:
    """The ranks that compute gradients for all, by the numbers of these."""
    shared = []
    flops = []
    for i, job in enumerate(jobs):
        if is_shared(job.layer, placement):
            shared.append(i)
            flops.append(job.layer.grad_flops)
    if not shared:
        return {}
    owners = divided(tuple(flops), placement.size, worth_sharing(jobs[shared[0]].x.device))
    return dict(zip(shared, owners, strict=True)) if owners else {}


def _packed(
    jobs: Sequence[Job], owners: Mapping[int, int], rank: int
) -> tuple[list[_Parcel], dict[int, Tensor]]:
    """A message from each owner for each device and dtype, and the place of each gradient there."""
    alike: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    for i, owner in owners.items():
        x = jobs[i].x
        alike.setdefault((x.device, working_dtype(x.dtype), owner), []).append(i)
    parcels = []
    grads: dict[int, Tensor] = {}
    for (device, dtype, owner), members in alike.items():
        sizes = [_aligned(jobs[i].x.numel()) for i in members]
        make = torch.zeros if owner == rank else torch.empty
        entries = make(sum(sizes) + 1, dtype=dtype, device=device)
        names = []
        start = 0
        for i, size in zip(members, sizes, strict=True):
            names.append(jobs[i].layer.name)
            x = jobs[i].x
            grads[i] = entries[start : start + x.numel()].view(x.shape)
            start += size
        parcels.append(_Parcel(owner, entries, names))
    return parcels, grads


def _aligned(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // _ALIGNED) * _ALIGNED
