"""Events drawn at random, while settings drawn at random train: the callback still does what a plain loop does.

``EVENTS_SEED=7 EVENTS_COUNT=3000 python -m pytest tests/test_events.py`` draws others, and more; a draw that fails prints its
events in words and the line that repeats it. The events themselves are in ``tests/events.py``.

What the plain loop takes for right. It looks at the model anew whenever the penalty is due: at the callback's place in
``on_before_optimizer_step`` ("gradient"), in ``on_before_backward`` ("loss"), after the optimizer's step ("decoupled"). The
layers that the model has at that moment count, each weight once, under its first name. Parameters get the penalty that are in
the stepping optimizer, have a gradient and require one; in a loss, those that require one. What goes on, goes on by name: the
head found at each loss, the means of a share, coefficients by layer. Steps are counted by the optimizer's position.

Three checks a draw: parameters after each batch are those of the plain loop; a layer that the penalty does not reach is
named in a warning, and no other; with a coefficient of 0 the weights are bit for bit those without the callback.

Left out, since there is no one right answer:
- events between a fit's first forward pass and its loss, which shows what the head is: the graph is of layers that are gone;
- another head between the loss and the step;
- values that change between the forward and the backward pass, which torch has kept for it;
- another optimizer between ``zero_grad`` and the step: Lightning has already chosen the one that steps;
- a last layer that is frozen: the graph does not show it, and what comes before it is taken for the head;
- a head whose name vanishes (replaced by a Sequential), and patterns of a mapping that match nothing any more;
- two optimizers that change places: their counts go by position, which a user may have meant or not;
- a layer that has left the optimizer with a weight that was reached before: a warning may name it, and need not;
- events after the last step of a fit: nothing trains any more;
- weights that are tied and pruned or computed at once; computed weights that are copied, which torch refuses;
- ``double()`` with optimizers other than SGD, which refuse a state of another dtype;
- the same Trainer after an exception: Lightning skips or repeats batches, see tests/test_resume.py.
"""

import copy
import logging
import math
import os
import random
import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import SGD

from lightning_hsu import Share
from tests import plain
from tests.events import EVENTS, NETS, SIDES, Dice, Scene
from tests.models import batches, loader, mean_square, trainer, uniformity, used_before
from tests.test_chaos import MEASURES, OPTIMIZERS

BASE = int(os.environ.get("EVENTS_SEED", "0"))
COUNT = int(os.environ.get("EVENTS_COUNT", "40"))
# Measured in 2,300 draws: 3.7e-6 (RMSprop where the penalty moves a weight by 1), 2.5e-15, and in half precision 4.7e-5.
TOLERANCE = {"fp32": 1e-5, "64-true": 1e-12, "bf16-mixed": 2e-4, "scaler": 2e-4}
SCALER = {"init_scale": 256.0}
TIGHT = 0.02  # a step limit that shortens some steps; the other is idle


# The draw


@dataclass(frozen=True)
class Planned:
    """An event of a draw: the micro-batch before which ``batch`` others were done, the place within it, and its dice."""

    event: str
    batch: int
    place: str
    seed: int


@dataclass(frozen=True)
class Part:
    """One fit of a run.

    Args:
        begins: "new" with a new Trainer, "again" with the same one, "resumed" with a new Trainer and callback.
        epochs: Its epochs.
        breaks: The batch and the place at which user code raises an error; None if it does not.
    """

    begins: str
    epochs: int
    breaks: tuple[int, str] | None = None


@dataclass(frozen=True)
class Draw:
    """One combination of settings, and what happens meanwhile."""

    number: int
    mode: str
    manual: bool
    net: str
    precision: str
    optimizer: str
    measure: object
    strength: str
    head: str | None
    every: int
    accumulate: int
    count: int  # batches an epoch
    step_limit: float | None
    log_every: int
    used_before: bool
    parts: tuple[Part, ...]
    events: tuple[Planned, ...]
    seed: int
    keeps: float | None  # the tolerance of gradients from earlier steps

    def __str__(self):
        manual = "-manual" if self.manual else ""
        settings = (
            f"draw{self.number:03d}-{self.mode}{manual}-{self.net}-{self.precision}-{self.optimizer}"
            f"-{type(self.measure).__name__}-{self.strength}-head={self.head}-every={self.every}"
            f"-accumulate={self.accumulate}x{self.count}-limit={self.step_limit}-log={self.log_every}"
            f"-tolerance={self.keeps}"
        )
        return f"{settings}{'-used before' * self.used_before}\n{[*map(str, self.parts)]}"

    @property
    def dtype(self):
        return torch.float64 if self.precision == "64-true" else torch.float32

    @property
    def tolerance(self):
        narrows = any(one.event == "other dtype" for one in self.events)
        return TOLERANCE["fp32" if narrows and self.precision == "64-true" else self.precision]


