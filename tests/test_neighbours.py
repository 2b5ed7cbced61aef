"""State dicts without their model: what the names and shapes beside a weight tell of it."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_hsu._neurons.neighbours import Neighbours
from lightning_hsu._neurons.select import select
from lightning_hsu._neurons.state_dict import neurons_of_state_dict
from lightning_hsu.report import report
from tests.tracing import count_calls


def tensors(shapes):
    """A state dict of random tensors of these shapes."""
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def read(state):
    """The sets of a state dict by name, and the reasons of what is left out."""
    candidates = neurons_of_state_dict(state)
    sets, skips = select(candidates, everything=True, may_be_empty=True)
    reasons = {skip.name: skip.reason for skip in [*skips, *candidates.not_weights]}
    return {one.name: one for one in sets}, reasons


def shapes_of(state):
    return {name: one.shape for name, one in read(state)[0].items()}


def conv1d_block(d, *, bias=True):
    """A block of GPT-2, whose weights are (in, out)."""
    sizes = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, 4 * d)}
    sizes["mlp.c_proj"] = (4 * d, d)
    state = {}
    for name, shape in sizes.items():
        state[f"{name}.weight"] = shape
        if bias:
            state[f"{name}.bias"] = shape[1:]
    return state


# Ordinary models of torch are read as the model is, without a word.


class Residual(nn.Module):
    """A block of a ResNet, with groups."""

    def __init__(self, groups):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)


def with_depthwise():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def generator():
    """That of a DCGAN."""
    return nn.Sequential(
        nn.ConvTranspose2d(20, 32, 4, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False),
    )


def grouped_chain():
    return nn.Sequential(
        nn.Conv1d(6, 24, 3),
        nn.ReLU(),
        nn.Conv1d(24, 12, 3, groups=4),
        nn.ReLU(),
        nn.Conv1d(12, 5, 1),
    )


def unet():
    """Steps down and up, with the skip connections' channels beside."""
    return nn.ModuleDict(
        {
            "down": nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)),
            "middle": nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)),
            "up": nn.ConvTranspose2d(16, 8, 2, 2),
            "join": nn.Sequential(nn.Conv2d(16, 8, 3, bias=False), nn.BatchNorm2d(8)),
            "out": nn.Conv2d(8, 2, 1),
        }
    )


def language_model():
    return nn.ModuleDict(
        {
            "token_embedding": nn.Embedding(30, 8),
            "encoder": nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 32, batch_first=True),
                2,
                enable_nested_tensor=False,
            ),
            "lm_head": nn.Linear(8, 30, bias=False),
        }
    )


ORDINARY = {
    "MLP": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)),
    "MLP without biases": lambda: nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False), nn.Linear(4, 3)
    ),
    "gated MLP without biases": lambda: nn.ModuleDict(
        {
            "gate_proj": nn.Linear(6, 16, bias=False),
            "up_proj": nn.Linear(6, 16, bias=False),
            "down_proj": nn.Linear(16, 6, bias=False),
        }
    ),
    "numbered as in Llama": lambda: nn.ModuleDict(
        {
            "w1": nn.Linear(6, 16, bias=False),
            "w2": nn.Linear(16, 6, bias=False),
            "w3": nn.Linear(6, 16, bias=False),
        }
    ),
    "embedding before": lambda: nn.ModuleDict(
        {"embed": nn.Embedding(20, 6), "0": nn.Linear(6, 6, bias=False), "1": nn.Linear(6, 4)}
    ),
    "CNN": with_depthwise,
    "ResNet": lambda: nn.Sequential(Residual(1), Residual(1)),
    "ResNeXt": lambda: nn.Sequential(Residual(4), Residual(4)),
    "chain with groups": grouped_chain,
    "DCGAN": generator,
    "U-Net": unet,
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
    "language model": language_model,
    "LSTM": lambda: nn.ModuleDict({"rnn": nn.LSTM(6, 8, 2), "fc": nn.Linear(8, 3)}),
    "branches": lambda: nn.ModuleDict(
        {"convs": nn.ModuleList([nn.Conv1d(30, 10, k) for k in (3, 4, 5)]), "fc": nn.Linear(30, 2)}
    ),
}


