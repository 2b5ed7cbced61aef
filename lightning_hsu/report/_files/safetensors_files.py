"""Reads .safetensors: the header at once, large tensors only when they are needed.

The numbers are read into memory of their own, not mapped: what is mapped stays in a program's
resident memory after use, and 14 GB of weights would take 14 GB.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hsu.report._files.found import ALWAYS_READ, Found, size_in_bytes
from lightning_hsu.report._files.naming import check_name, short

_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_AXES = 64
_DTYPES = {  # by the format's name for them
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",  # two numbers a byte: the last axis has half the format's length
}


class _Entry(NamedTuple):
    """A tensor of a header; dtype None is one that this torch does not have."""

    name: str
    dtype: torch.dtype | None
    its_dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def is_safetensors(path: Path) -> bool:
    """Whether a file without that ending begins like one; those of the hub's cache have no ending."""
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) < 9 or start[8:] != b"{":
        return False
    return int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def read_safetensors(path: Path, keep_in_file: bool) -> Found:
    """The tensors of a file.

    Args:
        path: A regular file.
        keep_in_file: Whether tensors of more than 1 MiB stay in the file until they are needed.

    Raises:
        ValueError: if its header does not describe a file of its length.
    """
    try:
        entries, start = _read_header(path)
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise ValueError(f"{path} is not a .safetensors file that can be read: {error}") from error
    found = Found()
    for entry in entries:
        check_name(path, entry.name)
        if entry.dtype is None:
            found.notes.append(
                (short(entry.name), f"left out: torch has no dtype {entry.its_dtype}")
            )
            continue
        load = _loader(path, entry, start)
        if keep_in_file and entry.end - entry.begin > ALWAYS_READ:
            found.tensors[entry.name] = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            found.loaders[entry.name] = load
        else:
            found.tensors[entry.name] = load()
    return found


def _loader(path: Path, entry: _Entry, start: int) -> Callable[[], Tensor]:
    """A function that reads one tensor."""
    assert entry.dtype is not None
    return partial(
        _read_tensor, path, entry.dtype, entry.shape, start + entry.begin, entry.end - entry.begin
    )


def _read_tensor(
    path: Path, dtype: torch.dtype, shape: tuple[int, ...], position: int, length: int
) -> Tensor:
    """The tensor whose numbers are ``length`` bytes from a position on."""
    if length == 0:
        return torch.empty(shape, dtype=dtype)
    numbers = bytearray(length)
    with path.open("rb", buffering=0) as file:
        file.seek(position)
        view = memoryview(numbers)
        while view:
            count = file.readinto(view)
            if not count:
                raise ValueError(f"{path} has become shorter while it was read")
            view = view[count:]
    x = torch.frombuffer(numbers, dtype=torch.uint8)
    if sys.byteorder == "big":
        x.untyped_storage().byteswap(dtype)  # type: ignore[no-untyped-call]
    return x.view(dtype).view(shape)


def _read_header(path: Path) -> tuple[list[_Entry], int]:
    """The tensors of a header in the order of the file, and where the numbers start."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise ValueError("it is too short")
        (length,) = struct.unpack("<Q", first)
        if length > _LARGEST_HEADER or length > size - 8:
            raise ValueError(f"its header says that it has {length:,} bytes, the file has {size:,}")
        text = file.read(length)
    header = json.loads(text, object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    entries = []
    for name, about in header.items():
        if name != "__metadata__":
            entries.append(_entry(name, about))
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise ValueError(f"the numbers of {short(entry.name)} do not follow those before it")
        end = entry.end
    if end != size - 8 - length:
        raise ValueError(
            f"its tensors take {end:,} bytes and it holds {size - 8 - length:,}: it is cut short "
            "or damaged"
        )
    return entries, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header has a name twice")
    return found


def _entry(name: str, about: Any) -> _Entry:
    """One tensor of a header, with its numbers checked."""
    its_dtype = str(about["dtype"])
    shape = tuple(about["shape"])
    begin, end = about["data_offsets"]
    for number in (*shape, begin, end):
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"{short(name)} has a size or a place that is no length")
    if len(shape) > _MAX_AXES:
        raise ValueError(f"{short(name)} has {len(shape)} axes")
    if begin > end:
        raise ValueError(f"{short(name)} ends before it begins")
    dtype = getattr(torch, _DTYPES.get(its_dtype, ""), None)
    if dtype is None:
        return _Entry(name, None, short(its_dtype), shape, begin, end)
    if its_dtype == "F4":
        if not shape or shape[-1] % 2:
            raise ValueError(f"{short(name)} has an odd number of 4-bit numbers in a row")
        shape = (*shape[:-1], shape[-1] // 2)
    if size_in_bytes(shape, dtype) != end - begin:
        raise ValueError(
            f"{short(name)} {shape} of {its_dtype} takes {size_in_bytes(shape, dtype):,} bytes, "
            f"and the header gives it {end - begin:,}"
        )
    return _Entry(name, dtype, its_dtype, shape, begin, end)
