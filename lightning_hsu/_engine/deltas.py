"""Penalty gradients that are kept and used for several steps, within a tolerance.

The penalty's gradient depends on the weights alone, and weights move little in a step. So the
gradient of each layer, its *delta*, is kept, and computed again when it is due (reuse.py) or when
the neurons have moved too far. In between it is added as it is, and projected anew on the tangent of
its neurons when it has its turn (turns.py).

In full space one part of the gradient ages much faster than the rest, and is followed in between
(pull.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hsu._core.sphere import SHORTEST
from lightning_hsu._engine.delta import (
    LOOK,
    PROJECT,
    Delta,
    Known,
    Use,
    kept_dtype,
    norms_of,
    strides_of,
)
from lightning_hsu._engine.layer import Layer
from lightning_hsu._engine.lessons import Fresh, Lessons
from lightning_hsu._engine.moves import Moves
from lightning_hsu._engine.pull import pull_of
from lightning_hsu._engine.reuse import Reuse
from lightning_hsu._engine.rows import Rows, is_another
from lightning_hsu._engine.turns import Turn, Turns
from lightning_hsu._engine.work import Work


class Deltas:
    """The kept gradients of all layers, and what is known of how they age.

    Args:
        tolerance: The relative error that a gradient may have on average; None keeps none.

    Attributes:
        tolerance: That one. Change it by :meth:`set_tolerance`.
        reuse: For how long each layer's gradient may be used, by name.
        computed: Names of the layers whose gradients the last step has computed.
        projected: Names of those whose kept gradients it has projected.
        work: The arithmetic of the steps since somebody asked.
    """

    def __init__(self, tolerance: float | None = None) -> None:
        self.tolerance = tolerance
        self.reuse: dict[str, Reuse] = {}
        self.computed: set[str] = set()
        self.projected: set[str] = set()
        self._deltas: dict[str, Delta] = {}
        self._stored: dict[str, dict[str, float]] = {}
        self._unstored: set[str] = set()  # layers of which that is not what is known now
        self.work = Work()
        self._lessons = Lessons()
        self._rows = Rows()
        self._moves = Moves(self._rows)
        self._turns = Turns()
        self._turn: Turn | None = None

    def __bool__(self) -> bool:
        """Whether gradients are kept."""
        return self.tolerance is not None

    def set_tolerance(self, tolerance: float | None) -> None:
        """Go on with another tolerance; None drops the gradients, and what is known of them."""
        self.settle()
        before = self.tolerance
        if tolerance == before:
            return
        if tolerance is None:
            self.forget()
        elif before is not None:
            for name, reuse in self.reuse.items():
                reuse.shorten(tolerance / before)
                if name in self._deltas:
                    delta = self._deltas[name]
                    delta.interval = min(delta.interval, reuse.interval)
            self._unstored.update(self.reuse)
        self.tolerance = tolerance

    def begin_step(
        self,
        optimizer: object,
        layers: Iterable[Layer],
        *,
        keeps: bool = True,
        same_step: bool = False,
    ) -> None:
        """Begin a step; what the last one has begun to tell is read now.

        Args:
            optimizer: What stands for the optimizer.
            layers: The layers that it may step.
            keeps: Whether gradients may be kept; else all are due, and nothing is known of them.
            same_step: Whether this is another evaluation within a step.
        """
        if keeps:
            self.settle()
        else:
            self.restore({}, self.work)
        self.computed = set()
        self.projected = set()
        self._turn = None
        if not same_step:
            self._turn = self._turns.take(optimizer, self._of_age(layers))

    def give_turn(self, optimizer: object, layers: Iterable[Layer]) -> None:
        """Decide which gradient has its turn at the next step, before :meth:`look_for_moves`.

        Args:
            optimizer: What stands for the optimizer.
            layers: The layers that it may step.
        """
        self._turn = self._turns.give(optimizer, self._of_age(layers))

    def find_due(self, uses: Sequence[Use], *, same_step: bool = False) -> None:
        """Decide of which layers the gradient is computed at this step.

        Args:
            uses: The layers that the step changes.
            same_step: Whether this is another evaluation within a step: then every change of the
                weights counts.
        """
        if same_step:
            self.settle()  # what this step has begun to tell, of the same layers
        else:
            for use in uses:
                self._rows.see(use, is_step=True)
        self._moves.see(self._known(uses))
        for use in uses:
            delta = self._deltas.get(use.layer.name)
            use.is_due = delta is None or self._is_due(use, delta, same_step)
            self.work.add(use)
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
            grads: Their gradients, of the shapes of the neurons held, which are now the property of
                this object.
            draws: Names of layers whose gradients come from random draws, so that two of them do
                not tell how fast they age.
            learns: Whether a step has passed since the gradients that are replaced.
        """
        if not uses:
            return
        random = set(draws)
        lessons = []
        norms = [norms_of(use) for use in uses]
        squares = torch._foreach_mul(norms, norms)
        torch._foreach_clamp_min_(squares, SHORTEST**2)  # of zero rows
        for use, grad, norm, square in zip(uses, grads, norms, squares, strict=True):
            before = self._deltas.get(use.layer.name)
            fresh = self._kept(use, grad, norm, square)
            fresh.is_random = use.layer.name in random
            if learns and before is not None and before.age > 0:
                fresh.before = before
                if before.pull is not None and before.fits(use):
                    before.refresh(use.held, projects=False)  # as this step would use it
            lessons.append(fresh)
        self._lessons.begin(lessons)
        self._moves.note_kept({one.use.layer.name: one.delta.sample for one in lessons})

    def of(self, use: Use) -> Delta:
        """The kept gradient of a layer."""
        return self._deltas[use.layer.name]

    def refreshed(self, use: Use, *, same_step: bool) -> Delta:
        """The kept gradient of a layer, brought nearer to that of its neurons as they are now.

        Within the ``same_step`` it stays as it is.
        """
        delta = self._deltas[use.layer.name]
        if not (same_step or use.is_due) and delta.age > 0:
            delta.refresh(use.held, projects=use.is_projected)
            if use.is_projected:
                self.projected.add(use.layer.name)
        return delta

    def grow_older(self, uses: Sequence[Use]) -> None:
        """Note that a step has used these gradients."""
        for use in uses:
            self._deltas[use.layer.name].age += 1

    def errors(self) -> dict[str, float]:
        """The last measured errors of gradients that were replaced, by layer."""
        self.settle()
        return {name: one.error for name, one in self.reuse.items() if math.isfinite(one.error)}

    def share_of_work(self, *, reset: bool) -> float:
        """The part of the arithmetic that was done since this was last ``reset``; NaN for no step."""
        return self.work.share(reset=reset)

    def bytes(self) -> int:
        """Memory of the kept gradients and of what is kept beside them."""
        return sum(delta.bytes() for delta in self._deltas.values())

    def state_dict(self) -> dict[str, dict[str, float]]:
        """For how long gradients may be used, by layer; not to be changed.

        A Trainer's callback asks at every step, in case it is interrupted: only what has changed is
        made anew.
        """
        self.settle()
        if self._unstored:
            stored = {}
            for name, one in self.reuse.items():
                stored[name] = one.state() if name in self._unstored else self._stored[name]
            self._stored = stored
            self._unstored = set()
        return self._stored

    def restore(self, reuse: dict[str, Reuse], work: Work) -> None:
        """Restore what is known of how gradients age, and the work done; all of them are due.

        Without a tolerance no work is counted.
        """
        self.make_due()
        self._take(reuse)
        self.work = work if self else Work()

    def make_due(self) -> None:
        """Let the next step compute every gradient, as it does after a resume."""
        self.settle()
        self._deltas = {}
        self._drop_looks()

    def forget(self) -> None:
        """Forget the gradients, how they age, and the work done: another model has come."""
        self.restore({}, Work())
        self.computed = set()

    def follow(self, origins: Mapping[str, str], layers: Sequence[Layer]) -> None:
        """Go on after a change of the model.

        Args:
            origins: The former names of layers that go on, by their names now.
            layers: All layers.
        """
        self.settle()
        self._drop_looks()
        kept, reuse = {}, {}
        for layer in layers:
            before = origins.get(layer.name)
            if before in self._deltas:
                kept[layer.name] = self._deltas[before]
            if before in self.reuse:
                reuse[layer.name] = self.reuse[before]
        self._deltas = kept
        self._take(reuse)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy what is known, never the gradients."""
        self.settle()
        rows = Rows()
        return self.__dict__ | {
            "_deltas": {},
            "_moves": Moves(rows),
            "_rows": rows,
            "_turns": Turns(),
            "_turn": None,
            "computed": set(),
            "projected": set(),
        }

    def will_be_due(self, use: Use) -> bool:
        """Whether the next step computes a layer's gradient, however little its neurons move."""
        delta = self._deltas.get(use.layer.name)
        if delta is None or not delta.fits(use):
            return True
        return self._is_old(use.layer.name, delta)

    def look_for_moves(self, uses: Sequence[Use], *, checks: bool = True) -> None:
        """Begin to look how far neurons have moved, for a step to come; see :class:`Moves`."""
        for use in uses:
            self._rows.see(use, is_step=False)
        self._moves.begin(self._known(uses), checks=checks)

    def changed_unseen(self, layers: Sequence[Layer]) -> list[Layer]:
        """Those whose weights had changed at their last step without torch's counting it."""
        return self._moves.changed_unseen(layers)

    def just_kept(self, layers: Sequence[Layer]) -> list[Layer]:
        """Those whose gradients were computed for the last use, and may serve for this one.

        Whether they were exact is known now. Where ranks train together none is told of: the rank
        that has computed a gradient knows it alone.
        """
        found = []
        for layer in layers:
            delta = self._deltas.get(layer.name)
            if delta is None or delta.age != 1 or self._is_old(layer.name, delta):
                continue
            if layer.target.placement.is_alone:
                found.append(layer)
        return found

    def drop(self, layers: Iterable[Layer]) -> None:
        """Drop what is kept of layers, and what was begun of them for the step to come.

        Where ranks train together one of them may have seen alone what has changed, but all compute
        the same layers: there a gradient is used until it is due.
        """
        for layer in layers:
            self._moves.drop(layer.name)
            if layer.target.placement.is_alone:
                self._deltas.pop(layer.name, None)

    def settle(self) -> None:
        """Learn from the numbers of the gradients that were computed last."""
        self._unstored |= self._lessons.learn(self.tolerance)

    def _kept(self, use: Use, grad: Tensor, norm: Tensor, square: Tensor) -> Fresh:
        """Keep the gradient of one layer.

        Args:
            use: The layer.
            grad: Its gradient.
            norm: The norms of its neurons.
            square: Their squares, none of them zero.
        """
        name = use.layer.name
        kept = grad.to(kept_dtype(use.x.dtype))
        if kept.untyped_storage().nbytes() > kept.nbytes:
            kept = kept.clone()  # a part of a stack would keep all of it in memory
        if name not in self.reuse:
            self.reuse[name] = Reuse()
            self._unstored.add(name)
        reuse = self.reuse[name]
        delta = Delta(use.layer.measure, kept, use.sample.clone(), square)
        delta.strides = strides_of(use.layer)
        delta.pull = pull_of(use.layer, use.x, norm)
        delta.interval = reuse.interval
        delta.sketch = self._rows.sketch(use.x, reuse.interval)
        self._deltas[name] = delta
        return Fresh(use, grad, norm, delta, reuse)

    def _is_due(self, use: Use, delta: Delta, same_step: bool) -> bool:
        """Whether a kept gradient is too old, or its neurons have moved too far."""
        if same_step:
            return use.moved != delta.moved
        # At age 0 it is of weights within the last step, as of a closure's second evaluation.
        if delta.age == 0 or self._is_old(use.layer.name, delta):
            return True
        assert self.tolerance is not None
        if self.reuse[use.layer.name].is_off(use.moved, self.tolerance):
            return True
        return is_another(use.changed, use.moved)

    def _is_old(self, name: str, delta: Delta) -> bool:
        """Whether a kept gradient has been used for as many steps as it may."""
        if delta.age <= 1:
            return delta.age >= delta.interval
        return delta.age >= self.reuse[name].interval

    def _drop_looks(self) -> None:
        """Drop what was begun for the step to come."""
        self._moves.drop()
        self._rows.drop()
        self._turns.drop()
        self._turn = None

    def _of_age(self, layers: Iterable[Layer]) -> Iterator[Delta]:
        """The gradients of these layers that the next step does not compute anyway."""
        for layer in layers:
            delta = self._deltas.get(layer.name)
            if delta is not None and not self._is_old(layer.name, delta):
                yield delta

    def _take(self, reuse: dict[str, Reuse]) -> None:
        """Take what is known of how gradients age."""
        self.reuse = reuse
        self._stored = {}
        self._unstored = set(reuse)

    def _known(self, uses: Sequence[Use]) -> list[Known]:
        """Those of the layers that have a gradient, with it; one that does not fit is dropped."""
        known = []
        for use in uses:
            name = use.layer.name
            delta = self._deltas.get(name)
            if delta is None:
                continue
            if delta.fits(use):
                use.is_projected = self._turn == (delta, PROJECT)
                has_turn = self._turn == (delta, LOOK)
                use.looks_at_rows = has_turn or self._rows.is_asked(use, delta)
                known.append((use, delta))
            else:
                del self._deltas[name]
                self._moves.drop(name)
        return known
