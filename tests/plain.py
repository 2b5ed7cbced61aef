"""The training loop that the callback is compared with: plain torch, which knows nothing of the engine.

The penalty is differentiated by autograd through the float64 oracle, and enters in one of three ways.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_avg_fn

from lightning_hsu import Share
from lightning_hsu._core import PairTerm, oracle_energy
from lightning_hsu._engine.deltas import Deltas
from lightning_hsu.measures import GaussianPotential, Measure, PairwiseMeasure, RieszEnergy
from lightning_hsu.measures.defaults import DEFAULT_MEASURE
from tests.models import mean_square

HALF_SPACE = RieszEnergy(s=2.0, half_space=True)


@dataclass(frozen=True)
class Layer:
    """One set of neurons with the name that the callback gives it: ``rows`` takes the weight to (groups, n, d)."""

    name: str
    module: nn.Module
    measure: Measure = DEFAULT_MEASURE
    rows: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight.flatten(1)[None]
    key: str = "weight"

    def parameters(self):
        named = self.module.named_parameters(recurse=self.key == "weight")
        return [p for name, p in named if self.key in name]

    def neurons(self):
        """Its neurons (groups, n, d)."""
        if hasattr(self.module, "weight_orig"):  # pruned
            weight = self.module.weight_orig * self.module.weight_mask
        else:
            weight = getattr(self.module, self.key)
        return self.rows(weight)

    def gradient(self, neurons, kept=None):
        """The gradient (groups, n, d) of the mean over the groups of the penalty, or a kept one."""
        if kept is not None:
            return kept.gradient(self.name, self.measure, neurons.detach()).to(neurons.dtype)
        x = neurons.detach().requires_grad_()
        return torch.autograd.grad(energy(self.measure, x).mean(), x)[0]

    def moving(self, owned):
        """The parameters that are about to move."""
        moving = []
        for p in self.parameters():
            if id(p) in owned and p.requires_grad and p.grad is not None:
                moving.append(p)
        return moving

    def own(self, p, x):
        """Those of the entries of x, which is like p, that belong to the neurons."""
        if p is not self.module._parameters.get(self.key):
            return x
        return x.flatten()[self.rows(torch.arange(p.numel()).view(p.shape))]

    def move(self, p, way):
        """``p - way``; where the neurons are entries of p, they keep their norms."""
        old = p.double().flatten()
        moved = (p.double() - way.double()).flatten()
        if p is self.module._parameters.get(self.key):
            entries = self.rows(torch.arange(p.numel()).view(p.shape))
            before = old[entries].norm(dim=-1, keepdim=True)
            after = moved[entries].norm(dim=-1, keepdim=True)
            moved[entries] *= before / after
        p.copy_(moved.view(p.shape))


def energy(measure, neurons):
    """The penalty (groups,) of neurons (groups, n, d).

    Pairwise ones are in float64 with every difference written out. The others, which are held
    against closed forms elsewhere, are in the precision of the neurons: two neighbours that are
    equally near in float32 share a gradient, in float64 the nearer one takes it all.
    """
    if not isinstance(measure, PairwiseMeasure):
        return measure.penalty(neurons)
    value = oracle_energy(neurons, PairTerm(measure.kernel, measure.half_space, measure.softening))
    return value.log() if isinstance(measure, GaussianPotential) else value


def slope_at_right_angles(measure):
    """The kernel's derivative in the squared chord, at 2; 0 where the pull along the sum is not followed."""
    if (
        not isinstance(measure, PairwiseMeasure)
        or measure.half_space
        or measure.pair_term() is None
    ):
        return 0.0
    if measure.logarithm:
        return 0.0
    q = torch.tensor([2.0], dtype=torch.float64)
    return measure.kernel(q, 4.0 - q)[1].item()


