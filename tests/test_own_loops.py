"""Own loops: each order of calls in which the penalty cannot act is told once, the others are silent."""

import copy
import gc
import logging
import pickle
import warnings
import weakref
from contextlib import ExitStack

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

from lightning_hsu import UniformityRegularizer
from lightning_hsu.measures import Covering, GaussianPotential, Orthogonality, RieszEnergy
from lightning_hsu.presets import OfficialMHE
from tests.members import FAMILY, name_of
from tests.rounding import assert_near

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4)
    )


class Loop:
    """A model with an optimizer and a regularizer; each letter of a step is one call."""

    def __init__(self, optimizer=torch.optim.SGD, **settings):
        self.net = network()
        self.optimizer = optimizer(self.net.parameters(), lr=0.1)
        self.regularizer = UniformityRegularizer(coefficient=0.3, **settings).attach(self.net)
        self.calls = {
            "z": self.optimizer.zero_grad,
            "0": lambda: self.optimizer.zero_grad(set_to_none=False),
            "b": lambda: self.net(X).square().mean().backward(),
            "a": lambda: self.regularizer.add_gradients(self.optimizer),
            "s": self.optimizer.step,
            "m": lambda: self.regularizer.move(self.optimizer),
        }

    def told(self, steps):
        """The warnings of some steps."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for call in steps:
                self.calls[call]()
        assert all(one.filename == __file__ for one in caught)
        return [str(one.message) for one in caught]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("azbs" * 3, "add_gradients found no gradient in layer '0' (1, 8, 6), '2' (1, 8, 8), '4'"),
        ("bzas" * 3, "add_gradients found no gradient"),
        ("b0zas" * 3, "1 more, so there the penalty does nothing"),
        ("zbszm" * 3, "move found no gradient in layer '0'"),
        ("zbms" * 3, "has gradients, but no step has changed its weights since attach"),
        ("zbabas" * 3, "add_gradients is called again before optimizer.step()"),
        ("zbabababas" * 3, "With accumulated batches call it once a step"),
    ],
)
def test_a_wrong_order_is_told_once(steps, words):
    (told,) = Loop().told(steps)
    assert words in told


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "steps", ["zbas", "0bas", "bbbasz", "basz", "bas0", "zbsm", "0bsm", "bsmz"]
)
def test_a_right_order_is_silent(steps, every, optimizer):
    loop = Loop(optimizer, every_n_steps=every)
    closure = {"s": lambda: loop.optimizer.step(lambda: loop.net(X).square().mean())}
    loop.calls |= closure if optimizer is torch.optim.LBFGS else {}
    assert loop.told(steps * 4 + "za") == []  # nor is a later step without gradients told


class ByData(torch.optim.Optimizer):
    """An optimizer that writes past autograd, and sets gradients to zero there, too."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-group["lr"])

    def zero_grad(self, set_to_none=True):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.data.zero_()


def fused(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, fused=True)


@pytest.mark.parametrize("optimizer", [ByData, fused])
@pytest.mark.parametrize("steps", ["zbas", "zbsm"])
def test_optimizers_whose_steps_leave_no_version_are_silent(steps, optimizer):
    assert Loop(optimizer).told(steps * 3) == []


def test_a_step_compiled_by_an_older_torch_is_silent():
    """It leaves no version either."""
    loop = Loop(torch.optim.AdamW)

    def step():
        with ExitStack() as versions:
            for p in loop.net.parameters():
                versions.enter_context(torch.autograd._unsafe_preserve_version_counter(p))
            loop.optimizer.step()

    loop.calls["s"] = step
    assert loop.told("zbsm" * 3) == []


