"""Real data that is on the machine already, in a folder of yours, or fetched once."""

from __future__ import annotations

import gzip
import hashlib
import math
import zipfile
import zlib
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evidence import cifar
from evidence.errors import MissingDataError as MissingDataError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
NAMED = ("digits", "fashion-mnist", "mnist1d", "cifar10")
"""Data that need no folder."""
NPZ_NAMES = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)


@dataclass(frozen=True)
class Data:
    """A pool to draw training images from, and test images never trained on or chosen by."""

    name: str  # in file names
    title: str
    pool: tuple[Tensor, Tensor]  # images (m, d), labels (m,)
    test: tuple[Tensor, Tensor]
    shape: tuple[int, ...] = ()  # of an image: channels, height, width; d is their product

    @cached_property
    def digest(self) -> str:
        """What tells this data from others of the same name."""
        found = hashlib.sha256()
        for part in (*self.pool, *self.test):
            found.update(part.contiguous().numpy())
        return found.hexdigest()[:16]

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(torch.cat([self.pool[1], self.test[1]]).max()) + 1


@dataclass(frozen=True)
class Draw:
    """One seed's training images, with held-out and test images standardised as these are."""

    data: Data
    images: Tensor  # as they are in the pool
    labels: Tensor  # some of them wrong, where noise was asked for
    held: Tensor  # which of the pool are held out

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Images (n, d), labels (n,)."""
        return self.standardised(self.images), self.labels

    @property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """The same of those to validate on."""
        return self.standardised(self.data.pool[0][self.held]), self.data.pool[1][self.held]

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """The same of the test images."""
        return self.standardised(self.data.test[0]), self.data.test[1]

    def standardised(self, images: Tensor) -> Tensor:
        """Images less the mean of all training pixels, over their standard deviation."""
        return (images - self.images.mean()) / self.images.std()


def load(source: str) -> Data:
    """The data by name (digits, fashion-mnist, mnist1d, cifar10), or from a folder.

    cifar10 is fetched, 139 MB, where it is not kept from the last time.

    A folder holds four idx files, gzipped or plain; or one .npz with x_train, y_train, x_test,
    y_test (or train_images, train_labels, test_images, test_labels); or CIFAR-10's six batches or
    CIFAR-100's files train and test, as their authors pickled them. Images of four axes in an .npz
    have their channels last, unless the second axis is 4 or less and the last is more.

    Raises:
        MissingDataError: if the data is not there or not whole; the message says what to do.
    """
    if source == "digits":
        return _digits()
    if source == "fashion-mnist":
        return _idx(DEBIAN_FOLDER, "fashion-mnist", "Fashion-MNIST")
    if source == "mnist1d":
        return _mnist1d()
    if source == "cifar10":
        return _cifar10()
    folder = Path(source).expanduser()
    name = folder.resolve().name
    archives = sorted(folder.glob("*.npz"))
    if len(archives) > 1:
        names = ", ".join(one.name for one in archives)
        raise MissingDataError(f"{folder} holds {names}: leave one of them there.")
    if archives:
        return _npz(archives[0], name, name)
    for place in (folder, folder / "cifar-10-batches-py"):
        if any((place / batch).is_file() for batch in cifar.BATCHES):
            return _made(place.resolve().name, "CIFAR-10", *cifar.pickled10(place))
    for place in (folder, folder / "cifar-100-python"):
        if (place / "train").is_file() and (place / "test").is_file():
            return _made(place.resolve().name, "CIFAR-100", *cifar.pickled100(place))
    return _idx(folder, name, name)


def draw(
    data: Data,
    seed: int,
    count: int,
    held_out: int = 2000,
    *,
    noise: float = 0.0,
    imbalance: float = 1.0,
) -> Draw:
    """Training images at random from the pool, and others of the pool to validate on.

    Args:
        data: The data.
        seed: Decides which images, which labels are wrong, and which classes are rare.
        count: Training images.
        held_out: Images to validate on, clean and as frequent as in the pool.
        noise: Fraction of the training labels that are replaced by another class.
        imbalance: How many times as frequent as the rarest class the most frequent one is; those
            between decay geometrically.
    """
    images, labels = data.pool
    if count + held_out > len(labels):
        raise ValueError(
            f"{count} images to train on and {held_out} to validate on are more than the "
            f"{len(labels)} there are"
        )
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=chance)
    if imbalance == 1.0:
        chosen, held = order[: count + held_out].tensor_split([count])
    else:
        held, rest = order.tensor_split([held_out])
        chosen = rest[_long_tail(labels[rest], data.classes, count, imbalance, chance)]
    images, labels = images[chosen], labels[chosen]
    if noise:
        wrong = torch.rand(len(labels), generator=chance) < noise
        shift = torch.randint(1, data.classes, labels.shape, generator=chance)
        labels = torch.where(wrong, (labels + shift) % data.classes, labels)
    return Draw(data, images, labels, held)


def _long_tail(
    labels: Tensor, classes: int, count: int, imbalance: float, chance: torch.Generator
) -> Tensor:
    """Indices of ``count`` labels, classes in random order ever rarer.

    What rounding leaves, and what a class has too few images for, goes to the most frequent ones.
    """
    rank = torch.randperm(classes, generator=chance)
    wanted = imbalance ** (-rank.double() / (classes - 1))
    wanted = (wanted * count / wanted.sum()).round().long()
    wanted[rank == 0] += count - wanted.sum()
    of_class = [(labels == k).nonzero().flatten() for k in range(classes)]
    chosen = [of_class[k][: wanted[k]] for k in range(classes)]
    spare = [of_class[k][wanted[k] :] for k in rank.argsort()]
    return torch.cat([*chosen, *spare])[:count]


def _digits() -> Data:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(found.data)[order].float()
    labels = torch.from_numpy(found.target)[order].long()
    pool = images[:1000], labels[:1000]
    test = images[1000:], labels[1000:]
    return Data("digits", "scikit-learn's digits", pool, test, (1, 8, 8))


def _mnist1d() -> Data:
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError:
        raise MissingDataError("MNIST1D needs a package: pip install mnist1d") from None
    settings = vars(get_dataset_args()) | {"num_samples": 15_000, "train_split": 2 / 3, "seed": 42}
    made = make_dataset(Namespace(**settings))
    made = {name: torch.as_tensor(made[name]) for name in ("x", "y", "x_test", "y_test")}
    pool = made["x"].float(), made["y"].long()
    test = made["x_test"].float(), made["y_test"].long()
    return Data("mnist1d", "MNIST1D", pool, test, (1, 1, made["x"].shape[1]))


def _cifar10() -> Data:
    kept = cifar.fetched()
    try:
        return _npz(kept, "cifar10", "CIFAR-10")
    except MissingDataError as error:
        raise MissingDataError(f"{error}\nRemove it, and it is fetched anew.") from None


def _idx(folder: Path, name: str, title: str) -> Data:
    paths, missing = [], []
    for file in IDX_FILES:
        if (folder / f"{file}.gz").is_file():
            paths.append(folder / f"{file}.gz")
        elif (folder / file).is_file():
            paths.append(folder / file)
        else:
            missing.append(file)
    if missing:
        raise MissingDataError(_ways_out(folder, missing))
    return _made(name, title, *map(_read, paths))


def _npz(path: Path, name: str, title: str) -> Data:
    import numpy as np

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found = []
            for names in NPZ_NAMES:
                if set(names) <= set(archive.files):
                    found = [_tensor(archive[part]) for part in names]
                    break
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise MissingDataError(f"{path} cannot be read: {error}") from None
    if not found:
        wanted = " or ".join(", ".join(one) for one in NPZ_NAMES)
        raise MissingDataError(f"{path} has {', '.join(archive.files)}; it needs {wanted}.")
    return _made(name, title, *found, channels_last=True)


def _tensor(array: Any) -> Tensor:
    """Of a NumPy array; PyTorch computes little with unsigned numbers of more than a byte."""
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype("int64")
    return torch.as_tensor(array)


def _made(name: str, title: str, *arrays: Tensor, channels_last: bool = False) -> Data:
    """Data from images and labels, to train and to test with.

    Args:
        name: In file names.
        title: In tables and errors.
        arrays: Images (m, h, w), (m, channels, h, w) or rows (m, d), and their labels; twice.
        channels_last: Whether images may be (m, h, w, channels), too.
    """
    images, labels, test_images, test_labels = arrays
    _check(title, "training", images, labels)
    _check(title, "test", test_images, test_labels)
    classes = 1 + int(max(labels.max(), test_labels.max()))
    if labels.unique().numel() < 2 or classes > len(images):
        raise MissingDataError(
            f"{title} has {len(images)} training images of {labels.unique().numel()} classes, and labels "
            f"up to {classes - 1}: it takes two classes or more, numbered from 0."
        )
    if images.shape[1:] != test_images.shape[1:]:
        size, test_size = (" x ".join(map(str, x.shape[1:])) for x in (images, test_images))
        raise MissingDataError(
            f"{title} has training images of {size} and test images of {test_size}."
        )
    if images.ndim == 4 and channels_last and not images.shape[1] <= 4 < images.shape[3]:
        images = images.permute(0, 3, 1, 2)
        test_images = test_images.permute(0, 3, 1, 2)
    size = tuple(images.shape[1:])
    shape = (1,) * (3 - len(size)) + size
    pool = images.flatten(1).float(), labels.flatten().long()
    test = test_images.flatten(1).float(), test_labels.flatten().long()
    return Data(name, title, pool, test, shape)


def _check(title: str, what: str, images: Tensor, labels: Tensor) -> None:
    """Refuse images and labels that cannot be trained on."""
    if len(images) != labels.numel():
        raise MissingDataError(
            f"{title} has {len(images)} {what} images and {labels.numel()} labels."
        )
    if not len(images) or not 2 <= images.ndim <= 4:
        raise MissingDataError(
            f"{title} has {what} images of shape {tuple(images.shape)}: "
            "(m, h, w), with channels, or rows."
        )
    if images.is_complex() or labels.is_complex():
        raise MissingDataError(f"{title} has {what} images or labels that are complex numbers.")
    finite = not images.is_floating_point() or images.isfinite().all()
    if not finite or images.min() == images.max():
        raise MissingDataError(
            f"{title} has {what} images with pixels that are all the same, NaN or infinite."
        )
    if (labels != labels.long()).any() or int(labels.min()) < 0:
        raise MissingDataError(f"{title} has {what} labels that are no whole numbers from 0.")


def _read(path: Path) -> Tensor:
    """An idx file of bytes: two zeros, the type 8, the number of axes, their lengths, values."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (EOFError, OSError, zlib.error):
        raw = b""
    axes = raw[3] if len(raw) > 3 else 0
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * axes + math.prod(shape):
        raise MissingDataError(f"{path} is not an idx file of bytes, or is incomplete.")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * axes).view(shape)


def _ways_out(folder: Path, missing: list[str]) -> str:
    problem = f"No data in {folder}: missing {', '.join(missing)} (each plain or with .gz)."
    if folder.is_file():
        problem = f"{folder} is a file: name the folder that holds it."
    lines = [
        problem,
        "Ways out:",
        "  digits, fashion-mnist, mnist1d, cifar10 data that is known by name",
        "  apt-get install dataset-fashion-mnist   on Debian and Ubuntu, then the same again",
        "  make demo DATA=/your/folder             a folder that holds these four idx files, one .npz,",
        "                                          or CIFAR's python version",
        "  python -m evidence --data /your/folder  the same",
        "  make demo DATA=cifar10                  CIFAR-10, fetched once (139 MB)",
        "  make demo                               MNIST1D and digits, nothing to fetch",
    ]
    return "\n".join(lines)
