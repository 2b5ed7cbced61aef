"""State dicts without their model give the neurons that the model gives, as far as names and shapes tell."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_hsu._neurons.select import select
from lightning_hsu._neurons.state_dict import neurons_of_state_dict


class HuggingFaceConv1D(nn.Module):
    """The transposed Linear of GPT-2."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 18)), nn.Parameter(torch.zeros(18))


def pruned():
    layer = nn.Linear(6, 4)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


def pruned_all(layer, *names):
    for name in names:
        prune.l1_unstructured(layer, name, amount=0.3)
    return layer


def normed(layer, *names, norm=parametrizations.weight_norm):
    """Weight norm as it is in training: lengths are not those of the stored directions."""
    torch.manual_seed(0)
    for name in names or ("weight",):
        layer = norm(layer, name)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.endswith(("original0", "_g")):
                p *= torch.randn_like(p).mul(2.0).exp()
    return layer


SAME = {
    "linear": lambda: nn.Linear(6, 4),
    "convolution": lambda: nn.Conv2d(3, 8, 3),
    "convolution in one dimension": lambda: nn.Conv1d(3, 8, 3),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
    "transposed": lambda: nn.ConvTranspose2d(3, 8, 3),
    "transposed, grouped": lambda: nn.ConvTranspose2d(6, 8, 3, groups=2),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "attention of other widths": lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4),
    "LSTM": lambda: nn.LSTM(5, 8, num_layers=2, bidirectional=True),
    "LSTM with a projection": lambda: nn.LSTM(5, 8, proj_size=4),
    "GRU": lambda: nn.GRU(5, 8),
    "RNN": lambda: nn.RNN(5, 8),
    "LSTMCell": lambda: nn.LSTMCell(5, 8),
    "embedding": lambda: nn.Embedding(9, 4),
    "bilinear": lambda: nn.Bilinear(3, 4, 8),
    "pruned": pruned,
    "pruned attention": lambda: pruned_all(nn.MultiheadAttention(8, 2), "in_proj_weight"),
    "pruned LSTM": lambda: pruned_all(nn.LSTM(5, 8), "weight_ih_l0", "weight_hh_l0"),
    "weight norm": lambda: normed(nn.Linear(6, 4)),
    "weight norm of a convolution": lambda: normed(nn.Conv1d(3, 8, 3)),
    "weight norm of a transposed convolution": lambda: normed(nn.ConvTranspose1d(3, 8, 3)),
    "weight norm of an LSTM": lambda: normed(nn.LSTM(5, 8), "weight_ih_l0", "weight_hh_l0"),
    "older weight norm of a transposed convolution": lambda: normed(
        nn.ConvTranspose1d(3, 8, 3), norm=nn.utils.weight_norm
    ),
    "weight norm with one length": lambda: normed(
        nn.Linear(6, 4), norm=lambda x, name: nn.utils.weight_norm(x, name, dim=None)
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("last", [nn.Linear(8, 5), nn.Conv1d(8, 5, 1)], ids=["Linear", "Conv1d"])
@pytest.mark.parametrize("kind", SAME)
def test_as_the_model(kind, last):
    model = nn.Sequential(SAME[kind](), nn.BatchNorm1d(8), last)
    if kind == "embedding":  # which is one by its name only
        model = nn.ModuleDict({"embed": model[0], "norm": model[1], "last": last})
    wanted = {(one.name, one.head): one.neurons() for one in select(model, everything=True)[0]}
    candidates = neurons_of_state_dict(model.state_dict())
    found = {(one.name, one.head): one.neurons() for one in select(candidates, everything=True)[0]}
    assert list(found) == list(wanted)
    exact = "norm" not in kind  # of which the parts are multiplied in another order
    for name, x in wanted.items():
        torch.testing.assert_close(
            found[name], x.detach(), **({"rtol": 0, "atol": 0} if exact else {})
        )
    assert not candidates.not_weights


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
        lambda: parametrizations.spectral_norm(nn.Linear(6, 4)),
        pytest.param(
            lambda: nn.utils.weight_norm(nn.Linear(6, 4)),
            marks=pytest.mark.filterwarnings("ignore::FutureWarning"),
        ),
    ],
)
def test_directions_where_lengths_are_stored_apart(make):
    model = nn.Sequential(make()).eval()
    with torch.no_grad():
        model(torch.randn(2, 6))
    (found,) = select(neurons_of_state_dict(model.state_dict()))[0]
    cosine = nn.functional.cosine_similarity(found.neurons()[0], model[0].weight, dim=1)
    torch.testing.assert_close(cosine, torch.ones(4))


def test_what_is_computed_is_left_out_with_the_way_out():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 4)), nn.Linear(4, 3))
    candidates = neurons_of_state_dict(model.state_dict())
    assert [one.name for one in select(candidates)[0]] == ["1"]
    assert any("report the model itself" in skip.reason for skip in candidates.not_weights)


