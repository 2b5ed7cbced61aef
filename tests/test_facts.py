"""A subclass's own function is what is measured and trained, whatever its base class knows in closed form."""

from dataclasses import dataclass, fields

import pytest
import torch

from lightning_hsu import UniformityRegularizer
from lightning_hsu.measures import (
    Covering,
    GaussianPotential,
    GramDeterminant,
    KoLeo,
    Measure,
    MinimalAngle,
    Orthogonality,
    PairwiseMeasure,
    ResultantLength,
    RieszEnergy,
    Sampled,
    Separation,
    SlicedWasserstein,
    SphereMeasure,
)
from lightning_hsu.presets import OfficialMHE, OfficialMHP, OfficialRandomCoMHE
from lightning_hsu.projections import Projected, RandomProjection
from lightning_hsu.reference import lower_bound, random_expectation, uniformity_ratio
from tests.members import FAMILY, name_of

MEMBERS = [
    *FAMILY,
    Sampled(RieszEnergy(s=1), block=4),
    OfficialMHE("1"),
    OfficialMHP(),
    OfficialRandomCoMHE(dim=3, count=2),
]


def neurons():
    return torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def made(kind, like):
    """An instance of a subclass with the settings of an instance of its base."""
    return kind(**{field.name: getattr(like, field.name) for field in fields(like)})


# Ways to override a function: each doubles it.


def directly(base):
    class Direct(base):
        def penalty(self, x, state=None):
            return 2 * super().penalty(x, state)

    return Direct


def in_a_grandchild(base):
    class Child(base):
        pass

    return directly(Child)


def in_a_parent(base):
    class Below(directly(base)):
        pass

    return Below


def by_a_mixin(base):
    class Doubling:
        def penalty(self, x, state=None):
            return 2 * super().penalty(x, state)

    class Mixed(Doubling, base):
        pass

    return Mixed


def beside_an_unchanged_sibling(base):
    class Sibling(base):
        pass

    class Diamond(Sibling, directly(base)):
        pass

    return Diamond


def with_its_gradient(base):
    class Whole(base):
        def penalty(self, x, state=None):
            return 2 * super().penalty(x, state)

        def value_and_grad(self, x, state=None):
            value, grad = super().value_and_grad(x, state)
            return 2 * value, 2 * grad

    return Whole


def as_a_dataclass(base):
    return dataclass(frozen=True)(directly(base))


def as_a_dataclass_with_slots(base):
    return dataclass(frozen=True, slots=True)(by_a_mixin(base))


def on_the_sphere(base):
    class Direct(base):
        def on_sphere(self, x, state):
            return 2 * super().on_sphere(x, state)

    return Direct


def on_the_sphere_by_a_mixin(base):
    class Doubling:
        def on_sphere(self, x, state):
            return 2 * super().on_sphere(x, state)

    class Mixed(Doubling, base):
        pass

    class Below(Mixed):
        pass

    return Below


def by_the_kernel(base):
    class Direct(base):
        def kernel(self, q, p):
            value, slope = super().kernel(q, p)
            return 2 * value, 2 * slope

    return Direct


PENALTIES = [
    directly,
    in_a_grandchild,
    in_a_parent,
    by_a_mixin,
    beside_an_unchanged_sibling,
    as_a_dataclass,
    as_a_dataclass_with_slots,
]
CASES = [(way, measure) for way in PENALTIES for measure in MEMBERS]
CASES += [
    (with_its_gradient, one)
    for one in MEMBERS
    if type(one).value_and_grad is not Measure.value_and_grad  # else it is that of the penalty
]
for way in (on_the_sphere, on_the_sphere_by_a_mixin):
    CASES += [(way, one) for one in MEMBERS if isinstance(one, SphereMeasure)]
CASES += [
    (by_the_kernel, one)
    for one in MEMBERS
    if hasattr(one, "kernel") and not isinstance(one, GaussianPotential)
]


def gradients(measure, x):
    """The gradient in every way that it is computed."""
    state = measure.prepare(x)
    leaf = x.clone().requires_grad_()
    measure.penalty(leaf, state).backward()
    rows = torch.arange(len(x)) % 2 == 0
    found = {
        "penalty": leaf.grad,
        "value_and_grad": measure.value_and_grad(x, state)[1],
        "gradient_rows": measure.gradient_rows(x, rows, state)
        + measure.gradient_rows(x, ~rows, state),
    }
    return found | trained(measure, x)