@dataclass(frozen=True)
class Past:
    """A kept gradient.

    Args:
        grad: The gradient (groups, n, d), summed over the groups.
        first: The neurons (groups, n, d) of which it was computed.
        seen: Those up to which its pull was followed.
        age: Uses since it was computed.
    """

    grad: torch.Tensor
    first: torch.Tensor
    seen: torch.Tensor
    age: int = 0

    def refreshed(self, x, slope, is_projected):
        """The same as it is used at neurons x.

        In full space the pull along the sum of all neurons is followed, each over the norm that it
        had at first; in its turn the gradient is made tangent again.

        Args:
            x: The neurons now.
            slope: From :func:`slope_at_right_angles`.
            is_projected: Whether it is its turn.
        """
        grad, seen, age = self.grad, self.seen, self.age
        norm = self.first.norm(dim=-1, keepdim=True)
        inverse = torch.where(norm > 1e-15, 1 / norm, 0.0)  # of zero rows
        every = 1 if age < 4 else 2 if age < 16 else 4
        if slope and age % every == 0:
            n = x.shape[1]
            change = ((x - seen) * inverse).sum(1, keepdim=True)
            grad = grad - 4.0 * slope / (n * (n - 1)) * change * inverse
            seen = x.detach().clone()
        if is_projected:
            along = (grad * x).sum(-1, keepdim=True) * inverse.square()
            grad = grad - along * x
        return replace(self, grad=grad, seen=seen)


class Used(NamedTuple):
    """One use of a kept gradient: whether it was computed, another evaluation within a step, and projected."""

    is_computed: bool
    is_again: bool
    is_projected: bool


class Kept:
    """Gradients that are kept for several steps, and computed when a schedule says so.

    Args:
        schedule: Of each layer the uses of its gradient, one after the other.
    """

    def __init__(self, schedule):
        self.schedule = {layer: iter(uses) for layer, uses in schedule.items()}
        self.past: dict[Any, Past] = {}

    def gradient(self, name, measure, x, key=None):
        """That of the mean over groups at neurons x (groups, n, d), or of those before.

        Args:
            key: What tells the layer from others; None for its name.
        """
        key = name if key is None else key
        is_computed, is_again, is_projected = next(self.schedule[name])
        if is_computed:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                grad = torch.autograd.grad(energy(measure, x).sum(), x)[0]
            x = x.detach().clone()
            self.past[key] = Past(grad, x, x)
        elif not is_again:
            slope = slope_at_right_angles(measure)
            self.past[key] = self.past[key].refreshed(x, slope, is_projected)
        grad = self.past[key].grad
        if not is_again:
            self.past[key] = replace(self.past[key], age=self.past[key].age + 1)
        return grad / len(x)

    def is_used_up(self):
        """Whether the schedule is at its end."""
        return all(next(uses, None) is None for uses in self.schedule.values())


@contextmanager
def recorded_schedule():
    """The uses of kept gradients by layer, as ``Kept`` takes them."""
    schedule: dict[str, list[Used]] = {}
    find_due = Deltas.find_due

    def noted(deltas, uses, *, same_step=False):
        find_due(deltas, uses, same_step=same_step)
        for use in uses:
            one = Used(use.is_due, same_step, use.is_projected)
            schedule.setdefault(use.layer.name, []).append(one)

    with mock.patch.object(Deltas, "find_due", noted):
        yield schedule


def in_groups(weight):
    return weight.reshape(2, -1, weight[0].numel())


def transposed_in_groups(weight):
    return weight.reshape(2, -1, *weight.shape[1:]).transpose(1, 2).flatten(2)


def layers(net, prefix="net.", measure=DEFAULT_MEASURE, head=True):
    """Those of ``tests.models.network``; the last is the head, in full space."""
    found = [Layer(f"{prefix}{i}", net[i], measure) for i in (0, 2, 5, 7)]
    found[1] = replace(found[1], rows=in_groups)
    if head:
        found[3] = replace(found[3], measure=measure.for_head())
    return found


def adversarial_layers(module):
    """Each network's last layer is a head: its output goes into a loss."""
    return [
        *layers(module.first, "first."),
        Layer("second", module.second, DEFAULT_MEASURE.for_head()),
    ]


