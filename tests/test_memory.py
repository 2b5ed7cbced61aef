"""What measures carry from step to step: kept in checkpoints, forgotten with the model, never moved by looking."""

import copy

import pytest
import torch

from lightning_hsu import UniformityRegularizer
from lightning_hsu.measures import (
    Covering,
    GaussianPotential,
    Polarization,
    RieszEnergy,
    Sampled,
    Separation,
    SlicedWasserstein,
)
from lightning_hsu.presets import sphere_uniformity
from lightning_hsu.projections import (
    Adversarial,
    AnglePreserving,
    GroupProjection,
    Projected,
    RandomProjection,
)
from tests.models import Automatic, batches, loader, network, trainer, uniformity

CARRYING = [
    Covering(witnesses=3),
    Polarization(s=1),
    SlicedWasserstein(circles=8),
    Sampled(RieszEnergy(s=1), block=4),
    Projected(RieszEnergy(s=1), RandomProjection(dim=4)),
    Projected(projection=AnglePreserving(dim=4)),
    Projected(projection=Adversarial(dim=4, steps=2)),
    Projected(Covering(), GroupProjection(dim=3)),
]
every_one = pytest.mark.parametrize("measure", CARRYING, ids=repr)


def fitted(callback, epochs, seed=3, **kwargs):
    torch.manual_seed(seed)
    module = Automatic()
    one = trainer(callback, max_epochs=epochs)
    one.fit(module, loader(batches()), **kwargs)
    return one, [p.detach().clone() for p in module.parameters()]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Of every measure: tests/test_resume.py.
@pytest.mark.parametrize("measure", [CARRYING[2], CARRYING[4]], ids=repr)
def test_a_resumed_fit_is_the_uninterrupted_one_bit_for_bit(measure, tmp_path):
    whole = fitted(uniformity(measure=measure), 2)[1]
    first, half = fitted(uniformity(measure=measure), 1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    assert any("states" in state for state in saved.values())
    resumed = fitted(uniformity(measure=measure), 2, seed=4, ckpt_path=tmp_path / "half.ckpt")[1]
    assert same_bits(resumed, whole)
    assert not same_bits(half, whole)


@pytest.mark.usefixtures("_few_random_layers")
def test_a_published_pole_is_kept_as_well(tmp_path):
    whole = fitted(sphere_uniformity("mhp", verbose=False), 2)[1]
    first, _ = fitted(sphere_uniformity("mhp", verbose=False), 1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    assert same_bits(
        fitted(sphere_uniformity("mhp", verbose=False), 2, ckpt_path=tmp_path / "half.ckpt")[1],
        whole,
    )


@every_one
@pytest.mark.usefixtures("_few_random_layers")
def test_looking_changes_nothing(measure):
    """Training is the same with and without measuring, and with coefficient 0 as without us."""
    watched = fitted(uniformity(measure=measure), 1)[1]
    assert same_bits(watched, fitted_unwatched(measure))
    torch.manual_seed(3)
    plain = Automatic()
    trainer(max_epochs=1).fit(plain, loader(batches()))
    without = [p.detach() for p in plain.parameters()]
    assert same_bits(fitted(uniformity(measure=measure, coefficient=0), 1)[1], without)
    assert not same_bits(watched, without)


@pytest.mark.parametrize("act", ["add_gradients", "move"])
@pytest.mark.parametrize(
    "measure",
    [
        RieszEnergy(s=2),
        RieszEnergy(s=1, half_space=True, distance="geodesic"),
        GaussianPotential(),
        Separation(),
        *CARRYING,
    ],
    ids=repr,
)
def test_a_step_that_is_logged_is_the_same_step(measure, act):
    """Else a run that is resumed, which logs its first step, would not be the uninterrupted one."""
    ends = []
    for stats in (False, True):
        torch.manual_seed(0)
        net = network()
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        regularizer = UniformityRegularizer(measure).attach(net)
        regularizer.checks_order = False
        assert bool(getattr(regularizer, act)(optimizer, stats=stats)) == stats
        ends.append([part.detach() for p in net.parameters() for part in (p, p.grad)])
    assert same_bits(*ends)


def fitted_unwatched(measure):
    """The same steps through the engine alone, which never measures."""
    torch.manual_seed(3)
    module = Automatic()
    optimizer = module.configure_optimizers()
    regularizer = UniformityRegularizer(measure).attach(module)
    for x, y in batches():
        optimizer.zero_grad()
        (module.net(x) - y).square().mean().backward()
        regularizer.add_gradients(optimizer)
        optimizer.step()
    return [p.detach() for p in module.parameters()]


def stepped(regularizer, net, steps=1):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.ones(2, 1, 6, 6)).sum().backward()
        regularizer.add_gradients(optimizer)
    return regularizer


def test_each_step_has_its_own_draw_and_its_own_gradient():
    net = network()
    regularizer = UniformityRegularizer(
        Projected(projection=RandomProjection(dim=4)), include="5", head=None
    )
    regularizer.attach(net)
    gradients = []
    for _ in range(2):
        net[5].weight.grad = torch.zeros_like(net[5].weight)
        regularizer.add_gradients(torch.optim.SGD(net.parameters(), lr=0.1))
        gradients.append(net[5].weight.grad)
    assert not torch.allclose(*gradients)
    assert int(regularizer.state.measure_states.by_layer["5"]["draw"]) == 1
    regularizer.add_gradients(torch.optim.SGD(net.parameters(), lr=0.1), same_step=True)
    assert (
        int(regularizer.state.measure_states.by_layer["5"]["draw"]) == 1
    )  # within one step the function stays the same


def test_steps_left_out_draw_nothing():
    net = network()
    regularizer = UniformityRegularizer(
        SlicedWasserstein(), include="5", head=None, every_n_steps=3
    ).attach(net)
    stepped(regularizer, net, 7)
    assert int(regularizer.state.measure_states.by_layer["5"]["draw"]) == 2  # steps 0, 3 and 6


def test_another_model_begins_afresh_and_the_same_one_goes_on():
    net, other = network(), network()
    regularizer = stepped(
        UniformityRegularizer(Covering(), include="5", head=None).attach(net), net, 3
    )
    assert int(regularizer.state.measure_states.by_layer["5"]["step"]) == 2
    regularizer.detach()
    assert (
        int(stepped(regularizer.attach(net), net).state.measure_states.by_layer["5"]["step"]) == 3
    )
    assert (
        int(stepped(regularizer.attach(other), other).state.measure_states.by_layer["5"]["step"])
        == 0
    )


def test_loaded_states_serve_the_next_model_if_they_fit():
    net = network()
    other = network()
    wider = network()
    wider[5] = torch.nn.Linear(32, 13)
    saved = copy.deepcopy(
        stepped(
            UniformityRegularizer(Covering(), include="5", head=None).attach(net), net, 3
        ).state_dict()
    )
    for model, step in ((other, 3), (wider, 3)):
        regularizer = UniformityRegularizer(Covering(), include="5", head=None)
        regularizer.load_state_dict(saved)
        model[7] = torch.nn.Linear(model[5].out_features, 3)
        assert (
            int(
                stepped(regularizer.attach(model), model).state.measure_states.by_layer["5"]["step"]
            )
            == step
        )
    narrow = torch.nn.Sequential(*[torch.nn.Flatten()] * 5, torch.nn.Linear(36, 9))
    regularizer.load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"layer '5' \(1, 9, 36\) \(it is not one of Covering"):
        regularizer.attach(narrow)
    assert int(stepped(regularizer, narrow).state.measure_states.by_layer["5"]["step"]) == 0


