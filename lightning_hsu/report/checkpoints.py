"""Reads weights from files without running code in them."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_hsu._neurons.packed import with_quantised_linears
from lightning_hsu.report.unpickle import Opaque, is_torchscript, read_pickle, read_torchscript

_KEYS = (  # where a file may have its state dict, in the order of the search
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
_HEADS = (  # modules that come last, whatever the order in the file
    "head",
    "classifier",
    "fc",
    "lm_head",
    "score",
    "logits",
)


def read_weights(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """Read the weights of a file by name.

    Args:
        path: Lightning's .ckpt, a state dict in .pt, .pth or .bin, .safetensors, TorchScript; or a
            folder of .safetensors.
        key: Where in the file the state dict is, such as "ema"; None finds it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no weights that can be read without running code. Before torch 2.6
            this includes files with other objects beside the weights (hyperparameters that are not
            numbers or strings).
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
        return _printable(_in_order(_read_folder(path)))
    if path.suffix == ".safetensors":
        return _printable(_in_order(_read_safetensors(path)))
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if is_torchscript(path):
        return _printable(read_torchscript(path))
    _check_is_pickle(path)
    return _printable(_state_dict(read_pickle(path), path, key))


def _check_is_pickle(path: Path) -> None:
    """Refuse a file that torch.save cannot have written."""
    with path.open("rb") as file:
        start = file.read(2)
    if zipfile.is_zipfile(path) or tarfile.is_tarfile(path) or start.startswith(b"\x80"):
        return
    if start == b"PK":  # a zip file without the directory at its end
        raise ValueError(f"{path} is cut short")
    raise ValueError(
        f"{path} is not a file of weights: it is not from torch.save, torch.jit.save or safetensors"
    )


def _read_folder(path: Path) -> dict[str, Tensor]:
    """The weights of all .safetensors files in a folder."""
    files = sorted(path.glob("*.safetensors"))
    if not files and (path / ".metadata").exists():
        raise ValueError(
            f"{path} is a sharded checkpoint: make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}` or, if it is "
            f"not from Lightning, "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE`"
        )
    if not files:
        raise ValueError(
            f"{path} is a folder without .safetensors files: name the checkpoint in it"
        )
    found: dict[str, Tensor] = {}
    for file in files:
        for name, x in _read_safetensors(file).items():
            if name in found:
                raise ValueError(
                    f"{path} holds more than one set of weights ({name} is also in {file.name}): "
                    "name one file"
                )
            found[name] = x
    return found


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading .safetensors needs the package safetensors: "
            'pip install "lightning-hsu[report]"'
        ) from error
    try:
        return load_file(path)
    except Exception as error:  # of that package's own types
        raise ValueError(f"{path} is not a .safetensors file that can be read: {error}") from error


def _in_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sort numbers by value and heads last; a .safetensors file is in alphabetical order."""
    return {name: tensors[name] for name in sorted(tensors, key=_position)}


def _position(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """The sorting key of a name: whether it is in a head, then its texts and numbers in turn."""
    outer_modules = name.split(".")[:-1][:2]
    in_head = not set(_HEADS).isdisjoint(outer_modules)
    parts = []
    for part in re.split(r"(\d+)", name):
        if part.isdigit():
            parts.append((int(part), ""))
        else:
            parts.append((-1, part))
    return in_head, parts


def _printable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that are safe to print in a terminal."""
    found = {}
    for name, x in tensors.items():
        shown = printable(name)
        if shown in found:
            raise ValueError(f"two names of weights differ only in control characters: {shown}")
        found[shown] = x
    return found


def printable(text: str) -> str:
    r"""A text with its control characters spelled out.

    Example:
        >>> print(printable("a" + chr(27) + "[2J"))
        a\x1b[2J
    """
    characters = []
    for character in text:
        if not character.isprintable():
            character = ascii(character)[1:-1]
        characters.append(character)
    return "".join(characters)


def _state_dict(found: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    """The state dict in what a file holds; a key may be a path with dots."""
    held = _state_dicts(found)
    if key is not None:
        inner = _at(found, key)
        if not _is_state_dict(inner):
            raise ValueError(f"{path} has no state dict under {key!r}; {_contents(found, held)}")
        return _tensors(inner)
    for name in _KEYS:
        if name in held:
            return _tensors(held[name])
    if len(held) > 1:
        raise ValueError(f"{path} has several state dicts; {_contents(found, held)}")
    for state in held.values():
        return _tensors(state)
    raise ValueError(f"{path} has no state dict; {_contents(found, held)}")


def _state_dicts(found: Any) -> dict[str, Any]:
    """The state dicts in what a file holds, by their path; "" stands for all that it holds."""
    inside = _inside(found, depth=1)
    # A matrix beside a state dict with one of the usual names is something else, such as the
    # weights of classes.
    if _is_state_dict(found) and set(_KEYS).isdisjoint(inside):
        return {"": found}
    if inside:
        return inside
    return _inside(found, depth=4)


def _inside(found: Any, above: str = "", *, depth: int) -> dict[str, Any]:
    """The state dicts within mappings, nested at most ``depth`` deep, by their path.

    Names that are not strings are passed over: an optimizer's state has numbers for names.
    """
    held: dict[str, Any] = {}
    if depth == 0 or not isinstance(found, Mapping):
        return held
    for name, one in found.items():
        if not isinstance(name, str):
            continue
        if _is_state_dict(one):
            held[above + name] = one
        else:
            held |= _inside(one, f"{above}{name}.", depth=depth - 1)
    return held


def _at(found: Any, key: str) -> Any:
    """What nested mappings hold under a key or a dotted path of keys; None if nothing."""
    if not isinstance(found, Mapping):
        return None
    if key in found:
        return found[key]
    first, _, rest = key.partition(".")
    if not rest:
        return None
    return _at(found.get(first), rest)


def _is_state_dict(found: Any) -> bool:
    """Whether something maps names to tensors, at least one of them with two dimensions."""
    if not isinstance(found, Mapping):
        return False
    return any(isinstance(x, Tensor) and x.ndim > 1 for x in found.values())


def _tensors(found: Mapping[str, Any]) -> dict[str, Tensor]:
    entries = with_quantised_linears(found).items()
    return {str(name): x for name, x in entries if isinstance(x, Tensor)}


def _contents(found: Any, held: Mapping[str, Any]) -> str:
    """What a file holds, for an error message."""
    if isinstance(found, Opaque):
        return "it holds one object, such as a whole model: save its state_dict() instead"
    if not isinstance(found, Mapping):
        return f"it holds {type(found).__name__}"
    if held:
        names = ", ".join(map(repr, list(held)[:20]))
        return f"it holds {names}; choose one with --key or key="
    names = ", ".join(map(repr, list(found)[:20]))
    return f"it holds {names or 'nothing'}"
