"""What is known of the weights of transformers' models, by the ``model_type`` of their config.json.

A row of the table says what the names and shapes in a file do not: which layers hold (in, out),
which embedding the output layer may be tied to, which embeddings have a row for the padding, which
class divides a projection, and how experts are stored. The layouts of fused projections are those
of :mod:`~lightning_hsu._neurons.fused`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_hsu._neurons.head_names import HEAD_NAMED_AS_TABLE, LANGUAGE_HEAD

Config = Mapping[str, Any]
Sizes = dict[str, Any]
"""Sizes and flags by name; a name with the value None is not known."""

_LARGEST = 2**40  # no layer is larger


@dataclass(frozen=True)
class ModelType:
    """What is known of the weights of one type of model.

    Args:
        head: Path of the output layer of its language models.
        table: Last parts of the path of the embedding that it may be tied to.
        padded: Names of embeddings whose row for the padding does not train.
        padding: The row of the padding if the config does not tell; None if there is none.
        columns: Names of layers that hold (in, out), as transformers' Conv1D does.
        owners: Classes that divide projections, by the last part of their path; only where the
            class tells the layout.
        sizes: Sizes and flags of these modules, from those of the config.
        experts: Sets of experts that files hold one by one, by the names of their layers.
        transposed: Whether stacks of experts are (experts, in, out).
        groups: Keys of the config with the groups of convolutions, by a part of their path.
        unread: Names of parameters whose neurons are not known.
        computed: Paths of tables that the model computes, so that no file has them.
    """

    head: str = ""
    table: str = ""
    padded: tuple[str, ...] = ()
    padding: int | None = None
    columns: tuple[str, ...] = ()
    owners: Mapping[str, str] = field(default_factory=dict)
    sizes: Callable[[Sizes], Sizes] | None = None
    experts: Mapping[str, str] = field(default_factory=dict)
    transposed: bool | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()


# Sizes that modules compute from those of the config


def first_size(source: Config, *names: str) -> int | None:
    """The first of these entries that is a positive whole number."""
    for name in names:
        value = source.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST:
            return value
    return None


def _times(factor: object, size: int | None) -> int | None:
    """A size times a factor that may be anything."""
    if size is None or not is_number(factor):
        return None
    assert isinstance(factor, (int, float))
    product = int(factor * size)
    if product < 1:
        return None
    return product


def is_number(value: object) -> bool:
    """Whether a value is a number, or a flag, that a layer may have: finite and not too large."""
    if not isinstance(value, (int, float)):
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return abs(value) < _LARGEST


def _gpt_bigcode(known: Sizes) -> Sizes:
    return {"multi_query": known.get("multi_query", True)}


def _falcon(known: Sizes) -> Sizes:
    found = {"multi_query": known.get("multi_query", True)}
    if known.get("new_decoder_architecture") is True and "num_kv_heads" not in known:
        found["num_kv_heads"] = known.get("num_attention_heads")
    return found


def _mamba(known: Sizes) -> Sizes:
    inner = _times(known.get("expand", 2), first_size(known, "hidden_size"))
    return {
        "intermediate_size": inner,
        "ssm_state_size": known.get("state_size", 16),
        "time_step_rank": _rank(known, "time_step_rank"),
    }


def _mamba2(known: Sizes) -> Sizes:
    return _mamba(known) | {"ssm_state_size": known.get("state_size", 128)}


def _jamba(known: Sizes) -> Sizes:
    return {
        "intermediate_size": _times(known.get("mamba_expand", 2), first_size(known, "hidden_size")),
        "ssm_state_size": known.get("mamba_d_state", 16),
        "time_step_rank": _rank(known, "mamba_dt_rank"),
    }


def _rank(known: Sizes, name: str) -> int | None:
    """The rank of the time step: by itself a sixteenth of the width."""
    rank = first_size(known, name)
    width = first_size(known, "hidden_size")
    if rank is None and width is not None:
        rank = -(-width // 16)
    return rank


def _gated_delta(known: Sizes) -> Sizes:
    keys, values = (
        first_size(known, "linear_num_key_heads"),
        first_size(known, "linear_num_value_heads"),
    )
    return {
        "num_k_heads": keys,
        "num_v_heads": values,
        "key_dim": _times(known.get("linear_key_head_dim"), keys),
        "value_dim": _times(known.get("linear_value_head_dim"), values),
    }


# The table

_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
_GATED = {"gate_proj": "gate_up_proj.gate", "up_proj": "gate_up_proj.up", "down_proj": "down_proj"}
_W123 = {"w1": "gate_up_proj.gate", "w3": "gate_up_proj.up", "w2": "down_proj"}

_LIGHTNING = {"self_attn": "MiniMaxLightningAttention"}
_GATED_QUERIES = {"self_attn": "Qwen3NextAttention"}

_SINUSOIDS = ("model.encoder.embed_positions", "model.decoder.embed_positions")

_GPT = ModelType(LANGUAGE_HEAD, "wte")
_DECODER = ModelType(LANGUAGE_HEAD, "embed_tokens", ("embed_tokens",))
_WITH_EXPERTS = replace(_DECODER, experts=_GATED)
_MEGATRON = ModelType(LANGUAGE_HEAD, "word_embeddings")
_SSM = ModelType(LANGUAGE_HEAD, "embeddings", sizes=_mamba)
_BERT = ModelType("cls.predictions.decoder", "word_embeddings", ("word_embeddings",), 0)
_ROBERTA = ModelType(
    "lm_head.decoder", "word_embeddings", ("word_embeddings", "position_embeddings"), 1
)
_BART = ModelType(LANGUAGE_HEAD, "shared", ("shared", "embed_tokens"), 1)
_SPEECH = ModelType(LANGUAGE_HEAD, groups={"pos_conv_embed": "num_conv_pos_embedding_groups"})
_SQUEEZED = {
    "query": "q_groups",
    "key": "k_groups",
    "value": "v_groups",
    "post_attention": "post_attention_groups",
    "intermediate": "intermediate_groups",
    "output": "output_groups",
}
_OTHER = ModelType()

_ROWS: tuple[tuple[str, ModelType], ...] = (
    # Decoders
    ("gpt2 imagegpt decision_transformer", replace(_GPT, columns=_CONV1D)),
    ("openai-gpt", ModelType(LANGUAGE_HEAD, "tokens_embed", columns=_CONV1D)),
    ("gpt_neo gptj mpt", _GPT),
    ("gpt_bigcode", replace(_GPT, sizes=_gpt_bigcode)),
    ("codegen", replace(_GPT, owners={"attn": "CodeGenAttention"})),
    ("dbrx", replace(_GPT, padded=("wte",))),
    ("gpt_neox", ModelType(HEAD_NAMED_AS_TABLE, "embed_in")),
    ("bloom", _MEGATRON),
    ("falcon", replace(_MEGATRON, sizes=_falcon)),
    ("llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 opt", _DECODER),
    ("olmo olmo2 olmo3 cohere cohere2 glm glm4 granite smollm3 stablelm starcoder2", _DECODER),
    ("apertus arcee bitnet diffllama ernie4_5 exaone4 helium hunyuan_v1_dense lfm2", _DECODER),
    ("minicpm3 nemotron persimmon seed_oss", _DECODER),
    # Decoders with experts
    ("mixtral phimoe minimax_m2", replace(_DECODER, experts=_W123)),
    ("minimax", replace(_DECODER, experts=_W123, owners=_LIGHTNING)),
    ("qwen2_moe qwen3_moe olmoe flex_olmo deepseek_v2 deepseek_v3", _WITH_EXPERTS),
    ("glm4_moe glm4_moe_lite dots1 ernie4_5_moe hunyuan_v1_moe", _WITH_EXPERTS),
    ("qwen3_next", replace(_WITH_EXPERTS, owners=_GATED_QUERIES, sizes=_gated_delta)),
    ("jamba", replace(_WITH_EXPERTS, sizes=_jamba)),
    ("granitemoe granitemoeshared", _DECODER),
    ("llama4_text", replace(_DECODER, transposed=True)),
    ("gpt_oss", replace(_DECODER, transposed=True, owners={"experts": "GptOssExperts"})),
    # State space models
    ("mamba falcon_mamba", _SSM),
    ("mamba2", replace(_SSM, sizes=_mamba2)),
    # Encoders
    ("bert megatron-bert deberta-v2 ernie roformer layoutlm big_bird rembert", _BERT),
    ("nystromformer splinter", _BERT),
    ("deberta", replace(_BERT, owners={"self": "DisentangledSelfAttention"})),
    ("squeezebert", replace(_BERT, groups=_SQUEEZED)),
    ("distilbert", replace(_BERT, head="vocab_projector")),
    ("albert", replace(_BERT, head="predictions.decoder")),
    ("electra convbert", replace(_BERT, head="generator_lm_head")),
    ("roberta xlm-roberta xlm-roberta-xl camembert mpnet data2vec-text", _ROBERTA),
    ("longformer esm", _ROBERTA),
    ("modernbert", ModelType("decoder", "tok_embeddings", ("tok_embeddings",))),
    ("xlnet", ModelType("lm_loss", "word_embedding")),
    ("funnel", replace(_BERT, head=LANGUAGE_HEAD, padding=None, unread=("r_kernel",))),
    # Encoders with decoders
    ("t5 mt5 umt5 longt5 switch_transformers", ModelType(LANGUAGE_HEAD, "shared")),
    ("bart mbart pegasus pegasus_x bigbird_pegasus m2m_100", _BART),
    ("marian", replace(_BART, computed=_SINUSOIDS)),
    ("blenderbot blenderbot-small led mvp plbart", _BART),
    ("whisper", ModelType("proj_out", "decoder.embed_tokens", ("embed_tokens",), 50256)),
    # Sound
    ("wav2vec2 wav2vec2-conformer hubert wavlm unispeech unispeech-sat sew", _SPEECH),
    ("data2vec-audio", _SPEECH),
    ("audio-spectrogram-transformer", _OTHER),
    # Images
    ("vit vit_mae vit_msn deit ijepa dinov2 dinov2_with_registers dinov3_vit beit", _OTHER),
    ("data2vec-vision yolos swin swinv2 convnext convnextv2 resnet segformer", _OTHER),
    ("timesformer videomae vivit", _OTHER),
    # Images and text
    ("clip clip_text_model clip_vision_model siglip siglip_text_model", _OTHER),
    ("siglip_vision_model siglip2_vision_model blip_vision_model", _OTHER),
    ("llava paligemma mistral3 qwen2_vl qwen2_5_vl qwen3_vl", _DECODER),
    ("gemma3", replace(_DECODER, unread=("mm_input_projection_weight",))),
    ("blip", replace(_BERT, head="text_decoder.cls.predictions.decoder", padding=None)),
    ("blip_text_model", _BERT),
)
"""Types, with a blank between them, and what is known of them."""

_COMPOSITE = ("encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder")
"""Types of two models in one, of which the decoder has the output layer."""


def _by_type() -> dict[str, ModelType]:
    """The rows by type."""
    found = {}
    for kinds, row in _ROWS:
        for kind in kinds.split():
            found[kind] = row
    return found


_TYPES = _by_type()


def unknown_type(config: Config | None) -> str:
    """What to say of a config that names a type that is not known; "" if it does not."""
    if not isinstance(config, Mapping) or "model_type" not in config or row_of(config) is not None:
        return ""
    kind = config["model_type"]
    shown = type(kind).__name__
    if isinstance(kind, str):
        shown = repr(kind[:40])
    return f"model_type {shown} is not known: read by names and shapes"


def row_of(config: object) -> ModelType | None:
    """The row of a config's type; None if there is none."""
    if not isinstance(config, Mapping):
        return None
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    if kind in _COMPOSITE:
        decoder = config.get("decoder")
        inner = decoder.get("model_type") if isinstance(decoder, Mapping) else None
        row = _TYPES.get(inner) if isinstance(inner, str) else None
        if row is not None and row.head:
            return replace(row, head=f"decoder.{row.head}")
        return row
    return _TYPES.get(kind)
