"""With the default a task is learned as well as without the callback: the final loss within 2 %, or better.

Each case is one where a penalty without a limit by the task can do harm: layers that start at zero or are tiny,
whose penalty is steep, and layers of which the task says little or nothing.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_hsu import HypersphericalUniformity, Share, UniformityRegularizer

WITHIN = 1.02  # of the loss without the penalty
HUGE = 1000.0  # a coefficient with which the limit decides everywhere
BATCH = 50

pytestmark = [
    pytest.mark.usefixtures("shipped_defaults"),
    pytest.mark.filterwarnings(
        "ignore::UserWarning"
    ),  # what is told of a strength is another test's
]


@cache
def digits():
    """scikit-learn's digits, 500 of them: images (500, 64), standardised, and labels (500,)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.data[:500]).float()
    labels = torch.from_numpy(found.target[:500]).long()
    return (images - images.mean()) / images.std(), labels


class Adapted(nn.Module):
    """A frozen Linear beside two factors, of which the second is zero, as in LoRA."""

    def __init__(self, inputs, outputs, rank=4):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + 4.0 * self.up(self.down(x))


def adapters():
    return nn.Sequential(Adapted(64, 64), nn.ReLU(), Adapted(64, 64), nn.ReLU(), Adapted(64, 10))


def multilayer(*sizes):
    """A ReLU network of Linear layers."""
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def plain(scale=1.0):
    """The demo's network, its weights times a scale."""
    net = multilayer(64, 64, 64, 10)
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight *= scale
    return net


class Controlled(nn.Module):
    """A frozen network, and a copy of its first layers that acts through convolutions which start at zero."""

    def __init__(self, channels=8):
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.score = nn.Linear(channels * 16, 10)
        self.requires_grad_(False)
        self.control = nn.ModuleList(copy.deepcopy([self.first, self.second]))
        self.control.requires_grad_(True)
        self.entry = self._zero(1, 1)
        self.exits = nn.ModuleList([self._zero(channels, channels) for _ in range(2)])

    @staticmethod
    def _zero(inputs, outputs):
        made = nn.Conv2d(inputs, outputs, 1)
        nn.init.zeros_(made.weight)
        nn.init.zeros_(made.bias)
        return made

    def forward(self, x):
        x = x.view(-1, 1, 8, 8)
        first_control = self.control[0](x + self.entry(x)).relu()
        second_control = self.control[1](first_control).relu()
        first = self.first(x).relu() + self.exits[0](first_control)
        second = self.second(first).relu() + self.exits[1](second_control)
        return self.score(F.avg_pool2d(second, 2).flatten(1))


