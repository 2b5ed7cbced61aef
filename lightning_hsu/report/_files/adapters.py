"""Adapters beside a base: the weights that a model with the adapter computes with.

peft's formulas, by the names of the tensors that it saves; peft itself is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_hsu._monitor.text import counted
from lightning_hsu.report._files.found import Found
from lightning_hsu.report._files.naming import listed, short
from lightning_hsu.report._files.reading import read_file
from lightning_hsu.report._files.regular import is_file, read_json

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_OF_PEFT = ("base_model.model.", "base_model.")
_FACTOR = re.compile(  # of peft, kohya's scripts, diffusers and older diffusers
    r"(?:^|[._])(lora_A|lora_B|lora_down|lora_up|lora_mid|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|lora\.down|lora\.up|lora\.alpha|dora_scale"
    r"|hada_[wt]\d(?:_[ab])?|lokr_[wt]\d(?:_[ab])?)(?:\.|$)"
)
_KINDS = ("LORA", "LOHA", "LOKR")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin
_READ = (  # settings with a name like those of variants that do not change the formula
    "use_rslora",
    "use_dora",
    "use_effective_conv2d",
    "eva_config",
    "loftq_config",
    "megatron_config",
    "runtime_config",
)
_NOT_READ = ("alora_invocation_tokens", "layer_replication", "target_parameters")
_LARGEST = 1e9  # rank or alpha
_MOST_REPEATS = 2  # * or + or ? in a pattern of layers


@dataclass(frozen=True)
class _Change:
    """What an adapter holds for one layer.

    Args:
        factors: Its tensors, by peft's names for them.
        scale: The factor of the product.
        transposed: Whether the layer's weight is (in, out).
    """

    factors: Mapping[str, Tensor]
    scale: float
    transposed: bool


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter of peft."""
    return is_file(path / CONFIG) and _file_in(path) is not None


def is_adapter_file(path: Path) -> bool:
    """Whether a file is that of peft with the configuration beside it."""
    return path.name in _FILES and is_file(path.parent / CONFIG)


def _file_in(path: Path) -> Path | None:
    for name in _FILES:
        if is_file(path / name):
            return path / name
    return None


def check_no_adapter(path: Path, found: Found) -> Found:
    """Refuse factors without their base; leave them out where other weights are beside them.

    Raises:
        ValueError: if all that a file holds are factors.
    """
    factors = [name for name in found.tensors if _FACTOR.search(name)]
    if not factors:
        return found
    others = []
    for name in found.tensors:
        if not _FACTOR.search(name):
            others.append(name)
    if all(found.tensors[name].ndim < 2 for name in others):
        raise ValueError(
            f"{path} holds the factors of LoRA, not weights: name the folder of peft with "
            f"{CONFIG} and give the base with --base PATH or base=; or merge it into the model "
            "with the library that trained it, and save the model"
        )
    found = found.under(others)
    found.notes.append(
        (
            "",
            f"{len(factors)} factors of adapters such as {short(factors[0])} were left out, since "
            "the file does not say by what they are multiplied: the weights below them were read "
            "as they are without the adapter; merge it (merge_and_unload) to read both",
        )
    )
    return found


