"""The compiled path is taken only after it has computed a small layer as float64 does."""

import warnings

import pytest
import torch

from lightning_hsu._core import backend as backends
from lightning_hsu._core.foreach import add_pair_gradients
from lightning_hsu._core.topk import largest_two
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu.measures import GaussianPotential, RieszEnergy
from tests.test_triton import (
    DEVICE,
    LAUNCHES,
    MEASURES,
    choose,
    counted,
    exact,
    neurons,
    relative_error,
)


@pytest.fixture
def launch(monkeypatch):
    """The module that launches, of a back end that has checked nothing yet."""
    found = choose("triton", monkeypatch, checked=False)
    backends._load.cache_clear()
    yield found
    backends._load.cache_clear()


def added(w, term):
    out = torch.zeros_like(w)
    add_pair_gradients([GradientUpdate(w, out, 1.0)], term)
    return out


class Sabotaged:
    """A kernel after which one entry of what it wrote is another, the one at place 66, or 5."""

    def __init__(self, kernel, argument, factor):
        self.kernel = kernel
        self.argument = argument
        self.factor = factor

    def __getitem__(self, grid):
        def run(*arguments, **settings):
            self.kernel[grid](*arguments, **settings)
            written = arguments[self.argument].view(-1)
            written[66 if len(written) > 66 else 5] *= self.factor

        return run


def test_it_runs_once_for_each_kernel(launch, monkeypatch):
    names = counted(launch, monkeypatch)
    w = neurons(1, 9, 7)
    for term in (RieszEnergy(s=2).pair_term(), RieszEnergy(s=2, half_space=True).pair_term()):
        names.clear()
        added(w, term)
        assert names == LAUNCHES * 2  # the trial layer and this one
        names.clear()
        added(w, term)
        assert names == LAUNCHES


@pytest.mark.parametrize(
    ("kernel", "argument", "factor"),
    [
        ("products", 4, 1.01),
        ("products", 4, float("nan")),
        ("pair_slopes", 4, 1.01),
        ("unit_rows", 2, -1.0),
        ("unit_rows", 3, 0.0),
    ],
)
def test_a_kernel_that_is_off_is_not_taken(launch, monkeypatch, kernel, argument, factor):
    """One of the sums, the slopes, the entries of unit rows or the inverse norms is wrong."""
    sabotaged = Sabotaged(getattr(launch.pairs, kernel), argument, factor)
    monkeypatch.setattr(launch.pairs, kernel, sabotaged)
    names = counted(launch, monkeypatch)
    w, term = neurons(1, 9, 7), RieszEnergy(s=2).pair_term()
    with pytest.warns(UserWarning, match=r"computed a gradient .* off by .*\(48, 40\)") as told:
        out = added(w, term)
    assert len(told) == 1
    assert relative_error(out, exact(w, term)) < 1e-5  # plain torch's
    names.clear()
    other = RieszEnergy(s=1, half_space=True).pair_term()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(added(w, other), exact(w, other)) < 1e-5
    assert not names


def test_a_kernel_that_does_not_compile_is_not_taken(launch, monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise ValueError("ptxas has failed\nwith many lines")

    monkeypatch.setattr(launch.pairs, "products", Broken())
    w, term = neurons(2, 9, 7), RieszEnergy(s=1).pair_term()
    with pytest.warns(UserWarning, match=r"raised ValueError: ptxas has failed over the gradient"):
        out = added(w, term)
    assert relative_error(out, exact(w, term)) < 1e-5


def test_neighbours_that_are_off_are_not_taken(launch, monkeypatch):
    from lightning_hsu._core.triton import topk

    monkeypatch.setattr(topk, "largest_two", Sabotaged(topk.largest_two, 2, 0.99))
    x = torch.nn.functional.normalize(neurons(1, 90, 7), dim=-1)
    with pytest.warns(UserWarning, match="found nearest neurons whose cosines are off by"):
        first, index, _ = largest_two(x, x.ne(0).any(-1), half_space=True, every=True)
    cosine = (x @ x.mT).abs()
    cosine.diagonal(dim1=1, dim2=2).zero_()
    torch.testing.assert_close(first, cosine.amax(-1))
    torch.testing.assert_close(cosine.gather(-1, index[..., None])[..., 0], first)


@pytest.mark.parametrize(
    "measure",
    [
        MEASURES[0],
        RieszEnergy(s=20, softening=0.0),
        RieszEnergy(s=-2, half_space=True),  # a constant energy: its gradient is rounding alone
        RieszEnergy(s=-1, distance="geodesic", half_space=True),
        GaussianPotential(t=1e-4, half_space=True),
        GaussianPotential(t=10.0),
    ],
    ids=repr,
)
def test_a_right_kernel_passes(launch, measure):
    from lightning_hsu._core.triton.self_check import TOLERANCES, _gradient_error

    error = _gradient_error(torch.device(DEVICE), measure.pair_term())
    assert 0 <= error < min(TOLERANCES.values()) / 4


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_may_come_first_in_any_surroundings(launch, mode):
    state = torch.get_rng_state()
    w, term = neurons(1, 9, 7), RieszEnergy(s=2).pair_term()
    torch.set_rng_state(state)
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast(DEVICE, torch.bfloat16):
            out = added(w, term)
    assert torch.equal(torch.get_rng_state(), state)
    assert relative_error(out, exact(w, term)) < 1e-5
