"""A kernel of the distance to the nearest neighbour of every neuron, or of the nearest pair.

One pass over row panels of the upper triangle of the Gram matrix, n*n*d FLOP, finds the largest and
second largest cosine of every row. If the two differ by more than rounding, the nearest neighbour
is known; other rows list their candidates. Where float32 is not precise enough, listed pairs are
compared by differences in float64. Only rows with many candidates are compared with all neurons in
float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_hsu._core.kernel import Kernel
from lightning_hsu._core.near import COINCIDENT, NEAR
from lightning_hsu._core.neighbours import CandidatePairs, CrowdedRows, Nearest
from lightning_hsu._core.pairwise import PANEL
from lightning_hsu._core.parts import Done, part_of
from lightning_hsu._core.precision import exact_arithmetic, with_float64, working_dtype
from lightning_hsu._core.sphere import (
    seeded_noise,
    separating_tangents,
    tangent,
    to_weights,
    unit_rows,
)

_GRAM_ENTRIES = 2**22
"""Gram entries of the groups computed together."""


@dataclass(frozen=True)
class NearestTerm:
    """A kernel of the distance to the nearest neuron.

    Args:
        kernel: Value and slope at squared chords q and p = 4 - q, both in [0, 4]; finite.
        half_space: A neuron's mirror image counts as well; the nearer of the two is taken.
        every_neuron: Take the mean over neurons of the kernel at their nearest neighbour; otherwise
            the kernel at the nearest pair.
        knee: Coincident neurons separate with the force at this chord.
    """

    kernel: Kernel
    half_space: bool
    every_neuron: bool
    knee: float

    def force(self) -> float:
        """Slope in the chord, at the knee."""
        q = torch.tensor([self.knee**2, 4.0 - self.knee**2], dtype=torch.float64)
        return 2.0 * self.knee * float(self.kernel(q[0], q[1])[1])


def smallest_angle(w: Tensor, *, half_space: bool = False, done: Done | None = None) -> Tensor:
    """Smallest angle between two neurons, in radians.

    Args:
        w: Neurons, shape (..., n, d). Zero and non-finite rows take no part.
        half_space: Measure angles between lines, so that opposite neurons coincide.
        done: Called with the fraction of the work that is done.

    Returns:
        Angles (...) in [0, pi] (half space: [0, pi / 2]), float64; NaN where fewer than two neurons
        take part.
    """
    if w.numel() == 0:
        return w.new_full(w.shape[:-2], float("nan"), dtype=torch.float64)
    stack = with_float64(w.detach()).reshape(-1, *w.shape[-2:])
    found = []
    with torch.no_grad(), exact_arithmetic(stack):
        before = 0
        for groups in _split(stack):
            within = part_of(done, before / len(stack), len(groups) / len(stack))
            nearest = Nearest(groups, half_space, settled=1.0 - NEAR / 2, done=within)
            found.append(nearest.smallest())
            before += len(groups)
    q = torch.cat(found).reshape(w.shape[:-2])
    angle = 2.0 * torch.atan2(q.sqrt(), (4.0 - q).clamp_min(0.0).sqrt())
    return torch.where(q.isfinite(), angle, float("nan"))


def nearest_energy(w: Tensor, term: NearestTerm) -> tuple[Tensor, Tensor]:
    """Kernel at the nearest neurons and its gradient, both as means over ties.

    Args:
        w: Neurons, shape (..., n, d), any floating dtype; rows of any positive norm. Zero and
            non-finite rows take no part.
        term: The kernel.

    Returns:
        The value (...) in float32 or wider, 0 with fewer than two neurons, and the gradient with
        the shape and dtype of ``w``. Both are finite, and bitwise the same for the same weights.
    """
    dtype = working_dtype(w.dtype)
    if w.numel() == 0:
        return w.new_zeros(w.shape[:-2], dtype=dtype), torch.zeros_like(w)
    stack = with_float64(w.detach()).reshape(-1, *w.shape[-2:])
    values = []
    grads = []
    with torch.no_grad(), exact_arithmetic(stack):
        for groups in _split(stack):
            value, grad = _NearestEnergy(groups, term).result(w.dtype)
            values.append(value)
            grads.append(grad)
    value = torch.cat(values).reshape(w.shape[:-2])
    grad = torch.cat(grads).reshape(w.shape)
    return value.to(w.device, dtype), grad.to(w.device)


def _split(stack: Tensor) -> tuple[Tensor, ...]:
    """Split a stack (b, n, d) into runs of groups whose Gram matrices together are small enough."""
    n = stack.shape[1]
    count = max(1, _GRAM_ENTRIES // (min(PANEL, n) * n))
    return torch.split(stack.to(working_dtype(stack.dtype)), count)


class _NearestEnergy(Nearest):
    """Value and gradient of a kernel at the nearest neurons.

    The gradient of listed pairs is computed in the dtype of the neurons. Crowded rows and
    coincident neurons are rare: theirs is computed in float64, in tensors made only when needed.
    """

    def __init__(self, w: Tensor, term: NearestTerm) -> None:
        super().__init__(w, term.half_space, term.every_neuron)
        self.term = term
        self.total = torch.zeros(len(w), dtype=torch.float64, device=w.device)  # of the kernel
        self.mass = torch.zeros_like(self.total)  # of the weights, by which it is divided
        self.rare: _RareGradient | None = None

    def result(self, out: torch.dtype) -> tuple[Tensor, Tensor]:
        """Value (b,) in float64 and gradient (b, n, d) in ``out``."""
        smallest = None if self.every else self.smallest()
        pull = self._add(self.pairs, smallest)
        for crowded in self.crowded_rows():
            crowded_pull = self._add(crowded, smallest)
            rare = self._rare_gradient()
            crowded.spread(rare.grad, crowded_pull, rare.points)
        inverse_mass = 1.0 / self.mass.clamp_min(0.5)  # 0 with fewer than two neurons
        pull *= inverse_mass[self.pairs.rows // self.w.shape[1]]
        grad = self._gradient_of_pairs(pull).view_as(self.w)
        if self.rare is not None:
            rare_grad = self.rare.tangents(self.term.force()).view_as(self.w)
            grad += self._bounded(rare_grad * inverse_mass[:, None, None])
        return self.total * inverse_mass, to_weights(grad, self.inverse_norm, out)

    def _add(self, part: CandidatePairs | CrowdedRows, smallest: Tensor | None) -> Tensor:
        """Add the pairs tied with the nearest to the value, and note coincident ones.

        Args:
            part: Candidates, (m,) pairs or (k, n) entries of rows.
            smallest: Smallest squared chord (b,) of each group; None to take that of each row.

        Returns:
            The weights of the pulls, in the shape of the candidates; 0 for coincident pairs.
        """
        group = part.rows // self.w.shape[1]
        per_row = (-1, *[1] * (part.near.dim() - 1))
        limit = part.least() if smallest is None else smallest[group].view(per_row)
        tied = part.near <= limit * (1.0 + self.tie)
        weight = tied.double()
        if self.every:
            weight /= part.count(tied)
        near = torch.where(tied, part.near, 2.0)
        far = torch.where(tied, part.far, 2.0)
        value, slope = self.term.kernel(near, far)
        for total, added in ((self.total, weight * value), (self.mass, weight)):
            if added.dim() > 1:
                added = added.sum(1)
            total.index_put_((group,), added, accumulate=True)
        signed = weight * part.sign
        duplicates = tied & (part.near < COINCIDENT)
        if bool(duplicates.any()):
            self._rare_gradient().add_duplicates(part, torch.where(duplicates, signed, 0.0))
        return torch.where(duplicates, 0.0, 2.0 * slope * signed)

    def _rare_gradient(self) -> _RareGradient:
        if self.rare is None:
            self.rare = _RareGradient(self.w)
        return self.rare

    def _gradient_of_pairs(self, pull: Tensor) -> Tensor:
        """The gradient of listed pairs on the sphere, (b * n, d) in the dtype of the neurons.

        It is minus their pulls (m,) times the tangent parts of x at y and of y at x. With sides s
        and ``e = x - s y`` these are ``e + s |e|**2 / 2 y`` and ``-s (e - |e|**2 / 2 x)``, so close
        pairs lose no digits.
        """
        pairs = self.pairs
        x = self.x.flatten(0, 1)
        close = pairs.close
        half = pull * pairs.square / 2.0
        radial = pull - half
        radial[close] = -(half * pairs.side)[close]
        total_radial = torch.zeros_like(x[:, 0], dtype=torch.float64)
        for end in (pairs.rows, pairs.cols):
            total_radial.index_put_((end,), radial, accumulate=True)
        # Pairs that are not close: sums over each neuron's partners, in a fixed order.
        apart = -pull.index_fill(0, close, 0.0)
        end, order = torch.cat([pairs.rows, pairs.cols]).sort(stable=True)
        begin = torch.searchsorted(end, torch.arange(len(x), device=end.device))
        partner = torch.cat([pairs.cols, pairs.rows])[order]
        weight = self._bounded(torch.cat([apart, apart])[order])
        grad: Tensor = nn.functional.embedding_bag(
            partner, x, begin, mode="sum", per_sample_weights=weight
        )
        grad.addcmul_(x, self._bounded(total_radial)[:, None])
        for end, weight in ((pairs.rows, pull * pairs.side), (pairs.cols, -pull)):
            step = self._bounded(weight[close])[:, None] * pairs.step
            grad.index_put_((end[close],), step, accumulate=True)
        return grad

    def _bounded(self, part: Tensor) -> Tensor:
        """The part in the dtype of the neurons, bounded so that its products are finite."""
        bound = torch.finfo(self.w.dtype).max ** 0.75
        return part.clamp(-bound, bound).to(self.w.dtype)


class _RareGradient:
    """The float64 part of a gradient: that of crowded rows, and that which separates duplicates.

    Args:
        w: Neurons, shape (b, n, d).
    """

    def __init__(self, w: Tensor) -> None:
        self.shape = w.shape
        self.points = unit_rows(w.flatten(0, 1).double())[0]  # (b * n, d)
        self.grad = torch.zeros_like(self.points)
        self.noise: Tensor | None = None
        self.away = torch.zeros(0)  # (b * n, d), minus the noise of all partners
        self.degree = torch.zeros(0)  # (b * n, 1), the weight of all partners

    def add_duplicates(self, part: CandidatePairs | CrowdedRows, weight: Tensor) -> None:
        """Note coincident pairs; ``weight`` is 0 for other pairs, negative for mirror images."""
        if self.noise is None:
            b, n, d = self.shape
            self.noise = seeded_noise(n, d, like=self.points).repeat(b, 1)
            self.away = torch.zeros_like(self.points)
            self.degree = torch.zeros_like(self.points[:, :1])
        part.spread(self.away, weight, self.noise)
        part.spread(self.degree, -weight.abs(), torch.ones_like(self.degree))

    def tangents(self, force: float) -> Tensor:
        """The gradient (b * n, d) on the sphere; a force separates coincident neurons."""
        grad = self.grad
        if self.noise is not None:
            apart = separating_tangents(self.points, self.away, self.degree, self.noise)
            grad = grad + force * apart
        return tangent(grad, self.points)
