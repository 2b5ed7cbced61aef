"""Work beside the training on a GPU: a stream of its own, and numbers that are read a step later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_hsu._core.tables import has_streams
from lightning_hsu._engine.layer import Layer

_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


class LateNumbers:
    """Numbers of a device whose copy to the host begins now and is read later.

    Reading does not depend on time: it waits if it must, which a step later it need not.

    Args:
        numbers: Shape (k,), on any device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._event: torch.cuda.Event | None = None
        if numbers.is_cuda and torch.cuda.is_available():
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers = host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """The numbers."""
        if self._event is not None:
            self._event.synchronize()
        found: list[float] = self._numbers.tolist()
        return found


class LateChecks:
    """Whether weights of layers were others at a step than torch's counts said, read at the next one."""

    def __init__(self) -> None:
        self._begun: list[tuple[Sequence[Layer], Callable[[], list[Layer]]]] = []

    def add(self, layers: Sequence[Layer], changed: Callable[[], list[Layer]]) -> None:
        """Note a check of these layers, and what reads which of them have changed."""
        self._begun.append((layers, changed))

    def changed(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers that have changed, of the checks of any of these layers.

        Those of others are left: another optimizer's may be of the step under way.
        """
        wanted = set(layers)
        found = []
        left = []
        for one in self._begun:
            if wanted.isdisjoint(one[0]):
                left.append(one)
            else:
                found += one[1]()
        self._begun = left
        return found

    def drop(self) -> None:
        """Drop them all."""
        self._begun = []


class SideWork:
    """Work that began on the side stream of a device, and the moment when it is done.

    Args:
        device: The device; for any but CUDA the work is done when this is made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None
        if has_streams(device):
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(side_stream(device))

    def wait(self) -> None:
        """Let what comes next on the current stream wait for it; the host goes on."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Run on the side stream what is queued within, after all that is queued on the current one."""
    if not has_streams(device):
        yield
        return
    side = side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield


def keep_for_current(x: Tensor) -> None:
    """Keep the memory of a tensor that was made on the side stream until the current one is past it."""
    if has_streams(x.device):
        x.record_stream(torch.cuda.current_stream(x.device))


def keep_for_side(x: Tensor) -> None:
    """Keep the memory of a tensor that the side stream reads until it is past it."""
    if has_streams(x.device):
        x.record_stream(side_stream(x.device))


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for work beside the training.

    It has the priority of the training's own stream, for CUDA has none below that of the default one.
    """
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _STREAMS[device]


def is_capturing() -> bool:
    """Whether a user captures a CUDA graph, which must not contain what is done beside it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
