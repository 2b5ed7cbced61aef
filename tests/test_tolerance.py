"""Gradients that are kept for several steps: a plain loop that computes the same layers trains the same.

``Kept`` is that loop's penalty. It knows nothing of the engine but which layers a step computed.
"""

import copy
import math
import pickle
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim import LBFGS, SGD, Adam, AdamW

from lightning_hsu import Share, UniformityRegularizer
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu._engine.delta import Delta, Use, sample_of
from lightning_hsu._engine.kept import _is_far
from lightning_hsu._engine.reuse import Reuse
from lightning_hsu.measures import (
    Covering,
    GaussianPotential,
    Polarization,
    RieszEnergy,
    Sampled,
)
from lightning_hsu.projections import Projected, RandomProjection
from tests import models, plain
from tests.models import Automatic, batches, loader, mean_square, trainer, uniformity
from tests.plain import HALF_SPACE, slope_at_right_angles
from tests.ranks import Keep
from tests.waits import waits_of


class Kept:
    """A plain loop's penalty, whose gradients are kept until a step computes them anew.

    Args:
        layers: Those of ``plain.layers``.
        mode: "gradient", "loss" or "decoupled".
        coefficient: Takes the steps done and a layer's name.
        limit: The step limit.
    """

    def __init__(self, layers, mode, coefficient, limit=1.0):
        self.layers = layers
        self.mode = mode
        self.coefficient = coefficient
        self.limit = limit
        self.past: dict[str, plain.Past] = {}
        self.states: dict[str, Any] = {}
        self.means: dict[str, list[float]] = {}
        self.limited = self.unlimited = 0  # rows
        self.follows = True  # the pull along the sum of the neurons, in full space

    def gradient(self, layer, x, computed):
        """The gradient (groups, n, d) of the mean over groups, as it was when it was last computed.

        ``computed`` are the names of layers that are computed, and of those that are projected.
        """
        name = layer.name
        computed, projected = computed
        if name in computed:
            if layer.measure.has_state:
                self.states[name] = layer.measure.prepare(x, self.states.get(name))
            wide = x.float() if x.dtype == torch.bfloat16 else x
            grad = layer.measure.value_and_grad(wide, self.states.get(name))[1]
            past = plain.Past(grad, x.double().clone(), x.double().clone())
        else:
            slope = slope_at_right_angles(layer.measure) if self.follows else 0.0
            past = self.past[name].refreshed(x.double(), slope, name in projected)
        kept = past.grad.to(x.dtype)
        self.past[name] = replace(past, grad=kept.double(), age=past.age + 1)
        return kept.to(torch.promote_types(x.dtype, torch.float32)) / len(x)

    def weighted(self, step, optimizer, computed, task=True):
        """Triples of a layer, its rows and its gradient times coefficient, within the step limit."""
        found = []
        reactions = plain.reactions_of(optimizer)
        for layer in self.layers:
            moving = [p for p in layer.parameters() if id(p) in reactions]
            strength = self.coefficient(step, layer.name)
            if not moving or strength == 0:
                continue
            with torch.enable_grad():
                rows = layer.rows(getattr(layer.module, layer.key))
            x = rows.detach()
            grad = self.gradient(layer, x, computed)
            if isinstance(strength, Share):
                strength = self.share(layer, strength, rows, moving, grad)
            grad = grad * strength
            if self.limit is not None:
                room = x.norm(dim=-1, keepdim=True) * self.limit
                room = room * self.allowed(layer, moving, reactions[id(moving[0])])
                factor = room / grad.norm(dim=-1, keepdim=True)
                self.limited += int((factor < 1).sum())
                self.unlimited += int((factor > 1).sum())
                grad = grad * factor.clamp_max(1.0)
            found.append((layer, rows, moving, grad))
        return found

    def allowed(self, layer, moving, reaction):
        """A gradient's length that moves a neuron by 1."""
        if self.mode == "decoupled":
            return 1.0 / reaction.rate
        if self.mode == "gradient" and reaction.rescales:
            tasks = torch.cat([layer.own(p, p.grad).flatten() for p in moving])
            return float(tasks.double().square().mean().sqrt()) / reaction.rate
        return 1.0 / reaction.rate / reaction.gain

    def share(self, layer, share, rows, moving, grad):
        penalty = torch.autograd.grad(rows, moving, grad.to(rows.dtype), retain_graph=True)
        norms = plain.norm([p.grad for p in moving]), plain.norm(penalty)
        means = self.means.setdefault(layer.name, [0.0, 0.0])
        for i in range(2):
            means[i] = share.smoothing * means[i] + (1 - share.smoothing) * norms[i]
        return min(share.fraction * means[0] / means[1], share.maximum) if means[1] else 0.0

    def before_step(self, step, optimizer, computed):
        """Add the gradients; those of a loss alike, since its other part does not see them."""
        for _, rows, moving, grad in self.weighted(step, optimizer, computed):
            parts = torch.autograd.grad(rows, moving, grad.to(rows.dtype))
            for p, part in zip(moving, parts, strict=True):
                p.grad += part

    @torch.no_grad()
    def after_step(self, step, optimizer, computed):
        """Move the neurons along the sphere."""
        rate = optimizer.param_groups[0]["lr"]
        for layer, rows, moving, grad in self.weighted(step, optimizer, computed):
            if moving[0] is layer.module._parameters.get(layer.key):
                layer.move(moving[0], self.in_weight(layer, moving[0], rate * grad))
                continue
            with torch.enable_grad():
                parts = torch.autograd.grad(rows, moving, grad)
            for p, part in zip(moving, parts, strict=True):
                p -= rate * part

    def in_weight(self, layer, p, grad):
        """A gradient of rows in the shape of the weight."""
        with torch.enable_grad():
            weight = p.detach().requires_grad_()
            return torch.autograd.grad(layer.rows(weight), weight, grad)[0]


def half(step, layer):
    return 0.05


