"""Pair energies over random blocks: unbiased, with errors that are what they say, from a seed that all ranks share."""

import pytest
import torch

from lightning_hsu import HypersphericalUniformity, UniformityRegularizer
from lightning_hsu.measures import GaussianPotential, KoLeo, RieszEnergy, Sampled
from tests.members import InverseFourth

DRAWS = 120


def neurons(kind, n=600, d=16):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "a cone":  # energies differ from neuron to neuron
        x += (
            2.0
            * torch.randn(d, generator=generator, dtype=torch.float64)
            * torch.rand(n, 1, generator=generator)
        )
    if kind == "dead ones":
        x[::7] = 0.0
    return x


def draw(k):
    return {"draw": torch.tensor([k])}


@pytest.mark.parametrize("kind", ["as random", "a cone", "dead ones"])
@pytest.mark.parametrize(
    ("measure", "n", "block"),
    [
        # Blocks of 110 would leave neurons over if they did not grow.
        (RieszEnergy(s=2), 400, 110),
        (RieszEnergy(s=1, half_space=True), 400, 110),
        (GaussianPotential(), 400, 110),
        (InverseFourth(), 400, 110),
        (RieszEnergy(s=2, half_space=True), 240, 20),
        (GaussianPotential(), 240, 20),
    ],
    ids=str,
)
def test_errors_are_what_they_say(measure, kind, n, block):
    """Over many draws the mean is right, and what is said of the errors is true.

    Two standard errors cover 95 % of the values, and gradients are as far off as is said.
    """
    x, sampled = neurons(kind, n), Sampled(measure, block=block)
    penalty, exact = measure.value_and_grad(x)
    value = measure.natural(penalty)
    off = []
    away = []
    mean = torch.zeros_like(x)
    for k in range(DRAWS):
        error = sampled.error(x, draw(k))
        estimate, grad = sampled.value_and_grad(x, draw(k))
        off.append(float((measure.natural(estimate) - value) / error.value))
        away.append(float((grad - exact).norm() / grad.norm() / error.gradient))
        mean += grad / DRAWS
    off, away = torch.tensor(off), torch.tensor(away)
    assert float(off.mean().abs()) < 0.4  # standard error 0.09; a fixed seed: -0.2 to 0.2
    assert 0.75 < float(off.square().mean().sqrt()) < 1.25  # standard error 0.065
    assert float((off.abs() < 2).double().mean()) > 0.88  # 0.954, standard error 0.019
    assert 0.93 < float(away.square().mean().sqrt()) < 1.07
    # what is left of the noise in the mean gradient is a DRAWS-th of its square
    noise = float(error.gradient) * float(grad.norm()) / DRAWS**0.5
    assert float((mean - exact).norm()) < 1.5 * noise