def trained(measure, x):
    """The gradients that a regularizer adds, and those of its penalty in a loss."""
    layer = torch.nn.Linear(x.shape[1], x.shape[0], dtype=x.dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    found = {}
    for name in ("add_gradients", "noted", "loss"):
        layer.weight.data.copy_(x)
        layer.weight.grad = torch.zeros_like(x)
        regularizer = UniformityRegularizer(measure, head=None, step_limit=None).attach(layer)
        if name == "loss":
            regularizer.penalty().backward()
        else:
            regularizer.add_gradients(optimizer, stats=name == "noted")
        found[name] = layer.weight.grad.clone()
    return found


@pytest.mark.parametrize(
    ("way", "measure"), CASES, ids=[f"{way.__name__} {name_of(one)}" for way, one in CASES]
)
def test_every_gradient_is_that_of_the_subclass(way, measure):
    x = neurons()
    doubled = made(way(type(measure)), measure)
    state = measure.prepare(x)
    value, grad = measure.value_and_grad(x, state)
    for name, found in gradients(doubled, x).items():
        torch.testing.assert_close(found, 2 * grad, rtol=1e-6, atol=1e-9, msg=name)
    for found in (doubled.penalty(x, state), doubled.value_and_grad(x, state)[0]):
        torch.testing.assert_close(found, 2 * value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("measure", MEMBERS, ids=name_of)
def test_members_agree_with_themselves(measure):
    x = neurons()
    exact = measure.value_and_grad(x, measure.prepare(x))[1]
    for name, found in gradients(measure, x).items():
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9, msg=name)


def test_a_kernel_of_ones_own_in_a_gaussian():
    """Training minimises the logarithm of its mean."""

    class Twice(by_the_kernel(GaussianPotential)):
        pass

    x = neurons()
    for measure in (Twice(), Twice(t=20.0), Twice(half_space=True)):
        plain = made(GaussianPotential, measure)
        assert float(measure(x)) == pytest.approx(2 * float(plain(x)), rel=1e-9)
        for name, found in gradients(measure, x).items():
            torch.testing.assert_close(
                found, plain.value_and_grad(x)[1], rtol=1e-6, atol=1e-9, msg=name
            )
        assert measure.expectation(9, 6) == pytest.approx(2 * plain.expectation(9, 6), rel=1e-9)


@pytest.mark.parametrize(
    "measure",
    [RieszEnergy(s=1), RieszEnergy(s=2, half_space=True), RieszEnergy(s=1, distance="geodesic")],
    ids=repr,
)
def test_a_kernel_of_ones_own_in_a_riesz_energy(measure):
    """No compiled kernel, closed form of the expectation or bound is taken for the plain one's."""
    twice = made(by_the_kernel(RieszEnergy), measure)
    assert twice.pair_term().formula is None
    assert measure.pair_term().formula == (measure.distance, measure.s)
    assert twice.expectation(9, 6) == pytest.approx(2 * measure.expectation(9, 6), rel=1e-8)
    assert twice.deviation(9, 6) == pytest.approx(2 * measure.deviation(9, 6), rel=1e-8)
    assert not twice.absolutely_monotone
    assert twice.bound(9, 6) <= 2 * measure.bound(9, 6) + 1e-9


@pytest.mark.parametrize(
    "measure",
    [
        RieszEnergy(s=2),
        GaussianPotential(),
        Separation(),
        Orthogonality("so"),
        SlicedWasserstein(circles=4),
        ResultantLength(),
        GramDeterminant(),
        Sampled(RieszEnergy(s=1)),
    ],
    ids=repr,
)
def test_what_is_known_of_values_goes_with_the_function(measure):
    doubled = made(directly(type(measure)), measure)
    for name in ("expectation", "deviation", "bound", "idle"):
        assert getattr(doubled, name)(12, 7) is None
    level = random_expectation(doubled, 12, 7)
    assert level.source == "simulated mean"
    values = doubled(torch.randn(200, 12, 7))
    error = float(values.std()) / 200**0.5
    assert level == pytest.approx(float(values.mean()), abs=4 * (error + level.standard_error))
    assert lower_bound(doubled, 12, 7) != lower_bound(doubled, 12, 7)  # NaN


def test_a_value_of_ones_own_has_the_gradient_and_not_the_expectation():
    class InDegrees(Separation):
        def natural(self, penalty):
            return super().natural(penalty).rad2deg()

    x = neurons()
    assert float(InDegrees()(x)) == pytest.approx(float(Separation()(x).rad2deg()))
    assert torch.equal(InDegrees().value_and_grad(x)[1], Separation().value_and_grad(x)[1])
    assert InDegrees().bound(9, 6) is None

    class Percent(RieszEnergy):
        def natural(self, penalty):
            return 100 * penalty

    assert Percent().expectation(9, 6) is None
    assert Percent().pair_term().formula == ("chordal", 2.0)
    assert float(uniformity_ratio(Percent(s=1), x)) == pytest.approx(
        float(uniformity_ratio(RieszEnergy(s=1), x)), rel=0.1
    )


def test_wrappers_of_a_measure_of_ones_own():
    doubled = directly(RieszEnergy)(s=1)
    x = neurons()
    projected = Projected(doubled, RandomProjection(dim=3))
    plain = Projected(RieszEnergy(s=1), RandomProjection(dim=3))
    torch.testing.assert_close(projected.value_and_grad(x)[1], 2 * plain.value_and_grad(x)[1])
    assert projected.bound(9, 6) is None
    with pytest.raises(TypeError, match="only a mean over pairs"):
        Sampled(doubled)
    table = UniformityRegularizer(doubled, head=None, sample_above=4).attach(torch.nn.Linear(6, 9))
    assert "sampled" not in table.table()


def test_what_a_subclass_states_again_holds():
    class Halved(RieszEnergy):
        """A different function with a closed form of its own."""

        def penalty(self, x, state=None):
            return super().penalty(x, state) / 2

        def value_and_grad(self, x, state=None):
            value, grad = RieszEnergy.value_and_grad(self, x, state)
            return value / 2, grad / 2

        def expectation(self, n, d):
            return RieszEnergy.expectation(self, n, d) / 2

    class Below(Halved):
        pass

    class Other(Below):
        def penalty(self, x, state=None):
            return super().penalty(x, state) + 1

    assert Below.value_and_grad is Halved.value_and_grad
    assert Below().expectation(9, 6) == RieszEnergy().expectation(9, 6) / 2
    assert Below.pair_term is Measure.pair_term
    assert Other.value_and_grad is Measure.value_and_grad
    assert Other().expectation(9, 6) is None


@pytest.mark.parametrize(
    ("base", "name", "methods"),
    [
        (RieszEnergy, "value_and_grad", "penalty or kernel"),
        (RieszEnergy, "gradient_rows", "penalty or kernel"),
        (RieszEnergy, "pair_term", "penalty or kernel"),
        (RieszEnergy, "compiled_as", "kernel"),
        (GaussianPotential, "value_and_grad", "penalty or kernel"),
        (KoLeo, "closed_form", "on_sphere or kernel"),
        (GramDeterminant, "value_and_grad", "penalty or on_sphere"),
        (Covering, "value_and_grad", "penalty or on_sphere"),
        (Sampled, "value_and_grad", "penalty"),
        (OfficialMHE, "value_and_grad", "penalty"),
    ],
)
def test_a_gradient_without_its_function_is_refused(base, name, methods):
    message = f"Lone overrides {name} without the function it belongs to: define {methods} in Lone"
    with pytest.raises(TypeError, match=message):
        type("Lone", (base,), {name: getattr(base, name)})
    with pytest.raises(TypeError, match=message):
        type("Mixed", (type("Lone", (), {name: getattr(base, name)}), base), {})


def test_one_function_is_enough():
    """A measure is its penalty; gradient, training and monitor follow."""

    @dataclass(frozen=True)
    class Cubes(Measure):
        def penalty(self, x, state=None):
            unit = torch.nn.functional.normalize(x, dim=-1)
            return (unit @ unit.mT).pow(3).mean((-2, -1))

    x = neurons()
    exact = torch.func.grad(Cubes().penalty)(x)
    for name, found in gradients(Cubes(), x).items():
        torch.testing.assert_close(found, exact, msg=name)
    assert not Cubes().half_space
    assert not Cubes().has_state
    assert torch.equal(Measure.value_and_grad(Cubes(), torch.zeros(3, 4))[1], torch.zeros(3, 4))


def test_whether_a_measure_has_a_state_is_known_from_its_class():
    for measure in MEMBERS:
        assert measure.has_state or measure.prepare(neurons()) is None
    having = {type(one).__name__ for one in MEMBERS if one.has_state}
    assert having == {
        "Covering",
        "OfficialMHP",
        "OfficialRandomCoMHE",
        "Polarization",
        "Projected",
        "Sampled",
        "SlicedWasserstein",
    }

    class Drawing(MinimalAngle):
        def prepare(self, x, state=None):
            return {"draw": torch.zeros(1)}

    class Below(Drawing):
        pass

    assert Below.has_state
    assert not MinimalAngle.has_state


def test_the_term_of_a_measure_is_built_once(monkeypatch):
    from lightning_hsu.measures import pairwise

    checked = []
    monkeypatch.setattr(pairwise, "check_kernel", checked.append)
    measure = RieszEnergy(s=1.2345)
    term = measure.pair_term()
    assert term is measure.pair_term() is RieszEnergy(s=1.2345).pair_term()
    assert term is not RieszEnergy(s=1.2346).pair_term()
    assert len(checked) == 2
    assert by_the_kernel(RieszEnergy)(s=1.2345).pair_term() is not term

    class Plain(PairwiseMeasure):
        def kernel(self, q, p):
            return -q, -torch.ones_like(q)

    assert Plain().pair_term() is not Plain().pair_term()
