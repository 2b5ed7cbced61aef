"""Quantised weights in state dicts: each format is packed here by hand and read back."""

import json
import math
import random

import pytest
import torch

from lightning_hsu._neurons import codes
from lightning_hsu._neurons.packed import quantization_settings, split_packed, unpacked
from lightning_hsu._neurons.state_dict import neurons_of_state_dict
from lightning_hsu.report import report

OUT, IN, GROUP = 64, 96, 32
GROUPS = IN // GROUP
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
NOT_IN_A_REPORT = (  # what only settings tell, or no name of a weight
    *("gptq_v2", "fp8, stated blocks", "mlx 3", "mlx 4", "mlx 6"),
    *("fp8, scales of experts", "int8, zero points"),
)
ALWAYS_SMALL = ("quant_state", "_shape", "quant_map", "nbits", "shape", "axis", "packing", "format")


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low, high, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator)


def words(rows, bits, width=32):
    """Each row of integers as one long number, the first one lowest, cut into signed words."""
    packed = []
    for row in rows.tolist():
        number = 0
        for i, value in enumerate(row):
            number |= value << (i * bits)
        count = math.ceil(len(row) * bits / width)
        cut = [(number >> (width * i)) & (2**width - 1) for i in range(count)]
        packed.append([word - 2**width if word >= 2 ** (width - 1) else word for word in cut])
    return torch.tensor(packed, dtype=torch.int32)


def pairs(low, high):
    """Bytes with one value in their lower and one in their upper bits."""
    return (low + 16 * high).to(torch.uint8)


def repeated(x, rows, columns):
    """Each entry of a matrix as a block."""
    return torch.kron(x, torch.ones(rows, columns))


# Every format: the tensors of a layer, its weight, and the settings of its model.


def fp8(dtype="float8_e4m3fn", name="weight_scale", scale=None, whole=1.0):
    codes_stored = drawn(OUT, IN).to(getattr(torch, dtype))
    if scale is None:
        scale = torch.tensor(0.37)
        whole = scale
    return {"weight": codes_stored, name: scale}, codes_stored.float() * whole, None


def fp8_rows(shape):
    scale = drawn(OUT).abs() + 0.1
    return fp8(scale=scale.view(shape), whole=scale[:, None])


def fp8_blocks(rows, columns, settings=None):
    stored = drawn(200, 300).to(torch.float8_e4m3fn)
    scale = drawn(math.ceil(200 / rows), math.ceil(300 / columns), seed=1).abs() + 0.1
    whole = repeated(scale, rows, columns)[:200, :300]
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * whole, settings


def fp8_powers():
    stored = drawn(OUT, IN).to(torch.float8_e4m3fn)
    exponents = integers(120, 130, OUT, GROUPS)
    whole = repeated(2.0 ** (exponents.float() - 127), 1, GROUP)
    leaves = {"weight": stored, "weight_scale": exponents.to(torch.uint8)}
    return leaves, stored.float() * whole, None


def fp8_e8m0():
    leaves, whole, settings = fp8_powers()
    leaves["weight_scale"] = leaves["weight_scale"].view(torch.float8_e8m0fnu)
    return leaves, whole, settings


