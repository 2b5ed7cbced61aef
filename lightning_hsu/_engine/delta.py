"""Penalty gradients that are kept and used for several steps, within a tolerance.

The penalty's gradient depends on the weights alone, and weights move little in a step. So the
gradient of each layer, its *delta*, is kept, and computed again when it is due (reuse.py) or when
the neurons have moved too far. In between it is added as it is, and at every age that is a power of
two it is projected anew on the tangent of its neurons. (At 16 steps that projection takes 0.3 % off
an error of 15 %: it keeps norms from drifting, and need not be done at each step.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_hsu._core import working_dtype
from lightning_hsu._core.foreach import add_pair_gradients, shortening
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu._engine.layer import Layer
from lightning_hsu._engine.reuse import Reuse
from lightning_hsu.measures import Measure

_SAMPLE = 1024
"""Entries of a layer by which it is seen how far its neurons have moved."""

_FAR = 0.1
"""Below this part of the step limit no row can reach it within the tolerance, and none is looked at."""


@dataclass(eq=False, slots=True)
class Use:
    """One layer at a step that uses its gradient.

    Args:
        layer: The layer.
        x: Its neurons (groups, n, d) as they are now, without a graph.
        sample: Some entries of them.
        moved: Relative change of these since the gradient was computed; inf without a gradient.
        is_due: Whether its gradient is computed at this step.
    """

    layer: Layer
    x: Tensor
    sample: Tensor
    moved: float = math.inf
    is_due: bool = True


@dataclass(eq=False, slots=True)
class Delta:
    """The kept gradient of a layer.

    Args:
        measure: The measure whose penalty it is the gradient of.
        grad: The gradient (groups, n, d), summed over the groups: of the neurons' dtype, or float32
            for float16, whose range is too small.
        sample: Entries of the neurons of which it was computed.
        value: The penalty (groups,) if it is needed.
        steepest: The largest length of its rows over the norm of a row's neuron; inf if not known.
        longest: The largest length of its rows; inf if not known.
        age: Steps that have used it.
    """

    measure: Measure
    grad: Tensor
    sample: Tensor
    value: Tensor | None = None
    steepest: float = math.inf
    longest: float = math.inf
    age: int = 0

    def fits(self, use: Use) -> bool:
        """Whether it is a gradient of this layer, as far as the outside tells."""
        x = use.x
        if self.grad.shape != x.shape or self.grad.device != x.device:
            return False
        return self.measure == use.layer.measure and self.sample.dtype == use.sample.dtype


class Deltas:
    """The kept gradients of all layers, and what is known of how they age.

    Args:
        tolerance: The largest relative error that a gradient may have; None keeps none.

    Attributes:
        reuse: For how long each layer's gradient may be used, by name.
        computed: Names of the layers whose gradients the last step has computed.
    """

    def __init__(self, tolerance: float | None = None) -> None:
        self.tolerance = tolerance
        self.reuse: dict[str, Reuse] = {}
        self.computed: set[str] = set()
        self._deltas: dict[str, Delta] = {}
        self._work = _Work()

    def __bool__(self) -> bool:
        """Whether gradients are kept."""
        return self.tolerance is not None

    def begin_step(self) -> None:
        """Begin a step."""
        self.computed = set()

    def find_due(self, uses: Sequence[Use], *, same_step: bool = False) -> None:
        """Decide of which layers the gradient is computed at this step.

        Args:
            uses: The layers that the step changes.
            same_step: Whether this is another evaluation within a step: then every change of the
                weights counts.
        """
        self._see_moves(uses)
        for use in uses:
            delta = self._deltas.get(use.layer.name)
            use.is_due = delta is None or self._is_due(use, delta, same_step)
            self._work.add(use)
            if use.is_due:
                self.computed.add(use.layer.name)

    def keep(
        self,
        uses: Sequence[Use],
        grads: Sequence[Tensor],
        *,
        draws: Iterable[str] = (),
        learns: bool = True,
    ) -> None:
        """Keep the gradients of layers that were due.

        Args:
            uses: These layers.
            grads: Their gradients (groups, n, d), which are now the property of this object.
            draws: Names of layers whose gradients come from random draws, so that two of them do
                not tell how fast they age.
            learns: Whether a step has passed since the gradients that are replaced.
        """
        numbers = _numbers(uses, grads, [self._deltas.get(use.layer.name) for use in uses])
        random = set(draws)
        for use, grad, (error, steepest, longest) in zip(uses, grads, numbers, strict=True):
            name = use.layer.name
            before = self._deltas.get(name)
            reuse = self.reuse.setdefault(name, Reuse())
            if learns and before is not None and before.age > 0 and before.fits(use):
                assert self.tolerance is not None
                known = None if name in random else error
                reuse.learn(name, before.age, use.moved, known, self.tolerance)
            kept = grad.to(_storage_dtype(use.x.dtype))
            sample = use.sample.clone()
            self._deltas[name] = Delta(use.layer.measure, kept, sample, None, steepest, longest)

    def of(self, use: Use) -> Delta:
        """The kept gradient of a layer."""
        return self._deltas[use.layer.name]

    def grow_older(self, uses: Sequence[Use]) -> None:
        """Note that a step has used these gradients."""
        for use in uses:
            self._deltas[use.layer.name].age += 1

    def errors(self) -> dict[str, float]:
        """The last measured errors of gradients that were replaced, by layer."""
        return {name: one.error for name, one in self.reuse.items() if math.isfinite(one.error)}

    def share_of_work(self) -> float:
        """The part of the arithmetic that was done since this was last asked; NaN for no step."""
        return self._work.take_share()

    def state_dict(self) -> dict[str, dict[str, float]]:
        """For how long gradients may be used, by layer."""
        return {name: one.state() for name, one in self.reuse.items()}

    def restore(self, reuse: dict[str, Reuse]) -> None:
        """Restore what is known of how gradients age; all of them are due."""
        self.make_due()
        self.reuse = reuse

    def make_due(self) -> None:
        """Let the next step compute every gradient, as it does after a resume."""
        self._deltas = {}

    def forget(self) -> None:
        """Forget the gradients and how they age: another model has come."""
        self.make_due()
        self.reuse = {}

    def follow(self, origins: Mapping[str, str], layers: Sequence[Layer]) -> None:
        """Go on after a change of the model.

        Args:
            origins: The former names of layers that go on, by their names now.
            layers: All layers.
        """
        kept, reuse = {}, {}
        for layer in layers:
            before = origins.get(layer.name)
            if before in self._deltas:
                kept[layer.name] = self._deltas[before]
            if before in self.reuse:
                reuse[layer.name] = self.reuse[before]
        self._deltas = kept
        self.reuse = reuse

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy what is known, never the gradients."""
        return self.__dict__ | {"_deltas": {}, "computed": set()}

    def _is_due(self, use: Use, delta: Delta, same_step: bool) -> bool:
        """Whether a kept gradient is too old, or its neurons have moved too far."""
        if same_step:
            return use.moved != 0
        reuse = self.reuse[use.layer.name]
        if delta.age >= reuse.interval:
            return True
        assert self.tolerance is not None
        return reuse.is_off(use.moved, self.tolerance)

    def _see_moves(self, uses: Sequence[Use]) -> None:
        """Note how far the neurons have moved since their gradients were computed."""
        alike: dict[object, list[Use]] = {}
        for use in uses:
            delta = self._deltas.get(use.layer.name)
            if delta is None or not delta.fits(use):
                self._deltas.pop(use.layer.name, None)
                continue
            sample = use.sample
            alike.setdefault((sample.numel(), sample.dtype, sample.device), []).append(use)
        for members in alike.values():
            size = members[0].sample.numel()
            now = torch.cat([use.sample for use in members]).view(-1, size)
            then = torch.cat([self._deltas[use.layer.name].sample for use in members])
            for use, moved in zip(members, _relative_change(now, then.view(-1, size)), strict=True):
                use.moved = moved


