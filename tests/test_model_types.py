"""Weights beside a config.json: orientation, heads, experts and ties by the type of the model."""

import math
from random import Random

import pytest
import torch
from torch import nn

from lightning_hsu._neurons.known_model import known_model
from lightning_hsu._neurons.model_types import unknown_type
from lightning_hsu._neurons.select import select
from lightning_hsu._neurons.state_dict import neurons_of_state_dict

WIDTH, HEADS, WORDS = 8, 2, 20
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": WIDTH,
    "n_head": HEADS,
}
NEOX = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
}
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_local_experts": 4,
    "pad_token_id": None,
}
QKV = "gpt_neox.layers.0.attention.query_key_value"
MOE = "model.layers.0.block_sparse_moe"


def randoms(**shapes):
    """Random tensors by name; names have slashes in the place of dots."""
    torch.manual_seed(0)
    return {name.replace("/", "."): torch.randn(shape) for name, shape in shapes.items()}


def read(state, config, **settings):
    """The chosen sets by name, and the reasons why others are left out."""
    candidates = neurons_of_state_dict(state, config=config, **settings)
    chosen, skips = select(candidates, everything=True)
    reasons = {skip.name: skip.reason for skip in [*skips, *candidates.not_weights]}
    return {one.name: one for one in chosen}, reasons


def gpt2():
    return randoms(
        **{
            "wte/weight": (WORDS, WIDTH),
            "wpe/weight": (16, WIDTH),
            "h/0/attn/c_attn/weight": (WIDTH, 3 * WIDTH),
            "h/0/attn/c_attn/bias": (3 * WIDTH,),
            "h/0/attn/c_proj/weight": (WIDTH, WIDTH),
            "h/0/attn/c_proj/bias": (WIDTH,),
        }
    )


def by_rows(state):
    """The same with matrices (out, in) below the blocks, as other libraries write them."""
    return {name: x.T if "c_" in name and x.ndim == 2 else x for name, x in state.items()}


@pytest.mark.parametrize("without_bias", [False, True])
def test_files_of_other_libraries_show_that_their_outputs_are_rows(without_bias):
    state = gpt2()
    if without_bias:
        state = {name: x for name, x in state.items() if not name.endswith("bias")}
    wanted, _ = read(state, GPT2)
    found, _ = read(by_rows(state), GPT2)
    assert list(found) == list(wanted)
    for name, one in wanted.items():
        assert torch.equal(found[name].neurons(), one.neurons())
        assert found[name].head == one.head


def test_a_file_with_both_orientations_is_read_layer_by_layer():
    state = gpt2() | {"h.1.attn.c_attn.weight": torch.randn(3 * WIDTH, WIDTH)}
    state["h.1.attn.c_attn.bias"] = torch.randn(3 * WIDTH)
    found, _ = read(state, GPT2)
    for i, weight in (
        ("0", state["h.0.attn.c_attn.weight"].T),
        ("1", state["h.1.attn.c_attn.weight"]),
    ):
        assert torch.equal(found[f"h.{i}.attn.c_attn.k"].neurons()[0], weight[WIDTH : 2 * WIDTH])
    assert torch.equal(found["h.0.attn.c_proj"].neurons()[0], state["h.0.attn.c_proj.weight"].T)


def mixtral(experts=4):
    shapes = {
        "model/embed_tokens/weight": (WORDS, WIDTH),
        "model/layers/0/block_sparse_moe/gate/weight": (experts, WIDTH),
        "lm_head/weight": (WORDS, WIDTH),
    }
    for i in range(experts):
        name = f"model/layers/0/block_sparse_moe/experts/{i}"
        shapes |= {f"{name}/w1/weight": (6, WIDTH), f"{name}/w3/weight": (6, WIDTH)}
        shapes[f"{name}/w2/weight"] = (WIDTH, 6)
    return randoms(**shapes)


# Orientation


