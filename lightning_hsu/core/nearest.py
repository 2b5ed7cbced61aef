"""The nearest other of every neuron, or the nearest two neurons: value and gradient of a kernel of their distance.

One pass over row panels of the upper triangle of the Gram matrix, n*n*d FLOP, finds the largest and second largest
cosine of every row. Where the two differ by more than rounding the nearest is known, and its distance is computed by
differences in float64. Only the other rows are compared with all neurons in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hsu.core.backend import compiled
from lightning_hsu.core.kernel import Kernel
from lightning_hsu.core.near import COINCIDENT, NEAR
from lightning_hsu.core.pairwise import PANEL
from lightning_hsu.core.precision import exact_arithmetic, with_float64, working_dtype
from lightning_hsu.core.sphere import seeded_noise, squared_chords, tangent, to_weights, unit_rows

_ENTRIES = 2**22  # Gram entries held at once when several small groups go together
_NONE = float("-inf")  # the cosine of no neuron


@dataclass(frozen=True)
class NearestTerm:
    """A kernel of the distance to the nearest.

    Args:
        kernel: Value and slope at squared chords q and p = 4 - q, both in [0, 4]; finite.
        half_space: A neuron's mirror image counts as well: the nearer of the two.
        every_neuron: Take the mean over neurons of the kernel at their nearest; else the kernel at the nearest pair.
        knee: The chord at whose force coincident neurons part.
    """

    kernel: Kernel
    half_space: bool
    every_neuron: bool
    knee: float

    def force(self) -> float:
        """Slope in the chord, at the knee."""
        q = torch.tensor([self.knee**2, 4.0 - self.knee**2], dtype=torch.float64)
        return 2.0 * self.knee * float(self.kernel(q[0], q[1])[1])


def tie_tolerance(dtype: torch.dtype) -> float:
    """Relative difference between squared chords that is none: 64 roundings; in float64 1e-9, that of the nearest."""
    return 64.0 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-9


def nearer(q: Tensor, p: Tensor, half_space: bool, tie: float) -> tuple[Tensor, Tensor, Tensor]:
    """Squared chords to the nearer and the farther of a neuron (q) and its mirror image (p), and the nearer one's sign.

    In full space the neuron itself counts as nearer. In half space the sign is 0 where the two are tied.
    """
    if not half_space:
        return q, p, torch.ones_like(q)
    tied = (q - p).detach().abs() <= tie
    sign = torch.where(tied, 0.0, torch.sign((p - q).detach()))
    middle = (q + p) / 2.0  # constant: a tie has no slope
    return torch.where(tied, middle, torch.minimum(q, p)), torch.where(tied, middle, torch.maximum(q, p)), sign


def smallest_angle(w: Tensor, *, half_space: bool = False) -> Tensor:
    """Smallest angle between two neurons, in radians.

    Args:
        w: Neurons, shape (..., n, d). Zero and non-finite rows take no part.
        half_space: Measure angles between lines, so that opposite neurons coincide.

    Returns:
        Angles (...) in [0, pi] (half space: [0, pi / 2]), float64; NaN where fewer than two neurons are left.
    """
    if w.numel() == 0:
        return w.new_full(w.shape[:-2], float("nan"), dtype=torch.float64)
    stack = with_float64(w.detach()).reshape(-1, *w.shape[-2:])
    with torch.no_grad(), exact_arithmetic(stack):
        parts = [_Nearest(part, half_space, settled=1.0 - NEAR / 2).smallest() for part in _split(stack)]
    q = torch.cat(parts).reshape(w.shape[:-2])
    angle = 2.0 * torch.atan2(q.sqrt(), (4.0 - q).clamp_min(0.0).sqrt())
    return torch.where(q.isfinite(), angle, float("nan"))


def nearest_energy(w: Tensor, term: NearestTerm) -> tuple[Tensor, Tensor]:
    """Kernel at the nearest neurons and its gradient, the mean over ties.

    Args:
        w: Neurons, shape (..., n, d), any floating dtype; rows of any positive norm. Zero and non-finite rows take
            no part.
        term: The kernel.

    Returns:
        The value (...) in float32 or wider, 0 with fewer than two neurons, and the gradient with the shape and dtype
        of ``w``. Both are finite, and the same weights give the same bits.
    """
    dtype = working_dtype(w.dtype)
    if w.numel() == 0:
        return w.new_zeros(w.shape[:-2], dtype=dtype), torch.zeros_like(w)
    stack = with_float64(w.detach()).reshape(-1, *w.shape[-2:])
    with torch.no_grad(), exact_arithmetic(stack):
        parts = [_Energy(part, term).result(w.dtype) for part in _split(stack)]
    value = torch.cat([part[0] for part in parts]).to(w.device, dtype)
    return value.reshape(w.shape[:-2]), torch.cat([part[1] for part in parts]).reshape(w.shape).to(w.device)


def parting(x: Tensor, away: Tensor, degree: Tensor, noise: Tensor) -> Tensor:
    """Tangents along which coincident rows part, as long as ``degree`` (..., n, 1), the weight of their partners.

    As if every row stood an infinitesimal step, its noise, beside itself; ``away`` is minus the partners' noise.
    """
    return degree * unit_rows(tangent(degree * noise + away, x))[0]


def _split(stack: Tensor) -> tuple[Tensor, ...]:
    """Parts of a stack (b, n, d) in its working dtype whose Gram matrices are small enough together."""
    n = stack.shape[1]
    return torch.split(stack.to(working_dtype(stack.dtype)), max(1, _ENTRIES // (min(PANEL, n) * n)))


@dataclass
class _Pairs:
    """Rows of a flat stack (b * n, d), each with one column of its group, their squared chords and signs (k, 1)."""

    group: Tensor  # (k,)
    rows: Tensor
    cols: Tensor
    near: Tensor
    far: Tensor
    sign: Tensor

    def spread(self, out: Tensor, weight: Tensor, points: Tensor) -> None:
        """Take from both neurons of each pair, in ``out``, its weight (k, 1) times the other's point."""
        out.index_put_((self.rows,), -weight * points[self.cols], accumulate=True)  # sums in a fixed order, unlike index_add_
        out.index_put_((self.cols,), -weight * points[self.rows], accumulate=True)


