"""Weights from files, without running what is in them."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_hsu.report.unpickle import Opaque, is_torchscript, read_pickle, read_torchscript

_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "ema",
)
_HEADS = (
    "head",
    "classifier",
    "fc",
    "lm_head",
    "score",
    "logits",
)  # modules that come last, whatever order a file has


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
        >>> import tempfile, torch
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
        return _printable(_ordered(_safetensors(path)))
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if is_torchscript(path):
        return _printable(read_torchscript(path))
    if not (zipfile.is_zipfile(path) or tarfile.is_tarfile(path) or _begins(path, b"\x80")):
        cut = _begins(path, b"PK")
        told = (
            "is cut short"
            if cut
            else "is no file of weights: neither torch.save, torch.jit.save nor safetensors writes such files"
        )
        raise ValueError(f"{path} {told}")
    return _printable(_state_dict(read_pickle(path), path, key))


def _from_folder(path: Path) -> dict[str, Tensor]:
    files = sorted(path.glob("*.safetensors"))
    if files:
        found: dict[str, Tensor] = {}
        for file in files:
            tensors = _safetensors(file)
            if twice := next((name for name in tensors if name in found), None):
                raise ValueError(
                    f"{path} holds more than one set of weights ({twice} is in {file.name}, too): name one file"
                )
            found |= tensors
        return _printable(_ordered(found))
    if (path / ".metadata").exists():
        raise ValueError(
            f"{path} is a sharded checkpoint: make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}` or, where Lightning did not write it, "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE`"
        )
    raise ValueError(f"{path} is a folder without .safetensors files: name the checkpoint in it")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'reading .safetensors needs that package: pip install "lightning-hsu[report]"'
        ) from error
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


def _printable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with names that do nothing to a terminal."""
    found = {printable(name): x for name, x in tensors.items()}
    if len(found) < len(tensors):
        raise ValueError("two names of weights differ only in control characters")
    return found


def printable(text: str) -> str:
    r"""A text with its control characters spelled out.

    Example:
        >>> print(printable("a" + chr(27) + "[2J"))
        a\x1b[2J
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _state_dict(found: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    """The state dict in what a file holds; a key may be a path with dots."""
    inside = _inside(found, depth=1)
    if _holds_weights(found) and not set(_KEYS) & set(
        inside
    ):  # else a matrix beside them, such as weights of classes
        held: Mapping[str, Any] = {"": found}
    else:
        held = inside or _inside(found, depth=4)
    if key is not None:
        inner = _at(found, key)
        if not _holds_weights(inner):
            raise ValueError(f"{path} has no state dict under {key!r}; {_contents(found, held)}")
        return _tensors(inner)
    names = [name for name in _KEYS if name in held] or list(held)
    if not names or (len(names) > 1 and names[0] not in _KEYS):
        raise ValueError(
            f"{path} has {'several state dicts' if names else 'no state dict'}; {_contents(found, held)}"
        )
    return _tensors(held[names[0]])


def _inside(found: Any, above: str = "", *, depth: int) -> dict[str, Any]:
    """The state dicts within mappings nested so deeply, by their path; an optimizer's state has numbers for names."""
    held: dict[str, Any] = {}
    for name, one in found.items() if isinstance(found, Mapping) and depth else ():
        if isinstance(name, str):
            held |= (
                {above + name: one}
                if _holds_weights(one)
                else _inside(one, f"{above}{name}.", depth=depth - 1)
            )
    return held


def _at(found: Any, key: str) -> Any:
    """What stands in nested mappings under a key, or a path of keys with dots; None where nothing does."""
    if not isinstance(found, Mapping) or key in found:
        return found.get(key) if isinstance(found, Mapping) else None
    first, _, rest = key.partition(".")
    return _at(found.get(first), rest) if rest else None


def _holds_weights(found: Any) -> bool:
    return isinstance(found, Mapping) and any(
        isinstance(x, Tensor) and x.ndim > 1 for x in found.values()
    )


def _tensors(found: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(name): x for name, x in found.items() if isinstance(x, Tensor)}


def _contents(found: Any, held: Mapping[str, Any]) -> str:
    if isinstance(found, Opaque):
        return "it holds one object, such as a whole model: save its state_dict() instead"
    if not isinstance(found, Mapping):
        return f"it holds {type(found).__name__}"
    names = ", ".join(repr(name) for name in list(held or found)[:20])
    return f"it holds {names or 'nothing'}" + (
        "; --key or key= names the one to read" if held else ""
    )