def image_layers(module):
    """Those of ``tests.models.image_network``."""
    net = module.net
    found = [
        Layer("net.0", net[0]),
        Layer("net.2", net[2], rows=in_groups),
        Layer("net.4", net[4], rows=transposed_in_groups),
    ]
    return [*found, Layer("net.7", net[7], DEFAULT_MEASURE.for_head())]


def sequence_layers(module):
    """Those of ``tests.models.SequenceNetwork``: gates, queries, keys and values apart."""
    lstm, attention = module.net.lstm, module.net.attention
    found = []
    for key in ("weight_ih_l0", "weight_hh_l0"):
        for i, gate in enumerate("ifgo"):
            rows = partial(chunk, i=i, of=4)
            found.append(Layer(f"net.lstm.{key}.{gate}", lstm, rows=rows, key=key))
    for i, part in enumerate("qkv"):
        rows = partial(chunk, i=i, of=3)
        name = f"net.attention.{part}"
        found.append(Layer(name, attention, rows=rows, key="in_proj_weight"))
    found.append(Layer("net.attention.out_proj", attention.out_proj))
    found.append(Layer("net.head", module.net.head, DEFAULT_MEASURE.for_head()))
    return found


def chunk(weight, i, of):
    return weight.chunk(of)[i][None]


class Penalty:
    """Coefficient times energy of several layers: ``term``, ``before_step`` and ``after_step``.

    Each does nothing unless ``mode`` is its own. ``coefficient`` takes the optimizer steps done and
    a layer's name; ``kept`` are gradients that are used for several steps. The limits are those of
    the callback.
    """

    def __init__(
        self,
        layers,
        mode,
        coefficient,
        every=1,
        accumulate=1,
        kept=None,
        step_limit=1.0,
        share_limit=None,
    ):
        self.layers = layers
        self.mode = mode
        self.coefficient = coefficient
        self.every = every
        self.accumulate = accumulate
        self.kept = kept
        self.step_limit = step_limit
        self.share_limit = share_limit
        self.steps: dict[int, int] = {}  # by optimizer
        # By layer, of the norms of the gradients: the task's and the penalty's.
        self.means: dict[str, list[float]] = {}
        self.again = False  # another evaluation within the same step
        self.held = 0  # layers that the share limit has shortened, over all steps
        self.free = 0  # those that it has not
        self.limited: dict[str, int] = {}  # neurons that either limit shortened at the last step

    def term(self, optimizer):
        """What is added to the loss of one micro-batch; only its gradient is right."""
        step = self.steps.get(id(optimizer), 0)
        if self.mode != "loss" or step % self.every:
            return 0.0
        reactions = reactions_of(optimizer)
        total = 0.0
        for layer in self.layers:
            strength = self.coefficient(step, layer.name)
            if strength != 0 and any(p.requires_grad for p in layer.parameters()):
                neurons = layer.neurons()
                gradient = layer.gradient(neurons, self.kept) * strength
                known = [reactions[id(p)] for p in layer.parameters() if id(p) in reactions]
                gradient = gradient * self._shortening(gradient, neurons.detach(), known)
                total = total + (neurons * gradient).sum()
        return total / self.accumulate

    def before_step(self, optimizer, scale=1.0):
        """Add to the gradients, which may still carry a GradScaler's factor."""
        if self.mode == "gradient":
            for _, found in self._due(optimizer, scale):
                for p, gradient in found:
                    p.grad += (scale * gradient).to(p.dtype)
            self.again = True

    @torch.no_grad()
    def after_step(self, optimizer, skipped=False):
        """Move the neurons and count the step, but not one that the GradScaler skipped if they move."""
        self.again = False
        if self.mode == "decoupled":
            if skipped:
                return
            reactions = reactions_of(optimizer)
            for layer, found in self._due(optimizer):
                for p, gradient in found:
                    layer.move(p, reactions[id(p)].rate * gradient)
        self.steps[id(optimizer)] = self.steps.get(id(optimizer), 0) + 1

    @torch.enable_grad()
    def _due(self, optimizer, scale=1.0):
        """Pairs of a layer and its weighted gradients in what the optimizer will move."""
        step = self.steps.get(id(optimizer), 0)
        if step % self.every:
            return []
        reactions = reactions_of(optimizer)
        due = []
        for layer in self.layers:
            given = self.coefficient(step, layer.name)
            moving = layer.moving(reactions)
            if given == 0 or not moving:
                continue
            neurons = layer.neurons()
            gradient = layer.gradient(neurons, self.kept)
            tasks = [layer.own(p, p.grad) for p in moving]
            task = norm(tasks) / abs(scale)
            entries = sum(part.numel() for part in tasks)
            strength = given
            if isinstance(given, Share):
                unweighted = torch.autograd.grad(neurons, moving, gradient, retain_graph=True)
                strength = self._strength(layer, given, task, norm(unweighted))
            gradient = gradient * strength
            known = [reactions[id(p)] for p in moving]
            rms = task / math.sqrt(entries)
            if not 0 < task < math.inf:
                rms = 1.0 if self.share_limit is None else 0.0
            factor = self._shortening(gradient, neurons.detach(), known, rms)
            found = torch.autograd.grad(neurons, moving, gradient * factor)
            held = 1.0
            limit = self._limit_of(given)
            if limit is not None:
                if self.mode == "decoupled":
                    steps = [step_length(optimizer, p, partial(layer.own, p)) for p in moving]
                    task = math.hypot(*steps) if 0 < task < math.inf else 0.0
                held = self._held(norm(found), task, limit)
            shortened = factor < 1
            if held < 1 - 1e-12:  # a share may be met to a rounding
                shortened = neurons.norm(dim=-1, keepdim=True) > 0
            self.limited[layer.name] = int(shortened.sum())
            due.append((layer, [(p, held * part) for p, part in zip(moving, found, strict=True)]))
        return due

    def _strength(self, layer, share, task, penalty):
        """The coefficient of a share, after its means have taken in this step."""
        means = self.means.setdefault(layer.name, [0.0, 0.0])
        if math.isfinite(task) and math.isfinite(penalty) and not self.again:
            means[0] = share.smoothing * means[0] + (1 - share.smoothing) * task
            means[1] = share.smoothing * means[1] + (1 - share.smoothing) * penalty
        if not means[1]:
            return 0.0
        return min(share.fraction * means[0] / means[1], share.maximum)

    def _shortening(self, gradient, neurons, known, rms=None):
        """Factors (groups, n, 1) that keep a step's part of the penalty within the step limit.

        Args:
            gradient: The weighted gradient (groups, n, d).
            neurons: The neurons.
            known: Reactions of the optimizer to the gradients of the parameters behind them.
            rms: Root mean square of the task's gradient; None in a loss.
        """
        way = max((one.rate for one in known), default=0.0)
        if self.mode != "decoupled":  # there nothing goes through the optimizer
            way *= max((one.gain for one in known), default=1.0)
        if self.step_limit is None or way == 0:
            return torch.ones_like(gradient[..., :1])
        room = neurons.norm(dim=-1, keepdim=True).double() * self.step_limit / way
        if self.mode == "gradient" and any(one.rescales for one in known):
            room = room * rms
        length = gradient.norm(dim=-1, keepdim=True).double()
        return torch.where(length > room, room / length, 1.0).to(gradient.dtype)

    def _limit_of(self, given):
        """What a layer's penalty is held to, as a share of the task; None for no limit."""
        if not isinstance(given, Share):
            return self.share_limit
        return given.fraction if self.mode == "decoupled" else None

    def _held(self, penalty, task, limit):
        """By what a whole layer is shortened, for the task's gradient or what is made of it."""
        if not math.isfinite(task):
            task = 0.0
        factor = 1.0
        if penalty > limit * task:
            factor = limit * task / penalty
        self.held += factor < 1
        self.free += factor == 1
        return factor


