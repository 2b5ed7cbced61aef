"""What is in a pickle of torch.save or torch.jit.save, without running any code from it."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_hsu.report._files.found import check_expanded

_BUILTINS: dict[str, type] = {
    "builtins.list": list,
    "builtins.dict": dict,
    "builtins.set": set,
    "builtins.tuple": tuple,
}
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
_MAPPED_ABOVE = 256 * 2**20  # bytes of a file
_SMALL, _MOST_COMPRESSED = 64 * 2**20, 8  # bytes that any file may ask for; times a file's size
_MOST_OBJECTS, _DEEPEST = 1_000_000, 100  # of a TorchScript file
_CANNOT_FILL = re.compile(r"but got <class '[\w.]*\b(Opaque\d+)'>")  # torch's error


def read_pickle(path: Path) -> Any:
    """Read a file of torch.save: tensors and plain values only; all other objects stay empty.

    No code of those objects is run. The numbers of a zip file of more than 256 MiB are mapped, so
    that those which are not used, such as an optimizer's, take no memory.

    Raises:
        ValueError: if the file cannot be read that way.
    """
    check_archive(path)
    mapped = path.stat().st_size > _MAPPED_ABOVE and _is_stored(path)
    # torch's reader fills only its own lists and mappings. Its error names a class that it cannot
    # fill. The stand-in for this class then becomes a list or a mapping, and the reader starts
    # again.
    bases: dict[str, type] = {}
    while True:
        try:
            with _stand_ins(path, bases), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of how the file was written, not of its numbers
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # of any type that a broken file can cause in torch's reader
            message = str(error)
            found = _CANNOT_FILL.search(message)
            if found is None or found[1] in bases:
                raise ValueError(
                    f"{path} cannot be read without running code from it, so it is refused "
                    f"({type(error).__name__}: {_reason(message)}). If you trust the file, load "
                    "it yourself and pass the model or its state_dict() to "
                    "lightning_hsu.report.report, or save that as .safetensors"
                ) from error
            expects_list = "list" in message.partition("but got")[0]
            bases[found[1]] = _OpaqueList if expects_list else _OpaqueMapping


def is_zip(path: Path) -> bool:
    """Whether a file is a zip file whose directory can be found."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # such as one of several parts
        return False


def check_archive(path: Path) -> None:
    """Refuse a zip file that would take far more memory than it has bytes.

    torch compresses the code in a file but no numbers, and no two entries share their bytes.

    Raises:
        ValueError: if its entries take more than 64 MiB and eight times the file's size.
    """
    if not is_zip(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            asked = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # of any type that a broken file can cause
        raise ValueError(f"{path} is a zip file that cannot be read: {error}") from error
    size = path.stat().st_size
    if asked > max(_SMALL, _MOST_COMPRESSED * size):
        raise ValueError(
            f"{path} of {size:,} bytes asks for {asked:,}: it is no file that torch wrote; load it "
            "yourself and save its state_dict() with torch.save"
        )


def _is_stored(path: Path) -> bool:
    """Whether a file is a zip file whose entries of numbers are not compressed."""
    if not is_zip(path):
        return False
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename and entry.compress_type != zipfile.ZIP_STORED:
                return False
    return True


def _reason(message: str) -> str:
    """The reason in torch's error, without its advice."""
    text = re.split(r"WeightsUnpickler error:|from a trusted source\.", message)[-1]
    text = text.partition("Check the documentation")[0]
    return re.sub(r"\s+", " ", text)[:300].strip()


def _stand_ins(path: Path, bases: Mapping[str, type]) -> AbstractContextManager[Any]:
    """A context with stand-ins for the classes in a file that torch does not know.

    Such classes are those of hyperparameters or states of callbacks, for example.

    Args:
        path: The file.
        bases: Base classes of the stand-ins whose base is not :class:`Opaque`, by the name of the
            stand-in: Opaque<n> for the n-th unknown class.
    """
    find = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)  # torch >= 2.6
    if find is None or not is_zip(path):
        return nullcontext()
    classes: list[Any] = []  # pairs of a stand-in and the name that it stands for
    for i, unknown in enumerate(sorted(find(path))):
        stand_in = _BUILTINS.get(unknown)
        if stand_in is None:
            name = f"Opaque{i}"
            stand_in = type(name, (bases.get(name, Opaque),), {})
        classes.append((stand_in, unknown))
    return torch.serialization.safe_globals(classes)


