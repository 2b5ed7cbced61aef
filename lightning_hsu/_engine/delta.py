"""Penalty gradients that are kept and used for several steps, within a tolerance.

The penalty's gradient depends on the weights alone, and weights move little in a step. So the
gradient of each layer, its *delta*, is kept, and computed again when it is due (reuse.py) or when
the neurons have moved too far. In between it is added as it is, and at ages 8, 16, 32 and so on it is
projected anew on the tangent of its neurons. (At 16 steps that takes 0.3 % off an error of 15 %: it
keeps norms from drifting, and need not be done at each step.)

In full space one part of the gradient ages much faster than the rest, the pull along the sum of all
neurons, and left old it makes that sum swing. It takes one pass over the weights, and is followed
in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_hsu._core import exact_arithmetic, working_dtype
from lightning_hsu._core.bf16 import slope_at_right_angles
from lightning_hsu._core.sphere import LONGEST, SHORTEST
from lightning_hsu._engine.late import LateNumbers
from lightning_hsu._engine.layer import Layer
from lightning_hsu._engine.reuse import Reuse
from lightning_hsu.measures import Measure

_SAMPLE = 1024
"""Entries of a layer by which it is seen how far its neurons have moved."""

_PROJECTED_FROM = 8
"""The age, a power of two, from which kept gradients are projected on the tangent now and then."""


@dataclass(eq=False, slots=True)
class Use:
    """One layer at a step that uses its gradient.

    Args:
        layer: The layer.
        x: Its neurons (groups, n, d) as they are now, without a graph.
        sample: Some entries of them.
        moved: Relative change of these since the gradient was computed; inf without a gradient.
        is_due: Whether its gradient is computed at this step.
        token: Equal as long as its weights are the same, as far as torch knows; None if that is not
            known.
        needs_value: Whether it needs the penalty beside its gradient.
    """

    layer: Layer
    x: Tensor
    sample: Tensor
    token: object = None
    needs_value: bool = False
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
        size: The norm of the sample.
        age: Steps that have used it.
        moved: Relative change of the sample when it was last used.
        pull: The pull along the sum of the neurons that is part of it; None if it has none.
    """

    measure: Measure
    grad: Tensor
    sample: Tensor
    value: Tensor | None = None
    steepest: float = math.inf
    longest: float = math.inf
    size: float = math.nan
    age: int = 0
    moved: float = 0.0
    pull: Pull | None = None

    def bytes(self) -> int:
        """Its memory."""
        kept = [self.grad, self.sample]
        if self.pull is not None:
            kept += [self.pull.inverse, self.pull.total]
        return sum(tensor.nbytes for tensor in kept)

    def refresh(self, x: Tensor) -> None:
        """Bring it nearer to the gradient of its neurons as they are now.

        A pull along their sum is followed at each step, from age 8 at each second one, from 16 at
        each fourth; on a GPU, where few launches matter more, at powers of two only. At ages 8, 16,
        32 and so on the gradient is projected on their tangent.

        Args:
            x: The neurons (groups, n, d) as they are now.
        """
        is_power_of_two = self.age & (self.age - 1) == 0
        projects = is_power_of_two and self.age >= _PROJECTED_FROM
        follows = self.pull is not None and is_power_of_two
        if self.pull is not None and x.device.type == "cpu":
            every = 1
            if self.age >= 8:
                every = 2 if self.age < 16 else 4
            follows = self.age % every == 0
        if not (follows or projects):
            return
        dtype = working_dtype(x.dtype)
        grad, w = self.grad.to(dtype), x.to(dtype)
        if self.pull is not None and follows:
            self.pull.follow(grad, w)
        if projects:
            project(grad, w)
        if grad is not self.grad:
            self.grad.copy_(grad)

    def relative(self, change: float) -> float:
        """A change of the sample, as a part of its norm."""
        if change == 0 or self.size == 0:
            return 0.0 if change == 0 else math.inf
        return change / self.size

    def fits(self, use: Use) -> bool:
        """Whether it is a gradient of this layer, as far as the outside tells."""
        x = use.x
        if self.grad.shape != x.shape or self.grad.device != x.device:
            return False
        if use.needs_value and self.value is None:
            return False
        return self.measure == use.layer.measure and self.sample.dtype == use.sample.dtype


