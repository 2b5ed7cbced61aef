"""Quantised weights of libraries: their values are what the forward pass uses."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hsu._neurons.quantised import plain_values, why_unreadable
from tests.real_models.libraries import library

pytestmark = pytest.mark.models


def check_values(module, weight, *, close_to=None, within=0.05, forward=True):
    """The values are close to the weight before, and exactly what the forward pass uses."""
    values = plain_values(module, "weight", weight)
    assert values is not None
    assert values.is_floating_point()
    assert not values.requires_grad
    if close_to is not None:
        assert (values.float() - close_to.float()).abs().max() < within
    if forward:
        eye = torch.eye(values.shape[1])
        with torch.no_grad():
            response = module(eye) - module(torch.zeros_like(eye))
        torch.testing.assert_close(response.T, values.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "exact"),
    [
        ("Int8WeightOnlyConfig", True),
        ("Int4WeightOnlyConfig", True),
        ("IntxWeightOnlyConfig", True),
        ("Float8WeightOnlyConfig", True),
        ("Int8DynamicActivationInt8WeightConfig", False),  # it rounds the inputs, too
        ("Int8DynamicActivationIntxWeightConfig", False),
    ],
)
def test_torchao(config, exact):
    torchao = library("torchao.quantization")
    model = nn.Sequential(nn.Linear(128, 64))
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torchao.quantize_(model, getattr(torchao, config)())
        except Exception as error:
            pytest.skip(f"this torchao does not quantise like that here: {error}")
    weight = model[0].weight
    assert why_unreadable(model[0], "weight", weight).startswith("torchao.")
    check_values(model[0], weight, close_to=before, within=0.01, forward=exact)


def test_bitsandbytes_linears():
    bnb = library("bitsandbytes")
    for make in (bnb.nn.Linear8bitLt, bnb.nn.LinearFP4, bnb.nn.LinearNF4):
        settings = {"has_fp16_weights": False} if make is bnb.nn.Linear8bitLt else {}
        layer = make(64, 32, **settings)
        before = layer.weight.detach().clone()
        assert why_unreadable(layer, "weight", layer.weight) is None
        try:
            layer = layer.to("cpu")
            layer(torch.randn(2, 64))
        except Exception as error:
            pytest.skip(f"this bitsandbytes does not run on a CPU: {error}")
        assert why_unreadable(layer, "weight", layer.weight).startswith("bitsandbytes.")
        check_values(layer, layer.weight, close_to=before)
        # On some processors four bits are rearranged here, and multiplied in bfloat16.
        layer.eval()(torch.randn(2, 64))
        held = layer.weight.detach().clone()
        check_values(layer, layer.weight, close_to=before, forward=False)
        assert torch.equal(layer.weight, held)
        values = plain_values(layer, "weight", layer.weight)
        x = torch.randn(4, 64)
        with torch.no_grad():
            y = layer(x) - layer.bias
        assert (y - F.linear(x, values.float())).abs().max() < 0.05


def test_bitsandbytes_embeddings():
    bnb = library("bitsandbytes")
    for make in (bnb.nn.Embedding8bit, bnb.nn.Embedding4bit):
        layer = make(10, 64).to("cpu")
        values = plain_values(layer, "weight", layer.weight)
        assert values.shape == (10, 64)
        expected = layer(torch.arange(10))
        torch.testing.assert_close(values.to(expected.dtype), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("block", [None, (8, 16), (8, 10)])
def test_fp8_linear_of_transformers(block):
    fp8 = library("transformers.integrations.finegrained_fp8")
    layer = fp8.FP8Linear(50, 20, block_size=block)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(20, 50).to(torch.float8_e4m3fn))
        layer.weight_scale_inv.copy_(torch.rand(layer.weight_scale_inv.shape) + 0.5)
    reason = why_unreadable(layer, "weight", layer.weight)
    assert reason.startswith("transformers.integrations.finegrained_fp8.FP8Linear")
    values = plain_values(layer, "weight", layer.weight)
    scale = layer.weight_scale_inv.detach()
    if block is not None:
        scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:20, :50]
    torch.testing.assert_close(values, layer.weight.float() * scale)
