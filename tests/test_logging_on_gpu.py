"""A logging step on a GPU: from the pass that computes the gradients, in few calls and one wait."""

import pytest
import torch
from torch import nn

from lightning_hsu import UniformityRegularizer
from lightning_hsu._core import foreach, raw
from lightning_hsu._core.crowded import CrowdedLayers
from lightning_hsu._core.pairwise import too_steep
from lightning_hsu._engine.delta import use_of
from lightning_hsu._monitor.measure import measure_layers
from lightning_hsu._monitor.on_gpu import measure_on_gpu
from lightning_hsu.measures import GaussianPotential, RieszEnergy


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(20, 40),
        nn.Linear(40, 40),
        nn.Conv2d(40, 12, 3),
        nn.Conv2d(12, 12, 3, groups=3),
        nn.ConvTranspose2d(12, 6, 2),
        nn.Linear(6, 200),
        nn.Linear(200, 5),
    )
    with torch.no_grad():
        net[0].weight[3] = 0.0  # dead
        net[1].weight[7] = net[1].weight[8] + 1e-3 * torch.randn(40)  # near
        net[5].weight[11, 2] = torch.nan
    return net


@pytest.fixture
def as_on_gpu(monkeypatch):
    for module in (raw, foreach):
        monkeypatch.setattr(module, "avoids_sync", lambda one, term: not too_steep(term))


MEASURES = [RieszEnergy(half_space=True), RieszEnergy(s=1.0), GaussianPotential()]


def compared(found, layers):
    """Compare with what is measured layer by layer."""
    expected = measure_layers(layers, lambda layer, x: None)
    assert len(found) == len(layers)
    for one in expected:
        (own,) = [value for layer, value in found.items() if layer.name == one.name]
        for name, value in vars(one).items():
            if isinstance(value, float):
                # The score is a difference of nearly equal numbers.
                near = pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True)
                assert getattr(own, name) == near, name
            else:
                assert getattr(own, name) == value, name


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("measure", MEASURES)
def test_measured_in_one_pass_as_layer_by_layer(measure):
    regularizer = UniformityRegularizer(measure).attach(network())
    attached = regularizer._attached
    layers = regularizer.layers
    compared(measure_on_gpu(layers, attached.plan, attached.ahead), layers)


@pytest.mark.usefixtures("as_on_gpu")
def test_what_was_begun_after_the_step_is_used():
    net = network()
    regularizer = UniformityRegularizer().attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer.measures_next = True
    regularizer.look_ahead(optimizer)
    attached = regularizer._attached
    assert len(attached.ahead.numbers(set(regularizer.layers))) > 0
    compared(measure_on_gpu(regularizer.layers, attached.plan, attached.ahead), regularizer.layers)
    with torch.no_grad():
        net[0].weight.mul_(torch.rand(40, 20))
    compared(measure_on_gpu(regularizer.layers, attached.plan, attached.ahead), regularizer.layers)


@pytest.fixture
def computed(monkeypatch):
    """How many layers were computed with their gradients and numbers, and for their numbers alone."""
    found = []
    begin_batch, numbers_without_sync = raw.begin_batch, foreach.numbers_without_sync

    def begun(batch, *, stats):
        found.append(("gradients" if stats else "no numbers", len(batch.updates)))
        return begin_batch(batch, stats=stats)

    def numbers(batch):
        found.append(("numbers", len(batch.updates)))
        return numbers_without_sync(batch)

    monkeypatch.setattr(raw, "begin_batch", begun)
    monkeypatch.setattr(foreach, "numbers_without_sync", numbers)
    return found


@pytest.mark.usefixtures("as_on_gpu")
def test_a_log_needs_no_gradient(computed):
    regularizer = UniformityRegularizer(head=None).attach(network())
    attached = regularizer._attached
    compared(measure_on_gpu(regularizer.layers, attached.plan, attached.ahead), regularizer.layers)
    assert computed == [("numbers", 7)]