class AdaBlock(nn.Module):
    """An MLP block of a DiT: shift, scale and gate come from the condition by a Linear at zero."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x, condition):
        shift, scale, gate = self.modulation(F.silu(condition)).chunk(3, -1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class Denoiser(nn.Module):
    """Noisy images and labels in, the noise out; the last layer is zero, too."""

    def __init__(self, width=48):
        super().__init__()
        self.entry = nn.Linear(64, width)
        self.condition = nn.Embedding(10, width)
        self.blocks = nn.ModuleList([AdaBlock(width), AdaBlock(width)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.exit = nn.Linear(width, 64)
        nn.init.zeros_(self.exit.weight)
        nn.init.zeros_(self.exit.bias)

    def forward(self, x, labels):
        x = self.entry(x)
        condition = self.condition(labels)
        for block in self.blocks:
            x = block(x, condition)
        return self.exit(self.norm(x))


class Scaled(nn.Module):
    """A residual MLP block whose branch is scaled by a small vector, as LayerScale does."""

    def __init__(self, width, initial=1e-6):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x):
        return x + self.gamma * self.mlp(self.norm(x))


def layer_scaled():
    return nn.Sequential(
        nn.Linear(64, 48), Scaled(48), Scaled(48), nn.LayerNorm(48), nn.Linear(48, 10)
    )


def classify(model, images, labels):
    return F.cross_entropy(model(images), labels)


def denoise(model, images, labels):
    """The error of the noise; the noise is that of the images, so that a loss can be compared."""
    generator = torch.Generator().manual_seed(int(labels.sum()))
    noise = torch.randn(images.shape, generator=generator)
    return F.mse_loss(model(images + noise, labels), noise)


def quantiles(model, images, labels):
    """The pinball loss of nine quantiles of the label: rows of the head that must be nearly alike."""
    levels = torch.linspace(0.1, 0.9, 9)
    errors = labels.unsqueeze(1) - model(images)
    return torch.maximum(levels * errors, (levels - 1) * errors).mean()


def adamw(parameters, lr=1e-3):
    return torch.optim.AdamW(parameters, lr)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=2e-3)


def adafactor(parameters):
    return torch.optim.Adafactor(parameters, lr=0.1)


def adagrad(parameters):
    return torch.optim.Adagrad(parameters, lr=0.03)


def muon(parameters):
    return torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=0.03)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


def momentum_and_decay(parameters):
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=1e-2)


@dataclass(frozen=True)
class Case:
    """A model and how it is trained; the learning rate falls to 0 along half a cosine.

    Args:
        build: Makes the model.
        optimizer: Makes an optimizer of the parameters that train.
        loss: Of the model, images and labels.
        steps: Of the optimizer.
        settings: Of the regularizer, beside its strength.
        coefficients: Numbers to try beside the default of 1, within the default's limit.
    """

    build: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer] = adamw
    loss: Callable[..., torch.Tensor] = classify
    steps: int = 300
    settings: dict = field(default_factory=dict)
    coefficients: tuple[float, ...] = (HUGE,)


CASES = {
    "adapters": Case(adapters, steps=200),
    "head left out": Case(
        lambda: plain(0.03),
        momentum_and_decay,
        steps=600,
        settings={"exclude": "4"},
        coefficients=(0.3, HUGE),
    ),
    "zero convolutions": Case(Controlled, partial(adamw, lr=3e-3), steps=150),
    "adaLN-zero": Case(Denoiser, loss=denoise, steps=150),
    "LayerScale": Case(layer_scaled, steps=150),
    "tiny norms, momentum": Case(lambda: plain(1e-4), momentum),
    "tiny norms, Adam": Case(lambda: plain(1e-4), adam, steps=200),
    "quantiles": Case(lambda: multilayer(64, 32, 9), momentum, loss=quantiles, steps=400),
}
STRENGTHS = [(name, {}) for name in CASES]
for name, case in CASES.items():
    for coefficient in case.coefficients:
        STRENGTHS.append((name, {"coefficient": coefficient}))


def optimizer_of(case, model):
    """The case's optimizer, of the parameters that train."""
    return case.optimizer([p for p in model.parameters() if p.requires_grad])


def batches(case, seed):
    """Images and labels of every step, in an order of the seed."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    for step in range(case.steps):
        first = step * BATCH % len(images)
        if first == 0:
            order = torch.randperm(len(images), generator=generator)
        chosen = order[first : first + BATCH]
        yield images[chosen], labels[chosen]


def train(case, seed, regularizer=None, how="add_gradients"):
    """Train from a seed, in a loop of one's own; return the loss over all images at the end."""
    torch.manual_seed(seed)
    model = case.build()
    if regularizer is not None:
        regularizer.attach(model)
    optimizer = optimizer_of(case, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, case.steps)
    for images, labels in batches(case, seed):
        optimizer.zero_grad()
        case.loss(model, images, labels).backward()
        if regularizer is None:
            optimizer.step()
        else:
            applied(how, regularizer, optimizer)
        schedule.step()
    return loss_of(case, model)


@torch.no_grad()
def loss_of(case, model):
    return float(case.loss(model, *digits()))


@cache
def loss_without(name, seed):
    """The loss without the penalty."""
    return train(CASES[name], seed)