@pytest.mark.parametrize("case", ORDINARY)
def test_ordinary_models_are_read_as_they_are(case):
    torch.manual_seed(0)
    model = ORDINARY[case]()
    wanted = {one.name: one for one in select(model, everything=True)[0]}
    found, _ = read(model.state_dict())
    assert list(found) == list(wanted)
    for name, one in wanted.items():
        torch.testing.assert_close(found[name].neurons(), one.neurons().detach())
        assert found[name].head == one.head
        assert found[name].kind == one.kind
        assert found[name].note == one.note == ""


# Orientation


def test_a_square_matrix_is_read_as_its_neighbours():
    state = tensors({f"h.{i}.{name}": x for i in "01" for name, x in conv1d_block(8).items()})
    weight = state["h.1.attn.c_proj.weight"]
    weight[:, 3] = 2 * weight[:, 5]  # two equal outputs
    found, _ = read(state | tensors({"lm_head.weight": (20, 8)}))
    assert torch.equal(found["h.1.attn.c_proj"].neurons()[0], weight.T)
    assert "as its neighbours show" in found["h.1.attn.c_proj"].note
    assert found["h.0.mlp.c_proj"].shape == (1, 8, 32)
    assert torch.equal(
        found["h.0.attn.c_attn.k"].neurons()[0], state["h.0.attn.c_attn.weight"].T[8:16]
    )
    assert found["lm_head"].shape == (1, 20, 8)
    assert not found["lm_head"].note
    (layer,) = [one for one in report(state).layers if one.name == "h.1.attn.c_proj"]
    assert [(pair.first, pair.second) for pair in layer.pairs] == [(3, 5)]


def test_a_fused_projection_shows_the_orientation_without_biases():
    found, _ = read(tensors({f"h.0.{name}": x for name, x in conv1d_block(8, bias=False).items()}))
    assert found["h.0.mlp.c_fc"].shape == (1, 32, 8)
    assert found["h.0.mlp.c_proj"].shape == (1, 8, 32)
    assert found["h.0.attn.c_attn.q"].shape == (1, 8, 8)
    assert all(
        "read by columns" in found[f"h.0.{name}"].note for name in ("mlp.c_fc", "attn.c_proj")
    )


def test_torch_beside_is_read_by_rows():
    shapes = {"a.fc1.weight": (32, 8), "a.fc1.bias": (32,), "a.mix.weight": (8, 8)}
    found, _ = read(tensors(shapes))
    assert found["a.mix"].note == ""
    assert torch.equal(found["a.mix"].neurons()[0], tensors(shapes)["a.mix.weight"])


@pytest.mark.parametrize("names", [("net.0", "net.2", "net.4"), ("layer0", "layer1", "layer2")])
def test_chains_that_fit_only_one_way(names):
    sizes = (7, 16, 9, 4)
    forward = {f"{name}.weight": sizes[i : i + 2] for i, name in enumerate(names)}
    found, _ = read(tensors(forward))
    assert [one.shape for one in found.values()] == [(1, 16, 7), (1, 9, 16), (1, 4, 9)]
    assert all("shapes of its neighbours show" in one.note for one in found.values())
    backward = {f"{name}.weight": sizes[i : i + 2][::-1] for i, name in enumerate(names)}
    found, _ = read(tensors(backward))
    assert [one.shape for one in found.values()] == [(1, 16, 7), (1, 9, 16), (1, 4, 9)]
    assert not any(one.note for one in found.values())


