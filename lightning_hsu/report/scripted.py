"""The weights of a TorchScript file, read from its pickle; torch's own loader would run code that lies beside it."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether torch takes a file for TorchScript."""
    try:
        return (
            "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
        )  # as torch.load asks
    except RuntimeError:
        return False


def scripted_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors that the modules in a TorchScript file hold, by name; nothing in it is run.

    Raises:
        ValueError: if it cannot be read so.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = _Reader(archive).load()
        return dict(_tensors(found))
    except (
        Exception
    ) as error:  # of many types: whatever a broken file makes the reader stumble over
        raise ValueError(f"{path} is no TorchScript that can be read: {error}") from error


def _tensors(found: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of an object and, recursively, of the objects it has as attributes."""
    if isinstance(found, Tensor):
        yield name, found
    elif isinstance(found, _Object):
        for key, part in found.attributes.items():
            yield from _tensors(part, f"{name}.{key}".lstrip("."))


class _Object:
    """What stands for an object of any class; it keeps its attributes."""

    attributes: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *args: Any) -> None:
        """Take anything."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = {str(key): part for key, part in state.items()}


class _Reader(pickle.Unpickler):
    """An unpickler that knows tensors, plain values, and stand-ins for all else."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        (name,) = (
            name
            for name in archive.namelist()
            if name.endswith("/data.pkl") and name.count("/") == 1
        )
        super().__init__(archive.open(name))
        self._archive, self._folder, self._read = (
            archive,
            name.removesuffix(".pkl"),
            dict[str, Tensor](),
        )

    def find_class(self, module: str, name: str) -> Any:
        """Never what is asked for but tensors and ordered dicts."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _strided
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return _DTYPES.get(name, _Object) if module == "torch" else _Object

    def persistent_load(self, pid: Any) -> Tensor:
        """The numbers of a storage, a tensor (count,)."""
        _, dtype, key, _, count = pid
        if key not in self._read:
            self._read[key] = torch.empty(0, dtype=dtype)
            if count:
                raw = bytearray(self._archive.read(f"{self._folder}/{key}"))
                self._read[key] = torch.frombuffer(raw, dtype=dtype, count=count)
        return self._read[key]


def _strided(
    numbers: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return numbers.as_strided(size, stride, offset)