def ratio(name, seeds=(0,), **strength):
    """The mean loss over seeds with the penalty over that without."""
    case = CASES[name]
    penalised = without = 0.0
    for seed in seeds:
        penalised += train(case, seed, UniformityRegularizer(**case.settings, **strength))
        without += loss_without(name, seed)
    return penalised / without


@pytest.mark.parametrize(("name", "strength"), STRENGTHS, ids=str)
def test_a_task_is_learnt_as_well_as_without_the_penalty(name, strength):
    """Measured: at most 1.00, with any of these coefficients; another seed moves it by .06 at most, below 1.

    Two of these would pass without a share limit at the default coefficient, too: "tiny norms", which the
    step limit saves, and "head left out". Their cases with other coefficients would not, but for "tiny norms,
    momentum", which only both limits together can lose.
    """
    assert ratio(name, **strength) <= WITHIN


@pytest.mark.parametrize("name", ["adapters", "zero convolutions", "adaLN-zero"])
def test_what_begins_at_zero_bears_a_share_limit_of_a_tenth(name):
    """Measured: 1.015, 0.985 and 0.990. README says 5 %; of quantiles it says what is lost (see LOST)."""
    assert ratio(name, seeds=(0, 1), share_limit=0.1) <= 1.05


@pytest.mark.parametrize("optimizer", [momentum, adamw])
def test_the_share_limit_decides_at_most_steps(optimizer):
    """Measured: in 555 of 600 layers and steps with SGD, in all 600 with AdamW."""
    case = Case(plain, optimizer, steps=200)
    held = layers = 0
    for stats in steps_of(case, UniformityRegularizer()):
        layers += len(stats)
        held += sum(bool(one.held) for one in stats.values())
    assert layers == 3 * case.steps
    assert held >= 0.8 * layers


def steps_of(case, regularizer):
    """Train; yield the statistics of each step, by layer."""
    torch.manual_seed(0)
    model = case.build()
    regularizer.attach(model)
    optimizer = optimizer_of(case, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, case.steps)
    for images, labels in batches(case, 0):
        optimizer.zero_grad()
        case.loss(model, images, labels).backward()
        yield regularizer.add_gradients(optimizer, stats=True)
        optimizer.step()
        schedule.step()


DECOUPLED = {
    "momentum": Case(lambda: plain(1e-4), momentum, steps=200),
    "Adagrad": Case(lambda: plain(1e-4), adagrad, steps=100),
}
if hasattr(torch.optim, "Adafactor"):  # from torch 2.5 on
    DECOUPLED["Adafactor"] = Case(lambda: plain(1e-3), adafactor, steps=200)
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    DECOUPLED["Muon"] = Case(lambda: plain(1e-4), muon, steps=50)


def ratio_of_moves(kind, **strength):
    """The loss where neurons move past the optimizer, over that without the penalty."""
    penalised = train(DECOUPLED[kind], 0, UniformityRegularizer(**strength), "move")
    return penalised / decoupled_without(kind)


@cache
def decoupled_without(kind):
    """The loss without the penalty."""
    return train(DECOUPLED[kind], 0)


@pytest.mark.parametrize("coefficient", [1.0, HUGE])
@pytest.mark.parametrize("kind", DECOUPLED)
def test_moves_past_the_optimizer_do_no_harm_to_tiny_norms(kind, coefficient):
    """Measured: momentum 1.00, Adagrad .80 and .86, Adafactor 1.00, Muon .99. Adagrad's gains without a limit, too."""
    assert ratio_of_moves(kind, coefficient=coefficient) <= WITHIN


@pytest.mark.parametrize("kind", sorted({"momentum", "Adafactor", "Muon"} & DECOUPLED.keys()))
def test_such_moves_lose_tiny_norms_where_no_task_limits_them(kind):
    """Measured: momentum 1.29, Adafactor 1.22, Muon 1.22."""
    assert ratio_of_moves(kind, coefficient=HUGE, share_limit=None) > WITHIN