class Opaque:
    """Stands for an object that is not read."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        """Take any arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take any arguments."""

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""


class _OpaqueMapping:
    """Stands for a mapping: torch's reader fills an OrderedDict, and gives it attributes."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


class _OpaqueList:
    """Stands for an object that is filled like a list."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return []


def is_torchscript(path: Path) -> bool:
    """Whether torch takes a file for TorchScript, by the same test as torch.load."""
    try:
        return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError:
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """All tensors that the modules in a TorchScript file hold, by name.

    They are read from its pickle, since torch's own loader would run code stored in the file.

    Raises:
        ValueError: if the file cannot be read that way.
    """
    check_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            module = _TorchScriptReader(archive).load()
        return _Tensors().of(module)
    except Exception as error:  # of any type that a broken file can cause in the reader
        raise ValueError(f"{path} is not a TorchScript file that can be read: {error}") from error


class _Tensors:
    """Collects the tensors of an object and, recursively, of the objects in its attributes.

    A file of a few bytes can refer to one object from many places, and from itself.
    """

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}
        self._seen = 0

    def of(self, module: Any) -> dict[str, Tensor]:
        """The tensors by name."""
        self._collect(module, "", 0)
        return self._found

    def _collect(self, found: Any, name: str, depth: int) -> None:
        self._seen += 1
        if self._seen > _MOST_OBJECTS or depth > _DEEPEST:
            raise ValueError("its objects hold each other more often than those of any model")
        if isinstance(found, Tensor):
            self._found[name] = found
        elif isinstance(found, _Attributes):
            for key, part in found.attributes.items():
                self._collect(part, f"{name}.{key}".lstrip("."), depth + 1)


class _Attributes:
    """Stands for an object of any class and keeps its attributes."""

    attributes: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *args: Any) -> None:
        """Take any arguments."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = {key: part for key, part in state.items() if isinstance(key, str)}


class _TorchScriptReader(pickle._Unpickler):
    """An unpickler that knows tensors, plain values, and stand-ins for everything else.

    It is Python's own in Python: the one in C takes gigabytes if a pickle numbers its objects from
    a large number on.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        name = _pickle_name(archive)
        super().__init__(archive.open(name))
        self._archive = archive
        self._folder = name.removesuffix(".pkl")
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Tensors, storages and ordered dicts; a stand-in for any other class."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _strided
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return _Attributes

    def persistent_load(self, pid: Any) -> Tensor:
        """The numbers of a storage, a tensor (count,)."""
        _, dtype, key, _, count = pid
        if key not in self._storages:
            self._storages[key] = self._storage(key, dtype, count)
        return self._storages[key]

    def _storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        if count == 0:
            return torch.empty(0, dtype=dtype)
        raw = bytearray(self._archive.read(f"{self._folder}/{key}"))
        return torch.frombuffer(raw, dtype=dtype, count=count)


def _pickle_name(archive: zipfile.ZipFile) -> str:
    """The one file that holds the objects, such as "model/data.pkl"."""
    names = []
    for name in archive.namelist():
        if name.endswith("/data.pkl") and name.count("/") == 1:
            names.append(name)
    if len(names) != 1:
        raise ValueError(f"it has {len(names)} files FOLDER/data.pkl instead of one")
    return names[0]


def _strided(
    numbers: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    check_expanded("a tensor", tuple(size), numbers.dtype, numbers.untyped_storage().nbytes())
    return numbers.as_strided(size, stride, offset)
