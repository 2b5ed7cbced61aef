"""What would make the host wait if tensors were on a GPU, counted with real ones on a CPU.

Tensors that only pretend to be on a GPU have no values and no backward pass. Here those that a test puts there
count as being there, with all that is computed from them.
"""

import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.launches import WITHOUT_KERNEL
from lightning_hsu._core import foreach, pairwise, raw
from lightning_hsu._core.pairwise import too_steep
from lightning_hsu._engine import kept, late, moves

ANSWERS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero", "masked_select"}
# These look at the device and ask on a CPU alone.
ON_A_CPU = {"row_lengths", "_sum_of_units", "project"}
INDEXING = {"index", "index_put", "index_put_"}


def tensors_in(values):
    return [part for part in tree_leaves(values) if isinstance(part, torch.Tensor)]


class Waits(TorchDispatchMode):
    """Counts waits by the lines of the library that ask.

    Attributes:
        found: How often each has asked.
        launches: Calls that would start kernels, on any tensors, as benchmarks/launches.py counts them.
        step: The number of the step in which waits are counted: what is begun in one is there in the next, for the
            task's forward and backward pass lies between.
    """

    def __init__(self):
        super().__init__()
        self.step = 0
        self.there = WeakIdKeyDictionary()
        self.found = Counter()
        self.launches = 0

    def put_there(self, *some):
        for x in some:
            self.there[x] = True

    def put_model_there(self, model):
        """Its parameters, and their gradients."""
        for p in model.parameters():
            self.put_there(p)
            if p.grad is not None:
                self.put_there(p.grad)

    def is_there(self, x):
        return x in self.there

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        on_gpu = [x for x in given if self.is_there(x)]
        name = func.overloadpacket.__name__
        if on_gpu and (name in ANSWERS or (name in INDEXING and self._has_mask(args[1]))):
            self.note(name)
        result = func(*args, **kwargs)
        self.launches += not (func.is_view or name in WITHOUT_KERNEL)
        if on_gpu:
            self.put_there(*tensors_in(result))
            if name.endswith("_") or "out" in kwargs:
                self.put_there(*given)
        return result

    @staticmethod
    def _has_mask(places):
        return any(place.dtype == torch.bool for place in tensors_in(places))

    def note(self, name):
        lines = []
        for frame in traceback.extract_stack():
            if "lightning_hsu/" in frame.filename:
                place = frame.filename.rsplit("lightning_hsu/", 1)[1]
                lines.append(f"{place}:{frame.lineno} {frame.name}")
        if lines and lines[-1].rsplit(" ")[-1] in ON_A_CPU:
            return
        self.found[f"{name} in {' < '.join(reversed(lines[-4:]))}"] += 1


class _Lists(TorchFunctionMode):
    """Sees ``tolist``, ``numpy`` and ``cpu``, which no dispatch mode sees on a CPU."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "cpu") and self.waits.is_there(args[0]):
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits_of():
    """Within the block the library takes its ways for a GPU, and waits are counted."""
    waits = Waits()

    def copied(self, numbers):
        self._numbers = _to_host(numbers)
        self._event = waits.step

    def read(self):
        if self._event == waits.step:
            waits.note("read too early")
        self._event = None  # the next reading finds it there
        return self._numbers.tolist()

    with ExitStack() as stack:
        for module in (raw, foreach, pairwise):
            patch = mock.patch.object(module, "avoids_sync", lambda one, term: not too_steep(term))
            stack.enter_context(patch)
        for module in (kept, moves):
            stack.enter_context(mock.patch.object(module, "reads_late", return_value=True))
        stack.enter_context(mock.patch.object(late.LateNumbers, "__init__", copied))
        stack.enter_context(mock.patch.object(late.LateNumbers, "read", read))
        yield waits


@contextmanager
def counting(waits, step):
    """Within the block, which is a part of this step, they are counted."""
    waits.step = step
    waits.found.clear()
    waits.launches = 0
    with _Lists(waits), waits:
        yield


def _to_host(numbers):
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        return numbers.detach().clone()
