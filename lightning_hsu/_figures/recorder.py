"""Figures during training: when they are due, what they show and which loggers get them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_hsu._checks import check_count
from lightning_hsu._engine.layer import Layer
from lightning_hsu._figures.history import Angles, History, angles_of
from lightning_hsu._figures.loggers import save_png, sender_for

if TYPE_CHECKING:  # matplotlib is imported only when something is drawn
    from lightning_hsu._figures.draw import Figure

PANELS = 6
"""Layers whose angles are shown."""

_RATIO: dict[str, Any] = {
    "title": "Ratio to random neurons",
    "detail": "a layer's energy over that of as many random neurons; above 1 it is more redundant "
    "than chance",
    "reference": (1.0, "as random"),
}
_SHARE: dict[str, Any] = {
    "title": "Gradient share",
    "detail": "norm of the penalty's gradient over the norm of the task's, by layer, before each "
    "step that was logged",
}


@dataclass
class _FiguresOfFit:
    """What belongs to one fit; made anew for each.

    Attributes:
        history: What was measured.
        shown_at: Global step of the last figures.
        warned: What was warned of.
    """

    history: History = field(default_factory=History)
    shown_at: int = -1
    warned: set[str] = field(default_factory=set)


class FigureRecorder:
    """Draws the history of a fit at an interval and sends the figures to every logger.

    Args:
        prefix: What the figures' names begin with.
        every_n_steps: Optimizer steps between two sets of figures, >= 1; None draws and keeps none.

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
        self.prefix = prefix
        self.every_n_steps = every_n_steps
        self.begin()

    def begin(self) -> None:
        """Start a new fit: forget the last one."""
        self._fit = _FiguresOfFit()

    @property
    def history(self) -> History:
        """What was measured in this fit."""
        return self._fit.history

    def wanted(self, trainer: pl.Trainer) -> bool:
        """Return whether this fit has figures; a barebones Trainer has none."""
        return self.every_n_steps is not None and not trainer.barebones

    def due(self, trainer: pl.Trainer, seen_step: int) -> bool:
        """Return whether a multiple of the interval was reached after global step ``seen_step``.

        A batch may have several optimizer steps, and so skip the multiple itself.
        """
        if self.every_n_steps is None or not self.wanted(trainer):
            return False
        return trainer.global_step // self.every_n_steps > seen_step // self.every_n_steps

    def show(
        self,
        trainer: pl.Trainer,
        layers: Sequence[Layer],
        gathered: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Draw and send a set of figures, at most once per global step.

        Args:
            trainer: The trainer, whose loggers get the figures.
            layers: The layers.
            gathered: Makes a context in which the layers' neurons can be read. Where ranks share
                the weights, all must call ``show``.
        """
        if self._fit.shown_at == trainer.global_step:
            return
        self._fit.shown_at = trainer.global_step
        # All ranks read the same layers: the worst that rank zero measured.
        worst: list[str] = trainer.strategy.broadcast(self.history.worst(PANELS))
        with torch.no_grad(), gathered():
            angles = self._angles(layers, worst, count=trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        for tag, draw in self._drawings(angles).items():
            with self._errors_warn(f"drawing {tag}", "this figure is left out"):
                self._send(trainer, f"{self.prefix}/{tag}", draw())

    def _angles(self, layers: Sequence[Layer], names: list[str], *, count: bool) -> list[Angles]:
        """The angles in the named layers: every rank reads the neurons, and counts if told to."""
        targets = {layer.target.name: layer.target for layer in layers}
        found = []
        for name in names:
            x = targets[name].neurons().detach()  # (groups, n, d)
            if not count:
                continue
            with self._errors_warn(f"counting the angles of '{name}'", "this layer is left out"):
                ratio = self.history.records[-1].ratios[name]
                found.append(angles_of(name, x, ratio))
        return found

    def _drawings(self, angles: list[Angles]) -> dict[str, Callable[[], Figure]]:
        """Functions that draw what there is to draw, by tag."""
        from lightning_hsu._figures import draw

        drawings: dict[str, Callable[[], Figure]] = {}
        if self.history.worst(1):  # some layer has a ratio
            drawings["ratio"] = partial(draw.over_time, self.history.ratios(), **_RATIO)
        if angles:
            drawings["angles"] = partial(draw.angle_panels, angles)
        shares = self.history.shares()
        if shares:
            drawings["gradient_share"] = partial(draw.over_time, shares, **_SHARE)
        return drawings

    def _send(self, trainer: pl.Trainer, tag: str, figure: Figure) -> None:
        """Send a figure to every logger; save it to a file if one cannot take it or none exists."""
        step = trainer.global_step
        folder = os.path.join(trainer.default_root_dir, "hsu_figures")
        to_folder = not trainer.loggers and not getattr(trainer, "fast_dev_run", False)
        for i, logger in enumerate(trainer.loggers):
            name = type(logger).__name__
            send = sender_for(logger)
            if send is None:
                to_folder = True
                self._warn(
                    f"{name} {i}",
                    f"{name} is not known to take figures: they are saved as PNG files in {folder}",
                )
                continue
            with self._errors_warn(f"logger {i}, {name},", "it does not get this figure"):
                send(logger, tag, figure, step)
        if to_folder:
            with self._errors_warn(f"writing to {folder}", "no figures are saved there"):
                save_png(folder, tag, figure, step)

    @contextmanager
    def _errors_warn(self, what: str, consequence: str) -> Iterator[None]:
        """Turn an error into a warning, once for each ``what``: a figure never stops training."""
        try:
            yield
        except Exception as error:
            self._warn(
                what,
                f"figures: {what} failed with {type(error).__name__}: {error}; {consequence}, "
                "training continues",
            )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._fit.warned:
            self._fit.warned.add(key)
            rank_zero_warn(message)
