"""Train all networks of some trials and seeds at once, through the library's own engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from evidence.controls import Halves
from evidence.data import Data, Draw, draw
from evidence.early import Early, ratio_of
from evidence.grid import Trial
from evidence.methods import METHODS, Method
from evidence.networks import Networks
from evidence.plan import Setting
from lightning_hsu import Share, UniformityRegularizer
from lightning_hsu._neurons.how import How

BATCH = 50
_BEFORE = 500_000
"""What seeds are raised by for the training before."""

CHUNK = 500
"""Images evaluated at once."""


@dataclass(frozen=True)
class Trained:
    """What training leaves behind, each of shape (trials, seeds).

    Args:
        error: On the held-out or the test images, in percent.
        train_error: On the training images, as labelled.
        finite: Whether all weights are.
        before: Ratios of the hidden layers' half-space energy, s = 2, to that of random neurons,
            mean over layers.
        after: The same at the end.
        recomputed: Part of the penalty's arithmetic that was done in hidden layers, where gradients
            are kept; else 1.
        early_ratio: The ratio of each hidden layer when a tenth of the training is over, of shape
            (layers, trials, seeds).
        early_share: The norm of the penalty's gradient over the task's then, of the same shape; 0
            where the penalty is not added to the gradients.
    """

    error: Tensor
    train_error: Tensor
    finite: Tensor
    before: Tensor
    after: Tensor
    recomputed: float = 1.0
    early_ratio: Tensor = field(default_factory=lambda: torch.zeros(0))
    early_share: Tensor = field(default_factory=lambda: torch.zeros(0))


def train(
    data: Data,
    setting: Setting,
    method: Method,
    trials: Sequence[Trial],
    seeds: Sequence[int],
    *,
    test: bool,
) -> Trained:
    """Train len(trials) * len(seeds) networks; a seed's see the same images in the same order.

    Args:
        data: The data of the setting.
        setting: What is trained.
        method: The penalty.
        trials: What to train with.
        seeds: Of the images, the initial weights and the order of the batches.
        test: Tell the errors on the test images, else on the held-out ones.
    """
    if setting.images < BATCH:
        raise ValueError(f"{setting.images} training images are less than one batch of {BATCH}")
    draws = [drawn(data, setting, seed) for seed in seeds]
    torch.manual_seed(seeds[0])  # random directions repeat
    # AdamW's step limit looks at the task's gradient of each network's layer.
    by_task = setting.optimizer == "adamw" and method.measure is not None
    apart = method.apart or method.share is not None or by_task
    networks = Networks(setting.architecture(data), len(trials), seeds, apart=apart)
    if setting.start != "fresh":
        _train_before(networks, data, setting, seeds, apart=apart)
    optimizer = optimizer_of(networks, setting, trials)
    penalties = _penalties(networks, setting, method, trials)
    before = _ratios(networks)
    early = _early(networks, setting)
    halves = _halves(networks, optimizer, method, setting)
    _fit(networks, optimizer, penalties, method, setting, draws, seeds, early, halves)
    networks.eval()
    judged, trained_on = [], []
    for one in draws:
        held = data.pool[0][one.held], data.pool[1][one.held]
        judged.append(data.test if test else held)
        trained_on.append((one.images, one.labels))
    return Trained(
        error=_error(networks, draws, judged),
        train_error=_error(networks, draws, trained_on),
        finite=_finite(networks),
        before=before,
        after=_ratios(networks),
        recomputed=_recomputed(penalties),
        early_ratio=early.ratio if early else torch.zeros(0),
        early_share=early.share if early else torch.zeros(0),
    )


def _train_before(
    networks: Networks, data: Data, setting: Setting, seeds: Sequence[int], *, apart: bool
) -> None:
    """Train on other draws of the data, pairs of classes as one; then begin the heads anew.

    All trials do it alike, without a penalty.
    """
    before = [seed + _BEFORE for seed in seeds]
    draws = []
    for seed in before:
        one = draw(data, seed, setting.images, setting.held_out)
        draws.append(replace(one, labels=one.labels // 2))
    trial = Trial(0.08, 1e-3)
    plain = replace(setting, optimizer="sgd", epochs=20)
    optimizer = optimizer_of(networks, plain, [trial] * networks.trials)
    _fit(networks, optimizer, [], METHODS["decay"], plain, draws, before)
    networks.begin_head(seeds)
    if setting.start == "adapters":
        networks.add_adapters(seeds, apart=apart)


def drawn(data: Data, setting: Setting, seed: int) -> Draw:
    """A seed's images of a setting."""
    return draw(
        data,
        seed,
        setting.images,
        setting.held_out,
        noise=setting.noise,
        imbalance=setting.imbalance,
    )


def optimizer_of(
    networks: Networks, setting: Setting, trials: Sequence[Trial]
) -> torch.optim.Optimizer:
    """The optimizer of a setting; a trial's networks have its learning rate and decay."""
    groups = [
        {"params": networks.trial_parameters(i), "lr": trial.rate, "weight_decay": trial.decay}
        for i, trial in enumerate(trials)
    ]
    if setting.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.SGD(groups, momentum=0.9, fused=True)


