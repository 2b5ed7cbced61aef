"""Pair sums that ask the device nothing: equal to the exact ones, or they say that they are not."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_hsu.core import batched, pair_energy
from lightning_hsu.core.batched import unasked_gradients
from lightning_hsu.measures import GaussianPotential, RieszEnergy
from tests.members import InverseFourth

KERNELS = [
    RieszEnergy(s=0),
    RieszEnergy(s=1),
    RieszEnergy(s=2, half_space=True),
    RieszEnergy(s=2.5),
    RieszEnergy(s=1, softening=0.5),
    RieszEnergy(s=1, half_space=True, distance="geodesic"),
    GaussianPotential(),
    InverseFourth(),
]


def neurons(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("measure", KERNELS, ids=repr)
@pytest.mark.parametrize("shape", [(1, 2, 8), (3, 65, 40), (2, 130, 64)])
@pytest.mark.parametrize("entries", [2**26, 2**13])  # whole, and in panels
def test_equal_to_the_exact_ones(measure, shape, entries, monkeypatch):
    monkeypatch.setattr(batched, "_ENTRIES", entries)
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        w, term = 3.0 * neurons(*shape, dtype=dtype), measure.pair_term()
        value, grad, holds = unasked_gradients(w, term)
        exact, exact_grad = pair_energy(w, term)
        assert holds.all()
        torch.testing.assert_close(value.to(exact), exact, rtol=bound, atol=bound)
        assert float((grad - exact_grad).norm() / exact_grad.norm()) < bound


@pytest.mark.parametrize("trouble", ["near", "opposite", "zero", "tiny", "nan"])
def test_they_say_where_they_do_not_hold(trouble):
    w = neurons(3, 20, 16)
    w[1, 7] = {"near": w[1, 4] * 1.01, "opposite": -w[1, 4]}.get(trouble, torch.zeros(16))
    w[1, 7] += {"tiny": 1e-20, "nan": float("nan")}.get(trouble, 0.0)
    assert unasked_gradients(w, RieszEnergy(s=2).pair_term())[2].tolist() == [True, False, True]


def test_nothing_is_asked():
    """On tensors without data every question is an error, as it is while a CUDA graph is captured."""
    with FakeTensorMode():
        for measure in KERNELS:
            w = torch.empty(4, 70, 30)
            term = measure.pair_term()
            assert [part.shape for part in unasked_gradients(w, term)] == [(4,), (4, 70, 30), (4,)]
            with pytest.raises(Exception, match=r"data.dependent|_local_scalar_dense"):
                pair_energy(w, term)
