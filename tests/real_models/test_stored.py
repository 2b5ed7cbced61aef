"""Files with quantised weights: what is read of them is what the library itself makes of them."""

import warnings

import pytest
import torch
from torch import nn

from lightning_hsu._neurons.packed import split_packed, unpacked
from lightning_hsu.report import report
from tests.real_models.libraries import library

pytestmark = pytest.mark.models


def read_back(state, settings=None, path="fc"):
    """The weight that is read of a layer in a state dict, of which a report measures it alone."""
    leaves = {}
    for name, x in state.items():
        if isinstance(x, torch.Tensor):
            layer, leaf = split_packed(name) or tuple(name.rpartition(".")[::2])
            assert layer == path
            leaves[leaf] = x
    found = unpacked(leaves, settings)
    assert not found.reasons
    if settings is None:
        reported = report(state)
        assert [layer.uniformity.name for layer in reported.layers] == [path]
        assert not reported.skips
    return found.tensors["weight"]


def check(values, expected, tolerance=1e-6):
    """Equal up to the precision in which a library computes."""
    assert values.shape == expected.shape
    assert values.dtype == torch.float32
    largest = expected.float().abs().max()
    assert (values - expected.float()).abs().max() <= tolerance * largest


# bitsandbytes.


@pytest.mark.parametrize("kind", ["LinearNF4", "LinearFP4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes(kind, nested):
    bnb = library("bitsandbytes")
    model = nn.ModuleDict({"fc": getattr(bnb.nn, kind)(64, 300, compress_statistics=nested)})
    model = model.to("cpu")
    weight = model["fc"].weight
    expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    check(read_back(model.state_dict()), expected)


def test_eight_bits_of_bitsandbytes():
    bnb = library("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    before = layer.weight.detach().clone()
    model = nn.ModuleDict({"fc": layer}).to("cpu")
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(before.half())
    expected = bnb.functional.int8_vectorwise_dequant(codes, scales)
    check(read_back(model.state_dict()), expected)


# compressed-tensors.

SCHEMES = {
    "pack-quantized, 4 bits": ("int", 4, "group", 32, True),
    "pack-quantized, 3 bits": ("int", 3, "group", 32, True),
    "pack-quantized, zero points": ("int", 4, "group", 32, False),
    "pack-quantized, rows": ("int", 8, "channel", None, True),
    "int-quantized": ("int", 8, "channel", None, False),
    "float-quantized": ("float", 8, "channel", None, True),
    "float-quantized, one": ("float", 8, "tensor", None, True),
    "nvfp4-pack-quantized": ("float", 4, "tensor_group", 16, True),
    "mxfp4-pack-quantized": ("float", 4, "group", 32, True),
    "mxfp8-quantized": ("float", 8, "group", 32, True),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(name):
    quantization = library("compressed_tensors.quantization")
    base = library("compressed_tensors.compressors.base")
    library("compressed_tensors.compressors")
    kind, bits, strategy, group_size, symmetric = SCHEMES[name]
    is_mx = name.startswith("mx")
    arguments = quantization.QuantizationArgs(
        num_bits=bits,
        type=kind,
        strategy=strategy,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=torch.uint8 if is_mx else None,
        zp_dtype=torch.int8,
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    rows, columns = 64, 96
    weight = torch.randn(rows, columns)
    groups = {"tensor": 1, "channel": 1}.get(strategy) or columns // group_size
    shape = (1,) if strategy == "tensor" else (rows, groups)
    grouped = weight.view(rows, groups, -1)
    largest = grouped.abs().amax(-1)
    scale = largest / {("int", 8): 127, ("int", 4): 7, ("int", 3): 3}.get((kind, bits), 6)
    if (kind, bits) == ("float", 8):
        scale = largest / 448
    scale = scale.amax().view(1) if shape == (1,) else scale
    state = {"weight": weight, "weight_scale": scale}
    if is_mx:
        state["weight_scale"] = 2.0 ** scale.log2().ceil()
    if strategy == "tensor_group":
        state["weight_global_scale"] = torch.tensor([37.0])
        state["weight_scale"] = (scale * 37).to(torch.float8_e4m3fn).float()
    if not symmetric:
        limit = 2 ** (bits - 1)
        state["weight_zero_point"] = torch.randint(-limit // 2, limit // 2, shape).to(torch.int8)
    compressor = base.BaseCompressor.get_value_from_registry(name.partition(",")[0])
    stored = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    settings = {"format": name.partition(",")[0]}
    # Four bits are dequantised in bfloat16 there.
    tolerance = 2**-7 if expected.dtype == torch.bfloat16 else 1e-6
    values = read_back({f"fc.{leaf}": x for leaf, x in stored.items()})
    check(values, expected, tolerance)
    assert torch.equal(values, unpacked(stored, settings).tensors["weight"])


# quanto, HQQ, torchao.


@pytest.mark.parametrize("kind", ["qint8", "qfloat8", "qint4", "qint2"])
def test_quanto(kind):
    quanto = library("optimum.quanto")
    model = nn.ModuleDict({"fc": nn.Linear(256, 48)})
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    expected = model["fc"].weight.dequantize().detach()
    check(read_back(model.state_dict()), expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq(bits, axis):
    hqq = library("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    layer = nn.Linear(128, 40)
    layer = hqq.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")
    state = {f"fc.{leaf}": x for leaf, x in layer.state_dict().items()}
    check(read_back(state), layer.dequantize().detach())


@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"]
)
def test_torchao_in_safetensors(config):
    torchao = library("torchao.quantization")
    safetensors = library("torchao.prototype.safetensors.safetensors_support")
    model = nn.ModuleDict({"fc": nn.Linear(128, 64)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao.quantize_(model, getattr(torchao, config)())
    weight = model["fc"].weight
    stored, _ = safetensors.flatten_tensor_state_dict({"fc.weight": weight.data})
    check(read_back(stored), weight.dequantize().detach())


def test_torchao_in_a_state_dict():
    torchao = library("torchao.quantization")
    model = nn.ModuleDict({"fc": nn.Linear(128, 64)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    check(read_back(model.state_dict()), model["fc"].weight.dequantize().detach())


# transformers.


def test_experts_of_gpt_oss():
    mxfp4 = library("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (3, 24, 2, 16), dtype=torch.uint8)
    scales = torch.randint(118, 132, (3, 24, 2), dtype=torch.uint8)
    found = unpacked({"gate_up_proj_blocks": blocks, "gate_up_proj_scales": scales})
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    if expected.shape != (3, 24, 64):
        expected = expected.transpose(1, 2)
    torch.testing.assert_close(found.tensors["gate_up_proj"], expected)