@dataclass
class _Panel:
    """Rows of a flat stack (b * n, d), each with all columns of its group, their squared chords and signs (k, n)."""

    group: Tensor  # (1,)
    rows: Tensor
    cols: slice
    near: Tensor
    far: Tensor
    sign: Tensor

    def spread(self, out: Tensor, weight: Tensor, points: Tensor) -> None:
        """Take from both neurons of each pair, in ``out``, its weight (k, n) times the other's point."""
        out[self.rows] -= weight @ points[self.cols]
        out[self.cols] -= weight.mT @ points[self.rows]


class _Nearest:
    """Nearest neurons of a stack of groups: of every neuron, or where only the nearest pairs count of their earlier one.

    Args:
        w: Neurons (b, n, d), float32 or float64.
        half_space: Mirror images count as well.
        every: Every neuron counts.
        settled: Cosine below which ties in rounding are left as they are.
    """

    def __init__(self, w: Tensor, half_space: bool, every: bool = False, settled: float = _NONE) -> None:
        self.w, self.half_space, self.every = w, half_space, every
        self.tie = tie_tolerance(w.dtype)
        x, inverse_norm = unit_rows(w)
        self.alive = inverse_norm.squeeze(-1) > 0  # (b, n)
        first, self.index, second = self._scan(x)
        best = first if every else first.amax(-1, keepdim=True)
        bound = best - self.tie * (1.0 - best) - 64.0 * torch.finfo(w.dtype).eps  # ties, and the rounding of cosines
        counts = (first > _NONE) & (first >= bound)
        self.unclear = counts & (second >= bound) & (first >= settled)
        self.clear = counts & ~self.unclear

    def rows(self, index: Tensor | slice) -> Tensor:
        """Unit rows in float64 at indices of the flat stack."""
        return unit_rows(self.w.flatten(0, 1)[index].double())[0]

    def smallest(self) -> Tensor:
        """Smallest squared chord (b,), float64; infinite with fewer than two neurons."""
        smallest = torch.full(self.w.shape[:1], float("inf"), dtype=torch.float64, device=self.w.device)
        for part in self.parts():
            near = part.near.amin(1)
            smallest.scatter_reduce_(0, part.group.expand_as(near), near, "amin")
        return smallest

    def parts(self) -> Iterator[_Pairs | _Panel]:
        """All rows that count, with the columns that may be nearest."""
        n = self.w.shape[1]
        for group, row in (entry.unbind(1) for entry in torch.split(self.clear.nonzero(), PANEL)):
            rows, cols = group * n + row, group * n + self.index[group, row]
            x, y = self.rows(rows), self.rows(cols)
            q, p = (difference.square().sum(-1, keepdim=True) for difference in (x - y, x + y))
            yield _Pairs(group, rows, cols, *nearer(q, p, self.half_space, self.tie))
        for i in self.unclear.any(1).nonzero().flatten().tolist():
            whole = slice(i * n, (i + 1) * n)
            y = self.rows(whole)
            for row in torch.split(self.unclear[i].nonzero().squeeze(1), PANEL):
                yield _Panel(torch.full_like(row[:1], i), i * n + row, whole, *self._panel(y, row, self.alive[i]))

    def _panel(self, y: Tensor, row: Tensor, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared chords (k, n) from some of the rows y (n, d) to all, and signs; infinite where there is no pair."""
        column = torch.arange(len(y), device=y.device)
        other = (column != row[:, None] if self.every else column > row[:, None]) & alive
        near, far, sign = nearer(*squared_chords(y[row], y, other), self.half_space, self.tie)
        return near.masked_fill(~other, float("inf")), far, sign

    def _scan(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Largest cosine of every row of x (b, n, d), its column, and the second largest cosine; (b, n) each."""
        if compiled(x):
            from lightning_hsu.core.kernels.nearest import scan

            return scan(x, self.alive, half_space=self.half_space, every=self.every)
        n = x.shape[1]
        found = torch.full_like(x[..., 0], _NONE), torch.zeros_like(x[..., 0]).long(), torch.full_like(x[..., 0], _NONE)
        whole = bool(self.alive.all())
        for start in range(0, n, PANEL):
            rows, cols = slice(start, min(start + PANEL, n)), slice(start + PANEL, n)
            cosine = x[:, rows] @ x[:, start:].mT  # (b, k, n - start)
            if self.half_space:
                cosine.abs_()
            if not whole:
                cosine.masked_fill_(~(self.alive[:, rows, None] & self.alive[:, None, start:]), _NONE)
            past = torch.ones_like(cosine[0, :, :PANEL], dtype=torch.bool).tril()
            cosine[..., :PANEL].masked_fill_(past.triu() if self.every else past, _NONE)
            _merge(found, rows, cosine, -1, start)
            if self.every:
                _merge(found, cols, cosine[..., PANEL:], -2, start)
        return found


def _merge(found: tuple[Tensor, Tensor, Tensor], part: slice, cosine: Tensor, dim: int, start: int) -> None:
    """Take in, for the rows ``part``, the largest two along a dimension of a panel of cosines."""
    largest, at = cosine.max(dim, keepdim=True)
    runner_up = cosine.scatter_(dim, at, _NONE).amax(dim)
    cosine.scatter_(dim, at, largest)
    first, index, second = (kept[:, part] for kept in found)
    largest, at = largest.squeeze(dim), at.squeeze(dim)
    second.copy_(torch.maximum(torch.minimum(first, largest), torch.maximum(second, runner_up)))
    index.copy_(torch.where(largest > first, at + start, index))
    first.copy_(torch.maximum(first, largest))


class _Energy(_Nearest):
    """Value and gradient of a kernel at the nearest."""

    def __init__(self, w: Tensor, term: NearestTerm) -> None:
        super().__init__(w, term.half_space, term.every_neuron)
        self.term = term
        unit, self.inverse_norm = unit_rows(w.double())
        self.x = unit.flatten(0, 1)  # (b * n, d)
        self.total, self.mass = torch.zeros(2, w.shape[0], dtype=torch.float64, device=w.device)
        self.grad = torch.zeros_like(self.x)
        self.noise: Tensor | None = None  # (b * n, d), drawn when the first coincident neurons are met
        self.away, self.degree = torch.zeros(0), torch.zeros(0)  # (b * n, d), (b * n, 1): how those part

    def rows(self, index: Tensor | slice) -> Tensor:
        """Unit rows in float64 at indices of the flat stack."""
        return self.x[index]

    def result(self, out: torch.dtype) -> tuple[Tensor, Tensor]:
        """Value (b,) in float64 and gradient (b, n, d) in ``out``."""
        limit = None if self.every else self.smallest()
        for part in self.parts():
            self._add(part, part.near.amin(1, keepdim=True) if limit is None else limit[part.group, None])
        if self.noise is not None:
            self.grad += self.term.force() * parting(self.x, self.away, self.degree, self.noise)
        mass = self.mass.clamp_min(0.5)  # 0 with fewer than two neurons
        grad = tangent(self.grad, self.x).view_as(self.w) / mass[:, None, None]
        return self.total / mass, to_weights(grad, self.inverse_norm, out)

    def _add(self, part: _Pairs | _Panel, limit: Tensor) -> None:
        """Add the pairs whose squared chord is tied with the limit (k, 1)."""
        tied = part.near <= limit * (1.0 + self.tie)
        weight = tied.double()
        if self.every:
            weight /= weight.sum(1, keepdim=True)
        value, slope = self.term.kernel(torch.where(tied, part.near, 2.0), torch.where(tied, part.far, 2.0))
        for kept, added in ((self.total, weight * value), (self.mass, weight)):
            kept.index_put_((part.group.expand(len(weight)),), added.sum(1), accumulate=True)
        together = tied & (part.near < COINCIDENT)
        signed = weight * part.sign
        part.spread(self.grad, torch.where(together, 0.0, 2.0 * slope * signed), self.x)
        if bool(together.any()):
            self._part(part, torch.where(together, signed, 0.0))

    def _part(self, part: _Pairs | _Panel, weight: Tensor) -> None:
        """Note coincident partners."""
        if self.noise is None:
            b, n, d = self.w.shape
            self.noise = seeded_noise(n, d, like=self.x).repeat(b, 1)
            self.away, self.degree = torch.zeros_like(self.x), torch.zeros_like(self.x[:, :1])
        part.spread(self.away, weight, self.noise)
        part.spread(self.degree, -weight.abs(), torch.ones_like(self.degree))
