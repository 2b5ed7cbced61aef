"""One run of ``python -m evidence.images``: a network, a recipe, a method and a seed, through Lightning.

On a CPU a run is a function of its settings and its seed; on a GPU it is one unless kernels add in
another order. Batches and crops depend on the seed and the step alone, so that all methods of a seed
see the same, and so does a run that goes on from a checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from evidence.cells import code
from evidence.data import NAMED, Data, MissingDataError
from evidence.image_data import BATCH, Batches, loaded, moved
from evidence.image_methods import callbacks
from evidence.image_networks import build
from lightning_hsu import HypersphericalUniformity, UniformityRegularizer
from lightning_hsu.measures import RieszEnergy

DECIDING = (
    "cifar",
    "controls",
    "data",
    "image_data",
    "image_methods",
    "image_networks",
    "image_training",
)
"""The modules beside the library that decide the numbers of a run."""
SMOOTHING = 0.01
FLOOR = 1e-4
"""What CNN-9's loss adds to every probability."""
DROPS = (0.4, 2 / 3, 13 / 15)
"""Of all steps, where CNN-9's learning rate falls to a tenth."""
LAST = "last.ckpt"
"""The name of a run's last checkpoint."""
WARM_UP = 0.05
"""Of all steps, in which a ViT's learning rate rises."""
MEASURED = RieszEnergy(s=2.0, half_space=True)
"""Whose ratios are told before and after training, whatever is minimised."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        rate: The learning rate at first.
        decay: Weight decay of all parameters.
        adamw: AdamW, else SGD with momentum 0.9.
        clip: The largest norm of all gradients together; None is no limit.
        drops: Parts of all steps at which the learning rate falls to a tenth; with none it follows
            half a cosine to 0.
        warm_up: Part of all steps in which it rises linearly before that.
        bounded: The official bounded loss, else plain cross entropy.
    """

    rate: float
    decay: float
    adamw: bool = False
    clip: float | None = None
    drops: tuple[float, ...] = ()
    warm_up: float = 0.0
    bounded: bool = False

    def factor(self, steps: int, step: int) -> float:
        """What the learning rate is multiplied by at a step, from 0, of so many."""
        if self.drops:
            return float(0.1 ** sum(step >= round(part * steps) for part in self.drops))
        rising = round(self.warm_up * steps)
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, steps - rising)
        return 0.5 + 0.5 * math.cos(math.pi * done)


_CNN9 = Recipe(0.1, 5e-4, drops=DROPS, bounded=True)
_RESNET18 = Recipe(0.1, 5e-4)
_VIT = Recipe(1e-3, 0.05, adamw=True, clip=1.0, warm_up=WARM_UP)
RECIPES = {
    "cnn9": _CNN9,
    "resnet18": _RESNET18,
    "resnet18-plain": _RESNET18,
    "vit": _VIT,
    "vit-bn": _VIT,
}


@dataclass(frozen=True)
class Settings:
    """What all runs of a table share.

    Args:
        data: What :func:`evidence.data.load` takes.
        network: Of :data:`RECIPES`.
        width: Of the network.
        rate: Learning rate at first.
        steps: Of training.
        decay: Weight decay; None is the recipe's.
        images: Training images; 0 takes all.
        validate: So many training images are held out, and judge in place of the test images.
        test_every: Steps between tests and checkpoints.
        accelerator: As in the Trainer, like the next two.
    """

    data: str
    network: str
    width: int
    rate: float
    steps: int
    decay: float | None = None
    images: int = 0
    validate: int = 0
    test_every: int = 500
    accelerator: str = "auto"
    devices: str = "1"
    precision: str = "32-true"

    @property
    def name(self) -> str:
        """In names of files."""
        count = f"n{self.images}" if self.images else "all"
        found = f"{loaded(self.data).name}-{self.network}-width{self.width}-steps{self.steps}"
        found += f"-rate{self.rate:g}"
        if self.decay is not None:
            found += f"-decay{self.decay:g}"
        found += f"-{count}"
        return f"{found}-validate{self.validate}" if self.validate else found

    @property
    def recipe(self) -> Recipe:
        """The network's, with the weight decay that was asked for."""
        found = RECIPES[self.network]
        return found if self.decay is None else replace(found, decay=self.decay)

    def asked(self, method: str, seed: int) -> dict[str, Any]:
        """What decides the numbers of a run."""
        data = loaded(self.data)
        found = {
            "data": data.title,
            "network": self.network,
            "width": self.width,
            "rate": self.rate,
            "steps": self.steps,
            "images": self.images or len(data.pool[1]) - self.validate,
            "validate": self.validate,
            "test_every": self.test_every,
            "devices": self.devices,
            "precision": self.precision,
            "method": method,
            "seed": seed,
        }
        if self.decay is not None:
            found["decay"] = self.decay
        if self.data not in NAMED:  # a folder, whose content may change under its name
            found["content"] = data.digest
        return found


