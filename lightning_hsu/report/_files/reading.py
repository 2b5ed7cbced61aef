"""Reads one file of weights, of any format that torch has."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

from lightning_hsu.report._files.found import KEPT_IN_FILE, Found, check_tensor
from lightning_hsu.report._files.naming import in_order, listed, short
from lightning_hsu.report._files.regular import (
    check_file,
    check_format,
    check_is_no_archive,
    read_config,
)
from lightning_hsu.report._files.safetensors_files import is_safetensors, read_safetensors
from lightning_hsu.report._files.state_dicts import state_dict_of
from lightning_hsu.report.unpickle import is_torchscript, is_zip, read_pickle, read_torchscript

PART = re.compile(r"^(.+)-(\d{5})-of-(\d{5})((?:\.[^.]+)?\.\w+)$")  # of a set in several files
_CONFIGS = ("config.json", "cfg.json")
_SIGNS = (  # one of these is in the configuration of a model or a sparse autoencoder
    "model_type",
    "architectures",
    "architecture",
    "hidden_size",
    "d_model",
    "_class_name",
    "d_in",
    "d_sae",
    "trainer",
    "num_latents",
    "expansion_factor",
)


def read_file(path: Path, key: str | None = None) -> Found:
    """The weights of one file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no weights that can be read without running code.
    """
    check_file(path)
    _check_is_fetched(path)
    if path.suffix == ".safetensors" or is_safetensors(path):
        return read_safetensors_files([path], key)
    check_format(path)
    check_is_no_archive(path)
    if is_torchscript(path):
        tensors = read_torchscript(path)
        for name, x in tensors.items():
            check_tensor(path, name, x)
        found = Found(tensors)
        if key is not None:
            found = below(found, key, path)
        return found
    _check_is_pickle(path)
    return state_dict_of(read_pickle(path), path, key)


def read_safetensors_files(paths: list[Path], key: str | None = None) -> Found:
    """The weights of one or several .safetensors files, in the order of a model.

    Args:
        paths: Regular files. With more than 256 MiB in all, the numbers of larger tensors stay in
            them.
        key: A prefix of names, without its last dot, of which alone the weights are taken.

    Raises:
        ValueError: if a file is broken, two files hold one name, or no name has the prefix.
    """
    for path in paths:
        check_file(path)
    keep_in_file = sum(path.stat().st_size for path in paths) > KEPT_IN_FILE
    found = Found()
    origin: dict[str, Path] = {}
    for path in paths:
        part = read_safetensors(path, keep_in_file)
        for name in part.tensors:
            if name in origin:
                raise ValueError(
                    f"{path.parent} holds more than one set of weights ({name} is also in "
                    f"{path.name}): name one file"
                )
            origin[name] = path
        found.add(part)
    if key is not None:
        found = below(found, key, paths[0])
    return found.under(in_order(found.tensors))


def below(found: Found, key: str, path: Path) -> Found:
    """The tensors below a prefix, under the rest of their names."""
    chosen = Found(notes=found.notes)
    for name in found.tensors:
        if name.startswith(f"{key}."):
            chosen.take(name.removeprefix(f"{key}."), found, name)
    if chosen.tensors:
        return chosen
    beginnings = dict.fromkeys(name.partition(".")[0] for name in found.tensors)
    raise ValueError(
        f"{path} has no weights under {short(key)!r}; its names start with {listed(beginnings)}"
    )


def _check_is_fetched(path: Path) -> None:
    """Refuse a file of Git LFS that only says where the weights are."""
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} holds no weights but says where they are: run `git lfs pull`")


def _check_is_pickle(path: Path) -> None:
    """Refuse a file that torch.save cannot have written."""
    with path.open("rb") as file:
        start = file.read(2)
    if is_zip(path) or tarfile.is_tarfile(path) or start.startswith(b"\x80"):
        return
    if start == b"PK":  # a zip file without the directory at its end
        raise ValueError(f"{path} is cut short")
    if path.name.endswith(".index.json"):
        raise ValueError(f"{path} is the index of a folder of weights: name the folder")
    raise ValueError(
        f"{path} is not a file of weights: it is not from torch.save, torch.jit.save or safetensors"
    )


def add_what_is_beside(found: Found, path: Path) -> None:
    """Add the configuration beside a file, and a note if the file is one of several parts."""
    for name in _CONFIGS:
        try:
            config = read_config(path.parent / name)
        except ValueError as error:
            found.notes.append(("", f"{error}: read by names and shapes"))
            continue
        if config is not None and not set(_SIGNS).isdisjoint(config):
            found.config = config
            break
    part = PART.match(path.name)
    if part is not None and int(part[3]) > 1:
        found.notes.append(
            ("", f"{path.name} is one of {int(part[3])} parts: name the folder to read all of them")
        )
