"""Two back ends, one meaning: plain torch and the compiled kernels against differences in float64."""

from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hsu import UniformityRegularizer
from lightning_hsu._core import backend as backends
from lightning_hsu._core import bf16_products, oracle_energy
from lightning_hsu._core.foreach import add_pair_gradients
from lightning_hsu._core.kernel import softened_at
from lightning_hsu._core.neighbours import Nearest
from lightning_hsu._core.topk import largest_two
from lightning_hsu._core.triton import machine
from lightning_hsu._core.triton.machine import exact_precision, precision
from lightning_hsu._core.triton.self_check import SelfCheck
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu.measures import GaussianPotential, RieszEnergy
from tests.members import InverseFourth

DEVICE = (
    "cuda" if torch.cuda.is_available() else "cpu"
)  # without one Triton's interpreter runs the kernels; see conftest.py
BACKENDS = ["torch", "triton"]
CLOSE = 2e-5  # measured: at most 6.7e-6, where two of 63 neurons in five dimensions come near
MEASURES = [
    *(RieszEnergy(s=s, half_space=half) for s in (0, 1, 2, 2.5, -1) for half in (False, True)),
    *(
        RieszEnergy(s=s, distance="geodesic", half_space=half)
        for s in (0, 1, -0.5)
        for half in (False, True)
    ),
    *(GaussianPotential(t=t, half_space=half) for t in (2.0, 10.0) for half in (False, True)),
]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Which back end; in the interpreter with row blocks that suit it."""
    choose(request.param, monkeypatch)
    return request.param


@pytest.fixture
def launch(monkeypatch):
    """The module that launches, of the compiled back end alone."""
    return choose("triton", monkeypatch)


def choose(name, monkeypatch, checked=True):
    """Choose a back end; ``checked`` spares it the trial layer of test_self_check.py."""
    if name == "triton":
        pytest.importorskip(
            "triton", minversion="3.2", reason="triton >= 3.2, an optional extra, is not installed"
        )
        if checked:
            for name_of_check in ("gradients_are_right", "neighbours_are_right"):
                monkeypatch.setattr(SelfCheck, name_of_check, lambda *_: True)
    monkeypatch.setenv("LIGHTNING_HSU_BACKEND", name)
    if name == "triton":
        from lightning_hsu._core.triton import launch

        if DEVICE == "cpu":
            monkeypatch.setattr(launch, "ROWS", 32)
            monkeypatch.setattr(launch, "COLS", 64)
            monkeypatch.setattr(launch, "CHUNK", 64)
        return launch
    return None


def neurons(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def exact(w, term):
    """The gradient by differences and autograd, in float64."""
    x = w.detach().double().requires_grad_()
    value = oracle_energy(x, term)
    if term.logarithm:
        value = torch.where(value > 0, value, 1.0).log()
    return torch.autograd.grad(value.sum(), x)[0]


def relative_error(a, b):
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-300))


def added(ws, term, scale=1.0, **options):
    """What is added to each layer beside what was there: zeros."""
    outs = [torch.zeros_like(w) for w in ws]
    add_pair_gradients(
        [GradientUpdate(w, out, scale, **options) for w, out in zip(ws, outs, strict=True)], term
    )
    return outs


def counted(launch, monkeypatch):
    """Kernels launched from here on, by name."""
    names = []
    for module in (launch.pairs, launch.nearby):
        for name in LAUNCHES:
            kernel = getattr(module, name, None)
            if kernel is not None:
                monkeypatch.setattr(module, name, Watched(name, kernel, names))
    return names


LAUNCHES = ["unit_rows", "pair_slopes", "products", "near_pulls", "factors", "additions"]


class Watched:
    """A kernel that notes when it is launched."""

    def __init__(self, name, kernel, names):
        self.name = name
        self.kernel = kernel
        self.names = names

    def __getitem__(self, grid):
        self.names.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
def test_all_formulas(backend, measure):
    ws = [neurons(1, 9, 7), neurons(2, 5, 2)]
    for w, out in zip(ws, added(ws, measure.pair_term()), strict=True):
        far = relative_error(out, exact(w, measure.pair_term()))
        assert far < CLOSE  # where five neurons in the plane nearly balance


@pytest.mark.parametrize(
    "measure", [RieszEnergy(s=2), GaussianPotential(half_space=True)], ids=repr
)
def test_odd_shapes_together(backend, measure):
    shapes = [(1, 1, 5), (1, 2, 2), (2, 3, 70), (1, 63, 5), (1, 65, 70), (2, 130, 5), (3, 2, 2)]
    ws = [neurons(*shape) for shape in shapes]
    for w, out in zip(ws, added(ws, measure.pair_term()), strict=True):
        expected = exact(w, measure.pair_term())
        if (
            w.shape[1] == 1 or float(expected.norm()) < 1e-12
        ):  # alone, or two that are as far apart as can be
            assert float(out.abs().max()) < 1e-5
        else:
            assert relative_error(out, expected) < CLOSE


def test_views_of_any_strides(backend):
    term = RieszEnergy(s=1).pair_term()
    packed = neurons(3 * 17, 12)
    conv = neurons(6, 4, 3, 3)
    plain = neurons(21, 19)
    ws = [
        plain.T[None],
        packed.reshape(3, 17, 12)[1:2],
        conv.reshape(2, 3, 36),
        conv.movedim(1, 0).flatten(1)[None],
    ]
    outs = [torch.ones(19, 21, device=DEVICE)[None], torch.ones(12, 17, device=DEVICE).T[None]]
    outs += [torch.ones(2, 3, 72, device=DEVICE)[..., ::2], torch.ones(1, 4, 54, device=DEVICE)]
    add_pair_gradients([GradientUpdate(w, out, 0.5) for w, out in zip(ws, outs, strict=True)], term)
    for w, out in zip(ws, outs, strict=True):
        torch.testing.assert_close(out.double(), 1 + 0.5 * exact(w, term), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chord", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("half", [False, True])
def test_near_pairs(backend, chord, half):
    term = RieszEnergy(s=2, half_space=half, softening=0.0).pair_term()
    w = neurons(2, 130, 11)
    w[0, 100] = w[0, 7] * 3 + chord * 3 * w[0, 7].norm() * neurons(11) / 3
    w[0, 8] = w[0, 7] + chord * w[0, 7].norm() * neurons(11) / 3
    w[1, 70] = -w[1, 66] + chord * w[1, 66].norm() * neurons(11) / 3
    w[1, 129] = -2 * w[1, 3]
    w[1, 5] *= 0.0
    other = neurons(1, 3, 4)
    outs = added([other, w], term)
    assert relative_error(outs[0], exact(other, term)) < 1e-5
    expected = exact(w, term)
    if half:  # exactly opposite neurons are one point: they part along a seeded direction that differences cannot see
        expected[1, [3, 129]] = outs[1][1, [3, 129]].double()
    assert relative_error(outs[1][0], expected[0]) < 3e-6  # measured: at most 1.2e-6
    assert relative_error(outs[1][1], expected[1]) < 3e-6


@pytest.mark.parametrize("half", [False, True])
def test_coincident_neurons_part_in_the_same_way(monkeypatch, half):
    term, w = RieszEnergy(s=1, half_space=half).pair_term(), neurons(1, 70, 6)
    w[0, 66] = w[0, 2]
    w[0, 67] = 5 * w[0, 2]
    w[0, 3] = -w[0, 9]
    choose("torch", monkeypatch)
    (expected,) = added([w], term)
    choose("triton", monkeypatch)
    (first,) = added([w], term)
    assert bool(first.isfinite().all())  # the kernels leave them where they are, and tell so
    (out,) = added([w], term)
    assert float(out[0, 66].norm()) > 0
    assert relative_error(out, expected.double()) < 1e-6


class Asked(TorchDispatchMode):
    """Notes the operations for whose answer a host would wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITING:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "measure", [RieszEnergy(s=2, half_space=True), GaussianPotential()], ids=repr
)
def test_the_host_waits_for_nothing(launch, monkeypatch, measure):
    """Near pairs, zero rows and little room are all settled on the device; then flags are read."""
    term = measure.pair_term()
    ws = [neurons(1, 70, 9), neurons(2, 33, 5), neurons(1, 66, 7)]
    ws[0][0, 69] = ws[0][0, 2] + 1e-3 * neurons(9)
    ws[1][1, 3] = 0.0
    ws[2][0, 65] = ws[2][0, 4]
    monkeypatch.setattr(launch, "WORKSPACE", 250_000)
    outs = [torch.zeros_like(w) for w in ws]
    updates = [GradientUpdate(w, out, 1.0) for w, out in zip(ws, outs, strict=True)]
    softened_at(term, 4.0)  # a number of the kernel, worked out once on the host
    with Asked() as asked:
        answers = launch.add_pair_gradients(updates, term)
    assert len(answers) == 2  # passes, none of which waits
    assert asked.names == []
    assert [answer.found() for answer in answers] == [set(), {2}]
    for w, out in zip(ws[:2], outs[:2], strict=True):
        assert relative_error(out, exact(w, term)) < CLOSE