class Deltas:
    """The kept gradients of all layers, and what is known of how they age.

    Args:
        tolerance: The relative error that a gradient may have on average; None keeps none.

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
        self._unread: list[tuple[LateNumbers, list[_Unread]]] = []
        self._moves: dict[str, _Move] = {}

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
        self.settle()
        self._see_moves(uses)
        for use in uses:
            delta = self._deltas.get(use.layer.name)
            use.is_due = delta is None or self._is_due(use, delta, same_step)
            self._work.add(use)
            if use.is_due:
                self.computed.add(use.layer.name)
            elif delta is not None:
                delta.moved = use.moved

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
        random = set(draws)
        by_device: dict[torch.device, list[_Fresh]] = {}
        for use, grad in zip(uses, grads, strict=True):
            name = use.layer.name
            before = self._deltas.get(name)
            kept = grad.to(_storage_dtype(use.x.dtype))
            if kept.untyped_storage().nbytes() > kept.nbytes:
                kept = kept.clone()  # a part of a stack would keep all of it in memory
            delta = Delta(use.layer.measure, kept, use.sample.clone())
            delta.pull = pull_of(use)
            self._deltas[name] = delta
            fresh = _Fresh(use, grad, delta, self.reuse.setdefault(name, Reuse()))
            fresh.is_random = name in random
            if learns and before is not None and before.age > 0:
                fresh.before = before
                if before.pull is not None and before.fits(use):
                    with exact_arithmetic(use.x):
                        before.refresh(use.x)  # as this step would use it
            by_device.setdefault(grad.device, []).append(fresh)
        for members in by_device.values():
            numbers = LateNumbers(_numbers(members))
            self._unread.append((numbers, [fresh.released() for fresh in members]))

    def of(self, use: Use) -> Delta:
        """The kept gradient of a layer."""
        return self._deltas[use.layer.name]

    def refreshed(self, use: Use, *, same_step: bool) -> Delta:
        """The kept gradient of a layer, brought nearer to that of its neurons as they are now.

        Within the ``same_step`` it stays as it is.
        """
        delta = self._deltas[use.layer.name]
        if not (same_step or use.is_due) and delta.age > 0:
            with exact_arithmetic(use.x):  # a hook may run within autocast
                delta.refresh(use.x)
        return delta

    def grow_older(self, uses: Sequence[Use]) -> None:
        """Note that a step has used these gradients."""
        for use in uses:
            self._deltas[use.layer.name].age += 1

    def errors(self) -> dict[str, float]:
        """The last measured errors of gradients that were replaced, by layer."""
        self.settle()
        return {name: one.error for name, one in self.reuse.items() if math.isfinite(one.error)}

    def share_of_work(self) -> float:
        """The part of the arithmetic that was done since this was last asked; NaN for no step."""
        return self._work.take_share()

    def bytes(self) -> int:
        """Memory of the kept gradients and of what is kept beside them."""
        return sum(delta.bytes() for delta in self._deltas.values())

    def state_dict(self) -> dict[str, dict[str, float]]:
        """For how long gradients may be used, by layer."""
        self.settle()
        return {name: one.state() for name, one in self.reuse.items()}

    def restore(self, reuse: dict[str, Reuse]) -> None:
        """Restore what is known of how gradients age; all of them are due."""
        self.make_due()
        self.reuse = reuse

    def make_due(self) -> None:
        """Let the next step compute every gradient, as it does after a resume."""
        self.settle()
        self._deltas = {}
        self._moves = {}

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
        self.settle()
        self._moves = {}
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
        self.settle()
        return self.__dict__ | {"_deltas": {}, "_moves": {}, "computed": set()}

    def _is_due(self, use: Use, delta: Delta, same_step: bool) -> bool:
        """Whether a kept gradient is too old, or its neurons have moved too far."""
        if same_step:
            return use.moved != delta.moved
        reuse = self.reuse[use.layer.name]
        # At age 0 it is of weights within the last step, as of a closure's second evaluation.
        if delta.age == 0 or delta.age >= reuse.interval:
            return True
        assert self.tolerance is not None
        return reuse.is_off(use.moved, self.tolerance)

    def will_be_due(self, use: Use) -> bool:
        """Whether the next step computes a layer's gradient, however little its neurons move."""
        delta = self._deltas.get(use.layer.name)
        if delta is None or not delta.fits(use):
            return True
        return delta.age >= self.reuse[use.layer.name].interval

    def look_for_moves(self, uses: Sequence[Use]) -> None:
        """Begin to look how far neurons have moved, for a step to come."""
        for members in self._alike(uses):
            changes = LateNumbers(self._changes(members))
            for place, use in enumerate(members):
                self._moves[use.layer.name] = _Move(use.token, changes, place)

    def settle(self) -> None:
        """Learn from the numbers of the gradients that were computed last."""
        for numbers, members in self._unread:
            values = iter(numbers.read())
            errors = [next(values) if one.age > 0 else math.nan for one in members]
            for part in ("steepest", "longest", "size"):
                for one in members:
                    setattr(one.delta, part, next(values))
            for one, error in zip(members, errors, strict=True):
                if one.age > 0 and self.tolerance is not None:
                    known = None if one.is_random else error
                    one.reuse.learn(one.name, one.age, one.moved, known, self.tolerance)
        self._unread = []

    def _see_moves(self, uses: Sequence[Use]) -> None:
        """Note how far the neurons have moved since their gradients were computed."""
        unseen = []
        for use in uses:
            known = self._moves.pop(use.layer.name, None)
            if known is not None and known.token is not None and known.token == use.token:
                delta = self._deltas.get(use.layer.name)
                if delta is not None and delta.fits(use):
                    use.moved = delta.relative(known.numbers.read()[known.place])
                    continue
            unseen.append(use)
        for members in self._alike(unseen):
            changes = self._changes(members).tolist()
            for use, change in zip(members, changes, strict=True):
                use.moved = self._deltas[use.layer.name].relative(change)

    def _alike(self, uses: Sequence[Use]) -> list[list[Use]]:
        """Those of the layers that have a gradient, grouped by device and dtype."""
        found: dict[object, list[Use]] = {}
        for use in uses:
            delta = self._deltas.get(use.layer.name)
            if delta is None:
                continue
            if not delta.fits(use):
                del self._deltas[use.layer.name]
                continue
            sample = use.sample
            found.setdefault((sample.dtype, sample.device), []).append(use)
        return list(found.values())

    def _changes(self, uses: Sequence[Use]) -> Tensor:
        """Norms (k,) of the changes of the samples of layers since their gradients were computed."""
        sizes, now, then = [], [], []
        for use in uses:
            sizes.append(use.sample.numel())
            now.append(use.sample)
            then.append(self._deltas[use.layer.name].sample)
        dtype = working_dtype(uses[0].sample.dtype)
        change = torch.cat(now).to(dtype) - torch.cat(then).to(dtype)
        return torch.stack(torch._foreach_norm(list(torch.split(change, sizes))))