def tower(width=12, depth=4):
    """Several layers of one shape."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.Tanh())
    for _ in range(depth):
        net.extend([nn.Linear(width, width), nn.Tanh()])
    return net.append(nn.Linear(width, 3))


def network_layers(net, measure=HALF_SPACE):
    return plain.layers(net, "", measure)


def image_layers(net, measure=HALF_SPACE):
    return [
        plain.Layer("0", net[0], measure),
        plain.Layer("2", net[2], measure, plain.in_groups),
        plain.Layer("4", net[4], measure, plain.transposed_in_groups),
        plain.Layer("7", net[7], measure.for_head()),
    ]


def tower_layers(net, measure=HALF_SPACE):
    found = [
        plain.Layer(name, one, measure)
        for name, one in net.named_children()
        if isinstance(one, nn.Linear)
    ]
    return [*found[:-1], plain.Layer(found[-1].name, found[-1].module, measure.for_head())]


def sgd(parameters):
    return SGD(parameters, lr=0.01, momentum=0.9)


ALL = ("gradient", "loss", "decoupled")
APART = ("gradient", "decoupled")


@dataclass(frozen=True)
class Case:
    """A training.

    Args:
        net: Makes the network; ``layers`` are those of the plain loop.
        settings: Of the regularizer.
        strength: The plain loop's coefficient.
        measure: That of both.
        modes: Those that are tested.
        optimizer: Takes the parameters.
        dtype: Of everything.
        off: What the weights may differ by.
        reuses: Whether some gradient is used twice.
    """

    net: Any = models.network
    layers: Any = network_layers
    settings: dict[str, Any] = field(default_factory=dict)
    strength: Any = half
    measure: Any = HALF_SPACE
    modes: tuple[str, ...] = ALL
    optimizer: Any = sgd
    dtype: torch.dtype = torch.float64
    off: float = 1e-12
    reuses: bool = True


def by_pattern(step, layer):
    return {"0": 0.05, "2": 0.05, "5": 0.1}.get(layer, 0.0)


def rising(step, layer=None):
    return 0.005 * step


def binding(step, layer):
    return 3.0


CASES = {
    "plain": Case(),
    "AdamW": Case(optimizer=partial(AdamW, lr=3e-3, weight_decay=0.1)),
    "Share": Case(
        settings={"coefficient": Share(0.3)}, strength=lambda *_: Share(0.3), modes=APART
    ),
    "step limit": Case(
        settings={"coefficient": 3.0, "step_limit": 0.006},
        strength=binding,
        modes=("gradient", "loss"),
    ),
    "step limit, decoupled": Case(
        settings={"coefficient": 3.0, "step_limit": 0.0015}, strength=binding, modes=("decoupled",)
    ),
    "no step limit": Case(settings={"step_limit": None}),
    "one shape": Case(tower, tower_layers),
    "transposed": Case(models.images, image_layers),
    "weight_norm": Case(models.weight_normed_network),
    "bf16": Case(dtype=torch.bfloat16, off=0.02),
    "float32": Case(dtype=torch.float32, off=1e-5),
    "by pattern": Case(settings={"coefficient": {"[02]": 0.05, "5": 0.1}}, strength=by_pattern),
    "schedule": Case(settings={"coefficient": rising}, strength=rising),
    "every second step": Case(settings={"every_n_steps": 2}),
    "Gaussian": Case(measure=GaussianPotential()),
    "Gaussian, one shape": Case(tower, tower_layers, measure=GaussianPotential()),
    "Sampled": Case(
        partial(tower, 24, 2), tower_layers, measure=Sampled(RieszEnergy(s=1.0), block=6)
    ),
    "Covering": Case(tower, tower_layers, measure=Covering(), reuses=False),
    "Polarization": Case(tower, tower_layers, measure=Polarization(s=1), reuses=False),
    "Projected": Case(
        tower, tower_layers, measure=Projected(RieszEnergy(s=1.0), RandomProjection(dim=5))
    ),
}


class Run:
    """A training with the regularizer, step by step."""

    def __init__(self, case, mode, tolerance=0.4, seed=0):
        torch.manual_seed(seed)
        self.net = case.net().to(case.dtype)
        self.mode = mode
        self.optimizer = case.optimizer(self.net.parameters())
        settings = {"coefficient": 0.05, **case.settings, "tolerance": tolerance}
        self.regularizer = UniformityRegularizer(case.measure, **settings).attach(self.net)
        self.steps = 0

    @property
    def computed(self):
        """The layers that the last step computed."""
        return set(self.regularizer.state.deltas.computed)

    @property
    def uses(self):
        """These, and the layers whose gradients it projected."""
        return self.computed, set(self.regularizer.state.deltas.projected)

    def begin(self, batch):
        self.optimizer.zero_grad()
        loss = mean_square(self.net(batch[0]), batch[1])
        if self.mode == "loss":
            self.regularizer.add_to_loss(loss, self.optimizer)
        loss.backward()
        if self.mode == "loss":
            self.regularizer.count_step(self.optimizer)

    def step(self, batch):
        self.begin(batch)
        if self.mode == "gradient":
            self.regularizer.add_gradients(self.optimizer)
        self.optimizer.step()
        if self.mode == "decoupled":
            self.regularizer.move(self.optimizer)
        self.steps += 1


def names(case):
    return [
        pytest.param(one, mode, id=f"{name}-{mode}") for name, one in case for mode in one.modes
    ]


@pytest.mark.filterwarnings("ignore:the penalty is too strong")  # where the limit is to bind
@pytest.mark.parametrize(("case", "mode"), names(CASES.items()))
def test_a_plain_loop_that_computes_the_same_layers_trains_the_same(case, mode):
    run = Run(case, mode)
    net = copy.deepcopy(run.net)
    without = copy.deepcopy(run.net)
    optimizer, bare = case.optimizer(net.parameters()), case.optimizer(without.parameters())
    limit = case.settings.get("step_limit", 1.0)
    kept = Kept(case.layers(net, case.measure), mode, case.strength, limit)
    every = case.settings.get("every_n_steps", 1)
    counts = {True: 0, False: 0}
    data = batches(8, dtype=case.dtype)
    for step in range(32):
        x, y = data[step % 8]
        run.step((x, y))
        is_due = step % every == 0
        optimizer.zero_grad()
        mean_square(net(x), y).backward()
        if mode != "decoupled" and is_due:
            kept.before_step(step, optimizer, run.uses)
        optimizer.step()
        if mode == "decoupled" and is_due:
            kept.after_step(step, optimizer, run.uses)
        if is_due:
            for layer in kept.past:
                counts[layer in run.computed] += 1
        bare.zero_grad()
        mean_square(without(x), y).backward()
        bare.step()
    assert difference(run.net, net) < case.off
    assert difference(run.net, without) > 20 * case.off or case.dtype == torch.bfloat16
    assert counts[False] > 10 or not case.reuses
    if case.strength is binding:
        assert min(kept.limited, kept.unlimited) > 100
    for name, state in kept.states.items():
        mine = run.regularizer.state.measure_states.by_layer.get(name)
        assert (mine is None) == (state is None)
        for key, part in (state or {}).items():
            assert torch.allclose(part.double(), mine[key].double(), atol=1e-9)


def difference(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p.double() - q.double()).detach().abs().max()) for p, q in pairs)


def test_two_optimizers_and_their_schedules_are_followed():
    """Each step computes layers of its own optimizer only."""
    torch.manual_seed(0)
    first, second = models.network().double(), nn.Linear(3, 12).double()
    both = nn.ModuleDict({"first": first, "second": second})
    twin = copy.deepcopy(both)
    regularizer = UniformityRegularizer(coefficient=0.05, tolerance=0.4).attach(both)
    kept = Kept(
        [
            *plain.layers(twin["first"], "first.", head=False),
            plain.Layer("second", twin["second"], plain.DEFAULT_MEASURE),
        ],
        "gradient",
        half,
    )
    optimizers = [
        (sgd(net["first"].parameters()), Adam(net["second"].parameters(), lr=1e-3))
        for net in (both, twin)
    ]
    counts = {True: 0, False: 0}
    for step in range(32):
        x, y = batches(8, dtype=torch.float64)[step % 8]
        for i in range(2):
            for net, pair in zip((both, twin), optimizers, strict=True):
                net.zero_grad()
                made = net["first"](x)
                loss = mean_square(made, y) if i == 0 else net["second"](made).square().mean()
                loss.backward()
                if net is both:
                    regularizer.add_gradients(pair[i])
                    computed = set(regularizer.state.deltas.computed)
                    own = {"second"} if i == 1 else {"first.0", "first.2", "first.5", "first.7"}
                    assert computed <= own
                    for name in own:
                        counts[name in computed] += 1
                    uses = computed, set(regularizer.state.deltas.projected)
                else:
                    kept.before_step(step, pair[i], uses)
                pair[i].step()
    assert difference(both, twin) < 1e-12
    assert counts[False] > 20


# Exact: without a tolerance, and with one that nothing meets


@pytest.mark.parametrize(
    ("case", "mode"),
    names([(n, CASES[n]) for n in ("plain", "one shape", "weight_norm", "Gaussian")]),
)
def test_a_tolerance_that_nothing_meets_is_none(case, mode):
    exact, strict = Run(case, mode, None), Run(case, mode, 1e-9)
    for batch in batches(8, dtype=case.dtype):
        exact.step(batch)
        strict.step(batch)
        assert strict.computed == {layer.name for layer in strict.regularizer.layers}
        assert exact.computed == set()
    assert difference(exact.net, strict.net) < 1e-13


@pytest.mark.parametrize("mode", ALL)
def test_nothing_is_kept_without_a_tolerance(mode):
    run = Run(CASES["one shape"], mode, None)
    for batch in batches(3, dtype=torch.float64):
        run.step(batch)
    assert tensors_of(run.regularizer.state.deltas) == []
    assert "reuse" not in run.regularizer.state_dict()
    kept = Run(CASES["one shape"], mode)
    for batch in batches(3, dtype=torch.float64):
        kept.step(batch)
    sizes = sum(layer.target.neurons().numel() for layer in kept.regularizer.layers)
    most = 2.1 * sizes + 10 * len(kept.regularizer.layers)  # small layers' samples are all of them
    assert sizes < sum(map(torch.Tensor.numel, storages_of(kept.regularizer.state.deltas))) < most


def tensors_of(tree, seen=None):
    """All tensors that an object holds, but for those of layers."""
    seen = set() if seen is None else seen
    if id(tree) in seen or isinstance(tree, nn.Module | nn.Parameter):
        return []
    seen.add(id(tree))
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = []
    if isinstance(tree, dict):
        parts = list(tree.values())
    elif isinstance(tree, list | tuple | set):
        parts = list(tree)
    else:
        parts = [getattr(tree, name) for name in getattr(tree, "__slots__", ())]
        parts += list(getattr(tree, "__dict__", {}).values())
    return [x for part in parts for x in tensors_of(part, seen)]


def storages_of(tree):
    """One tensor of each storage, as large as that is."""
    found = {}
    for x in tensors_of(tree):
        whole = x.new_empty(0).set_(x.untyped_storage())
        found[x.untyped_storage().data_ptr()] = whole
    return list(found.values())


@pytest.mark.parametrize("mode", APART)
@pytest.mark.parametrize("tolerance", [0.4, None])
@pytest.mark.parametrize("way", [nullcontext, waits_of])  # waits_of goes the way of a GPU
@pytest.mark.parametrize("name", ["float32", "bf16", "by pattern"])
def test_a_step_that_is_looked_at_changes_the_same_bits(name, way, tolerance, mode):
    case = CASES[name]
    runs = Run(case, mode, tolerance), Run(case, mode, tolerance)
    data = batches(8, dtype=case.dtype)
    for step in range(24):
        for i, run in enumerate(runs):
            run.begin(data[step % 8])
            stats = i == 1 and step % 3 == 0
            with way():
                if mode == "gradient":
                    run.regularizer.add_gradients(run.optimizer, stats=stats)
                run.optimizer.step()
                if mode == "decoupled":
                    run.regularizer.move(run.optimizer, stats=stats)
        assert runs[0].computed == runs[1].computed
        for p, q in zip(*(run.net.parameters() for run in runs), strict=True):
            assert torch.equal(p, q)
            assert torch.equal(p.grad, q.grad)


# Sudden changes


@pytest.mark.parametrize(
    "shape", [(64, 32), (64, 48), (64, 64), (40, 37), (3, 500), (500, 3), (512, 512), (9, 7)]
)
def test_the_sample_sees_every_part_of_a_layer(shape):
    x = torch.arange(math.prod(shape)).view(1, *shape)
    seen = sample_of(x)
    assert len(seen) <= 1024
    assert len(seen) >= min(x.numel(), 300)
    rows, columns = set((seen // shape[1]).tolist()), set((seen % shape[1]).tolist())
    assert len(rows) > 0.9 * min(shape[0], len(seen))
    assert len(columns) > 0.9 * min(shape[1], len(seen))
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(sample_of(apart), seen)


def wide():
    """Layers of more entries than a sample, and of fewer."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, 64),
        nn.Tanh(),
        nn.Linear(64, 32),
        nn.Tanh(),
        nn.Linear(32, 16),
        nn.Tanh(),
        nn.Linear(16, 3),
    )


