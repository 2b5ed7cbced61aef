"""Neurons that could be merged into one: the bound holds on real forwards, and is nearly reached."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hsu._monitor.text import layer_named
from lightning_hsu.report import merges, report
from lightning_hsu.report.activations import activation_of
from lightning_hsu.report.cli import main
from lightning_hsu.report.following import steps_of_model


def merged(model, merge):
    """The model in which the recipe is followed, except that what is dropped is set to zero."""
    model = copy.deepcopy(model)
    first = model.get_submodule(merge.layer)
    following = model.get_submodule(merge.following)
    if merge.prelu is not None:
        assert dict(model.named_parameters())[merge.prelu].shape == (len(first.weight),)
    with torch.no_grad():
        blocks = following.weight.view(len(following.weight), len(first.weight), -1)
        for j, factor in zip(merge.dropped, merge.factors, strict=True):
            blocks[:, merge.kept] += factor * blocks[:, j]
        blocks[:, list(merge.dropped)] = 0.0
        first.weight[list(merge.dropped)] = 0.0
    return model


def plant(layer, spread=0.0, *, opposite=False, same_length=False):
    """Let neurons 3, 7 and 9 of a layer be nearly one, times factors."""
    with torch.no_grad():
        weight = layer.weight.flatten(1)
        for j, factor in ((7, 2.0), (9, 0.5)):
            if same_length:
                factor = 1.0
            if opposite and j == 9:
                factor = -factor
            noise = spread * weight[3].norm() * F.normalize(torch.randn_like(weight[3]), dim=0)
            weight[j] = factor * (weight[3] + noise)
            layer.bias[j] = factor * (layer.bias[3] + spread * float(torch.randn(())))


class Functional(nn.Module):
    """A convolutional network whose activations and pooling are functions."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * 4, 20)
        self.fc2 = nn.Linear(20, 6)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc2(F.leaky_relu(self.fc1(x), 0.1))


def normalised(n):
    """A batch norm as after training."""
    norm = nn.BatchNorm2d(n)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_()
        for x in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            x[[7, 9]] = x[3].clone()
    return norm


def networks():
    """Networks by name, each with the layer in which there are near-duplicates, and their input."""
    torch.manual_seed(0)
    size = (3, 8, 8)
    norm = normalised(12)
    return {
        "relu": (nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 8)), "0", (20,)),
        "none": (nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 8)), "0", (20,)),
        "gelu": (nn.Sequential(nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 8)), "0", (20,)),
        "tanh": (nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 8)), "0", (20,)),
        "norm": (
            nn.Sequential(nn.Conv2d(3, 12, 3), norm, nn.ReLU(), nn.Conv2d(12, 10, 3)),
            "0",
            size,
        ),
        "flatten": (
            nn.Sequential(
                nn.Conv2d(3, 12, 3),
                nn.SiLU(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(12 * 9, 10),
            ),
            "0",
            size,
        ),
        "functional": (Functional(), "conv2", size),
    }


SAME_LENGTH = ("gelu", "tanh", "flatten", "norm")  # with a norm, its means would have to scale, too


def input_norm(model, name, x):
    """The norm of each input of a layer; of a convolution, of the largest patch."""
    layer = model.get_submodule(name)
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(x)
    hook.remove()
    if isinstance(layer, nn.Linear):
        return seen[0].norm(dim=1)
    patches = F.unfold(seen[0], layer.kernel_size, padding=layer.padding)
    return patches.norm(dim=1).amax(1)


def outputs_of(model, name, x):
    """What a layer gives."""
    found = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda module, given, output: found.append(output)
    )
    model(x)
    hook.remove()
    return found[0]


@torch.no_grad()
def change(model, merge, x):
    """The largest change of an output of the next layer for each input, and the bound."""
    difference = outputs_of(merged(model, merge), merge.following, x)
    difference = difference - outputs_of(model, merge.following, x)
    norm = input_norm(model, merge.layer, x)
    return difference.flatten(1).abs().amax(1), merge.slope * norm + merge.offset


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_the_bound_holds_on_a_forward(name, spread):
    model, layer, size = networks()[name]
    plant(model.get_submodule(layer), spread, same_length=name in SAME_LENGTH)
    model.double().eval()
    found = [merge for merge in merges(model).found if merge.layer == layer]
    (merge,) = found
    assert {merge.kept, *merge.dropped} == {3, 7, 9}
    for scale in (0.1, 1.0, 10.0):
        x = scale * torch.randn(64, *size, dtype=torch.float64)
        changes, bound = change(model, merge, x)
        assert bool((changes <= bound * (1 + 1e-9) + 1e-12).all())
        if spread == 0.0:
            # 1e-15 was the most, of factors that are powers of two.
            assert float(changes.max()) < 1e-12 * max(scale, 1.0)
        else:
            assert float(changes.max()) > 0.0


@pytest.mark.parametrize("name", networks())
def test_exact_duplicates_change_nothing(name):
    model, layer, size = networks()[name]
    with torch.no_grad():
        for parameter in (model.get_submodule(layer).weight, model.get_submodule(layer).bias):
            parameter[9] = parameter[3]
    model.double().eval()
    (merge,) = [merge for merge in merges(model).found if merge.layer == layer]
    assert (merge.kept, merge.dropped, merge.slope, merge.offset) == (3, (9,), 0.0, 0.0)
    assert f"outputs of {layer_named(merge.following)} stay the same" in shown(merges(model))
    changes, _ = change(model, merge, torch.randn(32, *size, dtype=torch.float64))
    assert float(changes.max()) < 1e-12


