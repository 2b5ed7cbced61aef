"""How the weights in a file are read if the config.json beside them names a known type of model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_hsu._neurons import names, sizes
from lightning_hsu._neurons.candidates import full_name
from lightning_hsu._neurons.fused import Part, parts_of
from lightning_hsu._neurons.head_names import (
    LANGUAGE_HEAD,
    LAST_IN_TRANSFORMERS,
    TASK_HEADS,
)
from lightning_hsu._neurons.hints import Hint, Layers
from lightning_hsu._neurons.how import WeightRule
from lightning_hsu._neurons.model_types import (
    Config,
    ModelType,
    Sizes,
    first_size,
    is_number,
    row_of,
)
from lightning_hsu._neurons.orientation import Orientation
from lightning_hsu._neurons.shapes import Shapes
from lightning_hsu._neurons.table_names import (
    is_map_in_transformers,
    is_table_in_transformers,
    is_table_of_tokens,
    why_tokens_are_left_out,
)

Stacks = dict[str, dict[str, list[str]]]
"""Layers of one weight each that are one stack: their paths by the stack's path, then leaf."""

_LANGUAGE = re.compile(
    r"(?!Electra\w*PreTraining)\w*(LMHead|LMHeadModel|ForCausalLM|ForMaskedLM|MTModel|ForPreTraining"
    r"|ForConditionalGeneration|ForCausalImageModeling|DoubleHeadsModel|EncoderDecoderModel)"
)
"""Architectures with an output layer for words."""

_FIRST = (
    *("shared", "embeddings", "embed_tokens", "feature_extractor", "feature_projection"),
    *("text_model", "gate_proj", "up_proj"),
)
_LAST = (
    *("decoder", "mlp", "ffn", "block_sparse_moe", "fc1", "fc2", "dense_4h_to_h", "down_proj"),
    *("out_proj", "pooler", "quantizer", "project_hid", "project_q", "visual_projection"),
    "text_projection",
    *LAST_IN_TRANSFORMERS,
)
"""Modules that stand before, and after, those beside them: files are in alphabetical order."""

_EXPERT = re.compile(r"((?:.+\.)?experts)\.(\d{1,6})\.(\w+)")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_WIDTHS = ("embed_dim", "hidden_size", "n_embd", "d_model", "dim")


def known_model(
    config: Config | None, layers: Layers, by_rows: Collection[tuple[str, str]] = ()
) -> KnownModel | None:
    """What the config of a model tells of its layers; None if it does not name a known type.

    Args:
        config: What a config.json holds; nothing in it is trusted.
        layers: All tensors by layer.
        by_rows: Paths and names of weights whose outputs are rows, whatever their layer's class.
    """
    row = row_of(config)
    if config is None or row is None:
        return None
    return KnownModel(config, row, layers, by_rows)


