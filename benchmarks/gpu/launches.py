"""How often a step launches a kernel, copies and waits: without the penalty, with it, and logging."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.machine import brief, require_backend, using
from benchmarks.gpu.runner import NeedsCardError, Report
from benchmarks.shapes import MODELS, Shapes
from lightning_hsu import UniformityRegularizer

NAMES = ("ResNet-50", "GPT-2 small")
WARM_UP = 4  # steps, of which the regularizer looks closely at some


class Layers(nn.Module):
    """Linear layers of given shapes, with gradients as if from a task."""

    def __init__(self, shapes: Shapes, device: str) -> None:
        super().__init__()
        layers = [nn.Linear(d, n, bias=False, device=device) for n, d in shapes]
        self.layers = nn.ModuleList(layers)
        for p in self.parameters():
            p.grad = torch.randn_like(p)


class Operations(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def count(report: Report, backend: str) -> None:
    """One row for each model and kind of step."""
    settings = report.settings
    require_backend(backend, settings.device)
    if backend == "triton" and settings.device == "cpu":
        raise NeedsCardError("an interpreter launches nothing")
    names = NAMES[:1] if settings.quick else NAMES
    with using(backend):
        for name in names:
            shapes = MODELS[name]()
            if settings.quick:
                shapes = [(12, 5), (12, 5), (9, 4)]
            for kind, step in steps(shapes, settings.device).items():
                for _ in range(WARM_UP):
                    step()
                count_step(report, step, {"model": name, "back end": backend, "step": kind})
    if settings.device == "cpu":
        report.note(
            "kernels, copies and waits need a card; operations are those that torch dispatches"
        )


def steps(shapes: Shapes, device: str) -> dict[str, Callable[[], object]]:
    """An optimizer's step without the penalty, with it, and with what a logging step adds."""
    model = Layers(shapes, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, foreach=True)
    regularizer = UniformityRegularizer(head=None).attach(model)

    def plain() -> None:
        regularizer.add_gradients(optimizer)
        optimizer.step()

    def logging() -> None:
        regularizer.add_gradients(optimizer, stats=True)
        optimizer.step()
        regularizer.measure_layers()

    return {"no penalty": optimizer.step, "plain": plain, "logging": logging}


def count_step(report: Report, step: Callable[[], object], about: dict[str, object]) -> None:
    """Count what one step does."""
    values = dict(about)
    with Operations() as operations:
        step()
    values["operations"] = operations.count
    if report.settings.device == "cuda":
        values |= waits_of(step)
        values |= profile_of(step)
    report.row(**values)


def waits_of(step: Callable[[], object]) -> dict[str, object]:
    """How often torch says that the host waits; and whether a step runs where it must not."""
    before = torch.cuda.get_sync_debug_mode()
    found: dict[str, object] = {}
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step()
        found["blocking waits"] = sum("called a synchronizing" in str(one.message) for one in told)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            found["waits forbidden"] = "runs"
        except RuntimeError as error:
            found["waits forbidden"] = brief(error)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    return found


def profile_of(step: Callable[[], object]) -> dict[str, object]:
    """Kernels, copies, synchronisations, and the time in which the GPU is busy."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = 0
    copies = 0
    synchronisations = -1  # the one above
    microseconds = 0.0
    for event in profiler.events():
        on_gpu = event.device_type == DeviceType.CUDA
        if on_gpu and event.name.startswith(("Memcpy", "Memset")):
            copies += 1
        elif on_gpu:
            kernels += 1
            microseconds += event.time_range.elapsed_us()
        elif "Synchronize" in event.name:
            synchronisations += 1
    return {
        "kernels": kernels,
        "copies": copies,
        "synchronisations": synchronisations,
        "GPU ms": round(microseconds / 1000, 3),
    }