def int8(scale, whole, zero=None, name="weight_scale"):
    stored = integers(-127, 128, OUT, IN)
    leaves = {"weight": stored.to(torch.int8), name: scale}
    values = stored.float()
    if zero is not None:
        leaves["weight_zero_point"] = zero.to(torch.int8)
        values = values - repeated(zero.float(), 1, IN // zero.shape[1])
    return leaves, values * whole, None


def int8_groups():
    scale = drawn(OUT, GROUPS).abs() + 0.1
    return int8(scale, repeated(scale, 1, GROUP), integers(-5, 6, OUT, GROUPS))


def gptq(bits, *, version=1, order=False, settings=True, g_idx=True):
    top = 2**bits
    q = integers(0, top, IN, OUT)
    zeros = integers(1, top, GROUPS, OUT, seed=1)
    scales = drawn(GROUPS, OUT, seed=2).abs() + 0.1
    group = torch.arange(IN) // GROUP
    if order:
        group = group[torch.randperm(IN, generator=torch.Generator().manual_seed(3))]
    weight = scales[group] * (q - zeros[group])
    leaves = {
        "qweight": words(q.T, bits).T.contiguous(),
        "qzeros": words(zeros - int(version == 1), bits),
        "scales": scales,
        "bias": torch.zeros(OUT),
    }
    if bits == 3:
        leaves["qweight"] = three_bits_as_in_auto_gptq(q)
    if g_idx:
        leaves["g_idx"] = group.to(torch.int32)
    said = None
    if settings:
        said = {"bits": bits, "group_size": GROUP, "quant_method": "gptq"}
        said["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    return leaves, weight.T, said


def three_bits_as_in_auto_gptq(q):
    """32 values of three bits in three words: ten, two bits, one, ten, one bit, two, ten."""
    rows = []
    for start in range(0, len(q), 32):
        v = q[start : start + 32].long()
        first = sum(v[i] << (3 * i) for i in range(10)) | (v[10] & 3) << 30
        second = v[10] >> 2 | sum(v[11 + i] << (3 * i + 1) for i in range(10)) | (v[21] & 1) << 31
        third = v[21] >> 1 | sum(v[22 + i] << (3 * i + 2) for i in range(10))
        rows += [first, second, third]
    packed = torch.stack(rows) & 0xFFFFFFFF
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def symmetric_gptq(version):
    """Without settings the zero points tell the version of the format."""
    q = integers(0, 16, IN, OUT)
    scales = drawn(GROUPS, OUT, seed=2).abs() + 0.1
    zeros = torch.full((GROUPS, OUT), 8 - int(version == 1))
    leaves = {"qweight": words(q.T, 4).T, "qzeros": words(zeros, 4), "scales": scales}
    return leaves, (scales.repeat_interleave(GROUP, 0) * (q - 8)).T, None


def awq():
    q = integers(0, 16, IN, OUT)
    zeros = integers(0, 16, GROUPS, OUT, seed=1)
    scales = drawn(GROUPS, OUT, seed=2).abs() + 0.1
    weight = scales.repeat_interleave(GROUP, 0) * (q - zeros.repeat_interleave(GROUP, 0))
    leaves = {"qweight": awq_words(q), "qzeros": awq_words(zeros), "scales": scales}
    return leaves, weight.T, {"quant_method": "awq", "bits": 4, "version": "gemm"}


def awq_words(q):
    packed = torch.zeros(len(q), OUT // 8, dtype=torch.int64)
    for column in range(OUT // 8):
        for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            packed[:, column] |= q[:, 8 * column + place] << (4 * i)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def bnb4(kind="nf4", nested=False, storage=torch.uint8):
    rows, columns, block = 64, 72, 64
    table = drawn(16).sort().values
    q = integers(0, 16, rows * columns)
    blocks = rows * columns // block
    largest = drawn(blocks, seed=1).abs() + 0.1
    said = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": [rows, columns]}
    leaves = {"weight.absmax": largest, "weight.quant_map": table}
    if nested:
        above = drawn(256, seed=2).sort().values
        numbers = integers(0, 256, blocks, seed=3)
        leaves |= {
            "weight.absmax": numbers.to(torch.uint8),
            "weight.nested_absmax": torch.tensor([0.25, 0.5]),
            "weight.nested_quant_map": above,
        }
        said |= {"nested_blocksize": 40, "nested_dtype": "float32", "nested_offset": 3.5}
        factor = torch.where(torch.arange(blocks) < 40, 0.25, 0.5)
        largest = above[numbers] * factor + 3.5
    packed = pairs(q[1::2], q[0::2])[:, None].contiguous()
    leaves["weight"] = packed.view(-1).view(storage).view(-1, 1)
    state = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    leaves[f"weight.quant_state.bitsandbytes__{kind}"] = state
    return leaves, (table[q].view(blocks, block) * largest[:, None]).view(rows, columns), None


def bnb8():
    stored = integers(-127, 128, OUT, IN)
    largest = drawn(OUT).abs() + 0.1
    leaves = {"weight": stored.to(torch.int8), "SCB": largest}
    leaves["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return leaves, stored * largest[:, None] / 127, None


def packed_integers(bits, *, zeros=False, order=False, group=GROUP, settings=None):
    half = 2 ** (bits - 1)
    q = integers(-half, half, OUT, IN)
    groups = IN // group
    scale = drawn(OUT, groups, seed=1).abs() + 0.1
    which = torch.arange(IN) // group
    leaves = {
        "weight_packed": words(q + half, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([OUT, IN]),
    }
    if order:
        which = which[torch.randperm(IN, generator=torch.Generator().manual_seed(3))]
        leaves["weight_g_idx"] = which.to(torch.int32)
    if zeros:
        zero = integers(-half, half, OUT, groups, seed=2)
        leaves["weight_zero_point"] = words((zero + half).T, bits).T.contiguous()
        q = q - zero[:, which]
    return leaves, q * scale[:, which], settings


def nvfp4(divides):
    numbers = integers(0, 16, OUT, IN)
    table = torch.tensor(E2M1 + [-value for value in E2M1])
    scale = (drawn(OUT, IN // 16).abs() + 0.5).to(torch.float8_e4m3fn)
    packed = pairs(numbers[:, 0::2], numbers[:, 1::2])
    weight = table[numbers] * repeated(scale.float(), 1, 16)
    if divides:
        leaves = {"weight_packed": packed, "weight_global_scale": torch.tensor([40.0])}
        return leaves | {"weight_scale": scale}, weight / 40, {"format": "nvfp4-pack-quantized"}
    leaves = {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(0.02)}
    return leaves | {"input_scale": torch.tensor(3.0)}, weight * 0.02, {"quant_method": "modelopt"}


def mxfp4(name):
    numbers = integers(0, 16, OUT, IN)
    table = torch.tensor(E2M1 + [-value for value in E2M1])
    exponents = integers(120, 130, OUT, GROUPS)
    weight = table[numbers] * repeated(2.0 ** (exponents.float() - 127), 1, 32)
    leaves = {name: pairs(numbers[:, 0::2], numbers[:, 1::2])}
    return leaves | {"weight_scale": exponents.to(torch.uint8)}, weight, None


def fp4_of_torch():
    leaves, _, _ = mxfp4("weight")
    leaves["weight"] = leaves["weight"].view(torch.float4_e2m1fn_x2)
    leaves["weight_scale"] = torch.full((OUT, 1), 0.5)
    numbers = integers(0, 16, OUT, IN)
    table = torch.tensor(E2M1 + [-value for value in E2M1])
    return leaves, table[numbers] * 0.5, None


def hqq(bits, axis=1):
    plane = {1: 8, 2: 4, 3: 10, 4: 2, 8: 1}[bits]
    groups = OUT * IN // GROUP
    shape = (groups, GROUP) if axis == 1 else (GROUP, groups)
    q = integers(0, 2**bits, *shape)
    scale = drawn(*(groups, 1) if axis == 1 else (1, groups), seed=1).abs() + 0.1
    zero = drawn(*scale.shape, seed=2)
    rows = math.ceil(len(q) / plane)
    padded = torch.zeros(rows * plane, shape[1], dtype=torch.int64)
    padded[: len(q)] = q
    stored = torch.zeros(rows, shape[1], dtype=torch.int64)
    for i in range(plane):
        stored = (stored << bits) | padded[i * rows : (i + 1) * rows]
    leaves = {
        "W_q": stored.to(torch.int32 if bits == 3 else torch.uint8),
        "scale": scale,
        "zero": zero,
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "shape": torch.tensor([OUT, IN]),
        "axis": torch.tensor(axis, dtype=torch.int32),
    }
    return leaves, ((q - zero) * scale).reshape(OUT, IN), None


def quanto(bits, shift_is_float):
    groups = OUT * GROUPS
    q = integers(0, 2**bits, groups, GROUP)
    scale = drawn(groups, 1, seed=1).abs() + 0.1
    shift = integers(0, 2**bits, groups, 1, seed=2)
    weight = (q - shift) * scale
    if shift_is_float:
        shift = drawn(groups, 1, seed=2)
        weight = q * scale - shift
    rows = groups * bits // 8
    stored = torch.zeros(rows, GROUP, dtype=torch.int64)
    for i in range(8 // bits):
        stored |= q[i * rows : (i + 1) * rows] << (bits * i)
    leaves = {"weight._data._data": stored.to(torch.uint8), "weight._scale": scale}
    leaves |= {"weight._shift": shift, "bias": torch.zeros(OUT)}
    return leaves, weight.view(OUT, IN), None


def quanto_bytes():
    leaves, weight, _ = int8(torch.full((OUT, 1), 0.5), 0.5)
    return {"weight._data": leaves["weight"], "weight._scale": leaves["weight_scale"]}, weight, None


def fp8_named(leaf, scale_name):
    leaves, weight, _ = fp8(scale=torch.tensor(0.5), whole=0.5)
    return {leaf: leaves["weight"], scale_name: leaves["weight_scale"]}, weight, None


def int8_named(leaf, scale_name, zero_name):
    leaves, weight, _ = int8_groups()
    named = {leaf: leaves["weight"], scale_name: leaves["weight_scale"]}
    return named | {zero_name: leaves["weight_zero_point"]}, weight, None


def mlx(bits):
    q = integers(0, 2**bits, OUT, IN)
    scales, shifts = drawn(OUT, GROUPS, seed=1), drawn(OUT, GROUPS, seed=2)
    weight = q * repeated(scales, 1, GROUP) + repeated(shifts, 1, GROUP)
    leaves = {"weight": words(q, bits).view(torch.uint32), "scales": scales, "biases": shifts}
    return leaves, weight, {"bits": bits, "group_size": GROUP}


def torchao(prefix, ending, scale_name):
    leaves, weight, _ = int8_groups()
    named = {f"{prefix}{ending}": leaves["weight"], scale_name: leaves["weight_scale"]}
    named[scale_name.replace("scale", "zero_point")] = leaves["weight_zero_point"]
    return named, weight, None


FORMATS = {
    **{f"{dtype}, one scale": (fp8, dtype) for dtype in FP8},
    "fp8, (1,)": (fp8, "float8_e4m3fn", "weight_scale", torch.tensor([0.5]), 0.5),
    "fp8, (1, 1)": (fp8, "float8_e4m3fn", "scale", torch.tensor([[0.5]]), 0.5),
    "fp8, rows (out,)": (fp8_rows, (OUT,)),
    "fp8, rows (out, 1)": (fp8_rows, (OUT, 1)),
    "fp8, blocks of DeepSeek": (fp8_blocks, 128, 128),
    "fp8, stated blocks": (fp8_blocks, 64, 96, {"weight_block_size": [64, 96]}),
    "fp8, blocks of compressed-tensors": (
        fp8_blocks,
        100,
        150,
        {"config_groups": {"group_0": {"weights": {"block_structure": [100, 150]}}}},
    ),
    "mxfp8": (fp8_powers,),
    "fp8, scales of e8m0": (fp8_e8m0,),
    "int8, rows": (int8, torch.full((OUT, 1), 0.3), 0.3),
    "int8, one": (int8, torch.tensor(0.3), 0.3),
    "int8, groups and zero points": (int8_groups,),
    "gptq 2": (gptq, 2),
    "gptq 3": (gptq, 3),
    "gptq 4": (gptq, 4),
    "gptq 8": (gptq, 8),
    "gptq_v2": (lambda: gptq(4, version=2),),
    "gptq, desc_act": (lambda: gptq(4, order=True),),
    "gptq, bare": (lambda: gptq(4, settings=False),),
    "gptq 3, bare": (lambda: gptq(3, settings=False),),
    "gptq, no g_idx": (lambda: gptq(4, settings=False, g_idx=False),),
    "gptq, symmetric": (symmetric_gptq, 1),
    "gptq_v2, symmetric": (symmetric_gptq, 2),
    "awq": (awq,),
    "nf4": (bnb4,),
    "fp4": (bnb4, "fp4"),
    "nf4, nested": (bnb4, "nf4", True),
    "nf4, stored in bfloat16": (bnb4, "nf4", False, torch.bfloat16),
    "int8 of bitsandbytes": (bnb8,),
    **{f"packed {bits}": (packed_integers, bits) for bits in range(1, 9)},
    "packed, zero points": (lambda: packed_integers(4, zeros=True),),
    "packed 3, zero points": (lambda: packed_integers(3, zeros=True),),
    "packed, rows": (lambda: packed_integers(4, group=IN),),
    "packed, order": (lambda: packed_integers(4, order=True, zeros=True),),
    "nvfp4 of compressed-tensors": (nvfp4, True),
    "nvfp4 of modelopt": (nvfp4, False),
    "mxfp4 of compressed-tensors": (mxfp4, "weight_packed"),
    "mxfp4": (mxfp4, "weight"),
    "fp4 of torch": (fp4_of_torch,),
    **{f"hqq {bits}": (hqq, bits) for bits in (1, 2, 3, 4, 8)},
    "hqq, columns": (hqq, 4, 0),
    "quanto 4": (quanto, 4, True),
    "quanto 2": (quanto, 2, True),
    "quanto, integer shifts": (quanto, 4, False),
    "quanto 8": (quanto_bytes,),
    "fp8, scales of experts": (fp8_named, "w1", "w1_scales"),
    "int8, zero points": (int8_named, "w1", "w1_scales", "w1_zero_points"),
    **{f"mlx {bits}": (mlx, bits) for bits in (3, 4, 6)},
    "fp8 of ComfyUI": (fp8, "float8_e4m3fn", "scale_weight", torch.tensor(0.5), 0.5),
    "torchao": (torchao, "_weight", "_qdata", "_weight_scale"),
    "torchao, colons": (torchao, "weight", ":qdata", "weight:scale"),
}


def made(name):
    """The leaves, weight and settings of a format, if this torch has its data types."""
    make, *arguments = FORMATS[name]
    needed = {"fp8, scales of e8m0": "float8_e8m0fnu", "fp4 of torch": "float4_e2m1fn_x2"}
    if name in needed and not hasattr(torch, needed[name]):
        pytest.skip(f"needs a torch that has {needed[name]}")
    return make(*arguments)


def smallest_angle(weight):
    rows = torch.nn.functional.normalize(weight.double(), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-1.0)
    return math.degrees(math.acos(cosines.max()))


@pytest.mark.parametrize("name", FORMATS)
def test_values(name):
    leaves, weight, settings = made(name)
    found = unpacked(leaves, settings)
    assert not found.reasons
    (read,) = set(found.tensors) - {"bias"}
    assert read in ("weight", "w1")
    torch.testing.assert_close(found.tensors[read], weight.float(), rtol=1e-6, atol=1e-6)
    assert found.note.startswith("dequantised from ")


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in NOT_IN_A_REPORT])
def test_a_report_measures_the_weight_and_nothing_else(name):
    leaves, weight, _ = made(name)
    state = {f"model.q_proj.{leaf}": x for leaf, x in leaves.items()}
    (layer,) = (found := report(state)).layers
    assert layer.uniformity.name == "model.q_proj"
    assert (layer.uniformity.neurons, layer.uniformity.dimension) == tuple(weight.shape)
    assert layer.uniformity.min_angle == pytest.approx(smallest_angle(weight), abs=1e-2)
    assert not found.skips
    assert [name for name, _ in found.notes] == ["model.q_proj", "head"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("everything", [True, False])
def test_shapes_on_meta(name, everything):
    leaves, weight, settings = made(name)
    most = max(x.nbytes for x in leaves.values())
    shapes = {}
    for leaf, x in leaves.items():
        is_small = any(part in leaf for part in ALWAYS_SMALL) or (
            not everything and x.nbytes < most
        )
        shapes[leaf] = x if is_small else x.to("meta")
    found = unpacked(shapes, settings)
    assert not found.reasons
    (read,) = [x for leaf, x in found.tensors.items() if leaf != "bias"]
    assert read.shape == weight.shape
    assert read.is_meta


def test_integers_of_any_bits():
    for bits in range(1, 9):
        for count in (1, 7, 32, 33):
            values = integers(0, 2**bits, 3, count, seed=bits)
            found = codes.integers(words(values, bits), bits)[:, :count]
            assert torch.equal(found.long(), values)
    assert codes.integers(torch.tensor([-1], dtype=torch.int64), 4).tolist() == [15] * 16


# Experts.


def test_experts_of_gpt_oss():
    numbers = integers(0, 16, 3, 8, 2, 32)
    table = torch.tensor(E2M1 + [-value for value in E2M1])
    exponents = integers(120, 130, 3, 8, 2)
    leaves = {
        "gate_up_proj_blocks": pairs(numbers[..., 0::2], numbers[..., 1::2]),
        "gate_up_proj_scales": exponents.to(torch.uint8),
        "gate_up_proj_bias": torch.zeros(3, 8),
    }
    found = unpacked(leaves)
    whole = table[numbers] * 2.0 ** (exponents[..., None].float() - 127)
    torch.testing.assert_close(found.tensors["gate_up_proj"], whole.flatten(2))
    assert set(found.tensors) == {"gate_up_proj", "gate_up_proj_bias"}
    assert found.by_rows == {"gate_up_proj"}
    assert found.note == "dequantised from MXFP4, groups of 32"


@pytest.mark.parametrize("shape", [(), (3,), (3, 1, 1), (3, 256), (3, 256, 1), (3, 2, 3)])
def test_experts_in_fp8(shape):
    stored = drawn(3, 256, 300).to(torch.float8_e4m3fn)
    scale = drawn(*shape, seed=1).abs() + 0.1
    whole = scale
    if len(shape) in (1, 2):
        whole = scale.view(*shape, *[1] * (3 - len(shape)))
    if shape == (3, 2, 3):
        whole = torch.stack([repeated(one, 128, 128)[:256, :300] for one in scale])
    leaves = {"down_proj": stored, "down_proj_scale_inv": scale, "gate": drawn(3, 300)}
    found = unpacked(leaves)
    assert set(found.tensors) == {"down_proj", "gate"}
    torch.testing.assert_close(found.tensors["down_proj"], stored.float() * whole)
    assert not found.by_rows


def test_two_weights_of_a_layer_have_their_own_scales():
    one, two = drawn(8, 16).to(torch.float8_e4m3fn), drawn(4, 8).to(torch.float8_e4m3fn)
    leaves = {"up": one, "down": two, "up_scale": torch.tensor(2.0), "down_scale": torch.ones(4)}
    found = unpacked(leaves)
    torch.testing.assert_close(found.tensors["up"], one.float() * 2)
    torch.testing.assert_close(found.tensors["down"], two.float())
    assert found.note.count("dequantised") == 2


# What is not quantised.


def test_what_has_nothing_to_do_with_quantisation_stays():
    leaves = {
        "weight": drawn(4, 8),
        "bias": drawn(4),
        "scale": drawn(4, 1),
        "scales": drawn(4, 4),
        "weight_scale": drawn(3, 5),
        "zeros": drawn(4, 4),
        "k_scale": drawn(2, 2),
        "relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
        "parametrizations.weight.original0": drawn(4, 1),
        "sparse": drawn(4, 4).to_sparse(),
    }
    found = unpacked(leaves)
    assert list(found.tensors) == list(leaves)
    assert all(found.tensors[leaf] is x for leaf, x in leaves.items())
    assert not found.reasons
    assert not found.parts
    assert not found.note


@pytest.mark.parametrize("name", ["scale", "scales", "x.scale"])
def test_layers_that_are_called_like_scales(name):
    state = {f"{name}.weight": drawn(6, 8), "fc.weight": drawn(6, 8), "ls.scale": drawn(8)}
    assert {layer.uniformity.name for layer in report(state).layers} == {name, "fc"}


def test_few_bits_without_a_scale_are_read_as_they_are():
    stored = drawn(6, 8).to(torch.float8_e5m2)
    found = report({"fc.weight": stored, "fc.input_scale": torch.tensor(2.0)})
    assert found.layers[0].uniformity.min_angle == pytest.approx(
        smallest_angle(stored.float()), abs=0.01
    )
    assert "as it is stored, in float8_e5m2, without a scale" in str(found)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="needs a torch that has FP4")
def test_fp4_without_a_scale():
    stored = integers(0, 256, 6, 8).to(torch.uint8).view(torch.float4_e2m1fn_x2)
    (layer,) = report({"fc.weight": stored}).layers
    assert (layer.uniformity.neurons, layer.uniformity.dimension) == (6, 16)


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="needs a torch that has e8m0")
def test_weights_of_odd_types_do_not_stop_the_others():
    state = {"fc.weight": drawn(6, 8)}
    for name in dir(torch):
        kind = getattr(torch, name)
        if isinstance(kind, torch.dtype) and kind.itemsize == 1 and not name.startswith("q"):
            state[f"of_{name}.weight"] = integers(0, 60, 6, 8).to(torch.uint8).view(kind)
    found = report(state)
    assert "fc" in [layer.uniformity.name for layer in found.layers]
    assert len(found.layers) + len(found.skips) == len(state)


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")  # deprecated
def test_quantised_tensors_of_torch():
    scales = torch.full((6,), 0.02)
    stored = torch.quantize_per_channel(drawn(6, 8), scales, torch.zeros(6), 0, torch.qint8)
    found = unpacked({"weight": stored, "scale": torch.tensor(1.0)})
    torch.testing.assert_close(found.tensors["weight"], stored.dequantize())
    assert found.note == "dequantised from torch.qint8"


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")  # deprecated
@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")  # as torch itself reads it
@pytest.mark.parametrize("bias", [None, torch.zeros(6)])
def test_quantised_linears_of_torch(tmp_path, bias):
    stored = torch.quantize_per_tensor(drawn(6, 8), 0.02, 0, torch.qint8)
    state = {
        "fc.scale": torch.tensor(1.0),
        "fc.zero_point": torch.tensor(0),
        "fc._packed_params.dtype": torch.qint8,
        "fc._packed_params._packed_params": (stored, bias),
        "head.weight": drawn(4, 6),
    }
    torch.save(state, tmp_path / "net.pt")
    alone = {name: x for name, x in state.items() if name.startswith("fc")}  # no plain matrix
    torch.save(alone, tmp_path / "alone.pt")
    for source in (state, tmp_path / "net.pt", alone, tmp_path / "alone.pt"):
        found = report(source)
        assert found.layers[0].uniformity.name == "fc"
        angle = found.layers[0].uniformity.min_angle
        assert angle == pytest.approx(smallest_angle(stored.dequantize()), abs=0.01)
        assert ("fc", "dequantised from torch.qint8") in found.notes


# What cannot be read, and why.


def without(leaves, *names):
    return {leaf: x for leaf, x in leaves.items() if leaf not in names}


def changed(leaves, **others):
    return leaves | others


UNREADABLE = {
    "gptq without scales": (lambda: without(gptq(4)[0], "scales"), "qweight", "scales are not kn"),
    "gptq without zero points": (lambda: without(gptq(4)[0], "qzeros"), "qweight", "qzeros"),
    "gptq with odd groups": (
        lambda: changed(gptq(4)[0], g_idx=torch.full((IN,), 7, dtype=torch.int32)),
        "qweight",
        "out of range",
    ),
    "awq, gemv": (
        lambda: {
            "qweight": torch.zeros(OUT, IN // 8, dtype=torch.int32),
            "qzeros": torch.zeros(OUT, 8, dtype=torch.int32),
            "scales": torch.ones(OUT, 64),
        },
        "qweight",
        "AWQ's for gemv",
    ),
    "nf4 without its maxima": (lambda: without(bnb4()[0], "weight.absmax"), "weight", "absmax"),
    "nf4 without the maxima of its maxima": (
        lambda: without(bnb4(nested=True)[0], "weight.nested_absmax"),
        "weight",
        "maxima of its maxima",
    ),
    "nf4 without its state": (
        lambda: without(bnb4()[0], "weight.quant_state.bitsandbytes__nf4"),
        "weight",
        "scales are not known",
    ),
    "int8 of a GPU": (
        lambda: changed(bnb8()[0], weight_format=torch.tensor(2, dtype=torch.uint8)),
        "weight",
        "rearranged for the GPU",
    ),
    "packed without a shape": (
        lambda: without(packed_integers(4)[0], "weight_shape"),
        "weight_packed",
        "weight_shape is not stored",
    ),
    "packed without scales": (
        lambda: without(packed_integers(4)[0], "weight_scale"),
        "weight_packed",
        "scales are not known",
    ),
    "nvfp4 without its second scale": (
        lambda: without(nvfp4(False)[0], "weight_scale_2"),
        "weight",
        "scale of its scales",
    ),
    "bytes with another scale": (
        lambda: {"weight": torch.zeros(8, 16, dtype=torch.uint8), "weight_scale": torch.ones(8)},
        "weight",
        "no known format",
    ),
    "scales that do not fit": (
        lambda: fp8(scale=torch.ones(3))[0],
        "weight",
        "scales of shape (3,) beside a weight (64, 96)",
    ),
    "blocks of an unknown size": (
        lambda: {
            "weight": drawn(50, 70).to(torch.float8_e4m3fn),
            "weight_scale_inv": torch.ones(7, 9),
        },
        "weight",
        "size of its blocks",
    ),
    "scales of another name": (
        lambda: fp8(name="steps_of_scale")[0],
        "weight",
        "unknown name (steps_of_scale)",
    ),
    "zero points that do not fit": (
        lambda: changed(int8_groups()[0], weight_zero_point=torch.ones(OUT, 2, dtype=torch.int8)),
        "weight",
        "zero points have another shape",
    ),
    "bytes of which each may be two codes": (
        lambda: int8(torch.full((OUT, 6), 120, dtype=torch.uint8), 1.0)[0],
        "weight",
        "may be pairs of codes",
    ),
    "eetq": (
        lambda: {
            "weight": torch.zeros(IN, OUT, dtype=torch.int8),
            "weight_scales": torch.ones(OUT),
        },
        "weight",
        "EETQ",
    ),
    "hqq without settings": (lambda: without(hqq(4)[0], "nbits"), "W_q", "nbits"),
    "hqq with quantised zeros": (
        lambda: changed(hqq(4)[0], zero=torch.zeros(4, 4, dtype=torch.uint8)),
        "W_q",
        "zeros are quantised",
    ),
    "quanto without a bias": (
        lambda: without(quanto(4, True)[0], "bias"),
        "weight._data._data",
        "shape is not stored",
    ),
    "sparse": (
        lambda: {
            "weight.compressed": drawn(8, 4),
            "weight.bitmask": torch.zeros(8, 1, dtype=torch.uint8),
            "weight.row_offsets": torch.zeros(8, 1, dtype=torch.int64),
        },
        "weight.compressed",
        "mask of their places",
    ),
    "aqlm": (
        lambda: {
            "codes": torch.zeros(8, 4, 1, dtype=torch.int8),
            "codebooks": drawn(1, 256, 1, 8),
            "scales": drawn(8, 1, 1, 1),
        },
        "codes",
        "AQLM",
    ),
    "exl2": (
        lambda: {
            "q_weight": torch.zeros(8, 4, dtype=torch.int32),
            "q_groups": torch.zeros(8, dtype=torch.int16),
            "q_scale": torch.zeros(2, 1, dtype=torch.int32),
        },
        "q_weight",
        "EXL2",
    ),
    "an unknown packed weight": (
        lambda: {"down_proj_packed": torch.zeros(8, 4, dtype=torch.int32)},
        "down_proj_packed",
        "packed or integer weights (torch.int32) whose scales are not known",
    ),
    "mlx without settings": (lambda: mlx(4)[0], "weight", "config.json"),
    "scales alone": (
        lambda: {"weight_scale_inv": torch.ones(4, 4)},
        "weight_scale_inv",
        "which are not stored beside them",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_told(name):
    make, leaf, words_of_reason = UNREADABLE[name]
    leaves = make()
    found = unpacked(leaves)
    assert list(found.reasons) == [leaf]
    assert words_of_reason in found.reasons[leaf]
    assert set(found.tensors) <= {"bias"}
    assert not found.note
    state = {f"a.{leaf}": x for leaf, x in leaves.items()} | {"fc.weight": drawn(6, 8)}
    reported = report(state)
    assert [layer.uniformity.name for layer in reported.layers] == ["fc"]
    assert [skip.name for skip in reported.skips] == [f"a.{leaf}"]
    assert words_of_reason in reported.skips[0].reason


def test_codes_of_fewer_bits_than_their_type_are_not_taken_for_whole_ones():
    leaves = int8(torch.tensor(0.3), 0.3)[0]
    settings = {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
    assert "may be packed" in unpacked(leaves, settings).reasons["weight"]
    assert "Marlin" in unpacked(gptq(4)[0], {"checkpoint_format": "marlin"}).reasons["qweight"]


def test_the_version_of_asymmetric_zero_points_is_told_where_it_is_assumed():
    assert "first version of the format" in unpacked(gptq(4)[0]).note
    assert "version" not in unpacked(gptq(4)[0], {"quant_method": "gptq"}).note


def test_symmetric_codes_without_zero_points():
    leaves, weight, _ = symmetric_gptq(2)
    found = unpacked(without(leaves, "qzeros"), {"bits": 4, "sym": True})
    torch.testing.assert_close(found.tensors["weight"], weight)


@pytest.mark.parametrize(
    ("name", "layer", "leaf"),
    [
        ("a.fc.weight.absmax", "a.fc", "weight.absmax"),
        ("weight.nested_quant_map", "", "weight.nested_quant_map"),
        ("a.weight.quant_state.bitsandbytes__fp4", "a", "weight.quant_state.bitsandbytes__fp4"),
        ("a.weight._data", "a", "weight._data"),
        ("a.weight._data._data", "a", "weight._data._data"),
        ("a.weight._shift", "a", "weight._shift"),
        ("a.weight.bitmask", "a", "weight.bitmask"),
    ],
)
def test_names_with_dots(name, layer, leaf):
    assert split_packed(name) == (layer, leaf)


@pytest.mark.parametrize(
    "name", ["a.weight", "a.weights.shape", "a._scale", "absmax", "a.x.weight"]
)
def test_other_names(name):
    assert split_packed(name) is None


# A whole state dict.


@pytest.mark.parametrize("name", ["gptq_v2", "mlx 4", "fp8, stated blocks"])
def test_settings_of_the_model_that_are_stored_beside_it(name):
    leaves, weight, settings = made(name)
    state = {f"a.{leaf}": x for leaf, x in leaves.items()}
    found = neurons_of_state_dict(state, config={"quantization_config": settings})
    (one,) = found.sets
    torch.testing.assert_close(one.neurons()[0], weight.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gptq 4", "nf4, nested", "packed 3, zero points", "mxfp4", "awq"])
def test_numbers_that_stay_in_the_file_until_they_are_needed(name):
    leaves, weight, settings = made(name)
    state = {f"a.{leaf}": x for leaf, x in leaves.items()}
    most = max(x.nbytes for x in leaves.values())
    stand_ins = {name: x.to("meta") if x.nbytes == most else x for name, x in state.items()}
    config = {"quantization_config": settings or {}}
    read = []

    def load(name):
        read.append(name)
        return state[name]

    (one,) = neurons_of_state_dict(stand_ins, load=load, config=config).sets
    assert one.shape == (1, *weight.shape)
    assert one.note.startswith("dequantised from")
    assert not read
    torch.testing.assert_close(one.neurons()[0], weight.float(), rtol=1e-6, atol=1e-6)
    assert len(read) == 1


@pytest.mark.parametrize("name", ["pre_quant_scale", "input_quantizer._pre_quant_scale"])
@pytest.mark.parametrize("is_quantised", [True, False])
def test_factors_of_inputs_that_are_left_out_are_told(name, is_quantised):
    """AWQ of ModelOpt divides inputs by what it multiplies the weight with."""
    weight = drawn(OUT, IN)
    state = {"fc.weight": weight, f"fc.{name}": drawn(IN).abs()}
    if is_quantised:
        state["fc.weight"] = weight.to(torch.float8_e4m3fn)
        state["fc.weight_scale"] = torch.tensor(0.5)
    (one,) = neurons_of_state_dict(state).sets
    assert f"read without the factors of its inputs ({name})" in one.note
    del state[f"fc.{name}"]
    (one,) = neurons_of_state_dict(state).sets
    assert "factors" not in one.note


def test_scales_beside_a_weight_that_is_not_quantised_are_no_layer():
    state = {"a.weight": drawn(6, 8), "a.weight_scale": drawn(6, 1)}
    found = report(state, head=None)
    assert [layer.uniformity.name for layer in found.layers] == ["a"]
    assert found.skips[0].reason == "scales of a weight that is not stored quantised"
    assert not found.notes


@pytest.mark.parametrize("config", [None, {}, {"text_config": None}, {"quantization_config": 3}])
def test_models_without_settings(config):
    assert quantization_settings(config) is None


# The lengths of blocks.


@pytest.mark.parametrize(
    ("shape", "counts", "stated", "lengths"),
    [
        ((200, 300), (2, 3), None, (128, 128)),  # although 100 divides both
        ((64, 200), (1, 2), None, (64, 128)),
        ((200, 64), (2, 1), None, (128, 64)),
        ((64, 200), (64, 2), None, (1, 100)),  # groups of a row are of one length
        ((512, 512), (4, 4), None, (128, 128)),
        ((64, 64), (4, 4), None, (16, 16)),
        ((100, 70), (4, 3), None, (32, 32)),
        ((100, 70), (4, 3), (30, 25), (30, 25)),
        ((200, 300), (2, 3), (64, 64), (128, 128)),  # stated, and wrong
        ((8, 200, 300), (8, 2, 3), (100, 100), (1, 100, 100)),
    ],
)
def test_lengths_of_blocks(shape, counts, stated, lengths):
    assert codes.block_lengths(shape, counts, stated) == lengths


@pytest.mark.parametrize(
    ("shape", "counts"), [((50, 70), (7, 9)), ((8, 8), (2,)), ((5, 7), (2, 3))]
)
def test_lengths_of_blocks_that_are_not_clear(shape, counts):
    with pytest.raises(ValueError, match="scales of shape"):
        codes.block_lengths(shape, counts)


def test_notes_that_are_the_same_are_told_once():
    state = {}
    for i in range(12):
        state[f"{i}.weight"] = drawn(6, 8, seed=i).to(torch.float8_e4m3fn)
        state[f"{i}.weight_scale"] = torch.tensor(2.0)
    found = report(state, head=None)
    assert len(found.notes) == 12
    assert "note: {0..11} (12): dequantised from float8_e4m3fn, one scale" in str(found)
    assert str(found).count("note:") == 1


NAMES = sorted(
    {"weight", "bias", "scale", "scales", "zero", "zeros", "shape", "SCB", "W_q", "weight_scale"}
    | {"qweight", "qzeros", "g_idx", "weight_packed", "weight_shape", "weight_zero_point", "nbits"}
    | {"weight_scale_2", "weight_scale_inv", "weight_global_scale", "weight._data", "weight._scale"}
    | {"weight._data._data", "weight._shift", "weight.absmax", "weight.quant_map", "biases"}
    | {"weight.quant_state.bitsandbytes__nf4", "up_blocks", "up_scales", "_weight_qdata", "codes"}
    | {"_weight_scale", "_weight_zero_point", "weight_g_idx", "weight_v", "weight_g", "W_dec"}
)
KINDS = [torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn]


@pytest.mark.parametrize("seed", range(20))
def test_no_mixture_of_names_types_and_shapes_is_an_error(seed):
    draw = random.Random(seed)
    for _ in range(40):
        leaves = {}
        for name in draw.sample(NAMES, draw.randint(1, 7)):
            shape = [draw.choice([0, 1, 2, 4, 8, 16]) for _ in range(draw.randint(0, 4))]
            stored = integers(0, 100, *shape, seed=draw.randint(0, 9))
            leaves[name] = stored.to(draw.choice(KINDS))
        found = unpacked(leaves)
        for leaf, x in found.tensors.items():
            assert leaf in leaves or x.dtype == torch.float32
        kept = {leaf for leaf, x in found.tensors.items() if leaves.get(leaf) is x}
        assert not kept & set(found.reasons)
        assert not kept & found.parts


def test_codes_of_few_outputs_that_fill_no_words_of_three_bits():
    leaves = {
        "qweight": torch.zeros(4, 16, dtype=torch.int32),
        "qzeros": torch.zeros(1, 2, dtype=torch.int32),
        "scales": torch.ones(1, 16),
    }
    found = unpacked(leaves)
    assert found.tensors["weight"].shape == (16, 32)
    assert "GPTQ, 4 bits" in found.note
