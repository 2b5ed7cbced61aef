"""Streams that are only thought of: they tell what reads a tensor before it is written."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_hsu._engine import late


class Stream:
    """A stream: how much of itself and of others comes before what is queued next."""

    def __init__(self, name):
        self.name = name
        self.seen = {self: 0}

    def wait_event(self, event):
        for stream, moment in event.seen.items():
            self.seen[stream] = max(self.seen.get(stream, 0), moment)

    def wait_stream(self, other):
        self.wait_event(other)


class Event:
    """A moment of a stream."""

    def record(self, stream):
        self.seen = dict(stream.seen)


class Memory:
    """What is known of a tensor's memory."""

    def __init__(self, stream):
        self.streams = {stream}  # that its memory is kept for
        self.written = stream, 0
        self.read = {}  # the last moment on each stream


class Queues(TorchDispatchMode):
    """Notes what each call reads and writes, and complains of what no event puts in order."""

    def __init__(self):
        super().__init__()
        self.main = self.current = Stream("main")
        self.side = Stream("side")
        self.complaints = []
        self._memory = {}
        self._kept = []  # else memory that is freed would be taken for other memory
        self.side_calls = 0

    def of(self, tensor):
        self._kept.append(tensor)
        key = tensor.untyped_storage()._cdata
        return self._memory.setdefault(key, Memory(self.current))

    def here_before(self, stream, moment):
        return self.current.seen.get(stream, -1) >= moment

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        given = [one for one in given if one.is_cuda]
        known = [self.of(one) for one in given]
        changed = set()
        for argument, value in [
            *zip(func._schema.arguments, args, strict=False),
            *((one, kwargs[one.name]) for one in func._schema.arguments if one.name in kwargs),
        ]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed |= {id(one) for one in tree_leaves(value)}
        if func.overloadpacket.__name__ == "_pin_memory":  # which tensors that only pretend lack
            return args[0].clone()
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        self.current.seen[self.current] += 1
        moment = self.current.seen[self.current]
        self.side_calls += self.current is self.side
        for tensor, memory in zip(given, known, strict=True):
            name = f"{func.overloadpacket.__name__} of {tuple(tensor.shape)} on {self.current.name}"
            if not self.here_before(*memory.written):
                self.complaints.append(f"{name}: read before it is written")
            if self.current not in memory.streams:
                self.complaints.append(f"{name}: memory may be given away")
            if id(tensor) in changed:
                if not all(self.here_before(*one) for one in memory.read.items()):
                    self.complaints.append(f"{name}: overwritten before it is read")
                memory.written = self.current, moment
            memory.read[self.current] = moment
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda and id(tensor) not in changed:
                self.of(tensor).written = self.current, moment
        return result


@contextmanager
def pretended_streams():
    """Within the block a device that tensors pretend to be on has streams; gives the queues."""
    queues = Queues()

    @contextmanager
    def on(stream):
        before, queues.current = queues.current, stream
        yield
        queues.current = before

    changes = {
        "is_available": lambda: True,
        "current_stream": lambda device=None: queues.current,
        "is_current_stream_capturing": lambda: False,
        "stream": on,
        "Event": Event,
        "Stream": lambda *args, **kwargs: queues.side,
    }
    with ExitStack() as stack:
        for name in ("init_cuda_context", "init_gpu_context"):  # by the version of torch
            nothing = mock.patch.object(fake_tensor, name, return_value=None, create=True)
            stack.enter_context(nothing)
        for name, value in changes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.dict(late._STREAMS, clear=True))
        stack.enter_context(
            mock.patch.object(
                torch.Tensor,
                "record_stream",
                lambda tensor, stream: queues.of(tensor).streams.add(stream),
            )
        )
        with queues:
            yield queues
