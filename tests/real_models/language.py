"""Models of transformers, x_transformers and peft: text, images and sound, all small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.real_models.base import RealModel

VOCABULARY = 40
LENGTH = 12
CLASSES = 5


def _tokens(rows: int = 2) -> Tensor:
    """The same token numbers at each call; 0 to 2 are left to padding and other marks."""
    torch.manual_seed(1)
    return torch.randint(3, VOCABULARY, (rows, LENGTH))


def _images(size: int, count: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, size, size)


def _next_token_loss(model: nn.Module) -> Tensor:
    tokens = _tokens()
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def _two_head_loss(model: nn.Module) -> Tensor:
    """Distillation: the labels for one head, a teacher's labels for the other."""
    settings: Any = model.config
    output = model(pixel_values=_images(settings.image_size, count=4))
    labels = torch.tensor([0, 1, 2, 3])
    teacher = torch.tensor([0, 1, 2, 2])
    loss = nn.functional.cross_entropy(output.cls_logits, labels)
    return loss + nn.functional.cross_entropy(output.distillation_logits, teacher)


def _whole(weight: Tensor) -> Tensor:
    return weight


def _columns(weight: Tensor) -> Tensor:
    """Of a matrix stored (in, out), or of a stack of them (stack, in, out)."""
    return weight.transpose(-2, -1)


def _rows(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    """Rows of a matrix stored (out, in), or of each of a stack of them."""
    return lambda weight: weight[..., start:stop, :]


def _rows_by_head(heads: int, start: int, stop: int) -> Callable[[Tensor], Tensor]:
    """Rows ``start`` to ``stop`` of each head, where the rows of a head lie together."""

    def rows(weight: Tensor) -> Tensor:
        by_head = weight.reshape(heads, -1, weight.shape[-1])
        return by_head[:, start:stop].flatten(0, 1)

    return rows


# ------------------------------------------------------------------------------------------- GPT-2


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).train()


GPT2 = RealModel(
    name="transformers: GPT-2",
    imports=("transformers",),
    build=_gpt2,
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        # Conv1D stores (in, out): its neurons are columns.
        "transformer.h.0.attn.c_attn.q": (1, 16, 16),
        "transformer.h.0.attn.c_attn.k": (1, 16, 16),
        "transformer.h.0.attn.c_attn.v": (1, 16, 16),
        "transformer.h.0.attn.c_proj": (1, 16, 16),
        "transformer.h.0.mlp.c_fc": (1, 64, 16),
        "transformer.h.0.mlp.c_proj": (1, 16, 64),
        "transformer.h.1.attn.c_attn.q": (1, 16, 16),
        "transformer.h.1.attn.c_attn.k": (1, 16, 16),
        "transformer.h.1.attn.c_attn.v": (1, 16, 16),
        "transformer.h.1.attn.c_proj": (1, 16, 16),
        "transformer.h.1.mlp.c_fc": (1, 64, 16),
        "transformer.h.1.mlp.c_proj": (1, 16, 64),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "transformer.h.0.attn.c_attn.k": (
            "transformer.h.0.attn.c_attn.weight",
            lambda weight: weight[:, 16:32].T,
        ),
        # Square: only the forward pass tells rows from columns.
        "transformer.h.1.attn.c_proj": ("transformer.h.1.attn.c_proj.weight", _columns),
        "transformer.h.0.mlp.c_fc": ("transformer.h.0.mlp.c_fc.weight", _columns),
    },
    rest={"transformer.wpe.weight": "embedding"},
    declared=True,
)


# ------------------------------------------------------------------------------------- OpenAI GPT


def _openai_gpt() -> nn.Module:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    torch.manual_seed(0)
    config = OpenAIGPTConfig(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return OpenAIGPTLMHeadModel(config).train()


OPENAI_GPT = RealModel(
    name="transformers: OpenAI GPT",
    imports=("transformers",),
    build=_openai_gpt,
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        "transformer.h.0.attn.c_attn.q": (1, 16, 16),
        "transformer.h.0.attn.c_attn.k": (1, 16, 16),
        "transformer.h.0.attn.c_attn.v": (1, 16, 16),
        "transformer.h.0.attn.c_proj": (1, 16, 16),
        "transformer.h.0.mlp.c_fc": (1, 64, 16),
        "transformer.h.0.mlp.c_proj": (1, 16, 64),
        "transformer.h.1.attn.c_attn.q": (1, 16, 16),
        "transformer.h.1.attn.c_attn.k": (1, 16, 16),
        "transformer.h.1.attn.c_attn.v": (1, 16, 16),
        "transformer.h.1.attn.c_proj": (1, 16, 16),
        "transformer.h.1.mlp.c_fc": (1, 64, 16),
        "transformer.h.1.mlp.c_proj": (1, 16, 64),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "transformer.h.1.attn.c_attn.v": (
            "transformer.h.1.attn.c_attn.weight",
            lambda weight: weight[:, 32:].T,
        ),
        "transformer.h.1.mlp.c_proj": ("transformer.h.1.mlp.c_proj.weight", _columns),
        "lm_head": ("transformer.tokens_embed.weight", _whole),
    },
    rest={"transformer.positions_embed.weight": "embedding"},
    declared=True,
)


# ---------------------------------------------------------------------------- mixtures of experts


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        output_router_logits=True,
        use_cache=False,
    )
    return MixtralForCausalLM(config).train()


