"""What the penalty costs in real trainings, on one CPU thread: kept gradients, exact ones, a peer.

Six trainings: a ResNet-18 on scikit-learn's digits, enlarged to 32 x 32 and three channels, as
CIFAR-10's images are; a transformer of six layers on the letters of Python's own manual; an MLP on
the digits; each with AdamW and with SGD with momentum, at constant rates.

Three rivals compute the penalty of all layers from the same weights: the engine with a tolerance
and the engine without, at each step, and the plain implementation `wo` with autograd, layer by
layer, at each tenth step (it takes the same time at all). They take turns in beginning. Each adds
to gradients of its own, which are zero; then those of the tolerance are added to the task's, and
the optimizer steps. So what is kept is used as in training, and the exact gradients, which are
there at every step, give its relative error, outside the time. Times are the process's own CPU
seconds: other programs on the machine take none of them.

Each training's rows are saved when it ends. ``--quick`` runs everything in miniature and writes
nothing; ``--only mlp`` runs some of it and leaves the other rows as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import peers
from benchmarks.timing import RESULTS, machine, save
from lightning_hsu import UniformityRegularizer
from lightning_hsu.measures import RieszEnergy

MEASURE = RieszEnergy(s=2.0)
TOLERANCE = 0.05
EARLY = 100
"""The first steps, which are told apart from the others."""
BLOCK = 25
"""Steps in a block, over which the spread of a quotient is told."""
GOALS = {
    "wo over tolerance, first 100 steps": ">= 3",
    "wo over tolerance, after them": ">= 10",
    "stale error, median": "<= 0.05",
    "stale error, 99th percentile": "<= 0.15",
}
RIVALS = ("tolerance", "exact", "wo")
SELDOM = 10
"""Steps from one evaluation of `wo` to the next."""

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""A batch of inputs and targets, by the step."""


@dataclass(frozen=True)
class Training:
    """One training.

    Args:
        name: In the table.
        model: Makes the network.
        batches: Makes its batches.
        optimizer: Makes its optimizer.
        steps: How many.
    """

    name: str
    model: Callable[[], nn.Module]
    batches: Callable[[], Batches]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    steps: int


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and what came in added."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Features of half the size, or of the same."""
        inner = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(inner)) + self.shortcut(x)).relu()


def resnet18(width: int = 64) -> nn.Module:
    """ResNet-18 for images of 32 x 32, as it is used on CIFAR-10: a 3 x 3 stem, no pooling."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False)]
    layers += [nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        layers += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class Letters(nn.Module):
    """A transformer that predicts the next letter."""

    def __init__(self, letters: int, length: int, d: int = 256, depth: int = 6) -> None:
        super().__init__()
        self.letter = nn.Embedding(letters, d)
        self.place = nn.Embedding(length, d)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d, max(1, d // 64), 4 * d, 0.0, batch_first=True)
            for _ in range(depth)
        )
        self.head = nn.Linear(d, letters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (batch, letters, length) of what follows each of x (batch, length)."""
        features = self.letter(x) + self.place.weight
        for block in self.blocks:
            features = block(features, src_mask=self.mask)
        return self.head(features).mT


def mlp() -> nn.Module:
    """64 inputs, hidden layers of 256, 512 and 256, 10 classes."""
    sizes = [64, 256, 512, 256]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 64) with mean 0 and variance 1, and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.data).float()
    labels = torch.from_numpy(found.target).long()
    return (images - images.mean()) / images.std(), labels


@cache
def manual() -> tuple[Tensor, int]:
    """The letters of Python's manual, as it ships with Python, by number, and how many differ."""
    from pydoc_data.topics import topics

    text = "".join(topics.values())
    number = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return torch.tensor([number[letter] for letter in text]), len(number)


def batches_of_digits(size: int, enlarged: int = 0) -> Batches:
    """Digits at random, as rows or enlarged to three channels of so many pixels each way."""
    images, labels = digits()
    chance = torch.Generator().manual_seed(1)

    def batch(_: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(labels), (size,), generator=chance)
        x = images[chosen]
        if enlarged:
            x = functional.interpolate(x.view(size, 1, 8, 8), size=enlarged, mode="bilinear")
            x = x.expand(size, 3, enlarged, enlarged)
        return x, labels[chosen]

    return batch


def batches_of_letters(size: int, length: int) -> Batches:
    """Stretches of the manual at random, and what follows each letter."""
    text, _ = manual()
    chance = torch.Generator().manual_seed(1)
    places = torch.arange(length + 1)

    def batch(_: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(text) - length - 1, (size, 1), generator=chance)
        found = text[starts + places]
        return found[:, :-1], found[:, 1:]

    return batch


def adamw(rate: float, decay: float = 0.05) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """AdamW at a constant rate."""
    return lambda model: torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)


def sgd(rate: float, decay: float = 5e-4) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """SGD with momentum 0.9 at a constant rate."""
    return lambda model: torch.optim.SGD(
        model.parameters(), lr=rate, momentum=0.9, weight_decay=decay
    )


