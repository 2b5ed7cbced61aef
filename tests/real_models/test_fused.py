"""The parts of fused projections of libraries, proved by what they change in a forward pass."""

import importlib

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.real_models.libraries import library
from tests.test_fused import rows

pytestmark = pytest.mark.models

# A forward hook moves those outputs of the projection that are of one part, for one
# token alone; the arguments of the attention show which of q, k and v this changes.

TOKEN = 1  # a causal mask leaves a choice to its query, and its key to later queries


class Attention(TorchFunctionMode):
    """Records the arguments of attention functions, or of the softmax, and of other functions."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            given = [*args, *(kwargs[key] for key in ("query", "key", "value") if key in kwargs)]
            self.calls.setdefault("attention", [x.detach().clone() for x in given[:3]])
        if name in ("softmax", "conv1d", "softplus"):
            self.calls.setdefault(name, args[0].detach().clone())
        return func(*args, **kwargs)


def observe(run, projection, taken, axis=-1):
    """Run with a token's outputs of the projection moved in the rows of a part."""

    def move(module, args, output):
        by_token = output.movedim(axis, -1)
        moved = by_token.clone(memory_format=torch.contiguous_format)
        moved.view(-1, moved.shape[-1])[TOKEN, taken] += 1
        return moved.movedim(-1, axis)

    hook = projection.register_forward_hook(move)
    try:
        return record(run)
    finally:
        hook.remove()


def record(run):
    torch.manual_seed(0)
    recorder = Attention()
    with torch.no_grad(), recorder:
        output = run()
    return recorder.calls, output


def prove_attention(module, name, outputs, run, axis=-1):
    """Each part changes what its key says, and nothing else."""
    parts = rows(module, name, outputs)
    assert sorted(parts) == ["k", "q", "v"]
    projection = getattr(module, name)
    plain, plain_output = record(run)
    for key, taken in parts.items():
        moved, output = observe(run, projection, taken, axis)
        assert not torch.equal(output, plain_output)
        if "attention" in plain:
            for of, before, after in zip(
                "qkv", plain["attention"], moved["attention"], strict=True
            ):
                assert torch.equal(before, after) == (of != key)
            continue
        # Scores (..., queries, keys).
        changed = (plain["softmax"] - moved["softmax"]).abs().flatten(0, -3).amax(0) > 1e-6
        queries = changed.any(1).nonzero().flatten().tolist()
        keys = changed.any(0).nonzero().flatten().tolist()
        if key == "q":
            assert queries == [TOKEN]
            assert keys != [TOKEN]
        elif key == "k":
            assert keys == [TOKEN]
            assert queries != [TOKEN]
        else:
            assert not changed.any()