def test_copies_carry_the_states_and_no_model():
    net = network()
    regularizer = stepped(
        UniformityRegularizer(Covering(), include="5", head=None).attach(net), net
    )
    twin = copy.deepcopy(regularizer)
    assert int(twin.state.measure_states.by_layer["5"]["step"]) == 0
    assert not twin.layers


def test_the_differentiable_penalty_goes_on_step_by_step():
    net = network()
    regularizer = UniformityRegularizer(SlicedWasserstein(), include="5", head=None).attach(net)
    first, second = regularizer.penalty(), regularizer.penalty()
    second.backward()
    assert not torch.equal(first, second)
    assert net[5].weight.grad.abs().sum() > 0


def test_measured_layers_say_whether_they_are_exact_and_where_they_stand():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 5), torch.nn.Linear(5, 24))
    for measure, exact in ((Covering(), [True, False]), (RieszEnergy(), [True, True])):
        layers = UniformityRegularizer(measure, head=None).attach(net).measure_layers()
        assert [layer.exact for layer in layers] == exact
        assert all(-5 < layer.score < 1 for layer in layers)
    with torch.no_grad():
        net[1].weight.copy_(torch.cat([torch.eye(5), -torch.eye(5)])[torch.arange(24) % 10])
    assert UniformityRegularizer(head=None).attach(net).measure_layers()[1].score < 0


def test_the_head_is_measured_in_full_space_and_not_projected():
    regularizer = UniformityRegularizer(
        Projected(RieszEnergy(s=1, half_space=True), RandomProjection(dim=4))
    ).attach(network())
    measures = {layer.target.name: layer.measure for layer in regularizer.layers}
    assert measures["7"] == RieszEnergy(s=1)
    assert measures["5"] == Projected(RieszEnergy(s=1, half_space=True), RandomProjection(dim=4))


@every_one
def test_a_state_of_another_kind_is_replaced_in_training_and_refused_by_hand(measure):
    x = torch.randn(3, 8, 12)
    fitting = measure.prepare(x)
    assert measure.fits(x, fitting)
    foreign = [other.prepare(x) for other in CARRYING if repr(other) != repr(measure)]
    for state in [*foreign, measure.prepare(x[:1]), measure.prepare(x[0])]:
        if not measure.fits(x, state):
            with pytest.raises(
                ValueError, match=r"the state is not one of .* for neurons of shape \(3, 8, 12\)"
            ):
                measure.penalty(x, state)
        new = measure.prepare(x, state)
        assert measure.fits(x, new)
        assert torch.isfinite(measure.penalty(x, new)).all()
    with pytest.raises(ValueError, match="the state is not one of"):
        measure.value_and_grad(x, measure.prepare(x[:1]))


def test_witnesses_of_other_neurons_are_a_start_but_no_state():
    x, measure = torch.randn(8, 6), Polarization()
    state = measure.prepare(x)
    with pytest.raises(ValueError, match="take it from prepare"):
        measure.penalty(x[:5], state)
    assert int(measure.prepare(x[:5], state)["step"]) == 1


def test_a_changed_measure_resumes_with_a_fresh_state(tmp_path):
    first, _ = fitted(uniformity(measure=CARRYING[3]), 1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.warns(UserWarning, match=r"'net.5' \(1, 12, 32\) \(it is not one of Covering\("):
        fitted(uniformity(measure=CARRYING[0]), 2, ckpt_path=tmp_path / "half.ckpt")
    with pytest.warns(UserWarning, match="it is of another measure"):  # which counts draws, too
        fitted(uniformity(measure=CARRYING[4]), 2, ckpt_path=tmp_path / "half.ckpt")
    fitted(uniformity(measure=RieszEnergy()), 2, ckpt_path=tmp_path / "half.ckpt")