MIXTRAL = RealModel(
    name="transformers: Mixtral",
    imports=("transformers",),
    build=_mixtral,
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        # A router is one parameter `weight` of a module that is no Linear; it is used as one.
        "model.layers.0.mlp.gate": (1, 4, 16),
        # Experts are stored (experts, out, in).
        "model.layers.0.mlp.experts.gate_up_proj.gate": (4, 24, 16),
        "model.layers.0.mlp.experts.gate_up_proj.up": (4, 24, 16),
        "model.layers.0.mlp.experts.down_proj": (4, 16, 24),
        "model.layers.0.self_attn.k_proj": (1, 8, 16),
        "model.layers.1.mlp.gate": (1, 4, 16),
        "model.layers.1.mlp.experts.gate_up_proj.gate": (4, 24, 16),
        "model.layers.1.mlp.experts.gate_up_proj.up": (4, 24, 16),
        "model.layers.1.mlp.experts.down_proj": (4, 16, 24),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "model.layers.0.mlp.experts.gate_up_proj.up": (
            "model.layers.0.mlp.experts.gate_up_proj",
            _rows(24, 48),
        ),
        "model.layers.0.mlp.experts.down_proj": ("model.layers.0.mlp.experts.down_proj", _whole),
        "model.layers.1.mlp.gate": ("model.layers.1.mlp.gate.weight", _whole),
    },
    rest={"model.embed_tokens.weight": "embedding"},
    declared=True,
)


def _gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    return GptOssForCausalLM(config).train()


GPT_OSS = RealModel(
    name="transformers: GPT-OSS",
    imports=("transformers",),
    build=_gpt_oss,
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        "model.layers.0.mlp.router": (1, 4, 16),
        # Experts are stored (experts, in, out), and gate and up take turns along `out`.
        "model.layers.0.mlp.experts.gate_up_proj.gate": (4, 16, 16),
        "model.layers.0.mlp.experts.gate_up_proj.up": (4, 16, 16),
        "model.layers.0.mlp.experts.down_proj": (4, 16, 16),
        "model.layers.0.self_attn.k_proj": (1, 8, 16),
        "model.layers.1.mlp.router": (1, 4, 16),
        "model.layers.1.mlp.experts.gate_up_proj.gate": (4, 16, 16),
        "model.layers.1.mlp.experts.gate_up_proj.up": (4, 16, 16),
        "model.layers.1.mlp.experts.down_proj": (4, 16, 16),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "model.layers.0.mlp.experts.gate_up_proj.gate": (
            "model.layers.0.mlp.experts.gate_up_proj",
            lambda weight: weight[:, :, 0::2].transpose(1, 2),
        ),
        "model.layers.1.mlp.experts.gate_up_proj.up": (
            "model.layers.1.mlp.experts.gate_up_proj",
            lambda weight: weight[:, :, 1::2].transpose(1, 2),
        ),
        "model.layers.0.mlp.experts.down_proj": ("model.layers.0.mlp.experts.down_proj", _columns),
    },
    rest={
        "model.embed_tokens.weight": "embedding",
        # One bias an expert: (experts, out).
        "*.experts.gate_up_proj_bias": "bias",
        "*.experts.down_proj_bias": "bias",
    },
    declared=True,
)


# -------------------------------------------------------------------------------------------- Phi-3


def _phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        original_max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return Phi3ForCausalLM(config).train()


PHI3 = RealModel(
    name="transformers: Phi-3",
    imports=("transformers",),
    build=_phi3,
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        # Four heads of queries, two of keys and of values, of size 4.
        "model.layers.0.self_attn.qkv_proj.q": (1, 16, 16),
        "model.layers.0.self_attn.qkv_proj.k": (1, 8, 16),
        "model.layers.0.self_attn.qkv_proj.v": (1, 8, 16),
        "model.layers.0.self_attn.o_proj": (1, 16, 16),
        "model.layers.0.mlp.gate_up_proj.gate": (1, 24, 16),
        "model.layers.0.mlp.gate_up_proj.up": (1, 24, 16),
        "model.layers.0.mlp.down_proj": (1, 16, 24),
        "model.layers.1.self_attn.qkv_proj.q": (1, 16, 16),
        "model.layers.1.self_attn.qkv_proj.k": (1, 8, 16),
        "model.layers.1.self_attn.qkv_proj.v": (1, 8, 16),
        "model.layers.1.mlp.gate_up_proj.gate": (1, 24, 16),
        "model.layers.1.mlp.gate_up_proj.up": (1, 24, 16),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "model.layers.0.self_attn.qkv_proj.q": (
            "model.layers.0.self_attn.qkv_proj.weight",
            _rows(0, 16),
        ),
        "model.layers.1.self_attn.qkv_proj.v": (
            "model.layers.1.self_attn.qkv_proj.weight",
            _rows(24, 32),
        ),
        "model.layers.0.mlp.gate_up_proj.gate": (
            "model.layers.0.mlp.gate_up_proj.weight",
            _rows(0, 24),
        ),
    },
    rest={"model.embed_tokens.weight": "embedding"},
    declared=True,
)


# -------------------------------------------------------------------------------------------- Bloom


def _bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        n_layer=2,
        n_head=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cache=False,
    )
    return BloomForCausalLM(config).train()


BLOOM = RealModel(
    name="transformers: Bloom",
    imports=("transformers",),
    build=_bloom,
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        # Each of four heads has 4 rows of q, then 4 of k, then 4 of v.
        "transformer.h.0.self_attention.query_key_value.q": (1, 16, 16),
        "transformer.h.0.self_attention.query_key_value.k": (1, 16, 16),
        "transformer.h.0.self_attention.query_key_value.v": (1, 16, 16),
        "transformer.h.0.self_attention.dense": (1, 16, 16),
        "transformer.h.0.mlp.dense_h_to_4h": (1, 64, 16),
        "transformer.h.0.mlp.dense_4h_to_h": (1, 16, 64),
        "transformer.h.1.self_attention.query_key_value.q": (1, 16, 16),
        "transformer.h.1.self_attention.query_key_value.k": (1, 16, 16),
        "transformer.h.1.self_attention.query_key_value.v": (1, 16, 16),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "transformer.h.0.self_attention.query_key_value.q": (
            "transformer.h.0.self_attention.query_key_value.weight",
            _rows_by_head(4, 0, 4),
        ),
        "transformer.h.0.self_attention.query_key_value.k": (
            "transformer.h.0.self_attention.query_key_value.weight",
            _rows_by_head(4, 4, 8),
        ),
        "lm_head": ("transformer.word_embeddings.weight", _whole),
    },
    declared=True,
)


# -------------------------------------------------------------------------------------------- Mamba