SLOW = Case(wide, tower_layers, optimizer=lambda parameters: SGD(parameters, lr=1e-3))


def penalty_added(run):
    """By layer, what a step adds to the neurons' gradient over its coefficient."""
    return _added(run.net, run.regularizer, run.optimizer, in_loss=run.mode == "loss")


def fresh_penalty(run):
    """The same with a regularizer that keeps nothing."""
    ours = run.regularizer
    fresh = UniformityRegularizer(ours.measure, 0.05, head=ours.head, step_limit=None)
    fresh.checks_order = False
    fresh.state.heads = list(ours.state.heads)
    return _added(run.net, fresh.attach(run.net), run.optimizer)


def _added(net, regularizer, optimizer, *, in_loss=False):
    known = [(p, p.grad) for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    if in_loss:
        loss = sum(0.0 * p.sum() for p in net.parameters())
        regularizer.add_to_loss(loss, optimizer)
        loss.backward()
        regularizer.count_step(optimizer)
    else:
        regularizer.add_gradients(optimizer)
    found = {layer.name: layer.parameters[0].grad.clone() / 0.05 for layer in regularizer.layers}
    for p, grad in known:
        p.grad = grad
    return found


def errors(found, fresh):
    """Relative errors by layer."""
    assert found.keys() == fresh.keys()
    return {name: float((found[name] - one).norm() / one.norm()) for name, one in fresh.items()}


def settled(tolerance=0.05, case=SLOW, steps=24, mode="gradient"):
    """A training that has found how long its gradients can be used."""
    run = Run(case, mode, tolerance)
    run.regularizer.step_limit = None
    run.regularizer.checks_order = False
    for batch in batches(steps, dtype=case.dtype):
        run.step(batch)
    return run


def weight_of(run):
    return run.net[3].weight


def copied(run):
    other = torch.nn.init.normal_(torch.empty_like(weight_of(run)), std=0.1)
    weight_of(run).copy_(other)


def copied_through_data(run):
    other = torch.nn.init.normal_(torch.empty_like(weight_of(run)), std=0.1)
    weight_of(run).data.copy_(other)


def other_data(run):
    weight_of(run).data = torch.nn.init.normal_(torch.empty_like(weight_of(run)), std=0.1)


def clipped(run):
    weight_of(run).data.clamp_(-0.03, 0.03)


def pruned(run):
    prune.l1_unstructured(run.net[3], "weight", 0.3)


def pruned_in_place(run):
    weight = weight_of(run)
    weight.data.mul_(weight.abs() > weight.abs().quantile(0.3))


def rows_anew(run):
    """5 % of them, the last ones."""
    weight = weight_of(run)
    weight.data[-2:] = 0.07 * torch.randn(2, weight.shape[1], dtype=weight.dtype)


def last_half_anew(run):
    weight = weight_of(run)
    weight.data[16:] = 0.07 * torch.randn(16, weight.shape[1], dtype=weight.dtype)


def two_rows_alike(run):
    weight_of(run)[-1] = weight_of(run)[-2] * 1.001


def replaced(run):
    layer = run.net[3]
    layer.weight = nn.Parameter(0.1 * torch.randn_like(layer.weight))
    run.optimizer.add_param_group({"params": [layer.weight]})


def loaded(run):
    run.net.load_state_dict(
        {k: v + 0.05 * torch.randn_like(v) for k, v in run.net.state_dict().items()}
    )


def assigned(run):
    state = {k: v + 0.05 * torch.randn_like(v) for k, v in run.net.state_dict().items()}
    run.net.load_state_dict(state, assign=True)
    run.optimizer.param_groups[0]["params"] = list(run.net.parameters())


def rotated(run):
    d = weight_of(run).shape[1]
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    weight_of(run).copy_(weight_of(run) @ q)


def permuted(run):
    weight_of(run).copy_(weight_of(run)[torch.randperm(32)])


def negated(run):
    weight_of(run).neg_()


def another_head(run):
    """Its measure is in full space from now on."""
    with torch.enable_grad():
        assert run.regularizer.find_head(run.net[:4](torch.ones(1, 1, 6, 6, dtype=torch.float64)))


CHANGES = [
    copied,
    copied_through_data,
    other_data,
    clipped,
    pruned,
    pruned_in_place,
    rows_anew,
    last_half_anew,
    two_rows_alike,
    replaced,
    loaded,
    assigned,
    rotated,
    permuted,
    negated,
    another_head,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_sudden_change_is_seen_at_the_next_step(change):
    run = settled()
    calm = settled()
    penalty_added(calm)
    assert "3" not in calm.computed
    torch.manual_seed(1)
    with torch.no_grad():
        change(run)
    found = penalty_added(run)
    assert "3" in run.computed
    off = errors(found, fresh_penalty(run))
    assert off["3"] < 1e-9
    assert max(off.values()) < 0.05


def test_a_nan_weight_is_computed_anew_and_harms_no_other_layer():
    run = settled()
    with torch.no_grad():
        run.net[3].weight[5] = math.nan
    for _ in range(3):
        found = penalty_added(run)
        assert "3" in run.computed
        assert not run.computed >= {"1", "3", "5", "7"}
        for name in ("1", "5", "7"):
            assert bool(found[name].isfinite().all())
    with torch.no_grad():
        run.net[3].weight[5] = 0.1
    off = errors(penalty_added(run), fresh_penalty(run))
    assert max(off.values()) < 0.1
    assert off["3"] < 1e-9


def pruned_wide():
    """Its layers are not plain: their weights are computed."""
    net = wide()
    for i in (1, 3, 5, 7):
        prune.identity(net[i], "weight")
    return net


@pytest.mark.parametrize("mode", ["gradient", "loss"])
@pytest.mark.parametrize("make", [wide, pruned_wide])
def test_on_a_gpu_coincident_neurons_are_missed_at_one_step_and_not_kept_so(make, mode):
    """One pass gives them no direction; at the next step the layer is computed the exact way."""
    with waits_of():
        run = settled(case=replace(SLOW, net=make), mode=mode)
        with torch.no_grad():
            weight = run.regularizer.layers[1].parameters[0]
            weight[-1] = weight[-2]
        penalty_added(run)
        assert "3" in run.computed
        found = penalty_added(run)
        assert run.computed == {"3"}
        penalty_added(run)
        assert run.computed == set()
    assert errors(found, fresh_penalty(run))["3"] < 1e-9


def test_on_a_gpu_a_sampled_gradient_that_was_not_exact_is_not_kept():
    case = replace(SLOW, measure=Sampled(RieszEnergy(s=1.0), block=8))
    with waits_of():
        run = settled(case=case)
        with torch.no_grad():
            weight_of(run).copy_(weight_of(run)[:1].expand(32, 64).clone())
        penalty_added(run)
        assert "3" in run.computed
        penalty_added(run)
        assert "3" in run.computed


# Measured errors


def digits():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 36, generator=generator)
    labels = torch.randint(10, (512,), generator=generator)
    return centres[labels] + 0.7 * torch.randn(512, 36, generator=generator), labels


def mlp(depth=8, width=24):
    sizes = [36, *[width] * (depth - 1), 10]
    net = nn.Sequential()
    for i in range(depth):
        net.append(nn.Linear(sizes[i], sizes[i + 1]))
        if i < depth - 1:
            net.append(nn.ReLU())
    return net


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )


TRAININGS = {
    "SGD": (mlp, lambda parameters: SGD(parameters, lr=0.01, momentum=0.9)),
    "AdamW": (mlp, lambda parameters: AdamW(parameters, lr=1e-3)),
    "convolutions": (conv, lambda parameters: SGD(parameters, lr=0.01, momentum=0.9)),
}


@pytest.mark.filterwarnings("ignore:.*stronger than the task")  # which is learnt by heart
@pytest.mark.parametrize("tolerance", [0.05, 0.2])
@pytest.mark.parametrize("name", TRAININGS)
def test_measured_errors_are_within_the_tolerance(name, tolerance):
    make, make_optimizer = TRAININGS[name]
    torch.manual_seed(0)
    net = make()
    optimizer = make_optimizer(net.parameters())
    settings = {"step_limit": None}
    regularizer = UniformityRegularizer(coefficient=0.05, tolerance=tolerance, **settings).attach(
        net
    )
    exact = UniformityRegularizer(coefficient=0.05, **settings).attach(net)
    exact.checks_order = regularizer.checks_order = False
    x, y = digits()
    found, computed, all_at_once = [], [], 0
    for step in range(150):
        part = torch.arange(step * 64, step * 64 + 64) % 512
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[part]), y[part]).backward()
        task = {layer.name: layer.parameters[0].grad.clone() for layer in exact.layers}
        fresh = _added(net, exact, optimizer)
        regularizer.add_gradients(optimizer)
        for layer in exact.layers:
            added = (layer.parameters[0].grad - task[layer.name]) / 0.05
            found.append(float((added - fresh[layer.name]).norm() / fresh[layer.name].norm()))
        if step >= 50:
            now = regularizer.state.deltas.computed
            computed.append(len(now) / len(exact.layers))
            all_at_once += len(now) == len(exact.layers)
        optimizer.step()
    found = torch.tensor(found)
    shown = f"median {found.median():.2g}, 99 % {found.quantile(0.99):.2g}, most {found.max():.2g}"
    print(f"{name} {tolerance}: {shown}, computed {sum(computed) / len(computed):.2g}")
    assert found.median() <= tolerance
    assert found.quantile(0.99) <= 3 * tolerance
    assert 0 < sum(computed) / len(computed) < 0.5
    assert all_at_once == 0


