"""Pair gradients without synchronisation: equal to the exact ones, or computed so a step later."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hsu._core import (
    backend,
    batches,
    crowded,
    foreach,
    layouts,
    pair_energy,
    pairwise,
    repair,
    smallest_angle,
)
from lightning_hsu._core.batches import batches_of, layer_parts
from lightning_hsu._core.crowded import CrowdedLayers
from lightning_hsu._core.foreach import TorchBackend, add_pair_gradients
from lightning_hsu._core.group_numbers import at_right_angles
from lightning_hsu._core.pairwise import PANEL, small_pair_gradient, stack_pair_gradient
from lightning_hsu._core.updates import GradientUpdate, shortening
from lightning_hsu._core.without_sync import (
    add_batch,
    gradients_without_sync,
    numbers_without_sync,
)
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


def by_one_pass(ws, terms, **settings):
    """What one pass adds for layers, without asking anything."""
    outs = [torch.zeros_like(w) for w in ws]
    updates = [GradientUpdate(w, out, 1.0, **settings) for w, out in zip(ws, outs, strict=True)]
    for batch in batches_of(zip(updates, terms, strict=True)):
        add_batch(batch, gradients_without_sync(batch))
    return outs


def exactly(w, term):
    """The gradient of what is minimised, the readable way."""
    value, grad = pair_energy(w, term)
    return grad / value[:, None, None] if term.logarithm else grad


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("measure", KERNELS, ids=repr)
@pytest.mark.parametrize("entries", [2**26, 2**13])  # whole, and in pieces
def test_equal_to_the_exact_ones(measure, entries, monkeypatch):
    """In float32 off by 1.2e-6 here, and by 3e-6 where products round otherwise."""
    monkeypatch.setattr(batches, "_PANEL_ENTRIES", entries)
    for dtype, bound in ((torch.float32, 6e-6), (torch.float64, 1e-12)):
        shapes = [(1, 2, 8), (3, 65, 40), (2, 130, 64), (1, 600, 16)]
        ws, term = [3.0 * neurons(*shape, dtype=dtype) for shape in shapes], measure.pair_term()
        for w, found in zip(ws, by_one_pass(ws, [term] * 4), strict=True):
            assert error(found, exactly(w, term)) < bound


TROUBLES = {
    "near": lambda w: w[4] * 1.01 + 1e-2 * w[5],
    "very near": lambda w: w[4] * 7.0 + 1e-4 * w[5],
    "opposite": lambda w: -w[4] + 3e-3 * w[5],
    "zero": lambda w: 0.0 * w[4],
    "subnormal": lambda w: 1e-42 * w[4],
    "tiny": lambda w: 1e-20 * w[7],
    "huge": lambda w: 1e20 * w[7],
    "tiny and near": lambda w: 1e-30 * (w[4] + 1e-2 * w[5]),
    "infinite": lambda w: w[4] / 0.0,
    "nan": lambda w: w[4] * float("nan"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("measure", KERNELS, ids=repr)
def test_what_needs_care_is_done_in_the_pass(measure, trouble):
    """Compared with float64; the exact way's own error, of its float32 products, is allowed."""
    term = measure.pair_term()
    ws = [neurons(3, 40, 16), neurons(1, 130, 24)]
    for w in ws:
        w[-1, 7] = TROUBLES[trouble](w[-1])
    for w, found in zip(ws, by_one_pass(ws, [term, term]), strict=True):
        own = exactly(w, term)
        lengths = w.double().norm(dim=-1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
        exact = exactly(w.double(), term) * lengths  # on the sphere, where rows compare
        assert found.isfinite().all()
        allowed = 1.5 * error(own.double() * lengths, exact) + 2e-7
        assert error(found.double() * lengths, exact) < allowed


def test_layers_of_several_kernels_go_together():
    ws = [neurons(2, 70, 16), neurons(1, 70, 16) * 2.0, neurons(1, 30, 16), neurons(1, 30, 9)]
    for w in ws:
        w[0, 3], w[0, 5] = w[0, 9] + 1e-3 * w[0, 1], 0.0
    measures = [KERNELS[2], KERNELS[1], GaussianPotential(), GaussianPotential(half_space=True)]
    terms = [measure.pair_term() for measure in measures]
    updates = [GradientUpdate(w, w, 1.0) for w in ws]
    assert len(batches_of(zip(updates, terms, strict=True))) == 1
    for w, term, found in zip(ws, terms, by_one_pass(ws, terms), strict=True):
        assert error(found, exactly(w.double(), term)) < 1e-6


def test_near_rows_in_a_row_add_up():
    """A cluster: every row has many near partners, listed on both sides of several panels."""
    w = neurons(1, 600, 30)
    w[0, ::25] = w[0, :1] + 0.02 * w[0, ::25]
    for measure in KERNELS:
        term = measure.pair_term()
        exact = exactly(w.double(), term)
        allowed = 1.5 * error(exactly(w, term), exact) + 2e-7
        assert error(by_one_pass([w], [term])[0], exact) < allowed


@pytest.mark.parametrize("trouble", [None, "very near", "zero", "coincident", "huge"])
@pytest.mark.parametrize("measure", KERNELS, ids=repr)
def test_value_and_gradient_come_from_one_pass_on_a_gpu(measure, trouble, monkeypatch):
    """Of many groups at once, in parts; where it lacks something the long way is taken."""
    term = measure.pair_term()
    w = neurons(5, 70, 16)
    if trouble == "coincident":
        w[2, 7] = 3.0 * w[2, 4]
    elif trouble is not None:
        w[2, 7] = TROUBLES[trouble](w[2])
    expected = pair_energy(w, term)
    passes = []

    def noted(batch, **kwargs):
        passes.append(batch)
        return gradients_without_sync(batch, **kwargs)

    monkeypatch.setattr(pairwise, "takes_one_pass", lambda w, term: True)
    monkeypatch.setattr(pairwise, "gradients_without_sync", noted)
    monkeypatch.setattr(batches, "_STACK_ENTRIES", 2 * 70 * 16)
    found = pair_energy(w, term)
    assert len(passes) == 3
    torch.testing.assert_close(found[0], expected[0], rtol=6e-6, atol=1e-7)
    assert error(found[1], expected[1].double()) < 6e-6
    if trouble == "coincident":
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("measure", KERNELS, ids=repr)
@pytest.mark.parametrize("entries", [2**26, 2**13])
def test_what_a_logging_step_needs_comes_from_the_same_pass(measure, entries, monkeypatch):
    other = RieszEnergy(s=1, half_space=True).pair_term()
    ws = [neurons(3, 65, 40), neurons(1, 2, 8), neurons(2, 300, 16), neurons(1, 70, 16)]
    ws[0][1, 4], ws[0][1, 6], ws[0][2, 8] = 0.0, 1e-42, float("nan")
    ws[2][1, 7] = ws[2][1, 4] * 2.0 + 1e-3 * ws[2][1, 5]
    ws[2][0, 7] = -ws[2][0, 4] + 1e-2 * ws[2][0, 5]
    terms = [measure.pair_term()] * 3 + [other]
    updates = [GradientUpdate(w, torch.zeros_like(w), 1.0) for w in ws]
    (batch,) = batches_of(zip(updates, terms, strict=True))
    monkeypatch.setattr(batches, "_PANEL_ENTRIES", entries)
    plain, found = gradients_without_sync(batch), gradients_without_sync(batch, stats=True)
    assert found.numbers is not None
    told = found.numbers.of_groups(found.numbers.values.tolist())
    groups = iter(told)
    for update, term in batch.work:
        own = [next(groups) for _ in range(len(update.w))]
        assert all(group.is_exact for group in own)
        energy = pair_energy(update.w, term)[0].double()
        found_energy = torch.tensor([group.energy for group in own], dtype=torch.float64)
        torch.testing.assert_close(found_energy, energy, rtol=6e-6, atol=1e-6)
        angle = smallest_angle(update.w, half_space=term.half_space).double()
        cosine = torch.tensor([group.cosine for group in own], dtype=torch.float64)
        torch.testing.assert_close(cosine.acos(), angle, rtol=2e-6, atol=1e-6)
        usable = update.w.abs().amax(-1) >= torch.finfo(torch.float32).tiny
        finite = update.w.isfinite().all(-1)
        assert [group.live for group in own] == (finite & usable).sum(-1).tolist()
        assert [group.finite for group in own] == finite.sum(-1).tolist()
    for a, b in zip(layer_parts(batch, plain.grad), layer_parts(batch, found.grad), strict=True):
        assert torch.equal(a, b)
    alone = numbers_without_sync(batch)
    assert alone.numbers.of_groups(alone.numbers.values.tolist()) == told  # bit for bit
    for a, b in zip(alone.pairs, found.pairs, strict=True):
        assert torch.equal(a[0], b[0])


class OnlyOneWay:
    """Layers on a CPU taken as if they were on a GPU; counts those that go the exact way."""

    def __init__(self, monkeypatch):
        self.exact = 0
        monkeypatch.setattr(foreach, "avoids_sync", lambda update, term: update.size[1] > 1)
        monkeypatch.setattr(foreach, "_CROWDED", CrowdedLayers())
        exactly = foreach.add_exactly

        def counted(updates, term):
            self.exact += len(updates)
            exactly(updates, term)

        monkeypatch.setattr(foreach, "add_exactly", counted)

    def step(self, ws, term):
        outs = [torch.zeros_like(w) for w in ws]
        updates = [GradientUpdate(w, out, 1.0) for w, out in zip(ws, outs, strict=True)]
        self.exact = 0
        add_pair_gradients(updates, term)
        return outs


def test_few_of_the_layers_that_go_the_exact_way_are_remembered(monkeypatch):
    """Those that came first are forgotten, since nobody may ask for them again."""
    monkeypatch.setattr(crowded, "_KEPT", 3)
    term = RieszEnergy(s=2).pair_term()
    ours = OnlyOneWay(monkeypatch)
    ws = [neurons(1, 40, 16) for _ in range(5)]
    for w in ws:
        w[0, 7] = 2.0 * w[0, 4]
        ours.step([w], term)
        ours.step([w], term)
        assert ours.exact == 1
    ours.step(ws[2:], term)
    assert ours.exact == 3
    ours.step(ws[:1], term)
    assert ours.exact == 0


@pytest.mark.parametrize("half_space", [False, True])
def test_coincident_rows_go_the_exact_way_from_the_next_step_on(half_space, monkeypatch):
    term = RieszEnergy(s=2, half_space=half_space).pair_term()
    ws = [neurons(1, 40, 16), neurons(1, 50, 16)]
    ws[1][0, 7] = (-2.0 if half_space else 2.0) * ws[1][0, 4]
    way = OnlyOneWay(monkeypatch)
    first = way.step(ws, term)
    assert way.exact == 0
    assert all(out.isfinite().all() for out in first)
    others = torch.ones(50, dtype=torch.bool).scatter_(0, torch.tensor([4, 7]), False)
    exact = pair_energy(ws[1], term)[1]
    torch.testing.assert_close(first[1][0, others], exact[0, others], rtol=1e-5, atol=1e-6)
    for _ in range(3):
        second = way.step(ws, term)
        assert way.exact == 1
        torch.testing.assert_close(second[1], exact)
        torch.testing.assert_close(second[0], pair_energy(ws[0], term)[1], rtol=1e-5, atol=1e-6)
    ws[1][0, 7] = -ws[1][0, 9]  # opposite in full space, coincident in half space
    counts = []
    for _ in range(20):
        way.step(ws, term)
        counts.append(way.exact)
    assert set(counts[:3]) == {1} if half_space else counts[-3:] == [0, 0, 0]


def test_a_crowded_layer_goes_the_exact_way_until_it_is_no_longer_so(monkeypatch):
    monkeypatch.setattr(layouts, "_CAPACITY", 2**11)  # 128 pairs
    layouts.layout_of.cache_clear()
    term = RieszEnergy(s=2).pair_term()
    ws = [neurons(1, 100, 16), neurons(1, 120, 16)]
    ws[1][0, 3] = ws[1][0, 9] + 1e-3 * ws[1][0, 1]
    spread = ws[0].clone()
    ws[0] += 30.0 * ws[0][:, :1]
    way = OnlyOneWay(monkeypatch)
    first = way.step(ws, term)
    assert way.exact == 0
    assert all(out.isfinite().all() for out in first)
    assert float(first[0].norm()) < float(pair_energy(ws[0], term)[1].norm())  # too gentle, once
    for _ in range(2):
        found = way.step(ws, term)
        assert way.exact == 1
        for w, out in zip(ws, found, strict=True):
            torch.testing.assert_close(out, pair_energy(w, term)[1], rtol=1e-5, atol=1e-5)
    ws[0].copy_(spread)
    counts = []
    for _ in range(18):
        way.step(ws, term)
        counts.append(way.exact)
    assert counts[-1] == 0
    layouts.layout_of.cache_clear()


@pytest.mark.parametrize("found_by", ["nonzero_static", "cumsum"])
def test_the_first_places_of_a_mask(found_by, monkeypatch):
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0]).bool()
    if found_by == "cumsum":  # as on a GPU before torch 2.7
        monkeypatch.setattr(repair, "_VERSION", (2, 6))
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert repair.first_places(mask, 2).tolist() == [1, 3]
    assert repair.first_places(mask, 6).tolist() == [1, 3, 4, 6, 7, 7]


