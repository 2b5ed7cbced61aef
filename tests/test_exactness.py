"""After several steps the parameters equal those of a plain torch loop that adds the penalty's gradient once a step.

The loop below knows nothing of the engine: it differentiates the float64 oracle and adds the result.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_hsu.core import PairTerm, oracle_energy
from lightning_hsu.measures import RieszEnergy
from tests.models import Adversarial, Automatic, Manual, batches, loader, mean_square, trainer, uniformity

TOLERANCE = 1e-6  # measured: at most 1.5e-7 over all cases
LAYERS = {"0": 1, "2": 2, "5": 1, "7": 1}  # layer of tests.models.network -> groups
HEAD = "7"


def penalty_gradients(net, coefficient):
    """Gradients of coefficient times penalty in the weights of ``net``, by autograd through the oracle."""
    found = {}
    for name, groups in LAYERS.items():
        weight = net[int(name)].weight.detach().double().requires_grad_()
        measure = RieszEnergy(s=2.0, half_space=name != HEAD)
        term = PairTerm(measure.kernel, measure.half_space, measure.softening)
        strength = coefficient(name) if callable(coefficient) else coefficient
        energy = strength * oracle_energy(weight.reshape(groups, -1, weight[0].numel()), term).mean()
        found[name] = torch.autograd.grad(energy, weight)[0]
    return found


def add_penalty(net, coefficient, scale=1.0):
    for name, gradient in penalty_gradients(net, coefficient).items():
        weight = net[int(name)].weight
        if weight.grad is not None and weight.requires_grad:
            weight.grad += (scale * gradient).to(weight.dtype)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


@dataclass
class Case:
    name: str
    trainer: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    module: Any = Automatic
    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = sgd
    autocast: Any = None
    scaled: bool = False
    dtype: torch.dtype = torch.float32
    accumulate: int = 1
    clip: Any = None
    # Batches an epoch; few under fp16, where one weight on a rounding edge makes a last-bit difference grow to 5e-5.
    count: int = 7
    coefficient: Any = lambda step: 0.5  # after that many steps: a number, or layer -> number


def clip_norm(parameters):
    nn.utils.clip_grad_norm_(parameters, 0.3)


def clip_value(parameters):
    nn.utils.clip_grad_value_(parameters, 0.02)


def scaler(overflow=False):
    """With ``overflow`` the first step is skipped: its scaled gradients are beyond float16."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**22 if overflow else 256.0, backoff_factor=2.0**-14)