def read_adapter(
    path: Path,
    base: str | Path | None,
    read_base: Callable[[Path], Found],
    compared_with: str | Path | None = None,
) -> Found:
    """The weights of a base with an adapter of peft added.

    Args:
        path: The folder, or the file in it.
        base: The file or folder of the base; None is the local folder that the adapter's
            configuration names, else weights in the adapter's own folder. Nothing is downloaded.
        read_base: Reads a base.
        compared_with: The file or folder that is the base if there is no other.

    Raises:
        ValueError: without a base, for an adapter of another kind, or if a layer of the adapter
            is not in the base.
    """
    folder = path if path.is_dir() else path.parent
    file = path if path.is_file() else _file_in(folder)
    assert file is not None
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} is no configuration of an adapter")
    adapter = read_file(file)
    _check_kind(folder, config)
    base_path = _base_of(folder, config, base)
    why = ""
    if base_path is None:
        if compared_with is None:
            raise ValueError(_no_base(file, config))
        base_path = Path(compared_with)
        why = ", which it is compared with, since no other is there (--base PATH or base=)"
    found = read_base(base_path)
    changes, replaced = _changes(folder, config, adapter)
    if not changes and not replaced:
        raise ValueError(f"{file} holds no factors of LoRA: name a file of weights")
    base_names = _BaseNames(folder, base_path, found)
    for name in replaced:
        module = _module_of(name)
        found.loaders.pop(base_names.where(module) or "", None)
        found.take(base_names.where(module) or module, adapter, name)
    for module, change in changes.items():
        _add(found, base_names.of_layer(module), change)
    layers = counted(len(changes), "layer")
    note = f"{file.name} was added to the base {base_path}{why}: {layers} changed"
    if replaced:
        note += f", {len(replaced)} tensors replaced or added"
    found.notes.append(("", note))
    return found


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse adapters that are not of LoRA, LoHa or LoKr, or that change their base."""
    kind = str(config.get("peft_type", "LORA"))
    start = config.get("init_lora_weights")
    way_out = "merge it with peft (merge_and_unload), save the model and name that"
    if kind not in _KINDS:
        raise ValueError(f"{folder} holds an adapter of kind {short(kind)}, not LoRA: {way_out}")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{folder} holds a LoRA that began with {short(start)}, which changes its base: "
            f"{way_out}"
        )
    for name, setting in config.items():
        is_meant = name in _NOT_READ or name.startswith("use_") or name.endswith("_config")
        if is_meant and setting and name not in _READ:
            raise ValueError(
                f"{folder} holds a LoRA with {short(name)}, which is not read: {way_out}"
            )


def _base_of(folder: Path, config: Mapping[str, Any], base: str | Path | None) -> Path | None:
    """The file or folder of the base; None if none is there."""
    if base is not None:
        return Path(base)
    named = config.get("base_model_name_or_path")
    if isinstance(named, str) and named:
        is_remote = named.startswith(("//", "\\\\"))  # a share in the network
        for candidate in (Path(named), folder / named):
            if is_remote:
                break
            try:
                is_there = candidate.exists()
            except (OSError, ValueError):  # no name that a file can have
                is_there = False
            if is_there and candidate.resolve() != folder.resolve():
                return candidate
    for entry in folder.iterdir():
        is_model = entry.name.startswith(("model", "pytorch_model"))
        if is_model and entry.suffix in (".safetensors", ".bin") and is_file(entry):
            return folder
    return None


def _no_base(file: Path, config: Mapping[str, Any]) -> str:
    """That an adapter's base is not there, and how to give it."""
    named = config.get("base_model_name_or_path")
    hint = ""
    if isinstance(named, str) and named:
        hint = f", which is {short(named)}"
    return (
        f"{file} holds the factors of LoRA, not weights: give the base{hint}, with --base PATH or "
        "base="
    )


def _changes(
    folder: Path, config: Mapping[str, Any], adapter: Found
) -> tuple[dict[str, _Change], list[str]]:
    """What the adapter holds for each layer, and the names of weights that it replaces."""
    factors: dict[str, dict[str, Tensor]] = {}
    replaced = []
    for name in adapter.tensors:
        match = _FACTOR.search(name)
        if match is None:
            if "trainable_tokens" in name or "prompt" in name:
                raise ValueError(
                    f"{folder} holds {short(name)}, which is not read: merge the adapter with peft"
                )
            replaced.append(name)
        elif not name.endswith(".bias"):
            module = _module_of(name[: match.start()])
            if module in factors and match[1] in factors[module]:
                raise ValueError(f"{folder} holds two adapters of {short(module)}: merge one first")
            factors.setdefault(module, {})[match[1]] = adapter.load(name)
    changes = {}
    for module, its_factors in factors.items():
        scale = _scale(folder, config, module, its_factors)
        changes[module] = _Change(its_factors, scale, bool(config.get("fan_in_fan_out")))
    return changes, replaced