@pytest.mark.usefixtures("as_on_gpu")
def test_with_a_tolerance_numbers_come_with_gradients_or_alone(computed):
    """Of each layer they are computed once, right after the step of its optimizer."""
    net = network()
    regularizer = UniformityRegularizer(tolerance=0.05, head=None).attach(net)
    parameters = list(net.parameters())
    optimizers = [torch.optim.SGD(some, lr=1e-4) for some in (parameters[:8], parameters[8:])]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for _ in range(10):
        for optimizer in optimizers:
            regularizer.add_gradients(optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    layers = regularizer.layers
    attached = regularizer._attached
    deltas = regularizer.state.deltas
    deltas.drop([layers[1]])
    due = []
    for plain in attached.plan.plain:
        if deltas.will_be_due(use_of(plain.layer, plain.reading().w)):
            due.append(plain.layer)
    expected = []
    for members in (layers[:4], layers[4:]):
        count = len(set(members) & set(due))
        expected += [("gradients", count), ("numbers", len(members) - count)]
    assert layers[1] in due
    assert len(due) < len(layers)

    regularizer.measures_next = True
    computed.clear()
    for optimizer in optimizers:
        regularizer.look_ahead(optimizer)
    begun = [layer for _, some in attached.ahead.numbers(set(layers)) for layer in some]
    assert sorted(layer.name for layer in begun) == [layer.name for layer in layers]
    compared(measure_on_gpu(layers, attached.plan, attached.ahead), layers)
    assert computed == [one for one in expected if one[1]]


@pytest.mark.usefixtures("as_on_gpu")
def test_layers_with_coincident_neurons_are_left_to_the_long_way():
    net = network()
    with torch.no_grad():
        net[6].weight[1] = net[6].weight[0]
    regularizer = UniformityRegularizer().attach(net)
    attached = regularizer._attached
    found = measure_on_gpu(regularizer.layers, attached.plan, attached.ahead)
    assert {layer.name for layer in found} == {"0", "1", "2", "3", "4", "5"}


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("measure", MEASURES)
def test_more_near_pairs_than_there_is_room_for_are_left_to_the_long_way(measure, monkeypatch):
    """There is room for 4096, and within a panel a pair counts twice."""
    for name in ("_CROWDED", "_CROWDED_MEASURED"):
        monkeypatch.setattr(foreach, name, CrowdedLayers())
    for count, names, later in ((60, {"0", "1"}, {"0", "1"}), (100, set(), {"1"})):
        net = nn.Sequential(nn.Linear(32, 120), nn.Linear(120, 20))
        with torch.no_grad():
            net[0].weight[:count] = net[0].weight[0] + 1e-3 * torch.randn(count, 32)
        regularizer = UniformityRegularizer(measure).attach(net)
        attached = regularizer._attached
        for expected in (names, later):
            found = measure_on_gpu(regularizer.layers, attached.plan, attached.ahead)
            assert {layer.name for layer in found} == expected
        work = [(plain.reading(), plain.term) for plain in attached.plan.plain]
        assert foreach.calm_and_crowded(work) == (work, [])  # no gradient depends on a log


@pytest.mark.usefixtures("as_on_gpu")
def test_two_opposite_neurons_have_an_angle():
    net = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 5))
    with torch.no_grad():
        net[0].weight[1] = -2.0 * net[0].weight[0]
    regularizer = UniformityRegularizer(RieszEnergy(), head=None).attach(net)
    attached = regularizer._attached
    assert regularizer.layers[0].target.shape[1] == 2
    found = measure_on_gpu(regularizer.layers, attached.plan, attached.ahead)
    assert [layer.name for layer in found] == ["1"]  # the pass sees no cosine of -1
    opposite, _ = measure_layers(regularizer.layers, lambda layer, x: None)
    assert opposite.min_angle == pytest.approx(180.0)
