"""Who computes: plain torch, or compiled kernels where they are asked for and can."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from lightning_hsu._core.precision import products_are_lowered

VARIABLE = "LIGHTNING_HSU_BACKEND"
BACKENDS = ("torch", "cudagraph", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def compiled(w: Tensor) -> bool:
    """Whether kernels of Triton are asked for and take such a tensor.

    Args:
        w: Neurons. Those in float64 or on another device than the kernels' go through torch all the same.

    Raises:
        ValueError: if the environment variable LIGHTNING_HSU_BACKEND names no backend.
        RuntimeError: if it is "triton", and this machine has no Triton or nothing to run it on.
    """
    if _chosen() != "triton":
        return False
    _check_machine()
    return (
        w.dtype in DTYPES and w.device.type == ("cpu" if interpreted() else "cuda") and _capable(w)
    )


def replays() -> bool:
    """Whether what torch computes on a GPU is to be replayed as one CUDA graph: weights have to stay where they are."""
    return _chosen() == "cudagraph"


def _chosen() -> str:
    backend = os.environ.get(VARIABLE, "torch")
    if backend not in BACKENDS:
        raise ValueError(
            f"the environment variable {VARIABLE} must be one of {', '.join(BACKENDS)}; got {backend!r}"
        )
    if backend == "cudagraph" and not torch.cuda.is_available():
        raise RuntimeError(f"{VARIABLE} is 'cudagraph', but torch sees no CUDA device; unset it")
    return backend


def precision() -> str:
    """How compiled kernels take products: as three in TF32, as good as float32, or where lower ones are allowed as one."""
    return "tf32" if products_are_lowered() and not interpreted() else exact_precision()


def exact_precision() -> str:
    """The way that is as good as float32."""
    return "ieee" if interpreted() else "tf32x3"


def _check_machine() -> None:
    if not _new_enough():
        raise RuntimeError(
            f"{VARIABLE} is 'triton', which is missing or older than 3.2; pip install 'lightning-hsu[triton]', or unset it"
        )
    if not interpreted() and not torch.cuda.is_available():
        raise RuntimeError(f"{VARIABLE} is 'triton', but torch sees no CUDA device; unset it")


@lru_cache(maxsize=1)
def _new_enough() -> bool:
    """Whether a Triton is installed that the kernels are written for."""
    try:
        return tuple(int(part) for part in version("triton").split(".")[:2]) >= (3, 2)
    except PackageNotFoundError:
        return False


def _capable(w: Tensor) -> bool:
    if w.device.type == "cuda" and (found := torch.cuda.get_device_capability(w.device)) < (8, 0):
        raise RuntimeError(
            f"{VARIABLE} is 'triton', whose kernels need compute capability 8.0; {w.device} has {found}; unset it"
        )
    return True