def _penalties(
    networks: Networks, setting: Setting, method: Method, trials: Sequence[Trial]
) -> list[UniformityRegularizer]:
    """The engines of the hidden layers and, in full space, of the heads.

    Each trial has its coefficient. An engine takes the mean over the networks of a layer, hence their number as a factor.
    """
    if method.measure is None:
        return []
    hidden = ["hidden.*"]
    if setting.start == "adapters":
        hidden = ["down.*", "up.*"]
    sides = [(method.measure, "hidden.*.", hidden)]
    if setting.penalises_head:
        sides.append((method.measure.for_head(), "head.", ["head.*"]))
    found = []
    for measure, side, include in sides:
        strength: float | Share | dict[str, float]
        if method.share is not None:
            strength = method.share
        elif method.coefficient is not None:
            strength = method.coefficient
        else:
            strength = {}
            each = len(networks.head) // networks.trials
            for i in range(len(networks.head)):
                coefficient = trials[i // each].coefficient
                if coefficient:
                    strength[f"{side}{i}"] = coefficient * networks.seeds / each
        neurons: dict[str, How] | None = None
        if method.coefficient is not None and setting.network == "plain":
            neurons = dict.fromkeys(include, "rows")  # the same neurons; steps are quicker
        regularizer = UniformityRegularizer(
            measure,
            strength,
            include=include,
            head=None,
            neurons=neurons,
            share_limit=method.share_limit,
            tolerance=method.tolerance,
        )
        found.append(regularizer.attach(networks))
    return found


def _early(networks: Networks, setting: Setting) -> Early | None:
    """Watches the hidden layers, where these are trained."""
    if setting.start == "adapters":
        return None
    return Early(networks, setting.epochs * (setting.images // BATCH))


def _halves(
    networks: Networks, optimizer: torch.optim.Optimizer, method: Method, setting: Setting
) -> Halves | None:
    """Keeps a half of what the penalty does, for a method that has only one."""
    if method.keep is None:
        return None
    sides = [*networks.hidden, *networks.down, *networks.up]
    if setting.penalises_head:
        sides.append(networks.head)
    weights = [(piece.weight, 2) for side in sides for piece in side if piece.weight.requires_grad]
    return Halves(optimizer, weights, method.keep)


def _fit(
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    penalties: Sequence[UniformityRegularizer],
    method: Method,
    setting: Setting,
    draws: Sequence[Draw],
    seeds: Sequence[int],
    early: Early | None = None,
    halves: Halves | None = None,
) -> None:
    for images, labels in batches(optimizer, setting, draws, seeds):
        optimizer.zero_grad()
        loss = loss_of(networks(images), labels)
        if method.apply == "loss":
            for penalty in penalties:
                penalty.add_to_loss(loss, optimizer)
        loss.backward()
        if early:
            early.before_penalty()
        if halves:
            halves.before_penalty()
        if method.apply == "gradient":
            for penalty in penalties:
                penalty.add_gradients(optimizer)
        if early:
            early.after_penalty()
        optimizer.step()
        if halves:
            halves.after_step()
        for penalty in penalties:
            if method.apply == "decoupled":
                penalty.move(optimizer)
            elif method.apply == "loss":
                penalty.count_step(optimizer)


def batches(
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    draws: Sequence[Draw],
    seeds: Sequence[int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (seeds, BATCH, d) and labels (seeds, BATCH), step by step; the rate falls after each."""
    trained_on = [one.train for one in draws]
    images = torch.stack([x for x, _ in trained_on])
    labels = torch.stack([y for _, y in trained_on])
    chances = [torch.Generator().manual_seed(seed) for seed in seeds]
    per_epoch = images.shape[1] // BATCH
    schedule = CosineAnnealingLR(optimizer, setting.epochs * per_epoch)
    rows = torch.arange(len(seeds)).unsqueeze(1)
    for _ in range(setting.epochs):
        orders = [torch.randperm(images.shape[1], generator=chance) for chance in chances]
        order = torch.stack(orders)
        for i in range(per_epoch):
            chosen = order[:, i * BATCH : (i + 1) * BATCH]
            yield images[rows, chosen], labels[rows, chosen]
            schedule.step()


def loss_of(scores: Tensor, labels: Tensor) -> Tensor:
    """Each network's mean cross entropy, summed over networks."""
    _seeds, trials, batch, _ = scores.shape
    targets = labels.unsqueeze(1).expand(-1, trials, -1).flatten()
    summed = functional.cross_entropy(scores.flatten(0, 2), targets, reduction="sum")
    return summed / batch


@torch.no_grad()
def _error(
    networks: Networks, draws: Sequence[Draw], judged: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Share of wrong answers (trials, seeds), in percent."""
    wrong = torch.zeros(len(draws), networks.trials)
    count = len(judged[0][1])
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        images, labels = [], []
        for one, (x, y) in zip(draws, judged, strict=True):
            images.append(one.standardised(x[part]))
            labels.append(y[part])
        answers = networks(torch.stack(images)).argmax(-1)
        wrong += (answers != torch.stack(labels).unsqueeze(1)).sum(-1)
    return (100.0 * wrong / count).T


def _recomputed(penalties: Sequence[UniformityRegularizer]) -> float:
    """The part of the hidden layers' arithmetic that was done; 1 where no gradient is kept."""
    if not penalties or penalties[0].tolerance is None:
        return 1.0
    return penalties[0].recomputed()


def _finite(networks: Networks) -> Tensor:
    """Whether all weights and biases of a network are (trials, seeds)."""
    found = []
    for side in (*networks.hidden, networks.head):
        for name in ("weight", "bias"):
            found.append(side.joined(name).isfinite().flatten(2).all(-1))
    return torch.stack(found).all(0).T


def _ratios(networks: Networks) -> Tensor:
    """Mean ratio over hidden layers (trials, seeds)."""
    return torch.stack([ratio_of(side) for side in networks.hidden]).mean(0)
