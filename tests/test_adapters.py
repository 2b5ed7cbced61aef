"""Fine-tuning adapters: the neurons are those of the weight that the forward pass uses.

The adapters here are small fakes; ``tests/real_models/test_adapters.py`` has those of libraries.
"""

import contextlib
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hsu._neurons.adapters import adapter_of, unused_of

SIZE = 16  # square, so that no shape tells rows from columns


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def jacobian(forward, size=SIZE):
    """The matrix (out, in) of an affine function."""
    zero = forward(torch.zeros(1, size))
    return (forward(torch.eye(size)) - zero).T.detach()


def read(module):
    adapter = adapter_of(module)
    assert adapter is not None
    assert adapter.rule is not None, adapter.reason
    assert adapter.reason == ""
    return adapter.rule(module)


def check_linear(module):
    """The neurons are the rows of what forward multiplies with."""
    module.eval()
    with quiet():
        expected = jacobian(module)
    torch.testing.assert_close(read(module).detach(), expected, rtol=1e-4, atol=1e-4)


def check_gradients(module, trained):
    """Gradients of the neurons reach the trained parameters, and all the factors are hidden."""
    adapter = adapter_of(module)
    named = dict(module.named_parameters(remove_duplicate=False))
    assert set(adapter.hidden) == {name for name in named if "base_layer" not in name}
    leaves = [p for name, p in named.items() if name in adapter.hidden and p.requires_grad]
    assert len(leaves) >= trained
    if trained == 0:
        return
    neurons = adapter.rule(module)
    grads = torch.autograd.grad(neurons.square().sum(), leaves, allow_unused=True)
    reached = [g for g in grads if g is not None and bool(g.any())]
    assert len(reached) >= trained


def test_a_base_layer_that_is_unknown():
    module = FakeTuner(nn.Identity())
    assert "nn.modules.linear.Identity has no tensor weight" in adapter_of(module).reason
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(SIZE, SIZE))
    assert "no rule for its base layer" in adapter_of(FakeTuner(layer)).reason


def test_a_wrapped_layer_with_a_computed_weight():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(SIZE, SIZE))
    module = FakeTuner(layer)
    check_linear(module)
    pruned = nn.Linear(SIZE, SIZE)
    nn.utils.prune.random_unstructured(pruned, "weight", 0.5)
    module = FakeTuner(pruned)
    check_linear(module)


class FakeTuner(nn.Module):
    """A wrapper of peft's kind, of a method that nobody knows."""

    adapter_layer_names = ("new_A", "new_B")
    merged_adapters = ()
    disable_adapters = False
    factor = 1

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.new_A = nn.ParameterDict({"default": nn.Parameter(torch.randn(2, SIZE))})
        self.new_B = nn.ParameterDict({"default": nn.Parameter(torch.randn(SIZE, 2))})
        self.drop = nn.Dropout(0.5)

    @property
    def active_adapters(self):
        return ["default", "elsewhere"]

    def get_base_layer(self):
        return self.base_layer

    def get_delta_weight(self, adapter):
        return self.new_B[adapter] @ self.new_A[adapter]

    def forward(self, x):
        change = self.factor * self.get_delta_weight("default")
        return self.base_layer(x) + F.linear(self.drop(x), change)


def test_an_unknown_method_is_measured_if_a_forward_pass_agrees():
    module = FakeTuner(nn.Linear(SIZE, SIZE))
    assert adapter_of(module).rule is not None
    assert module.training
    assert module.drop.training
    check_linear(module)
    check_gradients(module, 2)
    module.factor = 2
    assert "unknown kind" in adapter_of(module).reason


def test_an_unknown_method_without_a_change():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(3, 3)
            self.factor = nn.Parameter(torch.randn(3, 3))

        def get_base_layer(self):
            return self.base_layer

        @property
        def active_adapters(self):
            return ["default"]

    module = Silent()
    adapter = adapter_of(module)
    assert adapter.rule is None
    assert "Silent: an adapter of an unknown kind" in adapter.reason
    assert adapter.hidden == ("factor",)
    assert adapter.inside == (module.base_layer,)


def test_gradients_reach_the_base_weight_too():
    module = FakeTuner(nn.Linear(SIZE, SIZE))
    (grad,) = torch.autograd.grad(read(module).sum(), module.base_layer.weight)
    torch.testing.assert_close(grad, torch.ones(SIZE, SIZE))


def test_quantised_base():
    layer = nn.Linear(SIZE, SIZE)
    layer.weight = nn.Parameter(torch.ones(SIZE, SIZE, dtype=torch.int8), requires_grad=False)
    adapter = adapter_of(FakeTuner(layer))
    assert adapter.rule is None
    assert adapter.reason.startswith("its base layer: torch.nn.modules.linear.Linear")


@pytest.mark.parametrize(
    "module", [nn.Linear(2, 2), nn.LSTM(2, 2), nn.Sequential(), nn.ModuleDict(), nn.Module()]
)
def test_other_modules_are_no_adapters(module):
    assert adapter_of(module) is None
    assert unused_of(module) == ()


class TorchtuneLinear(nn.Module):
    """As in torchtune: its own weight, two Linears, and DoRA's magnitudes if they are asked for."""

    def __init__(self, magnitude=False):
        super().__init__()
        self.rank, self.alpha, self.disabled = 2, 3.0, False
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE), requires_grad=False)
        self.register_parameter("bias", None)
        self.dropout = nn.Dropout(0.5)
        self.lora_a = nn.Linear(SIZE, 2, bias=False)
        self.lora_b = nn.Linear(2, SIZE, bias=False)
        if magnitude:
            self.magnitude = nn.Parameter(torch.rand(SIZE) + 1)

    def forward(self, x):
        out = F.linear(x, self.weight)
        if self.disabled:
            return out
        scaling = self.alpha / self.rank
        lora = scaling * self.lora_b(self.lora_a(self.dropout(x)))
        if not hasattr(self, "magnitude"):
            return out + lora
        whole = self.weight + scaling * self.lora_b.weight @ self.lora_a.weight
        scale = (self.magnitude / torch.linalg.norm(whole, dim=1).detach()).view(1, -1)
        return out + (scale - 1) * out + scale * lora


@pytest.mark.parametrize("magnitude", [False, True])
def test_torchtune(magnitude):
    module = TorchtuneLinear(magnitude)
    check_linear(module)
    check = read(module).square().sum()
    check.backward()
    assert module.lora_a.weight.grad is not None
    assert module.lora_b.weight.grad is not None
    hidden = {"lora_a.weight", "lora_b.weight"} | ({"magnitude"} if magnitude else set())
    assert set(adapter_of(module).hidden) == hidden
    module.disabled = True
    check_linear(module)


class LitLinear(nn.Module):
    """As in litgpt: the layer inside, factors beside it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)
        self.r, self.lora_alpha, self.scaling, self.merged = 2, 4, 2.0, False
        self.lora_A = nn.Parameter(torch.randn(2, SIZE) / math.sqrt(SIZE))
        self.lora_B = nn.Parameter(torch.randn(SIZE, 2))

    def get_lora_AB(self):  # noqa: N802
        return (self.lora_B @ self.lora_A) * self.scaling

    def forward(self, x):
        return self.linear(x) + F.linear(x, self.get_lora_AB())


def test_litgpt():
    module = LitLinear()
    check_linear(module)
    assert adapter_of(module).base is module.linear
