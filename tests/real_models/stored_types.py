"""Tiny models of transformers by their type: settings, classes, and the names in their files."""

from __future__ import annotations

from typing import Any

WIDTH = 16
TEXT = {
    "vocab_size": 40,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = TEXT | {"num_key_value_heads": 2, "head_dim": 4}
GPT = {
    "vocab_size": 40,
    "n_positions": 32,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT = EXPERTS | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
}
SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": 40,
    "d_model": WIDTH,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
IMAGE = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}
STAGES = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "hidden_sizes": [8, 16],
    "num_stages": 2,
    "window_size": 4,
    "num_labels": 5,
}
TWO = {
    "text_config": TEXT | {"projection_dim": 12},
    "vision_config": IMAGE,
    "projection_dim": 12,
}

CASES: list[tuple[str, dict[str, Any], str]] = []
"""Type, settings, and names of classes without the prefix that they share."""


def _add(kind: str, settings: dict[str, Any], *classes: str) -> None:
    for one in classes:
        CASES.append((kind, settings, one))


_add("gpt2", GPT, "GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification")
_add("gpt2", GPT | {"add_cross_attention": True}, "GPT2LMHeadModel")
_add("gpt2", GPT | {"n_inner": WIDTH}, "GPT2ForTokenClassification", "GPT2DoubleHeadsModel")
_add("openai-gpt", GPT, "OpenAIGPTLMHeadModel", "OpenAIGPTModel")
_add("imagegpt", GPT, "ImageGPTForCausalImageModeling", "ImageGPTForImageClassification")
_add(
    "gpt_neo",
    TEXT | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "GPTNeoForCausalLM",
    "GPTNeoModel",
    "GPTNeoForSequenceClassification",
)
_add("gpt_neox", TEXT, "GPTNeoXForCausalLM", "GPTNeoXModel", "GPTNeoXForSequenceClassification")
_add("gpt_neox", TEXT | {"tie_word_embeddings": True}, "GPTNeoXForCausalLM")
_add("gptj", GPT | {"rotary_dim": 4}, "GPTJForCausalLM", "GPTJModel")
_add("gpt_bigcode", GPT, "GPTBigCodeForCausalLM", "GPTBigCodeModel")
_add("gpt_bigcode", GPT | {"multi_query": False}, "GPTBigCodeForCausalLM")
_add("codegen", GPT | {"rotary_dim": 4}, "CodeGenForCausalLM", "CodeGenModel")
_add(
    "bloom",
    {"vocab_size": 40, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4},
    "BloomForCausalLM",
    "BloomModel",
    "BloomForTokenClassification",
)
_add("falcon", TEXT | {"multi_query": True}, "FalconForCausalLM", "FalconModel")
_add("falcon", TEXT | {"multi_query": False, "alibi": True}, "FalconForCausalLM")
_add(
    "falcon",
    TEXT | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "FalconForCausalLM",
    "FalconForSequenceClassification",
)
_add(
    "mpt",
    {"vocab_size": 40, "d_model": WIDTH, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
    "MptForCausalLM",
    "MptModel",
)
_add("opt", TEXT | {"ffn_dim": 24, "word_embed_proj_dim": WIDTH}, "OPTForCausalLM", "OPTModel")
_add(
    "opt",
    TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "OPTForCausalLM",
    "OPTForSequenceClassification",
)
_add(
    "llama",
    DECODER,
    "LlamaForCausalLM",
    "LlamaModel",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaForQuestionAnswering",
)
_add("llama", DECODER | {"tie_word_embeddings": True}, "LlamaForCausalLM")
_add("mistral", DECODER, "MistralForCausalLM", "MistralModel")
_add(
    "mixtral",
    DECODER | {"num_local_experts": 4},
    "MixtralForCausalLM",
    "MixtralModel",
    "MixtralForSequenceClassification",
)
_add("qwen2", DECODER, "Qwen2ForCausalLM", "Qwen2Model", "Qwen2ForSequenceClassification")
_add(
    "qwen2_moe",
    EXPERTS | {"shared_expert_intermediate_size": 20, "decoder_sparse_step": 1},
    "Qwen2MoeForCausalLM",
)
_add("qwen3", DECODER | {"tie_word_embeddings": True}, "Qwen3ForCausalLM", "Qwen3Model")
_add("qwen3_moe", EXPERTS | {"decoder_sparse_step": 1}, "Qwen3MoeForCausalLM", "Qwen3MoeModel")
_add(
    "qwen3_next",
    EXPERTS
    | {
        "shared_expert_intermediate_size": 20,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "Qwen3NextForCausalLM",
)
_add("gemma", DECODER, "GemmaForCausalLM", "GemmaModel", "GemmaForSequenceClassification")
_add("gemma2", DECODER, "Gemma2ForCausalLM", "Gemma2Model")
_add("gemma3_text", DECODER, "Gemma3ForCausalLM", "Gemma3TextModel")
_add(
    "gemma3",
    {
        "text_config": DECODER,
        "vision_config": IMAGE,
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
        "boi_token_index": 6,
        "eoi_token_index": 7,
    },
    "Gemma3ForConditionalGeneration",
)
_add("phi", DECODER, "PhiForCausalLM", "PhiModel")
_add("phi3", DECODER, "Phi3ForCausalLM", "Phi3Model", "Phi3ForTokenClassification")
_add("phimoe", DECODER | {"num_local_experts": 4}, "PhimoeForCausalLM")
_add("stablelm", DECODER, "StableLmForCausalLM", "StableLmModel")
_add("olmo", DECODER, "OlmoForCausalLM")
_add("olmo2", DECODER, "Olmo2ForCausalLM")
_add("olmoe", EXPERTS, "OlmoeForCausalLM", "OlmoeModel")
_add("cohere", DECODER, "CohereForCausalLM")
_add("starcoder2", DECODER, "Starcoder2ForCausalLM")
_add("glm", DECODER, "GlmForCausalLM")
_add("glm4", DECODER, "Glm4ForCausalLM")
_add("persimmon", TEXT, "PersimmonForCausalLM")
_add("deepseek_v2", LATENT | {"topk_method": "greedy"}, "DeepseekV2ForCausalLM")
_add("deepseek_v3", LATENT, "DeepseekV3ForCausalLM", "DeepseekV3Model")
_add("gpt_oss", DECODER | {"num_local_experts": 4}, "GptOssForCausalLM", "GptOssModel")
_add("granite", DECODER, "GraniteForCausalLM")
_add("granitemoe", DECODER | {"num_local_experts": 4}, "GraniteMoeForCausalLM")
_add(
    "llama4_text",
    EXPERTS | {"num_local_experts": 4, "intermediate_size_mlp": 20, "moe_layers": [1]},
    "Llama4ForCausalLM",
)
DBRX: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": WIDTH,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2},
}
_add("dbrx", DBRX, "DbrxForCausalLM", "DbrxModel")
_add(
    "jamba",
    DECODER
    | {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 3,
        "use_mamba_kernels": False,
    },
    "JambaForCausalLM",
)
MAMBA = {
    "vocab_size": 40,
    "hidden_size": WIDTH,
    "state_size": 4,
    "num_hidden_layers": 2,
    "time_step_rank": 3,
}
_add("mamba", MAMBA, "MambaForCausalLM", "MambaModel")
_add("falcon_mamba", MAMBA, "FalconMambaForCausalLM")
_add("mamba2", MAMBA | {"num_heads": 8, "head_dim": 4, "n_groups": 2}, "Mamba2ForCausalLM")
_add(
    "bert",
    TEXT,
    "BertModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForPreTraining",
    "BertLMHeadModel",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
)
_add(
    "roberta",
    TEXT,
    "RobertaModel",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "RobertaForTokenClassification",
    "RobertaForQuestionAnswering",
    "RobertaForCausalLM",
)
_add("camembert", TEXT, "CamembertForMaskedLM", "CamembertForSequenceClassification")
_add("xlm-roberta", TEXT, "XLMRobertaForMaskedLM", "XLMRobertaForSequenceClassification")
_add(
    "distilbert",
    {"vocab_size": 40, "dim": WIDTH, "hidden_dim": 24, "n_layers": 2, "n_heads": 4},
    "DistilBertModel",
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
    "DistilBertForQuestionAnswering",
    "DistilBertForTokenClassification",
)
_add(
    "albert",
    TEXT | {"embedding_size": 8},
    "AlbertModel",
    "AlbertForMaskedLM",
    "AlbertForSequenceClassification",
)
_add(
    "electra",
    TEXT | {"embedding_size": 8},
    "ElectraModel",
    "ElectraForMaskedLM",
    "ElectraForPreTraining",
    "ElectraForSequenceClassification",
)
_add(
    "deberta",
    TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaModel",
    "DebertaForMaskedLM",
    "DebertaForSequenceClassification",
)
_add(
    "deberta-v2",
    TEXT
    | {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": True,
        "position_buckets": 8,
        "conv_kernel_size": 3,
    },
    "DebertaV2Model",
    "DebertaV2ForMaskedLM",
    "DebertaV2ForSequenceClassification",
    "DebertaV2ForQuestionAnswering",
)
_add(
    "mpnet",
    TEXT | {"pad_token_id": 1},
    "MPNetModel",
    "MPNetForMaskedLM",
    "MPNetForSequenceClassification",
)
_add(
    "funnel",
    {
        "vocab_size": 40,
        "d_model": WIDTH,
        "n_head": 4,
        "d_head": 4,
        "d_inner": 24,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
    },
    "FunnelForMaskedLM",
)
_add(
    "modernbert",
    TEXT | {"cls_token_id": 1, "sep_token_id": 2},
    "ModernBertModel",
    "ModernBertForMaskedLM",
    "ModernBertForSequenceClassification",
)
_add(
    "xlnet",
    {"vocab_size": 40, "d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 24},
    "XLNetLMHeadModel",
    "XLNetModel",
    "XLNetForSequenceClassification",
)
_add("t5", T5, "T5ForConditionalGeneration", "T5Model", "T5EncoderModel")
_add(
    "t5",
    T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "T5ForConditionalGeneration",
)
_add("mt5", T5, "MT5ForConditionalGeneration")
_add("umt5", T5, "UMT5ForConditionalGeneration")
_add("bart", SEQ2SEQ, "BartForConditionalGeneration", "BartModel", "BartForSequenceClassification")
_add("mbart", SEQ2SEQ, "MBartForConditionalGeneration")
_add("pegasus", SEQ2SEQ, "PegasusForConditionalGeneration")
_add("marian", SEQ2SEQ, "MarianMTModel")
_add("m2m_100", SEQ2SEQ, "M2M100ForConditionalGeneration")
_add(
    "whisper",
    SEQ2SEQ
    | {
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "max_target_positions": 16,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
    "WhisperForConditionalGeneration",
    "WhisperModel",
    "WhisperForAudioClassification",
)
SPEECH = TEXT | {
    "conv_dim": [8, 8],
    "conv_stride": [2, 2],
    "conv_kernel": [3, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_codevectors_per_group": 4,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
    "classifier_proj_size": 8,
    "num_labels": 5,
}
_add(
    "wav2vec2",
    SPEECH,
    "Wav2Vec2Model",
    "Wav2Vec2ForCTC",
    "Wav2Vec2ForSequenceClassification",
    "Wav2Vec2ForPreTraining",
)
_add("hubert", SPEECH, "HubertForCTC", "HubertModel")
_add("wavlm", SPEECH, "WavLMModel", "WavLMForCTC")
_add("vit", IMAGE, "ViTModel", "ViTForImageClassification")
_add(
    "deit",
    IMAGE,
    "DeiTModel",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
)
_add("swin", STAGES, "SwinModel", "SwinForImageClassification")
_add("swinv2", STAGES, "Swinv2ForImageClassification")
_add("beit", IMAGE | {"vocab_size": 40}, "BeitModel", "BeitForImageClassification")
_add("convnext", STAGES, "ConvNextModel", "ConvNextForImageClassification")
_add("convnextv2", STAGES, "ConvNextV2ForImageClassification")
_add(
    "resnet",
    {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 5},
    "ResNetModel",
    "ResNetForImageClassification",
)
_add("dinov2", IMAGE | {"mlp_ratio": 2}, "Dinov2Model", "Dinov2ForImageClassification")
_add("dinov2", IMAGE | {"mlp_ratio": 2, "use_swiglu_ffn": True}, "Dinov2Model")
_add("clip", TWO, "CLIPModel")
_add("clip_text_model", TEXT | {"projection_dim": 12}, "CLIPTextModelWithProjection")
_add("clip_vision_model", IMAGE | {"projection_dim": 12}, "CLIPVisionModelWithProjection")
_add("siglip", TWO, "SiglipModel")
_add("siglip_vision_model", IMAGE, "SiglipVisionModel")
_add(
    "segformer",
    {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 12,
        "num_labels": 5,
    },
    "SegformerModel",
    "SegformerForImageClassification",
    "SegformerForSemanticSegmentation",
)
_add(
    "blip",
    TWO | {"image_text_hidden_size": 12},
    "BlipForConditionalGeneration",
    "BlipForImageTextRetrieval",
)
_add(
    "vit_mae",
    IMAGE
    | {
        "decoder_hidden_size": 8,
        "decoder_num_attention_heads": 2,
        "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 12,
    },
    "ViTMAEModel",
    "ViTMAEForPreTraining",
)


# Where both axes have one length, shapes do not tell.
_add("gpt_oss", DECODER | {"num_local_experts": 4, "intermediate_size": WIDTH}, "GptOssForCausalLM")
_add(
    "mixtral", DECODER | {"num_local_experts": 4, "intermediate_size": WIDTH}, "MixtralForCausalLM"
)
_add("qwen3_moe", EXPERTS | {"moe_intermediate_size": WIDTH}, "Qwen3MoeForCausalLM")
_add(
    "dbrx",
    DBRX | {"ffn_config": DBRX["ffn_config"] | {"ffn_hidden_size": WIDTH}},
    "DbrxForCausalLM",
)
_add("gpt_neox", TEXT | {"num_attention_heads": 2}, "GPTNeoXForCausalLM")

# Families that have grown.
for _kind, _name in [
    ("olmo3", "Olmo3ForCausalLM"),
    ("cohere2", "Cohere2ForCausalLM"),
    ("smollm3", "SmolLM3ForCausalLM"),
    ("ernie4_5", "Ernie4_5ForCausalLM"),
    ("seed_oss", "SeedOssForCausalLM"),
    ("helium", "HeliumForCausalLM"),
    ("exaone4", "Exaone4ForCausalLM"),
    ("nemotron", "NemotronForCausalLM"),
    ("mistral", "MistralForSequenceClassification"),
    ("arcee", "ArceeForCausalLM"),
    ("ministral", "MinistralForCausalLM"),
    ("diffllama", "DiffLlamaForCausalLM"),
    ("bitnet", "BitNetForCausalLM"),
    ("apertus", "ApertusForCausalLM"),
    ("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM"),
    ("lfm2", "Lfm2ForCausalLM"),
    ("minicpm3", "MiniCPM3ForCausalLM"),
]:
    _add(_kind, DECODER, _name)
for _kind, _name in [
    ("flex_olmo", "FlexOlmoForCausalLM"),
    ("glm4_moe", "Glm4MoeForCausalLM"),
    ("dots1", "Dots1ForCausalLM"),
    ("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    ("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    ("minimax", "MiniMaxForCausalLM"),
    ("minimax_m2", "MiniMaxM2ForCausalLM"),
    ("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    ("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
]:
    _add(_kind, LATENT | {"num_local_experts": 4, "num_key_value_heads": 2}, _name)
for _kind, _name in [
    ("megatron-bert", "MegatronBertForMaskedLM"),
    ("ernie", "ErnieForMaskedLM"),
    ("roformer", "RoFormerForMaskedLM"),
    ("layoutlm", "LayoutLMForTokenClassification"),
    ("big_bird", "BigBirdForMaskedLM"),
    ("convbert", "ConvBertForMaskedLM"),
    ("data2vec-text", "Data2VecTextForMaskedLM"),
    ("xlm-roberta-xl", "XLMRobertaXLForMaskedLM"),
    ("longformer", "LongformerForMaskedLM"),
    ("esm", "EsmForMaskedLM"),
    ("rembert", "RemBertForMaskedLM"),
    ("nystromformer", "NystromformerForMaskedLM"),
    ("splinter", "SplinterForQuestionAnswering"),
]:
    _add(_kind, TEXT | {"pad_token_id": 1}, _name)
for _kind, _name in [
    ("blenderbot", "BlenderbotForConditionalGeneration"),
    ("blenderbot-small", "BlenderbotSmallForConditionalGeneration"),
    ("led", "LEDForConditionalGeneration"),
    ("plbart", "PLBartForConditionalGeneration"),
    ("mvp", "MvpForConditionalGeneration"),
    ("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration"),
    ("pegasus_x", "PegasusXForConditionalGeneration"),
]:
    _add(_kind, SEQ2SEQ, _name)
_add("longt5", T5, "LongT5ForConditionalGeneration")
_add(
    "switch_transformers",
    T5 | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4},
    "SwitchTransformersForConditionalGeneration",
)
_add("decision_transformer", GPT | {"hidden_size": WIDTH}, "DecisionTransformerModel")
for _kind, _name in [
    ("ijepa", "IJepaModel"),
    ("vit_msn", "ViTMSNForImageClassification"),
    ("audio-spectrogram-transformer", "ASTForAudioClassification"),
    ("dinov2_with_registers", "Dinov2WithRegistersForImageClassification"),
    ("dinov3_vit", "DINOv3ViTModel"),
    ("data2vec-vision", "Data2VecVisionForImageClassification"),
    ("siglip2_vision_model", "Siglip2VisionModel"),
    ("timesformer", "TimesformerForVideoClassification"),
    ("videomae", "VideoMAEForVideoClassification"),
    ("vivit", "VivitForVideoClassification"),
]:
    _add(_kind, IMAGE, _name)
_add("yolos", IMAGE | {"image_size": [16, 16]}, "YolosForObjectDetection")
_add("squeezebert", TEXT | {"embedding_size": WIDTH}, "SqueezeBertForMaskedLM")
for _kind, _name in [
    ("unispeech", "UniSpeechForCTC"),
    ("unispeech-sat", "UniSpeechSatForCTC"),
    ("data2vec-audio", "Data2VecAudioForCTC"),
    ("sew", "SEWForCTC"),
    ("wav2vec2-conformer", "Wav2Vec2ConformerForCTC"),
]:
    _add(_kind, SPEECH, _name)
LLAVA = {
    "text_config": DECODER | {"model_type": "llama"},
    "vision_config": IMAGE | {"model_type": "clip_vision_model"},
    "image_token_index": 5,
    "image_token_id": 5,
}
_add("llava", LLAVA, "LlavaForConditionalGeneration")
_add(
    "paligemma",
    LLAVA
    | {
        "text_config": DECODER | {"model_type": "gemma"},
        "vision_config": IMAGE | {"model_type": "siglip_vision_model"},
        "projection_dim": WIDTH,
    },
    "PaliGemmaForConditionalGeneration",
)
_add(
    "mistral3",
    LLAVA
    | {
        "text_config": DECODER | {"model_type": "mistral"},
        "vision_config": IMAGE | {"model_type": "pixtral", "head_dim": 4},
    },
    "Mistral3ForConditionalGeneration",
)
_add(
    "qwen2_vl",
    {
        "text_config": DECODER
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1]}},
        "vision_config": {
            "depth": 2,
            "embed_dim": 8,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "patch_size": 8,
        },
    },
    "Qwen2VLForConditionalGeneration",
)
_add(
    "qwen2_5_vl",
    {
        "text_config": DECODER
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1]}},
        "vision_config": {
            "depth": 2,
            "hidden_size": WIDTH,
            "out_hidden_size": WIDTH,
            "intermediate_size": 24,
            "num_heads": 4,
            "patch_size": 8,
        },
    },
    "Qwen2_5_VLForConditionalGeneration",
)
_add(
    "qwen3_vl",
    {
        "text_config": DECODER
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 0],
            }
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": WIDTH,
            "out_hidden_size": WIDTH,
            "intermediate_size": 24,
            "num_heads": 4,
            "patch_size": 8,
            "deepstack_visual_indexes": [0],
        },
    },
    "Qwen3VLForConditionalGeneration",
)