def _module_of(name: str) -> str:
    """A layer's name in the base, of a name in the adapter."""
    for prefix in _OF_PEFT:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    name = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
    return name.replace(".modules_to_save", "").replace(".original_module", "")


def _scale(
    folder: Path, config: Mapping[str, Any], module: str, factors: Mapping[str, Tensor]
) -> float:
    """The factor of the product: alpha over the rank, or over its root."""
    default_alpha = config.get("lora_alpha", config.get("alpha", 1))
    alpha = _by_pattern(folder, config.get("alpha_pattern"), module, default_alpha)
    rank = float(_rank(factors))
    if rank == 0:
        rank = _by_pattern(folder, config.get("rank_pattern"), module, config.get("r", 1))
    if rank <= 0:
        raise ValueError(f"{folder}: the rank of {short(module)} is {rank}")
    if config.get("use_rslora"):
        return float(alpha / rank**0.5)
    return float(alpha / rank)


def _rank(factors: Mapping[str, Tensor]) -> int:
    """The rank as the factors tell; 0 if they do not."""
    for name, axis in (("lora_A", 0), ("lora_embedding_A", 0), ("hada_w1_b", 0)):
        if name in factors and factors[name].ndim > axis:
            return int(factors[name].shape[axis])
    return 0


def _by_pattern(folder: Path, patterns: Any, module: str, default: Any) -> float:
    """The number that the first matching pattern of layers gives, as peft finds it."""
    number = default
    if isinstance(patterns, dict):
        for pattern, of_pattern in patterns.items():
            if _matches(folder, str(pattern), module):
                number = of_pattern
                break
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not abs(number) < _LARGEST:
        raise ValueError(f"{folder / CONFIG} gives {short(module)} a rank or an alpha that is none")
    return float(number)


def _matches(folder: Path, pattern: str, module: str) -> bool:
    """Whether a regular expression of peft names a layer; one that could take hours is refused."""
    repeats = len(re.findall(r"[*+{]|(?<!\()\?", pattern))
    if len(pattern) > 200 or repeats > _MOST_REPEATS or re.search(r"\)[*+{]", pattern):
        raise ValueError(
            f"{folder / CONFIG} has the pattern {short(pattern)!r}, which is too involved: "
            "name the layers in it"
        )
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise ValueError(f"{folder / CONFIG} has a broken pattern {short(pattern)!r}") from error


class _BaseNames:
    """Finds the tensor of a base that an adapter's layer changes.

    A model with a head may name its layers ``bert.encoder`` where the file of the model without
    one has ``encoder``.
    """

    def __init__(self, folder: Path, base: Path, found: Found) -> None:
        self._folder = folder
        self._base = base
        self._names = found.tensors
        self._by_end: dict[str, list[str]] = {}
        for name in found.tensors:
            parts = name.split(".")
            for start in range(1, len(parts) - 1):
                self._by_end.setdefault(".".join(parts[start:]), []).append(name)

    def of_layer(self, module: str) -> str:
        """The name of a layer's weight in the base.

        Raises:
            ValueError: if the base has no such layer, or several.
        """
        name = self.where(f"{module}.weight")
        if name is None:
            raise ValueError(
                f"{self._folder} changes {short(module)}, which the base {self._base} does not "
                "have: is it the base of this adapter?"
            )
        return name

    def where(self, name: str) -> str | None:
        """The name in the base of a tensor; None if it has none, or several that may be it."""
        if name in self._names:
            return name
        ends = self._by_end.get(name, [])
        if len(ends) == 1:
            return ends[0]
        parts = name.split(".")
        for start in range(1, len(parts) - 1):
            shorter = ".".join(parts[start:])
            if shorter in self._names:
                return shorter
        return None


