"""Reads weights from files and folders without running code in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_hsu.report._files.adapters import (
    check_no_adapter,
    is_adapter_file,
    is_adapter_folder,
    read_adapter,
)
from lightning_hsu.report._files.folders import read_folder
from lightning_hsu.report._files.found import Found
from lightning_hsu.report._files.naming import printable, short
from lightning_hsu.report._files.reading import add_what_is_beside, read_file
from lightning_hsu.report._files.regular import check_exists
from lightning_hsu.report._files.sentences import is_sentence_folder, read_sentence_folder

__all__ = ["Checkpoint", "printable", "read_checkpoint", "read_weights"]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file or a folder, and what it says of the model.

    Args:
        name: What was read, for the report's title.
        tensors: By name: real tensors, or, where the numbers stay in the file until they are
            needed, stand-ins on device meta that have the shape and the dtype.
        load: Returns the numbers of one tensor by name; of a real one itself. The result may be
            released after use. A tensor that was stored without numbers stays on device meta.
        config: What the file or folder says of the model: the content of ``config.json`` (its
            ``model_type``, ``architectures``, ``num_attention_heads``, ``quantization_config``
            and so on) or of a sparse autoencoder's ``cfg.json``; None without one.
        notes: Pairs ("", text) or (name, text) of what one should know: which of several sets of
            weights was taken and how to take another, what was merged, what was left out.
        stays_in_file: Whether some tensors are stand-ins whose numbers ``load`` reads.
    """

    name: str
    tensors: dict[str, Tensor]
    load: Callable[[str], Tensor]
    config: dict[str, Any] | None
    notes: tuple[tuple[str, str], ...]
    stays_in_file: bool = False


def read_checkpoint(
    path: str | Path,
    key: str | None = None,
    base: str | Path | None = None,
    compared_with: str | Path | None = None,
) -> Checkpoint:
    """Read the weights of a file or a folder. No code in it is run, and nothing is downloaded.

    One set of weights is taken, never two; a note says which, and how to take another.

    - A file: Lightning's .ckpt, a state dict in .pt, .pth or .bin (DeepSpeed's, of which the
      module is taken), .safetensors, TorchScript.
    - A folder of Hugging Face's libraries, with one file or with an index of several; of a
      Trainer or accelerate, where the optimizer's files are passed over; of sentence-transformers,
      whose modules' weights are named as in its state dict, with the configuration of the
      transformer; of a sparse autoencoder (SAELens, sparsify, dictionary_learning); any other
      folder of .safetensors files that hold different names. The names in an index must be plain
      names of files in the folder; a file that is a link to a regular file may be read, as in the
      cache of the Hugging Face hub.
    - An adapter of peft (LoRA with its variants, DoRA, LoHa, LoKr): the weights of its base with
      the adapter added.

    With more than 256 MiB of .safetensors files, tensors of more than 1 MiB stay in them until
    ``load`` is called. Larger files of torch.save are mapped.

    Args:
        path: The file or folder.
        key: Where in a file the state dict is, such as "ema"; in .safetensors, a prefix of names;
            of an adapter's base, not of the adapter. None finds it.
        base: For an adapter: the file or folder of its base. None takes the local folder that
            the adapter's configuration names, else weights in the adapter's own folder. Of whole
            weights it is not used, and a note says so.
        compared_with: Whole weights that are an adapter's base if it has no other; a note says so.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no weights that can be read without running code, or not all of
            them; if it is a pipe or a device, or asks for far more memory than it has bytes; for
            an adapter without a base. Before torch 2.6 this includes files with other objects
            beside the weights (hyperparameters that are not numbers or strings).

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "model.pt"
        >>> state = {"fc.weight": torch.eye(4)}
        >>> torch.save({"model": state, "ema": state}, path)
        >>> found = read_checkpoint(path)
        >>> found.load("fc.weight").shape
        torch.Size([4, 4])
        >>> found.notes[0][1]
        "the weights under 'model' were taken; the file also holds 'ema': take another with key='ema'"
    """
    path = Path(path)
    is_folder = check_exists(path)
    is_adapter = is_adapter_folder(path) if is_folder else is_adapter_file(path)
    if is_adapter:
        if compared_with is not None and _is_adapter(Path(compared_with)):
            compared_with = None
        found = read_adapter(path, base, partial(_read_base, path, key), compared_with)
    else:
        found = _read(path, key)
        if base is not None:
            found.notes.append(("", f"the base {base} was not used: these are no adapter of peft"))
    found = _printable(found, path)
    return Checkpoint(
        name=str(path),
        tensors=found.tensors,
        load=found.load,
        config=found.config,
        notes=tuple(found.notes),
        stays_in_file=bool(found.loaders),
    )


def read_weights(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """Read all weights of a file or a folder at once, by name.

    Args:
        path: As for :func:`read_checkpoint`.
        key: Where in a file the state dict is, such as "ema"; None finds it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as for :func:`read_checkpoint`.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "model.pt"
        >>> torch.save({"epoch": 3, "state_dict": {"fc.weight": torch.eye(4)}}, path)
        >>> list(read_weights(path))
        ['fc.weight']
    """
    found = read_checkpoint(path, key)
    return {name: found.load(name) for name in found.tensors}


def _read(path: Path, key: str | None) -> Found:
    """The weights of a file or folder that is no adapter of peft."""
    if path.is_dir():
        if is_sentence_folder(path) and key is None:
            found = read_sentence_folder(path, partial(read_folder, key=None))
        else:
            found = read_folder(path, key)
    else:
        found = read_file(path, key)
        add_what_is_beside(found, path)
    return check_no_adapter(path, found)


def _is_adapter(path: Path) -> bool:
    """Whether a path is that of an adapter of peft, whether or not anything is there."""
    return is_adapter_file(path) or is_adapter_folder(path)


def _read_base(adapter: Path, key: str | None, path: Path) -> Found:
    """The weights of an adapter's base."""
    is_folder = check_exists(path)
    folder = adapter if adapter.is_dir() else adapter.parent
    is_same = path.resolve() == folder.resolve()
    if not is_same and (is_adapter_file(path) or (is_folder and is_adapter_folder(path))):
        raise ValueError(f"the base {path} is an adapter too: give the folder of a whole model")
    return _read(path, key)


def _printable(found: Found, path: Path) -> Found:
    """The tensors under names that are safe to print in a terminal."""
    shown = Found(config=found.config)
    for name in found.tensors:
        its_name = printable(name)
        if its_name in shown.tensors:
            raise ValueError(
                f"{path}: two names of weights differ only in control characters: {short(its_name)}"
            )
        shown.take(its_name, found, name)
    for name, note in found.notes:
        shown.notes.append((printable(name), printable(note)))
    return shown
