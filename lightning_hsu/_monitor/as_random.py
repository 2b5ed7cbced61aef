"""Whether the penalty has anything to do: layers that are as random for a whole epoch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from lightning_hsu._monitor.measure import LayerUniformity

_CLOSE = 0.005  # a ratio this close to 1 is written as 1.00, or one digit beside it
_SPREAD = (
    0.5  # score from which neurons are more even than random although their ratio is close to 1
)
_FEWEST = 2  # measurements that make an epoch


class AsRandom:
    """Looks at what is measured anyway, and tells once of an epoch in which nothing was to be done.

    Attributes:
        is_crowded: Whether any layer was more redundant than random neurons when last measured.

    Example:
        >>> from lightning_hsu._monitor.measure import LayerUniformity
        >>> layer = LayerUniformity("fc", 1, 64, 512, 0.5, 0.5, 1.001, 0.1, 80.0, 0, 0, True)
        >>> epoch = AsRandom()
        >>> epoch.note([layer], ["fc"])
        >>> epoch.note([layer], ["fc"])
        >>> epoch.end_epoch()[:46]
        "in a whole epoch layer 'fc' was as random (rat"
    """

    def __init__(self) -> None:
        self.is_crowded = False
        self._is_told = False
        self._measurements = 0
        self._is_random = True
        self._names: list[str] = []
        self._ratios: list[float] = []  # the least and the largest of the epoch

    def note(self, measured: Sequence[LayerUniformity], penalised: Collection[str]) -> None:
        """Note a measurement.

        Args:
            measured: The layers.
            penalised: Names of those with a penalty; the others do not count.
        """
        ratios = []
        names = []
        is_random = True
        for layer in measured:
            if layer.name not in penalised or not math.isfinite(layer.ratio):
                continue
            names.append(layer.name)
            ratios.append(layer.ratio)
            is_spread = layer.score >= _SPREAD  # False for a score of NaN
            is_random &= abs(layer.ratio - 1.0) <= _CLOSE and not is_spread
        self.is_crowded = max(ratios, default=1.0) > 1.0 + _CLOSE
        self._is_random &= is_random and bool(ratios)
        self._measurements += 1
        self._names = names
        if ratios:
            ratios += self._ratios
            self._ratios = [min(ratios), max(ratios)]

    def end_epoch(self) -> str | None:
        """Begin a new epoch; return what to tell of the one that ends, once."""
        is_random = self._is_random and self._measurements >= _FEWEST
        text = None
        if is_random and not self._is_told:
            self._is_told = True
            text = self._text()
        self._measurements = 0
        self._is_random = True
        self._ratios = []
        return text

    def _text(self) -> str:
        """Say that the penalty has little to do."""
        least, largest = self._ratios
        layers = f"layer '{self._names[0]}' was"
        if len(self._names) > 1:
            layers = f"all {len(self._names):,} layers with a penalty were"
        return (
            f"in a whole epoch {layers} as random (ratios {least:.3f} to {largest:.3f} at "
            f"{self._measurements:,} measurements): the penalty has little to do here"
        )
