"""The parts of fused projections of a state dict, where the shapes beside them tell.

A stand-in for the module that owns a projection is made from the shapes, with the sizes that follow
from them; :mod:`~lightning_hsu._neurons.fused` then reads it as it reads a model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lightning_hsu._neurons.candidates import Kind, full_name
from lightning_hsu._neurons.fused import FUSED_NAMES, Parts, contiguous, parts_of
from lightning_hsu._neurons.hints import Hint
from lightning_hsu._neurons.how import WeightRule
from lightning_hsu._neurons.shapes import Shape, Shapes, below, words
from lightning_hsu._neurons.weights import key_of

_LEVELS = 4  # from a projection up to the module that divides it
_CONTAINERS = ("lins", "layers")  # names of containers between a projection and its owner
_OUTPUT_PROJECTIONS = (
    "proj",
    "o_proj",
    "out_proj",
    "c_proj",
    "projection",
    "project",
    "to_out",
    "dense",
)
_QUERIES_KEYS_VALUES = (
    "qkv",
    "Wqkv",
    "qkv_proj",
    "qkv_linear",
    "attn_qkv",
    "att_proj",
    "to_qkv",
    "to_added_qkv",
    "c_attn",
)
_KEYS_VALUES = ("kv", "to_kv", "to_added_kv", "kv_proj", "linear_kv")
_HALVED = (
    "fc1",
    "linear_1",
    "proj_in",
    "ff_in",
    "swish_linear",
    "linear_in",
)
"""Projections that may hold a gate, whose order their name does not tell."""
_FOLLOWING = {
    "fc1": "fc2",
    "linear_1": "linear_2",
    "proj_in": "proj_out",
    "ff_in": "ff_out",
    "swish_linear": "linear_out",
    "linear_in": "linear_out",
}
_BY_HEADS = ("query_key_value", "queries_keys_values", "keys_values", "in_proj_qkvz", "in_proj_ba")
"""Projections whose parts lie head by head."""
_WITH_GATE = "one set, though it seems to hold a gate too; for its halves"
_UNKNOWN = "report the model itself, or give its config.json"


class _Owner(nn.Module):
    """Stands for the module that owns a projection."""


class GLU(_Owner):
    """Stands for a gated activation with its projection inside."""


class ShortConv(_Owner):
    """Stands for a short convolution between two gates."""


@dataclass
class _Matrices:
    """The matrices of the children of a path, each child's only one.

    Args:
        of_child: Their shapes (out, in) by the path of the child.
        shapes: How many there are of each shape.
        outputs: How many there are of each number of outputs.
        inputs: How many there are of each number of inputs.
    """

    of_child: dict[str, Shape] = field(default_factory=dict)
    shapes: Counter[Shape] = field(default_factory=Counter)
    outputs: Counter[int] = field(default_factory=Counter)
    inputs: Counter[int] = field(default_factory=Counter)

    def add(self, child: str, shape: Shape) -> None:
        """Add the matrix of a child."""
        self.of_child[child] = shape
        self.shapes[shape] += 1
        self.outputs[shape[0]] += 1
        self.inputs[shape[1]] += 1


class StoredParts:
    """Tells the parts of fused projections.

    Args:
        shapes: The shapes of all tensors.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._owners: dict[str, _Owner] = {}
        self._alone: dict[str, bool] = {}  # whether a path has a single matrix
        self._matrices: dict[str, _Matrices] = {}  # by the path that they are below

    def divided(
        self, path: str, leaf: str, shape: Shape, rule: WeightRule, kind: Kind, note: str = ""
    ) -> Hint | None:
        """How a weight is read that may be a fused projection; None if it is none.

        Args:
            path: Path of its layer.
            leaf: Its name.
            shape: Its shape.
            rule: How it is read as a whole.
            kind: The kind of its layer.
            note: What is to be said of how it is read as a whole.
        """
        if leaf == "in_proj_weight" and not rule.columns:  # of torch's attention
            return None
        path_of_weight = path if leaf in ("weight", "kernel") else below(path, leaf)
        if not names_of(path, leaf) & FUSED_NAMES:
            return self._as_one_set(path_of_weight, leaf, shape, rule, kind, note)
        outputs, inputs = rule.arrange(torch.empty(shape, device="meta")).shape[-2:]
        path_of_weight = path_of_weight.removesuffix(".base_layer")  # of an adapter
        owner_path, name, parts = self._parts(path_of_weight, outputs, inputs)
        set_name = full_name(path, key_of(leaf))
        if parts:
            doubt = self._doubt(owner_path, name, rule)
            both = "; ".join(one for one in (note, doubt) if one)
            return Hint(replace(rule, parts=parts), kind, both)
        doubt = self._why_whole(owner_path, name, outputs, shape, set_name)
        if not doubt:
            return self._as_one_set(path_of_weight, leaf, shape, rule, kind, note)
        both = "; ".join(one for one in (note, doubt) if one)
        return Hint(rule, kind, both)

    def _as_one_set(
        self, path: str, leaf: str, shape: Shape, rule: WeightRule, kind: Kind, note: str
    ) -> Hint | None:
        """A note on what is read as one set, if its name or what follows says that it is several."""
        named = _as_its_name_says(path, rule, kind, note)
        is_matrix = leaf in ("weight", "kernel") and len(shape) == 2
        if named is not None or not is_matrix:
            return named
        outputs, inputs = rule.arrange(torch.empty(shape, device="meta")).shape
        if not self._is_halved(path, outputs, inputs):
            return None
        name = full_name(path, key_of(leaf))
        doubt = f"{_WITH_GATE}: neurons={{'{name}': 2}}"
        return Hint(rule, kind, "; ".join(one for one in (note, doubt) if one))

    def _is_halved(self, path: str, outputs: int, inputs: int) -> bool:
        """Whether a matrix of the same block takes half of what one gives, and leads back."""
        above = path.rpartition(".")[0]
        half = outputs // 2
        is_wide = outputs % 2 == 0 and outputs > inputs and half > 1
        if not is_wide or not above or self._shapes.is_list(above):
            return False
        matrices = self._matrices_below(above)
        gives_the_half = matrices.outputs[half]
        takes_all = matrices.inputs[outputs]
        leads_back = matrices.shapes[inputs, half]
        own = matrices.of_child.get(path)
        if own is not None:  # it is not beside itself
            gives_the_half -= own[0] == half
            takes_all -= own[1] == outputs
            leads_back -= own == (inputs, half)
        if takes_all or gives_the_half:
            return False  # nothing is halved, or that is where the half comes from
        return leads_back > 0

    def _matrices_below(self, path: str) -> _Matrices:
        """The matrices of the children of a path."""
        if path not in self._matrices:
            matrices = _Matrices()
            for child in self._shapes.children(path):
                inside = self._shapes.weight_inside(child)
                shape = self._shapes.of(inside) if inside is not None else None
                if shape is not None and len(shape) == 2:
                    matrices.add(child, shape)
            self._matrices[path] = matrices
        return self._matrices[path]

    def _parts(self, path: str, outputs: int, inputs: int) -> tuple[str, str, Parts]:
        """The owner of a projection, the projection's name in it, and its parts."""
        nearest = path.rpartition(".")
        above = nearest[0]
        name = nearest[2]
        fallback = (above, name)
        for _ in range(_LEVELS):
            parts = self._parts_in(above, name, outputs, inputs)
            if parts:
                return above, name, parts
            if name in _QUERIES_KEYS_VALUES or name in _BY_HEADS:
                fallback = (above, name)
            is_container = self._shapes.is_list(above) or above.rpartition(".")[2] in _CONTAINERS
            if not above or not (is_container or self._is_alone(above)):
                break
            above, _, name = above.rpartition(".")
        return *fallback, ()

    def _parts_in(self, above: str, name: str, outputs: int, inputs: int) -> Parts:
        """The parts of a projection, as one possible owner divides them."""
        owner = self._owner(above)
        child = owner._modules.get(name)
        if child is not None:
            child.__dict__["in_features"] = inputs
        self._add_sizes(owner, above, name, outputs)
        sizes = self._sizes_of_parts(above, name, outputs)
        if sizes:
            return contiguous(outputs, sizes)
        return parts_of(owner, name, outputs)

    def _is_alone(self, above: str) -> bool:
        """Whether a path has a single child with a matrix, and none of its own."""
        if above not in self._alone:
            count = 0
            for leaf, shape in self._shapes.leaves(above).items():
                count += len(shape) > 1 and "bias" not in leaf
            for child in self._shapes.children(above):
                count += any(len(shape) > 1 for shape in self._shapes.leaves(child).values())
                count += self._shapes.count_below(child) > 0
            self._alone[above] = count <= 1
        return self._alone[above]

    def _owner(self, path: str) -> _Owner:
        """A stand-in for the module at a path, with what is below it."""
        if path in self._owners:
            return self._owners[path]
        owner = self._kind_of_owner(path)()
        for leaf, shape in self._shapes.leaves(path).items():
            if len(shape) > 1 or leaf == "A_log":
                owner.__dict__[leaf] = torch.empty(shape, device="meta")
        for name in self._shapes.names_below(path):
            child = _layer(self._shapes.of(below(path, name)))
            for inner in self._shapes.names_below(below(path, name)):
                inside = self._shapes.of(f"{below(path, name)}.{inner}")
                if inside is not None:
                    child._modules[inner] = _layer(inside)
            owner._modules[name] = child
        self._owners[path] = owner
        return owner

    def _kind_of_owner(self, path: str) -> type[_Owner]:
        """The class of a stand-in, where what is around it tells that it is one of these."""
        shapes = self._shapes
        if shapes.names_below(path) == ["proj"]:
            inside = shapes.of(f"{path}.proj")
            following = self._following(path)
            outer = shapes.of(following) if following is not None else None
            if inside is not None and len(inside) == 2 and outer is not None:
                is_halved = inside[0] == 2 * outer[-1]
                if is_halved:
                    return GLU
        kernel = shapes.of(f"{path}.conv")
        has_kernel = kernel is not None and len(kernel) == 3 and kernel[1] == 1
        if has_kernel and shapes.has(path, "out_proj") and not shapes.of(path, "A_log"):
            return ShortConv
        return _Owner

    def _following(self, path: str) -> str | None:
        """The layer after one, by its number or by the names of a gated MLP."""
        above, _, name = path.rpartition(".")
        if name in _FOLLOWING:
            return self._shapes.weight_inside(below(above, _FOLLOWING[name]))
        return self._shapes.after(path) if self._shapes.is_list(above) else None

    def _add_sizes(self, owner: _Owner, path: str, name: str, outputs: int) -> None:
        """Add the sizes to a stand-in that its shapes tell."""
        shapes = self._shapes
        known = owner.__dict__
        if f"{name}_bias" in shapes.leaves(path) and name == "gate_up_proj":
            known["is_concatenated"] = False  # as GPT-OSS has them
        kernel = shapes.of(path, "A_log")
        after = self._inputs_of(path, *_OUTPUT_PROJECTIONS)
        if kernel is not None and after is not None:
            known["intermediate_size"] = after
            if len(kernel) == 2:
                known["ssm_state_size"] = kernel[1]
                rank = self._inputs_of(path, "dt_proj")
                if rank is not None:
                    known["time_step_rank"] = rank
            convolution = shapes.of(f"{path}.conv1d")
            if len(kernel) == 1 and convolution is not None:
                known["num_heads"] = kernel[0]
                known["n_groups"] = 1
                known["ssm_state_size"] = (convolution[0] - after) // 2
        biases = shapes.of(path, "attention_biases")
        if biases is not None and len(biases) == 2 and after is not None:
            self._add_sizes_of_levit(known, name, outputs, biases[0], after)
        if name == "kqv_lin" and outputs % 3 == 0:
            known["out_channels"] = outputs // 3
        rank = shapes.norm(f"{path}.kv_a_layernorm")
        if rank is not None:
            self._add_sizes_of_latent(known, path, rank)

    def _add_sizes_of_levit(
        self, known: dict[str, object], name: str, outputs: int, heads: int, inputs: int
    ) -> None:
        """The sizes of a head of LeViT, whose values are larger than its keys."""
        if outputs % heads != 0 or inputs % heads != 0:
            return
        value = inputs // heads
        keys = 2 if name in ("qkv", "queries_keys_values") else 1
        rest = outputs // heads - value
        if rest < keys or rest % keys != 0:
            return
        known["num_heads"] = heads
        known["num_attention_heads"] = heads
        known["key_dim"] = rest // keys
        known["val_dim"] = value
        known["attention_ratio"] = (value + 0.5) / (rest // keys)

    def _add_sizes_of_latent(self, known: dict[str, object], path: str, rank: int) -> None:
        """The sizes of a head of latent attention."""
        down = self._outputs_of(path, "kv_a_proj_with_mqa")
        up = self._outputs_of(path, "kv_b_proj")
        queries = self._outputs_of(path, "q_b_proj", "q_proj")
        values = self._inputs_of(path, "o_proj")
        if down is None or down <= rank:
            return
        rotary = down - rank
        known["kv_lora_rank"] = rank
        known["qk_rope_head_dim"] = rotary
        if up is None or queries is None or values is None:
            return
        of_rotary = queries - (up - values)  # rows of all heads
        if of_rotary <= 0 or of_rotary % rotary != 0:
            return
        heads = of_rotary // rotary
        known["num_heads"] = heads
        known["qk_nope_head_dim"] = (up - values) // heads
        known["v_head_dim"] = values // heads

    def _sizes_of_parts(self, path: str, name: str, outputs: int) -> dict[str, int | None]:
        """Fewer keys and values than queries, as the projection after attention shows."""
        if name not in ("Wqkv", "qkv_proj"):
            return {}
        queries = self._inputs_of(path, *_OUTPUT_PROJECTIONS)
        if queries is None or self._shapes.of(path, "attention_biases") is not None:
            return {}
        rest = outputs - queries
        keys = rest // 2
        if rest <= 0 or rest % 2 or queries % keys or keys == queries:
            return {}
        return {"q": queries, "k": keys, "v": keys}

    def _doubt(self, path: str, name: str, rule: WeightRule) -> str:
        """What else the parts of a projection may be; "" if what is beside it shows them."""
        leaves = self._shapes.leaves(path)
        if name == "gate_up_proj" and len(leaves.get(f"{name}_bias", ())) == 2:
            return "its gate and up are taken in turns, as GPT-OSS has them"
        if name not in _QUERIES_KEYS_VALUES or "attention_biases" in leaves:
            return ""
        is_shown = True
        if name == "c_attn":
            is_shown = rule.columns
        elif name == "qkv_proj":
            is_shown = not self._shapes.has(path, "out_proj")  # of CodeGen
        elif name == "qkv":
            has_output = self._shapes.has(path, "proj") or self._shapes.has(path, "project")
            is_shown = has_output and not self._shapes.has(path, "rel_pos")  # of MaxViT
        if is_shown:
            return ""
        return f"read as q | k | v; some models hold them per head: {_UNKNOWN}"

    def _why_whole(self, path: str, name: str, outputs: int, shape: Shape, set_name: str) -> str:
        """Why a projection that looks fused is read as one set; "" if it does not look so."""
        has_states = "A_log" in self._shapes.leaves(path)
        if name == "in_proj" and has_states:
            return f"one set, though it seems to hold several parts: {_UNKNOWN}"
        is_attention = name == "in_proj"
        taken = None
        if is_attention and len(shape) == 2:
            taken = self._inputs_of(path, "out_proj", "attn_out_proj")
        if taken is not None and outputs > taken and outputs != 3 * min(shape):
            return f"one set, though it seems to hold several parts: {_UNKNOWN}"
        if name in _BY_HEADS or (is_attention and outputs == 3 * min(shape)):
            return f"one set: its parts lie head by head, and nothing tells the heads: {_UNKNOWN}"
        is_wide = len(shape) == 2 and outputs > min(shape)
        if name in _QUERIES_KEYS_VALUES and is_wide:
            return f"one set, though its name says q, k and v: {_UNKNOWN}"
        if name in _KEYS_VALUES and outputs % 2 == 0 and len(shape) == 2:
            return f"one set, though its name says k and v: {_UNKNOWN}"
        if name in _HALVED and len(shape) == 2:
            inputs = self._inputs_of(path, _FOLLOWING[name])
            if inputs is not None and outputs == 2 * inputs:
                return f"{_WITH_GATE}: neurons={{'{set_name}': 2}}"
        if name == "q_proj" and len(shape) == 2:
            inputs = self._inputs_of(path, "o_proj")
            if inputs is not None and outputs == 2 * inputs:
                return f"one set, though it seems to hold a gate too: {_UNKNOWN}"
        return ""

    def _inputs_of(self, path: str, *names: str) -> int | None:
        """The inputs of the first of these children that there is."""
        shape = self._shape_of(path, *names)
        return None if shape is None else shape[1]

    def _outputs_of(self, path: str, *names: str) -> int | None:
        """The outputs of the first of these children that there is."""
        shape = self._shape_of(path, *names)
        return None if shape is None else shape[0]

    def _shape_of(self, path: str, *names: str) -> Shape | None:
        """The shape of the weight of the first of these children that there is."""
        for name in names:
            inside = self._shapes.weight_inside(below(path, name))
            if inside is not None:
                return self._shapes.of(inside)
        return None


def _as_its_name_says(path: str, rule: WeightRule, kind: Kind, note: str) -> Hint | None:
    """A note on what is read as one set, if its name is that of several; None if it is not."""
    name = path.rpartition(".")[2].lower()
    held = ""
    if "qkv" in name or "kqv" in name:
        held = "q, k and v"
    elif name.removesuffix("_proj").endswith("kv_b"):
        held = "k and v"
    elif {"gate", "up"} <= words(name):
        held = "gate and up"
    if not held:
        return None
    doubt = f"one set, though its name says {held}: {_UNKNOWN}"
    return Hint(rule, kind, "; ".join(one for one in (note, doubt) if one))


def names_of(path: str, leaf: str) -> set[str]:
    """The names under which a weight may be a projection of what it is in."""
    return {leaf, *path.split(".")[-_LEVELS - 1 :]}


def _layer(shape: Shape | None) -> nn.Module:
    """Stands for a layer with a weight (out, in, ...)."""
    layer = nn.Module()
    if shape is None or len(shape) < 2:
        return layer
    outputs, inputs = shape[:2]
    if len(shape) == 3:  # a stack of matrices
        outputs, inputs = shape[1:]
    layer.__dict__["in_features"] = inputs
    layer.__dict__["out_features"] = outputs
    return layer