def test_coincident_neurons_keep_their_layer_alone_from_the_kernels(launch, monkeypatch):
    """And only at the step after the one that has seen them, in which torch parts them."""
    names = counted(launch, monkeypatch)
    term, ws = RieszEnergy(s=1).pair_term(), [neurons(1, 20, 6), neurons(1, 9, 4)]
    ws[0][0, 3] = ws[0][0, 11]
    pushes = []
    for _ in range(3):
        names.clear()
        outs = added(ws, term)
        assert names == LAUNCHES
        assert relative_error(outs[1], exact(ws[1], term)) < CLOSE
        pushes.append(float((outs[0][0, 3] - outs[0][0, 11]).norm()))
    assert pushes[1] > 100 * max(pushes[0], pushes[2])


def test_a_collapsed_layer(backend):
    term = RieszEnergy(s=1).pair_term()
    n = 300 if backend == "torch" else 66  # of which the interpreter redoes each by itself
    w = neurons(1, 1, 6) + 1e-2 * neurons(1, n, 6)
    assert relative_error(added([w], term)[0], exact(w, term)) < 1e-6


def test_dead_rows_and_any_norm(backend):
    for measure in (RieszEnergy(s=2, half_space=True), GaussianPotential()):
        term, w = measure.pair_term(), neurons(2, 67, 5)
        clean = w.clone()
        w[0, 3], w[0, 65] = 0.0, float("nan")
        w[0, 66, 2], w[1, 1] = float("inf"), 1e-40
        clean[0, [3, 65, 66]], clean[1, 1] = 0.0, 0.0
        factor = torch.ones(2, 67, 1, device=DEVICE)
        factor[:, 5], factor[:, 6], factor[:, 64], factor[:, 7] = 1e-18, 1e18, 1e-8, 1e30
        (out,) = added([w * factor], term)
        expected = exact(clean, term)
        assert bool(out.isfinite().all())
        torch.testing.assert_close(out.double() * factor.double(), expected, rtol=1e-5, atol=2e-6)
        assert not out[0, [3, 65, 66]].any()
        assert not out[1, 1].any()


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_half_precision_weights(backend, dtype, close):
    term = RieszEnergy(s=2).pair_term()
    w = neurons(1, 65, 33, dtype=dtype)
    single = neurons(1, 9, 4)
    out, plain = added([w, single], term, scale=64.0)
    assert out.dtype == dtype
    assert (
        relative_error(out, 64 * exact(w, term)) < close
    )  # measured: 3.3e-3, 4e-4; rounding of the weights
    assert relative_error(plain, 64 * exact(single, term)) < 5e-6


