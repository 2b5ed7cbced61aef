"""Weights from files, without running what is in them."""

from __future__ import annotations

import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params", "ema")
_HEADS = ("head", "classifier", "fc", "lm_head", "score", "logits")  # modules that come last, whatever order a file has


def read_weights(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """Read the weights of a file by name.

    Args:
        path: Lightning's .ckpt, a state dict in .pt, .pth or .bin, .safetensors, TorchScript; a folder of .safetensors.
        key: Where in the file the state dict is, such as "ema"; None finds it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no weights that can be read without running code: before torch 2.6 also where it holds
            objects beside them (hyperparameters of other types than numbers and strings).
        ModuleNotFoundError: for .safetensors without that package.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.pt"
        >>> torch.save({"epoch": 3, "state_dict": {"fc.weight": torch.eye(4)}}, path)
        >>> list(read_weights(path))
        ['fc.weight']
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".safetensors":
        return _ordered(_safetensors(path))
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if _is_torchscript(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # files of this kind go on to exist
            module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            return dict(module.state_dict())
    if not (zipfile.is_zipfile(path) or tarfile.is_tarfile(path) or _begins(path, b"\x80")):
        raise ValueError(f"{path} is no file of weights: neither torch.save, torch.jit.save nor safetensors writes such files")
    return _state_dict(_loaded(path), path, key)


def _from_folder(path: Path) -> dict[str, Tensor]:
    files = sorted(path.glob("*.safetensors"))
    if files:
        return _ordered({name: x for file in files for name, x in _safetensors(file).items()})
    if (path / ".metadata").exists():
        raise ValueError(
            f"{path} is a sharded checkpoint: make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}`"
        )
    raise ValueError(f"{path} is a folder without .safetensors files: name the checkpoint in it")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('reading .safetensors needs that package: pip install "lightning-hsu[report]"') from error
    try:
        return load_file(path)
    except Exception as error:  # of a type of that package's own
        raise ValueError(f"{path} is no .safetensors file that can be read: {error}") from error


def _ordered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the order of a person: numbers by value, heads last; the file has them by the alphabet."""

    def place(name: str) -> tuple[bool, list[tuple[int, str]]]:
        parts = re.split(r"(\d+)", name)
        head = any(part in _HEADS for part in name.split(".")[:-1][:2])
        return head, [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def _begins(path: Path, with_: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(with_)) == with_


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _loaded(path: Path) -> Any:
    """What a pickle holds, tensors and plain values only: other objects are left empty, and no code of theirs is run."""
    for stand_in in (_Left, _LeftMapping):  # torch fills nothing but its own kinds of mappings
        try:
            with _others_empty(path, stand_in):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of many types: whatever a broken file makes torch's reader stumble over
            last = error
    raise ValueError(
        f"{path} cannot be read without running code from it, which is not done ({type(last).__name__}: {_reason(last)}). "
        "If you trust it, load it yourself and give the model or its state_dict() to lightning_hsu.report.report, or save "
        "that as .safetensors"
    ) from last


def _reason(error: Exception) -> str:
    """What torch says, without its advice."""
    text = re.split(r"WeightsUnpickler error:|from a trusted source\.", str(error))[-1]
    return re.sub(r"\s+", " ", text.partition("Check the documentation")[0])[:300].strip()


def _others_empty(path: Path, stand_in: type) -> AbstractContextManager[Any]:
    """While a file is read, stand-ins for the classes in it that are not torch's: hyperparameters, states of callbacks."""
    find = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)  # from torch 2.6 on
    if find is None or not zipfile.is_zipfile(path):
        return nullcontext()
    known = {"builtins.list": list, "builtins.dict": dict, "builtins.set": set, "builtins.tuple": tuple}
    return torch.serialization.safe_globals([(known.get(name, type("Left", (stand_in,), {})), name) for name in find(path)])


class _Left:
    """What stands for an object that is not looked at."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Left:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take anything."""

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""


class _LeftMapping:
    """What stands for one where some are mappings: torch's reader fills an OrderedDict, and gives it attributes."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def _state_dict(found: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    """The state dict in what a file holds."""
    if key is not None:
        inner = found.get(key) if isinstance(found, Mapping) else None
        if not isinstance(inner, Mapping) or not _holds_weights(inner):
            raise ValueError(f"{path} has no state dict under {key!r}; {_contents(found)}")
        return _tensors(inner)
    if _holds_weights(found):
        return _tensors(found)
    held = {name: one for name, one in found.items() if _holds_weights(one)} if isinstance(found, Mapping) else {}
    names = [name for name in _KEYS if name in held] or list(held)
    if not names or (len(names) > 1 and names[0] not in _KEYS):
        raise ValueError(f"{path} has {'several state dicts' if names else 'no state dict'}; {_contents(found)}")
    return _tensors(held[names[0]])


def _holds_weights(found: Any) -> bool:
    return isinstance(found, Mapping) and any(isinstance(x, Tensor) and x.ndim > 1 for x in found.values())


def _tensors(found: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(name): x for name, x in found.items() if isinstance(x, Tensor)}


def _contents(found: Any) -> str:
    if isinstance(found, _Left):
        return "it holds one object, such as a whole model: save its state_dict() instead"
    if not isinstance(found, Mapping):
        return f"it holds {type(found).__name__}"
    return f"it holds {', '.join(repr(name) for name in list(found)[:20])}; --key or key= names the one to read"