def _mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        state_size=8,
        num_hidden_layers=2,
        conv_kernel=4,
        expand=2,
        time_step_rank=4,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return MambaForCausalLM(config).train()


MAMBA = RealModel(
    name="transformers: Mamba",
    imports=("transformers",),
    build=_mamba,
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        "backbone.layers.0.mixer.in_proj.x": (1, 32, 16),
        "backbone.layers.0.mixer.in_proj.z": (1, 32, 16),
        # Step sizes, inputs and outputs of the state space: three roles in one matrix.
        "backbone.layers.0.mixer.x_proj.dt": (1, 4, 32),
        "backbone.layers.0.mixer.x_proj.B": (1, 8, 32),
        "backbone.layers.0.mixer.x_proj.C": (1, 8, 32),
        # A Linear whose weight the mixer multiplies by itself.
        "backbone.layers.0.mixer.dt_proj": (1, 32, 4),
        "backbone.layers.0.mixer.out_proj": (1, 16, 32),
        "backbone.layers.1.mixer.in_proj.x": (1, 32, 16),
        "backbone.layers.1.mixer.in_proj.z": (1, 32, 16),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "backbone.layers.0.mixer.in_proj.x": (
            "backbone.layers.0.mixer.in_proj.weight",
            _rows(0, 32),
        ),
        "backbone.layers.1.mixer.in_proj.z": (
            "backbone.layers.1.mixer.in_proj.weight",
            _rows(32, 64),
        ),
        "backbone.layers.0.mixer.dt_proj": ("backbone.layers.0.mixer.dt_proj.weight", _whole),
    },
    rest={
        "*.mixer.conv1d.weight": "depthwise",
        # Decay rates, one a channel and state: they scale numbers and sum none.
        "*.mixer.A_log": "",
    },
    declared=True,
)


def _mamba2() -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        state_size=8,
        num_hidden_layers=2,
        conv_kernel=4,
        expand=2,
        num_heads=4,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return Mamba2ForCausalLM(config).train()


MAMBA2 = RealModel(
    name="transformers: Mamba2",
    imports=("transformers",),
    build=_mamba2,
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        # In this order: the gate comes first here, and second in Mamba.
        "backbone.layers.0.mixer.in_proj.z": (1, 32, 16),
        "backbone.layers.0.mixer.in_proj.x": (1, 32, 16),
        "backbone.layers.0.mixer.in_proj.B": (1, 16, 16),
        "backbone.layers.0.mixer.in_proj.C": (1, 16, 16),
        "backbone.layers.0.mixer.in_proj.dt": (1, 4, 16),
        "backbone.layers.0.mixer.out_proj": (1, 16, 32),
        "backbone.layers.1.mixer.out_proj": (1, 16, 32),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "backbone.layers.0.mixer.in_proj.z": (
            "backbone.layers.0.mixer.in_proj.weight",
            _rows(0, 32),
        ),
        "backbone.layers.0.mixer.in_proj.x": (
            "backbone.layers.0.mixer.in_proj.weight",
            _rows(32, 64),
        ),
        "backbone.layers.1.mixer.out_proj": ("backbone.layers.1.mixer.out_proj.weight", _whole),
    },
    rest={
        "backbone.embeddings.weight": "embedding",
        "*.mixer.conv1d.weight": "depthwise",
    },
    declared=True,
)


# ------------------------------------------------------------------------- other decoders of text


def _gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    return GPTNeoXForCausalLM(config).train()


GPT_NEOX = RealModel(
    name="transformers: GPT-NeoX",
    imports=("transformers",),
    build=_gpt_neox,
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        # Each of two heads has 8 rows of q, then 8 of k, then 8 of v.
        "gpt_neox.layers.0.attention.query_key_value.q": (1, 16, 16),
        "gpt_neox.layers.0.attention.query_key_value.k": (1, 16, 16),
        "gpt_neox.layers.0.attention.query_key_value.v": (1, 16, 16),
        "gpt_neox.layers.0.attention.dense": (1, 16, 16),
        "gpt_neox.layers.0.mlp.dense_h_to_4h": (1, 32, 16),
        "gpt_neox.layers.1.attention.query_key_value.q": (1, 16, 16),
        "gpt_neox.layers.1.attention.query_key_value.k": (1, 16, 16),
        "gpt_neox.layers.1.attention.query_key_value.v": (1, 16, 16),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "gpt_neox.layers.0.attention.query_key_value.q": (
            "gpt_neox.layers.0.attention.query_key_value.weight",
            _rows_by_head(2, 0, 8),
        ),
        "gpt_neox.layers.1.attention.query_key_value.v": (
            "gpt_neox.layers.1.attention.query_key_value.weight",
            _rows_by_head(2, 16, 24),
        ),
        "lm_head": ("lm_head.weight", _whole),
    },
    rest={"gpt_neox.embed_in.weight": "embedding"},
    declared=True,
)


def _falcon(new_decoder_architecture: bool) -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=new_decoder_architecture,
        multi_query=True,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return FalconForCausalLM(config).train()


def _queries_of_falcon(weight: Tensor) -> Tensor:
    """Per head of keys: two heads of queries, one of keys, one of values, of 4 rows each."""
    by_head = weight.reshape(2, 4, 4, 16)
    return by_head[:, 0:2].reshape(16, 16)


def _keys_of_falcon(weight: Tensor) -> Tensor:
    by_head = weight.reshape(2, 4, 4, 16)
    return by_head[:, 2].reshape(8, 16)