class KnownModel:
    """Tells how the weights of a model of a known type are read.

    Args:
        config: What its config.json holds.
        row: What is known of its type.
        layers: All tensors by layer.
        by_rows: Paths and names of weights whose outputs are rows, whatever their layer's class:
            some formats of quantised weights fix it.
    """

    def __init__(
        self,
        config: Config,
        row: ModelType,
        layers: Layers,
        by_rows: Collection[tuple[str, str]] = (),
    ) -> None:
        self._row = row
        self._config = config
        self._layers = layers
        self._parts = _parts_of_config(config, row)
        self._by_rows = {*by_rows, *self._stored_by_rows()}
        self._owners: dict[str, nn.Module] = {}  # stand-ins by path
        self._children: dict[str, list[str]] = {}  # paths of layers by that of their parent
        for path in layers:
            self._children.setdefault(path.rpartition(".")[0], []).append(path)
        self._stacks, self._loose = self._expert_stacks()

    @property
    def stacks(self) -> Stacks:
        """Experts that are stored one by one, as the stacks that the model has."""
        return self._stacks

    def of_weight(self, path: str, leaf: str, shape: Sequence[int]) -> Hint | None:
        """What is known of one weight; None if nothing is."""
        row, config = self._part(path)
        name = path.rpartition(".")[2]
        if leaf in row.unread or leaf in self._row.unread:
            return Hint(why_not="it is not known along which axis its neurons lie")
        if path in self._stacks:
            return Hint(WeightRule(leaf), "other")
        if path == self._loose:
            return Hint(note="experts are stored one by one: each has sets of its own")
        if leaf != "weight":
            return self._of_parameter(path, leaf, shape)
        if len(shape) == 3 and name in ("input_linear", "output_linear"):
            return self._of_stack(path, shape)
        groups = _of_convolution(path, shape, row, config)
        if len(shape) != 2:
            return groups
        if name in row.columns and (path, leaf) not in self._by_rows:
            rule = WeightRule(leaf, columns=True, parts=self._fused(path, shape[1]))
            return Hint(rule, "linear")
        if name in row.padded:
            row_of_padding = _padding(config, row, shape[0])
            if row_of_padding is not None:
                take = partial(_without, row=row_of_padding)
                return Hint(WeightRule(leaf, parts=(Part("", take),)), "embedding")
        if is_table_in_transformers(name) or name in row.padded:
            return Hint(kind="embedding")
        parts = self._fused(path, shape[0])
        if parts or path == self._row.head:
            return Hint(WeightRule(leaf, parts=parts), "linear")
        if is_map_in_transformers(name):
            return Hint(kind="linear")
        return None

    def heads(self, paths: Iterable[str]) -> list[str]:
        """Paths of the layers that give the model's output.

        Args:
            paths: Paths of all layers with neurons.
        """
        here = set(paths)
        for path in self._head_paths():
            if path in here:
                return [path]
        if self._is_base():
            return []
        for path in TASK_HEADS:
            if path in here:
                return [path]
        return []

    def tied(self) -> tuple[str, str] | None:
        """Paths of an output layer that no tensor is stored for and of the embedding it is tied to.

        None if there is no such layer.
        """
        head = self._row.head
        says = [self._config.get("tie_word_embeddings")]
        for _, _, config in self._parts:
            says.append(config.get("tie_word_embeddings"))
        is_untied = says[0] is False and True not in says
        writes = head and _LANGUAGE.fullmatch(self._architecture()) is not None
        has_weight = any(self._has_weight(path) for path in self._head_paths())
        if not writes or is_untied or has_weight:
            return None
        tables = []
        for path, leaves in self._layers.items():
            is_table = self._row.table and f".{path}".endswith(f".{self._row.table}")
            weight = leaves.get("weight")
            if is_table and weight is not None and weight.ndim == 2:
                tables.append(path)
        if head.startswith("decoder."):
            tables = [path for path in tables if path.startswith("decoder.")]
        if len(tables) != 1:
            return None
        return head, tables[0]

    def not_stored(self) -> list[str]:
        """Paths of the tables that the model computes, which are not here to be read."""
        found = []
        for path in self._row.computed:
            above = path.rpartition(".")[0]
            is_of_this_model = any(one.startswith(f"{above}.") for one in self._layers)
            if is_of_this_model and path not in self._layers:
                found.append(path)
        return found

    def _head_paths(self) -> tuple[str, ...]:
        """Paths that the output layer of the language model has in files of any version."""
        head = self._row.head
        if not head:
            return ()
        return head, LANGUAGE_HEAD, f"language_model.{head}"

    def _has_weight(self, path: str) -> bool:
        """Whether a weight is stored for a layer: a bias may be stored alone."""
        return any(x.ndim > 1 for x in self._layers.get(path, {}).values())

    def in_order(self, paths: Iterable[str]) -> list[str]:
        """Paths in the order of the model as far as names tell: embeddings first, heads last."""
        seen: dict[tuple[str, ...], int] = {}
        places: dict[str, list[tuple[int, int, int]]] = {}
        for path in paths:
            parts = tuple(path.split("."))
            place = []
            for depth, part in enumerate(parts, start=1):
                first_seen = seen.setdefault(parts[:depth], len(seen))
                place.append((*_rank_of(part), first_seen))
            places[path] = place
        return sorted(places, key=places.__getitem__)

    def _architecture(self) -> str:
        """Name of the model's class; "" if it is not known."""
        given = self._config.get("architectures")
        if isinstance(given, (list, tuple)) and len(given) > 0 and isinstance(given[0], str):
            return given[0]
        return ""

    def _is_base(self) -> bool:
        """Whether the model's class has no output layer, as far as its name tells."""
        name = self._architecture()
        return name.endswith("Model") and _LANGUAGE.fullmatch(name) is None

    # Parts of a model with a config of their own.

    def _part(self, path: str) -> tuple[ModelType, Config]:
        """The row and the config of the part of the model that a layer is in."""
        top = path.split(".")[:3]
        for part in top:
            for words, row, config in self._parts:
                if any(word in part for word in words):
                    return row, config
        return self._parts[-1][1:]

    def _stored_by_rows(self) -> Iterator[tuple[str, str]]:
        """Paths and names of weights (out, in) of layers whose class in transformers has (in, out).

        Files of other libraries have them, as their biases show.
        """
        orientation = None
        shown = {}
        for path in self._layers:
            if path.rpartition(".")[2] in self._part(path)[0].columns:
                orientation = orientation or Orientation(Shapes(self._layers))
                shown[path] = orientation.shown(path)
        axes = set(shown.values())
        for path, axis in shown.items():
            if axis == "rows" or (axis is None and "rows" in axes and "columns" not in axes):
                yield path, "weight"

    # Stand-ins for modules that divide a projection.

    def _fused(self, path: str, outputs: int) -> tuple[Part, ...]:
        """The parts of a fused projection; () if it is none."""
        above, _, name = path.rpartition(".")
        return parts_of(self._owner(above), name, outputs)

    def _owner(self, path: str) -> nn.Module:
        """A stand-in for the module at a path: its class, sizes and the layers in it."""
        if path in self._owners:
            return self._owners[path]
        row, config = self._part(path)
        name = path.rpartition(".")[2]
        kind = type(row.owners.get(name, "Owner"), (nn.Module,), {})
        owner: nn.Module = kind()
        for key, value in _sizes_of(config, row).items():
            if not hasattr(owner, key):
                owner.__dict__[key] = value
        owner.__dict__["config"] = config
        if "cross" in name:
            owner.__dict__["is_cross_attention"] = True
        for leaf, x in self._layers.get(path, {}).items():
            if leaf.isidentifier() and not hasattr(owner, leaf):
                owner.__dict__[leaf] = torch.empty(x.shape, device="meta")
        for child in self._children.get(path, []):
            weight = self._layers.get(child, {}).get("weight")
            name = child.rpartition(".")[2]
            if weight is None or weight.ndim < 2 or hasattr(owner, name) or not name:
                continue
            if weight.ndim == 3:
                owner.__dict__[name] = torch.empty(weight.shape, device="meta")
                continue
            is_transposed = name in row.columns and (child, "weight") not in self._by_rows
            layer = nn.Module()
            layer.__dict__["out_features"] = weight.shape[int(is_transposed)]
            layer.__dict__["in_features"] = weight.shape[1 - int(is_transposed)]
            owner.add_module(name, layer)
        self._owners[path] = owner
        return owner

    # Experts.

    def _of_parameter(self, path: str, leaf: str, shape: Sequence[int]) -> Hint | None:
        """What is known of a bare parameter: experts as a stack, or one below the other."""
        if leaf == "codevectors":
            return Hint(kind="codebook")
        row, config = self._part(path)
        is_stack = len(shape) == 3 and leaf in ("gate_up_proj", "down_proj")
        is_packed = len(shape) == 2 and leaf in ("w1", "v1", "w2")
        if not is_stack and not is_packed:
            return _without_neurons(path, leaf, shape)
        owner = self._owner(path)
        if is_packed:
            rule = sizes.rule_by_sizes(owner, leaf, torch.empty(tuple(shape), device="meta"))
            if rule is None or rule.groups == 1:
                return None
            return Hint(rule, "other")
        columns = row.transposed
        if (path, leaf) in self._by_rows:
            columns = False
        if columns is None:
            columns = _reads_columns(leaf, shape, first_size(config, *_WIDTHS))
        outputs = shape[2] if columns else shape[1]
        rule = WeightRule(leaf, columns=columns, parts=parts_of(owner, leaf, outputs))
        return Hint(rule, "other")

    def _of_stack(self, path: str, shape: Sequence[int]) -> Hint:
        """A module whose weight is a stack of experts (experts, out, in)."""
        return Hint(WeightRule("weight", parts=self._fused(path, shape[1])), "other")

    def _expert_stacks(self) -> tuple[Stacks, str]:
        """The stacks of experts stored one by one, and the first layer that fits in none."""
        found: dict[str, dict[str, dict[int, str]]] = {}
        for path in self._layers:
            match = _EXPERT.fullmatch(path)
            if match is None:
                continue
            stack, number, name = match.groups()
            key = self._part(path)[0].experts.get(name)
            if key is not None:
                found.setdefault(stack, {}).setdefault(key, {})[int(number)] = path
        stacks: Stacks = {}
        loose = ""
        for stack, by_key in found.items():
            paths = {key: [one[i] for i in sorted(one)] for key, one in by_key.items()}
            if self._is_uniform(stack, by_key):
                stacks[stack] = paths
            elif not loose:
                loose = next(iter(paths.values()))[0]
        return stacks, loose

    def _is_uniform(self, stack: str, by_key: Mapping[str, Mapping[int, str]]) -> bool:
        """Whether experts are numbered from 0 and have plain weights of one shape and type."""
        if stack in self._layers:
            return False
        for one in by_key.values():
            if sorted(one) != list(range(len(one))):
                return False
            kinds = set()
            for path in one.values():
                leaves = self._layers[path]
                weight = leaves.get("weight")
                if weight is None or not set(leaves) <= {"weight", "bias"}:
                    return False
                kinds.add((tuple(weight.shape), weight.dtype, weight.layout, weight.is_meta))
                if weight.ndim != 2 or not weight.is_floating_point() or weight.itemsize < 2:
                    return False
            if len(kinds) > 1:
                return False
        return True


