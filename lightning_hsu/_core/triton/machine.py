"""What the compiled kernels require of a machine, checked without importing Triton."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from lightning_hsu._core.backend import VARIABLE
from lightning_hsu._core.precision import bf16_allowed

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Dtypes of neurons that the kernels read, with Triton's names for them."""

_VERSION = (3, 2)
"""The oldest Triton that the kernels support."""

_CAPABILITY = (8, 0)
"""The lowest compute capability that the kernels support, that of the A100."""


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def precision() -> str:
    """How kernels multiply: as precisely as float32, or in TF32 if that is allowed."""
    if bf16_allowed() and not interpreted():
        return "tf32"
    return exact_precision()


def exact_precision() -> str:
    """How kernels multiply as precisely as float32: in three TF32 products."""
    return "ieee" if interpreted() else "tf32x3"


def check_machine() -> None:
    """Raise a RuntimeError if there is no Triton, or nothing to run it on."""
    if not new_enough():
        raise RuntimeError(
            f"{VARIABLE} is 'triton', which is missing or older than 3.2; "
            "pip install 'lightning-hsu[triton]', or unset it"
        )
    if not interpreted() and not torch.cuda.is_available():
        raise RuntimeError(f"{VARIABLE} is 'triton', but torch sees no CUDA device; unset it")


def takes(x: Tensor) -> bool:
    """Whether the kernels take a tensor of this dtype and on this device.

    Raises:
        RuntimeError: if the GPU is too old.
    """
    if x.dtype not in DTYPES:
        return False
    if interpreted():
        return x.device.type == "cpu"
    if x.device.type != "cuda":
        return False
    _check_capability(x.device)
    return True


@lru_cache
def new_enough() -> bool:
    """Whether a Triton is installed that the kernels support."""
    try:
        parts = version("triton").split(".")
    except PackageNotFoundError:
        return False
    return (int(parts[0]), int(parts[1])) >= _VERSION


@lru_cache
def _check_capability(device: torch.device) -> None:
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        raise RuntimeError(
            f"{VARIABLE} is 'triton', whose kernels need compute capability 8.0; "
            f"{device} has {found}; unset it"
        )