CASES = [
    Case("fp32"),
    Case("fp32, Adam", optimizer=adam),
    Case("bf16-mixed", trainer={"precision": "bf16-mixed"}, autocast=torch.bfloat16),
    Case("16-mixed, scaler", trainer={"precision": "scaler"}, autocast=torch.float16, scaled=True, count=2),
    Case("16-mixed, scaler, fused Adam", trainer={"precision": "scaler"}, autocast=torch.float16, scaled=True, optimizer=adam),
    Case("64-true", trainer={"precision": "64-true"}, dtype=torch.float64),
    Case("accumulate 3 of 7 batches: a short last window", trainer={"accumulate_grad_batches": 3}, accumulate=3),
    Case(
        "scaler, accumulate 3 of 7",
        trainer={"precision": "scaler", "accumulate_grad_batches": 3},
        autocast=torch.float16,
        scaled=True,
        accumulate=3,
    ),
    Case("scaler, steps that overflow", trainer={"precision": "overflow"}, autocast=torch.float16, scaled=True, count=2),
    Case(
        "scaler, steps that overflow, fused Adam",
        trainer={"precision": "overflow"},
        autocast=torch.float16,
        scaled=True,
        optimizer=adam,
        count=2,
    ),
    Case("without the step limit", callback={"step_limit": None}),
    Case("clip by norm", trainer={"gradient_clip_val": 0.3}, clip=clip_norm),
    Case("clip by value", trainer={"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}, clip=clip_value),
    Case("training_step returns None", settings={"silent": (1, 4)}),
    Case("manual", module=Manual),
    Case("manual, three manual_backward", module=Manual, settings={"parts": 3}),
    Case("manual, bf16-mixed", trainer={"precision": "bf16-mixed"}, module=Manual, autocast=torch.bfloat16),
    Case("manual, scaler", trainer={"precision": "scaler"}, module=Manual, autocast=torch.float16, scaled=True, count=2),
    Case("every second step", callback={"every_n_steps": 2}, coefficient=lambda step: 0.5 * (step % 2 == 0)),
    Case("schedule", callback={"coefficient": lambda step: 0.1 * step}, coefficient=lambda step: 0.1 * step),
    Case(
        "by pattern, schedule inside, none for the rest",
        callback={"coefficient": {"net.5": lambda step: 0.1 * step, "net.[02]": 0.3}},
        coefficient=lambda step: lambda name: {"5": 0.1 * step, "7": 0.0}.get(name, 0.3),
    ),
    Case(
        "the head apart",
        callback={"head_coefficient": 2.0},
        coefficient=lambda step: lambda name: 2.0 if name == HEAD else 0.5,
    ),
    Case("monitor only", callback={"coefficient": 0.0}, coefficient=lambda step: 0.0),
]


def plain_loop(case, net, data, epochs):
    """Train ``net`` without Lightning; the penalty enters once an optimizer step."""
    optimizer = case.optimizer(net.parameters())
    scale = scaler(case.trainer["precision"] == "overflow") if case.scaled else None
    parts = case.settings.get("parts", 1)
    steps = 0
    for _ in range(epochs):
        for start in range(0, len(data), case.accumulate):
            optimizer.zero_grad()
            ran = False
            for i, (x, y) in enumerate(data[start : start + case.accumulate], start):
                if i in case.settings.get("silent", ()):
                    continue
                for _ in range(parts):
                    with torch.autocast("cpu", case.autocast) if case.autocast else nullcontext():
                        loss = mean_square(net(x), y) / case.accumulate / parts
                    (scale.scale(loss) if scale else loss).backward()
                ran = True
            fused = scale and getattr(optimizer, "_step_supports_amp_scaling", False)
            if scale and not fused:
                scale.unscale_(optimizer)
            if ran:
                add_penalty(net, case.coefficient(steps), scale.get_scale() if fused else 1.0)
            steps += 1
            if case.clip:
                case.clip(net.parameters())
            if scale:
                scale.step(optimizer)
                scale.update()
            else:
                optimizer.step()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_a_plain_loop(case):
    data = batches(case.count, dtype=case.dtype)
    module = case.module(make_optimizer=case.optimizer, **case.settings)
    twin = copy.deepcopy(module.net).to(case.dtype)
    settings = dict(case.trainer)
    if case.scaled:
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler(settings.pop("precision") == "overflow"))]
    before = copy.deepcopy(module.net)
    trainer(uniformity(**{"coefficient": 0.5, **case.callback}), **settings).fit(module, loader(data))
    plain_loop(case, twin, data, epochs=2)
    assert max_difference(module.net, twin) < TOLERANCE
    assert max_difference(before.to(case.dtype), twin) > 1e-3  # it did train


def max_difference(a, b):
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_two_optimizers_each_get_the_penalty_of_their_own_parameters():
    data, module = batches(), Adversarial()
    twin = copy.deepcopy(module)
    trainer(uniformity(coefficient=0.5, head="first.7", exclude="second")).fit(module, loader(data))
    optimizers = twin.configure_optimizers()
    for _ in range(2):
        for batch in data:
            for i, optimizer in enumerate(optimizers):
                twin.zero_grad()
                twin.losses(batch)[i].backward()
                if i == 0:
                    add_penalty(twin.first, 0.5)
                optimizer.step()
    assert max_difference(module, twin) < TOLERANCE


class UnfreezeInTheSecondEpoch(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0], train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1)


def test_a_layer_that_is_unfrozen_later_joins():
    data = batches()
    module = Automatic(make_optimizer=lambda p: torch.optim.SGD([q for q in p if q.requires_grad], lr=0.1))
    twin = copy.deepcopy(module.net)
    trainer(UnfreezeInTheSecondEpoch(), uniformity(coefficient=0.5)).fit(module, loader(data))
    optimizer = torch.optim.SGD(list(twin.parameters())[2:], lr=0.1)
    twin[0].requires_grad_(False)
    for epoch in range(2):
        if epoch == 1:
            twin[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(twin[0].parameters()), "lr": 0.1})
        for x, y in data:
            optimizer.zero_grad()
            mean_square(twin(x), y).backward()
            add_penalty(twin, 0.5)
            optimizer.step()
    assert max_difference(module.net, twin) < TOLERANCE


def test_monitoring_alone_leaves_training_bit_identical():
    data, module = batches(), Automatic()
    twin = copy.deepcopy(module)
    for one, callbacks in ((module, [uniformity(coefficient=0)]), (twin, [])):
        torch.manual_seed(3)
        trainer(*callbacks, log_every_n_steps=1).fit(one, loader(data))
        one.after = torch.rand(1)  # and the random stream
    assert torch.equal(module.after, twin.after)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))
