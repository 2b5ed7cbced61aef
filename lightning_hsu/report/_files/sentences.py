"""Folders of sentence-transformers: the weights of all modules in one report."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lightning_hsu.report._files.found import Found
from lightning_hsu.report._files.naming import short
from lightning_hsu.report._files.regular import is_file, read_json

_MODULES = "modules.json"
_WRAPPED = {"Transformer": "auto_model.", "CLIPModel": "model.", "MLMTransformer": "auto_model."}


def is_sentence_folder(path: Path) -> bool:
    """Whether a folder is a model of sentence-transformers."""
    return is_file(path / _MODULES)


def read_sentence_folder(path: Path, read: Callable[[Path], Found]) -> Found:
    """The weights of every module, named as the state dict of the SentenceTransformer names them.

    The configuration is that of the first module that has one: the transformer.

    Args:
        path: The folder.
        read: Reads the folder of one module.

    Raises:
        ValueError: if a module is not a folder inside this one.
    """
    modules = read_json(path / _MODULES)
    if not isinstance(modules, list):
        raise ValueError(f"{path / _MODULES} is no list of modules: name a file of weights")
    found = Found()
    for module in modules:
        name, inside, kind = _read_module(path, module)
        folder = path / inside
        if inside and not folder.is_dir():
            raise ValueError(f"{path / _MODULES} names the folder {short(inside)}: it is not there")
        if inside and not _holds_weights(folder):
            continue
        part = read(folder)
        found.add(part, f"{name}.{_WRAPPED.get(kind, '')}")
        if found.config is None:
            found.config = part.config
    if not found.tensors:
        raise ValueError(f"{path} holds no weights in the modules that {_MODULES} names")
    return found


def _read_module(path: Path, module: object) -> tuple[str, str, str]:
    """The name, the folder and the kind of a module."""
    name, inside, kind = _text(module, "name"), _text(module, "path"), _text(module, "type")
    if inside is None or inside in (".", "..") or not re.fullmatch(r"[\w\-. ]*", inside):
        raise ValueError(
            f"{path / _MODULES} names a module {short(repr(module))} whose folder is not one "
            "inside this one: name a file of weights"
        )
    return name or "", inside, (kind or "").rpartition(".")[2]


def _text(module: object, key: str) -> str | None:
    """What a mapping says under a key if that is a text; else None."""
    if not isinstance(module, dict):
        return None
    text = module.get(key)
    return text if isinstance(text, str) else None


def _holds_weights(folder: Path) -> bool:
    """Whether the folder of a module has a file of weights; pooling, for example, has none."""
    for entry in folder.iterdir():
        is_index = ".index." in entry.name
        is_weights = is_index or entry.suffix in (".safetensors", ".bin", ".pt")
        if is_weights and is_file(entry):
            return True
    return False