# Resume


class SaveOnce(pl.Callback):
    """Saves a checkpoint after the epoch that ends with some batch, and notes what each later batch computed."""

    def __init__(self, ours, path=None, after=0):
        self.ours, self.path, self.after = ours, path, after
        self.computed = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.computed[trainer.global_step] = set(self.ours.regularizer.state.deltas.computed)

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_step == self.after and self.path is not None:
            trainer.save_checkpoint(self.path)


RESUMED = {
    "plain": {},
    "Share": {"coefficient": Share(0.3)},
    "Sampled": {"measure": Sampled(RieszEnergy(s=1.0), block=4)},
    "Covering": {"measure": Covering()},
}


def resumed_cases():
    for name, settings in RESUMED.items():
        for mode in APART if name == "Share" else ALL:
            yield pytest.param(settings, mode, id=f"{name}-{mode}")


@pytest.mark.parametrize(("settings", "mode"), list(resumed_cases()))
def test_a_run_that_saved_and_one_that_resumes_are_the_same_bits(settings, mode, tmp_path):
    """At the end of an epoch: the loader begins anew in both."""
    path = tmp_path / "saved.ckpt"
    ends, watches = [], []
    for resumes in (False, True):
        torch.manual_seed(1 if resumes else 0)
        ours = uniformity(**{"coefficient": 0.05, "tolerance": 0.4, "apply": mode, **settings})
        watch = SaveOnce(ours, None if resumes else path, 16)
        module = Automatic(lambda parameters: SGD(parameters, lr=0.01, momentum=0.9))
        fit = trainer(ours, watch, max_epochs=4)
        fit.fit(module, loader(batches(8)), ckpt_path=str(path) if resumes else None)
        ends.append((module, ours))
        watches.append(watch.computed)
    for p, q in zip(*(module.parameters() for module, _ in ends), strict=True):
        assert torch.equal(p, q)
    whole, rest = watches
    assert whole[17] == {"net.0", "net.2", "net.5", "net.7"}
    assert {step: names for step, names in whole.items() if step > 16} == rest
    assert sum(map(len, rest.values())) < 4 * len(rest) or "measure" in settings
    assert pickle.dumps(ends[0][1].state_dict()["reuse"]) == pickle.dumps(
        ends[1][1].state_dict()["reuse"]
    )


class KeptStates(pl.Callback):
    """Notes the state that each step keeps in case it is interrupted, and how many layers it computes."""

    def __init__(self, ours):
        self.ours = ours
        self.states: list[Any] = []
        self.copies: list[Any] = []
        self.computed: list[int] = []

    def on_before_optimizer_step(self, *_: Any):
        before = self.ours.state_dict()
        self.states.append(before)
        self.copies.append(copy.deepcopy(before))
        self.computed.append(len(self.ours.regularizer.state.deltas.computed))


@pytest.mark.parametrize("mode", ["gradient", "loss"])
def test_what_is_kept_in_case_of_an_interruption_is_made_of_what_has_changed(mode, monkeypatch):
    made = []
    inner = Reuse.state
    monkeypatch.setattr(Reuse, "state", lambda self: made.append(self) or inner(self))
    ours = uniformity(coefficient=0.05, tolerance=0.4, apply=mode)
    monkeypatch.setattr(ours.regularizer, "state_dict", dict)  # which makes all layers due
    watch = KeptStates(ours)
    module = Automatic(lambda parameters: SGD(parameters, lr=0.01, momentum=0.9))
    trainer(ours, watch, max_epochs=4).fit(module, loader(batches(8)))
    assert watch.states == watch.copies  # later steps have not changed them
    assert watch.states[5]["reuse"] != watch.states[31]["reuse"]
    assert len(made) <= sum(watch.computed) + 4
    assert sum(watch.computed) < 0.6 * 4 * 32


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize("name", ["plain", "Share", "Sampled", "Covering"])
def test_an_own_loop_that_saved_and_one_that_resumes_are_the_same_bits(name, mode):
    case = CASES[name]
    if mode not in case.modes:
        return
    run = Run(case, mode)
    data = batches(8, dtype=case.dtype)
    for step in range(17):
        run.step(data[step % 8])
    saved = copy.deepcopy(
        (run.net.state_dict(), run.optimizer.state_dict(), run.regularizer.state_dict())
    )
    other = Run(case, mode, seed=1)
    other.net.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    other.regularizer.load_state_dict(saved[2])
    everything = {layer.name for layer in run.regularizer.layers}
    for step in range(17, 40):
        run.step(data[step % 8])
        other.step(data[step % 8])
        assert run.computed == other.computed
        assert run.computed == everything or step > 17
        assert difference(run.net, other.net) == 0
    assert run.regularizer.state_dict()["reuse"] == other.regularizer.state_dict()["reuse"]


