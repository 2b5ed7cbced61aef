"""Adapters of libraries: the neurons are those of the weight that the forward pass uses."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hsu import UniformityRegularizer
from lightning_hsu._neurons.adapters import adapter_of, unused_of
from tests.real_models.libraries import library
from tests.test_adapters import (
    SIZE,
    check_gradients,
    check_linear,
    jacobian,
    quiet,
    read,
)

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def peft():
    return library("peft")


@pytest.fixture(scope="module")
def loralib():
    return library("loralib")


class Net(nn.Module):
    """One layer to be adapted, and another one, which stays as it is."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


def randomise(module, besides="base_layer", seed=0):
    """Factors at zero would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if besides not in name and p.is_floating_point():
                p += 0.3 * torch.randn(p.shape, generator=generator)


def adapt(peft, layer, config, adapter="default"):
    """The adapted layer with random factors, not training."""
    with quiet():
        model = peft.get_peft_model(Net(layer), config, adapter_name=adapter)
    randomise(model)
    return model, model.base_model.model.layer


# Every kind of peft that has one weight: config, settings, and how many factors get a gradient.
KINDS = {
    "Lora": ({"r": 2, "lora_dropout": 0.5}, 2),
    "Lora rank-stabilised": ({"r": 2, "use_rslora": True}, 2),
    "Lora dora": ({"r": 2, "use_dora": True, "lora_dropout": 0.5}, 3),
    "Lora mica": ({"r": 2, "init_lora_weights": "mica"}, 1),
    "AdaLora": ({"total_step": 10}, 3),
    "LoHa": ({"r": 2}, 4),
    "LoKr": ({"r": 2}, 2),
    "Vera": ({"r": 2}, 2),
    "Pvera": ({"r": 2}, 2),
    "RandLora": ({"r": 2}, 2),
    "FourierFT": ({"n_frequency": 20}, 1),
    "WaveFT": ({"n_frequency": 20}, 1),
    "C3A": ({"block_size": 4}, 1),
    "VBLoRA": ({"num_vectors": 8, "vector_length": 4}, 3),
    "UniLora": ({}, 1),
    "Shira": ({"r": 2}, 1),
    "Gralora": ({"r": 4}, 2),
    "Adamss": ({}, 2),
    "Delora": ({}, 3),
    "Deft": ({}, 2),
    "OSF": ({}, 3),
    "Psoft": ({"r": 4}, 1),
    "Peanut": ({}, 2),
    "TinyLora": ({}, 1),
    "Supertuning": ({}, 1),
    "Frod": ({}, 1),
    "Hira": ({"r": 2}, 2),
    "Miss": ({"r": 4}, 1),
    "Miss bat": ({"r": 4, "init_weights": "bat"}, 1),
    "Miss mini": ({"r": 4, "mini_r": 4, "init_weights": "mini"}, 1),
    "Miss uneven": ({"r": 5}, 1),
    "Beft": ({}, 0),
}


def config_of(peft, kind, **more):
    settings, _ = KINDS[kind]
    name = f"{kind.split()[0]}Config"
    if not hasattr(peft, name):
        pytest.skip(f"this peft has no {name}")
    with quiet():
        return getattr(peft, name)(target_modules=["layer"], **settings, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_kinds_over_a_linear(peft, kind):
    _, module = adapt(peft, nn.Linear(SIZE, SIZE), config_of(peft, kind))
    check_linear(module)
    check_gradients(module, KINDS[kind][1])
    adapter = adapter_of(module)
    assert set(adapter.inside) == set(module.modules()) - {module}
    assert adapter.base is module.get_base_layer()
    with quiet():
        module.merge()
    check_linear(module)


@pytest.mark.parametrize("kind", ["Lora", "Lora dora", "AdaLora", "LoHa", "Vera", "Hira", "Shira"])
def test_disabled_adapters_leave_the_base(peft, kind):
    model, module = adapt(peft, nn.Linear(SIZE, SIZE), config_of(peft, kind))
    with quiet(), model.disable_adapter():
        torch.testing.assert_close(read(module), module.get_base_layer().weight)
        check_linear(module)


def test_merged_and_disabled_at_once(peft):
    model, module = adapt(peft, nn.Linear(SIZE, SIZE), config_of(peft, "Lora"))
    base = module.get_base_layer().weight.detach().clone()
    module.merge()
    with quiet(), model.disable_adapter():
        torch.testing.assert_close(read(module).detach(), base)
        check_linear(module)
    _, module = adapt(peft, nn.Linear(SIZE, SIZE), config_of(peft, "Lora dora"))
    module.merge()
    module.enable_adapters(False)
    assert "call unmerge" in adapter_of(module).reason


@pytest.mark.parametrize("first", ["Lora", "Lora dora"])
@pytest.mark.parametrize("second", ["Lora", "Lora dora"])
def test_several_lora_adapters_of_which_some_are_active(peft, first, second):
    model, module = adapt(peft, nn.Linear(SIZE, SIZE), config_of(peft, first))
    model.add_adapter("second", config_of(peft, second))
    model.add_adapter("third", config_of(peft, "Lora"))
    randomise(model, seed=1)
    for active in ["default", "second", ["default", "second"], ["second", "default"]]:
        model.base_model.set_adapter(active)
        check_linear(module)


@pytest.mark.parametrize(
    "kind", ["LoHa", "Hira", "Shira", "FourierFT", "Deft", "C3A", "OSF", "Miss"]
)
def test_several_adapters_of_other_kinds(peft, kind):
    model, module = adapt(peft, nn.Linear(SIZE, SIZE), config_of(peft, kind))
    with quiet():
        model.add_adapter("second", config_of(peft, kind))
    randomise(model, seed=1)
    module.set_adapter(["default", "second"])
    if adapter_of(module).rule is None:
        assert "do not add up" in adapter_of(module).reason
        assert kind in ("C3A", "OSF")
    else:
        check_linear(module)


@pytest.mark.parametrize(
    "kind", ["Lora", "Lora dora", "AdaLora", "Vera", "Hira", "FourierFT", "VBLoRA", "RandLora"]
)
def test_conv1d_of_transformers_has_columns(peft, kind):
    layer = library("transformers.pytorch_utils").Conv1D(SIZE, SIZE)
    _, module = adapt(peft, layer, config_of(peft, kind, fan_in_fan_out=True))
    if kind == "FourierFT":  # its change lies the other way round than the weight
        assert "unknown kind" in adapter_of(module).reason
        return
    check_linear(module)
    module.merge()
    check_linear(module)


def kernel(module, inputs, dims):
    """The kernel (out, in, *k) of an affine convolution of kernel 3, from its responses."""
    points = torch.zeros(inputs, inputs, *[5] * dims)
    for i in range(inputs):
        points[(i, i, *[2] * dims)] = 1
    with torch.no_grad():
        response = module(points) - module(torch.zeros_like(points))
    return response.flip(list(range(2, 2 + dims))).transpose(0, 1)


@pytest.mark.parametrize("kind", ["Lora", "Lora dora", "AdaLora", "LoHa", "LoKr", "Hira"])
@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions(peft, kind, dims):
    if kind == "AdaLora" and dims == 1:
        pytest.skip("AdaLora knows no Conv1d")
    layer = [nn.Conv1d, nn.Conv2d][dims - 1](4, 6, 3)
    _, module = adapt(peft, layer, config_of(peft, kind))
    module.eval()
    expected = kernel(module, 4, dims).flatten(1)
    torch.testing.assert_close(read(module)[0].detach(), expected, rtol=1e-4, atol=1e-4)
    check_gradients(module, KINDS[kind][1])
    module.merge()
    torch.testing.assert_close(read(module)[0].detach(), expected, rtol=1e-4, atol=1e-4)


def test_kernels_of_one_pixel_and_grouped_convolutions(peft):
    _, module = adapt(peft, nn.Conv2d(4, 6, 1), config_of(peft, "Lora"))
    x = torch.randn(2, 4, 5, 5)
    y = module.eval()(x) - module.base_layer.bias[:, None, None]
    torch.testing.assert_close(y, F.conv2d(x, read(module)[0][..., None, None]))
    _, module = adapt(peft, nn.Conv2d(4, 6, 3, groups=2), config_of(peft, "Lora"))
    adapter = adapter_of(module)
    assert adapter.rule is None
    assert "cannot be read" in adapter.reason or "does not fit" in adapter.reason


@pytest.mark.parametrize("kind", ["Lora", "Lora dora", "Hira"])
@pytest.mark.parametrize("padding", [None, 0])
def test_embeddings(peft, kind, padding):
    layer = nn.Embedding(6, 4, padding_idx=padding)
    _, module = adapt(peft, layer, config_of(peft, kind))
    module.eval()
    rows = torch.arange(6 if padding is None else 5) + (padding is not None)
    torch.testing.assert_close(read(module).detach(), module(rows).detach())
    check_gradients(module, KINDS[kind][1])


def test_trainable_tokens(peft):
    config = peft.TrainableTokensConfig(target_modules=["layer"], token_indices=[1, 3])
    _, module = adapt(peft, nn.Embedding(6, 4), config)
    torch.testing.assert_close(read(module).detach(), module(torch.arange(6)).detach())
    check_gradients(module, 1)


def test_attention(peft):
    config = peft.LoraConfig(target_modules=["layer"], r=2)
    _, module = adapt(peft, nn.MultiheadAttention(8, 2), config)
    adapter = adapter_of(module)
    neurons = adapter.rule(module)
    assert isinstance(neurons, Mapping)
    packed = torch.cat(list(neurons.values()))
    base = module.base_layer
    factors = module.lora_B["default"].weight @ module.lora_A["default"].weight
    torch.testing.assert_close(packed, base.in_proj_weight + 4 * factors)
    packed.sum().backward()
    assert module.lora_A["default"].weight.grad is not None
    assert base.out_proj not in adapter.inside  # it has an adapter of its own
    assert adapter_of(base.out_proj).rule is not None

    x = torch.randn(5, 1, 8)
    expected = nn.MultiheadAttention(8, 2)
    with torch.no_grad():
        expected.in_proj_weight.copy_(packed)
        expected.in_proj_bias.copy_(base.in_proj_bias)
        # Only the weights of attention are compared: they do not depend on the projection after it.
        torch.testing.assert_close(module(x, x, x)[1], expected(x, x, x)[1])


@pytest.mark.parametrize("kind", ["Boft", "OFT", "HRA"])
def test_rotations_have_nothing_to_change(peft, kind):
    settings = {"Boft": {"boft_block_size": 4}, "OFT": {"oft_block_size": 4, "r": 0}, "HRA": {}}
    names = {"Boft": "BOFTConfig", "OFT": "OFTConfig", "HRA": "HRAConfig"}
    config = getattr(peft, names[kind])(target_modules=["layer"], **settings[kind])
    _, module = adapt(peft, nn.Linear(SIZE, SIZE), config)
    adapter = adapter_of(module)
    assert adapter.rule is None
    assert "turns all neurons of a layer alike" in adapter.reason
    assert module.base_layer in adapter.inside


def test_kinds_without_a_known_weight_give_a_reason(peft):
    configs = {
        "IA3": peft.IA3Config(target_modules=["layer"], feedforward_modules=[]),
        "road": peft.RoadConfig(target_modules=["layer"], group_size=4),
        "poly": peft.PolyConfig(target_modules=["layer"]),
        "glora": getattr(peft, "GloraConfig", peft.IA3Config)(target_modules=["layer"]),
    }
    if hasattr(peft, "LilyConfig"):
        configs["lily"] = peft.LilyConfig(target_modules=["layer"])
    for name, config in configs.items():
        _, module = adapt(peft, nn.Linear(SIZE, SIZE), config)
        adapter = adapter_of(module)
        assert adapter.rule is None, name
        assert adapter.reason.startswith("peft.tuners."), adapter.reason
        assert "register_neurons" in adapter.reason


@pytest.mark.parametrize("variant", ["kasa", "alora", "bdlora", "velora"])
def test_variants_of_lora_are_measured_only_if_a_forward_pass_agrees(peft, variant):
    from peft.tuners.lora import config as lora

    settings = {
        "kasa": lambda: {"kasa_config": lora.KasaConfig()},
        "alora": lambda: {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
        "bdlora": lambda: {
            "use_bdlora": lora.BdLoraConfig(target_modules_bd_a=["layer"], nblocks=2)
        },
        "velora": lambda: {"velora_config": lora.VeloraConfig()},
    }
    try:
        with quiet():
            config = peft.LoraConfig(target_modules=["layer"], r=2, **settings[variant]())
            _, module = adapt(peft, nn.Linear(SIZE, SIZE), config)
    except Exception as error:
        pytest.skip(f"this peft makes no {variant} here: {error}")
    adapter = adapter_of(module)
    if adapter.rule is None:
        assert adapter.reason
    else:
        check_linear(module)


def test_one_parameter_of_any_module(peft):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 5, 4))  # (experts, out, in)
            self.down = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x):
            hidden = torch.einsum("eoi,bi->beo", self.up, x)
            return torch.einsum("eoi,bei->beo", self.down, hidden)

    if not hasattr(peft.LoraConfig, "target_parameters"):
        pytest.skip("this peft adapts layers only")
    config = peft.LoraConfig(target_parameters=["layer.up", "layer.down"], r=2, target_modules=[])
    _, outer = adapt(peft, Experts(), config)
    inner = outer.base_layer
    randomise(inner)
    seen = {}
    for module in (outer, inner):
        adapter = adapter_of(module)
        seen[module.parameter_name] = adapter.rule(module)
        assert adapter.base is inner.base_layer
    check_gradients(inner, 2)
    assert inner not in adapter_of(outer).inside
    assert inner.base_layer in adapter_of(inner).inside
    x = torch.randn(2, 4)
    hidden = torch.einsum("eoi,bi->beo", seen["up"], x)
    torch.testing.assert_close(torch.einsum("eoi,bei->beo", seen["down"], hidden), outer(x))


def test_modules_to_save(peft):
    config = peft.LoraConfig(target_modules=["layer"], r=2, modules_to_save=["other"])
    model, _ = adapt(peft, nn.Linear(SIZE, SIZE), config)
    model.add_adapter("second", config)
    wrapper = model.base_model.model.other
    original = wrapper.original_module
    first, second = wrapper.modules_to_save["default"], wrapper.modules_to_save["second"]
    assert adapter_of(wrapper) is None
    assert set(unused_of(wrapper)) == {original, second}
    model.set_adapter("second")
    assert set(unused_of(wrapper)) == {original, first}
    with model.disable_adapter():
        assert set(unused_of(wrapper)) == {first, second}


def test_tuned_normalisation_layers_are_copies(peft):
    config = peft.LNTuningConfig(target_modules=["layer"])
    _, module = adapt(peft, nn.LayerNorm(4), config)
    assert adapter_of(module) is None
    assert unused_of(module) == (module.base_layer,)


def test_learned_prompts(peft):
    from peft.tuners.prefix_tuning.model import PrefixEncoder

    config = peft.PrefixTuningConfig(
        num_virtual_tokens=3,
        token_dim=4,
        num_layers=1,
        encoder_hidden_size=4,
        task_type="CAUSAL_LM",
    )
    module = PrefixEncoder(config)
    adapter = adapter_of(module)
    assert adapter.rule is None
    assert "learned prompts" in adapter.reason
    assert adapter.hidden == ("embedding.weight",)
    assert module.embedding in adapter.inside


@pytest.mark.parametrize("kind", ["Lora", "Lora dora"])
def test_quantised_base_whose_values_are_known(peft, kind):
    bnb = library("bitsandbytes")
    layer = bnb.nn.LinearNF4(64, 64).to("cpu")
    _, module = adapt(peft, layer, config_of(peft, kind))
    module.train()
    module.lora_dropout.eval()
    with quiet():
        expected = jacobian(module, 64)
    torch.testing.assert_close(read(module).detach(), expected, rtol=1e-4, atol=1e-4)
    # On some processors an evaluation rearranges the four bits and rounds their scales. peft then
    # takes DoRA's norms of numbers in the wrong order; the neurons stay what they are in training.
    with quiet():
        module.eval()(torch.randn(2, 64))
    torch.testing.assert_close(read(module).detach(), expected, rtol=1e-2, atol=1e-2)
    check_gradients(module, KINDS[kind][1])


def test_factors_in_another_precision(peft):
    _, module = adapt(peft, nn.Linear(SIZE, SIZE, dtype=torch.bfloat16), config_of(peft, "Lora"))
    neurons = read(module)
    factors = module.lora_B["default"].weight @ module.lora_A["default"].weight
    expected = module.base_layer.weight.float() + 4 * factors.float()
    torch.testing.assert_close(neurons.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["Linear", "MergedLinear"])
def test_loralib_linears(loralib, kind, transposed):
    settings = {"enable_lora": [True, False]} if kind == "MergedLinear" else {}
    module = getattr(loralib, kind)(
        SIZE, SIZE, r=2, fan_in_fan_out=transposed, lora_dropout=0.5, **settings
    )
    randomise(module, besides="weight")
    module.train()
    before = read(module).detach()
    adapter = adapter_of(module)
    assert adapter.hidden == ("lora_A", "lora_B")
    assert adapter.inside == (module.lora_dropout,)
    assert adapter.base is module
    module.lora_dropout.eval()
    torch.testing.assert_close(jacobian(module), before, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(read(module).square().sum(), [module.lora_A, module.lora_B])
    assert all(bool(g.any()) for g in grads)
    check_linear(module)  # eval merges


def test_loralib_without_factors(loralib):
    assert adapter_of(loralib.Linear(SIZE, SIZE, r=0)) is None
    check_linear(loralib.Linear(SIZE, SIZE, r=0, fan_in_fan_out=True))


def test_loralib_embedding(loralib):
    module = loralib.Embedding(6, 4, r=2, padding_idx=0)
    randomise(module, besides="weight")
    module.train()
    expected = module(torch.arange(1, 6)).detach()
    # Its own weight is added in place, so a copy is compared.
    torch.testing.assert_close(read(module).detach(), expected)
    module.eval()
    torch.testing.assert_close(read(module).detach(), expected)


def test_loralib_convolution(loralib):
    module = loralib.Conv2d(4, 6, 3, r=2)
    randomise(module, besides="conv.")
    module.train()
    expected = kernel(module, 4, 2).flatten(1)
    adapter = adapter_of(module)
    assert adapter.base is module.conv
    assert module.conv in adapter.inside
    assert set(adapter.hidden) == {"lora_A", "lora_B"}
    neurons = read(module)
    torch.testing.assert_close(neurons[0].detach(), expected, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(neurons.square().sum(), [module.lora_A, module.lora_B])
    assert all(bool(g.any()) for g in grads)
    module.eval()
    torch.testing.assert_close(read(module)[0].detach(), expected, rtol=1e-4, atol=1e-4)


def test_what_the_user_says_of_an_adapted_layer_is_said_of_its_effective_weight(peft):
    config = peft.LoraConfig(target_modules=["layer"], r=2, init_lora_weights=False)
    model, _ = adapt(peft, nn.Linear(SIZE, SIZE), config)
    name = "base_model.model.layer"
    delta = model.base_model.model.layer.get_delta_weight("default")
    weight = model.base_model.model.layer.base_layer.weight + delta
    found = UniformityRegularizer(head=None, neurons={"*.layer": "columns"}).attach(model).layers
    columns = [layer for layer in found if layer.name == name]
    assert not [layer.name for layer in found if "lora_" in layer.name]
    torch.testing.assert_close(columns[0].target.neurons()[0], weight.T)
    factor = f"{name}.lora_A.default"
    found = UniformityRegularizer(head=None, neurons={factor: "rows"}).attach(model).layers
    assert factor in [layer.name for layer in found]
