"""Pictures while training: when they are due, and how they get to each logger."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_hsu._checks import check_count
from lightning_hsu._figures.history import Angles, History, angles_of
from lightning_hsu._figures.loggers import save_png, way_to
from lightning_hsu.regularizer import UniformityRegularizer

if TYPE_CHECKING:  # matplotlib is imported only when something is drawn
    from lightning_hsu._figures.draw import Figure

PANELS = 6
"""Layers whose angles are shown."""

_RATIO: dict[str, Any] = {
    "title": "Ratio to random neurons",
    "detail": "a layer's energy over that of as many random neurons; above 1 it is more redundant than chance",
    "reference": (1.0, "as random"),
}
_SHARE: dict[str, Any] = {
    "title": "Gradient share",
    "detail": "norm of the penalty's gradient over the norm of the task's, by layer, before each step that was logged",
}


class Gallery:
    """Draws the history of a fit at an interval and gives the figures to all loggers.

    Args:
        prefix: What the figures' names begin with.
        every_n_steps: Optimizer steps between two sets; None draws nothing and keeps nothing.

    Raises:
        ValueError: for an interval below 1.
        ImportError: without matplotlib.
    """

    def __init__(self, prefix: str, every_n_steps: int | None) -> None:
        if every_n_steps is not None:
            check_count("figures_every_n_steps", every_n_steps)
            try:
                import_module("lightning_hsu._figures.draw")
            except ImportError as error:
                raise ImportError(
                    'figures_every_n_steps needs matplotlib: pip install "lightning-hsu[figures]"'
                ) from error
        self.prefix, self.every_n_steps = prefix, every_n_steps
        self.begin()

    def begin(self) -> None:
        """Forget an earlier fit."""
        self.history, self._shown_at, self._warned = History(), -1, set[str]()

    def wanted(self, trainer: pl.Trainer) -> bool:
        """Whether there are to be figures in this fit; a barebones Trainer leaves out all that costs time."""
        return self.every_n_steps is not None and not trainer.barebones

    def due(self, trainer: pl.Trainer, seen_step: int) -> bool:
        """Whether optimizer steps since ``seen_step`` have reached the interval; a batch may have several."""
        every = self.every_n_steps
        return (
            every is not None
            and self.wanted(trainer)
            and trainer.global_step // every > seen_step // every
        )

    def show(self, trainer: pl.Trainer, regularizer: UniformityRegularizer) -> None:
        """Draw and send, once a step; where ranks share the weights, all must call it."""
        if self._shown_at == trainer.global_step:
            return
        self._shown_at = trainer.global_step
        worst: list[str] = trainer.strategy.broadcast(
            self.history.worst(PANELS)
        )  # by what rank zero measured
        angles = self._angles(regularizer, worst, draws=trainer.is_global_zero)
        if trainer.is_global_zero:
            for tag, draw in self._drawings(angles).items():
                with self._guarded(f"drawing {tag}", "no figure of it"):
                    self._send(trainer, f"{self.prefix}/{tag}", draw())

    @torch.no_grad()
    def _angles(
        self, regularizer: UniformityRegularizer, names: list[str], *, draws: bool
    ) -> list[Angles]:
        """The angles in layers: all ranks read them, one at a time, and one that draws counts."""
        layers, found = {layer.target.name: layer for layer in regularizer.layers}, list[Angles]()
        with regularizer.gathered():
            for name in names:
                x = layers[name].target.neurons().detach()
                if draws:
                    with self._guarded(f"counting the angles of '{name}'", "it is left out"):
                        found.append(
                            angles_of(layers[name], x, self.history.records[-1].ratios[name])
                        )
        return found

    def _drawings(self, angles: list[Angles]) -> dict[str, Callable[[], Figure]]:
        """What there is to draw, by tag."""
        from lightning_hsu._figures import draw

        ratios, shares = self.history.ratios(), self.history.shares()
        found: dict[str, Callable[[], Figure]] = {}
        if self.history.worst(1):  # some layer has a ratio
            found["ratio"] = lambda: draw.over_time(ratios, **_RATIO)
        if angles:
            found["angles"] = lambda: draw.of_angles(angles)
        if shares:
            found["gradient_share"] = lambda: draw.over_time(shares, **_SHARE)
        return found

    def _send(self, trainer: pl.Trainer, tag: str, figure: Figure) -> None:
        """Give a figure to every logger, and write a file where one cannot take it or there is none."""
        step, folder = trainer.global_step, os.path.join(trainer.default_root_dir, "hsu_figures")
        ways = [(logger, way_to(logger)) for logger in trainer.loggers]
        for i, (logger, way) in enumerate(ways):
            name = type(logger).__name__
            if way is None:
                self._warn(
                    f"{name} {i}",
                    f"{name} is not known to take figures: they are PNG files in {folder}",
                )
            else:
                with self._guarded(
                    f"logger {i}, {name},", "it goes without figures where that happens"
                ):
                    way(logger, tag, figure, step)
        if any(way is None for _, way in ways) or not (
            ways or getattr(trainer, "fast_dev_run", False)
        ):
            with self._guarded(f"writing into {folder}", "there are no figures"):
                save_png(folder, tag, figure, step)

    @contextmanager
    def _guarded(self, what: str, consequence: str) -> Iterator[None]:
        """Warn once of an error in a picture, which is no reason to stop training."""
        try:
            yield
        except Exception as error:
            self._warn(
                what,
                f"figures: {what} failed with {type(error).__name__}: {error}; {consequence}, training goes on",
            )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            rank_zero_warn(message)