FALCON = RealModel(
    name="transformers: Falcon, new decoder architecture",
    imports=("transformers",),
    build=lambda: _falcon(new_decoder_architecture=True),
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        # FalconLinear is a Linear whose forward is its own.
        "transformer.h.0.self_attention.query_key_value.q": (1, 16, 16),
        "transformer.h.0.self_attention.query_key_value.k": (1, 8, 16),
        "transformer.h.0.self_attention.query_key_value.v": (1, 8, 16),
        "transformer.h.0.self_attention.dense": (1, 16, 16),
        "transformer.h.0.mlp.dense_h_to_4h": (1, 32, 16),
        "transformer.h.0.mlp.dense_4h_to_h": (1, 16, 32),
        "transformer.h.1.self_attention.query_key_value.q": (1, 16, 16),
        "transformer.h.1.self_attention.query_key_value.k": (1, 8, 16),
        "transformer.h.1.self_attention.query_key_value.v": (1, 8, 16),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "transformer.h.0.self_attention.query_key_value.q": (
            "transformer.h.0.self_attention.query_key_value.weight",
            _queries_of_falcon,
        ),
        "transformer.h.1.self_attention.query_key_value.k": (
            "transformer.h.1.self_attention.query_key_value.weight",
            _keys_of_falcon,
        ),
        "transformer.h.0.mlp.dense_h_to_4h": (
            "transformer.h.0.mlp.dense_h_to_4h.weight",
            _whole,
        ),
    },
    declared=True,
)

FALCON_MULTI_QUERY = RealModel(
    name="transformers: Falcon, multi-query",
    imports=("transformers",),
    build=lambda: _falcon(new_decoder_architecture=False),
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        # Four heads of queries, then one of keys and one of values.
        "transformer.h.0.self_attention.query_key_value.q": (1, 16, 16),
        "transformer.h.0.self_attention.query_key_value.k": (1, 4, 16),
        "transformer.h.0.self_attention.query_key_value.v": (1, 4, 16),
        "transformer.h.1.self_attention.query_key_value.q": (1, 16, 16),
        "transformer.h.1.self_attention.query_key_value.k": (1, 4, 16),
        "transformer.h.1.self_attention.query_key_value.v": (1, 4, 16),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "transformer.h.0.self_attention.query_key_value.q": (
            "transformer.h.0.self_attention.query_key_value.weight",
            _rows(0, 16),
        ),
        "transformer.h.0.self_attention.query_key_value.v": (
            "transformer.h.0.self_attention.query_key_value.weight",
            _rows(20, 24),
        ),
        "lm_head": ("transformer.word_embeddings.weight", _whole),
    },
    declared=True,
)


def _qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
        max_position_embeddings=32,
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config).train()


QWEN3_MOE = RealModel(
    name="transformers: Qwen3-MoE",
    imports=("transformers",),
    build=_qwen3_moe,
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        # The first block is dense, with gate and up in matrices of their own.
        "model.layers.0.mlp.gate_proj": (1, 24, 16),
        "model.layers.0.mlp.up_proj": (1, 24, 16),
        "model.layers.1.mlp.gate": (1, 4, 16),
        "model.layers.1.mlp.experts.gate_up_proj.gate": (4, 8, 16),
        "model.layers.1.mlp.experts.gate_up_proj.up": (4, 8, 16),
        "model.layers.1.mlp.experts.down_proj": (4, 16, 8),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "model.layers.1.mlp.experts.gate_up_proj.gate": (
            "model.layers.1.mlp.experts.gate_up_proj",
            _rows(0, 8),
        ),
        "model.layers.1.mlp.experts.down_proj": ("model.layers.1.mlp.experts.down_proj", _whole),
        "model.layers.1.mlp.gate": ("model.layers.1.mlp.gate.weight", _whole),
    },
    rest={"model.embed_tokens.weight": "embedding"},
    declared=True,
)


def _dbrx() -> nn.Module:
    from transformers import DbrxConfig, DbrxForCausalLM

    torch.manual_seed(0)
    config = DbrxConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        n_heads=4,
        n_layers=2,
        max_seq_len=32,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={
            "hidden_size": 16,
            "ffn_hidden_size": 8,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
        use_cache=False,
    )
    return DbrxForCausalLM(config).train()


def _by_expert(weight: Tensor) -> Tensor:
    return weight.reshape(4, 8, 16)


DBRX = RealModel(
    name="transformers: DBRX",
    imports=("transformers",),
    build=_dbrx,
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv.q": (1, 16, 16),
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv.k": (1, 8, 16),
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv.v": (1, 8, 16),
        "transformer.blocks.0.ffn.router.layer": (1, 4, 16),
        # All experts in one matrix (experts * hidden, width). Of w2 the neurons are the columns.
        "transformer.blocks.0.ffn.experts.mlp.w1": (4, 8, 16),
        "transformer.blocks.0.ffn.experts.mlp.v1": (4, 8, 16),
        "transformer.blocks.0.ffn.experts.mlp.w2": (4, 16, 8),
        "transformer.blocks.1.norm_attn_norm.attn.Wqkv.q": (1, 16, 16),
        "transformer.blocks.1.norm_attn_norm.attn.Wqkv.k": (1, 8, 16),
        "transformer.blocks.1.norm_attn_norm.attn.Wqkv.v": (1, 8, 16),
        "transformer.blocks.1.ffn.experts.mlp.w1": (4, 8, 16),
        "transformer.blocks.1.ffn.experts.mlp.v1": (4, 8, 16),
        "transformer.blocks.1.ffn.experts.mlp.w2": (4, 16, 8),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv.k": (
            "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight",
            _rows(16, 24),
        ),
        "transformer.blocks.0.ffn.experts.mlp.w1": (
            "transformer.blocks.0.ffn.experts.mlp.w1",
            _by_expert,
        ),
        "transformer.blocks.1.ffn.experts.mlp.w2": (
            "transformer.blocks.1.ffn.experts.mlp.w2",
            lambda weight: _columns(_by_expert(weight)),
        ),
    },
    rest={"transformer.wte.weight": "embedding"},
    declared=True,
)


# --------------------------------------------------------------------------------- BERT and T5


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config).train()


