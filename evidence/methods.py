"""What is compared: weight decay alone, and every penalty beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from lightning_hsu import Share
from lightning_hsu.measures import (
    Covering,
    GramDeterminant,
    KoLeo,
    Measure,
    MinimalAngle,
    Orthogonality,
    Polarization,
    ResultantLength,
    RieszEnergy,
    Separation,
)
from lightning_hsu.projections import Projected, RandomProjection


@dataclass(frozen=True)
class Method:
    """A penalty and how it is applied.

    Args:
        name: In results.
        title: In tables.
        measure: What is minimised in hidden layers; the head takes the measure's own form for heads. None is weight decay.
        apply: As in the callback.
        share: A coefficient that follows the task instead of one that is tuned.
    """

    name: str
    title: str
    measure: Measure | None = None
    apply: Literal["gradient", "loss", "decoupled"] = "gradient"
    share: Share | None = None


HALF_MHE = RieszEnergy(s=2.0, half_space=True)

METHODS = {
    method.name: method
    for method in (
        Method("decay", "weight decay only"),
        Method("half_mhe_2", "half-space MHE, s = 2", HALF_MHE),
        Method("mgd", "MGD", GramDeterminant()),
        Method("orthogonality", "orthogonality", Orthogonality()),
        Method("share", "half-space MHE, s = 2, Share(0.05)", HALF_MHE, share=Share(0.05)),
        Method("loss", "half-space MHE, s = 2, in the loss", HALF_MHE, apply="loss"),
        Method("decoupled", "half-space MHE, s = 2, decoupled", HALF_MHE, apply="decoupled"),
        *(
            Method(
                f"{'half_' * half}mhe_{'a' * (distance == 'geodesic')}{s}",
                f"{'half-space ' * half}MHE, s = {s}{', angular' * (distance == 'geodesic')}",
                RieszEnergy(s=float(s), half_space=half, distance=distance),
            )
            for half in (False, True)
            for distance in ("chordal", "geodesic")
            for s in (0, 1, 2)
            if (half, distance, s) != (True, "chordal", 2)
        ),
        Method("mhs", "MHS", Separation()),
        Method("mhp", "MHP", Polarization(witnesses=2, steps=3)),
        Method("r_mhp", "R-MHP", ResultantLength()),
        Method("mhc", "MHC", Covering(witnesses=2, steps=3)),
        Method("comhe", "CoMHE, random projection", Projected(HALF_MHE, RandomProjection(dim=20))),
        Method("koleo", "KoLeo", KoLeo()),
        Method("mma", "MMA", MinimalAngle()),
    )
}

CORE = ("decay", "half_mhe_2", "mgd", "orthogonality", "share")
"""Compared in every setting."""


@cache
def unit_coefficient(measure: Measure, n: int, d: int) -> float:
    """The coefficient that gives n unit neurons in a cone, all cosines about a half, gradients of root mean square 1.

    So the strengths of all measures are numbers of one kind; the coefficient stays one for all layers, as a user sets it.
    """
    chance = torch.Generator().manual_seed(0)
    axis, x = (
        torch.nn.functional.normalize(torch.randn(rows, d, generator=chance), dim=-1)
        for rows in (1, n)
    )
    x = torch.nn.functional.normalize(axis + x, dim=-1)
    grad = measure.value_and_grad(x, measure.prepare(x, None))[1]
    return 1.0 / float(grad.norm(dim=-1).square().mean().sqrt())
