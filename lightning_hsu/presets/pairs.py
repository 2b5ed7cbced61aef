"""The published formulas over pairs of neurons: energy, separation, Gram determinant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_hsu._checks import check_flag
from lightning_hsu.measures.state import State
from lightning_hsu.presets.base import OfficialMeasure, normalised, pair_cosines

Power = Literal["0", "1", "2", "a0", "a1", "a2"]
# Of the squared chord D or of A = angle / pi + 1e-4; 0 stands for the logarithm.
_EXPONENTS: dict[Power, float] = {
    "0": 0.0,
    "1": -0.5,
    "2": -1.0,
    "a0": 0.0,
    "a1": -1.0,
    "a2": -2.0,
}


@dataclass(frozen=True)
class OfficialMHE(OfficialMeasure):
    """Hyperspherical energy as ``wy1iu/MHE`` computes it (code/architecture.py).

    The mean over unordered pairs, with ``D = 2 - 2 cos`` and ``A = angle / pi + 1e-4``:

    ====  ===============  ====  =========
    0     -log D           a0    -log A
    1     D ** -0.5        a1    1 / A
    2     1 / D            a2    1 / A**2
    ====  ===============  ====  =========

    :class:`~lightning_hsu.measures.RieszEnergy` takes the logarithm of the distance for s = 0, not
    of its square, and the angle in radians. It does not depend on the norms of the neurons, and it
    separates coincident neurons.

    Args:
        power: "0", "1", "2", "a0", "a1" or "a2".
        half_space: Measure the 2n neurons ``w`` and ``-w``.

    Raises:
        ValueError: for an unknown power or a half_space that is not a bool.

    Example:
        >>> import torch
        >>> float(OfficialMHE("2", half_space=False)(100 * torch.eye(4)))  # orthogonal: D = 2
        0.5
    """

    power: Power = "2"
    half_space: bool = True

    def __post_init__(self) -> None:
        if self.power not in _EXPONENTS:
            raise ValueError(f"power must be one of {', '.join(_EXPONENTS)}; got {self.power!r}")
        check_flag("half_space", self.half_space)

    def formula(self, w: Tensor, state: State) -> Tensor:
        """Mean kernel of all pairs."""
        cosine = pair_cosines(normalised(w), half_space=self.half_space)
        distance = 2.0 - 2.0 * cosine
        if self.power.startswith("a"):
            distance = cosine.acos() / math.pi + 1e-4
        exponent = _EXPONENTS[self.power]
        if exponent == 0.0:
            return -distance.log().mean(-1)
        return distance.pow(exponent).mean(-1)

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """Energy over that of random neurons; for a logarithm, of geometric mean distances."""
        if self.power == "0":  # the logarithm of squares
            return ((value - reference) * 0.5).exp()
        if self.power == "a0":
            return (value - reference).exp()
        return value / reference


@dataclass(frozen=True)
class OfficialMHS(OfficialMeasure):
    """Separation as ``wy1iu/Sphere-Uniformity`` computes it (mhs/architecture.py).

    Training minimises minus the smallest squared chord, summed over the pairs that attain it. In
    half space each pair occurs twice, (w, v) and (-w, -v), so the published coefficient of 0.1 acts
    as 0.2. Rows are normalised twice.

    ``Separation`` of :mod:`lightning_hsu.measures` is the smallest angle itself. It counts each
    pair once and does not depend on the norms.

    Args:
        half_space: Measure the 2n neurons ``w`` and ``-w``.

    Raises:
        ValueError: for a half_space that is not a bool.

    Example:
        >>> import torch
        >>> x = torch.tensor([[4.0, 0.0], [4.0, 3.0]])
        >>> print(f"{OfficialMHS()(x):.2f}")  # twice 2 - 2 * 0.8
        0.80
    """

    higher_is_better: ClassVar[bool] = True
    half_space: bool = True

    def __post_init__(self) -> None:
        check_flag("half_space", self.half_space)

    def formula(self, w: Tensor, state: State) -> Tensor:
        """Minus the smallest squared chord, ties summed."""
        squared = 2.0 - 2.0 * pair_cosines(normalised(normalised(w)), half_space=self.half_space)
        smallest = squared.detach().amin(-1, keepdim=True)
        return -torch.where(squared == smallest, squared, 0.0).sum(-1)


@dataclass(frozen=True)
class OfficialMGD(OfficialMeasure):
    """Gram determinant as ``wy1iu/Sphere-Uniformity`` computes it (mgd/architecture.py).

    Training minimises ``-log det(exp(-D) + 1e-6 I)`` with ``D = 2 - 2 cos``, not divided by the
    number of neurons. Rows are normalised twice, so that the diagonal is a little below 1.

    ``GramDeterminant`` of :mod:`lightning_hsu.measures` is the same without the 1e-4 inside the
    norms; in half space it takes two n x n determinants.

    Args:
        half_space: Measure the 2n neurons ``w`` and ``-w``.

    Raises:
        ValueError: for a half_space that is not a bool.

    Example:
        >>> import torch
        >>> print(f"{OfficialMGD(half_space=False)(100 * torch.eye(3)):.3f}")
        -0.052
    """

    higher_is_better: ClassVar[bool] = True
    half_space: bool = True

    def __post_init__(self) -> None:
        check_flag("half_space", self.half_space)

    def formula(self, w: Tensor, state: State) -> Tensor:
        """Minus the log-determinant."""
        if self.half_space:
            w = torch.cat([w, -w], 1)
        unit = normalised(normalised(w))
        jitter = 1e-6 * torch.eye(unit.shape[1], dtype=w.dtype, device=w.device)
        value: Tensor = -torch.linalg.slogdet((2.0 * unit @ unit.mT - 2.0).exp() + jitter).logabsdet
        return value

    def ratio(self, value: Tensor, reference: float) -> Tensor:
        """Value over that of random neurons; both are negative, the less uniform further from 0."""
        return value / reference