class Reaction(NamedTuple):
    """What an optimizer does with the gradient of a parameter.

    Args:
        rate: The learning rate.
        gain: By what momentum multiplies a steady gradient.
        rescales: Whether it divides gradients by their size.
    """

    rate: float
    gain: float
    rescales: bool


# The classes of torch that divide gradients by their size, or take their sign.
RESCALING = {
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
}


def is_rescaling(optimizer):
    """Whether it is one of those, or of a class made from one; early releases of torch have not all."""
    classes = type(optimizer).__mro__
    return any(one.__name__ in RESCALING for one in classes if one.__module__.startswith("torch."))


def reactions_of(optimizer):
    """By the id of a parameter."""
    found = {}
    rescales = is_rescaling(optimizer)
    for group in optimizer.param_groups:
        lr = group.get("lr")
        rate = abs(float(lr)) if isinstance(lr, float | int | torch.Tensor) else 0.0
        gain = 1.0
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
            gain = (1 - group["dampening"]) / (1 - group["momentum"])
        for p in group["params"]:
            found[id(p)] = Reaction(rate, gain, rescales)
    return found


def step_length(optimizer, p, own):
    """The norm of an optimizer's last step over the learning rate, of those entries of p that ``own`` takes.

    Of Adam's it is what the root mean squares of its two means say.
    """
    group = next(group for group in optimizer.param_groups if any(q is p for q in group["params"]))
    state = optimizer.state.get(p, {})
    task = own(p.grad)
    if isinstance(optimizer, torch.optim.SGD) and group["momentum"] and state:
        return norm([own(state["momentum_buffer"])])
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and state:
        beta, other = group["betas"]
        steps = float(state["step"])
        mean = norm([own(state["exp_avg"])]) / (1 - beta**steps)
        squares = float(own(state["exp_avg_sq"]).double().mean()) / (1 - other**steps)
        return min(mean / (math.sqrt(squares) + group["eps"]), math.sqrt(task.numel()))
    if isinstance(optimizer, torch.optim.RMSprop) and state and not group["momentum"]:
        squares = float(own(state["square_avg"]).double().mean())
        return norm([task]) / (math.sqrt(squares) + group["eps"])
    return math.sqrt(task.numel()) if is_rescaling(optimizer) else norm([task])