@pytest.mark.parametrize("zero", ["z", "0"])
@pytest.mark.parametrize("act", ["a", "m"])
def test_a_step_that_a_scaler_skips_is_silent(act, zero):
    loop = Loop()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    loop.calls["b"] = lambda: scaler.scale(loop.net(X).square().mean() * 1e10).backward()
    loop.calls["u"] = lambda: scaler.unscale_(loop.optimizer)
    loop.calls["s"] = lambda: (scaler.step(loop.optimizer), scaler.update())
    before = loop.net[0].weight.detach().clone()
    assert loop.told((zero + ("buas" if act == "a" else "busm")) * 3) == []
    assert act == "m" or torch.equal(before, loop.net[0].weight)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_a_scaler_skips_for_a_parameter_of_no_layer_is_silent(optimizer, caplog):
    """The layers' own gradients are finite: what overflows is a bias."""
    caplog.set_level(logging.INFO, "lightning_hsu")
    loop = Loop(optimizer, share_limit=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    steps = []

    def backward():
        scaler.scale(loop.net(X).square().mean()).backward()
        steps.append(1)
        if len(steps) < 3:
            loop.net[5].bias.grad[0] = float("inf")

    loop.calls |= {
        "b": backward,
        "u": lambda: scaler.unscale_(loop.optimizer),
        "s": lambda: (scaler.step(loop.optimizer), scaler.update()),
    }
    before = loop.net[0].bias.detach().clone()
    assert loop.told("zbusm" * 2) == []
    assert torch.equal(before, loop.net[0].bias)
    assert loop.told("zbusm" * 3) == []
    assert not torch.equal(before, loop.net[0].bias)
    assert caplog.messages == []


def test_frozen_layers_and_a_coefficient_of_0_are_silent():
    loop = Loop(head=None, include="2")
    loop.net[2].requires_grad_(False)
    assert loop.told("zas" * 3) == []
    loop.regularizer = UniformityRegularizer(coefficient=0.0).attach(loop.net)
    assert loop.told("zas" * 3) == []


def test_an_optimizer_of_another_model_is_told():
    loop = Loop()
    loop.regularizer.attach(network())
    loop.calls["b"] = lambda: None
    (told,) = loop.told("zbas" * 3)
    assert "SGD holds no parameter of layer '0'" in told
    assert "its parameters have no gradients" in told


def test_an_optimizer_that_trains_a_model_that_is_not_attached_is_told_after_fifty_steps():
    loop = Loop()
    loop.regularizer.attach(network())
    assert loop.told("zbas" * 49) == []
    (told,) = loop.told("zbas" * 9)
    assert "Attach the model whose parameters() the optimizer was built with" in told


def test_a_critic_without_layers_is_silent():
    loop, critic = Loop(), network()
    of_critic = torch.optim.SGD(critic.parameters(), lr=0.1)
    for _ in range(4):
        for _ in range(15):
            of_critic.zero_grad()
            critic(X).sum().backward()
            loop.regularizer.add_gradients(of_critic)
            of_critic.step()
        assert loop.told("zbas") == []


def test_optimizers_of_single_parameters_are_silent_though_biases_come_first():
    nets = nn.ModuleList([network() for _ in range(15)])
    regularizer = UniformityRegularizer().attach(nets)
    parameters = sorted(nets.parameters(), key=lambda p: p.ndim)
    assert sum(p.ndim == 1 for p in parameters) == 60
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in parameters]
    for _ in range(2):
        nets.zero_grad()
        sum(net(X).square().mean() for net in nets).backward()
        for optimizer in optimizers:
            regularizer.add_gradients(optimizer)
            optimizer.step()


def two_optimizers():
    net = network()
    one = torch.optim.SGD(net[:3].parameters(), lr=0.1)
    two = torch.optim.SGD(net[3:].parameters(), lr=0.1)
    return net, one, two, UniformityRegularizer().attach(net)


def test_the_second_of_two_optimizers_is_looked_at_too():
    net, one, two, regularizer = two_optimizers()
    told = []
    for _ in range(12):
        one.zero_grad()
        net(X).square().mean().backward()
        regularizer.add_gradients(one)
        two.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            regularizer.add_gradients(two)
        told.append([str(one.message) for one in caught])
        one.step()
    assert [len(one) for one in told] == [0] * 9 + [1, 0, 0]
    assert "found no gradient in layer '4' (1, 8, 8), '5'" in told[9][0]


@pytest.mark.parametrize("act", ["add_gradients", "move"])
def test_layers_that_are_dropped_in_their_first_steps_are_silent(act):
    net, one, two, regularizer = two_optimizers()
    for step in range(8):
        net.zero_grad()
        outputs = net[:3](X)
        if step % 4 == 3:
            outputs = net[3:](outputs)
        outputs.square().mean().backward()
        for optimizer in (one, two):
            if act == "add_gradients":
                regularizer.add_gradients(optimizer)
            optimizer.step()
            if act == "move":
                regularizer.move(optimizer)


def test_a_move_after_a_step_that_came_before_attach_is_silent():
    loop = Loop()
    assert loop.told("zbs") == []
    loop.regularizer.attach(loop.net)
    assert loop.told("mzbsm") == []


def test_what_is_known_of_a_loop_is_no_part_of_copies_and_pickles():
    loop = Loop()
    loop.told("zbas")
    for twin in (copy.deepcopy(loop.regularizer), pickle.loads(pickle.dumps(loop.regularizer))):
        loop.regularizer = twin.attach(loop.net)
        assert loop.told("zbas") == []


