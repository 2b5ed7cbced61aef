"""Facts about a measure's function, and whether they hold in a subclass with another function.

A closed form, an expectation or a bound is true of one function only. ``@final`` would keep it true
by forbidding subclasses with a function of their own, which users write. A ClassVar that names the
function would have to be reset by each such subclass, and whoever forgets gets a wrong gradient in
silence. So what a class defines is compared once, when the class is made; nothing is compared in a
step. A method assigned to the class later is not seen.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

FUNCTION = ("penalty", "on_sphere", "kernel")
"""The methods in which a measure defines its function."""


@dataclass(frozen=True)
class Fact:
    """An attribute that is true of one function only.

    Args:
        rests_on: The methods that make up this function.
        needs_function: Whether a class may override the attribute only together with one of these
            methods. Then a class cannot give the gradient of one function and leave another one in
            place.
        otherwise: The attribute's value if no class's statement holds. None means the very first
            statement, which must then be true of any function.
    """

    rests_on: tuple[str, ...]
    needs_function: bool = False
    otherwise: object = None


GRADIENT = Fact(FUNCTION, needs_function=True)
"""A gradient, or what a gradient is computed from."""

VALUE = Fact((*FUNCTION, "natural"))
"""A value of the measure, such as the expected or the best one."""


def keep_what_holds(kind: type, facts: dict[str, Fact]) -> None:
    """Set on a new class the facts that hold for it.

    A fact rests on the methods of the class that states it, except those that this class itself
    leaves abstract: the fact is true whatever they will be. If a later class, perhaps a mixin,
    overrides one of the other methods, the fact no longer holds. Then the next statement in the
    method resolution order, that of a base class, applies.

    Raises:
        TypeError: if a class overrides a fact that it may override only together with the function.
    """
    # The class did not state what is set here; dataclass(slots=True) copies it to another class.
    replaced = set[str](vars(kind).get("_replaced", ()))
    kind._replaced = replaced  # type: ignore[attr-defined]
    for name, fact in facts.items():
        stated_by = _classes_with(kind, name)
        if not stated_by:
            continue
        owner = next((one for one in stated_by if _holds(kind, one, fact)), None)
        if owner is None and fact.otherwise is None:
            owner = stated_by[-1]
        if owner is not None and fact.needs_function:
            _check_function(kind, owner, name, fact)
        value = fact.otherwise
        if owner is not None:
            value = vars(owner)[name]
        if inspect.getattr_static(kind, name) is not value:
            setattr(kind, name, value)
            replaced.add(name)


def _classes_with(kind: type, name: str) -> list[type]:
    """The classes of the method resolution order that define a name themselves."""
    found = []
    for one in kind.__mro__:
        if name in vars(one) and name not in vars(one).get("_replaced", ()):
            found.append(one)
    return found


def _holds(kind: type, owner: type, fact: Fact) -> bool:
    """Whether what ``owner`` states is true of ``kind``: nothing it rests on is overridden."""
    for method in fact.rests_on:
        known = inspect.getattr_static(owner, method, None)
        left_open = method in vars(owner) and getattr(known, "__isabstractmethod__", False)
        if known is None or left_open:
            continue
        defined_by = _classes_with(kind, method)[0]
        if defined_by not in owner.__mro__:  # issubclass asks the ABC, which is not ready yet
            return False
    return True


def _check_function(kind: type, owner: type, name: str, fact: Fact) -> None:
    """Refuse a class that overrides a gradient but not the function."""
    if any(method in vars(owner) for method in fact.rests_on):
        return
    methods = " or ".join(method for method in fact.rests_on if hasattr(kind, method))
    raise TypeError(
        f"{owner.__name__} overrides {name} without the function it belongs to: "
        f"define {methods} in {owner.__name__} as well, or only that, and {name} follows from it"
    )
