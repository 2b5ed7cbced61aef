"""The demo's data: small, real, and on the machine already."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class MissingDataError(Exception):
    """The data asked for is not there; the message says what to do."""


@dataclass(frozen=True)
class Data:
    """A pool to draw training images from, and test images that are never trained on or chosen by."""

    name: str  # in file names
    title: str
    pool: tuple[Tensor, Tensor]  # images (m, d), labels (m,)
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Draw:
    """One seed's training images, with held-out and test images standardised in the same way."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(source: str) -> Data:
    """The data by name (digits, fashion-mnist), or from a folder with idx files, gzipped or plain."""
    if source == "digits":
        return _digits()
    if source == "fashion-mnist":
        return _idx(DEBIAN_FOLDER, "fashion-mnist", "Fashion-MNIST")
    folder = Path(source).expanduser()
    return _idx(folder, folder.resolve().name, folder.resolve().name)


def draw(data: Data, seed: int, count: int, held_out: int = 2000) -> Draw:
    """Training images at random from the pool, and others of the pool to validate on."""
    order = torch.randperm(len(data.pool[1]), generator=torch.Generator().manual_seed(seed))
    parts = [tuple(part[chosen] for part in data.pool) for chosen in order[: count + held_out].tensor_split([count])]
    mean, std = parts[0][0].mean(), parts[0][0].std()
    train, held, test = (((images - mean) / std, labels) for images, labels in (*parts, data.test))
    return Draw(train, held, test)


def _digits() -> Data:
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float(), labels[order].long()
    return Data("digits", "scikit-learn's digits", (images[:1000], labels[:1000]), (images[1000:], labels[1000:]))


def _idx(folder: Path, name: str, title: str) -> Data:
    paths = [next((p for p in (folder / f"{file}.gz", folder / file) if p.is_file()), None) for file in IDX_FILES]
    missing = [file for file, path in zip(IDX_FILES, paths, strict=True) if path is None]
    if missing:
        raise MissingDataError(_ways_out(folder, missing))
    images, labels, test_images, test_labels = (_read(path) for path in paths if path is not None)
    return Data(name, title, (images.flatten(1).float(), labels.long()), (test_images.flatten(1).float(), test_labels.long()))


def _read(path: Path) -> Tensor:
    """An idx file of bytes: two zeros, the type 8, the number of axes, their lengths, the values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error):
        raw = b""
    axes = raw[3] if len(raw) > 3 else 0
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * axes + math.prod(shape):
        raise MissingDataError(f"{path} is not an idx file of bytes, or is incomplete.")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * axes).view(shape)


def _ways_out(folder: Path, missing: list[str]) -> str:
    lines = [
        f"No data in {folder}: missing {', '.join(missing)} (each plain or with .gz).",
        "Ways out:",
        "  apt-get install dataset-fashion-mnist   on Debian and Ubuntu, then  make demo DATA=fashion-mnist",
        "  make demo DATA=/your/folder             a folder that holds these four idx files",
        "  make demo                               scikit-learn's bundled digits, nothing to install",
    ]
    return "\n".join(lines)
