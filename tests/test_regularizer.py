"""The engine without Lightning."""

import copy
import math

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_hsu import UniformityRegularizer
from lightning_hsu._monitor.measure import measure_neurons
from lightning_hsu.measures import Orthogonality, RieszEnergy
from tests.models import Automatic, batches, mean_square, network
from tests.plain import Penalty, layers, train
from tests.rounding import assert_near


def test_adding_gradients_equals_backward_through_the_penalty():
    net = network()
    twin = copy.deepcopy(net)
    for one in (net, twin):
        one(torch.ones(2, 1, 6, 6)).sum().backward()
    UniformityRegularizer(coefficient=0.3, step_limit=None).attach(net).add_gradients(
        torch.optim.SGD(net.parameters(), lr=1.0)
    )
    UniformityRegularizer(coefficient=0.3).attach(twin).penalty().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert_near(p.grad, q.grad)


def test_only_the_optimizers_own_parameters_with_a_gradient_are_touched():
    net = network()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net[2].weight.grad = None
    UniformityRegularizer().attach(net).add_gradients(
        torch.optim.SGD([net[2].weight, net[5].weight], lr=0.1)
    )
    assert net[2].weight.grad is None
    assert net[5].weight.grad.abs().max() > 0
    assert net[0].weight.grad.abs().max() == net[7].weight.grad.abs().max() == 0


def test_a_parameter_frozen_with_a_gradient_left_is_not_touched():
    net = network()
    net(torch.ones(2, 1, 6, 6)).sum().backward()
    net[5].requires_grad_(False)
    before = net[5].weight.grad.clone()
    regularizer = UniformityRegularizer().attach(net)
    regularizer.add_gradients(torch.optim.SGD(net.parameters(), lr=0.1))
    assert torch.equal(net[5].weight.grad, before)
    assert regularizer.unreached() == []