@pytest.mark.parametrize("accumulates", [False, True])
def test_fabric_accumulates_clips_and_steps(accumulates):
    fabric = Fabric(accelerator="cpu", devices=1)
    net, twin = network(), network()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    regularizer = UniformityRegularizer(coefficient=0.3, step_limit=None).attach(model)
    of_twin = UniformityRegularizer(coefficient=0.3, step_limit=None).attach(twin)
    for _ in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        for part, last in ((X[:8], False), (X[8:], True)):
            with fabric.no_backward_sync(model, enabled=accumulates and not last):
                fabric.backward(model(part).square().mean())
            twin(part).square().mean().backward()
        regularizer.add_gradients(optimizer)
        of_twin.penalty().backward()
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        plain.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # measured: at most 6e-8


def test_fabric_is_told_of_gradients_at_each_micro_batch():
    fabric = Fabric(accelerator="cpu", devices=1)
    net = network()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.1))
    regularizer = UniformityRegularizer().attach(model)
    fabric.backward(model(X).square().mean())
    regularizer.add_gradients(optimizer)
    fabric.backward(model(X).square().mean())
    with pytest.warns(UserWarning, match="called again before"):
        regularizer.add_gradients(optimizer)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_penalty_without_a_graph_is_told_in_training_only(off):
    loop = Loop()
    with off():
        with pytest.warns(UserWarning, match="has no graph"):
            loop.regularizer.penalty()
        loop.regularizer.penalty()
        loop.regularizer.attach(loop.net.eval()).penalty()


def test_a_schedule_without_a_step_is_told_once():
    regularizer = UniformityRegularizer(coefficient=lambda step: 0.1 * step).attach(network())
    with pytest.warns(UserWarning, match=r"call penalty\(step\) with the optimizer steps done"):
        assert regularizer.penalty().item() == 0.0
    regularizer.penalty()
    assert regularizer.penalty(2).item() > 0.0
    UniformityRegularizer(coefficient=0.1).attach(network()).penalty()


@pytest.mark.parametrize("setting", [{"tolerance": 0.05}, {"every_n_steps": 2}])
def test_a_penalty_that_leaves_out_no_step_is_told_once(setting):
    loop = Loop(**setting)
    loop.net.eval()
    with torch.no_grad():
        loop.regularizer.penalty()  # for a log
    loop.net.train()
    loss = loop.net(X).square().mean()
    loop.regularizer.add_to_loss(loss, loop.optimizer)
    UniformityRegularizer(coefficient=0, **setting).attach(loop.net).penalty()
    with pytest.warns(UserWarning, match=r"use add_to_loss\(loss, optimizer\)"):
        loop.regularizer.penalty()
    loop.regularizer.penalty()


def test_what_is_no_model_or_no_optimizer_is_refused():
    loop = Loop()
    with pytest.raises(TypeError, match="the optimizer that steps; got a Sequential"):
        loop.regularizer.add_gradients(loop.net)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module; got a SGD"):
        loop.regularizer.attach(loop.optimizer)


@pytest.mark.parametrize("measure", [*FAMILY, OfficialMHE("a1")], ids=name_of)
def test_a_penalty_of_a_former_step_is_refused(measure):
    net = network()
    penalty = UniformityRegularizer(measure).attach(net).penalty()
    penalty.backward()
    with pytest.raises(RuntimeError, match=r"call penalty\(\) anew in each step") as found:
        (net(X).sum() + penalty).backward()
    assert "a second time" in str(found.value.__cause__)


@pytest.mark.filterwarnings("ignore:the weights have changed")
@pytest.mark.parametrize("measure", [RieszEnergy(), Orthogonality()])
def test_a_penalty_of_former_weights_is_refused(measure):
    loop = Loop(measure=measure)
    penalty = loop.regularizer.penalty()
    loop.told("zbs")
    with pytest.raises(
        RuntimeError, match=r"its weights have changed since: call penalty\(\) anew"
    ):
        penalty.backward()


def test_a_penalty_of_former_weights_that_does_not_need_them_is_told():
    loop = Loop(measure=OfficialMHE("a1"))
    penalty = loop.regularizer.penalty()
    loop.told("zbs")
    with pytest.warns(UserWarning, match="at former weights"):
        penalty.backward()


def test_twice_with_a_graph_that_is_kept_is_twice_the_gradient():
    net = network()
    penalty = UniformityRegularizer().attach(net).penalty()
    penalty.backward(retain_graph=True)
    once = net[0].weight.grad.clone()
    penalty.backward()
    torch.testing.assert_close(net[0].weight.grad, 2 * once)


