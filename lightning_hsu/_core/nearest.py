"""The nearest other of every neuron, or the nearest two neurons: value and gradient of a kernel of their distance.

One pass over row panels of the upper triangle of the Gram matrix, n*n*d FLOP, finds the largest and second largest
cosine of every row. Where the two differ by more than rounding the nearest is known; other rows list their candidates.
Listed pairs are told apart by differences in float64 where float32 would not do. Only rows with many candidates are
compared with all neurons in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_hsu._core.kernel import Kernel
from lightning_hsu._core.near import COINCIDENT, NEAR
from lightning_hsu._core.neighbours import Nearest, Pairs, Panel
from lightning_hsu._core.pairwise import PANEL
from lightning_hsu._core.precision import exact_arithmetic, with_float64, working_dtype
from lightning_hsu._core.sphere import seeded_noise, tangent, to_weights, unit_rows

_ENTRIES = 2**22  # Gram entries held at once when several small groups go together


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
        parts = [
            Nearest(part, half_space, settled=1.0 - NEAR / 2).smallest() for part in _split(stack)
        ]
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
    value, grad = (
        parts[0] if len(parts) == 1 else (torch.cat(both) for both in zip(*parts, strict=True))
    )
    return value.reshape(w.shape[:-2]).to(w.device, dtype), grad.reshape(w.shape).to(w.device)


def parting(x: Tensor, away: Tensor, degree: Tensor, noise: Tensor) -> Tensor:
    """Tangents along which coincident rows part, as long as ``degree`` (..., n, 1), the weight of their partners.

    As if every row stood an infinitesimal step, its noise, beside itself; ``away`` is minus the partners' noise.
    """
    return degree * unit_rows(tangent(degree * noise + away, x))[0]


def _split(stack: Tensor) -> tuple[Tensor, ...]:
    """Parts of a stack (b, n, d) in its working dtype whose Gram matrices are small enough together."""
    n = stack.shape[1]
    return torch.split(
        stack.to(working_dtype(stack.dtype)), max(1, _ENTRIES // (min(PANEL, n) * n))
    )


class _Energy(Nearest):
    """Value and gradient of a kernel at the nearest."""

    def __init__(self, w: Tensor, term: NearestTerm) -> None:
        super().__init__(w, term.half_space, term.every_neuron)
        self.term = term
        self.total, self.mass = torch.zeros(2, w.shape[0], dtype=torch.float64, device=w.device)
        self.points = torch.zeros(
            0
        )  # these and what follows: (b * n, d) float64, made for panels and coincident neurons
        self.rare: Tensor | None = None  # their part of the gradient
        self.noise: Tensor | None = None
        self.away, self.degree = (
            torch.zeros(0),
            torch.zeros(0),
        )  # how coincident neurons part; the latter (b * n, 1)

    def result(self, out: torch.dtype) -> tuple[Tensor, Tensor]:
        """Value (b,) in float64 and gradient (b, n, d) in ``out``."""
        smallest = None if self.every else self.smallest()
        pull = self._add(self.pairs, smallest)
        for panel in self.panels():
            pulls = self._add(panel, smallest)
            panel.spread(self._rare(), pulls, self.points)
        inverse_mass = 1.0 / self.mass.clamp_min(0.5)  # 0 with fewer than two neurons
        grad = self._pulled(pull * inverse_mass[self.pairs.rows // self.w.shape[1]]).view_as(self.w)
        if self.rare is not None:
            rare = tangent(self._parted(self.rare), self.points).view_as(self.w)
            grad += self._bounded(rare * inverse_mass[:, None, None])
        return self.total * inverse_mass, to_weights(grad, self.inverse_norm, out)

    def _add(self, part: Pairs | Panel, smallest: Tensor | None) -> Tensor:
        """Add to the value what is tied with the smallest squared chord (b,), or its row's; return the weights of the pulls."""
        group = part.rows // self.w.shape[1]
        limit = (
            part.least()
            if smallest is None
            else smallest[group].view(-1, *[1] * (part.near.dim() - 1))
        )
        tied = part.near <= limit * (1.0 + self.tie)
        weight = tied.double() / (part.count(tied) if self.every else 1.0)
        value, slope = self.term.kernel(
            torch.where(tied, part.near, 2.0), torch.where(tied, part.far, 2.0)
        )
        for kept, added in ((self.total, weight * value), (self.mass, weight)):
            kept.index_put_(
                (group,), added.flatten(1).sum(1) if added.dim() > 1 else added, accumulate=True
            )
        together = tied & (part.near < COINCIDENT)
        signed = weight * part.sign
        if bool(together.any()):
            self._part(part, torch.where(together, signed, 0.0))
        return torch.where(together, 0.0, 2.0 * slope * signed)

    def _pulled(self, pull: Tensor) -> Tensor:
        """The gradient (b * n, d) of the pairs on the sphere: minus their pulls times the tangent parts of x at y, and y at x.

        With e = x - s y and sides s those are e + s |e|**2 / 2 y and -s (e - |e|**2 / 2 x): close pairs lose no digits.
        """
        pairs, x = self.pairs, self.x.flatten(0, 1)
        near, half = pairs.close, pull * pairs.square / 2.0
        radial = pull - half
        radial[near] = -(half * pairs.side)[near]
        own = torch.zeros_like(x[:, 0], dtype=torch.float64)
        for end in (pairs.rows, pairs.cols):
            own.index_put_((end,), radial, accumulate=True)
        apart = pull.index_fill(0, near, 0.0)
        end, order = torch.cat([pairs.rows, pairs.cols]).sort(stable=True)
        begin = torch.searchsorted(end, torch.arange(len(x), device=end.device))
        other, weight = (
            torch.cat(both)[order] for both in ((pairs.cols, pairs.rows), (-apart, -apart))
        )
        grad: Tensor = nn.functional.embedding_bag(
            other, x, begin, mode="sum", per_sample_weights=self._bounded(weight)
        )
        grad.addcmul_(x, self._bounded(own)[:, None])
        for end, weight in ((pairs.rows, pull * pairs.side), (pairs.cols, -pull)):
            grad.index_put_(
                (end[near],), self._bounded(weight[near])[:, None] * pairs.step, accumulate=True
            )
        return grad

    def _bounded(self, part: Tensor) -> Tensor:
        """In the dtype of the neurons, and so that no product with a unit row overflows it."""
        bound = torch.finfo(self.w.dtype).max ** 0.75
        return part.clamp(-bound, bound).to(self.w.dtype)

    def _rare(self) -> Tensor:
        """A gradient in float64, made when it is needed."""
        if self.rare is None:
            self.points = unit_rows(self.w.flatten(0, 1).double())[0]
            self.rare = torch.zeros_like(self.points)
        return self.rare

    def _part(self, part: Pairs | Panel, weight: Tensor) -> None:
        """Note coincident partners."""
        self._rare()
        if self.noise is None:
            b, n, d = self.w.shape
            self.noise = seeded_noise(n, d, like=self.points).repeat(b, 1)
            self.away, self.degree = (
                torch.zeros_like(self.points),
                torch.zeros_like(self.points[:, :1]),
            )
        part.spread(self.away, weight, self.noise)
        part.spread(self.degree, -weight.abs(), torch.ones_like(self.degree))

    def _parted(self, grad: Tensor) -> Tensor:
        """With what parts coincident neurons."""
        if self.noise is None:
            return grad
        return grad + self.term.force() * parting(self.points, self.away, self.degree, self.noise)