@pytest.mark.parametrize(
    "broken",
    [
        {"interval": 0, "gain": 3.0},
        {"interval": 5000, "gain": 3.0},
        {"interval": 2.0, "gain": 3.0},
        {"interval": True, "gain": 3.0},
        {"interval": 2},
        {"interval": 2, "gain": math.nan},
        {"interval": 2, "gain": 0.5},
        {"interval": 2, "gain": "3"},
        {"interval": 2, "gain": 3.0, "error": -1.0},
        {"interval": 2, "gain": 3.0, "error": math.inf},
        {"interval": 2, "gain": 3.0, "error": None},
        [2, 3.0],
        None,
        torch.ones(2),
    ],
    ids=str,
)
def test_a_broken_interval_is_dropped_and_told(broken):
    run = settled()
    state = run.regularizer.state_dict()
    state["reuse"]["3"] = broken
    with pytest.warns(
        UserWarning, match="reuse: layer '3' .* is no interval.; it is measured anew"
    ):
        run.regularizer.load_state_dict(state)
    assert set(run.regularizer.state_dict()["reuse"]) == {"1", "5", "7"}
    run.step(batches(1, dtype=torch.float64)[0])
    assert run.computed == {"1", "3", "5", "7"}


@pytest.mark.parametrize(
    "broken",
    [
        None,
        3,
        {},
        {"done": 1.0},
        {"done": 2.0, "whole": 1.0},
        {"done": -1.0, "whole": 1.0},
        {"done": 1.0, "whole": math.inf},
    ],
    ids=str,
)
def test_a_broken_count_of_work_is_dropped_and_told(broken):
    run = settled()
    state = run.regularizer.state_dict() | {"work": broken}
    with pytest.warns(UserWarning, match="work: it is .*; hsu/recomputed counts from here on"):
        run.regularizer.load_state_dict(state)
    assert math.isnan(run.regularizer.recomputed())


def test_the_work_goes_on_after_a_resume():
    run = settled()
    other = settled(steps=1)
    other.regularizer.load_state_dict(copy.deepcopy(run.regularizer.state_dict()))
    whole = run.regularizer.recomputed(reset=False)
    assert 0 < whole < 1
    assert other.regularizer.recomputed() == whole
    assert run.regularizer.recomputed() == whole
    assert math.isnan(run.regularizer.recomputed())


@pytest.mark.parametrize("part", [None, 3, [1, 2], "x"])
def test_broken_intervals_are_dropped_as_a_whole(part):
    run = settled()
    state = run.regularizer.state_dict() | {"reuse": part}
    with pytest.warns(UserWarning, match="reuse: .* is no mapping of layers; it is measured anew"):
        run.regularizer.load_state_dict(state)
    assert "reuse" not in run.regularizer.state_dict()


@pytest.mark.parametrize("name", ["state-v1.pt", "state-unversioned.pt"])
def test_states_from_before_are_read_without_a_warning(name):
    whole = torch.load(Path(__file__).parent / "data" / name, weights_only=True)
    for state in whole["callbacks"].values():
        regularizer = UniformityRegularizer(tolerance=0.05)
        regularizer.load_state_dict(state)
        assert regularizer.state_dict()["steps"] == list(state["steps"])
        assert "reuse" not in regularizer.state_dict()


def test_intervals_can_be_stored_without_pickle(tmp_path):
    run = settled()
    state = run.regularizer.state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state
    assert all(reuse["interval"] > 1 for reuse in state["reuse"].values())


# Ways to step


class Evaluated:
    """Notes, at each evaluation of a closure, how far what is added is off."""

    def __init__(self, run, batch):
        self.run, self.batch = run, batch
        self.off = []

    def step(self):
        first = True

        def closure():
            nonlocal first
            self.run.optimizer.zero_grad()
            loss = mean_square(self.run.net(self.batch[0]), self.batch[1])
            loss.backward()
            before = {id(p): p.grad.clone() for p in self.run.net.parameters()}
            fresh = fresh_penalty(self.run)
            self.run.regularizer.add_gradients(self.run.optimizer, same_step=not first)
            off = []
            for layer in self.run.regularizer.layers:
                p = layer.parameters[0]
                added = (p.grad - before[id(p)]) / 0.05
                off.append(float((added - fresh[layer.name]).norm() / fresh[layer.name].norm()))
            self.off.append(max(off))
            first = False
            return loss

        self.run.optimizer.step(closure)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        partial(LBFGS, lr=0.05, max_iter=4, tolerance_change=0, tolerance_grad=0),
        partial(models.SharpnessAware, lr=0.01),
    ],
    ids=["LBFGS", "SAM"],
)
def test_a_closure_that_is_evaluated_again_gets_fresh_gradients(make_optimizer):
    run = Run(Case(optimizer=make_optimizer), "gradient", 0.4)
    run.regularizer.step_limit = None
    loop = Evaluated(run, batches(1, dtype=torch.float64)[0])
    for _ in range(12):
        loop.step()
    assert len(loop.off) >= 24
    assert max(loop.off) < 1e-9


def test_accumulated_batches_share_one_computation():
    """In a loss: the batches after the first add what that one added."""
    run = Run(CASES["plain"], "loss")
    twin = Run(CASES["plain"], "loss")
    calls, counts = [], []
    measured = type(HALF_SPACE).value_and_grad
    data = batches(8, dtype=torch.float64)

    def counted(self, x, state=None):
        calls.append(x.shape)
        return measured(self, x, state)

    with mock.patch.object(RieszEnergy, "value_and_grad", counted):
        for step in range(12):
            calls.clear()
            run.optimizer.zero_grad()
            for i in range(3):
                loss = (
                    mean_square(run.net(data[(3 * step + i) % 8][0]), data[(3 * step + i) % 8][1])
                    / 3
                )
                run.regularizer.add_to_loss(loss, run.optimizer, factor=1 / 3)
                loss.backward()
            run.regularizer.count_step(run.optimizer)
            run.optimizer.step()
            assert len(calls) == len(run.computed)
            counts.append(len(calls))
    assert counts[0] == 4
    assert sum(counts) < 24
    for step in range(12):
        twin.optimizer.zero_grad()
        x, y = (
            torch.cat(part)
            for part in zip(*(data[(3 * step + i) % 8] for i in range(3)), strict=True)
        )
        loss = mean_square(twin.net(x), y)
        twin.regularizer.add_to_loss(loss, twin.optimizer)
        loss.backward()
        twin.regularizer.count_step(twin.optimizer)
        twin.optimizer.step()
    assert difference(run.net, twin.net) < 1e-12


