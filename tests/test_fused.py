"""Which rows of a fused projection are the queries, the keys, a gate, ...

The modules here are small fakes; ``tests/real_models/test_fused.py`` proves it of those of libraries.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_hsu._neurons.fused import contiguous, parts_of, per_head, row_by_row


def owner(kind="Owner", **attributes):
    """A module of a class of this name; children and plain attributes alike."""
    module = type(kind, (nn.Module,), {})()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def rows_of(parts, outputs):
    """The rows that each part takes, by its key."""
    numbers = torch.arange(outputs)[:, None]
    rows = {}
    for part in parts:
        rows[part.key] = part.take(numbers).flatten().tolist()
    return rows


def rows(module, name, outputs):
    return rows_of(parts_of(module, name, outputs), outputs)


def sizes(module, name, outputs):
    return {key: len(taken) for key, taken in rows(module, name, outputs).items()}


# Layouts


def test_contiguous_parts_are_views():
    weight = torch.randn(3, 10, 4)
    q, k = contiguous(10, {"q": 6, "k": 4})
    assert torch.equal(q.take(weight), weight[:, :6])
    assert torch.equal(k.take(weight), weight[:, 6:])
    assert k.take(weight)._base is weight


def test_parts_per_head():
    parts = per_head(8, {"k": 1, "v": 3}, 2)
    assert rows_of(parts, 8) == {"k": [0, 4], "v": [1, 2, 3, 5, 6, 7]}
    weight = torch.randn(5, 3, 8, 2)
    assert parts[1].take(weight).shape == (5, 3, 6, 2)
    assert torch.equal(parts[0].take(weight), weight[:, :, [0, 4]])


def test_parts_row_by_row_are_views():
    even, odd = row_by_row(6, "gate", "up")
    weight = torch.randn(2, 6, 3)
    assert torch.equal(even.take(weight), weight[:, ::2])
    assert torch.equal(odd.take(weight), weight[:, 1::2])
    assert odd.take(weight)._base is weight


@pytest.mark.parametrize(
    "parts",
    [
        contiguous(10, {"q": 6, "k": 3}),
        contiguous(10, {"q": 10, "k": 0}),
        contiguous(10, {"q": 5, "k": None}),
        per_head(9, {"k": 1, "v": 1}, 4),
        per_head(8, {"k": 1, "v": 1}, None),
        row_by_row(7, "gate", "up"),
    ],
)
def test_sizes_that_do_not_add_up_give_no_parts(parts):
    assert parts == ()


def test_parts_of_a_transposed_weight_pass_gradients_on():
    weight = torch.randn(4, 12, requires_grad=True)
    attention = owner(num_heads=2, head_dim=2, query_key_value=nn.Linear(4, 12))
    q, k, v = parts_of(attention, "query_key_value", 12)
    v.take(weight.T).sum().backward()
    changed = weight.grad.abs().sum(0).nonzero().flatten().tolist()
    assert changed == [4, 5, 10, 11]
    assert (q.key, k.key, v.key) == ("q", "k", "v")


def test_parts_can_be_pickled_and_copied():
    parts = parts_of(owner(num_heads=2, qkv=nn.Linear(4, 12)), "qkv", 12)
    for again in (pickle.loads(pickle.dumps(parts)), copy.deepcopy(parts)):
        assert rows_of(again, 12) == rows_of(parts, 12)


# Queries, keys and values

THIRDS = {"q": 8, "k": 8, "v": 8}


@pytest.mark.parametrize("name", ["qkv", "Wqkv", "qkv_proj", "to_qkv", "c_attn", "att_proj"])
def test_three_times_the_inputs_is_qkv(name):
    module = owner(**{name: nn.Linear(8, 24)})
    assert rows(module, name, 24) == {
        "q": list(range(8)),
        "k": list(range(8, 16)),
        "v": list(range(16, 24)),
    }


def test_heads_wider_than_the_inputs():
    module = owner(num_heads=4, head_dim=6, qkv=nn.Linear(8, 72))
    assert sizes(module, "qkv", 72) == {"q": 24, "k": 24, "v": 24}


def test_fewer_heads_of_keys_and_values():
    config = owner(num_attention_heads=4)
    attention = owner(config=config, head_dim=2, num_key_value_heads=1, qkv_proj=nn.Linear(8, 12))
    assert sizes(attention, "qkv_proj", 12) == {"q": 8, "k": 2, "v": 2}


def test_heads_in_a_config_that_is_a_dict():
    attention = owner(config={"num_heads": 4, "head_dim": 2, "num_kv_heads": 2})
    assert sizes(attention, "qkv", 16) == {"q": 8, "k": 4, "v": 4}


def test_packed_parameter():
    module = owner(num_heads=2, in_proj_weight=nn.Parameter(torch.randn(24, 8)))
    assert sizes(module, "in_proj_weight", 24) == THIRDS


def test_convolution():
    assert sizes(owner(qkv=nn.Conv2d(8, 24, 1)), "qkv", 24) == THIRDS
    assert parts_of(owner(qkv=nn.Conv2d(8, 24, 1, groups=2)), "qkv", 12) == ()


def test_convolution_with_its_normalization():
    layer = nn.Sequential(nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24))
    assert sizes(owner(qkv=layer), "qkv", 24) == THIRDS
    levit = owner(num_heads=2, key_dim=4, val_dim=4, qkv=layer)
    assert rows(levit, "qkv", 24)["q"] == [0, 1, 2, 3, 12, 13, 14, 15]


def test_output_projection_tells_the_width():
    module = owner(num_heads=2, qkv=nn.Linear(8, 36), proj=nn.Linear(12, 8))
    assert sizes(module, "qkv", 36) == {"q": 12, "k": 12, "v": 12}


def test_head_first():
    module = owner(num_heads=2, dim_head=1, head_first=True, qkv=nn.Linear(2, 6))
    assert rows(module, "qkv", 6) == {"q": [0, 3], "k": [1, 4], "v": [2, 5]}


def test_key_dim_and_val_dim():
    module = owner(num_heads=2, key_dim=1, val_dim=2)
    assert rows(module, "qkv", 8) == {"q": [0, 4], "k": [1, 5], "v": [2, 3, 6, 7]}
    assert rows(module, "kv", 6) == {"k": [0, 3], "v": [1, 2, 4, 5]}


def test_megatron_interleaves_the_heads():
    module = owner(num_heads=2, head_dim=1)
    assert rows(module, "query_key_value", 6) == {"q": [0, 3], "k": [1, 4], "v": [2, 5]}


def test_falcon_has_three_layouts():
    new = owner(num_heads=4, num_kv_heads=2, head_dim=1, new_decoder_architecture=True)
    expected = {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}
    assert rows(new, "query_key_value", 8) == expected
    sizes_of_falcon = {"num_heads": 4, "head_dim": 1, "new_decoder_architecture": False}
    one_key = owner(**sizes_of_falcon, num_kv_heads=1, multi_query=True)
    assert rows(one_key, "query_key_value", 6) == {"q": [0, 1, 2, 3], "k": [4], "v": [5]}
    old = owner(**sizes_of_falcon, num_kv_heads=4, multi_query=False)
    assert rows(old, "query_key_value", 12)["v"] == [2, 5, 8, 11]


def test_codegen_puts_the_values_before_the_keys():
    module = owner("CodeGenAttention", embed_dim=4, mp_num=2, qkv_proj=nn.Linear(4, 12))
    expected = {"q": [0, 1, 6, 7], "v": [2, 3, 8, 9], "k": [4, 5, 10, 11]}
    assert rows(module, "qkv_proj", 12) == expected


def test_gpt_bigcode():
    one_key = owner(multi_query=True, embed_dim=4, kv_dim=2, num_heads=2, head_dim=2)
    assert sizes(one_key, "c_attn", 8) == {"q": 4, "k": 2, "v": 2}
    module = owner(multi_query=False, embed_dim=2, kv_dim=2, num_heads=2, head_dim=1)
    assert rows(module, "c_attn", 6) == {"q": [0, 3], "k": [1, 4], "v": [2, 5]}


def test_cross_attention_of_gpt2():
    module = owner(is_cross_attention=True, split_size=8, num_heads=2, head_dim=4)
    assert sizes(module, "c_attn", 16) == {"k": 8, "v": 8}


def test_keys_and_values():
    assert sizes(owner(num_heads=2, head_dim=4), "kv", 16) == {"k": 8, "v": 8}
    perceiver = owner(heads=2, to_q=nn.Linear(3, 8), to_kv=nn.Linear(5, 16))
    assert sizes(perceiver, "to_kv", 16) == {"k": 8, "v": 8}


def test_latent_attention():
    module = owner(
        num_heads=2, kv_lora_rank=6, qk_rope_head_dim=2, qk_nope_head_dim=1, v_head_dim=2
    )
    assert sizes(module, "kv_a_proj_with_mqa", 8) == {"kv": 6, "k_rope": 2}
    assert rows(module, "kv_b_proj", 6) == {"k": [0, 3], "v": [1, 2, 4, 5]}


def test_a_subclass_made_by_a_wrapper_is_still_known():
    plain = type("CodeGenAttention", (nn.Module,), {})
    wrapped = type("FSDPCodeGenAttention", (plain,), {})()
    wrapped.embed_dim = 4
    wrapped.mp_num = 2
    assert list(rows(wrapped, "qkv_proj", 12)) == ["q", "v", "k"]


# Gated MLPs and state spaces


@pytest.mark.parametrize(
    ("name", "down"),
    [("gate_up_proj", "down_proj"), ("Wi", "Wo"), ("w12", "w3"), ("input_linear", "output_linear")],
)
def test_gated_mlps_that_start_with_the_gate(name, down):
    module = owner(**{name: nn.Linear(4, 12), down: nn.Linear(6, 4)})
    assert rows(module, name, 12) == {"gate": list(range(6)), "up": list(range(6, 12))}
    setattr(module, down, nn.Linear(12, 4))
    assert parts_of(module, name, 12) == ()


def test_gated_mlps_called_fc1():
    layers = {"fc1": nn.Linear(4, 12), "fc2": nn.Linear(6, 4)}
    assert list(rows(owner(gate_last=True, **layers), "fc1", 12)) == ["up", "gate"]
    assert list(rows(owner(gate_last=False, **layers), "fc1", 12)) == ["gate", "up"]
    assert list(rows(owner("MoonshineDecoderMLP", **layers), "fc1", 12)) == ["up", "gate"]
    assert parts_of(owner("Mlp", **layers), "fc1", 12) == ()
    plain = owner(gate_last=True, fc1=nn.Linear(4, 12), fc2=nn.Linear(12, 4))
    assert parts_of(plain, "fc1", 12) == ()


def test_gate_of_experts():
    stacks = {
        "gate_up_proj": nn.Parameter(torch.randn(3, 4, 12)),
        "down_proj": nn.Parameter(torch.randn(3, 6, 4)),
    }
    module = owner(is_transposed=True, **stacks)
    assert rows(module, "gate_up_proj", 12)["gate"] == list(range(6))
    module.is_concatenated = False
    assert rows(module, "gate_up_proj", 12)["gate"] == list(range(0, 12, 2))
    older = owner("GptOssExperts", **stacks)
    assert rows(older, "gate_up_proj", 12)["gate"] == list(range(0, 12, 2))
    assert parts_of(module, "gate_up_proj", 10) == ()


def test_the_outputs_of_a_stack_are_those_that_fit():
    stacks = {
        "gate_up_proj": nn.Parameter(torch.randn(3, 4, 12)),
        "down_proj": nn.Parameter(torch.randn(3, 6, 4)),
    }
    module = owner(**stacks)
    assert len(parts_of(module, "gate_up_proj", 12)) == 2
    assert parts_of(module, "gate_up_proj", 4) == ()
    module.down_proj = nn.Parameter(torch.randn(3, 4, 12))
    assert parts_of(module, "gate_up_proj", 12) == ()


def test_a_layer_that_halves_is_not_always_gated():
    layers = {"linear_1": nn.Linear(4, 12), "linear_2": nn.Linear(6, 4)}
    assert parts_of(owner("FinalLayer", **layers), "linear_1", 12) == ()
    projector = owner("AyaVisionMultiModalProjector", **layers)
    assert list(rows(projector, "linear_1", 12)) == ["up", "gate"]


def test_class_called_glu():
    assert list(rows(owner("GEGLU", proj=nn.Linear(4, 12)), "proj", 12)) == ["up", "gate"]
    assert parts_of(owner("SuperGlue", proj=nn.Linear(4, 12)), "proj", 12) == ()
    assert parts_of(owner("GLU", proj=nn.Linear(4, 4)), "proj", 4) == ()
    three = owner("SwiGLU", w1=nn.Linear(4, 6), w2=nn.Linear(4, 6), proj=nn.Linear(6, 4))
    assert parts_of(three, "proj", 4) == ()


def test_layer_before_glu():
    block = nn.Sequential(nn.Linear(4, 12), nn.Dropout(0.1), nn.GLU())
    assert list(rows(block, "0", 12)) == ["up", "gate"]
    assert parts_of(nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.GLU()), "0", 12) == ()
    assert parts_of(nn.Sequential(nn.Linear(4, 12), nn.GLU(dim=1)), "0", 12) == ()
    conformer = owner(pointwise_conv1=nn.Conv1d(4, 8, 1), glu=nn.GLU(dim=1))
    assert list(rows(conformer, "pointwise_conv1", 8)) == ["up", "gate"]


def test_mamba():
    a_log = nn.Parameter(torch.zeros(8))
    module = owner(A_log=a_log, intermediate_size=8, in_proj=nn.Linear(4, 16))
    assert rows(module, "in_proj", 16) == {"x": list(range(8)), "z": list(range(8, 16))}
    zamba = owner("ZambaMambaMixer", intermediate_size=8)
    assert rows(zamba, "in_proj", 16)["z"] == list(range(1, 16, 2))


def test_mamba2():
    module = owner(
        A_log=nn.Parameter(torch.zeros(2)),
        intermediate_size=8,
        num_heads=2,
        n_groups=1,
        ssm_state_size=3,
    )
    assert sizes(module, "in_proj", 24) == {"z": 8, "x": 8, "B": 3, "C": 3, "dt": 2}
    assert parts_of(module, "in_proj", 25) == ()


# What is left whole


def test_a_plain_projection_has_no_parts():
    module = owner(num_heads=2, head_dim=4, q_proj=nn.Linear(8, 8), in_proj=nn.Linear(8, 24))
    for name, outputs in [("q_proj", 8), ("in_proj", 24), ("missing", 8), ("weight", 8)]:
        assert parts_of(module, name, outputs) == ()


def test_contradictions_are_left_whole():
    # 3 times the inputs, but the heads are of another size: keys and values may have fewer.
    module = owner(num_heads=8, head_dim=2, qkv_proj=nn.Linear(8, 24))
    assert parts_of(module, "qkv_proj", 24) == ()
    fewer = owner(num_heads=4, num_kv_heads=2, qkv=nn.Linear(8, 24))
    assert parts_of(fewer, "qkv", 24) == ()
    # The Megatron convention says nothing about groups.
    grouped = owner(num_heads=4, num_key_value_heads=2, head_dim=2)
    assert parts_of(grouped, "query_key_value", 16) == ()


class Odd(nn.Module):
    """Its attributes are anything but sizes."""

    num_heads = "four"
    head_dim = torch.tensor([4])
    num_key_value_heads = None
    config = 3
    key_dim = True
    val_dim = 2.5
    embed_dim = -1
    gate_last = "yes"
    is_concatenated = None

    @property
    def heads(self):
        raise RuntimeError("not now")


NAMES = [
    *["qkv", "kv", "qk", "c_attn", "query_key_value", "qkv_proj", "to_kv", "linear_kv", "in_proj"],
    *["kv_b_proj", "kv_a_proj_with_mqa", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "proj"],
    *["gate_up_proj", "fc1", "Wi", "input_linear", "to_qkv_mlp_proj", "in_proj_weight", "0"],
]


@pytest.mark.parametrize("name", NAMES)
def test_odd_attributes_never_raise(name):
    for outputs in (1, 7, 24):
        assert parts_of(Odd(), name, outputs) == ()
        assert parts_of(nn.Sequential(nn.ReLU()), name, outputs) == ()
