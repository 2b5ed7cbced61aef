"""The plan of a step: replayed while what it rests on stays, made anew where that changed, and short."""

import copy
import pickle
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_hsu import (
    LinearSchedule,
    Share,
    UniformityRegularizer,
    register_neurons,
)
from lightning_hsu._core import foreach
from lightning_hsu._engine import plan
from lightning_hsu._engine.buffered import BufferedUpdates
from lightning_hsu._engine.plan import Plan
from lightning_hsu.measures import Covering, Measure, RieszEnergy
from tests.models import Automatic, loader, trainer
from tests.rounding import assert_near
from tests.tracing import Traced


def network():
    layers = (nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))
    return nn.Sequential(*layers)


def pictures():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 4)
    )


def with_zero_gradients(net):
    """An optimizer of all parameters, whose gradients are zero: what a step adds is theirs then."""
    for p in net.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return torch.optim.SGD(net.parameters(), lr=0.1)


def added(net, regularizer=None):
    """What one step adds to the gradients: of a regularizer attached before, or of a fresh one."""
    regularizer = regularizer or UniformityRegularizer().attach(net)
    regularizer.add_gradients(with_zero_gradients(net))
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


class Doubling(nn.Module):
    def forward(self, weight):
        return 2.0 * weight


def replaced_weight(net):
    net[0].weight = nn.Parameter(torch.randn(16, 12))


def weight_of_another_shape(net):
    net[0].weight = nn.Parameter(torch.randn(20, 12))
    net[0].bias = nn.Parameter(torch.zeros(20))
    net[2].weight = nn.Parameter(torch.randn(12, 20))