@pytest.mark.parametrize("squares", [1, 3])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_chain_shows_how_its_square_matrices_are_read(squares, transposed):
    sizes = [20] + (squares + 1) * [8] + [3]
    shapes = {}
    for i, shape in enumerate(pairwise(sizes)):  # (in, out)
        shapes[f"net.{2 * i}.weight"] = shape if transposed else shape[::-1]
    state = tensors(shapes)
    found, _ = read(state)
    assert [one.shape for one in found.values()] == [(1, n, d) for d, n in pairwise(sizes)]
    for name, one in found.items():
        weight = state[f"{name}.weight"]
        assert torch.equal(one.neurons()[0], weight.T if transposed else weight)
        assert bool(one.note) == transposed


def test_parallel_layers_do_not_look_like_a_chain():
    shapes = [(20, 8), (8, 8), (8, 8), (3, 8)]
    found, _ = read(tensors({f"heads.{i}.weight": shape for i, shape in enumerate(shapes)}))
    assert [one.shape[1:] for one in found.values()] == shapes
    assert not any(one.note for one in found.values())


def test_a_gate_in_between_is_no_sign_of_transposition():
    found, _ = read(tensors({"mlp.fc1.weight": (40, 8), "mlp.fc2.weight": (8, 20)}))
    assert [one.shape for one in found.values()] == [(1, 40, 8), (1, 8, 20)]
    assert "gate" in found["mlp.fc1"].note


def test_kernels_of_keras_and_flax():
    shapes = {
        "dense.kernel": (8, 6),
        "dense.bias": (6,),
        "conv.kernel": (3, 3, 8, 16),
        "conv.bias": (16,),
    }
    state = tensors(shapes)
    found, _ = read(state)
    assert torch.equal(found["dense.kernel"].neurons()[0], state["dense.kernel"].T)
    expected = state["conv.kernel"].permute(3, 0, 1, 2).flatten(1)
    assert torch.equal(found["conv.kernel"].neurons()[0], expected)
    assert not found["conv.kernel"].note
    found, _ = read(tensors({"lonely.kernel": (5, 5)}))
    assert "as Keras and Flax" in found["lonely.kernel"].note


def test_other_names_of_matrices_are_a_guess():
    found, _ = read(tensors({"conv.weight1": (6, 6)}))
    assert found["conv.weight1"].note.startswith("read by rows, a guess")


# Stacks


STACKS = {
    "the issue's": ({"moe.input_linear.weight": (4, 64, 32)}, {"moe.input_linear": (4, 64, 32)}),
    "Granite": (
        {
            "moe.input_linear.weight": (4, 48, 16),
            "moe.output_linear.weight": (4, 16, 24),
            "moe.router.layer.weight": (4, 16),
        },
        {
            "moe.input_linear.gate": (4, 24, 16),
            "moe.input_linear.up": (4, 24, 16),
            "moe.output_linear": (4, 16, 24),
            "moe.router.layer": (1, 4, 16),
        },
    ),
    "Mixtral": (
        {"mlp.experts.gate_up_proj": (4, 48, 16), "mlp.experts.down_proj": (4, 16, 24)},
        {
            "mlp.experts.gate_up_proj.gate": (4, 24, 16),
            "mlp.experts.gate_up_proj.up": (4, 24, 16),
            "mlp.experts.down_proj": (4, 16, 24),
        },
    ),
    "by columns": (
        {
            "ffn.w1": (4, 16, 40),
            "ffn.w2": (4, 40, 16),
            "ffn.gate.weight": (4, 16),
        },
        {"ffn.w1": (4, 40, 16), "ffn.w2": (4, 16, 40), "ffn.gate": (1, 4, 16)},
    ),
    "by their biases": (
        {"first.weight": (3, 16, 24), "first.bias": (3, 24)},
        {"first": (3, 24, 16)},
    ),
    "one below the other": (
        {
            "ffn.experts.mlp.w1": (32, 16),
            "ffn.experts.mlp.v1": (32, 16),
            "ffn.experts.mlp.w2": (32, 16),
            "ffn.router.layer.weight": (4, 16),
        },
        {
            "ffn.experts.mlp.w1": (4, 8, 16),
            "ffn.experts.mlp.v1": (4, 8, 16),
            "ffn.experts.mlp.w2": (4, 16, 8),
            "ffn.router.layer": (1, 4, 16),
        },
    ),
    "kernels of experts": (
        {"experts.0.conv.weight": (16, 8, 3), "experts.0.conv.bias": (16,)},
        {"experts.0.conv": (1, 16, 24)},
    ),
    "long kernels": ({"conv.weight": (16, 4, 101), "conv.bias": (16,)}, {"conv": (1, 16, 404)}),
}


