"""Transposed convolutions of a state dict without biases or norms, as the widths around them show."""

import random
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_hsu._neurons.select import select
from lightning_hsu._neurons.state_dict import neurons_of_state_dict
from lightning_hsu.report import report

CHAINS = 300  # random ones that are read


def up(inputs, outputs, size=4, **options):
    return nn.ConvTranspose2d(inputs, outputs, size, bias=False, **options)


def down(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, **options)


def encoder():
    return nn.Sequential(down(3, 32), nn.ReLU(), down(32, 64))


def in_one_dimension():
    middle = nn.ConvTranspose1d(32, 64, 8, bias=False)
    return nn.Sequential(nn.Conv1d(1, 32, 8), middle, nn.Conv1d(64, 1, 8))


CLEAR = {
    "between convolutions": lambda: nn.Sequential(down(3, 8), up(8, 16), down(16, 4)),
    "with a ReLU": lambda: nn.Sequential(down(3, 8), nn.ReLU(), up(8, 16), down(16, 4)),
    "generator": lambda: nn.Sequential(up(100, 64), up(64, 32), up(32, 3)),
    "generator with ReLUs": lambda: nn.Sequential(
        up(100, 64), nn.ReLU(), up(64, 32), nn.ReLU(), up(32, 3)
    ),
    "after a Linear": lambda: nn.Sequential(nn.Linear(4, 8), up(8, 16), down(16, 4)),
    "one dimension": in_one_dimension,
}
TOLD = {
    "encoder and decoder": lambda: nn.ModuleDict(
        {"encoder": encoder(), "decoder": nn.Sequential(up(64, 32), up(32, 3))}
    ),
    "attributes": lambda: nn.ModuleDict(
        {"encoder": encoder(), "t1": up(64, 32, 2, stride=2), "t2": up(32, 3, 2, stride=2)}
    ),
    "or groups": lambda: nn.Sequential(down(3, 16), nn.ReLU(), up(16, 8), nn.ReLU(), down(8, 4)),
}
ALONE = {
    "in a list": (lambda: nn.Sequential(up(8, 16)), "0"),
    "of a name": (lambda: nn.ModuleDict({"mix": up(16, 8)}), "mix"),
    "itself": (lambda: up(16, 8), "weight"),
}
ORDINARY = {
    "first": lambda: nn.Sequential(down(3, 16, bias=False)),
    "no biases": lambda: nn.Sequential(
        down(3, 16, bias=False),
        nn.ReLU(),
        down(16, 16, bias=False),
        nn.ReLU(),
        down(16, 32, bias=False),
        nn.Flatten(),
        nn.Linear(128, 10),
    ),
    "of names": lambda: nn.ModuleDict(
        {
            "stem": down(3, 16, bias=False),
            "conv": down(16, 24, bias=False),
            "after": down(24, 8, bias=False),
        }
    ),
    "depthwise": lambda: nn.Sequential(
        down(1, 8, bias=False), down(8, 8, groups=8, bias=False), down(8, 12, bias=False)
    ),
}


def both(model):
    """The sets of a model and of its state dict by name, and the names left out of that."""
    wanted, _ = select(model, everything=True, may_be_empty=True)
    candidates = neurons_of_state_dict(model.state_dict())
    found, skips = select(candidates, everything=True, may_be_empty=True)
    left_out = {skip.name for skip in skips}
    return {one.name: one for one in wanted}, {one.name: one for one in found}, left_out


def is_same(one, other):
    """Whether two sets have the same neurons, whatever their groups."""
    x = one.neurons().detach().flatten(0, 1)
    y = other.neurons().flatten(0, 1)
    return x.shape == y.shape and torch.allclose(x, y)


def silent(model):
    """The layers that a state dict is read unlike its model in, without a word."""
    wanted, found, left_out = both(model)
    names = []
    for name, one in wanted.items():
        if name in left_out:
            continue
        if not is_same(one, found[name]) and not found[name].note:
            names.append(name)
    return names


@pytest.mark.parametrize("case", [*CLEAR, *TOLD, *ORDINARY])
def test_widths_before_and_after_show_the_orientation(case):
    torch.manual_seed(0)
    model = (CLEAR | TOLD | ORDINARY)[case]()
    wanted, found, _ = both(model)
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert is_same(one, found[name])
    shapes = {layer.name: layer.shape for layer in report(model).layers}
    assert {layer.name: layer.shape for layer in report(model.state_dict()).layers} == shapes
    notes = [one.note for one in found.values() if one.note]
    assert bool(notes) == (case in TOLD)
    for note in notes:
        assert "as the shapes of its neighbours show" in note


def test_the_layer_after_a_transposed_one_has_one_group():
    _, found, _ = both(TOLD["or groups"]())
    assert [one.shape for one in found.values()] == [(1, 16, 27), (1, 8, 256), (1, 4, 72)]
    assert "neurons={'2': 'rows'}" in found["2"].note


