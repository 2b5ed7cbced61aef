"""Which files of a folder are its weights: one set, never two.

The names in an index must be plain names of files in the folder itself: no folder, no "..", no
absolute path. A link to a regular file may be read, wherever it leads: the cache of the Hugging
Face hub is made of such links.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

from lightning_hsu.report._files.found import Found
from lightning_hsu.report._files.naming import listed, short
from lightning_hsu.report._files.reading import (
    PART,
    add_what_is_beside,
    below,
    read_file,
    read_safetensors_files,
)
from lightning_hsu.report._files.regular import is_file, other_folder, read_json

_STEMS = (  # of the names of whole models, in the order of the search
    "model",
    "diffusion_pytorch_model",
    "pytorch_model",
    "open_clip_model",
    "open_clip_pytorch_model",
    "sae_weights",
    "sae",
    "ae",
    "weights",
    "consolidated",
    "consolidated.00",
)
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_NOT_WEIGHTS = re.compile(
    r"^(optimizer|optim|scheduler|scaler|rng_state|random_states|training_args|trainer_state"
    r"|adapter_model|sampler|dl_state|custom_checkpoint|log_feature_sparsity|sparsity)([._\-].*)?$",
    re.IGNORECASE,
)
_MOST_ENTRIES = 10_000
_DEEPEST = 4  # levels of folders inside in which weights are searched, to name their folder
_MOST_FOLDERS = 1_000  # that are looked at in such a search
_MOST_FOLDERS_IN_ONE = 200


def read_folder(path: Path, key: str | None = None) -> Found:
    """The weights of a folder, with its configuration and what was left out.

    Raises:
        ValueError: if it holds none, or several sets of which none has a usual name.
    """
    names = entries(path)
    _check_is_whole(path, names)
    files = [name for name in names if is_file(path / name)]
    sets = _sets(path, files)
    if sets:
        label = next(iter(sets))
        found = sets[label](key)
        others = [name for name in sets if name != label]
        others += [name for name in _weights(files) if name not in sets and not _is_part(name)]
        if others:
            found.notes.append(("", _of_several(label, others)))
    else:
        found = _read_unnamed(path, names, files, key)
    add_what_is_beside(found, path / "any")
    return found


def _weights(files: list[str]) -> list[str]:
    """Names of files that may hold weights: no optimizer's, no adapter's."""
    weights = []
    for name in files:
        if name.endswith(_ENDINGS) and not _NOT_WEIGHTS.match(name):
            weights.append(name)
    return weights


def _is_part(name: str) -> bool:
    """Whether a name is one of a set in several files."""
    return PART.match(name) is not None


def _of_several(taken: str, others: list[str]) -> str:
    return (
        f"the weights of {taken} were taken; the folder also holds {listed(others)}: name that "
        "file to read it instead"
    )


def entries(path: Path) -> list[str]:
    """The names in a folder, sorted.

    Raises:
        ValueError: if there are more than 10,000.
    """
    names = []
    for entry in path.iterdir():
        names.append(entry.name)
        if len(names) > _MOST_ENTRIES:
            raise ValueError(f"{path} holds more than {_MOST_ENTRIES:,} files: name one of them")
    return sorted(names)


def _sets(path: Path, files: list[str]) -> dict[str, Callable[[str | None], Found]]:
    """What reads each set of weights with a usual name, by the name of its index or file.

    The files that an index names are part of its set.
    """
    sets: dict[str, Callable[[str | None], Found]] = {}
    parts: set[str] = set()
    for ending in _ENDINGS:
        for name in files:
            if re.search(rf"{re.escape(ending)}\.index(\.[\w\-]+)?\.json$", name):
                shards = _shards(path / name)
                parts.update(shards)
                sets[name] = partial(_read_shards, path, name, shards)
        for stem in _STEMS:
            pattern = rf"{re.escape(stem)}(\.[\w\-]+)?{re.escape(ending)}"
            for name in files:
                if re.fullmatch(pattern, name) and name not in parts:
                    sets[name] = partial(read_file, path / name)
    _check_model_parallel(path, files)
    plain = [name for name in sets if not _is_variant(name)]
    order = plain + [name for name in sets if _is_variant(name)]
    return {name: sets[name] for name in order}


def _is_variant(name: str) -> bool:
    """Whether a name has a variant in it, such as model.fp16.safetensors."""
    for ending in _ENDINGS:
        name = name.removesuffix(".index.json").removesuffix(ending)
    return name not in _STEMS


def _shards(index: Path) -> dict[str, list[str]]:
    """The files that an index names, in order, each with the names of its tensors.

    Raises:
        ValueError: if it is no index, or names what is not a plain name in its folder.
    """
    about = read_json(index)
    places = about.get("weight_map") if isinstance(about, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} is no index of weights: it has no weight_map; name one file")
    shards: dict[str, list[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise ValueError(
                f"{index} names {short(str(file))}, which is not the name of a file in its folder: "
                "it is refused; name the files to read yourself"
            )
        shards.setdefault(file, []).append(name)
    return {file: shards[file] for file in sorted(shards)}


def _is_plain(name: str) -> bool:
    """Whether a name is one of a file in the same folder on every system."""
    return name not in ("", ".", "..") and re.search(r"[/\\:\x00]", name) is None


def _read_shards(path: Path, index: str, shards: dict[str, list[str]], key: str | None) -> Found:
    """The tensors that an index names, from the files where it says that they are."""
    missing = [file for file in shards if not is_file(path / file)]
    if missing:
        raise ValueError(
            f"{path / index} names {len(shards)} files, of which {listed(missing)} are not there: "
            "copy them into the folder, or name one file to read only that"
        )
    if all(file.endswith(".safetensors") for file in shards):
        held = read_safetensors_files([path / file for file in shards])
    else:
        held = Found()
        for file in shards:
            part = read_file(path / file)
            for name in part.tensors:
                if name in held.tensors:
                    raise ValueError(f"{path} holds {short(name)} in more than one file: name one")
            held.add(part)
    asked = set()
    for names in shards.values():
        asked.update(names)
    absent = sorted(asked - set(held.tensors) - {name for name, _ in held.notes})
    if absent:
        raise ValueError(
            f"{path / index} names {listed(absent, 3)}, which its files do not hold: the folder "
            "is not complete, or mixes two models"
        )
    chosen = [name for name in held.tensors if name in asked]
    left_out = len(held.tensors) - len(chosen)
    held = held.under(chosen)
    if left_out:
        held.notes.append(("", f"{left_out:,} tensors that {index} does not name were left out"))
    if key is not None:
        held = below(held, key, path)
    return held


def _check_is_whole(path: Path, names: list[str]) -> None:
    """Refuse folders whose files each hold pieces of weights, with what makes one file of them."""
    there = set(names)
    if ".metadata" in there:
        raise ValueError(
            f"{path} is a sharded checkpoint: make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}` or, if it is "
            f"not from Lightning, "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE`"
        )
    pieces = [name for name in names if "optim_states" in name or "zero_pp_rank" in name]
    inner = path / "checkpoint"
    in_lightning = is_file(path / "zero_to_fp32.py") and inner.is_dir()
    has_steps = any(name.startswith("global_step") and (path / name).is_dir() for name in names)
    in_pieces = "zero_to_fp32.py" in there or bool(pieces) or in_lightning or has_steps
    if in_pieces and not _sets(path, [name for name in names if is_file(path / name)]):
        raise ValueError(
            f"{path} is a checkpoint of DeepSpeed, in pieces: make one file of it with "
            f"`python zero_to_fp32.py . OUTPUT` in the folder that holds zero_to_fp32.py, and "
            "name that; of Lightning's, `lightning.pytorch.utilities.deepspeed."
            "convert_zero_checkpoint_to_fp32_state_dict(FOLDER, FILE)` does the same"
        )


def _check_model_parallel(path: Path, files: list[str]) -> None:
    """Refuse files that each hold a part of every matrix."""
    ranks = [name for name in files if re.fullmatch(r"consolidated\.\d\d\.pth", name)]
    ranks += [name for name in files if re.fullmatch(r"mp_rank_\d\d_model_states\.pt", name)]
    others = [name for name in files if name.endswith(".safetensors")]
    if len(ranks) > 1 and not others:
        raise ValueError(
            f"{path} holds a model that is divided among {len(ranks)} ranks ({listed(ranks, 2)}): "
            "put their parts together with the library that wrote them, and name that file"
        )


def _read_unnamed(path: Path, names: list[str], files: list[str], key: str | None) -> Found:
    """The weights of a folder without a file of a usual name."""
    weights = _weights(files)
    safe = [name for name in weights if name.endswith(".safetensors")]
    if safe:
        _check_all_parts(path, safe)
        found = read_safetensors_files([path / name for name in safe], key)
        if len(safe) > 1:
            found.notes.append(("", f"{len(safe)} files were read as one model: {listed(safe, 5)}"))
        return found
    if len(weights) == 1:
        found = read_file(path / weights[0], key)
        found.notes.append(("", f"the weights of {weights[0]} were taken"))
        return found
    if weights:
        _check_all_parts(path, weights)
        raise ValueError(f"{path} holds several files of weights, {listed(weights)}: name one")
    adapters = [name for name in files if name.startswith("adapter_model.")]
    if adapters:
        raise ValueError(
            f"{path} holds an adapter ({adapters[0]}) without the adapter_config.json that says "
            "how it is added to its base: put that beside it"
        )
    other = other_folder(path, set(names))
    if other is not None:
        raise ValueError(other)
    inner = _folders_with_weights(path)
    if inner:
        kind = "a diffusers pipeline" if "model_index.json" in names else "a folder"
        raise ValueError(
            f"{path} is {kind} whose weights are in folders of their own: name one, such as "
            f"{path / inner[0]}; there are {listed(inner)}"
        )
    strange = [name for name in names if name.endswith(_ENDINGS) and not is_file(path / name)]
    if strange:
        raise ValueError(f"{path} holds {listed(strange)}, which are no regular files: name a file")
    raise ValueError(f"{path} is a folder without .safetensors files: name the checkpoint in it")


def _check_all_parts(path: Path, names: list[str]) -> None:
    """Refuse a set of numbered parts that are not all there."""
    for name in names:
        part = PART.match(name)
        if part is None:
            continue
        count = int(part[3])
        there = 0
        for other in names:
            beside = PART.match(other)
            if beside is not None and _set_of(beside) == _set_of(part):
                there += 1
        if there != count:
            raise ValueError(
                f"{path} holds {there} of the {count} parts of {part[1]}{part[4]}: copy the others "
                "into the folder, or name one file to read only that"
            )


def _set_of(part: re.Match[str]) -> tuple[str, str, str]:
    """What the names of all parts of a set have in common."""
    return part[1], part[3], part[4]


def _folders_with_weights(path: Path) -> list[str]:
    """Folders inside that hold weights, as paths from this one, those nearest to it first.

    Up to four levels, as deep as Lightning puts checkpoints below its ``default_root_dir`` and one
    more, and up to 1,000 folders are looked at. Links to folders are not followed.
    """
    found: list[str] = []
    count = 0
    level = [""]
    for _ in range(_DEEPEST):
        inner: list[str] = []
        for above in level:
            for name in _folders_in(path / above):
                if count == _MOST_FOLDERS:
                    return found
                count += 1
                folder = f"{above}/{name}".lstrip("/")
                inner.append(folder)
                if _has_weights(path / folder):
                    found.append(folder)
        level = inner
    return found


def _folders_in(path: Path) -> list[str]:
    """Names of the folders in a folder, at most 200 of them."""
    found: list[str] = []
    for name in _some_entries(path):
        if len(found) == _MOST_FOLDERS_IN_ONE:
            break
        if (path / name).is_dir() and not (path / name).is_symlink():
            found.append(name)
    return found


def _has_weights(path: Path) -> bool:
    """Whether a folder holds weights, an adapter or a sharded checkpoint."""
    for name in _some_entries(path):
        if name == ".metadata" or name.startswith("adapter_model."):
            return True
        if _weights([name]) and is_file(path / name):
            return True
    return False


def _some_entries(path: Path) -> list[str]:
    """The names in a folder, sorted; of very many the first 10,000, of an unreadable folder none."""
    try:
        with os.scandir(path) as inside:
            return sorted(entry.name for entry in islice(inside, _MOST_ENTRIES))
    except OSError:
        return []
