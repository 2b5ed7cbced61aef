"""What a step asks of a GPU, counted without one: kernel launches, waits, arithmetic and traffic.

Tensors only pretend to be on a CUDA device (torch's FakeTensorMode): they have shapes and no data.
Each call of torch that would start a kernel counts as one launch, also where it is a few of them,
as in a sort or in a ``_foreach_`` call over many tensors. Views and empty tensors count nothing.
What makes the host wait for the device, or copies from ordinary memory, counts as a wait.

The table holds launches and waits of steps of the default back end for whole models: a plain and a
logging step without a tolerance, and with one the same two where no layer is due, of which the first
is the costliest of 36 in a row, counted from one optimizer step to the next; all with SGD, and this
first one also with AdamW, which makes a limit of rows depend on the task's gradient. Traffic is what elementwise
operations and reductions read and write, without matrix products; it is also given per entry of the
layers' n x n Gram matrices.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.outcomes import Outcomes, tensors_in
from benchmarks.shapes import LARGE, MODELS, Shapes
from lightning_hsu import UniformityRegularizer
from lightning_hsu._core import layouts
from lightning_hsu._core.group_numbers import GatheredNumbers, GroupStats, at_right_angles
from lightning_hsu._core.kernel import softened_at
from lightning_hsu._core.pairwise import too_steep
from lightning_hsu._engine.buffered import LateStats
from lightning_hsu._engine.late import LateNumbers
from lightning_hsu._engine.reuse import Reuse
from lightning_hsu._neurons import quantised
from lightning_hsu.measures import Measure
from lightning_hsu.measures.defaults import DEFAULT_MEASURE, REPORT_MEASURE

SHAPES = {name: MODELS[name] for name in ("ResNet-50", "GPT-2 small", "ViT-B/16")} | LARGE

WITHOUT_KERNEL = frozenset(
    {
        "_unsafe_view",
        "_reshape_alias",
        "as_strided",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "is_same_size",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "sym_numel",
        "sym_size",
    }
)
_ANSWERS = frozenset({"_local_scalar_dense", "equal", "is_nonzero", "item"})
_WAITS = frozenset({"masked_select", "nonzero"})
_COPIES = frozenset({"_to_copy", "copy_", "_foreach_copy_"})
_PRODUCTS = frozenset({"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"})
OUTCOMES = Outcomes()


@dataclass
class Asked:
    """What was asked of the device.

    Attributes:
        launches: Calls that start kernels.
        waits: Calls that make the host wait.
        flop: Floating-point operations of matrix products in float32 or narrower.
        traffic: Bytes that all other calls read and write.
        calls: How often each operation was called.
    """

    launches: int = 0
    waits: int = 0
    flop: float = 0.0
    traffic: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)


class Counting(TorchDispatchMode):
    """Counts what is asked of CUDA devices, and answers what the host waits for with a one."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = Asked()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Count one call."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].device
        name = func.overloadpacket.__name__
        given = tensors_in((args, kwargs.values()))
        if name in _ANSWERS and given[0].is_cuda:
            self.asked.waits += 1
            self.asked.calls[name] += 1
            if given[0].dtype == torch.bool or name in ("equal", "is_nonzero"):
                return True
            return 1.0 if given[0].is_floating_point() else 1
        result = OUTCOMES.of(func, args, kwargs, given)
        if func.namespace != "aten" or name in WITHOUT_KERNEL or func.is_view:
            return result
        made = tensors_in(result)
        touched = [*given, *made]
        if not any(part.is_cuda for part in touched):
            return result
        self.asked.launches += 1
        self.asked.calls[name] += 1
        self.asked.waits += self._waits(name, touched, args, kwargs)
        if name in _PRODUCTS:
            left = given[1] if name.startswith(("addmm", "baddbmm")) else given[0]
            if left.dtype != torch.float64:
                self.asked.flop += 2.0 * prod(made[0].shape) * left.shape[-1]
        else:
            written = {id(part) for part in given}
            self.asked.traffic += sum(map(_bytes, given))
            self.asked.traffic += sum(_bytes(part) for part in made if id(part) not in written)
            if name.endswith("_"):
                self.asked.traffic += sum(map(_bytes, made)) or _bytes(given[0])
        return result

    @staticmethod
    def _waits(name: str, touched: Sequence[Tensor], args: Sequence[Any], kwargs: Any) -> int:
        """1 if the call makes the host wait, else 0."""
        if name in _WAITS:
            return 1
        if name in ("index", "index_put", "index_put_"):
            return int(any(part.dtype == torch.bool for part in tensors_in(args[1])))
        if name in _COPIES and len({part.device.type for part in touched}) > 1:
            is_asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
            return int(not is_asynchronous)
        return 0