def norm(parts):
    return float(torch.stack([part.double().norm() for part in parts]).norm())


def nothing(*_: Any):
    """What happens at a place where nothing is asked for."""


def train(
    module,
    data,
    penalty,
    epochs=2,
    accumulate=1,
    parts=1,
    silent=(),
    autocast=None,
    scaler=None,
    clip=nothing,
    clip_first=nothing,
    unscales=False,
    at_epoch_start=nothing,
    after_step=nothing,
    at_epoch_end=nothing,
):
    """Train ``module.net`` with the optimizer of its ``configure_optimizers``.

    Args:
        accumulate: Micro-batches a step.
        parts: Backward passes a micro-batch, of that part of its loss each.
        silent: Batches that are left out.
        autocast: Dtype of the forward pass.
        scaler: A GradScaler.
        clip: Takes the parameters, after the penalty was added; ``clip_first`` before.
        unscales: Whether gradients are unscaled also for an optimizer that does so itself.
        at_epoch_start: Takes module, optimizer and epoch; ``at_epoch_end``, and ``after_step`` alike.
    """
    net = module.net
    optimizer = module.configure_optimizers()
    fused = getattr(optimizer, "_step_supports_amp_scaling", False) and scaler and not unscales
    for epoch in range(epochs):
        at_epoch_start(module, optimizer, epoch)
        for start in range(0, len(data), accumulate):
            optimizer.zero_grad()
            places = range(start, min(start + accumulate, len(data)))
            window = [data[i] for i in places if i not in silent]
            for x, y in window:
                for _ in range(parts):
                    with torch.autocast("cpu", autocast) if autocast else nullcontext():
                        loss = mean_square(net(x), y) / accumulate / parts
                    loss = loss + penalty.term(optimizer)
                    (scaler.scale(loss) if scaler else loss).backward()
            scale = scaler.get_scale() if fused else 1.0
            if scaler and window and not fused:
                scaler.unscale_(optimizer)
            clip_first(net.parameters())
            penalty.before_step(optimizer, scale)
            clip(net.parameters())
            # Without a loss Lightning steps all the same, but not with a GradScaler.
            skipped = step(optimizer, scaler) if window else scaler is not None
            penalty.after_step(optimizer, skipped)
            after_step(module, optimizer, epoch)
        at_epoch_end(module, optimizer, epoch)


