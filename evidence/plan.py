"""Which cells are run: settings, the methods compared in each, and the budget of every method."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from evidence.data import Data
from evidence.grid import Grid, Trial
from evidence.methods import CORE, METHODS, Method, unit_coefficient
from evidence.networks import Architecture

TUNING_SEEDS = tuple(range(1000, 1004))
TEST_SEEDS = tuple(range(100, 120))
"""The plan's first run, without controls, was tested on 20 to 39."""
RATES = {
    "digits": (0.04, 0.08, 0.16, 0.32),
    "mnist1d": (0.04, 0.08, 0.16, 0.32),
    "adamw": (1e-3, 3e-3, 1e-2, 3e-2),
}
USUAL_RATES = (0.02, 0.04, 0.08, 0.16)
DECAYS = {"sgd": (1e-3, 3e-3, 1e-2, 3e-2), "adamw": (0.03, 0.1, 0.3, 1.0)}
STRENGTHS = (3e-3, 1.2e-2, 5e-2, 0.2)
"""In units of :func:`~evidence.methods.unit_coefficient`."""

DECOUPLED_STRENGTHS = (1e-3, 1e-2, 0.1, 1.0)
"""Further apart: there neither momentum nor Adam's preconditioner sets how far a neuron moves."""


@dataclass(frozen=True)
class Setting:
    """What all methods of one comparison have in common.

    Args:
        data: Name or folder of the data.
        images: Training images.
        epochs: Over them, batches of 50.
        held_out: Images to validate on.
        network: A plain ReLU network, or two convolutions without and with batch norm.
        depth: Hidden layers of the plain network.
        scale: Factor of the initial weights.
        optimizer: SGD with momentum 0.9, or AdamW; the learning rate falls to 0 as a cosine.
        noise: Fraction of wrong training labels.
        imbalance: How many times as frequent the most frequent class is as the rarest.
        start: Whether the network is fresh; or trained before, on other images and pairs of classes,
            and fine-tuned with a fresh head; or then frozen but for that head, and given adapters.
        penalises_head: Whether the head has a penalty.
    """

    data: str
    images: int
    epochs: int
    held_out: int = 2000
    network: Literal["plain", "convolutions", "batch norm"] = "plain"
    depth: int = 2
    scale: float = 1.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    noise: float = 0.0
    imbalance: float = 1.0
    start: Literal["fresh", "trained", "adapters"] = "fresh"
    penalises_head: bool = True

    @property
    def name(self) -> str:
        """A name for files, which says what is not as usual."""
        parts = [Path(self.data).resolve().name, f"n{self.images}", f"e{self.epochs}"]
        if self.network == "plain":
            parts.append(f"depth{self.depth}")
        else:
            parts.append(self.network.replace(" ", ""))
        parts.append(f"scale{self.scale:g}")
        if self.optimizer != "sgd":
            parts.append(self.optimizer)
        if self.noise:
            parts.append(f"noise{self.noise:g}")
        if self.imbalance != 1.0:
            parts.append(f"tail{self.imbalance:g}")
        if self.start != "fresh":
            parts.append(self.start)
        if not self.penalises_head:
            parts.append("headless")
        return "-".join(parts)

    def architecture(self, data: Data) -> Architecture:
        """One network."""
        return Architecture(
            data.shape,
            data.classes,
            depth=self.depth,
            convolutions=self.network != "plain",
            norm=self.network == "batch norm",
            scale=self.scale,
        )


@dataclass(frozen=True)
class Cell:
    """One method in one setting."""

    setting: Setting
    method: Method

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.setting.name}--{self.method.name}"

    def trials(self, data: Data) -> list[Trial]:
        """The first sixteen, as many for every method."""
        return self.grid(data).first()

    def grid(self, data: Data) -> Grid:
        """What is tuned."""
        decays = DECAYS[self.setting.optimizer]
        rates = RATES.get(self.setting.data, USUAL_RATES)
        if self.setting.optimizer == "adamw":
            rates = RATES["adamw"]
        if self.method.measure is None or self.method.share is not None:
            return Grid(rates, decays)
        n, *rest = self.setting.architecture(data).weights()[0]
        unit = unit_coefficient(self.method.measure, n, math.prod(rest))
        strengths = STRENGTHS
        if self.method.apply == "decoupled":
            strengths = DECOUPLED_STRENGTHS
        return Grid(rates, decays, strengths, unit)


SCALES = (0.03, 0.1, 0.3, 1.0)


def _settings() -> Iterator[Setting]:
    """The base of each data set, and what is varied around it."""
    usual = {
        "fashion-mnist": Setting("fashion-mnist", 1000, 30),
        "mnist1d": Setting("mnist1d", 1000, 40),
        "digits": Setting("digits", 500, 40, held_out=400),
    }
    for base in usual.values():
        for scale in SCALES:
            yield _with(base, scale=scale)
        for scale in SCALES[2:]:  # with smaller ones nothing trains
            yield _with(base, depth=4, scale=scale)
        few = 200 if base.data == "digits" else base.images
        for scale in (0.1, 1.0):
            yield _with(base, scale=scale, noise=0.2)
            yield _with(base, scale=scale, images=few, imbalance=20.0)
            yield _with(base, scale=scale, optimizer="adamw")
    fashion, mnist1d = usual["fashion-mnist"], usual["mnist1d"]
    for scale in (0.1, 1.0):
        yield _with(fashion, scale=scale, images=5000, epochs=10)
        yield _with(fashion, scale=scale, epochs=100)  # to convergence
        yield _with(mnist1d, scale=scale, depth=4, images=5000, epochs=10)
        yield _with(mnist1d, scale=scale, depth=4, images=5000, epochs=30)  # to convergence
        for network in ("convolutions", "batch norm"):
            yield _with(fashion, scale=scale, network=network, epochs=20)


def _with(base: Setting, **changes: object) -> Setting:
    return replace(base, **changes)  # type: ignore[arg-type]


SETTINGS = tuple(_settings())
FAMILY = (
    Setting("fashion-mnist", 1000, 30, scale=0.1),
    Setting("mnist1d", 1000, 40, depth=4, scale=1.0),
    Setting("digits", 500, 40, held_out=400, scale=0.1),
)
"""Where every method is compared."""

MODES = tuple(one for one in SETTINGS if one.optimizer == "adamw" and one.data != "digits")
"""Where the penalty in the loss is compared, too."""


def cells() -> list[Cell]:
    """All of them, in the order in which they are run."""
    found = [Cell(setting, METHODS[name]) for setting in SETTINGS for name in CORE]
    found += [Cell(setting, METHODS["loss"]) for setting in MODES]
    others = [method for name, method in METHODS.items() if name not in CORE]
    found += [Cell(setting, method) for setting in FAMILY for method in others]
    return found
