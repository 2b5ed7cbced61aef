"""Weights that are not plain floating tensors: their values where they are known, else a reason.

Those of libraries are in ``tests/real_models/test_quantised.py``.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hsu._neurons.quantised import plain_values, why_unreadable

OUT = "measure the model before it is quantised, or leave this layer out with exclude"


# Ordinary tensors.


class Plain(nn.Parameter):
    """A class of parameters that changes nothing."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ordinary_tensors(dtype):
    layer = nn.Linear(3, 2, dtype=dtype)
    plain = Plain(torch.randn(2, 3, dtype=dtype))
    for x in (layer.weight, layer.weight.detach(), layer.weight.T, plain):
        assert why_unreadable(layer, "weight", x) is None
        torch.testing.assert_close(plain_values(layer, "weight", x), x.detach())


def test_sharded_and_lazy_parameters_are_handled_elsewhere():
    layer = nn.LazyLinear(2)
    assert why_unreadable(layer, "weight", layer.weight) is None
    assert plain_values(layer, "weight", layer.weight) is None

    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise AssertionError

    x = torch.ones(2, 2).as_subclass(Sharded)
    assert why_unreadable(nn.Linear(2, 2), "weight", x) is None
    assert plain_values(nn.Linear(2, 2), "weight", x) is None


# What cannot be read.


def packed(layer):
    return layer.weight.detach().to_mkldnn()


def nested(_):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(3, 2)])


def jagged(_):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [torch.ones(2, 2), torch.ones(3, 2)]
        return torch.nested.nested_tensor(parts, layout=torch.jagged)


def compressed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return layer.weight.detach().to_sparse_csr()


