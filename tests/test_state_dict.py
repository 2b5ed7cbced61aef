"""State dicts without their model give the neurons that the model gives, as far as names and shapes tell."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_hsu._neurons.model import neurons_of_model
from lightning_hsu._neurons.select import select
from lightning_hsu._neurons.state_dict import neurons_of_state_dict
from lightning_hsu.report import report


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


@pytest.mark.parametrize("prefix", ["", "a."])
def test_a_copy_under_a_wrapper_keeps_a_name_of_its_own(prefix):
    plain, wrapped = f"{prefix}fc", f"{prefix}_orig_mod.fc"
    state = {f"{plain}.weight": torch.randn(4, 6), f"{wrapped}.weight": torch.randn(4, 6)}
    found = {one.name: one for one in neurons_of_state_dict(state).sets}
    assert list(found) == [plain, wrapped]
    for name, one in found.items():
        assert torch.equal(one.neurons()[0], state[f"{name}.weight"])
    asked = neurons_of_state_dict(state, neurons={wrapped: "columns"}).sets
    assert [one.shape for one in asked] == [(1, 4, 6), (1, 6, 4)]
    assert [layer.name for layer in report(state).layers] == [plain, wrapped]


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
    state = {"a.weight": torch.randn(4, 4)}
    reasons = {}
    for dtype in (torch.int8, torch.uint8, torch.int64):
        state["b.weight"] = torch.zeros(4, 4, dtype=dtype)
        (skip,) = select(neurons_of_state_dict(state))[1]
        assert skip.name == "b"
        reasons[dtype] = skip.reason
    for dtype in (torch.int8, torch.uint8):
        assert reasons[dtype] == (
            f"its weights are {dtype}, not floating-point, and no scale that fits lies beside them: "
            "report the model itself, or pass dequantised tensors"
        )
    assert reasons[torch.int64] == "its weights are torch.int64, not floating-point"


def test_codes_without_a_scale_alone_say_what_to_do():
    state = {"fc.weight": torch.zeros(32, 64, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"fc \(32, 64\): .* dequantised tensors"):
        select(neurons_of_state_dict(state))
    state["fc.weight_scale"] = torch.ones(32, 1)
    state["fc.weight"] = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    ((fc,), skips) = select(neurons_of_state_dict(state))
    assert (fc.name, fc.shape, skips) == ("fc", (1, 32, 64), [])


@pytest.mark.parametrize("wrong", [{}, {"epoch": 3}, [1]])
def test_no_state_dict(wrong):
    with pytest.raises(TypeError, match="maps names to tensors"):
        neurons_of_state_dict(wrong)


class Experts(nn.Module):
    """Matrices of experts, one below the other, and the atoms of a dictionary, one a column."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 6, 8))
        self.grid = nn.Parameter(torch.randn(2, 3, 6, 8))
        self.W_dec = nn.Parameter(torch.randn(4, 16))
        self.table_bias = nn.Parameter(torch.randn(5, 6))
        self.register_buffer("codes", torch.randn(7, 4))


def described():
    """A model with one of each kind of weight that ``neurons=`` may name."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "decoder": nn.Linear(12, 6),
            "embed": nn.Embedding(9, 4),
            "conv": nn.Conv2d(4, 8, 3),
            "up": nn.ConvTranspose1d(6, 8, 3, groups=2),
            "gpt": HuggingFaceConv1D(),
            "lstm": nn.LSTM(5, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "experts": Experts(),
            "pruned": pruned(),
            "normed": normed(nn.Linear(6, 4)),
            "head": nn.Linear(6, 10),
        }
    )


def halves(weight):
    """The two halves of a weight's columns as sets of rows."""
    return torch.stack(weight.chunk(2, -1))