def randomised(module):
    """Large enough weights that every change shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def timm_attention(path, **arguments):
    library("timm")
    module_path, kind = path.rsplit(".", 1)
    torch.manual_seed(0)
    module = getattr(importlib.import_module(module_path), kind)(**arguments)
    module.eval()  # some return nothing
    return randomised(module)


TOKENS = {
    "plain": ("timm.layers.attention.Attention", {"dim": 16, "num_heads": 4}),
    "beit": ("timm.models.beit.Attention", {"dim": 16, "num_heads": 4}),
    "swin": (
        "timm.models.swin_transformer.WindowAttention",
        {"dim": 16, "num_heads": 4, "head_dim": 8, "window_size": 2},
    ),
    "maxvit": (
        "timm.models.maxxvit.AttentionCl",
        {"dim": 16, "dim_head": 4, "head_first": True},
    ),
    "maxvit_tf": (
        "timm.models.maxxvit.AttentionCl",
        {"dim": 16, "dim_head": 4, "head_first": False},
    ),
    "levit": (
        "timm.models.levit.Attention",
        {"dim": 16, "key_dim": 4, "num_heads": 4, "resolution": 2},
    ),
    "efficientformer": (
        "timm.models.efficientformer.Attention",
        {"dim": 16, "key_dim": 4, "num_heads": 4, "attn_ratio": 2, "resolution": 2},
    ),
    "tiny_vit": (
        "timm.models.tiny_vit.Attention",
        {"dim": 16, "key_dim": 4, "num_heads": 4, "attn_ratio": 2, "resolution": (2, 2)},
    ),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_parts_of_timm_attention(kind):
    path, arguments = TOKENS[kind]
    module = timm_attention(path, **arguments)
    x = torch.randn(1, 4, 16)
    with torch.no_grad():
        outputs = module.qkv(x).shape[-1]
    prove_attention(module, "qkv", outputs, lambda: module(x))


def test_parts_of_timm_channel_attention():
    module = timm_attention("timm.models.maxxvit.Attention2d", dim=16, dim_head=4)
    x = torch.randn(1, 16, 2, 2)
    prove_attention(module, "qkv", 48, lambda: module(x), axis=1)


def tiny(kind, **settings):
    """A transformers model of one tiny layer, with random weights."""
    transformers = library("transformers")
    config = getattr(transformers, f"{kind}Config", None)
    if config is None:
        pytest.skip(f"this release of transformers has no {kind}")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config(**settings)).eval()
    return randomised(model)


GPT = {"n_embd": 16, "n_head": 4, "n_layer": 1, "vocab_size": 32, "n_positions": 16}
LLAMA = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 24,
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM = {"hidden_size": 16, "n_head": 4, "n_layer": 1, "vocab_size": 32}
FALCON = {**LLAMA, "alibi": False}
CODEGEN = {**GPT, "rotary_dim": 4}
MPT = {"d_model": 16, "n_heads": 4, "n_layers": 1, "vocab_size": 32}

MODELS = {
    "GPT2": ("GPT2", GPT, "c_attn", 48),
    "GPTBigCode multi-query": ("GPTBigCode", {**GPT, "multi_query": True}, "c_attn", 24),
    "GPTBigCode": ("GPTBigCode", {**GPT, "multi_query": False}, "c_attn", 48),
    "Bloom": ("Bloom", BLOOM, "query_key_value", 48),
    "GPTNeoX": ("GPTNeoX", LLAMA, "query_key_value", 48),
    "Persimmon": ("Persimmon", LLAMA, "query_key_value", 48),
    "Falcon": (
        "Falcon",
        {**FALCON, "new_decoder_architecture": False, "multi_query": False},
        "query_key_value",
        48,
    ),
    "Falcon multi-query": (
        "Falcon",
        {**FALCON, "new_decoder_architecture": False, "multi_query": True},
        "query_key_value",
        24,
    ),
    "Falcon new": (
        "Falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        "query_key_value",
        32,
    ),
    "Phi3": ("Phi3", {**LLAMA, "num_key_value_heads": 2}, "qkv_proj", 32),
    "CodeGen": ("CodeGen", CODEGEN, "qkv_proj", 48),
    "Mpt": ("Mpt", MPT, "Wqkv", 48),
    "ModernBert": ("ModernBert", LLAMA, "Wqkv", 48),
}


@pytest.mark.parametrize("model", MODELS)
def test_parts_of_transformers_attention(model):
    kind, settings, name, outputs = MODELS[model]
    network = tiny(kind, **settings)
    ids = torch.tensor([[5, 9, 17, 23]])
    attention = next(module for module in network.modules() if hasattr(module, name))

    def run():
        return network(input_ids=ids)[0]

    prove_attention(attention, name, outputs, run)


# Gated MLPs. The output is affine in up, and in gate only where no activation follows.


def curvature(run, module, name, taken, axis=-1):
    """The second difference of the output, as a part of the projection grows from 0 to twice."""
    outputs = []
    for factor in (0.0, 1.0, 2.0):

        def scale(module, args, output, factor=factor):
            factors = torch.ones(output.shape[axis], dtype=output.dtype)
            factors[taken] = factor
            return (output.movedim(axis, -1) * factors).movedim(-1, axis)

        hook = getattr(module, name).register_forward_hook(scale)
        with torch.no_grad():
            outputs.append(run())
        hook.remove()
    return float((outputs[2] - 2 * outputs[1] + outputs[0]).abs().max())


def prove_gate(module, name, outputs, x, axis=-1):
    parts = rows(module, name, outputs)
    assert sorted(parts) == ["gate", "up"]
    module = module.double().eval()

    def run():
        return module(x)

    assert curvature(run, module, name, parts["up"], axis) < 1e-12
    assert curvature(run, module, name, parts["gate"], axis) > 1e-6


def transformers_mlp(kind, module, settings):
    for layer in tiny(kind, **settings).modules():
        if type(layer).__name__ == module:
            return layer
    pytest.skip(f"this release of transformers has no {module}")


MLPS = {
    "Phi3MLP": ("Phi3", LLAMA, "gate_up_proj"),
    "GlmMLP": ("Glm", {**LLAMA, "head_dim": 4, "num_key_value_heads": 2}, "gate_up_proj"),
    "ModernBertMLP": ("ModernBert", LLAMA, "Wi"),
    "GraniteMoeSharedMLP": (
        "GraniteMoeShared",
        {**LLAMA, "shared_intermediate_size": 24, "num_local_experts": 2},
        "input_linear",
    ),
}


@pytest.mark.parametrize("module", MLPS)
def test_gate_of_transformers_mlps(module):
    kind, settings, name = MLPS[module]
    mlp = transformers_mlp(kind, module, settings)
    prove_gate(mlp, name, 48, torch.randn(1, 3, 16).double())


@pytest.mark.parametrize("gate_last", [True, False])
def test_gate_of_timm_mlps(gate_last):
    layers = library("timm.layers")
    mlp = layers.GluMlp(16, 48, act_layer=nn.SiLU, gate_last=gate_last)
    prove_gate(mlp, "fc1", 48, torch.randn(1, 3, 16).double())


@pytest.mark.parametrize("kind", ["GEGLU", "SwiGLU"])
def test_gate_of_diffusers_activations(kind):
    activations = library("diffusers.models.activations")
    prove_gate(getattr(activations, kind)(16, 24), "proj", 48, torch.randn(1, 3, 16).double())


def test_gate_of_x_transformers():
    x_transformers = library("x_transformers.x_transformers")
    prove_gate(x_transformers.GLU(16, 24, nn.GELU()), "proj", 48, torch.randn(1, 3, 16).double())


LLAMA_EXPERTS = {**LLAMA, "num_local_experts": 2}
EXPERTS = {
    "MixtralExperts": ("Mixtral", LLAMA_EXPERTS),
    "GptOssExperts": ("GptOss", {**LLAMA_EXPERTS, "head_dim": 4}),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_gate_of_experts_in_transformers(kind):
    name, settings = EXPERTS[kind]
    settings = {**settings, "num_key_value_heads": 2, "num_experts_per_tok": 1}
    experts = transformers_mlp(name, kind, settings)
    stack = experts.gate_up_proj
    transposed = bool(getattr(experts, "is_transposed", kind == "GptOssExperts"))
    with torch.no_grad():
        if hasattr(experts, "gate_up_proj_bias"):
            experts.gate_up_proj_bias.zero_()
    neurons = stack.detach().clone()
    if transposed:
        neurons = neurons.transpose(1, 2)
    parts = rows(experts, "gate_up_proj", neurons.shape[1])
    x = torch.randn(3, 16)
    chosen = torch.tensor([[0], [1], [0]])
    scores = torch.ones(3, 1)
    second = {}
    for key, taken in parts.items():
        outputs = []
        for factor in (0.0, 1.0, 2.0):
            scaled = neurons.clone()
            scaled[:, taken] *= factor
            if transposed:
                scaled = scaled.transpose(1, 2)
            with torch.no_grad():
                stack.copy_(scaled)
                outputs.append(experts(x, chosen, scores))
        second[key] = float((outputs[2] - 2 * outputs[1] + outputs[0]).abs().max())
    assert second["up"] < 1e-4
    assert second["gate"] > 1e-2


# State spaces: x goes through the convolution, the gate z does not.


def test_parts_of_mamba():
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32, "state_size": 4}
    network = tiny("Mamba", **settings)
    mixer = next(module for module in network.modules() if hasattr(module, "in_proj"))
    ids = torch.tensor([[5, 9, 17, 23]])

    def run():
        return network(input_ids=ids)[0]

    plain, plain_output = record(run)
    for key, taken in rows(mixer, "in_proj", 64).items():
        moved, output = observe(run, mixer.in_proj, taken)
        assert not torch.allclose(plain_output, output)
        assert torch.equal(plain["conv1d"], moved["conv1d"]) == (key == "z")


def test_parts_of_mamba2():
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32, "state_size": 4}
    network = tiny("Mamba2", **settings, num_heads=4, head_dim=8, n_groups=2, chunk_size=4)
    mixer = next(module for module in network.modules() if hasattr(module, "in_proj"))
    ids = torch.tensor([[5, 9, 17, 23]])

    def run():
        return network(input_ids=ids)[0]

    plain, plain_output = record(run)
    channels = {"x": (0, 32), "B": (32, 40), "C": (40, 48)}  # of the convolution
    for key, taken in rows(mixer, "in_proj", 84).items():
        moved, output = observe(run, mixer.in_proj, taken)
        assert not torch.allclose(plain_output, output)
        assert torch.equal(plain["softplus"], moved["softplus"]) == (key != "dt")
        changed = (plain["conv1d"] != moved["conv1d"]).any(-1)[0].nonzero().flatten().tolist()
        assert changed == list(range(*channels.get(key, (0, 0))))