def _bytes(x: Tensor) -> int:
    """The memory that a tensor's entries take; what is repeated by a stride of 0 counts once."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or size < 2]
    return int(prod(sizes)) * x.element_size()


class _Indexing(TorchFunctionMode):
    """Takes parts of tensors by calls, since ``x[...]`` itself asks for a real device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, or take the part."""
        if func is Tensor.__getitem__ and args[0].is_cuda:
            return _part(*args)
        if func is Tensor.__setitem__ and args[0].is_cuda:
            x, places, value = args
            if isinstance(places, Tensor):
                places = (places,)
            if any(isinstance(place, Tensor) for place in places):
                value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
                return x.index_put_(tuple(places), value)
            part = _part(x, places)
            if not isinstance(value, Tensor):
                return part.fill_(value)
            func, args, kwargs = Tensor.copy_, (part, value), {}
        if func is Tensor.copy_:
            with torch._C._AutoDispatchBelowAutograd():
                return torch.ops.aten.copy_.default(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _tolist(x: Tensor) -> Any:
    """What ``x.tolist()`` is if all entries are alike, for one question to the device."""
    found = x.flatten().narrow(0, 0, 1).squeeze(0).item()
    for size in reversed(x.shape):
        found = [found] * size
    return found


def _part(x: Tensor, places: Any) -> Tensor:
    """What ``x[places]`` is."""
    places = places if isinstance(places, tuple) else (places,)
    if Ellipsis in [place for place in places if not isinstance(place, Tensor)]:
        at = next(i for i, place in enumerate(places) if place is Ellipsis)
        named = sum(place is not None for place in places) - 1
        places = (*places[:at], *[slice(None)] * (x.ndim - named), *places[at + 1 :])
    axis = 0
    tensors: list[Tensor | None] = []
    for place in places:
        if place is None:
            x = x.unsqueeze(axis)
        elif isinstance(place, int):
            x = x.select(axis, place)
            continue
        elif isinstance(place, slice):
            start, stop, step = place.indices(x.shape[axis])
            if (start, stop, step) != (0, x.shape[axis], 1):
                x = torch.ops.aten.slice.Tensor(x, axis, start, stop, step)
        else:
            tensors += [None] * (axis - len(tensors)) + [place]
        axis += 1
    if not tensors:
        return x
    return torch.ops.aten.index.Tensor(x, tensors)


@contextmanager
def pretending() -> Iterator[None]:
    """Within the block tensors have no data, on any device, and may be the weights of a model.

    What was kept for other tensors is forgotten.
    """
    layouts.layout_of.cache_clear()
    as_numbers = mock.patch.object(quantised, "_is_wrapper", return_value=False)
    as_list = mock.patch.object(FakeTensor, "tolist", _tolist)
    # A graph would need a real device.
    with as_list, as_numbers, FakeTensorMode(), _Indexing(), torch.no_grad():
        yield
    layouts.layout_of.cache_clear()
    OUTCOMES.clear()


def count(act: Callable[[], object]) -> Asked:
    """What one call asks of the device."""
    with Counting() as counting:
        act()
    return counting.asked


class Layers(nn.Module):
    """Linear layers of given shapes on a CUDA device, with gradients, the last of them the head."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, with_head: bool) -> None:
        super().__init__()
        parts = [linear(n, d, dtype) for n, d in shapes]
        if with_head:
            self.head = parts.pop()
        self.layers = nn.ModuleList(parts)


