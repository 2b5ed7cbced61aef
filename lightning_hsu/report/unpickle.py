"""What lies in a pickle, without running what is in it."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch


def unpickled(path: Path) -> Any:
    """What a file of torch.save holds, tensors and plain values only: other objects are left empty, no code of theirs is run.

    Raises:
        ValueError: if that cannot be.
    """
    kinds: dict[
        str, type
    ] = {}  # torch's reader fills none but its own lists and mappings, and names a class it cannot fill
    while True:
        try:
            with _others_empty(path, kinds), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                return torch.load(path, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # of many types: whatever a broken file makes torch's reader stumble over
            last = error
        unfilled = re.search(r"but got <class '[\w.]*\b(Left\d+)'>", str(last))
        if unfilled is None or unfilled[1] in kinds:
            break
        kinds[unfilled[1]] = (
            _LeftList if "list" in str(last).partition("but got")[0] else _LeftMapping
        )
    raise ValueError(
        f"{path} cannot be read without running code from it, which is not done ({type(last).__name__}: {_reason(last)}). "
        "If you trust it, load it yourself and give the model or its state_dict() to lightning_hsu.report.report, or save "
        "that as .safetensors"
    ) from last


def _reason(error: Exception) -> str:
    """What torch says, without its advice."""
    text = re.split(r"WeightsUnpickler error:|from a trusted source\.", str(error))[-1]
    return re.sub(r"\s+", " ", text.partition("Check the documentation")[0])[:300].strip()


def _others_empty(path: Path, kinds: Mapping[str, type]) -> AbstractContextManager[Any]:
    """While a file is read, stand-ins for the classes in it that are not torch's: hyperparameters, states of callbacks.

    The n-th of them stands as Leftn; ``kinds`` says which of them are lists or mappings.
    """
    find = getattr(
        torch.serialization, "get_unsafe_globals_in_checkpoint", None
    )  # from torch 2.6 on
    if find is None or not zipfile.is_zipfile(path):
        return nullcontext()
    known = {
        "builtins.list": list,
        "builtins.dict": dict,
        "builtins.set": set,
        "builtins.tuple": tuple,
    }
    stand_ins = {f"Left{i}": name for i, name in enumerate(sorted(find(path)))}
    return torch.serialization.safe_globals(
        [
            (known.get(name, type(left, (kinds.get(left, Left),), {})), name)
            for left, name in stand_ins.items()
        ]
    )


class Left:
    """What stands for an object that is not looked at."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Left:
        """Take anything."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take anything."""

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""


class _LeftMapping:
    """What stands for one that is a mapping: torch's reader fills an OrderedDict, and gives it attributes."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


class _LeftList:
    """What stands for one that is filled like a list."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return []
