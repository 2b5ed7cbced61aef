r"""The parts of fused projections, where the sizes of their owner give them away.

Keys stand in the order of the rows. "A | B" is contiguous blocks, "per head" is blocks of every
part for one head after the other, "row by row" takes the parts in turns. "gate" is the part that
goes through the activation (as in GELU(gate) * up), "up" the other one.

| projection | owners | parts | layout |
|---|---|---|---|
| `qkv`, `Wqkv`, `qkv_proj`, `qkv_linear`, `attn_qkv`, `att_proj`, `in_proj_weight` | attention of timm, torchvision, open_clip, SAM, BLIP, ViTs, MPT, ModernBERT | q, k, v | q \| k \| v |
| the same, fewer heads of keys and values | Phi-3, Phi-4, DBRX, EXAONE 4.5 | q, k, v | q \| k \| v |
| the same, with `head_first=True` | timm MaxViT, CoAtNet | q, k, v | per head |
| the same, with `key_dim` and `val_dim` | timm LeViT, EfficientFormer, TinyViT | q, k, v | per head |
| `qkv_proj` | MobileViTv2 | q (one neuron), k, v | q \| k \| v |
| `qkv_proj` | CodeGen | q, v, k | per shard: q \| v \| k |
| `qkv_proj` | MiniMax lightning attention | q, k, v | per head |
| `qkv` | timm LiteMLA, guided-diffusion's `QKVAttentionLegacy` | q, k, v | per head |
| `qkv` | MMAudio | q, k, v | row by row |
| `proj` | EsmFoldSelfAttention | q, k, v | per head |
| `in_proj` | DeBERTa (v1) | q, k, v | per head |
| `c_attn` | GPT-2, ImageGPT, GPT, GPTBigCode with `multi_query` | q, k, v (k, v in cross-attention) | q \| k \| v |
| `c_attn` | GPTBigCode without `multi_query` | q, k, v | per head |
| `query_key_value` | BLOOM, GPT-NeoX, Persimmon, Falcon | q, k, v | per head |
| `query_key_value` | Falcon (new architecture) | q, k, v | per head of k |
| `query_key_value` | Falcon and ChatGLM with `multi_query` | q, k, v | q \| k \| v |
| `to_qkv`, `to_added_qkv` | diffusers (`fuse_projections`), MaxViT of torchvision | q, k, v | q \| k \| v |
| `to_qkv`, `to_kv`, `to_q` with `use_differential` | Stable Audio 3 | q1, q2, k1, k2, v; k1, k2, v; q1, q2 | contiguous |
| `to_qkv_mlp_proj` | Flux 2 | q, k, v, gate, up | contiguous |
| `in_proj` with `in_split` | timm ParallelScalingBlock | mlp, q, k, v | contiguous |
| `kv`, `to_kv`, `to_added_kv`, `kv_proj` | PVTv2, Twins, VOLO, perceivers, JetMoe, diffusers | k, v | k \| v |
| `qkv` with `use_global` | timm GCViT | k, v | k \| v |
| `qkv` | timm LambdaLayer, BottleneckAttn, SHViT | q, k, v of sizes of their own | q \| k \| v |
| `queries_keys_values`, `keys_values` | LeViT of transformers | q, k, v; k, v | per head |
| `kqv_lin` | HGT of torch_geometric | k, q, v | k \| q \| v |
| `kv` | timm LeViT, HaloAttn | k, v | per head |
| `linear_kv` | invariant point attention | k, v | per head |
| `qk` | ConViT, TNT | q, k | q \| k |
| `kv_a_proj_with_mqa` | latent attention (DeepSeek) | kv, k_rope | kv \| k_rope |
| `kv_b_proj` | latent attention (DeepSeek) | k, v | per head |
| `q_proj` | Qwen3-Next, Qwen3.5 | q, gate | per head |
| `in_proj_qkv`; `in_proj_qkvz`, `in_proj_ba` | gated delta nets | q, k, v; q, k, v, z and b, a | contiguous; per head of k |
| `gate_up_proj`, `Wi`, `w12`, `weights_in`, `input_linear`, `linear_in` | gated MLPs: Phi-3, GLM, ModernBERT, DINOv2, GraniteMoe, Flux 2 | gate, up | gate \| up |
| `gate_up_proj` of experts | Mixtral, Qwen-MoE, Llama 4, ... | gate, up | gate \| up |
| `gate_up_proj` of experts with `is_concatenated=False` | GPT-OSS | gate, up | row by row |
| `fc1` | timm GluMlp (by `gate_last`), gMLP, Moonshine, MambaOut | gate, up or up, gate | contiguous |
| `linear_1`, `proj_in`, `ff_in`, `swish_linear`, `conv_inverted` | Aya Vision, Stable Audio 3, MiniMax Music, RFD4, Sana | up, gate | up \| gate |
| `proj`, `lin`, `linear`, `fc` of a class called GLU | GEGLU and SwiGLU of diffusers, x_transformers, TFT | up, gate | up \| gate |
| before `nn.GLU` | Sequential(Linear, GLU), conformers | up, gate | up \| gate |
| `in_proj`; `x_proj` | Mamba, FalconMamba, Jamba | x, z; dt, B, C | contiguous |
| `in_proj` | Zamba | x, z | row by row |
| `in_proj` | Mamba-2, Bamba, Zamba2, FalconH1, Granite 4, Nemotron-H | z, x, B, C, dt | contiguous |
| `in_proj` | short convolutions of LFM2 | B, C, x | contiguous |
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile, islice

from torch import Tensor, nn

Sizes = Mapping[str, "int | None"]
"""Rows of each part, in order; None where the owner does not say."""


@dataclass(frozen=True)
class Part:
    """One part of a fused projection.

    Args:
        key: "q", "k", "v", "gate", "up", "x", "z", ...
        take: Takes the neurons (..., n, d) of the whole projection and returns those of this part,
            (..., n_part, d): a view where its rows are contiguous or evenly spaced.
    """

    key: str
    take: Callable[[Tensor], Tensor]


Parts = tuple[Part, ...]


def parts_of(owner: nn.Module, name: str, outputs: int) -> Parts:
    """The parts of a fused projection, in the order of its rows.

    Args:
        owner: The module that divides the outputs: the parent of a Linear, or of a small module
            with a layer and its normalization, or the one with a stacked Parameter.
        name: The projection's name in ``owner``.
        outputs: Number of its output units, for a stack that of one expert.

    Returns:
        The parts; () if the projection is not fused, or if the sizes of its owner do not tell.
        Together the parts have every row once.

    Example:
        >>> block = nn.Module()
        >>> block.num_heads, block.head_dim = 2, 4
        >>> block.qkv = nn.Linear(8, 24)
        >>> [(part.key, *part.take(block.qkv.weight).shape) for part in parts_of(block, "qkv", 24)]
        [('q', 8, 8), ('k', 8, 8), ('v', 8, 8)]
        >>> parts_of(block, "qkv", 25)
        ()
    """
    projection = _Projection(owner, name, outputs)
    if projection.is_grouped:
        return ()
    for classes, names, recognise in _BY_CLASS:
        if name in names and projection.owned_by(classes):
            return recognise(projection)
    if name in _BY_NAME:
        return _BY_NAME[name](projection)
    return _before_glu(projection)


# Layouts


def contiguous(outputs: int, sizes: Sizes) -> Parts:
    """One block of rows after the other; () unless they add up to the outputs."""
    rows = _known(sizes)
    if rows is None or sum(rows.values()) != outputs:
        return ()
    parts = []
    start = 0
    for key, size in rows.items():
        parts.append(Part(key, partial(_block, start=start, size=size)))
        start += size
    return tuple(parts)


def per_head(outputs: int, sizes: Sizes, heads: int | None) -> Parts:
    """For one head after the other, a block of each part; () unless they add up to the outputs."""
    rows = _known(sizes)
    if rows is None or heads is None or heads * sum(rows.values()) != outputs:
        return ()
    parts = []
    start = 0
    for key, size in rows.items():
        take = partial(_block_per_head, heads=heads, start=start, size=size)
        parts.append(Part(key, take))
        start += size
    return tuple(parts)


def row_by_row(outputs: int, *keys: str) -> Parts:
    """The parts in turns: two parts have the even and the odd rows."""
    step = len(keys)
    if outputs % step != 0:
        return ()
    parts = []
    for first, key in enumerate(keys):
        parts.append(Part(key, partial(_every, step=step, first=first)))
    return tuple(parts)


def equal(outputs: int, *keys: str) -> Parts:
    """Contiguous parts of one size."""
    return contiguous(outputs, dict.fromkeys(keys, outputs // len(keys)))


def _known(sizes: Sizes) -> dict[str, int] | None:
    """The sizes, if all of them are known and positive."""
    known = {}
    for key, size in sizes.items():
        if size is None or size < 1:
            return None
        known[key] = size
    return known


def _block(neurons: Tensor, start: int, size: int) -> Tensor:
    return neurons.narrow(-2, start, size)


def _block_per_head(neurons: Tensor, heads: int, start: int, size: int) -> Tensor:
    *groups, rows, entries = neurons.shape
    by_head = neurons.reshape(*groups, heads, rows // heads, entries)
    return by_head.narrow(-2, start, size).flatten(-3, -2)


def _every(neurons: Tensor, step: int, first: int) -> Tensor:
    return neurons[..., first::step, :]


# What a module says of its sizes

_HEADS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "heads",
    "num_attention_heads_per_partition",
)
_HEAD_DIM = (
    "head_dim",
    "dim_head",
    "dim_heads",
    "head_size",
    "attention_head_size",
    "head_width",
    "hidden_size_per_attention_head",
)
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_kv_heads")
_WIDTHS = (
    "attn_dim",
    "attention_dim",
    "all_head_size",
    "inner_dim",
    "dim_out",
    "output_dim",
    "split_size",
    "embed_dim",
    "hidden_size",
    "dim",
)  # of the queries, in modules that do not give the size of a head
_OUTPUT_PROJECTIONS = ("proj", "o_proj", "out_proj", "c_proj", "to_out", "dense", "Wo")


@dataclass(frozen=True)
class _Projection:
    """A projection and what its owner says about it; never raises for odd attributes."""

    owner: nn.Module
    name: str
    outputs: int

    def owned_by(self, classes: str) -> bool:
        """Whether the owner's class, or one that it inherits from, has a name of this pattern.

        Wrappers such as FSDP make a subclass.
        """
        return any(re.fullmatch(classes, kind.__name__) for kind in type(self.owner).__mro__)

    def size(self, *names: str) -> int | None:
        """The first positive number among these attributes, of the owner or of its config."""
        config = _attribute(self.owner, "config")
        for source in (self.owner, config, _attribute(config, "attn_config")):
            size = _first_size(source, names)
            if size is not None:
                return size
        return None

    def own_size(self, *names: str) -> int | None:
        """The same for attributes of the owner alone."""
        return _first_size(self.owner, names)

    def flag(self, name: str) -> bool | None:
        """A True or False of the owner; None if it has none of that name."""
        value = _attribute(self.owner, name)
        if isinstance(value, bool):
            return value
        return None

    @property
    def heads(self) -> int | None:
        return self.own_size(*_HEADS) or self.size(*_HEADS)

    @property
    def head_dim(self) -> int | None:
        return self.own_size(*_HEAD_DIM) or self.size(*_HEAD_DIM)

    @property
    def kv_heads(self) -> int | None:
        return self.own_size(*_KV_HEADS) or self.size(*_KV_HEADS)

    @property
    def inputs(self) -> int | None:
        return self.inputs_of(self.name)

    def inputs_of(self, name: str) -> int | None:
        """Number of inputs of a child, or of a matrix of the owner."""
        child = _attribute(self.owner, name)
        if isinstance(child, Tensor) and child.ndim == 2:
            return child.shape[1]
        return _first_inside(child, ("in_features", "in_channels", "nx", "input_size"))

    def outputs_of(self, *names: str) -> int | None:
        """Number of outputs of the first of these children that there is."""
        for name in names:
            child = _attribute(self.owner, name)
            size = _first_inside(child, ("out_features", "out_channels", "nf"))
            if size is not None:
                return size
        return None

    @property
    def is_grouped(self) -> bool:
        """Whether it is a convolution whose outputs do not all see the same inputs."""
        groups = _first_inside(_attribute(self.owner, self.name), ("groups",))
        return groups is not None and groups > 1

    def width(self, parts: int) -> int | None:
        """The size of each of so many equal parts, where the owner says so.

        Its heads are believed more than its inputs: keys and values may be of another size.
        """
        size = self.outputs // parts
        if self.outputs % parts != 0:
            return None
        if self.heads is not None and self.head_dim is not None:
            if self.heads * self.head_dim != size:
                return None
            return size
        if self.heads is not None and size % self.heads != 0:
            return None
        if self.inputs == size:
            return size
        for name in _WIDTHS:
            if self.own_size(name) == size:
                return size
        for name in _OUTPUT_PROJECTIONS:
            if self.inputs_of(name) == size:
                return size
        return None


def _attribute(source: object, name: str) -> object:
    """An attribute, or an entry of a mapping; None if there is none, or if it cannot be read."""
    if isinstance(source, Mapping):
        return source.get(name)
    try:
        return getattr(source, name, None)
    except Exception:  # a property may do anything
        return None


def _first_size(source: object, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a positive number."""
    for name in names:
        value = _attribute(source, name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _first_inside(source: object, names: tuple[str, ...]) -> int | None:
    """The same, in a child of the module if it has none: a layer with its normalization."""
    size = _first_size(source, names)
    if size is None and isinstance(source, nn.Module):
        for child in source.children():
            size = _first_size(child, names)
            if size is not None:
                return size
    return size


# Queries, keys and values


def _qkv(p: _Projection) -> Parts:
    unusual = _unusual_qkv(p)
    if unusual is not None:
        return unusual
    heads, head_dim, kv_heads = p.heads, p.head_dim, p.kv_heads
    if heads and head_dim and kv_heads:
        keys = kv_heads * head_dim
        return contiguous(p.outputs, {"q": heads * head_dim, "k": keys, "v": keys})
    if kv_heads is not None and kv_heads != heads:
        return ()
    width = p.width(3)
    return contiguous(p.outputs, {"q": width, "k": width, "v": width})


def _unusual_qkv(p: _Projection) -> Parts | None:
    """Where other attributes than the heads tell; None if there are none."""
    if p.flag("head_first"):
        return _qkv_per_head(p)
    key, value = p.own_size("key_dim"), p.own_size("val_dim")
    if key and value:
        return per_head(p.outputs, {"q": key, "k": key, "v": value}, p.heads)
    key, value = p.own_size("dim_out_qk", "qk_dim"), p.own_size("dim_out_v", "pdim")
    if key and value:
        return contiguous(p.outputs, {"q": key, "k": key, "v": value})
    key, value = p.own_size("inner_dim"), p.own_size("inner_kv_dim", "kv_inner_dim")
    if key and value:
        return contiguous(p.outputs, {"q": key, "k": value, "v": value})
    if p.flag("use_global"):
        return _kv(p)
    if p.flag("use_differential"):
        return _differential(p, ("q1", "q2", "k1", "k2", "v"))
    for child in p.owner.children():
        if type(child).__name__ == "QKVAttentionLegacy":
            return _qkv_per_head(p)
    if p.inputs is not None and p.name == "qkv_proj" and p.outputs == 1 + 2 * p.inputs:
        return contiguous(p.outputs, {"q": 1, "k": p.inputs, "v": p.inputs})
    return None


def _qkv_per_head(p: _Projection) -> Parts:
    """Heads of one size for all three; the module need not give it."""
    heads = p.heads
    if heads is None:
        return ()
    size = p.outputs // (3 * heads)
    if p.head_dim not in (None, size):
        return ()
    return per_head(p.outputs, {"q": size, "k": size, "v": size}, heads)


def _differential(p: _Projection, keys: tuple[str, ...]) -> Parts:
    """Two softmaxes, the difference of which weights the values."""
    width = p.width(len(keys))
    return contiguous(p.outputs, dict.fromkeys(keys, width))


def _differential_query(p: _Projection) -> Parts:
    if not p.flag("use_differential"):
        return ()
    return _differential(p, ("q1", "q2"))


def _kqv(p: _Projection) -> Parts:
    if p.outputs % 3 != 0 or p.own_size("out_channels") != p.outputs // 3:
        return ()
    return equal(p.outputs, "k", "q", "v")


def _levit(p: _Projection) -> Parts:
    """By transformers' LeViT, whose values are larger than its keys."""
    keys = p.own_size("key_dim")
    ratio = _attribute(p.owner, "attention_ratio")
    if keys is None or not isinstance(ratio, (int, float)):
        return ()
    values = int(ratio * keys)
    sizes: dict[str, int | None] = {"k": keys, "v": values}
    if p.name.startswith("queries"):
        sizes = {"q": keys, **sizes}
    return per_head(p.outputs, sizes, p.heads)


def _c_attn(p: _Projection) -> Parts:
    if p.flag("multi_query") is None:
        if p.flag("is_cross_attention"):
            return _kv(p)
        return _qkv(p)
    if p.flag("is_cross_attention"):
        return ()
    if p.flag("multi_query"):
        keys = p.own_size("kv_dim") or p.head_dim
        return contiguous(p.outputs, {"q": p.own_size("embed_dim"), "k": keys, "v": keys})
    return _qkv_per_head(p)


def _megatron(p: _Projection) -> Parts:
    """The heads of query_key_value are in groups, unless all queries share one key."""
    heads, head_dim = p.heads, p.head_dim
    if heads is None or head_dim is None:
        return ()
    groups = p.own_size("num_multi_query_groups_per_partition")
    if p.flag("multi_query_attention") and groups:
        keys = groups * head_dim
        return contiguous(p.outputs, {"q": heads * head_dim, "k": keys, "v": keys})
    if p.flag("new_decoder_architecture"):
        kv_heads = p.kv_heads
        if kv_heads is None or heads % kv_heads != 0:
            return ()
        queries = heads // kv_heads * head_dim
        return per_head(p.outputs, {"q": queries, "k": head_dim, "v": head_dim}, kv_heads)
    if p.flag("multi_query"):
        sizes = {"q": heads * head_dim, "k": head_dim, "v": head_dim}
        return contiguous(p.outputs, sizes)
    if p.own_size(*_KV_HEADS) not in (None, heads):
        return ()
    return _qkv_per_head(p)


def _codegen(p: _Projection) -> Parts:
    """In as many shards as the model was trained on, the values before the keys."""
    shards = p.own_size("mp_num") or 4
    size = p.outputs // (3 * shards)
    if p.own_size("embed_dim") != shards * size:
        return ()
    return per_head(p.outputs, {"q": size, "v": size, "k": size}, shards)


def _lambda_layer(p: _Projection) -> Parts:
    """All heads share the keys and the values."""
    key, heads = p.own_size("dim_qk"), p.heads
    if key is None or heads is None:
        return ()
    return contiguous(p.outputs, {"q": heads * key, "k": key, "v": p.own_size("dim_v")})


def _lite_mla(p: _Projection) -> Parts:
    """Its dim is that of a head."""
    size = p.own_size("dim")
    if size is None:
        return ()
    return per_head(p.outputs, {"q": size, "k": size, "v": size}, p.outputs // (3 * size))


def _qkv_row_by_row(p: _Projection) -> Parts:
    if p.inputs is None or p.outputs != 3 * p.inputs:
        return ()
    return row_by_row(p.outputs, "q", "k", "v")


def _half_heads(p: _Projection) -> Parts:
    """The queries and keys have twice as many heads as the module says, of half the size."""
    if p.inputs is None or p.outputs != 3 * p.inputs:
        return ()
    return equal(p.outputs, "q", "k", "v")


def _kv(p: _Projection) -> Parts:
    key, value = p.own_size("key_dim"), p.own_size("val_dim")
    if key and value:
        return per_head(p.outputs, {"k": key, "v": value}, p.heads)
    if p.flag("use_differential"):
        return _differential(p, ("k1", "k2", "v"))
    size = p.own_size("inner_kv_dim", "kv_inner_dim")
    if size is None and p.kv_heads and p.head_dim:
        size = p.kv_heads * p.head_dim
    if size is None:
        size = p.width(2)
    if size is None and not (p.heads and p.head_dim):
        size = p.outputs_of("q", "to_q", "q_proj", "query")
    return contiguous(p.outputs, {"k": size, "v": size})


def _kv_per_head(p: _Projection) -> Parts:
    heads = p.heads
    key = p.own_size("dim_head_qk", "hidden_dim")
    value = p.own_size("dim_head_v", "hidden_dim")
    return per_head(p.outputs, {"k": key, "v": value}, heads)


def _qk(p: _Projection) -> Parts:
    width = p.width(2)
    return contiguous(p.outputs, {"q": width, "k": width})


def _latent_down(p: _Projection) -> Parts:
    sizes = {"kv": p.own_size("kv_lora_rank"), "k_rope": p.own_size("qk_rope_head_dim")}
    return contiguous(p.outputs, sizes)


def _latent_up(p: _Projection) -> Parts:
    sizes = {"k": p.own_size("qk_nope_head_dim"), "v": p.own_size("v_head_dim")}
    return per_head(p.outputs, sizes, p.heads)


def _gated_query(p: _Projection) -> Parts:
    return per_head(p.outputs, {"q": p.head_dim, "gate": p.head_dim}, p.heads)


def _delta_qkv(p: _Projection) -> Parts:
    key = p.own_size("key_dim")
    return contiguous(p.outputs, {"q": key, "k": key, "v": p.own_size("value_dim")})


def _delta_qkvz(p: _Projection) -> Parts:
    heads, key, value = p.own_size("num_k_heads"), p.own_size("key_dim"), p.own_size("value_dim")
    if heads is None or key is None or value is None:
        return ()
    key, value = key // heads, value // heads
    return per_head(p.outputs, {"q": key, "k": key, "v": value, "z": value}, heads)


def _delta_ba(p: _Projection) -> Parts:
    heads, values = p.own_size("num_k_heads"), p.own_size("num_v_heads")
    if heads is None or values is None:
        return ()
    return per_head(p.outputs, {"b": values // heads, "a": values // heads}, heads)


def _parallel_block(p: _Projection) -> Parts:
    """The hidden units of the MLP, then the queries, keys and values."""
    if p.inputs is None:
        return ()
    width = p.inputs
    sizes = {"mlp": p.outputs - 3 * width, "q": width, "k": width, "v": width}
    return contiguous(p.outputs, sizes)


def _flux2(p: _Projection) -> Parts:
    width, hidden = p.own_size("inner_dim"), p.own_size("mlp_hidden_dim")
    sizes = {"q": width, "k": width, "v": width, "gate": hidden, "up": hidden}
    return contiguous(p.outputs, sizes)


# State space models


def _in_proj(p: _Projection) -> Parts:
    if not isinstance(_attribute(p.owner, "A_log"), Tensor):
        return ()
    inner = p.own_size("intermediate_size", "d_inner")
    if inner is None:
        return ()
    if p.outputs == 2 * inner:
        return equal(p.outputs, "x", "z")
    heads = p.own_size("num_heads", "nheads")
    groups, states = p.own_size("n_groups", "ngroups"), p.own_size("ssm_state_size", "d_state")
    if groups is None or states is None:
        return ()
    sizes = {"z": inner, "x": inner, "B": groups * states, "C": groups * states, "dt": heads}
    return contiguous(p.outputs, sizes)


def _x_proj(p: _Projection) -> Parts:
    if not isinstance(_attribute(p.owner, "A_log"), Tensor):
        return ()
    states = p.own_size("ssm_state_size", "d_state")
    sizes = {"dt": p.own_size("time_step_rank", "dt_rank"), "B": states, "C": states}
    return contiguous(p.outputs, sizes)


def _zamba(p: _Projection) -> Parts:
    inner = p.own_size("intermediate_size")
    if inner is None or p.outputs != 2 * inner:
        return ()
    return row_by_row(p.outputs, "x", "z")


def _short_convolution(p: _Projection) -> Parts:
    if p.inputs is None or p.outputs != 3 * p.inputs:
        return ()
    return equal(p.outputs, "B", "C", "x")


# Gated MLPs

_DOWN = {
    "gate_up_proj": "down_proj",
    "Wi": "Wo",
    "w12": "w3",
    "weights_in": "weights_out",
    "input_linear": "output_linear",
    "linear_in": "linear_out",
    "fc1": "fc2",
    "linear_1": "linear_2",
    "proj_in": "proj_out",
    "ff_in": "ff_out",
    "swish_linear": "linear_out",
    "conv_inverted": "conv_point",
}
"""The projection that follows: half as wide if the one before is gated."""


def _gate_first(p: _Projection) -> Parts:
    if not _is_halved(p):
        return ()
    if p.flag("is_concatenated") is False:
        return row_by_row(p.outputs, "gate", "up")
    return equal(p.outputs, "gate", "up")


def _gate_last(p: _Projection) -> Parts:
    if not _is_halved(p):
        return ()
    return equal(p.outputs, "up", "gate")


def _gate_row_by_row(p: _Projection) -> Parts:
    if not _is_halved(p):
        return ()
    return row_by_row(p.outputs, "gate", "up")


def _is_halved(p: _Projection) -> bool:
    """Whether the projection that follows has half as many inputs as this one has outputs."""
    stack, down = _attribute(p.owner, p.name), _attribute(p.owner, _DOWN[p.name])
    if isinstance(stack, Tensor) and isinstance(down, Tensor):
        # Stacks (experts, out, in) or (experts, in, out).
        if stack.ndim != 3 or down.ndim != 3 or p.outputs % 2 != 0:
            return False
        sizes = sorted(stack.shape[1:])
        for hidden, outer in (down.shape[1:], down.shape[:0:-1]):
            if 2 * hidden == p.outputs and sizes == sorted((p.outputs, outer)):
                return True
        return False
    inputs = p.inputs_of(_DOWN[p.name])
    return inputs is not None and p.outputs == 2 * inputs


def _fc1(p: _Projection) -> Parts:
    """Its name does not say which half is the gate; the class must."""
    last = p.flag("gate_last")
    if last is None:
        if not p.owned_by(r"Moonshine\w*MLP|\w*(?i:gated|glu)(?i:mlp|ffn)"):
            return ()
        last = True
    if last:
        return _gate_last(p)
    return _gate_first(p)


def _glu_module(p: _Projection) -> Parts:
    """A gated activation with its projection inside: GEGLU(x) = up * GELU(gate)."""
    if p.outputs % 2 != 0 or not p.owned_by(r"(?i:\w*glu|\w*gatedlinearunit)"):
        return ()
    if p.outputs == p.inputs:  # up is the input itself
        return ()
    for name, child in p.owner.named_children():
        if name != p.name and any(weight.ndim > 1 for weight in child.parameters()):
            return ()
    return equal(p.outputs, "up", "gate")


def _before_glu(p: _Projection) -> Parts:
    """A child that nn.GLU follows: the next one, or the module's ``glu``."""
    if p.outputs % 2 != 0:
        return ()
    children = p.owner._modules
    if p.name in _BEFORE_GLU and isinstance(children.get("glu"), nn.GLU):
        return equal(p.outputs, "up", "gate")
    before = children.get(p.name)
    if not isinstance(p.owner, nn.Sequential) or before is None:
        return ()
    names = iter(children)
    if p.name.isdigit():  # by its place: a long Sequential is not searched for each child
        names = map(str, range(int(p.name), len(children)))
    following = dropwhile(lambda name: name != p.name, names)
    for name in list(islice(following, 1, 1 + _BETWEEN)):
        child = children.get(name)
        if isinstance(child, nn.GLU):
            return _split_by(child, before, p.outputs)
        if not isinstance(child, (nn.Dropout, nn.Identity)):
            return ()
    return ()


def _split_by(glu: nn.GLU, before: nn.Module, outputs: int) -> Parts:
    """Halves, if this GLU splits along the outputs of the layer before."""
    axis = -1
    if isinstance(before, nn.modules.conv._ConvNd):
        axis = 1
    if glu.dim != axis or not isinstance(before, (nn.Linear, nn.modules.conv._ConvNd)):
        return ()
    return equal(outputs, "up", "gate")


_BETWEEN = 4  # modules after a projection, of which one may be its GLU
_BEFORE_GLU = ("pointwise_conv1", "up_conv")

# Which recogniser a projection goes to

_Recogniser = Callable[[_Projection], Parts]


def _whole(p: _Projection) -> Parts:
    """Not fused, although its sizes look like it: keys that are values at once."""
    return ()


_BY_CLASS: list[tuple[str, tuple[str, ...], _Recogniser]] = [
    ("CodeGenAttention", ("qkv_proj",), _codegen),
    ("MiniMaxLightningAttention", ("qkv_proj",), _qkv_per_head),
    ("LiteMLA", ("qkv",), _lite_mla),
    (r"MMAudioAttnBlock\w*", ("qkv",), _qkv_row_by_row),
    ("DiffAttention", ("qkv",), _half_heads),
    ("LambdaLayer", ("qkv",), _lambda_layer),
    ("HaloAttn", ("kv",), _kv_per_head),
    (r"DeepseekV4\w*", ("kv_proj",), _whole),
    ("StableAudio3CrossAttention", ("to_q",), _differential_query),
    ("DisentangledSelfAttention", ("in_proj",), _qkv_per_head),
    ("EsmFoldSelfAttention", ("proj",), _qkv_per_head),
    (r"(Qwen3Next|Qwen3_5|Qwen4Exp)\w*Attention", ("q_proj",), _gated_query),
    ("ZambaMambaMixer", ("in_proj",), _zamba),
    (r"\w*ShortConv", ("in_proj",), _short_convolution),
    ("GptOssExperts", ("gate_up_proj",), _gate_row_by_row),
    ("Phi4MultimodalAudioMLP", ("gate_up_proj",), _gate_last),
    ("GatedConvBlock", ("fc1",), _gate_first),
    (r"Flux\d?\w*FeedForward", ("linear_in",), _gate_first),
    (r"(StableAudio3)?FeedForward", ("proj_in",), _gate_last),
    (r"\w*MultiModalProjector", ("linear_1",), _gate_last),
    (r"MiniMaxMusic\w*Block", ("ff_in",), _gate_last),
    (r"RFD4Proteina\w*", ("swish_linear",), _gate_last),
    (r"GLUMB\w*Conv", ("conv_inverted",), _gate_last),
    (r"(Diff)?ParallelScalingBlock", ("in_proj",), _parallel_block),
]
"""Classes whose layout no size tells: a pattern of their names, the projections, the recogniser."""


_BY_NAME: dict[str, _Recogniser] = {
    "qkv": _qkv,
    "Wqkv": _qkv,
    "qkv_proj": _qkv,
    "qkv_linear": _qkv,
    "attn_qkv": _qkv,
    "img_attn_qkv": _qkv,
    "txt_attn_qkv": _qkv,
    "img_qkv_proj": _qkv,
    "att_proj": _qkv,
    "in_proj_weight": _qkv,
    "to_qkv": _qkv,
    "to_added_qkv": _qkv,
    "c_attn": _c_attn,
    "query_key_value": _megatron,
    "to_qkv_mlp_proj": _flux2,
    "kv": _kv,
    "to_kv": _kv,
    "to_added_kv": _kv,
    "kv_proj": _kv,
    "linear_kv": _kv_per_head,
    "qk": _qk,
    "kv_a_proj_with_mqa": _latent_down,
    "kv_b_proj": _latent_up,
    "in_proj_qkv": _delta_qkv,
    "in_proj_qkvz": _delta_qkvz,
    "in_proj_ba": _delta_ba,
    "in_proj": _in_proj,
    "x_proj": _x_proj,
    "kqv_lin": _kqv,
    "queries_keys_values": _levit,
    "keys_values": _levit,
    "gate_up_proj": _gate_first,
    "Wi": _gate_first,
    "w12": _gate_first,
    "weights_in": _gate_first,
    "input_linear": _gate_first,
    "fc1": _fc1,
    "proj": _glu_module,
    "lin": _glu_module,
    "linear": _glu_module,
    "fc": _glu_module,
}

FUSED_NAMES = frozenset(_BY_NAME).union(*(one for _, one, _ in _BY_CLASS))
"""The names of projections that may be fused."""
