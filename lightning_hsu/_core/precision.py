"""The same arithmetic in any surroundings: no autocast, full float32 products."""

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
    """Return x on a device that has float64: the CPU instead of Apple's MPS."""
    return x.cpu() if x.device.type == "mps" else x


@contextmanager
def gradient_arithmetic(like: Tensor) -> Iterator[None]:
    """The same as :func:`exact_arithmetic`, but with TF32 products on a GPU that may be rounded."""
    with exact_arithmetic(like):
        if not (like.is_cuda and bf16_allowed()):
            yield
            return
        setting, fast = ("cuda", "tf32") if _BACKENDS else ("", "high")
        before = _precision(setting)
        _set_precision(setting, fast)
        try:
            yield
        finally:
            _set_precision(setting, before)


@contextmanager
def exact_arithmetic(like: Tensor) -> Iterator[None]:
    """Switch off autocast and reduced-precision float32 products on the device of ``like``.

    The precision of products is a setting of the whole process, so it is restored on the way out.
    """
    reduced = _reduced_settings()
    for backend in reduced:
        _set_precision(backend, "ieee")
    device = like.device.type
    try:
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                yield
        else:
            yield
    finally:
        for backend, value in reduced.items():
            _set_precision(backend, value)


_BF16_ALLOWED = ContextVar("bf16_allowed", default=False)


@contextmanager
def bf16_products(on: bool) -> Iterator[None]:
    """If ``on``, let the gradients of pair energies multiply in bfloat16 within the block."""
    before = _BF16_ALLOWED.set(on)
    try:
        yield
    finally:
        _BF16_ALLOWED.reset(before)


def bf16_allowed() -> bool:
    """Whether the gradients of pair energies may multiply in bfloat16 here."""
    return _BF16_ALLOWED.get()


# Since torch 2.9 each backend has its own setting. Once a user has set one of these, reading the
# older, common setting raises an error.
_BACKENDS: tuple[str, ...] = ()
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    _BACKENDS = ("cuda", "mkldnn")


def _reduced_settings() -> dict[str, str]:
    """Settings below full precision, by backend; before torch 2.9 a common one, named ""."""
    if not _BACKENDS:
        setting = torch.get_float32_matmul_precision()
        if setting == "highest":
            return {}
        return {"": setting}
    reduced = {}
    for backend in _BACKENDS:
        setting = in_effect = getattr(torch.backends, backend).matmul.fp32_precision
        if setting == "none":  # follows the common setting
            in_effect = getattr(torch.backends, "fp32_precision", "none")
        if in_effect not in ("ieee", "none"):
            reduced[backend] = setting
    return reduced


def _precision(backend: str) -> str:
    if not backend:
        return torch.get_float32_matmul_precision()
    found: str = getattr(torch.backends, backend).matmul.fp32_precision
    return found


def _set_precision(backend: str, value: str) -> None:
    if not backend:
        torch.set_float32_matmul_precision("highest" if value == "ieee" else value)
        return
    matmul = getattr(torch.backends, backend).matmul
    matmul.fp32_precision = "none"  # so that it follows the common setting again if it did before
    if matmul.fp32_precision != value:
        matmul.fp32_precision = value