class Slopes(nn.Module):
    """A PReLU as a function, with slopes that the model itself has."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(20, 16)
        self.slopes = nn.Parameter(torch.rand(16))
        self.b = nn.Linear(16, 8)

    def forward(self, x):
        return self.b(F.prelu(self.a(x), self.slopes))


@torch.no_grad()
def with_prelu(name, apart, slope=0.25):
    """A network with a PReLU, the slopes of 3, 7 and 9 so far apart; its first layer, its input."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 12, 3)
    last = nn.Conv2d(12, 8, 2)
    prelu = nn.PReLU(12)
    size = (3, 8, 8)
    if name == "linear":
        prelu, size = nn.PReLU(16), (20,)
        model = nn.Sequential(nn.Linear(20, 16), prelu, nn.Linear(16, 8))
    elif name == "function":
        model, size = Slopes(), (20,)
    elif name == "o-net":
        model = nn.Sequential(first, prelu, nn.MaxPool2d(3, 2), last)
    else:
        model = nn.Sequential(first, normalised(12), prelu, last)
    slopes = model.slopes if name == "function" else prelu.weight
    slopes.copy_(torch.linspace(-1.5, 0.9, len(slopes)))
    slopes[[3, 7, 9]] = slope + torch.tensor([0.0, apart, -apart / 2])
    return model, "a" if name == "function" else "0", size


def shown(found):
    """What is printed, as one line."""
    return " ".join(str(found).split())


def adversarial(model, merge, size, steps=300):
    """The largest share of the bound that a search over inputs reaches."""
    torch.manual_seed(1)
    x = torch.randn(128, *size, dtype=torch.float64, requires_grad=True)
    other = merged(model, merge)
    optimizer = torch.optim.Adam([x], lr=0.1)
    best = 0.0
    for _ in range(steps):
        difference = outputs_of(other, merge.following, x)
        difference = difference - outputs_of(model, merge.following, x)
        bound = merge.slope * input_norm(model, merge.layer, x) + merge.offset
        share = difference.flatten(1).abs().amax(1) / bound
        best = max(best, float(share.detach().max()))
        optimizer.zero_grad()
        (-share.sum()).backward()
        optimizer.step()
    return best


@pytest.mark.parametrize(
    # Reached: 1.00, 1.00, 0.97 and 1.00.
    ("name", "least"),
    [("none", 0.9), ("relu", 0.9), ("gelu", 0.8), ("tanh", 0.9)],
)
def test_the_bound_is_nearly_reached(name, least):
    model, layer, size = networks()[name]
    with torch.no_grad():
        first = model.get_submodule(layer)
        weight = first.weight
        noise = F.normalize(torch.randn(weight.shape[1]), dim=0)
        weight[7] = F.normalize(weight[3] + 0.1 * weight[3].norm() * noise, dim=0)
        weight[7] *= weight[3].norm()
        first.bias[7] = first.bias[3]
    model.double().eval()
    (merge,) = merges(model).found
    assert least < adversarial(model, merge, size) <= 1.0 + 1e-9


@pytest.mark.parametrize("name", ["linear", "function", "o-net", "norm"])
@pytest.mark.parametrize("spread", [0.0, 0.05])
@pytest.mark.parametrize("apart", [0.0, 0.06])
def test_the_bound_holds_through_a_prelu_with_a_slope_for_each_neuron(name, spread, apart):
    model, layer, size = with_prelu(name, apart)
    plant(model.get_submodule(layer), spread, same_length=name == "norm")
    model.double().eval()
    (merge,) = merges(model).found
    assert {merge.kept, *merge.dropped} == {3, 7, 9}
    assert merge.prelu in ("1.weight", "2.weight", "slopes")
    assert "slope 2 of a PReLU between and row 2 here" in " ".join(str(merges(model)).split())
    for scale in (0.1, 1.0, 10.0):
        x = scale * torch.randn(64, *size, dtype=torch.float64)
        changes, bound = change(model, merge, x)
        assert bool((changes <= bound * (1 + 1e-9) + 1e-12).all())
        if spread == apart == 0.0:
            assert float(changes.max()) < 1e-12 * max(scale, 1.0)
        else:
            assert float(changes.max()) > 0.0


@pytest.mark.parametrize(
    # Reached: 1.00, 1.00, and 0.25, where patches overlap and a maximum hides what is negative.
    ("name", "spread", "apart", "slope", "least"),
    [
        ("linear", 0.0, 0.05, 0.25, 0.9),
        ("linear", 0.05, 0.0, -1.8, 0.9),
        ("o-net", 0.03, 0.05, 0.25, 0.12),
    ],
)
def test_the_bound_through_a_prelu_is_nearly_reached(name, spread, apart, slope, least):
    model, layer, size = with_prelu(name, apart, slope)
    first = model.get_submodule(layer)
    with torch.no_grad():
        noise = F.normalize(torch.randn_like(first.weight[3].flatten()), dim=0)
        noise = spread * first.weight[3].norm() * noise.view_as(first.weight[3])
        first.weight[7] = first.weight[3] + noise
        first.bias[7] = first.bias[3]
    model.double().eval()
    (merge,) = merges(model).found
    assert least < adversarial(model, merge, size, steps=150) <= 1.0 + 1e-9