def test_gradients_and_losses_may_take_turns():
    """A kept gradient without a value is none for a loss."""
    run = settled()
    run.mode = "loss"
    run.step(batches(1, dtype=torch.float64)[0])
    assert run.computed == {"1", "3", "5", "7"}
    run.step(batches(1, dtype=torch.float64)[0])
    run.mode = "gradient"
    run.step(batches(1, dtype=torch.float64)[0])
    assert run.computed < {"1", "3", "5", "7"}


def value_of(layer):
    return plain.energy(layer.measure, layer.neurons().detach()).mean()


def test_the_value_in_a_loss_is_that_of_the_kept_gradient():
    run = Run(CASES["plain"], "loss")
    x, y = batches(1, dtype=torch.float64)[0]
    known = 0.0
    for _ in range(20):
        run.optimizer.zero_grad()
        loss = mean_square(run.net(x), y)
        task = float(loss.detach())
        now = 0.05 * sum(float(value_of(layer)) for layer in network_layers(run.net))
        run.regularizer.add_to_loss(loss, run.optimizer)
        if len(run.computed) == 4:
            known = now
            assert float(loss.detach()) - task == pytest.approx(now, rel=1e-9)
        assert float(loss.detach()) - task == pytest.approx(known, rel=0.1)
        loss.backward()
        run.regularizer.count_step(run.optimizer)
        run.optimizer.step()


def test_skipped_steps_do_not_make_a_gradient_too_old():
    """Weights that do not move tell nothing of how fast a gradient ages."""
    run = Run(
        Case(optimizer=lambda parameters: SGD(parameters, lr=0.02, momentum=0.9)), "gradient", 0.05
    )
    run.regularizer.step_limit = None
    data = batches(8, dtype=torch.float64)
    for _ in range(40):  # overflown
        run.begin(data[0])
        run.regularizer.add_gradients(run.optimizer)
    off = []
    for step in range(40):
        fresh = fresh_penalty(run)
        run.begin(data[step % 8])
        before = {layer.name: layer.parameters[0].grad.clone() for layer in run.regularizer.layers}
        run.regularizer.add_gradients(run.optimizer)
        added = {
            layer.name: (layer.parameters[0].grad - before[layer.name]) / 0.05
            for layer in run.regularizer.layers
        }
        off += errors(added, fresh).values()
        run.optimizer.step()
    off = torch.tensor(off)
    assert off.median() <= 0.05
    assert off.quantile(0.99) <= 0.15


# Odd layers


@pytest.mark.filterwarnings("ignore:.*starts at zero")
def test_zero_tiny_and_frozen_layers():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(36, 2),
        nn.Linear(2, 9),
        nn.Linear(9, 1),
        nn.Linear(1, 5),
        nn.Linear(5, 4),
        nn.Linear(4, 3),
    )
    nn.init.zeros_(net[1].weight)
    net[4].requires_grad_(False)
    net[5].weight.data[1] = 0.0
    optimizer = SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    regularizer = UniformityRegularizer(coefficient=0.05, tolerance=0.2).attach(net)
    kept = 0
    for _ in range(20):
        optimizer.zero_grad()
        net(torch.randn(4, 36)).square().mean().backward()
        regularizer.add_gradients(optimizer)
        assert "4" not in regularizer.state.deltas.computed
        kept += len({"0", "1", "5"} - regularizer.state.deltas.computed)
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert kept > 10


@pytest.mark.filterwarnings("ignore:no layer with a coefficient trains")
@pytest.mark.parametrize("mode", ALL)
def test_a_model_of_frozen_layers(mode):
    net = models.network()
    net.requires_grad_(False)
    net[7].bias.requires_grad_(True)
    regularizer = UniformityRegularizer(tolerance=0.2).attach(net)
    optimizer = SGD([net[7].bias], lr=0.1)
    for x, y in batches(3):
        loss = mean_square(net(x), y)
        if mode == "loss":
            regularizer.add_to_loss(loss, optimizer)
        loss.backward()
        if mode == "gradient":
            assert regularizer.add_gradients(optimizer) == {}
        optimizer.step()
        if mode == "decoupled":
            assert regularizer.move(optimizer) == {}
    assert regularizer.state.deltas.computed == set()
    assert math.isnan(regularizer.recomputed())


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32,) * 2],
)
def test_what_is_kept_of_bfloat16_weights_takes_half(dtype, kept):
    net = nn.Sequential(nn.Linear(8, 16)).to(dtype)
    optimizer = SGD(net.parameters(), lr=0.01)
    regularizer = UniformityRegularizer(head=None, tolerance=0.4).attach(net)
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    regularizer.add_gradients(optimizer)
    assert [delta.grad.dtype for delta in regularizer.state.deltas._deltas.values()] == [kept]


def test_a_loop_of_ones_own_can_ask_for_errors_and_work():
    run = Run(CASES["plain"], "gradient", 0.4)
    assert math.isnan(run.regularizer.recomputed())
    for batch in batches(30, dtype=CASES["plain"].dtype):
        run.step(batch)
    errors = run.regularizer.stale_errors()
    assert set(errors) == {layer.name for layer in run.regularizer.layers}
    assert all(0 < error < 2 for error in errors.values())
    assert 0 < run.regularizer.recomputed() < 0.9
    assert math.isnan(run.regularizer.recomputed())


# Copies, other models, changed models


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copied", "pickled"]
)
@pytest.mark.parametrize("mode", ALL)
def test_a_copy_goes_on_as_after_a_resume(make, mode):
    case = CASES["one shape"]
    run, other = Run(case, mode), Run(case, mode)
    data = batches(8, dtype=case.dtype)
    for step in range(20):
        run.step(data[step % 8])
        other.step(data[step % 8])
    copied = make(run.regularizer)
    assert tensors_of(copied.state.deltas) == []
    run.regularizer = copied.attach(run.net)
    other.regularizer.state_dict()  # makes all of them due
    for step in range(20, 30):
        run.step(data[step % 8])
        other.step(data[step % 8])
        assert run.computed == other.computed
    assert difference(run.net, other.net) == 0


