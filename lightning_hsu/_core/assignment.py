"""Which unit vector of one set is which of another: exact assignment, mutual nearest neighbours."""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_hsu._core.precision import exact_arithmetic

_BLOCK = 1024  # rows of cosines at a time
_ANGLES = 20_000  # at which the distribution of a random pair's angle is computed


def can_assign() -> bool:
    """Whether scipy, which solves the assignment, is installed."""
    try:
        return find_spec("scipy.optimize") is not None
    except (ImportError, ValueError):
        return False


def best_assignment(x: Tensor, y: Tensor, *, half_space: bool) -> tuple[Tensor, Tensor]:
    """Match unit vectors one to one so that the sum of their cosines is largest.

    Args:
        x: One set (n, d), float64, on the CPU.
        y: The other (m, d).
        half_space: Whether the absolute cosine counts, so that opposite vectors are the same.

    Returns:
        Indices of x, ascending, and of y, each of shape (min(n, m),).

    Raises:
        ModuleNotFoundError: without scipy.

    Example:
        >>> x = torch.eye(3, dtype=torch.float64)
        >>> best_assignment(x, -x[[2, 0, 1]], half_space=True)
        (tensor([0, 1, 2]), tensor([1, 2, 0]))
    """
    from scipy.optimize import linear_sum_assignment

    cosine = x @ y.T  # (n, m)
    if half_space:
        cosine = cosine.abs_()
    rows, columns = linear_sum_assignment(cosine.numpy(), maximize=True)
    return torch.as_tensor(rows, dtype=torch.long), torch.as_tensor(columns, dtype=torch.long)


def mutual_nearest(x: Tensor, y: Tensor, *, half_space: bool) -> tuple[Tensor, Tensor]:
    """Match unit vectors that are each other's nearest, in blocks of rows.

    Args:
        x: One set (n, d).
        y: The other (m, d).
        half_space: Whether opposite vectors are the same.

    Returns:
        Indices of x, ascending, and of y, both of one length, at most min(n, m).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        >>> mutual_nearest(x, torch.tensor([[0.0, 1.0], [0.6, 0.8]]), half_space=False)
        (tensor([1]), tensor([1]))
    """
    nearest = torch.empty(len(x), dtype=torch.long)  # of y, for each of x
    back = torch.zeros(len(y), dtype=torch.long)  # of x, for each of y
    best = torch.full((len(y),), -math.inf, dtype=x.dtype)
    with exact_arithmetic(x):
        for start in range(0, len(x), _BLOCK):
            cosine = x[start : start + _BLOCK] @ y.T  # (block, m)
            if half_space:
                cosine = cosine.abs_()
            nearest[start : start + _BLOCK] = cosine.argmax(1)
            of_block, where = cosine.max(0)
            is_nearer = of_block > best
            best = torch.where(is_nearer, of_block, best)
            back = torch.where(is_nearer, where + start, back)
    rows = torch.arange(len(x))
    rows = rows[back[nearest] == rows]
    return rows, nearest[rows]


@cache
def nearest_of_random(count: int, d: int, *, half_space: bool) -> tuple[float, float]:
    """Mean cosine, and mean angle in degrees, of a vector and the nearest of random ones.

    Args:
        count: How many random vectors there are, 1 or more.
        d: Dimension, 2 or more.
        half_space: Whether opposite vectors are the same.

    Example:
        >>> nearest_of_random(1, 2, half_space=True)[1]  # all angles up to 90 are equally likely
        45.0
    """
    end = math.pi
    if half_space:
        end = math.pi / 2
    angles = (torch.arange(_ANGLES, dtype=torch.float64) + 0.5) * (end / _ANGLES)
    # The density is sin(t)**(d - 2); in logarithms, since d may be large.
    part = torch.softmax((d - 2) * angles.sin().log(), 0)
    at_least = (part.flip(0).cumsum(0).flip(0)).clamp(0.0, 1.0)  # by chance at this angle or wider
    survives = torch.cat([at_least, at_least.new_zeros(1)]) ** count
    chance = survives[:-1] - survives[1:]  # that the nearest is in this bin
    chance = chance / chance.sum()
    cosine = float((chance * angles.cos()).sum())
    angle = float((chance * angles).sum())
    return cosine, round(math.degrees(angle), 6)