class _Move(NamedTuple):
    """How far a layer has moved, on its way to the host.

    Args:
        token: The state of its weights.
        numbers: The changes of several samples.
        place: Which of them is this layer's.
    """

    token: object
    numbers: LateNumbers
    place: int


@dataclass(eq=False)
class _Fresh:
    """A gradient that was just computed.

    Args:
        use: The layer.
        grad: Its gradient.
        delta: What is kept of it.
        reuse: What is known of how this layer's gradients age.
        is_random: Whether it comes from a random draw.
        before: The gradient that it replaces, if something can be learnt from that.
    """

    use: Use
    grad: Tensor
    delta: Delta
    reuse: Reuse
    is_random: bool = False
    before: Delta | None = None

    def released(self) -> _Unread:
        """The same without the tensors."""
        age = 0 if self.before is None else self.before.age
        name = self.use.layer.name
        return _Unread(name, self.delta, self.reuse, self.use.moved, age, self.is_random)


class _Unread(NamedTuple):
    """A gradient whose numbers are not read yet.

    Args:
        name: The layer's.
        delta: The gradient.
        reuse: What is known of how this layer's gradients age.
        moved: How far the neurons have moved since the gradient that it replaces.
        age: Steps since that one was computed; 0 if nothing can be learnt from it.
        is_random: Whether it comes from a random draw.
    """

    name: str
    delta: Delta
    reuse: Reuse
    moved: float
    age: int
    is_random: bool


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


def use_of(layer: Layer, x: Tensor, token: object = None) -> Use:
    """A layer with neurons x (groups, n, d) at a step."""
    return Use(layer, x, sample_of(x), token)


def sample_of(x: Tensor) -> Tensor:
    """Up to about 1024 entries of x (groups, n, d), spread over all its rows and columns."""
    entries = x.numel()
    step = max(1, math.ceil(entries / _SAMPLE))
    while math.gcd(step, x.shape[-1]) > 1:
        step += 1  # else all of them could be of one column
    if not x.is_contiguous():
        return x.reshape(-1)[::step]
    return x.as_strided((math.ceil(entries / step),), (step,), x.storage_offset())


class Pull:
    """The part of a gradient that pulls all neurons along their sum, which ages fastest.

    A neuron's gradient is the sum of F'(q_ij) x_j over its pairs, made tangent and divided by its
    norm. Most pairs are near right angles, q = 2: F'(2) times the sum of all x_j is a large part,
    and all neurons together move that sum within a few steps. It takes one pass over the weights to
    follow it. In half space F'(2) is 0.

    Args:
        slope: The factor of the sum in the gradient.
        w: The neurons (groups, n, d).
    """

    __slots__ = ("inverse", "slope", "total")

    def __init__(self, slope: float, w: Tensor) -> None:
        self.slope = slope
        self.inverse, self.total = _sum_of_units(w)

    def follow(self, grad: Tensor, w: Tensor) -> None:
        """Change a gradient by what the sum and the norms have changed.

        A gradient is inversely proportional to the norm of its row.
        """
        inverse, total = _sum_of_units(w)
        grad.mul_(inverse / self.inverse)
        grad.baddbmm_(inverse, total - self.total, alpha=self.slope)
        self.inverse = inverse
        self.total = total


