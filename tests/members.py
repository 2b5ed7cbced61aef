"""Every member of the family, in several settings each."""

from dataclasses import dataclass

from lightning_hsu.measures import (
    Covering,
    GaussianPotential,
    GramDeterminant,
    KoLeo,
    MinimalAngle,
    Orthogonality,
    PairwiseMeasure,
    Polarization,
    ResultantLength,
    RieszEnergy,
    Sampled,
    Separation,
    SlicedWasserstein,
)
from lightning_hsu.projections import (
    Adversarial,
    AnglePreserving,
    GroupProjection,
    Projected,
    RandomProjection,
)


@dataclass(frozen=True)
class InverseFourth(PairwiseMeasure):
    """A measure from outside the package: one dataclass with one method."""

    half_space: bool = False

    def kernel(self, q, p):
        return q**-2, -2 * q**-3


FAMILY = [
    RieszEnergy(s=0),
    RieszEnergy(s=1),
    RieszEnergy(s=2),
    RieszEnergy(s=2.5, half_space=True),
    RieszEnergy(s=-1),
    RieszEnergy(s=1, distance="geodesic"),
    RieszEnergy(s=2, half_space=True, distance="geodesic"),
    GaussianPotential(),
    GaussianPotential(t=30, half_space=True),
    InverseFourth(),
    Sampled(RieszEnergy(s=1)),
    Separation(),
    Separation(half_space=True),
    MinimalAngle(),
    KoLeo(),
    KoLeo(softening=0.0),
    Polarization(),
    Polarization(s=0),
    Polarization(s=1, half_space=True),
    Covering(),
    Covering(half_space=True),
    GramDeterminant(),
    GramDeterminant(bandwidth=0.5, half_space=True),
    ResultantLength(),
    Orthogonality("so"),
    Orthogonality("dso"),
    Orthogonality("mc"),
    Orthogonality("srip"),
    SlicedWasserstein(circles=8),
    Projected(RieszEnergy(s=1), RandomProjection(dim=3, count=2)),
    Projected(GaussianPotential(half_space=True), GroupProjection(dim=2)),
    Projected(RieszEnergy(s=2, half_space=True), AnglePreserving(dim=3)),
    Projected(Separation(), Adversarial(dim=3, steps=2)),
    Projected(Covering(), RandomProjection(dim=2)),
]
# Their frame is drawn or learned from a drawn start: a rotated layer meets another frame.
FRAMED = (SlicedWasserstein, Projected)
SEARCHING = (Polarization, Covering)


def name_of(measure):
    return repr(measure).replace("(", " ").replace(")", "")