def test_prelu_slopes_of_neurons_that_are_merged_are_nearly_the_same():
    model, layer, _ = with_prelu("linear", 0.3)
    plant(model.get_submodule(layer))
    found = merges(model)
    assert (found.pairs, found.found) == ((("0", "2"),), ())
    assert found.not_merged == (("0", "PReLU slopes differ"),)
    assert "near-duplicates that are not merged:\n  layer 0: PReLU slopes differ" in str(found)
    assert found.to_dict()["not_merged"] == [{"layer": "0", "reason": "PReLU slopes differ"}]


class TwoUses(Slopes):
    def forward(self, x):
        return super().forward(x) + self.slopes.sum()


def test_prelu_slopes_that_something_else_needs_are_left_alone():
    shared = nn.PReLU(16)
    twice = nn.Sequential(nn.Linear(20, 16), shared, nn.Linear(16, 16), shared, nn.Linear(16, 8))
    flat = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.PReLU(20), nn.Linear(20, 4))
    late = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.PReLU(16), nn.Linear(16, 4))
    for model in (twice, flat, late, TwoUses()):
        assert pairs(model) == set()
        assert any("PReLU" in reason for reason in steps_of_model(model).reasons.values())
    one = nn.PReLU()  # a single slope is no neuron's own
    model = nn.Sequential(nn.Linear(20, 16), one, nn.Linear(16, 16), one, nn.Linear(16, 8))
    assert pairs(model) == {("0", "2"), ("2", "4")}


def test_a_convolution_reaches_a_fair_part_of_the_bound():
    model, layer, size = networks()["norm"]
    plant(model.get_submodule(layer), 0.05)
    model.double().eval()
    (merge,) = merges(model).found
    # Patches overlap, so they cannot all be the worst at once: 0.36 was reached.
    assert 0.15 < adversarial(model, merge, size, steps=100) <= 1.0 + 1e-9


def test_opposite_neurons_are_merged_through_odd_functions_only():
    for name, expected in (("none", {3, 7, 9}), ("relu", {3, 7}), ("tanh", {3, 7, 9})):
        model, layer, size = networks()[name]
        plant(model.get_submodule(layer), opposite=True, same_length=name == "tanh")
        model.double()
        (merge,) = merges(model).found
        assert {merge.kept, *merge.dropped} == expected
        assert (min(merge.factors) < 0.0) == (9 in expected)
        changes, bound = change(model, merge, torch.randn(64, *size, dtype=torch.float64))
        assert bool((changes <= bound * (1 + 1e-9) + 1e-12).all())


def test_other_lengths_are_not_merged_through_gelu():
    model, layer, _ = networks()["gelu"]
    plant(model.get_submodule(layer))
    found = merges(model)
    assert found.pairs == (("0", "2"),)
    assert found.found == ()


def test_what_is_saved_is_counted():
    model, layer, _ = networks()["norm"]
    plant(model.get_submodule(layer))
    (merge,) = merges(model).found
    # 27 weights, a bias and two numbers of the batch norm; 10 outputs of 9 places.
    assert merge.saved == 2 * (27 + 1 + 2 + 10 * 9)
    assert merge.norm == "1"


def test_a_chain_is_not_merged_as_a_whole():
    model = nn.Sequential(nn.Linear(2, 40), nn.ReLU(), nn.Linear(40, 4))
    with torch.no_grad():
        angle = torch.arange(40) * 0.05
        model[0].weight.copy_(torch.stack([angle.cos(), angle.sin()], 1))
        model[0].bias.zero_()
    found = merges(model, similar_above=0.98)
    assert len(found.found) > 3
    seen = []
    for merge in found.found:
        seen += [merge.kept, *merge.dropped]
        cosine = (angle[list(merge.dropped)] - angle[merge.kept]).cos()
        assert float(cosine.min()) >= 0.98 - 1e-6
    assert len(seen) == len(set(seen))


PLAIN = (
    nn.ReLU,
    nn.GELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.SiLU,
    nn.Mish,
    nn.ReLU6,
    nn.Hardswish,
    nn.Softsign,
    nn.SELU,
    nn.Softplus,
)


def pairs(model):
    return {(step.layer, step.following) for step in steps_of_model(model).steps}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.b(self.a(x).relu())
        return self.c(x)


class Gated(Residual):
    def forward(self, x):
        return self.c(F.silu(self.a(x)) * self.b(x))


class Twice(Residual):
    def forward(self, x):
        return self.c(self.b(self.a(self.a(x))))


