"""Groups of convolutions in a file, as the widths of the layers around them show."""

import pytest
import torch
from torch import nn

from lightning_hsu._neurons.select import select
from lightning_hsu._neurons.state_dict import neurons_of_state_dict
from lightning_hsu.report import report


class Attention(nn.Module):
    """A block of a transformer of one width."""

    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Pooling(nn.Module):
    """As PiT's: a convolution of two filters for each channel, beside a Linear for the token."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, 2, groups=width)
        self.fc = nn.Linear(width, 2 * width)


class Stage(nn.Module):
    def __init__(self, width, pool):
        super().__init__()
        if pool:
            self.pool = Pooling(width // 2)
        self.blocks = nn.Sequential(Attention(width), Attention(width))


def pooled():
    """As PiT."""
    stages = nn.Sequential(Stage(8, pool=False), Stage(16, pool=True), Stage(32, pool=True))
    return nn.ModuleDict({"patch_embed": nn.Conv2d(3, 8, 4, 4), "transformers": stages})


class Inverted(nn.Module):
    """As MobileNet's: wider inside, where the convolution is depthwise."""

    def __init__(self, inputs, outputs, ratio):
        super().__init__()
        middle = ratio * inputs
        self.conv_pw = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv_dw = nn.Conv2d(middle, middle, 3, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv_pwl = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)


def mobile():
    blocks = nn.Sequential(Inverted(8, 12, 4), Inverted(12, 12, 6), Inverted(12, 16, 6))
    stem = nn.Conv2d(3, 8, 3, bias=False)
    return nn.ModuleDict({"conv_stem": stem, "bn": nn.BatchNorm2d(8), "blocks": blocks})


class Widening(nn.Module):
    """As EdgeNeXt's: the first convolution of a stage gives two channels for each."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv_dw = nn.Conv2d(inputs, outputs, 5, groups=inputs)
        self.norm = nn.LayerNorm(outputs)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(outputs, 4 * outputs), "fc2": nn.Linear(4 * outputs, outputs)}
        )


def widening():
    first = nn.ModuleDict({"blocks": nn.Sequential(Widening(8, 8), Widening(8, 8))})
    second = nn.ModuleDict({"blocks": nn.Sequential(Widening(8, 16), Widening(16, 16))})
    return nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)),
            "stages": nn.Sequential(first, second),
        }
    )


class Mamba(nn.Module):
    """Its convolution is depthwise after a projection that is stored later."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.conv1d = nn.Conv1d(16, 16, 4, groups=16)
        self.in_proj = nn.Linear(8, 32, bias=False)
        self.out_proj = nn.Linear(16, 8, bias=False)


class Fused(nn.Module):
    """As EfficientViT's for processors: wide kernels in groups."""

    def __init__(self, groups, inputs=32):
        super().__init__()
        self.spatial_conv = nn.Conv2d(inputs, 128, 3, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(128)
        self.point_conv = nn.Conv2d(128, 32, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)


def fused(groups):
    """Each kernel of the second block takes as many channels as the stem gives."""
    blocks = nn.Sequential(Fused(1, inputs=16), Fused(groups), Fused(groups))
    stem = nn.Conv2d(3, 16, 3, bias=False)
    return nn.ModuleDict({"stem": stem, "bn": nn.BatchNorm2d(16), "blocks": blocks})


class Squeezed(nn.Module):
    """As SqueezeBERT's: kernels of one place in groups, for Linears."""

    def __init__(self):
        super().__init__()
        self.query, self.output = nn.Conv1d(128, 128, 1, groups=4), nn.Conv1d(128, 128, 1)
        self.norm = nn.LayerNorm(128)
        self.wide = nn.Conv1d(128, 512, 1, groups=4)
        self.narrow = nn.Conv1d(512, 128, 1, groups=4)
        self.norm2 = nn.LayerNorm(128)


def squeezed():
    table = nn.Embedding(20, 128)
    return nn.ModuleDict({"embeddings": table, "layers": nn.Sequential(Squeezed(), Squeezed())})


def side_by_side():
    """As the pyramid of DeepLab: each branch takes what the encoder gives."""
    narrow = nn.Sequential(nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8))
    branches = []
    for _ in range(2):
        depthwise = nn.Conv2d(32, 32, 3, groups=32, bias=False)
        apart = nn.Sequential(depthwise, nn.Conv2d(32, 8, 1, bias=False))
        branches.append(nn.Sequential(apart, nn.BatchNorm2d(8)))
    encoder = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32))
    return nn.ModuleDict({"encoder": encoder, "convs": nn.ModuleList([narrow, *branches])})


