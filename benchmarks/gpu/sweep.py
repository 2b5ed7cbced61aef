"""Which tiles suit the compiled kernels, within the time there is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.machine import brief, milliseconds, require_backend, using
from benchmarks.gpu.runner import NeedsCardError, Report
from benchmarks.shapes import MODELS
from benchmarks.timing import spread
from lightning_hsu._core import backend as backends
from lightning_hsu._core.foreach import add_pair_gradients
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu.measures import RieszEnergy

SECONDS = 60.0
MODELS_SWEPT = ("GPT-2 small", "ResNet-50")
TERM = RieszEnergy(s=2.0, half_space=True).pair_term()


class Tiles(NamedTuple):
    """Rows and columns of a tile, depth of a step of its product, warps, loads under way."""

    tile: int
    depth: int
    warps: int
    stages: int


# The present ones, then the most promising first: the sweep ends when time does.
CHOICES = (
    Tiles(64, 16, 4, 3),
    Tiles(128, 16, 8, 4),
    Tiles(64, 32, 4, 3),
    Tiles(128, 32, 8, 3),
    Tiles(64, 32, 4, 4),
    Tiles(64, 16, 4, 5),
    Tiles(128, 16, 8, 3),
    Tiles(64, 32, 8, 3),
    Tiles(128, 32, 8, 4),
    Tiles(32, 32, 4, 4),
)


@contextmanager
def tiled(tiles: Tiles) -> Iterator[None]:
    """Let the kernels work in such tiles within the block."""
    from lightning_hsu._core.triton import launch

    names = ("TILE", "DEPTH", "WARPS", "STAGES")
    before = [getattr(launch, name) for name in names]
    try:
        for name, value in zip(names, tiles, strict=True):
            setattr(launch, name, value)
        launch.forget_tables()
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(launch, name, value)
        launch.forget_tables()


def layers(name: str, device: str, *, quick: bool) -> list[GradientUpdate]:
    """A model's layers, with somewhere to add their gradients."""
    shapes = [(65, 20), (30, 33)] if quick else MODELS[name]()
    found = []
    for n, d in shapes:
        w = torch.randn(1, n, d, device=device)
        found.append(GradientUpdate(w, torch.zeros_like(w), 1.0))
    return found


def sweep(report: Report) -> None:
    """One row for each choice of tiles and model."""
    settings = report.settings
    require_backend("triton", settings.device)
    assert TERM is not None
    end = time.time() + SECONDS
    choices = CHOICES[:2] if settings.quick else CHOICES
    right: dict[str, list[Tensor]] = {}
    with using("triton"):
        trial = layers("", settings.device, quick=True)[0]
        if not backends.active().takes_update(trial, TERM):
            raise RuntimeError("the trial layer has failed: torch would be timed")
        for tiles in choices:
            if time.time() > end or report.seconds_left < 8:
                report.note(f"no time was left for {tiles} and what follows it")
                return
            with tiled(tiles):
                for name in MODELS_SWEPT[:1] if settings.quick else MODELS_SWEPT:
                    time_tiles(report, tiles, name, right)
    if settings.device == "cpu":
        raise NeedsCardError("the interpreter shows that tiles of any size are right, not fast")


def time_tiles(report: Report, tiles: Tiles, name: str, right: dict[str, list[Tensor]]) -> None:
    """Time one choice over one model's layers, and compare its results with the first one's."""
    device, quick = report.settings.device, report.settings.quick
    assert TERM is not None
    about = {"model": name, **tiles._asdict(), "back end": "triton"}
    torch.manual_seed(0)
    updates = layers(name, device, quick=quick)
    try:
        add_pair_gradients(updates, TERM)
        outs = [update.out.clone() for update in updates]
        times = []
        for _ in range(2 if quick else 10):
            times.append(milliseconds(lambda: add_pair_gradients(updates, TERM), device))
    except Exception as error:  # too much shared memory, say
        report.row(**about, error=brief(error))
        return
    expected = right.setdefault(name, outs)
    off = 0.0
    for out, wanted in zip(outs, expected, strict=True):
        off = max(off, float((out - wanted).norm() / wanted.norm()))
    report.row(**about, ms=spread(times), off_from_the_first=off)