BERT = RealModel(
    name="transformers: BERT, masked language model",
    imports=("transformers",),
    build=_bert,
    loss=_next_token_loss,
    heads=("cls.predictions.decoder",),
    shapes={
        "bert.encoder.layer.0.attention.self.query": (1, 16, 16),
        "bert.encoder.layer.0.intermediate.dense": (1, 32, 16),
        "cls.predictions.transform.dense": (1, 16, 16),
        # Tied to a table with padding: as a head, the padding's row is a neuron, too.
        "cls.predictions.decoder": (1, VOCABULARY, 16),
    },
    reads={
        "bert.encoder.layer.0.attention.self.query": (
            "bert.encoder.layer.0.attention.self.query.weight",
            _whole,
        ),
        "cls.predictions.transform.dense": ("cls.predictions.transform.dense.weight", _whole),
        "cls.predictions.decoder": ("bert.embeddings.word_embeddings.weight", _whole),
    },
    rest={
        "bert.embeddings.position_embeddings.weight": "embedding",
        "bert.embeddings.token_type_embeddings.weight": "embedding",
    },
    declared=True,
)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config).train()


T5 = RealModel(
    name="transformers: T5",
    imports=("transformers",),
    build=_t5,
    loss=_next_token_loss,
    heads=("lm_head",),
    shapes={
        "encoder.block.0.layer.0.SelfAttention.q": (1, 16, 16),
        "encoder.block.0.layer.1.DenseReluDense.wi": (1, 32, 16),
        "decoder.block.0.layer.1.EncDecAttention.k": (1, 16, 16),
        # Tied to the table that encoder and decoder share.
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "encoder.block.0.layer.1.DenseReluDense.wi": (
            "encoder.block.0.layer.1.DenseReluDense.wi.weight",
            _whole,
        ),
        "decoder.block.0.layer.1.EncDecAttention.k": (
            "decoder.block.0.layer.1.EncDecAttention.k.weight",
            _whole,
        ),
        "lm_head": ("shared.weight", _whole),
    },
    # A table of relative positions that is an nn.Embedding.
    rest={"*.relative_attention_bias.weight": "embedding"},
    declared=True,
)


# ------------------------------------------------------------------------------------------ images


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config).train()


def _image_class_loss(model: nn.Module) -> Tensor:
    loss: Tensor = model(pixel_values=_images(32), labels=torch.tensor([0, 3])).loss
    return loss


VIT = RealModel(
    name="transformers: ViT",
    imports=("transformers",),
    build=_vit,
    loss=_image_class_loss,
    heads=("classifier",),
    shapes={
        "vit.embeddings.patch_embeddings.projection": (1, 16, 192),
        "vit.layers.0.mlp.fc1": (1, 32, 16),
        "classifier": (1, CLASSES, 16),
    },
    reads={
        "vit.embeddings.patch_embeddings.projection": (
            "vit.embeddings.patch_embeddings.projection.weight",
            lambda weight: weight.flatten(1),
        ),
        "vit.layers.0.mlp.fc1": ("vit.layers.0.mlp.fc1.weight", _whole),
        "classifier": ("classifier.weight", _whole),
    },
    rest={"vit.embeddings.position_embeddings": "embedding"},
)


def _deit() -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    torch.manual_seed(0)
    config = DeiTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
    )
    return DeiTForImageClassificationWithTeacher(config).train()


DEIT = RealModel(
    name="transformers: DeiT with distillation",
    imports=("transformers",),
    build=_deit,
    loss=_two_head_loss,
    heads=("cls_classifier", "distillation_classifier"),
    shapes={
        "deit.embeddings.patch_embeddings.projection": (1, 16, 192),
        "cls_classifier": (1, CLASSES, 16),
        "distillation_classifier": (1, CLASSES, 16),
    },
    reads={
        "deit.embeddings.patch_embeddings.projection": (
            "deit.embeddings.patch_embeddings.projection.weight",
            lambda weight: weight.flatten(1),
        ),
        "cls_classifier": ("cls_classifier.weight", _whole),
        "distillation_classifier": ("distillation_classifier.weight", _whole),
    },
    rest={"deit.embeddings.position_embeddings": "embedding"},
)


def _levit() -> nn.Module:
    from transformers import LevitConfig, LevitForImageClassificationWithTeacher

    torch.manual_seed(0)
    config = LevitConfig(
        image_size=128,
        hidden_sizes=[16, 16, 24],
        num_attention_heads=[2, 2, 3],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
        patch_size=16,
        num_labels=CLASSES,
    )
    return LevitForImageClassificationWithTeacher(config).train()


LEVIT_STAGE = "levit.encoder.stages.0"

LEVIT = RealModel(
    name="transformers: LeViT with a teacher",
    imports=("transformers",),
    build=_levit,
    loss=_two_head_loss,
    heads=("classifier.linear", "classifier_distill.linear"),
    shapes={
        # Each of two heads has 4 rows of q, then 4 of k, then 8 of v.
        f"{LEVIT_STAGE}.layers.0.module.queries_keys_values.linear.q": (1, 8, 16),
        f"{LEVIT_STAGE}.layers.0.module.queries_keys_values.linear.k": (1, 8, 16),
        f"{LEVIT_STAGE}.layers.0.module.queries_keys_values.linear.v": (1, 16, 16),
        f"{LEVIT_STAGE}.layers.0.module.projection.linear": (1, 16, 16),
        # Each of four heads has 4 rows of k, then 16 of v; q comes from fewer pixels.
        f"{LEVIT_STAGE}.layers.2.keys_values.linear.k": (1, 16, 16),
        f"{LEVIT_STAGE}.layers.2.keys_values.linear.v": (1, 64, 16),
        f"{LEVIT_STAGE}.layers.2.queries.linear": (1, 16, 16),
        "classifier.linear": (1, CLASSES, 24),
        "classifier_distill.linear": (1, CLASSES, 24),
    },
    reads={
        f"{LEVIT_STAGE}.layers.0.module.queries_keys_values.linear.v": (
            f"{LEVIT_STAGE}.layers.0.module.queries_keys_values.linear.weight",
            _rows_by_head(2, 8, 16),
        ),
        f"{LEVIT_STAGE}.layers.2.keys_values.linear.k": (
            f"{LEVIT_STAGE}.layers.2.keys_values.linear.weight",
            _rows_by_head(4, 0, 4),
        ),
        "classifier_distill.linear": ("classifier_distill.linear.weight", _whole),
    },
    rest={"*.attention_biases": "table"},
)


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=VOCABULARY - 1,
    )
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    return CLIPModel(config).train()