WAYS = {
    "columns of a Linear": ({"decoder": "columns"}, {"decoder": (1, 12, 6)}),
    "its stored name": ({"decoder.weight": "columns"}, {"decoder": (1, 12, 6)}),
    "parts": ({"decoder": 3}, {f"decoder.{i}": (1, 2, 12) for i in range(3)}),
    "one part": ({"decoder": 1}, {"decoder": (1, 6, 12)}),
    "a function": ({"decoder": halves}, {"decoder": (2, 6, 6)}),
    "a head in parts": ({"head": 2}, {"head.0": (1, 5, 6), "head.1": (1, 5, 6)}),
    "rows of an embedding": ({"embed": "rows"}, {"embed": (1, 9, 4)}),
    "columns of an embedding": ({"embed": "columns"}, {"embed": (1, 4, 9)}),
    "rows of kernels": ({"conv": "rows"}, {"conv": (1, 8, 36)}),
    "columns of kernels": ({"conv": "columns"}, {"conv": (1, 4, 72)}),
    "parts of kernels": ({"conv": 2}, {"conv.0": (1, 4, 36), "conv.1": (1, 4, 36)}),
    "a function of kernels": (
        {"conv": lambda weight: weight.flatten(2).transpose(0, 2)},
        {"conv": (9, 4, 8)},
    ),
    "rows of transposed kernels": ({"up": "rows"}, {"up": (2, 4, 9)}),
    "rows as stored": ({"gpt": "rows"}, {"gpt": (1, 6, 18)}),
    "columns as stored": ({"gpt": "columns"}, {"gpt": (1, 18, 6)}),
    "a recurrent weight": (
        {"lstm.weight_ih_l0": 2},
        {"lstm.weight_ih_l0.0": (1, 16, 5), "lstm.weight_ih_l0.1": (1, 16, 5)},
    ),
    "weights packed together": (
        {"attention.in_proj_weight": "columns"},
        {"attention.in_proj_weight": (1, 8, 24)},
    ),
    "a bare parameter": ({"experts.W_dec": "columns"}, {"experts.W_dec": (1, 16, 4)}),
    "a stack": ({"experts.gate_up_proj": "rows"}, {"experts.gate_up_proj": (3, 6, 8)}),
    "columns of a stack": ({"*.gate_up_proj": "columns"}, {"experts.gate_up_proj": (3, 8, 6)}),
    "parts of a stack": (
        {"experts.gate*": 2},
        {"experts.gate_up_proj.0": (3, 3, 8), "experts.gate_up_proj.1": (3, 3, 8)},
    ),
    "a function of a stack": (
        {"experts.gate_up_proj": halves},
        {"experts.gate_up_proj": (6, 6, 4)},
    ),
    "a stack of stacks": ({"experts.grid": "columns"}, {"experts.grid": (6, 8, 6)}),
    "a buffer": ({"experts.codes": "rows"}, {"experts.codes": (1, 7, 4)}),
    "biases by their name": ({"experts.table_bias": "rows"}, {"experts.table_bias": (1, 5, 6)}),
    "the first pattern counts": (
        {"experts.W_dec": "columns", "experts.[gW]*": "rows"},
        {
            "experts.gate_up_proj": (3, 6, 8),
            "experts.grid": (6, 6, 8),
            "experts.W_dec": (1, 16, 4),
        },
    ),
    "pruned": ({"pruned.weight": "columns"}, {"pruned": (1, 6, 4)}),
    "weight norm": ({"normed.weight": "columns"}, {"normed": (1, 6, 4)}),
}


@pytest.mark.parametrize("case", WAYS)
def test_as_the_model_where_the_user_says_how(case):
    neurons, shapes = WAYS[case]
    model = described()
    candidates = neurons_of_model(model, None, neurons)
    wanted = {one.name: one for one in select(candidates)[0] if one.asked}
    candidates = neurons_of_state_dict(model.state_dict(), None, neurons)
    found = {one.name: one for one in select(candidates)[0] if one.asked}
    assert {name: one.shape for name, one in found.items()} == shapes
    assert list(found) == list(wanted)
    for name, one in wanted.items():
        assert one.shape == found[name].shape
        assert (one.head, one.layer) == (found[name].head, found[name].layer)
        torch.testing.assert_close(found[name].neurons(), one.neurons().detach())


@pytest.mark.parametrize("case", WAYS)
def test_other_weights_are_read_as_without(case):
    neurons, _ = WAYS[case]
    state = described().state_dict()
    before = {one.name: one for one in neurons_of_state_dict(state).sets}
    for one in neurons_of_state_dict(state, None, neurons).sets:
        if not one.asked:
            assert one.shape == before[one.name].shape
            assert one.kind == before[one.name].kind


def test_what_is_named_is_taken_once():
    candidates = neurons_of_state_dict(described().state_dict(), None, {"*": "rows"})
    assert not candidates.not_weights
    assert all(one.asked for one in candidates.sets)
    names = [one.name for one in candidates.sets]
    assert len(names) == len(set(names))
    assert "embed" in [one.name for one in select(candidates)[0]]


def test_the_effective_weight_is_given_to_a_function():
    model = nn.Sequential(normed(nn.Linear(6, 4)), nn.Linear(4, 3))
    given = []

    def transposed(weight):
        given.append(weight)
        return weight.T

    found = neurons_of_state_dict(model.state_dict(), None, {"0": transposed})
    assert [one.shape for one in found.sets] == [(1, 6, 4), (1, 3, 4)]
    torch.testing.assert_close(given[0], model[0].weight.detach())


