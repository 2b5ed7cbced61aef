"""The back end "compiled": what torch.compile makes of the pass between the products."""

import sys
import warnings
from functools import partial

import pytest
import torch

from benchmarks import epilogue
from benchmarks.launches import SHAPES
from lightning_hsu._core import backend as backends
from lightning_hsu._core import compiled, oracle_energy
from lightning_hsu._core.batches import batches_of
from lightning_hsu._core.foreach import (
    TorchBackend,
    add_all_pair_gradients,
    batch_numbers,
    begin_batch,
)
from lightning_hsu._core.fused import Fused, FusedTerm
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu._core.without_sync import (
    gradients_without_sync,
    numbers_without_sync,
    unweighted,
)
from lightning_hsu.measures import GaussianPotential, RieszEnergy
from tests.test_own_loops import of_dynamo

MEASURES = [
    RieszEnergy(s=0.0),
    RieszEnergy(s=1.0, half_space=True),
    RieszEnergy(s=2.0, half_space=True),
    RieszEnergy(s=-1.0),
    RieszEnergy(s=7.3, softening=0.0),
    RieszEnergy(s=1.0, distance="geodesic", half_space=True),
    GaussianPotential(),
    GaussianPotential(t=10.0, half_space=True),
]
CPU = torch.device("cpu")


@pytest.fixture
def chosen(monkeypatch):
    """The switch is on, and nothing has been compiled or checked yet."""
    monkeypatch.setenv("LIGHTNING_HSU_BACKEND", "compiled")
    backends._load.cache_clear()
    yield
    backends._load.cache_clear()


def neurons(b, n, d, dtype=torch.float32):
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(n)).to(dtype)


def hard_layers(dtype=torch.float32):
    """Odd sizes, more than one panel, dead rows, and pairs that are near or opposite."""
    layers = [neurons(1, 65, 33), neurons(3, 7, 5), neurons(1, 300, 21), neurons(1, 2, 9)]
    layers[0][0, 3] = 0.0
    layers[2][0, [0, 299]] = 0.0
    for i in range(3):
        step = 10.0 ** -(i + 1) * neurons(1, 1, 33)[0, 0]
        layers[0][0, 50 + i] = 2.0 * (layers[0][0, i] + step)
        layers[0][0, 60 + i] = -0.5 * (layers[0][0, 10 + i] + step)
    return [layer.to(dtype) for layer in layers]


def exact(w, term):
    """The gradient and the energy by differences and autograd, in float64."""
    x = w.double().requires_grad_()
    energy = oracle_energy(x, term)
    minimised = energy.log() if term.logarithm else energy
    return torch.autograd.grad(minimised.sum(), x)[0], energy.detach()


def as_written(function):
    """Compiles nothing."""
    return function


def added(layers, terms):
    """What the active back end adds to gradients of zero."""
    outs = [torch.zeros_like(w) for w in layers]
    by_term = {}
    for w, out, term in zip(layers, outs, terms, strict=True):
        by_term.setdefault(term, []).append(GradientUpdate(w, out, 1.0))
    add_all_pair_gradients(by_term)
    return outs


def assert_right(outs, layers, terms, bound):
    for out, w, term in zip(outs, layers, terms, strict=True):
        expected = exact(w, term)[0]
        error = float((out.double() - expected).norm())
        assert error <= bound * float(expected.norm()) + 1e-9, (w.shape, term)


def numbers_of(found):
    """What a logging step reads of each group."""
    return found.numbers.of_groups(found.numbers.values.tolist())