def test_the_step_limit_follows_the_larger_learning_rate():
    """A weight_norm's two parameters in groups of their own: the limit holds for the faster."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4, bias=False))
    direction = layer.parametrizations.weight.original1
    size = layer.parametrizations.weight.original0
    with torch.no_grad():
        direction[1] = direction[0]
    added = []
    for rates in ((1.0, 1e-6), (1e-6, 1.0)):
        optimizer = torch.optim.SGD(
            [{"params": [direction], "lr": rates[0]}, {"params": [size], "lr": rates[1]}]
        )
        direction.grad, size.grad = torch.zeros_like(direction), torch.zeros_like(size)
        UniformityRegularizer(head=None).attach(layer).add_gradients(optimizer)
        added.append(direction.grad.clone())
    torch.testing.assert_close(added[0], added[1])


class LowRank(nn.Module):
    """A weight that is a product."""

    def __init__(self):
        super().__init__()
        self.left = nn.Parameter(torch.randn(6, 3))

    def forward(self, weight):
        return weight + self.left @ torch.ones(3, weight.shape[1])


@pytest.mark.parametrize("apply", ["add_gradients", "move"])
def test_an_autocast_around_changes_nothing_of_computed_weights(apply):
    """The hooks of manual optimisation run in that of the training step."""
    layer = nn.utils.parametrize.register_parametrization
    ends = []
    for autocast in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(5, 6)
        layer(net, "weight", LowRank())
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            getattr(UniformityRegularizer(head=None).attach(net), apply)(
                torch.optim.SGD(net.parameters(), lr=0.1)
            )
        ends.append([part for p in net.parameters() for part in (p.detach(), p.grad)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_gradients_of_another_layout_are_met_all_the_same():
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(3, 4, 3)
    plain.load_state_dict(layer.state_dict())
    for one in (layer, plain):
        one.weight.grad = torch.zeros(4, 3, 3, 3)
        UniformityRegularizer(head=None).attach(one).add_gradients(
            torch.optim.SGD(one.parameters(), lr=0.1)
        )
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_small_gradients_do_not_underflow_in_half_precision():
    """A wide layer's gradients are near float16's smallest number before the coefficient is applied."""
    half = nn.Linear(64, 1024).half()
    half.weight.grad = torch.zeros_like(half.weight)
    full = nn.Linear(64, 1024)
    full.weight.data = half.weight.detach().float()
    full.weight.grad = torch.zeros_like(full.weight)
    for one in (half, full):
        UniformityRegularizer(coefficient=1e4, head=None, step_limit=None).attach(
            one
        ).add_gradients(torch.optim.SGD(one.parameters(), lr=0.1))
    error = (half.weight.grad.float() - full.weight.grad).norm() / full.weight.grad.norm()
    assert float(error) < 1e-3  # float16 itself rounds by 5e-4; measured 3e-4


def test_layers_of_equal_shape_go_together_and_get_the_same_as_alone(monkeypatch):
    net = nn.Sequential(
        *(nn.Linear(6, 6) for _ in range(5)),
        nn.Linear(6, 4),
        nn.Conv2d(12, 12, 1, groups=2),
        nn.Linear(600, 600),
    )
    calls = []
    value_and_grad = Orthogonality.value_and_grad

    def noted(measure, x, state=None):
        calls.append(tuple(x.shape))
        return value_and_grad(measure, x, state)

    monkeypatch.setattr(Orthogonality, "value_and_grad", noted)
    together, alone = {}, {}
    for found, parts in ((together, [None]), (alone, [str(i) for i in range(8)])):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        calls.clear()
        for include in parts:
            regularizer = UniformityRegularizer(
                Orthogonality(),
                include=include,
                head=None,
                coefficient={"0": 2.0, "*": 0.5} if not include else 0.5,
            )
            if include == "0":
                regularizer.coefficient = 2.0
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            regularizer.attach(net).add_gradients(optimizer)
        found |= {name: p.grad.clone() for name, p in net.named_parameters()}
        if include is None:
            assert calls == [(5, 6, 6), (1, 4, 6), (2, 6, 6), (1, 600, 600)]
    for name, grad in alone.items():
        assert_near(together[name], grad)


def test_steps_are_counted_by_optimizer():
    net = network()
    seen = []
    regularizer = UniformityRegularizer(
        coefficient=lambda step: seen.append(step) or 0.1, include="5"
    ).attach(net)
    regularizer.checks_order = False
    one, two = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.ones(2, 1, 6, 6)).sum().backward()
    for optimizer in (one, two, two, one, two):
        regularizer.add_gradients(optimizer)
    assert seen == [0, 0, 1, 1, 2]
    assert regularizer.state_dict() == {"version": 1, "steps": [2, 3]}


def test_measuring():
    net = network()
    with torch.no_grad():
        net[5].weight[3:5] = 0
        net[2].weight[7, 2] = float("inf")
    layers = {
        layer.name: layer
        for layer in UniformityRegularizer(RieszEnergy(s=1)).attach(net).measure_layers()
    }
    assert (layers["5"].dead, layers["5"].nonfinite, layers["5"].neurons) == (2, 0, 12)
    assert (layers["2"].dead, layers["2"].nonfinite, layers["2"].groups) == (0, 1, 2)
    broken = layers["2"]  # one neuron is enough
    for number in (broken.energy, broken.penalty, broken.ratio, broken.score, broken.min_angle):
        assert math.isnan(number)
    live = net[5].weight.detach()[[0, 1, 2, 5, 6, 7, 8, 9, 10, 11]]
    assert layers["5"].energy == pytest.approx(float(RieszEnergy(s=1)(live)), rel=1e-6)
    net[7].weight.data[:2] = 0
    dead = UniformityRegularizer(include="7").attach(net).measure_layers()[0]
    assert dead.ratio != dead.ratio
    assert dead.energy == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_dead_neurons_change_neither_ratio_nor_score(groups):
    """They are left out: a layer compares with random layers of as many live neurons."""
    x = torch.randn(groups, 12, 6)
    x[:, 5] = x[:, 4] + 0.05 * x[:, 3]
    with_dead = torch.cat([x, torch.zeros(groups, 9, 6)], 1)
    measure = RieszEnergy(s=1)
    alive, dead = (measure_neurons("layer", rows, measure) for rows in (x, with_dead))
    assert dead.dead == 9 * groups
    assert dead.ratio == pytest.approx(alive.ratio, rel=1e-5)
    assert dead.score == pytest.approx(alive.score, rel=1e-5)
    assert alive.ratio > 1.05


def test_it_says_when_it_has_no_model():
    with pytest.raises(RuntimeError, match=r"call attach\(model\) first"):
        UniformityRegularizer().penalty()


@pytest.mark.parametrize(
    "late", [False, True], ids=["attached before setup", "attached after setup"]
)
@pytest.mark.parametrize("mode", ["gradient", "loss", "decoupled"])
def test_a_loop_with_fabric_trains_as_a_plain_loop(mode, late):
    fabric = Fabric(accelerator="cpu", devices=1)
    data = batches()
    module = Automatic()
    twin, plain_model = copy.deepcopy(module), module.net
    regularizer = UniformityRegularizer(coefficient=0.5)
    if not late:
        regularizer.attach(plain_model)
    model, optimizer = fabric.setup(plain_model, module.configure_optimizers())
    if late:
        regularizer.attach(model)
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        loss = mean_square(model(x), y)
        fabric.backward(loss + regularizer.penalty(step) if mode == "loss" else loss)
        if mode == "gradient":
            regularizer.add_gradients(optimizer)
        optimizer.step()
        if mode == "decoupled":
            regularizer.move(optimizer)
    train(twin, data, Penalty(layers(twin.net), mode, lambda step, name: 0.5), epochs=1)
    for p, q in zip(plain_model.parameters(), twin.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # measured: at most 6e-8
    assert [layer.name for layer in regularizer.measure_layers()] == ["0", "2", "5", "7"]


def test_norms_are_kept_to_rounding_over_many_moves():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    regularizer = UniformityRegularizer(coefficient=1.0).attach(net)
    before = [net[i].weight.flatten(1).norm(dim=1).double() for i in (0, 2, 5, 7)]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(200):
        regularizer.move(optimizer)
    for i, norms in zip((0, 2, 5, 7), before, strict=True):
        # measured after 200 moves: 4e-7, and 3e-6 with torch 2.4
        torch.testing.assert_close(
            net[i].weight.flatten(1).norm(dim=1).double(), norms, rtol=1e-5, atol=0
        )
    assert all(
        layer.ratio < 1.0
        for layer in regularizer.measure_layers()
        if layer.neurons < layer.dimension
    )