ALIKE = {
    "side by side": side_by_side,
    "several filters a channel, before attention": pooled,
    "depthwise after a wider layer": mobile,
    "several filters a channel, at a stage": widening,
    "depthwise after what is stored later": lambda: nn.Sequential(Mamba(), Mamba()),
    "one group": lambda: fused(1),
}


def both(model, by_name=False):
    """The sets of a model and of its state dict, by name."""
    state = model.state_dict()
    if by_name:
        state = {name: state[name] for name in sorted(state)}
    wanted = {one.name: one for one in select(model, everything=True)[0]}
    found = select(neurons_of_state_dict(state), everything=True)[0]
    return wanted, {one.name: one for one in found}


@pytest.mark.parametrize("case", ALIKE)
def test_what_is_around_shows_the_groups(case):
    torch.manual_seed(0)
    wanted, found = both(ALIKE[case]())
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        torch.testing.assert_close(found[name].neurons(), one.neurons().detach())
        assert found[name].kind != "convolution" or not found[name].note


GROUPED = {
    "kernels of as many inputs as another layer has outputs": (lambda: fused(2), 2),
    "kernels of one place": (squeezed, 4),
}


BY_NAME = {case: (build, {}) for case, build in ALIKE.items()}
BY_NAME["several filters a channel, at a stage"] = (
    widening,
    {"stages.1.blocks.0.conv_dw": ((8, 2, 25), (1, 16, 25))},
)
BY_NAME["grouped"] = (
    lambda: fused(2),
    {
        "blocks.1.spatial_conv": ((2, 64, 144), (1, 128, 144)),
        "blocks.2.spatial_conv": ((2, 64, 144), (1, 128, 144)),
    },
)
"""The layers that are read otherwise in the order of names: their shapes, and as they are read."""


@pytest.mark.parametrize("case", BY_NAME)
def test_groups_that_are_not_read_are_told_in_the_order_of_names(case):
    """Files often have their tensors by name, which does not tell what comes before what."""
    build, expected = BY_NAME[case]
    wanted, found = both(build(), by_name=True)
    different = {}
    for name, one in wanted.items():
        if found[name].shape != one.shape:
            different[name] = one.shape, found[name].shape
    assert different == expected
    for name in different:
        assert "read as one group" in found[name].note


@pytest.mark.parametrize("case", GROUPED)
def test_a_note_says_how_groups_are_read(case):
    build, groups = GROUPED[case]
    model = build()
    wanted, found = both(model)
    told = [name for name, one in found.items() if one.note]
    assert told == [name for name, one in wanted.items() if one.shape[0] == groups]
    neurons = {}
    for name in told:
        assert f"neurons={{'{name}': {groups}}}" in found[name].note
        neurons[name] = groups
    asked = {one.name: one for one in neurons_of_state_dict(model.state_dict(), None, neurons).sets}
    for name in told:
        for i, group in enumerate(wanted[name].neurons().detach()):
            torch.testing.assert_close(asked[f"{name}.{i}"].neurons()[0], group)


def test_a_report_has_the_note():
    text = str(report(fused(2).state_dict()))
    assert "--neurons" in text or "neurons=" in text
    assert "read as one group" in text


def test_several_filters_right_after_a_layer_are_told():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8))
    _, found = both(model)
    assert "neurons={'1': 8}" in found["1"].note


def test_kernels_beside_a_shortcut_take_what_it_takes():
    """As in ResNet-61-Q: the block's first kernels are no bottleneck of the shortcut beside."""
    shapes = {
        "stages.0.0.shortcut.conv.weight": (32, 16, 1, 1),
        "stages.0.0.conv1.conv.weight": (32, 16, 3, 3),
        "stages.0.0.conv2.conv.weight": (32, 32, 1, 1),
    }
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    found = {one.name: one for one in neurons_of_state_dict(state).sets}
    assert found["stages.0.0.conv1.conv"].shape == (1, 32, 144)


class ShuffleUnit(nn.Module):
    """Of ShuffleNet: its kernels in groups are named so, and take what the layer before gives."""

    def __init__(self):
        super().__init__()
        self.gconv1 = nn.Conv2d(16, 8, 1, groups=2, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.dwconv = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.gconv2 = nn.Conv2d(8, 32, 1, groups=2, bias=False)
        self.bn3 = nn.BatchNorm2d(32)


def test_groups_by_name_are_of_what_the_layer_before_gives():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), ShuffleUnit(), nn.Conv2d(32, 8, 1))
    found = report(model.state_dict())
    shapes = {layer.name: layer.shape for layer in report(model).layers}
    assert {layer.name: layer.shape for layer in found.layers} == shapes
    assert shapes["1.gconv2"] == "2 groups of 16 x 4"
    told = [name for name, note in found.notes if "as its name and the layer before" in note]
    assert told == ["1.gconv1", "1.gconv2"]
