"""What a step asks of a GPU, counted with tensors that only pretend to be on one."""

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import launches
from benchmarks.launches import count, plain_step, pretending
from lightning_hsu import Share, UniformityRegularizer
from lightning_hsu._core import foreach, pair_sums, precision, repair
from lightning_hsu.measures import GaussianPotential, RieszEnergy, Sampled

pytestmark = pytest.mark.any_cpu  # shapes without data

# Measured: 236, 107, 106, 1641.
BUDGETS = {"ResNet-50": 450, "GPT-2 small": 120, "ViT-B/16": 120, "Llama-7B": 2000}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_plain_step_is_few_launches_and_no_wait(name):
    shapes = launches.SHAPES[name]()
    asked = plain_step(name)
    budget = BUDGETS[name]
    if repair._VERSION < (2, 7):  # there a list of near pairs takes three more a batch
        budget *= 1.04
    assert 50 < asked.launches <= budget, asked.calls
    assert asked.waits == 0, asked.calls
    floor = 3e-9 * sum(n * n * d for n, d in shapes)
    assert floor < 1e-9 * asked.flop < 1.16 * floor  # no product is done twice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_few(dtype):
    asked = plain_step("GPT-2 small", dtype)
    assert asked.launches <= BUDGETS["GPT-2 small"]
    assert asked.waits == 0


def test_tf32_is_one_product_through_the_same_pass(monkeypatch):
    """Of the settings of this process nothing is left afterwards."""
    backend = "cuda" if precision._BACKENDS else ""
    before = precision._precision(backend)
    settings = []
    multiply = pair_sums._multiply

    def noted(*args, **kwargs):
        settings.append(precision._precision(backend))
        multiply(*args, **kwargs)

    monkeypatch.setattr(pair_sums, "_multiply", noted)
    exact = plain_step("GPT-2 small")
    assert set(settings) <= {"ieee", "none", "highest"}
    settings.clear()
    fast = plain_step("GPT-2 small", matmul_precision="medium")
    assert set(settings) == {"tf32" if backend else "high"}
    assert precision._precision(backend) == before
    assert (fast.launches, fast.waits) == (exact.launches, 0)
    assert fast.flop == exact.flop


@pytest.mark.parametrize("name", ["ResNet-50", "GPT-2 small", "ViT-B/16"])
def test_what_a_logging_step_needs_costs_half_a_plain_step_more(name, monkeypatch):
    """Measured: 1.25, 1.34, 1.33."""
    plain = plain_step(name)
    monkeypatch.setattr(foreach, "begin_batch", partial(foreach.begin_batch, stats=True))
    asked = plain_step(name)
    assert plain.launches < asked.launches <= 1.5 * plain.launches
    assert asked.waits == 0


def test_shares_are_few_launches_and_no_wait(monkeypatch):
    """Measured: 426; the pass over the pairs of all layers is shared."""
    monkeypatch.setattr(torch, "enable_grad", torch.no_grad)  # a graph needs a real device
    asked = plain_step("GPT-2 small", coefficient=Share(0.05))
    assert 0 < asked.launches <= 480, asked.calls
    assert asked.waits == 0, asked.calls


@pytest.mark.parametrize("measure", [RieszEnergy(s=2), GaussianPotential()], ids=repr)
def test_a_sampled_head_is_few_launches(measure):
    """A tied head of 50257 x 768, 49 blocks; it was 7,677 launches and 396 waits."""
    launches.look_at(measure)
    with pretending():
        x = torch.empty(50257, 768, device="cuda")
        for _ in range(2):  # what is kept from the first time is not counted
            asked = count(lambda: Sampled(measure).value_and_grad(x))
    assert asked.launches <= 350
    assert asked.waits <= 7


def test_the_counter_counts():
    """Launches, waits and traffic of calls that are known."""
    with pretending():
        x = torch.empty(4, 6, device="cuda")
        assert count(lambda: x.view(6, 4).T[1:, :2]).launches == 0
        asked = count(lambda: (x @ x.mT).exp_())
        assert (asked.launches, asked.flop, asked.traffic) == (2, 2 * 4 * 4 * 6, 2 * 4 * 16)
        assert count(lambda: x + x[:1].expand(4, 6)).traffic == 4 * (24 + 6 + 24)
        for waits in (
            lambda: x.sum().item(),
            lambda: bool(x.any()),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: torch.tensor([1.0, 2.0], device="cuda"),
        ):
            assert count(waits).waits == 1, waits
        assert count(lambda: x.to("cpu", non_blocking=True)).waits == 0


@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_what_is_known_of_calls_is_what_is_found_without_it(tolerance, monkeypatch):
    """Of two blocks and a head, in all that is counted."""
    shapes = launches.SHAPES["ViT-B/16"]()
    monkeypatch.setitem(launches.SHAPES, "ViT-B/16", lambda: [*shapes[:13], shapes[-1]])

    def steps():
        with launches.told(), pretending():
            found = launches.Steps("ViT-B/16", tolerance=tolerance)
            return [found.step(logs=number == 2) for number in range(4)]

    known = steps()
    monkeypatch.setattr(
        launches.Outcomes, "of", lambda self, call, args, kwargs, _: call(*args, **kwargs)
    )
    assert known == steps()
    assert launches.launches_of(known[-1]) > 20


def test_learning_rates_on_the_device_are_not_asked():
    with pretending():
        model = nn.ModuleList([launches.linear(64, 32), launches.linear(64, 32)])
        regularizer = UniformityRegularizer(coefficient=1e-3, head=None)
        launches.look_at(regularizer.measure)
        regularizer.attach(model)
        rate = torch.full((), 0.1, device="cuda")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(2):
            count(lambda: regularizer.add_gradients(optimizer))
        assert count(lambda: regularizer.add_gradients(optimizer)).waits == 0