def test_square_layers_of_gpt2_are_read_by_columns():
    state = gpt2()
    state["h.0.attn.c_proj.weight"][:, 5] = 2 * state["h.0.attn.c_proj.weight"][:, 1]
    found, _ = read(state, GPT2)
    x = torch.nn.functional.normalize(found["h.0.attn.c_proj"].neurons()[0], dim=-1)
    cosines = (x @ x.T).fill_diagonal_(0)
    assert math.isclose(cosines[1, 5], 1, abs_tol=1e-5)
    assert (cosines > 0.999).sum() == 2
    without, _ = read(state, None)  # by its neighbours, which a note says
    assert torch.equal(without["h.0.attn.c_proj"].neurons(), found["h.0.attn.c_proj"].neurons())
    assert "neighbours" in without["h.0.attn.c_proj"].note
    assert not found["h.0.attn.c_proj"].note


def test_queries_keys_and_values_of_gpt2_are_columns_side_by_side():
    state = gpt2()
    found, _ = read(state, GPT2)
    weight = state["h.0.attn.c_attn.weight"]
    for i, part in enumerate("qkv"):
        expected = weight[:, i * WIDTH : (i + 1) * WIDTH].T
        assert torch.equal(found[f"h.0.attn.c_attn.{part}"].neurons()[0], expected)


def test_queries_keys_and_values_of_gpt_neox_are_by_head():
    state = randoms(**{f"{QKV.replace('.', '/')}/weight": (3 * WIDTH, WIDTH)})
    found, _ = read(state, NEOX)
    by_head = state[f"{QKV}.weight"].view(HEADS, 3, WIDTH // HEADS, WIDTH)
    for i, part in enumerate("qkv"):
        assert torch.equal(found[f"{QKV}.{part}"].neurons()[0], by_head[:, i].flatten(0, 1))


def test_what_the_user_says_goes_before_the_type():
    state = gpt2()
    found, _ = read(state, GPT2, neurons={"h.0.attn.c_proj": "rows"})
    expected = state["h.0.attn.c_proj.weight"]
    assert torch.equal(found["h.0.attn.c_proj"].neurons()[0], expected)


# Heads and ties


def test_a_tied_head_is_measured_in_place_of_the_embedding():
    state = gpt2()
    found, reasons = read(state, GPT2)
    assert reasons["wte"] == "tied to lm_head"
    head = found["lm_head"]
    assert head.head
    assert head.head_reason == "declared"
    assert head.kind == "linear"
    assert torch.equal(head.neurons()[0], state["wte.weight"])


@pytest.mark.parametrize(
    "change",
    [{"tie_word_embeddings": False}, {"architectures": ["GPT2Model"]}, {"architectures": 3}],
)
def test_no_tie_without_an_output_layer(change):
    found, _ = read(gpt2(), GPT2 | change)
    assert "lm_head" not in found
    assert found["wte"].kind == "embedding"


def test_a_stored_head_is_declared():
    state = gpt2() | randoms(**{"lm_head/weight": (WORDS, WIDTH)})
    found, reasons = read(state, GPT2)
    assert [name for name, one in found.items() if one.head] == ["lm_head"]
    assert found["lm_head"].head_reason == "declared"
    assert "wte" in found
    assert "wte" not in reasons


def test_two_names_of_one_memory_are_tied_even_where_padding_is_left_out():
    table = torch.randn(WORDS, WIDTH)
    state = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "pad_token_id": 0}
    found, reasons = read(state, config)
    assert list(found) == ["lm_head"]
    assert reasons["model.embed_tokens"] == "tied to lm_head"


@pytest.mark.parametrize(
    ("given", "row"), [(0, 0), (3, 3), (WORDS - 1, WORDS - 1), (-1, WORDS - 1)]
)
def test_the_row_of_the_padding_is_left_out(given, row):
    state = randoms(**{"model/embed_tokens/weight": (WORDS, WIDTH)})
    found, _ = read(state, {"model_type": "llama", "pad_token_id": given})
    weight = state["model.embed_tokens.weight"]
    expected = torch.cat([weight[:row], weight[row + 1 :]])
    assert torch.equal(found["model.embed_tokens"].neurons()[0], expected)


@pytest.mark.parametrize("given", [None, WORDS, -WORDS - 1, 1.0, True, "0", [0]])
def test_no_padding_outside_the_table(given):
    state = randoms(**{"model/embed_tokens/weight": (WORDS, WIDTH)})
    found, _ = read(state, {"model_type": "llama", "pad_token_id": given})
    assert found["model.embed_tokens"].shape == (1, WORDS, WIDTH)


