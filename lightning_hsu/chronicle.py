"""What is told of a fit beside its metrics: figures while it trains, and a table of before and after at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_hsu._figures.recorder import FigureRecorder
from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu._monitor.tables import BeforeAfter
from lightning_hsu.regularizer import UniformityRegularizer


class Chronicle:
    """Keeps what is measured in one fit, in plain numbers, and tells of it.

    Where ranks share the weights, all must call its methods.

    Args:
        gallery: Draws the figures.
    """

    def __init__(self, gallery: FigureRecorder) -> None:
        self.gallery = gallery
        self.begin()

    def begin(self) -> None:
        """Forget an earlier fit."""
        self._before_after = BeforeAfter()
        self.gallery.begin()

    def start(self, trainer: pl.Trainer, regularizer: UniformityRegularizer, verbose: bool) -> None:
        """Measure before the first step, where the weights are there already, for what will be told."""
        if regularizer.layers and (verbose or self.gallery.wanted(trainer)):
            self.note(trainer, regularizer.measure_layers(), {})

    def note(
        self, trainer: pl.Trainer, measured: Sequence[LayerUniformity], shares: Mapping[str, float]
    ) -> None:
        """Keep a measurement, and the gradient shares of its step."""
        self._before_after.note(trainer.global_step, measured)
        if self.gallery.wanted(trainer):
            self.gallery.history.note(trainer.global_step, measured, shares)

    def conclude(
        self, trainer: pl.Trainer, regularizer: UniformityRegularizer, verbose: bool
    ) -> None:
        """Draw once more, and print how each layer stood and stands."""
        draws = self.gallery.wanted(trainer)
        if not regularizer.layers or not (verbose or draws):
            return
        measured = (
            regularizer.measure_layers()
        )  # another callback may have changed the weights, as averaging does
        self.note(trainer, measured, {})
        if draws:
            self.gallery.show(trainer, regularizer.layers, regularizer.gathered)
        if verbose and trainer.is_global_zero:
            rank_zero_info(
                self._before_after.table(trainer.global_step, regularizer.layers, measured)
            )
