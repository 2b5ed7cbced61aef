"""Folders of sentence-transformers: the weights of all modules in one report."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lightning_hsu.report._files.found import Found
from lightning_hsu.report._files.naming import short
from lightning_hsu.report._files.regular import is_file, read_json

_MODULES = "modules.json"
_PACKAGE = "sentence_transformers."
_WITHOUT_WEIGHTS = ("Dropout", "Normalize", "Pooling", "SpladePooling", "WKPooling")
"""Classes of sentence-transformers, in whatever module of it, that have nothing to learn."""


def is_sentence_folder(path: Path) -> bool:
    """Whether a folder is a model of sentence-transformers."""
    return is_file(path / _MODULES)


def read_sentence_folder(path: Path, read: Callable[[Path], Found]) -> Found:
    """The weights of every module, under the module's name, such as ``0.encoder.layer.0``.

    Modules without weights, such as ``Normalize``, need no folder: not every copy of a model has it.

    A SentenceTransformer names them so too, but that the transformer is an attribute of its module,
    ``0.auto_model`` or, in later releases, ``0.model``, which the folder does not tell. The
    configuration is that of the first module that has one: the transformer.

    Args:
        path: The folder.
        read: Reads the folder of one module.

    Raises:
        ValueError: if a module is not a folder inside this one, or that of its weights is missing.
    """
    modules = read_json(path / _MODULES)
    if not isinstance(modules, list):
        raise ValueError(f"{path / _MODULES} is no list of modules: name a file of weights")
    found = Found()
    for module in modules:
        name, inside = _read_module(path, module)
        if _has_no_weights(module):
            continue
        folder = path / inside
        if inside and not folder.is_dir():
            raise ValueError(f"{path / _MODULES} names the folder {short(inside)}: it is not there")
        if inside and not _holds_weights(folder):
            continue
        part = read(folder)
        found.add(part, f"{name}.")
        if found.config is None:
            found.config = part.config
    if not found.tensors:
        raise ValueError(f"{path} holds no weights in the modules that {_MODULES} names")
    return found


def _read_module(path: Path, module: object) -> tuple[str, str]:
    """The name and the folder of a module."""
    name, inside = _text(module, "name"), _text(module, "path")
    if name is None or inside is None or not _is_inside(inside):
        raise ValueError(
            f"{path / _MODULES} names a module {short(repr(module))} whose folder is not one "
            "inside this one: name a file of weights"
        )
    return name, inside


def _has_no_weights(module: object) -> bool:
    """Whether a module is of a class that has no weights."""
    kind = _text(module, "type") or ""
    return kind.startswith(_PACKAGE) and kind.rpartition(".")[2] in _WITHOUT_WEIGHTS


def _is_inside(folder: str) -> bool:
    """Whether a text names a folder, with its parent's name at most by being empty."""
    return folder not in (".", "..") and re.fullmatch(r"[\w\-. ]*", folder) is not None


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