# Experts


def test_experts_stored_one_by_one_are_one_set():
    state = mixtral()
    found, _ = read(state, MIXTRAL)
    assert set(found) == {
        "model.embed_tokens",
        f"{MOE}.gate",
        f"{MOE}.experts.gate_up_proj.gate",
        f"{MOE}.experts.gate_up_proj.up",
        f"{MOE}.experts.down_proj",
        "lm_head",
    }
    for stored, name in [
        ("w1", "gate_up_proj.gate"),
        ("w3", "gate_up_proj.up"),
        ("w2", "down_proj"),
    ]:
        weights = [state[f"{MOE}.experts.{i}.{stored}.weight"] for i in range(4)]
        assert torch.equal(found[f"{MOE}.experts.{name}"].neurons(), torch.stack(weights))


def test_mixtral_has_as_many_sets_from_files_of_either_version():
    apart = mixtral()
    stacks = {name: x for name, x in apart.items() if "experts" not in name}
    by_name = {}
    for name in ("w1", "w3", "w2"):
        weights = [apart[f"{MOE}.experts.{i}.{name}.weight"] for i in range(4)]
        by_name[name] = torch.stack(weights)
    stacks[f"{MOE}.experts.gate_up_proj"] = torch.cat([by_name["w1"], by_name["w3"]], 1)
    stacks[f"{MOE}.experts.down_proj"] = by_name["w2"]
    expected, _ = read(apart, MIXTRAL)
    found, _ = read(stacks, MIXTRAL)
    assert found.keys() == expected.keys()
    for name, one in found.items():
        assert torch.equal(one.neurons(), expected[name].neurons())


def test_only_the_experts_that_are_measured_are_read():
    state = mixtral()
    asked = []

    def load(name):
        asked.append(name)
        return state[name]

    stand_ins = {name: x.to("meta") for name, x in state.items()}
    found, _ = read(stand_ins, MIXTRAL, load=load)
    assert asked == []
    neurons = found[f"{MOE}.experts.down_proj"].neurons()
    assert sorted(asked) == [f"{MOE}.experts.{i}.w2.weight" for i in range(4)]
    assert neurons.shape == (4, WIDTH, 6)


def test_what_else_is_stored_of_an_expert_stays():
    state = mixtral()
    state[f"{MOE}.experts.0.extra.weight"] = torch.randn(4, WIDTH)
    found, _ = read(state, MIXTRAL)
    assert found[f"{MOE}.experts.0.extra"].shape == (1, 4, WIDTH)
    assert found[f"{MOE}.experts.down_proj"].shape == (4, WIDTH, 6)


def missing_one(state):
    del state[f"{MOE}.experts.2.w1.weight"]


def of_another_shape(state):
    state[f"{MOE}.experts.2.w1.weight"] = torch.randn(7, WIDTH)


def of_another_type(state):
    name = f"{MOE}.experts.2.w1.weight"
    state[name] = state[name].half()


@pytest.mark.parametrize("change", [missing_one, of_another_shape, of_another_type])
def test_experts_that_are_no_stack_stay_as_stored_and_one_line_says_so(change):
    state = mixtral()
    change(state)
    found, _ = read(state, MIXTRAL)
    assert f"{MOE}.experts.0.w3" in found
    notes = [one.note for one in found.values() if "one by one" in one.note]
    assert notes == ["experts are stored one by one: each has sets of its own"]


def test_quantised_experts_are_one_set_of_what_their_scales_make_of_them():
    state = mixtral()
    expected = []
    for i in range(4):
        name = f"{MOE}.experts.{i}.w2"
        weight = state[f"{name}.weight"].to(torch.float8_e4m3fn)
        scale = torch.full((1, 1), 0.5 + i)
        state |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scale}
        expected.append(weight.float() * scale)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = MIXTRAL | {"quantization_config": settings}
    stand_ins = {name: x.to("meta") for name, x in state.items()}
    found, _ = read(stand_ins, config, load=state.__getitem__)
    down = found[f"{MOE}.experts.down_proj"]
    torch.testing.assert_close(down.neurons(), torch.stack(expected))
    assert "dequantised" in down.note
    assert f"{MOE}.experts.0.w2" not in found


