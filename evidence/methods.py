"""What is compared: weight decay alone, and every penalty beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from evidence.controls import Part, RandomDirection
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
        measure: What is minimised in hidden layers; the head takes the measure's own form for
            heads. None is weight decay.
        apply: As in the callback.
        share: A coefficient that follows the task instead of one that is tuned.
        tolerance: As in the callback.
        apart: Whether a layer of each network is a layer of its own, as it is with a share.
        coefficient: A coefficient that is not tuned.
        share_limit: As in the callback; the plan has none.
        keep: The half of the penalty's step that is kept, where only one is.
    """

    name: str
    title: str
    measure: Measure | None = None
    apply: Literal["gradient", "loss", "decoupled"] = "gradient"
    share: Share | None = None
    tolerance: float | None = None
    apart: bool = False
    coefficient: float | None = None
    share_limit: float | None = None
    keep: Part | None = None


HALF_MHE = RieszEnergy(s=2.0, half_space=True)


def _methods() -> Iterator[Method]:
    """All of them, in the order of the tables."""
    yield Method("decay", "weight decay only")
    yield Method("half_mhe_2", "half-space MHE, s = 2", HALF_MHE)
    yield Method("mgd", "MGD", GramDeterminant())
    yield Method("orthogonality", "orthogonality", Orthogonality())
    yield Method("share", "half-space MHE, s = 2, Share(0.05)", HALF_MHE, share=Share(0.05))
    yield Method("loss", "half-space MHE, s = 2, in the loss", HALF_MHE, apply="loss")
    yield Method("decoupled", "half-space MHE, s = 2, decoupled", HALF_MHE, apply="decoupled")
    yield Method("random", "random direction of equal length", RandomDirection(HALF_MHE))
    yield Method("direction", "MHE's direction alone", HALF_MHE, keep="direction")
    yield Method("length", "MHE's growth alone", HALF_MHE, keep="length")
    for half_space in (False, True):
        for distance in ("chordal", "geodesic"):
            for s in (0, 1, 2):
                method = _energy(s, half_space, distance)
                if method.measure != HALF_MHE:
                    yield method
    yield Method("mhs", "MHS", Separation())
    yield Method("mhp", "MHP", Polarization(witnesses=2, steps=3))
    yield Method("r_mhp", "R-MHP", ResultantLength())
    yield Method("mhc", "MHC", Covering(witnesses=2, steps=3))
    projected = Projected(HALF_MHE, RandomProjection(dim=20))
    yield Method("comhe", "CoMHE, random projection", projected)
    yield Method("koleo", "KoLeo", KoLeo())
    yield Method("mma", "MMA", MinimalAngle())


def _energy(s: int, half_space: bool, distance: Literal["chordal", "geodesic"]) -> Method:
    """Minimum hyperspherical energy under the paper's names."""
    name, title = f"mhe_{s}", f"MHE, s = {s}"
    if distance == "geodesic":
        name, title = f"mhe_a{s}", f"{title}, angular"
    if half_space:
        name, title = f"half_{name}", f"half-space {title}"
    measure = RieszEnergy(s=float(s), half_space=half_space, distance=distance)
    return Method(name, title, measure)


METHODS = {method.name: method for method in _methods()}

PENALTIES = ("half_mhe_2", "mgd", "orthogonality")
CONTROLS = ("random", "direction", "length", "decoupled")
"""Half-space MHE's gradient without what makes it a uniformity's, and the other way round."""

CORE = ("decay", *PENALTIES, *CONTROLS)
"""Compared in every setting."""


def matched(method: Method) -> dict[str, Method]:
    """Controls of a penalty's own gradient, to be tested where it is: with the same trial.

    None for what has no penalty in the gradient, or is a control itself.
    """
    if method.measure is None or method.apply != "gradient" or method.share is not None:
        return {}
    if method.keep is not None or isinstance(method.measure, RandomDirection):
        return {}
    return {
        "random": replace(method, measure=RandomDirection(method.measure)),
        "length": replace(method, keep="length"),
    }


@cache
def unit_coefficient(measure: Measure, n: int, d: int) -> float:
    """The coefficient whose gradients have root mean square 1 on n unit neurons in a cone.

    All cosines of the cone are about a half. So the strengths of all measures are numbers of one
    kind; the coefficient stays one for all layers, as a user sets it.
    """
    chance = torch.Generator().manual_seed(0)
    axis = torch.nn.functional.normalize(torch.randn(1, d, generator=chance), dim=-1)
    x = torch.nn.functional.normalize(torch.randn(n, d, generator=chance), dim=-1)
    x = torch.nn.functional.normalize(axis + x, dim=-1)
    grad = measure.value_and_grad(x, measure.prepare(x, None))[1]
    return 1.0 / float(grad.norm(dim=-1).square().mean().sqrt())