def _contrastive_loss(model: nn.Module) -> Tensor:
    tokens = _tokens(rows=2)
    tokens[:, -1] = VOCABULARY - 1
    loss: Tensor = model(input_ids=tokens, pixel_values=_images(32), return_loss=True).loss
    return loss


CLIP = RealModel(
    name="transformers: CLIP",
    imports=("transformers",),
    build=_clip,
    loss=_contrastive_loss,
    heads=("visual_projection", "text_projection"),
    shapes={
        "vision_model.embeddings.patch_embedding": (1, 24, 192),
        "visual_projection": (1, 8, 24),
        "text_projection": (1, 8, 16),
    },
    reads={
        "vision_model.embeddings.patch_embedding": (
            "vision_model.embeddings.patch_embedding.weight",
            lambda weight: weight.flatten(1),
        ),
        "visual_projection": ("visual_projection.weight", _whole),
        "text_projection": ("text_projection.weight", _whole),
    },
    rest={
        "text_model.embeddings.token_embedding.weight": "embedding",
        "text_model.embeddings.position_embedding.weight": "embedding",
        "vision_model.embeddings.position_embedding.weight": "embedding",
    },
)


def _segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        decoder_hidden_size=12,
        num_labels=CLASSES,
    )
    return SegformerForSemanticSegmentation(config).train()


def _pixel_class_loss(model: nn.Module) -> Tensor:
    images = _images(32)
    labels = torch.randint(0, CLASSES, (2, 32, 32))
    loss: Tensor = model(pixel_values=images, labels=labels).loss
    return loss


SEGFORMER = RealModel(
    name="transformers: Segformer, semantic segmentation",
    imports=("transformers",),
    build=_segformer,
    loss=_pixel_class_loss,
    # A 1x1 convolution.
    heads=("decode_head.classifier",),
    shapes={
        "segformer.stages.0.patch_embeddings.proj": (1, 8, 147),
        "segformer.stages.0.blocks.0.attention.q_proj": (1, 8, 8),
        "segformer.stages.0.blocks.0.attention.sequence_reduction.sequence_reduction": (1, 8, 32),
        "segformer.stages.0.blocks.0.mlp.fc1": (1, 16, 8),
        "segformer.stages.1.blocks.0.mlp.fc2": (1, 16, 32),
        "decode_head.linear_fuse": (1, 12, 24),
        "decode_head.classifier": (1, CLASSES, 12),
    },
    reads={
        "segformer.stages.0.blocks.0.attention.sequence_reduction.sequence_reduction": (
            "segformer.stages.0.blocks.0.attention.sequence_reduction.sequence_reduction.weight",
            lambda weight: weight.flatten(1),
        ),
        "segformer.stages.1.blocks.0.mlp.fc2": (
            "segformer.stages.1.blocks.0.mlp.fc2.weight",
            _whole,
        ),
        "decode_head.classifier": (
            "decode_head.classifier.weight",
            lambda weight: weight.flatten(1),
        ),
    },
    rest={"*.dwconv.weight": "depthwise"},
)


def _detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        num_queries=4,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        dropout=0.0,
        num_labels=CLASSES,
    )
    return DetrForObjectDetection(config).train()


def _detection_loss(model: nn.Module) -> Tensor:
    labels = []
    for label in (1, 3):
        boxes = torch.tensor([[0.5, 0.5, 0.2, 0.3]])
        labels.append({"class_labels": torch.tensor([label]), "boxes": boxes})
    loss: Tensor = model(pixel_values=_images(64), labels=labels).loss
    return loss


DETR = RealModel(
    name="transformers: DETR",
    imports=("transformers", "scipy"),
    build=_detr,
    loss=_detection_loss,
    heads=("class_labels_classifier", "bbox_predictor.layers.2"),
    shapes={
        # The ResNet is frozen by the model.
        "model.backbone.model.embedder.embedder.convolution": (1, 8, 147),
        "model.input_projection": (1, 16, 16),
        "model.decoder.layers.0.encoder_attn.q_proj": (1, 16, 16),
        # One more class for "nothing there".
        "class_labels_classifier": (1, CLASSES + 1, 16),
        "bbox_predictor.layers.1": (1, 16, 16),
        "bbox_predictor.layers.2": (1, 4, 16),
    },
    reads={
        "model.input_projection": (
            "model.input_projection.weight",
            lambda weight: weight.flatten(1),
        ),
        "class_labels_classifier": ("class_labels_classifier.weight", _whole),
        "bbox_predictor.layers.2": ("bbox_predictor.layers.2.weight", _whole),
    },
    rest={"model.query_position_embeddings.weight": "embedding"},
)


# ------------------------------------------------------------------------------------------- sound


def _wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[8, 8],
        conv_stride=[5, 4],
        conv_kernel=[10, 4],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
    )
    return Wav2Vec2ForCTC(config).train()


