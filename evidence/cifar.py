"""CIFAR-10 and CIFAR-100 as their authors pickled them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evidence.errors import MissingDataError

TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCH = "test_batch"
BATCHES = (*TRAIN_BATCHES, TEST_BATCH)
"""The files of CIFAR-10's "python version"."""

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32


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
