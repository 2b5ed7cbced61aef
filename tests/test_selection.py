"""From modules to neurons: one table of layers, and the errors and reasons a user reads."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_hsu import UniformityRegularizer, register_neurons
from lightning_hsu._neurons.rules import _RULES
from lightning_hsu._neurons.select import select
from lightning_hsu.measures import RieszEnergy
from lightning_hsu.report import report
from tests.plain import HALF_SPACE


class Custom(nn.Module):
    """Neurons in the columns of a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 7))


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 7))
        self.gain = nn.Parameter(torch.ones(5))


@pytest.fixture(autouse=True)
def _custom_rule():
    register_neurons(Custom, lambda module: {"columns": module.kernel.T})
    yield
    del _RULES[Custom]


@dataclass
class Case:
    name: str
    make: Any
    expected: dict[str, Any]  # target name -> its neurons, from the module, (groups, n, d)


def gate(name, i, count):
    return lambda m: getattr(m, name).chunk(count)[i][None]


CASES = [
    Case("Linear", lambda: nn.Linear(5, 4), {"weight": lambda m: m.weight[None]}),
    Case("Bilinear", lambda: nn.Bilinear(3, 2, 4), {"weight": lambda m: m.weight.reshape(1, 4, 6)}),
    Case("Conv1d", lambda: nn.Conv1d(3, 4, 5), {"weight": lambda m: m.weight.reshape(1, 4, 15)}),
    Case("Conv2d", lambda: nn.Conv2d(3, 4, 2), {"weight": lambda m: m.weight.reshape(1, 4, 12)}),
    Case("Conv3d", lambda: nn.Conv3d(2, 4, 2), {"weight": lambda m: m.weight.reshape(1, 4, 16)}),
    Case(
        "grouped Conv2d",
        lambda: nn.Conv2d(6, 4, 3, groups=2),
        {"weight": lambda m: m.weight.reshape(2, 2, 27)},
    ),
    Case(
        "channels_last Conv2d",
        lambda: nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last),
        {"weight": lambda m: m.weight.reshape(1, 4, 12)},
    ),
    Case(
        "ConvTranspose2d",
        lambda: nn.ConvTranspose2d(3, 4, 2),
        {"weight": lambda m: torch.stack([m.weight[:, i].flatten() for i in range(4)])[None]},
    ),
    Case(
        "grouped ConvTranspose1d",
        lambda: nn.ConvTranspose1d(6, 4, 3, groups=2),
        {
            "weight": lambda m: torch.stack(
                [
                    torch.stack([m.weight[3 * g : 3 * g + 3, i].flatten() for i in range(2)])
                    for g in range(2)
                ]
            )
        },
    ),
    Case(
        "MultiheadAttention",
        lambda: nn.MultiheadAttention(6, 2),
        {
            "q": lambda m: m.in_proj_weight[None, :6],
            "k": lambda m: m.in_proj_weight[None, 6:12],
            "v": lambda m: m.in_proj_weight[None, 12:],
            "out_proj": lambda m: m.out_proj.weight[None],
        },
    ),
    Case(
        "MultiheadAttention with its own key size",
        lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=5),
        {
            "q": lambda m: m.q_proj_weight[None],
            "k": lambda m: m.k_proj_weight[None],
            "v": lambda m: m.v_proj_weight[None],
            "out_proj": lambda m: m.out_proj.weight[None],
        },
    ),
    Case(
        "LSTM with projection",
        lambda: nn.LSTM(5, 4, proj_size=3),
        {f"weight_ih_l0.{g}": gate("weight_ih_l0", i, 4) for i, g in enumerate("ifgo")}
        | {f"weight_hh_l0.{g}": gate("weight_hh_l0", i, 4) for i, g in enumerate("ifgo")}
        | {"weight_hr_l0": lambda m: m.weight_hr_l0[None]},
    ),
    Case(
        "bidirectional GRU",
        lambda: nn.GRU(5, 4, bidirectional=True),
        {
            f"weight_{k}_l0{r}.{g}": gate(f"weight_{k}_l0{r}", i, 3)
            for r in ("", "_reverse")
            for k in ("ih", "hh")
            for i, g in enumerate("rzn")
        },
    ),
    Case(
        "RNN",
        lambda: nn.RNN(5, 4),
        {f"weight_{k}_l0": gate(f"weight_{k}_l0", 0, 1) for k in ("ih", "hh")},
    ),
    Case(
        "LSTMCell",
        lambda: nn.LSTMCell(5, 4),
        {
            f"weight_{k}.{g}": gate(f"weight_{k}", i, 4)
            for k in ("ih", "hh")
            for i, g in enumerate("ifgo")
        },
    ),
    Case(
        "GRUCell",
        lambda: nn.GRUCell(5, 4),
        {
            f"weight_{k}.{g}": gate(f"weight_{k}", i, 3)
            for k in ("ih", "hh")
            for i, g in enumerate("rzn")
        },
    ),
    Case("Embedding, asked for", lambda: nn.Embedding(6, 4), {"weight": lambda m: m.weight[None]}),
    Case(
        "weight_norm",
        lambda: parametrizations.weight_norm(nn.Linear(5, 4)),
        {"weight": lambda m: m.weight[None]},
    ),
    Case(
        "orthogonal",
        lambda: parametrizations.orthogonal(nn.Linear(5, 4)),
        {"weight": lambda m: m.weight[None]},
    ),
    Case(
        "spectral_norm",
        lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 2)),
        {"weight": lambda m: m.eval().weight.reshape(1, 4, 12)},
    ),
    Case("a layer of one's own", Custom, {"columns": lambda m: m.kernel.T[None]}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_neurons_of(case):
    module = case.make()
    targets, _ = select(module, include="*")
    assert [target.name for target in targets] == list(case.expected)
    for target in targets:
        expected = case.expected[target.name](module)
        assert target.shape == expected.shape
        assert torch.equal(target.neurons(), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_gradient_reaches_the_parameters_of(case):
    """add_gradients equals backward through the effective weight, parameter by parameter."""
    module = case.make()
    regularizer = UniformityRegularizer(
        RieszEnergy(s=1), 0.7, include="*", head=None, step_limit=None
    ).attach(module)
    for p in module.parameters():
        p.grad = torch.full_like(p, 0.25)
    regularizer.add_gradients(torch.optim.SGD(module.parameters(), lr=0.1))
    module.eval()
    terms = [
        RieszEnergy(s=1).penalty(expected(module)).mean() for expected in case.expected.values()
    ]
    gradients = torch.autograd.grad(
        0.7 * torch.stack(terms).sum(), list(module.parameters()), allow_unused=True
    )
    touched = 0
    for p, gradient in zip(module.parameters(), gradients, strict=True):
        added = p.grad - 0.25
        torch.testing.assert_close(
            added, torch.zeros_like(p) if gradient is None else gradient, rtol=1e-4, atol=1e-6
        )
        touched += int(added.abs().max() > 1e-4)
    assert (
        touched >= 1 or "orthogonal" in case.name
    )  # orthogonal rows are where they should be already


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_older_hook_based_norms():
    for wrap in (nn.utils.weight_norm, nn.utils.spectral_norm):
        layer = wrap(nn.Linear(5, 4))
        layer(torch.randn(2, 5)).sum().backward()  # frees the graph behind layer.weight
        regularizer = UniformityRegularizer(RieszEnergy(s=1), head=None).attach(layer)
        before = [p.grad.clone() for p in layer.parameters()]
        regularizer.add_gradients(torch.optim.SGD(layer.parameters(), lr=0.1))
        assert any(
            not torch.equal(p.grad, b) for p, b in zip(layer.parameters(), before, strict=True)
        )


class Container(nn.Module):
    """A layer of one's own around another."""

    def __init__(self):
        super().__init__()
        self.inner = parametrizations.spectral_norm(nn.Linear(5, 4))


@pytest.mark.parametrize(
    "make", [lambda: parametrizations.spectral_norm(nn.Linear(5, 4)), Container]
)
def test_reading_a_spectral_norm_changes_no_state(make):
    register_neurons(Container, lambda module: module.inner.weight)
    layer = make()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    regularizer = UniformityRegularizer().attach(layer)
    regularizer.measure_layers()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert all(m.training for m in layer.modules())
    del _RULES[Container]


def test_pruned_weights_are_read_with_their_mask():
    layer = nn.utils.prune.l1_unstructured(nn.Linear(5, 4), "weight", amount=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    regularizer = UniformityRegularizer(RieszEnergy(s=1), head=None).attach(layer)
    for _ in range(2):  # the graph behind layer.weight is freed by each backward
        optimizer.zero_grad()
        layer(torch.randn(2, 5)).square().sum().backward()
        regularizer.add_gradients(optimizer)
        optimizer.step()
    assert torch.equal(
        regularizer.layers[0].target.neurons()[0], layer.weight_orig * layer.weight_mask
    )
    assert (layer.weight_orig.grad[layer.weight_mask == 0] == 0).all()


def test_parametrized_weights_are_read_without_autocast():
    layer = parametrizations.orthogonal(nn.Linear(6, 6))
    (target,), _ = select(layer)
    with torch.autocast("cpu", torch.bfloat16):
        inside = target.neurons()
    assert torch.equal(inside, target.neurons())
    assert inside.dtype == torch.float32


def test_a_head_coefficient_needs_a_head():
    with pytest.raises(ValueError, match="head_coefficient is given, but no head is measured"):
        UniformityRegularizer(head_coefficient=1.0, exclude="decoder").attach(nested())
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    regularizer = UniformityRegularizer(None, 1.0, head_coefficient=2.0).attach(convolutions)
    assert [layer.strength for layer in regularizer.layers] == [1.0, 1.0]
    convolutions(torch.randn(2, 3, 8, 8))
    assert [layer.strength for layer in regularizer.layers] == [1.0, 2.0]


def reasons(model, **kwargs):
    return {skip.name: skip.reason for skip in select(model, **kwargs)[1]}


def test_every_skip_has_its_reason():
    model = nn.ModuleDict(
        {
            "one": nn.Linear(5, 1),
            "line": nn.Linear(1, 5),
            "depthwise": nn.Conv2d(6, 6, 3, groups=6),
            "words": nn.Embedding(10, 4),
            "unknown": Unknown(),
            "norm": nn.LayerNorm(4),
            "kept": nn.Linear(5, 4),
            "left": nn.Linear(5, 4),
            "frozen": nn.Linear(5, 4).requires_grad_(False),
            "quantized": nn.Linear(5, 4),
        }
    )
    model["twin"] = nn.Linear(5, 4)
    model["twin"].weight = model["kept"].weight
    model["quantized"].weight = nn.Parameter(
        torch.ones(4, 5, dtype=torch.int8), requires_grad=False
    )
    targets, _ = select(model, exclude="left")
    assert [target.name for target in targets] == ["frozen", "twin"]
    assert reasons(model, exclude="left") == {
        "one": "a single neuron",
        "line": "its neurons have dimension 1: on a line there is nothing to spread",
        "depthwise": "depthwise: each of its 6 groups has one neuron",
        "words": "an embedding, measured only when asked for: neurons={'words': 'rows'}",
        "unknown.matrix": "no rule for tests.test_selection.Unknown: neurons={'unknown.matrix': "
        "'rows'} or 'columns', or see register_neurons",
        "left": "excluded by pattern",
        "kept": "tied to twin",  # the last Linear is the head, and counts
        "quantized": "torch.nn.modules.linear.Linear: its weights are torch.int8, not "
        "floating-point; measure the model before it is quantised, or leave this layer out with "
        "exclude",
    }
    table = " ".join(UniformityRegularizer(exclude="left").attach(model).table().split())
    for name, reason in reasons(model, exclude="left").items():
        assert name in table
        assert reason in table
    assert "1 layer frozen" in table


def test_tied_embedding_and_head_count_once():
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(10, 4),
            "body": nn.Linear(4, 4),
            "head": nn.Linear(4, 10, bias=False),
        }
    )
    model["head"].weight = model["words"].weight
    targets, skips = select(model, include="*")
    assert [(target.name, target.head) for target in targets] == [("body", False), ("head", True)]
    assert [(skip.name, skip.reason) for skip in skips] == [("words", "tied to head")]
    assert [target.name for target in select(model, include="*", exclude="head", head=None)[0]] == [
        "words",
        "body",
    ]
    assert [target.name for target in select(model)[0]] == ["body", "head"]


def nested():
    return nn.ModuleDict(
        {"encoder": nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)), "decoder": nn.Linear(6, 4)}
    )


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({}, ["encoder.0", "encoder.1", "decoder"]),
        ({"include": "encoder"}, ["encoder.0", "encoder.1"]),
        ({"include": "enc*.1"}, ["encoder.1"]),
        ({"include": ["encoder.0", "decoder"]}, ["encoder.0", "decoder"]),
        ({"exclude": "encoder"}, ["decoder"]),
        ({"include": "encoder", "exclude": "*.0"}, ["encoder.1"]),
        ({"include": "encoder", "head": "decoder"}, ["encoder.0", "encoder.1", "decoder"]),
    ],
)
def test_patterns(kwargs, names):
    assert [target.name for target in select(nested(), **kwargs)[0]] == names