_GPT2_DECODER = GPT | {"model_type": "gpt2", "add_cross_attention": True, "is_decoder": True}
_BERT_DECODER = TEXT | {"model_type": "bert", "add_cross_attention": True, "is_decoder": True}
_add(
    "vision-encoder-decoder",
    {"encoder": IMAGE | {"model_type": "vit"}, "decoder": _GPT2_DECODER},
    "VisionEncoderDecoderModel",
)
_add(
    "encoder-decoder",
    {"encoder": TEXT | {"model_type": "bert"}, "decoder": _BERT_DECODER},
    "EncoderDecoderModel",
)

# Files keep the names of transformers 4; its version 5 has others in memory.

_ATTENTION = (
    (r"attention\.(attention|self)\.query", "attention.q_proj"),
    (r"attention\.(attention|self)\.key", "attention.k_proj"),
    (r"attention\.(attention|self)\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
)
_BLOCK = (
    *_ATTENTION,
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)
_VIT = (*_BLOCK, (r"decoder_encoder\.layer", "decoder_layers"), (r"encoder\.layer\b", "layers"))

_MIXTRAL = ((r"block_sparse_moe", "mlp"),)
_GRANITE = (
    (r"input_linear", "experts.gate_up_proj"),
    (r"output_linear", "experts.down_proj"),
    (r"router\.layer", "router"),
)
_LLAVA = (
    (r"^language_model\.model", "model.language_model"),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^(vision_tower|multi_modal_projector)", r"model.\1"),
)
_QWEN_VL = (
    (r"^model\.(embed_tokens|layers)", r"model.language_model.\1"),
    (r"^visual", "model.visual"),
)

RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "gpt_neox": ((r"^embed_out", "lm_head"),),
    "mixtral": _MIXTRAL,
    "phimoe": ((r"block_sparse_moe\.gate", "mlp.router"), (r"block_sparse_moe", "mlp")),
    "granitemoe": _GRANITE,
    "minimax": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "granitemoeshared": _GRANITE,
    "gemma3": _LLAVA,
    "llava": _LLAVA,
    "paligemma": _LLAVA,
    "mistral3": _LLAVA,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "ijepa": _VIT,
    "vit_msn": (*_VIT, (r"^layers", "vit.layers")),
    "vivit": _VIT,
    "audio-spectrogram-transformer": _VIT,
    "vision-encoder-decoder": _VIT,
    "dinov2_with_registers": _ATTENTION,
    "dinov3_vit": ((r"^layer", "model.layer"),),
    "vit": _VIT,
    "deit": _VIT,
    "beit": _VIT,
    "vit_mae": _VIT,
    "swin": _BLOCK,
    "dinov2": (
        *_ATTENTION,
        (r"weights_in\.gate", "gate_proj"),
        (r"weights_in\.up", "up_proj"),
        (r"weights_out", "down_proj"),
    ),
    "segformer": (
        (r"attention\.self\.sr", "attention.sequence_reduction.sequence_reduction"),
        *_ATTENTION,
        (r"encoder\.block\.(\d+)", r"stages.\1.blocks"),
        (r"encoder\.patch_embeddings\.(\d+)", r"stages.\1.patch_embeddings"),
        (r"mlp\.dense", "mlp.fc"),
        (r"linear_c\b", "linear_projections"),
    ),
}
"""Patterns of names in files and what the model calls them, by type."""

NOT_STORED = {"marian": ("model.encoder.embed_positions", "model.decoder.embed_positions")}
"""Tables that a model computes, so that its file does not hold them, by type."""