def _parts_of_config(
    config: Config, row: ModelType
) -> list[tuple[tuple[str, ...], ModelType, Config]]:
    """The configs within a config: words in the paths of their layers, rows; last the outer one."""
    found: list[tuple[tuple[str, ...], ModelType, Config]] = []
    outer = config
    for key, inner in config.items():
        if not isinstance(key, str) or not isinstance(inner, Mapping):
            continue
        stem, mark, _ = key.partition("_config")
        is_half = key in ("encoder", "decoder") and "model_type" in inner
        if not (mark or is_half) or not stem or stem.endswith(("attn", "ffn", "quantization")):
            continue
        words: tuple[str, ...] = (stem,)
        if stem == "vision":
            words = ("vision", "visual")
        if stem == "text":
            words = ("text", "language")
            if first_size(config, *_HEADS) is None:
                outer = inner
        found.append((words, row_of(inner) or row, inner))
    found.append(((), row, outer))
    return found


def _sizes_of(config: Config, row: ModelType) -> Sizes:
    """The sizes and flags that modules of this model have."""
    known: Sizes = {}
    for source in (config.get("ffn_config"), config):
        if not isinstance(source, Mapping):
            continue
        for key, value in source.items():
            is_name = isinstance(key, str) and key.isidentifier() and not key.startswith("_")
            if is_name and is_number(value):
                known[key] = value
    width, heads = first_size(known, *_WIDTHS), first_size(known, *_HEADS)
    if width is not None:
        known.setdefault("hidden_size", width)
        known.setdefault("embed_dim", width)
    if width is not None and heads is not None and first_size(known, "head_dim") is None:
        known["head_dim"] = width // heads
    if row.sizes is not None:
        for key, value in row.sizes(known).items():
            if value is not None:
                known[key] = value
    return known