def test_nothing_is_asked():
    """On tensors without data every question is an error, as it is while a CUDA graph is captured."""
    for measure in KERNELS:
        term = measure.pair_term()
        at_right_angles(term)  # kept, as is what the layout holds
        w = neurons(4, 70, 30)
        by_one_pass([w], [term])
        with FakeTensorMode() as mode:
            layouts.layout_of.cache_clear()
            w = mode.from_tensor(w)
            assert by_one_pass([w], [term])[0].shape == (4, 70, 30)
            with pytest.raises(Exception, match=r"data.dependent|_local_scalar_dense"):
                pair_energy(w, term)
        layouts.layout_of.cache_clear()


def layers(device="cpu"):
    """Of one shape and of others; groups, a near pair, a dead row, one neuron, half precision, views with strides."""
    crowded = neurons(2, 20, 16)
    crowded[1, 3], crowded[0, 5] = crowded[1, 9] + 1e-3 * crowded[1, 2], 0.0
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
    monkeypatch.setattr(foreach, "avoids_sync", lambda update, term: update.size[1] > 1)
    monkeypatch.setattr(batches, "_STACK_ENTRIES", large)
    same(added(measure), exact)


@pytest.mark.parametrize("measure", KERNELS, ids=repr)
@pytest.mark.parametrize("shape", [(60, 16, 16), (3, 1, 5), (2, 2, 2), (1, 100, 40), (5, 7, 30)])
def test_small_layers_take_a_short_way_to_the_same_gradient(measure, shape):
    term = replace(measure.pair_term(), logarithm=True)
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        w = 3.0 * neurons(*shape, dtype=dtype)
        if shape == (2, 2, 2):
            w[..., 0, :], w[..., 1, :] = torch.eye(2, dtype=dtype)
        found = small_pair_gradient(w, term)
        exact, exact_grad = pair_energy(w, term)
        exact_grad = exact_grad / torch.where(exact > 0, exact, 1.0)[:, None, None]
        torch.testing.assert_close(found.norm, w.norm(dim=-1, keepdim=True))
        torch.testing.assert_close(found.grad, exact_grad, rtol=bound, atol=bound)
        assert torch.equal(found.grad, small_pair_gradient(w, term).grad)


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
    with pytest.raises(
        ValueError, match="must be one of torch, compiled, cudagraph, triton; got 'jax'"
    ):
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
    # Entries are small differences, and only the value needs the kernel: measured 1.2e-5.
    torch.testing.assert_close(out, grad * factor, rtol=5e-5, atol=0.0)


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("case", ["plain", "near pairs", "a zero row", "float64"])
def test_the_gradient_alone_is_that_beside_the_value(case, half_space):
    w = neurons(2, 150, 24)
    if case == "near pairs":
        w[0, 3] = w[0, 140] + 1e-3 * w[0, 2]
        w[1, 5] = -w[1, 7]
    if case == "a zero row":
        w[0, 9] = 0.0
    if case == "float64":
        w = w.double()
    term = RieszEnergy(s=2.0, half_space=half_space).pair_term()
    grad = pair_energy(w, term)[1]
    off = (stack_pair_gradient(w, term).grad - grad).norm(dim=-1)
    assert (off <= 5e-6 * grad.norm(dim=-1)).all()  # measured: 8.4e-7


def test_layouts_are_kept_within_bounds(monkeypatch):
    monkeypatch.setattr(layouts, "_FEW", 3)
    kept = layouts._Layouts()
    sets = [((0, 1, n, 16),) for n in range(20, 40)]

    def ask(shapes):
        return kept(shapes, (False,), 2**20, torch.device("cpu"))

    found = [ask(shapes) for shapes in sets]
    assert all(ask(shapes) is one for shapes, one in zip(sets, found, strict=True))
    monkeypatch.setattr(layouts, "_BYTES", sum(one.tables.nbytes for one in found[-5:]))
    assert ask(sets[-1]) is found[-1]
    assert all(ask(shapes) is one for shapes, one in zip(sets[-5:], found[-5:], strict=True))
    assert ask(sets[0]) is not found[0]
    monkeypatch.setattr(layouts, "_BYTES", 0)  # a few are kept whatever their memory is
    last = [ask(shapes) for shapes in sets[:3]]
    assert all(ask(shapes) is one for shapes, one in zip(sets[:3], last, strict=True))
    assert len(kept._known) == 3