@dataclass
class _Work:
    """The arithmetic of the steps, in FLOP."""

    done: float = 0.0
    whole: float = 0.0
    _flops: dict[tuple[Measure, int, int], float] = field(default_factory=dict)

    def add(self, use: Use) -> None:
        """Count a layer at a step."""
        groups, n, d = use.layer.target.shape
        key = (use.layer.measure, n, d)
        if key not in self._flops:
            self._flops[key] = use.layer.measure.grad_flops(n, d)
        flops = groups * self._flops[key]
        self.whole += flops
        if use.is_due:
            self.done += flops

    def take_share(self) -> float:
        """The part that was done, since this was last asked."""
        share = self.done / self.whole if self.whole > 0 else math.nan
        self.done = self.whole = 0.0
        return share


def use_of(layer: Layer, x: Tensor) -> Use:
    """A layer with neurons x (groups, n, d) at a step."""
    return Use(layer, x, sample_of(x))


def sample_of(x: Tensor) -> Tensor:
    """Up to 1024 entries of x (groups, n, d), spread over its rows and columns."""
    entries = x.numel()
    size = min(_SAMPLE, entries)
    if size == 0:
        return x.reshape(-1)
    step = entries // size
    while step > 1 and math.gcd(step, x.shape[-1]) > 1:
        step -= 1  # else all of them could be of one column
    if not x.is_contiguous():
        return x.reshape(-1)[::step][:size]
    return x.as_strided((size,), (step,), x.storage_offset())


def add_plain(
    deltas: Deltas,
    found: Sequence[tuple[Layer, PairTerm, GradientUpdate]],
    *,
    same_step: bool,
) -> None:
    """Add the kept gradients of plain layers, after computing those that are due.

    Args:
        deltas: The kept gradients.
        found: The layers, with the kernels of their measures and their updates.
        same_step: Whether this is another evaluation within a step.
    """
    uses = [use_of(layer, update.w) for layer, _, update in found]
    deltas.find_due(uses, same_step=same_step)
    due = []
    grads = []
    by_term: dict[PairTerm, list[GradientUpdate]] = {}
    for use, (_, term, update) in zip(uses, found, strict=True):
        if use.is_due:
            w = update.w
            grad = torch.zeros(w.shape, dtype=working_dtype(w.dtype), device=w.device)
            out = grad if update.shape is None else grad.view(update.entries.shape)
            alone = GradientUpdate(update.entries, out, 1.0, None, 1.0, update.shape)
            by_term.setdefault(term, []).append(alone)
            due.append(use)
            grads.append(grad)
    for term, updates in by_term.items():
        add_pair_gradients(updates, term)
    if due:
        deltas.keep(due, grads, learns=not same_step)
    _add_kept(deltas, uses, [update for _, _, update in found])
    if not same_step:
        deltas.grow_older(uses)