def test_a_format_that_fixes_the_rows_goes_before_the_class():
    path = "model.layers.0.mlp.experts"
    leaves = {"gate_up_proj": torch.randn(4, 2 * WIDTH, WIDTH)}
    leaves["down_proj"] = torch.randn(4, WIDTH, WIDTH)
    config = {"model_type": "gpt_oss", "hidden_size": WIDTH, "num_local_experts": 4}
    known = known_model(config, {path: leaves}, by_rows={(path, "gate_up_proj")})
    rule = known.of_weight(path, "gate_up_proj", (4, 2 * WIDTH, WIDTH)).rule
    parts = rule.parted(rule.arrange(leaves["gate_up_proj"]))
    assert torch.equal(parts["gate"], leaves["gate_up_proj"][:, ::2])
    assert torch.equal(parts["up"], leaves["gate_up_proj"][:, 1::2])
    assert known.of_weight(path, "down_proj", (4, WIDTH, WIDTH)).rule.columns


def test_stacks_of_gpt_oss_are_transposed_and_interleaved():
    path = "model.layers.0.mlp.experts"
    state = {
        f"{path}.gate_up_proj": torch.randn(4, WIDTH, 2 * WIDTH),
        f"{path}.down_proj": torch.randn(4, WIDTH, WIDTH),
    }
    config = {"model_type": "gpt_oss", "hidden_size": WIDTH, "num_local_experts": 4}
    found, _ = read(state, config)
    columns = state[f"{path}.gate_up_proj"].transpose(1, 2)
    assert torch.equal(found[f"{path}.gate_up_proj.gate"].neurons(), columns[:, ::2])
    assert torch.equal(found[f"{path}.gate_up_proj.up"].neurons(), columns[:, 1::2])
    down = state[f"{path}.down_proj"].transpose(1, 2)
    assert torch.equal(found[f"{path}.down_proj"].neurons(), down)


