"""Products in bfloat16: how far off, where they give way to exact ones, and who asks for them."""

import pytest
import torch

from lightning_hsu import HypersphericalUniformity, UniformityRegularizer
from lightning_hsu._core import bf16, bf16_products, pair_rows
from lightning_hsu.measures import GaussianPotential, KoLeo, RieszEnergy
from tests.members import InverseFourth

FULL = [
    RieszEnergy(s=0),
    RieszEnergy(s=1),
    RieszEnergy(s=2),
    RieszEnergy(s=-1),
    RieszEnergy(s=1, distance="geodesic"),
]
OTHERS = [  # half space has no common pull that could be left out of the rounding
    RieszEnergy(s=2, half_space=True),
    RieszEnergy(s=1, half_space=True, distance="geodesic"),
    GaussianPotential(),
    InverseFourth(),
]


def neurons(kind, n=520, d=192):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, d, generator=generator)
    if kind == "uneven dimensions":
        x *= torch.linspace(0.01, 2.0, d)
    if kind == "a common direction":
        x += 0.5
    if kind == "dead ones":
        x[::9], x[5] = 0.0, float("nan")
    if kind == "crowded":
        x = torch.randn(4, d, generator=generator).repeat(n // 4, 1) + 0.1 * x
    if kind in ("1e-2", "1e-3", "1e-4"):  # 32 pairs at this chord
        unit, aside = (torch.nn.functional.normalize(part, dim=1) for part in (x[:32], x[32:64]))
        x[-32:] = 3.0 * (unit + float(kind) * aside)
    if kind == "groups":
        x = torch.stack([x[:260], 2.0 * x[260:]])
    return x


KINDS = [
    "as random",
    "uneven dimensions",
    "a common direction",
    "dead ones",
    "crowded",
    "1e-2",
    "1e-3",
    "1e-4",
    "groups",
]


def error(measure, x):
    exact = measure.value_and_grad(x.double())[1]
    with bf16_products(True):
        value, grad = measure.value_and_grad(x)
    assert torch.isfinite(value).all()
    assert grad.dtype == x.dtype
    return float((grad - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", FULL, ids=repr)
def test_full_space_to_2e_3(measure, kind):
    assert error(measure, neurons(kind)) < 2e-3  # measured: at most 1.4e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", OTHERS, ids=repr)
def test_others_to_1e_2(measure, kind):
    assert error(measure, neurons(kind)) < 1e-2  # measured: at most 5.3e-3


def test_values_are_close():
    for measure in (*FULL, *OTHERS):
        with bf16_products(True):
            value = measure.value_and_grad(neurons("as random"))[0]
        assert float(value) == pytest.approx(
            float(measure.penalty(neurons("as random").double())), rel=1e-3, abs=1e-3
        )


@pytest.mark.parametrize("kind", ["as random", "1e-3", "a common direction", "groups"])
def test_some_rows_are_as_precise_as_the_whole(kind):
    """Panels of another height round alike, to the precision of the whole."""
    x, term = neurons(kind), RieszEnergy(s=2).pair_term()
    exact = RieszEnergy(s=2).value_and_grad(x.double())[1]
    rows = (torch.arange(x.shape[-2]) % 3 == 0).expand(x.shape[:-1])
    with bf16_products(True):
        some = pair_rows(x, term, rows)
    assert not some[~rows].any()
    assert float((some - exact)[rows].norm() / exact[rows].norm()) < 2e-3


def test_crowded_panels_are_exact():
    assert error(RieszEnergy(s=2), neurons("crowded")) < 1e-6


def test_products_are_rounded_where_asked_for_and_nowhere_else():
    x, measure = neurons("as random"), RieszEnergy(s=2)
    exact = measure.value_and_grad(x)[1]
    with bf16_products(True):
        assert not torch.equal(measure.value_and_grad(x)[1], exact)
        small = x[:, : bf16.SMALLEST - 1]
        inside = measure.value_and_grad(small)[1], measure.value_and_grad(x.double())[1]
        with torch.no_grad():
            value = measure.penalty(x)
        with bf16_products(False):
            assert torch.equal(measure.value_and_grad(x)[1], exact)
    assert torch.equal(inside[0], measure.value_and_grad(small)[1])
    assert torch.equal(inside[1], measure.value_and_grad(x.double())[1])
    assert torch.equal(value, measure.penalty(x))
    assert torch.equal(measure.value_and_grad(x)[1], exact)


@pytest.mark.parametrize("way", ["gradient", "loss", "decoupled"])
def test_the_engine_lowers_what_acts_not_what_is_told(way):
    def stepped(precision):
        torch.manual_seed(0)
        model = torch.nn.Linear(192, 300, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regularizer = UniformityRegularizer(
            RieszEnergy(s=2), 1e3, head=None, matmul_precision=precision
        ).attach(model)
        told = regularizer.measure_layers()
        before = model.weight.detach().clone()
        (regularizer.penalty() if way == "loss" else 0.0 * model.weight.sum()).backward()
        if way == "gradient":
            regularizer.add_gradients(optimizer)
        optimizer.step()
        if way == "decoupled":
            regularizer.move(optimizer)
        return told, model.weight.detach() - before

    (told, exact), (told_too, lower) = stepped("highest"), stepped("medium")
    assert told == told_too
    assert 1e-6 < float((lower - exact).norm() / exact.norm()) < 2e-3


def test_other_measures_stay_exact():
    x = neurons("as random")
    with bf16_products(True):
        grad = KoLeo().value_and_grad(x)[1]
    assert torch.equal(grad, KoLeo().value_and_grad(x)[1])


def test_a_wrong_name_is_refused():
    with pytest.raises(
        ValueError, match="matmul_precision must be 'highest' or 'medium'; got 'high'"
    ):
        HypersphericalUniformity(matmul_precision="high")