def two_optimizers(parameters):
    parameters = list(parameters)
    middle = len(parameters) // 4 * 2
    return [SGD(parameters[:middle], lr=0.1), OPTIMIZERS["Adam"](parameters[middle:])]


def in_groups(parameters):
    parameters = list(parameters)
    groups = [{"params": parameters[:2], "lr": 0.05}, {"params": parameters[2:]}]
    return SGD(groups, lr=0.1, momentum=0.9)


MAKERS: dict[str, Callable] = {
    "SGD": OPTIMIZERS["SGD"],
    "plain SGD": partial(SGD, lr=0.1),
    "groups": in_groups,
    "Adam": OPTIMIZERS["Adam"],
    "AdamW": OPTIMIZERS["AdamW"],
    "RMSprop": OPTIMIZERS["RMSprop"],
    "two": two_optimizers,
}


def draw(number, attempt=0):
    """What is refused, or has no meaning of its own, is drawn around."""
    dice = random.Random(f"{BASE} {number} {attempt}")
    mode = dice.choice(["gradient", "loss", "decoupled"])
    manual = mode != "loss" and dice.random() < 0.3
    precision = dice.choice(["fp32"] * 5 + ["64-true"] * 3 + ["bf16-mixed", "scaler"])
    optimizers = [name for name in MAKERS if name != "two" or (manual and precision != "scaler")]
    accumulate = dice.choice([1, 1, 1, 2])
    count = 2 * accumulate if accumulate > 1 else dice.choice([2, 3, 4])
    parts = parts_of(dice, count)
    settings = {
        "number": number,
        "mode": mode,
        "manual": manual,
        "net": dice.choice(list(NETS)),
        "precision": precision,
        "optimizer": dice.choice(optimizers),
        "measure": dice.choice(list(MEASURES)),
        "strength": dice.choice(["number", "rising", "by layer"] + ["share"] * (mode != "loss")),
        "head": dice.choice(["auto", "auto", "named", None]),
        "every": dice.choice([1, 1, 1, 2]),
        "accumulate": accumulate,
        "count": count if manual else count + dice.choice([0, 0, accumulate - 1]),
        "step_limit": dice.choice([1.0, None, TIGHT]),
        "log_every": dice.choice([1, 2, 50]),
        "used_before": dice.random() < 0.1,
        "parts": parts,
        "seed": dice.randrange(2**31),
        "keeps": keeps(f"{BASE} {number} {attempt} keeps", precision),
    }
    without = Draw(**settings, events=())
    places = places_of(without)
    names = [
        name for name, event in EVENTS.items() for _ in range(event.often) if event.fits(without)
    ]
    events: list[Planned] = []
    for _ in range(dice.choice([1, 1, 2, 3])):
        events += planned(dice, dice.choice(names), places)
    return Draw(**settings, events=tuple(events))


def keeps(seed, precision):
    """A tolerance, where no weight on a rounding edge of half precision lets a last bit grow."""
    if precision not in ("fp32", "64-true"):
        return None
    return random.Random(seed).choice([None, None, 0.9])


def parts_of(dice, count):
    """One fit, or two."""
    kind = dice.choice(["one"] * 5 + ["again", "new", "resumed", "broken off"])
    first = Part("new", dice.choice([1, 2]))
    if kind == "one":
        return (Part("new", 2),)
    if kind == "broken off":
        place = dice.choice(
            ["training_step", "after on_before_backward"]
            + [f"{side} on_before_optimizer_step" for side in ("before", "after")]
        )
        return Part("new", 1, (count - 1, place)), Part("new", 1)
    return first, Part(kind, 1)


def planned(dice, name, places):
    """An event at one of these places, and perhaps one that follows."""
    event = EVENTS[name]
    possible = [i for i, (_, place) in enumerate(places) if place in event.places]
    if not possible:
        return []
    i = dice.choice(possible)
    batch, place = places[i]
    found = [Planned(name, batch, place, dice.randrange(2**31))]
    if event.later and dice.random() < 0.6:
        found += planned(dice, dice.choice(event.later), places[i + 1 :])
    return found


def three(hook):
    return [f"{side} {hook}" for side in SIDES]