def _without_neurons(path: str, leaf: str, shape: Sequence[int]) -> Hint | None:
    """Why a bare parameter holds no neurons, as its name says; None if it does not."""
    weight = torch.empty(tuple(shape), device="meta")
    reason = names.why_no_neurons(nn.Module(), leaf, weight)
    if reason is None and sizes.is_factor(leaf):
        reason = names.NO_DIRECTIONS
    if reason is None and leaf.endswith("_ids"):
        reason = "numbers of tokens or positions"
    if reason is None and is_table_of_tokens(leaf, weight):
        reason = why_tokens_are_left_out(full_name(path, leaf))
    if reason is None:
        return None
    return Hint(why_not=reason)


def _reads_columns(leaf: str, shape: Sequence[int], width: int | None) -> bool:
    """Whether a stack of experts is (experts, in, out), as the width of the model tells."""
    if shape[1] == shape[2] or width not in shape[1:]:
        return False
    reads = leaf != "down_proj"  # from the width of the model; the other one writes to it
    return (shape[1] == width) == reads


def _of_convolution(path: str, shape: Sequence[int], row: ModelType, config: Config) -> Hint | None:
    """A convolution whose groups the config tells."""
    if len(shape) != 3:
        return None
    for name, key in row.groups.items():
        groups = first_size(config, key)
        if f".{name}." in f".{path}." and groups is not None and shape[0] % groups == 0:
            return Hint(WeightRule("weight", kernels=True, groups=groups), "convolution")
    return None


def _padding(config: Config, row: ModelType, rows: int) -> int | None:
    """The row of an embedding for the padding, counted from the first; None if there is none."""
    value = config.get("pad_token_id", row.padding)
    if isinstance(value, bool) or not isinstance(value, int) or not -rows <= value < rows:
        return None
    return value % rows


def _without(neurons: Tensor, row: int) -> Tensor:
    """Neurons (n, d) without one of them."""
    if row == 0:
        return neurons[1:]
    if row == len(neurons) - 1:
        return neurons[:row]
    return torch.cat([neurons[:row], neurons[row + 1 :]])


def _rank_of(part: str) -> tuple[int, int]:
    """Where a module stands among those beside it: by its name, then by its number."""
    rank = 0
    if part in _FIRST:
        rank = _FIRST.index(part) - len(_FIRST)
    elif part in _LAST:
        rank = 1 + _LAST.index(part)
    number = 0
    if part.isascii() and part.isdigit() and len(part) < 7:
        number = int(part)
    return rank, number