@pytest.mark.parametrize("case", STACKS)
def test_stacks(case):
    shapes, expected = STACKS[case]
    assert shapes_of(tensors(shapes)) == expected


def test_what_nothing_tells_of_a_stack_is_said():
    assert "a guess" in read(tensors(STACKS["the issue's"][0]))[0]["moe.input_linear"].note
    found, _ = read(tensors({"conv.weight": (3, 24, 24)}))
    assert found["conv"].shape == (3, 24, 24)
    assert "read as 3 matrices by rows, a guess" in found["conv"].note


SHARED = {
    "mlp.shared_experts.gate_proj": (2, 12, 20),
    "mlp.shared_experts.up_proj": (2, 12, 20),
    "mlp.shared_experts.down_proj": (2, 20, 12),
}


def test_shared_experts_are_read_by_the_width_that_the_router_of_the_others_shows():
    """As Inkling has them: of either orientation each matrix fits the one after it."""
    found, _ = read(tensors({**SHARED, "mlp.gate.weight": (7, 20)}))
    for name, shape in SHARED.items():
        assert found[name].shape == shape
        assert not found[name].note


def test_stacks_that_fit_each_other_either_way_are_a_guess():
    found, _ = read(tensors(SHARED))
    for name, shape in SHARED.items():
        assert found[name].shape == shape
        assert "by rows, a guess" in found[name].note


def test_gate_and_up_in_turns():
    shapes = {
        "experts.gate_up_proj": (4, 16, 32),
        "experts.gate_up_proj_bias": (4, 32),
        "experts.down_proj": (4, 16, 16),
        "experts.down_proj_bias": (4, 16),
    }
    state = tensors(shapes)
    found, _ = read(state)
    weight = state["experts.gate_up_proj"].mT
    assert torch.equal(found["experts.gate_up_proj.gate"].neurons(), weight[:, ::2])
    assert torch.equal(found["experts.gate_up_proj.up"].neurons(), weight[:, 1::2])
    assert "GPT-OSS" in found["experts.gate_up_proj.up"].note
    assert torch.equal(found["experts.down_proj"].neurons(), state["experts.down_proj"].mT)


# Convolutions


def test_a_positional_convolution_has_groups():
    state = tensors({"pos_conv_embed.conv.weight": (16, 4, 32), "pos_conv_embed.conv.bias": (16,)})
    assert shapes_of(state) == {"pos_conv_embed.conv": (4, 4, 128)}


@pytest.mark.parametrize("name", ["encode_positions.conv", "pos_embed.conv", "position_conv.conv"])
def test_a_convolution_of_positions_is_added_to_what_it_reads(name):
    state = tensors({"fc.weight": (8, 32), f"{name}.weight": (32, 8, 128), "out.weight": (6, 32)})
    sets, _ = read(state)
    assert sets[name].shape == (4, 8, 8 * 128)
    assert not sets[name].note


def test_depthwise_kernels_between_layers_in_alphabetical_order():
    """In the order of names the layer after the kernels comes first, as in MobileViTv2."""
    shapes = {"conv_1x1.weight": (16, 32, 1, 1), "conv_kxk.weight": (32, 1, 3, 3)}
    state = tensors({**shapes, "conv_projection.weight": (32, 16, 1, 1)})
    assert shapes_of(state)["conv_kxk"] == (1, 32, 9)