LOST = [  # without a limit by the task; measured
    ("adapters", {}),  # 2.64
    ("adapters", {"share_limit": 0.3}),  # 1.21; with 0.2 1.08
    ("head left out", {"coefficient": 0.3}),  # 47
    ("head left out", {"coefficient": HUGE}),  # 1.20
    ("zero convolutions", {}),  # 1.23
    ("adaLN-zero", {"coefficient": HUGE}),  # 1.37; with 10 1.18
    ("LayerScale", {}),  # 1.13
    ("tiny norms, momentum", {"step_limit": None}),  # 1.44; with it 0.00
    ("tiny norms, Adam", {"coefficient": HUGE}),  # 1.17
    ("quantiles", {}),  # 1.55
    ("quantiles", {"share_limit": 0.1}),  # 1.24
]


@pytest.mark.parametrize(("name", "strength"), LOST, ids=str)
def test_these_tasks_are_lost_where_no_task_limits_a_penalty(name, strength):
    """So they can tell a safe strength from an unsafe one."""
    strength = {"coefficient": 1.0, "share_limit": None} | strength
    assert ratio(name, **strength) > WITHIN


class Program(pl.LightningModule):
    """A case as a user of Lightning writes it."""

    def __init__(self, case):
        super().__init__()
        self.model = case.build()
        self.case = case

    def training_step(self, batch, _):
        return self.case.loss(self.model, *batch)

    def configure_optimizers(self):
        optimizer = optimizer_of(self.case, self)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.case.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(case, seed, callbacks):
    """Train from a seed with Lightning; return the loss over all images at the end."""
    torch.manual_seed(seed)
    program = Program(case)
    rows = TensorDataset(*digits())
    order = RandomSampler(rows, generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(rows, sampler=BatchSampler(order, BATCH, drop_last=True), batch_size=None)
    trainer = pl.Trainer(
        max_steps=case.steps,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(program, loader)
    return loss_of(case, program.model)


@pytest.mark.parametrize("apply", ["gradient", "decoupled"])
def test_one_line_in_a_trainer_does_no_harm(apply):
    case = replace(CASES["adapters"], steps=100)
    callback = HypersphericalUniformity(apply=apply, verbose=False)
    without = fit(case, 0, [])
    assert fit(case, 0, [callback]) <= WITHIN * without
    unlimited = HypersphericalUniformity(apply=apply, share_limit=None, verbose=False)
    assert fit(case, 0, [unlimited]) > WITHIN * without  # measured: 1.22 and 1.06


class Branches(nn.Module):
    """A network that learns, a branch that is multiplied by zero, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.used = plain()
        self.muted = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.idle = nn.Linear(64, 32)

    def forward(self, x):
        return self.used(x) + 0.0 * self.muted(x)


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def are_same(module, before):
    return all(map(torch.equal, module.parameters(), before))


def applied(how, regularizer, optimizer):
    """One step of an optimizer and of the penalty, which enters in one of two ways."""
    if how == "add_gradients":
        regularizer.add_gradients(optimizer)
    optimizer.step()
    if how == "move":
        regularizer.move(optimizer)


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=1e-3),
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-3),
}
WAYS = ["add_gradients", "move"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_layers_that_the_loss_does_not_depend_on_stay_as_they_are(kind, how):
    torch.manual_seed(0)
    model = Branches()
    regularizer = UniformityRegularizer(coefficient=1.0).attach(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    muted, idle, used = weights(model.muted), weights(model.idle), weights(model.used)
    for images, labels in batches(Case(Branches, steps=10), 0):
        optimizer.zero_grad()
        classify(model, images, labels).backward()
        applied(how, regularizer, optimizer)
    assert are_same(model.muted, muted)
    assert are_same(model.idle, idle)
    assert not are_same(model.used, used)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_constant_loss_moves_nothing(kind, how):
    torch.manual_seed(0)
    model = plain(1e-4)
    regularizer = UniformityRegularizer(coefficient=1.0).attach(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    before = weights(model)
    for images, _ in batches(Case(plain, steps=10), 0):
        optimizer.zero_grad()
        (0.0 * model(images).sum() + 1.0).backward()
        applied(how, regularizer, optimizer)
    assert are_same(model, before)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("strength", [1.0, Share(0.1)], ids=str)
def test_where_a_task_ends_its_weights_stay(how, strength):
    """A loss that is constant from some step on, as of a hinge that is met."""
    torch.manual_seed(0)
    model = plain()
    regularizer = UniformityRegularizer(coefficient=strength).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for step, (images, labels) in enumerate(batches(Case(plain, steps=20), 0)):
        optimizer.zero_grad()
        (classify(model, images, labels) * (step < 10)).backward()
        applied(how, regularizer, optimizer)
        seen.append(weights(model))
    assert not are_same(model, seen[8])
    assert are_same(model, seen[9])


BROKEN = {0, 7, 8, 50}  # steps whose loss is NaN


def train_broken(case, seed, regularizer, step_of):
    """Train while some losses are NaN; ``step_of`` does one step, or skips it."""
    torch.manual_seed(seed)
    model = case.build()
    if regularizer is not None:
        regularizer.attach(model)
    optimizer = optimizer_of(case, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=50)
    for step, (images, labels) in enumerate(batches(case, seed)):
        loss = case.loss(model, images, labels)
        if step in BROKEN:
            loss = loss * float("nan")
        optimizer.zero_grad()
        step_of(loss, optimizer, regularizer, scaler)
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    return loss_of(case, model)


def gradients(optimizer):
    return [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]


def add(regularizer, optimizer, **scale):
    """Add the penalty's gradient, which is nothing where the task's is not finite."""
    if regularizer is None:
        return
    before = [grad.clone() for grad in gradients(optimizer)]
    regularizer.add_gradients(optimizer, **scale)
    for grad, old in zip(gradients(optimizer), before, strict=True):
        if not old.isfinite().all():
            torch.testing.assert_close(grad, old, rtol=0, atol=0, equal_nan=True)


def look_then_add(loss, optimizer, regularizer, _):
    """A step is skipped by the loss, before the penalty is added."""
    loss.backward()
    if loss.isfinite():
        add(regularizer, optimizer)
        optimizer.step()


def add_then_look(loss, optimizer, regularizer, _):
    """A step is skipped by its gradients, after the penalty was added."""
    loss.backward()
    add(regularizer, optimizer)
    if all(bool(grad.isfinite().all()) for grad in gradients(optimizer)):
        optimizer.step()


def unscaled(loss, optimizer, regularizer, scaler):
    """A GradScaler skips a step; the penalty is added to unscaled gradients."""
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    add(regularizer, optimizer)
    scaler.step(optimizer)
    scaler.update()


def scaled(loss, optimizer, regularizer, scaler):
    """A GradScaler skips a step; the penalty is added to scaled gradients."""
    scaler.scale(loss).backward()
    add(regularizer, optimizer, grad_scale=scaler.get_scale())
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("step_of", [look_then_add, add_then_look, unscaled, scaled])
def test_steps_whose_gradients_are_not_finite_do_no_harm(step_of):
    case = replace(CASES["adapters"], steps=100)
    penalised = without = 0.0
    for seed in range(2):
        penalised += train_broken(case, seed, UniformityRegularizer(), step_of)
        without += train_broken(case, seed, None, step_of)
    assert penalised <= WITHIN * without


def test_skipped_steps_save_no_task_from_a_penalty_without_a_limit():
    """Measured: 2.5 times the loss."""
    case = replace(CASES["adapters"], steps=100)
    unlimited = UniformityRegularizer(coefficient=1.0, share_limit=None)
    penalised = train_broken(case, 0, unlimited, look_then_add)
    assert penalised > WITHIN * train_broken(case, 0, None, look_then_add)