@pytest.mark.parametrize("case", ALONE)
def test_kernels_of_which_nothing_tells_are_a_guess(case):
    build, name = ALONE[case]
    model = build()
    wanted, found, _ = both(model)
    (one,) = found.values()
    assert not is_same(wanted[name], one)
    assert "if it is a transposed one" in one.note
    asked = neurons_of_state_dict(model.state_dict(), neurons={name: "columns"}).sets
    assert is_same(wanted[name], asked[0])


def test_a_square_kernel_between_transposed_ones_is_a_guess():
    _, found, _ = both(nn.Sequential(up(8, 16, 3), up(16, 16, 3), up(16, 5, 3)))
    assert [name for name, one in found.items() if one.note] == ["1"]
    assert "if it is a transposed one" in found["1"].note


def test_transposed_kernels_in_groups_are_told():
    model = nn.Sequential(up(8, 24, 3, groups=4), nn.BatchNorm2d(24), nn.ReLU(), down(24, 3))
    wanted, found, _ = both(model)
    assert is_same(wanted["0"], found["0"])
    assert "in 4 groups, as the shapes of its neighbours show" in found["0"].note


def random_layers(rng):
    """Convolutions one after the other, some of them transposed or grouped."""
    kinds = [nn.Conv2d, nn.ConvTranspose2d]
    shares = (rng.choice((0.2, 0.5, 0.8)), rng.choice((0, 0.5, 1)), rng.choice((0, 0, 0.3)))
    size, norm_share, with_relu = rng.choice((3, 4)), rng.choice((0, 0, 0.5)), rng.random() < 0.6
    inputs = rng.choice((1, 3, 4, 8, 16))
    count = rng.randint(2, 5)
    layers = []
    for i in range(count):
        outputs = rng.choice((4, 8, 12, 16, 24, 32) if i < count - 1 else (1, 3, 8, 16))
        groups = rng.choice((2, 4)) if rng.random() < shares[2] else 1
        if inputs % groups or outputs % groups:
            groups = 1
        has_norm = rng.random() < norm_share
        has_bias = rng.random() < shares[1] and not has_norm
        kind = kinds[rng.random() < shares[0]]
        layers.append(kind(inputs, outputs, size, bias=has_bias, groups=groups))
        if has_norm:
            layers.append(nn.BatchNorm2d(outputs))
        if with_relu:
            layers.append(nn.ReLU())
        inputs = outputs
    return layers


def random_model(rng):
    """The same in a list, in two, or each of its own name."""
    layers = random_layers(rng)
    how = rng.choice(("list", "two lists", "names"))
    if how == "list":
        return nn.Sequential(*layers)
    if how == "two lists":
        half = len(layers) // 2
        parts = {"encoder": layers[:half], "decoder": layers[half:]}
        return nn.ModuleDict({name: nn.Sequential(*part) for name, part in parts.items()})
    names = [f"{letter}x" for letter in "zyxwvutsrqponmlk"]  # not in their order
    return nn.ModuleDict(dict(zip(names, layers, strict=False)))


def is_told_apart(model):
    """Whether its file is none of an ordinary CNN, nor one that groups in a row explain."""
    convolutions = [one for one in model.modules() if hasattr(one, "transposed")]
    transposed = [one for one in convolutions if one.transposed]
    if all(one.in_channels == one.out_channels for one in transposed):
        return False
    for one, after in pairwise(convolutions):
        if one.groups > 1 and after.groups > 1 and (one.transposed or after.transposed):
            return False
    return not looks_ordinary(convolutions)


def looks_ordinary(convolutions):
    """Whether kernels fit each other as (out, in), their biases too."""
    given = None
    for one in convolutions:
        outputs, inputs = one.weight.shape[:2]
        if one.bias is not None and len(one.bias) != outputs:
            return False
        if given not in (None, inputs):
            return False
        given = outputs
    return True


def test_no_random_chain_is_read_otherwise_without_a_word():
    rng = random.Random(0)
    torch.manual_seed(0)
    read = 0
    unlike = []
    while read < CHAINS:
        model = random_model(rng)
        if is_told_apart(model):
            read += 1
            names = silent(model)
            if names:
                unlike.append((str(model), names))
    assert not unlike


def test_random_chains_of_ordinary_convolutions_are_read_as_before():
    rng = random.Random(1)
    for _ in range(50):
        widths = [rng.choice((1, 3)), *rng.sample((4, 8, 12, 20, 28), 3)]
        layers = []
        for inputs, outputs in pairwise(widths):
            layers += [down(inputs, outputs, bias=rng.random() < 0.3), nn.ReLU()]
        wanted, found, _ = both(nn.Sequential(*layers))
        for name, one in wanted.items():
            assert is_same(one, found[name])
            assert not found[name].note
