"""What a value means: the energy of uniformly random neurons, and the ratio of a layer to it."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from lightning_hsu.measures import Measure, PairwiseMeasure, RieszEnergy

_DRAWS = 101  # simulated layers for a median
_MOST = 1024  # neurons of a simulated layer; the median of a mean over pairs hardly moves beyond


def random_expectation(measure: Measure, n: int, d: int) -> float:
    r"""Expected value of a pairwise measure for independent, uniformly random neurons.

    For the chordal Riesz energy the closed form
    ``2**(d-2-s) G(d/2) G((d-1-s)/2) / (sqrt(pi) G(d-1-s/2))`` (G the gamma function), for s = 0
    ``-log 2 + (psi(d-1) - psi((d-1)/2)) / 2``; any other pairwise measure by quadrature of its kernel
    against the density ``sin(t)**(d-2)`` of the angle, to about 1e-10. Softening is not counted in.

    Args:
        measure: A pairwise measure.
        n: Neurons, at least 2. Matters in half space only, where each neuron also meets its own mirror image.
        d: Dimension, at least 2.

    Returns:
        The expectation; ``inf`` where it does not exist (Riesz energy with s >= d - 1).

    Raises:
        ValueError: if n or d is below 2.
        TypeError: for a measure that is not pairwise.

    Reference:
        Brauchart, Hardin & Saff, "The next-order term for optimal Riesz and logarithmic energy asymptotics on
        the sphere", 2012, for the continuous energies.

    Example:
        >>> from lightning_hsu.measures import RieszEnergy
        >>> round(random_expectation(RieszEnergy(s=2), n=256, d=2304), 5)
        0.50022
        >>> random_expectation(RieszEnergy(s=2), n=64, d=3)
        inf
    """
    if n < 2 or d < 2:
        raise ValueError(f"a random layer needs at least 2 neurons of dimension 2; got n={n}, d={d}")
    if not isinstance(measure, PairwiseMeasure):
        raise TypeError(f"no expectation is known for {measure!r}; it must be a pairwise measure")
    pair = _pair_expectation(measure, d)
    if not measure.half_space:
        return pair
    mirror = float(measure.kernel(*torch.tensor([4.0, 0.0], dtype=torch.float64))[0])
    return (2 * (n - 1) * pair + mirror) / (2 * n - 1)


def random_level(measure: Measure, n: int, d: int) -> float:
    """The value to compare a layer with: the expectation, or where that is infinite the median of random layers.

    The median is over 101 simulated layers (at most 1024 neurons each) from a fixed seed, and cached.

    Args:
        measure: A pairwise measure.
        n: Neurons, at least 2.
        d: Dimension, at least 2.

    Returns:
        A finite value.

    Raises:
        ValueError: if n or d is below 2.
        TypeError: for a measure that is not pairwise.

    Example:
        >>> from lightning_hsu.measures import RieszEnergy
        >>> round(random_level(RieszEnergy(s=2), n=32, d=4), 9)  # the expectation, (d - 2) / (2 (d - 3))
        1.0
        >>> 1 < random_level(RieszEnergy(s=2), n=32, d=3) < 10  # no expectation: the median
        True
    """
    expectation = random_expectation(measure, n, d)
    return expectation if math.isfinite(expectation) else _random_median(measure, min(n, _MOST), d)


def uniformity_ratio(measure: Measure, x: Tensor) -> Tensor:
    """Value of the neurons over that of random ones: 1 as random, above 1 more redundant, below 1 more uniform.

    For s = 0 the exponential of the difference, for s < 0 the inverse; see :meth:`RieszEnergy.ratio`.

    Args:
        measure: A pairwise measure.
        x: Neurons, shape (..., n, d).

    Returns:
        The ratio, shape (...).

    Raises:
        ValueError: for fewer than 2 neurons or dimensions.
        TypeError: for a measure that is not pairwise.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import RieszEnergy
        >>> same = torch.ones(8, 16) + 0.1 * torch.eye(8, 16)
        >>> bool(uniformity_ratio(RieszEnergy(s=1), same) > 2)
        True
    """
    return measure.ratio(measure(x), random_level(measure, *x.shape[-2:]))


@lru_cache(maxsize=4096)
def _pair_expectation(measure: PairwiseMeasure, d: int) -> float:
    """Expected kernel of one random pair."""
    if not isinstance(measure, RieszEnergy):
        return _quadrature(measure, d)
    s = measure.s
    if s >= d - 1:
        return math.inf
    if measure.distance == "geodesic":
        return _quadrature(measure, d)
    if s == 0:
        psi = torch.digamma(torch.tensor([d - 1.0, (d - 1.0) / 2.0], dtype=torch.float64))
        return -math.log(2.0) + float(psi[0] - psi[1]) / 2.0
    log = (d - 2 - s) * math.log(2.0) + math.lgamma(d / 2) + math.lgamma((d - 1 - s) / 2)
    return math.copysign(math.exp(log - math.lgamma(d - 1 - s / 2) - math.log(math.pi) / 2), s)


def _quadrature(measure: PairwiseMeasure, d: int) -> float:
    """Mean kernel over the angle's density sin(t)**(d-2), by the tanh-sinh rule: endpoint singularities are harmless."""
    step = min(2.0**-7, 0.2 / math.sqrt(d))
    grid = torch.arange(-4.5, 4.5 + step, step, dtype=torch.float64)
    # t = pi / (1 + exp(-pi sinh u)) covers (0, pi); both ends are kept to full relative precision.
    log_odds = math.pi * torch.sinh(grid)
    angle, rest = math.pi * torch.sigmoid(log_odds), math.pi * torch.sigmoid(-log_odds)
    sine = torch.sin(torch.minimum(angle, rest))
    weight = sine.log() * (d - 2) + (torch.cosh(grid) * angle * rest).log()
    weight = (weight - weight.max()).exp()
    q, p = ((2.0 * torch.sin(part / 2.0)).square().clamp_min(1e-300) for part in (angle, rest))
    value = measure.kernel(q, p)[0]
    kept = weight > 0
    return float((value[kept] * weight[kept]).sum() / weight.sum())


@lru_cache(maxsize=256)
def _random_median(measure: Measure, n: int, d: int) -> float:
    """Median value of random layers (n, d) from a fixed seed."""
    generator = torch.Generator().manual_seed(n * 65537 + d)
    draws = [measure(torch.randn(n, d, generator=generator)) for _ in range(_DRAWS)]
    return float(torch.stack(draws).median())