class Branching(nn.Module):
    """What cannot be traced."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.other = nn.Linear(8, 4)

    def forward(self, x):
        if x.sum() > 0:
            return self.net(x)
        return self.other(x)


def test_which_layers_follow_in_a_model():
    assert pairs(Residual()) == {("a", "b")}
    assert pairs(Gated()) == set()
    assert pairs(Twice()) == {("b", "c")}
    assert pairs(Functional()) == {("conv1", "conv2"), ("conv2", "fc1"), ("fc1", "fc2")}
    assert pairs(Branching()) == {("net.0", "net.2")}
    assert "cannot be traced" in steps_of_model(Branching()).how
    tied = Residual()
    tied.b.weight = tied.a.weight
    assert pairs(tied) == set()
    for between in (nn.LayerNorm(8), nn.Softmax(-1), nn.BatchNorm1d(8, track_running_stats=False)):
        assert pairs(nn.Sequential(nn.Linear(8, 8), between, nn.Linear(8, 4))) == set()
    late = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4))
    assert pairs(late) == set()
    positions = nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Linear(40, 4))
    assert pairs(positions) == set()
    channels = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 4))
    assert pairs(channels) == set()
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
    assert pairs(grouped) == set()


def test_a_model_is_as_before_when_it_was_traced():
    class Keeps(Residual):
        def forward(self, x):
            self.last = self.a(x)
            return self.b(self.last)

    model = Keeps()
    assert pairs(model) == {("a", "b")}
    assert not hasattr(model, "last")


def names(*shapes):
    return {name: torch.randn(shape) for name, shape in shapes}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (names(("net.0.weight", (8, 6)), ("net.2.weight", (4, 8))), {("net.0", "net.2")}),
        (names(("fc1.weight", (8, 6)), ("fc2.weight", (4, 8))), {("fc1", "fc2")}),
        (names(("q_proj.weight", (8, 8)), ("k_proj.weight", (8, 8))), set()),
        (names(("w1.weight", (8, 8)), ("w2.weight", (8, 8))), set()),
        (names(("fc1.weight", (8, 6)), ("fc2.weight", (4, 9))), set()),
        (
            names(("fc1.weight", (8, 6)), ("norm.weight", (8,)), ("fc2.weight", (4, 8))),
            set(),  # a layer norm
        ),
        (
            names(("linear1.weight", (8, 6)), ("linear2.weight", (6, 8)), ("norm1.weight", (6,))),
            set(),
        ),
        (
            names(("conv2.weight", (8, 4, 3, 3)), ("fc1.weight", (5, 8 * 9))),
            {("conv2", "fc1")},
        ),
        (
            names(("features.3.weight", (8, 4, 3, 3)), ("classifier.0.weight", (5, 8 * 9))),
            {("features.3", "classifier.0")},
        ),
        (names(("layer4.1.conv2.weight", (8, 4, 3, 3)), ("fc.weight", (5, 8))), set()),
    ],
    ids=range(10),
)
def test_which_layers_follow_by_names(state, expected):
    found = merges(state)
    assert set(found.pairs) == expected
    if not expected:
        assert "no pair of layers is known to follow each other" in str(found)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_a_wrapper_has_made_longer(prefix):
    model, layer, _ = networks()["norm"]
    plant(model.get_submodule(layer), 0.02)
    state = model.state_dict()
    longer = {prefix + name: x for name, x in state.items()}
    assert merges(longer) == merges(state)
    assert merges({**state, "epoch": 3, "name": "x"}) == merges(state)
    inside = {name.replace("3.", "3._fsdp_wrapped_module."): x for name, x in state.items()}
    assert merges(inside) == merges(state)
    assert len(merges(state).found) == 1


@pytest.mark.parametrize("name", ["relu", "norm", "functional"])
def test_a_file_tells_what_the_model_does(name, tmp_path):
    model, layer, _ = networks()[name]
    plant(model.get_submodule(layer), 0.02)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    (stored,) = [one for one in merges(tmp_path / "a.pt").found if one.layer == layer]
    (read,) = [one for one in merges(model).found if one.layer == layer]
    assert (stored.kept, stored.dropped, stored.saved) == (read.kept, read.dropped, read.saved)
    assert stored.slope == pytest.approx(read.slope, rel=1e-6)
    assert stored.offset == pytest.approx(read.offset, rel=1e-6)
    assert stored.condition.startswith("if ReLU")
    assert (read.condition, read.norm) == ("", stored.norm)


class Autoencoder(nn.Module):
    """As of SAELens: weights are (inputs, outputs)."""

    def __init__(self):
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(20, 48))
        self.b_enc = nn.Parameter(torch.randn(48))
        self.W_dec = nn.Parameter(torch.randn(48, 20))
        self.b_dec = nn.Parameter(torch.randn(20))

    def forward(self, x):
        return (x @ self.W_enc + self.b_enc).relu() @ self.W_dec + self.b_dec


class Coder(nn.Module):
    """An autoencoder of two Linear layers."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(20, 48)
        self.decoder = nn.Linear(48, 20)

    def forward(self, x):
        return self.decoder(self.encoder(x).relu())


class Mixed(nn.Module):
    """As of sparsify: an ``nn.Linear`` and a W_dec."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(20, 48)
        self.W_dec = nn.Parameter(torch.randn(48, 20))
        self.b_dec = nn.Parameter(torch.randn(20))

    def forward(self, x):
        return self.encoder(x).relu() @ self.W_dec + self.b_dec


class OwnBias(nn.Module):
    """As of OpenAI: the biases of the encoder have a name of their own."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(20, 48, bias=False)
        self.latent_bias = nn.Parameter(torch.randn(48))
        self.pre_bias = nn.Parameter(0.01 * torch.randn(20))
        self.decoder = nn.Linear(48, 20, bias=False)
        self.register_buffer("stats_last_nonzero", torch.zeros(48, dtype=torch.long))

    def forward(self, x):
        h = (self.encoder(x - self.pre_bias) + self.latent_bias).relu()
        return self.decoder(h) + self.pre_bias


def tensor_of(model, names):
    """The first of some parameters that a model has."""
    state = model.state_dict()
    for name in names:
        if name in state:
            return state[name]
    raise AssertionError(names)


