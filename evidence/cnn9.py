"""``python -m evidence.cnn9``: the published recipes on the paper's CNN-9, with resuming and a table.

CIFAR-100 as its authors publish it ("python version") lies in a folder:

    python -m evidence.cnn9 --data cifar-100-python --presets none half_mhe_2 mgd --devices 1

The recipe is that of the official code (github.com/wy1iu/Sphere-Uniformity): three times three
3 x 3 convolutions of 64, 128 and 256 channels with batch norm and ReLU, a pooling after each three,
a convolution over all that is left to 256, the head; no biases. Cross entropy of smoothed labels
(0.01) and of probabilities + 1e-4, which bounds it. SGD with momentum 0.9, weight decay 5e-4,
batches of 128 over all devices, learning rate 0.1, a tenth of it after 0.4, 2/3 and 13/15 of 75000
steps, padding by 4, crops and flips. Pixels are bytes, 0 to 255. There is no tuning here: one set
of numbers for all, as published; running means of batch norm are PyTorch's (0.1 a step; 0.001
there). A run that goes on from a checkpoint draws batches and crops anew. On several devices a few
test images may count twice.

From these initial weights a learning rate of 0.1 throws the head so far that its probabilities
saturate and the loss has no slope; weight decay then takes some 2000 steps to bring it back. So it
is in the published logs, too (github.com/wy1iu/MHE: the training loss leaves 9 after 1600 to 3100
of 42500 steps, without a penalty after 2200). ``--rate 0.02`` learns at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from evidence.cells import write_whole
from evidence.data import Data, MissingDataError, load
from evidence.statistics import holm, paired
from evidence.tables import error_cell, markdown
from lightning_hsu import UniformityRegularizer
from lightning_hsu.presets import PRESETS, sphere_uniformity

BATCH = 128
RATE = 0.1
DECAY = 5e-4
SMOOTHING = 0.01
FLOOR = 1e-4
"""What the loss adds to every probability."""
DROPS = (0.4, 2 / 3, 13 / 15)
"""Of all steps, where the learning rate falls to a tenth."""


class CNN9(pl.LightningModule):
    """The network of the papers, on images of any size from 8 x 8.

    Args:
        shape: Channels, height, width of an image.
        classes: How many.
        steps: Of training, for the schedule.
        width: Channels of the first block; the published network has 64.
        rate: Learning rate at first.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, steps: int, width: int = 64, rate: float = RATE
    ) -> None:
        super().__init__()
        self.steps = steps
        self.rate = rate
        self.history: list[float] = []
        channels, height, breadth = shape
        layers: list[nn.Module] = []
        for block in (width, 2 * width, 4 * width):
            for _ in range(3):
                layers += [
                    nn.Conv2d(channels, block, 3, padding=1, bias=False),
                    nn.BatchNorm2d(block, eps=1e-3),
                    nn.ReLU(),
                ]
                channels = block
            layers.append(nn.MaxPool2d(2))
            height, breadth = height // 2, breadth // 2
        self.features = nn.Sequential(*layers)
        self.fc6 = nn.Conv2d(channels, 4 * width, (height, breadth), bias=False)
        self.score = nn.Linear(4 * width, classes, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, std=(2.0 / layer.weight[0].numel()) ** 0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (batch, classes) of images (batch, channels, height, width) of bytes."""
        x = (images.float() - 127.5) / 128.0
        return self.score(self.fc6(self.features(x)).flatten(1))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Bounded cross entropy of images moved and flipped at random."""
        images, labels = batch
        return bounded_cross_entropy(self(_moved(images)), labels)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Count wrong answers on the test images."""
        images, labels = batch
        wrong = (self(images).argmax(1) != labels).float()
        self.log("test/error", 100.0 * wrong.mean(), on_epoch=True, sync_dist=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Keep the error: the papers report the best over training."""
        if not self.trainer.sanity_checking:
            self.history.append(float(self.trainer.callback_metrics["test/error"]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Errors so far go with the checkpoint."""
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on with them."""
        self.history = list(checkpoint["history"])

    def configure_optimizers(self) -> Any:
        """SGD, and three drops of its rate."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.rate, momentum=0.9, weight_decay=DECAY
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [round(part * self.steps) for part in DROPS]
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


def _moved(images: Tensor) -> Tensor:
    """Each image moved by up to 4 pixels each way, its edges mirrored, and flipped or not."""
    batch, _, height, width = images.shape
    down = torch.randint(-4, 5, (batch, 1), device=images.device)
    right = torch.randint(-4, 5, (batch, 1), device=images.device)
    rows = _mirrored(down + torch.arange(height, device=images.device), height)
    cols = _mirrored(right + torch.arange(width, device=images.device), width)
    cols = torch.where(torch.rand(batch, 1, device=images.device) < 0.5, cols.flip(1), cols)
    every = torch.arange(batch, device=images.device)[:, None, None]
    return images[every, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Indices beyond the edges fold back: -1 is 0, -2 is 1."""
    index = torch.where(index < 0, -1 - index, index)
    return torch.where(index >= size, 2 * size - 1 - index, index)


def main() -> int:
    """Train every preset with every seed, or what is left of that, and print the table."""
    args = _arguments()
    try:
        data = _bytes(load(args.data), args.images)
        folder = _folder(args, data)
        for seed in args.seeds:
            for preset in args.presets:
                _check_same(folder / f"{preset}-{seed}.json", args)
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    for seed in args.seeds:
        for preset in args.presets:
            path = folder / f"{preset}-{seed}.json"
            if not path.exists():
                _train(data, preset, seed, args, path)
    if rank_zero_only.rank:
        return 0
    images = args.images or len(data.pool[1])
    print(f"\n{data.title}, {args.steps} steps, learning rate {args.rate:g}, ", end="")
    print(f"width {args.width}, {images} images\n")
    print(table(folder, args.presets, args.seeds))
    return 0


def _folder(args: argparse.Namespace, data: Data) -> Path:
    """Where results of these settings are."""
    name = f"{data.name}-width{args.width}-steps{args.steps}"
    if args.rate != RATE:
        name += f"-rate{args.rate:g}"
    return Path(args.out) / name / (f"n{args.images}" if args.images else "all")


def _check_same(path: Path, args: argparse.Namespace) -> None:
    """Refuse a result that was made with other settings than its folder tells."""
    if not path.exists():
        return
    asked = json.loads(path.read_text())["asked"]
    for name in ("test_every", "precision"):
        wanted = str(getattr(args, name))
        if asked[name] != wanted:
            raise MissingDataError(
                f"{path} was made with {name} = {asked[name]}, not {wanted}: name another --out"
            )


def _bytes(data: Data, count: int = 0) -> Data:
    """The data; refused if pixels are not bytes, or images fewer than asked for or than a batch."""
    images = data.pool[0]
    if not BATCH <= (count or len(images)) <= len(images):
        raise MissingDataError(
            f"{data.title} has {len(images)} training images; take from {BATCH} to as many."
        )
    if not (images == images.byte()).all():
        told = f"{data.title} has pixels from {float(images.min()):g} to {float(images.max()):g}"
        raise MissingDataError(f"{told}; this recipe takes whole numbers from 0 to 255.")
    return data


def _train(data: Data, preset: str, seed: int, args: argparse.Namespace, path: Path) -> None:
    """One run; ended and begun again, it goes on from its last checkpoint."""
    pl.seed_everything(seed, verbose=False)
    order = torch.randperm(len(data.pool[1]), generator=torch.Generator().manual_seed(seed))
    kept = order[: args.images or None]
    train = _dataset(data, data.pool[0][kept], data.pool[1][kept])
    test = _dataset(data, *data.test)
    network = CNN9(data.shape, data.classes, args.steps, args.width, args.rate)
    checkpoints = path.with_suffix("")
    start = time.perf_counter()
    before = _ratios(network)
    callbacks: list[pl.Callback] = [  # a checkpoint after each test
        ModelCheckpoint(checkpoints, save_last=True, save_on_train_epoch_end=False)
    ]
    if preset != "none":
        callbacks.append(sphere_uniformity(preset, verbose=False))
    trainer = pl.Trainer(
        max_steps=args.steps,
        max_epochs=-1,
        accelerator=args.accelerator,
        devices=args.devices,
        precision=args.precision,
        val_check_interval=min(args.test_every, args.steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=pl.loggers.CSVLogger(checkpoints, name="log"),
        callbacks=callbacks,
        enable_model_summary=False,
    )
    loader = DataLoader(train, BATCH // trainer.world_size, shuffle=True, drop_last=True)
    last = checkpoints / "last.ckpt"
    trainer.fit(
        network,
        loader,
        DataLoader(test, 500),
        ckpt_path=last if last.exists() else None,
        weights_only=False,
    )
    if trainer.is_global_zero:
        found = {
            "preset": preset,
            "seed": seed,
            "errors": network.history,
            "best": min(network.history),
            "finite": all(bool(p.isfinite().all()) for p in network.parameters()),
            "ratio_before": before,
            "ratio_after": _ratios(network),
            "seconds": round(time.perf_counter() - start),
            "asked": {name: str(value) for name, value in vars(args).items()},
        }
        write_whole(path, json.dumps(found))
    trainer.strategy.barrier()  # all ranks see the file before they look for it


def _dataset(data: Data, images: Tensor, labels: Tensor) -> TensorDataset:
    """Images (m, d) as bytes in their shape, with their labels."""
    return TensorDataset(images.view(-1, *data.shape).byte(), labels)


def _ratios(network: nn.Module) -> dict[str, float]:
    """Half-space ratios of all layers."""
    return {
        layer.name: round(layer.ratio, 4)
        for layer in UniformityRegularizer().attach(network).measure_layers()
    }


def table(folder: Path, presets: Sequence[str], seeds: Sequence[int]) -> str:
    """A row a preset: test errors, the change of the last from none, ratios before and after."""
    head = ["preset", "last error", "best error", "change of the last", "p (Holm)"]
    head += ["largest ratio", "not finite"]
    runs = {}
    for preset in presets:
        paths = [folder / f"{preset}-{seed}.json" for seed in seeds]
        runs[preset] = [json.loads(path.read_text()) for path in paths]
    last = {preset: [run["errors"][-1] for run in own] for preset, own in runs.items()}
    changes = {}
    if "none" in presets and len(seeds) > 1:
        rivals = [preset for preset in presets if preset != "none"]
        changes = {preset: paired(last[preset], last["none"]) for preset in rivals}
    corrected = dict(zip(changes, holm([one.p for one in changes.values()]), strict=True))
    rows = []
    for preset, own in runs.items():
        error = f"{last[preset][0]:.2f}"
        if len(seeds) > 1:
            error = error_cell({"test_error": last[preset]})
        told = p = ""
        if preset in changes:
            change = changes[preset]
            told = f"{change.mean:+.2f} ({change.error:.2f}), {change.wins}/{change.seeds}"
            p = f"{corrected[preset]:.2g}"
        best = f"{sum(run['best'] for run in own) / len(own):.2f}"
        ratios = f"{_largest(own, 'ratio_before'):.2f} → {_largest(own, 'ratio_after'):.2f}"
        broken = sum(not run["finite"] for run in own)
        rows.append([preset, error, best, told, p, ratios, broken])
    return markdown(head, rows)


def _largest(runs: Sequence[Mapping[str, Any]], when: str) -> float:
    """The largest ratio of a layer, mean over runs."""
    return sum(max(run[when].values()) for run in runs) / len(runs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evidence.cnn9",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        required=True,
        help="CIFAR-100's folder, any folder the harness reads, or fashion-mnist",
    )
    parser.add_argument(
        "--presets",
        nargs="+",
        default=["none", "half_mhe_2"],
        choices=["none", *PRESETS],
        metavar="PRESET",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=75_000)
    parser.add_argument(
        "--rate", type=float, default=RATE, help="learning rate at first; published: 0.1"
    )
    parser.add_argument(
        "--width", type=int, default=64, help="channels of the first block; published: 64"
    )
    parser.add_argument("--images", type=int, default=0, help="training images; 0 takes all")
    parser.add_argument(
        "--test-every", type=int, default=500, help="steps between tests and checkpoints"
    )
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--out", default="out/cnn9")
    args = parser.parse_args()
    args.seeds = list(dict.fromkeys(args.seeds))
    args.presets = list(dict.fromkeys(args.presets))
    return args


if __name__ == "__main__":
    sys.exit(main())