def places_of(one):
    """The batches and places of a run, but for those after its last step: nothing trains there."""
    found = []
    batch = 0
    for part in one.parts:
        for _ in range(part.epochs):
            found += [(batch, place) for place in three("on_train_epoch_start")]
            for i in range(one.count):
                places = places_of_batch(one, i)
                if part.breaks is not None and batch == part.breaks[0]:
                    # It ends before it is counted.
                    places = places[: places.index(part.breaks[1]) + 1]
                    found += [(batch, place) for place in places]
                    break
                found += [(batch, place) for place in places]
                batch += 1
            else:
                found += [(batch, place) for place in three("on_train_epoch_end")]
    last = max(i for i, (_, place) in enumerate(found) if place == "after on_before_optimizer_step")
    return [where for where in found[: last + 1] if not finds_head(one, *where)]


def finds_head(one, batch, place):
    """Whether a place lies between a fit's first forward pass and the loss that shows what the head is."""
    firsts, done = [], 0
    for part in one.parts:
        firsts.append(done)
        done += one.count * part.epochs if part.breaks is None else part.breaks[0]
    between = ["after the forward pass", *three("on_before_zero_grad"), "before on_before_backward"]
    return one.head == "auto" and batch in firsts and place in between


def places_of_batch(one, i):
    is_last = (i + 1) % one.accumulate == 0 or i + 1 == one.count
    places = [*three("on_train_batch_start"), "training_step", "after the forward pass"]
    if i % one.accumulate == 0 and not one.manual:
        places += three("on_before_zero_grad")
    places += [*three("on_before_backward"), *three("on_after_backward")]
    if is_last:
        places += three("on_before_optimizer_step") * (2 if one.optimizer == "two" else 1)
    if is_last and one.manual:
        places.append("after the step")
    return [*places, *three("on_train_batch_end")]


class BrokenOffError(Exception):
    """What user code raises."""


class Timeline:
    """The events of a draw as they happen in one run, and the parameters after each batch.

    Attributes:
        told: What happened, in words.
        passed: The places passed so far.
        history: Parameters by name after each batch.
        batch: Micro-batches done.
        breaks: Where user code raises an error; None if it does not.
    """

    def __init__(self, one):
        self.one = one
        self.scene = None
        self.told = []
        self.passed = []
        self.history = []
        self.batch = 0
        self.breaks = None

    def fire(self, place):
        """Let happen what is to happen here."""
        self.passed.append((self.batch, place))
        if self.scene is not None:
            for event in self.one.events:
                if (event.batch, event.place) == (self.batch, place):
                    self._apply(event)
        if self.breaks == (self.batch, place):
            self.told.append(f"batch {self.batch}, {place}: user code raises an error")
            raise BrokenOffError

    def _apply(self, event):
        words = EVENTS[event.event].apply(self.scene, Dice(event.seed))
        if words:
            self.told.append(f"batch {event.batch}, {event.place}: {words}")

    def end_batch(self, module):
        """Keep the parameters."""
        values = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.history.append(values)
        self.batch += 1


# With Lightning


def at(hook):
    """A hook that lets happen what is to happen there."""

    def act(self, *_):
        self.timeline.fire(f"{self.side} {hook}")

    return act


class Events:
    """The hooks of a callback, or of a LightningModule, at which events happen."""

    on_train_epoch_start = at("on_train_epoch_start")
    on_train_batch_start = at("on_train_batch_start")
    on_before_zero_grad = at("on_before_zero_grad")
    on_before_backward = at("on_before_backward")
    on_after_backward = at("on_after_backward")
    on_before_optimizer_step = at("on_before_optimizer_step")
    on_train_batch_end = at("on_train_batch_end")
    on_train_epoch_end = at("on_train_epoch_end")


class Beside(Events, pl.Callback):
    """A callback before ours in the list, or after it."""

    def __init__(self, side, timeline):
        self.side = side
        self.timeline = timeline


class Eventful(Events, pl.LightningModule):
    """A network that trains by automatic or manual optimisation, while events happen."""

    side = "module"

    def __init__(self, one):
        super().__init__()
        self.net = NETS[one.net]()
        self.one = one
        self.automatic_optimization = not one.manual
        self.make_optimizers = MAKERS[one.optimizer]
        self.timeline = None

    def configure_optimizers(self):
        return self.make_optimizers(self.parameters())

    def loss(self, batch):
        """The loss of one micro-batch, in manual optimisation its part of the step's."""
        self.timeline.fire("training_step")
        loss = mean_square(self.net(batch[0]), batch[1])
        self.timeline.fire("after the forward pass")
        return loss / self.one.accumulate if self.one.manual else loss

    def training_step(self, batch, batch_idx):
        if not self.one.manual:
            return self.loss(batch)
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        loss = self.loss(batch)
        if batch_idx % self.one.accumulate == 0:
            for optimizer in optimizers:
                optimizer.zero_grad()
        self.manual_backward(loss)
        if (batch_idx + 1) % self.one.accumulate == 0:
            for optimizer in optimizers:
                optimizer.step()
            self.timeline.fire("after the step")
        return None

    def on_train_batch_end(self, *_):
        super().on_train_batch_end()
        self.timeline.end_batch(self)