def trainings(quick: bool) -> Iterator[Training]:
    """The six trainings."""
    width, images, pixels = (8, 4, 16) if quick else (64, 8, 32)
    stretches, length = (4, 16) if quick else (8, 64)
    letters = manual()[1]
    d, depth = (64, 2) if quick else (256, 6)
    short = 2 * BLOCK + EARLY if quick else 0
    networks = (
        ("MLP", mlp, lambda: batches_of_digits(64), 600, 1e-3, 0.05),
        (
            "transformer",
            lambda: Letters(letters, length, d, depth),
            lambda: batches_of_letters(stretches, length),
            300,
            3e-4,
            0.05,
        ),
        (
            "ResNet-18",
            lambda: resnet18(width),
            lambda: batches_of_digits(images, pixels),
            300,
            1e-3,
            0.05,
        ),
    )
    for name, model, batches, steps, adam_rate, sgd_rate in networks:
        for kind, optimizer in (("AdamW", adamw(adam_rate)), ("SGD", sgd(sgd_rate))):
            rate = adam_rate if kind == "AdamW" else sgd_rate
            yield Training(
                f"{name}, {kind}, rate {rate:g}", model, batches, optimizer, short or steps
            )


@dataclass
class Found:
    """What was found in one training.

    Args:
        seconds: Of each rival by step, at the steps at which it ran.
        errors: Relative errors of the kept gradients, by layer, at each step.
        losses: Of the task.
        recomputed: Part of the penalty's arithmetic that was done, early and later.
        weights: Bytes of the penalised weights.
        kept: Bytes of the gradients kept.
        task: Seconds of the task's forward and backward pass and the optimizer's step.
    """

    seconds: dict[str, dict[int, float]] = field(
        default_factory=lambda: {name: {} for name in RIVALS}
    )
    errors: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    recomputed: list[float] = field(default_factory=list)
    weights: int = 0
    kept: int = 0
    task: list[float] = field(default_factory=list)


class Penalties:
    """The three rivals on the layers of one model.

    Args:
        model: The model.
        optimizer: Its optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        # Without limits: rivals are compared where the task's gradient is left out.
        free: dict[str, Any] = {"head": None, "share_limit": None, "step_limit": None}
        self.kept = UniformityRegularizer(MEASURE, 1.0, tolerance=TOLERANCE, **free).attach(model)
        self.exact = UniformityRegularizer(MEASURE, 1.0, **free).attach(model)
        for engine in (self.kept, self.exact):
            engine.checks_order = False  # as in the callback; here gradients are exchanged
        self.layers = list(dict.fromkeys(layer.parameters[0] for layer in self.exact.layers))
        self.grads = {name: [torch.zeros_like(p) for p in self.layers] for name in RIVALS}
        # A projection to queries, keys and values is three layers.
        sharing = Counter(layer.parameters[0] for layer in self.exact.layers)
        self.pieces = [sharing[p] for p in self.layers]
        self.run = {
            "tolerance": lambda: self.kept.add_gradients(optimizer),
            "exact": lambda: self.exact.add_gradients(optimizer),
            "wo": self.plain,
        }

    def plain(self) -> None:
        """The peer, layer by layer; each graph is freed before the next."""
        for p, pieces in zip(self.layers, self.pieces, strict=True):
            weights, grads = p.detach().chunk(pieces), p.grad.chunk(pieces)
            for weight, grad in zip(weights, grads, strict=True):
                leaf = weight.flatten(1).requires_grad_()
                leaf.grad = grad.flatten(1)
                peers.wo(leaf).backward()

    def seconds(self, step: int) -> dict[str, float]:
        """Run the rivals on gradients of their own; return their CPU seconds."""
        tasks = [p.grad for p in self.layers]
        found = {}
        for turn in range(len(RIVALS)):
            name = RIVALS[(step + turn) % len(RIVALS)]
            if name == "wo" and step % SELDOM:
                continue
            for p, grad in zip(self.layers, self.grads[name], strict=True):
                p.grad = grad.zero_()
            start = time.process_time()
            self.run[name]()
            found[name] = time.process_time() - start
        for p, grad in zip(self.layers, tasks, strict=True):
            p.grad = grad
        return found

    def errors(self) -> list[float]:
        """Relative errors of the gradients just added with the tolerance."""
        found = []
        added = zip(self.grads["tolerance"], self.grads["exact"], self.pieces, strict=True)
        for kept, exact, pieces in added:
            for one, other in zip(kept.chunk(pieces), exact.chunk(pieces), strict=True):
                found.append((one - other).norm() / other.norm())
        return torch.stack(found).tolist()

    def add(self) -> None:
        """Add the kept gradients to the task's."""
        torch._foreach_add_([p.grad for p in self.layers], self.grads["tolerance"])