def step(optimizer, scaler):
    """Step, unless gradients overflowed; tells whether they did."""
    if scaler is None:
        optimizer.step()
        return False
    scaler.step(optimizer)
    before = scaler.get_scale()
    scaler.update()
    return scaler.get_scale() < before


def train_with_closure(module, data, penalty, epochs=2):
    """For optimizers that ask for the gradient several times a step, and compare the task's loss."""
    optimizer = module.configure_optimizers()

    def closure(x, y):
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = mean_square(module.net(x), y)
            (loss + penalty.term(optimizer)).backward()
            penalty.before_step(optimizer)
        return loss.detach()

    for x, y in data * epochs:
        optimizer.step(lambda: closure(x, y))  # noqa: B023
        penalty.after_step(optimizer)


def train_adversarial(module, data, penalty, epochs=2):
    """Two optimizers in turn; gradients that the other's loss leaves are of no use."""
    optimizers = module.configure_optimizers()
    for batch in data * epochs:
        for i, optimizer in enumerate(optimizers):
            module.zero_grad()
            module.losses(batch)[i].backward()
            penalty.before_step(optimizer)
            optimizer.step()
            penalty.after_step(optimizer)


def train_unfreezing(module, data, penalty, part, rate):
    """In the second epoch ``net[:part]`` joins with a rate of its own."""
    late = module.net[:part].requires_grad_(False)

    def at_epoch_start(module, optimizer, epoch):
        if epoch == 1:
            late.requires_grad_(True)
            optimizer.add_param_group({"params": list(late.parameters()), "lr": rate})

    train(module, data, penalty, at_epoch_start=at_epoch_start)


def train_pruning(module, data, penalty):
    """Two layers are pruned after each epoch."""

    def at_epoch_end(module, optimizer, epoch):
        for i in (0, 5):
            prune.l1_unstructured(module.net[i], "weight", 0.3)

    train(module, data, penalty, at_epoch_end=at_epoch_end)


def train_scheduled(module, data, penalty):
    """With the learning rate schedule of the module, after each step."""
    (optimizer,), (schedule,) = module.configure_optimizers()
    module.configure_optimizers = lambda: optimizer
    train(module, data, penalty, after_step=lambda *_: schedule["scheduler"].step())


def train_averaging(module, data, penalty):
    """Lightning's stochastic average is taken at the start of each epoch; its rate anneals after each."""
    average, schedules = AveragedModel(module.net), []

    def at_epoch_start(module, optimizer, epoch):
        average.update_parameters(module.net)
        if epoch == 0:
            schedules.append(SWALR(optimizer, 0.05, anneal_epochs=1, anneal_strategy="linear"))

    train(
        module,
        data,
        penalty,
        at_epoch_start=at_epoch_start,
        at_epoch_end=lambda *_: schedules[0].step(),
    )
    module.run, module.net = module.net, average.module


def train_averaging_exponentially(module, data, penalty):
    average = AveragedModel(module.net, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    train(module, data, penalty, after_step=lambda *_: average.update_parameters(module.net))
    module.run, module.net = module.net, average.module


def train_on_two_batches(module, data, penalty):
    train(module, data[:2], penalty)