@pytest.mark.parametrize(
    ("head", "expected"), [("auto", "decoder"), ("encoder.0", "encoder.0"), (None, None)]
)
def test_head(head, expected):
    layers = (
        UniformityRegularizer(HALF_SPACE, 1.0, head=head, head_coefficient=3.0 if head else None)
        .attach(nested())
        .layers
    )
    assert [layer.target.name for layer in layers if layer.target.head] == (
        [expected] if expected else []
    )
    for layer in layers:
        assert layer.measure.half_space != layer.target.head
        assert layer.strength == (3.0 if layer.target.head else 1.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"include": "conv*"},
            r"include pattern 'conv\*' matches no layer; the layers are: encoder.0, encoder.1, decoder",
        ),
        ({"exclude": ["decoder", "x"]}, r"exclude pattern 'x' matches no layer"),
        (
            {"head": "classifier"},
            r"head 'classifier' is no layer of the model; .*head=None switches it off",
        ),
        ({"include": 5}, "include takes a pattern or a list of patterns"),
        (
            {"exclude": "*"},
            r"(?s)no layer of ModuleDict is left to measure; .*encoder.0 \(1, 5, 4\): excluded by pattern",
        ),
    ],
)
def test_errors_say_what_where_and_the_way_out(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        select(nested(), **kwargs)


def test_a_model_without_neurons():
    with pytest.raises(ValueError, match="no neurons found in Sequential: it has no weight matrix"):
        select(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (
            lambda module: 3,
            TypeError,
            "the rule for Custom gave int for layer 'weight'; it must give a tensor",
        ),
        (
            lambda module: module.kernel.detach(),
            ValueError,
            "the rule for Custom gave detached neurons for layer 'weight'",
        ),
    ],
)
def test_a_rule_that_gives_no_neurons(rule, error, message):
    register_neurons(Custom, rule)
    with pytest.raises(error, match=message):
        select(Custom())