def test_a_function_may_forget_the_graph():
    state = dict(nn.Linear(6, 4).named_parameters())
    (found,) = neurons_of_state_dict(state, None, {"weight": lambda weight: weight.data.T}).sets
    assert found.shape == (1, 6, 4)


def test_parts_of_tied_weights_are_not_tied_to_each_other():
    model = nn.ModuleDict({"wte": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    model["head"].weight = model["wte"].weight
    parts = {"wte": 2}
    targets, skips = select(neurons_of_state_dict(model.state_dict(), None, parts))
    assert [one.name for one in targets] == ["wte.0", "wte.1", "head"]
    assert not skips
    targets, skips = select(neurons_of_state_dict(model.state_dict(), None, {"wte": "rows"}))
    assert [one.name for one in targets] == ["head"]
    assert [skip.reason for skip in skips] == ["tied to head"]


def test_wrappers_are_no_part_of_a_pattern():
    state = {"module._orig_mod.a._fsdp_wrapped_module.W": torch.randn(4, 6)}
    (found,) = neurons_of_state_dict(state, None, {"a.W": "columns"}).sets
    assert (found.name, found.shape) == ("a.W", (1, 6, 4))


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ({"decodr": "rows"}, "'decodr' matches no weight; did you mean 'decoder'? The weights are"),
        ({"decoder.bias": "rows"}, "'decoder.bias' matches no weight"),
        ({"head": "rows", "nothing": 2}, "'nothing' matches no weight"),
    ],
)
def test_a_pattern_that_matches_nothing(neurons, message):
    model = described()
    with pytest.raises(ValueError, match=re.escape(message)):
        neurons_of_state_dict(model.state_dict(), None, neurons)
    with pytest.raises(ValueError, match=re.escape(message)):
        neurons_of_model(model, None, neurons)


@pytest.mark.parametrize(
    ("neurons", "error", "message"),
    [
        (
            {"decoder": 4},
            ValueError,
            "neurons={'decoder': 4}: the 6 rows of layer 'decoder' (6, 12) do not divide into 4",
        ),
        ({"conv": 3}, ValueError, "the 8 rows of layer 'conv' (8, 4, 3, 3) do not divide into 3"),
        (
            {"experts.W_dec": lambda weight: weight.flatten()},
            ValueError,
            "for layer 'experts.W_dec' (4, 16) gave shape (64,)",
        ),
        (
            {"experts": lambda weight: weight.view(5, -1)},
            ValueError,
            "for layer 'experts.gate_up_proj' (3, 6, 8) failed",
        ),
        ({"embed": lambda weight: weight.shape}, TypeError, "for layer 'embed' (9, 4) gave Size"),
    ],
)
def test_a_weight_that_is_not_as_the_user_says(neurons, error, message):
    model = described()
    candidates = neurons_of_state_dict(model.state_dict(), None, neurons)
    for source in (candidates, neurons_of_model(model, None, neurons)):
        with pytest.raises(error, match=re.escape(message)):
            select(source)
        (layer,) = neurons
        select(source, exclude=layer)  # then it does not matter


@pytest.mark.parametrize(
    ("neurons", "error", "message"),
    [
        (["decoder"], TypeError, "neurons maps patterns of names"),
        ({"decoder": "diagonal"}, ValueError, "neurons['decoder'] must be 'rows', 'columns'"),
        ({"decoder": 0}, ValueError, "must be at least 1 part"),
    ],
)
def test_no_way_of_holding_neurons(neurons, error, message):
    with pytest.raises(error, match=re.escape(message)):
        neurons_of_state_dict(described().state_dict(), None, neurons)


def test_what_cannot_be_read_is_told_even_if_it_is_named():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 4)), nn.Linear(4, 3))
    state = model.state_dict() | {
        "a.weight": torch.zeros(4, 4, dtype=torch.int8),
        "b.W": torch.empty(4, 4, device="meta"),
    }
    asked = {"0": "columns", "a": 3, "b.W": "columns"}
    candidates = neurons_of_state_dict(state, None, asked)
    targets, skips = select(candidates)
    assert [one.name for one in targets] == ["1"]
    (reason,) = [skip.reason for skip in skips if skip.name == "a"]
    assert reason.startswith("its weights are torch.int8, not floating-point, and no scale")
    reasons = {skip.name: skip.reason for skip in candidates.not_weights}
    assert "report the model itself" in reasons["0.parametrizations.weight.original"]
    assert "device meta" in reasons["b.W"]