@pytest.mark.parametrize("kept", ["the penalty", "a number"])
def test_penalties_that_are_kept_for_a_log_are_told_once(kept):
    loop = Loop()
    total = 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(60):
            loop.optimizer.zero_grad()
            penalty = loop.regularizer.penalty()
            (loop.net(X).square().mean() + penalty).backward()
            loop.optimizer.step()
            total += penalty if kept == "the penalty" else penalty.item()
    assert len(caught) == (kept == "the penalty")
    assert all("take penalty.detach()" in str(one.message) for one in caught)


def test_many_penalties_within_one_step_are_silent():
    loop = Loop()
    losses = [loop.net(X).mean() + loop.regularizer.penalty() for _ in range(40)]
    torch.stack(losses).mean().backward()
    assert loop.net[0].weight.grad.abs().max() > 0


def test_the_penalties_of_each_micro_batch_are_silent():
    loop = Loop()
    for _ in range(3):
        loop.optimizer.zero_grad()
        losses = [loop.net(X).mean() + loop.regularizer.penalty() for _ in range(25)]
        torch.stack(losses).mean().backward()
        loop.optimizer.step()


def test_nothing_keeps_a_model_and_nothing_stays_on_it():
    net = network()
    regularizer = UniformityRegularizer().attach(net)
    del regularizer
    gc.collect()
    net(X).square().mean().backward()  # the hook of a regularizer that is gone
    loop = Loop()
    loop.told("zbas")
    loop.regularizer.penalty()
    model, regularizer = weakref.ref(loop.net), loop.regularizer
    assert not loop.net._forward_hooks
    loop.__dict__.clear()
    gc.collect()
    assert model() is not None  # attached
    regularizer.detach()
    gc.collect()
    assert model() is None


class WithPenalty(nn.Module):
    def __init__(self, net, regularizer):
        super().__init__()
        self.net = net
        self.regularizer = regularizer

    def forward(self, x):
        return self.net(x).square().mean() + self.regularizer.penalty()


def with_penalty(measure):
    net = network()
    whole = WithPenalty(net, UniformityRegularizer(measure, coefficient=0.3).attach(net))
    whole(X).backward()
    grads = {name: p.grad for name, p in whole.named_parameters()}
    return whole, {name: p.detach() for name, p in whole.named_parameters()}, grads


@pytest.mark.parametrize("measure", [None, Orthogonality(), GaussianPotential(), Covering()])
def test_torch_func_differentiates_a_penalty_within_the_module(measure):
    whole, parameters, grads = with_penalty(measure)

    def loss(parameters):
        return functional_call(whole, parameters, (X,))

    state = whole.regularizer.state_dict()
    for found in (grad(loss)(parameters), jacrev(loss)(parameters)):
        for name, expected in grads.items():
            assert_near(found[name], expected)
    kept = whole.regularizer.state_dict()
    assert str(kept) == str(state)


@pytest.mark.parametrize("measure", [None, Orthogonality(), GaussianPotential()])
def test_an_ensemble_has_each_models_gradient(measure):
    whole, parameters, grads = with_penalty(measure)
    stacked = {name: torch.stack([p, p.flip(0)]) for name, p in parameters.items()}
    found = vmap(grad(lambda one: functional_call(whole, one, (X,))))(stacked)
    for name, expected in grads.items():
        assert_near(found[name][0], expected)
    flipped, _ = stack_module_state([network()])
    assert set(flipped) == {name.removeprefix("net.") for name in parameters}


def test_a_measure_with_a_state_cannot_be_mapped_and_says_so():
    whole, parameters, _ = with_penalty(Covering())
    stacked = {name: torch.stack([p, p]) for name, p in parameters.items()}
    with pytest.raises(RuntimeError, match=r"layer '0': Covering.* which torch.func.vmap does not"):
        vmap(lambda one: functional_call(whole, one, (X,)))(stacked)


def test_a_penalty_beside_the_functional_call_is_told():
    whole, parameters, _ = with_penalty(None)

    def loss(parameters):
        return functional_call(whole.net, parameters, (X,)).mean() + whole.regularizer.penalty()

    own = {name.removeprefix("net."): p for name, p in parameters.items()}
    with pytest.warns(UserWarning, match="penalty\\(\\) is a constant here"):
        grad(loss)(own)