def test_a_bias_tells_which_axis_holds_the_outputs():
    model = nn.Sequential(HuggingFaceConv1D(), nn.Linear(18, 2))
    first = select(neurons_of_state_dict(model.state_dict()))[0][0]
    assert first.shape == (1, 18, 6)
    assert torch.equal(first.neurons()[0], model[0].weight.T)


def test_wrappers_names_and_ties():
    model = nn.ModuleDict(
        {
            "wte": nn.Embedding(20, 8),
            "body": nn.Linear(8, 8),
            "lm_head": nn.Linear(8, 20, bias=False),
        }
    )
    model["lm_head"].weight = model["wte"].weight
    state = {f"module._orig_mod.{name}": x for name, x in model.state_dict().items()}
    targets, skips = select(neurons_of_state_dict(state), everything=True)
    assert [(one.name, one.head) for one in targets] == [("body", False), ("lm_head", True)]
    assert [(skip.name, skip.reason) for skip in skips] == [("wte", "tied to lm_head")]


@pytest.mark.parametrize(
    "state",
    [
        {"att.w_v": (8, 4), "att.w_g": (8, 8)},
        {"att.weight_v": (4, 8), "att.weight_g": (6, 8)},
        {"att.weight_v": (8, 8), "att.weight_g": (8, 8)},
        {"att.attn_orig": (4, 8), "att.attn_mask": (8, 8)},
        {"att.kernel": (4, 8), "att.kernel_orig": (4, 8)},
        {"att.time_mix_v": (1, 1, 8), "att.time_mix_g": (1, 1, 8)},
    ],
)
def test_names_like_those_of_weight_norm_and_pruning(state):
    candidates = neurons_of_state_dict(
        {name: torch.randn(shape) for name, shape in state.items()}
        | {"fc.weight": torch.randn(6, 8)}
    )
    found = {one.name for one in select(candidates)[0]}
    assert "fc" in found
    left_out = {skip.name for skip in candidates.not_weights}
    assert (found - {"fc"}) | left_out == set(state)  # each for itself


def test_two_originals_are_no_weight_norm():
    class Product(nn.Module):
        def forward(self, u, v):
            return u @ v

        def right_inverse(self, weight):
            return torch.randn(4, 2), torch.randn(2, 8)

    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Product(), unsafe=True)
    candidates = neurons_of_state_dict(model.state_dict())
    assert [one.name for one in select(candidates)[0]] == ["1"]
    assert {skip.reason for skip in candidates.not_weights} == {
        "computed by a parametrization that is not stored with it: report the model itself"
    }


@pytest.mark.parametrize(
    "odd",
    [
        {"a.parametrizations.weight": (4, 4)},
        {"a.in_proj_weight": (2, 4)},
        {"a.weight_ih_l0": (4, 3), "a.weight_hh_l0": (4, 0)},
        {"a.weight": (5, 0), "a.bias": (3,)},
        {"a.in_proj_weight": (6, 4, 3, 3)},
    ],
)
def test_odd_weights_do_not_stop_the_others(odd):
    candidates = neurons_of_state_dict(
        {name: torch.randn(shape) for name, shape in odd.items()} | {"fc.weight": torch.randn(6, 8)}
    )
    assert "fc" in [one.name for one in select(candidates)[0]]


def test_weight_norm_of_few_bits():
    v = torch.randn(4, 8).to(torch.float8_e4m3fn)
    (found,) = select(neurons_of_state_dict({"weight_v": v, "weight_g": torch.ones(4, 1)}))[0]
    torch.testing.assert_close(found.neurons()[0].norm(dim=1), torch.ones(4))


def test_what_is_named_like_no_weight_is_taken_when_asked_for():
    state = {"fc.weight": torch.randn(3, 4), "tokens": torch.randn(7, 4), "count": torch.tensor(3)}
    candidates = neurons_of_state_dict(state)
    assert [skip.name for skip in candidates.not_weights] == ["tokens"]
    candidates = neurons_of_state_dict(state, "tokens")
    assert not candidates.not_weights
    assert {one.name: one.shape for one in select(candidates)[0]} == {
        "fc": (1, 3, 4),
        "tokens": (1, 7, 4),
    }


def test_layers_are_in_the_order_of_a_model():
    names = ["a.x.weight", "c.weight", "a.weight", "a.y.weight", "weight"]
    candidates = neurons_of_state_dict({name: torch.randn(3, 4) for name in names})
    assert [one.name for one in candidates.sets] == ["weight", "a", "a.x", "a.y", "c"]


def test_integers_are_left_out_with_the_reason():
    state = {"a.weight": torch.randn(4, 4), "b.weight": torch.zeros(4, 4, dtype=torch.int8)}
    assert "torch.int8, not floating-point" in select(neurons_of_state_dict(state))[1][0].reason


@pytest.mark.parametrize("wrong", [{}, {"epoch": 3}, [1]])
def test_no_state_dict(wrong):
    with pytest.raises(TypeError, match="maps names to tensors"):
        neurons_of_state_dict(wrong)