def test_channels_that_no_layer_has_are_groups():
    shapes = {
        "stem.weight": (16, 3, 3, 3),
        "mix.weight": (16, 5, 3, 3),
        "out.weight": (15, 16, 1, 1),
    }
    assert read(tensors(shapes))[0]["mix"].shape == (1, 16, 45)  # 16 is no multiple of 5
    shapes["mix.weight"] = (16, 4, 3, 3)
    found, _ = read(tensors(shapes))
    assert found["mix"].shape == (4, 4, 36)
    assert "read in 4 groups, a guess" in found["mix"].note


def test_split_attention_has_groups():
    shapes = {
        "stem.weight": (32, 3, 3, 3),
        "conv1.weight": (16, 32, 1, 1),
        "conv2.conv.weight": (32, 8, 3, 3),
        "conv2.bn0.weight": (32,),
        "conv2.fc1.weight": (12, 8, 1, 1),
        "conv2.fc2.weight": (32, 6, 1, 1),
        "conv3.weight": (64, 16, 1, 1),
    }
    sizes = shapes_of(tensors(shapes))
    assert sizes["conv2.conv"] == (2, 16, 72)
    assert sizes["conv2.fc1"] == (2, 6, 8)
    assert sizes["conv2.fc2"] == (2, 16, 6)
    assert sizes["conv3"] == (1, 64, 16)


def test_doubts_about_transposed_kernels_are_said():
    found, _ = read(tensors({"a.weight": (8, 16, 3, 3), "upconv.weight": (16, 8, 2, 2)}))
    assert "if it is a transposed one" in found["upconv"].note
    assert not found["a"].note
    found, _ = read(tensors({"mask.weight": (8, 8, 2, 2), "mask.bias": (8,)}))
    assert "if it is a transposed one" in found["mask"].note
    found, _ = read(tensors({"downsample.weight": (8, 8, 2, 2), "downsample.bias": (8,)}))
    assert not found["downsample"].note


def test_a_bias_that_fits_no_axis_is_said():
    found, _ = read(tensors({"conv.weight": (5, 4, 8, 4), "conv.bias": (16,)}))
    assert "though its bias has 16" in found["conv"].note


# Fused projections