def test_the_step_limit_and_what_the_gradient_carries(backend):
    term = RieszEnergy(s=2).pair_term()
    w = neurons(2, 33, 4)
    expected = 3.0 * exact(w, term)
    for limit in (1e-3, 1e-2, 1e9):
        (out,) = added([w], term, scale=3.0, limit=limit, grad_scale=8.0)
        room = limit * w.double().norm(dim=-1, keepdim=True)
        length = expected.norm(dim=-1, keepdim=True)
        shortened = expected * torch.where(length > room, room / length, 1.0)
        assert relative_error(out, 8.0 * shortened) < 5e-6
    tiny = neurons(1, 5, 3, dtype=torch.float16) * 1e-5
    assert bool(added([tiny], term, scale=1e5)[0].isfinite().all())
    steep = RieszEnergy(s=12, softening=0.0).pair_term()
    w[0, 1] = w[0, 0] * (1 + 1e-6)
    w[0, 3] = w[0, 2] + 1e-6 * neurons(4)
    assert bool(added([w * 1e-20], steep)[0].isfinite().all())
    assert bool(added([w * 1e-20], steep, limit=0.1)[0].isfinite().all())


def test_layers_the_kernels_do_not_know_go_through_torch(launch, monkeypatch):
    names = counted(launch, monkeypatch)
    wide, own = neurons(1, 5, 3, dtype=torch.float64), InverseFourth().pair_term()
    assert (
        relative_error(
            added([wide], RieszEnergy(s=1).pair_term())[0],
            exact(wide, RieszEnergy(s=1).pair_term()),
        )
        < 1e-12
    )
    soft, steep = RieszEnergy(s=1, softening=0.5).pair_term(), RieszEnergy(s=40).pair_term()
    for term in (own, soft, steep):
        w = neurons(1, 5, 3)
        assert relative_error(added([w], term)[0], exact(w, term)) < 1e-5
    assert not names
    one, two = added([wide, neurons(1, 5, 3)], RieszEnergy(s=1).pair_term())
    assert float(one.norm()) > 0
    assert float(two.norm()) > 0
    assert names == LAUNCHES