def _ctc_loss(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    sound = torch.randn(2, 800)
    labels = torch.randint(3, VOCABULARY, (2, 6))
    loss: Tensor = model(input_values=sound, labels=labels).loss
    return loss


POSITIONS = "wav2vec2.encoder.pos_conv_embed.conv"


def _position_kernels(direction: Tensor) -> Tensor:
    """weight_norm by place in the kernel (dim=2), not by channel; the lengths as they begin."""
    length = direction.norm(dim=(0, 1), keepdim=True)
    weight = length.detach() * direction / length
    return weight.reshape(4, 4, 16)


WAV2VEC2 = RealModel(
    name="transformers: Wav2Vec2, CTC",
    imports=("transformers",),
    build=_wav2vec2,
    loss=_ctc_loss,
    heads=("lm_head",),
    shapes={
        "wav2vec2.feature_extractor.conv_layers.0.conv": (1, 8, 10),
        "wav2vec2.feature_extractor.conv_layers.1.conv": (1, 8, 32),
        "wav2vec2.feature_projection.projection": (1, 16, 8),
        # Four groups of four channels, and weight_norm.
        POSITIONS: (4, 4, 16),
        "wav2vec2.encoder.layers.0.attention.q_proj": (1, 16, 16),
        "lm_head": (1, VOCABULARY, 16),
    },
    reads={
        "wav2vec2.feature_extractor.conv_layers.1.conv": (
            "wav2vec2.feature_extractor.conv_layers.1.conv.weight",
            lambda weight: weight.flatten(1),
        ),
        POSITIONS: (f"{POSITIONS}.parametrizations.weight.original1", _position_kernels),
        "lm_head": ("lm_head.weight", _whole),
    },
)


# ---------------------------------------------------------------------------------- x_transformers


def _x_transformers() -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    torch.manual_seed(0)
    return TransformerWrapper(
        num_tokens=VOCABULARY,
        max_seq_len=16,
        tie_embedding=True,
        num_memory_tokens=2,
        attn_layers=Decoder(
            dim=16,
            depth=2,
            heads=2,
            attn_dim_head=8,
            attn_kv_heads=1,
            attn_num_mem_kv=2,
            ff_glu=True,
            ff_swish=True,
            rel_pos_bias=True,
        ),
    ).train()


def _next_logits_loss(model: nn.Module) -> Tensor:
    tokens = _tokens()
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])


X_TRANSFORMERS = RealModel(
    name="x_transformers: decoder with tied embeddings",
    imports=("x_transformers",),
    build=_x_transformers,
    loss=_next_logits_loss,
    # Tied by a lambda: no module but the table is there to name.
    heads=("token_emb.emb",),
    shapes={
        "attn_layers.layers.0.1.to_q": (1, 16, 16),
        "attn_layers.layers.0.1.to_k": (1, 8, 16),
        # The second half goes through the activation.
        "attn_layers.layers.1.1.ff.0.proj.up": (1, 64, 16),
        "attn_layers.layers.1.1.ff.0.proj.gate": (1, 64, 16),
        "attn_layers.layers.1.1.ff.2": (1, 16, 64),
        "attn_layers.layers.3.1.ff.0.proj.up": (1, 64, 16),
        "attn_layers.layers.3.1.ff.0.proj.gate": (1, 64, 16),
        "token_emb.emb": (1, VOCABULARY, 16),
    },
    reads={
        "attn_layers.layers.1.1.ff.0.proj.gate": (
            "attn_layers.layers.1.1.ff.0.proj.weight",
            _rows(64, 128),
        ),
        "attn_layers.layers.3.1.ff.0.proj.up": (
            "attn_layers.layers.3.1.ff.0.proj.weight",
            _rows(0, 64),
        ),
        "token_emb.emb": ("token_emb.emb.weight", _whole),
    },
    rest={
        "memory_tokens": "embedding",
        # Learned keys and values that every token sees.
        "*.mem_k": "embedding",
        "*.mem_v": "embedding",
        # A table of relative positions that is an nn.Embedding.
        "*.relative_attention_bias.weight": "embedding",
    },
)


