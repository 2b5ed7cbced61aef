"""Whether the penalty has anything to do: layers that are as random for a whole epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_hsu._checks import listed
from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu._monitor.text import Verdict, verdict
from lightning_hsu.measures import Measure

_FEWEST = 2  # measurements that make an epoch


@dataclass
class _Epoch:
    """One layer in an epoch.

    Attributes:
        measurements: How often it was measured.
        is_random: Whether it was as random each time.
        least: Its least ratio.
        largest: Its largest ratio.
    """

    measurements: int = 0
    is_random: bool = True
    least: float = math.inf
    largest: float = -math.inf

    def note(self, layer: LayerUniformity, found: Verdict) -> None:
        """Note a measurement and its verdict."""
        self.measurements += 1
        self.is_random &= found == "random"
        self.least = min(self.least, layer.ratio)
        self.largest = max(self.largest, layer.ratio)


class AsRandom:
    """Looks at what is measured anyway, and tells of layers for which there was nothing to be done.

    That is told once of the first layers that were as random for an epoch, and once when all are; of the
    first epoch never, since fresh weights are random.

    Attributes:
        is_crowded: Whether any layer was more redundant than random neurons when last measured.

    Example:
        >>> from lightning_hsu._monitor.measure import LayerUniformity
        >>> from lightning_hsu.measures import RieszEnergy
        >>> layer = LayerUniformity("fc", 1, 64, 512, 0.5, 0.5, 1.001, 0.1, 80.0, 0, 0, True)
        >>> epoch = AsRandom()
        >>> epoch.end_epoch()  # the first one
        >>> epoch.note([layer], {"fc": RieszEnergy(s=2)})
        >>> epoch.note([layer], {"fc": RieszEnergy(s=2)})
        >>> epoch.end_epoch()[:46]
        "in a whole epoch layer 'fc' was as random (rat"
    """

    def __init__(self) -> None:
        self.is_crowded = False
        self._is_first = True
        self._has_told_some = False
        self._has_told_all = False
        self._layers: dict[str, _Epoch] = {}

    def note(self, measured: Sequence[LayerUniformity], penalised: Mapping[str, Measure]) -> None:
        """Note a measurement.

        Args:
            measured: The layers.
            penalised: The measures of those with a penalty, by name; the others do not count.
        """
        self.is_crowded = False
        for layer in measured:
            if layer.name not in penalised or not math.isfinite(layer.ratio):
                continue
            found = verdict(layer, penalised[layer.name])
            self.is_crowded |= found == "above"
            self._layers.setdefault(layer.name, _Epoch()).note(layer, found)

    def end_epoch(self) -> str | None:
        """Begin a new epoch; return what is to be told of the one that ends."""
        layers = self._layers
        self._layers = {}
        if self._is_first:
            self._is_first = False
            return None
        random = {}
        for name, one in layers.items():
            if one.is_random and one.measurements >= _FEWEST:
                random[name] = one
        are_all = len(random) == len(layers)
        if not random or self._has_told_all or (self._has_told_some and not are_all):
            return None
        self._has_told_some = True
        self._has_told_all = are_all
        return _text(random, len(layers))


def _text(random: dict[str, _Epoch], count: int) -> str:
    """Say that the penalty has little to do.

    Args:
        random: The layers that are as random, by name.
        count: How many layers with a penalty there are.
    """
    least = min(one.least for one in random.values())
    largest = max(one.largest for one in random.values())
    measurements = max(one.measurements for one in random.values())
    how = f"as random (ratios {least:.3f} to {largest:.3f} at {measurements:,} measurements)"
    named = listed([f"'{name}'" for name in random])
    if count == 1:
        told = f"in a whole epoch layer {named} was {how}: the penalty has little to do here"
    elif len(random) == count:
        told = f"in a whole epoch all {count:,} layers with a penalty were {how}: it has little to do here"
    else:
        told = (
            f"in a whole epoch {len(random):,} of {count:,} layers with a penalty were {how}: it has "
            f"little to do in {named}"
        )
    return f"{told}, or it has done it: a training with coefficient=0 tells which"
