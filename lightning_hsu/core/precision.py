"""One arithmetic whatever surrounds the call: autocast off, full fp32 products, float32 or wider."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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

    ``torch.set_float32_matmul_precision`` is process-global, so it is put back on the way out.
    """
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(like.device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