def _sum_of_units(w: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse norms (groups, n, 1) of rows w (groups, n, d), and the sum (groups, 1, d) of units.

    Rows of unusual norm take no part: theirs is a number so small that it makes no difference.
    """
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    if w.device.type == "cpu":
        shortest, longest = norm.aminmax()
        if shortest.item() > SHORTEST and longest.item() < LONGEST:
            inverse = norm.reciprocal()
            return inverse, inverse.mT @ w
    usual = (norm > SHORTEST) & (norm < LONGEST)
    inverse = torch.where(usual, norm.reciprocal(), 1.0 / LONGEST)
    return inverse, inverse.mT @ torch.where(usual, w, 0.0)


def pull_of(use: Use) -> Pull | None:
    """The pull along the sum of a layer's neurons; None if there is none, or others have them."""
    term = use.layer.measure.pair_term()
    if term is None or term.logarithm or use.layer.rows is not None:
        return None
    slope = slope_at_right_angles(term)
    if slope == 0:
        return None
    dtype = working_dtype(use.x.dtype)
    with exact_arithmetic(use.x):
        return Pull(-2.0 * term.scale(use.x.shape[1]) * slope, use.x.to(dtype))


def project(grad: Tensor, w: Tensor) -> None:
    """Leave of each row of ``grad`` the part that is tangent at the row of w; both (groups, n, d).

    Rows that are 0, not finite or beyond the range of squares stay as they are.
    """
    along = torch.linalg.vecdot(grad, w).unsqueeze(-1)
    along /= torch.linalg.vector_norm(w, dim=-1, keepdim=True).square_()
    usable = torch.isfinite(along)  # a row of w that is not finite has no finite quotient
    if w.device.type != "cpu" or not bool(usable.all()):
        along = torch.where(usable, along, 0.0)
        w = torch.where(usable, w, 0.0)
    grad.addcmul_(w, along, value=-1.0)


def _storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient of such neurons is kept."""
    return torch.float32 if dtype == torch.float16 else dtype


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


def _numbers(members: Sequence[_Fresh]) -> Tensor:
    """Numbers of fresh gradients, in few calls.

    They are the errors of the gradients that are replaced, then of each gradient the lengths of its
    steepest and of its longest row, and the norm of the sample.
    """
    dtype = members[0].grad.dtype
    lengths = []
    inverse = []
    samples = []
    replaced = []
    off = []  # of those that replace one
    sizes = []
    for fresh in members:
        grad = fresh.grad
        lengths.append(torch.linalg.vector_norm(grad, dim=-1).flatten())
        norm = torch.linalg.vector_norm(fresh.use.x, dim=-1, dtype=grad.dtype)
        inverse.append(norm.clamp_min_(torch.finfo(grad.dtype).tiny).reciprocal_().flatten())
        samples.append(fresh.delta.sample.to(dtype))
        if fresh.before is not None:
            # Row by row: the order of these sums does not depend on the number of threads.
            change = fresh.before.grad.to(grad.dtype) - grad
            off.append(torch.linalg.vector_norm(change, dim=-1).flatten())
            sizes.append(lengths[-1])
            replaced.append(fresh)
    found = []
    if replaced:
        found += _errors(replaced, off, sizes)
    found += torch._foreach_norm(torch._foreach_mul(lengths, inverse), math.inf)
    found += torch._foreach_norm(lengths, math.inf)
    found += torch._foreach_norm(samples)
    return torch.stack([number.to(torch.float32) for number in found])


def _errors(
    replaced: Sequence[_Fresh], off: Sequence[Tensor], lengths: Sequence[Tensor]
) -> list[Tensor]:
    """Relative errors of gradients that are replaced; 0 where both are 0.

    Args:
        replaced: What replaces them.
        off: Lengths of the rows of the differences.
        lengths: Lengths of the rows of the fresh gradients.
    """
    change = torch.stack(torch._foreach_norm(list(off)))
    relative = change / torch.stack(torch._foreach_norm(list(lengths)))
    errors = list(torch.where(change == 0, 0.0, relative).unbind())
    for place, fresh in enumerate(replaced):
        layer = fresh.use.layer
        if layer.rows is not None:
            errors[place] = layer.target.placement.largest(errors[place], layer.parameters[0])
    return errors