def coefficients(one):
    """The coefficient as the callback takes it, and as the plain loop does."""
    most = MEASURES[one.measure]
    if one.strength == "rising":
        return (lambda step: most * (step + 1) / 8), (lambda step, layer: most * (step + 1) / 8)
    if one.strength == "by layer" and one.net == "pictures":
        by_layer = {"net.5": most / 2, "net.0": most, "net.7": most}
        given = {"net.5": most / 2, "net.[07]": most}
        return given, lambda step, layer: by_layer.get(layer, 0.0)
    if one.strength == "by layer":
        given = {"net.blocks.0": most / 2, "net.stem": 0.0, "*": most}
        return given, lambda step, layer: given.get(layer, most)
    given = Share(0.3) if one.strength == "share" else most
    return given, lambda step, layer: given


def head_of(one):
    """As the callback takes it."""
    return NETS[one.net].head_name if one.head == "named" else one.head


def ours(one, **settings):
    given, _ = coefficients(one)
    callback = uniformity(
        **{
            "measure": one.measure,
            "coefficient": given,
            "apply": one.mode,
            "head": head_of(one),
            "every_n_steps": one.every,
            "step_limit": one.step_limit,
            "tolerance": one.keeps,
            **settings,
        }
    )
    return used_before_quietly(callback) if one.used_before else callback


def used_before_quietly(callback):
    """After the fit of another model, which has layers of other names."""
    callback.regularizer.head, head = "auto", callback.regularizer.head
    coefficient = callback.regularizer.coefficient
    callback.regularizer.coefficient = 0.1
    used_before(callback)
    callback.regularizer.head, callback.regularizer.coefficient = head, coefficient
    return callback


def train_with_lightning(one, module, data, make_callback):
    """All parts of a run; returns its timeline. ``make_callback`` is None to train without."""
    timeline = module.timeline = Timeline(one)
    callback = make_callback and make_callback()
    fit = None
    for i, part in enumerate(one.parts):
        if part.begins == "resumed":
            fit.save_checkpoint("first.ckpt")
            module.make_optimizers = partial(rebuilt, timeline.scene.optimizers)
            callback = make_callback and make_callback()
        if part.begins != "again":
            chain = [callback] if callback else []
            fit = lightning_trainer(one, timeline, chain)
        timeline.scene = Scene(module, fit)
        timeline.breaks = part.breaks
        fit.fit_loop.max_epochs = part.epochs
        if part.begins != "new":
            fit.fit_loop.max_epochs += one.parts[i - 1].epochs
        with pytest.raises(BrokenOffError) if part.breaks else nullcontext():
            ckpt = "first.ckpt" if part.begins == "resumed" else None
            fit.fit(module, loader(data), ckpt_path=ckpt)
        module.make_optimizers = MAKERS[one.optimizer]
    return timeline


def rebuilt(optimizers, parameters):
    """New optimizers with the groups of others."""
    new = []
    for old in optimizers:
        groups = [dict(group, params=list(group["params"])) for group in old.param_groups]
        new.append(type(old)(groups, **old.defaults))
    return new


def lightning_trainer(one, timeline, chain):
    settings = {"log_every_n_steps": one.log_every}
    if not one.manual:
        settings["accumulate_grad_batches"] = one.accumulate
    if one.precision == "scaler":
        scaler = torch.amp.GradScaler("cpu", **SCALER)
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    elif one.precision != "fp32":
        settings["precision"] = one.precision
    return trainer(Beside("before", timeline), *chain, Beside("after", timeline), **settings)


# Without Lightning