def assert_same_numbers(found, expected):
    for new, old in zip(numbers_of(found), numbers_of(expected), strict=True):
        assert new == pytest.approx(old, rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
@pytest.mark.parametrize("with_sums", [False, True])
def test_the_pass_is_what_torch_does_step_by_step(measure, with_sums):
    """As it is written, before anything is compiled; energies and largest cosines, too."""
    term = measure.pair_term()
    with_sums = with_sums or term.logarithm
    layers = hard_layers()
    (batch,) = batches_of([(GradientUpdate(w, w, 1.0), term) for w in layers])
    fused = Fused([FusedTerm(term, as_written)], with_sums=with_sums)
    with torch.no_grad():
        expected = gradients_without_sync(batch, stats=with_sums)
        found = gradients_without_sync(batch, stats=with_sums, fused=fused)
        for new, old in zip(unweighted(batch, found), unweighted(batch, expected), strict=True):
            # Measured: 2e-7.
            torch.testing.assert_close(new, old, rtol=1e-4, atol=2e-6 * float(old.abs().max()))
        for new, old in zip(found.pairs, expected.pairs, strict=True):
            assert torch.equal(new[0], old[0])
    if with_sums:
        assert_same_numbers(found, expected)
        alone = numbers_without_sync(batch, fused=fused)
        assert numbers_of(alone) == numbers_of(found)  # bit for bit
        energies = torch.cat([exact(update.w, term)[1] for update in batch.updates])
        for one, energy in zip(numbers_of(found), energies.tolist(), strict=True):
            assert one.energy == pytest.approx(energy, rel=2e-6, abs=1e-7)


@of_dynamo
@pytest.mark.usefixtures("chosen")
def test_compiled_gradients_are_right():
    """Two kernels in a step, then layers of other sizes, then bfloat16: each is compiled once."""
    half, full = MEASURES[2].pair_term(), MEASURES[0].pair_term()
    layers = hard_layers()
    terms = [half, full, half, full]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outs = added(layers, terms)
        assert_right(outs, layers, terms, 2e-6)  # measured: 3e-7
        layers = [neurons(2, 41, 12), neurons(1, 3, 60)]
        assert_right(added(layers, [half, full]), layers, [half, full], 2e-6)
        layers = hard_layers(torch.bfloat16)
        assert_right(added(layers, terms), layers, terms, 1e-2)  # measured: 2e-3
    backend = backends.active()
    assert set(backend._terms) == {half, full}
    assert not backend._trial.has_failed


@of_dynamo
@pytest.mark.usefixtures("chosen")
def test_compiled_numbers_of_a_logging_step_are_right():
    term = MEASURES[6].pair_term()
    layers = hard_layers()
    (batch,) = batches_of([(GradientUpdate(w, w, 1.0), term) for w in layers])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = begin_batch(batch, stats=True)
        expected = TorchBackend().gradients(batch, stats=True)
        ((_, alone),) = batch_numbers(batch.work)
    assert alone.of_groups(alone.values.tolist()) == numbers_of(found)
    assert not backends.active()._trial.has_failed
    assert backends.active()._trial.passed
    assert_same_numbers(found, expected)
    outs = unweighted(batch, found)
    assert_right(outs, [update.w for update in batch.updates], [term] * 4, 2e-6)


@pytest.mark.usefixtures("chosen")
def test_coincident_neurons_are_parted_from_the_next_step_on(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", as_written)
    term = MEASURES[2].pair_term()
    w = neurons(1, 30, 8)
    w[0, 4] = w[0, 9]
    assert bool(added([w], [term])[0].isfinite().all())
    apart = added([w], [term])[0][0]
    assert float((apart[4] - apart[9]).norm()) > 1.0


def off_by(factor, function):
    """Compiles to something that is off."""

    def wrong(cosine, *others):
        result = function(cosine, *others)
        others[-2][cosine < -0.2] *= factor
        return result

    return wrong


def raising(problem, function):
    def run(*args):
        raise problem

    return run


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (partial(off_by, 1.01), r"computed a gradient .* half space\) off by"),
        (partial(off_by, float("nan")), r"computed a gradient .* off by nan"),
        (
            partial(raising, RuntimeError("no C++ compiler\nhere")),
            "raised RuntimeError: no C.. com",
        ),
    ],
)
def test_what_is_off_or_cannot_be_compiled_is_not_taken(monkeypatch, compiler, reason):
    """One warning says why; plain torch computes, then and later."""
    monkeypatch.setattr(compiled, "_compiled", compiler)
    layers = hard_layers()
    terms = [MEASURES[2].pair_term()] * 4
    with pytest.warns(UserWarning, match=reason) as told:
        outs = added(layers, terms)
    assert len(told) == 1
    assert_right(outs, layers, terms, 2e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(added(layers, terms), layers, terms, 2e-6)


@pytest.mark.usefixtures("chosen")
def test_an_energy_that_is_off_is_not_taken(monkeypatch):
    def compiler(function):
        def wrong(*args):
            result = function(*args)
            return result and (result[0] * 1.001, result[1])

        return wrong

    monkeypatch.setattr(compiled, "_compiled", compiler)
    with pytest.warns(UserWarning, match=r"an energy or a largest cosine .* off by"):
        assert not compiled.CompiledBackend()._is_right(
            CPU, MEASURES[2].pair_term(), with_sums=True
        )


@pytest.mark.usefixtures("chosen")
def test_what_fails_later_is_computed_by_torch(monkeypatch):
    """As where the compiler is gone when torch wants another version of the code."""
    monkeypatch.setattr(compiled, "_compiled", as_written)
    term = MEASURES[2].pair_term()
    layers = hard_layers()
    added(layers, [term] * 4)
    monkeypatch.setattr(backends.active()._terms[term], "slopes", raising(ValueError("gone"), None))
    with pytest.warns(UserWarning, match="raised ValueError: gone"):
        outs = added(layers, [term] * 4)
    assert_right(outs, layers, [term] * 4, 2e-6)


def test_nothing_is_compiled_without_the_switch(monkeypatch):
    monkeypatch.delenv("LIGHTNING_HSU_BACKEND", raising=False)
    monkeypatch.delitem(sys.modules, "lightning_hsu._core.compiled")
    monkeypatch.setattr(torch, "compile", raising(AssertionError("compiled"), None))
    added(hard_layers(), [MEASURES[2].pair_term()] * 4)
    assert "lightning_hsu._core.compiled" not in sys.modules


def counting(versions):
    """A compiler that compiles nothing, but notes what torch would compile."""

    def compiler(function):
        def counted(graph, inputs):
            versions.append(function.__name__)
            return graph.forward

        return torch.compile(function, dynamic=True, fullgraph=True, backend=counted)

    return compiler


@of_dynamo
def test_real_models_are_compiled_a_few_times():
    """For all sizes once; slopes twice if they are where a buffer begins, and elsewhere."""
    versions = []
    measure = RieszEnergy(s=2, half_space=True)
    terms = [measure.pair_term(), measure.for_head().pair_term()]
    fused = {term: FusedTerm(term, counting(versions)) for term in terms}
    calls = 0
    with torch.no_grad():
        for with_sums in (False, True):
            for term in terms:  # the trial layer comes first
                evaluate([(3, 48, 40)], [term] * 2, fused, with_sums)
            for shapes in map(of_model, ("ResNet-50", "GPT-2 small", "ViT-B/16")):
                calls += evaluate(shapes, terms, fused, with_sums)
    assert calls > 60
    assert versions.count("write_sums") == 2, versions
    assert 2 <= versions.count("write_slopes") <= 4


@of_dynamo
def test_many_kernels_are_compiled():
    """Of one piece of code torch would compile eight versions, then no more."""
    versions = []
    for s in range(10):
        term = RieszEnergy(s=s / 10).pair_term()
        evaluate([(3, 48, 40)], [term] * 2, {term: FusedTerm(term, counting(versions))}, False)
    assert len(versions) == 10


def of_model(name):
    return [(1, n, d) for n, d in SHAPES[name]()]


def evaluate(shapes, terms, fused, with_sums):
    """Evaluate layers without data, the last of them with the second kernel; return the calls."""
    work = []
    for i, shape in enumerate(shapes):
        w = torch.empty(shape, device="meta")
        work.append((GradientUpdate(w, w, 1.0), terms[i == len(shapes) - 1]))
    calls = 0
    for batch in batches_of(work):
        one = Fused([fused[term] for term in batch.terms], with_sums=with_sums)
        for piece in batch.layout.pieces:
            size = piece.size + 1
            cosine = torch.empty(size + one.lead, device="meta").narrow(0, one.lead, size)
            one.evaluate(cosine, piece)
            calls += len(piece.panels if with_sums else piece.stretches)
    return calls


needs_inductor = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13),
    reason="looks into inductor as torch 2.13 has it",
)