def test_a_rule_is_for_a_class():
    with pytest.raises(TypeError, match="takes the class of a layer"):
        register_neurons(Custom(), lambda module: module.kernel)


def test_the_padding_row_is_no_neuron():
    for padding, rows in ((0, [1, 2, 3, 4]), (4, [0, 1, 2, 3]), (2, [0, 1, 3, 4])):
        layer = nn.Embedding(5, 6, padding_idx=padding)
        nn.init.normal_(layer.weight)
        (target,), _ = select(layer, include="*")
        assert torch.equal(target.neurons()[0], layer.weight[rows])
        layer.weight.grad = torch.zeros_like(layer.weight)
        UniformityRegularizer(include="*").attach(layer).add_gradients(
            torch.optim.SGD(layer.parameters(), lr=0.1)
        )
        assert (layer.weight.grad[padding] == 0).all()
        assert (layer.weight.grad[rows] != 0).any()


def test_what_has_no_rows_or_no_shape_is_left_out_with_a_reason():
    model = nn.Sequential(nn.Embedding(1, 4, padding_idx=0), nn.LazyLinear(4), nn.Linear(4, 4))
    targets, skips = select(model, include="*")
    assert [target.name for target in targets] == ["2"]
    assert {skip.name: skip.reason for skip in skips} == {
        "0": "a single neuron",
        "1": "a lazy layer that has seen no batch: it has no shape yet",
    }


