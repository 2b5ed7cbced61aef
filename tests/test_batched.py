"""Pair gradients without synchronisation: equal to the exact ones, or marked where they are not."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hsu._core import backend, foreach, pair_energy, without_sync
from lightning_hsu._core.foreach import TorchBackend, add_pair_gradients
from lightning_hsu._core.pairwise import PANEL, small_pair_gradient
from lightning_hsu._core.updates import GradientUpdate, shortening
from lightning_hsu._core.without_sync import gradients_without_sync
from lightning_hsu.measures import GaussianPotential, RieszEnergy
from tests.members import InverseFourth
from tests.tracing import files_called

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
    monkeypatch.setattr(without_sync, "_PANEL_ENTRIES", entries)
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        w, term = 3.0 * neurons(*shape, dtype=dtype), measure.pair_term()
        grad, norm, value, valid = gradients_without_sync(w, replace(term, logarithm=True))
        exact, exact_grad = pair_energy(w, term)
        assert valid.all()
        torch.testing.assert_close(norm, w.norm(dim=-1, keepdim=True))
        torch.testing.assert_close(value.to(exact), exact, rtol=bound, atol=bound)
        assert float((grad - exact_grad).norm() / exact_grad.norm()) < bound


@pytest.mark.parametrize("trouble", ["near", "opposite", "zero", "tiny", "nan"])
def test_groups_that_need_care_are_marked(trouble):
    w = neurons(3, 20, 16)
    w[1, 7] = {"near": w[1, 4] * 1.01, "opposite": -w[1, 4]}.get(trouble, torch.zeros(16))
    w[1, 7] += {"tiny": 1e-20, "nan": float("nan")}.get(trouble, 0.0)
    assert gradients_without_sync(w, RieszEnergy(s=2).pair_term()).valid.tolist() == [
        True,
        False,
        True,
    ]


def test_nothing_is_asked():
    """On tensors without data every question is an error, as it is while a CUDA graph is captured."""
    with FakeTensorMode():
        for measure in KERNELS:
            w = torch.empty(4, 70, 30)
            term = measure.pair_term()
            found = gradients_without_sync(w, term)
            assert found.grad.shape == (4, 70, 30)
            assert found.valid.shape == (4,)
            assert (found.value is not None) == term.logarithm
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
    monkeypatch.setattr(foreach, "avoids_sync", lambda w, term: w.shape[1] > 1)
    monkeypatch.setattr(without_sync, "_STACK_ENTRIES", large)
    same(added(measure), exact)


@pytest.mark.parametrize("measure", KERNELS, ids=repr)
@pytest.mark.parametrize("shape", [(60, 16, 16), (3, 1, 5), (2, 2, 2), (1, 100, 40), (5, 7, 30)])
def test_small_layers_take_a_short_way_to_the_same_gradient(measure, shape):
    term = replace(measure.pair_term(), logarithm=True)
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        w = 3.0 * neurons(*shape, dtype=dtype)
        if shape == (2, 2, 2):
            w[..., 0, :], w[..., 1, :] = torch.eye(2, dtype=dtype)
        grad, norm, value = small_pair_gradient(w, term)
        exact, exact_grad = pair_energy(w, term)
        torch.testing.assert_close(norm, w.norm(dim=-1, keepdim=True))
        torch.testing.assert_close(value.to(exact), exact, rtol=bound, atol=bound)
        torch.testing.assert_close(grad, exact_grad, rtol=bound, atol=bound)  # measured: the same
        assert all(map(torch.equal, (grad, value), small_pair_gradient(w, term)[::2]))


@pytest.mark.parametrize(
    "trouble", ["near", "opposite", "zero", "tiny", "huge", "nan", "many", "steep", "none"]
)
def test_small_layers_that_need_care_go_the_long_way(trouble):
    w, measure = neurons(3, 20, 16), RieszEnergy(s=2)
    assert small_pair_gradient(w, measure.pair_term()) is not None
    if trouble == "many":
        w = neurons(3, PANEL // 2, 16)
    if trouble == "steep":
        measure = RieszEnergy(s=30)
    if trouble == "none":
        w = w[:, :0]
    if trouble in ("near", "opposite"):
        w[1, 7] = w[1, 4] * (1.01 if trouble == "near" else -1.0)
    factors = {"zero": 0.0, "tiny": 1e-20, "huge": 1e20, "nan": float("nan")}
    if trouble in factors:
        w[1, 7] *= factors[trouble]
    term = measure.pair_term()
    assert small_pair_gradient(w, term) is None
    out = torch.zeros_like(w)
    groups = zip(w[:, None], out[:, None], strict=True)
    add_pair_gradients([GradientUpdate(*group, 1.0) for group in groups], term)
    torch.testing.assert_close(out, pair_energy(w, term)[1], rtol=1e-5, atol=1e-7)


def test_each_layer_of_a_stack_gets_its_own():
    """60 layers together, as a loop over them; settings that differ are kept apart."""
    ws, term = list(neurons(60, 1, 16, 16)), RieszEnergy(s=2, half_space=True).pair_term()
    for limit, grad_scale in ((None, 1.0), (1e-3, 4.0)):
        outs = [torch.ones_like(w) for w in ws]
        updates = [
            GradientUpdate(w, out, 0.1 * (1 + i % 2), limit, grad_scale)
            for i, (w, out) in enumerate(zip(ws, outs, strict=True))
        ]
        add_pair_gradients(updates, term)
        for update in updates:
            grad = update.scale * pair_energy(update.w, term)[1]
            room = float("inf") if limit is None else limit * update.w.norm(dim=-1, keepdim=True)
            grad *= (room / grad.norm(dim=-1, keepdim=True)).clamp_max(1.0)
            torch.testing.assert_close(update.out, 1.0 + grad_scale * grad, rtol=1e-6, atol=1e-6)


def test_a_stack_of_small_layers_is_few_operations():
    """Counted, not timed: what 60 layers of 16 x 16 cost is the number of calls."""
    ws, term = list(neurons(60, 1, 16, 16)), RieszEnergy(s=2, half_space=True).pair_term()
    updates = [GradientUpdate(w, torch.zeros_like(w), 1e-3, 0.5) for w in ws]
    add_pair_gradients(updates, term)
    calls = files_called(lambda: add_pair_gradients(updates, term))
    assert len(calls) <= 28  # measured: 24; 244 before small layers had a way of their own
    with Operations() as operations:
        add_pair_gradients(updates, term)
    assert operations.count <= 52  # measured: 48; 84 by way of PairSums


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Counting(backend.Backend):
    """A back end of its own: what it takes, and what it has been given."""

    name = "counting"
    given = ()

    def check_machine(self):
        """Any machine will do."""

    def takes_update(self, update, term):
        return update.w.shape[1] == 20

    def add_pair_gradients(self, updates, term):
        type(self).given = tuple(updates)
        TorchBackend().add_pair_gradients(updates, term)


def test_a_back_end_is_one_module_and_one_line(monkeypatch):
    """It gets the layers that it takes, all at once; torch gets the others."""
    expected = added(RieszEnergy(s=1))
    monkeypatch.setitem(backend._REGISTRY, "counting", f"{__name__}:Counting")
    monkeypatch.setenv("LIGHTNING_HSU_BACKEND", "counting")
    found = added(RieszEnergy(s=1))
    backend._load.cache_clear()
    assert len(Counting.given) == 3
    same(found, expected)


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


@pytest.mark.parametrize("norm", [1e-15, 1e-17])
def test_near_duplicates_of_tiny_norm_feel_a_force(norm):
    """At 1e-17 the squares of their gradient's entries overflow; the limit is all they may move."""
    w = neurons(1, 8, 12)
    w[0, 1] = w[0, 0] + 1e-3 * w[0, 2]
    w[0, :2] *= norm / w[0, :2].norm(dim=-1, keepdim=True)
    out = torch.zeros_like(w)
    term = RieszEnergy(s=2).pair_term()
    add_pair_gradients([GradientUpdate(w, out, 1.0, 0.5)], term)
    steps = out.norm(dim=-1) / w.norm(dim=-1)
    assert steps[0, :2].tolist() == pytest.approx([0.5, 0.5], rel=1e-5)
    grad = pair_energy(w, term)[1]
    factor = shortening(grad, w, 1.0, 0.5, 1e38)
    torch.testing.assert_close(out, grad * factor, rtol=1e-5, atol=0.0)
