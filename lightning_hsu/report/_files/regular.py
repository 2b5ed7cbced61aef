"""Which files may be opened: regular ones, of formats that hold weights for torch."""

from __future__ import annotations

import json
import stat
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_hsu.report._files.naming import listed, short

_LARGEST_JSON = 128 * 2**20  # bytes
_WAY_OUT = (
    "load it with its own library and pass the arrays as tensors by name to "
    "lightning_hsu.report.report, or save them as .safetensors"
)
_FORMATS = {  # by the end of the file's name
    ".npz": "NumPy arrays",
    ".npy": "a NumPy array",
    ".h5": "HDF5, as Keras writes it",
    ".hdf5": "HDF5",
    ".keras": "a Keras model",
    ".onnx": "an ONNX graph",
    ".gguf": "GGUF, the format of llama.cpp",
    ".ggml": "GGML, the format of llama.cpp",
    ".msgpack": "Flax weights",
    ".tflite": "a TensorFlow Lite model",
    ".ot": "weights for rust-bert",
    ".pb": "a TensorFlow graph",
    ".pdparams": "PaddlePaddle weights",
    ".mlmodel": "a Core ML model",
    ".index": "an index of a TensorFlow checkpoint",
    ".engine": "a TensorRT engine",
}
_OF_ORBAX = {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "ocdbt.process_0"}
_BEGINNINGS = {  # by the file's first bytes
    b"\x93NUMPY": ".npy",
    b"\x89HDF\r\n\x1a\n": ".h5",
    b"GGUF": ".gguf",
}
_COMPRESSED = {  # by the file's first bytes
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
}
_OF_TORCH = {"data.pkl", "constants.pkl", "pickle"}  # in its zip files, and in tar files of old
_KINDS = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_exists(path: Path) -> bool:
    """Whether a path, or what a link leads to, is a folder and not a file.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if it is neither a folder nor a regular file: opening a pipe, for example,
            would wait for a writer.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if path.is_symlink():
            raise FileNotFoundError(f"{path} is a link that leads to no file") from error
        if isinstance(error, PermissionError):
            raise
        raise FileNotFoundError(f"no such file: {short(str(path))}") from error
    if stat.S_ISDIR(mode):
        return True
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise ValueError(f"{path} is {kind}, not a file of weights: name a regular file")
    return False


def check_file(path: Path) -> None:
    """Refuse, before it is opened, what is not a regular file with something in it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no regular file, or empty.
    """
    if check_exists(path):
        raise ValueError(f"{path} is a folder, not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")


def is_file(path: Path) -> bool:
    """Whether a path, or what a link leads to, is a regular file."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def check_format(path: Path) -> None:
    """Refuse, without reading it, a file of a format that torch does not read.

    Raises:
        ValueError: with what the file is and how to come to its weights.
    """
    with path.open("rb") as file:
        start = file.read(8)
    suffix = path.suffix.lower()
    for beginning, its_suffix in _BEGINNINGS.items():
        if start.startswith(beginning):
            suffix = its_suffix
    if start[4:8] == b"TFL3":
        suffix = ".tflite"
    if ".data-0" in path.name and start[:2] not in (b"PK", b"\x80\x02"):
        suffix = ".index"
    if suffix not in _FORMATS or start.startswith(b"\x80") or _is_of_torch(path, start):
        return
    raise ValueError(f"{path} holds {_FORMATS[suffix]}, which is not read here: {_WAY_OUT}")


def check_is_no_archive(path: Path) -> None:
    """Refuse a compressed file, and an archive of files that is none of torch's own.

    Raises:
        ValueError: with what the file is and what is in it.
    """
    with path.open("rb") as file:
        start = file.read(8)
    for beginning, kind in _COMPRESSED.items():
        if start.startswith(beginning):
            raise ValueError(f"{path} is compressed by {kind}: unpack it and name what is in it")
    try:
        names = _names_in_archive(path)
    except (OSError, ValueError, NotImplementedError, tarfile.TarError, zipfile.BadZipFile):
        return
    if not names or any(PurePosixPath(name).name in _OF_TORCH for name in names):
        return
    some = listed(names, most=3)
    raise ValueError(f"{path} is an archive of files ({some}): unpack it and name one of them")


def _names_in_archive(path: Path) -> list[str]:
    """The names of the files in a zip or tar archive; none if a file is neither."""
    if tarfile.is_tarfile(path):  # it may end with a zip file
        with tarfile.open(path, "r:") as members:
            return [member.name for member in members if member.isfile()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return [name for name in archive.namelist() if not name.endswith("/")]
    return []


def _is_of_torch(path: Path, start: bytes) -> bool:
    """Whether a file is a zip file as torch.save and torch.jit.save write it."""
    if not start.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    return True
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        pass
    return False


def other_folder(path: Path, names: set[str]) -> str | None:
    """What a folder of another library's format is; None if it is none that is known.

    Args:
        path: The folder.
        names: Names of what is in it.
    """
    if "saved_model.pb" in names:
        return f"{path} is a TensorFlow SavedModel, which is not read here: {_WAY_OUT}"
    if not _OF_ORBAX.isdisjoint(names):
        return f"{path} is an Orbax checkpoint, which is not read here: {_WAY_OUT}"
    for name in names:
        if name.endswith(".index") and f"{name[: -len('.index')]}.data-00000-of-00001" in names:
            return f"{path} holds a TensorFlow checkpoint, which is not read here: {_WAY_OUT}"
    for name in sorted(names):
        suffix = Path(name).suffix.lower()
        if suffix in _FORMATS:
            return f"{path} holds {name}, {_FORMATS[suffix]}, which is not read here: {_WAY_OUT}"
    return None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: if it is not JSON, larger than 128 MiB, or nested too deep.
    """
    check_file(path)
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path} is too large for a JSON file of this kind")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file that can be read") from error


def read_config(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file that may be there; None without one.

    Raises:
        ValueError: if it is there, and is not JSON that can be read.
    """
    if not is_file(path):
        return None
    found = read_json(path)
    if not isinstance(found, dict):
        return None
    return found
