"""Pair sums that ask the device nothing: equal to the exact ones, or they say that they are not."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_hsu._core import batched, foreach, pair_energy
from lightning_hsu._core.batched import unasked_gradients
from lightning_hsu._core.foreach import add_pair_gradients
from lightning_hsu._core.updates import GradientUpdate
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
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


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


def layers(device="cpu"):
    """Of one shape and of others; groups, a near pair, a dead row, one neuron, half precision, views with strides."""
    crowded = neurons(2, 20, 16)
    crowded[1, 3], crowded[0, 5] = crowded[1, 9] * 1.001, 0.0
    found = [
        neurons(1, 20, 16),
        2.0 * neurons(1, 20, 16),
        crowded,
        neurons(1, 1, 9),
        neurons(1, 40, 12).bfloat16(),
    ]
    return [part.to(device) for part in [*found, neurons(1, 16, 30).mT]]


def added(measure, device="cpu"):
    """What the layers' places hold afterwards, which held ones before."""
    ws = layers(device)
    places = [torch.ones_like(w) for w in ws]
    settings = [
        {"scale": 0.5},
        {"scale": 0.5},
        {"scale": 50.0, "limit": 0.1},
        {"scale": 1.0},
        {"scale": 3.0, "grad_scale": 8.0},
    ]
    additions = [
        GradientUpdate(w, out, **kw)
        for w, out, kw in zip(ws, places, [*settings, {"scale": 1.0}], strict=True)
    ]
    add_pair_gradients(additions, measure.pair_term())
    return [out.cpu() for out in places]


def same(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)  # measured: 5e-7
        assert a.shape[1] == 1 or not torch.equal(a, torch.ones_like(a))


@pytest.mark.parametrize("measure", KERNELS, ids=repr)
@pytest.mark.parametrize("large", [2**26, 1])  # all of one shape together, or one by one
def test_what_waits_for_no_answer_adds_the_same(measure, large, monkeypatch):
    exact = added(measure)
    monkeypatch.setattr(foreach, "_waits", lambda w: w.shape[1] > 1)
    monkeypatch.setattr(foreach, "_LARGE", large)
    same(added(measure), exact)


def test_a_wrong_backend_and_one_that_cannot_be_are_refused(monkeypatch):
    monkeypatch.setenv("LIGHTNING_HSU_BACKEND", "jax")
    with pytest.raises(ValueError, match="must be one of torch, cudagraph, triton; got 'jax'"):
        added(RieszEnergy())
    if not torch.cuda.is_available():
        monkeypatch.setenv("LIGHTNING_HSU_BACKEND", "cudagraph")
        with pytest.raises(RuntimeError, match="no CUDA device; unset it"):
            added(RieszEnergy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "cudagraph"])
def test_on_a_gpu(backend, monkeypatch):
    monkeypatch.setenv("LIGHTNING_HSU_BACKEND", backend)
    for _ in range(3):  # a graph is captured, then replayed
        same(
            added(RieszEnergy(s=2, half_space=True), "cuda"),
            added(RieszEnergy(s=2, half_space=True)),
        )
