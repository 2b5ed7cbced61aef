"""On a GPU layers that are not plain go together in one pass, with the results of each by itself."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn

from lightning_hsu import Share, UniformityRegularizer
from lightning_hsu.measures import GaussianPotential, RieszEnergy
from tests.waits import counting, waits_of

SHAPES = [(20, 12), (33, 20), (24, 33), (12, 24)]


def net(kind, dtype=torch.float64, repeats=1):
    torch.manual_seed(0)
    layers = [nn.Linear(d, n, bias=False, dtype=dtype) for _ in range(repeats) for n, d in SHAPES]
    with torch.no_grad():
        layers[0].weight[1] = layers[0].weight[0] + 1e-5 * torch.randn(
            12, dtype=dtype
        )  # a near pair
        if kind != "computed":  # 0 / 0 in weight_norm
            layers[1].weight[3] = 0.0
    if kind == "computed":
        layers = [nn.utils.parametrizations.weight_norm(layer) for layer in layers]
    return nn.Sequential(*layers)


def regularizer_of(kind, **settings):
    strength = Share(0.05) if kind == "share" else 1e-2
    return UniformityRegularizer(
        **{"coefficient": strength, "head": None, "measure": RieszEnergy(s=1)} | settings
    )


def train(model, regularizer, mode, between, steps=4, *, counts=False):
    """The parameters after steps whose task gradients are known; to count, a loss is the penalty alone."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    regularizer.attach(model)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        loss = 0.0
        optimizer.zero_grad()
        for p in model.parameters():
            loss = loss + (p * torch.randn(p.shape, generator=generator, dtype=p.dtype)).sum()
        if mode == "loss":

            def act(loss=loss):
                penalised = loss.detach() if counts else loss
                regularizer.add_to_loss(penalised, optimizer)
                penalised.backward()

            between(step, act)
            regularizer.count_step(optimizer)
            optimizer.step()
            continue
        loss.backward()
        if mode == "gradient":
            between(step, lambda: regularizer.add_gradients(optimizer))
        optimizer.step()
        if mode == "decoupled":
            between(step, lambda: regularizer.move(optimizer))
    return {name: p.detach() for name, p in model.named_parameters()}


def as_on_a_gpu(model, regularizer, mode, **settings):
    """The same, and what each step asks for: launches and waits."""
    asked = []
    with waits_of() as waits:

        def between(step, act):
            waits.put_model_there(model)
            with counting(waits, step):
                act()
            asked.append((waits.launches, dict(waits.found)))

        return train(model, regularizer, mode, between, **settings), asked


MEASURES = (RieszEnergy(s=1), GaussianPotential(), RieszEnergy(s=2, half_space=True))
CASES = [
    ("share", "gradient"),
    ("share", "decoupled"),
    ("computed", "gradient"),
    ("computed", "decoupled"),
]
CASES += [("plain", "loss"), ("computed", "loss")]


@pytest.mark.parametrize("tolerance", [None, 0.02])
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_they_have_the_results_of_each_by_itself(kind, mode, tolerance):
    """With a near pair, and a dead row where there can be one."""
    for measure in MEASURES:
        settings = {"measure": measure, "tolerance": tolerance}
        start = {name: p.detach().clone() for name, p in net(kind).named_parameters()}
        expected = train(net(kind), regularizer_of(kind, **settings), mode, lambda step, act: act())
        found, _ = as_on_a_gpu(net(kind), regularizer_of(kind, **settings), mode)
        for name, p in found.items():
            assert not torch.equal(p, start[name])
            assert torch.allclose(p, expected[name], rtol=1e-9, atol=1e-11), (measure, name)


def test_only_those_with_coincident_neurons_go_the_exact_way_afterwards():
    model = net("computed")
    with torch.no_grad():
        model[2].weight = model[2].weight[:1].expand(24, 33).clone()
    exact = []
    with mock.patch.object(
        RieszEnergy, "value_and_grad", autospec=True, side_effect=RieszEnergy.value_and_grad
    ) as way:
        with waits_of():
            train(
                model,
                regularizer_of("computed"),
                "gradient",
                lambda step, act: exact.append(calls(act, way)),
            )
    assert exact[:2] == [[], [(1, 24, 33)]]


def calls(act, way):
    """The shapes of the neurons that an action computes this way."""
    way.reset_mock()
    act()
    return [tuple(call.args[1].shape) for call in way.call_args_list]


@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_a_penalty_is_twice_differentiable(measure):
    found = []
    for way in (nullcontext, waits_of):
        with way():
            model = net("plain")
            penalty = regularizer_of("plain", measure=measure).attach(model).penalty()
            parameters = list(model.parameters())
            first = torch.autograd.grad(penalty, parameters, create_graph=True)
            total = sum(grad.square().sum() for grad in first)
            found.append([penalty.detach(), *first, *torch.autograd.grad(total, parameters)])
    for expected, one in zip(*found, strict=True):
        assert torch.allclose(one, expected, rtol=1e-8, atol=1e-12)


# Launches measured: 420, 306, 1230, 1326, of which 112 are the pass over all pairs.
BUDGETS = [("share", "gradient", 450), ("computed", "gradient", 330)]
BUDGETS += [("plain", "loss", 1300), ("computed", "loss", 1400)]


@pytest.mark.parametrize(("kind", "mode", "budget"), BUDGETS)
def test_48_of_them_are_few_launches_and_no_wait(kind, mode, budget):
    model = net(kind, torch.float32, repeats=12)
    _, asked = as_on_a_gpu(model, regularizer_of(kind), mode, steps=3, counts=True)
    launches, waited = asked[-1]
    assert waited == {}
    assert 0 < launches <= budget