def _add(found: Found, name: str, change: _Change) -> None:
    """Replace a weight of the base by that of the adapted layer, computed when it is needed."""
    x = found.tensors[name]
    if not x.is_floating_point() or x.element_size() < 2:
        raise ValueError(
            f"the base holds {short(name)} as {x.dtype}: an adapter is added to floating-point "
            "numbers; give a base that is not quantised"
        )
    _check_factors(name, tuple(x.shape), change)
    if name in found.loaders:
        found.loaders[name] = partial(_load_adapted, found.loaders[name], change, name)
    elif not x.is_meta:
        found.tensors[name] = _adapted(x, change, name)


def _load_adapted(load: Callable[[], Tensor], change: _Change, name: str) -> Tensor:
    return _adapted(load(), change, name)


def _check_factors(name: str, shape: tuple[int, ...], change: _Change) -> None:
    """Refuse factors whose product does not have the weight's shape, before it is computed."""
    small = {}
    for key, factor in change.factors.items():
        if not factor.is_floating_point():
            raise ValueError(f"the factor {key} of {short(name)} is {factor.dtype}, not floating")
        small[key] = factor.to("meta")
    try:
        delta = _delta(small, shape, change.transposed)
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"the factors of {short(name)} {shape} do not fit: {error}") from error
    if tuple(delta.shape) != shape:
        raise ValueError(
            f"the factors of {short(name)} give {tuple(delta.shape)}, the base has {shape}: "
            "is it the base of this adapter?"
        )


def _adapted(base: Tensor, change: _Change, name: str) -> Tensor:
    """The weight with the adapter added, in the dtype of the base.

    W + scale B A; with a magnitude m (DoRA) each row of that is given the length m.
    """
    dtype = torch.promote_types(base.dtype, torch.float32)
    factors = {key: factor.to(dtype) for key, factor in change.factors.items()}
    shape = tuple(base.shape)
    x = base.to(dtype) + change.scale * _delta(factors, shape, change.transposed)
    lengths = factors.get("lora_magnitude_vector")
    if lengths is not None:
        rows = x.T if change.transposed else x
        norms = torch.linalg.vector_norm(rows.flatten(1), dim=1)
        factor = lengths.flatten() / norms
        rows = rows * factor.view(-1, *[1] * (rows.ndim - 1))
        x = rows.T if change.transposed else rows
    return x.to(base.dtype).contiguous()


def _delta(factors: Mapping[str, Tensor], shape: tuple[int, ...], transposed: bool) -> Tensor:
    """What an adapter adds to a weight of a shape, without its scale."""
    if "lora_embedding_A" in factors:
        if "lora_magnitude_vector" in factors:
            raise ValueError("DoRA of an embedding is not read")
        return (factors["lora_embedding_B"] @ factors["lora_embedding_A"]).T
    if "lora_A" in factors:
        down, up = factors["lora_A"], factors["lora_B"]  # (r, in, *kernel), (out, r, 1, ...)
        delta = up.flatten(1) @ down.flatten(1)
    elif "hada_w1_a" in factors and "hada_t1" not in factors:
        first = factors["hada_w1_a"] @ factors["hada_w1_b"]
        delta = first * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    elif "lokr_w1" in factors or "lokr_w1_a" in factors:
        delta = torch.kron(_lokr(factors, "w1"), _lokr(factors, "w2"))
    else:
        raise ValueError(f"there are {listed(factors)}")
    if len(shape) > 2:
        return delta.reshape(shape)
    return delta.T if transposed else delta


def _lokr(factors: Mapping[str, Tensor], which: str) -> Tensor:
    """One of the two matrices of a Kronecker product, itself perhaps a product."""
    if f"lokr_{which}" in factors:
        return factors[f"lokr_{which}"].flatten(1)
    if "lokr_t2" in factors:
        raise ValueError("LoKr of a convolution's kernel is not read")
    return factors[f"lokr_{which}_a"] @ factors[f"lokr_{which}_b"]
