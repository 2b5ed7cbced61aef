"""One arithmetic whatever surrounds the call: autocast off, full fp32 products, float32 or wider."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 and float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_float64(x: Tensor) -> Tensor:
    """Return x where float64 exists: on Apple's MPS it does not, and sums and near pairs go to the CPU."""
    return x.cpu() if x.device.type == "mps" else x


@contextmanager
def exact_arithmetic(like: Tensor) -> Iterator[None]:
    """Switch off autocast and reduced-precision fp32 products on the device of ``like``.

    The precision of products is a setting of the whole process, so it is put back on the way out.
    """
    before = _lowered()
    for backend in before:
        _set(backend, "ieee")
    try:
        with torch.autocast(like.device.type, enabled=False):
            yield
    finally:
        for backend, value in before.items():
            _set(backend, value)


_LOWERED = ContextVar("lowered", default=False)


@contextmanager
def lowered_products(on: bool) -> Iterator[None]:
    """Let the gradients of pair energies multiply in bfloat16, if ``on``."""
    before = _LOWERED.set(on)
    try:
        yield
    finally:
        _LOWERED.reset(before)


def products_are_lowered() -> bool:
    """Whether the gradients of pair energies may multiply in bfloat16 here."""
    return _LOWERED.get()


# Since torch 2.9 each backend has a setting; asking the older, common one then raises where a user mixes the two.
_BACKENDS = ("cuda", "mkldnn") if hasattr(torch.backends.cuda.matmul, "fp32_precision") else ()


def _lowered() -> dict[str, str]:
    """Settings other than full precision, by backend; the older torch has one for all, under the name ""."""
    if not _BACKENDS:
        common = torch.get_float32_matmul_precision()
        return {} if common == "highest" else {"": common}
    found = {name: getattr(torch.backends, name).matmul.fp32_precision for name in _BACKENDS}
    common = getattr(torch.backends, "fp32_precision", "none")
    full = (
        {"ieee", "none"} if common in ("ieee", "none") else {"ieee"}
    )  # "none" follows the common one
    return {name: value for name, value in found.items() if value not in full}


def _set(backend: str, value: str) -> None:
    if backend:
        matmul = getattr(torch.backends, backend).matmul
        matmul.fp32_precision = "none"  # follow the common setting again where that is what it did
        if matmul.fp32_precision != value:
            matmul.fp32_precision = value
    else:
        torch.set_float32_matmul_precision("highest" if value == "ieee" else value)