def test_a_callback_can_be_copied_and_pickled_in_the_middle():
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 9:
                self.copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]

    ours, copies = uniformity(coefficient=0.05, tolerance=0.4), Copies()
    trainer(ours, copies, max_epochs=2).fit(Automatic(), loader(batches(8)))
    for one in copies.copies:
        assert tensors_of(one.regularizer.state.deltas) == []
        assert set(one.state_dict()["reuse"]) == {"net.0", "net.2", "net.5", "net.7"}
        trainer(one, max_epochs=1).fit(Automatic(), loader(batches(8)))


def test_another_model_begins_anew():
    run = settled()
    other = wide().double()
    run.regularizer.detach()
    assert tensors_of(run.regularizer.state.deltas) == []
    assert "reuse" in run.regularizer.state_dict()  # the same model may come again
    run.regularizer.attach(other)
    assert "reuse" not in run.regularizer.state_dict()
    run.net, run.optimizer = other, SGD(other.parameters(), lr=1e-3)
    run.step(batches(1, dtype=torch.float64)[0])
    assert run.computed == {"1", "3", "5", "7"}


def test_layers_of_a_changed_model_go_on_and_new_ones_begin():
    run = settled()
    torch.manual_seed(2)
    run.net[3] = nn.Linear(64, 32).double()
    run.net[1], run.net[0] = nn.Sequential(run.net[1], nn.Tanh()), nn.Flatten()
    run.net.append(nn.Linear(3, 3).double())
    run.optimizer.add_param_group({"params": [*run.net[3].parameters(), *run.net[8].parameters()]})
    intervals = {name: one.interval for name, one in run.regularizer.state.deltas.reuse.items()}
    run.step(batches(1, dtype=torch.float64)[0])
    assert {"3", "8"} <= run.computed
    assert "1.0" not in run.computed
    assert "5" not in run.computed
    reuse = run.regularizer.state.deltas.reuse
    assert set(reuse) == {"1.0", "3", "5", "7", "8"}
    assert reuse["1.0"].interval == intervals["1"]
    assert reuse["3"].interval == 1


# What is logged


@pytest.mark.parametrize("mode", ALL)
def test_errors_and_work_are_logged(mode):
    rows = {}
    for tolerance in (None, 0.4):
        keep = Keep()
        ours = uniformity(coefficient=0.05, tolerance=tolerance, apply=mode)
        module = Automatic(lambda parameters: SGD(parameters, lr=0.01, momentum=0.9))
        trainer(ours, max_epochs=4, logger=keep, log_every_n_steps=4).fit(
            module, loader(batches(8))
        )
        rows[tolerance] = keep.rows
    names = ("net.0", "net.2", "net.5", "net.7")
    assert not any(
        "stale" in key or "recomputed" in key for row in rows[None].values() for key in row
    )
    shares = [row["hsu/recomputed"] for row in rows[0.4].values() if "hsu/recomputed" in row]
    assert len(shares) >= 8
    assert all(0 <= share <= 1 for share in shares)  # 0 where no layer was due
    assert min(shares) < 0.9
    last = rows[0.4][max(rows[0.4])]
    for name in names:
        errors_of = [
            row[f"hsu/stale_error/{name}"]
            for row in rows[0.4].values()
            if f"hsu/stale_error/{name}" in row
        ]
        assert len(errors_of) >= 7
        assert all(0 < error < 2 for error in errors_of)
        assert f"hsu/stale_error/{name}" in last


@pytest.mark.parametrize("mode", ALL)
def test_each_row_of_a_log_tells_of_the_steps_since_the_last(mode):
    """What is looked at between, as at the end of an epoch, takes nothing from them."""
    shares = {}
    for every in (1, 5):
        keep = Keep()
        ours = uniformity(coefficient=0.05, tolerance=0.4, apply=mode)
        module = Automatic(lambda parameters: SGD(parameters, lr=0.01, momentum=0.9))
        fit = trainer(ours, max_epochs=5, logger=keep, log_every_n_steps=every)
        fit.fit(module, loader(batches(4)))
        rows = [row["hsu/recomputed"] for row in keep.rows.values() if "hsu/recomputed" in row]
        assert len(rows) == 20 // every
        shares[every] = rows
    together = [sum(shares[1][i : i + 5]) / 5 for i in range(0, 20, 5)]
    assert shares[5] == pytest.approx(together, abs=1e-6)


@pytest.mark.parametrize("tolerance", [0, 1, -1, 2.0, math.nan, math.inf, "a", True, False, [0.1]])
@pytest.mark.parametrize("make", [UniformityRegularizer, uniformity])
def test_a_bad_tolerance_is_refused(make, tolerance):
    with pytest.raises(
        ValueError,
        match=r"tolerance must be a relative error above 0 and below 1 \(0\.05 for 5 %\), or None",
    ):
        make(tolerance=tolerance)


def test_the_pull_along_the_sum_of_all_neurons_is_followed():
    """A row of zeros takes no part in it, and spoils no other row."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48, bias=False))
    optimizer = SGD(net.parameters(), lr=0.1)
    weight = net[0].weight
    others = torch.arange(48) != 5
    weight.data[5] = 0.0

    def gradient(tolerance):
        weight.grad = torch.zeros_like(weight)
        regularizers[tolerance].add_gradients(optimizer)
        return weight.grad

    regularizers = {}
    for tolerance in (None, 0.9):
        regularizer = UniformityRegularizer(RieszEnergy(s=2.0), head=None, tolerance=tolerance)
        regularizers[tolerance] = regularizer.attach(net)
        regularizer.checks_order = False  # no step is made
    before = gradient(0.9)
    deltas = regularizers[0.9].state.deltas
    deltas.of(Use(regularizers[0.9].layers[0], weight, weight)).interval = 9
    weight.data[others] += 0.1 * weight.norm(dim=1).mean() / 8.0
    kept, exact = gradient(0.9), gradient(None)
    assert deltas.computed == set()
    assert kept.isfinite().all()
    assert (kept - exact).norm() < 0.3 * (before - exact).norm()  # 0.11 of it


def test_a_step_limit_on_the_device_is_not_asked():
    """It is kept row by row, for the host would wait for the answer."""
    w = torch.randn(1, 4, 6)
    squares = w.square().sum(-1, keepdim=True)
    delta = Delta(HALF_SPACE, w, w.flatten(), squares, steepest=1e-6, longest=1e-6)
    update = GradientUpdate(w, torch.zeros_like(w), 1.0)
    assert _is_far(delta, replace(update, limit=1.0)) is True
    assert _is_far(delta, replace(update, limit=1e-6)) is False
    assert _is_far(delta, replace(update, limit=torch.tensor(1.0))) is False