@torch.no_grad()
def parts(model):
    """An autoencoder's weights as views, the neurons of the encoder as rows, columns of the decoder."""
    state = model.state_dict()
    encoder = state["W_enc"].T if "W_enc" in state else state["encoder.weight"]
    decoder = state["W_dec"].T if "W_dec" in state else state["decoder.weight"]
    return encoder, tensor_of(model, ["b_enc", "encoder.bias", "latent_bias"]), decoder


@pytest.mark.parametrize("prefix", ["", "sae."])
@pytest.mark.parametrize("kind", [Autoencoder, Coder, Mixed, OwnBias])
@torch.no_grad()
def test_the_bound_holds_for_an_autoencoder_that_is_read_by_names(kind, prefix):
    torch.manual_seed(0)
    model = kind().double()
    encoder, bias, _ = parts(model)
    bias[3] = 1.0
    for j, factor in ((7, 2.0), (9, 0.5)):
        encoder[j] = factor * (encoder[3] + 0.02 * torch.randn(20))
        bias[j] = factor * (bias[3] + 0.5)
    stored = {prefix + name: x for name, x in model.state_dict().items()}
    found = merges(dict(reversed(stored.items())))  # a file may be sorted in any way
    (merge,) = found.found
    assert {merge.kept, *merge.dropped} == {3, 7, 9}
    assert merge.layer in (f"{prefix}encoder", f"{prefix}W_enc")
    assert merge.following in (f"{prefix}decoder", f"{prefix}W_dec")
    assert merge.condition == "if ReLU or nothing lies between"
    assert merge.saved == 2 * (20 + 1 + 20)
    follower = copy.deepcopy(model)
    rows, _, columns = parts(follower)
    for j, factor in zip(merge.dropped, merge.factors, strict=True):
        columns[:, merge.kept] += factor * columns[:, j]
        columns[:, j] = 0.0
        rows[j] = 0.0
    for scale in (0.1, 1.0, 10.0):
        x = scale * torch.randn(64, 20, dtype=torch.float64)
        changes = (follower(x) - model(x)).abs().amax(1)
        inputs = x - model.pre_bias if kind is OwnBias else x
        bound = merge.slope * inputs.norm(dim=1) + merge.offset
        assert bool((changes <= bound * (1 + 1e-9)).all())
        assert float(changes.max()) > 0.0
        if scale == 0.1:  # the biases count
            assert bool((changes > bound - merge.offset).any())


NO_RELU = {
    "gated": {"W_enc": (20, 48), "W_dec": (48, 20), "r_mag": (48,)},
    "a threshold": {"W_enc": (20, 48), "W_dec": (48, 20), "b_enc": (48,), "threshold": (48,)},
    "top-k": {"encoder.weight": (48, 20), "decoder.weight": (20, 48), "k": ()},
    "a norm": {"encoder.weight": (48, 20), "decoder.weight": (20, 48), "norm.weight": (48,)},
    "two biases": {"W_enc": (20, 48), "W_dec": (48, 20), "b_enc": (48,), "encoder_bias": (48,)},
    "another decoder": {"encoder.weight": (48, 20), "decoder.weight": (20, 30)},
    "two decoders": {"W_enc": (20, 48), "W_dec": (48, 20), "decoder.weight": (20, 48)},
    "transposed": {"decoder.0.weight": (8, 8, 3, 3), "decoder.2.weight": (8, 8, 3, 3)},
}


@pytest.mark.parametrize("shapes", NO_RELU.values(), ids=NO_RELU)
def test_what_is_not_known_to_follow_is_said(shapes):
    torch.manual_seed(0)
    state = names(*shapes.items())
    first = next(iter(state))
    rows = state[first].T if first == "W_enc" else state[first]
    rows[4] = rows[5]
    found = merges(state)
    assert found.pairs == ()
    name = first.removesuffix(".weight")
    assert [one.layer for one in found.not_followed] == [name]
    reason = "names tell of no layer that takes its outputs"
    assert found.not_followed[0].reason == reason
    said = " ".join(str(found).split())
    assert f"near-duplicates that are not merged: {name}: {reason}" in said
    assert "in Python, merges(model) follows the model itself" in said


def test_the_encoder_and_decoder_of_an_autoencoder_may_be_sequential():
    shapes = {"encoder.0": (30, 20), "encoder.2": (8, 30), "decoder.0": (30, 8)}
    state = names(*((f"{name}.weight", shape) for name, shape in shapes.items()))
    assert merges(state).pairs == (("encoder.0", "encoder.2"), ("encoder.2", "decoder.0"))


def test_several_layers_that_nothing_follows_are_folded():
    torch.manual_seed(0)
    state = names(*((f"blocks.{i}.q.weight", (8, 8)) for i in range(12)))
    for x in state.values():
        x[1] = x[0]
    said = " ".join(str(merges(state, include="*")).split())
    reason = "names tell of no layer that takes its outputs"
    assert f"not merged: blocks.{{0..11}}.q (12): {reason} in Python, merges(model)" in said


def test_a_model_that_cannot_be_followed_says_no_way_out():
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        model.c.weight[3] = model.c.weight[4]
    found = merges(model)
    reason = "its outputs are the network's own"
    assert found.not_followed == (("c", reason),)
    assert "in Python" not in str(found)
    told = json.loads(json.dumps(found.to_dict()))["not_followed"]
    assert told == [{"layer": "c", "reason": reason}]