@pytest.mark.parametrize(
    "measure", [RieszEnergy(s=2, half_space=True), GaussianPotential()], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_penalty_and_closed_form_are_one(measure, dtype):
    x = neurons("dead ones").to(dtype).reshape(2, 300, 16).requires_grad_()
    sampled = Sampled(measure, block=50)
    value = sampled.penalty(x, draw(4).copy() | {"draw": torch.tensor([4, 4])})
    value.sum().backward()
    closed, grad = sampled.value_and_grad(x.detach(), {"draw": torch.tensor([4, 4])})
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(closed, value.detach(), rtol=bound, atol=bound)
    assert float((grad - x.grad).norm() / grad.norm()) < bound
    assert not grad[x.detach().eq(0).all(-1)].any()


def test_few_neurons_are_computed_exactly():
    x, sampled = neurons("as random"), Sampled(RieszEnergy(s=2), block=301)
    assert sampled.prepare(x) is None
    assert sampled.is_exact(None)
    assert torch.equal(sampled.value_and_grad(x)[1], RieszEnergy(s=2).value_and_grad(x)[1])
    assert sampled.error(x) == (0.0, 0.0)


def test_groups_have_an_error_each_and_empty_ones_none():
    x = torch.stack([neurons("as random"), neurons("a cone")])
    sampled = Sampled(RieszEnergy(s=2), block=50)
    state = sampled.prepare(x, sampled.prepare(x))
    apart = [sampled.error(group, draw(1)) for group in x]
    for together, alone in zip(sampled.error(x, state), zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(alone))
    for shape in ((2, 0, 4), (0, 4), (0, 200, 4)):
        value, grad = sampled.value_and_grad(torch.zeros(shape))
        assert (
            value.shape
            == sampled.penalty(torch.zeros(shape)).shape
            == sampled.error(torch.zeros(shape)).value.shape
            == shape[:-2]
        )
        assert grad.shape == shape
    assert sampled.error(
        torch.randn(200, 1)
    ).gradient.isnan()  # on two points there is no gradient to compare with


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(TypeError, match="only a mean over pairs"):
        Sampled(KoLeo())
    with pytest.raises(ValueError, match="block must be an int >= 4; got 3"):
        Sampled(RieszEnergy(), block=3)


class TestInTheEngine:
    def model(self, n=300):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(n, 8), torch.nn.Linear(8, 4))
        model(torch.arange(n)).square().mean().backward()
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def regularizer(self, monkeypatch, **settings):
        monkeypatch.setattr(Sampled.__init__, "__defaults__", (16,))
        return UniformityRegularizer(RieszEnergy(s=2), include="*", head=None, **settings)

    def test_only_layers_beyond_the_limit_and_the_table_says_so(self, monkeypatch):
        model, _ = self.model()
        regularizer = self.regularizer(monkeypatch, sample_above=299).attach(model)
        table = regularizer.table()
        assert "measure: RieszEnergy(s=2)\n" in table
        assert "sampled in 18 blocks of 16" in table
        assert table.count("sampled") == 1
        assert (
            "sampled" not in self.regularizer(monkeypatch, sample_above=300).attach(model).table()
        )
        assert (
            "sampled" not in self.regularizer(monkeypatch, sample_above=None).attach(model).table()
        )

    def test_by_default_above_16384(self):
        model, _ = self.model(n=16385)
        callback = HypersphericalUniformity(include="*", head=None)
        measures = [layer.measure for layer in callback.regularizer.attach(model).layers]
        assert isinstance(measures[0], Sampled)
        assert not isinstance(measures[1], Sampled)
        model, _ = self.model(n=16384)
        assert not isinstance(callback.regularizer.attach(model).layers[0].measure, Sampled)

    def test_each_step_draws_anew_and_a_resumed_one_goes_on(self, monkeypatch):
        def step(regularizer, model, optimizer):
            for p in model.parameters():
                p.grad.zero_()
            regularizer.add_gradients(optimizer)
            return model[0].weight.grad.clone()

        model, optimizer = self.model()
        regularizer = self.regularizer(monkeypatch, sample_above=200).attach(model)
        first, second = (step(regularizer, model, optimizer) for _ in range(2))
        assert not torch.equal(first, second)
        resumed = self.regularizer(monkeypatch, sample_above=200)
        state = regularizer.state_dict()
        assert state["states"]["0"]["draw"].tolist() == [1]
        third = step(regularizer, model, optimizer)
        resumed.load_state_dict(state)
        assert torch.equal(step(resumed.attach(model), model, optimizer), third)

    def test_errors_of_groups(self):
        torch.manual_seed(0)
        layer = torch.nn.Conv1d(64, 400, 1, groups=4)
        regularizer = UniformityRegularizer(Sampled(RieszEnergy(s=2), block=20), head=None).attach(
            layer
        )
        (measured,) = regularizer.measure_layers()
        value, gradient = Sampled(RieszEnergy(s=2), block=20).error(layer.weight.view(4, 100, 16))
        assert measured.standard_error == pytest.approx(float(value.square().sum().sqrt()) / 4)
        assert measured.gradient_error == pytest.approx(float(gradient.square().mean().sqrt()))

    def test_what_is_logged(self, monkeypatch):
        model, _ = self.model()
        measured = self.regularizer(monkeypatch, sample_above=200).attach(model).measure_layers()[0]
        exact = self.regularizer(monkeypatch, sample_above=None).attach(model).measure_layers()[0]
        assert not measured.exact
        assert exact.exact
        assert exact.standard_error == exact.gradient_error == 0.0
        assert 0.0 < measured.standard_error < 0.05 * exact.energy
        assert abs(measured.energy - exact.energy) < 4 * measured.standard_error
        assert measured.min_angle >= exact.min_angle
        assert measured.score == pytest.approx(exact.score, abs=0.5)
        assert 0.0 < measured.gradient_error < 1.5

    def test_a_head_is_measured_in_full_space(self):
        model = torch.nn.Sequential(torch.nn.Linear(8, 60), torch.nn.Linear(60, 50))
        measure = Sampled(RieszEnergy(s=2, half_space=True), block=20)
        regularizer = UniformityRegularizer(measure).attach(model)
        spaces = {
            layer.target.head: layer.measure.measure.half_space for layer in regularizer.layers
        }
        assert spaces == {False: True, True: False}