@needs_inductor
@pytest.mark.parametrize("form", epilogue.SIZES)
@pytest.mark.parametrize("measure", [MEASURES[2], MEASURES[0], MEASURES[6]], ids=repr)
def test_a_pass_on_a_gpu_moves_less_than_24_bytes_an_entry(measure, form):
    """One kernel; it reads 4 bytes and writes 5, which inductor counts as read, too: 14."""
    found = epilogue.generated(measure.pair_term(), form)
    assert len(found.sources) == 1
    assert 9.0 <= found.traffic <= 24.0


@needs_inductor
def test_a_step_of_a_model_moves_less():
    """GPT-2 small: 61 bytes an entry of all Gram matrices, not 91, and 101 launches, not 107.

    Most of what is left is work on neurons, not on pairs.
    """
    asked = epilogue.plain_compiled_step("GPT-2 small")
    assert asked.traffic < 70 * sum(n * n for n, _ in SHAPES["GPT-2 small"]())
    assert asked.calls["compiled"] == 1
    assert 50 < asked.launches <= 120
    assert asked.waits == 0


def noting(begins, function):
    """Compiles nothing, but notes where parts of the buffers begin."""

    def run(cosine, *others):
        begins.add(cosine.storage_offset() % 16)
        assert {cosine.storage_offset()} == {one.storage_offset() for one in others[-2:]}
        return function(cosine, *others)

    return run


@pytest.mark.parametrize("with_sums", [False, True])
def test_no_part_of_a_buffer_has_to_be_copied(with_sums):
    """Torch copies what begins at a place where its code expects a wide load, on a GPU.

    So parts begin where there can be one, or the trial layer begins where there can be none.
    """
    terms = [MEASURES[2].pair_term(), MEASURES[0].pair_term()]
    of_trials = set()
    for term in terms:
        trial = FusedTerm(term, partial(noting, of_trials))
        compiled.trial_errors(CPU, trial, with_sums=with_sums)
    work = [(GradientUpdate(w, w, 1.0), terms[i % 2]) for i, w in enumerate(hard_layers())]
    (batch,) = batches_of(work)
    begins = set()
    fused = [FusedTerm(term, partial(noting, begins)) for term in batch.terms]
    with torch.no_grad():
        found = gradients_without_sync(batch, fused=Fused(fused, with_sums=with_sums))
        expected = gradients_without_sync(batch)
    for new, old in zip(unweighted(batch, found), unweighted(batch, expected), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=2e-6 * float(old.abs().max()))
    if with_sums:
        assert of_trials == {1}
    else:
        assert of_trials == begins == {0}