def _add_kept(deltas: Deltas, uses: Sequence[Use], updates: Sequence[GradientUpdate]) -> None:
    """Add kept gradients to their layers: most of them in one call."""
    together: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for use, update in zip(uses, updates, strict=True):
        delta = deltas.of(use)
        refresh(use, delta)
        scale = update.scale * update.grad_scale
        if _is_far(delta, update):
            outs, grads = together.setdefault(scale, ([], []))
            outs.append(update.out)
            grads.append(delta.grad)
            continue
        w = use.x.to(working_dtype(use.x.dtype))
        grad = delta.grad.to(w.dtype)
        bound = torch.finfo(use.x.dtype).max / 2
        factor = shortening(grad, w, update.scale, update.limit, bound)
        update.out.add_(grad * (factor * scale))
    for scale, (outs, grads) in together.items():
        torch._foreach_add_(outs, grads, alpha=scale)


def refresh(use: Use, delta: Delta) -> None:
    """Project an older gradient on the tangent of the neurons, at ages that are powers of two."""
    age = delta.age
    if use.is_due or age == 0 or age & (age - 1):
        return
    dtype = working_dtype(use.x.dtype)
    delta.grad.copy_(along_tangent(delta.grad.to(dtype), use.x.to(dtype)))


def along_tangent(grad: Tensor, w: Tensor) -> Tensor:
    """The part of each row of ``grad`` that is tangent at the row of w; both (groups, n, d).

    Rows that are 0, not finite or beyond the range of squares stay as they are.
    """
    along = torch.linalg.vecdot(grad, w).unsqueeze(-1)
    along /= torch.linalg.vector_norm(w, dim=-1, keepdim=True).square_()
    # A row of w that is not finite has no finite quotient.
    usable = torch.isfinite(along)
    along.masked_fill_(~usable, 0.0)
    return torch.addcmul(grad, along, torch.where(usable, w, 0.0), value=-1.0)


def _is_far(delta: Delta, update: GradientUpdate) -> bool:
    """Whether no row of a gradient can come near the step limit, or the bound of the dtype."""
    scale = update.scale
    if scale * delta.longest > _FAR * torch.finfo(update.entries.dtype).max / 2:
        return False
    if update.limit is None:
        return True
    if isinstance(update.limit, Tensor):
        return False
    return scale * delta.steepest <= _FAR * update.limit


def _storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient of such neurons is kept."""
    return torch.float32 if dtype == torch.float16 else dtype


def _relative_change(now: Tensor, then: Tensor) -> list[float]:
    """Norms of the rows of ``now - then`` (k, m) over those of ``then``; 0 where both are equal."""
    now, then = now.to(working_dtype(now.dtype)), then.to(working_dtype(then.dtype))
    change = torch.linalg.vector_norm(now - then, dim=1)
    relative = change / torch.linalg.vector_norm(then, dim=1)
    found: list[float] = torch.where(change == 0, 0.0, relative).tolist()
    return found


class KnownGradient(torch.autograd.Function):
    """A number whose gradient in x is known; differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return number.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_number: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * by_number, None, None


def _numbers(
    uses: Sequence[Use], grads: Sequence[Tensor], before: Sequence[Delta | None]
) -> list[tuple[float, float, float]]:
    """Of fresh gradients: relative error of what they replace, steepest and longest row."""
    found = []
    for use, grad, delta in zip(uses, grads, before, strict=True):
        error = torch.full((), math.nan, device=grad.device)
        if delta is not None:
            error = _error(delta.grad.to(grad.dtype), grad)
            if use.layer.rows is not None:
                parameter = use.layer.parameters[0]
                error = use.layer.target.placement.largest(error, parameter)
        length = torch.linalg.vector_norm(grad, dim=-1)
        norm = torch.linalg.vector_norm(use.x, dim=-1, dtype=grad.dtype)
        smallest = torch.finfo(grad.dtype).tiny
        steepest = (length / norm.clamp_min(smallest)).amax()
        found += [error, steepest, length.amax()]
    if not found:
        return []
    device = found[0].device
    numbers = torch.stack([number.to(device, torch.float32) for number in found]).tolist()
    return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def _error(old: Tensor, fresh: Tensor) -> Tensor:
    """Norm of the difference over the norm of the fresh gradient; 0 where both are 0."""
    off = torch.linalg.vector_norm(old - fresh)
    return torch.where(off == 0, 0.0, off / torch.linalg.vector_norm(fresh))
