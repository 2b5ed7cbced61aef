"""What is called after the steps of optimizers of any make."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from types import CodeType, FrameType, MethodType
from typing import Any

from torch.optim import Optimizer


def _code_around_steps() -> CodeType | None:
    """The code with which torch runs the hooks of a step, the same for all classes.

    It is a private part of torch: where it has moved, ``super().step()`` counts as a step, too.
    """
    prepare: Any = getattr(Optimizer, "profile_hook_step", None)
    return None if prepare is None else prepare(print).__code__


_AROUND_STEP = _code_around_steps()


class AfterStep:
    """Calls ``act(self)`` once per completed step, even if ``step`` calls ``super().step()``.

    It may be made in the middle of a step of an optimizer that runs torch's hooks: that step counts.
    For another one (a wrapper that skips ``Optimizer.__init__``, or a class of its own) ``step`` is
    replaced on the instance, which the step under way does not see: see :meth:`end_late_step`.

    Args:
        optimizer: The optimizer to hook.
        position: Its position among the trainer's optimizers; None if it has none.
        act: What to call. It returns whether it wants to be called again.

    Attributes:
        is_on: Whether ``act`` is still called.
        is_late: Whether the step under way began before ``step`` was replaced.
        replaces_step: Whether ``step`` is replaced, since torch's hooks are not run.
        is_stepping: Whether the replacement is under way.

    Raises:
        NotImplementedError: if the optimizer allows neither.
    """

    def __init__(
        self, optimizer: Optimizer, position: int | None, act: Callable[[AfterStep], bool]
    ) -> None:
        self.optimizer = optimizer
        self.position = position
        self.is_on = True
        self.is_late = False
        self.replaces_step = not runs_hooks(optimizer)
        self.is_stepping = False
        self._act = act
        self._take_off: Callable[[], None]
        if self.replaces_step:
            self._take_off = replace_step(optimizer, self._around)
        else:
            self._take_off = optimizer.register_step_post_hook(self._after).remove

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        self.is_on = False
        self._take_off()

    def end_late_step(self) -> None:
        """Note the end of a step that began before ``step`` was replaced."""
        if self.is_late:
            self._done()

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        """What torch calls after a step, and after each parent's step within it."""
        if optimizer is not self.optimizer:  # a copy of a wrapper, which has its hooks, too
            return
        around = sys._getframe(1)
        if is_within_step(around.f_back, optimizer):
            return
        self._done()
        if not self.is_on and _is_last(self._after, optimizer):
            self._take_off()

    @contextmanager
    def _around(self) -> Iterator[None]:
        """What a replaced step runs within."""
        self.is_stepping = True
        try:
            yield
        finally:
            self.is_stepping = False
        self._done()

    def _done(self) -> None:
        """Act after a step."""
        self.is_late = False
        if self.is_on:
            self.is_on = self._act(self)
        if not self.is_on and self.replaces_step:
            self._take_off()


class AfterOwnStep(AfterStep):
    """The same in a loop without a Trainer: it does not keep an optimizer that its owner drops.

    That must go at once: the next one takes its count.
    """

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer.

        Raises:
            ReferenceError: if it is gone.
        """
        optimizer = self._known()
        if optimizer is None:
            raise ReferenceError("the optimizer is gone")
        return optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        self._known = weakref.ref(optimizer)

    def is_of(self, optimizer: Optimizer) -> bool:
        """Whether it is the hook on this optimizer."""
        return self._known() is optimizer


def runs_hooks(optimizer: Optimizer) -> bool:
    """Whether torch's hooks are run around the optimizer's steps."""
    if not isinstance(optimizer, Optimizer):
        return False
    is_prepared = "_optimizer_step_post_hooks" in vars(optimizer)
    # A step on the instance may be anything; what wraps the class's, as schedulers do, keeps its marks.
    step = vars(optimizer).get("step", type(optimizer).step)
    return is_prepared and getattr(step, "hooked", False) is True


def is_within_step(frame: FrameType | None, optimizer: Optimizer) -> bool:
    """Whether a frame runs within a step of the optimizer, as ``super().step()`` does."""
    while frame is not None:
        if frame.f_code is _AROUND_STEP and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def _is_last(hook: Callable[..., None], optimizer: Optimizer) -> bool:
    """Whether a hook is the last: another one cannot be taken off while torch calls them all."""
    hooks = list(optimizer._optimizer_step_post_hooks.values())
    return bool(hooks) and hooks[-1] == hook


def replace_step(
    optimizer: Optimizer, around: Callable[[], AbstractContextManager[None]]
) -> Callable[[], None]:
    """Replace ``step`` on this instance by one within a context; return what takes it off.

    It goes without a trace, unless somebody has replaced the replacement; then it does nothing.
    """
    inner: Any = optimizer.step
    is_bound = getattr(inner, "__self__", None) is optimizer
    unbound = inner.__func__ if is_bound else inner
    is_on = True

    @wraps(unbound)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        is_ours = is_on and self is optimizer  # a deep copy has this function, too
        with around() if is_ours else nullcontext():
            if is_bound:
                return unbound(self, *args, **kwargs)
            return unbound(*args, **kwargs)

    replacement = MethodType(step, optimizer)  # schedulers of learning rates expect a method
    try:
        before = vars(optimizer).get("step")
        optimizer.step = replacement  # type: ignore[method-assign]
    except (AttributeError, TypeError) as error:
        raise NotImplementedError(
            f"{type(optimizer).__name__} runs none of torch's hooks, and its step cannot be replaced "
            "on the instance, so nothing tells when it has stepped: derive it from "
            "torch.optim.Optimizer, or give it a __dict__"
        ) from error

    def take_off() -> None:
        nonlocal is_on
        is_on = False
        if vars(optimizer).get("step") is not replacement:
            return
        if before is None:
            del vars(optimizer)["step"]
        else:
            optimizer.step = before  # type: ignore[method-assign]

    return take_off
