"""Whether a gradient that was added to is still there when the optimizer steps."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_hsu._engine.layer import version_of
from lightning_hsu._optimizers import is_within_step, runs_hooks

_IN_A_ROW = 2  # once may be a step that was rejected


class AddedGradient:
    """Looks at the steps of an optimizer until one takes the gradient that was just added to.

    That gradient is discarded if the step takes another one, or none, and if the next addition
    finds just what the step took: then no backward pass came between, and the addition follows the
    step. A gradient that is replaced by what is made of it is not discarded.

    The gradient is kept from the addition to the step, where it is alive in a right order, and what
    a step took to the next addition, only if it was another one.

    Args:
        optimizer: The optimizer, or a wrapper that has it as its ``optimizer``. It is not kept
            alive; its hook goes when this object does.
        parameter: The parameter whose gradient is looked at.
        tell: What to call if the gradients of two steps in a row were discarded.

    Attributes:
        is_settled: Whether there is nothing left to look at.
    """

    def __init__(
        self, optimizer: Optimizer, parameter: nn.Parameter, tell: Callable[[], None]
    ) -> None:
        self.is_settled = True
        self._parameter = parameter
        self._tell = tell
        self._added: Tensor | None = None
        self._taken: tuple[Tensor | None, int | None] | None = None
        self._in_a_row = 0
        if not runs_hooks(optimizer):
            optimizer = getattr(optimizer, "optimizer", optimizer)
        if not runs_hooks(optimizer):
            return
        if is_within_step(sys._getframe(), optimizer):
            return  # in a closure or a hook: what it adds to is what the step takes
        self.is_settled = False
        handle = optimizer.register_step_pre_hook(_Look(weakref.ref(self)))
        end = weakref.finalize(self, _take_off, handle, weakref.ref(optimizer))
        end.atexit = False

    def begin(self) -> None:
        """Look at the gradient that is about to be added to."""
        taken, self._taken = self._taken, None
        grad = self._parameter.grad
        if taken is None:
            return
        if grad is not taken[0] or _version(grad) != taken[1]:
            self._in_a_row = 0  # a backward pass came after the step

    def note(self) -> None:
        """Note the gradient that was just added to."""
        if not self.is_settled:
            self._added = self._parameter.grad

    def look(self) -> None:
        """Look at the gradient that a step takes, once after each addition."""
        added, self._added = self._added, None
        if added is None or self.is_settled:
            return
        grad = self._parameter.grad
        if grad is added:
            self.is_settled = True
            return
        self._in_a_row += 1
        if self._in_a_row < _IN_A_ROW:
            self._taken = grad, _version(grad)
            return
        self.is_settled = True
        self._tell()


class _Look:
    """What torch calls before a step.

    Args:
        added: What looks at it; None in copies and pickles of an optimizer.
    """

    def __init__(self, added: weakref.ref[AddedGradient] | None = None) -> None:
        self._added = added

    def __call__(self, *_: Any) -> None:
        if torch.compiler.is_compiling() or self._added is None:
            return
        added = self._added()
        if added is not None:
            added.look()

    def __reduce__(self) -> tuple[type[_Look], tuple[()]]:
        return _Look, ()


def _take_off(handle: RemovableHandle, optimizer: weakref.ref[Optimizer]) -> None:
    """Take a hook off an optimizer, unless it is about to call its hooks: then it does nothing."""
    known = optimizer()
    if known is not None and not is_within_step(sys._getframe(), known):
        handle.remove()


def _version(grad: Tensor | None) -> int | None:
    return None if grad is None else version_of(grad)