def linear(n: int, d: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer whose weight is on a CUDA device and has a gradient."""
    layer = nn.Linear(d, n, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(n, d, device="cuda", dtype=dtype))
    layer.weight.grad = torch.empty_like(layer.weight)
    return layer


def plain_step(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Asked:
    """What a plain step of a regularizer asks for, the third of an optimizer.

    Args:
        name: The model.
        dtype: Of its weights.
        settings: Of the regularizer.
    """
    head = "head" if name in ("ResNet-50", "ViT-B/16") else None
    settings = {"coefficient": 1e-3, "head": head} | settings
    regularizer = UniformityRegularizer(**settings)
    for measure in (regularizer.measure, regularizer.measure.for_head()):
        look_at(measure)
    with pretending():
        model = Layers(SHAPES[name](), dtype, with_head=head is not None)
        regularizer.attach(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):  # the first steps are looked at
            with Counting():
                regularizer.add_gradients(optimizer)
        return count(lambda: regularizer.add_gradients(optimizer))


class Told(LateNumbers):
    """What a device would have told of weights that hardly move."""

    def __init__(self, numbers: Tensor) -> None:
        count = numbers.numel()
        self.values = [0.0] * count  # changes
        caller = sys._getframe(1)
        if caller.f_globals["__name__"].endswith(".lessons"):
            # Errors, steepest and longest rows, norms of samples.
            own = len(caller.f_locals["members"])
            self.values = [1e-9] * (count - own) + [1.0] * own

    def read(self) -> list[float]:
        """The numbers."""
        return self.values


def _told_of_groups(numbers: GatheredNumbers, values: Sequence[float]) -> list[GroupStats]:
    """What a device would have told of layers with one live neuron: nothing is reckoned of these."""
    return [GroupStats(1.0, 0.0, 1, 1, True)] * numbers.counts.shape[1]


@contextmanager
def told() -> Iterator[None]:
    """Within the block what is copied to the host without waiting is :class:`Told`."""
    for measure in (DEFAULT_MEASURE, DEFAULT_MEASURE.for_head(), REPORT_MEASURE):
        look_at(measure)
    with ExitStack() as stack:
        for user in ("ahead", "buffered", "lessons", "moves"):
            stack.enter_context(mock.patch(f"lightning_hsu._engine.{user}.LateNumbers", Told))
        stack.enter_context(mock.patch.object(GatheredNumbers, "of_groups", _told_of_groups))
        yield


class Steps:
    """Steps of a regularizer that computes ahead, as it does on a GPU.

    Use it within :func:`told` and :func:`pretending`.

    Args:
        name: The model.
        adaptive: Whether the optimizer is AdamW, or else SGD.
        settings: Of the regularizer.
    """

    def __init__(self, name: str, *, adaptive: bool = False, **settings: Any) -> None:
        head = "head" if name in ("ResNet-50", "ViT-B/16") else None
        settings = {"coefficient": 1e-3, "head": head} | settings
        self.regularizer = UniformityRegularizer(**settings)
        model = Layers(SHAPES[name](), torch.float32, with_head=head is not None)
        self.regularizer.attach(model)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if adaptive:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(self, *, logs: bool = False) -> list[Asked]:
        """What is asked before the optimizer's step, after it, and for a log."""
        self.regularizer.measures_next = logs
        asked = [count(lambda: self._add(stats=logs))]
        asked.append(count(lambda: self.regularizer.look_ahead(self.optimizer)))
        if logs:
            asked.append(count(self.regularizer.measure_layers))
        return asked

    def _add(self, *, stats: bool) -> None:
        """Add the gradients; have what is told of them copied to the host, as the callback does."""
        told = self.regularizer.add_gradients(self.optimizer, stats=stats)
        if told:
            LateStats(told)


def steps_ahead(name: str, **settings: Any) -> tuple[list[Asked], list[Asked], list[Asked]]:
    """What a plain step asks for, a logging step, and with a tolerance one at which nothing is due."""
    with told(), pretending():
        exact = Steps(name, **settings)
        exact.step()  # the first one is looked at
        plain = exact.step()
        exact.step(logs=True)  # learns what is kept from then on
        logging = exact.step(logs=True)
    return plain, logging, quiet_step(name, **settings)


def quiet_step(name: str, *, adaptive: bool = False, **settings: Any) -> list[Asked]:
    """What a step with a tolerance asks for at most, if nothing is due.

    Args:
        name: The model.
        adaptive: Whether the optimizer is AdamW, or else SGD.
        settings: Of the regularizer.
    """
    with told(), pretending():
        return _costliest_quiet_step(Steps(name, adaptive=adaptive, tolerance=0.05, **settings))


def _costliest_quiet_step(kept: Steps) -> list[Asked]:
    """What steps ask for at which nothing is due, with the look at the weights before them, at most.

    A head is computed once more halfway, so that its gradient is younger than the others.
    """
    quiet: list[Asked] = []
    deltas = kept.regularizer.state.deltas
    heads = [layer for layer in kept.regularizer.layers if layer.target.head]
    for _ in range(3):  # what is told of a gradient is known at the third step
        before = kept.step()
    with mock.patch.object(Reuse, "learn", _lasts):
        for number in range(36):
            if number == 18:
                deltas.drop(heads)
            added, looked = kept.step()
            asked = [before[1], added]
            before = [added, looked]
            if not deltas.computed and _cost_of(asked) > _cost_of(quiet):
                quiet = asked
    return quiet


def _cost_of(asked: Sequence[Asked]) -> tuple[int, int]:
    """Waits and launches of all parts of a step: the former count for more."""
    return waits_of(asked), launches_of(asked)


def _lasts(reuse: Reuse, *_: Any) -> None:
    """Learn that a gradient lasts very long."""
    reuse.interval = 1000


def quiet_logging_step(name: str, **settings: Any) -> list[Asked]:
    """What a logging step asks for with a tolerance, if nothing is due then and at the next one.

    The costliest of those that pull, look or project by the way.
    """
    quiet: list[Asked] = []
    with told(), pretending():
        kept = Steps(name, tolerance=0.05, **settings)
        for _ in range(3):
            kept.step()
        with mock.patch.object(Reuse, "learn", _lasts):
            for number in range(20):
                logs = number > 2 and number % 2 == 1
                asked = kept.step(logs=logs)
                is_quiet = logs and not kept.regularizer.state.deltas.computed
                if is_quiet and _cost_of(asked) > _cost_of(quiet):
                    quiet = asked
    return quiet


def launches_of(asked: Sequence[Asked]) -> int:
    """Launches of all parts of a step."""
    return sum(one.launches for one in asked)


def waits_of(asked: Sequence[Asked]) -> int:
    """Waits in all parts of a step."""
    return sum(one.waits for one in asked)


def look_at(measure: Measure) -> None:
    """Learn of a kernel what is kept, which takes numbers."""
    term = measure.pair_term()
    if term is not None:
        too_steep(term)
        softened_at(term, 4.0)
        at_right_angles(term)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", action="store_true", help="also list what was called how often")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="also plain steps of the back end 'compiled'; it takes torch 2.13",
    )
    arguments = parser.parse_args()
    print(
        f"{'model':12s} {'plain':>6s} {'waits':>6s} {'logging':>8s} {'waits':>6s} {'none due':>9s} "
        f"{'waits':>6s} {'AdamW':>6s} {'and logging':>12s} {'GFLOP':>8s} {'elementwise GB':>15s} {'bytes per Gram entry':>21s}"
    )
    for name in SHAPES:
        asked = plain_step(name)
        plain, logging, quiet = steps_ahead(name)
        adaptive = quiet_step(name, adaptive=True)
        quiet_logging = quiet_logging_step(name)
        entries = sum(n * n for n, _ in SHAPES[name]())
        print(
            f"{name:12s} {launches_of(plain):6d} {waits_of(plain):6d} {launches_of(logging):8d} "
            f"{waits_of(logging):6d} {launches_of(quiet):9d} {waits_of(quiet):6d} "
            f"{launches_of(adaptive):6d} {launches_of(quiet_logging):12d} "
            f"{asked.flop / 1e9:8.0f} {asked.traffic / 1e9:15.1f} {asked.traffic / entries:21.0f}"
        )
        if arguments.calls:
            for call, times in asked.calls.most_common():
                print(f"    {times:6d} {call}")
        if arguments.compiled:
            from benchmarks.epilogue import plain_compiled_step

            asked = plain_compiled_step(name)
            print(
                f"  compiled   {asked.launches:6d} {asked.waits:6d} {'':60s}"
                f"{asked.flop / 1e9:8.0f} {asked.traffic / 1e9:15.1f} {asked.traffic / entries:21.0f}"
            )


if __name__ == "__main__":
    main()
