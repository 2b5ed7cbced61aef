"""What is measured of models that nobody here wrote, beside what an expert would measure."""

import math
import warnings
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lightning_hsu import UniformityRegularizer, summarize
from tests.plain import HALF_SPACE
from tests.real_models.catalogue import entries
from tests.real_models.libraries import missing
from tests.real_models.table import BEGIN, END, table

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings(
        "ignore:layer .* starts at zero"
    ),  # so does torchvision's ViT's head
]

COVERED = 0.95  # of the entries that are not embeddings, tables, biases or vectors
TOLERANCE = 2e-4  # of a gradient's largest entry, in float32; measured: up to 3e-5


@pytest.fixture(scope="module", params=entries(), ids=lambda entry: entry.name)
def entry(request):
    return request.param


@pytest.fixture(scope="module")
def found(entry):
    for name in entry.imports:
        if find_spec(name) is None:
            missing(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries, as they build and run
        for name in entry.imports:
            import_module(name)
        torch.manual_seed(0)
        model = entry.build()
        model.train()
        before = summarize(model)
        loss = entry.loss(model)
    regularizer = UniformityRegularizer(HALF_SPACE, 1.0).attach(model, watch=False)
    regularizer.find_head(loss)
    return model, loss, before, regularizer


def heads_of(summary):
    return {layer.name for layer in summary.layers if layer.is_head}


def test_the_heads(entry, found):
    _, _, before, regularizer = found
    summary = regularizer.summary
    left_out = {skip.name: skip.reason for skip in summary.skipped}
    expected = set()
    for name in entry.heads:  # a head of a single neuron has no pair
        parts = {layer.name for layer in summary.layers if is_or_is_below(layer.name, name)}
        if not parts:
            assert "single neuron" in left_out[name] or "dimension" in left_out[name]
        expected |= parts
    assert heads_of(summary) == expected
    if entry.declared:
        assert heads_of(before) == expected
        reasons = {layer.head_reason for layer in before.layers if layer.is_head}
        assert reasons == {"declared"}


def is_or_is_below(name, other):
    return name == other or name.startswith(f"{other}.")


def test_the_shapes(entry, found):
    shapes = {layer.name: layer.shape for layer in found[-1].summary.layers}
    wrong = {}
    for name, shape in entry.shapes.items():
        if shapes.get(name) != shape:
            wrong[name] = (shapes.get(name), shape)
    assert wrong == {}


def test_the_coverage(entry, found):
    """Of all but embeddings and what has no neurons nearly everything is measured."""
    model, _, _, regularizer = found
    summary = regularizer.summary
    measured = {id(p) for layer in regularizer.layers for p in layer.parameters}
    entries_of_neurons = 0
    missing = {}
    for name, p in model.named_parameters():
        if not p.is_floating_point() or is_rest(entry, name) or sum(s > 1 for s in p.shape) < 2:
            continue
        entries_of_neurons += p.numel()
        if id(p) not in measured:
            missing[name] = tuple(p.shape)
    left_out = sum(math.prod(shape) for shape in missing.values())
    covered = 1 - left_out / max(entries_of_neurons, 1)
    assert covered >= COVERED, missing
    assert 0 <= summary.coverage <= 1
    everything = {id(p): p.numel() for p in model.parameters() if p.ndim > 1}
    taken = sum(size for key, size in everything.items() if key in measured)
    assert summary.coverage == pytest.approx(taken / sum(everything.values()), abs=0.01)


def is_rest(entry, name):
    return any(fnmatchcase(name, pattern) for pattern in entry.rest)


def test_the_reasons(entry, found):
    reasons = {skip.name: skip.reason for skip in found[-1].summary.skipped}
    for name, reason in reasons.items():
        for pattern, word in entry.rest.items():
            if fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern):
                assert word in reason or "tied to" in reason, (name, reason)
                break


def test_the_gradients(entry, found):
    model, _, _, regularizer = found
    parameters = dict(model.named_parameters())
    heads = heads_of(regularizer.summary)
    for p in parameters.values():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer = torch.optim.SGD([p for p in parameters.values() if p.requires_grad], lr=1e-30)
    regularizer.add_gradients(optimizer)
    for name, (where, take) in entry.reads.items():
        p = parameters[where]
        weight = p.detach().double().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some build another model for what else they need
            x = take(weight)
        x = x.unsqueeze(0) if x.ndim == 2 else x
        shapes = {layer.name: layer.shape for layer in regularizer.summary.layers}
        assert shapes[name] == tuple(x.shape)
        expected = sum(double_loop(group, name not in heads) for group in x) / len(x)
        (expected,) = torch.autograd.grad(expected, weight, retain_graph=True)
        belongs = torch.autograd.grad(x.square().sum(), weight)[0] != 0  # several may share p
        error = (p.grad.double() - expected)[belongs].abs().max()
        assert error <= TOLERANCE * expected.abs().max(), name
    for p in parameters.values():
        p.grad = None


def double_loop(x, half_space):
    """Mean over all pairs of 1 / distance squared on the sphere: of x, or in half space of x and -x."""
    x = x[x.detach().norm(dim=1) > 0]  # without the row of a padding
    points = x / x.norm(dim=1, keepdim=True)
    if half_space:
        points = torch.cat([points, -points])
    total = 0.0
    for i in range(1, len(points)):
        total = total + (1.0 / (points[:i] - points[i]).square().sum(1)).sum()
    return total / (len(points) * (len(points) - 1) / 2)


def test_the_table_in_the_readme():
    """Printed by ``python -m tests.real_models.table``."""
    for one in entries():
        for name in one.imports:
            if find_spec(name) is None:
                missing(name)
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    shown = readme.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == table()