@pytest.mark.parametrize("measure", [None, Covering(), Orthogonality()])
def test_in_inference_mode_steps_are_the_same(measure):
    ends = []
    for inference in (False, True):
        loop = Loop(measure=measure)
        for calls in ("zb", "a", "s", "m"):
            with torch.inference_mode(inference and calls in ("a", "m")):
                assert loop.told(calls) == []
        with torch.inference_mode(inference):
            ends.append([layer.energy for layer in loop.regularizer.measure_layers()])
        ends.append([p.detach() for p in loop.net.parameters()])
        loop.regularizer.penalty().backward()
    assert ends[0] == pytest.approx(ends[2], rel=1e-5)  # other products may be taken there
    assert all(torch.equal(p, q) for p, q in zip(ends[1], ends[3], strict=True))


def test_a_model_made_in_inference_mode_is_measured():
    with torch.inference_mode():
        net = network()
    regularizer = UniformityRegularizer(coefficient=0.3).attach(net)
    assert len(regularizer.measure_layers()) == 4
    with pytest.warns(UserWarning, match="the weights were made in inference mode"):
        regularizer.penalty()


def test_a_penalty_of_frozen_layers_is_0():
    loop = Loop()
    loop.net.requires_grad_(False)
    assert float(loop.regularizer.penalty()) == 0.0


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Warnings of torch's own, about what it traces.
of_dynamo = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:`torch.jit.script",
    "ignore:.*record_function",
    "ignore:Dynamo",
)


@of_dynamo
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_loss_sees_new_weights_and_new_parameters(backend):
    loop, twin = Loop(), Loop()

    def loss(outputs):  # not of inputs: torch 2.4 compiles a model with the parameters that it has
        return outputs.square().mean() + loop.regularizer.penalty()

    compiled = torch.compile(loss, backend=backend)
    for step in range(4):
        if step == 2:
            for net in (loop.net, twin.net):
                net[2].weight = nn.Parameter(net[2].weight.detach().flip(0))
        for net in (loop.net, twin.net):
            net.zero_grad()
        compiled(loop.net(X)).backward()
        (twin.net(X).square().mean() + twin.regularizer.penalty()).backward()
        for p, q in zip(loop.net.parameters(), twin.net.parameters(), strict=True):
            assert_near(p.grad, q.grad)
        loop.optimizer.step()
        twin.optimizer.step()


@of_dynamo
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("act", ["zbas", "zbsm"])
def test_a_compiled_step_is_the_same_step(act):
    loop, twin = Loop(), Loop()

    def step(x):
        for call in act:
            loop.calls[call]()

    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(3):
        compiled(X)
        assert twin.told(act) == []
    for p, q in zip(loop.net.parameters(), twin.net.parameters(), strict=True):
        assert_near(p, q, 1e-5)
    assert loop.regularizer.state_dict() == twin.regularizer.state_dict()


class Backwards(nn.Module):
    """The layer that acts last is registered first."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 4)
        self.first = nn.Linear(6, 8)

    def forward(self, x):
        return self.last(self.first(x).tanh())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("steps", [0, 2])
def test_a_full_graph_takes_the_model_and_later_passes_change_no_head(steps):
    net = Backwards()
    regularizer = UniformityRegularizer().attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for _ in range(steps):
        optimizer.zero_grad()
        compiled(X).square().mean().backward()
        regularizer.add_gradients(optimizer)
        optimizer.step()
    net(X).square().mean().backward()  # the first pass that is not compiled
    heads = [layer.name for layer in regularizer.layers if layer.target.head]
    assert heads == (["first"] if steps else ["last"])


@pytest.mark.usefixtures("fresh_compiler")
def test_a_full_graph_refuses_a_penalty():
    regularizer = UniformityRegularizer().attach(network())
    loss = torch.compile(lambda x: x.sum() + regularizer.penalty(), fullgraph=True)
    with pytest.raises(Exception, match=r"UniformityRegularizer\.penalty") as found:
        loss(X)
    assert type(found.value).__name__ == "Unsupported"


@pytest.mark.parametrize("is_told", [True, False])
def test_new_weights_that_no_optimizer_has_are_told(is_told):
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    regularizer = UniformityRegularizer(coefficient=0.1).attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(60):
            if step == 3:
                net[2] = nn.Linear(8, 5)
            if step == 6 and is_told:
                optimizer.add_param_group({"params": list(net[2].parameters())})
            optimizer.zero_grad()
            net(torch.randn(4, 6)).square().mean().backward()
            regularizer.add_gradients(optimizer)
            optimizer.step()
    told = [str(one.message) for one in caught]
    assert len(told) == (0 if is_told else 1)
    assert all("layer '2' (1, 5, 8) has new weights" in text for text in told)