def test_what_is_printed_is_80_columns_wide_and_names_layers():
    torch.manual_seed(0)
    model, layer, _ = networks()["norm"]
    plant(model.get_submodule(layer), 0.05)
    with torch.no_grad():
        model[3].weight[2] = model[3].weight[5]
    for source in (model, model.state_dict()):
        lines = str(merges(source)).splitlines()
        assert max(map(len, lines)) <= 80
        said = " ".join(" ".join(lines).split())
        assert " layer 0: keep " in said
        assert "outputs of layer 3 change by at most" in said
        assert "% of what its weights allow" in said
        assert "batch norm 1 in eval mode" in said
        assert "near-duplicates that are not merged: layer 3: " in said
        has_eps = "the norm's eps is 1e-05, which the file does not say" in said
        assert has_eps == (source is not model)


@pytest.mark.parametrize(
    "module",
    [*(kind() for kind in PLAIN), nn.LeakyReLU(0.2), nn.GELU("tanh"), nn.ELU(1.5), nn.PReLU()],
    ids=str,
)
def test_what_is_said_of_activations_is_so(module):
    known = activation_of(module)
    x = torch.linspace(-12.0, 12.0, 200_001, dtype=torch.float64)
    module = module.double()
    with torch.no_grad():
        y = module(x)
        slopes = (y[1:] - y[:-1]).abs() / (x[1] - x[0])
        # Differences of float64 on a grid of 1e-4 are exact to 1e-10.
        assert 0.98 * known.slope < float(slopes.max()) <= known.slope * (1 + 1e-6)
        scaled = torch.allclose(module(3.0 * x), 3.0 * y, rtol=1e-9, atol=1e-9)
        mirrored = torch.allclose(module(-x), -y, rtol=1e-9, atol=1e-9)
    assert (scaled, mirrored) == (known.homogeneous, known.odd)


def test_the_command_line(tmp_path, capsys):
    model, layer, _ = networks()["relu"]
    plant(model.get_submodule(layer), 0.02)
    path = str(tmp_path / "a.pt")
    numbers = tmp_path / "a.json"
    torch.save(model.state_dict(), path)
    assert main(["report", path, "--merge", "--groups", "2", "--json", str(numbers)]) == 0
    shown = capsys.readouterr().out
    assert "0: 3 near-duplicates: 3, 7, 9; cosine to the first from 0.99" in shown
    assert "layer 0: keep " in shown
    shown = " ".join(shown.split())
    assert "if ReLU or nothing lies between" in shown
    assert "saves 58 parameters" in shown  # two rows of 20 + 1, two columns of 8
    read = json.loads(numbers.read_text())
    assert read["merges"]["count"] == 1
    assert len(read["merges"]["found"][0]["dropped"]) == 2
    assert main(["report", path, "--groups", "2"]) == 0
    assert "keep " not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["report", "--merge", path])
    assert "--merge stand after the file" in capsys.readouterr().err


def test_broken_and_dead_neurons_are_left_out():
    model, layer, _ = networks()["relu"]
    plant(model.get_submodule(layer), 0.02)
    with torch.no_grad():
        model[0].weight[5] = float("nan")
        model[0].weight[6] = 0.0
    for source in (model, model.state_dict()):
        (merge,) = merges(source).found
        assert {merge.kept, *merge.dropped} == {3, 7, 9}
        assert 0.0 < merge.share < 1.0
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    found = merges(model)
    assert (found.pairs, found.found) == ((("0", "2"),), ())
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    nn.init.zeros_(model[0].weight)
    assert merges(model).found == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    model, layer, _ = networks()["relu"]
    plant(model.get_submodule(layer))
    (merge,) = merges(model.to(dtype)).found
    assert merge.slope == 0.0  # factors that are powers of two
    assert {merge.kept, *merge.dropped} == {3, 7, 9}


def test_at_most_so_many_are_listed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 8))
    with torch.no_grad():
        for i in range(0, 10, 2):
            model[0].weight[i + 1] = model[0].weight[i] + 0.002 * i * torch.randn(20)
    found = merges(model, most=2)
    assert (len(found.found), found.count) == (2, 5)
    assert "and 3 more" in str(found)
    shares = [merge.share for merge in merges(model).found]
    assert shares == sorted(shares)
    assert report(model).merges is None
    with pytest.raises(ValueError, match="merge"):
        report(model, merge=0)