def check(settings: Settings) -> None:
    """Refuse settings that cannot be trained with.

    Raises:
        MissingDataError: the message says what to do.
    """
    data = loaded(settings.data)
    left = len(data.pool[1]) - settings.validate
    if not BATCH <= (settings.images or left) <= left:
        held = f", {settings.validate} of them held out" if settings.validate else ""
        raise MissingDataError(
            f"{data.title} has {len(data.pool[1])} training images{held}; take from {BATCH} to "
            "as many as are left with --images."
        )
    if settings.steps % settings.test_every:
        raise MissingDataError(
            f"the last test comes after the last step: make --steps {settings.steps} a multiple of "
            f"--test-every {settings.test_every}."
        )
    try:
        build(settings.network, data.shape, data.classes, settings.width)
    except ValueError as error:
        raise MissingDataError(f"{data.title}, {settings.network}: {error}.") from None


class Classifier(pl.LightningModule):
    """A network with its recipe.

    Args:
        network: Images of bytes to scores.
        recipe: How it is trained.
        rate: Learning rate at first.
        steps: Of training, for the schedule.
        seed: Decides how images are moved.

    Attributes:
        asked: What decides the numbers; it goes with the checkpoint.
        code: Digests of the code of all parts of this run.
        errors: In percent, one a test.
        seconds: Of a processor, before the checkpoint that this run goes on from.
    """

    def __init__(
        self, network: nn.Module, recipe: Recipe, rate: float, steps: int, seed: int
    ) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.rate = rate
        self.steps = steps
        self.seed = seed
        self.asked: dict[str, Any] = {}
        self.code = [code(DECIDING)]
        self.errors: list[float] = []
        self.seconds = 0.0
        self._since = time.process_time()

    def forward(self, images: Tensor) -> Tensor:
        """Scores (batch, classes) of images (batch, channels, height, width) of bytes."""
        return self.network(images)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss of images moved and flipped at random."""
        images, labels = batch
        # One stream a step and rank, from which a random direction is drawn, too.
        torch.manual_seed((self.seed * 1_000_003 + self.global_step) * 1009 + self.global_rank)
        scores = self(moved(images))
        if self.recipe.bounded:
            return bounded_cross_entropy(scores, labels)
        return nn.functional.cross_entropy(scores, labels)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Count wrong answers."""
        images, labels = batch
        wrong = (self(images).argmax(1) != labels).float()
        self.log("test/error", 100.0 * wrong.mean(), on_epoch=True, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Keep the error: the papers report the best over training."""
        self.errors.append(float(self.trainer.callback_metrics["test/error"]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What was asked, and code, errors and time so far, go with the checkpoint."""
        checkpoint["asked"] = self.asked
        checkpoint["code"] = self.code
        checkpoint["errors"] = self.errors
        checkpoint["seconds"] = self.elapsed()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on with them."""
        self.code = sorted({*checkpoint["code"], *self.code})
        self.errors = list(checkpoint["errors"])
        self.seconds = checkpoint["seconds"]
        self._since = time.process_time()

    def elapsed(self) -> float:
        """Seconds of a processor of this run so far, in all its parts."""
        return self.seconds + time.process_time() - self._since

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer, and its learning rate step by step."""
        recipe = self.recipe
        optimizer: torch.optim.Optimizer
        if recipe.adamw:
            optimizer = torch.optim.AdamW(self.parameters(), self.rate, weight_decay=recipe.decay)
        else:
            optimizer = torch.optim.SGD(
                self.parameters(), self.rate, momentum=0.9, weight_decay=recipe.decay
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: recipe.factor(self.steps, step)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def bounded_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of smoothed labels and of probabilities + 1e-4, so never above 9.21.

    Args:
        scores: Shape (batch, classes).
        labels: Shape (batch,).
    """
    likelihood = (scores.float().softmax(1) + FLOOR).log()
    hard = nn.functional.nll_loss(likelihood, labels)
    return hard * (1 - SMOOTHING) - SMOOTHING * likelihood.mean()


def train(settings: Settings, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run; ended and called again, it goes on from its last checkpoint.

    Args:
        settings: What is trained, as :func:`check` takes it.
        method: Of :data:`CHOICES`.
        seed: Decides which images, the initial weights, the batches and crops.
        folder: For its checkpoints.

    Returns:
        What JSON holds of it.

    Raises:
        MissingDataError: if the checkpoint was made with other settings.
    """
    first = first_step(settings, method, seed, folder)
    data = loaded(settings.data)
    recipe = settings.recipe
    pl.seed_everything(seed, verbose=False)
    network = build(settings.network, data.shape, data.classes, settings.width)
    module = Classifier(network, recipe, settings.rate, settings.steps, seed)
    module.asked = settings.asked(method, seed)
    before = ratios(network)
    acting = callbacks(method, network)
    trainer = pl.Trainer(
        max_steps=settings.steps,
        max_epochs=-1,
        accelerator=settings.accelerator,
        devices=settings.devices,
        precision=settings.precision,
        gradient_clip_val=recipe.clip,
        val_check_interval=settings.test_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        # A checkpoint after each test.
        callbacks=[*acting, ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=False)],
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trained_on, judged = _datasets(data, settings, seed, first)
    trainer.fit(
        module,
        DataLoader(trained_on, BATCH // trainer.world_size),
        DataLoader(judged, 500),
        ckpt_path=folder / LAST if first else None,
        weights_only=False,
    )
    found: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "errors": [round(error, 4) for error in module.errors],
        "best": round(min(module.errors), 4),
        "finite": all(bool(p.isfinite().all()) for p in network.parameters()),
        "ratio_before": before,
        "ratio_after": ratios(network),
        "seconds": round(module.elapsed()),
        "asked": module.asked,
        "code": module.code,
    }
    for callback in acting:
        if isinstance(callback, HypersphericalUniformity):
            found["measure"] = repr(callback.measure)
            found["coefficients"] = [callback.coefficient, callback.head_coefficient]
    return found


def first_step(settings: Settings, method: str, seed: int, folder: Path) -> int:
    """The step at which a run goes on; 0 where it has no checkpoint.

    Raises:
        MissingDataError: if the checkpoint was made with other settings.
    """
    last = folder / LAST
    if not last.exists():
        return 0
    checkpoint = torch.load(last, map_location="cpu", mmap=True, weights_only=False)
    refuse_others(last, checkpoint.get("asked", {}), settings.asked(method, seed))
    return int(checkpoint["global_step"])


def refuse_others(path: Path, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse what was made with other settings than are asked for.

    Raises:
        MissingDataError: it names each of them.
    """
    others = []
    for name in {**wanted, **made}:
        if made.get(name) != wanted.get(name):
            others.append(f"{name} = {made.get(name)}, not {wanted.get(name)}")
    if others:
        raise MissingDataError(f"{path} was made with {'; '.join(others)}: name another --out")


def _datasets(
    data: Data, settings: Settings, seed: int, first: int
) -> tuple[Batches, TensorDataset]:
    """What is trained on from a step on, and what judges."""
    images = data.pool[0].view(-1, *data.shape)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held, kept = order.tensor_split([settings.validate])
    kept = kept[: settings.images or None]
    labels = data.pool[1]
    trained_on = Batches(images[kept], labels[kept], settings.steps, seed, first)
    if settings.validate:
        return trained_on, TensorDataset(images[held], labels[held])
    return trained_on, TensorDataset(data.test[0].view(-1, *data.shape), data.test[1])


def ratios(network: nn.Module) -> dict[str, float | None]:
    """Half-space ratios of all layers, full-space of the head; None where they are not finite."""
    found: dict[str, float | None] = {}
    for layer in UniformityRegularizer(MEASURED).attach(network).measure_layers():
        found[layer.name] = round(layer.ratio, 4) if math.isfinite(layer.ratio) else None
    return found
