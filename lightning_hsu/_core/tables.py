"""Tables of numbers that go to a device in one copy, and may be read on any of its streams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 8
"""Tables begin at multiples of this many bytes: those of their widest entries."""


class Tables:
    """Tensors on a device, copied from the host together, without waiting for the device.

    The copy is queued on the stream that is current when this is made, which may be one for work
    beside the training. Whoever reads the tensors calls :meth:`read_here` first.

    Args:
        tensors: The tensors, on the host.
        device: Where they go.

    Attributes:
        tensors: The tensors on the device.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._memory: Tensor | None = None
        self._made: torch.cuda.Event | None = None
        self.tensors = list(tensors)
        if device.type == "cpu":
            return
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        streams = has_streams(device)
        # From pinned memory: else the host would wait for what the stream has still to do.
        host = torch.empty(size, dtype=torch.uint8, pin_memory=streams)
        for place, tensor in zip(_places(host, starts, tensors), tensors, strict=True):
            place.copy_(tensor)
        self._memory = host.to(device, non_blocking=True)
        self.tensors = _places(self._memory, starts, tensors)
        if streams and not torch.cuda.is_current_stream_capturing():
            self._stream = torch.cuda.current_stream(device)
            self._made = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._made.record(self._stream)

    @property
    def nbytes(self) -> int:
        """Their memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def read_here(self) -> None:
        """Let the current stream wait for the copy, and keep the memory until it has read it."""
        if self._made is None or self._memory is None:
            return
        stream = torch.cuda.current_stream(self._memory.device)
        # A graph is captured after all that came before it.
        if stream != self._stream and not torch.cuda.is_current_stream_capturing():
            stream.wait_event(self._made)
            self._memory.record_stream(stream)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device has still to do."""
    if has_streams(device):
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def has_streams(device: torch.device) -> bool:
    """Whether a device has streams; those that tensors only pretend to be on have none."""
    return device.type == "cuda" and torch.cuda.is_available()


def _places(memory: Tensor, starts: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a tensor of bytes that hold tensors like these."""
    places = []
    for start, tensor in zip(starts, tensors, strict=True):
        own = memory.narrow(0, start, tensor.nbytes).view(tensor.dtype)
        places.append(own.view(tensor.shape))
    return places
