"""Arguments in each other's places: errors that give the line that was meant."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real

from torch import nn

from lightning_hsu import measures, projections
from lightning_hsu.coefficients import Coefficient, Varying
from lightning_hsu.measures import Measure
from lightning_hsu.measures.defaults import COEFFICIENT

PRESETS = (
    "mhe_0",
    "mhe_1",
    "mhe_2",
    "mhe_a0",
    "mhe_a1",
    "mhe_a2",
    "half_mhe_0",
    "half_mhe_1",
    "half_mhe_2",
    "half_mhe_a0",
    "half_mhe_a1",
    "half_mhe_a2",
    "mhs",
    "mhp",
    "r_mhp",
    "mhc",
    "mgd",
    "comhe_rp",
    "comhe_ap",
    "comhe_adv",
    "mhe",
    "half_mhe",
)
"""The names that :func:`~lightning_hsu.presets.sphere_uniformity` knows."""


@dataclass(frozen=True)
class Maker:
    """What makes a callback or a regularizer, as a user writes it.

    Args:
        name: The class that is called, or its subclass.
        package: Where it is imported from, if it is not what the user has called; else "".
        of_preset: What follows ``sphere_uniformity(name)``, which makes a callback.
    """

    name: str
    package: str = ""
    of_preset: str = ""

    def line(self, arguments: str, name: str = "", package: str = "") -> str:
        """The question whether a call with these arguments was meant.

        Args:
            arguments: Those of the call.
            name: What in them has to be imported; "" if nothing has.
            package: Where that is.
        """
        imports = [_import(name, package), _import(self.name, self.package)]
        return _question(f"{self.name}({arguments})", imports)

    def preset_line(self, preset: str, further: str = "") -> str:
        """The question whether a preset was meant, which takes no ``further`` arguments."""
        call = f"sphere_uniformity({preset!r}){self.of_preset}"
        asked = _question(call, [_import("sphere_uniformity", "lightning_hsu.presets")])
        return (
            f"{asked} It has coefficients of its own, and no limit but share_limit="
            if further
            else asked
        )

    def meant_by(self, given: object, further: str = "") -> str:
        """The question what was meant by one argument in a wrong place; "" if nobody knows.

        Args:
            given: The argument.
            further: What else was given and is meant as it is, as it stands in code.
        """
        if isinstance(given, str):
            return self._meant_by_text(given, further)
        if isinstance(given, type) and issubclass(given, Measure):
            return self.line(_instance(given) + further)
        if isinstance(given, type) and issubclass(given, Varying):
            return self.line(f"coefficient={_instance(given)}")
        if isinstance(given, Measure):
            return self.line(repr(given))
        if _is_coefficient(given):
            return self.line(f"coefficient={_shown(given)}")
        return ""

    def _meant_by_text(self, text: str, further: str) -> str:
        """The same for a number in quotes, or the name of a preset or of a measure."""
        number = _number(text)
        if number is not None:
            return self.line(f"coefficient={number}")
        kinds = _kinds()
        last = text.rpartition(".")[2].lower()  # of a dotted name
        close = get_close_matches(last, [*PRESETS, *kinds], n=1)
        if not close:
            return ""
        if close[0] in PRESETS:
            return self.preset_line(close[0], further)
        kind, package = kinds[close[0]]
        return self.line(_instance(kind) + further, kind.__name__, package)


def check_places(maker: Maker, measure: object, coefficient: object) -> None:
    """Refuse a coefficient for a measure, a measure for a coefficient, and names for either.

    What nobody can know the meaning of is left to the checks of the measure and the coefficient.

    Raises:
        TypeError: one line with what was meant.
    """
    if measure is None:
        if not _is_coefficient(coefficient):
            rule = "coefficient must be a number, a schedule or a Share"
            _refuse(rule, coefficient, maker.meant_by(coefficient))
        return
    if isinstance(measure, Measure):
        return
    further = ""
    if _is_coefficient(coefficient) and _shown(coefficient) != _shown(COEFFICIENT):
        further = f", coefficient={_shown(coefficient)}"
    meant = maker.meant_by(measure, further)
    if isinstance(coefficient, Measure) and _is_coefficient(measure):
        meant = maker.line(f"{coefficient!r}, {_shown(measure)}")
    _refuse("measure must be an instance such as RieszEnergy(s=2)", measure, meant)


def check_preset(name: object) -> None:
    """Refuse a name that is no preset's.

    Raises:
        ValueError: for a text, with the presets that there are.
        TypeError: for anything else.
    """
    maker = Maker("HypersphericalUniformity", "lightning_hsu")
    if not isinstance(name, str):
        meant = maker.meant_by(name)
        _refuse("name must be a preset's name such as 'half_mhe_2'", name, meant)
        raise TypeError(f"name must be a preset's name such as 'half_mhe_2'; got {name!r}")
    if name not in PRESETS:
        meant = maker.meant_by(name)
        if meant:
            meant = f": {meant}"
        raise ValueError(
            f"there is no preset {name!r}{meant}; the presets are: {', '.join(PRESETS)}"
        )


def _refuse(rule: str, given: object, meant: str) -> None:
    """Raise an error if it is known what was meant."""
    if meant:
        raise TypeError(f"{rule}; got {given!r}: {meant}")


def _question(call: str, imports: list[str]) -> str:
    """The question whether a call was meant, with its imports."""
    needed = "; ".join(filter(None, imports))
    if needed:
        return f"did you mean {call}? ({needed})"
    return f"did you mean {call}?"


def _import(name: str, package: str) -> str:
    """The statement that imports a name; "" without a package."""
    if not package:
        return ""
    return f"from {package} import {name}"


def _is_coefficient(given: object) -> bool:
    """Tell whether a coefficient would be taken; a model, which can be called, is none."""
    if isinstance(given, nn.Module):
        return False
    try:
        Coefficient(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def _shown(coefficient: object) -> str:
    """A coefficient as it stands in code."""
    if isinstance(coefficient, Real):
        return str(coefficient)  # a number of numpy as one of Python
    name = getattr(coefficient, "__name__", "")
    if name == "<lambda>":
        return "lambda step: ..."
    return name or repr(coefficient)


def _number(text: str) -> str | None:
    """A text that is a coefficient as a number, else None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return text.strip() if _is_coefficient(value) else None


def _instance(kind: type) -> str:
    """A call of a class, with dots where it needs arguments."""
    for parameter in inspect.signature(kind).parameters.values():
        takes_any = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not takes_any:
            return f"{kind.__name__}(...)"
    return f"{kind.__name__}()"


def _kinds() -> dict[str, tuple[type, str]]:
    """The classes of measures, each with its package, by their names in small letters."""
    found: dict[str, tuple[type, str]] = {}
    for package in (measures, projections):
        for name in package.__all__:
            kind = getattr(package, name)
            is_measure = isinstance(kind, ABCMeta) and issubclass(kind, Measure)
            if is_measure and not inspect.isabstract(kind):
                found[name.lower()] = kind, package.__name__
    return found
