"""The methods of ``python -m evidence.images``: presets, orthogonality, the default and controls."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, cast, get_args

import lightning.pytorch as pl
import torch
from torch import nn

from evidence.controls import Halves, Part, RandomDirection
from evidence.image_networks import neuron_layers
from lightning_hsu import HypersphericalUniformity
from lightning_hsu.measures import Measure, Orthogonality
from lightning_hsu.presets import PRESETS, sphere_uniformity

CONTROLLED = "half_mhe_2"
"""The preset that the controls are made of."""
CONTROLS = ("random", *get_args(Part))
METHODS = ("none", CONTROLLED, "mgd", "orthogonality", *CONTROLS, "default")
HAVE_OWN = ("mgd", "orthogonality", "default")
"""The other penalties of which controls can be made: mgd_random, mgd_direction and so on."""
OWN = tuple(f"{name}_{control}" for name, control in product(HAVE_OWN, CONTROLS))
CHOICES = tuple(dict.fromkeys([*METHODS, *OWN, *PRESETS]))


def parts_of(method: str) -> tuple[str, str | None]:
    """The penalty behind a method, and which control of it the method is; None for itself."""
    if method in CONTROLS:
        return CONTROLLED, method
    if method in OWN:
        name, _, control = method.rpartition("_")
        return name, control
    return method, None


class KeepHalf(pl.Callback):
    """Of the penalised step only the direction, or only the length; it stands before the penalty's.

    Args:
        keep: Which.
    """

    def __init__(self, keep: Part) -> None:
        self.keep = keep
        self._halves: Halves | None = None
        self._twin: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the twin, or go on with that of the checkpoint."""
        weights = [(layer.weight, 1) for layer in neuron_layers(pl_module)]
        self._halves = Halves(trainer.optimizers[0], weights, self.keep)
        if self._twin is not None:
            self._halves.twin.load_state_dict(self._twin)
            self._twin = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Show the twin the task's gradients, clipped as they would be without a penalty."""
        assert self._halves is not None
        self._halves.before_penalty()
        if trainer.gradient_clip_val:
            twins = [p for group in self._halves.twin.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(twins, trainer.gradient_clip_val)

    def on_train_batch_end(self, *_: Any) -> None:
        """Put the halves together, before anything is measured."""
        assert self._halves is not None
        self._halves.after_step()

    def state_dict(self) -> dict[str, Any]:
        """The twin's moments."""
        assert self._halves is not None
        return {"twin": self._halves.twin.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until the training starts."""
        self._twin = state_dict["twin"]


def penalty(method: str, network: nn.Module) -> HypersphericalUniformity | None:
    """The callback that acts in a method, a random one for a random direction; None for none.

    Args:
        method: Of :data:`CHOICES`. Controls that keep a half of the penalised step act by its whole:
            what :class:`KeepHalf` leaves of it is in :func:`callbacks`.
        network: With its initial weights, to which orthogonality's coefficients are matched.
    """
    name, control = parts_of(method)
    if name == "none":
        return None
    found = _penalty(name, network)
    if control == "random":
        found.measure = RandomDirection(found.measure)
    return found


def _penalty(name: str, network: nn.Module) -> HypersphericalUniformity:
    if name == "default":
        return HypersphericalUniformity(verbose=False)
    if name == "orthogonality":
        hidden, head = matched_coefficients(Orthogonality(), network)
        return HypersphericalUniformity(
            Orthogonality(),
            hidden,
            head_coefficient=head,
            step_limit=None,
            share_limit=None,
            verbose=False,
        )
    return sphere_uniformity(name, verbose=False)


def callbacks(method: str, network: nn.Module) -> list[pl.Callback]:
    """All callbacks of a method, in the order in which they act."""
    found: list[pl.Callback] = []
    control = parts_of(method)[1]
    if control in get_args(Part):
        found.append(KeepHalf(cast(Part, control)))
    acting = penalty(method, network)
    if acting is not None:
        found.append(acting)
    return found


def matched_coefficients(measure: Measure, network: nn.Module) -> tuple[float, float]:
    """Coefficients of hidden layers and head at which gradients are as long as those of the preset.

    They are compared at the weights that the network has, over all hidden layers together.
    """
    preset = sphere_uniformity(CONTROLLED, verbose=False)
    strengths = cast(tuple[float, float], (preset.coefficient, preset.head_coefficient))
    *hidden, head = neuron_layers(network)
    wanted = strengths[0] * _length(preset.measure, hidden)
    wanted_head = strengths[1] * _length(preset.measure.for_head(), [head])
    return (
        wanted / _length(measure, hidden),
        wanted_head / _length(measure.for_head(), [head]),
    )


def _length(measure: Measure, layers: list[nn.Conv2d | nn.Linear]) -> float:
    """The norm of a measure's gradient in all layers together."""
    total = 0.0
    for layer in layers:
        x = layer.weight.detach().flatten(1)
        grad = measure.value_and_grad(x, measure.prepare(x))[1]
        total += float(grad.double().square().sum())
    return math.sqrt(total)