def test_rounds_and_row_panels(launch, monkeypatch):
    """In little room layers go one after the other, and a large one in panels, with near pairs across their seams."""
    ws = [neurons(1, 65, 5), neurons(1, 200, 9), neurons(2, 66, 5), neurons(1, 30, 3)]
    ws[1][0, 170] = 2 * ws[1][0, 10] + 1e-3 * neurons(9)
    ws[1][0, 150] = ws[1][0, 151] + 1e-3 * neurons(9)
    for measure, room, height, launches in (
        (RieszEnergy(s=2), 2**30, 4, 6),
        (RieszEnergy(s=2), 350_000, 4, 18),
        (RieszEnergy(s=2), 60_000, 1, 48),
        (GaussianPotential(t=5), 350_000, 4, 18),
    ):
        term = measure.pair_term()
        monkeypatch.setattr(launch, "WORKSPACE", room)
        monkeypatch.setattr(launch, "STRIP", height)
        with monkeypatch.context() as patch:
            names = counted(launch, patch)
            outs = added(ws, term)
        assert len(names) == launches
        for w, out in zip(ws, outs, strict=True):
            assert relative_error(out, exact(w, term)) < CLOSE


def test_a_model_takes_six_launches_and_the_same_bits_again(launch, monkeypatch):
    names = counted(launch, monkeypatch)
    shapes = [(8, 27), *[(8, 72)] * 4, (16, 72), (16, 144), (16, 8), (64, 36), (64, 72), (100, 64)]
    ws, term = [neurons(1, n, d) for n, d in shapes], RieszEnergy(s=1).pair_term()
    ws[-1][0, 70] = ws[-1][0, 4] + 1e-3 * neurons(64)
    first, again = added(ws, term), added(ws, term)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert names == LAUNCHES * 2
    alone = added(ws[3:4], term)[0]
    assert relative_error(alone, first[3]) < 1e-6


def test_lower_products_take_one_product_where_there_are_three(monkeypatch):
    assert precision() == exact_precision()
    monkeypatch.setattr(machine, "interpreted", lambda: False)
    assert precision() == "tf32x3"
    with bf16_products(True):
        assert precision() == "tf32"


def test_rocm_has_float32_products(monkeypatch):
    """Its GPUs are called "cuda", and have other numbers than NVIDIA's compute capability."""
    monkeypatch.setattr(machine, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 0))
    for allowed in (False, True):
        with bf16_products(allowed):
            assert precision() == exact_precision() == "ieee"
    with asked_anew():
        assert machine.runs_on(torch.device("cuda", 0))