def assigned_state(net):
    state = {name: torch.randn_like(x) for name, x in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def other_data(net):
    net[0].weight.data = torch.randn(16, 12)


def transposed_data(net):
    net[0].weight.data = torch.randn(12, 16).T


def wider(net):
    net.double()


def pruned(net):
    prune.random_unstructured(net[0], "weight", amount=0.3)


def weight_norm(net):
    parametrizations.weight_norm(net[2])


def parametrized(net):
    parametrize.register_parametrization(net[0], "weight", Doubling())


def frozen(net):
    net[0].weight.requires_grad_(False)


def more_rows(net):
    net[0].weight.data = torch.cat([net[0].weight.data, torch.randn(3, 12)])


def fewer_rows(net):
    net[2].weight.data = net[2].weight.data[:5]


def computed_by_a_hook(net):
    class Halving:
        name = "weight"

        def compute_weight(self, module):
            return module.weight * torch.linspace(0.5, 1.0, module.weight.shape[1])

        def __call__(self, module, inputs):
            return None

    net[0].register_forward_pre_hook(Halving())


def another_layer(net):
    net[0] = nn.Linear(12, 16)


def a_wider_layer(net):
    net[0], net[2] = nn.Linear(12, 20), nn.Linear(20, 12)


def layers_in_other_places(net):
    net[2], net[4] = net[4], net[2]


def a_layer_in_an_activations_place(net):
    net[1] = nn.Linear(16, 16)


def a_further_layer(net):
    net.append(nn.Linear(5, 7))


def a_layer_within_a_new_block(net):
    net[3] = nn.Sequential(nn.ReLU(), nn.Linear(12, 12))


def a_layer_wrapped(net):
    net[2] = nn.Sequential(net[2], nn.ReLU())


def one_layer_less(net):
    del net[2:4]


def tied(net):
    net.append(nn.Linear(12, 16))
    net[5].weight = net[0].weight


def one_layer_twice(net):
    net[3] = net[2]


def a_scaled_layer(net):
    parametrize.register_parametrization(net[0], "weight", Doubling())
    parametrize.register_parametrization(net[2], "weight", Doubling())


CHANGES = [
    replaced_weight,
    weight_of_another_shape,
    assigned_state,
    other_data,
    transposed_data,
    wider,
    pruned,
    weight_norm,
    parametrized,
    frozen,
    more_rows,
    fewer_rows,
    computed_by_a_hook,
    another_layer,
    a_wider_layer,
    layers_in_other_places,
    a_layer_in_an_activations_place,
    a_further_layer,
    a_layer_within_a_new_block,
    a_layer_wrapped,
    one_layer_less,
    tied,
    one_layer_twice,
    a_scaled_layer,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_under_way_is_followed(change):
    net = network()
    regularizer = UniformityRegularizer(coefficient=0.5).attach(net)
    added(net, regularizer)
    change(net)
    found = added(net, regularizer)
    fresh = added(net)
    assert any(bool(part.any()) for part in found.values())
    assert found.keys() == fresh.keys()
    for name, part in fresh.items():
        assert_near(found[name], 0.5 * part)


def moved(net, regularizer=None):
    """How one move changes the weights: of a regularizer attached before, or of a fresh one."""
    regularizer = regularizer or UniformityRegularizer().attach(net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    regularizer.move(with_zero_gradients(net))
    return {name: p.detach() - before[name] for name, p in net.named_parameters()}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_under_way_is_followed_past_the_optimizer(change):
    net = network()
    regularizer = UniformityRegularizer().attach(net)
    moved(net, regularizer)
    change(net)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    found = moved(net, regularizer)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(start[name])
    fresh = moved(net)
    assert any(bool(part.any()) for part in found.values())
    assert found.keys() == fresh.keys()
    for name, part in fresh.items():
        torch.testing.assert_close(found[name], part, rtol=1e-4, atol=1e-7)


def with_weight_norm(net):
    parametrizations.weight_norm(net[2])


def without_weight_norm(net):
    parametrize.remove_parametrizations(net[2], "weight")


def with_older_weight_norm(net):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net[2])


def without_older_weight_norm(net):
    nn.utils.remove_weight_norm(net[2])


def without_scale(net):
    parametrize.remove_parametrizations(net[0], "weight", leave_parametrized=False)


def with_scale(net):
    parametrize.register_parametrization(net[0], "weight", Doubling())


def without_pruning(net):
    prune.remove(net[0], "weight")


def untied(net):
    net[5].weight = nn.Parameter(torch.randn(16, 12))


def untied_at_the_first(net):
    net[0].weight = nn.Parameter(torch.randn(16, 12))


def one_layer_twice_no_more(net):
    net[3] = nn.Linear(12, 12)


UNDONE = [
    (with_weight_norm, without_weight_norm),
    (with_older_weight_norm, without_older_weight_norm),
    (with_scale, without_scale),
    (pruned, without_pruning),
    (tied, untied),
    (tied, untied_at_the_first),
    (one_layer_twice, one_layer_twice_no_more),
    (a_further_layer, one_layer_less),
]


@pytest.mark.parametrize("act", [added, moved], ids=["gradient", "decoupled"])
@pytest.mark.parametrize(("before", "change"), UNDONE, ids=[f"{one[1].__name__}" for one in UNDONE])
def test_what_is_undone_under_way_is_followed(before, change, act):
    net = network()
    before(net)
    regularizer = UniformityRegularizer().attach(net)
    act(net, regularizer)
    change(net)
    start = copy.deepcopy(net.state_dict())
    found = act(net, regularizer)
    net.load_state_dict(start)
    fresh = act(net)
    assert any(bool(part.any()) for part in found.values())
    assert found.keys() == fresh.keys()
    for name, part in fresh.items():
        torch.testing.assert_close(found[name], part, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("layer", [nn.Linear(12, 16), nn.Embedding(16, 12, padding_idx=0)])
def test_other_data_under_a_gradient_that_stays_are_followed(layer):
    net = nn.Sequential(layer)
    regularizer = UniformityRegularizer(head=None, include="*").attach(net)
    optimizer = with_zero_gradients(net)
    regularizer.add_gradients(optimizer)
    optimizer.zero_grad(set_to_none=False)  # the gradient stays, laid out as it was
    layer.weight.data = torch.randn(12, 16).T
    regularizer.add_gradients(optimizer)
    kept = layer.weight.grad
    assert kept.stride() != layer.weight.stride()
    fresh = UniformityRegularizer(head=None, include="*").attach(net)
    assert_near(kept, added(net, fresh)["0.weight"])


def test_a_replaced_weight_keeps_the_step_limit_of_a_loss():
    net = network()
    regularizer = UniformityRegularizer(coefficient=1e4, step_limit=1e-3).attach(net)
    replaced_weight(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    loss = net(torch.randn(4, 12)).sum() * 0.0
    regularizer.add_to_loss(loss, optimizer)
    loss.backward()
    steps = net[0].weight.grad.norm(dim=1) / net[0].weight.detach().norm(dim=1)
    assert 0.5e-3 < steps.max() <= 1.001e-3
    regularizer.count_step(optimizer)
    assert regularizer.unreached() == []


def test_a_penalty_of_other_weights_leaves_nothing_behind():
    """torch.func puts other tensors in the place of parameters for one call."""

    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.regularizer = UniformityRegularizer().attach(self.net)

        def forward(self):
            return self.regularizer.penalty()

    module = Penalty()
    added(module.net, module.regularizer)
    before = module.regularizer._attached.plan
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    found = torch.func.grad(lambda w: torch.func.functional_call(module, w, ()))(weights)
    module.zero_grad()
    module().backward()
    for name, p in module.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        assert_near(found[name], expected)
    assert module.regularizer._attached.plan is before
    assert module.regularizer.unreached() == []


def scheduled(net):
    return UniformityRegularizer(coefficient=LinearSchedule(1.0, warmup=10)).attach(net)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_goes_on_where_the_original_stands(copied):
    net = network()
    regularizer = scheduled(net)
    optimizer = with_zero_gradients(net)
    for _ in range(5):
        regularizer.add_gradients(optimizer)
    twin = copied(regularizer)
    net = network()
    twin.attach(net).add_gradients(with_zero_gradients(net))
    assert twin.state_dict() == {"version": 1, "steps": [6]}
    assert set(twin.varying_coefficients().values()) == {6 / 11}


def test_an_optimizer_that_is_replaced_hands_on_its_count():
    net = network()
    regularizer = scheduled(net)
    for _ in range(20):
        regularizer.add_gradients(with_zero_gradients(net))
    assert regularizer.state_dict()["steps"] == [20]


def test_every_optimizer_has_its_own_count():
    """Also where one has the address of another that is gone, of other parameters."""
    net = network()
    regularizer = scheduled(net)
    with_zero_gradients(net)
    for i in (0, 2, 4):
        regularizer.add_gradients(torch.optim.SGD(net[i].parameters(), lr=0.1))
    assert regularizer.state_dict()["steps"] == [1, 1, 1]


def no_weight(net):
    del net[0].weight


def weight_of_none(net):
    net[0].register_parameter("weight", None)


def weight_without_rows(net):
    net[0].weight.data = torch.empty(0)


@pytest.mark.parametrize("change", [no_weight, weight_of_none, weight_without_rows])
def test_a_layer_that_can_no_longer_be_read_is_named_and_the_others_go_on(change):
    net = network()
    regularizer = UniformityRegularizer().attach(net)
    optimizer = with_zero_gradients(net)
    change(net)
    with pytest.warns(UserWarning, match="no longer measured, nor penalised: '0'"):
        regularizer.add_gradients(optimizer)
    assert [layer.name for layer in regularizer.layers] == ["2", "4"]
    assert net[2].weight.grad.any()
    regularizer.add_gradients(optimizer)  # told once


def test_another_model_begins_without_what_was_known_of_the_first():
    net, other = network(), network()
    regularizer = UniformityRegularizer().attach(net)
    added(net, regularizer)
    assert regularizer.unreached() == []
    regularizer.attach(other)
    assert regularizer.unreached() == ["0", "2", "4"]


class Slim(nn.Linear):
    """A weight that is a part of a larger parameter: so many rows."""

    def __init__(self):
        super().__init__(12, 16)
        self.full = nn.Parameter(self.weight.detach().clone())
        self.rows = 16
        del self.weight

    @property
    def weight(self):
        return self.full[: self.rows]


class Switched(nn.Module):
    """A parametrization that returns the weight itself until it is switched on."""

    on = False

    def forward(self, weight):
        return weight * torch.linspace(0.5, 1.0, weight.shape[1]) if self.on else weight


def test_a_weight_that_is_picked_or_computed_is_read_at_each_step():
    slim = nn.Sequential(Slim())
    regularizer = UniformityRegularizer(head=None).attach(slim)
    added(slim, regularizer)
    slim[0].rows = 5
    found, fresh = added(slim, regularizer)["0.full"], added_alone(slim)["0.full"]
    assert_near(found, fresh)
    assert not found[5:].any()
    net = nn.Sequential(nn.Linear(6, 9))
    switched = Switched()
    parametrize.register_parametrization(net[0], "weight", switched)
    regularizer = UniformityRegularizer(head=None).attach(net)
    added(net, regularizer)
    switched.on = True
    found, fresh = added(net, regularizer), added_alone(net)
    for name, part in fresh.items():
        assert_near(found[name], part)


class Picked(nn.Module):
    """A parametrization that picks one of two weights."""

    second = False

    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(torch.randn(9, 6))

    def forward(self, weight):
        return self.other if self.second else weight


def test_a_weight_that_depends_on_other_parameters_is_followed():
    """As where an adapter is switched, and no module or parameter is replaced."""
    net = nn.Sequential(nn.Linear(6, 9))
    picked = Picked()
    parametrize.register_parametrization(net[0], "weight", picked)
    regularizer = UniformityRegularizer(head=None).attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for second in (False, True, False):
        picked.second = second
        optimizer.zero_grad()
        (net(torch.randn(4, 6)) * 0.0).sum().backward()
        regularizer.add_gradients(optimizer)
        found = picked.other.grad if second else net[0].parametrizations.weight.original.grad
        assert found.any()


def added_alone(net):
    return added(net, UniformityRegularizer(head=None).attach(net))


def test_other_groups_and_another_padding_are_followed():
    conv = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    table = nn.Sequential(nn.Embedding(9, 6, padding_idx=0))
    for net, name, value in ((conv, "groups", 4), (table, "padding_idx", 8)):
        regularizer = UniformityRegularizer(head=None, include="*").attach(net)
        added(net, regularizer)
        setattr(net[0], name, value)
        found = added(net, regularizer)["0.weight"]
        fresh = added(net, UniformityRegularizer(head=None, include="*").attach(net))["0.weight"]
        assert_near(found, fresh)


@pytest.mark.parametrize("measure", [None, Covering()])
def test_a_refused_step_adds_nothing(measure):
    dense, sparse = nn.Linear(6, 9), nn.Embedding(20, 6)
    regularizer = UniformityRegularizer(measure, head=None, include="*")
    regularizer.attach(nn.ModuleList([dense, sparse]))
    sparse.sparse = True
    dense(sparse(torch.tensor([1, 2]))).sum().backward()
    before = dense.weight.grad.clone()
    optimizer = torch.optim.SGD([*dense.parameters(), *sparse.parameters()], lr=0.1)
    with pytest.raises(NotImplementedError, match="sparse gradients"):
        regularizer.add_gradients(optimizer)
    assert torch.equal(dense.weight.grad, before)
    assert sum(regularizer.state_dict()["steps"]) == 0  # done again, it is the same step


def test_another_memory_format_is_followed():
    net = pictures()
    regularizer = UniformityRegularizer(coefficient=0.5).attach(net)
    added(net, regularizer)
    net.to(memory_format=torch.channels_last)
    assert not net[0].weight.is_contiguous()
    found, fresh = added(net, regularizer), added(net)
    for name, part in fresh.items():
        assert_near(found[name], 0.5 * part)
    assert len(regularizer._attached.plan.plain) == 3  # the short way serves it, too


def test_channels_last_gets_what_the_usual_format_gets():
    net = pictures()
    usual = added(net)
    net.to(memory_format=torch.channels_last)
    for name, part in added(net).items():
        assert_near(part, usual[name])


def bottleneck():
    """Kernels of 1 x 1, whose strides two memory formats share in part, and transposed convolutions."""
    return nn.Sequential(
        nn.Conv2d(12, 8, 1),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 16, 1),
        nn.ConvTranspose2d(16, 8, 3),
        nn.ConvTranspose2d(8, 12, 2, groups=4),
        nn.ConvTranspose2d(12, 10, 1),
        nn.ConvTranspose1d(10, 6, 3),
    )


@pytest.mark.parametrize("in_one_pass", [False, True])
@pytest.mark.parametrize("watched", [False, True])
def test_every_memory_format_and_transposed_kernels_are_plain(in_one_pass, watched, monkeypatch):
    """Also where a gradient of a 1 x 1 kernel has the strides of the other format."""
    if in_one_pass:  # as on a GPU
        monkeypatch.setattr(foreach, "avoids_sync", lambda update, term: update.size[1] > 1)
    measure = RieszEnergy(s=2, half_space=True)
    settings = {"coefficient": 1.0, "head": None, "step_limit": None}
    torch.manual_seed(0)
    usual = bottleneck()
    exact = copy.deepcopy(usual).double()
    expected = {}
    for layer in UniformityRegularizer(measure, **settings).attach(exact).layers:
        (weight,) = layer.parameters
        loss = measure(layer.target.read().x).mean()
        (expected[f"{layer.name}.weight"],) = torch.autograd.grad(loss, weight)
    assert len(expected) == 7
    for last in (False, True):
        net = copy.deepcopy(usual)
        if last:
            net[:-1].to(memory_format=torch.channels_last)
        regularizer = UniformityRegularizer(measure, **settings).attach(net)
        assert len(regularizer._attached.plan.plain) == 7
        optimizer = with_zero_gradients(net)
        if last:
            for at in (0, 2):
                net[at].weight.grad = torch.zeros_like(usual[at].weight)
                assert net[at].weight.grad.stride() != net[at].weight.stride()
        for _ in range(2):
            for p in net.parameters():
                p.grad.zero_()
            regularizer.add_gradients(optimizer, stats=watched)
        assert not regularizer._attached.plan.rest
        for name, p in net.named_parameters():
            if name in expected:
                assert_near(p.grad.double(), expected[name])


def test_weights_of_one_shape_are_read_in_their_own_groups():
    net = nn.ModuleList([nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2)])
    assert net[0].weight.shape == net[1].weight.shape
    together = UniformityRegularizer(coefficient={"0": 0.5, "1": 1.0}, head=None).attach(net)
    found = added(net, together)
    for name, coefficient in (("0", 0.5), ("1", 1.0)):  # the same factor of the sum over groups
        alone = UniformityRegularizer(coefficient=coefficient, include=name, head=None).attach(net)
        expected = added(net, alone)[f"{name}.weight"]
        assert_near(found[f"{name}.weight"], expected)


def test_a_plan_is_replayed_until_something_changes(monkeypatch):
    made = []
    init = Plan.__init__

    def counted(self, *args):
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(Plan, "__init__", counted)
    net = network()
    regularizer = UniformityRegularizer().attach(net)
    for _ in range(5):
        added(net, regularizer)
    other_data(net)  # only the address is another
    added(net, regularizer)
    assert len(made) == 1
    replaced_weight(net)
    added(net, regularizer)
    assert len(made) == 2


def test_a_replaced_weight_that_no_optimizer_has_is_unreached():
    net = network()
    regularizer = UniformityRegularizer().attach(net)
    optimizer = with_zero_gradients(net)
    regularizer.add_gradients(optimizer)
    assert regularizer.unreached() == []
    replaced_weight(net)
    net[0].weight.grad = torch.zeros(16, 12)
    regularizer.add_gradients(optimizer)
    assert regularizer.unreached() == ["0"]


def test_groups_and_rates_are_read_at_each_step():
    net = network()
    regularizer = UniformityRegularizer(step_limit=1e-3).attach(net)
    optimizer = torch.optim.SGD([net[0].weight], lr=1.0)
    sizes = []
    for rate in (1.0, 10.0):
        optimizer.param_groups[0]["lr"] = rate
        with_zero_gradients(net)
        regularizer.add_gradients(optimizer)
        assert not net[2].weight.grad.any()
        sizes.append(float(net[0].weight.grad.norm()))
    assert sizes[1] < 0.2 * sizes[0]
    optimizer.add_param_group({"params": [net[2].weight]})
    with_zero_gradients(net)
    regularizer.add_gradients(optimizer)
    assert net[2].weight.grad.any()


def test_a_gradient_laid_out_otherwise_is_served_too():
    net, twin = network(), network()
    twin.load_state_dict(net.state_dict())
    optimizer = with_zero_gradients(net)
    net[0].weight.grad = torch.zeros(12, 16).T
    UniformityRegularizer().attach(net).add_gradients(optimizer)
    expected = added(twin)["0.weight"]
    assert_near(net[0].weight.grad, expected)


class Growing(nn.Module):
    """Its rule gives more neurons at each step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5))
        self.rows = 3

    def forward(self, x):
        return x @ self.weight.T


def test_a_registered_rule_is_asked_at_each_step():
    register_neurons(Growing, lambda module: module.weight[: module.rows])
    net = nn.Sequential(Growing())
    regularizer = UniformityRegularizer(head=None).attach(net)
    for rows in (3, 5, 8):
        net[0].rows = rows
        part = added(net, regularizer)["0.weight"]
        assert part[:rows].any(1).all()
        assert not part[rows:].any()


def test_each_kind_of_layer_is_plain_where_numbers_are_enough():
    net = network()
    settings = [
        ({}, 3),
        ({"coefficient": LinearSchedule(1.0, end=5)}, 3),
        ({"coefficient": Share(0.1)}, 0),
        ({"measure": Covering(), "head": None}, 0),
        ({"measure": RieszEnergy(s=1)}, 3),
    ]
    for setting, count in settings:
        made = UniformityRegularizer(**setting).attach(net)._attached.plan
        assert len(made.plain) == count
        assert sum(map(len, made.rest)) == 3 - count
        assert sum(map(len, made.buckets)) == 3


def large_and_small(dtype):
    torch.manual_seed(0)
    sizes = [256, 300, 256, 300, 16, 16, 16, 300]
    layers = [nn.Linear(d, n, bias=False) for d, n in pairwise(sizes)]
    return nn.Sequential(*layers).to(dtype)


LOTS = {
    "gradient": {},
    "tolerance": {"tolerance": 0.5},
    "limited": {"coefficient": 1e3, "step_limit": 0.01},
    "decoupled": {"mode": "move"},
    "decoupled, tolerance": {"mode": "move", "tolerance": 0.5},
    "ahead": {"looks": True},
    "ahead, tolerance": {"looks": True, "tolerance": 0.5},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.filterwarnings("ignore:the penalty is too strong")
@pytest.mark.parametrize("name", LOTS)
def test_statistics_in_lots_change_no_bit(name, monkeypatch):
    """Their buffers are there a few layers at a time; of a lot each holds one copy of the layers."""
    settings = {"coefficient": 0.05} | LOTS[name]
    mode, looks = settings.pop("mode", "add_gradients"), settings.pop("looks", False)
    dtype = settings.pop("dtype", torch.float32)
    begun = []
    begin = BufferedUpdates.begin

    def counted(buffered):
        begin(buffered)
        begun.append(sum(stack.buffer.numel() for stack in buffered._stacks.values()))

    monkeypatch.setattr(BufferedUpdates, "begin", counted)

    def train(room, stats):
        monkeypatch.setattr(plan, "_ROOM", room)
        begun.clear()
        net = large_and_small(dtype)
        groups = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(net.parameters())]
        optimizer = torch.optim.SGD(groups)
        regularizer = UniformityRegularizer(**settings).attach(net)
        for step in range(6):
            optimizer.zero_grad()
            x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step))
            net(x.to(dtype)).square().mean().backward()
            act = getattr(regularizer, mode)
            if mode == "move":
                optimizer.step()
            found = act(optimizer, stats=stats)
            assert set(found) == {layer.name for layer in regularizer.layers} or not stats
            if mode != "move":
                optimizer.step()
            if looks:
                regularizer.look_ahead(optimizer)
        numbers = {name: [float(one) for one in vars(found[name]).values()] for name in found}
        return [p.detach().clone() for p in net.parameters()], numbers, list(begun)

    without, _, _ = train(2**17, stats=False)
    weights, numbers, lots = train(2**17, stats=True)
    _, together, whole = train(2**30, stats=True)
    assert len(whole) == 6
    assert len(lots) == 3 * 6  # one large layer each, the small ones together with the last
    assert max(lots) <= 2**17
    for left, right in zip(weights, without, strict=True):
        assert torch.equal(left, right)
    for layer, expected in together.items():
        assert numbers[layer] == pytest.approx(expected, rel=1e-5)


def test_unseen_changes_in_lots_are_told_of_together(monkeypatch):
    monkeypatch.setattr(plan, "_ROOM", 2**17)
    net = large_and_small(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    regularizer = UniformityRegularizer().attach(net)

    def step():
        optimizer.zero_grad()
        net(torch.randn(8, 256)).square().mean().backward()
        regularizer.add_gradients(optimizer, stats=True)
        optimizer.step()
        regularizer.look_ahead(optimizer)
        for p in net.parameters():
            p.data.mul_(0.9)

    step()
    step()
    with pytest.warns(UserWarning, match=r"p\.data") as told:
        step()
    assert len(told) == 1


@pytest.mark.parametrize("stats", [False, True])
def test_layers_of_one_shape_get_what_each_gets_alone(stats):
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    rates = (0.1, 0.1, 300.0, 1000.0, 0.1)  # two steps are limited, each to its own rate
    alone = []
    for i, rate in enumerate(rates):
        with_zero_gradients(net)
        optimizer = torch.optim.SGD([net[i].weight], lr=rate)
        regularizer = UniformityRegularizer(include=str(i), head=None).attach(net)
        regularizer.add_gradients(optimizer)
        alone.append(net[i].weight.grad)
    with_zero_gradients(net)
    groups = [
        {"params": [layer.weight], "lr": rate} for layer, rate in zip(net, rates, strict=True)
    ]
    regularizer = UniformityRegularizer(head=None).attach(net)
    regularizer.add_gradients(torch.optim.SGD(groups), stats=stats)
    for layer, expected in zip(net, alone, strict=True):
        assert expected.any()
        assert_near(layer.weight.grad, expected)
    assert alone[3].norm() < 0.5 * alone[0].norm()


@dataclass(frozen=True)
class Norms(Measure):
    """Sees the norms of the neurons, too, so that every part of a computed weight feels a force."""

    def penalty(self, x, state=None):
        return x.pow(4).sum((-2, -1))


def with_norm():
    """A layer whose weight is computed from two parameters."""
    layer = parametrizations.weight_norm(nn.Linear(6, 9))
    norms, directions = layer.parametrizations.weight.parameters()
    with torch.no_grad():
        norms.mul_(1.0 + torch.rand_like(norms))  # else the norms feel no force
        directions[1] = directions[0] + 0.1 * directions[2]
    norms.grad = torch.zeros_like(norms)
    directions.grad = torch.zeros_like(directions)
    return layer, norms, directions


def test_parameters_of_another_optimizer_are_left_alone():
    layer, norms, directions = with_norm()
    regularizer = UniformityRegularizer(Norms(), head=None).attach(layer)
    regularizer.add_gradients(torch.optim.SGD([directions], lr=0.1))
    assert not norms.grad.any()
    regularizer.add_gradients(torch.optim.SGD([norms], lr=0.1))
    assert norms.grad.any()


def test_parts_of_a_computed_weight_move_with_their_own_rates():
    moved = []
    for rates in ((1e-3, 1e-3), (3e-3, 1e-3)):
        torch.manual_seed(0)
        layer, norms, directions = with_norm()
        before = norms.detach().clone(), directions.detach().clone()
        groups = [{"params": [norms], "lr": rates[0]}, {"params": [directions], "lr": rates[1]}]
        regularizer = UniformityRegularizer(Norms(), head=None, step_limit=None).attach(layer)
        regularizer.move(torch.optim.SGD(groups))
        moved.append((norms.detach() - before[0], directions.detach() - before[1]))
    torch.testing.assert_close(moved[1][0], 3.0 * moved[0][0], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(moved[1][1], moved[0][1], rtol=1e-3, atol=1e-7)
    assert moved[0][0].any()


def test_the_interval_stands_in_one_place():
    net = network()
    schedule = LinearSchedule(1.0, warmup=30)
    regularizer = UniformityRegularizer(coefficient=schedule).attach(net)
    regularizer.every_n_steps = 10
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for _ in range(15):
        with_zero_gradients(net)
        regularizer.add_gradients(optimizer)
    told = regularizer.current_penalty(regularizer.measure_layers())
    resumed = UniformityRegularizer(coefficient=schedule).attach(net)
    resumed.every_n_steps = 10
    resumed.load_state_dict(regularizer.state_dict())
    assert resumed.current_penalty(resumed.measure_layers()) == told


def test_a_plain_step_takes_few_calls_through_few_files():
    """As a Trainer takes it, with AdamW, whose step limit looks at the task; it was 430 through 26 files."""
    traced = Traced()
    fit = trainer(traced, logger=False, max_steps=5)
    data = [(torch.randn(4, 12), torch.randn(4, 5)) for _ in range(6)]
    fit.fit(Automatic(net=network()), loader(data))
    calls = traced.before_step[3]  # what is kept from the first steps is not counted
    assert 20 < len(calls) <= 150, len(calls)
    assert len(set(calls)) <= 15, sorted(set(calls))


@pytest.mark.parametrize(("size", "lies_alike"), [(1, True), (3, False)])
def test_strides_of_axes_of_size_1_do_not_matter(size, lies_alike):
    """Kernels of 1 x 1 lie alike in two memory formats, whose strides differ there."""
    net = nn.Sequential(nn.Conv2d(12, 8, size))
    regularizer = UniformityRegularizer(head=None).attach(net)
    (plain,) = regularizer._attached.plan.plain
    weight = net[0].weight
    other = torch.zeros_like(weight).to(memory_format=torch.channels_last)
    assert other.stride() != weight.stride()
    weight.grad = other
    assert (plain.update(1.0, None, 1.0) is not None) == lies_alike
    weight.data = weight.detach().to(memory_format=torch.channels_last)
    assert weight.stride() == other.stride()
    assert plain.is_current() == lies_alike