@pytest.mark.parametrize("size", [3, 4])
def test_a_square_convolution_that_may_be_transposed(size):
    """Nothing shows whether its rows are outputs: not followed, or on that condition only."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 16, size, bias=False)
    )
    with torch.no_grad():
        model[0].weight[5] = model[0].weight[2]
    found = merges(model.state_dict())
    if size == 4:
        assert found.pairs == ()
    else:
        (merge,) = found.found
        assert "and layer 2 is not transposed" in merge.condition
    assert merges(model).pairs == ()
    plain = {"conv1.weight": torch.randn(16, 3, 3, 3), "conv2.weight": torch.randn(16, 16, 1, 1)}
    plain["conv1.weight"][5] = plain["conv1.weight"][2]
    (merge,) = merges(plain).found
    assert "transposed" not in merge.condition


def test_kernels_that_may_see_one_channel_each_are_not_merged():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )
    with torch.no_grad():
        model[2].weight[1] = model[2].weight[0]
        model[2].bias[1] = model[2].bias[0]
    found = merges(model.state_dict())
    assert report(model.state_dict()).layers[1].grouped == 2
    assert found.found == ()
    assert found.not_followed == (("2", "it may be a convolution in groups"),)
    first = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        first[0].weight[1] = first[0].weight[0]
    (merge,) = merges(first.state_dict()).found
    assert merge.condition.endswith("and layer 0 is not grouped")


def linear_pair():
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    weight[1] = weight[0]
    return {"fc1.weight": weight, "fc1.bias": torch.zeros(6), "fc2.weight": torch.randn(3, 6)}


@pytest.mark.parametrize(
    "changed",
    [
        {"fc1.bias": torch.zeros(2)},
        {"fc1.bias": torch.zeros(())},
        {"fc2.weight": torch.ones(3, 6).to_sparse()},
        {"fc2.weight": torch.empty(0, 6)},
        {"fc2.weight": torch.ones(3, 6, device="meta")},
        {"fc2.weight": torch.ones(3, 6).to(torch.float8_e4m3fn), "fc2.weight_scale": torch.ones(1)},
        {"fc2.weight": torch.ones(3, 6, dtype=torch.int8), "fc2.SCB": torch.ones(3)},
        {"fc2.weight_mask": torch.ones(3, 6)},
    ],
)
def test_weights_that_are_not_stored_as_they_are_used_are_not_merged(changed):
    assert len(merges(linear_pair()).found) == 1
    found = merges(linear_pair() | changed)
    assert found.found == ()
    ((layer, reason), *_) = found.not_followed
    assert layer == "fc1"
    assert reason.endswith("may not be used as they are stored")


def test_a_neuron_whose_bias_is_nan_is_not_kept():
    tensors = linear_pair()
    tensors["fc1.bias"][0] = float("nan")
    assert merges(tensors).found == ()


class ByMode(nn.Module):
    """A network that does something else in a training."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(6, 3)
        with torch.no_grad():
            self.fc1.weight[1] = self.fc1.weight[0]

    def forward(self, x):
        x = self.fc1(x)
        if self.training:
            return self.fc2(F.relu(x))
        return self.fc2(torch.sin(x))


def test_a_model_is_followed_as_it_is_in_eval_mode():
    model = ByMode()
    assert merges(model).found == ()
    assert model.training
    assert model.fc1.training


def test_a_layer_whose_forward_was_replaced_is_not_merged():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0]
        model[0].bias[1] = model[0].bias[0]
    assert len(merges(model).found) == 1
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) * torch.arange(6.0)
    assert merges(model).found == ()