def dictionary():
    model = nn.Module()
    model.encoder, model.decoder = nn.Linear(8, 32), nn.Linear(32, 8, bias=False)
    with torch.no_grad():
        model.decoder.weight[:, 7] = 2 * model.decoder.weight[:, 3]
    return model


def test_a_dictionary_under_weight_norm_is_read_by_its_columns():
    model = dictionary()
    nn.utils.parametrizations.weight_norm(model.decoder)
    state = model.state_dict()
    found = {one.name: one for one in neurons_of_state_dict(state).sets}
    assert found["decoder"].shape == (1, 32, 8)
    torch.testing.assert_close(found["decoder"].neurons()[0], model.decoder.weight.detach().T)


def test_a_dictionary_is_read_by_its_columns_in_a_file_too():
    model = dictionary()
    for source in (
        model,
        model.state_dict(),
        {f"sae.{k}": x for k, x in model.state_dict().items()},
    ):
        found = report(source)
        decoder = next(layer for layer in found.layers if layer.name.endswith("decoder"))
        assert (decoder.uniformity.neurons, decoder.uniformity.dimension) == (32, 8)
        assert [(pair.first, pair.second) for pair in decoder.pairs] == [(3, 7)]
        assert "read by columns, as a dictionary" in found.to_dict()["notes"][0]["note"]
        assert "read by columns, as a dictionary" in " ".join(str(found).split())
        assert "read by columns, as a dictionary" in found.to_html()
    alone = report({"decoder.weight": model.decoder.weight})
    assert alone.layers[0].uniformity.neurons == 8
    assert "if its columns are directions: neurons={'decoder': 'columns'}" in " ".join(
        str(alone).split()
    )


def test_bare_matrices_whose_names_say_what_they_hold():
    state = {
        "W_dec": torch.randn(32, 8),
        "W_enc": torch.randn(8, 32),
        "prototypes": torch.randn(5, 8),
    }
    shapes = {one.name: one.shape for one in neurons_of_state_dict(state).sets}
    assert shapes == {"W_dec": (1, 32, 8), "W_enc": (1, 32, 8), "prototypes": (1, 5, 8)}


ALONE = {
    "linear": lambda: nn.Linear(8, 6),
    "convolution 1d": lambda: nn.Conv1d(4, 6, 3),
    "convolution 2d": lambda: nn.Conv2d(4, 6, 3),
    "convolution 3d": lambda: nn.Conv3d(4, 6, 3),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "transposed 1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed 2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "bilinear": lambda: nn.Bilinear(4, 5, 6),
    "embedding": lambda: nn.Embedding(9, 5),
    "lstm": lambda: nn.LSTM(3, 8, proj_size=4),
    "rnn cell": lambda: nn.RNNCell(3, 4),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "transformer": lambda: nn.TransformerDecoderLayer(8, 2, 16),
    "adaptive softmax": lambda: nn.AdaptiveLogSoftmaxWithLoss(16, 20, [4, 10]),
}


@pytest.mark.parametrize("build", ALONE.values(), ids=ALONE.keys())
def test_the_state_dict_of_a_layer_alone(build):
    """Its weights have no path before them."""
    layer = build()
    expected = {one.name: one.shape for one in report(layer).layers}
    found = report(layer.state_dict())
    assert {one.name: one.shape for one in found.layers} == expected
    for name, note in found.notes:
        if name == "head":
            assert note.startswith(tuple(expected))


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        for i, (inputs, outputs, size) in enumerate([(8, 4, 1), (4, 4, 3), (4, 16, 1)]):
            layer = nn.Module()
            layer.convolution = nn.Conv2d(inputs, outputs, size, bias=False)
            layer.normalization = nn.BatchNorm2d(outputs)
            self.add_module(f"layer{i}", layer)


def test_counts_that_a_file_has_first_are_no_order():
    """safetensors sorts by type, so that the steps of all batch norms come first."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Bottleneck(), nn.Linear(16, 5))
    state = model.state_dict()
    by_type = dict(sorted(state.items(), key=lambda item: (item[1].ndim != 0, item[0])))
    assert next(iter(by_type)).endswith("num_batches_tracked")
    shapes = {layer.name: layer.shape for layer in report(model).layers}
    found = report(by_type)
    assert {layer.name: layer.shape for layer in found.layers} == shapes
    assert [name for name, _ in found.notes] == ["head"]


def test_two_names_of_one_weight_are_refused():
    with pytest.raises(ValueError, match=r"'\.weight' and 'weight' name the same weight"):
        report({".weight": torch.randn(8, 8), "weight": torch.randn(6, 8)})