def test_square_stacks_of_llama_4_are_transposed_too():
    path = "model.layers.1.feed_forward.experts"
    state = {
        f"{path}.gate_up_proj": torch.randn(4, WIDTH, WIDTH),
        f"{path}.down_proj": torch.randn(4, WIDTH // 2, WIDTH),
    }
    config = {"model_type": "llama4_text", "hidden_size": WIDTH, "num_local_experts": 4}
    found, _ = read(state, config)
    columns = state[f"{path}.gate_up_proj"].transpose(1, 2)
    assert torch.equal(found[f"{path}.gate_up_proj.gate"].neurons(), columns[:, : WIDTH // 2])
    assert torch.equal(found[f"{path}.gate_up_proj.up"].neurons(), columns[:, WIDTH // 2 :])


def test_a_square_stack_in_a_model_is_no_convolution():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts, self.hidden_size = 4, WIDTH
            self.gate_up_proj = nn.Parameter(torch.randn(4, WIDTH, WIDTH))
            self.head = nn.Linear(WIDTH, 3)

    chosen, skips = select(Experts())
    assert [one.name for one in chosen] == ["head"]
    assert [skip.name for skip in skips] == ["gate_up_proj"]
    assert "neurons=" in skips[0].reason


# Configs that cannot be trusted


@pytest.mark.parametrize(
    "config", [None, {}, {"hidden_size": 8}, [], "gpt2", 3, {"architectures": ["GPT2LMHeadModel"]}]
)
def test_without_a_type_nothing_is_said(config):
    expected, reasons = read(gpt2(), None)
    found, given = read(gpt2(), config)
    assert found.keys() == expected.keys()
    assert given == reasons


@pytest.mark.parametrize("kind", ["xyz", "", None, 5, ["gpt2"], {"gpt2": 1}, "x" * 10**5])
def test_an_unknown_type_is_named_once_and_read_by_names(kind):
    expected, reasons = read(gpt2(), None)
    found, given = read(gpt2(), {"model_type": kind})
    assert found.keys() == expected.keys()
    assert given == reasons
    (note,) = neurons_of_state_dict(gpt2(), config={"model_type": kind}).notes
    assert note.startswith("model_type ")
    assert note.endswith("is not known: read by names and shapes")
    assert len(note) < 120


def test_an_unknown_type_in_words():
    text = "model_type 'xyz' is not known: read by names and shapes"
    assert unknown_type({"model_type": "xyz"}) == text
    assert unknown_type({"model_type": "gpt2"}) == ""


HOSTILE = [
    0,
    -1,
    10**40,
    -(10**40),
    10**400,
    1e308,
    1.5,
    math.nan,
    math.inf,
    True,
    False,
    None,
    "8",
    [8],
    {"a": 1},
]
KEYS = [
    *("hidden_size", "n_embd", "d_model", "num_attention_heads", "n_head", "head_dim", "expand"),
    *("num_key_value_heads", "num_local_experts", "num_experts", "state_size", "n_groups"),
    *("num_heads", "time_step_rank", "linear_num_key_heads", "linear_key_head_dim"),
    *("pad_token_id", "text_config", "vision_config", "attn_config", "ffn_config", "mamba_expand"),
    *("num_conv_pos_embedding_groups", "architectures", "tie_word_embeddings", "forward", "config"),
    *("training", "_modules", "weight", "is_transposed", "multi_query", "kv_lora_rank"),
]
KINDS = [
    *("gpt2", "gpt_neox", "mixtral", "falcon", "gpt_bigcode", "codegen", "mamba", "mamba2"),
    *("jamba", "dbrx", "gpt_oss", "qwen3_next", "deepseek_v3", "wav2vec2", "deberta", "clip"),
    *("gemma3", "bert", "t5", "phi3", "granitemoe"),
]


def everything():
    """Weights of the names that rules look for."""
    state = gpt2() | mixtral()
    names = ("query_key_value", "qkv_proj", "Wqkv", "in_proj", "x_proj", "kv_b_proj", "q_proj")
    for name in (*names, "kv_a_proj_with_mqa", "in_proj_qkvz", "in_proj_ba", "gate_up_proj"):
        state[f"layers.0.attention.{name}.weight"] = torch.randn(24, WIDTH)
    state["layers.0.attention.A_log"] = torch.randn(WIDTH, 4)
    state["layers.0.attention.down_proj.weight"] = torch.randn(WIDTH, 12)
    state["layers.0.experts.gate_up_proj"] = torch.randn(4, WIDTH, WIDTH)
    state["layers.0.experts.down_proj"] = torch.randn(4, WIDTH, WIDTH)
    state["layers.0.mlp.w1"] = torch.randn(24, WIDTH)
    state["layers.0.moe.input_linear.weight"] = torch.randn(4, 12, WIDTH)
    state["encoder.pos_conv_embed.conv.weight"] = torch.randn(12, 4, 3)
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_no_config_raises_or_loses_a_weight(kind):
    state = everything()
    weights = sum(x.numel() for x in state.values() if x.ndim > 1)
    random = Random(kind)
    for _ in range(40):
        config = {"model_type": kind, "hidden_size": WIDTH, "num_attention_heads": HEADS}
        for key in random.sample(KEYS, 3):
            config[key] = random.choice(HOSTILE)
        candidates = neurons_of_state_dict(state, config=config)
        names = [one.name for one in candidates.sets]
        assert len(set(names)) == len(names), config
        entries = sum(math.prod(one.shape) for one in candidates.sets)
        left_out = sum(math.prod(skip.shape) for skip in candidates.not_weights)
        assert entries + left_out >= weights - 2 * WIDTH, config  # but for a row of padding


def test_names_with_odd_parts():
    state = {
        "": torch.randn(4, 4),
        ".weight": torch.randn(4, 4),
        "a..weight": torch.randn(4, 4),
        "experts.007.w1.weight": torch.randn(4, 4),
        "experts.9999999.w1.weight": torch.randn(4, 4),
        "experts.٣.w1.weight": torch.randn(4, 4),
        "experts.0.w1.weight.forward": torch.randn(4, 4),
        "layers.forward.weight": torch.randn(4, 4),
    }
    for kind in KINDS:
        candidates = neurons_of_state_dict(state, config={"model_type": kind})
        assert candidates.sets
