"""What has become of the layers of a model that was changed under way."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_hsu._engine.layer import Layer
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu._neurons.model import UNUSED
from lightning_hsu._neurons.select import TIED

Shape = tuple[int, int, int]


@dataclass
class Change:
    """What has become of layers.

    Attributes:
        added: Shapes (groups, n, d) of the layers that were not measured before, by name.
        renewed: Those of the layers that have other parameters now.
        origins: Names that layers' weights had before, by the names that they have now; fresh
            weights had none.
        renamed: New names of layers, by the old ones.
        gone: Shapes of the layers that are no longer in the model.
        lost: Why layers that are in the model can no longer be measured, by name.
    """

    added: dict[str, Shape] = field(default_factory=dict)
    renewed: dict[str, Shape] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    gone: dict[str, Shape] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything has changed."""
        return any((self.added, self.renewed, self.renamed, self.gone, self.lost))

    def add(self, later: Change) -> None:
        """Take what has changed later into account; origins are of one change only."""
        self.added |= later.added
        self.renewed |= later.renewed
        self.renamed |= later.renamed
        self.gone |= later.gone
        self.lost |= later.lost


def compare(
    before: Sequence[Layer], now: Sequence[Layer], skips: Sequence[Skip], model: nn.Module
) -> Change:
    """What has become of layers.

    Args:
        before: The layers that were measured.
        now: Those that are measured now.
        skips: The weights that are not measured now.
        model: The model as it is now.
    """
    change = Change()
    old = {layer.name: layer for layer in before}
    known = {_weights(layer): layer.name for layer in before}
    new: dict[Hashable, Layer] = {}
    for layer in now:
        if _weights(layer) in known:
            change.origins[layer.name] = known[_weights(layer)]
        same = old.pop(layer.name, None)
        if same is None:
            new[_weights(layer)] = layer
        elif _weights(same) != _weights(layer):
            change.renewed[layer.name] = layer.target.shape
            if same.parameters and not layer.parameters:
                change.lost[layer.name] = (
                    "no parameter is behind it any more, which a gradient reaches"
                )
    for name, layer in old.items():
        moved = new.pop(_weights(layer), None)
        if moved is not None:
            change.renamed[name] = moved.name
            continue
        reasons = _reasons(layer, skips, model)
        if reasons is None:
            change.gone[name] = layer.target.shape
        else:
            change.lost |= reasons
    change.added = {layer.name: layer.target.shape for layer in new.values()}
    return change


def _weights(layer: Layer) -> Hashable:
    """Equal for the same neurons, whatever the layer is called."""
    return tuple(map(id, layer.parameters)), layer.target.key


def _reasons(layer: Layer, skips: Sequence[Skip], model: nn.Module) -> Mapping[str, str] | None:
    """Why a layer is no longer measured, by name of its weights; None if it has left the model."""
    own = {id(p) for p in layer.parameters}
    names = [name for name, p in model.named_parameters() if id(p) in own]
    found = {}
    tied = False
    for skip in skips:
        in_its_place = f"{skip.name}.".startswith(f"{layer.name}.")
        has_its_weights = any(f"{name}.".startswith(f"{skip.name}.") for name in names)
        if not in_its_place and not has_its_weights:
            continue
        if skip.reason == UNUSED or skip.reason.startswith(TIED):  # measured elsewhere
            tied = True
        else:
            found[skip.name] = skip.reason
    if found or tied:
        return found
    return None