# -------------------------------------------------------------------------------------------- peft


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _adapted_llama(dora: bool) -> nn.Module:
    """Adapters as in the middle of training: B is not zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        lora_dropout=0.0,
        init_lora_weights=False,
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(_llama(), config).train()


def _lora_on_llama() -> nn.Module:
    return _adapted_llama(dora=False)


def _dora_on_llama() -> nn.Module:
    return _adapted_llama(dora=True)


def _lora_on_gpt2() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["c_attn"],
        lora_dropout=0.0,
        init_lora_weights=False,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(_gpt2(), config).train()


def _lora_on_bert_classifier() -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    adapters = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["query", "value"],
        lora_dropout=0.0,
        init_lora_weights=False,
        task_type="SEQ_CLS",
    )
    return get_peft_model(BertForSequenceClassification(config), adapters).train()


def _sequence_class_loss(model: nn.Module) -> Tensor:
    loss: Tensor = model(input_ids=_tokens(), labels=torch.tensor([0, 3])).loss
    return loss


def _with_adapter(build: Callable[[], nn.Module], layer: str) -> Callable[[Tensor], Tensor]:
    """W + BA as a function of B; W and A are those of a model just built.

    Training with DoRA scales its rows, which moves no direction.
    """

    def rows(b: Tensor) -> Tensor:
        adapted: Any = build().get_submodule(layer)
        weight = adapted.base_layer.weight.detach().to(b)
        if adapted.fan_in_fan_out:
            weight = weight.T
        a = adapted.lora_A["default"].weight.detach().to(b)
        return weight + adapted.scaling["default"] * b @ a

    return rows


def _adapted_read(
    build: Callable[[], nn.Module], layer: str
) -> tuple[str, Callable[[Tensor], Tensor]]:
    return f"{layer}.lora_B.default.weight", _with_adapter(build, layer)


LAYER = "base_model.model.model.layers"

LORA_ON_LLAMA = RealModel(
    name="peft: LoRA on Llama",
    imports=("peft", "transformers"),
    build=_lora_on_llama,
    loss=_next_token_loss,
    heads=("base_model.model.lm_head",),
    shapes={
        f"{LAYER}.0.self_attn.q_proj": (1, 16, 16),
        f"{LAYER}.0.self_attn.k_proj": (1, 8, 16),
        f"{LAYER}.0.self_attn.v_proj": (1, 8, 16),
        f"{LAYER}.0.mlp.down_proj": (1, 16, 24),
        f"{LAYER}.1.self_attn.q_proj": (1, 16, 16),
        f"{LAYER}.1.self_attn.v_proj": (1, 8, 16),
        f"{LAYER}.1.mlp.down_proj": (1, 16, 24),
        "base_model.model.lm_head": (1, VOCABULARY, 16),
    },
    reads={
        f"{LAYER}.0.self_attn.q_proj": _adapted_read(_lora_on_llama, f"{LAYER}.0.self_attn.q_proj"),
        f"{LAYER}.0.self_attn.v_proj": _adapted_read(_lora_on_llama, f"{LAYER}.0.self_attn.v_proj"),
        f"{LAYER}.1.mlp.down_proj": _adapted_read(_lora_on_llama, f"{LAYER}.1.mlp.down_proj"),
    },
    rest={"base_model.model.model.embed_tokens.weight": "embedding"},
    declared=True,
)

DORA_ON_LLAMA = RealModel(
    name="peft: DoRA on Llama",
    imports=("peft", "transformers"),
    build=_dora_on_llama,
    loss=_next_token_loss,
    heads=("base_model.model.lm_head",),
    shapes={
        f"{LAYER}.0.self_attn.q_proj": (1, 16, 16),
        f"{LAYER}.0.self_attn.v_proj": (1, 8, 16),
        f"{LAYER}.0.mlp.down_proj": (1, 16, 24),
        f"{LAYER}.1.self_attn.q_proj": (1, 16, 16),
        f"{LAYER}.1.self_attn.v_proj": (1, 8, 16),
        f"{LAYER}.1.mlp.down_proj": (1, 16, 24),
        "base_model.model.lm_head": (1, VOCABULARY, 16),
    },
    reads={
        f"{LAYER}.0.self_attn.q_proj": _adapted_read(_dora_on_llama, f"{LAYER}.0.self_attn.q_proj"),
        f"{LAYER}.0.self_attn.v_proj": _adapted_read(_dora_on_llama, f"{LAYER}.0.self_attn.v_proj"),
        f"{LAYER}.1.mlp.down_proj": _adapted_read(_dora_on_llama, f"{LAYER}.1.mlp.down_proj"),
    },
    rest={"base_model.model.model.embed_tokens.weight": "embedding"},
    declared=True,
)

C_ATTN = "base_model.model.transformer.h.0.attn.c_attn"


def _adapted_c_attn(start: int, stop: int) -> tuple[str, Callable[[Tensor], Tensor]]:
    parameter, rows = _adapted_read(_lora_on_gpt2, C_ATTN)
    return parameter, lambda b: rows(b)[start:stop]


LORA_ON_GPT2 = RealModel(
    name="peft: LoRA on GPT-2",
    imports=("peft", "transformers"),
    build=_lora_on_gpt2,
    loss=_next_token_loss,
    heads=("base_model.model.lm_head",),
    shapes={
        # The wrapped layer is a Conv1D, stored (in, out), and packs q, k and v.
        f"{C_ATTN}.q": (1, 16, 16),
        f"{C_ATTN}.k": (1, 16, 16),
        f"{C_ATTN}.v": (1, 16, 16),
        "base_model.model.transformer.h.0.attn.c_proj": (1, 16, 16),
        "base_model.model.transformer.h.0.mlp.c_fc": (1, 64, 16),
        "base_model.model.transformer.h.0.mlp.c_proj": (1, 16, 64),
        "base_model.model.transformer.h.1.attn.c_attn.q": (1, 16, 16),
        "base_model.model.transformer.h.1.attn.c_attn.k": (1, 16, 16),
        "base_model.model.transformer.h.1.attn.c_attn.v": (1, 16, 16),
        "base_model.model.transformer.h.1.attn.c_proj": (1, 16, 16),
        "base_model.model.transformer.h.1.mlp.c_fc": (1, 64, 16),
        "base_model.model.transformer.h.1.mlp.c_proj": (1, 16, 64),
        "base_model.model.lm_head": (1, VOCABULARY, 16),
    },
    reads={
        f"{C_ATTN}.q": _adapted_c_attn(0, 16),
        f"{C_ATTN}.k": _adapted_c_attn(16, 32),
        f"{C_ATTN}.v": _adapted_c_attn(32, 48),
    },
    rest={"base_model.model.transformer.wpe.weight": "embedding"},
    declared=True,
)

ENCODER_LAYER = "base_model.model.bert.encoder.layer"
CLASSIFIER = "base_model.model.classifier.modules_to_save.default"

LORA_ON_BERT_CLASSIFIER = RealModel(
    name="peft: LoRA on a BERT classifier",
    imports=("peft", "transformers"),
    build=_lora_on_bert_classifier,
    loss=_sequence_class_loss,
    # Trained in full, as a copy beside the original one, which is not used.
    heads=(CLASSIFIER,),
    shapes={
        f"{ENCODER_LAYER}.0.attention.self.query": (1, 16, 16),
        f"{ENCODER_LAYER}.0.attention.self.value": (1, 16, 16),
        f"{ENCODER_LAYER}.1.attention.self.query": (1, 16, 16),
        f"{ENCODER_LAYER}.1.attention.self.value": (1, 16, 16),
        CLASSIFIER: (1, CLASSES, 16),
    },
    reads={
        f"{ENCODER_LAYER}.0.attention.self.query": _adapted_read(
            _lora_on_bert_classifier, f"{ENCODER_LAYER}.0.attention.self.query"
        ),
        f"{ENCODER_LAYER}.1.attention.self.value": _adapted_read(
            _lora_on_bert_classifier, f"{ENCODER_LAYER}.1.attention.self.value"
        ),
        CLASSIFIER: (f"{CLASSIFIER}.weight", _whole),
    },
    rest={"base_model.model.bert.embeddings.*.weight": "embedding"},
)


MODELS = (
    GPT2,
    MIXTRAL,
    GPT_OSS,
    PHI3,
    BLOOM,
    MAMBA,
    SEGFORMER,
    X_TRANSFORMERS,
    LORA_ON_LLAMA,
    OPENAI_GPT,
    GPT_NEOX,
    FALCON,
    FALCON_MULTI_QUERY,
    QWEN3_MOE,
    DBRX,
    MAMBA2,
    BERT,
    T5,
    VIT,
    DEIT,
    LEVIT,
    CLIP,
    DETR,
    WAV2VEC2,
    DORA_ON_LLAMA,
    LORA_ON_GPT2,
    LORA_ON_BERT_CLASSIFIER,
)