def measured(training: Training) -> Found:
    """Train, and time the rivals at each step."""
    torch.manual_seed(0)
    model = training.model()
    batches = training.batches()
    optimizer = training.optimizer(model)
    found = Found()
    penalties = Penalties(model, optimizer)
    for step in range(training.steps):
        x, target = batches(step)
        start = time.process_time()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), target)
        loss.backward()
        task = time.process_time() - start
        for name, seconds in penalties.seconds(step).items():
            found.seconds[name][step] = seconds
        found.errors.append(penalties.errors())
        found.losses.append(loss.item())
        penalties.add()
        start = time.process_time()
        optimizer.step()
        found.task.append(task + time.process_time() - start)
        if step + 1 in (EARLY, training.steps):
            found.recomputed.append(penalties.kept.recomputed())
    found.weights = sum(p.nbytes for p in penalties.layers)
    found.kept = penalties.kept.state.deltas.bytes()
    return found


def rows_of(training: Training, found: Found) -> Iterator[dict[str, object]]:
    """The rows of the table on one training."""
    stretches = (("first 100 steps", 0, EARLY), ("after them", EARLY, training.steps))
    for when, begin, end in stretches:
        for rival, under in (("wo", "tolerance"), ("exact", "tolerance"), ("wo", "exact")):
            what = f"{rival} over {under}, {when}"
            yield row(training, what, quotient(found.seconds, rival, under, begin, end))
    for (when, begin, end), share in zip(stretches, found.recomputed, strict=True):
        yield row(training, f"part of the arithmetic done, {when}", one_number(share))
        kept = 1e3 * mean_of(found.seconds["tolerance"], begin, end)
        task = 1e3 * mean(found.task[begin:end])
        yield row(training, f"ms a step, {when}", one_number(kept))
        yield row(training, f"part of the task's step, {when}", one_number(kept / task))
    errors = torch.tensor(found.errors)
    for name, part in (("median", 0.5), ("99th percentile", 0.99)):
        each = [torch.quantile(layer, part).item() for layer in errors.unbind(1)]
        over_all = torch.quantile(errors.flatten(), part).item()
        values = {"min": min(each), "median": over_all, "max": max(each)}
        yield row(training, f"stale error, {name}", values)
    yield row(training, "bytes kept over bytes of weights", one_number(found.kept / found.weights))
    yield row(training, "MiB kept", one_number(found.kept / 2**20))


def row(training: Training, what: str, values: dict[str, float]) -> dict[str, object]:
    """One row with its goal, if it has one, and whether that is met."""
    goal = GOALS.get(what, "")
    verdict = ""
    if goal:
        sign, number = goal.split()
        value = values["median"]
        is_met = value <= float(number) if sign == "<=" else value >= float(number)
        verdict = "met" if is_met else "missed"
    rounded = {name: float(f"{value:.4g}") for name, value in values.items()}
    return {"training": training.name, "what": what, **rounded, "goal": goal, "verdict": verdict}


def quotient(
    seconds: dict[str, dict[int, float]], over: str, under: str, begin: int, end: int
) -> dict[str, float]:
    """Mean time of one rival over that of another: over all steps, and its extremes over blocks."""
    blocks = []
    for start in range(begin, end - BLOCK + 1, BLOCK):
        stop = start + BLOCK
        blocks.append(mean_of(seconds[over], start, stop) / mean_of(seconds[under], start, stop))
    whole = mean_of(seconds[over], begin, end) / mean_of(seconds[under], begin, end)
    return {"min": min(blocks), "median": whole, "max": max(blocks)}


def mean_of(seconds: dict[int, float], begin: int, end: int) -> float:
    """The mean of one rival's seconds over some steps."""
    return mean(value for step, value in seconds.items() if begin <= step < end)


def one_number(value: float) -> dict[str, float]:
    """A number without a spread."""
    return {"min": value, "median": value, "max": value}


def keep(training: Training, rows: list[dict[str, object]]) -> None:
    """Save the rows of one training among those of the others, as they are there."""
    path = RESULTS / "trainings.json"
    others = json.loads(path.read_text())["rows"] if path.exists() else []
    others = [row for row in others if row["training"] != training.name]
    told = {"tolerance": TOLERANCE, "block": BLOCK, "rows": others + rows}
    save("trainings", {"machine": machine(), **told})


def main() -> None:
    """Run the trainings, print the table and save it, a training at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="in miniature, to see that it runs")
    parser.add_argument("--only", default="", help="trainings whose names contain this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="enable_nested_tensor")
    print(machine(), flush=True)
    for training in trainings(arguments.quick):
        if arguments.only.lower() not in training.name.lower():
            continue
        rows = []
        found = measured(training)
        first, last = found.losses[0], sum(found.losses[-BLOCK:]) / BLOCK
        print(f"{training.name}: {training.steps} steps, loss {first:.3g} to {last:.3g}")
        for one in rows_of(training, found):
            if arguments.quick:
                one["verdict"] = ""  # miniatures have no goals
            print(
                f"  {one['what']:44s} {one['median']:8.3g}  ({one['min']:.3g} to {one['max']:.3g})  "
                f"{one['goal']:8s} {one['verdict']}",
                flush=True,
            )
            rows.append(one)
        if not arguments.quick:
            keep(training, rows)


if __name__ == "__main__":
    sys.exit(main())