@pytest.mark.parametrize("padding", [None, 0, 2, 9])
def test_a_tied_embedding_with_padding_counts_once(padding):
    model = nn.ModuleDict(
        {"words": nn.Embedding(10, 4, padding_idx=padding), "head": nn.Linear(4, 10, bias=False)}
    )
    model["head"].weight = model["words"].weight
    targets, skips = select(model, include="*")
    assert [target.name for target in targets] == ["head"]
    assert skips[0].reason == "tied to head"


class OwnCell(nn.LSTMCell):
    pass


@pytest.mark.parametrize(
    ("make", "gates"),
    [
        (lambda: parametrizations.weight_norm(nn.LSTMCell(5, 4), "weight_hh"), "ifgo"),
        (lambda: parametrizations.weight_norm(nn.GRUCell(5, 4), "weight_hh"), "rzn"),
        (lambda: OwnCell(5, 4), "ifgo"),
    ],
)
def test_parametrized_and_derived_cells_keep_their_gates(make, gates):
    assert [t.name for t in select(make())[0]] == [
        f"weight_{k}.{g}" for k in ("ih", "hh") for g in gates
    ]


def test_sparse_gradients_are_refused_with_the_way_out():
    layer = nn.Embedding(5, 6, sparse=True)
    with pytest.raises(ValueError, match=r"weight \(1, 5, 6\): .* sparse .* with sparse=False"):
        UniformityRegularizer(include="*").attach(layer)
    assert UniformityRegularizer(include="*", coefficient=0).attach(layer).layers
    layer.sparse = False  # set again later, by somebody else
    regularizer = UniformityRegularizer(include="*", head=None).attach(layer)
    layer.sparse = True
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        NotImplementedError,
        match=r"layer 'weight' \(1, 5, 6\) has sparse gradients.*use sparse=False",
    ):
        regularizer.add_gradients(torch.optim.SGD(layer.parameters(), lr=0.1))


def test_a_rule_that_gives_the_wrong_shape():
    register_neurons(Custom, lambda module: module.kernel[0])
    with pytest.raises(
        ValueError, match=r"the rule for Custom gave neurons of shape \(7,\) for layer 'weight'"
    ):
        select(Custom())


def test_names_do_not_show_wrappers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0] = torch.compile(model[0], backend="eager")
    assert [target.name for target in select(model)[0]] == ["0", "1"]


@pytest.mark.parametrize("function", [lambda w: w.to_sparse(), lambda w: w.to("meta")])
def test_a_function_that_gives_no_dense_neurons_is_named(function):
    for source in (nn.Sequential(nn.Linear(6, 5)), {"0.weight": torch.randn(5, 6)}):
        with pytest.raises(ValueError, match=r"for layer '0' .*it must give a dense tensor"):
            report(source, neurons={"0": function})
