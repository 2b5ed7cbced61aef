"""The card, the driver and the versions; and what is the same for all parts."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from benchmarks.gpu.runner import NO_FORK, LacksError, NeedsCardError, Report
from benchmarks.timing import machine as processor

LIBRARIES = ("triton", "lightning", "torchmetrics", "torchvision", "transformers", "numpy")
VARIABLE = "LIGHTNING_HSU_BACKEND"


def describe(report: Report) -> None:
    """What everything else ran on."""
    if report.settings.device == "cuda":
        start_cuda()
        properties = torch.cuda.get_device_properties(0)
        report.row(what="card", value=properties.name)
        report.row(what="compute capability", value=f"{properties.major}.{properties.minor}")
        report.row(what="memory, GiB", value=round(properties.total_memory / 2**30, 1))
        report.row(what="multiprocessors", value=properties.multi_processor_count)
        report.row(what="driver, clocks", value=driver())
    report.row(what="processor", value=processor())
    report.row(what="CUDA of torch", value=torch.version.cuda or torch.version.hip)
    report.row(what="system", value=platform.platform())
    for name in LIBRARIES:
        report.row(what=name, value=version_of(name))


def start_cuda() -> None:
    """Use the card; raise an error that says whether there is none, or what CUDA says."""
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        if any(text in str(error) for text in NO_FORK) or torch.cuda.is_available():
            raise
        raise NeedsCardError("torch sees no CUDA device here") from error


def driver() -> str:
    """The driver's version and the clocks, as nvidia-smi tells them."""
    wanted = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown: nvidia-smi does not answer"
    return done.stdout.strip().partition("\n")[0]


def version_of(name: str) -> str:
    """The version of an installed library, also if it comes under another name."""
    if not find_spec(name):
        return "not installed"
    for distribution in (name, f"pytorch-{name}", f"pytorch-{name}-rocm"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def require(*names: str) -> None:
    """Raise an error that says which of some libraries are not installed."""
    missing = [name for name in names if not find_spec(name)]
    if missing:
        raise LacksError(f"{' and '.join(missing)} not installed")


def require_backend(name: str, device: str) -> None:
    """Raise an error that says what a back end lacks on this device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise NeedsCardError("torch sees no CUDA device here")
    if name == "cudagraph" and device == "cpu":
        raise NeedsCardError("a CUDA graph is captured on one")
    if name == "triton":
        require("triton")


def suit_interpreter() -> None:
    """Let Triton's interpreter, which is slow by the program, run fewer and larger ones."""
    if find_spec("triton"):
        from lightning_hsu._core.triton import launch

        launch.ROWS = 32
        launch.COLS = 64
        launch.CHUNK = 64


def backends(device: str) -> list[str]:
    """The back ends that this machine can try on a device."""
    found = []
    for name in ("torch", "compiled", "cudagraph", "triton"):
        try:
            require_backend(name, device)
        except (LacksError, NeedsCardError):
            continue
        found.append(name)
    return found


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Let a back end compute within the block."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def synchronize(device: str) -> None:
    """Wait until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(act: Callable[[], object], device: str) -> float:
    """The wall time of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    act()
    synchronize(device)
    return 1000.0 * (time.perf_counter() - start)


def brief(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
