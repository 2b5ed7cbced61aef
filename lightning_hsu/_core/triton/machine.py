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

_NAMES = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows")
"""Distributions of Triton: released, beside a nightly torch, for ROCm, and for Windows."""

_VERSION = (3, 2)
"""The oldest Triton that the kernels support."""

_CAPABILITY = (8, 0)
"""The lowest compute capability that the kernels support, that of the A100."""


@lru_cache
def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors; Triton asks once, on import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_rocm() -> bool:
    """Whether torch calls AMD's GPUs "cuda"."""
    return torch.version.hip is not None


def precision() -> str:
    """How kernels multiply: as precisely as float32, or in TF32 if that is allowed."""
    exact = exact_precision()
    if exact == "tf32x3" and bf16_allowed():
        return "tf32"
    return exact


def exact_precision() -> str:
    """How kernels multiply as precisely as float32: in three TF32 products where there are any."""
    if interpreted() or is_rocm():
        return "ieee"
    return "tf32x3"


def check_machine() -> None:
    """Raise a RuntimeError if there is no Triton, or nothing to run it on."""
    if not new_enough():
        raise RuntimeError(
            f"{VARIABLE} is 'triton', which is missing or older than 3.2; "
            "pip install 'lightning-hsu[triton]', or unset it"
        )
    reason = _why_not()
    if reason:
        raise RuntimeError(f"{VARIABLE} is 'triton', but {reason}; unset it")


def takes(x: Tensor) -> bool:
    """Whether the kernels take a tensor of this dtype and on this device."""
    return x.dtype in DTYPES and runs_on(x.device)


@lru_cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device; layers on another one go through torch."""
    if interpreted():
        return device.type == "cpu"
    if device.type != "cuda":
        return False
    return is_rocm() or torch.cuda.get_device_capability(device) >= _CAPABILITY


@lru_cache
def new_enough() -> bool:
    """Whether a Triton is installed that the kernels support."""
    for name in _NAMES:
        try:
            parts = version(name).split(".")
        except PackageNotFoundError:
            continue
        if (int(parts[0]), int(parts[1])) >= _VERSION:
            return True
    return False


@lru_cache
def _why_not() -> str:
    """Why the kernels can run on none of this machine's devices; empty if they can."""
    if interpreted():
        return ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if any(map(runs_on, devices)):
        return ""
    found = torch.cuda.get_device_capability()
    return (
        f"its kernels need compute capability 8.0, and {torch.cuda.get_device_name()} has {found}"
    )