UNREADABLE = {
    "sparse": (
        lambda layer: nn.Parameter(layer.weight.detach().to_sparse()),
        "sparse (torch.sparse_coo): measured only when dense; use to_dense()",
    ),
    "compressed": (compressed, "sparse (torch.sparse_csr): measured only when dense"),
    "mkldnn": (packed, "packed (torch._mkldnn): measured only when dense"),
    "complex": (lambda _: torch.ones(2, 2, dtype=torch.complex64), "complex (torch.complex64): "),
    "meta": (lambda _: torch.ones(2, 2, device="meta"), "it holds no numbers yet (device meta)"),
    "int": (
        lambda _: torch.ones(2, 2, dtype=torch.int32),
        "torch.nn.modules.linear.Linear: its weights are torch.int32, not floating-point; " + OUT,
    ),
    "bool": (lambda _: torch.ones(2, 2, dtype=torch.bool), "its weights are torch.bool"),
    "nested": (nested, "nested (torch.Tensor)"),
    "jagged": (jagged, "nested (torch.nested._internal.nested_tensor.NestedTensor)"),
    "no tensor": (lambda _: None, "builtins.NoneType is no tensor"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_reasons(kind):
    make, expected = UNREADABLE[kind]
    layer = nn.Linear(2, 2)
    x = make(layer)
    assert expected in why_unreadable(layer, "weight", x)
    assert plain_values(layer, "weight", x) is None


class Wrapper(torch.Tensor):
    """A tensor whose numbers lie in other tensors: what torchao's classes look like."""

    @staticmethod
    def __new__(cls, codes, scale, *, claims=None):
        shape = codes.shape if claims is None else claims
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __init__(self, codes, scale, *, claims=None):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


class Readable(Wrapper):
    def dequantize(self):
        return self.codes * self.scale


class Around(Wrapper):
    """Around another one, which it quantises the inputs for."""

    @property
    def original_weight_tensor(self):
        return Readable(self.codes, self.scale)


class Old(Wrapper):
    def get_original_weight(self):
        return self.codes * self.scale


class Broken(Wrapper):
    def dequantize(self):
        raise RuntimeError("no kernel")


class Hostile(torch.Tensor):
    """A tensor of which nothing can be asked."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("nothing")


@pytest.mark.parametrize("kind", [Readable, Around, Old])
def test_wrappers_that_compute_their_values(kind):
    codes = torch.arange(4.0).view(2, 2)
    x = kind(codes, 0.5)
    layer = nn.Linear(2, 2)
    assert f"{kind.__name__}: a tensor whose numbers lie in" in why_unreadable(layer, "weight", x)
    assert torch.equal(plain_values(layer, "weight", x), codes / 2)


def test_wrappers_that_do_not():
    layer = nn.Linear(2, 2)
    codes = torch.ones(2, 2)
    wrong = Readable(codes, 1.0, claims=(3, 2))
    unreal = Readable(codes.to(torch.complex64), 1.0)
    for x in (Wrapper(codes, 1.0), Broken(codes, 1.0), wrong, unreal, Readable(codes, "two")):
        assert why_unreadable(layer, "weight", x).endswith(OUT)
        assert plain_values(layer, "weight", x) is None
    hostile = torch.ones(2, 2).as_subclass(Hostile)
    assert "it cannot be read (nothing)" in why_unreadable(layer, "weight", hostile)
    assert plain_values(layer, "weight", hostile) is None


# Eight bits with scales.


def scaled(shape, scale, name="weight_scale", **more):
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(shape).to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer(name, scale)
    for key, value in more.items():
        setattr(layer, key, value)
    return layer


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "scale"])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1), (2, 3), (4, 6)])
def test_scales_of_eight_bits(name, shape):
    scale = torch.rand(shape) + 0.5
    layer = scaled((4, 6), scale, name)
    whole = scale if scale.numel() > 1 else scale.reshape(())
    if shape == (4,):
        whole = scale[:, None]
    if shape == (2, 3):
        whole = scale.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert "float8_e4m3fn, with scales beside" in why_unreadable(layer, "weight", layer.weight)
    values = plain_values(layer, "weight", layer.weight)
    torch.testing.assert_close(values, layer.weight.float() * whole)


def test_blocks_that_do_not_divide_the_weight():
    scale = torch.rand(2, 3)
    layer = scaled((5, 7), scale, block_size=(3, 3))
    whole = scale.repeat_interleave(3, 0)[:5].repeat_interleave(3, 1)[:, :7]
    values = plain_values(layer, "weight", layer.weight)
    torch.testing.assert_close(values, layer.weight.float() * whole)
    assert plain_values(scaled((5, 7), scale), "weight", layer.weight) is None  # of which size?


def test_experts_of_eight_bits():
    scale = torch.rand(2, 2, 3)
    layer = scaled((2, 4, 6), scale, block_size=(2, 2))
    whole = scale.repeat_interleave(2, 1).repeat_interleave(2, 2)
    values = plain_values(layer, "weight", layer.weight)
    torch.testing.assert_close(values, layer.weight.float() * whole)


def test_eight_bits_without_scales():
    layer = nn.Module()
    layer.weight = torch.ones(2, 2).to(torch.float8_e5m2)
    assert torch.equal(plain_values(layer, "weight", layer.weight), torch.ones(2, 2))
    layer = scaled((2, 2), torch.ones(2), "another_scale")
    assert plain_values(layer, "weight", layer.weight) is None
    layer = scaled((2, 2), torch.ones(2, dtype=torch.uint8))
    assert plain_values(layer, "weight", layer.weight) is None
    layer = scaled((2, 2), torch.ones(3, 3, 3))
    assert plain_values(layer, "weight", layer.weight) is None


# Libraries.


class Int8Params(nn.Parameter):
    """As in bitsandbytes."""


class Params4bit(nn.Parameter):
    """As in bitsandbytes."""


def test_eight_bits_as_in_bitsandbytes():
    layer = nn.Linear(3, 2)
    codes = torch.randint(-127, 128, (2, 3), dtype=torch.int8)
    x = Int8Params(codes, requires_grad=False)
    assert "Int8Params: its weights are torch.int8" in why_unreadable(layer, "weight", x)
    assert plain_values(layer, "weight", x) is None  # no scales
    x.SCB = torch.tensor([1.0, 2.0])
    expected = codes.float() * torch.tensor([[1.0], [2.0]]) / 127
    torch.testing.assert_close(plain_values(layer, "weight", x), expected)
    layer.state = nn.Module()
    layer.state.CB, layer.state.SCB = codes, x.SCB
    del x.SCB
    torch.testing.assert_close(plain_values(layer, "weight", x), expected)


def test_four_bits_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    x = Params4bit(torch.zeros(3, 1, dtype=torch.uint8), requires_grad=False)
    x.quant_state = object()
    assert plain_values(nn.Linear(3, 2), "weight", x) is None


def test_torch_quantised_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(16, 8))
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        layer = model[0]
        weight = layer.weight()  # a method: it has no parameters at all
        assert "its weights are torch.qint8" in why_unreadable(layer, "weight", weight)
        values = plain_values(layer, "weight", weight)
        x = torch.randn(4, 16)
        assert (layer(x) - F.linear(x, values, layer.bias())).abs().max() < 0.05
