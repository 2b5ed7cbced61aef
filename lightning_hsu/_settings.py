"""Settings that are assigned after their object was made: they count, or are refused; none is ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class BeforeAttach(Generic[T]):
    """A setting that counts when a model is attached, and is refused while one is.

    Its object has ``is_attached``.

    Args:
        doc: What it is.
        check: Returns the value to keep, or raises; None keeps any.
    """

    def __init__(self, doc: str, check: Callable[[Any], T] | None = None) -> None:
        self.__doc__ = f"{doc}; it may be changed while no model is attached."
        self._check = check
        self._name = ""

    def __set_name__(self, kind: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, kind: type | None = None) -> T:
        """The value; of the class the setting itself."""
        if owner is None:
            return self  # type: ignore[return-value]
        value: T = owner.__dict__[f"_{self._name}"]
        return value

    def __set__(self, owner: Any, value: Any) -> None:
        """Check a value and keep it."""
        refuse_attached(self._name, is_attached=owner.is_attached)
        if self._check is not None:
            value = self._check(value)
        owner.__dict__[f"_{self._name}"] = value


class OfRegularizer:
    """A setting of a callback that is its regularizer's.

    Args:
        doc: What it is.
    """

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc
        self._name = ""

    def __set_name__(self, kind: type, name: str) -> None:
        self._name = name

    def __get__(self, callback: Any, kind: type | None = None) -> Any:
        """The regularizer's value; of the class the setting itself."""
        if callback is None:
            return self
        return getattr(callback.regularizer, self._name)

    def __set__(self, callback: Any, value: Any) -> None:
        """Let the regularizer check the value, and take it."""
        setattr(callback.regularizer, self._name, value)


def refuse_attached(name: str, *, is_attached: bool) -> None:
    """Refuse to change a setting while a model is attached.

    Raises:
        AttributeError: if one is, with the way out.
    """
    if is_attached:
        raise AttributeError(
            f"{name} cannot be assigned while a model is attached, as during a fit: give it to the "
            "constructor or assign it before trainer.fit; in a loop of your own call detach(), "
            "assign it, and attach(model) again"
        )