@dataclass(frozen=True)
class Found:
    """A layer as the plain loop finds it in the model."""

    name: str
    layer: nn.Module
    measure: object

    @property
    def parameters(self):
        """Those that the weight comes from."""
        if parametrize.is_parametrized(self.layer):
            return list(self.layer.parametrizations["weight"].parameters())
        held = self.layer._parameters
        return [
            held[name] for name in ("weight", "weight_orig", "weight_g", "weight_v") if name in held
        ]

    def rows(self):
        """The neurons (groups, n, d)."""
        layer = self.layer
        if "weight_orig" in layer._parameters:
            weight = layer.weight_orig * layer.weight_mask
        elif "weight_g" in layer._parameters:
            weight = torch._weight_norm(layer.weight_v, layer.weight_g, 0)
        else:
            weight = layer.weight
        groups = getattr(layer, "groups", 1)
        return weight.reshape(groups, len(weight) // groups, -1)


def find_layers(module, measure, head):
    """The layers of a model as it is now: each weight once, under its first name."""
    found, seen = [], set()
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        one = Found(name, layer, measure.for_head() if name == head else measure)
        key = frozenset(map(id, one.parameters))
        if key not in seen:
            seen.add(key)
            found.append(one)
    return found


class Penalty:
    """Coefficient times penalty of whatever layers there are.

    Attributes:
        steps: Steps done, by the optimizer's position.
        head: Name of the head; None as long as it is not known, or if there is none.
        means: Of a share, by layer: the means of the task's gradient's norm, and the penalty's.
        must: Names that a warning has to give.
        may: Names that a warning may give.
    """

    def __init__(self, one, module, kept=None):
        self.one = one
        self.module = module
        self.kept = kept
        self.coefficient = coefficients(one)[1]
        self.must: set[str] = set()
        self.may: set[str] = set()
        self.known: list[Any] = []
        self.reset()

    def reset(self):
        """A new training begins."""
        self.steps: dict[int, int] = {}
        self.means: dict[str, list[float]] = {}
        self.head = None if self.one.head is None else head_of(self.one)
        self.begin()

    def begin(self):
        """A fit begins."""
        self.reached: dict[str, list[nn.Parameter]] = {}
        self.passed_over: dict[str, list[nn.Parameter]] = {}
        self.present: dict[str, list[nn.Parameter]] = {}

    def layers(self):
        return find_layers(self.module, self.one.measure, self.head)

    def find_head(self):
        """At each loss; between losses it goes on by name."""
        if self.one.head == "auto":
            self.head = self.module.net.last_name()

    def step(self, index):
        return self.steps.get(index, 0)

    # In the loss

    def term(self, optimizer):
        """What is added to the loss of one micro-batch, before the scaler's factor; only its gradient is right."""
        step = self.step(0)
        if self.one.mode != "loss" or step % self.one.every:
            return 0.0
        known = plain.reactions_of(optimizer)
        total = 0.0
        for layer in self.layers():
            strength = self.coefficient(step, layer.name)
            if strength == 0 or not any(p.requires_grad for p in layer.parameters):
                continue
            rows = layer.rows()
            ways = [known[id(p)] for p in layer.parameters if id(p) in known]
            way = max((one.rate * one.gain for one in ways), default=0.0)
            gradient = self._gradient(layer, rows) * strength
            gradient *= shortening(gradient, rows, self.one.step_limit, way)
            total = total + (rows * gradient).sum()
        return total / self.one.accumulate

    # Before the step

    def before_step(self, optimizer, index):
        """Note whom the step reaches; add to the gradients."""
        self._note(optimizer)
        if self.one.mode == "gradient":
            for _, _, found in self._due(optimizer, index):
                for p, gradient in found:
                    p.grad += gradient.to(p.dtype)
        if self.one.mode != "decoupled":
            self.steps[index] = self.step(index) + 1

    # After the step

    @torch.no_grad()
    def after_step(self, optimizer, index, skipped):
        """Move the neurons, unless the GradScaler has skipped the step."""
        if self.one.mode != "decoupled" or skipped:
            return
        rates = rates_of(optimizer)
        for layer, rows, found in self._due(optimizer, index):
            for p, gradient in found:
                move(layer, rows, p, rates[id(p)] * gradient)
        self.steps[index] = self.step(index) + 1

    @torch.enable_grad()
    def _due(self, optimizer, index):
        """Triples of a layer, its neurons, and pairs of a parameter that is about to move and its gradient."""
        step = self.step(index)
        if step % self.one.every:
            return []
        known = plain.reactions_of(optimizer)
        due = []
        with torch.autocast("cpu", enabled=False):
            for layer in self.layers():
                moving = moved_by(layer, known)
                if moving and self.coefficient(step, layer.name) != 0:
                    rows = layer.rows()
                    way = self._way([known[id(p)] for p in moving], [p.grad for p in moving])
                    found = self._gradients(layer, rows, moving, way, step, optimizer)
                    due.append((layer, rows.detach(), found))
        return due

    def _way(self, known, tasks):
        """How far a step goes against a gradient of length 1."""
        way = max(one.rate for one in known)
        if self.one.mode == "decoupled":
            return way
        if any(one.rescales for one in known):
            tasks = torch.cat([task.double().flatten() for task in tasks])
            rms = float(tasks.square().mean().sqrt())
            way = way / rms if 0 < rms < math.inf else math.inf
        return way * max(one.gain for one in known)

    def _gradients(self, layer, rows, moving, way, step, optimizer):
        gradient = self._gradient(layer, rows)
        strength = given = self.coefficient(step, layer.name)
        if isinstance(strength, Share):
            unscaled = torch.autograd.grad(rows, moving, gradient, retain_graph=True)
            strength = self._share(strength, layer.name, [p.grad for p in moving], unscaled)
        gradient = gradient * strength
        gradient *= shortening(gradient, rows, self.one.step_limit, way)
        found = [gradient]
        if rows.grad_fn is not None:
            found = torch.autograd.grad(rows, moving, gradient)
        if self.one.mode == "decoupled" and isinstance(given, Share):
            held = self._held(given, optimizer, moving, found)
            found = [held * part for part in found]
        return list(zip(moving, found, strict=True))

    def _held(self, share, optimizer, moving, found):
        """By what a layer is shortened, which moves by at most its share of the optimizer's step."""
        task = plain.norm([p.grad for p in moving])
        if not 0 < task < math.inf:
            return 0.0
        steps = [plain.step_length(optimizer, p, lambda part: part) for p in moving]
        room = share.fraction * math.hypot(*steps)
        penalty = plain.norm(found)
        return room / penalty if penalty > room else 1.0

    def _gradient(self, layer, rows):
        """The gradient (groups, n, d) at these rows, or one that is kept: that goes on with the weights."""
        if self.kept is None:
            return gradient_of(layer.measure, rows)
        key = tuple(map(id, layer.parameters))
        self.known.append(layer.parameters)  # whose ids are then of nothing else
        return self.kept.gradient(layer.name, layer.measure, rows.detach(), key)

    def _share(self, share, name, task, penalty):
        """The coefficient of a share, after its means have taken in this step."""
        norms = plain.norm(task), plain.norm(penalty)
        means = self.means.setdefault(name, [0.0, 0.0])
        if torch.isfinite(torch.tensor(norms)).all():
            for i in range(2):
                means[i] = share.smoothing * means[i] + (1 - share.smoothing) * norms[i]
        if not means[1]:
            return 0.0
        return min(share.fraction * means[0] / means[1], share.maximum)

    # Warnings

    def begin_batch(self):
        """Note what is there for the whole of a batch, if it then stays."""
        self.present = {layer.name: layer.parameters for layer in self.layers()}

    def _note(self, optimizer):
        """Note which layers a step reaches with their present parameters, and which it passes over."""
        rates = rates_of(optimizer)
        for layer in self.layers():
            if moved_by(layer, rates):
                self.reached[layer.name] = layer.parameters
            elif self._counts(layer) and same(self.present.get(layer.name), layer.parameters):
                self.passed_over[layer.name] = layer.parameters

    def _counts(self, layer):
        """Whether it trains and has a coefficient."""
        trains = any(p.requires_grad for p in layer.parameters)
        return trains and self.coefficient(0, layer.name) != 0

    def end_epoch(self, optimizers):
        """Note the layers that a warning must name by now, and those that it may name."""
        rates: dict[int, float] = {}
        for optimizer in optimizers:
            rates |= rates_of(optimizer)
        for layer in self.layers():
            if not self._counts(layer):
                continue
            is_reached = same(self.reached.get(layer.name), layer.parameters)
            if not is_reached and same(self.passed_over.get(layer.name), layer.parameters):
                self.must.add(layer.name)
            if not is_reached or not moved_by(layer, rates):
                self.may.add(layer.name)


def same(some, others):
    """Whether these are the same parameters."""
    return some is not None and [*map(id, some)] == [*map(id, others)]


def rates_of(optimizer):
    """Learning rates by parameter id."""
    rates = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            rates[id(p)] = float(group["lr"])
    return rates


def moved_by(layer, rates):
    """The parameters of a layer that a step with these rates is about to move."""
    moving = []
    for p in layer.parameters:
        if id(p) in rates and p.requires_grad and p.grad is not None:
            moving.append(p)
    return moving


def gradient_of(measure, rows):
    """The gradient (groups, n, d) of the mean over groups of a penalty."""
    x = rows.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(plain.energy(measure, x).mean(), x)[0]


def shortening(gradient, rows, limit, way):
    """Factors (groups, n, 1) that keep a step of such a way within ``limit`` times a neuron's norm."""
    length = gradient.norm(dim=-1, keepdim=True)
    if limit is None or way <= 0:
        return torch.ones_like(length)
    room = rows.detach().norm(dim=-1, keepdim=True) * (limit / way)
    return (room / length.clamp_min(1e-30)).clamp_max(1.0)


def move(layer, rows, p, way):
    """Neurons that are entries of ``p`` go ``way`` and keep their norms; parameters behind them just go."""
    if p is not layer.layer._parameters.get("weight"):
        p -= way
        return
    moved = rows - way.view(rows.shape)
    moved *= rows.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
    p.copy_(moved.view(p.shape))


def train_plainly(one, module, data, penalises=True, kept=None):
    """All parts of a run; returns its timeline and its penalty."""
    timeline = module.timeline = Timeline(one)
    penalty = Penalty(one, module, kept) if penalises else NoPenalty()
    before = None
    for part in one.parts:
        loop = PlainLoop(one, module, timeline, penalty)
        if part.begins == "resumed":
            loop.scene, loop.scaler = before.scene, before.scaler
        elif part.begins == "again":
            loop.scaler = before.scaler
            penalty.begin()
        else:
            penalty.reset()
        timeline.scene = loop.scene
        timeline.breaks = part.breaks
        with pytest.raises(BrokenOffError) if part.breaks else nullcontext():
            loop.run(part.epochs, data)
        before = loop
    return timeline, penalty


class NoPenalty:
    """What the plain loop asks where there is no penalty."""

    def __getattr__(self, name):
        return lambda *_: 0.0


class PlainLoop:
    """One fit in plain torch: Lightning's order of events, the penalty where the callback has its turn."""

    def __init__(self, one, module, timeline, penalty):
        self.one = one
        self.module = module
        self.timeline = timeline
        self.penalty = penalty
        made = module.configure_optimizers()
        self.scene = Scene(module, optimizers=made if isinstance(made, list) else [made])
        self.scaler = None
        if one.precision == "scaler":
            self.scaler = torch.amp.GradScaler("cpu", **SCALER)

    def run(self, epochs, data):
        self.module.zero_grad()  # as Lightning does at the start of a fit
        for _ in range(epochs):
            self._fire_all("on_train_epoch_start")
            for i, batch in enumerate(data):
                self._fire_all("on_train_batch_start")
                self.penalty.begin_batch()
                is_first = i % self.one.accumulate == 0
                is_last = (i + 1) % self.one.accumulate == 0 or i + 1 == len(data)
                if self.one.manual:
                    with self._as_in_training_step():
                        self._manual(batch, is_first, is_last)
                else:
                    self._automatic(batch, is_first, is_last)
                self._fire_all("on_train_batch_end")
                self.timeline.end_batch(self.module)
            self._fire_all(
                "on_train_epoch_end", lambda: self.penalty.end_epoch(self.scene.optimizers)
            )

    def _fire_all(self, hook, ours=lambda: None):
        """The callback before ours, ours, that after, and the module."""
        self.timeline.fire(f"before {hook}")
        ours()
        self.timeline.fire(f"after {hook}")
        self.timeline.fire(f"module {hook}")

    def _as_in_training_step(self):
        """The context in which Lightning runs a training_step."""
        if self.one.precision == "64-true":
            return default_dtype(torch.float64)
        dtypes = {"bf16-mixed": torch.bfloat16, "scaler": torch.float16}
        if self.one.precision in dtypes:
            dtype = dtypes[self.one.precision]
            return torch.autocast("cpu", dtype, cache_enabled=False)  # as Lightning does
        return nullcontext()

    def _automatic(self, batch, is_first, is_last):
        optimizer = self.scene.optimizers[0]
        with self._as_in_training_step():
            loss = self.module.loss(batch)
        if is_first:
            self._fire_all("on_before_zero_grad")
            optimizer.zero_grad()
        self._backward(loss / self.one.accumulate, optimizer)
        if is_last:
            self._step(optimizer, 0)

    def _manual(self, batch, is_first, is_last):
        loss = self.module.loss(batch)
        optimizers = self.scene.optimizers
        if is_first:
            for optimizer in optimizers:
                optimizer.zero_grad()
        self._backward(loss, optimizers[0])
        if is_last:
            for i, optimizer in enumerate(optimizers):
                self._step(optimizer, i)
            self.timeline.fire("after the step")

    def _backward(self, loss, optimizer):
        terms = []

        def ours():
            self.penalty.find_head()
            terms.append(self.penalty.term(optimizer))

        self._fire_all("on_before_backward", ours)
        loss = loss + terms[0]
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._fire_all("on_after_backward")

    def _step(self, optimizer, i):
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        ours = partial(self.penalty.before_step, optimizer, i)
        self._fire_all("on_before_optimizer_step", ours)
        skipped = plain.step(optimizer, self.scaler)
        self.penalty.after_step(optimizer, i, skipped)


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# The checks


def difference(some, others):
    """The largest difference between two histories, and where it first exceeds ``1e-6``."""
    assert len(some) == len(others)
    largest, where = 0.0, ""
    for i, (mine, theirs) in enumerate(zip(some, others, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            found = float((value.double() - theirs[name].double()).abs().max())
            if not math.isfinite(found):
                found = math.inf
            if found > 1e-6 and not where:
                where = f"after batch {i} in {name}"
            largest = max(largest, found)
    return largest, where


def recorded(run):
    """What a run returns, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(one.message) for one in caught]


@dataclass
class Runs:
    """The runs of one draw that are compared."""

    one: Draw

    def __post_init__(self):
        torch.manual_seed(self.one.seed)
        self.first = Eventful(self.one).to(self.one.dtype)
        self.data = batches(self.one.count, dtype=self.one.dtype)

    def module(self):
        return copy.deepcopy(self.first)

    def lightning(self, make_callback=None):
        """A run with Lightning, and the texts of its warnings."""
        module = self.module()
        torch.manual_seed(3)
        return recorded(lambda: train_with_lightning(self.one, module, self.data, make_callback))

    def recorded(self):
        """A run with the callback, and when it computed the gradients that it kept."""

        def make_callback():
            before = {layer: list(uses) for layer, uses in schedule.items()}
            callback = ours(self.one)
            schedule.clear()  # of another model's fit
            schedule.update(before)
            return callback

        with plain.recorded_schedule() as schedule:
            found = self.lightning(make_callback)
        return found, None if self.one.keeps is None else plain.Kept(schedule)

    def plainly(self, **settings):
        return train_plainly(self.one, self.module(), self.data, **settings)


def check(one):
    """Make the three checks; returns how much the penalty does, None if the draw is of no use."""
    runs = Runs(one)
    try:
        without, known = runs.lightning()
    except Exception as error:  # user code that fails without us, too
        print(f"  of no use: {type(error).__name__}: {error}")
        return None
    print("\n".join(without.told))
    if not any("user code" not in words for words in without.told):
        return None
    # The penalty is what the plain loop says.
    (found, texts), kept = runs.recorded()
    expected, penalty = runs.plainly(kept=kept)
    assert expected.passed == without.passed, "the two loops go through other places"
    assert kept is None or kept.is_used_up(), "other gradients are used"
    effect, _ = difference(expected.history, without.history)
    if not math.isfinite(effect):
        return None
    assert found.told == expected.told
    off, where = difference(found.history, expected.history)
    print(f"off by {off:.2g}; the penalty does {effect:.2g}")
    if off >= one.tolerance:
        bare, _ = difference(runs.plainly(penalises=False)[0].history, without.history)
        pytest.fail(
            f"off by {off:.2g}, first {where}; without a penalty by {bare:.2g}; the penalty does {effect:.2g}"
        )
    # It is never silently absent.
    unreached = []
    for text in texts:
        if "the penalty has not reached layer" in text:
            unreached.append(text)
        else:
            is_limit = "the penalty is too strong" in text and one.step_limit == TIGHT
            assert text in known or is_limit, f"another warning: {text}"
    named = set(re.findall(r"'([^']+)'", " ".join(unreached)))
    assert penalty.must <= named, f"no warning names {penalty.must - named}"
    assert named <= penalty.may, f"a warning names {named - penalty.may}"
    # A coefficient of 0 changes nothing.
    watched, texts = runs.lightning(lambda: ours(one, coefficient=0.0))
    assert watched.told == without.told
    assert difference(watched.history, without.history)[0] == 0.0
    assert not [text for text in texts if text not in known]
    return effect


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """Thousands of fits need not tell that they begin and end."""
    caplog.set_level(logging.ERROR, "lightning.pytorch")


@pytest.mark.parametrize("number", range(COUNT), ids="draw{:03d}".format)
def test_whatever_happens_trains_as_a_plain_loop_does(number):
    """Where the penalty's effect is too small to be missed, or nothing happened, other settings are drawn."""
    for one in (draw(number, attempt) for attempt in range(20)):
        print(
            f"{one}\nEVENTS_SEED={BASE} EVENTS_COUNT={number + 1} python -m pytest "
            f"tests/test_events.py -k draw{number:03d}"
        )
        effect = check(one)
        if effect is not None and effect > 5 * one.tolerance:
            return
    pytest.fail("the penalty had no visible effect in twenty draws")