@pytest.mark.skipif(
    DEVICE == "cpu", reason="the interpreter multiplies in float32; products in TF32 need a GPU"
)
def test_lower_precision_is_good_enough_for_a_penalty(launch):
    term, w = RieszEnergy(s=2).pair_term(), neurons(1, 130, 64)
    w[0, 1] = w[0, 0] + 1e-3 * neurons(64)
    with bf16_products(True):
        for x in (w, w[:, 1:]):
            assert relative_error(added([x], term)[0], exact(x, term)) < 2e-3


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_the_nearest(launch, monkeypatch, half, every):
    for shape in ((1, 1, 3), (2, 2, 2), (1, 65, 70), (3, 130, 5), (1, 200, 17)):
        w = neurons(*shape)
        if shape[1] > 100:
            w[0, 3] = 0.0
            w[0, 100] = w[0, 7]
            w[0, 5] = -2 * w[0, 99]
        monkeypatch.setenv("LIGHTNING_HSU_BACKEND", "triton")
        x = torch.nn.functional.normalize(w, dim=-1)
        alive = x.ne(0).any(-1)
        found = Nearest(w, half, every)
        first, index, second = largest_two(x, alive, half_space=half, every=every)
        monkeypatch.setenv("LIGHTNING_HSU_BACKEND", "torch")
        plain = Nearest(w, half, every)
        its_first, its_index, its_second = largest_two(x, alive, half_space=half, every=every)
        torch.testing.assert_close(first, its_first, rtol=0, atol=1e-6)
        torch.testing.assert_close(second, its_second, rtol=0, atol=1e-6)
        sure = its_first > its_second + 1e-5
        assert torch.equal(index[sure], its_index[sure])
        torch.testing.assert_close(
            found.smallest(), plain.smallest(), rtol=2e-7, atol=1e-18
        )  # far pairs are from float32 cosines


@dataclass(frozen=True)
class Thrice(RieszEnergy):
    def kernel(self, q, p):
        value, slope = super().kernel(q, p)
        return 3 * value, 3 * slope