class Reasons(nn.Module):
    """Layers that are followed by nothing that they could be merged into, each for a reason."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.normed = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.added = nn.Linear(8, 8)
        self.forked = nn.Linear(8, 8)
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)
        self.gated = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.unused = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        x = self.twice(self.twice(self.stem(x)))
        for layer in self.normed:
            x = self.norm(layer(x).tanh())
        x = x + self.added(x)
        x = self.forked(x)
        x = torch.cat([self.left(x), self.right(x)], 1)[:, :8]
        return self.last(self.block(self.gated(x) * x))


EXPECTED = {
    "stem": "the next layer, twice, cannot be changed: it is called several times",
    "normed.0": "LayerNorm lies between",
    "normed.1": "LayerNorm lies between",
    "added": "its outputs are added to others",
    "forked": "several layers take its outputs",
    "left": "its outputs are joined with others",
    "gated": "mul lies between",
    "twice": "it is called several times",
    "block.linear1": "it is a part of block, a TransformerEncoderLayer, which is not traced",
    "unused": "the traced forward pass does not call it",
    "last": "its outputs are the network's own",
}


def test_each_layer_that_nothing_follows_has_its_reason():
    torch.manual_seed(0)
    model = Reasons()
    with torch.no_grad():
        for name in EXPECTED:
            weight = model.get_submodule(name).weight
            weight[1] = weight[0]
    found = merges(model, include=list(EXPECTED))
    assert {one.layer: one.reason for one in found.not_followed} == EXPECTED
    said = " ".join(str(found).split())
    assert "normed.{0,1} (2): LayerNorm lies between" in said
    assert max(map(len, str(found).splitlines())) <= 80


def test_a_model_that_cannot_be_traced_says_why():
    torch.manual_seed(0)
    model = Branching()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                layer.weight[1] = layer.weight[0]
    reasons = {one.layer: one.reason for one in merges(model).not_followed}
    (reason,) = set(reasons.values())
    assert reason.startswith("the forward pass cannot be traced: symbolically traced variables")
    normed = Branching()
    normed.net.insert(1, nn.LayerNorm(normed.net[0].out_features))
    assert steps_of_model(normed).reasons["net.0"] == "LayerNorm lies between"


def test_an_activation_that_is_used_twice_in_a_sequential_is_seen_twice():
    class Untraced(nn.Module):
        def __init__(self):
            super().__init__()
            gelu = nn.GELU()
            self.net = nn.Sequential(nn.Linear(8, 8), gelu, nn.Linear(8, 8), gelu, nn.Linear(8, 8))

        def forward(self, x):
            return self.net(x) if x.sum() > 0 else x

    found = steps_of_model(Untraced()).steps
    assert [step.activation.name for step in found] == ["GELU", "GELU"]


def test_the_vectors_of_a_dictionary_are_merged_with_its_encoder():
    torch.manual_seed(0)
    state = names(("W_enc", (20, 48)), ("W_dec", (48, 20)))
    state["W_dec"][5] = state["W_dec"][4]
    found = merges(state)
    reason = "its neurons are the dictionary's own vectors; their merge is that of W_enc"
    assert found.not_followed == (("W_dec", reason),)


def test_why_neurons_of_a_followed_layer_are_not_merged():
    for kind, factor, reason in (
        (nn.ReLU, -1.0, "they point opposite ways, which ReLU tells apart"),
        (nn.GELU, 2.0, "their lengths differ, which GELU tells apart"),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 16), kind(), nn.Linear(16, 8))
        with torch.no_grad():
            model[0].weight[4] = factor * model[0].weight[3]
        found = merges(model)
        assert (found.found, found.together) == ((), ())
        assert found.not_merged == (("0", reason),)


@pytest.mark.parametrize("spread", [0.0, 0.05])
@torch.no_grad()
def test_all_merges_of_a_layer_together_change_no_more_than_is_said(spread):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 8)).double()
    for i in range(0, 12, 3):
        for j, factor in ((i + 1, 2.0), (i + 2, 0.5)):
            noise = spread * F.normalize(torch.randn(20, dtype=torch.float64), dim=0)
            model[0].weight[j] = factor * (model[0].weight[i] + 0.5 * noise)
            model[0].bias[j] = factor * (model[0].bias[i] + spread)
    found = merges(model, most=1)
    assert "together in " not in str(merges(networks()["relu"][0]))
    (one,) = found.together
    assert (one.layer, one.following, one.count, one.dropped) == ("0", "2", 4, 8)
    assert one.saved == 8 * (20 + 1 + 8)
    every = merges(model).found
    assert one.slope <= sum(merge.slope for merge in every) * (1 + 1e-12)
    assert one.slope >= max(merge.slope for merge in every)
    other = model
    for merge in every:
        other = merged(other, merge)
    for scale in (0.1, 1.0, 10.0):
        x = scale * torch.randn(256, 20, dtype=torch.float64)
        changes = (other(x) - model(x)).abs().amax(1)
        bound = one.slope * x.norm(dim=1) + one.offset
        assert bool((changes <= bound * (1 + 1e-9) + 1e-12 * max(scale, 1.0)).all())
        assert (float(changes.max()) > 1e-6) == (spread > 0.0)
    said = " ".join(str(found).split())
    assert "together in layer 0: 4 merges drop 8 neurons and save 232 parameters;" in said
    assert json.loads(json.dumps(found.to_dict()))["together"][0]["saved"] == 232


def test_merges_are_shown_in_a_page_and_in_notebooks(tmp_path, capsys):
    torch.manual_seed(0)
    hostile = "<script>alert(1)</script>\x1b[31m"
    state = names((f"{hostile}.0.weight", (16, 20)), (f"{hostile}.2.weight", (8, 16)))
    for x in state.values():
        x[4] = x[3]
    found = report(state, merge=5)
    assert len(found.merges.found) == 1
    for html in (found.merges._repr_html_(), found._repr_html_(), found.to_html()):
        assert "keep 3 for 4" in html.replace("&nbsp;", " ")
        assert "near-duplicates that are not merged:" in html
        assert "&lt;script&gt;" in html
        assert "<script" not in html
    assert "\x1b" not in str(found.merges)
    assert "\x1b" not in found.merges._repr_html_()
    assert "What could be merged" not in report(state).to_html()
    torch.save(state, tmp_path / "a.pt")
    page = tmp_path / "a.html"
    assert main(["report", str(tmp_path / "a.pt"), "--merge", "--html", str(page)]) == 0
    assert "<h2>What could be merged</h2>" in page.read_text(encoding="utf-8")
    capsys.readouterr()


def test_a_weight_that_a_model_uses_by_itself_is_told_with_the_way_out():
    torch.manual_seed(0)
    model = Autoencoder()
    with torch.no_grad():
        model.W_enc[:, 3] = model.W_enc[:, 4]
    (one,) = merges(model, include="W_enc").not_followed
    assert one.reason.endswith("merges(model.state_dict()) goes by names")
    assert len(merges(model.state_dict()).found) == 1


def test_what_lies_between_in_a_file_is_named():
    state = names(("fc1.weight", (8, 6)), ("norm.weight", (8,)), ("fc2.weight", (4, 8)))
    state["fc1.weight"][1] = state["fc1.weight"][0]
    assert merges(state).not_followed == (("fc1", "norm lies between in the file"),)
    state = names(("fc1.weight", (8, 6)), ("fc2.weight", (4, 8)), ("norm.weight", (8,)))
    state["fc1.weight"][1] = state["fc1.weight"][0]
    assert merges(state).not_followed == (("fc1", "a norm beside it may lie between"),)


class Dropping(nn.Module):
    """A dropout that is a function, which by default is active in eval mode as well."""

    def __init__(self, **settings):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 4)
        self.settings = settings

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        if "training" in self.settings:
            x = nn.functional.dropout(x, 0.5, training=self.training)
        else:
            x = nn.functional.dropout(x, 0.5)
        return self.fc2(x)


def test_a_dropout_that_is_always_active_ends_the_way():
    assert merges(Dropping(training=None)).pairs == (("fc1", "fc2"),)
    assert merges(Dropping()).pairs == ()
