"""What a value means, compared with random neurons and with a bound that no neurons can beat."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from lightning_hsu._checks import check_neurons
from lightning_hsu._core import or_one, unit_rows
from lightning_hsu._core.small_groups import SmallGroups
from lightning_hsu._core.tails import (
    NORMAL_TAIL,
    TAIL,
    angles_at,
    ends_by_moments,
    ends_of_means,
    random_layers,
)
from lightning_hsu.measures import Measure
from lightning_hsu.measures.base import check_measure

# Numbers of layers that are simulated, and the FLOP that all of them together may take.
_DRAWS = 101
_FEWEST = 5
_FLOPS = 2e10

# Simulated layers whose law has to be known at 1 in 1,000.
_MANY = 2048
_ENTRIES = 2**22  # of all cosines together
_AT_ONCE = 2**20  # of those computed together
_EMPIRICAL = 32  # neurons up to which there are so many layers that they show the law
_NARROW = 0.005  # ends within this part of the mean need not be exact

LARGEST_SIMULATED = 4096
"""Neurons of the largest layer that is simulated if those of larger ones have the same mean."""

_ENOUGH = 100  # pairs below the softening that make a mean over pairs one of many
_QUICK = ((64, 4), (512, 8))  # draws, and those left out at either end
_SMALL = 64  # neurons of layers that are simulated together


class Level(float):
    """A reference value: a float that knows where it comes from.

    Args:
        value: The value.
        standard_error: Its standard error; 0 if it is exact.
        source: "exact", "simulated mean" or "simulated median".
    """

    standard_error: float
    source: str

    def __new__(cls, value: float, standard_error: float = 0.0, source: str = "exact") -> Level:
        """Make the float with its standard error and source."""
        level = super().__new__(cls, value)
        level.standard_error = standard_error
        level.source = source
        return level

    def __reduce__(self) -> tuple[type[Level], tuple[float, float, str]]:
        return Level, (float(self), self.standard_error, self.source)


def random_expectation(measure: Measure, n: int, d: int) -> Level:
    r"""Expected value of a measure for independent, uniformly random neurons.

    It is exact if the measure knows it. The chordal Riesz energy has the closed form
    ``2**(d-2-s) G(d/2) G((d-1-s)/2) / (sqrt(pi) G(d-1-s/2))``, where G is the gamma function, and
    for s = 0 ``-log 2 + (psi(d-1) - psi((d-1)/2)) / 2``. Other pairwise measures integrate their
    kernel against the density ``sin(t)**(d-2)`` of the angle, to about 1e-10; softening is
    neglected. Otherwise it is the mean over simulated layers from a fixed seed, cached, with its
    standard error: over 101 layers, or as few as 5 if one takes much work.

    Args:
        measure: A measure.
        n: Neurons, at least 2.
        d: Dimension, at least 2.

    Returns:
        The expectation, a float with a ``standard_error`` and a ``source``; ``inf`` if it is
        infinite (Riesz energy with s >= d - 1; :func:`random_level` then gives the median).

    Raises:
        ValueError: if n or d is below 2.

    Reference:
        Brauchart, Hardin & Saff, "The next-order term for optimal Riesz and logarithmic energy
        asymptotics on the sphere", 2012, for the continuous energies.

    Example:
        >>> from lightning_hsu.measures import GramDeterminant, RieszEnergy
        >>> round(random_expectation(RieszEnergy(s=2), n=256, d=2304), 5)
        0.50022
        >>> random_expectation(RieszEnergy(s=2), n=64, d=3)
        inf
        >>> level = random_expectation(GramDeterminant(), n=8, d=16)
        >>> level.source, 0 < level.standard_error < 0.1
        ('simulated mean', True)
    """
    _check(measure, n, d)
    exact = measure.expectation(n, d)
    if exact is not None:
        return Level(exact)
    values = _simulated(measure, n, d)
    return Level(
        float(values.mean()), float(values.std()) / math.sqrt(len(values)), "simulated mean"
    )


def random_level(measure: Measure, n: int, d: int) -> Level:
    """The value to compare a layer with: the expectation, or the median if that is infinite.

    Args:
        measure: A measure.
        n: Neurons, at least 2.
        d: Dimension, at least 2.

    Returns:
        A finite value with a ``standard_error`` and a ``source``; NaN if there is no reference.

    Raises:
        ValueError: if n or d is below 2.

    Example:
        >>> from lightning_hsu.measures import RieszEnergy
        >>> # the expectation is (d - 2) / (2 (d - 3))
        >>> round(random_level(RieszEnergy(s=2), n=32, d=4), 9)
        1.0
        >>> level = random_level(RieszEnergy(s=2), n=32, d=3)  # no expectation: the median
        >>> 1 < level < 10, level.source
        (True, 'simulated median')
    """
    level = random_expectation(measure, n, d)
    if not math.isinf(level):
        return level
    values = _simulated(measure, n, d)
    quantiles = torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)
    low, middle, high = values.quantile(quantiles).tolist()
    # Asymptotic standard error of a median, with the density of a normal distribution with these
    # quartiles.
    return Level(middle, 0.93 * (high - low) / math.sqrt(len(values)), "simulated median")


def random_range(measure: Measure, n: int, d: int, groups: int = 1) -> tuple[float, float]:
    """The range of natural values that random layers have: a value outside it is not chance.

    Of independent random layers 1 in 1,000 lies below it and 1 in 1,000 above. Both ends are
    computed by themselves, since the law is skewed: for means over pairs from the angles of two
    neurons, from simulated layers of few neurons, else from the mean, the deviation (both exact
    except for softening) and the skewness. For other measures each end is three standard deviations
    of simulated layers from their mean, or their extreme if that is further.

    Args:
        measure: A measure.
        n: Neurons, at least 2.
        d: Dimension, at least 2.
        groups: Number of layers of this shape whose mean the value is.

    Returns:
        The lowest and the highest value; NaN if random layers have no finite value.

    Raises:
        ValueError: if n or d is below 2.

    Example:
        >>> from lightning_hsu.measures import RieszEnergy
        >>> low, high = random_range(RieszEnergy(s=2), n=10, d=64)
        >>> low < random_expectation(RieszEnergy(s=2), n=10, d=64) < high, high / low < 1.2
        (True, True)
        >>> low, high = random_range(RieszEnergy(s=2), n=2, d=64)  # one pair
        >>> 60 < math.degrees(math.acos(1 - 1 / (2 * high))) < 70  # the smallest angle by chance
        True
    """
    _check(measure, n, d)
    return _random_range(measure, n, d, groups)


def lower_bound(measure: Measure, n: int, d: int) -> float:
    """A natural value that no n neurons in d dimensions can beat.

    No value is lower, or higher if higher is better.

    For energies these are the simplex and Welch bounds and the universal bound by Levenshtein's
    quadrature, which sharp configurations attain: the simplex, the cross-polytope, the icosahedron,
    the roots of E8. For the smallest angle they are the bounds of Rankin, Welch and Levenshtein. In
    half space the 2n points x and -x count.

    Args:
        measure: A measure.
        n: Neurons, at least 2.
        d: Dimension, at least 2.

    Returns:
        The bound; NaN if none is known.

    Raises:
        ValueError: if n or d is below 2.

    Reference:
        Boyvalenkov, Dragnev, Hardin, Saff & Stoyanova, "Universal lower bounds for potential energy
        of spherical codes", Constructive Approximation, 2016; Levenshtein, "Universal bounds for
        codes and designs", 1998; Welch, "Lower bounds on the maximum cross correlation of signals",
        1974.

    Example:
        >>> from lightning_hsu.measures import RieszEnergy, Separation
        >>> round(lower_bound(RieszEnergy(s=2), n=12, d=3), 9)  # the icosahedron: 39 / 66
        0.590909091
        >>> round(lower_bound(Separation(), n=6, d=3), 6)  # the octahedron: a right angle
        1.570796
    """
    _check(measure, n, d)
    bound = measure.bound(n, d)
    if bound is None:
        return math.nan
    return bound


def uniformity_ratio(measure: Measure, x: Tensor) -> Tensor:
    """Value of the neurons over that of random ones: above 1 more redundant, below 1 more uniform.

    It is the inverse if higher is better, and for a Riesz energy with s < 0; for one with s = 0 it
    is the exponential of the difference. See the measure's ``ratio``.

    Args:
        measure: A measure.
        x: Neurons, shape (..., n, d).

    Returns:
        The ratio, shape (...); NaN where fewer than two rows are neither zero nor NaN.

    Raises:
        ValueError: for fewer than 2 neurons or dimensions.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import RieszEnergy
        >>> same = torch.ones(8, 16) + 0.1 * torch.eye(8, 16)
        >>> bool(uniformity_ratio(RieszEnergy(s=1), same) > 2)
        True
    """
    _check_pair(measure, x)
    ratio = measure.ratio(measure(x), random_level(measure, *x.shape[-2:]))
    return torch.where(_enough(x), ratio, math.nan)


def uniformity_score(measure: Measure, x: Tensor) -> Tensor:
    """Where the neurons stand between random ones, 0, and the bound that none can beat, 1.

    Below 0 they are worse than random.

    Args:
        measure: A measure.
        x: Neurons, shape (..., n, d).

    Returns:
        The score, shape (...), at most 1; NaN where no bound is known, or no neurons can be better
        than random, or fewer than two rows are neither zero nor NaN.

    Raises:
        ValueError: for fewer than 2 neurons or dimensions.

    Example:
        >>> import torch
        >>> from lightning_hsu.measures import RieszEnergy
        >>> cross_polytope = torch.cat([torch.eye(4), -torch.eye(4)])
        >>> round(float(uniformity_score(RieszEnergy(s=2), cross_polytope)), 6)
        1.0
    """
    _check_pair(measure, x)
    return torch.where(_enough(x), score(measure, measure(x), *x.shape[-2:]), math.nan)


def score(measure: Measure, value: Tensor, n: int, d: int) -> Tensor:
    """Scores of natural values (...) of n neurons in d dimensions; see :func:`uniformity_score`."""
    level = random_level(measure, n, d)
    room = lower_bound(measure, n, d) - level
    if abs(room) <= 1e-6 * max(1.0, abs(level)):
        room = math.nan
    return (value - level) / room


def is_surely_random(measure: Measure, n: int, d: int, energy: float) -> bool:
    """Whether a value is well within :func:`random_range`, by the few draws that this takes to see.

    False says nothing. Were one of 1,000 random layers beyond a value at most, then 4 of 64 would
    be once in a million times, and 8 of 512 more rarely.
    """
    if not 2 < n <= _SMALL or measure.pair_term() is None:
        return False
    for draws, beyond in _QUICK:
        low, high = _inner_range(measure, n, d, draws, beyond)
        if low < energy < high:
            return True
    return False


@lru_cache(maxsize=16384)
def _inner_range(measure: Measure, n: int, d: int, draws: int, beyond: int) -> tuple[float, float]:
    """The range of the values of random layers without so many at either end."""
    generator = torch.Generator().manual_seed(n * 65537 + d)
    values = _values_of(measure, random_layers(draws, n, d, generator)).sort().values
    return float(values[beyond - 1]), float(values[-beyond])


@lru_cache(maxsize=16384)
def _random_range(measure: Measure, n: int, d: int, groups: int) -> tuple[float, float]:
    deviation = measure.deviation(n, d)
    if deviation is None:
        return _range_of_few(measure, n, d, groups)
    mean = measure.expectation(n, d)
    assert mean is not None
    is_finite = math.isfinite(mean) and math.isfinite(deviation)
    if is_finite and NORMAL_TAIL * deviation <= _NARROW * math.sqrt(groups) * abs(mean):
        spread = NORMAL_TAIL * deviation / math.sqrt(groups)
        return mean - spread, mean + spread
    values = _pair_means(measure, n, d)
    low, high = ends_of_means(values, groups)
    if n <= _EMPIRICAL and groups == 1:
        return low, high
    if is_finite and n > _EMPIRICAL:
        ends = ends_by_moments(values, groups, mean=mean, deviation=deviation)
        low, high = min(low, ends[0]), max(high, ends[1])
    return low, max(high, _one_close_pair(measure, values, n, d, groups))


def _range_of_few(measure: Measure, n: int, d: int, groups: int) -> tuple[float, float]:
    """The range of a measure that is no mean over pairs, from a few simulated layers."""
    values = _simulated(measure, n, d)
    mean = float(values.mean())
    spread = 3.0 * float(values.std())
    low = min(mean - spread, float(values.amin()))
    high = max(mean + spread, float(values.amax()))
    part = math.sqrt(1.0 / groups + 1.0 / len(values))  # the simulated mean is uncertain, too
    return mean - part * (mean - low), mean + part * (high - mean)


def _pair_means(measure: Measure, n: int, d: int) -> Tensor:
    """Values of many random layers (n, d) of a mean over pairs, float64; the same at each call."""
    if n == 2:
        part = (torch.arange(_MANY, dtype=torch.float64) + 0.5) / _MANY
        return measure(_pairs_at(angles_at(part, d))).double()
    draws = min(_MANY, _ENTRIES // n**2)
    if draws <= _DRAWS:
        return _simulated(measure, n, d)
    generator = torch.Generator().manual_seed(n * 65537 + d)
    values = []
    at_once = max(1, _AT_ONCE // n**2)
    for start in range(0, draws, at_once):
        layers = random_layers(min(at_once, draws - start), n, d, generator)
        values.append(_values_of(measure, layers))
    return torch.cat(values)


def _one_close_pair(measure: Measure, values: Tensor, n: int, d: int, groups: int) -> float:
    """The value with one pair as close as it is in 1 of 1,000 layers, which few draws do not show.

    Where the kernel grows fast, one pair is what makes a value large.
    """
    neurons = n * groups
    pairs = neurons * (n - 1) / 2
    part = torch.tensor([min(TAIL / pairs, 0.5), 0.5], dtype=torch.float64)
    if measure.half_space:
        part[0] /= 2.0  # a pair is close at either end
    close, right = map(float, measure(_pairs_at(angles_at(part, d))))
    share = 1.0 / pairs
    if measure.half_space:
        share = 6.0 / (neurons * (2 * n - 1))  # of two neurons it is a third
    return float(values.median()) + (close - right) * share


def _pairs_at(angles: Tensor) -> Tensor:
    """Two neurons at each of some angles (m,), shape (m, 2, 2)."""
    first = torch.stack([torch.ones_like(angles), torch.zeros_like(angles)], -1)
    second = torch.stack([angles.cos(), angles.sin()], -1)
    return torch.stack([first, second], 1)


def is_soon_simulated(measure: Measure, n: int, d: int) -> bool:
    """Whether at most ``LARGEST_SIMULATED`` random neurons need to be simulated to stand for n."""
    return simulated_neurons(measure, n, d) <= LARGEST_SIMULATED


def simulated_neurons(measure: Measure, n: int, d: int) -> int:
    """How many neurons are simulated to learn what n random ones have.

    The mean over the pairs of a few thousand is that of more, unless a few nearest pairs decide it.
    """
    term = measure.pair_term()
    if n <= LARGEST_SIMULATED or term is None:
        return n
    expectation = measure.expectation(n, d)
    is_finite = expectation is not None and math.isfinite(expectation)
    within_knee = LARGEST_SIMULATED**2 / 2 * term.knee ** (d - 1)  # pairs, up to a factor
    if is_finite or within_knee >= _ENOUGH:
        return LARGEST_SIMULATED
    return n


@lru_cache(maxsize=1024)
def _simulated(measure: Measure, n: int, d: int) -> Tensor:
    """Values of random layers (n, d) from a fixed seed, float64."""
    enough = simulated_neurons(measure, n, d)
    if enough < n:
        return _simulated(measure, enough, d)
    flops = measure.value_flops(n, d) + 400.0 * n * d  # the latter for drawing a layer
    draws = int(min(_DRAWS, max(_FEWEST, _FLOPS / flops)))
    generator = torch.Generator().manual_seed(n * 65537 + d)
    layers = (torch.randn(n, d, generator=generator, dtype=torch.float32) for _ in range(draws))
    if n <= _SMALL and measure.pair_term() is not None:
        return _values_of(measure, torch.stack(list(layers)))
    values = []
    for layer in layers:
        values.append(measure(layer).double())
    return torch.stack(values)


def _values_of(measure: Measure, layers: Tensor) -> Tensor:
    """Values (b,) of a mean over pairs of layers (b, n, d), float64."""
    term = measure.pair_term()
    if term is None or layers.shape[1] > _SMALL:
        return measure(layers).double()
    energies = SmallGroups(layers).energies(term)
    if term.logarithm:
        energies = or_one(energies).log()
    return measure.natural(energies)


def _check(measure: Measure, n: int, d: int) -> None:
    check_measure(measure)
    if not isinstance(n, int) or not isinstance(d, int):
        raise TypeError(
            f"n and d must be ints, the number of neurons and their dimension; got n={n!r}, d={d!r}"
        )
    if n < 2 or d < 2:
        raise ValueError(
            f"a random layer needs at least 2 neurons of dimension 2; got n={n}, d={d}"
        )


def _check_pair(measure: Measure, x: Tensor) -> None:
    check_measure(measure)
    check_neurons(x)


def _enough(x: Tensor) -> Tensor:
    """Where there are two neurons or more, (...)."""
    return (unit_rows(x.double())[1] > 0).sum((-2, -1)) > 1