def test_a_kernel_of_ones_own_under_a_known_name(backend):
    w = neurons(1, 20, 8)
    torch.testing.assert_close(
        added([w], Thrice(s=1).pair_term())[0], 3 * added([w], RieszEnergy(s=1).pair_term())[0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_limit_on_the_device(launch, monkeypatch, dtype):
    """As it comes from a learning rate on the device: the kernels read it there."""
    names = counted(launch, monkeypatch)
    term, ws = RieszEnergy(s=2).pair_term(), [neurons(2, 33, 4), neurons(1, 20, 5)]
    numbers = (1e-3, 0.1)
    expected, found = [], []
    for w, number in zip(ws, numbers, strict=True):
        expected.append(torch.zeros_like(w))
        found.append(torch.zeros_like(w))
        limit = torch.tensor(number, dtype=dtype, device=DEVICE)
        add_pair_gradients([GradientUpdate(w, expected[-1], 3.0, float(limit), 8.0)], term)
    names.clear()
    updates = []
    for w, out, number in zip(ws, found, numbers, strict=True):
        limit = torch.tensor(number, dtype=dtype, device=DEVICE)
        updates.append(GradientUpdate(w, out, 3.0, limit, 8.0))
    add_pair_gradients(updates, term)
    assert names == LAUNCHES
    for w, out, right, number in zip(ws, found, expected, numbers, strict=True):
        torch.testing.assert_close(out, right, rtol=1e-6, atol=0)
        length = out.norm(dim=-1) / 8.0
        room = number * w.norm(dim=-1)
        assert bool((length <= room * 1.00001).all())
        assert bool((length > room * 0.9999).any())


def test_a_backend_that_is_none(monkeypatch):
    term = RieszEnergy(s=1).pair_term()
    monkeypatch.setenv("LIGHTNING_HSU_BACKEND", "cuda")
    with pytest.raises(
        ValueError,
        match="LIGHTNING_HSU_BACKEND must be one of torch, compiled, cudagraph, triton; got 'cuda'",
    ):
        added([neurons(1, 3, 2)], term)


def test_a_backend_that_is_none_is_told_before_the_first_step(monkeypatch):
    monkeypatch.setenv("LIGHTNING_HSU_BACKEND", "cuda")
    with pytest.raises(ValueError, match="LIGHTNING_HSU_BACKEND must be one of"):
        UniformityRegularizer().attach(torch.nn.Linear(8, 8))


@contextmanager
def asked_anew():
    """Forget what is known of the machine, before and after."""
    known = (machine.runs_on, machine.new_enough, machine._why_not, backends._load)
    for answer in known:
        answer.cache_clear()
    try:
        yield
    finally:
        for answer in known:
            answer.cache_clear()


def installed(monkeypatch, **found):
    """Pretend that these distributions of Triton are installed, and no others."""

    def version(name):
        if name.replace("-", "_") not in found:
            raise PackageNotFoundError(name)
        return found[name.replace("-", "_")]

    monkeypatch.setattr(machine, "version", version)


@pytest.mark.parametrize("found", [{"triton": "3.1.0"}, {}, {"pytorch_triton": "2.9.1"}])
def test_a_machine_without_triton(monkeypatch, found):
    monkeypatch.setenv("LIGHTNING_HSU_BACKEND", "triton")
    installed(monkeypatch, **found)
    with asked_anew(), pytest.raises(RuntimeError, match=r"older than 3\.2; pip install"):
        added([neurons(1, 3, 2)], RieszEnergy(s=1).pair_term())


@pytest.mark.parametrize(
    "name", ["triton", "pytorch_triton", "pytorch_triton_rocm", "triton_rocm", "triton_windows"]
)
def test_triton_has_several_names(monkeypatch, name):
    installed(monkeypatch, **{name: "3.10.0+git1a2b3c"})
    with asked_anew():
        assert machine.new_enough()


def test_a_machine_without_a_gpu_is_refused_at_the_check(monkeypatch):
    monkeypatch.setenv("LIGHTNING_HSU_BACKEND", "triton")
    installed(monkeypatch, triton="3.10.0")
    monkeypatch.setattr(machine, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with asked_anew(), pytest.raises(RuntimeError, match="no CUDA device; unset it"):
        added([neurons(1, 3, 2)], RieszEnergy(s=1).pair_term())


def gpus(monkeypatch, *capabilities):
    """Pretend that there are such GPUs; return the questions asked about them."""
    asked = []

    def capability(device=0):
        index = device.index if isinstance(device, torch.device) else device
        asked.append(index)
        return capabilities[index]

    monkeypatch.setattr(machine, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append("any") or True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "a Tesla T4")
    return asked


def test_old_gpus_alone_are_refused_at_the_check(monkeypatch):
    installed(monkeypatch, triton="3.10.0")
    gpus(monkeypatch, (7, 5), (7, 0))
    with (
        asked_anew(),
        pytest.raises(
            RuntimeError, match=r"capability 8\.0, and a Tesla T4 has \(7, 5\); unset it"
        ),
    ):
        machine.check_machine()


def test_an_old_gpu_beside_a_new_one_goes_through_torch_and_is_asked_once(monkeypatch):
    monkeypatch.setenv("LIGHTNING_HSU_BACKEND", "triton")
    installed(monkeypatch, triton="3.10.0")
    asked = gpus(monkeypatch, (8, 0), (7, 5))
    with asked_anew():
        for _ in range(3):
            backends.active()
            assert machine.runs_on(torch.device("cuda", 0))
            assert not machine.runs_on(torch.device("cuda", 1))
            assert not machine.runs_on(torch.device("cpu"))
    assert sorted(map(str, asked)) == ["0", "1", "any"]


def test_the_variable_counts_anew_at_each_step(monkeypatch):
    """As benchmarks change it between steps."""
    choose("triton", monkeypatch)
    names = []
    for name in ("torch", "triton", "torch"):
        monkeypatch.setenv("LIGHTNING_HSU_BACKEND", name)
        names.append(backends.active().name)
    assert names == ["torch", "triton", "torch"]
