"""A pairwise measure of one's own: one dataclass with one method, used everywhere, and told where it is wrong."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lightning_hsu import UniformityRegularizer, register_neurons
from lightning_hsu.measures import GaussianPotential, PairwiseMeasure, RieszEnergy
from tests.models import Automatic, batches, loader, trainer, uniformity
from tests.rounding import assert_near


@dataclass(frozen=True)
class InverseSquare(PairwiseMeasure):
    half_space: bool = False

    def kernel(self, q, p):
        return 1 / q, -1 / q**2


@pytest.mark.parametrize("half_space", [False, True])
def test_it_is_the_same_as_the_built_in_one(half_space):
    x = torch.randn(40, 9)
    for own, known in zip(
        InverseSquare(half_space).value_and_grad(x),
        RieszEnergy(s=2, half_space=half_space).value_and_grad(x),
        strict=True,
    ):
        assert_near(own, known)


def test_it_trains_in_the_callback():
    ends = []
    for measure in (InverseSquare(half_space=True), RieszEnergy(s=2, half_space=True)):
        torch.manual_seed(0)
        module = Automatic()
        trainer(uniformity(measure=measure, coefficient=0.3), max_epochs=1).fit(
            module, loader(batches())
        )
        ends.append(module.net[5].weight.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_it_is_monitored_with_a_ratio_and_a_score():
    measure = InverseSquare(half_space=True)
    one = trainer(uniformity(measure=measure, coefficient=0), max_epochs=1)
    module = Automatic()
    one.fit(module, loader(batches()))
    assert 0.8 < float(one.callback_metrics["hsu/ratio_mean"]) < 1.3
    for own, known in zip(
        measured(module, measure), measured(module, RieszEnergy(s=2, half_space=True)), strict=True
    ):
        assert own.ratio == pytest.approx(known.ratio, rel=1e-5)
        assert (
            abs(own.score) <= abs(known.score) + 1e-6
        )  # that its kernel is absolutely monotone we do not know: a weaker bound


def measured(module, measure):
    return UniformityRegularizer(measure, head=None).attach(module).measure_layers()


def test_a_measure_that_is_no_dataclass_will_do():
    class Plain(PairwiseMeasure):
        def kernel(self, q, p):
            return -q, -torch.ones_like(q)

    trainer(uniformity(measure=Plain(), coefficient=0.3), fast_dev_run=True).fit(
        Automatic(), loader(batches())
    )


def kernel_of(function):
    return dataclass(frozen=True)(
        type("Wrong", (PairwiseMeasure,), {"kernel": lambda self, q, p: function(q)})
    )()


@pytest.mark.parametrize(
    ("measure", "error", "message"),
    [
        (kernel_of(lambda q: 1 / q), TypeError, r"Wrong.kernel must return \(value, slope\)"),
        (
            kernel_of(lambda q: (1 / q, 1 / q**2)),
            ValueError,
            "slope of Wrong.kernel is not the derivative of its value",
        ),
        (
            dataclass(type("Mutable", (PairwiseMeasure,), {"kernel": InverseSquare.kernel}))(),
            TypeError,
            r"decorate Mutable with @dataclass\(frozen=True\)",
        ),
    ],
)
def test_mistakes_are_told(measure, error, message):
    with pytest.raises(error, match=message):
        measure(torch.randn(4, 4))


@dataclass(frozen=True)
class TenTimes(GaussianPotential):
    def penalty(self, x, state=None):
        return 10 * super().penalty(x, state)


class Twice(torch.nn.Module):
    """One parameter whose rows are one set of neurons and whose columns are another."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 5))


register_neurons(Twice, lambda module: {"rows": module.weight, "columns": module.weight.T})


@pytest.mark.parametrize("measure", [TenTimes(), RieszEnergy(s=1)], ids=repr)
@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(8, 12), Twice])
def test_what_is_noted_and_what_is_not_act_alike(measure, make):
    """Logging steps tell what they do; all others take the shorter way."""
    torch.manual_seed(0)
    module, grads = make(), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for stats in (False, True):
        module.weight.grad = torch.zeros_like(module.weight)
        UniformityRegularizer(measure, head=None).attach(module).add_gradients(
            optimizer, stats=stats
        )
        grads.append(module.weight.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("number", [np.float64, np.float32, np.float16])
def test_numbers_of_other_libraries_become_python_s(number):
    """Equal measures share what is compiled for a kernel, which fits one type of number only."""
    riesz = RieszEnergy(s=number(0.5), softening=number(0.25))
    gaussian = GaussianPotential(t=number(2.0))
    assert {type(riesz.s), type(riesz.softening), type(gaussian.t)} == {float}
    assert (riesz, gaussian) == (RieszEnergy(s=0.5, softening=0.25), GaussianPotential(t=2.0))
