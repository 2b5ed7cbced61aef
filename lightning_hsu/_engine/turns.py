"""Kept gradients have turns: one at each step, so that no step takes many launches for them.

Now and then the neurons of a layer are looked at one by one (rows.py), and its gradient is projected
on their tangent (pull.py). (At 16 steps the projection takes 0.3 % off an error of 15 %: it keeps
norms from drifting, and need not be done at each step.) For a whole model at once either would take
some hundred launches on a GPU. So a step does one of the two, for one layer: for the gradient that
has waited longest, in parts of its age, among those that are 8 steps old or older. One layer alone
has its turns at ages 8 and 9, 16 and 17, 32 and 33, and so on.

Ages are counts of steps: ranks give turns to the same layers, and each run does.
"""

from __future__ import annotations

from collections.abc import Iterable

from lightning_hsu._engine.delta import LOOK, Delta

Turn = tuple[Delta, str]
"""A gradient, and what is done for it."""

_LONGEST_WITHOUT = 4
"""Steps in a row that give no turn, since they follow a pull (pull.py), which takes launches, too.

The pull of one layer is followed at the ages 1 to 4, and never longer in a row.
"""


class Turns:
    """The turns of kept gradients."""

    def __init__(self) -> None:
        self._given: dict[object, Turn | None] = {}
        self._steps_without = 0

    def give(self, optimizer: object, deltas: Iterable[Delta]) -> Turn | None:
        """The turn at an optimizer's next step; it stays the same until that :meth:`take` it.

        Args:
            optimizer: What stands for the optimizer.
            deltas: The gradients that the step may use.
        """
        if optimizer not in self._given:
            self._given[optimizer] = self._choose(deltas)
        return self._given[optimizer]

    def take(self, optimizer: object, deltas: Iterable[Delta]) -> Turn | None:
        """The turn at this step of an optimizer."""
        self.give(optimizer, deltas)
        return self._given.pop(optimizer)

    def drop(self) -> None:
        """Drop what was given."""
        self._given = {}
        self._steps_without = 0

    def _choose(self, deltas: Iterable[Delta]) -> Turn | None:
        """Choose a gradient, and note from which age it has its next turn."""
        chosen = None
        longest = 0.0
        is_followed = False
        for delta in deltas:
            is_followed = is_followed or delta.is_followed
            for what, age in delta.turns.items():
                waited = delta.age / age
                can_be_done = what != LOOK or delta.sketch is not None
                if can_be_done and waited >= 1 and waited > longest:
                    chosen = delta, what
                    longest = waited
        if is_followed and self._steps_without < _LONGEST_WITHOUT:
            self._steps_without += 1
            return None
        self._steps_without = 0
        if chosen is not None:
            delta, what = chosen
            while delta.turns[what] <= delta.age:
                delta.turns[what] *= 2
        return chosen