FUSED = {
    "timm": ({"attn.qkv.weight": (24, 8), "attn.proj.weight": (8, 8)}, "qkv", 8),
    "flash attention": ({"mixer.Wqkv.weight": (24, 8), "mixer.out_proj.weight": (8, 8)}, "qkv", 8),
    "keys and values": (
        {"attn.q.weight": (8, 8), "attn.kv.weight": (16, 8), "attn.proj.weight": (8, 8)},
        "kv",
        8,
    ),
    "gated": ({"mlp.gate_up_proj.weight": (48, 8), "mlp.down_proj.weight": (8, 24)}, None, 24),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused_projections(case):
    shapes, letters, rows = FUSED[case]
    name = next(one for one in shapes if "kv" in one or "gate_up" in one).removesuffix(".weight")
    state = tensors(shapes)
    found, _ = read(state)
    for i, part in enumerate(letters or ("gate", "up")):
        expected = state[f"{name}.weight"][i * rows : (i + 1) * rows]
        assert torch.equal(found[f"{name}.{part}"].neurons()[0], expected)
        assert not found[f"{name}.{part}"].note


def test_fewer_keys_than_queries():
    shapes = {"attn.qkv_proj.weight": (16, 8), "attn.o_proj.weight": (8, 8)}
    sizes = shapes_of(tensors(shapes))
    assert sizes["attn.qkv_proj.q"] == (1, 8, 8)
    assert sizes["attn.qkv_proj.k"] == sizes["attn.qkv_proj.v"] == (1, 4, 8)


class GatedUnit(nn.Module):
    """As CLVP's: its class is that of a gated linear unit."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 48)


class SwiGLU(GatedUnit):
    pass


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = SwiGLU(), nn.Linear(24, 8)


def test_a_gated_unit_before_a_layer_of_half_its_outputs_has_two_parts():
    model = nn.ModuleDict({"mlp": GatedMLP()})
    wanted = {one.name: one for one in select(model, everything=True)[0]}
    found, _ = read(model.state_dict())
    assert list(found) == list(wanted) == ["mlp.fc1.proj.up", "mlp.fc1.proj.gate", "mlp.fc2"]
    for name, one in wanted.items():
        torch.testing.assert_close(found[name].neurons(), one.neurons().detach())


@pytest.mark.parametrize("following", ["ff_out", "back"])
def test_twice_the_rows_that_the_block_takes_are_told(following):
    shapes = {"mlp.ff_proj.weight": (48, 8), f"mlp.{following}.weight": (8, 24)}
    state = tensors(shapes)
    found, _ = read(state)
    assert "for its halves: neurons={'mlp.ff_proj': 2}" in found["mlp.ff_proj"].note
    halves = neurons_of_state_dict(state, neurons={"mlp.ff_proj": 2}).sets
    assert [one.shape for one in halves] == [(1, 24, 8), (1, 24, 8), (1, 8, 24)]


NOT_GATED = {
    "taken whole": {"a.weight": (48, 8), "b.weight": (8, 48), "c.weight": (8, 24)},
    "the half comes from another": {"a.weight": (48, 8), "b.weight": (24, 8), "c.weight": (8, 24)},
    "in a list": {"0.weight": (48, 8), "1.weight": (8, 24)},
}


@pytest.mark.parametrize("case", NOT_GATED)
def test_no_word_of_a_gate_where_there_is_none(case):
    found, _ = read(tensors({f"mlp.{name}": shape for name, shape in NOT_GATED[case].items()}))
    assert not any(one.note for one in found.values())


def test_heads_that_nothing_tells_are_said():
    found, _ = read(tensors({"attention.query_key_value.weight": (24, 8)}))
    assert "head by head" in found["attention.query_key_value"].note
    found, _ = read(tensors({"attn.qkv.weight": (24, 8), "attn.rel_pos.table": (9, 2)}))
    assert "some models hold them per head" in found["attn.qkv.q"].note
    found, _ = read(tensors({"attn.qkv.weight": (20, 8), "attn.proj.weight": (7, 7)}))
    assert "one set, though its name says q, k and v" in found["attn.qkv"].note


@pytest.mark.parametrize(
    ("name", "shape", "held"),
    [
        ("attn.wqkv", (96, 32), "q, k and v"),
        ("attn.w_qkv", (80, 32), "q, k and v"),
        ("attn.gqkv_proj", (128, 32), "q, k and v"),
        ("attn.in_proj_qkv", (97, 32), "q, k and v"),
        ("attn.kv_b_proj", (64, 16), "k and v"),
        ("attn.wkv_b", (64, 16), "k and v"),
        ("mlp.up_gate_proj", (96, 32), "gate and up"),
    ],
)
def test_a_name_of_several_sets_that_is_read_as_one_is_told(name, shape, held):
    sets, _ = read(tensors({f"{name}.weight": shape}))
    assert list(sets) == [name]
    assert f"one set, though its name says {held}" in sets[name].note


def test_projections_of_state_spaces_of_unknown_sizes_are_told():
    sets, _ = read(tensors({"mixer.in_proj.weight": (111, 32), "mixer.A_log": (5,)}))
    assert "it seems to hold several parts" in sets["mixer.in_proj"].note


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "kv_block", "k_proj"])
def test_other_names_are_not_those_of_several_sets(name):
    sets, _ = read(tensors({f"mlp.{name}.weight": (48, 32)}))
    assert not sets[f"mlp.{name}"].note


def test_mamba():
    shapes = {
        "mixer.A_log": (32, 8),
        "mixer.in_proj.weight": (64, 16),
        "mixer.x_proj.weight": (20, 32),
        "mixer.dt_proj.weight": (32, 4),
        "mixer.out_proj.weight": (16, 32),
    }
    sizes = shapes_of(tensors(shapes))
    assert sizes["mixer.in_proj.x"] == sizes["mixer.in_proj.z"] == (1, 32, 16)
    assert [sizes[f"mixer.x_proj.{part}"][1] for part in ("dt", "B", "C")] == [4, 8, 8]


# Bare parameters and buffers


DICTIONARIES = {
    "SAELens": ({"W_enc": (8, 40), "b_enc": (40,), "W_dec": (40, 8), "b_dec": (8,)}, 40),
    "the other way": ({"W_enc": (40, 8), "b_enc": (40,), "W_dec": (8, 40), "b_dec": (8,)}, 40),
    "few features": ({"W_enc": (8, 6), "b_enc": (6,), "W_dec": (6, 8), "b_dec": (8,)}, 6),
    "gated": ({"W_enc": (8, 40), "b_gate": (40,), "W_dec": (40, 8), "b_dec": (8,)}, 40),
    "sparsify": ({"encoder.weight": (40, 8), "encoder.bias": (40,), "W_dec": (40, 8)}, 40),
    "crosscoder": ({"W_enc": (2, 8, 40), "b_enc": (40,), "W_dec": (40, 2, 8)}, 40),
}


@pytest.mark.parametrize("case", DICTIONARIES)
def test_dictionaries(case):
    shapes, features = DICTIONARIES[case]
    found, _ = read(tensors(shapes))
    assert len(found) == 2
    for one in found.values():
        assert one.shape[:2] == (1, features)
        assert not one.note


def test_a_square_dictionary_is_a_guess():
    found, _ = read(tensors({"W_dec": (8, 8), "b_dec": (8,)}))
    assert "read by rows" in found["W_dec"].note


CODEBOOKS = {
    "vector-quantize-pytorch": (
        {"vq._codebook.embed": (2, 40, 6), "vq._codebook.cluster_size": (2, 40)},
        "vq._codebook.embed",
        (2, 40, 6),
    ),
    "rosinality": (
        {"quantize_t.embed": (6, 40), "quantize_t.cluster_size": (40,)},
        "quantize_t.embed",
        (1, 40, 6),
    ),
    "diffusers": ({"quantize.embedding.weight": (40, 6)}, "quantize.embedding", (1, 40, 6)),
    "encodec": (
        {
            "quantizer.layers.0.codebook.embed": (40, 6),
            "quantizer.layers.0.codebook.embed_avg": (40, 6),
        },
        "quantizer.layers.0.codebook.embed",
        (1, 40, 6),
    ),
}


@pytest.mark.parametrize("case", CODEBOOKS)
def test_codebooks(case):
    shapes, name, expected = CODEBOOKS[case]
    found, _ = read(tensors(shapes))
    assert {one.name: (one.shape, one.kind) for one in found.values()} == {
        name: (expected, "codebook")
    }


def test_statistics_and_tables_hold_no_neurons():
    shapes = {
        "fc.weight": (6, 8),
        "bn.running_mean": (4, 4),
        "positional_embedding": (9, 8),
        "attn.relative_position_index": (9, 9),
        "rope.inv_freq": (2, 4),
    }
    found, reasons = read(tensors(shapes))
    assert list(found) == ["fc"]
    assert "position" in reasons["positional_embedding"]
    assert "statistics" in reasons["rope.inv_freq"]


@pytest.mark.parametrize("ending", ["integer", "int8", "ema"])
def test_a_copy_of_a_weight_is_no_layer(ending):
    """I-BERT's ``weight_integer`` is what its layers compute with, rounded from the weight."""
    shapes = {"fc.weight": (6, 8), f"fc.weight_{ending}": (6, 8), "fc.bias": (6,)}
    found, reasons = read(tensors(shapes))
    assert list(found) == ["fc"]
    assert "a copy or mask of 'weight'" in reasons[f"fc.weight_{ending}"]
    del shapes["fc.weight"]
    assert len(read(tensors(shapes))[0]) == 1


def test_tables_and_what_is_only_named_so():
    shapes = {
        "token_emb.emb.weight": (30, 8),
        "class_embed.weight": (5, 8),
        "class_embed.bias": (5,),
        "attn.relative_attention_bias.weight": (32, 4),
    }
    found, _ = read(tensors(shapes))
    kinds = {name: one.kind for name, one in found.items()}
    assert kinds == {
        "token_emb.emb": "embedding",
        "class_embed": "linear",
        "attn.relative_attention_bias": "embedding",
    }


def test_adapters_are_told():
    shapes = {
        "q_proj.base_layer.weight": (8, 8),
        "q_proj.lora_A.default.weight": (2, 8),
        "q_proj.lora_B.default.weight": (8, 2),
    }
    found, reasons = read(tensors(shapes))
    assert list(found) == ["q_proj.base_layer"]
    assert "without its adapter" in found["q_proj.base_layer"].note
    assert len(reasons) == 2


# The head, and what it costs


def test_a_guessed_head_is_said():
    state = tensors({"fc1.weight": (12, 8), "fc.weight": (5, 12), "aux.weight": (4, 12)})
    notes = report(state).notes
    assert notes[-1] == ("head", 'fc (guessed: its name); head="NAME" or head=None otherwise')
    assert report(state, head="aux").notes == ()


def test_notes_of_repeated_blocks_are_one_line():
    state = tensors({f"h.{i}.{name}": x for i in range(4) for name, x in conv1d_block(6).items()})
    lines = [line for line in str(report(state)).splitlines() if "read by columns" in line]
    assert len(lines) == 1
    assert "h.{0..3}.attn.c_proj (4)" in lines[0]


def test_numbers_are_not_looked_at():
    shapes = {f"h.0.{name}": x for name, x in conv1d_block(6).items()}
    layers = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        layers.setdefault(path, {})[leaf] = torch.empty(shape, device="meta")
    hint = Neighbours(layers).of_weight("h.0.attn.c_proj", "weight", (6, 6))
    assert hint.rule.columns
    assert Neighbours(layers).of_weight("h.0.ln", "weight", (6,)) is None


# The work that files of very many layers side by side take

MANY = {
    "numbers before letters": ("s.{}q", (8, 4)),
    "numbers after letters": ("s.q{}", (8, 4)),
    "decoders": ("s.{}q.dec", (4, 8)),
    "matrices in modules": ("s.{}q.fc1", (8, 4)),
    "attention": ("s.{}q.qkv", (12, 4)),
    "square matrices": ("s.{}q", (4, 4)),
}


@pytest.mark.parametrize("case", MANY)
def test_work_grows_no_faster_than_the_layers(case):
    name, shape = MANY[case]
    calls = []
    for count in (10, 100, 400):  # the first one only warms up
        state = {f"{name.format(i)}.weight": torch.ones(shape) for i in range(count)}
        calls.append(count_calls(lambda state=state: neurons_of_state_dict(state)))
    assert calls[2] < 4.5 * calls[1]


def halved(shapes, names):
    """Whether a note tells of a gate, by name, of matrices below one path."""
    state = tensors({f"s.{name}.weight": shape for name, shape in zip(names, shapes, strict=True)})
    found, _ = read(state)
    return {name.removeprefix("s."): "a gate too" in one.note for name, one in found.items()}


def test_a_matrix_is_not_beside_itself():
    names = ["1q", "2q", "3q"]
    assert halved([(12, 4), (4, 6), (4, 5)], names)["1q"]
    assert not any(halved([(12, 4), (4, 6), (4, 12)], names).values())  # something takes all
    assert not any(halved([(12, 4), (4, 6), (6, 3)], names).values())  # or gives the half
    assert not any(halved([(12, 4), (4, 5), (4, 7)], names).values())  # nothing leads back
    assert halved([(6, 3), (3, 3), (6, 3)], names) == {"1q": False, "2q": False, "3q": False}
